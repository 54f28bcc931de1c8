"""A model as calls of its modules, cut where the user says: for what operators can't say.

      cuts       encoder.3, decoder.0             named by the user
      followed   the model, encoder, decoder      what has a cut inside: its forward, once a mode, by torch.fx
      called     encoder.0 … 5, decoder.0 … 5     everything else, as it is: it may do what it likes
      crosses    what later stages still use      from each stage to the next

What is followed is Python that runs once, with stand-ins for tensors: it may pass tensors on and compute with
them, but nothing may hang on their numbers, shapes or types, nor on what it keeps itself.
"""

import operator
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from torch.utils import _pytree

from hpctrain.draws import of_others
from hpctrain.errors import ConfigError
from hpctrain.gradient import CALLED
from hpctrain.hidden import OURS, has_hooks
from hpctrain.modes import Replaced
from hpctrain.pipeline.layers import Layers, full
from hpctrain.pipeline.operators import TAKEN, path_of
from hpctrain.pipeline.part import Env, Part, begins, gave, input_of, refuse_loops, shapes_of
from hpctrain.pipeline.state import changed_by
from hpctrain.pipeline.trace import LIBRARY, Like, quiet, where

OWN = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")
GRAD = "grad"
"""Note on a call: whether gradients were on."""


class Calls(Layers):
    """A model as calls of its modules; a stage makes those from one cut to the next."""

    def __init__(
        self, module: nn.Module, inputs: dict[str, torch.Tensor], named: bool, stages: int, cuts: list[str]
    ) -> None:
        """Follow the forwards around the cuts, in both modes. Local.

        `named`: forward gets its inputs by name. Raises ConfigError where they can't be followed or cut.
        """
        followed = {mode: Followed(module, list(inputs), named, mode, cuts) for mode in (False, True)}
        self._followed = followed[True]
        super().__init__([("", Segment(followed, stage)) for stage in range(stages)], dict(inputs), stages)
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
        calls = self._followed.stages[stage]
        return list(dict.fromkeys(path for path in map(path_of, calls) if path))

    def part(self, stage: int, samples: int, training: bool, like: Like | None = None) -> Part:
        """Make the stage's calls."""
        part = super().part(stage, samples, training, like)
        run, segment = part.run, self.layers[stage][1]

        def in_mode(env: Env, stream: int, begin: int) -> tuple[Env, int]:
            segment.training = training
            return run(env, stream, begin)

        part.run = in_mode
        return part

    def _begin(self, env: Env) -> Any:
        return {name: env[input_of(name)] for name in self.value}

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
            self._hold(path, root.get_submodule(path))
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
    """What the forwards around the cuts do in one mode, followed once."""

    def __init__(self, root: nn.Module, inputs: list[str], named: bool, mode: bool, cuts: list[str]) -> None:
        """Follow them. Local. Raises ConfigError saying what can't be followed, and what to do."""
        self.root = root
        root.train(mode)
        tracer = Follower(inputs, named, cuts)
        refuse_hooks(root, tracer.inner)
        nodes = list(self._graph(tracer).nodes)
        self.constants = tracer.taken_back(root)
        for constant in self.constants.values():
            if isinstance(constant, FakeTensor):
                raise ConfigError(
                    f"parallel.cuts: {type(root).__name__} computes with a tensor in a plain attribute, "
                    f"which has no numbers yet: register it (register_buffer)"
                )
        self.placeholders = dict(zip((node.name for node in nodes if node.op == "placeholder"), inputs))
        calls = [node for node in nodes if node.op.startswith("call_")]
        ranges = begins(cuts, [path_of(node) for node in calls], "modules")
        weights = {path: {*dict(root.get_submodule(path).named_parameters(path))} for path in targets(calls)}
        refuse_loops(cuts, ranges, calls, [weights.get(str(node.target), set()) for node in calls])
        self.stages = {stage: calls[start:stop] for stage, (start, stop) in enumerate(ranges)}
        self.output = nodes[-1].args[0]
        self.given_out = nodes[-1].all_input_nodes
        last = {a: at for at, mine in self.stages.items() for node in mine for a in node.all_input_nodes}
        last |= dict.fromkeys(self.given_out, max(self.stages))
        made = {node: at for at, mine in self.stages.items() for node in mine}
        made |= {node: 0 for node in nodes if node.op == "placeholder"}
        self.crosses = {
            at: [node.name for node, home in made.items() if home <= at < last.get(node, home)]
            for at in self.stages
        }
        """By stage: what later ones still use."""
        self._gone = {at: self._ends(mine, self.crosses[at]) for at, mine in self.stages.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Followed":
        return self  # it has no numbers of its own

    def _ends(self, calls: list[fx.Node], kept: list[str]) -> dict[fx.Node, list[str]]:
        """Say behind which call each value is wanted no more."""
        ends = {a.name: node for node in calls for a in (node, *node.all_input_nodes)}
        found: dict[fx.Node, list[str]] = {node: [] for node in calls}
        for name in ends.keys() - {*kept, *(a.name for a in self.given_out)}:
            found[ends[name]].append(name)
        return found

    def _graph(self, tracer: "Follower") -> fx.Graph:
        before, others = torch.default_generator.get_state(), of_others()
        found: list[fx.Graph] = []
        try:
            with quiet(), own_gradients_noted(tracer), Replaced(dict.fromkeys(CALLED, tracer.taken)):
                changed = changed_by(self.root, lambda: found.append(tracer.trace(self.root)))
                if len(found) < 2:
                    tracer.trace(self.root)  # for its error
        except Exception as error:
            line = next((text for text in str(error).splitlines() if text.strip()), type(error).__name__)
            raise self._refusal(
                f"{where(error, self.root)} ({type(error).__name__}: {line.strip()})"
            ) from None
        changed += kept_in(self.root, tracer.inner)
        if changed:
            raise self._refusal(f": it changes {', '.join(changed[:3])}, which would stay as it is")
        if not torch.equal(before, torch.default_generator.get_state()) or others != of_others():
            raise self._refusal(": it draws random numbers that hang on no tensor, which would stay the same")
        return found[-1]

    def _refusal(self, why: str) -> ConfigError:
        return ConfigError(
            f"parallel.cuts: the forward of {type(self.root).__name__} can't be followed from cut to cut"
            f"{why}: put that into a submodule without a cut inside, which runs as it is; or make the model "
            f"an nn.Sequential, or give it a method layers() that lists submodules which follow one another"
        )

    # -- running -----------------------------------------------------------------------------

    def run(self, owner: nn.Module, stage: int, given: Env) -> Any:
        """Make a stage's calls, with modules and tensors of `owner`. Local."""
        env = dict(given)
        if not stage:
            env = {name: given[of] for name, of in self.placeholders.items()}

        def value(node: fx.Node) -> Any:
            return self._tensor(owner, str(node.target)) if node.op == "get_attr" else env[node.name]

        for node in self.stages[stage]:
            arguments, named = fx.node.map_arg((node.args, dict(node.kwargs)), value)
            try:
                with nullcontext() if node.meta[GRAD] else torch.no_grad():
                    env[node.name] = self._made(owner, node, arguments, named)
            except Exception as error:
                error.add_note(f"in {place_of(owner, node)}, given {shapes_of((arguments, named))}")
                raise
            gave(lambda node=node: place_of(owner, node), env[node.name])  # type: ignore[misc]
            for name in self._gone[stage][node]:
                env.pop(name, None)
            del arguments, named
        if stage == max(self.stages):
            return fx.node.map_arg(self.output, value)
        return {name: env[name] for name in self.crosses[stage]}

    def _tensor(self, owner: nn.Module, name: str) -> Any:
        if name in self.constants:
            return self.constants[name]
        try:
            return reduce(getattr, name.split("."), owner)
        except AttributeError:  # a plain attribute
            return reduce(getattr, name.split("."), self.root)

    def _made(self, owner: nn.Module, node: fx.Node, arguments: Any, named: Any) -> Any:
        if node.op == "call_module":
            return owner.get_submodule(str(node.target))(*arguments, **named)
        if node.op == "call_method":
            return getattr(arguments[0], str(node.target))(*arguments[1:], **named)
        if node.meta.get(TAKEN):
            return getattr(functional, node.meta[TAKEN])(*arguments, **named)
        return node.target(*arguments, **named)  # type: ignore[operator]


class Stand(fx.Proxy):
    """Stands for a value; what it is nobody knows."""

    def __setitem__(self, at: Any, value: Any) -> None:
        """Write down an assignment."""
        self.tracer.create_proxy("call_function", operator.setitem, (self, at, value), {})

    def __len__(self) -> int:
        """Refuse to say how long it is."""
        raise fx.proxy.TraceError("asks for the length of a value")

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """Refuse to say what it is, to the user's code."""
        asking = sys._getframe(1)
        while asking.f_back and asking.f_code.co_filename.startswith("<frozen"):  # abc, say
            asking = asking.f_back
        if asking.f_code.co_filename.startswith((LIBRARY, OWN)):
            return Stand
        raise fx.proxy.TraceError("asks for the type of a value")


class Follower(fx.Tracer):
    """Follows the forwards of modules with a cut inside."""

    proxy_buffer_attributes = True

    def __init__(self, inputs: list[str], named: bool, cuts: list[str]) -> None:
        """Take the names of the inputs, whether forward gets them by name, and where to cut."""
        super().__init__()
        self.inputs, self.named = inputs, named
        steps = (name.split(".") for name in cuts)
        self.inner = {".".join(path[:n]) for path in steps for n in range(len(path))}
        """Paths of what has a cut inside, the model's own "" too."""
        self._taken = ""
        self._modes = modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is called as it is."""
        return module_qualified_name not in self.inner

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """Let the forward get the model's inputs, and nothing else."""
        given = [self.create_proxy("placeholder", name, (), {}) for name in self.inputs]
        by_name = dict(zip(self.inputs, given)) if self.named else {}
        return (lambda root: root_fn(root, *([] if self.named else given), **by_name)), [self.root]

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Refuse a branch."""
        raise fx.proxy.TraceError("a branch that hangs on a value")

    def iter(self, obj: fx.Proxy) -> Any:
        """Refuse a loop."""
        raise fx.proxy.TraceError("a loop through a value")

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Give what stands for a call's value."""
        return Stand(node, self)

    def create_node(self, kind: str, *arguments: Any, **named: Any) -> fx.Node:
        """Write a call down, with how it was made."""
        if modes() != self._modes:
            raise fx.proxy.TraceError("switches autocast or inference mode")
        node = super().create_node(kind, *arguments, **named)
        node.meta[GRAD] = torch.is_grad_enabled()
        if self._taken and self._taken == getattr(node.target, "__name__", ""):  # not what is made for it
            node.meta[TAKEN] = self._taken
        return node

    def taken(self, function: Any, *arguments: Any, **named: Any) -> Any:
        """Write a call of a layer's function down by its name, under which others may stand then."""
        self._taken = function.__name__
        try:
            return function(*arguments, **named)
        finally:
            self._taken = ""

    def taken_back(self, root: nn.Module) -> dict[str, Any]:
        """Take from the model the constants that were laid into it."""
        laid = [name for name in vars(root) if name.startswith(("_tensor_constant", "_tree_spec_constant"))]
        return {name: vars(root).pop(name) for name in laid}


def modes() -> list[bool]:
    """Say how calls are made, but for gradients. Local."""
    return [*map(torch.is_autocast_enabled, ("cpu", "cuda")), torch.is_inference_mode_enabled()]


def targets(calls: list[fx.Node]) -> list[str]:
    """List the modules that are called. Pure."""
    return list(dict.fromkeys(str(node.target) for node in calls if node.op == "call_module"))


def in_place(node: fx.Node) -> bool:
    """Whether a call changes what it gets, by its name. Pure."""
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    own = node.target is operator.setitem or (name[:1] == "i" and hasattr(operator, f"__{name}__"))
    return own or name.endswith("_") or bool(node.kwargs.get("inplace")) or "out" in node.kwargs


def place_of(owner: nn.Module, node: fx.Node) -> str:
    """Say which call it is. Pure."""
    if node.op == "call_module":
        return f"layer {node.target} ({type(owner.get_submodule(str(node.target))).__name__})"
    at = f"layer {path_of(node)}" if path_of(node) else "the model's forward"
    return f"{at}, {node.name}"


def kept_in(root: nn.Module, inner: set[str]) -> list[str]:
    """Name what of a forward was kept in what is followed. Local."""
    found = []
    for path, owner in root.named_modules():
        if path in inner:
            own = {name: value for name, value in vars(owner).items() if name not in OURS}
            for name, value in {**owner._buffers, **own}.items():
                if any(issubclass(type(leaf), fx.Proxy) for leaf in _pytree.tree_leaves(value)):
                    found.append(full(path, name))
    return found


def refuse_hooks(root: nn.Module, inner: set[str]) -> None:
    """Refuse hooks on what is followed: they would run once. Local."""
    for path in sorted(inner):
        try:
            hooked = has_hooks(root.get_submodule(path))
        except AttributeError:
            continue  # no module of that name: the cut is refused below
        if hooked:
            raise ConfigError(
                f"parallel.cuts: there is a hook on {path or 'the model'}, which has a cut inside and is not "
                f"called as a whole in stages: put it on modules without a cut inside"
            )


@contextmanager
def own_gradients_noted(tracer: Follower) -> Iterator[None]:
    """Write the calls of autograd.Functions down as they are, with their own backward. Local."""
    apply = vars(torch.autograd.Function)["apply"]

    def applied(cls: type, *given: Any, **named: Any) -> Any:
        return tracer.create_proxy("call_function", apply.__get__(None, cls), given, named)

    torch.autograd.Function.apply = classmethod(applied)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]
