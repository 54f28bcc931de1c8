"""Tensors and words that hang on a module where torch does not look: plain attributes, notes on tensors."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from hpctrain.tensors import tensors_in

OURS = {*vars(nn.Module())}
"""Attributes that torch keeps itself."""
ON_BUFFERS = vars(nn.Buffer(torch.empty(0))).keys()
"""Attributes that torch itself keeps on an nn.Buffer."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where torch keeps a user's hooks on modules."""


@lru_cache
def own() -> frozenset[str]:
    """Give the attributes that a parameter without memory has itself: loaded late, it loads much. Pure."""
    with FakeTensorMode():
        return frozenset(vars(nn.Parameter(torch.empty(0))))


def registered(module: nn.Module) -> dict[int, str]:
    """Give the names of parameters and buffers by their ids. Local."""
    return {id(t): name for name, t in [*module.named_parameters(), *module.named_buffers()]}


def plain(module: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """List the modules' plain attributes. Local."""
    for owner in module.modules():
        for name, value in list(vars(owner).items()):
            if name not in OURS:
                yield owner, name, value


def submodule(module: nn.Module, name: str) -> nn.Module:
    """Give a submodule by its name, which may be that of a method (`parameters`): not by attribute. Local."""
    for step in name.split(".") if name else ():
        found = module._modules[step]
        assert found is not None
        module = found
    return module


def has_hooks(module: nn.Module) -> bool:
    """Whether the user wants to be called with what a module gets or gives. Local."""
    return any(getattr(module, kind) for kind in HOOKS)


def notes_on(tensor: torch.Tensor) -> dict[str, Any]:
    """Give what was noted on a tensor (`weight.no_decay = True`, say). Local."""
    noted = vars(tensor)
    if isinstance(tensor, FakeTensor):
        return {name: value for name, value in noted.items() if name not in own()}
    return {**noted}


def hidden(module: nn.Module) -> list[torch.Tensor]:
    """List the tensors in plain attributes and in notes on parameters and buffers. Local."""
    values = [value for _, _, value in plain(module)]
    values += [notes_on(tensor) for tensor in [*module.parameters(), *module.buffers()]]
    return tensors_in(values)
