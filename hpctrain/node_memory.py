"""Memory that the ranks of a node share, and how they meet there.

The memory is a file in the shared-memory filesystem that loses its name as soon as all ranks
have opened it, while it is empty: the kernel gives it back when the last rank ends, however it
ends. Every rank reserves its own part, and its share of the common part, before use (so a full
filesystem is an error now, not a SIGBUS later; the pages lie near the rank's core, and those of
the common part on all sockets in turn).

MPI's own windows (Win.Allocate_shared) are as fast, being the same mapping, but freeing them is
collective, which a rank that fails cannot promise, and they do not reserve.

Meeting: each rank owns a counter in a cache line of its own.

      rank r:  fence · counter[r] ← n · wait until every counter ≥ n · fence

What a rank wrote before the first fence is seen by all behind their second one: the counter is
one aligned 8-byte store, and `Fence` keeps it behind the data and the data's readers behind it.
"""

import mmap
import os
import threading
import time
import uuid

import torch
from mpi4py import MPI

from hpctrain.errors import RankError

FOLDER = "/dev/shm"
LINE = 64
PAGE = 4096
SPINS = 2000
YIELDS = 300
NAP_SECONDS = 30e-6
LOOK_SECONDS = 1.0


class NodeMemory:
    """One mapping of all ranks of `comm`: a common part, then one part a rank."""

    def __init__(self, comm: MPI.Intracomm, common: int, each: int) -> None:
        """Map memory; bytes. Collective over the ranks of one node. Raises OSError on all of them."""
        self.size, self.rank = comm.size, comm.rank
        self.common = -(-(common + LINE * comm.size) // PAGE) * PAGE
        self.each = -(-each // PAGE) * PAGE
        path = comm.bcast(f"{FOLDER}/hpctrain-{uuid.uuid4().hex}" if comm.rank == 0 else None, root=0)
        failure, handle = "", -1
        try:
            if comm.rank == 0:
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            failure = str(error)
        failure = comm.bcast(failure, root=0)
        try:
            if not failure and handle < 0:
                handle = os.open(path, os.O_RDWR)
        except OSError as error:
            failure = str(error)
        failures = [text for text in comm.allgather(failure) if text]
        if comm.rank == 0 and handle >= 0:
            os.unlink(path)
        try:
            if not failures:
                self._reserve(handle)
        except OSError as error:
            failure = str(error)
        failures = failures or [text for text in comm.allgather(failure) if text]  # all parts, or none
        try:
            if not failures:
                self.map = mmap.mmap(handle, self.common + comm.size * self.each)
        except (OSError, ValueError, OverflowError) as error:
            failure = str(error)
        failures = failures or [text for text in comm.allgather(failure) if text]
        if handle >= 0:
            os.close(handle)
        if failures:
            raise OSError(failures[0])

    def _reserve(self, handle: int) -> None:
        """Reserve this rank's pages: its share of the common part, and its own part. Local."""
        pages = self.common // PAGE
        start, stop = (PAGE * (pages * (self.rank + at) // self.size) for at in (0, 1))
        own = self.common + self.rank * self.each
        for begin, end in ((start, stop), (own, own + self.each)):
            if begin < end:
                os.posix_fallocate(handle, begin, end - begin)

    def tensor(self, rank: int | None, offset: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """See `count` numbers at a byte offset of a rank's part, or of the common part (None)."""
        if rank is None:
            offset += LINE * self.size
        else:
            offset += self.common + rank * self.each
        if not count:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self.map, dtype=dtype, count=count, offset=offset)

    def pin(self) -> None:
        """Let a GPU copy from and to this memory without a detour. Local."""
        base = torch.frombuffer(self.map, dtype=torch.uint8)
        register = torch.cuda.cudart().cudaHostRegister  # type: ignore[no-untyped-call]
        torch.cuda.check_error(register(base.data_ptr(), len(base), 0))

    def counters(self) -> memoryview:
        """See the counters: 8-byte integers, a line apart."""
        return memoryview(self.map)[: LINE * self.size].cast("q")


class Fence:
    """A full memory barrier: to give a lock up and take it again. Each is for one thread at a time.

    POSIX: sem_post and sem_trywait, which Python's locks are made of, "synchronize memory" (IEEE
    1003.1, 4.12); later Pythons use sequentially consistent exchanges. What was stored or loaded
    before is ordered before the release, what follows after the acquire, and the acquire after
    the release of the same lock. MPI_Win_sync would do as well, but every window asks all
    one-sided components of Open MPI, and that of UCX complains aloud where it finds no network.
    """

    def __init__(self) -> None:
        """Make the lock that nobody else has."""
        self._lock = threading.Lock()
        self._lock.acquire()

    def __call__(self) -> None:
        """Order all loads and stores before the call before all after it. Local."""
        self._lock.release()
        self._lock.acquire()


class Rendezvous:
    """Where the ranks of a node wait for one another."""

    def __init__(self, comm: MPI.Intracomm, memory: NodeMemory, crowded: bool) -> None:
        """Take the node's ranks and memory; `crowded`: more ranks than cores. Collective."""
        self.counters = memory.counters()
        self.mine = comm.rank * LINE // 8
        self.others = [rank * LINE // 8 for rank in range(comm.size) if rank != comm.rank]
        self.spins = 0 if crowded else SPINS
        self.fence = Fence()
        self._looking = Fence()  # whoever polls may be another thread than the one that announces
        self.met = 0
        namespace = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
        everyone = comm.allgather((os.getpid(), namespace))
        self.pids = {
            rank * LINE // 8: (rank, pid if namespace and other == namespace else 0)
            for rank, (pid, other) in enumerate(everyone)
        }

    def meet(self) -> None:
        """Wait until all ranks of the node are here. Collective over them.

        Raises RankError where one of them has died: its counter would never move.
        """
        if not self.others:
            return
        self.met += 1
        counters, met = self.counters, self.met
        self.fence()
        counters[self.mine] = met
        for other in self.others:
            if counters[other] < met:
                self._wait(other)
        self.fence()

    def announce(self, count: int) -> None:
        """Say that this rank has got as far as `count`; it never falls. Local."""
        self.fence()
        self.counters[self.mine + 1] = count

    def announced(self, count: int) -> bool:
        """Whether all ranks of the node have got as far as `count`. Local."""
        counters = self.counters
        if counters[self.mine + 1] < count or any(counters[other + 1] < count for other in self.others):
            return False
        self._looking()
        return True

    def look(self) -> None:
        """Raise RankError where a rank of this node has died. Local."""
        for other in self.others:
            self._look(other)

    def _look(self, other: int) -> None:
        rank, pid = self.pids[other]
        if pid and not alive(pid):
            raise RankError(f"rank {rank} of this node's ranks (process {pid}) has died")

    def _wait(self, other: int) -> None:
        counters, met = self.counters, self.met
        for _ in range(self.spins):
            if counters[other] >= met:
                return
        for _ in range(YIELDS):
            os.sched_yield()
            if counters[other] >= met:
                return
        look = time.monotonic() + LOOK_SECONDS
        while counters[other] < met:
            time.sleep(NAP_SECONDS)
            if time.monotonic() > look:
                look = time.monotonic() + LOOK_SECONDS
                if counters[other] < met:
                    self._look(other)


def alive(pid: int) -> bool:
    """Whether a process lives; one that waits to be buried does not. Local.

    >>> alive(os.getpid())
    True
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rsplit(")", 1)[-1].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):  # gone, or going while it is read
        return False
