"""The best cut for one schedule, by the pieces' times under each rank's memory.

An estimate is the same in every run; a measurement is right about this machine. So the estimate's cut
stays as long as its slowest stage takes no more than a tenth longer, by the measured times, than that of
the best cut, and fits as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hpctrain.errors import ConfigError
from hpctrain.pipeline.balance import partition, slowest
from hpctrain.pipeline.choice import Choice, Need, Plan, Scales, Wire
from hpctrain.pipeline.profile import Held, Limits, Profile, Work, cost_of
from hpctrain.pipeline.schedule import programs
from hpctrain.pipeline.simulate import simulate
from hpctrain.room import mebibytes

WORTH = 1.1
"""By how much a measured cut must be better than the estimate's."""
COUNTS = 0.01
"""Of what a stage has, what another way must spare to be taken where nothing fits."""
HOLES = 1.4
"""How many times their size tensors take in the C library's heap, for the holes between them (measured)."""
FRESH = 2e-9
"""Seconds for a byte that a micro-batch keeps, where the kernel makes its memory each time (measured)."""
COMING = 2
"""Messages that come for which a stage has memory at either end."""


@dataclass(frozen=True)
class Load:
    """What pieces cost, and what stages can take, for one schedule and way to run backward passes. Pure."""

    costs: list[float]
    """Seconds of each piece."""
    held: list[float]
    """Bytes of each piece: weights, gradients and the optimizer's numbers."""
    works: list[Work]
    """Of each piece."""
    lives: list[list[tuple[int, int]]]
    """By stage, as in `Plan`."""
    limits: list[float]
    """By stage, bytes."""
    speeds: list[float]
    """By stage."""
    wires: list[Wire]
    """By stage, to the next one."""
    holes: float
    """How many times its size takes what comes and goes."""
    recomputes: bool
    """Whether forward runs again for backward."""
    exact: bool
    """Whether large tensors are given back to the system one by one."""
    messages: int
    """How many a stage has memory for at either end."""

    @classmethod
    def of(
        cls,
        plan: Plan,
        weights: Sequence[Held],
        profile: Profile,
        scales: Scales,
        recomputes: bool,
        exact: bool = False,
    ) -> "Load":
        """Take what was measured. Pure."""
        ranks = len(scales.ranks)
        stages = ranks * plan.virtual
        of_rank = [min(profile.speeds[rank] for rank in group) for group in scales.ranks]
        lives = [[(min(a, 1), b) for a, b in pairs] for pairs in plan.lives[:-1]]
        depth = max(a + b for pairs in plan.lives for a, b in pairs)
        # as many leave at once, and where forward runs again, what was received and sent stays, too
        messages = COMING + depth * (1 + recomputes)
        return cls(
            [
                work.seconds + recomputes * work.forward
                for work in (map(fresh, profile.works) if exact else profile.works)
            ],
            [
                scales.copies * own.trained + own.other + work.together
                for own, work in zip(weights, profile.works)
            ],
            profile.works,
            [*lives, plan.lives[-1]] if recomputes else plan.lives,
            [profile.limits.usual[stage % ranks] / plan.virtual for stage in range(stages)],
            [of_rank[stage % ranks] for stage in range(stages)],
            [scales.wires[stage % ranks] if scales.wires else Wire() for stage in range(stages)],
            1.0 if exact else HOLES,
            recomputes,
            exact,
            messages,
        )

    def bytes_of(self, at: int, kept: int, late: int) -> float:
        """Bytes of a piece, for so many micro-batches at once as in a pair of `lives`."""
        return self.held[at] + self.holes * (kept * self.works[at].kept + late * self.works[at].late)

    @property
    def ends(self) -> list[float]:
        """Bytes of messages where a stage may begin or end, before each piece and behind the last."""
        return [0.0, *(float(self.messages * work.gives) for work in self.works[:-1]), 0.0]

    @property
    def seconds_of_messages(self) -> list[list[float]]:
        """By stage but the last: those of a message to the next one, by the piece that it begins with."""
        sizes = [0, *(work.gives for work in self.works[:-1])]
        return [[wire.seconds(size) for size in sizes] for wire in self.wires[:-1]]

    def need(self, parts: Sequence[tuple[int, int]]) -> list[Need]:
        """Say what each stage of a cut takes. Pure."""
        found, ends = [], self.ends
        for (a, b), lives, limit in zip(parts, self.lives, self.limits):
            held, kept = sum(self.held[a:b]), float(sum(work.kept for work in self.works[a:b]))
            times = max(count for count, _ in lives)
            late = float(sum(work.late for work in self.works[a:b]))
            most = max(count * kept + behind * late for count, behind in lives)
            moment = max(work.moment for work in self.works[a:b])
            more = most - times * kept + ends[a] + ends[b] + moment
            found.append(Need(held, kept, times, more, limit))
        return found

    def fits(self, parts: Sequence[tuple[int, int]]) -> bool:
        """Tell whether every stage of a cut has the memory. Pure."""
        return all(one.with_holes(self.holes) <= one.limit for one in self.need(parts))

    def worst(self, parts: Sequence[tuple[int, int]]) -> tuple[float, int]:
        """Give the most bytes that a stage of a cut lacks, and which stage does. Pure."""
        return max((one.with_holes(self.holes) - one.limit, at) for at, one in enumerate(self.need(parts)))

    def slowest(self, parts: Sequence[tuple[int, int]]) -> float:
        """Seconds of the slowest stage of a cut. Pure."""
        return slowest(self.costs, parts, self.speeds, self.seconds_of_messages)

    def best(self, named: list[tuple[int, int]] | None, limited: bool = True) -> list[tuple[int, int]]:
        """Give the best cut, or the one that is `named`, if it is to be `limited` one that fits. Pure.

        Raises ConfigError where there is none.
        """
        stages, wires = len(self.speeds), self.seconds_of_messages
        if named:
            for stage, need in enumerate(self.need(named)):
                size = need.with_holes(self.holes)
                if limited and size > need.limit:
                    raise ConfigError(
                        f"the model does not fit where parallel.cuts cuts it: stage {stage} needs "
                        f"{mebibytes(size)} MiB and has {mebibytes(need.limit)}"
                    )
            return named
        if not limited:
            return partition(self.costs, stages, speeds=self.speeds, wires=wires)
        every = range(len(self.costs))
        needs = [[[self.bytes_of(at, *pair) for at in every] for pair in lives] for lives in self.lives]
        moments = [self.holes * work.moment for work in self.works]
        ends = [self.holes * size for size in self.ends]
        return partition(self.costs, stages, needs, self.limits, self.speeds, ends, moments, wires)


