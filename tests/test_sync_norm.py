"""SyncBatchNorm: the whole batch's statistics, forward and backward; no hang when calls differ or fail."""

import copy

import pytest
import torch
from helpers import Normed, config_of
from torch import nn

from hpctrain import assemble
from hpctrain.averaging.averager import Averager
from hpctrain.averaging.sync_norm import Meeting, PeerEndedError, SyncBatchNorm, convert, join
from hpctrain.errors import ConfigError, DivergedError, HpctrainError, RankError
from hpctrain.topology import Topology
from hpctrain.verify import compare


def share(rank, seed=0):
    """Rank r has r + 2 samples of 5 channels and 3 places, off centre."""
    generator = torch.Generator().manual_seed(seed * 100 + rank)
    return torch.randn(rank + 2, 5, 3, generator=generator) * (rank + 1) + 10.0


def test_joined_statistics_are_those_of_all_samples():
    parts = [share(r).double() for r in range(3)]
    rows = []
    for x in parts:
        wide = x.transpose(0, 1).reshape(5, -1)
        m2 = (wide - wide.mean(1, keepdim=True)).square().sum(1)
        rows.append(torch.cat([torch.tensor([float(wide.shape[1])], dtype=torch.float64), wide.mean(1), m2]))
    count, mean, m2 = join(torch.stack(rows))
    wide = torch.cat(parts).transpose(0, 1).reshape(5, -1)
    assert count == wide.shape[1]
    torch.testing.assert_close(mean, wide.mean(1))
    torch.testing.assert_close(m2 / count, wide.var(1, correction=0))


