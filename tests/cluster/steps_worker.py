"""Take steps of an MLP; print a JSON line a way: bytes of the link a step, digests of the weights.

Arguments: STEPS, WAY,… ("trial" tries all), NODE_OF as digits ("" asks MPI), WIRE.
"""

import hashlib
import json
import sys

import torch
from mpi4py import MPI
from torch import nn

from hpctrain.averaging.averager import Averager
from hpctrain.averaging.overlap import Choice
from hpctrain.config import Averaging
from hpctrain.gradient import StraightIntoPlace

HEADERS = 66  # Ethernet 14, IPv4 20, TCP with time stamps 32: once a packet that the kernel counts
SEGMENT = 1500 - 20 - 32  # the most that TCP sends in one packet of the wire


def sent():
    """Bytes that this host has sent over its link, without headers and what TCP sent twice; 0 without a link.

    How many packets there are, and how many are lost and come again, is a matter of how busy the machine is.
    """
    with open("/proc/net/dev") as file:
        rows = [line.split(":", 1)[1].split() for line in file if line.strip().startswith("eth0:")]
    if not rows:
        return 0
    with open("/proc/net/snmp") as file:
        names, numbers = [line.split() for line in file if line.startswith("Tcp:")]
    again = int(numbers[names.index("RetransSegs")])
    return int(rows[0][8]) - HEADERS * int(rows[0][9]) - SEGMENT * again


AMONG = Choice.among


def take(steps, way, node_of, wire):
    world = MPI.COMM_WORLD
    torch.manual_seed(0)
    Choice.among = AMONG if way == "trial" else classmethod(lambda kind, comm: kind(comm, (way,)))
    module = nn.Sequential(
        nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 64)
    )
    size = 4 * sum(p.numel() for p in module.parameters())
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)
    nodes = [int(digit) for digit in node_of] or None
    averager = Averager(module, optimizer, world, Averaging(wire=wire), node_of=nodes)
    straight = StraightIntoPlace(module, averager.places)
    torch.manual_seed(world.rank)
    x = torch.randn(16, 256)
    before = 0
    for step in range(steps + 1):
        if step == 1:  # the first one measures the link
            world.Barrier()
            before = sent()
        averager.begin([world.rank])
        with straight.forward():
            loss = module(x).square().sum()
        with straight.accumulating():
            loss.backward()
        averager.joined(world.rank, float(loss.detach()), 16.0)
        averager.step(clip=1.0 if step % 2 else 0.0)
    world.Barrier()
    bits = b"".join(p.detach().numpy().tobytes() for p in module.parameters())
    digests = world.allgather(hashlib.sha256(bits).hexdigest())
    counted = world.allgather(sent() - before)
    if world.rank == 0:
        chosen = averager.overlap.choice.way if averager.overlap else ""
        row = {"size": size, "sent": [c / steps for c in counted], "digests": digests, "way": chosen}
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()
    averager.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for word in sys.argv[2].split(","):
        take(int(sys.argv[1]), word, *sys.argv[3:5])
