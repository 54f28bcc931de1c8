"""Where every sample's bytes lie: many files as one long dataset, and its splits.

      files      a.h5 (3 samples)   b.h5 (4)   c.h5 (2)
      starts     0                  3          7          9
      sample 5 = row 2 of b.h5

World rank 0 reads the metadata once and broadcasts an `Index`; no sample is read here but the
coordinate that the splits speak of.
"""

import glob
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hpctrain.config import SAMPLE_WEIGHTS, Data, names_to_paths
from hpctrain.data import coordinate as axis
from hpctrain.data import order
from hpctrain.data.splits import Split, cut_splits
from hpctrain.errors import ConfigError, DataError, nearest


@dataclass(frozen=True)
class Variable:
    """One dataset over all files: `shape` of one sample, stored `dtype`, CF packing."""

    name: str
    path: str
    shape: tuple[int, ...]
    dtype: str
    scale: float | None = None
    offset: float | None = None
    fill: float | None = None
    units: str = ""

    @property
    def packed(self) -> bool:
        """Whether values are `stored * scale_factor + add_offset`."""
        return self.scale is not None or self.offset is not None

    @property
    def floating(self) -> bool:
        """Whether values are real numbers once read."""
        return self.packed or np.dtype(self.dtype).kind == "f"


@dataclass(frozen=True)
class Index:
    """The long dataset: files, where each starts, variables, splits and its coordinate."""

    files: tuple[str, ...]
    starts: tuple[int, ...]
    """First sample of each file, and the length as last entry."""
    variables: dict[str, Variable]
    splits: dict[str, Split]
    coordinate: NDArray[np.float64] | None = None
    coordinate_attributes: tuple[tuple[str, str], ...] = ()

    @property
    def length(self) -> int:
        """Samples in all files."""
        return self.starts[-1]

    def locate(self, sample: int) -> tuple[str, int]:
        """File and row of a sample."""
        which = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return self.files[which], sample - self.starts[which]

    def identity(self) -> dict[str, Any]:
        """Say what the samples are, as JSON: a resumed run must find the same."""
        return {
            "samples": {name: len(split) for name, split in sorted(self.splits.items())},
            "shapes": {name: list(v.shape) for name, v in sorted(self.variables.items())},
        }

    def check_finite(self, name: str, samples: order.Ids, values: NDArray[Any]) -> None:
        """Raise DataError naming file, dataset and row of the first sample with a NaN or infinity."""
        if values.dtype.kind != "f" or np.isfinite(values).all():
            return
        bad = ~np.isfinite(values.reshape(len(values), -1)).all(axis=1)
        sample = int(samples[np.flatnonzero(bad)[0]])
        path, row = self.locate(sample)
        more = int(bad.sum()) - 1
        raise DataError(
            f"{path}: {self.variables[name].path}[{row}] (sample {sample}) holds NaN, infinity or "
            f"_FillValue{f', and so do {more} more samples read with it' if more else ''}: mend the "
            f'file; where missing values are in a target, data.missing = "mask" leaves them out'
        )


def build(config: Data) -> Index:
    """Read the metadata of all files and cut the splits. Local: call it on one rank.

    Raises ConfigError for names and splits that can't be, DataError for files that can't be
    read or disagree.
    """
    files = find_files(config.files)
    wanted = wanted_variables(config)
    variables: dict[str, Variable] = {}
    starts, coordinates = [0], []
    attributes: dict[str, str] = {}
    for path in files:
        with open_file(path) as file:
            length = read_metadata(file, path, wanted, variables)
            if config.coordinate:
                values = find_dataset(file, path, config.coordinate)
                if values.shape != (length,):
                    raise DataError(
                        f"{path}: data.coordinate {config.coordinate} has shape {values.shape}, "
                        f"the datasets have {length} samples: it must have one number a sample"
                    )
                found = axis.text_attributes(values)
                attributes = attributes or found
                coordinates.append(
                    axis.in_units(values[:], found, attributes, f"{path}: {config.coordinate}")
                )
        starts.append(starts[-1] + length)
    if starts[-1] == 0:
        raise DataError(f"data.files: {len(files)} files hold no sample")
    joined = np.concatenate(coordinates) if coordinates else None
    splits = cut_splits(config, starts[-1], joined, attributes)
    return Index(tuple(files), tuple(starts), variables, splits, joined, tuple(sorted(attributes.items())))


ENDINGS = (".h5", ".hdf5", ".hdf", ".he5", ".nc", ".nc4")
"""Of names that HDF5 files have."""


def find_files(patterns: str | list[str]) -> list[str]:
    """Expand paths and globs, each glob sorted by name; a file that two of them name counts once."""
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matches = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else []
        if Path(pattern).is_file():
            matches = [pattern]
        if not matches:
            folder = Path(pattern).parent
            near = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
            near = [name for name in near if Path(name).suffix in ENDINGS] or near
            hint = f"there is no folder {folder}"
            if near:
                hint = nearest(Path(pattern).name, near, all_are="there are")
            raise DataError(f"data.files: no file {pattern}: {hint}")
        found += matches
    if not found:
        raise ConfigError('data.files is empty: name the HDF5 files, such as --data.files "*.h5"')
    return list({str(Path(path).resolve()): path for path in found}.values())


