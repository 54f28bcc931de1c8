"""Autograd's functions of the layers whose weight gradients may be computed elsewhere, or later.

Forward and input gradient are computed here; the gradient of the weight is handed to an owner, which
computes it where and when it wants, or says that autograd is to have it.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.nn import functional

from hpctrain import products
from hpctrain.products import LaidWeights

LINEAR, EMBEDDING = functional.linear, functional.embedding
"""torch's own: in a forward others stand in their places (`modes.Replaced`), which would be asked again."""


class Product(NamedTuple):
    """The gradient gᵀ·x of a linear layer's weight: g (rows, out), x (rows, in)."""

    g: torch.Tensor
    x: torch.Tensor

    def alone(self) -> "Product":
        """Give it without what made its tensors. Local."""
        return Product(*(t.detach() if t.requires_grad else t for t in self))


@dataclass
class FreshProduct:
    """The same of a layer that is at times left to autograd: computed as there, by itself, then added."""

    g: torch.Tensor
    x: torch.Tensor

    def alone(self) -> "FreshProduct":
        """Give it without what made its tensors. Local."""
        return FreshProduct(*Product(self.g, self.x).alone())

    def of_weights(self, now: bool) -> tuple[torch.Tensor]:
        """Compute it; `now`: in the backward. Local."""
        return (self.g.t() @ self.x,)


@dataclass
class Correlation:
    """The gradients of a convolution's weight and bias, from its input x and the gradient g of its output."""

    g: torch.Tensor
    x: torch.Tensor
    weight: torch.Tensor
    geometry: tuple[list[int], list[int], list[int], int]
    """Stride, padding, dilation, groups."""
    has_bias: bool
    of_x: bool
    """Whether the gradient of x is wanted, too."""
    found: torch.Tensor | None = None
    """That gradient, where it was computed with the others."""

    def alone(self) -> "Correlation":
        """Give it without what made its tensors. Local."""
        return replace(self, g=self.g.detach(), x=self.x.detach(), weight=self.weight.detach())

    def gradients(self, of_x: bool, of_weight: bool) -> tuple[Any, ...]:
        """Compute those of x, and of weight and bias; None for what is not asked for. Local."""
        stride, padding, dilation, groups = self.geometry
        return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
            self.g, self.x, self.weight, [len(self.weight)] if self.has_bias else None,
            stride, padding, dilation, False, [0] * len(stride), groups,
            [of_x, of_weight, of_weight and self.has_bias],
        )  # fmt: skip

    def of_weights(self, now: bool) -> tuple[Any, ...]:
        """Compute those of weight and bias; `now`, in the backward, with that of x. Local."""
        found = self.gradients(now and self.of_x, True)
        if now:
            self.found = found[0]
        return found[1:]


Work = Product | FreshProduct | Correlation


class Owner(Protocol):
    """Takes weight gradients."""

    laid: LaidWeights
    by_onednn: bool
    """Whether oneDNN may compute products."""

    @property
    def filling(self) -> bool:
        """Whether this backward is one that fills places; others are the user's own."""

    def fills(self, parameter: nn.Parameter, dtype: torch.dtype) -> bool:
        """Whether a gradient of this backward goes straight into its place."""

    def add_rows(self, parameter: nn.Parameter, indices: torch.Tensor, g: torch.Tensor, padding: int) -> None:
        """Add rows to some rows of a place."""

    def take(self, parameters: list[nn.Parameter], work: Work) -> bool:
        """Take what is to be computed for the places of parameters; False: autograd is to have it."""