def fitted(
    plan: Plan,
    estimates: Sequence[float],
    weights: Sequence[Held],
    profile: Profile,
    scales: Scales,
    tried: Choice | None = None,
    named: list[tuple[int, int]] | None = None,
) -> Choice:
    """Choose the cut for a schedule, if it is not `named`. Pure. Raises ConfigError where none can fit.

    `tried` is another schedule's, whose cut is the best here too if there are as many stages and it fits.
    """
    asked = scales.recompute == "always"
    load = Load.of(plan, weights, profile, scales, asked)
    stages = len(load.speeds)
    same_way = tried and tried.recompute == asked and not tried.exact
    if tried and same_way and len(tried.parts) == stages and load.fits(tried.parts):
        same = replace(tried, schedule=plan.schedule, said=[*tried.said], needs=load.need(tried.parts))
        return with_seconds(same, plan, scales)
    said, warned = list[str](), list[str]()
    found, errors = possible(plan, weights, profile, scales, named)
    if found:
        load, best = found
    else:
        certain(plan, weights, profile.works, profile.limits, scales, named)
        load, best = sparing(plan, weights, profile, scales, named)
        over, at = load.worst(best)
        where = "" if named else f"; as it is cut stage {at} lacks {mebibytes(over)} MiB"
        warned.append(f"memory may run out: {errors[1]}{where}")
    if load.recomputes > asked:
        said.append(f"stages run forward again for backward, as memory asks for it: else {errors[-1]}")
    if load.exact:
        said.append(
            "large tensors are given back to the system one by one, which is slower: kept for the next "
            "ones, as else, they might not fit for the holes between them"
        )
    guess = named or partition(estimates, stages)
    fits = bool(warned) or load.fits(guess)
    if fits and load.slowest(guess) <= WORTH * load.slowest(best):
        best = guess
    else:
        gain = load.slowest(guess) / load.slowest(best)
        other = "cut by the numbers of weights or operators it"
        why = f"{other} would be {gain:.2f} times as slow" if fits else f"{other} would not fit"
        said.append(f"the model is cut by measured times: {why}")
    if len(set(load.speeds)) > 1:
        said.append(f"ranks differ: speeds of the stages {', '.join(f'{s:.2f}' for s in load.speeds)}")
    costs = passes(profile, best, load.speeds)
    if load.exact:
        costs = [*map(fresh, costs)]
    if load.recomputes:
        costs = [*map(twice, costs[:-1]), costs[-1]]
    choice = Choice(
        best, costs, load.need(best), len(estimates), recompute=load.recomputes, exact=load.exact,
        said=said, warned=warned, schedule=plan.schedule,
    )  # fmt: skip
    return with_seconds(choice, plan, scales)


