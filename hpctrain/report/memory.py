"""What a node's memory holds, after the second step: then all of it is there."""

from mpi4py import MPI

from hpctrain.assemble import Job
from hpctrain.log import LOGGER


def say(job: Job) -> None:
    """Log weights, gradients, optimizer and activations of the node with the most. Collective."""
    node, world = job.topology.comms.node, job.topology.comms.world
    mine = {**job.averager.memory(), **job.engine.memory()}
    names = list(mine)
    sums = [node.allreduce(mine[name]) for name in names]
    _, most = world.allreduce((sum(sums), sums), op=MPI.MAX)
    found = ", ".join(f"{name} {size(count)}" for name, count in zip(names, most))
    LOGGER.info("memory of a node: %s (activations by resident pages in the first step)", found)


def size(count: float) -> str:
    """Write bytes.

    >>> size(5_000_000), size(20_000)
    ('4.8 MiB', '0.0 MiB')
    """
    return f"{count / 2**20:.1f} MiB"
