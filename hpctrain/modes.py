"""Functions of torch for a while: those of `torch.nn.functional` replaced, or run as if no mode were on.

And the settings of torch's that hold for all that follows in a process.

A torch-function mode sees every call, which makes a transformer's forward some 5 % longer; layers call these
few by their names in `torch.nn.functional`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from types import FunctionType
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack

ASKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
"""How torch's functions ask for modes."""


class Replaced:
    """Entered, lets others stand in `torch.nn.functional`, for all threads; each gets what it stands for."""

    def __init__(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        """Take who is to stand there, by name."""
        self._functions = functions
        self._before: list[dict[str, Any]] = []
        self._calls: dict[str, tuple[Any, Any]] = {}
        """What was found, and what calls the other with it."""

    def __enter__(self) -> None:
        """Put them there."""
        self._before.append({name: getattr(functional, name) for name in self._functions})
        for name, own in self._before[-1].items():
            if self._calls.get(name, (None, None))[0] is not own:
                self._calls[name] = own, instead(own, self._functions[name])
            setattr(functional, name, self._calls[name][1])

    def __exit__(self, *_: Any) -> None:
        """Put back what stood there."""
        for name, own in self._before.pop().items():
            setattr(functional, name, own)


SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "whether gradients are on (torch.set_grad_enabled)": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    **{
        f"whether autocast is on (of {device})": (
            partial(torch.is_autocast_enabled, device),
            partial(torch.set_autocast_enabled, device),
        )
        for device in ("cpu", "cuda")
    },
}
"""Those that decide what later layers compute, by what they are called: how to ask and to set them."""


def settings() -> list[Any]:
    """Give the values of SETTINGS. Local."""
    return [ask() for ask, _ in SETTINGS.values()]


@contextmanager
def settings_kept() -> Iterator[None]:
    """Set SETTINGS back behind the body. Local."""
    before = settings()
    try:
        yield
    finally:
        for (_, put), value in zip(SETTINGS.values(), before):
            put(value)


def watched() -> bool:
    """Whether a mode is on that is neither torch's nor ours. Local."""
    stack = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return any(type(mode).__module__.split(".")[0] not in ("torch", "hpctrain") for mode in stack)


def instead(own: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """Give what calls `function` with `own` and what it is given, by the name of `own`."""

    @wraps(own)
    def call(*arguments: Any, **named: Any) -> Any:
        return function(own, *arguments, **named)

    return call


_takers: list[Callable[..., Any]] = []
"""Who gets the calls of autograd.Functions, the last one first."""


def _trampoline() -> FunctionType:
    """Make what stands in the place of `torch.autograd.Function.apply`.

    Code can be exchanged for one that has as many variables of its surroundings: that has its class.
    """
    surroundings: Any = None

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        from hpctrain import modes  # it runs among torch's globals

        return (surroundings, modes._takers[-1](cls, *args, **kwargs))[1]

    return apply  # type: ignore[return-value]


@contextmanager
def functions_taken(by: Callable[..., Any]) -> Iterator[None]:
    """Let `by` get all calls of autograd.Functions: what calls them as usual, the class, what it is given.

    Those, too, whose `apply` somebody has kept (`mine = Mine.apply`): its code is exchanged. Local.
    """
    function = vars(torch.autograd.Function)["apply"].__func__
    code, usual = function.__code__, _takers[-1] if _takers else None
    if usual is None:
        closure = function.__closure__
        usual = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    _takers.append(partial(by, usual))
    function.__code__ = _trampoline().__code__
    try:
        yield
    finally:
        function.__code__ = code
        _takers.pop()


def unlooking(function: Any) -> Any:
    """Give a Python function of torch, as it is now, that does not ask for a mode; what it calls does."""
    own = {**function.__globals__, **dict.fromkeys(ASKS, lambda *_: False)}
    found = FunctionType(function.__code__, own, function.__name__, function.__defaults__)
    found.__kwdefaults__ = function.__kwdefaults__
    return found
