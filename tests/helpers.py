"""Small data, models and configurations of the tests. Every sample differs from every other."""

import os
import time

import h5py
import numpy as np
import torch
from torch import nn

from hpctrain.config import ClassPath, Config, Data, Optimizer, Train

SAMPLES = 29


def values(count=SAMPLES, features=5, seed=3):
    """Inputs (count, features) and targets (count, 2) of a made-up law with noise."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(count, features)).astype(np.float32)
    law = random.normal(size=(features, 2))
    y = np.tanh(x @ law) + 0.1 * random.normal(size=(count, 2))
    return x, y.astype(np.float32)


def write_h5(path, **datasets):
    """Write datasets; a name may be a path with groups (a__b for a/b)."""
    with h5py.File(path, "w") as file:
        for name, data in datasets.items():
            file[name.replace("__", "/")] = data
    return str(path)


def write_samples(folder, count=SAMPLES, parts=2):
    """Write the made-up samples into several files; give the glob."""
    x, y = values(count)
    label = (np.arange(count) * 7 % 3).astype(np.uint8)
    weight = 0.5 + np.arange(count) % 4
    cuts = np.array_split(np.arange(count), parts)
    for number, cut in enumerate(cuts):
        write_h5(folder / f"part{number}.h5", x=x[cut], y=y[cut], label=label[cut], weight=weight[cut])
    return str(folder / "part*.h5")


def config_of(files, model="helpers.Net", **train):
    """A small configuration on the made-up samples."""
    settings = {"batch": 8, "steps": 6, "seed": 5, **train}
    return Config(
        data=Data(files=files, inputs=["x"], targets=["y"]),
        model=ClassPath(model, {}),
        optimizer=Optimizer(init_args={"lr": 1e-2}),
        train=Train(**settings),
    )


class Net(nn.Module):
    """Two layers."""

    def __init__(self, in_features: int, out_features: int, width: int = 8):
        super().__init__()
        self.first = nn.Linear(in_features, width)
        self.second = nn.Linear(width, out_features)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Dropping(Net):
    """Dropout: its masks must not depend on the ranks."""

    def forward(self, x):
        return self.second(nn.functional.dropout(torch.tanh(self.first(x)), 0.5, self.training))


class Slow(Dropping):
    """Takes the time that the environment asks for, so that a test can meet it at work."""

    def forward(self, x):
        time.sleep(float(os.environ.get("SLOW", "0")))
        return super().forward(x)


class SlowMeasured(nn.Sequential):
    """The same, where it is measured; in stages, too."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(nn.Linear(in_features, 8), SleepsMeasured(), nn.Linear(8, out_features))


class SleepsMeasured(nn.Module):
    def forward(self, x):
        if not self.training:
            time.sleep(float(os.environ.get("SLOW", "0")))
        return torch.tanh(x)


class Normed(Net):
    """BatchNorm: its statistics must be those of one process."""

    def __init__(self, in_features: int, out_features: int, momentum: float | None = 0.1):
        super().__init__(in_features, out_features)
        self.norm = nn.BatchNorm1d(2, momentum=momentum)

    def forward(self, x):
        inner = self.first(x).unflatten(1, (2, 4))  # several values a channel even of one sample
        return self.second(self.norm(inner).flatten(1))


class Frozen(Normed):
    """The fine-tuning idiom: BatchNorm stays in eval mode while the rest trains."""

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self


class Idle(Normed):
    """A BatchNorm that no sample passes."""

    def forward(self, x):
        return Net.forward(self, x)


class Twice(Normed):
    """One BatchNorm called twice a forward."""

    def forward(self, x):
        inner = self.norm(self.first(x).unflatten(1, (2, 4)))
        return self.second(self.norm(inner * inner).flatten(1))


