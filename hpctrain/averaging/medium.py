"""How gradients of several ranks become one sum: through the memory of a node, or by MPI alone.

A medium holds the memory of gradients (and, where the optimizer is sharded, of weights) and does

      exchange   small numbers in float64, exact: every sum of them is of counts, or of one
                 rank's number and zeros
      sum        hands the sum over all ranks to a sink, block by block, for the part that this
                 rank owns
      spread     brings a part of the sum to where it is needed
      finish     partial norms, and the weights of other nodes; then all may go on

`Wire` is MPI alone (and no communication at all for one rank); `Node` sums in the memory of a node
(`node.py`); `Staged` lets GPUs use that memory (`staged.py`).
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray

from hpctrain.averaging import tree as trees
from hpctrain.averaging.space import UNIT, Space, aligned, cut

BLOCK = 128 * 1024
"""Numbers that are summed, scaled and stepped while they lie in a core's cache."""

MESSAGE = 1 << 28
"""Numbers of one MPI call: counts are 32-bit integers in most MPIs."""

Sink = Callable[[int, int, int, torch.Tensor], None]
"""Takes the sum of numbers [start, stop) of a space by its number; the tensor may be changed, not kept."""


class Medium(Protocol):
    """What an averager needs of the ranks that average together."""

    comm: MPI.Intracomm
    sums_all: bool
    """Whether every rank is handed the whole sum, not a part of it."""
    slots: list[list[torch.Tensor]]
    """By slot and space: this rank's gradients, or partial sums of them."""
    weights: list[torch.Tensor] | None
    """By space: memory of the weights that the ranks of a node share; None where each has its own."""
    units: list[torch.Tensor]
    """By space: the 2-norm of every unit of the mean gradient, float64; own units are filled in."""

    def begin(self) -> None:
        """Start a step: no gradient is complete. Local."""

    def exchange(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sum small numbers over all ranks. Collective; gradients of all ranks are then complete."""

    def sum(self, sink: Sink, stored: bool = False) -> None:
        """Give the sum of what this rank owns to the sink. Collective, after `exchange`.

        With `stored` the sink will store it in slot 0, where it may lie already.
        """

    def spread(self, ranges: Sequence[list[tuple[int, int]]]) -> None:
        """Bring ranges of every space of the sum, as sinks stored it in slot 0, into this rank's slot 0.

        Collective, after `sum` and `finish`.
        """

    def finish(self, weights: bool) -> None:
        """Make norms, and with `weights` the shared weights, those of all. Collective."""

    def skip(self) -> None:
        """Let a step end without its sum. Collective."""

    def before_step(self) -> None:
        """Hear that the weights which this rank owns are about to change. Local."""

    def owned(self, bucket: tuple[int, int]) -> tuple[int, int]:
        """Numbers [start, stop) of a bucket that this rank sums. Local."""

    def close(self) -> None:
        """Let go of the memory. Local."""


class Wire:
    """MPI alone: one Allreduce a bucket, every rank owns all. Also the medium of one rank."""

    sums_all = True

    def __init__(
        self,
        comm: MPI.Intracomm,
        spaces: list[Space],
        slots: int = 1,
        tree: trees.Tree | None = None,
        direct: bool = False,
    ) -> None:
        """Take the ranks, the spaces, slots a rank, and the tree of (rank, slot) of an invariant sum.

        `direct`: MPI may be given a GPU's memory.
        """
        self.comm, self.spaces, self.tree, self.direct = comm, spaces, tree, direct
        self.slots = [[aligned(s.size, s.dtype, s.device) for s in spaces] for _ in range(slots)]
        self.weights: list[torch.Tensor] | None = None
        self.units = [torch.zeros(s.size // UNIT, dtype=torch.float64) for s in spaces]

    def begin(self) -> None:
        """Nothing is sent before it is asked for."""

    def exchange(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sum by one small Allreduce."""
        if self.comm.size == 1:
            return values
        total = np.empty_like(values)
        self.comm.Allreduce(values, total, op=MPI.SUM)
        return total

    def sum(self, sink: Sink, stored: bool = False) -> None:
        """Sum each bucket in place, then hand over all of it."""
        for number, space in enumerate(self.spaces):
            for start, stop in space.buckets:
                for begin, end in cut(start, stop, MESSAGE):
                    total = self._sum(number, space, begin, end)
                    block = BLOCK if space.device.type == "cpu" else end - begin
                    for a, b in cut(begin, end, block):
                        sink(number, a, b, total[a - begin : b - begin])

    def _sum(self, number: int, space: Space, start: int, stop: int) -> torch.Tensor:
        """Sum a range, in the precision of sums; in place where that is the gradients' own."""
        gradients = self.slots[0][number][start:stop]
        if self.tree is not None:
            return self._by_tree(number, space, start, stop, self.tree).to(space.device)
        if self.comm.size == 1:
            return gradients.to(space.wire)
        if self.direct and space.device.type == "cuda":
            total = gradients.to(space.wire)
            torch.cuda.synchronize()  # MPI knows nothing of streams
            self.comm.Allreduce(MPI.IN_PLACE, total, op=MPI.SUM)
            return total
        buffer = gradients.to("cpu", space.wire)
        self.comm.Allreduce(MPI.IN_PLACE, buffer.numpy(), op=MPI.SUM)
        return buffer.to(space.device)

    def _by_tree(self, number: int, space: Space, start: int, stop: int, tree: trees.Tree) -> torch.Tensor:
        """Gather every rank's partial sums of a range and add them in the order of the tree."""
        leaves = trees.leaves(tree)
        most = max(slot for _, slot in leaves) + 1
        held = [slots[number] for slots in self.slots]
        mine = torch.zeros(most, stop - start, dtype=space.wire)
        for slot in range(min(most, len(held))):
            mine[slot] = held[slot][start:stop]
        every = torch.zeros(self.comm.size, most, stop - start, dtype=space.wire)
        self.comm.Allgather(mine.numpy(), every.numpy())
        scratch = [torch.empty(stop - start, dtype=space.wire) for _ in range(trees.depth(tree))]
        return trees.evaluate(tree, lambda leaf: every[leaf[0], leaf[1]], scratch)

    def spread(self, ranges: Sequence[list[tuple[int, int]]]) -> None:
        """Every rank has all already."""

    def finish(self, weights: bool) -> None:
        """Every rank has all already."""

    def skip(self) -> None:
        """Nothing is on its way."""

    def before_step(self) -> None:
        """Weights don't travel."""

    def owned(self, bucket: tuple[int, int]) -> tuple[int, int]:
        """All of it."""
        return bucket

    def close(self) -> None:
        """Nothing is shared."""
