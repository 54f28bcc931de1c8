"""The cost of a message between nodes, and the size of a bucket."""

import math

import pytest
from mpi4py import MPI

from hpctrain import network
from hpctrain.averaging import links


@pytest.mark.mpi
def test_the_link_is_measured_alike_on_all_ranks(world):
    latency, bandwidth = network.measure(world, world)
    assert (latency > 0) == (world.size > 1)
    assert bandwidth > 0
    assert len(set(world.allgather((latency, bandwidth)))) == 1


@pytest.mark.mpi
def test_a_rank_without_a_lane_learns_what_the_others_measure(world):
    """The larger node's spare rank: the last one here."""
    spare = world.size > 2 and world.rank == world.size - 1
    lane = world.Split(MPI.UNDEFINED if spare else 0, world.rank)
    found = network.measure(world, lane)
    assert len(set(world.allgather(found))) == 1
    assert (found[0] > 0) == (world.size > 1)


def test_the_bucket_size_takes_the_least_time():
    """Against a search over sizes, where no limit holds."""
    total, latency, bandwidth = 10**9, 50e-6, 1.25e9

    def seconds(size):
        return total / size * latency + (total + size) / bandwidth

    best = min((2**k for k in range(18, 25)), key=seconds)
    size = links.bucket_bytes(total, 1, latency, bandwidth)
    assert seconds(size) <= seconds(best)
    assert math.isclose(size, best, rel_tol=0.5)
    assert links.bucket_bytes(1000, 1, latency, bandwidth) == links.LIMITS[0]
    assert links.bucket_bytes(total, 100, latency, bandwidth) == min(links.LIMITS[1], max(size, 100 << 16))
