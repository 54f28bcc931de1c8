"""Random layers draw from a stream of their own: the k-th draw of a forward has the key (seed, step, v, k).

One stream for a whole forward would tie every mask to all draws before it, and those of a later
pipeline stage to work that another rank does. So each call that draws first sets the generator:

      dropout · linear · dropout · attention with dropout          k = 0, 1, 2 in the program's order

`draws` says which calls do, of torch's functions and of the operators that torch.export writes
down: the same ones, so that a stage which runs operators k, k + 1, … has the masks of one process.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from hpctrain.keys import key
from hpctrain.modes import unlooking
from hpctrain.tensors import tensors_in

T = TypeVar("T")
STANDING = 1
"""Part of a key: between two draws."""
SILENT, NEVER = 2, -(10**9)
"""Forwards without a draw after which none is expected; a count that never gets there."""
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
    "alpha_dropout_",
    "feature_dropout",
    "feature_dropout_",
    "feature_alpha_dropout",
    "feature_alpha_dropout_",
    "native_dropout",
}
"""Operators and built-in functions (input, p, train)."""
_BACKWARD = (torch.autograd.backward, torch.autograd.grad, torch.Tensor.backward)
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
_ALWAYS = {
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli",
    "multinomial", "poisson", "binomial", "bernoulli_", "normal_", "uniform_", "random_", "exponential_",
    "cauchy_", "log_normal_", "geometric_", "_standard_gamma", "_sample_dirichlet",
}  # fmt: skip
_POOLS = {f"fractional_max_pool{n}d{kind}" for n in (2, 3) for kind in ("", "_with_indices")}


MOST_KNOWN = 4096
_NEVER: set[Any] = set()
"""Functions that take none, whatever they are given: a forward calls few others."""


def draws(function: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether a call takes random numbers; notes functions that never do. Local."""
    if function in _DROPOUTS:
        training = functional.dropout is function or function in (functional.dropout1d, functional.dropout2d)
        training = training or function is functional.dropout3d  # the others' default is False
        p = _argument(arguments, named, 1, "p", 0.5)
        return bool(_argument(arguments, named, 2, "training", training)) and p > 0
    if function is functional.multi_head_attention_forward:
        return bool(named.get("training", True)) and _argument(arguments, named, 10, "dropout_p", 0.0) > 0
    name = str(getattr(function, "_opname", None) or getattr(function, "__name__", ""))
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
    if name in _POOLS:  # the operators are given their numbers
        return not hasattr(function, "_opname") and named.get("_random_samples") is None
    if name in _RECURRENT:
        numbers = [a for a in arguments if isinstance(a, float)]
        flags = [a for a in arguments if isinstance(a, bool)]
        return bool(numbers and numbers[0] > 0 and len(flags) > 1 and flags[1])
    if name in _ALWAYS:
        return True
    inner = name.startswith("_") and not name.startswith("__")
    if len(_NEVER) < MOST_KNOWN and not inner:  # torch.cond's compiler looks into it: some have no hash there
        _NEVER.add(function)
    return False


def _argument(arguments: tuple[Any, ...], named: dict[str, Any], at: int, name: str, default: Any) -> Any:
    return named.get(name, arguments[at] if at < len(arguments) else default)


def seed(stream: int, number: int) -> None:
    """Let the next numbers be those of draw `number` of a stream. Local."""
    set_generators(key(stream, number) >> 1)


def stand(stream: int, number: int) -> None:
    """Let the generator stand at draw `number` of a stream: what draws now has numbers of its own. Local."""
    set_generators(standing(stream, number))


def standing(stream: int, number: int) -> int:
    """Give the seed of a generator that stands at draw `number` of a stream. Pure."""
    return key(stream, number, STANDING) >> 1


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
        self.stream, self.start, self.count = stream, start, start

    def __enter__(self) -> "Draws":
        """Stand at the first draw."""
        stand(self.stream, self.count)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        """Set the generator for a call that draws."""
        named = named or {}
        if function in _NEVER:
            return function(*arguments, **named)
        if function in _BACKWARD:  # a gradient that the forward asks for
            with DrawsAgain(self.stream, range(self.start, self.count)):
                return unlooking(function)(*arguments, **named)
        if not draws(function, arguments, named):
            return function(*arguments, **named)
        self.count += 1
        return drawn(self.stream, self.count - 1, function, arguments, named)


