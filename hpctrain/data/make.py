"""Make the HDF5 data of recipes from what packages ship."""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np

from hpctrain.data.output import MADE, refuse_others, temporary_beside
from hpctrain.errors import ConfigError

WINDOW, CONTEXT = 512, 128
"""Bytes of a window of text, and how many of them the window before has too."""
SUFFIXES = (".py", ".txt", ".rst", ".md")
FOREIGN = {"site-packages", "dist-packages", "__pycache__"}
"""Folders of what is not the standard library's own."""


def digits(output: Path) -> str:
    """Write the 1,797 scanned digits of scikit-learn's wheel: image (n, 8, 8) uint8, label uint8.

    (E. Alpaydin and C. Kaynak 1998, UCI Machine Learning Repository, CC BY 4.0.) Local. Gives a
    line for the user; raises ConfigError where scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError(
            "the digits come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from None
    found = load_digits()

    def fill(file: h5py.File) -> None:
        image = file.create_dataset(
            "image", data=found.images.astype(np.uint8), chunks=(64, 8, 8), compression="gzip", shuffle=True
        )
        image.attrs["long_name"] = "grey value of a handwritten digit, 0 to 16"
        file.create_dataset("label", data=found.target.astype(np.uint8))
        file.attrs["title"] = "Optical Recognition of Handwritten Digits (test part)"
        file.attrs["references"] = "E. Alpaydin, C. Kaynak (1998), doi:10.24432/C50P49"
        file.attrs["license"] = "CC BY 4.0"

    write(output, fill)
    return f"wrote {output}: {len(found.images)} images"


def language(output: Path, folder: Path | None = None) -> str:
    """Write the texts under a folder, Python's standard library by default, as overlapping windows.

    text (n, WINDOW) uint8, zeros after a file's end; place (n, 3) int32: the file's number, first and stop
    of the bytes that no window before has; part (n,) int8, 1 for the tenth of the files that is held out;
    path, one a file. Local. Gives a line for the user; raises ConfigError where there is no text.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder: Python's standard library was expected there, not zipped")
    found = sorted((held_out(name), name, content) for name, content in texts(folder))
    if len({held for held, *_ in found}) < 2:
        raise ConfigError(
            f"{folder} holds {len(found)} files of text ({', '.join(SUFFIXES)}), too few to hold some out: "
            f"Python's standard library was expected there, not zipped"
        )
    text, place, part = [], [], []
    for number, (held, _, content) in enumerate(found):
        for start in range(0, max(1, len(content) - CONTEXT), WINDOW - CONTEXT):
            window = content[start : start + WINDOW]
            text.append(np.frombuffer(window.ljust(WINDOW, b"\0"), dtype=np.uint8))
            place.append((number, CONTEXT if start else 0, len(window)))
            part.append(held)

    def fill(file: h5py.File) -> None:
        file.create_dataset(
            "text", data=np.stack(text), chunks=(min(64, len(text)), WINDOW), compression="gzip"
        )
        file["text"].attrs["long_name"] = "windows of a file's bytes, each a few bytes into the one before"
        file.create_dataset("place", data=np.array(place, dtype=np.int32))
        file["place"].attrs["long_name"] = (
            "number of the file; first and stop of the bytes not in a window before"
        )
        file.create_dataset("part", data=np.array(part, dtype=np.int8))
        file["part"].attrs["long_name"] = "0: for training, 1: of a file that is held out"
        file.create_dataset("path", data=[name for _, name, _ in found], dtype=h5py.string_dtype())
        file.attrs["title"] = (
            f"Sources and documentation of Python {platform.python_version()}'s standard library"
        )
        file.attrs["license"] = "PSF-2.0"
        licence = folder / "LICENSE.txt"
        file.attrs["license_url"] = "https://docs.python.org/3/license.html"
        if licence.is_file():
            file.create_dataset("license", data=licence.read_text(encoding="utf-8", errors="replace"))

    write(output, fill)
    total = sum(len(content) for *_, content in found)
    kept = [len(content) for held, _, content in found if held]
    return (
        f"wrote {output}: {len(found)} files of {total:,} bytes, "
        f"{len(kept)} of them ({sum(kept):,} bytes) held out"
    )


def texts(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Give name and bytes of the texts below a folder; of equal ones one: none held out is learnt."""
    seen = set()
    for path in sorted(folder.rglob("*")):
        if (
            path.suffix not in SUFFIXES
            or FOREIGN & set(path.relative_to(folder).parts)
            or path.is_symlink()
            or not path.is_file()
        ):
            continue
        content = path.read_bytes()
        digest = hashlib.sha256(content).digest()
        if content and digest not in seen:
            seen.add(digest)
            name = path.relative_to(folder).as_posix()
            yield name.encode(errors="replace").decode(), content


def held_out(name: str) -> int:
    """Give 1 for a tenth of the files, by a digest of the name: the same ones on any machine."""
    digest = hashlib.sha256(name.encode()).digest()
    return int(int.from_bytes(digest[:8], "little") % 10 == 0)


def write(output: Path, fill: Callable[[h5py.File], None]) -> None:
    """Write a file under a temporary name, then rename it. Raises ConfigError over somebody's file."""
    refuse_others(output, MADE)
    temporary = temporary_beside(output)
    try:
        with h5py.File(temporary, "w") as file:
            file.attrs["source"] = MADE
            fill(file)
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
