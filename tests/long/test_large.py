"""More than 2^31 numbers in one parameter: no count, offset or message is cut to 32 bits."""

import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

ROWS, WIDTH = 2**20 + 3, 2048
NEEDED = 3 * ROWS * WIDTH * 2
"""Bytes: the weights once and two ranks' gradients, bfloat16."""

WORK = """
import torch
from mpi4py import MPI
from torch import nn
from hpctrain.averaging.averager import Averager
from hpctrain.gradient import StraightIntoPlace
world = MPI.COMM_WORLD
module = nn.Embedding({rows}, {width}, _weight=torch.zeros({rows}, {width}, dtype=torch.bfloat16))
assert module.weight.numel() > 2**31
averager = Averager(module, torch.optim.SGD(module.parameters(), lr=1.0), world, shelf_bytes=2**40)
straight = StraightIntoPlace(module, averager.places)
# the first and the last row, one at the middle, and the one where number 2^31 lies
rows = [0, {rows} // 2, 2**31 // {width}, {rows} - 1]
averager.begin([world.rank])
with straight.forward():
    total = (module(torch.tensor(rows)).float() * (1.0 + world.rank)).sum()
with straight.accumulating():
    total.backward()
averager.joined(world.rank, 1.0, 1.0)
norm = averager.step().norm
expected = -(1.0 + 2.0) / 2.0
weight = module.weight.detach()
for row in rows:
    assert (weight[row] == expected).all(), (row, weight[row])
seen = 0
for at in range(0, len(weight), 4096):  # piece by piece: a whole copy would not fit
    seen += int(weight[at : at + 4096].count_nonzero())
assert seen == len(rows) * {width}, seen
assert abs(norm - 1.5 * (len(rows) * {width}) ** 0.5) < 1e-3, norm
if world.rank == 0:
    print("numbers", weight.numel())
"""


def memory_left() -> int:
    """Bytes that may still be taken on this machine."""
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    return 1024 * int(next(line for line in text.splitlines() if line.startswith("MemAvailable")).split()[1])


def test_more_numbers_than_32_bits_count(launcher):
    if memory_left() < 1.4 * NEEDED:
        pytest.skip(f"needs {1.4 * NEEDED / 2**30:.0f} GiB of memory, {memory_left() / 2**30:.0f} are left")
    program = WORK.format(rows=ROWS, width=WIDTH)
    done = launcher.run("mpirun", "-n", "2", sys.executable, "-c", program, limit=900)
    assert done.status == 0, done.text
    assert f"numbers {ROWS * WIDTH}" in done.out
