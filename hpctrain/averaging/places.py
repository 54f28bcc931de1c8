"""Where each gradient of this rank goes, and which have come.

      place(p)    where the gradient of p is to be computed, and filled(p) that it was; or
      later(p…)   it will be, after the backward, and caught_up(p) that none of p's waits any more; or
      ready(p)    autograd's hook: p has all its gradient of this backward, in `.grad` or in place
      came()      a backward has ended: the same for parameters without a hook
      complete()  what nothing has joined is zero

In the last backward of a step a bucket is full when every parameter that lies in it is ready;
buckets are told in their order, so that all ranks mean the same ones.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from hpctrain.averaging.across import Bucket
from hpctrain.averaging.space import Space
from hpctrain.errors import HpctrainError
from hpctrain.tensors import OurHook

SMALL = 2**16
"""Elements up to which a parameter has a hook only where buckets wait for it. Between products, which leave
nothing of it in the caches, a hook takes 25 µs (measured): so larger ones, too, have theirs only in a step's
first backward, in which what autograd brings is new memory that should not last until its end."""


class Places:
    """The views of one slot that gradients join."""

    def __init__(self, named: Mapping[str, nn.Parameter], spaces: list[Space]) -> None:
        """Take the trained parameters and their spaces; hooks on them bring gradients here."""
        self.named, self.spaces = dict(named), spaces
        self.used = np.zeros(len(named))
        """How many gradients have joined, by parameter."""
        self._index = {id(p): at for at, p in enumerate(self.named.values())}
        self._views = [torch.empty(0)] * len(self.named)
        self._fresh = [True] * len(self.named)
        self._handed: list[torch.Tensor | None] = [None] * len(self.named)
        """What stands as each parameter's `.grad`: the view, which counts by itself what is added to it."""
        self._counts = [0] * len(self.named)
        """What it had counted when it was looked at last."""
        self._slot = [-1] * len(self.named)
        self._hooks: dict[int, Any] = {}
        self._unhooked = list(enumerate(self.named.values()))
        self._several = False
        self._telling: Callable[[int], None] | None = None
        self._buckets_of: list[list[int]] = [[] for _ in self.named]
        self.order: list[int] = []
        """Numbers of the buckets, as they are told."""
        self._told = 0
        self._missing: list[int] = []
        self._final: set[int] | None = set()
        """Parameters whose gradients are final when they come; None: all."""
        self._came: dict[int, int] = {}
        self._waiting: set[int] = set()
        """Parameters whose gradients are computed after their backward."""
        self._shared: set[int] = set()
        """Parameters whose gradients other ranks add to at the end: their buckets leave last."""
        self._mixed: set[int] = set()
        """Parameters that autograd has brought something for, unasked."""
        self._mixed_at_first: set[int] = set()
        """Those of them for which it did so in the first step."""
        self._left: set[int] = set()
        """Parameters that it may bring something for."""
        self._steps = 0
        self.catch_up: Callable[[torch.Tensor], None] = lambda _: None
        """Computes what waits for a parameter, before something else joins its gradient."""
        self.repeats = False
        """Whether one backward has brought a parameter's gradient in several portions."""

    def _hook(self, above: int) -> None:
        """Let autograd tell of parameters with more elements. Local."""
        for index, parameter in self._unhooked:
            if parameter.numel() > above:
                hook = OurHook(self.ready, parameter)
                self._hooks[index] = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        self._unhooked = [(index, p) for index, p in self._unhooked if index not in self._hooks]

    def _unhook(self, indices: Iterable[int]) -> None:
        """Let it tell of these no more. Local."""
        for index in indices:
            self._hooks.pop(index).remove()
        self._unhooked = [one for one in enumerate(self.named.values()) if one[0] not in self._hooks]

    def watch(self, buckets: Sequence[Bucket]) -> None:
        """Take the buckets; their order is that of the list until another is learnt. Local."""
        self._hook(-1)
        for at, (space, start, stop) in enumerate(buckets):
            for seat in self.spaces[space].inside(start, stop):
                self._buckets_of[seat.index].append(at)
        self.order = list(range(len(buckets)))

    def learn(self, order: list[int]) -> None:
        """Take the order in which buckets are told. Local."""
        self.order = order

    def filling_order(self) -> list[int]:
        """Order the buckets by the last backward: as their last parameters came; those that waited last."""
        last = [-1] * len(self.order)
        for index, buckets in enumerate(self._buckets_of):
            for at in buckets:
                last[at] = max(last[at], self._came.get(index, len(self.named)))
        return sorted(range(len(last)), key=lambda at: (last[at], at))

    def begin(self, several: bool = False) -> None:
        """Start a step: no gradient has joined. Local.

        `several`: what its backwards bring will be added up by autograd, in the memory of the first.
        """
        self.used[:] = 0.0
        self._telling, self._missing, self._final = None, [], set()
        self._waiting.clear()
        self._steps += 1
        self._hook(SMALL)
        self._several = several and not self.order

    def last_backward(
        self, tell: Callable[[int], None] | None, parameters: Iterable[nn.Parameter] | None = None
    ) -> None:
        """Note that what comes now is final, for all parameters or some (more may follow in other calls).

        `tell(n)` hears that n buckets of the order are full. Local.
        """
        if parameters is None:
            self._final = None
        elif self._final is not None:
            self._final |= {self._index[id(p)] for p in parameters if id(p) in self._index}
        if self._missing:
            return
        self._telling, self._told = tell, 0
        self._came = {}
        counts = [0] * len(self.order)
        for buckets in self._buckets_of:
            for at in buckets:
                counts[at] += 1
        self._missing = counts

    def used_elsewhere(self, parameters: Iterable[torch.Tensor]) -> None:
        """Note that other ranks add to the gradients of these behind the last backward. Local."""
        self._shared |= {self._index[id(p)] for p in parameters if id(p) in self._index}

    def point(
        self, slot: int, flats: list[torch.Tensor], parameters: Iterable[nn.Parameter] | None = None
    ) -> None:
        """Let gradients, of all or of some, go to a slot's memory; what lies there is old. Local."""
        indices = set(self._indices(parameters))
        for space, flat in zip(self.spaces, flats):
            for seat in space.seats:
                if seat.index in indices and self._slot[seat.index] != slot:
                    self._views[seat.index], self._slot[seat.index] = seat.view(flat), slot
        every = list(self.named.values())
        for index in indices:
            self._fresh[index], every[index].grad = True, None

    def _indices(self, parameters: Iterable[nn.Parameter] | None) -> Iterable[int]:
        """Number parameters; all of them if None."""
        if parameters is None:
            return range(len(self.named))
        return [self._index[id(p)] for p in parameters if id(p) in self._index]

    def keep(self) -> None:
        """Say that what lies in the memory is to be kept: it is no old gradient. Local."""
        self._fresh = [False] * len(self.named)

    def place(self, parameter: torch.Tensor) -> tuple[torch.Tensor, bool] | None:
        """Give the memory of a parameter's gradient, and whether nothing has joined it yet. Local."""
        index = self._index.get(id(parameter))
        if index is None:
            return None
        self._not_late(index)
        return self._views[index], self._fresh[index]

    def filled(self, parameter: torch.Tensor) -> None:
        """Note that a gradient has been added in its place. Local."""
        index = self._index[id(parameter)]
        self._fresh[index] = False
        self.used[index] += 1

    def later(self, *parameters: torch.Tensor) -> bool:
        """Tell whether gradients may be computed after their backward; if so they are waited for. Local.

        Not in the first step, which shows what autograd brings, nor for what autograd adds to: the
        sum would have another order.
        """
        indices = self._without(self._mixed, parameters)
        self._waiting.update(indices)
        return bool(indices)

    def left(self, *parameters: torch.Tensor, waits: bool) -> bool:
        """Tell whether autograd may bring a layer's gradients; what it brings for others is mixed. Local.

        Not in the first step either, nor for what it added to there: it would add that up first. What it adds
        to only later has been left before, where nothing waits; where it `waits`, it is left from then on.
        """
        if waits and self._without(self._mixed, parameters):
            return False
        indices = self._without(self._mixed_at_first, parameters)
        self._left.update(indices)
        return bool(indices)

    def _without(self, mixed: set[int], parameters: Iterable[torch.Tensor]) -> list[int]:
        """Give the numbers of parameters; none if one of them is `mixed`, or may be as yet. Local."""
        indices = [self._index[id(p)] for p in parameters if id(p) in self._index]
        return indices if self._steps > 1 and mixed.isdisjoint(indices) else []

    def caught_up(self, parameter: torch.Tensor) -> None:
        """Note that no gradient of the parameter waits any more. Local."""
        index = self._index[id(parameter)]
        self._waiting.discard(index)
        if self._final is None or index in self._final:
            self._note_final(index)

    def taken_back(self, parameter: torch.Tensor) -> None:
        """The same within a backward, which may bring more of them: it tells when it has. Local."""
        self._waiting.discard(self._index[id(parameter)])

    def ready(self, parameter: torch.Tensor, *_: Any) -> None:
        """Note that autograd has brought a parameter's gradient of this backward. Local.

        What else is given may be anything: torch hands on what a user's hook returned, and then refuses it.
        """
        index = self._index[id(parameter)]
        view, grad = self._views[index], parameter.grad
        stands = grad is self._handed[index] and grad is not None
        if grad is not None and stands and grad._version == self._counts[index]:
            grad = None  # it is what came before
        if grad is not None:  # else nothing came this way: it was filled in place, or there is none
            self._not_late(index)
            if grad.layout != torch.strided:
                grad = grad.to_dense()
            if index not in self._left or index in self._waiting:
                self._mixed.add(index)
                if self._steps == 1:
                    self._mixed_at_first.add(index)
            if index in self._waiting:
                self.catch_up(parameter)
            if grad.data_ptr() != view.data_ptr() or not grad.numel():
                stands = False
                if self._fresh[index]:
                    view.copy_(grad)
                else:
                    view.add_(grad)
            if stands:
                self._counts[index] = grad._version
            else:  # the next micro-batch adds to it by itself
                parameter.grad = self._handed[index] = view.data
                self._counts[index] = 0
            self.filled(parameter)
        final = self._final is None or index in self._final
        if final and index not in self._waiting:
            self._note_final(index)

    def came(self) -> None:
        """Take what a backward that has ended has brought for parameters without a hook. Local."""
        for index, parameter in self._unhooked:
            grad = parameter.grad
            if grad is None:
                continue
            usual = index in self._mixed or index in self._left
            if grad is not self._handed[index] or index in self._waiting or not usual:
                self.ready(parameter)
            elif grad._version != self._counts[index]:
                self._counts[index] = grad._version
                self.filled(parameter)
        if self._several and self._hooks:
            self._unhook([index for index in self._hooks if not self._fresh[index]])

    def _note_final(self, index: int) -> None:
        if self._missing and index not in self._shared:
            self._note(index)

    def _note(self, index: int) -> None:
        if index in self._came:
            self.repeats = True
            return
        self._came[index] = len(self._came)
        if self._telling is None:
            return
        if self._fresh[index]:
            self._clear(index)
        for at in self._buckets_of[index]:
            self._missing[at] -= 1
        told = self._told
        while told < len(self.order) and not self._missing[self.order[told]]:
            told += 1
        if told > self._told:
            self._told = told
            self._telling(told)

    def _not_late(self, index: int) -> None:
        """Refuse a gradient of a bucket that is on its way."""
        if self._telling is None or index not in self._came:
            return
        if any(at in self.order[: self._told] for at in self._buckets_of[index]):
            name = list(self.named)[index]
            raise HpctrainError(
                f"a gradient of {name} came after its bucket was sent: one backward brings it in several "
                f"portions, which the first steps did not show; does the model recompute activations by "
                f"torch.utils.checkpoint? then with use_reentrant=False"
            )

    def complete(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Zero the gradients, of all or some, that nothing has joined: there are old ones. Local."""
        self.came()
        for index in self._indices(parameters):
            if self._fresh[index]:
                self._clear(index)

    def _clear(self, index: int) -> None:
        self._views[index].zero_()
        self._fresh[index] = False

    def gradient(self, name: str) -> torch.Tensor:
        """Give what has joined the gradient of a parameter; zeros where nothing has. Local."""
        self.came()
        index = self._index[id(self.named[name])]
        if self._fresh[index]:
            self._clear(index)
        return self._views[index]

    def close(self) -> None:
        """Take the hooks off the user's parameters. Local."""
        self._unhook([*self._hooks])
