"""Straight into place gives autograd's gradients, and steps aside for whoever could tell."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hpctrain import gradient, products, waiting
from hpctrain.averaging.across import Bucket
from hpctrain.averaging.places import Places
from hpctrain.averaging.space import deal
from hpctrain.draws import Draws
from hpctrain.gradient import StraightIntoPlace
from hpctrain.tensors import OurHook


class Owner:
    """Places as the averager gives them."""

    def __init__(self, module):
        self.places = {id(p): torch.full_like(p, 7.0) for p in module.parameters()}
        self.joined, self.caught, self.back, self.waits = [], [], [], True
        for p in (p for p in module.parameters() if p.requires_grad):
            p.register_post_accumulate_grad_hook(OurHook(self.ready))

    def place(self, parameter):
        return self.places[id(parameter)], id(parameter) not in self.joined

    def ready(self, parameter):
        place = self.places[id(parameter)]
        if parameter.grad is not None:
            dense = parameter.grad if parameter.grad.layout == torch.strided else parameter.grad.to_dense()
            if parameter.grad is not place:
                place.copy_(dense)
            self.filled(parameter)

    def later(self, *parameters):
        return self.waits

    def left(self, *parameters, waits):
        return False

    def came(self):
        pass

    def taken_back(self, parameter):
        self.back.append(id(parameter))

    def caught_up(self, parameter):
        self.caught.append(id(parameter))

    def filled(self, parameter):
        parameter.grad = self.places[id(parameter)]
        self.joined.append(id(parameter))


@pytest.fixture(autouse=True)
def small_weights(monkeypatch):
    monkeypatch.setattr(gradient, "SMALLEST", 1)
    monkeypatch.setattr(gradient, "LARGE", 1)


class Tied(nn.Module):
    """One weight in two layers, one of them by a functional call."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3, bias=False)

    def forward(self, x):
        return self.b(torch.tanh(nn.functional.linear(torch.tanh(self.a(x)), weight=self.a.weight)))


def make(kind=Tied):
    torch.manual_seed(0)
    return kind()


def run(module, batches, work=None):
    """Gradients by autograd alone, and straight into place."""
    owner = Owner(module)
    straight = StraightIntoPlace(module, owner)
    for x in batches:
        with straight.forward():
            loss = (work or (lambda m, x: m(x).square().sum()))(module, x)
        with straight.accumulating():
            loss.backward()
    return {n: owner.places[id(p)] for n, p in module.named_parameters()}, owner


def expected(module, batches, work=None):
    for x in batches:
        (work or (lambda m, x: m(x).square().sum()))(module, x).backward()
    return {n: p.grad for n, p in module.named_parameters()}


@pytest.mark.parametrize("shape", [(4, 6), (2, 5, 6), (6,), (1, 6)])
@pytest.mark.parametrize("count", [1, 3])
def test_equals_autograd_for_tied_weights_and_accumulation(shape, count):
    torch.manual_seed(1)
    batches = [torch.randn(shape) for _ in range(count)]
    found, owner = run(make(), batches)
    for name, value in expected(make(), batches).items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
    tied = next(iter(owner.places))
    assert owner.joined.count(tied) >= 2 * count, "the weight that is used twice joins twice, in place"


class Made(TorchDispatchMode):
    """Lists the tensors of a shape that operators give, by where they lie."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.found = shape, []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        given = function(*arguments, **(named or {}))
        if isinstance(given, torch.Tensor) and given.shape == self.shape:
            self.found.append((given.data_ptr(), function.__name__))
        return given


@pytest.mark.parametrize("rows", [1, 4])
def test_a_product_is_added_where_it_belongs(rows):
    """The first is written there, later ones add to it: nothing of the weight's shape is made beside it."""
    module = make(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)))
    owner = Owner(module)
    straight = StraightIntoPlace(module, owner)
    place = owner.places[id(module[0].weight)].data_ptr()
    for first in (True, False, False):
        with straight.forward():
            loss = module(torch.randn(rows, 6)).square().sum()
        with straight.accumulating(), Made((5, 6)) as made:
            loss.backward()
        assert made.found == [(place, "mm.out" if first else "addmm_.default")]


@pytest.fixture
def mkl(monkeypatch):
    """The products as torch's own layers compute them, whose bits can then be compared."""
    monkeypatch.setattr(products, "AVAILABLE", False)


@pytest.mark.parametrize("name", ["linear", "embedding"])
def test_a_function_of_the_users_in_torchs_place_is_called(monkeypatch, name):
    torchs, called = getattr(functional, name), []
    monkeypatch.setattr(functional, name, lambda *args, **named: called.append(1) or torchs(*args, **named))
    module = nn.Linear(6, 4) if name == "linear" else nn.Embedding(6, 4)
    straight = StraightIntoPlace(module, Owner(module))
    assert straight.weights
    with straight.forward():
        module(torch.ones(2, 6) if name == "linear" else torch.arange(3))
    assert called == [1]


