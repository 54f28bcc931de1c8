"""A micro-batch in memory: what the model gets, what it is to predict, what each value weighs."""

from dataclasses import dataclass, field

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray


@torch.no_grad()
def broadcast(comm: MPI.Intracomm, tensor: torch.Tensor, root: int) -> None:
    """Give all ranks the bytes of one rank's tensor, in place, whatever its dtype. Collective."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel() and comm.size > 1:
        comm.Bcast(flat.view(torch.uint8).numpy(), root=root)
        tensor.copy_(flat.view(tensor.shape))


@dataclass
class Batch:
    """Samples of one micro-batch; every tensor has them along its first dimension."""

    samples: NDArray[np.int64]
    """Numbers in the long dataset, (n,)."""
    inputs: dict[str, torch.Tensor]
    targets: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    """By target: a weight an element, of a shape that broadcasts to the target's; absent: 1."""
    extra: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """What a task keeps for its own metrics and pictures."""

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.samples)

    def to(self, device: str) -> "Batch":
        """Move the tensors to a device."""
        if device == "cpu":
            return self

        def move(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}

        return Batch(self.samples, move(self.inputs), move(self.targets), move(self.weights), self.extra)
