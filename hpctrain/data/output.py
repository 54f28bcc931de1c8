"""Files that a command writes: whole or not at all, and never over somebody else's.

HDF5 files say in their attribute `source` which command wrote them; only that one writes over them.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import h5py

from hpctrain.errors import ConfigError

PREDICTIONS, MADE = "hpctrain predict", "hpctrain data make"
"""What `source` begins with, by the command."""
TRIES = 1000
"""Names for a temporary file, before it is given up."""


def refuse_others(path: Path, source: str, data: Iterable[str] = ()) -> None:
    """Raise ConfigError where `path` is one of the `data` files, or what the command did not write. Local."""
    if not path.exists():
        return
    if any(os.path.exists(file) and path.samefile(file) for file in data):
        raise ConfigError(f"--output {path} is among the run's data.files: name another file")
    try:
        with h5py.File(path, "r") as file:
            found = file.attrs.get("source", "")
    except OSError:
        found = ""
    if not (isinstance(found, str) and found.startswith(source)):
        refuse(path, source)


def refuse(path: Path, command: str) -> None:
    """Raise ConfigError: a file is there that the command did not write."""
    raise ConfigError(
        f"{path} is there already, and `{command}` has not written it: name another file, or take that one "
        f"away first"
    )


def temporary_beside(path: Path) -> Path:
    """Make an empty file of a new name in the folder of `path`, to be renamed to it. Local.

    Raises ConfigError where that can't be: a folder that is a file, say.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        for number in range(TRIES):
            found = path.with_name(f"{path.name}{f'.{number}' if number else ''}.tmp")
            try:
                os.close(os.open(found, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            except FileExistsError:
                continue
            return found
        raise FileExistsError(f"{path}.tmp to {found} are there")
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error}") from None
