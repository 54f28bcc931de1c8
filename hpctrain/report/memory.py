"""What a node's memory holds, after the second step: then all of it is there."""

from mpi4py import MPI

from hpctrain.assemble import Job
from hpctrain.log import LOGGER
from hpctrain.room import mebibytes


def say(job: Job) -> None:
    """Log weights, gradients, optimizer and activations of the node with the most. Collective."""
    node, world = job.topology.comms.node, job.topology.comms.world
    mine = {**job.averager.memory(), **job.engine.memory()}
    names = list(mine)
    sums = [node.allreduce(mine[name]) for name in names]
    _, most = world.allreduce((sum(sums), sums), op=MPI.MAX)
    found = ", ".join(f"{name} {mebibytes(count)} MiB" for name, count in zip(names, most))
    LOGGER.info("memory of a node: %s (activations by resident pages in the first step)", found)
