"""Messages between stages: every kind of value arrives as it was, strides included; failures too."""

import time
from collections import namedtuple
from functools import partial, partialmethod
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from hpctrain.errors import HpctrainError
from hpctrain.node_memory import NodeMemory
from hpctrain.pipeline import channel, raw
from hpctrain.pipeline.channel import Outgoing
from hpctrain.pipeline.message import Layout, pack
from hpctrain.pipeline.slots import FLAGS, Slots
from hpctrain.pipeline.transport import FORWARD, KINDS, TIED, PeerFailedError, Transport

Point = namedtuple("Point", "x y")


class Outer:
    class Inner(NamedTuple):
        x: int


BASE = torch.arange(24.0).reshape(2, 3, 4)
TENSORS = {
    "plain": BASE,
    "transposed": BASE.transpose(0, 2),
    "expanded": BASE[:, :1].expand(2, 5, 4),
    "with gaps": BASE[:, :, :3],
    "with large gaps": torch.arange(1000.0)[::100],
    "with large gaps and repetitions": torch.arange(1003.0)[3:].view(2, 1, 500)[:, :, 7:8].expand(2, 3, 4),
    "the last of each row": torch.arange(600.0).view(2, 50, 6)[:, -1],
    "windows": torch.arange(40.0).unfold(0, 30, 2),
    "part": BASE[1],
    "begins inside a line": BASE.flatten()[1:19].reshape(3, 6)[:, 1:5],
    "single": torch.tensor(7),
    "nothing": torch.empty(0, 3),
    "bool": BASE > 5,
    "int": BASE.long(),
    "bfloat16": BASE.bfloat16(),
    "complex": torch.complex(BASE, -BASE).transpose(0, 1),
    "conjugated": torch.complex(BASE, -BASE).conj(),
    "trained": BASE.clone().requires_grad_(),
}


@pytest.fixture
def transport(world):
    """Goes by messages, until it grows."""
    made = Transport(world, "cpu")
    yield made
    made.close()


def grow(transport, size):
    transport.begin(1, looks=1)
    transport._most = size
    transport.grow()


@pytest.fixture
def puts(monkeypatch):
    """What was put in slots: where, or None where there was no room."""
    found, put = [], Slots.put

    def noted(self, parts):
        found.append(put(self, parts))
        return found[-1]

    monkeypatch.setattr(Slots, "put", noted)
    return found


@pytest.mark.mpi
@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_arrives_as_it_was(world, transport, puts, name, slots):
    """Sent around the ring; strides are kept but where gaps are more than half of the memory."""
    sent = TENSORS[name]
    if slots:
        grow(transport, 1 << 16)
    above, below = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    transport.start((above, FORWARD, pack(above, 3, {"x": sent}, 5)))
    found, draws = transport.receive(below, FORWARD, 3)
    transport.finish()
    x = found["x"]
    assert len(puts) == (slots and world.size > 1)
    assert None not in puts
    assert (x.dtype, x.shape, x.requires_grad, draws) == (sent.dtype, sent.shape, sent.requires_grad, 5)
    assert torch.equal(x, sent)
    assert x.stride() == sent.stride()
    if name in ("part", "begins inside a line", "with large gaps and repetitions"):  # other bits
        assert x.data_ptr() % 64 == sent.data_ptr() % 64 > 0


@pytest.mark.mpi
def test_trees_of_all_kinds_arrive(world, transport):
    value = {"a": (1, 2.5, None, True, "text"), "b": [torch.ones(2), {"c": torch.zeros(1, dtype=torch.int8)}]}
    value["d"] = [Point(torch.ones(1), Point(1, 2))]
    value["e"] = [torch.max(torch.tensor([[1.0, 3.0]]), 1), Outer.Inner(4), torch.Size([2]), np.float32(0.1)]
    value["e"].append(np.int64(3))
    to = (world.rank + 1) % world.size
    transport.start((to, FORWARD, pack(to, 0, value, 0)))
    found, _ = transport.receive((world.rank - 1) % world.size, FORWARD, 0)
    transport.finish()
    assert found["a"] == value["a"]
    assert isinstance(found["a"], tuple)
    assert found["d"] == value["d"]
    assert type(found["d"][0]) is type(found["d"][0].y) is Point
    assert [type(one) for one in found["e"]] == [
        torch.return_types.max,
        *(Outer.Inner, torch.Size, np.float32, np.int64),
    ]
    assert (found["e"][0].values, found["e"][0].indices) == (torch.tensor([3.0]), torch.tensor([1]))
    assert found["e"][1:] == value["e"][1:]
    assert torch.equal(found["b"][0], value["b"][0])
    assert found["b"][1]["c"].dtype == torch.int8


