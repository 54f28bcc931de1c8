"""Models that pipelines tend to get wrong; all map (n, 5) to (n, 2)."""

import itertools
import random
import types
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from helpers import Net
from mpi4py import MPI
from torch import nn
from torch.nn import functional
from torch.nn.functional import linear as own_linear
from torch.utils.checkpoint import checkpoint


class Row(nn.Sequential):
    """A subclass of Sequential with a forward of its own, so it goes by the graph."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(nn.Linear(in_features, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 8), nn.ReLU(inplace=True),
                         nn.Linear(8, 8), nn.Dropout(0.2), nn.Linear(8, out_features))  # fmt: skip

    def forward(self, x):
        return super().forward(x)


def plain_row(in_features: int, out_features: int) -> nn.Sequential:
    """The same layers in a plain Sequential: layer by layer."""
    return nn.Sequential(*Row(in_features, out_features))


def amid(inner: nn.Module, in_features: int, out_features: int) -> nn.Sequential:
    """Layers in front of one and behind it."""
    layers = [
        nn.Linear(in_features, 32),
        nn.Tanh(),
        nn.Linear(32, 32),
        inner,
        nn.Tanh(),
        nn.Linear(32, out_features),
    ]
    return nn.Sequential(*layers)


class Moves(nn.Module):
    """A state that each forward moves in place, and a layer of it."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(32, 32)
        self.register_buffer("state", torch.zeros(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.state.mul_(0.5).add_(x.detach().mean(0))
        return x + self.mix(self.state.expand(len(x), -1))


def moves_row(in_features: int, out_features: int) -> nn.Sequential:
    return amid(Moves(), in_features, out_features)


class Halves(nn.Module):
    """A hook that changes a gradient in place, which a layer has, too."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = torch.tanh(x)
        if found.requires_grad:
            found.register_hook(lambda g: g.mul_(0.5))
        return found + self.mix(x)


def halves_row(in_features: int, out_features: int) -> nn.Sequential:
    return amid(Halves(), in_features, out_features)


class Later(nn.Module):
    """From a forward of the second step on a weight has a gradient of another kind, too."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.mix, self.kind, self.count = nn.Linear(32, 32), kind, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += self.training
        weight, later = self.mix.weight, self.count > 7
        rows = torch.arange(len(x))
        first = functional.embedding(rows, weight) if later and self.kind == "lookup" else 0.0
        if self.count == 8 and self.kind == "hooked":
            weight.register_hook(lambda g: g * 1.0)
        found = first + self.mix(x)
        return found + weight.square().sum() * 0.1 if later and self.kind == "penalty" else found


def penalty_row(in_features: int, out_features: int) -> nn.Sequential:
    return amid(Later("penalty"), in_features, out_features)


def lookup_row(in_features: int, out_features: int) -> nn.Sequential:
    return amid(Later("lookup"), in_features, out_features)


def hooked_row(in_features: int, out_features: int) -> nn.Sequential:
    return amid(Later("hooked"), in_features, out_features)


def broad_row(in_features: int, out_features: int) -> nn.Sequential:
    """Layers of whole blocks of 64, all of them linear, and one convolution."""
    layers: list[nn.Module] = [
        nn.Linear(in_features, 64),
        nn.Unflatten(1, (1, 64)),
        nn.Conv1d(1, 1, 3, padding=1),
    ]
    layers += [nn.Flatten(1), nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, out_features))


class Twice(nn.Module):
    """Calls its layer twice, and a third time by its weight alone."""

    def __init__(self, layer: nn.Conv1d):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        x = torch.tanh(self.layer(torch.tanh(self.layer(x))))
        return x + functional.conv1d(x, self.layer.weight, padding=1)


def convolved_row(in_features: int, out_features: int) -> nn.Sequential:
    """Convolutions: one that is called several times, one of groups, two of one bias."""
    pair = nn.Sequential(nn.Conv1d(4, 4, 1, groups=2), nn.Tanh(), nn.Conv1d(4, 4, 3, padding=1))
    pair[2].bias = pair[0].bias
    row = [nn.Linear(in_features, 32), nn.Unflatten(1, (4, 8)), Twice(nn.Conv1d(4, 4, 3, padding=1))]
    return nn.Sequential(*row, Pair(pair), nn.Flatten(1), nn.Linear(32, out_features))


def pictured_row(in_features: int, out_features: int) -> nn.Sequential:
    """Convolutions of pictures, with ReLUs between."""
    row: list[nn.Module] = [nn.Linear(in_features, 16 * 6 * 6), nn.Unflatten(1, (16, 6, 6))]
    for _ in range(8):
        row += [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*row, nn.Flatten(1), nn.Linear(16 * 6 * 6, out_features))


def dense_row(in_features: int, out_features: int) -> nn.Sequential:
    """Wide linear layers, with activations between."""
    row: list[nn.Module] = [nn.Linear(in_features, 512)]
    for activation in (nn.ReLU(), nn.GELU(), nn.Tanh(), nn.SiLU(), nn.Sigmoid(), nn.ReLU(inplace=True)):
        row += [nn.Linear(512, 512), activation]
    return nn.Sequential(*row, nn.Linear(512, 512, bias=False), nn.Linear(512, out_features))


class Pair(nn.Module):
    """One layer of what it holds."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class Filling(nn.Sequential):
    """A row of layers in a class of its own; one of them can't be written down."""

    def __init__(self, in_features: int, out_features: int):
        deciding = Deciding(8, 8)
        super().__init__(nn.Linear(in_features, 8), nn.Tanh(), deciding, nn.Linear(8, out_features))


class Named(nn.Module):
    """Says itself which layers follow one another; they hand on a tuple with None and a number."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.a, self.b, self.c = Split(in_features), Middle(), Join(out_features)

    def layers(self):
        return [self.a, self.b, self.c]

    def forward(self, x):
        return self.c(self.b(self.a(x)))


class Split(nn.Module):
    def __init__(self, in_features):
        super().__init__()
        self.line = nn.Linear(in_features, 8)

    def forward(self, x):
        return {"h": torch.tanh(self.line(x)), "mask": x > 0, "none": None, "scale": 0.5}, (x.long(),)


class Middle(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(8, 8)

    def forward(self, given):
        found, (whole,) = given
        return {**found, "h": self.line(found["h"]) * found["scale"]}, (whole + 1,)


class Join(nn.Module):
    def __init__(self, out_features):
        super().__init__()
        self.line = nn.Linear(8, out_features)

    def forward(self, given):
        found, (whole,) = given
        assert found["none"] is None
        assert whole.dtype == torch.int64
        kept = functional.pad(found["mask"].float(), (0, 3))
        return self.line(found["h"] * kept)


class Skips(nn.Module):
    """A U-Net in small: what the first layers find goes straight to the last ones; in-place on the way."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.down1, self.down2 = nn.Linear(in_features, 8), nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(2)
        self.up2, self.up1 = nn.Linear(8, 8), nn.Linear(16, 8)
        self.head = nn.Linear(8 + in_features, out_features)

    def forward(self, x):
        a = torch.relu_(self.down1(x))
        b = self.norm(self.down2(a).unflatten(1, (2, 4))).flatten(1)
        c = torch.tanh(self.up2(b)) + a
        d = torch.sin(self.up1(torch.cat([c, a * b], dim=1)))
        return self.head(torch.cat([d, x], dim=1))


class Reaching(nn.Module):
    """Each layer's values go to all that follow: in four stages on two ranks also to the same rank."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(in_features, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.d = nn.Linear(8, out_features)

    def forward(self, x):
        a = torch.tanh(self.a(x))
        b = torch.tanh(self.b(a))
        c = torch.tanh(self.c(b + a))
        return self.d(c) + a[:, :2] * b[:, :2]


class Acting(nn.BatchNorm1d):
    """Normalises and does more, in code of its own, as some libraries' layers do."""

    def forward(self, x):
        self.num_batches_tracked.add_(1)
        x = functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training,
                                  self.momentum, self.eps)  # fmt: skip
        return torch.sin(x + 1.0)


class Acts(nn.Module):
    """A BatchNorm with code of its own, called twice."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(in_features, 8), nn.Linear(8, 8), nn.Linear(8, out_features)
        self.norm = Acting(2)

    def forward(self, x):
        x = self.norm(self.a(x).unflatten(1, (2, 4))).flatten(1)
        return self.c(self.norm(self.b(x).unflatten(1, (2, 4))).flatten(1))


class Tied(nn.Module):
    """One weight at both ends, as language models have it, and once in the middle; random layers of all kinds."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.into = nn.Linear(in_features, 8)
        self.attend = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.back = nn.Linear(8, in_features)
        self.last = nn.Linear(in_features, out_features)

    def forward(self, x):
        h = self.into(x).unsqueeze(1).expand(-1, 3, -1)
        h = self.norm(h + self.attend(h, h, h, need_weights=False)[0])
        h = functional.dropout(h, 0.1, self.training).sum(dim=1)
        h = self.back(h) + h @ self.into.weight + torch.rand_like(x) * self.training
        return self.last(torch.tanh(h @ self.into.weight.t()) @ self.into.weight)


class HookedTie(Tied):
    """A hook on the gradient of what several stages use."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.into.weight.register_hook(lambda g: 2 * g)


class Normed(nn.Module):
    """A BatchNorm of samples, which needs two of them."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(in_features, 8), nn.BatchNorm1d(8), nn.Linear(8, out_features)

    def forward(self, x):
        return self.b(self.norm(self.a(x)))


