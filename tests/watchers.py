"""Ways to see a tensor between two layers, or to change what they call."""

import functools

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hpctrain.pipeline.part import following


class Seeing(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), named=None):
        return function(*arguments, **(named or {}))


class Dispatching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        return function(*arguments, **(named or {}))


def passing(function):
    @functools.wraps(function)
    def passed(*arguments, **named):
        return function(*arguments, **named)

    return passed


def replaced(owner, name, value):
    """Put something into its place; gives what puts back what stood there."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before)


MODES = {
    "saved": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "function": Seeing,
    "dispatch": Dispatching,
    "followed": lambda: following([]),
    "anomaly": torch.autograd.detect_anomaly,
    "forward mode": lambda: torch.autograd.forward_ad.dual_level(),
    "no oneDNN": lambda: torch.backends.mkldnn.flags(enabled=False),
}
