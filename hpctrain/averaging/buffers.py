"""Buffers that a forward changes and that are no running statistics of a BatchNorm.

A parameter that is not trained and that a forward moves (a teacher that follows, say) counts as one. They are
taken from the replica whose micro-batch wrote them last. One process has the same only where that micro-batch
alone says what they become: where every micro-batch overwrites them before it reads them.
`averaging.invariant` refuses the rest.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from zlib import crc32

import numpy as np
import torch
from mpi4py import MPI
from torch import nn

from hpctrain.averaging.reads import Reads
from hpctrain.batch import broadcast
from hpctrain.errors import ConfigError
from hpctrain.hidden import submodule
from hpctrain.wire import raise_together

STEPS = 3
"""In which forwards are looked at: what fills a buffer first may move it on later."""


class Buffers:
    """The buffers of a module, without those of some BatchNorms."""

    def __init__(self, module: nn.Module, norms: Iterable[nn.Module]) -> None:
        """Keep the module, and the BatchNorms whose buffers are another's business."""
        self.module, self.norms = module, list(norms)
        self.copies: dict[str, torch.Tensor] = {}
        self.seen = -1
        """The latest micro-batch of this step that ran a forward here."""
        self.steps = 0
        self.wrote: dict[str, int] = {}
        """The latest one that changed a buffer in place, or assigned another tensor."""
        self.read = set[str]()
        """What forwards that were looked at read before, or without, overwriting it."""
        self.looked_at = set[tuple[int, int]]()
        """Steps and micro-batches whose forwards were looked at."""
        self.latest: dict[str, set[tuple[int, int]]] = {}
        """Which of them overwrote or replaced a buffer."""
        self.moved, self.trained = set[str](), set[str]()
        """Parameters that a forward that was looked at changed: frozen ones, and trained ones."""

    def now(self) -> dict[str, torch.Tensor]:
        """Give them as they are now, by name: user code may assign new ones. Local."""
        others = {id(b) for norm in self.norms for b in norm.buffers(recurse=False)}
        found: dict[str, torch.Tensor] = {n: b for n, b in self.module.named_buffers() if id(b) not in others}
        if self.moved:
            found |= {name: p for name, p in self.module.named_parameters() if name in self.moved}
        return found

    def marks(self) -> dict[str, tuple[int, int]]:
        """Say which tensors they are, and how often each was changed in place. Local."""
        return {name: (id(buffer), buffer._version) for name, buffer in self.now().items()}

    def contents(self) -> dict[str, torch.Tensor]:
        """Copy them: F.batch_norm changes those of a user's without counting it. Local."""
        return {name: buffer.clone() for name, buffer in self.now().items()}

    def begin(self) -> None:
        """Remember them before a step. Local."""
        self.copies = self.contents()
        self.seen, self.wrote = -1, {}
        self.steps += 1

    def changed(self) -> set[str]:
        """Name those that this rank's step changed, in whatever way. Local."""
        return {
            name
            for name, buffer in self.now().items()
            if name not in self.copies or not torch.equal(self.copies[name], buffer)
        }

    @contextmanager
    def watching(self, micro_batch: int, looks: bool) -> Iterator[None]:
        """Note which of them a forward changes; `looks`: at what it reads, too. Local."""
        self.seen = micro_batch
        before = self.marks()
        if self.steps > STEPS:
            yield
        else:
            with self._looking(micro_batch, looks):
                yield
        self.wrote |= {name: micro_batch for name, mark in self.marks().items() if before.get(name) != mark}

    @contextmanager
    def _looking(self, micro_batch: int, reads: bool) -> Iterator[None]:
        """Note which parameters a forward changes, and what it reads if that is asked for. Local."""
        parameters = dict(self.module.named_parameters())
        before = {name: mark_of(p, reads or not p.requires_grad) for name, p in parameters.items()}
        frozen = {name: p for name, p in parameters.items() if not p.requires_grad}
        looked = Reads(self.now() | frozen) if reads else nullcontext()
        with looked:
            yield
        now = dict(self.module.named_parameters())
        changed = {n for n, p in now.items() if before.get(n) != mark_of(p, reads or n in frozen)}
        self.moved |= changed & frozen.keys()
        self.trained |= changed - frozen.keys()
        if isinstance(looked, Reads):
            self.read |= looked.read
            self.looked_at.add((self.steps, micro_batch))
            for name in looked.latest(self.now()):
                self.latest.setdefault(name, set()).add((self.steps, micro_batch))

    def check(self, comm: MPI.Intracomm, together: MPI.Intracomm) -> None:
        """Refuse what was changed and hangs on several micro-batches. Collective over `together`.

        `comm`: the replicas. Raises ConfigError.
        """
        latest = {name for name, which in self.latest.items() if which == self.looked_at}
        every = comm.allgather((self.changed(), self.read, self.trained, latest, bool(self.looked_at)))
        changed, read, trained = (set[str]().union(*(of[n] for of in every)) for n in range(3))
        exact = [of[3] for of in every if of[4]]
        names = sorted((changed - (set.intersection(*exact) - read if exact else set())) | trained)
        what = "parameter" if names and names[0] in trained | self.moved else "buffer"
        failure = ConfigError(
            f"averaging.invariant: the forward changes the {what} {', '.join(names[:3])}, each of the "
            f"{comm.size} replicas by its own micro-batches, one process by all of them: run one "
            f"replica (as many parallel.stages as ranks), or without averaging.invariant"
        )
        raise_together(together, failure if names else None, name_rank=False)

    def share(self, comm: MPI.Intracomm) -> None:
        """Take each from the replica whose micro-batch wrote it last in this step. Collective over them."""
        now = self.now()
        wrote = dict.fromkeys(self.changed(), self.seen) | self.wrote
        names = crc32(repr(list(now)).encode())
        same = np.array((names, -names), dtype=np.int64)
        comm.Allreduce(MPI.IN_PLACE, same, op=MPI.MAX)
        if same[0] != -same[1]:
            self._share_names(comm, {name: wrote.get(name, -1) for name in now})
            return
        kinds = np.array([crc32(f"{b.dtype} {b.shape}".encode()) for b in now.values()], dtype=np.int64)
        latest = np.array([wrote.get(name, -1) * comm.size + comm.rank for name in now], dtype=np.int64)
        most = np.stack((latest, kinds, -kinds))
        comm.Allreduce(MPI.IN_PLACE, most, op=MPI.MAX)
        for (name, buffer), writer, high, low in zip(now.items(), *most.tolist()):
            root = writer % comm.size
            if writer >= 0 and high == -low:
                broadcast(comm, buffer, root)
            elif writer >= 0:  # replicas assigned tensors of unlike shapes
                self._take(name, comm.bcast(buffer.detach().cpu() if comm.rank == root else None, root))

    def _share_names(self, comm: MPI.Intracomm, wrote: dict[str, int]) -> None:
        """Let all have the buffers that some have, as left by who wrote each last. Collective (replicas)."""
        every = comm.allgather(wrote)
        now = self.now()
        for name in sorted(set[str]().union(*every)):
            root = max(range(comm.size), key=lambda rank: (every[rank].get(name, -2), rank))
            self._take(name, comm.bcast(now[name].detach().cpu() if comm.rank == root else None, root))

    def _take(self, name: str, tensor: torch.Tensor) -> None:
        """Set a buffer, which there may not have been, or a parameter that counts as one. Local."""
        where, _, leaf = name.rpartition(".")
        owner = submodule(self.module, where)
        like = next((t for t in [*self.module.parameters(), *self.module.buffers()]), tensor)
        if (moved := owner._parameters.get(leaf)) is not None:  # which no forward of this replica has moved
            with torch.no_grad():
                moved.copy_(tensor)
        elif leaf in owner._buffers:
            owner._buffers[leaf] = tensor.to(like.device)
        else:
            owner.register_buffer(leaf, tensor.to(like.device))


def mark_of(parameter: torch.Tensor, sums: bool) -> tuple[int, int, int, bytes]:
    """Give what tells that a parameter was changed; with `sums` by `.data` or NumPy, too. Local."""
    numbers = parameter.detach() if sums else torch.zeros(0)
    total = numbers.sum(dtype=torch.complex128 if numbers.is_complex() else torch.float64).cpu()
    return id(parameter), parameter._version, parameter.data_ptr(), total.numpy().tobytes()
