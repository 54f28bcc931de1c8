"""Training as a user starts it: what is written, what is refused."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest
from conftest import rows


def test_a_run_writes_what_others_read(launcher, small, tmp_path):
    ended = launcher.ranks(3, "train", "small.toml")
    assert ended.status == 0, ended.text
    run = tmp_path / "runs" / "small"
    assert f"run folder {run}" in ended.out
    assert "Warning" not in ended.text
    names = sorted(p.name for p in run.iterdir() if not p.name.startswith("."))
    assert names == ["checkpoints", "config.toml", "log.txt", "metrics.jsonl"]
    found = rows(run)
    assert all({"event", "step", "time"} <= row.keys() for row in found)
    start, end = found[0], found[-1]
    assert start["event"] == "start"
    assert {k: start[k] for k in ("world_size", "nodes", "replicas", "stages", "micro_batches", "resumed_step")} == {
        "world_size": 3, "nodes": 1, "replicas": 3, "stages": 1, "micro_batches": 3, "resumed_step": 0,
    }  # fmt: skip
    assert (end["event"], end["status"], end["step"]) == ("end", "done", 20)
    train = [row for row in found if row["event"] == "train"]
    assert [row["step"] for row in train] == list(range(1, 21))
    assert all(row["samples_per_second"] > 0 and row["loss"] > 0 for row in train)
    tested = [row for row in found if row["event"] == "validate"]
    assert [row["step"] for row in tested] == [7, 14, 20]
    assert all({"loss", "rmse", "split"} <= row.keys() for row in tested)
    assert [row["step"] for row in found if row["event"] == "checkpoint"] == [20]
    parts = ("read_seconds", "other_seconds", "compute_seconds", "wait_seconds", "transfer_seconds")
    assert all(
        {"min", "median", "max", "rank", "host"} == row[part].keys() for row in train for part in parts
    )
    log = (run / "log.txt").read_text()
    assert all(line.startswith("r0/3 | ") for line in log.splitlines())
    assert set(log.splitlines()) >= {line for line in ended.out.splitlines() if line.startswith("r0/3 | ")}
    assert re.search(
        r"memory of a node: weights 0\.\d+ MiB, gradients 0\.\d+ MiB, optimizer 0\.\d+ MiB, between nodes 0.0 MiB, act",
        log,
    )


def test_a_slow_rank_is_named_and_a_drifting_one_ends_the_run(launcher, small, tmp_path):
    """Rank 1 takes 0.6 s longer at each forward, more than a busy machine holds up another; with its own copy of the weights it flips a bit at step 9."""
    Path(tmp_path, "of_mine.py").write_text(
        "import time\nimport torch\nfrom mpi4py import MPI\nfrom helpers import Net\n"
        "class Slow(Net):\n    calls = 0\n    def forward(self, x):\n"
        "        if MPI.COMM_WORLD.rank == 1 and self.training:\n            time.sleep(0.6)\n"
        "            Slow.calls += 1\n            if Slow.calls == FLIP:\n"
        "                with torch.no_grad():\n"
        "                    next(self.parameters()).view(-1).view(torch.int32)[0] ^= 1\n"
        "        return super().forward(x)\n".replace("FLIP", "int(__import__('os').environ['FLIP'])")
    )
    words = ["train", "small.toml", "--model.class_path", "of_mine.Slow", "--optimizer.sharded", "false"]
    words += ["--train.steps", "12", "--checkpoint.every_steps", "6"]
    ended = launcher.ranks(3, *words, FLIP="0")
    assert ended.status == 0, ended.text
    assert re.search(r"a rank waited \d.*most often for rank 1 on ", ended.out)
    train = [row for row in rows(tmp_path / "runs" / "small") if row["event"] == "train"]
    assert sum(row["waited_for"] == 1 for row in train) >= 10
    waits = [row["wait_seconds"]["max"] for row in train if row["waited_for"] == 1]
    assert median(waits) > 0.3, waits  # in a first step another rank may be nearly as late

    ended = launcher.ranks(3, *words, "--train.run_folder", "drift", FLIP="9")
    assert ended.status == 1, ended.text
    assert "after step 12 the ranks hold different bits of model." in ended.text
    assert "ranks 1 against ranks 0, 2" in ended.text
    found = rows(tmp_path / "drift")
    assert [row["step"] for row in found if row["event"] == "checkpoint"] == [6]
    assert found[-1]["status"] == "failed"


def test_numbered_folders(launcher, small, tmp_path):
    for _ in range(2):
        assert (
            launcher.ranks(1, "train", "small.toml", "--train.run_folder", "r-#", "--train.steps", "2").status
            == 0
        )
    assert (tmp_path / "r-1/metrics.jsonl").is_file()
    assert (tmp_path / "r-2/metrics.jsonl").is_file()


@pytest.mark.parametrize("ranks", [1, 3])
def test_an_exception_on_one_rank_ends_all_with_its_traceback_once(launcher, small, tmp_path, ranks):
    Path(tmp_path, "of_mine.py").write_text(
        "from mpi4py import MPI\nfrom helpers import Net\n"
        "class Bad(Net):\n    def forward(self, x):\n"
        "        if MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1: raise KeyError('lost key')\n"
        "        return super().forward(x)\n"
    )
    began = time.monotonic()
    ended = launcher.ranks(ranks, "train", "small.toml", "--model.class_path", "of_mine.Bad")
    assert ended.status == 1
    assert ended.text.count("KeyError: 'lost key'") == 1, ended.text
    assert "at step 0, micro-batch" in ended.err
    assert "engine.py" not in ended.err  # of the user's code alone
    log = tmp_path / "runs/small/log.txt"
    assert f"(the whole traceback is in {log})" in ended.err
    assert "engine.py" in log.read_text()
    if ranks > 1:
        assert "rank 2 of 3: Traceback" in ended.err
    assert time.monotonic() - began < 60


def test_sys_exit_in_the_model_on_one_rank_ends_all(launcher, small, tmp_path):
    Path(tmp_path, "of_mine.py").write_text(
        "import sys\nfrom mpi4py import MPI\nfrom helpers import Net\n"
        "class Bad(Net):\n    def forward(self, x):\n"
        "        if MPI.COMM_WORLD.rank == 1: sys.exit(0)\n"
        "        return super().forward(x)\n"
    )
    ended = launcher.ranks(3, "train", "small.toml", "--model.class_path", "of_mine.Bad", limit=60)
    assert ended.status == 1
    assert "rank 1 of 3: sys.exit(0) was called in the model or the loss at step 0, micro-batch " in ended.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.stpes", "3"], "unknown option --train.stpes: did you mean train.steps"),
        (["train", "nothing.toml"], "CONFIG nothing.toml: no such file or recipe"),
        (["train", "climat"], "CONFIG climat: no such file or recipe: did you mean climate?"),
        (["trian"], "trian is no verb: did you mean train?"),
        (["climate"], "climate is no verb: did you mean `hpctrain train climate`?"),
        (["train", "small.toml", "--model.class_path", "helpers.Nett"], "helpers has no Nett: did you mean Net"),
        (["train", "small.toml", "--model.init_args.wdith", "3"], "model.init_args.wdith: helpers.Dropping has no such"),
        (["train", "small.toml", "--data.targets", "z"], "part0.h5: dataset z is not in the file"),
        (["train", "small.toml", "--parallel.schedule", "zbh1"], "parallel.schedule = 'zbh1': did you mean zb-h1, zb-h2?"),
        (["train", "small.toml", "--train.patience", "2"], "train.patience needs data.validation"),
        (["train", "small.toml", "--train.monitor", "rms"], "train.monitor = 'rms': legal are loss, rmse"),
        (["train", "small.toml", "--train.loss.class_path", "torch.nn.MSLoss"], "did you mean MSELoss"),
        (["train", "small.toml", "--optimizer.schedule.class_path", "torch.optim.lr_scheduler.StepLR"], "StepLR needs step_size"),
        (["train", "digits"], "no file digits.h5 here or in data/: make it with `hpctrain data make digits`"),
        (["predict", "nowhere", "--output", "p.h5"], "nowhere holds no run"),
        (["verify", "small.toml", "--steps", "none"], "--steps none: a number of steps"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_once_with_status_2(launcher, small, tmp_path, words, message):
    ended = launcher.ranks(2, *words)
    assert ended.status == 2, ended.text
    assert ended.text.count(message) == 1, ended.text
    assert "Traceback" not in ended.text
    assert not (tmp_path / "runs").exists()


def test_a_folder_of_something_else_is_left_alone(launcher, small, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    ended = launcher.ranks(2, "train", "small.toml", "--train.run_folder", "mine")
    assert ended.status == 2
    assert "is not empty and holds no run" in ended.err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("what", ["optimizer", "schedule"])
def test_an_error_of_an_optimizer_or_a_schedule_says_where(launcher, small, tmp_path, what, ranks):
    Path(tmp_path, "of_mine.py").write_text(
        "import torch\n"
        "class Bad(torch.optim.SGD):\n    calls = 0\n    def step(self, closure=None):\n"
        "        self.calls += 1\n        if self.calls == 3: raise ValueError('no step of mine')\n"
        "        return super().step(closure)\n"
        "class BadSchedule(torch.optim.lr_scheduler.LRScheduler):\n    def get_lr(self):\n"
        "        if self.last_epoch == 3: raise ValueError('no rate of mine')\n"
        "        return [group['lr'] for group in self.optimizer.param_groups]\n"
    )
    if what == "optimizer":
        words, told = ["--optimizer.class_path", "of_mine.Bad"], "in the optimizer (Bad)\nat step 2, rank 0"
        words += ["--optimizer.init_args", "{lr = 0.01}"]
    else:
        words, told = ["--optimizer.schedule.class_path", "of_mine.BadSchedule"], "schedule (BadSchedule)"
        words += ["--optimizer.schedule.init_args", "{}"]
    ended = launcher.ranks(ranks, "train", "small.toml", *words)
    assert ended.status == 1
    assert told in ended.err
    assert ended.text.count("Error: no ") == 1, ended.text
    assert "averager.py" not in ended.err  # of the user's code alone
    run = tmp_path / "runs/small"
    end, log = rows(run)[-1], (run / "log.txt").read_text()
    assert (end["event"], end["status"]) == ("end", "failed")
    assert "of mine" in end["reason"]
    assert "of mine" in log
    assert ("averager.py" in end["reason"], "hpctrain/train.py" in end["reason"]) == (False, False)
    assert "hpctrain/" in log  # all of it


def test_a_full_disk_says_so(launcher, small, tmp_path):
    """The run's log may be lost, its measurements may not, nor predictions."""
    run = tmp_path / "runs/small"
    assert launcher.ranks(2, "train", "small.toml", "--train.steps", "2").status == 0
    Path(run, "log.txt").unlink()
    Path(run, "log.txt").symlink_to("/dev/full")
    ended = launcher.ranks(2, "train", "small.toml", "--train.steps", "4")
    assert ended.status == 0, ended.text
    assert ended.text.count("log.txt can't be written any more: [Errno 28]") == 1
    assert "Traceback" not in ended.text
    Path(run, "metrics.jsonl").unlink()
    Path(run, "metrics.jsonl").symlink_to("/dev/full")
    ended = launcher.ranks(2, "train", "small.toml", "--train.steps", "6")
    assert ended.status == 1
    assert "metrics.jsonl can't be written ([Errno 28] No space left on device): free space" in ended.err
    assert "Traceback" not in ended.text


