"""Parameters that several stages use, and where the gradients of this rank's copies of them go."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hpctrain.gradient import Places


@dataclass(frozen=True)
class Tie:
    """A parameter that several stages use; this rank holds it or a copy of it, if it uses it."""

    name: str
    tensor: torch.Tensor
    owner: int
    """The rank of the first stage that uses it."""
    others: tuple[int, ...]
    """Ranks of the other stages, the owner left out."""
    held: tuple[tuple[nn.Module, str], ...] = ()
    """The modules that have it, and as what."""

    def marks(self) -> list[tuple[int, int]]:
        """Say which tensors those modules have by now, and how often each was changed in place. Local."""
        return [(id(now), getattr(now, "_version", 0)) for now in (getattr(*at, None) for at in self.held)]


class Copies:
    """Where gradients of this rank's copies go, beside those of its own parameters (`gradient.Places`)."""

    def __init__(self, own: Places, copies: Sequence[torch.Tensor]) -> None:
        """Take the places of this rank's parameters, and its copies of others'."""
        self._own = own
        self._views = {id(copy): torch.empty_like(copy) for copy in copies}
        self._fresh = dict.fromkeys(self._views, True)
        for copy in copies:
            if copy.requires_grad:
                copy.register_post_accumulate_grad_hook(self._brought)  # type: ignore[no-untyped-call]

    def _brought(self, copy: torch.Tensor) -> None:
        """Add what autograd has brought at once: it may lie in one memory with another weight's. Local."""
        if copy.grad is None:
            return
        view, brought = self._views[id(copy)], copy.grad
        brought = brought if brought.layout == torch.strided else brought.to_dense()
        if self._fresh[id(copy)]:
            view.copy_(brought)
        else:
            view.add_(brought)
        self._fresh[id(copy)], copy.grad = False, None

    def begin(self) -> None:
        """Start a step: no gradient has joined. Local."""
        self._fresh = dict.fromkeys(self._views, True)

    def place(self, parameter: torch.Tensor) -> tuple[torch.Tensor, bool] | None:
        """Give the memory of a gradient and whether nothing has joined it yet; None: not managed. Local."""
        view = self._views.get(id(parameter))
        return self._own.place(parameter) if view is None else (view, self._fresh[id(parameter)])

    def filled(self, parameter: torch.Tensor) -> None:
        """Note that a gradient has been added in its place. Local."""
        if id(parameter) in self._views:
            self._fresh[id(parameter)] = False
        else:
            self._own.filled(parameter)

    def later(self, *parameters: torch.Tensor) -> bool:
        """Tell whether gradients may be computed after their backward; if so they are waited for. Local.

        Those of copies leave behind all passes, in an order of sums that one process has not anyway.
        """
        own = [parameter for parameter in parameters if id(parameter) not in self._views]
        return not own or self._own.later(*own)

    def left(self, *parameters: torch.Tensor, waits: bool) -> bool:
        """Tell whether autograd may bring a layer's gradients: not for copies. Local."""
        own = self._views.keys().isdisjoint(map(id, parameters))
        return own and self._own.left(*parameters, waits=waits)

    def caught_up(self, parameter: torch.Tensor) -> None:
        """Note that no gradient of the parameter waits any more. Local."""
        if id(parameter) not in self._views:
            self._own.caught_up(parameter)

    def taken_back(self, parameter: torch.Tensor) -> None:
        """The same within a backward, which may bring more of them. Local."""
        if id(parameter) not in self._views:
            self._own.taken_back(parameter)

    def taken(self, copy: torch.Tensor) -> torch.Tensor | None:
        """Give the gradient of a copy; then nothing has joined it. Local."""
        fresh, self._fresh[id(copy)] = self._fresh[id(copy)], True
        return None if fresh else self._views[id(copy)]
