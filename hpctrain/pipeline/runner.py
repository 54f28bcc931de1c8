"""Runs the operators of a stage, called as the module would call them.

Linear layers, convolutions and embeddings go through the functions that `gradient` watches, BatchNorm
through its module (whose calls `averaging` watches), everything else straight to torch: so stages have
the bits of the whole model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree

from hpctrain.draws import seed, stand
from hpctrain.hidden import submodule
from hpctrain.log import LOGGER
from hpctrain.pipeline.operators import BODIES, COUNTED, called, draws_of, path_of
from hpctrain.pipeline.part import Env, gave, input_of
from hpctrain.pipeline.trace import Constant, Traced
from hpctrain.tensors import shapes_of


@dataclass
class Runner:
    """Runs operators of one stage."""

    module: nn.Module
    real: Callable[[str], torch.Tensor]
    """Gives a parameter or buffer by name."""
    traced: Traced
    nodes: list[fx.Node]
    numbers: dict[str, int]
    """Of the first draw of each operator that draws, over the whole forward."""
    draws: int
    """How many there are."""
    last: bool
    gives: set[str]
    """Names of values for other stages."""
    told: set[str]
    """Of what the user has been told once."""

    def __post_init__(self) -> None:
        """Say behind which operator each value is wanted no more: there it goes, as in the model's own."""
        outputs = {name for name in self.traced.outputs if isinstance(name, str)} if self.last else set()
        ends: dict[str, fx.Node] = {}
        for node in self.nodes:
            ends |= dict.fromkeys([node.name, *(a.name for a in node.all_input_nodes)], node)
        kept = self.gives | outputs | self.traced.held.keys() | self.traced.constants.keys()
        self._looked = False
        self._gone: dict[fx.Node, list[str]] = {node: [] for node in self.nodes}
        for name, node in ends.items():
            if name not in kept:
                self._gone[node].append(name)

    def __call__(self, given: Env, stream: int, start: int) -> tuple[Env, int]:
        """Run from what was given; draws are numbered over the whole forward."""
        traced, env = self.traced, dict(given)
        for placeholder, name in traced.inputs.items():
            if input_of(name) in given:
                env[placeholder] = given[input_of(name)]

        def value(node: fx.Node) -> Any:
            return self._value(node.name, env)

        for node in self.nodes:
            arguments, named = fx.node.map_arg((node.args, dict(node.kwargs)), value)
            try:
                env[node.name] = self._call(node, arguments, named, stream, self.numbers.get(node.name))
            except Exception as error:
                error.add_note(f"in {place_of(node)}, given {shapes_of((arguments, named))}")
                raise
            gave(partial(place_of, node), env[node.name])
            if not self._looked and "dtypes" not in self.told and warn_of_other(node, env[node.name]):
                self.told.add("dtypes")
            for name in self._gone[node]:
                del env[name]
            del arguments, named
        self._looked = True
        if self.last:
            stand(stream, self.draws)  # the loss may draw
            values = [o.value if isinstance(o, Constant) else self._value(o, env) for o in traced.outputs]
            env["output"] = _pytree.tree_unflatten(values, traced.tree)
        return env, start

    def _value(self, name: str, env: Env) -> Any:
        if name in self.traced.held:
            return self.real(self.traced.held[name])
        return self.traced.constants[name] if name in self.traced.constants else env[name]

    def _call(
        self, node: fx.Node, arguments: tuple[Any, ...], named: dict[str, Any],
        stream: int, number: int | None,
    ) -> Any:  # fmt: skip
        """Call an operator as the module would, with draws from a number on. Local."""
        if node.target in BODIES:
            runs = [isinstance(one, fx.GraphModule) for one in arguments]
            own = (Inside(a, self, stream, number).run if r else a for a, r in zip(arguments, runs))
            return BODIES[node.target](*own)
        if number is not None:
            seed(stream, number)
        if node.target is torch.ops.aten.batch_norm.default:
            owner = submodule(self.module, path_of(node))
            if isinstance(owner, _BatchNorm):
                if as_torch(owner, *arguments[1:8]):
                    return normalise(owner, arguments[0])
                if COUNTED in node.meta and owner.num_batches_tracked is not None:
                    owner.num_batches_tracked.add_(1)
        return called(node, arguments, named)


class Inside(fx.Interpreter):
    """Runs the operators that another one holds, as those around it."""

    def __init__(self, body: fx.GraphModule, runner: Runner, stream: int, number: int | None) -> None:
        """Take them, who runs those around, the random stream and the number of their first draw."""
        super().__init__(body)
        self._runner, self._stream, self._number = runner, stream, number

    def run_node(self, n: fx.Node) -> Any:
        """Run one."""
        if n.op != "call_function":
            return super().run_node(n)
        arguments, named = self.fetch_args_kwargs_from_env(n)
        drawn = draws_of(n)
        found = self._runner._call(n, arguments, named, self._stream, self._number if drawn else None)
        if drawn and self._number is not None:
            self._number += drawn
        return found


def warn_of_other(node: fx.Node, value: Any) -> bool:
    """Say it if an operator gives another dtype than without memory: an LSTM under autocast does. Local."""
    pairs = zip(_pytree.tree_leaves(value), _pytree.tree_leaves(node.meta.get("val")))
    both = [
        (a.dtype, b.dtype) for a, b in pairs if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    ]
    wrong = [(a, b) for a, b in both if a != b]
    if wrong:
        LOGGER.warning(
            "%s gives %s, and was written down as %s: what asks for its dtype may round otherwise "
            "than in one process (hpctrain verify tells)",
            *(place_of(node), *(str(dtype).removeprefix("torch.") for dtype in wrong[0])),
        )
    return bool(wrong)


def place_of(node: fx.Node) -> str:
    """Say where an operator stands. Pure."""
    where = f"layer {path_of(node)}" if path_of(node) else "the model's forward"
    return f"{where}, operator {node.name}"


def as_torch(
    owner: _BatchNorm,
    weight: Any,
    bias: Any,
    mean: Any,
    variance: Any,
    training: bool,
    momentum: float,
    eps: float,
) -> bool:
    """Whether a BatchNorm's operator has what torch's own forward would give it. Local."""
    usual = owner.training or (owner.running_mean is None and owner.running_var is None)
    tensors = (weight, owner.weight), (bias, owner.bias)
    same = all(given is own for given, own in tensors) and training == usual and eps == owner.eps
    own_momentum = owner.momentum is None or momentum == owner.momentum or not training
    tracked = owner.running_mean if not owner.training or owner.track_running_stats else None
    return same and own_momentum and mean is tracked


def normalise(owner: _BatchNorm, x: torch.Tensor) -> torch.Tensor:
    """Call a BatchNorm's module for its normalisation alone: what a subclass adds is written down too."""
    own = type(owner).forward
    if own is _BatchNorm.forward or hasattr(owner, "meeting"):
        return owner(x)  # type: ignore[no-any-return]
    owner.forward = MethodType(_BatchNorm.forward, owner)  # type: ignore[method-assign]
    try:
        return owner(x)  # type: ignore[no-any-return]
    finally:
        del owner.forward
