"""Models with a train() of their own, whose forward is written down once a mode.

Such a train() may keep parts in eval mode, or change what the forward computes by, from some step on, too.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hpctrain.draws import streams_kept
from hpctrain.errors import ConfigError
from hpctrain.hidden import HOOKS, OURS, submodule
from hpctrain.log import ALIKE, LOGGER
from hpctrain.pipeline.aside import attributes_noted, trains_itself, unmoved
from hpctrain.pipeline.exporting import answered_no
from hpctrain.pipeline.later import Arguments, fingerprint, seed_others
from hpctrain.pipeline.skeleton import OTHERWISE, UnwritableError, skeleton
from hpctrain.pipeline.state import plain, plain_values
from hpctrain.tensors import tensors_in

TIMES = (2, 3, 10)
"""Calls of train() after which a forward is looked at again, before a run."""


class Modes:
    """Gives copies of a module in a mode, and refuses a train() that makes a forward another one."""

    def __init__(
        self,
        module: nn.Module,
        pristine: nn.Module,
        fake: FakeTensorMode,
        stages: int,
        write: Callable[[Arguments, nn.Module], torch.export.ExportedProgram],
    ) -> None:
        """Take the module, a copy of it without memory that nobody runs, and what writes a copy down."""
        self.module, self._pristine, self._fake, self._stages, self._write = (
            module, pristine, fake, stages, write,
        )  # fmt: skip
        self.own_train, self._runs, self._told = trains_itself(module), False, False
        self._follower: nn.Module | None = None
        """A copy whose train() is called as often, for what other ranks have: theirs is not called here."""
        self._reads = set[str]()
        """Plain attributes by which the forward may compute."""
        self._settings: dict[bool, dict[str, Any]] = {}
        """By mode: its plain values, and the modes of its parts, when it was looked at last."""
        self._first: dict[bool, tuple[Arguments, list[str]]] = {}
        """By mode: arguments, and the forward that was written down for them."""

    def twin(self, training: bool, times: int = 1) -> nn.Module:
        """Give a copy as the module is in a mode; before it runs, as it was brought there. Local."""
        twin = skeleton(self._pristine, self._fake)
        for name, here in self.module.named_modules():
            m = submodule(self._follower, name) if self._follower and is_elsewhere(here) else here
            own = vars(m).items() if self.own_train else ()
            values = {at: value for at, value in own if at not in OURS and isinstance(plain(value), str)}
            vars(submodule(twin, name)).update(
                (at, deepcopy(value)) for at, value in values.items() if not tensors_in(value)
            )
            submodule(twin, name).training = m.training
        for _ in range(0 if self._runs else times):
            try:
                twin.train(training)
            except Exception:  # it asks for numbers, which a copy has not
                nn.Module.train(twin, training)
        return twin

    @contextmanager
    def noted(self, twin: nn.Module) -> Iterator[None]:
        """Note which plain attributes of a copy the body reads, if train() may change some. Local."""
        modules = {id(m): name for name, m in twin.named_modules()} if self.own_train else {}
        with attributes_noted(modules) as (first, _):
            yield
        self._reads |= {f"{path}.{name}".lstrip(".") for path, name in first}

    def written(self, training: bool, arguments: Arguments, program: torch.export.ExportedProgram) -> None:
        """Take what was written down in a mode. Local."""
        if self.own_train and training not in self._first:
            self._first[training] = arguments, fingerprint(program)

    def look(self, training: bool, arguments: Arguments, program: torch.export.ExportedProgram) -> None:
        """Refuse a train() that changes what the forward computes each time, or in a mode unseen. Local.

        Raises UnwritableError.
        """
        if not self.own_train:
            return
        twin, hung = skeleton(self._pristine, self._fake), list[list[int]]()
        with suppress(Exception):  # it asks for numbers, which a copy has not
            for mode in (training, not training, training):
                hung.append(hangs_on(twin))
                twin.train(mode)
        if any(one != hangs_on(twin) for one in hung):
            raise UnwritableError(
                f"parallel.stages = {self._stages}: a train() of the model sets hooks, or a forward, which "
                f"operators would have in one mode and not in the other: do that in the constructor; "
                f"{OTHERWISE}"
            )
        try:
            with answered_no():
                others = [self._after(times, training, arguments) for times in TIMES]
        except Exception:  # what it kept stands in the way of a copy: it is looked at as it runs
            return
        if any(fingerprint(other) != fingerprint(program) for other in others):
            raise UnwritableError(
                f"parallel.stages = {self._stages}: a train() of the model changes what its forward computes "
                f"each time it is called, and the forward is written down once: keep that in a buffer, or in "
                f"a submodule that runs as it is (between parallel.cuts, or in a row); {OTHERWISE}"
            )

    def _after(self, times: int, training: bool, arguments: Arguments) -> torch.export.ExportedProgram:
        """Write the forward down as it is after so many calls of train(). Local."""
        twin = self.twin(training, times)
        seed_others()
        return self._write(arguments, twin)

    def switched(self, training: bool) -> None:
        """Refuse a train() that has changed what the forward computes in this mode. Local.

        Where it changes what the forward reads, that is written down again, to be compared. Raises
        ConfigError.
        """
        self._runs = True
        if not self.own_train:
            return
        if self._follower or any(is_elsewhere(m) and trains_itself(m) for m in self.module.modules()):
            self._follower = self._follower or skeleton(self._pristine, self._fake)
            with unmoved(self.module), suppress(Exception):  # it asks for numbers, which a copy has not
                self._follower.train(training)
        values = {at: value for at, value in plain_values(self.module).items() if isinstance(value, str)}
        modes = {f"{name}.training".lstrip("."): m.training for name, m in self.module.named_modules()}
        now = {**values, **modes}
        before = self._settings.setdefault(training, now)
        others = [at for at, v in now.items() if before.get(at) != v and (at in self._reads or at in modes)]
        if not others or training not in self._first:
            return
        self._settings[training] = now
        arguments, written = self._first[training]
        what, began = ", ".join(others[:3]), time.perf_counter()
        try:
            with streams_kept(), unmoved(self.module), answered_no():
                seed_others()
                same = fingerprint(self._write(arguments, self.twin(training))) == written
        except Exception:
            self._tell(
                "train(%s) of the model changes %s, which its forward reads, and that is written down once: "
                "whether it computes the same can't be told (hpctrain verify compares the first steps)",
                *(training, what),
            )
            return
        if not same:
            raise ConfigError(
                f"train({training}) of the model has changed {what}, by which its forward computes something "
                f"else now, but is written down once: keep that in a buffer, or in a submodule that runs as "
                f"it is (between parallel.cuts, or in a row); {OTHERWISE}"
            )
        self._tell(
            "train(%s) of the model changes %s, which its forward reads: whether that computes the same is "
            "looked at each time, in %.1f s",
            *(training, what, time.perf_counter() - began),
        )

    def _tell(self, text: str, *values: Any) -> None:
        """Say it once."""
        if not self._told:
            self._told = True
            LOGGER.warning(text, *values, extra=ALIKE)


def is_elsewhere(module: nn.Module) -> bool:
    """Whether other ranks have all of a module's parameters and buffers. Local."""
    kept = [t for m in module.modules() for own in (m._parameters, m._buffers) for t in own.values()]
    return bool(kept) and all(tensor is None for tensor in kept)


def hangs_on(module: nn.Module) -> list[int]:
    """Count what hangs on a module's parts: hooks, and forwards of their own. Local."""
    return [len(getattr(m, kind)) + ("forward" in vars(m)) for m in module.modules() for kind in HOOKS]
