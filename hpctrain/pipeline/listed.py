"""Whether the layers that a model lists (`layers()`) do what its forward does: stages run them alone.

Both run on copies without memory, in training and in evaluation, on a micro-batch and on a single sample.
What they compute, backward too, is counted, in any order, views left out: operators, the numbers that they
are given, the shapes of what they give. Those that compute with weights are to come in one order.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree

from hpctrain.draws import streams_kept
from hpctrain.errors import ConfigError
from hpctrain.log import ALIKE, LOGGER
from hpctrain.modes import settings_kept
from hpctrain.pipeline.exporting import quiet
from hpctrain.pipeline.skeleton import skeleton
from hpctrain.pipeline.trace import ORDINARY
from hpctrain.tensors import Looking, storage_of, tensors_in


class Counting(Looking):
    """Counts what is computed."""

    def __init__(self, module: nn.Module) -> None:
        """Nothing yet; take whose weights are computed with."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights = {storage_of(tensor): name for name, tensor in module.named_parameters()}
        self.found = Counter[tuple[str, str, tuple[int, ...]]]()
        self.order: list[str] = []
        """Names of the weights, as they are computed with."""
        self.backward = False
        self.failed: Exception | None = None
        """What has ended the backward, if something has."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator."""
        given = func(*args, **(kwargs or {}))
        if not getattr(func, "is_view", False) and func.namespace == "aten" and "view" not in str(func):
            leaves = _pytree.tree_leaves((args, kwargs))
            numbers = ", ".join(str(leaf) for leaf in leaves if type(leaf) in (bool, int, float))
            aside = " in the backward" if self.backward else " without gradients"
            name = func.overloadpacket.__name__ + ("" if torch.is_grad_enabled() else aside)
            self.found.update((name, numbers, tuple(t.shape)) for t in tensors_in(given))
            names = (self._weights.get(storage_of(t)) for t in tensors_in(leaves))
            self.order += [f"{name} with {weight}" for weight in names if weight and not self.backward]
        return given


def refuse_others(module: nn.Module, names: Sequence[str], value: torch.Tensor) -> None:
    """Refuse layers that do something else than the forward on such a value. Local.

    What can't be run so is told of in a warning. Raises ConfigError saying what one of them leaves out.
    """
    if type(module).forward is nn.Module.forward:
        return
    try:
        refuse_different(module, names, value)
    except ConfigError:
        raise
    except Exception as error:
        line = next(iter(str(error).strip().splitlines()), "")
        LOGGER.warning(
            "stages run what %s.layers() lists, not its forward; whether both do the same can't be told, as "
            "it does not run on tensors without numbers (%s: %s): hpctrain verify compares them",
            *(type(module).__name__, type(error).__name__, line),
            extra=ALIKE,
        )
        return
    with suppress(*ORDINARY):  # of one sample a BatchNorm has no statistics
        refuse_different(module, names, value[:1])


def refuse_different(module: nn.Module, names: Sequence[str], value: torch.Tensor) -> None:
    """Refuse what differs on such a value. Local. Raises whatever hinders the forward, too."""
    with quiet(), streams_kept(), settings_kept():
        both = [[counted(module, way, value, t) for way in (None, names)] for t in (True, False)]
    for (forward, row), training in zip(both, (True, False)):
        if what := difference(forward, row):
            raise ConfigError(
                f"parallel.stages: {type(module).__name__} would be another model in stages, which run what "
                f"layers() lists: {what}{'' if training else ' (in evaluation)'}; let both do the same, or "
                f"leave layers() out and name cuts (parallel.cuts)"
            )
    if failed := next((one.failed for pair in both for one in pair if one.failed), None):
        raise failed


def difference(forward: Counting, row: Counting) -> str:
    """Say what a forward and a row of layers do not both compute; "" if there is nothing. Pure."""
    for more, less, what in (
        (forward.found, row.found, "its forward computes {}, which layers() leaves out"),
        (row.found, forward.found, "layers() computes {}, which its forward does not"),
    ):
        for operator, numbers, shape in more - less:
            given = f" with the numbers {numbers}" if numbers else ""
            return what.format(f"{operator} of shape {shape}{given}")
    pairs = (pair for pair in zip(forward.order, row.order) if pair[0] != pair[1])
    return next((f"its forward computes {ours} where layers() computes {its}" for ours, its in pairs), "")


def counted(module: nn.Module, names: Sequence[str] | None, value: torch.Tensor, training: bool) -> Counting:
    """Count what a module's forward computes, or its submodules of those names. Local."""
    fake = FakeTensorMode()
    twin = skeleton(module, fake).train(training)
    with fake:
        given: Any = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    counting = Counting(twin)
    with fake, counting:
        for part in [twin] if names is None else [twin.get_submodule(name) for name in names]:
            given = part(given)
        found = [tensor for tensor in tensors_in(given) if tensor.requires_grad] if training else []
        counting.backward = True
        try:
            torch.autograd.backward(found, [torch.empty_like(tensor) for tensor in found])
        except Exception as error:
            counting.failed = error
    return counting
