"""Models that `bench pipeline` cuts into stages."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from hpctrain.bench import emulated


def mlp() -> nn.Sequential:
    """Eight layers of 1,024."""
    layers: list[nn.Module] = []
    for _ in range(8):
        layers += [nn.Linear(1024, 1024), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def transformer() -> nn.Sequential:
    """Eight encoder layers of width 256."""
    return nn.Sequential(
        *[nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True) for _ in range(8)]
    )


def cnn() -> nn.Sequential:
    """Eight convolutions of 32 channels: activations of 2 MiB for a micro-batch of 4."""
    layers: list[nn.Module] = [nn.Conv2d(4, 32, 3, padding=1), nn.ReLU()]
    for _ in range(7):
        layers += [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


def channels_last() -> nn.Sequential:
    """The same, weights and activations with the channels last in memory."""
    return cnn().to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


class WithForward(nn.Sequential):
    """The same layers in a forward of its own, so they are cut between operators."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Call one behind the other."""
        for layer in self:
            x = layer(x)
        return x


@dataclass(frozen=True)
class Case:
    """A model, its batch, and the number of micro-batches."""

    make: Callable[[], nn.Sequential]
    shape: tuple[int, ...]
    micro_batches: int
    peers: Callable[[], nn.Sequential] | None = None
    """What torch's pipelining gets instead, where it refuses the model."""

    @property
    def sleeps(self) -> bool:
        """Whether its layers sleep."""
        return self.make is emulated.sleepers

    def halves(self, stages: int) -> bool:
        """Whether the model has two stages for each of so many ranks."""
        layers = sum(1 for layer in self.make() if next(layer.parameters(), None) is not None)
        return layers >= 2 * stages


CASES = {
    "mlp m=8": Case(mlp, (512, 1024), 8),
    "mlp m=16": Case(mlp, (512, 1024), 16),
    "mlp m=32": Case(mlp, (512, 1024), 32),
    "transformer m=8": Case(transformer, (32, 32, 256), 8),
    "cnn m=8": Case(cnn, (32, 4, 64, 64), 8),
    # Gloo takes contiguous tensors alone, so torch's pipelining gets the plain one
    "cnn channels_last m=8": Case(channels_last, (32, 4, 64, 64), 8, peers=cnn),
    "emulated m=8": Case(emulated.sleepers, (8, 16), 8),
}
