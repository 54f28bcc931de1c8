"""Mean and deviation over the training samples, the same bits at any number of ranks.

The samples are cut into a fixed number of blocks; a block is summed whole, by one rank, and
the blocks are added in one order. So a sum over samples does not depend on the ranks:

      ranks 2   r0: blocks 0 … 31   r1: blocks 32 … 63   ──► Allreduce of (64, …), zeros elsewhere
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from hpctrain.data.index import Index
from hpctrain.data.order import Ids, block
from hpctrain.data.read import Reader
from hpctrain.data.splits import Split
from hpctrain.wire import together

BLOCKS = 64
AT_ONCE = 64
"""Samples in memory at a time."""


def blockwise(
    comm: MPI.Intracomm,
    length: int,
    blocks: int,
    shape: tuple[int, ...],
    total: Callable[[Ids], NDArray[np.float64]],
) -> NDArray[np.float64]:
    """Sums of each block of 0 … length-1: float64, (blocks, *shape), on all ranks. Collective.

    `total` sums over the places (int64) of one whole block and is called by one rank for it;
    its failure is raised on all.
    """
    sums = np.zeros((blocks, *shape), dtype=np.float64)
    with together(comm):
        for number in range(*block(comm.rank, comm.size, blocks)):
            start, stop = block(number, blocks, length)
            if stop > start:
                sums[number] = total(np.arange(start, stop, dtype=np.int64))
    comm.Allreduce(MPI.IN_PLACE, sums, op=MPI.SUM)  # x + 0 is exact: no order matters
    return sums


def mean_and_deviation(
    comm: MPI.Intracomm, reader: Reader, index: Index, split: Split, name: str, skip_missing: bool
) -> tuple[float, float]:
    """Mean and standard deviation of all values of a variable over a split. Collective.

    Two passes (the mean first) keep the variance exact for data far from zero. The deviation
    of a constant variable is given as 1. Missing values are skipped, or refused as NaN.
    """

    def sweep(places: Ids, centre: float, power: int) -> NDArray[np.float64]:
        result = np.zeros(2)
        for at in range(0, len(places), AT_ONCE):
            samples = split.samples(places[at : at + AT_ONCE])
            values: NDArray[Any] = reader.read_one(name, samples)
            missing = np.isnan(values) if skip_missing and values.dtype.kind == "f" else False
            index.check_finite(name, samples, np.where(missing, 0, values))
            good = values[~np.isnan(values)] if values.dtype.kind == "f" else values.ravel()
            result += [np.sum((good.astype(np.float64) - centre) ** power), good.size]
        return result

    length = len(split)
    first = blockwise(comm, length, BLOCKS, (2,), lambda p: sweep(p, 0.0, 1)).sum(axis=0)
    mean = float(first[0] / max(first[1], 1.0))
    second = blockwise(comm, length, BLOCKS, (2,), lambda p: sweep(p, mean, 2)).sum(axis=0)
    deviation = float(np.sqrt(second[0] / max(second[1], 1.0)))
    return mean, deviation or 1.0