class Masked(nn.Module):
    """torch's own transformer, which looks whether its mask is causal; `own`: of another's making."""

    def __init__(self, in_features: int, out_features: int, own: bool = False):
        super().__init__()
        self.own = own
        self.into, self.out = nn.Linear(1, 8), nn.Linear(8, out_features)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encode = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.decode = nn.TransformerDecoder(layer, 2)

    def forward(self, x):
        n = x.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(n)
        if self.own:
            mask = torch.full((n, n), float("-inf")).triu(1)
        x = self.into(x[..., None])
        return self.out(self.decode(x, self.encode(x, mask=mask), tgt_mask=mask).mean(1))


class ClosedOver(nn.Module):
    """Has a weight by a function that remembers the module."""

    def __init__(self, in_features: int, out_features: int, width: int = 8):
        super().__init__()
        self.first, self.inner, self.last = (
            nn.Linear(in_features, width),
            nn.Linear(width, width),
            nn.Linear(width, out_features),
        )
        self.act = lambda x: torch.tanh(self.inner(x))

    def forward(self, x):
        return self.last(self.act(self.first(x)))


class ListsAList(nn.Module):
    """Lists a list, which has no forward."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(in_features, in_features) for _ in range(3))
        self.last = nn.Linear(in_features, out_features)

    def layers(self):
        return [self.inner, self.last]


class Both(NamedTuple):
    """What a layer gives."""

    h: torch.Tensor
    skip: torch.Tensor


class Splits(nn.Linear):
    def forward(self, x):
        return Both(torch.tanh(super().forward(x)), x)


class Joins(nn.Linear):
    def forward(self, both):
        return torch.tanh(super().forward(both.h)) + both.skip


class GoesOn(nn.Linear):
    def forward(self, both):
        return Both(torch.tanh(super().forward(both.h)), both.skip)


def named_tuple_row(in_features: int, out_features: int) -> nn.Sequential:
    """Named tuples cross."""
    n = in_features
    return nn.Sequential(Splits(n, n), GoesOn(n, n), GoesOn(n, n), Joins(n, n), nn.Linear(n, out_features))


class Sorts(nn.Linear):
    def forward(self, x):
        x = super().forward(x)
        return torch.sort(x, 1), x.shape, np.float32(0.1)


class Sorted(nn.Linear):
    def forward(self, given):
        (values, order), shape, scale = given
        return torch.sort(torch.tanh(super().forward(values)) + order * scale.item(), 1), shape, scale


class Unsorted(nn.Linear):
    def forward(self, given):
        found, shape, _ = given
        return super().forward(found.values) * found.indices / shape.numel()


def sorting_row(in_features: int, out_features: int) -> nn.Sequential:
    """What a function of torch's gives crosses, a tensor's shape and a number of NumPy's."""
    n = in_features
    return nn.Sequential(Sorts(n, n), Sorted(n, n), Sorted(n, n), Unsorted(n, n), nn.Linear(n, out_features))


class LargeTied(nn.Module):
    """A weight at both ends that is large enough for our own products."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.into, self.first, self.back = (
            nn.Linear(in_features, 256),
            nn.Linear(256, 512),
            nn.Linear(512, 256),
        )
        self.head, self.last = nn.Linear(256, 512), nn.Linear(512, out_features)
        self.head.weight = self.first.weight

    def layers(self):
        return [self.into, self.first, self.back, self.head, self.last]

    def forward(self, x):
        for layer in self.layers():
            x = layer(x)
        return x


class LargeTiedGraph(LargeTied):
    """The same, cut by operators."""

    layers = None

    def forward(self, x):
        return self.last(self.head(self.back(self.first(self.into(x)))))


class MixedTied(LargeTied):
    """Its large weight is used by our own products, and between them by torch's."""

    layers = None

    def forward(self, x):
        h = torch.tanh(self.first(self.into(x)))
        h = self.back(h) + h @ self.first.weight
        h = torch.tanh(self.head(h)) @ self.first.weight
        return self.last(h @ self.first.weight.t() + self.first(torch.sin(h)))


def tied_row(in_features: int, out_features: int) -> nn.Sequential:
    """A layer that stands twice in a row."""
    same = nn.Linear(in_features, in_features)
    return nn.Sequential(same, nn.Tanh(), nn.Linear(in_features, in_features), nn.Tanh(), same,
                         nn.Linear(in_features, out_features))  # fmt: skip


def breaking_tied_row(in_features: int, out_features: int, at: int, backward: bool) -> nn.Sequential:
    """The same, and from the fourth micro-batch on a layer behind one of the six fails."""
    layers = list(tied_row(in_features, out_features))
    return nn.Sequential(*layers[:at], Bad(backward, False, call=4), *layers[at:])


def normed_row(in_features: int, out_features: int) -> nn.Sequential:
    """One BatchNorm at both ends."""
    same = nn.BatchNorm1d(in_features)
    inner = [nn.Linear(in_features, in_features) for _ in range(4)]
    return nn.Sequential(
        inner[0], same, inner[1], inner[2], inner[3], same, nn.Linear(in_features, out_features)
    )


class FrozenHead(Net):
    """A first stage that does not train, a buffer that it uses, a parameter that nobody uses."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.first.requires_grad_(False)
        self.register_buffer("shift", torch.arange(8.0))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x) + self.shift))


class Wide(Net):
    """Weights large enough for gradients straight into place."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, width=256)
        self.inner = nn.Linear(256, 256)

    def forward(self, x):
        return self.second(torch.tanh(self.inner(torch.tanh(self.first(x)))))


class Misfit(Net):
    """Its second layer takes another width than the first one gives."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.second = nn.Linear(9, out_features)


class Handing(nn.Module):
    """Hands a buffer on that it changes in place in every forward."""

    def __init__(self, in_features: int):
        super().__init__()
        self.line = nn.Linear(in_features, 8)
        self.register_buffer("count", torch.zeros(4000))

    def forward(self, x):
        self.count.add_(1.0)
        return torch.tanh(self.line(x)), self.count


class Handed(nn.Module):
    def __init__(self, out_features: int):
        super().__init__()
        self.line = nn.Linear(8, out_features)

    def forward(self, given):
        x, count = given
        return self.line(x) * count[-1]


def counted_row(in_features: int, out_features: int) -> nn.Sequential:
    """What a stage has sent is changed before it has been taken."""
    return nn.Sequential(Handing(in_features), Handed(out_features))


class Adding(nn.Module):
    """Changes what it gets in place, without saying so by an attribute."""

    def __init__(self):
        super().__init__()
        self.line, self.bias = nn.Linear(8, 8), nn.Parameter(torch.ones(8))

    def forward(self, x):
        x += self.bias
        return self.line(x)


def adding_row(in_features: int, out_features: int) -> nn.Sequential:
    """Every cut is before a layer that works in place."""
    return nn.Sequential(nn.Linear(in_features, 8), *[Adding() for _ in range(7)], nn.Linear(8, out_features))


class HookedRow(nn.Sequential):
    """What it gives is changed by a hook on the whole row."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(nn.Linear(in_features, 8), nn.Tanh(), nn.Linear(8, out_features))
        self.register_forward_hook(lambda module, given, found: 3 * found)


def inner_hooked_row(in_features: int, out_features: int) -> nn.Sequential:
    """A row in a row, with a hook on its backward."""
    inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    inner.register_full_backward_hook(lambda module, of_inputs, of_outputs: (2 * of_inputs[0],))
    return nn.Sequential(nn.Linear(in_features, 8), nn.Tanh(), inner, nn.Linear(8, out_features))


class Moving(nn.Module):
    """Moves a mean on in each forward, in place or not."""

    def __init__(self, in_place: bool = True):
        super().__init__()
        self.line, self.in_place = nn.Linear(8, 8), in_place
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        if self.in_place:
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        else:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return torch.tanh(self.line(x)) + self.mean.clone()


def averaged_row(in_features: int, out_features: int) -> nn.Sequential:
    """A layer in the middle changes a buffer."""
    ends = nn.Linear(in_features, 8), nn.Linear(8, out_features)
    return nn.Sequential(ends[0], nn.Tanh(), Moving(), nn.Tanh(), nn.Linear(8, 8), ends[1])


def moving_row(in_features: int, out_features: int, in_place: bool = True) -> nn.Sequential:
    """One layer stands twice, and changes a buffer."""
    twice = Moving(in_place)
    return nn.Sequential(nn.Linear(in_features, 8), twice, nn.Linear(8, 8), twice, nn.Linear(8, out_features))


class Peeking(nn.Linear):
    """Uses a weight that it has not registered."""

    def __init__(self, other: nn.Linear):
        super().__init__(128, 128)
        self.others = [other.weight]

    def forward(self, x):
        return super().forward(x) * self.others[0].mean()


def peeking_row(in_features: int, out_features: int, own: bool = False) -> nn.Sequential:
    """A layer uses the weight of the first one, or its own once more, from a list."""
    first = nn.Linear(in_features, 128)
    layer = Peeking(first)
    if own:
        layer.others = [layer.weight]
    return nn.Sequential(first, nn.Tanh(), layer, nn.Tanh(), nn.Linear(128, out_features))