def test_the_same_bits_as_autograd_for_one_use(mkl):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    found, _ = run(make(lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))), [x])
    for name, value in expected(
        make(lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))), [x]
    ).items():
        assert torch.equal(found[name], value), name


def test_a_hook_on_the_weight_sees_the_gradient():
    module, plain = make(), make()
    for m in (module, plain):
        m.b.weight.register_hook(lambda g: g * 3)
    x = torch.randn(4, 6)
    found, _ = run(module, [x])
    torch.testing.assert_close(found["b.weight"], expected(plain, [x])["b.weight"])


def test_gradients_that_the_users_forward_asks_for_are_given_not_averaged():
    """A gradient penalty: torch.autograd.grad in the forward, differentiated again."""

    def work(module, x):
        inner = module(x).square().sum()
        (g,) = torch.autograd.grad(inner, module.a.weight, create_graph=True)
        (plain,) = torch.autograd.grad(module(x).sum(), module.b.weight)
        return inner + g.square().sum() + plain.sum()

    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
    found, _ = run(make(), [x], work)
    for name, value in expected(make(), [x], work).items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations(reentrant):
    def work(module, x):
        return checkpoint(module, x.requires_grad_(), use_reentrant=reentrant).square().sum()

    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(4))
    found, _ = run(make(), [x.clone()], work)
    for name, value in expected(make(), [x.clone()], work).items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_functorch_autocast_and_evaluation_take_their_own_way():
    def by_sample(module, x):
        weights = dict(module.named_parameters())

        def loss(row):
            return torch.func.functional_call(module, weights, (row,)).square().sum()

        return torch.func.vmap(loss)(x).sum()

    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))
    found, _ = run(make(), [x], by_sample)
    for name, value in expected(make(), [x], by_sample).items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
    module = make()
    owner = Owner(module)
    straight = StraightIntoPlace(module, owner)
    with torch.autocast("cpu", dtype=torch.bfloat16), straight.forward():
        assert module(x).dtype == torch.bfloat16
    with straight.forward(), torch.no_grad():
        assert not module(x).requires_grad


def test_a_mode_of_the_users_sees_the_layers():
    """Inside a forward, with one of ours beside it."""
    seen = []

    class Watching(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), named=None):
            seen.append(function)
            return function(*arguments, **(named or {}))

    module, linear = make(), functional.linear
    straight = StraightIntoPlace(module, Owner(module))
    with straight.forward(), Draws(1), Watching():
        assert "Linear" not in type(module(torch.randn(4, 6)).grad_fn).__name__
    assert linear in seen
    assert functional.linear is linear
    with straight.forward(), Draws(1):
        assert functional.linear.__name__ == linear.__name__


class Own(torch.Tensor):
    """A user's kind of tensor."""


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: functional.linear(x, m.a.weight, torch.zeros(4, 6)),
        lambda m, x: functional.linear(x.to_sparse(), m.a.weight),
        lambda m, x: functional.linear(x, m.a.weight, m.a.bias.as_subclass(Own)),
        lambda m, x: functional.linear(x.as_subclass(Own), m.a.weight),
    ],
)
def test_calls_of_other_kinds_are_torchs(call):
    """A bias for each row, sparse numbers, tensors of a kind of their own."""
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))

    def work(module, x):
        return call(module, x).square().sum() + module(x).sum()

    found, _ = run(make(), [x], work)
    for name, value in expected(make(), [x], work).items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_forward_mode_gradients_are_torchs():
    module, x = make(), torch.randn(4, 6)
    straight = StraightIntoPlace(module, Owner(module))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with straight.forward():
            found = torch.autograd.forward_ad.unpack_dual(module(dual)).tangent
        wanted = torch.autograd.forward_ad.unpack_dual(module(dual)).tangent
    assert torch.equal(found, wanted)


def test_a_wrong_call_has_torchs_words():
    straight = StraightIntoPlace(make(), Owner(make()))
    with straight.forward(), pytest.raises(TypeError, match="invalid combination of arguments"):
        functional.conv1d(torch.zeros(1, 2, 3), None)


def test_a_frozen_weight_and_a_frozen_bias():
    def frozen():
        module = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2))
        module[0].weight.requires_grad_(False)
        module[1].bias.requires_grad_(False)
        return module

    torch.manual_seed(6)
    module, x = frozen(), torch.randn(3, 6)
    places = Owner(module)
    owner = places.places
    for place in owner.values():
        place.zero_()
    straight = StraightIntoPlace(module, places)
    with straight.forward():
        loss = module(x).square().sum()
    with straight.accumulating():
        loss.backward()
    (g,) = torch.autograd.grad(module(x).square().sum(), module[1].weight)
    torch.testing.assert_close(owner[id(module[1].weight)], g)
    assert module[0].weight.grad is None
    assert not owner[id(module[0].weight)].any()
    assert module[1].bias.grad is None


