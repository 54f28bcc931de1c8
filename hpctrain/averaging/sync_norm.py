"""BatchNorm whose statistics are those of the whole batch, however many replicas share it.

      forward    each replica: n, mean, M2 of its samples   ──►  all replicas: mean, variance of all
      backward   each replica: Σ g, Σ g·(x - mean)          ──►  all replicas: the sums of all

Statistics are joined in float64 in the order of the replicas (Chan, Golub and LeVeque 1979), so all
replicas normalise with the same bits. torch's SyncBatchNorm does this on GPUs only; a model that
has one, or any BatchNorm with `averaging.sync_batchnorm`, gets ours.

A layer that communicates in the middle of a forward can hang: one replica fails, or calls it less
often. Here every call is one message to each of the others, and the step's end is a message too:

      replica 0   call 0 · call 1 · end          messages of one sender arrive in order, so whoever
      replica 1   call 0 · (fails) end           waits for call 1 of replica 1 finds its end instead
"""

import os
import time
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from hpctrain.errors import ConfigError, DivergedError, HpctrainError, RankError
from hpctrain.topology import named

CALL, END = 1, 2
PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
YIELDS = 200
NAP_SECONDS = 50e-6
FORWARD, BACKWARD = 0.0, 1.0


class PeerEndedError(HpctrainError):
    """Another replica failed in the middle of the step; its own error is the one to show."""


