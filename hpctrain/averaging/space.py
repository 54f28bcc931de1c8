"""Where every gradient and weight lies: flat memory, one space for each dtype and device.

      space    │ head.weight │ pad │ head.bias │ pad │  body.weight │ pad │ …      units of their own
      shelves  └──────────── shelf 0 ───────────────┘ └─── shelf 1 ───────┘        25 MiB
      buckets  └─── bucket 0 ──┘└── bucket 1 ──┘└── bucket 2 ──┘                   whole units
      units    ├──────┼──────┼──────┼──────┼──────┼──────┼──────┼──────┤           1,024 numbers

Parameters are laid in reverse order, as backward is likely to finish them; on a shelf those of
one optimizer group stand together. Buckets are what is summed at once: the shelves, or smaller
cuts of them where a link asks for it. Where the numbers lie does not depend on that cut. The
same layout serves gradients, weights and optimizer state. A rank's share of a bucket is a run of
whole units, so that shares, and the sums of squares of the norm, do not depend on who computes
them; no unit holds two parameters, so they do not depend on what else is trained here either.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

ALIGNMENT = 64
"""Bytes: a cache line and the widest vector register; BLAS kernels choose their path by it."""

UNIT = 1024
"""Numbers: the smallest share of a rank, and what one partial sum of the norm covers."""

SHELF_BYTES = 25 << 20
"""Parameters that are laid together, those of one optimizer group side by side."""

WIRE = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    # a sum of 16-bit floats over many ranks would lose digits
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


@dataclass(frozen=True)
class Seat:
    """Where a parameter lies: numbers [start, start + numbers) of its space."""

    name: str
    index: int
    """Place among the trained parameters."""
    parameter: nn.Parameter
    group: int
    """The optimizer's parameter group."""
    start: int
    numbers: int
    """Real numbers: two for each complex element."""

    @property
    def stop(self) -> int:
        """End of the parameter; padding follows."""
        return self.start + self.numbers

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """See the parameter's part of the space with its shape and strides (autograd's contract)."""
        part = flat[self.start : self.stop]
        if self.parameter.is_complex():
            return torch.view_as_complex(part.view(*self.parameter.shape, 2))
        return part.as_strided(self.parameter.shape, torch.empty_like(self.parameter).stride())


@dataclass
class Space:
    """The parameters of one real dtype on one device."""

    dtype: torch.dtype
    device: torch.device
    seats: list[Seat] = field(default_factory=list)
    buckets: list[tuple[int, int]] = field(default_factory=list)
    size: int = 0
    """Numbers, padding included; whole units."""

    @property
    def wire(self) -> torch.dtype:
        """The dtype of sums."""
        return WIRE[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of one copy."""
        return self.size * self.dtype.itemsize

    def inside(self, start: int, stop: int) -> list[Seat]:
        """Give the parameters that have numbers in [start, stop)."""
        return [seat for seat in self.seats if seat.start < stop and seat.stop > start]

    def cut(self, limit_bytes: int) -> None:
        """Cut the space into buckets of whole units, of about `limit_bytes`; it holds all its parameters."""
        step = max(1, limit_bytes // self.dtype.itemsize // UNIT) * UNIT
        self.buckets = list(cut(0, self.size, step))

    def add(self, parameters: list[tuple[str, int, nn.Parameter, int]]) -> None:
        """Append a shelf, for now a bucket: (name, index, parameter, group) each."""
        begin = end = self.size
        for name, index, parameter, group in sorted(parameters, key=lambda entry: entry[3]):
            count = numbers(parameter)
            self.seats.append(Seat(name, index, parameter, group, end, count))
            end += up(count, UNIT)
        self.size = end
        self.buckets.append((begin, self.size))


def up(count: int, step: int) -> int:
    """Round up to a multiple.

    >>> up(5, 4), up(8, 4)
    (8, 8)
    """
    return -(-count // step) * step


def numbers(parameter: torch.Tensor) -> int:
    """Real numbers in a tensor: two for each complex element."""
    return parameter.numel() * (2 if parameter.is_complex() else 1)


def deal(named: Mapping[str, nn.Parameter], groups: Mapping[int, int], limit_bytes: int) -> list[Space]:
    """Deal parameters, in reverse order, into spaces and shelves of about `limit_bytes`.

    `groups` gives the optimizer group of a parameter by its id.
    """
    spaces: dict[tuple[torch.dtype, torch.device], Space] = {}
    waiting: dict[tuple[torch.dtype, torch.device], list[tuple[str, int, nn.Parameter, int]]] = {}
    for index, (name, parameter) in reversed(list(enumerate(named.items()))):
        dtype = parameter.dtype.to_real() if parameter.dtype.is_complex else parameter.dtype
        kind = (dtype, parameter.device)
        space = spaces.setdefault(kind, Space(*kind))
        bucket = waiting.setdefault(kind, [])
        size = sum(p.nbytes for _, _, p, _ in bucket)
        if bucket and size + parameter.nbytes > limit_bytes:
            space.add(bucket)
            bucket.clear()
        bucket.append((name, index, parameter, groups[id(parameter)]))
    for kind, bucket in waiting.items():
        spaces[kind].add(bucket)
    return list(spaces.values())


def deal_whole(spaces: list[Space], ranks: int) -> list[int]:
    """Deal whole parameters by size: the largest first, each to the rank with the least. Pure."""
    load = [0] * ranks
    seats = [seat for space in spaces for seat in space.seats]
    dealt = [0] * len(seats)
    for seat in sorted(seats, key=lambda s: (-s.numbers, s.index)):
        dealt[seat.index] = load.index(min(load))
        load[dealt[seat.index]] += seat.numbers
    return dealt


def aligned(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros of shape (count,) that begin on a cache line."""
    spare = ALIGNMENT // dtype.itemsize
    memory = torch.zeros(count + spare, dtype=dtype, device=device)
    skip = (-memory.data_ptr() % ALIGNMENT) // dtype.itemsize
    return memory[skip : skip + count]


def cut(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """Cut a range into blocks of at most `step`.

    >>> list(cut(0, 5, 2))
    [(0, 2), (2, 4), (4, 5)]
    """
    for at in range(start, stop, step):
        yield at, min(at + step, stop)
