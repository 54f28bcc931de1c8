"""What layers tell one another aside: by a dict, a list or an object that several of them hold.

In one process the next layer finds what the one before has put there; in stages each rank has its own, and
what is looked up with a default would silently be that. So the first forward of a stage is looked at: what
it puts where layers of other stages look must not hang on the data or the weights (a cache of masks may be
filled on each rank).
"""

import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import CellType, FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

from hpctrain.errors import ConfigError
from hpctrain.hidden import OURS, plain
from hpctrain.tensors import Looking, storage_of, tensors_in

CONTAINERS = (dict, list, set, deque)
MOST = 10_000
"""Entries of a container that are looked at."""
FOREIGN = {*sys.stdlib_module_names, "torch", "numpy", "mpi4py", "h5py", "hpctrain"} - {"__main__"}


class Asides:
    """What layers of several stages hold."""

    def __init__(self, layers: list[tuple[str, nn.Module]], ranges: list[tuple[int, int]]) -> None:
        """Look what the layers hold, by name; a stage has those of a range. Local."""
        every = [held_by(layers[start:stop]) for start, stop in ranges]
        self.shared = [
            [
                (where, other[at][0], value)
                for at, (where, value) in own.items()
                for other in [next((e for e in every if e is not own and at in e), {})]
                if other
            ]
            for own in every
        ]
        """By stage: its name here, one in another stage, and the container or object."""
        self._seen = set[tuple[int, bool]]()

    @contextmanager
    def watching(self, stage: int, training: bool, tensors: Iterable[torch.Tensor]) -> Iterator[None]:
        """Look at a stage's first forward; `tensors`: its weights and what it got. Local.

        Raises ConfigError where it puts what hangs on them where another stage looks.
        """
        shared = self.shared[stage]
        if not shared or (stage, training) in self._seen:
            yield
            return
        self._seen.add((stage, training))
        before = [contents(value) for _, _, value in shared]
        with Hanging(tensors) as hanging:
            yield
        for (here, there, value), old in zip(shared, before):
            known = {id(item) for item in old}
            new = [item for item in contents(value) if id(item) not in known]
            if any(map(hanging.holds, new)):
                raise ConfigError(
                    f"stage {stage} changes {here}, which another stage has, too, as {there}, and would not "
                    f"see: give it to the next layer with the other outputs, or set parallel.cuts so that "
                    f"one stage has both"
                )


@contextmanager
def untouched(layers: list[tuple[str, nn.Module]]) -> Iterator[None]:
    """Put back behind the body what layers hold, with what was in it before. Local."""
    held = [value for _, value in held_by(layers).values()]
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

    def holds(self, value: Any) -> bool:
        """Whether a value has a tensor that hangs on them, or a number that may. Local."""
        inside = [contents(outer) for _, outer in reachable([("", value)]).values()]
        return any(
            storage_of(leaf) in self.storages if isinstance(leaf, torch.Tensor) else self.numbers
            for leaf in _pytree.tree_leaves([value, inside])
            if isinstance(leaf, (torch.Tensor, bool, int, float, complex))
        )


def held_by(layers: list[tuple[str, nn.Module]]) -> dict[int, tuple[str, Any]]:
    """Find containers and objects in plain attributes, classes, closures and globals of layers. Local."""
    found: list[tuple[str, Any]] = []
    for layer, module in layers:
        names = {id(m): f"{layer}.{own}".rstrip(".") for own, m in module.named_modules()}
        found += [(f"{names[id(owner)]}.{name}", value) for owner, name, value in plain(module)]
        kinds = {kind for owner in module.modules() for kind in type(owner).__mro__}
        found += [(kind.__name__, kind) for kind in kinds]
    known = reachable(found)
    return {at: (name, v) for at, (name, v) in known.items() if not isinstance(v, (type, FunctionType))}


def reachable(values: Iterable[tuple[str, Any]]) -> dict[int, tuple[str, Any]]:
    """Find the containers, objects, classes and functions in values, and in those, by id. Local."""
    found: dict[int, tuple[str, Any]] = {}
    left = list(values)
    while left:
        name, value = left.pop()
        if id(value) in found:
            continue
        if isinstance(value, (type, FunctionType)) and not is_own(value.__module__ or ""):
            continue
        if isinstance(value, type):
            found[id(value)] = name, value
            for at, own in list(vars(value).items()):
                inner = getattr(own, "fget", getattr(own, "__func__", own))  # of a property, a static method
                if isinstance(inner, FunctionType) or not at.startswith("__"):
                    left.append((f"{value.__name__}.{at}", inner))
        elif isinstance(value, FunctionType):
            found[id(value)] = name, value
            code, known = value.__code__, value.__globals__
            cells = zip(code.co_freevars, value.__closure__ or ())
            left += [(f"{name}: {own}", cell.cell_contents) for own, cell in cells if is_filled(cell)]
            left += [(own, known[own]) for own in code.co_names if own in known]
        elif isinstance(value, (tuple, frozenset)):
            left += [(name, inner) for inner in value]
        elif isinstance(value, CONTAINERS) or is_object(value):
            found[id(value)] = name, value
            left += [(name, inner) for inner in contents(value)]
    return found


def is_own(module: str) -> bool:
    """Whether a module's name is none of Python's, torch's or ours. Pure."""
    return module.split(".")[0] not in FOREIGN


def is_object(value: Any) -> bool:
    """Whether a value is an object of a user's class, no module and no tensor. Local."""
    known = isinstance(value, (type, ModuleType, nn.Module, torch.Tensor)) or not hasattr(value, "__dict__")
    return not known and (isinstance(value, SimpleNamespace) or is_own(type(value).__module__))


def is_filled(cell: CellType) -> bool:
    """Whether a closure's variable has a value by now. Local."""
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def entries(value: Any) -> list[Any]:
    """List what a container has, or an object or a module as plain attributes, with its names. Local."""
    if isinstance(value, (list, set, deque)):
        return list(value)
    if isinstance(value, nn.Module):
        return [(name, inner) for name, inner in vars(value).items() if name not in OURS]
    return list((value if isinstance(value, dict) else vars(value)).items())


def put_back(value: Any, then: list[Any]) -> None:
    """Let a container, an object or a module have what it had, if it has changed. Local."""
    now = entries(value)
    if isinstance(value, (list, set, deque)):
        if [*map(id, now)] != [*map(id, then)]:
            value.clear()
            value.update(then) if isinstance(value, set) else value.extend(then)
    elif [(name, id(inner)) for name, inner in now] != [(name, id(inner)) for name, inner in then]:
        table = value if isinstance(value, dict) else vars(value)
        for name, _ in now:
            del table[name]
        table.update(then)


def contents(value: Any) -> list[Any]:
    """List what a container or an object of the user's has in it. Local."""
    if isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, CONTAINERS):
        inner = list(value)
    else:
        inner = list(vars(value).values()) if is_object(value) else []
    return inner[:MOST]
