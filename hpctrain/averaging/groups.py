"""Parameter groups and the optimizer: no decay on biases and norms."""

import inspect
from collections.abc import Sequence
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


PROBED = 12
"""Steps, as the first ones of many optimizers hang on little."""
CLOSE = 1e-4
"""Of a parameter's change: kernels may round it otherwise where others follow."""
SMALL = 0.01
"""Of a layer's usual weights: beside them small changes have digits enough."""
SHAPES = ((4, 4), (4,), (3, 5), (6,)), ((4, 4), (3, 5), (6, 2))
"""Of the parameters that are stepped; those of some optimizers have two dimensions."""


def crosses(config: Optimizer) -> bool:
    """Whether a parameter's step hangs on other parameters: a norm over all, say. Local: steps small ones.

    Then no rank may step a part of them by itself. So it is with random numbers that it draws. False where it
    can't step such parameters.
    """

    def changes(shapes: Sequence[tuple[int, ...]], only: int | None = None) -> list[torch.Tensor]:
        torch.manual_seed(0)
        made = [SMALL * (torch.rand(shape) - 0.5) for shape in shapes]
        kept = [nn.Parameter(made[at]) for at in range(len(shapes)) if only in (None, at)]
        before = [parameter.detach().clone() for parameter in kept]
        optimizer = build(config, nn.ParameterList(kept))
        for step in range(PROBED):
            for number, parameter in zip(range(len(shapes)) if only is None else [only], kept):
                wave = torch.linspace(-1.0, 2.0, parameter.numel()).roll(step).view(parameter.shape)
                parameter.grad = wave * 100.0**number
            optimizer.step()
        return [parameter.detach() - old for parameter, old in zip(kept, before)]

    with torch.random.fork_rng(devices=[]):
        for shapes in SHAPES:
            try:
                among = changes(shapes)
                alone = [changes(shapes, at)[0] for at in range(len(shapes))]
            except Exception:
                continue
            digits = 8 * torch.finfo(torch.float32).eps * SMALL
            return any(
                bool((a - b).abs().max() > CLOSE * b.abs().max() + digits) for a, b in zip(among, alone)
            )
    return False


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