class Words(nn.Module):
    """A table that is looked up twice in a forward, one row of it padding; maybe tied to the head."""

    def __init__(self, tied=False, padding=None, **options):
        super().__init__()
        self.table = nn.Embedding(11, 4, padding_idx=padding, **options)
        self.head = nn.Linear(4, 11, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(torch.tanh(self.table(x))) + self.table(x.flip(0)).sum(-1, keepdim=True)


def lookups(count, kind=torch.int64):
    generator = torch.Generator().manual_seed(8)
    return [torch.randint(0, 11, (5, 3), generator=generator).to(kind) for _ in range(count)]


@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_an_embedding_adds_its_rows_in_place(kind, padding, tied, count):
    batches = lookups(count, kind)
    found, owner = run(make(lambda: Words(tied, padding)), batches)
    for name, value in expected(make(lambda: Words(tied, padding)), batches).items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
    table = next(iter(owner.places))
    assert owner.joined.count(table) >= 2 * count, "two lookups join twice, in place"


def test_an_embedding_looked_up_once_has_autograds_bits(mkl):
    def once():
        return make(lambda: nn.Sequential(nn.Embedding(7, 300), nn.Tanh(), nn.Linear(300, 2)))

    x = torch.randint(0, 7, (40, 9), generator=torch.Generator().manual_seed(1))
    found, _ = run(once(), [x])
    for name, value in expected(once(), [x]).items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("options", [{"sparse": True}, {"scale_grad_by_freq": True}, {"max_norm": 1.0}])
def test_special_embeddings_take_their_own_way_or_agree(options):
    found, _ = run(make(lambda: Words(**options)), lookups(1))
    for name, value in expected(make(lambda: Words(**options)), lookups(1)).items():
        value = value.to_dense() if value.layout != torch.strided else value
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_a_gradient_of_an_embeddings_gradient():
    def work(module, x):
        inner = module(x).square().sum()
        (g,) = torch.autograd.grad(inner, module.table.weight, create_graph=True)
        return inner + g.square().sum()

    found, _ = run(make(Words), lookups(1), work)
    for name, value in expected(make(Words), lookups(1), work).items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_autocast_that_begins_inside_the_forward_takes_its_own_way():
    """As the engine does it: the mode is entered first."""

    def work(module, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = module(x)
        return out.float().square().sum()

    def two():
        return make(lambda: nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)))

    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    found, _ = run(two(), [x], work)
    for name, value in expected(two(), [x], work).items():
        assert torch.equal(found[name], value), name


def row():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))


def postponed(batches, merges, after):
    """Gradients whose products wait; `after` micro-batch v those of some are computed."""
    module = make(row)
    owner = Owner(module)
    straight = StraightIntoPlace(module, owner, merges)
    straight.begin(len(batches))
    for v, x in enumerate(batches):
        with straight.forward():
            loss = module(x).square().sum()
        with straight.accumulating(v):
            loss.backward()
        before = len(owner.joined)
        for due in after.get(v, []):
            straight.weights_of(due, last=due == len(batches) - 1)
        yield v, owner, len(owner.joined) - before, module


def test_products_that_wait_give_the_same_bits():
    batches = [torch.randn(7, 6, generator=torch.Generator().manual_seed(v)) for v in range(4)]
    expected_places, _ = run(make(row), batches)
    found = list(postponed(batches, False, {1: [0], 3: [1, 2, 3]}))
    counts, (_, owner, _, module) = [count for _, _, count, _ in found], found[-1]
    assert counts == [0, 3, 0, 9], "three weights, a product each of a micro-batch"
    assert len(owner.caught) == 3
    for name, parameter in module.named_parameters():
        assert torch.equal(owner.places[id(parameter)], expected_places[name]), name


def test_short_products_wait_for_one_another_and_give_the_same_bits(monkeypatch):
    """Four of 7 rows are enough for the first weight, 5 x 6; of the others two would be, and none waits."""
    monkeypatch.setattr(waiting, "WAITING_SHARE", 8.0)
    enough = [waiting.rows_together(layer.weight) for layer in make(row)[::2]]
    assert enough == [240 / 11, 160 / 9, 64 / 6]
    batches = [torch.randn(7, 6, generator=torch.Generator().manual_seed(v)) for v in range(7)]
    expected_places, _ = run(make(row), batches)
    found = list(postponed(batches, False, {v: [v] for v in range(7)}))
    counts, (_, owner, _, module) = [count for _, _, count, _ in found], found[-1]
    assert counts == [2, 2, 2, 6, 2, 2, 5]
    assert len(owner.caught) == 2 * 7 + 2
    for name, parameter in module.named_parameters():
        assert torch.equal(owner.places[id(parameter)], expected_places[name]), name


