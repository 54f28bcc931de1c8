"""Laws of every schedule, the drawings in its module, and the dry run that proves them."""

import itertools
from pathlib import Path

import pytest

from hpctrain.errors import ConfigError, HpctrainError
from hpctrain.pipeline import schedule
from hpctrain.pipeline.balance import partition
from hpctrain.pipeline.schedule import (
    SCHEDULES,
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Send,
    SendGradient,
    program,
)
from hpctrain.pipeline.simulate import chain, check, simulate

SIZES = [(1, 3), (2, 1), (2, 2), (2, 5), (3, 2), (4, 4), (4, 9), (8, 3)]


VIRTUAL = dict.fromkeys(schedule.SEVERAL, 2)


def programs(name, ranks, count, virtual=None):
    virtual = virtual or VIRTUAL.get(name, 1)
    return [list(program(name, rank, ranks, range(count), virtual)) for rank in range(ranks)]


def halved(stage, instruction):
    """A whole backward takes as long as two forwards, each half of it as one."""
    return 2.0 if isinstance(instruction, Backward) else 1.0


def unsplit(stage, instruction):
    """Nothing can be put off: the gradient of the input is all of a backward, which is as long as a forward."""
    return 0.0 if isinstance(instruction, BackwardWeight) else 1.0


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("ranks", "count"), SIZES)
def test_laws(name, ranks, count):
    """No deadlock; every micro-batch once forward and once backward, both halves of that in order."""
    found = simulate(programs(name, ranks, count), halved)
    virtual = VIRTUAL.get(name, 1) if ranks > 1 else 1
    for stage in range(ranks * virtual):
        mine = [span.instruction for span in found.spans if span.stage == stage]
        assert sorted(i.micro_batch for i in mine if isinstance(i, Forward)) == list(range(count))
        for halves in ((Backward, BackwardInput), (Backward, BackwardWeight)):
            assert [i.micro_batch for i in mine if isinstance(i, halves)] == list(range(count))
    assert found.busy == [3.0 * count * virtual] * ranks
    if ranks == 1:
        assert found.kept == [1]
        assert found.bubble == 0
        return
    gaps = ranks - 1
    if name in ("gpipe", "1f1b", "zb-h1", "zb-h2") or (name == "interleaved" and count % ranks == 0):
        bubble = simulate(programs(name, ranks, count), unsplit).bubble
        assert bubble == pytest.approx(gaps / (virtual * count + gaps))
    gpipe = simulate(programs("gpipe", ranks, count), halved)
    assert found.seconds <= virtual * gpipe.seconds
    if name in ("zb-h1", "zb-h2"):
        assert found.kept == [min(count, ranks if name == "zb-h1" else 2 * ranks - 1)] * ranks
        if count >= 2 * ranks - 1:  # p - 1 gaps of F + I - W
            assert found.bubble == pytest.approx(gaps / (3 * count + gaps))
    elif name in ("gpipe", "1f1b"):
        assert found.bubble == pytest.approx(2 * gaps / (3 * count + 2 * gaps))  # of F + I
        peaks = {"gpipe": [count] * ranks, "1f1b": [min(count, ranks - r) for r in range(ranks)]}
        assert found.kept == peaks[name]
    if virtual == 1:
        assert max(found.kept) <= count


