"""A model that is built without memory: its weights come into being where, and if, they are wanted.

While the constructor of a large model runs, tensors are shapes only, and what would have been done to them
is written down (`models/lines.py`); so is what is done to real ones from their first random number on.
Afterwards each random number gets the name of the parameter that it is for, and weights are made:

      uniform_(m0)  is for "0.weight"   ──►   generator at (seed, "0.weight", 0), uniform_(m0)

So a weight has the same bits whoever makes it and whichever others are made, and no one draws those of
others. What a constructor looks at stays as it was seen, as does what it has seeded itself.
"""

from collections.abc import Container, Iterable, Iterator
from contextlib import ExitStack
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from hpctrain.gradient import hooked
from hpctrain.hidden import ON_BUFFERS, notes_on, plain, registered
from hpctrain.models.lines import UNNAMED, Line, Lines, View, drawing
from hpctrain.models.schema import FILLS, changed, looks, most
from hpctrain.models.untold import told
from hpctrain.tensors import storage_of, tensors_in

AS_EVER = 2**24
"""Numbers of a model that are made as ever: most models are, which costs nothing; of more,"""
SMALL = 4096
"""tensors of more than these are shapes. Constructors may look at others in any way."""


class Shapes(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Tensors without memory; copies of a module stay in the same mode."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Shapes":
        return self


class Deferred(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Entered while a constructor runs; afterwards gives the tensors that are wanted."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Say no: nothing is compiled inside of a constructor, and to load torch._dynamo takes a second."""
        return False

    def __init__(self, seed: int = 0) -> None:
        """Start with nothing written down; the seed is what the generator is set to."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._made = 0
        """Numbers, so far."""
        self.seed = torch.Generator().manual_seed(seed).initial_seed()
        self.lines = Lines(seed)
        self._kept: dict[int, Any] = {}
        """Each memory: while it is kept no other one has its number."""
        self._told = ExitStack()

    @cached_property
    def shapes(self) -> Shapes:
        """What makes tensors without memory: it takes a second to load, and most models need none."""
        return Shapes(allow_non_fake_inputs=True)

    def __enter__(self) -> "Deferred":
        """Begin to write down."""
        self._told.enter_context(told(self.lines))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *of: Any) -> None:
        """Write down no more."""
        super().__exit__(*of)  # type: ignore[no-untyped-call]
        self._told.close()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        """Do what concerns small tensors; write down the rest."""
        named = named or {}
        given = tensors_in((arguments, named))
        if not any(isinstance(t, FakeTensor) for t in given):
            if not self._makes_large(function, arguments, named):
                return self._do(function, arguments, named, arguments, named)
        elif function is torch.ops.aten._local_scalar_dense.default or self._writes_real(
            function, arguments, named
        ):
            self.lines.settle(map(storage_of, given))
            real, real_named = self._real((arguments, named))
            return self._do(function, real, real_named, arguments, named)
        own, generator = self._source(function, named)
        if generator:
            self._move_on(function, arguments, named)
        with self.shapes:
            found = function(*arguments, **named)
        self._write_down(function, arguments, named, found, own, generator)
        return found

    def _makes_large(self, function: Any, arguments: Any, named: Any) -> bool:
        """Whether a call that gets no deferred tensor makes a large one on the CPU."""
        if any(found.alias_info is not None for found in function._schema.returns):
            return False  # a view, or written in place
        if self._made + most((arguments, named)) <= AS_EVER:
            return False
        try:
            with self.shapes:
                found = function(*arguments, **named)
        except Exception:
            return False  # its shape depends on numbers, or it fails: as ever
        large = [t.numel() for t in tensors_in(found) if t.numel() > SMALL and t.device.type == "cpu"]
        return bool(large) and self._made + sum(large) > AS_EVER

    def _writes_real(self, function: Any, arguments: Any, named: Any) -> bool:
        return any(not isinstance(t, FakeTensor) for t in changed(function, arguments, named))

    def _do(self, function: Any, real: Any, real_named: Any, arguments: Any, named: Any) -> Any:
        """Do what concerns small tensors; write it down, too, from the first random number on."""
        given = tensors_in((arguments, named))
        draws = torch.Tag.nondeterministic_seeded in function.tags
        known = [storage_of(t) for t in given if storage_of(t) in self.lines]
        if not (draws or known) or any(t.device.type != "cpu" or not storage_of(t) for t in given):
            return self._count(function, function(*real, **real_named))
        if looks(function):
            self.lines.settle(known)
        for tensor in changed(function, arguments, named):
            if storage_of(tensor) not in self.lines:
                self._begin(tensor, function)
        own, generator = self._source(function, named)
        with drawing(None if own is None else self.lines.key(len(self.lines.lines)), None):
            found = function(*real, **real_named)
        self._write_down(function, arguments, named, found, own, generator)
        return self._count(function, found)

    def _count(self, function: Any, found: Any) -> Any:
        """Note how much has been made as ever."""
        if all(given.alias_info is None for given in function._schema.returns):
            self._made += sum(t.numel() for t in tensors_in(found))
        return found

    def _begin(self, tensor: torch.Tensor, function: Any) -> None:
        """Write down what a real tensor's memory holds, unless the operator fills it with random numbers."""
        memory, kept = storage_of(tensor), tensor.untyped_storage()
        self._kept[memory] = kept
        fills = function._opname in FILLS and tensor.nbytes == kept.nbytes()
        now = torch.empty(0) if fills else as_bytes(kept).clone()
        begin = partial(torch.empty, kept.nbytes(), dtype=torch.uint8) if fills else now.clone
        self.lines.append(Line(begin, (), {}, frozenset(), (memory,), frozenset({memory})))

    def _source(self, function: Any, named: Any) -> tuple[int | None, Any]:
        """Give a call's key, or a generator that the constructor has set, and its state."""
        if torch.Tag.nondeterministic_seeded not in function.tags:
            return None, None
        generator = named.get("generator") or torch.default_generator
        if generator is torch.default_generator and generator.initial_seed() == self.seed:
            return UNNAMED, None
        return None, (generator, generator.get_state())

    def _move_on(self, function: Any, arguments: Any, named: Any) -> None:
        """Draw what a call would have, into memory that is let go."""
        overwritten = {id(t) for t in changed(function, arguments, named)}

        def stand_in(value: Any) -> Any:
            if isinstance(value, FakeTensor) and id(value) in overwritten:
                return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype)
            return self._real(value)

        real, real_named = _pytree.tree_map(stand_in, (arguments, named))
        function(*real, **real_named)

    def _write_down(
        self, function: Any, arguments: Any, named: Any, found: Any, key: Any, generator: Any
    ) -> None:
        outputs = _pytree.tree_leaves(found)
        if not all(map(storage_of, tensors_in((arguments, named, found)))):
            raise NotImplementedError("it makes a sparse tensor of random numbers, or a large one")
        memories = tuple(storage_of(t) if isinstance(t, torch.Tensor) else None for t in outputs)
        fresh = {m for m in memories if m is not None and m not in self._kept}
        written = {storage_of(t) for t in changed(function, arguments, named)}
        for tensor in outputs:
            if isinstance(tensor, torch.Tensor):
                self._kept.setdefault(storage_of(tensor), tensor.untyped_storage())
        if not (fresh or written):
            return  # another view of the same memory
        reads = set[int]()

        def described(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and storage_of(value) in self.lines:
                reads.add(storage_of(value))
                return View.of(value)
            return value.clone() if isinstance(value, torch.Tensor) else value

        told, told_named = _pytree.tree_map(described, (arguments, named))
        changes = frozenset(fresh | written)
        self.lines.append(
            Line(function, told, told_named, frozenset(reads), memories, changes, key, generator)
        )

    # -- afterwards --------------------------------------------------------------------------

    @torch.no_grad()
    def complete(self, module: nn.Module) -> None:
        """Name the random numbers; make small tensors, and plain attributes, whose users are unknown. Local.

        Parameters and buffers among it are left to `materialise`. Raises NotImplementedError where something
        hangs on a tensor that would be lost with it, or was done to one unseen.
        """
        names = registered(module)
        for tensor in [*module.parameters(), *module.buffers()]:
            name, notes = names[id(tensor)], notes_on(tensor)
            if tensor.device.type == "meta" and not isinstance(tensor, FakeTensor):
                raise NotImplementedError(f"the data of {name} is part of another tensor")
            if hooked(tensor):  # it may hold tensors of the constructor
                raise NotImplementedError(f"there is a hook on the gradient of {name}")
            if isinstance(tensor, nn.Buffer):
                notes = {key: noted for key, noted in notes.items() if key not in ON_BUFFERS}
            if tensors_in(notes) or (notes and not isinstance(tensor, nn.Parameter)):
                raise NotImplementedError(f"{next(iter(notes))} is noted on {name}")
        small = {m: kept for m, kept in self._kept.items() if m in self.lines and kept.device.type == "cpu"}
        for memory, made in self.lines.again({*small}).items():
            if not torch.equal(as_bytes(made.untyped_storage()), as_bytes(small[memory])):
                raise NotImplementedError("it changes random numbers in a way that torch does not see")
        for name, tensor in named_tensors(module):
            self.lines.call(name, storage_of(tensor))
        for memory, made in self.lines.again({*small}).items():
            as_bytes(small[memory]).copy_(as_bytes(made.untyped_storage()))
        for owner, name, value in plain(module):
            if any(isinstance(leaf, FakeTensor) for leaf in _pytree.tree_leaves(value)):
                vars(owner)[name] = self._real(value, names)

    def _real(self, values: Any, but: Container[int] = ()) -> Any:
        """Give a tree with the tensors it would have, `but` those with these ids. Local."""
        leaves = _pytree.tree_leaves(values)
        fakes = {id(t) for t in leaves if isinstance(t, FakeTensor) and id(t) not in but}
        memories = self.lines.again({storage_of(t) for t in leaves if id(t) in fakes})

        def real(value: Any) -> Any:
            return View.of(value).on(memories[storage_of(value)]) if id(value) in fakes else value

        return _pytree.tree_map(real, values)

    @torch.no_grad()
    def materialise(self, module: nn.Module, wanted: Iterable[torch.Tensor], device: str) -> None:
        """Put real tensors into the module for those that are wanted; the others stay as they are. Local."""
        made: dict[int, Any] = {}
        every = list({id(tensor): tensor for tensor in wanted}.values())
        plain_ones = [tensor.detach() if isinstance(tensor, FakeTensor) else tensor for tensor in every]
        for tensor, value in zip(every, self._real(plain_ones)):
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


def named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Give parameters, then buffers, then what stands in plain attributes, each with its name. Local."""
    yield from module.named_parameters()
    yield from module.named_buffers()
    names = {id(owner): name for name, owner in module.named_modules()}
    for owner, name, value in plain(module):
        for at, tensor in enumerate(tensors_in(value)):
            yield f"{names[id(owner)]}.{name}.{at}", tensor


def as_bytes(memory: torch.UntypedStorage) -> torch.Tensor:
    """See a memory as bytes. Local."""
    return torch.empty(0, dtype=torch.uint8).set_(memory)
