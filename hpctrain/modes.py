"""Torch-function modes inside torch's own Python functions, which else run without them."""

from types import FunctionType
from typing import Any

ASKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
"""How torch's functions ask."""


def unlooking(function: Any) -> Any:
    """Give a Python function of torch, as it is now, that does not ask for a mode; what it calls does."""
    own = {**function.__globals__, **dict.fromkeys(ASKS, lambda *_: False)}
    found = FunctionType(function.__code__, own, function.__name__, function.__defaults__)
    found.__kwdefaults__ = function.__kwdefaults__
    return found
