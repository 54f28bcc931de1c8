"""Follows a forward around its cuts, by torch.fx: what it calls, on what, in which order.

Values are stand-ins (`stand.py`). What would be done while following and never again is refused (`noted.py`).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from hpctrain.draws import of_others
from hpctrain.errors import ConfigError
from hpctrain.gradient import CALLED
from hpctrain.hidden import has_hooks, submodule
from hpctrain.modes import Replaced
from hpctrain.pipeline.aside import unmoved
from hpctrain.pipeline.exporting import regions_kept
from hpctrain.pipeline.noted import OwnNumbers, Reads, functions_noted, look, makers_noted, modes, stands_in
from hpctrain.pipeline.operators import TAKEN
from hpctrain.pipeline.stand import Asked, Stand
from hpctrain.pipeline.state import changed_by
from hpctrain.pipeline.trace import where
from hpctrain.pipeline.trial import trial

GRAD = "grad"
"""Note on a call: whether gradients were on."""


def followed(
    root: nn.Module,
    inputs: list[str],
    named: bool,
    mode: bool,
    cuts: list[str],
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[fx.Graph, dict[str, Any], "Reads"]:
    """Follow a forward in training or evaluation; gives its calls, its constants, and what it read. Local.

    `named`: it gets its inputs by name; `around` gives what passes run under (autocast). Raises ConfigError
    saying what can't be followed, and what to do.
    """
    with unmoved(root):
        root.train(mode)
        return _followed(root, inputs, named, cuts, around, mode)


def _followed(
    root: nn.Module,
    inputs: list[str],
    named: bool,
    cuts: list[str],
    around: Callable[[], AbstractContextManager[Any]],
    mode: bool,
) -> tuple[fx.Graph, dict[str, Any], "Reads"]:
    inner = inside(cuts)
    refuse_hooks(root, inner)
    before, others = torch.default_generator.get_state(), of_others()
    found, errors = list[tuple[fx.Graph, dict[str, Any]]](), list[Exception]()
    reads = Reads()

    def follow() -> None:
        follower = Follower(root, inputs, named, inner)
        with (
            around(), torch.set_grad_enabled(mode), regions_kept(nullcontext), functions_noted(follower),
            makers_noted(follower),
            Replaced(dict.fromkeys(CALLED, follower.taken)), OwnNumbers(root), reads.noted(root),
        ):  # fmt: skip
            graph = follower.follow()
        found.append((graph, taken_back(root)))

    def tried() -> None:
        try:
            follow()
        except Exception as error:
            errors.append(error)
            raise

    try:
        with trial(root):
            changed, *_ = changed_by(root, tried)
        if errors:
            raise errors[0]
    except Exception as error:
        taken_back(root)
        line = next((text for text in str(error).splitlines() if text.strip()), type(error).__name__)
        read = ", ".join(reads.of_others(inner)[:3])
        early = f"; it reads {read}, as the constructor left it, before that module is called" if read else ""
        raise refusal(root, f"{where(error, root)} ({type(error).__name__}: {line.strip()}{early})") from None
    changed += [name for path, owner in root.named_modules() for name in stands_in(path, owner)]
    if changed:
        raise refusal(root, f": it changes {', '.join(changed[:3])}, which would stay as it is")
    if not torch.equal(before, torch.default_generator.get_state()) or others != of_others():
        raise refusal(root, ": it draws random numbers that hang on no tensor, which would stay the same")
    graph, constants = found[-1]
    if any(isinstance(constant, FakeTensor) for constant in constants.values()):
        raise refusal(root, ": it computes with a tensor in a plain attribute, which has no numbers yet")
    if not alike(*found):
        raise refusal(root, ": it does something else each time (it counts, draws or asks for the time)")
    return graph, constants, reads


def inside(cuts: list[str]) -> set[str]:
    """Give the paths of what has a cut inside, the model's own "" too. Pure.

    >>> sorted(inside(["encoder.3", "decoder.0.a"]))
    ['', 'decoder', 'decoder.0', 'encoder']
    """
    steps = [name.split(".") for name in cuts]
    return {".".join(path[:n]) for path in steps for n in range(len(path))}


def refusal(root: nn.Module, why: str) -> ConfigError:
    """Say why a forward can't be followed, and what to do. Pure."""
    return ConfigError(
        f"parallel.cuts: the forward of {type(root).__name__} can't be followed from cut to cut{why}: put "
        f"that into a submodule without a cut inside, which runs as it is; or make the model an "
        f"nn.Sequential, or give it a method layers() that lists submodules which follow one another"
    )


