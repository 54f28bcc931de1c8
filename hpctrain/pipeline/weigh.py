"""Where to cut and in which order to run: by estimated work, or by measured time if that is clearly faster.

An estimate is the same in every run; a measurement is right about this machine. So the estimate's cut
stays as long as its slowest stage takes no more than a tenth longer, by the measured times, than that of
the best cut, and fits as well. The schedule is the first of those that may be chosen whose simulated step,
with the measured passes, no other beats by what the other's own messages and memory are worth.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from mpi4py import MPI

from hpctrain.errors import ConfigError
from hpctrain.pipeline.balance import partition, slowest
from hpctrain.pipeline.profile import Profile, Work, cost_of, measure
from hpctrain.pipeline.schedule import programs
from hpctrain.pipeline.simulate import simulate

T = TypeVar("T")
WORTH = 1.1
"""By how much a measured cut must be better than the estimate's."""
SPLIT_WORTH = 1.1
"""How many times as long the halves of a backward take, at least, where they are not to be split."""


@dataclass(frozen=True)
class Plan:
    """A schedule that may be chosen."""

    schedule: str
    virtual: int
    """Stages of a rank."""
    kept: list[int]
    """By stage: the most micro-batches on their way at once."""
    worth: float = 1.0
    """By how much its simulated step must be shorter than that of the plans before it."""


@dataclass
class Scales:
    """What a cut is chosen by, alike on all ranks."""

    comm: MPI.Intracomm
    """All ranks."""
    ranks: list[list[int]]
    """By rank of a pipeline: those of `comm` that run its stages."""
    limits: list[float]
    """By rank of a pipeline: the bytes that its stages may take."""
    plans: list[Plan]
    """The schedules to choose from; the first one has the fewest stages."""
    micro_batches: int
    """Of a replica."""
    copies: float
    """Bytes that a byte of weights takes in all: itself, its gradient, the optimizer's."""
    around: AbstractContextManager[Any] = field(default_factory=nullcontext)
    """What passes run under."""
    turn: tuple[int, int] = (0, 1)
    """This rank's of how many: those that share cores measure one after the other."""
    recompute: str = "never"
    """"auto", "always" or "never": whether stages but the last let forward's graphs go."""
    splits: str = "auto"
    """"auto", "always" or "never": whether a backward runs in halves; auto: where that is repaid."""


@dataclass(frozen=True)
class Need:
    """What a stage takes of its rank's memory, in bytes."""

    held: float
    """Weights, gradients and the optimizer's numbers."""
    kept: float
    """From forward to backward of one micro-batch."""
    times: int
    """The most micro-batches on their way at once."""
    limit: float
    """What the rank may take."""

    @property
    def most(self) -> float:
        """At its peak."""
        return self.held + self.times * self.kept


@dataclass
class Choice:
    """Where stages begin and end, and what is known of them."""

    parts: list[tuple[int, int]]
    """By stage: the first piece, and the one behind the last."""
    passes: list[Work] = field(default_factory=list)
    """By stage: what its pieces cost together; empty where not measured."""
    needs: list[Need] = field(default_factory=list)
    """By stage; empty where not measured."""
    pieces: int = 0
    """That can be cut apart; 0 where the user names the cuts."""
    works: list[Work] = field(default_factory=list)
    """Of each piece, on a rank of speed 1; empty where not measured."""
    names: list[str] = field(default_factory=list)
    """Of each piece: the module that it begins with."""
    recompute: bool = False
    """Whether memory asks for it."""
    said: list[str] = field(default_factory=list)
    """For the log."""
    warned: list[str] = field(default_factory=list)
    schedule: str = ""
    """The one that was chosen by measured times; empty where there are none."""
    at_once: list[int] = field(default_factory=list)
    """Pieces whose weight gradients are not to wait."""
    seconds: float = 0.0
    """Of a step, simulated; 0 where nothing is measured."""
    idle: float = 0.0
    """Share of the step in which a rank waits, simulated."""
    shared: bool = False
    """Whether pieces share weights."""


def choose(
    stages: int,
    estimates: Sequence[float],
    weights: Sequence[float],
    pieces: Sequence[Callable[[], Work]],
    scales: Scales | None,
    shared: bool = False,
) -> Choice:
    """Choose the cut of pieces with estimated costs and bytes of weights. Collective, if there are scales.

    `shared`: pieces share weights, whose gradients several stages a rank would add in another order.
    Raises ConfigError where the gradients alone would not fit.
    """
    if scales is None:
        return Choice(partition(estimates, stages), pieces=len(pieces))
    profile = measure(scales.comm, pieces, scales.around, scales.turn)
    if isinstance(profile, str):
        return Choice(
            partition(estimates, stages),
            pieces=len(pieces),
            said=[f"the cut is by estimate, as pieces can't be measured alone ({profile})"],
        )
    at_once = too_dear(profile.works, scales) if scales.splits == "auto" else []
    whole = range(len(pieces)) if scales.splits == "never" else at_once
    works = [work.whole if at in whole else work for at, work in enumerate(profile.works)]
    profile = replace(profile, works=works)
    first, *others = scales.plans
    best = tried = fitted(first, estimates, weights, profile, scales)
    simulated = [f"{first.schedule} {1e3 * best.seconds:.1f} ms"]
    for plan in others:
        if plan.virtual > 1 and (shared or not reaches(plan, scales, len(pieces))):
            continue
        try:
            found = fitted(plan, estimates, weights, profile, scales, tried)
        except ConfigError:
            continue
        least = f" (taken if {plan.worth - 1.0:.0%} shorter)"
        simulated.append(f"{plan.schedule} {1e3 * found.seconds:.1f} ms{least}")
        fits = bool(found.warned) <= bool(best.warned) and found.recompute <= best.recompute
        if fits and found.seconds * plan.worth < best.seconds:
            best = found
    if others:
        by = ", ".join(simulated)
        best.said.append(f"the schedule is {best.schedule}, simulated with the pieces' times: {by}")
    if at_once:
        best.said.append(
            f"of {len(pieces)} pieces of the model {len(at_once)} compute all their gradients at once: "
            f"to let those of the weights wait would take longer"
        )
    best.at_once, best.shared, best.works = at_once, shared, profile.works
    return best