def possible(
    plan: Plan,
    weights: Sequence[Held],
    profile: Profile,
    scales: Scales,
    named: list[tuple[int, int]] | None,
) -> tuple[tuple[Load, list[tuple[int, int]]] | None, list[ConfigError]]:
    """Give the way to use memory and the cut whose slowest stage is fastest, if any fits. Pure.

    And why the other ways don't fit. Forward runs again by itself only where nothing else fits without holes.
    """
    asked = scales.recompute == "always"
    ways = [(asked, False), (asked, True)]
    if scales.recompute == "auto":
        ways += [(True, False), (True, True)]
    found, errors = list[tuple[float, tuple[Load, list[tuple[int, int]]]]](), list[ConfigError]()
    for number, (recompute, exact) in enumerate(ways):
        if number == 2 and found and not found[0][1][0].exact:
            break  # memory does not ask for it
        load = Load.of(plan, weights, profile, scales, recompute, exact)
        try:
            cut = load.best(named)
        except ConfigError as error:
            errors.append(error)
        else:
            seconds = load.slowest(cut) / (1.0 if number else WORTH)
            found.append((seconds, (load, cut)))
    return min(found, key=lambda one: one[0])[1] if found else None, errors


def sparing(
    plan: Plan,
    weights: Sequence[Held],
    profile: Profile,
    scales: Scales,
    named: list[tuple[int, int]] | None,
) -> tuple[Load, list[tuple[int, int]]]:
    """Give the way to use the least memory where nothing fits, and its cut. Pure.

    Forward runs again by itself only where that spares what counts.
    """
    asked = scales.recompute == "always"
    ways = (asked,) if asked or scales.recompute == "never" else (asked, True)
    found = []
    for recompute in ways:
        load = Load.of(plan, weights, profile, scales, recompute, exact=True)
        cut = load.best(named, limited=False)
        most, stage = load.worst(cut)
        found.append((most, load.limits[stage], (load, cut)))
    gains = found[0][0] - found[-1][0] > COUNTS * found[0][1]
    return found[-1 if gains else 0][2]


