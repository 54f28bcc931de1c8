"""What layers tell one another aside: by a dict, a list or an object that several of them hold.

In one process the next layer finds what the one before has put there; in stages each rank has its own, and
what is looked up with a default would silently be that. So the first forwards of a stage are looked at: no
tensor that they put where layers of other stages, hooks or the loss look may hang on the data or the weights
(a cache of masks may be filled on each rank). Of numbers there a warning tells: most are a log.
"""

import sys
import threading
from argparse import Namespace
from collections import OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import chain
from queue import Queue
from types import BuiltinMethodType, CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree

from hpctrain.errors import ConfigError
from hpctrain.hidden import HOOKS, OURS, plain
from hpctrain.log import LOGGER
from hpctrain.tensors import Looking, storage_of, tensors_in

CONTAINERS = (dict, list, set, deque)
PLAIN = (dict, OrderedDict, defaultdict, list, set, deque)
HOLDERS = (
    *(*CONTAINERS, SimpleNamespace, UserDict, UserList, Queue),
    *(Namespace, WeakKeyDictionary, threading.local, ContextVar),
)
MOST_FOUND = 100_000
MOST = 10_000
"""Entries of a container that are looked at."""
FOREIGN = {*sys.stdlib_module_names, "torch", "numpy", "mpi4py", "h5py", "hpctrain"} - {"__main__"}


class Asides:
    """What layers of several stages hold."""

    def __init__(self, layers: list[tuple[str, nn.Module]], ranges: list[tuple[int, int]]) -> None:
        """Look what the layers hold, by name; a stage has those of a range. Local."""
        self._every = [held_by(layers[start:stop]) for start, stop in ranges]
        self.shared = self._shared()
        """By stage: its name here, one in another stage, and the container or object."""
        self._warned = False

    def _shared(self) -> list[list[tuple[str, str, Any]]]:
        found = []
        for own in self._every:
            others = [other for other in self._every if other is not own]
            there = {at: other[at][0] for other in others for at in own if at in other}
            found.append([(own[at][0], name, own[at][1]) for at, name in there.items()])
        return found

    def add(self, name: str, value: Any) -> None:
        """Look at what something that runs on the last stage holds, too: the loss. Local."""
        self._every[-1] |= (
            held_by([(name, value)]) if isinstance(value, nn.Module) else reachable([(name, value)])
        )
        self.shared = self._shared()

    @contextmanager
    def watching(self, stage: int, tensors: Iterable[torch.Tensor]) -> Iterator[None]:
        """Look at a stage's forward; `tensors`: its weights and what it got. Local.

        Raises ConfigError where it puts what hangs on them where another stage looks.
        """
        shared = self.shared[stage]
        before = [contents(value) for _, _, value in shared]
        with Hanging(tensors) as hanging:
            yield
        for (here, there, value), old in zip(shared, before):
            new = changes(value, old)
            if any(map(hanging.has, new)):
                raise ConfigError(
                    f"stage {stage} changes {here}, which another stage has, too, as {there}, and would not "
                    f"see: give it to the next layer with the other outputs, or set parallel.cuts so that "
                    f"one stage has both"
                )
            if not self._warned and any(map(hanging.may_have, new)):
                self._warned = True
                LOGGER.warning(
                    "stage %d changes numbers of %s, which another stage has, too, as %s: each rank has its "
                    "own, so nothing that the model computes may hang on them",
                    *(stage, here, there),
                )


@contextmanager
def untouched(layers: list[tuple[str, nn.Module]]) -> Iterator[None]:
    """Put back behind the body what layers hold, with what was in it before. Local."""
    no_names = (torch.Tensor, np.ndarray, ModuleType, ContextVar)
    held = [value for _, value in held_by(layers).values() if not isinstance(value, no_names)]
    modules = [owner for _, layer in layers for owner in layer.modules()]
    before = [(value, entries(value)) for value in [*held, *modules]]
    try:
        yield
    finally:
        for value, then in before:
            put_back(value, then)


