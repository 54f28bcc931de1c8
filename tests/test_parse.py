import tomllib

import pytest
import tomlkit

from hpctrain import parse
from hpctrain.config import Config, differences, flatten, names_to_paths, to_dict
from hpctrain.errors import ConfigError

TOML = """
[data]
files = ["a.h5", "/elsewhere/b.h5"]
inputs = {field = "group/x"}
targets = "y"
train = ["1950", "1999"]
test = 0.25

[model]
class_path = "helpers.Net"
init_args = {width = 4}

[train]
run_folder = "out"
"""


def read(tmp_path, *overrides, text=TOML):
    (tmp_path / "my.toml").write_text(text)
    return parse.from_toml(tmp_path / "my.toml", overrides)


def test_paths_are_relative_to_the_toml_or_to_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    config = read(tmp_path)
    assert config.data.files == [str(tmp_path / "a.h5"), "/elsewhere/b.h5"]
    assert config.train.run_folder == str(tmp_path / "out")
    config = read(tmp_path, "--data.files", "c*.h5", "--train.run_folder", "here")
    assert config.data.files == str(tmp_path / "sub" / "c*.h5")
    assert config.train.run_folder == str(tmp_path / "sub" / "here")


def test_values_of_all_kinds(tmp_path):
    config = read(
        tmp_path,
        "--train.steps", "12", "--train.batch=4", "--model.init_args.width", "9", "--model.init_args.name", "deep",
        "--data.inputs", '["x", "z"]', "--data.test", '["2000", "2014"]', "--parallel.micro_batches", "6",
        "--data.normalize", "true", "--train.loss.class_path", "torch.nn.L1Loss", "--optimizer.init_args.lr", "3e-4",
    )  # fmt: skip
    assert (config.train.steps, config.train.batch) == (12, 4)
    assert config.model.init_args == {"width": 9, "name": "deep"}
    assert config.data.inputs == ["x", "z"]
    assert config.data.test == ["2000", "2014"]
    assert config.data.train == ["1950", "1999"]
    assert config.parallel.micro_batches == 6
    assert config.data.normalize is True
    assert config.train.loss.class_path == "torch.nn.L1Loss"
    assert config.optimizer.init_args == {"lr": 3e-4}


def test_tables_on_the_command_line(tmp_path):
    for words in (["--data.inputs", '{x = "a/b", y = "c"}'], ['--data.inputs={x = "a/b", y = "c"}']):
        assert read(tmp_path, *words).data.inputs == {"x": "a/b", "y": "c"}
    assert read(tmp_path, "--model.init_args", "{width = 7}").model.init_args == {"width": 7}
    with pytest.raises(ConfigError, match=r"--data.inputs \{x = \} is no TOML table"):
        read(tmp_path, "--data.inputs", "{x = }")


def test_the_resolved_configuration_reads_back_the_same(tmp_path):
    config = read(tmp_path, "--train.steps", "3")
    (tmp_path / "again.toml").write_text(tomlkit.dumps(to_dict(config)))
    assert parse.from_toml(tmp_path / "again.toml") == config


def test_defaults_are_the_dataclasses(tmp_path):
    (tmp_path / "empty.toml").write_text("")
    assert parse.from_toml(tmp_path / "empty.toml") == Config()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--train.stpes", "3"], r"unknown option --train.stpes: did you mean train.steps"),
        (["--steps", "3"], r"unknown option --steps: did you mean train.steps\?"),
        (["--train.steps", "many"], r"train.steps: .*Expected a int.*Given value: many"),
        (["--train.batch", "0"], "train.batch = 0: at least 1 was expected"),
        (["--train.steps", "-1"], "train.steps = -1: at least 0 was expected"),
        (["--train.clip", "nan"], "train.clip: Expected a float. Got value: nan"),
        (["--parallel.stages", "0"], "parallel.stages = 0: at least 1"),
        (["--data.missing", "ignore"], r"^the command line: data.missing: Expected one of 'error', 'mask'\."),
        (["--averaging.wire", "bf8"], r"averaging.wire: Expected one of 'exact', 'bf16'\. Got value: bf8"),
        (["--train.batch"], "expected one argument"),
    ],
)
def test_wrong_options(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, *overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[trian]\nsteps = 3", r"my.toml: unknown key trian: "),
        ("[train]\nstep = 3", r"my.toml: unknown key train.step: did you mean train.steps"),
        ("train = 3", "my.toml: train is a section, 3 was found"),
        ('train.loss = "torch.nn.L1Loss"', """: write train.loss = {class_path = "torch.nn.L1Loss"}"""),
        ("[train]\nsteps = = 3", r"my.toml is not TOML: .*line 2"),
        ("[train]\nbatch = 'x'", r"my.toml: train.batch: .*Expected a int"),
        ("[optimizer.scedule]\nx = 1", r"unknown key optimizer.scedule: did you mean .*optimizer.schedule"),
    ],
)
def test_wrong_tomls(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text=text)


def test_no_file():
    with pytest.raises(ConfigError, match=r"nothing.toml can't be read"):
        parse.read_toml(__import__("pathlib").Path("nothing.toml"))


def test_help_has_every_key_with_its_docstring():
    text = parse.parser(prog="hpctrain").format_help()
    for key in flatten(Config()):
        assert f"--{key}" in text
    assert "Optimizer steps in all; wins over epochs." in " ".join(text.split())


def test_differences_name_what_matters(tmp_path):
    before = read(tmp_path)
    free = read(tmp_path, "--train.run_folder", "x", "--report.log_seconds", "1", "--data.files", "q.h5",
                "--train.epochs", "20", "--train.steps", "9")  # fmt: skip
    assert differences(before, free) == []
    other = read(tmp_path, "--train.epochs", "5", "--optimizer.init_args.lr", "1")
    assert differences(before, other) == [
        "optimizer.init_args: the run has {'lr': 0.001}, asked is {'lr': 1}",
        "train.epochs: the run has 10, asked is 5",
    ]


def test_names():
    assert names_to_paths({"a": "b/c"}) == {"a": "b/c"}
    assert names_to_paths("g/x") == {"x": "g/x"}


def test_recipes_parse():
    from hpctrain.config_file import RECIPES, recipes

    assert recipes() == ["climate", "digits", "language"]
    for name in recipes():
        tomllib.loads((RECIPES / f"{name}.toml").read_text())
        parse.from_toml(RECIPES / f"{name}.toml")


def test_folders_whose_names_look_like_patterns(tmp_path):
    folder = tmp_path / "d [1] é"
    folder.mkdir()
    (folder / "a1.h5").write_text("")
    (folder / "my.toml").write_text("\ufeff[data]\nfiles = 'a*.h5'\n")
    from hpctrain.data.index import find_files

    assert find_files(parse.from_toml(folder / "my.toml").data.files) == [str(folder / "a1.h5")]
