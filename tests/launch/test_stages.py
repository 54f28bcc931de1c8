"""Runs of several stages: the same bits as one process, resumed on another number of stages, named failures."""

import re
import shlex
import sys

import h5py
import numpy as np
import pytest
from conftest import TESTS, losses, rows
from test_resume import same_bits, weights


@pytest.mark.parametrize("stages", [2, pytest.param(3, marks=pytest.mark.long)])
def test_six_ranks_in_both_ways(launcher, small, stages):
    """3 replicas of 2 stages and 2 of 3, the optimizer's state in parts on the replicas of each stage."""
    ended = launcher.ranks(
        6, "verify", "small.toml", "--parallel.stages", stages, "--optimizer.sharded", "true"
    )
    assert ended.status == 0, ended.text
    assert f"equal: 3 steps of {6 // stages} replicas x {stages} stages against 1 x 1" in ended.out


def test_convolutions_in_a_row_on_a_processor_with_shorter_vectors(launcher):
    """The same bits by oneDNN's kernels for AVX2, whose blocks are others."""
    asked = "bits_of_its_layers or none_pass or gradients_of_gradients"
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", asked, TESTS / "test_blocks.py"]
    limits = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    ended = launcher.run(sys.executable, *words, **limits)
    assert ended.status == 0, ended.text
    assert " passed" in ended.out


def test_micro_batches_that_stay_and_leave_stages_idle_are_told(launcher, small, tmp_path):
    words = ["train", "small.toml", "--train.run_folder", "run"]
    assert launcher.ranks(1, *words, "--train.steps", "1").status == 0
    ended = launcher.ranks(2, *words, "--train.steps", "2", "--parallel.stages", "2")
    assert ended.status == 0, ended.text
    told = r"parallel.micro_batches stays 1, .* a new run \(--train.run_folder NEW\) of this layout takes 8,"
    assert len(re.findall(told, ended.out)) == 1, ended.text


def test_stages_come_and_go_over_resumes(launcher, small, tmp_path):
    """4 stages, then 2, 1, 3 and 2 x 2; one replica has the bits of one process throughout."""
    words = ["train", "small.toml", "--parallel.micro_batches", "4", "--data.validation", "0.2"]
    words += ["--optimizer.schedule.class_path", "torch.optim.lr_scheduler.ConstantLR"]
    alone = launcher.ranks(1, *words, "--train.run_folder", "alone", "--train.steps", "15")
    assert alone.status == 0, alone.text
    for ranks, stages, steps in ((4, 4, 3), (2, 2, 5), (1, 1, 9), (3, 3, 15)):
        ended = launcher.ranks(
            ranks, *words, "--train.run_folder", "moved", "--train.steps", steps, "--parallel.stages", stages
        )
        assert ended.status == 0, ended.text
        assert f"1 replica x {stages} stage{'s' * (stages > 1)}" in ended.out
    assert losses(tmp_path / "alone") == losses(tmp_path / "moved")
    assert same_bits(weights(tmp_path / "alone"), weights(tmp_path / "moved"))
    validated = [
        [r["loss"] for r in rows(tmp_path / x) if r["event"] == "validate"][-1] for x in ("alone", "moved")
    ]
    assert validated[0] == validated[1]
    both = launcher.ranks(
        4, *words, "--train.run_folder", "moved", "--train.steps", "20", "--parallel.stages", "2",
        "--parallel.schedule", "gpipe",
    )  # fmt: skip
    assert both.status == 0, both.text
    start = [row for row in rows(tmp_path / "moved") if row["event"] == "start"][-1]
    assert (start["replicas"], start["stages"], start["micro_batches"], start["resumed_step"]) == (
        2,
        2,
        4,
        15,
    )
    for ranks, said in ((2, "r0/2 s0 |"), (1, "1 rank can't be the run's 2 stages: each holds the whole")):
        predicted = launcher.ranks(ranks, "predict", "moved", "--output", f"{ranks}.h5")
        assert predicted.status == 0, predicted.text
        assert said in predicted.out
    with h5py.File(tmp_path / "1.h5") as whole, h5py.File(tmp_path / "2.h5") as staged:
        assert whole.keys() == staged.keys()
        assert all(np.array_equal(whole[name][:], staged[name][:]) for name in whole)


def test_predictions_of_synchronised_batchnorm_in_stages(launcher, small, tmp_path):
    """Nothing is averaged in prediction: any number of ranks and micro-batches will do."""
    words = ["--averaging.sync_batchnorm", "true", "--model.class_path", "stage_models.Skips"]
    words += ["--parallel.stages", "2", "--parallel.micro_batches", "2", "--train.steps", "3"]
    ended = launcher.ranks(4, "train", "small.toml", *words, "--train.run_folder", "synced")
    assert ended.status == 0, ended.text
    for ranks in (2, 1):
        predicted = launcher.ranks(ranks, "predict", "synced", "--output", f"{ranks}.h5")
        assert predicted.status == 0, predicted.text
        assert "measured" not in predicted.text
    with h5py.File(tmp_path / "1.h5") as whole, h5py.File(tmp_path / "2.h5") as staged:
        assert all(np.array_equal(whole[name][:], staged[name][:]) for name in whole)


