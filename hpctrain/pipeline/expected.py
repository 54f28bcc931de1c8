"""What is known of a cut before anything runs: a table of the stages' times and memory."""

from collections.abc import Sequence

from hpctrain.pipeline.choice import Choice
from hpctrain.pipeline.part import Cut
from hpctrain.pipeline.profile import cost_of
from hpctrain.pipeline.schedule import programs
from hpctrain.pipeline.simulate import simulate
from hpctrain.room import mebibytes

HEADS = (
    *("stage", "ranks", "forward ms", "input gradient ms", "weight gradient ms"),
    *("sends MiB", "weights MiB", "kept MiB", "more MiB", "memory MiB", "of MiB"),
)


def table(cut: Cut, schedule: str, micro_batches: int, crowded: bool = False) -> list[str]:
    """Lines for the log, a row a stage; without times where the pieces were not measured. Pure.

    `micro_batches` are those of a replica; `crowded`: ranks share cores.
    """
    choice = cut.choice
    if not choice.passes:
        return [f"stage {stage}: {' … '.join(ends(cut.names(stage)))}" for stage in range(cut.stages)]
    ranks = len(choice.ranks)
    rows = [list(HEADS)]
    for stage, (work, need) in enumerate(zip(choice.passes, choice.needs)):
        times = (work.forward, work.input_gradient, work.weight_gradient)
        rows.append(
            [
                *(str(stage), several(choice.ranks[stage % ranks])),
                *(f"{1e3 * seconds:.2f}" for seconds in times),
                mebibytes(work.gives),
                *(mebibytes(need.held), f"{need.times} x {mebibytes(need.kept)}"),
                *(mebibytes(need.more), mebibytes(need.most), size(need.limit)),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    names = ["modules", *(" … ".join(ends(cut.names(stage))) for stage in range(cut.stages))]
    every = programs(schedule, ranks, range(micro_batches), cut.stages // ranks)
    links, back = cut.links()
    found = simulate(every, cost_of(choice.passes, every), links, choice.wire, back)
    whole = sum(need.held + need.kept for need in choice.needs) + max(need.more for need in choice.needs)
    fits = whole <= min(need.limit for need in choice.needs)
    return [
        "expected of each stage for a micro-batch, from pieces measured alone (docs/pipeline.md, Balance):",
        *(f"{line}  {name}" for line, name in zip(lines, names)),
        f"{schedule} simulated with them and {messages(choice)}: a step's passes take "
        f"{1e3 * found.seconds:.1f} ms, idle {found.bubble:.0%}"
        f"{'; the ranks share cores, and take longer' if crowded else ''}",
        *([f"one rank could hold it all ({mebibytes(whole)} MiB): {REPLICAS}"] if fits else []),
    ]


REPLICAS = "replicas alone (parallel.stages = 1) idle less and send fewer messages on a node"


def messages(choice: Choice) -> str:
    """Say what messages take in the simulation. Pure."""
    slow = [wire for wire in choice.wires if wire.per_byte]
    if not slow:
        return "free messages"
    worst = max(slow, key=lambda wire: wire.per_byte)
    return f"messages between nodes at {1e-6 / worst.per_byte:,.0f} MB/s, {1e6 * worst.latency:,.0f} µs each"


def several(ranks: Sequence[int]) -> str:
    """Write the ranks that run a stage.

    >>> several([0]), several([0, 2]), several(range(0, 12, 2))
    ('0', '0,2', '0,2,…,10')
    """
    if len(ranks) > 3:
        return f"{ranks[0]},{ranks[1]},…,{ranks[-1]}"
    return ",".join(map(str, ranks))


def size(limit: float) -> str:
    """Write a limit in MiB.

    >>> size(3.5 * 2**30), size(float("inf"))
    ('3,584', 'any')
    """
    return "any" if limit == float("inf") else f"{limit / 2**20:,.0f}"


def ends(names: Sequence[str]) -> list[str]:
    """Give the first and the last one, if there are any.

    >>> ends(["a", "b", "c"]), ends(["a"]), ends([])
    (['a', 'c'], ['a'], [])
    """
    return list(dict.fromkeys([*names[:1], *names[-1:]]))