def wanted_variables(config: Data) -> dict[str, str]:
    """{name: path} of all datasets to be read, inputs first."""
    inputs, targets = names_to_paths(config.inputs), names_to_paths(config.targets)
    for key, names in (("inputs", inputs), ("targets", targets)):
        if not names:
            raise ConfigError(f'data.{key} is empty: name a dataset, such as --data.{key} "x"')
    wanted = dict(inputs)
    for name, path in targets.items():
        if wanted.setdefault(name, path) != path:
            raise ConfigError(
                f"data.inputs and data.targets both name {name}, for {wanted[name]} and {path}: "
                f'give one another name, such as targets = {{{name}_target = "{path}"}}'
            )
    if config.weights:
        wanted[SAMPLE_WEIGHTS] = config.weights
    return wanted


def open_file(path: str) -> h5py.File:
    """Open an HDF5 file for reading; what is wrong with it is said in the user's words."""
    try:
        # locks protect writers; many cluster filesystems have none, and reading needs none
        return h5py.File(path, "r", locking="best-effort")
    except OSError as error:
        text = str(error)
        if "truncated" in text:
            there, whole = (int(found) for found in re.findall(r"eof = (\d+)", text))
            why = f"it is truncated, {there:,} of {whole:,} bytes are there: copy it again"
        elif "signature" in text:
            why = "it is not an HDF5 file (netCDF-3 is none either: convert it with nccopy -k nc4)"
        else:
            why = text
        raise DataError(f"{path}: cannot be read: {why}") from None


def find_dataset(file: h5py.File, path: str, name: str) -> h5py.Dataset:
    """Give a dataset by its path in the file, or the nearest names in an error."""
    found = file.get(name)
    if isinstance(found, h5py.Dataset):
        return found
    names: list[str] = []
    file.visititems(lambda key, entry: names.append(key) if isinstance(entry, h5py.Dataset) else None)
    what = "is a group" if isinstance(found, h5py.Group) else "is not in the file"
    raise DataError(f"{path}: dataset {name} {what}: {nearest(name, names)}")


def read_metadata(file: h5py.File, path: str, wanted: dict[str, str], variables: dict[str, Variable]) -> int:
    """Fill `variables` from the first file, compare with it in the others; give the samples."""
    length = -1
    for name, dataset_path in wanted.items():
        dataset = find_dataset(file, path, dataset_path)
        variable = describe(name, dataset_path, dataset, path)
        known = variables.setdefault(name, variable)
        for what in ("shape", "dtype", "scale", "offset", "fill"):
            here, first = getattr(variable, what), getattr(known, what)
            if here != first:
                raise DataError(
                    f"{path}: {dataset_path} has {what} {here} a sample, "
                    f"the first file has {first}: all files must agree"
                )
        if length not in (-1, dataset.shape[0]):
            raise DataError(
                f"{path}: {dataset_path} has {dataset.shape[0]} samples, other datasets of the "
                f"file have {length}: all must have one row a sample"
            )
        length = dataset.shape[0]
    return length


def describe(name: str, dataset_path: str, dataset: h5py.Dataset, path: str) -> Variable:
    """Metadata of one dataset, the CF attributes scale_factor, add_offset, _FillValue included."""
    if dataset.ndim == 0:
        raise DataError(f"{path}: {dataset_path} is a scalar: it must have one row a sample")
    if dataset.dtype.kind not in "fiub":
        raise DataError(f"{path}: {dataset_path} has dtype {dataset.dtype}: float, integer or bool is needed")

    if dataset.is_virtual:
        for source in dataset.virtual_sources():
            if source.file_name != "." and not (Path(path).parent / source.file_name).is_file():
                raise DataError(
                    f"{path}: {dataset_path} is a virtual dataset and its source {source.file_name} "
                    f"is missing: its values would read as fill"
                )

    def number(key: str) -> float | None:
        value = dataset.attrs.get(key)
        return None if value is None else float(np.asarray(value).reshape(-1)[0])

    attributes = axis.text_attributes(dataset)
    fill = number("_FillValue")
    return Variable(
        name=name,
        path=dataset_path,
        shape=tuple(dataset.shape[1:]),
        dtype=dataset.dtype.str,
        scale=number("scale_factor"),
        offset=number("add_offset"),
        fill=None if fill is not None and np.isnan(fill) else fill,
        units=attributes.get("units", ""),
    )


def read_axis(path: str, name: str) -> NDArray[np.float64]:
    """Read a whole one-dimensional dataset of one file. Local."""
    with open_file(path) as file:
        values = find_dataset(file, path, name)
        if values.ndim != 1:
            raise DataError(f"{path}: {name} has shape {values.shape}, an axis has one dimension")
        return np.asarray(values[:], dtype=np.float64)
