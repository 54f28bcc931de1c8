"""The default learning-rate schedule; any torch scheduler may stand in its place."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(step: int, total_steps: int, warmup: float, final: float) -> float:
    """Factor on the learning rate at a step: linear warm-up, then half a cosine to `final`.

    The cosine is that of Loshchilov and Hutter 2017 (SGDR), without restarts.

    >>> [round(warmup_cosine(k, 8, 0.25, 0.0), 3) for k in range(9)]
    [0.5, 1.0, 1.0, 0.933, 0.75, 0.5, 0.25, 0.067, 0.0]
    """
    rising = math.ceil(warmup * total_steps)
    if step < rising:
        return (step + 1) / rising
    share = min(1.0, (step - rising) / max(1, total_steps - rising))
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * share))


class WarmupCosine(LambdaLR):
    """Linear warm-up over a share of the steps, then half a cosine."""

    def __init__(
        self, optimizer: Optimizer, total_steps: int, warmup: float = 0.1, final: float = 0.0
    ) -> None:
        """Take all steps of the run, the share that warms up, and the last factor."""
        super().__init__(optimizer, lambda step: warmup_cosine(step, total_steps, warmup, final))