class Meeting:
    """The replicas of one step, call by call."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        """Take the replicas. Collective."""
        self.comm = named(comm.Dup(), "sync batchnorm")
        self.rank = comm.rank
        self.peers: list[int] = []
        self.first = True
        """Whether this replica is the first that takes part."""
        self._open: set[int] = set()
        self._sent: list[tuple[MPI.Request, NDArray[np.float64]]] = []
        self._begun = False

    def begin(self, taking_part: list[int]) -> None:
        """Start a step that these replicas, the same list on all, compute. Local."""
        inside = self.rank in taking_part
        self.peers = [replica for replica in taking_part if replica != self.rank] if inside else []
        self.first = inside and taking_part[0] == self.rank
        self._open, self._begun = set(self.peers), True

    @property
    def open(self) -> bool:
        """Whether a step is on and other replicas take part in it."""
        return self._begun and bool(self.peers)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Meeting":
        """Stay one: a copy of a layer meets the same replicas, in the same order."""
        return self

    def gather(self, label: tuple[float, float], values: torch.Tensor) -> torch.Tensor:
        """Give what every replica gave to this call, in the order of the replicas: float64, (replicas, n).

        `label` names the call: layer and direction. Collective over who takes part. Raises
        PeerEndedError where a replica has failed, RankError where the replicas' calls differ.
        """
        if label[1] == FORWARD and not bool(torch.isfinite(values).all()):
            raise DivergedError(
                f"the statistics of SyncBatchNorm number {int(label[0])} are not finite for the samples of "
                f"replica {self.rank}: lower optimizer.init_args.lr, set train.clip, or look at these samples"
            )
        mine = np.concatenate([np.asarray(label), values.detach().cpu().double().numpy()])
        self._send(mine, CALL)
        found = {self.rank: mine}
        for peer in self.peers:
            found[peer] = self._next(peer)
            if found[peer].shape != mine.shape or (found[peer][:2] != mine[:2]).any():
                raise RankError(
                    f"replica {self.rank} is in the {direction(label)} of BatchNorm number {int(label[0])} "
                    f"with {len(values)} numbers, replica {peer} in the {direction(found[peer])} of number "
                    f"{int(found[peer][0])} with {len(found[peer]) - 2}: a model with SyncBatchNorm must "
                    f"call the same layers on every replica, whatever its samples are"
                )
        rows = np.stack([found[replica][2:] for replica in sorted(found)])
        return torch.from_numpy(rows).to(values.device)

    def end(self, failed: bool) -> None:
        """End the step: tell the others, and take what they still sent. Collective over who took part."""
        if not self._begun:
            return
        self._begun = False
        self._send(np.array([float(failed)]), END)
        for peer in sorted(self._open):
            while peer in self._open:
                self._take(peer)
        MPI.Request.Waitall([request for request, _ in self._sent])
        self._sent.clear()

    def close(self) -> None:
        """Free the communicator. Collective."""
        self.comm.Free()

    def _send(self, values: NDArray[np.float64], tag: int) -> None:
        for peer in self.peers:
            self._sent.append((self.comm.Isend(values, peer, tag), values))

    def _next(self, peer: int) -> NDArray[np.float64]:
        if peer in self._open:
            tag, values = self._take(peer)
            if tag == CALL:
                return values
            if values[0]:
                raise PeerEndedError(f"replica {peer} failed")
        raise RankError(
            f"replica {self.rank} waits in SyncBatchNorm for replica {peer}, which has ended the step with "
            f"fewer calls: a model with SyncBatchNorm must call the same layers on every replica"
        )

    def _take(self, peer: int) -> tuple[int, NDArray[np.float64]]:
        """Take the next message of a replica: (CALL, numbers) or (END, failed). Naps while it waits."""
        status, waits = MPI.Status(), 0
        while not self.comm.Iprobe(peer, MPI.ANY_TAG, status):
            waits += 1
            if waits < YIELDS:
                os.sched_yield()
            else:
                time.sleep(NAP_SECONDS)
        values = np.empty(status.Get_count(MPI.DOUBLE))
        self.comm.Recv(values, peer, status.tag)
        if status.tag == END:
            self._open.discard(peer)
        return status.tag, values


def direction(label: tuple[float, float] | NDArray[np.float64]) -> str:
    """Name the direction of a call."""
    return "forward" if label[1] == FORWARD else "backward"


def join(rows: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Join (count, means, M2s) of several sets of samples: (replicas, 1 + 2 C) to count, (C,), (C,).

    M2 is the sum of squared differences from the mean (Chan, Golub and LeVeque 1979). Pure.
    """
    channels = (rows.shape[1] - 1) // 2
    count, mean, m2 = 0.0, torch.zeros(channels).to(rows), torch.zeros(channels).to(rows)
    for row in rows:
        more, its_mean, its_m2 = float(row[0]), row[1 : 1 + channels], row[1 + channels :]
        total = count + more
        gap = its_mean - mean
        mean = mean + gap * (more / total)
        m2 = m2 + its_m2 + gap.square() * (count * more / total)
        count = total
    return count, mean, m2