class Hanging(Looking):
    """Follows what is computed from some tensors."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        """Begin with these."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages = {storage_of(tensor) for tensor in tensors}
        self.numbers = False
        """Whether a Python number was made of one."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, and note what hangs on what it gets."""
        given = tensors_in((args, kwargs))
        found = func(*args, **(kwargs or {}))
        if any(storage_of(tensor) in self.storages for tensor in given):
            changed = given if getattr(getattr(func, "_schema", None), "is_mutable", False) else []
            self.storages |= {storage_of(tensor) for tensor in [*tensors_in(found), *changed]}
            self.numbers |= func is torch.ops.aten._local_scalar_dense.default
        else:  # its memory may have been another's
            self.storages -= {storage_of(tensor) for tensor in tensors_in(found)}
        return found

    def has(self, value: Any) -> bool:
        """Whether a value has a tensor that hangs on them. Local."""
        return any(storage_of(leaf) in self.storages for leaf in tensors_in(inside(value)))

    def may_have(self, value: Any) -> bool:
        """Whether a value has an array, or a number or a word while a number was made of one. Local."""
        kinds = (np.generic, bool, int, float, complex, str) if self.numbers else ()
        return any(isinstance(leaf, (np.ndarray, *kinds)) for leaf in _pytree.tree_leaves(inside(value)))


def inside(value: Any) -> list[Any]:
    """List a value and all that it holds. Local."""
    every = (outer for _, outer in reachable([("", value)]).values())
    return [value, [contents(outer) for outer in every if not isinstance(outer, (torch.Tensor, np.ndarray))]]


def held_by(layers: list[tuple[str, nn.Module]]) -> dict[Any, tuple[str, Any]]:
    """Find what layers may share, by identity: in attributes, classes, closures and globals. Local."""
    found: list[tuple[str, Any]] = []
    for layer, module in layers:
        names = {id(m): f"{layer}.{own}".strip(".") for own, m in module.named_modules()}
        found += [(f"{names[id(owner)]}.{name}", value) for owner, name, value in plain(module)]
        for owner in module.modules():
            hooks = [hook for at in HOOKS for hook in getattr(owner, at).values()]
            found += [(f"a hook of {names[id(owner)]}", hook) for hook in hooks]
        kinds = {kind for owner in module.modules() for kind in type(owner).__mro__}
        found += [(kind.__name__, kind) for kind in kinds]
    return reachable(found)


class Binding:
    """A name of a module, which a function uses and may give another value."""

    def __init__(self, table: dict[str, Any], name: str) -> None:
        """Take the module's names, and one of them."""
        self.table, self.name = table, name


def reachable(values: Iterable[tuple[str, Any]]) -> dict[Any, tuple[str, Any]]:
    """Find what may hold something, in values and in what those hold, by identity. Local."""
    found: dict[Any, tuple[str, Any]] = {}
    left = list(values)
    while left and len(found) < MOST_FOUND:
        name, value = left.pop()
        if id(value) in found:
            continue
        if isinstance(value, (tuple, frozenset)):
            left += [(name, inner) for inner in value]
        elif isinstance(value, partial):
            left += [(name, inner) for inner in (value.func, *value.args, *value.keywords.values())]
        elif isinstance(value, (MethodType, BuiltinMethodType)):
            left += [(name, value.__self__), (name, getattr(value, "__func__", None))]
        elif isinstance(value, FunctionType):
            if not is_own(value.__module__ or ""):
                continue
            found[id(value)] = name, value
            code, known = value.__code__, value.__globals__
            cells = zip(code.co_freevars, value.__closure__ or ())
            left += [(f"{name}: {own}", cell.cell_contents) for own, cell in cells if is_filled(cell)]
            left += [(name, inner) for inner in contents(value)]
            for own in names_in(code):
                if own in known:
                    found[id(known), own] = own, Binding(known, own)
                    left.append((own, known[own]))
        elif is_holder(value):
            found[id(value)] = name, value
            if isinstance(value, type):
                for at, own in list(vars(value).items()):
                    inner = own.fget if isinstance(own, property) else own
                    inner = own.__func__ if isinstance(own, (staticmethod, classmethod)) else inner
                    if isinstance(inner, FunctionType) or not at.startswith("__"):
                        left.append((f"{value.__name__}.{at}", inner))
            elif not isinstance(value, (ModuleType, torch.Tensor, np.ndarray)):  # a module may have anything
                left += [(name, inner) for inner in contents(value)]
    return found


