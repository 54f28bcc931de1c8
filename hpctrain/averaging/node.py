"""Gradients in the memory that the ranks of a node share; lanes carry sums to the other nodes.

      one node    meet · each rank sums its part of all ranks' gradients, block by block, straight
                  from their memory, and steps its part of the weights · meet
      nodes       each lane sums its slice within the node and trades parts with the other nodes,
                  bucket by bucket, while backward goes on (`across.py`)

The order of every sum is fixed by ranks and nodes, never by arrival: the same bits on each run.
"""

import sys
from collections.abc import Sequence

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray

from hpctrain import network
from hpctrain.averaging import links
from hpctrain.averaging import tree as trees
from hpctrain.averaging.across import Across, Bucket, unit_type
from hpctrain.averaging.lanes import Lanes, lanes_of
from hpctrain.averaging.medium import BLOCK, Sink
from hpctrain.averaging.space import ALIGNMENT, UNIT, Space, cut, up
from hpctrain.log import LOGGER
from hpctrain.node_memory import NodeMemory, Rendezvous
from hpctrain.topology import named

FLOAT = 8


def added(rows: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Add rows up, in order."""
    total = rows[0].copy()
    for row in rows[1:]:
        total += row
    return total


class Node:
    """The ranks of a communicator, node by node through shared memory."""

    sums_all = False

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
        bf16: bool = False,
    ) -> None:
        """Map the node's memory. Collective; raises OSError on all ranks where it is too small.

        `smalls`: numbers of one exchange. `tree`: the invariant sum, its leaves (rank, slot).
        `node_of` makes up the node of each rank, for tests. `bf16`: what crosses between nodes.
        Where there are several nodes the spaces are cut into buckets that suit the link.
        """
        self.comm, self.spaces, self.smalls = comm, spaces, smalls
        if node_of is None:
            found = comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank)
            node_of = comm.allgather(found.bcast(comm.rank, root=0))
            found.Free()
        self.place: Lanes = lanes_of(node_of, comm.rank)
        self.local = named(comm.Split(self.place.node, comm.rank), "local")
        lane = MPI.UNDEFINED if self.place.lane is None else self.place.lane
        # a rank's number on its lane is its node's
        self.lane: MPI.Intracomm = comm.Split(lane, self.place.node)  # type: ignore[assignment]
        self._lay_out(slots, shared_weights, crowded)
        if self.place.nodes > 1:
            self._cut_buckets()
        self._plan(tree, list(node_of))
        self.turn = 0
        self._programs: dict[bool, list[tuple[int, int, int, trees.Additions, torch.Tensor]]] = {}
        self.buckets = [Bucket(n, *ab) for n, space in enumerate(spaces) for ab in space.buckets]
        self.across: Across | None = None
        self._homes: dict[Bucket, torch.Tensor] = {}
        self._steps = self._announced = 0
        if self.place.nodes > 1 and self.place.lane is not None:
            self.across = Across(self, bf16)

    def _cut_buckets(self) -> None:
        """Cut the spaces as the measured link asks for."""
        latency, bandwidth = network.measure(self.comm, self.lane)
        total = sum(space.nbytes for space in self.spaces)
        size = links.bucket_bytes(total, self.place.parts, latency, bandwidth)
        for space in self.spaces:
            space.cut(size)
        LOGGER.info(
            "between nodes: latency %.0f us, %.0f Mbit/s a lane, %d lanes; buckets of %.1f MiB",
            1e6 * latency,
            8e-6 * bandwidth,
            self.place.lanes,
            size / 2**20,
        )

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
        self.pin = memory.pin

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
            self.lane.Allreduce(MPI.IN_PLACE, total, op=MPI.SUM)
            self.total[:] = total
        self.rendezvous.meet()
        return self.total.copy()

    def owned(self, bucket: tuple[int, int]) -> tuple[int, int]:
        """Give this rank's part."""
        return self.place.mine(bucket)

    # -- buckets -----------------------------------------------------------------------------

    def begin(self) -> None:
        """Start a step: no bucket is full. Local."""
        self._announced = 0
        if self.across is not None:
            self.across.begin()

    def announce(self, count: int) -> None:
        """Say that this rank has filled the first `count` buckets of the order. Local."""
        if self.place.nodes > 1 and count > self._announced:
            self._announced = count
            self.rendezvous.announce(self._steps * len(self.buckets) + count)

    def poll(self) -> bool:
        """Move what can move between nodes; say whether all buckets are added up. Local."""
        return self.across is None or self.across.poll()

    def learn(self, order: list[int]) -> None:
        """Take the order in which buckets are filled, the same on all ranks; none is on its way."""
        if self.across is not None:
            self.across.order = order

    @property
    def between_bytes(self) -> int:
        """Memory of what is on its way between nodes, and of sums wider than the gradients."""
        wide = [home for b, home in self._homes.items() if home.dtype != self.spaces[b.space].dtype]
        kept = list(self.across.kept.values()) if self.across is not None else []
        return sum(tensor.nbytes for tensor in [*wide, *kept])

    def look(self) -> None:
        """Raise RankError where a rank of the node has died. Local."""
        self.rendezvous.look()

    def full(self, turn: int) -> bool:
        """Whether all ranks of the node have filled bucket `turn` of the order. Local."""
        return self.rendezvous.announced(self._steps * len(self.buckets) + turn + 1)

    def inside(self, partial: int, bucket: Bucket, a: int, b: int) -> torch.Tensor:
        """Give the node's own partial sum of numbers [a, b); kept until the next call only. Local."""
        return self._block(self.within[partial], bucket.space, self.spaces[bucket.space], a, b)

    def home(self, bucket: Bucket) -> torch.Tensor:
        """Give the place of the sum of this rank's part: its own gradients', which only this rank reads."""
        if bucket not in self._homes:
            space, (a, b) = self.spaces[bucket.space], self.owned(bucket.range)
            short = space.dtype != space.wire
            slot = self.slots[0][bucket.space][a:b]
            self._homes[bucket] = torch.empty(b - a, dtype=space.wire) if short else slot
        return self._homes[bucket]

    def skip(self) -> None:
        """Let a step end without its sum: what is on its way must arrive. Collective."""
        if self.place.nodes > 1:
            self._sum_across(lambda *_: None, weights=False)
            self.rendezvous.meet()

    def _sum_across(self, sink: Sink, weights: bool) -> None:
        """Hand over this rank's parts as they are added up, and start to send new weights."""
        self.announce(len(self.buckets))
        across = self.across
        for turn, index in enumerate(across.order if across is not None else ()):
            assert across is not None
            bucket = self.buckets[index]
            across.wait(turn)
            if weights:
                across.remember(turn)
            start, stop = self.owned(bucket.range)
            home = self.home(bucket)
            for a, b in cut(start, stop, BLOCK):
                sink(bucket.space, a, b, home[a - start : b - start])
            if weights:
                across.gather(turn)
                across.poll()
        self._steps += 1

    # -- a step ------------------------------------------------------------------------------

    def sum(self, sink: Sink, stored: bool = False) -> None:
        """Sum within the node, across nodes, and hand over this rank's parts."""
        if self.place.nodes > 1:
            self._sum_across(sink, weights=not stored and self.weights is not None)
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

    def _gather_sums(self) -> None:
        """Give every node the sums of the others' parts, lane by lane. Collective over the lanes."""
        if self.place.nodes == 1 or self.place.lane is None:
            return
        for space, array in zip(self.spaces, self.slots[0]):
            unit = unit_type(space.dtype)
            for bucket in space.buckets:
                begin, end = self.place.slice(bucket, self.place.lane)
                parts = [self.place.part(bucket, self.place.lane, n) for n in range(self.place.nodes)]
                counts = [(b - a) // UNIT for a, b in parts]
                begins = [(a - begin) // UNIT for a, _ in parts]
                slice_ = array[begin:end].view(torch.uint8).numpy()
                self.lane.Allgatherv(MPI.IN_PLACE, [slice_, counts, begins, unit])

    def spread(self, ranges: Sequence[list[tuple[int, int]]]) -> None:
        """Gather across nodes, meet, and copy from the ranks of the node that summed."""
        self._gather_sums()
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

    def before_step(self) -> None:
        """Remember this rank's weights where only what a step adds to them will travel. Local."""
        if self.across is not None:
            for turn in range(len(self.buckets)):
                self.across.remember(turn)

    def finish(self, weights: bool) -> None:
        """Add up norms over the nodes, gather weights over the lanes, meet."""
        if self.across is not None and weights and self.weights is not None:
            for turn in range(len(self.buckets)):
                self.across.gather(turn)
        if self.place.nodes > 1:
            self._share_units()
        if self.across is not None:
            self.across.gathered()
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
                self.lane.Allreduce(MPI.IN_PLACE, mine.numpy(), op=MPI.SUM)
                units.copy_(mine)

    def close(self) -> None:
        """Free communicators' memory views; the kernel frees the memory with the last view."""
        self.all, self.slots, self.small, self.units, self.weights = [], [], [], [], None
        self._programs.clear()
        if sys.exc_info()[0] is None:  # freeing is collective: a rank that fails alone leaves it
            self._free()

    def _free(self) -> None:
        if getattr(self, "across", None) is not None:
            self.across.close()  # type: ignore[union-attr]
        self.local.Free()
        if self.lane != MPI.COMM_NULL:
            self.lane.Free()
