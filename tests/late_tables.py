"""A file that a forward imports."""

from collections import namedtuple

import torch

TABLE = torch.linspace(0.5, 1.5, 8)
PAIR = namedtuple("PAIR", "a b")(torch.linspace(0.1, 0.3, 8), 2.0)
