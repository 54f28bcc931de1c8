"""Gradients that a layer asks for in its forward, as forces of an energy: of what another stage gave.

      stage 0    x, h = f(x)         stage 1    e = g(h, x),  torch.autograd.grad(e, x)

In one process that goes through h to x, too; on stage 1 h begins a graph of its own, so it would be another.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hpctrain.errors import ConfigError
from hpctrain.tensors import nodes_behind


@contextmanager
def derived_refused(stage: int, received: Iterable[torch.Tensor]) -> Iterator[None]:
    """Refuse gradients of what a stage received that other stages have a part of. Local.

    Raises ConfigError where the body asks for that of a received tensor, and what it is taken of hangs on
    another one, too, which may have been computed from it.
    """
    begun = {tensor.grad_fn for tensor in received if tensor.grad_fn is not None}
    if len(begun) < 2:
        yield
        return
    run = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

    def run_backward(outputs: Any, *others: Any, **named: Any) -> Any:
        inputs = others[3] if len(others) > 3 else ()
        asked = {getattr(tensor, "grad_fn", None) for tensor in inputs} & begun
        if asked and (len(asked) > 1 or (nodes_behind(outputs) & begun) - asked):
            raise ConfigError(
                f"a layer of stage {stage} takes a gradient (torch.autograd.grad) of what it got, by what "
                f"hangs on other tensors that it got, too: as far as those were computed from it on another "
                f"stage, that would be missing; set parallel.cuts so that one stage computes all between, or "
                f"put both into one module"
            )
        return run(outputs, *others, **named)

    torch.autograd._engine_run_backward = run_backward  # type: ignore[attr-defined, assignment]
    try:
        yield
    finally:
        torch.autograd._engine_run_backward = run  # type: ignore[attr-defined]
