"""Convolutions that follow one another, in oneDNN's own layout: nothing is laid anew between them.

      layer by layer   x →|blocks|→ conv →|plain|→ relu →|blocks|→ conv →|plain|→ …   and so in backward
      as a row         x →|blocks|→ conv → relu → conv → relu → conv →|plain|→ …      behind a copy of x

oneDNN computes on blocks of channels: torch lays each convolution's input in blocks, and its output back as
it was. In a row that is left out (oneDNN's guide calls it memory format propagation). The same kernels get
the same numbers, so the bits are those of the layers one by one; ReLU is torch's, on the blocks' memory as
it lies, as oneDNN's own makes 0 of NaN.

A row is tried for each shape: with made-up numbers its bits, its memory and its time decide. Whatever could
see a tensor inside it (hooks, modes, autocast) gets the layers one by one.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from hpctrain import products
from hpctrain.gradient import KINDS
from hpctrain.pipeline.profile import Work
from hpctrain.pipeline.rows import Call, Named, Row, batched, by_layers
from hpctrain.products import numbers_of, seconds_of

ROUNDS, LONG_SECONDS = 5, 1.0
"""In which a row and its layers one by one are timed, and after which no other one begins."""
EVEN = 1.03
"""A row may take so many times as long: it moves less memory, which gains some percent where all cores want
theirs and nothing where the others are idle, as they may be while it is tried (measured)."""
MOST_SHAPES = 8
"""Shapes that are tried, with a graph and without: where every batch has another one, that would take more
than it gains."""
LEAST = 2**14
"""Elements of what a row gets: smaller ones gain nothing, and few numbers may agree by chance."""
PADDED = 1.1
"""How many times a tensor's memory its blocks may take, the last of which may be filled up with zeros."""
THRESHOLD = torch.ops.aten.threshold_backward


class Blocks(Row):
    """Layers from one convolution to another, with nothing but convolutions and ReLUs between. Local."""

    def __init__(self, layers: Sequence[Named]) -> None:
        """Take the layers by name."""
        super().__init__(layers)
        self.tried: dict[Any, bool] = {}
        """Whether it pays, by shape and what else a kernel is chosen by."""

    @staticmethod
    def functions() -> tuple[Any, ...]:
        """Give the functions that the layers call, as they are now. Local."""
        layers = nn.Module.__call__, nn.Conv2d.forward, nn.Conv2d._conv_forward, nn.ReLU.forward
        return *layers, functional.relu, functional.conv2d, torch.relu, torch.conv2d

    @staticmethod
    def length(layers: Sequence[Named]) -> int:
        """Give how many of these layers, from the first, are such a row; 0: none. Pure.

        >>> a, b = nn.Conv2d(1, 1, 1), nn.ReLU()
        >>> Blocks.length([*zip("1234567", [a, b, a, b, a, a, b])]), Blocks.length([*zip("123", [b, a, a])])
        (6, 0)
        """
        end = ahead = 0
        while ahead < len(layers):
            if convolves(layers[ahead][1]):
                end = ahead = ahead + 1
            elif type(layers[ahead][1]) is nn.ReLU and ahead == end and end:
                ahead += 1
            else:
                break
        return end

    @staticmethod
    def usual(layer: nn.Module) -> bool:
        """Whether a layer is such a convolution, or a ReLU. Pure."""
        return type(layer) is nn.ReLU or convolves(layer)

    @property
    def weights(self) -> list[torch.Tensor]:
        """Weights and biases of the convolutions, in order."""
        convolutions = (layer for _, layer in self.layers if isinstance(layer, nn.Conv2d))
        return [t for layer in convolutions for t in (layer.weight, layer.bias) if t is not None]

    @property
    def chosen(self) -> bool:
        """Whether a trial has chosen it."""
        return any(self.tried.values())

    def copies(self, given: int) -> int:
        """Give the bytes of what it gets, which is laid anew. Pure."""
        return given

    def bytes_of_trial(self, given: int, works: Sequence[Work]) -> float:
        """Give the most that a trial takes, by the bytes of what the row gets and its layers' work. Pure.

        Weights: made up, and the gradients of either way, in blocks at times. Beside what is kept for a
        backward: what the row gives and its input's gradient of either way, and what a backward takes. Holes
        in the heap were seen to cost a set of weights and two such values more.
        """
        weights = sum(tensor.nbytes for tensor in self.weights)
        largest = max([given, *(work.gives for work in works)])
        return 4.5 * weights + sum(work.kept for work in works) + 10.0 * largest

    def run(self, call: Call, value: Any) -> Any:
        """Run the layers; gives what the last one gave. Local."""
        if not (self._may(value) and self.pays(value)):
            return self.one_by_one(call, value)
        x, value = value, value.to_mkldnn()
        for what, layer in self.layers:
            value = call(what, rectified if isinstance(layer, nn.ReLU) else layer, value)
        if not value.requires_grad:
            return value.to_dense()
        return Ended.apply(self, value, x, *self.weights)  # type: ignore[no-untyped-call]

    def values(
        self, value: torch.Tensor, weights: Sequence[torch.Tensor], relu: Callable[[Any], Any] = torch.relu
    ) -> Iterator[torch.Tensor]:
        """Run the layers with `weights` in the place of their own; yields what each one gives. Local."""
        left = iter(weights)
        for _, layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                own = next(left), None if layer.bias is None else next(left)
                geometry: Any = layer.stride, layer.padding, layer.dilation, layer.groups
                value = torch.conv2d(value, *own, *geometry)
            else:
                value = relu(value)
            yield value

    def pays(self, value: torch.Tensor) -> bool:
        """Whether a row of such a value is faster than its layers, and gives the same bits. Local."""
        graph = torch.is_grad_enabled() and any(t.requires_grad for t in (value, *self.weights))
        key = tuple(value.shape), graph, torch.get_num_threads()
        if key not in self.tried:
            if len(self.tried) == MOST_SHAPES:
                return False
            self.tried[key] = wins(self, value.shape, graph)
        return self.tried[key]

    def _may(self, value: Any) -> bool:
        """Whether nobody sees a tensor inside, and all is as oneDNN's kernels want it. Local."""
        if not isinstance(value, torch.Tensor) or value.ndim != 4 or value.numel() < LEAST:
            return False
        if not self.unseen(value):
            return False
        return products.permitted() and all(
            t.dtype == torch.float32 and t.device == products.CPU and type(t) in KINDS and laid_plainly(t)
            for t in (value, *self.weights)
        )