def whole_backwards(module, owner, batches):
    """Micro-batches whose backward is not split; their weights are asked for behind it."""
    straight = StraightIntoPlace(module, owner)
    straight.begin(len(batches))
    for v, x in enumerate(batches):
        with straight.forward():
            loss = module(x).square().sum()
        with straight.accumulating(v, whole=True):
            loss.backward()
        straight.weights_of(v, last=v == len(batches) - 1)
        yield v, straight


class Twice(nn.Module):
    """A weight that few rows use, then many, then few."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return torch.stack([self.layer(rows.clone()).square().sum() for rows in (x[:2], x, x[:3])])


def test_of_a_whole_backward_short_products_wait_and_none_goes_past_another(monkeypatch):
    """Autograd brings the last call's first: of each micro-batch one product of 3 rows, then 7, then 2.

    What waits is computed with the first that is long, or as soon as it is enough.
    """
    monkeypatch.setattr(waiting, "rows_together", lambda weight: 20.0)
    batches = [torch.randn(7, 6, generator=torch.Generator().manual_seed(v)) for v in range(3)]
    for work, waits in ((Twice, [2, 2, 0]), (lambda: nn.Linear(6, 6, bias=False), [0, 0, 0])):
        expected_places, _ = run(make(work), batches)
        module = make(work)
        owner = Owner(module)
        for v, straight in whole_backwards(module, owner, batches):
            assert sum(entry.rows for due in straight._waiting.values() for entry in due) == waits[v]
        (name, weight), *_ = module.named_parameters()
        assert owner.back == [id(weight)] * 3 * (work is Twice)
        assert torch.equal(owner.places[id(weight)], expected_places[name])


class First(nn.Module):
    """A layer of the first of many tokens."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return self.layer(x[:, 0])


def test_a_product_that_holds_a_large_tensor_does_not_wait(monkeypatch):
    monkeypatch.setattr(waiting, "rows_together", lambda weight: 20.0)
    module = make(First)
    straight = StraightIntoPlace(module, Owner(module))
    for tokens, waits in ((2, True), (3, False)):
        with straight.forward():
            loss = module(torch.ones(6, tokens, 6)).square().sum()
        with straight.accumulating(0):
            loss.backward()
        straight.weights_of(0, last=False)
        assert bool(straight.waiting_bytes) == bool(straight.together_bytes) == waits
        straight.weights_of(0, last=True)


class LaterLookedUp(nn.Module):
    """From the third forward on a layer's weight is looked up, too."""

    def __init__(self):
        super().__init__()
        self.layer, self.count = nn.Linear(6, 20, bias=False), 0

    def forward(self, x):
        self.count += 1
        rows = torch.arange(20)
        other = nn.functional.embedding(rows, self.layer.weight).sum() if self.count > 2 else 0.0
        return self.layer(x) + other


@pytest.mark.parametrize("what", ["looked up", "at once"])
def test_nothing_goes_past_what_waits(what, monkeypatch):
    monkeypatch.setattr(waiting, "rows_together", lambda weight: 100.0)
    kind = LaterLookedUp if what == "looked up" else lambda: nn.Linear(6, 20, bias=False)
    batches = [torch.randn(7, 6, generator=torch.Generator().manual_seed(v)) for v in range(5)]
    expected_places, _ = run(make(kind), batches)
    module = make(kind)
    owner = Owner(module)
    for v, _ in whole_backwards(module, owner, batches):
        owner.waits = what == "looked up" or v < 1  # in the next one
    (name, weight), *_ = module.named_parameters()
    assert owner.back == [id(weight)]
    assert torch.equal(owner.places[id(weight)], expected_places[name])


@pytest.mark.parametrize("of", ["x", "g"])
def test_what_waits_may_not_be_changed(of, monkeypatch):
    """The first step, in which nothing waits, sees who does that; later it is refused."""
    monkeypatch.setattr(waiting, "rows_together", lambda weight: 100.0)
    module, batch = make(lambda: nn.Linear(6, 6, bias=False)), torch.ones(3, 6)
    owner = Owner(module)
    straight = StraightIntoPlace(module, owner)

    def step(number, changes):
        owner.waits = number > 0
        straight.begin(2)
        for v in range(2):
            with straight.forward():
                found = module(batch)
            g = torch.ones(3, 6)
            with straight.accumulating(v, whole=True):
                found.backward(g)
            if changes:
                (batch if of == "x" else g).add_(1.0)
            straight.weights_of(v, last=v == 1)

    step(0, False)
    with pytest.raises(RuntimeError, match=r"weight of shape \(6, 6\) was given, or .* change a copy"):
        step(1, True)
    step(2, True)  # it waits no more
    straight = StraightIntoPlace(module, owner)
    step(0, True)
    step(1, True)


