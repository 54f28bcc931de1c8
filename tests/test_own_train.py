"""A train() of the model's own: called as often as in one process; what it changes later is refused."""

import contextlib

import odd_models
import pytest
from jobs import build_alone, evaluate_alike, has_bits_of_one_process, run

from hpctrain.errors import ConfigError
from hpctrain.log import LOGGER


@pytest.mark.mpi
@pytest.mark.parametrize("way", ["always", "elsewhere", "hooks"])
def test_a_train_of_the_models_that_changes_its_forward_each_time_is_refused(world, build, monkeypatch, way):
    """It would be another forward each time, or in one mode."""
    if world.size != 2:
        pytest.skip("two stages")
    monkeypatch.setattr(odd_models.Progressive, "way", way)
    does = "sets hooks, or a forward" if way == "hooks" else "changes what its forward computes each"
    with pytest.raises(ConfigError, match=rf"a train\(\) of the model {does}"):
        build("Progressive", 2, module="odd_models", micro_batches=3)
    assert odd_models.SCALE == [1.0]


@pytest.mark.mpi
@pytest.mark.parametrize("late", [12, 100])
@pytest.mark.parametrize("way", ["never", "later", "freezes", "asks"])
def test_a_train_of_the_models_may_not_change_its_forward_later(world, build, monkeypatch, caplog, way, late):
    """From the thirteenth call on, or never in this run, which is looked at where it changes what is read."""
    if world.size != 2:
        pytest.skip("two stages")
    monkeypatch.setattr(odd_models.Progressive, "way", way)
    monkeypatch.setattr(odd_models.Progressive, "late", late)
    job = build("Progressive", 2, module="odd_models", micro_batches=3)
    with caplog.at_level("INFO", LOGGER.name):
        has_bits_of_one_process(world, job, "Progressive")
        job.engine.evaluate(job.split_batches("train"), job.task.measure)
        with contextlib.ExitStack() as stack:
            if late == 12 and way != "never":
                changed = {"later": "drop.p", "freezes": "drop.training", "asks": "calls"}[way]
                what = (
                    rf"train\(True\) of the model has changed {changed}, by which its forward computes some"
                )
                stack.enter_context(pytest.raises(ConfigError, match=what))
            run(job, 12)
    told = [
        m
        for m in caplog.messages
        if "train(True) of the model changes calls, which its forward reads: whether" in m
    ]
    assert len(told) == (way == "asks")


@pytest.mark.mpi
@pytest.mark.parametrize("model", ["thawing_row", "Annealed"])
@pytest.mark.parametrize("cuts", [[], ["last"]])
def test_a_train_of_the_users_is_called_as_often_as_in_one_process(world, build, model, cuts):
    """It counts, and freezes or thaws by that, or moves a buffer: by rows, operators and calls."""
    if world.size != 2:
        pytest.skip("two stages")
    if cuts and model == "thawing_row":
        cuts = ["2"]
    job = build(model, 2, micro_batches=4, cuts=cuts)
    has_bits_of_one_process(world, job, model)


@pytest.mark.mpi
def test_a_train_of_the_users_counts_evaluations_as_in_one_process(world, build):
    """One change of mode an evaluation, of however many batches."""
    if world.size != 2:
        pytest.skip("two stages")
    job = build("tiring_row", 2, micro_batches=4)
    alone = build_alone(job)
    for one in (job, alone):
        one.engine.evaluate(one.split_batches("train"), one.task.measure)
    assert run(job, 2) == run(alone, 2)
    evaluate_alike(job, alone)
    assert run(job, 1) == run(alone, 1)
    alone.close()
    alone.topology.close()


@pytest.mark.mpi
def test_a_train_that_sets_a_buffer_anew_is_refused_by_operators(world, build):
    if world.size != 2:
        pytest.skip("two stages")
    job = build("Annealed", 2, micro_batches=4, arguments={"replaces": True})
    with pytest.raises(ConfigError, match=r"train\(True\) of the model sets cools.heat anew"):
        job.engine.step(0, job.loader.read(0))
