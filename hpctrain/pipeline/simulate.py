"""Runs a pipeline's programs dry: deadlock, order, bubble, kept activations, picture. All here is pure.

Every rank walks through its own program at once. A pass takes its cost, a message the time of its wire,
one behind the other; a receive waits for it. Who waits for something that nobody will send is a deadlock.

      start(pass)      = max(end of what stood before it on its rank, arrivals that it waits for)
      arrival(message) = max(its send, arrival of the one before it on its way) + wire

Messages of a way come in the order in which they are sent, so they must be taken in it; and a stage's
gradients add up as in one process only where its backward passes run in the order of the micro-batches.

Stage s is on rank s % ranks: there are as many stages as ranks, or several times as many (virtual ones).
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from hpctrain.errors import ConfigError, HpctrainError
from hpctrain.pipeline.schedule import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Instruction,
    Receive,
    ReceiveGradient,
    Send,
    SendGradient,
    programs,
)

Links = Mapping[int, Sequence[int]]
"""By stage: the later stages that want its activations."""


def chain(stages: int) -> dict[int, list[int]]:
    """Let each stage give to the next one alone.

    >>> chain(3)
    {0: [1], 1: [2], 2: []}
    """
    return {stage: [stage + 1] if stage + 1 < stages else [] for stage in range(stages)}


@dataclass(frozen=True)
class Span:
    """One pass of one stage, from start to end in seconds."""

    stage: int
    instruction: Instruction
    start: float
    end: float


@dataclass
class Simulation:
    """What a dry run found."""

    spans: list[Span] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    """By stage: the most micro-batches whose activations are kept at once."""
    busy: list[float] = field(default_factory=list)
    """By rank: seconds of work."""
    lives: list[list[tuple[int, int]]] = field(default_factory=list)
    """By stage: how many micro-batches are at once between forward and backward, and between the halves of
    a backward. Those that others exceed in both are left out."""

    @property
    def seconds(self) -> float:
        """From the first start to the last end."""
        return max((span.end for span in self.spans), default=0.0)

    @property
    def bubble(self) -> float:
        """Share of the ranks' time that is not work."""
        total = self.seconds * len(self.busy)
        return 1.0 - sum(self.busy) / total if total else 0.0

    def picture(self, unit: float) -> list[str]:
        """Draw ranks as rows and time to the right, a column each `unit` seconds."""
        columns, ranks = round(self.seconds / unit), len(self.busy)
        width = max((len(str(span.instruction)) for span in self.spans), default=1)
        rows = []
        for rank in range(ranks):
            cells = ["."] * columns
            for span in self.spans:
                if span.stage % ranks == rank:
                    for at in range(round(span.start / unit), round(span.end / unit)):
                        cells[at] = str(span.instruction)
            rows.append(" ".join(f"{cell:{width}}" for cell in cells).rstrip(" ."))
        return rows


Cost = Callable[[int, Instruction], float]
"""Seconds of a pass on a stage."""
WireTime = Callable[[int, int], float]
"""Seconds of a message from stage to stage: activations to a later one, gradients to an earlier one."""


def simulate(
    programs: Sequence[Sequence[Instruction]],
    cost: Cost,
    links: Links | None = None,
    wire: WireTime | None = None,
    back: Links | None = None,
) -> Simulation:
    """Run every rank's program. Pure. Raises HpctrainError for a deadlock and for what is out of order.

    `back`: by stage, the later stages that its gradients come from; without it those it gives to. Without
    `wire` messages take no time.
    """
    ranks = len(programs)
    virtual = 1 + max((i.virtual for program in programs for i in program), default=0)
    links = chain(ranks * virtual) if links is None else links
    machine = _Machine(programs, virtual, cost, links, links if back is None else back, wire)
    while any(machine.advance(rank) for rank in range(ranks)):
        pass
    waiting = [r for r in range(ranks) if machine.at[r] < len(programs[r])]
    if waiting:
        each = ", ".join(machine.where(rank) for rank in waiting)
        raise HpctrainError(f"deadlock: every stage waits for a message that is not sent: {each}")
    left = [(s, v) for s in range(ranks * virtual) for v in sorted(machine.live[s])]
    if left:
        raise HpctrainError(
            f"stage {left[0][0]} runs micro-batch {left[0][1]} forward and never all of its backward"
        )
    machine.found.lives = [most(pairs) for pairs in machine.lives]
    return machine.found


