"""Messages between stages: every kind of value arrives as it was, strides included; failures too."""

import pytest
import torch

from hpctrain.errors import HpctrainError
from hpctrain.pipeline.transport import FORWARD, PeerFailedError, Transport

BASE = torch.arange(24.0).reshape(2, 3, 4)
TENSORS = {
    "plain": BASE,
    "transposed": BASE.transpose(0, 2),
    "expanded": BASE[:, :1].expand(2, 5, 4),
    "with gaps": BASE[:, :, :3],
    "with large gaps": torch.arange(1000.0)[::100],
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
    made = Transport(world, "cpu")
    yield made
    made.close()


@pytest.mark.mpi
@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_arrives_as_it_was(world, transport, name):
    """Sent around the ring; strides are kept but where gaps are more than half of the memory."""
    sent = TENSORS[name]
    above, below = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    transport.start(above, FORWARD, transport.pack(above, 3, {"x": sent}, 5))
    found, draws = transport.receive(below, FORWARD, 3)
    transport.finish()
    x = found["x"]
    assert (x.dtype, x.shape, x.requires_grad, draws) == (sent.dtype, sent.shape, sent.requires_grad, 5)
    assert torch.equal(x, sent)
    assert (x.stride() == sent.stride()) == (name != "with large gaps")
    if name in ("part", "begins inside a line"):  # kernels choose by it: other bits
        assert x.data_ptr() % 64 == sent.data_ptr() % 64 > 0


@pytest.mark.mpi
def test_trees_of_all_kinds_arrive(world, transport):
    value = {"a": (1, 2.5, None, True, "text"), "b": [torch.ones(2), {"c": torch.zeros(1, dtype=torch.int8)}]}
    to = (world.rank + 1) % world.size
    transport.start(to, FORWARD, transport.pack(to, 0, value, 0))
    found, _ = transport.receive((world.rank - 1) % world.size, FORWARD, 0)
    transport.finish()
    assert found["a"] == value["a"]
    assert isinstance(found["a"], tuple)
    assert torch.equal(found["b"][0], value["b"][0])
    assert found["b"][1]["c"].dtype == torch.int8


@pytest.mark.mpi
def test_what_cannot_travel_says_so_before_anything_is_sent(transport):
    with pytest.raises(
        HpctrainError, match=r"a object would cross to stage .*: tensors, numbers, strings and None can"
    ):
        transport.pack(0, 0, {"x": torch.ones(1), "y": object()}, 0)


@pytest.mark.mpi
def test_word_of_a_failure_arrives_in_its_turn(world, transport):
    to, source = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    transport.start(to, FORWARD, transport.pack(to, 0, torch.ones(3), 0))
    transport.send_failure(to, FORWARD, 1)
    assert torch.equal(transport.receive(source, FORWARD, 0)[0], torch.ones(3))
    with pytest.raises(PeerFailedError, match=f"rank {source} failed"):
        transport.receive(source, FORWARD, 1)
    transport.finish()


@pytest.mark.mpi
def test_large_tensors_are_cut_into_messages(world, transport, monkeypatch):
    monkeypatch.setattr("hpctrain.pipeline.transport.MOST", 1000)
    sent = torch.arange(5000.0).reshape(50, 100).t()
    to = (world.rank + 1) % world.size
    transport.start(to, FORWARD, transport.pack(to, 0, sent, 0))
    assert torch.equal(transport.receive((world.rank - 1) % world.size, FORWARD, 0)[0], sent)
    transport.finish()
