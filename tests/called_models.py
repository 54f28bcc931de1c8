"""Models that torch.export can't write down, and that are no rows: stages begin where the user says."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

WIDTH = 32


class Squeezed(torch.autograd.Function):
    """A tanh whose own backward halves the gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(found := torch.tanh(x))
        return found

    @staticmethod
    def backward(ctx, gradient):
        (found,) = ctx.saved_tensors
        return 0.5 * gradient * (1 - found * found)


class Choosing(nn.Module):
    """Looks at numbers: branches, counts, NumPy, shapes that hang on data, dropout in a branch."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)
        self.drop, self.calls = nn.Dropout(0.3), 0

    def forward(self, x):
        self.calls += 1
        if x.mean().item() > 0.0:
            x = self.drop(self.one(x))
        else:
            x = functional.relu(self.two(x))
        rows = x[x.sum(1) > 0]
        share = float(rows.detach().float().numpy().size) / max(1, x.numel())
        return x + share * torch.tanh(self.two(x))


class Passing(nn.Module):
    """An encoder whose layers look at numbers, skips over stages, a mask, a scale, ties; several inputs to heads."""

    def __init__(self, in_features: int, out_features: int, tied: bool = False, width: int = WIDTH):
        super().__init__()
        self.begin, self.tied = nn.Linear(in_features, width), tied
        norm = nn.Sequential(nn.Unflatten(1, (4, width // 4)), nn.BatchNorm1d(4), nn.Flatten())
        self.encoder = nn.Sequential(Choosing(width), norm, Choosing(width), nn.ReLU(inplace=True))
        self.middle = nn.ModuleDict({"a": Choosing(width), "b": nn.Linear(width, width)})
        self.scale = nn.Parameter(torch.full((width,), 0.7))
        self.register_buffer("shift", torch.linspace(-0.1, 0.1, width))
        self.last = nn.Linear(width, out_features)

    def forward(self, x):
        first = self.begin(x)
        early = self.encoder(first)
        with torch.no_grad():
            mask = early > self.shift
        found = {"value": self.middle["a"](early), "mask": mask, "none": None}
        found["value"] = functional.dropout(found["value"], 0.2, self.training) * self.scale
        value = self.middle["b"](torch.where(found["mask"], found["value"], first))
        value += early
        value = functional.linear(Squeezed.apply(value), self.middle["b"].weight) + first
        if self.tied:
            value = value + functional.linear(value, self.begin.weight.T).mean(1, keepdim=True)
        return self.last(value.view(x.shape[0], -1))


class Sharing(nn.Module):
    """Its parts tell one another something aside: a dictionary, or a weight in a plain attribute."""

    def __init__(self, in_features: int, out_features: int, way: str):
        super().__init__()
        self.begin, self.one, self.two = nn.Linear(in_features, WIDTH), Choosing(), Choosing()
        self.last = nn.Linear(WIDTH, out_features)
        notes = {}
        if way == "dictionary":
            self.one.register_forward_hook(lambda module, given, found: notes.update(value=found.mean()))
            self.two.register_forward_hook(lambda module, given, found: found + notes.get("value", 0.0))
        else:
            self.two.kept = [self.begin.weight]

    def forward(self, x):
        return self.last(self.two(self.one(self.begin(x))))


class Counting(nn.Module):
    """Scales by the number of its calls, which torch.export writes down as it was."""

    def __init__(self):
        super().__init__()
        self.line, self.count = nn.Linear(WIDTH, WIDTH), 0

    def forward(self, x):
        self.count += 1
        return self.line(x) * (1.0 + 0.1 * self.count)


class Counted(nn.Module):
    """One between others."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.begin, self.inner = nn.Linear(in_features, WIDTH), Counting()
        self.last = nn.Linear(WIDTH, out_features)

    def forward(self, x):
        return self.last(torch.tanh(self.inner(self.begin(x))))


class Twofold(nn.Module):
    """Two inputs by name, another way in evaluation, a tuple out of a layer, a default argument."""

    def __init__(self, input_shapes: dict[str, tuple[int, ...]], out_features: int):
        super().__init__()
        self.wide, self.deep = (nn.Linear(shape[-1], WIDTH) for shape in input_shapes.values())
        self.inner, self.pair, self.last = Choosing(), Pair(), nn.Linear(WIDTH, out_features)

    def forward(self, x, z, scale: float = 0.5):
        value = self.inner(self.wide(x) + scale * self.deep(z))
        left, right = self.pair(value)
        if self.training:
            left = functional.dropout(left, 0.1)
        return self.last(left + right[..., : x.size(-1)].mean(-1, keepdim=True) * z.shape[1])


class Pair(nn.Module):
    """Gives a tuple."""

    def forward(self, x):
        return (x, 2.0 * x) if x.sum() > 0 else (2.0 * x, x)


