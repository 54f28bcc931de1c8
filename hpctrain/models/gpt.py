"""A transformer that reads bytes from left to right; the embedding is the head as well.

      bytes ─ embedding ─┬─ + attention(norm) ─ + MLP(norm) ─┬─ norm ─ embedding transposed ─ logits
                         └───────────  layers times  ────────┘

(Radford et al. 2019, with the tied head of Press and Wolf 2017 and, unless positions are learnt, the
rotary ones of Su et al. 2021.)
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from hpctrain.errors import ConfigError

ROTARY_BASE = 10_000.0


class Layer(nn.Module):
    """Causal attention and an MLP, each added to its normalised input."""

    def __init__(self, width: int, heads: int, dropout: float, rotary: bool) -> None:
        """Take the numbers of channels and heads."""
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        """Map (n, t, width) to the same shape; `turn` is (2, t, width of a head), cosines and sines."""
        n, t, width = x.shape
        parts = self.attend(self.norm_attention(x)).view(n, t, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        if self.rotary:
            query, key = rotated(query, turn), rotated(key, turn)
        found = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.dropout(self.project(found.transpose(1, 2).reshape(n, t, width)))
        x = x + self.dropout(self.narrow(functional.gelu(self.widen(self.norm_mlp(x)))))
        return x


def rotated(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Turn each pair of channels (i, i + half) of (…, t, head) by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    return x * turn[0] + torch.cat([-second, first], dim=-1) * turn[1]


class GPT(nn.Module):
    """Predicts each token from those before it."""

    def __init__(
        self,
        input_shape: tuple[int],
        vocabulary: int = 257,
        width: int = 192,
        layers: int = 4,
        heads: int = 6,
        positions: Literal["rotary", "learnt"] = "rotary",
        dropout: float = 0.0,
    ) -> None:
        """Take the window's length, the number of tokens, the channels, layers and heads.

        `vocabulary` = 257 are the bytes and a mark for the beginning. `dropout` is of what attention
        and the MLP add.
        """
        super().__init__()
        if vocabulary < 1 or width < 1 or heads < 1 or layers < 0:
            raise ConfigError(
                f"model vocabulary = {vocabulary}, width = {width}, heads = {heads}, layers = {layers}: "
                f"at least 1 was expected, and no negative number of layers"
            )
        if width % (2 * heads):
            raise ConfigError(
                f"model width = {width} must be a multiple of 2 x heads = {2 * heads}: a head's channels are "
                f"turned in pairs"
            )
        if positions not in ("rotary", "learnt"):
            raise ConfigError(f"model positions = {positions!r}: rotary or learnt was expected")
        (length,) = input_shape
        rotary, head = positions == "rotary", width // heads
        self.embedding = nn.Embedding(vocabulary, width)
        self.place = None if rotary else nn.Parameter(0.02 * torch.randn(length, width))
        angles = torch.outer(torch.arange(length), ROTARY_BASE ** (-torch.arange(0, head, 2) / head)).repeat(
            1, 2
        )
        self.register_buffer("turn", torch.stack([angles.cos(), angles.sin()]), persistent=False)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(width, heads, dropout, rotary) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:  # what is added to the sum of all layers starts small, as in GPT-2
                adds = name.endswith(("project.weight", "narrow.weight"))
                nn.init.normal_(parameter, std=0.02 / ((2 * layers) ** 0.5 if adds else 1.0))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Map tokens (n, length), integers, to logits (n, vocabulary, length) of the token at each place."""
        x = self.embedding(text)
        x = self.dropout(x if self.place is None else x + self.place)
        for layer in self.layers:
            x = layer(x, self.turn)
        return self.head(self.norm(x)).transpose(1, 2)  # type: ignore[no-any-return]
