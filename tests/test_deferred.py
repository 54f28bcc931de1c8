"""Models built without memory: the plain constructor's bits, whatever it does to its weights."""

import resource

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils.parametrizations import weight_norm

from hpctrain import hidden
from hpctrain.config import ClassPath
from hpctrain.errors import ConfigError
from hpctrain.models import build as models
from hpctrain.models import deferred
from hpctrain.models.deferred import Deferred


class Own(nn.Module):
    """What constructors do: scale, tie, look at numbers, write into parts, draw from a generator of their own."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.w = nn.Parameter(torch.randn(30, 30) * 0.02)
        self.e, self.t = nn.Linear(30, 30), nn.Linear(30, 30)
        self.e.weight.data.mul_(2.0)
        self.t.weight = self.e.weight
        nn.init.orthogonal_(self.w[:, :10].detach())
        nn.init.trunc_normal_(self.t.weight, std=0.1)
        scale = torch.full((10,), 2.0)
        with torch.no_grad():
            self.w[:, :10].mul_(scale)
            scale.zero_()  # what was done with it before must not change
            self.t.weight[:, 5] = 0
            self.w.copy_(self.w @ self.w.t())
            self.w[3].normal_(generator=generator)
        self.register_buffer("mask", torch.tril(torch.ones(20, 20)))
        self.register_buffer("chosen", torch.bernoulli(torch.full((40,), 0.5)))
        self.rates = [float(r) for r in torch.linspace(0, 1, 40)]
        self.more = nn.Linear(3, 3) if self.w[0, 0] > -100 else None
        self.table = {"scale": torch.rand(50), "name": "plain attributes are made whole"}


def row():
    return nn.Sequential(
        nn.Linear(20, 20), nn.Conv2d(4, 4, 3), nn.Embedding(50, 6), nn.LSTM(12, 12, 2), nn.BatchNorm1d(70)
    )


def attention():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 3)


def normed():
    return weight_norm(nn.Linear(20, 20))


def of(make, small=1):
    torch.manual_seed(3)
    plain = make()
    end = torch.random.get_rng_state()
    torch.manual_seed(3)
    written = Deferred()
    with written:
        module = make()
    assert torch.equal(end, torch.random.get_rng_state())
    return plain, module, written


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("make", [Own, row, attention, normed])
@pytest.mark.parametrize("small", [0, 16, 4096])
def test_every_tensor_has_the_bits_of_the_plain_constructor(monkeypatch, make, small):
    monkeypatch.setattr(deferred, "SMALL", small)
    plain, module, written = of(make)
    assert bool(written.lines) == (small < 4096)
    written.complete(module)
    written.materialise(module, [*module.parameters(), *module.buffers()], "cpu")
    expected, found = plain.state_dict(), module.state_dict()
    assert list(expected) == list(found)
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
        assert value.stride() == found[name].stride()
    assert [type(p) for p in module.parameters()] == [nn.Parameter] * len(list(plain.parameters()))
    if make is Own:
        assert module.e.weight is module.t.weight
        assert torch.equal(module.table["scale"], plain.table["scale"])
        assert module.rates == plain.rates


def test_only_what_is_wanted_is_made(monkeypatch):
    monkeypatch.setattr(deferred, "SMALL", 0)
    plain, module, written = of(row)
    written.materialise(module, [module[2].weight], "cpu")
    assert torch.equal(module[2].weight, plain[2].weight)
    assert isinstance(module[0].weight, FakeTensor)
    assert isinstance(module[3].weight_hh_l1, FakeTensor)


def noted():
    """What a constructor writes on a parameter, for an optimizer of its own, say."""
    layer = nn.Linear(100, 100)
    layer.weight.decays, layer.weight.groups = False, ["slow"]
    return layer


def masked():
    layer = nn.Linear(100, 100)
    layer.weight.mask = torch.ones(100, 100)
    return layer


def buffered():
    """As transformers registers its rotary frequencies."""
    layer = nn.Linear(100, 100)
    layer.table, layer.kept = (
        nn.Buffer(torch.rand(100, 100), persistent=False),
        nn.Buffer(torch.rand(100, 100)),
    )
    return layer


class Kind(nn.Parameter):
    pass


def of_a_kind():
    layer = nn.Linear(100, 100)
    layer.weight = Kind(torch.ones(100, 100))
    return layer


class Listing(nn.Module):
    """Keeps its weights, and something else, in a list, too."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(100, 100)
        self.every = [self.line.weight, torch.ones(100, 100)]


def hooked():
    layer = nn.Linear(100, 100)
    layer.weight.register_hook(lambda g: 2 * g)
    return layer


def test_what_stands_on_a_parameter_stays_there():
    module, written, _ = models.without_memory(ClassPath("test_deferred.noted", {}), 3)
    assert isinstance(module.weight, FakeTensor)
    written.materialise(module, [module.weight], "cpu")
    assert type(module.weight) is nn.Parameter
    assert vars(module.weight) == {"decays": False, "groups": ["slow"]}


def test_a_note_on_a_real_tensor_may_have_any_name():
    weight = nn.Parameter(torch.ones(2))
    weight.constant = 3  # torch keeps one of that name where a tensor has no memory
    assert "constant" in hidden.own()
    assert hidden.notes_on(weight) == {"constant": 3}


