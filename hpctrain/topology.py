"""The layout of the processes, built once and passed down: who computes which part of a step.

      8 ranks on 2 nodes, 2 stages x 4 replicas          data  : the replicas of one stage
      node 0:  r0 r1 r2 r3   stage 0, replicas 0 1 2 3    pipe  : the stages of one replica
      node 1:  r4 r5 r6 r7   stage 1, replicas 0 1 2 3    node  : the ranks that share memory

Gradients flow between the replicas of a stage (much), activations between stages (little):
so a stage's replicas are kept inside a node and stages are laid across nodes.
"""

import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from types import TracebackType

from mpi4py import MPI

from hpctrain import abort, cuda_probe, launch
from hpctrain.errors import ConfigError, HpctrainError
from hpctrain.wire import together


@dataclass(frozen=True)
class Place:
    """Where one rank stands in the layout; indices count from 0."""

    replica: int
    stage: int
    node: int
    local_rank: int


def lay_out(nodes: Sequence[Hashable], stages: int) -> list[Place]:
    """Place ranks, given the name of each one's node, on replicas x stages. Pure.

    Whole stages are put inside nodes first; the ranks left over, in node order, make the
    stages that must span nodes. Stages are numbered along the nodes.

    >>> [(p.stage, p.replica) for p in lay_out(["a", "a", "b", "b"], 2)]
    [(0, 0), (0, 1), (1, 0), (1, 1)]
    >>> [(p.stage, p.replica) for p in lay_out(["a", "b", "a", "b"], 2)]
    [(0, 0), (1, 0), (0, 1), (1, 1)]
    >>> [p.stage for p in lay_out(["a"] * 3 + ["b"] * 2 + ["c"] * 3, 4)]
    [0, 0, 1, 2, 2, 3, 3, 1]
    """
    size = len(nodes)
    if stages < 1 or size % stages:
        raise ConfigError(layout_error(size, stages))
    replicas = size // stages
    members: dict[Hashable, list[int]] = {}
    for rank, name in enumerate(nodes):
        members.setdefault(name, []).append(rank)
    groups, rest = [], []
    for ranks in members.values():
        whole = len(ranks) // replicas * replicas
        groups += [ranks[at : at + replicas] for at in range(0, whole, replicas)]
        rest += ranks[whole:]
    groups += [rest[at : at + replicas] for at in range(0, len(rest), replicas)]
    along = {rank: at for at, rank in enumerate(r for ranks in members.values() for r in ranks)}
    groups.sort(key=lambda group: along[group[0]])
    seat = {rank: (s, r) for s, group in enumerate(groups) for r, rank in enumerate(group)}
    places: list[Place | None] = [None] * size
    for node, ranks in enumerate(members.values()):
        for local_rank, rank in enumerate(ranks):
            stage, replica = seat[rank]
            places[rank] = Place(replica, stage, node, local_rank)
    return [place for place in places if place is not None]


