"""Stages against one process: every model that pipelines tend to get wrong, bit for bit where sums keep their order."""

import pickle
import random as python
import re
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import odd_models
import pytest
import stage_models
import torch
from helpers import SAMPLES
from jobs import (
    TIED,
    alone_like,
    build_alone,
    evaluate_alike,
    evaluates_as_one_process,
    has_bits_of_one_process,
    layouts,
    run,
    take_weights,
)
from marks import lays_weights
from mpi4py import MPI
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from hpctrain import assemble, gradient, portion, products, waiting
from hpctrain.averaging import links
from hpctrain.averaging.averager import Averager
from hpctrain.averaging.node import Node
from hpctrain.averaging.overlap import WAYS, Choice
from hpctrain.config import ClassPath, Optimizer
from hpctrain.data import order
from hpctrain.errors import ConfigError, DivergedError, HpctrainError
from hpctrain.log import LOGGER
from hpctrain.piece import tensors_of
from hpctrain.pipeline import channel, profile, split, weigh
from hpctrain.pipeline.graph import Graph
from hpctrain.pipeline.held import Living
from hpctrain.pipeline.operators import forbidden
from hpctrain.pipeline.part import input_of
from hpctrain.pipeline.pipeline import Pipeline
from hpctrain.pipeline.profile import Work
from hpctrain.pipeline.schedule import SCHEDULES, Backward, Forward, program
from hpctrain.pipeline.stage import Stage
from hpctrain.pipeline.ties import Copies
from hpctrain.pipeline.trace import Writer
from hpctrain.pipeline.transport import TIED as OF_TIES
from hpctrain.pipeline.transport import Transport
from hpctrain.pipeline.watch import ASK, Watch
from hpctrain.recipes.samples import Samples
from hpctrain.report import summary
from hpctrain.report.passes import as_simulation
from hpctrain.report.run_folder import RunFolder, rows
from hpctrain.report.timeline import WATCHED, Timeline, seconds_ahead
from hpctrain.staged import GROUP, PASSES
from hpctrain.verify import compare

MODELS = [
    "plain_row",
    "Row",
    "Named",
    "Skips",
    "Reaching",
    "Acts",
    "Tied",
    "tied_row",
    "FrozenHead",
    "Wide",
    "Filled",
    "parametrised_row",
]


@pytest.fixture(autouse=True)
def some_models_at_three(world, request):
    """Every model runs at 2 and 4 ranks; three stages, an odd number, take the ones that differ most."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if world.size == 3 and params.get("model", "Skips") not in ("plain_row", "Skips", "Named", "Tied"):
        pytest.skip("2 and 4 ranks do")


@pytest.fixture
def waits(monkeypatch):
    """Lets every linear layer's and convolution's weight gradient wait; counts those that do."""
    from hpctrain.averaging.places import Places

    monkeypatch.setattr(gradient, "SMALLEST", 1)
    monkeypatch.setattr(gradient, "LARGE", 1)
    monkeypatch.setattr(gradient, "SMALLEST_FILTER", 1)
    monkeypatch.setattr(weigh, "SPLIT_WORTH", float("inf"))  # of so small ones no split is repaid
    asked, later = [], Places.later

    def counting(self, *parameters):
        asked.append(later(self, *parameters))
        return asked[-1]

    monkeypatch.setattr(Places, "later", counting)
    return asked


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("model", "schedule"), [*((m, "1f1b") for m in MODELS), ("plain_row", "gpipe"), ("Skips", "gpipe")]
)
def test_every_split_equals_one_process(world, build, model, schedule):
    """`verify` at every stages x replicas; uneven micro-batches, some of them empty."""
    for stages in layouts(world.size, model):
        for count, batch in ((7, 8), (5, 3)):
            job = build(model, stages, micro_batches=count, schedule=schedule, batch=batch)
            assert compare(job, 2) is None


@pytest.mark.mpi
@pytest.mark.parametrize("model", MODELS)
def test_one_replica_has_the_bits_of_one_process(world, build, model):
    """Losses, norms and weights, clipped or not; where two stages use a weight, its sum has another order."""
    if world.size not in layouts(world.size, model):
        pytest.skip("as many stages as ranks, two at least")
    has_bits_of_one_process(world, build(model, world.size, micro_batches=5), model)


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("model", "count"),
    [
        ("plain_row", 5),
        ("Skips", 4),
        ("Reaching", 6),
        ("Acts", 3),
        ("Wide", 2),
        ("Filled", 6),
        ("Tied", 5),
        ("tied_row", 5),
    ],
)
def test_several_stages_a_rank_have_the_bits_of_one_process(world, build, waits, model, count):
    """Interleaved: skips to stages of the same rank, fewer micro-batches than ranks, evaluation, other layouts."""
    for stages in layouts(world.size):
        if 2 * stages > {"plain_row": 8, "Skips": 8, "Tied": 8, "Reaching": 4}.get(model, 7):
            continue  # more than its pieces
        count = max(count, world.size // stages)
        job = build(model, stages, micro_batches=count, schedule="interleaved")
        assert len(job.pipeline.stages) == 2
        if stages == world.size:
            has_bits_of_one_process(world, job, model)
            alone = build_alone(job)
            take_weights(job, alone)
            found = job.engine.evaluate(job.split_batches("train"), job.task.measure)
            others = alone.engine.evaluate(alone.split_batches("train"), alone.task.measure)
            room = 1e-5 if model in TIED else 0.0
            assert all(found[n] == pytest.approx(others[n], rel=room, abs=0.0) for n in found)
            alone.close()
            alone.topology.close()
        else:
            assert compare(job, 2) is None


@pytest.mark.mpi
@pytest.mark.parametrize(
    "work", [Work(1.0, 1.0, 1.0, 0), Work(1.0, 2.0, 0.0, 0), Work(1.0, 1.2, 0.8, 0, 1.5)]
)
def test_a_schedule_of_its_own_choice_has_the_bits_of_one_process(world, build, waits, monkeypatch, work):
    """Zero bubble, interleaved, and backward passes that are split at the end; what is chosen is run and told."""
    if world.size not in layouts(world.size):
        pytest.skip("as many stages as ranks, two at least")
    monkeypatch.setattr(profile, "timed", lambda *_: work)
    monkeypatch.setattr(profile, "yardstick", lambda: 1.0)
    monkeypatch.setattr(weigh, "SPLIT_WORTH", 1.1)
    job = build("broad_row" if world.size == 2 else "plain_row", world.size, micro_batches=2, schedule="auto")
    # the last is split in the last micro-batches alone: zb-h1 is the shortest on three stages, by the simulation
    splits = work.weight_gradient == 1.0 or (work.joint > 0.0 and world.size == 3)
    expected = "zb-h1" if splits else "interleaved"  # of two micro-batches, too few for zb-h2
    assert (job.schedule, len(job.pipeline.stages)) == (expected, 1 + (expected == "interleaved"))
    assert job.config.parallel.schedule == "auto"  # a resume with other stages chooses anew
    has_bits_of_one_process(world, job, "plain_row")
    assert any(world.allgather(any(waits)))


@pytest.mark.mpi
def test_no_schedule_is_chosen_where_none_can_gain(world, build):
    if world.size not in layouts(world.size):
        pytest.skip("as many stages as ranks, two at least")
    job = build("plain_row", world.size, micro_batches=4, schedule="auto", invariant=True)
    assert job.schedule == "1f1b"


@pytest.mark.mpi
@pytest.mark.parametrize("model", ["LargeTied", "LargeTiedGraph"])
def test_a_copy_of_a_weight_is_multiplied_as_the_weight_is(world, build, model, caplog, monkeypatch):
    """Only the sum of a tied weight's gradients has another order: the first loss has the bits of one process."""
    if world.size != 2:
        pytest.skip("two stages use it")
    monkeypatch.setattr(profile, "timed", lambda *_: 1 / 0)
    with caplog.at_level("INFO", LOGGER.name):
        job = build(model, 2, micro_batches=4, schedule="auto", cuts=["back"])
    if world.rank == 0:
        assert any("nothing is foretold, as pieces can't be measured" in line for line in caplog.messages)
    assert "the schedule is 1f1b: no times were measured to choose by" in caplog.messages
    assert [tie.name for tie in job.pipeline.ties] == ["first.weight"]
    taken, real = [], Copies.taken

    def taking(self, copy):
        taken.append((self._fresh[id(copy)], copy.grad))
        return real(self, copy)

    monkeypatch.setattr(Copies, "taken", taking)
    assert run(job, 1)[0][0] == alone_like(job, 1)[0][0][0]
    assert taken == [(False, None)] * world.rank  # computed in place, not by autograd
    assert compare(job, 2) is None


@pytest.mark.mpi
def test_a_micro_batch_too_small_for_batchnorm_is_named(world, build, caplog):
    if world.size != 2:
        pytest.skip("two stages")
    with pytest.raises(ConfigError, match=r"a micro-batch of 1 samples is too small .*micro_batches lower"):
        build("Normed", 2, micro_batches=8)
    with caplog.at_level("INFO", LOGGER.name):
        build("Normed", 2, micro_batches=3)
    told = "BatchNorm layers see one micro-batch at a time, of 3 samples at most: results depend on"
    assert any(message.startswith(told) for message in caplog.messages)


@pytest.mark.mpi
def test_metrics_are_tried_once_on_the_last_stage(world, build, caplog):
    if world.size not in layouts(world.size):
        pytest.skip("as many stages as ranks, two at least")
    job = build("Skips", world.size, micro_batches=4)
    given = []

    def metrics(outputs, batch):
        given.append((outputs.shape, len(batch), torch.is_grad_enabled()))
        outputs.mul_(2)
        for tensor in (*batch.inputs.values(), *batch.targets.values()):
            tensor.mul_(2)
        raise ValueError("as an own task might")

    job.engine.metrics = metrics
    with caplog.at_level("WARNING", LOGGER.name):
        found = run(job, 2)
    assert found == alone_like(job, 2)[0]
    last = world.rank == world.size - 1
    assert [*given] == ([(torch.Size([2, 2]), 2, False)] if last else [])
    told = "the metrics can't be computed (ValueError: as an own task might)"
    assert sum(told in message for message in caplog.messages) == last


@pytest.mark.mpi
@lays_weights
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "zb-h2", "interleaved"])
def test_laid_weights_have_the_bits_of_one_process(world, build, waits, schedule, monkeypatch):
    """Whose weights are taken as they stand."""
    if world.size not in layouts(world.size) or (schedule == "interleaved" and world.size > 2):
        pytest.skip("as many stages as ranks, two at least; five layers have weights")
    for name, value in (("AVAILABLE", True), ("REPAID", 2), ("seconds_of", lambda ways: [1.0, 0.5, 0.0])):
        monkeypatch.setattr(products, name, value)
    job = build("broad_row", world.size, micro_batches=6, schedule=schedule)
    found = run(job, 4)
    laid = world.allgather(job.engine.memory()["laid weights"])
    assert sum(laid) >= 2 * 4 * (2 * 64 * 128)
    monkeypatch.setattr(products, "REPAID", 2**40)
    expected_found, expected = alone_like(job, 4)
    assert found == expected_found
    for name, value in tensors_of(job.engine.module).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.mpi
@pytest.mark.parametrize("way", ["oneDNN", "MKL", "MKL, turned"])
@pytest.mark.parametrize("model", ["plain_row", "Skips", "Tied"])
def test_products_in_every_way_have_the_bits_of_one_process(world, build, waits, model, way, monkeypatch):
    """Whichever this processor's are computed in: a row, operators and attention."""
    if way == "oneDNN" and not products.there():
        pytest.skip("no AVX-512")
    taken, kernel, turned = set(), products._kernel, products.turned

    def turning(*given):
        found = turned(*given)
        if found is not None:
            taken.add("MKL, turned")
        return found

    for name, value in (
        ("AVAILABLE", way == "oneDNN"),
        ("TURNS", way == "MKL, turned"),
        ("WIDE", 1),
        ("FEW", range(1, 99)),
        ("_kernel", lambda *given: taken.add("oneDNN") or kernel(*given)),
        ("turned", turning),
    ):
        monkeypatch.setattr(products, name, value)
    for stages in layouts(world.size, model)[-1:]:
        job = build(model, stages, micro_batches=5, schedule="zb-h2")
        assert compare(job, 2) is None
        assert set().union(*world.allgather(taken)) == {way} - {"MKL"}


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("model", "what"),
    [
        ("Reversing", r"\(Reversing\), stage_models.py:\d+: `return .*Reverse is a torch.autograd.Function"),
        ("HookingByAnotherName", r"\(HookingByAnotherName\), stage_models.py:\d+: `h.register_hook"),
        ("Hooking", r"\(Hooking\), stage_models.py:\d+: `h.register_hook.*hook on a tensor's gradient"),
        ("HookingModule", r"backward hook of first would be lost"),
        ("Packing", r"\(Packing\), stage_models.py:\d+: .*what hooks make of tensors saved"),
        ("Adversary", r"\(Adversary\), stage_models.py:\d+: .*a weight is frozen, or no more"),
        ("LooksAtGradients", r"\(LooksAtGradients\), .*looks at the gradient of a weight"),
        ("DrawsShares", r"\(DrawsShares\), stage_models.py:\d+: .*_Dirichlet is a torch.autograd.Function"),
        (
            "Nested",
            r"\(Nested\), stage_models.py:\d+: .*no_grad, or enable_grad, inside an autocast would be lost",
        ),
        ("Rounding", r"\(Rounding\), stage_models.py:\d+: .*Rounds is a torch.autograd.Function: its own"),
        ("Widening", r"\(Widening\), stage_models.py:\d+: .*sets the default dtype to torch.float64"),
    ],
)
def test_what_torch_export_would_leave_out_is_refused(world, build, model, what):
    """A backward of one's own, and the dtype that tensors have where none is said."""
    if world.size != 2:
        pytest.skip("a model of two layers")
    apply, register_hook = torch.autograd.Function.apply, torch.Tensor.register_hook
    with pytest.raises(ConfigError, match=what) as raised:
        build(model, 2, micro_batches=2)
    assert "layers()" in str(raised.value)
    assert torch.autograd.Function.apply == apply
    assert torch.Tensor.register_hook is register_hook
    assert torch.get_default_dtype() is torch.float32
    assert torch.set_grad_enabled.__init__.__module__ == "torch.autograd.grad_mode"
    assert torch.Tensor.grad is torch._C.TensorBase.grad
    assert torch.Tensor.requires_grad is torch._C.TensorBase.requires_grad


@pytest.mark.mpi
def test_what_torch_itself_keeps_elsewhere_has_the_bits_of_one_process(world, build):
    if world.size != 2:
        pytest.skip("two stages")
    has_bits_of_one_process(
        world, build("Packing", 2, arguments={"halves": False}, micro_batches=5), "Packing"
    )


