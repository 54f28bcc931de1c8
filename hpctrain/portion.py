"""This rank's portion of the model: the module with its stage's weights, the optimizer over them.

      one stage        build · agree · optimizer; rank 0 gives its weights to all
      several stages   build without memory · agree · cut · make the stage's own · optimizer; replica 0 gives

Everything that is decided here is decided alike on all ranks: names and shapes are compared first.
"""

import platform
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from mpi4py import MPI

from hpctrain.averaging import groups, sync_norm
from hpctrain.batch import broadcast
from hpctrain.config import ClassPath, Config, Parallel
from hpctrain.data import order
from hpctrain.engine import precision
from hpctrain.errors import ConfigError, HpctrainError
from hpctrain.hidden import hidden
from hpctrain.log import LOGGER
from hpctrain.models import build as models
from hpctrain.models.deferred import Deferred
from hpctrain.piece import of_module
from hpctrain.pipeline import expected, simulate, split
from hpctrain.pipeline.part import Cut
from hpctrain.pipeline.pipeline import Pipeline, Share, every_tensor, take_share, users_of
from hpctrain.pipeline.transport import Transport
from hpctrain.room import ran_out
from hpctrain.scales import scales_of, schedules, stages_a_rank
from hpctrain.task import Task
from hpctrain.topology import Topology
from hpctrain.wire import together

OF_STAGES = ("cuts", "schedule", "gradients")
"""Settings of parallel that mean nothing with one stage."""


@dataclass(frozen=True)
class Portion:
    """What one rank holds of a model."""

    model: ClassPath
    """Complete: it builds the model without the data."""
    module: torch.nn.Module
    optimizer: torch.optim.Optimizer
    pipeline: Pipeline | None
    """Where there are several stages."""
    schedule: str
    """The pipeline's."""
    at_once: list[torch.nn.Parameter]
    """Parameters whose gradients are to wait only in a step's last micro-batches."""
    synced: bool
    """Whether BatchNorm layers see the whole batch."""


def build(
    config: Config,
    topology: Topology,
    task: Task,
    example: Callable[[], dict[str, torch.Tensor]],
    count: int,
    batches: Collection[int],
    trains: bool = True,
) -> Portion:
    """Build it; `example` reads one micro-batch's inputs, `count` is the step's micro-batches. Collective.

    `batches`: the samples that steps may have: a whole batch's, and what an epoch leaves for its last one.
    Where nothing is trained, nothing is measured either: the cut is by estimate.
    """
    world = topology.comms.world
    with together(world), told_of_memory(topology):
        model = models.complete(config.model, task.input_shapes, task.target_shapes)
        deferred = None
        if topology.stages > 1:
            module, deferred, reason = models.without_memory(model, config.train.seed)
            if deferred is None and not topology.world_rank:
                LOGGER.warning(
                    "the model's constructor can't run without memory (%s): every rank builds the "
                    "whole model before it keeps its stage",
                    reason,
                )
        else:
            module = models.build(model, config.train.seed).to(topology.device)
            idle = [at for at in OF_STAGES if getattr(config.parallel, at) != getattr(Parallel(), at)]
            if idle and not topology.world_rank:
                names = " and ".join(f"parallel.{name}" for name in idle)
                LOGGER.warning("%s: nothing hangs on it with parallel.stages = 1", names)
        refuse_extra_state(module)
        refuse_sparse(module)
        refuse_own_lists(module)
        synced = synchronise(module, config, count, topology.replicas) if trains else False
    same_parameters(module, world)
    pipeline, pieces, scales, schedule, at_once = None, None, None, "", []
    stages = topology.stages * stages_a_rank(config, config.parallel.schedule)
    if topology.stages > 1:
        with together(world), told_of_memory(topology):  # what may fail on one rank alone comes first
            inputs = example()
            split.need(config.parallel.cuts, stages)
            around = partial(precision, config.train.autocast, "cpu")  # where forwards are written down
            named, cuts = models.by_name(module, list(inputs)), config.parallel.cuts
            pieces = split.write(module, inputs, named, stages, around, cuts)
        here = {} if deferred else {id(tensor): tensor.nbytes for _, tensor in every_tensor(module)}
        built = sum(here.values())
        scales = scales_of(config, topology, count, synced, inputs, built) if trains else None
    with together(world), told_of_memory(topology):
        if pieces is not None:
            pieces.place(config.parallel.cuts, scales)
            works = {n for batch in batches for n in order.working(topology.replicas, count, batch)}
            own = max(works)
            schedule = pieces.choice.schedule or schedules(config, synced, own)[0]
            if config.parallel.schedule == "auto" and trains and not pieces.choice.schedule:
                LOGGER.info("the schedule is %s: no times were measured to choose by", schedule)
            kept = most_kept(schedule, topology, pieces, works)
            say(topology, pieces, schedule, own)
            share, optimizer = share_of(config, topology, module, deferred, pieces)
            again = recomputes(config, pieces, synced)
            every = module.named_parameters(remove_duplicate=False)
            at_once = [p for name, p in every if name in pieces.at_once]
        else:
            optimizer = groups.build(config.optimizer, module)
    if pieces is not None:  # no rank has failed, so all of them are here
        transport = Transport(topology.comms.pipe, topology.device)
        pipeline = Pipeline(pieces, transport, share.ties, again, kept, share.elsewhere, share.borrowed)
    same_start(module, topology.comms.data)
    if pipeline:
        pipeline.refresh()
    return Portion(model, module, optimizer, pipeline, schedule, at_once, synced)


