"""Writes a model's forward down as operators, with torch.export, on tensors without memory."""

import linecache
import os
import traceback
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree

from hpctrain.draws import of_others, streams_kept, told_of_others
from hpctrain.errors import FEWER_MICRO_BATCHES, TOO_FEW, ConfigError
from hpctrain.gradient import CALLED
from hpctrain.hidden import has_hooks
from hpctrain.log import ALIKE, LOGGER
from hpctrain.modes import Replaced
from hpctrain.pipeline.aside import unmoved
from hpctrain.pipeline.exporting import (
    answered_no,
    causal_masks_known,
    distributions_unchecked,
    inference_without_gradients,
    lost_refused,
    marked,
    nested_refused,
    regions_kept,
)
from hpctrain.pipeline.holders import caches_of
from hpctrain.pipeline.later import Arguments, Later, cleared, seed_others
from hpctrain.pipeline.operators import draws_inside, is_written, leave_counting, path_of, settled
from hpctrain.pipeline.own_train import Modes
from hpctrain.pipeline.skeleton import OTHERWISE, UnwritableError, address_of, skeleton
from hpctrain.pipeline.trial import trial

Like = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""By name of the model's input: shape of a sample, dtype."""

LIBRARY = os.path.join(os.path.dirname(torch.__file__), "")

FOR_WANT_OF_MEMORY = ("FakeTensor", "tensor subclasses", "data pointer")
"""In what torch says where NumPy, or who asks where a tensor lies, gets one without memory."""

ORDINARY = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError)
"""What a model raises that is wrong in itself."""


@dataclass(frozen=True)
class Constant:
    """A plain value that the model gives out."""

    value: Any


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


