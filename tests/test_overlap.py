"""Buckets between nodes: told in time, in a learnt order, moved in three ways with the same bits.

Nodes are made up, so that the ranks of one machine stand on several.
"""

import sys
import threading
import time

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hpctrain.averaging import links
from hpctrain.averaging.averager import Averager
from hpctrain.averaging.overlap import TURNS, WAYS, Choice, Mover
from hpctrain.averaging.space import UNIT
from hpctrain.config import Averaging
from hpctrain.errors import HpctrainError
from hpctrain.gradient import StraightIntoPlace
from hpctrain.node_memory import NodeMemory, Rendezvous


class Net(nn.Module):
    """Layers in another order than they are used, one of them on some steps only, one tied."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(90, 40)
        self.first = nn.Linear(40, 90)
        self.sometimes = nn.Linear(90, 90)
        self.never = nn.Linear(5, 5)

    def forward(self, x, use=True):
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.sometimes(x)) if use else x
        return self.last(x) + x @ self.first.weight


def steps(world, way, count=8, node_of=None, mine=1, bf16=False, work=None, sharded="auto"):
    """Train; gives weights, norms and the averager. `mine`: micro-batches of each rank."""
    torch.manual_seed(0)
    module = Net()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, fused=True)
    owners = [v // mine for v in range(world.size * mine)]
    nodes = node_of or [r % 2 for r in range(world.size)]
    config = Averaging(wire="bf16" if bf16 else "exact")
    averager = Averager(module, optimizer, world, config, owners, node_of=nodes, sharded=sharded)
    if averager.overlap:
        averager.overlap.choice = Choice(world, (way,))
    straight = StraightIntoPlace(module, averager.places)
    norms = []
    for step in range(count):
        own = [v for v, owner in enumerate(owners) if owner == world.rank]
        averager.begin(own)
        for v in own:
            generator = torch.Generator().manual_seed(100 * step + v)
            x = torch.randn(3 + v, 40, generator=generator)
            with straight.forward():
                loss = work(module, x) if work else module(x, use=step % 3 != 1).square().sum()
            with straight.accumulating():
                loss.backward()
            averager.joined(v, float(loss.detach()), float(len(x)))
        norms.append(averager.step(0.5 if step % 2 else 0.0).norm)
    weights = [p.detach().clone() for p in module.parameters()]
    averager.close()
    return weights, norms, averager


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    """Several buckets even in a small model."""
    monkeypatch.setattr(links, "bucket_bytes", lambda total, parts, latency, bandwidth: 4 * UNIT * 2)


@pytest.mark.mpi
@pytest.mark.parametrize("mine", [1, 3])
def test_three_ways_give_the_same_bits(world, mine):
    expected, norms, _ = steps(world, "after", mine=mine)
    for way in WAYS[1:]:
        for sharded in ("auto", False):
            found, other, _ = steps(world, way, mine=mine, sharded=sharded)
            assert other == norms
            assert all(torch.equal(a, b) for a, b in zip(found, expected))
    bits = [w.numpy().tobytes() for w in expected]
    assert all(share == bits for share in world.allgather(bits))


@pytest.mark.mpi
@pytest.mark.parametrize("way", WAYS[1:])
def test_buckets_leave_before_backward_is_over(world, way, monkeypatch):
    """What is told during backward, in a learnt order; the one with unused parameters comes at the end."""
    told = []
    from hpctrain.averaging.overlap import Overlap

    usual = Overlap._tell
    monkeypatch.setattr(Overlap, "_tell", lambda self, n: (told.append(n), usual(self, n))[1])
    _, _, averager = steps(world, way, count=4)
    if world.size == 1:
        assert averager.overlap is None
        return
    count = len(averager.medium.buckets)
    assert count >= 4
    assert told
    assert max(told) >= count // 2
    assert max(told) < count, "the bucket of a parameter without gradient must wait for the end"
    order = averager.places.order
    assert sorted(order) == list(range(count))
    assert order != list(range(count)), "layers are used in another order than they are registered"


@pytest.mark.mpi
def test_a_recomputed_portion_is_noticed_and_nothing_leaves_early(world):
    """Re-entrant recomputation runs a backward in the backward: a parameter is ready several times."""

    def work(module, x):
        halves = [checkpoint(module, part.requires_grad_(), use_reentrant=True) for part in x.split(2)]
        return torch.cat(halves).square().sum()

    expected, norms, _ = steps(world, "after", work=work)
    found, other, averager = steps(world, "between", work=work)
    assert norms == other
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert world.size == 1 or averager.places.repeats


@pytest.mark.mpi
def test_a_choice_tries_all_ways_and_keeps_the_fastest_of_the_slowest_rank(world):
    choice, taken = Choice(world, WAYS), []
    slow = {"after": 0.5, "between": 0.3, "thread": 0.1 if world.rank else 0.4}
    if world.size == 1:
        slow["thread"] = 0.4
    while not choice.settled:
        taken.append(choice.way)
        choice.note(slow[choice.way])
    assert taken[0] == "after"
    assert all(taken[1:].count(way) == TURNS + 1 for way in WAYS)
    assert choice.way == "between"
    choice.note(99.0)
    assert choice.way == "between"


def test_a_mover_polls_only_between_start_and_stop_and_hands_over_failures():
    count, threads = [], set()

    def poll():
        count.append(1)
        threads.add(threading.current_thread())
        if len(count) == 5:
            raise ValueError("from the thread")
        return False

    mover = Mover(poll)
    mover.stop()
    mover.start()
    end = time.monotonic() + 20
    while len(count) < 5 and time.monotonic() < end:
        time.sleep(0.01)
    with pytest.raises(ValueError, match="from the thread"):
        mover.stop()
    before = len(count)
    time.sleep(0.02)
    assert len(count) == before == 5
    assert threading.current_thread() not in threads
    mover.start()
    while len(count) == before and time.monotonic() < end:
        time.sleep(0.01)
    mover.stop()
    mover.close()
    assert not any(thread.is_alive() for thread in threads)


def test_a_mover_ends_though_its_last_poll_ends_after_close_began():
    entered, go = threading.Event(), threading.Event()

    def poll():
        entered.set()
        go.wait(20)
        return True

    mover = Mover(poll)
    mover.start()
    assert entered.wait(20)
    closing = threading.Thread(target=mover.close, daemon=True)
    closing.start()
    time.sleep(0.1)
    go.set()
    closing.join(20)
    assert not closing.is_alive()


@pytest.mark.mpi
def test_two_threads_announce_and_look_at_once(world):
    """The mover looks while the backward announces: neither may trip over the other's fence."""
    memory = NodeMemory(world, 0, 64)
    place, failures, ends = Rendezvous(world, memory, True), [], threading.Event()

    def look():
        try:
            while not ends.is_set():
                place.announced(0)
        except BaseException as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread = threading.Thread(target=look)
        thread.start()
        for number in range(60_000):
            place.announce(number)
            if failures:
                break
    finally:
        ends.set()
        sys.setswitchinterval(interval)
        thread.join()
    assert not failures
    world.Barrier()


