"""The averager against answers worked out in other ways: by hand, by torch alone."""

import json
import math

import pytest
import torch
from helpers import Awkward, Net, Normed, Wave
from torch import nn
from torch.utils.checkpoint import checkpoint

from hpctrain.averaging import space
from hpctrain.averaging.averager import Averager
from hpctrain.config import Averaging
from hpctrain.errors import CheckpointError, ConfigError
from hpctrain.log import LOGGER


def averager_of(module, comm, lr=0.1, bucket_bytes=200, **options):
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=lr, **options)
    averager = Averager(module, optimizer, comm, shelf_bytes=bucket_bytes)
    averager.keep = True
    return averager


def take(averager, loss, weight, clip=0.0, **options):
    """One step with one micro-batch on this rank."""
    averager.begin([averager.comm.rank])
    loss.backward()
    averager.joined(averager.comm.rank, float(loss.detach()), weight)
    return averager.step(clip, **options)


def seeded(kind, *arguments):
    torch.manual_seed(11)
    return kind(*arguments)


def loss_of(module, samples):
    """Sum over samples; each rank has other samples and another number of them."""
    torch.manual_seed(100 + samples)
    x = torch.randn(samples, 5)
    return (module(x) ** 2).sum()


@pytest.mark.mpi
@pytest.mark.parametrize("kind", [Net, Awkward, Wave])
@pytest.mark.parametrize("bucket_bytes", [1, 200, 10**9])
def test_mean_gradient_of_uneven_ranks(world, kind, bucket_bytes):
    """Independent answer: one process adds up all ranks' losses and divides."""
    module, alone = seeded(kind, 5, 2), seeded(kind, 5, 2)
    averager = averager_of(module, world, bucket_bytes=bucket_bytes)
    result = take(averager, loss_of(module, world.rank + 1), world.rank + 1.0)
    total = sum(loss_of(alone, r + 1) for r in range(world.size))
    weight = sum(r + 1 for r in range(world.size))
    (total / weight).backward()
    assert result.weight == weight
    assert result.loss == pytest.approx(float(total.detach()) / weight, rel=1e-6)
    for name, parameter in alone.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(averager.gradient(name), parameter.grad, rtol=1e-5, atol=1e-6)
    norm = math.sqrt(
        sum(float((p.grad.abs().double() ** 2).sum()) for p in alone.parameters() if p.grad is not None)
    )
    assert result.norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.mpi
def test_every_rank_ends_with_the_same_bits(world):
    module = seeded(Net, 5, 2)
    averager = averager_of(module, world)
    for _ in range(5):
        take(averager, loss_of(module, world.rank + 1), world.rank + 1.0, clip=0.1)
    bits = [p.detach().numpy().tobytes() for p in module.parameters()]
    assert all(other == bits for other in world.allgather(bits))


@pytest.mark.mpi
def test_gradients_come_home_to_the_spaces_aligned(world):
    module = seeded(Awkward, 5, 2)
    averager = averager_of(module, world)
    averager.begin([world.rank])
    loss_of(module, 3).backward()
    averager.places.came()
    begin = [flat.data_ptr() for flat in averager.medium.slots[0]]
    for name, parameter in averager.named.items():
        view, fresh = averager.places.place(parameter)
        assert fresh == (name == "unused")
        assert (parameter.grad is None) if fresh else parameter.grad.data_ptr() == view.data_ptr()
        assert view.data_ptr() % space.ALIGNMENT == 0
        assert parameter.data_ptr() % space.ALIGNMENT == 0
        assert view.stride() == parameter.stride()
        assert any(at <= view.data_ptr() < at + s.nbytes for at, s in zip(begin, averager.spaces))


