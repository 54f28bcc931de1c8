"""Stages of models that no operators can say, cut at the modules that the user names."""

import re

import pytest
from jobs import build_alone, has_bits_of_one_process, layouts, take_weights

from hpctrain.errors import ConfigError
from hpctrain.pipeline.calls import Calls
from hpctrain.verify import compare

CUTS = {2: ["encoder.2"], 3: ["encoder.1", "middle.b"], 4: ["encoder.1", "encoder.2", "last"]}


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("schedule", "recompute"), [("1f1b", "never"), ("1f1b", "always"), ("gpipe", "never"), ("zb-h1", "never")]
)
def test_a_model_that_looks_at_numbers(world, build, schedule, recompute):
    """Branches, NumPy, counts and shapes by data inside; skips, masks, no gradients, views, a buffer between."""
    for stages in layouts(world.size):
        settings = {"micro_batches": 5, "schedule": schedule, "recompute": recompute}
        job = build("Passing", stages, module="called_models", cuts=CUTS[stages], **settings)
        assert isinstance(job.pipeline.cut, Calls)
        if stages == world.size:
            has_bits_of_one_process(world, job, "Passing")
        else:
            assert compare(job, 2) is None


@pytest.mark.mpi
def test_a_layer_that_asks_numpy(world, build):
    """Of tensors without memory NumPy knows nothing, as a forward that is wrong in itself fails."""
    if world.size != 2:
        pytest.skip("two ranks do")
    job = build("ByNumpy", 2, cuts=["last"], micro_batches=4)
    assert isinstance(job.pipeline.cut, Calls)
    has_bits_of_one_process(world, job, "ByNumpy")


@pytest.mark.mpi
def test_several_stages_a_rank(world, build):
    if world.size != 2:
        pytest.skip("two ranks with two stages each")
    settings = {"micro_batches": 4, "schedule": "interleaved", "cuts": CUTS[4]}
    job = build("Passing", 2, module="called_models", **settings)
    has_bits_of_one_process(world, job, "Passing")


@pytest.mark.mpi
@pytest.mark.parametrize("cut", ["encoder", "middle.a", "last"])
def test_what_follows_the_cut_and_what_stays_before_it(world, build, cut):
    """Also with a weight that two stages use: the sum of its gradients has another order, in torch's rounding."""
    if world.size != 2:
        pytest.skip("two stages")
    for tied in (False, True):
        arguments = {"tied": True} if tied else {"width": 128}  # weights that are made on their stage only
        job = build("Passing", 2, module="called_models", cuts=[cut], micro_batches=5, arguments=arguments)
        assert isinstance(job.pipeline.cut, Calls)
        has_bits_of_one_process(world, job, "Tied" if tied else "Passing")
        assert job.pipeline.cut.names(1)[0].split(".")[0] == cut.split(".")[0]


@pytest.mark.mpi
def test_a_module_that_keeps_count_runs_as_it_is(world, build):
    """Operators would keep the count as it was, which is refused; named cuts let the module run."""
    if world.size != 2:
        pytest.skip("two stages")
    settings = {"module": "called_models", "micro_batches": 4}
    job = build("Counted", 2, cuts=["last"], **settings)
    assert isinstance(job.pipeline.cut, Calls)
    has_bits_of_one_process(world, job, "Counted")
    with pytest.raises(ConfigError, match=r"the forward changes inner\.count and computes something else"):
        build("Counted", 2, **settings)


@pytest.mark.mpi
@pytest.mark.parametrize("way", ["dictionary", "weight"])
def test_what_parts_tell_one_another_aside_is_refused(world, build, way):
    if world.size != 2:
        pytest.skip("two stages")
    settings = {"module": "called_models", "arguments": {"way": way}, "micro_batches": 3}
    text = {"dictionary": "which another stage has, too", "weight": "layer two keeps a weight"}[way]
    with pytest.raises(ConfigError, match=text):
        job = build("Sharing", 2, cuts=["two"], **settings)
        job.engine.step(0, job.loader.read(0), 0.0)
    has_bits_of_one_process(world, build("Sharing", 2, cuts=["last"], **settings), "Sharing")


