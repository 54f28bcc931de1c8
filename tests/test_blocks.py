"""Convolutions in a row: the bits of the layers one by one, or the layers one by one."""

import copy
import gc
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jobs import alone_like, build_alone, has_bits_of_one_process, layouts, run
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from watchers import MODES, passing, replaced

from hpctrain import gradient, piece
from hpctrain.gradient import StraightIntoPlace
from hpctrain.log import LOGGER
from hpctrain.pipeline import blocks
from hpctrain.pipeline import layers as layers_room
from hpctrain.pipeline.blocks import Blocks
from hpctrain.pipeline.choice import Need
from hpctrain.pipeline.fit import HOLES
from hpctrain.pipeline.profile import MadeUpPlaces, Work
from hpctrain.pipeline.rows import rows_of
from hpctrain.report.run_folder import RunFolder
from hpctrain.report.run_folder import rows as rows_of_file
from hpctrain.report.timeline import Timeline
from hpctrain.room import give_back

SHAPE = (4, 16, 12, 12)


def conv(into=16, out=16, size=3, **named):
    return nn.Conv2d(into, out, size, **{"padding": size // 2, **named})


KINDS = {
    "usual": [conv(), nn.ReLU(), conv(), nn.ReLU(), conv()],
    "no relu": [conv(), conv()],
    "in place": [conv(), nn.ReLU(inplace=True), conv()],
    "no bias": [conv(bias=False), nn.ReLU(), conv(bias=False), nn.ReLU(), conv()],
    "wider": [conv(out=32), nn.ReLU(), conv(into=32, out=64), nn.ReLU(), conv(into=64)],
    "kernels": [conv(size=1), nn.ReLU(), conv(size=5), nn.ReLU(), nn.Conv2d(16, 16, (3, 1))],
    "dilated": [conv(dilation=2, padding=2), nn.ReLU(), conv(padding=0)],
    "groups": [conv(groups=16), nn.ReLU(), conv(), nn.ReLU(), conv(groups=2)],
    "strides": [conv(stride=2), nn.ReLU(), conv(out=32), nn.ReLU(), conv(into=32, stride=(2, 1))],
    "odd": [conv(out=5), nn.ReLU(), conv(into=5, out=7), nn.ReLU(), conv(into=7, out=1)],
}
ONE = conv()
KINDS["twice"] = [ONE, nn.ReLU(), ONE, nn.ReLU(), ONE]
OTHERWISE = ("groups", "strides", "odd")
"""Kinds, and any of a single sample, whose layers may run by other kernels, or in larger blocks: not taken then."""
LAID_OTHERWISE = [conv(out=32), nn.ReLU(), conv(into=32), nn.ReLU(), conv(out=64), nn.ReLU()]
LAID_OTHERWISE += [conv(into=64, out=32, stride=2)]


@pytest.fixture
def gains(monkeypatch):
    """Lets every row gain, by the clock; with two threads, by which oneDNN chooses kernels."""
    monkeypatch.setattr(blocks, "LEAST", 1)
    monkeypatch.setattr(blocks, "seconds_of", lambda ways, rounds: [1.0, 2.0])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def row_of(layers):
    torch.manual_seed(1)
    made = copy.deepcopy(nn.Sequential(*layers))
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn_like(p) / p[0].numel() ** 0.5)
    (only,) = rows_of([(str(at), layer) for at, layer in enumerate(made)], [Blocks])
    assert isinstance(only[1], Blocks)
    return only[1], made


def picture(shape=SHAPE, seed=2):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def call(what, layer, value):
    return layer(value)


def taken(row):
    """Whether a row was tried once and is taken; which ones oneDNN can is known of x86 alone."""
    (found,) = row.tried.values()
    return found or platform.machine() not in ("x86_64", "AMD64")


def passes(forward, x, weights):
    """What a forward gives, and the gradients of its input and weights."""
    x = x.clone().requires_grad_()
    found = forward(x)
    wanted = [t for t in (x, *weights) if t.requires_grad]
    return [found, *torch.autograd.grad(found, wanted, picture(found.shape, seed=3))]


def compared(row, module, x):
    """Both ways, bit for bit; a NaN is as good as another."""
    ours = passes(lambda given: row.run(call, given), x, module.parameters())
    theirs = passes(module, x, module.parameters())
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert one.stride() == other.stride()
        assert torch.equal(one.isnan(), other.isnan())
        zero = one.masked_fill(one.isnan(), 0.0), other.masked_fill(other.isnan(), 0.0)
        assert torch.equal(*(t.detach().contiguous().view(torch.int32) for t in zero))


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_bits_of_its_layers(kind, samples, gains):
    row, module = row_of(KINDS[kind])
    for seed in range(2):
        compared(row, module, picture((samples, *SHAPE[1:]), seed))
    if kind not in OTHERWISE and samples > 1:
        assert taken(row)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -0.0, 0.0])
