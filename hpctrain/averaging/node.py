"""Gradients in the memory that the ranks of a node share; lanes carry sums to the other nodes.

      one node    meet · each rank sums its part of all ranks' gradients, block by block, straight
                  from their memory, and steps its part of the weights · meet
      nodes       each lane sums its slice within the node, sends every other node its part
                  (Alltoallv), sums what it gets in the order of the nodes, steps, and gathers the
                  weights of its slice (Allgatherv): 2·S·(N-1)/N bytes a node, the least possible
                  (Patarasuk and Yuan 2009)

The order of every sum is fixed by ranks and nodes, never by arrival: the same bits on each run.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray

from hpctrain.averaging import tree as trees
from hpctrain.averaging.lanes import Lanes, lanes_of
from hpctrain.averaging.medium import BLOCK, Sink
from hpctrain.averaging.memory import NodeMemory, Rendezvous
from hpctrain.averaging.space import ALIGNMENT, UNIT, Space, cut, up
from hpctrain.topology import named

FLOAT = 8
_units: dict[int, MPI.Datatype] = {}


def unit_type(dtype: torch.dtype) -> MPI.Datatype:
    """Give the MPI type of one unit: counts and places in units fit into 32-bit integers."""
    width = dtype.itemsize * UNIT
    if width not in _units:
        _units[width] = MPI.BYTE.Create_contiguous(width).Commit()
    return _units[width]


def added(rows: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Add rows up, in order."""
    total = rows[0].copy()
    for row in rows[1:]:
        total += row
    return total