class Writer:
    """Writes one model's forward down, for any number of samples, in training and eval mode."""

    def __init__(
        self,
        module: nn.Module,
        inputs: dict[str, torch.Tensor],
        named: bool,
        stages: int,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Take the module, one batch for its shapes, and whether forward gets its inputs by name.

        `around` gives what passes run under: autocast decides dtypes, which operators hold.
        """
        self.module, self.named, self.stages, self.around = module, named, stages, around
        self.like = {name: (tuple(x.shape[1:]), x.dtype) for name, x in inputs.items()}
        self.fake = FakeTensorMode()
        self._pristine = self.skeleton = skeleton(module, self.fake)
        self._looked = self._warned = self._told_of_masks = False
        self._caches = caches_of(module)
        self.modes = Modes(module, self._pristine, self.fake, stages, self._written)
        self.later = Later(module, self.fake, stages, self._caches, self._written)

    def write(self, samples: int, training: bool, like: Like) -> Traced:
        """Write the forward down with torch.export, on tensors without memory; the same on all ranks."""
        with streams_kept():
            seed_others()
            return self._write(samples, training, like)

    def _write(self, samples: int, training: bool, like: Like) -> Traced:
        with unmoved(self.module) if self.modes.own_train else nullcontext():
            return self._write_in(training, samples, like)

    def _write_in(self, training: bool, samples: int, like: Like) -> Traced:
        # what a forward leaves on it (a table that it makes once) is not there in the other mode
        self.skeleton = self.modes.twin(training)
        arguments = self._arguments(samples, like)
        others = of_others()
        with self.modes.noted(self.skeleton):
            program = self._exported(arguments, samples, like)
        self.modes.written(training, arguments, program)
        before = set(names_in(self._pristine))
        if made := [name for name in names_in(self.skeleton) if name not in before]:
            raise UnwritableError(
                f"parallel.stages = {self.stages}: the forward registers {made[0]}, which operators can't: "
                f"do that in the constructor (a table may be kept as a plain attribute); {OTHERWISE}"
            )
        told = told_of_others(others, "written down once, each stays the same number")
        if told and not self._looked:
            self.later.refuse_draws(arguments, program, lambda: self.modes.twin(training))
            LOGGER.warning("%s", told, extra=ALIKE)
        if not self._looked:
            self._looked = True
            self.modes.look(training, arguments, program)
            self.later.look(arguments, program)
        return self._read(program, list(like))

    def _arguments(self, samples: int, like: Like) -> Arguments:
        """Give inputs without memory, by place and by name. Local."""
        with self.fake:
            fakes = {
                name: torch.zeros((samples, *shape), dtype=dtype) for name, (shape, dtype) in like.items()
            }
        return ((), fakes) if self.named else (tuple(fakes.values()), {})

    def _exported(
        self, arguments: tuple[Any, dict[str, Any]], samples: int, like: Like
    ) -> torch.export.ExportedProgram:
        """Let torch write the forward down. Raises ConfigError saying what stands in the way.

        It is to be the forward that runs, so who asks whether it is exported hears no; where that can't be
        written down, the truth.
        """
        try:
            with answered_no() as asked:
                return self._written(arguments)
        except Exception as error:
            failure = error
        if asked:
            with suppress(Exception):
                program = self._written(arguments)
                if not self._warned:
                    LOGGER.warning(
                        "%s asks whether it is exported, and can't be written down as it runs else: stages "
                        "run what it does then, which may round otherwise",
                        asked[0],
                        extra=ALIKE,
                    )
                self._warned = True
                return program
        raise self._refusal(failure, arguments, samples, like) from None

    def _written(
        self, arguments: tuple[Any, dict[str, Any]], twin: nn.Module | None = None
    ) -> torch.export.ExportedProgram:
        twin = twin or self.skeleton
        with (
            cleared(self._caches),
            warnings.catch_warnings(),
            trial(self.module),
            lost_refused(twin),
            regions_kept(),
            distributions_unchecked(),
            inference_without_gradients(),
            causal_masks_known() as unknown,
            Replaced(dict.fromkeys(CALLED, marked)),
            self.around(),
            nested_refused(),
        ):
            warnings.simplefilter("ignore")  # what can't be written down is an error
            with fx.traceback.preserve_node_meta():  # what is marked
                program = torch.export.export(twin, *arguments, strict=False)
        if unknown and not self._told_of_masks:
            LOGGER.warning(
                "whether a mask of torch's transformer is causal can't be seen when the forward is written "
                "down, and stages add it as it is; one process looks, and rounds otherwise if it is: make it "
                "by nn.Transformer.generate_square_subsequent_mask in the forward, or give is_causal",
                extra=ALIKE,
            )
            self._told_of_masks = True
        return program

    def _refusal(
        self, error: Exception, arguments: tuple[Any, dict[str, Any]], samples: int, like: Like
    ) -> ConfigError:
        """Say what torch's error means, where it is and what to do. Local."""
        line = next((text for text in str(error).splitlines() if text.strip()), type(error).__name__)
        if TOO_FEW in line:
            return ConfigError(
                f"a micro-batch of {samples} samples is too small for the model's BatchNorm ({line}): "
                f"{FEWER_MICRO_BATCHES}"
            )
        cause = f"{where(error, self.skeleton)} ({type(error).__name__}: {line.strip()})"
        if self._fails_anyway(error, arguments):
            shapes = ", ".join(f"{name} {(samples, *shape)}" for name, (shape, _) in like.items())
            return ConfigError(
                f"the model's forward fails on a micro-batch of shape {shapes}, in stages or not{cause}"
            )
        lost = isinstance(error, NotImplementedError)  # a part of the backward, no branch
        instead = "" if lost else "write a branch on a tensor's numbers as torch.where, "
        if any(map(has_hooks, self.module.modules())) and not lost:
            instead += (
                "make hooks that are inner functions methods (they see the model, not the copy that is "
                "written down), "
            )
        if cause.startswith(f": ({type(self.skeleton).__name__})"):  # no cut can leave that whole
            instead += "or move this into a submodule; then "
        return UnwritableError(
            f"parallel.stages = {self.stages}: torch.export can't write {type(self.skeleton).__name__} "
            f"down, so it can't be cut{cause}; {instead}{OTHERWISE}"
        )

    def _read(self, program: torch.export.ExportedProgram, names: list[str]) -> Traced:
        """Take operators, inputs, weights and constants from what torch wrote down. Local.

        `names` of the inputs, in the forward's order. Raises ConfigError for what stages can't run.
        """
        signature = program.graph_signature
        if signature.inputs_to_lifted_custom_objs:
            raise UnwritableError(
                f"parallel.stages = {self.stages}: the forward uses an object that operators can't name "
                f"({', '.join(signature.inputs_to_lifted_custom_objs.values())}; a torch.Generator, say): "
                f"leave it out, {OTHERWISE}"
            )
        held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        order = list(program.call_spec.in_spec.child(1).context) if self.named else names
        inputs = dict(zip(signature.user_inputs, order))
        constants = {
            name: program.constants[c] for name, c in signature.inputs_to_lifted_tensor_constants.items()
        }
        nodes, outputs = [], []
        self._refuse_taken(constants)
        leave_counting(program.graph, held, self.module)
        for node in program.graph.nodes:
            if node.op == "call_function":
                if not is_written(node):
                    self._known_shape(node)
                    nodes.append(node)
            elif node.op == "get_attr":
                constants[node.name] = getattr(program.graph_module, str(node.target))
            elif node.op == "output":
                outputs = [a.name if isinstance(a, fx.Node) else Constant(a) for a in node.args[0]]
        nodes = settled(nodes)
        for node in nodes:
            self._sayable(node, constants)
        return Traced(
            nodes,
            {str(k): v for k, v in inputs.items()},
            held,
            constants,
            outputs,
            program.call_spec.out_spec,
        )

    def _refuse_taken(self, constants: dict[str, Any]) -> None:
        """Refuse weights and buffers that the forward has from elsewhere: they would stay the same. Local."""
        own = [*self.module.named_parameters(), *self.module.named_buffers()]
        names = {id(tensor): name for name, tensor in own}
        names |= {address_of(tensor): name for name, tensor in reversed(own) if address_of(tensor)}
        for constant in (c for c in constants.values() if isinstance(c, torch.Tensor)):
            if name := names.get(id(constant)) or names.get(address_of(constant)):
                raise UnwritableError(
                    f"parallel.stages = {self.stages}: the forward has {name} from a function that remembers "
                    f"the module (a lambda or an inner function in an attribute, functools.partial, a "
                    f"compiled method), not from the module it runs, and stages would not train it: make "
                    f"that a method or a module, or {OTHERWISE}"
                )

    def _sayable(self, node: fx.Node, constants: dict[str, Any]) -> None:
        """Refuse an operator that would do something else by itself than in its forward. Local."""
        if draws_inside(node, constants):
            raise UnwritableError(
                f"parallel.stages = {self.stages}: operator {node.name} of {path_of(node) or 'the model'} "
                f"draws random numbers in a branch, which would be others than in one process: draw before it"
            )
        apart = any(isinstance(constants.get(a.name), FakeTensor) for a in node.all_input_nodes)
        mapped = getattr(node.target, "__module__", "").startswith("torch._functorch")
        if not apart and not mapped:
            return
        what = (
            "torch.func or torch.vmap in the forward is more than operators can say"
            if mapped
            else "the forward takes a tensor behind torch's back (.data, torch.autograd.grad, or one that "
            "a list, a dictionary or another object keeps), and operators would not have its numbers; "
            ".detach() and, for buffers, in-place operators under torch.no_grad() can be written down"
        )
        raise UnwritableError(
            f"parallel.stages = {self.stages}: operator {node.name} of {path_of(node) or 'the model'}"
            f"{line_of(node)}: {what}; or {OTHERWISE}"
        )

    def _known_shape(self, node: fx.Node) -> None:
        """Refuse an operator that gives as many numbers as other numbers say. Local."""
        leaves = _pytree.tree_leaves(node.meta.get("val"))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        numbers: list[Any] = [size for tensor in tensors for size in tensor.shape]
        for tensor in tensors:
            if tensor.layout is torch.strided:
                numbers += [*tensor.stride(), tensor.storage_offset()]
        if not all(isinstance(number, int) for number in numbers):
            layer = f" of layer {path_of(node)}" if path_of(node) else ""
            raise UnwritableError(
                f"parallel.stages = {self.stages}: the shape of what operator {node.name}{layer}"
                f"{line_of(node)} gives, or where it lies, depends on a tensor's numbers, so the model can't "
                f"be cut: mask instead (torch.where), take rows by tensors of one dimension, or {OTHERWISE}"
            )

    def _fails_anyway(self, error: Exception, arguments: tuple[Any, dict[str, Any]]) -> bool:
        """Whether a forward that is not written down fails alike: not for what stages ask for. Local."""
        if type(error) not in ORDINARY:  # torch has types of its own for numbers that it does not know
            return False
        if any(map(has_hooks, self.module.modules())):  # which may look at the module, and not at this copy
            return False
        if any(word in str(error) for word in FOR_WANT_OF_MEMORY):
            return False
        try:
            with (
                cleared(self._caches),
                self.fake,
                torch.no_grad(),
                warnings.catch_warnings(),
                trial(self.module),
            ):
                warnings.simplefilter("ignore")
                self.skeleton(*arguments[0], **arguments[1])
        except Exception as other:
            return type(other) is type(error)
        return False


def names_in(module: nn.Module) -> list[str]:
    """Name a module's buffers, parameters and submodules. Local."""
    every = module.named_buffers(), module.named_parameters(), module.named_modules()
    return [name for named in every for name, _ in named]


def line_of(node: fx.Node) -> str:
    """Say which line of the user's an operator was written down from; empty if that is not known. Pure."""
    lines = str(node.meta.get("stack_trace") or "").strip().splitlines()
    return f", at {lines[-2].strip()}: `{lines[-1].strip()}`" if len(lines) > 1 else ""


def where(error: Exception, module: nn.Module) -> str:
    """Say at which layer of a module and line of the user's code a forward ended. Local."""
    names = {id(m): name for name, m in module.named_modules()}
    found = ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None  # self, by any name
        path = code.co_filename
        if id(owner) in names and not path.startswith(LIBRARY):
            layer = f"layer {names[id(owner)]} " if names[id(owner)] else ""
            text = linecache.getline(path, number).strip()
            found = f": {layer}({type(owner).__name__}), {os.path.basename(path)}:{number}: `{text}`"
    return found