@pytest.mark.mpi
def test_a_failure_of_the_mover_is_told_to_all_before_it_is_raised(world):
    if world.size == 1:
        return
    module = Net()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, fused=True)
    averager = Averager(module, optimizer, world, node_of=[r % 2 for r in range(world.size)])
    before = [p.detach().clone() for p in module.parameters()]
    averager.begin([world.rank])
    module(torch.ones(2, 40)).square().sum().backward()
    averager.joined(world.rank, 1.0, 2.0)
    if world.rank == 1:
        averager.overlap.mover._failure = ValueError("from the thread")
    result = averager.step()
    assert result.errors == 1
    assert (result.failure is not None) == (world.rank == 1)
    assert all(torch.equal(a, p) for a, p in zip(before, module.parameters()))
    with pytest.raises(
        HpctrainError, match="failed in an earlier step"
    ):  # a message may be lost or come twice
        averager.begin([world.rank])
    averager.close()


@pytest.mark.mpi
@pytest.mark.parametrize("way", WAYS)
def test_the_moment_of_every_bucket_names_who_was_late_for_it(world, way, monkeypatch):
    """The last rank takes long over the gradient of `first`, which comes last, and over nothing else."""
    if world.size == 1:
        return
    monkeypatch.setattr(Choice, "note", lambda self, seconds: None)
    module, slow = Net(), world.size - 1
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, fused=True)
    averager = Averager(module, optimizer, world, node_of=[r % 2 for r in range(world.size)])
    averager.overlap.choice.way = way
    assert averager.ready_times() == []
    for _ in range(4):
        averager.begin([world.rank])
        loss = module(torch.ones(2, 40)).square().sum()
        module.first.weight.register_hook(lambda g: time.sleep(0.1 * (world.rank == slow)))
        loss.backward()
        averager.joined(world.rank, 1.0, 2.0)
        averager.step()
        module.first.weight._backward_hooks.clear()
    found = averager.ready_times()
    assert len(found) == len(averager.medium.buckets)
    late = [name for name, seconds in found if seconds.argmax() == slow and seconds[slow] - seconds[0] > 0.08]
    assert any("first.weight" in name for name in late), found
    if way == "after":  # all leave at the end
        assert len(late) == len(found)
    else:
        assert not seconds_apart(found[0][1]), found
    averager.close()