class Node:
    """The ranks of a communicator, node by node through shared memory."""

    def __init__(
        self,
        comm: MPI.Intracomm,
        spaces: list[Space],
        smalls: int,
        crowded: bool = False,
        shared_weights: bool = True,
        slots: int = 1,
        tree: trees.Tree | None = None,
        node_of: Sequence[int] | None = None,
    ) -> None:
        """Map the node's memory. Collective; raises OSError on all ranks where it is too small.

        `smalls`: numbers of one exchange. `tree`: the invariant sum, its leaves (rank, slot).
        `node_of` makes up the node of each rank, for tests.
        """
        self.comm, self.spaces, self.smalls = comm, spaces, smalls
        if node_of is None:
            found = comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank)
            node_of = comm.allgather(found.bcast(comm.rank, root=0))
            found.Free()
        self.place: Lanes = lanes_of(node_of, comm.rank)
        self.local = named(comm.Split(self.place.node, comm.rank), "local")
        lane = MPI.UNDEFINED if self.place.lane is None else self.place.lane
        self.across = comm.Split(lane, comm.rank)
        self._lay_out(slots, shared_weights, crowded)
        self._plan(tree, list(node_of))
        self.turn = 0
        self._programs: dict[bool, list[tuple[int, int, int, trees.Additions, torch.Tensor]]] = {}
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def _lay_out(self, slots: int, shared_weights: bool, crowded: bool) -> None:
        """Map memory; everything in it lies at offsets that all ranks compute alike."""
        sizes = [up(space.nbytes, ALIGNMENT) for space in self.spaces]
        unit_bytes = [up(space.size // UNIT * FLOAT, ALIGNMENT) for space in self.spaces]
        small = up(self.smalls * FLOAT, ALIGNMENT)
        common = small + sum(unit_bytes) + (sum(sizes) if shared_weights else 0)
        each = 2 * small + slots * sum(sizes)
        problem = ""
        try:
            memory = NodeMemory(self.local, common, each)
        except OSError as error:
            problem = str(error)
        problems = [text for text in self.comm.allgather(problem) if text]
        if problems:
            self._free()
            raise OSError(problems[0])
        self.rendezvous = Rendezvous(self.local, memory, crowded)

        def flats(rank: int | None, offset: int) -> list[torch.Tensor]:
            starts = [offset + sum(sizes[:at]) for at in range(len(sizes))]
            return [memory.tensor(rank, at, s.size, s.dtype) for s, at in zip(self.spaces, starts)]

        self.total = memory.tensor(None, 0, self.smalls, torch.float64).numpy()
        starts = [small + sum(unit_bytes[:at]) for at in range(len(sizes))]
        self.units = [
            memory.tensor(None, at, s.size // UNIT, torch.float64) for s, at in zip(self.spaces, starts)
        ]
        self.weights = flats(None, small + sum(unit_bytes)) if shared_weights else None
        ranks = range(self.local.size)
        self.small = [
            [memory.tensor(r, turn * small, self.smalls, torch.float64).numpy() for r in ranks]
            for turn in range(2)
        ]
        self.all = [[flats(r, 2 * small + slot * sum(sizes)) for slot in range(slots)] for r in ranks]
        self.slots = self.all[self.local.rank]

    def _plan(self, tree: trees.Tree | None, node_of: list[int]) -> None:
        """Cut the tree of the sum into what each node adds up and what is added across nodes."""
        nodes = list(dict.fromkeys(node_of))
        local_rank = [node_of[:rank].count(node_of[rank]) for rank in range(self.comm.size)]
        if tree is None:
            tree = trees.fold(
                [trees.fold([(r, 0) for r, n in enumerate(node_of) if n == node]) for node in nodes]
            )
        self.within: list[trees.Tree] = []
        counts = [0] * len(nodes)

        def cross(part: trees.Tree) -> trees.Tree:
            homes = {nodes.index(node_of[rank]) for rank, _ in trees.leaves(part)}
            if len(homes) > 1:
                return trees.Pair((cross(part[0]), cross(part[1])))
            home = homes.pop()
            if home == self.place.node:
                self.within.append(trees.relabel(part, lambda leaf: (local_rank[leaf[0]], leaf[1])))
            counts[home] += 1
            return home, counts[home] - 1

        self.across_tree = cross(tree)
        self.counts = counts
        scratches = max(map(trees.depth, [self.across_tree, *self.within]), default=0)
        kinds = {space.wire for space in self.spaces}
        self.scratch = {kind: [torch.empty(BLOCK, dtype=kind) for _ in range(scratches)] for kind in kinds}

    def exchange(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Write, meet, and add what all ranks wrote; across nodes one small Allreduce.

        Two buffers in turn: a rank that is ahead writes the one that nobody reads any more.
        """
        small, self.turn = self.small[self.turn], 1 - self.turn
        small[self.local.rank][:] = values
        self.rendezvous.meet()
        if self.place.nodes == 1:
            return added(small)
        if self.local.rank == 0:
            total = added(small)
            self.across.Allreduce(MPI.IN_PLACE, total, op=MPI.SUM)
            self.total[:] = total
        self.rendezvous.meet()
        return self.total.copy()

    def owned(self, bucket: tuple[int, int]) -> tuple[int, int]:
        """Give this rank's part."""
        return self.place.mine(bucket)

    def sum(self, sink: Sink, stored: bool = False) -> None:
        """Sum within the node, across nodes, and hand over this rank's parts."""
        if self.place.lane is None:
            return
        if self.place.nodes > 1:
            for number, space in enumerate(self.spaces):
                for bucket in space.buckets:
                    self._sum_across(number, space, bucket, sink)
            return
        if stored not in self._programs:
            self._programs[stored] = [
                (number, start, stop, *self._program(number, space, start, stop, stored))
                for number, space in enumerate(self.spaces)
                if space.dtype == space.wire
                for bucket in space.buckets
                for start, stop in cut(*self.owned(bucket), BLOCK)
            ]
        for number, start, stop, plan, total in self._programs[stored]:
            for left, right, into in plan:
                torch.add(left, right, out=into)
            sink(number, start, stop, total)
        for number, space in enumerate(self.spaces):
            if space.dtype != space.wire:  # 16-bit numbers are widened first, each time anew
                for bucket in space.buckets:
                    for start, stop in cut(*self.owned(bucket), BLOCK):
                        sink(number, start, stop, self._block(self.within[0], number, space, start, stop))

    def _program(
        self, number: int, space: Space, start: int, stop: int, stored: bool
    ) -> tuple[trees.Additions, torch.Tensor]:
        """Plan a block once: its memory stays where it is."""
        tree = self.within[0]
        views = {leaf: self.all[leaf[0]][leaf[1]][number][start:stop] for leaf in trees.leaves(tree)}
        home = views.get((self.local.rank, 0)) if stored else None
        return trees.additions(tree, views.__getitem__, self.scratch[space.wire], home)

    def _block(self, tree: trees.Tree, number: int, space: Space, start: int, stop: int) -> torch.Tensor:
        def read(leaf: tuple[int, int]) -> torch.Tensor:
            block = self.all[leaf[0]][leaf[1]][number][start:stop]
            return block if space.dtype == space.wire else block.to(space.wire)

        return trees.evaluate(tree, read, self.scratch[space.wire])

    def _sum_across(self, number: int, space: Space, bucket: tuple[int, int], sink: Sink) -> None:
        """Send every node its part of this node's sums; add what comes, in the order of the tree."""
        assert self.place.lane is not None
        parts = [self.place.part(bucket, self.place.lane, node) for node in range(self.place.nodes)]
        mine = self.counts[self.place.node]
        sizes = [stop - start for start, stop in parts]
        here = sizes[self.place.node]
        send = self._buffer("send", space.wire, mine * sum(sizes))
        received = self._buffer("received", space.wire, sum(self.counts) * here)
        at = 0
        for start, stop in parts:
            for tree in self.within:
                for a, b in cut(start, stop, BLOCK):
                    send[at + a - start : at + b - start] = self._block(tree, number, space, a, b)
                at += stop - start
        unit = unit_type(space.wire)
        self.across.Alltoallv(
            [send.numpy(), [mine * size // UNIT for size in sizes], unit],
            [received.numpy(), [count * here // UNIT for count in self.counts], unit],
        )
        begin = np.concatenate([[0], np.cumsum(self.counts)])
        start, stop = parts[self.place.node]
        for a, b in cut(start, stop, BLOCK):
            sink(number, a, b, self._cross_block(received, begin, here, a - start, b - start, space))

    def _buffer(self, name: str, dtype: torch.dtype, count: int) -> torch.Tensor:
        """Give memory that is kept from step to step: fresh pages cost as much as the sum."""
        kept = self._buffers.get((name, dtype))
        if kept is None or len(kept) < count:
            kept = self._buffers[name, dtype] = torch.empty(count, dtype=dtype)
        return kept[:count]

    def _cross_block(
        self, received: torch.Tensor, begin: Any, here: int, a: int, b: int, space: Space
    ) -> torch.Tensor:
        def read(leaf: tuple[int, int]) -> torch.Tensor:
            base = int(begin[leaf[0]] + leaf[1]) * here
            return received[base + a : base + b]

        return trees.evaluate(self.across_tree, read, self.scratch[space.wire])

    def _gather_lanes(self, arrays: list[torch.Tensor]) -> None:
        """Give every node the parts of the others, lane by lane. Collective over the lanes."""
        if self.place.nodes == 1 or self.place.lane is None:
            return
        for space, array in zip(self.spaces, arrays):
            unit = unit_type(space.dtype)
            for bucket in space.buckets:
                begin, end = self.place.slice(bucket, self.place.lane)
                parts = [self.place.part(bucket, self.place.lane, n) for n in range(self.place.nodes)]
                counts = [(b - a) // UNIT for a, b in parts]
                begins = [(a - begin) // UNIT for a, _ in parts]
                slice_ = array[begin:end].view(torch.uint8).numpy()
                self.across.Allgatherv(MPI.IN_PLACE, [slice_, counts, begins, unit])

    def spread(self, ranges: Sequence[list[tuple[int, int]]]) -> None:
        """Gather across nodes, meet, and copy from the ranks of the node that summed."""
        self._gather_lanes(self.slots[0])
        self.rendezvous.meet()
        for number, (space, wanted) in enumerate(zip(self.spaces, ranges)):
            target = self.slots[0][number]
            for bucket in space.buckets:
                for lane in range(self.place.lanes):
                    if lane == self.local.rank:
                        continue
                    begin, end = self.place.slice(bucket, lane)
                    for start, stop in wanted:
                        a, b = max(begin, start), min(end, stop)
                        if a < b:
                            target[a:b] = self.all[lane][0][number][a:b]
        self.rendezvous.meet()  # nobody changes what another still copies

    def finish(self, weights: bool) -> None:
        """Add up norms over the nodes, gather weights over the lanes, meet."""
        if self.place.nodes > 1:
            self._share_units()
            if weights and self.weights is not None:
                self._gather_lanes(self.weights)
        self.rendezvous.meet()

    def _share_units(self) -> None:
        """One node at a time knows a unit: a part of zeros elsewhere makes the sum exact."""
        self.rendezvous.meet()
        if self.local.rank == 0:
            for space, units in zip(self.spaces, self.units):
                mine = torch.zeros_like(units)
                for bucket in space.buckets:
                    for lane in range(self.place.lanes):
                        a, b = (x // UNIT for x in self.place.part(bucket, lane, self.place.node))
                        mine[a:b] = units[a:b]
                self.across.Allreduce(MPI.IN_PLACE, mine.numpy(), op=MPI.SUM)
                units.copy_(mine)

    def close(self) -> None:
        """Free communicators' memory views; the kernel frees the memory with the last view."""
        self.all, self.slots, self.small, self.units, self.weights = [], [], [], [], None
        self._programs.clear()
        if sys.exc_info()[0] is None:  # freeing is collective: a rank that fails alone leaves it
            self._free()

    def _free(self) -> None:
        self.local.Free()
        if self.across != MPI.COMM_NULL:
            self.across.Free()
