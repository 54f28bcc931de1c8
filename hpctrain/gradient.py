"""Weight gradients computed straight into their place: the memory that is averaged.

Autograd computes a weight's gradient into fresh memory and then adds it to `.grad`, which had
to be zeroed first: three passes over the memory of the weights. For a linear layer the product
can be written where it belongs:

      first micro-batch      place ← gᵀ·x          torch.mm(out=place)
      later ones             place ← place + gᵀ·x  place.addmm_

and for an embedding only the rows that were looked up are added, place[i] ← place[i] + g, where
autograd makes a whole table of mostly zeros. Convolutions and norms have no kernel that writes
where it is told: theirs are copied, which is little beside their own work.

In a pipeline the products of linear layers may wait, so that the gradient that another stage waits for
leaves first; there products of several micro-batches may also become one (`fast`): the weight's
memory is passed over once for all of them, but the sum has another order. The products that make new
tensors are `products.py`'s.

The user's module is not touched: while the forward runs, a torch-function mode sees each
`F.linear` and `F.embedding` whose weight has a place. Everything that could tell the difference
takes autograd's own way: hooks on the weight, gradients of gradients, `torch.autograd.grad` in
the user's code, autocast, functorch, small weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from hpctrain import products
from hpctrain.products import Packs

SMALLEST = 16384
"""Elements: below it the product is too short for its passes over memory to matter."""

MERGED_ROWS = 512
"""Rows of a product that is long enough: merging more gains nothing."""

WEIGHTS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("weight",),
    nn.Embedding: ("weight",),
    nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
}
"""Names of the weights that are seen."""


class Places(Protocol):
    """Where weight gradients go."""

    def place(self, parameter: torch.Tensor) -> tuple[torch.Tensor, bool] | None:
        """Give the memory of a gradient and whether nothing has joined it yet; None: not managed."""

    def filled(self, parameter: torch.Tensor) -> None:
        """Note that a gradient has been added in its place."""

    def later(self, parameter: torch.Tensor) -> bool:
        """Tell whether a gradient may be computed after its backward; if so it is waited for."""

    def caught_up(self, parameter: torch.Tensor) -> None:
        """Note that no gradient of the parameter waits any more."""


class _Linear(torch.autograd.Function):
    """F.linear whose weight gradient may be written into its place."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: nn.Parameter, bias: torch.Tensor | None, owner: "StraightIntoPlace"
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.owner, ctx.parameter, ctx.has_bias = owner, weight, bias is not None
        return products.linear(x, weight, bias, owner.packs.get(weight))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        rows = x.reshape(-1, x.shape[-1])
        to_x = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            if torch.is_grad_enabled():  # create_graph: it is to be differentiated
                to_x = torch.matmul(gradient, weight)
            else:
                to_x = products.to_input(gradient, weight, ctx.owner.packs.get(ctx.parameter))
        if ctx.needs_input_grad[1]:
            to_weight = ctx.owner.join(ctx.parameter, flat, rows)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            to_bias = flat.sum(dim=0)
        return to_x, to_weight, to_bias, None


class _Embedding(torch.autograd.Function):
    """F.embedding whose gradient may be added to the rows in its place."""

    @staticmethod
    def forward(
        ctx: Any, weight: nn.Parameter, indices: torch.Tensor, padding: int, owner: "StraightIntoPlace"
    ) -> torch.Tensor:
        ctx.save_for_backward(indices)
        ctx.owner, ctx.parameter, ctx.padding = owner, weight, padding
        return torch.embedding(weight, indices, padding)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        weight = ctx.parameter
        if torch.is_grad_enabled() or not ctx.owner.fills(weight, gradient.dtype):
            table = torch.ops.aten.embedding_dense_backward(
                gradient, indices, len(weight), ctx.padding, False
            )
            return table, None, None, None
        ctx.owner.add_rows(weight, indices.reshape(-1), gradient.reshape(-1, weight.shape[1]), ctx.padding)
        return None, None, None, None


@dataclass(frozen=True)
class Product:
    """A weight gradient gᵀ·x that waits to be computed."""

    micro_batch: int
    g: torch.Tensor
    x: torch.Tensor


