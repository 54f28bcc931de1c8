"""Models built without memory: weights by seed and name, whatever a constructor does to them."""

import copy
import resource

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

from hpctrain import hidden
from hpctrain.config import ClassPath
from hpctrain.errors import ConfigError
from hpctrain.models import build as models
from hpctrain.models import deferred, untold
from hpctrain.models.deferred import Deferred
from hpctrain.models.lines import named_key


@pytest.fixture(autouse=True)
def every_model_is_large(monkeypatch):
    monkeypatch.setattr(deferred, "AS_EVER", 0)


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
        self.more = nn.Linear(3, 3) if self.w.shape[0] > 3 else None
        self.table = {"scale": torch.rand(50), "name": "plain attributes are made whole"}


def row():
    return nn.Sequential(
        nn.Linear(20, 20), nn.Conv2d(4, 4, 3), nn.Embedding(50, 6), nn.LSTM(12, 12, 2), nn.BatchNorm1d(70)
    )


def attention():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 3)


def normed():
    return weight_norm(nn.Linear(20, 20))


DRAWS = {
    Own: [
        "w", "e.weight", "e.bias", "dropped", "t.bias", "w", "e.weight", None, "chosen", "more.weight",
        "more.bias", ".table.0",
    ],
    row: [
        "0.weight", "0.bias", "1.weight", "1.bias", "2.weight",
        *(f"3.{kind}_{way}_l{layer}" for layer in (0, 1) for kind in ("weight", "bias") for way in ("ih", "hh")),
    ],
    attention: [
        "layers.0.self_attn.out_proj.weight", "dropped", "layers.0.self_attn.in_proj_weight",
        "layers.0.linear1.weight", "layers.0.linear1.bias", "layers.0.linear2.weight", "layers.0.linear2.bias",
    ],
    normed: ["parametrizations.weight.original0", "bias"],
}  # fmt: skip
"""What each draw of a constructor is for, in its order; None for one of a generator of its own."""


class Seeded(TorchDispatchMode):
    """Sets the generator for each draw, as a constructor runs as ever."""

    def __init__(self, names, seed):
        super().__init__()
        self.names, self.seed, self.count = names, seed, {}

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if torch.Tag.nondeterministic_seeded in function.tags:
            name = self.names.pop(0)
            if name is not None:
                number = self.count[name] = self.count.get(name, -1) + 1
                torch.manual_seed(named_key(self.seed, name, number))
        return function(*arguments, **(named or {}))


def of(make):
    with Seeded([*DRAWS[make]], 3) as seeded:
        plain = make()
    assert not seeded.names
    torch.manual_seed(3)
    written = Deferred(3)
    with written:
        module = make()
    written.complete(module)
    return plain, module, written


def test_a_key_is_of_seed_name_and_number():
    assert len({named_key(s, n, k) for s in (0, 1) for n in ("a", "b", "0.a") for k in (0, 1)}) == 12
    assert named_key(0, "0.weight", 0) == 3333910756554346723


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("make", [Own, row, attention, normed])
@pytest.mark.parametrize("small", [0, 16, 4096])
def test_every_tensor_has_the_numbers_of_its_name(monkeypatch, make, small):
    monkeypatch.setattr(deferred, "SMALL", small)
    plain, module, written = of(make)
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
    with Seeded(["weight", "bias", "table", "kept"], 3):
        plain = buffered()
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
    assert vars(nn.Parameter)["__new__"] is untold.MAKES
    assert isinstance(untold.MAKES, staticmethod)
    with pytest.raises(ConfigError, match="no such width"):
        models.without_memory(ClassPath("test_deferred.failing", {}), 3)


def whole(name, seed=3, **arguments):
    """Give a model of this module's, built whole."""
    return models.build(ClassPath(f"test_deferred.{name}", arguments), seed)


class Named(nn.Module):
    """Two layers, and others before and between them."""

    def __init__(self, more=False):
        super().__init__()
        if more:
            self.front, self.small = nn.Linear(90, 90), nn.Parameter(torch.rand(3))
        self.first = nn.Linear(80, 80)
        if more:
            self.drawn = torch.rand(5).tolist()
        self.second = nn.Linear(80, 3)
        if more:
            nn.init.normal_(self.front.weight)


def test_a_layer_in_front_changes_no_other_ones_weights():
    one, other = whole("Named").state_dict(), whole("Named", more=True).state_dict()
    assert len(other) == len(one) + 3
    assert all(torch.equal(value, other[name]) for name, value in one.items())


