"""What a cut is chosen by, and what was chosen."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from mpi4py import MPI

from hpctrain.pipeline.profile import Limits, Work


@dataclass(frozen=True)
class Plan:
    """A schedule that may be chosen."""

    schedule: str
    virtual: int
    """Stages of a rank."""
    lives: list[list[tuple[int, int]]]
    """By stage, as `simulate` finds them."""
    worth: float = 1.0
    """By how much its simulated step must be shorter than that of the plans before it."""


@dataclass(frozen=True)
class Wire:
    """What messages from one rank to another take; nothing on a node."""

    latency: float = 0.0
    """Seconds."""
    per_byte: float = 0.0
    """Seconds."""

    def seconds(self, size: float) -> float:
        """Give those of a message of so many bytes."""
        return self.latency + self.per_byte * size


@dataclass
class Scales:
    """What a cut is chosen by, alike on all ranks."""

    comm: MPI.Intracomm
    """All ranks."""
    ranks: list[list[int]]
    """By rank of a pipeline: those of `comm` that run its stages."""
    limits: Callable[[], Limits]
    """Gives the bytes that stages may take, as far as this rank knows."""
    plans: list[Plan]
    """The schedules to choose from; the first one has the fewest stages."""
    micro_batches: int
    """Of a replica."""
    copies: float
    """Bytes that a byte of trained weights takes in all: itself, its gradient, the optimizer's."""
    least: float = 1.0
    """The same, as far as it is certain, on the rank with the least."""
    fewest: float = 1.0
    """Samples of the smallest micro-batch, by those of the largest."""
    around: AbstractContextManager[Any] = field(default_factory=nullcontext)
    """What passes run under."""
    turn: tuple[int, int] = (0, 1)
    """This rank's of how many: those that share cores measure one after the other."""
    recompute: str = "never"
    """"auto", "always" or "never": whether stages but the last let forward's graphs go."""
    splits: str = "auto"
    """"auto", "always" or "never": whether a backward runs in halves; auto: where that is repaid."""
    wires: list[Wire] = field(default_factory=list)
    """By rank of a pipeline: to the next one, from the last one to the first; empty: free messages."""


@dataclass(frozen=True)
class Need:
    """What a stage takes of its rank's memory, in bytes."""

    held: float
    """Weights, gradients and the optimizer's numbers."""
    kept: float
    """From forward to backward of one micro-batch."""
    times: int
    """The most micro-batches at once between forward and backward."""
    more: float
    """What waits with weight gradients, messages, and what a pass takes for itself."""
    limit: float
    """What the stage may take: its share of its rank's."""

    @property
    def most(self) -> float:
        """At its peak."""
        return self.with_holes(1.0)

    def with_holes(self, times: float) -> float:
        """At its peak, where what comes and goes takes so many times its size."""
        return self.held + times * (self.times * self.kept + self.more)


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
    """That could be cut apart otherwise; 0 where the user names the cuts."""
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
    exact: bool = False
    """Whether memory asks for large tensors to be given back one by one."""
    said: list[str] = field(default_factory=list)
    """For the log."""
    warned: list[str] = field(default_factory=list)
    schedule: str = ""
    """The one that was chosen by measured times; empty where there are none."""
    at_once: list[int] = field(default_factory=list)
    """Pieces whose weight gradients are to wait only in a step's last micro-batches."""
    seconds: float = 0.0
    """Of a step, simulated; 0 where nothing is measured."""
    wires: list[Wire] = field(default_factory=list)
    """By stage, to the next one; empty where not measured."""
    shared: bool = False
    """Whether pieces share weights."""

    def wire(self, stage: int, other: int) -> float:
        """Seconds of a message between neighbours, either way; of others they are part. Pure."""
        if abs(stage - other) > 1 or not self.wires:
            return 0.0
        first = min(stage, other)
        return self.wires[first].seconds(self.passes[first].gives)
