"""Train a model that one rank's memory can't hold, in 4 stages, under a limit that the kernel enforces.

Usage: python benchmarks/limited.py [--limit 900] [--rounds 3]
Weights, gradients and Adam's moments take a gibibyte. `ulimit -d` holds each rank below so many MiB, its
libraries and activations included. One process under the limit, then 4 stages under it and without, in turn.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
from averaging import ENVIRONMENT, mpirun
from torch import nn

STEPS, BATCH = 8, 64
TOML = f"""\
[data]
files = "data.h5"
inputs = "x"
targets = "y"
[model]
class_path = "limited.heavy"
[optimizer]
class_path = "torch.optim.Adam"
[train]
batch = {BATCH}
steps = {STEPS}
[parallel]
micro_batches = 8
[report]
pictures = false
"""


def heavy(in_features: int, out_features: int, width: int = 4096) -> nn.Sequential:
    """Four layers of 64 MiB."""
    layers: list[nn.Module] = [nn.Linear(in_features, width)]
    for _ in range(4):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, out_features))


def run(folder: Path, stages: int, limit: int | None) -> tuple[list[dict], str]:
    """Train in so many stages, at most `limit` MiB a rank; give the rows of its steps, and what was said."""
    name = folder / f"run-{len(list(folder.glob('run-*')))}"
    words = [sys.executable, "-m", "hpctrain", "train", "heavy.toml", "--train.run_folder", str(name)]
    words += ["--parallel.stages", str(stages)]
    under = f"ulimit -d {1024 * limit if limit else 'unlimited'}; exec {shlex.join(words)}"
    more = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [*mpirun(stages), "bash", "-c", under],
        cwd=folder,
        env=ENVIRONMENT | more,
        capture_output=True,
        text=True,
    )
    lines = (name / "metrics.jsonl").read_text().splitlines() if (name / "metrics.jsonl").is_file() else []
    rows = [row for row in map(json.loads, lines) if row["event"] == "train"]
    return rows, done.stdout + done.stderr


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=int, default=900, help="MiB a rank")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "heavy.toml").write_text(TOML)
        random = np.random.default_rng(0)
        with h5py.File(folder / "data.h5", "w") as file:
            file["x"], file["y"] = (random.normal(size=(4 * BATCH, n)).astype("f4") for n in (64, 8))
        rows, text = run(folder, 1, asked.limit)
        said = next((line for line in text.splitlines() if "error" in line or "failed" in line), text[-300:])
        print(f"1 process, at most {asked.limit} MiB: {len(rows)} of {STEPS} steps; {said}", flush=True)
        seconds: dict[str, list[float]] = {}
        losses = set()
        for _ in range(asked.rounds):
            for limit in (asked.limit, None):
                rows, text = run(folder, 4, limit)
                if len(rows) < STEPS:
                    sys.exit(
                        f"4 stages, at most {limit} MiB a rank: {len(rows)} of {STEPS} steps\n{text[-2000:]}"
                    )
                place = f"at most {limit} MiB a rank" if limit else "no limit"
                seconds.setdefault(place, []).extend(BATCH / row["samples_per_second"] for row in rows[2:])
                losses.add(tuple(row["loss"] for row in rows))
        for place, found in seconds.items():
            low, middle, high = statistics.quantiles(found, n=4)
            print(f"4 stages, {place}: {middle:.3f} s a step ({low:.3f} to {high:.3f})")
        print("the same losses, bit for bit" if len(losses) == 1 else f"other losses: {losses}")


if __name__ == "__main__":
    main()
