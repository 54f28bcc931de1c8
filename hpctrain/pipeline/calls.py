"""A model as calls of its modules, cut where the user says: for what operators can't say.

      cuts       encoder.3, decoder.0             named by the user
      followed   the model, encoder, decoder      what has a cut inside: its forward, once a mode, by torch.fx
      called     encoder.0 … 5, decoder.0 … 5     everything else, as it is: it may do what it likes
      crosses    what later stages still use      from each that uses it straight to the next that does

What is followed is Python that runs once, with stand-ins for tensors: it may pass tensors on and compute with
them, but nothing may hang on their numbers, shapes or types, nor on what it keeps itself.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, reduce
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from hpctrain.errors import ConfigError
from hpctrain.hidden import submodule
from hpctrain.pipeline.follow import GRAD, followed
from hpctrain.pipeline.layers import Layers, full
from hpctrain.pipeline.operators import TAKEN, path_of
from hpctrain.pipeline.part import Env, Part, begins, gave, input_of, links_of, refuse_loops
from hpctrain.pipeline.trace import Like
from hpctrain.pipeline.ways import in_place, note_shared, parts_first, ways_of
from hpctrain.tensors import containers_copied, shapes_of


class Calls(Layers):
    """A model as calls of its modules; a stage makes those from one cut to the next. Local, as `Cut` says."""

    way = "between calls of its modules, where parallel.cuts says"

    def __init__(
        self,
        module: nn.Module,
        inputs: dict[str, torch.Tensor],
        named: bool,
        stages: int,
        cuts: Sequence[str],
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Follow the forwards around the cuts, in both modes; passes run under what `around` gives. Local.

        `named`: forward gets its inputs by name. Raises ConfigError where they can't be followed or cut.
        """
        own = own_names(module, cuts)
        modes = {mode: Followed(module, list(inputs), named, mode, own, around) for mode in (True, False)}
        self._followed = modes
        super().__init__([("", Segment(modes, stage)) for stage in range(stages)], dict(inputs), stages)
        self.shown = [next(iter(self.names(stage)), "the model") for stage in range(stages)]

    def adopt(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take this rank's own tensors, by name, in the place of the whole model's. Local."""
        for _, segment in self.layers:
            for path, owner in segment.named_modules():
                if isinstance(owner, Holder):
                    for kept in (owner._parameters, owner._buffers):
                        own: dict[str, Any] = {name: tensors.get(full(path, name)) for name in kept}
                        kept.update(own)

    def names(self, stage: int) -> list[str]:
        """Modules that it calls, in order."""
        calls = self._followed[True].stages[stage]
        return list(dict.fromkeys(path for path in map(path_of, calls) if path))

    def links(self) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        """Each to the next, which hears how many draws there were; to who else uses what it gives."""
        return links_of({s: self._routes(s, True) for s in range(self.stages)})

    def _routes(self, stage: int, training: bool) -> Part:
        part = Part()
        if stage:
            part.needs[stage - 1], part.returns[stage - 1] = [], []
        if stage < self.stages - 1:
            part.gives[stage + 1], part.awaits[stage + 1] = [], []
        for name, way in self._followed[training].ways.items():
            part.route(stage, name, way, straight=False)  # one that uses it may change it
        return part

    def part(self, stage: int, samples: int, training: bool, like: Like | None = None) -> Part:
        """Make the stage's calls."""
        part, segment = self._routes(stage, training), self.layers[stage][1]
        run = super().part(stage, samples, training, like).run

        def in_mode(env: Env, stream: int, begin: int) -> tuple[Env, int]:
            segment.training = training
            found = run(env, stream, begin)
            self._followed[training].reads.check()
            return found

        part.run = in_mode
        return part

    def _begin(self, env: Env) -> Any:
        return {name: env[input_of(name)] for name in self.value}

    def _came(self, stage: int, env: Env) -> Any:
        inputs = {input_of(name) for name in self.value}
        came = {name: value for name, value in env.items() if name not in inputs}
        return containers_copied(came)  # which it may change

    def _given(self, stage: int, value: Any, taken: list[torch.Tensor]) -> Env:
        segment = self.layers[stage][1]
        note_shared(self._followed[segment.training].ways, stage, value, taken, segment)
        return value  # type: ignore[no-any-return]

    def _call(self, what: str, layer: nn.Module, value: Any) -> Any:
        return layer(value)  # each of its calls says what fails in it

    def _named(self, cuts: list[str]) -> list[tuple[int, int]] | None:
        return [(stage, stage + 1) for stage in range(self.stages)]


class Holder(nn.Module):
    """Stands where a module stands that is not called itself: has what of it is."""


class Segment(Holder):
    """The calls of one stage, with their modules and tensors under the model's own names."""

    def __init__(self, followed: dict[bool, "Followed"], stage: int) -> None:
        """Take the calls of both modes."""
        super().__init__()
        self._followed, self._stage = followed, stage
        calls = [node for mode in followed.values() for node in mode.stages[stage]]
        self.inplace = any(map(in_place, calls))
        root = followed[True].root
        for path in targets(calls):
            self._hold(path, submodule(root, path))
        used = [a for node in calls for a in node.all_input_nodes]
        if stage == max(followed[True].stages):
            used += [a for mode in followed.values() for a in mode.given_out]
        tensors: dict[str, torch.Tensor] = dict(root.named_parameters(remove_duplicate=False))
        tensors |= dict(root.named_buffers(remove_duplicate=False))
        for name in dict.fromkeys(str(node.target) for node in used):
            if name in tensors:
                self._hold(name, tensors[name])

    def _hold(self, path: str, value: nn.Module | torch.Tensor) -> None:
        *above, name = path.split(".")
        at: nn.Module = self
        for step in above:
            at = at._modules.setdefault(step, Holder())  # type: ignore[assignment]
        if isinstance(value, nn.Module):
            at._modules[name] = value
        elif isinstance(at, Holder):  # a module that is called has it already
            (at._parameters if isinstance(value, nn.Parameter) else at._buffers)[name] = value  # type: ignore[assignment]

    def forward(self, given: Env) -> Any:
        """Make the calls; gives what later stages use, by name, or the model's output."""
        return self._followed[self.training].run(self, self._stage, given)


class Followed:
    """What the forwards around the cuts do in one mode, cut into stages."""

    def __init__(
        self,
        root: nn.Module,
        inputs: list[str],
        named: bool,
        mode: bool,
        cuts: list[str],
        around: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """Follow them. Local. Raises ConfigError saying what can't be followed, and what to do."""
        self.root = root
        graph, self.constants, self.reads = followed(root, inputs, named, mode, cuts, around)
        nodes = list(graph.nodes)
        self.placeholders = dict(zip((node.name for node in nodes if node.op == "placeholder"), inputs))
        calls = [node for node in nodes if node.op.startswith("call_")]
        ranges = begins(
            cuts, [path_of(node) for node in calls], "modules" if mode else "modules in evaluation"
        )
        refuse_loops(cuts, ranges, calls)
        self.stages = parts_first({stage: calls[start:stop] for stage, (start, stop) in enumerate(ranges)})
        self.output = nodes[-1].args[0]
        self.given_out = nodes[-1].all_input_nodes
        given = [node for node in nodes if node.op == "placeholder"]
        self.ways = ways_of(self.stages, given, self.given_out, root)
        """By value: the stages that it goes to: where it is made, then from each that uses it to the next."""
        self.crosses = {
            at: [name for name, way in self.ways.items() if way[0] <= at < way[-1]] for at in self.stages
        }
        """By stage: what later ones still use."""
        self._gone = {at: self._ends(mine, self.crosses[at]) for at, mine in self.stages.items()}
        uses = [{str(a.target) for n in mine for a in n.all_input_nodes} for mine in self.stages.values()]
        self._apart = {name for name in self.constants if sum(name in names for names in uses) > 1}
        """Constants that several stages use."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Followed":
        return self  # it has no numbers of its own

    def _ends(self, calls: list[fx.Node], kept: list[str]) -> dict[fx.Node, list[str]]:
        """Say behind which call each value is wanted no more."""
        ends = {a.name: node for node in calls for a in (node, *node.all_input_nodes)}
        found: dict[fx.Node, list[str]] = {node: [] for node in calls}
        for name in ends.keys() - {*kept, *(a.name for a in self.given_out)}:
            found[ends[name]].append(name)
        return found

    def run(self, owner: nn.Module, stage: int, given: Env) -> Any:
        """Make a stage's calls, with modules and tensors of `owner`. Local.

        `given`: what came from stages before, or the model's inputs; what of it later stages use is given on.
        """
        env = dict(given) if stage else {name: given[of] for name, of in self.placeholders.items()}
        fresh: dict[str, Any] = {}
        """Constants of this forward: it may change them."""

        def value(node: fx.Node) -> Any:
            name = str(node.target)
            if node.op != "get_attr":
                return env[node.name]
            if name not in self.constants:
                return self._tensor(owner, name)
            if name not in fresh:
                constant = self.constants[name]
                fresh[name] = constant.clone() if isinstance(constant, torch.Tensor) else constant
            return fresh[name]

        for node in self.stages[stage]:
            arguments, named = fx.node.map_arg((node.args, dict(node.kwargs)), value)
            try:
                with grads(node.meta[GRAD]):
                    env[node.name] = self._made(owner, node, arguments, named)
            except Exception as error:
                error.add_note(f"in {place_of(owner, node)}, given {shapes_of((arguments, named))}")
                raise
            if env[node.name] is None and node.op == "call_module":
                raise ConfigError(
                    f"parallel.cuts: {node.target} gives None, and whether the forward around the cuts asks "
                    f"for that can't be seen: let it give a tensor, or put who asks into one module with it"
                )
            gave(partial(place_of, owner, node), env[node.name])
            for name in self._gone[stage][node]:
                env.pop(name, None)
            del arguments, named
        for name in self._apart & fresh.keys():
            if isinstance(fresh[name], torch.Tensor) and fresh[name]._version:
                raise ConfigError(
                    f"parallel.cuts: stage {stage} changes in place a tensor that the forward around the "
                    f"cuts makes, and that another stage uses, too: make it in a module"
                )
        if stage == max(self.stages):
            return fx.node.map_arg(self.output, value)
        return {name: env[name] for name in self.crosses[stage] if name in env}

    def _tensor(self, owner: nn.Module, name: str) -> Any:
        try:
            return reduce(getattr, name.split("."), owner)
        except AttributeError:  # a plain attribute
            return reduce(getattr, name.split("."), self.root)

    def _made(self, owner: nn.Module, node: fx.Node, arguments: Any, named: Any) -> Any:
        if node.op == "call_module":
            return submodule(owner, str(node.target))(*arguments, **named)
        if node.op == "call_method":
            return getattr(arguments[0], str(node.target))(*arguments[1:], **named)
        if node.meta.get(TAKEN):
            return getattr(functional, node.meta[TAKEN])(*arguments, **named)
        return node.target(*arguments, **named)  # type: ignore[operator]


def own_names(module: nn.Module, cuts: Sequence[str]) -> list[str]:
    """Give the first of a module's names where it has several; others as they are. Local."""
    every = dict(module.named_modules(remove_duplicate=False))
    first = {id(inner): name for name, inner in module.named_modules()}
    return [first[id(every[name])] if name in every else name for name in cuts]


def targets(calls: list[fx.Node]) -> list[str]:
    """List the modules that are called. Pure."""
    return list(dict.fromkeys(str(node.target) for node in calls if node.op == "call_module"))


def grads(on: bool) -> AbstractContextManager[Any]:
    """Switch gradients as they were when a call was followed. Local."""
    return nullcontext() if torch.is_grad_enabled() == on else torch.set_grad_enabled(on)


def place_of(owner: nn.Module, node: fx.Node) -> str:
    """Say which call it is. Pure."""
    if node.op == "call_module":
        return f"layer {node.target} ({type(submodule(owner, str(node.target))).__name__})"
    at = f"layer {path_of(node)}" if path_of(node) else "the model's forward"
    return f"{at}, {node.name}"