@pytest.mark.mpi
@pytest.mark.parametrize("invariant", [False, True])
def test_accumulation_is_one_sum(world, invariant):
    """Two micro-batches a rank give what one batch of both gives."""
    module, once = seeded(Net, 5, 2), seeded(Net, 5, 2)
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(world.rank))
    for target, cuts in ((module, (x[:2], x[2:])), (once, (x,))):
        n = len(cuts)
        owners = [rank for rank in range(world.size) for _ in range(n)]
        optimizer = torch.optim.SGD(target.parameters(), lr=0.1)
        averager = Averager(target, optimizer, world, Averaging(invariant=invariant), owners)
        mine = range(n * world.rank, n * world.rank + n)
        averager.begin(mine)
        for v, part in zip(mine, cuts):
            (target(part) ** 2).sum().backward()
            averager.joined(v, 1.0, len(part))
        result = averager.step()
        assert (result.weight, result.loss) == (6.0 * world.size, n / 6.0)
    for a, b in zip(module.parameters(), once.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.mpi
def test_clipping_is_torchs(world):
    module, alone = seeded(Net, 5, 2), seeded(Net, 5, 2)
    averager = averager_of(module, world, lr=1.0)
    result = take(averager, loss_of(module, world.rank + 4), world.rank + 4.0, clip=0.01)
    shares = [r + 4 for r in range(world.size)]
    (sum(loss_of(alone, n) for n in shares) / sum(shares)).backward()
    norm = nn.utils.clip_grad_norm_(alone.parameters(), 0.01)
    assert result.norm == pytest.approx(float(norm), rel=1e-5)
    for parameter, expected in zip(module.parameters(), alone.parameters()):
        torch.testing.assert_close(parameter, expected - expected.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.mpi
def test_an_unused_parameter_is_left_alone(world):
    """As torch does: weight decay must not shrink what no sample used."""
    module = seeded(Awkward, 5, 2)
    averager = averager_of(module, world, weight_decay=0.5)
    take(averager, loss_of(module, 2), 2.0)
    assert torch.equal(module.unused, torch.ones(3, 3))


@pytest.mark.mpi
def test_a_parameter_used_on_one_rank_only_is_updated_on_all(world):
    module = seeded(Awkward, 5, 2)
    averager = averager_of(module, world)
    averager.begin([world.rank])
    if world.rank == world.size - 1:
        module.unused.sum().backward()
    averager.joined(world.rank, 0.0, 1.0)
    averager.step()
    torch.testing.assert_close(module.unused, torch.full((3, 3), 1.0 - 0.1 / world.size), check_dtype=True)


@pytest.mark.mpi
def test_a_failed_rank_takes_part_and_all_know(world):
    module = seeded(Net, 5, 2)
    before = [p.detach().clone() for p in module.parameters()]
    averager = averager_of(module, world)
    averager.begin([world.rank])
    if world.rank == world.size - 1:
        averager.flags.errors = 1
    else:
        loss_of(module, 2).backward()
        averager.joined(world.rank, 1.0, 2.0)
    averager.flags.stops = 1
    result = averager.step()
    assert (result.errors, result.stops, result.saves) == (1, world.size, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters()))


@pytest.mark.mpi
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_stay_when_the_gradient_is_not_finite(world, bad):
    module = seeded(Net, 5, 2)
    before = [p.detach().clone() for p in module.parameters()]
    averager = averager_of(module, world)
    averager.keep = False
    averager.begin([world.rank])
    (module(torch.ones(1, 5)).sum() * (bad if world.rank == 0 else 1.0)).backward()
    averager.joined(world.rank, 1.0, 1.0)
    assert not math.isfinite(averager.step(clip=1.0).norm)
    assert "second.bias" in averager.not_finite()
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters()))


@pytest.mark.mpi
def test_grad_set_to_none_or_replaced_by_the_users_code(world):
    module = seeded(Net, 5, 2)
    averager = averager_of(module, world)
    averager.begin([world.rank])
    (module(torch.ones(1, 5)) ** 2).sum().backward()
    once = averager.gradient("first.weight").clone()
    module.first.weight.grad = None
    (module(torch.ones(1, 5)) ** 2).sum().backward()
    torch.testing.assert_close(averager.gradient("first.weight"), 2 * once)
    assert module.first.weight.grad.data_ptr() == averager.gradient("first.weight").data_ptr()


@pytest.mark.mpi
def test_learning_rates_by_group(world):
    module = seeded(Net, 5, 2)
    before = module.first.weight.detach().clone()
    averager = averager_of(module, world)
    take(averager, loss_of(module, 2), 2.0, lr=[0.0])
    assert torch.equal(module.first.weight, before)


