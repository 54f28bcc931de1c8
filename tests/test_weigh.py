"""Where models are cut: by time measured on made-up numbers, under each rank's memory; the model stays as it is."""

import math
import re
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import library, nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from hpctrain import gradient
from hpctrain import scales as scaling
from hpctrain.averaging.groups import state_copies
from hpctrain.config import Config, Optimizer
from hpctrain.engine import precision
from hpctrain.errors import ConfigError
from hpctrain.pipeline import expected, fit, profile, split, weigh
from hpctrain.pipeline.choice import Plan, Scales, Wire
from hpctrain.pipeline.held import Living
from hpctrain.pipeline.profile import Held, Limits, Work
from hpctrain.pipeline.schedule import CHOSEN, Backward, BackwardInput, BackwardWeight, programs
from hpctrain.pipeline.simulate import check
from hpctrain.pipeline.weigh import choose
from hpctrain.scales import schedules
from hpctrain.topology import Topology

NAP = 0.03


@library.custom_op("hpctrain_tests::nap", mutates_args=())
def nap(x: torch.Tensor) -> torch.Tensor:
    time.sleep(NAP)
    return x.clone()


nap.register_fake(torch.empty_like)
nap.register_autograd(lambda context, gradient: gradient)


class Nap(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        time.sleep(NAP)
        return x * 1.0


class Naps(nn.Module):
    """Equal layers by their shapes; the first two take long."""

    def __init__(self):
        super().__init__()
        self.lines = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

    def forward(self, x):
        for at, line in enumerate(self.lines):
            x = line(x)
            x = nap(x) if at < 2 else x
        return x


class Rows(nn.Module):
    """Layers, not in a row that can be seen."""

    def __init__(self, rows):
        super().__init__()
        self.rows = nn.ModuleList(rows)

    def forward(self, x):
        for row in self.rows:
            x = row(x)
        return x


@pytest.fixture
def solid(monkeypatch):
    """Lets tensors take their size."""
    monkeypatch.setattr(fit, "HOLES", 1.0)


@pytest.fixture
def even(monkeypatch):
    """All ranks are equally fast, whatever else the machine does."""
    monkeypatch.setattr(profile, "yardstick", lambda: 1.0)


def scales(world, stages=2, limits=None, kept=None, copies=4.0):
    ranks = [list(range(stage, world.size, stages)) or [0] for stage in range(stages)]
    plans = [Plan("1f1b", 1, lives(kept or [1] * stages))]
    return Scales(world, ranks, lambda: of(limits or [float("inf")] * stages), plans, 4, copies, copies)


def of(limits, aside=0.0):
    """So much a stage, and so much more that is set aside."""
    most = [limit + aside for limit in limits]
    return Limits(limits, most, sum(most) / len(most))


def lives(kept):
    """By stage so many micro-batches between forward and backward, and none whose weight gradients wait."""
    return [[(count, 0)] for count in kept]


def works(*seconds, kept=0):
    return [partial(Work, s, 0.0, 0.0, kept) for s in seconds]


def with_plans(world, ranks, micro_batches, kept, limits=None):
    """Let the schedules that are chosen from be chosen from, each keeping so many micro-batches."""
    found = scales(world, ranks, limits)
    found.micro_batches = micro_batches
    found.plans = [
        Plan(name, 2 if name == "interleaved" else 1, lives(kept[name]), worth)
        for name, worth in CHOSEN.items()
    ]
    return found


def keeping(ranks):
    """By schedule and stage, how many micro-batches are on their way."""
    counts = {"zb-h2": [2 * ranks - 1] * ranks, "interleaved": [ranks] * 2 * ranks}
    return {name: counts.get(name, [ranks] * ranks) for name in CHOSEN}


@pytest.mark.mpi
def test_layers_are_cut_by_their_time(world, even):
    """Parameters say that linear layers are what costs; the clock says otherwise."""
    layers = [
        nn.Linear(64, 64),
        nn.Linear(64, 64),
        nn.Linear(64, 64),
        Nap(),
        nn.Dropout(),
        nn.BatchNorm1d(64),
        Nap(),
    ]
    model, x = nn.Sequential(*layers), torch.randn(8, 64)
    assert split.cut(model, {"x": x}, False, 2, []).ranges == [(0, 2), (2, 7)]
    random = torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = split.cut(model, {"x": x}, False, 2, [], scales(world))
    assert found.ranges in ([(0, at), (at, 7)] for at in (4, 5, 6))
    assert found.choice.said[0].startswith(
        "the model is cut by measured times: cut by the numbers of weights or operators it would be "
    )
    assert [work.forward > NAP for work in found.choice.passes] == [True, True]
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert layers[3].calls == layers[6].calls == 0
    model[0].register_forward_hook(lambda *_: 1 / 0)  # a user's hook is not for made-up numbers
    assert split.cut(model, {"x": x}, False, 2, [], scales(world)).ranges == [(0, 2), (2, 7)]


@pytest.mark.mpi
def test_operators_are_cut_by_their_time(world, even):
    model, x = Naps(), torch.randn(8, 16)
    guess = split.cut(model, {"x": x}, False, 2, [])
    assert guess.names(1)[0] == "lines.2"
    found = split.cut(model, {"x": x}, False, 2, [], scales(world))
    assert found.names(0) == ["lines.0"]
    assert found.names(1)[0] == "lines.1"
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.mpi
def test_equal_times_keep_the_estimate(world, even):
    """A measurement that differs by little does not move the cut from run to run."""
    for costs in ((1.0, 1.0, 1.0, 1.0), (1.02, 1.0, 0.98, 1.0)):
        assert choose(2, [1, 1, 1, 1], [Held(0)] * 4, works(*costs), scales(world)).parts == [(0, 2), (2, 4)]
    assert choose(2, [1, 1, 1, 1], [Held(0)] * 4, works(3, 1, 1, 1), scales(world)).parts == [(0, 1), (1, 4)]


@pytest.mark.mpi
def test_a_slow_rank_gets_less(world, monkeypatch):
    slow, real = world.size - 1, profile.yardstick()
    assert max(world.allgather(real)) < 20 * min(world.allgather(real))  # equal cores, some of them busy
    monkeypatch.setattr(profile, "yardstick", lambda: 3.0 if world.rank == slow else 1.0)
    pieces = works(*[3.0 if world.rank == slow else 1.0] * 8)
    speeds = scales(world)
    speeds.ranks = [[0], [slow]]
    found = choose(2, [1] * 8, [Held(0)] * 8, pieces, speeds)
    assert found.parts == ([(0, 6), (6, 8)] if world.size > 1 else [(0, 4), (4, 8)])
    if world.size > 1:
        assert "ranks differ: speeds of the stages 1.00, 0.33" in found.said
        assert [work.forward for work in found.passes] == pytest.approx([6.0, 6.0])


@pytest.mark.mpi
def test_memory_moves_the_cut_warns_and_refuses(world, even, solid):
    """Four layers of 10 MiB of weights, with gradients and optimizer 40, each keeping 5 a micro-batch, 3 its own."""
    mebi = 1 << 20

    def cut(limits, kept=(1, 1), aside=0, named=None, most=None):
        asked = scales(world, kept=list(kept))
        found = of([mebi * limit for limit in limits], mebi * aside)
        found = replace(found, most=[mebi * limit for limit in most]) if most else found
        asked.limits = lambda: found
        pieces = [partial(Work, 1.0, 0.0, 0.0, 5 * mebi, own=3 * mebi)] * 4
        return choose(2, [1] * 4, [Held(10 * mebi)] * 4, pieces, asked, named=named)

    assert cut([90, 90]).parts == [(0, 2), (2, 4)]
    assert not cut([90, 90]).said
    assert cut([89, 200]).parts == [(0, 1), (1, 4)]
    assert "operators it would not fit" in cut([89, 200]).said[0]
    assert cut([90, 200], kept=(2, 1)).parts == [(0, 1), (1, 4)]
    assert cut([60, 60], aside=30).parts == [(0, 2), (2, 4)]
    assert (
        "memory may run out: the model does not fit: its 4 layers need 180.0 MiB, 2 stages have 120.0"
        in cut([60, 60], aside=30).warned[0]
    )
    assert not cut([60, 60], aside=30).recompute
    assert cut([60, 60], aside=26).warned  # 86 each: 80 and 2 layers' own 3
    with pytest.raises(
        ConfigError, match=r"alone take 172.0 MiB, and the ranks of its 2 stages have 171.0 left"
    ):
        cut([60, 60], aside=25.5)
    with pytest.raises(
        ConfigError, match=r"have 171.0 left together: take parallel.recompute = \"auto\", more stages"
    ):
        cut([60, 60], aside=25.5)
    # together enough, where a rank could have all; but what it may have itself is less
    assert cut([60, 60], aside=30, most=[180, 180]).warned
    with pytest.raises(
        ConfigError, match="its 4 layers need 172.0 MiB, 2 stages have 170.0, and no cut .*alone"
    ):
        cut([60, 60], aside=30, most=[85, 85])
    # four micro-batches at once on the first stage: two layers' own 3 each
    assert cut([60, 60], kept=(4, 1), aside=44).warned
    with pytest.raises(ConfigError, match="its 4 layers need 208.0 MiB, 2 stages have 206.0"):
        cut([60, 60], kept=(4, 1), aside=43)


def test_what_is_certain_is_counted_once():
    """What a layer was given another may have kept; frozen weights have no gradient, shared ones lie once."""
    rows = [nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.ReLU()]
    x = torch.randn(8, 64)
    works_ = [piece() for piece in profile.of_layers(rows, x, set())]
    assert [work.kept for work in works_] == [8 * 64 * 4] * 4
    assert [work.own for work in works_] == [0, 8 * 64 * 4, 0, 8 * 64 * 4]
    rows[2].requires_grad_(False)
    modules = [rows[0], rows[2], rows[0], nn.BatchNorm1d(4)]
    held = Held.of_each([*m.parameters(), *m.buffers()] for m in modules)
    each = 4 * (64 * 64 + 64)
    assert held == [Held(each, 0), Held(0, each), Held(0, 0), Held(2 * 4 * 4, 2 * 4 * 4 + 8)]


@pytest.mark.mpi
def test_what_is_likely_warns_and_what_is_certain_ends(world, even):
    """Certain: 20 of 10 trained, 5 frozen, half of 4 kept a piece; likely 40 of the trained, and all that is kept."""
    mebi = 1 << 20

    def cut(share):
        asked = scales(world, limits=[mebi * 60.0] * 2, copies=4.0)
        asked.least, asked.fewest = 2.0, 0.5
        asked.limits = lambda: Limits([mebi * 60.0] * 2, [mebi * 1000.0] * 2, mebi * share / 2)
        pieces = [partial(Work, 1.0, 0.0, 0.0, 4 * mebi, own=4 * mebi)] * 4
        return choose(2, [1] * 4, [Held(10 * mebi, 5 * mebi)] * 4, pieces, asked)

    found = cut(108)
    assert "its 4 layers need 196.0 MiB" in found.warned[0]
    assert [one.held for one in found.needs] == [90 * mebi] * 2
    assert found.weights == [15 * mebi] * 4
    with pytest.raises(
        ConfigError, match="alone take 108.0 MiB, and the ranks of its 2 stages have 107.9 left"
    ):
        cut(107.9)


@pytest.mark.mpi
def test_named_cuts_are_weighed_too(world, even):
    """Not chosen; schedule and recomputation are, and memory is foretold."""
    mebi = 1 << 20

    def cut(limits, aside=0.0, recompute="never", named=((0, 1), (1, 4))):
        asked = with_plans(world, 2, 4, KEPT)
        found = of([mebi * limit for limit in limits], mebi * aside)
        asked.limits, asked.recompute = lambda: found, recompute
        pieces = [lambda: Work(1.0, 1.0, 1.0, 5 * mebi, own=5 * mebi)] * 4
        return choose(2, [1] * 4, [Held(10 * mebi)] * 4, pieces, asked, named=list(named))

    found = cut([90, 150])
    assert (found.parts, found.schedule, found.pieces) == ([(0, 1), (1, 4)], "1f1b", 0)
    assert [work.forward for work in found.passes] == [1.0, 3.0]
    assert [one.most for one in found.needs] == [50 * mebi, 135 * mebi]
    assert len(found.works) == 4
    named = (0, 2), (2, 4)  # one of several stages a rank is none
    assert cut([110, 110], named=named).schedule == "zb-h1"
    assert cut([130, 130], named=named).schedule == "zb-h2"
    found = cut([47, 140], recompute="auto")
    assert (found.schedule, found.recompute, found.warned) == ("1f1b", True, [])
    assert cut([90, 130], aside=5).warned == [
        "memory may run out: the model does not fit where parallel.cuts cuts it: stage 1 needs 135.0 MiB and has 130.0"
    ]
    with pytest.raises(
        ConfigError, match="cuts it: weights, .* take 135.0 MiB in stage 1, which has 130.0 left: .*elsewhere"
    ):
        cut([90, 130])


@pytest.mark.mpi
@pytest.mark.parametrize("model", ["layers", "operators"])
def test_what_cannot_be_measured_is_refused_by_its_weights(world, even, monkeypatch, model):
    rows = [nn.Linear(16, 16, bias=False) for _ in range(4)]
    module = nn.Sequential(*rows) if model == "layers" else Rows(rows)

    def fails(*_):
        raise ValueError("no numbers suit it")

    monkeypatch.setattr(profile, "timed", fails)
    for cuts in ([], ["2" if model == "layers" else "rows.2"]):
        asked = scales(world, limits=[2 * 4096, 2 * 4096])
        found = split.cut(module, {"x": torch.randn(8, 16)}, False, 2, cuts, asked)
        assert re.search(
            r"can't be measured alone \(piece 1 of 4, (layer 0|from layer rows.0, operator \w+ on): ValueError: no numbers suit it\)",
            found.choice.said[0],
        )
        assert [len(found.tensors(stage)) for stage in range(2)] == [2, 2]
        with pytest.raises(ConfigError, match="the model does not fit"):
            split.cut(module, {"x": torch.randn(8, 16)}, False, 2, cuts, scales(world, limits=[8000, 8000]))


@pytest.mark.mpi
def test_what_is_expected_of_each_stage_is_told(world, even):
    """Held: 30 MiB a piece with its gradient and optimizer; kept: 5 MiB a piece, of two and of one micro-batch."""
    mebi = 1 << 20
    asked = scales(world, limits=[200 * mebi, float("inf")], kept=[2, 1], copies=3.0)
    asked.micro_batches = 4
    small, large = (
        partial(Work, n * 2e-3, n * 3e-3, n * 5e-3, 5 * mebi, moment=n * mebi, gives=mebi // 4)
        for n in (1, 3)
    )
    choice = choose(2, [1] * 4, [Held(10 * mebi)] * 4, [small, small, small, large], asked)
    assert [one.most for one in choice.needs] == [122 * mebi, 39 * mebi]  # a pass, messages at one end
    links, names = {0: [1], 1: []}, [["a", "b", "c"], ["d"]]
    cut = SimpleNamespace(choice=choice, stages=2, names=names.__getitem__, links=lambda: (links, links))
    _, _, *rows, whole, fits = expected.table(cut, "1f1b", 4)
    assert fits.startswith("one rank could hold it all (144.0 MiB): replicas alone")
    assert [re.split("  +", row.strip()) for row in rows] == [
        ["0", expected.several(asked.ranks[0]), *["6.00", "9.00", "15.00", "0.25", "90.0"], "2 x 15.0", "2.0", "122.0", "200", "a … c"],
        ["1", expected.several(asked.ranks[1]), *["6.00", "9.00", "15.00", "0.25", "30.0"], "1 x 5.0", "4.0", "39.0", "any", "d"],
    ]  # fmt: skip
    # even stages: four micro-batches of 30 ms, and a forward and an input gradient, sent first, to wait for
    assert whole.endswith("passes take 135.0 ms, idle 11%")
    assert len(choice.works) == 4
    choice.needs[0] = replace(choice.needs[0], limit=143 * mebi)
    assert expected.table(cut, "1f1b", 4)[-1] == whole
    choice.passes = []
    assert expected.table(cut, "1f1b", 4) == ["stage 0: a … c", "stage 1: d"]


@pytest.mark.mpi
def test_memory_asks_for_a_heap_without_holes(world, even):
    """Two layers of 10, with gradients and optimizer 40, keep twice 5 each: 100 in all, 108 with holes."""
    asked = scales(world, limits=[108, 200], kept=[2, 1])
    pieces = works(1, 1, 1, 1, kept=5)

    def chosen(*limits):
        asked.limits = lambda: of([*limits])
        return choose(2, [1] * 4, [Held(10)] * 4, pieces, asked)

    assert not chosen(108, 200).exact
    found = chosen(107, 200)
    assert (found.exact, found.recompute, found.warned, found.parts) == (True, False, [], [(0, 2), (2, 4)])
    assert found.said[0].startswith("large tensors are given back to the system one by one")
    assert found.needs[0].most == 100  # what is told is what tensors take
    assert found.passes[0].forward == pytest.approx(2.0 + fit.FRESH * 10 / 2)
    assert chosen(99, 200).parts == [(0, 1), (1, 4)]
    assert chosen(99, 99).warned
    assert chosen(99, 99).exact  # there, too
    asked.recompute = "auto"  # once 5 each: 90, 94 with holes
    assert (chosen(107, 107).exact, chosen(107, 107).recompute) == (True, False)  # a forward is longer here
    assert (chosen(94, 94).exact, chosen(94, 94).recompute) == (False, True)
    assert (chosen(90, 90).exact, chosen(90, 90).recompute) == (True, True)
    pieces = works(1e-12, 1e-12, 1e-12, 1e-12, kept=5)  # and shorter here
    assert (chosen(107, 107).exact, chosen(107, 107).recompute) == (False, True)


@pytest.mark.mpi
def test_memory_asks_for_recomputation(world, even, solid):
    """Two micro-batches' activations don't fit, one's do."""
    asked = scales(world, limits=[90, 90], kept=[2, 1])
    assert (
        "memory may run out" in choose(2, [1] * 4, [Held(10)] * 4, works(1, 1, 1, 1, kept=5), asked).warned[0]
    )
    asked.recompute = "auto"
    found = choose(2, [1] * 4, [Held(10)] * 4, works(1, 1, 1, 1, kept=5), asked)
    assert (found.recompute, found.parts, found.warned) == (True, [(0, 2), (2, 4)], [])
    assert found.said[0].startswith("stages run forward again for backward, as memory asks for it")
    assert [work.input_gradient for work in found.passes] == [2.0, 0.0]  # the last one keeps its graph
    asked.limits = lambda: of([60, 60], 100)  # nor does one's: the least is taken all the same
    found = choose(2, [1] * 4, [Held(10)] * 4, works(1, 1, 1, 1, kept=5), asked)
    assert found.recompute
    assert [one.times for one in found.needs] == [1, 1]
    assert "memory may run out" in found.warned[0]
    assert re.search(r"; as it is cut stage \d lacks [\d.]+ MiB$", found.warned[0])
    assert [line.split(",")[0].split(" for ")[0] for line in found.said] == [
        "stages run forward again",
        "large tensors are given back to the system one by one",
    ]
    little = choose(2, [1] * 4, [Held(10)] * 4, works(1, 1, 1, 1, kept=0.01), asked)
    assert (little.recompute, little.exact) == (False, True)  # it would spare nothing that counts
    asked.limits = lambda: of([100, 100])
    assert not choose(2, [1] * 4, [Held(10)] * 4, works(1, 1, 1, 1, kept=5), asked).recompute


KEPT = {"1f1b": [2, 1], "zb-h1": [2, 2], "zb-h2": [3, 3], "interleaved": [3, 3, 2, 2]}


@pytest.mark.mpi
def test_the_fastest_schedule_is_chosen(world, even, solid):
    """Weight gradients fill gaps; several stages a rank shorten them where there is nothing to fill them with."""

    def chosen(ranks, micro_batches, work, pieces=8, kept=None, shared=False, limits=None):
        kept = kept or keeping(ranks)
        asked = with_plans(world, ranks, micro_batches, kept, limits)
        return choose(ranks, [1] * pieces, [Held(10)] * pieces, [lambda: work] * pieces, asked, shared)

    halves, whole = Work(1.0, 1.0, 1.0, 5), Work(1.0, 2.0, 0.0, 5)
    found = chosen(2, 4, halves)
    assert (found.schedule, len(found.parts)) == ("zb-h2", 2)
    # 4 pieces a stage: 4 x 12 of work, and a gap of F + I - W; 1f1b has F + I
    assert found.seconds == pytest.approx(48 + 4)
    assert (
        "zb-h2, simulated with the pieces' times: 1f1b 56000.0 ms, zb-h2 52000.0 ms (taken if 1% shorter), zb-h1"
        in found.said[-1]
    )
    assert chosen(2, 1, whole).schedule == "1f1b"  # one after the other in all of them
    found = chosen(4, 4, whole)
    assert (found.schedule, len(found.parts)) == ("interleaved", 8)
    assert found.seconds == pytest.approx(4 * 6 + 3 * 6 / 2)
    assert chosen(4, 32, whole).schedule == "1f1b"  # a twentieth is not worth its messages
    assert chosen(4, 4, whole, pieces=7).schedule == "zb-h2"  # uneven stages wait for one another less
    assert chosen(4, 4, whole, shared=True).schedule == "1f1b"
    # 4 pieces of 40 bytes and 20 kept a stage: 1f1b's [2, 1] fit, zb-h1's [2, 2] do not, nor zb-h2's [3, 3]
    assert chosen(2, 4, halves, kept=KEPT, limits=[200, 180]).schedule == "1f1b"
    assert chosen(2, 4, halves, kept=KEPT, limits=[200, 200]).schedule == "zb-h1"
    assert chosen(2, 4, halves, kept=KEPT, limits=[220, 219]).schedule == "zb-h1"
    assert chosen(2, 4, halves, kept=KEPT, limits=[220, 220]).schedule == "zb-h2"
    # the two stages of a rank share its memory: 40 and 20 kept each, where 1f1b has 80 and 10
    kept = {"1f1b": [1] * 4, "zb-h1": [1] * 4, "zb-h2": [1] * 4, "interleaved": [4] * 8}
    assert chosen(4, 4, whole, kept=kept, limits=[100] * 4).schedule == "1f1b"
    assert chosen(4, 4, whole, kept=kept, limits=[120] * 4).schedule == "interleaved"


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("limits", "recompute", "expected", "most"),
    [
        ([150, 130], "never", "zb-h2", [150, 130]),
        ([149, 130], "never", "zb-h1", [116, 106]),
        ([150, 105], "never", "1f1b", [116, 86]),
        ([80, 80], "never", "1f1b", [116, 86]),  # where nothing fits, what needs least
        ([122, 142], "always", "zb-h2", [122, 142]),
        ([121, 142], "always", "1f1b", [94, 94]),
    ],
)
def test_what_is_on_its_way_is_counted_by_schedule(world, even, solid, limits, recompute, expected, most):
    """As the dry run finds it: graphs, halves of backwards, and what leaves or, where forwards run again, stays."""
    work = Work(1.0, 1.0, 1.0, 30, late=20, gives=4)
    asked = with_plans(world, 2, 8, KEPT, limits)
    asked.recompute = recompute
    for plan in asked.plans:
        plan.lives[:] = check(plan.schedule, 2, range(8), virtual=plan.virtual).lives
    found = choose(2, [1] * 2, [Held(10)] * 2, [lambda: work] * 2, asked)
    assert (found.schedule, found.recompute) == (expected, recompute == "always")
    assert bool(found.warned) == (limits[0] < 100)
    assert [one.most for one in found.needs] == most


def test_a_whole_backward_is_not_priced_as_its_halves():
    """With and without a forward that runs again; where it was not measured, its halves count."""
    work = Work(1.0, 2.0, 2.5, 0, joint=3.0)
    every = programs("1f1b", 1, [0])
    for passes, seconds in (([work], 3.0), ([fit.twice(work)], 4.0), ([Work(1.0, 2.0, 2.5, 0)], 4.5)):
        assert profile.cost_of(passes, every)(0, Backward(0)) == seconds
    assert profile.cost_of([work], every)(0, BackwardInput(0)) == 2.0
    assert profile.cost_of([work], every)(0, BackwardWeight(0)) == 2.5


def test_a_backward_that_is_split_at_the_end_is_priced_so():
    """At twice the pace, too, and on a stage of two such pieces; by the schedule in the last one or two."""
    work = Work(1.0, 2.0, 1.5, 7, joint=3.0, late=5).at_once
    assert (work.seconds, work.backward, work.late) == (4.0, 3.0, 5)
    pair = profile.Profile([work, work], [1.0], profile.Limits([], [], 0.0))
    for passes, times in (([work], 1.0), ([work.times(2.0)], 2.0), (fit.passes(pair, [(0, 2)], [0.5]), 4.0)):
        for schedule, late in (("1f1b", {3}), ("zb-h1", {2, 3}), ("zb-h2", {1, 2, 3})):
            cost = profile.cost_of([*passes, *passes], programs(schedule, 2, range(4)))
            for v in range(4):
                first, second = (2.0, 1.5) if v in late else (3.0, 0.0)
                assert cost(1, BackwardInput(v)) == times * first
                assert cost(1, BackwardWeight(v)) == times * second
                assert cost(1, Backward(v)) == times * 3.0
                assert cost(0, BackwardInput(v)) == times * 3.0  # nobody waits for the first stage
                assert cost(0, BackwardWeight(v)) == 0.0


@pytest.mark.mpi
def test_a_backward_that_is_dear_to_split_stays_whole(world, even):
    """But in the last micro-batch: ten lose 0.5 each, twice that in a step, to send the first gradient 1.0 earlier."""
    dear, cheap = Work(1.0, 1.5, 1.0, 0, joint=2.0), Work(1.0, 1.0, 1.0, 0, joint=2.0)
    asked = with_plans(world, 2, 10, KEPT)
    pieces = [lambda work=work: work for work in (dear, cheap, cheap, dear)]
    found = choose(2, [1] * 4, [Held(0)] * 4, pieces, asked)
    assert found.at_once == [0, 3]
    assert [(work.input_gradient, work.weight_gradient) for work in found.passes] == [(3.0, 1.0)] * 2
    assert "2 of 4 pieces of the model are dear to split: their weight gradients wait in" in found.said[-1]
    asked.micro_batches = 1
    assert choose(2, [1] * 4, [Held(0)] * 4, pieces, asked).at_once == []


@pytest.mark.mpi
def test_what_waits_for_other_micro_batches_is_not_dear_and_takes_memory(world, even, solid):
    """It gains what no measurement of one shows; 7 bytes of each of two pieces are on each stage."""
    short = Work(1.0, 1.5, 1.0, 0, joint=2.0, together=7)
    pieces = [lambda: short] * 4
    assert choose(2, [1] * 4, [Held(0)] * 4, pieces, with_plans(world, 2, 10, KEPT)).at_once == []
    found = choose(2, [1] * 4, [Held(10, 1)] * 4, pieces, scales(world))
    assert [need.held for need in found.needs] == [2 * (4.0 * 10 + 1 + 7)] * 2
    assert short.whole.together == 0


@pytest.mark.mpi
@pytest.mark.parametrize(("rows", "waits"), [(21, True), (22, False)])
def test_a_piece_says_what_waits_for_other_micro_batches(world, rows, waits):
    """A quarter of a weight's bytes: 64 rows of 512 numbers each way, which are three times 21."""
    asked, module = scales(world), nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))
    found = split.cut(module, {"x": torch.randn(rows, 512)}, False, 2, [], asked)
    assert [work.together for work in found.choice.works] == [512 * 512 * waits] * 2


