"""Models from PyPI in as many stages as ranks: outputs, loss, every gradient and buffer as in one process."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import config_of, write_h5

from hpctrain import assemble
from hpctrain.models import deferred
from hpctrain.piece import tensors_of
from hpctrain.topology import Topology
from hpctrain.verify import compare

sys.path.insert(0, str(Path(__file__).parent))
import third_party

FIRST = ["resnet", "gpt2", "t5"]
MODELS = [pytest.param(name, marks=[] if name in FIRST else pytest.mark.long) for name in third_party.DATA]
TIED = ("gpt2", "t5")


@pytest.fixture
def config_for(shared_tmp, world):
    """Data and configuration of a model."""

    def make(name):
        x, y = third_party.tensors(name)
        if world.rank == 0:
            write_h5(shared_tmp / "samples.h5", x=x, y=y)
        world.Barrier()
        config = config_of(str(shared_tmp / "samples.h5"), f"third_party.{name}", batch=6, clip=1.0)
        config.train.loss.class_path = third_party.DATA[name][2]
        config.optimizer.class_path, config.optimizer.init_args = "torch.optim.SGD", {"lr": 0.02}
        config.parallel.micro_batches = 3
        config.parallel.stages, config.train.threads = world.size, 1  # bits depend on the threads
        return config

    return make


@pytest.mark.mpi
@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_others_in_stages_equals_one_process(world, config_for, name, monkeypatch, caplog):
    """Nearly all weights are made stage by stage: the constructors run without memory."""
    monkeypatch.setattr(deferred, "SMALL", 64)
    config = config_for(name)
    with Topology.build(world, config.parallel.stages, threads=1) as topology:
        job = assemble.build(config, topology)
        assert "without memory" not in caplog.text
        outputs = job.engine.outputs(batch_of(job), everywhere=True)
        losses = [job.engine.step(number, job.loader.read(0), 1.0).loss for number in range(3)]
        mine = tensors_of(job.engine.module)
        expected_outputs, expected_losses, state = in_one_process(config)
        assert torch.equal(outputs, expected_outputs)
        owned = {key for share in world.allgather(sorted(mine)) for key in share}
        assert owned <= set(state)
        if name in TIED:  # the shared weight's gradient is added in another order
            assert losses == pytest.approx(expected_losses, rel=1e-5)
        else:
            assert losses == expected_losses
            assert [key for key in mine if not torch.equal(mine[key], state[key])] == []
            assert owned == set(state)
        assert compare(job, 2) is None
        job.close()


def batch_of(job):
    """Five samples: another number than a micro-batch has in training."""
    return job.task.batch(job.index.splits["train"].samples(torch.arange(5).numpy()))


def in_one_process(config):
    """Outputs before training, losses and weights of one rank that has the whole model."""
    from mpi4py import MPI

    config = replace(config, parallel=replace(config.parallel, stages=1))
    with Topology.build(MPI.COMM_SELF, threads=1) as topology:
        job = assemble.build(config, topology)
        outputs = job.engine.outputs(batch_of(job))
        losses = [job.engine.step(number, job.loader.read(0), 1.0).loss for number in range(3)]
        state = {key: value.clone() for key, value in tensors_of(job.engine.module).items()}
        job.close()
    return outputs, losses, state
