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
REFUSED = ("allocate memory", "can't start new thread")
"""How the system's refusals are told."""
APART = 256 << 10
"""Bytes of a block that is given back by itself, at least, where memory is short."""
MEMINFO, STATUS, OWN_GROUP = Path("/proc/meminfo"), Path("/proc/self/statm"), Path("/proc/self/cgroup")


def room(processes: int, most: bool = False, shared: bool = False) -> float:
    """Give the bytes left for each of so many processes of this machine; infinite where nobody says. Local.

    The least of: what the machine has available; what control groups leave (Slurm sets them); this process'
    own limits of addresses and of data (ulimit -v, ulimit -d). `most`: all that can be had, with swap and
    what lies free in this process; `shared`: for memory that processes share, which is no data of one.
    """
    all_of_them = min([*of_machine(most), *of_groups(most)], default=float("inf")) / processes
    return min([all_of_them, *of_process(most, shared)])


def ran_out(error: BaseException) -> bool:
    """Tell whether there was no memory for something: torch has no kind of error for it. Pure."""
    try:
        return isinstance(error, MemoryError) or any(words in str(error) for words in REFUSED)
    except Exception:  # of the user's own class, whose text can't be made
        return False


def meminfo(name: str) -> float | None:
    """Give bytes by their name in /proc/meminfo."""
    found = (line.split() for line in lines(MEMINFO))
    return next((1024.0 * int(words[1]) for words in found if words[0] == f"{name}:"), None)


def of_machine(most: bool) -> Iterator[float]:
    """Give what the kernel could still hand out."""
    available = meminfo("MemAvailable")
    if available is not None:
        yield available + most * (meminfo("SwapFree") or 0.0)


def of_groups(most: bool) -> Iterator[float]:
    """Give what is left in each control group (version 2) that this process is in, to the root."""
    for line in lines(OWN_GROUP):
        if not line.startswith("0::/"):
            continue
        own = CGROUP / line.strip().removeprefix("0::/")
        for folder in [own, *own.parents]:
            limit, used = lines(folder / "memory.max"), lines(folder / "memory.current")
            if limit and used and limit[0].strip() != "max":
                stat = dict(line.split() for line in lines(folder / "memory.stat"))
                # pages of files, which make room when asked
                files = float(stat.get("inactive_file", 0)) + float(stat.get("active_file", 0))
                left = float(limit[0]) - float(used[0]) + files
                yield max(0.0, left + most * of_swap(folder))
            if folder == CGROUP:
                break


def of_swap(folder: Path) -> float:
    """Give what a control group may still swap."""
    free = meminfo("SwapFree") or 0.0
    limit, used = lines(folder / "memory.swap.max"), lines(folder / "memory.swap.current")
    if limit and used and limit[0].strip() != "max":
        return min(free, max(0.0, float(limit[0]) - float(used[0])))
    return free


def of_process(most: bool, shared: bool) -> Iterator[float]:
    """Give what this process' own limits leave: of addresses, and of private memory that can be written."""
    used = [int(field) for line in lines(STATUS) for field in line.split()]
    for limit, field in ((resource.RLIMIT_AS, 0), (resource.RLIMIT_DATA, 5)):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY and not (shared and limit == resource.RLIMIT_DATA):
            taken = os.sysconf("SC_PAGE_SIZE") * used[field] if used else 0
            yield max(0.0, float(soft - taken) + most * free_inside())


class Mallinfo(ctypes.Structure):
    """What `man mallinfo2` says."""

    _fields_ = (
        *((f"_{number}", ctypes.c_size_t) for number in range(8)),
        ("fordblks", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    )


def free_inside() -> float:
    """Give the bytes that the C library holds and has not lent; 0 where it doesn't say."""
    ask = getattr(LIBRARY, "mallinfo2", None)
    if ask is None:
        return 0.0
    ask.restype = Mallinfo
    return float(ask().fordblks)


def give_back() -> None:
    """Give pages of freed memory back to the kernel; their addresses stay. Nothing without glibc."""
    trim = getattr(LIBRARY, "malloc_trim", None)
    if trim:
        trim(0)


def keep_memory(environment: Mapping[str, str], exact: bool = False) -> None:
    """Let memory that is freed stay with this process, for the next step, unless the user has a word on it.

    The C library gives the end of its heap back whenever that is free; a step frees its activations there,
    and the kernel would fill the next step's with zeros, page by page (`man mallopt`). What was freed before
    goes back. Nothing happens where the C library is not glibc. Local.

    `exact`: large blocks are given back one by one instead, and leave no holes: torch asks for memory that
    begins at a line, and the C library before version 2.38 does not take what is exactly as large for it.
    """
    tuned = "glibc.malloc" in environment.get("GLIBC_TUNABLES", "")
    if tuned or any(name.startswith("MALLOC_") for name in environment):
        return
    mallopt = getattr(LIBRARY, "mallopt", None)
    if mallopt:
        give_back()
        if not exact:
            mallopt(TRIM_THRESHOLD, 2**31 - 1)
        mallopt(MMAP_THRESHOLD, APART if exact else LARGEST)


def mebibytes(count: float) -> str:
    """Write bytes as MiB. Pure.

    >>> mebibytes(5_000_000), mebibytes(3 << 30), mebibytes(20_000), mebibytes(90)
    ('4.8', '3,072.0', '0.019', '0.0')
    """
    size = count / 2**20
    return f"{size:.2g}" if 1e-4 < size < 0.95 else f"{size:,.1f}"


def lines(path: Path) -> list[str]:
    """Read a file of the system's; nothing where there is none."""
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:
        return []
