"""Which buffers a forward overwrites before it reads them."""

import pytest
import torch
from torch.nn import functional

from hpctrain.averaging.reads import Reads

WAYS = {
    "overwritten": (lambda b, x: b.copy_(x), True),
    "overwritten by a view": (lambda b, x: b.view(-1)[:].zero_(), True),
    "read behind": (lambda b, x: b.fill_(1.0).mul_(x), True),
    "read": (lambda b, x: b.copy_(b + x), False),
    "moved on": (lambda b, x: b.mul_(0.9), False),
    "in part": (lambda b, x: b[:2].copy_(x[:2]), False),
    "asked": (lambda b, x: b.copy_(x) if bool(b.sum() == 0) else None, False),
    "read by a view": (lambda b, x: b.copy_(b[1:].sum() + x), False),
    "InstanceNorm": (lambda b, x: functional.instance_norm(x.expand(2, 4, 4), b, torch.ones(4)), False),
    "own BatchNorm": (
        lambda b, x: functional.batch_norm(torch.stack((x, 2.0 * x)), b, torch.ones(4), training=True),
        False,
    ),
    "read in a branch": (lambda b, x: b.copy_(branch(x, b)), False),
}


def branch(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """An operator that has operators in it."""
    return torch.cond(x.sum() > 0, lambda x, b: x.sin() + b, lambda x, b: x.cos() - b, (x, b))


@pytest.mark.parametrize("way", WAYS)
def test_what_is_overwritten_before_it_is_read(way):
    function, expected = WAYS[way]
    buffer, x = torch.zeros(4), torch.arange(4.0)
    with Reads({"buffer": buffer}) as reads:
        function(buffer, x)
    assert buffer.any() or way in ("overwritten by a view", "moved on")
    latest = reads.latest({"buffer": buffer}) - reads.read
    assert latest == ({"buffer"} if expected else set())


def test_what_is_replaced():
    buffer = torch.zeros(4)
    with Reads({"buffer": buffer}) as reads:
        other = torch.ones(4)
    assert reads.latest({"buffer": other}) == {"buffer"}
    assert not reads.latest({"buffer": buffer[1:]})


def test_nothing_changes_under_its_eyes():
    """Gradients too, through an operator that has operators in it."""
    buffer = torch.zeros(4)
    found = []
    for looks in (False, True):
        x = torch.arange(4.0, requires_grad=True)
        if looks:
            with Reads({"buffer": buffer}):
                y = branch(x * 2.0, buffer)
        else:
            y = branch(x * 2.0, buffer)
        y.sum().backward()
        found.append((y.detach(), x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found))