@pytest.mark.mpi
@pytest.mark.parametrize("model", ["layers", "operators"])
def test_a_cut_follows_what_was_chosen(world, even, monkeypatch, model):
    """Stages of a plan with two a rank; names of the parameters that do not wait."""
    rows = [nn.Linear(16, 16) for _ in range(8)]
    module = nn.Sequential(*rows) if model == "layers" else Rows(rows)
    monkeypatch.setattr(profile, "timed", lambda *_: Work(0.1, 0.4, 0.2, 0, joint=0.2))
    kept = keeping(4)
    found = split.cut(module, {"x": torch.randn(8, 16)}, False, 4, [], with_plans(world, 4, 4, kept))
    assert (found.stages, found.choice.schedule) == (8, "interleaved")
    assert [len(found.tensors(stage)) for stage in range(8)] == [2] * 8
    assert found.at_once == {name for name, _ in module.named_parameters()}
    tied = nn.Sequential(*rows[:7], rows[0]) if model == "layers" else Rows([*rows[:7], rows[0]])
    found = split.cut(tied, {"x": torch.randn(8, 16)}, False, 4, [], with_plans(world, 4, 4, kept))
    assert (found.stages, found.choice.schedule) == (4, "1f1b")


class Heads(nn.Module):
    """A weight that may wait, and those that never do: tied, hooked, used by itself, parametrised, small."""

    def __init__(self):
        super().__init__()
        self.first, self.small, self.table = nn.Linear(512, 512), nn.Linear(512, 8), nn.Linear(512, 512)
        self.again, self.hooked = nn.Linear(512, 512), nn.Linear(512, 512)
        self.again.weight = self.table.weight
        self.hooked.weight.register_hook(lambda gradient: gradient)
        self.raw = nn.Parameter(torch.ones(512, 512))
        self.other = parametrizations.orthogonal(nn.Linear(512, 512))

    def forward(self, x):
        x = self.hooked(self.again(self.table(self.first(x))))
        return self.small(self.other(nn.functional.linear(x, self.raw)))


