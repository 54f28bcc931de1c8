"""`hpctrain bench pipeline`: forward and backward of a step in stages, against torch's own pipelining.

ours          1F1B; one stage a rank
ours_…        GPipe, ZB-H1 and interleaved (two stages a rank), each strict; ours_fast ZB-H1 with weight
              gradients merged; ours_plain 1F1B, each tensor one MPI message
torch_1f1b    torch.distributed.pipelining, Schedule1F1B, over Gloo
torch_…       the same with ScheduleGPipe, and with two stages a rank ScheduleInterleaved1F1B and
              ScheduleInterleavedZeroBubble
alone         one process, the whole model, the same micro-batches; the other ranks idle
bubble        alone ÷ p times (m+p-1)/m: even stages, free messages, cores that do not disturb one another
limit         no communication: every stage runs its part on data of its own, times (m+p-1)/m
work          the same without the factor, what the slowest stage has to do: work ÷ seconds is utilisation

In the emulated cases layers sleep (`emulated.py`), GPipe, fast, plain and torch's zero bubble are left
out, work is known, and instead of the other bounds and alone stand

simulated_…   what the simulator expects of 1F1B, ZB-H1 and interleaved, messages taking no time

No optimizer and no averaging: they are measured by `bench step`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import nn

from hpctrain.averaging.averager import Averager
from hpctrain.batch import Batch
from hpctrain.bench import emulated
from hpctrain.bench.measure import alternate, each, row
from hpctrain.data import order
from hpctrain.data.loader import Step
from hpctrain.errors import ConfigError
from hpctrain.loss import SummedLoss
from hpctrain.pipeline import simulate, split
from hpctrain.pipeline.layers import Layers
from hpctrain.pipeline.pipeline import Pipeline, take_share
from hpctrain.pipeline.schedule import SEVERAL
from hpctrain.pipeline.transport import Transport
from hpctrain.staged import StagedEngine
from hpctrain.topology import Topology

ROUNDS = 9


def mlp() -> nn.Sequential:
    """Eight layers of 1,024."""
    layers: list[nn.Module] = []
    for _ in range(8):
        layers += [nn.Linear(1024, 1024), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def transformer() -> nn.Sequential:
    """Eight encoder layers of width 256."""
    return nn.Sequential(
        *[nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True) for _ in range(8)]
    )


def cnn() -> nn.Sequential:
    """Eight convolutions of 32 channels: activations of 2 MiB for a micro-batch of 4."""
    layers: list[nn.Module] = [nn.Conv2d(4, 32, 3, padding=1), nn.ReLU()]
    for _ in range(7):
        layers += [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class Case:
    """A model, its batch, and the number of micro-batches."""

    make: Callable[[], nn.Sequential]
    shape: tuple[int, ...]
    micro_batches: int

    @property
    def sleeps(self) -> bool:
        """Whether its layers sleep."""
        return self.make is emulated.sleepers


CASES = {
    "mlp m=8": Case(mlp, (512, 1024), 8),
    "mlp m=16": Case(mlp, (512, 1024), 16),
    "mlp m=32": Case(mlp, (512, 1024), 32),
    "transformer m=8": Case(transformer, (32, 32, 256), 8),
    "cnn m=8": Case(cnn, (32, 4, 64, 64), 8),
    "emulated m=8": Case(emulated.sleepers, (8, 16), 8),
}


def bench(topology: Topology, cases: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure every case, one stage a rank. Collective."""
    if topology.stages == 1:
        raise ConfigError("bench pipeline measures stages: start it on 2 ranks or more (mpirun -n 2)")
    return each(topology, cases or list(CASES), one_case)


def one_case(topology: Topology, name: str) -> dict[str, Any]:
    """Measure one model."""
    comm, case = topology.comms.world, CASES[name]
    emulated.slept.clear()
    torch.manual_seed(3)
    x = torch.randn(case.shape)
    with torch.no_grad():
        y = torch.randn_like(case.make()(x[:1])).expand(len(x), *[-1] * (x.ndim - 1)).contiguous()
    stages = {
        "ours": our_step(topology, case, x, y, "1f1b"),
        "ours_gpipe": our_step(topology, case, x, y, "gpipe"),
        "ours_zb": our_step(topology, case, x, y, "zb-h1"),
        "ours_fast": our_step(topology, case, x, y, "zb-h1", fast=True),
        "ours_plain": our_step(topology, case, x, y, "1f1b", plain=True),
    }
    if halves(topology, case):
        stages["ours_interleaved"] = our_step(topology, case, x, y, "interleaved")
    contenders = {
        **{name: step for name, (step, _) in stages.items()},
        "torch_1f1b": torch_step(topology, case, x, y, "Schedule1F1B"),
        "torch_gpipe": torch_step(topology, case, x, y, "ScheduleGPipe"),
    }
    if halves(topology, case):
        contenders["torch_interleaved"] = torch_step(topology, case, x, y, "ScheduleInterleaved1F1B", 2)
        contenders["torch_zb"] = torch_step(topology, case, x, y, "ScheduleInterleavedZeroBubble", 2)
    if case.sleeps:
        for left_out in ("ours_fast", "ours_plain", "ours_gpipe", "torch_gpipe", "torch_zb"):
            contenders.pop(left_out, None)
    else:
        contenders["alone"] = alone_step(topology, case, x, y)
        contenders["limit"] = limit_step(topology, stages["ours"][1], case, x)
    rounds = emulated.ROUNDS if case.sleeps else ROUNDS
    times = alternate(comm, contenders, rounds)
    bubble = (case.micro_batches + topology.stages - 1) / case.micro_batches
    if case.sleeps:
        stretch = emulated.stretched(comm)
        for ours, schedule in (("1f1b", "1f1b"), ("zb", "zb-h1"), ("interleaved", "interleaved")):
            if schedule not in SEVERAL or halves(topology, case):
                found = emulated.simulated(schedule, topology.stages, case.micro_batches, stretch)
                times[f"simulated_{ours}"] = [found.seconds] * rounds
        times["work"] = [emulated.work(topology.stages, case.micro_batches, stretch)] * rounds
    else:
        times["work"] = times["limit"]
        times["limit"] = [seconds * bubble for seconds in times["work"]]
        times["bubble"] = [seconds / topology.stages * bubble for seconds in times["alone"]]
    for _, engine in stages.values():
        engine.pipeline.close()
        engine.averager.close()
    size = sum(p.numel() for p in case.make().parameters())
    return row(name, comm.size, 4 * size, times)


