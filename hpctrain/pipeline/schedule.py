"""A schedule is a generator of instructions; the engine runs it and knows nothing else. All here is pure.

F forward, B backward, of which I is the gradient of the stage's input and W that of its weights, each of
one micro-batch; 4 stages (rows), micro-batches 0 1 2 3, time to the right, B = I + W as long as two F:

    gpipe
    F0 F1 F2 F3 .  .  .  .  .  .  B0 B0 B1 B1 B2 B2 B3 B3
    .  F0 F1 F2 F3 .  .  .  .  I0 W0 I1 W1 I2 W2 I3 W3
    .  .  F0 F1 F2 F3 .  .  I0 W0 I1 W1 I2 W2 I3 W3
    .  .  .  F0 F1 F2 F3 I0 W0 I1 W1 I2 W2 I3 W3

    one_f_one_b
    F0 F1 F2 F3 .  .  .  B0 B0 .  B1 B1 .  B2 B2 .  B3 B3
    .  F0 F1 F2 .  .  I0 W0 F3 I1 W1 .  I2 W2 .  I3 W3
    .  .  F0 F1 .  I0 W0 F2 I1 W1 F3 I2 W2 .  I3 W3
    .  .  .  F0 I0 W0 F1 I1 W1 F2 I2 W2 F3 I3 W3

    zero_bubble
    F0 F1 F2 F3 .  .  .  I0 W0 I1 W1 I2 W2 I3 W3
    .  F0 F1 F2 .  .  I0 F3 I1 W0 I2 W1 I3 W2 W3
    .  .  F0 F1 .  I0 F2 I1 F3 I2 W0 I3 W1 W2 W3
    .  .  .  F0 I0 F1 I1 F2 I2 F3 I3 W0 W1 W2 W3

    zero_bubble_2
    F0 F1 F2 F3 .  .  .  I0 W0 I1 W1 I2 W2 I3 W3
    .  F0 F1 F2 F3 .  I0 W0 I1 W1 I2 W2 I3 W3
    .  .  F0 F1 F2 I0 F3 I1 W0 I2 W1 I3 W2 W3
    .  .  .  F0 I0 F1 I1 F2 I2 F3 I3 W0 W1 W2 W3

    interleaved, 2 ranks with two virtual stages each: 0 and 2, 1 and 3, the second ones' passes marked '
    F0  F1  F0' F1' F2  I0' W0' F3  I1' W1' F2' B0  B0  F3' B1  B1  .   I2' W2' .   I3' W3' B2  B2  B3  B3
    .   F0  F1  F0' I0' W0' F1' I1' W1' F2  I0  W0  F3  I1  W1  F2' I2' W2' F3' I3' W3' I2  W2  I3  W3

p stages, m micro-batches: gpipe and one_f_one_b leave a stage idle for p - 1 forwards and p - 1 gradients
of inputs. Where a backward can't be split and is as long as a forward, that is (p-1)/(m+p-1) of the time.
gpipe (Huang et al. 2019) keeps m micro-batches' activations, one_f_one_b (Narayanan et al. 2019) at most p.
zero_bubble (ZB-H1 of Qi et al. 2023) fills the gaps of one_f_one_b with weight gradients, which nobody waits
for, and keeps at most p too: p - 1 gaps of length F + I - W are left a stage. zero_bubble_2 (ZB-H2 of the
same) keeps at most 2p - 1: with more of them, p - 1 gaps of length F are left where an I is no longer than
two F or two W, and a pass that takes longer now and then holds up other stages less. (Theirs fills those
gaps, too, by an optimizer's step that is taken back where a gradient proves wrong.) interleaved (Narayanan et
al. 2021) lets each micro-batch go round the ranks k times, through virtual stages of 1/k the length: 1f1b's
gaps are 1/k as long, for k times the messages and more activations; it wants m to be a multiple of p. All run
the backward passes of a (virtual) stage in the order of the micro-batches, as one process does: gradients add
up to the same bits.

Around each pass stand its messages: activations from earlier stages before F, to later ones behind
it; gradients the other way around B. A send is started and not waited for, a receive is.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """Something a stage does for one micro-batch of the step."""

    micro_batch: int
    virtual: int = 0
    """Which of the stages that share a rank: number `virtual` x ranks + rank of all."""

    def __str__(self) -> str:
        """Write it short: F3 is the forward of micro-batch 3, F3' that of the rank's next virtual stage."""
        return f"{SHORT[type(self)]}{self.micro_batch}{chr(39) * self.virtual}"


class Forward(Instruction):
    """Run the stage's layers on the micro-batch."""


class Backward(Instruction):
    """Run backward of the micro-batch; its gradients join the sum."""


class BackwardInput(Instruction):
    """Compute the gradients of what the stage received; those of its weights wait."""


class BackwardWeight(Instruction):
    """Compute the weight gradients that wait; they join the sum."""


class Receive(Instruction):
    """Take the activations that earlier stages sent."""


class Send(Instruction):
    """Give activations to the later stages that want them."""