def test_merged_products_are_one(monkeypatch):
    """Up to the rounding of 28 terms in another order."""
    batches = [torch.randn(7, 6, generator=torch.Generator().manual_seed(v)) for v in range(4)]
    expected_places, _ = run(make(row), batches)
    monkeypatch.setattr(waiting, "MERGED_ROWS", 14)
    monkeypatch.setattr(waiting, "WAITING_SHARE", 8.0)
    found = list(postponed(batches, True, {v: [v] for v in range(4)}))
    counts, (_, owner, _, module) = [count for _, _, count, _ in found], found[-1]
    assert counts == [0, 3, 0, 3], "two micro-batches each are long enough"
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(owner.places[id(parameter)], expected_places[name], rtol=1e-5, atol=1e-6)


def test_products_of_many_rows_are_not_merged(monkeypatch):
    """Laying rows together would cost more than the pass over the weight's memory that it saves: strict's bits."""
    batches = [torch.randn(7, 6, generator=torch.Generator().manual_seed(v)) for v in range(4)]
    monkeypatch.setattr(waiting, "WAITING_SHARE", 2.0)  # 6 rows for 6 × 6
    behind = {v: [v] for v in range(4)}
    *_, (_, fast, _, module) = postponed(batches, True, behind)
    *_, (_, strict, _, other) = postponed(batches, False, behind)
    for (name, parameter), (_, same) in zip(module.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(fast.places[id(parameter)], strict.places[id(same)]), name


class HeadAndTable(nn.Module):
    """One matrix is embedding and head."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 6)
        self.head = nn.Linear(6, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(torch.tanh(self.table(x)))


def test_a_weight_that_an_embedding_adds_to_does_not_wait():
    """But in the first step, in which nothing waits, nobody can know; the order stays head, then table."""
    batches = [torch.randint(20, (700,), generator=torch.Generator().manual_seed(v)) for v in range(3)]
    expected_places, _ = run(make(HeadAndTable), batches)
    module = make(HeadAndTable)
    owner = Owner(module)
    straight = StraightIntoPlace(module, owner)
    for v, x in enumerate(batches):
        owner.waits = v > 0
        with straight.forward(v):
            loss = module(x).square().sum()
        with straight.accumulating(v):
            loss.backward()
        straight.weights_of(v, last=v == 2)
    assert not owner.caught
    assert torch.equal(owner.places[id(module.head.weight)], expected_places["table.weight"])


def convolutions(kind):
    """By name, with the shape of an input."""
    made = {
        "plain": (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 9, 7)),
        "no bias": (nn.Conv2d(4, 6, 2, bias=False), (2, 4, 5, 5)),
        "geometry": (nn.Conv2d(4, 8, 3, stride=(2, 1), padding=(1, 2), dilation=2, groups=2), (3, 4, 9, 9)),
        "one dimension": (nn.Conv1d(3, 5, 3, stride=2), (2, 3, 11)),
        "three dimensions": (nn.Conv3d(2, 4, 3, padding=1), (2, 2, 4, 5, 6)),
        "same": (nn.Conv2d(3, 4, 3, padding="same"), (2, 3, 6, 6)),
        "circular": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 6, 6)),
        "transposed": (nn.ConvTranspose2d(3, 4, 2, stride=2), (2, 3, 4, 4)),
    }
    return made[kind]


class Laid(nn.Module):
    """A linear layer whose input and output lie in the order of some dimensions."""

    def __init__(self, shape, order, bias=True):
        super().__init__()
        self.order, self.layer = order, nn.Linear(shape[order[-1]], 40, bias=bias)

    def forward(self, x):
        y = self.layer(x.permute(self.order)).permute(self.order)
        return torch.tanh(y.contiguous() * 0.1)


LIGHT = {
    "rows": ((70, 24), (0, 1)),
    "many rows": ((700, 24), (0, 1)),
    "wide": ((40, 1200), (0, 1)),
    "three dimensions": ((7, 11, 24), (0, 1, 2)),
    "transposed": ((11, 7, 24), (1, 0, 2)),
    "four dimensions": ((5, 3, 7, 24), (0, 1, 2, 3)),
    "four transposed": ((5, 3, 7, 24), (2, 0, 1, 3)),
}


@pytest.fixture
def light(monkeypatch):
    """Lets small weights' products be light; lists those that are called by us."""
    monkeypatch.setattr(gradient, "LARGE", 2**20)
    for name, value in (("AVAILABLE", False), ("TURNS", True), ("WIDE", 1), ("FEW", range(1, 999))):
        monkeypatch.setattr(products, name, value)
    called, apply = [], gradient.APPLY_LINEAR

    def applying(*given):
        called.append(given[-1])
        return apply(*given)

    monkeypatch.setattr(gradient, "APPLY_LINEAR", applying)
    return called


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("kind", LIGHT)
def test_light_products_have_autograds_bits(kind, waits, bias, light):
    """Left to it, or computed after the backward; in the first step all are called by us."""
    shape, order = LIGHT[kind]
    torch.manual_seed(0)
    plain = Laid(shape, order, bias)
    batches = [torch.randn(shape) for _ in range(3)]
    steps_have_autograds_bits(plain, batches, waits, count=3)
    assert light == [True] * (9 if waits else 3)


def test_a_product_is_light_by_its_shape_alone(light, monkeypatch):
    """A weight whose calls were left is looked at again where rows are few, or an input lies otherwise."""
    layer = nn.Linear(256, 320)
    straight, few = StraightIntoPlace(layer, real_places(layer)[0]), 11
    assert few < waiting.few_rows(layer.weight) < few + 1
    with straight.forward():
        for x, own in ((torch.ones(few, 256), False), (torch.ones(few + 1, 256), True)):
            layer(x)
            assert light.pop() == own
        layer(torch.ones(256, 99).t())
        assert light.pop() is False
    straight._places.begin()
    straight._places.begin()
    for rows in (few + 1, few, few + 1):
        with straight.forward():
            layer(torch.ones(rows, 256))
        assert light == [False] * (rows == few)
        light.clear()
    assert straight._settled == {id(layer.weight): waiting.few_rows(layer.weight) * 256}
    with straight.forward():
        layer(torch.ones(few + 1, 256))
        layer(torch.ones(few + 1, 256))
        layer(torch.ones(256, 99).t())
    assert light == [True, False], "of a forward's calls one may be left, and none that torch takes otherwise"
    light.clear()
    straight.nothing_waits(behind=[1])
    straight.at_once([layer.weight])
    for v in (0, 1):
        with straight.forward(v):
            layer(torch.ones(few + 1, 256))
    assert light == [True], "what is dear to split waits in the last micro-batches"
    light.clear()
    monkeypatch.setattr(gradient, "LARGE", 256 * 320)
    straight = StraightIntoPlace(layer, real_places(layer)[0])
    with straight.forward():
        layer(torch.ones(few + 1, 256))
    assert light == [False]


def test_by_fast_more_rows_are_few_and_light_products_wait_at_a_steps_end(light):
    """Up to those that are merged; no split is measured there."""
    layer = nn.Linear(256, 320)
    places, _ = real_places(layer)
    places.begin()
    places.begin()
    straight, merged = StraightIntoPlace(layer, places, fast=True), 35
    assert merged < waiting.rows_together(layer.weight) < merged + 1
    straight.nothing_waits(behind=[1])
    for v, rows, called in ((0, merged, [False]), (0, merged + 1, []), (1, merged + 1, [True])):
        with straight.forward(v):
            layer(torch.ones(rows, 256))
        assert light == called
        light.clear()


@pytest.mark.parametrize("when", ["before ours", "behind it"])
def test_a_users_hook_sees_each_gradient(when):
    """As autograd's: none goes past it into the place."""
    layer = nn.Linear(6, 5, bias=False)

    def double(parameter):
        parameter.grad.mul_(2.0)

    if when == "before ours":
        layer.weight.register_post_accumulate_grad_hook(double)
    places, flats = real_places(layer)
    if when == "behind it":
        layer.weight.register_post_accumulate_grad_hook(double)
    straight, x = StraightIntoPlace(layer, places), torch.randn(7, 6)
    places.begin()
    places.point(0, flats)
    with straight.forward():
        loss = layer(x).square().sum()
    with straight.accumulating():
        loss.backward()
    (own,) = torch.autograd.grad(layer(x).square().sum(), [layer.weight])
    torch.testing.assert_close(places.gradient("weight"), 2.0 * own)  # oneDNN may have computed the first


def test_a_weight_that_was_looked_up_is_not_left(light):
    """Else its product would join behind the rows, and before them where stages share it."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(30, 24)

        def forward(self, x):
            return functional.linear(self.table((x[:, 0] * 9).long().abs() % 30), self.table.weight)

    steps(Both(), [torch.randn(50, 4) for _ in range(2)], waits=False, count=3)
    assert light == [True] * 6


UNSEEN = ["same", "transposed"]
KINDS = ["plain", "no bias", "geometry", "one dimension", "three dimensions", "circular", *UNSEEN]


@pytest.fixture
def watched(monkeypatch):
    """Lets small filters be seen; lists what waits."""
    monkeypatch.setattr(gradient, "SMALLEST_FILTER", 1)
    found, later = [], Places.later

    def listing(self, *parameters):
        found.append((len(parameters), later(self, *parameters)))
        return found[-1][1]

    monkeypatch.setattr(Places, "later", listing)
    return found


def real_places(module):
    """The averaging's own, where gradients of two steps can go."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    spaces = deal(named, {id(p): 0 for p in named.values()}, 1)
    return Places(named, spaces), [torch.zeros(space.size) for space in spaces]


def steps(module, batches, waits, count=2):
    """Take steps; give the inputs' gradients of the last, and the places."""
    places, flats = real_places(module)
    straight = StraightIntoPlace(module, places)
    for _ in range(count):
        places.begin()
        places.point(0, flats)
        straight.begin(len(batches))
        own = [x.detach().clone().requires_grad_() for x in batches]
        for v, x in enumerate(own):
            with straight.forward(v if waits else -1):
                loss = module(x).square().sum()
            with straight.accumulating(v if waits else -1):
                loss.backward()
            if v:
                straight.weights_of(v - 1, last=False)
        straight.weights_of(len(own) - 1, last=True)
    return [x.grad for x in own], {n: places.place(p)[0] for n, p in places.named.items()}


def steps_have_autograds_bits(plain, batches, waits, count=2):
    """Of inputs and weights."""
    inputs, found = steps(copy.deepcopy(plain), batches, waits, count)
    for x, gradient_of_x in zip(batches, inputs, strict=True):
        own = x.clone().requires_grad_()
        plain(own).square().sum().backward()
        assert torch.equal(gradient_of_x, own.grad)
    for name, parameter in plain.named_parameters():
        assert torch.equal(found[name], parameter.grad), name


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_convolutions_have_autograds_bits(kind, waits, watched):
    """Computed in their backward or after it, in order; nothing waits in the first step."""
    layer, shape = convolutions(kind)
    batches = [torch.randn(shape, generator=torch.Generator().manual_seed(v)) for v in range(3)]
    plain = nn.Sequential(layer, nn.Tanh())
    steps_have_autograds_bits(plain, batches, waits)
    together = len(list(plain.parameters()))
    expected_waits = [] if kind in UNSEEN or not waits else 3 * [(together, False)] + 3 * [(together, True)]
    assert watched == expected_waits


def test_what_is_dear_to_split_waits_in_the_last_micro_batch_alone(watched):
    """Convolutions are taken there only; bits are autograd's all the same."""
    plain = make(
        lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(21, 2), nn.Conv1d(1, 2, 1))
    )
    plain = nn.Sequential(*plain[:3], nn.Unflatten(1, (1, 2)), plain[3])
    batches = [torch.randn(4, 2, 9, generator=torch.Generator().manual_seed(v)) for v in range(3)]
    module = copy.deepcopy(plain)
    places, flats = real_places(module)
    straight = StraightIntoPlace(module, places)
    straight.at_once([*module[0].parameters(), *module[2].parameters()])
    for step in range(3):
        places.begin()
        places.point(0, flats)
        straight.begin(len(batches), behind={2})
        for v, x in enumerate(batches):
            watched.clear()
            with straight.forward(v):
                found = module(x)
            with straight.accumulating(v):
                found.square().sum().backward()
            filters, line = (2, step > 0), (1, step > 0)
            assert sorted(watched) == sorted([filters] if v < 2 else [line, filters, filters])
            straight.weights_of(v, last=v == 2)
    for x in batches:
        plain(x).square().sum().backward()
    for name, parameter in plain.named_parameters():
        found = places.place(places.named[name])[0]
        torch.testing.assert_close(
            found, parameter.grad, rtol=1e-6, atol=1e-6
        )  # a line's bias is added whole


