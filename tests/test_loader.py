import threading

import numpy as np
import pytest
from helpers import write_samples

from hpctrain.config import Data
from hpctrain.data import order
from hpctrain.data.index import build
from hpctrain.data.loader import Loader
from hpctrain.data.read import Reader
from hpctrain.data.splits import Split


def loader_of(replica, replicas, count=4, batch=8, length=29, make=lambda samples: samples):
    split = Split(((0, length),))
    mine = order.replica_micro_batches(replica, replicas, count)
    return Loader(split, mine, count, batch, 5, make)


def take(loader, position, steps):
    found = []
    for step in loader.steps(position):
        found.append(step)
        if len(found) == steps:
            break
    loader.close()
    return found


@pytest.mark.parametrize("replicas", [1, 2, 3, 4, 6])
def test_the_same_samples_whoever_reads(replicas):
    """All replicas together read what one process reads, in its order."""
    alone = take(loader_of(0, 1), 0, 9)
    shares = [take(loader_of(r, replicas), 0, 9) for r in range(replicas)]
    for at, step in enumerate(alone):
        joined = [v for share in shares for v in share[at].micro_batches.items()]
        assert [v for v, _ in joined] == list(range(4))
        assert (
            np.concatenate([s for _, s in joined]).tolist()
            == np.concatenate(list(step.micro_batches.values())).tolist()
        )


def test_epochs_end_short_and_go_on():
    steps = take(loader_of(0, 1), 0, 5)
    assert [s.next_position for s in steps] == [8, 16, 24, 29, 37]
    first = np.concatenate([b for s in steps[:4] for b in s.micro_batches.values()])
    assert sorted(first.tolist()) == list(range(29))


def test_a_position_is_all_it_takes_to_go_on():
    whole = take(loader_of(0, 1), 0, 8)
    rest = take(loader_of(0, 1), whole[3].position, 5)
    for a, b in zip(whole[3:], rest):
        assert all(np.array_equal(a.micro_batches[v], b.micro_batches[v]) for v in a.micro_batches)


def test_a_failure_comes_with_its_step():
    def make(samples):
        if 3 in samples:
            raise ValueError("bad sample")
        return samples

    for step in loader_of(0, 1, make=make).steps(0):
        if step.failure:
            break
    assert "bad sample" in str(step.failure)
    assert step.micro_batches == {}
    assert step.next_position > step.position


def test_reading_happens_in_a_thread_ahead_and_ends():
    seen = []
    loader = loader_of(0, 1, make=lambda samples: seen.append(threading.current_thread().name) or samples)
    take(loader, 0, 2)
    assert set(seen) == {"hpctrain loader"}
    assert 8 <= len(seen) <= 4 * 6
    assert "hpctrain loader" not in [t.name for t in threading.enumerate()]


def test_real_files_through_the_thread(tmp_path):
    index = build(Data(files=write_samples(tmp_path), inputs=["x"], targets=["y"]))
    reader = Reader(index)
    loader = Loader(index.splits["train"], range(2), 2, 8, 1, lambda s: (s, reader.read_one("x", s)))
    whole = reader.read_one("x", np.arange(29))
    for step in take(loader, 0, 4):
        for samples, values in step.micro_batches.values():
            assert np.array_equal(values, whole[samples])
