"""Sharded or not, one node or several, any optimizer: the same bits, and torch's own answer."""

import math

import pytest
import torch
from torch import nn

from hpctrain import node_memory as memory
from hpctrain.averaging import build
from hpctrain.averaging.averager import Averager
from hpctrain.averaging.node import Node
from hpctrain.averaging.staged import Staged
from hpctrain.averaging.steppers import Adam, Pieces
from hpctrain.errors import CheckpointError


class Model(nn.Module):
    """More numbers than a unit, two decay groups, a weight that some steps don't use, odd shapes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(37, 61)
        self.sometimes = nn.Linear(61, 61)
        self.last = nn.Linear(61, 3)
        self.turned = nn.Parameter(torch.randn(3, 61).t())

    def forward(self, x, use):
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.sometimes(x)) if use else x
        return self.last(x) + x @ self.turned


class Whole(torch.optim.Optimizer):
    """Looks at whole tensors, as LAMB does: the update is scaled by the weight's norm."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["mean"] = state.get("mean", torch.zeros_like(p)).mul_(0.9).add_(p.grad)
                    p.add_(
                        state["mean"], alpha=-group["lr"] * float(p.norm() / (state["mean"].norm() + 1e-6))
                    )


OPTIMIZERS = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
    "Adam": lambda groups: torch.optim.Adam(groups, lr=0.01, fused=True),
    "amsgrad": lambda groups: torch.optim.AdamW(groups, lr=0.01, amsgrad=True, fused=True),
    "decoupled": lambda groups: torch.optim.Adam(groups, lr=0.01, fused=True, decoupled_weight_decay=True),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.01, initial_accumulator_value=0.1),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, centered=True, momentum=0.5),
    "NAdam": lambda groups: torch.optim.NAdam(groups, lr=0.01),
    "Adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.01),
    "whole": Whole,
}


def parameter_groups(module):
    thick = [p for p in module.parameters() if p.ndim > 1]
    thin = [p for p in module.parameters() if p.ndim == 1]
    return [{"params": thick, "weight_decay": 0.1}, {"params": thin, "weight_decay": 0.0}]


def samples(rank, step):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(rank + 2, 37, generator=generator)


def train(comm, kind, sharded, clip=0.0, node_of=None, steps=5, **more):
    torch.manual_seed(0)
    module = Model()
    optimizer = OPTIMIZERS[kind](parameter_groups(module))
    averager = Averager(module, optimizer, comm, sharded=sharded, node_of=node_of, **more)
    norms = []
    for step in range(steps):
        averager.begin([comm.rank])
        x = samples(comm.rank, step)
        loss = module(x, use=step % 3 == 1).square().sum()
        loss.backward()
        averager.joined(comm.rank, float(loss.detach()), float(len(x)))
        norms.append(averager.step(clip).norm)
    averager.close()
    return [p.detach().clone() for p in module.parameters()], norms, averager


def torch_alone(comm, kind, clip, steps=5):
    torch.manual_seed(0)
    module = Model()
    optimizer = OPTIMIZERS[kind](parameter_groups(module))
    for step in range(steps):
        optimizer.zero_grad()
        weight = sum(r + 2 for r in range(comm.size))
        for rank in range(comm.size):
            (module(samples(rank, step), use=step % 3 == 1).square().sum() / weight).backward()
        if clip:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
    return [p.detach() for p in module.parameters()]


@pytest.mark.mpi
@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_sharded_and_plain_give_the_same_bits_and_torchs_answer(world, kind, clip):
    plain, norms, averager = train(world, kind, False, clip)
    assert not averager.sharded
    sharded, other, averager = train(world, kind, True, clip)
    assert averager.sharded == (world.size > 1)
    assert norms == other
    assert all(torch.equal(a, b) for a, b in zip(plain, sharded))
    bits = [p.numpy().tobytes() for p in sharded]
    assert all(share == bits for share in world.allgather(bits))
    # Rounding differences of five steps of 0.01, where gradients near zero are divided by their size.
    for a, b in zip(plain, torch_alone(world, kind, clip)):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=5e-4)


@pytest.mark.mpi
@pytest.mark.parametrize("kind", ["AdamW", "SGD", "whole"])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_virtual_nodes(world, kind, clip):
    """2 and 3 nodes, uneven ones too: sharded is plain, bit for bit, and near one node's answer."""
    one, _, _ = train(world, kind, True, clip)
    for node_of in (
        [r % 2 for r in range(world.size)],
        [r % 3 for r in range(world.size)],
        [r // 3 for r in range(world.size)],
    ):
        plain, norms, _ = train(world, kind, False, clip, node_of)
        sharded, other, _ = train(world, kind, True, clip, node_of)
        assert norms == other
        for a, b, c in zip(plain, sharded, one):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c, rtol=2e-4, atol=5e-4)
        bits = [p.numpy().tobytes() for p in sharded]
        assert all(share == bits for share in world.allgather(bits))