@pytest.mark.mpi
def test_a_hook_on_what_several_stages_use_is_refused(world, build):
    """None of them has the whole gradient; one stage with all its uses has."""
    if world.size != 2:
        pytest.skip("two stages")
    with pytest.raises(ConfigError, match="hook on the gradient of into.weight, which stages 0 and 1 both"):
        build("HookedTie", 2, micro_batches=2)


@pytest.mark.mpi
@pytest.mark.parametrize("model", ["reversing_row", "Filling"])
def test_layers_may_do_what_operators_cannot_say(world, build, model):
    """A backward of their own, a look at numbers; also in a subclass of nn.Sequential."""
    if world.size not in (2, 3):
        pytest.skip("three layers have weights")
    has_bits_of_one_process(world, build(model, world.size, micro_batches=5), model)


@pytest.mark.mpi
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "zb-h2", "interleaved"])
@pytest.mark.parametrize("model", ["plain_row", "tied_row"])
def test_averaging_between_nodes_begins_while_stages_still_work(
    world, build, waits, monkeypatch, model, schedule
):
    """Nodes are made up: the replicas of a stage stand on two. What stages share leaves last; the bits are the same."""
    if world.size != 4:
        pytest.skip("two stages of two replicas")
    monkeypatch.setattr(assemble, "Averager", partial(Averager, node_of=[0, 1]))
    monkeypatch.setattr(links, "bucket_bytes", lambda *_: 4096)
    events, announce, collect = list[str](), Node.announce, Pipeline.collect

    def announcing(self, count):
        events.append(f"{count} of {len(self.buckets)}")
        announce(self, count)

    def collecting(self, *arguments):
        events.append("passes are over")
        collect(self, *arguments)

    monkeypatch.setattr(Node, "announce", announcing)
    monkeypatch.setattr(Pipeline, "collect", collecting)
    found, cuts = [], list[str]()
    for ways in (WAYS[:1], WAYS[1:]):
        job = build(model, 2, micro_batches=8, schedule=schedule, batch=16, cuts=cuts)
        cut = job.pipeline.cut  # by measured times; the second job is to have the same
        cuts = [cut.layers[start][0] for start, _ in cut.ranges[1:]]
        overlap = job.engine.averager.overlap
        overlap.choice = Choice(job.topology.comms.data, ways)
        events.clear()
        losses = run(job, 4)
        found.append((losses, {n: v.clone() for n, v in tensors_of(job.engine.module).items()}))
        after = [n for n, event in enumerate(events) if event == "passes are over"]
        early = [events[a + 1 : b] for a, b in pairwise([-1, *after])]
        assert len(overlap.places.order) > 1
        if ways == WAYS[:1]:
            assert all(
                told == [f"{len(overlap.places.order)} of {len(overlap.places.order)}"] for told in early[1:]
            )
        else:  # of the step before, and of this one
            last = {at for index in overlap.places._shared for at in overlap.places._buckets_of[index]}
            alone = len(overlap.places.order) - len(last)
            assert max(world.allgather(alone)) > 0
            assert all((len(told) > 1) == (alone > 0) for told in early[2:]), early
    assert found[0][0] == found[1][0]
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())


@pytest.mark.mpi
@pytest.mark.parametrize("cuts", [["2"], ["3"]])
def test_tensors_of_one_memory_may_cross_but_not_be_changed(world, build, cuts):
    """At the other end each has memory of its own; within a stage they may be."""
    if world.size != 2:
        pytest.skip("two stages")
    has_bits_of_one_process(world, build("parts_row", 2, micro_batches=5, cuts=cuts), "parts_row")
    job = build("parts_row", 2, micro_batches=5, cuts=cuts, arguments={"changes": True})
    if cuts == ["3"]:
        has_bits_of_one_process(world, job, "parts_row")
        return
    with pytest.raises(
        ConfigError, match=r"stage 1 \(layers 2 to 3\) changes in place .* other tensors lay in one memory"
    ):
        job.engine.step(0, job.loader.read(0))


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("model", "what"),
    [
        ("ChangesData", r"operator mul_ of .*stage_models.py.*takes a tensor behind torch's back \(.data"),
        ("OwnGradient", r"operator .* of .*takes a tensor behind torch's back \(.data, torch.autograd.grad"),
        ("Mapped", "torch.func or torch.vmap in the forward is more than operators can say"),
    ],
)
def test_what_operators_cannot_say_is_refused(world, build, model, what):
    """torch.export alone would leave it out, and numbers would be others."""
    if world.size != 2:
        pytest.skip("two stages")
    with pytest.raises(ConfigError, match=what):
        build(model, 2, micro_batches=2)


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("model", "what"),
    [
        ("jittery_row", "results depend on the layout"),
        ("DrawsInVain", "written down once, each stays the same number"),
        ("PartJittery", "results depend on the layout"),
    ],
)
def test_random_numbers_that_are_not_torchs_are_told_of(world, build, caplog, model, what):
    if world.size != 2:
        pytest.skip("two stages")
    with caplog.at_level("WARNING", LOGGER.name):
        job = build(model, 2, micro_batches=2, cuts=["last"] if model == "PartJittery" else [])
        for number in range(2):
            job.engine.step(number, job.loader.read(0))
    told = f"draws from the global random numbers of NumPy and Python: {what}; draw from torch"
    said = sum(told in message for message in caplog.messages)
    assert sum(world.allgather(said)) == (2 if model == "DrawsInVain" else 1)


@pytest.mark.mpi
def test_layers_that_leave_a_parameter_out_are_refused(world, build):
    if world.size != 2:
        pytest.skip("two stages")
    with pytest.raises(
        ConfigError, match=r"Listing.layers\(\) leaves out position, and stages run what it lists"
    ):
        build("Listing", 2, micro_batches=2)


@pytest.mark.mpi
def test_the_layers_that_the_documentation_shows(world, build, tmp_path, monkeypatch):
    if world.size != 2:
        pytest.skip("two stages")
    text = (Path(__file__).parents[1] / "docs" / "pipeline.md").read_text()
    for name, block in re.findall(r"```python file=(\S+)\n(.*?)```", text, re.S):
        (tmp_path / name).write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    job = build("Blocks", 2, module="my_blocks", micro_batches=4, cuts=["blocks.2"])
    assert job.pipeline.cut.names(1) == ["blocks.2", "blocks.3", "head"]
    has_bits_of_one_process(world, job, "Blocks")


@pytest.mark.mpi
@pytest.mark.parametrize("recompute", ["never", "always"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_convolutions_have_the_bits_of_one_process(world, build, waits, schedule, recompute):
    if world.size not in layouts(world.size):
        pytest.skip("as many stages as ranks, two at least")
    job = build("convolved_row", world.size, micro_batches=5, schedule=schedule, recompute=recompute)
    has_bits_of_one_process(world, job, "convolved_row")
    assert any(world.allgather(any(waits)))


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("schedule", "counts"),
    [
        ("1f1b", {n: [0, 1, 1, 1] for n in (2, 3, 4)}),
        ("zb-h1", {n: [0, 2, 3, 4] for n in (2, 3, 4)}),
        ("zb-h2", {2: [0, 3], 3: [0, 3, 5], 4: [0, 1, 3, 5]}),
    ],
)
def test_what_is_dear_to_split_waits_behind_the_last_gradient(
    world, build, waits, schedule, counts, monkeypatch
):
    """In as many micro-batches as have their weight gradients there; none on the first stage, for which none waits."""
    if world.size not in layouts(world.size):
        pytest.skip("as many stages as ranks, two at least")
    waited, real = set(), waiting.Entry
    monkeypatch.setattr(waiting, "Entry", lambda v, *rest: waited.add(v) or real(v, *rest))
    cuts = {2: ["2"], 3: ["2", "3"], 4: ["2", "3", "5"]}[world.size]  # each stage has what may wait
    job = build("convolved_row", world.size, micro_batches=5, schedule=schedule, cuts=cuts)
    job.engine.straight.at_once(job.engine.module.parameters())
    waited.clear()  # of measuring
    has_bits_of_one_process(world, job, "convolved_row")
    assert waited == set(range(5 - counts[world.size][job.topology.stage], 5))


@pytest.mark.mpi
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("model", ["plain_row", "Skips", "Tied"])
def test_short_products_wait_for_one_another(world, build, waits, model, schedule, monkeypatch):
    """Whole backward passes too let them; those of a weight are computed one after the other, to the same bits."""
    monkeypatch.setattr(waiting, "rows_together", lambda weight: 5)  # of 1 or 2 rows each
    monkeypatch.setattr(waiting, "TOGETHER", 1)
    computed, real = [], gradient.StraightIntoPlace._compute

    def noting(self, parameters, work, now=False):
        computed.append((id(self), id(parameters[0])))
        real(self, parameters, work, now)

    if world.size not in layouts(world.size, model):
        pytest.skip("as many stages as ranks, two at least")
    job = build(model, world.size, micro_batches=7, schedule=schedule)
    monkeypatch.setattr(gradient.StraightIntoPlace, "_compute", noting)
    if model == "Tied":
        assert compare(job, 3) is None
    else:
        has_bits_of_one_process(world, job, model)
    mine = [at for who, at in computed if who == id(job.engine.straight)]
    if any(waits):
        assert any(a == b for a, b in pairwise(mine))
    each = world.allgather(any(waits))
    everywhere = model == "plain_row" and schedule != "interleaved"  # which leaves one of four none
    assert all(each) if everywhere else any(each)


@pytest.mark.mpi
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("model", ["moves_row", "halves_row", "penalty_row", "lookup_row", "hooked_row"])
def test_what_waits_is_computed_as_it_was_and_in_its_turn(world, build, waits, model, schedule, monkeypatch):
    """Of what is changed in place nothing waits; what comes in another way comes behind what waits."""
    if world.size not in layouts(world.size, "plain_row") or world.size == 4:
        pytest.skip("two or three stages")
    if model == "moves_row" and schedule in ("gpipe", "interleaved"):
        pytest.skip("torch refuses that a forward changes what the backward of another needs")
    monkeypatch.setattr(waiting, "rows_together", lambda weight: 1000)
    monkeypatch.setattr(waiting, "TOGETHER", 1)
    cuts = {} if schedule == "interleaved" else {"cuts": ["2", "3"][: world.size - 1]}
    rounds = Optimizer("torch.optim.SGD", {"lr": 1.0})  # a rounding of a gradient is one of a weight
    job = build(model, world.size, micro_batches=5, schedule=schedule, optimizer=rounds, **cuts)
    has_bits_of_one_process(world, job, model)
    assert any(world.allgather(any(waits)))


BEHIND_THE_FIRST = {2: ["2"], 3: ["2", "4"], 4: ["1", "2", "4"]}
"""Cuts, by stages, that leave the middle one of a row's five layers to a stage that gives gradients back."""


@pytest.mark.mpi
@pytest.mark.parametrize(("times", "dear"), [(1, False), (1, True), (2, False)])
def test_a_bias_that_is_frozen_later_moves_no_more(world, build, waits, times, dear):
    if world.size not in layouts(world.size):
        pytest.skip("as many stages as ranks, two at least")
    settings = {"micro_batches": 5, "schedule": "zb-h1", "arguments": {"times": times}}
    job = build("freezing_row", world.size, cuts=BEHIND_THE_FIRST[world.size], **settings)
    if dear:
        job.engine.straight.at_once(job.engine.module.parameters())
    has_bits_of_one_process(world, job, "freezing_row")
    biases = [
        (p.requires_grad, p.clone()) for n, p in job.engine.module.named_parameters() if n == "2.inner.bias"
    ]
    run(job, 1)
    after = [p for n, p in job.engine.module.named_parameters() if n == "2.inner.bias"]
    assert world.allreduce(len(biases)) == 1
    assert all(not trains and torch.equal(old, new) for (trains, old), new in zip(biases, after))


@pytest.mark.mpi
@pytest.mark.parametrize("of", ["weight", "bias"])
@pytest.mark.parametrize("dear", [False, True])
def test_what_is_added_later_to_a_convolution_rounds_otherwise_in_one_step(world, build, waits, of, dear):
    """The third, when it shows; weights stay, so each step stands alone."""
    if world.size not in layouts(world.size):
        pytest.skip("as many stages as ranks, two at least")
    optimizer = Optimizer("torch.optim.SGD", {"lr": 0.0})
    settings = {"micro_batches": 5, "schedule": "zb-h1", "arguments": {"of": of}, "optimizer": optimizer}
    job = build("penalised_row", world.size, cuts=BEHIND_THE_FIRST[world.size], **settings)
    if dear:
        job.engine.straight.at_once(job.engine.module.parameters())
    losses, expected = run(job, 8), alone_like(job, 8)[0]
    differ = [number for number, (one, other) in enumerate(zip(losses, expected)) if one != other]
    assert differ in ([], [2])


@pytest.mark.mpi
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
@pytest.mark.parametrize("recompute", ["never", "always"])
@pytest.mark.parametrize("cut", ["2", "3"])
def test_a_tensor_in_several_places_stays_one(world, build, schedule, recompute, cut):
    if world.size != 2:
        pytest.skip("two stages, cut before and behind who asks")
    settings = {"micro_batches": 5, "schedule": schedule, "recompute": recompute, "cuts": [cut]}
    job = build("doubling_row", 2, **settings)
    has_bits_of_one_process(world, job, "doubling_row")


@pytest.mark.mpi
def test_a_mode_that_reaches_for_other_stages_is_refused(world, build):
    if world.size != 2:
        pytest.skip("two stages")
    what = r"train\({}\) of the model fails on rank 0, which has a part of it alone: \(Switching\), stage_models.py"
    job = build("Switching", 2, micro_batches=4, cuts=["b"])
    with pytest.raises(ConfigError, match=what.format(False)):
        job.engine.evaluate(job.split_batches("train"), job.task.measure)
    with pytest.raises(ConfigError, match=what.format(True)) as raised:
        job.engine.step(0, job.loader.read(0))
    assert "let train() of the layer that has the weights do that" in str(raised.value)
    job = build("switching_row", 2, micro_batches=4)
    has_bits_of_one_process(world, job, "switching_row")


@pytest.mark.mpi
def test_listed_layers_must_do_what_the_forward_does(world, build, caplog):
    if world.size != 2:
        pytest.skip("two stages")
    has_bits_of_one_process(world, build("Lists", 2, micro_batches=4), "Lists")
    what = r"Lists would be another model in stages.*: its forward computes add of shape \(\d, 16\), which layers\(\) leaves out"
    with pytest.raises(ConfigError, match=what):
        build("Lists", 2, micro_batches=4, arguments={"skips": True})
    caplog.clear()
    with caplog.at_level("WARNING", LOGGER.name):
        build("Lists", 2, micro_batches=4, arguments={"asks": True})
    assert any(
        "Lists.layers() lists, not its forward; whether both do the same" in m for m in caplog.messages
    )


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("other", "what"),
    [
        ("numbers", r"its forward computes leaky_relu of shape \(2, 16\) with the numbers 0\.2, which"),
        (
            "order",
            r"its forward computes \w* with b\.bias where layers\(\) computes \w* with a\.bias",
        ),
        (
            "gradients",
            r"gradients go through (\w+|torch::autograd::AccumulateGrad) of layers\(\), and not in its forward",
        ),
        ("evaluation", r"its forward computes _?softmax .*, which layers\(\) leaves out \(in evaluation\)"),
        ("cut off", r"gradients go through \S+ of layers\(\), and not in its forward"),
        ("hook", r"gradients go through a hook on a tensor of its forward, which layers\(\) leaves out"),
        (
            "single",
            r"its forward computes mul of shape \(1, 16\) with the numbers 2, which layers\(\) leaves",
        ),
    ],
)
def test_listed_layers_must_not_differ_in_one_thing(world, build, other, what):
    if world.size != 2:
        pytest.skip("two stages")
    for same in ("", "without gradients", "recomputes", "recurrent"):
        job = build("ListsOthers", 2, micro_batches=4, arguments={"what": same})
        has_bits_of_one_process(world, job, "ListsOthers")
    build("ListsOthers", 2, micro_batches=4, arguments={"what": "draws"})
    with pytest.raises(ConfigError, match=f"ListsOthers would be another model in stages.*: {what}"):
        build("ListsOthers", 2, micro_batches=4, arguments={"what": other})


