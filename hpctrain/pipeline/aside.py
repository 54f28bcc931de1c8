"""What layers tell one another aside: by a dict, a list or an object that several of them hold.

In one process the next layer finds what the one before has put there; in stages each rank has its own, and
what is looked up with a default would silently be that. So the first forwards of a stage are looked at: no
tensor that they put where layers of other stages, hooks or the loss look may hang on the data or the weights
(a cache of masks may be filled on each rank). Of numbers there a warning tells: most are a log.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree

from hpctrain.errors import ConfigError
from hpctrain.hidden import OURS, is_plain
from hpctrain.log import LOGGER
from hpctrain.pipeline.holders import (
    contents,
    entries,
    held_by,
    inside,
    is_own,
    names_set,
    put_back,
    reachable,
)
from hpctrain.tensors import Looking, storage_of, tensors_in


class Asides:
    """What layers of several stages hold."""

    def __init__(self, layers: list[tuple[str, nn.Module]], ranges: list[tuple[int, int]]) -> None:
        """Look what the layers hold, by name; a stage has those of a range. Local."""
        self._every = [held_by(layers[start:stop]) for start, stop in ranges]
        self.shared = self._shared()
        """By stage: its name here, one in another stage, and the container or object."""
        parts = [layers[start:stop] for start, stop in ranges]
        self._modules = [
            {id(m): m for _, layer in part for m in layer.modules() if is_own(type(m).__module__)}
            for part in parts
        ]
        """By stage, those of the user's classes that another one has, too."""
        count = Counter(at for own in self._modules for at in own)
        self._modules = [{at: m for at, m in own.items() if count[at] > 1} for own in self._modules]
        some = any(self._modules)
        set_there = [names_set([layer for _, layer in part]) if some else set[str]() for part in parts]
        self._set_elsewhere = [
            {name for other, names in enumerate(set_there) if other != at for name in names}
            for at in range(len(parts))
        ]
        """By stage: attributes that the forwards of other stages may set."""
        self._warned = False

    def _shared(self) -> list[list[tuple[str, str, Any]]]:
        found = []
        for own in self._every:
            others = [other for other in self._every if other is not own]
            there = {at: other[at][0] for other in others for at in own if at in other}
            found.append([(own[at][0], name, own[at][1]) for at, name in there.items()])
        return found

    def looks(self, stage: int) -> bool:
        """Whether there is something to look at. Local."""
        return bool(self.shared[stage] or (self._modules[stage] and self._set_elsewhere[stage]))

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
        with Hanging(tensors) as hanging, reads_noted(self._modules[stage].keys()) as reads:
            yield
        self._refuse_reads(stage, reads, hanging)
        for (here, there, value), old in zip(shared, before):
            new = changes(value, old)
            if any(map(hanging.has, new)):
                raise ConfigError(
                    f"stage {stage} changes {here}, which another stage has, too, as {there}, and would not "
                    f"see: give it to the next layer with the other outputs, or set parallel.cuts so that "
                    f"one stage has both"
                )
            if any(map(hanging.may_have, new)):
                self._tell(stage, here, there)

    def _refuse_reads(self, stage: int, reads: dict[tuple[int, str], bool], hanging: "Hanging") -> None:
        """Refuse what a stage reads of a module and another one sets; of numbers that both set tell. Local.

        What both set otherwise (a cache of masks, say) is the same in both.
        """
        for (at, name), is_set in reads.items():
            if name not in self._set_elsewhere[stage]:
                continue
            module = self._modules[stage][at]
            value, kind = getattr(module, name, None), type(module).__name__
            if not is_set or hanging.has(value):
                raise ConfigError(
                    f"stage {stage} reads {name} of a {kind} that another stage has, too, and whose forward "
                    f"sets it there: this stage would not see it: give it to the next layer with the other "
                    f"outputs, or set parallel.cuts so that one stage has both"
                )
            if isinstance(value, (bool, int, float, complex, str)):
                self._tell(stage, f"{name} of a {kind}", f"the same {kind}")

    def _tell(self, stage: int, here: str, there: str) -> None:
        if not self._warned:
            self._warned = True
            LOGGER.warning(
                "stage %d changes numbers of %s, which another stage has, too, as %s: each rank has its "
                "own, so nothing that the model computes may hang on them",
                *(stage, here, there),
            )


@contextmanager
def reads_noted(modules: Collection[int]) -> Iterator[dict[tuple[int, str], bool]]:
    """Note which plain attributes of modules, by id, are read before the body sets them. Local.

    Gives by module and name whether the body has set them later.
    """
    found, put = dict[tuple[int, str], bool](), set[tuple[int, str]]()
    if not modules:
        yield found
        return
    get, usual = object.__getattribute__, nn.Module.__setattr__

    def read(module: nn.Module, name: str) -> Any:
        value = get(module, name)
        at = id(module), name
        asked = id(module) in modules and name not in OURS and not name.startswith("__")
        if asked and at not in put and is_plain(module, name):
            found.setdefault(at, False)
        return value

    def change(module: nn.Module, name: str, value: Any) -> None:
        at = id(module), name
        put.add(at)
        if at in found:
            found[at] = True
        usual(module, name, value)

    nn.Module.__getattribute__, nn.Module.__setattr__ = read, change  # type: ignore[method-assign, assignment]
    try:
        yield found
    finally:
        del nn.Module.__getattribute__
        nn.Module.__setattr__ = usual  # type: ignore[method-assign]


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


def changes(value: Any, old: list[Any]) -> list[Any]:
    """Give what a value holds and did not before; a tensor or an array itself, if it was changed. Local."""
    now = contents(value)
    if isinstance(value, torch.Tensor):
        return [value] if now != old else []
    if isinstance(value, np.ndarray):
        same = all(np.array_equal(a, b, equal_nan=value.dtype.kind in "fc") for a, b in zip(now, old))
        return [] if same else [value]
    return [item for at, item in enumerate(now) if at >= len(old) or item is not old[at]]
