"""Layers that follow one another, run as one where nobody can see a tensor between them.

What could see one (hooks, modes, autocast, a graph of gradients) gets the layers one by one: a row has their
bits, and is faster. `blocks.py` and `dense.py` are the kinds.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.modules import module as modules

from hpctrain.gradient import plain
from hpctrain.hidden import has_hooks
from hpctrain.modes import instead, watched
from hpctrain.pipeline.part import followed
from hpctrain.pipeline.profile import Work

Named = tuple[str, nn.Module]
Call = Callable[[str, Any, Any], Any]
"""Calls a layer, or what stands for it: by name, on a value."""


class Row:
    """Layers that may run as one. Local."""

    functions: ClassVar[Callable[[], tuple[Any, ...]]]
    """Gives the functions that the layers call, as they are now."""

    def __init__(self, layers: Sequence[Named]) -> None:
        """Take the layers by name."""
        self.layers = [*layers]
        self._barred = False
        """Whether a gradient of gradients was asked for: past a row its sums have another order."""

    @staticmethod
    def length(layers: Sequence[Named]) -> int:
        """Give how many of these layers, from the first, are a row of this kind; 0: none. Pure."""
        raise NotImplementedError

    @staticmethod
    def usual(layer: nn.Module) -> bool:
        """Whether a layer is one that such a row runs, as torch has it. Local."""
        raise NotImplementedError

    @property
    def weights(self) -> list[torch.Tensor]:
        """Weights and biases, in order."""
        every = (t for _, layer in self.layers for t in layer._parameters.values())
        return [t for t in every if t is not None]

    @property
    def chosen(self) -> bool:
        """Whether it has been run as one, or a trial said that it will be."""
        raise NotImplementedError

    def copies(self, given: int) -> int:
        """Give the bytes that it keeps beside what its layers keep, of what it gets. Pure."""
        return 0

    def bytes_of_trial(self, given: int, works: Sequence[Work]) -> float:
        """Give the most that a trial takes, by the bytes of what the row gets and its layers' work. Pure."""
        return 0.0

    def run(self, call: Call, value: Any) -> Any:
        """Run the layers; gives what the last one gave. Local."""
        raise NotImplementedError

    def one_by_one(self, call: Call, value: Any) -> Any:
        """Run the layers as they are. Local."""
        for what, layer in self.layers:
            value = call(what, layer, value)
        return value

    def watch(self, found: Any) -> None:
        """Look what comes back for what the layers gave, one by one. Local."""
        if isinstance(found, torch.Tensor) and found.requires_grad:
            found.register_hook(self._look)  # type: ignore[no-untyped-call]

    def _look(self, g: torch.Tensor) -> None:
        self._barred |= torch.is_grad_enabled()

    def unseen(self, value: torch.Tensor) -> bool:
        """Whether nobody sees a tensor inside when the row gets this one. Local."""
        if self._barred or any(has_hooks(layer) or self._altered(layer) for _, layer in self.layers):
            return False  # before a weight is asked for, which may be computed then
        if not plain(value, self.weights[0]) or watched():
            return False
        if followed() or modules._has_any_global_hook() or torch._C._len_torch_dispatch_stack():  # type: ignore[no-untyped-call]
            return False
        return not torch.is_anomaly_enabled() and all(map(torchs, type(self).functions()))

    def _altered(self, layer: nn.Module) -> bool:
        """Whether a layer has become another one than torch's. Local."""
        ways = {"forward", "_conv_forward"} & vars(layer).keys()
        return bool(ways or layer._compiled_call_impl) or not self.usual(layer)


def rows_of(layers: Sequence[Named], kinds: Sequence[type[Row]]) -> list[tuple[str, nn.Module | Row]]:
    """Put rows in the places of the layers that they are made of. Pure."""
    found, at = list[tuple[str, nn.Module | Row]](), 0
    while at < len(layers):
        length, kind = max(((kind.length(layers[at:]), kind) for kind in kinds), key=lambda one: one[0])
        own = layers[at : at + max(1, length)]
        found.append((f"{own[0][0]} to {own[-1][0]}", kind(own)) if len(own) > 1 else own[0])
        at += len(own)
    return found


def run_all(pieces: Sequence[tuple[str, nn.Module | Row]], call: Call, value: Any) -> Any:
    """Run layers and rows, one behind the other; gives what the last one gave. Local."""
    for what, one in pieces:
        value = one.run(call, value) if isinstance(one, Row) else call(what, one, value)
    return value


def by_layers(
    run: Callable[[list[Any]], torch.Tensor], inputs: Sequence[Any], unchanged: bool, g: torch.Tensor
) -> list[torch.Tensor | None]:
    """Give the gradients of what went into a row past it: to be differentiated, or several at once. Local.

    `run` gives what the layers give for such inputs. Raises RuntimeError where these are not `unchanged`.
    """
    if not unchanged:
        raise RuntimeError(
            "what a row of layers got, or a weight or bias of one, was changed in place before a "
            "gradient of gradients, or several at once, went through them: change a copy"
        )
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        own = [t if t is None else t.view_as(t) for t in inputs]
        found = run(own)
        wanted = [t for t in own if t is not None and t.requires_grad]
        gradients = iter(torch.autograd.grad(found, wanted, g, create_graph=again))
    return [None if t is None or not t.requires_grad else next(gradients) for t in own]


def batched(g: torch.Tensor) -> bool:
    """Whether a gradient stands for several at once. Local."""
    inside = torch._C._functorch
    return inside.is_legacy_batchedtensor(g) or inside.is_batchedtensor(g)


def torchs(function: Any) -> bool:
    """Whether a function is torch's own, and not what someone has put into its place. Local.

    >>> torchs(torch.nn.functional.relu), torchs(torch.relu), torchs(lambda x: x)
    (True, True, False)
    """
    room = getattr(function, "__globals__", {"__name__": "torch"})["__name__"]  # none where it is C++
    if room == instead.__module__:  # ours, which watches calls
        return torchs(function.__wrapped__)
    return str(room).split(".")[0] == "torch"