def used_once(pieces: Sequence[set[T]]) -> tuple[set[T], bool]:
    """Give what only one of the pieces uses, and whether anything is used by several. Pure.

    >>> used_once([{"a", "b"}, {"b"}])
    ({'a'}, True)
    """
    uses = Counter(one for piece in pieces for one in piece)
    found = {one for one, count in uses.items() if count == 1}
    return found, len(found) < len(uses)


def reaches(plan: Plan, scales: Scales, pieces: int) -> bool:
    """Tell whether several stages a rank can be worth it: there are as many pieces, and gaps enough. Pure."""
    m, gaps = scales.micro_batches, len(scales.ranks) - 1
    return pieces >= plan.virtual * len(scales.ranks) and m + gaps > plan.worth * (m + gaps / plan.virtual)


def too_dear(works: Sequence[Work], scales: Scales) -> list[int]:
    """List the pieces whose backward is not to be split. Pure.

    To split costs each micro-batch the halves' time over that of the whole; it shortens the way of the
    first gradients through the stages by the weight gradient's, once a stage.
    """
    gaps = len(scales.ranks) - 1
    found = []
    for at, work in enumerate(works):
        halves = work.input_gradient + work.weight_gradient
        lost = scales.micro_batches * (halves - work.joint)
        if work.joint and halves > SPLIT_WORTH * work.joint and lost > gaps * work.weight_gradient:
            found.append(at)
    return found


def fitted(
    plan: Plan,
    estimates: Sequence[float],
    weights: Sequence[float],
    profile: Profile,
    scales: Scales,
    tried: Choice | None = None,
) -> Choice:
    """Choose the cut for a schedule. Pure. Raises ConfigError where the gradients alone would not fit.

    `tried` is another schedule's, whose cut is the best here too if there are as many stages and it fits.
    """
    ranks = len(scales.ranks)
    stages = ranks * plan.virtual
    of_rank = [min(profile.speeds[rank] for rank in group) for group in scales.ranks]
    speeds = [of_rank[stage % ranks] for stage in range(stages)]
    limits = [scales.limits[stage % ranks] / plan.virtual for stage in range(stages)]
    costs = [work.seconds for work in profile.works]
    memory = [scales.copies * size for size in weights]
    kept = [float(work.kept) for work in profile.works]
    said, warned, recompute = [], [], scales.recompute == "always"
    once = [*[1] * (stages - 1), plan.kept[-1]]
    twice = [work.seconds + work.forward for work in profile.works]
    times = once if recompute else plan.kept
    costs = twice if recompute else costs

    def need(parts: Sequence[tuple[int, int]]) -> list[Need]:
        return [
            Need(sum(memory[a:b]), sum(kept[a:b]), count, limit)
            for (a, b), count, limit in zip(parts, times, limits)
        ]

    def fit(parts: Sequence[tuple[int, int]]) -> bool:
        return all(one.most <= one.limit for one in need(parts))

    if tried and len(tried.parts) == stages and tried.recompute == recompute and fit(tried.parts):
        same = replace(tried, schedule=plan.schedule, said=[*tried.said], needs=need(tried.parts))
        return with_seconds(same, plan, scales)
    guess = partition(estimates, stages)
    try:
        best = partition(costs, stages, memory, limits, speeds, kept, times)
    except ConfigError as error:
        try:
            if scales.recompute != "auto":
                raise
            # what was received and sent stays too, which is little beside a graph
            best = partition(twice, stages, memory, limits, speeds, kept, once)
            costs, times, recompute = twice, once, True
            said = [f"stages run forward again for backward, as memory asks for it: else {error}"]
        except ConfigError:
            partition(costs, stages, weights, limits, speeds)
            warned = [f"memory may run out: {error}"]
            recompute = recompute or scales.recompute == "auto"  # the least that it can take
            costs = twice if recompute else costs
            best = partition(costs, stages, speeds=speeds)
    fits = warned or fit(guess)
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
    choice = Choice(best, found, need(best), len(estimates), [], [], recompute, said, warned, plan.schedule)
    return with_seconds(choice, plan, scales)


def with_seconds(choice: Choice, plan: Plan, scales: Scales) -> Choice:
    """Add the seconds of a step, and how idle it is, to a plan's choice. Pure."""
    every = programs(plan.schedule, len(scales.ranks), range(scales.micro_batches), plan.virtual)
    expected = simulate(every, cost_of(choice.passes))
    choice.seconds, choice.idle = expected.seconds, expected.bubble
    return choice


def again(work: Work) -> Work:
    """Give what a stage costs that runs its forward twice. Pure."""
    joint = work.forward + work.joint if work.joint else 0.0
    return replace(work, input_gradient=work.forward + work.input_gradient, joint=joint)


def passes(profile: Profile, parts: Sequence[tuple[int, int]], speeds: Sequence[float]) -> list[Work]:
    """Add up by stage, at its speed. Pure."""
    return [
        Work(
            sum(work.forward for work in works),
            sum(work.input_gradient for work in works),
            sum(work.weight_gradient for work in works),
            sum(work.kept for work in works),
            sum(work.joint for work in works),
        ).times(1.0 / speed)
        for works, speed in zip((profile.works[a:b] for a, b in parts), speeds)
    ]
