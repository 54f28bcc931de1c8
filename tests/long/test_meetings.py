"""A million meetings of the ranks of a node: what was written before one is seen behind it, every time."""

import sys

import pytest

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]

WORK = """
import numpy, torch
from mpi4py import MPI
from hpctrain.node_memory import NodeMemory, Rendezvous
world, rounds = MPI.COMM_WORLD, int({rounds})
node = NodeMemory(world, 0, 64)
place = Rendezvous(world, node, {crowded})
parts = [node.tensor(r, 0, 8, torch.float64).numpy() for r in range(world.size)]
flat = numpy.arange(8.0)
for number in range(rounds):
    parts[world.rank][:] = number + flat * world.rank
    place.meet()
    for r, part in enumerate(parts):
        if part[7] != number + 7.0 * r or part[0] != number:
            raise SystemExit(f"round {{number}}: rank {{world.rank}} saw {{part}} of rank {{r}}")
    place.meet()
if world.rank == 0:
    print("rounds", rounds)
"""


@pytest.mark.parametrize(("ranks", "crowded", "rounds"), [(2, False, 1_000_000), (4, True, 1_000_000)])
def test_nothing_is_seen_too_late(launcher, ranks, crowded, rounds):
    """Two ranks spin on a core each; four on two cores give the core away, which is slower."""
    program = WORK.format(rounds=rounds, crowded=crowded)
    done = launcher.run("mpirun", "-n", str(ranks), sys.executable, "-c", program, limit=1800)
    assert done.status == 0, done.text
    assert f"rounds {rounds}" in done.out
