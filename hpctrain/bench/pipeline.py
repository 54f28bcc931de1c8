"""`hpctrain bench pipeline`: forward and backward of a step in stages, against torch's own pipelining.

In the emulated cases layers sleep (`emulated.py`): GPipe, fast, plain, autograd, torch's zero bubbles, one
process and the bounds from it are left out; work is known, and the simulator says what it expects.

No optimizer and no averaging: they are measured by `bench step`.
"""

from collections.abc import Callable, Container
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import nn

from hpctrain.averaging.averager import Averager
from hpctrain.batch import Batch
from hpctrain.bench import emulated
from hpctrain.bench.autograd import Autograd
from hpctrain.bench.measure import alternate, each, row
from hpctrain.bench.stage_cases import CASES, Case, WithForward
from hpctrain.bench.torch_stages import TORCH, torch_step
from hpctrain.data import order
from hpctrain.data.loader import Step
from hpctrain.errors import ConfigError
from hpctrain.loss import SummedLoss
from hpctrain.pipeline import simulate, split
from hpctrain.pipeline.choice import Plan, Scales
from hpctrain.pipeline.layers import Layers
from hpctrain.pipeline.pipeline import Pipeline, take_share
from hpctrain.pipeline.profile import Limits
from hpctrain.pipeline.rows import run_all
from hpctrain.pipeline.schedule import CHOSEN, SEVERAL
from hpctrain.pipeline.transport import Transport
from hpctrain.report.passes import again, as_simulation
from hpctrain.report.timeline import on_one_clock
from hpctrain.staged import StagedEngine
from hpctrain.topology import Topology, usable_cores

CONTENDERS = {
    "ours": "the default: that of the next four which a job chooses by measurement",
    "ours_1f1b": "1F1B, one stage a rank",
    "ours_zb_h1": "ZB-H1: a backward in halves, weight gradients where a rank would wait",
    "ours_zb_h2": "ZB-H2: the same with twice the micro-batches on their way",
    "ours_interleaved": "interleaved 1F1B, two stages a rank",
    "ours_gpipe": "GPipe",
    "ours_zb_h1_fast": "ZB-H1 with parallel.gradients = fast: those of several micro-batches are merged",
    "ours_zb_h2_fast": "ZB-H2 with the same",
    "ours_1f1b_fast": "1F1B with the same",
    "ours_gpipe_fast": "GPipe with the same",
    "ours_interleaved_fast": "interleaved 1F1B with weight gradients merged",
    "ours_operators": "1F1B, cut between operators, as a model with a forward of its own is",
    "ours_plain": "1F1B, each tensor one MPI message",
    "ours_autograd": "1F1B, weight gradients left to torch",
    "torch_1f1b": "torch.distributed.pipelining over Gloo: Schedule1F1B",
    "torch_gpipe": "… ScheduleGPipe",
    "torch_zb": "… ScheduleInterleavedZeroBubble, one stage a rank",
    "torch_interleaved": "… ScheduleInterleaved1F1B, two stages a rank",
    "torch_zbv": "… ScheduleZBVZeroBubble, two stages a rank",
    "torch_dualpipev": "… ScheduleDualPipeV, two stages a rank",
    "alone": "one process of torch, the whole model, the same micro-batches; the other ranks idle",
    "limit": "no communication: every stage on data of its own, times (m+p-1)/m",
    "autograd_limit": "the same with weight gradients left to torch",
    "work": "what the slowest stage has to do (limit without the factor): work ÷ ms is utilisation",
    "bubble": "alone ÷ p times (m+p-1)/m: even stages, free messages, cores that do not disturb one another",
    "simulated_1f1b": "the simulator's 1F1B, messages taking no time",
    "simulated_zb_h1": "… ZB-H1",
    "simulated_zb_h2": "… ZB-H2",
    "simulated_interleaved": "… interleaved",
}
ROUNDS = 9

WATCHED = ("ours_1f1b", "ours_zb_h1")
"""Whose passes of a step are told."""

