import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.data import order


@given(length=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=100, deadline=None)
def test_permute_is_a_permutation(length, key):
    found = order.permute(np.arange(length), length, key)
    assert np.array_equal(np.sort(found), np.arange(length))


@given(length=st.integers(1, 10**15), place=st.integers(0, 10**15 - 1))
@settings(max_examples=50, deadline=None)
def test_a_place_is_permuted_alone_as_among_others(length, place):
    place %= length
    others = np.array([0, place, length - 1])
    assert order.permute(np.array([place]), length, 9)[0] == order.permute(others, length, 9)[1]


def test_permutations_are_uniform():
    """Each sample falls on each place equally often: chi-square over 2,000 keys, 40 places."""
    length, keys = 40, 2000
    counts = np.zeros((length, length))
    for key in range(keys):
        counts[np.arange(length), order.permute(np.arange(length), length, key)] += 1
    expected = keys / length
    chi = ((counts - expected) ** 2 / expected).sum()
    freedom = (length - 1) ** 2
    assert abs(chi - freedom) < 5 * np.sqrt(2 * freedom)


def test_epochs_and_seeds_differ():
    orders = {
        tuple(order.permute(np.arange(50), 50, order.key(seed, epoch)).tolist())
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


@given(
    length=st.integers(1, 300),
    batch=st.integers(1, 64),
    count=st.integers(1, 9),
    seed=st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_an_epoch_uses_each_sample_once(length, batch, count, seed):
    """Independent answer: a list of what was used, whoever computed it."""
    position, used, steps = 0, [], 0
    while position < length:
        _, start, stop = order.batch_at(position, batch, length)
        parts = [order.micro_batch(position, v, count, batch, length, seed) for v in range(count)]
        assert sum(map(len, parts)) == stop - start
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        used += np.concatenate(parts).tolist()
        position += stop - start
        steps += 1
    assert sorted(used) == list(range(length))
    assert steps == order.steps_per_epoch(batch, length)
    assert position == order.position_after(steps, batch, length)


@given(count=st.integers(1, 40), replicas=st.integers(1, 50))
def test_replicas_share_out_all_micro_batches(count, replicas):
    shares = [order.replica_micro_batches(r, replicas, count) for r in range(replicas)]
    assert [v for share in shares for v in share] == list(range(count))


def test_micro_batches_do_not_depend_on_how_many_there_are():
    """The batch is the same samples in the same order however it is cut."""
    whole = order.micro_batch(32, 0, 1, 16, 100, seed=4)
    for count in (2, 3, 16, 20):
        parts = [order.micro_batch(32, v, count, 16, 100, seed=4) for v in range(count)]
        assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_tiny_datasets(length):
    assert sorted(order.permute(np.arange(length), length, 1).tolist()) == list(range(length))
