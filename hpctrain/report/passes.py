"""What the passes of one step say: medians, the step simulated with them, other schedules, table and row.

simulated   every pass takes the median of its kind on its stage, messages take no time
expected    the same with the pieces' times that the cut was chosen by
others      the other schedules, simulated so
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from hpctrain.assemble import Job
from hpctrain.pipeline.choice import Choice
from hpctrain.pipeline.pipeline import Pipeline
from hpctrain.pipeline.profile import Work, cost_of
from hpctrain.pipeline.schedule import (
    SCHEDULES,
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Instruction,
    programs,
)
from hpctrain.pipeline.simulate import Cost, Simulation, Span, WireTime, simulate
from hpctrain.scales import stages_a_rank

MUCH = 2.0
"""Times as long as expected a step may take before that is explained."""


@dataclass
class Told:
    """What one rank says of its stages."""

    rank: int
    host: str
    modules: list[list[str]]
    """By stage: the first and the last, if it has any."""
    rows: list[list[str]]
    """By stage: the convolutions that are computed as rows."""
    parameters: list[int]
    """By stage."""
    spans: list[Span]


def as_simulation(ranks: list[list[Span]]) -> Simulation:
    """Take measured passes as a simulation's; the step begins with its first pass. Pure."""
    every = [span for spans in ranks for span in spans]
    first = min((span.start for span in every), default=0.0)
    moved = [Span(s.stage, s.instruction, s.start - first, s.end - first) for s in every]
    busy = [sum(span.end - span.start for span in spans) for spans in ranks]
    return Simulation(moved, [], busy)


def medians(found: Simulation) -> dict[tuple[int, str], float]:
    """Seconds of a pass by stage and kind. Pure."""
    grouped: dict[tuple[int, str], list[float]] = {}
    for span in found.spans:
        grouped.setdefault((span.stage, type(span.instruction).__name__), []).append(span.end - span.start)
    return {key: median(values) for key, values in grouped.items()}


def again(schedule: str, pipeline: Pipeline, measured: Simulation) -> Simulation:
    """Simulate the step with the measured passes. Local."""
    usual = medians(measured)
    return dry(schedule, pipeline, measured, lambda stage, i: usual[stage, type(i).__name__])


def expectation(job: Job, measured: Simulation) -> Simulation | None:
    """Simulate the step with the pieces' times that the cut was chosen by, if it was by times. Local."""
    assert job.pipeline is not None
    choice = job.pipeline.cut.choice
    if not choice.passes:
        return None
    usual = cost_of(choice.passes, every_program(job.schedule, job.pipeline, measured))
    return dry(job.schedule, job.pipeline, measured, usual, choice.wire)


def others(job: Job, measured: Simulation) -> dict[str, float]:
    """Seconds of a step by the other schedules, simulated with the measured passes. Local.

    A rank's passes take as long in all; interleaved is given even shares of them.
    """
    ranks = len(measured.busy)
    assert job.pipeline is not None
    usual, choice = medians(measured), job.pipeline.cut.choice
    mine, found = micro_batches(measured), {}
    for name in SCHEDULES:
        virtual = stages_a_rank(job.config, name)
        fits = choice.pieces >= virtual * ranks and not choice.shared
        if name == job.schedule or (virtual > 1 and not fits):
            continue
        works = [lengths_of(usual, range(r, job.pipeline.cut.stages, ranks), virtual) for r in range(ranks)]
        every = programs(name, ranks, mine, virtual)
        found[name] = simulate(every, cost_of(works * virtual, every)).seconds
    return found


def lengths_of(usual: dict[tuple[int, str], float], stages: Iterable[int], virtual: int) -> Work:
    """Give the work of one of so many even stages that have the work of `stages`, by their passes. Pure.

    Where a backward is not split, as that of stage 0 often is, its halves count.
    """
    forward = input_gradient = weight_gradient = 0.0
    for stage in stages:
        whole = usual.get((stage, Backward.__name__), 0.0) / 2
        forward += usual.get((stage, Forward.__name__), 0.0)
        input_gradient += usual.get((stage, BackwardInput.__name__), whole)
        weight_gradient += usual.get((stage, BackwardWeight.__name__), whole)
    return Work(forward, input_gradient, weight_gradient, 0).times(1.0 / virtual)


def dry(
    schedule: str, pipeline: Pipeline, measured: Simulation, cost: Cost, wire: WireTime | None = None
) -> Simulation:
    """Simulate the micro-batches of a measured step; messages take the time of a `wire`. Local."""
    links, back = pipeline.cut.links()
    return simulate(every_program(schedule, pipeline, measured), cost, links, wire, back)


def every_program(schedule: str, pipeline: Pipeline, measured: Simulation) -> list[list[Instruction]]:
    """Give the programs of this replica's ranks for the micro-batches of a measured step. Local."""
    return programs(schedule, pipeline.ranks, micro_batches(measured), pipeline.virtual)


