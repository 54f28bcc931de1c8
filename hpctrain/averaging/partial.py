"""The partial sums of `averaging.invariant`: each micro-batch's gradient takes its place in the tree at once.

      micro-batch        0         1         2         3            (one rank has all of four)
      slot 0             0       0 + 1     0 + 1   (0+1) + (2+3)
      slot 1                                 2       2 + 3

Parameters of virtual stages, whose backward passes take turns on a rank, have a tree each: the same one, so
that all end in the same slots.
"""

from collections.abc import Sequence

import torch
from torch import nn

from hpctrain.averaging.places import Places
from hpctrain.averaging.space import Space
from hpctrain.averaging.tree import Growing

Run = tuple[int, int, int]
"""Numbers [start, stop) of a space: (space, start, stop)."""


class PartialSums:
    """Adds micro-batches in the order of the tree, for all parameters or part by part."""

    def __init__(
        self, count: int, spaces: list[Space], slots: list[list[torch.Tensor]], places: Places
    ) -> None:
        """Take the step's micro-batches, and the slots that gradients are computed in."""
        self._count, self._spaces, self._slots, self._places = count, spaces, slots, places
        self._parts: list[Sequence[nn.Parameter] | None] = [None]
        self._runs: list[list[Run]] = [[(at, 0, space.size) for at, space in enumerate(spaces)]]
        self._trees = [Growing(count)]
        self._last = -1

    def divide(self, parts: Sequence[Sequence[nn.Parameter]]) -> None:
        """Let the parameters of each part take their places by themselves; each is in one. Local."""
        self._parts, self._runs = list(parts), [runs(self._spaces, part) for part in parts]
        self._trees = [Growing(self._count) for _ in parts]

    def begin(self, micro_batches: Sequence[int]) -> None:
        """Start a step: this rank has these, in this order. Local."""
        self._last = micro_batches[-1] if micro_batches else -1
        for tree in self._trees:
            tree.stack = []

    def take(self, micro_batch: int, part: int) -> None:
        """Let what has joined since the last one take its place as a micro-batch's; empty ones too. Local."""
        tree, own = self._trees[part], self._parts[part]
        self._places.complete(own)
        for left, right in tree.push(micro_batch):
            for space, start, stop in self._runs[part]:
                self._slots[left][space][start:stop].add_(self._slots[right][space][start:stop])
        if micro_batch != self._last:
            free = tree.free()
            self._places.point(free, self._slots[free], own)


def runs(spaces: Sequence[Space], parameters: Sequence[nn.Parameter]) -> list[Run]:
    """Give where parameters lie, those beside one another together. Pure."""
    ids, found = {id(p) for p in parameters}, list[Run]()
    for at, space in enumerate(spaces):
        seats = sorted(space.seats, key=lambda seat: seat.start)
        for seat, behind in zip(seats, [*(s.start for s in seats[1:]), space.size]):
            if id(seat.parameter) not in ids:
                continue
            if found and found[-1][::2] == (at, seat.start):
                found[-1] = (at, found[-1][1], behind)
            else:
                found.append((at, seat.start, behind))
    return found
