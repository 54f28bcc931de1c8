"""Linear layers that follow one another, with activations between: one node of autograd's graph.

      layer by layer   x → linear → relu → linear → …     a call of a module, one of autograd's functions
      as a row         x → (W·xᵀ)ᵀ + b, max 0, …          the same kernels, called one behind the other

Of few rows, as a micro-batch has, a product with a large weight leaves nothing of the interpreter's in the
caches: what is around a layer's three took 0.28 ms of 2.4, and 0.19 in a row (32 rows of 1024 × 1024,
measured beside the kernels alone). The same kernels get the same tensors, so the bits are those of the
layers one by one. What weights get is handed over when the input's gradient is there.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from hpctrain import gradient
from hpctrain.functions import LINEAR, Product, output, to_input
from hpctrain.gradient import SMALLEST, StraightIntoPlace, unwrap
from hpctrain.pipeline.rows import Call, Named, Row, batched, by_layers
from hpctrain.tensors import shapes_of
from hpctrain.waiting import few_rows

ATEN = torch.ops.aten


class Activation(NamedTuple):
    """What stands behind a linear layer. As torch's autograd has it."""

    forward: Callable[[Any, torch.Tensor], torch.Tensor]
    """Of the layer and what it gets."""
    backward: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
    """Of the layer, the gradient of what it gave, and what it got or gave."""
    of_output: bool


ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.ReLU: Activation(
        lambda _, x: torch.relu(x), lambda _, g, y: ATEN.threshold_backward(g, y, 0), of_output=True
    ),
    nn.Tanh: Activation(lambda _, x: torch.tanh(x), lambda _, g, y: ATEN.tanh_backward(g, y), of_output=True),
    nn.Sigmoid: Activation(
        lambda _, x: torch.sigmoid(x), lambda _, g, y: ATEN.sigmoid_backward(g, y), of_output=True
    ),
    nn.GELU: Activation(
        lambda layer, x: torch._C._nn.gelu(x, approximate=layer.approximate),
        lambda layer, g, x: ATEN.gelu_backward(g, x, approximate=layer.approximate),
        of_output=False,
    ),
    nn.SiLU: Activation(
        lambda _, x: torch._C._nn.silu(x), lambda _, g, x: ATEN.silu_backward(g, x), of_output=False
    ),
}


class Step(NamedTuple):
    """A linear layer and what stands behind it."""

    linear: nn.Module
    activation: nn.Module | None
    kind: Activation | None


class Dense(Row):
    """Linear layers, each of them maybe with an activation behind it. Local."""

    def __init__(self, layers: Sequence[Named]) -> None:
        """Take the layers by name."""
        super().__init__(layers)
        self._chosen = False
        self.steps = list[Step]()
        for _, layer in self.layers:
            if type(layer) is nn.Linear:
                self.steps.append(Step(layer, None, None))
            else:
                self.steps[-1] = Step(self.steps[-1].linear, layer, ACTIVATIONS[type(layer)])

    @staticmethod
    def functions() -> tuple[Any, ...]:
        """Give the functions that the layers call, as they are now. Local."""
        layers: list[type[nn.Module]] = [nn.Linear, *ACTIVATIONS]
        called = functional.linear, functional.relu, functional.gelu, functional.silu
        return nn.Module.__call__, *(kind.forward for kind in layers), *called, torch.relu, torch.tanh

    @staticmethod
    def length(layers: Sequence[Named]) -> int:
        """Give how many of these layers, from the first, are such a row; 0: none. Pure.

        >>> a, b, c = nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 256)
        >>> Dense.length([*zip("1234", [a, b, c, b])]), Dense.length([*zip("1234", [a, b, a, b])])
        (4, 2)
        >>> Dense.length([*zip("123", [a, c, a])]), Dense.length([*zip("12", [b, a])])
        (2, 0)
        """
        seen, wide, length = set[int](), None, 0
        for at, (_, layer) in enumerate(layers):
            if type(layer) is nn.Linear:
                own = {id(p) for p in layer._parameters.values() if p is not None}
                fits = wide in (None, layer.in_features) and not own & seen
                if not fits or layer.weight.numel() < SMALLEST:
                    break
                seen |= own
                wide = layer.out_features
            elif type(layer) not in ACTIVATIONS or not at or type(layers[at - 1][1]) is not nn.Linear:
                break
            length = at + 1
        return length

    @staticmethod
    def usual(layer: nn.Module) -> bool:
        """Whether a layer is such a one. Pure."""
        return type(layer) is nn.Linear or type(layer) in ACTIVATIONS

    @property
    def chosen(self) -> bool:
        """Whether it has been run as one."""
        return self._chosen

    def run(self, call: Call, value: Any) -> Any:
        """Run the layers; gives what the last one gave. Local."""
        owner = gradient.taking()
        if owner is None or not isinstance(value, torch.Tensor) or not self.unseen(value):
            return self.one_by_one(call, value)
        pairs = [(step.linear._parameters["weight"], step.linear._parameters["bias"]) for step in self.steps]
        if not owner.takes_row(value, pairs):
            return self.one_by_one(call, value)
        self._chosen = True
        with torch._C.DisableTorchFunction():
            weights, biases = zip(*pairs)
            try:
                return APPLY(self, owner, unwrap(value), *weights, *biases)
            except Exception as error:
                error.add_note(f"in {self.layers[0][0]} to {self.layers[-1][0]}, given {shapes_of(value)}")
                raise

    def values(self, x: torch.Tensor, weights: Sequence[Any], biases: Sequence[Any]) -> torch.Tensor:
        """Give what the layers give with these in the place of their own. Local."""
        for step, weight, bias in zip(self.steps, weights, biases, strict=True):
            x = LINEAR(x, weight, bias)
            if step.kind is not None:
                x = step.kind.forward(step.activation, x)
        return x


