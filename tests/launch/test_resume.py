"""Runs that stop and go on: finished, killed, signalled, grown, on other ranks."""

import json
import re
import signal
from pathlib import Path

import pytest
from conftest import losses, rows, wait_for

from hpctrain.checkpoint.load import newest


def weights(run):
    """All tensors of the newest checkpoint: the module's and the optimizer's."""
    stored, _ = newest(Path(run) / "checkpoints")
    return {name: stored.read(name) for name in stored.tensors}


def same_bits(a, b):
    return all(a[name].numpy().tobytes() == b[name].numpy().tobytes() for name in a) and a.keys() == b.keys()


def test_finished_smaller_larger_and_different(launcher, small, tmp_path):
    assert launcher.ranks(2, "train", "small.toml").status == 0
    before = (tmp_path / "runs/small/metrics.jsonl").read_text()
    again = launcher.ranks(2, "train", "small.toml")
    assert again.status == 0
    assert "is finished (step 20 of 20); nothing was changed" in again.out
    assert "to go on: a larger --train.epochs or --train.steps" in again.out
    assert "to start afresh: --train.run_folder NEW" in again.out
    assert (tmp_path / "runs/small/metrics.jsonl").read_text() == before
    smaller = launcher.ranks(2, "train", "small.toml", "--train.steps", "10")
    assert smaller.status == 2
    assert smaller.text.count("train.steps: the run has 20, asked is 10") == 1
    fewer = launcher.ranks(2, "train", "runs/small/config.toml", "--data.files", "part0.h5")
    assert fewer.status == 2
    assert "samples of the data: the run has" in fewer.err
    other = launcher.ranks(2, "train", "small.toml", "--train.batch", "4", "--optimizer.init_args.lr", "1")
    assert other.status == 2
    assert "train.batch: the run has 8, asked is 4" in other.err
    assert "optimizer.init_args: the run has {'lr': 0.01}, asked is {'lr': 1}" in other.err
    slip = launcher.ranks(2, "train", "small.toml", "--model.init_args.widht", "4")
    assert slip.status == 2
    assert "widht" in slip.err
    assert "another configuration" not in slip.text
    dry = launcher.ranks(1, "train", "small.toml", "--model.init_args.widht", "4", "--dry-run")
    assert dry.status == 2
    assert "widht" in dry.err
    assert "another configuration" not in dry.text
    larger = launcher.ranks(2, "train", "small.toml", "--train.steps", "24")
    assert larger.status == 0, larger.text
    assert "resuming" in larger.out
    assert "from step 20" in larger.out
    assert max(losses(tmp_path / "runs/small")) == 24


def test_a_second_job_is_kept_out_of_the_folder(launcher, small, tmp_path):
    slow = ("--model.class_path", "helpers.Slow", "--train.steps", "200")
    first = launcher.start(*launcher.command(2, "train", "small.toml", *slow), SLOW="0.3")
    wait_for(lambda: len(losses(tmp_path / "runs/small")) >= 2, first)
    second = launcher.ranks(2, "train", "small.toml", *slow)
    assert second.status == 2
    assert second.text.count("runs/small is in use by another job that trains into it") == 1
    assert "runs/small is in use by another job: waiting up to 15 s" in second.text
    assert first.poll() is None
    launcher.kill(first)


@pytest.mark.long
def test_invariant_runs_are_the_same_bits_on_any_ranks_and_resumed_on_others(launcher, small, tmp_path):
    """4 ranks; 3 ranks; and 4, then 2, then 1: losses, metrics, weights and optimizer state."""
    words = ["train", "small.toml", "--averaging.invariant", "true", "--parallel.micro_batches", "4"]
    words += ["--data.validation", "0.2", "--train.clip", "0.5", "--model.init_args.width", "600"]
    for ranks in (4, 3):
        ended = launcher.ranks(ranks, *words, "--train.run_folder", f"at{ranks}")
        assert ended.status == 0, ended.text
    for ranks, steps in ((4, 6), (2, 13), (1, 20)):
        ended = launcher.ranks(ranks, *words, "--train.run_folder", "moved", "--train.steps", steps,
                               "--optimizer.schedule.class_path", "torch.optim.lr_scheduler.ConstantLR")  # fmt: skip
        assert ended.status == 0, ended.text
    plain = launcher.ranks(1, *words, "--train.run_folder", "alone", "--optimizer.schedule.class_path",
                           "torch.optim.lr_scheduler.ConstantLR")  # fmt: skip
    assert plain.status == 0, plain.text
    for a, b in (("at4", "at3"), ("moved", "alone")):
        assert losses(tmp_path / a) == losses(tmp_path / b)
        found = [[r["loss"] for r in rows(tmp_path / x) if r["event"] == "validate"] for x in (a, b)]
        assert found[0][-1] == found[1][-1]
        assert same_bits(weights(tmp_path / a), weights(tmp_path / b))
    refused = launcher.ranks(2, "train", "small.toml", "--averaging.invariant", "true")
    assert refused.status == 2
    assert refused.text.count("set parallel.micro_batches to an integer") == 1