class Filling2(nn.Module):
    """Has one operator less in evaluation; fills zeros in the shape of what another stage gave."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.first, self.second, self.last = (
            nn.Linear(in_features, 8),
            nn.Linear(8, 8),
            nn.Linear(8, out_features),
        )

    def forward(self, x):
        first = self.first(x)
        second = self.second(torch.tanh(first * 1.5 if self.training else first))
        filled = torch.zeros_like(first)
        filled.add_(second)
        return self.last(filled)


class WithTable(nn.Module):
    """A table of the whole model that its layers keep, and no layer has registered."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.register_buffer("table", torch.linspace(0.0, 1.0, 8 * 1000).view(1000, 8))
        self.first, self.last = nn.Linear(in_features, 8), nn.Linear(8, out_features)
        self.inner = nn.ModuleList([Looking(self.table) for _ in range(3)])

    def layers(self):
        return [self.first, *self.inner, self.last]

    def forward(self, x):
        for layer in self.layers():
            x = layer(x)
        return x


class Looking(nn.Module):
    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.line, self.table = nn.Linear(8, 8), table

    def forward(self, x):
        return torch.tanh(self.line(x)) + self.table[: len(x)]


class Constant(nn.Module):
    """Gives out a tensor of its own."""

    def __init__(self):
        super().__init__()
        self.line, self.table = nn.Linear(5, 2), torch.arange(3.0)

    def forward(self, x):
        return self.line(x), self.table


class Generating(nn.Module):
    """Draws from a generator of its own."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.first, self.second = nn.Linear(in_features, 8), nn.Linear(8, out_features)
        self.generator = torch.Generator()

    def forward(self, x):
        h = self.first(x)
        return self.second(h + torch.randn(h.shape, generator=self.generator))


class Shaped(nn.Module):
    """Begins with a view."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.first, self.second = nn.Linear(in_features, 8), nn.Linear(8, out_features)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x.flatten(1))))


class Shifting(Shaped):
    """Computes before its first weight."""

    def forward(self, x):
        return self.second(torch.tanh(self.first(torch.cumsum(x, 1) - x.std())))


class Squash(nn.Module):
    """Keeps three times what it gets for its backward."""

    def __init__(self):
        super().__init__()
        self.scale, self.drop = nn.Parameter(torch.ones(1)), nn.Dropout(0.1)

    def forward(self, x):
        return self.drop(torch.tanh(self.scale * x))


class Inflate(nn.Module):
    """Many numbers of few."""

    def __init__(self, in_features: int, width: int):
        super().__init__()
        self.line, self.width = nn.Linear(in_features, 64), width

    def forward(self, x):
        return self.line(x).repeat(1, self.width // 64)


class Deflate(nn.Module):
    """Few numbers of many."""

    def __init__(self, out_features: int):
        super().__init__()
        self.line = nn.Linear(64, out_features)

    def forward(self, x):
        return self.line(x.unflatten(1, (-1, 64)).mean(dim=1))


def inflated_row(in_features: int, out_features: int, width: int = 2**19) -> nn.Sequential:
    """Few weights, and very much to keep between forward and backward."""
    squashing = [Squash() for _ in range(22)]
    return nn.Sequential(Inflate(in_features, width), *squashing, Deflate(out_features))


class Clashing(nn.Module):
    """Its operators have names that a dataset may have."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(in_features, 5), nn.Linear(5, 5), nn.Linear(5, out_features)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.c(torch.sin(self.b(h)) + h + x)


class Averaging(nn.Module):
    """Takes the mean over as many inputs as there are."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(1, 8), nn.Linear(8, 8), nn.Linear(8, out_features)

    def forward(self, x):
        h = torch.tanh(self.b(torch.tanh(self.a(x.unsqueeze(-1)))))
        return self.c(h.sum(1) / x.shape[1])


def frozen_start(in_features: int, out_features: int) -> nn.Sequential:
    """A first stage that trains nothing."""
    n = in_features
    row = nn.Sequential(nn.Linear(n, n), nn.Tanh(), nn.Linear(n, n), nn.Tanh(), nn.Linear(n, out_features))
    row[0].requires_grad_(False)
    return row


class Collector(nn.Module):
    """Collects a term of the loss; has a table that is made anew where it is too short."""

    total = None

    def __init__(self):
        super().__init__()
        self.table = torch.linspace(0.0, 1.0, 3)

    def forward(self, x):
        if len(self.table) < x.shape[1]:
            self.table = torch.linspace(0.0, 1.0, x.shape[1])
        return x + self.table


class Collected(nn.Linear):
    def __init__(self, n: int, common: Collector, way: str):
        super().__init__(n, n)
        self.common, self.way = common, way

    def forward(self, x):
        x = torch.tanh(self.common(super().forward(x)))
        if self.way == "set":
            self.common.total = x.square().mean()
        elif self.way == "add":
            x = x + (0.0 if self.common.total is None else self.common.total)
        return x


def collecting_row(in_features: int, out_features: int, told: bool) -> nn.Sequential:
    """All have one module, with a table; where `told`, the last but one uses what the first has put there."""
    common, n = Collector(), in_features
    ways = ["set" if told else "", "", "", "add" if told else ""]
    return nn.Sequential(*(Collected(n, common, way) for way in ways), nn.Linear(n, out_features))


@lru_cache
def ramp(n: int) -> torch.Tensor:
    """A table that is made once."""
    return torch.linspace(0.0, 1.0, n)


class Cached(nn.Module):
    """Uses tables that Python keeps."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(in_features, 8), nn.Linear(8, 8), nn.Linear(8, out_features)

    @staticmethod
    @lru_cache
    def rows(n: int) -> torch.Tensor:
        return torch.arange(float(n))[:, None] * 0.1

    def forward(self, x):
        h = torch.tanh(self.a(x)) + ramp(8)
        return self.c(torch.tanh(self.b(h)) * ramp(8) + self.rows(len(x)))


class HalfAtEnd(nn.Module):
    """One stage has a weight of half precision."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(in_features, 8), nn.Linear(8, 8), nn.Linear(8, out_features)
        self.scale = nn.Parameter(torch.ones(8).half())

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))) * self.scale.float())


class Skipping(nn.Module):
    """Leaves out layers by Python's random numbers."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.a, self.c = nn.Linear(in_features, 8), nn.Linear(8, out_features)
        self.inner = nn.ModuleList(nn.Linear(8, 8) for _ in range(8))

    def forward(self, x):
        x = torch.tanh(self.a(x))
        for layer in self.inner:
            if random.random() < 0.5 or np.random.rand() < 0.5:
                x = x + torch.tanh(layer(x))
        return self.c(x)


class Hooked(nn.Module):
    """Takes what a hook has put aside."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.a, self.b, self.found = nn.Linear(in_features, 8), nn.Linear(8, out_features), []
        self.a.register_forward_hook(lambda module, given, found: self.found.append(found))

    def forward(self, x):
        self.found.clear()
        y = self.b(torch.tanh(self.a(x)))
        return y + self.found[0][:, :1]


class Keeps(nn.Module):
    """Keeps something from call to call, and computes by it or not; or tells it by what it makes."""

    def __init__(self, in_features: int, out_features: int, what: str):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(in_features, 8), nn.Linear(8, 8), nn.Linear(8, out_features)
        self.what, self.mean, self.scale, self.means, self.late = what, torch.zeros(8), 1.0, [], None
        self.length, self.table, self.seen = 0, None, []

    def forward(self, x):
        h = torch.tanh(self.a(x))
        mean = h.detach().mean(0)
        if self.what == "replaced":
            self.mean = 0.9 * self.mean + 0.1 * mean
            h = h - self.mean
        elif self.what == "changed":
            h = h - self.mean.mul_(0.9).add_(0.1 * mean)
        elif self.what == "number":
            self.scale = 0.9 * self.scale + 0.1 * h.detach().abs().mean().item()
            h = h / self.scale
        elif self.what == "listed":
            self.means = [*self.means, mean][-3:]
            h = h - sum(self.means)
        elif self.what == "given":
            before, self.late = self.late, x.detach()
            h = h if before is None else h + before[:, :1]
        elif self.what == "made":
            if self.late is None:
                self.late = nn.Linear(8, 8)
            h = self.late(h)
        elif self.what == "table":
            if h.shape[1] > self.length:
                self.length = h.shape[1]
                self.table = torch.cos(torch.arange(self.length) * 0.1)
            h = h * self.table
        elif self.what == "log":
            self.seen.append(h)
            self.late = x
            self.mean, self.term = 0.9 * self.mean + 0.1 * mean, h.square().mean()
            h = h + self.term
        else:
            with torch.inference_mode():
                mean = self.b(h)
            h = h + mean.clone()
        return self.c(torch.tanh(self.b(h)))


class InTurn(nn.Module):
    """Computes something else in each call by what is no plain attribute; or only tells of it."""

    def __init__(self, in_features: int, out_features: int, what: str):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(in_features, 8), nn.Linear(8, 8), nn.Linear(8, out_features)
        self.what, self.turns, self.own = what, itertools.count(), random.Random(3)
        self.notes = types.SimpleNamespace(calls=0, seen=[])

    def forward(self, x):
        h = torch.tanh(self.a(x))
        if self.what == "iterator" and next(self.turns) % 2:
            h = torch.relu(h)
        elif self.what == "object":
            self.notes.calls += 1
            h = h / self.notes.calls
        elif self.what == "generator":
            h = h * self.own.random()
        elif self.what == "tensor of a number":
            h = h * torch.tensor(float(next(self.turns)))
        elif self.what == "told":
            self.notes.seen.append(h.detach().mean())
            self.notes.calls = torch.stack(self.notes.seen).mean() * len(self.notes.seen)
        elif self.what == "made once":
            self.notes.calls = self.notes.calls or next(self.turns) + 2.0
            h = h * self.notes.calls
        elif self.what == "drawn":
            h = h * (2.0 if random.random() < 2.0 else 1.0)
        return self.c(torch.tanh(self.b(h)))


