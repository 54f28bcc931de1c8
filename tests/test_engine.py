"""Failures inside a step: all ranks raise, with the failing rank's name, and nothing changes."""

import math

import h5py
import numpy as np
import pytest
import torch
from helpers import config_of, values

from hpctrain import assemble
from hpctrain.config import ClassPath
from hpctrain.data import order
from hpctrain.engine import layer_of, listed, sum_over, to_float
from hpctrain.errors import DataError, DivergedError, HpctrainError, RankError
from hpctrain.log import LOGGER
from hpctrain.verify import compare


def run(config, topology, steps=4):
    job = assemble.build(config, topology)
    before = {n: t.clone() for n, t in job.engine.module.state_dict().items()}
    position = 0
    try:
        for number in range(steps):
            step = job.loader.read(position)
            job.engine.step(number, step)
            position = step.next_position
            before = {n: t.clone() for n, t in job.engine.module.state_dict().items()}
    finally:
        after = job.engine.module.state_dict()
        assert all(torch.equal(before[n], after[n]) for n in before)
        job.close()


def holder(config, sample, replicas, count):
    """Which rank meets a sample in the first epoch, and in which micro-batch, worked out by search."""
    position = 0
    for number in range(4):
        for v in range(count):
            if sample in order.micro_batch(position, v, count, 8, 29, config.train.seed):
                owner = [r for r in range(replicas) if v in order.replica_micro_batches(r, replicas, count)]
                return owner[0], number, v
        position = order.position_after(number + 1, 8, 29)
    raise AssertionError("the sample is in no step")


@pytest.mark.mpi
def test_a_users_exception_is_raised_on_all_ranks_with_its_place(topology, files):
    x, _ = values()
    config = config_of(files, "helpers.Failing")
    config.model = ClassPath("helpers.Failing", {"bad": float(x[17, 0])})
    config.parallel.micro_batches = 6
    rank, number, v = holder(config, 17, topology.replicas, 6)
    with pytest.raises(RankError) as caught:
        run(config, topology)
    text = str(caught.value)
    assert "RuntimeError: the user's own trouble" in text
    assert f"at step {number}, micro-batch {v}" in text
    assert caught.value.agreed
    if topology.world_size > 1:
        assert text.startswith(f"rank {rank} of {topology.world_size}: ")


@pytest.mark.mpi
def test_an_error_of_a_layer_names_it_and_what_it_was_given(topology, files):
    job = assemble.build(config_of(files), topology)
    job.engine.module.second = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(3, 2))
    with pytest.raises(
        RankError, match=r"in layer second\.1 \(Linear\), given float32 \(\d+, 8\)\nat step 0, "
    ):
        job.engine.step(0, job.loader.read(0))
    with pytest.raises(RuntimeError) as caught:  # in an evaluation, a prediction, a dry run
        job.engine.outputs(job.task.batch(np.arange(1)))
    assert caught.value.__notes__ == ["in layer second.1 (Linear), given float32 (1, 8)"]
    job.close()
    with pytest.raises(KeyError) as caught:
        {}["outside of every layer"]
    assert layer_of(caught.value, job.engine.module) == ""


@pytest.mark.mpi
def test_a_batch_of_more_than_there_is_is_told(topology, files, caplog):
    with caplog.at_level("WARNING", LOGGER.name):
        assemble.build(config_of(files, batch=1000), topology).close()
    told = "train.batch = 1000 is more than the 29 training samples: a step takes those"
    assert [record.getMessage() for record in caplog.records] == ([] if topology.world_rank else [told])


@pytest.mark.mpi
def test_one_process_to_compare_with_says_nothing_again(topology, files, caplog):
    with caplog.at_level("WARNING", LOGGER.name):
        job = assemble.build(config_of(files, batch=1000), topology)
        assert compare(job, 1) is None
        job.close()
    assert caplog.text.count("is more than the 29 training samples") == (topology.world_rank == 0)


@pytest.mark.mpi
@pytest.mark.parametrize(("batch", "told"), [(8, True), (29, False)])
def test_a_last_batch_too_small_for_batchnorm_is_told_before(topology, files, caplog, batch, told):
    """29 samples are three batches of 8 and one of 5, whose 4 micro-batches have 1, 1, 1 and 2 of them."""
    config = config_of(files, "stage_models.Normed", batch=batch)
    config.parallel.micro_batches = 4 if told else topology.replicas
    with caplog.at_level("WARNING", LOGGER.name):
        assemble.build(config, topology).close()
    text = "last batch has 5 samples of 29: micro-batches of one, for which BatchNorm1d fails"
    assert any(text in record.getMessage() for record in caplog.records) == told