@pytest.mark.mpi
def test_a_stages_replicas_share_the_optimizers_state(world, build):
    """With the same bits as where each has all of it, in half the memory."""
    if world.size != 4:
        pytest.skip("two replicas of two stages")
    found = {}
    for sharded in (False, True):
        optimizer = Optimizer("torch.optim.AdamW", {"lr": 0.01}, sharded=sharded)
        job = build("plain_row", 2, micro_batches=6, optimizer=optimizer, cuts=["2"])
        losses = run(job, 4, clip=0.05)
        node = job.topology.comms.node
        size = node.allreduce(job.averager.memory()["optimizer"])
        found[sharded] = losses, {n: v.clone() for n, v in tensors_of(job.engine.module).items()}, size
    assert found[True][0] == found[False][0]
    assert all(torch.equal(v, found[False][1][n]) for n, v in found[True][1].items())
    assert found[True][2] < 0.6 * found[False][2]


@pytest.mark.mpi
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "gpipe"])
@pytest.mark.parametrize("model", ["Skips", "plain_row"])
def test_each_layer_runs_forward_once_a_micro_batch(world, build, model, schedule, monkeypatch):
    """No forward is hidden: not for BatchNorm's statistics, nor for what weight gradients need."""
    if world.size not in layouts(world.size):
        pytest.skip("as many stages as ranks, two at least")
    calls, norm = [], functional.batch_norm
    monkeypatch.setattr(functional, "batch_norm", lambda *x, **y: calls.append(1) or norm(*x, **y))
    job = build(model, world.size, micro_batches=4, schedule=schedule, recompute="never")
    leaves = [m for m in job.engine.module.modules() if not [*m.children()]]
    for leaf in leaves if model == "plain_row" else []:
        leaf.register_forward_hook(lambda *_: calls.append(1))
    run(job, 2)
    calls.clear()
    run(job, 1)
    once = len(leaves) if model == "plain_row" else 1  # by operators the BatchNorm alone is called
    assert world.allreduce(len(calls)) == 4 * once


@pytest.mark.mpi
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "zb-h2", "interleaved"])
def test_micro_batches_without_samples_are_not_in_the_program(world, build, schedule):
    """With them between, 1f1b would let its first stage wait where it has a forward to run."""
    if world.size not in layouts(world.size):
        pytest.skip("as many stages as ranks, two at least")
    virtual = 2 if schedule == "interleaved" else 1
    job = build("plain_row", world.size, micro_batches=16, schedule=schedule, batch=5)
    job.engine.watch()
    has_bits_of_one_process(world, job, "plain_row")
    ran = [str(span.instruction) for span in job.engine.unwatch()]
    working = [v for v, size in enumerate(order.sizes(5, 16)) if size]
    pipeline = job.pipeline
    own = program(schedule, pipeline.rank, pipeline.ranks, working, virtual)
    expected = [str(i) for i in own if isinstance(i, PASSES)]
    assert working == [3, 6, 9, 12, 15]
    assert ran[: len(expected)] == expected


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("model", "where", "told"),
    [
        (
            "Skips",
            "buffer",
            r"the buffer norm\.running_mean at step 0 on rank \d of \d, by \S+ times the bound",
        ),
        ("Skips", "gradient", r"the gradient of \S+ at step 0 .*look at the layers around it"),
        ("Tied", "tie", r"the gradient of \S+ at step 0 "),
    ],
)
def test_verify_finds_what_is_broken_in_stages(world, build, monkeypatch, model, where, told):
    if world.size not in layouts(world.size, model):
        pytest.skip("as many stages as ranks, two at least")
    job = build(model, world.size, micro_batches=4)
    assert compare(job, 1) is None
    pipeline, norm = job.pipeline, dict(job.engine.module.named_buffers()).get("norm.running_mean")
    if where == "buffer":
        refresh = job.engine.refresh

        def and_a_little_more(every=True):
            refresh(every)
            if norm is not None:
                norm.add_(1e-3)

        monkeypatch.setattr(job.engine, "refresh", and_a_little_more)
    elif where == "gradient":
        receive = Stage.receive_gradient

        def and_a_little_more(stage, v, part):
            receive(stage, v, part)
            kept = stage.kept[v]
            kept.gradients = [(leaf, gradient * 1.01) for leaf, gradient in kept.gradients]

        monkeypatch.setattr(Stage, "receive_gradient", and_a_little_more)
    else:
        collect = pipeline.collect
        monkeypatch.setattr(pipeline, "collect", lambda add: collect(lambda p, g: add(p, g * 1.001)))
    assert re.match(told, compare(job, 1))


class Far(nn.Module):
    """What the first layer finds is wanted by the last one alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        a = self.a(x)
        return self.d(torch.tanh(self.c(torch.tanh(self.b(torch.tanh(a)))))) + torch.sin(a)


def test_a_skip_goes_straight_to_the_stage_that_wants_it():
    """And its gradient straight back: the stages between neither get nor give it."""
    cut = split.cut(Far(), {"x": torch.randn(3, 4)}, False, 4, ["b", "c", "d"])
    straight = {0: [1, 3], 1: [2], 2: [3], 3: []}
    assert cut.links() == (straight, straight)
    parts = [cut.part(stage, 3, True) for stage in range(4)]
    (far,) = parts[0].gives[3]
    for between in parts[1:3]:
        named = [name for names in (*between.gives.values(), *between.returns.values()) for name in names]
        assert len(named) == 2
        assert far not in between.gives.get(3, [])
    assert far in parts[3].returns[0]


def test_a_schedule_is_proved_for_the_links_before_anything_runs(monkeypatch):
    """One that would hang, and one that leaves a backward out."""
    cut = split.cut(Far(), {"x": torch.randn(3, 4)}, False, 2, ["c"])

    def hangs(stage, stages, micro_batches, virtual=1):
        yield from map(Backward, micro_batches)
        yield from map(Forward, micro_batches)

    def lacks(stage, stages, micro_batches, virtual=1):
        yield from map(Forward, micro_batches)

    two = SimpleNamespace(stages=2)
    assert portion.most_kept("1f1b", two, cut, {4, 1}) == 2
    sometimes = lambda *given: (hangs if len(given[2]) == 3 else SCHEDULES["gpipe"])(*given)  # noqa: E731
    monkeypatch.setitem(SCHEDULES, "wrong", sometimes)
    assert portion.most_kept("wrong", two, cut, {4}) == 4
    with pytest.raises(HpctrainError, match="before"):  # in an epoch's last batch
        portion.most_kept("wrong", two, cut, {4, 3})
    for wrong, told in ((hangs, "before"), (lacks, "never all of its backward")):
        monkeypatch.setitem(SCHEDULES, "wrong", wrong)
        with pytest.raises(HpctrainError, match=told):
            portion.most_kept("wrong", two, cut, {4})


@pytest.mark.mpi
def test_a_job_with_a_schedule_that_would_hang_is_not_built(world, build, monkeypatch):
    if world.size != 2:
        pytest.skip("two stages")

    def hangs(stage, stages, micro_batches, virtual=1):
        yield from map(Backward, micro_batches)
        yield from map(Forward, micro_batches)

    monkeypatch.setitem(SCHEDULES, "wrong", hangs)
    with pytest.raises(HpctrainError, match="before"):
        build("plain_row", 2, micro_batches=4, schedule="wrong")


@pytest.mark.mpi
def test_what_is_sent_may_be_changed_at_once(world, build):
    """A buffer that the next micro-batch's forward changes, in the first step, where messages carry it."""
    if world.size != 2:
        pytest.skip("one replica, of two layers")
    has_bits_of_one_process(world, build("counted_row", 2, micro_batches=8), "")


@pytest.mark.mpi
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_a_stage_may_begin_with_a_layer_that_works_in_place(world, build, schedule):
    """It changes what came, which is a leaf; run again it would get other numbers, so it keeps its graph."""
    if world.size not in layouts(world.size):
        pytest.skip("as many stages as ranks, two at least")
    for recompute in ("never", "always"):
        job = build("adding_row", world.size, micro_batches=5, schedule=schedule, recompute=recompute)
        has_bits_of_one_process(world, job, "")


@pytest.mark.mpi
def test_an_input_may_be_called_as_an_operator_is(world, build):
    for stages in layouts(world.size):
        job = build("Clashing", stages, inputs={"tanh": "x"})
        assert list(job.task.input_shapes) == ["tanh"]
        assert compare(job, 2) is None


@pytest.mark.mpi
def test_samples_may_have_another_shape_in_another_batch(world, build, monkeypatch):
    """The forward is written down anew for each: its constants differ."""
    batch = Samples.batch

    def crop(self, samples):
        whole = batch(self, samples)
        count = 5 - int(samples[0]) % 3 if len(samples) else 5
        return replace(whole, inputs={name: x[:, :count].contiguous() for name, x in whole.inputs.items()})

    monkeypatch.setattr(Samples, "batch", crop)
    for stages in layouts(world.size, "Named"):
        assert compare(build("Averaging", stages, micro_batches=4 * world.size // stages), 2) is None


@pytest.mark.mpi
@pytest.mark.parametrize("trained", [True, False])
def test_weights_of_several_stages_are_sent_as_often_as_they_change(world, build, monkeypatch, trained):
    """The owner's to the copies: in each step if it is trained, else only where all may be others."""
    if world.size != 2:
        pytest.skip("two stages")
    job = build("Scaled", 2, arguments={"trained": trained}, micro_batches=4, cuts=["b"])
    assert [tie.name for tie in job.pipeline.ties] == ["scale"]
    sent, start = [], Transport.start

    def starting(self, *messages):
        sent.extend(message for message in messages if message[1] == OF_TIES)
        start(self, *messages)

    monkeypatch.setattr(Transport, "start", starting)
    for number in range(2):
        job.engine.step(number, job.loader.read(8 * number))
        assert world.allreduce(len(sent)) == 2 * (number + 1) * trained, "its gradient and its number"
    sent.clear()
    job.engine.refresh()
    assert world.allreduce(len(sent)) == 1
    has_bits_of_one_process(world, build("Scaled", 2, arguments={"trained": trained}, cuts=["b"]), "Scaled")


@pytest.mark.mpi
def test_samples_of_a_shape_that_fails_end_on_all_ranks(world, build, monkeypatch):
    """Where the forward is written down anew, in a batch of one replica."""
    batch, short = Samples.batch, set[int]()

    def crop(self, samples):
        whole = batch(self, samples)
        count = 2 if short & {*map(int, samples)} else 5
        return replace(whole, inputs={name: x[:, :count].contiguous() for name, x in whole.inputs.items()})

    monkeypatch.setattr(Samples, "batch", crop)
    for stages in layouts(world.size):
        if stages == 3:
            continue  # it has two layers with weights
        job = build("Shrinking", min(stages, 2), micro_batches=4)
        job.engine.step(0, job.loader.read(0))
        mine = job.loader.read(8).micro_batches
        samples = (
            [int(one) for v in sorted(mine) for one in mine[v].samples] if not job.topology.replica else []
        )
        short = set(world.bcast(samples[:1]))
        with pytest.raises(
            ConfigError, match=r"forward fails on a micro-batch of shape x \(\d, 2\)"
        ) as caught:
            job.engine.step(1, job.loader.read(8))
        assert caught.value.agreed
        short = set()


@pytest.mark.mpi
def test_weights_and_buffers_may_be_given_out(world, build):
    if world.size not in layouts(world.size):
        pytest.skip("as many stages as ranks, two at least")
    job = build("GivesOut", world.size, micro_batches=4)
    has_bits_of_one_process(world, job, "GivesOut")
    alone = build_alone(job)
    take_weights(job, alone)
    evaluate_alike(job, alone)
    alone.close()
    alone.topology.close()


@pytest.mark.mpi
def test_interleaved_recomputes_fails_and_refuses(world, build):
    for stages in layouts(world.size):
        job = build("plain_row", stages, schedule="interleaved", recompute="always", micro_batches=6)
        assert compare(job, 2) is None
        if stages == 2:  # it has 5 layers
            job = build("breaking_row", 2, arguments={"at": 0, "backward": True}, schedule="interleaved")
            with pytest.raises(HpctrainError, match="trouble in a layer"):
                job.engine.step(0, job.loader.read(0))
        with pytest.raises(ConfigError, match="has 8 layers .*, too few for"):
            build("plain_row", stages, schedule="interleaved", virtual_stages=5)


@pytest.mark.mpi
@pytest.mark.parametrize("model", MODELS)
def test_a_stage_makes_its_own_weights_alone(world, build, monkeypatch, model):
    """However small: each is made by the stages that use it, with the bits of the whole model."""
    from hpctrain.models import deferred

    made = []
    materialise = deferred.Deferred.materialise

    def counting(self, module, wanted, device):
        wanted = list(wanted)
        made.extend(wanted)
        return materialise(self, module, wanted, device)

    monkeypatch.setattr(deferred, "SMALL", 0)
    monkeypatch.setattr(deferred.Deferred, "materialise", counting)
    if world.size not in layouts(world.size, model):
        pytest.skip("as many stages as ranks, two at least")
    job = build(model, world.size, micro_batches=5)
    assert len({id(t) for t in made}) < len(alone_like(job, 0)[1]) or model == "FrozenHead"
    has_bits_of_one_process(world, job, model)


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("model", "schedule"),
    [
        *(
            (m, s)
            for m in ("plain_row", "Skips", "Wide", "Tied", "tied_row")
            for s in ("1f1b", "zb-h1", "zb-h2")
        ),
        ("Wide", "gpipe"),
        ("mixed_row", "zb-h1"),
    ],
)
def test_weight_gradients_that_wait_keep_the_bits(world, build, waits, model, schedule):
    """Every schedule, with all linear layers straight into place; those of stage 0 wait in zero bubbles only."""
    if world.size not in layouts(world.size, model):
        pytest.skip("as many stages as ranks, two at least")
    job = build(model, world.size, micro_batches=5, schedule=schedule)
    has_bits_of_one_process(world, job, model)
    if job.topology.stage or schedule in ("zb-h1", "zb-h2"):
        linear = [
            m for m in job.engine.module.modules() if isinstance(m, torch.nn.Linear) and m.weight is not None
        ]
        assert any(waits) or not linear or "tied" in model.lower() or model == "mixed_row"


@pytest.mark.mpi
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "zb-h2", "interleaved"])
def test_a_gradient_leaves_before_those_of_the_weights_are_computed(
    world, build, waits, monkeypatch, schedule
):
    """By what the engine does: of each micro-batch that others wait for."""
    if world.size not in layouts(world.size) or (schedule == "interleaved" and world.size > 2):
        pytest.skip("as many stages as ranks")
    monkeypatch.setattr(waiting, "is_short", lambda *_: False)  # nor do products for one another
    job = build("plain_row", world.size, micro_batches=6, schedule=schedule)
    run(job, 2)
    did, compute, send = [], gradient.StraightIntoPlace._compute, Stage.send_gradient
    weights_of = waiting.WaitingGradients.weights_of

    def computing(self, *given, **how):
        did.append("computes")
        compute(self, *given, **how)

    def sending(self, v, part):
        send(self, v, part)
        did.append(("sent", v))

    def weights(self, v, last):
        did.append(("weights", v))
        weights_of(self, v, last)

    monkeypatch.setattr(gradient.StraightIntoPlace, "_compute", computing)
    monkeypatch.setattr(Stage, "send_gradient", sending)
    monkeypatch.setattr(waiting.WaitingGradients, "weights_of", weights)
    job.engine.step(2, job.loader.read(2))
    if job.topology.stage and schedule != "interleaved":  # the first stage has nobody who waits
        waited = [at for at in did if at != "computes"]
        assert did.count("computes") >= 6
        for v in range(6):
            assert waited.index(("sent", v)) < waited.index(("weights", v)), waited
        for at, what in enumerate(did):  # nothing within a backward, nor behind a gradient's leaving
            if what == "computes":
                behind = next((before for before in reversed(did[:at]) if before != "computes"), ("", -1))
                assert behind[0] == "weights", did


