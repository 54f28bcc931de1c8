"""Who moves the buckets between nodes while backward goes on: three ways, one chosen by trying.

      after      nobody: everything is sent when backward is over
      between    the rank's own thread, each time that a layer's gradient is complete
      thread     a thread of its own, napping in between

The messages and the additions are the same in all three, so are the bits. Which is fastest
depends on wire, cores and model: the first steps take turns, and the fastest is kept.
"""

import statistics
import threading
import time
from collections.abc import Callable, Iterable

import numpy as np
from mpi4py import MPI
from torch import nn

from hpctrain.averaging.node import Node
from hpctrain.averaging.places import Places
from hpctrain.log import LOGGER

WAYS = ("after", "between", "thread")
TURNS = 4
"""Steps of each way that are timed, after one that is not."""
NAP_SECONDS = 100e-6


class Mover:
    """A thread that polls while it is told to. At most one thread polls at any time."""

    def __init__(self, poll: Callable[[], bool]) -> None:
        """Take what is to be polled; it returns whether all is done. Starts no thread yet."""
        self._poll, self._lock = poll, threading.Lock()
        self._go, self._ends = threading.Event(), False
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self) -> None:
        """Let the thread poll. Local."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="hpctrain averaging", daemon=True)
            self._thread.start()
        self._go.set()

    def stop(self) -> None:
        """Take over: when this returns the thread doesn't poll. Raises what it met. Local."""
        self._go.clear()
        with self._lock:
            failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """End the thread. Local."""
        self._go.clear()
        with self._lock:  # a poll that has begun may clear the event once more
            self._ends = True
        self._go.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            self._go.wait()
            if self._ends:
                return
            with self._lock:
                if self._go.is_set():
                    try:
                        done = self._poll()
                    except BaseException as error:
                        self._failure, done = error, True
                    if done:
                        self._go.clear()
            time.sleep(NAP_SECONDS)


class Choice:
    """The way of this step; after the trial, the fastest."""

    def __init__(self, comm: MPI.Intracomm, ways: tuple[str, ...]) -> None:
        """Take the replicas' communicator and the ways to try."""
        self.comm, self.ways = comm, ways
        self.way = "after"
        self.seconds: dict[str, list[float]] = {way: [] for way in ways}
        self._step = 0
        self._last = (TURNS + 1) * len(ways)

    @classmethod
    def among(cls, comm: MPI.Intracomm) -> "Choice":
        """Try all ways that this MPI allows."""
        several = MPI.Query_thread() == MPI.THREAD_MULTIPLE
        return cls(comm, WAYS if several else WAYS[:2])

    @property
    def settled(self) -> bool:
        """Whether the trial is over."""
        return self._step > self._last

    def note(self, seconds: float) -> None:
        """Take the time of a step that all ranks have taken; decide when all ways are timed. Collective."""
        if self.settled:
            return
        # step 0 is warm-up and shows the order of the buckets; ways then take turns
        if self._step:
            self.seconds[self.way].append(seconds)
        self._step += 1
        if self._step <= self._last:
            self.way = self.ways[(self._step - 1) % len(self.ways)]
            return
        medians = [statistics.median(self.seconds[way][1:]) for way in self.ways]
        slowest = [self.comm.allreduce(median, op=MPI.MAX) for median in medians]
        self.way = self.ways[slowest.index(min(slowest))]
        found = ", ".join(f"{way} {1e3 * s:.1f} ms" for way, s in zip(self.ways, slowest))
        LOGGER.info("averaging between nodes: %s (a step took: %s)", self.way, found)


class Overlap:
    """Tells the other ranks of full buckets, and moves them in the way that is chosen."""

    def __init__(self, node: Node, places: Places) -> None:
        """Take the node's traffic and the gradients' places."""
        self.node, self.places = node, places
        self.choice = Choice.among(node.comm)
        self.mover = Mover(node.poll)
        self._learnt = False
        self.polled = 0.0
        """Seconds of this step's backward that went into moving buckets."""
        self.ready = np.zeros(len(node.buckets))
        """Seconds from the end of the step before until each bucket was full, summed over steps."""
        self.steps = 0
        """Steps in that sum."""
        self._ended, self._full = 0.0, 0

    def begin(self) -> None:
        """Start a step. Local."""
        self.polled, self._full = 0.0, 0

    def last(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Note that what the backward that follows brings is final, for all parameters or some. Local."""
        early = self.choice.way != "after" and not self.places.repeats
        self.places.last_backward(self._tell if early else None, parameters)
        if early and self.choice.way == "thread" and self.node.place.lane is not None:
            self.mover.start()

    def _tell(self, count: int) -> None:
        self._note_full(count)
        self.node.announce(count)
        if self.choice.way == "between":
            began = time.perf_counter()
            self.node.poll()
            self.polled += time.perf_counter() - began

    def _note_full(self, count: int) -> None:
        """Keep the moment when the first `count` buckets of the order were full here, before any meeting."""
        if self._ended:  # ranks end a step together: from there moments compare without a common clock
            self.ready[self.places.order[self._full : count]] += time.perf_counter() - self._ended
        self._full = count

    def take_over(self) -> None:
        """Let only the caller move buckets from now on: backward is over, all are full. Local."""
        self._note_full(len(self.ready))
        self.mover.stop()

    def note(self, seconds: float) -> None:
        """End a step that took this long; the first one shows the order of the buckets. Collective."""
        self.steps += bool(self._ended)
        if not self._learnt:
            self._learnt = True
            order = self.node.comm.bcast(self.places.filling_order(), root=0)
            self.node.learn(order)
            self.places.learn(order)
        self.choice.note(seconds)
        self._ended = time.perf_counter()

    def close(self) -> None:
        """End the thread. Local."""
        self.mover.close()
