"""The climate recipe on the real data: baselines as published, ridge by another route, same bits."""

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from mpi4py import MPI

import hpctrain
from hpctrain import assemble, parse
from hpctrain.errors import ConfigError, DataError
from hpctrain.piece import tensors_of
from hpctrain.recipes import climate, ridge
from hpctrain.topology import Topology
from hpctrain.verify import compare

RECIPE = Path(hpctrain.__file__).parent / "recipes" / "climate.toml"


@pytest.fixture
def job(topology):
    built = assemble.build(parse.from_toml(RECIPE), topology)
    yield built
    built.close()


@pytest.mark.mpi
def test_baselines_are_the_published_ones(job):
    """The numbers of the data's README, which others measured on the unpacked field."""
    expected = {"climatology": 1.695, "nearest": 0.983, "bilinear": 0.943, "bicubic": 0.889, "ridge": 0.725}
    from hpctrain.engine import sum_over

    found = job.task.baselines(lambda: job.split_batches("test"))
    for name, value in expected.items():
        mine = {metric: [pair] for metric, pair in found.get(name, {}).items()}
        sums = sum_over(job.topology.comms.data, mine)
        assert job.task.finish("rmse_kelvin", *sums["rmse_kelvin"]) == pytest.approx(value, abs=0.0006)


@pytest.mark.mpi
def test_the_unet_in_stages_equals_the_unsplit_one(world):
    """Skips over all stages, on the real data: `verify`, then losses, norms and weights bit for bit."""
    if world.size == 1:
        pytest.skip("as many stages as ranks, two at least")
    config = parse.from_toml(RECIPE)
    parallel = replace(config.parallel, stages=world.size, micro_batches=4, schedule="zb-h1")
    config = replace(config, parallel=parallel, train=replace(config.train, batch=8))
    found = []
    for stages, comm in ((world.size, world), (1, MPI.COMM_SELF)):
        layout = replace(config, parallel=replace(config.parallel, stages=stages))
        with Topology.build(comm, stages, threads=1) as topology:
            job = assemble.build(layout, topology)
            if comm is world:
                assert compare(job, 1) is None
            else:
                job.engine.step(0, job.loader.read(0))
            losses, position = [], 0
            for number in range(3):
                step = job.loader.read(position)
                result = job.engine.step(number, step, 0.05)
                losses.append((result.loss, result.norm))
                position = step.next_position
            found.append((losses, {n: v.clone() for n, v in tensors_of(job.engine.module).items()}))
            job.close()
    (losses, mine), (expected, whole) = found
    assert losses == expected
    assert [name for name, value in mine.items() if not torch.equal(value, whole[name])] == []


@pytest.mark.mpi
def test_what_is_learnt_has_the_same_bits_on_any_number_of_ranks(job):
    alone = assemble.build(parse.from_toml(RECIPE), Topology.build(MPI.COMM_SELF))
    for mine, other in zip(job.task.pieces(), alone.task.pieces()):
        assert torch.equal(mine.tensor, other.tensor), mine.name
    alone.close()


@pytest.mark.mpi
def test_nothing_is_learnt_from_the_test_years(world, shared_tmp, topology, job):
    """Change the test years beyond recognition: what is learnt must stay."""
    path = shared_tmp / "changed.h5"
    if world.rank == 0:
        path.write_bytes(RECIPE.with_name("climate.h5").read_bytes())
        with h5py.File(path, "a") as file:
            file["tas"][600:] = 77
    world.Barrier()
    config = parse.from_toml(RECIPE)
    config = replace(config, data=replace(config.data, files=str(path)))
    other = assemble.build(config, topology)
    for mine, changed in zip(job.task.pieces(), other.task.pieces()):
        assert torch.equal(mine.tensor, changed.tensor)
    other.close()


@pytest.mark.mpi
def test_the_model_sees_the_box_means_alone(job):
    """Shuffle the fine values inside every box: inputs stay, only the target changes."""
    task = job.task
    samples = np.arange(700, 703)
    before = task.batch(samples)
    read = task._read

    def shuffled(wanted):
        anomaly = read(wanted) - task.climatology[task.month[wanted]]
        boxes = ridge.to_boxes(anomaly, 8)[..., ::-1]
        return ridge.from_boxes(boxes, 8) + task.climatology[task.month[wanted]]

    task._read = shuffled
    after = task.batch(samples)
    for name in before.inputs:
        torch.testing.assert_close(before.inputs[name], after.inputs[name], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before.targets["anomaly"], after.targets["anomaly"], atol=0.1)