@contextmanager
def told_of_memory(topology: Topology) -> Iterator[None]:
    """Say what to do where this rank's memory ends while the job is built. Local."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        asked = re.search(r"allocate ([0-9]+) bytes", str(error))
        more = f" for {int(asked[1]) / 2**20:,.0f} MiB more" if asked else ""
        raise HpctrainError(
            f"rank {topology.world_rank} on {platform.node()} has no memory{more}: weights, gradients and "
            f"the optimizer's state of its stage do not fit, with parallel.stages = {topology.stages} on "
            f"{topology.comms.world.size} ranks: take more stages, or nodes with more memory"
        ) from error


def synchronise(module: torch.nn.Module, config: Config, count: int, replicas: int) -> bool:
    """Let BatchNorm layers that are to see the whole batch do so; tell whether there are any. Local."""
    layers = sync_norm.convert(module, config.averaging.sync_batchnorm)
    if not layers:
        if config.averaging.sync_batchnorm:
            LOGGER.warning("averaging.sync_batchnorm does nothing: the model has no BatchNorm")
        if count > 1 and any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in module.modules()):
            LOGGER.info(
                "BatchNorm layers see one micro-batch at a time, of %d samples at most: results depend on "
                "parallel.micro_batches, %d here",
                *(-(-config.train.batch // count), count),
            )
        return False
    if config.averaging.invariant:
        raise ConfigError(
            "averaging.invariant and SyncBatchNorm exclude each other: statistics that replicas join have "
            "other bits on another number of them; BatchNorm sees one micro-batch at a time, on any layout"
        )
    if count != replicas:
        raise ConfigError(
            f"SyncBatchNorm takes its statistics over one micro-batch of each replica, which is the whole "
            f"batch only with as many as replicas: they are {count} and {replicas}; set "
            f"parallel.micro_batches = {replicas}"
        )
    return True


def share_of(
    config: Config,
    topology: Topology,
    module: torch.nn.Module,
    deferred: Deferred | None,
    model: Cut,
) -> tuple[Share, torch.optim.Optimizer]:
    """Keep this rank's stages of a model in pieces; give them, and the optimizer. Local.

    Only now their tensors are made, where the model was built without memory.
    """
    if deferred:
        tensors = dict(every_tensor(module))
        users = users_of(module, model).items()
        wanted = [tensors[n] for n, stages in users if any(mine(s, topology) for s in stages)]
        used = {id(tensors[name]) for stage in range(model.stages) for name in model.tensors(stage)}
        wanted += [kept for kept in hidden(module) if id(kept) not in used]  # a table, say
        deferred.materialise(module, wanted, topology.device)
    else:
        module.to(topology.device)
    optimizer = groups.build(config.optimizer, module)  # over all parameters: stages have the same groups
    share = take_share(module, model, topology.stage, topology.stages)
    trained = [tie.name for tie in share.ties if tie.tensor.requires_grad]
    if trained and config.averaging.invariant and model.stages > topology.stages:
        raise ConfigError(
            f"averaging.invariant: {trained[0]} is used by several stages, of which interleaved gives a rank "
            f"more than one, where its gradients of several micro-batches would mix: other bits than on one "
            f"stage; take another parallel.schedule"
        )
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) in share.own]
    for parameter in [p for p in optimizer.state if id(p) not in share.own]:
        del optimizer.state[parameter]
    return share, optimizer


def say(topology: Topology, pieces: Cut, schedule: str, micro_batches: int) -> None:
    """Log what was chosen, and what is expected of it with so many micro-batches a replica. Local."""
    if topology.world_rank:  # the log is the first one's
        return
    LOGGER.info("the model is cut %s", pieces.way)
    for line in [*pieces.choice.said, *expected.table(pieces, schedule, micro_batches, topology.crowded)]:
        LOGGER.info("%s", line)
    for line in pieces.choice.warned:
        LOGGER.warning("%s", line)
    if bare := [stage for stage in range(pieces.stages) if not pieces.tensors(stage)]:
        LOGGER.warning("stage %d has no weights: it has little to do while the others compute", bare[0])


def most_kept(schedule: str, topology: Topology, pieces: Cut, works: Iterable[int]) -> int:
    """Prove the schedule for a cut; give the most micro-batches on their way at once on a stage. Pure.

    `works`: how many a replica may have in a step.
    """
    virtual, links = pieces.stages // topology.stages, pieces.links()
    proofs = [simulate.check(schedule, topology.stages, range(n), *links, virtual) for n in works]
    return max(kept for proof in proofs for kept in proof.kept)


def mine(stage: int, topology: Topology) -> bool:
    """Whether a stage is this rank's. Local."""
    return stage % topology.stages == topology.stage


