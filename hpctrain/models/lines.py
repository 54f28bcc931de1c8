"""What a constructor did to its tensors, line by line: which lines one depends on, and doing them again.

      empty(4096, 4096)  ──►  m0          uniform_(m0)   reads m0, writes m0, draws
      again({m0})             does the lines that m0 depends on, in order

A line that draws is keyed by the name of what it is for: (seed, name, k) for the k-th that a parameter
depends on and none before it does. So they depend on no other layer, and nobody draws those of others.
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Any

import torch
from torch.utils import _pytree

from hpctrain.keys import key
from hpctrain.tensors import storage_of

UNNAMED = -1
"""The key of a draw that is for nothing yet."""


@dataclass(frozen=True)
class View:
    """A tensor of some memory: what a line reads or writes."""

    memory: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "View":
        """Describe where a tensor lies."""
        offset = int(tensor.storage_offset())
        return cls(storage_of(tensor), tuple(tensor.size()), tensor.stride(), offset, tensor.dtype)

    def on(self, memory: torch.Tensor) -> torch.Tensor:
        """Give the tensor that lies so in the memory of another one."""
        found = torch.empty(0, dtype=self.dtype)
        return found.set_(memory.untyped_storage(), self.offset, self.size, self.stride)


@dataclass(eq=False)
class Line:
    """An operation on tensors that are described."""

    function: Any
    arguments: Any
    named: Any
    reads: frozenset[int]
    writes: tuple[int | None, ...]
    """The memory of each output; None for one that is no tensor."""
    changes: frozenset[int]
    """What it writes, new memory and old."""
    key: int | None = None
    """What torch's generator is set to before it, if it draws from that."""
    generator: tuple[torch.Generator, torch.Tensor] | None = None
    """What else it draws from, with the state: one that the constructor has set itself."""


@dataclass
class Lines:
    """All that was written down."""

    seed: int
    lines: list[Line] = field(default_factory=list)
    _changing: dict[int, list[int]] = field(default_factory=dict)
    """By memory: the numbers of the lines that change it."""

    def append(self, line: Line) -> None:
        """Write one more down. Local."""
        for memory in line.changes:
            self._changing.setdefault(memory, []).append(len(self.lines))
        self.lines.append(line)

    def __contains__(self, memory: object) -> bool:
        """Whether a line has changed a memory."""
        return memory in self._changing

    def behind(self, wanted: Iterable[int]) -> list[int]:
        """Give the numbers of the lines that memories depend on, in order. Pure."""
        waiting = [-at for memory in wanted for at in self._changing.get(memory, ())]
        heapify(waiting)
        found: list[int] = []
        while waiting:
            at = -heappop(waiting)
            if found and found[-1] == at:
                continue
            found.append(at)
            for memory in self.lines[at].reads:
                for before in self._changing.get(memory, ()):
                    if before < at:
                        heappush(waiting, -before)
        return found[::-1]

    def call(self, name: str, memory: int) -> None:
        """Key what a memory depends on, and has no name yet, by this one. Local."""
        fresh = [at for at in self.behind([memory]) if self.lines[at].key == UNNAMED]
        for number, at in enumerate(fresh):
            self.lines[at].key = named_key(self.seed, name, number)

    def settle(self, memories: Iterable[int]) -> None:
        """Let them have the numbers that they have before there are names: somebody looks at them. Local."""
        for at in self.behind(memories):
            self.lines[at].key = self.key(at)

    def key(self, at: int) -> int | None:
        """Give a line's key, by its place as long as it has no name; None for one that has none. Pure."""
        found = UNNAMED if at == len(self.lines) else self.lines[at].key
        return key(self.seed, at) >> 1 if found == UNNAMED else found

    def again(self, wanted: set[int]) -> dict[int, torch.Tensor]:
        """Do the lines that some memories depend on; gives a tensor of each. Local."""
        numbers = self.behind(wanted)
        last = {m: at for at in numbers for m in self.lines[at].reads | self.lines[at].changes}
        memories: dict[int, torch.Tensor] = {}

        def real(value: Any) -> Any:
            return value.on(memories[value.memory]) if isinstance(value, View) else value

        for at in numbers:
            line = self.lines[at]
            arguments, named = _pytree.tree_map(
                real, (line.arguments, line.named), is_leaf=lambda v: isinstance(v, View)
            )
            with drawing(self.key(at), line.generator):
                outputs = _pytree.tree_leaves(line.function(*arguments, **named))
            for memory, output in zip(line.writes, outputs):
                if memory is not None:
                    memories.setdefault(memory, output)
            for memory in [m for m in memories if last[m] <= at and m not in wanted]:
                del memories[memory]
        return memories


def named_key(seed: int, name: str, number: int) -> int:
    """Key the `number`-th draw of what bears a name. Pure.

    >>> named_key(0, "0.weight", 0) == named_key(0, "1.weight", 0)
    False
    """
    of_name = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    return key(seed, of_name, number) >> 1


@contextmanager
def drawing(own: int | None, other: tuple[torch.Generator, torch.Tensor] | None) -> Iterator[None]:
    """Let torch's generator start at a key, or another one at a state; it is afterwards as it was. Local."""
    if own is None and other is None:
        yield
        return
    generator, state = other or (torch.default_generator, None)
    now = generator.get_state()
    if state is None:
        generator.manual_seed(own or 0)
    else:
        generator.set_state(state)
    yield
    generator.set_state(now)
