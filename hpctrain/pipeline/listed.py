"""Whether the layers that a model lists (`layers()`) do what its forward does: stages run them alone.

Both run on copies without memory, in training and in evaluation, on a micro-batch and on a single sample.
What they compute is counted, in any order, views left out: operators, the numbers that they are given, the
shapes of what they give, and what gradients will go through. Operators that compute with weights are to come
in one order.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree

from hpctrain.draws import streams_kept
from hpctrain.errors import ConfigError
from hpctrain.hidden import submodule
from hpctrain.log import ALIKE, LOGGER
from hpctrain.modes import settings_kept
from hpctrain.pipeline.skeleton import skeleton
from hpctrain.pipeline.trace import ORDINARY
from hpctrain.pipeline.trial import trial
from hpctrain.tensors import Looking, nodes_behind, storage_of, tensors_in

SHOWN = {
    "Alias", "AsStrided", "Clone", "Expand", "Narrow", "Permute", "Reshape", "ReshapeAlias", "Select",
    "Slice", "Split", "SplitWithSizes", "Squeeze", "T", "ToCopy", "Transpose", "Unbind", "UnsafeView",
    "Unsqueeze", "View",
}  # fmt: skip
"""What only shows, or copies, another tensor."""


class Counting(Looking):
    """Counts what is computed."""

    def __init__(self, module: nn.Module) -> None:
        """Nothing yet; take whose weights are computed with."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights = {storage_of(tensor): name for name, tensor in module.named_parameters()}
        self.found = Counter[tuple[str, str, tuple[int, ...]]]()
        self.order: list[str] = []
        """Names of the weights, as they are computed with."""
        self.backward = Counter[str]()
        """What gradients will go through, by torch's names, and hooks on them."""
        self.again = False
        """Whether a part will compute again in its backward, so that this is not known."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator."""
        given = func(*args, **(kwargs or {}))
        if not getattr(func, "is_view", False) and func.namespace == "aten" and "view" not in str(func):
            leaves = _pytree.tree_leaves((args, kwargs))
            numbers = ", ".join(str(leaf) for leaf in leaves if type(leaf) in (bool, int, float))
            name = func.overloadpacket.__name__
            self.found.update((name, numbers, tuple(t.shape)) for t in tensors_in(given))
            names = (self._weights.get(storage_of(t)) for t in tensors_in(leaves))
            self.order += [f"{name} with {weight}" for weight in names if weight]
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

    def walked(names: Sequence[str] | None, training: bool) -> Any:
        with trial(module), streams_kept():  # both ways draw alike, from Python's and NumPy's, too
            return counted(module, names, value, training)

    with settings_kept():
        both = [[walked(way, t) for way in (None, names)] for t in (True, False)]
    for (forward, row), training in zip(both, (True, False)):
        if what := difference(forward, row):
            raise ConfigError(
                f"parallel.stages: {type(module).__name__} would be another model in stages, which run what "
                f"layers() lists: {what}{'' if training else ' (in evaluation)'}; let both do the same, or "
                f"leave layers() out and name cuts (parallel.cuts)"
            )


def difference(forward: Counting, row: Counting) -> str:
    """Say what a forward and a row of layers do not both compute; "" if there is nothing. Pure."""
    for more, less, what in (
        (forward.found, row.found, "its forward computes {}, which layers() leaves out"),
        (row.found, forward.found, "layers() computes {}, which its forward does not"),
    ):
        for operator, numbers, shape in more - less:
            given = f" with the numbers {numbers}" if numbers else ""
            return what.format(f"{operator} of shape {shape}{given}")
    for ours, its, what in (
        (forward.backward, row.backward, "gradients go through {} of its forward, which layers() leaves out"),
        (row.backward, forward.backward, "gradients go through {} of layers(), and not in its forward"),
    ):
        for name in ours - its if not (forward.again or row.again) else ():
            return what.format(name)
    pairs = (pair for pair in zip(forward.order, row.order) if pair[0] != pair[1])
    return next((f"its forward computes {a} where layers() computes {b}" for a, b in pairs), "")


def counted(module: nn.Module, names: Sequence[str] | None, value: torch.Tensor, training: bool) -> Counting:
    """Count what a module's forward computes, or its submodules of those names. Local."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)  # tables of its file
    twin = skeleton(module, fake).train(training)
    with fake:
        given: Any = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    counting = Counting(twin)
    hook = torch.Tensor.register_hook

    def hooked(tensor: torch.Tensor, *given: Any) -> Any:
        counting.backward["a hook on a tensor"] += 1
        return hook(tensor, *given)  # type: ignore[no-untyped-call]

    torch.Tensor.register_hook = hooked  # type: ignore[method-assign]
    try:
        with fake, counting, nullcontext() if training else torch.no_grad():
            for part in [twin] if names is None else [submodule(twin, name) for name in names]:
                given = part(given)
    finally:
        torch.Tensor.register_hook = hook  # type: ignore[method-assign]
    nodes = nodes_behind(tensors_in(given))
    through = [node.name().rstrip("0123456789").removesuffix("Backward") for node in nodes]
    counting.again = any(name.startswith("CheckpointFunction") for name in through)
    counting.backward.update(name for name in through if name not in SHOWN)
    return counting
