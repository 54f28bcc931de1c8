"""Weight gradients that wait to be computed: behind their backward, or for those of other micro-batches.

In a pipeline what linear layers and convolutions compute for their weights may wait, so that the gradient
that another stage waits for leaves first. Products of few rows wait longer, for those of other micro-batches:

      layer by layer    place ← place + g₀ᵀ·x₀    place ← place + g₁ᵀ·x₁    place ← place + g₂ᵀ·x₂

so all but the first find the place in the caches, and the sum has the same order. They may also become one
product (`fast`): the place is passed over once for all of them, but the sum has another order.
"""

import sys
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import nn

from hpctrain.functions import Product, Work
from hpctrain.tensors import storages

MERGED_ROWS = 512
"""Rows of a product that is long enough: merging more gains nothing."""

WAITING_SHARE, TOGETHER = 0.25, 3
"""Of a weight's memory, what waits for its gradient may take as much; and how many products it must be, at
least: of two, one pass over the memory is saved, and other stages may wait for that (measured)."""


class Order(Protocol):
    """Who minds in which order gradients join."""

    def later(self, *parameters: torch.Tensor) -> bool:
        """Tell whether gradients may be computed after their backward; if so they are waited for."""

    def caught_up(self, parameter: torch.Tensor) -> None:
        """Note that no gradient of the parameter waits any more."""

    def taken_back(self, parameter: torch.Tensor) -> None:
        """The same within a backward, which may bring more of them."""


class Entry(NamedTuple):
    """Weight gradients of a micro-batch that wait to be computed."""

    micro_batch: int
    parameters: list[nn.Parameter]
    work: Work
    versions: tuple[int, int]
    """Changes in place of the work's tensors, which nobody may change while it waits."""
    tried: bool
    """Whether it is computed by now, and waits to see if somebody does."""

    @property
    def rows(self) -> int:
        """Rows of a product; of what is none, more than any."""
        return self.work.g.size(0) if isinstance(self.work, Product) else sys.maxsize


