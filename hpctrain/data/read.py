"""Read samples by number into preallocated arrays, unpacked by the CF convention.

h5py files are opened in each rank, after MPI_Init, when first needed. A sample is one row of
each dataset, so a sample never mixes two files. Samples that lie close together are read at once, with what
lies between them.
"""

import itertools
import math
import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hpctrain.data.index import Index, Variable, open_file
from hpctrain.data.order import Ids
from hpctrain.errors import DataError

GAP_BYTES = 32 << 10
"""What lies between two samples is read too if it is no more: to ask HDF5 once more takes some
0.15 ms, in which 1 GB/s brings 150 KB."""
CHUNK_BYTES, UNPACKED = 8 << 10, 4
"""What to look up a chunk costs, in bytes; how many times as long its bytes take if they are compressed."""
BLOCK_BYTES = 8 << 20
"""Bytes with gaps that are read at once, at most."""
OPEN_FILES = 64
"""Files that one rank keeps open; more are closed, the one unused for longest first."""


class Reader:
    """Reads rows of an index's variables. Local; threads take turns."""

    def __init__(self, index: Index) -> None:
        """Take an index; no file is opened yet."""
        self.index = index
        self._open: OrderedDict[str, h5py.File] = OrderedDict()
        self._together: dict[tuple[str, str], tuple[int, int]] = {}
        self._turn = threading.Lock()

    def close(self) -> None:
        """Close the files."""
        while self._open:
            self._open.popitem()[1].close()

    def read(self, names: Iterable[str], samples: Ids) -> dict[str, NDArray[Any]]:
        """Read samples of several variables: {name: (n, *shape)}, see `result_dtype`."""
        return {name: self.read_one(name, samples) for name in names}

    def read_one(self, name: str, samples: Ids) -> NDArray[Any]:
        """Read samples of one variable, in the order asked, each sample as often as asked."""
        variable = self.index.variables[name]
        stored = np.empty((len(samples), *variable.shape), dtype=variable.dtype)
        in_order = np.argsort(samples, kind="stable")
        ascending = samples[in_order]
        with self._turn:
            for first, last in runs(ascending, self.index.starts, *self._rows(variable, ascending)):
                self._read_run(variable, ascending, in_order, first, last, stored)
        if variable.fill is not None and not variable.floating:
            self._refuse_fill(variable, samples, stored)
        return unpack(variable, stored)

    def _rows(self, variable: Variable, ascending: Ids) -> tuple[int, int]:
        """Give how many rows a gap may have, and a block with gaps: by the layout in the first one's file."""
        if not len(ascending):
            return 0, 1
        path = self.index.locate(int(ascending[0]))[0]
        if (path, variable.path) not in self._together:
            self._together[path, variable.path] = rows_together(self._file(path)[variable.path], variable)
        return self._together[path, variable.path]

    def _refuse_fill(self, variable: Variable, samples: Ids, stored: NDArray[Any]) -> None:
        """Integers have no NaN: a missing one would pass as a number."""
        bad = (stored.reshape(len(stored), -1) == variable.fill).any(axis=1)
        if bad.any():
            path, row = self.index.locate(int(samples[np.flatnonzero(bad)[0]]))
            raise DataError(
                f"{path}: {variable.path}[{row}] holds _FillValue {variable.fill:g}: integers can't "
                f"be missing; leave such samples out, or store the values as floats"
            )

    def _read_run(
        self, variable: Variable, ascending: Ids, places: Ids, first: int, last: int, out: Any
    ) -> None:
        path, row = self.index.locate(int(ascending[first]))
        dataset = self._file(path)[variable.path]
        offsets = ascending[first:last] - ascending[first]
        count, target = int(offsets[-1]) + 1, int(places[first])
        whole = np.array_equal(offsets, np.arange(last - first))
        try:
            if whole and np.array_equal(places[first:last], np.arange(target, target + count)):
                dataset.read_direct(out, np.s_[row : row + count], np.s_[target : target + count])
            else:
                block = dataset[row : row + count]
                out[places[first:last]] = block if whole else block[offsets]
        except OSError as error:
            if not whole and count > 1:  # what can't be read may be what nobody asked for
                edges = [0, *(np.flatnonzero(np.diff(offsets)) + 1).tolist(), len(offsets)]
                for start, stop in itertools.pairwise(edges):
                    self._read_run(variable, ascending, places, first + start, first + stop, out)
                return
            raise DataError(
                f"{path}: {variable.path} rows {row} to {row + count - 1} cannot be read: {error}"
            ) from None

    def _file(self, path: str) -> h5py.File:
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        if len(self._open) >= OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        self._open[path] = open_file(path)
        return self._open[path]


