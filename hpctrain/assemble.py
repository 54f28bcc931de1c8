"""From a configuration to the parts of a job: data, task, model, averager, engine.

With `train.py` the only place that knows all rooms.
"""

import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from hpctrain import construct
from hpctrain import portion as portions
from hpctrain.averaging import build as averaging
from hpctrain.averaging import groups, schedules
from hpctrain.averaging.averager import Averager
from hpctrain.batch import Batch
from hpctrain.checkpoint.load import Stored
from hpctrain.config import ClassPath, Config
from hpctrain.data import index as indexing
from hpctrain.data import order, statistics
from hpctrain.data.index import Index
from hpctrain.data.loader import Loader
from hpctrain.data.read import Reader
from hpctrain.engine import Engine
from hpctrain.errors import ConfigError, nearest
from hpctrain.log import ALIKE, LOGGER, counted
from hpctrain.loss import SummedLoss, takes_reduction
from hpctrain.models.build import FILLED
from hpctrain.piece import Piece
from hpctrain.pipeline.pipeline import Pipeline
from hpctrain.pipeline.schedule import SCHEDULES
from hpctrain.portion import Portion, told_of_memory
from hpctrain.processor import processor
from hpctrain.room import keep_memory
from hpctrain.staged import StagedEngine
from hpctrain.task import Source, Task
from hpctrain.topology import Topology
from hpctrain.wire import from_root, of_users, together

EVALUATION_BATCH = 16
"""Samples of an evaluation batch, at most, and no more than a step's: results must not depend on ranks."""


@dataclass
class Job:
    """The parts of one job on one rank."""

    config: Config
    """Resolved: it builds the same job without the data."""
    topology: Topology
    index: Index
    reader: Reader
    task: Task
    engine: Engine
    loader: Loader[Batch]
    scheduler: Any
    peers: list[tuple[int, str]]
    """World rank and host of each replica of this stage."""
    processors: list[str]
    """The kinds of processors, where the bits must not depend on the ranks; else empty."""

    @property
    def averager(self) -> Averager:
        """The engine's averager."""
        return self.engine.averager

    @property
    def pipeline(self) -> Pipeline | None:
        """This rank's stages, where there are several."""
        return self.engine.pipeline if isinstance(self.engine, StagedEngine) else None

    @property
    def schedule(self) -> str:
        """The pipeline's schedule, the chosen one where the choice was left open; of several stages only."""
        assert isinstance(self.engine, StagedEngine)
        return self.engine.schedule

    @property
    def plateau(self) -> bool:
        """Whether the learning rate follows a validation metric."""
        return isinstance(self.scheduler, ReduceLROnPlateau)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return total_steps(self.config, self.index)

    def scheduler_step(self, metric: float | None = None) -> None:
        """Advance the learning rate by a step, or a plateau schedule by a validation. Local."""
        with of_users(f"in the learning rate's schedule ({type(self.scheduler).__name__})"):
            if self.plateau and metric is not None:
                self.scheduler.step(metric)
            elif not self.plateau and metric is None:
                self.scheduler.step()

    def pieces(self) -> list[Piece]:
        """All state of the job."""
        return self.averager.pieces() + self.task.pieces()

    def restore(self, stored: Stored, other_total: bool = False) -> None:
        """Take the whole state of a checkpoint; its schedule may have had another total. Collective."""
        with together(self.topology.comms.world):
            self.averager.expect(stored.state["averager"], stored.tensors)
            if other_total and not self.plateau:
                self.scheduler = schedules.replay(self.config, self.averager, self.total_steps, stored.step)
            else:
                schedules.restore(self.scheduler, stored.state["scheduler"])
            for piece in self.pieces():
                stored.fill(piece)
        self.refresh()

    def refresh(self) -> None:
        """Bring new weights to the stages that keep copies. Collective."""
        self.engine.refresh()

    def restore_weights(self, stored: Stored) -> None:
        """Take the weights and what the task learnt. Collective."""
        with together(self.topology.comms.world):
            for piece in self.pieces():
                if not piece.name.startswith("optimizer."):
                    stored.fill(piece)
        self.refresh()

    def split_blocks(self, split: str) -> list[tuple[int, int]]:
        """Places (start, stop) of this replica's evaluation batches of a split.

        The split is cut in one way on every layout; whole batches are dealt out.
        """
        length = len(self.index.splits[split])
        size = min(EVALUATION_BATCH, self.config.train.batch)
        starts = range(0, length, size)
        first, last = order.block(self.topology.replica, self.topology.replicas, len(starts))
        return [(at, min(at + size, length)) for at in starts[first:last]]

    def split_batches(self, split: str) -> Iterator[Batch]:
        """This replica's evaluation batches of a split, in order."""
        for start, stop in self.split_blocks(split):
            yield self.task.batch(self.index.splits[split].samples(np.arange(start, stop)))

    def close(self) -> None:
        """Stop the loader, close the files."""
        self.loader.close()
        self.reader.close()
        self.averager.close()
        if self.pipeline and sys.exc_info()[0] is None:  # freeing is collective
            self.pipeline.close()
        elif self.pipeline:
            self.pipeline.transport.stop()


