"""What modules keep in attributes of their own, and which of it a forward changes."""

from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

OWN = vars(nn.Module()).keys()
"""Attributes of every module."""
MOST_LEAVES = 100
"""Of a list or dictionary that is looked at."""


def changed_by(module: nn.Module, forward: Callable[[], Any]) -> list[str]:
    """Name the attributes that a forward changes: call it twice, as far as it goes. Local.

    Something that the first call makes and the second only uses is no change.
    """
    seen, alive = [plain_values(module)], list[Any]()  # a tensor's id is another's once it is gone
    for _ in range(2):
        alive += [dict(vars(m)) for m in module.modules()]
        try:
            forward()
        except Exception:
            break
        seen.append(plain_values(module))
    pairs = [(name, a[name], b.get(name)) for a, b in pairwise(seen) for name in a]
    return list(dict.fromkeys(name for name, before, after in pairs if before != after))


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