@pytest.mark.mpi
def test_what_cannot_travel_says_so_before_anything_is_sent(transport):
    with pytest.raises(
        HpctrainError, match=r"a object would cross to stage .*: tensors, numbers, strings and None can"
    ):
        pack(0, 0, {"x": torch.ones(1), "y": object()}, 0)
    there = namedtuple("there", "x y")
    with pytest.raises(
        HpctrainError,
        match=r"a value of another kind .* stage 1 \(other ranks don't find the named tuple .*:there",
    ):
        pack(1, 0, {"at": [there(torch.ones(1), 1)]}, 0)
    with pytest.raises(
        HpctrainError, match=r"keys of dictionaries must be strings, numbers or None.*: tensors, num"
    ):
        pack(1, 0, {(1, 2): torch.ones(1)}, 0)


@pytest.mark.mpi
def test_word_of_a_failure_arrives_in_its_turn(world, transport):
    to, source = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    transport.start((to, FORWARD, pack(to, 0, torch.ones(3), 0)))
    transport.send_failure(to, FORWARD, 1)
    assert torch.equal(transport.receive(source, FORWARD, 0)[0], torch.ones(3))
    with pytest.raises(PeerFailedError, match=f"rank {source} failed"):
        transport.receive(source, FORWARD, 1)
    transport.finish()


@pytest.mark.mpi
def test_large_tensors_are_cut_into_messages(world, transport, monkeypatch):
    monkeypatch.setattr("hpctrain.pipeline.transport.MOST", 1000)
    lengths, start = [], Transport._start

    def noted(self, values, *rest):
        lengths.append(len(values))
        start(self, values, *rest)

    monkeypatch.setattr(Transport, "_start", noted)
    sent = torch.arange(5000.0).reshape(50, 100).t()
    to = (world.rank + 1) % world.size
    transport.start((to, FORWARD, pack(to, 0, sent, 0)))
    assert torch.equal(transport.receive((world.rank - 1) % world.size, FORWARD, 0)[0], sent)
    transport.finish()
    assert lengths[1:] == [1000] * 20
    transport._on_node = {}  # as if they were on nodes of their own
    lengths.clear()
    for v, way in enumerate((transport.receive, transport.drop)):
        sent = torch.arange(40000.0) + v
        transport.start((to, FORWARD, pack(to, v, sent, 0)))
        found = way((world.rank - 1) % world.size, FORWARD, v)
        assert found is None or torch.equal(found[0], sent)
    transport.finish()
    assert sorted(lengths)[-5:] == ([29952, 65024, 65024, 65024, 65024] if world.size > 1 else [1000] * 5)


@pytest.mark.mpi
@pytest.mark.parametrize("slots", [False, True])
def test_a_message_is_taken_whatever_happens(world, transport, puts, monkeypatch, slots):
    """No memory for one; another is dropped. The next one comes as it is, and slots are free again."""
    to, source = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    if slots:
        grow(transport, 3 * 4096)
    for v in range(3):
        transport.start((to, FORWARD, pack(to, v, [torch.ones(1000) + v, None], 0)))
    with monkeypatch.context() as patched:
        patched.setattr("hpctrain.pipeline.channel.Buffer", no_memory)
        with pytest.raises(MemoryError, match="none left"):
            transport.receive(source, FORWARD, 0)
    transport.drop(source, FORWARD, 1)
    assert torch.equal(transport.receive(source, FORWARD, 2)[0][0], torch.ones(1000) + 2)
    transport.finish()
    world.Barrier()
    transport.start((to, FORWARD, pack(to, 3, [torch.ones(3000), None], 0)))
    assert torch.equal(transport.receive(source, FORWARD, 3)[0][0], torch.ones(3000))
    transport.finish()
    assert None not in puts


def no_memory(*_):
    raise MemoryError("none left")


