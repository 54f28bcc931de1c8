"""Bytes by their address: making tensors of them takes longer than copying them, where they are few."""

import ctypes
from typing import Any, NamedTuple

import torch

PARALLEL = 1 << 20
"""Bytes from which on all threads of a rank copy."""


class Raw(NamedTuple):
    """Bytes of a tensor."""

    at: int
    """Their address."""
    size: int
    holder: Any
    """What keeps them."""


def move(to: int, source: int, size: int) -> None:
    """Copy bytes from one address to another. Local."""
    if size < PARALLEL or torch.get_num_threads() == 1:
        ctypes.memmove(to, source, size)
    else:
        shown(to, size).copy_(shown(source, size))


def shown(at: int, size: int) -> torch.Tensor:
    """Give bytes at an address as a tensor, uint8 (size,), which does not keep them. Local."""
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer((ctypes.c_char * size).from_address(at), dtype=torch.uint8)