class Linear(torch.autograd.Function):
    """F.linear; `as_torch`: with its bits, as it has it itself in another micro-batch or layout."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: nn.Parameter,
        bias: torch.Tensor | None,
        owner: Owner,
        as_torch: bool,
    ) -> torch.Tensor:
        """Compute the layer."""
        ctx.save_for_backward(x, weight)
        ctx.owner, ctx.parameter, ctx.has_bias = owner, weight, bias is not None
        ctx.by_onednn, ctx.as_torch = owner.by_onednn, as_torch
        found = LINEAR(x, weight, bias) if as_torch else output(x, weight, bias, owner)
        # of other than two dimensions it may be a view, which a layer behind could not change in place
        return torch.ops.aten._unsafe_view(found, found.shape) if found._is_view() else found

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Give the gradients that autograd is to have."""
        (x, weight), owner, parameter = ctx.saved_tensors, ctx.owner, ctx.parameter
        of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
        g = gradient if gradient.ndim == 2 else gradient.reshape(-1, gradient.size(-1))
        to_x = to_weight = to_bias = None
        if of_x:
            to_x = to_input(gradient, weight, parameter, owner if ctx.by_onednn else None)
        if of_weight:
            rows = x if x.ndim == 2 else x.reshape(-1, x.size(-1))
            work = FreshProduct(g, rows) if ctx.as_torch else Product(g, rows)
            if not owner.take([parameter], work):
                to_weight = g.t() @ rows
        if ctx.has_bias and of_bias:
            # torch, too, flattens what comes for a contiguous input; else it sums as the gradient lies
            flat = not ctx.as_torch or (x.is_contiguous() and x.ndim < 4)
            to_bias = g.sum(dim=0) if flat else gradient.sum(dim=tuple(range(gradient.ndim - 1)))
        return to_x, to_weight, to_bias, None, None


def output(x: torch.Tensor, weight: nn.Parameter, bias: torch.Tensor | None, owner: Owner) -> torch.Tensor:
    """Give x·Wᵀ + b, without a graph. Local."""
    if owner.by_onednn:
        return products.linear(x, weight, bias, owner.laid.get(weight, True))
    turned = products.turned(x, weight, bias)
    return LINEAR(x, weight, bias) if turned is None else turned


def to_input(
    g: torch.Tensor, weight: torch.Tensor, parameter: nn.Parameter, by_onednn_of: Owner | None
) -> torch.Tensor:
    """Give g·W; `by_onednn_of`: where oneDNN may, the owner, who has weights laid for it. Local."""
    if by_onednn_of is not None and by_onednn_of.filling:
        return products.to_input(g, weight, by_onednn_of.laid.get(parameter, False))
    return torch.matmul(g, weight)


class Convolution(torch.autograd.Function):
    """F.conv1d, 2d or 3d of a batch."""

    @staticmethod
    def forward(
        ctx: Any, function: Any, x: torch.Tensor, weight: nn.Parameter, bias: Any,
        geometry: tuple[list[int], list[int], list[int], int], owner: Owner,
    ) -> torch.Tensor:  # fmt: skip
        """Compute the layer."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        ctx.owner, ctx.geometry = owner, geometry
        ctx.parameters = [weight] if bias is None else [weight, bias]
        return function(x, weight, bias, *geometry)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Give the gradients that autograd is to have."""
        if gradient is None:  # it went past a row of convolutions
            return (None,) * 6
        x, weight = ctx.saved_tensors
        of_x, of_bias = ctx.needs_input_grad[1], ctx.needs_input_grad[3]  # it may be frozen, for now
        work = Correlation(gradient, x, weight, ctx.geometry, of_bias, of_x)
        if not ctx.owner.take(ctx.parameters[: 1 + of_bias], work):
            to_x, to_weight, to_bias = work.gradients(of_x, True)
            return None, to_x, to_weight, to_bias, None, None
        if of_x and work.found is None:
            return None, work.gradients(True, False)[0], None, None, None, None
        return None, work.found, None, None, None, None


class Embedding(torch.autograd.Function):
    """F.embedding: only the rows that were looked up are added to the place."""

    @staticmethod
    def forward(
        ctx: Any, weight: nn.Parameter, indices: torch.Tensor, padding: int, owner: Owner
    ) -> torch.Tensor:
        """Compute the layer."""
        ctx.save_for_backward(indices)
        ctx.owner, ctx.parameter, ctx.padding = owner, weight, padding
        return torch.embedding(weight, indices, padding)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Give the gradients that autograd is to have."""
        (indices,) = ctx.saved_tensors
        weight = ctx.parameter
        if torch.is_grad_enabled() or not ctx.owner.fills(weight, gradient.dtype):
            table = torch.ops.aten.embedding_dense_backward(
                gradient, indices, len(weight), ctx.padding, False
            )
            return table, None, None, None
        ctx.owner.add_rows(weight, indices.reshape(-1), gradient.reshape(-1, weight.shape[1]), ctx.padding)
        return None, None, None, None
