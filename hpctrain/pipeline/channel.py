"""One way from a rank to another, of one tag: which layouts it has carried, and buffers that are kept.

      sender      copies into a buffer that left long ago, and starts its persistent requests
      receiver    has started those of the next buffer before the message comes, lends the memory out as
                  tensors, and starts it again once nobody holds them

The sender numbers the layouts. The first `FEW` that come a second time get numbers of their own, and
buffers from the third time on (whole and uneven micro-batches, of steps and of evaluation); what changes all
the time gets none, and its memory is made for each message. Numbers that come before the tensors have
buffers from the first one on.
"""

import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray

from hpctrain.node_memory import LINE
from hpctrain.pipeline.message import Layout, bytes_of
from hpctrain.pipeline.raw import Raw, move

FEW = 4
"""Layouts that get buffers. The next number is that of the last one of all others."""
REMEMBERED = 256
"""Layouts that have come, of which the sender knows it."""
POSTED = 2
"""Buffers of a layout that are posted at once: MPI looks through all that are for each message."""
NUMBERS = 6
AHEAD = 4
"""Messages whose numbers are expected at once."""
STOP_SECONDS = 1.0
"""How long to wait for receives that are called off: one that has begun ends when its sender goes on."""
LEFT: list[Any] = []
"""What MPI may still write to or read from, of jobs that failed."""

Bytes = NDArray[np.uint8]
Cut = Callable[[Bytes], list[Bytes]]
Wait = Callable[[Callable[[], bool]], None]


class Buffer:
    """Memory for the tensors of a layout, each as far behind a line as it was, and requests that use it."""

    def __init__(self, layout: Layout) -> None:
        """Make the memory. Local. Raises MemoryError."""
        self.arrays: list[Bytes] = []
        """The bytes of each tensor."""
        for size, behind in bytes_of(layout):
            raw = np.empty(size + 2 * LINE, np.uint8)
            first = -raw.ctypes.data % LINE + behind
            self.arrays.append(raw[first : first + size])
        self.flats = [torch.from_numpy(array) for array in self.arrays]
        self.raw = [Raw(array.ctypes.data, len(array), array) for array in self.arrays]
        """The same bytes, both."""
        self.requests: list[MPI.Prequest] = []
        self._storages = [flat.untyped_storage()._cdata for flat in self.flats]
        self._alone = [torch._C._storage_Use_Count(storage) for storage in self._storages]
        """How many hold the memory of each tensor while nobody else does."""

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(len(array) for array in self.arrays)

    @property
    def free(self) -> bool:
        """Whether nobody holds a tensor that lies in it."""
        return [torch._C._storage_Use_Count(storage) for storage in self._storages] == self._alone

    def start(self) -> None:
        """Start its requests, in order: alike pieces of one message are told apart by it alone. Local."""
        for request in self.requests:
            request.Start()  # MPI may start those of a Startall in any order

    def close(self) -> None:
        """Free its requests, none of which runs. Local."""
        for request in self.requests:
            request.Free()

    def done(self) -> bool:
        """Whether its requests are through. Local."""
        return MPI.Prequest.Testall(self.requests)


class Way:
    """What both ends know of the layouts."""

    def __init__(self, comm: MPI.Intracomm, rank: int, tag: int, keeps: bool) -> None:
        """Take the other end's rank, the tag of the numbers, whether buffers are kept. Local."""
        self.comm, self.rank, self.tag, self.keeps = comm, rank, tag, keeps
        self.layouts: dict[int, Layout] = {}
        self.count = Counter[int]()
        """Messages of each number so far."""
        self.buffers: dict[int, deque[Buffer]] = {}

    def steady(self, number: int) -> bool:
        """Whether the next message of a layout has buffers. Local."""
        return self.keeps and number < FEW and self.count[number] > 0

    def tag_of(self, number: int) -> int:
        """Tag of the tensors in buffers; one above the numbers' is for those without. Local."""
        return self.tag + 2 + number

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in chain.from_iterable(self.buffers.values()))


