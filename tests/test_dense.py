"""Linear layers in a row: the bits of the layers one by one, or the layers one by one."""

import copy

import pytest
import torch
from jobs import alone_like, build_alone, evaluate_alike, has_bits_of_one_process, layouts, run
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from watchers import MODES, passing, replaced

from hpctrain import products
from hpctrain.gradient import StraightIntoPlace
from hpctrain.pipeline import dense
from hpctrain.pipeline.dense import Dense
from hpctrain.pipeline.rows import rows_of

WIDTH, ROWS = 512, 6


def linear(into=WIDTH, out=WIDTH, **named):
    return nn.Linear(into, out, **named)


KINDS = {
    "usual": [linear(), nn.ReLU(), linear(), nn.ReLU(), linear()],
    "ends in relu": [linear(), nn.ReLU(), linear(), nn.ReLU()],
    "one": [linear(), nn.ReLU()],
    "no activation": [linear(), linear(), linear()],
    "in place": [linear(), nn.ReLU(inplace=True), linear(), nn.SiLU(inplace=True), linear()],
    "no bias": [linear(bias=False), nn.ReLU(), linear(bias=False), linear()],
    "widths": [linear(out=256), nn.Tanh(), linear(into=256, out=1024), nn.ReLU(), linear(into=1024, out=256)],
    "tanh": [linear(), nn.Tanh(), linear(), nn.Tanh()],
    "sigmoid": [linear(), nn.Sigmoid(), linear(), nn.Sigmoid()],
    "gelu": [linear(), nn.GELU(), linear(), nn.GELU("tanh")],
    "silu": [linear(), nn.SiLU(), linear(), nn.SiLU()],
}


class Owned:
    """Places of gradients, as an averager gives them; what autograd brings is `.grad`."""

    def __init__(self, waits=False):
        self.places, self.joined, self.waits = {}, set(), waits

    def place(self, parameter):
        place = self.places.setdefault(id(parameter), torch.full_like(parameter, 7.0))
        return place, id(parameter) not in self.joined

    def filled(self, parameter):
        self.joined.add(id(parameter))

    def later(self, *parameters):
        return self.waits

    def left(self, *parameters, waits):
        return False

    def came(self):
        pass

    def caught_up(self, parameter):
        pass

    def taken_back(self, parameter):
        pass

    def of(self, parameter):
        """What has come, by either way."""
        mine = self.places.get(id(parameter)) if id(parameter) in self.joined else None
        return [None if t is None else t.clone() for t in (mine, parameter.grad)]


def row_of(layers):
    torch.manual_seed(1)
    made = copy.deepcopy(nn.Sequential(*layers))
    (only,) = rows_of([(f"layer {at}", layer) for at, layer in enumerate(made)], [Dense])
    assert isinstance(only[1], Dense)
    return only[1], made


def rows(count=ROWS, width=WIDTH, seed=2, dtype=torch.float32):
    numbers = torch.Generator().manual_seed(seed)
    return torch.randn((count, width), generator=numbers, dtype=dtype)


def call(what, layer, value):
    return layer(value)


def passes(forward, module, xs, waits=False, fast=False, whole=True, of_x=True):
    """What forwards give, then their backwards in turn: gradients of inputs and weights, bit for bit."""
    owner = Owned(waits)
    straight = StraightIntoPlace(module, owner, fast)
    for _ in range(2):  # what waits is tried in a first step
        owner.joined.clear()
        module.zero_grad()
        straight.begin(len(xs))
        given, found = [x.clone().requires_grad_(of_x) for x in xs], []
        for v, x in enumerate(given):
            with straight.forward(-1 if whole else v):
                found.append(forward(x))
        for v, y in enumerate(found):
            with straight.accumulating(v, whole):
                y.backward(rows(*y.shape, seed=3 + v))
            straight.weights_of(v, last=v == len(xs) - 1)
    gradients = [t for p in module.parameters() for t in owner.of(p)]
    return [*(y.detach() for y in found), *(x.grad for x in given), *gradients]