class Scaled(nn.Module):
    """Uses one weight at its start and at its end."""

    def __init__(self, in_features: int, out_features: int, trained: bool):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(in_features, 8), nn.Linear(8, 8), nn.Linear(8, out_features)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8), requires_grad=trained)

    def forward(self, x):
        h = torch.tanh(self.a(x) * self.scale)
        return self.c(torch.tanh(self.b(h)) * self.scale)


class Shrinking(nn.Module):
    """Takes samples of three numbers at least."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.a, self.b = nn.Conv1d(1, 8, 3), nn.Linear(8, out_features)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x.unsqueeze(1))).mean(2))


class GivesOut(nn.Module):
    """Gives out a buffer, and a weight of its first layer, as they are."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.a, self.b = nn.Linear(in_features, 8), nn.Linear(8, 8)
        self.c, self.d = nn.Linear(8, 8), nn.Linear(8, out_features)
        self.register_buffer("anchors", torch.arange(3.0))

    def forward(self, x):
        found = self.d(torch.tanh(self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))))
        return {"y": found, "anchors": self.anchors, "codes": self.a.weight}


class Choosing(nn.Module):
    """How many rows go on depends on the numbers."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.a, self.b = nn.Linear(in_features, 8), nn.Linear(8, out_features)

    def forward(self, x):
        h = self.a(x)
        return self.b(h[h[:, 0] > -99.0])


class Deeper(nn.Module):
    """Has a layer that can't be written down."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(in_features, 8), Deciding(8, out_features)])

    def forward(self, x):
        return self.inner[1](self.inner[0](x))


class Shy(nn.Module):
    """Runs its layers in another order in eval mode."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.lines = nn.ModuleList([nn.Linear(in_features, in_features) for _ in range(4)])
        self.head = nn.Linear(in_features, out_features)

    def forward(self, x):
        for line in self.lines if self.training else reversed(self.lines):
            x = torch.tanh(line(x))
        return self.head(x)


class Overflowing(nn.Module):
    """Gives numbers that are not finite for the sample whose first input is largest."""

    def __init__(self, in_features: int, out_features: int, most: float):
        super().__init__()
        self.first, self.second, self.most = nn.Linear(in_features, 8), nn.Linear(8, out_features), most

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))) / (x[:, :1] < self.most)


class Wrong(nn.Module):
    """Its second layer does not take what the first one gives."""

    def __init__(self, in_features=6):
        super().__init__()
        self.first, self.second = nn.Linear(in_features, 8), nn.Linear(7, 1)

    def forward(self, x):
        return self.second(self.first(x) + x.sum())


class Deciding(Net):
    """Looks at values: no graph can be written down."""

    def forward(self, x):
        h = self.first(x)
        return self.second(torch.tanh(h) if float(h.sum()) > 0 else h)


class TiedLate(Net):
    """Ties two layers in its forward."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.other = nn.Linear(in_features, 8)

    def forward(self, x):
        self.other.weight = self.first.weight
        return super().forward(x) + self.other(x).sum()


class Bounding(Net):
    """Bounds all of its weights before it uses them."""

    def forward(self, x):
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.clamp_(-0.1, 0.1)
        return super().forward(x)


class KeepsByHook(Net):
    """Keeps what a layer gave by a hook that remembers the model."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.kept: dict[str, torch.Tensor] = {}
        self.first.register_forward_hook(lambda module, given, found: self.kept.update(first=found))

    def forward(self, x):
        return super().forward(x) + self.kept["first"].sum()


class ByNumpy(nn.Module):
    """Asks NumPy, in a layer or in the model's own forward."""

    def __init__(self, in_features: int, out_features: int, inside: bool = True):
        super().__init__()
        self.inside, self.last = inside, nn.Linear(8, out_features)
        self.first = Asking(in_features) if inside else nn.Linear(in_features, 8)

    def forward(self, x):
        h = self.first(x)
        return self.last(torch.tanh(h if self.inside else h / (1 + float(h.detach().numpy().std()))))


class Asking(nn.Linear):
    def __init__(self, in_features: int):
        super().__init__(in_features, 8)

    def forward(self, x):
        return super().forward(x) / (1 + float(np.asarray(x).std()))


class Bad(nn.Module):
    """Fails from a call on, the second one unless said, forward or backward; `once`: in that one alone."""

    def __init__(self, backward: bool, once: bool, call: int = 2):
        super().__init__()
        self.backward, self.once, self.call, self.calls = backward, once, call, 0

    def forward(self, x):
        self.calls += 1
        bad = self.calls == self.call if self.once else self.calls >= self.call
        if bad and not self.backward:
            raise ValueError("trouble in a layer")
        if bad:
            x = x * 1.0
            x.register_hook(self.fail)
        return x

    def fail(self, gradient):
        raise ValueError("trouble in a layer's backward")


class BadOn(nn.Module):
    """Fails in the backward of one rank."""

    def __init__(self, rank: int):
        super().__init__()
        self.rank = rank

    def forward(self, x):
        x = x * 1.0
        if x.requires_grad and MPI.COMM_WORLD.rank == self.rank:
            x.register_hook(self.fail)
        return x

    def fail(self, gradient):
        raise ValueError("own trouble")


def synced_row(in_features: int, out_features: int, rank: int) -> nn.Sequential:
    """SyncBatchNorm before what fails, in both halves."""
    halves = [[nn.Linear(n, 8), nn.SyncBatchNorm(8), BadOn(rank)] for n in (in_features, 8)]
    return nn.Sequential(*halves[0], *halves[1], nn.Linear(8, out_features))


def breaking_row(
    in_features: int,
    out_features: int,
    at: int = 0,
    backward: bool = False,
    once: bool = False,
    call: int = 2,
) -> nn.Sequential:
    """Four layers, one of them bad."""
    layers = [nn.Linear(in_features, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, out_features)]
    layers[at] = nn.Sequential(layers[at], Bad(backward, once, call))
    return nn.Sequential(*layers)


class Unbounded(torch.autograd.Function):
    """Its gradient is no number."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


class Unlimited(nn.Module):
    def forward(self, x):
        return Unbounded.apply(x)


def unlimited_row(in_features: int, out_features: int) -> nn.Sequential:
    """The first layer's gradients are no numbers; the loss is."""
    layers = [nn.Linear(in_features, 8), Unlimited(), *(nn.Linear(8, 8) for _ in range(3))]
    return nn.Sequential(*layers, nn.Linear(8, out_features))


class BreakingGraph(Net):
    """What an operator needs for its backward is changed in place."""

    def forward(self, x):
        h = torch.exp(self.first(x))
        h.add_(1)
        return self.second(torch.tanh(h))


class Reverse(torch.autograd.Function):
    """Gives gradients the other sign."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Reversing(Net):
    """Has a backward of its own."""

    def forward(self, x):
        return self.second(Reverse.apply(torch.tanh(self.first(x))))


class Hooking(Net):
    """Changes a gradient by a hook."""

    def forward(self, x):
        h = torch.tanh(self.first(x))
        if h.requires_grad:
            h.register_hook(lambda g: 2 * g)
        return self.second(h)


class HookingByAnotherName(Net):
    """The same, of one who does not say self."""

    def forward(me, x):  # noqa: N805
        h = torch.tanh(me.first(x))
        if h.requires_grad:
            h.register_hook(lambda g: 2 * g)
        return me.second(h)


class Packing(Net):
    """Keeps less of tensors for its backward, or elsewhere."""

    def __init__(self, in_features: int, out_features: int, halves: bool = True):
        super().__init__(in_features, out_features)
        self.halves = halves

    def forward(self, x):
        graph = torch.autograd.graph
        packed = graph.saved_tensors_hooks(torch.Tensor.half, torch.Tensor.float)
        with packed if self.halves else graph.save_on_cpu():
            return self.second(torch.tanh(self.first(x)))


class Adversary(Net):
    """Freezes a part of itself for a call, as who trains two models against one another does."""

    def forward(self, x):
        self.second.weight.requires_grad = False
        found = super().forward(x)
        self.second.weight.requires_grad = True
        return found


class LooksAtGradients(Net):
    def forward(self, x):
        return super().forward(x if self.first.weight.grad is None else x * 2)


class DrawsShares(Net):
    """torch's Dirichlet has a backward of its own."""

    def forward(self, x):
        return self.second(torch.distributions.Dirichlet(nn.functional.softplus(self.first(x))).rsample())


class Widening(Net):
    """Sets the default dtype for a part of its forward."""

    def forward(self, x):
        torch.set_default_dtype(torch.float64)
        factor = torch.full((1,), 1 / 3)
        torch.set_default_dtype(torch.float32)
        return self.second((torch.tanh(self.first(x)) * factor).float())


