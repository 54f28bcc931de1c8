"""Whether a forward, which is written down once, computes the same in every call.

Copies without memory are called a few times, and written down again behind that.
"""

import random
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree

from hpctrain.hidden import submodule
from hpctrain.pipeline.exporting import answered_no
from hpctrain.pipeline.hanging import Hanging
from hpctrain.pipeline.skeleton import OTHERWISE, UnwritableError, address_of, skeleton
from hpctrain.pipeline.state import changed_by, without_memory
from hpctrain.pipeline.trial import trial
from hpctrain.tensors import tensors_in, with_tensors

Arguments = tuple[Any, dict[str, Any]]
"""Of a forward: by place and by name."""

SEEDS = 4
"""With which a forward that draws from Python or NumPy is written down again."""

MOST_COMPARED = 64
"""Numbers of a constant that are looked at."""

SETTINGS = (bool, int, float, str)
"""Plain values of a module by which its forward may differ."""

NUMBERS = (int, float)

LATER = (1, 2, 3, 4, 5, 10, 100, 1_000_001)
"""Calls after which a forward is looked at again: what it does every so often, or only at first, shows."""


class Later:
    """Calls a module's forward without memory, and compares how it is written down behind that."""

    def __init__(
        self,
        module: nn.Module,
        fake: FakeTensorMode,
        stages: int,
        caches: Iterable[Any],
        write: Callable[[Arguments, nn.Module], torch.export.ExportedProgram],
    ) -> None:
        """Take the module, the user's caches that its forward fills, and what writes a copy of it down."""
        self.module, self.fake, self.stages, self._caches = module, fake, stages, caches
        self._write = write
        self.changed: list[str] = []
        """Plain attributes that the forward changes."""

    def look(self, arguments: Arguments, program: torch.export.ExportedProgram) -> None:
        """Find which plain attributes a forward changes, which torch.export puts back. Local.

        `program` is what was written down. Raises UnwritableError where later calls compute something else.
        """
        twin, data = self._twin(), tensors_in(arguments)
        own = dict(twin.named_parameters(remove_duplicate=False))

        def forward() -> Any:
            seed_others()
            given, named = with_tensors(torch.clone, arguments)
            return twin(*given, **named)

        with self._calling():
            self.changed, computes, other = changed_by(twin, forward, data)
        now = dict(twin.named_parameters(remove_duplicate=False))
        if tied := [name for name, p in own.items() if now.get(name) is not p]:
            raise UnwritableError(
                f"parallel.stages = {self.stages}: the forward sets the parameter {tied[0]} anew, which "
                f"operators can't: do that in the constructor (a weight that two layers have is tied "
                f"there); {OTHERWISE}"
            )
        if computes:
            raise UnwritableError(
                f"parallel.stages = {self.stages}: the forward keeps {', '.join(computes[:3])} of one call "
                f"and computes by it in the next, but is written down once: make that a buffer which is "
                f"changed in place, or keep it in a submodule that runs as it is (between parallel.cuts, or "
                f"in a row); {OTHERWISE}"
            )
        for calls in LATER if self.changed else ():
            later = self._written_after(calls, arguments)
            if later and fingerprint(later) != fingerprint(program):
                raise UnwritableError(
                    f"parallel.stages = {self.stages}: the forward changes {', '.join(self.changed[:3])} "
                    f"and computes something else by it, but is written down once: count in a submodule "
                    f"that runs as it is (between parallel.cuts, or in a row), or in a buffer that is "
                    f"changed in place; {OTHERWISE}"
                )
        if other and self._written_in_turn(arguments):
            raise UnwritableError(
                f"parallel.stages = {self.stages}: the forward computes something else in each call, but is "
                f"written down once ({other}; it counts in an object or a global, takes the next of an "
                f"iterator, draws from a generator of its own, or asks the time): count in a submodule that "
                f"runs as it is (between parallel.cuts, or in a row), or in a buffer that is changed in "
                f"place; {OTHERWISE}"
            )

    def refuse_draws(
        self, arguments: Arguments, program: torch.export.ExportedProgram, twin: Callable[[], nn.Module]
    ) -> None:
        """Refuse a forward that computes by what it draws from Python or NumPy. Local.

        Raises UnwritableError.
        """
        for number in range(1, 1 + SEEDS):
            try:
                with answered_no():
                    seed_others(number)
                    other = self._write(arguments, twin())
            except Exception:  # what is drawn else can't even be written down
                other = None
            if other is None or fingerprint(other) != fingerprint(program):
                raise UnwritableError(
                    f"parallel.stages = {self.stages}: the forward computes by random numbers of Python's or "
                    f"NumPy's (it skips a layer by them, say), but is written down once, so each would stay "
                    f"the same number: draw from torch (torch.where(torch.rand(()) < p, …)), or in a "
                    f"submodule that runs as it is (between parallel.cuts, or in a row)"
                )

    @contextmanager
    def _calling(self) -> Iterator[None]:
        """Give copies what they are called under. Local."""
        with cleared(self._caches), self.fake, torch.no_grad(), warnings.catch_warnings(), trial(self.module):
            warnings.simplefilter("ignore")
            yield

    def _twin(self) -> nn.Module:
        """Give a copy to be called: what it keeps for later calls has no memory. Local."""
        twin = skeleton(self.module, self.fake)
        without_memory(twin, self.fake)
        return twin

    def _written_after(self, calls: int, arguments: Arguments) -> torch.export.ExportedProgram | None:
        """Write the forward down as it is after so many calls; None where that can't be told. Local.

        Of more than one its numbers have changed as often by as much as in the first.
        """
        once, twin = self._twin(), skeleton(self.module, self.fake)
        try:
            with self._calling(), Hanging([]):
                once(*arguments[0], **arguments[1])
            for at in self.changed:
                path, _, name = at.rpartition(".")
                old, new = (vars(submodule(m, path))[name] for m in (twin, once))
                leaves = _pytree.tree_leaves([old, [*new] if isinstance(new, (set, deque)) else new])
                if not all(type(leaf) in SETTINGS for leaf in leaves):  # tables that it keeps, say
                    return None
                counts = type(old) in NUMBERS and type(new) in NUMBERS
                setattr(submodule(twin, path), name, old + (new - old) * calls if counts else new)
            with answered_no():
                return self._write(arguments, twin)
        except Exception:
            return None

    def _written_in_turn(self, arguments: Arguments) -> bool:
        """Whether the forward is written down otherwise behind two calls than behind one. Local.

        What only a log of the user's computes is not written down, nor where a log has tensors in its way.
        """
        found = []
        for calls in (1, 2):
            twin = skeleton(self.module, self.fake)
            try:
                with self._calling(), Hanging([]):
                    for _ in range(calls):
                        seed_others()
                        twin(*arguments[0], **arguments[1])
                seed_others()
                with answered_no():
                    found.append(fingerprint(self._write(arguments, twin)))
            except Exception:
                return False
        return found[0] != found[1]


