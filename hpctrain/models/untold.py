"""What a constructor does by no operator: it looks, copies, draws until it likes its numbers.

While `told` is entered the lines hear of it, and torch's own ways that hide it are replaced.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from hpctrain.models.lines import Lines
from hpctrain.tensors import storage_of

_LOOKS = {"tolist", "numpy", "__array__", "__dlpack__", "__reduce_ex__", "__deepcopy__"}
"""Methods that read a tensor by no operator."""


@contextmanager
def told(lines: Lines) -> Iterator[None]:
    """Let lines hear of it. Local."""
    nn.Parameter.__new__ = plain_parameters_only  # type: ignore[method-assign, assignment]
    nn.init._no_grad_trunc_normal_ = truncated
    try:
        with Looked(lines):
            yield
    finally:
        nn.Parameter.__new__ = MAKES  # type: ignore[method-assign]
        nn.init._no_grad_trunc_normal_ = TRUNCATES


class Looked(TorchFunctionMode):
    """Entered while a constructor runs: what it looks at by no operator keeps the numbers that it saw."""

    def __init__(self, lines: Lines) -> None:
        """Take what was written down."""
        super().__init__()
        self.lines = lines

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        """Note the tensors that are looked at."""
        tensor = next(iter(arguments), None)
        if getattr(function, "__name__", "") not in _LOOKS or not isinstance(tensor, torch.Tensor):
            return function(*arguments, **(named or {}))
        # for one without memory there are operators
        if not isinstance(tensor, FakeTensor) and storage_of(tensor) in self.lines:
            if function is torch.Tensor.__deepcopy__ and type(tensor) is torch.Tensor:
                return copied(tensor, arguments[1])
            self.lines.settle([storage_of(tensor)])
        return function(*arguments, **(named or {}))


def copied(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    """Copy as copy.deepcopy does, by an operator, which can be written down. Local."""
    if id(tensor) not in memo:
        found = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        vars(found).update(deepcopy(vars(tensor), memo))
        memo[id(tensor)] = found
    return memo[id(tensor)]  # type: ignore[no-any-return]


MAKES = vars(nn.Parameter)["__new__"]
"""As torch has it."""


def plain_parameters_only(kind: type, *arguments: Any, **named: Any) -> Any:
    """Make a parameter, if it is of no kind of its own, which a tensor without memory would not show."""
    if kind is not nn.Parameter:
        raise NotImplementedError(f"{kind.__qualname__} is a kind of nn.Parameter of its own")
    return MAKES(kind, *arguments, **named)


TRUNCATES = nn.init._no_grad_trunc_normal_
"""As torch has it: it looks at what it has drawn, to draw again."""


@torch.library.custom_op(
    "hpctrain::trunc_normal_", mutates_args=("tensor",), tags=(torch.Tag.nondeterministic_seeded,)
)
def trunc_normal_(tensor: torch.Tensor, mean: float, std: float, a: float, b: float) -> None:
    """Do it as one operator, which is written down as one line. Local."""
    TRUNCATES(tensor, mean, std, a, b)


@trunc_normal_.register_fake
def _(tensor: torch.Tensor, mean: float, std: float, a: float, b: float) -> None:
    """Nothing is to be drawn where there is no memory."""


def truncated(
    tensor: torch.Tensor, mean: float, std: float, a: float, b: float, generator: Any = None
) -> Any:
    """Draw what torch does; a generator of the constructor's own is moved on by looking. Local."""
    if generator is not None:
        return TRUNCATES(tensor, mean, std, a, b, generator)
    with torch.no_grad():
        trunc_normal_(tensor, float(mean), float(std), float(a), float(b))
    return tensor
