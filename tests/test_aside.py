"""What layers hold together, and what is put back behind a measurement."""

import logging
import random
from collections import OrderedDict, deque
from contextvars import ContextVar
from functools import lru_cache
from queue import Queue
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from hpctrain.errors import ConfigError
from hpctrain.pipeline.aside import Asides, untouched
from hpctrain.pipeline.hanging import Hanging
from hpctrain.pipeline.holders import held_by

LOGGER = logging.getLogger("test_aside")
TABLE: dict[str, torch.Tensor] = {}


@lru_cache
def power(n: int) -> int:
    """Something that is remembered."""
    return 2**n


class Slotted:
    """An object without a dictionary."""

    __slots__ = ("last",)


def changed() -> None:
    """A function with attributes."""


LATEST: torch.Tensor | None = None
OBJECT, NUMBERS, ARRAY, QUEUE = Slotted(), torch.zeros(()), np.zeros(2), Queue()
LINES: list[float] = []
CONTEXT = ContextVar("CONTEXT", default=None)


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
    with asides.watching(stage, [x, *layers[stage].parameters()]):
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


class Aux(nn.Module):
    """Collects a term of the loss."""

    total = None


class Adds(nn.Module):
    """Adds to it, or sets it first."""

    def __init__(self, aux, first):
        super().__init__()
        self.aux, self.first = aux, first

    def forward(self, x):
        term = x.square().mean()
        self.aux.total = term if self.first else self.aux.total + term
        return x


class Uses(nn.Module):
    """Computes with it, if there is one."""

    def __init__(self, aux):
        super().__init__()
        self.aux = aux

    def forward(self, x):
        return x if self.aux.total is None else x + self.aux.total


class Remembers(nn.Module):
    """Keeps what it was given, a table or a count for its next call."""

    def __init__(self, what):
        super().__init__()
        self.what, self.kept, self.given = what, None, None

    def forward(self, x):
        self.given = x
        if self.what == "count":
            self.kept = (self.kept or 0) + 1
        elif self.kept is None:
            self.kept = x if self.what == "values" else torch.ones(3)
        return self.given + self.kept


class Table(nn.Module):
    """A table that all layers have, made anew where it is too short, as for rotary positions."""

    def __init__(self, length):
        super().__init__()
        self.table = torch.ones(length)

    def forward(self, x):
        if len(self.table) < x.shape[1]:
            self.table = torch.ones(x.shape[1])
        return x + self.table[: x.shape[1]]


