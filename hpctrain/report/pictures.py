"""Pictures of a run: the loss and the metric against the baselines, and one sample on maps."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `prepare` runs before MPI and torch may start, and this would start both
    from hpctrain.pipeline.simulate import Simulation
    from hpctrain.task import Maps

BACKWARD = "#f0a868"
COLOURS = {"Forward": "#8fb8de", "Backward": BACKWARD, "BackwardInput": BACKWARD, "BackwardWeight": "#9dc08b"}
"""By kind of pass."""
KINDS = {
    "Forward": "forward",
    "Backward": "backward",
    "BackwardInput": "gradient of the input",
    "BackwardWeight": "gradients of the weights",
}
"""What the legend says."""


def prepare() -> None:
    """Import matplotlib; call it before MPI_Init.

    Its first import may start `fc-list` to look for fonts, and a rank starts no process.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.font_manager


def curves(rows: list[dict[str, Any]], metric: str, path: Path) -> None:
    """Draw loss over steps, and a metric over epochs beside its baselines, into one PNG."""
    from matplotlib import pyplot

    train = [row for row in rows if row["event"] == "train" and row["loss"] is not None]
    tested = [row for row in rows if row["event"] == "validate" and row.get(metric) is not None]
    starts = [row for row in rows if row["event"] == "start"] or [{}]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    left.plot([row["step"] for row in train], [row["loss"] for row in train], lw=0.7, alpha=0.5)
    smooth = moving_mean([row["loss"] for row in train], max(1, len(train) // 20))
    left.plot([row["step"] for row in train], smooth, color="C0", label="training loss")
    scale = "log" if all(row["loss"] > 0 for row in train) else "linear"  # log-likelihoods may be negative
    left.set(xlabel="optimizer step", ylabel="loss", yscale=scale, title="Loss")
    left.legend()
    for at, split in enumerate(sorted({row["split"] for row in tested})):
        mine = [row for row in tested if row["split"] == split]
        label = f"hpctrain, {split}: {mine[-1][metric]:.4g}"
        right.plot(
            [r["epoch"] for r in mine], [r[metric] for r in mine], "o-", ms=3, color=f"C{at}", label=label
        )
    values = {
        name: found[metric] for name, found in starts[-1].get("baselines", {}).items() if metric in found
    }
    for at, (name, value) in enumerate(sorted(values.items(), key=lambda item: -item[1])):
        right.axhline(value, ls="--", lw=1, color=f"C{at + 3}", label=f"{name}: {value:.4g}")
    right.set(xlabel="epoch", ylabel=metric.replace("_", " "), title=metric.replace("_", " "))
    if tested or values:
        right.legend(fontsize=8)
    save(figure, path)


def moving_mean(values: list[float], width: int) -> list[float]:
    """Mean over the last `width` values up to each.

    >>> moving_mean([1.0, 3.0, 5.0], 2)
    [1.0, 2.0, 4.0]
    """
    return [
        sum(values[max(0, at + 1 - width) : at + 1]) / len(values[max(0, at + 1 - width) : at + 1])
        for at in range(len(values))
    ]


def maps(found: "Maps", path: Path) -> None:
    """Draw maps beside one another with axes in degrees and one colour bar in their units."""
    import numpy as np
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 6), constrained_layout=True, sharex=True, sharey=True)
    most = float(np.abs(found.panels[-1].values).max())
    image = None
    for axis, panel in zip(axes.flat, found.panels):
        image = axis.pcolormesh(
            found.longitude,
            found.latitude,
            panel.values,
            cmap="RdBu_r",
            vmin=-most,
            vmax=most,
            shading="nearest",
        )
        axis.set_title(panel.title)
    for axis in axes[-1]:
        axis.set_xlabel("longitude (°E)")
    for axis in axes[:, 0]:
        axis.set_ylabel("latitude (°N)")
    if image is not None:
        figure.colorbar(image, ax=axes, label=f"{found.title} ({found.units})")
    save(figure, path)


def timeline(found: "Mapping[str, Simulation]", title: str, path: Path) -> None:
    """Draw the passes of a step, a row a rank: as measured, and below as simulated, on one axis of time."""
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    first = next(iter(found.values()))
    ranks, rows = len(first.busy), len(found)
    figure, axes = pyplot.subplots(
        rows, 1, figsize=(11, 1.1 + rows * (0.6 + 0.35 * ranks)), constrained_layout=True,
        sharex=True, sharey=True, squeeze=False,
    )  # fmt: skip
    for axis, (name, one) in zip(axes[:, 0], found.items()):
        for span in one.spans:
            kind = type(span.instruction).__name__
            where = 1e3 * span.start, 1e3 * (span.end - span.start)
            row = span.stage % ranks
            axis.broken_barh([where], (row - 0.4, 0.8), color=COLOURS[kind], edgecolor="white", lw=0.5)
            if span.end - span.start > 0.02 * first.seconds:
                axis.text(
                    sum(where) - where[1] / 2,
                    row,
                    str(span.instruction)[1:],
                    ha="center",
                    va="center",
                    fontsize=7,
                )
        axis.set(
            ylabel="pipeline rank",
            yticks=range(ranks),
            title=f"{title}, {name}: {1e3 * one.seconds:,.1f} ms, idle {one.bubble:.0%}",
        )
    axes[0, 0].invert_yaxis()
    virtual = any(span.instruction.virtual for span in first.spans)
    second = ", a ' is the rank's next virtual stage" if virtual else ""
    axes[-1, 0].set_xlabel(f"time (ms); the numbers are micro-batches{second}")
    kinds = {type(span.instruction).__name__ for span in first.spans}
    labels: dict[str, list[str]] = {}
    for kind, colour in COLOURS.items():
        if kind in kinds:
            labels.setdefault(colour, []).append(KINDS[kind])
    handles = [Patch(color=colour, label=", ".join(names)) for colour, names in labels.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a figure and close it."""
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
