"""The default task: inputs and targets as they lie in the file.

Metrics: accuracy where a target is integers, else rmse in its own units; with several targets
one each, such as rmse_rain.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hpctrain.batch import Batch
from hpctrain.config import SAMPLE_WEIGHTS, names_to_paths
from hpctrain.errors import ConfigError, DataError
from hpctrain.loss import of_classes, pairs
from hpctrain.piece import Piece, whole
from hpctrain.task import Array, Prediction, Source, Task


class Samples(Task):
    """Inputs and targets as they are, normalised and masked where the configuration says so."""

    def prepare(self, source: Source, learn: bool) -> None:
        """Read the statistics where `data.normalize` asks for them. Collective."""
        self.source = source
        variables = source.index.variables
        self.inputs = list(names_to_paths(source.config.inputs))
        self.targets = list(names_to_paths(source.config.targets))
        self.input_shapes = {name: variables[name].shape for name in self.inputs}
        self.target_shapes = {name: variables[name].shape for name in self.targets}
        self.of_metric = {
            metric_name(name, variables[name].floating, len(self.targets)): name for name in self.targets
        }
        self.metrics = tuple(self.of_metric)
        self.higher_is_better = tuple(name for name in self.metrics if name.startswith("accuracy"))
        self.normal: dict[str, torch.Tensor] = {}
        """By variable: (mean, deviation), float64."""
        for name in dict.fromkeys(self.inputs + self.targets):
            scalable = variables[name].floating or (
                name not in self.targets and variables[name].dtype == "|u1"
            )
            if source.config.normalize and scalable:
                found = source.statistics(name) if learn else (0.0, 1.0)
                self.normal[name] = torch.tensor(found, dtype=torch.float64)

    def batch(self, samples: NDArray[np.int64]) -> Batch:
        """Read a micro-batch; NaN is refused, or in targets masked."""
        masks = self.source.config.missing == "mask"
        inputs = {name: self._tensor(name, samples, False)[0] for name in self.inputs}
        targets, weights = {}, {}
        for name in self.targets:
            targets[name], missing = self._tensor(name, samples, masks)
            if masks and targets[name].is_floating_point():
                weights[name] = (~missing).float()
        if self.source.config.weights:
            each = torch.from_numpy(self.source.read(SAMPLE_WEIGHTS, samples).astype(np.float32))
            if each.ndim != 1 or not bool((each >= 0).all()):
                worst = "" if each.ndim != 1 else f", the smallest {float(each.min()):g}"
                raise DataError(
                    f"data.weights = {self.source.config.weights}: one number >= 0 a sample "
                    f"was expected, found shape {tuple(each.shape[1:])} a sample{worst}"
                )
            for name in self.targets:
                shape = (-1,) + (1,) * (targets[name].ndim - 1)
                weights[name] = weights.get(name, torch.ones(())) * each.reshape(shape)
        return Batch(samples, inputs, targets, weights)

    def _tensor(
        self, name: str, samples: NDArray[np.int64], masks: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Values as the model gets them, and where they are missing."""
        values = self.source.read(name, samples)
        missing = np.isnan(values) if values.dtype.kind == "f" else np.zeros(1, dtype=bool)
        self.source.index.check_finite(name, samples, np.where(missing, 0, values) if masks else values)
        target = name in self.targets
        if values.dtype == np.uint8 or (target and values.dtype == np.bool_):
            values = values.astype(np.int64 if target else np.float32)
        if name in self.normal:
            mean, deviation = self.normal[name].tolist()
            values = ((values - mean) / deviation).astype(np.float32)
        tensor = torch.from_numpy(values)
        gaps = torch.from_numpy(missing)
        return (torch.nan_to_num(tensor, nan=0.0) if missing.any() else tensor), gaps

    def measure(self, outputs: Any, batch: Batch) -> dict[str, tuple[float, float]]:
        """Sums over each target: right answers, or squared error in its own units."""
        matched = {name: (output, target) for name, output, target in pairs(outputs, batch.targets)}
        return {
            metric: self._measure_one(name, *matched[name], batch.weights.get(name))
            for metric, name in self.of_metric.items()
        }

    def _measure_one(
        self, name: str, output: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None
    ) -> tuple[float, float]:
        if target.is_floating_point():
            values = (output.double() - target.double()) ** 2 * self._deviation(name) ** 2
        else:
            values = (likeliest(name, output, target) == target).double()
        each = torch.ones_like(values) if weight is None else weight.double().expand_as(values)
        return float((values * each).sum()), float(each.sum())

    def _deviation(self, name: str) -> float:
        return float(self.normal[name][1]) if name in self.normal else 1.0

    def finish(self, name: str, numerator: float, denominator: float) -> float:
        """Root of the mean square for rmse."""
        mean = super().finish(name, numerator, denominator)
        return mean**0.5 if name.startswith("rmse") else mean

    def predictions(self) -> tuple[Prediction, ...]:
        """Write floating targets as they are, classes as the logits' argmax."""
        variables = self.source.index.variables
        return tuple(
            Prediction(name, v.shape, v.units, "<f4" if v.floating else "<i8")
            for name, v in ((name, variables[name]) for name in self.targets)
        )

    def predict(self, outputs: Any, batch: Batch) -> dict[str, Array]:
        """Undo the normalisation; classes by argmax."""
        found: dict[str, Array] = {}
        for name, output, target in pairs(outputs, batch.targets):
            if not target.is_floating_point():
                found[name] = likeliest(name, output, target).cpu().numpy()
                continue
            values = output.double().cpu().numpy()
            if name in self.normal:
                mean, deviation = self.normal[name].tolist()
                values = values * deviation + mean
            found[name] = values.astype(np.float32)
        return found

    def pieces(self) -> list[Piece]:
        """Means and deviations."""
        return [whole(f"task.normal.{name}", tensor) for name, tensor in self.normal.items()]


def likeliest(name: str, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Give the class of the largest output, shaped as the target. Raises ConfigError where there are none."""
    flat, _ = of_classes(output, target)
    if output.ndim != flat.ndim + 1 or output.shape[1] < 2 or output.shape[2:] != flat.shape[1:]:
        raise ConfigError(
            f"the target {name} holds integers, so its accuracy and predictions are of classes, for which "
            f"outputs of shape (samples, classes, …) are needed, the classes second: the model gives "
            f"{tuple(output.shape)} for {tuple(target.shape)}; if {name} is no class, store it as floats"
        )
    return output.argmax(dim=1).reshape(target.shape)


def metric_name(target: str, floating: bool, targets: int) -> str:
    """Name the metric of a target.

    >>> metric_name("rain", True, 1), metric_name("rain", True, 2)
    ('rmse', 'rmse_rain')
    """
    kind = "rmse" if floating else "accuracy"
    return kind if targets == 1 else f"{kind}_{target}"
