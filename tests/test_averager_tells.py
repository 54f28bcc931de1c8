"""What the averager tells of itself: misuse, who was waited for, memory."""

import numpy as np
import pytest
import torch
from torch import nn

from hpctrain.averaging.averager import Averager
from hpctrain.errors import HpctrainError


@pytest.mark.mpi
def test_a_second_step_without_begin_is_refused(world):
    module = nn.Linear(3, 2)
    averager = Averager(module, torch.optim.SGD(module.parameters(), lr=0.1), world)
    averager.begin([world.rank])
    module(torch.ones(1, 3)).sum().backward()
    averager.joined(world.rank, 1.0, 1.0)
    averager.step()
    with pytest.raises(HpctrainError, match="no gradient has come; call begin first"):
        averager.step()
    averager.close()


@pytest.mark.mpi
def test_times_name_the_slowest(world):
    module = nn.Linear(3, 2)
    averager = Averager(module, torch.optim.SGD(module.parameters(), lr=0.1), world)
    for _ in range(2):
        averager.begin([world.rank])
        module(torch.ones(1, 3)).sum().backward()
        averager.joined(world.rank, 1.0, 1.0)
        averager.flags.reading = 3.0 * (world.size - world.rank)  # the first rank is last for its reading
        averager.flags.computing = 1.0 + world.rank
        times = averager.step().times
    assert times.computing.tolist() == [1.0 + r for r in range(world.size)]
    assert times.waiting.tolist() == [2.0 * r for r in range(world.size)]
    assert times.reading.tolist() == [3.0 * (world.size - r) for r in range(world.size)]
    assert np.isfinite(times.transfer).all()
    averager.close()


@pytest.mark.mpi
@pytest.mark.parametrize("sharded", [True, False])
def test_memory_counts_what_a_node_shares_once(world, sharded):
    """Two units of weights, 4 KiB each: parameters share none. Moments are cut between the ranks, or whole on each."""
    module = nn.Linear(32, 31)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    averager = Averager(module, optimizer, world, sharded=sharded)
    found = {name: world.allreduce(size) for name, size in averager.memory().items()}
    numbers = 32 * 31 + 31
    copies = 1 if sharded else world.size
    assert found["weights"] == copies * 8192
    assert found["gradients"] == world.size * 8192
    assert found["optimizer"] == copies * 2 * 4 * numbers
    assert found["between nodes"] == 0
    averager.close()