def test_numbers_that_are_none_pass_a_row_as_they_pass_layers(value, gains):
    """oneDNN's own ReLU makes 0 of NaN."""
    row, module = row_of(KINDS["usual"])
    x = picture()
    x[1, 3, 4:6, 5] = value
    compared(row, module, x)
    x[:] = value
    with torch.no_grad():
        for p in module[2].parameters():
            p.zero_()  # what comes to the second ReLU is 0 or NaN
    compared(row, module, x)
    assert taken(row)


def test_blocks_that_backward_lays_otherwise_are_not_taken(gains):
    """The trial sees it: this convolution's gradient has other blocks than what it got."""
    row, module = row_of(LAID_OTHERWISE)
    x = picture((2, 16, 20, 20))
    compared(row, module, x)
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        pytest.skip("which blocks oneDNN takes is the processor's")
    assert list(row.tried.values()) == [False]
    row.tried = dict.fromkeys(row.tried, True)
    with pytest.raises((AssertionError, RuntimeError)):
        compared(row, module, x)


def test_a_trial_weighs_time_bits_and_memory(monkeypatch):
    row, _ = row_of(KINDS["usual"])
    for seconds, won in (([1.0, 1.0], True), ([1.0, 2.0], True), ([1.1, 1.0], False)):
        monkeypatch.setattr(blocks, "seconds_of", lambda ways, rounds: seconds)  # noqa: B023
        assert blocks.wins(row, SHAPE, True) is won
        assert blocks.wins(row, SHAPE, False) is won
    monkeypatch.setattr(blocks, "seconds_of", lambda ways, rounds: [1.0, 2.0])
    odd, _ = row_of(KINDS["odd"])
    assert not blocks.wins(odd, SHAPE, True)  # 5 channels fill blocks of 8 or 16
    monkeypatch.setattr(blocks, "PADDED", 100.0)
    assert isinstance(blocks.wins(odd, SHAPE, True), bool)
    monkeypatch.setattr(blocks, "same_bits", lambda a, b: False)
    assert not blocks.wins(row, SHAPE, True)


def test_a_trial_moves_nothing(gains):
    row, module = row_of(KINDS["usual"])
    before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    straight = StraightIntoPlace(module, MadeUpPlaces())
    with straight.forward():
        row.run(call, picture().requires_grad_())
    assert taken(row)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in module.parameters())
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("width", "shape", "length"),
    [(512, (4, 512, 4, 4), 4), (32, (8, 32, 96, 96), 3), (64, (4, 64, 64, 64), 2)],
)
def test_a_trial_takes_no_more_memory_than_is_counted(width, shape, length):
    """That of weights, what is kept for backward, and both ways' gradients; with the heap's holes.

    In a process of its own: what other tests left in the heap would be taken again, unseen.
    """
    program = "import mpi4py; mpi4py.rc.initialize = False; import test_blocks; "
    program += f"test_blocks.takes_no_more({width}, {shape}, {length})"
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def takes_no_more(width, shape, length):
    blocks.LEAST, blocks.seconds_of = 1, lambda ways, rounds: [1.0, 2.0]  # as `gains` has them
    row, module = row_of(length * [conv(into=width, out=width), nn.ReLU()] + [conv(into=width, out=width)])
    size = picture(shape).nbytes
    works = len(module) * [Work(0.0, 0.0, 0.0, size, gives=size)]
    blocks.wins(row_of(KINDS["usual"])[0], SHAPE, True)  # what libraries take for themselves
    gc.collect()
    give_back()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    assert blocks.wins(row, shape, True)
    taken = resident("VmHWM") - before
    assert taken < HOLES * row.bytes_of_trial(size, works) < 4 * taken