class HookingModule(Net):
    """Has a layer with a backward hook."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.first.register_full_backward_hook(lambda module, inputs, outputs: None)


def reversing_row(in_features: int, out_features: int) -> nn.Sequential:
    """Layers may have a backward of their own."""

    class Layer(nn.Module):
        def forward(self, x):
            return Reverse.apply(x)

    return nn.Sequential(
        nn.Linear(in_features, 8), Layer(), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, out_features)
    )


class Filled(nn.Module):
    """Layers write into zeros that they make, as spectral convolutions do; the state_dict says more than tensors."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.lines = nn.ModuleList([nn.Linear(in_features, 6), nn.Linear(6, 6), nn.Linear(6, 6)])
        self.last = nn.Linear(8, out_features)

    def forward(self, x):
        for line in self.lines:
            y = torch.zeros(len(x), 8)
            y[:, 1:7] = torch.tanh(line(x))
            x = y[:, 1:7]
        return self.last(y)

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        state["_metadata"] = {"made": "by a library"}
        return state


def heavy(in_features: int, out_features: int, width: int = 4096) -> nn.Sequential:
    """Four layers of 64 MiB; with gradients and Adam's moments a gibibyte in all."""
    layers = [nn.Linear(in_features, width, bias=False)]
    for _ in range(4):
        layers += [nn.Linear(width, width, bias=False), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, out_features))


def waisted(in_features: int, out_features: int, width: int = 512) -> nn.Sequential:
    """Ten broad layers and, behind the third, a narrow place."""
    layers = [nn.Linear(in_features, width), nn.ReLU()]
    for number in range(10):
        layers += [nn.Linear(width, width), nn.ReLU()]
        if number == 2:
            layers += [nn.Linear(width, 4), nn.Linear(4, width)]
    return nn.Sequential(*layers, nn.Linear(width, out_features))


class Mixing(nn.Module):
    """A linear layer whose weight autograd adds to as well; so many rows that the order of a sum shows."""

    def __init__(self, width: int):
        super().__init__()
        self.line = nn.Linear(width, width)

    def forward(self, x):
        rows = x.unsqueeze(1) * torch.linspace(0.5, 1.5, 400).unsqueeze(1)
        return (torch.tanh(self.line(rows)) @ self.line.weight).mean(dim=1)


def mixed_row(in_features: int, out_features: int) -> nn.Sequential:
    """Layers that use their weights in several ways."""
    return nn.Sequential(nn.Linear(in_features, 8), Mixing(8), Mixing(8), nn.Linear(8, out_features))


def entropic_row(in_features: int, out_features: int) -> nn.Sequential:
    """A layer at both ends and a buffer, from a stream that no seed reaches."""
    same = nn.Linear(in_features, in_features)
    with torch.no_grad():
        same.weight.copy_(torch.from_numpy(np.random.default_rng().normal(size=same.weight.shape)))
    shifts = [Shift(in_features) for _ in range(4)]
    return nn.Sequential(same, *shifts, same, nn.Linear(in_features, out_features))


class Shift(nn.Module):
    """Adds numbers that no seed reaches to what a linear layer gives."""

    def __init__(self, width: int):
        super().__init__()
        self.line = nn.Linear(width, width)
        self.register_buffer("shift", torch.from_numpy(np.random.default_rng().normal(size=width)).float())

    def forward(self, x):
        return torch.tanh(self.line(x)) + self.shift


class ChangesInput(Row):
    """Scales its input in place."""

    def forward(self, x):
        x.mul_(0.5)
        return super().forward(x)


class TwoHeads(Row):
    """The second target's head is on the first layers."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.early = nn.Linear(8, 1)

    def forward(self, x):
        first = self[1](self[0](x))
        found = first
        for layer in list(self)[2:8]:
            found = layer(found)
        return {"weight": self.early(first).squeeze(1), "y": found}


class OwnLoss(TwoHeads):
    """Adds a penalty of its own to the second output: the last stage uses a weight of the first."""

    def forward(self, x):
        found = super().forward(x)
        return {**found, "weight": found["weight"] + 0.1 * self[0].weight.square().mean()}


class Scale(nn.Module):
    """A complex weight for each frequency."""

    def __init__(self, count: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, dtype=torch.cfloat))

    def forward(self, x):
        return x * self.weight


class Spectrum(nn.Module):
    """Goes through complex numbers and back."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(in_features, 8), nn.Linear(8, 8), nn.Linear(8, out_features)
        self.scale = Scale(5)

    def forward(self, x):
        spectrum = torch.fft.rfft(torch.tanh(self.b(torch.tanh(self.a(x)))))
        return self.c(torch.fft.irfft(self.scale(spectrum), n=8))


class ReadsBuffer(Row):
    """Multiplies by a buffer: autograd keeps it."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.register_buffer("factor", torch.full((in_features,), 0.5))

    def forward(self, x):
        return super().forward(x * self.factor)


class ChangesBuffer(ReadsBuffer):
    """And changes it in every training forward."""

    def forward(self, x):
        if self.training:
            self.factor.mul_(1.1)
        return super().forward(x + 0.0)


class Counts(nn.Module):
    """Gives other numbers each time it is called."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return x * (1.0 + 0.01 * self.calls)


def counting_row(in_features: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(Counts(), *Row(in_features, out_features))


def parametrised_row(in_features: int, out_features: int) -> nn.Sequential:
    """Weights that are computed anew in every forward."""
    layers = list(Row(in_features, out_features))
    layers[3] = nn.utils.parametrizations.weight_norm(layers[3])
    return nn.Sequential(*layers)


class Again(nn.Module):
    """Computes its activations anew for the backward, and draws twice for them."""

    def __init__(self, width: int, reentrant: bool):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.3), nn.Tanh(), nn.Dropout(0.2))
        self.reentrant = reentrant

    def forward(self, x):
        return x + checkpoint(self.inner, x, use_reentrant=self.reentrant)


def again_row(in_features: int, out_features: int, width: int = 64) -> nn.Sequential:
    blocks = [Again(width, False), Again(width, True), Again(width, True), Again(width, False)]
    return nn.Sequential(
        nn.Linear(in_features, width), nn.Dropout(0.1), *blocks, nn.Linear(width, out_features)
    )


class AgainGraph(nn.Module):
    """The same, by the graph."""

    def __init__(self, in_features: int, out_features: int, width: int = 64):
        super().__init__()
        self.row = again_row(in_features, out_features, width)

    def forward(self, x):
        return self.row(x)


class Sums(nn.Module):
    def forward(self, few, last):
        return torch.stack([few.sum(1), last.mean(1)], 1)


class Gaps(nn.Module):
    """Adds every fourth number of a row, in a later stage: how torch adds them hangs on how they lie."""

    def __init__(self, in_features: int, out_features: int, width: int = 4096):
        super().__init__()
        self.first, self.back, self.head = nn.Linear(in_features, width), Sums(), nn.Linear(2, out_features)

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        return self.head(self.back(hidden[:, ::4], hidden.unflatten(1, (64, -1))[:, -1]))


class Bound(nn.Module):
    """Calls torch's function by a name of its own, where nobody sees it, and by a layer."""

    def __init__(self, in_features: int, out_features: int, width: int = 64):
        super().__init__()
        self.first, self.last = nn.Linear(in_features, width), nn.Linear(width, out_features)
        self.unseen, self.seen = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        x = own_linear(torch.tanh(self.first(x)), self.unseen.weight, self.unseen.bias)
        return self.last(torch.tanh(self.seen(torch.tanh(x))))


class Parts(nn.Module):
    """Gives a value, and a part of it that lies in its memory."""

    def __init__(self, width):
        super().__init__()
        self.line = nn.Linear(width, width)

    def forward(self, x):
        x = self.line(x) * 1.0
        return x, x[:, :2], (x[:, :4], x[:, 4:]), x


class TakesParts(nn.Module):
    """Uses all of them; changes the value in place, or not."""

    def __init__(self, width, changes):
        super().__init__()
        self.line, self.changes = nn.Linear(width, width), changes

    def forward(self, value):
        x, part, (one, other), same = value
        x = x.mul_(2.0) if self.changes else x * 2.0
        return self.line(x + same + torch.cat([other, one], 1)) + part.sum(1, keepdim=True)


def parts_row(in_features, out_features, changes=False):
    """Layers that hand on several tensors of one memory."""
    return nn.Sequential(
        nn.Linear(in_features, 8), Parts(8), TakesParts(8, changes), nn.Linear(8, out_features)
    )


class Two(nn.Module):
    """Two layers."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.first, self.second = nn.Linear(in_features, 16), nn.Linear(16, out_features)


class ChangesData(Two):
    """Keeps a mean as a codebook does."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x):
        x = torch.tanh(self.first(x))
        self.mean.data.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return self.second(x - self.mean)


class OwnGradient(Two):
    """A force: the gradient of an energy."""

    def forward(self, x):
        x = torch.tanh(self.first(x)).requires_grad_()
        (force,) = torch.autograd.grad(torch.tanh(x).sum(), x, create_graph=True)
        return self.second(x + force)


class Mapped(Two):
    def forward(self, x):
        return self.second(torch.vmap(lambda row: torch.tanh(self.first(row)))(x))


class ChangesDict(nn.Linear):
    """Changes the dictionary that it gets: a value is another, the order too, one is new."""

    def forward(self, found):
        found["h"] = torch.tanh(super().forward(found["h"])) + found["skip"]
        found["skip"] = found.pop("skip") * 0.5
        return found


class StartsDict(nn.Linear):
    def forward(self, x):
        return {"skip": x, "h": torch.tanh(super().forward(x))}


class EndsDict(nn.Linear):
    def forward(self, found):
        return super().forward(found["h"])


