"""What is known of a cut before anything runs: a table of the stages' times and memory."""

from collections.abc import Sequence

from hpctrain.pipeline.part import Cut

MEBI = 1 << 20


def table(cut: Cut, schedule: str, ranks: int) -> list[str]:
    """Lines for the log, a row a stage; none where the pieces were not measured. Pure."""
    choice = cut.choice
    if not choice.passes:
        return []
    lines = [
        "expected of each stage and micro-batch, from pieces measured alone; weights with gradients and "
        "optimizer, memory at its peak:",
        "stage  rank  forward ms  input gradient ms  weight gradient ms  weights MiB      kept MiB  "
        "memory MiB    of MiB  modules",
    ]
    for stage, (work, need) in enumerate(zip(choice.passes, choice.needs)):
        kept = f"{need.times} x {need.kept / MEBI:.1f}"
        lines.append(
            f"{stage:5}  {stage % ranks:4}  {1e3 * work.forward:10.2f}  {1e3 * work.input_gradient:17.2f}  "
            f"{1e3 * work.weight_gradient:18.2f}  {need.held / MEBI:11.1f}  {kept:>12}  "
            f"{need.most / MEBI:10.1f}  {size(need.limit):>8}  {ends(cut.names(stage))}"
        )
    lines.append(
        f"{schedule} simulated with them and free messages: a step's passes take "
        f"{1e3 * choice.seconds:.1f} ms, idle {choice.idle:.0%}"
    )
    return lines


def size(limit: float) -> str:
    """Write a limit in MiB.

    >>> size(3.5 * 2**30), size(float("inf"))
    ('3,584', 'any')
    """
    return "any" if limit == float("inf") else f"{limit / MEBI:,.0f}"


def ends(names: Sequence[str]) -> str:
    """Write the first and the last name.

    >>> ends(["a", "b", "c"]), ends(["a"]), ends([])
    ('a … c', 'a', '')
    """
    return " … ".join(dict.fromkeys([*names[:1], *names[-1:]]))
