"""What memory is left, and what becomes of freed memory."""

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from hpctrain import room

HOLED = """
import os
import torch
from hpctrain.room import keep_memory
keep_memory(dict(), exact={exact})
pages = lambda: int(open("/proc/self/statm").read().split()[1])
before, most = pages(), 0
for step in range(6):
    kept = []
    for _ in range(40):
        kept.append(torch.zeros(1 << 19))
        passing = torch.zeros(1 << 19) + torch.zeros(1 << 19)
        small = [torch.zeros(1000) for _ in range(3)]
        kept.append(small)
    most = max(most, pages() - before)
print(most * os.sysconf("SC_PAGE_SIZE") / (42 << 21))
"""
STEPS = """
import resource
from hpctrain.room import keep_memory
keep_memory({environment})
for step in range(12):
    if step == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytearray(1 << 20) + b"1" for _ in range(32)]
    del blocks
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize(
    ("environment", "keeps"),
    [
        ({}, True),
        ({"MALLOC_ARENA_MAX": "2"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.tcache_count=7"}, False),
    ],
)
def test_memory_stays_with_the_process(environment, keeps):
    """Pages that the kernel brings in a step that takes and frees 32 MiB: 8,192 are in them."""
    program = STEPS.format(environment=environment)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    found = subprocess.run(
        [sys.executable, "-c", program], env=clean, check=True, capture_output=True, text=True, timeout=60
    )
    pages = int(found.stdout)
    assert pages < 100 if keeps else pages > 2000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_an_exact_heap_has_no_holes():
    """The most pages of forty tensors of 2 MiB that stay and two that go, by their size."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    found = {}
    for exact in (False, True):
        program = HOLED.format(exact=exact)
        done = subprocess.run(
            [sys.executable, "-c", program], env=clean, check=True, capture_output=True, text=True, timeout=60
        )
        found[exact] = float(done.stdout)
    assert found[True] < 1.15
    assert found[True] < found[False] + 0.02


def test_room_is_what_the_system_leaves(tmp_path, monkeypatch):
    """Real limits of this process; control groups from files as the kernel writes them."""
    machine = room.room(1)
    assert 0 < machine < 1e15
    assert room.room(4) < 0.5 * machine
    for limit, field in ((resource.RLIMIT_AS, 0), (resource.RLIMIT_DATA, 5)):
        before = resource.getrlimit(limit)
        pages = int(Path("/proc/self/statm").read_text().split()[field])
        try:
            resource.setrlimit(limit, (pages * resource.getpagesize() + 2**28, before[1]))
            assert 0 <= room.room(1) <= 2**28
        finally:
            resource.setrlimit(limit, before)
    for folder, most, used in ((".", "max", 9), ("slurm", 10_000, 7_000), ("slurm/job", 6_000, 5_500)):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "memory.max").write_text(f"{most}\n")
        (tmp_path / folder / "memory.current").write_text(f"{used}\n")
        (tmp_path / folder / "memory.stat").write_text("anon 1\ninactive_file 400\n")
    (tmp_path / "own").write_text("0::/slurm/job\n")
    monkeypatch.setattr(room, "CGROUP", tmp_path)
    monkeypatch.setattr(room, "OWN_GROUP", tmp_path / "own")
    assert sorted(room.of_groups(False)) == [900, 3_400]
    assert room.room(2) == 450


def test_room_at_the_most(tmp_path, monkeypatch):
    """Swap, what lies free in the process, and, for memory that processes share, no limit of data."""
    (tmp_path / "meminfo").write_text("MemAvailable: 1000 kB\nSwapFree: 500 kB\n")
    (tmp_path / "own").write_text("0::/job\n")
    (tmp_path / "job").mkdir()
    for name, text in (("max", "90000"), ("current", "50000"), ("stat", "active_file 30000\n")):
        (tmp_path / "job" / f"memory.{name}").write_text(text)
    for name, path in (("MEMINFO", "meminfo"), ("OWN_GROUP", "none"), ("CGROUP", ".")):
        monkeypatch.setattr(room, name, tmp_path / path)
    assert [room.room(1), room.room(2), room.room(1, most=True)] == [1024e3, 512e3, 1536e3]
    monkeypatch.setattr(room, "OWN_GROUP", tmp_path / "own")
    assert room.room(1) == 70000
    assert room.room(1, most=True) == 70000 + 512e3
    (tmp_path / "job" / "memory.swap.max").write_text("7000")
    (tmp_path / "job" / "memory.swap.current").write_text("1000")
    assert room.room(1, most=True) == 76000
    monkeypatch.setattr(room, "OWN_GROUP", tmp_path / "none")
    monkeypatch.setattr(room, "MEMINFO", tmp_path / "none")
    assert room.room(1, most=True) == float("inf")
    monkeypatch.setattr(room, "free_inside", lambda: 5000.0)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (pages * resource.getpagesize() + 2**28, before[1]))
        assert room.room(1, most=True, shared=True) == float("inf")
        assert room.room(1) < room.room(1, most=True) < 2**29
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def test_what_lies_free_in_the_process_is_counted():
    """A fresh process whose heap has a hole: blocks below the size that the kernel lends one by one."""
    program = """
from hpctrain import room
blocks = [bytearray(100_000) for _ in range(200)]
last = bytearray(100_000)
before = room.free_inside()
del blocks
print(room.free_inside() - before)
"""
    found = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60
    )
    assert 15e6 < float(found.stdout) < 25e6