def certain(
    plan: Plan,
    weights: Sequence[Held],
    works: Sequence[Work],
    limits: Limits,
    scales: Scales,
    named: list[tuple[int, int]] | None,
) -> None:
    """Refuse what can't fit however memory is shared out on a node. Pure.

    Counted are only weights, gradients, what torch's own optimizers have, and of the smallest micro-batches
    what nothing but the pieces themselves can keep for backward; against all that a rank could have, and what
    all ranks of a pipeline have together.
    """
    stages, ranks = len(scales.ranks) * plan.virtual, len(scales.ranks)
    recomputes = scales.recompute != "never"
    kept = [max(count for count, _ in pairs) for pairs in plan.lives]
    times = [1 if recomputes and stage < stages - 1 else count for stage, count in enumerate(kept)]
    held = [scales.least * own.trained + own.other for own in weights]
    kept_by = [scales.fewest * work.own for work in works]
    needs = [[[size + count * own for size, own in zip(held, kept_by)]] for count in times]
    every = sum(held) + min(times) * sum(kept_by)
    most = [limits.most[stage % ranks] for stage in range(stages)]
    what = "weights, gradients, the optimizer's numbers and what micro-batches keep for backward alone"
    advice = "" if recomputes else 'parallel.recompute = "auto", '
    advice = f"take {advice}more stages, more micro-batches or nodes with more memory"
    if every > limits.share:
        raise ConfigError(
            f"the model does not fit: {what} take {mebibytes(every)} MiB, and the ranks of its {stages} "
            f"stages have {mebibytes(limits.share)} left together: {advice}"
        )
    if named:
        sizes = [sum(row[a:b]) for (row,), (a, b) in zip(needs, named)]
        over = next((at for at, size in enumerate(sizes) if size > most[at]), None)
        if over is not None:
            raise ConfigError(
                f"the model does not fit where parallel.cuts cuts it: {what} take {mebibytes(sizes[over])} "
                f"MiB in stage {over}, which has {mebibytes(most[over])} left: {advice}, or cut elsewhere"
            )
        return
    try:
        partition([0.0] * len(works), stages, needs, most)
    except ConfigError as error:
        if len(works) < stages:
            raise
        raise ConfigError(f"{error}: {what} take that; {advice}") from None


def with_seconds(choice: Choice, plan: Plan, scales: Scales) -> Choice:
    """Add the seconds of a step to a plan's choice, each stage's messages going to the next. Pure."""
    ranks = len(scales.ranks)
    every = programs(plan.schedule, ranks, range(scales.micro_batches), plan.virtual)
    choice.wires = [scales.wires[at % ranks] if scales.wires else Wire() for at in range(len(choice.parts))]
    cost = cost_of(choice.passes, every)
    choice.seconds = simulate(every, cost, wire=choice.wire).seconds
    return choice


def twice(work: Work) -> Work:
    """Give what a stage costs that runs its forward twice. Pure."""
    joint = work.forward + work.joint if work.joint else 0.0
    return replace(work, input_gradient=work.forward + work.input_gradient, joint=joint)


def fresh(work: Work) -> Work:
    """Give what a piece costs whose memory the kernel makes each time, half of it in either pass. Pure."""
    more = FRESH * work.kept / 2.0
    joint = work.joint + more if work.joint else 0.0
    return replace(work, forward=work.forward + more, input_gradient=work.input_gradient + more, joint=joint)


def passes(profile: Profile, parts: Sequence[tuple[int, int]], speeds: Sequence[float]) -> list[Work]:
    """Add up by stage, at its speed. Pure."""
    return [
        Work(
            sum(work.forward for work in works),
            sum(work.input_gradient for work in works),
            sum(work.weight_gradient for work in works),
            sum(work.kept for work in works),
            sum(work.joint for work in works),
            sum(work.late for work in works),
            max(work.moment for work in works),
            works[-1].gives,
            sooner=sum(work.sooner for work in works),
            tail=sum(work.tail for work in works),
        ).times(1.0 / speed)
        for works, speed in zip((profile.works[a:b] for a, b in parts), speeds)
    ]
