"""Bytes that tensors hold: what autograd keeps of a forward, and what lives while a body runs."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hpctrain.tensors import parts_of, storages, tensors_in


def bytes_kept(
    run: Callable[[], Any], weights: Iterable[torch.Tensor], inputs: Iterable[torch.Tensor]
) -> tuple[int, int, int]:
    """Count what autograd keeps of a forward, weights left out. Local.

    Gives bytes: all of them, those that were not among the inputs, and those of what it gave.
    """
    own = storages(weights)
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.update((at, size) for at, size in storages([tensor]).items() if at not in own)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        found = run()
    given = storages(inputs)  # until its end what was found has memory of its own
    gives = {id(leaf): leaf for leaf in tensors_in(found)}
    made = sum(size for at, size in kept.items() if at not in given)
    return sum(kept.values()), made, sum(part.nbytes for leaf in gives.values() for part in parts_of(leaf))


class Living(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that the body's operators make while they live."""

    def __init__(self) -> None:
        """Have seen none yet."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._seen = weakref.WeakKeyDictionary[torch.UntypedStorage, None]()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator; note the memory that was not there before."""
        before = set(storages_of((arguments, named)))
        found = function(*arguments, **(named or {}))
        for storage in storages_of(found):
            if storage not in self._seen and storage not in before:
                self._seen[storage] = None
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage.nbytes())
        return found

    def _gone(self, size: int) -> None:
        self.now -= size


def storages_of(tree: Any) -> Iterator[torch.UntypedStorage]:
    """Give the memory of a tree's tensors, where they have one: sparse ones do not."""
    for leaf in tensors_in(tree):
        with suppress(NotImplementedError):
            yield leaf.untyped_storage()
