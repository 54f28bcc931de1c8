"""From a class path and arguments to an object, checked against the signature first."""

import importlib
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from jsonargparse import ArgumentParser

from hpctrain.config import ClassPath
from hpctrain.errors import ConfigError, nearest, text_of


def callables(module: ModuleType) -> list[str]:
    """List what a module has of its own that may be called: not what it imports, if there is any. Pure."""
    named = {name: value for name, value in vars(module).items() if callable(value) and name[:1] != "_"}
    inside = (module.__name__, f"{module.__name__}.")  # a package has its classes in modules of its own
    homes = {name: getattr(value, "__module__", None) or "" for name, value in named.items()}
    return [name for name, home in homes.items() if home == inside[0] or home.startswith(inside[1])] or [
        *named
    ]


def find_class(path: str, key: str) -> Callable[..., Any]:
    """Import what a class path names; the current folder is searched too.

    `python -m hpctrain` has the current folder on the path, the console script has not.
    """
    folder = str(Path.cwd())
    if folder not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)
    module_name, _, name = path.rpartition(".")
    if not module_name:
        homes = ("torch.nn", "torch.optim", "torch.optim.lr_scheduler")
        known = [f"{home}.{path}" for home in homes if hasattr(importlib.import_module(home), path)]
        meant = f"did you mean {known[0]}?" if known else "such as my_module.MyModel"
        raise ConfigError(
            f"{key} = {path!r}: a module and a class were expected{': ' if known else ', '}{meant}"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not module_name.startswith(error.name):
            raise ConfigError(f"{key} = {path!r}: importing it needs the module {error.name}") from None
        near = sorted(Path.cwd().glob(f"*/{error.name}.py"))
        at = near[0].parent.name if near else ""
        raise ConfigError(
            f"{key} = {path!r}: there is no module {error.name}; a file of your own must lie in "
            f"the current folder ({folder}) or on PYTHONPATH"
            f"{f': {at}/{error.name}.py is found with PYTHONPATH={at}' if near else ''}"
        ) from None
    if not hasattr(module, name):
        raise ConfigError(
            f"{key} = {path!r}: {module_name} has no {name}: {nearest(name, callables(module))}"
        )
    found: Callable[..., Any] = getattr(module, name)
    if not callable(found):
        raise ConfigError(f"{key} = {path!r} is a {type(found).__name__}, a class was expected")
    return found


def check(spec: ClassPath, key: str, given: tuple[str, ...] = (), **filled: Any) -> dict[str, Any]:
    """Check a class's arguments against its signature; give them with what could be filled in.

    `given` are parameters that the program passes itself; of `filled` those that the signature
    has and the user did not set are taken. Raises ConfigError naming the argument and the
    nearest legal ones, a missing one, or a value of the wrong type.
    """
    factory = find_class(spec.class_path, f"{key}.class_path")
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return dict(spec.init_args)
    arguments = {name: value for name, value in filled.items() if name in parameters}
    arguments.update(spec.init_args)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    legal = [
        name
        for name, p in parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and name not in given
    ]
    for name in arguments:
        if name in given or (name not in legal and not open_ended):
            raise ConfigError(
                f"{key}.init_args.{name}: {spec.class_path} has no such argument: {nearest(name, legal)}"
            )
    missing = [n for n in legal if parameters[n].default is inspect.Parameter.empty and n not in arguments]
    if missing and not spec.init_args and inspect.isfunction(factory):
        meant = class_like(factory)
        raise ConfigError(
            f"{key}.class_path = {spec.class_path!r} is a function of {', '.join(missing)}: a class was "
            f"expected, or a function that makes an object (its arguments are {key}.init_args)"
            f"{f': did you mean {meant}?' if meant else ''}"
        )
    if missing:
        raise ConfigError(
            f"{key}.init_args: {spec.class_path} needs {', '.join(missing)}: "
            f"set {', '.join(f'{key}.init_args.{name}' for name in missing)}"
        )
    check_types(factory, arguments, key, set(given))
    return arguments


def class_like(function: Callable[..., Any]) -> str:
    """Name the class of torch's that does what a function of torch does; "" if there is none. Local.

    >>> import torch
    >>> class_like(torch.nn.functional.mse_loss)
    'torch.nn.MSELoss'
    """
    meant = function.__name__.replace("_", "").lower()
    names = dir(importlib.import_module("torch.nn")) if function.__module__ == "torch.nn.functional" else ()
    found = (name for name in names if name.lower() in (meant, f"{meant}loss"))
    return next((f"torch.nn.{name}" for name in found), "")


def check_types(
    factory: Callable[..., Any], arguments: dict[str, Any], key: str, skip: set[str | int]
) -> None:
    """Check values against the type hints, by jsonargparse; classes without hints pass."""
    try:
        parser = parser_of(factory, frozenset(skip))
    except TypeError:  # it can't be hashed
        parser = parser_of.__wrapped__(factory, frozenset(skip))
    if parser is None:
        return
    for name, value in arguments.items():
        if not any(action.dest == f"it.{name}" for action in parser._actions):
            continue
        try:
            parser.parse_object({"it": {name: value}}, defaults=False, _skip_required=True)
        except Exception as error:
            called = getattr(factory, "__name__", type(factory).__name__)
            lines = [line.strip() for line in str(error).splitlines() if "Expected" in line]
            raise ConfigError(
                f"{key}.init_args.{name} = {value!r} does not fit the type of {called}'s "
                f"argument: {'; '.join(lines) or error}"
            ) from None


@lru_cache(maxsize=32)
def parser_of(factory: Callable[..., Any], skip: frozenset[str | int]) -> ArgumentParser | None:
    """Give what reads a class's arguments; None for a signature that jsonargparse can't read. Local.

    That is no fault of the user's values. Kept, as it takes milliseconds and is asked for again and again.
    """
    parser = ArgumentParser(exit_on_error=False)
    try:
        if inspect.isclass(factory):
            parser.add_class_arguments(factory, "it", skip=set(skip), fail_untyped=False)
        else:
            parser.add_function_arguments(factory, "it", skip=set(skip), fail_untyped=False)
    except Exception:
        return None
    return parser


def prepare() -> None:
    """Let jsonargparse look for type stubs; call it before MPI_Init.

    Where typeshed-client is installed its first look starts a process, and a rank starts none.
    """

    def untyped(value):  # type: ignore[no-untyped-def]
        return value

    check_types(untyped, {"value": 1}, "it", set())


def build(spec: ClassPath, key: str, *positional: Any, **arguments: Any) -> Any:
    """Call the class; an error of its constructor names the class and the arguments."""
    factory = find_class(spec.class_path, f"{key}.class_path")
    try:
        return factory(*positional, **arguments)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{key}: {spec.class_path}({', '.join(f'{k}={v!r}' for k, v in arguments.items())}) "
            f"failed{line_of(error)}: {type(error).__name__}: {text_of(error)}"
        ) from error


def line_of(error: Exception) -> str:
    """Say at which line of the user's an error was raised; empty where in none. Local."""
    known = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    known |= {"<", str(Path(__file__).parent)}
    own = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*known,))]
    return f" at {own[-1].filename}:{own[-1].lineno}: `{own[-1].line}`" if own else ""
