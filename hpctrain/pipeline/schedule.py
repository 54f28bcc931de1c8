"""A schedule is a generator of instructions; the engine runs it and knows nothing else.

One stage, micro-batches 0 1 2 of this replica (F forward, B backward):

    F0 B0 F1 B1 F2 B2

A micro-batch's activations are freed before the next one starts: peak memory is one micro-batch.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """Something a stage does for one micro-batch of the step."""

    micro_batch: int


class Forward(Instruction):
    """Run the stage's layers on the micro-batch."""


class Backward(Instruction):
    """Run backward from the loss of the micro-batch; its gradients join the sum."""


def one_stage(micro_batches: Iterable[int]) -> Iterator[Instruction]:
    """Run each micro-batch forward and backward before the next.

    >>> [f"{type(i).__name__[0]}{i.micro_batch}" for i in one_stage([4, 5])]
    ['F4', 'B4', 'F5', 'B5']
    """
    for micro_batch in micro_batches:
        yield Forward(micro_batch)
        yield Backward(micro_batch)
