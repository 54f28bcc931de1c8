"""The two products of a linear layer that make new tensors: y = x·Wᵀ + b, and g·W for x.

torch computes them with MKL, which lays the weight anew in each call: of few rows, as a micro-batch has,
that is a third of the time, and with several threads its split is worse at any number of rows. Where
the processor has AVX-512, and is not one of Intel's, oneDNN, which torch holds too, computes float32 here
(`ours`): a rule of shapes and machine alone, so that a run has the same bits in any layout. On Intel's, MKL
takes as long, with one thread and with two, its calls less, and laying weights gains nothing. But there x·Wᵀ
of few rows takes a quarter longer than (W·xᵀ)ᵀ, in which MKL finds the weight as it lies (`turned`).

oneDNN takes a weight as it stands, or laid before in blocks of 64 columns (`Laid`), which saves what laying
costs in every call, for the weight's memory once more for each product. Both give the same bits but of a
single row (seen at 24,000 shapes). Made-up numbers of each number of rows are multiplied both ways first:
where the bits differ, or laying takes longer than a step's products gain, the weight is taken as it stands.

    W: (out, in)     to y:  block b holds  [in][64]  of  Wᵀ[:, 64b : 64b+64]
                     to x:  block b holds [out][64]  of   W[:, 64b : 64b+64]
"""

import ctypes
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional

from hpctrain.processor import about

BLOCK = 64
"""Columns of a block of oneDNN's layout for AVX-512."""

REPAID = 6
"""Uses in a step from which laying a weight before them is repaid."""

TIMED = 3
"""How often it is measured what laying a weight gains."""

SAMPLED = 256
"""Elements of a weight that are looked at, about."""


def there() -> bool:
    """Whether torch has oneDNN's products, and the processor the vectors that `BLOCK` is meant for. Local."""
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def gains() -> bool:
    """Whether they were measured to be faster than MKL's on such a processor. Local."""
    return about("vendor_id") != "GenuineIntel"


AVAILABLE = there() and gains()
TURNS = there() and not gains()
"""Whether MKL computes, on a processor on which `turned` was measured."""
FEW = range(8, 49)
"""Rows of which it gains, where a row is WIDE."""
WIDE = 512
CPU = torch.device("cpu")


def allowed() -> bool:
    """Whether oneDNN may compute products: it is known here, and the user lets it. Local."""
    return AVAILABLE and permitted()


def permitted() -> bool:
    """Whether the user lets oneDNN compute, in full precision. Local."""
    try:
        full = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set in torch's newer way, which the older one can't name
        return False
    return full and bool(torch.backends.mkldnn.enabled)


