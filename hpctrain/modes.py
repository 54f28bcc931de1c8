"""Functions of torch for a while: those of `torch.nn.functional` replaced, or run as if no mode were on.

A torch-function mode sees every call, which makes a transformer's forward some 5 % longer; layers call these
few by their names in `torch.nn.functional`.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from types import FunctionType
from typing import Any

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


def unlooking(function: Any) -> Any:
    """Give a Python function of torch, as it is now, that does not ask for a mode; what it calls does."""
    own = {**function.__globals__, **dict.fromkeys(ASKS, lambda *_: False)}
    found = FunctionType(function.__code__, own, function.__name__, function.__defaults__)
    found.__kwdefaults__ = function.__kwdefaults__
    return found
