"""The commands and files that the documentation shows are run as they stand there."""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)?(?: file=(\S+))?\n(.*?)```", README, re.S)
SHOWN = [
    line[2:]
    for kind, _, text in BLOCKS
    if kind == "console"
    for line in text.splitlines()
    if line.startswith("$ ")
]
TRAIN, VERIFY, PREDICT, *REST = SHOWN


@pytest.fixture
def folder(launcher, tmp_path):
    """A user's folder with the README's files and data that fit them."""
    for _, name, text in BLOCKS:
        if name:
            (tmp_path / name).write_text(text)
    random = np.random.default_rng(0)
    for part in range(3):
        with h5py.File(tmp_path / f"fields{part}.h5", "w") as file:
            t2m, wind = random.normal(280, 10, size=(40, 6)), random.normal(5, 3, size=(40, 6))
            file["surface/t2m"], file["surface/wind"] = t2m, wind
            file["rain"] = (t2m[:, :2] - 280) * wind[:, 2:4] / 30
    launcher.environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    launcher.environment["PYTHONPATH"] = ""
    return tmp_path


def test_the_readme_counts_right():
    toml = next(text for _, name, text in BLOCKS if name == "my.toml")
    model = next(text for _, name, text in BLOCKS if name == "my_model.py")
    assert len(toml.strip().splitlines()) == 8
    assert len([line for line in model.splitlines() if line.strip()]) <= 12


def test_the_commands_of_your_own_data_and_model(launcher, folder):
    assert len(REST) == 14
    outputs = {}
    for command in REST:
        ended = launcher.run(*shlex.split(command))
        assert ended.status == 0, f"{command}\n{ended.text}"
        outputs[command] = ended.out
    assert "equal: 3 steps of 4 replicas" in outputs["mpirun -n 4 hpctrain verify my.toml"]
    assert (
        "equal: 3 steps of 2 replicas x 2 stages"
        in outputs["mpirun -n 4 hpctrain verify my.toml --parallel.stages 2"]
    )
    assert "from step 9" in outputs["mpirun -n 4 hpctrain train my.toml --train.epochs 5"]
    with h5py.File(folder / "rain.h5") as file:
        assert file["rain"].shape == (24, 2)
    assert (folder / "my.safetensors").is_file()


def test_the_stages_of_your_own_model(launcher, folder):
    """The first section of docs/pipeline.md, from data to weights."""
    guide = (ROOT / "docs" / "pipeline.md").read_text().split("\n## ")[1]
    for name, text in re.findall(r"```\w+ file=(\S+)\n(.*?)```", guide, re.S):
        (folder / name).write_text(text)
    commands = [line[2:] for line in guide.splitlines() if line.startswith("$ ")]
    assert len(commands) == 8
    said = []
    for command in commands:
        ended = launcher.run(*shlex.split(command))
        assert ended.status == 0, f"{command}\n{ended.text}"
        said.append(ended.text)
    assert "nothing was trained or written" in said[1]
    assert "equal: 3 steps of 1 replica x 2 stages against 1 x 1" in said[2]
    assert "2 replicas x 2 stages" in said[4]
    assert "2 replicas x 1 stage" in said[5]
    log = (folder / "runs" / "unet" / "log.txt").read_text()
    assert log.count("expected of each stage") == 2, "said before there was a run folder"
    with h5py.File(folder / "clean.h5") as file:
        assert file["clean"].shape == (40, 1, 32, 32)
    assert (folder / "unet.safetensors").is_file()


def test_the_first_screen(launcher, folder):
    """make train in the checkout, shortened and into another folder; then the other two as shown."""
    run = folder / "runs" / "climate-1"
    make = launcher.run(
        "make", "-C", ROOT, "--no-print-directory", "train", f"ARGS=--train.steps 4 --train.run_folder {run}"
    )
    assert make.status == 0, make.text
    assert f"run folder {run}" in make.out
    assert "pictures: curves.png, maps.png" in make.out
    assert TRAIN == "make train"
    verify = launcher.run(*shlex.split(VERIFY))
    assert verify.status == 0, verify.text
    shown = next(text for kind, _, text in BLOCKS if kind == "console" and VERIFY in text)
    assert verify.out.strip() in shown
    predict = launcher.run(*shlex.split(PREDICT))
    assert predict.status == 0, predict.text
    shown = next(text for kind, _, text in BLOCKS if kind == "console" and PREDICT in text)
    assert predict.out.strip().replace("step 4", "step 380") in shown


def test_the_figure_and_the_links_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for command in re.findall(r"`(?:mpirun -n \d )?python -m pytest ([\w/.]+)", README):
        assert (ROOT / command).exists()


def test_the_promises_name_tests_that_exist(launcher):
    for words in re.findall(r'python -m pytest tests/launch -k "([^"]+)"', README):
        found = launcher.run(
            sys.executable, "-m", "pytest", ROOT / "tests/launch", "-k", words, "--collect-only",
            "--override-ini", "addopts=-q", "-c", ROOT / "pyproject.toml",
        )  # fmt: skip
        for word in words.split(" or "):
            assert word in found.out, (word, found.text)


def test_make_targets_call_what_a_user_can_type(launcher):
    assert shutil.which("make")
    shown = launcher.run("make", "-C", ROOT, "-n", "train")
    assert "mpirun -n 4 python -m hpctrain train --train.run_folder 'runs/climate-#'" in shown.out