class Counted(TorchDispatchMode):
    """Counts the random numbers that are drawn."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        drawn = torch.Tag.nondeterministic_seeded in function.tags
        if drawn and arguments[0].device.type != "meta" and not isinstance(arguments[0], FakeTensor):
            self.count += arguments[0].numel()
        return function(*arguments, **(named or {}))


def large():
    return nn.Sequential(*(nn.Linear(100, 100, bias=False) for _ in range(10)))


def test_nobody_draws_the_numbers_of_others():
    with Counted() as counted:
        module, written, _ = models.without_memory(ClassPath("test_deferred.large", {}), 3)
        assert counted.count == 0
        written.materialise(module, [module[4].weight], "cpu")
    assert counted.count == 100 * 100
    assert torch.equal(module[4].weight, whole("large")[4].weight)


def truncating(std=1.0, size=100, a=-2.0):
    layer = nn.Linear(size, size)
    nn.init.trunc_normal_(layer.weight, std=std, a=a)
    return layer


@pytest.mark.parametrize("size", [10, 100])
@pytest.mark.parametrize("a", [-2.0, 1.5])
def test_a_truncated_normal_distribution_is_torchs(size, a):
    """It is drawn by rejection: it looks at its numbers."""
    found = whole("truncating", size=size, a=a).weight.detach()
    expected = torch.empty(size, size)
    torch.manual_seed(named_key(3, "weight", 1))
    nn.init.trunc_normal_(expected, a=a)
    assert torch.equal(found, expected)
    assert a <= float(found.min())
    assert float(found.max()) <= 2
    module, _, _ = models.without_memory(ClassPath("test_deferred.truncating", {}), 3)
    assert isinstance(module.weight, FakeTensor)
    assert nn.init._no_grad_trunc_normal_ is untold.TRUNCATES


class Looking(nn.Module):
    """Looks at its numbers in all ways."""

    def __init__(self, size=5):
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (nn.Parameter(torch.randn(size)) for _ in range(5))
        self.item, self.list = float(self.a[0]), self.b[:3].tolist()
        self.numpy = self.c.detach().numpy().copy() if size < 100 else None
        self.above = self.d.detach()[self.d.detach() > 0] if size < 100 else None
        with torch.no_grad():
            self.a[1:].mul_(2)

    def agrees(self):
        whole = self.numpy is None or (
            self.numpy.tolist() == self.c.tolist() and torch.equal(self.above, self.d[self.d > 0])
        )
        return whole and self.item == float(self.a[0]) and self.list == self.b[:3].tolist()


def test_what_a_constructor_looks_at_stays_what_it_saw():
    module, _, reason = models.without_memory(ClassPath("test_deferred.Looking", {}), 3)
    assert (reason, module.agrees()) == ("", True)
    torch.manual_seed(named_key(3, "e", 0))
    assert torch.equal(module.e, torch.randn(5))


class Seeding(nn.Module):
    """Sets the generator itself, small weights and large ones."""

    def __init__(self, size=5):
        super().__init__()
        self.before = nn.Parameter(torch.randn(size))
        with torch.random.fork_rng():
            torch.manual_seed(17)
            self.a, self.b = nn.Parameter(torch.randn(size)), nn.Parameter(torch.randn(size))
        self.behind = nn.Parameter(torch.randn(size))


@pytest.mark.parametrize("size", [5, 5000])
def test_what_a_constructor_seeds_itself_has_those_numbers(size):
    found = whole("Seeding", size=size)
    torch.manual_seed(17)
    assert torch.equal(found.a, torch.randn(size))
    assert torch.equal(found.b, torch.randn(size))
    for name in ("before", "behind"):
        torch.manual_seed(named_key(3, name, 0))
        assert torch.equal(getattr(found, name), torch.randn(size))


def changed_unseen():
    layer = nn.Linear(5, 5)
    layer.weight.detach().numpy()[0, 0] = 7
    return layer


def test_small_weights_that_numpy_changes_are_built_as_ever():
    module, written, reason = models.without_memory(ClassPath("test_deferred.changed_unseen", {}), 3)
    assert written is None
    assert "in a way that torch does not see" in reason
    torch.manual_seed(3)
    assert torch.equal(module.weight[1:], nn.Linear(5, 5).weight[1:])
    assert float(module.weight[0, 0]) == 7


def converted(to):
    """Each conversion gives a parameter another memory."""
    return nn.Conv2d(4, 4, 3).to(**to)


@pytest.mark.parametrize(
    "to", [{"dtype": torch.float64}, {"memory_format": torch.channels_last}, {"dtype": torch.bfloat16}]
)
def test_conversions_are_those_of_the_same_numbers(to):
    module, _, reason = models.without_memory(ClassPath("test_deferred.converted", {"to": to}), 3)
    assert reason == ""
    expected = whole("converted", to={}).to(**to)
    for found, wanted in zip(module.parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, wanted)
        assert found.stride() == wanted.stride()


def with_copy(size=5):
    layer = nn.Linear(size, size)
    layer.register_buffer("drawn", torch.rand(size, size))
    return nn.ModuleList([layer, copy.deepcopy(layer)])


@pytest.mark.parametrize("size", [5, 100])
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_copy_has_the_numbers_of_what_it_copies(size):
    module, written, reason = models.without_memory(ClassPath("test_deferred.with_copy", {"size": size}), 3)
    assert reason == ""
    written.materialise(module, [*module.parameters(), *module.buffers()], "cpu")
    one, other = (each.state_dict() for each in module)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    torch.manual_seed(named_key(3, "0.drawn", 0))
    assert torch.equal(one["drawn"], torch.rand(size, size))


class Halves(nn.Module):
    def __init__(self, size=100):
        super().__init__()
        both = torch.randn(2 * size, size)
        self.register_buffer("one", both[:size])
        self.register_buffer("every", both)


@pytest.mark.parametrize("size", [5, 100])
def test_views_of_one_memory_stay_views_of_it(size):
    layer = nn.Sequential(Halves(size), nn.Linear(2, 2))
    assert layer[0].one.data_ptr() == layer[0].every.data_ptr()
    found = whole("viewed", size=size)[0]
    found.every.zero_()
    assert not found.one.any()


def viewed(size):
    return nn.Sequential(Halves(size), nn.Linear(2, 2))


class Tried(nn.Module):
    """Runs a forward, to know a size; its BatchNorm moves on."""

    def __init__(self):
        super().__init__()
        self.front = nn.Sequential(nn.Conv2d(3, 20, 9), nn.BatchNorm2d(20), nn.Flatten())
        with torch.no_grad():
            self.head = nn.Linear(self.front(torch.ones(2, 3, 10, 10)).shape[1], 2)


@pytest.mark.parametrize("small", [0, 16, 4096, 10**6])
def test_a_forward_in_the_constructor_moves_statistics(monkeypatch, small):
    monkeypatch.setattr(deferred, "SMALL", small)
    found = whole("Tried")
    with torch.no_grad():
        mean = found.front[0](torch.ones(2, 3, 10, 10)).mean((0, 2, 3))
    assert found.head.in_features == 80
    torch.testing.assert_close(found.front[1].running_mean, 0.1 * mean)  # another order of the same sum
    assert int(found.front[1].num_batches_tracked) == 1


def with_sparse():
    layer = nn.Linear(5, 5)
    layer.register_buffer("sparse", torch.rand(5, 5).to_sparse())
    return layer


def of_a_vector():
    """A small parameter becomes part of a large one's memory."""
    layer = nn.Linear(100, 100)
    nn.utils.vector_to_parameters(2 * nn.utils.parameters_to_vector(layer.parameters()), layer.parameters())
    return layer


@pytest.mark.parametrize(("name", "why"), [("with_sparse", "sparse"), ("of_a_vector", "part of another")])
def test_what_could_not_be_made_is_built_as_ever(name, why):
    module, written, reason = models.without_memory(ClassPath(f"test_deferred.{name}", {}), 3)
    assert written is None
    assert why in reason
    torch.manual_seed(3)
    plain = globals()[name]()
    assert torch.equal(module.weight, plain.weight)


def test_only_a_large_model_is_built_without_memory(monkeypatch):
    """What is made as ever is counted; the rest is shapes."""
    monkeypatch.setattr(deferred, "AS_EVER", 55_000)
    module, written, _ = models.without_memory(ClassPath("test_deferred.large", {}), 3)
    assert [isinstance(p, FakeTensor) for p in module.parameters()] == [False] * 5 + [True] * 5
    written.materialise(module, module.parameters(), "cpu")
    monkeypatch.setattr(deferred, "AS_EVER", 0)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), whole("large").parameters()))