@pytest.mark.mpi
def test_a_layout_travels_when_it_changes(world, transport, monkeypatch):
    """Shapes, constants, True and 1, trees; then numbers are enough, for four that repeat and the last other one."""
    to, source = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    encoded, encode = [], Layout.encode

    def noted(self):
        encoded.append(self)
        return encode(self)

    monkeypatch.setattr(Layout, "encode", noted)
    values = [[torch.ones(2), 1], [torch.zeros(2), 1], [torch.ones(3), 1], [torch.ones(3), True]]
    values += [[torch.ones(3), True], (torch.ones(3), True), (torch.ones(3), float("nan"))]
    values += [values[-1], values[0], (torch.ones(4), 1), values[2], (torch.ones(3), float("nan"))]
    values += [[torch.ones(5), 1], [torch.ones(6), 1], [torch.ones(6), 1], values[3]]  # no numbers are left
    told = []
    for v, value in enumerate(values):
        encoded.clear()
        transport.start((to, FORWARD, pack(to, v, value, v)))
        told.append(len(encoded))
    assert told == [1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0, 1, 1, 0, 0]
    for v, value in enumerate(values):
        found, draws = transport.receive(source, FORWARD, v)
        assert (type(found), type(found[1]), draws) == (type(value), type(value[1]), v)
        assert torch.equal(found[0], value[0])
        assert found[1] == value[1] or value[1] != value[1]
    transport.finish()


@pytest.fixture
def apart(transport):
    """As if the ranks were on nodes of their own."""
    transport._on_node = {}
    return transport


def large(turn):
    return torch.arange(40_000.0) + turn


def warm(transport, to, source):
    """Four messages of one layout: it has buffers then."""
    for v in range(4):
        transport.start((to, FORWARD, pack(to, v, large(v), 0)))
        transport.receive(source, FORWARD, v)
    transport.finish()


def made(transport):
    """Buffers so far, by who sends and who receives."""
    ways = (transport._outgoing.values(), transport._incoming.values())
    return [sum(len(buffers) for way in each for buffers in way.buffers.values()) for each in ways]


@pytest.mark.mpi
def test_between_nodes_nothing_is_made_once_a_layout_has_come_twice(world, apart, monkeypatch):
    """Four are held at a time, two layouts by turns; then receives are posted before their messages come."""
    to, source = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    apart.begin(4)
    numbers = []
    for turn in range(40):
        if turn == 20:
            monkeypatch.setattr(Transport, "_start", no_memory)  # what is sent without buffers
        sent = [large(4 * turn + v)[: None if v % 2 else 30_000].reshape(100, -1).t() for v in range(4)]
        for v in range(4):
            apart.start((to, FORWARD, pack(to, v, sent[v], 0)))
        found = [apart.receive(source, FORWARD, v)[0] for v in range(4)]
        assert all(map(torch.equal, found, sent))
        assert [x.stride() for x in found] == [x.stride() for x in sent]
        assert all(map(len, apart._incoming[source, FORWARD]._started.values()))
        found.clear()
        apart.finish()
        world.Barrier()
        numbers.append(made(apart))
    assert numbers[-1][0] <= 4
    assert numbers[-1][1] == numbers[5][1] == 6, "one more of each layout than are held"
    assert 4 * 3 * 70_000 < apart.nbytes <= 4 * (2 * 70_000 + 3 * 70_000)


@pytest.mark.mpi
def test_what_was_packed_without_its_gaps_is_there_until_it_has_been_taken(world, transport):
    """Of a tensor that several stages use no copy is made, but of one that is mostly gaps for its numbers."""
    to, source = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    sent = torch.arange(16 * 500_000.0).view(500_000, 16)[:, :2]
    transport.start((to, TIED, pack(to, 0, sent, 0)))
    world.Barrier()
    others = [torch.full((1_000_000,), -1.0) for _ in range(4)]  # of its size: they would get its memory
    found = transport.receive(source, TIED, 0)[0]
    transport.finish()
    assert torch.equal(found, sent)
    del others