AWAKE = (
    *("ours_zb_h1_fast", "ours_zb_h2_fast", "ours_1f1b_fast", "ours_gpipe_fast", "ours_interleaved_fast"),
    *("ours_operators", "ours_plain", "ours_autograd", "ours_gpipe"),
    *("torch_gpipe", "torch_zb", "torch_zbv", "torch_dualpipev"),
)
"""Left out where layers sleep."""


def bench(
    topology: Topology, cases: list[str] | None = None, rounds: int | None = None
) -> list[dict[str, Any]]:
    """Measure every case, one stage a rank. Collective."""
    if topology.stages == 1:
        raise ConfigError("bench pipeline measures stages: start it on 2 ranks or more (mpirun -n 2)")
    return each(topology, cases or list(CASES), one_case, rounds)


def one_case(topology: Topology, name: str, rounds: int | None) -> dict[str, Any]:
    """Measure one model."""
    comm, case = topology.comms.world, CASES[name]
    emulated.slept.clear()
    torch.manual_seed(3)
    x = torch.randn(case.shape)
    with torch.no_grad():
        y = torch.randn_like(case.make()(x[:1])).expand(len(x), *[-1] * (x.ndim - 1)).contiguous()
    chosen, dear = ("", set[str]()) if case.sleeps else choice(topology, case, x)
    engines = our_steps(topology, case, x, y, dear)
    contenders = {engine: step for engine, (step, _) in engines.items()}
    for peer, (schedule, virtual) in TORCH.items():
        if virtual == 1 or case.halves(topology.stages):
            contenders[f"torch_{peer}"] = torch_step(topology, case, x, y, schedule, virtual)
    if case.sleeps:
        contenders = {who: step for who, step in contenders.items() if who not in AWAKE}
    else:
        contenders["alone"] = alone_step(topology, case, x, y)
        contenders["limit"] = limit_step(topology, engines["ours_1f1b"][1], case, x, y)
        contenders["autograd_limit"] = limit_step(topology, engines["ours_autograd"][1], case, x, y)
    times = alternate(comm, contenders, rounds or (emulated.ROUNDS if case.sleeps else ROUNDS))
    if case.sleeps:
        expected = simulated(topology, case)
        chosen = shortest({s: expected[f"simulated_{ending(s)}"][0] for s in scheduled(topology, case)})
        times |= expected
    else:
        bubble = (case.micro_batches + topology.stages - 1) / case.micro_batches
        times["work"] = times["limit"]
        for limit in ("limit", "autograd_limit"):
            times[limit] = [seconds * bubble for seconds in times[limit]]
        times["bubble"] = [seconds / topology.stages * bubble for seconds in times["alone"]]
    times["ours"] = times[f"ours_{ending(chosen)}"]
    passes = {who: passes_of(topology, *engines[who]) for who in WATCHED}
    for engine in {id(engine): engine for _, engine in engines.values()}.values():
        engine.pipeline.close()
        engine.averager.close()
    size = sum(p.numel() for p in case.make().parameters())
    return row(name, comm.size, 4 * size, times) | {"schedule": chosen, "passes": passes}


def passes_of(
    topology: Topology, step: Callable[[], None], engine: StagedEngine
) -> dict[str, list[dict[str, Any]]]:
    """Give the passes of one step as measured, and as simulated with their medians. Collective.

    Of each: the stage, the pass (F3 is the forward of micro-batch 3), and seconds from the step's first one.
    """
    engine.watch()
    topology.comms.pipe.Barrier()
    step()
    spans = on_one_clock(topology.comms.pipe, engine.unwatch())
    measured = as_simulation(topology.comms.pipe.allgather(spans))
    both = {"measured": measured, "simulated": again(engine.schedule, engine.pipeline, measured)}
    return {
        name: [
            {"stage": s.stage, "pass": str(s.instruction), "start": s.start, "end": s.end} for s in one.spans
        ]
        for name, one in both.items()
    }