class WaitingGradients:
    """What waits, by weight; `weights_of` computes it, in the order of the backward passes."""

    def __init__(self, places: Order, fast: bool = False) -> None:
        """Take who minds the order; `fast`: products that wait may become one, in another order of sums."""
        self._places, self.fast = places, fast
        self._waiting: dict[int, list[Entry]] = {}
        """By the weight's id, in the order of the backward passes."""
        self._owed = Counter[int]()
        """How many gradients of a parameter wait, by its id: layers of several weights may share a bias."""
        self._steps = 0
        self._never_later: set[int] = set()
        """Weights whose gradients never wait: those of embeddings, where the order of the sum would be
        another, and of layers whose tensors were changed in place meanwhile."""
        self._at_once: set[int] = set()
        """Weights whose gradients wait only in the micro-batches that come `behind`."""
        self._behind: Container[int] = ()

    def _compute(self, parameters: list[nn.Parameter], work: Work, now: bool = False) -> None:
        """Compute a work into its places; `now`: within its backward."""
        raise NotImplementedError

    def at_once(self, parameters: Iterable[torch.Tensor]) -> None:
        """Let what these add to their gradients wait only in the last micro-batches, those `behind`. Local.

        For them a split backward is dear: there it is repaid, as the other stages wait for the last one.
        """
        self._at_once.update(map(id, parameters))

    def nothing_waits(self, behind: Container[int]) -> None:
        """Start a step: nothing waits. `behind`: micro-batches whose gradients wait in any case. Local."""
        self._behind = behind
        self._steps += 1
        self._waiting.clear()
        self._owed.clear()

    @property
    def waiting_bytes(self) -> int:
        """Memory that what waits for `weights_of` holds."""
        works = (entry.work for waiting in self._waiting.values() for entry in waiting)
        return sum(storages(tensor for work in works for tensor in (work.g, work.x)).values())

    @property
    def together_bytes(self) -> int:
        """Memory that products which wait now may hold at most, waiting for other micro-batches'."""
        waiting = (due[0].parameters[0] for due in self._waiting.values() if self._waits_on(due))
        return sum(int(WAITING_SHARE * weight.nbytes) for weight in waiting)

    @torch.no_grad()
    def weights_of(self, micro_batch: int, last: bool) -> None:
        """Compute the products that wait for a micro-batch or one before it; with `last` all. Local.

        Those of a weight wait for one another where they are short: one after the other they find its
        gradient in the caches. With `fast` they wait until they are long enough together, and become one.
        """
        for at, waiting in list(self._waiting.items()):
            due = waiting
            if not last and waiting[-1].micro_batch > micro_batch:
                due = [entry for entry in waiting if entry.micro_batch <= micro_batch]
            if not due or (not last and self._waits_on(due)):
                continue
            for one in self._compute_all(at, len(due)):
                self._places.caught_up(one)

    @torch.no_grad()
    def catch_up(self, parameter: torch.Tensor) -> None:
        """Compute what waits for a parameter, before anything else joins its gradient. Local."""
        for at, waiting in list(self._waiting.items()):
            if any(one is parameter for entry in waiting for one in entry.parameters):
                for one in self._compute_all(at, len(waiting)):
                    if one is parameter:
                        self._places.taken_back(one)
                    else:
                        self._places.caught_up(one)

    def _compute_all(self, at: int, count: int) -> list[nn.Parameter]:
        """Compute the first works that wait for a weight, by its id; give for what none waits any more."""
        due, rest = self._waiting[at][:count], self._waiting[at][count:]
        if rest:
            self._waiting[at] = rest
        else:
            del self._waiting[at]
        for entry in due:
            self._look(entry)
        due = [entry for entry in due if not entry.tried]
        works = [entry.work for entry in due if isinstance(entry.work, Product)]
        if self.fast and len(works) > 1 and all(gains_merged(p, due[0].parameters[0]) for p in works):
            merged = Product(torch.cat([p.g for p in works]), torch.cat([p.x for p in works]))
            self._compute(due[0].parameters, merged)
        else:
            for entry in due:
                self._compute(entry.parameters, entry.work)
        self._owed.subtract(id(one) for entry in due for one in entry.parameters)
        every = {id(one): one for entry in due for one in entry.parameters}
        return [one for at, one in every.items() if not self._owed[at]]

    def _look(self, entry: Entry) -> None:
        """See that nobody has changed what waited; a weight for which someone has never waits again. Local.

        Raises RuntimeError where it is not computed yet.
        """
        if changes_of(entry.work) == entry.versions:
            return
        self._never_later.add(id(entry.parameters[0]))
        if not entry.tried:
            raise RuntimeError(
                f"what a layer with a weight of shape {tuple(entry.parameters[0].shape)} was given, or the "
                f"gradient of what it gave, was changed in place behind its backward, as it was not in the "
                f"first step; in stages its weight gradient is computed later: change a copy"
            )

    def _waits_on(self, due: Sequence[Entry]) -> bool:
        """Whether products of a weight that are due rather wait for more of them. Local."""
        rows, weight = sum(entry.rows for entry in due), due[0].parameters[0]
        if self.fast and gains_merged(due[-1].work, weight):
            return rows < MERGED_ROWS
        return rows < rows_together(weight) and is_short(due[-1].work, weight)

    def may_wait(self, parameters: Iterable[torch.Tensor], micro_batch: int) -> bool:
        """Whether what parameters get from a micro-batch may wait, as far as it is known here. Local."""
        ids = [*map(id, parameters)]
        barred = not self._never_later.isdisjoint(ids) or (
            micro_batch not in self._behind and not self._at_once.isdisjoint(ids)
        )
        return micro_batch >= 0 and not barred

    def _wait(self, parameters: list[nn.Parameter], work: Work, micro_batch: int, whole: bool) -> bool:
        """Let what parameters get from a micro-batch wait, where it gains; else compute what waits. Local.

        `whole`: of a backward that is not split, where only what waits for other micro-batches gains.
        """
        waits = self.may_wait(parameters, micro_batch)
        if waits and whole:  # of one weight none goes past another
            waits = id(parameters[0]) in self._waiting or is_short(work, parameters[0])
        later = waits and self._places.later(*parameters)
        if not later and parameters[0] in self:
            self.catch_up(parameters[0])
        if later or (waits and self._steps == 1):
            own = work.alone()
            entry = Entry(micro_batch, parameters, own, changes_of(own), not later)
            self._waiting.setdefault(id(parameters[0]), []).append(entry)
            self._owed.update(id(one) for one in parameters if later)
            if whole and not self._waits_on(self._waiting[id(parameters[0])]):
                self.catch_up(parameters[0])  # else one of many uses in a backward held them all
        return later

    def __contains__(self, parameter: torch.Tensor) -> bool:
        """Whether something waits for a parameter's gradient. Local."""
        return self._owed[id(parameter)] > 0


def changes_of(work: Work) -> tuple[int, int]:
    """Count the changes in place of what a weight gradient is computed of. Local."""
    return work.g._version, work.x._version


def is_short(work: Work, weight: torch.Tensor) -> bool:
    """Whether what adds to a weight's gradient gains by waiting for that of other micro-batches. Pure.

    Not where it would hold much more memory than its own: that of a tensor of which it has a few rows.
    """
    if not isinstance(work, Product) or work.g.size(0) > few_rows(weight):
        return False
    return all(t.untyped_storage().nbytes() <= 2 * t.nbytes for t in work)


def few_rows(weight: torch.Tensor) -> float:
    """Give the rows up to which products gain by being computed together, one after the other. Pure."""
    return rows_together(weight) / TOGETHER


def gains_merged(work: Work, weight: torch.Tensor) -> bool:
    """Whether a weight's products gain by becoming one, which their rows are laid together for. Pure.

    A pass over the weight's memory is saved, a copy of the rows added: of 64 to 256 rows and weights from
    512 × 512 to 4096 × 1024 these were even where the rows took a quarter of the weight's memory.
    """
    return isinstance(work, Product) and work.g.size(0) <= rows_together(weight)


def rows_together(weight: torch.Tensor) -> float:
    """Give how many rows of products wait for a weight's gradient before they are computed. Pure.

    >>> rows_together(torch.empty(1024, 1024))
    128.0
    """
    return WAITING_SHARE * weight.numel() / max(1, sum(weight.shape))