def halves(topology: Topology, case: Case) -> bool:
    """Whether the model has two stages for each rank. Pure."""
    layers = sum(1 for layer in case.make() if next(layer.parameters(), None) is not None)
    return layers >= 2 * topology.stages


def our_step(
    topology: Topology,
    case: Case,
    x: torch.Tensor,
    y: torch.Tensor,
    schedule: str,
    fast: bool = False,
    plain: bool = False,
) -> tuple[Callable[[], None], StagedEngine]:
    """Run the engine's own program for a stage; gives the engine too."""
    torch.manual_seed(1)
    model = case.make()
    sizes = order.sizes(len(x), case.micro_batches)
    starts = np.cumsum([0, *sizes])
    virtual = 2 if schedule in SEVERAL else 1
    pieces = split.cut(model, {"x": x[: sizes[0]]}, False, virtual * topology.stages, [])
    take_share(model, pieces, topology.stage, topology.stages)
    kept = max(simulate.check(schedule, topology.stages, range(case.micro_batches), virtual=virtual).kept)
    pipeline = Pipeline(pieces, Transport(topology.comms.pipe, "cpu", plain), kept=kept)
    optimizer = torch.optim.SGD([{"params": list(model.parameters())}], lr=0.0)
    owners = [0] * case.micro_batches
    averager = Averager(model, optimizer, MPI.COMM_SELF, owners=owners, pipe=topology.comms.pipe)
    engine = StagedEngine(
        topology, model, SummedLoss(nn.MSELoss(reduction="none")), averager, ["x"], 0,
        pipeline=pipeline, schedule=schedule, fast=fast,
    )  # fmt: skip
    engine.settle()  # else each forward looks how much memory it adds, as in a run's first step
    if case.sleeps:
        engine.straight = emulated.Weights(virtual * topology.stages)  # type: ignore[assignment]
    batches = {
        v: Batch(np.arange(a, b), {"x": x[a:b]}, {"y": y[a:b]}) for v, (a, b) in enumerate(pairwise(starts))
    }
    step_data = Step(0, len(x), batches)

    def step() -> None:
        averager.begin(batches)
        failure = engine.run_passes(0, step_data, sizes, None)
        if failure is not None:
            raise failure
        engine.refresh()

    return step, engine


def torch_step(
    topology: Topology, case: Case, x: torch.Tensor, y: torch.Tensor, schedule: str, virtual: int = 1
) -> Callable[[], None]:
    """Take a step as users of torch's pipelining do, cut where ours is; `virtual` stages a rank."""
    from torch.distributed import pipelining

    torch.manual_seed(1)
    model = emulated.sleepers(whole=True) if case.sleeps else case.make()
    total = virtual * topology.stages
    cut = split.cut(model, {"x": x[:1]}, False, total, [])
    assert isinstance(cut, Layers)
    parts, stages = [], []
    for number in range(topology.stage, total, topology.stages):
        first, last = cut.ranges[number]
        parts.append(nn.Sequential(*[layer for _, layer in cut.layers[first:last]]))
        stages.append(pipelining.PipelineStage(parts[-1], number, total, torch.device("cpu")))
    given = stages if virtual > 1 else stages[0]
    run = getattr(pipelining, schedule)(given, case.micro_batches, loss_fn=nn.functional.mse_loss)
    ends = topology.stage == topology.stages - 1

    def step() -> None:
        for parameter in (p for part in parts for p in part.parameters()):
            parameter.grad = None
        if topology.stage == 0:
            run.step(x)
        elif ends:
            run.step(target=y, losses=[])
        else:
            run.step()

    return step


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


def limit_step(topology: Topology, engine: StagedEngine, case: Case, x: torch.Tensor) -> Callable[[], None]:
    """Run this rank's part on data of its own, gradients straight into place as in ours."""
    cut = engine.pipeline.cut
    assert isinstance(cut, Layers)
    first, last = cut.ranges[topology.stage]
    torch.manual_seed(1)
    with torch.no_grad():
        given = x
        for layer in case.make()[:first] if first else []:  # type: ignore[union-attr]
            given = layer(given)
    layers = [layer for _, layer in cut.layers[first:last]]
    leaves = [one.clone().requires_grad_(first > 0) for one in given.chunk(case.micro_batches)]

    def step() -> None:
        engine.averager.begin(range(case.micro_batches))
        engine.straight.begin(case.micro_batches)
        for leaf in leaves:
            value = leaf
            with engine.straight.forward():
                for layer in layers:
                    value = layer(value)
                total = value.square().sum()
            with engine.straight.accumulating():
                torch.autograd.backward(total)
            leaf.grad = None

    return step
