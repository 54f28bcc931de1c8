"""What a stage does in one forward, and what a model in stages offers, however it was cut."""

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any, Protocol

import torch
from mpi4py import MPI
from torch import fx
from torch.utils import _pytree

from hpctrain.errors import ConfigError
from hpctrain.pipeline.choice import Choice, Scales
from hpctrain.pipeline.trace import Like
from hpctrain.tensors import shapes_of

INPUT = -1
"""The stage of the model's inputs: whoever needs one reads it from the data."""
Env = dict[str, Any]


@dataclass
class Part:
    """What one stage does in one forward."""

    needs: dict[int, list[str]] = field(default_factory=dict)
    """By earlier stage (or INPUT): the values that come from there."""
    gives: dict[int, list[str]] = field(default_factory=dict)
    """By later stage: the values that go there."""
    awaits: dict[int, list[str]] = field(default_factory=dict)
    """By later stage: the values whose gradients come from there."""
    returns: dict[int, list[str]] = field(default_factory=dict)
    """By earlier stage: the values whose gradients go there.

    A value that several stages use gets its gradient as in one process, the latest use first: from
    stage to stage, each adding its own, and from the first of them to the producer.
    """
    run: Callable[[Env, int, int], tuple[Env, int]] = lambda env, stream, start: (env, start)
    """(values, stream, draws so far) to (values to give; the model's output under "output"), draws so far."""

    def route(self, stage: int, name: str, way: list[int], straight: bool) -> None:
        """Enter what this stage has to do with a value: its producer (or INPUT), then who uses it, in order.

        `straight`: all users get it from the producer, which is right if none changes it; else each from the
        one before. Local.
        """
        if stage not in way:
            return
        before, behind = way[: way.index(stage)], way[way.index(stage) + 1 :]
        if before:
            self.needs.setdefault(before[0 if straight else -1], []).append(name)
        if way[0] == INPUT:
            return
        if before:
            self.returns.setdefault(before[-1], []).append(name)
        if behind:
            self.awaits.setdefault(behind[0], []).append(name)
        for other in behind[:1] if not straight else () if before else behind:
            self.gives.setdefault(other, []).append(name)


def links_of(parts: dict[int, Part]) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """List by stage who gets values from it, and whose gradients it waits for. Pure."""
    return {s: sorted(p.gives) for s, p in parts.items()}, {s: sorted(p.awaits) for s, p in parts.items()}


class Cut(Protocol):
    """A model in stages. All is local, but for `place` with scales."""

    stages: int
    """In all; `place` may choose to have several a rank."""
    way: str
    """By what it is cut, for the log."""
    by_shape: bool
    """Whether what a stage does hangs on the shapes of the inputs, which all stages have then."""
    choice: Choice
    at_once: set[str]
    """Names of parameters whose gradients are to wait only in a step's last micro-batches."""

    def place(self, cuts: list[str], scales: Scales | None = None) -> None:
        """Say where its stages begin, once, before anything else. Collective, if there are scales."""

    def tensors(self, stage: int) -> list[str]:
        """Names of the parameters and buffers that a stage uses."""

    def names(self, stage: int) -> list[str]:
        """Names of the modules that a stage runs, in order."""

    def rows(self, stage: int) -> list[str]:
        """Name the layers of a stage that run as one (`rows.py`)."""

    def part(self, stage: int, samples: int, training: bool, like: Like | None = None) -> Part:
        """What a stage does with so many samples, like those; None: like those that it was cut by."""

    def switched(self, training: bool) -> None:
        """Hear that this rank's module has been brought into a mode."""

    def beside(self, name: str, value: Any) -> None:
        """Take what else runs on the last stage and may share something with its layers: the loss."""

    def compare(self, comm: MPI.Intracomm) -> None:
        """Refuse what one stage's first forwards told another by a module that both have. Collective."""

    def links(self) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        """By stage: the later stages that it gives values to in training, and that gradients come from."""


def input_of(name: str) -> str:
    """Name an input among the values: it may be called as one of them is.

    >>> input_of("x")
    'input x'
    """
    return f"input {name}"


_trail: list[str] | None = None


def followed() -> bool:
    """Whether someone lists the layers. Local."""
    return _trail is not None


@contextmanager
def following(trail: list[str]) -> Iterator[None]:
    """List the layers of the body's forward when gradients of what they gave come, the latest last. Local."""
    global _trail
    _trail = trail
    try:
        yield
    finally:
        _trail = None


def gave(name: Callable[[], str], found: Any) -> None:
    """Note what a layer gave, if someone follows; only then its name is asked for. Local."""
    trail = _trail
    if trail is None:
        return
    what = name()
    for leaf in _pytree.tree_leaves(found):
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            before = dict(leaf._backward_hooks or {})
            leaf.register_hook(lambda g: trail.append(f"{what}, given {shapes_of(g)}"))  # type: ignore[no-untyped-call]
            hooks = leaf._backward_hooks
            assert hooks is not None
            for at in before:  # the layer's own come after it
                hooks[at] = hooks.pop(at)


def refuse_loops(cuts: list[str], ranges: list[tuple[int, int]], nodes: list[fx.Node]) -> None:
    """Refuse named cuts through a loop: what is called before one is called again behind it. Pure.

    `ranges` are the stages' nodes. Modules that are called again behind the last call of the named one may
    share weights with themselves as they like.
    """
    stacks = [node.meta.get("nn_module_stack") or {} for node in nodes]
    calls = [{(str(path), key) for key, (path, *_) in stack.items() if path} for stack in stacks]
    for name, (at, _) in zip(cuts, ranges[1:]):
        own = {call: i for i, made in enumerate(calls) for call in made if call[0] == name}
        before = set[tuple[str, str]]().union(*calls[:at])
        behind = set[tuple[str, str]]().union(*calls[at : max(own.values(), default=at)]) - before
        again = {path for path, _ in before} & {path for path, _ in behind} - {name}
        if len(own) > 1 and again:
            raise ConfigError(
                f"parallel.cuts: {name} is called {len(own)} times in one forward, and {max(again)}, which "
                f"is called before it, is called again between these: the cut goes through a loop, whose "
                f"{len(own)} turns would go through both stages; cut before the loop or behind it"
            )


def begins(cuts: list[str], owners: list[str], what: str) -> list[tuple[int, int]]:
    """Find where named modules begin, in order; gives each stage's (start, stop). Pure.

    Raises ConfigError for a name that is none of them, or does not come behind the one before.

    >>> begins(["b"], ["a", "a", "b.0", "c"], "layers")
    [(0, 2), (2, 4)]
    """
    edges = [0]
    for name in cuts:
        own = (i for i, o in enumerate(owners) if o == name or o.startswith(name + "."))
        at = next(own, -1) if name else -1
        if at <= edges[-1]:
            known = [owner for owner in dict.fromkeys(owners) if owner]
            levels = [accumulate(owner.split("."), "{}.{}".format) for owner in known]
            near = difflib.get_close_matches(name, dict.fromkeys(chain(*levels)), 1) if at < 0 else []
            if at == edges[-1] == 0:
                raise ConfigError(
                    f"parallel.cuts: {name!r} is the first of the {what}: stage 0 begins there anyway, so "
                    f"name where the stages behind it begin"
                )
            why = "is not among" if at < 0 else "does not come behind the cut before it among"
            raise ConfigError(
                f"parallel.cuts: {name!r} {why} the {what} {', '.join(known[:12])}"
                f"{', …' if len(known) > 12 else ''}{f': did you mean {near[0]}?' if near else ''}"
            )
        edges.append(at)
    return list(zip(edges, [*edges[1:], len(owners)]))
