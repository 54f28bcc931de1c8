"""Several hosts with a link between them: bytes that cross it, the same bits however they are sent.

Bytes are counted by the kernel on each host's own network interface, without headers.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

HERE = Path(__file__).parent
SCRIPT = HERE / "vhosts.sh"


@pytest.fixture(scope="module")
def vhosts(tmp_path_factory):
    """Three hosts joined at 1 Gbit/s; a function that runs the worker on them and gives its rows."""
    folder = tmp_path_factory.mktemp("vhosts")
    environment = {
        **os.environ,
        "VHOSTS_DIR": str(folder),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(HERE.parent.parent),
    }

    probed = subprocess.run(
        [SCRIPT, "probe"], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    if probed.returncode:
        pytest.skip(f"this machine makes no network of namespaces: {probed.stderr.strip()}")

    def script(*arguments, limit=120):
        done = subprocess.run(
            [SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=limit, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run(hosts, steps, ways, wire="exact"):
        ranks = sum(int(host.split(":")[1]) for host in hosts.split(","))
        worker = [sys.executable, str(HERE / "steps_worker.py"), str(steps), ways, "", wire]
        line = script("run", str(ranks), hosts, "-x", "PYTHONPATH", *worker)
        return rows(line)

    try:
        script("up", "3")
        script("shape", "1gbit")
        run.script = script
        yield run
    finally:
        script("down")


def rows(text):
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def on_one_host(ranks, node_of, steps):
    """The same worker on this machine, with nodes that are made up."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent.parent), "OMPI_MCA_mpi_yield_when_idle": "1"}
    worker = [sys.executable, str(HERE / "steps_worker.py"), str(steps), "after", node_of, "exact"]
    mpirun = [str(Path(sys.executable).parent / "mpirun"), "-n", str(ranks), *worker]
    done = subprocess.run(mpirun, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return rows(done.stdout)[0]


@pytest.mark.parametrize(
    ("hosts", "node_of"), [("h0:2,h1:2", "0011"), ("h0:2,h1:1,h2:1", "0012"), ("h0:1,h1:1,h2:1", "012")]
)
def test_bytes_are_the_fewest_possible_and_bits_do_not_depend_on_how_they_are_sent(vhosts, hosts, node_of):
    """2·S·(N-1)/N a host, gradients one way and new weights the other; 2 percent for uneven shares and flags."""
    expected = on_one_host(len(node_of), node_of, 6)
    nodes = len(set(node_of))
    ways = ("after", "between", "thread")
    for way, row in zip(ways, vhosts(hosts, 6, ",".join(ways)), strict=True):
        assert row["way"] == way
        assert row["digests"] == expected["digests"]
        assert len(set(row["digests"])) == 1
        best = 2 * row["size"] * (nodes - 1) / nodes
        assert all(0.99 * best < sent < 1.02 * best for sent in row["sent"]), (row["sent"], best)


def test_ways_are_tried_and_bfloat16_halves_the_bytes(vhosts):
    tried, exact = vhosts("h0:2,h1:2", 20, "trial,between")
    assert tried["way"] in ("after", "between", "thread")
    assert tried["digests"] == exact["digests"]
    (short,) = vhosts("h0:2,h1:2", 20, "between", "bf16")
    assert len(set(short["digests"])) == 1
    assert short["digests"] != exact["digests"]
    for sent, all_sent in zip(short["sent"], exact["sent"]):
        assert sent == pytest.approx(all_sent / 2, rel=0.02)


def test_a_run_says_of_every_bucket_when_it_was_full(vhosts, tmp_path):
    run = tmp_path / "run"
    options = ["--train.run_folder", str(run), "--train.steps", "12", "--train.validate_steps", "12"]
    command = [sys.executable, "-m", "hpctrain", "train", *options, "--report.pictures", "false"]
    vhosts.script("run", "2", "h0:1,h1:1", "-x", "PYTHONPATH", *command)
    found = rows((run / "metrics.jsonl").read_text(encoding="utf-8"))
    (buckets,) = [row["buckets"] for row in found if row["event"] == "buckets"]
    assert {bucket["ready_seconds"]["rank"] for bucket in buckets} <= {0, 1}
    moments = [bucket["ready_seconds"]["min"] for bucket in buckets]
    assert min(moments) > 0.0
    assert moments == sorted(moments), "buckets leave in the order in which they are full"


def test_a_slow_network_moves_the_cut_to_where_little_crosses_it(vhosts, tmp_path):
    """512 KiB a message at the middle take 0.1 s at 40 Mbit/s, where a stage computes some 0.02 s; 4 KiB nothing."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"], file["y"] = np.ones((2048, 5), np.float32), np.ones((2048, 2), np.float32)
    toml = (
        '[data]\nfiles = "a.h5"\ninputs = "x"\ntargets = "y"\n[model]\nclass_path = "stage_models.waisted"\n'
    )
    toml += "[train]\nbatch = 2048\nthreads = 1\n[parallel]\nstages = 2\nmicro_batches = 8\n"
    (tmp_path / "a.toml").write_text(toml)
    tests = str(HERE.parent)

    def first_of_stage_1():
        line = ["env", f"PYTHONPATH={HERE.parent.parent}:{tests}", sys.executable, "-m", "hpctrain", "train"]
        text = vhosts.script("run", "2", "h0:1,h1:1", *line, str(tmp_path / "a.toml"), "--dry-run")
        (row,) = re.findall(r"^.*\|? +1 +1 .* (\d+) … \d+$", text, re.M)
        assert "messages between nodes at " in text, text
        return int(row)

    try:
        vhosts.script("shape", "40mbit")
        slow = first_of_stage_1()
    finally:
        vhosts.script("shape", "1gbit")
    assert slow == 9, "the layer behind the narrow one"
    assert first_of_stage_1() > slow


@pytest.mark.parametrize(
    ("hosts", "stages", "schedule"), [("h0:2,h1:1,h2:1", 4, "zb-h2"), ("h0:2,h1:1,h2:1", 2, "interleaved")]
)
def test_stages_lie_across_hosts_and_equal_one_process(vhosts, hosts, stages, schedule):
    """The default recipe's U-Net, whose skips cross the link; replicas of the last stages too, two a rank.

    With as many threads on each: kernels cut their sums by them.
    """
    ranks = sum(int(host.split(":")[1]) for host in hosts.split(","))
    command = [sys.executable, "-m", "hpctrain", "verify", "--parallel.stages", str(stages)]
    command += ["--parallel.schedule", schedule, "--train.threads", "1"]  # hosts of one rank would take two
    text = vhosts.script("run", str(ranks), hosts, "-x", "PYTHONPATH", *command)
    assert (
        f"equal: 3 steps of {ranks // stages} replica{'s' * (ranks > stages)} x {stages} stages against 1 x 1"
        in text
    )
