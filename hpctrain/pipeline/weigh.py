"""Where to cut: by the operators' estimated work, or by their measured time where that is clearly faster.

An estimate is the same in every run; a measurement is right about this machine. So the estimate's cut
stays as long as its slowest stage takes no more than a tenth longer, by the measured times, than that of
the best cut, and fits as well.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from mpi4py import MPI

from hpctrain.errors import ConfigError
from hpctrain.pipeline.balance import partition, slowest
from hpctrain.pipeline.profile import Profile, Work, measure

WORTH = 1.1


@dataclass
class Scales:
    """What a cut is chosen by, alike on all ranks."""

    comm: MPI.Intracomm
    """All ranks."""
    ranks: list[list[int]]
    """By stage: those of `comm` that run it."""
    limits: list[float]
    """By stage: the bytes that it may take on each of its ranks, where virtual stages share alike."""
    kept: list[int]
    """By stage: the most micro-batches on their way at once."""
    copies: float
    """Bytes that a byte of weights takes in all: itself, its gradient, the optimizer's."""
    around: AbstractContextManager[Any] = field(default_factory=nullcontext)
    """What passes run under."""
    turn: tuple[int, int] = (0, 1)
    """This rank's of how many: those that share cores measure one after the other."""
    recompute: str = "never"
    """"auto", "always" or "never": whether stages but the last let forward's graphs go."""


@dataclass
class Choice:
    """Where stages begin and end, and what is known of them."""

    parts: list[tuple[int, int]]
    """By stage: the first piece, and the one behind the last."""
    passes: list[Work] = field(default_factory=list)
    """By stage: what its pieces cost together; empty where not measured."""
    pieces: int = 0
    """That can be cut apart; 0 where the user names the cuts."""
    recompute: bool = False
    """Whether memory asks for it."""
    said: list[str] = field(default_factory=list)
    """For the log."""
    warned: list[str] = field(default_factory=list)


def choose(
    stages: int,
    estimates: Sequence[float],
    weights: Sequence[float],
    pieces: Sequence[Callable[[], Work]],
    scales: Scales | None,
) -> Choice:
    """Choose the cut of pieces with estimated costs and bytes of weights. Collective, if there are scales.

    Raises ConfigError where the gradients alone would not fit.
    """
    guess = partition(estimates, stages)
    if scales is None:
        return Choice(guess, pieces=len(pieces))
    profile = measure(scales.comm, pieces, scales.around, scales.turn)
    if isinstance(profile, str):
        return Choice(
            guess,
            pieces=len(pieces),
            said=[f"the cut is by estimate, as pieces can't be measured alone ({profile})"],
        )
    speeds = [min(profile.speeds[rank] for rank in ranks) for ranks in scales.ranks]
    costs = [work.seconds for work in profile.works]
    memory = [scales.copies * size for size in weights]
    kept = [float(work.kept) for work in profile.works]
    said, warned, recompute = [], [], scales.recompute == "always"
    once = [*[1] * (stages - 1), scales.kept[-1]]
    twice = [work.seconds + work.forward for work in profile.works]
    times = once if recompute else scales.kept
    costs = twice if recompute else costs
    try:
        best = partition(costs, stages, memory, scales.limits, speeds, kept, times)
    except ConfigError as error:
        try:
            if scales.recompute != "auto":
                raise
            # what was received and sent stays too, which is little beside a graph
            best = partition(twice, stages, memory, scales.limits, speeds, kept, once)
            costs, times, recompute = twice, once, True
            said = [f"stages run forward again for backward, as memory asks for it: else {error}"]
        except ConfigError:
            partition(costs, stages, weights, scales.limits, speeds)
            warned = [f"memory may run out: {error}"]
            recompute = recompute or scales.recompute == "auto"  # the least that it can take
            costs = twice if recompute else costs
            best = partition(costs, stages, speeds=speeds)
    fits = warned or all(
        sum(memory[a:b]) + count * sum(kept[a:b]) <= limit
        for (a, b), count, limit in zip(guess, times, scales.limits)
    )
    if fits and slowest(costs, guess, speeds) <= WORTH * slowest(costs, best, speeds):
        best = guess
    else:
        gain = slowest(costs, guess, speeds) / slowest(costs, best, speeds)
        why = f"the estimate's is {gain:.2f} times as slow" if fits else "the estimate's would not fit"
        said.append(f"the model is cut by measured times: {why}")
    if len(set(speeds)) > 1:
        said.append(f"ranks differ: speeds of the stages {', '.join(f'{s:.2f}' for s in speeds)}")
    found = passes(profile, best, speeds)
    if recompute:
        found = [*map(again, found[:-1]), found[-1]]
    return Choice(best, found, len(pieces), recompute, said, warned)


def again(work: Work) -> Work:
    """Give what a stage costs that runs its forward twice. Pure."""
    return Work(work.forward, work.forward + work.input_gradient, work.weight_gradient, work.kept)


def passes(profile: Profile, parts: Sequence[tuple[int, int]], speeds: Sequence[float]) -> list[Work]:
    """Add up by stage, at its speed. Pure."""
    return [
        Work(
            sum(work.forward for work in works),
            sum(work.input_gradient for work in works),
            sum(work.weight_gradient for work in works),
            sum(work.kept for work in works),
        ).times(1.0 / speed)
        for works, speed in zip((profile.works[a:b] for a, b in parts), speeds)
    ]