def same_bits(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is None:
            continue
        assert one.shape == other.shape
        assert one.stride() == other.stride()
        whole = torch.int32 if one.dtype == torch.float32 else torch.int64
        nans = one.isnan()
        assert torch.equal(nans, other.isnan())
        both = (t.masked_fill(nans, 0.0).contiguous().view(whole) for t in (one, other))
        assert torch.equal(*both)


def compared(row, module, xs, **named):
    """A row against its layers, both watched by what computes weight gradients in place."""
    ours = passes(lambda x: row.run(call, x), module, xs, **named)
    same_bits(ours, passes(module, module, xs, **named))


@pytest.fixture
def ran(monkeypatch):
    """Lists the rows that ran as one."""
    found, real = [], dense.APPLY

    def noted(row, *rest):
        found.append(row)
        return real(row, *rest)

    monkeypatch.setattr(dense, "APPLY", noted)
    return found


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_bits_of_its_layers(kind, waits, whole, ran):
    row, module = row_of(KINDS[kind])
    compared(row, module, [rows(seed=seed) for seed in range(3)], waits=waits, whole=whole)
    compared(row, module, [rows(1), rows(9)], waits=waits, whole=whole, of_x=False)
    assert len(ran) == 10
    assert row.chosen


@pytest.mark.parametrize("fast", [False, True])
def test_numbers_of_64_bits_and_merged_products(fast, ran):
    row, module = row_of(KINDS["usual"])
    compared(row, module, [rows(seed=seed) for seed in range(4)], waits=True, fast=fast)
    compared(row, module.double(), [rows(seed=seed, dtype=torch.float64) for seed in range(3)], fast=fast)
    assert len(ran) == 14


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -0.0, 0.0])
def test_numbers_that_are_none_pass_a_row_as_they_pass_layers(value, ran):
    row, module = row_of(KINDS["usual"])
    x = rows()
    x[2, 5:9] = value
    compared(row, module, [x])
    x[:] = value
    with torch.no_grad():
        for p in module[2].parameters():
            p.zero_()  # what comes to the second ReLU is 0 or NaN
    compared(row, module, [x])
    assert ran


def test_what_is_a_row():
    def names(*layers):
        return [name for name, _ in rows_of([(str(at), layer) for at, layer in enumerate(layers)], [Dense])]

    shared, other = linear(), linear()
    assert names(linear(), nn.ReLU(), linear(), nn.GELU()) == ["0 to 3"]
    assert names(nn.ReLU(), linear(), nn.ReLU(), nn.ReLU(), linear()) == ["0", "1 to 2", "3", "4"]
    assert names(shared, nn.ReLU(), shared, nn.ReLU()) == ["0 to 1", "2 to 3"]
    other.bias = shared.bias  # its gradients would join in another order
    assert names(shared, other, nn.ReLU()) == ["0", "1 to 2"]
    assert names(linear(out=64), nn.ReLU(), linear(into=64), nn.ReLU()) == ["0", "1", "2", "3"]  # small
    assert names(linear(), nn.Dropout(0.5), linear()) == ["0", "1", "2"]
    assert names(linear(), nn.LayerNorm(WIDTH), linear(), nn.ReLU6()) == ["0", "1", "2", "3"]
    assert names(linear(), linear(into=256, out=1024), linear(into=1024)) == ["0", "1 to 2"]
    assert names() == []