def rows_together(dataset: h5py.Dataset, variable: Variable) -> tuple[int, int]:
    """Give how many rows a gap may have, and a block with gaps, by a dataset's layout. Local."""
    size = cost = max(1, math.prod(variable.shape) * np.dtype(variable.dtype).itemsize)
    if dataset.chunks:
        rows, *inner = dataset.chunks
        bytes_of_one = math.prod(dataset.chunks) * dataset.dtype.itemsize
        for_one = CHUNK_BYTES + (UNPACKED * bytes_of_one if dataset.compression else 0)
        cost += for_one * math.prod(-(-n // c) for n, c in zip(dataset.shape[1:], inner)) // rows
    return GAP_BYTES // cost, max(1, BLOCK_BYTES // size)


def runs(ascending: Ids, starts: tuple[int, ...], gap: int, block: int) -> list[tuple[int, int]]:
    """Cut ascending samples into runs that lie close together in one file.

    Between neighbours of a run are `gap` rows at most; one with gaps spans `block` rows at most.

    >>> runs(np.array([3, 4, 5, 9, 10]), (0, 5, 20), 2, 100)
    [(0, 2), (2, 3), (3, 5)]
    >>> runs(np.array([3, 4, 5, 9, 10, 5000]), (0, 5, 9000), 3, 100)
    [(0, 2), (2, 5), (5, 6)]
    """
    if not len(ascending):
        return []
    file = np.searchsorted(starts, ascending, side="right")
    jump = np.diff(ascending) - 1 > gap
    edges = np.flatnonzero(jump | (np.diff(file) != 0)) + 1
    bounds = [0]
    for stop in [*edges.tolist(), len(ascending)]:
        bounds += pieces(ascending, bounds[-1], stop, block)
    return list(itertools.pairwise(bounds))


def pieces(ascending: Ids, start: int, stop: int, rows: int) -> list[int]:
    """Give where the pieces of a run end: those with gaps span so many rows at most, or one sample. Pure.

    >>> pieces(np.array([3, 4, 6, 7]), 0, 4, 2), pieces(np.array([3, 4, 5, 6]), 0, 4, 2)
    ([2, 4], [4])
    """
    if ascending[stop - 1] - ascending[start] == stop - start - 1 and stop - start > rows:
        return [stop]
    ends = []
    while start < stop:
        start = max(start + 1, int(np.searchsorted(ascending[:stop], ascending[start] + rows)))
        ends.append(start)
    return ends


def result_dtype(variable: Variable) -> np.dtype[Any]:
    """Dtype after reading: float32 for packed and floating data, int64 for integers, uint8, bool.

    float64 stays float64 only in the file: models compute in float32.
    """
    kind = np.dtype(variable.dtype)
    if variable.floating:
        return np.dtype(np.float32)
    return kind if kind in (np.dtype(np.uint8), np.dtype(bool)) else np.dtype(np.int64)


def unpack(variable: Variable, stored: NDArray[Any]) -> NDArray[Any]:
    """Stored values to values, by CF: fill becomes NaN, then `stored * scale + offset`.

    Computed in float64 and rounded once (CF conventions, section 8.1).
    """
    missing = None
    if variable.fill is not None and variable.floating:
        missing = stored == np.dtype(variable.dtype).type(variable.fill)
    if variable.packed:
        scale = 1.0 if variable.scale is None else variable.scale
        values = stored * np.float64(scale) + np.float64(variable.offset or 0.0)
    else:
        values = stored
    result = values.astype(result_dtype(variable), copy=False)
    if missing is not None and missing.any():
        result[missing] = np.nan
    return result
