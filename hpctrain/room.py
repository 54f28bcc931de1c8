"""Memory of this process: what it may take, as far as the system says, and what becomes of freed memory."""

import ctypes
import os
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
LIBRARY = ctypes.CDLL(None)
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Numbers of mallopt's parameters, in malloc.h."""
LARGEST = 32 << 20
"""Bytes of a block in the heap, at most: the C library takes no more."""
MEMINFO, STATUS, OWN_GROUP = Path("/proc/meminfo"), Path("/proc/self/statm"), Path("/proc/self/cgroup")


def room(processes: int, swap: bool = False) -> float:
    """Give the bytes left for each of so many processes of this machine; infinite where nobody says. Local.

    The least of: what the machine has available, with `swap` what it can swap, too; what control groups leave
    (Slurm sets them); this process' own limits of addresses and of data (ulimit -v, ulimit -d).
    """
    shared = min([*of_machine(swap), *of_groups()], default=float("inf")) / processes
    return min([shared, *of_process()])


def ran_out(error: BaseException) -> bool:
    """Tell whether there was no memory for something: torch has no kind of error for it. Pure."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error)


def of_machine(swap: bool) -> Iterator[float]:
    """Give what the kernel could still hand out."""
    fields = {line.split()[0]: line.split()[1] for line in lines(MEMINFO)}
    if "MemAvailable:" in fields:
        yield 1024.0 * (int(fields["MemAvailable:"]) + swap * int(fields.get("SwapFree:", 0)))


def of_groups() -> Iterator[float]:
    """Give what is left in each control group (version 2) that this process is in, to the root."""
    for line in lines(OWN_GROUP):
        if not line.startswith("0::/"):
            continue
        own = CGROUP / line.strip().removeprefix("0::/")
        for folder in [own, *own.parents]:
            most, used = lines(folder / "memory.max"), lines(folder / "memory.current")
            if most and used and most[0].strip() != "max":
                stat = dict(line.split() for line in lines(folder / "memory.stat"))
                files = float(stat.get("inactive_file", 0))  # pages of files, which make room when asked
                yield max(0.0, float(most[0]) - float(used[0]) + files)
            if folder == CGROUP:
                break


def of_process() -> Iterator[float]:
    """Give what this process' own limits leave: of addresses, and of private memory that can be written."""
    used = [int(field) for line in lines(STATUS) for field in line.split()]
    for limit, field in ((resource.RLIMIT_AS, 0), (resource.RLIMIT_DATA, 5)):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            taken = os.sysconf("SC_PAGE_SIZE") * used[field] if used else 0
            yield max(0.0, float(soft - taken))


def give_back() -> None:
    """Give pages of freed memory back to the kernel; their addresses stay. Nothing without glibc."""
    trim = getattr(LIBRARY, "malloc_trim", None)
    if trim:
        trim(0)


def keep_memory(environment: Mapping[str, str]) -> None:
    """Let memory that is freed stay with this process, for the next step, unless the user has a word on it.

    The C library gives the end of its heap back whenever that is free; a step frees its activations there,
    and the kernel would fill the next step's with zeros, page by page (`man mallopt`). What was freed before
    goes back. Nothing happens where the C library is not glibc. Local.
    """
    tuned = "glibc.malloc" in environment.get("GLIBC_TUNABLES", "")
    if tuned or any(name.startswith("MALLOC_") for name in environment):
        return
    mallopt = getattr(LIBRARY, "mallopt", None)
    if mallopt:
        give_back()
        mallopt(TRIM_THRESHOLD, 2**31 - 1)
        mallopt(MMAP_THRESHOLD, LARGEST)


def lines(path: Path) -> list[str]:
    """Read a file of the system's; nothing where there is none."""
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:
        return []
