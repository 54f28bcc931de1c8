"""Run `hpctrain bench pipeline` where links differ; write docs/pipeline-speed.png, -passes.png and tables.

Usage: python benchmarks/pipeline.py [--ranks 2 4] [--hosts] [--output docs]
One node with and without cross-memory attach (containers forbid it), and with --hosts (as root, on Linux) two
virtual hosts joined by a link without and with a limit of 1 Gbit/s. Some 25 minutes on 2 cores.
"""

import argparse
import os
import subprocess
import tempfile
from pathlib import Path

from averaging import measured, mpirun, table

from hpctrain.pipeline.schedule import SHORT
from hpctrain.pipeline.simulate import Simulation, Span
from hpctrain.report.pictures import timeline

HOSTS = Path(__file__).parent.parent / "tests" / "cluster" / "vhosts.sh"
CASES = ("mlp m=8", "mlp m=16", "mlp m=32", "transformer m=8", "cnn m=8", "cnn channels_last m=8")
FEW = ("mlp m=8", "cnn m=8")
ASLEEP = ("emulated m=8",)
"""Stages that sleep, so that four can be judged on fewer cores; the picture of passes is of them."""
PEERS = ("ours_1f1b", "ours_zb_h1", "ours_zb_h2", "ours_interleaved", "ours_operators")
PEERS += ("ours_plain", "ours_autograd")
PEERS += ("torch_1f1b", "torch_gpipe", "torch_zb", "torch_dualpipev", "limit")


def between_hosts(rates: list[str]) -> dict[str, list[dict]]:
    """Measure two hosts of one rank each, a thread a rank, by the rate of their link."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"VHOSTS_DIR": folder}
        try:
            subprocess.run([HOSTS, "up", "2"], check=True, env=environment)
            for rate in rates:
                subprocess.run([HOSTS, "shape", rate], check=True, env=environment)
                start = [str(HOSTS), "run", "2", "h0:1,h1:1", "-x", "OMP_NUM_THREADS"]
                rows = measured("pipeline", start, FEW, OMP_NUM_THREADS="1", VHOSTS_DIR=folder)
                found |= told(f"two hosts, {'no limit' if rate == 'none' else rate}", rows)
        finally:
            subprocess.run([HOSTS, "down"], check=True, env=environment)
    return found


def told(place: str, rows: list[dict]) -> dict[str, list[dict]]:
    """Print a place's table, and give it by name."""
    print(f"{place}\n\n{table(rows)}\n", flush=True)
    return {place: rows}


def draw(found: dict[str, list[dict]], path: Path) -> None:
    """How many times as long as ours by default each takes, a panel a place."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(found), figsize=(4 * len(found), 4), sharey=True, squeeze=False, constrained_layout=True
    )
    for axis, (place, rows) in zip(axes[0], found.items()):
        for at, name in enumerate(PEERS):
            mine = [(x, row["ratio"][name]) for x, row in enumerate(rows) if name in row["ratio"]]
            places, colour = [x + 0.07 * (at - 5.5) for x, _ in mine], pyplot.get_cmap("tab20")(at)
            axis.bar(places, [y for _, y in mine], 0.07, label=name, color=colour)
        axis.axhline(1.0, color="black", lw=0.8)
        axis.set(title=place, xticks=range(len(rows)), ylabel="time ÷ ours (the default)")
        axis.set_xticklabels([row["case"] for row in rows], rotation=30, ha="right")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=(len(names) + 1) // 2, fontsize=8)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def draw_passes(row: dict, path: Path) -> None:
    """Draw the passes of a step by 1F1B and ZB-H1, a row a rank: as measured, and below as simulated."""
    kinds = {short: kind for kind, short in SHORT.items()}
    titles = {"ours_1f1b": "1f1b", "ours_zb_h1": "zb-h1"}
    found = {}
    for who, both in row["passes"].items():
        for how, passes in both.items():
            spans = [
                Span(p["stage"], kinds[p["pass"][0]](int(p["pass"][1:])), p["start"], p["end"])
                for p in passes
            ]
            busy = [sum(s.end - s.start for s in spans if s.stage == rank) for rank in range(row["ranks"])]
            found[f"{titles[who]}, {how}"] = Simulation(spans, busy=busy)
    timeline(found, row["case"], path)


def main() -> None:
    """Measure, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--hosts", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("docs"))
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    found = {}
    for ranks in asked.ranks:
        rows = measured("pipeline", mpirun(ranks), CASES)
        found |= told(f"{ranks} ranks", rows)
    rows = measured("pipeline", mpirun(4), ASLEEP)
    told("4 ranks that sleep", rows)
    draw_passes(rows[0], asked.output / "pipeline-passes.png")
    rows = measured("pipeline", mpirun(2), FEW, OMPI_MCA_smsc="^cma")
    found |= told("2 ranks, no cross-memory attach", rows)
    if asked.hosts:
        found |= between_hosts(["none", "1gbit"])
    draw(found, asked.output / "pipeline-speed.png")


if __name__ == "__main__":
    main()
