"""Log lines begin `r0/4 s1 |`: which rank of how many, and its stage where there are several."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TextIO

from hpctrain.topology import Topology

LOGGER = logging.getLogger("hpctrain")
ALIKE = {"alike": True}
"""`extra` of a warning that every rank finds alike: world rank 0 shows it."""
EARLY = 10_000
"""Lines that are kept for the file, at most."""


def prefix(world_rank: int, world_size: int, stage: int = 0, stages: int = 1) -> str:
    """Give the beginning of each log line.

    >>> prefix(0, 4), prefix(5, 8, stage=1, stages=2)
    ('r0/4 | ', 'r5/8 s1 | ')
    """
    return f"r{world_rank}/{world_size} " + (f"s{stage} | " if stages > 1 else "| ")


def counted(number: int, what: str) -> str:
    """Write a number and what it counts.

    >>> counted(1, "rank"), counted(4096, "step"), counted(2, "micro-batch")
    ('1 rank', '4,096 steps', '2 micro-batches')
    """
    several = "es" if what.endswith("ch") else "s"
    return f"{number:,} {what}{several if number != 1 else ''}"


class Screen(logging.StreamHandler[TextIO]):
    """Standard output as it is now: a progress bar stands in for it while it is shown."""

    @property
    def stream(self) -> TextIO:
        """Give the current standard output."""
        return sys.stdout

    @stream.setter
    def stream(self, value: TextIO) -> None:
        pass


def start(topology: Topology) -> None:
    """Log to standard output: world rank 0 everything, the other ranks warnings. Local.

    What is logged before there is a file is kept for it.
    """
    LOGGER.handlers.clear()
    LOGGER.propagate = False
    LOGGER.setLevel(logging.INFO if topology.world_rank == 0 else logging.WARNING)
    LOGGER.addHandler(_formatted(Screen(), topology))
    LOGGER.addHandler(MemoryHandler(EARLY, flushLevel=logging.CRITICAL + 1, flushOnClose=False))


@contextmanager
def silent() -> Iterator[None]:
    """Log nothing while the body runs: what it would say has been said. Local."""
    level = LOGGER.level
    LOGGER.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        LOGGER.setLevel(level)


class File(logging.FileHandler):
    """The run's log.txt; where it can't be written any more, that is said once, and the run goes on."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Take it away."""
        if self in LOGGER.handlers:
            LOGGER.removeHandler(self)
            LOGGER.warning("%s can't be written any more: %s", self.baseFilename, sys.exc_info()[1])


def to_file(path: Path, topology: Topology) -> None:
    """Append this rank's lines to the run's log.txt as well, those of before too. Local."""
    file = _formatted(File(path, encoding="utf-8", errors="backslashreplace"), topology)
    for early in [handler for handler in LOGGER.handlers if isinstance(handler, MemoryHandler)]:
        early.setTarget(file)
        early.flush()
        LOGGER.removeHandler(early)
    LOGGER.addHandler(file)


def failed(text: str) -> None:
    """Write why the run fails into log.txt alone: the screen has it as the last thing. Local."""
    for handler in LOGGER.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(
                LOGGER.makeRecord(LOGGER.name, logging.ERROR, __file__, 0, "failed: %s", (text,), None)
            )


def _formatted(handler: logging.Handler, topology: Topology) -> logging.Handler:
    handler.addFilter(lambda record: topology.world_rank == 0 or not hasattr(record, "alike"))
    start_of_line = prefix(topology.world_rank, topology.world_size, topology.stage, topology.stages)
    handler.setFormatter(logging.Formatter(start_of_line.replace("%", "%%") + "%(message)s"))
    return handler