@pytest.fixture
def light(waits, monkeypatch):
    """Lets linear layers be light: left to autograd where they don't wait; notes what was computed how."""
    monkeypatch.setattr(gradient, "LARGE", 2**20)
    monkeypatch.setattr(products, "AVAILABLE", False)
    found, compute, settled = (
        set(),
        gradient.StraightIntoPlace._compute,
        gradient.StraightIntoPlace._is_settled,
    )

    def computing(self, parameters, work, **how):
        found.add(type(work).__name__)
        compute(self, parameters, work, **how)

    def looking(self, *given):
        if settled(self, *given):
            found.add("left")
            return True
        return False

    monkeypatch.setattr(gradient.StraightIntoPlace, "_compute", computing)
    monkeypatch.setattr(gradient.StraightIntoPlace, "_is_settled", looking)
    return found


@pytest.mark.mpi
@pytest.mark.parametrize("model", ["plain_row", "Skips", "Tied", "tied_row"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "zb-h2", "interleaved"])
@pytest.mark.parametrize("dear", [False, True])
def test_light_products_have_the_bits_of_one_process(world, build, light, schedule, model, dear):
    """Left to autograd, or waiting, all of them or in the last micro-batches alone."""
    if world.size not in layouts(world.size, model) or (schedule == "interleaved" and "ied" in model):
        pytest.skip("as many stages as ranks, two at least; each weight on one rank")
    job = build(model, world.size, micro_batches=5, schedule=schedule)
    if dear:
        job.engine.straight.at_once(job.engine.module.parameters())
    has_bits_of_one_process(world, job, model)
    ways = set().union(*world.allgather(light))
    assert "Product" not in ways
    assert "FreshProduct" in ways
    assert ("left" in ways) or schedule.startswith("zb")


@pytest.mark.mpi
@pytest.mark.parametrize("model", TIED)
def test_light_products_of_shared_weights_have_the_bits_of_one_process(world, build, light, model):
    """Micro-batch by micro-batch: which of a weight's uses is left hangs on the forward alone."""
    for stages in layouts(world.size):
        job = build(model, stages, micro_batches=6, invariant=True)
        losses = run(job, 4, clip=0.05)
        expected, state = alone_like(job, 4, clip=0.05)
        assert losses == expected
        other = [n for n, v in tensors_of(job.engine.module).items() if not torch.equal(v, state[n])]
        assert not other, (stages, other)


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("model", "schedule"),
    [("plain_row", "zb-h1"), ("Skips", "zb-h1"), ("plain_row", "zb-h2"), ("plain_row", "interleaved")],
)
def test_fast_gradients_are_close(world, build, waits, model, schedule, monkeypatch):
    """Products of several micro-batches become one, within the bound by which `verify` compares layouts."""
    from hpctrain.gradient import StraightIntoPlace

    rows, compute = [], StraightIntoPlace._compute

    def watched(self, parameters, work, **how):
        rows.append(len(work.g))
        compute(self, parameters, work, **how)

    monkeypatch.setattr(StraightIntoPlace, "_compute", watched)
    monkeypatch.setattr(waiting, "WAITING_SHARE", 1e3)  # weights are small here
    if not layouts(world.size, model):
        pytest.skip("one rank has no stages")
    for stages in layouts(world.size, model):
        job = build(model, stages, micro_batches=2 * world.size, schedule=schedule, gradients="fast")
        mine = [v for v, owner in enumerate(job.averager.owners) if owner == job.topology.replica]
        assert compare(job, 3) is None
        if any(waits):
            assert max(rows) > max(order.sizes(8, 2 * world.size)[v] for v in mine)
    assert any(world.allgather(any(waits)))


@pytest.mark.mpi
def test_all_start_alike_where_no_seed_reaches(world, build):
    """The replicas of a stage have its first one's numbers; copies of a shared weight have the owner's."""
    for stages in layouts(world.size):
        job = build("entropic_row", stages, micro_batches=4)
        layers = [job.engine.module[0].weight, job.engine.module[-2].weight]
        here = [w.detach().clone() for w in layers if w is not None]
        shared = [w for ranks in world.allgather(here) for w in ranks]
        assert len(shared) >= 2
        assert all(torch.equal(w, shared[0]) for w in shared)
        mine = {n: v.clone() for n, v in tensors_of(job.engine.module).items()}
        for other in job.topology.comms.data.allgather(mine):
            assert [n for n, v in other.items() if not torch.equal(v, mine[n])] == []


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("model", "schedule"),
    [
        *((m, "1f1b") for m in MODELS if m not in TIED),
        ("plain_row", "zb-h1"),
        ("Skips", "zb-h2"),
        ("Skips", "gpipe"),
        ("again_row", "1f1b"),
        ("LargeTied", "zb-h1"),
    ],
)
def test_forwards_that_run_again_keep_the_bits(world, build, waits, monkeypatch, model, schedule):
    """Dropout, running statistics and all; and a stage that lets go keeps no graph."""
    sent = []

    def send(self, v, part, whole=Stage.send):
        if self.kept[v].gone:
            leaves = [leaf for leaf in tree_leaves(self.kept[v].found) if isinstance(leaf, torch.Tensor)]
            sent.extend(leaf.grad_fn is None for leaf in leaves)
        whole(self, v, part)

    monkeypatch.setattr(Stage, "send", send)
    if world.size not in layouts(world.size, model):
        pytest.skip("one replica, of two stages at least")
    job = build(model, world.size, schedule=schedule, recompute="always", micro_batches=6)
    has_bits_of_one_process(world, job, model)
    assert all(sent)
    assert bool(sent) == (job.topology.stage < world.size - 1)


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("model", "settings"),
    [("TwoHeads", {"targets": ["y", "weight"]}), ("Spectrum", {}), ("OwnLoss", {"targets": ["y", "weight"]})],
)
def test_several_losses_and_complex_numbers(world, build, model, settings):
    """A head on the first stage with a loss of its own; a loss that the model computes; complex activations."""
    for stages in layouts(world.size):
        job = build(model, stages, **settings)
        assert compare(job, 2) is None
        if stages == world.size:
            job = build(model, stages, schedule="zb-h1", micro_batches=6, **settings)
            has_bits_of_one_process(world, job, model)
    if model == "Spectrum" and world.size == 2:  # the cut is where the numbers are complex
        job = build(model, 2, cuts=["scale"])
        assert compare(job, 2) is None
        assert ("scale.weight" in job.engine.module.state_dict()) == (world.rank == 1)


@pytest.mark.mpi
@pytest.mark.parametrize("way", ["numbers", "shape", "fewer"])
def test_who_gives_others_when_run_again_is_told(world, build, monkeypatch, way):
    """Gradients of what was never sent would be another model's."""
    if world.size != 2:
        pytest.skip("two stages")
    job = build("fickle_row", 2, recompute="always", micro_batches=3, cuts=["1"])
    monkeypatch.setattr(stage_models.Fickle, "way", way)
    stage_models.SEEN.clear()
    with pytest.raises(ConfigError, match="stage 0 gives other numbers when its forward is run again"):
        run(job, 1)


@pytest.mark.mpi
@pytest.mark.parametrize("model", ["ChangesInput", "ChangesBuffer", "ReadsBuffer"])
def test_what_cannot_run_again_keeps_its_graph(world, build, model):
    """A forward that changes its input, or a buffer that it depends on, gives other numbers the second time."""
    if world.size == 1:
        pytest.skip("one stage lets nothing go")
    job = build(model, world.size, recompute="always", micro_batches=6)
    has_bits_of_one_process(world, job, model)


@pytest.mark.mpi
@pytest.mark.parametrize("micro_batches", [3, 6])
def test_a_forward_that_changes_a_weight_keeps_its_graph(world, build, micro_batches):
    """An embedding with `max_norm` shortens rows before it reads them: the second time by a rounding more."""
    if world.size != 2:
        pytest.skip("two stages")
    settings = {"recompute": "always", "micro_batches": micro_batches, "cuts": ["last"]}
    has_bits_of_one_process(world, build("Renormed", 2, module="odd_models", **settings), "Renormed")


@pytest.mark.mpi
@pytest.mark.parametrize("way", ["in place", "assigned", "parameter", "numpy", "copied"])
def test_what_is_changed_unseen_while_a_backward_needs_it_is_refused(world, build, way):
    """A spectral norm by hand: with one micro-batch on its way, as in the last stage, or a copy, it is exact."""
    if world.size != 2:
        pytest.skip("two stages")
    arguments, settings = {"way": way}, {"micro_batches": 4}
    job = build("spectral_row", 2, cuts=["3"], arguments=arguments, **settings)
    if way == "copied":
        has_bits_of_one_process(world, job, "")
    else:
        what = "1.frozen" if way == "parameter" else "1.u"
        with pytest.raises(
            ConfigError, match=rf"the forward of stage 0 changes {what} through .data or by NumPy"
        ):
            job.engine.step(0, job.loader.read(0))
    has_bits_of_one_process(world, build("spectral_row", 2, cuts=["1"], arguments=arguments, **settings), "")


@pytest.mark.mpi
@pytest.mark.parametrize("model", ["counting_row", "turning_row"])
def test_a_forward_that_counts_its_calls_is_not_run_again(world, build, model, caplog):
    """Its numbers hang on the count, or its gradients alone, or those of a later step."""
    if world.size not in (2, 3, 4):
        pytest.skip("one stage lets nothing go")
    job = build(model, world.size, recompute="always", micro_batches=4)
    with caplog.at_level("WARNING", LOGGER.name):
        has_bits_of_one_process(world, job, "")
    told = "changes 0.calls" if model == "counting_row" else "changes 1.count"
    told += ": it is not run again for backward, and keeps its memory"
    assert any(world.allgather(any(told in message for message in caplog.messages)))


@pytest.mark.mpi
def test_fast_and_invariant_exclude_each_other(world, build):
    with pytest.raises(ConfigError, match="parallel.gradients = fast adds micro-batches in an order"):
        build("plain_row", world.size, micro_batches=6, gradients="fast", invariant=True)


NO_MODELS = (
    "OwnSeed",
    "Keeper",
    "Tables",
    "Branch",
    "NamedLikeAMethod",
    "Odd",
    "Annealing",
    "EveryFourth",
    "Tupled",
    "Warming",
    "NormedLayer",
    "Freezing",
    "FrozenNorm",
    "OtherNorm",
    "ChunkedNorm",
    "Padded",
    "Indexed",
    "Merged",
    "Calibrated",
    "NoisyBackward",
    "Noisy",
    "NoisyLoss",
    "OwnCount",
    "Progressive",
)
ODD = [
    name
    for name, kind in vars(odd_models).items()
    if isinstance(kind, type) and kind.__module__ == "odd_models"
]


@pytest.mark.mpi
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    "model", [*(name for name in ODD if name not in NO_MODELS), "normed_row", "forked_row"]
)
def test_odd_models_have_the_bits_of_one_process(world, build, waits, model):
    """Draws where no mode sees them, regions that are run again, tables that are changed."""
    if world.size != 2:
        pytest.skip("two ranks do")
    # no BatchNorm gets a single sample
    job = build(model, 2, module="odd_models", micro_batches=3, batch=7 if model.endswith("Norm") else 8)
    has_bits_of_one_process(world, job, model)
    evaluates_as_one_process(job)


@pytest.mark.mpi
def test_no_stage_begins_between_a_batchnorm_and_who_reads_its_statistics(world, build):
    if world.size != 2:
        pytest.skip("two stages")
    with pytest.raises(ConfigError, match="inner begins between a tensor and an operator that changes it in"):
        build("LaterNorm", 2, module="odd_models", micro_batches=3, batch=7, cuts=["inner"])


@pytest.mark.mpi
def test_a_weight_that_is_frozen_for_a_call_is_refused(world, build):
    """Operators would train it in that call, too."""
    if world.size != 2:
        pytest.skip("two stages")
    with pytest.raises(ConfigError, match="a weight is frozen, or no more, for a part of the forward"):
        build("Freezing", 2, module="odd_models", micro_batches=3)