@pytest.mark.mpi
@pytest.mark.parametrize("model", ["layers", "operators"])
def test_pieces_are_timed_as_a_step_runs_them(world, monkeypatch, model):
    """What a step would let wait does, and is computed; its seconds are the second half's."""
    waited, real = [], gradient.StraightIntoPlace.weights_of

    def counting(self, micro_batch, last):
        waited.append(len(self._waiting))
        real(self, micro_batch, last)
        assert not self._waiting

    monkeypatch.setattr(gradient.StraightIntoPlace, "weights_of", counting)
    monkeypatch.setattr(weigh, "SPLIT_WORTH", float("inf"))
    module = Heads()
    if model == "layers":
        del module.raw
        module = nn.Sequential(*module.children())
        module = nn.Sequential(*(module[at] for at in (0, 2, 3, 4, 5, 1)))
    found = split.cut(module, {"x": torch.randn(8, 512)}, False, 2, [], scales(world))
    assert set(world.allreduce(waited)) == {0, 1}
    assert sum(world.allgather(max(waited))) == 1  # of one piece, on the rank that measured it
    assert not found.choice.said or "can't be measured" not in found.choice.said[0]
    assert sum(work.weight_gradient for work in found.choice.passes) > 0
    assert profile.of_layers([nn.Linear(16, 16)], torch.randn(8, 16), ())[0]().kept == 8 * 16 * 4


