"""By what a cut is chosen: the schedules that may be, what memory is left, how fast the network is."""

import math

import torch
from mpi4py import MPI

from hpctrain import network
from hpctrain.averaging import groups
from hpctrain.config import Config
from hpctrain.data import order
from hpctrain.data.loader import AHEAD
from hpctrain.engine import precision
from hpctrain.pipeline import simulate
from hpctrain.pipeline.choice import Plan, Scales, Wire
from hpctrain.pipeline.profile import Limits
from hpctrain.pipeline.schedule import CHOSEN, SEVERAL
from hpctrain.room import give_back, room
from hpctrain.topology import Topology, usable_cores

OTHERS = 128 << 20
"""Bytes of a rank that are left for what nothing here counts: libraries, and holes between what lives."""


def scales_of(
    config: Config,
    topology: Topology,
    count: int,
    synced: bool,
    inputs: dict[str, torch.Tensor],
    built: int,
) -> Scales | None:
    """Say by what a cut is to be chosen; None where nothing is measured. Collective.

    `inputs`: of a micro-batch; `built`: bytes of weights that are here by now, and go or are this rank's own.
    """
    world = topology.comms.world
    if topology.device != "cpu":
        return None
    node = topology.comms.node
    own = max(order.working(topology.replicas, count, config.train.batch))
    # inputs and targets, about as much again, of the steps that are read ahead and of the one that runs
    read = 2 * (AHEAD + 1) * own * sum(x.nbytes for x in inputs.values())
    at_stage = world.allgather(topology.stage)
    ranks = [[rank for rank, stage in enumerate(at_stage) if stage == at] for at in range(topology.stages)]
    neighbours = node.allgather((topology.stage, usable_cores()))
    cores = set[int]().union(*(own for _, own in neighbours))
    turns = world.allreduce(-(-node.size // len(cores)) if topology.crowded else 1, op=MPI.MAX)
    # a node has one copy of a stage's weights and of the optimizer's numbers, each rank its gradients
    sharing = sum(stage == topology.stage for stage, _ in neighbours)
    state = groups.state_copies(config.optimizer)
    copies = world.allreduce(1.0 + (1.0 + state) / sharing, op=MPI.MAX)
    state *= config.optimizer.class_path.startswith("torch.optim.")  # others may have it in eight bits
    least = world.allreduce(1.0 + (1.0 + state) / sharing, op=MPI.MIN)
    sizes = order.sizes(config.train.batch, count)

    def limits() -> Limits:
        give_back()  # what measuring took
        left = max(0.0, room(node.size) + built - OTHERS - read)
        of_several = topology.replicas > 1  # they share a node's memory
        most, share = (room(processes, True, of_several) + built for processes in (1, node.size))
        mine = [stage == topology.stage for stage in range(topology.stages)]
        usual, largest = ([size if own else math.inf for own in mine] for size in (left, most))
        return Limits(usual, largest, share)

    plans = []
    for schedule in schedules(config, synced, own):
        virtual = stages_a_rank(config, schedule)
        dry = simulate.check(schedule, topology.stages, range(own), virtual=virtual)
        plans.append(Plan(schedule, virtual, dry.lives, CHOSEN.get(schedule, 1.0)))
    return Scales(
        world,
        ranks,
        limits,
        plans,
        own,
        copies,
        least,
        min(sizes) / max(sizes),
        precision(config.train.autocast, topology.device),
        (node.rank % turns, turns),
        "never" if synced else config.parallel.recompute,
        splits(config),
        wires_of(topology),
    )


def wires_of(topology: Topology) -> list[Wire]:
    """Measure what messages take from each rank of a pipeline to the next, the last one's to the first.

    On a node nothing; between nodes the worst of them. Collective.
    """
    world, pipe = topology.comms.world, topology.comms.pipe
    nodes = pipe.allgather(topology.node)
    if not world.allreduce(len(set(nodes)) > 1, op=MPI.LOR):
        return []
    latency, bandwidth = network.measure(world, pipe)
    between = [node != nodes[(rank + 1) % pipe.size] for rank, node in enumerate(nodes)]
    spans = [any(of) for of in zip(*world.allgather(between))]  # in any replica
    return [Wire(latency, 1.0 / bandwidth) if far else Wire() for far in spans]


def schedules(config: Config, synced: bool, micro_batches: int) -> list[str]:
    """List the schedules to choose from, for so many micro-batches of a replica. Pure.

    zb-h2 wants as many as it keeps, else its stages have nothing more to do meanwhile.
    Fast gradients have other bits by each, so their schedule is fixed. With SyncBatchNorm a replica has one
    micro-batch, with `invariant` no backward is split.
    """
    if config.parallel.schedule != "auto":
        return [config.parallel.schedule]
    if config.averaging.invariant or synced:
        return ["1f1b"]
    if config.parallel.gradients == "fast":
        return ["zb-h1"]
    enough = micro_batches >= 2 * config.parallel.stages - 1
    return [name for name in CHOSEN if name != "zb-h2" or enough]


def splits(config: Config) -> str:
    """Say whether backward passes run in halves (`Scales.splits`). Pure."""
    if config.averaging.invariant:
        return "never"
    return "always" if config.parallel.gradients == "fast" else "auto"  # in fast the bits hang on it


def stages_a_rank(config: Config, schedule: str) -> int:
    """Say how many stages a schedule runs on each rank; `auto` may choose one that runs more. Pure."""
    return config.parallel.virtual_stages if schedule in SEVERAL else 1