def recomputes(config: Config, model: Cut, synced: bool) -> bool:
    """Whether stages run forward again for backward. Local."""
    asked = config.parallel.recompute
    if synced and asked == "always":
        raise ConfigError(
            "parallel.recompute = always and SyncBatchNorm exclude each other: its statistics are of all "
            "replicas at one moment, which can't be had again; leave one of them out"
        )
    return not synced and (asked == "always" or (asked == "auto" and model.choice.recompute))


def refuse_extra_state(module: torch.nn.Module) -> None:
    """Refuse a module with state that a checkpoint would lose; tell of what only may be state. Local."""
    others = [name for name, value in module.state_dict().items() if not isinstance(value, torch.Tensor)]
    extra = [name for name in others if name.rpartition(".")[2] == "_extra_state"]
    if extra:
        raise ConfigError(
            f"the model keeps {extra[0]} by get_extra_state, which checkpoints don't hold: "
            f"keep it in a buffer (register_buffer)"
        )
    if others:  # a state_dict of the model's own; libraries put the constructor's arguments there
        LOGGER.info(
            "the model's own state_dict has %s, which is no tensor: checkpoints don't hold it, and a resume "
            "builds it anew from the configuration",
            ", ".join(others[:3]),
        )


def refuse_sparse(module: torch.nn.Module) -> None:
    """Refuse weights and buffers that are laid otherwise than by strides: no rank could send them. Local."""
    for name, tensor in every_tensor(module):
        if tensor.layout is not torch.strided:
            raise ConfigError(
                f"{name} of the model is {tensor.layout}: weights and buffers are sent from rank to rank and "
                f"kept in checkpoints as dense ones; register its indices and values instead, or keep it as "
                f"a plain attribute, which each rank makes by itself"
            )


def refuse_own_lists(module: torch.nn.Module) -> None:
    """Refuse a module whose parameters() leaves some out, or has others: who trains goes by it. Local."""
    mine = {id(p): name for name, p in torch.nn.Module.named_parameters(module)}
    listed, named = {id(p) for p in module.parameters()}, {id(p) for _, p in module.named_parameters()}
    if not mine.keys() == listed == named:
        other = [name for at, name in mine.items() if at not in listed & named] or ["another"]
        raise ConfigError(
            f"the model's own parameters() or named_parameters() is not that of its modules ({other[0]}): "
            f"leave it out; what is not to be trained says so by requires_grad_(False)"
        )


def same_parameters(module: torch.nn.Module, comm: MPI.Intracomm) -> None:
    """Raise ConfigError where the ranks have other parameters, or the same in another order. Collective."""
    pieces = of_module(module)
    mine = [(piece.name, piece.shape, str(piece.tensor.dtype)) for piece in pieces]
    first = comm.bcast(mine, root=0)
    with together(comm):
        if mine != first:
            other = next((a for a, b in zip(mine, first) if a != b), (len(mine), "parameters"))
            raise ConfigError(
                f"the model's constructor gives ranks different parameters ({other[0]}): it must not "
                f"depend on the rank, on random numbers or on the order of a set"
            )


def same_start(module: torch.nn.Module, comm: MPI.Intracomm) -> None:
    """Give all ranks rank 0's weights: a constructor may draw from a stream that has no seed. Collective."""
    for piece in of_module(module):
        broadcast(comm, piece.tensor, 0)
