"""Copies of modules without memory, by which a forward is looked at before it runs."""

import copy
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree

from hpctrain.errors import ConfigError
from hpctrain.hidden import notes_on

OTHERWISE = (
    "name by parallel.cuts the modules where stages are to begin (what has no cut inside runs as it is), "
    "make the model an nn.Sequential, or give it a method layers() that lists submodules which follow one "
    "another"
)
"""What to do about a forward that can't be written down."""


class UnwritableError(ConfigError):
    """A forward that operators can't say; what stands in the way."""


def skeleton(module: nn.Module, fake: FakeTensorMode) -> nn.Module:
    """Copy a module without its memory."""
    memo: dict[int, Any] = {}
    tensors = [*module.parameters(), *module.buffers()]
    for tensor in tensors:
        with fake:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        wanted = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if wanted else empty
    noted = [leaf for t in tensors for leaf in _pytree.tree_leaves(notes_on(t))]
    for tensor in (leaf for leaf in noted if isinstance(leaf, torch.Tensor) and id(leaf) not in memo):
        with fake:
            memo[id(tensor)] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    for tensor in tensors:
        vars(memo[id(tensor)]).update(copy.deepcopy(notes_on(tensor), memo))
    for value in (value for m in module.modules() for value in vars(m).values()):
        if isinstance(value, torch.Tensor) and value.grad_fn is not None:  # a hook computes it in each call
            with fake:
                memo[id(value)] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    try:
        twin = copy.deepcopy(module, memo)
    except (TypeError, NotImplementedError) as error:  # "cannot pickle …", "cannot access storage of …"
        raise UnwritableError(
            f"parallel.stages: {type(module).__name__} can't be copied to be written down ({error}): keep "
            f"such an object elsewhere, {OTHERWISE}"
        ) from error
    for norm in twin.modules():
        if isinstance(norm, _BatchNorm) and norm.momentum is None:
            norm.momentum = 0.1  # the module itself is run, whose plain mean no operator can say
    return twin


def address_of(tensor: torch.Tensor) -> int:
    """Give where a tensor's memory begins; 0 where it has none, or several (a sparse one). Local."""
    none = isinstance(tensor, FakeTensor) or tensor.layout is not torch.strided or not tensor.numel()
    return 0 if none else tensor.untyped_storage().data_ptr()