@pytest.mark.mpi
def test_sparse_gradients(world):
    table = nn.Embedding(7, 3, sparse=True)
    nn.init.ones_(table.weight)
    averager = averager_of(table, world)
    take(averager, table(torch.tensor([world.rank])).sum(), 1.0)
    expected = torch.ones(7, 3)
    expected[: world.size] -= 0.1 / world.size
    torch.testing.assert_close(table.weight, expected)


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradients_are_summed_in_float32(world, dtype):
    """256 + 1 is 256 in bfloat16: a sum on a 16-bit wire would lose ranks."""
    module = nn.Linear(1, 1, bias=False).to(dtype)
    averager = averager_of(module, world, lr=0.0)
    take(averager, (module.weight * (256.0 if world.rank == 0 else 1.0)).sum(), 1.0)
    mean = (256.0 + world.size - 1) / world.size
    assert float(averager.gradient("weight")) == pytest.approx(float(torch.tensor(mean, dtype=dtype)))


@pytest.mark.mpi
@pytest.mark.parametrize("kind", ["AdamW", "RMSprop", "Adagrad"])
@pytest.mark.parametrize("sharded", [True, False])
def test_state_comes_back_through_pieces(world, kind, sharded):
    """Into another averager that owns other parts: pieces are gathered by name and range."""

    def steps(averager, module, count, begin):
        for at in range(begin, begin + count):
            torch.manual_seed(at + world.rank)
            take(averager, (module(torch.randn(3, 500)) ** 2).sum(), 3.0, clip=1.0)

    def make(sharded):
        module = seeded(Normed, 500, 2)
        more = {"fused": True} if kind == "AdamW" else {}
        optimizer = getattr(torch.optim, kind)(module.parameters(), lr=0.01, **more)
        return module, Averager(module, optimizer, world, sharded=sharded, shelf_bytes=100)

    def all_pieces(averager):
        """{name: flat tensor} put together from what every rank offers."""
        found = {}
        mine = [(p.name, p.shape, p.start, p.stop, p.tensor.clone()) for p in averager.pieces()]
        for name, shape, start, stop, tensor in (p for share in world.allgather(mine) for p in share):
            _, flat = found.setdefault(name, (shape, torch.full((math.prod(shape),), math.nan)))
            flat[start:stop] = tensor.reshape(-1)
        return found

    module, averager = make(sharded)
    steps(averager, module, 4, 0)
    kept = all_pieces(averager)
    scalars = json.loads(json.dumps(averager.scalars()))
    assert {"model.first.weight", "model.norm.running_mean"} <= set(kept)
    state = {"AdamW": "exp_avg", "RMSprop": "square_avg", "Adagrad": "sum"}[kind]
    assert kept[f"optimizer.{state}.first.weight"][0] == (8, 500)
    assert not any(flat.isnan().any() for _, flat in kept.values()), "each element is on some rank"
    cut = any(0 < p.stop - p.start < math.prod(p.shape) for p in averager.pieces())
    assert any(world.allgather(cut)) == (sharded and world.size > 1), "state lies on several ranks"
    fresh, other = make(not sharded)
    other.expect(scalars, {n: (s, str(t.dtype).removeprefix("torch.")) for n, (s, t) in kept.items()})
    for piece in other.pieces():
        part = kept[piece.name][1][piece.start : piece.stop]
        piece.tensor.copy_(part.view(piece.tensor.shape))
    world.Barrier()
    steps(averager, module, 3, 4)
    steps(other, fresh, 3, 4)
    for (name, a), b in zip(module.state_dict().items(), fresh.state_dict().values()):
        assert torch.equal(a, b), name


def test_optimizer_state_that_no_checkpoint_can_hold_is_refused():
    from mpi4py import MPI

    module = seeded(Net, 5, 2)
    averager = averager_of(module, MPI.COMM_SELF)
    parameter = averager.optimizer.param_groups[0]["params"][0]
    averager.optimizer.state[parameter]["inner"] = {"m": torch.zeros(2)}
    with pytest.raises(CheckpointError, match=r"the optimizer keeps inner of .* as a dict"):
        averager.scalars()


