"""The sbatch script on a real Slurm: one world of 4 ranks on 2 nodes trains, resumes, stops in time.

Exit codes of mpirun and srun prove nothing; the "end" row that the program writes does.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("slurm.sh")
sys.path.insert(0, str(ROOT / "tests"))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A Slurm of two nodes; gives a function that runs a command in its environment."""
    folder = tmp_path_factory.mktemp("slurm")
    environment = {**os.environ, "SLURM_TEST_DIR": str(folder)}
    subprocess.run([SCRIPT, "up", "2", "4"], env=environment, check=True, timeout=400)
    for line in (folder / "env.sh").read_text().splitlines():
        for name, value in re.findall(r"(\w+)=(\S+)", line):
            environment[name] = value
    environment["VIRTUAL_ENV"] = sys.prefix

    def run(*command, cwd, **more):
        words = [str(word) for word in command]
        done = subprocess.run(
            words,
            cwd=cwd,
            env={**environment, **more},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
        return done.stdout

    yield run
    subprocess.run([SCRIPT, "down"], env=environment, check=True, timeout=60)


@pytest.fixture
def project(tmp_path):
    """A user's folder: their own TOML, model and data."""
    from helpers import write_samples

    write_samples(tmp_path, 61)
    shutil.copy(ROOT / "tests" / "helpers.py", tmp_path)
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    (tmp_path / "small.toml").write_text(
        '[data]\nfiles = "part*.h5"\ninputs = "x"\ntargets = "y"\ntest = 0.2\n'
        '[model]\nclass_path = "helpers.Slow"\n[train]\nbatch = 8\nsteps = 12\n'
        "[report]\npictures = false\n"
    )
    return tmp_path


def submit(run, project, *words, **environment):
    out = run("sbatch", "--parsable", *words, cwd=project, **environment)
    return out.strip().split(";")[0]


def state_of(run, project, job):
    text = run("scontrol", "show", "job", job, cwd=project)
    return re.search(r"JobState=(\w+)", text).group(1), re.search(r"ExitCode=(\d+):", text).group(1)


def wait_for_end(run, project, job, limit=180):
    end = time.monotonic() + limit
    while True:
        state, code = state_of(run, project, job)
        if state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
            return state, int(code), log(project, job)
        assert time.monotonic() < end, f"job {job} is {state} after {limit} s\n{log(project, job)}"
        time.sleep(0.5)


def log(project, job):
    path = project / f"hpctrain-{job}.log"
    return path.read_text() if path.is_file() else ""


def rows(run_folder):
    from hpctrain.report.run_folder import rows as read

    return read(run_folder / "metrics.jsonl")


def test_one_world_of_four_ranks_on_two_nodes(slurm, project):
    job = submit(slurm, project, "slurm/train.sbatch", "small.toml")
    state, _, text = wait_for_end(slurm, project, job)
    found = rows(project / "runs" / "small")
    assert found, text
    start, end = found[0], found[-1]
    assert (start["world_size"], start["nodes"], start["replicas"]) == (4, 2, 4), text
    assert (end["event"], end["status"], end["step"]) == ("end", "done", 12), text
    assert sum(row["event"] == "start" for row in found) == 1
    assert state == "COMPLETED", text
    assert "srun --mpi=pmix" in text, text
    again = submit(slurm, project, "slurm/train.sbatch", "small.toml", "--train.steps", "16")
    _, _, text = wait_for_end(slurm, project, again)
    assert "from step 12" in text, text
    assert rows(project / "runs" / "small")[-1]["step"] == 16


def test_mpirun_where_slurm_has_no_pmix(slurm, project):
    """The script's other way: an srun that does not list pmix."""
    (project / "bin").mkdir()
    real = shutil.which("srun")
    (project / "bin" / "srun").write_text(
        f'#!/bin/sh\ncase "$*" in *--mpi=list*) echo "none cray_shasta pmi2";; *) exec {real} "$@";; esac\n'
    )
    (project / "bin" / "srun").chmod(0o755)
    script = (project / "slurm/train.sbatch").read_text()
    script = script.replace("export PATH\n", f'PATH="{project}/bin:$PATH"\nexport PATH\n', 1)
    (project / "slurm/train.sbatch").write_text(script)
    job = submit(slurm, project, "slurm/train.sbatch", "small.toml")
    _, _, text = wait_for_end(slurm, project, job)
    found = rows(project / "runs" / "small")
    assert found, text
    assert ": mpirun --bind-to none --map-by ppr:2:node," in text, text
    assert (found[0]["world_size"], found[0]["nodes"]) == (4, 2), text
    assert (found[-1]["event"], found[-1]["status"]) == ("end", "done"), text


@pytest.mark.parametrize("how", ["none", "pmi2"])
def test_singletons_are_refused_once_and_train_nothing(slurm, project, how):
    script = f"#!/bin/bash\nsrun --mpi={how} {sys.executable} -m hpctrain train small.toml\n"
    (project / "wrong.sbatch").write_text(script)
    words = ("--nodes=2", "--ntasks-per-node=2", "--output=hpctrain-%j.log", "wrong.sbatch")
    state, code, text = wait_for_end(slurm, project, submit(slurm, project, *words))
    assert text.count("started 4 processes, but MPI sees each as a world of 1 rank") == 1, text
    assert (state, code) == ("FAILED", 2), text
    assert not (project / "runs").exists()


def test_a_signal_ahead_of_the_limit_writes_a_checkpoint(slurm, project):
    job = submit(slurm, project, "slurm/train.sbatch", "small.toml", "--train.steps", "4000", SLOW="0.05")
    end = time.monotonic() + 120
    folder = project / "runs" / "small"
    while sum(row["event"] == "train" for row in rows(folder)) < 3:
        assert time.monotonic() < end, log(project, job)
        time.sleep(0.3)
    slurm("scancel", "--batch", "--signal=USR1", job, cwd=project)
    _, code, text = wait_for_end(slurm, project, job)
    last = rows(folder)[-1]
    assert (last["event"], last["status"]) == ("end", "stopped"), text
    assert code in (75, 0, 1), text
    again = submit(slurm, project, "slurm/train.sbatch", "small.toml", "--train.steps", "4000", SLOW="0")
    _, _, text = wait_for_end(slurm, project, again)
    assert f"from step {last['step']}" in text, text
    assert rows(folder)[-1]["status"] == "done", text


def test_without_hpctrain_the_script_says_so(slurm, project):
    bare = {"VIRTUAL_ENV": "/nowhere", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    job = submit(slurm, project, "slurm/train.sbatch", **bare)
    state, code, text = wait_for_end(slurm, project, job)
    assert (state, code) == ("FAILED", 2), text
    assert "has no hpctrain: activate its environment before sbatch" in text, text
