import os
import random

import pytest

from hpctrain import topology as layout
from hpctrain.errors import ConfigError
from hpctrain.topology import Topology, lay_out


def nodes_of(sizes):
    return [f"node{n}" for n, size in enumerate(sizes) for _ in range(size)]


def check_layout(names, stages):
    places = lay_out(names, stages)
    replicas = len(names) // stages
    assert sorted((p.stage, p.replica) for p in places) == [
        (s, r) for s in range(stages) for r in range(replicas)
    ]
    within = {}
    for name, place in zip(names, places):
        assert place.local_rank == within.get(name, 0)
        within[name] = place.local_rank + 1
    assert len({p.node for p in places}) == len(within)
    return places


def spanning(names, places, stages):
    """Stages whose replicas lie on more than one node."""
    nodes = [set() for _ in range(stages)]
    for name, place in zip(names, places):
        nodes[place.stage].add(name)
    return sum(len(found) > 1 for found in nodes)


@pytest.mark.parametrize("size", [*range(1, 33), 48, 60, 64, 96, 128, 500, 1024, 4095, 4096])
def test_every_rank_has_one_place(size):
    for stages in [s for s in (1, 2, 3, 4, 6, 8, 16, 64, size) if size % s == 0]:
        for per_node in (1, 2, 3, 7, 8, 48, size):
            sizes = [per_node] * (size // per_node) + ([size % per_node] if size % per_node else [])
            names = nodes_of(sizes)
            places = check_layout(names, stages)
            replicas = size // stages
            if per_node % replicas == 0 and size % per_node == 0:
                assert spanning(names, places, stages) == 0


def test_uneven_nodes_split_as_few_stages_as_can_be():
    random.seed(1)
    for _ in range(300):
        sizes = [random.randint(1, 9) for _ in range(random.randint(1, 6))]
        total = sum(sizes)
        for stages in [s for s in range(1, total + 1) if total % s == 0]:
            names = nodes_of(sizes)
            places = check_layout(names, stages)
            replicas = total // stages
            inside = sum(size // replicas for size in sizes)
            assert stages - spanning(names, places, stages) >= inside


def test_ranks_dealt_round_robin_over_nodes():
    names = ["a", "b"] * 4
    places = check_layout(names, 2)
    assert {n for n, p in zip(names, places) if p.stage == 0} == {"a"}


def test_two_nodes_two_stages_as_drawn():
    places = lay_out(nodes_of([4, 4]), 2)
    assert [(p.stage, p.replica, p.node) for p in places] == [
        (0, 0, 0), (0, 1, 0), (0, 2, 0), (0, 3, 0), (1, 0, 1), (1, 1, 1), (1, 2, 1), (1, 3, 1),
    ]  # fmt: skip


def test_stages_that_do_not_divide():
    with pytest.raises(
        ConfigError,
        match=r"parallel.stages = 4 does not divide the 6 ranks .* run with mpirun -n 4 or -n 8, or set .* = 3",
    ):
        lay_out(["a"] * 6, 4)


@pytest.mark.mpi
def test_build_agrees_with_the_pure_layout(world):
    for stages in [s for s in range(1, world.size + 1) if world.size % s == 0]:
        with Topology.build(world, stages) as found:
            assert (found.world_rank, found.world_size) == (world.rank, world.size)
            assert found.replicas * found.stages == world.size
            assert found.comms.data.size == found.replicas
            assert found.comms.data.rank == found.replica
            assert found.comms.pipe.size == found.stages
            assert found.comms.pipe.rank == found.stage
            assert found.comms.node.size == found.local_size
            assert found.comms.node.rank == found.local_rank
            assert (found.comms.leaders is not None) == (found.local_rank == 0)
            assert found.device == "cpu" or found.device.startswith("cuda")
            stages_of_data = found.comms.data.allgather(found.stage)
            assert set(stages_of_data) == {found.stage}


@pytest.mark.mpi
def test_threads_are_shared_with_the_local_ranks(world, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with Topology.build(world) as found:
        if len(set(map(tuple, map(sorted, world.allgather(layout.usable_cores()))))) == 1:
            assert found.threads == max(1, len(os.sched_getaffinity(0)) // found.local_size)
    with Topology.build(world, threads=3) as found:
        assert found.threads == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    with Topology.build(world) as found:
        assert found.threads == 5


@pytest.mark.mpi
def test_communicators_are_freed(world):
    """Thousands of topologies would run MPI out of communicators if one leaked."""
    built = 0
    for _ in range(1500):
        with Topology.build(world, device="cpu"):
            built += 1
    assert built == 1500


@pytest.mark.mpi
def test_asking_for_a_gpu_that_is_not_there(world):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="torch sees no GPU here: set train.device = cpu"):
        Topology.build(world, device="cuda")


def test_a_rank_takes_the_gpu_of_its_local_rank(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [layout.choose_device("auto", r) for r in (0, 3, 5)] == ["cuda:0", "cuda:3", "cuda:1"]
    assert layout.choose_device("cuda", 2) == "cuda:2"
    assert layout.choose_device("cpu", 2) == "cpu"
