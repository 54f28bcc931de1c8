"""A forward that is tried: on copies without memory, or with stand-ins for values.

It may keep what it makes outside of the model: in a dictionary of its file, an attribute of a class, a table
of a file that it imports only now. Those tensors have no numbers, and nobody makes them again; what is
computed with them later would be nothing, or something else, without an error. So they go behind the trial.
"""

import builtins
import io
import logging
import sys
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils import _pytree
from torch.utils._python_dispatch import _disable_current_modes

WITHOUT_NUMBERS = (FakeTensor, FunctionalTensor, fx.Proxy)
STANDING = frozenset(sys.stdlib_module_names) | {"torch", "numpy", "hpctrain"}
"""Packages that keep nothing of a model's forward."""
INSTALLED = ("site-packages", "dist-packages")
"""Folders of packages, of which only the files of the model's own classes are looked at."""
DEEP = 3
"""Levels of containers in a global that are looked at."""
MISSING = object()

Holder = dict[str, Any] | list[Any] | type
"""Keeps values: by key, place, or as attributes of a class."""


@contextmanager
def trial(model: nn.Module) -> Iterator[None]:
    """Run the body, which tries a model's forward: quietly, and what has no numbers is kept nowhere. Local.

    Modules in it that are moved to where they are stay as they are.
    """
    classes = {kind.__module__ for m in model.modules() for kind in type(m).__mro__}
    before = {id(holder): (holder, dict(entries(holder))) for holder in holders(classes)}
    try:
        with quiet(), imports_apart(), moves_left_out():
            yield
    finally:
        for holder in list(holders(classes)):
            put_back(holder, before.get(id(holder), (holder, {}))[1])


@contextmanager
def quiet() -> Iterator[None]:
    """Let torch neither log nor print all that it tried: the error says why. Local."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


@contextmanager
def imports_apart() -> Iterator[None]:
    """Let files that the body imports make their tables with numbers. Local."""
    own = builtins.__import__

    def imported(name: str, room: Any = None, *rest: Any, **named: Any) -> Any:
        if (
            str((room or {}).get("__name__")).split(".")[0] in STANDING
        ):  # torch's own, as those of the next line
            return own(name, room, *rest, **named)
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return own(name, room, *rest, **named)

    builtins.__import__ = imported  # type: ignore[assignment]
    try:
        yield
    finally:
        builtins.__import__ = own


@contextmanager
def moves_left_out() -> Iterator[None]:
    """Let `module.to(device)` do nothing where all is there: torch would exchange a copy's tensors. Local."""
    own = nn.Module._apply

    def applied(module: nn.Module, fn: Callable[[Any], Any], recurse: bool = True) -> nn.Module:
        kept = [tensors for m in module.modules() for tensors in (m._parameters, m._buffers)]
        with torch.no_grad():
            stay = all(fn(one) is one for tensors in kept for one in tensors.values() if one is not None)
        return module if stay else own(module, fn, recurse)  # type: ignore[no-untyped-call]

    nn.Module._apply = applied  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = own  # type: ignore[method-assign]


def holders(classes: Container[str]) -> Iterator[Holder]:
    """Give what files keep values in: globals, classes, functions, containers there. Local.

    Of the user's files, and of those by name that have the model's `classes`.
    """
    for name, room in list(sys.modules.items()):
        if name.split(".")[0] in STANDING or not isinstance(room, ModuleType):
            continue
        file = str(getattr(room, "__file__", None))
        if name not in classes and any(folder in file for folder in INSTALLED):
            continue
        yield vars(room)
        for value in list(vars(room).values()):
            yield from within(value, name)


def within(value: Any, room: str, depth: int = DEEP) -> Iterator[Holder]:
    """Give what a value of a file keeps values in; of classes and functions those of the file. Local."""
    if isinstance(value, type):
        if value.__module__ == room:
            yield value
            for kind in (dict, list):
                yield from (one for one in list(vars(value).values()) if type(one) is kind)
    elif type(value) in (dict, list):
        yield value
        for one in (value.values() if type(value) is dict else value) if depth else ():
            if type(one) in (dict, list):
                yield from within(one, room, depth - 1)
    elif isinstance(value, FunctionType):
        if value.__dict__:
            yield value.__dict__
    elif type(value).__module__ == room and hasattr(value, "__dict__"):
        yield vars(value)


def entries(holder: Holder) -> list[tuple[Any, Any]]:
    """List what a holder keeps, by key. Local."""
    if isinstance(holder, list):
        return list(enumerate(holder))
    return list((vars(holder) if isinstance(holder, type) else holder).items())


def put_back(holder: Holder, before: dict[Any, Any]) -> None:
    """Put back what stood where something without numbers stands; take away what is new. Local."""
    for key, value in reversed(entries(holder)):
        if not lacks_numbers(value):
            continue
        old = before.get(key, MISSING)
        if isinstance(holder, type):
            delattr(holder, key) if old is MISSING else setattr(holder, key, old)
        elif old is MISSING:
            del holder[key]
        else:
            holder[key] = old


def lacks_numbers(value: Any) -> bool:
    """Whether a value is a tensor without memory, or a tuple that has one. Local."""
    if type(value) is tuple or (isinstance(value, tuple) and hasattr(value, "_fields")):
        return any(isinstance(leaf, WITHOUT_NUMBERS) for leaf in _pytree.tree_leaves(value))
    return isinstance(value, WITHOUT_NUMBERS)
