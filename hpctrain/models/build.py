"""Build a model from its class path: which shapes reach the constructor, what forward gets.

Constructor: an argument that the configuration leaves out is filled from the data by its name,

      input_shape, output_shape      shape of one sample of the first input, target
      input_shapes, output_shapes    {name: shape} of all inputs, targets
      in_channels, out_channels      first dimension of input_shape, output_shape (1 if none)
      in_features, out_features      last dimension of them (1 if none)

forward: if every parameter without a default bears the name of an input, inputs go by name,
else by position in the order of `data.inputs`.
"""

import inspect
import random
import warnings
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from hpctrain import construct
from hpctrain.config import ClassPath
from hpctrain.errors import ConfigError, nearest
from hpctrain.models.deferred import Deferred

Shapes = dict[str, tuple[int, ...]]


def shape_arguments(inputs: Shapes, outputs: Shapes) -> dict[str, Any]:
    """Give what a constructor may take from the data, by argument name.

    >>> shape_arguments({"x": (3, 8, 8)}, {"y": ()})["in_channels"]
    3
    """
    arguments: dict[str, Any] = {}
    for side, short, shapes in (("input", "in", inputs), ("output", "out", outputs)):
        first = next(iter(shapes.values()))
        arguments[f"{side}_shape"] = first
        arguments[f"{side}_shapes"] = dict(shapes)
        arguments[f"{short}_channels"] = first[0] if first else 1
        arguments[f"{short}_features"] = first[-1] if first else 1
    return arguments


FILLED = tuple(shape_arguments({"": ()}, {"": ()}))
"""Names of the arguments that the data fill in."""


def complete(spec: ClassPath, inputs: Shapes, outputs: Shapes) -> ClassPath:
    """Check the arguments and fill in shapes; what comes back builds the model without data."""
    arguments = construct.check(spec, "model", **shape_arguments(inputs, outputs))
    return ClassPath(spec.class_path, {name: listed(value) for name, value in arguments.items()})


def listed(value: Any) -> Any:
    """Give tuples as lists, as they come back from TOML.

    >>> listed({"x": (1, 2)})
    {'x': [1, 2]}
    """
    if isinstance(value, dict):
        return {name: listed(item) for name, item in value.items()}
    return [listed(item) for item in value] if isinstance(value, (list, tuple)) else value


def tupled(value: Any) -> Any:
    """Give shapes as tuples, as torch has them."""
    if isinstance(value, dict):
        return {name: tuple(item) for name, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


def without_memory(spec: ClassPath, seed: int) -> tuple[nn.Module, Deferred | None, str]:
    """Build the module with large tensors as shapes, and what makes those that are wanted. Local.

    Their numbers are those of `build`. A constructor that can't be run so is run as ever; then
    there is nothing to be made, and the text says why.
    """
    deferred = Deferred()
    try:
        with deferred, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # by its copying
            module = build(spec, seed)
        deferred.complete(module)
        return module, deferred, ""
    except Exception as error:
        module = build(spec, seed)  # its own faults show again
        cause = error.__cause__ or error
        return module, None, f"{type(cause).__name__}: {cause}"


def build(spec: ClassPath, seed: int) -> nn.Module:
    """Build the module on the CPU; its weights depend on the seed alone. Local.

    A list of modules is what an nn.Sequential of them is. Raises ConfigError for what is no model.
    """
    states = torch.random.get_rng_state(), np.random.get_state(), random.getstate()
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # a constructor may draw from any of them, on each rank
    random.seed(seed)
    arguments = {n: tupled(v) if n in FILLED else v for n, v in spec.init_args.items()}
    try:
        module = construct.build(spec, "model", **arguments)
    finally:
        torch.random.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
    if type(module) in (list, tuple, nn.ModuleList) and all(isinstance(one, nn.Module) for one in module):
        module = nn.Sequential(*module)  # layers that follow one another
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"model.class_path = {spec.class_path!r} is no torch.nn.Module, nor a list of them that follow "
            f"one another: it gives a {type(module).__name__}"
        )
    for name, layer in module.named_modules():
        if isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params():  # type: ignore[misc]
            raise ConfigError(
                f"model.class_path = {spec.class_path!r}: {name or 'it'} is a {type(layer).__name__}, which "
                f"learns its sizes from the first batch; optimizer, stages and checkpoints need them before: "
                f"give them (a constructor may take them from the data, by names like in_features)"
            )
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ConfigError(f"model.class_path = {spec.class_path!r}: it has no parameter to train")
    return module


def by_name(module: nn.Module, names: list[str]) -> bool:
    """Tell whether forward gets its inputs by name; raises where it can't get them at all."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return False
    needed = [
        p.name
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.default is p.empty
    ]
    keyword = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if set(needed) <= set(names) and (anything or set(names) <= set(keyword)):
        return True
    most = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    unbounded = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if len(needed) > len(names) or (len(names) > most and not unbounded):
        raise ConfigError(
            f"{type(module).__name__}.forward takes {', '.join(p.name for p in parameters)}, "
            f"data.inputs give {', '.join(names)}: their number must agree"
        )
    elsewhere = [n for at, n in enumerate(names) if n in keyword and keyword.index(n) != at]
    if elsewhere:  # by position it would be taken for another
        missing = next((name for name in keyword if name not in names), "")
        raise ConfigError(
            f"{type(module).__name__}.forward takes {', '.join(keyword)}, data.inputs give "
            f"{', '.join(names)}: by position {elsewhere[0]} would be taken for another"
            f"{f'; {missing}: {nearest(missing, names)}' if missing else ''}"
        )
    return False


def call(module: nn.Module, inputs: dict[str, torch.Tensor], named: bool) -> Any:
    """Run forward by the rule above."""
    return module(**inputs) if named else module(*inputs.values())
