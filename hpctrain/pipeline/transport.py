"""Messages between stages: numbers that say what comes, its layout where that is new, then the tensors.

      numbers  micro-batch, number of the layout, draws, how the tensors come, flag of their slot, length of
               the layout as JSON that follows where it is new (`message.py`)
      tensors  on one node in a slot of its memory (`slots.py`), else by messages in pieces that MPI sends at
               once: larger ones would wait until both ends call MPI, and both compute

Receives are posted before their messages come, by persistent requests into buffers that are kept
(`channel.py`). No message is pickled. Sends are started and not waited for; between two ranks messages keep
their order, and both sides run the micro-batches in the same one. A stage that has failed goes on to send
numbers that say so: whoever waits for it learns of it where it waits, and nobody hangs.
"""

import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from mpi4py import MPI

from hpctrain.errors import HpctrainError
from hpctrain.log import LOGGER
from hpctrain.pipeline import watch
from hpctrain.pipeline.channel import FEW, LEFT, POSTED, Buffer, Bytes, Incoming, Outgoing
from hpctrain.pipeline.message import Layout, Packed, bytes_of
from hpctrain.pipeline.raw import shown
from hpctrain.pipeline.slots import Slots
from hpctrain.pipeline.watch import Watch
from hpctrain.topology import named

EACH = 2 + FEW
"""Tags of a channel: numbers, tensors without buffers, tensors in buffers by layout."""
FORWARD, BACKWARD, TIED, RELAYED, KINDS = 0, EACH, 2 * EACH, 3 * EACH, 4 * EACH
"""First tags of channels, and how many there are. TIED: what several stages use; RELAYED: its gradients of
one micro-batch."""
WEIGHTS = (TIED, RELAYED)
"""Large and rare: they go by MPI alone, and no memory is kept for them."""
FAILED, MESSAGES, BUFFERS = -3, -2, -1
"""How the tensors come, where not in a slot at an offset: the stage has failed; by messages, into buffers."""
FIRST_STEPS = 4
"""Steps after which there may be more to make room for: shapes show in the first ones."""
MOST = 1 << 30
"""Bytes of one message: counts are 32-bit integers in most MPIs."""
PIECE = 65536 - 512
"""Bytes: with its header below the 64 KiB up to which Open MPI sends over TCP without asking the receiver."""
YIELDS = 300
NAP_SECONDS = 50e-6
COMING_SECONDS = 0.1
"""How long bytes that have begun to come are waited for without naps."""
STOPPED_SECONDS = 5.0
"""A nap that lasts longer was no nap."""


class PeerFailedError(HpctrainError):
    """Another stage failed; its own error is the one to show."""


@dataclass
class Ready:
    """A message that needs nothing any more to leave."""

    way: Outgoing
    packed: Packed
    number: int
    """Of its layout."""
    text: bytes
    """The layout, where it is new."""
    how: int = MESSAGES
    flag: int = -1
    buffer: Buffer | None = None
    pieces: list[Bytes] = field(default_factory=list)
    """Of tensors without a buffer."""


