"""hpctrain: train PyTorch models on HDF5 data with MPI, the same answer on any number of ranks.

Importing it starts neither MPI nor torch.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from hpctrain.version import __version__

if TYPE_CHECKING:
    import torch


def load(run: str | Path, step: int | None = None) -> "torch.nn.Module":
    """Give the model of a run folder with its weights, in eval mode, on the CPU.

    The newest good checkpoint counts, or that of `step`. Local; needs neither MPI nor the data. With
    `data.normalize` it takes and gives normalised numbers (docs/configuration.md), unlike `hpctrain predict`.
    Raises HpctrainError where the folder holds no run or no good checkpoint.
    """
    from hpctrain.use import load_module

    return load_module(Path(run), step)


__all__ = ["__version__", "load"]
