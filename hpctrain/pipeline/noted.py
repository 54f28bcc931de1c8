"""What is seen while a forward is followed (`follow.py`), beside its calls: torch and modules report it.

Tensors that it makes and autograd.Functions that it applies become calls; what it reads of plain attributes
must stay; what it computes with the model's own numbers, and what it changes of a module, is refused.
"""

import inspect
from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree

from hpctrain.errors import ConfigError
from hpctrain.hidden import OURS
from hpctrain.modes import functions_taken
from hpctrain.pipeline.stand import asked_by_user
from hpctrain.pipeline.state import plain
from hpctrain.tensors import Looking, storage_of, tensors_in

MAKERS = (
    *("arange", "empty", "eye", "full", "linspace", "ones", "zeros", "tensor"),
    *("rand", "randint", "randn", "randperm"),
)
"""Functions of torch that make tensors: of a value's size, or such as the forward changes later."""


@contextmanager
def makers_noted(tracer: fx.Tracer) -> Iterator[None]:
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


@contextmanager
def functions_noted(tracer: fx.Tracer) -> Iterator[None]:
    """Write the calls of autograd.Functions down as they are, with their own backward. Local."""

    def applied(_: Any, cls: Any, *given: Any, **named: Any) -> Any:
        if any(callable(one) and not issubclass(type(one), fx.Proxy) for one in given):
            raise fx.proxy.TraceError(
                f"{cls.__name__} is given what it calls (torch.utils.checkpoint: set use_reentrant=False)"
            )
        return tracer.create_proxy("call_function", cls.apply, given, named)

    with functions_taken(applied):
        yield


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

    def of_others(self, followed: Container[str]) -> list[str]:
        """Name what was read of modules that are called, not `followed`. Local."""
        paths = [path for path, _, _ in self._found.values()]
        return [path for path in paths if path.rpartition(".")[0] not in followed]

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
    missing = object()
    of_class = inspect.getattr_static(type(module), name, missing)
    return name in vars(module) or not (of_class is missing or hasattr(type(of_class), "__get__"))


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
