"""Which buffers a forward overwrites before it reads them.

Such a buffer (the latest input, say) hangs on one micro-batch alone. What any other becomes hangs on the
micro-batches before, all of which one process goes through, but a replica only its own.
"""

from typing import Any

import torch

from hpctrain.tensors import Looking, storage_of, tensors_in

OVERWRITING = {
    torch.ops.aten.copy_.default,
    torch.ops.aten.fill_.Scalar,
    torch.ops.aten.fill_.Tensor,
    torch.ops.aten.zero_.default,
}


class Reads(Looking):
    """Sees every operator of a forward."""

    def __init__(self, buffers: dict[str, torch.Tensor]) -> None:
        """Look at these buffers, by name."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.buffers = buffers  # kept, or another tensor gets the storage of one that is replaced
        self.left = {storage_of(buffer): name for name, buffer in buffers.items()}
        """By storage: what was neither read nor overwritten so far."""
        self.left.pop(0, None)
        self.read, self.overwritten = set[str](), set[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator; a view reads nothing, and what overwrites a part only is no overwriting."""
        if self.left and not getattr(func, "is_view", False):  # torch.cond does not say
            target = args[0] if func in OVERWRITING else None
            for tensor in tensors_in((args[target is not None :], kwargs)):
                if name := self.left.pop(storage_of(tensor), None):
                    self.read.add(name)
            if target is not None and is_whole(target) and (name := self.left.pop(storage_of(target), None)):
                self.overwritten.add(name)
        return func(*args, **(kwargs or {}))

    def latest(self, now: dict[str, torch.Tensor]) -> set[str]:
        """Name those that were overwritten before they were read, or replaced by another tensor. Local."""
        old = {storage_of(buffer) for buffer in self.buffers.values()}
        replaced = {name for name, buffer in now.items() if storage_of(buffer) not in old}
        return self.overwritten | replaced


def is_whole(tensor: torch.Tensor) -> bool:
    """Whether a tensor shows all of its memory. Local."""
    return tensor.layout == torch.strided and tensor.nbytes >= tensor.untyped_storage().nbytes()
