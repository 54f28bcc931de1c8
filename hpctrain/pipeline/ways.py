"""Where the values of calls go: from the stage that makes them to the next that uses them, and so on.

      made on 0, used on 1 and 3     0 → 1 → 3, gradients back the same way: added in the order of one process

Who uses a value may change it, so the next one gets it from there. One tensor may have several names: those
that are known for one (a tuple and its parts, what is changed in place, nn.Identity) go together. Names that
turn out to be one tensor, or to lie in one memory, may have parted: what would give other bits is refused.
"""

import operator
from typing import Any

import torch
from torch import fx, nn

from hpctrain.errors import ConfigError
from hpctrain.hidden import has_hooks, submodule
from hpctrain.pipeline.message import SHARES, lie_together
from hpctrain.pipeline.part import Env
from hpctrain.pipeline.stand import IN_PLACE
from hpctrain.tensors import tensors_in

VIEWS = ("T", "mT", "H", "mH", "real", "imag")
"""Attributes of a tensor that are tensors."""
PLAIN = ("shape", "ndim", "dtype", "device", "layout", "requires_grad")
"""Attributes of a tensor that have nothing of it."""


def ways_of(
    stages: dict[int, list[fx.Node]], inputs: list[fx.Node], outputs: list[fx.Node], root: nn.Module
) -> dict[str, list[int]]:
    """Give each value's way by its name: where it is made, then who uses it, in order. Local.

    `stages`: their calls; `inputs` come with stage 0, `outputs` leave with the last.
    """
    home = dict.fromkeys(inputs, 0)
    home |= {node: stage for stage, calls in stages.items() for node in calls}
    users: dict[fx.Node, set[int]] = {node: set() for node in home}
    for node in home.keys() & {*outputs}:
        users[node].add(max(stages))
    for node, at in home.items():
        for a in home.keys() & {*node.all_input_nodes}:
            users[a].add(at)
    first = dict[fx.Node, fx.Node]()
    together: dict[fx.Node, set[int]] = {}
    for node, own in users.items():
        same: Any = node.args[0] if gives_back(node, root) else None
        first[node] = first.get(same, node) if isinstance(same, fx.Node) else node
        together.setdefault(first[node], set()).update(own)
    ways = dict[str, list[int]]()
    for node, own in users.items():
        behind = sorted(at for at in together[first[node]] if home[node] < at <= max(own, default=0))
        if behind:
            ways[node.name] = [home[node], *behind]
    return ways


def parts_first(stages: dict[int, list[fx.Node]]) -> dict[int, list[fx.Node]]:
    """Let parts of a value (an attribute, a key's) be taken where it is made: they cross then. Pure.

    Not of one that crosses itself: who gets it whole may change it.
    """
    home = {node: stage for stage, calls in stages.items() for node in calls}
    whole: dict[fx.Node, int] = {}
    """The last stage that uses a value not by its parts alone."""
    for node, at in home.items():
        for a in node.all_input_nodes:
            if not (is_part(node) and node.args[0] is a):
                whole[a] = at
    for node in [*home]:
        of = node.args[0] if is_part(node) else None
        if isinstance(of, fx.Node) and of.op != "get_attr" and whole.get(of, 0) <= home.get(of, 0):
            home[node] = home.get(of, 0)
    return {at: [node for node in home if home[node] == at] for at in stages}


def is_part(node: fx.Node) -> bool:
    """Whether a call takes an attribute of a value, or what is under a key. Pure."""
    if len(node.args) != 2 or not isinstance(node.args[0], fx.Node):
        return False
    if node.target is getattr:
        return node.args[1] not in VIEWS
    return node.target is operator.getitem and isinstance(node.args[1], str)


def in_place(node: fx.Node) -> bool:
    """Whether a call changes what it gets, by its name. Pure."""
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    own = node.target is operator.setitem or (name in IN_PLACE and node.target is getattr(operator, name))
    return own or name.endswith("_") or bool(node.kwargs.get("inplace")) or "out" in node.kwargs


def gives_back(node: fx.Node, root: nn.Module) -> bool:
    """Whether a call is known to give back the first thing that it gets, or a part of it. Local."""
    if not node.args:
        return False
    if is_part(node):
        return node.args[1] not in PLAIN
    if node.target is operator.getitem and isinstance(node.args[1], int):
        return True
    return in_place(node) or (node.op == "call_module" and passes_on(submodule(root, str(node.target))))


def passes_on(module: nn.Module) -> bool:
    """Whether a module is known to give back what it gets, changed or not. Local."""
    if has_hooks(module):
        return False
    if type(module) is nn.Sequential:
        return all(map(passes_on, module))
    return type(module) is nn.Identity or (
        type(module).__module__.startswith("torch.nn.") and bool(getattr(module, "inplace", False))
    )


def note_shared(
    ways: dict[str, list[int]], stage: int, found: Env, taken: list[torch.Tensor], owner: nn.Module
) -> None:
    """Note on what leaves a stage that others lie in its memory, who don't go with it. Local.

    `taken` is what came, `owner` has the stage's weights and buffers. Raises ConfigError for one tensor under
    two names that part here, and for a view whose base was changed behind it: gradients would come back in
    another order than in one process.
    """
    goes = {name: ways[name][ways[name].index(stage) + 1] for name in found if name in ways}
    leaves = [
        (name, leaf) for name in goes for leaf in tensors_in(found[name]) if leaf.layout == torch.strided
    ]
    noted = [leaf for leaf in taken if getattr(leaf, SHARES, False)]
    maybe_held = any(leaf._base is not None or leaf.grad_fn is None for _, leaf in leaves)
    held = [*owner.parameters(), *owner.buffers()] if maybe_held else []
    own = {tensor.untyped_storage().data_ptr() for tensor in held}
    parted = len({*goes.values()}) > 1
    for name, leaf in leaves:
        others = [(other, one) for other, one in leaves if goes[other] > goes[name]] if parted else []
        for other, one in others:
            if one is leaf and leaf.requires_grad:
                raise ConfigError(
                    f"parallel.cuts: {name} and {other}, as the forward around the cuts calls them, are one "
                    f"tensor, which goes to stage {goes[name]} by the one name and to stage {goes[other]} by "
                    f"the other: gradients would add up in another order than in one process; let the module "
                    f"that gives what it got give x.view_as(x), or cut elsewhere"
                )
        if taken_anew(leaf) and any(one is not leaf and lie_together(leaf, one) for _, one in leaves):
            raise ConfigError(
                f"parallel.cuts: {name}, as the forward around the cuts calls it, is a view of what was "
                f"changed in place after it was taken, and later stages use both: gradients would add up in "
                f"another order than in one process; take it behind the change, or cut elsewhere"
            )
        beside = [one for other, one in leaves if goes[other] != goes[name]] if parted else []
        together = any(lie_together(leaf, one) for one in [*noted, *beside])
        if together or leaf.untyped_storage().data_ptr() in own:
            setattr(leaf, SHARES, True)


def taken_anew(tensor: torch.Tensor) -> bool:
    """Whether torch takes a view anew where it is used next, as its base has changed in place. Local."""
    return tensor._base is not None and type(tensor.grad_fn).__name__ == "AsStridedBackward0"
