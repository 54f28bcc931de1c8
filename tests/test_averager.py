"""The averager against answers worked out in other ways: by hand, by torch alone."""

import math

import numpy as np
import pytest
import torch
from helpers import Awkward, Net, Normed, Wave
from torch import nn

from hpctrain.averaging import buckets as layout
from hpctrain.averaging.averager import Averager
from hpctrain.averaging.buckets import Bucket, digits, fill
from hpctrain.errors import CheckpointError


def averager_of(module, comm, lr=0.1, bucket_bytes=200, **options):
    def optimizer():
        return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=lr, **options)

    return Averager(module, optimizer, comm, bucket_bytes)


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
    averager.begin(1)
    mine = loss_of(module, world.rank + 1)
    mine.backward()
    averager.tally.loss, averager.tally.weight = float(mine.detach()), world.rank + 1.0
    result = averager.step(clip=0.0)
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
        averager.begin(1)
        loss_of(module, world.rank + 1).backward()
        averager.tally.weight = world.rank + 1.0
        averager.step(clip=0.1)
    bits = [p.detach().numpy().tobytes() for p in module.parameters()]
    assert all(other == bits for other in world.allgather(bits))


@pytest.mark.mpi
def test_gradients_are_views_of_the_buckets_and_aligned(world):
    module = seeded(Awkward, 5, 2)
    averager = averager_of(module, world)
    averager.begin(1)
    for bucket in averager.buckets:
        for parameter, view in zip(bucket.parameters, bucket.views):
            assert parameter.grad is view
            assert view.data_ptr() % layout.ALIGNMENT == 0
            assert bucket.gradients.data_ptr() <= view.data_ptr()
    loss_of(module, 3).backward()
    for bucket in averager.buckets:
        for parameter, view in zip(bucket.parameters, bucket.views):
            assert parameter.grad is view


@pytest.mark.mpi
def test_accumulation_is_one_sum(world):
    """Two micro-batches give what one batch of both gives."""
    module, once = seeded(Net, 5, 2), seeded(Net, 5, 2)
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(world.rank))
    for target, cuts in ((module, (x[:2], x[2:])), (once, (x,))):
        averager = averager_of(target, world)
        averager.begin(len(cuts))
        for part in cuts:
            (target(part) ** 2).sum().backward()
        averager.tally.weight = 6.0
        averager.step(clip=0.0)
    for a, b in zip(module.parameters(), once.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.mpi
def test_clipping_is_torchs(world):
    module, alone = seeded(Net, 5, 2), seeded(Net, 5, 2)
    averager = averager_of(module, world, lr=1.0)
    averager.begin(1)
    loss_of(module, world.rank + 4).backward()
    averager.tally.weight = world.rank + 4.0
    result = averager.step(clip=0.01)
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
    averager.begin(1)
    loss_of(module, 2).backward()
    averager.tally.weight = 2.0
    averager.step(clip=0.0)
    assert torch.equal(module.unused, torch.ones(3, 3))
    assert module.unused.grad is None


@pytest.mark.mpi
def test_a_parameter_used_on_one_rank_only_is_updated_on_all(world):
    module = seeded(Awkward, 5, 2)
    averager = averager_of(module, world)
    averager.begin(1)
    if world.rank == world.size - 1:
        module.unused.sum().backward()
    averager.tally.weight = 1.0
    averager.step(clip=0.0)
    torch.testing.assert_close(module.unused, torch.full((3, 3), 1.0 - 0.1 / world.size), check_dtype=True)


@pytest.mark.mpi
def test_a_failed_rank_takes_part_and_all_know(world):
    module = seeded(Net, 5, 2)
    before = [p.detach().clone() for p in module.parameters()]
    averager = averager_of(module, world)
    averager.begin(1)
    if world.rank == world.size - 1:
        averager.tally.errors = 1
    else:
        loss_of(module, 2).backward()
        averager.tally.weight = 2.0
    averager.tally.stops = 1
    result = averager.step(clip=0.0)
    assert (result.errors, result.stops, result.saves) == (1, world.size, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters()))


@pytest.mark.mpi
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_stay_when_the_gradient_is_not_finite(world, bad):
    module = seeded(Net, 5, 2)
    before = [p.detach().clone() for p in module.parameters()]
    averager = averager_of(module, world)
    averager.begin(1)
    (module(torch.ones(1, 5)).sum() * (bad if world.rank == 0 else 1.0)).backward()
    averager.tally.weight = 1.0
    assert not math.isfinite(averager.step(clip=1.0).norm)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters()))


@pytest.mark.mpi
def test_grad_set_to_none_or_replaced_by_the_users_code(world):
    module = seeded(Net, 5, 2)
    averager = averager_of(module, world)
    averager.begin(2)
    (module(torch.ones(1, 5)) ** 2).sum().backward()
    once = averager.gradient("first.weight").clone()
    module.first.weight.grad = None
    (module(torch.ones(1, 5)) ** 2).sum().backward()
    torch.testing.assert_close(averager.gradient("first.weight"), 2 * once)
    assert module.first.weight.grad is averager.gradient("first.weight")


