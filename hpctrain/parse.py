"""From TOML and `--section.key value` to a `Config`, by jsonargparse; mistakes in the user's words."""

import copy
import glob
import re
import tomllib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import docstring_parser
from jsonargparse import ArgumentParser, Namespace

from hpctrain.config import Config, flatten
from hpctrain.errors import ConfigError, nearest

OPEN = ".init_args"
"""Keys that end so take any key below them: their class's signature is checked later."""


def parser(**options: Any) -> ArgumentParser:
    """Make a parser with an option for every field of `Config`, its docstring as help."""
    made = ArgumentParser(parser_mode="toml", exit_on_error=False, **options)
    _add(made, Config(), "")
    return made


def _add(target: ArgumentParser, defaults: Any, prefix: str) -> None:
    kind = type(defaults)
    hints = get_type_hints(kind)
    doc = docstring_parser.parse_from_object(kind)
    texts = {entry.arg_name: entry.description for entry in doc.params}
    group = target.add_argument_group(f"[{prefix}]", doc.short_description) if prefix else target
    for entry in fields(kind):
        key = f"{prefix}.{entry.name}" if prefix else entry.name
        if is_dataclass(hints[entry.name]):
            _add(target, getattr(defaults, entry.name), key)
        else:
            default, text = getattr(defaults, entry.name), texts[entry.name]
            group.add_argument(f"--{key}", type=hints[entry.name], default=default, help=text)