def names_in(code: CodeType) -> list[str]:
    """List the names that a function's code uses, functions inside it included. Pure."""
    inner = (names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return [*code.co_names, *chain.from_iterable(inner)]


def is_own(module: str) -> bool:
    """Whether a module's name is none of Python's, torch's or ours. Pure."""
    return str(module).split(".")[0] not in FOREIGN


def is_holder(value: Any) -> bool:
    """Whether something may be put into a value, by a user. Local."""
    if isinstance(value, (*HOLDERS, torch.Tensor, np.ndarray)):
        return not isinstance(value, nn.Parameter)
    if isinstance(value, ModuleType):
        return is_own(value.__name__)
    if isinstance(value, nn.Module):
        return False
    kind = value if isinstance(value, type) else type(value)
    return is_own(kind.__module__) and (hasattr(value, "__dict__") or hasattr(kind, "__slots__"))


def is_filled(cell: CellType) -> bool:
    """Whether a closure's variable has a value by now. Local."""
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def contents(value: Any) -> list[Any]:
    """List what a value holds; of a tensor the count of its changes, of an array its numbers. Local."""
    if isinstance(value, Binding):
        return [value.table.get(value.name)]
    if isinstance(value, ContextVar):
        return [value.get(None)]
    if isinstance(value, torch.Tensor):
        return [value._version]
    if isinstance(value, np.ndarray):
        return [value.copy()] if value.size <= MOST else []
    if isinstance(value, FunctionType):
        inner = [*vars(value).values(), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    elif isinstance(value, dict):
        inner = list(dict.values(value))  # a subclass may make what is asked for
    elif isinstance(value, (type, ModuleType)):
        inner = [v for at, v in vars(value).items() if not (at.startswith("__") or callable(v))]
    elif isinstance(value, CONTAINERS):
        inner = list(value)
    elif is_holder(value):
        slots = (getattr(value, at, None) for kind in type(value).__mro__ for at in slots_of(kind))
        inner = [*getattr(value, "__dict__", {}).values(), *slots]
    else:
        inner = []
    return inner[:MOST]


def slots_of(kind: type) -> tuple[str, ...]:
    """Give the names of a class's slots. Pure."""
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(at for at in slots if not at.startswith("__"))


def changes(value: Any, old: list[Any]) -> list[Any]:
    """Give what a value holds and did not before; a tensor or an array itself, if it was changed. Local."""
    now = contents(value)
    if isinstance(value, torch.Tensor):
        return [value] if now != old else []
    if isinstance(value, np.ndarray):
        same = all(np.array_equal(a, b, equal_nan=value.dtype.kind in "fc") for a, b in zip(now, old))
        return [] if same else [value]
    return [item for at, item in enumerate(now) if at >= len(old) or item is not old[at]]


def entries(value: Any) -> list[Any]:
    """List what a value holds, with its names where it has them; of a module its plain attributes. Local."""
    if isinstance(value, (list, set, deque)):
        return list(value)
    if isinstance(value, Binding):
        return [(value.name, value.table.get(value.name))]
    if isinstance(value, nn.Module):
        return [(name, inner) for name, inner in vars(value).items() if name not in OURS]
    if isinstance(value, type):
        return [(at, v) for at, v in vars(value).items() if not (at.startswith("__") or callable(v))]
    return list(dict.items(value if isinstance(value, dict) else getattr(value, "__dict__", {})))


def put_back(value: Any, then: list[Any]) -> None:
    """Let a value hold what it held, if that has changed. Local."""
    if isinstance(value, CONTAINERS) and type(value) not in PLAIN:
        return  # it may not let itself be changed, or change what it is given
    now = entries(value)
    if isinstance(value, (list, set, deque)):
        if [*map(id, now)] != [*map(id, then)]:
            value.clear()
            value.update(then) if isinstance(value, set) else value.extend(then)
    elif [(name, id(inner)) for name, inner in now] != [(name, id(inner)) for name, inner in then]:
        if isinstance(value, type):
            for name in {name for name, _ in now} - {name for name, _ in then}:
                delattr(value, name)
            for name, inner in then:
                if vars(value).get(name) is not inner:
                    setattr(value, name, inner)
            return
        table = value if isinstance(value, dict) else vars(value)
        table = value.table if isinstance(value, Binding) else table
        for name, _ in now:
            del table[name]
        table.update(then)
