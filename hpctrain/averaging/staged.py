"""Gradients on GPUs, summed in the memory of the node: for an MPI that can't read a GPU's memory.

      GPU      gradients ──► this rank's part of the node's memory            (pinned, one copy)
      CPUs     the sum of `node.py`, written once into memory that all ranks read; nodes trade parts
      GPU      ◄── the sum, block by block; while one block is stepped the next is copied

Every rank steps all of its own GPU's weights. Unproved on a GPU: what is tested is the same code
with gradients in a CPU's memory.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hpctrain.averaging.medium import Sink
from hpctrain.averaging.node import Node
from hpctrain.averaging.space import UNIT, Space, aligned, cut

BLOCK = 4 << 20
"""Numbers of one copy: long beside its start, short beside a model."""


class Staged:
    """A node's memory between the GPUs of its ranks."""

    sums_all = True

    def __init__(self, spaces: list[Space], make_node: Callable[[list[Space]], Node], slots: int = 1) -> None:
        """Take spaces on a device; `make_node` gives a node for their twins on the CPU. Collective.

        Its node must have shared weights: there the sums are written.
        """
        self.spaces = spaces
        cpu = torch.device("cpu")
        self.node = make_node([replace(s, device=cpu, buckets=list(s.buckets)) for s in spaces])
        self.comm = self.node.comm
        self.slots = [[aligned(s.size, s.dtype, s.device) for s in spaces] for _ in range(slots)]
        self.weights: list[torch.Tensor] | None = None
        self.units = [torch.zeros(s.size // UNIT, dtype=torch.float64) for s in spaces]
        self.on_gpu = any(space.device.type == "cuda" for space in spaces)
        self.copies: Any = None
        if self.on_gpu:
            self.node.pin()
            self.copies = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """Nothing is sent before it is asked for."""
        self.node.begin()

    def exchange(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Copy gradients out, then meet."""
        for targets, flats in zip(self.node.slots, self.slots):
            for target, flat in zip(targets, flats):
                target.copy_(flat, non_blocking=True)
        if self.on_gpu:
            torch.cuda.synchronize()  # also: nobody copies the last sum any more when all have met
        return self.node.exchange(values)

    def sum(self, sink: Sink, stored: bool = False) -> None:
        """Sum on the CPUs, then hand over all of it from the device's memory."""
        totals = self.node.weights
        assert totals is not None

        def write(number: int, start: int, stop: int, total: torch.Tensor) -> None:
            totals[number][start:stop].copy_(total)

        self.node.sum(write)
        self.node.finish(weights=True)
        blocks = [
            (number, a, b)
            for number, space in enumerate(self.spaces)
            for bucket in space.buckets
            for a, b in cut(*bucket, BLOCK)
        ]
        coming = [self._copy(totals, *blocks[0])] if blocks else []
        for at, (number, a, b) in enumerate(blocks):
            if at + 1 < len(blocks):
                coming.append(self._copy(totals, *blocks[at + 1]))
            if self.on_gpu:
                torch.cuda.current_stream().wait_stream(self.copies)
            total = coming.pop(0)
            sink(number, a, b, total.to(self.spaces[number].wire))

    def _copy(self, totals: list[torch.Tensor], number: int, start: int, stop: int) -> torch.Tensor:
        """Start to copy a block to the device; a block on the CPU is copied at once, as it may be changed."""
        with torch.cuda.stream(self.copies) if self.on_gpu else nullcontext():
            space = self.spaces[number]
            fresh = torch.empty(stop - start, dtype=space.dtype, device=space.device)
            return fresh.copy_(totals[number][start:stop], non_blocking=True)

    def spread(self, ranges: Sequence[list[tuple[int, int]]]) -> None:
        """Every rank has all already."""

    def finish(self, weights: bool) -> None:
        """Every rank has all already."""

    def skip(self) -> None:
        """Let what is on its way arrive."""
        self.node.skip()

    def before_step(self) -> None:
        """Weights don't travel."""

    def owned(self, bucket: tuple[int, int]) -> tuple[int, int]:
        """All of it."""
        return bucket

    def close(self) -> None:
        """Let go of the memory."""
        self.node.close()
