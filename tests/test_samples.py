"""The default task: what the model gets of the samples."""

import h5py
import numpy as np
import pytest
import torch
from helpers import config_of, write_h5
from jobs import run
from mpi4py import MPI

from hpctrain import assemble
from hpctrain.config import ClassPath, Data
from hpctrain.errors import ConfigError, DataError
from hpctrain.log import LOGGER
from hpctrain.topology import Topology


def job_of(path, model="helpers.Net", loss="torch.nn.MSELoss", **data):
    config = config_of(str(path), model)
    config.train.loss = ClassPath(loss)
    config.data = Data(files=str(path), **{"inputs": ["x"], "targets": ["y"], **data})
    return assemble.build(config, Topology.build(MPI.COMM_SELF))


@pytest.fixture
def path(tmp_path):
    random = np.random.default_rng(0)
    write_h5(
        tmp_path / "a.h5",
        x=random.normal(5.0, 2.0, size=(10, 4)),
        y=random.normal(-3.0, 0.5, size=(10, 2)),
        image=random.integers(0, 255, size=(10, 4)).astype(np.uint8),
        token=random.integers(0, 9, size=(10, 4)).astype(np.int32),
        label=(np.arange(10) % 3).astype(np.uint8),
        column=(np.arange(10) % 3).astype(np.uint8)[:, None],
        weight=np.arange(10.0),
        truth=np.arange(10) % 3 == 0,
    )
    return tmp_path / "a.h5"


def test_floats_images_and_integers(path):
    batch = job_of(path, inputs=["x"]).task.batch(np.arange(3))
    assert batch.inputs["x"].dtype == torch.float32
    task = job_of(path, inputs={"x": "image"}).task
    assert task.batch(np.arange(3)).inputs["x"].dtype == torch.float32
    assert float(task.batch(np.arange(3)).inputs["x"].max()) > 1.0
    task = job_of(path, inputs={"x": "x", "token": "token"}, model="test_samples.Two").task
    assert task.batch(np.arange(3)).inputs["token"].dtype == torch.int64
    label = job_of(path, targets=["label"], model="helpers.Net").task
    assert label.batch(np.arange(3)).targets["label"].dtype == torch.int64
    assert label.metrics == ("accuracy",)


class Two(torch.nn.Module):
    def __init__(self, out_features: int):
        super().__init__()
        self.table = torch.nn.Embedding(9, out_features)

    def forward(self, token, x):
        return self.table(token).sum(dim=1) + x.sum(dim=1, keepdim=True)


def test_several_inputs_go_by_name(path):
    job = job_of(path, inputs={"x": "x", "token": "token"}, model="test_samples.Two")
    batch = job.task.batch(np.arange(3))
    expected = job.engine.module.table(batch.inputs["token"]).sum(dim=1) + batch.inputs["x"].sum(
        dim=1, keepdim=True
    )
    torch.testing.assert_close(job.engine.outputs(batch), expected.detach())


def test_normalisation_uses_training_samples_only(path):
    job = job_of(path, normalize=True, test=0.4)
    x = h5py.File(path)["x"][:]
    mean, deviation = x[:6].mean(), x[:6].std()
    found = job.task.batch(np.arange(10)).inputs["x"].numpy()
    assert np.allclose(found, (x - mean) / deviation, atol=1e-5)
    assert abs(found[:6].mean()) < 1e-6
    assert [p.name for p in job.task.pieces()] == ["task.normal.x", "task.normal.y"]


def test_rmse_is_in_the_targets_own_units(path):
    job = job_of(path, normalize=True)
    batch = job.task.batch(np.arange(10))
    numerator, denominator = job.task.measure(torch.zeros(10, 2), batch)["rmse"]
    y = h5py.File(path)["y"][:]
    assert job.task.finish("rmse", numerator, denominator) == pytest.approx(y.std(), rel=1e-5)


@pytest.mark.parametrize("target", ["label", "column"])
def test_accuracy_counts_weights(path, target):
    """Labels of shape (n, 1) would broadcast to n x n comparisons."""
    job = job_of(path, targets=[target], weights="weight")
    batch = job.task.batch(np.arange(10))
    outputs = torch.nn.functional.one_hot(torch.zeros(10, dtype=torch.int64), 3).float()
    right = (np.arange(10) % 3 == 0) * np.arange(10.0)
    numerator, denominator = job.task.measure(outputs, batch)["accuracy"]
    assert job.task.finish("accuracy", numerator, denominator) == pytest.approx(right.sum() / 45)
    assert job.task.predict(outputs, batch)[target].shape == batch.targets[target].shape