def test_invariant_runs_in_stages_that_share_weights_are_the_same_bits_on_any_ranks(
    launcher, small, tmp_path
):
    """One process; two stages, resumed as two replicas of them."""
    words = ["train", "small.toml", "--averaging.invariant", "true", "--parallel.micro_batches", "4"]
    words += ["--model.class_path", "stage_models.Tied", "--train.clip", "0.5", "--data.validation", "0.2"]
    words += ["--optimizer.schedule.class_path", "torch.optim.lr_scheduler.ConstantLR"]
    layouts = ((1, 1, 10, "alone"), (2, 2, 5, "moved"), (4, 2, 10, "moved"))
    for ranks, stages, steps, folder in layouts:
        more = ["--parallel.stages", stages, "--train.steps", steps, "--train.run_folder", folder]
        ended = launcher.ranks(ranks, *words, *more)
        assert ended.status == 0, ended.text
    assert losses(tmp_path / "alone") == losses(tmp_path / "moved")
    found = [
        [r for r in rows(tmp_path / x) if r["event"] == "validate"][-1]["loss"] for x in ("alone", "moved")
    ]
    assert found[0] == found[1]
    assert same_bits(weights(tmp_path / "alone"), weights(tmp_path / "moved"))


def test_a_resume_says_where_threads_differ(launcher, small):
    told = "threads? in the session before, and have {} now: kernels may cut their sums otherwise"
    for steps, threads, before in ((4, 1, 0), (8, 3, 1)):
        words = "--train.steps", steps, "--train.threads", threads
        ended = launcher.ranks(1, "train", "small.toml", *words)
        assert ended.status == 0, ended.text
        assert bool(re.search(f"ranks had 1 {told.format(3)}", ended.out)) == (before == 1)


def test_repeat_a_run_from_its_folder(launcher, small, tmp_path):
    assert launcher.ranks(2, "train", "small.toml").status == 0
    ended = launcher.ranks(2, "train", "runs/small/config.toml", "--train.run_folder", "new")
    assert ended.status == 0, ended.text
    assert losses(tmp_path / "new") == losses(tmp_path / "runs/small")
    assert same_bits(weights(tmp_path / "new"), weights(tmp_path / "runs/small"))
    plain = launcher.ranks(2, "train", "runs/small/config.toml")
    assert "is finished" in plain.out