def resident(which):
    """Memory of this process, in bytes: what it has, or has had at most since it was asked to forget."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[which].split()[0]) * 1024


def test_few_shapes_are_tried(gains, monkeypatch):
    row, module = row_of(KINDS["usual"])
    for size in range(6, 20):
        compared(row, module, picture((2, 16, size, 6)))
    assert len(row.tried) == blocks.MOST_SHAPES


def test_a_convolution_that_fails_inside_a_row_fails_as_alone(gains):
    row, module = row_of(KINDS["usual"])
    row.run(call, picture())
    assert taken(row)
    module[2].weight = nn.Parameter(torch.zeros(16, 3, 3, 3))
    asked = []

    def noting(what, layer, value):
        asked.append(what)
        return layer(value)

    with pytest.raises(RuntimeError, match="expected input.* to have 3 channels, but got 16"):
        row.run(noting, picture())
    assert asked == ["0", "1", "2"]


def test_what_no_row_can_take_fails_as_its_layer_does(gains):
    row, module = row_of(KINDS["usual"])
    x = picture((4, 3, 12, 12))
    with pytest.raises(RuntimeError) as wanted:
        module(x)
    with pytest.raises(RuntimeError) as found:
        row.run(call, x)
    assert str(found.value) == str(wanted.value)
    with pytest.raises(AttributeError, match="shape"):
        row.run(lambda what, layer, value: value.shape, {"a": x})


def reset_precision():
    torch.set_float32_matmul_precision("highest")


WATCHED = {
    "hook": lambda m: m[1].register_forward_hook(lambda *_: None).remove,
    "backward hook": lambda m: m[2].register_full_backward_hook(lambda *_: None).remove,
    "global hook": lambda m: register_module_forward_hook(lambda *_: None).remove,
    "own forward": lambda m: setattr(m[1], "forward", m[1].forward),
    "precision": lambda m: torch.set_float32_matmul_precision("medium") or reset_precision,
    "class": lambda m: replaced(nn.ReLU, "forward", lambda self, x: torch.relu(x) * 2.0),
    "own way": lambda m: setattr(m[2], "_conv_forward", m[2]._conv_forward),
    "relu": lambda m: replaced(nn.functional, "relu", lambda x, inplace=False: torch.relu(x)),
    "wrapped": lambda m: replaced(nn.functional, "conv2d", passing(nn.functional.conv2d)),
    "call": lambda m: replaced(nn.Module, "__call__", passing(nn.Module.__call__)),
    "compiled": lambda m: m[1].compile(backend="eager") and None,
    "padding": lambda m: setattr(m[2], "padding_mode", "circular"),
    "channels last": lambda m: m.to(memory_format=torch.channels_last) and None,
}


@pytest.mark.parametrize("way", [*WATCHED, *MODES])
def test_who_could_see_a_tensor_inside_gets_the_layers_one_by_one(way, gains):
    row, module = row_of(KINDS["usual"])
    undo = WATCHED[way](module) if way in WATCHED else None
    seen = []

    def noting(what, layer, value):
        seen.append((value.layout, layer))
        return layer(value)

    try:
        if way in MODES:
            with MODES[way]():
                row.run(noting, picture().requires_grad_())
        else:
            row.run(noting, picture().requires_grad_())
    finally:
        if undo:
            undo()
    assert [layout for layout, _ in seen] == 5 * [torch.strided]
    assert [layer for _, layer in seen] == list(module)
    assert not row.tried
    if way not in ("own forward", "own way", "compiled", "padding", "channels last"):
        row.run(noting, picture().requires_grad_())
        assert [layout for layout, _ in seen[5:]] == 5 * [torch._mkldnn]


@pytest.mark.parametrize("given", [SHAPE[1:], (4, 16, 12, 12, 1), (0, 16, 12, 12)])
def test_other_inputs_than_pictures(given, gains):
    row, _ = row_of(KINDS["usual"])
    x = torch.ones(given)
    if len(given) == 5:
        with pytest.raises(RuntimeError, match="3D .* or 4D"):
            row.run(call, x)
    else:
        row.run(call, x)
    assert not any(row.tried.values())
    with pytest.raises(RuntimeError, match="type"):
        row.run(call, picture().double())


def test_small_inputs_are_no_row(gains, monkeypatch):
    monkeypatch.setattr(blocks, "LEAST", picture().numel() + 1)
    row, module = row_of(KINDS["usual"])
    compared(row, module, picture())
    assert not row.tried


def test_strides_of_sides_of_one_count(gains):
    """Channels last, for torch's kernels, and contiguous at once."""
    row, module = row_of([conv(into=1), nn.ReLU(), conv()])
    x = torch.empty_strided((4, 1, 12, 12), (144, 1, 12, 1)).copy_(picture((4, 1, 12, 12)))
    assert x.is_contiguous()
    compared(row, module, x)
    assert not row.tried
    row, module = row_of([conv(size=1), nn.ReLU(), conv(size=1)])
    module.to(memory_format=torch.channels_last)
    compared(row, module, picture())
    assert not row.tried