def layout_error(size: int, stages: int) -> str:
    """Say why ranks and stages do not fit, with the nearest numbers that do."""
    legal = [s for s in range(1, size + 1) if size % s == 0]
    near = min(legal, key=lambda s: abs(s - stages))
    fewer = size // max(1, stages) * max(1, stages)
    more = max(1, -(-size // max(1, stages))) * max(1, stages)
    ranks = " or ".join(f"-n {count}" for count in sorted({fewer, more}) if count)
    return (
        f"parallel.stages = {stages} does not divide the {size} rank{'s' * (size > 1)} that MPI started: "
        f"run with mpirun {ranks}, or set parallel.stages = {near}"
    )


def fair_threads(mine: set[int], others: Sequence[set[int]]) -> int:
    """Threads of a rank: the cores it may use, shared with the local ranks that may use them too.

    `others` are the core sets of all local ranks, the own one included. Where no rank is bound
    this is max(1, cores // local ranks); ranks bound to cores of their own get all of them.

    >>> fair_threads({0, 1, 2, 3}, [{0, 1, 2, 3}] * 2), fair_threads({0, 1}, [{0, 1}, {2, 3}])
    (2, 2)
    >>> fair_threads({0, 1}, [{0, 1}] * 4)
    1
    """
    sharers = sum(1 for cores in others if cores & mine)
    return max(1, len(mine) // max(1, sharers))


@dataclass(frozen=True)
class Comms:
    """The communicators of a rank, all duplicates with a name, freed when the topology closes."""

    world: MPI.Intracomm
    data: MPI.Intracomm
    pipe: MPI.Intracomm
    node: MPI.Intracomm
    leaders: MPI.Intracomm | None
    """One rank a node (local rank 0); None on the other ranks."""


@dataclass(frozen=True)
class Topology:
    """One frozen object that knows the layout; a context manager that frees its communicators."""

    world_rank: int
    world_size: int
    replica: int
    replicas: int
    stage: int
    stages: int
    node: int
    nodes: int
    local_rank: int
    local_size: int
    threads: int
    crowded: bool
    """More threads of ranks than cores on some core: waiting must give the core away."""
    device: str
    cuda_aware: bool
    """Whether MPI may be given a GPU's memory, on all nodes."""
    comms: Comms

    @classmethod
    def build(
        cls, comm: MPI.Intracomm, stages: int = 1, device: str = "auto", threads: int | None = None
    ) -> "Topology":
        """Build the layout of a communicator. Collective over it.

        `device` is "auto", "cpu" or "cuda"; `threads` None takes what OMP_NUM_THREADS says, else
        the fair share. Raises ConfigError, the same on all ranks, where the ranks do not divide
        into the stages or a rank has no GPU though "cuda" was asked for.
        """
        world = named(comm.Dup(), "world")
        abort.install(world)
        node = named(world.Split_type(MPI.COMM_TYPE_SHARED, key=world.rank), "node")
        names = world.allgather(node.bcast(world.rank, root=0))
        places: list[Place] = []
        found = ""
        try:
            with together(world):
                places = lay_out(names, stages)
                found = choose_device(device, node.rank)
        except HpctrainError:
            abort.remove(world, failing=True)
            node.Free()
            world.Free()
            raise
        place = places[world.rank]
        cores = node.allgather(usable_cores())
        count = threads or launch.asked_threads(os.environ) or fair_threads(usable_cores(), cores)
        wanted = sum(node.allgather(count))
        return cls(
            world_rank=world.rank,
            world_size=world.size,
            replica=place.replica,
            replicas=world.size // stages,
            stage=place.stage,
            stages=stages,
            node=place.node,
            nodes=len(set(names)),
            local_rank=place.local_rank,
            local_size=node.size,
            threads=count,
            crowded=wanted > len(set().union(*cores)),
            device=found,
            cuda_aware=world.allreduce(node.bcast(cuda_probe.Found.aware), op=MPI.MIN) > 0,
            comms=communicators(world, node, place),
        )

    def __enter__(self) -> "Topology":
        """Give the topology itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Free the communicators; after an error of this rank alone they are left to the abort."""
        abort.remove(self.comms.world)
        if kind is None:
            self.close()

    def close(self) -> None:
        """Free the communicators. Collective."""
        for comm in (self.comms.leaders, self.comms.data, self.comms.pipe, self.comms.node):
            if comm is not None:
                comm.Free()
        self.comms.world.Free()


def communicators(world: MPI.Intracomm, node: MPI.Intracomm, place: Place) -> Comms:
    """Split the world by stage, by replica and by node. Collective."""
    leaders = world.Split(0 if node.rank == 0 else MPI.UNDEFINED, world.rank)
    return Comms(
        world=world,
        data=named(world.Split(place.stage, place.replica), f"data of stage {place.stage}"),
        pipe=named(world.Split(place.replica, place.stage), f"pipe of replica {place.replica}"),
        node=node,
        leaders=named(leaders, "leaders") if leaders != MPI.COMM_NULL else None,
    )


def named(comm: MPI.Comm, name: str) -> MPI.Intracomm:
    """Give a communicator the name that MPI's own error messages will show."""
    assert isinstance(comm, MPI.Intracomm)
    comm.Set_name(f"hpctrain {name}")
    return comm


def usable_cores() -> set[int]:
    """Cores that this process may run on, by number."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def choose_device(asked: str, local_rank: int) -> str:
    """Device of a rank: "cpu", or the GPU that its local rank falls on. Local."""
    if asked == "cpu":
        return "cpu"
    import torch  # late: threads are set before torch starts

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        return f"cuda:{local_rank % count}"
    if asked == "auto":
        return "cpu"
    raise ConfigError("train.device = cuda was asked, torch sees no GPU here: set train.device = cpu")