def seconds_apart(seconds):
    """Whether some rank was much later than another."""
    return seconds.max() - seconds.min() > 0.08


@pytest.mark.mpi
@pytest.mark.parametrize("sharded", ["auto", False])
def test_bfloat16_between_nodes_is_near_and_the_same_on_all_ranks(world, sharded):
    """8 bits of mantissa: gradients, and updates, are off by up to 2^-9 each, some hundredths after six steps.

    Adam turns a gradient near zero into a whole step, so single numbers may differ by more.
    """
    torch.manual_seed(0)
    start = [p.detach().clone() for p in Net().parameters()]
    exact, _, _ = steps(world, "between", count=6)
    found, _, averager = steps(world, "between", count=6, bf16=True, sharded=sharded)
    bits = [w.numpy().tobytes() for w in found]
    assert all(share == bits for share in world.allgather(bits))
    for a, b in zip(found, exact):
        torch.testing.assert_close(a, b, rtol=0.0, atol=6 * 0.01)
    apart = sum(float((a - b).square().sum()) for a, b in zip(found, exact))
    moved = sum(float((a - b).square().sum()) for a, b in zip(exact, start))
    assert apart <= 0.03**2 * moved
    if averager.overlap:
        assert any(not torch.equal(a, b) for a, b in zip(found, exact)), "bfloat16 was not used"
    else:
        assert all(torch.equal(a, b) for a, b in zip(found, exact))