@pytest.mark.parametrize("virtual", [2, 3, 4])
def test_interleaving_never_hangs(virtual):
    """Whatever the numbers; a multiple of the ranks has the shortest gaps, and one more virtual stage shorter."""
    for ranks, count in itertools.product(range(2, 9), range(1, 19)):
        found = simulate(programs("interleaved", ranks, count, virtual), unsplit)
        assert found.busy == [2.0 * count * virtual] * ranks
        whole = -(-count // ranks) * ranks  # what is left out leaves a gap
        assert found.seconds <= 2.0 * whole * virtual + 2.0 * (ranks - 1)
        if count == whole:
            assert found.bubble == pytest.approx((ranks - 1) / (virtual * count + ranks - 1))
        assert max(found.kept) <= min(count, 2 * ranks)


GUIDE = (Path(__file__).parents[1] / "docs" / "pipeline.md").read_text()


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_drawing_is_what_runs(name):
    """Above the code, under the generator's name, and in the documentation."""
    lines = schedule.__doc__.splitlines()
    top = next(at for at, line in enumerate(lines) if line.split(",")[0] == f"    {SCHEDULES[name].__name__}")
    ranks = 2 if name in schedule.SEVERAL else 4
    drawn = [line[4:] for line in lines[top + 1 : top + 1 + ranks]]
    assert simulate(programs(name, ranks, 4), halved).picture(1.0) == drawn
    assert "\n".join(drawn) in GUIDE


def test_messages_are_taken_in_the_order_in_which_they_come():
    """As they do on a way; each micro-batch's own passes are in order."""
    bad = programs("gpipe", 2, 3)
    backwards = bad[1][6:]
    halves = [backwards[at : at + 3] for at in range(0, 9, 3)]
    bad[1][6:] = [i for part in reversed(halves) for i in part]
    with pytest.raises(HpctrainError, match="stage 1 runs the backward of micro-batch 1 behind that of 2"):
        simulate(bad, halved)
    bad = programs("gpipe", 2, 3)
    bad[1][:6] = [*bad[1][2:4], *bad[1][:2], *bad[1][4:6]]
    assert [*map(str, bad[1][:4])] == ["rF1", "F1", "rF0", "F0"]
    with pytest.raises(
        HpctrainError,
        match="stage 1 takes micro-batch 1 from stage 0, which sends that of micro-batch 0 before",
    ):
        simulate(bad, halved)


def test_utilisation_of_four_stages():
    """At 8 micro-batches, F, I and W of one length: 89 % of ZB-H1; 80 % of 1F1B, 73 % where it does not split."""
    assert 1 - simulate(programs("zb-h1", 4, 8), halved).bubble == pytest.approx(24 / 27)
    assert 1 - simulate(programs("1f1b", 4, 8), halved).bubble == pytest.approx(24 / 30)
    assert 1 - simulate(programs("1f1b", 4, 8), unsplit).bubble == pytest.approx(24 / 33)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_twice_the_micro_batches_leave_the_gaps_of_the_start_alone(ranks):
    """With an I longer than F and W, where zb-h1 waits for it; and passes that take longer in turn cost less."""

    def longer(stage, instruction):
        return {Forward: 1.3, BackwardInput: 1.65, BackwardWeight: 1.0}.get(type(instruction), 2.65)

    def held_up(stage, instruction):
        return halved(stage, instruction) * (1.2 if (instruction.micro_batch + stage) % 2 else 0.8)

    count, gaps = 4 * ranks, ranks - 1
    found = {name: simulate(programs(name, ranks, count), longer) for name in ("zb-h1", "zb-h2")}
    assert found["zb-h2"].seconds == pytest.approx(count * 3.95 + gaps * 1.3)
    assert found["zb-h1"].seconds == pytest.approx(count * 3.95 + gaps * (1.3 + 1.65 - 1.0))
    even = {name: simulate(programs(name, ranks, count), halved).seconds for name in found}
    assert even["zb-h1"] == even["zb-h2"] == 3 * count + gaps
    lost = {n: simulate(programs(n, ranks, count), held_up).seconds - even[n] for n in found}
    assert lost["zb-h2"] < 0.5 * lost["zb-h1"], lost


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("stages", "count"), [(2, 2), (3, 4)])
def test_two_neighbours_swapped_are_found(name, stages, count):
    """A send before its pass, a pass before its receive: every such swap ends the dry run with an error."""
    good = programs(name, stages, count)
    swaps = 0
    for stage in range(stages):
        for at in range(len(good[stage]) - 1):
            a, b = good[stage][at : at + 2]
            if (a.micro_batch, a.virtual) != (b.micro_batch, b.virtual) or isinstance(a, Send):
                continue  # a message of one micro-batch may wait for a pass of another
            if isinstance(a, SendGradient) and isinstance(b, BackwardWeight):
                continue  # later than it could be, not wrong
            bad = [list(p) for p in good]
            bad[stage][at : at + 2] = [b, a]
            swaps += 1
            with pytest.raises(HpctrainError, match=r"before|deadlock"):
                simulate(bad, halved)
    assert swaps >= 3 * count


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_is_left_out_is_found(name):
    good = programs(name, 3, 2)
    for stage, at in [(s, i) for s, one in enumerate(good) for i in range(len(one))]:
        bad = [list(p) for p in good]
        del bad[stage][at]
        with pytest.raises(HpctrainError, match=r"deadlock|before|never all of its backward"):
            simulate(bad, halved)