@pytest.mark.mpi
def test_a_loss_may_draw(world, build):
    """Behind operators, too, it has the numbers that follow those of the forward."""
    if world.size != 2:
        pytest.skip("two stages")
    settings = {"module": "odd_models", "loss": ClassPath("odd_models.NoisyLoss"), "micro_batches": 3}
    for model in ("DropsInPlace", "PlainMean"):  # one that draws, and one that does not
        has_bits_of_one_process(world, build(model, 2, **settings), model)


@pytest.mark.mpi
@pytest.mark.parametrize("autocast", ["none", "bf16"])
def test_another_dtype_than_was_written_down_is_told(world, build, caplog, autocast):
    if world.size != 2:
        pytest.skip("two stages")
    job = build("Recurrent", 2, module="odd_models", micro_batches=3, cuts=["cells"], autocast=autocast)
    with caplog.at_level("WARNING", LOGGER.name):
        run(job, 2)
    told = [
        m for m in caplog.messages if m.startswith("layer cells, operator lstm gives bfloat16, and was writ")
    ]
    assert len(told) == (world.rank == 1 and autocast == "bf16")


@pytest.mark.mpi
def test_a_row_with_a_forward_of_its_own_is_no_row(world, build):
    if world.size != 2:
        pytest.skip("two stages")
    has_bits_of_one_process(world, build("doubled_row", 2, micro_batches=4), "doubled_row")


@pytest.mark.mpi
@pytest.mark.parametrize("recompute", ["never", "always"])
def test_a_forward_that_freezes_while_a_backward_is_on_its_way_is_refused(world, build, recompute):
    if world.size != 2:
        pytest.skip("two stages")
    job = build("freezing_by_data_row", 2, micro_batches=4, cuts=["4"], recompute=recompute)
    if recompute == "always":
        has_bits_of_one_process(world, job, "freezing_by_data_row")
        return
    with pytest.raises(ConfigError, match=r"the forward of stage 0 freezes a weight, or thaws one"):
        run(job, 3)


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("model", "cuts"), [("Rounding", ["inner"]), ("Rounding", ["last"]), ("Placing", [])]
)
def test_a_function_that_somebody_has_kept_and_a_table_that_is_only_read(world, build, model, cuts):
    """By calls it runs with its own backward; by operators an addition in place changes one of the two."""
    if world.size != 2:
        pytest.skip("two stages")
    has_bits_of_one_process(world, build(model, 2, micro_batches=4, cuts=cuts), model)


@pytest.mark.mpi
def test_a_cut_inside_a_part_without_gradients_is_told(world, build):
    if world.size != 2:
        pytest.skip("two stages")
    said = r"parallel.cuts: frozen.1 runs in a part of the forward that is under torch.no_grad or an autocast"
    with pytest.raises(ConfigError, match=said):
        build("Thawed", 2, micro_batches=4, cuts=["frozen.1"])
    has_bits_of_one_process(world, build("Thawed", 2, micro_batches=4, cuts=["last"]), "Thawed")


@pytest.mark.mpi
def test_a_backward_that_draws_is_told(world, build, caplog):
    if world.size != 2:
        pytest.skip("two stages")
    job = build("noisy_row", 2, module="odd_models", micro_batches=4, cuts=["2"])
    with caplog.at_level("WARNING", LOGGER.name):
        run(job, 2)
        told = "the backward of stage 0 draws random numbers"
        assert sum(told in message for message in caplog.messages) == (world.rank == 0)
        run(build("DropsInPlace", 2, module="odd_models", micro_batches=4), 2)
        assert sum("draws random" in message for message in caplog.messages) == (world.rank == 0)


@pytest.mark.mpi
def test_tensors_where_no_stage_can_have_them(world, build):
    """Places in memory that numbers say; a tensor that only evaluation uses."""
    if world.size != 2:
        pytest.skip("two stages")
    with pytest.raises(ConfigError, match=r"operator \w+, at File .*odd_models.py.* gives, or where"):
        build("Indexed", 2, module="odd_models")
    job = build("Calibrated", 2, module="odd_models", micro_batches=3, cuts=["inner"])
    with pytest.raises(
        ConfigError, match=r"the model uses scale in eval mode, .* and not in training, so no"
    ):
        job.engine.evaluate(job.split_batches("train"), job.task.measure)


def test_only_so_many_shapes_are_kept(monkeypatch):
    """What was written down of each takes memory."""
    monkeypatch.setattr("hpctrain.pipeline.graph.MOST_SHAPES", 2)
    graph = Graph(odd_models.PlainMean(5, 2), {"x": torch.zeros(3, 5)}, False, 1)
    graph.place([])
    for samples in (4, 3, 5, 3):
        graph.part(0, samples, True)
    assert [samples for samples, *_ in graph._traced] == [5, 3], "those that were used last"


def test_who_asks_whether_it_is_exported_hears_no(caplog, monkeypatch):
    """Unless it is torch, or can't be written down so: then the truth, and a warning, once."""
    monkeypatch.setitem(sys.modules, "no_module_at_all", None)  # as who forbids an import does
    like = {"x": ((5,), torch.float32)}
    with caplog.at_level("WARNING", LOGGER.name):
        x = torch.zeros(2, 3, 8)
        Writer(odd_models.Padded(), {"x": x}, False, 2).write(2, False, {"x": ((3, 8), x.dtype)})
        for asks in (odd_models.Asking, odd_models.AsksByImport):
            written = Writer(asks(5, 2), {"x": torch.zeros(3, 5)}, False, 2).write(3, True, like)
            assert not any("flip" in node.name for node in written.nodes)
        assert caplog.messages == []
        writer = Writer(odd_models.NeedsToKnow(5, 2), {"x": torch.zeros(3, 5)}, False, 2)
        for samples in (3, 4):
            assert not any("any" in node.name for node in writer.write(samples, True, like).nodes)
    assert [message.split(",")[0] for message in caplog.messages] == [
        "odd_models asks whether it is exported"
    ]
    assert not torch.compiler.is_exporting()
    assert torch.compiler.is_exporting.__module__ == "torch.compiler"
    assert odd_models.is_exporting is odd_models.LATE is torch.compiler.is_exporting


def test_no_stage_begins_between_what_changes_a_table_and_who_reads_it():
    """Another stage would read a copy that nobody has changed."""
    module = odd_models.Renormed(5, 2)
    traced = Writer(module, {"x": torch.zeros(3, 5)}, False, 2).write(3, True, {"x": ((5,), torch.float32)})
    at = {node.name: i for i, node in enumerate(traced.nodes)}
    changed, read = at["embedding_renorm_"], at["embedding"]
    assert set(range(changed + 1, read + 1)) <= forbidden(traced.nodes, at)


@pytest.mark.mpi
@pytest.mark.parametrize("autocast", ["none", "bf16"])
@pytest.mark.parametrize("model", ["OwnStatistics", "DrawsAlways", "KeepsDtype"])
def test_odd_models_that_run_again_in_bf16_and_in_evaluation(world, build, model, autocast):
    """Forwards run again; evaluation before training and behind it has the numbers of one process."""
    if world.size != 2:
        pytest.skip("two ranks do")
    settings = {"micro_batches": 3, "schedule": "zb-h1", "recompute": "always", "autocast": autocast}
    job = build(model, 2, module="odd_models", **settings)
    alone = build_alone(job)
    evaluate_alike(job, alone)
    assert run(job, 3) == run(alone, 3)
    evaluate_alike(job, alone)
    expected = dict(tensors_of(alone.engine.module))
    assert all(torch.equal(value, expected[name]) for name, value in tensors_of(job.engine.module).items())
    alone.close()
    alone.topology.close()


@pytest.mark.mpi
@pytest.mark.parametrize("model", ["HookedRow", "inner_hooked_row"])
def test_hooks_on_rows_run(world, build, model):
    if world.size != 2:
        pytest.skip("two stages")
    has_bits_of_one_process(world, build(model, 2, micro_batches=3), model)


@pytest.mark.mpi
@pytest.mark.parametrize("in_place", [True, False])
def test_what_one_stage_changes_and_another_uses_is_refused(world, build, in_place):
    if world.size != 2:
        pytest.skip("two stages")
    settings = {"micro_batches": 3, "arguments": {"in_place": in_place}}
    job = build("moving_row", 2, cuts=["2"], **settings)
    with pytest.raises(ConfigError, match=r"stage 0 changes 1.mean, which another stage uses, too"):
        job.engine.step(0, job.loader.read(0))
    job = build("moving_row", 2, cuts=["4"], **settings)  # all in one stage
    has_bits_of_one_process(world, job, "moving_row")


@pytest.mark.mpi
def test_what_a_layer_keeps_in_a_list_is_found(world, build):
    if world.size != 2:
        pytest.skip("two stages")
    with pytest.raises(ConfigError, match="layer 2 keeps a weight or buffer of another layer in a plain"):
        build("peeking_row", 2, micro_batches=3, cuts=["2"])
    has_bits_of_one_process(world, build("peeking_row", 2, micro_batches=3, cuts=["4"]), "peeking_row")
    has_bits_of_one_process(world, build("WithTable", 2, micro_batches=3), "WithTable")
    job = build("peeking_row", 2, micro_batches=3, cuts=["2"], arguments={"own": True})
    has_bits_of_one_process(world, job, "peeking_row")


WAYS_ASIDE = ["dict", "list", "attribute", "no gradient", "weight", "global", "class"]


@pytest.mark.mpi
@pytest.mark.parametrize("way", WAYS_ASIDE)
@pytest.mark.parametrize("evaluates", [False, True])
def test_what_layers_tell_layers_of_other_stages_aside_is_refused(world, build, way, evaluates):
    """They would look it up on their own rank, and find a default: other numbers, without a word."""
    if world.size != 2:
        pytest.skip("two stages")
    job = build("telling_row", 2, micro_batches=3, cuts=["2"], arguments={"way": way})
    with pytest.raises(ConfigError, match=r"stage [01] changes .*, which another stage has, too, as"):
        if evaluates:
            job.engine.evaluate(job.split_batches("train"), job.task.measure)
        else:
            job.engine.step(0, job.loader.read(0))


@pytest.mark.mpi
@pytest.mark.parametrize("cut", ["1", "2"])
def test_what_a_layer_tells_the_loss_aside_is_refused(world, build, cut):
    """An auxiliary loss of a layer, that the loss adds: another rank's layers' would be missing."""
    if world.size != 2:
        pytest.skip("two stages")
    stage_models.TERMS.clear()
    loss = ClassPath("stage_models.WithTerms")
    job = build("adding_terms", 2, micro_batches=3, cuts=[cut], loss=loss)
    if cut == "2":
        with pytest.raises(ConfigError, match="stage 0 changes .*, which another stage has, too, as"):
            run(job, 1)
    else:
        assert run(job, 2) == alone_like(job, 2)[0]


@pytest.mark.mpi
@pytest.mark.parametrize(("way", "cut"), [("masks", "2"), *((way, "3") for way in [*WAYS_ASIDE, "number"])])
def test_what_layers_of_one_stage_tell_one_another_aside_is_heard(world, build, way, cut):
    if world.size != 2:
        pytest.skip("two stages")
    job = build("telling_row", 2, micro_batches=1, cuts=[cut], arguments={"way": way})
    losses = run(job, 2)
    assert losses == alone_like(job, 2)[0]


@pytest.mark.mpi
@pytest.mark.parametrize("model", ["CountsItself", "AddsItself"])
def test_a_buffer_that_the_model_itself_assigns_bars_no_cut(world, build, model):
    """torch.export writes it back at the end of the forward, once more."""
    if world.size not in (2, 4):
        pytest.skip("as many stages as ranks")
    job = build(model, world.size, micro_batches=5)
    has_bits_of_one_process(world, job, model)
    own = [name for name in job.engine.module.state_dict() if name.endswith("weight")]
    assert len(own) >= 1


@pytest.mark.mpi
@pytest.mark.parametrize("since", [2, 3, 5])
def test_a_layer_that_draws_only_later_has_the_bits_of_one_process(world, build, since):
    """It is run again under what counts draws; and is not held for one that draws unseen."""
    if world.size != 2:
        pytest.skip("two stages")
    job = build("drawing_later", 2, micro_batches=4, cuts=["3"], arguments={"since": since})
    assert run(job, 3) == alone_like(job, 3)[0]


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("model", "place"), [("branching_row", "layer 1 "), ("Branching", "operator cond of row.1")]
)
def test_draws_in_a_branch_are_refused(world, build, model, place):
    """Nothing counts them, and they hang on what was drawn before on the same rank."""
    if world.size != 2:
        pytest.skip("two stages")
    run(build("Moved", 2, module="odd_models", micro_batches=3), 1)  # its functions are known to draw nothing
    with pytest.raises(ConfigError, match=rf"{place}.*draws random numbers"):
        run(build(model, 2, micro_batches=3), 1)


@pytest.mark.mpi
@pytest.mark.parametrize(("model", "name"), [("scripted_row", "1"), ("Scripted", "row.1")])
def test_a_script_is_refused_by_its_name(world, build, model, name):
    if world.size != 2:
        pytest.skip("two stages")
    with pytest.raises(ConfigError, match=rf"stages = 2: module {name} is a script of torch.jit"):
        build(model, 2)


@pytest.mark.mpi
def test_what_evaluation_fills_is_made_where_it_is_filled(world, build):
    if world.size != 2:
        pytest.skip("two stages")
    job = build("Filling2", 2, micro_batches=3, cuts=["second"])
    has_bits_of_one_process(world, job, "Filling2")
    assert job.engine.evaluate(job.split_batches("train"), job.task.measure)["loss"][1] > 0


@pytest.mark.mpi
def test_an_evaluation_batch_is_no_larger_than_a_steps(world, build):
    job = build("plain_row", 1, micro_batches=world.size, batch=5)
    assert {stop - start for start, stop in job.split_blocks("train")} <= {1, 2, 3, 4, 5}
    assert max(stop - start for of in world.allgather(job.split_blocks("train")) for start, stop in of) == 5


def test_a_constant_may_be_given_out():
    module = stage_models.Constant()
    graph = Graph(module, {"x": torch.zeros(3, 5)}, False, 1)
    graph.place([])
    found = graph.part(0, 3, True).run({input_of("x"): torch.ones(3, 5)}, 7, 0)[0]["output"]
    assert torch.equal(found[0], module(torch.ones(3, 5))[0])
    assert torch.equal(found[1], module.table)


