"""The norm of the mean gradient, by the norms of its units: the same bits on every layout and split."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from mpi4py import MPI

from hpctrain.averaging.medium import Medium
from hpctrain.averaging.space import UNIT, Space


class Norm:
    """Of the gradients of all stages; each unit's number is written where it is summed."""

    def __init__(self, spaces: Sequence[Space], medium: Medium, pipe: MPI.Intracomm | None) -> None:
        """Take the spaces, the medium whose `units` all ranks of a node see, and the stages."""
        self.spaces, self.medium, self.pipe = spaces, medium, pipe
        self._counts: list[int] = []
        """Of parameters, by stage."""

    def note(self, number: int, start: int, stop: int, mean: torch.Tensor) -> None:
        """Take the mean gradient of part of a space, whole units: (stop - start,). Local."""
        norms = torch.linalg.vector_norm(mean.view(-1, UNIT), dim=1)
        self.medium.units[number][start // UNIT : stop // UNIT] = norms

    def value(self) -> float:
        """Add up the parameters' squares; NaN where one is not finite. Collective over the stages.

        A parameter's units are its own, added in one order; the sum over parameters is exact
        (Shewchuk 1997, by math.fsum), so it does not show which stage has which.
        """
        squares: list[float] = []
        for space, units in zip(self.spaces, self.medium.units):
            starts = [seat.start // UNIT for seat in space.seats if seat.numbers]
            if starts:
                squares += np.add.reduceat(np.square(units.numpy()), starts).tolist()
        if self.pipe:
            squares = self._of_all_stages(squares, self.pipe)
        return math.sqrt(math.fsum(squares)) if np.isfinite(squares).all() else math.nan

    def _of_all_stages(self, squares: list[float], pipe: MPI.Intracomm) -> list[float]:
        """Give every stage's numbers on each, in order. Collective over the stages."""
        if not self._counts:  # the same in every step
            self._counts = pipe.allgather(len(squares))
        found = np.empty(sum(self._counts))
        pipe.Allgatherv(np.array(squares), (found, self._counts))
        return found.tolist()

    def near_bad(self) -> set[str]:
        """Name the parameters that have numbers in a unit that is not finite. Local."""
        near = set()
        for space, units in zip(self.spaces, self.medium.units):
            bad = set(np.flatnonzero(~np.isfinite(units.numpy())).tolist())
            for seat in space.seats:
                last = max(seat.start, seat.stop - 1)
                if bad & set(range(seat.start // UNIT, last // UNIT + 1)):
                    near.add(seat.name)
        return near