def test_a_single_row_of_a_column_is_packed():
    """It is contiguous with any stride."""
    column = torch.arange(64.0).view(1, 64)[:, 1]
    assert column.stride() == (64,)
    packed = pack(1, 0, [column], 0)
    assert torch.equal(
        packed.layout.tree_of([raw.shown(*part[:2]) for part in packed.parts], "cpu")[0], column
    )


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [0, 1, raw.PARALLEL - 1, raw.PARALLEL, raw.PARALLEL + 3])
def test_bytes_are_moved_by_one_thread_or_several(threads, size):
    source, into = (
        torch.randint(0, 256, (size + 2,), dtype=torch.uint8),
        torch.zeros(size + 2, dtype=torch.uint8),
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        raw.move(into.data_ptr() + 1, source.data_ptr() + 1, size)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(into[1:-1], source[1:-1])
    assert not into[0]
    assert not into[-1]


@pytest.mark.parametrize("value", [["tensor"], {"x": "tensor"}, {1: "tensor"}, ["tensor", None]])
def test_what_is_packed_a_second_time_has_the_same_layout(value):
    """A message of one plain tensor has a shorter way."""
    for tensor in (
        torch.ones(3, 2),
        torch.ones(2, 3).t(),
        torch.ones(3, 2, requires_grad=True),
        torch.ones(3, 0),
    ):
        first, second = (
            pack(1, at, dict.fromkeys(value, tensor) if type(value) is dict else [tensor, *value[1:]], at)
            for at in range(2)
        )
        assert first.layout.key == second.layout.key
        assert Layout.decode(first.layout.encode()).encode() == first.layout.encode()
        made = second.layout.tree_of([raw.shown(*part[:2]) for part in second.parts], "cpu")
        assert type(made) is type(value)
        assert len(made) == len(value)
        assert type(made) is list or list(made) == list(value)
        leaf = next(iter(made.values())) if type(value) is dict else made[0]
        assert torch.equal(leaf, tensor)
        assert leaf.stride() == tensor.stride()
        assert leaf.requires_grad == tensor.requires_grad


class Kind(torch.Tensor):
    """A tensor with ways of its own."""


def test_what_a_tensor_would_lose_on_the_way_is_refused():
    """An attribute, or its class; not what torch notes on a buffer, nor a parameter's notes."""
    noted, parameter = torch.ones(2), torch.nn.Parameter(torch.ones(2))
    noted.scale, parameter.no_decay = 2.0, True
    for tensor, what in (
        (noted, "a Tensor with scale"),
        (torch.ones(2).as_subclass(Kind), "a Kind with ways"),
    ):
        with pytest.raises(HpctrainError, match=f"{what}.* would cross to stage 1, as a plain tensor"):
            pack(1, 0, [tensor], 0)
    for tensor in (parameter, torch.nn.Buffer(torch.ones(2))):
        assert len(pack(1, 0, [tensor], 0).parts) == 1


@pytest.mark.parametrize("beside", [0, 1])
@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: torch.eye(2).to_sparse(), "a torch.sparse_coo tensor"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a nested tensor"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8), "a torch.quint8 tensor"),
    ],
)
def test_tensors_that_are_more_than_numbers_do_not_cross(make, what, beside):
    """Neither alone, which has a shorter way, nor beside others."""
    with pytest.raises(HpctrainError, match=f"{what} would cross to stage 1: tensors"):
        pack(1, 0, [*beside * [torch.ones(2)], make()], 0)


def test_a_list_that_holds_itself_does_not_cross():
    value = [torch.ones(2)]
    value.append(value)
    with pytest.raises(HpctrainError, match="a value of another kind would cross to stage 1"):
        pack(1, 0, value, 0)


@pytest.mark.mpi
@pytest.mark.parametrize("slots", [False, True])
def test_what_somebody_holds_is_not_written_to(world, transport, slots):
    """A view, a detached tensor, what autograd keeps, NumPy: each keeps the memory that it looks at."""
    to, source = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    if slots:
        grow(transport, 1 << 22)
    else:
        transport._on_node = {}
    held = []
    for v in range(12):
        transport.start((to, FORWARD, pack(to, v, large(v).requires_grad_(), 0)))
        x, _ = transport.receive(source, FORWARD, v)
        square = x * x
        ways = (x.detach()[5:7], x.detach().numpy()[5:7], square.sum(), x.detach().view(200, 200).t()[0, :2])
        held.append((ways[v % 4], x if v % 4 == 2 else None))
        del x, square
        transport.finish()
        world.Barrier()
    for v, (way, x) in enumerate(held):
        if x is not None:
            way.backward()
            assert torch.equal(x.grad, 2 * large(v))
        else:
            assert float(way[1]) - v in (6.0, 200.0)


@pytest.mark.mpi
@pytest.mark.parametrize("slots", [False, True])
def test_buffers_that_were_held_for_long_are_let_go(world, transport, slots):
    """Of twenty that somebody held, as many stay as may be on their way, and what is posted."""
    to, source = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    if slots:
        grow(transport, 1 << 22)
    else:
        transport._on_node = {}
    transport.begin(3)
    held = []
    for v in range(40):
        transport.start((to, FORWARD, pack(to, v, large(v), 0)))
        held.append(transport.receive(source, FORWARD, v)[0])
        if v >= 20:
            held.clear()
        transport.finish()
        if v == 19:
            assert all(torch.equal(x, large(n)) for n, x in enumerate(held))
            if not slots or world.size > 1:
                assert made(transport)[1] > 15
    assert made(transport)[1] <= 5
    started = transport._incoming[source, FORWARD]._started
    assert all(len(one) <= 2 for one in started.values())
    world.Barrier()


