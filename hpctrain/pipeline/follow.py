"""Follows a forward around its cuts, by torch.fx: what it calls, on what, in which order.

Values are stand-ins, of which nobody knows the numbers, the type or the length. What would hang on them, and
what would be done while following and never again, is refused: as far as it can be seen, which `x is None`
and `type(x)` of a value can't.
"""

import inspect
import operator
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree

from hpctrain.draws import of_others
from hpctrain.errors import ConfigError
from hpctrain.gradient import CALLED
from hpctrain.hidden import OURS, has_hooks
from hpctrain.modes import Replaced
from hpctrain.pipeline.operators import TAKEN
from hpctrain.pipeline.state import changed_by, plain
from hpctrain.pipeline.trace import LIBRARY, quiet, regions_kept, where
from hpctrain.tensors import Looking, storage_of, tensors_in

HERE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")
GRAD = "grad"
"""Note on a call: whether gradients were on."""
IN_PLACE = (
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
)
"""Operators of Python that change a tensor."""


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
    root.train(mode)
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
        with quiet():
            changed = changed_by(root, tried)
        if errors:
            raise errors[0]
    except Exception as error:
        taken_back(root)
        line = next((text for text in str(error).splitlines() if text.strip()), type(error).__name__)
        raise refusal(root, f"{where(error, root)} ({type(error).__name__}: {line.strip()})") from None
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


def asked_by_user() -> bool:
    """Whether the caller's caller is neither torch nor ours. Local."""
    asking = sys._getframe(2)
    while asking.f_back and asking.f_code.co_filename.startswith("<frozen"):  # abc, say
        asking = asking.f_back
    known = asking.f_code.co_filename.startswith((LIBRARY, HERE))
    return not known or asking.f_code.co_name == "is_tensor"


class Stand(fx.Proxy):
    """Stands for a value; what it is nobody knows."""

    def refuse(self, why: str) -> Any:
        """Refuse, also where the user's code catches errors."""
        vars(self.tracer).setdefault("refused", why)
        raise fx.proxy.TraceError(why)

    def __setitem__(self, at: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, at, value), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if asked_by_user():
            self.refuse(f"sets .{name} of a value")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> "Asked":
        found = Asked(self, name)
        if asked_by_user():
            if name == "data":
                self.refuse(
                    "takes .data of a value, whose changes nobody counts (under torch.no_grad() they are)"
                )
            self.tracer.asked.append(found)  # type: ignore[attr-defined]
        return found

    def __len__(self) -> int:
        return int(self.refuse("asks for the length of a value"))

    def __hash__(self) -> int:
        return int(self.refuse("takes a value as a key")) if asked_by_user() else id(self)

    def __str__(self) -> str:
        return str(self.refuse("makes words of a value")) if asked_by_user() else super().__repr__()

    def __repr__(self) -> str:
        return str(self.refuse("makes words of a value")) if asked_by_user() else super().__repr__()

    def __format__(self, form: str) -> str:
        return str(self.refuse("makes words of a value"))

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return self.refuse("asks for the type of a value") if asked_by_user() else Stand


class Asked(fx.proxy.Attribute, Stand):
    """An attribute or method of a value."""

    called = False

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Write the call of a method down."""
        self.called = True
        return super().__call__(*arguments, **named)


def changing(name: str) -> Callable[[Any, Any], Any]:
    """Give what writes an operator down that changes its first value."""

    def change(self: Stand, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return change


for _name in IN_PLACE:
    setattr(Stand, f"__{_name}__", changing(_name))


class Follower(fx.Tracer):
    """Follows the forwards of modules with a cut inside."""

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
        return bool(obj.refuse("a branch that hangs on a value"))

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
            for path, module in self.model.get_submodule(target).named_modules(prefix=target):
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


MAKERS = (
    *("arange", "empty", "eye", "full", "linspace", "ones", "zeros", "tensor"),
    *("rand", "randint", "randn", "randperm"),
)
"""Functions of torch that make tensors: of a value's size, or such as the forward changes later."""


