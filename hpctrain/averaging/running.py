"""BatchNorm's running statistics at any number of replicas, as one process would have them.

One process runs the micro-batches 0 … V-1 in turn; each call of a BatchNorm makes

      running ← (1 - momentum) · running + momentum · batch        (momentum None: a plain mean)

A replica runs only its own micro-batches, so every call is watched: for its duration the
momentum is 1, which leaves the batch's own statistics in the buffers. They are gathered and
applied on every rank in the order of the micro-batches, by the line above: the same bits on any
layout, one process included. No forward is run twice.

Any other buffer is left to `buffers.py`, those of a BatchNorm subclass with a way of its own, too.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

Record = tuple[int, int, torch.Tensor, torch.Tensor, float]
"""Micro-batch, number of the BatchNorm, mean and variance of its batch, momentum; not a number for None."""


def follows_torch(norm: _BatchNorm) -> bool:
    """Whether a BatchNorm has running statistics and moves them on as torch's own does. Local.

    A subclass is asked: made-up numbers go through copies of it in training. It must not compute by what the
    statistics were, either: while it is watched they are the batch's own.
    """
    if norm.running_mean is None or norm.running_var is None:
        return False
    if type(norm).forward is _BatchNorm.forward or hasattr(norm, "meeting") or hasattr(norm, "process_group"):
        return True
    sides = {"BatchNorm2d": [2], "BatchNorm3d": [3]}.get(kind_of(norm), [1, 0])
    for more in sides:
        shape = 4, norm.num_features, *[3] * more
        x = torch.linspace(-1.0, 2.0, math.prod(shape), device=norm.running_mean.device).view(shape)
        twin, plain, moved = (copy.deepcopy(norm).train() for _ in range(3))
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                found = twin.forward(x.to(norm.running_mean.dtype))  # no hook of the user's
                _BatchNorm.forward(plain, x.to(norm.running_mean.dtype))
                if moved.running_mean is not None and moved.running_var is not None:
                    moved.running_mean += 0.5
                    moved.running_var *= 2.0
                alike = torch.equal(found, moved.forward(x.to(norm.running_mean.dtype)))
        except Exception:  # it wants other numbers
            continue
        return alike and all(torch.equal(a, b) for a, b in zip(twin.buffers(), plain.buffers()))
    return type(norm).__module__.split(".")[0] == "torch"  # those have their own way


def kind_of(norm: _BatchNorm) -> str:
    """Give the name of torch's class that a BatchNorm is of. Pure."""
    own = (kind.__name__ for kind in type(norm).__mro__ if kind.__module__ == _BatchNorm.__module__)
    return next(own, "")


class RunningStatistics:
    """The running statistics of a module that a training step changes."""

    def __init__(self, module: nn.Module) -> None:
        """Find BatchNorm modules with running statistics and watch their calls."""
        self.norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and follows_torch(m)]
        self.micro_batch = 0
        self.records: list[Record] = []
        self._saved: dict[int, Any] = {}
        self._hooks = [
            hook
            for number, norm in enumerate(self.norms)
            for hook in (
                norm.register_forward_pre_hook(self._before(number)),
                norm.register_forward_hook(self._after(number)),
            )
        ]

    def close(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, number: int) -> Callable[..., None]:
        def before(norm: _BatchNorm, _inputs: Any) -> None:
            if not norm.training or norm is not self.norms[number]:  # a copy has this hook too
                return
            if not norm.track_running_stats:  # switched off for a call
                return
            if number in self._saved:  # recomputed activations may stop a forward half way
                self._put_back(number)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            self._saved[number] = norm.momentum, norm.running_mean, norm.running_var, tracked(norm)
            # other tensors, not other values: autograd has saved the ones of an earlier call
            norm.running_mean = torch.zeros_like(norm.running_mean)
            norm.running_var = torch.zeros_like(norm.running_var)
            norm.momentum = 1.0

        return before

    def _after(self, number: int) -> Callable[..., None]:
        def after(norm: _BatchNorm, _inputs: Any, _outputs: Any) -> None:
            if number in self._saved and norm is self.norms[number]:
                assert norm.running_mean is not None
                assert norm.running_var is not None
                batch = norm.running_mean.cpu(), norm.running_var.cpu()
                self._put_back(number)
                if getattr(norm, "speaks", True):  # synchronised statistics are recorded once
                    momentum = math.nan if norm.momentum is None else norm.momentum
                    self.records.append((self.micro_batch, number, *batch, momentum))

        return after

    def _put_back(self, number: int) -> None:
        norm = self.norms[number]
        norm.momentum, norm.running_mean, norm.running_var, count = self._saved.pop(number)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.fill_(count)

    def restore(self) -> None:
        """Undo a call that failed half way."""
        for number in list(self._saved):
            self._put_back(number)

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Let a forward that is run again leave no record: its BatchNorms have been seen."""
        count = len(self.records)
        try:
            yield
        finally:
            del self.records[count:]

    def begin(self) -> None:
        """Forget what the step before saw."""
        self.restore()
        self.records = []

    @torch.no_grad()
    def apply(self, comm: MPI.Intracomm) -> None:
        """Gather what all replicas saw and apply it in the order of the micro-batches. Collective."""
        if not self.norms:
            return
        every = sorted(self._gathered(comm), key=lambda record: record[0])  # stable: calls in order
        for _, number, mean, variance, momentum in every:
            norm = self.norms[number]
            assert norm.running_mean is not None
            assert norm.running_var is not None
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
            factor = 1.0 / max(1, tracked(norm)) if math.isnan(momentum) else momentum
            for running, batch in ((norm.running_mean, mean), (norm.running_var, variance)):
                running.mul_(1.0 - factor).add_(batch.to(running.device) * factor)

    def _gathered(self, comm: MPI.Intracomm) -> list[Record]:
        """Give the records of all replicas, rank by rank. Collective over them; nothing is pickled."""
        if comm.size == 1:
            return self.records
        marks = np.array([(v, number, m) for v, number, _, _, m in self.records], np.float64).reshape(-1, 3)
        numbers = [torch.cat((mean, variance)) for _, _, mean, variance, _ in self.records]
        counts = np.empty(comm.size, np.int64)
        comm.Allgather(np.array([len(marks)], np.int64), counts)
        every = np.empty((int(counts.sum()), 3), np.float64)
        comm.Allgatherv(marks, [every, 3 * counts])
        like = [self.norms[int(number)].running_mean for number in every[:, 1].tolist()]
        sizes = np.array([2 * mean.nbytes for mean in like if mean is not None], np.int64)
        parts = [int(part.sum()) for part in np.split(sizes, np.cumsum(counts)[:-1])]
        mine = [number.view(torch.uint8).numpy() for number in numbers]
        found = np.empty(int(sizes.sum()), np.uint8)
        comm.Allgatherv(np.concatenate(mine) if mine else np.empty(0, np.uint8), [found, parts])
        pieces = torch.split(torch.from_numpy(found), sizes.tolist())
        records = []
        for (v, number, momentum), piece, running in zip(every.tolist(), pieces, like):
            assert running is not None
            mean, variance = piece.clone().view(running.dtype).chunk(2)
            records.append((int(v), int(number), mean, variance, momentum))
        return records


def tracked(norm: _BatchNorm) -> int:
    """Batches that a BatchNorm module has seen."""
    return int(norm.num_batches_tracked) if norm.num_batches_tracked is not None else 0