@pytest.mark.mpi
def test_failures_between_nodes_in_the_steady_state(world, apart, monkeypatch):
    """One is dropped, one fails, for one there is no memory; what comes then is whole."""
    to, source = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    warm(apart, to, source)
    held = []
    for v in range(4, 12):
        if v == 5:
            apart.send_failure(to, FORWARD, v)
        else:
            apart.start((to, FORWARD, pack(to, v, large(v), 0)))
    held.append(apart.receive(source, FORWARD, 4)[0])
    with pytest.raises(PeerFailedError):
        apart.receive(source, FORWARD, 5)
    with monkeypatch.context() as patched:
        patched.setattr("hpctrain.pipeline.channel.Buffer.__init__", no_memory)
        held.append(apart.receive(source, FORWARD, 6)[0])  # the one that was posted
        with pytest.raises(MemoryError, match="none left"):
            apart.receive(source, FORWARD, 7)
        apart.drop(source, FORWARD, 8)  # none is posted, so by pieces
    held.append(apart.receive(source, FORWARD, 9)[0])
    apart.drop(source, FORWARD, 10)  # into the one that was posted
    held.append(apart.receive(source, FORWARD, 11)[0])
    assert all(map(torch.equal, held, map(large, (4, 6, 9, 11))))
    apart.finish()


@pytest.mark.mpi
@pytest.mark.parametrize("steady", [False, True])
def test_a_sender_without_memory_sends_nothing_of_it(world, apart, monkeypatch, steady):
    """Not even to the first of two targets; then comes word of its failure, and the next is whole."""
    to, source = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    tags = (FORWARD, FORWARD + KINDS)
    for v in range(4 * steady):
        apart.start(*((to, tag, pack(to, v, large(v), 0)) for tag in tags))
        for tag in tags:
            apart.receive(source, tag, v)
    apart.finish()
    calls = []

    def second_fails(call, *arguments):
        calls.append(1)
        return call(*arguments) if len(calls) < 2 else no_memory()

    with monkeypatch.context() as patched:
        if steady:
            patched.setattr(Outgoing, "fill", partialmethod(partial(second_fails, Outgoing.fill)))
        else:
            patched.setattr(Transport, "_pieces", partialmethod(partial(second_fails, Transport._pieces)))
        with pytest.raises(MemoryError):
            apart.start(*((to, tag, pack(to, 4, large(4), 0)) for tag in tags))
    for tag in tags:
        apart.send_failure(to, tag, 4)
        apart.start((to, tag, pack(to, 5, large(5), 0)))
        with pytest.raises(PeerFailedError):
            apart.receive(source, tag, 4)
        assert torch.equal(apart.receive(source, tag, 5)[0], large(5))
    apart.finish()


@pytest.mark.mpi
def test_an_interrupted_wait_ends(world, apart, monkeypatch):
    """And the message is still there for whoever asks again."""
    to, source = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    warm(apart, to, source)
    waits, until = [], Transport._until

    def interrupted(self, rank, done):
        waits.append(rank)
        if len(waits) == 2:  # behind the numbers
            raise KeyboardInterrupt
        until(self, rank, done)

    apart.start((to, FORWARD, pack(to, 4, large(4), 0)))
    with monkeypatch.context() as patched:
        patched.setattr(Transport, "_until", interrupted)
        with pytest.raises(KeyboardInterrupt):
            apart.receive(source, FORWARD, 4)
    way = apart._incoming[source, FORWARD]
    found = way.taken(0, lambda done: until(apart, source, done))
    assert torch.equal(found.flats[0].view(torch.float32), large(4))
    apart.finish()


@pytest.mark.mpi
def test_stopping_does_not_wait_for_a_peer_that_is_gone(world, apart, monkeypatch):
    """What was posted is called off; where MPI can't end it, its memory stays for ever."""
    to, source = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    warm(apart, to, source)
    way = apart._incoming[source, FORWARD]
    never = SimpleNamespace(Prequest=SimpleNamespace(Testall=lambda requests: False))
    with monkeypatch.context() as patched:
        patched.setattr(channel, "MPI", never)
        patched.setattr(channel, "STOP_SECONDS", 0.05)
        began = time.monotonic()
        apart.stop()
        assert time.monotonic() - began < 5
    assert way in channel.LEFT
    channel.LEFT.clear()
    assert not apart._incoming
    apart._outgoing.clear()


