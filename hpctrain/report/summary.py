"""What a run says at its start, at each step and at its end."""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import h5py
import torch
from mpi4py import MPI

from hpctrain.assemble import Job
from hpctrain.averaging.result import Result
from hpctrain.batch import Batch
from hpctrain.checkpoint.files import write_whole
from hpctrain.log import LOGGER, counted
from hpctrain.report import pictures
from hpctrain.report.run_folder import RunFolder, rows
from hpctrain.version import __version__

Metrics = dict[str, float]


def start(job: Job, run: RunFolder, resumed_step: int, baselines: dict[str, Metrics]) -> None:
    """Say what will run, and write the "start" row. Collective (stages)."""
    topology, index = job.topology, job.index
    mine = sum(p.numel() for p in job.engine.module.parameters())
    parameters = topology.comms.pipe.allreduce(mine)
    count = job.loader.count
    run.row(
        "start",
        resumed_step,
        world_size=topology.world_size,
        nodes=topology.nodes,
        replicas=topology.replicas,
        stages=topology.stages,
        micro_batches=count,
        resumed_step=resumed_step,
        total_steps=job.total_steps,
        threads=topology.threads,
        device=topology.device,
        parameters=parameters,
        samples={name: len(split) for name, split in index.splits.items()},
        baselines=baselines,
        versions=versions(),
    )
    LOGGER.info("run folder %s", run.path)
    LOGGER.info(
        "%s on %s: %s x %s, %s a step, %s a rank, %s",
        *(counted(topology.world_size, "rank"), counted(topology.nodes, "node")),
        *(counted(topology.replicas, "replica"), counted(topology.stages, "stage")),
        *(counted(count, "micro-batch"), counted(topology.threads, "thread")),
        topology.device,
    )
    splits = ", ".join(f"{len(split)} {name}" for name, split in index.splits.items())
    inside = counted(index.length, "sample"), counted(len(index.files), "file")
    LOGGER.info("%s in %s: %s", *inside, splits)
    task = job.task
    LOGGER.info("each sample: %s; to predict: %s", shapes(task.input_shapes), shapes(task.target_shapes))
    name = job.config.model.class_path
    LOGGER.info("%s: %s, %s", name, counted(parameters, "parameter"), counted(job.total_steps, "step"))
    for line in table(baselines):
        LOGGER.info(line)


def shapes(of: dict[str, tuple[int, ...]]) -> str:
    """Write variables with their shapes.

    >>> shapes({"sst": (8, 16), "month": ()})
    'sst 8 x 16, month one number'
    """
    return ", ".join(f"{name} {' x '.join(map(str, shape)) or 'one number'}" for name, shape in of.items())


def versions() -> dict[str, str]:
    """Versions that the result may depend on."""
    vendor, number = MPI.get_vendor()
    return {
        "hpctrain": __version__,
        "torch": torch.__version__,
        "h5py": h5py.__version__,
        "mpi": f"{vendor} {'.'.join(map(str, number))}",
    }


def step(
    run: RunFolder,
    at: int,
    epoch: float,
    result: Result,
    rate: float,
    lr: float,
    shares: Metrics,
    waiting: dict[str, Any],
) -> None:
    """Write the "train" row of a step."""
    run.row(
        "train",
        at,
        epoch=round(epoch, 4),
        loss=result.loss,
        gradient_norm=result.norm,
        lr=lr,
        samples_per_second=round(rate, 2),
        **{f"{name}_share": round(share, 4) for name, share in shares.items()},
        **waiting,
    )


def table(metrics: dict[str, Metrics]) -> list[str]:
    """Lines of a table, a row a method and a column a metric.

    >>> table({"ridge": {"rmse": 0.725}})
    ['                     rmse', 'ridge               0.725']
    """
    if not metrics:
        return []
    columns = sorted({name for found in metrics.values() for name in found})
    lines = [" " * 12 + "".join(f"{name:>13}" for name in columns)]
    for method, found in metrics.items():
        cells = (f"{found[c]:13.4g}" if c in found else " " * 13 for c in columns)
        lines.append(f"{method:12}" + "".join(cells))
    return lines


def show(job: Job, run: RunFolder) -> None:
    """Draw the pictures and write the sample, by world rank 0. What fails does not undo the training.

    Collective over the stages of the first replica: the others run the model as often as rank 0 asks.
    """
    pipe = job.topology.comms.pipe
    if run.writes:
        for name, make in (("pictures", draw), ("sample", write_sample)):
            try:
                make(job, run)
            except Exception as error:
                LOGGER.warning("no %s: %s: %s", name, type(error).__name__, error)
        pipe.bcast(None, root=0)
    elif job.topology.replica == 0:
        while (batch := pipe.bcast(None, root=0)) is not None:
            with suppress(Exception):  # rank 0 says what is wrong
                job.engine.outputs(batch, everywhere=True)


def run_model(job: Job, batch: Batch) -> Any:
    """Give rank 0 the model's outputs. Collective over the stages, which wait for it in `show`."""
    job.topology.comms.pipe.bcast(batch, root=0)
    return job.engine.outputs(batch, everywhere=True)


def draw(job: Job, run: RunFolder) -> None:
    """Draw the curves, and the maps where the task has some."""
    if not job.config.report.pictures:
        return
    metric = job.task.metrics[0] if job.task.metrics else "loss"
    pictures.curves(rows(run.path / "metrics.jsonl"), metric, run.pictures / "curves.png")
    found = job.task.maps(partial(run_model, job))
    if found is not None:
        pictures.maps(found, run.pictures / "maps.png")


def write_sample(job: Job, run: RunFolder) -> None:
    """Write and say what the model writes, where the task lets it."""
    found = job.task.sample(partial(run_model, job))
    if not found:
        return
    write_whole(run.path / "sample.txt", found)
    LOGGER.info("a sample, also in %s:", run.path / "sample.txt")
    for line in found.splitlines():
        LOGGER.info("    %s", printable(line))


def printable(line: str) -> str:
    r"""Give a line without characters that a terminal obeys. Pure.

    >>> printable("def\tf:\x1b") == "def     f:\ufffd"
    True
    """
    return "".join(c if c.isprintable() else "\ufffd" for c in line.expandtabs())


def end(job: Job, run: RunFolder, reason: str, found: Metrics, baselines: dict[str, Metrics]) -> None:
    """Say how it ended: the metrics beside the baselines, where the run and its pictures are."""
    LOGGER.info("done: %s", reason)
    mine = {name: value for name, value in found.items() if name != "loss" or not baselines}
    ranked = rank_methods({**baselines, "hpctrain": mine}, job.task.metrics)
    for line in table(ranked if found else {}):
        LOGGER.info(line)
    LOGGER.info("run folder %s", run.path)
    if run.pictures.is_dir():
        names = sorted(path.name for path in run.pictures.glob("*.png"))
        LOGGER.info("pictures in %s: %s", run.pictures, ", ".join(names))


def rank_methods(metrics: dict[str, Metrics], names: Sequence[str]) -> dict[str, Metrics]:
    """Order methods by the first metric, the largest first.

    >>> list(rank_methods({"a": {"rmse": 1.0}, "b": {"rmse": 2.0}}, ["rmse"]))
    ['b', 'a']
    """
    if not names:
        return metrics

    def value(item: tuple[str, dict[str, Any]]) -> float:
        return -float(item[1].get(names[0], 0.0))

    return dict(sorted(metrics.items(), key=value))
