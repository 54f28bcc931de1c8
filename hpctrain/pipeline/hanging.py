"""What is computed from some tensors: followed operator by operator."""

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils import _pytree

from hpctrain.pipeline.holders import inside
from hpctrain.tensors import Looking, storage_of, tensors_in

NUMBER = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)
"""Operators that give a tensor's number."""
MOST_SAID = 16
"""Elements of a tensor whose numbers are said."""


class Hanging(Looking):
    """Follows what is computed from some tensors."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        """Begin with these."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages = {storage_of(tensor) for tensor in tensors}
        self.numbers = False
        """Whether a Python number was made of one."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, and note what hangs on what it gets."""
        given = tensors_in((args, kwargs))
        asks = func in NUMBER
        if asks and isinstance(given[0], FakeTensor):  # which has no number: any does
            found = torch.tensor(3.0 if given[0].is_floating_point() else 1, dtype=given[0].dtype).item()
        else:
            found = func(*args, **(kwargs or {}))
        if any(storage_of(tensor) in self.storages for tensor in given):
            changed = tensors_in(written_of(func, args, kwargs or {}))
            self.storages |= {storage_of(tensor) for tensor in [*tensors_in(found), *changed]}
            self.numbers |= asks
        else:  # its memory may have been another's
            self.storages -= {storage_of(tensor) for tensor in tensors_in(found)}
        return found

    def has(self, value: Any) -> bool:
        """Whether a value has a tensor that hangs on them. Local."""
        return any(storage_of(leaf) in self.storages for leaf in tensors_in(inside(value)))

    def may_have(self, value: Any) -> bool:
        """Whether a value has an array, or a number or a word while a number was made of one. Local."""
        kinds = (np.generic, bool, int, float, complex, str) if self.numbers else ()
        return any(isinstance(leaf, (np.ndarray, *kinds)) for leaf in _pytree.tree_leaves(inside(value)))


def written_of(function: Any, args: tuple[Any, ...], named: dict[str, Any]) -> list[Any]:
    """Give what an operator changes of what it is given. Pure."""
    schema = getattr(function, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    given = [*args, *(named.get(argument.name) for argument in schema.arguments[len(args) :])]
    pairs = zip(schema.arguments, given)
    return [value for argument, value in pairs if argument.alias_info and argument.alias_info.is_write]


class Listing(Hanging):  # type: ignore[no-untyped-call]
    """Lists every operator, too, with the shapes and numbers that it was given."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        """Begin with these."""
        super().__init__(tensors)
        self.made = list[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, and note it."""
        self.made.append(f"{func}({', '.join(map(said, _pytree.tree_leaves((args, kwargs))))})")
        return super().__torch_dispatch__(func, types, args, kwargs)

    def other(self, before: Sequence[str]) -> str:
        """Give the first operator that is another than in an earlier call; "" if there is none. Local."""
        pairs = zip_longest(self.made, before, fillvalue="nothing more")
        return next((f"{now} where it was {old}" for now, old in pairs if now != old), "")


def said(leaf: Any) -> str:
    """Say what an operator is given: a number, a tensor's shape, or what a small one holds. Pure."""
    if not isinstance(leaf, torch.Tensor):
        return str(leaf)
    plain = type(leaf) is torch.Tensor and leaf.is_cpu and leaf.layout is torch.strided
    if not plain or leaf.numel() > MOST_SAID:
        return str(tuple(leaf.shape))
    with unset_fake_temporarily():
        return str(leaf.tolist())