class ReceiveGradient(Instruction):
    """Take the gradients of what was sent."""


class SendGradient(Instruction):
    """Give the gradients of what was received."""


SHORT: dict[type[Instruction], str] = {
    Forward: "F",
    Backward: "B",
    BackwardInput: "I",
    BackwardWeight: "W",
    Receive: "rF",
    Send: "sF",
    ReceiveGradient: "rB",
    SendGradient: "sB",
}

Schedule = Callable[[int, int, Sequence[int], int], Iterator[Instruction]]
"""(rank, ranks, micro-batches, virtual stages a rank) to the passes of that rank, without messages."""


def one_stage(micro_batches: Iterable[int]) -> Iterator[Instruction]:
    """Run each micro-batch forward and backward before the next: one micro-batch's activations at a time.

    >>> [str(i) for i in one_stage([4, 5])]
    ['F4', 'B4', 'F5', 'B5']
    """
    for micro_batch in micro_batches:
        yield Forward(micro_batch)
        yield Backward(micro_batch)


def gpipe(stage: int, stages: int, micro_batches: Sequence[int], virtual: int = 1) -> Iterator[Instruction]:
    """All forwards, then all backwards.

    >>> [str(i) for i in gpipe(0, 2, [0, 1])]
    ['F0', 'F1', 'B0', 'B1']
    """
    for micro_batch in micro_batches:
        yield Forward(micro_batch)
    for micro_batch in micro_batches:
        yield Backward(micro_batch)


def one_f_one_b(
    stage: int, stages: int, micro_batches: Sequence[int], virtual: int = 1
) -> Iterator[Instruction]:
    """As many forwards as stages follow, then one forward and one backward in turn, then the rest.

    >>> [str(i) for i in one_f_one_b(0, 2, [0, 1, 2])]
    ['F0', 'F1', 'B0', 'F2', 'B1', 'B2']
    """
    yield from in_turn(stages - stage - 1, micro_batches)


def in_turn(ahead: int, micro_batches: Sequence[int]) -> Iterator[Instruction]:
    """Run so many forwards, then one forward and one backward in turn, then the backwards that are left."""
    ahead = min(ahead, len(micro_batches))
    for micro_batch in micro_batches[:ahead]:
        yield Forward(micro_batch)
    for at, micro_batch in enumerate(micro_batches[ahead:]):
        yield Forward(micro_batch)
        yield Backward(micro_batches[at])
    for micro_batch in micro_batches[len(micro_batches) - ahead :]:
        yield Backward(micro_batch)


def zero_bubble(
    stage: int, stages: int, micro_batches: Sequence[int], virtual: int = 1
) -> Iterator[Instruction]:
    """Run one_f_one_b's passes; weight gradients of up to `stage` micro-batches wait, and fill its gaps.

    So every stage keeps as many micro-batches as the first one of one_f_one_b does.

    >>> [str(i) for i in zero_bubble(1, 2, [0, 1, 2])]
    ['F0', 'I0', 'F1', 'I1', 'W0', 'F2', 'I2', 'W1', 'W2']
    """
    yield from late(in_turn(stages - stage - 1, micro_batches), stage)


def zero_bubble_2(
    stage: int, stages: int, micro_batches: Sequence[int], virtual: int = 1
) -> Iterator[Instruction]:
    """Run twice as many forwards ahead as zero_bubble, and let twice as many weight gradients wait.

    Every stage keeps up to 2 x stages - 1 micro-batches, of which some can go on where others wait.

    >>> [str(i) for i in zero_bubble_2(0, 2, [0, 1, 2])]
    ['F0', 'F1', 'F2', 'I0', 'W0', 'I1', 'W1', 'I2', 'W2']
    """
    yield from late(in_turn(2 * (stages - stage - 1), micro_batches), 2 * stage)


def late(passes: Iterable[Instruction], most: int) -> Iterator[Instruction]:
    """Halve the backwards of a stage; weight gradients of up to `most` micro-batches wait.

    Where no forward is left to run they fill the gaps: one behind each gradient of an input.
    """
    passes, waiting = [*passes], list[int]()
    forwards = sum(isinstance(instruction, Forward) for instruction in passes)
    for instruction in passes:
        v = instruction.micro_batch
        if isinstance(instruction, Forward):
            forwards -= 1
            yield instruction
            continue
        yield BackwardInput(v)
        waiting.append(v)
        if not forwards or len(waiting) > most:
            yield BackwardWeight(waiting.pop(0))
    for v in waiting:
        yield BackwardWeight(v)


