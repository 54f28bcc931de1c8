"""What memory is left, and what becomes of freed memory."""

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from hpctrain import room

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
