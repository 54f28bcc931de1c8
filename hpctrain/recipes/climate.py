"""Downscaling: from the 8 x 8 box means of a month's temperature anomaly draw the whole map.

      coarse anomaly 9 x 12 ──► ridge field 72 x 96 ──► U-Net adds what it misses

Climatology, normalisation, ridge fit and baselines come from the training years only.
Maps are compared with weights cos(latitude): area on the sphere.
"""

from collections.abc import Callable, Iterable
from typing import Any

import cftime
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from hpctrain.batch import Batch
from hpctrain.errors import ConfigError
from hpctrain.piece import Piece, whole
from hpctrain.recipes import ridge
from hpctrain.task import Array, Maps, Panel, Prediction, Source, Task

BASELINES = ("climatology", "nearest", "bilinear", "bicubic", "ridge")
CHANNELS = 6


class Downscaling(Task):
    """Monthly maps of one variable on a regular latitude x longitude grid."""

    metrics = ("rmse_kelvin",)

    def __init__(self, latitude: str = "lat", longitude: str = "lon", box: int = 8) -> None:
        """Take the names of the grid's axes in the file, and the boxes' size in grid points."""
        self.axes, self.box = (latitude, longitude), box

    def prepare(self, source: Source, learn: bool) -> None:
        """Fit climatology, scale and ridge on the training samples. Collective."""
        self.source = source
        index = source.index
        self.name = next(iter(index.variables))
        variable = index.variables[self.name]
        self._check(variable)
        height, width = variable.shape
        self.input_shapes = {
            "fields": (CHANNELS, height, width),
            "first_guess": (height, width),
        }
        self.target_shapes = {"anomaly": (height, width)}
        self.latitude, self.longitude = (source.axis(name) for name in self.axes)
        area = np.cos(np.deg2rad(self.latitude))
        self.area = (area / area.mean())[:, None]
        self.month = months(index.coordinate, dict(index.coordinate_attributes))
        self.train = index.splits["train"]
        place = np.arange(len(self.train))
        self.fold = np.full(index.length, ridge.FOLDS)
        self.fold[self.train.samples(place)] = place * ridge.FOLDS // len(place)
        coarse = (height // self.box, width // self.box)
        neighbours = (2 * ridge.REACH + 1) ** 2
        shape = (ridge.FOLDS + 1, *coarse, neighbours, self.box**2)
        self.climatology = np.zeros((12, height, width))
        self.scale = np.ones(1)
        self.fits = np.zeros(shape, dtype=np.float32)
        if learn:
            self._learn(source, (height, width))

    def _check(self, variable: Any) -> None:
        if len(variable.shape) != 2 or any(side % self.box for side in variable.shape):
            raise ConfigError(
                f"data.task box = {self.box} must divide both sides of {variable.name}'s maps, "
                f"found shape {variable.shape}"
            )
        if self.source.index.coordinate is None:
            raise ConfigError("data.coordinate must name the time axis: the months come from it")

    def _learn(self, source: Source, shape: tuple[int, int]) -> None:
        """Three sums over the training samples, each fold's made whole by one rank."""

        def by_month(places: NDArray[np.int64]) -> Array:
            samples = self.train.samples(places)
            total = np.zeros((12, shape[0] * shape[1] + 1))
            flat = self._read(samples).reshape(len(samples), -1)
            counted = np.concatenate([flat, np.ones((len(flat), 1))], axis=1)
            np.add.at(total, self.month[samples], counted)
            return total

        length = len(self.train)
        folds = source.blockwise(length, ridge.FOLDS, (12, shape[0] * shape[1] + 1), by_month)
        total = folds.sum(axis=0)
        counts = total[:, -1:]
        if not counts.all():
            missing = [int(m) + 1 for m in np.flatnonzero(counts == 0)]
            raise ConfigError(f"data.train has no sample of month {missing}: the climatology needs all")
        self.climatology = (total[:, :-1] / counts).reshape(12, *shape)

        def squares(places: NDArray[np.int64]) -> Array:
            return np.array([(self._anomaly(self.train.samples(places)) ** 2 * self.area).sum()])

        square = source.blockwise(length, ridge.FOLDS, (1,), squares).sum(axis=0)
        self.scale = np.sqrt(square / (length * shape[0] * shape[1]))

        def products(places: NDArray[np.int64]) -> Array:
            fine = self._anomaly(self.train.samples(places))
            return ridge.sums(ridge.box_means(fine, self.box), fine, self.box)

        around = self.fits.shape[3]
        per_box = (*self.fits.shape[1:3], around, around + self.box**2)
        self.fits[:] = ridge.fit(source.blockwise(length, ridge.FOLDS, per_box, products))

    def _read(self, samples: NDArray[np.int64]) -> Array:
        values = self.source.read(self.name, samples)
        self.source.index.check_finite(self.name, samples, values)
        return values.astype(np.float64)

    def _anomaly(self, samples: NDArray[np.int64]) -> Array:
        found: Array = self._read(samples) - self.climatology[self.month[samples]]
        return found

    def batch(self, samples: NDArray[np.int64]) -> Batch:
        """Make the model's fields from the box means alone, and the target from the whole map."""
        scale = float(self.scale[0])
        fine = self._anomaly(samples) / scale
        coarse = ridge.box_means(fine, self.box)
        guess = ridge.apply(self.fits, self.fold[samples], coarse, self.box)
        fields = self._fields(samples, coarse, guess)
        return Batch(
            samples,
            {"fields": tensor(fields), "first_guess": tensor(guess)},
            {"anomaly": tensor(fine)},
            {"anomaly": tensor(self.area)[None]},
            {"coarse": coarse.astype(np.float32), "ridge": guess.astype(np.float32)},
        )

    def _fields(self, samples: NDArray[np.int64], coarse: Array, guess: Array) -> Array:
        """Six channels: bicubic, ridge, climatology, month (two), latitude."""
        month = self.month[samples]
        angle = 2.0 * np.pi * month[:, None, None] / 12.0
        spread = self.climatology.std() or 1.0  # nothing is fitted yet where only shapes are asked for
        climatology = (self.climatology - self.climatology.mean()) / spread
        height = np.sin(np.deg2rad(self.latitude))[:, None]
        bicubic = refine(coarse, self.box, "bicubic")
        parts = [bicubic, guess, climatology[month], np.sin(angle), np.cos(angle), height]
        return np.stack([np.broadcast_to(part, guess.shape) for part in parts], axis=1)

    def measure(self, outputs: Any, batch: Batch) -> dict[str, tuple[float, float]]:
        """Area-weighted squared error in K^2, and the weight."""
        return {"rmse_kelvin": self._error(outputs.cpu().numpy(), batch)}

    def _error(self, drawn: Array, batch: Batch) -> tuple[float, float]:
        truth = batch.targets["anomaly"].cpu().numpy()
        square = (np.asarray(drawn, dtype=np.float64) - truth) ** 2 * float(self.scale[0]) ** 2
        return float((square * self.area).sum()), float(len(truth) * truth.shape[2] * self.area.sum())

    def finish(self, name: str, numerator: float, denominator: float) -> float:
        """Root of the mean square."""
        return float(np.sqrt(super().finish(name, numerator, denominator)))

    def baselines(self, samples: Callable[[], Iterable[Batch]]) -> dict[str, dict[str, tuple[float, float]]]:
        """Sums of squared error of each baseline over this rank's batches."""
        total: dict[str, Array] = {name: np.zeros(2) for name in BASELINES}
        for batch in samples():
            for name in BASELINES:
                total[name] += self._error(self._baseline(name, batch), batch)
        return {name: {"rmse_kelvin": (float(a), float(b))} for name, (a, b) in total.items()}

    def _baseline(self, name: str, batch: Batch) -> Array:
        coarse = batch.extra["coarse"].astype(np.float64)
        if name == "climatology":
            return np.zeros(1)
        if name == "ridge":
            return batch.extra["ridge"].astype(np.float64)
        return refine(coarse, self.box, name)

    def predictions(self) -> tuple[Prediction, ...]:
        """One map of temperature a month."""
        axes = {
            self.axes[0]: (self.latitude, "degrees_north"),
            self.axes[1]: (self.longitude, "degrees_east"),
        }
        variable = self.source.index.variables[self.name]
        return (Prediction(self.name, variable.shape, variable.units, coordinates=axes),)

    def predict(self, outputs: Any, batch: Batch) -> dict[str, Array]:
        """Anomaly back to kelvin."""
        anomaly = outputs.double().cpu().numpy() * float(self.scale[0])
        values = anomaly + self.climatology[self.month[batch.samples]]
        return {self.name: values.astype(np.float32)}

    def maps(self, run_model: Callable[[Batch], Any]) -> Maps | None:
        """The first test month: input, bicubic, prediction, truth, as anomalies."""
        split = self.source.index.splits.get("test") or self.train
        batch = self.batch(split.samples(np.arange(1)))
        scale = float(self.scale[0])
        coarse = batch.extra["coarse"].astype(np.float64)
        drawn = {
            f"input: {self.box} × {self.box} box means": refine(coarse, self.box, "nearest"),
            "bicubic": refine(coarse, self.box, "bicubic"),
            "hpctrain": run_model(batch).double().cpu().numpy(),
            "truth": batch.targets["anomaly"].numpy(),
        }
        panels = tuple(Panel(title, values[0] * scale) for title, values in drawn.items())
        units = self.source.index.variables[self.name].units
        title = f"anomaly of {self.name}, {self._date(int(batch.samples[0]))}"
        return Maps(title, units, panels, self.longitude, self.latitude)

    def _date(self, sample: int) -> str:
        index = self.source.index
        attributes = dict(index.coordinate_attributes)
        date = cftime.num2date(
            index.coordinate[sample], attributes["units"], attributes.get("calendar", "standard")
        )
        return f"{date.year:04d}-{date.month:02d}"

    def pieces(self) -> list[Piece]:
        """Climatology, scale and ridge coefficients: enough to use the model without the data."""
        state = {"climatology": self.climatology, "scale": self.scale, "fits": self.fits}
        return [whole(f"task.{name}", torch.from_numpy(value)) for name, value in state.items()]


def tensor(values: NDArray[Any]) -> torch.Tensor:
    """Give an array as a float32 tensor."""
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def months(time: Array, attributes: dict[str, str]) -> NDArray[np.int64]:
    """Month 0 … 11 of each sample from a CF time axis."""
    units = attributes.get("units", "")
    if " since " not in units:
        raise ConfigError(f"data.coordinate must be a CF time axis, found units {units!r}")
    dates = cftime.num2date(time, units, attributes.get("calendar", "standard"))
    return np.array([date.month - 1 for date in np.atleast_1d(dates)], dtype=np.int64)


def refine(coarse: Array, size: int, mode: str) -> Array:
    """Interpolate (n, h, w) to (n, h*size, w*size), round the globe: nearest, bilinear, bicubic."""
    padded = functional.pad(torch.from_numpy(coarse)[:, None], (2, 2, 0, 0), mode="circular")
    corners = {} if mode == "nearest" else {"align_corners": False}
    fine = functional.interpolate(padded, scale_factor=float(size), mode=mode, **corners)
    found: Array = fine[:, 0, :, 2 * size : -2 * size].numpy()
    return found