class Unseeded(Net):
    """Weights from a stream that no seed of hpctrain's reaches, other ones on each rank."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        with torch.no_grad():
            self.first.weight.copy_(torch.from_numpy(np.random.default_rng().normal(size=(8, in_features))))


class Assigned(Net):
    """A buffer that the forward replaces by a new tensor, in bfloat16."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.register_buffer("last", torch.zeros((), dtype=torch.bfloat16))

    def forward(self, x):
        if self.training:
            self.last = x.detach().sum().bfloat16()
        return super().forward(x)


class Counting(Net):
    """A buffer of the user's own that each step changes."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.last.copy_(x.detach().sum())
        return super().forward(x)


class Averaged(Counting):
    """A buffer that hangs on all micro-batches: a moving average; `way`: how it is moved on."""

    way = "moves"
    filled = False

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        found = x.detach().sum()
        if self.way == "moves":
            self.last.mul_(0.9).add_(0.1 * found)
        elif self.way == "replaces":
            self.last = 0.9 * self.last + 0.1 * found
        elif self.way == "reads":  # and overwrites it only then
            x = x + 0.0 * self.last
            self.last.copy_(found)
        elif self.way == "counts":
            self.last += 1
        elif (self.way == "sometimes" and found > 0) or (self.way == "once" and not self.filled):
            self.last.copy_(found)
            self.filled = True
        elif self.way == "named":  # by what came
            self.last = None
            name = f"last_{int(10 * found.abs()) % 3}"
            if name not in self._buffers:
                self.register_buffer(name, found.clone())
            self._buffers[name] = found.clone()
        elif self.way == "latest":  # of another shape where a micro-batch has other samples
            self.last = x.detach().clone()
        return super(Counting, self).forward(x)


class Queued(Net):
    """A buffer of which each forward overwrites a part."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.register_buffer("last", torch.zeros(2))

    def forward(self, x):
        self.last[int(x[0, 0] > 0)].copy_(x.detach().sum())
        return super().forward(x)


class Awkward(nn.Module):
    """Unused, shared, frozen, 64-bit and transposed parameters."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3, 3))
        self.shared = nn.Linear(in_features, in_features)
        self.again = self.shared
        self.frozen = nn.Linear(in_features, in_features).requires_grad_(False)
        self.turned = nn.Parameter(torch.randn(out_features, in_features).t())
        self.exact = nn.Parameter(torch.zeros(out_features, dtype=torch.float64))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        x = torch.tanh(self.again(torch.tanh(self.shared(self.frozen(x)))))
        return (x @ self.turned).double().add(self.exact).mul(self.scale).float()


class Wave(nn.Module):
    """Complex parameters."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.turn = nn.Parameter(torch.randn(in_features, out_features, dtype=torch.complex64))

    def forward(self, x):
        return (x.to(torch.complex64) @ self.turn).abs()


class Hungry(nn.Module):
    """Wants more memory than there is."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(5, 2)

    def forward(self, x):
        return self.line(x) + torch.empty(2**50)[0]


class Failing(Net):
    """Raises on the sample that `bad` names by its first value."""

    def __init__(self, in_features: int, out_features: int, bad: float):
        super().__init__(in_features, out_features)
        self.bad = bad

    def forward(self, x):
        if bool(torch.isclose(x[:, 0], torch.tensor(self.bad)).any()):
            raise RuntimeError("the user's own trouble")
        return super().forward(x)


def plain_training(config, steps, module, loss=None):
    """Train with nothing but torch on all samples, in hpctrain's order; the independent answer.

    The mean of each batch is taken at once: no micro-batches, no sums over ranks.
    """
    from hpctrain.data import order

    x, y = values()
    optimizer = torch.optim.AdamW(module.parameters(), **config.optimizer.init_args)
    losses, position = [], 0
    for _ in range(steps):
        places = order.micro_batch(position, 0, 1, config.train.batch, len(x), config.train.seed)
        optimizer.zero_grad()
        value = (loss or nn.functional.mse_loss)(
            module(torch.from_numpy(x[places])), torch.from_numpy(y[places])
        )
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
        position += len(places)
    return losses
