"""`hpctrain bench allreduce`: the sum of gradients against Gloo, Open MPI and the memory itself."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from mpi4py import MPI

from hpctrain.averaging.medium import BLOCK, Medium, Wire
from hpctrain.averaging.node import Node
from hpctrain.averaging.space import Space, cut
from hpctrain.bench.measure import alternate, each, row
from hpctrain.topology import Topology

CONTENDERS = {
    "ours": "each rank sums its part straight from the memory that a node shares, for all to read",
    "openmpi": "the faster of Allreduce in and out of place",
    "gloo": "torch.distributed.all_reduce",
    "limit": "each rank reads n buffers of its part and writes into one of them, without waiting",
}
SIZES = [1 << bits for bits in (12, 14, 16, 18, 20, 22, 24, 26, 28)]
"""Bytes of float32, from 4 KiB to 256 MiB."""


def bench(
    topology: Topology, sizes: list[int] | None = None, rounds: int | None = None
) -> list[dict[str, Any]]:
    """Measure every size. Collective."""
    return each(topology, sizes or SIZES, one_size, rounds)


def one_size(topology: Topology, size: int, rounds: int | None) -> dict[str, Any]:
    """Measure one size; every contender's result is checked first."""
    comm = topology.comms.world
    count = size // 4
    space = Space(torch.float32, torch.device("cpu"), [], [(0, count)], count)
    medium: Medium = (
        Node(comm, [space], 1, topology.crowded, shared_weights=False)
        if comm.size > 1
        else Wire(comm, [space])
    )
    source = torch.full((count,), float(comm.rank + 1))
    gloo, place, out = (source.clone() for _ in range(3))
    own = medium.slots[0][0]
    small = np.zeros(1)

    def store(number: int, start: int, stop: int, total: torch.Tensor) -> None:
        if total.data_ptr() != own.data_ptr() + 4 * start:
            own[start:stop].copy_(total)

    def ours() -> None:
        medium.begin()
        medium.exchange(small)
        medium.sum(store, stored=True)
        medium.finish(weights=False)

    expected = sum(range(1, comm.size + 1))
    own.fill_(comm.rank + 1)
    ours()
    start, stop = medium.owned((0, count))
    assert bool((own[start:stop] == expected).all())
    buffers = [torch.zeros(-(-count // comm.size)) for _ in range(max(2, comm.size))]

    def limit() -> None:
        for a, b in cut(0, len(buffers[0]), BLOCK):
            total = buffers[0][a:b]
            for buffer in buffers[1:]:
                total.add_(buffer[a:b])

    contenders = {
        "ours": ours,
        "openmpi_out": lambda: comm.Allreduce(source.numpy(), out.numpy(), op=MPI.SUM),
        "openmpi_in": lambda: comm.Allreduce(MPI.IN_PLACE, place.numpy(), op=MPI.SUM),
        "gloo": lambda: dist.all_reduce(gloo),
        "limit": limit,
    }
    rounds = rounds or (41 if size <= 1 << 24 else 15)
    times = alternate(comm, contenders, rounds, repeats=max(1, min(50, (1 << 22) // size)))
    assert bool((out == expected).all())
    medium.close()
    faster = min(("openmpi_in", "openmpi_out"), key=lambda name: float(np.median(times[name])))
    times["openmpi"] = times[faster]
    del times["openmpi_in"], times["openmpi_out"]
    return row(f"{size} bytes", comm.size, size, times)