@pytest.mark.mpi
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("absent", [False, True])
def test_it_is_batchnorm_over_all_replicas(world, affine, absent):
    """`absent`: replica 0 has no samples. Reference: nn.BatchNorm1d in float64 on all samples."""
    taking_part = list(range(int(absent and world.size > 1), world.size))
    alone = nn.BatchNorm1d(5, affine=affine).double()
    if affine:
        with torch.no_grad():
            alone.weight.copy_(torch.arange(5.0) - 2)
            alone.bias.copy_(torch.arange(5.0))
    whole = torch.cat([share(r) for r in taking_part]).double().requires_grad_()
    expected = alone(whole)
    expected.sin().sum().backward()
    ours = nn.BatchNorm1d(5, affine=affine)
    convert(ours, True)
    if affine:
        ours.load_state_dict(
            {
                **alone.float().state_dict(),
                **{k: v for k, v in ours.state_dict().items() if "running" in k or "num" in k},
            }
        )
    ours.meeting = Meeting(world)
    ours.meeting.begin(taking_part)
    if world.rank in taking_part:
        x = share(world.rank).requires_grad_()
        found = ours(x)
        found.sin().sum().backward()
        at = sum(r + 2 for r in taking_part if r < world.rank)
        mine = slice(at, at + len(x))
        # float32 against float64 with values around 10: some hundred roundings of 6e-8
        torch.testing.assert_close(found.double(), expected[mine].detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(x.grad.double(), whole.grad[mine], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(ours.running_mean, alone.running_mean.float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.running_var, alone.running_var.float(), rtol=1e-5, atol=1e-5)
    ours.meeting.end(failed=False)
    if affine and not absent:
        total = world.allreduce(ours.weight.grad.double().numpy())
        torch.testing.assert_close(torch.from_numpy(total), alone.weight.grad.double(), rtol=1e-3, atol=1e-3)
    ours.meeting.close()


@pytest.mark.mpi
def test_a_failing_replica_does_not_keep_the_others_waiting(world):
    if world.size == 1:
        pytest.skip("needs two ranks")
    meeting = Meeting(world)
    for turn in range(3):
        meeting.begin(list(range(world.size)))
        failing = world.rank == world.size - 1
        if failing and turn != 2:
            meeting.end(failed=turn == 0)
            continue
        expected = (PeerEndedError, "failed") if turn == 0 else (RankError, "fewer calls")
        if turn == 2:  # and afterwards all is as before
            assert meeting.gather((0.0, 0.0), torch.tensor([1.0])).sum() == world.size
            meeting.end(failed=False)
            continue
        with pytest.raises(expected[0], match=expected[1]):
            meeting.gather((0.0, 0.0), torch.tensor([1.0]))
        meeting.end(failed=True)
    meeting.close()


@pytest.mark.mpi
def test_other_layers_on_other_replicas_are_named(world):
    if world.size == 1:
        pytest.skip("needs two ranks")
    meeting = Meeting(world)
    meeting.begin(list(range(world.size)))
    with pytest.raises(RankError, match=r"in the forward of BatchNorm number .* must call the same layers"):
        meeting.gather((float(world.rank), 0.0), torch.tensor([1.0]))
    meeting.end(failed=True)
    meeting.close()


class Special(nn.BatchNorm1d):
    """Does more than BatchNorm."""

    def forward(self, x):
        return super().forward(x) + 1.0


class Own(Normed):
    """A model that has torch's own SyncBatchNorm, which refuses CPUs."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.norm = nn.SyncBatchNorm.convert_sync_batchnorm(self.norm)


class Breaking(Normed):
    """Fails on one rank in the middle of a step."""

    def forward(self, x):
        from mpi4py import MPI

        if MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1:
            raise ValueError("a rank's own trouble")
        return super().forward(x)


def build(files, topology, model, asked=True, batch=8, **parallel):
    config = config_of(files, model, batch=batch)
    config.averaging.sync_batchnorm = asked
    for name, value in parallel.items():
        setattr(config.parallel, name, value)
    return assemble.build(config, topology)


@pytest.mark.mpi
def test_in_stages_it_is_one_micro_batch_a_replica_by_itself(world, files):
    if world.size % 2:
        pytest.skip("two stages")
    with Topology.build(world, 2, device="cpu") as topology:
        job = build(files, topology, "helpers.Normed")
        assert job.loader.count == topology.replicas == world.size // 2
        assert compare(job, 2) is None
        job.close()


@pytest.mark.mpi
@pytest.mark.parametrize("batch", [8, 3])
@pytest.mark.parametrize(
    ("model", "asked"), [("helpers.Normed", True), ("test_sync_norm.Own", False), ("helpers.Twice", True)]
)
def test_any_number_of_ranks_is_one_process_with_the_whole_batch(topology, files, model, asked, batch):
    """`verify`: loss, gradients and running statistics of one process with one micro-batch; 3 samples leave ranks idle."""
    job = build(files, topology, model, asked, batch)
    assert any(isinstance(m, SyncBatchNorm) for m in job.engine.module.modules())
    assert compare(job, 3) is None
    assert job.config.parallel.micro_batches == "auto"
    job.close()


@pytest.mark.mpi
def test_without_it_the_whole_batch_is_not_seen(topology, files):
    """The reference of the test above is another one: it can fail."""
    synced, plain = (build(files, topology, "helpers.Normed", asked) for asked in (True, False))
    losses = [job.engine.step(0, job.loader.read(0)).loss for job in (synced, plain)]
    assert (losses[0] == losses[1]) == (topology.world_size == 1)
    synced.close()
    plain.close()


@pytest.mark.mpi
def test_the_failing_rank_is_the_one_that_is_named(topology, files):
    job = build(files, topology, "test_sync_norm.Breaking")
    size = topology.world_size
    name = f"rank {size - 1} of {size}" if size > 1 else "own trouble"
    with pytest.raises(HpctrainError, match="a rank's own trouble") as raised:
        job.engine.step(0, job.loader.read(0))
    assert name in str(raised.value)
    job.close()


@pytest.mark.mpi
def test_what_it_cannot_do_is_refused(topology, files):
    count = topology.world_size + 1
    with pytest.raises(ConfigError, match=f"one micro-batch of each replica.*they are {count}"):
        build(files, topology, "helpers.Normed", micro_batches=count)
    config = config_of(files, "helpers.Normed")
    config.averaging.sync_batchnorm = config.averaging.invariant = True
    config.parallel.micro_batches = topology.world_size
    with pytest.raises(ConfigError, match="invariant and SyncBatchNorm exclude each other"):
        assemble.build(config, topology)
    with pytest.raises(ConfigError, match="0 is a LazyBatchNorm1d, which may do more than BatchNorm"):
        convert(nn.Sequential(nn.LazyBatchNorm1d()), True)
    with pytest.raises(ConfigError, match="the model is a Special, which may do more"):
        convert(Special(3), True)
    assert convert(Special(3), False) == []


def test_shapes_without_channels_are_refused():
    with pytest.raises(ValueError, match=r"takes \(samples, channels"):
        SyncBatchNorm(3)(torch.zeros(3))


def test_a_shared_layer_stays_shared_and_state_names_stay():
    norm = nn.BatchNorm1d(3)
    module = nn.Sequential(norm, nn.Linear(3, 3), norm)
    names = list(module.state_dict())
    layers = convert(module, True)
    assert module[0] is module[2] is layers[0]
    assert list(module.state_dict()) == names
    assert module[0].weight is norm.weight


@pytest.mark.mpi
def test_the_averager_ends_a_step_whose_forward_never_ran(world):
    """Reading failed on one rank: it takes part in nothing, and the others hear of it."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))
    convert(module, True)
    averager = Averager(module, torch.optim.AdamW(module.parameters(), fused=True), world)
    averager.begin([world.rank])
    if world.rank == 0:
        averager.flags.errors = 1
    else:
        with pytest.raises(PeerEndedError):
            module(torch.randn(4, 5))
    assert averager.step().errors == 1
    averager.close()


@pytest.mark.mpi
def test_outside_a_step_it_is_batchnorm_and_copies_are_usable(world):
    """A validation in train mode, a copy of the model for a moving average, a model after its run."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))
    plain = copy.deepcopy(module)
    assert module[1] is convert(module, True)[0]
    averager = Averager(module, torch.optim.AdamW(module.parameters(), fused=True), world)
    x = share(world.rank)[:, :, 0]
    assert torch.equal(copy.deepcopy(module)(x), plain(x))
    averager.close()
    assert torch.equal(module(x), plain(x))


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(world, dtype):
    """Tolerance of bfloat16: 8 bits of mantissa, numbers up to 4."""
    norm = nn.BatchNorm1d(5).to(dtype)
    convert(norm, True)
    norm.meeting = Meeting(world)
    norm.meeting.begin(list(range(world.size)))
    found = norm(share(world.rank).to(dtype))
    norm.meeting.end(failed=False)
    norm.meeting.close()
    whole = nn.BatchNorm1d(5).double()(torch.cat([share(r).to(dtype).double() for r in range(world.size)]))
    at = sum(r + 2 for r in range(world.rank))
    assert found.dtype == dtype
    room = 0.1 if dtype == torch.bfloat16 else 1e-9
    torch.testing.assert_close(found.double(), whole[at : at + len(found)], rtol=room, atol=room)


@pytest.mark.mpi
def test_a_replica_whose_numbers_are_not_finite_is_named(world):
    meeting = Meeting(world)
    meeting.begin(list(range(world.size)))
    bad = world.rank == world.size - 1
    if world.size > 1:
        expected = DivergedError if bad else PeerEndedError
        with pytest.raises(expected, match=f"replica {world.size - 1}"):
            meeting.gather((3.0, 0.0), torch.tensor([float("nan") if bad else 1.0]))
    meeting.end(failed=bad)
    meeting.close()


@pytest.mark.mpi
def test_a_model_without_batchnorm_says_so(topology, files, caplog):
    with caplog.at_level("WARNING"):
        build(files, topology, "helpers.Net").close()
    assert "sync_batchnorm does nothing: the model has no BatchNorm" in caplog.text
