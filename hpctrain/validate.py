"""Validation over all ranks, exact to the sample; early stopping and the best checkpoint."""

import math
from collections.abc import Callable, Iterator

from hpctrain.assemble import Job
from hpctrain.batch import Batch
from hpctrain.engine import sum_over
from hpctrain.errors import ConfigError, StopAskedError
from hpctrain.log import LOGGER
from hpctrain.report.progress import MeasureView
from hpctrain.report.run_folder import RunFolder
from hpctrain.resume import Progress
from hpctrain.wire import raise_together, together


class Validator:
    """Measures splits and writes the "validate" rows."""

    def __init__(
        self, job: Job, run: RunFolder, at: Progress, stops: Callable[[], bool] = lambda: False
    ) -> None:
        """Take the job, where its rows go, where the run stands, and whether a signal asks for a stop."""
        self.job, self.run, self.at, self.stops = job, run, at, stops
        splits = job.index.splits
        self.split = next((name for name in ("validation", "test") if name in splits), "")
        """What is measured on the way; only a validation split may choose anything."""
        self.done = (-1, "")
        with together(job.topology.comms.world):
            self._check()

    def _check(self) -> None:
        train, legal = self.job.config.train, ("loss", *self.job.task.metrics)
        if train.monitor not in legal:
            raise ConfigError(f"train.monitor = {train.monitor!r}: legal are {', '.join(legal)}")
        if train.patience and "validation" not in self.job.index.splits:
            raise ConfigError(
                "train.patience needs data.validation: to stop by the test samples would choose on them"
            )
        if self.job.plateau and "validation" not in self.job.index.splits:
            raise ConfigError(
                "optimizer.schedule ReduceLROnPlateau needs data.validation: it follows its metric"
            )

    def baselines(self) -> dict[str, dict[str, float]]:
        """Metrics of the task's baselines on the test split (else the validation). Collective."""
        split = "test" if "test" in self.job.index.splits else self.split
        found: dict[str, dict[str, tuple[float, float]]] = {}
        failure: Exception | None = None
        try:
            if split:
                found = self.job.task.baselines(lambda: self.job.split_batches(split))
        except Exception as error:
            failure = error
        raise_together(self.job.topology.comms.world, failure)
        names = sorted(set().union(*self.job.topology.comms.data.allgather(list(found))))
        pairs = {name: {m: [pair] for m, pair in found.get(name, {}).items()} for name in names}
        return {name: self._finish(sum_over(self.job.topology.comms.data, pairs[name])) for name in names}

    def after_step(self, due: bool) -> bool:
        """Measure where it is due; note the best, and whether patience has run out.

        Gives whether the weights are the best so far, and so worth a checkpoint. Collective.
        """
        if not due or not self.split:
            return False
        found = self.measure(self.split)
        if self.split != "validation":
            return False
        train = self.job.config.train
        value = found[train.monitor]
        self.job.scheduler_step(value)
        sign = -1.0 if train.monitor in self.job.task.higher_is_better else 1.0
        best = math.inf if self.at.best is None else sign * self.at.best
        better = sign * value < best  # never so for NaN
        if better:
            self.at.best, self.at.best_step, self.at.waited = value, self.at.step, 0
        else:
            self.at.waited += 1
        if train.patience and self.at.waited >= train.patience:
            self.at.ended = (
                f"no better {train.monitor} than {self.at.best} (step {self.at.best_step}) "
                f"in {train.patience} validations"
            )
        return better

    def at_end(self) -> dict[str, float]:
        """Measure the test split (else the validation) with the last weights."""
        split = "test" if "test" in self.job.index.splits else self.split
        if not split:
            return {}
        return self.last if self.done == (self.at.step, split) else self.measure(split)

    def measure(self, split: str) -> dict[str, float]:
        """Loss and metrics of a split, by all ranks; one "validate" row. Collective.

        Raises StopAskedError, on all ranks, where a signal asks one of them to stop meanwhile.
        """
        job = self.job
        sums = job.engine.evaluate(self._watched(split), job.task.measure)
        found = self._finish(sums)
        epoch = self.at.position / len(job.loader.split)
        self.run.row("validate", self.at.step, split=split, epoch=round(epoch, 4), **found)
        text = ", ".join(f"{name} {value:.5g}" for name, value in found.items())
        LOGGER.info("epoch %.3g, %s: %s", epoch, split, text)
        self.done, self.last = (self.at.step, split), found
        return found

    def _watched(self, split: str) -> Iterator[Batch]:
        """Give this replica's batches of a split until a signal comes; tell now and then how far it is."""
        job = self.job
        total = sum(stop - start for start, stop in job.split_blocks(split))
        view = MeasureView(split, total, job.topology.world_rank == 0, job.config.report.log_seconds)
        for batch in job.split_batches(split):
            if self.stops():
                raise StopAskedError(f"a signal came while {split} was measured")
            yield batch
            view.batch(len(batch))

    def _finish(self, sums: dict[str, tuple[float, float]]) -> dict[str, float]:
        found = {}
        for name, (numerator, denominator) in sums.items():
            if name == "loss":
                found[name] = numerator / denominator if denominator else float("nan")
            else:
                found[name] = self.job.task.finish(name, numerator, denominator)
        return found