@contextmanager
def cleared(caches: Iterable[Any]) -> Iterator[None]:
    """Let the user's caches (`functools.lru_cache`) keep no tensors without memory. Local."""
    try:
        yield
    finally:
        for cache in caches:
            cache.cache_clear()


def seed_others(number: int = 0) -> None:
    """Let Python's and NumPy's global random numbers, by which a forward may branch, begin anew. Local."""
    random.seed(number)
    np.random.seed(number)


def fingerprint(program: torch.export.ExportedProgram) -> list[str]:
    """Give what tells one forward from another: operators, what they are given, small constants. Pure.

    Of those that something hangs on: what the forward gives, or a tensor that is changed in place.
    """
    every = [*program.graph.nodes]
    left = [
        n
        for n in every
        if n.op == "output" or getattr(getattr(n.target, "_schema", None), "is_mutable", False)
    ]
    live = set[fx.Node]()
    while left:
        node = left.pop()
        if node not in live:
            live.add(node)
            left += node.all_input_nodes
    names = {node: f"%{at}" for at, node in enumerate(n for n in every if n in live)}
    lifted = program.graph_signature.inputs_to_lifted_tensor_constants
    found = []
    for node in names:
        given = fx.node.map_arg((node.args, dict(node.kwargs)), lambda one: names[one])
        constant = program.constants.get(lifted.get(node.name, ""))
        if constant is not None and address_of(constant) and constant.numel() <= MOST_COMPARED:
            found.append(repr(constant))
        found.append(f"{node.op} {'' if node.op == 'placeholder' else node.target} {given}")
    return found