def most(pairs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Leave out the pairs that another one exceeds or equals in both numbers.

    >>> most([(1, 0), (2, 0), (1, 1), (0, 1)])
    [(1, 1), (2, 0)]
    """
    every = sorted(set(pairs))
    return [(a, b) for a, b in every if not any(c >= a and d >= b for c, d in every if (c, d) != (a, b))]


KINDS: dict[type[Instruction], str] = {Forward: "F", BackwardWeight: "W"}


class _Machine:
    """The state of a dry run."""

    def __init__(
        self,
        programs: Sequence[Sequence[Instruction]],
        virtual: int,
        cost: Cost,
        links: Links,
        back: Links,
        wire: WireTime | None,
    ) -> None:
        self.programs, self.cost, self.links, self.back, self.wire = programs, cost, links, back, wire
        self.ranks = len(programs)
        stages = self.ranks * virtual
        self.sources = {s: [o for o in range(stages) if s in links[o]] for s in range(stages)}
        self.targets = {s: [o for o in range(stages) if s in back[o]] for s in range(stages)}
        self.at, self.clock = [0] * self.ranks, [0.0] * self.ranks
        self.arrivals: dict[tuple[str, int, int, int], float] = {}
        self.on_the_way: dict[tuple[str, int, int], deque[int]] = {}
        """Micro-batches whose messages were sent and not taken yet, by kind and stages."""
        self.latest: dict[tuple[int, str], int] = {}
        """By stage and kind of pass: the micro-batch of the last backward."""
        self.free: dict[tuple[int, int], float] = {}
        """By way: when its last message has arrived."""
        self.live: list[set[int]] = [set() for _ in range(stages)]
        self.late: list[set[int]] = [set() for _ in range(stages)]
        """Those of them whose weight gradients wait."""
        self.lives: list[set[tuple[int, int]]] = [set() for _ in range(stages)]
        self.done: list[set[str]] = [set() for _ in range(stages)]
        self.found = Simulation([], [0] * stages, [0.0] * self.ranks)

    def where(self, rank: int) -> str:
        """Say at which instruction a rank stands."""
        instruction = self.programs[rank][self.at[rank]]
        return f"stage {instruction.virtual * self.ranks + rank} at {instruction}"

    def advance(self, rank: int) -> bool:
        """Run one rank as far as it goes; say whether it went on."""
        began = self.at[rank]
        while self.at[rank] < len(self.programs[rank]) and self.run(rank, self.programs[rank][self.at[rank]]):
            self.at[rank] += 1
        return self.at[rank] > began

    def run(self, rank: int, instruction: Instruction) -> bool:
        """Run one instruction; False where it must wait."""
        v, stage = instruction.micro_batch, instruction.virtual * self.ranks + rank
        match instruction:
            case Receive():
                return self.take(stage, [("F", s, stage, v) for s in self.sources[stage]], f"F in {v}")
            case ReceiveGradient():
                return self.take(stage, [("B", s, stage, v) for s in self.back[stage]], f"B in {v}")
            case Forward():
                self.need(stage, instruction, f"F in {v}" if self.sources[stage] else "")
                self.live[stage].add(v)
                self.found.kept[stage] = max(self.found.kept[stage], len(self.live[stage]))
            case Backward() | BackwardInput():
                self.need(stage, instruction, f"F {v}")
                self.need(stage, instruction, f"B in {v}" if self.back[stage] else "")
                if isinstance(instruction, Backward):
                    self.live[stage].discard(v)
                else:
                    self.late[stage].add(v)
            case BackwardWeight():
                self.need(stage, instruction, f"B {v}")
                self.live[stage].discard(v)
                self.late[stage].discard(v)
            case Send():
                self.need(stage, instruction, f"F {v}")
                self.give("F", stage, self.links[stage], v)
                return True
            case SendGradient():
                self.need(stage, instruction, f"B {v}")
                self.give("B", stage, self.targets[stage], v)
                return True
        late = len(self.late[stage])
        self.lives[stage].add((len(self.live[stage]) - late, late))
        kind = KINDS.get(type(instruction), "B")
        if f"{kind} {v}" in self.done[stage]:
            raise HpctrainError(f"stage {stage} runs {instruction} twice")
        self.done[stage].add(f"{kind} {v}")
        if kind != "F":
            self.keep_order(stage, kind, v)
        seconds, start = self.cost(stage, instruction), self.clock[rank]
        self.clock[rank] = start + seconds
        self.found.busy[rank] += seconds
        self.found.spans.append(Span(stage, instruction, start, start + seconds))
        return True

    def give(self, kind: str, stage: int, others: Sequence[int], v: int) -> None:
        """Send a micro-batch's messages to other stages, each behind those before it on its way."""
        clock = self.clock[stage % self.ranks]
        for other in others:
            way = stage, other
            seconds = self.wire(stage, other) if self.wire else 0.0
            self.free[way] = max(clock, self.free.get(way, 0.0)) + seconds
            self.arrivals[kind, stage, other, v] = self.free[way]
            self.on_the_way.setdefault((kind, stage, other), deque()).append(v)

    def take(self, stage: int, messages: list[tuple[str, int, int, int]], mark: str) -> bool:
        """Wait for messages; False where one is not sent yet."""
        for kind, source, target, v in messages:
            first = next(iter(self.on_the_way.get((kind, source, target), ())), v)
            if first != v:
                raise HpctrainError(
                    f"stage {target} takes micro-batch {v} from stage {source}, which sends that of "
                    f"micro-batch {first} before it"
                )
        if any(message not in self.arrivals for message in messages):
            return False
        for kind, source, target, _ in messages:
            self.on_the_way[kind, source, target].popleft()
        arrivals = [self.arrivals[message] for message in messages]
        rank = stage % self.ranks
        self.clock[rank] = max([self.clock[rank], *arrivals])
        self.done[stage].add(mark)
        return True

    def keep_order(self, stage: int, kind: str, v: int) -> None:
        """Refuse a backward of a micro-batch behind that of a later one."""
        before = self.latest.get((stage, kind), v)
        if before > v:
            raise HpctrainError(
                f"stage {stage} runs the backward of micro-batch {v} behind that of {before}: its gradients "
                f"would add up in another order than in one process"
            )
        self.latest[stage, kind] = v

    def need(self, stage: int, instruction: Instruction, mark: str) -> None:
        """Refuse an instruction whose input is not there."""
        if mark and mark not in self.done[stage]:
            raise HpctrainError(f"stage {stage} runs {instruction} before `{mark}` is done")


def check(
    name: str,
    ranks: int,
    micro_batches: Sequence[int],
    links: Links | None = None,
    back: Links | None = None,
    virtual: int = 1,
) -> Simulation:
    """Prove a schedule for these numbers before anything runs: a backward of two forwards, halved if split.

    Raises HpctrainError where it would hang, take messages or run backward passes in another order than that
    of the micro-batches, or leave a pass out; ConfigError for links that go backwards. Pure.
    """
    for stage, targets in (links or {}).items():
        if any(target <= stage for target in targets):
            raise ConfigError(
                f"stage {stage} gives activations to an earlier stage: the cut goes through a loop"
            )
    every = programs(name, ranks, micro_batches, virtual)
    return simulate(every, lambda _, i: 2.0 if isinstance(i, Backward) else 1.0, links, back=back)
