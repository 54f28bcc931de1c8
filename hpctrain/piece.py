"""A piece of state: what every room with state offers, and all that checkpoints see.

tensor `model.conv.weight`, shape (4, 3)      flat elements   0 1 2 3 4 5 6 7 8 9 10 11
rank 0 holds [0, 6), rank 1 holds [6, 12)                     └── r0 ───┘ └─── r1 ────┘
"""

import math
from typing import Any, NamedTuple


class Piece(NamedTuple):
    """Elements [start, stop) of the flattened tensor `name`, whose whole shape is `shape`."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    tensor: Any
    """The live tensor of stop - start elements; loading copies into it."""


def whole(name: str, tensor: Any) -> Piece:
    """Make the piece that is a whole tensor."""
    shape = tuple(tensor.shape)
    return Piece(name, shape, 0, math.prod(shape), tensor)


def tensors_of(module: Any, keep_vars: bool = False) -> dict[str, Any]:
    """Weights and persistent buffers by name: a module's own state_dict may hold other things beside them.

    As they are with `keep_vars`, else without their graph. A module's own way of saving may not know that a
    stage has None for what others have, which only the first asks nothing of.
    """
    found = {name: v for name, v in module.state_dict(keep_vars=True).items() if hasattr(v, "detach")}
    return found if keep_vars else {name: value.detach() for name, value in found.items()}


def of_module(module: Any) -> list[Piece]:
    """Weights and persistent buffers of a module as whole pieces, a shared one once."""
    found, seen = [], set()
    for name, tensor in tensors_of(module, keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found.append(whole(f"model.{name}", tensor.detach()))
    return found
