"""One object owns the way from gradients to new weights: begin, joined, step, pieces.

      begin(m)         no gradient has joined; this replica's micro-batches m follow
      places           where each parameter's gradient is to be computed, and that it has come
      joined(v, …)     micro-batch v is done: its loss and weight
      step(…)          sum over the replicas, divide by the global weight, clip, update the weights

Loss, weight, errors and flags are exchanged in float64 before the gradients are summed: a rank
that failed still takes part, and all ranks know before anything is changed.

      one pass     sum a block of gradients · divide · step the block's weights     (it is in the cache)
      two passes   sum, store, take the norm  ·  clip, step                   (clipping needs the norm first)
"""

import math
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from torch import nn

from hpctrain.averaging import build, sentinel
from hpctrain.averaging.buffers import Buffers
from hpctrain.averaging.medium import BLOCK, Sink
from hpctrain.averaging.node import Node
from hpctrain.averaging.norm import Norm
from hpctrain.averaging.overlap import Overlap
from hpctrain.averaging.partial import PartialSums
from hpctrain.averaging.places import Places
from hpctrain.averaging.result import FLAGS, TIMES, Flags, Result, Times
from hpctrain.averaging.running import RunningStatistics
from hpctrain.averaging.space import SHELF_BYTES, cut, deal
from hpctrain.averaging.steppers import Shapes, group_settings
from hpctrain.averaging.sync_norm import Meeting, SyncBatchNorm
from hpctrain.config import Averaging
from hpctrain.errors import DriftError, HpctrainError
from hpctrain.log import LOGGER
from hpctrain.piece import Piece, of_module
from hpctrain.room import ran_out
from hpctrain.wire import raise_together