def ours(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether oneDNN computes a product of such tensors, if it is allowed to. Pure.

    x: (rows…, in or out), weight: (out, in).
    """
    return (
        x.dtype is torch.float32
        and weight.dtype is torch.float32
        and x.is_cpu
        and weight.is_cpu
        and weight.is_contiguous()
        and x.ndim > 1
        and x.numel() > 0
    )


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, laid: "Laid | None" = None
) -> torch.Tensor:
    """Give x·Wᵀ + b: x (..., in), weight (out, in), bias (out) to (..., out). Local.

    Like `to_input` it makes no graph: call it where gradients are off.
    """
    plain = bias is None or (
        bias.dtype is torch.float32
        and bias.ndim == 1
        and bias.size(0) == weight.size(0)
        and bias.is_contiguous()
    )
    if not ours(x, weight) or not plain or x.size(-1) != weight.size(1):
        return functional.linear(x, weight, bias)
    return _multiply(x, weight, True, bias, laid)


def turned(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """Give x·Wᵀ + b as (W·xᵀ)ᵀ + b where that is faster by MKL; else None: a rule of shapes. Local.

    x (..., in), weight (out, in), bias (out) to (..., out); no graph is made of it.
    """
    if not TURNS or weight.size(1) < WIDE or not ours(x, weight):
        return None
    rows = x.reshape(-1, x.size(-1))
    if len(rows) not in FEW or rows.size(1) != weight.size(1):
        return None
    if bias is not None and (bias.dtype is not torch.float32 or bias.shape != weight.shape[:1]):
        return None
    found = torch.mm(weight, rows.t()).t().contiguous()
    if bias is not None:
        found += bias
    return found if x.ndim == 2 else found.view(*x.shape[:-1], -1)


def to_input(g: torch.Tensor, weight: torch.Tensor, laid: "Laid | None" = None) -> torch.Tensor:
    """Give the gradient of x, g·W: g (..., out), weight (out, in) to (..., in). Local."""
    if not ours(g, weight):
        return torch.matmul(g, weight)
    return _multiply(g, weight, False, None, laid)


def _multiply(
    x: torch.Tensor, weight: torch.Tensor, for_y: bool, bias: torch.Tensor | None, laid: "Laid | None"
) -> torch.Tensor:
    x = x.contiguous()
    rows = x.size(0) if x.ndim == 2 else x.numel() // x.size(-1)
    if laid is not None and laid.use(rows, weight, bias):
        return _kernel(x, laid.of(weight), bias)
    return _kernel(x, weight if for_y else weight.t(), bias)


def _kernel(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


Asked = tuple[tuple[int, ...], bool, int, bool]
"""Shape of the weight, whether to y, number of rows, whether without a bias."""
Gains = dict[Asked, tuple[float, float]]
"""Seconds that a laid weight saves a product, none where its bits are others; seconds to lay it."""


class Laid:
    """A weight laid in blocks: anew where it changed since, and where it may have (`stale`).

    Changes that torch does not count (of `weight.data`) are looked for in a sample of the weight.
    """

    def __init__(self, weight: torch.Tensor, for_y: bool, gains: "Gains | None" = None) -> None:
        """Make room for a weight (out, in), laid for x·Wᵀ or for g·W. Local.

        `gains`: what was measured of other weights, and will be of this one. Raises NotImplementedError if
        this oneDNN lays weights in another way than `_lay` does, looked at with numbers that differ.
        """
        self.for_y = for_y
        self._gains: Gains = {} if gains is None else gains
        self._shape, self._met = tuple(weight.shape), set[Asked]()
        """Its shape, and the products that it was asked for."""
        self._paying: dict[tuple[int, bool], bool] = {}
        """Whether to take it for so many rows, with a bias, in this step."""
        self._uses, self._free = math.inf, False
        """Products in a step, and whether the time to lay it costs nothing."""
        self._state: tuple[int, ...] = ()
        self._looked = self._sample = torch.empty(0)
        """The sample as it is and as it was."""
        self._used = False
        probe = torch.arange(weight.numel(), dtype=torch.float32).view(weight.shape)
        whole = probe if for_y else probe.t().contiguous()
        self._laid = torch.ops.mkldnn._reorder_linear_weight(whole, None)
        self.nbytes: int = torch.ops.mkldnn._nbytes(self._laid)
        if self.nbytes != whole.numel() * whole.element_size():
            raise NotImplementedError
        self._blocks = numbers_of(self._laid).view(-1, whole.shape[1], BLOCK)
        theirs = self._blocks.clone()
        self._lay(probe)
        if not torch.equal(self._blocks, theirs):
            raise NotImplementedError

    @property
    def useful(self) -> bool:
        """Whether some number of rows has been found to take it."""
        return any(self._pays(product) for product in self._met)

    @property
    def useless(self) -> bool:
        """Whether all that it was asked for is better done without it."""
        return bool(self._met) and not self.useful

    def _pays(self, product: "Asked") -> bool:
        saved, dear = self._gains[product]
        return saved > 0 and saved * self._uses > (0.0 if self._free else dear)

    def stale(self, uses: int, free: bool = False) -> None:
        """Note that the weight may be another one, and how many products come. Local.

        `free`: this rank has the time to lay it.
        """
        self._state, self._used, self._uses, self._free = (), False, uses, free
        self._paying.clear()

    def use(self, rows: int, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
        """Tell whether to take it for a product of so many rows: not for the first after `stale`. Local.

        Another stage waits for that one; the next has the time to lay the weight.
        """
        known = self._paying.get((rows, bias is None))
        if known is None:
            first, self._used = not (self._used or self._state), True
            if first:
                return False
            known = self._paying[rows, bias is None] = rows > 1 and self._gain(rows, weight, bias)
        return known

    def _gain(self, rows: int, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
        """Whether it pays for a product of so many rows, measured if no such one was yet. Local."""
        product = self._shape, self.for_y, rows, bias is None
        if product not in self._gains:
            self._state = ()
            try:
                self._gains[product] = self._measure(rows, weight if self.for_y else weight.t(), bias)
            except RuntimeError:  # torch's word for memory that the system refuses
                self._gains[product] = 0.0, 0.0
        self._met.add(product)
        return self._pays(product)

    def _measure(self, rows: int, standing: torch.Tensor, bias: torch.Tensor | None) -> tuple[float, float]:
        x, other = (made_up(n, standing.shape[1]) for n in (rows, len(standing)))
        weight = other if self.for_y else other.t().contiguous()
        as_it_stands = other if self.for_y else weight.t()
        self._lay(weight)
        if not torch.equal(_kernel(x, self._laid, bias), _kernel(x, as_it_stands, bias)):
            return 0.0, 0.0
        ways = (
            lambda: _kernel(x, as_it_stands, bias),
            lambda: _kernel(x, self._laid, bias),
            lambda: self._lay(weight),
        )
        unlaid, laid, dear = seconds_of(ways)
        return unlaid - laid, dear

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


def numbers_of(laid: torch.Tensor) -> torch.Tensor:
    """Give the numbers of a float32 tensor in oneDNN's layout as they lie; they live as long as it. Local."""
    size: int = torch.ops.mkldnn._nbytes(laid)
    memory = (ctypes.c_char * size).from_address(torch.ops.mkldnn.data_ptr(laid))
    return torch.frombuffer(memory, dtype=torch.float32)


def seconds_of(ways: Sequence[Callable[[], object]], rounds: int = TIMED) -> list[float]:
    """Time several ways in turn; the least of a few rounds, as another process may be in the way. Local."""
    found = [math.inf] * len(ways)
    for _ in range(rounds):
        for at, way in enumerate(ways):
            began = time.perf_counter()
            way()
            found[at] = min(found[at], time.perf_counter() - began)
    return found


def made_up(rows: int, width: int) -> torch.Tensor:
    """Give numbers between -1 and 1, all of them different; no random stream moves. Pure."""
    return torch.arange(1.0, 1.0 + rows * width, dtype=torch.float64).sin_().float().view(rows, width)


class LaidWeights:
    """The weights of this rank that are laid in blocks: as many as are worth it and memory allows."""

    def __init__(self) -> None:
        """Lay nothing yet."""
        self._laid: dict[tuple[nn.Parameter, bool], Laid | None] = {}
        self._gains: Gains = {}
        self._left, self._repaid = -1.0, False
        """Bytes that more of them may take, negative before that is known; if this step's uses repay it."""

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        return sum(laid.nbytes for laid in self._laid.values() if laid is not None)

    def allow(self, room: float) -> None:
        """Let them take so many bytes, beside what they have. Local."""
        self._left = room

    def begin(self, micro_batches: int, waits: bool = False) -> None:
        """Start a step of so many micro-batches: weights are new. Local.

        `waits`: this rank waits for another's activations first, and has time to lay its weights.
        """
        self._repaid = micro_batches >= REPAID
        for (parameter, for_y), laid in self._laid.items():
            if laid is None:
                continue
            laid.stale(micro_batches, waits)
            if self._repaid and laid.useless:
                self._laid[parameter, for_y] = None
                self._left += laid.nbytes
            elif waits and self._repaid and laid.useful:
                laid.of(parameter)

    def get(self, parameter: nn.Parameter, for_y: bool) -> Laid | None:
        """Give a weight laid for x·Wᵀ or for g·W, if this step's uses repay it. Local."""
        if not self._repaid or self._left < 0:
            return None
        if (parameter, for_y) not in self._laid:
            self._laid[parameter, for_y] = self._make(parameter, for_y)
        return self._laid[parameter, for_y]

    @torch.no_grad()
    def _make(self, parameter: nn.Parameter, for_y: bool) -> Laid | None:
        size = parameter.numel() * parameter.element_size()
        blocks = not (parameter.shape[0] % BLOCK or parameter.shape[1] % BLOCK)
        if not blocks or not ours(parameter, parameter) or size > self._left:
            return None
        try:
            laid = Laid(parameter, for_y, self._gains)
        except NotImplementedError:
            return None
        except RuntimeError:  # torch's word for memory that the system refuses
            self._left = 0.0
            return None
        self._left -= size
        return laid
