"""Stages that sleep instead of computing, so that more stages than cores can be judged.

Forward, the gradient of the input and that of the weights take LAYER seconds a layer each. What is
measured beside the simulation is the schedule, the transport and all that runs around the passes. A
layer takes a little longer than asked (a timer's slack, its own call), so the simulation takes its
measured length.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mpi4py import MPI
from torch import nn

from hpctrain.bench.autograd import Autograd
from hpctrain.pipeline.schedule import SEVERAL, Backward, Instruction, programs
from hpctrain.pipeline.simulate import Simulation, simulate

LAYER = 30e-3
ROUNDS = 5
LAYERS = 8
slept: list[float] = []
"""How many times longer than asked each layer's pass on this rank was."""


@contextmanager
def noting() -> Iterator[None]:
    """Note how long a layer's pass took. Local."""
    began = time.perf_counter()
    yield
    slept.append((time.perf_counter() - began) / LAYER)


def nap() -> None:
    """Sleep for one pass, and note how long it was. Local."""
    with noting():
        time.sleep(LAYER)


class _Sleep(torch.autograd.Function):
    """Sleeps on both ways; the gradient of the weights is `Weights`'."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, whole: bool) -> torch.Tensor:
        ctx.whole = whole
        time.sleep(LAYER)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        for _ in range(1 + ctx.whole):
            nap()
        return gradient, None, None


class Sleeper(nn.Module):
    """A layer that sleeps; `whole`: its backward is not split."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.whole, self.weight = whole, nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Give what came."""
        with noting():  # with what torch does for a function of Python's
            return _Sleep.apply(x, self.weight, self.whole)  # type: ignore[no-untyped-call, no-any-return]


def sleepers(whole: bool = False) -> nn.Sequential:
    """Make a model of LAYERS layers."""
    return nn.Sequential(*[Sleeper(whole) for _ in range(LAYERS)])


class Weights(Autograd):
    """Stands for what computes weight gradients: it sleeps as long as the layers of a stage would."""

    def __init__(self, stages: int) -> None:
        """Take the number of stages."""
        self.layers = LAYERS // stages

    def weights_of(self, micro_batch: int, last: bool) -> None:
        """Sleep for the weights."""
        for _ in range(self.layers):
            nap()


def stretched(comm: MPI.Intracomm) -> float:
    """Give how many times longer than asked the passes were, the mean over all ranks. Collective."""
    return float(comm.allreduce(statistics.fmean(slept))) / comm.size


def simulated(schedule: str, stages: int, micro_batches: int, stretch: float) -> Simulation:
    """Say what the simulator expects of a step with such sleeps; messages take no time there."""
    virtual = 2 if schedule in SEVERAL else 1
    one = LAYER * (LAYERS // (virtual * stages)) * stretch

    def cost(stage: int, instruction: Instruction) -> float:
        return 2 * one if isinstance(instruction, Backward) else one

    return simulate(programs(schedule, stages, range(micro_batches), virtual), cost)


def work(stages: int, micro_batches: int, stretch: float) -> float:
    """Seconds of work of one stage in a step."""
    return 3 * micro_batches * LAYER * (LAYERS // stages) * stretch