class Outgoing(Way):
    """The sender's end."""

    def __init__(self, comm: MPI.Intracomm, rank: int, tag: int, keeps: bool) -> None:
        """Take where it goes. Local."""
        super().__init__(comm, rank, tag, keeps)
        self._number: dict[str, int] = {}
        self._seen: dict[str, None] = {}
        """Layouts, the last one at the end."""
        self._last: Layout | None = None
        """The last one, if it has a number of its own."""
        self._heads: deque[tuple[NDArray[np.int64], MPI.Prequest]] = deque()

    def number(self, layout: Layout) -> tuple[int, bool]:
        """Give a layout's number, and whether the other end has to be told what it is. Local."""
        if layout is self._last:
            return self._number[layout.key], False
        number = self._number.get(layout.key)
        again = layout.key in self._seen and len(self.layouts.keys() - {FEW}) < FEW
        if number is None or (number == FEW and again):
            return (len(self.layouts.keys() - {FEW}) if again else FEW), True
        return number, False

    def note(self, number: int, layout: Layout) -> None:
        """Note that a message of a layout leaves. Local."""
        self.count[number] += 1
        if layout is self._last:
            return
        self._last = layout if number < FEW else None
        if self._number.get(layout.key) != number:
            self._number = {known: at for known, at in self._number.items() if at != number}
            self._number[layout.key], self.layouts[number] = number, layout
        self._seen.pop(layout.key, None)
        self._seen[layout.key] = None
        if len(self._seen) > REMEMBERED:
            del self._seen[next(iter(self._seen))]

    def say(self, numbers: list[int]) -> tuple[Callable[[], bool], Any]:
        """Start to send numbers; gives what tells if they are through. Local."""
        if not self._heads or not self._heads[0][1].Test():
            array = np.empty(NUMBERS, np.int64)
            self._heads.appendleft((array, self.comm.Send_init([array, MPI.INT64_T], self.rank, self.tag)))
        self._heads.rotate(-1)
        array, request = self._heads[-1]
        array[:] = numbers
        request.Start()
        return request.Test, request

    def fill(self, number: int, parts: list[Raw], cut: Cut) -> Buffer:
        """Copy a layout's tensors into a buffer that is through, `cut` into messages. Local.

        Raises MemoryError.
        """
        buffers = self.buffers.setdefault(number, deque())
        if not buffers or not buffers[0].done():
            buffer = Buffer(self.layouts[number])
            for piece in chain.from_iterable(map(cut, buffer.arrays)):
                buffer.requests.append(self.comm.Send_init([piece, MPI.BYTE], self.rank, self.tag_of(number)))
            buffers.appendleft(buffer)
        buffers.rotate(-1)
        buffer = buffers[-1]
        for room, part in zip(buffer.raw, parts, strict=True):
            move(room.at, part.at, part.size)
        return buffer

    def close(self) -> None:
        """Free the requests. Local."""
        for _, request in self._heads:
            request.Free()
        for buffer in chain.from_iterable(self.buffers.values()):
            buffer.close()


class Incoming(Way):
    """The receiver's end."""

    def __init__(self, comm: MPI.Intracomm, rank: int, tag: int, keeps: bool, cut: Cut | None) -> None:
        """Take where it comes from and how it is `cut` into messages; expect the first numbers. Local.

        `cut` is None on one node, where no messages are expected: what slots hold is copied into buffers.
        """
        super().__init__(comm, rank, tag, keeps)
        self._cut = cut
        self._started: dict[int, deque[Buffer]] = {}
        """Buffers whose messages are expected, in the order in which they will come."""
        self._heads: deque[tuple[NDArray[np.int64], MPI.Prequest]] = deque()
        for _ in range(AHEAD):
            array = np.empty(NUMBERS, np.int64)
            self._heads.append((array, comm.Recv_init([array, MPI.INT64_T], rank, tag)))
            self._heads[-1][1].Start()

    def numbers(self, wait: Wait) -> list[int]:
        """Take the numbers that come next. Local."""
        array, request = self._heads[0]
        wait(request.Test)
        found: list[int] = array.tolist()
        request.Start()
        self._heads.rotate(-1)
        return found

    def spare(self, number: int) -> Buffer:
        """Give a buffer for a message that none expects. Local. Raises MemoryError."""
        if self._cut or not self.steady(number):
            return Buffer(self.layouts[number])
        buffers = self.buffers.setdefault(number, deque())
        for _ in range(len(buffers)):
            buffers.rotate(-1)
            if buffers[-1].free:  # the one that was lent first is asked first
                return buffers[-1]
        buffers.append(Buffer(self.layouts[number]))
        return buffers[-1]

    def posted(self, number: int) -> bool:
        """Whether a buffer is there for the next message of a layout. Local."""
        return bool(self._started.get(number))

    def post(self, number: int) -> None:
        """Have a buffer for the next message of a layout. Local. Raises MemoryError."""
        if not self.posted(number):
            self._start(number)

    def taken(self, number: int, wait: Wait) -> Buffer:
        """Take the posted buffer into which the next message of a layout comes. Local."""
        started = self._started[number]
        wait(started[0].done)
        return started.popleft()

    def expect(self, number: int, most: int) -> None:
        """Post buffers of a steady layout that nobody holds, one at least if there is memory. Local.

        More than `most`, of something that was held for long, are not kept.
        """
        if not self.steady(number):
            return
        buffers, started = self.buffers.get(number, deque()), self._started.setdefault(number, deque())
        for buffer in [buffer for buffer in buffers if buffer.free and buffer not in started]:
            if self._cut and len(started) < POSTED:
                buffer.start()
                started.append(buffer)
            elif len(buffers) > most:
                buffers.remove(buffer)
                buffer.close()
        if self._cut:
            with suppress(MemoryError):
                self.post(number)

    def _start(self, number: int) -> None:
        assert self._cut is not None
        buffer = Buffer(self.layouts[number])
        for piece in chain.from_iterable(map(self._cut, buffer.arrays)):
            buffer.requests.append(self.comm.Recv_init([piece, MPI.BYTE], self.rank, self.tag_of(number)))
        self.buffers.setdefault(number, deque()).append(buffer)
        buffer.start()
        self._started.setdefault(number, deque()).append(buffer)

    def close(self) -> None:
        """Expect nothing any more; free the requests, or leave them to MPI for ever. Local."""
        waiting = [request for _, request in self._heads]
        for buffer in chain.from_iterable(self._started.values()):
            waiting += buffer.requests
        for request in waiting:
            request.Cancel()
        until = time.monotonic() + STOP_SECONDS
        while not MPI.Prequest.Testall(waiting):
            if time.monotonic() > until:
                LEFT.append(self)
                return
            time.sleep(STOP_SECONDS / 100)
        for _, request in self._heads:
            request.Free()
        for buffer in chain.from_iterable(self.buffers.values()):
            buffer.close()
