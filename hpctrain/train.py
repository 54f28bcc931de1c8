"""The training loop, on one page. It knows all rooms; they do not know one another."""

import time
import traceback
from contextlib import closing, suppress
from pathlib import Path

from mpi4py import MPI

from hpctrain import assemble, log
from hpctrain.assemble import Job
from hpctrain.averaging.result import Result
from hpctrain.averaging.sentinel import EVERY_STEPS
from hpctrain.checkpoint import load as loading
from hpctrain.checkpoint import save as saving
from hpctrain.config import Config
from hpctrain.data import order
from hpctrain.errors import DONE, STOPPED_EARLY, HpctrainError, StopAskedError
from hpctrain.log import LOGGER
from hpctrain.report import memory, summary
from hpctrain.report.progress import ProgressView
from hpctrain.report.run_folder import RunFolder, rows
from hpctrain.report.timeline import Timeline
from hpctrain.report.waiting import Waiting
from hpctrain.resilience.signals import StopSignals
from hpctrain.resume import Progress, check_resume, resume
from hpctrain.topology import Topology
from hpctrain.validate import Validator
from hpctrain.wire import from_root, together

LONGEST_REASON = 2000
"""Characters of an error in the "end" row; log.txt has all."""


def train(config: Config, comm: MPI.Intracomm) -> int:
    """Train to the end, or to a signal; give the exit status. Collective over `comm`."""
    with (
        Topology.build(comm, config.parallel.stages, config.train.device, config.train.threads) as topology,
        StopSignals() as signals,
    ):
        log.start(topology)
        with closing(RunFolder(Path(config.train.run_folder), writes=topology.world_rank == 0)) as run:
            with together(topology.comms.world, name_rank=False):
                run.hold()
            config, stored = resume(config, run, topology)
            with closing(assemble.build(config, topology, learn=stored is None)) as job:
                with together(topology.comms.world):
                    check_resume(job, stored, run)
                if finished(job, stored, run):
                    return DONE
                return Loop(job, run, stored, signals).run()


def finished(job: Job, stored: loading.Stored | None, run: RunFolder) -> bool:
    """Say so where nothing is left to do."""
    if stored is None:
        return False
    stopped_early = stored.state["ended"] and job.total_steps <= stored.state["total_steps"]
    if stored.step < job.total_steps and not stopped_early:
        return False
    why = stored.state["ended"] or f"step {stored.step} of {job.total_steps}"
    if not from_root(job.topology.comms.world, lambda: has_ended(run, stored.step)):
        return False  # it stopped after its last checkpoint: the last numbers and pictures are still to come
    LOGGER.info("%s is finished (%s); nothing was changed", run.path, why)
    LOGGER.info("to go on: a larger --train.epochs or --train.steps")
    LOGGER.info("to start afresh: --train.run_folder NEW (runs/name-# takes the next free number)")
    return True


def has_ended(run: RunFolder, step: int) -> bool:
    """Whether the "end" row of this step says done. Local."""
    ends = [row for row in rows(run.path / "metrics.jsonl") if row["event"] == "end"]
    return any(row["status"] == "done" and row["step"] == step for row in ends)


