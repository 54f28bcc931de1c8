"""Jobs of several stages, and the one process that has their bits."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from helpers import config_of
from mpi4py import MPI

from hpctrain import assemble
from hpctrain.config import Optimizer
from hpctrain.piece import tensors_of
from hpctrain.topology import Topology

TIED = ("Tied", "tied_row", "OwnLoss", "LargeTied", "LargeTiedGraph")
MOST = {"Named": 3}
"""Layers in a row can't be cut into more stages; operators can be cut anywhere."""


def layouts(size, model=""):
    return [s for s in range(2, min(size, MOST.get(model, size)) + 1) if size % s == 0]


@contextmanager
def jobs(world, files):
    """Gives what builds jobs of several stages; takes them down."""
    made = []

    def job_of(model, stages, **settings):
        config = config_of(
            files, f"{settings.pop('module', 'stage_models')}.{model}", batch=settings.pop("batch", 8)
        )
        config.model.init_args = settings.pop("arguments", {})
        config.train.clip = settings.pop("clip", 0.0)
        config.data.targets = settings.pop("targets", config.data.targets)
        if model in TIED:  # Adam would follow the noise of gradients that are truly zero
            config.optimizer = Optimizer("torch.optim.SGD", {"lr": 0.05})
        config.optimizer = settings.pop("optimizer", config.optimizer)
        config.optimizer.sharded = settings.pop("sharded", config.optimizer.sharded)
        config.averaging.invariant = settings.pop("invariant", False)
        config.data.inputs = settings.pop("inputs", config.data.inputs)
        config.train.autocast = settings.pop("autocast", "none")
        config.train.loss = settings.pop("loss", config.train.loss)
        config.parallel.stages = stages
        for name, value in {"schedule": "1f1b", **settings}.items():
            setattr(config.parallel, name, value)
        topology = Topology.build(world, stages)
        made.append(topology)
        job = assemble.build(config, topology)
        made.append(job)
        return job

    try:
        yield job_of
    finally:
        for thing in reversed(made):
            thing.close()


def alone_like(job, steps, clip=0.0):
    """Losses and weights of one process with the same micro-batches; every rank does it by itself."""

    config = replace(job.config, parallel=replace(job.config.parallel, stages=1))
    with Topology.build(MPI.COMM_SELF, threads=job.topology.threads) as topology:  # kernels cut sums by them
        alone = assemble.build(config, topology)
        losses = run(alone, steps, clip)
        state = {n: v.clone() for n, v in tensors_of(alone.engine.module).items()}
        alone.close()
    return losses, state


def run(job, steps, clip=0.0):
    """Take steps, every other one of them clipped: both ways to new weights."""
    losses, position = [], 0
    for number in range(steps):
        step = job.loader.read(position)
        result = job.engine.step(number, step, clip if number % 2 else 0.0)
        losses.append((result.loss, result.weight, result.norm))
        position = step.next_position
    return losses


def has_bits_of_one_process(world, job, model):
    losses = run(job, 4, clip=0.05)
    expected, state = alone_like(job, 4, clip=0.05)
    mine = tensors_of(job.engine.module)
    owned = [name for share in world.allgather(sorted(mine)) for name in share]
    assert len(owned) == len(set(owned))
    if model in TIED:
        for name, value in mine.items():  # some roundings of numbers around 1
            torch.testing.assert_close(value, state[name], rtol=1e-5, atol=1e-6)
        for found, wanted in zip(losses, expected, strict=True):  # the norm is of gradients that cancel
            assert found == pytest.approx(wanted, rel=1e-4)
        return
    assert set(owned) == set(state)
    assert losses == expected
    for name, value in mine.items():
        assert torch.equal(value, state[name]), name


def build_alone(job):

    config = replace(job.config, parallel=replace(job.config.parallel, stages=1))
    return assemble.build(config, Topology.build(MPI.COMM_SELF, threads=job.topology.threads))


def evaluate_alike(job, alone):
    """Both measure the training samples with the same bits."""
    sums = [one.engine.evaluate(one.split_batches("train"), one.task.measure) for one in (job, alone)]
    assert sums[0] == sums[1]


def evaluates_as_one_process(job):
    """Behind the four steps of `has_bits_of_one_process`."""
    alone = build_alone(job)
    run(alone, 4, clip=0.05)
    evaluate_alike(job, alone)
    alone.close()
    alone.topology.close()


def take_weights(job, alone):
    """One step of the stages, and their new weights into the model of one process."""
    job.engine.step(0, job.loader.read(0))
    for share in job.topology.comms.pipe.allgather(dict(job.engine.module.state_dict())):
        alone.engine.module.load_state_dict(share, strict=False)