@pytest.mark.parametrize(
    "alias",
    [
        lambda x: torch.einsum("ij->ji", x).t(),
        lambda x: functional.dropout(x, 0.0),
        torch.atleast_3d,
        lambda x: x.reshape(-1),
        lambda x: x.contiguous(),
        lambda x: x.to(torch.float32),
    ],
)
def test_no_stage_begins_between_a_tensor_and_a_change_of_what_shows_it(alias):
    """Whether or not its operator says that it may be the same memory."""

    class Aliased(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x):
            kept = self.first(x) * 1.0
            alias(kept).mul_(2.0)
            return self.second(kept)

    written = Writer(Aliased(), {"x": torch.zeros(3, 5)}, False, 2).write(
        3, True, {"x": ((5,), torch.float32)}
    )
    at = {node.name: i for i, node in enumerate(written.nodes)}
    assert set(range(at["mul"] + 1, at["mul_"] + 1)) <= forbidden(written.nodes, at)


def test_values_go_when_no_operator_wants_them_any_more():
    """As in the model's own forward: evaluation would take as much memory as training."""
    module = odd_models.PlainMean(5, 2).eval()
    x = torch.zeros(300, 5)
    graph = Graph(module, {"x": x}, False, 1)
    graph.place([])
    part, most = graph.part(0, 300, False), []
    for forward in (lambda: module(x), lambda: part.run({input_of("x"): x}, 7, 0)):
        with torch.no_grad(), Living() as living:
            forward()
        most.append(living.most)
    assert most[1] <= most[0]


@pytest.mark.mpi
def test_a_forward_that_counts_is_told_and_one_that_computes_by_it_refused(world, build, caplog):
    if world.size != 2:
        pytest.skip("two ranks do")
    for model in ("Annealing", "Warming", "EveryFourth", "Tupled"):
        with pytest.raises(ConfigError, match="the forward changes calls and computes something else by it"):
            build(model, 2, module="odd_models", micro_batches=3)
    with caplog.at_level("WARNING", LOGGER.name):
        build("Counting", 2, module="odd_models", micro_batches=3)
        build("Skips", 2, micro_batches=3)
    said = [message for message in caplog.messages if "the forward changes" in message]
    assert len(said) == 1
    assert all(message.startswith("the forward changes calls: it is written down once") for message in said)


@pytest.mark.mpi
def test_what_lies_apart_has_the_bits_of_one_process(world, build):
    """A value with large gaps crosses without them, and lies at the other end as it did."""
    if world.size != 2:
        pytest.skip("two pieces")
    job = build("Gaps", 2, micro_batches=5, cuts=["back"])
    crossing = job.pipeline.cut.part(0, 2, True).gives[1]
    assert any("slice" in name for name in crossing), crossing
    assert any("select" in name for name in crossing), crossing
    has_bits_of_one_process(world, job, "Gaps")


@pytest.mark.mpi
@pytest.mark.parametrize("model", ["named_tuple_row", "sorting_row", "changing_dict_row", "Masked", "Prefix"])
def test_what_is_handed_on_and_masked_has_the_bits_of_one_process(world, build, model):
    if world.size not in layouts(world.size):
        pytest.skip("as many stages as ranks, two at least")
    has_bits_of_one_process(world, build(model, world.size, micro_batches=5), model)


@pytest.mark.mpi
@pytest.mark.parametrize("model", ["Switched", "MadeLate"])
def test_a_forward_that_differs_by_mode_is_evaluated_as_in_one_process(world, build, model):
    """By what its own train() sets; tables that it makes when it is called first are there in both modes."""
    if world.size != 2:
        pytest.skip("two stages")
    job = build(model, 2, micro_batches=5)
    alone = build_alone(job)
    assert run(job, 2) == run(alone, 2)
    evaluate_alike(job, alone)
    assert run(job, 1) == run(alone, 1)
    alone.close()
    alone.topology.close()


@pytest.mark.mpi
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h2", "interleaved"])
@pytest.mark.parametrize("model", ["plain_row", "Skips"])
def test_on_a_node_no_memory_is_made_for_messages_once_steps_are_alike(
    world, build, monkeypatch, model, schedule
):
    """Neither a buffer for what comes nor a copy of what leaves, for whole and uneven micro-batches."""
    if world.size not in layouts(world.size) or (schedule == "interleaved" and world.size > 2):
        pytest.skip("as many stages as ranks")
    job = build(model, world.size, micro_batches=5, batch=8, schedule=schedule)
    made, start, make = [], Transport._start, channel.Buffer.__init__
    monkeypatch.setattr(Transport, "_start", lambda *given: (made.append("copy"), start(*given))[1])
    monkeypatch.setattr(channel.Buffer, "__init__", lambda *given: (made.append("buffer"), make(*given))[1])
    run(job, 6)
    assert "copy" in world.allreduce(made)  # the ring is as large as what the first steps sent
    made.clear()
    for number in range(6, 10):
        job.engine.step(number, job.loader.read(number))
    assert world.allreduce(made) == []


@pytest.mark.mpi
def test_weights_of_other_stages_that_are_used_from_elsewhere_are_refused(world, build):
    if world.size != 2:
        pytest.skip("two stages")
    job = build("remembering_row", 2, cuts=["3"], micro_batches=3)
    with pytest.raises(ConfigError, match=r"0\.weight is used by a stage that has it from elsewhere"):
        job.engine.step(0, job.loader.read(0))
    job = build("calling_row", 2, cuts=["3"], micro_batches=3)
    with pytest.raises(
        TypeError, match=r"(?s)in layer 4 \(Remembers\).*calls a Linear whose weights another st"
    ):
        job.engine.step(0, job.loader.read(0))
    job = build("holding_row", 2, cuts=["3"], micro_batches=3)
    with pytest.raises(
        TypeError, match=r"(?s)in layer 4 \(Remembers\).*holds a Linear whose weights another st"
    ):
        job.engine.step(0, job.loader.read(0))
    job = build("held_row", 2, cuts=["2"], micro_batches=3, loss=ClassPath("stage_models.Penalty"))
    with pytest.raises(ConfigError, match=r"the loss computes with \d\.\w+ of the model: in stages each has"):
        job.engine.step(0, job.loader.read(0))


@pytest.mark.mpi
def test_a_mask_of_the_users_own_making_is_taken_as_it_is(world, build, caplog):
    if world.size != 2:
        pytest.skip("two ranks do")
    with caplog.at_level("WARNING", LOGGER.name):
        job = build("Masked", 2, micro_batches=4, arguments={"own": True})
    told = [
        m for m in caplog.messages if "whether a mask of torch's transformer is causal can't be seen" in m
    ]
    assert len(told) == 1
    assert compare(job, 2) is None


@pytest.mark.mpi
def test_a_weight_that_a_function_remembers_is_refused_but_between_cuts(world, build):
    """Written down it would be a constant, and not be trained; the wide one has no memory yet."""
    if world.size != 2:
        pytest.skip("two ranks do")
    for width in (8, 100):
        with pytest.raises(ConfigError, match=r"the forward has inner\.\w+ from a function that remembers"):
            build("ClosedOver", 2, micro_batches=4, arguments={"width": width})
        job = build("ClosedOver", 2, micro_batches=4, arguments={"width": width}, cuts=["last"])
        has_bits_of_one_process(world, job, "ClosedOver")


@pytest.mark.mpi
@pytest.mark.parametrize("model", ["again_row", "AgainGraph", "Bound"])
def test_what_our_own_ways_do_not_see_has_the_bits_of_one_process(world, build, waits, model):
    """What a model computes again itself, in layers or among operators, and what it calls by names of its own."""
    if world.size not in layouts(world.size) or (model == "Bound" and world.size > 3):
        pytest.skip("as many stages as ranks, two at least; four pieces")
    has_bits_of_one_process(world, build(model, world.size, micro_batches=5), model)


@pytest.mark.mpi
@pytest.mark.parametrize(("model", "batch"), [("Row", 8), ("Skips", 8), ("plain_row", 4)])
def test_invariant_averaging_has_one_set_of_bits_on_any_layout(world, build, model, batch):
    """With a batch of 4 two of the 6 micro-batches have no samples."""
    schedules = "1f1b", "zb-h1", "zb-h2", "interleaved"
    for stages, schedule in [(1, "1f1b"), *((s, n) for s in layouts(world.size) for n in schedules)]:
        if schedule == "interleaved" and stages > 2 and model == "Row":
            continue  # it has too few layers
        job = build(model, stages, micro_batches=6, invariant=True, schedule=schedule, batch=batch)
        losses = run(job, 4, clip=0.05)
        expected, state = alone_like(job, 4, clip=0.05)
        assert losses == expected
        other = [n for n, v in job.engine.module.state_dict().items() if not torch.equal(v, state[n])]
        assert not other, (stages, other)


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("model", "batch"),
    [*((model, 8) for model in TIED), ("StackedTies", 8), ("MixedTied", 8), ("MixedTied", 4)],
)
def test_invariant_averaging_has_the_bits_of_one_process_where_stages_share_weights(
    world, build, model, batch
):
    """Their gradients go from stage to stage; with a batch of 4 two of the 6 micro-batches have no samples."""
    for stages in layouts(world.size):
        for schedule in ("1f1b", "gpipe") if stages == 2 else ("1f1b",):
            cuts = ["back"] if model == "StackedTies" and stages == 2 else []
            if model == "StackedTies" and not cuts:
                continue
            job = build(
                model, stages, micro_batches=6, invariant=True, schedule=schedule, batch=batch, cuts=cuts
            )
            assert [tie.name for tie in job.pipeline.ties if tie.tensor.requires_grad]
            losses = run(job, 4, clip=0.05)
            expected, state = alone_like(job, 4, clip=0.05)
            assert losses == expected
            mine = tensors_of(job.engine.module)
            other = [n for n, v in mine.items() if not torch.equal(v, state[n])]
            assert not other, (stages, schedule, other)


@pytest.mark.mpi
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_invariant_averaging_refuses_a_buffer_of_one_stage_on_all(world, build, stages):
    """A mean that moves on by all micro-batches: one replica has the bits, several are refused."""
    if world.size not in (stages, 2 * stages):
        pytest.skip("one or two replicas")
    job = build("averaged_row", stages, micro_batches=6, invariant=True)
    if world.size == stages:
        assert run(job, 2) == alone_like(job, 2)[0]
        return
    with pytest.raises(ConfigError, match=r"the forward changes the buffer 2\.mean, each of the 2 replicas"):
        run(job, 2)


@pytest.mark.mpi
@pytest.mark.parametrize("what", ["table", "log", "inference"])
def test_what_is_kept_and_computes_nothing_has_the_bits_of_one_process(world, build, what):
    if world.size != 2:
        pytest.skip("two stages")
    has_bits_of_one_process(world, build("Keeps", 2, arguments={"what": what}, micro_batches=5), "Keeps")


@pytest.mark.mpi
@pytest.mark.parametrize("model", ["Skipping", "Jittery"])
def test_a_forward_that_computes_by_pythons_numbers_is_refused_on_all_ranks(world, build, model):
    """Written down once, each would stay the same number; each rank's own made graphs of their own."""
    if world.size == 1:
        pytest.skip("one rank agrees with itself")
    python.seed(world.rank)
    np.random.seed(world.rank)
    with pytest.raises(ConfigError, match="the forward computes by random numbers of Python's or NumPy's"):
        build(model, layouts(world.size)[0], micro_batches=4)
    own = python.Random(world.rank)
    assert python.random() == own.random()


def test_a_hook_that_looks_at_the_module_itself_is_no_error_of_the_forward():
    """What is written down is a copy, and the hook knows the module that the user made."""
    module = stage_models.Hooked(5, 2)
    with torch.no_grad():
        assert module(torch.zeros(4, 5)).shape == (4, 2)
    with pytest.raises(
        ConfigError, match=r"torch.export can't write Hooked down, so it can't be cut: .*IndexErr"
    ):
        Graph(module, {"x": torch.zeros(4, 5)}, False, 2)


@pytest.mark.mpi
def test_tables_that_python_keeps_have_the_bits_of_one_process(world, build):
    """Of those that are made while the forward is written down, none may be met when it runs."""
    if world.size != 2:
        pytest.skip("two stages")
    job = build("Cached", 2, micro_batches=5)
    has_bits_of_one_process(world, job, "Cached")
    job.engine.evaluate(job.split_batches("train"), job.task.measure)
    assert type(stage_models.ramp(8)) is type(stage_models.Cached.rows(3)) is torch.Tensor


@pytest.mark.parametrize("what", ["replaced", "changed", "number", "listed", "given", "made"])
def test_what_is_kept_of_a_call_for_the_next_is_refused_by_operators(what):
    told = {"number": "changes scale and computes", "made": r"registers late\.weight, which operators can't"}
    told["given"] = "keeps late of one call"
    told |= {"replaced": "keeps mean of one call", "changed": "keeps mean of one call"}
    with pytest.raises(
        ConfigError, match=f"the forward {told.get(what, 'keeps means of one call and computes')}"
    ):
        Graph(stage_models.Keeps(5, 2, what), {"x": torch.zeros(4, 5)}, False, 2)


@pytest.mark.parametrize("what", ["iterator", "object", "generator", "tensor of a number"])
def test_what_differs_from_call_to_call_is_refused_by_operators(what):
    """No attribute says so; the second call and the third do."""
    with pytest.raises(ConfigError, match=r"computes something else in each call, .* \(aten"):
        Graph(stage_models.InTurn(5, 2, what), {"x": torch.zeros(4, 5)}, False, 2)


@pytest.mark.mpi
@pytest.mark.parametrize("what", ["told", "made once", "drawn"])
def test_what_differs_and_computes_nothing_has_the_bits_of_one_process(world, build, what):
    if world.size != 2:
        pytest.skip("two stages")
    has_bits_of_one_process(world, build("InTurn", 2, arguments={"what": what}, micro_batches=5), "InTurn")


@pytest.mark.mpi
def test_a_dtype_that_one_stage_has_is_refused_on_all(world, build):
    for stages in layouts(world.size):
        if stages < 4:
            with pytest.raises(ConfigError, match="parameters of float16 would be rounded") as caught:
                build("HalfAtEnd", stages, micro_batches=4, invariant=True)
            assert caught.value.agreed


@pytest.mark.mpi
def test_what_stages_tell_one_another_by_a_module_is_refused_on_all(world, build):
    if world.size not in layouts(world.size):
        pytest.skip("as many stages as ranks, two at least")
    job = build("collecting_row", world.size, arguments={"told": False}, micro_batches=5)
    has_bits_of_one_process(world, job, "collecting_row")
    for stages in layouts(world.size):
        job = build("collecting_row", stages, arguments={"told": True}, micro_batches=5)
        with pytest.raises(
            ConfigError, match=r"stage \d reads total of 0\.common, which stage 0 has, too"
        ) as caught:
            run(job, 1)
        assert caught.value.agreed


@pytest.mark.mpi
@pytest.mark.parametrize("sharded", [True, False])
def test_a_stage_may_train_nothing(world, build, sharded):
    """In several replicas, too, whose averages have nothing there."""
    for stages in layouts(world.size):
        if stages < 4:  # it has three layers with weights
            cuts = ["1", "3"][: stages - 1]
            job = build("frozen_start", stages, cuts=cuts, micro_batches=4, sharded=sharded)
            assert bool(job.averager.named) == (job.topology.stage > 0)
            assert compare(job, 3) is None


