"""Run `hpctrain bench allreduce` and `bench step` at 2 and 4 ranks; write docs/averaging.png and tables.

Usage: python benchmarks/averaging.py [--ranks 2 4] [--output docs]
Needs the mpirun of Open MPI on PATH; takes some minutes. The tables go to standard output.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ENVIRONMENT = {
    **os.environ,
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}


def measured(what: str, start: list[str], cases: tuple[str, ...] = (), **more: str) -> list[dict]:
    """Run one bench, started by some words and with more in the environment; give its rows."""
    command = [*start, sys.executable, "-m", "hpctrain", "bench", what, "--json"]
    for case in cases:
        command += ["--case", case]
    done = subprocess.run(command, env=ENVIRONMENT | more, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout[done.stdout.index("{") :])["rows"]


def mpirun(ranks: int) -> list[str]:
    """Give the words that start ranks here, bound to cores as MPI does it, where there are as many."""
    more = ranks > len(os.sched_getaffinity(0))
    return [
        "mpirun",
        *(["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"] if more else []),
        "-n",
        str(ranks),
    ]


def table(rows: list[dict]) -> str:
    """Markdown: medians in milliseconds (quartiles), and how many times slower each peer is."""
    names = list(rows[0]["seconds"])
    lines = ["| case | ranks | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for row in rows:
        cells = []
        for name in names:
            low, high = (1e3 * value for value in row["spread"][name])
            text = f"{1e3 * row['seconds'][name]:.3g} ({low:.3g}–{high:.3g})"
            cells.append(text if name == "ours" else f"{text} **{row['ratio'][name]:.2f}×**")
        lines.append(f"| {row['case']} | {row['ranks']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    """Time against size, a panel for each number of ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counts = sorted({row["ranks"] for row in rows})
    figure, axes = pyplot.subplots(1, len(counts), figsize=(5 * len(counts), 4), sharey=True, squeeze=False)
    for axis, count in zip(axes[0], counts):
        mine = [row for row in rows if row["ranks"] == count]
        for name in ("gloo", "openmpi", "ours", "limit"):
            style = "--" if name == "limit" else "-o"
            axis.loglog(
                [r["bytes"] for r in mine], [1e3 * r["seconds"][name] for r in mine], style, label=name
            )
        axis.set(title=f"{count} ranks", xlabel="bytes", ylabel="milliseconds")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    """Measure, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--output", type=Path, default=Path("docs"))
    asked = parser.parse_args()
    sums = [row for ranks in asked.ranks for row in measured("allreduce", mpirun(ranks))]
    draw(sums, asked.output / "averaging.png")
    print(table(sums), end="\n\n")
    print(table([row for ranks in asked.ranks for row in measured("step", mpirun(ranks))]))


if __name__ == "__main__":
    main()