def drew_unseen(drawing: Draws) -> bool:
    """Whether more was drawn than was counted: the generator does not stand at the next draw. Local.

    Nor where it stood before: a forward may put it back (`torch.random.fork_rng`).
    """
    state = torch.default_generator.get_state()
    try:
        for number in range(drawing.count, drawing.start - 1, -1):
            stand(drawing.stream, number)
            if torch.equal(torch.default_generator.get_state(), state):
                return False
        return True
    finally:
        torch.default_generator.set_state(state)


class DrewError(Exception):
    """A forward drew numbers where none were expected: it is to be run again, which gives each its own."""


class Drawing:
    """What the forwards of some modules run under: `Draws`, as long as they draw.

    A mode sees every call, which makes a transformer's forward some 5 % longer. Once two forwards have drawn
    nothing, and changed nothing in place, later ones run without; if the generator has moved behind one, that
    raises DrewError, and from then on all run under `Draws`.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        """Take the modules."""
        every = [m for module in modules for m in module.modules()]
        self._others = [m for m in every if not isinstance(m, _BatchNorm)]  # whose statistics are put back
        self._silent = NEVER if any(hasattr(m, "meeting") for m in every) else 0
        """Forwards in a row that drew nothing; a SyncBatchNorm's meet others', and can't be run again."""

    @property
    def counts(self) -> bool:
        """Whether the coming forward's draws are counted."""
        return self._silent < SILENT or bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]

    @contextmanager
    def of(self, stream: int, start: int, given: Any) -> Iterator[Draws]:
        """Enter for a forward of `given`: gives what counts its draws, of a stream from `start` on. Local."""
        drawing = Draws(stream, start)
        if self.counts:
            before = self._versions(given)
            with drawing:
                yield drawing
            silent = drawing.count == start and self._versions(given) == before
            self._silent = self._silent + 1 if silent else NEVER
            return
        stand(stream, start)
        state = torch.default_generator.get_state()
        yield drawing
        if not torch.equal(torch.default_generator.get_state(), state):
            self._silent = NEVER
            raise DrewError

    def _versions(self, given: Any) -> list[tuple[int, int]]:
        """Say which tensors a forward might change, and how often each was changed in place."""
        buffers = (b for m in self._others for b in m._buffers.values() if b is not None)
        return [(id(tensor), tensor._version) for tensor in chain(buffers, tensors_in(given))]


def of_others() -> dict[str, Any]:
    """Give the states of the global generators that are not torch's, which no stream sets. Local."""
    _, numbers, *rest = np.random.get_state(legacy=True)
    return {"NumPy": (np.asarray(numbers).tobytes(), rest), "Python": random.getstate()}


@contextmanager
def streams_kept() -> Iterator[None]:
    """Put the random streams of torch, NumPy and Python back behind the body. Local."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def told_of_others(before: dict[str, Any], what: str) -> str:
    """Say from which of them numbers were drawn since then; nothing if from none. Local."""
    names = [name for name, state in of_others().items() if state != before[name]]
    if not names:
        return ""
    return (
        f"the model's forward (or what ran beside it) draws from the global random numbers of "
        f"{' and '.join(names)}: {what}; draw from torch, whose numbers are set for each micro-batch"
    )


def run_again(forward: Callable[[], T], records: list[Any]) -> T:
    """Run a forward, and once more where it drew unexpectedly; what it recorded goes. Local."""
    count = len(records)
    try:
        return forward()
    except DrewError:
        del records[count:]
        return forward()


class DrawsAgain(TorchFunctionMode):
    """Entered for a backward: what it computes again draws the numbers of the forward, one after another.

    It sets the generator back to where its region began; that seed says which draw comes next.
    """

    def __init__(self, stream: int, drawn: range) -> None:
        """Take the stream's key and the draws of the forward."""
        super().__init__()
        self.stream, self.drawn = stream, drawn
        self.own = False
        """Whether the backward draws numbers of its own, too."""
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
            self._numbers = {standing(self.stream, number): number for number in self.drawn}
        number = self._numbers.get(torch.default_generator.initial_seed())
        if number is None:
            self.own = True
            return function(*arguments, **named)
        return drawn(self.stream, number, function, arguments, named)


def drawn(stream: int, number: int, function: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Call what takes draw `number` of a stream; the generator stands at the next one behind it. Local."""
    seed(stream, number)
    found = function(*arguments, **named)
    stand(stream, number + 1)
    return found


def again(stream: int, drawn: range) -> AbstractContextManager[Any]:
    """Give what the backward of a forward with these draws runs under."""
    return DrawsAgain(stream, drawn) if drawn else nullcontext()