@pytest.mark.mpi
def test_a_buffer_is_filled_again_only_when_it_has_left(world, apart):
    """Nobody receives for a while; MPI asks the receiver before it takes as large a piece."""
    apart._piece = 1 << 30
    to, source = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    for v in range(8):
        apart.start((to, FORWARD, pack(to, v, large(v).repeat(8), 0)))
    world.Barrier()
    for v in range(8):
        assert torch.equal(apart.receive(source, FORWARD, v)[0], large(v).repeat(8))
    apart.finish()


@pytest.mark.mpi
def test_slots_are_filled_again_and_again(world, transport, puts):
    """Of all sizes, around the ring's end; where there is no room messages carry the tensors, in order."""
    to, source = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    grow(transport, 5000)
    numbers = torch.arange(2000, dtype=torch.int32)
    for turn in range(60):
        sizes = [(7 * turn + 311 * at) % 700 for at in range(4)]
        for at, size in enumerate(sizes):
            transport.start((to, FORWARD, pack(to, at, (numbers[:size] + turn, numbers[at]), 0)))
        world.Barrier()
        for at, size in enumerate(sizes):
            (found, single), _ = transport.receive(source, FORWARD, at)
            assert torch.equal(found, numbers[:size] + turn)
            assert single == at
        world.Barrier()
    transport.finish()
    if world.size > 1:
        assert len(puts) == 240
        assert 60 < sum(put is None for put in puts) < 200
        assert max(put[0] for put in puts if put) > 4000


@pytest.mark.mpi
def test_no_more_slots_than_flags(world, transport, puts):
    to, source = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    grow(transport, 1 << 20)
    for v in range(FLAGS + 3):
        transport.start((to, FORWARD, pack(to, v, torch.tensor(v), 0)))
    world.Barrier()
    assert all(int(transport.receive(source, FORWARD, v)[0]) == v for v in range(FLAGS + 3))
    transport.finish()
    assert [at for at, put in enumerate(puts) if put is None] == (
        [FLAGS + at for at in range(3)] if puts else []
    )


@pytest.mark.mpi
def test_room_on_the_node_follows_what_a_micro_batch_sends(world, transport, puts):
    """The most of any rank, times the micro-batches on their way; several messages of one count together.

    Weights that several stages use do not count, and go without.
    """
    to, source = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    for step, rows in enumerate((3 + world.rank, 40)):
        transport.begin(3)
        for v in range(2):
            for _ in range(2):
                transport.start((to, FORWARD, pack(to, v, torch.ones(rows, 16), 0)))
        for v in range(2):
            for _ in range(2):
                transport.receive(source, FORWARD, v)
        transport.start((to, TIED, pack(to, 0, torch.ones(1000), 0)))
        transport.receive(source, TIED, 0)
        transport.finish()
        transport.grow()
        if world.size > 1:
            assert transport._slots.size == 3 * 2 * 64 * (world.size + 2 if not step else 40)
    if world.size > 1:
        assert len(puts) == 4
        kept = transport._slots
        for _ in range(3):
            grow(transport, 1)
        transport.begin(9)
        transport.start((to, FORWARD, pack(to, 0, torch.ones(1000), 0)))
        transport.receive(source, FORWARD, 0)
        transport.finish()
        transport.grow()  # no look is left
        assert transport._slots is kept


@pytest.mark.mpi
def test_without_shared_memory_messages_carry_all(world, transport, monkeypatch, caplog):
    """Where it is refused it is said once, with the bytes."""
    grow(transport, 1 << 12)
    before = NodeMemory.__init__

    def small(self, comm, common, each):
        if each > 1 << 20:
            raise OSError("no space")
        before(self, comm, common, each)

    monkeypatch.setattr(NodeMemory, "__init__", small)
    for _ in range(2):
        grow(transport, 3 << 20)
    assert world.size == 1 or transport._slots.size == 1 << 12
    to = (world.rank + 1) % world.size
    transport.start((to, FORWARD, pack(to, 0, torch.ones(5), 0)))
    assert torch.equal(transport.receive((world.rank - 1) % world.size, FORWARD, 0)[0], torch.ones(5))
    transport.finish()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (world.size > 1)
    if told:
        assert "no shared memory for what stages on this node send" in told[0]
        assert "3 MiB for each rank were asked for" in told[0]