def check_classes(config: Config) -> None:
    """Check every class path and its arguments, and the schedule, as far as it goes without data. Local."""
    if config.parallel.schedule not in ("auto", *SCHEDULES):
        near = nearest(config.parallel.schedule, ("auto", *SCHEDULES))
        raise ConfigError(f"parallel.schedule = {config.parallel.schedule!r}: {near}")
    if not config.model.class_path:
        raise ConfigError("model.class_path is not set: name a torch.nn.Module, such as my_module.MyModel")
    own = {n: value for n, value in config.model.init_args.items() if n not in FILLED}
    construct.check(ClassPath(config.model.class_path, own), "model", given=FILLED)
    construct.check(config.data.task, "data.task")
    loss_arguments(config.train.loss)
    groups.check(config.optimizer)
    if (config.parallel.stages > 1 or config.optimizer.sharded is True) and groups.crosses(config.optimizer):
        key = "parallel.stages" if config.parallel.stages > 1 else "optimizer.sharded"
        raise ConfigError(
            f"optimizer.class_path = {config.optimizer.class_path}: what it does to a parameter hangs on the "
            f"others (a norm over all, say), of which a rank has only some with {key}: take another, "
            f"train.clip for a bound of the gradients' norm, or leave {key} out"
        )
    schedules.arguments(config, total=1)


def check_invariant(config: Config, replicas: int) -> None:
    """Check what the same bits on any layout ask for. Local."""
    if not config.averaging.invariant:
        return
    if config.parallel.gradients == "fast":
        raise ConfigError(
            "parallel.gradients = fast adds micro-batches in an order that depends on the stages, and "
            "averaging.invariant = true asks for the same bits: leave one of them out"
        )
    if config.averaging.wire != "exact":
        raise ConfigError(
            f"averaging.wire = {config.averaging.wire} rounds what crosses between nodes: the bits would "
            f"depend on where the ranks are, and averaging.invariant = true asks for the same ones: leave "
            f"one of them out"
        )
    count = config.parallel.micro_batches
    if count == "auto":
        raise ConfigError(
            f"averaging.invariant sums the step's micro-batches in one fixed tree, so their number must not "
            f"depend on the ranks: set parallel.micro_batches to an integer, {max(4, replicas)} say"
        )
    if count < replicas:
        raise ConfigError(
            f"averaging.invariant: {replicas} replicas for parallel.micro_batches = {count} leaves "
            f"{replicas - count} without work: start at most {count} or set parallel.micro_batches "
            f"= {replicas}"
        )


