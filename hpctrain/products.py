"""The two products of a linear layer that make new tensors: y = x·Wᵀ + b, and g·W for x.

torch computes them with MKL, which lays the weight anew in each call: of few rows, as a micro-batch has,
that is a third of the time, and with several threads its split is worse at any number of rows. Where
the processor has AVX-512, oneDNN, which torch holds too, computes float32 here (`ours`): a rule of shapes
and machine alone, so that a run has the same bits in any layout.

oneDNN takes a weight as it stands, or laid before in blocks of 64 columns (`Packed`), which saves what laying
costs in every call, for twice the weight's memory. Both give the same bits but of a single row (seen at
24,000 shapes); for each number of rows that is looked at once, and the weight as it stands taken else.

    W: (out, in)     to y:  block b holds  [in][64]  of  Wᵀ[:, 64b : 64b+64]
                     to x:  block b holds [out][64]  of   W[:, 64b : 64b+64]
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

BLOCK = 64
"""Columns of a block of oneDNN's layout for AVX-512."""

REPAID = 6
"""Uses in a step from which laying a weight before them is repaid."""

LEAST = 2**18
"""Elements of a weight that is worth it."""

SAMPLED = 256
"""Elements of a weight that are looked at, about."""


def available() -> bool:
    """Whether oneDNN's products are there, and the processor is one on which they were measured. Local."""
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


AVAILABLE = available()
CPU = torch.device("cpu")


def allowed() -> bool:
    """Whether the user lets oneDNN compute, in full precision. Local."""
    return (
        AVAILABLE
        and bool(torch.backends.mkldnn.enabled)
        and torch.get_float32_matmul_precision() == "highest"
    )


