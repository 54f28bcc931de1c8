"""Which bucket is full when: told once, in order, never before all its gradients have come."""

import pytest
import torch
from torch import nn

from hpctrain.averaging.across import Bucket
from hpctrain.averaging.places import SMALL, Places
from hpctrain.averaging.space import UNIT, deal
from hpctrain.errors import HpctrainError


def places_of(*sizes):
    module = nn.ParameterList([nn.Parameter(torch.zeros(n)) for n in sizes])
    named = dict(module.named_parameters())
    spaces = deal(named, {id(p): 0 for p in named.values()}, 1)
    places = Places(named, spaces)
    places.watch([Bucket(0, *b) for b in spaces[0].buckets])
    places.point(0, [torch.zeros(s.size) for s in spaces])
    return list(named.values()), places


def test_what_a_users_hook_returns_is_for_torch_to_refuse():
    """It hands that on to our hook."""
    (parameter,), places = places_of(4)
    places.close()
    parameter.register_post_accumulate_grad_hook(lambda p: p.grad)
    spaces = deal({"p": parameter}, {id(parameter): 0}, 1)
    places = Places({"p": parameter}, spaces)
    places.point(0, [torch.zeros(space.size) for space in spaces])
    places.begin()
    with pytest.raises(RuntimeError, match="should return None"):
        parameter.sum().backward()


@pytest.mark.parametrize("moved", [False, True])
def test_each_gradient_joins_once(moved):
    """In two steps; torch adds in place to what stands, which a user may have moved, and tells of nothing, too."""
    (parameter,), places = places_of(4)
    flats = [torch.zeros(space.size) for space in places.spaces]
    for bring in ([1, 0, 1, 1], [1, 1, 0, 1]):
        places.begin()
        places.point(0, flats)
        for at, brings in enumerate(bring):
            if moved and at == 1:
                parameter.grad.data = torch.zeros(4)
            (parameter.sum() if brings else Nothing.apply(parameter)).backward()
        assert places.used.tolist() == [3.0]
        assert places.gradient("0").tolist() == [3.0] * 4


@pytest.mark.parametrize(("several", "buckets"), [(False, False), (True, False), (True, True)])
def test_hooks_are_there_while_they_are_needed(several, buckets, monkeypatch):
    """A large one's first gradient of a step comes at once, so its memory goes; buckets hear of all of each."""
    asked, ready = [], Places.ready
    monkeypatch.setattr(Places, "ready", lambda self, p, *_: asked.append(p.numel()) or ready(self, p))
    small, large = nn.Parameter(torch.zeros(SMALL)), nn.Parameter(torch.zeros(SMALL + 1))
    unused = nn.Parameter(torch.zeros(SMALL + 1))
    named = {"small": small, "large": large, "unused": unused}
    spaces = deal(named, {id(p): 0 for p in named.values()}, 1)
    places = Places(named, spaces)
    if buckets:
        places.watch([Bucket(0, *b) for b in spaces[0].buckets])
    flats = [torch.zeros(space.size) for space in spaces]
    for _ in range(3):
        places.begin(several)
        places.point(0, flats)
        for at in range(3):
            asked.clear()
            (small.sum() + large.sum()).backward()
            assert (
                sorted(asked)
                == [SMALL, SMALL + 1][not buckets : 2 if at == 0 or buckets or not several else 0]
            )
            places.came()
        hooks = [len(p._post_accumulate_grad_hooks or ()) for p in named.values()]
        assert hooks == [buckets, buckets or not several, True]
        assert [float(places.gradient(name)[-1]) for name in named] == [3.0, 3.0, 0.0]
        assert places.used.tolist() == [3.0, 3.0, 0.0]
    places.close()
    assert not any(p._post_accumulate_grad_hooks for p in named.values())


class Nothing(torch.autograd.Function):
    """Gives its input no gradient: torch tells so all the same."""

    @staticmethod
    def forward(ctx, x):
        return x.sum()

    @staticmethod
    def backward(ctx, g):
        return None


def test_a_portion_that_comes_late_is_refused_by_name():
    (first, second), places = places_of(UNIT, UNIT)
    told = []
    places.begin()
    places.last_backward(told.append)
    second.grad = torch.ones(UNIT)
    places.ready(second)
    assert told == [1]
    second.grad = torch.ones(UNIT)
    with pytest.raises(
        HpctrainError, match="gradient of 1 came after its bucket was sent.*use_reentrant=False"
    ):
        places.ready(second)
    first.grad = torch.ones(UNIT)
    places.ready(first)
    assert told == [1, 2]


def test_only_what_is_final_counts():
    """Some parameters' last backward comes before others' (virtual stages of a rank)."""
    (a, b, c), places = places_of(UNIT, UNIT, UNIT)  # buckets: c, b, a
    told = []

    def come(*parameters):
        for parameter in parameters:
            parameter.grad = torch.ones(UNIT)
            places.ready(parameter)

    for _ in range(2):  # and all is forgotten for the next step
        told.clear()
        places.begin()
        places.last_backward(told.append, [c])
        come(a, b)
        assert told == []
        come(c)
        assert told == [1]
        places.last_backward(told.append, [b])
        come(a, b)
        assert told == [1, 2]
        places.last_backward(told.append)
        come(a)
        assert told == [1, 2, 3]
    assert not places.repeats


def test_an_undefined_gradient_is_zeros_before_its_bucket_leaves():
    (only,), places = places_of(UNIT)
    flat = torch.full((UNIT,), 9.0)
    places.point(1, [flat])
    places.begin()
    seen = []
    places.last_backward(lambda n: seen.append(float(flat.sum())))
    only.grad = None
    places.ready(only)
    assert seen == [0.0]
    assert places.used.tolist() == [0.0]


def test_the_order_is_that_of_the_last_parameter_of_each_bucket():
    (a, b, c), places = places_of(UNIT, UNIT, UNIT)  # buckets: c, b, a
    places.begin()
    places.last_backward(None)
    for parameter in (a, c):
        parameter.grad = torch.ones(UNIT)
        places.ready(parameter)
    assert places.filling_order() == [2, 0, 1]
    assert b.grad is None
