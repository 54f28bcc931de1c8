"""Cuts a model into stages, in one of three ways, chosen by the model.

      layers   nn.Sequential, or a module with `layers()`: each layer takes what the one before gave
      graph    any module that torch.export can write down as operators in the program's order
      calls    the rest, as calls of its modules, between cuts that the user names

Where a parameter is used tells its stage; one that several use belongs to the first, the others
keep copies.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import nn

from hpctrain.errors import ConfigError
from hpctrain.log import ALIKE, LOGGER
from hpctrain.pipeline.calls import Calls
from hpctrain.pipeline.choice import Scales
from hpctrain.pipeline.graph import Graph
from hpctrain.pipeline.layers import Layers, in_a_row, layers_of
from hpctrain.pipeline.listed import refuse_others
from hpctrain.pipeline.part import Cut
from hpctrain.pipeline.skeleton import UnwritableError


def write(
    module: nn.Module,
    inputs: dict[str, torch.Tensor],
    named: bool,
    stages: int,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    cuts: Sequence[str] = (),
) -> Cut:
    """Say what a model can be cut between; `place` cuts it, where `cuts` says. Local.

    `inputs` is one micro-batch, for its shapes and dtypes; `around` gives what passes run under (autocast).
    Raises ConfigError where the model can't be cut, saying what stands in the way.
    """
    scripts = (name for name, inner in module.named_modules() if isinstance(inner, torch.jit.ScriptModule))
    if (script := next(scripts, None)) is not None:
        raise ConfigError(
            f"parallel.stages = {stages}: {f'module {script}' if script else 'the model'} is a script of "
            f"torch.jit, whose weights can't be taken from it, so a rank can't hold its own share only: give "
            f"the nn.Module that it was made of"
        )
    found = layers_of(module)
    if found is not None and len(inputs) == 1:
        value = next(iter(inputs.values()))
        if not in_a_row(module):
            with around():
                refuse_others(module, [name for name, _ in found], value)
        return Layers(found, value, stages)
    if found is not None and not in_a_row(module):
        LOGGER.warning(
            "%s.layers() is not used: its first layer would get one input, and the model has %s",
            *(type(module).__name__, ", ".join(inputs)),
            extra=ALIKE,
        )
    try:
        graph = Graph(module, inputs, named, stages, around)
    except UnwritableError:
        if not cuts:
            raise
        return Calls(module, inputs, named, stages, cuts, around)
    if cuts and graph.writer.later.changed:  # which operators can't say, and modules do
        with suppress(ConfigError):
            return Calls(module, inputs, named, stages, cuts, around)
    return graph


def cut(
    module: nn.Module,
    inputs: dict[str, torch.Tensor],
    named: bool,
    stages: int,
    cuts: list[str],
    scales: Scales | None = None,
) -> Cut:
    """Cut a model into stages, `write` and `place` in one.

    `cuts` names the modules that begin a stage, stages - 1 of them; without it costs decide: measured
    with `scales` (collective), else estimated (local, deterministic).
    """
    need(cuts, stages)
    found = write(module, inputs, named, stages, cuts=cuts)
    found.place(cuts, scales)
    return found


def need(cuts: list[str], stages: int) -> None:
    """Refuse cuts that do not make so many stages. Pure."""
    if cuts and len(cuts) != stages - 1:
        raise ConfigError(
            f"parallel.cuts names {len(cuts)} cuts, {stages} stages need {stages - 1} (interleaved ones are "
            f"parallel.stages times parallel.virtual_stages)"
        )