def test_numbers_are_made_up_for_expanded_tensors():
    """A mask that all layers use has its rows in one place."""
    for like in (torch.ones(1, 4).expand(3, 4), torch.ones(4, 1, dtype=torch.bool).expand(4, 3)):
        found = profile.made_up(like)
        assert (found.shape, found.stride()) == (like.shape, like.stride())
        assert torch.equal(found, like)
        assert found.requires_grad == like.is_floating_point()


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, ["1f1b", "zb-h2", "zb-h1", "interleaved"]),
        ({"micro_batches": 6}, ["1f1b", "zb-h1", "interleaved"]),
        ({"synced": True}, ["1f1b"]),
        ({"invariant": True}, ["1f1b"]),
        ({"gradients": "fast"}, ["zb-h1"]),
        ({"schedule": "gpipe", "gradients": "fast"}, ["gpipe"]),
    ],
)
def test_schedules_to_choose_from(asked, expected):
    """Where bits would follow the schedule, it does not follow the clock."""
    config = Config()
    config.averaging.invariant = asked.get("invariant", False)
    config.parallel.gradients = asked.get("gradients", "strict")
    config.parallel.schedule = asked.get("schedule", "auto")
    config.parallel.stages = 4
    assert schedules(config, asked.get("synced", False), asked.get("micro_batches", 7)) == expected


