"""What an operator tells of itself: what it changes, whether it looks at numbers, how much it makes. Pure."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree

from hpctrain.tensors import tensors_in

FILLS = {"uniform_", "normal_", "trunc_normal_", "random_", "exponential_"}
"""Operators that need nothing of what was there."""


def changed(function: Any, arguments: Any, named: Any) -> Iterator[torch.Tensor]:
    """Give the tensors that an operator writes to."""
    for at, declared in enumerate(function._schema.arguments):
        if declared.alias_info is not None and declared.alias_info.is_write:
            value = arguments[at] if at < len(arguments) else named.get(declared.name)
            yield from tensors_in(value)
    if function is torch.ops.aten.native_batch_norm.default and arguments[5]:  # it does not say so
        yield from tensors_in(arguments[3:5])


def looks(function: Any) -> bool:
    """Whether an operator says something of its tensors' numbers. Pure."""
    tags = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
    return bool(tags & {*function.tags}) or any(
        "Tensor" not in str(found.type) for found in function._schema.returns
    )


def most(tree: Any) -> float:
    """Give at least as many numbers as an operator makes of its arguments. Pure.

    >>> most(([30, 30], {})), most((0, 1e5, 0.5)), most((torch.ones(5), torch.ones(5), 1.0))
    (900, 200000.0, 5.0)
    >>> most((torch.ones(5), 7)), most(([torch.ones(5), torch.ones(7)],))
    (35, 35)
    """
    leaves = _pytree.tree_leaves(tree)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    numbers = [abs(leaf) for leaf in leaves if type(leaf) in (int, float) and leaf]
    if not tensors:  # as arange makes
        return math.prod(max(1.0, n, 1 / n if type(n) is float else 0) for n in numbers)
    sizes = {t.shape for t in tensors if t.numel() > 1}
    if len(sizes) < 2 and not any(type(n) is int for n in numbers):
        return float(max(t.numel() for t in tensors))
    return math.prod(max(1.0, n) for n in [*(t.numel() for t in tensors), *numbers])
