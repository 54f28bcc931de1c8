"""Whether the layers that a model lists (`layers()`) do what its forward does: stages run them alone.

Both run on copies without memory; what they compute (operators and the shapes of what those give) is counted,
in any order, views left out.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hpctrain.draws import streams_kept
from hpctrain.errors import ConfigError
from hpctrain.log import ALIKE, LOGGER
from hpctrain.pipeline.exporting import quiet
from hpctrain.pipeline.trace import skeleton
from hpctrain.tensors import Looking, tensors_in


class Counting(Looking):
    """Counts what is computed."""

    def __init__(self) -> None:
        """Nothing yet."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = Counter[tuple[str, tuple[int, ...]]]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator."""
        given = func(*args, **(kwargs or {}))
        if not getattr(func, "is_view", False) and func.namespace == "aten" and "view" not in str(func):
            self.found.update((func.overloadpacket.__name__, tuple(t.shape)) for t in tensors_in(given))
        return given


def refuse_others(module: nn.Module, names: Sequence[str], value: torch.Tensor) -> None:
    """Refuse layers that do something else than the forward on such a value. Local.

    What can't be run so is told of in a warning. Raises ConfigError saying what one of them leaves out.
    """
    if type(module).forward is nn.Module.forward:
        return
    try:
        with quiet(), streams_kept():
            forward, row = counted(module, None, value), counted(module, names, value)
    except Exception as error:
        line = next(iter(str(error).strip().splitlines()), "")
        LOGGER.warning(
            "stages run what %s.layers() lists, not its forward; whether both do the same can't be told, as "
            "the forward does not run on tensors without numbers (%s: %s): hpctrain verify compares them",
            *(type(module).__name__, type(error).__name__, line),
            extra=ALIKE,
        )
        return
    for more, less, what in (
        (forward, row, "its forward computes {}, which layers() leaves out"),
        (row, forward, "layers() computes {}, which its forward does not"),
    ):
        for operator, shape in more - less:
            raise ConfigError(
                f"parallel.stages: {type(module).__name__} would be another model in stages, which run what "
                f"layers() lists: {what.format(f'{operator} of shape {shape}')}; let both do the same, or "
                f"leave layers() out and name cuts (parallel.cuts)"
            )


def counted(module: nn.Module, names: Sequence[str] | None, value: torch.Tensor) -> Counter[Any]:
    """Count what a module's forward computes, or its submodules of those names, in training. Local."""
    fake = FakeTensorMode()
    twin = skeleton(module, fake).train()
    with fake:
        given: Any = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    with fake, Counting() as counting:
        for part in [twin] if names is None else [twin.get_submodule(name) for name in names]:
            given = part(given)
    found: Counter[Any] = counting.found
    return found
