import pytest
import torch
from helpers import Net, Wave
from torch import nn

from hpctrain.averaging import groups
from hpctrain.config import Optimizer
from hpctrain.errors import ConfigError


def test_no_decay_on_biases_and_norms():
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2))
    decayed, rest = groups.parameter_groups(module, decay_all=False)
    assert [p.ndim for p in decayed["params"]] == [4]
    assert [p.ndim for p in rest["params"]] == [1, 1, 1]
    assert rest["weight_decay"] == 0.0
    assert len(groups.parameter_groups(module, decay_all=True)) == 1
    assert len(groups.parameter_groups(nn.Linear(2, 2, bias=False), decay_all=False)) == 1


def test_built_optimizer_decays_only_the_matrices():
    module = Net(3, 2)
    optimizer = groups.build(Optimizer(init_args={"lr": 0.1, "weight_decay": 0.5}), module)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.5, 0.0]
    assert optimizer.param_groups[0]["fused"] is True


@pytest.mark.parametrize("nesterov", [True, False])
def test_a_weight_may_get_its_first_gradient_later(nesterov):
    """As an expert does that is rarely asked."""
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    arguments = {"lr": 0.1, "momentum": 0.9, "nesterov": nesterov}
    optimizer = groups.build(Optimizer("torch.optim.SGD", arguments), module)
    for used in (module[0], module):
        optimizer.zero_grad()
        used(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert all("momentum_buffer" in optimizer.state[p] for p in module.parameters())


@pytest.mark.parametrize(
    "path",
    ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "NAdam", "RAdam", "Adamax", "ASGD", "Rprop"],
)
def test_any_torch_optimizer_steps(path):
    module = Net(3, 2)
    optimizer = groups.build(Optimizer(f"torch.optim.{path}", {"lr": 0.01}), module)
    before = module.first.weight.detach().clone()
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(module.first.weight, before)
    assert not groups.crosses(Optimizer(f"torch.optim.{path}", {"lr": 0.01}))


class Normed(torch.optim.SGD):
    """Steps by the direction of the gradient over all parameters."""

    @torch.no_grad()
    def step(self, closure=None):
        every = [p for group in self.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(every, 1.0)
        return super().step(closure)


class ByPlace(torch.optim.SGD):
    """Steps later parameters less."""

    @torch.no_grad()
    def step(self, closure=None):
        for at, parameter in enumerate(p for group in self.param_groups for p in group["params"]):
            parameter.sub_(parameter.grad * 0.1 * 0.7**at)


class ByBiases(torch.optim.SGD):
    """Bounds the norm of what has one dimension."""

    @torch.no_grad()
    def step(self, closure=None):
        every = [p for group in self.param_groups for p in group["params"] if p.ndim == 1]
        if every:
            torch.nn.utils.clip_grad_norm_(every, 1.0)
        return super().step(closure)


class Noisy(torch.optim.SGD):
    """Adds a little noise."""

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in (p for group in self.param_groups for p in group["params"]):
            parameter.add_(1e-3 * torch.randn_like(parameter))
        return super().step(closure)


def test_what_steps_a_parameter_by_the_others_is_known():
    for rate in (0.1, 1e-7):
        assert groups.crosses(Optimizer("test_groups.Normed", {"lr": rate}))
    assert not groups.crosses(Optimizer("torch.optim.Adafactor", {"lr": 0.1}))
    assert not groups.crosses(Optimizer("torch.optim.Muon", {"lr": 0.1}))
    for kind in ("ByPlace", "ByBiases", "Noisy"):
        assert groups.crosses(Optimizer(f"test_groups.{kind}", {"lr": 0.1})), kind
    state = torch.get_rng_state()
    groups.crosses(Optimizer("torch.optim.SGD", {"lr": 0.1}))
    assert torch.equal(state, torch.get_rng_state())


def test_complex_parameters_get_no_fused_kernel():
    assert not groups.build(Optimizer(init_args={"lr": 0.1}), Wave(2, 2)).param_groups[0]["fused"]


@pytest.mark.parametrize(
    ("path", "arguments", "message"),
    [
        ("torch.optim.LBFGS", {"lr": 1.0}, "it needs a closure"),
        ("torch.optim.AdamW", {"lrr": 1.0}, r"optimizer.init_args.lrr: .* did you mean lr"),
        ("torch.nn.Linear", {"in_features": 1, "out_features": 1}, "is no torch optimizer"),
    ],
)
def test_what_is_no_optimizer_for_a_step(path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        groups.build(Optimizer(path, arguments), Net(3, 2))
