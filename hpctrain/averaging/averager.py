"""One object owns the way from gradients to new weights: begin, ready, step, pieces.

      begin(m)      zero the buckets; m micro-batches of this replica follow
      ready(p)      a micro-batch's gradient of parameter p has joined its bucket
      step(…)       sum over the replicas, divide by the global weight, clip, update the weights

Weight, loss, error and stop flags ride in the tail of the gradients' own sum: a rank that failed
still takes part, and all ranks know.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import nn

from hpctrain.averaging import buckets as layout
from hpctrain.averaging.running import RunningStatistics
from hpctrain.errors import CheckpointError
from hpctrain.piece import Piece, of_module, whole

QUANTITIES = ("weight", "loss", "errors", "stops", "saves", "changed")


@dataclass
class Tally:
    """What this rank adds to the sum beside gradients."""

    weight: float = 0.0
    loss: float = 0.0
    errors: int = 0
    stops: int = 0
    saves: int = 0
    changed: int = 0


@dataclass(frozen=True)
class Result:
    """What a step gives, the same on all ranks."""

    weight: float
    """Global weight: the number of samples where none is masked or weighted."""
    loss: float
    """Global weighted mean."""
    norm: float
    """2-norm of the mean gradient before clipping; NaN where there was no update."""
    errors: int
    """Ranks that failed; then the weights are as before."""
    stops: int
    """Ranks that were asked to stop."""
    saves: int
    """Ranks whose clock asks for a checkpoint."""


class Averager:
    """Gradients in flat buckets, summed by MPI Allreduce; every rank updates all weights."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: Callable[[], torch.optim.Optimizer],
        comm: MPI.Intracomm,
        bucket_bytes: int,
    ) -> None:
        """Take the module, what makes its optimizer, and the replicas' communicator."""
        self.comm, self.module = comm, module
        self.named = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.parameters = list(self.named.values())
        self.running = RunningStatistics(module)
        self.tally = Tally()
        self._places = {id(p): at for at, p in enumerate(self.parameters)}
        self._used = torch.zeros(len(self.parameters))
        tail = 3 * len(QUANTITIES) + len(self.parameters) + self.running.size
        self.buckets = layout.fill(self.parameters, bucket_bytes, tail)
        self._tail = layout.tail_of(self.buckets)
        self._views = {id(p): v for b in self.buckets for p, v in zip(b.parameters, b.views)}
        self.optimizer = optimizer()
        self._hooks = [p.register_post_accumulate_grad_hook(self.ready) for p in self.parameters]  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Take the hooks off the user's parameters and give the gradients free."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self.parameters:
            parameter.grad = None

    def begin(self, micro_batches: int) -> None:
        """Start a step: gradients are zero; `micro_batches` of this replica follow. Local."""
        self.tally = Tally()
        self._used.zero_()
        self.running.begin()
        for bucket in self.buckets:
            bucket.gradients.zero_()
            bucket.attach()

    def ready(self, parameter: torch.Tensor) -> None:
        """Note that a micro-batch's gradient of a parameter is complete. Local; called by autograd."""
        view = self._views[id(parameter)]
        if parameter.grad is not view and parameter.grad is not None:
            # the user's code set .grad to None or to a tensor of its own: bring it home
            if parameter.grad.data_ptr() != view.data_ptr():
                view.add_(parameter.grad)
            parameter.grad = view
        self._used[self._places[id(parameter)]] += 1

    def step(self, clip: float, lr: Iterable[float] | None = None) -> Result:
        """Sum over the replicas, clip the mean gradient to the norm `clip` (0: not), update.

        `lr` is one learning rate a parameter group; None keeps them. Collective over the
        replicas. With an error on any rank, or a loss or gradient that is not finite, the
        weights stay as they are.
        """
        self._fill_tail()
        for bucket in self.buckets:
            bucket.sum(self.comm)
        totals, used, running = self._read_tail()
        weight, errors = totals["weight"], round(totals["errors"])
        loss = totals["loss"] / weight if weight else math.nan
        norm = math.nan
        if not errors:
            self._finish_buffers(totals, running)
        if not errors and weight:
            norm = self._mean_and_norm(weight, clip)
        if math.isfinite(norm) and math.isfinite(loss):
            self._update(used, lr)
        flags = round(totals["stops"]), round(totals["saves"])
        return Result(weight, loss, norm, errors, *flags)

    def _fill_tail(self) -> None:
        tally = self.tally
        tally.changed = int(self.running.others_changed)
        values = [d for name in QUANTITIES for d in layout.digits(float(getattr(tally, name)))]
        share = torch.zeros(0)
        if self.running.norms:
            every = np.array(self.comm.allgather(self.running.runs()))
            self._runs = every.sum(axis=0)
            share = self.running.share(every[self.comm.rank + 1 :].sum(axis=0), self._runs).float()
        joined = torch.cat([torch.tensor(values), self._used, share])
        self._tail.copy_(joined)

    def _read_tail(self) -> tuple[dict[str, float], torch.Tensor, torch.Tensor]:
        tail = self._tail.double().cpu()
        split = 3 * len(QUANTITIES)
        sums = tail[:split].view(-1, 3).sum(dim=1).tolist()
        used, running = tail[split : split + len(self.parameters)], tail[split + len(self.parameters) :]
        return dict(zip(QUANTITIES, sums)), used, running

    def _finish_buffers(self, totals: dict[str, float], running: torch.Tensor) -> None:
        if self.running.norms and self.comm.size > 1:
            self.running.apply(running, self._runs)
        if totals["changed"] and self.comm.size > 1:
            self.running.broadcast_others(self.comm)

    def _mean_and_norm(self, weight: float, clip: float) -> float:
        """Divide by the global weight; give the norm, from one rank where weights depend on it."""
        square = 0.0
        for bucket in self.buckets:
            bucket.body.mul_(1.0 / weight)
            square += float(torch.linalg.vector_norm(bucket.body, dtype=torch.float64)) ** 2
        norm = math.sqrt(square)
        if clip:
            # its last bits depend on the threads a rank has, and ranks may differ in that
            norm = self.comm.bcast(norm, root=0)
            if norm > clip:
                for bucket in self.buckets:
                    bucket.body.mul_(clip / (norm + 1e-6))
        return norm

    def _update(self, used: torch.Tensor, lr: Iterable[float] | None) -> None:
        """Run the optimizer; a parameter that no micro-batch used is left alone, as by torch."""
        if lr is not None:
            for group, rate in zip(self.optimizer.param_groups, lr, strict=True):
                group["lr"] = rate
        for parameter, times in zip(self.parameters, used.tolist()):
            parameter.grad = self._views[id(parameter)] if times else None
        self.optimizer.step()

    def gradient(self, name: str) -> torch.Tensor:
        """Give the mean gradient that the last step used, of a parameter by name."""
        return self._views[id(self.named[name])]

    def pieces(self) -> list[Piece]:
        """Weights, buffers and the optimizer's tensors, whole, the same on every replica."""
        found = of_module(self.module)
        for name, parameter in self.named.items():
            for key, value in sorted(self.optimizer.state.get(parameter, {}).items()):
                if isinstance(value, torch.Tensor):
                    found.append(whole(f"optimizer.{key}.{name}", value))
        return found

    def scalars(self) -> dict[str, Any]:
        """State that is no tensor: the groups' settings, and numbers the optimizer keeps."""
        keep = (int, float, bool, str, list, tuple, type(None))
        for name, parameter in self.named.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                plain = isinstance(value, (torch.Tensor, int, float, bool, str, type(None)))
                if not plain:
                    raise CheckpointError(
                        f"the optimizer keeps {key} of {name} as a {type(value).__name__}: checkpoints "
                        f"hold tensors and numbers only, so it can't be resumed: take another optimizer"
                    )
        groups = [
            {k: v for k, v in group.items() if k != "params" and isinstance(v, keep)}
            for group in self.optimizer.param_groups
        ]
        state = {
            name: {
                key: value
                for key, value in self.optimizer.state.get(parameter, {}).items()
                if isinstance(value, keep)
            }
            for name, parameter in self.named.items()
        }
        return {"groups": groups, "state": {name: kept for name, kept in state.items() if kept}}

    def expect(self, scalars: dict[str, Any], tensors: dict[str, tuple[tuple[int, ...], str]]) -> None:
        """Make room for the optimizer state of a checkpoint, so that `pieces` offers it.

        `tensors` gives shape and dtype name of every stored tensor. Local.
        """
        for group, stored in zip(self.optimizer.param_groups, scalars["groups"], strict=True):
            group.update({k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in stored.items()})
        for name, parameter in self.named.items():
            state = dict(scalars["state"].get(name, {}))
            for stored_name, (shape, dtype) in tensors.items():
                if stored_name.startswith("optimizer.") and stored_name.endswith(f".{name}"):
                    key = stored_name[len("optimizer.") : -len(name) - 1]
                    if "." in key:
                        continue
                    device = "cpu" if key == "step" and not self._step_on_device() else parameter.device
                    state[key] = torch.zeros(shape, dtype=getattr(torch, dtype), device=device)
            if state:
                self.optimizer.state[parameter] = state

    def _step_on_device(self) -> bool:
        return any(g.get("fused") or g.get("capturable") for g in self.optimizer.param_groups)