class Loop:
    """The state of the loop: the step, the position, the best so far."""

    def __init__(self, job: Job, run: RunFolder, stored: loading.Stored | None, signals: StopSignals) -> None:
        """Take the parts, and the checkpoint to go on from."""
        self.job, self.run_folder, self.signals = job, run, signals
        self.at = Progress.of(stored)
        if stored is not None and stored.state["total_steps"] != job.total_steps:
            LOGGER.info("the total grows from %d to %d steps", stored.state["total_steps"], job.total_steps)
        if self.at.ended and stored is not None and job.total_steps > stored.state["total_steps"]:
            self.at.ended, self.at.waited = "", 0  # the total has grown since patience ran out
        self.resumed_step = self.at.step
        if stored is not None:
            job.restore(stored, stored.state["total_steps"] != job.total_steps)
        self.validator = Validator(job, run, self.at, lambda: bool(signals.name))
        if self.validator.split and job.topology.replica == 0:  # one rank tells
            job.engine.metrics = job.task.measure
        self.waiting = Waiting(job.peers)
        self.timeline = Timeline(job, run)
        self.last_saved = time.monotonic()
        self.saved_step = -1 if stored is None else stored.step

    def run(self) -> int:
        """Train to the end; an error that all ranks agree on, or rank 0's, is written into the "end" row."""
        with together(self.job.topology.comms.world, name_rank=False):
            self.run_folder.create(self.job.config, resumes=self.at.step > 0)
            if self.run_folder.writes:
                log.to_file(self.run_folder.log, self.job.topology)
        try:
            return self.steps()
        except HpctrainError as error:
            self.failed(str(error), getattr(error, "brief", ""))
            error.log = str(self.run_folder.log)
            raise
        except Exception:
            self.failed(traceback.format_exc())
            raise

    def failed(self, text: str, brief: str = "") -> None:
        """Write into the run folder why the run fails, briefly into its row. Local: world rank 0."""
        with suppress(HpctrainError):  # the disk may be why
            reason = (brief or text)[-LONGEST_REASON:]
            self.run_folder.row("end", self.at.step, status="failed", reason=reason)
        log.failed(text)

    def steps(self) -> int:
        """Take steps until the total, a signal, or patience runs out; save, report."""
        job, train = self.job, self.job.config.train
        baselines = self.validator.baselines()
        summary.start(job, self.run_folder, self.resumed_step, baselines)
        stopped = self.at.unmeasured and self.measure()
        shows = job.topology.world_rank == 0
        steps = job.loader.steps(self.at.position)
        view = ProgressView(job.total_steps, self.at.step, shows, job.config.report.log_seconds)
        with view:
            while self.at.step < job.total_steps and not (stopped or self.at.ended):
                began = time.perf_counter()
                step = next(steps)
                job.engine.clock.reading += time.perf_counter() - began
                rates = [group["lr"] for group in job.averager.optimizer.param_groups]
                self.timeline.before(self.at.step + 1 - self.resumed_step)
                result = job.engine.step(
                    self.at.step, step, train.clip, rates, bool(self.signals.name), self.late()
                )
                job.scheduler_step()
                self.at.step += 1
                self.at.position = step.next_position
                seconds = time.perf_counter() - began
                self.after_step(result, step.next_position - step.position, seconds, rates[0], view)
                self.at.unmeasured = self.validation_due()
                stopped = self.measure() or result.stops > 0
                every = job.config.checkpoint.every_steps
                if result.saves or (every and self.at.step % every == 0):
                    self.save()
        return self.end(stopped, baselines)

    def after_step(self, result: Result, samples: int, seconds: float, lr: float, view: ProgressView) -> None:
        """Write and show what the step gave; now and then compare the ranks' weights. Collective."""
        shares, waited = self.job.engine.clock.shares(), self.waiting.row(result.times)
        rate = samples / seconds
        summary.step(self.run_folder, self.at.step, self.epoch(), result, rate, lr, shares, waited)
        view.step(self.at.step, result.loss, samples, seconds, shares)
        if self.at.step == min(self.resumed_step + 2, self.job.total_steps):
            memory.say(self.job)
        self.timeline.after(self.at.step - self.resumed_step, self.at.step)
        if self.at.step % EVERY_STEPS == 0:
            self.job.averager.check_drift(self.at.step)

    def epoch(self) -> float:
        """Passes over the training samples so far."""
        return self.at.position / len(self.job.loader.split)

    def measure(self) -> bool:
        """Measure the weights where that is due, save the best. Collective.

        Gives whether a signal broke it off: a resume begins with it then.
        """
        try:
            better = self.validator.after_step(self.at.unmeasured)
        except StopAskedError:
            return True
        if self.at.unmeasured and self.saved_step == self.at.step:
            self.saved_step = -1  # that one does not know of it
        self.at.unmeasured = False
        if better:
            self.save()
        return False

    def validation_due(self) -> bool:
        """Whether this step ends an epoch, or `validate_steps` steps."""
        every = self.job.config.train.validate_steps
        if every:
            return self.at.step % every == 0
        length, batch = len(self.job.loader.split), self.job.config.train.batch
        return self.at.step % order.steps_per_epoch(batch, length) == 0

    def late(self) -> bool:
        """Whether rank 0's clock asks for a checkpoint; the wish rides in the step's sum."""
        minutes = self.job.config.checkpoint.every_minutes
        waited = time.monotonic() - self.last_saved
        return bool(self.run_folder.writes and minutes and waited > 60.0 * minutes)

    def save(self) -> None:
        """Write a checkpoint and remove old ones, unless this step has one. Collective."""
        if self.saved_step == self.at.step:
            return
        began = time.perf_counter()
        job, world = self.job, self.job.topology.comms.world
        job.averager.check_drift(self.at.step)  # no checkpoint of weights that the ranks don't agree on
        state = {
            **self.at.state(),
            "total_steps": job.total_steps,
            "data": job.index.identity(),
            "processors": job.processors,
            "threads": job.topology.threads,
            "averager": job.averager.scalars(),
            "scheduler": job.scheduler.state_dict(),
        }
        folder = self.run_folder.checkpoints
        path = saving.save(folder, self.at.step, job.pieces(), state, world)
        from_root(
            world, lambda: saving.prune(folder, job.config.checkpoint.keep, self.at.best_step, self.at.step)
        )
        seconds = time.perf_counter() - began
        self.run_folder.row("checkpoint", self.at.step, path=str(path), seconds=round(seconds, 4))
        self.last_saved, self.saved_step = time.monotonic(), self.at.step

    def stopped_early(self, where: str) -> int:
        """Say that a signal ends the run here; give the exit status."""
        reason = f"{self.signals.name or 'a signal on another rank'} at step {self.at.step}{where}"
        self.run_folder.row("end", self.at.step, status="stopped", reason=reason)
        LOGGER.info("stopped early: %s; run the same command again to go on", reason)
        return STOPPED_EARLY

    def end(self, stopped: bool, baselines: dict[str, dict[str, float]]) -> int:
        """Save, validate for the last time, draw, write the end row."""
        job = self.job
        self.save()
        if stopped and (self.at.step < job.total_steps or self.at.unmeasured):
            return self.stopped_early("")
        try:
            found = self.validator.at_end()
        except StopAskedError:
            return self.stopped_early(", in the last measurement")
        if ready := self.waiting.buckets(job.averager.ready_times()):
            self.run_folder.row("buckets", self.at.step, buckets=ready)
        reason = self.at.ended or f"all {job.total_steps} steps done"
        self.run_folder.row("end", self.at.step, status="done", reason=reason)
        waited = self.waiting.line(job.engine.clock.total)
        if waited:
            LOGGER.info("%s", waited)
        summary.show(job, self.run_folder)
        summary.end(job, self.run_folder, reason, found, baselines)
        return DONE