class Averager:
    """Gradients of the replicas of a stage, summed, and the weights they update."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        comm: MPI.Intracomm,
        config: Averaging | None = None,
        owners: Sequence[int] | None = None,
        sharded: bool | str = "auto",
        crowded: bool = False,
        node_of: Sequence[int] | None = None,
        shelf_bytes: int = SHELF_BYTES,
        cuda_aware: bool = False,
        pipe: MPI.Intracomm | None = None,
    ) -> None:
        """Take the module, its optimizer, and the replicas' communicator. Collective.

        `owners` gives the replica of each micro-batch of the step (default: one each);
        `crowded` says that there are more ranks than cores here; `node_of` makes up nodes;
        `cuda_aware`: MPI reads a GPU's memory; `pipe`: the ranks of the other stages, whose modules
        are the model's other parts: losses, flags and the norm are those of all.
        """
        self.comm, self.module, self.optimizer = comm, module, optimizer
        self.pipe = pipe if pipe is not None and pipe.size > 1 else None
        self.config = config or Averaging()
        self.owners = list(range(comm.size)) if owners is None else list(owners)
        self.flags = Flags()
        self.keep = False
        """Whether `gradient` is asked for after a step: then the mean gradient is kept on all ranks."""
        self.named = named = {n: p for n, p in module.named_parameters() if p.requires_grad}
        groups = {id(p): n for n, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self.spaces = deal(named, groups, shelf_bytes)
        smalls = len(FLAGS) + 2 * len(self.owners) + len(named) + len(TIMES) * comm.size
        shards = build.shards(optimizer, self.spaces, sharded)
        self.medium = build.medium(
            comm, self.spaces, smalls, self.config, self.owners, shards, crowded, node_of, cuda_aware
        )
        self.norm = Norm(self.spaces, self.medium, self.pipe)
        self.sharded = shards and isinstance(self.medium, Node)
        self.running = RunningStatistics(module)
        self.buffers = Buffers(module, self.running.norms)
        self.sync = self._synchronised()
        self._settle()
        self.stepper = build.stepper(optimizer, self.spaces, self.weights, self.medium, self.sharded)
        self.places = Places(named, self.spaces)
        sums = PartialSums(len(self.owners), self.spaces, self.medium.slots, self.places)
        self.sums = sums if self.config.invariant else None
        self.overlap = self._choose_overlap()
        self._losses = np.zeros((2, len(self.owners)))
        self._coming: list[int] = []
        self._begun = self._broken = self._told_last = False
        self._began = self._transfer = 0.0
        self.places.point(0, self.medium.slots[0])

    # -- building ----------------------------------------------------------------------------

    def _settle(self) -> None:
        """Let every parameter be a view of flat memory; the node's first rank fills what is shared."""
        shared = self.medium.weights
        fills = shared is None or not isinstance(self.medium, Node) or self.medium.local.rank == 0
        self.weights = shared or [torch.zeros_like(flat) for flat in self.medium.slots[0]]
        with torch.no_grad():
            for space, flat in zip(self.spaces, self.weights):
                for seat in space.seats:
                    view = seat.view(flat)
                    if fills:
                        view.copy_(seat.parameter)
                    seat.parameter.data = view
        self.medium.finish(weights=False)

    def _synchronised(self) -> Meeting | None:
        """Let the SyncBatchNorm layers of the module meet, if it has any."""
        layers = [m for m in self.module.modules() if isinstance(m, SyncBatchNorm)]
        meeting = Meeting(self.comm) if layers and self.comm.size > 1 else None
        for layer in layers:
            layer.meeting = meeting
        return meeting

    def _choose_overlap(self) -> Overlap | None:
        """Between nodes gradients are sent while backward goes on, unless a tree adds micro-batches first."""
        medium = self.medium
        if not isinstance(medium, Node) or medium.place.nodes == 1 or self.sums:
            return None
        self.places.watch(medium.buckets)
        return Overlap(medium, self.places)

    def close(self) -> None:
        """Take the hooks off the user's parameters; give them memory of their own, if there is any. Local."""
        failing = sys.exc_info()[0] is not None
        if self.overlap:
            self.overlap.close()
        for layer in self.module.modules():
            if isinstance(layer, SyncBatchNorm):
                layer.meeting = None
        if self.sync and not failing:  # freeing is collective
            self.sync.close()
        self.places.close()
        self.running.close()
        short = False
        for parameter in self.named.values():
            parameter.grad = None
            try:
                parameter.data = parameter.data.clone()
            except (MemoryError, RuntimeError) as error:
                if not ran_out(error):
                    raise
                parameter.data = parameter.data.new_empty(0)  # what is mapped goes: better none than a crash
                short = True
        if short and not failing:
            LOGGER.warning("no memory for weights outside of the node's: the module has none any more")
        self.weights = []
        self.medium.close()

    # -- a step ------------------------------------------------------------------------------

    def begin(self, micro_batches: Iterable[int], taking_part: Sequence[int] | None = None) -> None:
        """Start a step: no gradient has joined; these micro-batches of this replica follow. Local.

        `taking_part`: the replicas with samples, for SyncBatchNorm (default: all).

        Raises HpctrainError where moving gradients failed in an earlier step, on this rank or another.
        """
        if self._broken:
            raise HpctrainError(
                "moving gradients between nodes failed in an earlier step, and its messages may still be on "
                "their way: build the job anew, from its last checkpoint"
            )
        if self.sync:
            self.sync.begin(list(range(self.comm.size) if taking_part is None else taking_part))
        self._began, self._begun = time.perf_counter(), True
        self.flags = Flags()
        self._losses[:] = 0.0
        self.running.begin()
        self.buffers.begin()
        self._coming = list(micro_batches)
        self.running.micro_batch = self._coming[0] if self._coming else 0
        if self.sums:
            self.sums.begin(self._coming)
        if self.overlap:
            self.overlap.begin()
        self.places.begin(several=len(self._coming) > 1 and not self.sums)
        self.places.point(0, self.medium.slots[0])
        self.medium.begin()
        self._told_last = False
        if len(self._coming) == 1:
            self.last_backward()

    def last_backward(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Note that what the backward that follows brings is final, for all parameters or some. Local."""
        if self.overlap and not self._told_last:
            self.overlap.last(parameters)
        self._told_last = self._told_last or parameters is None

    def watching(self, looks: bool) -> AbstractContextManager[None]:
        """Note what a forward does with buffers that replicas share; `looks`: it may be looked at. Local."""
        if self.comm.size == 1:
            return nullcontext()
        return self.buffers.watching(self.running.micro_batch, looks=looks and self.config.invariant)

    def forward_of(self, micro_batch: int) -> None:
        """Note that the forward of a micro-batch follows, where passes are not in turn. Local."""
        self.running.micro_batch = micro_batch

    def used_elsewhere(self, parameters: Iterable[torch.Tensor]) -> None:
        """Let no gradient of these leave before `step`: those of other ranks will be added at the end. Local.

        The same on all replicas.
        """
        self.places.used_elsewhere(parameters)

    def add(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        """Add a gradient that another rank has computed to what has joined here. Local."""
        found = self.places.place(parameter)
        assert found is not None
        place, first = found
        if first:
            place.copy_(gradient)
        else:
            place.add_(gradient)
        self.places.filled(parameter)

    def divide(self, parts: Sequence[Sequence[nn.Parameter]]) -> None:
        """Say which parameters belong to which part of the backward, where those take turns. Local."""
        if self.sums:
            self.sums.divide(parts)

    def joined_part(self, micro_batch: int, part: int) -> None:
        """Note that a part of a micro-batch's backward is done, which takes its place in the tree. Local."""
        self.places.came()
        if self.sums:
            self.sums.take(micro_batch, part)

    def joined(self, micro_batch: int, loss: float, weight: float) -> None:
        """Note that a micro-batch is done, with its last part, 0: its summed loss and weight. Local.

        In invariant mode its gradient takes its place in the tree; empty ones join too.
        """
        self._losses[:, micro_batch] = loss, weight
        self._coming = [v for v in self._coming if v != micro_batch]
        self.running.micro_batch = self._coming[0] if self._coming else 0
        if len(self._coming) == 1:
            self.last_backward()
        self.joined_part(micro_batch, 0)

    def step(self, clip: float = 0.0, lr: Iterable[float] | None = None) -> Result:
        """Sum over the replicas, clip the mean gradient to the norm `clip` (0: not), update.

        `lr` is one learning rate a parameter group; None keeps them. Collective over the
        replicas. With an error on any rank, or a loss that is not finite, the weights stay as
        they are; so they do with a gradient that is not finite where `clip` is set (else it is
        seen when the step is taken: the norm says so, and the caller must stop).

        Raises HpctrainError where no step has begun since the last one.
        """
        if not self._begun:
            raise HpctrainError(
                "averager.step was called without a step to end (a second time?): "
                "no gradient has come; call begin first"
            )
        self._begun = False
        if self.sync:
            self.sync.end(failed=self.flags.errors > 0)
        entered = time.perf_counter()
        self.flags.computing = self.flags.computing or entered - self._began
        if self.overlap:
            self.flags.computing -= self.overlap.polled
        failure = self._take_over()
        self.places.complete()
        self.running.restore()
        trained = self.config.invariant and self.buffers.trained  # refused below
        self.flags.changed = int(bool(self.buffers.changed() or trained))
        flags, (losses, weights), used, times = self._exchange()
        weight = math.fsum(weights)
        loss = math.fsum(losses) / weight if weight and np.isfinite(losses).all() else math.nan
        norm = math.nan
        if not flags["errors"]:
            if flags["changed"] and self.comm.size > 1:
                if self.config.invariant:
                    self.buffers.check(self.comm, self.pipe or self.comm)
                self.buffers.share(self.comm)
            self.running.apply(self.comm)
        if not flags["errors"] and weight and math.isfinite(loss):
            for group, rate in zip(self.optimizer.param_groups, lr or (), strict=lr is not None):
                group["lr"] = rate
            norm = self._update(used, 1.0 / weight, clip)
        elif flags["broken"]:
            self._broken = True  # waiting for what is on its way could last for ever
        else:
            self.medium.skip()
        if self.overlap:
            self.overlap.note(time.perf_counter() - self._began)
        waited = float(times.waiting[self.comm.rank])
        self._transfer = max(0.0, time.perf_counter() - entered - waited)
        return Result(weight, loss, norm, flags["errors"], flags["stops"], flags["saves"], times, failure)

    def _take_over(self) -> Exception | None:
        """End what another thread does; its failure is told to the others before it is raised."""
        try:
            if self.overlap:
                self.overlap.take_over()
        except Exception as error:
            self.flags.errors = self.flags.broken = 1
            return error
        return None

    def _exchange(self) -> tuple[dict[str, int], NDArray[np.float64], list[bool], Times]:
        """Give the sums of flags, losses and weights by micro-batch (2, V), used parameters, and times."""
        seconds = np.zeros((len(TIMES), self.comm.size))
        own = self.flags
        seconds[:, self.comm.rank] = own.reading, own.other, own.computing, self._transfer
        flags = np.array([float(getattr(self.flags, name)) for name in FLAGS])
        parts = [flags, self._losses, self.places.used, seconds]
        totals = self.medium.exchange(np.concatenate([part.ravel() for part in parts]))
        cuts = np.cumsum([part.size for part in parts])[:-1]
        flags, losses, used, seconds = np.split(totals, cuts)
        if self.pipe:  # one stage has losses, the others zeros
            both = np.concatenate([flags, losses])
            self.pipe.Allreduce(MPI.IN_PLACE, both, op=MPI.SUM)
            flags, losses = both[: len(flags)], both[len(flags) :]
        reading, other, computing, transfer = seconds.reshape(len(TIMES), -1)
        busy = reading + other + computing  # since the last step, which all ended together
        times = Times(reading, other, computing, busy.max() - busy, transfer)
        counts = dict(zip(FLAGS, (round(value) for value in flags)))
        return counts, losses.reshape(2, -1), (used > 0).tolist(), times

    def _update(self, used: list[bool], scale: float, clip: float) -> float:
        """Average and step; give the norm of the mean gradient before clipping."""
        medium, stepper = self.medium, self.stepper
        alone = self.sharded or medium.sums_all  # whatever a rank steps it has summed
        if stepper.blockwise and alone and not clip and not self.keep:
            stepper.begin(used)
            medium.sum(self._mean_and(scale, stepper.block))
            medium.finish(weights=self.sharded)
            return self.norm.value()
        medium.sum(self._mean_and(scale, self._store), stored=True)
        medium.finish(weights=False)
        norm = self.norm.value()
        if not math.isfinite(norm):
            return norm
        factor = clip / (norm + 1e-6) if clip and norm > clip else 1.0  # torch's clip_grad_norm_
        stepper.begin(used)
        # an optimizer of whole tensors is dealt out within the node: every node steps all
        travels = self.sharded and stepper.needs() is None
        if travels:
            medium.before_step()
        self._step_stored(factor, whole=self.keep or not alone)
        medium.finish(weights=travels)
        return norm

    def _mean_and(self, scale: float, then: Sink) -> Sink:
        def sink(number: int, start: int, stop: int, total: torch.Tensor) -> None:
            total.mul_(scale)
            self.norm.note(number, start, stop, total)
            then(number, start, stop, total)

        return sink

    def _store(self, number: int, start: int, stop: int, mean: torch.Tensor) -> None:
        target = self.medium.slots[0][number][start:stop]
        if target.data_ptr() != mean.data_ptr():
            target.copy_(mean)

    def _step_stored(self, factor: float, whole: bool) -> None:
        """Clip and step by the mean gradient that lies in slot 0."""
        own = [[self.medium.owned(b) for b in s.buckets] for s in self.spaces]
        every = [list(s.buckets) for s in self.spaces]
        wanted = every if whole else self.stepper.needs()
        if wanted is not None:
            self.medium.spread(wanted)
        gradients = self.medium.slots[0]
        if factor != 1.0:
            for flat, ranges in zip(gradients, wanted or own):
                for start, stop in ranges:
                    flat[start:stop].mul_(factor)
        if not self.stepper.blockwise:
            self.stepper.step()
        else:
            for number, ranges in enumerate(own if self.sharded else every):
                for a, b in (block for ab in ranges for block in cut(*ab, BLOCK)):
                    self.stepper.block(number, a, b, gradients[number][a:b])
        if self.keep:
            self.places.point(0, gradients)
            self.places.keep()

    def gradient(self, name: str) -> torch.Tensor:
        """Give the gradient of a parameter by name: what has joined so far, or the mean after a step.

        After a step it is there with `keep` only.
        """
        return self.places.gradient(name)

    def not_finite(self) -> list[str]:
        """Name the parameters whose mean gradient of the last step is not finite. Collective.

        Units tell where; what a rank itself computed tells which of the unit's parameters.
        """
        near = self.norm.near_bad()
        mine = [name for name in near if not bool(torch.isfinite(self.gradient(name)).all())]
        found = set().union(*self.comm.allgather(mine)) or near
        named = [name for name in self.named if name in found]
        return [name for share in self.pipe.allgather(named) for name in share] if self.pipe else named

    def check_drift(self, step: int) -> None:
        """Compare the bits of weights and buffers over the ranks. Collective; raises DriftError on all.

        The ranks of a node that share one copy of the weights look at it in turns; nobody does
        where it is the only one.
        """
        if self.comm.size == 1:  # and so on every stage
            return
        pieces, shared = of_module(self.module), self.medium.weights is not None
        trained = {f"model.{name}" for name in self.named}
        place = self.medium.place if isinstance(self.medium, Node) else None

        def looks(at: int) -> bool:
            if place is None or not shared or pieces[at].name not in trained:
                return True
            return place.nodes > 1 and at % place.lanes == place.local_rank

        drift: DriftError | None = None
        try:
            sentinel.check(self.comm, pieces, [looks(at) for at in range(len(pieces))], step)
        except DriftError as error:
            drift = error
        texts = self.pipe.allgather(str(drift or "")) if self.pipe else [str(drift or "")]
        if any(texts):
            told = DriftError(next(text for text in texts if text))
            told.agreed = True
            raise told from drift

    def ready_times(self) -> list[tuple[str, NDArray[np.float64]]]:
        """Give each bucket's parameters and when it was full on each replica, in the order they leave.

        Seconds since the end of the step before, shape (replicas,), the mean over the steps so far;
        nothing where there is one node: all is averaged at once then. Collective over the replicas.
        """
        if not (self.overlap and self.overlap.steps and isinstance(self.medium, Node)):
            return []
        every = np.array(self.comm.allgather(self.overlap.ready / self.overlap.steps))
        found = []
        for at in self.places.order:
            bucket = self.medium.buckets[at]
            inside = self.spaces[bucket.space].inside(*bucket.range)
            ends = dict.fromkeys((inside[0].name, inside[-1].name)) if inside else ["padding"]
            found.append((" … ".join(ends), every[:, at]))
        return found

    def memory(self) -> dict[str, int]:
        """Bytes of this rank's memory by use; what a node shares is its first rank's. Local."""
        weights = sum(flat.nbytes for flat in self.weights)
        if self.medium.weights is not None and isinstance(self.medium, Node) and self.medium.local.rank:
            weights = 0
        gradients = sum(flat.nbytes for slot in self.medium.slots for flat in slot)
        optimizer = sum(piece.tensor.nbytes for piece in self.stepper.pieces())
        between = self.medium.between_bytes if isinstance(self.medium, Node) else 0
        return {"weights": weights, "gradients": gradients, "optimizer": optimizer, "between nodes": between}

    # -- state -------------------------------------------------------------------------------

    def pieces(self) -> list[Piece]:
        """Weights and buffers, whole; the optimizer's tensors, as far as this rank owns them."""
        return of_module(self.module) + self.stepper.pieces()

    def scalars(self) -> dict[str, Any]:
        """State that is no tensor: the groups' settings, and numbers the optimizer keeps. Collective."""
        state: dict[str, Any] = {}
        failure: HpctrainError | None = None
        try:
            groups = [group_settings(group) for group in self.optimizer.param_groups]
            state = self.stepper.scalars()
        except HpctrainError as error:
            failure = error
        raise_together(self.comm, failure)
        if self.sharded and not self.stepper.blockwise:
            state = {name: kept for share in self.comm.allgather(state) for name, kept in share.items()}
        if self.pipe:
            state = {name: kept for share in self.pipe.allgather(state) for name, kept in share.items()}
        return {"groups": groups, "state": state}

    def expect(self, scalars: dict[str, Any], tensors: Shapes) -> None:
        """Make room for the optimizer state of a checkpoint, so that `pieces` offers it. Local."""
        for group, stored in zip(self.optimizer.param_groups, scalars["groups"], strict=True):
            group.update({k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in stored.items()})
        self.stepper.expect(scalars["state"], tensors)
