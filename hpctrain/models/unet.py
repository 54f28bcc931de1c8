"""A U-Net on a latitude x longitude map: the map is a cylinder, so convolutions go round it.

      full      ─ block ─────────────────────────────── join ─ block ─ 1x1 ─ + first guess
      1/2         └ pool ─ block ───────── join ─ block ┘
      1/4                  └ pool ─ block ┘

(Ronneberger, Fischer and Brox 2015, with circular padding in longitude and GroupNorm.)
"""

import itertools

import torch
from torch import nn
from torch.nn import functional


class Cylinder(nn.Module):
    """3 x 3 convolution that wraps round in longitude and repeats the edge at the poles."""

    def __init__(self, inputs: int, outputs: int) -> None:
        """Take the channels."""
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 3)
        self.norm = nn.GroupNorm(8, outputs)

    def forward(self, field: torch.Tensor) -> torch.Tensor:
        """Map (n, inputs, lat, lon) to (n, outputs, lat, lon)."""
        field = functional.pad(field, (1, 1, 0, 0), mode="circular")
        field = functional.pad(field, (0, 0, 1, 1), mode="replicate")
        return functional.gelu(self.norm(self.convolution(field)))


class UNet(nn.Module):
    """Corrects a first guess of a map from fields on the same grid."""

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        width: int = 16,
        depth: int = 3,
        maps: int = 8,
        fold: int = 1,
        dropout: float = 0.0,
    ) -> None:
        """Take the fields' shape (channels, lat, lon), the finest level's channels and the depth.

        `maps` position maps are learnt, for what is fixed to a place, such as mountains and
        coasts. `fold` x `fold` boxes are folded into channels first: less work a level.
        `dropout` drops whole channels of the coarsest level.
        """
        super().__init__()
        channels, lat, lon = input_shape
        self.fold = fold
        self.maps = nn.Parameter(0.1 * torch.randn(maps, lat, lon))
        widths = [width * 2**level for level in range(depth)]
        before = [(channels + maps) * fold * fold, *widths]
        self.down = nn.ModuleList(
            nn.Sequential(Cylinder(a, b), Cylinder(b, b)) for a, b in zip(before, widths)
        )
        self.up = nn.ModuleList(
            nn.Sequential(Cylinder(a + b, a), Cylinder(a, a)) for a, b in itertools.pairwise(widths)
        )
        self.dropout = nn.Dropout2d(dropout)
        self.last = nn.Conv2d(width, fold * fold, 1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, fields: torch.Tensor, first_guess: torch.Tensor) -> torch.Tensor:
        """Map fields (n, channels, lat, lon) and a first guess (n, lat, lon) to (n, lat, lon)."""
        maps = self.maps.expand(len(fields), -1, -1, -1)
        field = functional.pixel_unshuffle(torch.cat([fields, maps], dim=1), self.fold)
        levels: list[torch.Tensor] = []
        for level, block in enumerate(self.down):
            field = block(functional.avg_pool2d(field, 2) if level else field)
            levels.append(field)
        field = self.dropout(field)
        for block, skip in zip(reversed(self.up), reversed(levels[:-1])):
            field = block(torch.cat([functional.interpolate(field, scale_factor=2.0), skip], dim=1))
        return first_guess + functional.pixel_shuffle(self.last(field), self.fold)[:, 0]
