"""Functions of torch for a while: those of `torch.nn.functional` replaced, or run as if no mode were on.

A torch-function mode sees every call, which makes a transformer's forward some 5 % longer; layers call these
few by their names in `torch.nn.functional`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from types import FunctionType
from typing import Any

from torch.nn import functional

ASKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
"""How torch's functions ask for modes."""


@contextmanager
def replaced(functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Let others stand in `torch.nn.functional`, in all threads; each is given first what it stands for."""
    before = {name: getattr(functional, name) for name in functions}
    for name, function in functions.items():
        setattr(functional, name, instead(before[name], function))
    try:
        yield
    finally:
        for name, own in before.items():
            setattr(functional, name, own)


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