def from_toml(path: Path, overrides: Sequence[str] = (), folder: Path | None = None) -> Config:
    """Read a TOML file and overrides such as ["--train.steps", "20"].

    File paths in the TOML are relative to it (or to `folder`), in the overrides to the current
    folder. Raises ConfigError naming the key, what was found, and the nearest legal keys.
    """
    return _merge(read_toml(path), overrides, folder or path.parent.resolve(), str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file; a mistake in it is said with its line."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


def _merge(table: dict[str, Any], overrides: Sequence[str], folder: Path, where: str) -> Config:
    legal = list(flatten(Config()))
    check_keys(table, legal, where)
    options = [word[2:].split("=")[0] for word in overrides if word.startswith("--")]
    check_options(options, legal)
    table, overrides = take_tables(table, overrides)
    made = parser(prog="hpctrain")
    try:
        base = made.parse_object(table)
        base.data.files = absolute(base.data.files, folder)
        base.train.run_folder = absolute(base.train.run_folder, folder) if base.train.run_folder else ""
        before = base.data.files, base.train.run_folder
        where = "the command line"
        result = made.parse_args(list(overrides), namespace=base)
    except Exception as error:
        raise ConfigError(f"{where}: {tidy(str(error))}") from None
    if result.data.files != before[0]:
        result.data.files = absolute(result.data.files, Path.cwd())
    if result.train.run_folder != before[1]:
        result.train.run_folder = absolute(result.train.run_folder, Path.cwd())
    config: Config = to_dataclass(Config, result)
    check_values(config)
    return config


def take_tables(table: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Move overrides whose value is a TOML table into the file's table: jsonargparse reads none.

    >>> take_tables({}, ["--data.inputs", '{x = "a/b"}', "--train.steps", "3"])
    ({'data': {'inputs': {'x': 'a/b'}}}, ['--train.steps', '3'])
    """
    table, rest = copy.deepcopy(table), []
    words = [part for word in overrides for part in split_option(word)]
    at = 0
    while at < len(words):
        value = words[at + 1] if at + 1 < len(words) else ""
        if words[at].startswith("--") and value.startswith("{"):
            *sections, last = words[at][2:].split(".")
            inner = table
            for section in sections:
                inner = inner.setdefault(section, {})
            try:
                inner[last] = tomllib.loads(f"it = {value}")["it"]
            except tomllib.TOMLDecodeError as error:
                raise ConfigError(f"{words[at]} {value} is no TOML table: {error}") from None
            at += 2
        else:
            rest.append(words[at])
            at += 1
    return table, rest


def split_option(word: str) -> list[str]:
    """Split "--key={...}" at its first equals sign; leave other words alone."""
    key, equals, value = word.partition("=")
    return [key, value] if word.startswith("--") and equals and value.startswith("{") else [word]


def check_keys(table: dict[str, Any], legal: list[str], where: str, prefix: str = "") -> None:
    """Refuse a key that no dataclass has, with the nearest legal ones."""
    for name, value in table.items():
        key = prefix + name
        if key in legal:
            continue
        if any(known.startswith(key + ".") for known in legal):
            if not isinstance(value, dict):
                classed = isinstance(value, str) and f"{key}.class_path" in legal
                write = f': write {key} = {{class_path = "{value}"}}' if classed else ""
                raise ConfigError(f"{where}: {key} is a section, {value!r} was found{write}")
            check_keys(value, legal, where, key + ".")
            continue
        raise ConfigError(f"{where}: unknown key {key}: {near_keys(key, legal)}")


def check_options(options: list[str], legal: list[str]) -> None:
    """Refuse an option that is no key, with the nearest legal ones."""
    for key in options:
        plain = key.rstrip("+")
        inside = any(plain.startswith(known + ".") for known in legal if known.endswith(OPEN))
        if plain not in legal and not inside:
            raise ConfigError(f"unknown option --{key}: {near_keys(plain, legal)}")


def near_keys(key: str, legal: list[str]) -> str:
    """Name the legal keys nearest to a wrong one, by the whole key or by its last part.

    >>> near_keys("trian.steps", ["train.steps", "data.files"])
    'did you mean train.steps?'
    >>> near_keys("loss.class_path", ["train.loss.class_path", "model.class_path"])
    'did you mean train.loss.class_path?'
    >>> near_keys("steps", ["train.steps", "data.files"])
    'did you mean train.steps?'
    >>> near_keys("train.loss", ["train.steps", "train.loss.class_path"])
    'did you mean train.loss.class_path?'
    >>> near_keys("modle", ["train.steps", "model.class_path"])
    'did you mean model?'
    """
    below = [known for known in legal if known.startswith(key + ".")]
    if below:
        return f"did you mean {', '.join(below[:3])}?"
    inside = [known for known in legal if known.endswith("." + key)]
    if inside and "." in key:
        return f"did you mean {', '.join(inside[:3])}?"
    last = [known for known in legal if known.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    if last:
        return f"did you mean {', '.join(last[:3])}?"
    sections = {known[:at] for known in legal for at, letter in enumerate(known) if letter == "."}
    hint = nearest(key, [*legal, *sorted(sections)])
    section = [known for known in legal if known.startswith(key.split(".")[0] + ".")]
    return hint if hint.startswith("did") else nearest(key, section or legal)


def tidy(text: str) -> str:
    """Give jsonargparse's message on one line, without its internals.

    >>> tidy("train.monitor: Expected a typing.Literal['a', 'b']. Got value: c")
    "train.monitor: Expected one of 'a', 'b'. Got value: c"
    >>> tidy("parallel.cuts: Expected a list. Got value: c")
    'parallel.cuts: Expected a list, as ["a", "b"]. Got value: c'
    """
    text = re.sub(r"Expected a typing\.Literal\[([^]]*)\]", r"Expected one of \1", text)
    text = text.replace('Parser key "', "").replace('":\n', ": ").replace("<class '", "").replace("'>", "")
    text = text.replace("Expected a list.", 'Expected a list, as ["a", "b"].')
    lines = [line.strip(" -") for line in text.splitlines()]
    kept = [
        s for s in lines if s and not s.startswith(("Does not", "Subtypes", "Errors", "Given value type"))
    ]
    return " ".join("; ".join(kept).split())


def absolute(paths: Any, folder: Path) -> Any:
    """Make a path, or each of a list, absolute, seen from a folder."""
    if isinstance(paths, list):
        return [absolute(path, folder) for path in paths]
    if not paths:
        return paths
    path = Path(paths).expanduser()
    if path.is_absolute() or not glob.has_magic(paths):
        return str(folder / path)
    return str(Path(glob.escape(str(folder))) / path)  # the folder's own name is no pattern


def to_dataclass(kind: Any, values: Namespace) -> Any:
    """Turn jsonargparse's namespace into the dataclasses."""
    hints = get_type_hints(kind)
    found = {}
    for entry in fields(kind):
        value = getattr(values, entry.name)
        if is_dataclass(hints[entry.name]):
            value = to_dataclass(hints[entry.name], value)
        elif isinstance(value, Namespace):
            value = value.as_dict()
        found[entry.name] = value
    return kind(**found)


def check_values(config: Config) -> None:
    """Refuse numbers that can't be, with what would do."""
    train, checkpoint = config.train, config.checkpoint
    lowest: list[tuple[str, float | None, float]] = [
        ("train.batch", train.batch, 1),
        ("train.epochs", train.epochs, 0),
        ("train.steps", train.steps, 0),
        ("train.clip", train.clip, 0),
        ("train.threads", train.threads, 1),
        ("train.validate_steps", train.validate_steps, 0),
        ("train.patience", train.patience, 0),
        ("checkpoint.every_steps", checkpoint.every_steps, 0),
        ("checkpoint.every_minutes", checkpoint.every_minutes, 0),
        ("checkpoint.keep", checkpoint.keep, 1),
        ("parallel.stages", config.parallel.stages, 1),
        ("parallel.virtual_stages", config.parallel.virtual_stages, 2),
    ]
    count = config.parallel.micro_batches
    if isinstance(count, int):
        lowest.append(("parallel.micro_batches", count, 1))
    for key, value, least in lowest:
        if value is not None and not value >= least:
            raise ConfigError(f"{key} = {value}: at least {least} was expected")
