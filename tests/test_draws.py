"""Random layers draw the same numbers when a model computes its activations again for the backward."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hpctrain.draws import Draws, again


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
        with again(5, drawing.count):
            torch.autograd.backward(y.square().sum())
        found.append((y.detach(), x.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_a_region_inside_a_region():
    x = torch.ones(500, requires_grad=True)
    with Draws(5) as drawing:
        y = nested(lambda z: functional.dropout(functional.dropout(z, 0.5), 0.4), x)
    with again(5, drawing.count):
        torch.autograd.backward(y.sum())
    assert torch.equal(x.grad, y.detach())


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
    with again(5, drawing.count):
        torch.autograd.backward(y.sum())
    torch.manual_seed(11)
    torch.testing.assert_close(x.grad, torch.rand(3), rtol=1e-3, atol=0.0)


def test_without_draws_nothing_watches_a_backward():
    assert not isinstance(again(5, 0), torch.overrides.TorchFunctionMode)
    assert nn.Dropout(0.0)(torch.ones(3)).sum() == 3
