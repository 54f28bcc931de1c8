"""What layers keep in attributes in a forward, for their backward to read: a hook, an autograd.Function.

      one process   F0 B0 F1 B1 …           B0 reads what F0 kept
      in stages     F0 F1 F2 B0 …           B0 would read what F2 kept

So the first step's passes are looked at, and a backward that reads what another micro-batch's forward has
kept raises there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from hpctrain.errors import ConfigError
from hpctrain.hidden import OURS
from hpctrain.pipeline.state import plain_values


class Overwritten:
    """Notes which micro-batch's forward has set an attribute last."""

    def __init__(self, module: nn.Module) -> None:
        """Take whose layers' attributes. Local."""
        self._module = module
        every = module.named_modules()  # running statistics are moved on, and nothing hangs on them
        self._names = {id(inner): name for name, inner in every if not isinstance(inner, _NormBase)}
        self._by: dict[str, int] = {}
        """The micro-batch, by the attribute's name."""

    @contextmanager
    def forward(self, v: int) -> Iterator[None]:
        """Note what the body, the forward of micro-batch `v`, sets or changes. Local."""
        before = plain_values(self._module)

        def noted(path: str) -> None:
            self._by[path] = v

        with self._sets(noted):
            yield
        now = plain_values(self._module)
        self._by |= {at: v for at, value in now.items() if at in before and before[at] != value}

    @contextmanager
    def backward(self, v: int) -> Iterator[None]:
        """Raise ConfigError where the body, the backward of `v`, reads what a later one has set. Local.

        What an earlier one has set (a table), it reads in one process, too. A number that it reads and sets
        again is a count (of a function that an adjoint method calls).
        """
        get, numbers = object.__getattribute__, dict[str, ConfigError]()

        def read(module: nn.Module, name: str) -> Any:
            value = get(module, name)
            if id(module) in self._names and self._by.get(path := self._path(module, name), v) > v:
                if type(value) not in (bool, int, float):
                    raise self._error(v, path)
                numbers[path] = self._error(v, path)
            return value

        def put(path: str) -> None:
            numbers.pop(path, None)
            self._by[path] = v

        if not self._by:
            yield
            return
        nn.Module.__getattribute__ = read  # type: ignore[method-assign, assignment]
        try:
            with self._sets(put):
                yield
        finally:
            del nn.Module.__getattribute__
        for error in numbers.values():
            raise error

    @contextmanager
    def _sets(self, note: Callable[[str], object]) -> Iterator[None]:
        """Hear which attributes the body sets, by name. Local."""
        put = nn.Module.__setattr__

        def change(module: nn.Module, name: str, value: Any) -> None:
            if id(module) in self._names and name not in OURS and vars(module).get(name, note) is not value:
                note(self._path(module, name))
            put(module, name, value)

        nn.Module.__setattr__ = change  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.__setattr__ = put  # type: ignore[method-assign]

    def _path(self, module: nn.Module, name: str) -> str:
        return f"{self._names[id(module)]}.{name}".lstrip(".")

    def _error(self, v: int, path: str) -> ConfigError:
        return ConfigError(
            f"the backward of micro-batch {v} reads {path}, which the forward of micro-batch "
            f"{self._by[path]} has set meanwhile: in stages several are on their way at once; keep it in "
            f"what that backward has of its own (ctx, a variable that the hook remembers), or set "
            f"parallel.cuts so that the last stage has the layer, and parallel.schedule = 1f1b"
        )
