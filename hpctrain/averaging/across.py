"""Between nodes: one lane's share of every bucket, sent while backward goes on.

      bucket k full on all ranks of the node
        └─ add up the node's gradients, part by part; send every other node its part, get mine
             └─ add what the nodes sent, in the order of the tree
                  └─ (all buckets done, weight of the mean known)  step my part of the weights
                       └─ send the new weights to the other nodes, get theirs

Messages travel one to one, each byte once: 2·S·(N-1)/N bytes a node, the least possible
(Patarasuk and Yuan 2009). `poll` moves everything that can move and never waits; it is called
between layers by the rank's own thread, or by a thread of its own, or only when backward is
over (`overlap.py`). Which of them calls it changes the time, never an addition.

Open MPI moves a started message only inside MPI calls, so that nothing here relies on progress
in the background. A waiting rank naps: with more ranks than cores a spinning one takes the time
of those that it waits for.
"""

import time
from typing import NamedTuple, Protocol

import torch
from mpi4py import MPI

from hpctrain.averaging import tree as trees
from hpctrain.averaging.lanes import Lanes
from hpctrain.averaging.medium import BLOCK
from hpctrain.averaging.space import UNIT, Space, cut
from hpctrain.topology import named

IN_FLIGHT = 4
"""Buckets between sent and added up: enough to keep the wire busy while one is being added."""
NAP_SECONDS = 50e-6
LOOK_SECONDS = 1.0

_units: dict[int, MPI.Datatype] = {}


class Bucket(NamedTuple):
    """Numbers [start, stop) of a space, whole units."""

    space: int
    start: int
    stop: int

    @property
    def range(self) -> tuple[int, int]:
        """Where it lies in its space."""
        return self.start, self.stop


def unit_type(dtype: torch.dtype) -> MPI.Datatype:
    """Give the MPI type of one unit: counts and places in units fit into 32-bit integers."""
    width = dtype.itemsize * UNIT
    if width not in _units:
        _units[width] = MPI.BYTE.Create_contiguous(width).Commit()
    return _units[width]