def changing_dict_row(in_features: int, out_features: int) -> nn.Sequential:
    """Dictionaries that the layers change go from one to the next."""
    n = in_features
    return nn.Sequential(StartsDict(n, n), *(ChangesDict(n, n) for _ in range(3)), EndsDict(n, out_features))


class Switched(nn.Module):
    """Its own `train` sets what the forward computes by, in both modes."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.first, self.last = nn.Linear(in_features, 8), nn.Linear(8, out_features)
        self.scale = 3.0

    def train(self, mode=True):
        self.scale, self.merged = (1.0 if mode else 0.5), not mode
        return super().train(mode)

    def forward(self, x):
        x = torch.tanh(self.first(x)) * self.scale
        return self.last(x + 1.0 if self.merged else x)


class MadeLate(nn.Module):
    """Makes tables when it is called first."""

    table = None

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.first, self.last = nn.Linear(in_features, 8), nn.Linear(8, out_features)

    def forward(self, x):
        if self.table is None:
            self.table = torch.arange(8.0)
        return self.last(torch.tanh(self.first(x)) * self.table)


class RegistersLate(MadeLate):
    """Registers one as a buffer."""

    def forward(self, x):
        if not hasattr(self, "other"):
            self.register_buffer("other", torch.ones(5), persistent=False)
        return super().forward(x) + self.other.sum()


def remembering_row(in_features: int, out_features: int) -> nn.Sequential:
    """Its last layer but one has the first one's weight by a function that remembers it."""
    n = in_features
    first = nn.Linear(n, n)
    weight = first.weight
    last = Remembers(lambda x: functional.linear(x, weight))
    return nn.Sequential(first, nn.Tanh(), nn.Linear(n, n), nn.Linear(n, n), last, nn.Linear(n, out_features))


def calling_row(in_features: int, out_features: int) -> nn.Sequential:
    """Its last layer but one calls the first one, by a function that remembers it."""
    row = remembering_row(in_features, out_features)
    first = row[0]
    row[4].function = lambda x: first(x)
    return row


def holding_row(in_features: int, out_features: int) -> nn.Sequential:
    """Its last layer but one reads the first one's weight, which it holds in a list."""
    row = remembering_row(in_features, out_features)
    held = [row[0]]
    row[4].function = lambda x: functional.linear(x, held[0].weight)
    return row