def test_what_is_kept_twice_stays_one():
    module, written, _ = models.without_memory(ClassPath("test_deferred.Listing", {}), 3)
    assert torch.equal(module.every[1], torch.ones(100, 100))
    assert isinstance(module.line.weight, FakeTensor)
    written.materialise(module, [module.line.weight], "cpu")
    assert module.every[0] is module.line.weight
    assert type(module.line.weight) is nn.Parameter


def test_a_model_of_a_terabyte_can_be_built():
    """And a layer of it made: nothing else takes memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def make():
        layers = [nn.Linear(16, 16) for _ in range(3)]
        layers[1] = nn.utils.skip_init(nn.Linear, 500_000, 500_000)
        return nn.Sequential(*layers)

    with Deferred() as written:
        module = make()
    written.materialise(module, list(module[0].parameters()), "cpu")
    assert module[1].weight.nbytes == 10**12
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def look_at_all():
    """A constructor that takes a large tensor's memory as numpy."""
    layer = nn.Linear(100, 100)
    layer.weight.detach().numpy()[:] = 1
    return layer


def failing(width: int = 3):
    raise ValueError("no such width")


def test_buffers_that_are_assigned_are_made_without_memory_too():
    module, written, reason = models.without_memory(ClassPath("test_deferred.buffered", {}), 3)
    assert reason == ""
    assert isinstance(module.table, FakeTensor)
    written.materialise(module, [module.table, module.kept], "cpu")
    plain, _, _ = of(buffered)
    for name, persistent in (("table", False), ("kept", True)):
        found = getattr(module, name)
        assert torch.equal(found, getattr(plain, name))
        assert isinstance(found, nn.Buffer)
        assert found.persistent is persistent
    assert module.state_dict().keys() == plain.state_dict().keys()


def test_what_cannot_run_without_memory_is_built_whole():
    module, written, reason = models.without_memory(ClassPath("test_deferred.look_at_all", {}), 3)
    assert written is None
    assert bool((module.weight == 1).all())
    assert reason
    module, written, reason = models.without_memory(ClassPath("test_deferred.hooked", {}), 3)
    assert (written, len(module.weight._backward_hooks)) == (None, 1)
    assert "a hook on the gradient of weight" in reason
    for name, why in (("masked", "mask is noted on weight"), ("of_a_kind", "Kind is a kind of nn.Parameter")):
        module, written, reason = models.without_memory(ClassPath(f"test_deferred.{name}", {}), 3)
        assert written is None
        assert why in reason
    assert type(module.weight) is Kind
    assert vars(nn.Parameter)["__new__"] is deferred.MAKES
    assert isinstance(deferred.MAKES, staticmethod)
    with pytest.raises(ConfigError, match="no such width"):
        models.without_memory(ClassPath("test_deferred.failing", {}), 3)


def made(name, **arguments):
    """Build a model of this module's without memory, and make all of it; the plain one beside it."""
    module, written, reason = models.without_memory(ClassPath(f"test_deferred.{name}", arguments), 3)
    if written:
        written.materialise(module, [*module.parameters(), *module.buffers()], "cpu")
    torch.manual_seed(3)
    return module, globals()[name](**arguments), reason


class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        self.line, both = nn.Linear(2, 2), torch.randn(200, 100)
        self.register_buffer("one", both[:100])
        self.register_buffer("every", both)


def test_views_of_one_memory_stay_views_of_it():
    found, plain, reason = made("Halves")
    assert reason == ""
    assert torch.equal(found.every, plain.every)
    found.every.zero_()
    assert not found.one.any()


class Tried(nn.Module):
    """Runs a forward, to know a size; its BatchNorm moves on."""

    def __init__(self):
        super().__init__()
        self.front = nn.Sequential(nn.Conv2d(3, 20, 9), nn.BatchNorm2d(20), nn.Flatten())
        with torch.no_grad():
            self.head = nn.Linear(self.front(torch.ones(2, 3, 10, 10)).shape[1], 2)


@pytest.mark.parametrize("small", [0, 16, 4096])
def test_a_forward_in_the_constructor_moves_statistics(monkeypatch, small):
    monkeypatch.setattr(deferred, "SMALL", small)
    found, plain, _ = made("Tried")
    assert float(plain.front[1].running_mean.abs().max()) > 0
    for name, value in plain.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name


def with_sparse():
    layer = nn.Linear(5, 5)
    layer.register_buffer("sparse", torch.eye(100).to_sparse())
    return layer


def of_a_vector():
    """A small parameter becomes part of a large one's memory."""
    layer = nn.Linear(100, 100)
    nn.utils.vector_to_parameters(2 * nn.utils.parameters_to_vector(layer.parameters()), layer.parameters())
    return layer


@pytest.mark.parametrize(("name", "why"), [("with_sparse", "sparse"), ("of_a_vector", "part of another")])
def test_what_could_not_be_made_is_built_whole(name, why):
    found, plain, reason = made(name)
    assert why in reason
    assert torch.equal(found.weight, plain.weight)
