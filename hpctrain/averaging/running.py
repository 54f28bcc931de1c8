"""BatchNorm's running statistics at any number of replicas, as one process would have them.

One process runs the micro-batches 0 … n-1 in turn; each makes  b ← a·b + (1-a)·s_v.
Replica r runs only its own n_r of them, from the same b:

      b_r = a^{n_r}·b + c_r            so c_r = b_r - a^{n_r}·b
      b   ← a^n·b + Σ_r a^{(micro-batches behind r's)}·c_r

The right-hand sum rides in the gradients' sum. With momentum None (a plain mean) the weights
are all equal: Σ_r (b_r·(m + n_r) - b·m) / (m + n), m the batches tracked before. Any other
buffer that a step changes is taken from the last replica, whose micro-batches come last.
"""

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hpctrain.batch import broadcast


class RunningStatistics:
    """The buffers of a module that a training step changes."""

    def __init__(self, module: nn.Module) -> None:
        """Find BatchNorm modules with running statistics."""
        self.module = module
        self.norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        self.size = sum(2 * norm.num_features for norm in self.norms)
        self.before: list[tuple[torch.Tensor, int]] = []
        self.copies: dict[str, torch.Tensor] = {}

    def others(self) -> dict[str, torch.Tensor]:
        """Buffers that are no BatchNorm's, as they are now: user code may assign new ones."""
        mine = {id(b) for norm in self.norms for b in norm.buffers(recurse=False)}
        return {name: b for name, b in self.module.named_buffers() if id(b) not in mine}

    def begin(self) -> None:
        """Remember the buffers before the step."""
        self.before = [(self._values(norm), tracked(norm)) for norm in self.norms]
        self.copies = {name: buffer.clone() for name, buffer in self.others().items()}

    @property
    def others_changed(self) -> bool:
        """Whether this rank's step changed a buffer that is no BatchNorm's, in whatever way."""
        return any(
            name not in self.copies or not torch.equal(self.copies[name], buffer)
            for name, buffer in self.others().items()
        )

    def runs(self) -> NDArray[np.int64]:
        """Count the batches that each BatchNorm has seen in this step: int64, (norms,)."""
        counts = [tracked(norm) - before for norm, (_, before) in zip(self.norms, self.before)]
        return np.array(counts, dtype=np.int64)

    def share(self, behind: NDArray[np.int64], total: NDArray[np.int64]) -> torch.Tensor:
        """Give this replica's term of the sum: float64, (size,).

        By BatchNorm, `behind` batches come after this replica's and `total` are in the step; a
        frozen or unused one has none, one that is called twice has two a micro-batch.
        """
        terms = [torch.zeros(0, dtype=torch.float64)]
        for at, (norm, (before, tracked_before)) in enumerate(zip(self.norms, self.before)):
            runs = tracked(norm) - tracked_before
            now = self._values(norm)
            if norm.momentum is None:
                weighted = now * (tracked_before + runs) - before * tracked_before
                terms.append(weighted / max(1, tracked_before + int(total[at])))
            else:
                keep = 1.0 - norm.momentum
                terms.append(keep ** int(behind[at]) * (now - keep**runs * before))
        return torch.cat(terms)

    def apply(self, summed: torch.Tensor, total: NDArray[np.int64]) -> None:
        """Set the statistics after the step from the sum over the replicas."""
        at = 0
        for norm, (before, tracked_before), count in zip(self.norms, self.before, total.tolist()):
            term = summed[at : at + 2 * norm.num_features]
            at += 2 * norm.num_features
            if norm.momentum is None:
                keep = tracked_before / max(1, tracked_before + count)
            else:
                keep = (1.0 - norm.momentum) ** count
            mean, variance = (keep * before + term).chunk(2)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            if count:
                norm.running_mean.copy_(mean)
                norm.running_var.copy_(variance)
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.fill_(tracked_before + count)

    def broadcast_others(self, comm: MPI.Intracomm) -> None:
        """Take every other buffer from the last replica. Collective."""
        for buffer in self.others().values():
            broadcast(comm, buffer, comm.size - 1)

    def _values(self, norm: _BatchNorm) -> torch.Tensor:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        return torch.cat([norm.running_mean, norm.running_var]).double().cpu()


def tracked(norm: _BatchNorm) -> int:
    """Batches that a BatchNorm module has seen."""
    return int(norm.num_batches_tracked) if norm.num_batches_tracked is not None else 0