class Remembers(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


HELD: dict[str, nn.Module] = {}


def held_row(in_features: int, out_features: int) -> nn.Sequential:
    """The loss has it, too."""
    n = in_features
    HELD["model"] = nn.Sequential(nn.Linear(n, n), nn.Tanh(), nn.Linear(n, n), nn.Linear(n, out_features))
    return HELD["model"]


class Penalty(nn.Module):
    """A loss that adds a penalty of the model's weights by itself."""

    def __init__(self, reduction: str = "mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, found, wanted):
        penalty = sum(p.square().sum() for p in HELD["model"].parameters())
        return functional.mse_loss(found, wanted, reduction=self.reduction) + 0.01 * penalty


class Prefix(nn.Module):
    """A causal mask that is changed in place."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.into, self.out = nn.Linear(1, 8), nn.Linear(8, out_features)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encode = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        mask[:, :3] = 0.0
        return self.out(self.encode(self.into(x[..., None]), mask=mask).mean(1))


class Listing(Two):
    """Its forward does more than its layers."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        self.position = nn.Parameter(torch.zeros(16))

    def layers(self):
        return [self.first, self.second]

    def forward(self, x):
        return self.second(self.first(x) + self.position)


class Jitters(nn.Module):
    """Draws from NumPy's and Python's random numbers."""

    def forward(self, x):
        return x * (1.0 + 0.01 * np.random.rand() + 0.01 * random.random())


class Jittery(Two):
    """The same among operators."""

    def forward(self, x):
        return self.second(Jitters()(self.first(x)))


class DrawsInVain(Two):
    """The same, and nothing hangs on it."""

    def forward(self, x):
        rare = random.random() < 0.0 or np.random.rand() < 0.0
        return self.second(torch.tanh(self.first(x)) * (2.0 if rare else 1.0))


class PartJittery(nn.Module):
    """The same in a submodule."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.first, self.jitters, self.last = nn.Linear(in_features, 8), Jitters(), nn.Linear(8, out_features)

    def forward(self, x):
        return self.last(self.jitters(self.first(x)))


def jittery_row(in_features, out_features):
    """The same in a row of layers."""
    return nn.Sequential(nn.Linear(in_features, 8), Jitters(), nn.Linear(8, out_features))


class Told:
    """What layers hold together."""

    of_class: dict[str, torch.Tensor] = {}
    """Of all of them."""


NOTED: dict[str, torch.Tensor] = {}
"""Of this module."""


class Tells(nn.Linear):
    """Adds what the one before has put aside, and puts its own there; `way`: where and what."""

    def __init__(self, way: str, common, width: int = 8):
        super().__init__(width, 8)
        self.way, self.common, self.first = way, common, width != 8

    def forward(self, x):
        x = torch.tanh(super().forward(x))
        if self.way == "masks":  # the same on each rank
            self.common.setdefault("mask", torch.ones(8).cumsum(0) > 3)
            self.common["calls"] = self.common.get("calls", 0) + 1
            return x * self.common["mask"]
        before = 0.0 if self.first else self.heard()
        told = {"number": lambda: float(x.detach().sum()), "weight": self.weight.detach().sum}
        self.tell({**told, "no gradient": x.detach}.get(self.way, x.clone)())
        return x + before

    def heard(self):
        if self.way == "attribute":
            return getattr(self.common, "last", 0.0)
        if self.way == "list":
            return self.common[-1][0] if self.common else 0.0
        return self.place().get("last", 0.0)

    def tell(self, told):
        if self.way == "attribute":
            self.common.last = told
        elif self.way == "list":
            self.common.append((told, "the latest"))
        else:
            self.place()["last"] = told

    def place(self):
        return {"global": NOTED, "class": Told.of_class}.get(self.way, self.common)


def telling_row(in_features: int, out_features: int, way: str = "dict") -> nn.Sequential:
    """Layers that hand something on aside."""
    NOTED.clear()
    Told.of_class.clear()
    common = {"attribute": Told(), "list": []}.get(way, {})
    ends = Tells(way, common, in_features), nn.Linear(8, out_features)
    return nn.Sequential(ends[0], Tells(way, common), Tells(way, common), nn.Tanh(), ends[1])


def scripted_row(in_features: int, out_features: int) -> nn.Sequential:
    """A layer is a script."""
    ends = nn.Linear(in_features, 8), nn.Linear(8, out_features)
    return nn.Sequential(ends[0], torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.Tanh())), ends[1])


class Scripted(nn.Module):
    """The same inside a module."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.row = scripted_row(in_features, out_features)

    def forward(self, x):
        return self.row(x)


class CountsItself(nn.Module):
    """A counter in the model itself, ahead of its layers."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.into = nn.Linear(in_features, 8)
        self.row = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.out = nn.Linear(8, out_features)

    def forward(self, x):
        if self.training:
            self.counted()
        x = self.into(x)
        for layer in self.row:
            x = torch.tanh(layer(x))
        return self.out(x)

    def counted(self):
        self.count += 1


class AddsItself(CountsItself):
    """The same out of place, and used."""

    def forward(self, x):
        return super().forward(x + 0.01 * self.count)

    def counted(self):
        self.count = self.count + 1


class Branches(nn.Module):
    """Drops in a branch."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(8, 8)

    def forward(self, x):
        return torch.cond(
            x.sum() > 0, lambda x: functional.dropout(x, 0.3, True), lambda x: x.sin(), (self.line(x),)
        )


def branching_row(in_features: int, out_features: int) -> nn.Sequential:
    """Two layers draw so, one in each stage."""
    ends = nn.Linear(in_features, 8), nn.Linear(8, out_features)
    return nn.Sequential(ends[0], Branches(), nn.Linear(8, 8), Branches(), ends[1])


class Branching(Scripted):
    """The same inside a module."""

    def __init__(self, in_features: int, out_features: int):
        nn.Module.__init__(self)
        self.row = branching_row(in_features, out_features)


TERMS: list[torch.Tensor] = []
"""Auxiliary losses of a forward."""


class AddsTerm(nn.Linear):
    """Has an auxiliary loss."""

    def forward(self, x):
        x = super().forward(x)
        TERMS.append(x.square().mean())
        return torch.tanh(x)


class WithTerms(nn.Module):
    """The mean square, and the auxiliary losses."""

    def forward(self, output, target):
        terms = [TERMS.pop() for _ in range(len(TERMS))]
        return nn.functional.mse_loss(output, target) + sum(terms)


def adding_terms(in_features: int, out_features: int) -> nn.Sequential:
    """A layer with an auxiliary loss, in the middle."""
    ends = nn.Linear(in_features, 8), nn.Linear(8, out_features)
    return nn.Sequential(ends[0], AddsTerm(8, 8), nn.Linear(8, 8), nn.Tanh(), ends[1])


class DrawsLater(nn.Module):
    """Drops from one of its training forwards on; one that is run again counts twice, on any layout."""

    def __init__(self, since: int):
        super().__init__()
        self.calls, self.since = 0, since

    def forward(self, x):
        if self.training:
            self.calls += 1
        return functional.dropout(x, 0.5, self.training and self.calls > self.since)


def drawing_later(in_features: int, out_features: int, since: int = 2) -> nn.Sequential:
    """One such layer in each of two stages."""
    ends = nn.Linear(in_features, 8), nn.Linear(8, out_features)
    return nn.Sequential(ends[0], DrawsLater(since), nn.Linear(8, 8), DrawsLater(since), nn.Tanh(), ends[1])


SEEN: set[bytes] = set()
"""What a fickle layer has got so far."""


class Fickle(nn.Linear):
    """Gives something else for what it has seen before, of which torch knows nothing."""

    way = "none"

    def forward(self, x):
        key = x.detach().numpy().tobytes()
        first, y = key not in SEEN, super().forward(x)
        SEEN.add(key)
        if first or self.way == "none":
            return y, y
        return {"numbers": (y, y + 1), "shape": (y, y[:, :5]), "fewer": (y,)}[self.way]


class Sum(nn.Module):
    """Adds all that it gets."""

    def forward(self, values):
        return sum(values)


def fickle_row(in_features: int, out_features: int) -> nn.Sequential:
    """Two stages, cut behind a fickle layer."""
    return nn.Sequential(Fickle(in_features, 8), Sum(), nn.Linear(8, out_features))


class Spectral(nn.Module):
    """A linear layer whose weight is divided by its norm, by hand: `u` moves on in each forward, in some way."""

    def __init__(self, way: str):
        super().__init__()
        self.weight, self.way = nn.Parameter(torch.randn(8, 8)), way
        self.register_buffer("u", torch.ones(8))
        self.frozen = nn.Parameter(torch.ones(8), requires_grad=False)

    def forward(self, x):
        u = self.frozen if self.way == "parameter" else self.u
        v = functional.normalize(self.weight.t().mv(u), dim=0)
        if self.training:
            with torch.no_grad():
                new = functional.normalize(self.weight.mv(v), dim=0)
            if self.way == "numpy":
                u.numpy()[:] = new.numpy()
            elif self.way == "in place":
                u.data.copy_(new)
            else:
                u.data = new
        sigma = (u.clone() if self.way == "copied" else u).dot(self.weight.mv(v.detach()))
        return functional.linear(x, self.weight / sigma)


def spectral_row(in_features: int, out_features: int, way: str) -> nn.Sequential:
    """One in front of others."""
    row = [nn.Linear(in_features, 8), Spectral(way), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, out_features)]
    return nn.Sequential(*row)


class Turned(torch.autograd.Function):
    """The gradient times a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.factor * gradient, None


class Turning(nn.Module):
    """Turns gradients round, more and more: only they hang on the count."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, x):
        self.count += 1
        return Turned.apply(x, 0.1 * self.count)


def turning_row(in_features: int, out_features: int) -> nn.Sequential:
    """One between others."""
    return nn.Sequential(nn.Linear(in_features, 8), Turning(), nn.Linear(8, 8), nn.Linear(8, out_features))


class StackedTies(nn.Module):
    """Two weights of both stages, whose gradients torch lays into one memory in the second."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.into, self.back = nn.Linear(in_features, 8), nn.Linear(8, 8)
        self.p, self.q = nn.Parameter(torch.ones(8)), nn.Parameter(torch.full((8,), 2.0))
        self.out = nn.Linear(8, out_features)

    def forward(self, x):
        x = torch.tanh(self.into(x) * self.p * self.q)
        return self.out(self.back(x) + torch.stack([self.p, self.q]).sum(0))


class Doubling(nn.Module):
    """Gives one tensor in several places."""

    def forward(self, x: torch.Tensor):
        return {"a": x, "b": (x, None, x.detach())}


class Undoubling(nn.Module):
    """Asks which of what it gets is one object; several uses add up in it."""

    def forward(self, given):
        a, (b, _, c) = given["a"], given["b"]
        return a.cos() + b.sin() + a.tanh() + c if a is b and a is not c else 2 * a


def doubling_row(in_features: int, out_features: int) -> nn.Sequential:
    ends = nn.Linear(in_features, 16), nn.Linear(16, out_features)
    return nn.Sequential(ends[0], Doubling(), Undoubling(), nn.Linear(16, 16), ends[1])


def around(in_features: int, inner: nn.Module, out_features: int) -> nn.Sequential:
    """A row with a layer of 4 channels of 8 in its middle."""
    ends = nn.Linear(in_features, 32), nn.Linear(32, out_features)
    return nn.Sequential(ends[0], nn.Unflatten(1, (4, 8)), inner, nn.Flatten(1), ends[1])


class FreezingLater(nn.Module):
    """A convolution whose bias is frozen behind the first step of five micro-batches, called `times`."""

    def __init__(self, times: int):
        super().__init__()
        self.inner, self.times, self.count = nn.Conv1d(4, 4, 3, padding=1), times, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += self.training
        if self.count > 5:
            self.inner.bias.requires_grad_(False)
        for _ in range(self.times):
            x = self.inner(x).tanh()
        return x


def freezing_row(in_features: int, out_features: int, times: int) -> nn.Sequential:
    return around(in_features, FreezingLater(times), out_features)


class Penalised(nn.Module):
    """A convolution to whose weight or bias something else is added from the third step of five micro-batches on."""

    def __init__(self, of: str):
        super().__init__()
        self.inner, self.of, self.count = nn.Conv1d(4, 4, 3, padding=1), of, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += self.training
        x = self.inner(x)
        return x + getattr(self.inner, self.of).square().sum() if self.count > 10 else x


def penalised_row(in_features: int, out_features: int, of: str) -> nn.Sequential:
    return around(in_features, Penalised(of), out_features)


class Freezes(nn.Linear):
    """A layer that freezes its bias by its own train()."""

    def train(self, mode: bool = True):
        self.bias.requires_grad_(False)
        return super().train(mode)


class Thaws(nn.Linear):
    """Is trained from its second step on, by a count of its own train()."""

    steps = 0

    def train(self, mode: bool = True):
        self.steps += mode
        self.requires_grad_(self.steps > 1)
        return super().train(mode)


def thawing_row(in_features: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_features, 16), nn.Tanh(), Thaws(16, 16), nn.Linear(16, out_features))


class Cools(nn.Module):
    """Divides by what its own train() makes smaller."""

    def __init__(self):
        super().__init__()
        self.register_buffer("heat", torch.ones(()))

    def train(self, mode: bool = True):
        if mode and self.heat is not None:
            self.heat.mul_(0.8)
        return super().train(mode)

    def forward(self, x):
        return x / self.heat


class Replaces(Cools):
    """Sets the buffer anew."""

    def train(self, mode: bool = True):
        if mode and self.heat is not None:
            self.heat = self.heat * 0.8
        return nn.Module.train(self, mode)


class Tires(nn.Linear):
    """Counts each change of its mode, and gives less by that."""

    changes = 0

    def train(self, mode: bool = True):
        self.changes += 1
        return super().train(mode)

    def forward(self, x):
        return super().forward(x) * 0.95**self.changes


def tiring_row(in_features: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_features, 16), nn.Tanh(), Tires(16, 16), nn.Linear(16, out_features))


def doubled_row(in_features: int, out_features: int) -> nn.Sequential:
    """Its forward is another one, by an attribute."""
    row = nn.Sequential(nn.Linear(in_features, 16), nn.Tanh(), nn.Linear(16, out_features))
    row.forward = types.MethodType(lambda self, x: 2 * nn.Sequential.forward(self, x), row)
    return row


class Annealed(nn.Module):
    def __init__(self, in_features: int, out_features: int, replaces: bool = False):
        super().__init__()
        cools = Replaces() if replaces else Cools()
        self.first, self.cools, self.last = nn.Linear(in_features, 16), cools, nn.Linear(16, out_features)

    def forward(self, x):
        return self.last(torch.tanh(self.cools(self.first(x))))


class FreezesByData(nn.Linear):
    """Is trained by micro-batches whose numbers say so."""

    def forward(self, x):
        self.requires_grad_(bool(x.detach().mean() > 0))
        return super().forward(x)


def freezing_by_data_row(in_features: int, out_features: int) -> nn.Sequential:
    n = 16
    return nn.Sequential(
        nn.Linear(in_features, n), nn.Tanh(), FreezesByData(n, n), nn.Tanh(), nn.Linear(n, out_features)
    )


def switching_row(in_features: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_features, 16), nn.Tanh(), Freezes(16, 16), nn.Linear(16, out_features))


class Switching(nn.Module):
    """A model whose train() freezes a part of the second stage."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.a, self.b = nn.Linear(in_features, 16), nn.Linear(16, out_features)

    def train(self, mode: bool = True):
        self.b.bias.requires_grad_(False)
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


class Positions(nn.Module):
    """Gives what it computes, and what it computed that from."""

    def __init__(self, features: int):
        super().__init__()
        self.first, self.second = nn.Linear(features, features), nn.Linear(features, 16)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.enable_grad():  # in evaluation, too
            x = self.first(x)
            return {"x": x, "h": torch.tanh(self.second(x))}


class Between(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, value: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with torch.enable_grad():
            return {**value, "h": torch.tanh(self.inner(value["h"]))}


class Forces(nn.Module):
    """Gives the gradient of an energy, by what it got; alone: of an energy that hangs on that alone."""

    def __init__(self, features: int, out_features: int, alone: bool):
        super().__init__()
        self.energy, self.own, self.out = (
            nn.Linear(16, 1),
            nn.Linear(features, 1),
            nn.Linear(features, out_features),
        )
        self.alone = alone

    def forward(self, value: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.enable_grad():
            energy = torch.tanh(self.own(value["x"])).sum()
            if not self.alone:
                energy = energy + self.energy(value["h"]).sum()
            (force,) = torch.autograd.grad(energy, value["x"], create_graph=True)
            return self.out(force) + value["h"].mean()


def forces_row(in_features: int, out_features: int, alone: bool = False) -> nn.Sequential:
    first, last = Positions(in_features), Forces(in_features, out_features, alone)
    return nn.Sequential(nn.Linear(in_features, in_features), first, Between(), Between(), last)


class Nested(nn.Module):
    """Switches gradients off inside an autocast."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.first, self.last = nn.Linear(in_features, 16), nn.Linear(16, out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        with torch.autocast("cpu", enabled=False):
            with torch.no_grad():
                scale = torch.tanh(x)
            x = x * scale
        return self.last(x)


class Thawed(nn.Module):
    """A backbone without gradients, and what is trained behind it."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.frozen = nn.Sequential(nn.Linear(in_features, 16), nn.Tanh(), nn.Linear(16, 16))
        self.inner, self.last = nn.Linear(16, 16), nn.Linear(16, out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = self.frozen(x)
        return self.last(torch.tanh(self.inner(x)))


class Rounds(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.round(4 * x) / 4

    @staticmethod
    def backward(ctx, gradient):
        return 0.5 * gradient


ROUNDED = Rounds.apply


class Rounding(nn.Module):
    """Calls a function of its own by what somebody has kept of it."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.first, self.inner, self.last = (
            nn.Linear(in_features, 16),
            nn.Linear(16, 16),
            nn.Linear(16, out_features),
        )
        self.place = torch.linspace(-1, 1, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.inner(ROUNDED(self.first(x)))))


class Placing(Rounding):
    """Adds a plain tensor of its own in place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x += self.place
        return self.last(torch.tanh(self.inner(x)))


class ByKept(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, keeper):
        ctx.keeper = keeper
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        kept = ctx.keeper.kept
        return gradient * (kept[0] if isinstance(kept, list) else kept), None


class KeepsForBackward(nn.Module):
    """Keeps a number of its forward for its backward."""

    def __init__(self, way: str):
        super().__init__()
        self.way = way
        if way == "buffer":
            self.register_buffer("kept", torch.ones(()))
        else:
            self.kept = [] if way == "list" else None
        if way == "hooks":
            self.register_full_backward_hook(lambda module, given, found: (given[0] * module.kept,))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = float(1 / (1 + x.detach().abs().max()))
        if self.way == "list":
            self.kept.clear()
            self.kept.append(scale)
            return ByKept.apply(x, self)
        if self.way == "counts":  # and nothing hangs on that
            self.kept = (self.kept or 0) + 1
            return checkpoint(self.counted, x, use_reentrant=False)
        if self.way == "table":  # which all calls may use
            self.kept = torch.arange(1.0, 17.0) if self.kept is None else self.kept
            return checkpoint(lambda x: x * self.kept, x, use_reentrant=False)
        if self.way == "shape":  # the same in each micro-batch
            self.kept = tuple(x.shape[1:]), 1 / x.size(1)
            return checkpoint(lambda x: x * self.kept[1], x, use_reentrant=False)
        if self.way == "buffer":
            with torch.no_grad():
                self.kept.mul_(0.9).add_(0.1 * x.abs().max())
            return ByKept.apply(x, self)
        if self.way == "again":  # before it is read
            return checkpoint(self.mask_and_use, x, use_reentrant=False)
        if self.way == "removes":
            x = x * 1
            if x.requires_grad:
                self.kept = x.register_hook(lambda gradient: (self.kept.remove(), gradient * scale)[1])
            return x
        self.kept = scale
        return ByKept.apply(x, self) if self.way == "attribute" else torch.tanh(x)

    def mask_and_use(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = x.detach() > 0
        return x * self.kept

    def counted(self, x: torch.Tensor) -> torch.Tensor:
        self.kept += 1  # again for the backward
        return torch.tanh(x)


def keeping_row(in_features: int, out_features: int, way: str) -> nn.Sequential:
    hidden = [nn.Linear(in_features, 16), KeepsForBackward(way), nn.Tanh(), nn.Linear(16, 16)]
    return nn.Sequential(*hidden, nn.Linear(16, out_features))


class ByParameters(torch.autograd.Function):
    """Runs a module without a graph, and again for its backward, as an adjoint method does."""

    @staticmethod
    def forward(ctx, module, x, *parameters):
        ctx.module = module
        ctx.save_for_backward(x, *parameters)
        return module(x).detach()

    @staticmethod
    def backward(ctx, gradient):
        x, *parameters = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            found = torch.autograd.grad(ctx.module(x), [x, *parameters], gradient)
        return None, *found


class ListsParameters(nn.Module):
    """Looks at its own parameters in one of the ways in which users do."""

    def __init__(self, way: str):
        super().__init__()
        self.inner, self.way = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16)), way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.way == "function":
            return ByParameters.apply(self.inner, x, *self.inner.parameters())
        if self.way == "call":
            own = {name: 0.9 * value for name, value in self.inner.named_parameters()}
            return torch.func.functional_call(self.inner, own, (x,))
        if self.way == "names":
            x = x * self.inner.state_dict(keep_vars=True)["2.bias"]
        elif self.way == "first":
            x = x.to(next(self.parameters()).dtype) * next(self.parameters()).mean()
        found = self.inner(x)
        return found + 1e-3 * sum(p.pow(2).sum() for p in self.parameters()) if self.way == "sum" else found


def listing_row(in_features: int, out_features: int, way: str) -> nn.Sequential:
    both = ListsParameters(way)
    return nn.Sequential(
        nn.Linear(in_features, 16), both, nn.Linear(16, 16), nn.Tanh(), both, nn.Linear(16, out_features)
    )


class Sets(nn.Module):
    """Sets something for all layers that follow, or sets it back."""

    def __init__(self, what: str, value: Any):
        super().__init__()
        self.what, self.value = what, value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.what == "gradients":
            torch.set_grad_enabled(self.value)
        elif self.what == "dtype":
            torch.set_default_dtype(self.value)
        elif self.what == "autocast":
            torch.set_autocast_enabled("cpu", self.value)
        return x.float()


def setting_row(in_features: int, out_features: int, what: str) -> nn.Sequential:
    values = {"gradients": (False, True), "dtype": (torch.float64, torch.float32), "autocast": (True, False)}
    on, off = (Sets(what, value) for value in values[what])
    hidden = [nn.Linear(in_features, 16), on, nn.Linear(16, 16), nn.Tanh(), off]
    return nn.Sequential(*hidden, nn.Linear(16, 16), nn.Linear(16, out_features))


class Recurs(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells = nn.LSTM(16, 16, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cells(x.unsqueeze(1))[0].squeeze(1)


class SkipsOperators(nn.Module):
    """Skips operators by Python's random numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for operator in 4 * (torch.relu, torch.tanh, torch.sigmoid):
            x = operator(x) if random.random() < 0.5 else x
        return x


class ListsOthers(nn.Module):
    """Lists layers that differ from its forward in one thing."""

    def __init__(self, in_features: int, out_features: int, what: str = ""):
        super().__init__()
        self.first, self.a, self.b = nn.Linear(in_features, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.act, self.out, self.what = nn.LeakyReLU(0.1), nn.Linear(16, out_features), what
        self.more = {"recurrent": Recurs(), "draws": SkipsOperators()}.get(what)

    def layers(self):
        more = [self.more] if self.more else []
        return [self.first, self.act, *more, self.a, self.b, self.out]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.what == "without gradients" and not self.training:
            with torch.no_grad():
                return self.out(self.b(self.a(self.act(self.first(x)))))
        if self.what == "recomputes" and self.training:
            h = self.act(self.first(x))
            for layer in (self.a, self.b):
                h = checkpoint(layer, h, use_reentrant=False)
            return self.out(h)
        h = functional.leaky_relu(self.first(x), 0.2 if self.what == "numbers" else 0.1)
        if self.more:
            h = self.more(h)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.what != "gradients"):
            h = self.a(self.b(h)) if self.what == "order" else self.b(self.a(h))
        if self.what == "cut off":
            h = h.detach()
        elif self.what == "hook" and h.requires_grad:
            h.register_hook(lambda gradient: 0.5 * gradient)
        elif self.what == "single" and len(h) == 1:
            h = 2 * h
        self.log = h.detach()
        found = self.out(h)
        return found if self.training or self.what != "evaluation" else torch.softmax(found, 1)


class Lists(nn.Module):
    """Lists its layers; with `skips` its forward adds what they leave out, with `asks` it looks at numbers."""

    def __init__(self, in_features: int, out_features: int, skips: bool = False, asks: bool = False):
        super().__init__()
        self.first, self.drop, self.out = (
            nn.Linear(in_features, 16),
            nn.Dropout(0.5),
            nn.Linear(16, out_features),
        )
        self.inner, self.skips, self.asks = nn.Linear(16, 16), skips, asks

    def layers(self):
        return [self.first, self.drop, self.inner, self.out]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x.reshape(len(x), -1))
        found = self.inner(self.drop(h))
        if self.asks and float(found.sum()) > 1e9:
            found = -found
        return self.out(found + h if self.skips else found)