def test_what_the_loss_ignores_is_no_wrong_answer(path):
    job = job_of(path, targets=["label"])
    job.engine.loss.loss = torch.nn.CrossEntropyLoss(reduction="none", ignore_index=1)
    batch = job.task.batch(np.arange(10))
    outputs = torch.nn.functional.one_hot(batch.targets["label"].clamp(max=2), 3).float()
    job.engine.each = lambda batches, use: [use(batch, outputs) for batch in batches]
    outputs[0] = torch.tensor([0.0, 1.0, 0.0])
    found = job.engine.evaluate(iter([batch]), job.task.measure)
    assert found["accuracy"] == (6.0, 7.0)  # of ten, three are of class 1, and one is wrong


class ClassesLast(torch.nn.Module):
    def __init__(self, in_features: int):
        super().__init__()
        self.layer = torch.nn.Linear(in_features, 4 * 9)

    def forward(self, x):
        return self.layer(x).view(-1, 4, 9)


class OfClassesLast(torch.nn.Module):
    def forward(self, output, target):
        return torch.nn.functional.cross_entropy(output.movedim(-1, 1), target, reduction="none")


def test_metrics_that_would_fail_an_epoch_later_are_told_in_the_first_step(path, caplog):
    """An own loss takes the classes where they are, accuracy does not."""
    words = {"model": "test_samples.ClassesLast", "loss": "test_samples.OfClassesLast"}
    job = job_of(path, **words, targets=["token"], test=0.3)
    job.engine.metrics = job.task.measure  # as train has it
    with caplog.at_level("WARNING", LOGGER.name):
        run(job, 3)
    told = "metrics can't be computed (ConfigError: the target token holds integers"
    assert sum(told in message for message in caplog.messages) == 1
    with pytest.raises(ConfigError, match=r"the classes second: the model gives \(\d, 4, 9\)"):
        job.engine.evaluate(job.split_batches("test"), job.task.measure)
    job.close()


def test_truths_are_classes(path):
    job = job_of(path, targets=["truth"])
    target = job.task.batch(np.arange(4)).targets["truth"]
    assert target.dtype == torch.int64
    assert target.tolist() == [1, 0, 0, 1]
    assert job.task.metrics == ("accuracy",)


@pytest.mark.parametrize("shape", [(10,), (10, 1), (10, 3, 2)])
def test_integers_that_are_no_classes_are_refused(path, shape):
    """argmax of one column is 0, whatever the model gives."""
    job = job_of(path, targets=["label"])
    batch = job.task.batch(np.arange(10))
    for use in (job.task.measure, job.task.predict):
        with pytest.raises(ConfigError, match="if label is no class, store it as floats"):
            use(torch.zeros(shape), batch)


def test_weights_that_can_not_be(path):
    with h5py.File(path, "a") as file:
        file["weight"][3] = -1
    job = job_of(path, weights="weight")
    with pytest.raises(DataError, match="one number >= 0 a sample was expected"):
        job.task.batch(np.arange(10))
    job = job_of(path, weights="x")
    with pytest.raises(DataError, match=r"found shape \(4,\) a sample"):
        job.task.batch(np.arange(10))


def test_missing_targets_are_masked_and_missing_inputs_refused(path):
    with h5py.File(path, "a") as file:
        file["y"][2, 1] = np.nan
        file["x"][7, 0] = np.nan
    job = job_of(path, missing="mask")
    batch = job.task.batch(np.arange(5))
    assert batch.weights["y"].sum() == 9
    assert batch.targets["y"][2, 1] == 0
    with pytest.raises(DataError, match=r"x\[7\] \(sample 7\) holds NaN"):
        job.task.batch(np.arange(10))
    with pytest.raises(DataError, match=r"y\[2\] \(sample 2\) holds NaN"):
        job_of(path).task.batch(np.arange(5))


def test_a_users_own_task(path):
    job = assemble.build(
        _with_task(path, "test_samples.Doubled", {"factor": 3.0}), Topology.build(MPI.COMM_SELF)
    )
    plain = job_of(path).task.batch(np.arange(4)).inputs["x"]
    torch.testing.assert_close(job.task.batch(np.arange(4)).inputs["x"], 3 * plain)


def _with_task(path, name, arguments):
    config = config_of(str(path))
    config.data = Data(files=str(path), inputs=["x"], targets=["y"], task=ClassPath(name, arguments))
    return config


def __getattr__(name):
    """Made when asked for, so that importing this module does not import the task."""
    if name != "Doubled":
        raise AttributeError(name)
    from hpctrain.recipes.samples import Samples

    class Doubled(Samples):
        def __init__(self, factor: float = 2.0):
            self.factor = factor

        def batch(self, samples):
            batch = super().batch(samples)
            batch.inputs["x"] = batch.inputs["x"] * self.factor
            return batch

    globals()["Doubled"] = Doubled
    return Doubled