@pytest.mark.mpi
def test_what_cannot_be_measured_is_estimated_on_all_ranks(world):
    def fails():
        raise ValueError("not with these numbers")

    def refuses():
        raise MemoryError("no 5 bytes")

    told = choose(2, [1] * 4, [Held(0)] * 4, [*works(1, 1, 9), refuses], scales(world), names="abcd")
    assert told.warned == [
        "the cut is by estimate, as pieces can't be measured alone (piece 4 of 4, d: MemoryError: no 5 bytes): "
        "memory is short, and nothing says if it suffices"
    ]
    assert not told.said

    def says_nothing():
        raise type("SilentError", (ValueError,), {"__str__": lambda error: error.lost})

    told = choose(2, [1] * 4, [Held(0)] * 4, [*works(1, 1, 9), says_nothing], scales(world), names="abcd")
    assert "piece 4 of 4, d: SilentError: (no text: AttributeError" in told.said[0]
    pieces = [*works(1, 1, 9), fails]
    found = choose(2, [1] * 4, [Held(0)] * 4, pieces, scales(world), names="abcd")
    assert found.parts == [(0, 2), (2, 4)]
    assert found.said == [
        "the cut is by estimate, as pieces can't be measured alone (piece 4 of 4, d: ValueError: not with these numbers)"
    ]


