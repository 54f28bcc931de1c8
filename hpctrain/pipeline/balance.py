"""Layer costs to contiguous stages: the partition whose slowest part is fastest, exactly. Pure.

      best(k, j) = min over i of max(best(k-1, i), wire[k-1](i), cost[i:j] / speed[k-1])

k stages over j layers, the last one from layer i on, whose messages from the stage before take wire(i).
Dynamic programming over all cuts, O(stages · layers²). Among equal ones the later stages get less.
"""

import math
from collections.abc import Sequence

import numpy as np

from hpctrain.errors import ConfigError
from hpctrain.room import mebibytes


def partition(
    costs: Sequence[float],
    stages: int,
    needs: Sequence[Sequence[Sequence[float]]] | None = None,
    limits: Sequence[float] | None = None,
    speeds: Sequence[float] | None = None,
    ends: Sequence[float] | None = None,
    moments: Sequence[float] | None = None,
    wires: Sequence[Sequence[float]] | None = None,
) -> list[tuple[int, int]]:
    """Cut layers into contiguous stages, none empty: (start, stop) each.

    `costs` of the layers in any unit; `speeds` of the stages, 1 where none are given. By stage `needs` has
    rows of bytes, one a layer: each row must be within the stage's `limits`, with those of its two `ends`,
    one before each layer and one behind the last, and the largest of its layers' `moments`. `wires`: by
    stage but the last, in the unit of the costs, what its messages to the next take where that begins at
    each of the layers. Raises ConfigError where no cut fits.

    >>> partition([1, 1, 1, 1, 4], 2)
    [(0, 4), (4, 5)]
    >>> partition([1, 1, 1, 1], 2, needs=[[[1, 1, 1, 1]]] * 2, limits=[1, 4])
    [(0, 1), (1, 4)]
    >>> partition([1, 1, 1, 1], 2, needs=[[[1] * 4]] * 2, limits=[3, 9], ends=[0, 1, 2, 1, 0])
    [(0, 1), (1, 4)]
    >>> partition([1, 1, 1, 1], 2, needs=[[[1] * 4]] * 2, limits=[3, 6], moments=[0, 2, 1, 0])
    [(0, 1), (1, 4)]
    >>> partition([1, 1, 1, 1], 2, speeds=[3, 1])
    [(0, 3), (3, 4)]
    >>> partition([1, 1, 1, 1], 2, wires=[[0, 1, 5, 4]])
    [(0, 1), (1, 4)]
    """
    layers = len(costs)
    if layers < stages:
        raise ConfigError(
            f"the model has {layers} layer{'s' * (layers > 1)} that can be cut apart, too few for {stages} "
            f"stages: set parallel.stages (times parallel.virtual_stages, if interleaved) = {layers} or fewer"
        )
    sums = np.cumsum([0.0, *costs])
    held = [[np.cumsum([0.0, *row]) for row in rows] for rows in needs or [[]] * stages]
    edges, most = np.array(ends or [0.0] * (layers + 1)), np.array(moments or [0.0] * layers)
    ways = np.array([[0.0] * layers, *(wires or [[0.0] * layers] * (stages - 1))])
    rates, room = speeds or [1.0] * stages, limits or [math.inf] * stages
    best = np.full(layers + 1, math.inf)
    best[0] = 0.0
    cuts: list[list[int]] = []
    for stage in range(stages):
        row, cut = np.full(layers + 1, math.inf), [0] * (layers + 1)
        for stop in range(stage + 1, layers + 1):
            starts = slice(stage, stop)
            slowest = np.maximum(best[starts], (sums[stop] - sums[starts]) / rates[stage])
            slowest = np.maximum(slowest, ways[stage, starts])
            once = edges[starts] + edges[stop] + np.maximum.accumulate(most[starts][::-1])[::-1]
            for row_held in held[stage]:
                need = row_held[stop] - row_held[starts] + once
                slowest[need > room[stage]] = math.inf
            cut[stop] = stop - 1 - int(slowest[::-1].argmin())  # the last of equal ones
            row[stop] = slowest[cut[stop] - stage]
        best = row
        cuts.append(cut)
    if best[layers] == math.inf:
        need, total = max(row[-1] for rows in held for row in rows), sum(room)
        raise ConfigError(
            f"the model does not fit: its {layers} layers need {mebibytes(need)} MiB, {stages} stages have "
            f"{mebibytes(total)}, and no cut between layers suits them"
        )
    found, stop = [], layers
    for stage in reversed(range(stages)):
        start = cuts[stage][stop]
        found.append((start, stop))
        stop = start
    return found[::-1]


def slowest(
    costs: Sequence[float],
    parts: Sequence[tuple[int, int]],
    speeds: Sequence[float],
    wires: Sequence[Sequence[float]],
) -> float:
    """Give the time of the slowest stage, or of the slowest messages between two. As in `partition`.

    >>> slowest([1, 2, 3], [(0, 2), (2, 3)], [1, 2], [[0, 0, 1]])
    3.0
    >>> slowest([1, 2, 3], [(0, 2), (2, 3)], [1, 2], [[0, 0, 5]])
    5
    """
    passes = [sum(costs[start:stop]) / speed for (start, stop), speed in zip(parts, speeds)]
    return max([*passes, *(wire[start] for wire, (start, _) in zip(wires, parts[1:]))])