LONG = pytest.mark.long


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=LONG), pytest.param(2, marks=LONG), 4])
def test_killed_and_resumed_is_bit_for_bit_never_stopped(launcher, small, tmp_path, ranks):
    """20 steps against some + SIGKILL of every rank + the rest, at the same layout."""
    wide = ("--model.init_args.width", "600")  # several units: optimizer state is cut between ranks
    whole = launcher.ranks(ranks, "train", "small.toml", "--train.run_folder", "whole", *wide)
    assert whole.status == 0, whole.text
    slow = ("--model.class_path", "helpers.Slow", "--checkpoint.every_steps", "3", *wide)
    process = launcher.start(
        *launcher.command(ranks, "train", "small.toml", "--train.run_folder", "cut", *slow), SLOW="0.3"
    )
    wait_for(lambda: len(losses(tmp_path / "cut")) >= 10, process)
    launcher.kill(process)
    done = len(losses(tmp_path / "cut"))
    assert 10 <= done < 20
    resumed = launcher.ranks(ranks, "train", "small.toml", "--train.run_folder", "cut", *slow)
    assert resumed.status == 0, resumed.text
    starts = [
        json.loads(line)
        for line in (tmp_path / "cut/metrics.jsonl").read_text().splitlines()
        if '"start"' in line
    ]
    assert [row["resumed_step"] for row in starts] == [0, done // 3 * 3]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert same_bits(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


@pytest.mark.long
def test_a_run_of_four_ranks_goes_on_with_three_and_with_one(launcher, small, tmp_path):
    """The micro-batches stay; only who computes them changes. Tolerance: sums in another order."""
    schedule = "--optimizer.schedule.class_path", "torch.optim.lr_scheduler.ConstantLR"
    words = (
        "train",
        "small.toml",
        *schedule,
        "--optimizer.schedule.init_args.factor",
        "1.0",
        "--train.run_folder",
    )
    assert launcher.ranks(4, *words, "whole").status == 0
    for ranks, steps in ((4, 8), (3, 14), (1, 20)):
        ended = launcher.ranks(ranks, *words, "cut", "--train.steps", str(steps))
        assert ended.status == 0, ended.text
    starts = [row for row in rows(tmp_path / "cut") if row["event"] == "start"]
    assert [(row["world_size"], row["micro_batches"]) for row in starts] == [(4, 4), (3, 4), (1, 4)]
    whole, cut = losses(tmp_path / "whole"), losses(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(whole[step] == cut[step] for step in range(1, 9)), "the same layout: the same bits"
    assert all(cut[step] == pytest.approx(whole[step], rel=1e-4) for step in whole)


@pytest.mark.parametrize("number", ["SIGUSR1"])
def test_a_signal_stops_with_a_checkpoint_and_status_75(launcher, small, tmp_path, number):
    words = ("train", "small.toml", "--model.class_path", "helpers.Slow")
    process = launcher.start(*launcher.command(2, *words), SLOW="0.3")
    wait_for(lambda: len(losses(tmp_path / "runs/small")) >= 3, process)
    process.send_signal(getattr(signal, number))
    ended = launcher.finish(process)
    assert ended.status == 75, ended.text
    end = rows(tmp_path / "runs/small")[-1]
    assert (end["event"], end["status"]) == ("end", "stopped")
    assert number in end["reason"]
    assert "run the same command again to go on" in ended.out
    again = launcher.ranks(2, *words)
    assert again.status == 0
    assert f"from step {end['step']}" in again.out


@pytest.mark.parametrize("stages", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_signal_breaks_off_a_measurement_which_a_resume_takes_first(launcher, small, tmp_path, stages):
    """On the way and at the end, each with a checkpoint of that step: nothing differs from a run in one go."""
    words = ["train", "small.toml", "--model.class_path", "helpers.SlowMeasured", "--train.batch", "2"]
    words += [
        "--data.validation",
        "0.4",
        "--data.test",
        "0.4",
        "--train.validate_steps",
        "4",
        "--train.patience",
        "9",
    ]
    words += ["--train.steps", "6", "--parallel.stages", stages]
    words += ["--optimizer.schedule.class_path", "torch.optim.lr_scheduler.ReduceLROnPlateau"]
    words += ["--optimizer.schedule.init_args", "{patience = 0}", "--report.log_seconds", "1"]
    whole = launcher.ranks(2, *words, "--train.run_folder", "whole")
    assert whole.status == 0, whole.text
    cut = tmp_path / "cut"
    for step, where in ((4, ""), (6, ", in the last measurement")):
        process = launcher.start(*launcher.command(2, *words, "--train.run_folder", "cut"), SLOW="0.6")
        wait_for(lambda step=step: cut.exists() and len(losses(cut)) >= step, process)
        process.send_signal(signal.SIGUSR1)
        ended = launcher.finish(process)
        assert ended.status == 75, ended.text
        end = rows(cut)[-1]
        assert (end["event"], end["status"], end["step"]) == ("end", "stopped", step)
        assert end["reason"].endswith(f" at step {step}{where}")
        assert (cut / f"checkpoints/step-{step:08d}").is_dir()
    again = launcher.ranks(2, *words, "--train.run_folder", "cut", SLOW="0.4")
    assert again.status == 0, again.text
    assert "measuring test | " in again.out
    assert losses(cut) == losses(tmp_path / "whole")
    found = [
        [(r["step"], r["split"], r["loss"]) for r in rows(x) if r["event"] == "validate"]
        for x in (cut, tmp_path / "whole")
    ]
    assert found[0] == found[1]
    assert same_bits(weights(cut), weights(tmp_path / "whole"))


def test_early_stopping_and_best(launcher, small, tmp_path):
    words = (
        "train", "small.toml", "--data.test", "0", "--data.validation", "0.3", "--train.patience", "2",
        "--train.validate_steps", "1", "--train.steps", "400", "--optimizer.init_args.lr", "0.3",
        "--checkpoint.every_steps", "1", "--checkpoint.keep", "1",
    )  # fmt: skip
    ended = launcher.ranks(2, *words)
    assert ended.status == 0, ended.text
    found = rows(tmp_path / "runs/small")
    end = found[-1]
    assert "no better loss than" in end["reason"]
    values = {row["step"]: row["loss"] for row in found if row["event"] == "validate"}
    best = min(values, key=values.get)
    assert end["step"] == best + 2 < 400
    kept = sorted(p.name for p in (tmp_path / "runs/small/checkpoints").iterdir())
    assert kept == [f"step-{best:08d}", f"step-{end['step']:08d}"]
    again = launcher.ranks(2, *words)
    assert again.status == 0
    assert "is finished (no better loss than" in again.out
    more = launcher.ranks(2, *words, "--train.steps", "401")
    assert f"from step {end['step']}" in more.out
    assert rows(tmp_path / "runs/small")[-1]["step"] > end["step"]


def test_the_best_is_kept_whatever_the_cadence(launcher, small, tmp_path):
    ended = launcher.ranks(
        2, "train", "small.toml", "--data.test", "0", "--data.validation", "0.3", "--train.validate_steps", "2",
        "--train.steps", "30", "--optimizer.init_args.lr", "0.3",
    )  # fmt: skip
    assert ended.status == 0, ended.text
    values = {row["step"]: row["loss"] for row in rows(tmp_path / "runs/small") if row["event"] == "validate"}
    best = min(values, key=values.get)
    kept = [p.name for p in (tmp_path / "runs/small/checkpoints").iterdir()]
    assert f"step-{best:08d}" in kept
    assert "step-00000030" in kept


def test_a_run_that_failed_before_its_first_checkpoint_does_not_block_its_folder(launcher, small, tmp_path):
    ended = launcher.ranks(2, "train", "small.toml", "--optimizer.init_args.lr", "1e30")
    assert ended.status == 1
    end = rows(tmp_path / "runs/small")[-1]
    assert (end["event"], end["status"]) == ("end", "failed")
    assert "the loss is" in end["reason"]
    log = tmp_path / "runs/small/log.txt"
    assert re.search(r"r0/2 \| failed: .*the loss is", log.read_text()), "once, as on the screen"
    assert "failed: " not in ended.out, "the screen has it as an error"
    again = launcher.ranks(2, "train", "small.toml")
    assert again.status == 0, again.text
    assert "holds a run that stopped before its first checkpoint: it begins anew" in again.out
    assert [row["status"] for row in rows(tmp_path / "runs/small") if row["event"] == "end"] == ["done"]


def test_an_end_row_that_a_kill_took_is_written_later(launcher, small, tmp_path):
    assert launcher.ranks(2, "train", "small.toml").status == 0
    path = tmp_path / "runs/small/metrics.jsonl"
    found = rows(path.parent)
    last = next(row for row in found if row["event"] == "validate" and row["step"] == 20)
    keep = [line for line in path.read_text().splitlines(True) if '"end"' not in line]
    path.write_text("".join(line for line in keep if '"validate", "step": 20' not in line))
    assert len(rows(path.parent)) == len(found) - 2
    again = launcher.ranks(2, "train", "small.toml")
    assert "done: all 20 steps done" in again.out
    again = rows(path.parent)
    assert (again[-1]["event"], again[-1]["status"]) == ("end", "done")
    measured = next(row for row in again if row["event"] == "validate" and row["step"] == 20)
    assert measured["loss"] == last["loss"]
    assert "is finished" in launcher.ranks(2, "train", "small.toml").out


def test_checkpoints_by_the_clock(launcher, small, tmp_path):
    """The default cadence: rank 0's clock asks, all ranks write."""
    words = ["--checkpoint.every_minutes", "0.0001", "--checkpoint.keep", "100"]
    assert launcher.ranks(2, "train", "small.toml", *words).status == 0
    saved = [row["step"] for row in rows(tmp_path / "runs/small") if row["event"] == "checkpoint"]
    assert saved[-1] == 20
    assert len(saved) > 1  # how many, the disk says: while one is written no other begins
    assert launcher.ranks(2, "train", "small.toml", "--train.run_folder", "none").status == 0
    assert [row["step"] for row in rows(tmp_path / "none") if row["event"] == "checkpoint"] == [20]