@pytest.mark.mpi
def test_a_second_step_does_not_see_the_gradients_of_the_first(world):
    """Gradients are not zeroed: what nothing joins in a step must still count as zero."""
    module = seeded(Awkward, 5, 2)
    averager = averager_of(module, world, weight_decay=0.5)
    for used in (True, False):
        averager.begin([world.rank])
        (loss_of(module, 2) + (module.unused.sum() * 3 if used else 0.0)).backward()
        averager.joined(world.rank, 1.0, 1.0)
        averager.step()
        expected = 3.0 if used else 0.0
        torch.testing.assert_close(averager.gradient("unused"), torch.full((3, 3), expected))
        kept = module.unused.detach().clone()
    assert torch.equal(kept, module.unused)


@pytest.mark.mpi
@pytest.mark.parametrize("invariant", [False, True])
def test_a_rank_without_samples_counts_as_zero(world, invariant):
    module = seeded(Net, 5, 2)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    averager = Averager(module, optimizer, world, Averaging(invariant=invariant))
    averager.keep = True
    take(averager, loss_of(module, 3) * 7, 3.0)  # leaves something behind
    averager.begin([world.rank])
    if world.rank == 0:
        module.second.bias.sum().backward()
    averager.joined(world.rank, 1.0 if world.rank == 0 else 0.0, 2.0 if world.rank == 0 else 0.0)
    assert averager.step().weight == 2.0
    torch.testing.assert_close(averager.gradient("second.bias"), torch.full((2,), 0.5))
    assert not averager.gradient("first.weight").any()


@pytest.mark.mpi
def test_invariant_sums_of_16_bit_parameters_are_refused(world):
    """Sums within a rank would be rounded to 16 bits, those between ranks not."""
    module = torch.nn.Linear(3, 2).bfloat16()
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    with pytest.raises(ConfigError, match=r"parameters of bfloat16 would be rounded .* keep them in float32"):
        Averager(module, optimizer, world, Averaging(invariant=True))


class Recomputed(Normed):
    """BatchNorm in a region that backward runs again, and stops half way."""

    def forward(self, x):
        inner = self.first(x).unflatten(1, (2, 4))
        return self.second(checkpoint(self.norm, inner, use_reentrant=False).flatten(1))


@pytest.mark.mpi
def test_recomputed_batchnorm_keeps_its_momentum_and_statistics(world):
    """Several micro-batches a rank; against torch alone, which runs them in turn."""
    torch.manual_seed(0)
    module, alone = Recomputed(5, 2), Recomputed(5, 2)
    alone.load_state_dict(module.state_dict())
    owners = [v // 3 for v in range(3 * world.size)]
    averager = Averager(module, torch.optim.SGD(module.parameters(), lr=0.0), world, owners=owners)
    inputs = [torch.randn(4, 5, generator=torch.Generator().manual_seed(v)) for v in range(len(owners))]
    for x in inputs:
        alone(x)
    averager.begin([v for v, owner in enumerate(owners) if owner == world.rank])
    for v, owner in enumerate(owners):
        if owner == world.rank:
            loss = module(inputs[v]).square().sum()
            loss.backward()
            averager.joined(v, float(loss.detach()), 4.0)
    averager.step()
    assert module.norm.momentum == 0.1
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(module.norm, name), getattr(alone.norm, name))
    averager.close()


@pytest.mark.mpi
def test_closing_without_memory_for_copies_ends_in_a_warning(world, monkeypatch, caplog):
    """All that is mapped goes: a parameter that showed it would end the process. It ended finished runs."""
    module = nn.Linear(30, 30)
    averager = Averager(module, torch.optim.SGD(module.parameters(), lr=0.1), world)

    def clone(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patch, caplog.at_level("WARNING", LOGGER.name):
        patch.setattr(torch.Tensor, "clone", clone)
        averager.close()
    assert [parameter.numel() for parameter in module.parameters()] == [0, 0]
    assert caplog.messages == ["no memory for weights outside of the node's: the module has none any more"]
