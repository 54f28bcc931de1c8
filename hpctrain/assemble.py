"""From a configuration to the parts of a job: data, task, model, averager, engine.

With `train.py` the only place that knows all rooms.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim.lr_scheduler import ReduceLROnPlateau

from hpctrain import construct
from hpctrain.averaging import groups
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
from hpctrain.errors import CheckpointError, ConfigError
from hpctrain.loss import SummedLoss, takes_reduction
from hpctrain.models import build as models
from hpctrain.piece import Piece
from hpctrain.task import Source, Task
from hpctrain.topology import Topology
from hpctrain.wire import from_root, together

EVALUATION_BATCH = 16
"""Samples of one evaluation batch: its results must not depend on ranks or `train.batch`."""


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

    @property
    def averager(self) -> Averager:
        """The engine's averager."""
        return self.engine.averager

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return total_steps(self.config, self.index)

    def scheduler_step(self, metric: float | None = None) -> None:
        """Advance the learning rate by a step, or a plateau schedule by a validation."""
        plateau = isinstance(self.scheduler, ReduceLROnPlateau)
        if plateau and metric is not None:
            self.scheduler.step(metric)
        elif not plateau and metric is None:
            self.scheduler.step()

    def pieces(self) -> list[Piece]:
        """All state of the job."""
        return self.averager.pieces() + self.task.pieces()

    def restore(self, stored: Stored, weights_only: bool = False) -> None:
        """Take the state of a checkpoint. Collective."""
        with together(self.topology.comms.world):
            if not weights_only:
                self.averager.expect(stored.state["averager"], stored.tensors)
                self.scheduler.load_state_dict(stored.state["scheduler"])
            for piece in self.pieces():
                if not (weights_only and piece.name.startswith("optimizer.")):
                    stored.fill(piece)

    def split_blocks(self, split: str) -> list[tuple[int, int]]:
        """Places (start, stop) of this replica's evaluation batches of a split.

        The split is cut in one way on every layout; whole batches are dealt out.
        """
        length = len(self.index.splits[split])
        starts = range(0, length, EVALUATION_BATCH)
        first, last = order.block(self.topology.replica, self.topology.replicas, len(starts))
        return [(at, min(at + EVALUATION_BATCH, length)) for at in starts[first:last]]

    def split_batches(self, split: str) -> Iterator[Batch]:
        """This replica's evaluation batches of a split, in order."""
        for start, stop in self.split_blocks(split):
            yield self.task.batch(self.index.splits[split].samples(np.arange(start, stop)))

    def close(self) -> None:
        """Stop the loader, close the files."""
        self.loader.close()
        self.reader.close()
        self.averager.close()


def check_classes(config: Config) -> None:
    """Check every class path and its arguments, as far as it goes without data. Local."""
    if config.parallel.stages > 1:
        raise ConfigError(
            f"parallel.stages = {config.parallel.stages}: pipeline stages are not built yet: "
            f"set parallel.stages = 1"
        )
    if not config.model.class_path:
        raise ConfigError("model.class_path is not set: name a torch.nn.Module, such as my_module.MyModel")
    construct.find_class(config.model.class_path, "model.class_path")
    construct.check(config.data.task, "data.task")
    loss_arguments(config.train.loss)
    groups.check(config.optimizer)
    schedule_arguments(config.optimizer.schedule, total=1)


def build(config: Config, topology: Topology, learn: bool = True) -> Job:
    """Build the job's parts. Collective; errors are raised on all ranks.

    With learn=False the task does not look at the training samples: `restore` brings its state.
    """
    world = topology.comms.world
    train = config.train
    torch.set_num_threads(topology.threads)
    with together(world):
        check_classes(config)
    index = from_root(world, lambda: indexing.build(config.data))
    reader = Reader(index)
    task: Task = construct.build(config.data.task, "data.task", **config.data.task.init_args)
    with together(world):
        task.prepare(source(config, topology, index, reader), learn)
    with together(world):
        model = models.complete(config.model, task.input_shapes, task.target_shapes)
        module = models.build(model, train.seed).to(topology.device)
        spec = train.loss
        loss = construct.build(spec, "train.loss", **loss_arguments(spec))
    count = micro_batches(config, topology)
    averager = Averager(
        module,
        lambda: groups.build(config.optimizer, module),
        topology.comms.data,
        int(config.averaging.bucket_mebibytes * 2**20),
    )
    names = list(task.input_shapes)
    engine = Engine(topology, module, SummedLoss(loss), averager, names, train.seed, train.autocast)
    loader = Loader(
        index.splits["train"],
        order.replica_micro_batches(topology.replica, topology.replicas, count),
        count,
        train.batch,
        train.seed,
        task.batch,
    )
    resolved = replace(config, model=model, parallel=replace(config.parallel, micro_batches=count))
    schedule = config.optimizer.schedule
    with together(world):
        arguments = schedule_arguments(schedule, total_steps(config, index))
        scheduler = construct.build(schedule, "optimizer.schedule", averager.optimizer, **arguments)
    return Job(resolved, topology, index, reader, task, engine, loader, scheduler)


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


def micro_batches(config: Config, topology: Topology) -> int:
    """Count the micro-batches of a step, V; refuse what can't be."""
    asked = config.parallel.micro_batches
    count = topology.replicas if asked == "auto" else asked
    if count < 1:
        raise ConfigError(f"parallel.micro_batches = {count}: at least 1, or auto, was expected")
    return count


def total_steps(config: Config, index: Index) -> int:
    """Count the optimizer steps of the whole run: `train.steps`, or epochs."""
    if config.train.steps is not None:
        return config.train.steps
    return config.train.epochs * order.steps_per_epoch(config.train.batch, len(index.splits["train"]))


def loss_arguments(spec: ClassPath) -> dict[str, Any]:
    """Check the loss; ask torch's losses for one value an element."""
    arguments = construct.check(spec, "train.loss")
    if takes_reduction(construct.find_class(spec.class_path, "train.loss.class_path")):
        arguments.setdefault("reduction", "none")
    return arguments


def schedule_arguments(spec: ClassPath, total: int) -> dict[str, Any]:
    """Check the LR scheduler; fill in the run's length where it asks for it."""
    filled = {"total_steps": total, "T_max": total}
    return construct.check(spec, "optimizer.schedule", given=("optimizer",), **filled)


def load(stored: Stored, config: Config) -> torch.nn.Module:
    """Build a run's model with a checkpoint's weights, in eval mode. Local; needs no data."""
    module = models.build(config.model, config.train.seed)
    state = module.state_dict()
    loaded = {name: tensor for name, tensor in state.items() if f"model.{name}" in stored.tensors}
    for name in loaded:
        loaded[name] = stored.read(f"model.{name}")
    # a tensor with several names is stored under its first
    missing = set(state) - set(loaded)
    module.load_state_dict(loaded, strict=False)
    after = module.state_dict()
    aliases = {id_of(after[name]) for name in loaded}
    lost = [name for name in missing if id_of(after[name]) not in aliases]
    if lost:
        raise CheckpointError(f"{stored.path} has no model.{lost[0]}: it is of another model")
    return module.eval()


def id_of(tensor: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    """Say which memory a tensor shows."""
    return tensor.data_ptr(), tuple(tensor.shape)
