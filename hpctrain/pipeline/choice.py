"""What a cut is chosen by, and what was chosen."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from mpi4py import MPI

from hpctrain.pipeline.profile import Work


@dataclass(frozen=True)
class Plan:
    """A schedule that may be chosen."""

    schedule: str
    virtual: int
    """Stages of a rank."""
    kept: list[int]
    """By stage: the most micro-batches on their way at once."""
    worth: float = 1.0
    """By how much its simulated step must be shorter than that of the plans before it."""


@dataclass
class Scales:
    """What a cut is chosen by, alike on all ranks."""

    comm: MPI.Intracomm
    """All ranks."""
    ranks: list[list[int]]
    """By rank of a pipeline: those of `comm` that run its stages."""
    limits: list[float]
    """By rank of a pipeline: the bytes that its stages may take."""
    plans: list[Plan]
    """The schedules to choose from; the first one has the fewest stages."""
    micro_batches: int
    """Of a replica."""
    copies: float
    """Bytes that a byte of weights takes in all: itself, its gradient, the optimizer's."""
    around: AbstractContextManager[Any] = field(default_factory=nullcontext)
    """What passes run under."""
    turn: tuple[int, int] = (0, 1)
    """This rank's of how many: those that share cores measure one after the other."""
    recompute: str = "never"
    """"auto", "always" or "never": whether stages but the last let forward's graphs go."""
    splits: str = "auto"
    """"auto", "always" or "never": whether a backward runs in halves; auto: where that is repaid."""


@dataclass(frozen=True)
class Need:
    """What a stage takes of its rank's memory, in bytes."""

    held: float
    """Weights, gradients and the optimizer's numbers."""
    kept: float
    """From forward to backward of one micro-batch."""
    times: int
    """The most micro-batches on their way at once."""
    limit: float
    """What the stage may take: its share of its rank's."""

    @property
    def most(self) -> float:
        """At its peak."""
        return self.held + self.times * self.kept


@dataclass
class Choice:
    """Where stages begin and end, and what is known of them."""

    parts: list[tuple[int, int]]
    """By stage: the first piece, and the one behind the last."""
    passes: list[Work] = field(default_factory=list)
    """By stage: what its pieces cost together; empty where not measured."""
    needs: list[Need] = field(default_factory=list)
    """By stage; empty where not measured."""
    pieces: int = 0
    """That can be cut apart; 0 where the user names the cuts."""
    works: list[Work] = field(default_factory=list)
    """Of each piece, on a rank of speed 1; empty where not measured."""
    names: list[str] = field(default_factory=list)
    """Of each piece: the module that it begins with."""
    weights: list[float] = field(default_factory=list)
    """Of each piece: bytes; what several use is the first one's."""
    ranks: list[list[int]] = field(default_factory=list)
    """As in `Scales`; empty where not measured."""
    recompute: bool = False
    """Whether memory asks for it."""
    said: list[str] = field(default_factory=list)
    """For the log."""
    warned: list[str] = field(default_factory=list)
    schedule: str = ""
    """The one that was chosen by measured times; empty where there are none."""
    at_once: list[int] = field(default_factory=list)
    """Pieces whose weight gradients are not to wait."""
    seconds: float = 0.0
    """Of a step, simulated; 0 where nothing is measured."""
    shared: bool = False
    """Whether pieces share weights."""