@pytest.mark.parametrize(
    ("name", "arguments", "copies"),
    [("SGD", {"lr": 0.1}, 0), ("SGD", {"lr": 0.1, "momentum": 0.9}, 1), ("AdamW", {"lr": 0.1}, 2)],
)
def test_an_optimizers_numbers(name, arguments, copies):
    assert state_copies(Optimizer(f"torch.optim.{name}", arguments)) == pytest.approx(copies, abs=0.01)


@pytest.mark.mpi
def test_weight_gradients_that_wait_take_memory(world, even):
    """Four pieces of 40 bytes that keep 5, and 8 while their weight gradients wait."""

    def needs(lives):
        asked = scales(world, limits=[500, 500])
        asked.plans = [Plan("zb-h1", 1, lives)]
        pieces = [lambda: Work(1.0, 1.0, 1.0, 5, late=8)] * 4
        return [one.most for one in choose(2, [1] * 4, [Held(10)] * 4, pieces, asked).needs]

    assert needs([[(2, 0)], [(1, 0)]]) == [100, 90]
    assert needs([[(2, 0), (1, 1)], [(1, 0), (0, 2)]]) == [80 + 26, 80 + 32]


def layer(rows=64, width=512):
    module = nn.Linear(width, width, bias=False)
    ids = {id(module.weight)}
    return profile.of_layers([module], torch.randn(rows, width), ids)[0], rows * width * 4