class _Normalise(torch.autograd.Function):
    """Normalisation by joined statistics; both passes ask the other replicas."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        norm: "SyncBatchNorm",
    ) -> torch.Tensor:
        wide = x.double().transpose(0, 1).reshape(x.shape[1], -1)
        mean = wide.mean(dim=1)
        m2 = (wide - mean[:, None]).square().sum(dim=1)
        own = torch.cat([torch.tensor([float(wide.shape[1])]).to(mean), mean, m2])
        count, mean, m2 = join(norm.meet(FORWARD, own))
        norm.note(count, mean, m2)
        centre, variance = mean.to(torch.float32), (m2 / count).to(torch.float32)
        if x.dtype == torch.float64:
            centre, variance = mean, m2 / count
        ctx.save_for_backward(x, weight, centre, torch.rsqrt(variance + norm.eps))
        ctx.norm, ctx.count, ctx.has_bias = norm, count, bias is not None
        if weight is not None and weight.dtype in (torch.bfloat16, torch.float16):
            # torch's kernel takes statistics in the weight's dtype then, which would round them
            shape = (1, -1, *[1] * (x.ndim - 2))
            wide_out = (x.float() - centre.view(shape)) * torch.rsqrt(variance + norm.eps).view(shape)
            scaled = wide_out * weight.float().view(shape)
            return (scaled if bias is None else scaled + bias.float().view(shape)).to(x.dtype)
        return functional.batch_norm(x, centre, variance, weight, bias, False, 0.0, norm.eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, centre, scale = ctx.saved_tensors
        shape = (1, -1, *[1] * (x.ndim - 2))
        others = [d for d in range(x.ndim) if d != 1]
        wide = g.to(centre.dtype)
        shifted = x.to(centre.dtype) - centre.view(shape)
        sum_g = wide.double().sum(dim=others)
        sum_gx = (wide * shifted).double().sum(dim=others)
        norm, count = ctx.norm, ctx.count
        totals = norm.meet(BACKWARD, torch.cat([sum_g, sum_gx])).sum(dim=0).to(centre.dtype) / count
        mean_g, mean_gx = totals.chunk(2)
        factor = scale if weight is None else scale * weight.to(scale.dtype)
        inner = wide - mean_g.view(shape) - shifted * (scale.square() * mean_gx).view(shape)
        to_weight = None if weight is None else (sum_gx.to(scale.dtype) * scale).to(weight.dtype)
        to_bias = sum_g.to(scale.dtype) if ctx.has_bias else None
        return (inner * factor.view(shape)).to(x.dtype), to_weight, to_bias, None


class SyncBatchNorm(_BatchNorm):
    """BatchNorm over the samples of all replicas; alone, and in eval mode, it is BatchNorm."""

    meeting: Meeting | None = None
    number = 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise (n, C, …) over all replicas' n. Collective over who takes part in the step."""
        if self.meeting is None or not self.training or not self.meeting.open:
            return super().forward(input)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return _Normalise.apply(input, self.weight, self.bias, self)  # type: ignore[no-any-return, no-untyped-call]

    @property
    def speaks(self) -> bool:
        """Whether this replica records the statistics, which all have: one must."""
        return self.meeting is None or self.meeting.first

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm takes (samples, channels, …), got shape {tuple(input.shape)}")

    def meet(self, way: float, values: torch.Tensor) -> torch.Tensor:
        """Ask the other replicas for what they have."""
        assert self.meeting is not None
        return self.meeting.gather((float(self.number), way), values)

    @torch.no_grad()
    def note(self, count: float, mean: torch.Tensor, m2: torch.Tensor) -> None:
        """Move the running statistics towards those of this batch, as BatchNorm does."""
        if self.running_mean is None or self.running_var is None:
            return
        tracked = self.num_batches_tracked
        factor = (
            self.momentum if self.momentum is not None else 1.0 / float(tracked if tracked is not None else 1)
        )
        for running, batch in ((self.running_mean, mean), (self.running_var, m2 / max(count - 1.0, 1.0))):
            running.mul_(1.0 - factor).add_((batch * factor).to(running.dtype))


def convert(module: nn.Module, every: bool) -> list[SyncBatchNorm]:
    """Make torch's SyncBatchNorm layers ours, and with `every` any BatchNorm. Local.

    The layers stay the same objects, with their parameters, buffers and hooks; gives them. Raises
    ConfigError for a subclass: what its own code does would be lost.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, SyncBatchNorm) or not isinstance(layer, _BatchNorm):
            continue
        if type(layer) is nn.SyncBatchNorm or (every and type(layer) in PLAIN):
            layer.__class__ = SyncBatchNorm
        elif every:
            raise ConfigError(
                f"averaging.sync_batchnorm: {name or 'the model'} is a {type(layer).__name__}, which may do "
                f"more than BatchNorm (or does not know its channels yet) and can't be synchronised: put "
                f"torch.nn.SyncBatchNorm layers where they are wanted and leave averaging.sync_batchnorm out"
            )
    layers = [m for m in module.modules() if isinstance(m, SyncBatchNorm)]
    for number, layer in enumerate(layers):
        layer.number = number
    return layers