@pytest.mark.mpi
@pytest.mark.parametrize("cut", ["inner", "pair", "last"])
def test_two_inputs_and_another_way_in_evaluation(world, build, cut):
    if world.size != 2:
        pytest.skip("two stages")
    inputs = {"inputs": {"x": "x", "z": "x"}}
    job = build("Twofold", 2, module="called_models", cuts=[cut], micro_batches=3, **inputs)
    assert isinstance(job.pipeline.cut, Calls)
    has_bits_of_one_process(world, job, "Twofold")
    alone = build_alone(job)
    take_weights(job, alone)
    found = job.engine.evaluate(job.split_batches("train"), job.task.measure)
    assert found == alone.engine.evaluate(alone.split_batches("train"), alone.task.measure)
    alone.close()
    alone.topology.close()


@pytest.mark.mpi
@pytest.mark.parametrize("autocast", ["none", "bf16"])
def test_evaluation_and_autocast(world, build, autocast):
    if world.size != 2:
        pytest.skip("two stages")
    job = build("Passing", 2, module="called_models", cuts=["encoder.2"], micro_batches=5, autocast=autocast)
    before = job.engine.evaluate(job.split_batches("train"), job.task.measure)
    assert before["loss"][1] > 0
    has_bits_of_one_process(world, job, "Passing")


@pytest.mark.mpi
@pytest.mark.parametrize("looks", [False, True])
def test_a_cut_through_a_loop_is_refused_with_the_number(world, build, looks):
    """By operators and by calls; all turns of the loop in one stage are fine."""
    if world.size != 2:
        pytest.skip("two stages")
    settings = {"module": "called_models", "arguments": {"looks": looks}, "micro_batches": 3}
    text = "cell.1 is called 3 times in one forward, and cell.0, which is called before it, is called again"
    with pytest.raises(ConfigError, match=text):
        build("Looped", 2, cuts=["cell.1"], **settings)
    for cut in ("cell", "last"):
        job = build("Looped", 2, cuts=[cut], **settings)
        assert isinstance(job.pipeline.cut, Calls) == looks
        has_bits_of_one_process(world, job, "Looped")


WAYS = {
    "branch": "a branch that hangs on a value",
    "type": "asks for the type of a value",
    "size": "asks for the length of a value",
    "draw": "draws random numbers that hang on no tensor",
    "count": "changes count",
    "kept": "changes kept",
    "buffer": "changes steps",
    "autocast": "switches autocast",
    "hook": "there is a hook on the model",
}


@pytest.mark.mpi
@pytest.mark.parametrize("way", WAYS)
def test_what_can_not_be_followed_is_refused_in_words(world, build, way):
    if world.size != 2:
        pytest.skip("two stages")
    with pytest.raises(ConfigError) as raised:
        build("Unfollowed", 2, module="called_models", cuts=["last"], arguments={"way": way})
    assert re.search(WAYS[way], str(raised.value)), raised.value


SAID = {
    "mode": "changes aside before it is called",
    "frozen": "changes inner.one before it is called",
    "read": "reads inner.calls, which a module that it calls changes",
    "early": "it reads inner.calls, as the constructor left it, before that module is called",
    "parameters": "computes with inner.one.weight, not by its name",
    "moving": "computes with inner.one.weight, not by its name",
    "generator": "does something else each time",
    "swallowed": "asks for the length of a value",
    "dtype": "asks for .dtype of a value and compares it unseen",
    "key": "takes a value as a key",
    "tensor": "asks for the type of a value",
    "noted": "sets .scale of a value",
    "data": "takes .data of a value",
    "hooks": "switches autocast, inference mode or hooks on saved tensors",
    "reentrant": "set use_reentrant=False",
    "none": "silent gives None",
}


@pytest.mark.mpi
@pytest.mark.parametrize("way", SAID)
def test_what_would_be_done_once_is_refused(world, build, way):
    """At the cut, or in the first forward where only that shows it."""
    if world.size != 2:
        pytest.skip("two stages")
    with pytest.raises(ConfigError) as raised:
        job = build("Unsaid", 2, module="called_models", cuts=["last"], arguments={"way": way})
        job.engine.step(0, job.loader.read(0), 0.0)
    assert SAID[way] in str(raised.value)


