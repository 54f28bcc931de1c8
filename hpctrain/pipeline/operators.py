"""What the operators of a written-down forward say of themselves: place, aliases, work; how one is called."""

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree

from hpctrain.draws import draws
from hpctrain.hidden import submodule
from hpctrain.pipeline.hanging import written_of
from hpctrain.tensors import storage_of, tensors_in

SEEN = {
    torch.ops.aten.linear.default: "linear",
    torch.ops.aten.conv1d.default: "conv1d",
    torch.ops.aten.conv2d.default: "conv2d",
    torch.ops.aten.conv3d.default: "conv3d",
}
"""By operator: the function of `torch.nn.functional` with the same arguments whose calls `gradient` takes."""


def with_gradients(enabled: bool, body: Any, *given: Any) -> Any:
    """Run what the model has under `torch.no_grad` or `enable_grad`. Local."""
    with torch.set_grad_enabled(enabled):
        return body(*given)


def with_autocast(device: str, dtype: Any, enabled: bool, cache: Any, body: Any, *given: Any) -> Any:
    """Run what the model has under an autocast of its own. Local."""
    with torch.autocast(device, dtype, enabled, cache):
        return body(*given)


ADDS = (torch.ops.aten.add_.Tensor, torch.ops.aten.add_.Scalar)
BODIES: dict[Any, Callable[..., Any]] = {
    torch.ops.higher_order.wrap_with_set_grad_enabled: with_gradients,
    torch.ops.higher_order.wrap_with_autocast: with_autocast,
}
"""Operators that hold others, which are run one by one, as those around them."""


def draws_of(node: fx.Node) -> int:
    """Count the random numbers that an operator takes, or those that it holds. Pure."""
    if node.target in BODIES:
        return sum(draws_of(n) for n in body_of(node)[0].graph.nodes if n.op == "call_function")
    return int(draws(node.target, node.args, dict(node.kwargs)))


def draws_inside(node: fx.Node, constants: Mapping[str, Any]) -> bool:
    """Whether an operator that torch runs by itself (`torch.cond`) holds some that draw. Pure."""
    if node.target in BODIES:
        return False
    left = [body for a in node.all_input_nodes if isinstance(body := constants.get(a.name), fx.GraphModule)]
    while left:
        body = left.pop()
        left += [inner for inner in body.modules() if isinstance(inner, fx.GraphModule) and inner is not body]
        if any(draws(n.target, n.args, dict(n.kwargs)) for n in body.graph.nodes if n.op == "call_function"):
            return True
    return False


def is_written(node: fx.Node) -> bool:
    """Whether an operator writes into a value what stands there already. Local.

    torch.export ends with such a copy for each buffer that a forward assigned.
    """
    if node.target is not torch.ops.aten.copy_.default or node.users:
        return False
    into, new = (a.meta.get("val") if isinstance(a, fx.Node) else None for a in node.args[:2])
    if not isinstance(into, torch.Tensor) or not isinstance(new, torch.Tensor):
        return False
    places = [(storage_of(t), t.storage_offset(), t.shape, t.stride(), t.dtype) for t in (into, new)]
    return places[0] == places[1] and bool(places[0][0])


def settled(nodes: list[fx.Node]) -> list[fx.Node]:
    """Order operators so that a buffer is written back as soon as nothing needs what it was. Local.

    torch.export writes back at the end, and no stage may begin between a use of a buffer and its change.
    """
    found, known = list(nodes), dict[fx.Node, tuple[set[int], set[int]]]()
    for node in nodes:
        into, new = node.args[:2] if node.target is torch.ops.aten.copy_.default else (None, None)
        if (
            not isinstance(into, fx.Node)
            or not isinstance(new, fx.Node)
            or into.op != "placeholder"
            or node.users
        ):
            continue
        old, made, last = {*memories(into)}, {*memories(new)}, -1
        for at, other in enumerate(found):
            if other not in known:
                used = {memory for a in other.all_input_nodes for memory in memories(a)}
                known[other] = used, {memory for target in changes(other) for memory in memories(target)}
            used, changed = known[other]
            if other is not node and (other is new or old & used or made & changed):
                last = at
        at = found.index(node)
        if last < at:
            found.insert(last + 1, found.pop(at))
    return found


TAKEN = "called in torch.nn.functional"
"""Mark of an operator whose call `gradient` would take in one process."""
MARKS = hasattr(fx.traceback, "annotate")
"""Whether this torch can mark operators; else all are held for such."""