def test_what_a_piece_holds_is_counted(monkeypatch):
    """A product keeps what it is given; its weight's gradient waits with that and the gradient of its output."""
    monkeypatch.setattr("hpctrain.gradient.LARGE", 1)
    measure, size = layer()
    work = measure()
    assert (work.kept, work.late, work.gives) == (size, 2 * size, size)
    assert size <= work.moment <= 4 * size  # its output, a gradient of ones
    assert work.whole.late == 0
    double = nn.Sequential(nn.Linear(512, 512), nn.Sigmoid(), nn.Linear(512, 512), nn.Sigmoid())
    found = profile.of_layers([double], torch.randn(64, 512), ())[0]()
    assert found.kept == 3 * size  # what each product is given, and the output


def test_every_measured_pass_casts_the_weights():
    """Autocast keeps a cast weight until it ends, which in a step is after each pass."""
    casts = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default and found.dtype == torch.bfloat16:
                casts.append(found.shape)
            return found

    measure, _ = layer(rows=8)
    with precision("bf16", "cpu"), Watch():
        measure()
    assert casts.count((512, 512)) == casts.count((8, 512)) > profile.REPEATS


def test_memory_of_a_body_is_followed():
    size = 4 << 10
    with Living() as living:
        first = torch.zeros(1 << 10)
        view = first.view(32, 32)
        second = first + 1.0
        del first
        assert (living.now, living.most) == (2 * size, 2 * size)  # the view's memory is the first one's
        del view
        assert living.now == size
        second.add_(1.0)
        assert (living.now, living.most) == (size, 2 * size)


WIRE = Wire(1e-3, 1e-6)


def spread(world, wires, stages=2, micro_batches=4):
    found = scales(world, stages)
    found.wires, found.micro_batches = wires, micro_batches
    return found