@pytest.mark.mpi
@pytest.mark.parametrize("way", ["namedtuple", "dataclass", "numbers"])
def test_parts_of_objects_and_numbers_cross(world, build, way):
    """And tensors that the forward makes of sizes, one of which it changes: each forward has its own."""
    if world.size != 2:
        pytest.skip("two stages")
    arguments = {"way": way}
    job = build("Reporting", 2, module="called_models", cuts=["inner"], micro_batches=5, arguments=arguments)
    has_bits_of_one_process(world, job, "Reporting")


@pytest.mark.mpi
def test_what_a_module_gives_back_crosses_once(world, build):
    if world.size != 2:
        pytest.skip("two stages")
    job = build("Returning", 2, module="called_models", cuts=["inner"], micro_batches=5)
    has_bits_of_one_process(world, job, "Returning")


PARTED = ("parts", "set", "stores", "shape", "names", "relu", "slice")


def skipping(build, world, way, **settings):
    """Its parts on a rank each, or two a rank."""
    settings = {"micro_batches": 5, "cuts": ["b", "c", "d"], "arguments": {"way": way}, **settings}
    if world.size == 2:
        settings |= {"schedule": "interleaved", "micro_batches": 4}
    return build("Skipping", world.size, module="called_models", **settings)


@pytest.mark.mpi
@pytest.mark.parametrize("way", ["straight", "identity", "view", "inplace", "tree", "apart", *PARTED])
def test_a_skip_goes_straight_to_who_uses_it(world, build, way):
    """The bits of one process, whoever uses it, under two names, changed in place on its way, or in a tree."""
    if world.size not in (2, 4):
        pytest.skip("four stages on two or four ranks")
    job = skipping(build, world, way)
    cut = job.pipeline.cut
    assert isinstance(cut, Calls)
    assert cut.stages == 4
    goes = {stage: cut.part(stage, 4, True).gives for stage in range(4)}
    expected = {
        "straight": {1: ["a"], 3: ["tanh"]},
        "apart": {1: ["a"], 2: ["tanh"]},
    }
    if way in expected:
        assert goes[0] == expected[way]
    if way == "apart":
        assert goes[1] == {2: [], 3: ["b"]}
        assert cut.part(2, 4, True).needs == {0: ["tanh"], 1: []}
    if way == "identity":  # one tensor under two names
        assert goes[1] == {2: ["a", "same", "b"]}
    has_bits_of_one_process(world, job, "Skipping")
    for settings in ({"schedule": "zb-h1"}, {"recompute": "always"}) if way in ("inplace", "names") else ():
        has_bits_of_one_process(world, skipping(build, world, way, **settings), "Skipping")


@pytest.mark.mpi
@pytest.mark.parametrize("recompute", ["never", "always"])
@pytest.mark.parametrize("way", ["given", "once", "changed", "buffer", "anew"])
def test_one_tensor_that_goes_two_ways_is_refused_where_bits_would_differ(world, build, way, recompute):
    """One process would see the change of a view, or add gradients in another order."""
    if world.size not in (2, 4):
        pytest.skip("four stages on two or four ranks")
    job = skipping(build, world, way, recompute=recompute)
    one = "are one tensor, which goes to stage 1 by the one name and to stage "
    lay = "other tensors lay in one memory with it"
    text = {"given": one + "2", "once": one + "3", "changed": lay, "buffer": lay, "anew": "take it behind"}[
        way
    ]
    with pytest.raises(ConfigError, match=text):
        job.engine.step(0, job.loader.read(0), 0.0)


@pytest.mark.mpi
def test_without_cuts_the_error_says_to_name_them(world, build):
    if world.size != 2:
        pytest.skip("two stages")
    with pytest.raises(ConfigError, match="name by parallel.cuts the modules where stages are to begin"):
        build("Passing", 2, module="called_models")


@pytest.mark.mpi
def test_a_failure_names_the_call(world, build, monkeypatch):
    if world.size != 2:
        pytest.skip("two stages")
    import called_models

    job = build("Passing", 2, module="called_models", cuts=["encoder.2"], micro_batches=4)

    def fail(*_):
        raise ValueError("on purpose")

    monkeypatch.setattr(called_models.Choosing, "forward", fail)
    with pytest.raises(
        Exception, match=r"(?s)on purpose.*in layer encoder.0 \(Choosing\), given float32 \(\d, 32\)"
    ):
        job.engine.step(0, job.loader.read(0), 0.0)
