"""A model cut into stages: what each runs, what it needs from earlier ones, what it gives to later ones.

Two ways, chosen by the model:

      layers   nn.Sequential, or a module with `layers()`: each layer takes what the one before gave
      graph    any module that torch.export can write down as operators in the program's order

      graph    conv · bn · relu · conv · bn · add · pool · linear         a list of operators
      cut      └──── stage 0 ────┘└──────── stage 1 ──────────┘           contiguous, by cost
      values   relu's result crosses to stage 1; a skip goes straight from its producer to its consumer

A cut may go anywhere but between a tensor and an operator that changes it in place. Where a
parameter is used tells its stage; one that several use belongs to the first, the others keep copies.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree

from hpctrain.draws import Draws, draws, seed
from hpctrain.errors import ConfigError
from hpctrain.pipeline.balance import partition

INPUT = -1
"""The stage of the model's inputs: whoever needs one reads it from the data."""
Env = dict[str, Any]


@dataclass
class Part:
    """What one stage does in one forward."""

    needs: dict[int, list[str]] = field(default_factory=dict)
    """By earlier stage (or INPUT): the values that come from there."""
    gives: dict[int, list[str]] = field(default_factory=dict)
    """By later stage: the values that go there."""
    awaits: dict[int, list[str]] = field(default_factory=dict)
    """By later stage: the values whose gradients come from there."""
    returns: dict[int, list[str]] = field(default_factory=dict)
    """By earlier stage: the values whose gradients go there.

    A value that several stages use gets its gradient as in one process, the latest use first: from
    stage to stage, each adding its own, and from the first of them to the producer.
    """
    run: Callable[[Env, int, int], tuple[Env, int]] = lambda env, stream, start: (env, start)
    """(values, stream, draws so far) to (values to give; the model's output under "output"), draws so far."""


class Cut(Protocol):
    """A model in stages."""

    stages: int

    def tensors(self, stage: int) -> list[str]:
        """Names of the parameters and buffers that a stage uses."""

    def part(self, stage: int, samples: int, training: bool) -> Part:
        """What a stage does with a micro-batch of so many samples."""

    def links(self) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        """By stage: the later stages that it gives values to in training, and that gradients come from."""


def cut(
    module: nn.Module, inputs: dict[str, torch.Tensor], named: bool, stages: int, cuts: list[str], device: str
) -> Cut:
    """Cut a model into stages; `inputs` is one batch, for its shapes and dtypes. Local, deterministic.

    `cuts` names the modules that begin a stage, stages - 1 of them; without it costs decide.
    Raises ConfigError where the model can't be cut, saying what stands in the way.
    """
    if cuts and len(cuts) != stages - 1:
        raise ConfigError(
            f"parallel.cuts names {len(cuts)} cuts, parallel.stages = {stages} needs {stages - 1}"
        )
    found = layers_of(module)
    if found is not None and len(inputs) == 1:
        return Layers(found, stages, cuts)
    return Graph(module, inputs, named, stages, cuts, device)


def layers_of(module: nn.Module) -> list[tuple[str, nn.Module]] | None:
    """Give a model's layers by name where each takes what the one before gave; None where unknown."""
    names = {id(m): name for name, m in module.named_modules()}
    layers: Any = getattr(module, "layers", None)
    if callable(layers) and not isinstance(layers, nn.Module):
        given = list(layers())
        if not all(isinstance(layer, nn.Module) and id(layer) in names for layer in given):
            raise ConfigError(f"{type(module).__name__}.layers() must give submodules of the model, in order")
        return [(names[id(layer)], layer) for layer in given]
    if type(module) is not nn.Sequential:
        return None
    return list(_flat(module, ""))


