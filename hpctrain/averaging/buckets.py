"""Gradients live in flat buckets as views, so a bucket is summed by one MPI call and no copy.

      bucket   │ head.bias │ pad │ head.weight      │ pad │ tail │     one dtype, 64-byte views
                    ▲                  ▲                     ▲
             parameter.grad     parameter.grad        weight, loss, flags

Parameters are laid in reverse order, as backward is likely to finish them.
"""

import math
from collections.abc import Iterable

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from torch import nn

ALIGNMENT = 64
"""Bytes: a cache line and the widest vector register; BLAS kernels choose their path by it."""

_WIRE = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    # MPI has no sum of 16-bit floats, and their sum over many ranks would lose digits.
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}


class Bucket:
    """Gradients of one dtype on one device, summed together over the replicas."""

    def __init__(self, parameters: list[nn.Parameter], tail: int = 0) -> None:
        """Lay out the parameters' gradients, zeros, and `tail` numbers behind them."""
        self.parameters = parameters
        first = parameters[0] if parameters else torch.empty(0)
        dtype = first.dtype.to_real() if first.dtype.is_complex else first.dtype
        self.wire = _WIRE[first.dtype]
        step = ALIGNMENT // dtype.itemsize
        self.offsets, end = [], 0
        for parameter in parameters:
            self.offsets.append(end)
            end += -(-numbers(parameter) // step) * step
        self.gradients = aligned(end + tail, dtype, first.device)
        self.tail = self.gradients[end:]
        self.body = self.gradients[:end]
        self.views = [
            view_of(parameter, self.gradients[at : at + numbers(parameter)])
            for parameter, at in zip(parameters, self.offsets)
        ]

    def attach(self) -> None:
        """Make each parameter's gradient its view."""
        for parameter, view in zip(self.parameters, self.views):
            parameter.grad = view

    def sum(self, comm: MPI.Intracomm) -> None:
        """Sum over the ranks in place, by one MPI Allreduce. Collective; the same bits on all."""
        if comm.size == 1:
            return
        direct = self.gradients.device.type == "cpu" and self.gradients.dtype == self.wire
        buffer = self.gradients if direct else self.gradients.to("cpu", self.wire)
        array: NDArray[np.floating] = buffer.numpy()
        comm.Allreduce(MPI.IN_PLACE, array, op=MPI.SUM)
        if not direct:
            self.gradients.copy_(buffer)


def numbers(parameter: torch.Tensor) -> int:
    """Real numbers in a tensor: two for each complex element."""
    return parameter.numel() * (2 if parameter.is_complex() else 1)


def aligned(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros of shape (count,) that begin on a cache line."""
    spare = ALIGNMENT // dtype.itemsize
    memory = torch.zeros(count + spare, dtype=dtype, device=device)
    skip = (-memory.data_ptr() % ALIGNMENT) // dtype.itemsize
    return memory[skip : skip + count]


def view_of(parameter: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    """View flat memory as the gradient of a parameter, with its strides (autograd's contract)."""
    if parameter.is_complex():
        return torch.view_as_complex(flat.view(*parameter.shape, 2))
    return flat.as_strided(parameter.shape, torch.empty_like(parameter).stride())


def fill(parameters: Iterable[nn.Parameter], limit_bytes: int, tail: int) -> list[Bucket]:
    """Deal parameters, in reverse order, into buckets of about `limit_bytes`.

    A bucket holds one dtype on one device. The tail goes into the last bucket of float32 or
    float64; where there is none it gets a bucket of its own.
    """
    kinds: dict[tuple[torch.dtype, torch.device], list[list[nn.Parameter]]] = {}
    for parameter in reversed(list(parameters)):
        groups = kinds.setdefault((parameter.dtype, parameter.device), [[]])
        size = sum(p.numel() * p.element_size() for p in groups[-1])
        if groups[-1] and size + parameter.numel() * parameter.element_size() > limit_bytes:
            groups.append([])
        groups[-1].append(parameter)
    groups_in_order = [group for groups in kinds.values() for group in groups]
    exact = [
        at for at, group in enumerate(groups_in_order) if group[0].dtype in (torch.float32, torch.float64)
    ]
    buckets = [
        Bucket(group, tail if exact and at == exact[-1] else 0) for at, group in enumerate(groups_in_order)
    ]
    return buckets if exact else [*buckets, Bucket([], tail)]


def tail_of(buckets: list[Bucket]) -> torch.Tensor:
    """Give the tail that one of the buckets carries."""
    return next(bucket.tail for bucket in reversed(buckets) if len(bucket.tail))


def digits(value: float) -> tuple[float, float, float]:
    """Cut a number into three that float32 sums well: multiples of 64, of 1/64, and the rest.

    Sums of sample counts are exact up to 2^30 samples and 4,096 ranks, though they travel in a
    float32 bucket; other numbers keep about 1e-9 absolute.

    >>> digits(100.0), digits(1.015625)
    ((64.0, 36.0, 0.0), (0.0, 1.015625, 0.0))
    """
    if not math.isfinite(value):
        return value, 0.0, 0.0
    high = math.floor(value / 64.0) * 64.0
    middle = math.floor((value - high) * 64.0) / 64.0
    return high, middle, value - high - middle
