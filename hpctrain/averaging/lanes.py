"""Who sums and owns which part of a bucket, on nodes of any size. Pure.

      2 nodes of 2 ranks, a bucket of 8 units      lanes 2, parts 4
      lane 0 │ part 0: node 0 │ part 1: node 1 │   lane 1 │ part 2: node 0 │ part 3: node 1 │

A lane is one rank of each node; it carries its slice of the bucket over the network, so that
every rank's network port is in use and each byte crosses once. Within the slice each node owns
one part: it sums it, steps its weights, and gives them back. There are as many lanes as the
smallest node has ranks; further ranks of larger nodes are summed, but carry nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hpctrain.averaging.space import UNIT


@dataclass(frozen=True)
class Lanes:
    """The place of one rank among nodes and lanes."""

    node: int
    local_rank: int
    local_size: int
    nodes: int
    lanes: int

    @property
    def lane(self) -> int | None:
        """The lane that this rank carries."""
        return self.local_rank if self.local_rank < self.lanes else None

    @property
    def parts(self) -> int:
        """Parts that a bucket is cut into."""
        return self.lanes * self.nodes

    def part(self, bucket: tuple[int, int], lane: int, node: int) -> tuple[int, int]:
        """Numbers [start, stop) of a part: whole units."""
        return part(bucket, lane * self.nodes + node, self.parts)

    def slice(self, bucket: tuple[int, int], lane: int) -> tuple[int, int]:
        """Numbers [start, stop) of a lane: its nodes' parts."""
        return self.part(bucket, lane, 0)[0], self.part(bucket, lane, self.nodes - 1)[1]

    def mine(self, bucket: tuple[int, int]) -> tuple[int, int]:
        """Give this rank's own part; empty without a lane."""
        return (0, 0) if self.lane is None else self.part(bucket, self.lane, self.node)


def part(bucket: tuple[int, int], index: int, parts: int) -> tuple[int, int]:
    """Cut a bucket into parts of whole units that differ by at most one unit.

    >>> [part((0, 5 * UNIT), p, 2) for p in range(2)] == [(0, 2 * UNIT), (2 * UNIT, 5 * UNIT)]
    True
    """
    start, stop = bucket
    units = (stop - start) // UNIT
    return start + index * units // parts * UNIT, start + (index + 1) * units // parts * UNIT


def lanes_of(node_of: Sequence[int], rank: int) -> Lanes:
    """Give a rank's place, from the node of every rank.

    >>> lanes_of([0, 0, 0, 1, 1], 2)
    Lanes(node=0, local_rank=2, local_size=3, nodes=2, lanes=2)
    """
    order = list(dict.fromkeys(node_of))
    sizes = [sum(1 for n in node_of if n == node) for node in order]
    mine = node_of[rank]
    local_rank = sum(1 for n in node_of[:rank] if n == mine)
    return Lanes(order.index(mine), local_rank, sizes[order.index(mine)], len(order), min(sizes))