def test_a_bias_may_change_before_backward(gains):
    row, module = row_of(KINDS["usual"])
    found = row.run(call, picture().requires_grad_())
    with torch.no_grad():
        module[0].bias.add_(1.0)
    found.sum().backward()
    assert taken(row)


def test_which_layers_are_rows():
    class Own(nn.Conv2d):
        pass

    def names(*layers):
        return [name for name, _ in rows_of([(str(at), layer) for at, layer in enumerate(layers)], [Blocks])]

    assert names(conv(), nn.ReLU(), conv()) == ["0 to 2"]
    assert names(conv(), Own(16, 16, 3)) == ["0", "1"]
    assert names(conv(), conv(padding_mode="circular")) == ["0", "1"]
    assert names(conv(), conv(padding="same")) == ["0", "1"]
    assert names(conv(), nn.ReLU(), nn.ReLU(), conv()) == ["0", "1", "2", "3"]
    assert names(conv(), nn.BatchNorm2d(16), conv(), conv()) == ["0", "1", "2 to 3"]
    assert names(nn.Conv1d(1, 1, 1), nn.Conv1d(1, 1, 1)) == ["0", "1"]
    assert names(nn.ReLU(), conv(), nn.ReLU()) == ["0", "1", "2"]
    assert names() == []


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2.weight", "4.bias", "02", "024"])
def test_frozen_weights(frozen, gains):
    row, module = row_of(KINDS["usual"])
    for name, p in module.named_parameters():
        p.requires_grad_(frozen != name and (frozen.isdigit() is False or name[0] not in frozen))
    compared(row, module, picture())
    assert taken(row)
    with torch.no_grad():
        assert torch.equal(row.run(call, picture()), module(picture()))
    assert torch.equal(row.run(call, picture()), module(picture()))  # the input wants none


def test_gradients_of_gradients_go_past_a_row(gains):
    """oneDNN has no kernel for them in its layout, nor for batches of gradients.

    Those of second order are sums of two graphs' then, which rounds otherwise.
    """
    row, module = row_of(KINDS["usual"])
    module[0].bias.requires_grad_(False)
    weights = [p for p in module.parameters() if p.requires_grad]
    for straight in (False, True):
        both = []
        for forward in (lambda x: row.run(call, x), module):
            x = picture().requires_grad_()
            if straight:
                watching = StraightIntoPlace(module, MadeUpPlaces())
                watching.weights = {id(p): p for p in module.parameters()}
                with watching.forward(0):
                    found = forward(x)
            else:
                found = forward(x)
            (g,) = torch.autograd.grad(found.square().sum(), [weights[1]], create_graph=True)
            both.append([found, g, *torch.autograd.grad(g.square().sum(), [x, *weights])])
        for at, (one, other) in enumerate(zip(*both, strict=True)):
            assert at > 1 or torch.equal(one, other)
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()))
    assert taken(row)
    both = []
    for forward in (lambda x: row.run(call, x), module):
        x = picture().requires_grad_()
        found = forward(x)
        directions = picture((3, *found.shape), seed=5)
        both.append(torch.autograd.grad(found, [x, *weights], directions, is_grads_batched=True))
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # of batches of three, other kernels


def test_backward_twice_and_weights_that_change_between(gains):
    row, module = row_of(KINDS["usual"])
    x = picture().requires_grad_()
    found = row.run(call, x)
    first = torch.autograd.grad(found.sum(), [x], retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(found.sum(), [x], retain_graph=True)[0])
    with torch.no_grad():
        module[2].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.sum().backward()


