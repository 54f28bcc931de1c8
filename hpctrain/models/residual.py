"""A small residual network for images, with GroupNorm: no statistics of the batch.

(He, Zhang, Ren and Sun 2016; Wu and He 2018.)
"""

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """Two 3 x 3 convolutions added to their input."""

    def __init__(self, width: int) -> None:
        """Take the channels."""
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(2))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Map (n, width, h, w) to the same shape."""
        inner = functional.gelu(self.norms[0](self.first(image)))
        return functional.gelu(image + self.norms[1](self.second(inner)))


class ResidualNet(nn.Module):
    """Classifies grey images (n, h, w)."""

    def __init__(self, classes: int, width: int = 32, blocks: int = 2, dropout: float = 0.1) -> None:
        """Take the number of classes, the channels, the blocks a resolution and the dropout."""
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.fine = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.wider = nn.Conv2d(width, 2 * width, 2, stride=2)
        self.coarse = nn.Sequential(*(Block(2 * width) for _ in range(blocks)))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Map (n, h, w) to the classes' logits (n, classes)."""
        field = self.fine(functional.gelu(self.stem(image[:, None])))
        field = self.coarse(functional.gelu(self.wider(field)))
        return self.head(self.dropout(field.mean(dim=(2, 3))))  # type: ignore[no-any-return]
