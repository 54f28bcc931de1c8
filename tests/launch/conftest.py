"""These tests start mpirun themselves, as a user would; each has a time limit of its own."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))
LIMIT = 150


@dataclass
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def text(self):
        return self.out + self.err


class Launcher:
    """Starts commands in their own process group and kills only that group."""

    def __init__(self, folder):
        self.folder = folder
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
            "PRTE_MCA_hwloc_default_binding_policy": "none",
            "OMPI_MCA_mpi_yield_when_idle": "1",
            # what a killed rank can't remove stays in the test's folder, not in /dev/shm
            "OMPI_MCA_btl_sm_backing_directory": str(folder),
        }
        self.environment.pop("OMP_NUM_THREADS", None)

    def start(self, *command, **environment):
        return subprocess.Popen(
            [str(word) for word in command],
            cwd=self.folder,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self, process, limit=LIMIT):
        try:
            out, err = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            pytest.fail(f"over {limit} s: {process.args}\n{out}\n{err}")
        return Ended(process.returncode, out, err)

    def run(self, *command, limit=LIMIT, **environment):
        return self.finish(self.start(*command, **environment), limit)

    def ranks(self, count, *words, limit=LIMIT, **environment):
        """`mpirun -n COUNT python -m hpctrain WORDS`."""
        return self.run(*self.command(count, *words), limit=limit, **environment)

    def kill(self, process):
        """SIGKILL mpirun and its ranks: those that outlive it work in this test's own folder."""
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        for entry in Path("/proc").iterdir():
            try:
                mine = entry.name.isdigit() and os.readlink(entry / "cwd") == str(self.folder)
            except OSError:
                continue
            if mine and int(entry.name) != os.getpid():
                os.kill(int(entry.name), signal.SIGKILL)
        time.sleep(0.5)

    @staticmethod
    def command(count, *words):
        return "mpirun", "-n", count, sys.executable, "-m", "hpctrain", *words


@pytest.fixture
def launcher(tmp_path):
    return Launcher(tmp_path)


@pytest.fixture
def small(tmp_path):
    """A TOML of a run of seconds on made-up samples in two files."""
    from helpers import write_samples

    write_samples(tmp_path, 61)
    path = tmp_path / "small.toml"
    path.write_text(
        """
[data]
files = "part*.h5"
inputs = "x"
targets = "y"
test = 0.2
normalize = true

[model]
class_path = "helpers.Dropping"

[optimizer.init_args]
lr = 0.01

[train]
batch = 8
steps = 20

[report]
pictures = false
"""
    )
    return path


def rows(run):
    """The rows of a run, later ones in the place of earlier ones."""
    from hpctrain.report.run_folder import rows as read

    return read(Path(run) / "metrics.jsonl")


def losses(run):
    """{step: loss} of the "train" rows."""
    return {row["step"]: row["loss"] for row in rows(run) if row["event"] == "train"}


def wait_for(condition, process, limit=90):
    """Wait for a condition while a process runs."""
    end = time.monotonic() + limit
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
