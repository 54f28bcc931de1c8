"""Messages between stages: numbers that say what comes, its layout where that is new, then the tensors.

      numbers  micro-batch, status, draws, offset and flag of the slot where the tensors lie (-1: none)
      layout   as JSON behind the numbers, where it is not that of the message before (`message.py`)
      tensors  on one node in a slot of its memory (`slots.py`), else one message each, in pieces that MPI
               sends at once: larger ones would wait until both ends call MPI, and both compute

Nothing is pickled. Sends are started and not waited for; between two ranks messages keep their
order, and both sides run the micro-batches in the same one. A stage that has failed goes on to send
numbers that say so: whoever waits for it learns of it where it waits, and nobody hangs.
"""

import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray

from hpctrain.errors import HpctrainError
from hpctrain.log import LOGGER
from hpctrain.pipeline import watch
from hpctrain.pipeline.message import Layout, Packed, room_for, same, span
from hpctrain.pipeline.slots import Slots
from hpctrain.pipeline.watch import Watch
from hpctrain.topology import named

FORWARD, BACKWARD, TIED, KINDS = 0, 2, 4, 6
"""Tags of the first messages, and their number; the tensors' is one more. TIED: what several stages use."""
SAME, NEW, FAILED = 0, 1, 2
"""Status: the layout is that of the message before, or follows, or there is nothing."""
NUMBERS = 5
FIRST_STEPS = 4
"""Steps after which there may be more to make room for: shapes show in the first ones."""
MOST = 1 << 30
"""Bytes of one message: counts are 32-bit integers in most MPIs."""
PIECE = 65536 - 512
"""Bytes: with its header below the 64 KiB up to which Open MPI sends over TCP without asking the receiver."""
YIELDS = 300
NAP_SECONDS = 50e-6
STOPPED_SECONDS = 5.0
"""A nap that lasts longer was no nap."""


class PeerFailedError(HpctrainError):
    """Another stage failed; its own error is the one to show."""


