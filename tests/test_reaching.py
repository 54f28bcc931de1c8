"""Code of the user's that reaches past its stage: settings, gradients of others' values, what a backward reads."""

import pytest
from jobs import evaluates_as_one_process, has_bits_of_one_process, run
from torch import nn

from hpctrain.errors import ConfigError
from hpctrain.modes import settings_kept


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("gradients", r"whether gradients are on \(torch.set_grad_enabled\) set to False \(it was True\)"),
        ("dtype", r"torch's default dtype set to torch.float64 \(it was torch.float32\)"),
        ("autocast", r"whether autocast is on \(of cpu\) set to True \(it was False\)"),
    ],
)
def test_what_a_layer_sets_for_all_that_follows_is_refused_over_a_cut(world, build, what, said):
    if world.size != 2:
        pytest.skip("two stages")
    arguments = {"what": what}
    with settings_kept():
        job = build("setting_row", 2, micro_batches=4, cuts=["3"], arguments=arguments)
        with pytest.raises(ConfigError, match=f"the forward of stage 0 leaves {said}, which layers of other"):
            run(job, 1)
    job = build("setting_row", 2, micro_batches=4, cuts=["5"], arguments=arguments)
    has_bits_of_one_process(world, job, "setting_row")


@pytest.mark.mpi
@pytest.mark.parametrize("cut", ["2", "3", "4"])
def test_gradients_of_what_another_stage_has_a_part_of_are_refused(world, build, cut):
    """As forces of an energy: in stages what goes through the other one would be missing."""
    if world.size != 2:
        pytest.skip("two stages")
    job = build("forces_row", 2, micro_batches=4, cuts=[cut])
    for ask in (
        lambda: run(job, 1),
        lambda: job.engine.evaluate(job.split_batches("train"), job.task.measure),
    ):
        with pytest.raises(
            ConfigError, match="a layer of stage 1 takes a gradient .* by what hangs on other"
        ):
            ask()


@pytest.mark.mpi
def test_gradients_of_what_another_stage_gave_may_be_taken(world, build):
    """Where one stage has all that is derived, in evaluation, too."""
    if world.size != 2:
        pytest.skip("two stages")
    for cut, alone in (("1", False), ("3", True)):
        arguments = {"alone": alone}
        job = build("forces_row", 2, micro_batches=4, cuts=[cut], arguments=arguments)
        has_bits_of_one_process(world, job, "forces_row")
        evaluates_as_one_process(job)


@pytest.mark.mpi
@pytest.mark.parametrize("way", ["attribute", "list", "buffer", "hooks", "removes"])
def test_what_a_forward_keeps_for_its_backward_must_not_be_overwritten(world, build, way):
    """In stages the next micro-batch's forward comes before; on the last stage, by 1f1b, it does not."""
    if world.size != 2:
        pytest.skip("two stages")
    settings = {"micro_batches": 4, "schedule": "1f1b", "arguments": {"way": way}}
    said = "the backward of micro-batch 0 reads 1.kept, which the forward of micro-batch 1 has set meanwhile"
    with pytest.raises(ConfigError, match=said):
        run(build("keeping_row", 2, cuts=["3"], **settings), 1)
    assert nn.Module.__getattribute__ is object.__getattribute__
    has_bits_of_one_process(world, build("keeping_row", 2, cuts=["1"], **settings), "keeping_row")
    for other in ("logs", "counts", "table", "shape", "again"):  # nothing hangs on what another has set
        arguments = {"way": other}
        job = build("keeping_row", 2, cuts=["3"], micro_batches=4, schedule="1f1b", arguments=arguments)
        has_bits_of_one_process(world, job, "keeping_row")


@pytest.mark.mpi
@pytest.mark.parametrize("cuts", [["2"], ["4"]])
@pytest.mark.parametrize("way", ["first", "sum", "names", "call", "function"])
def test_what_another_stage_owns_is_a_parameter_to_the_users_code(world, build, way, cuts):
    """A layer that stands on both stages lists its parameters, which one of them has as copies."""
    if world.size != 2:
        pytest.skip("two stages")
    job = build("listing_row", 2, micro_batches=4, cuts=cuts, invariant=True, arguments={"way": way})
    has_bits_of_one_process(world, job, "listing_row")
    owned = [
        name
        for share in world.allgather([n for n, _ in job.engine.module.named_parameters()])
        for name in share
    ]
    assert len(owned) == len(set(owned)), "behind the passes each has one owner"