def test_what_does_not_fit_is_refused_with_the_numbers(launcher, small):
    for stages, text in (
        (
            "3",
            "parallel.stages = 3 does not divide the 4 ranks that MPI started: run with mpirun -n 3 or -n 6, or set",
        ),
        ("0", "parallel.stages = 0: at least 1 was expected"),
    ):
        ended = launcher.ranks(4, "train", "small.toml", "--parallel.stages", stages)
        assert ended.status == 2, ended.text
        assert ended.text.count(text) == 1
    ended = launcher.ranks(
        2, "train", "small.toml", "--parallel.stages", "2", "--model.class_path", "stage_models.Deciding"
    )
    assert ended.status == 2
    assert ended.text.count("torch.export can't write Deciding down") == 1
    assert "Traceback" not in ended.text


@pytest.mark.parametrize("backward", ["false", "true"])
def test_a_failing_layer_ends_the_job_with_its_name(launcher, small, backward):
    words = ["--model.class_path", "stage_models.breaking_row", "--model.init_args.at", "2"]
    words += [
        "--model.init_args.backward",
        backward,
        "--parallel.stages",
        "2",
        "--parallel.micro_batches",
        "8",
    ]
    ended = launcher.ranks(4, "train", "small.toml", *words, limit=60)
    assert ended.status == 1, ended.text
    assert "trouble in a layer" in ended.err
    assert "at step 0, micro-batch" in ended.err
    assert "stage 1, rank " in ended.err


def test_a_job_recomputes_where_its_memory_asks_for_it(launcher, small, tmp_path):
    """The first stage would keep eight micro-batches, some 70 MiB each; with the limit the bits are the same."""
    words = ["train", "small.toml", "--model.class_path", "stage_models.inflated_row", "--train.steps", "2"]
    words += ["--parallel.stages", "2", "--parallel.micro_batches", "8", "--parallel.schedule", "gpipe"]

    def run(folder, most="unlimited", *more):
        command = [sys.executable, "-m", "hpctrain", *words, "--train.run_folder", folder, *more]
        return launcher.run("mpirun", "-n", 2, "bash", "-c", f"ulimit -d {most}; exec " + shlex.join(command))

    plain, tight = run("plain"), run("tight", 900 * 1024)
    assert (plain.status, tight.status) == (0, 0), plain.text + tight.text
    said = "stages run forward again for backward, as memory asks for it"
    assert said not in plain.text
    assert said in tight.text
    assert "memory may run out" not in tight.text
    assert losses(tmp_path / "plain") == losses(tmp_path / "tight")
    assert same_bits(weights(tmp_path / "plain"), weights(tmp_path / "tight"))
    exact = run("exact", 1150 * 1024, "--parallel.recompute", "never")
    assert exact.status == 0, exact.text
    assert "large tensors are given back to the system one by one" in exact.text
    assert losses(tmp_path / "plain") == losses(tmp_path / "exact")
    never = run("never", 900 * 1024, "--parallel.recompute", "never")
    assert never.status != 0, never.text
    assert "memory" in never.text


def test_a_model_too_large_for_one_rank_trains_in_four_stages(launcher, small, tmp_path):
    """A gibibyte of weights, gradients and moments; each rank may have 900 MiB, the libraries' own included."""
    words = ["train", "small.toml", "--model.class_path", "stage_models.heavy", "--train.steps", "2"]
    words += ["--train.threads", "1", "--parallel.micro_batches", "4"]  # the bits of one process

    def limited(ranks, folder, most=900):
        command = [sys.executable, "-m", "hpctrain", *words, "--parallel.stages", str(ranks)]
        command += ["--train.run_folder", folder]
        limit = f"ulimit -d {1024 * most}; exec " + shlex.join(command)
        return launcher.run("mpirun", "-n", ranks, "bash", "-c", limit)

    whole = limited(1, "whole")
    assert whole.status != 0
    assert "has no memory for " in whole.text
    assert "with parallel.stages = 1 on 1 ranks: take more stages" in whole.text
    assert "Traceback" not in whole.text
    halves = limited(2, "halves", 700)  # 512 MiB each, beside the libraries
    assert halves.status == 2, halves.text
    assert "the model does not fit: weights, gradients, the optimizer's numbers" in halves.text
    assert "the ranks of its 2 stages have " in halves.text
    assert "Traceback" not in halves.text
    assert not (tmp_path / "halves" / "checkpoints").exists()
    staged = limited(4, "staged")
    assert staged.status == 0, staged.text
    alone = limited(1, "alone", 8192)
    assert alone.status == 0, alone.text
    assert losses(tmp_path / "staged").keys() == {1, 2}
    assert losses(tmp_path / "staged") == losses(tmp_path / "alone")


BUSY = """
import time, torch
from mpi4py import MPI
from hpctrain.pipeline import watch
from hpctrain.pipeline.message import pack
from hpctrain.pipeline.transport import FORWARD, Transport

watch.PATIENCE_SECONDS, watch.LOOK_SECONDS = 1.0, 0.1
world = MPI.COMM_WORLD
transport = Transport(world, "cpu")
world.Barrier()
if world.rank == 0:
    transport.start((1, FORWARD, pack(1, 0, {"x": torch.ones(1 << 20)}, 0)))
    time.sleep(3.0)
else:
    found, _ = transport.receive(0, FORWARD, 0)
    print("got", found["x"].sum().item(), transport.waited > 2.0)
transport.finish()
transport.close()
"""


def test_a_tensor_whose_sender_is_busy_is_named_missing(launcher):
    """Where ranks can't read each other's memory, a long one needs its sender within MPI, which computes on."""
    (launcher.folder / "busy.py").write_text(BUSY)
    ended = launcher.run("mpirun", "-n", 2, sys.executable, "busy.py", limit=60, OMPI_MCA_smsc="^cma,xpmem")
    assert ended.status == 0, ended.text
    assert "got 1048576.0 True" in ended.out
    assert "waiting for rank 0 on" in ended.text