class Special(nn.Module):
    """Convolutions that take autograd's own way, each for a reason of its own, and one that does not."""

    def __init__(self):
        super().__init__()
        self.hooked, self.frozen, self.table = nn.Conv1d(2, 4, 3), nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 3)
        self.seen = nn.Conv1d(4, 2, 3)
        self.hooked.bias.register_hook(lambda g: 2 * g)
        self.frozen.bias.requires_grad_(False)
        self.table.weight.requires_grad_(False)

    def forward(self, x):
        x = self.hooked(x)
        (penalty,) = torch.autograd.grad(x.square().sum(), self.hooked.weight, create_graph=True)
        x = self.table(self.frozen(torch.tanh(x)[0])[None])  # without a batch: one sample
        return self.seen(x) * penalty.square().sum()


def test_convolutions_that_take_autograds_way(watched):
    module = make(Special)
    batches = [torch.randn(1, 2, 20, generator=torch.Generator().manual_seed(v)) for v in range(2)]
    inputs, found = steps(make(Special), batches, True)
    for x, gradient_of_x in zip(batches, inputs, strict=True):
        own = x.clone().requires_grad_()
        module(own).square().sum().backward()
        torch.testing.assert_close(gradient_of_x, own.grad, rtol=1e-4, atol=1e-4)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-4, msg=name)
    assert watched == 2 * [(2, False)] + 2 * [(2, True)], "the last one is seen"


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def test_attentions_linear_layers_are_seen(mkl, watched):
    """Both of them, with autograd's gradients, and attention's own results."""
    module = make(Attention)
    batches = [torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(v)) for v in range(2)]
    inputs, found = steps(copy.deepcopy(module), batches, True)
    for x, gradient_of_x in zip(batches, inputs, strict=True):
        own = x.clone().requires_grad_()
        module(own).square().sum().backward()
        torch.testing.assert_close(gradient_of_x, own.grad)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)
    assert len(watched) == 8
    assert sum(ready for _, ready in watched) == 4


