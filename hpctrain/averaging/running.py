"""BatchNorm's running statistics at any number of replicas, as one process would have them.

One process runs the micro-batches 0 … n-1 in turn; each makes  b ← a·b + (1-a)·s_v.
Replica r runs only its own n_r of them, from the same b:

      b_r = a^{n_r}·b + c_r            so c_r = b_r - a^{n_r}·b
      b   ← a^n·b + Σ_r a^{(micro-batches behind r's)}·c_r

The right-hand sum rides in the gradients' sum. With momentum None (a plain mean) the weights
are all equal: Σ_r (b_r·(m + n_r) - b·m) / (m + n), m the batches tracked before. Any other
buffer that a step changes is taken from the last replica, whose micro-batches come last.
"""

import torch
from mpi4py import MPI
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class RunningStatistics:
    """The buffers of a module that a training step changes."""

    def __init__(self, module: nn.Module) -> None:
        """Find BatchNorm modules with running statistics, and all other buffers."""
        self.norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        mine = {id(b) for norm in self.norms for b in norm.buffers(recurse=False)}
        self.others = [(n, b) for n, b in module.named_buffers() if id(b) not in mine]
        self.size = sum(2 * norm.num_features for norm in self.norms)
        self.before: list[tuple[torch.Tensor, int]] = []
        self.versions: list[int] = []

    def begin(self) -> None:
        """Remember the statistics before the step."""
        self.before = [(self._values(norm), tracked(norm)) for norm in self.norms]
        self.versions = [buffer._version for _, buffer in self.others]

    @property
    def others_changed(self) -> bool:
        """Whether this rank's step changed a buffer that is no BatchNorm's."""
        return any(b._version != v for (_, b), v in zip(self.others, self.versions))

    def share(self, behind: int, total: int) -> torch.Tensor:
        """Give this replica's term of the sum: float64, (size,).

        `behind` micro-batches with samples come after this replica's, `total` are in the step.
        """
        terms = [torch.zeros(0, dtype=torch.float64)]
        for norm, (before, tracked_before) in zip(self.norms, self.before):
            runs = tracked(norm) - tracked_before
            now = self._values(norm)
            if norm.momentum is None:
                terms.append(
                    (now * (tracked_before + runs) - before * tracked_before) / max(1, tracked_before + total)
                )
            else:
                keep = 1.0 - norm.momentum
                terms.append(keep**behind * (now - keep**runs * before))
        return torch.cat(terms)

    def apply(self, summed: torch.Tensor, total: int) -> None:
        """Set the statistics after the step from the sum over the replicas."""
        at = 0
        for norm, (before, tracked_before) in zip(self.norms, self.before):
            term = summed[at : at + 2 * norm.num_features]
            at += 2 * norm.num_features
            if norm.momentum is None:
                keep = tracked_before / max(1, tracked_before + total)
            else:
                keep = (1.0 - norm.momentum) ** total
            mean, variance = (keep * before + term).chunk(2)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.fill_(tracked_before + total)

    def broadcast_others(self, comm: MPI.Intracomm) -> None:
        """Take every other buffer from the last replica. Collective."""
        for _, buffer in self.others:
            array = comm.bcast(buffer.cpu().numpy(), root=comm.size - 1)
            buffer.copy_(torch.from_numpy(array))

    def _values(self, norm: _BatchNorm) -> torch.Tensor:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        return torch.cat([norm.running_mean, norm.running_var]).double().cpu()


def tracked(norm: _BatchNorm) -> int:
    """Batches that a BatchNorm module has seen."""
    return int(norm.num_batches_tracked) if norm.num_batches_tracked is not None else 0