class Looped(nn.Module):
    """Goes through its cell several times, which looks at numbers or not."""

    def __init__(self, in_features: int, out_features: int, looks: bool = False):
        super().__init__()
        self.begin, self.last = nn.Linear(in_features, WIDTH), nn.Linear(WIDTH, out_features)
        self.cell = nn.Sequential(Choosing() if looks else nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        x = self.begin(x)
        for _ in range(3):
            x = torch.tanh(self.cell(x))
        return self.last(x)


class Unfollowed(nn.Module):
    """Does between the cuts what can't be followed, in one of several ways."""

    def __init__(self, in_features: int, out_features: int, way: str):
        super().__init__()
        self.begin, self.inner = nn.Linear(in_features, WIDTH), Choosing()
        self.last, self.way, self.count = nn.Linear(WIDTH, out_features), way, 0
        self.register_buffer("steps", torch.zeros(()))
        if way == "hook":
            self.register_forward_hook(lambda module, given, found: 2 * found)

    def forward(self, x):
        x = self.inner(self.begin(x))
        if (self.way == "branch" and x.mean() > 0) or (self.way == "type" and isinstance(x, torch.Tensor)):
            x = 2 * x
        elif self.way == "size":
            x = x * torch.ones(len(x), 1)
        elif self.way == "draw":
            x = x + float(np.random.rand())
        elif self.way == "count":
            self.count += 1
            x = x * self.count
        elif self.way == "kept":
            self.kept = x
        elif self.way == "buffer":
            self.steps += 1
        elif self.way == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                x = functional.linear(x, self.last.weight).float().mean() + x
        return self.last(x)


class Report(NamedTuple):
    """What a part tells."""

    value: torch.Tensor
    extra: dict


@dataclass
class Told:
    """The same."""

    value: torch.Tensor
    hidden: tuple


class Telling(nn.Module):
    """Gives an object of the user's, numbers of all kinds, and looks at numbers."""

    def __init__(self, way: str):
        super().__init__()
        self.inner, self.way = Choosing(), way

    def forward(self, x):
        y = self.inner(x)
        if self.way == "namedtuple":
            return Report(y, {"scale": 0.5, "none": None})
        if self.way == "dataclass":
            return Told(y, (2.0 * y, 3))
        return {"value": y, "numbers": [1, 2.5, True, "word", complex(1.0, -2.0)]}


class Reporting(nn.Module):
    """Uses parts of it in the next stage; makes tensors of sizes, and changes one; keeps a size by."""

    def __init__(self, in_features: int, out_features: int, way: str):
        super().__init__()
        self.begin, self.told, self.way = nn.Linear(in_features, WIDTH), Telling(way), way
        self.inner, self.last = Choosing(), nn.Linear(WIDTH, out_features)
        self.places = nn.Embedding(WIDTH, WIDTH)

    def forward(self, x):
        n, _ = x.shape
        x = self.begin(x) + self.places(torch.arange(n, device=x.device))
        told = self.told(x)
        summed = torch.zeros(WIDTH)
        summed += x.detach().mean(0)
        summed[0] = 1.0
        y = self.inner(x) + summed
        if self.way == "namedtuple":
            y = y + told.value * told.extra["scale"]
        elif self.way == "dataclass":
            y = y + told.value + told.hidden[0] * told.hidden[1]
        else:
            numbers = told["numbers"]
            y = y + told["value"] * numbers[0] * numbers[1] + numbers[2] * (y * numbers[4]).real
        y += torch.ones(n, 1) * torch.rand(n, 1)
        return self.last(y)


class Unsaid(nn.Module):
    """Does between the cuts what would be done once, or asks what stand-ins can't say."""

    def __init__(self, in_features: int, out_features: int, way: str):
        super().__init__()
        self.begin, self.inner, self.way = nn.Linear(in_features, WIDTH), Choosing(), way
        self.last, self.aside = nn.Linear(WIDTH, out_features), nn.Sequential(nn.Dropout(0.5), Choosing())
        self.rng, self.silent = np.random.default_rng(1), Silent()

    def forward(self, x):
        x = self.begin(x)
        if self.way == "mode":
            self.aside.eval()
            x = self.aside(x)
            self.aside.train(self.training)
        elif self.way == "frozen":
            self.inner.requires_grad_(False)
        x = self.inner(x)
        if self.way == "frozen":
            self.inner.requires_grad_(True)
        elif self.way == "read":
            x = x * self.inner.calls
        elif self.way == "early":
            x = x * self.inner.calls.expand(3)
        elif self.way == "parameters":
            with torch.no_grad():
                x = x + sum(p.square().sum() for p in self.inner.parameters())
        elif self.way == "moving":
            with torch.no_grad():
                for p in self.inner.parameters():
                    p.mul_(0.99)
        elif self.way == "generator":
            x = x * self.rng.random()
        elif self.way == "swallowed":
            try:
                x = x * len(x)
            except Exception:
                x = x + 1
        elif self.way == "dtype":
            x = x * 2 if x.dtype is torch.float32 else x
        elif self.way == "key":
            x = x * {torch.float32: 2.0}.get(x.dtype, 1.0)
        elif self.way == "tensor":
            x = x * 2 if torch.is_tensor(x) else x
        elif self.way == "noted":
            x.scale = 2.0
        elif self.way == "data":
            self.inner.one.weight.data.clamp_(-0.05, 0.05)
        elif self.way == "hooks":
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t):
                x = torch.tanh(self.aside(x))
        elif self.way == "reentrant":
            x = checkpoint(self.aside, x, use_reentrant=True)
        elif self.way == "none":
            x = x if self.silent(x) is None else 2 * x
        return self.last(x)