def test_metrics_that_will_fail_are_told_in_the_first_step(launcher, small, tmp_path):
    Path(tmp_path, "of_mine.py").write_text(
        "from hpctrain.recipes.samples import Samples\n"
        "class Task(Samples):\n"
        "    def measure(self, outputs, batch): raise ValueError('none of mine')\n"
    )
    ended = launcher.ranks(
        2, "train", "small.toml", "--data.task.class_path", "of_mine.Task", "--train.steps", "2"
    )
    assert ended.status != 0, "the evaluation fails"
    told = "the metrics can't be computed (ValueError: none of mine)"
    assert ended.text.count(told) == 1, ended.text
    assert ended.text.index(told) < ended.text.index("step 1/2"), ended.text
    more = ("--data.validation", "0.0", "--data.test", "0.0", "--train.run_folder", "unmeasured")
    ended = launcher.ranks(
        2, "train", "small.toml", "--data.task.class_path", "of_mine.Task", "--train.steps", "2", *more
    )
    assert ended.status == 0, ended.text
    assert "none of mine" not in ended.text, "nothing is evaluated"


def test_dry_run_writes_nothing(launcher, small, tmp_path):
    ended = launcher.ranks(2, "train", "small.toml", "--dry-run")
    assert ended.status == 0, ended.text
    assert "rank 1: replica 1 stage 0 node 0 cpu threads" in ended.out
    assert 'class_path = "helpers.Dropping"' in ended.out
    assert "in_features = 5" in ended.out
    assert not (tmp_path / "runs").exists()


