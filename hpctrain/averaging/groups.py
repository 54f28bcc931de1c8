"""Parameter groups and the optimizer: no decay on biases and norms."""

import inspect
from typing import Any

import torch
from torch import nn

from hpctrain import construct
from hpctrain.config import ClassPath, Optimizer
from hpctrain.errors import ConfigError


def parameter_groups(module: nn.Module, decay_all: bool) -> list[dict[str, Any]]:
    """Cut the trained parameters into (decayed, not decayed); an empty group is left out.

    Not decayed are tensors of fewer than two dimensions: biases, scales of norms.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    if decay_all:
        return [{"params": trained}]
    decayed = [p for p in trained if p.ndim >= 2]
    rest = [p for p in trained if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def check(config: Optimizer) -> dict[str, Any]:
    """Check the optimizer's class path and arguments before anything starts; give them."""
    spec = ClassPath(config.class_path, config.init_args)
    factory = construct.find_class(config.class_path, "optimizer.class_path")
    if not (inspect.isclass(factory) and issubclass(factory, torch.optim.Optimizer)):
        raise ConfigError(f"optimizer.class_path = {config.class_path!r} is no torch optimizer")
    arguments = construct.check(spec, "optimizer", given=("params",))
    step = inspect.signature(getattr(factory, "step", lambda closure=None: None))
    closure = step.parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"optimizer.class_path = {config.class_path}: it needs a closure that computes the "
            f"loss again and again, which a step over many ranks can't give: take another"
        )
    return arguments


def state_copies(config: Optimizer) -> float:
    """Count the numbers that the optimizer keeps for each number of a weight. Local: steps a small one.

    Two, as Adam's, where it can't step that.
    """
    with torch.random.fork_rng(devices=[]):
        small = nn.Linear(16, 16, bias=False)
        optimizer = build(config, small)
        small.weight.grad = torch.ones_like(small.weight)
        try:
            optimizer.step()
        except Exception:
            return 2.0
    state = optimizer.state[small.weight].values()
    return sum(v.numel() for v in state if isinstance(v, torch.Tensor)) / small.weight.numel()


PROBED = 3
"""Steps, as the first one of many optimizers hangs on a gradient's sign alone."""
CLOSE = 0.01
"""Of a parameter's change: kernels may round it otherwise where others follow."""
SMALL = 0.01
"""Of a layer's usual weights: beside them small changes have digits enough."""


def crosses(config: Optimizer) -> bool:
    """Whether a parameter's step hangs on other parameters: a norm over all, say. Local: steps small ones.

    Then no rank may step a part of them by itself. False where it can't step such parameters.
    """

    def stepped(others: int) -> torch.Tensor:
        torch.manual_seed(0)
        rows = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(1 + others))
        for parameter in rows.parameters():
            parameter.detach().mul_(SMALL)
        first = next(rows.parameters()).detach()
        before = first.clone()
        optimizer = build(config, rows)
        for step in range(PROBED):
            for at, parameter in enumerate(rows.parameters()):
                parameter.grad = torch.linspace(-1.0, 2.0, 16).view(4, 4).roll(step) * 100.0**at
            optimizer.step()
        return first - before

    with torch.random.fork_rng(devices=[]):
        try:
            alone, among = stepped(0), stepped(1)
        except Exception:
            return False
    return bool((alone - among).abs().max() > CLOSE * alone.abs().max())


def build(config: Optimizer, module: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer over the module's trained parameters."""
    arguments = check(config)
    factory = construct.find_class(config.class_path, "optimizer.class_path")
    names = inspect.signature(factory).parameters
    plain = all(p.is_floating_point() for p in module.parameters())
    # SGD's kernel fails where some weights have no momentum yet: their first gradient came later
    every = plain and not arguments.get("momentum")
    if "fused" in names and "foreach" not in arguments and every:
        # one kernel over all parameters, the fastest on CPU and GPU alike
        arguments.setdefault("fused", True)
    decays = "weight_decay" in names
    groups = parameter_groups(module, config.decay_all or not decays)
    spec = ClassPath(config.class_path, config.init_args)
    found: torch.optim.Optimizer = construct.build(spec, "optimizer", groups, **arguments)
    return found