@pytest.mark.mpi
def test_without_memory_for_a_pass_it_is_said_what_to_do(topology, files):
    with pytest.raises(RankError, match="at step 0, micro-batch 0") as caught:
        run(config_of(files, "helpers.Hungry"), topology)
    assert "no memory is left: take more parallel.stages or parallel.micro_batches" in str(caught.value)


@pytest.mark.mpi
def test_nan_in_a_batch_names_file_dataset_and_row(world, topology, files):
    if world.rank == 0:
        with h5py.File(files.replace("*", "2"), "a") as file:
            file["x"][4, 0] = np.nan
    world.Barrier()
    config = config_of(files)
    with pytest.raises(DataError, match=r"part2.h5: x\[4\] \(sample 24\) holds NaN"):
        run(config, topology)


@pytest.mark.mpi
def test_a_loss_that_is_nan_names_step_micro_batch_and_samples(topology, files):
    config = config_of(files, steps=4)
    config.optimizer.init_args = {"lr": 1e30}
    with pytest.raises(
        DivergedError,
        match=r"the loss is (nan|inf) at step \d on rank \d, micro-batch \d, samples \d+, .*lower",
    ):
        run(config, topology)


@pytest.mark.mpi
def test_a_gradient_that_is_not_finite_is_named(topology, files):
    config = config_of(files)
    job = assemble.build(config, topology)
    job.averager.named["second.bias"].register_hook(lambda g: g * float("inf"))
    with pytest.raises(DivergedError, match="the gradient of second.bias is not finite at step 0"):
        job.engine.step(0, job.loader.read(0))
    job.close()


@pytest.mark.mpi
def test_a_batch_without_weight_is_an_error(world, topology, files):
    if world.rank == 0:
        for number in range(3):
            with h5py.File(files.replace("*", str(number)), "a") as file:
                file["weight"][:] = 0.0
    world.Barrier()
    config = config_of(files)
    config.data.weights = "weight"
    with pytest.raises(HpctrainError, match="step 0: all weights of the batch are 0"):
        run(config, topology)


@pytest.mark.mpi
def test_masked_targets_are_left_out_exactly(world, topology, files):
    """Independent answer: the mean over the values that are there, by numpy."""
    x, y = values()
    gone = np.random.default_rng(2).random(y.shape) < 0.3
    y[gone] = np.nan
    if world.rank == 0:
        for number, part in enumerate(np.array_split(np.arange(29), 3)):
            with h5py.File(files.replace("*", str(number)), "a") as file:
                file["y"][:] = y[part]
    world.Barrier()
    config = config_of(files, batch=29)
    config.data.missing = "mask"
    job = assemble.build(config, topology)
    with torch.no_grad():
        square = (job.engine.module(torch.from_numpy(x)).numpy() - y) ** 2
    result = job.engine.step(0, job.loader.read(0))
    assert result.loss == pytest.approx(np.nanmean(square), rel=1e-5)
    assert result.weight == pytest.approx((~gone).sum() / 2, rel=1e-6)
    job.close()


@pytest.mark.mpi
def test_sums_over_ranks_that_lack_a_name(world):
    mine = {"loss": [(1.0, 2.0)]}
    if world.rank:
        mine["other"] = [(1.0, 0.25), (2.0, 0.75)]
    found = sum_over(world, mine)
    assert found["loss"] == (world.size, 2.0 * world.size)
    assert found.get("other", (0.0, 0.0)) == (3.0 * (world.size - 1), world.size - 1.0)


@pytest.mark.mpi
def test_sums_over_batches_do_not_depend_on_who_had_them(world):
    """1e16 and -1e16 on the first and the last rank, small numbers between: any other order loses them."""
    pairs = [(1e16, 1.0), (1.0, 1.0), (0.25, 1.0), (-1e16, 1.0)]
    first, last = world.rank * 4 // world.size, (world.rank + 1) * 4 // world.size
    assert sum_over(world, {"loss": pairs[first:last]})["loss"] == (1.25, 4.0)
    assert math.isnan(sum_over(world, {"loss": [(math.inf, 1.0)]})["loss"][0])


def test_outputs_of_16_bits_become_float32_in_trees():
    half = torch.zeros(2, dtype=torch.bfloat16)
    found = to_float({"a": half, "b": [half, None]})
    assert found["a"].dtype == found["b"][0].dtype == torch.float32
    assert found["b"][1] is None


def test_few_samples_are_all_listed():
    assert listed(np.array([3, 4])) == "3, 4"
