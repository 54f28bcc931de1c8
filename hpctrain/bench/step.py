"""`hpctrain bench step`: whole training steps against DistributedDataParallel."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hpctrain.averaging.averager import Averager
from hpctrain.bench.measure import alternate, each, row
from hpctrain.gradient import StraightIntoPlace
from hpctrain.models.residual import ResidualNet
from hpctrain.models.unet import UNet
from hpctrain.topology import Topology

CONTENDERS = {
    "ours": "gradients straight into place, summed and stepped by AdamW through the node's memory",
    "ddp_fused": "DDP over Gloo, gradient_as_bucket_view, AdamW(fused=True)",
    "ddp_foreach": "the same with AdamW(foreach=True)",
    "limit": "forward and backward alone: nothing averaged, nothing stepped",
}
ROUNDS = 25


def mlp(*widths: int) -> nn.Module:
    """Linear layers with ReLU between."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Module:
    """A small residual-free CNN on 3 x 32 x 32 images."""
    widths = (3, 32, 64, 128)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(8, b), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 256), nn.ReLU(), nn.Linear(256, 10))


def transformer() -> nn.Module:
    """Four encoder layers of width 256 on sequences of 32."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


class Climate(nn.Module):
    """The `climate` recipe's model on its six fields, the first of which is the first guess."""

    def __init__(self) -> None:
        """Build it as the recipe does."""
        super().__init__()
        self.net = UNet((6, 72, 96), width=24, fold=2, dropout=0.1)

    def forward(self, fields: torch.Tensor) -> torch.Tensor:
        """Map (n, 6, 72, 96) to (n, 72, 96)."""
        return self.net(fields, fields[:, 0])  # type: ignore[no-any-return]


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "8M batch=16": (lambda: mlp(1024, 2048, 2048, 1024, 256), (16, 1024)),
    "8M batch=64": (lambda: mlp(1024, 2048, 2048, 1024, 256), (64, 1024)),
    "17M batch=16": (lambda: mlp(1024, 4096, 2048, 2048, 256), (16, 1024)),
    "17M batch=64": (lambda: mlp(1024, 4096, 2048, 2048, 256), (64, 1024)),
    "cnn batch=16": (cnn, (16, 3, 32, 32)),
    "transformer batch=8": (transformer, (8, 32, 256)),
    "climate batch=4": (Climate, (4, 6, 72, 96)),
    "digits batch=8": (lambda: ResidualNet(10), (8, 8, 8)),
}


def bench(
    topology: Topology, cases: list[str] | None = None, rounds: int | None = None
) -> list[dict[str, Any]]:
    """Measure every case. Collective."""
    return each(topology, cases or list(CASES), one_case, rounds)


def one_case(topology: Topology, case: str, rounds: int | None) -> dict[str, Any]:
    """Measure one model; the batch is each rank's."""
    comm = topology.comms.world
    make, shape = CASES[case]
    torch.manual_seed(comm.rank + 7)
    x = torch.randn(shape)
    models = []
    for _ in range(4):
        torch.manual_seed(1)
        models.append(make())
    size = sum(p.numel() for p in models[0].parameters())
    contenders = {
        "ours": our_step(topology, models[0], x),
        "ddp_fused": ddp_step(models[1], x, fused=True),
        "ddp_foreach": ddp_step(models[2], x, foreach=True),
        "limit": bare_step(models[3], x),
    }
    return row(case, comm.size, size * 4, alternate(comm, contenders, rounds or ROUNDS))


def our_step(topology: Topology, model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """Take a step as the engine does."""
    comm = topology.comms.data
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    averager = Averager(model, optimizer, comm, crowded=topology.crowded)
    straight = StraightIntoPlace(model, averager.places)

    def step() -> None:
        averager.begin([comm.rank])
        with straight.forward():
            loss = model(x).square().sum()
        with straight.accumulating():
            loss.backward()
        averager.joined(comm.rank, float(loss.detach()), float(len(x)))
        averager.step()

    while averager.overlap and not averager.overlap.choice.settled:
        step()  # the trial of ways to send between nodes is no part of a usual step
    return step


def ddp_step(model: nn.Module, x: torch.Tensor, **kind: bool) -> Callable[[], None]:
    """Take a step as DDP's users do."""
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    fused, foreach = kind.get("fused"), kind.get("foreach")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused, foreach=foreach)

    def step() -> None:
        optimizer.zero_grad()
        wrapped(x).square().mean().backward()
        optimizer.step()

    return step


def bare_step(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """Forward and backward, and nothing else."""

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        model(x).square().mean().backward()

    return step
