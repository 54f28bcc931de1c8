"""What layers keep in a forward, for their backward to read: a hook, an autograd.Function, a checkpoint.

      one process   F0 B0 F1 B1 …           B0 reads what F0 kept
      in stages     F0 F1 F2 B0 …           B0 would read what F2 kept

So the first step's passes are looked at: attributes, and buffers or frozen weights that forwards change. A
backward that reads what a later micro-batch's forward has kept raises there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from hpctrain.errors import ConfigError
from hpctrain.hidden import OURS
from hpctrain.pipeline.state import plain, plain_of

COUNTS = (bool, int, float, list, dict, set)
"""What a backward may read and set or change again: counts, logs and caches."""
MOVED = frozenset(vars(nn.BatchNorm1d(1))) | {"running_mean", "running_var", "num_batches_tracked"}
"""What is a BatchNorm's: statistics are moved on, and nothing hangs on them in training."""


class Overwritten:
    """Notes which micro-batch's forward has set something last."""

    def __init__(self, module: nn.Module) -> None:
        """Take whose layers. Local."""
        self._module = module
        self._names = {id(inner): name for name, inner in module.named_modules()}
        self._by: dict[str, int] = {}
        """The micro-batch, by the attribute's name."""

    @contextmanager
    def forward(self, v: int) -> Iterator[None]:
        """Note what the body, the forward of micro-batch `v`, sets or changes. Local."""
        holders, marks = self._holders(), self._marks()

        def noted(path: str) -> None:
            self._by[path] = v

        with self._sets(noted):
            yield
        now = self._holders()
        changed = [path for path, old in holders.items() if path in now and is_overwritten(old, now[path])]
        changed += [path for path, mark in self._marks().items() if marks.get(path, mark) != mark]
        self._by |= dict.fromkeys(changed, v)

    @contextmanager
    def backward(self, v: int) -> Iterator[None]:
        """Raise ConfigError where the body, the backward of `v`, reads what a later one has set. Local.

        What an earlier one has set (a table), it reads in one process, too. A number, a list or a dictionary
        that it reads and sets again is a count (of a function that an adjoint method calls).
        """
        get, more = object.__getattribute__, nn.Module.__getattr__
        counts = dict[str, ConfigError]()

        def look(module: nn.Module, name: str, value: Any) -> Any:
            path = self._path(module, name)
            if path and self._by.get(path, v) > v:
                if not isinstance(value, COUNTS):
                    raise self._error(v, path)
                counts[path] = self._error(v, path)
            return value

        def put(path: str) -> None:
            counts.pop(path, None)
            self._by[path] = v

        if not self._by:
            yield
            return

        def plain_one(module: nn.Module, name: str) -> Any:
            return look(module, name, get(module, name))

        def kept_one(module: nn.Module, name: str) -> Any:
            return look(module, name, more(module, name))

        before = self._holders()
        nn.Module.__getattribute__ = plain_one  # type: ignore[method-assign, assignment]
        nn.Module.__getattr__ = kept_one  # type: ignore[method-assign]
        try:
            with self._sets(put):
                yield
        finally:
            del nn.Module.__getattribute__
            nn.Module.__getattr__ = more  # type: ignore[method-assign]
        now = self._holders()
        for path, error in counts.items():
            if path not in now or before.get(path) == now[path]:
                raise error

    @contextmanager
    def _sets(self, note: Callable[[str], object]) -> Iterator[None]:
        """Hear which attributes the body sets to something else, by name. Local."""
        put = nn.Module.__setattr__

        def change(module: nn.Module, name: str, value: Any) -> None:
            path = self._path(module, name)
            if path and is_other(module.__dict__.get(name, note), value):
                note(path)
            put(module, name, value)

        nn.Module.__setattr__ = change  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.__setattr__ = put  # type: ignore[method-assign]

    def _holders(self) -> dict[str, Any]:
        """Tell the contents of lists, dictionaries and sets in attributes, by name, where `plain` can."""
        found = dict[str, Any]()
        for path, name, value in plain_of(self._module):
            if isinstance(value, dict) and plain(value) is not None:
                found[f"{path}.{name}".lstrip(".")] = {key: plain(one) for key, one in value.items()}
            elif isinstance(value, (list, set)) and (told := plain(value)) is not None:
                found[f"{path}.{name}".lstrip(".")] = told
        return found

    def _marks(self) -> dict[str, tuple[int, int]]:
        """Tell which buffers and frozen weights modules have, and how often each was changed in place."""
        return {
            path: (id(tensor), tensor._version)
            for owner in self._module.modules()
            for kept in (owner._buffers, owner._parameters)
            for name, tensor in kept.items()
            if tensor is not None and not tensor.requires_grad and (path := self._path(owner, name))
        }

    def _path(self, module: nn.Module, name: str) -> str:
        """Name an attribute that is looked at; else ""."""
        at = id(module)
        if name in OURS or at not in self._names or (name in MOVED and isinstance(module, _NormBase)):
            return ""
        return f"{self._names[at]}.{name}".lstrip(".")

    def _error(self, v: int, path: str) -> ConfigError:
        return ConfigError(
            f"the backward of micro-batch {v} reads {path}, which the forward of micro-batch "
            f"{self._by[path]} has set meanwhile: in stages several are on their way at once; keep it in "
            f"what that backward has of its own (ctx, a variable that the hook remembers), or set "
            f"parallel.cuts so that the last stage has the layer, and parallel.schedule = 1f1b"
        )


def is_other(old: Any, new: Any) -> bool:
    """Whether a value is not the one before: the same object, or equal. Local."""
    if old is new:
        return False
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        alike = old.shape == new.shape and old.dtype is new.dtype and old.device == new.device
        return not (alike and torch.equal(old.detach(), new.detach()))
    kinds = (bool, int, float, str, tuple)
    return not (type(old) is type(new) and isinstance(old, kinds) and plain(old) == plain(new) is not None)


def is_overwritten(old: Any, new: Any) -> bool:
    """Whether what a list, dictionary or set held is no more there; a dictionary may have more now. Pure.

    >>> is_overwritten({"a": "1"}, {"a": "1", "b": "2"}), is_overwritten({"a": "1"}, {"a": "2"})
    (False, True)
    """
    if isinstance(old, dict) and isinstance(new, dict):
        return any(new.get(key) != value for key, value in old.items())
    return bool(old != new)
