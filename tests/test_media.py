"""Laws for every way of summing: strategies x sizes x dtypes x ranks x virtual nodes."""

import numpy as np
import pytest
import torch

from hpctrain import node_memory as memory
from hpctrain.averaging import tree as trees
from hpctrain.averaging.averager import Averager
from hpctrain.averaging.medium import BLOCK, Wire
from hpctrain.averaging.node import Node
from hpctrain.averaging.space import UNIT, Space
from hpctrain.averaging.staged import Staged
from hpctrain.node_memory import NodeMemory, Rendezvous, alive

WAYS = [
    "wire",
    "node",
    "staged",
    "2 staged",
    "staged tree",
    "3 nodes tree",
    "uneven nodes tree",
    "2 nodes",
    "3 nodes",
    "uneven nodes",
    "wire tree",
    "node tree",
    "2 nodes tree",
]


def build(way, comm, spaces):
    ranks = range(comm.size)
    node_of = {"2": [r % 2 for r in ranks], "3": [r % 3 for r in ranks], "u": [r // 3 for r in ranks]}
    tree = None
    if way.endswith("tree"):
        tree = trees.relabel(trees.shares(comm.size, list(ranks)), lambda leaf: (leaf[0], 0))
    if way.startswith("wire"):
        return Wire(comm, spaces, 1, tree)
    if "staged" in way:
        return Staged(spaces, lambda its: Node(comm, its, 3, True, tree=tree, node_of=node_of.get(way[0])))
    return Node(comm, spaces, 3, True, tree=tree, node_of=node_of.get(way[0]))


def space(units, dtype):
    """One bucket of some units, one more of a single unit."""
    found = Space(dtype, torch.device("cpu"))
    found.buckets = [(0, units * UNIT), (units * UNIT, (units + 1) * UNIT)]
    found.size = (units + 1) * UNIT
    return found


def numbers(rank, count, dtype):
    values = np.random.default_rng(100 + rank).normal(size=count) * 10.0 ** (rank - 1)
    return torch.from_numpy(values).to(dtype)


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("units", [0, 1, 5, 2 * BLOCK // UNIT + 3])
@pytest.mark.parametrize("way", WAYS)
def test_a_sum_is_a_float64_sum_within_its_bound_and_equal_on_all_ranks(world, way, units, dtype):
    """Bound: n-1 additions in the wire's precision, and one rounding to the dtype of the gradients."""
    spaces = [space(units, dtype), space(0, torch.float32)]
    medium = build(way, world, spaces)
    for again in range(2):
        medium.begin()
        for flat in medium.slots[0]:
            flat.copy_(numbers(world.rank + again, len(flat), flat.dtype))

        def store(number, start, stop, total):
            medium.slots[0][number][start:stop] = total

        small = medium.exchange(np.array([1.0, world.rank, 0.5]))
        assert small.tolist() == [world.size, world.size * (world.size - 1) / 2, world.size / 2]
        medium.sum(store, stored=True)
        medium.finish(weights=False)
        medium.spread([s.buckets for s in spaces])
        for s, found in zip(spaces, medium.slots[0]):
            given = [numbers(r + again, s.size, s.dtype).double() for r in range(world.size)]
            exact, absolute = sum(given), sum(v.abs() for v in given)
            wire = torch.finfo(s.wire).eps * (world.size - 1) * absolute
            rounding = torch.finfo(s.dtype).eps * exact.abs() if s.dtype != s.wire else 0.0
            assert bool(((found.double() - exact).abs() <= wire + rounding).all())
        bits = [flat.view(torch.uint8).numpy().tobytes() for flat in medium.slots[0]]
        assert all(other == bits for other in world.allgather(bits))
    medium.close()


@pytest.mark.mpi
@pytest.mark.parametrize("way", WAYS)
def test_the_sum_repeats_bit_for_bit(world, way):
    spaces = [space(9, torch.float32)]
    medium, results = build(way, world, spaces), []
    for _ in range(3):
        medium.begin()
        medium.slots[0][0].copy_(numbers(world.rank, spaces[0].size, torch.float32))
        medium.exchange(np.zeros(3))
        parts = []
        medium.sum(lambda number, a, b, total, parts=parts: parts.append((a, total.numpy().tobytes())))
        medium.finish(weights=False)
        results.append(parts)
    assert results[0] == results[1] == results[2]
    medium.close()


@pytest.mark.mpi
def test_a_node_without_room_falls_back_to_mpi_and_says_so(world, monkeypatch, caplog):
    monkeypatch.setattr(memory, "FOLDER", "/nowhere/at/all")
    module = torch.nn.Linear(3, 2)
    with caplog.at_level("WARNING"):
        averager = Averager(module, torch.optim.AdamW(module.parameters(), fused=True), world)
    assert isinstance(averager.medium, Wire)
    assert not averager.sharded
    if world.size > 1:
        assert (
            "averaging by MPI alone, which is slower: the node's shared memory can't be used" in caplog.text
        )
        assert "make /dev/shm larger" in caplog.text
    averager.close()


@pytest.mark.mpi
def test_memory_is_reserved_or_refused_and_leaves_no_name(world, monkeypatch, shared_tmp):
    monkeypatch.setattr(memory, "FOLDER", str(shared_tmp))
    node = NodeMemory(world, 100, 200)
    view = node.tensor(world.rank, 0, 50, torch.float32)
    view.fill_(world.rank)
    world.Barrier()
    assert [float(node.tensor(r, 0, 50, torch.float32)[7]) for r in range(world.size)] == list(
        range(world.size)
    )
    world.Barrier()
    assert list(shared_tmp.iterdir()) == []
    world.Barrier()  # the next file is not made before all have looked
    with pytest.raises(OSError, match=r"space|large|File"):
        NodeMemory(world, 100, 1 << 60)
    world.Barrier()
    assert list(shared_tmp.iterdir()) == []
    world.Barrier()  # the next file is not made before all have looked


@pytest.mark.mpi
def test_memory_that_one_rank_cannot_map_is_refused_on_all(world, monkeypatch, shared_tmp):
    monkeypatch.setattr(memory, "FOLDER", str(shared_tmp))

    def no_memory(*arguments):
        raise OSError("cannot allocate memory")

    if world.rank == world.size - 1:
        monkeypatch.setattr(memory.mmap, "mmap", no_memory)
    with pytest.raises(OSError, match="cannot allocate memory"):
        NodeMemory(world, 100, 200)
    world.Barrier()
    assert list(shared_tmp.iterdir()) == []


@pytest.mark.mpi
@pytest.mark.parametrize("crowded", [False, True])
def test_what_was_written_before_a_meeting_is_seen_behind_it(world, crowded):
    """Each round every rank writes a new number into its memory and reads those of the others."""
    rounds = 3000
    node = NodeMemory(world, 0, 64)
    place = Rendezvous(world, node, crowded)
    parts = [node.tensor(r, 0, 8, torch.float64).numpy() for r in range(world.size)]
    for number in range(rounds):
        parts[world.rank][:] = number * 1000 + world.rank
        place.meet()
        seen = [float(part[3]) for part in parts]
        assert seen == [number * 1000.0 + r for r in range(world.size)]
        place.meet()


def test_a_dead_process_is_known_even_before_it_is_buried():
    import subprocess
    import sys

    process = subprocess.Popen([sys.executable, "-c", "pass"])
    import time

    end = time.monotonic() + 20
    while alive(process.pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(process.pid)
    process.wait()
    assert not alive(process.pid)


@pytest.mark.mpi
def test_bucket_size_has_no_effect_on_results(world):
    """One bucket or one a parameter: the order of each element's additions is the same."""
    found = []
    for size in (1, 25 << 20):
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(40, 60), torch.nn.Linear(60, 3))
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
        averager = Averager(module, optimizer, world, shelf_bytes=size)
        averager.begin([world.rank])
        module(torch.full((2, 40), 1.0 + world.rank)).sum().backward()
        averager.joined(world.rank, 1.0, 2.0)
        averager.step()
        found.append([p.detach().clone() for p in module.parameters()])
        averager.close()
    assert all(torch.equal(a, b) for a, b in zip(*found))
