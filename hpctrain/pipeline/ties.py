"""Parameters that several stages use, and where the gradients of this rank's copies of them go.

The copies' gradients of all micro-batches come to the owner at the step's end (`Pipeline.collect`): another
order of sums than one process has. Where that is not to be (`averaging.invariant`), those of each micro-batch
go from stage to stage (`Relay`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hpctrain.gradient import Places
from hpctrain.pipeline.message import pack
from hpctrain.pipeline.stage import raise_first
from hpctrain.pipeline.transport import RELAYED, Transport
from hpctrain.tensors import OurHook


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

    def __init__(self, own: Places, copies: Sequence[torch.Tensor], apart: bool = False) -> None:
        """Take the places of this rank's parameters, and its copies of others'.

        `apart`: what autograd brings for a copy does not join what products have added in its place.
        """
        self._own, self.apart = own, apart
        self._came: dict[int, torch.Tensor] = {}
        """What autograd has brought, where that stays apart."""
        self._views = {id(copy): torch.empty_like(copy) for copy in copies}
        self._fresh = dict.fromkeys(self._views, True)
        for copy in copies:
            if copy.requires_grad:
                copy.register_post_accumulate_grad_hook(OurHook(self._brought))  # type: ignore[no-untyped-call]

    def _brought(self, copy: torch.Tensor) -> None:
        """Add what autograd has brought at once: it may lie in one memory with another weight's. Local."""
        if copy.grad is None:
            return
        view, brought = self._views[id(copy)], copy.grad
        brought = brought if brought.layout == torch.strided else brought.to_dense()
        if self.apart:
            before, copy.grad = self._came.get(id(copy)), None
            self._came[id(copy)] = brought if before is None else before + brought
            return
        if self._fresh[id(copy)]:
            view.copy_(brought)
        else:
            view.add_(brought)
        self._fresh[id(copy)], copy.grad = False, None

    def begin(self) -> None:
        """Start a step: no gradient has joined. Local."""
        self._came.clear()
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

    def came(self) -> None:
        """Take what a backward that has ended has brought by autograd. Local."""
        self._own.came()

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

    def brought(self, copy: torch.Tensor) -> torch.Tensor | None:
        """Give what autograd has brought `apart` for a copy; then it has brought nothing. Local."""
        return self._came.pop(id(copy), None)


class Relay:
    """Hands the gradients of a micro-batch from each stage that uses a weight to the one before that does.

    So the owner has the sum of one process, bit for bit: there, too, a backward begins at the last use.

                       products add in place, each at once     autograd adds the rest up, and brings it last
      the last stage   S = its products                        A = its own
      one before       S + its products                        A + its own     (A is a root of its backward)
      the owner        place = S + its products                place + (A + its own)

    Which ranks take part is the same in each micro-batch; a stage has one place for each weight, so a rank
    must not have several stages that use one.
    """

    def __init__(self, ties: Sequence[Tie], copies: Copies, transport: Transport) -> None:
        """Take what several stages use, and where gradients go here."""
        self._copies, self._transport = copies, transport
        self._sources: dict[int, list[torch.Tensor]] = {}
        """By the rank of the next stage that uses them."""
        self._targets: dict[int, list[torch.Tensor]] = {}
        """By the rank of the one before."""
        for tie in ties:
            users = [tie.owner, *tie.others]
            if transport.comm.rank not in users or not tie.tensor.requires_grad:
                continue
            at = users.index(transport.comm.rank)
            for other in users[at + 1 : at + 2]:
                self._sources.setdefault(other, []).append(tie.tensor)
            for other in users[at - 1 : at] if at else []:
                self._targets.setdefault(other, []).append(tie.tensor)
        self._micro_batch = -1
        self._untaken, self._unsent = list[int](), list[int]()
        """Ranks, for that micro-batch."""

    def begin(self) -> None:
        """Start a step. Local."""
        self._micro_batch = -1

    def _turn_to(self, v: int) -> None:
        if v != self._micro_batch:
            self._micro_batch, self._untaken, self._unsent = v, [*self._sources], [*self._targets]

    def receive(self, v: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Take the later stages' gradients before this one's backward; give the roots that it is to have too.

        Waits for them. Raises PeerFailedError where a stage has failed; all messages have been taken then.
        """
        self._turn_to(v)
        roots, failures = [], list[Exception]()
        if self._untaken:
            self._transport.watch.doing(f"waits for gradients of what several stages use, micro-batch {v}")
        while self._untaken:
            source = self._untaken.pop()
            try:
                found, _ = self._transport.receive(source, RELAYED, v)
            except Exception as error:
                failures.append(error)
                continue
            roots += self._taken(source, found)
        raise_first(failures)
        return roots

    @torch.no_grad()
    def _taken(self, source: int, found: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        for tensor, (added, _) in zip(self._sources[source], found, strict=True):
            at = self._copies.place(tensor)
            if added is not None and at is not None:
                at[0].copy_(added)
                self._copies.filled(tensor)
        return [(t, brought) for t, (_, brought) in zip(self._sources[source], found) if brought is not None]

    def send(self, v: int) -> None:
        """Start to send what this stage's backward, too, has joined. Local."""
        self._turn_to(v)
        packed = []
        for target in self._unsent:
            both = [(self._copies.taken(t), self._copies.brought(t)) for t in self._targets[target]]
            packed.append((target, RELAYED, pack(target, v, both, 0)))
        self._transport.start(*packed)
        self._unsent.clear()

    def fail(self, v: int) -> None:
        """Do in name only what is left of that: take what comes, send word of the failure. Waits."""
        self._turn_to(v)
        while self._untaken:
            self._transport.drop(self._untaken.pop(), RELAYED, v)
        while self._unsent:
            self._transport.send_failure(self._unsent.pop(), RELAYED, v)