def message(numbers: torch.Tensor) -> list[object]:
    """Name whole units to MPI, whatever their dtype (NumPy has no bfloat16)."""
    return [numbers.view(torch.uint8).numpy(), len(numbers) // UNIT, unit_type(numbers.dtype)]


class Sums(Protocol):
    """What a lane needs of its node."""

    place: Lanes
    lane: MPI.Intracomm
    """The lane's ranks; each one's number is its node's."""
    spaces: list[Space]
    buckets: list[Bucket]
    weights: list[torch.Tensor] | None
    counts: list[int]
    """Partial sums that each node sends."""
    across_tree: trees.Tree
    """How they are added; its leaves are (node, partial sum)."""

    def full(self, turn: int) -> bool:
        """Whether all ranks of the node have filled bucket `turn` of the order."""

    def inside(self, partial: int, bucket: Bucket, a: int, b: int) -> torch.Tensor:
        """Give the node's own partial sum of numbers [a, b); kept until the next call only."""

    def home(self, bucket: Bucket) -> torch.Tensor:
        """Give the memory where the sum of this rank's part goes."""

    def look(self) -> None:
        """Raise RankError where a rank of the node has died."""


class Across:
    """The traffic of one lane with its peers on the other nodes."""

    def __init__(self, node: Sums, bf16: bool) -> None:
        """Take what the node knows. Collective over the lane.

        `bf16`: gradients, and what a step adds to the weights, travel as bfloat16.
        """
        self.node, self.bf16 = node, bf16
        self.place, self.spaces, self.buckets = node.place, node.spaces, node.buckets
        self.counts, self.tree, self.weights = node.counts, node.across_tree, node.weights
        assert self.place.lane is not None
        self.lane = self.place.lane
        self.comm = named(node.lane.Dup(), "between nodes")
        self.order = list(range(len(self.buckets)))
        self.peers = [node for node in range(self.place.nodes) if node != self.place.node]
        kinds = {space.wire for space in self.spaces}
        deep = trees.depth(self.tree)
        self._scratch = {kind: [torch.empty(BLOCK, dtype=kind) for _ in range(deep)] for kind in kinds}
        self.kept: dict[tuple[str, int, torch.dtype], torch.Tensor] = {}
        self._before: dict[int, torch.Tensor] = {}
        self.begin()

    def begin(self) -> None:
        """Start a step: nothing has been sent. Local."""
        self.posted = self.added = 0
        self._requests: dict[int, list[MPI.Request]] = {}
        self._gathers: dict[int, list[MPI.Request]] = {}
        self._updates: dict[int, list[tuple[tuple[int, int], torch.Tensor]]] = {}

    # -- gradients -----------------------------------------------------------------------------

    def poll(self) -> bool:
        """Move what can move; say whether every bucket is added up. Local."""
        while self.posted < len(self.order):
            if self.posted - self.added >= IN_FLIGHT or not self.node.full(self.posted):
                break
            self._post(self.posted)
            self.posted += 1
        while self.added < self.posted and MPI.Request.Testall(self._requests[self.added]):
            self._add(self.added)
            del self._requests[self.added]
            self.added += 1
        return self.added == len(self.order)

    def wait(self, turn: int) -> None:
        """Wait until bucket number `turn` of the order is added up."""
        until = time.monotonic() + LOOK_SECONDS
        while self.added <= turn:
            self.poll()
            if self.added <= turn:
                time.sleep(NAP_SECONDS)
                if time.monotonic() > until:
                    self.node.look()
                    until = time.monotonic() + LOOK_SECONDS

    def parts(self, bucket: Bucket) -> list[tuple[int, int]]:
        """Give each node's part of this lane."""
        return [self.place.part(bucket.range, self.lane, node) for node in range(self.place.nodes)]

    def _wire(self, bucket: Bucket) -> torch.dtype:
        kind = self.spaces[bucket.space].wire
        return torch.bfloat16 if self.bf16 and kind == torch.float32 else kind

    def _post(self, turn: int) -> None:
        """Add up within the node, part by part, and send; own partial sums stay here."""
        bucket = self.buckets[self.order[turn]]
        parts, mine = self.parts(bucket), self.counts[self.place.node]
        sizes = [stop - start for start, stop in parts]
        here = sizes[self.place.node]
        wire, kind = self._wire(bucket), self.spaces[bucket.space].wire
        slot = turn % IN_FLIGHT
        send = self._memory("send", slot, wire, mine * (sum(sizes) - here))
        received = self._memory("received", slot, wire, (sum(self.counts) - mine) * here)
        own = self._memory("own", slot, kind, mine * here)
        requests, at = [], 0
        for node in self.peers:
            count = self.counts[node] * here
            if count:
                requests.append(self.comm.Irecv(message(received[at : at + count]), node, 2 * turn))
            at += count
        at = 0
        for node in [*self.peers, self.place.node]:
            if node == self.place.node:
                into, at = own, 0
            else:
                into = send
            begin = at
            for partial in range(mine):
                for a, b in cut(*parts[node], BLOCK):
                    # own sums are rounded as the others' are: who owns a number (it depends on the
                    # measured link) must not show in its bits
                    into[at : at + b - a] = self.node.inside(partial, bucket, a, b).to(wire)
                    at += b - a
            if node != self.place.node and at > begin:
                requests.append(self.comm.Isend(message(send[begin:at]), node, 2 * turn))
        self._requests[turn] = requests

    def _add(self, turn: int) -> None:
        """Add the partial sums of all nodes in the order of the tree."""
        bucket = self.buckets[self.order[turn]]
        start, stop = self.parts(bucket)[self.place.node]
        here, kind = stop - start, self.spaces[bucket.space].wire
        slot, wire, mine = turn % IN_FLIGHT, self._wire(bucket), self.counts[self.place.node]
        received = self._memory("received", slot, wire, (sum(self.counts) - mine) * here)
        own = self._memory("own", slot, kind, mine * here)
        begins, at = {}, 0
        for node in self.peers:
            begins[node] = at
            at += self.counts[node] * here
        into = self.node.home(bucket)
        for a, b in cut(0, here, BLOCK):

            def read(leaf: tuple[int, int], a: int = a, b: int = b) -> torch.Tensor:
                node, partial = leaf
                if node == self.place.node:
                    return own[partial * here + a : partial * here + b]
                base = begins[node] + partial * here
                return received[base + a : base + b].to(kind)

            into[a:b] = trees.evaluate(self.tree, read, self._scratch[kind])

    def _memory(self, name: str, slot: int, dtype: torch.dtype, count: int) -> torch.Tensor:
        """Give memory that is kept from step to step: fresh pages cost as much as the sum."""
        kept = self.kept.get((name, slot, dtype))
        if kept is None or len(kept) < count:
            kept = self.kept[name, slot, dtype] = torch.empty(count, dtype=dtype)
        return kept[:count]

    # -- weights -------------------------------------------------------------------------------

    def remember(self, turn: int) -> None:
        """Keep this rank's weights of a bucket before they are stepped, where only what is added travels."""
        bucket = self.buckets[self.order[turn]]
        if self.bf16 and self.weights is not None and self._short(bucket):
            a, b = self.parts(bucket)[self.place.node]
            self._before[turn] = self.weights[bucket.space][a:b].clone()

    def _short(self, bucket: Bucket) -> bool:
        return self._wire(bucket) == torch.bfloat16 and self.spaces[bucket.space].dtype == torch.float32

    def gather(self, turn: int) -> None:
        """Send this rank's new weights of a bucket, and get those of the other nodes. Local; started only."""
        if turn in self._gathers:
            return
        assert self.weights is not None
        bucket = self.buckets[self.order[turn]]
        parts, flat = self.parts(bucket), self.weights[bucket.space]
        a, b = parts[self.place.node]
        requests = []
        if turn in self._before:
            before = self._before.pop(turn)
            update = (flat[a:b] - before).bfloat16()
            torch.add(before, update, out=flat[a:b])  # the others add the same to the same
            sent = update
            targets = [torch.empty(parts[n][1] - parts[n][0], dtype=torch.bfloat16) for n in self.peers]
            self._updates[turn] = [(parts[n], target) for n, target in zip(self.peers, targets)]
        else:
            sent = flat[a:b]
            targets = [flat[parts[n][0] : parts[n][1]] for n in self.peers]
        for node, target in zip(self.peers, targets):
            if len(target):
                requests.append(self.comm.Irecv(message(target), node, 2 * turn + 1))
        if len(sent):
            requests += [self.comm.Isend(message(sent), node, 2 * turn + 1) for node in self.peers]
        self._gathers[turn] = requests

    def gathered(self) -> None:
        """Wait until all weights that were asked for have come."""
        for turn in list(self._gathers):
            until = time.monotonic() + LOOK_SECONDS
            while not MPI.Request.Testall(self._gathers[turn]):
                time.sleep(NAP_SECONDS)
                if time.monotonic() > until:
                    self.node.look()
                    until = time.monotonic() + LOOK_SECONDS
            for (a, b), update in self._updates.pop(turn, []):
                self.weights[self.buckets[self.order[turn]].space][a:b].add_(update)  # type: ignore[index]
        self._gathers.clear()

    def close(self) -> None:
        """Free the communicator. Collective over the lane."""
        self.comm.Free()