@pytest.mark.mpi
def test_learning_rates_by_group(world):
    module = seeded(Net, 5, 2)
    before = module.first.weight.detach().clone()
    averager = averager_of(module, world)
    averager.begin(1)
    loss_of(module, 2).backward()
    averager.tally.weight = 2.0
    averager.step(0.0, lr=[0.0])
    assert torch.equal(module.first.weight, before)


@pytest.mark.mpi
def test_sparse_gradients(world):
    table = nn.Embedding(7, 3, sparse=True)
    nn.init.ones_(table.weight)
    averager = averager_of(table, world)
    averager.begin(1)
    table(torch.tensor([world.rank])).sum().backward()
    averager.tally.weight = 1.0
    averager.step(0.0)
    expected = torch.ones(7, 3)
    expected[: world.size] -= 0.1 / world.size
    torch.testing.assert_close(table.weight, expected)


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradients_are_summed_in_float32(world, dtype):
    """256 + 1 is 256 in bfloat16: a sum on a 16-bit wire would lose ranks."""
    module = nn.Linear(1, 1, bias=False).to(dtype)
    averager = averager_of(module, world, lr=0.0)
    averager.begin(1)
    (module.weight * (256.0 if world.rank == 0 else 1.0)).sum().backward()
    averager.tally.weight = 1.0
    averager.step(0.0)
    mean = (256.0 + world.size - 1) / world.size
    assert float(averager.gradient("weight")) == pytest.approx(float(torch.tensor(mean, dtype=dtype)))


def test_only_64_bit_and_half_models_have_a_tail():
    half = fill([nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))], 100, 5)
    assert [len(b.tail) for b in half] == [0, 5]
    double = fill([nn.Parameter(torch.zeros(3, dtype=torch.float64))], 100, 5)
    assert [len(b.tail) for b in double] == [5]


def test_buckets_hold_about_their_size_in_reverse_order():
    parameters = [nn.Parameter(torch.zeros(10)) for _ in range(7)]
    found = fill(parameters, 80, 1)
    assert [len(b.parameters) for b in found] == [2, 2, 2, 1]
    assert found[0].parameters[0] is parameters[-1]
    assert isinstance(found[0], Bucket)


def test_counts_travel_exactly_in_float32():
    """Sums of digits in float32, over 4,096 ranks, against integers."""
    random = np.random.default_rng(0)
    counts = random.integers(0, 2**18, size=4096)
    parts = np.array([digits(float(c)) for c in counts], dtype=np.float32)
    total = np.zeros(3, dtype=np.float32)
    for row in parts:
        total += row
    assert float(total.astype(np.float64).sum()) == float(counts.sum())
    losses = random.normal(size=64) * 1e3
    parts = np.array([digits(float(c)) for c in losses], dtype=np.float32).astype(np.float64)
    assert abs(parts.sum() - losses.sum()) < 1e-6
    assert math.isnan(digits(math.nan)[0])


@pytest.mark.mpi
def test_state_comes_back_through_pieces(world):
    def steps(averager, module, count, begin):
        for at in range(begin, begin + count):
            averager.begin(1)
            torch.manual_seed(at + world.rank)
            (module(torch.randn(3, 5)) ** 2).sum().backward()
            averager.tally.weight = 3.0
            averager.step(1.0)

    def make():
        module = seeded(Normed, 5, 2)
        groups = [{"params": list(module.parameters())}]
        return module, Averager(module, lambda: torch.optim.AdamW(groups, lr=0.01, fused=True), world, 100)

    module, averager = make()
    steps(averager, module, 4, 0)
    kept = {p.name: (p.shape, p.tensor.clone()) for p in averager.pieces()}
    scalars = averager.scalars()
    assert {
        "model.first.weight",
        "model.norm.running_mean",
        "optimizer.exp_avg.first.weight",
        "optimizer.step.norm.bias",
    } <= set(kept)
    steps(averager, module, 3, 4)
    fresh, other = make()
    other.expect(scalars, {n: (s, str(t.dtype).removeprefix("torch.")) for n, (s, t) in kept.items()})
    for piece in other.pieces():
        piece.tensor.copy_(kept[piece.name][1])
    steps(other, fresh, 3, 4)
    assert len(kept) == len(other.pieces())
    for a, b in zip(averager.pieces(), other.pieces()):
        assert torch.equal(a.tensor, b.tensor), a.name


def test_optimizer_state_that_no_checkpoint_can_hold_is_refused():
    from mpi4py import MPI

    module = seeded(Net, 5, 2)
    averager = averager_of(module, MPI.COMM_SELF)
    averager.optimizer.state[module.first.weight]["inner"] = {"m": torch.zeros(2)}
    with pytest.raises(CheckpointError, match="the optimizer keeps inner of first.weight as a dict"):
        averager.scalars()