def our_steps(
    topology: Topology, case: Case, x: torch.Tensor, y: torch.Tensor, dear: Container[str] = ()
) -> dict[str, tuple[Callable[[], None], StagedEngine]]:
    """Make all of ours, with their engines; `dear` as `choice` gives it."""
    by = partial(one_engine, topology, case, x, y)
    one = ("1f1b", "zb-h1", "zb-h2")
    found = {
        **by({f"ours_{ending(schedule)}": schedule for schedule in one}),
        **by({"ours_gpipe": "gpipe"}),
        **by({f"ours_{ending(schedule)}_fast": schedule for schedule in one}, fast=True),
        **by({"ours_gpipe_fast": "gpipe"}, fast=True),
        **by({"ours_plain": "1f1b"}, plain=True),
        **by({"ours_autograd": "1f1b"}),
    }
    if case.halves(topology.stages):
        found |= by({"ours_interleaved": "interleaved"})
        found |= by({"ours_interleaved_fast": "interleaved"}, fast=True)
    if not case.sleeps:
        found |= by({"ours_operators": "1f1b"}, make=lambda: WithForward(*case.make()))
        for _, engine in (made for who, made in found.items() if "fast" not in who):
            engine.straight.at_once(p for name, p in engine.module.named_parameters() if name in dear)
        found["ours_autograd"][1].straight = Autograd()  # type: ignore[assignment]
    return found


def ending(schedule: str) -> str:
    """Name a schedule as contenders' names end. Pure.

    >>> ending("zb-h1")
    'zb_h1'
    """
    return schedule.replace("-", "_")


def scheduled(topology: Topology, case: Case) -> list[str]:
    """List the schedules that a job of a case chooses from. Pure."""
    return [one for one in CHOSEN if one not in SEVERAL or case.halves(topology.stages)]


def shortest(seconds: dict[str, float]) -> str:
    """Name the schedule that a job would choose by simulated steps, given in the order of `CHOSEN`. Pure.

    >>> shortest({"1f1b": 100.0, "zb-h2": 99.5, "zb-h1": 98.0, "interleaved": 95.0})
    'zb-h1'
    """
    best = next(iter(seconds))
    for schedule, simulated in seconds.items():
        best = schedule if simulated * CHOSEN[schedule] < seconds[best] else best
    return best