def test_a_pass_twice_is_found():
    bad = programs("gpipe", 2, 2)
    bad[0].insert(2, bad[0][0])
    with pytest.raises(HpctrainError, match="stage 0 runs F0 twice"):
        simulate(bad, halved)


def test_a_deadlock_names_every_stage():
    bad = programs("1f1b", 2, 2)
    bad[1] = bad[1][1:2]
    with pytest.raises(HpctrainError, match="stage 1 runs F0 before `F in 0` is done"):
        simulate(bad, halved)
    with pytest.raises(HpctrainError, match="deadlock: .* stage 0 at rB0"):
        simulate([programs("1f1b", 2, 2)[0], []], halved)


def test_skips_to_later_stages_are_waited_for():
    """Stage 0 gives to 1, 2 and 3, as in a U-Net; the bubble stays that of the chain."""
    links = {0: [1, 2, 3], 1: [2], 2: [3], 3: []}
    assert check("1f1b", 4, range(6), links).seconds == check("1f1b", 4, range(6)).seconds
    back = {0: [1], 1: [2], 2: [3], 3: []}  # gradients of a value that all use come from one to the other
    assert check("1f1b", 4, range(6), links, back).seconds == check("1f1b", 4, range(6)).seconds
    with pytest.raises(
        ConfigError, match="stage 2 gives activations to an earlier stage: the cut goes through a loop"
    ):
        check("1f1b", 3, range(2), {0: [1], 1: [2], 2: [1]})


def test_the_wire_and_slow_stages_count():
    quick = simulate(programs("1f1b", 2, 4), halved).seconds
    assert simulate(programs("1f1b", 2, 4), halved, wire=lambda *_: 0.5).seconds > quick
    # four messages of 10 leave the first stage one behind the other, then four gradients come back so
    queued = simulate(programs("gpipe", 2, 4), lambda *_: 1.0, wire=lambda *_: 10.0)
    arrived = [
        span.start for span in queued.spans if span.stage == 1 and isinstance(span.instruction, Forward)
    ]
    assert arrived == [11.0, 21.0, 31.0, 41.0]
    slow = simulate(programs("1f1b", 2, 4), lambda stage, i: (1.0 + stage) * unsplit(stage, i))
    assert slow.busy == [8.0, 16.0]
    assert slow.seconds == pytest.approx(1.0 + 16.0 + 1.0)
    assert chain(2) == {0: [1], 1: []}


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_a_partition_is_the_best_of_all(stages):
    """Against every cut, tried one by one."""
    costs, memory = [3, 1, 4, 1, 5, 9, 2], [n << 20 for n in (2, 7, 1, 8, 2, 8, 1)]
    limits, speeds = [n << 20 for n in (10, 12, 16, 30)][:stages], [1.0, 2.0, 1.0, 0.5][:stages]
    best = None
    for inner in itertools.combinations(range(1, len(costs)), stages - 1):
        edges = [0, *inner, len(costs)]
        parts = list(itertools.pairwise(edges))
        if all(sum(memory[a:b]) <= limit for (a, b), limit in zip(parts, limits)):
            time = max(sum(costs[a:b]) / speed for (a, b), speed in zip(parts, speeds))
            best = time if best is None else min(best, time)
    if best is None:
        with pytest.raises(ConfigError, match="the model does not fit: its 7 layers need 29.0 MiB"):
            partition(costs, stages, [[memory]] * stages, limits, speeds)
        return
    parts = partition(costs, stages, [[memory]] * stages, limits, speeds)
    assert parts[0][0] == 0
    assert parts[-1][1] == len(costs)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(parts))
    assert max(sum(costs[a:b]) / speed for (a, b), speed in zip(parts, speeds)) == best


def test_more_stages_than_layers_are_refused():
    with pytest.raises(
        ConfigError,
        match=r"the model has 2 layers .*, too few for 3 stages: set parallel.stages .* = 2 or fewer",
    ):
        partition([1, 1], 3)