class StraightIntoPlace(TorchFunctionMode):
    """Entered for the forward; `accumulating` is entered for the backward that fills the places."""

    def __init__(self, module: nn.Module, places: Places, fast: bool = False) -> None:
        """Take what gives places; `fast`: products that wait may become one, in another order of sums."""
        super().__init__()
        self._places, self.fast = places, fast
        self.packs = Packs()
        self._active, self._micro_batch = False, -1
        self._waiting: dict[nn.Parameter, list[Product]] = {}
        """In the order of the backward passes."""
        self._never_later: set[int] = set()
        """Weights that embeddings add to: the order of the sum would be another."""
        self.compiled = any(type(m).__name__ == "OptimizedModule" for m in module.modules())
        """Whether part of the module is compiled: no mode can look inside."""
        weights = (  # a parametrised layer computes its weight when asked for it
            m._parameters.get(name)
            for m in module.modules()
            for kind, names in WEIGHTS.items()
            if isinstance(m, kind)
            for name in names
        )
        self.weights = {id(w) for w in weights if w is not None and w.numel() >= SMALLEST}

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Watch the calls of a forward; costs nothing where no layer could gain."""
        if not self.weights or self.compiled:
            yield
            return
        with self:
            yield

    @contextmanager
    def accumulating(self, micro_batch: int = -1) -> Iterator[None]:
        """Let weight gradients go into their places: this backward is the one that is averaged.

        With the number of a micro-batch, those of linear layers may wait for `weights_of` it.
        """
        self._active, self._micro_batch = True, micro_batch
        try:
            yield
        finally:
            self._active, self._micro_batch = False, -1

    def begin(self, micro_batches: int, waits: bool = False) -> None:
        """Start a step of so many micro-batches: no product waits, and weights are new. Local.

        `waits`: this rank waits for another's activations first.
        """
        self._waiting.clear()
        self.packs.begin(micro_batches, waits)

    @torch.no_grad()
    def weights_of(self, micro_batch: int, last: bool) -> None:
        """Compute the products that wait for a micro-batch or one before it; with `last` all. Local.

        With `fast` those of a weight wait until they are long enough together.
        """
        for parameter, waiting in list(self._waiting.items()):
            due = [p for p in waiting if p.micro_batch <= micro_batch or last]
            if self.fast and due and not last and sum(len(p.g) for p in due) < MERGED_ROWS:
                continue
            if self.fast and len(due) > 1:
                self._join(parameter, torch.cat([p.g for p in due]), torch.cat([p.x for p in due]))
            else:
                for product in due:
                    self._join(parameter, product.g, product.x)
            rest = waiting[len(due) :]
            if rest:
                self._waiting[parameter] = rest
            else:
                del self._waiting[parameter]
                self._places.caught_up(parameter)

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        """Take F.linear and F.embedding of a managed weight; let everything else pass."""
        if function is functional.linear and torch.is_grad_enabled():
            x, weight, bias = _linear_arguments(*arguments, **(named or {}))
            if id(weight) in self.weights and weight.requires_grad and _plain(x, weight):
                return _Linear.apply(x, weight, bias, self)  # type: ignore[no-untyped-call]
        if function is functional.embedding and torch.is_grad_enabled():
            indices, weight, padding, special = _embedding_arguments(*arguments, **(named or {}))
            managed = id(weight) in self.weights and weight.requires_grad
            if managed and not special and _plain(weight, weight):
                return _Embedding.apply(weight, indices, padding, self)  # type: ignore[no-untyped-call]
        if function is functional.multi_head_attention_forward:
            with self:  # its linear layers are to be seen, too
                return _attention(*arguments, **(named or {}))
        return function(*arguments, **(named or {}))

    def fills(self, parameter: nn.Parameter, dtype: torch.dtype) -> bool:
        """Whether a gradient of this backward goes straight into its place. Local."""
        own_way = (
            not self._active
            or torch.is_grad_enabled()  # create_graph: the gradient is to be differentiated
            or parameter._backward_hooks  # the user's hooks want to see the gradient
            or parameter.dtype != dtype
        )
        return not own_way and self._places.place(parameter) is not None

    def add_rows(self, parameter: nn.Parameter, indices: torch.Tensor, g: torch.Tensor, padding: int) -> None:
        """Add rows g: (n, width) to rows `indices`: (n,) of the parameter's place, in that order. Local."""
        found = self._places.place(parameter)
        assert found is not None
        place, first = found
        self._never_later.add(id(parameter))
        if first:
            place.zero_()
        if padding >= 0:
            kept = indices != padding
            indices, g = indices[kept], g[kept]
        place.index_add_(0, indices, g)
        self._places.filled(parameter)

    def join(self, parameter: nn.Parameter, g: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
        """Add gᵀ·x to the parameter's place, now or later, and give None, or give it to autograd.

        g: (rows, out), x: (rows, in). Local.
        """
        if not self.fills(parameter, g.dtype):
            return g.t() @ x
        waits = self._micro_batch >= 0 and id(parameter) not in self._never_later
        if waits and self._places.later(parameter):
            product = Product(self._micro_batch, g.detach(), x.detach())
            self._waiting.setdefault(parameter, []).append(product)
        else:
            self._join(parameter, g, x)
        return None

    def _join(self, parameter: nn.Parameter, g: torch.Tensor, x: torch.Tensor) -> None:
        found = self._places.place(parameter)
        assert found is not None
        place, first = found
        if first:
            torch.mm(g.t(), x, out=place)
        else:
            place.addmm_(g.t(), x)
        self._places.filled(parameter)


def _unlooking(function: Any) -> Any:
    """Give a Python function of torch that does not ask for a mode itself; what it calls does."""
    own = {**function.__globals__, "has_torch_function": lambda _: False}
    return FunctionType(function.__code__, own, function.__name__, function.__defaults__)


_attention = _unlooking(functional.multi_head_attention_forward)


def _linear_arguments(
    input: torch.Tensor, weight: Any, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, Any, torch.Tensor | None]:
    return input, weight, bias


def _embedding_arguments(
    input: torch.Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> tuple[torch.Tensor, Any, int, bool]:
    """Give indices, weight, the padding row (-1: none) and whether the call is a special one."""
    special = max_norm is not None or scale_grad_by_freq or sparse
    if padding_idx is None:
        return input, weight, -1, special
    return input, weight, padding_idx % len(weight), special or not -len(weight) <= padding_idx < len(weight)


def _plain(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether nothing else watches the call itself.

    Functorch's transforms do; so do hooks on saved tensors (recomputed activations expect the
    same tensors from the second forward, which no mode sees).
    """
    if torch.is_autocast_enabled(x.device.type):  # it casts inside the call
        return False
    inside = torch._C._functorch.peek_interpreter_stack() is not None
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    return (
        not (inside or hooked)
        and x.dtype == weight.dtype
        and x.ndim >= 1
        and type(x) in (torch.Tensor, nn.Parameter)
    )
