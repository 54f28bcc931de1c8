from dataclasses import dataclass
from functools import partial

import pytest
import torch

from hpctrain import construct
from hpctrain.config import ClassPath
from hpctrain.errors import ConfigError


class Model:
    def __init__(self, width: int, name: str = "a", rate: float = 0.1, untyped=None):
        self.width = width


class Open(Model):
    def __init__(self, depth: int = 1, **kwargs):
        super().__init__(**kwargs)


class Exploding:
    def __init__(self, width: int = 2):
        raise RuntimeError(f"width {width} is not to my taste")


@dataclass
class Adds:
    """Can't be hashed."""

    more: int

    def __call__(self, size: int) -> int:
        return size + self.more


UNHASHABLE, PARTIAL = Adds(1), partial(Adds(2).__call__)


def check(path, given=(), filled=None, **arguments):
    return construct.check(ClassPath(path, arguments), "model", given, **(filled or {}))


def test_arguments_pass_and_shapes_are_filled_in():
    assert check("test_construct.Model", width=3) == {"width": 3}
    assert check("test_construct.Model", filled={"width": 5, "other": 1}) == {"width": 5}
    assert check("test_construct.Model", filled={"width": 5}, width=6) == {"width": 6}
    assert check("test_construct.Open", width=3, depth=2) == {"width": 3, "depth": 2}
    assert check("torch.nn.Linear", in_features=2, out_features=3) == {"in_features": 2, "out_features": 3}


@pytest.mark.parametrize(
    ("path", "arguments", "message"),
    [
        ("Model", {}, "a module and a class were expected, such as my_module.MyModel"),
        ("CrossEntropyLoss", {}, r"a class were expected: did you mean torch.nn.CrossEntropyLoss\?"),
        ("StepLR", {}, r"did you mean torch.optim.lr_scheduler.StepLR\?"),
        (
            "no_such.Model",
            {},
            "there is no module no_such; a file of your own must lie in the current folder",
        ),
        ("test_construct.Modle", {}, "test_construct has no Modle: did you mean Model"),
        ("test_construct.__name__", {}, "is a str, a class was expected"),
        (
            "test_construct.Model",
            {"widht": 3},
            r"model.init_args.widht: .* has no such argument: did you mean width\?",
        ),
        ("test_construct.Model", {}, r"test_construct.Model needs width: set model.init_args.width"),
        (
            "test_construct.Model",
            {"width": "wide"},
            r"model.init_args.width = 'wide' does not fit .* Expected a .*int",
        ),
        (
            "torch.nn.Linear",
            {"in_features": 2, "out_features": 2, "bias": "perhaps"},
            r"bias = 'perhaps' does not fit",
        ),
    ],
)
def test_what_is_wrong_is_said(path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        check(path, **arguments)


def test_the_programs_own_arguments_are_not_the_users():
    with pytest.raises(ConfigError, match="params: torch.optim.AdamW has no such argument"):
        check("torch.optim.AdamW", given=("params",), params=[])


def test_a_module_that_needs_another_one(tmp_path, monkeypatch):
    (tmp_path / "half_there.py").write_text("import not_installed_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="importing it needs the module not_installed_at_all"):
        check("half_there.Model")


def test_a_users_file_in_the_current_folder(tmp_path, monkeypatch):
    import sys

    (tmp_path / "of_the_user.py").write_text(
        "class Mine:\n    def __init__(self, size: int = 1): self.size = size\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    found = construct.build(ClassPath("of_the_user.Mine"), "model", size=4)
    assert found.size == 4


def test_an_error_of_the_constructor_names_it():
    with pytest.raises(
        ConfigError,
        match=r"model: test_construct.Exploding\(width=7\) failed at .*test_construct.py:\d+: `raise .*`: RuntimeError: width 7",
    ):
        construct.build(ClassPath("test_construct.Exploding"), "model", width=7)


def test_callables_of_any_kind_are_built():
    """Those that can't be hashed and have no name are built, too."""
    for name, size in (("UNHASHABLE", 4), ("PARTIAL", 5)):
        arguments = check(f"test_construct.{name}", size=3)
        assert construct.build(ClassPath(f"test_construct.{name}"), "model", **arguments) == size
    with pytest.raises(ConfigError, match="model.init_args.size = 'x' does not fit the type of Adds's"):
        check("test_construct.UNHASHABLE", size="x")


def test_a_function_in_the_place_of_a_class_is_told():
    said = r"model.class_path = '.*l1_loss' is a function of input, target.*did you mean torch.nn.L1Loss\?"
    with pytest.raises(ConfigError, match=said):
        check("torch.nn.functional.l1_loss")
    with pytest.raises(ConfigError, match="no such argument: legal are"):
        check("torch.nn.functional.l1_loss", given=("input", "target"), wrong=1)


def test_a_factory_function_will_do():
    found = construct.build(ClassPath("torch.nn.init.constant_"), "model", torch.zeros(2), val=3.0)
    assert found.tolist() == [3.0, 3.0]
