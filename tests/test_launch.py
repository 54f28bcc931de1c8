import os

import pytest
import torch

from hpctrain import cuda_probe, launch
from hpctrain.errors import ConfigError

# What the environments really hold (a Slurm cluster with srun --mpi=none, pmi2 and pmix, and
# mpirun inside sbatch, was looked at); the real ones run in tests/cluster.
SRUN_NONE = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_PROCID": "2"}
SRUN_PMI2 = {**SRUN_NONE, "PMI_RANK": "2", "PMI_SIZE": "4", "PMI_FD": "5"}
SRUN_PMIX = {**SRUN_NONE, "PMIX_RANK": "2", "PMIX_NAMESPACE": "slurm.pmix.5.0"}
BATCH_SHELL = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
MPIRUN_IN_BATCH = {**BATCH_SHELL, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "PMIX_RANK": "1",
                   "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}  # fmt: skip


@pytest.mark.parametrize("environment", [SRUN_NONE, SRUN_PMI2, SRUN_PMIX])
def test_singletons_are_refused(environment):
    with pytest.raises(
        ConfigError, match=r"started 4 processes, but MPI sees each .* train 4 times .* `srun --mpi=pmix`"
    ):
        launch.check_world(1, environment)


def test_mpirun_of_another_mpi_is_refused():
    with pytest.raises(ConfigError, match="the mpirun of the MPI that mpi4py uses"):
        launch.check_world(1, {"PMI_SIZE": "3", "PMI_RANK": "0"})


@pytest.mark.parametrize("environment", [BATCH_SHELL, {}, {"OMPI_COMM_WORLD_SIZE": "1"}])
def test_one_process_that_was_meant_to_be_one(environment):
    launch.check_world(1, environment)


@pytest.mark.parametrize("environment", [SRUN_PMIX, MPIRUN_IN_BATCH])
def test_a_world_of_four_is_fine(environment):
    launch.check_world(4, environment)


def test_only_the_first_singleton_speaks():
    assert not launch.speaks(SRUN_NONE)
    assert launch.speaks({**SRUN_NONE, "SLURM_PROCID": "0"})
    assert launch.speaks({})
    assert not launch.speaks(MPIRUN_IN_BATCH)


def test_threads_the_user_set_stay(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    launch.set_threads(3)
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert os.environ["MKL_NUM_THREADS"] == "3"


def test_without_a_gpu_mpi_is_not_given_one(monkeypatch):
    """The child really runs: torch sees no GPU there, or it is killed by what it tries."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert not cuda_probe.ask()
    monkeypatch.setattr(cuda_probe, "has_gpu", lambda: True)
    assert not cuda_probe.ask()
    monkeypatch.setattr(cuda_probe, "LIMIT_SECONDS", 0.01)
    assert not cuda_probe.ask()