def laid_plainly(tensor: torch.Tensor) -> bool:
    """Whether a tensor's strides are those of a fresh one, sides of length 1 included. Pure."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride())):
        if stride != expected:
            return False
        expected *= max(size, 1)
    return True


def convolves(layer: nn.Module) -> bool:
    """Whether a layer is torch's own convolution of pictures, and pads with zeros or nothing. Pure."""
    return type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and isinstance(layer.padding, tuple)


class Rectified(torch.autograd.Function):
    """ReLU of a convolution's output in blocks, in its own memory."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """Compute the layer."""
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(x)
        numbers_of(x).relu_()
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor | None) -> torch.Tensor | None:
        """Give the gradient, in the memory of what came: nobody else has it."""
        (y,) = ctx.saved_tensors
        if g is None:
            return None
        blocks, of = numbers_of(g), numbers_of(y)
        THRESHOLD.grad_input(blocks, of, 0, grad_input=blocks)
        return g


def rectified(x: torch.Tensor) -> torch.Tensor:
    """ReLU, in place. Local."""
    return Rectified.apply(x)  # type: ignore[no-any-return, no-untyped-call]


class Ended(torch.autograd.Function):
    """What a row gave, as its layers give it."""

    @staticmethod
    def forward(
        ctx: Any, row: Blocks, value: torch.Tensor, x: torch.Tensor, *weights: torch.Tensor
    ) -> torch.Tensor:
        """Lay it anew; x is what the row got."""
        ctx.row, ctx.inputs = row, (x, *weights)  # not saved: torch's layers bear a change of a bias
        ctx.versions = [t._version for t in ctx.inputs]
        return value.to_dense()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Give the gradient to the row; past it, by its layers, what oneDNN has no kernels for.

        To be differentiated, several at once, or looked at for NaN.
        """
        seen = torch.is_grad_enabled() or batched(g) or torch.is_anomaly_enabled()
        if not seen and g.layout is torch.strided:
            return None, g.to_mkldnn(), *[None] * len(ctx.inputs)
        unchanged = ctx.versions == [t._version for t in ctx.inputs]

        def run(own: list[torch.Tensor]) -> torch.Tensor:
            *_, found = ctx.row.values(own[0], own[1:])
            return found  # type: ignore[no-any-return]

        return None, None, *by_layers(run, ctx.inputs, unchanged, g)


def wins(row: Blocks, shape: Sequence[int], graph: bool) -> bool:
    """Run a row both ways, forward and (`graph`) backward, with made-up numbers; no random stream moves.

    Whether it is faster in blocks, takes no more memory, and all bits are the same. Local.
    """
    numbers = torch.Generator().manual_seed(0)

    def made_up(shape: Sequence[int], scale: float) -> torch.Tensor:
        return torch.empty(*shape).normal_(0.0, scale, generator=numbers).requires_grad_(graph)

    def passes(in_blocks: bool) -> list[torch.Tensor]:
        begins, relu = (x.to_mkldnn(), rectified) if in_blocks else (x, torch.relu)
        for value in row.values(begins, weights, relu):
            if in_blocks and numbers_of(value).nbytes > PADDED * value.numel() * value.element_size():
                raise NotImplementedError
        found = value.to_dense() if in_blocks else value
        return [found, *torch.autograd.grad(found, [x, *weights], found)] if graph else [found]

    with torch._C.DisableTorchFunction(), torch.set_grad_enabled(graph):
        # numbers stay in one scale from layer to layer
        weights = [made_up(w.shape, math.sqrt(2.0 / max(1, w[0].numel()))) for w in row.weights]
        x = made_up(shape, 1.0)
        try:
            began = time.perf_counter()
            alike = all(map(same_bits, passes(True), passes(False)))
            if not alike:
                return False
            rounds = min(ROUNDS, 1 + int(LONG_SECONDS / (time.perf_counter() - began)))
            in_blocks, one_by_one = seconds_of([lambda: passes(True), lambda: passes(False)], rounds)
        except RuntimeError:  # no kernel for them, or no memory
            return False
    return in_blocks < EVEN * one_by_one


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of 32 bits are laid alike and have the same. Pure."""
    one, other = (t.detach().view(torch.int32) for t in (a, b))
    return one.stride() == other.stride() and torch.equal(one, other)