def choice(topology: Topology, case: Case, x: torch.Tensor) -> tuple[str, set[str]]:
    """Measure a model as a job does. Collective.

    Gives the schedule it would choose, and the parameters whose gradients would wait in a step's last
    micro-batches alone.
    """
    stages, any_size = topology.stages, [float("inf")] * topology.stages
    module = case.make()
    pieces = split.write(module, {"x": x[: len(x) // case.micro_batches]}, False, stages)
    plans = []
    for schedule in scheduled(topology, case):
        virtual = 2 if schedule in SEVERAL else 1
        proof = simulate.check(schedule, stages, range(case.micro_batches), virtual=virtual)
        plans.append(Plan(schedule, virtual, proof.lives, CHOSEN[schedule]))
    turns = -(-topology.comms.world.size // len(usable_cores()))
    scales = Scales(
        topology.comms.world,
        [[rank] for rank in range(stages)],
        lambda: Limits(any_size, any_size, float("inf")),
        plans,
        case.micro_batches,
        copies=0.0,
        turn=(topology.world_rank % turns, turns),
    )
    pieces.place([], scales)
    return pieces.choice.schedule, pieces.at_once


def simulated(topology: Topology, case: Case) -> dict[str, list[float]]:
    """Say what the simulator expects where layers sleep, and the work of a stage. Collective."""
    found, stretch = {}, emulated.stretched(topology.comms.world)
    for schedule in scheduled(topology, case):
        expected = emulated.simulated(schedule, topology.stages, case.micro_batches, stretch)
        found[f"simulated_{ending(schedule)}"] = expected.seconds
    found["work"] = emulated.work(topology.stages, case.micro_batches, stretch)
    return {who: [seconds, seconds] for who, seconds in found.items()}


def one_engine(
    topology: Topology,
    case: Case,
    x: torch.Tensor,
    y: torch.Tensor,
    schedules: dict[str, str],
    fast: bool = False,
    plain: bool = False,
    make: Callable[[], nn.Sequential] | None = None,
) -> dict[str, tuple[Callable[[], None], StagedEngine]]:
    """Give the steps of some contenders by their schedules, and the engine that runs a stage for all of them.

    Which memory an engine gets makes some percent, as much as a schedule. Their ring is the largest's.
    """
    torch.manual_seed(1)
    model = (make or case.make)()
    sizes = order.sizes(len(x), case.micro_batches)
    starts = np.cumsum([0, *sizes])
    virtual = 2 if any(schedule in SEVERAL for schedule in schedules.values()) else 1
    pieces = split.cut(model, {"x": x[: sizes[0]]}, False, virtual * topology.stages, [])
    take_share(model, pieces, topology.stage, topology.stages)
    proofs = {
        schedule: simulate.check(schedule, topology.stages, range(case.micro_batches), virtual=virtual)
        for schedule in schedules.values()
    }
    kept = {schedule: max(proof.kept) for schedule, proof in proofs.items()}
    pipeline = Pipeline(pieces, Transport(topology.comms.pipe, "cpu", plain), kept=max(kept.values()))
    optimizer = torch.optim.SGD([{"params": list(model.parameters())}], lr=0.0)
    owners = [0] * case.micro_batches
    averager = Averager(model, optimizer, MPI.COMM_SELF, owners=owners, pipe=topology.comms.pipe)
    engine = StagedEngine(
        topology, model, SummedLoss(nn.MSELoss(reduction="none")), averager, ["x"], 0,
        pipeline=pipeline, fast=fast,
    )  # fmt: skip
    engine.settle()  # else each forward looks how much memory it adds, as in a run's first step
    if case.sleeps:
        engine.straight = emulated.Weights(virtual * topology.stages)  # type: ignore[assignment]
    batches = {  # read one by one in a job, into memory of their own
        v: Batch(np.arange(a, b), {"x": x[a:b].clone()}, {"y": y[a:b].clone()})
        for v, (a, b) in enumerate(pairwise(starts))
    }
    step_data = Step(0, len(x), batches)

    def step(schedule: str) -> None:
        engine.schedule, pipeline.kept = schedule, kept[schedule]
        averager.begin(batches)
        failure = engine.run_passes(0, step_data, sizes, None)
        if failure is not None:
            raise failure
        engine.refresh(every=False)

    return {who: (partial(step, schedule), engine) for who, schedule in schedules.items()}


def alone_step(topology: Topology, case: Case, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """Let rank 0 do all of it."""
    torch.manual_seed(1)
    model = case.make()

    def step() -> None:
        if topology.world_rank:
            return
        for parameter in model.parameters():
            parameter.grad = None
        for one, wanted in zip(x.chunk(case.micro_batches), y.chunk(case.micro_batches)):
            torch.autograd.backward(nn.functional.mse_loss(model(one), wanted))

    return step


def limit_step(
    topology: Topology, engine: StagedEngine, case: Case, x: torch.Tensor, y: torch.Tensor
) -> Callable[[], None]:
    """Run this rank's part on data of its own, gradients straight into place and the loss as in ours."""
    cut = engine.pipeline.cut
    assert isinstance(cut, Layers)
    first, _ = cut.ranges[topology.stage]
    torch.manual_seed(1)
    with torch.no_grad():
        given = x
        for layer in case.make()[:first] if first else []:  # type: ignore[union-attr]
            given = layer(given)
    leaves = [one.clone().requires_grad_(first > 0) for one in given.chunk(case.micro_batches)]
    targets = [Batch(np.arange(len(one)), {}, {"y": one}) for one in y.chunk(case.micro_batches)]
    is_last = topology.stage == topology.stages - 1
    gradient: torch.Tensor | None = None

    def step() -> None:
        engine.averager.begin(range(case.micro_batches))
        engine.straight.begin(case.micro_batches)
        nonlocal gradient
        for v, (leaf, target) in enumerate(zip(leaves, targets)):
            value = leaf
            with engine.straight.forward():
                value = run_all(cut.in_rows[topology.stage], lambda _, layer, given: layer(given), value)
            if is_last:
                value, _ = engine.loss(value, target)
            elif gradient is None or gradient.shape != value.shape:
                gradient = torch.full_like(value, 1e-3)
            with engine.straight.accumulating(v, whole=True):
                torch.autograd.backward(value, None if is_last else gradient)
            engine.straight.weights_of(v, last=v == case.micro_batches - 1)
            leaf.grad = None

    return step
