"""What modules keep in attributes of their own, and which of it a forward changes."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree

from hpctrain.pipeline.hanging import Listing
from hpctrain.pipeline.holders import inside
from hpctrain.tensors import storage_of, tensors_in, with_tensors

OWN = vars(nn.Module()).keys()
"""Attributes of every module."""
MOST_LEAVES = 100
"""Of a list or dictionary that is looked at."""


def changed_by(
    module: nn.Module, forward: Callable[[], Any], data: Sequence[torch.Tensor] = ()
) -> tuple[list[str], list[str], str]:
    """Name the attributes that a forward changes, and those by which a later one computes. Local.

    It is called three times, as far as it goes. Something that the first call makes and the second only uses
    is no change; what hangs on the data or the weights is something to compute by, where it comes from an
    earlier call. `data` is what each call makes its own copies of: what is kept of the first is not the
    second's. Says, too, which operator of the third call is another than in the second, if one is: the first
    may have made tables.
    """
    own = [*module.parameters(), *module.buffers()]
    weights = {storage_of(tensor) for tensor in own}
    seen, alive = [plain_values(module)], list[Any]()  # a tensor's id is another's once it is gone
    kept, computes, made, other = dict[str, list[torch.Tensor]](), list[str](), list[str](), ""
    for turn in range(3):
        alive += [dict(vars(m)) for m in module.modules()]
        before = [*own, *data] if not turn else [tensor for tensors in kept.values() for tensor in tensors]
        try:
            with Listing(before) as hanging:
                found = forward()
        except Exception:
            break
        if turn == 2:
            other = hanging.other(made)
            break
        seen.append(plain_values(module))
        if turn:
            computes, made = [*kept] if hanging.has(found) else [], hanging.made
            continue
        for owner, name, value in plain_of(module):
            tensors = [t for t in tensors_in(inside(value)) if storage_of(t) not in weights]
            if hanging.has(tensors):
                kept[f"{owner}.{name}".lstrip(".")] = [t for t in tensors if hanging.has(t)]
    pairs = [(name, a[name], b.get(name)) for a, b in pairwise(seen) for name in a]
    return list(dict.fromkeys(name for name, before, after in pairs if before != after)), computes, other


def without_memory(module: nn.Module, fake: FakeTensorMode) -> None:
    """Let what modules keep in plain attributes have no memory, as their weights. Local."""
    for _, name, value in [*plain_of(module)]:
        if any(not isinstance(tensor, FakeTensor) for tensor in tensors_in(value)):
            for m in module.modules():
                if vars(m).get(name) is value:
                    vars(m)[name] = with_tensors(fake.from_tensor, value)


def plain_of(module: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """List the modules' plain attributes, with what the modules are called. Local."""
    for path, owner in module.named_modules():
        for name, value in list(vars(owner).items()):
            if name not in OWN:
                yield path, name, value


def plain_values(module: nn.Module) -> dict[str, Any]:
    """Give what tells the modules' own attributes from other ones, by name, where `plain` can. Local."""
    return {
        f"{name}.{key}".lstrip("."): plain(value)
        for name, m in module.named_modules()
        for key, value in vars(m).items()
        if key not in OWN
        and plain(value) is not None
        and not (isinstance(value, torch.Tensor) and m._forward_pre_hooks)  # as old weight_norm's
    }


def plain(value: Any) -> Any:
    """Give what tells one plain value from another, None for other values. Local.

    >>> plain(3), plain(float("nan")), plain({"n": [1, 2]}), plain(nn.Identity())
    ('3', 'nan', "{'n': [1, 2]}", None)
    """
    if isinstance(value, (bool, int, float, str)):
        return repr(value)  # that of not a number is itself
    if isinstance(value, torch.Tensor):
        return id(value), value._version
    if isinstance(value, (list, tuple, dict, set, deque)) and len(value) <= MOST_LEAVES:
        leaves = [*value] if isinstance(value, set) else _pytree.tree_leaves(value)
        if all(isinstance(leaf, (bool, int, float, str, torch.Tensor)) for leaf in leaves):
            return repr(_pytree.tree_map_only(torch.Tensor, id, value))
    return None
