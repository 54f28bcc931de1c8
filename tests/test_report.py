import errno
import json
import os
import re
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from hpctrain import log
from hpctrain.averaging.result import Times
from hpctrain.config import Config
from hpctrain.config_file import free_number
from hpctrain.errors import ConfigError
from hpctrain.report import pictures, progress
from hpctrain.report.run_folder import RunFolder, rows
from hpctrain.report.summary import table
from hpctrain.report.waiting import Waiting
from hpctrain.task import Maps, Panel


def test_later_rows_replace_earlier_ones_of_the_same_step(tmp_path):
    run = RunFolder(tmp_path / "run", writes=True)
    run.create(Config())
    run.row("train", 1, loss=3.0)
    run.row("train", 2, loss=2.0)
    run.row("train", 2, loss=float("nan"))
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"event": "train", "st')
    found = rows(run.path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in found] == [(1, 3.0), (2, None)]
    json.loads((run.path / "metrics.jsonl").read_text().splitlines()[2])
    assert rows(tmp_path / "none") == []


def test_other_ranks_write_nothing(tmp_path):
    run = RunFolder(tmp_path / "run", writes=False)
    run.create(Config())
    run.row("train", 1, loss=3.0)
    assert not (tmp_path / "run").exists()


def test_free_numbers(tmp_path):
    (tmp_path / "a-1").mkdir()
    assert free_number(str(tmp_path / "a-#")) == str(tmp_path / "a-2")


def colours(path):
    return len(np.unique(np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3), axis=0))


def test_pictures_show_something(tmp_path):
    field = np.random.default_rng(0).normal(size=(6, 8))
    found = Maps("t", "K", (Panel("a", field), Panel("b", field)), np.arange(8.0), np.arange(6.0))
    pictures.maps(found, tmp_path / "deep" / "maps.png")
    assert colours(tmp_path / "deep" / "maps.png") > 50
    history = [{"event": "start", "step": 0, "baselines": {"ridge": {"rmse": 0.5}}}]
    history += [{"event": "train", "step": n, "loss": 1 / n} for n in range(1, 9)]
    history += [{"event": "validate", "step": 8, "split": "test", "epoch": 1.0, "rmse": 0.4}]
    pictures.curves(history, "rmse", tmp_path / "curves.png")
    negative = [{**row, "loss": -row["loss"]} if row.get("loss") else row for row in history]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "cannot be log-scaled"
        pictures.curves(negative, "rmse", tmp_path / "negative.png")
    assert colours(tmp_path / "curves.png") > 10


def test_table_has_a_row_a_method():
    lines = table({"a": {"rmse": 1.0}, "b": {"rmse": 0.25, "loss": 3.0}})
    assert lines[0].split() == ["loss", "rmse"]
    assert lines[1].split() == ["a", "1"]
    assert lines[2].split() == ["b", "3", "0.25"]
    assert table({}) == []


@pytest.mark.mpi
def test_batch_log_gets_plain_lines_of_the_first_and_last_step(capsys, topology, monkeypatch):
    monkeypatch.setattr(progress, "on_terminal", lambda: False)
    log.start(topology)
    with progress.ProgressView(10, 0, topology.world_rank == 0, log_seconds=1000) as view:
        for step in range(1, 11):
            view.step(step, 0.5, 1234 if step < 10 else 1, 1.0, {"reading": 0.25, "computing": 0.75})
    out = capsys.readouterr().out
    if topology.world_rank == 0:
        assert [line.split()[3] for line in out.splitlines()] == ["1/10", "10/10"]
        assert (
            f"r0/{topology.world_size} | step 1/10 | loss 0.5 | 1,234 samples/s | reading 25% computing 75%"
            in out
        )
        assert "step 10/10 | loss 0.5 | 1,097 samples/s" in out, "the last batch is short: of 9 steps"
    else:
        assert out == ""


def test_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(progress, "on_terminal", lambda: True)
    with progress.ProgressView(4, 0, True, 10.0) as view:
        view.step(2, 0.5, 99, 1.0, {"reading": 1.0})
        view.step(4, 0.5, 1, 0.1, {"reading": 1.0})
    out = capsys.readouterr().out
    assert "4/4" in out
    assert "loss 0.5 | 99 samples/s" in out
    assert "| 10 samples/s" not in out, "of a short step alone"


@pytest.mark.parametrize(("columns", "shares"), [(80, False), (140, True)])
def test_a_narrow_terminal_shows_the_step_and_the_time_left(capsys, monkeypatch, columns, shares):
    monkeypatch.setattr(progress, "on_terminal", lambda: True)
    monkeypatch.setattr(progress, "terminal_width", lambda: columns)
    told = {"reading": 0.03, "computing": 0.24, "waiting": 0.59, "averaging": 0.14}
    with progress.ProgressView(2000, 0, True, 10.0) as view:
        view.step(1234, 0.0007736, 412, 1.0, told)
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out).strip().splitlines()[-1]
    assert "1234/2000 loss 0.0007736 | 412 samples/s" in last
    assert ("averaging 14%" in last) == shares
    assert re.search(r"(-|\d):(-|\d)", last)
    assert "…" not in last