class Transport:
    """The stages of one replica, talking to one another."""

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
        self._piece = MOST if plain else PIECE
        self._bytes: dict[int, int] = {}
        """For this node, by micro-batch of the step or evaluation that runs."""
        self._depth, self._most, self._looks, self._ran = 0, 0, FIRST_STEPS, False
        """Micro-batches on their way; the most bytes so far; calls of `grow` that look; if anything ran."""
        self._told: dict[tuple[int, int], Layout] = {}
        self._known: dict[tuple[int, int], Layout] = {}
        """The last layout that left and came, by rank and tag."""
        self._sent = deque[tuple[MPI.Request, Any, int]]()
        """Requests, their memory, to whom."""
        self.watch = Watch(pipe)

    @property
    def ring_bytes(self) -> int:
        """Memory of the node that holds what this rank sends on it."""
        return self._slots.size if self._slots else 0

    def begin(self, depth: int, looks: int = 0) -> None:
        """Start with a step's or an evaluation's micro-batches, `depth` of them on their way at once. Local.

        `looks`: at how many of the coming calls of `grow` there may be more to make room for, on all ranks.
        """
        self._most = max(self._most, self._depth * max(self._bytes.values(), default=0))
        self._bytes.clear()
        self._depth, self._looks, self._ran = depth, max(looks, self._looks), True

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

    def start(self, rank: int, tag: int, packed: Packed) -> None:
        """Start to send. Local."""
        status = SAME if same(self._told.get((rank, tag)), packed.layout) else NEW
        text = packed.layout.encode() if status == NEW else b""
        slot = None
        if rank in self._on_node and packed.flats and tag != TIED:
            v = packed.micro_batch
            self._bytes[v] = self._bytes.get(v, 0) + packed.nbytes
            slot = self._slots.put(packed.flats) if self._slots else None
        self._told[rank, tag] = packed.layout
        numbers = np.array([packed.micro_batch, status, packed.draws, *(slot or (-1, -1))], np.int64)
        self._start(np.frombuffer(numbers.tobytes() + text, np.uint8), rank, tag)
        if slot is None:
            for flat in packed.flats:
                # the model may change it in place while it is on its way; shared weights change later
                own = flat if tag == TIED else flat.clone()
                for piece in self._pieces(own, rank):
                    self._start(piece, rank, tag + 1)

    def send_failure(self, rank: int, tag: int, micro_batch: int) -> None:
        """Tell a rank that what it waits for will not come. Local."""
        numbers = np.array([micro_batch, FAILED, 0, -1, -1], np.int64)
        self._start(numbers.view(np.uint8), rank, tag)

    def receive(self, rank: int, tag: int, micro_batch: int) -> tuple[Any, int]:
        """Take what a rank sends: the tree, and the count of draws. Waits for it.

        Raises PeerFailedError where that rank has failed. Whatever it raises, the message has been taken.
        """
        layout, draws, offset, flag = self._numbers(rank, tag, micro_batch)
        try:
            memories, flats = room_for(layout)
        except BaseException:
            self._take_nothing(layout, rank, tag, offset, flag)
            raise
        if offset >= 0:
            assert self._slots is not None
            self._slots.take(self._on_node[rank], offset, flag, flats)
        else:
            for flat in flats:
                for piece in self._pieces(flat, rank):
                    self._wait(rank, tag + 1)
                    self.comm.Recv(piece, rank, tag + 1)
        return layout.tree_of(memories, self.device), draws

    def drop(self, rank: int, tag: int, micro_batch: int) -> None:
        """Take what a rank sends and keep nothing of it. Waits for it."""
        with suppress(PeerFailedError):
            layout, _, offset, flag = self._numbers(rank, tag, micro_batch)
            self._take_nothing(layout, rank, tag, offset, flag)

    def _numbers(self, rank: int, tag: int, micro_batch: int) -> tuple[Layout, int, int, int]:
        """Take the first message; give layout, draws, offset and flag of the slot."""
        status = self._wait(rank, tag)
        raw = np.empty(status.Get_count(MPI.BYTE), np.uint8)
        self.comm.Recv(raw, rank, tag)
        v, kind, draws, offset, flag = raw[: 8 * NUMBERS].view(np.int64).tolist()
        assert v == micro_batch, f"rank {rank} sent micro-batch {v}, not {micro_batch}"
        if kind == FAILED:
            raise PeerFailedError(f"pipeline rank {rank} failed")
        if kind == NEW:
            self._known[rank, tag] = Layout.decode(raw[8 * NUMBERS :].tobytes())
        return self._known[rank, tag], draws, offset, flag

    def _take_nothing(self, layout: Layout, rank: int, tag: int, offset: int, flag: int) -> None:
        """Take a message's tensors into memory that holds one piece at most."""
        if offset >= 0:
            assert self._slots is not None
            self._slots.free(self._on_node[rank], flag)
            return
        for leaf in layout.leaves:
            left = 0 if leaf[0] == "c" else span(leaf[2], leaf[3]) * getattr(torch, leaf[1]).itemsize
            while left > 0:
                status = self._wait(rank, tag + 1)
                piece = np.empty(status.Get_count(MPI.BYTE), np.uint8)
                self.comm.Recv(piece, rank, tag + 1)
                left -= len(piece)

    def _pieces(self, flat: torch.Tensor, rank: int) -> list[NDArray[np.uint8]]:
        """Cut bytes into messages; on a node MPI has no use for small ones."""
        size = MOST if rank in self._on_node or rank == self.comm.rank else self._piece
        return [flat[at : at + size].numpy() for at in range(0, len(flat), size)]

    def finish(self) -> None:
        """Wait until all that was sent has been taken. Local."""
        if self._sent:
            self.watch.doing("waits until others have taken what it sent")
        while self._sent:
            request, _, rank = self._sent[0]
            self._until(request.Test, rank)
            self._sent.popleft()

    def close(self) -> None:
        """Free the communicators. Collective."""
        self.watch.close()
        self.comm.Free()
        self.node.Free()

    def _start(self, values: NDArray[np.uint8], rank: int, tag: int) -> None:
        while len(self._sent) > 64 and self._sent[0][0].Test():
            self._sent.popleft()
        self._sent.append((self.comm.Isend([values, MPI.BYTE], rank, tag), values, rank))

    def _wait(self, rank: int, tag: int) -> MPI.Status:
        """Wait for a message."""
        status = MPI.Status()
        self._until(lambda: self.comm.Iprobe(rank, tag, status), rank)
        return status

    def _until(self, done: Callable[[], bool], rank: int) -> None:
        """Wait, giving the core away: a rank that waits must not slow those that work."""
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
