"""What layers tell one another aside: by a dict, a list or an object that several of them hold.

In one process the next layer finds what the one before has put there; in stages each rank has its own, and
what is looked up with a default would silently be that. So the first forwards of a stage are looked at: no
tensor that they put where layers of other stages, hooks or the loss look may hang on the data or the weights
(a cache of masks may be filled on each rank). Of numbers there a warning tells: most are a log. Of modules
that layers of several stages have, it is noted what they set and read first, and compared behind the step.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import permutations
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from hpctrain.errors import ConfigError
from hpctrain.hidden import OURS
from hpctrain.log import ALIKE, LOGGER
from hpctrain.pipeline.hanging import Hanging
from hpctrain.pipeline.holders import (
    contents,
    entries,
    generators_of,
    held_by,
    is_own,
    modules_of,
    put_back,
    reachable,
)

BARE = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Classes of torch's that users take to put something into."""
WORDS = (bool, int, float, complex, str)


class Asides:
    """What layers of several stages hold."""

    def __init__(self, layers: list[tuple[str, nn.Module]], ranges: list[tuple[int, int]]) -> None:
        """Look what the layers hold, by name; a stage has those of a range. Local."""
        self._every = [held_by(layers[start:stop]) for start, stop in ranges]
        self.shared = self._shared()
        """By stage: its name here, one in another stage, and the container or object."""
        parts = [layers[start:stop] for start, stop in ranges]
        refuse_generators(parts)
        every = [{id(m): name for name, m in reversed(modules_of(part)) if is_told(m)} for part in parts]
        count = Counter(at for own in every for at in own)
        names = {at: name for own in reversed(every) for at, name in own.items()}
        self._modules = [{at: names[at] for at in own if count[at] > 1} for own in every]
        """By stage, those of the user's classes that another one has, too: what they are called."""
        self.noted = {stage: Noted() for stage in range(len(ranges))}
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
        return bool(self.shared[stage] or self._modules[stage])

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
        noted = self.noted[stage]
        with Hanging(tensors) as hanging, attributes_noted(self._modules[stage]) as (first, put):
            yield
        noted.read |= first
        noted.told |= {at for at, value in put.items() if hanging.has(value)}
        noted.counted |= {at for at, value in put.items() if isinstance(value, WORDS)}
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

    @property
    def meets(self) -> bool:
        """Whether stages have modules in common, so that what they note is to be compared. Local."""
        return any(self._modules)

    def compare(self, every: dict[int, "Noted"]) -> None:
        """Refuse what one stage reads of a module, and another one has set there; of numbers tell. Local.

        `every` is what all stages have noted. Raises ConfigError.
        """
        for (stage, own), (other, there) in permutations(sorted(every.items()), 2):
            for path, name in sorted(own.read & there.told):
                raise ConfigError(
                    f"stage {stage} reads {name} of {path}, which stage {other} has, too, and sets there: "
                    f"each has its own, and would not see it: give it to the next layer with the other "
                    f"outputs, or set parallel.cuts so that one stage has both"
                )
            for path, name in sorted(own.read & there.counted):
                self._tell(other, f"{path}.{name}", path, **ALIKE)

    def _tell(self, stage: int, here: str, there: str, **extra: bool) -> None:
        if not self._warned:
            self._warned = True
            LOGGER.warning(
                "stage %d changes numbers of %s, which another stage has, too, as %s: each rank has its "
                "own, so nothing that the model computes may hang on them",
                *(stage, here, there),
                extra=extra,
            )


def refuse_generators(parts: list[list[tuple[str, nn.Module]]]) -> None:
    """Refuse a generator of random numbers that several stages have: each has its own. Local."""
    seen = dict[int, tuple[int, str]]()
    for stage, layers in enumerate(parts):
        for name, one in generators_of(layers):
            first, other = seen.setdefault(id(one), (stage, name))
            if first != stage:
                raise ConfigError(
                    f"stages {first} and {stage} have one {type(one).__name__} of random numbers "
                    f"({other} and {name}); each rank has its own, whose numbers would be others than in "
                    f"one process: draw from torch without a generator, or set parallel.cuts so that one "
                    f"stage has it"
                )


def is_told(module: nn.Module) -> bool:
    """Whether a user may put something into a module. Local."""
    return is_own(type(module).__module__) or type(module) in BARE


@dataclass
class Noted:
    """Attributes of modules that several stages have, as (what the module is called, name)."""

    read: set[tuple[str, str]] = field(default_factory=set)
    """A forward reads them before it sets them."""
    told: set[tuple[str, str]] = field(default_factory=set)
    """It sets them to tensors of the data or the weights."""
    counted: set[tuple[str, str]] = field(default_factory=set)
    """It sets them to numbers or words."""


@contextmanager
def attributes_noted(
    modules: Mapping[int, str],
) -> Iterator[tuple[set[tuple[str, str]], dict[tuple[str, str], Any]]]:
    """Note plain attributes of modules, by id: those that the body reads first, and what it sets. Local."""
    first, put = set[tuple[str, str]](), dict[tuple[str, str], Any]()
    if not modules:
        yield first, put
        return
    get, usual = object.__getattribute__, nn.Module.__setattr__

    def read(module: nn.Module, name: str) -> Any:
        path = modules.get(id(module))
        if path is not None and name not in OURS and (path, name) not in put:
            first.add((path, name))  # whether it is there or not
        return get(module, name)

    def change(module: nn.Module, name: str, value: Any) -> None:
        path = modules.get(id(module))
        if path is not None:
            put[path, name] = value
        usual(module, name, value)

    nn.Module.__getattribute__, nn.Module.__setattr__ = read, change  # type: ignore[method-assign, assignment]
    try:
        yield first, put
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


@contextmanager
def unmoved(module: nn.Module) -> Iterator[None]:
    """Put back behind the body what the module's own train() may move: one process has not called it. Local.

    Modes, attributes and what they hold, what is trained, and the numbers of buffers.
    """
    modes = [(m, m.training) for m in module.modules()]
    wanted = [(p, p.requires_grad) for p in module.parameters()]
    own = module.buffers() if trains_itself(module) else ()
    numbers = [(b, b.detach().clone()) for b in own if not (b.is_meta or isinstance(b, FakeTensor))]
    try:
        with untouched([("", module)]) if trains_itself(module) else nullcontext():
            yield
    finally:
        for m, training in modes:
            m.training = training
        for parameter, trained in wanted:
            parameter.requires_grad_(trained)
        with torch.no_grad():
            for buffer, then in numbers:
                if not torch.equal(buffer, then):
                    buffer.copy_(then)


def trains_itself(module: nn.Module) -> bool:
    """Whether a module in it has a train() of its own. Local."""
    return any(type(m).train is not nn.Module.train or "train" in vars(m) for m in module.modules())


def changes(value: Any, old: list[Any]) -> list[Any]:
    """Give what a value holds and did not before; a tensor or an array itself, if it was changed. Local."""
    now = contents(value)
    if isinstance(value, torch.Tensor):
        return [value] if now != old else []
    if isinstance(value, np.ndarray):
        same = all(np.array_equal(a, b, equal_nan=value.dtype.kind in "fc") for a, b in zip(now, old))
        return [] if same else [value]
    return [item for at, item in enumerate(now) if at >= len(old) or item is not old[at]]
