"""HDF5 files that this trainer writes say so, and only such a file is written over: never somebody's data."""

from pathlib import Path

import h5py

from hpctrain.errors import ConfigError

SOURCE = "hpctrain "
"""What the attribute `source` of such a file begins with."""


def refuse_others(path: Path) -> None:
    """Raise ConfigError where something is at `path` that this trainer did not write. Local."""
    if not path.exists():
        return
    try:
        with h5py.File(path, "r") as file:
            source = file.attrs.get("source", "")
    except OSError:
        source = ""
    if not (isinstance(source, str) and source.startswith(SOURCE)):
        raise ConfigError(
            f"--output {path} is there already, and hpctrain has not written it: name another file, or take "
            f"that one away first"
        )
