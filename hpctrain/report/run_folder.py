"""The run folder: config.toml, metrics.jsonl, log.txt, checkpoints/, pictures/.

One object a line in metrics.jsonl, each with `event`, `step`, `time`. After a resume a later
row replaces an earlier one of the same event and step; `rows` reads it so.
"""

import json
import math
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import tomlkit
from filelock import FileLock, Timeout

from hpctrain.checkpoint.files import write_whole
from hpctrain.config import Config, to_dict
from hpctrain.errors import ConfigError, HpctrainError
from hpctrain.log import LOGGER

LOCK_SECONDS = 15.0
"""A job that was killed may hold its folder for some seconds more."""


class RunFolder:
    """A run's folder; only world rank 0 writes, on the others every call does nothing."""

    def __init__(self, path: Path, writes: bool) -> None:
        """Take the folder and whether this rank writes."""
        self.path, self.writes = path, writes
        self._lock: FileLock | None = None
        self._met = False
        """Whether a run was there when the folder was asked for."""

    @property
    def begun(self) -> bool:
        """Whether a run has begun in the folder."""
        return (self.path / "config.toml").is_file()

    def hold(self, new: bool = False) -> None:
        """Keep other jobs out of a folder that holds a run until `close` or this process' death. Local.

        Two jobs in one run folder would write into each other's checkpoints. A filesystem that
        knows no locks is used without one, with a warning.
        """
        if not self.writes or self._lock is not None:
            return
        self._met = self._met or (not new and self.begun)
        if not new and not self._met:
            return
        # a soft lock, which it takes by itself elsewhere, would outlive a job that was killed
        lock = FileLock(self.path / ".lock", fallback_to_soft=False)
        try:
            try:
                lock.acquire(timeout=1)
            except Timeout:
                LOGGER.info("%s is in use by another job: waiting up to %d s", self.path, LOCK_SECONDS)
                lock.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            raise ConfigError(
                f"{self.path} is in use by another job that trains into it: wait for its end, or "
                f"choose another --train.run_folder"
            ) from None
        except (OSError, NotImplementedError) as error:  # where it is read-only, writing will tell
            LOGGER.warning("%s is not locked (%s): let no other job train into it", self.path, error)
            return
        self._lock = lock

    def close(self) -> None:
        """Let other jobs in. Local."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def pictures(self) -> Path:
        """Folder of the pictures."""
        return self.path / "pictures"

    @property
    def log(self) -> Path:
        """The log file."""
        return self.path / "log.txt"

    def create(self, config: Config, resumes: bool = False) -> None:
        """Make the folder and write the resolved configuration; a new run begins new metrics."""
        if not self.writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.hold(new=True)
            if self.begun and not (self._met or resumes):
                raise ConfigError(
                    f"{self.path} was empty when this job started, and another job has trained into it "
                    f"since: start again to go on with that run, or choose another --train.run_folder"
                )
            self._met = True
            text = "# The resolved configuration of this run; repeat it with\n"
            text += f"# hpctrain train {self.path / 'config.toml'} --train.run_folder NEW\n\n"
            write_whole(self.path / "config.toml", text + tomlkit.dumps(to_dict(config)))
            if not resumes:
                (self.path / "metrics.jsonl").unlink(missing_ok=True)
            end_last_line(self.path / "metrics.jsonl")
        except OSError as error:
            raise ConfigError(f"train.run_folder = {self.path} can't be written: {error}") from None

    def row(self, event: str, step: int, **values: Any) -> None:
        """Append one row; numbers that are not finite become null, as JSON has none.

        Raises HpctrainError where it can't be written whole; then nothing of it is.
        """
        if not self.writes:
            return
        entry = {"event": event, "step": step, "time": round(time.time(), 3), **values}
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        path = self.path / "metrics.jsonl"
        size = path.stat().st_size if path.is_file() else 0
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(clean) + "\n")
        except OSError as error:
            with suppress(OSError):
                os.truncate(path, size)
            raise HpctrainError(
                f"{path} can't be written ({error}): free space, or set train.run_folder"
            ) from None


def end_last_line(path: Path) -> None:
    """End a line that a kill cut short: the next row must not join it."""
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def rows(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl, later rows of the same event and step in the place of earlier ones.

    A line that a kill cut short is passed over.
    """
    found: dict[tuple[str, int, str], dict[str, Any]] = {}
    if not path.is_file():
        return []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[(row["event"], row["step"], row.get("split", ""))] = row
    return list(found.values())
