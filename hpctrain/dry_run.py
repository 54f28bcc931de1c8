"""Check everything that can be checked without training, and show what would run."""

import sys
from pathlib import Path

import numpy as np
import tomlkit
from mpi4py import MPI

from hpctrain import assemble, log
from hpctrain.assemble import Job
from hpctrain.config import Config, to_dict
from hpctrain.errors import DONE
from hpctrain.log import LOGGER, counted
from hpctrain.report.run_folder import RunFolder
from hpctrain.resume import Progress, check_resume, resume
from hpctrain.topology import Topology
from hpctrain.validate import Validator
from hpctrain.wire import together

FEW = 4
"""Micro-batches that are listed one by one."""


def run_model_once(job: Job) -> None:
    """Run model and loss on one small batch: shapes that don't fit are found. Collective.

    What the task would learn from the data is not there, so its numbers mean nothing.
    """
    world = job.topology.comms.world
    with together(world), np.errstate(all="ignore"):
        batch = job.task.batch(job.index.splits["train"].samples(np.arange(1)))
    with together(world):
        outputs = job.engine.outputs(batch)
    with together(world):
        if outputs is not None:
            job.engine.loss(outputs, batch)


def span(numbers: range) -> str:
    """Write numbers that follow one another.

    >>> span(range(2, 4)), span(range(64)), span(range(0))
    ('2, 3', '0 … 63', 'none')
    """
    if len(numbers) > FEW:
        return f"{numbers[0]} … {numbers[-1]}"
    return ", ".join(map(str, numbers)) or "none"


def dry_run(config: Config, comm: MPI.Intracomm) -> int:
    """Build all parts, print the layout and the resolved configuration. Collective; writes nothing."""
    with Topology.build(comm, config.parallel.stages, config.train.device, config.train.threads) as topology:
        log.start(topology)
        run = RunFolder(Path(config.train.run_folder), writes=False)
        config, stored = resume(config, run, topology)
        job = assemble.build(config, topology, learn=False)
        with together(topology.comms.world):
            check_resume(job, stored, run)
        Validator(job, run, Progress())
        run_model_once(job)
        lines = comm.gather(
            f"rank {topology.world_rank}: replica {topology.replica} stage {topology.stage} "
            f"node {topology.node} {topology.device} threads {topology.threads} "
            f"micro-batches {span(job.loader.micro_batches)}"
        )
        job.close()
        for line in lines or []:
            LOGGER.info(line)
        if topology.world_rank == 0:
            sys.stdout.write("\n" + tomlkit.dumps(to_dict(job.config)))
            sys.stdout.flush()
        left = max(0, job.total_steps - (stored.step if stored else 0))
        more = f" more, from step {stored.step} to {job.total_steps:,}," if stored else ""
        LOGGER.info("%s%s would be taken; nothing was trained or written", counted(left, "step"), more)
    return DONE
