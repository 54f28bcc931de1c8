"""A model whose layers follow one another: a stage runs some of them, one behind the other."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from mpi4py import MPI
from torch import nn

from hpctrain.draws import Drawing, drew_unseen
from hpctrain.errors import ConfigError
from hpctrain.gradient import seen
from hpctrain.hidden import has_hooks, hidden, registered
from hpctrain.pipeline.aside import Asides, untouched
from hpctrain.pipeline.blocks import Blocks
from hpctrain.pipeline.choice import Scales
from hpctrain.pipeline.dense import Dense
from hpctrain.pipeline.fit import HOLES
from hpctrain.pipeline.message import SHARES, copied
from hpctrain.pipeline.part import Env, Part, begins, gave
from hpctrain.pipeline.profile import Held, of_layers
from hpctrain.pipeline.rows import Row, rows_of, run_all
from hpctrain.pipeline.trace import Like
from hpctrain.pipeline.weigh import choose, used_once
from hpctrain.tensors import changed_once, containers_copied, shapes_of, tensors_in
from hpctrain.wire import together


def layers_of(module: nn.Module) -> list[tuple[str, nn.Module]] | None:
    """Give a model's layers by name where each takes what the one before gave; None where unknown. Local.

    Raises ConfigError for `layers()` that list no submodules, or leave a parameter out.
    """
    names = {id(m): name for name, m in module.named_modules()}
    layers: Any = getattr(module, "layers", None)
    if callable(layers) and not isinstance(layers, nn.Module) and not has_hooks(module) and offered(layers):
        found = layers()
        given = list(found) if isinstance(found, Iterable) else [found]
        if not all(isinstance(layer, nn.Module) and id(layer) in names for layer in given):
            raise ConfigError(f"{type(module).__name__}.layers() must give submodules of the model, in order")
        for layer in given:
            if type(layer).forward is nn.Module.forward:
                name = names[id(layer)]
                raise ConfigError(
                    f"{type(module).__name__}.layers() lists {name}, a {type(layer).__name__} without a "
                    f"forward: list its members (*self.{name})"
                )
        listed = {id(p) for layer in given for p in layer.parameters()}
        left = [n for n, p in module.named_parameters() if p.requires_grad and id(p) not in listed]
        if left:
            raise ConfigError(
                f"{type(module).__name__}.layers() leaves out {left[0]}, and stages run what it lists, not "
                f"the forward: put it into a module that is listed, or freeze it (requires_grad_(False))"
            )
        return [(names[id(layer)], layer) for layer in given]
    if not in_a_row(module) or has_hooks(module):
        return None
    return list(_flat(module, ""))


def offered(layers: Callable[..., Any]) -> bool:
    """Whether a method `layers` is what a model offers us: others take arguments. Pure."""
    try:
        inspect.signature(layers).bind()
    except TypeError:
        return False
    return True


def in_a_row(module: nn.Module) -> bool:
    """Whether a module is an nn.Sequential, or a subclass that only fills it. Pure."""
    own = nn.Sequential
    return (
        isinstance(module, own)
        and "forward" not in vars(module)
        and all(
            getattr(type(module), name) is getattr(own, name) for name in ("forward", "__call__", "__iter__")
        )
    )


def _flat(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module._modules.items():  # named_children leaves out what stands twice
        assert child is not None
        if in_a_row(child) and not has_hooks(child):
            yield from _flat(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


ROWS = (Blocks, Dense)
"""Kinds of rows."""

FORWARDS = 3
"""Of a stage that are looked at, in training and in evaluation: for what it tells aside, and unseen draws."""


class Layers:
    """Layers in a row; a stage runs some of them. Local, as `Cut` says."""

    way, by_shape = "between layers, one behind the other", False

    def __init__(self, layers: list[tuple[str, nn.Module]], value: Any, stages: int) -> None:
        """Take the layers by name, and what the first one gets."""
        self.layers, self.value, self.stages = layers, value, stages
        self.shown = [name for name, _ in layers]
        self._looked = Counter[tuple[int, bool]]()
        self._compared = 0
        self._drawing: dict[tuple[int, bool], Drawing] = {}
        """By stage, and whether in training."""
        self.in_rows: list[list[tuple[str, nn.Module | Row]]] = []
        """By stage: its layers, those that are a row as that."""

    def place(self, cuts: list[str], scales: Scales | None = None) -> None:
        """Cut them where `cuts` says, else by measured time, else by the numbers of their parameters.

        Collective, if there are scales.
        """
        modules = [layer for _, layer in self.layers]
        every = [module for layer in modules for module in layer.modules()]
        hooked = any(map(has_hooks, every))
        alone, shared = used_once([{*map(id, [*m.parameters(), *m.buffers()])} for m in modules])
        with untouched(self.layers):  # by what is measured
            self.choice = choose(
                self.stages,
                [1.0 + sum(p.numel() for p in layer.parameters()) for layer in modules],
                Held.of_each([*m.parameters(), *m.buffers()] for m in modules),
                of_layers(modules, self.value, alone & seen(nn.ModuleList(modules)).keys()),
                None if hooked else scales,  # a user's hooks run when the model does
                shared,
                self._named(cuts),
                [f"layer {name}" for name in self.shown],
            )
        self.choice.names = self.shown
        self.ranges = self.choice.parts
        self.stages = len(self.ranges)
        self._refuse_hidden()
        self.in_rows = [self._rows_of(stage) for stage in range(self.stages)]
        self.asides = Asides(self.layers, self.ranges)
        slow = [self.layers[at] for at in self.choice.at_once]
        self.at_once = {full(name, own) for name, layer in slow for own, _ in layer.named_parameters()}

    def _named(self, cuts: list[str]) -> list[tuple[int, int]] | None:
        """Give each stage's layers, if the user says."""
        return begins(cuts, self.shown, "layers") if cuts else None

    def _called(self, stage: int) -> list[tuple[str, nn.Module]]:
        """A stage's layers, as errors call them."""
        own = slice(*self.ranges[stage])
        layers = (layer for _, layer in self.layers[own])
        return [
            (f"layer {name} ({type(layer).__name__})", layer) for name, layer in zip(self.shown[own], layers)
        ]

    def _rows_of(self, stage: int) -> list[tuple[str, nn.Module | Row]]:
        """A stage's layers, those that are a row as that where memory allows it.

        A row copies what it gets, and is tried with tensors of its own first.
        """
        layers, choice, at = self._called(stage), self.choice, self.ranges[stage][0]
        found, copied, tried = rows_of(layers, ROWS), 0, 0.0
        if choice.exact or choice.warned:
            return [*layers]
        if not choice.needs or len(found) == len(layers):
            return found
        need, works = choice.needs[stage], choice.works
        for _, one in found:
            if isinstance(one, Row):
                given = works[at - 1].gives if at else sum(leaf.nbytes for leaf in tensors_in(self.value))
                copied += one.copies(given)
                tried = max(tried, one.bytes_of_trial(given, works[at : at + len(one.layers)]))
                at += len(one.layers) - 1
            at += 1
        more = replace(need, kept=need.kept + copied)
        if replace(more, more=more.more + tried).with_holes(HOLES) > need.limit:
            return [*layers]
        choice.needs[stage] = more
        return found

    def _refuse_hidden(self) -> None:
        """Refuse layers that keep another stage's tensor where nobody sees that they use it."""
        every = registered(nn.ModuleList(layer for _, layer in self.layers))
        for stage, (start, stop) in enumerate(self.ranges):
            own = registered(nn.ModuleList(layer for _, layer in self.layers[start:stop]))
            for at, (_, layer) in enumerate(self.layers[start:stop], start):
                if any(id(tensor) in every and id(tensor) not in own for tensor in hidden(layer)):
                    raise ConfigError(
                        f"layer {self.shown[at]} keeps a weight or buffer of another layer in a plain "
                        f"attribute, which stage {stage} does not hold: register it (self.name = …), or set "
                        f"parallel.cuts so that both are in one stage"
                    )

    def tensors(self, stage: int) -> list[str]:
        """Parameters and buffers of its layers."""
        start, stop = self.ranges[stage]
        found = []
        for name, layer in self.layers[start:stop]:
            inner = [
                *layer.named_parameters(remove_duplicate=False),
                *layer.named_buffers(remove_duplicate=False),
            ]
            found += [full(name, own) for own, _ in inner]
        return found

    def names(self, stage: int) -> list[str]:
        """Names of its layers."""
        return self.shown[slice(*self.ranges[stage])]

    def rows(self, stage: int) -> list[str]:
        """Its rows that run as one."""
        rows = ((name, one) for name, one in self.in_rows[stage] if isinstance(one, Row))
        return [name for name, one in rows if one.chosen]

    def switched(self, training: bool) -> None:
        """Layers run as they are."""

    def beside(self, name: str, value: Any) -> None:
        """Look at what the loss holds, too."""
        self.asides.add(name, value)

    def compare(self, comm: MPI.Intracomm) -> None:
        """Compare what stages have noted of modules that several have, as long as they look. Collective."""
        if not self.asides.meets or self._compared == FORWARDS:
            return
        self._compared += 1
        mine = {stage: self.asides.noted[stage] for stage in range(comm.rank, self.stages, comm.size)}
        with together(comm):
            self.asides.compare({at: noted for own in comm.allgather(mine) for at, noted in own.items()})

    def links(self) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        """Each to the next, and back."""
        links = {s: [s + 1] if s + 1 < self.stages else [] for s in range(self.stages)}
        return links, links

    def part(self, stage: int, samples: int, training: bool, like: Like | None = None) -> Part:
        """Run the stage's layers one behind the other."""
        start, stop = self.ranges[stage]
        layers = self.layers[start:stop]
        changes = any(getattr(m, "inplace", False) for _, layer in layers for m in layer.modules())
        shown, called = self.shown[start:stop], self._called(stage)
        ends = {one.layers[-1][0]: one for _, one in self.in_rows[stage] if isinstance(one, Row)}
        last = stage == self.stages - 1
        if (stage, training) not in self._drawing:
            self._drawing[stage, training] = Drawing([layer for _, layer in layers])
        drawing = self._drawing[stage, training]

        def run(env: Env, stream: int, begin: int) -> tuple[Env, int]:
            # a layer may change the dictionary that it gets; what goes back are gradients of what came
            value = self._begin(env) if stage == 0 else containers_copied(self._came(stage, env))
            if changes and stage:
                value = changed_once(copied, value)
            taken = tensors_in(value) if stage else []
            shared = [leaf for leaf in taken if getattr(leaf, SHARES, False)]
            versions = [leaf._version for leaf in shared]
            first = self._looked[stage, training] < FORWARDS
            counted = first and drawing.counts
            self._looked[stage, training] += first
            looking: AbstractContextManager[None] = nullcontext()
            if first and self.asides.looks(stage):
                weights = [p for _, layer in layers for p in layer.parameters()]
                looking = self.asides.watching(stage, [*weights, *tensors_in(value)])
            with looking, drawing.of(stream, begin, value) as counting:
                if not first:
                    value = run_all(self.in_rows[stage], self._call, value)
                for what, layer in called if first else ():
                    value = self._call(what, layer, value)
                    if what in ends:
                        ends[what].watch(value)
                    if counted and drew_unseen(counting):
                        raise ConfigError(
                            f"{what} draws random numbers where nothing can count them (in a branch of "
                            f"torch.cond, or an operator of its own), so they would be others than in one "
                            f"process: draw by torch's functions, outside of branches"
                        )
            if versions != [leaf._version for leaf in shared]:
                raise ConfigError(
                    f"stage {stage} (layers {shown[0]} to {shown[-1]}) changes in place what it got, "
                    f"and other tensors lay in one memory with it where it comes from, which they do not at "
                    f"this end: change nothing there, or cut elsewhere (parallel.cuts)"
                )
            return {"output": value} if last else self._given(stage, value, taken), counting.count

        before = {stage - 1: [f"value {stage - 1}"]} if stage else {}
        behind = {} if last else {stage + 1: [f"value {stage}"]}
        return Part(before, behind, behind, before, run)

    def _begin(self, env: Env) -> Any:
        """Give what the first layer gets."""
        return next(iter(env.values()))

    def _came(self, stage: int, env: Env) -> Any:
        """Give what a later stage's first layer gets, of what came."""
        return env[f"value {stage - 1}"]

    def _given(self, stage: int, value: Any, taken: list[torch.Tensor]) -> Env:
        """Name what a stage's last layer gave, when the first had taken these."""
        return {f"value {stage}": value}

    def _call(self, what: str, layer: nn.Module, value: Any) -> Any:
        """Call a layer, and say which one it was that failed."""
        try:
            found = layer(value)
        except Exception as error:
            error.add_note(f"in {what}, given {shapes_of(value)}")
            raise
        gave(what.__str__, found)
        return found


def full(layer: str, own: str) -> str:
    """Name a layer's tensor as the model does. Pure.

    >>> full("2", "weight"), full("", "encoder.weight")
    ('2.weight', 'encoder.weight')
    """
    return f"{layer}.{own}" if layer else own