WATCHED = {
    "hook": lambda m: m[1].register_forward_hook(lambda *_: None).remove,
    "backward hook": lambda m: m[2].register_full_backward_hook(lambda *_: None).remove,
    "global hook": lambda m: register_module_forward_hook(lambda *_: None).remove,
    "own forward": lambda m: setattr(m[1], "forward", m[1].forward),
    "class": lambda m: replaced(nn.ReLU, "forward", lambda self, x: torch.relu(x)),
    "linear": lambda m: replaced(nn.Linear, "forward", passing(nn.Linear.forward)),
    "relu": lambda m: replaced(nn.functional, "relu", lambda x, inplace=False: torch.relu(x)),
    "wrapped": lambda m: replaced(nn.functional, "linear", passing(nn.functional.linear)),
    "call": lambda m: replaced(nn.Module, "__call__", passing(nn.Module.__call__)),
    "compiled": lambda m: m[1].compile(backend="eager") and None,
    "parametrised": lambda m: nn.utils.parametrizations.weight_norm(m[2]) and None,
}


@pytest.mark.parametrize("way", [*WATCHED, *(way for way in MODES if way != "no oneDNN")])
def test_who_could_see_a_tensor_inside_gets_the_layers_one_by_one(way, ran):
    row, module = row_of(KINDS["usual"])
    straight, seen = StraightIntoPlace(module, Owned()), []
    undo = WATCHED[way](module) if way in WATCHED else None

    def noting(what, layer, value):
        seen.append(layer)
        return layer(value)

    def forward():
        with straight.forward():
            row.run(noting, rows().requires_grad_())

    try:
        if way in MODES:
            with MODES[way]():
                forward()
        else:
            forward()
    finally:
        if undo:
            undo()
    assert seen == list(module)
    assert not ran
    if way not in ("own forward", "compiled", "parametrised"):
        forward()
        assert ran
        assert seen == list(module)


def test_other_inputs_and_no_graph(ran):
    row, module = row_of(KINDS["usual"])
    straight = StraightIntoPlace(module, Owned())
    many = 129 if products.allowed() else 22  # of so many a product is left to autograd, or long by itself
    with straight.forward():
        for x in (rows(many), rows()[None], rows()[0], rows(0), rows(WIDTH, ROWS).t()):
            assert torch.equal(row.run(call, x), module(x))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            row.run(call, rows(width=256))
        with pytest.raises(RuntimeError, match="same dtype"):
            row.run(call, rows(dtype=torch.float64))
        with torch.no_grad():
            assert torch.equal(row.run(call, rows()), module(rows()))
    assert torch.equal(row.run(call, rows()), module(rows()))  # nobody takes gradients
    assert not ran


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2.weight", "4.bias"])
def test_frozen_weights(frozen, ran):
    row, module = row_of(KINDS["usual"])
    dict(module.named_parameters())[frozen].requires_grad_(False)
    compared(row, module, [rows(), rows()], waits=True)
    assert bool(ran) is frozen.endswith("bias")  # a frozen weight's product is not computed: by the layers


def test_a_hook_on_a_weight_sees_its_gradient(ran):
    row, module = row_of(KINDS["usual"])
    seen = []
    module[2].weight.register_hook(lambda g: seen.append(g.clone()))
    compared(row, module, [rows(), rows(seed=4)])
    assert len(seen) == 8
    assert torch.equal(seen[0], seen[4])
    assert ran


def test_gradients_of_gradients_and_of_batches_go_past_a_row(ran):
    """Those of second order are sums of two graphs then, which rounds otherwise."""
    row, module = row_of(KINDS["tanh"])
    straight, weights = StraightIntoPlace(module, Owned()), list(module.parameters())
    both = []
    for forward in (lambda x: row.run(call, x), module):
        x = rows().requires_grad_()
        with straight.forward():
            found = forward(x)
        (g,) = torch.autograd.grad(found.square().sum(), [weights[1]], create_graph=True)
        both.append([found, g, *torch.autograd.grad(g.square().sum(), [x, *weights])])
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()))
    both = []
    for forward in (lambda x: row.run(call, x), module):
        x = rows().requires_grad_()
        with straight.forward():
            found = forward(x)
        directions = torch.stack([rows(seed=seed) for seed in range(3)])
        both.append(torch.autograd.grad(found, [x, *weights], directions, is_grads_batched=True))
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)  # of three at once, other kernels
    assert len(ran) == 2