@pytest.mark.mpi
@pytest.mark.parametrize("model", ["Skips", "tied_row"])
def test_clipping_is_by_the_norm_over_all_stages(world, build, model):
    """Each weight once, also the one that two stages use. Replicas add in another order: not the same bits."""
    for stages in layouts(world.size):
        job = build(model, stages, micro_batches=4)
        norms = [norm for _, _, norm in run(job, 4, clip=0.05)]
        found, state = alone_like(job, 4, clip=0.05)
        assert norms == pytest.approx([norm for _, _, norm in found], rel=1e-4)  # of float32 sums
        for name, value in job.engine.module.state_dict().items():
            torch.testing.assert_close(value, state[name], rtol=1e-3, atol=1e-3)


@pytest.mark.mpi
@pytest.mark.parametrize("model", ["plain_row", "Skips", "Tied"])
def test_evaluation_before_and_after_training(world, build, model):
    for stages in layouts(world.size):
        job = build(model, stages)
        alone = build_alone(job)
        for _ in range(2):
            batch = job.task.batch(job.index.splits["train"].samples(torch.arange(7).numpy()))
            found = job.engine.outputs(batch, everywhere=True)
            assert job.pipeline.transport._slots is not None  # evaluation has shown what it sends
            expected = alone.engine.outputs(batch)
            assert found.shape == expected.shape
            # in eval mode torch's attention has a kernel of its own for whole models, which adds in another order
            assert torch.equal(found, expected) or (
                model == "Tied" and torch.allclose(found, expected, atol=1e-6)
            )
            assert (job.engine.outputs(batch) is None) == (job.topology.stage < stages - 1)
            sums = job.engine.evaluate(job.split_batches("train"), job.task.measure)
            others = alone.engine.evaluate(alone.split_batches("train"), alone.task.measure)
            assert sums.keys() == others.keys()
            room = 1e-6 if model == "Tied" else 0.0
            assert all(sums[n] == pytest.approx(others[n], rel=room, abs=0.0) for n in sums)
            take_weights(job, alone)
        alone.close()
        alone.topology.close()


@pytest.mark.mpi
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_failing_layer_is_named_on_all_ranks(world, build, at, backward):
    for stages in layouts(world.size):
        if stages > 4:
            continue
        arguments = {"at": at, "backward": backward}
        job = build("breaking_row", stages, arguments=arguments, micro_batches=4 * world.size // stages)
        with pytest.raises(HpctrainError, match="trouble in a layer") as raised:
            job.engine.step(0, job.loader.read(0))
        text = str(raised.value)
        assert "at step 0, micro-batch" in text
        assert "stage " in text
        what = "the backward pass of layer" if backward else "layer"
        assert re.search(rf"in {what} {at}\.1 \(Bad\), given float32 \(\d, [28]\)", text)
        assert all(other == text for other in world.allgather(text))


@pytest.mark.mpi
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("at", [1, 4, 6])
def test_a_layer_that_fails_where_gradients_go_from_stage_to_stage_ends_on_all(world, build, at, backward):
    """Those of a tied weight, for `averaging.invariant`: whoever waits for them learns of it, nobody hangs."""
    for stages in layouts(world.size):
        arguments = {"at": at, "backward": backward}
        job = build("breaking_tied_row", stages, arguments=arguments, micro_batches=6, invariant=True)
        assert job.pipeline.ties
        with pytest.raises(HpctrainError, match="trouble in a layer") as raised:
            for number in range(3):
                job.engine.step(number, job.loader.read(0))
        assert all(other == str(raised.value) for other in world.allgather(str(raised.value)))


@pytest.mark.mpi
@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_looking_for_the_layer_does_not_meet_other_replicas(world, build, rank):
    """A SyncBatchNorm's forward would: the error of another rank would stand for the true one."""
    if world.size != 4:
        pytest.skip("two replicas of two stages")
    job = build("synced_row", 2, arguments={"rank": rank}, micro_batches=2, batch=16)
    with pytest.raises(HpctrainError, match="own trouble") as raised:
        job.engine.step(0, job.loader.read(0))
    assert "in the backward pass" not in str(raised.value)


@pytest.mark.mpi
def test_a_layer_that_does_not_fail_again_is_not_named(world, build):
    if world.size == 1:
        pytest.skip("one rank has no stages")
    arguments = {"at": 1, "backward": True, "once": True}
    job = build("breaking_row", 2 if world.size % 2 == 0 else 3, arguments=arguments, micro_batches=12)
    with pytest.raises(HpctrainError, match="trouble in a layer") as raised:
        job.engine.step(0, job.loader.read(0))
    assert "at step 0, micro-batch" in str(raised.value)
    assert "in the backward pass" not in str(raised.value)


@pytest.mark.mpi
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_a_failing_backward_of_an_operator_is_named(world, build, schedule):
    """With its shapes; the first stage has no gradient of its input to ask for."""
    for stages in layouts(world.size)[:1]:
        job = build("BreakingGraph", stages, micro_batches=4 * world.size // stages, schedule=schedule)
        with pytest.raises(HpctrainError, match="modified by an inplace operation") as raised:
            job.engine.step(0, job.loader.read(0))
        text = str(raised.value)
        where = r"in the backward pass of the model's forward, operator exp, given float32 \(\d, 8\)"
        assert re.search(where, text)
        assert all(other == text for other in world.allgather(text))


@pytest.mark.mpi
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "interleaved"])
def test_half_precision_has_the_bits_of_one_process(world, build, schedule):
    """bf16 in forward and in what recomputes it; the numbers that cross are 16 bits wide."""
    if world.size == 4:
        pytest.skip("2 and 3 ranks do")
    for model in ("plain_row", "Skips"):
        if world.size in layouts(world.size):
            recompute = "always" if schedule == "zb-h1" else "never"
            job = build(
                model, world.size, schedule=schedule, autocast="bf16", recompute=recompute, micro_batches=5
            )
            assert job.engine.autocast == "bf16"
            has_bits_of_one_process(world, job, model)


@pytest.mark.mpi
@pytest.mark.parametrize("model", TIED)
def test_tied_weights_in_half_precision_have_the_gradients_of_one_process(world, build, model):
    """Each use casts the weight: cast once a forward, its gradients would be added in bf16 in one process only."""
    for stages in layouts(world.size)[:1]:
        for schedule in ("1f1b", "zb-h1"):
            settings = {"targets": ["y", "weight"]} if model == "OwnLoss" else {}
            job = build(model, stages, autocast="bf16", micro_batches=4, schedule=schedule, **settings)
            assert compare(job, 2) is None


@pytest.mark.mpi
def test_tied_weights_whose_gradients_torch_lays_into_one_memory(world, build):
    """It adds the next micro-batch's to both at once: each is taken over as it comes."""
    if world.size != 2:
        pytest.skip("two stages")
    assert compare(build("StackedTies", 2, cuts=["back"], micro_batches=4), 2) is None


@pytest.mark.mpi
@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_one_sample_trains_in_stages(world, build, schedule):
    """More stages than samples, and than micro-batches."""
    for stages in layouts(world.size):
        job = build("plain_row", stages, batch=1, schedule=schedule, micro_batches=world.size // stages)
        assert compare(job, 2) is None


@pytest.mark.mpi
@pytest.mark.parametrize("backward", [False, True])
def test_an_error_says_step_micro_batch_and_stage(world, build, backward):
    """The layer's sixth call is micro-batch 5's; with one replica all micro-batches come by."""
    if world.size not in layouts(world.size):
        pytest.skip("as many stages as ranks, two at least")
    arguments = {"at": 3, "backward": backward, "call": 6}
    job = build("breaking_row", world.size, arguments=arguments, micro_batches=8)
    with pytest.raises(ValueError, match="trouble in a layer") as raised:
        job.engine.step(0, job.loader.read(0))
    last = world.size - 1
    assert f"at step 0, micro-batch 5, stage {last}, rank {last}" in str(raised.value)
    assert re.search(r"layer 3.1 \(Bad\), given float32 \(\d, \d\)", str(raised.value))


@pytest.mark.mpi
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_a_gradient_that_is_not_finite_ends_on_all_stages(world, build, schedule):
    """It is the first stage's alone."""
    if world.size not in layouts(world.size):
        pytest.skip("as many stages as ranks, two at least")
    job = build("unlimited_row", world.size, micro_batches=4, schedule=schedule)
    with pytest.raises(DivergedError, match=r"the gradient of 0.weight, 0.bias") as raised:
        job.engine.step(0, job.loader.read(0))
    assert all(text == str(raised.value) for text in world.allgather(str(raised.value)))


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("model", "schedule"),
    [
        ("plain_row", "1f1b"),
        ("plain_row", "zb-h1"),
        ("plain_row", "zb-h2"),
        ("plain_row", "interleaved"),
        ("Skips", "zb-h1"),
        ("Tied", "1f1b"),
    ],
)
def test_a_step_pickles_nothing(world, build, model, schedule):
    """Once shapes are known; with statistics (Skips), with a weight of two stages, over replicas at four ranks."""
    if world.size not in layouts(world.size):
        pytest.skip("as many stages as ranks, two at least")
    schedule = "1f1b" if world.size > 2 and schedule == "interleaved" else schedule  # the row is too short
    job = build(model, 2 if world.size == 4 else world.size, micro_batches=6, schedule=schedule)
    run(job, 6, clip=0.05)
    step, found = job.loader.read(0), []
    MPI.pickle.__init__(lambda *given: found.append(given) or pickle.dumps(*given), pickle.loads)
    try:
        job.engine.step(6, step, 0.05)
        told = len(found)
        world.allgather(None)
    finally:
        MPI.pickle.__init__()  # as it was
    assert len(found) == told + 1, "what is pickled is seen"
    assert not any(world.allgather(told))


