"""What values hold, as far as it can be found by walking: containers, objects, classes, functions, names."""

import random
import sys
import threading
from argparse import Namespace
from collections import OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Iterable
from contextvars import ContextVar
from functools import lru_cache, partial
from itertools import chain
from queue import Queue
from types import BuiltinMethodType, CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from hpctrain.hidden import HOOKS, OURS, plain

CONTAINERS = (dict, list, set, deque)
PLAIN = (dict, OrderedDict, defaultdict, list, set, deque)
HOLDERS = (
    *(*CONTAINERS, SimpleNamespace, UserDict, UserList, Queue),
    *(Namespace, WeakKeyDictionary, threading.local, ContextVar),
)
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
GLOBAL = (torch.default_generator, np.random.mtrand._rand, vars(random)["_inst"])
CACHED = type(lru_cache(lambda: None))
MOST_FOUND = 100_000
MOST = 10_000
"""Entries of a container that are looked at."""
FOREIGN = {*sys.stdlib_module_names, "torch", "numpy", "mpi4py", "h5py", "hpctrain"} - {"__main__"}


class Binding:
    """A name of a module, which a function uses and may give another value."""

    def __init__(self, table: dict[str, Any], name: str) -> None:
        """Take the module's names, and one of them."""
        self.table, self.name = table, name


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
            left += [(f"{name}: {own}", inner) for own, inner in closed_over(value)]
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


def modules_of(layers: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """List the modules in layers by name, and those that they hold but not as submodules. Local."""
    found = [(f"{layer}.{own}".strip("."), m) for layer, top in layers for own, m in top.named_modules()]
    return [*found, *((name, value) for name, value in values_in(layers) if isinstance(value, nn.Module))]


def generators_of(layers: list[tuple[str, nn.Module]]) -> list[tuple[str, Any]]:
    """List the generators of random numbers that layers hold, by name, but for the global ones. Local."""
    return [
        (name, value)
        for name, value in values_in(layers)
        if isinstance(value, GENERATORS) and all(value is not one for one in GLOBAL)
    ]


def caches_of(module: nn.Module) -> list[Any]:
    """List the functions under `functools.lru_cache` that a module's forwards may call. Local."""
    values = [value for _, value in values_in([("", module)])]
    for kind in {kind for m in module.modules() for kind in type(m).__mro__ if is_own(kind.__module__)}:
        values += [getattr(value, "__func__", value) for value in vars(kind).values()]
    return [value for value in values if isinstance(value, CACHED)]


def values_in(layers: list[tuple[str, nn.Module]]) -> list[tuple[str, Any]]:
    """List what layers hold, by name, and what that holds. Local."""
    found = [(f"{layer}.{name}", value) for layer, module in layers for _, name, value in plain(module)]
    for name, value in held_by(layers).values():
        inner = [own for _, own in closed_over(value)] if isinstance(value, FunctionType) else []
        found += [(name, own) for own in [*contents(value), *inner]]
    return found


def closed_over(function: FunctionType) -> list[tuple[str, Any]]:
    """List the variables that a function remembers, by name, where they have a value. Local."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or ())
    return [(name, cell.cell_contents) for name, cell in cells if is_filled(cell)]


def inside(value: Any) -> list[Any]:
    """List a value and all that it holds. Local."""
    every = (outer for _, outer in reachable([("", value)]).values())
    return [value, [contents(outer) for outer in every if not isinstance(outer, (torch.Tensor, np.ndarray))]]


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