def called(node: fx.Node, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Call an operator as the module would: through what `gradient` takes, where it would. Local."""
    target: Any = node.target
    if target in BODIES:
        return BODIES[target](*arguments)
    taken = not MARKS or TAKEN in node.meta.get("custom", {})
    if taken and target in SEEN:
        return getattr(functional, SEEN[target])(*arguments, **named)
    if taken and target is torch.ops.aten.embedding.default:
        weight, indices, *rest = arguments
        padding = rest[0] if rest and rest[0] >= 0 else None
        if not any(rest[1:]):
            return functional.embedding(indices, weight, padding)
    with torch._C.DisableTorchFunction():
        return target(*arguments, **named)


def path_of(node: fx.Node) -> str:
    """Give the path of the innermost module that an operator stands in."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]).split("@")[0] if stack else ""


def changes(node: fx.Node) -> list[fx.Node]:
    """Give the values that an operator changes in place, or operators that it holds do."""
    if node.target in BODIES:
        return changed_inside(node)
    if node.target is torch.ops.aten.batch_norm.default:  # which does not say so
        return [value for value in node.args[3:5] if isinstance(value, fx.Node) and node.args[5]]
    written = written_of(node.target, node.args, dict(node.kwargs))
    return [value for value in _pytree.tree_leaves(written) if isinstance(value, fx.Node)]


def changed_inside(node: fx.Node) -> list[fx.Node]:
    """Give what an operator gets that those which it holds change in place. Pure."""
    held, given = body_of(node)
    inner = [n for n in held.graph.nodes if n.op == "call_function"]
    root = roots(inner)
    changed = {root.get(value.name, value.name) for n in inner for value in changes(n)}
    return [value for name, value in given.items() if name in changed]


def body_of(node: fx.Node) -> tuple[fx.GraphModule, dict[str, fx.Node]]:
    """Give the operators that one of BODIES holds, and the values that they get, by their names there."""
    at, body = next((i, a) for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
    assert node.graph.owning_module is not None
    held = submodule(node.graph.owning_module, str(body.target))
    assert isinstance(held, fx.GraphModule)
    places = [n.name for n in held.graph.nodes if n.op == "placeholder"]
    given = zip(places, node.args[at + 1 :], strict=True)
    return held, {name: value for name, value in given if isinstance(value, fx.Node)}


def paths_inside(node: fx.Node) -> list[str]:
    """Give the paths of the modules whose operators one of BODIES holds. Pure."""
    inner = [n for n in body_of(node)[0].graph.nodes if n.op == "call_function"]
    return [path for n in inner for path in (paths_inside(n) if n.target in BODIES else [path_of(n)])]


COUNTED = "its module counts this call"
"""Mark of a BatchNorm's operator."""


def leave_counting(graph: fx.Graph, held: Mapping[str, str], module: nn.Module) -> None:
    """Take out where BatchNorms count their calls: their modules do when they are called. Local.

    `held`: by placeholder the name of the parameter or buffer.
    """
    for node in list(graph.nodes):
        if node.target in BODIES:
            body, given = body_of(node)
            leave_counting(body.graph, {n: held[a.name] for n, a in given.items() if a.name in held}, module)
            body.recompile()
            gives_what_it_got(node, body, given)
            continue
        path, count = path_of(node), node.args[0] if node.args else None
        owner = submodule(module, path) if node.target in ADDS else None
        if not isinstance(owner, _BatchNorm) or not isinstance(count, fx.Node) or node.args[1] != 1:
            continue
        name = held.get(count.name)
        if name is None or module.get_buffer(name) is not owner.num_batches_tracked:
            continue
        later = (n for n in iter_from(node) if n.target is torch.ops.aten.batch_norm.default)
        call = next((n for n in later if path_of(n) == path), None)
        if call is not None and COUNTED not in call.meta:
            call.meta[COUNTED] = True
            node.replace_all_uses_with(count)
            graph.erase_node(node)


def gives_what_it_got(node: fx.Node, body: fx.GraphModule, given: Mapping[str, fx.Node]) -> None:
    """Take what an operator gives of what it got, as it is, from where that comes. Local."""
    found = next(n for n in body.graph.nodes if n.op == "output").args[0]
    if not isinstance(found, (tuple, list)):
        return
    same = {at: given[n.name] for at, n in enumerate(found) if isinstance(n, fx.Node) and n.name in given}
    for user in [user for user in node.users if user.target is operator.getitem and user.args[1] in same]:
        user.replace_all_uses_with(same[user.args[1]])  # type: ignore[index]
        user.graph.erase_node(user)
    if same and isinstance(val := node.meta.get("val"), (tuple, list)):
        node.meta["val"] = tuple(None if at in same else one for at, one in enumerate(val))


def iter_from(node: fx.Node) -> Iterator[fx.Node]:
    """Give the operators behind one. Pure."""
    while node.next.op != "root":
        node = node.next
        yield node


def memories(node: fx.Node) -> list[int]:
    """Number the memory of a value's tensors, where they have any. Local."""
    return [at for tensor in tensors_in(node.meta.get("val")) if (at := storage_of(tensor))]


def roots(nodes: list[fx.Node]) -> dict[str, str]:
    """By value: the one whose memory it may show, as its operator says, or did when it was written down."""
    found: dict[str, str] = {}
    first: dict[int, str] = {}
    for node in nodes:
        one_of_several = node.target is operator.getitem
        for a in node.all_input_nodes if not one_of_several else ():
            for memory in memories(a):
                first.setdefault(memory, a.name)
        own = memories(node)
        shown = next((first[memory] for memory in own if memory in first), None)
        if shown is not None or (one_of_several and own):
            found[node.name] = node.name if shown is None else found.get(shown, shown)
            continue
        schema = getattr(node.target, "_schema", None)
        aliases = schema is None or any(r.alias_info is not None for r in schema.returns)
        composite = schema is not None and schema.name.split("::")[-1] in (
            "reshape",
            "contiguous",
            "to",
            "flatten",
        )
        silent = "dropout" in getattr(node.target, "_opname", "") and not draws_of(node)
        shows = aliases or composite or silent
        source = node.all_input_nodes[0].name if node.all_input_nodes and shows else None
        found[node.name] = found.get(source, source) if source is not None else node.name
    return found


def forbidden(nodes: list[fx.Node], at: dict[str, int]) -> set[int]:
    """Where no stage may begin: between a tensor and what changes it in place, or calls of one BatchNorm.

    What changes a weight (`max_norm` of an embedding) stays with all that uses it: others have copies.
    """
    found: set[int] = set()
    calls: dict[str, list[int]] = {}
    for i, node in enumerate(nodes):
        if node.target is torch.ops.aten.batch_norm.default:  # its running statistics have one place
            calls.setdefault(path_of(node), []).append(i)
    for places in calls.values():
        found |= set(range(places[0] + 1, places[-1] + 1))
    root = roots(nodes)
    for i, node in enumerate(nodes):
        for changed in changes(node):
            name = root.get(changed.name, changed.name)
            begin = at.get(name, -1)
            if begin >= 0:
                found |= set(range(begin + 1, i + 1))
                continue
            users = [
                j
                for j, n in enumerate(nodes)
                if any(root.get(a.name, a.name) == name for a in n.all_input_nodes)
            ]
            found |= set(range(min(users, default=i) + 1, max(users, default=i) + 1))
    return found


A_VIEW = 1.0
"""Work of what only shows another tensor's memory."""
PER_NUMBER = 40.0
"""Multiplications and additions that a core does while it moves one number from and to memory."""
PASSES = {"dropout": 5.0, "batch_norm": 3.0, "group_norm": 3.0, "layer_norm": 3.0, "native_group_norm": 3.0}
"""How often an operator goes over its numbers, or what drawing them costs."""


def cost(node: fx.Node) -> float:
    """Estimate an operator's work in multiplications and additions, from the shapes alone. Pure.

    The same in every run; `fit.py` takes measured times where they say clearly otherwise.
    """
    out = node.meta.get("val")
    size = float(out.numel()) if isinstance(out, torch.Tensor) else 1.0
    shapes = [
        a.meta["val"].shape for a in node.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor)
    ]
    moved = size + (float(shapes[0].numel()) if shapes else 0.0)
    name = getattr(node.target, "_opname", "")
    schema = getattr(node.target, "_schema", None)
    if schema is not None and not changes(node) and any(r.alias_info is not None for r in schema.returns):
        return A_VIEW
    work = PER_NUMBER * moved * PASSES.get(name, 1.0)
    if name == "linear" or name.startswith("conv"):
        return work + 2.0 * size * float(shapes[1][1:].numel())
    if name in ("matmul", "mm", "bmm", "addmm", "baddbmm", "einsum"):
        return work + 2.0 * size * float(shapes[0][-1] if shapes and len(shapes[0]) else 1)
    if name == "scaled_dot_product_attention":
        return work + 4.0 * size * float(shapes[min(1, len(shapes) - 1)][-2])
    return work