def test_a_launchers_terminal_counts_only_if_the_launcher_has_one(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("PMIX_RANK", "0")
    for target, expected in (("/dev/pts/3", True), ("/tmp/log.txt", False), ("pipe:[7]", False)):
        monkeypatch.setattr(os, "readlink", lambda path, target=target: target)
        assert progress.on_terminal() is expected
    monkeypatch.delenv("PMIX_RANK")
    assert progress.on_terminal()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert not progress.on_terminal()


@pytest.mark.mpi
def test_every_log_line_names_its_rank(capsys, topology, tmp_path):
    log.start(topology)
    log.to_file(tmp_path / "log.txt", topology)
    log.LOGGER.warning("50% done")
    expected = f"r{topology.world_rank}/{topology.world_size} | 50% done\n"
    assert capsys.readouterr().out == expected
    assert (tmp_path / "log.txt").read_text() == expected
    log.start(topology)


def test_a_run_of_another_job_in_the_meantime_is_not_overwritten(tmp_path):
    """Two jobs start at once in a new folder; the second waits for the first one's lock, and gets it."""
    first, second = (RunFolder(tmp_path / "run", writes=True) for _ in range(2))
    for run in (first, second):
        run.hold()
    first.create(Config())
    first.row("train", 1, loss=3.0)
    first.close()
    with pytest.raises(ConfigError, match="another job has trained into it since: start again to go on"):
        second.create(Config())
    assert len(rows(first.path / "metrics.jsonl")) == 1
    second.close()
    third = RunFolder(tmp_path / "run", writes=True)
    third.hold()
    third.create(Config())  # one that failed before its first checkpoint is begun again
    third.close()


def test_a_filesystem_without_locks_leaves_none_behind(tmp_path, monkeypatch, caplog):
    """filelock would make a soft one there, which a job that is killed on another node leaves for ever."""

    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    for _ in range(2):
        run = RunFolder(tmp_path / "run", writes=True)
        run.hold()
        with caplog.at_level("WARNING"):
            run.create(Config())  # and is not closed
    assert "is not locked" in caplog.text


def test_a_line_cut_short_does_not_swallow_the_next(tmp_path):
    run = RunFolder(tmp_path / "run", writes=True)
    run.create(Config())
    run.row("train", 1, loss=3.0)
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"event": "train", "st')
    run.create(Config(), resumes=True)
    run.row("start", 1)
    assert [row["event"] for row in rows(run.path / "metrics.jsonl")] == ["train", "start"]
    run.create(Config())
    assert rows(run.path / "metrics.jsonl") == []


def test_a_folder_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="train.run_folder = .*file/run can't be written"):
        RunFolder(tmp_path / "file" / "run", writes=True).create(Config())


def times(busy):
    computing = np.array(busy)
    zeros = np.zeros(len(busy))
    return Times(zeros, zeros, computing, computing.max() - computing, zeros + 0.5)


def test_who_was_waited_for_is_named():
    waiting = Waiting([(0, "a"), (1, "a"), (4, "b")])
    assert waiting.line(1.0) == ""
    row = waiting.row(times([1.0, 2.0, 1.5]))
    assert row["waited_for"] == 1
    assert row["compute_seconds"] == {"min": 1.0, "median": 1.5, "max": 2.0, "rank": 1, "host": "a"}
    assert row["wait_seconds"] == {"min": 0.0, "median": 0.5, "max": 1.0, "rank": 0, "host": "a"}
    assert row["transfer_seconds"]["max"] == 0.5
    for _ in range(3):
        assert waiting.row(times([1.0, 1.0, 4.0]))["waited_for"] == 4
    line = waiting.line(20.0)  # waited: 0.5 once, 2.0 three times, in the mean of three ranks
    assert "waited 32.5% of the time" in line
    assert "rank 4 on b (75% of the steps; 33% would be even)" in line
    assert Waiting([(0, "a")]).line(1.0) == ""
    (row,) = waiting.buckets([("a.weight … b.bias", np.array([0.1, 0.2, 0.9]))])
    late = {"min": 0.1, "median": 0.2, "max": 0.9, "rank": 4, "host": "b"}
    assert row == {"parameters": "a.weight … b.bias", "ready_seconds": late}


def test_a_folder_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def no_locks(self, timeout):
        raise OSError("no locks available")

    monkeypatch.setattr("hpctrain.report.run_folder.FileLock.acquire", no_locks)
    run = RunFolder(tmp_path / "run", writes=True)
    with caplog.at_level("WARNING"):
        run.create(Config())
    assert "is not locked (no locks available): let no other job train into it" in caplog.text
    run.close()
