"""BatchNorm's running statistics, watched: what torch alone would have."""

import copy

import pytest
import torch
from mpi4py import MPI
from torch import nn

from hpctrain.averaging.running import RunningStatistics


class Renormed(nn.BatchNorm1d):
    """Computes by what the statistics were."""

    def forward(self, x):
        found = super().forward(x)
        return found * (self.running_var + 1e-3).rsqrt() if self.training else found


class OfMean(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) + self.running_mean


class OwnWay(nn.BatchNorm1d):
    """Moves them on by its own formula, and takes two dimensions only."""

    def forward(self, x):
        n, _ = x.shape
        mean, variance = x.mean(0), x.var(0, unbiased=False)
        if self.training:
            with torch.no_grad():
                self.running_mean.mul_(0.9).add_(0.1 * mean)
                self.running_var.mul_(0.9).add_(0.1 * variance * n)
        return (x - mean) / (variance + self.eps).sqrt()


class Twice(nn.Module):
    """Calls its BatchNorm a second time, in a way that is not to be kept."""

    def __init__(self, way):
        super().__init__()
        self.norm, self.way = nn.BatchNorm1d(8), way

    def forward(self, x):
        found = self.norm(x)
        if self.way == "untracked":
            self.norm.track_running_stats = False
            other = self.norm(2 * x + 3)
            self.norm.track_running_stats = True
        else:
            self.norm.momentum = 0.0
            other = self.norm(2 * x + 3)
            self.norm.momentum = 0.1
        return found + other


@pytest.mark.mpi
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.BatchNorm1d(8),
        lambda: nn.BatchNorm1d(8, momentum=None),
        lambda: Renormed(8),
        lambda: OfMean(8),
        lambda: OwnWay(8),
        lambda: Twice("untracked"),
        lambda: Twice("momentum"),
    ],
    ids=["plain", "mean", "renormed", "of mean", "own way", "untracked", "momentum"],
)
def test_one_process_has_what_torch_alone_has(world, make):
    torch.manual_seed(0)
    one = make().train()
    other = copy.deepcopy(one)
    watched = RunningStatistics(other)
    for _ in range(3):  # steps of two micro-batches
        watched.begin()
        for x in (torch.randn(4, 8) + 1, torch.randn(3, 8) - 2):
            assert torch.equal(one(x), other(x))
        watched.apply(MPI.COMM_SELF)
        for (name, alone), mine in zip(one.named_buffers(), other.buffers()):
            torch.testing.assert_close(mine, alone, msg=name)  # ours rounds once more
    watched.close()
