"""What CONFIG on the command line means: a TOML file, a recipe's name, or nothing; and the run folder."""

from pathlib import Path

from hpctrain.config import Config
from hpctrain.errors import ConfigError, nearest
from hpctrain.parse import from_toml

RECIPES = Path(__file__).with_name("recipes")
DEFAULT_RECIPE = "climate"
MADE = {f"{name}.h5": f"hpctrain data make {name}" for name in ("digits", "language")}
"""Files of recipes that a command makes."""


def read_config(words: list[str]) -> Config:
    """Read CONFIG and the overrides: a TOML file, a recipe's name, or neither. Local."""
    name, overrides = DEFAULT_RECIPE, words
    if words and not words[0].startswith("-"):
        name, overrides = words[0], words[1:]
    path = Path(name)
    if name in recipes() and not path.is_file():
        path = RECIPES / f"{name}.toml"
        config = from_toml(path, overrides)
        config.data.files = recipe_files(config.data.files)
    else:
        if not path.is_file():
            near = [*recipes(), *(p.name for p in Path.cwd().glob("*.toml"))]
            raise ConfigError(f"CONFIG {name}: no such file or recipe: {nearest(name, near)}")
        config = from_toml(path, overrides)
    name = path.stem if path.stem != "config" else path.resolve().parent.name
    folder = config.train.run_folder or str(Path.cwd() / "runs" / name)
    if "#" in folder:
        folder = free_number(folder)
    config.train.run_folder = folder
    if config.averaging.invariant and config.train.threads is None:
        config.train.threads = 1  # kernels cut their sums by threads: a fair share would depend on the ranks
    return config


def recipe_files(files: str | list[str]) -> str | list[str]:
    """Find a recipe's file beside the recipe, else in the current folder or its data/."""
    if isinstance(files, list) or Path(files).is_file():
        return files
    name = Path(files).name
    for folder in (Path.cwd(), Path.cwd() / "data"):
        if (folder / name).is_file():
            return str(folder / name)
    if name in MADE and Path(files).parent == RECIPES:
        raise ConfigError(f"no file {name} here or in data/: make it with `{MADE[name]}`")
    return files


def recipes() -> list[str]:
    """Names of the recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def free_number(pattern: str) -> str:
    """Put the lowest number that is not taken in the place of `#` in a path.

    >>> free_number("/nowhere/climate-#")
    '/nowhere/climate-1'
    """
    number = 1
    while Path(pattern.replace("#", str(number))).exists():
        number += 1
    return pattern.replace("#", str(number))