def two_of_one_bias():
    first, second = nn.Conv1d(2, 2, 3, padding=1), nn.Conv1d(2, 2, 1)
    second.bias = first.bias
    return nn.Sequential(first, nn.Tanh(), second)


@pytest.mark.parametrize("kind", ["plain", "no bias", "two of one bias"])
def test_all_buckets_of_convolutions_that_wait_are_told(kind, watched):
    """Each once its last gradient has come: a bias that two filters add to, after both."""
    layer, shape = (two_of_one_bias(), (2, 2, 9)) if kind == "two of one bias" else convolutions(kind)
    module = nn.Sequential(layer, nn.Tanh())
    places, flats = real_places(module)
    places.watch([Bucket(0, seat.start, seat.stop) for seat in places.spaces[0].seats])
    straight, told = StraightIntoPlace(module, places), []
    batches = [torch.randn(shape, generator=torch.Generator().manual_seed(v)) for v in range(2)]
    for step in range(3):
        places.begin()
        places.point(0, flats)
        straight.begin(2)
        told.clear()
        for v, x in enumerate(batches):
            with straight.forward(v):
                loss = module(x).square().sum()
            if v:
                places.last_backward(told.append)
            with straight.accumulating(v):
                loss.backward()
        straight.weights_of(0, last=False)
        assert step == 0 or told == []
        straight.weights_of(1, last=True)
        assert told[-1] == len(places.spaces[0].seats)
    plain = copy.deepcopy(layer)
    plain.zero_grad()
    total = sum(torch.tanh(plain(x)).square().sum() for x in batches)
    total.backward()
    for seat in places.spaces[0].seats:
        torch.testing.assert_close(seat.view(flats[0]), plain.get_parameter(seat.name[2:]).grad)


