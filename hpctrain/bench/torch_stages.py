"""torch's own pipelining, as its users take steps with it, for `bench pipeline`."""

from collections.abc import Callable

import torch
from torch import nn

from hpctrain.bench import emulated
from hpctrain.bench.stage_cases import Case
from hpctrain.pipeline import split
from hpctrain.pipeline.layers import Layers
from hpctrain.topology import Topology

TORCH = {
    "1f1b": ("Schedule1F1B", 1),
    "gpipe": ("ScheduleGPipe", 1),
    "zb": ("ScheduleInterleavedZeroBubble", 1),
    "interleaved": ("ScheduleInterleaved1F1B", 2),
    "zbv": ("ScheduleZBVZeroBubble", 2),
    "dualpipev": ("ScheduleDualPipeV", 2),
}
"""torch's schedules, and stages a rank."""
FOLDED = ("ScheduleZBVZeroBubble", "ScheduleDualPipeV")
"""Those whose second stages run back, from the last rank to the first."""


def torch_step(
    topology: Topology, case: Case, x: torch.Tensor, y: torch.Tensor, schedule: str, virtual: int = 1
) -> Callable[[], None]:
    """Take a step as users of torch's pipelining do, cut where ours is; `virtual` stages a rank."""
    from torch.distributed import pipelining

    torch.manual_seed(1)
    model = emulated.sleepers(whole=True) if case.sleeps else (case.peers or case.make)()
    total = virtual * topology.stages
    cut = split.cut(model, {"x": x[:1]}, False, total, [])
    assert isinstance(cut, Layers)
    numbers = list(range(topology.stage, total, topology.stages))
    if schedule in FOLDED:
        numbers[1] = total - 1 - topology.stage
    parts, stages = [], []
    for number in numbers:
        first, last = cut.ranges[number]
        parts.append(nn.Sequential(*[layer for _, layer in cut.layers[first:last]]))
        stages.append(pipelining.PipelineStage(parts[-1], number, total, torch.device("cpu")))
    given = stages[0] if schedule in ("Schedule1F1B", "ScheduleGPipe") else stages
    run = getattr(pipelining, schedule)(given, case.micro_batches, loss_fn=nn.functional.mse_loss)
    wanted = {"target": y, "losses": []} if total - 1 in numbers else {}
    inputs = (x,) if topology.stage == 0 else ()

    def step() -> None:
        for parameter in (p for part in parts for p in part.parameters()):
            parameter.grad = None
        run.step(*inputs, **wanted)

    return step
