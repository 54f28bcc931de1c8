"""What a step shows: a bar on a terminal, plain lines in a batch log."""

import os
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hpctrain.log import LOGGER

WIDE = 130
"""Columns that the bar with everything beside it takes."""


def on_terminal() -> bool:
    """Tell whether a person watches standard output.

    mpirun gives its ranks a terminal of its own even where it writes to a file itself, so
    under a launcher the launcher's standard output is looked at.
    """
    if not sys.stdout.isatty():
        return False
    if "PMIX_RANK" not in os.environ:
        return True
    try:
        target = os.readlink(f"/proc/{os.getppid()}/fd/1")
    except OSError:
        return False
    return target.startswith(("/dev/pts/", "/dev/tty"))


class ProgressView:
    """Shows the steps on world rank 0; a context manager."""

    def __init__(self, total: int, done: int, shows: bool, log_seconds: float) -> None:
        """Take all steps, the steps done before, and whether this rank shows anything."""
        self.total, self.shows, self.log_seconds = total, shows, log_seconds
        self.bar: Progress | None = None
        self.wide = True
        """Whether there is room for all that is to be said."""
        self.last = time.perf_counter()
        self.began, self.first = self.last, done
        self.due = shows
        self.samples, self.seconds, self.rate = 0, 0.0, 0.0
        if shows and on_terminal():
            width = terminal_width()
            self.wide = width >= WIDE
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24 if self.wide else 8),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
            )
            console = Console(force_terminal=True, width=width)
            self.bar = Progress(*columns, console=console)
            self.task = self.bar.add_task("train", total=total, completed=done, note="")

    def __enter__(self) -> "ProgressView":
        """Start the bar."""
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the bar."""
        if self.bar:
            self.bar.stop()

    def step(self, done: int, loss: float, samples: int, seconds: float, shares: dict[str, float]) -> None:
        """Show that `done` steps are done, the last one on so many samples of all ranks in so many seconds.

        The rate is of all steps since the last line, on a bar of a second's: an epoch's last batch is short.
        """
        if not self.shows:
            return
        self.samples, self.seconds = self.samples + samples, self.seconds + seconds
        now = time.perf_counter()
        due = now - self.last >= self.log_seconds or done == self.total or self.due
        if not (self.bar or due):
            return
        rate = self.samples / self.seconds
        if not self.bar or self.seconds >= 1.0:
            self.samples, self.seconds, self.rate = 0, 0.0, rate
        note = f"loss {loss:.4g} | {self.rate or rate:,.0f} samples/s"
        if self.wide:
            note += " | " + " ".join(f"{name} {share:.0%}" for name, share in shares.items())
        if self.bar:
            self.bar.update(self.task, completed=done, note=note)
        else:
            left = (self.total - done) * (now - self.began) / max(1, done - self.first)
            LOGGER.info("step %d/%d | %s | %s left", done, self.total, note, clock(left))
            self.last, self.due = now, False


class MeasureView:
    """Shows on world rank 0 how far a split is measured: nothing where it is soon done."""

    def __init__(self, split: str, total: int, shows: bool, log_seconds: float) -> None:
        """Take the split, this replica's samples of it, and whether this rank shows anything."""
        self.split, self.total, self.shows, self.log_seconds = split, total, shows, log_seconds
        self.done, self.began = 0, time.perf_counter()
        self.last = self.began

    def batch(self, samples: int) -> None:
        """Show that so many samples more are measured, or on their way through the stages."""
        self.done += samples
        now = time.perf_counter()
        if not self.shows or now - self.last < self.log_seconds or self.done == self.total:
            return
        left = (self.total - self.done) * (now - self.began) / self.done
        LOGGER.info(
            "measuring %s | %s of this replica's %s samples | %s left",
            *(self.split, f"{self.done:,}", f"{self.total:,}", clock(left)),
        )
        self.last = now


def clock(seconds: float) -> str:
    """Write a duration.

    >>> clock(59), clock(3725)
    ('0:59', '1:02:05')
    """
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    start = f"{hours}:{minutes:02d}" if hours else f"{minutes}"
    return f"{start}:{whole % 60:02d}"


def terminal_width() -> int:
    """Columns of the terminal, 100 where it does not say (mpirun's own says 0)."""
    try:
        return os.get_terminal_size().columns or 100
    except OSError:
        return 100
