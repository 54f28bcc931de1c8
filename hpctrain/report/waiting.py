"""Who waited for whom: seconds of a step by rank, and the rank that the others waited for.

A replica that takes longest to its last gradient keeps all others waiting; the length of a
collective call can't tell, as everyone leaves it together. Ranks end a step together, so what
each took from there until its gradients were complete (reading, other things, computing) can be
compared without a common clock.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.averaging.result import Times

Peers = list[tuple[int, str]]
"""World rank and host of each replica."""


def spread(values: NDArray[np.float64], peers: Peers) -> dict[str, Any]:
    """Give least, median and most seconds, and who has the most.

    >>> spread(np.array([1.0, 3.0, 2.0]), [(0, "a"), (1, "a"), (2, "b")])
    {'min': 1.0, 'median': 2.0, 'max': 3.0, 'rank': 1, 'host': 'a'}
    """
    rank, host = peers[int(values.argmax())]
    least, middle, most = (round(float(f(values)), 6) for f in (np.min, np.median, np.max))
    return {"min": least, "median": middle, "max": most, "rank": rank, "host": host}


class Waiting:
    """Adds up over a run who was waited for."""

    def __init__(self, peers: Peers) -> None:
        """Take the names of the replicas."""
        self.peers = peers
        self.slowest = np.zeros(len(peers), dtype=np.int64)
        self.waited = 0.0
        """Seconds, the mean over the replicas."""

    def row(self, times: Times) -> dict[str, Any]:
        """Give what a "train" row says of a step, and add it up."""
        busy = times.reading + times.other + times.computing
        last = int(busy.argmax())
        self.slowest[last] += 1
        self.waited += float(times.waiting.mean())
        parts = {
            "read_seconds": times.reading,
            "other_seconds": times.other,
            "compute_seconds": times.computing,
            "wait_seconds": times.waiting,
            "transfer_seconds": times.transfer,
        }
        return {
            **{name: spread(values, self.peers) for name, values in parts.items()},
            "waited_for": self.peers[last][0],
        }

    def buckets(self, found: list[tuple[str, NDArray[np.float64]]]) -> list[dict[str, Any]]:
        """Say of each bucket, in the order they leave, when it was full, and on whom it waited.

        `found` gives its parameters and seconds by replica.
        """
        return [{"parameters": name, "ready_seconds": spread(times, self.peers)} for name, times in found]

    def line(self, seconds: float) -> str:
        """Say in one line who was waited for in steps that took `seconds` in all; "" where nobody waits."""
        steps = int(self.slowest.sum())
        if len(self.peers) < 2 or not steps or seconds <= 0:
            return ""
        last = int(self.slowest.argmax())
        rank, host = self.peers[last]
        share = self.slowest[last] / steps
        return (
            f"a rank waited {self.waited / seconds:.1%} of the time for the slowest, most often for "
            f"rank {rank} on {host} ({share:.0%} of the steps; {1 / len(self.peers):.0%} would be even)"
        )