@pytest.mark.mpi
def test_slow_messages_move_the_cut(world, even):
    """Even pieces of 3 s; 12 MB behind the second one take 12 s, 1 MB behind the others 1 s."""
    pieces = [
        lambda gives=gives: Work(1.0, 1.0, 1.0, 0, gives=gives) for gives in (10**6, 12 * 10**6, 10**6, 0)
    ]
    assert choose(2, [1] * 4, [Held(0)] * 4, pieces, spread(world, [])).parts == [(0, 2), (2, 4)]
    found = choose(2, [1] * 4, [Held(0)] * 4, pieces, spread(world, [WIRE, WIRE]))
    assert found.parts in ([(0, 1), (1, 4)], [(0, 3), (3, 4)])
    assert found.wire(0, 1) == found.wire(1, 0) == pytest.approx(1.001)
    links = {0: [1], 1: []}
    names = [["a"], ["b"]]
    cut = SimpleNamespace(choice=found, stages=2, names=names.__getitem__, links=lambda: (links, links))
    assert "messages between nodes at 1 MB/s, 1,000 µs each" in expected.table(cut, "1f1b", 4)[-2]
    only_back = [Wire(), WIRE]  # from the last rank to the first: interleaved alone uses it
    assert choose(2, [1] * 4, [Held(0)] * 4, pieces, spread(world, only_back)).parts == [(0, 2), (2, 4)]


@pytest.mark.mpi
def test_what_a_rank_may_take_is_asked_of_the_system(world, monkeypatch):
    """With the weights that are built by then; of several replicas what they share is no data of one."""
    if world.size == 3:
        pytest.skip("two stages")
    asked = []

    def room(processes, most=False, shared=False):
        asked.append((processes, most, shared))
        return 2.0**40 + 10**6 * processes + 10**5 * most + 10**4 * shared

    monkeypatch.setattr(scaling, "room", room)
    config = Config()
    config.train.batch = 8
    with Topology.build(world, min(2, world.size), device="cpu") as topology:
        inputs = {"x": torch.zeros(4, 8)}
        found = scaling.scales_of(config, topology, 2 * topology.replicas, False, inputs, built=7000)
        limits = found.limits()
    size, several = world.size, topology.replicas > 1
    assert asked == [(size, False, False), (1, True, several), (size, True, several)]
    read = 2 * (scaling.AHEAD + 1) * 2 * 4 * 8 * 4
    mine = topology.stage
    assert limits.usual[mine] == 2.0**40 + 10**6 * size + 7000 - scaling.OTHERS - read
    assert limits.most[mine] == 2.0**40 + 10**6 + 10**5 + 10**4 * several + 7000
    assert limits.share == 2.0**40 + 10**6 * size + 10**5 + 10**4 * several + 7000
    assert [math.isinf(size) for size in limits.most] == [at != mine for at in range(topology.stages)]


@pytest.mark.mpi
def test_too_few_pieces_are_no_question_of_memory(world, even):
    with pytest.raises(ConfigError, match="the model has 1 layer .* = 1 or fewer$"):
        choose(2, [1], [Held(1)], works(1), scales(world))


@pytest.mark.mpi
def test_slow_messages_keep_stages_few(world, even):
    """Interleaved sends as often again; over a slow network more micro-batches are on their way instead."""

    def chosen(seconds):
        asked = with_plans(world, 4, 4, keeping(4))
        asked.wires = [Wire(seconds, 0.0)] * 4
        return choose(
            4, [1] * 8, [Held(0)] * 8, [lambda: Work(1.0, 2.0, 0.0, 0, gives=1)] * 8, asked
        ).schedule

    assert chosen(0.0) == "interleaved"
    assert chosen(1.5) == "zb-h2"


class Skipping(nn.Module):
    """What the first layer gives is wanted at the end, too; the second one halves its width."""

    def __init__(self):
        super().__init__()
        self.lines = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(4, 8)])

    def forward(self, x):
        first = self.lines[0](x)
        return self.lines[2](self.lines[1](first)) + first


@pytest.mark.mpi
def test_bytes_that_cross_a_cut(world, even):
    """Of a skip at each cut that it passes, of the outputs none, of the model's inputs none."""
    found = split.cut(Skipping(), {"x": torch.randn(5, 8)}, False, 2, [], scales(world))
    assert [work.gives for work in found.choice.works] == [5 * 8 * 4, 5 * (4 + 8) * 4, 0]


@pytest.mark.mpi
def test_pieces_run_on_the_first_batch(world, even, monkeypatch):
    """Numbers of an embedding choose its rows; made-up zeros would all be the same one."""
    given = []
    real = nn.functional.embedding
    monkeypatch.setattr(nn.functional, "embedding", lambda x, *a, **b: given.append(x) or real(x, *a, **b))

    class Looking(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.line = nn.Embedding(50, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.line(self.table(x))

    x = torch.arange(12).view(3, 4)
    split.cut(Looking(), {"x": x}, False, 2, [], scales(world))
    seen = world.allgather([tensor.tolist() for tensor in given if type(tensor) is torch.Tensor])
    assert x.tolist() in [tensor for of_rank in seen for tensor in of_rank]


@pytest.mark.mpi
def test_a_greedy_piece_is_its_own_stages_alone(world, even):
    """60 bytes of weights, and a pass that takes 80 for itself: each fits by itself."""
    asked = scales(world, limits=[100, 100], copies=1.0)
    asked.recompute = "auto"
    pieces = [partial(Work, 1.0, 1.0, 1.0, 0), partial(Work, 1.0, 1.0, 1.0, 0, moment=80)]
    found = choose(2, [1] * 2, [Held(60), Held(10)], pieces, asked)
    assert (found.parts, found.recompute, found.warned) == ([(0, 1), (1, 2)], False, [])
    assert [one.most for one in found.needs] == [60, 90]


def test_tensors_without_memory_are_measured_past():
    """The gradient of a sparse table is no block of memory."""
    table = nn.Embedding(10, 8, sparse=True)
    assert profile.of_layers([table], torch.arange(6), ())[0]().gives == 6 * 8 * 4