def _flat(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module._modules.items():  # named_children leaves out what stands twice
        assert child is not None
        if type(child) is nn.Sequential and not child._forward_hooks and not child._forward_pre_hooks:
            yield from _flat(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def begins(cuts: list[str], owners: list[str], what: str) -> list[tuple[int, int]]:
    """Find where named modules begin, in order; gives each stage's (start, stop). Pure.

    >>> begins(["b"], ["a", "a", "b.0", "c"], "layers")
    [(0, 2), (2, 4)]
    """
    edges = [0]
    for name in cuts:
        at = next((i for i, o in enumerate(owners) if o == name or o.startswith(name + ".")), -1)
        if at <= edges[-1]:
            known = list(dict.fromkeys(owners))
            why = "is not among" if at < 0 else "does not come behind the cut before it among"
            raise ConfigError(f"parallel.cuts: {name} {why} the {what} {', '.join(known[:12])}")
        edges.append(at)
    return list(zip(edges, [*edges[1:], len(owners)]))


class Layers:
    """Layers in a row; a stage runs some of them."""

    def __init__(self, layers: list[tuple[str, nn.Module]], stages: int, cuts: list[str]) -> None:
        """Cut them by the numbers of their parameters, or where `cuts` says."""
        self.layers, self.stages = layers, stages
        if cuts:
            self.ranges = begins(cuts, [name for name, _ in layers], "layers")
        else:
            self.ranges = partition([1.0 + sum(p.numel() for p in m.parameters()) for _, m in layers], stages)

    def tensors(self, stage: int) -> list[str]:
        """Parameters and buffers of its layers."""
        start, stop = self.ranges[stage]
        found = []
        for name, layer in self.layers[start:stop]:
            inner = [
                *layer.named_parameters(remove_duplicate=False),
                *layer.named_buffers(remove_duplicate=False),
            ]
            found += [f"{name}.{own}" for own, _ in inner]
        return found

    def links(self) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        """Each to the next, and back."""
        links = {s: [s + 1] if s + 1 < self.stages else [] for s in range(self.stages)}
        return links, links

    def part(self, stage: int, samples: int, training: bool) -> Part:
        """Run the stage's layers one behind the other."""
        start, stop = self.ranges[stage]
        layers = [layer for _, layer in self.layers[start:stop]]
        changes = any(getattr(m, "inplace", False) for layer in layers for m in layer.modules())
        last = stage == self.stages - 1

        def run(env: Env, stream: int, begin: int) -> tuple[Env, int]:
            value = next(iter(env.values())) if stage == 0 else env[f"value {stage - 1}"]
            if changes and stage:
                value = _pytree.tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, value)
            with Draws(stream, begin) as counting:
                for layer in layers:
                    value = layer(value)
            return {"output" if last else f"value {stage}": value}, counting.count

        before = {stage - 1: [f"value {stage - 1}"]} if stage else {}
        behind = {} if last else {stage + 1: [f"value {stage}"]}
        return Part(before, behind, behind, before, run)


@dataclass
class Traced:
    """A forward as operators, for one number of samples."""

    nodes: list[fx.Node]
    inputs: dict[str, str]
    """By placeholder: the model's input."""
    held: dict[str, str]
    """By placeholder: the parameter or buffer."""
    constants: dict[str, Any]
    outputs: list[Any]
    """Names of values, or plain constants."""
    tree: Any
    stage: dict[str, int] = field(default_factory=dict)


class Graph:
    """A model as operators; a stage runs some of them, with the model's own parameters."""

    def __init__(
        self,
        module: nn.Module,
        inputs: dict[str, torch.Tensor],
        named: bool,
        stages: int,
        cuts: list[str],
        device: str,
    ) -> None:
        """Write the forward down for this batch and cut it."""
        self.stages, self.named, self.device = stages, named, device
        self.module = module
        self.like = {name: (tuple(x.shape[1:]), x.dtype) for name, x in inputs.items()}
        self.fake = FakeTensorMode()
        self.skeleton = skeleton(module, self.fake)
        first = dict[int, str]()
        everything = [
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ]
        self.real = dict(everything)
        self.first = {name: first.setdefault(id(t), name) for name, t in everything}
        self._traced: dict[tuple[int, bool], Traced] = {}
        samples = self.samples = len(next(iter(inputs.values())))
        traced = self._trace(samples, training=True)
        self._place(traced, cuts)
        self.used: dict[int, set[str]] = {stage: set() for stage in range(stages)}
        for node in traced.nodes:
            names = {traced.held[a.name] for a in node.all_input_nodes if a.name in traced.held}
            self.used[traced.stage[node.name]] |= names | self._counter(node)
        self._traced[samples, True] = traced

    def _counter(self, node: fx.Node) -> set[str]:
        """Give the counter of a BatchNorm's calls, which the module itself moves on."""
        name = f"{path_of(node)}.num_batches_tracked"
        return {name} & set(self.real) if node.target is torch.ops.aten.batch_norm.default else set()

    def tensors(self, stage: int) -> list[str]:
        """Parameters and buffers that its operators use."""
        return sorted(self.used[stage])

    def links(self) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        """Who gives values to whom, and waits for whose gradients."""
        parts = {s: self.part(s, self.samples, True) for s in range(self.stages)}
        return {s: sorted(p.gives) for s, p in parts.items()}, {s: sorted(p.awaits) for s, p in parts.items()}

    def adopt(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take the tensors of this rank's stage, by name, in the place of the whole model's. Local."""
        self.real = dict(tensors)

    # -- writing down ------------------------------------------------------------------------

    def _trace(self, samples: int, training: bool) -> Traced:
        """Write the forward down with torch.export, on tensors without memory."""
        self.module.train(training)  # a user's train() may keep parts in eval mode
        for name, m in self.module.named_modules():
            self.skeleton.get_submodule(name).training = m.training
        with self.fake:
            fakes = {
                name: torch.zeros((samples, *shape), dtype=dtype)
                for name, (shape, dtype) in self.like.items()
            }
        arguments = ((), fakes) if self.named else (tuple(fakes.values()), {})
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what can't be written down is an error below
                program = torch.export.export(self.skeleton, *arguments, strict=False)
        except Exception as error:
            line = next((text for text in str(error).splitlines() if text.strip()), type(error).__name__)
            raise ConfigError(
                f"parallel.stages = {self.stages}: torch.export can't write {type(self.skeleton).__name__} "
                f"down, so it can't be cut ({type(error).__name__}: {line.strip()}); make it an "
                f"nn.Sequential, or give it a method layers() that lists submodules which follow one another"
            ) from None
        signature = program.graph_signature
        held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        order = list(fakes) if not self.named else list(program.call_spec.in_spec.child(1).context)
        inputs = dict(zip(signature.user_inputs, order))
        constants = {
            name: program.constants[c] for name, c in signature.inputs_to_lifted_tensor_constants.items()
        }
        nodes, outputs = [], []
        for node in program.graph.nodes:
            if node.op == "call_function":
                if not self._counts_batches(node, held):
                    nodes.append(node)
            elif node.op == "get_attr":
                constants[node.name] = getattr(program.graph_module, str(node.target))
            elif node.op == "output":
                outputs = [a.name if isinstance(a, fx.Node) else Constant(a) for a in node.args[0]]
        return Traced(
            nodes,
            {str(k): v for k, v in inputs.items()},
            held,
            constants,
            outputs,
            program.call_spec.out_spec,
        )

    def _counts_batches(self, node: fx.Node, held: dict[str, str]) -> bool:
        """Whether a node is BatchNorm's own counting, which the module does itself."""
        return any(held.get(a.name, "").endswith("num_batches_tracked") for a in node.all_input_nodes)

    # -- cutting -----------------------------------------------------------------------------

    def _place(self, traced: Traced, cuts: list[str]) -> None:
        """Give every operator its stage."""
        nodes = traced.nodes
        at = {node.name: i for i, node in enumerate(nodes)}
        if cuts:
            ranges = begins(cuts, [path_of(node) for node in nodes], "modules")
            edges = [start for start, _ in ranges[1:]]
            wrong = sorted(set(edges) & forbidden(nodes, at))
            if wrong:
                raise ConfigError(
                    f"parallel.cuts: {cuts[edges.index(wrong[0])]} begins between a tensor and an operator "
                    f"that changes it in place ({nodes[wrong[0]].name}): cut elsewhere, or leave "
                    f"inplace = True out there"
                )
        else:
            bad = forbidden(nodes, at)
            starts = [
                0,
                *[i for i, node in enumerate(nodes) if i and i not in bad and self._heavy(node, traced)],
            ]
            if len(starts) < self.stages:  # fewer weights than stages: between any two operators then
                starts = [i for i in range(len(nodes)) if i not in bad]
            costs = [cost(node) for node in nodes]
            pieces = list(zip(starts, [*starts[1:], len(nodes)]))
            groups = partition([sum(costs[a:b]) for a, b in pieces], self.stages)
            edges = [pieces[start][0] for start, _ in groups[1:]]
        for i, node in enumerate(nodes):
            traced.stage[node.name] = sum(edge <= i for edge in edges)

    def _heavy(self, node: fx.Node, traced: Traced) -> bool:
        """Whether a stage may begin here: at an operator with a matrix of its own."""
        return any(
            self.real[traced.held[a.name]].ndim > 1 for a in node.all_input_nodes if a.name in traced.held
        )

    def _follow(self, traced: Traced) -> None:
        """Place the operators of another number of samples, or of eval mode: where their parameters are."""
        owner: dict[str, list[int]] = {}
        for stage, names in self.used.items():
            for name in names:
                owner.setdefault(self.first[name], []).append(stage)
        for node in traced.nodes:
            inputs = [traced.stage[a.name] for a in node.all_input_nodes if a.name in traced.stage]
            stage = max(inputs, default=0)
            for a in node.all_input_nodes:
                if a.name in traced.held:
                    homes = owner.get(self.first[traced.held[a.name]], [0])
                    later = [home for home in homes if home >= stage]
                    if not later:
                        raise ConfigError(
                            f"the model runs {traced.held[a.name]} in another order in eval mode or with "
                            f"another number of samples than in training, which stages can't follow"
                        )
                    stage = min(later)
            traced.stage[node.name] = stage
        for node in traced.nodes:  # what is changed in place is changed where it was made
            if changes(node) is not None:
                root = roots(traced.nodes)[node.name]
                if root in traced.stage and traced.stage[root] != traced.stage[node.name]:
                    raise ConfigError(
                        f"{node.name} changes in place what another stage made: leave inplace = True out"
                    )

    # -- running -----------------------------------------------------------------------------

    def part(self, stage: int, samples: int, training: bool) -> Part:
        """Run the stage's operators."""
        if (samples, training) not in self._traced:
            traced = self._trace(samples, training)
            self._follow(traced)
            self._traced[samples, training] = traced
        traced = self._traced[samples, training]
        last = self.stages - 1
        home = {**traced.stage, **dict.fromkeys(traced.inputs, INPUT)}
        wanted: dict[str, set[int]] = {}
        for node in traced.nodes:
            for a in node.all_input_nodes:
                if a.name in home:
                    wanted.setdefault(a.name, set()).add(traced.stage[node.name])
        for name in traced.outputs:
            if isinstance(name, str) and name in home:
                wanted.setdefault(name, set()).add(last)
        part = Part()
        for name, stages in wanted.items():
            if stage in stages and home[name] < stage:
                part.needs.setdefault(home[name], []).append(name)
            if home[name] == INPUT:
                continue
            chain = [home[name], *sorted(other for other in stages if other > home[name])]
            if stage not in chain:
                continue
            if home[name] == stage:
                for other in chain[1:]:
                    part.gives.setdefault(other, []).append(name)
            at = chain.index(stage)
            if at + 1 < len(chain):
                part.awaits.setdefault(chain[at + 1], []).append(name)
            if at:
                part.returns.setdefault(chain[at - 1], []).append(name)
        mine = [node for node in traced.nodes if traced.stage[node.name] == stage]
        numbers, count = {}, 0
        for node in traced.nodes:
            if draws(node.target, node.args, dict(node.kwargs)):
                numbers[node.name] = count
                count += 1
        part.run = Runner(self, traced, mine, numbers, stage == last)
        return part


@dataclass(frozen=True)
class Constant:
    """A plain value that the model gives out."""

    value: Any


@dataclass
class Runner:
    """Runs operators of one stage."""

    graph: Graph
    traced: Traced
    nodes: list[fx.Node]
    numbers: dict[str, int]
    last: bool

    def __post_init__(self) -> None:
        """Find after which operator each value is no longer asked for."""
        self.device = torch.device(self.graph.device)
        self.ends: dict[str, list[str]] = {}

    def __call__(self, given: Env, stream: int, start: int) -> tuple[Env, int]:
        """Run from what was given; draws are numbered over the whole forward."""
        traced, env = self.traced, dict(given)
        env.update({node: given[name] for node, name in traced.inputs.items() if name in given})

        def value(node: fx.Node) -> Any:
            if node.name in traced.held:
                return self.graph.real[traced.held[node.name]]
            return traced.constants[node.name] if node.name in traced.constants else env[node.name]

        for node in self.nodes:
            arguments, named = fx.node.map_arg((node.args, dict(node.kwargs)), value)
            if node.name in self.numbers:
                seed(stream, self.numbers[node.name])
            env[node.name] = self._call(node, arguments, named)
        if self.last:
            values = [o.value if isinstance(o, Constant) else self._output(o, env) for o in traced.outputs]
            env["output"] = _pytree.tree_unflatten(values, traced.tree)
        return env, start

    def _output(self, name: str, env: Env) -> Any:
        return self.graph.real[self.traced.held[name]] if name in self.traced.held else env[name]

    def _call(self, node: fx.Node, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Call an operator as the module would: through the functions that the gradient's mode watches."""
        target = node.target
        if target is torch.ops.aten.batch_norm.default:
            owner = self.graph.module.get_submodule(path_of(node))
            if isinstance(owner, _BatchNorm):
                return owner(arguments[0])
        hidden = "MultiheadAttention" in kind_of(
            node
        )  # its inner calls are hidden from modes in eager mode too
        if target is torch.ops.aten.linear.default and not hidden:
            return functional.linear(*arguments, **named)
        if target is torch.ops.aten.embedding.default and not hidden:
            weight, indices, *rest = arguments
            padding = rest[0] if rest and rest[0] >= 0 else None
            if not any(rest[1:]):
                return functional.embedding(indices, weight, padding)
        with torch._C.DisableTorchFunction():
            return target(*arguments, **named)  # type: ignore[operator]


def skeleton(module: nn.Module, fake: FakeTensorMode) -> nn.Module:
    """Copy a module without its memory."""
    memo: dict[int, Any] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        with fake:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        wanted = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if wanted else empty
    return copy.deepcopy(module, memo)


def path_of(node: fx.Node) -> str:
    """Give the path of the innermost module that an operator stands in."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]).split("@")[0] if stack else ""


def kind_of(node: fx.Node) -> str:
    """Give the class of the innermost module that an operator stands in."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][1]) if stack else ""


def changes(node: fx.Node) -> fx.Node | None:
    """Give the value that an operator changes in place, if any."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return None
    for argument, value in zip(schema.arguments, node.args):
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, fx.Node):
            return value
    return None


def roots(nodes: list[fx.Node]) -> dict[str, str]:
    """By value: the one whose memory it may show."""
    found: dict[str, str] = {}
    for node in nodes:
        schema = getattr(node.target, "_schema", None)
        aliases = schema is None or any(r.alias_info is not None for r in schema.returns)
        composite = schema is not None and schema.name.split("::")[-1] in (
            "reshape",
            "contiguous",
            "to",
            "flatten",
        )
        source = node.all_input_nodes[0].name if node.all_input_nodes and (aliases or composite) else None
        found[node.name] = found.get(source, source) if source is not None else node.name
    return found


def forbidden(nodes: list[fx.Node], at: dict[str, int]) -> set[int]:
    """Where no stage may begin: between a tensor and what changes it in place. Pure."""
    found: set[int] = set()
    root = roots(nodes)
    for i, node in enumerate(nodes):
        changed = changes(node)
        if changed is not None:
            begin = at.get(root.get(changed.name, changed.name), -1)
            found |= set(range(begin + 1, i + 1)) if begin >= 0 else set()
    return found


PER_NUMBER = 40.0
"""Multiplications and additions that a core does while it moves one number from and to memory."""
PASSES = {"dropout": 5.0, "batch_norm": 3.0, "group_norm": 3.0, "layer_norm": 3.0, "native_group_norm": 3.0}
"""How often an operator goes over its numbers, or what drawing them costs."""


def cost(node: fx.Node) -> float:
    """Estimate an operator's work in multiplications and additions, from the shapes alone. Pure.

    Not measured: a cut that differs from run to run would change the order in which the squares of a
    norm are added, and runs are to repeat bit for bit.
    """
    out = node.meta.get("val")
    size = float(out.numel()) if isinstance(out, torch.Tensor) else 1.0
    shapes = [
        a.meta["val"].shape for a in node.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor)
    ]
    moved = size + (float(shapes[0].numel()) if shapes else 0.0)
    name = getattr(node.target, "_opname", "")
    schema = getattr(node.target, "_schema", None)
    if schema is not None and changes(node) is None and any(r.alias_info is not None for r in schema.returns):
        return 1.0  # a view
    work = PER_NUMBER * moved * PASSES.get(name, 1.0)
    if name == "linear" or name.startswith("conv"):
        return work + 2.0 * size * float(shapes[1][1:].numel())
    if name in ("matmul", "mm", "bmm", "addmm", "baddbmm", "einsum"):
        return work + 2.0 * size * float(shapes[0][-1] if shapes and len(shapes[0]) else 1)
    if name == "scaled_dot_product_attention":
        return work + 4.0 * size * float(shapes[1][-2])
    return work
