"""Layer costs to contiguous stages: the partition whose slowest stage is fastest, exactly. Pure.

      best(k, j) = min over i of max(best(k-1, i), cost[i:j] / speed[k-1])        k stages over j layers

Dynamic programming over all cuts, O(stages · layers²). Among equal ones the later stages get less.
"""

import math
from collections.abc import Sequence

import numpy as np

from hpctrain.errors import ConfigError


def partition(
    costs: Sequence[float],
    stages: int,
    memory: Sequence[float] | None = None,
    limits: Sequence[float] | None = None,
    speeds: Sequence[float] | None = None,
    activations: Sequence[float] | None = None,
    kept: Sequence[int] | None = None,
) -> list[tuple[int, int]]:
    """Cut layers into contiguous stages, none empty: (start, stop) each.

    `costs` of the layers in any unit; `memory` of each layer and `limits` of each stage in bytes;
    `speeds` of the stages, 1 where none are given; `activations` of each layer in bytes, for each of the
    micro-batches that a stage has `kept` at once. Raises ConfigError where no cut fits.

    >>> partition([1, 1, 1, 1, 4], 2)
    [(0, 4), (4, 5)]
    >>> partition([1, 1, 1, 1], 2, memory=[1, 1, 1, 1], limits=[1, 4])
    [(0, 1), (1, 4)]
    >>> partition([1, 1, 1, 1], 2, speeds=[3, 1])
    [(0, 3), (3, 4)]
    >>> partition([1, 1, 1, 1], 2, limits=[4, 6], activations=[2, 2, 2, 2], kept=[2, 1])
    [(0, 1), (1, 4)]
    """
    layers = len(costs)
    if layers < stages:
        raise ConfigError(
            f"the model has {layers} layers that can be cut apart, too few for {stages} stages: "
            f"set parallel.stages (times parallel.virtual_stages, if interleaved) = {layers} or fewer"
        )
    sums = np.cumsum([0.0, *costs])
    held = np.cumsum([0.0, *(memory or [0.0] * layers)])
    lives = np.cumsum([0.0, *(activations or [0.0] * layers)])
    times = kept or [1] * stages
    rates, room = speeds or [1.0] * stages, limits or [math.inf] * stages
    best = np.full(layers + 1, math.inf)
    best[0] = 0.0
    cuts: list[list[int]] = []
    for stage in range(stages):
        row, cut = np.full(layers + 1, math.inf), [0] * (layers + 1)
        for stop in range(stage + 1, layers + 1):
            starts = slice(stage, stop)
            need = held[stop] - held[starts] + times[stage] * (lives[stop] - lives[starts])
            slowest = np.maximum(best[starts], (sums[stop] - sums[starts]) / rates[stage])
            slowest[need > room[stage]] = math.inf
            cut[stop] = stop - 1 - int(slowest[::-1].argmin())  # the last of equal ones
            row[stop] = slowest[cut[stop] - stage]
        best = row
        cuts.append(cut)
    if best[layers] == math.inf:
        need, most = held[-1] + max(times) * lives[-1], sum(room)
        raise ConfigError(
            f"the model does not fit: its {layers} layers need {need:,.0f} bytes, {stages} stages have "
            f"{most:,.0f}, and no cut between layers suits them: more stages, or smaller layers"
        )
    found, stop = [], layers
    for stage in reversed(range(stages)):
        start = cuts[stage][stop]
        found.append((start, stop))
        stop = start
    return found[::-1]


def slowest(costs: Sequence[float], parts: Sequence[tuple[int, int]], speeds: Sequence[float]) -> float:
    """Give the time of the slowest stage.

    >>> slowest([1, 2, 3], [(0, 2), (2, 3)], [1, 2])
    3.0
    """
    return max(sum(costs[start:stop]) / speed for (start, stop), speed in zip(parts, speeds))