class Reads(nn.Module):
    """Uses such a table."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, x):
        return self.table(x)


def compared(*layers):
    """Run two stages of a layer each twice, on values of their own, and compare what they noted."""
    asides = Asides([(str(at), layer) for at, layer in enumerate(layers)], [(0, 1), (1, 2)])
    for stage in (0, 1, 0, 1):
        x = torch.ones(2, 3)
        with asides.watching(stage, [x]):
            layers[stage](x)
    asides.compare(asides.noted)


NOISE = torch.Generator()


class Noisy(nn.Module):
    """Draws from a generator."""

    def __init__(self, generator):
        super().__init__()
        self.generator = generator

    def forward(self, x):
        return x + torch.rand(x.shape, generator=self.generator)


class GloballyNoisy(nn.Module):
    """Draws from a generator that is a variable of its module."""

    def forward(self, x):
        return x + torch.rand(x.shape, generator=NOISE)


@pytest.mark.parametrize("generator", [torch.Generator(), np.random.default_rng(3), random.Random(3)])
def test_a_generator_that_two_stages_have_is_refused(generator):
    held = [("0", Noisy(generator)), ("1", Noisy(generator))]
    with pytest.raises(
        ConfigError, match=r"stages 0 and 1 have one \w+ of random numbers \(0.generator and 1.g"
    ):
        Asides(held, [(0, 1), (1, 2)])
    Asides(held, [(0, 2)])
    Asides([("0", Noisy(torch.default_generator)), ("1", Noisy(torch.default_generator))], [(0, 1), (1, 2)])
    with pytest.raises(ConfigError, match="stages 0 and 1 have one Generator of random numbers"):
        Asides([("0", GloballyNoisy()), ("1", GloballyNoisy())], [(0, 1), (1, 2)])


class Puts(nn.Module):
    """Puts what it gets into something, and gives it on."""

    def __init__(self, put):
        super().__init__()
        self.put = put

    def forward(self, x):
        self.put(x)
        return x


class Gets(nn.Module):
    """Looks whether something is there."""

    def __init__(self, get):
        super().__init__()
        self.get = get

    def forward(self, x):
        found = self.get()
        return x if found is None else x + found


@pytest.mark.parametrize("kind", [nn.Module, nn.Sequential, nn.ModuleDict, Aux])
@pytest.mark.parametrize("held", ["as a submodule", "in a list", "in a function"])
def test_what_is_told_by_a_module_that_is_only_held(kind, held):
    common, box = kind(), []
    box.append(common)
    if held == "in a function":
        layers = Puts(lambda x: setattr(common, "total", x)), Gets(lambda: getattr(common, "total", None))
    else:
        of = (lambda layer: layer.box[0]) if held == "in a list" else (lambda layer: layer.common)
        first, second = Puts(None), Gets(None)
        first.put = lambda x: setattr(of(first), "total", x)
        second.get = lambda: getattr(of(second), "total", None)
        layers = first, second
        for layer in layers:
            layer.box, layer.common = [common] if held == "in a list" else [], None
            if held != "in a list":
                layer.common = common
    with pytest.raises(ConfigError, match=r"stage 1 reads total of .*, which stage 0 has, too, and sets"):
        compared(*layers)


def test_what_one_stage_tells_another_by_a_module_is_refused():
    aux = Aux()
    with pytest.raises(ConfigError, match=r"stage 1 reads total of 0\.aux, which stage 0 has, too, and sets"):
        compared(Adds(aux, first=True), Uses(aux))
    twice = Remembers("values")
    with pytest.raises(
        ConfigError, match=r"stage \d reads kept of 0, which stage \d has, too, and sets there"
    ):
        compared(twice, twice)


@pytest.mark.parametrize("length", [1, 3, 4])
def test_a_table_that_stages_have_may_be_made_anew(length):
    table = Table(length)
    compared(Reads(table), Reads(table))


@pytest.mark.parametrize(("what", "warned"), [("table", False), ("count", True)])
def test_what_a_layer_of_two_stages_makes_alike_may_stay(what, warned, caplog):
    twice = Remembers(what)
    compared(twice, twice)
    assert ("changes numbers of 0.kept, which another stage has, too" in caplog.text) == warned


def test_what_is_followed():
    x, other = torch.ones(3), torch.ones(3)
    with Hanging([x]) as hanging:
        y, z, into = (2.0 * x)[1:], other + 1.0, torch.zeros(3)
        into[0] = x[1]
        a = int(other.sum())
        assert not hanging.may_have(a)
        b = float(x.sum())
    values = y, {"z": [z]}, into, (other, y), SimpleNamespace(u=z), SimpleNamespace(u=[y]), b
    assert [hanging.has(value) for value in values] == [True, False, True, True, False, True, False]
    assert [hanging.may_have(value) for value in (b, {"b": "high"}, [z], np.ones(1))] == [
        True,
        True,
        False,
        True,
    ]


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
    held = held_by([("0", Holds(text="x", count=3, module=torch, logger=LOGGER))])
    assert not {"0.text", "0.count", "0.module", "0.logger"} & {name for name, _ in held.values()}


WAYS = {
    "a class": lambda x: setattr(Slotted, "of_class", x),
    "a function": lambda x: setattr(changed, "last", x),
    "a global": lambda x: globals().__setitem__("LATEST", x),
    "slots": lambda x: setattr(OBJECT, "last", x),
    "a tensor": lambda x: NUMBERS.copy_(x.detach().sum()),
    "a queue": lambda x: QUEUE.put(x),
    "a context": lambda x: CONTEXT.set(x),
}


NUMBERED = {
    "an array": lambda x: ARRAY.__setitem__(0, float(x.detach().sum())),
    "a word": lambda x: TABLE.__setitem__("word", "high" if bool(x.sum() > 0) else "low"),
    "a log": lambda x: LINES.append(x.std().item()),
}


class Tells(nn.Module):
    """Tells the next one in one of these ways."""

    def __init__(self, way):
        super().__init__()
        self.way = (WAYS | NUMBERED)[way]

    def forward(self, x):
        self.way(2.0 * x)
        return x if LATEST is None else x + 1.0


@pytest.mark.parametrize("way", WAYS)
def test_other_ways_to_tell_something(way):
    with pytest.raises(ConfigError, match="stage 0 changes .*, which another stage has"):
        told(Tells(way), Tells(way))


@pytest.mark.parametrize("way", NUMBERED)
def test_numbers_are_only_told_of(way, caplog):
    """They are a log more often than a secret."""
    told(Tells(way), Tells(way))
    assert "stage 0 changes numbers of" in caplog.text


def test_what_the_loss_holds_counts():
    total: list[torch.Tensor] = []
    asides = Asides([("0", Holds(own=total)), ("1", nn.Identity())], [(0, 1), (1, 2)])
    assert not asides.shared[0]
    asides.add("the loss", SimpleNamespace(terms=total))
    layer, x = Holds(own=total), torch.ones(2, 3)
    with pytest.raises(ConfigError, match="as the loss"), asides.watching(0, [x]):
        layer(x)


class Makes(OrderedDict):
    """Makes what is asked for, as a table of activations may."""

    def __getitem__(self, name):
        return super().__getitem__(name)()


class Frozen(dict):
    """Can't be changed."""

    def update(self, *_):
        raise TypeError("frozen")

    clear = __setitem__ = __copy__ = update


def test_what_has_ways_of_its_own_is_left_alone():
    table, frozen = Makes(relu=nn.ReLU), Frozen({"a": 1})
    with untouched([("0", Holds(table=table, frozen=frozen))]):
        dict.__setitem__(frozen, "a", 2)
    assert dict.__getitem__(table, "relu") is nn.ReLU
    assert frozen == {"a": 2}


def test_hooks_of_layers_are_looked_at():
    common: list[torch.Tensor] = []
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    first.register_forward_hook(lambda module, given, found: common.append(found))
    second.register_forward_pre_hook(lambda module, given: (given[0] + common.pop(),))
    with pytest.raises(ConfigError, match="stage 0 changes a hook of 0: common"):
        told(first, second)
