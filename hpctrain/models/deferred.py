"""A model that is built without memory: its weights come into being where, and if, they are wanted.

While the constructor runs, large tensors are shapes only, and what would have been done to them is
written down, by the memory that it reads and writes:

      empty(4096, 4096)  ──►  m0          uniform_(m0)  reads m0, writes m0, generator at g0
      materialise(m0)         replays the lines that m0 depends on, in order, with the generator at g0

So each weight has the bits that the plain constructor gives after the same `torch.manual_seed`, whichever
of them are asked for. Random numbers are drawn at once too, into memory that is let go, to move the
generator on: the most that exists at a time is the largest tensor.

A constructor that looks at a number of a large tensor gets it, by a replay.
"""

from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from hpctrain.hidden import ON_BUFFERS, notes_on, plain, registered
from hpctrain.tensors import hooked, storage_of, tensors_in

SMALL = 4096
"""Elements: tensors up to this size are made as ever, so constructors may look at them."""


class Shapes(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Tensors without memory; copies of a module stay in the same mode."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Shapes":
        return self


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


@dataclass(frozen=True)
class Line:
    """An operation that was not done."""

    function: Any
    arguments: Any
    named: Any
    reads: frozenset[int]
    writes: tuple[int | None, ...]
    """The memory of each output; None for one that is no tensor."""
    changes: frozenset[int]
    """What it writes, new memory and old."""
    generator: tuple[torch.Generator, torch.Tensor] | None
    """And its state, for random numbers."""


class Deferred(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Entered while a constructor runs; afterwards gives the tensors that are wanted."""

    def __init__(self) -> None:
        """Start with nothing written down."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes = Shapes(allow_non_fake_inputs=True)
        self.lines: list[Line] = []
        self._kept: dict[int, torch.Tensor] = {}
        """A tensor of each memory: while it is kept no other memory has its number."""

    def __enter__(self) -> "Deferred":
        """Begin to write down."""
        nn.Parameter.__new__ = plain_parameters_only  # type: ignore[method-assign, assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *of: Any) -> None:
        """Write down no more."""
        nn.Parameter.__new__ = MAKES  # type: ignore[method-assign]
        super().__exit__(*of)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        """Do what concerns small tensors; write down the rest."""
        named = named or {}
        if not any(isinstance(t, FakeTensor) for t in _pytree.tree_leaves((arguments, named))):
            if not self._makes_large(function, arguments, named):
                return function(*arguments, **named)
        elif function is torch.ops.aten._local_scalar_dense.default or self._writes_real(
            function, arguments, named
        ):
            real, real_named = self._real((arguments, named))
            return function(*real, **real_named)
        generator = self._draw(function, arguments, named)
        with self.shapes:
            found = function(*arguments, **named)
        self._write_down(function, arguments, named, found, generator)
        return found

    def _makes_large(self, function: Any, arguments: Any, named: Any) -> bool:
        """Whether a call that gets no deferred tensor makes a large one on the CPU."""
        if any(found.alias_info is not None for found in function._schema.returns):
            return False  # a view, or written in place
        try:
            with self.shapes:
                found = function(*arguments, **named)
        except Exception:
            return False  # its shape depends on numbers, or it fails: as ever
        tensors = [t for t in _pytree.tree_leaves(found) if isinstance(t, torch.Tensor)]
        return any(t.numel() > SMALL and t.device.type == "cpu" for t in tensors)

    def _writes_real(self, function: Any, arguments: Any, named: Any) -> bool:
        return any(not isinstance(t, FakeTensor) for t in changed(function, arguments, named))

    def _draw(self, function: Any, arguments: Any, named: Any) -> tuple[torch.Generator, torch.Tensor] | None:
        """Move the generator on as the call would have; give its state before."""
        if torch.Tag.nondeterministic_seeded not in function.tags:
            return None
        generator = named.get("generator") or torch.default_generator
        state = generator.get_state()
        overwritten = {id(t) for t in changed(function, arguments, named)}

        def stand_in(value: Any) -> Any:
            if not isinstance(value, FakeTensor):
                return value
            if id(value) in overwritten:
                return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype)
            return self._real(value)

        real, real_named = _pytree.tree_map(stand_in, (arguments, named))
        function(*real, **real_named)
        return generator, state

    def _write_down(self, function: Any, arguments: Any, named: Any, found: Any, generator: Any) -> None:
        outputs = _pytree.tree_leaves(found)
        if not all(map(storage_of, tensors_in((arguments, named, found)))):
            raise NotImplementedError("it makes a large sparse tensor")
        memories = tuple(storage_of(t) if isinstance(t, FakeTensor) else None for t in outputs)
        fresh = {m for m in memories if m is not None and m not in self._kept}
        written = {storage_of(t) for t in changed(function, arguments, named)}
        for tensor in outputs:
            if isinstance(tensor, FakeTensor):
                self._kept.setdefault(storage_of(tensor), tensor)
        if not (fresh or written):
            return  # another view of the same memory
        reads = set[int]()

        def described(value: Any) -> Any:
            if isinstance(value, FakeTensor):
                reads.add(storage_of(value))
                return View.of(value)
            return value.clone() if isinstance(value, torch.Tensor) else value

        told, told_named = _pytree.tree_map(described, (arguments, named))
        changes = frozenset(fresh | written)
        self.lines.append(Line(function, told, told_named, frozenset(reads), memories, changes, generator))

    # -- afterwards --------------------------------------------------------------------------

    def complete(self, module: nn.Module) -> None:
        """Make what modules keep as plain attributes: nobody can tell who uses it. Local.

        Parameters and buffers among it are left to `materialise`. Raises NotImplementedError where something
        hangs on a tensor that would be lost with it.
        """
        names = registered(module)
        for tensor in [*module.parameters(), *module.buffers()]:
            name, notes = names[id(tensor)], notes_on(tensor)
            if tensor.device.type == "meta" and not isinstance(tensor, FakeTensor):
                raise NotImplementedError(f"the data of {name} is part of another tensor, or on meta")
            if hooked(tensor):  # it may hold tensors of the constructor
                raise NotImplementedError(f"there is a hook on the gradient of {name}")
            if isinstance(tensor, nn.Buffer):
                notes = {key: noted for key, noted in notes.items() if key not in ON_BUFFERS}
            if tensors_in(notes) or (notes and not isinstance(tensor, nn.Parameter)):
                raise NotImplementedError(f"{next(iter(notes))} is noted on {name}")
        for owner, name, value in plain(module):
            if any(isinstance(leaf, FakeTensor) for leaf in _pytree.tree_leaves(value)):
                with torch.no_grad():
                    vars(owner)[name] = self._real(value, names)

    def _real(self, values: Any, but: Container[int] = ()) -> Any:
        """Give a tree with the tensors it would have, `but` those with these ids. Local."""
        leaves = _pytree.tree_leaves(values)
        fakes = {id(t) for t in leaves if isinstance(t, FakeTensor) and id(t) not in but}
        memories = self._replay({storage_of(t) for t in leaves if id(t) in fakes})

        def real(value: Any) -> Any:
            return View.of(value).on(memories[storage_of(value)]) if id(value) in fakes else value

        return _pytree.tree_map(real, values)

    def _replay(self, wanted: set[int]) -> dict[int, torch.Tensor]:
        """Do the lines that some memories depend on; gives a tensor of each."""
        needed, lines = set(wanted), list[Line]()
        for line in reversed(self.lines):
            if line.changes & needed:
                lines.append(line)
                needed |= line.reads
        lines.reverse()
        last = {m: at for at, line in enumerate(lines) for m in line.reads | line.changes}
        memories: dict[int, torch.Tensor] = {}

        def real(value: Any) -> Any:
            return value.on(memories[value.memory]) if isinstance(value, View) else value

        for at, line in enumerate(lines):
            arguments, named = _pytree.tree_map(
                real, (line.arguments, line.named), is_leaf=lambda v: isinstance(v, View)
            )
            with drawing_as(line.generator):
                outputs = _pytree.tree_leaves(line.function(*arguments, **named))
            for memory, output in zip(line.writes, outputs):
                if memory is not None:
                    memories.setdefault(memory, output)
            for memory in [m for m in memories if last[m] <= at and m not in wanted]:
                del memories[memory]
        return memories

    @torch.no_grad()
    def materialise(self, module: nn.Module, wanted: Iterable[torch.Tensor], device: str) -> None:
        """Put real tensors into the module for those that are wanted; the others stay as they are. Local."""
        made: dict[int, Any] = {}
        every = list({id(tensor): tensor for tensor in wanted}.values())
        plain_ones = [tensor.detach() if isinstance(tensor, FakeTensor) else tensor for tensor in every]
        for tensor, value in zip(every, self._real(plain_ones)):  # at once: views of one memory stay that
            if isinstance(tensor, FakeTensor) or value.device != torch.device(device):
                value = value.detach().to(device)
                if isinstance(tensor, nn.Parameter):
                    value = nn.Parameter(value, tensor.requires_grad)
                    for name, noted in notes_on(tensor).items():
                        setattr(value, name, noted)
                elif isinstance(tensor, nn.Buffer):
                    value = nn.Buffer(value, persistent=tensor.persistent)
            made[id(tensor)] = value
        for owner in module.modules():
            for kept in (owner._parameters, owner._buffers):
                for name, old in kept.items():
                    if old is not None and id(old) in made:
                        kept[name] = made[id(old)]
        for owner, name, value in plain(module):
            if any(id(leaf) in made for leaf in _pytree.tree_leaves(value)):
                vars(owner)[name] = _pytree.tree_map(lambda leaf: made.get(id(leaf), leaf), value)


MAKES = vars(nn.Parameter)["__new__"]
"""As torch has it."""


def plain_parameters_only(kind: type, *arguments: Any, **named: Any) -> Any:
    """Make a parameter, if it is of no kind of its own, which a tensor without memory would not show."""
    if kind is not nn.Parameter:
        raise NotImplementedError(f"{kind.__qualname__} is a kind of nn.Parameter of its own")
    return MAKES(kind, *arguments, **named)


def changed(function: Any, arguments: Any, named: Any) -> Iterator[torch.Tensor]:
    """Give the tensors that an operator writes to."""
    for at, declared in enumerate(function._schema.arguments):
        if declared.alias_info is not None and declared.alias_info.is_write:
            value = arguments[at] if at < len(arguments) else named.get(declared.name)
            yield from tensors_in(value)
    if function is torch.ops.aten.native_batch_norm.default and arguments[5]:  # it does not say so
        yield from tensors_in(arguments[3:5])


@contextmanager
def drawing_as(before: tuple[torch.Generator, torch.Tensor] | None) -> Iterator[None]:
    """Let a generator draw as in an earlier state, and be as it is afterwards. Local."""
    if before is None:
        yield
        return
    generator, state = before
    now = generator.get_state()
    generator.set_state(state)
    try:
        yield
    finally:
        generator.set_state(now)
