"""What layers hold together, and what is put back behind a measurement."""

import logging
from collections import OrderedDict, deque
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hpctrain.errors import ConfigError
from hpctrain.pipeline.aside import Asides, Hanging, held_by, untouched

LOGGER = logging.getLogger("test_aside")
TABLE: dict[str, torch.Tensor] = {}


@lru_cache
def power(n: int) -> int:
    """Something that is remembered."""
    return 2**n


class Slotted:
    """An object without a dictionary."""

    __slots__ = ("last",)


class Holds(nn.Module):
    """Keeps what it is given, and changes it."""

    def __init__(self, **what):
        super().__init__()
        self.line = nn.Linear(3, 3)
        self.calls, self.last = 0, None
        vars(self).update(what)

    def forward(self, x):
        LOGGER.debug("called %d", power(3))
        self.calls += 1
        self.last = x = self.line(x)
        for value in [v for name, v in vars(self).items() if name.startswith("own")]:
            if isinstance(value, dict):
                value["x"] = x
                value.pop("old", None)
            elif isinstance(value, set):
                value.add(len(value))
            elif isinstance(value, (list, deque)):
                value.append(x)
            else:
                value.last = x
        return x


def told(*layers, stage=0):
    """Run the first of two stages of a layer each."""
    named = [(str(at), layer) for at, layer in enumerate(layers)]
    asides = Asides(named, [(0, 1), (1, 2)])
    x = torch.ones(2, 3)
    with asides.watching(stage, True, [x, *layers[stage].parameters()]):
        layers[stage](x)
    return asides.shared[stage]


@pytest.mark.parametrize("kind", [dict, OrderedDict, list, deque, SimpleNamespace])
@pytest.mark.parametrize("inside", [False, True])
def test_what_two_stages_hold_is_found_however_deep(kind, inside):
    common = kind()
    own = {"own": common}
    other = {"table": ([{"deep": common}],)} if inside else {"own": common}
    with pytest.raises(ConfigError, match=r"stage 0 changes 0\.own, which another stage has, too, as 1\."):
        told(Holds(**own), Holds(**other))


def test_what_is_a_stages_own_may_change():
    assert not [
        name for name, _, _ in told(Holds(own={}, own_2=[]), Holds(own={}, own_2=[])) if "own" in name
    ]


def test_what_hangs_on_nothing_may_be_filled_on_each_rank():
    class Masks(nn.Module):
        def __init__(self, common):
            super().__init__()
            self.common = common

        def forward(self, x):
            self.common.setdefault(("mask", x.shape[1]), torch.ones(3))
            self.common["calls"] = self.common.get("calls", 0) + 1
            return x * self.common["mask", 3]

    common = {}
    assert told(Masks(common), Masks(common))
    assert len(common) == 2


def test_a_layer_of_two_stages_holds_no_secret_with_itself():
    """Its plain attributes are of each call, as nothing else looks at them."""
    twice = Holds()
    told(twice, twice)
    assert twice.calls == 1


def test_what_is_followed():
    x, other = torch.ones(3), torch.ones(3)
    with Hanging([x]) as hanging:
        y, z, into = (2.0 * x)[1:], other + 1.0, torch.zeros(3)
        into[0] = x[1]
        a = int(other.sum())
        assert not hanging.holds(a)
        b = float(x.sum())
    found = [
        hanging.holds(value) for value in (y, {"z": [z]}, into, (other, y), b, SimpleNamespace(u=z), "text")
    ]
    assert found == [True, False, True, True, True, False, False]


def test_what_was_there_is_there_again():
    table, lines, names, ring, space = {"old": 1}, [1], {"a"}, deque([2]), SimpleNamespace(last=3)
    layer = Holds(own=table, own_2=lines, own_3=names, own_4=ring, own_5=space)
    before = dict(vars(layer))
    with untouched([("0", layer)]):
        layer(torch.ones(2, 3))
        layer.new = 1
        assert "x" in table
        assert len(lines) == len(names) == len(ring) == 2
    assert (table, lines, names, list(ring), space.last) == ({"old": 1}, [1], {"a"}, [2], 3)
    assert vars(layer) == before
    assert layer.calls == 0


def test_classes_globals_and_what_functions_close_over_are_looked_at():
    closed: list[int] = []

    class Closing(nn.Module):
        of_class: dict[str, int] = {}

        def forward(self, x):
            closed.append(1)
            return TABLE.get("x", x)

    names = {name.rpartition(" ")[2] for name, _ in held_by([("0", Closing())]).values()}
    assert {"closed", "TABLE", "Closing.of_class"} <= names
    assert not held_by([("0", nn.Linear(3, 3))])
    assert not held_by([("0", Holds(own=Slotted(), text="x", tensor=torch.ones(1), module=torch))])
