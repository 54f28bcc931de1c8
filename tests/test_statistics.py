import h5py
import numpy as np
import pytest

from hpctrain.config import Data
from hpctrain.data import statistics
from hpctrain.data.index import build
from hpctrain.data.read import Reader
from hpctrain.errors import DataError


@pytest.mark.mpi
def test_mean_and_deviation_of_the_training_samples(world, files):
    index = build(Data(files=files, inputs=["x"], targets=["y"], test=0.3))
    reader = Reader(index)
    found = statistics.mean_and_deviation(world, reader, index, index.splits["train"], "x", False)
    values = reader.read_one("x", np.arange(20)).astype(np.float64)
    assert np.allclose(found, (values.mean(), values.std()), rtol=1e-12)


@pytest.mark.mpi
def test_the_same_bits_at_any_number_of_ranks(world, files):
    from mpi4py import MPI

    index = build(Data(files=files, inputs=["x"], targets=["y"]))
    reader, split = Reader(index), index.splits["train"]
    together = statistics.mean_and_deviation(world, reader, index, split, "x", False)
    alone = statistics.mean_and_deviation(MPI.COMM_SELF, reader, index, split, "x", False)
    assert together == alone


@pytest.mark.mpi
def test_missing_values(world, files):
    if world.rank == 0:
        with h5py.File(files.replace("*", "0"), "a") as file:
            file["x"][2] = np.nan
    world.Barrier()
    index = build(Data(files=files, inputs=["x"], targets=["y"]))
    reader, split = Reader(index), index.splits["train"]
    values = reader.read_one("x", np.arange(29)).astype(np.float64)
    found = statistics.mean_and_deviation(world, reader, index, split, "x", True)
    assert np.allclose(found, (np.nanmean(values), np.nanstd(values)), rtol=1e-12)
    with pytest.raises(DataError, match=r"x\[2\]") as caught:
        statistics.mean_and_deviation(world, reader, index, split, "x", False)
    assert caught.value.agreed, "one rank met it, all raise it"


@pytest.mark.mpi
def test_far_from_zero_and_constant(world):
    class Fixed:
        def __init__(self, values):
            self.values = values

        def read_one(self, name, samples):
            return self.values[samples]

        def check_finite(self, name, samples, values):
            assert np.isfinite(values).all()

    split = build_split(40)
    far = Fixed(1e6 + np.arange(40, dtype=np.float64))
    mean, deviation = statistics.mean_and_deviation(world, far, far, split, "x", True)
    assert (mean, deviation) == pytest.approx((1e6 + 19.5, np.arange(40).std()), rel=1e-12)
    _, deviation = statistics.mean_and_deviation(world, Fixed(np.full(40, 3.0)), far, split, "x", True)
    assert deviation == 1.0


def build_split(length):
    from hpctrain.data.splits import Split

    return Split(((0, length),))
