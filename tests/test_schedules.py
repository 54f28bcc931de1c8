"""LR schedules over a resume: the rates are those of a run that never stopped, for every scheduler."""

import json

import pytest
import torch
from helpers import Net
from mpi4py import MPI

from hpctrain.averaging import groups, schedules
from hpctrain.averaging.averager import Averager
from hpctrain.config import ClassPath, Config, Optimizer

STEPS = 12
KINDS = {
    "torch.optim.lr_scheduler.StepLR": {"step_size": 3},
    "torch.optim.lr_scheduler.MultiStepLR": {"milestones": [2, 7, 9]},
    "torch.optim.lr_scheduler.ConstantLR": {"factor": 0.5, "total_iters": 8},
    "torch.optim.lr_scheduler.LinearLR": {"total_iters": 8},
    "torch.optim.lr_scheduler.ExponentialLR": {"gamma": 0.9},
    "torch.optim.lr_scheduler.PolynomialLR": {"total_iters": 10},
    "torch.optim.lr_scheduler.CosineAnnealingLR": {},
    "torch.optim.lr_scheduler.CosineAnnealingWarmRestarts": {"T_0": 4},
    "torch.optim.lr_scheduler.CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3},
    "torch.optim.lr_scheduler.OneCycleLR": {"max_lr": 0.1},
    "hpctrain.learning_rate.WarmupCosine": {},
}


def make(kind, total=STEPS):
    config = Config(optimizer=Optimizer("torch.optim.SGD", {"lr": 0.1, "momentum": 0.9}))
    config.optimizer.schedule = ClassPath(kind, dict(KINDS[kind]))
    module = Net(2, 1)
    averager = Averager(module, groups.build(config.optimizer, module), MPI.COMM_SELF)
    return config, averager, schedules.build(config, averager, total)


def take(averager, scheduler, steps):
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in averager.optimizer.param_groups])
        averager.optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [1, 5, 8])
def test_a_resumed_schedule_is_the_whole_one(kind, stop):
    _, averager, scheduler = make(kind)
    whole = take(averager, scheduler, STEPS - 1)
    _, averager, scheduler = make(kind)
    first = take(averager, scheduler, stop)
    kept = json.loads(json.dumps({"averager": averager.scalars(), "scheduler": scheduler.state_dict()}))
    _, averager, scheduler = make(kind)
    averager.expect(kept["averager"], {})
    schedules.restore(scheduler, kept["scheduler"])
    rest = take(averager, scheduler, STEPS - 1 - stop)
    assert first + rest == whole


@pytest.mark.parametrize("kind", KINDS)
def test_with_another_total_it_goes_on_as_if_it_had_had_it(kind):
    _, averager, scheduler = make(kind, total=20)
    whole = take(averager, scheduler, 19)
    _, averager, scheduler = make(kind)
    take(averager, scheduler, 8)
    kept = json.loads(json.dumps(averager.scalars()))
    config, averager, _ = make(kind, total=20)
    averager.expect(kept, {})
    scheduler = schedules.replay(config, averager, 20, 8)
    rest = take(averager, scheduler, 11)
    assert torch.allclose(torch.tensor(rest), torch.tensor(whole[8:]))


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("SGD", {"momentum": 0.9}), ("SGD", {"momentum": 0.9, "nesterov": True}), ("Adam", {"amsgrad": True}),
        ("AdamW", {}), ("RMSprop", {"momentum": 0.9, "centered": True}), ("Adagrad", {}), ("Adadelta", {}),
        ("NAdam", {}), ("RAdam", {}), ("Adamax", {}), ("ASGD", {}), ("Rprop", {}),
    ],
)  # fmt: skip
def test_every_torch_optimizer_resumes_bit_for_bit(path, more):
    config = Optimizer(f"torch.optim.{path}", {"lr": 0.01, **more})

    def build():
        torch.manual_seed(3)
        module = Net(5, 2)
        return module, Averager(module, groups.build(config, module), MPI.COMM_SELF)

    def steps(module, averager, first, last):
        for number in range(first, last):
            averager.begin([0])
            torch.manual_seed(number)
            (module(torch.randn(3, 5)) ** 2).sum().backward()
            averager.joined(0, 1.0, 3.0)
            averager.step()

    module, averager = build()
    steps(module, averager, 0, 4)
    kept = {p.name: (p.shape, p.tensor.clone()) for p in averager.pieces()}
    scalars = json.loads(json.dumps(averager.scalars()))
    steps(module, averager, 4, 8)
    again, other = build()
    other.expect(scalars, {n: (s, str(t.dtype).removeprefix("torch.")) for n, (s, t) in kept.items()})
    for piece in other.pieces():
        piece.tensor.copy_(kept[piece.name][1].view(piece.tensor.shape))
    steps(again, other, 4, 8)
    for name, value in module.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