def micro_batches(measured: Simulation) -> list[int]:
    """Give those that were run, in order. Pure."""
    return sorted({span.instruction.micro_batch for span in measured.spans})


def row(
    job: Job, ranks: list[Told], measured: Simulation, simulated: Simulation, expected: Simulation | None
) -> dict[str, Any]:
    """Give what the log's table says, as numbers. Pure."""
    usual = medians(measured)
    assert job.pipeline is not None
    choice = job.pipeline.cut.choice
    return {
        "schedule": job.schedule,
        "seconds": round(measured.seconds, 6),
        "simulated_seconds": round(simulated.seconds, 6),
        "expected_seconds": round(expected.seconds, 6) if expected else None,
        "other_seconds": {name: round(seconds, 6) for name, seconds in others(job, measured).items()},
        "bubble": round(measured.bubble, 4),
        "simulated_bubble": round(simulated.bubble, 4),
        "stages": [
            {
                "rank": told.rank,
                "host": told.host,
                "modules": told.modules[virtual],
                "rows": told.rows[virtual],
                "parameters": told.parameters[virtual],
                "pass_seconds": {
                    kind: round(value, 6) for (stage, kind), value in usual.items() if stage == at
                },
                "idle": round(1.0 - measured.busy[at % len(ranks)] / measured.seconds, 4),
                **expected_of(choice, at),
            }
            for at, virtual, told in in_order(ranks)
        ],
        "pieces": [
            {"begins": name, "weight_bytes": int(size), **costs(work)}
            for name, size, work in zip(choice.names, choice.weights, choice.works)
        ],
    }


def expected_of(choice: Choice, stage: int) -> dict[str, Any]:
    """Give what was expected of a stage before the run, if its pieces were measured. Pure."""
    if not choice.passes:
        return {}
    need = choice.needs[stage]
    limit = None if need.limit == math.inf else int(need.limit)
    memory = {"memory_bytes": int(need.most), "memory_limit_bytes": limit}
    return {"expected": {**costs(choice.passes[stage]), **memory}}


def costs(work: Work) -> dict[str, Any]:
    """Give what a micro-batch costs, for a row. Pure."""
    return {
        "forward_seconds": round(work.forward, 6),
        "input_gradient_seconds": round(work.input_gradient, 6),
        "weight_gradient_seconds": round(work.weight_gradient, 6),
        "kept_bytes": work.kept,
    }


def in_order(ranks: list[Told]) -> list[tuple[int, int, Told]]:
    """List the stages: number, which of its rank's, and what its rank says. Pure."""
    virtual = len(ranks[0].parameters)
    return [(v * len(ranks) + r, v, told) for v in range(virtual) for r, told in enumerate(ranks)]


def table(
    job: Job,
    step: int,
    ranks: list[Told],
    measured: Simulation,
    simulated: Simulation,
    expected: Simulation | None,
) -> list[str]:
    """Lines for the log: a row a stage, then the whole step. Pure."""
    usual, forward = medians(measured), Forward.__name__
    lines = ["stage  rank  parameters  forward ms  backward ms  idle  modules"]
    for at, virtual, told in in_order(ranks):
        back = sum(value for (stage, kind), value in usual.items() if stage == at and kind != forward)
        idle = 1.0 - measured.busy[at % len(ranks)] / measured.seconds
        there = usual.get((at, forward), 0.0)
        where = f"{' … '.join(told.modules[virtual])} on {told.host}"
        lines.append(
            f"{at:5}  {told.rank:4}  {told.parameters[virtual]:10,}  {1e3 * there:10.2f}  "
            f"{1e3 * back:11.2f}  {idle:4.0%}  {where}"
        )
    rows = [f"stage {at} {', '.join(told.rows[v])}" for at, v, told in in_order(ranks) if told.rows[v]]
    if rows:
        lines.append(f"layers that run as one: {'; '.join(rows)}")
    lines.append(
        f"the passes of step {step} took {1e3 * measured.seconds:.1f} ms, idle {measured.bubble:.0%}; "
        f"{job.schedule} simulated with these passes and free messages "
        f"{1e3 * simulated.seconds:.1f} ms, idle {simulated.bubble:.0%}"
    )
    by = sorted(others(job, measured).items(), key=lambda pair: pair[1])
    lines.append("other schedules, simulated so: " + ", ".join(f"{n} {1e3 * s:.1f} ms" for n, s in by))
    if expected:
        alone = "; the ranks share cores, and take longer" if job.topology.crowded else ""
        if not alone and measured.seconds > MUCH * expected.seconds:
            alone = (
                f": the step took {measured.seconds / expected.seconds:.1f} times as long, as other work on "
                f"the cores makes it, or passes so short that what is around them counts"
            )
        lines.append(
            f"expected before the cut, from pieces measured alone: {1e3 * expected.seconds:.1f} ms, "
            f"idle {expected.bubble:.0%}{alone}"
        )
    return lines