class Transport:
    """The stages of one replica, talking to one another. Local where not said to be collective; may wait."""

    def __init__(self, pipe: MPI.Intracomm, device: str, plain: bool = False) -> None:
        """Take the ranks of the stages. Collective.

        `plain`: each tensor is one message, as MPI carries it by itself; to measure what the ways here gain.
        """
        self.comm, self.device = named(pipe.Dup(), "pipeline"), device
        self.node = named(pipe.Split_type(MPI.COMM_TYPE_SHARED), "pipeline of a node")
        at = self.node.allgather(self.comm.rank)
        self._on_node = {rank: number for number, rank in enumerate(at) if rank != self.comm.rank}
        self._slots: Slots | None = None
        self._refused = 0 if plain else MOST << 10
        """Bytes of a ring that are not asked for: so many could not be had."""
        self._keeps, self._piece = not plain, MOST if plain else PIECE
        self._bytes: dict[int, int] = {}
        """For this node, by micro-batch of the step or evaluation that runs."""
        self._depth, self._most, self._looks, self._ran = 0, 0, FIRST_STEPS, False
        """Micro-batches on their way; the most bytes so far; calls of `grow` that look; if anything ran."""
        self._deepest = 0
        """The most micro-batches on their way so far."""
        self._outgoing: dict[tuple[int, int], Outgoing] = {}
        self._incoming: dict[tuple[int, int], Incoming] = {}
        """By rank and tag."""
        self._sent = deque[tuple[Callable[[], bool], Any, int]]()
        """What tells if they are through, their memory, to whom."""
        self.watch = Watch(pipe)
        self.waited = 0.0
        """Seconds, since the start."""

    @property
    def nbytes(self) -> int:
        """Memory that holds what this rank sends and receives."""
        channels = [*self._outgoing.values(), *self._incoming.values()]
        return (self._slots.size if self._slots else 0) + sum(channel.nbytes for channel in channels)

    def begin(self, depth: int, looks: int = 0) -> None:
        """Start with a step's or an evaluation's micro-batches, `depth` of them on their way at once. Local.

        `looks`: at how many of the coming calls of `grow` there may be more to make room for, on all ranks.
        """
        self._most = max(self._most, self._depth * max(self._bytes.values(), default=0))
        self._bytes.clear()
        self._depth, self._looks, self._ran = depth, max(looks, self._looks), True
        self._deepest = max(depth, self._deepest)

    def grow(self) -> None:
        """Have room on the node for what was sent so far, if there are looks left. Collective (the node).

        Call it where no message is on its way.
        """
        if self.node.size == 1 or not self._looks or not self._ran:
            return
        self.begin(0)
        self._looks, self._ran = self._looks - 1, False
        most = self.node.allreduce(self._most, op=MPI.MAX)
        old = self._slots.size if self._slots else 0
        if most <= old or most >= self._refused:
            return
        self._slots = None  # the old memory goes first
        try:
            self._slots = Slots(self.node, most)
        except OSError as error:
            self._refused = most
            LOGGER.warning(
                "no shared memory for what stages on this node send one another (%s): MPI carries what does "
                "not fit, which is slower in containers; %d MiB for each rank were asked for",
                *(error, most >> 20),
            )
            with suppress(OSError):
                self._slots = Slots(self.node, old) if old else None

    def start(self, *messages: tuple[int, int, Packed]) -> None:
        """Start to send, to a rank with a tag each. Local.

        Whatever it raises (MemoryError, for one), nothing has left.
        """
        for ready in [self._ready(*message) for message in messages]:
            self._leave(ready)

    def _ready(self, rank: int, tag: int, packed: Packed) -> "Ready":
        way = self._way_to(rank, tag)
        number, new = way.number(packed.layout)
        ready = Ready(way, packed, number, packed.layout.encode() if new else b"")
        if packed.parts and tag not in WEIGHTS:
            if rank in self._on_node:
                v = packed.micro_batch
                self._bytes[v] = self._bytes.get(v, 0) + packed.nbytes
                slot = self._slots.put(packed.parts) if self._slots else None
                ready.how, ready.flag = slot or (MESSAGES, -1)
            elif way.steady(number):
                ready.how, ready.buffer = BUFFERS, way.fill(number, packed.parts, partial(self._pieces, rank))
        if ready.how == MESSAGES:
            # the model may change it in place while it is on its way; shared weights change later
            flats = [shown(part.at, part.size) for part in packed.parts]
            own = flats if tag == TIED else [flat.clone() for flat in flats]
            ready.pieces = [piece for flat in own for piece in self._pieces(rank, flat.numpy())]
        return ready

    def _leave(self, ready: "Ready") -> None:
        way, packed = ready.way, ready.packed
        way.note(ready.number, packed.layout)
        numbers = [packed.micro_batch, ready.number, packed.draws, ready.how, ready.flag, len(ready.text)]
        self._note(*way.say(numbers), way.rank)
        if ready.text:
            self._start(np.frombuffer(ready.text, np.uint8), way.rank, way.tag + 1, ready.text)
        if ready.buffer is not None:
            ready.buffer.start()
            self._note(ready.buffer.done, ready.buffer, way.rank)
        for piece in ready.pieces:
            self._start(piece, way.rank, way.tag + 1, packed)  # a piece is an address in what that holds

    def send_failure(self, rank: int, tag: int, micro_batch: int) -> None:
        """Tell a rank that what it waits for will not come. Local."""
        self._note(*self._way_to(rank, tag).say([micro_batch, 0, 0, FAILED, -1, 0]), rank)

    def receive(self, rank: int, tag: int, micro_batch: int) -> tuple[Any, int]:
        """Take what a rank sends: the tree, and the count of draws. Waits for it.

        Raises PeerFailedError where that rank has failed. Whatever it raises, the message has been taken.
        """
        way, number, draws, how, flag = self._numbers(rank, tag, micro_batch)
        wait, layout = partial(self._until, rank), way.layouts[number]
        try:
            if how == BUFFERS:
                way.post(number)
            else:
                buffer = way.spare(number)
        except BaseException:
            self._take_nothing(way, number, how, flag)
            raise
        if how == BUFFERS:
            buffer = way.taken(number, wait)
        flats = buffer.flats
        if how == MESSAGES:
            for array in buffer.arrays:
                for piece in self._pieces(rank, array):
                    self._take(piece, rank, tag + 1)
        elif how >= 0:
            assert self._slots is not None
            self._slots.take(self._on_node[rank], how, flag, buffer.raw)
        found = layout.tree_of(flats, self.device)
        if flats:  # the buffer is held now
            way.expect(number, self._deepest + POSTED)
        return found, draws

    def drop(self, rank: int, tag: int, micro_batch: int) -> None:
        """Take what a rank sends and keep nothing of it. Waits for it."""
        with suppress(PeerFailedError):
            way, number, _, how, flag = self._numbers(rank, tag, micro_batch)
            if how == BUFFERS and way.posted(number):
                way.taken(number, partial(self._until, rank))
            else:
                self._take_nothing(way, number, how, flag)

    def _numbers(self, rank: int, tag: int, micro_batch: int) -> tuple[Incoming, int, int, int, int]:
        """Take the first message; give channel, layout's number, draws, how the tensors come, flag."""
        if (rank, tag) not in self._incoming:
            cut = None if rank in self._on_node else partial(self._pieces, rank)
            self._incoming[rank, tag] = Incoming(
                self.comm, rank, tag, self._keeps and tag not in WEIGHTS, cut
            )
        way = self._incoming[rank, tag]
        v, number, draws, how, flag, length = way.numbers(partial(self._until, rank))
        assert v == micro_batch, f"rank {rank} sent micro-batch {v}, not {micro_batch}"
        if how == FAILED:
            raise PeerFailedError(f"pipeline rank {rank} failed")
        if length:
            text = np.empty(length, np.uint8)
            self._take(text, rank, tag + 1)
            way.layouts[number] = Layout.decode(text.tobytes())
        way.count[number] += 1
        return way, number, draws, how, flag

    def _take_nothing(self, way: Incoming, number: int, how: int, flag: int) -> None:
        """Take a message's tensors into memory that holds one piece at most."""
        if how >= 0:
            assert self._slots is not None
            self._slots.free(self._on_node[way.rank], flag)
            return
        tag = way.tag_of(number) if how == BUFFERS else way.tag + 1
        for left, _ in bytes_of(way.layouts[number]):
            while left > 0:
                status = self._wait(way.rank, tag)
                piece = np.empty(status.Get_count(MPI.BYTE), np.uint8)
                self._take(piece, way.rank, tag)
                left -= len(piece)

    def _way_to(self, rank: int, tag: int) -> Outgoing:
        if (rank, tag) not in self._outgoing:
            self._outgoing[rank, tag] = Outgoing(self.comm, rank, tag, self._keeps and tag not in WEIGHTS)
        return self._outgoing[rank, tag]

    def _pieces(self, rank: int, array: Bytes) -> list[Bytes]:
        """Cut bytes into messages; on a node MPI has no use for small ones."""
        size = MOST if rank in self._on_node or rank == self.comm.rank else self._piece
        return [array[at : at + size] for at in range(0, len(array), size)]

    def finish(self) -> None:
        """Wait until all that was sent has been taken. Local."""
        if self._sent:
            self.watch.doing("waits until others have taken what it sent")
        while self._sent:
            done, _, rank = self._sent[0]
            self._until(rank, done)
            self._sent.popleft()

    def stop(self) -> None:
        """Expect no message any more, answer no question; what is on its way stays so. Local."""
        self.watch.stop()
        LEFT.extend([*self._sent, *self._outgoing.values()])
        self._sent.clear()
        self._outgoing.clear()
        self._call_off()

    def _call_off(self) -> None:
        for way in self._incoming.values():
            way.close()
        self._incoming.clear()

    def close(self) -> None:
        """Free the communicators, where all that was sent has been taken. Collective."""
        self._call_off()
        for way in self._outgoing.values():
            way.close()
        self._outgoing.clear()
        self.watch.close()
        self.comm.Free()
        self.node.Free()

    def _start(self, values: Bytes, rank: int, tag: int, holder: Any) -> None:
        self._note(self.comm.Isend([values, MPI.BYTE], rank, tag).Test, (values, holder), rank)

    def _note(self, done: Callable[[], bool], memory: Any, rank: int) -> None:
        while len(self._sent) > 64 and self._sent[0][0]():
            self._sent.popleft()
        self._sent.append((done, memory, rank))

    def _take(self, piece: Bytes, rank: int, tag: int) -> None:
        """Receive bytes; a long message needs its sender within MPI, so that is waited for, too."""
        self._wait(rank, tag)
        request = self.comm.Irecv([piece, MPI.BYTE], rank, tag)
        try:
            soon = time.monotonic() + COMING_SECONDS
            while not request.Test() and time.monotonic() < soon:
                os.sched_yield()  # a nap would hold up its pieces
            self._until(rank, request.Test)
        except BaseException:
            LEFT.append((piece, request))  # MPI may write there yet
            raise

    def _wait(self, rank: int, tag: int) -> MPI.Status:
        """Wait for a message."""
        status = MPI.Status()
        self._until(rank, lambda: self.comm.Iprobe(rank, tag, status))
        return status

    def anywhere(self, *said: bool) -> list[bool]:
        """Tell of each of some things whether any stage says so. Collective (stages)."""
        mine = np.array(said, np.uint8)
        found = np.empty_like(mine)
        request = self.comm.Iallreduce(mine, found, MPI.MAX)
        self.watch.doing("waits until all stages have read their micro-batches")
        try:
            self._until(None, request.Test)
        except BaseException:
            LEFT.append((mine, found, request))  # MPI may write there yet
            raise
        return [bool(one) for one in found]

    def _until(self, rank: int | None, done: Callable[[], bool]) -> None:
        """Wait, giving the core away: a rank that waits must not slow those that work."""
        if done():
            return
        asked = time.monotonic()
        try:
            self._wait_long(rank, done)
        finally:
            self.waited += time.monotonic() - asked

    def _wait_long(self, rank: int | None, done: Callable[[], bool]) -> None:
        for _ in range(YIELDS):
            if done():
                return
            os.sched_yield()
        began = last = time.monotonic()
        patience = watch.PATIENCE_SECONDS
        while not done():
            time.sleep(NAP_SECONDS)
            now = time.monotonic()
            if now - last > STOPPED_SECONDS:
                began += now - last  # this rank was stopped itself
            last, waited = now, now - began
            if waited > patience:
                self.watch.missing(rank, waited)
                patience, last = 2 * patience, time.monotonic()