def warn_of_single_samples(module: nn.Module, length: int, batch: int, count: int) -> None:
    """Say it where a BatchNorm meets one sample in an epoch's last batch first: after hours, maybe. Local."""
    rest = length % batch
    norm = any(isinstance(inner, nn.BatchNorm1d) for inner in module.modules())
    if norm and 1 in order.sizes(rest, count) and 1 not in order.sizes(batch, count):
        LOGGER.warning(
            "an epoch's last batch has %s of %d: micro-batches of one, for which BatchNorm1d fails where "
            "that is one value a channel: choose train.batch or parallel.micro_batches so that none is so "
            "small",
            *(counted(rest, "sample"), length),
            extra=ALIKE,
        )


def kinds_of_processors(config: Config, comm: MPI.Intracomm) -> list[str]:
    """Name the processors where the same bits are asked of them; say so where they differ. Collective."""
    if not config.averaging.invariant:
        return []
    kinds = sorted(set(comm.allgather(processor())))
    if len(kinds) > 1:
        warn_of_unlike_processors("differ", kinds)
    return kinds


def warn_of_unlike_processors(what: str, kinds: list[str]) -> None:
    """Say that the bits are in danger, and what keeps them. Local."""
    LOGGER.warning(
        "averaging.invariant: the processors %s (%s), and BLAS chooses its kernels by them: for the "
        "same bits set on all nodes MKL_CBWR=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2",
        what,
        "; ".join(kinds),
    )


def build(config: Config, topology: Topology, learn: bool = True, trains: bool = True) -> Job:
    """Build the job's parts. Collective; errors are raised on all ranks.

    With learn=False the task does not look at the training samples: `restore` brings its state. With
    trains=False the job only evaluates: BatchNorm layers stay as they are, and a cut is not measured.
    """
    world = topology.comms.world
    train = config.train
    torch.set_num_threads(topology.threads)
    asked = config.parallel.micro_batches
    count = topology.replicas * wanted(config, topology) if asked == "auto" else asked
    if count > max(train.batch, topology.replicas) and not topology.world_rank:
        LOGGER.warning(
            "parallel.micro_batches = %d for train.batch = %d: %d of each step have no samples",
            *(count, train.batch, count - train.batch),
        )
    with together(world):
        check_invariant(config, topology.replicas)
        check_classes(config)
    processors = kinds_of_processors(config, world)
    index = from_root(world, lambda: indexing.build(config.data))
    reader = Reader(index)
    length = len(index.splits["train"])
    if train.batch > length and trains and not topology.world_rank:
        LOGGER.warning(
            "train.batch = %d is more than the %d training samples: a step takes those", train.batch, length
        )
    with together(world):
        task: Task = construct.build(config.data.task, "data.task", **config.data.task.init_args)
        task.prepare(source(config, topology, index, reader), learn)

    def example() -> dict[str, torch.Tensor]:
        most = max(order.sizes(train.batch, count))
        return task.batch(index.splits["train"].samples(np.arange(most))).inputs

    batches = {min(train.batch, length), length % train.batch or train.batch}
    portion = portions.build(config, topology, task, example, count, batches, trains)
    if trains and total_steps(config, index) * train.batch > length:
        warn_of_single_samples(portion.module, length, train.batch, count)
    with together(world):
        trained = (p.dtype for p in portion.module.parameters() if p.requires_grad)
        averaging.check_dtypes(config.averaging, trained)
    with told_of_memory(topology):
        averager = Averager(
            portion.module,
            portion.optimizer,
            topology.comms.data,
            config.averaging,
            order.replicas_of(topology.replicas, count),
            config.optimizer.sharded,
            topology.crowded,
            cuda_aware=topology.cuda_aware,
            pipe=topology.comms.pipe,
        )
    if portion.pipeline and not config.averaging.invariant:  # else they come micro-batch by micro-batch
        averager.used_elsewhere(tie.tensor for tie in portion.pipeline.ties)
    with together(world):
        engine = engine_of(config, topology, portion, averager, list(task.input_shapes))
        scheduler = schedules.build(config, averager, total_steps(config, index))
    loader = Loader(
        index.splits["train"],
        order.replica_micro_batches(topology.replica, topology.replicas, count),
        count,
        train.batch,
        train.seed,
        maker(task, portion.pipeline),
    )
    short = portion.pipeline is not None and portion.pipeline.cut.choice.exact
    keep_memory(os.environ, exact=short)  # of steps; not the holes that building leaves
    # SyncBatchNorm gives the same on any layout with one micro-batch a replica, whatever their number
    kept = replace(config.parallel, micro_batches="auto" if portion.synced else count)
    resolved = replace(config, model=portion.model, parallel=kept)
    peers = topology.comms.data.allgather((topology.world_rank, platform.node()))
    return Job(resolved, topology, index, reader, task, engine, loader, scheduler, peers, processors)