def interleaved(
    rank: int, ranks: int, micro_batches: Sequence[int], virtual: int = 2
) -> Iterator[Instruction]:
    """Let as many micro-batches as ranks go through one virtual stage before the next; then as one_f_one_b.

    The order is made for a multiple of `ranks` micro-batches, and those that are not there are left out:
    that takes no pass from what it waits for, so nothing hangs.

    >>> [str(i) for i in interleaved(1, 2, [0, 1, 2])][:9]
    ['F0', 'F1', "F0'", "B0'", "F1'", "B1'", 'F2', 'B0', 'B1']
    """
    groups = [micro_batches[at : at + ranks] for at in range(0, len(micro_batches), ranks)]
    if groups:
        groups[-1] = [*groups[-1], *[-1] * (ranks - len(groups[-1]))]
    forwards = [Forward(v, at) for group in groups for at in range(virtual) for v in group]
    backwards = [Backward(v, at) for group in groups for at in reversed(range(virtual)) for v in group]
    ahead = min(2 * (ranks - rank - 1) + (virtual - 1) * ranks, len(forwards))
    passes: list[Instruction] = [*forwards[:ahead]]
    for forward, backward in zip(forwards[ahead:], backwards):
        passes += [forward, backward]
    passes += backwards[len(forwards) - ahead :]
    yield from (one for one in passes if one.micro_batch >= 0)


SCHEDULES: dict[str, Schedule] = {
    "1f1b": one_f_one_b,
    "gpipe": gpipe,
    "zb-h1": zero_bubble,
    "zb-h2": zero_bubble_2,
    "interleaved": interleaved,
}
"""By the name in `parallel.schedule`. The laws in tests/test_schedule.py run on every entry."""
SEVERAL = ("interleaved",)
"""Those that run several stages on each rank."""
CHOSEN = {"1f1b": 1.0, "zb-h2": 1.01, "zb-h1": 1.01, "interleaved": 1.1}
"""What auto chooses from by measured times, and by how much each must beat those before it: zb-h2 and zb-h1
keep more micro-batches, interleaved has more messages (gpipe has nothing that 1f1b has not). zb-h2 comes
first: no longer in the simulation, it is shorter where passes of one kind take now longer, now shorter."""


def forward_only(
    name: str, rank: int, ranks: int, micro_batches: Sequence[int], virtual: int = 1
) -> Iterator[Instruction]:
    """Give what one rank does to evaluate micro-batches: the forwards of a schedule, in its order.

    >>> [str(i) for i in forward_only("1f1b", 1, 3, [0, 1])]
    ['rF0', 'F0', 'sF0', 'rF1', 'F1', 'sF1']
    """
    for instruction in SCHEDULES[name](rank, ranks, micro_batches, virtual):
        if isinstance(instruction, Forward):
            yield from with_messages(instruction, rank, ranks, virtual)


def programs(
    name: str, ranks: int, micro_batches: Sequence[int], virtual: int = 1
) -> list[list[Instruction]]:
    """Give every rank's program."""
    return [list(program(name, rank, ranks, micro_batches, virtual)) for rank in range(ranks)]


def program(
    name: str, rank: int, ranks: int, micro_batches: Sequence[int], virtual: int = 1
) -> Iterator[Instruction]:
    """Give what one rank does in a step: its passes, with their messages around them.

    The gradient that another stage waits for leaves before those of the weights are computed.

    >>> [str(i) for i in program("1f1b", 0, 2, [0, 1])]
    ['F0', 'sF0', 'F1', 'sF1', 'rB0', 'B0', 'rB1', 'B1']
    >>> [str(i) for i in program("1f1b", 1, 2, [0, 1])]
    ['rF0', 'F0', 'I0', 'sB0', 'W0', 'rF1', 'F1', 'I1', 'sB1', 'W1']
    """
    if ranks == 1:
        yield from one_stage(micro_batches)
        return
    assert virtual == 1 or name in SEVERAL, f"{name} runs one stage a rank"
    for instruction in SCHEDULES[name](rank, ranks, micro_batches, virtual):
        yield from with_messages(instruction, rank, ranks, virtual)


def behind(passes: Iterable[Instruction]) -> set[int]:
    """Give the micro-batches whose weight gradients a rank computes behind all gradients of inputs. Pure.

    To let them wait is what lets the last gradient that others wait for leave as early as it can.

    >>> sorted(behind(program("zb-h1", 1, 2, range(4)))), sorted(behind(program("1f1b", 1, 2, range(4))))
    ([2, 3], [3])
    """
    found = set[int]()
    for instruction in passes:
        if isinstance(instruction, (Backward, BackwardInput)):
            found.clear()
        elif isinstance(instruction, BackwardWeight):
            found.add(instruction.micro_batch)
    return found


def with_messages(instruction: Instruction, rank: int, ranks: int, virtual: int) -> Iterator[Instruction]:
    """Put the messages of its stage around a pass."""
    v, at = instruction.micro_batch, instruction.virtual
    first, last = rank == at == 0, (rank, at) == (ranks - 1, virtual - 1)
    if isinstance(instruction, Forward):
        if not first:
            yield Receive(v, at)
        yield instruction
        if not last:
            yield Send(v, at)
    elif isinstance(instruction, BackwardWeight):
        yield instruction
    else:
        split = not first and isinstance(instruction, Backward)
        if not last:
            yield ReceiveGradient(v, at)
        yield BackwardInput(v, at) if split else instruction
        if not first:
            yield SendGradient(v, at)
        if split:
            yield BackwardWeight(v, at)