class Follower(fx.Tracer):
    """Follows the forwards of modules with a cut inside. Local. Raises TraceError for what it can't."""

    proxy_buffer_attributes = True

    def __init__(self, root: nn.Module, inputs: list[str], named: bool, inner: set[str]) -> None:
        """Take the model, its inputs, whether forward gets them by name, and what has a cut inside."""
        super().__init__()
        self.model, self.inputs, self.named, self.inner = root, inputs, named, inner
        self.asked: list[Asked] = []
        self._taken = ""
        self._modes: list[bool] = []
        self._looks: dict[int, Any] = {}

    def follow(self) -> fx.Graph:
        """Follow the forward once."""
        self._modes = modes()
        self._looks = {id(m): look(m) for m in self.model.modules()}
        graph = self.trace(self.model)
        if "refused" in vars(self):
            raise fx.proxy.TraceError(vars(self)["refused"])
        unused = next((one for one in self.asked if one._node is None and not one.called), None)
        if unused is not None:
            raise fx.proxy.TraceError(f"asks for .{unused.attr} of a value and compares it unseen")
        return graph

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
        return bool(obj.refuse("a branch that hangs on a value, or on its shape (an if, an assert, a while)"))

    def iter(self, obj: fx.Proxy) -> Any:
        """Refuse a loop."""
        return obj.refuse("a loop through a value")

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Give what stands for a call's value."""
        return Stand(node, self)

    def create_node(self, kind: str, target: Any, *arguments: Any, **named: Any) -> fx.Node:
        """Write a call down, with how it was made."""
        if modes() != self._modes:
            raise fx.proxy.TraceError("switches autocast, inference mode or hooks on saved tensors")
        if kind == "call_module":
            for path, module in submodule(self.model, target).named_modules(prefix=target):
                if look(module) != self._looks[id(module)]:
                    raise fx.proxy.TraceError(f"changes {path} before it is called (its mode, weights or so)")
        node = super().create_node(kind, target, *arguments, **named)
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


def taken_back(root: nn.Module) -> dict[str, Any]:
    """Take from the model the constants that torch.fx laid into it. Local."""
    laid = [name for name in vars(root) if name.startswith(("_tensor_constant", "_tree_spec_constant"))]
    return {name: vars(root).pop(name) for name in laid}


def alike(one: tuple[fx.Graph, dict[str, Any]], *others: tuple[fx.Graph, dict[str, Any]]) -> bool:
    """Whether a forward was the same each time that it was followed. Local."""

    def listed(graph: fx.Graph) -> list[str]:
        names = [fx.node.map_arg((n.args, dict(n.kwargs)), lambda a: a.name) for n in graph.nodes]
        return [f"{n.op} {n.name} {n.target} {given} {n.meta}" for n, given in zip(graph.nodes, names)]

    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b

    return all(
        listed(one[0]) == listed(graph)
        and one[1].keys() == constants.keys()
        and all(same(one[1][name], constants[name]) for name in constants)
        for graph, constants in others
    )


def refuse_hooks(root: nn.Module, inner: set[str]) -> None:
    """Refuse hooks on what is followed: they would run once. Local."""
    modules = dict(root.named_modules())
    for path in sorted(inner & modules.keys()):
        if has_hooks(modules[path]):
            raise ConfigError(
                f"parallel.cuts: there is a hook on {path or 'the model'}, which has a cut inside and is not "
                f"called as a whole in stages: put it on modules without a cut inside"
            )