@pytest.mark.mpi
def test_training_samples_get_the_fit_that_left_them_out(job):
    train = job.index.splits["train"].samples(np.arange(600))
    assert np.array_equal(job.task.fold[train], np.repeat(np.arange(10), 60))
    assert set(job.task.fold[600:]) == {ridge.FOLDS}


def test_ridge_against_least_squares_box_by_box():
    """Independent answer: numpy's lstsq with the penalty as extra rows, for one fine box."""
    random = np.random.default_rng(0)
    fine = random.normal(size=(40, 16, 24))
    coarse = ridge.box_means(fine, 8)
    fits = ridge.solve(ridge.sums(coarse, fine, 8))
    inputs = ridge.neighbours(coarse)
    row, column, inner = 1, 2, 13
    x = np.concatenate([inputs[:, row, column], np.sqrt(ridge.PENALTY) * np.eye(25)])
    y = np.concatenate([ridge.to_boxes(fine, 8)[:, row, column, inner], np.zeros(25)])
    expected = np.linalg.lstsq(x, y, rcond=None)[0]
    assert np.allclose(fits[row, column, :, inner], expected, atol=1e-9)


def test_neighbours_wrap_in_longitude_and_end_at_the_poles():
    coarse = np.arange(12.0).reshape(1, 3, 4)
    found = ridge.neighbours(coarse)[0, 0, 0].reshape(5, 5)
    assert found[2].tolist() == [2, 3, 0, 1, 2]
    assert found[0].tolist() == found[1].tolist() == found[2].tolist()
    assert found[3].tolist() == [6, 7, 4, 5, 6]


def test_boxes_there_and_back():
    fields = np.random.default_rng(0).normal(size=(2, 16, 24))
    assert np.array_equal(ridge.from_boxes(ridge.to_boxes(fields, 8), 8), fields)
    assert np.allclose(ridge.to_boxes(fields, 8).mean(axis=-1), ridge.box_means(fields, 8))


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_interpolation_goes_round_the_globe(mode):
    coarse = np.random.default_rng(0).normal(size=(1, 3, 4))
    fine = climate.refine(coarse, 8, mode)
    turned = climate.refine(np.roll(coarse, 1, axis=2), 8, mode)
    assert fine.shape == (1, 24, 32)
    assert np.allclose(np.roll(fine, 8, axis=2), turned)


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coordinate": "", "train": [], "test": 0.2}, "data.coordinate must name the time axis"),
        ({"train": ["1950-01", "1950-11"]}, r"data.train has no sample of month \[12\]"),
        ({"inputs": "lat", "targets": "lat"}, "the datasets have 72 samples"),
    ],
)
def test_data_that_do_not_fit(topology, change, message):
    config = parse.from_toml(RECIPE)
    config = replace(config, data=replace(config.data, **change))
    with pytest.raises((ConfigError, DataError), match=message):
        assemble.build(config, topology)


def test_a_grid_that_boxes_do_not_divide(tmp_path):
    config = parse.from_toml(RECIPE, ["--data.task.init_args.box", "7"])
    with pytest.raises(ConfigError, match="box = 7 must divide both sides"):
        assemble.build(config, Topology.build(MPI.COMM_SELF))


def test_months_of_a_calendar():
    found = climate.months(np.array([15.0, 45.0]), {"units": "days since 2001-01-01", "calendar": "360_day"})
    assert found.tolist() == [0, 1]
    with pytest.raises(ConfigError, match="must be a CF time axis, found units 'm'"):
        climate.months(np.zeros(1), {"units": "m"})


def test_the_data_keep_licence_and_attribution():
    with h5py.File(RECIPE.with_name("climate.h5")) as file:
        assert "Creative Commons Attribution-ShareAlike 4.0" in file.attrs["license"]
        assert "10.22033/ESGF/CMIP6.6113" in file.attrs["references"]
        for name in ("institution", "source", "history", "tracking_id", "further_info_url"):
            assert file.attrs[name]
        assert file["tas"].shape == (780, 72, 96)
        assert file["tas"].dtype == np.int16
        assert file["tas"].chunks
    assert RECIPE.with_name("climate.h5").stat().st_size <= 8_000_000


@pytest.mark.mpi
def test_maps_are_one_month_in_kelvin(job):
    found = job.task.maps(job.engine.outputs)
    assert [panel.title for panel in found.panels] == [
        "input: 8 × 8 box means",
        "bicubic",
        "hpctrain",
        "truth",
    ]
    assert found.title == "anomaly of tas, 2000-01"
    assert found.units == "K"
    assert all(panel.values.shape == (72, 96) for panel in found.panels)