@pytest.mark.mpi
def test_a_loss_that_is_not_finite_ends_on_all_stages(world, build):
    """Named with its samples by the stage that has the loss; the weights stay as they were."""
    for stages in layouts(world.size):
        job = build("Overflowing", stages, arguments={"most": -1e9}, micro_batches=2 * world.size // stages)
        before = {n: v.clone() for n, v in tensors_of(job.engine.module).items()}
        with pytest.raises(
            DivergedError, match=r"the loss is (nan|inf) at step 0 on rank \d+, .*samples \d"
        ) as raised:
            job.engine.step(0, job.loader.read(0))
        assert all(text == str(raised.value) for text in world.allgather(str(raised.value)))
        after = tensors_of(job.engine.module)
        assert all(torch.equal(v, before[n]) for n, v in after.items())


@pytest.mark.mpi
def test_a_cut_before_an_operator_in_place_is_refused(world, build):
    if world.size != 2:
        pytest.skip("two ranks do")
    with pytest.raises(
        ConfigError, match=r"4 begins between a tensor and an operator that changes it in place"
    ):
        build("Row", 2, cuts=["4"])


@pytest.mark.mpi
def test_a_missing_message_is_named_with_what_every_rank_does(world, build, monkeypatch, caplog):
    """A rank sits in its forward; the lowest that waits tells of all, and all goes on when it comes back."""
    if world.size == 1:
        pytest.skip("one rank waits for nobody")
    monkeypatch.setattr("hpctrain.pipeline.watch.LOOK_SECONDS", 0.1)
    job = build("plain_row", world.size, micro_batches=5)
    job.engine.step(0, job.loader.read(0))  # the first ones are slow
    monkeypatch.setattr("hpctrain.pipeline.watch.PATIENCE_SECONDS", 1.5)
    forward = Stage.forward

    def slow(self, v, *rest):
        if v == 2 and self.last:
            time.sleep(4.0)
        return forward(self, v, *rest)

    monkeypatch.setattr(Stage, "forward", slow)
    world.Barrier()
    with caplog.at_level("WARNING", LOGGER.name):
        job.engine.step(1, job.loader.read(8))
    told = [record.getMessage() for record in caplog.records if "waiting for" in record.getMessage()]
    assert bool(told) == (world.rank == 0)
    if told:
        last, first = world.size - 1, told[0]
        assert re.match(
            r"waiting for rank 1 on \S+ for \d s: rank 0 on \S+ waits for the gradients of ", first
        )
        assert re.search(
            rf"; rank {last} on \S+ runs the forward pass of micro-batch 2 on stage {last} since \d s", first
        )
        assert len(told) <= 3  # then after twice and four times as long


@pytest.mark.mpi
def test_a_rank_that_does_not_answer_is_named(world, monkeypatch, caplog):
    """Its thread answers no more, as if it had stopped; before, it says what it does."""
    if world.size == 1:
        pytest.skip("one rank waits for nobody")
    monkeypatch.setattr("hpctrain.pipeline.watch.LOOK_SECONDS", 0.1)
    monkeypatch.setattr("hpctrain.pipeline.watch.ANSWER_SECONDS", 1.0)
    watch = Watch(world)
    assert watch.told().startswith("is between the pipeline's passes since")
    if world.rank:
        watch.stop()
    world.Barrier()
    if not world.rank:
        with caplog.at_level("WARNING", LOGGER.name):
            watch.missing(1, 60.0)
        assert re.search(
            r"waiting for rank 1 on \S+ for 60 s: .*; rank 1 on \S+ does not answer", caplog.text
        )
    world.Barrier()
    while watch.comm.Iprobe(0, ASK):
        watch.comm.recv(source=0, tag=ASK)
    watch.close()


@pytest.mark.mpi
@pytest.mark.parametrize("rank", [0, -1])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("model", ["Row", "plain_row"])
def test_reading_that_fails_on_one_stage_ends_on_all(world, build, model, steps, rank):
    """In the first step, where the others write forwards down, or behind it, where they run them at once."""
    if world.size == 1:
        pytest.skip("needs two ranks")
    job = build(model, world.size)
    run(job, steps)
    step = job.loader.read(0)
    if world.rank == rank % world.size:
        step = replace(step, micro_batches={}, failure=OSError("disk trouble"))
    with pytest.raises(HpctrainError, match=f"rank {rank % world.size} of .*disk trouble"):
        job.engine.step(steps, step)


@pytest.mark.mpi
@pytest.mark.parametrize("kind", [ValueError, ConfigError])
@pytest.mark.parametrize("training", [True, False])
def test_a_forward_that_one_stage_cannot_write_down_again_ends_on_all(
    world, build, monkeypatch, kind, training
):
    """The smaller micro-batch of an uneven batch shows only in the first step, or in evaluation."""
    if world.size == 1:
        pytest.skip("needs two stages")
    stages = max(layouts(world.size))
    job = build("Row", stages, batch=5 * (world.size // stages), micro_batches=2 * (world.size // stages))
    real = Writer.write

    def write(self, samples, in_training, like):
        if world.rank == world.size - 1 and samples == 2 and in_training == training:
            raise kind("trouble")
        return real(self, samples, in_training, like)

    with monkeypatch.context() as patched:
        patched.setattr(Writer, "write", write)
        with pytest.raises(HpctrainError, match="trouble") as raised:
            if training:
                job.engine.step(0, job.loader.read(0))
            else:
                batches = iter([job.task.batch(np.arange(2))])
                job.engine.evaluate(batches, lambda outputs, batch: {})
    text = str(raised.value)
    where = r"at step 0, micro-batch \d" if training else "in evaluation, micro-batch 0"
    assert re.search(rf"{where} of 2 samples, stage {stages - 1}", text)
    assert re.findall(r"rank \d of \d", text) == [f"rank {world.size - 1} of {world.size}"]
    assert all(other == text for other in world.allgather(text))


@pytest.mark.mpi
def test_waiting_for_another_stage_is_no_computing(world, build):
    """The first stage's forward takes long: the others wait for each micro-batch."""
    if world.size == 1:
        pytest.skip("needs two stages")
    job = build("plain_row", world.size, schedule="1f1b", micro_batches=4)
    engine, step, nap = job.engine, job.loader.read(0), 0.1
    engine.step(0, step)
    real, before = engine._forward_staged, dict(vars(engine.clock))
    if job.topology.stage == 0:
        engine._forward_staged = lambda *rest: time.sleep(nap) or real(*rest)
    engine.step(1, job.loader.read(step.next_position))
    took = {name: value - before[name] for name, value in vars(engine.clock).items()}
    slow, fast = ("computing", "waiting") if job.topology.stage == 0 else ("waiting", "computing")
    assert took[slow] > 3 * nap  # the others work a little meanwhile
    assert took[fast] < 2 * nap


@pytest.mark.mpi
def test_a_step_without_samples_is_not_the_one_that_is_watched(world, build, shared_tmp):
    """The last step of an epoch may have one sample, which goes to the last replica."""
    if world.size != 4:
        pytest.skip("two replicas of two stages")
    length = len(build("plain_row", 2).index.splits["train"])
    job = build("plain_row", 2, micro_batches=4, batch=length - 1)
    run = RunFolder(shared_tmp, writes=world.rank == 0)
    watching, position = Timeline(job, run), 0
    watching.number, shown = 2, []
    for number in range(1, 5):
        step = job.loader.read(position)
        watching.before(number)
        job.engine.step(number, step)
        shown.append(job.engine._spans is not None and bool(job.engine._spans))
        watching.after(number, number)
        position = step.next_position
    assert shown == [False, False, job.topology.replica == 0, False]
    world.Barrier()
    assert [row["step"] for row in rows(run.path / "metrics.jsonl") if row["event"] == "pipeline"] == [3]


@pytest.mark.mpi
@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_a_watched_step_shows_what_ran(world, build, shared_tmp, schedule, caplog):
    """The passes of the program, in its order, none before what it waits for; table, row and picture of them."""
    if world.size == 1:
        pytest.skip("one stage has no messages")
    stages = max(layouts(world.size))
    job = build("plain_row", stages, schedule=schedule, micro_batches=world.size // stages * 6)
    run = RunFolder(shared_tmp, writes=world.rank == 0)
    watching = Timeline(job, run)
    position = 0
    with caplog.at_level("INFO", LOGGER.name):
        for number in range(3):
            step = job.loader.read(position)
            watching.before(number + 1)
            job.engine.step(number, step)
            spans = list(job.engine._spans or [])
            assert bool(spans) == (number + 1 == WATCHED and job.topology.replica == 0)
            watching.after(number + 1, number + 1)
            position = step.next_position
    virtual = job.pipeline.virtual
    every, ranks = zip(*job.topology.comms.pipe.allgather((spans, world.rank)))
    assert abs(seconds_ahead(job.topology.comms.pipe)) < 5e-3  # one machine has one clock
    if job.topology.replica:
        return
    mine = [v for v, owner in enumerate(job.averager.owners) if owner == 0]
    at = {}
    for rank, found in enumerate(every):
        passes = [i for i in program(schedule, rank, stages, mine, virtual) if isinstance(i, PASSES)]
        assert [span.instruction for span in found] == passes
        assert all(span.stage == rank + stages * span.instruction.virtual for span in found)
        assert all(a.end <= b.start for a, b in pairwise(found))
        at |= {
            (s.stage, type(s.instruction) is Forward, s.instruction.micro_batch): s for s in reversed(found)
        }
    for stage in range(stages * virtual - 1):
        for v in mine:
            assert at[stage, True, v].end <= at[stage + 1, True, v].start
            assert at[stage + 1, False, v].start <= at[stage, False, v].start
    if world.rank:
        return
    (row,) = [row for row in rows(run.path / "metrics.jsonl") if row["event"] == "pipeline"]
    assert row["seconds"] == pytest.approx(as_simulation(every).seconds, abs=1e-6)
    assert [told["rank"] for told in row["stages"]] == list(ranks) * virtual
    assert sum(told["parameters"] for told in row["stages"]) == sum(
        p.numel() for p in build_alone(job).engine.module.parameters()
    )
    choice = job.pipeline.cut.choice
    assert [piece["begins"] for piece in row["pieces"]] == choice.names[: len(choice.works)]
    for (a, b), told in zip(choice.parts, row["stages"]):
        kept = sum(piece["kept_bytes"] for piece in row["pieces"][a:b])
        assert told["expected"]["kept_bytes"] == kept < told["expected"]["memory_bytes"]
        assert told["expected"]["forward_seconds"] > 0
    assert 0 < row["simulated_seconds"] < 2 * row["seconds"]
    assert 0 <= row["simulated_bubble"] < 1
    assert set(row["other_seconds"]) == set(SCHEDULES) - {schedule}
    assert all(0 < seconds < 3 * row["simulated_seconds"] for seconds in row["other_seconds"].values())
    table = [record.getMessage() for record in caplog.records]
    assert (
        sum(bool(re.match(r" +\d +\d+ +[\d,]+ +\d+\.\d\d +\d+\.\d\d +\d+%  \d", line)) for line in table)
        == stages * virtual
    )
    assert (run.path / "pictures" / "pipeline.png").stat().st_size > 10_000


@pytest.mark.mpi
@pytest.mark.parametrize("trouble", ["task", "model", ""])
def test_what_is_shown_at_the_end_fails_alone(world, build, shared_tmp, monkeypatch, trouble, caplog):
    """Rank 0 asks for outputs; where its task or the model fails between, all ranks go on."""
    job = build("plain_row", max([1, *layouts(world.size)]))
    run = RunFolder(shared_tmp, writes=world.rank == 0)

    def sample(run_model):
        assert world.rank == 0
        batch = job.task.batch(np.arange(3))
        outputs = run_model(batch)
        if trouble == "task":
            raise ValueError("trouble in the task")
        if trouble == "model":
            batch.inputs["x"] = batch.inputs["x"][:, :2]
        return f"{float((run_model(batch) - outputs).abs().max())}"

    monkeypatch.setattr(job.task, "sample", sample)
    with caplog.at_level("INFO", LOGGER.name):
        summary.show(job, run)
    sums = job.engine.evaluate(job.split_batches("train"), job.task.measure)
    assert sums["loss"][1] > 0
    if world.rank == 0:
        assert ("no sample: " in caplog.text) == bool(trouble)
        assert (run.path / "sample.txt").exists() != bool(trouble)
        assert trouble or (run.path / "sample.txt").read_text() == "0.0"


@pytest.mark.mpi
@pytest.mark.parametrize("where", ["reading", "model", "metric"])
def test_evaluation_that_fails_on_one_stage_ends_on_all(world, build, monkeypatch, where):
    """In the second group of batches: of the last rank, or of the first stage of its replica."""
    for stages in layouts(world.size):
        job = build("plain_row", stages)
        last = job.topology.replica == job.topology.replicas - 1
        count = 3 * GROUP * stages
        at = count // 2

        def batches(job=job, count=count, at=at):
            for v in range(count):
                if where == "reading" and v == at and world.rank == world.size - 1:
                    raise OSError("trouble")
                yield job.task.batch(np.array([v % SAMPLES]))

        def measure(outputs, batch, at=at, last=last):
            if where == "metric" and last and batch.samples[0] == at:
                raise ValueError("trouble")
            return {}

        def forward(v, *rest, at=at - GROUP * stages, whole=job.engine.pipeline.stages[0].forward):
            if v == at:
                raise ValueError("trouble")
            return whole(v, *rest)

        if where == "model" and last and job.topology.stage == 0:
            monkeypatch.setattr(job.engine.pipeline.stages[0], "forward", forward)
        firsts = world.allgather(last and job.topology.stage == 0)
        failing = firsts.index(True) if where == "model" else world.size - 1
        with pytest.raises(HpctrainError, match="trouble") as raised:
            job.engine.evaluate(batches(), measure)
        assert re.findall(r"rank \d of \d", str(raised.value)) == [f"rank {failing} of {world.size}"]
        if where != "reading":
            stage = 0 if where == "model" else stages - 1
            told = rf"in evaluation, on samples (\d+) to \1, stage {stage}, rank {failing}"
            assert re.search(told, str(raised.value))
        monkeypatch.undo()
        sums = job.engine.evaluate(job.split_batches("train"), job.task.measure)  # and all goes on
        assert sums["loss"][1] > 0


@pytest.mark.mpi
def test_cuts_where_the_user_says(world, build, caplog):
    if world.size != 2:
        pytest.skip("for two ranks")
    for model, cut, name in (
        ("plain_row", "5", "5.weight"),
        ("Skips", "up1", "up1.weight"),
        ("Named", "c", "c.line.weight"),
    ):
        job = build(model, 2, cuts=[cut])
        assert compare(job, 1) is None
        assert (name in job.engine.module.state_dict()) == (world.rank == 1)
    for cuts, text in (
        (["nowhere"], "parallel.cuts: 'nowhere' is not among the layers 0, 1, 2"),
        (["00"], "among the layers 0, 1, 2.*: did you mean 0\\?"),
        (["0"], "parallel.cuts: '0' is the first of the layers: stage 0 begins there anyway"),
        (["1", "2"], "names 2 cuts, 2 stages need 1"),
    ):
        with pytest.raises(ConfigError, match=text):
            build("plain_row", 2, cuts=cuts)
    with pytest.raises(ConfigError, match="parallel.cuts: first leaves stage 0 nothing to compute"):
        build("Shaped", 2, cuts=["first"])
    with caplog.at_level("INFO", LOGGER.name):
        build("ByNumpy", 2, cuts=["last"], micro_batches=4)
        assert "stage 0 has no weights" not in caplog.text
        build("Shifting", 2, cuts=["first"], micro_batches=4)
    if world.rank == 0:
        assert "the model is cut between calls of its modules, where parallel.cuts says" in caplog.messages
        assert "the model is cut between operators, as torch.export writes the forward" in caplog.text
        assert "stage 0 has no weights: it has little to do" in caplog.text


@pytest.mark.mpi
def test_settings_of_stages_without_stages_are_told(world, build, caplog):
    with caplog.at_level("WARNING", LOGGER.name):
        build("Shaped", 1, cuts=["second"], micro_batches=world.size)
        build("Shaped", 1, gradients="fast", schedule="auto", micro_batches=world.size)
    told = [m for m in caplog.messages if m.endswith("nothing hangs on it with parallel.stages = 1")]
    names = ["parallel.cuts and parallel.schedule", "parallel.gradients"]
    assert [m.split(":")[0] for m in told] == names * (world.rank == 0)


@pytest.mark.mpi
def test_what_cannot_be_cut_says_why(world, build, capsys):
    """And torch does not print what it tried."""
    if world.size == 1:
        pytest.skip("needs two ranks")
    with pytest.raises(
        ConfigError,
        match=r"can't write Deciding down, .* cut: \(Deciding\), stage_models.py:\d+: `return self.second\(.*` "
        r"\(.*torch.where, .*a method layers\(\)",
    ):
        build("Deciding", world.size)
    assert "def forward" not in "".join(capsys.readouterr())
    with pytest.raises(
        ConfigError,
        match=r"forward fails on a micro-batch of shape x \(\d+, \d+\), in stages or not: \(Wrong\), stage_models.*"
        r"`return self.second\(.*` \(RuntimeError: .*\)$",
    ):
        build("Wrong", world.size)
    with pytest.raises(ConfigError, match=r"an object that operators can't name .*a torch.Generator, say"):
        build("Generating", world.size)
    with pytest.raises(
        ConfigError, match=r"Deeper .* cut: layer inner\.1 \(Deciding\), stage_models.py:\d+: `"
    ):
        build("Deeper", world.size)
    with pytest.raises(
        ConfigError,
        match=r"the shape of what operator \w+, at File .* gives, or where it lies, depends on a tensor's",
    ):
        build("Choosing", world.size)
    with pytest.raises(
        ConfigError, match=r"ListsAList\.layers\(\) lists inner, .*list its members \(\*self.inner\)"
    ):
        build("ListsAList", world.size)
    with pytest.raises(ConfigError, match=r"the forward registers other, which operators can't"):
        build("RegistersLate", world.size)
    with pytest.raises(
        ConfigError, match=r"the forward sets the parameter other.weight anew, .* constructor"
    ):
        build("TiedLate", world.size)
    with pytest.raises(
        ConfigError,
        match=r"only 1 can begin, .*changes it in place, as .* does; change a copy, weights in the",
    ):
        build("Bounding", world.size)
    with pytest.raises(
        ConfigError, match=r"\(KeyError: 'first'\); .*make hooks that are inner functions methods"
    ):
        build("KeepsByHook", world.size)
    lost = (
        r"torch.export can't write ByNumpy down, .*: {}.*`.*` \(RuntimeError: .*\); .* torch.where, {}name by"
    )
    with pytest.raises(ConfigError, match=lost.format(r"layer first \(Asking\)", "")):
        build("ByNumpy", world.size)
    with pytest.raises(
        ConfigError, match=lost.format(r"\(ByNumpy\)", "or move this into a submodule; then ")
    ):
        build("ByNumpy", world.size, arguments={"inside": False})
    job = build("Shy", world.size)
    with pytest.raises(ConfigError, match=r"runs lines\.\d\.\w+ in another order in eval mode"):
        job.engine.evaluate(job.split_batches("train"), job.task.measure)
    with pytest.raises(ConfigError, match=r"both call the BatchNorm of 1\.running_mean"):
        build("normed_row", world.size)
    with pytest.raises(ConfigError, match=r"into\.weight is used by several stages, of which interleaved"):
        build("Tied", world.size, invariant=True, micro_batches=4, schedule="interleaved")
