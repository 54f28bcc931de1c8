"""A ring in the node's memory for each rank of a pipeline: what it sends to its neighbours on the node.

      ring   ······[ slot 7 ][ slot 8 ][ slot 9 ]·············      oldest first; the end goes on at the start
      flags  7 → 1, 8 → 0, 9 → 1                                    1 filled, 0 taken by the receiver

The sender copies in and goes on computing, the receiver copies out when it comes to it: neither waits for
the other to call MPI, which moves a large message only while both do, where one process may not read the
other's memory (as in containers). The message that tells of a slot orders the memory, and `Fence` the flag.
"""

from collections import deque
from collections.abc import Sequence

import torch
from mpi4py import MPI

from hpctrain.node_memory import LINE, Fence, NodeMemory
from hpctrain.pipeline.raw import Raw, move

FLAGS = 512
"""Slots at once, at most."""


def lines(size: int) -> int:
    """Round bytes up to whole lines.

    >>> lines(1), lines(64), lines(0)
    (64, 64, 0)
    """
    return -(-size // LINE) * LINE


class Slots:
    """The rings of the ranks of one node."""

    def __init__(self, comm: MPI.Intracomm, size: int) -> None:
        """Make a ring of so many bytes for each rank. Collective. Raises OSError on all of them."""
        self.size = lines(size)
        self._memory = NodeMemory(comm, 0, 8 * FLAGS + self.size)
        views = [self._memory.tensor(rank, 0, FLAGS, torch.int64) for rank in range(comm.size)]
        self._flags = [view.numpy().data for view in views]
        rings = (self._memory.tensor(rank, 8 * FLAGS, self.size, torch.uint8) for rank in range(comm.size))
        self._rings = [ring.data_ptr() for ring in rings]
        """Addresses; the memory goes with `_memory`."""
        self._rank, self._fence = comm.rank, Fence()
        self._head = self._tail = 0
        """Bytes put and freed since the start."""
        self._filled: deque[tuple[int, int]] = deque()
        """Flag and end of each slot, the oldest first."""
        self._next = 0

    def put(self, parts: Sequence[Raw]) -> tuple[int, int] | None:
        """Copy bytes into a slot, each tensor at the beginning of a line; give its offset and flag. Local.

        None where there is no room: what lies there has not been taken yet, or is too much.
        """
        need = sum(lines(part.size) for part in parts)
        flags, ring = self._flags[self._rank], self._rings[self._rank]
        while self._filled and not flags[self._filled[0][0]]:
            self._tail = self._filled.popleft()[1]
        offset = self._head % self.size if self.size else 0
        skipped = self.size - offset if offset + need > self.size else 0
        if self._head + skipped + need - self._tail > self.size or len(self._filled) == FLAGS:
            return None
        self._fence()  # the receiver's reads of what lay here come before
        self._head += skipped
        offset = at = self._head % self.size
        for part in parts:
            move(ring + at, part.at, part.size)
            at += lines(part.size)
        self._head += need
        flag, self._next = self._next, (self._next + 1) % FLAGS
        flags[flag] = 1
        self._filled.append((flag, self._head))
        self._fence()
        return offset, flag

    def take(self, rank: int, offset: int, flag: int, into: Sequence[Raw]) -> None:
        """Copy bytes out of a slot of a rank, and free it. Local."""
        self._fence()
        for part in into:
            move(part.at, self._rings[rank] + offset, part.size)
            offset += lines(part.size)
        self.free(rank, flag)

    def free(self, rank: int, flag: int) -> None:
        """Say that a slot of a rank is not needed any more. Local."""
        self._fence()
        self._flags[rank][flag] = 0
