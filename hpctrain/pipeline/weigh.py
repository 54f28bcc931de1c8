"""Where to cut and in which order to run: by estimated work, or by measured time.

Each schedule has its best cut (`fit.py`). Chosen is the first of those that may be chosen whose simulated
step, with the measured passes, no other beats by what the other's own messages and memory are worth.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from hpctrain.errors import ConfigError
from hpctrain.pipeline.balance import partition
from hpctrain.pipeline.choice import Choice, Plan, Scales
from hpctrain.pipeline.fit import certain, fitted
from hpctrain.pipeline.profile import Held, Unmeasured, Work, measure

T = TypeVar("T")
UNKNOWN = Work(0.0, 0.0, 0.0, 0)
SPLIT_WORTH = 1.02
"""How many times as long the halves of a backward take, at least, where they are not to be split."""
COLD = 2.0
"""How many times as much that costs in a step as where one piece is repeated: the second half's tensors have
left the caches by then (measured with convolutions)."""


def choose(
    stages: int,
    estimates: Sequence[float],
    weights: Sequence[Held],
    pieces: Sequence[Callable[[], Work]],
    scales: Scales | None,
    shared: bool = False,
    named: list[tuple[int, int]] | None = None,
    names: Sequence[str] = (),
) -> Choice:
    """Choose the cut of pieces with estimated costs and bytes of weights. Collective, if there are scales.

    `shared`: pieces share weights, whose gradients several stages a rank would add in another order. With
    `named` the user has said where to cut, and the rest is chosen; `names` say what a piece is. Raises
    ConfigError where memory can't suffice.
    """
    count = 0 if named else len(pieces)
    if scales is None:
        return Choice(named or partition(estimates, stages), pieces=count)
    profile = measure(scales.comm, pieces, scales.around, scales.turn, scales.limits, names)
    if isinstance(profile, Unmeasured):
        certain(scales.plans[0], weights, [UNKNOWN] * len(pieces), profile.limits, scales, named)
        what = "nothing is foretold" if named else "the cut is by estimate"
        why = f"{what}, as pieces can't be measured alone ({profile.reason})"
        memory = profile.short
        return Choice(
            named or partition(estimates, stages),
            pieces=count,
            said=[] if memory else [why],
            warned=[f"{why}: memory is short, and nothing says if it suffices"] if memory else [],
        )
    at_once = too_dear(profile.works, scales) if scales.splits == "auto" else []
    works = [work.at_once if at in at_once else work for at, work in enumerate(profile.works)]
    if scales.splits == "never":
        works = [work.whole for work in profile.works]
    profile = replace(profile, works=works)
    first, *others = scales.plans
    best = tried = fitted(first, estimates, weights, profile, scales, named=named)
    simulated = [f"{first.schedule} {1e3 * best.seconds:.1f} ms"]
    for plan in others:
        if plan.virtual > 1 and (named or shared or not reaches(plan, scales, len(pieces))):
            continue
        try:
            found = fitted(plan, estimates, weights, profile, scales, tried, named)
        except ConfigError:
            continue
        least = f" (taken if {plan.worth - 1.0:.0%} shorter)"
        simulated.append(f"{plan.schedule} {1e3 * found.seconds:.1f} ms{least}")
        fits = not found.warned or (bool(best.warned) and spares(found, best))
        fits = fits and found.recompute <= best.recompute and found.exact <= best.exact
        if fits and found.seconds * plan.worth < best.seconds:
            best = found
    if others:
        by = ", ".join(simulated)
        best.said.append(f"the schedule is {best.schedule}, simulated with the pieces' times: {by}")
    if at_once:
        best.said.append(
            f"{len(at_once)} of {len(pieces)} pieces of the model are dear to split: their weight gradients "
            f"wait in a step's last micro-batches alone"
        )
    best.at_once, best.shared, best.ranks = at_once, shared, scales.ranks
    best.works, best.pieces = profile.works, count
    best.weights = [own.trained + own.other for own in weights]
    return best


def spares(choice: Choice, other: Choice) -> bool:
    """Whether a choice needs no more memory than another: on its hungriest stage, and on all. Pure."""
    sizes = [
        (max(need.most - need.limit for need in one.needs), sum(need.most for need in one.needs))
        for one in (choice, other)
    ]
    return all(a <= b for a, b in zip(*sizes, strict=True))


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
    """List the pieces whose backward is to be split in a step's last micro-batches alone. Pure.

    To split costs each micro-batch the halves' time over that of the whole; it shortens the way of the
    first gradients through the stages, and of the last ones, by the weight gradient's, once a stage. All
    pieces that lose by it are judged together, as one's loss may be no more than its measurement's noise.
    What waits `together` gains in a step what no measurement of a piece shows.
    """
    losing = [
        at
        for at, work in enumerate(works)
        if work.joint and not work.together and work.seconds > work.whole.seconds
    ]
    whole = sum(works[at].joint for at in losing)
    lost = sum(works[at].seconds - works[at].whole.seconds for at in losing)
    waiting = (len(scales.ranks) - 1) * sum(works[at].weight_gradient for at in losing)
    dear = lost > (SPLIT_WORTH - 1.0) * whole and COLD * scales.micro_batches * lost > waiting
    return losing if dear else []
