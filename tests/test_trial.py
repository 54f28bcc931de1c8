"""A forward that is tried leaves no tensors without numbers behind, and what it imports has some."""

import sys

import odd_models
import pytest
import torch
from jobs import evaluates_as_one_process, has_bits_of_one_process
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from hpctrain.pipeline.trial import imports_apart, trial


def forget():
    """As when the file was imported."""
    sys.modules.pop("late_tables", None)
    odd_models.TABLES.clear()
    odd_models.TABLES.update(real=torch.ones(8))
    vars(odd_models.KEEPER).clear()
    vars(odd_models.table).clear()
    odd_models.Tables.made = None


@pytest.fixture(autouse=True)
def fresh():
    forget()
    yield
    forget()


def kept():
    """What stands now where the forward keeps something."""
    tables, late = odd_models.TABLES, sys.modules.get("late_tables")
    yield from (tables["real"], tables.get("added"), tables.get("inner"), odd_models.Tables.made)
    yield from (vars(odd_models.table).get("made"), vars(odd_models.KEEPER).get("kept"))
    yield from () if late is None else (late.TABLE, late.PAIR.a)


def without_numbers(value):
    return isinstance(value, FakeTensor)


def test_what_a_trial_keeps_goes_and_what_was_there_is_put_back():
    model = odd_models.Tables()
    own = odd_models.TABLES["real"]
    odd_models.TABLES["list"] = [own]
    with trial(model):
        with FakeTensorMode(allow_non_fake_inputs=True):
            odd_models.TABLES["real"] = torch.zeros(8)
            odd_models.TABLES["list"] += [torch.zeros(8), own]
            odd_models.TABLES["number"] = 3
            odd_models.Branch.made = torch.zeros(8)
            model(torch.zeros(2, 8))
        assert any(map(without_numbers, kept()))
    found = [*kept()]
    assert found[0] is own
    assert [table is own for table in odd_models.TABLES["list"]] == [True, True]
    assert odd_models.TABLES["number"] == 3
    assert not hasattr(odd_models.Branch, "made")
    assert found[1:6] == [None, {"list": []}, None, None, None]
    assert [type(table) for table in found[6:]] == [torch.Tensor, torch.Tensor]
    assert torch.equal(found[6], torch.linspace(0.5, 1.5, 8))


def test_imports_in_a_forward_have_numbers():
    with FakeTensorMode(), imports_apart():
        import late_tables

        assert not without_numbers(late_tables.TABLE)
        assert without_numbers(torch.zeros(1))


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("OfTables", {}),
        ("OfTables", {"cuts": ["inner"], "arguments": {"branch": True}}),
        ("OfTables", {"cuts": ["tables"], "arguments": {"branch": True}}),
        ("ListedTables", {"cuts": ["inner"]}),
        ("NamedLikeAMethod", {"cuts": ["last"]}),
    ],
)
def test_tables_that_a_forward_keeps_outside_have_the_bits_of_one_process(
    world, build, caplog, model, settings
):
    if world.size != 2:
        pytest.skip("two stages")
    job = build(model, 2, module="odd_models", micro_batches=4, **settings)
    assert not any(map(without_numbers, kept()))
    has_bits_of_one_process(world, job, model)
    evaluates_as_one_process(job)
    assert not [line for line in caplog.messages if "whether both do the same can't be told" in line]
