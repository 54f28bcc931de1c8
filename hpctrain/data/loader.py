"""The next steps' samples are read by a thread while this step computes.

thread   read k+1 │ read k+2 │ ...           main   step k │ step k+1 │ ...
                  └── a queue of two steps ──┘
"""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from hpctrain.data import order
from hpctrain.data.order import Ids
from hpctrain.data.splits import Split

AHEAD = 2
"""Steps read ahead; memory for as many."""

B = TypeVar("B")


@dataclass(frozen=True)
class Step(Generic[B]):
    """What this replica computes in one step."""

    position: int
    """Samples consumed before the step."""
    next_position: int
    micro_batches: dict[int, B]
    failure: Exception | None = None
    """Why the samples could not be read; the step must then still be taken, and fails on all."""


class Loader(Generic[B]):
    """Yields the steps of one replica from a position on, for ever; close it when done."""

    def __init__(
        self,
        split: Split,
        micro_batches: range,
        count: int,
        batch: int,
        seed: int,
        make: Callable[[Ids], B],
    ) -> None:
        """Take the split, this replica's micro-batches of `count`, and what makes a batch.

        `make` reads samples (int64, (n,)) and is called in the reading thread alone.
        """
        self.split, self.micro_batches, self.count = split, micro_batches, count
        self.batch, self.seed, self.make = batch, seed, make
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def samples(self, position: int, micro_batch: int) -> Ids:
        """Samples of one micro-batch of the step at a position, whoever computes it. Local."""
        length = len(self.split)
        places = order.micro_batch(position, micro_batch, self.count, self.batch, length, self.seed)
        return self.split.samples(places)

    def read(self, position: int) -> Step[B]:
        """Read this replica's micro-batches of the step at a position, in this thread."""
        _, start, stop = order.batch_at(position, self.batch, len(self.split))
        after = position + stop - start
        try:
            batches = {v: self.make(self.samples(position, v)) for v in self.micro_batches}
        except Exception as error:
            return Step(position, after, {}, error)
        except SystemExit as error:  # would end this thread alone, and the step would wait for ever
            return Step(position, after, {}, RuntimeError(f"sys.exit({error.code}) while reading"))
        return Step(position, after, batches)

    def steps(self, position: int) -> Iterator[Step[B]]:
        """Yield step after step, read ahead."""
        self.close()
        self._stop = stop = threading.Event()
        ready: queue.Queue[Step[B]] = queue.Queue(maxsize=AHEAD)
        thread = threading.Thread(
            target=self._fill, args=(position, ready, stop), name="hpctrain loader", daemon=True
        )
        thread.start()
        self._thread = thread
        while True:
            yield ready.get()

    def _fill(self, position: int, ready: "queue.Queue[Step[B]]", stop: threading.Event) -> None:
        while not stop.is_set():
            step = self.read(position)
            while not stop.is_set():
                try:
                    ready.put(step, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if step.failure is not None:
                return
            position = step.next_position

    def close(self) -> None:
        """Stop the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
