"""A task says what is made of the samples: inputs, targets, weights, metrics, baselines, maps.

`hpctrain.recipes.samples.Samples` takes them as they are; a recipe with more to do has its own.
A task is prepared once, collectively, from the training samples only; what it learnt there is
state (`pieces`) that checkpoints keep, so that a model can be used without its data.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.batch import Batch
from hpctrain.config import Data
from hpctrain.piece import Piece

Array = NDArray[Any]


@dataclass(frozen=True)
class Source:
    """What a task may ask of the data while it prepares; all calls are collective but `read`."""

    config: Data
    index: Any
    """The `hpctrain.data.index.Index`."""
    read: Callable[[str, NDArray[np.int64]], Array]
    """Samples (int64, (n,)) of a variable: (n, *shape). Local."""
    blockwise: Callable[..., NDArray[np.float64]]
    """`hpctrain.data.statistics.blockwise` over the ranks."""
    statistics: Callable[[str], tuple[float, float]]
    """Mean and deviation of a variable over the training samples."""
    axis: Callable[[str], NDArray[np.float64]]
    """A whole one-dimensional dataset of the first file, such as a grid's latitudes."""


@dataclass(frozen=True)
class Panel:
    """One map of a picture."""

    title: str
    values: Array
    """(lat, lon)"""


@dataclass(frozen=True)
class Maps:
    """Maps of one moment beside one another, with one colour bar."""

    title: str
    units: str
    panels: tuple[Panel, ...]
    longitude: Array
    latitude: Array


@dataclass(frozen=True)
class Prediction:
    """What `predict` writes for one target: values of one sample have `shape`."""

    name: str
    shape: tuple[int, ...]
    units: str = ""
    dtype: str = "<f4"
    coordinates: dict[str, tuple[Array, str]] = field(default_factory=dict)
    """Axes of `shape`, in order: name -> (values, units)."""


class Task:
    """Base of all tasks: what the loop calls. `prepare` is collective, the rest is local."""

    input_shapes: dict[str, tuple[int, ...]]
    target_shapes: dict[str, tuple[int, ...]]
    metrics: tuple[str, ...] = ()
    higher_is_better: tuple[str, ...] = ("accuracy",)
    """Metrics of which the best is the largest; of the others, and the loss, the smallest."""

    def prepare(self, source: Source, learn: bool) -> None:
        """Learn from the training samples; with learn=False a checkpoint will bring the state."""
        raise NotImplementedError

    def batch(self, samples: NDArray[np.int64]) -> Batch:
        """Read and make a micro-batch; called in the loader's thread."""
        raise NotImplementedError

    def measure(self, outputs: Any, batch: Batch) -> dict[str, tuple[float, float]]:
        """Sums of each metric over a micro-batch: {name: (numerator, denominator)}."""
        return {}

    def finish(self, name: str, numerator: float, denominator: float) -> float:
        """Turn a metric's global sums into the metric."""
        return numerator / denominator if denominator else float("nan")

    def baselines(self, samples: Callable[[], Iterable[Batch]]) -> dict[str, dict[str, tuple[float, float]]]:
        """Sums of each metric of each baseline over this rank's test batches."""
        return {}

    def predictions(self) -> tuple[Prediction, ...]:
        """Describe what `predict` writes."""
        return tuple(Prediction(name, shape) for name, shape in self.target_shapes.items())

    def predict(self, outputs: Any, batch: Batch) -> dict[str, Array]:
        """Model outputs in the units of the data: {name: (n, *shape)}."""
        raise NotImplementedError

    def maps(self, run_model: Callable[[Batch], Any]) -> Maps | None:
        """Maps of one test sample for the picture, where samples are maps."""
        return None

    def sample(self, run_model: Callable[[Batch], Any]) -> str:
        """Give what the trained model writes, where it does. Called by world rank 0 alone, as `maps` is."""
        return ""

    def pieces(self) -> list[Piece]:
        """State learnt by `prepare`."""
        return []
