"""Messages between stages: a header that says what follows, then each tensor's bytes.

      header   {"v": 3, "leaves": [["t", "float32", [8, 16], [16, 1], true, 0], …], "tree": …, "draws": 2}
      then     one message a tensor, straight from and into its memory

A tensor keeps its strides on the way, gaps and repetitions included, and how far behind a 64-byte line
it begins: kernels add in the order in which memory lies, so another layout would give other bits.

Nothing is pickled. Sends are started and not waited for; between two ranks messages keep their
order, and both sides run the micro-batches in the same one. A stage that has failed goes on to send
headers that say so: whoever waits for it learns of it where it waits, and nobody hangs.
"""

import json
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from torch.utils import _pytree

from hpctrain.errors import HpctrainError
from hpctrain.topology import named

FORWARD, BACKWARD, TIED, KINDS = 0, 2, 4, 6
"""Tags of headers, and their number; the tensors' is one more. TIED: what several stages use."""
LINE = 64
"""Bytes: where torch's own memory begins, and what kernels choose their path by."""
MOST = 1 << 30
"""Bytes of one message: counts are 32-bit integers in most MPIs."""
YIELDS = 300
NAP_SECONDS = 50e-6


class PeerFailedError(HpctrainError):
    """Another stage failed; its own error is the one to show."""


def span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Count the elements of memory from a tensor's first to its last. Pure.

    >>> span((2, 3), (3, 1)), span((2, 3), (0, 1)), span((2, 0), (1, 1)), span((), ())
    (6, 3, 0, 1)
    """
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))


def memory_of(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the tensor and all memory between its first and last element, flat; without large gaps. Local."""
    tensor = tensor.resolve_conj().resolve_neg()
    if span(tensor.shape, tensor.stride()) > 2 * tensor.numel():
        tensor = tensor.contiguous()
    return tensor, tensor.as_strided((span(tensor.shape, tensor.stride()),), (1,))


class Transport:
    """The stages of one replica, talking to one another."""

    def __init__(self, pipe: MPI.Intracomm, device: str) -> None:
        """Take the ranks of the stages. Collective."""
        self.comm, self.device = named(pipe.Dup(), "pipeline"), device
        self._sent: list[tuple[MPI.Request, Any]] = []

    def pack(self, stage: int, micro_batch: int, value: Any, draws: int) -> list[NDArray[np.uint8]]:
        """Make the messages of a tree of tensors and plain values: header, tensors. Local.

        Raises HpctrainError for what can't travel.
        """
        leaves, tree = _pytree.tree_flatten(value)
        listed: list[Any] = []
        flats: list[torch.Tensor] = []
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                laid, flat = memory_of(leaf.detach().to("cpu"))
                kind = str(leaf.dtype).removeprefix("torch.")
                behind = laid.data_ptr() % LINE
                listed.append(["t", kind, list(leaf.shape), list(laid.stride()), leaf.requires_grad, behind])
                flats.append(flat.view(torch.uint8))
            elif leaf is None or isinstance(leaf, (bool, int, float, str)):
                listed.append(["c", leaf])
            else:
                raise HpctrainError(
                    f"a {type(leaf).__name__} would cross to stage {stage}: "
                    f"tensors, numbers, strings and None can, in lists, tuples and dictionaries; cut "
                    f"elsewhere (parallel.cuts) or give out its tensors"
                )
        header = {"v": micro_batch, "leaves": listed, "tree": _pytree.treespec_dumps(tree), "draws": draws}
        messages = [np.frombuffer(json.dumps(header).encode(), np.uint8)]
        for flat in flats:
            messages += [flat[at : at + MOST].numpy() for at in range(0, len(flat), MOST)]
        return messages

    def start(self, rank: int, tag: int, messages: list[NDArray[np.uint8]]) -> None:
        """Start to send messages. Local."""
        for number, message in enumerate(messages):
            self._start(message, rank, tag + (number > 0))

    def send_failure(self, rank: int, tag: int, micro_batch: int) -> None:
        """Tell a rank that what it waits for will not come. Local."""
        self._start(np.frombuffer(json.dumps({"v": micro_batch}).encode(), np.uint8), rank, tag)

    def receive(self, rank: int, tag: int, micro_batch: int) -> tuple[Any, int]:
        """Take what a rank sends: the tree, and the count of draws. Waits for it.

        Raises PeerFailedError where that rank has failed.
        """
        status = self._wait(rank, tag)
        raw = np.empty(status.Get_count(MPI.BYTE), np.uint8)
        self.comm.Recv(raw, rank, tag)
        header = json.loads(raw.tobytes())
        assert header["v"] == micro_batch, f"rank {rank} sent micro-batch {header['v']}, not {micro_batch}"
        if "leaves" not in header:
            raise PeerFailedError(f"pipeline rank {rank} failed")
        leaves = []
        for leaf in header["leaves"]:
            if leaf[0] == "c":
                leaves.append(leaf[1])
                continue
            _, kind, shape, strides, grad, behind = leaf
            dtype = getattr(torch, kind)
            first = behind // dtype.itemsize
            memory = torch.empty(first + span(shape, strides), dtype=dtype)[first:]
            flat = memory.view(torch.uint8).numpy()
            for at in range(0, len(flat), MOST):
                self._wait(rank, tag + 1)
                self.comm.Recv(flat[at : at + MOST], rank, tag + 1)
            tensor = memory.as_strided(shape, strides).to(self.device)
            leaves.append(tensor.requires_grad_(grad))
        return _pytree.tree_unflatten(leaves, _pytree.treespec_loads(header["tree"])), header["draws"]

    def finish(self) -> None:
        """Wait until all that was sent has been taken."""
        MPI.Request.Waitall([request for request, _ in self._sent])
        self._sent.clear()

    def close(self) -> None:
        """Free the communicator. Collective."""
        self.comm.Free()

    def _start(self, values: NDArray[np.uint8], rank: int, tag: int) -> None:
        if len(self._sent) > 64:
            self._sent = [entry for entry in self._sent if not entry[0].Test()]
        self._sent.append((self.comm.Isend([values, MPI.BYTE], rank, tag), values))

    def _wait(self, rank: int, tag: int) -> MPI.Status:
        """Wait for a message, giving the core away: a rank that waits must not slow those that work."""
        status, looks = MPI.Status(), 0
        while not self.comm.Iprobe(rank, tag, status):
            looks += 1
            if looks < YIELDS:
                os.sched_yield()
            else:
                time.sleep(NAP_SECONDS)
        return status