def engine_of(
    config: Config, topology: Topology, portion: Portion, averager: Averager, names: list[str]
) -> Engine:
    """Build what takes steps. Local."""
    train, parallel = config.train, config.parallel
    loss = SummedLoss(construct.build(train.loss, "train.loss", **loss_arguments(train.loss)))
    common = topology, portion.module, loss, averager, names, train.seed, train.autocast
    if portion.pipeline is None:
        return Engine(*common)
    fast = parallel.gradients == "fast"
    engine = StagedEngine(*common, pipeline=portion.pipeline, schedule=portion.schedule, fast=fast)
    engine.straight.at_once(portion.at_once)
    return engine


def wanted(config: Config, topology: Topology) -> int:
    """Micro-batches a replica that the layout asks for: four a stage leave it idle a fifth of the time.

    SyncBatchNorm takes its statistics over one of each replica.
    """
    if topology.stages == 1 or config.averaging.sync_batchnorm:
        return 1
    return max(1, min(4 * topology.stages, config.train.batch // topology.replicas))


def maker(task: Task, pipeline: Pipeline | None) -> Callable[[NDArray[np.int64]], Batch]:
    """Give what makes a batch: no samples, and those that a stage in the middle needs not, are not read."""
    reads = pipeline is None or pipeline.reads_inputs

    def make(samples: NDArray[np.int64]) -> Batch:
        return task.batch(samples) if reads and len(samples) else Batch(samples, {}, {})

    return make


def source(config: Config, topology: Topology, index: Index, reader: Reader) -> Source:
    """Give a task its view of the data."""
    world, split = topology.comms.world, index.splits["train"]

    def blockwise(
        length: int, blocks: int, shape: tuple[int, ...], total: Callable[..., Any]
    ) -> NDArray[np.float64]:
        return statistics.blockwise(world, length, blocks, shape, total)

    def mean_and_deviation(name: str) -> tuple[float, float]:
        skip = config.data.missing == "mask"
        return statistics.mean_and_deviation(world, reader, index, split, name, skip)

    def axis(name: str) -> NDArray[np.float64]:
        return from_root(world, lambda: indexing.read_axis(index.files[0], name))

    return Source(config.data, index, reader.read_one, blockwise, mean_and_deviation, axis)


def total_steps(config: Config, index: Index) -> int:
    """Count the optimizer steps of the whole run: `train.steps`, or epochs."""
    if config.train.steps is not None:
        return config.train.steps
    return config.train.epochs * order.steps_per_epoch(config.train.batch, len(index.splits["train"]))


def loss_arguments(spec: ClassPath) -> dict[str, Any]:
    """Check the loss; ask torch's losses for one value an element."""
    arguments = construct.check(spec, "train.loss")
    if not takes_reduction(construct.find_class(spec.class_path, "train.loss.class_path")):
        return arguments
    if arguments.setdefault("reduction", "none") != "none":
        raise ConfigError(
            f"train.loss.init_args.reduction = {arguments['reduction']!r}: the mean is taken over all "
            f"ranks' samples; leave it out"
        )
    return arguments
