"""What a forward changes where torch does not count it: through `.data`, by NumPy, in plain attributes.

In one process a micro-batch's backward runs before the next one's forward. In stages several are on their
way: what a later forward changes, an earlier one's backward may still need, and torch tells only of what it
counts.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hpctrain.pipeline.state import plain_values
from hpctrain.tensors import storage_of

MOST = 4096
"""Numbers of a tensor that are compared: of a larger one a sample."""
NORMS = "BatchNorm"
"""Operators that change running statistics so, and whose backward has them but uses those of the batch."""


class Unseen:
    """What a module holds before a forward."""

    def __init__(self, module: nn.Module) -> None:
        """Note it: numbers of parameters and buffers, and plain attributes. Local."""
        self._module = module
        self._attributes = plain_values(module)
        self._tensors = {
            name: (id(tensor), tensor._version, tensor.data_ptr(), sample(tensor))
            for name, tensor in tensors_of(module).items()
        }

    def attributes(self) -> tuple[list[str], bool]:
        """Name the plain attributes that have changed, and tell whether there are new ones. Local."""
        now, before = plain_values(self._module), self._attributes
        return [name for name, value in before.items() if now.get(name) != value], now.keys() > before.keys()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Give the parameters and buffers that have changed without torch's counting it. Local."""
        return {
            name: tensor
            for name, tensor in tensors_of(self._module).items()
            if name in self._tensors and changed(tensor, *self._tensors[name])
        }


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Give parameters and buffers, and what stands in the place of another stage's. Local."""
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for path, owner in module.named_modules():
        copies = {name: value for name, value in vars(owner).items() if isinstance(value, torch.Tensor)}
        own |= {f"{path}.{name}".lstrip("."): value for name, value in copies.items()}
    return {name: t for name, t in own.items() if t.layout == torch.strided and not t.is_quantized}


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """Copy some of a tensor's numbers, spread over it. Local."""
    flat = tensor.detach()
    while flat.numel() > MOST and flat.ndim:
        longest = max(range(flat.ndim), key=lambda at: flat.shape[at])
        flat = flat[(slice(None),) * longest + (slice(None, None, 2),)]
    return flat.clone()


def changed(tensor: torch.Tensor, name: int, version: int, at: int, numbers: torch.Tensor) -> bool:
    """Whether a tensor is the same one with other numbers or other memory, and nothing was counted. Local."""
    if id(tensor) != name or tensor._version != version:
        return False
    now = sample(tensor)
    if tensor.data_ptr() != at or now.shape != numbers.shape:
        return True
    return not bool(((now == numbers) | ((now != now) & (numbers != numbers))).all())


def needed(graphs: Iterable[torch.Tensor], tensors: dict[str, torch.Tensor]) -> str:
    """Name the first of some tensors that a backward from what forwards gave needs; "" if none. Local."""
    storages = {storage_of(tensor): name for name, tensor in tensors.items()}
    left: list[Any] = [value.grad_fn for value in graphs]
    seen = set[Any]()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [inner for inner, _ in node.next_functions]
        if NORMS in node.name():
            continue
        for saved in saved_by(node):
            if storage_of(saved) in storages:
                return storages[storage_of(saved)]
    return ""


def saved_by(node: Any) -> list[torch.Tensor]:
    """List the tensors that an operator keeps for its backward. Local."""
    names = [name for name in dir(node) if name.startswith("_saved_")] or ["saved_tensors"]
    found: list[torch.Tensor] = []
    for name in names:
        try:
            value = getattr(node, name, None)
        except RuntimeError:  # let go, or changed where torch counts it: it will say so itself
            continue
        several = value if isinstance(value, (list, tuple)) else [value]
        found += [one for one in several if isinstance(one, torch.Tensor)]
    return found