@pytest.mark.parametrize(
    "geometry", [{"stride": np.int64(2)}, {"padding": np.int32(1)}, {"stride": (1,), "padding": [1]}, {}]
)
def test_a_convolutions_numbers_of_any_kind(geometry, watched):
    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv1d(2, 2, 3)

        def forward(self, x):
            return functional.conv1d(x, self.layer.weight, self.layer.bias, **geometry)

    batches = [torch.randn(2, 2, 9, generator=torch.Generator().manual_seed(1))]
    plain = make(Called)
    _, found = steps(copy.deepcopy(plain), batches, True)
    plain(batches[0]).square().sum().backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(found[name], parameter.grad), name


def test_complex_layers_are_autograds(watched):
    module = make(lambda: nn.Linear(3, 2, dtype=torch.complex64))
    assert not StraightIntoPlace(module, Owner(module)).weights


def test_gradients_of_many_vectors_in_the_forward(watched):
    """Batched by vmap."""

    class Jacobian(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.filter = nn.Linear(4, 4), nn.Conv1d(1, 2, 3)

        def forward(self, x):
            y = torch.tanh(self.filter(self.layer(x)[:, None])).flatten(1)
            vectors = torch.eye(y.shape[1])[:, None].expand(-1, len(x), -1)
            (g,) = torch.autograd.grad(y, x, vectors, is_grads_batched=True, retain_graph=True)
            return y * g.square().sum()

    batches = [torch.randn(2, 4, generator=torch.Generator().manual_seed(1))]
    plain = make(Jacobian)
    _, found = steps(copy.deepcopy(plain), batches, True)
    plain(batches[0].clone().requires_grad_()).square().sum().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-4, msg=name)
