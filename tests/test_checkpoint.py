"""Checkpoints: pieces back bit for bit at any number of ranks; damage and halves are passed over."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.checkpoint import files, load, plan, save
from hpctrain.checkpoint.files import digest, write_whole
from hpctrain.checkpoint.plan import Offer
from hpctrain.errors import CheckpointError
from hpctrain.piece import Piece, whole

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float16]


def tensors():
    random = np.random.default_rng(1)
    found = {
        f"t{n}": torch.from_numpy(random.normal(size=(n, 3)) * 9).to(kind) for n, kind in enumerate(DTYPES)
    }
    found["scalar"] = torch.tensor(math.pi)
    found["turned"] = torch.arange(12.0).view(3, 4).t()
    found["special"] = torch.tensor([math.nan, math.inf, -0.0, 1e-45])
    return found


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@pytest.mark.mpi
def test_replicated_pieces_are_written_once_and_come_back(world, shared_tmp):
    kept = tensors()
    path = save.save(
        shared_tmp,
        120,
        [whole(n, t) for n, t in kept.items()],
        {"step": 120, "note": "é", "milestones": {10: 1, 2: 1}, "pair": (1, 2)},
        world,
    )
    assert path == shared_tmp / "step-00000120"
    stored = load.open_checkpoint(path)
    assert (stored.step, stored.state["note"]) == (120, "é")
    assert sorted(e["name"] for e in stored.pieces) == sorted(kept)
    assert stored.damage() == []
    for name, tensor in kept.items():
        assert stored.read(name).dtype == tensor.dtype
        assert bits(stored.read(name)) == bits(tensor), name
    assert len(stored.files) == min(world.size, len(kept))


@pytest.mark.mpi
def test_sharded_pieces_are_read_at_any_other_cut(world, shared_tmp):
    """Each rank writes its own range; any range is read back. Independent answer: the whole tensor."""
    full = torch.arange(101.0)
    start, stop = world.rank * 101 // world.size, (world.rank + 1) * 101 // world.size
    save.save(shared_tmp, 1, [Piece("w", (101,), start, stop, full[start:stop])], {}, world)
    stored = load.open_checkpoint(shared_tmp / "step-00000001")
    for parts in (1, 2, 3, 5, 7):
        for part in range(parts):
            a, b = part * 101 // parts, (part + 1) * 101 // parts
            target = torch.zeros(b - a)
            stored.fill(Piece("w", (101,), a, b, target))
            assert torch.equal(target, full[a:b])


@pytest.mark.mpi
def test_a_missing_part_is_no_tensor(world, shared_tmp):
    save.save(shared_tmp, 1, [Piece("w", (10,), 0, 4, torch.zeros(4))], {}, world)
    stored = load.open_checkpoint(shared_tmp / "step-00000001")
    with pytest.raises(CheckpointError, match="w is not whole"):
        stored.read("w")
    with pytest.raises(CheckpointError, match="has no v: it is of another model"):
        stored.fill(whole("v", torch.zeros(2)))
    with pytest.raises(CheckpointError, match=r"w has shape \(10,\), the model needs \(3,\)"):
        stored.fill(whole("w", torch.zeros(3)))


@given(st.lists(st.lists(st.integers(0, 12), max_size=8, unique=True), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_plan_writes_each_piece_once(holdings):
    offers = [[Offer(f"p{n}", 0, 4, 4 * (n + 1)) for n in held] for held in holdings]
    chosen = plan.assign(offers)
    written = [offers[rank][at].name for rank, mine in enumerate(chosen) for at in mine]
    assert sorted(written) == sorted({o.name for offer in offers for o in offer})


def test_plan_spreads_the_bytes():
    offers = [[Offer(f"p{n}", 0, 1, 100 + n) for n in range(64)]] * 4
    loads = [sum(offers[r][at].bytes for at in mine) for r, mine in enumerate(plan.assign(offers))]
    assert max(loads) - min(loads) < 200


def simple(world, folder, step, value=0.0):
    return save.save(folder, step, [whole("w", torch.full((50,), value))], {"step": step}, world)


@pytest.mark.mpi
def test_newest_good_one_counts(world, shared_tmp):
    for step in (1, 2, 3, 4):
        simple(world, shared_tmp, step, float(step))
    world.Barrier()
    if world.rank == 0:
        torn = shared_tmp / "step-00000004" / "rank-0.safetensors"
        raw = bytearray(torn.read_bytes())
        raw[-3] ^= 1
        torn.write_bytes(bytes(raw))
        os.remove(shared_tmp / "step-00000003" / "rank-0.safetensors")
        (shared_tmp / "step-00000009.tmp").mkdir()
        (shared_tmp / "step-00000010").mkdir()
        stored, passed_over = load.newest(shared_tmp)
        assert stored is not None
        assert stored.step == 2
        assert [("damaged" in line, "missing" in line) for line in passed_over] == [
            (True, False),
            (False, True),
        ]
        assert torch.equal(stored.read("w"), torch.full((50,), 2.0))


@pytest.mark.mpi
def test_no_checkpoint_and_unreadable_manifests(world, shared_tmp):
    assert load.newest(shared_tmp / "nothing") == (None, [])
    path = simple(world, shared_tmp, 5)
    world.Barrier()
    if world.rank == 0:
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
        with pytest.raises(CheckpointError, match="has format 99, this hpctrain reads 2"):
            load.open_checkpoint(path)
        (path / "manifest.json").write_text("{")
        found, passed_over = load.newest(shared_tmp)
        assert found is None
        assert "its manifest can't be read" in passed_over[0]


@pytest.mark.mpi
def test_half_written_folders_are_swept_and_never_counted(world, shared_tmp):
    if world.rank == 0:
        stale = shared_tmp / "step-00000007.tmp"
        stale.mkdir()
        (stale / "manifest.json").write_text("{}")
        assert files.complete_steps(shared_tmp) == []
    world.Barrier()
    simple(world, shared_tmp, 8)
    world.Barrier()
    assert [p.name for p in shared_tmp.iterdir()] == ["step-00000008"]


@pytest.mark.mpi
def test_saving_the_same_step_again_replaces_it(world, shared_tmp):
    simple(world, shared_tmp, 8, 1.0)
    simple(world, shared_tmp, 8, 2.0)
    assert float(load.open_checkpoint(shared_tmp / "step-00000008").read("w")[0]) == 2.0


@pytest.mark.mpi
def test_retention(world, shared_tmp):
    for step in range(10, 70, 10):
        simple(world, shared_tmp, step)
    world.Barrier()
    if world.rank == 0:
        save.prune(shared_tmp, keep=2, best=20, newest=60)
        assert files.complete_steps(shared_tmp) == [20, 50, 60]
        assert sorted(p.name for p in shared_tmp.iterdir()) == [files.folder_name(s) for s in (20, 50, 60)]


@pytest.mark.mpi
def test_a_folder_that_can_not_be_written_is_one_error_on_all_ranks(world, shared_tmp):
    blocked = shared_tmp / "file"
    if world.rank == 0:
        blocked.write_text("in the way")
    world.Barrier()
    with pytest.raises(Exception, match="file"):
        simple(world, blocked, 1)


@pytest.mark.mpi
def test_no_pickle_in_what_is_written(tmp_path, world):
    from mpi4py import MPI

    path = simple(MPI.COMM_SELF, tmp_path, 1)
    head = (path / "rank-0.safetensors").read_bytes()
    assert int.from_bytes(head[:8], "little") < len(head)
    json.loads(head[8 : 8 + int.from_bytes(head[:8], "little")])


def test_write_whole_leaves_no_trace(tmp_path):
    write_whole(tmp_path / "a.txt", "one")
    write_whole(tmp_path / "a.txt", "two")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "two"
    assert digest(tmp_path / "a.txt") == "3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3"


@pytest.mark.mpi
def test_a_flipped_bit_in_the_manifest_is_seen(world, shared_tmp):
    path = simple(world, shared_tmp, 5)
    world.Barrier()
    if world.rank == 0:
        text = (path / "manifest.json").read_text()
        for damage in (text.replace('"step": 5', '"step": 7'), "[]", text.replace("pieces", "pieceS")):
            (path / "manifest.json").write_text(damage)
            with pytest.raises(CheckpointError, match="its manifest"):
                load.open_checkpoint(path)


@pytest.mark.mpi
def test_the_one_just_saved_stays_and_later_damaged_ones_go(world, shared_tmp):
    for step in (10, 15, 20, 8):
        simple(world, shared_tmp, step)
    world.Barrier()
    if world.rank == 0:
        save.prune(shared_tmp, keep=3, best=None, newest=8)
        assert files.complete_steps(shared_tmp) == [8]


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_numbers(world, shared_tmp, dtype):
    tensor = torch.randn(3, 4, dtype=dtype, generator=torch.Generator().manual_seed(1))
    save.save(shared_tmp, 1, [whole("w", tensor)], {}, world)
    found = load.open_checkpoint(shared_tmp / "step-00000001")
    assert torch.equal(found.read("w"), tensor)
    part = torch.zeros(5, dtype=dtype)
    found.fill(Piece("w", (3, 4), 2, 7, part))
    assert torch.equal(part, tensor.reshape(-1)[2:7])


def test_numbers_that_a_tensor_holds_mirrored(world, tmp_path):
    """Torch notes a conjugate or a sign beside the memory, and turns the numbers when they are read."""
    mirrored = torch.randn(3, 4, dtype=torch.complex64).conj()
    save.save(tmp_path, 1, [whole("w", mirrored), whole("part", mirrored.imag)], {}, world)
    found = load.open_checkpoint(tmp_path / "step-00000001")
    assert torch.equal(found.read("w"), mirrored)
    assert torch.equal(found.read("part"), mirrored.imag)


def most_resident(reset: bool) -> int:
    """Bytes of this process that were in memory at once, at most, since it was last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not tell")
def test_a_save_needs_no_second_copy(world, tmp_path):
    """Weights and moments take nearly all the memory there is, and lie in one stretch."""
    flat = torch.rand(2**26)
    shape, size = (4, 2**24), 2**24
    parts = torch.split(flat, size)
    pieces = [Piece("w", shape, at * size, (at + 1) * size, part) for at, part in enumerate(parts)]
    before = most_resident(reset=True)
    save.save(tmp_path, 1, pieces, {}, world)
    assert most_resident(reset=False) - before < flat.nbytes / 2
    assert torch.equal(load.open_checkpoint(tmp_path / "step-00000001").read("w").view(-1), flat)


def test_tensors_that_lie_over_one_another(world, tmp_path):
    flat = torch.arange(12.0)
    save.save(tmp_path, 1, [whole("a", flat[:8]), whole("b", flat[4:]), whole("c", flat)], {}, world)
    stored = load.open_checkpoint(tmp_path / "step-00000001")
    assert [stored.read(name).tolist() for name in "abc"] == [
        flat[:8].tolist(),
        flat[4:].tolist(),
        flat.tolist(),
    ]