def test_a_backward_that_is_looked_at_goes_past_a_row(gains):
    row, module = row_of(KINDS["usual"])
    both = []
    for forward in (lambda x: row.run(call, x), module):
        x = picture().requires_grad_()
        found = forward(x)
        with torch.autograd.detect_anomaly(check_nan=True):
            both.append(torch.autograd.grad(found.square().sum(), [x, *module.parameters()]))
    assert taken(row)
    assert all(torch.equal(one, other) for one, other in zip(*both, strict=True))


def test_a_weight_that_is_computed_is_not_asked_for(gains):
    """A parametrisation that comes later, whose every look at the weight is a step of a power iteration."""
    row, module = row_of(KINDS["usual"])
    nn.utils.parametrizations.spectral_norm(module[2])
    twin = copy.deepcopy(module)
    assert torch.equal(row.run(call, picture()), twin(picture()))
    vectors = [dict(one.named_buffers())["2.parametrizations.weight.0._u"] for one in (module, twin)]
    assert torch.equal(*vectors)


def test_no_row_where_gradients_of_gradients_were_seen(gains):
    """In the first forwards, whose layers run one by one."""
    row, module = row_of(KINDS["usual"])
    for again in (False, True):
        found = module(picture().requires_grad_())
        row.watch(found)
        torch.autograd.grad(found.sum(), [module[0].weight], create_graph=again)
        row.run(call, picture())
        assert bool(row.tried) is not again
        row.tried.clear()


def test_a_gradient_of_gradients_of_changed_inputs_is_refused(gains):
    row, module = row_of(KINDS["usual"])
    x = picture().requires_grad_()
    found = row.run(call, x)
    with torch.no_grad():
        module[4].bias.add_(1.0)
    with pytest.raises(RuntimeError, match="was changed in place before a gradient of gradients"):
        torch.autograd.grad(found.sum(), [x], create_graph=True)


def test_memory_that_waits_is_counted_in_blocks(gains, monkeypatch):
    monkeypatch.setattr(gradient, "SMALLEST_FILTER", 1)
    row, module = row_of(KINDS["usual"])
    sizes = []
    for forward in (lambda x: row.run(call, x), module):
        straight = StraightIntoPlace(module, MadeUpPlaces())
        x = picture().requires_grad_()
        with straight.forward(0):
            found = forward(x)
        with straight.accumulating(0):
            found.sum().backward()
        sizes.append(straight.waiting_bytes)
    assert taken(row)
    one = picture().nbytes
    # x and g of each; that of the sum is one number, expanded
    assert sizes == [6 * one, 5 * one + 4]


# -- in stages -------------------------------------------------------------------------------------


@pytest.fixture
def used(monkeypatch):
    """Lets every row gain; lists the shapes that are computed in blocks, and whether there is a graph."""
    found, real = [], blocks.wins

    def counted(row, shape, graph):
        won = real(row, shape, graph)
        found.extend([(tuple(shape), graph)] * won)
        return won

    monkeypatch.setattr(blocks, "wins", counted)
    monkeypatch.setattr(blocks, "LEAST", 1)
    monkeypatch.setattr(blocks, "seconds_of", lambda ways, rounds: [1.0, 2.0])
    monkeypatch.setattr(gradient, "SMALLEST_FILTER", 1)
    return found


CUTS = {2: ["6"], 3: ["6", "12"], 4: ["6", "10", "14"]}


@pytest.mark.mpi
@pytest.mark.parametrize("recompute", ["never", "always"])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1"])
@pytest.mark.parametrize("dear", [False, True])
def test_blocks_in_stages_have_the_bits_of_one_process(world, build, used, schedule, recompute, dear):
    if world.size not in layouts(world.size):
        pytest.skip("as many stages as ranks, two at least")
    settings = {"micro_batches": 5, "schedule": schedule, "recompute": recompute}
    job = build("pictured_row", world.size, cuts=CUTS[world.size], **settings)
    if dear:
        job.engine.straight.at_once(job.engine.module.parameters())
    has_bits_of_one_process(world, job, "pictured_row")
    shapes = {shape for shape, graph in used if graph}
    assert shapes == {(2, 16, 6, 6)}  # of a single sample torch computes otherwise