def test_both_ways_of_starting_find_a_module_in_the_current_folder(launcher, small, tmp_path):
    Path(tmp_path, "of_mine.py").write_text("from helpers import Net\nclass Mine(Net): pass\n")
    script = Path(sys.executable).with_name("hpctrain")
    for at, command in enumerate(([sys.executable, "-m", "hpctrain"], [script])):
        ended = launcher.run(
            "mpirun", "-n", 2, *command, "train", "small.toml", "--model.class_path", "of_mine.Mine",
            "--train.steps", "2", "--train.run_folder", f"r{at}",
        )  # fmt: skip
        assert ended.status == 0, ended.text


def test_without_a_launcher_it_is_one_rank(launcher, small, tmp_path):
    ended = launcher.run(sys.executable, "-m", "hpctrain", "train", "small.toml", "--train.steps", "3")
    assert ended.status == 0, ended.text
    assert rows(tmp_path / "runs/small")[0]["world_size"] == 1


def test_threads_are_set_before_torch_starts(launcher, small, tmp_path):
    Path(tmp_path, "of_mine.py").write_text(
        "import os, torch\nfrom helpers import Net\n"
        "class Mine(Net):\n    def __init__(self, in_features, out_features):\n"
        "        super().__init__(in_features, out_features)\n"
        "        print('threads', torch.get_num_threads(), os.environ['OMP_NUM_THREADS'], flush=True)\n"
    )
    cores = len(os.sched_getaffinity(0))
    for ranks in (1, 2, 4):
        words = ("train", "small.toml", "--model.class_path", "of_mine.Mine", "--train.steps", "1",
                 "--train.run_folder", "r-#")  # fmt: skip
        ended = launcher.ranks(ranks, *words)
        share = max(1, cores // ranks)
        assert ended.out.count(f"threads {share} {share}") == ranks, ended.text
    assert "threads 3 3" in launcher.ranks(1, *words, OMP_NUM_THREADS="3").out
    assert "threads 2 " in launcher.ranks(1, *words, "--train.threads", "2").out


def test_no_rank_starts_a_process_after_mpi_init(launcher, small, tmp_path):
    """An audit hook, set at the start of Python, sees every fork and every child from MPI_Init on."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "def watch(event, args):\n"
        "    if event in ('subprocess.Popen', 'os.fork', 'os.system', 'os.posix_spawn', 'os.exec', 'pty.spawn'):\n"
        "        if 'mpi4py.MPI' in sys.modules:\n"
        "            sys.stderr.write(f'CHILD {event} {args}\\n')\n"
        "sys.addaudithook(watch)\n"
    )
    cache = tmp_path / "fresh-cache"
    ended = launcher.ranks(
        2, "train", "climate", "--train.steps", "2",
        PYTHONPATH=f"{tmp_path}{os.pathsep}{launcher.environment['PYTHONPATH']}", MPLCONFIGDIR=str(cache),
    )  # fmt: skip
    assert ended.status == 0, ended.text
    assert (tmp_path / "runs/climate/pictures/maps.png").is_file()
    assert "CHILD" not in ended.text
    check = launcher.run(
        sys.executable, "-c", "import mpi4py.MPI, subprocess; subprocess.run(['true'])",
        PYTHONPATH=str(tmp_path),
    )  # fmt: skip
    assert "CHILD subprocess.Popen" in check.err


def test_help_needs_no_mpi():
    code = (
        "import sys\nfrom hpctrain.cli import main\n"
        "assert main(['--help']) == 0 and main(['--version']) == 0 and main(['train', '--help']) == 0\n"
        "import hpctrain\nassert 'mpi4py.MPI' not in sys.modules and 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "verbs:" in done.stdout
    assert "Optimizer steps in all" in done.stdout


def test_dry_run_finds_what_training_would(launcher, small, tmp_path):
    ended = launcher.ranks(2, "train", "small.toml", "--dry-run", "--train.monitor", "nonsense")
    assert ended.status == 2
    assert "train.monitor = 'nonsense': legal are loss, rmse" in ended.err


def test_usage_errors_and_help_are_printed_once(launcher, small):
    for _ in range(3):  # mpirun ends all ranks at the first that fails: the one that speaks must have spoken
        ended = launcher.ranks(3, "predict", "runs/x")
        assert ended.status == 2
        assert ended.text.count("the following arguments are required: --output") == 1
    helped = launcher.ranks(3, "--help")
    assert helped.status == 0
    assert helped.text.count("verbs:") == 1


def test_load_needs_no_mpi(launcher, small, tmp_path):
    assert launcher.ranks(2, "train", "small.toml").status == 0
    code = "import sys, hpctrain; hpctrain.load('runs/small'); assert 'mpi4py.MPI' not in sys.modules"
    for part in tmp_path.glob("part*.h5"):
        part.unlink()
    ended = launcher.run(sys.executable, "-c", code)
    assert ended.status == 0, ended.text


def test_ranks_that_outnumber_cores_are_dealt_out_evenly(launcher):
    """Two to a core, each kept on its own; without the hint that MPI is to yield the program gives it."""
    cores = sorted(os.sched_getaffinity(0))
    program = (
        "import os; from hpctrain import launch; launch.share_cores(); "
        "print('core', *os.sched_getaffinity(0), os.environ['OMPI_MCA_mpi_yield_when_idle'], flush=True)"
    )
    launcher.environment.pop("OMPI_MCA_mpi_yield_when_idle")
    done = launcher.run("mpirun", "-n", 2 * len(cores), sys.executable, "-c", program)
    assert done.status == 0, done.text
    found = sorted(line for line in done.out.splitlines() if line.startswith("core"))
    whole = cores == list(range(os.cpu_count()))
    expected = [f"core {core} 1" for core in cores for _ in range(2)] if whole and len(cores) > 1 else None
    assert found == expected or (expected is None and len(found) == 2 * len(cores))


def test_dry_run_runs_the_model_once(launcher, small):
    """Alone and in stages: a layer whose width does not fit is found before a queue has been waited in."""
    for ranks, stages in ((2, 1), (2, 2)):
        good = launcher.ranks(ranks, "train", "small.toml", "--dry-run", "--parallel.stages", stages)
        assert good.status == 0, good.text
        bad = launcher.ranks(ranks, "train", "small.toml", "--dry-run", "--parallel.stages", stages,
                             "--model.class_path", "stage_models.Misfit")  # fmt: skip
        assert bad.status != 0
        assert "shapes cannot be multiplied" in bad.text or "same reduction dim" in bad.text