def ours(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether oneDNN computes a product of such tensors, if it is allowed to. Pure.

    x: (rows…, in or out), weight: (out, in).
    """
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device == weight.device == CPU
        and weight.is_contiguous()
        and x.ndim > 1
        and x.numel() > 0
    )


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, packed: "Packed | None" = None
) -> torch.Tensor:
    """Give x·Wᵀ + b: x (..., in), weight (out, in), bias (out) to (..., out). Local.

    Like `to_input` it makes no graph: call it where gradients are off.
    """
    if not ours(x, weight) or (bias is not None and bias.dtype != x.dtype):
        return functional.linear(x, weight, bias)
    return _multiply(x, weight, bias, packed.y if packed else None, weight)


def to_input(g: torch.Tensor, weight: torch.Tensor, packed: "Packed | None" = None) -> torch.Tensor:
    """Give the gradient of x, g·W: g (..., out), weight (out, in) to (..., in). Local."""
    if not ours(g, weight):
        return torch.matmul(g, weight)
    return _multiply(g, weight.t(), None, packed.x if packed else None, weight)


def _multiply(
    x: torch.Tensor,
    standing: torch.Tensor,
    bias: torch.Tensor | None,
    laid: "Laid | None",
    weight: torch.Tensor,
) -> torch.Tensor:
    x = x.contiguous()
    rows = x.numel() // x.shape[-1]
    if laid is None or not laid.use(rows):
        found = _kernel(x, standing, bias)
    else:
        found = _kernel(x, laid.of(weight), bias)
        if rows not in laid.agrees:
            wanted = _kernel(x, standing, bias)
            laid.agrees[rows], found = torch.equal(found, wanted), wanted
    # of more than two dimensions it is a view, which a layer behind could not change in place
    return torch.ops.aten._unsafe_view(found, found.shape) if found._is_view() else found


def _kernel(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


class Laid:
    """A weight laid in blocks: anew where it changed since, and where it may have (`stale`).

    Changes that torch does not count (of `weight.data`) are looked for in a sample of the weight.
    """

    def __init__(self, weight: torch.Tensor, for_y: bool) -> None:
        """Lay a weight (out, in) for x·Wᵀ, or for g·W. Local.

        Raises NotImplementedError if this oneDNN lays it in another way than `_lay` does.
        """
        self.for_y = for_y
        self.agrees: dict[int, bool] = {}
        """Whether it gives the bits of the weight as it stands, by number of rows."""
        self._state: tuple[int, ...] = ()
        self._looked = self._sample = torch.empty(0)
        """The sample as it is and as it was."""
        self._used = False
        whole = weight.detach() if for_y else weight.detach().t().contiguous()
        self._laid = torch.ops.mkldnn._reorder_linear_weight(whole, None)
        size = torch.ops.mkldnn._nbytes(self._laid)
        if size != whole.numel() * whole.element_size():
            raise NotImplementedError
        memory = (ctypes.c_char * size).from_address(torch.ops.mkldnn.data_ptr(self._laid))  # kept by _laid
        self._blocks = torch.frombuffer(memory, dtype=torch.float32).view(-1, whole.shape[1], BLOCK)
        theirs = self._blocks.clone()
        self._lay(weight.detach())
        if not torch.equal(self._blocks, theirs):
            raise NotImplementedError

    def stale(self) -> None:
        """Note that the weight may be another one. Local."""
        self._state, self._used = (), False

    def use(self, rows: int) -> bool:
        """Tell whether to take it for a product of so many rows: not for the first after `stale`. Local.

        Another stage waits for that one; the next has the time to lay the weight.
        """
        first, self._used = not (self._used or self._state), True
        return self.agrees.get(rows, True) and not first

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """Give the weight as it is now, laid. Local."""
        state = weight._version, weight.data_ptr()
        if state != self._state or not torch.equal(self._looked, self._sample):
            self._looked = weight.detach().view(-1)[:: weight.numel() // SAMPLED | 1]
            self._lay(weight.detach())
            self._state, self._sample = state, self._looked.clone()
        return self._laid  # type: ignore[no-any-return]

    def _lay(self, weight: torch.Tensor) -> None:
        if self.for_y:
            for block, rows in zip(self._blocks, torch.split(weight, BLOCK)):
                block.copy_(rows.t())
        else:
            self._blocks.copy_(weight.view(len(weight), -1, BLOCK).transpose(0, 1))


@dataclass
class Packed:
    """A weight laid for both products."""

    y: Laid
    x: Laid

    @classmethod
    @torch.no_grad()
    def of(cls, weight: torch.Tensor) -> "Packed | None":
        """Lay a weight (out, in), or give None if this oneDNN lays it in another way. Local."""
        try:
            return cls(Laid(weight, True), Laid(weight, False))
        except NotImplementedError:
            return None


class Packs:
    """The weights of this rank that are laid in blocks: as many as are worth it and memory allows."""

    def __init__(self) -> None:
        """Lay nothing yet."""
        self._packed: dict[nn.Parameter, Packed | None] = {}
        self._left, self._repaid = -1.0, False
        """Bytes that more of them may take; negative before that is known."""

    @property
    def bytes(self) -> int:
        """Memory that they take."""
        return sum(2 * p.numel() * p.element_size() for p, packed in self._packed.items() if packed)

    def allow(self, room: float) -> None:
        """Let them take so many bytes, beside what they have. Local."""
        self._left = room

    def begin(self, micro_batches: int, waits: bool = False) -> None:
        """Start a step of so many micro-batches: weights are new. Local.

        `waits`: this rank waits for another's activations first, and has time to lay its weights.
        """
        self._repaid = micro_batches >= REPAID
        for parameter, packed in self._packed.items():
            for laid in (packed.y, packed.x) if packed else ():
                laid.stale()
                if waits and self._repaid:
                    laid.of(parameter)

    def get(self, parameter: nn.Parameter) -> Packed | None:
        """Give a weight laid in blocks, if this step's uses repay it. Local."""
        if not self._repaid or self._left < 0 or parameter.numel() < LEAST:
            return None
        if parameter not in self._packed:
            self._packed[parameter] = self._make(parameter)
        return self._packed[parameter]

    def _make(self, parameter: nn.Parameter) -> Packed | None:
        size = 2 * parameter.numel() * parameter.element_size()
        blocks = not (parameter.shape[0] % BLOCK or parameter.shape[1] % BLOCK)
        if not blocks or not ours(parameter, parameter) or size > self._left:
            return None
        try:
            packed = Packed.of(parameter)
        except RuntimeError:  # torch's word for memory that the system refuses
            self._left = 0.0
            return None
        self._left -= size if packed else 0.0
        return packed