@pytest.mark.mpi
def test_bfloat16_bits_do_not_depend_on_the_measured_link(world, monkeypatch):
    """Buckets are cut as the link was measured: another cut, other owners, the same bits."""
    expected, _, _ = steps(world, "between", count=4, bf16=True)
    monkeypatch.setattr(links, "bucket_bytes", lambda *_: 4 * UNIT * 5)
    found, _, _ = steps(world, "between", count=4, bf16=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.mpi
def test_interleaved_and_uneven_nodes_agree_in_every_way(world):
    for node_of in ([(r + 1) // 2 % 2 for r in range(world.size)], [0] + [1] * (world.size - 1)):
        expected, _, _ = steps(world, "after", count=4, node_of=node_of)
        found, _, _ = steps(world, "thread", count=4, node_of=node_of)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
        bits = [w.numpy().tobytes() for w in found]
        assert all(share == bits for share in world.allgather(bits))


@pytest.mark.mpi
def test_after_an_error_the_next_step_is_right(world):
    """A rank that fails in the middle: the others' buckets are on their way and must arrive."""
    if world.size == 1:
        return
    torch.manual_seed(0)
    module = Net()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, fused=True)
    averager = Averager(module, optimizer, world, node_of=[r % 2 for r in range(world.size)])
    averager.overlap.choice = Choice(world, ("thread",))
    before = [p.detach().clone() for p in module.parameters()]
    for step in range(4):
        averager.begin([world.rank])
        failing = step == 2 and world.rank == world.size - 1
        if not failing:
            module(torch.ones(2, 40)).square().sum().backward()
        averager.joined(world.rank, 1.0, 2.0)
        averager.flags.errors = int(failing)
        result = averager.step()
        changed = any(not torch.equal(a, p) for a, p in zip(before, module.parameters()))
        assert changed == (step != 2)
        assert (result.errors > 0) == (step == 2)
        before = [p.detach().clone() for p in module.parameters()]
    bits = [w.numpy().tobytes() for w in before]
    assert all(share == bits for share in world.allgather(bits))
    averager.close()


@pytest.mark.mpi
@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_other_ranks_are_added_before_theirs_leave(world, way):
    """A weight that stages share: its copies' gradients come when backward is over; those of others go before."""
    found, told = [], []
    for apart in (True, False):
        torch.manual_seed(0)
        module = Net()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        averager = Averager(module, optimizer, world, node_of=[r % 2 for r in range(world.size)])
        shared = [module.first.weight, module.never.weight] if apart else []
        averager.used_elsewhere(shared)
        if averager.overlap:
            averager.overlap.choice = Choice(world, (way,))
        for _ in range(3):
            averager.begin([world.rank])
            loss = module(torch.full((2, 40), 0.1 * (world.rank + 1))).square().sum()
            if not apart:  # the same gradients by autograd alone
                loss = loss + 3.0 * module.first.weight.sum() + 0.0 * module.never.weight.sum()
            loss.backward()
            told.append(averager.places._told)
            for parameter, value in zip(shared, (3.0, 0.0)):
                averager.add(parameter, torch.full_like(parameter, value))
            averager.joined(world.rank, 1.0, 2.0)
            averager.step()
        found.append([p.detach().clone() for p in module.parameters()])
        every = len(averager.places.order)
        averager.close()
    torch.testing.assert_close(*found)
    if world.size > 1 and way != "after":
        assert 0 < told[2] < every
        assert told[5] == every - 1  # nobody uses a bias


@pytest.mark.mpi
@pytest.mark.parametrize("way", WAYS)
def test_gradients_that_wait_are_told_when_they_have_come(world, way, monkeypatch):
    """Products of both micro-batches are computed after both backward passes: the bits of a run without waiting."""
    monkeypatch.setattr("hpctrain.gradient.SMALLEST", 1)
    monkeypatch.setattr("hpctrain.gradient.LARGE", 1)
    early = []

    def work(averager, straight, v, loss):
        if v % 2:
            averager.last_backward()
        with straight.accumulating(v):
            loss.backward()
        if v % 2:
            places = averager.places
            assert len(places._waiting) == 3 or places._steps == 1
            early.append(places._telling is not None and places._told < len(places.order))
            straight.weights_of(v - 1, last=False)
            straight.weights_of(v, last=True)
            assert not places._waiting
            assert places._telling is None or places._told == len(places.order)

    plain, norms = two_micro_batches(world, way, None)
    waited, other = two_micro_batches(world, way, work)
    assert norms == other
    for name, value in plain.items():
        assert torch.equal(value, waited[name]), name
    assert any(early) == (way != "after")


def two_micro_batches(world, way, work):
    """Eight steps of two micro-batches a rank over two made-up nodes."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(40, 90), nn.Tanh(), nn.Linear(90, 400), nn.Tanh(), nn.Linear(400, 40))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, fused=True)
    owners = [v // 2 for v in range(world.size * 2)]
    averager = Averager(
        module, optimizer, world, Averaging(), owners, node_of=[r % 2 for r in range(world.size)]
    )
    if averager.overlap is None:
        pytest.skip("two nodes at least")
    averager.overlap.choice = Choice(world, (way,))
    straight, norms = StraightIntoPlace(module, averager.places), []
    for step in range(8):
        own = [v for v, owner in enumerate(owners) if owner == world.rank]
        averager.begin(own)
        straight.begin(0)
        for v in own:
            x = torch.randn(3 + v, 40, generator=torch.Generator().manual_seed(100 * step + v))
            with straight.forward():
                loss = module(x).square().sum()
            if work:
                work(averager, straight, v, loss)
            else:
                with straight.accumulating():
                    loss.backward()
                averager.joined(v, 1.0, 3.0 + v)
        if work:
            for v in own:
                averager.joined(v, 1.0, 3.0 + v)
        norms.append(averager.step().norm)
    weights = {n: p.detach().clone() for n, p in module.named_parameters()}
    averager.close()
    return weights, norms