@contextmanager
def makers_noted(tracer: Follower) -> Iterator[None]:
    """Write the making of tensors down, each forward has its own. Local."""
    before = {name: getattr(torch, name) for name in MAKERS}

    def noting(function: Any) -> Any:
        def make(*given: Any, **named: Any) -> Any:
            leaves = _pytree.tree_leaves((given, named))
            if asked_by_user() or any(issubclass(type(leaf), fx.Proxy) for leaf in leaves):
                return tracer.create_proxy("call_function", function, given, named)
            return function(*given, **named)

        return make

    for name, function in before.items():
        setattr(torch, name, noting(function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(torch, name, function)


class Reads:
    """What a followed forward reads of the modules' plain attributes: it must stay as it is."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._found: dict[tuple[int, str], tuple[str, nn.Module, Any]] = {}

    @contextmanager
    def noted(self, root: nn.Module) -> Iterator[None]:
        """Note it while the body runs. Local."""
        paths, usual = {id(m): path for path, m in root.named_modules()}, object.__getattribute__

        def read(module: nn.Module, name: str) -> Any:
            value = usual(module, name)
            if name not in OURS and not callable(value) and asked_by_user() and is_plain(module, name):
                path = f"{paths.get(id(module), type(module).__name__)}.{name}".lstrip(".")
                self._found.setdefault((id(module), name), (path, module, plain(value)))
            return value

        nn.Module.__getattribute__ = read  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            del nn.Module.__getattribute__

    def check(self) -> None:
        """Refuse what has changed since. Local."""
        for (_, name), (path, module, before) in self._found.items():
            if plain(getattr(module, name, None)) != before:
                raise ConfigError(
                    f"parallel.cuts: the forward around the cuts reads {path}, which a module that it calls "
                    f"changes: it is read once, when the model is cut; give it out of that module's forward"
                )


def is_plain(module: nn.Module, name: str) -> bool:
    """Whether an attribute is the module's own, or a class's that nothing computes. Local."""
    of_class = inspect.getattr_static(type(module), name, None)
    return name in vars(module) or (of_class is not None and not hasattr(type(of_class), "__get__"))


class OwnNumbers(Looking):
    """Refuses to compute with the model's own numbers but by its attributes: that would be done once."""

    def __init__(self, root: nn.Module) -> None:
        """Take the model."""
        super().__init__()  # type: ignore[no-untyped-call]
        every = [*root.named_parameters(), *root.named_buffers()]  # a forward may have put a stand-in there
        self.storages = {storage_of(own): name for name, own in every if isinstance(own, torch.Tensor)}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator."""
        for tensor in tensors_in((args, kwargs)):
            if name := self.storages.get(storage_of(tensor)):
                raise fx.proxy.TraceError(
                    f"computes with {name}, not by its name in the forward (parameters(), state_dict())"
                )
        return func(*args, **(kwargs or {}))


def look(module: nn.Module) -> Any:
    """Say how a module, without those inside, would run now. Local."""
    weights = [(id(p), p.requires_grad) for p in module._parameters.values() if p is not None]
    return (
        module.training,
        weights,
        [*map(id, module._buffers.values())],
        own_values(module),
        stands_in("", module),
    )


def own_values(module: nn.Module) -> dict[str, Any]:
    """Give what tells a module's own plain attributes from other ones. Local."""
    return {name: plain(value) for name, value in vars(module).items() if name not in OURS}


def stands_in(path: str, module: nn.Module) -> list[str]:
    """Name the attributes and buffers of a module that hold stand-ins. Local."""
    own = {name: value for name, value in vars(module).items() if name not in OURS}
    return [
        f"{path}.{name}".lstrip(".")
        for name, value in {**module._buffers, **own}.items()
        if any(issubclass(type(leaf), fx.Proxy) for leaf in _pytree.tree_leaves(value))
    ]


def modes() -> list[bool]:
    """Say how calls are made, but for gradients. Local."""
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    autocast = map(torch.is_autocast_enabled, ("cpu", "cuda"))
    return [*autocast, torch.is_inference_mode_enabled(), hooked]


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


@contextmanager
def functions_noted(tracer: Follower) -> Iterator[None]:
    """Write the calls of autograd.Functions down as they are, with their own backward. Local."""
    apply = vars(torch.autograd.Function)["apply"]

    def applied(cls: type, *given: Any, **named: Any) -> Any:
        if any(callable(one) and not issubclass(type(one), fx.Proxy) for one in given):
            raise fx.proxy.TraceError(
                f"{cls.__name__} is given what it calls (torch.utils.checkpoint: set use_reentrant=False)"
            )
        return tracer.create_proxy("call_function", apply.__get__(None, cls), given, named)

    torch.autograd.Function.apply = classmethod(applied)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]
