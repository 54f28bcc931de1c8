"""What each rank tells the others with its step, and what a step gives."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FLAGS = ("errors", "stops", "saves", "changed", "broken")
TIMES = ("reading", "other", "computing", "transfer")


@dataclass
class Flags:
    """What this rank tells the others with its step."""

    errors: int = 0
    stops: int = 0
    saves: int = 0
    changed: int = 0
    broken: int = 0
    """Its traffic with the other nodes failed: what is on its way will not arrive."""
    reading: float = 0.0
    """Seconds."""
    other: float = 0.0
    """Between the last step and this one, reading left out: rows, progress, a checkpoint."""
    computing: float = 0.0


@dataclass(frozen=True)
class Times:
    """Seconds by replica; shape (replicas,) each."""

    reading: NDArray[np.float64]
    other: NDArray[np.float64]
    """Between two steps: rows, progress, validation, checkpoints."""
    computing: NDArray[np.float64]
    """Forward and backward, to the moment when the last bucket was full."""
    waiting: NDArray[np.float64]
    """From there until the slowest was as far: it can't be seen in the length of a collective call."""
    transfer: NDArray[np.float64]
    """Averaging and update without waiting; of the step before, as this one's is not over."""


@dataclass(frozen=True)
class Result:
    """What a step gives, but for `failure` the same on all ranks."""

    weight: float
    """Global weight: the number of samples where none is masked or weighted."""
    loss: float
    """Global weighted mean."""
    norm: float
    """2-norm of the mean gradient before clipping; NaN where there was no update."""
    errors: int
    """Ranks that failed; then the weights are as before."""
    stops: int
    """Ranks that were asked to stop."""
    saves: int
    """Ranks whose clock asks for a checkpoint."""
    times: Times
    """Who waited for whom."""
    failure: Exception | None = None
    """What failed on this rank while buckets were sent; counted in `errors`."""
