"""What a message between nodes costs, measured, and the bucket size that follows.

n buckets of s bytes, S in all      latency of each, and the last one's time is not hidden
time  =  S/s · latency  +  S/bandwidth  +  s/bandwidth
least at  s = sqrt(S · latency · bandwidth)
"""

import math
import time

import numpy as np
from mpi4py import MPI

SMALL, LARGE = 8, 1 << 20
"""Bytes."""
PINGS, SENDS = 10, 3
LEAST_MESSAGE = 1 << 16
"""Bytes: what a part of a bucket should have, whatever the formula says."""
LIMITS = (1 << 18, 25 << 20)


def measure(comm: MPI.Intracomm, lane: MPI.Intracomm) -> tuple[float, float]:
    """Give latency (s) and bandwidth of a lane (bytes/s), the worst over all. Collective over `comm`.

    All lanes send at once, as they do in training; a rank without one has MPI.COMM_NULL.
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


def bucket_bytes(total: int, parts: int, latency: float, bandwidth: float) -> int:
    """Give the size of a bucket. Pure.

    `total` bytes of gradients, `parts` that a bucket is cut into, the latency and bandwidth.

    >>> bucket_bytes(67_000_000, 4, 100e-6, 125e6)
    915150
    >>> bucket_bytes(67_000_000, 4096, 100e-6, 125e6) == 25 << 20
    True
    """
    best = math.isqrt(int(total * latency * bandwidth))
    return min(max(best, parts * LEAST_MESSAGE, LIMITS[0]), LIMITS[1])
