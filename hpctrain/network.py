"""What a message between nodes costs, measured."""

import time

import numpy as np
from mpi4py import MPI

SMALL, LARGE = 8, 1 << 20
"""Bytes."""
PINGS, SENDS = 10, 3


def measure(comm: MPI.Intracomm, lane: MPI.Intracomm) -> tuple[float, float]:
    """Give latency (s) and bandwidth of a lane (bytes/s), the worst over all. Collective over `comm`.

    A lane's ranks send to the next one each, all lanes at once, as they do in training; a rank without one
    has MPI.COMM_NULL.
    """
    times = [0.0, 0.0]
    if lane != MPI.COMM_NULL and lane.size > 1:
        above, below = (lane.rank + 1) % lane.size, (lane.rank - 1) % lane.size
        for at, (size, repeats) in enumerate(((SMALL, PINGS), (LARGE, SENDS))):
            sent, got = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
            found = []
            for _ in range(repeats):
                began = time.perf_counter()
                lane.Sendrecv(sent, above, 0, got, below, 0)
                found.append(time.perf_counter() - began)
            times[at] = sorted(found)[repeats // 2]
    latency, large = (comm.allreduce(seconds, op=MPI.MAX) for seconds in times)
    return latency, LARGE / max(large - latency, 1e-9)
