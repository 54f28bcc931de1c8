"""Which samples make up micro-batch v of a step: arithmetic on integers, the same on every layout.

      position p ──► epoch e = p // N,  batch = places [p % N, min(p % N + B, N))
      places   ──► keyed permutation of 0 … N-1 by (seed, e) ──► samples
      batch of b samples ──► micro-batch v = [v·b // V, (v+1)·b // V)

N: training samples; B: `train.batch`; V: micro-batches of the step. An epoch's last batch
is shorter where B does not divide N: it is used, and the mean is over its own samples.
"""

import numpy as np
from numpy.typing import NDArray

from hpctrain.keys import key, scatter

Ids = NDArray[np.int64]

# Alternating Feistel rounds; from 4 rounds on a Feistel network is a strong permutation
# (Luby and Rackoff 1988) if its round function is; the mixing here is no cipher, so take 8.
ROUNDS = 8


def permute(places: Ids, length: int, permutation_key: int) -> Ids:
    """Send each place in 0 … length-1 to its sample: a permutation without a table.

    A Feistel network permutes 0 … 2^bits-1 with 2^bits < 2·length + 2; what falls outside
    the length is sent through again until it falls inside (cycle walking, Black and
    Rogaway 2002), which keeps it a permutation. Local; O(1) memory a place.

    >>> permute(np.arange(5), 5, 7).tolist()
    [3, 2, 1, 0, 4]
    """
    if length <= 1:
        return np.zeros_like(places)
    bits = max(2, (length - 1).bit_length())
    left_bits = np.uint64(bits // 2)
    right_bits = np.uint64(bits) - left_bits
    left_mask = (np.uint64(1) << left_bits) - np.uint64(1)
    right_mask = (np.uint64(1) << right_bits) - np.uint64(1)
    keys = [np.uint64(key(permutation_key, turn)) for turn in range(ROUNDS)]
    value = places.astype(np.uint64)
    outside = np.ones(value.shape, dtype=bool)
    while outside.any():
        moving = value[outside]
        left, right = moving >> right_bits, moving & right_mask
        for turn in range(0, ROUNDS, 2):
            left = left ^ (scatter(right + keys[turn]) & left_mask)
            right = right ^ (scatter(left + keys[turn + 1]) & right_mask)
        value[outside] = (left << right_bits) | right
        outside = value >= np.uint64(length)
    return value.astype(np.int64)


def block(index: int, parts: int, length: int) -> tuple[int, int]:
    """Cut 0 … length-1 into parts that differ by at most one: (start, stop) of one of them.

    >>> [block(r, 4, 10) for r in range(4)]
    [(0, 2), (2, 5), (5, 7), (7, 10)]
    """
    return index * length // parts, (index + 1) * length // parts


def batch_at(position: int, batch: int, length: int) -> tuple[int, int, int]:
    """Say which places of which epoch the next batch takes: (epoch, start, stop).

    >>> batch_at(0, 4, 10), batch_at(8, 4, 10), batch_at(10, 4, 10)
    ((0, 0, 4), (0, 8, 10), (1, 0, 4))
    """
    start = position % length
    return position // length, start, min(start + batch, length)


def steps_per_epoch(batch: int, length: int) -> int:
    """Count the optimizer steps of one epoch, the short last one included.

    >>> steps_per_epoch(4, 10)
    3
    """
    return -(-length // batch)


def position_after(steps: int, batch: int, length: int) -> int:
    """Count the samples that so many steps from the start consume.

    >>> [position_after(k, 4, 10) for k in range(5)]
    [0, 4, 8, 10, 14]
    """
    epochs, rest = divmod(steps, steps_per_epoch(batch, length))
    return epochs * length + min(rest * batch, length)


def micro_batch(position: int, index: int, count: int, batch: int, length: int, seed: int) -> Ids:
    """Places in the training split, shuffled, of micro-batch `index` of `count`: int64, (n,).

    >>> [micro_batch(8, v, 4, 4, 10, seed=0).tolist() for v in range(4)]
    [[], [7], [], [9]]
    """
    epoch, start, stop = batch_at(position, batch, length)
    first, last = block(index, count, stop - start)
    places = np.arange(start + first, start + last, dtype=np.int64)
    return permute(places, length, key(seed, epoch))


def sizes(samples: int, count: int) -> list[int]:
    """Samples of each micro-batch of a step.

    >>> sizes(3, 4)
    [0, 1, 1, 1]
    """
    return [stop - start for start, stop in (block(v, count, samples) for v in range(count))]


def replica_micro_batches(replica: int, replicas: int, count: int) -> range:
    """Say which micro-batches of a step a replica computes.

    >>> [list(replica_micro_batches(r, 3, 4)) for r in range(3)]
    [[0], [1], [2, 3]]
    """
    return range(*block(replica, replicas, count))


def working(replicas: int, count: int, batch: int) -> list[int]:
    """Say how many micro-batches with samples each replica has of a batch.

    >>> [working(2, count, 10) for count in (5, 8, 30)]
    [[2, 3], [4, 4], [5, 5]]
    """
    work = sizes(batch, count)
    return [sum(work[v] > 0 for v in replica_micro_batches(r, replicas, count)) for r in range(replicas)]


def replicas_of(replicas: int, count: int) -> list[int]:
    """Say which replica computes each micro-batch of a step.

    >>> replicas_of(3, 4)
    [0, 1, 2, 2]
    """
    return [r for r in range(replicas) for _ in replica_micro_batches(r, replicas, count)]