class Calls(torch.autograd.Function):
    """A row of linear layers and activations."""

    @staticmethod
    def forward(ctx: Any, row: Dense, owner: StraightIntoPlace, x: torch.Tensor, *own: Any) -> torch.Tensor:
        """Compute the layers."""
        count, kept = len(row.steps), list[torch.Tensor | None]()
        weights, biases, given = own[:count], own[count:], x
        for step, weight, bias in zip(row.steps, weights, biases):
            kept.append(x)
            x = output(x, weight, bias, owner)
            if step.kind is None:
                kept.append(None)
            else:
                before, x = x, step.kind.forward(step.activation, x)
                kept.append(x if step.kind.of_output else before)
        ctx.row, ctx.owner, ctx.parameters, ctx.by_onednn = row, owner, own, owner.by_onednn
        ctx.versions = [bias._version for bias in biases if bias is not None]
        ctx.save_for_backward(given, *weights, *kept[1:])
        return x

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Give the gradients that autograd is to have; by the layers, where they are to be differentiated."""
        row, owner, count = ctx.row, ctx.owner, len(ctx.row.steps)
        x, saved = ctx.saved_tensors[0], ctx.saved_tensors
        weights, kept, biases = saved[1 : count + 1], (x, *saved[count + 1 :]), ctx.parameters[count:]
        usual = type(g) is torch.Tensor and g.layout is torch.strided and not batched(g)
        if torch.is_grad_enabled() or not usual:
            versions = [bias._version for bias in biases if bias is not None]
            inputs = [x, *weights, *biases]
            run = lambda own: row.values(own[0], own[1 : count + 1], own[count + 1 :])  # noqa: E731
            return None, None, *by_layers(run, inputs, versions == ctx.versions, g)
        of_x, needed = ctx.needs_input_grad[2], ctx.needs_input_grad[3:]
        found: list[Any] = [None] * (2 * count)
        due = list[tuple[int, Product]]()
        of_onednn = owner if ctx.by_onednn else None
        for at in range(count - 1, -1, -1):
            step, given, other = row.steps[at], kept[2 * at], kept[2 * at + 1]
            if step.kind is not None:
                g = step.kind.backward(step.activation, g, other)
            if needed[count + at]:
                found[count + at] = g.sum(dim=0)
            work = Product(g, given)
            if at or of_x:
                g = to_input(g, weights[at], ctx.parameters[at], of_onednn)
            due.append((at, work))
            if len(given) > few_rows(weights[at]):  # they don't wait, and would all be held
                hand_over(ctx, due, found)
        hand_over(ctx, due, found)
        return None, None, g if of_x else None, *found


APPLY: Callable[..., Any] = super(torch.autograd.Function, Calls).apply
"""Behind its question for functorch's transforms, which `Row.unseen` has asked."""


def hand_over(ctx: Any, due: list[tuple[int, Product]], found: list[Any]) -> None:
    """Give what weights get to who takes it, or to autograd, and let go of it. Local."""
    for at, work in due:
        if not ctx.owner.take([ctx.parameters[at]], work):
            found[at] = work.g.t() @ work.x
    due.clear()