def test_no_row_where_gradients_of_gradients_were_seen(ran):
    """In the first forwards, whose layers run one by one."""
    row, module = row_of(KINDS["usual"])
    straight = StraightIntoPlace(module, Owned())
    for again in (False, True):
        found = module(rows().requires_grad_())
        row.watch(found)
        torch.autograd.grad(found.sum(), [module[0].weight], create_graph=again)
        with straight.forward():
            row.run(call, rows())
    assert len(ran) == 1


def test_changes_in_place_between_forward_and_backward(ran):
    """What torch refuses is refused; a bias may change, as torch keeps none, but for what needs it again."""
    row, module = row_of(KINDS["ends in relu"])
    straight = StraightIntoPlace(module, Owned())

    def forward():
        x = rows().requires_grad_()
        with straight.forward():
            return row.run(call, x)

    found = forward()
    first = torch.autograd.grad(found.sum(), module.parameters(), retain_graph=True)
    again = torch.autograd.grad(found.sum(), module.parameters(), retain_graph=True)
    same_bits(first, again)
    with torch.no_grad():
        module[0].bias.add_(1.0)
    same_bits(first, torch.autograd.grad(found.sum(), module.parameters(), retain_graph=True))
    with pytest.raises(RuntimeError, match="was changed in place before a gradient of gradients"):
        torch.autograd.grad(found.sum(), [module[0].weight], create_graph=True)
    for change in (
        lambda y: module[2].weight.data_ptr() and module[2].weight.add_(1.0),
        lambda y: y.mul_(2.0),
    ):
        found = forward()
        with torch.no_grad():
            change(found)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            found.sum().backward()
    assert len(ran) == 3


def test_an_error_inside_a_row_says_where(ran, monkeypatch):
    row, module = row_of(KINDS["usual"])

    def failing(*_):
        raise ValueError("no more")

    monkeypatch.setattr(dense, "output", failing)
    with StraightIntoPlace(module, Owned()).forward(), pytest.raises(ValueError, match="no more") as raised:
        row.run(call, rows())
    assert raised.value.__notes__ == ["in layer 0 to layer 4, given float32 (6, 512)"]


# -- in stages -------------------------------------------------------------------------------------

CUTS = {2: ["7"], 3: ["5", "9"], 4: ["3", "7", "11"]}


def ran_in_each(world, job):
    cut = job.pipeline.cut
    return all(world.allgather(bool(cut.rows(stage.stage))) for stage in job.pipeline.stages)


@pytest.mark.mpi
@pytest.mark.parametrize("recompute", ["never", "always"])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1", "zb-h2"])
def test_rows_in_stages_have_the_bits_of_one_process(world, build, schedule, recompute):
    if world.size not in layouts(world.size):
        pytest.skip("as many stages as ranks, two at least")
    settings = {"micro_batches": 5, "schedule": schedule, "recompute": recompute}
    job = build("dense_row", world.size, cuts=CUTS[world.size], **settings)
    has_bits_of_one_process(world, job, "dense_row")
    assert ran_in_each(world, job)


@pytest.mark.mpi
def test_replicas_and_evaluation(world, build):
    if world.size != 4:
        pytest.skip("2 x 2 ranks")
    job = build("dense_row", 2, cuts=CUTS[2], micro_batches=8, schedule="zb-h1", batch=16, invariant=True)
    losses, expected = run(job, 3), alone_like(job, 3)[0]
    assert losses == expected
    alone = build_alone(job)
    for share in job.topology.comms.pipe.allgather(dict(job.engine.module.state_dict())):
        alone.engine.module.load_state_dict(share, strict=False)
    evaluate_alike(job, alone)
    alone.close()
    alone.topology.close()
    assert ran_in_each(world, job)
