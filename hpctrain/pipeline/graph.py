"""A model as operators, written down by torch.export: a stage runs some, with the model's own parameters.

      graph    conv · bn · relu · conv · bn · add · pool · linear         a list of operators
      cut      └──── stage 0 ────┘└──────── stage 1 ──────────┘           contiguous, by cost
      values   relu's result crosses to stage 1; a skip goes straight from its producer to its consumer

A cut may go anywhere but between a tensor and an operator that changes it in place.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from mpi4py import MPI
from torch import fx, nn
from torch.utils import _pytree

from hpctrain.errors import ConfigError
from hpctrain.gradient import seen
from hpctrain.log import ALIKE, LOGGER
from hpctrain.pipeline.choice import Scales
from hpctrain.pipeline.operators import (
    A_VIEW,
    BODIES,
    changes,
    cost,
    draws_of,
    forbidden,
    path_of,
    paths_inside,
    roots,
)
from hpctrain.pipeline.part import INPUT, Part, begins, links_of, refuse_loops
from hpctrain.pipeline.profile import Held, of_operators
from hpctrain.pipeline.runner import Runner, place_of
from hpctrain.pipeline.skeleton import OTHERWISE, UnwritableError
from hpctrain.pipeline.trace import Like, Traced, Writer, line_of
from hpctrain.pipeline.weigh import choose, used_once

MOST_SHAPES = 64
"""Shapes of which what was written down is kept: some MiB each."""


class Graph:
    """A model as operators; a stage runs some, with the model's own parameters. Local, as `Cut` says."""

    way, by_shape = "between operators, as torch.export writes the forward down", True

    def __init__(
        self,
        module: nn.Module,
        inputs: dict[str, torch.Tensor],
        named: bool,
        stages: int,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Write the forward down for this batch; passes run under what `around` gives. Local."""
        self.stages, self.module, self.inputs = stages, module, inputs
        self.writer = Writer(module, inputs, named, stages, around)
        first = dict[int, str]()
        everything = [
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ]
        self.real = dict(everything)
        self.first = {name: first.setdefault(id(t), name) for name, t in everything}
        self._traced: dict[tuple[int, bool, str], Traced] = {}
        self._told = set[str]()
        samples = self.samples = len(next(iter(inputs.values())))
        self._first = self.writer.write(samples, True, self.writer.like)
        self._traced[samples, True, repr(self.writer.like)] = self._first

    def place(self, cuts: list[str], scales: Scales | None = None) -> None:
        """Cut it where `cuts` says, else by measured or estimated work. Collective, if there are scales."""
        traced = self._first
        if self.writer.later.changed:
            LOGGER.warning(
                "the forward changes %s: it is written down once, so in stages that stays as it is, and what "
                "hangs on it, too (hpctrain verify compares with one process); where parallel.cuts names "
                "modules, what is around them alone may be written down so",
                ", ".join(self.writer.later.changed[:3]),
                extra=ALIKE,
            )
        self._place(traced, cuts, scales)
        self.inputs = {}
        self.stages = len(self.choice.parts)
        self.used: dict[int, set[str]] = {stage: set() for stage in range(self.stages)}
        for node in traced.nodes:
            names = {traced.held[a.name] for a in node.all_input_nodes if a.name in traced.held}
            self.used[traced.stage[node.name]] |= names | self._counter(node)
        self.used[self.stages - 1] |= set(given_out(traced))

    def _counter(self, node: fx.Node) -> set[str]:
        """Give the counter of a BatchNorm's calls, which the module itself moves on."""
        name = f"{path_of(node)}.num_batches_tracked"
        return {name} & set(self.real) if node.target is torch.ops.aten.batch_norm.default else set()

    def tensors(self, stage: int) -> list[str]:
        """Parameters and buffers that its operators use."""
        return sorted(self.used[stage])

    def names(self, stage: int) -> list[str]:
        """Modules that its operators stand in, in order."""
        traced = self._first
        paths = (path_of(node) for node in traced.nodes if traced.stage[node.name] == stage)
        return list(dict.fromkeys(path for path in paths if path))

    def rows(self, stage: int) -> list[str]:
        """None are."""
        return []

    def switched(self, training: bool) -> None:
        """Say it if the model has changed itself since its forward was written down. Local."""
        self.writer.modes.switched(training)
        if not self.writer.modes.own_train:
            return
        own = [*self.module.named_parameters(), *self.module.named_buffers()]
        if anew := [name for name, tensor in own if self.real.get(name, tensor) is not tensor]:
            raise ConfigError(
                f"train({training}) of the model sets {anew[0]} anew, and its forward is written down with "
                f"the tensor that was there: change that in place (copy_); {OTHERWISE}"
            )

    def beside(self, name: str, value: Any) -> None:
        """Operators hold nothing that others could share."""

    def compare(self, comm: MPI.Intracomm) -> None:
        """Nor can they tell one another anything."""

    def links(self) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        """Who gives values to whom, and waits for whose gradients."""
        return links_of({s: self.part(s, self.samples, True) for s in range(self.stages)})

    def adopt(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take the tensors of this rank's stage, by name, in the place of the whole model's. Local."""
        self.real = dict(tensors)

    # -- cutting -----------------------------------------------------------------------------

    def _place(self, traced: Traced, cuts: list[str], scales: Scales | None) -> None:
        """Give every operator its stage."""
        nodes = traced.nodes
        at = {node.name: i for i, node in enumerate(nodes)}
        bad = forbidden(nodes, at)
        owners = [path_of(node) for node in nodes]
        inside = {path for node in nodes if node.target in BODIES for path in paths_inside(node)}
        for name in cuts:
            if any(within(path, name) for path in inside) and not any(within(path, name) for path in owners):
                raise ConfigError(
                    f"parallel.cuts: {name} runs in a part of the forward that is under torch.no_grad or an "
                    f"autocast of its own, and such a part is not cut: name a module outside of it, or set "
                    f"train.autocast instead of an autocast around all"
                )
        ranges = begins(cuts, owners, "modules")
        edges = [start for start, _ in ranges]
        refuse_loops(cuts, ranges, nodes)
        for stage, (a, b) in enumerate(pairwise([*edges, len(nodes)]) if cuts else ()):
            if all(cost(node) <= A_VIEW for node in nodes[a:b]):
                name = cuts[min(stage, len(cuts) - 1)]
                raise ConfigError(f"parallel.cuts: {name} leaves stage {stage} nothing to compute")
        wrong = sorted(set(edges) & bad)
        if wrong:
            raise ConfigError(
                f"parallel.cuts: {cuts[edges.index(wrong[0]) - 1]} begins between a tensor and an operator "
                f"that changes it in place ({nodes[wrong[0]].name}): cut elsewhere, or leave "
                f"inplace = True out there"
            )
        heavy = {i for i, node in enumerate(nodes) if i not in bad and self._heavy(node, traced)}
        starts = sorted(heavy | set(edges))
        if len(starts) < self.stages:  # fewer weights than stages: between any two operators then
            starts = [i for i in range(len(nodes)) if i not in bad]
        if len(starts) < self.stages <= len(nodes):
            change = [node for node in nodes if changes(node)]
            change.sort(key=lambda node: node.target is not torch.ops.aten.batch_norm.default)
            late = change[-1] if change else nodes[max(bad)]
            raise UnwritableError(
                f"parallel.stages = {self.stages}: only {len(starts)} can begin, as none may between a "
                f"tensor and what changes it in place, as {late.name} does{line_of(late)}; change a copy, "
                f"weights in the optimizer or a hook of a parameter, or {OTHERWISE}"
            )
        named = [*pairwise([*map(starts.index, edges), len(starts)])] if cuts else None
        costs = [cost(node) for node in nodes]
        pieces = list(zip(starts, [*starts[1:], len(nodes)]))
        held = [self._held(nodes[a:b], traced) for a, b in pieces]
        alone, shared = used_once(held)
        may_wait = {id(self.real[name]) for name in alone} & seen(self.module).keys()
        bytes_at = crossing(traced)
        self.choice = choose(
            self.stages,
            [sum(costs[a:b]) for a, b in pieces],
            Held.of_each([self.real[name] for name in names] for names in held),
            [
                partial(of_operators, nodes[a:b], traced, self.real, may_wait, self.inputs, bytes_at[b])
                for a, b in pieces
            ],
            scales,
            shared,
            named,
            [f"from {place_of(nodes[a])} on" for a, _ in pieces],
        )
        self.choice.names = [path_of(nodes[a]) or nodes[a].name for a, _ in pieces]
        self.at_once = {name for at in self.choice.at_once for name in held[at]}
        edges = [pieces[start][0] for start, _ in self.choice.parts]
        for i, node in enumerate(nodes):
            traced.stage[node.name] = sum(edge <= i for edge in edges) - 1

    def _held(self, nodes: list[fx.Node], traced: Traced) -> set[str]:
        """Give the parameters and buffers that operators use, by their first names."""
        given = (a.name for node in nodes for a in node.all_input_nodes)
        return {self.first[traced.held[name]] for name in given if name in traced.held}

    def _heavy(self, node: fx.Node, traced: Traced) -> bool:
        """Whether a stage may begin here: at an operator with a matrix of its own."""
        return any(
            self.real[traced.held[a.name]].ndim > 1 for a in node.all_input_nodes if a.name in traced.held
        )

    def _let_constants_wait(self, traced: Traced) -> None:
        """Make what depends on no input and no parameter (zeros to be filled, say) where it is used first."""
        constant: set[str] = set()
        for node in traced.nodes:
            fixed = all(a.name in constant for a in node.all_input_nodes)
            if fixed and not draws_of(node):
                constant.add(node.name)
        wanted = {name: stage for name, stage in traced.stage.items() if name not in constant}
        for node in reversed(traced.nodes):
            users = [wanted[user.name] for user in node.users if user.name in wanted]
            if node.name in constant and users:
                wanted[node.name] = min(users)
        for node in traced.nodes:  # one that nothing uses stays with what it looks at
            if node.name in constant:
                inputs = [traced.stage[a.name] for a in node.all_input_nodes]
                traced.stage[node.name] = wanted.get(node.name, max(inputs, default=0))

    def _follow(self, traced: Traced) -> None:
        """Place the operators of another number of samples, or of eval mode.

        Where the first forward's are if they are the same ones: gradients add up in the same order then. Else
        where their parameters are.
        """
        first = self._first
        if operators(traced) == operators(first):
            traced.stage = dict(first.stage)
            return
        owner: dict[str, list[int]] = {}
        for stage, names in self.used.items():
            for name in names:
                owner.setdefault(self.first[name], []).append(stage)
        root, least = roots(traced.nodes), dict[str, int]()
        while True:
            self._place_by(traced, owner, least)
            late = next(
                ((node, made) for node in traced.nodes for made in too_late(node, traced, root)), None
            )
            if late is None:
                return
            (node, made), to = late, traced.stage[late[0].name]
            maker = next(node for node in traced.nodes if node.name == made)
            if to == least.get(made) or any(a.name in traced.held for a in maker.all_input_nodes):
                raise ConfigError(
                    f"{node.name} changes in place what another stage made: leave inplace = True out"
                )
            least[made] = to  # zeros to be filled, say, are made where that is done

    def _place_by(self, traced: Traced, owner: dict[str, list[int]], least: dict[str, int]) -> None:
        """Give operators the stages of their parameters and inputs, some of them `least` a given one."""
        for node in traced.nodes:
            inputs = [traced.stage[a.name] for a in node.all_input_nodes if a.name in traced.stage]
            stage = max([*inputs, least.get(node.name, 0)])
            for a in node.all_input_nodes:
                if a.name in traced.held:
                    homes = owner.get(self.first[traced.held[a.name]], [0])
                    later = [home for home in homes if home >= stage]
                    if not later:
                        raise self._elsewhere(traced.held[a.name])
                    stage = min(later)
            traced.stage[node.name] = stage
        self._let_constants_wait(traced)

    def _elsewhere(self, name: str) -> ConfigError:
        """Say why no stage has a tensor where a forward of other shapes, or in eval mode, wants it. Local."""
        other = "in eval mode, or with another number of samples,"
        if any(name in used for used in self.used.values()):
            return ConfigError(
                f"the model runs {name} in another order {other} than in training, which stages can't "
                f"follow: set parallel.cuts so that one stage makes all its uses"
            )
        return ConfigError(
            f"the model uses {name} {other} and not in training, so no stage has it where it is wanted: use "
            f"it in training, too, or {OTHERWISE}"
        )

    # -- running -----------------------------------------------------------------------------

    def part(self, stage: int, samples: int, training: bool, like: Like | None = None) -> Part:
        """Run the stage's operators, written down for these shapes."""
        like = like or self.writer.like
        key = samples, training, repr(like)
        traced = self._traced.pop(key, None)
        if traced is None:
            traced = self.writer.write(samples, training, like)
            self._follow(traced)
        self._traced[key] = traced  # as the last one that was used
        if len(self._traced) > MOST_SHAPES:
            del self._traced[next(iter(self._traced))]
        last = self.stages - 1
        for name in given_out(traced) if stage == last else ():
            if self.first[name] not in {self.first[own] for own in self.used[last]}:
                raise self._elsewhere(name)
        home = {**traced.stage, **dict.fromkeys(traced.inputs, INPUT)}
        wanted: dict[str, set[int]] = {}
        for node in traced.nodes:
            for a in node.all_input_nodes:
                if a.name in home:
                    wanted.setdefault(a.name, set()).add(traced.stage[node.name])
        for name in traced.outputs:
            if isinstance(name, str) and name in home:
                wanted.setdefault(name, set()).add(last)
        part = Part()
        for name, stages in wanted.items():
            way = [home[name], *sorted(other for other in stages if other > home[name])]
            part.route(stage, name, way, straight=True)
        mine = [node for node in traced.nodes if traced.stage[node.name] == stage]
        numbers, count = {}, 0
        for node in traced.nodes:
            if drawn := draws_of(node):
                numbers[node.name] = count
                count += drawn
        gives = {name for names in part.gives.values() for name in names}
        held = self.module, self.real.__getitem__, traced, mine
        part.run = Runner(*held, numbers, count, stage == last, gives, self._told)
        return part


def within(path: str, name: str) -> bool:
    """Whether a module is another one, or in it, by their names. Pure."""
    return path == name or path.startswith(name + ".")


def too_late(node: fx.Node, traced: Traced, root: dict[str, str]) -> list[str]:
    """Name what an operator changes in place and another stage made. Pure."""
    changed = (root.get(value.name, value.name) for value in changes(node))
    return [
        name for name in changed if traced.stage.get(name, traced.stage[node.name]) != traced.stage[node.name]
    ]


def given_out(traced: Traced) -> list[str]:
    """Name the parameters and buffers that are outputs of the forward as they are. Pure."""
    return [traced.held[one] for one in traced.outputs if isinstance(one, str) and one in traced.held]


def crossing(traced: Traced) -> list[int]:
    """Count the bytes of what operators get from those before them, by number of the operator. Pure.

    The last one is of those behind all: 0, as the model's outputs stay where the last operators are.
    """
    nodes = traced.nodes
    at = {node.name: i for i, node in enumerate(nodes)}
    starts = [0] * (len(nodes) + 1)
    for node in nodes:
        last = max((at[user.name] for user in node.users if user.name in at), default=at[node.name])
        if node.name in traced.outputs:
            last = len(nodes) - 1
        leaves = _pytree.tree_leaves(node.meta.get("val"))
        size = sum(leaf.numel() * leaf.itemsize for leaf in leaves if isinstance(leaf, torch.Tensor))
        starts[at[node.name] + 1] += size
        starts[last + 1] -= size
    return list(accumulate(starts))


def operators(traced: Traced) -> list[tuple[str, Any, list[str]]]:
    """List a forward's operators: name, kind, and the parameters and values that it takes. Pure."""
    return [
        (node.name, node.target, [traced.held.get(a.name, a.name) for a in node.all_input_nodes])
        for node in traced.nodes
    ]
