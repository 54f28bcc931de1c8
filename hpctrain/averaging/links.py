"""The size of the buckets that cross the network, by what a message costs (`network.py`).

n buckets of s bytes, S in all      latency of each, and the last one's time is not hidden
time  =  S/s · latency  +  S/bandwidth  +  s/bandwidth
least at  s = sqrt(S · latency · bandwidth)
"""

import math

LEAST_MESSAGE = 1 << 16
"""Bytes: what a part of a bucket should have, whatever the formula says."""
LIMITS = (1 << 18, 25 << 20)


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