@pytest.mark.mpi
def test_replicas_and_evaluation_in_rows(world, build, used):
    if world.size != 4:
        pytest.skip("2 x 2 ranks")
    job = build("pictured_row", 2, cuts=CUTS[2], micro_batches=8, schedule="zb-h1", batch=16)
    losses, expected = run(job, 3), alone_like(job, 3)[0]
    for _ in range(4):  # the first forwards in evaluation are looked at
        measured = job.engine.evaluate(job.split_batches("train"), job.task.measure)
    alone = build_alone(job)
    for share in job.topology.comms.pipe.allgather(dict(job.engine.module.state_dict())):
        alone.engine.module.load_state_dict(share, strict=False)
    expected_measures = alone.engine.evaluate(alone.split_batches("train"), alone.task.measure)
    alone.close()
    alone.topology.close()
    assert measured == expected_measures
    assert [loss for loss, *_ in losses] == pytest.approx([loss for loss, *_ in expected], rel=1e-5)
    assert {shape for shape, graph in used if graph} == {(2, 16, 6, 6)}
    assert any(not graph for _, graph in used)


@pytest.mark.mpi
@pytest.mark.parametrize("short", ["nothing", "copies", "warned", "exact"])
def test_blocks_are_left_out_where_memory_is_short(world, build, used, monkeypatch, short):
    """A row's copy of what it gets is counted where it is taken."""
    if world.size != 2:
        pytest.skip("two stages")
    chosen, before = [], []

    def changed(*arguments, **named):
        choice = real(*arguments, **named)
        room = {"copies": 1.0}.get(short, 1e12)
        choice.needs = [Need(n.held, n.kept, n.times, n.more, n.held + room) for n in choice.needs]
        choice.warned += ["memory may run out"] if short == "warned" else []
        choice.exact |= short == "exact"
        before.extend(choice.needs)
        chosen.append(choice)
        return choice

    real = layers_room.choose
    monkeypatch.setattr(layers_room, "choose", changed)
    job = build("pictured_row", 2, cuts=CUTS[2], micro_batches=5, schedule="1f1b")
    (choice,) = chosen
    has_bits_of_one_process(world, job, "pictured_row")
    if short == "nothing":
        assert used
        size = 2 * 16 * 6 * 6 * 4
        assert [n.kept - old.kept for n, old in zip(choice.needs, before)] == [size, size]
    else:
        assert not used
        assert choice.needs == before


@pytest.mark.mpi
def test_a_layer_of_a_row_that_fails_is_named(world, build, used, monkeypatch):
    if world.size != 2:
        pytest.skip("two stages")
    job = build("pictured_row", 2, cuts=CUTS[2], micro_batches=5, schedule="1f1b")
    run(job, 2)
    assert used
    real = blocks.rectified

    def failing(x):
        raise ValueError("no more")

    monkeypatch.setattr(blocks, "rectified", failing if world.rank == 1 else real)
    with pytest.raises(Exception, match="no more") as raised:
        job.engine.step(2, job.loader.read(0))
    assert "layer 7 (ReLU), given float32 (2, 16, 6, 6)" in str(raised.value)
    assert piece.tensors_of(job.engine.module)


@pytest.mark.mpi
@pytest.mark.parametrize("wins", [True, False])
def test_a_watched_step_tells_of_rows(world, build, used, monkeypatch, shared_tmp, caplog, wins):
    if world.size != 2:
        pytest.skip("two stages")
    if not wins:
        monkeypatch.setattr(blocks, "wins", lambda *_: False)
    job = build("pictured_row", 2, cuts=CUTS[2], micro_batches=4)
    run_folder = RunFolder(shared_tmp, writes=world.rank == 0)
    watching, position = Timeline(job, run_folder), 0
    with caplog.at_level("INFO", LOGGER.name):
        for number in range(3):
            step = job.loader.read(position)
            watching.before(number + 1)
            job.engine.step(number, step)
            watching.after(number + 1, number + 1)
            position = step.next_position
    if world.rank:
        return
    (row,) = [row for row in rows_of_file(run_folder.path / "metrics.jsonl") if row["event"] == "pipeline"]
    names = [["layer 2 (Conv2d) to layer 4 (Conv2d)"], ["layer 6 (Conv2d) to layer 16 (Conv2d)"]]
    assert [told["rows"] for told in row["stages"]] == (names if wins else [[], []])
    told = f"layers that run as one: stage 0 {names[0][0]}; stage 1 {names[1][0]}"
    assert (told in caplog.messages) is wins