class Silent(nn.Module):
    """Gives nothing."""

    def forward(self, x):
        return None


class Returning(nn.Module):
    """A module gives back what it got, and both are used behind the cut."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.begin, self.same = nn.Linear(in_features, WIDTH), nn.Identity()
        self.inner, self.last = Choosing(), nn.Linear(WIDTH, out_features)

    def forward(self, x):
        x = torch.tanh(self.begin(x))
        again = self.same(x)
        return self.last(self.inner(x) * 0.3 + again * 0.7 + x * 0.1)


class Stored(nn.Module):
    """Gives a dictionary, or changes one that it gets."""

    def forward(self, x, found=None):
        if x.isnan().any().item():
            raise ValueError("not a number")
        if found is None:
            return {"value": torch.tanh(x), "none": None}
        found["value"] = found["value"] + x
        return 0.9 * x


class Given(nn.Module):
    """Gives what it got, or a view of it, where nobody sees that; changes in place what it gets."""

    def __init__(self, way: str):
        super().__init__()
        self.way = way

    def forward(self, x):
        if x.isnan().any().item():
            raise ValueError("not a number")
        if self.way == "changes":
            return x.mul_(0.5)
        return x.view_as(x) if self.way == "view" else x


class Skipping(nn.Module):
    """Four parts; what the first makes is used by some of the others, in one of several ways."""

    def __init__(self, in_features: int, out_features: int, way: str):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(in_features, WIDTH), Choosing(), Choosing(), Choosing()
        self.way, self.same, self.last = way, nn.Identity(), nn.Linear(WIDTH, out_features)
        self.given = Given("view" if way in ("view", "changed") else "same")
        self.late, self.stored, self.store = Given("changes"), Stored(), Stored()
        self.twice, self.relu = nn.Sequential(nn.Identity(), nn.Identity()), nn.ReLU(inplace=True)
        self.register_buffer("mean", torch.linspace(-0.1, 0.1, WIDTH))

    def forward(self, x):
        first = self.a(x)
        wide = torch.tanh(first)
        other = first
        if self.way == "identity":
            other = self.same(first)
        elif self.way in ("given", "once", "view", "changed"):
            other = self.given(first)
        if self.way in ("straight", "identity", "given", "view", "changed"):
            third = self.c(self.b(first)) + (self.late(other) if self.way == "changed" else other)
            return self.last(self.d(third) + first * 0.3 + wide)
        if self.way == "once":
            return self.last(self.d(self.c(self.b(first))) + other)
        if self.way == "inplace":
            side = other = first * 0.9
            second = self.b(first)
            side += second
            third = self.c(second) + side
            side += third
            return self.last(self.d(third) + side + other + wide + x.mean(1, keepdim=True))
        if self.way == "tree":
            found = {"two": [wide, first], "one": first[:, : WIDTH // 2]}
            second = self.c(self.b(first))
            return self.last(self.d(second + found["two"][1]) + found["one"].repeat(1, 2))
        if self.way == "parts":  # taken twice, and nothing gives what it got
            found = self.stored(first)
            second = self.b(found["value"]) + found["value"]
            return self.last(self.d(self.c(second) * found["value"]) + found["value"])
        if self.way == "set":
            found = self.stored(first)
            second = self.b(found["value"])
            found["value"] = found["value"] * 0.5 + second
            found["new"] = 0.5 * second
            return self.last(self.d(self.c(second)) + found["value"] + found["new"])
        if self.way == "stores":
            found = self.stored(first)
            second = self.store(self.b(first), found)
            return self.last(self.d(self.c(second)) + found["value"])
        if self.way == "shape":
            side = first * 0.9
            second = self.b(first)
            side.unsqueeze_(1)
            third = self.d(self.c(second))
            return self.last(third + side.squeeze(1) + side.shape[1])
        if self.way == "relu":
            side = first * 0.9
            second = self.b(first)
            same = self.relu(side)
            return self.last(self.d(self.c(second) + same) + side)
        if self.way == "names":
            side = first * 0.9
            same = self.twice(side)
            second = self.b(first)
            second = second + same
            same += second
            return self.last(self.d(self.c(second)) + side)
        if self.way == "slice":
            part = first[:, 1:20]
            third = self.d(self.c(self.b(first)))
            third += 1.0
            return self.last(third + part.sum() + part.expand(3, -1, -1).sum())
        if self.way == "anew":
            side = first * 0.9
            part = side.view(-1, WIDTH)
            side += 1.0
            second = self.b(side) + side
            return self.last(self.d(self.c(second) * part) * side)
        if self.way == "buffer":
            mean = self.mean.detach()
            second = self.c(self.b(first)) + mean
            with torch.no_grad():
                mean.mul_(0.9)
            return self.last(self.d(second))
        second = self.b(first)  # which the third part needs nothing of
        return self.last(self.d(self.c(wide)) + second)
