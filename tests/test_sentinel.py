"""The drift sentinel: one flipped bit on one rank is found, named, and raised on all ranks."""

import pytest
import torch
from torch import nn

from hpctrain.averaging import sentinel
from hpctrain.averaging.averager import Averager
from hpctrain.errors import DriftError


def build(world, sharded, node_of=None):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    module.register_buffer("empty", torch.empty(0))
    module.register_buffer("short", torch.ones(3, dtype=torch.bfloat16))
    module[0].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], fused=True)
    return module, Averager(module, optimizer, world, sharded=sharded, node_of=node_of)


def flip(tensor):
    bits = tensor.detach().view(-1).view(torch.int32)
    bits[0] ^= 1


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.running_mean", "2.bias"])
def test_a_flipped_bit_is_named_with_its_rank(world, name):
    module, averager = build(world, sharded=False)
    averager.check_drift(3)
    last = world.size - 1
    if world.rank == last:
        flip(module.state_dict()[name])
    if world.size == 1:
        averager.check_drift(4)
    else:
        with pytest.raises(
            DriftError, match=rf"after step 4 .* bits of model.{name}: .*ranks {last}\b"
        ) as info:
            averager.check_drift(4)
        assert info.value.agreed
        assert len(set(world.allgather(str(info.value)))) == 1
    averager.close()


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["0.weight", "2.bias"])
def test_nodes_that_share_their_weights_are_compared(world, name):
    """Ranks of a node take turns over its one copy; another node's copy differs."""
    module, averager = build(world, True, node_of=[r % 2 for r in range(world.size)])
    averager.check_drift(3)
    world.Barrier()
    if world.rank == 0:
        flip(dict(module.named_parameters())[name])
    world.Barrier()
    if world.size == 1:
        averager.check_drift(4)
    else:
        with pytest.raises(DriftError, match=f"model.{name}"):
            averager.check_drift(4)
    averager.close()


def test_a_digest_sees_order_and_sign():
    a = torch.tensor([1.0, 2.0, 0.0])
    assert sentinel.digest(a) == sentinel.digest(a.clone())
    assert sentinel.digest(a) != sentinel.digest(a.flip(0))
    assert sentinel.digest(a) != sentinel.digest(torch.tensor([1.0, 2.0, -0.0]))
    assert sentinel.digest(torch.ones(2, 3).t()) == sentinel.digest(torch.ones(3, 2))
    assert sentinel.digest(torch.empty(0)) == 0
    z = torch.tensor([1 + 2j, 3 - 1j])
    assert sentinel.digest(z.conj()) == sentinel.digest(torch.tensor([1 - 2j, 3 + 1j]))
    assert sentinel.digest(z.conj().imag) == sentinel.digest(torch.tensor([-2.0, 1.0]))
    assert sentinel.digest(torch.eye(3).to_sparse()) == sentinel.digest(torch.eye(3))
