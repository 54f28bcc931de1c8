"""Random layers draw from a stream of their own: the k-th draw of a forward has the key (seed, step, v, k).

One stream for a whole forward would tie every mask to all draws before it, and those of a later
pipeline stage to work that another rank does. So each call that draws first sets the generator:

      dropout · linear · dropout · attention with dropout          k = 0, 1, 2 in the program's order

`draws` says which calls do, of torch's functions and of the operators that torch.export writes
down: the same ones, so that a stage which runs operators k, k + 1, … has the masks of one process.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from hpctrain.keys import key
from hpctrain.modes import unlooking

_DROPOUTS = {
    functional.dropout,
    functional.dropout1d,
    functional.dropout2d,
    functional.dropout3d,
    functional.alpha_dropout,
    functional.feature_alpha_dropout,
}
"""(input, p = 0.5, training, inplace)"""
_AT_WILL = {
    "dropout",
    "dropout_",
    "alpha_dropout",
    "feature_dropout",
    "feature_alpha_dropout",
    "native_dropout",
}
"""Operators and built-in functions (input, p, train)."""
_BACKWARD = (torch.autograd.backward, torch.autograd.grad, torch.Tensor.backward)
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
_ALWAYS = {
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli",
    "multinomial", "poisson", "binomial", "bernoulli_", "normal_", "uniform_", "random_", "exponential_",
    "cauchy_", "log_normal_", "geometric_", "fractional_max_pool2d", "fractional_max_pool3d",
}  # fmt: skip


MOST_KNOWN = 4096
_NEVER: set[Any] = set()
"""Functions that take none, whatever they are given: a forward calls few others."""


def draws(function: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether a call takes random numbers. Pure."""
    if function in _DROPOUTS:
        training = functional.dropout is function or function in (functional.dropout1d, functional.dropout2d)
        training = training or function is functional.dropout3d  # the others' default is False
        p = _argument(arguments, named, 1, "p", 0.5)
        return bool(_argument(arguments, named, 2, "training", training)) and p > 0
    if function is functional.multi_head_attention_forward:
        return bool(named.get("training", True)) and _argument(arguments, named, 10, "dropout_p", 0.0) > 0
    name = getattr(function, "_opname", None) or getattr(function, "__name__", "")
    if name == "scaled_dot_product_attention":
        return bool(_argument(arguments, named, 4, "dropout_p", 0.0) > 0)
    if name in _AT_WILL:
        return (
            bool(_argument(arguments, named, 2, "train", True))
            and _argument(arguments, named, 1, "p", 0.5) > 0
        )
    if name in ("rrelu", "rrelu_", "rrelu_with_noise"):
        return bool(_argument(arguments, named, 3 + (name == "rrelu_with_noise"), "training", False))
    if name == "gumbel_softmax":
        return True
    if name in _RECURRENT:
        numbers = [a for a in arguments if isinstance(a, float)]
        flags = [a for a in arguments if isinstance(a, bool)]
        return bool(numbers and numbers[0] > 0 and len(flags) > 1 and flags[1])
    if name in _ALWAYS:
        return True
    if len(_NEVER) < MOST_KNOWN:
        _NEVER.add(function)
    return False


def _argument(arguments: tuple[Any, ...], named: dict[str, Any], at: int, name: str, default: Any) -> Any:
    return named.get(name, arguments[at] if at < len(arguments) else default)


def seed(stream: int, number: int) -> None:
    """Let the next numbers be those of draw `number` of a stream. Local."""
    set_generators(key(stream, number) >> 1)


def set_generators(value: int) -> None:
    """Do what torch.manual_seed does, without the stack that it keeps while no GPU is in use. Local."""
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(value)


class Draws(TorchFunctionMode):
    """Entered for a forward: every call that draws gets its own numbers.

    Between draws the generator stands at the next one: what a model computes again for its backward
    (`torch.utils.checkpoint`, say) restores it as it was at the start, and `DrawsAgain` knows it by its seed.
    """

    def __init__(self, stream: int, start: int = 0) -> None:
        """Take the stream's key and the number of the first draw."""
        super().__init__()
        self.stream, self.count = stream, start

    def __enter__(self) -> "Draws":
        """Stand at the first draw."""
        seed(self.stream, self.count)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        """Set the generator for a call that draws."""
        named = named or {}
        if function in _NEVER or not draws(function, arguments, named):
            return function(*arguments, **named)
        self.count += 1
        return drawn(self.stream, self.count - 1, function, arguments, named)


class DrawsAgain(TorchFunctionMode):
    """Entered for a backward: what it computes again draws the numbers of the forward, one after another.

    It sets the generator back to where its region began; that seed says which draw comes next.
    """

    def __init__(self, stream: int, count: int) -> None:
        """Take the stream's key and how many numbers were drawn."""
        super().__init__()
        self.stream, self.count = stream, count
        self._numbers: dict[int, int] = {}

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        """Set the generator for a call that draws, if it stands at a draw of the forward."""
        named = named or {}
        if function in _BACKWARD:  # the one that this is entered for, or one inside of it
            with self:
                return unlooking(function)(*arguments, **named)
        if not draws(function, arguments, named):
            return function(*arguments, **named)
        if not self._numbers:
            self._numbers = {key(self.stream, number) >> 1: number for number in range(self.count)}
        number = self._numbers.get(torch.default_generator.initial_seed())
        if number is None:  # a draw of the backward's own
            return function(*arguments, **named)
        return drawn(self.stream, number, function, arguments, named)


def drawn(stream: int, number: int, function: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Call what takes draw `number` of a stream; the generator stands at the next one behind it. Local."""
    seed(stream, number)
    found = function(*arguments, **named)
    seed(stream, number + 1)
    return found


def again(stream: int, count: int) -> AbstractContextManager[Any]:
    """Give what the backward of a forward with so many draws runs under."""
    return DrawsAgain(stream, count) if count else nullcontext()
