"""Random layers draw the same numbers when a model computes its activations again for the backward."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hpctrain import draws
from hpctrain.draws import Drawing, Draws, again, run_again


class Own(torch.autograd.Function):
    """Computes again as libraries do that have a way of their own."""

    @staticmethod
    def forward(ctx, function, x):
        ctx.function, ctx.state = function, torch.get_rng_state()
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        inner = x.detach().requires_grad_()
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.set_rng_state(ctx.state)
            ctx.function(inner).backward(gradient)
        return None, inner.grad


def as_torch(function, x):
    return checkpoint(function, x, use_reentrant=False)


def as_torch_did(function, x):
    return checkpoint(function, x, use_reentrant=True)


def nested(function, x):
    return as_torch_did(lambda y: as_torch_did(lambda z: function(z), functional.dropout(y, 0.1)), x)


def without(function, x):
    return function(x)


def twice(x):
    return functional.dropout(torch.sin(functional.dropout(x, 0.5)), 0.4)


@pytest.mark.parametrize("way", [as_torch, as_torch_did, Own.apply])
def test_masks_are_those_of_the_forward(way):
    """Gradients are those of the same forward that keeps its activations."""
    found = []
    for recomputing in (without, way):
        x = torch.randn(500, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with Draws(5, 3) as drawing:
            y = functional.dropout(recomputing(twice, functional.dropout(x, 0.1)), 0.1)
            y = recomputing(twice, y)  # no draw lies between this one and the next
            y = recomputing(twice, y)
        assert drawing.count == 3 + 2 + 3 * 2
        with again(5, range(3, drawing.count)):
            torch.autograd.backward(y.square().sum())
        found.append((y.detach(), x.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_a_region_inside_a_region():
    x = torch.ones(500, requires_grad=True)
    with Draws(5) as drawing:
        y = nested(lambda z: functional.dropout(functional.dropout(z, 0.5), 0.4), x)
    with again(5, range(drawing.count)):
        torch.autograd.backward(y.sum())
    assert torch.equal(x.grad, y.detach())


def test_a_gradient_inside_the_forward_has_its_masks():
    found = []
    for recomputing in (without, as_torch):
        x = torch.ones(500, requires_grad=True)
        with Draws(5):
            y = recomputing(twice, functional.dropout(x, 0.1))
            found.append(torch.autograd.grad(y.sum(), x)[0])
            found.append(functional.dropout(y, 0.5).detach())
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


def test_what_nobody_sees_has_numbers_of_its_own():
    """A scripted function draws between two calls that are seen; no two masks are one."""
    scripted, x = torch.jit.script(twice_scripted), torch.ones(1000)
    with Draws(5):
        masks = [functional.dropout(x, 0.5), scripted(x), functional.dropout(x, 0.5)]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert not torch.equal(masks[one], masks[other])


def twice_scripted(x: torch.Tensor) -> torch.Tensor:
    return torch.dropout(x, 0.5, True)


def test_a_backward_of_the_users_draws_what_it_likes():
    """Where the generator stands at no draw of the forward, it is left alone."""

    class Noisy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            torch.manual_seed(11)
            return gradient * torch.rand(3)

    x = torch.ones(3, requires_grad=True)
    with Draws(5) as drawing:
        y = functional.dropout(Noisy.apply(x), 0.0001)
    with again(5, range(drawing.count)):
        torch.autograd.backward(y.sum())
    torch.manual_seed(11)
    torch.testing.assert_close(x.grad, torch.rand(3), rtol=1e-3, atol=0.0)


class Late(nn.Module):
    """Draws from its third call on; its statistics are those of what it draws."""

    def __init__(self):
        super().__init__()
        self.calls, self.norm = 0, nn.BatchNorm1d(4)

    def forward(self, x):
        self.calls += 1
        return self.norm(functional.dropout(x, 0.5 if self.calls > 3 else 0.0))


def forwards(module, count, records):
    drawing, found = Drawing([module]), []

    def once(number):
        x = torch.ones(6, 4)
        with drawing.of(7, 10 * number, x) as counting:
            records.append(number)
            y = module(x)
        return y, counting.count

    for number in range(count):
        found.append(run_again(partial(once, number), records))
    return found


def test_who_begins_to_draw_late_has_the_numbers_of_who_was_watched(monkeypatch):
    entered, real = [], Draws.__enter__
    monkeypatch.setattr(Draws, "__enter__", lambda self: entered.append(self.count) or real(self))
    records = []
    found = forwards(Late(), 6, records)
    assert entered == [0, 10, 30, 40, 50]
    assert records == list(range(6))  # of the forward that was run twice, once
    assert [count for _, count in found] == [0, 10, 20, 31, 41, 51]
    monkeypatch.setattr(draws, "SILENT", 10**6)
    for (one, _), (other, _) in zip(found, forwards(Late(), 6, []), strict=True):
        assert torch.equal(one, other)


class Counting(Late):
    """Counts in a buffer: run twice, it would count twice."""

    def __init__(self):
        super().__init__()
        self.register_buffer("counted", torch.zeros(()))

    def forward(self, x):
        self.counted += 1
        return super().forward(x)


class Filling(Late):
    def forward(self, x):
        return super().forward(x.mul_(2.0))


class Meeting(Late):
    meeting = None


@pytest.mark.parametrize("kind", [Counting, Filling, Meeting, nn.Dropout])
def test_what_can_not_be_run_twice_or_draws_is_always_watched(monkeypatch, kind):
    entered, real = [], Draws.__enter__
    monkeypatch.setattr(Draws, "__enter__", lambda self: entered.append(self.count) or real(self))
    forwards(kind(), 6, [])
    assert entered == [0, 10, 20, 30, 40, 50]


def test_without_draws_nothing_watches_a_backward():
    assert not isinstance(again(5, range(7, 7)), torch.overrides.TorchFunctionMode)
    assert nn.Dropout(0.0)(torch.ones(3)).sum() == 3
