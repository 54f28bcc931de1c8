"""Go on where a run stopped: its configuration must be the same, its newest good checkpoint counts."""

from dataclasses import dataclass, replace
from typing import Any

from hpctrain.assemble import Job, check_classes, wanted, warn_of_unlike_processors
from hpctrain.checkpoint import load as loading
from hpctrain.checkpoint.files import complete_steps
from hpctrain.config import Config, differences
from hpctrain.errors import CheckpointError, ConfigError
from hpctrain.log import LOGGER, counted
from hpctrain.models.build import FILLED
from hpctrain.parse import from_toml
from hpctrain.report.run_folder import RunFolder
from hpctrain.topology import Topology
from hpctrain.wire import from_root


@dataclass
class Progress:
    """Where a run stands; a checkpoint keeps it as JSON."""

    step: int = 0
    """Optimizer steps done."""
    position: int = 0
    """Samples consumed since the start."""
    best: float | None = None
    """Best monitored metric so far."""
    best_step: int | None = None
    waited: int = 0
    """Validations since the best."""
    ended: str = ""
    """Why the run ended before its last step, if it did."""
    unmeasured: bool = False
    """Whether the measurement behind this step is still to come: a signal broke it off."""

    def state(self) -> dict[str, Any]:
        """Everything, as JSON."""
        return dict(vars(self))

    @staticmethod
    def of(stored: loading.Stored | None) -> "Progress":
        """Read it back; a run without a checkpoint stands at its start."""
        if stored is None:
            return Progress()
        return Progress(**{name: stored.state.get(name, usual) for name, usual in vars(Progress()).items()})


def resume(config: Config, run: RunFolder, topology: Topology) -> tuple[Config, loading.Stored | None]:
    """Compare with the run in the folder, if there is one. Collective.

    Gives the configuration to run with and the checkpoint to go on from (None: a new run).
    Raises ConfigError naming each difference.
    """
    asked, stored = from_root(topology.comms.world, lambda: look(config, run))
    own, count = topology.replicas * wanted(config, topology), asked.parallel.micro_batches
    kept = stored is not None and config.parallel.micro_batches == "auto" and topology.stages > 1
    if kept and count != "auto" and count < own and not topology.world_rank:
        LOGGER.info(
            "parallel.micro_batches stays %d, with which the run began; a new run (--train.run_folder NEW) "
            "of this layout takes %d, and its stages are less idle",
            *(count, own),
        )
    return asked, stored


def look(config: Config, run: RunFolder) -> tuple[Config, loading.Stored | None]:
    """Look into the run folder. Local: one rank."""
    path = run.path / "config.toml"
    if not path.is_file():
        if run.path.is_dir() and any(run.path.iterdir()):
            raise ConfigError(
                f"train.run_folder = {run.path} is not empty and holds no run: name another folder"
            )
        return config, None
    before = from_toml(path)
    asked = adopt(config, before)
    if not complete_steps(run.checkpoints):  # there is nothing to go on with
        LOGGER.warning("%s holds a run that stopped before its first checkpoint: it begins anew", run.path)
        return config, None
    lines = differences(before, asked)
    if lines:
        check_classes(config)  # a slip is no other configuration
        raise ConfigError(different(run, lines))
    stored, passed_over = loading.newest(run.checkpoints)
    if stored is None:
        raise CheckpointError(
            f"{run.path} has no good checkpoint left:\n  "
            + "\n  ".join(passed_over)
            + "\nmend or move them; --train.run_folder NEW starts afresh"
        )
    for line in passed_over:
        LOGGER.warning("passed over: %s", line)
    LOGGER.info("resuming %s from step %d", run.path, stored.step)
    return asked, stored


def check_resume(job: Job, stored: loading.Stored | None, run: RunFolder) -> None:
    """Refuse a smaller total and other data than the checkpoint's. Local, the same on all ranks."""
    if stored is None:
        return
    lines = []
    if job.total_steps < stored.state["total_steps"]:
        lines.append(f"steps in all: the run has {stored.state['total_steps']}, asked is {job.total_steps}")
    before, now = stored.state["data"], job.index.identity()
    for what in now:
        if now[what] != before[what]:
            lines.append(f"{what} of the data: the run has {before[what]}, found are {now[what]}")
    if lines:
        raise ConfigError(different(run, lines))
    threads = stored.state.get("threads", job.topology.threads)
    if threads != job.topology.threads and not job.topology.world_rank:
        LOGGER.info(
            "ranks had %s in the session before, and have %d now: kernels may cut their sums otherwise, with "
            "other last bits than a run in one go; --train.threads %d keeps them",
            *(counted(threads, "thread"), job.topology.threads, threads),
        )
    earlier = stored.state.get("processors", job.processors)
    if earlier != job.processors:
        warn_of_unlike_processors("are not those of the session before", [*earlier, "now", *job.processors])


def different(run: RunFolder, lines: list[str]) -> str:
    """Say that a run can't be resumed with what was asked."""
    return (
        f"{run.path} holds a run with another configuration:\n  "
        + "\n  ".join(lines)
        + "\ngo on with the values that the run has, or --train.run_folder NEW to start afresh"
    )


def adopt(config: Config, before: Config) -> Config:
    """Take over what the first start filled in: shapes of the model, the count of micro-batches."""
    model = config.model
    if model.class_path == before.model.class_path:
        filled = {n: v for n, v in before.model.init_args.items() if n in FILLED}
        model = replace(model, init_args={**filled, **model.init_args})
    parallel = config.parallel
    if parallel.micro_batches == "auto":
        parallel = replace(parallel, micro_batches=before.parallel.micro_batches)
    return replace(config, model=model, parallel=parallel)