@pytest.mark.mpi
def test_without_shared_memory_the_answer_is_the_same(world, monkeypatch):
    usual, _, _ = train(world, "AdamW", True)
    monkeypatch.setattr(memory, "FOLDER", "/nowhere/at/all")
    fallback, norms, _ = train(world, "AdamW", True)
    assert all(math.isfinite(norm) for norm in norms)
    for a, b in zip(usual, fallback):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=5e-4)


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_16_bit_parameters(world, dtype, clip):
    """A norm that float16 can't hold; the same bits whoever steps."""
    found = []
    for sharded in (True, False):
        torch.manual_seed(0)
        module = nn.Linear(64, 40).to(dtype)
        averager = Averager(
            module, torch.optim.AdamW(module.parameters(), lr=0.01, fused=True), world, sharded=sharded
        )
        for step in range(3):
            averager.begin([world.rank])
            (module(torch.full((2, 64), 1.0 + step + world.rank, dtype=dtype)).sum() * 2000).backward()
            averager.joined(world.rank, 1.0, 2.0)
            norm = averager.step(clip).norm
            assert math.isfinite(norm)
            assert norm > 65504, "more than the largest float16"
        found.append([p.detach().clone() for p in module.parameters()])
        averager.close()
    assert all(torch.equal(a, b) for a, b in zip(*found))
    assert not torch.equal(found[0][0], nn.Linear(64, 40).to(dtype).weight)


@pytest.mark.mpi
def test_settings_that_no_checkpoint_can_hold_are_refused(world):
    module = nn.Linear(3, 2)
    averager = Averager(module, torch.optim.SGD(module.parameters(), lr=torch.tensor(0.1)), world)
    with pytest.raises(CheckpointError, match="the optimizer keeps lr of a parameter group as a Tensor"):
        averager.scalars()


@pytest.mark.mpi
def test_what_is_chosen_by_itself(world):
    """auto: a user's optimizer may look at other parameters, so it is not sharded unasked."""
    chosen = {}
    for kind in OPTIMIZERS:
        _, _, averager = train(world, kind, "auto", steps=1)
        chosen[kind] = averager.sharded, type(averager.stepper)
    several = world.size > 1
    assert chosen["AdamW"] == chosen["Adam"] == (several, Adam)
    assert chosen["SGD"] == chosen["amsgrad"] == (several, Pieces)
    assert chosen["whole"] == chosen["Adafactor"] == (False, Pieces)


@pytest.mark.mpi
def test_weights_and_state_are_kept_once_a_node(world):
    torch.manual_seed(0)
    module = Model()
    averager = Averager(module, torch.optim.AdamW(module.parameters(), fused=True), world)
    held = sum(m.numel() for moment in averager.stepper.moments for parts in moment for m in parts)
    total = sum(s.size for s in averager.spaces)
    assert sum(world.allgather(held)) == 2 * total
    if world.size > 1:
        with torch.no_grad():
            if world.rank == 0:
                module.first.weight[3, 4] = 42.0
            averager.medium.rendezvous.meet()
            assert float(module.first.weight.detach()[3, 4]) == 42.0, "all ranks see one memory"
            averager.medium.rendezvous.meet()
    averager.close()
    if world.size > 1:
        assert float(module.first.weight.detach()[3, 4]) == 42.0, "kept in memory of the rank's own"


@pytest.mark.mpi
@pytest.mark.parametrize("kind", ["AdamW", "whole"])
def test_what_goes_through_the_nodes_memory_for_gpus_is_the_plain_way(world, monkeypatch, kind):
    """`Staged` with gradients on the CPU: the same bits, one node and two."""
    for node_of in ([0] * world.size, [r % 2 for r in range(world.size)]):
        plain, norms, _ = train(world, kind, False, 0.5, node_of, shelf_bytes=5000)

        def medium(comm, spaces, smalls, config, owners, sharded, crowded, node_of, cuda_aware):
            return Staged(spaces, lambda its: Node(comm, its, smalls, crowded, node_of=node_of))

        with monkeypatch.context() as patch:
            patch.setattr(build, "medium", medium)
            found, other, averager = train(world, kind, False, 0.5, node_of, shelf_bytes=5000)
        assert len(averager.spaces[0].buckets) > 1
        assert isinstance(averager.medium, Staged)
        assert norms == other
        assert all(torch.equal(a, b) for a, b in zip(found, plain))
