"""Writes a model's forward down as operators, with torch.export, on tensors without memory."""

import copy
import linecache
import os
import random
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import (
    AbstractContextManager,
    contextmanager,
    nullcontext,
    suppress,
)
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree

from hpctrain.draws import of_others, streams_kept, told_of_others
from hpctrain.errors import ConfigError
from hpctrain.gradient import CALLED
from hpctrain.hidden import has_hooks, notes_on
from hpctrain.log import ALIKE, LOGGER
from hpctrain.modes import Replaced
from hpctrain.pipeline.exporting import (
    answered_no,
    causal_masks_known,
    inference_without_gradients,
    marked,
    own_gradients_refused,
    quiet,
    regions_kept,
)
from hpctrain.pipeline.hanging import Hanging
from hpctrain.pipeline.holders import caches_of
from hpctrain.pipeline.operators import draws_inside, is_written, path_of, settled
from hpctrain.pipeline.state import changed_by, plain_values, without_memory
from hpctrain.tensors import tensors_in, with_tensors

Like = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""By name of the model's input: shape of a sample, dtype."""

LIBRARY = os.path.join(os.path.dirname(torch.__file__), "")

OTHERWISE = (
    "name by parallel.cuts the modules where stages are to begin (what has no cut inside runs as it is), "
    "make the model an nn.Sequential, or give it a method layers() that lists submodules which follow one "
    "another"
)
"""What to do about a forward that can't be written down."""

MOST_COMPARED = 64
"""Numbers of a constant that are looked at."""

SETTINGS = (bool, int, float, str)
"""Plain values of a module by which its forward may differ."""

NUMBERS = (int, float)

LATER = (1, 2, 3, 4, 5, 10, 100, 1_000_001)
"""Calls after which a forward is looked at again: what it does every so often, or only at first, shows."""

ORDINARY = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError)
"""What a model raises that is wrong in itself."""


class UnwritableError(ConfigError):
    """A forward that operators can't say; what stands in the way."""


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
        self._own_train = any(type(m).train is not nn.Module.train for m in module.modules())
        self._told_of_train = False
        self._caches = caches_of(module)
        self._settings: dict[bool, dict[str, Any]] = {}
        self.changed: list[str] = []
        """Plain attributes that the forward changes."""

    def write(self, samples: int, training: bool, like: Like) -> Traced:
        """Write the forward down with torch.export, on tensors without memory; the same on all ranks."""
        with streams_kept():
            seed_others()
            return self._write(samples, training, like)

    def _write(self, samples: int, training: bool, like: Like) -> Traced:
        self.module.train(training)  # a user's train() may keep parts in eval mode
        self.look_at_settings(training)
        # what a forward leaves on it (a table that it makes once) is not there in the other mode
        self.skeleton = skeleton(self._pristine, self.fake)
        for name, m in self.module.named_modules():
            twin = self.skeleton.get_submodule(name)
            own = vars(m).items() if self._own_train else [("training", m.training)]
            vars(twin).update((at, value) for at, value in own if type(value) in SETTINGS)
        with self.fake:
            fakes = {
                name: torch.zeros((samples, *shape), dtype=dtype) for name, (shape, dtype) in like.items()
            }
        arguments = ((), fakes) if self.named else (tuple(fakes.values()), {})
        others = of_others()
        program = self._exported(arguments, samples, like)
        before = set(names_in(self._pristine))
        if made := [name for name in names_in(self.skeleton) if name not in before]:
            raise UnwritableError(
                f"parallel.stages = {self.stages}: the forward registers {made[0]}, which operators can't: "
                f"do that in the constructor (a table may be kept as a plain attribute); {OTHERWISE}"
            )
        told = told_of_others(others, "written down once, each stays the same number")
        if told and not self._looked:
            LOGGER.warning("%s", told, extra=ALIKE)
        self._look_for_state(arguments, program)
        return self._read(program, list(fakes))

    def look_at_settings(self, training: bool) -> None:
        """Say once which plain values of the module are others than in this mode before. Local.

        A train() of the user's may change some each time; operators keep those that were written down.
        """
        if not self._own_train or self._told_of_train:
            return
        now = {at: value for at, value in plain_values(self.module).items() if isinstance(value, SETTINGS)}
        before = self._settings.setdefault(training, now)
        if others := [at for at, value in now.items() if at in before and before[at] != value]:
            self._told_of_train = True
            LOGGER.warning(
                "train(%s) of the model changes %s each time, and its forward is written down once: in "
                "stages that stays as it was (make the model an nn.Sequential, or give it a method layers())",
                *(training, ", ".join(others[:3])),
                extra=ALIKE,
            )

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
            self._cleared(),
            warnings.catch_warnings(),
            quiet(),
            own_gradients_refused(twin),
            regions_kept(),
            inference_without_gradients(),
            causal_masks_known() as unknown,
            Replaced(dict.fromkeys(CALLED, marked)),
            self.around(),
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
        if "more than 1 value per channel" in line:
            return ConfigError(
                f"a micro-batch of {samples} samples is too small for the model's BatchNorm ({line}): "
                f"set parallel.micro_batches lower; the last batch of an epoch may have few samples"
            )
        cause = f"{where(error, self.skeleton)} ({type(error).__name__}: {line.strip()})"
        if self._fails_anyway(error, arguments):
            shapes = ", ".join(f"{name} {(samples, *shape)}" for name, (shape, _) in like.items())
            return ConfigError(
                f"the model's forward fails on a micro-batch of shape {shapes}, in stages or not{cause}"
            )
        lost = isinstance(error, NotImplementedError)  # a part of the backward, no branch
        instead = "" if lost else "write a branch on a tensor's numbers as torch.where, "
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
        counters = {name for name, of in held.items() if of.endswith("num_batches_tracked")}
        for node in program.graph.nodes:
            if node.op == "call_function":
                if counters & {a.name for a in node.all_input_nodes}:
                    counters.add(node.name)  # BatchNorm's own counting, which its module does
                elif not is_written(node):
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
        names |= {memory_of(tensor): name for name, tensor in reversed(own) if memory_of(tensor)}
        for constant in (c for c in constants.values() if isinstance(c, torch.Tensor)):
            if name := names.get(id(constant)) or names.get(memory_of(constant)):
                raise UnwritableError(
                    f"parallel.stages = {self.stages}: the forward has {name} from a function that remembers "
                    f"the module (a lambda or an inner function in an attribute, functools.partial, a "
                    f"compiled method), not from the module it runs, and stages would not train it: make "
                    f"that a method or a module, or {OTHERWISE}"
                )

    def _look_for_state(
        self, arguments: tuple[Any, dict[str, Any]], program: torch.export.ExportedProgram
    ) -> None:
        """Find once which plain attributes a forward changes; torch.export puts them back. Local.

        Raises UnwritableError where it computes with them.
        """
        if self._looked:
            return
        self._looked = True
        twin, data = self._twin(), tensors_in(arguments)

        def forward() -> Any:
            seed_others()
            given, named = with_tensors(torch.clone, arguments)
            return twin(*given, **named)

        with self._cleared(), self.fake, torch.no_grad(), warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            self.changed, computes, other = changed_by(twin, forward, data)
        if computes:
            raise UnwritableError(
                f"parallel.stages = {self.stages}: the forward keeps {', '.join(computes[:3])} of one call "
                f"and computes by it in the next, but is written down once: make that a buffer which is "
                f"changed in place, or keep it in a submodule that runs as it is (between parallel.cuts, or "
                f"in a row); {OTHERWISE}"
            )
        for calls in LATER if self.changed else ():
            later = self._written_after(calls, arguments)
            if later and fingerprint(later) != fingerprint(program):
                raise UnwritableError(
                    f"parallel.stages = {self.stages}: the forward changes {', '.join(self.changed[:3])} "
                    f"and computes something else by it, but is written down once: count in a submodule "
                    f"that runs as it is (between parallel.cuts, or in a row), or in a buffer that is "
                    f"changed in place; {OTHERWISE}"
                )
        if other and self._written_in_turn(arguments):
            raise UnwritableError(
                f"parallel.stages = {self.stages}: the forward computes something else in each call, but is "
                f"written down once ({other}; it counts in an object or a global, takes the next of an "
                f"iterator, draws from a generator of its own, or asks the time): count in a submodule that "
                f"runs as it is (between parallel.cuts, or in a row), or in a buffer that is changed in "
                f"place; {OTHERWISE}"
            )

    @contextmanager
    def _cleared(self) -> Iterator[None]:
        """Let the user's caches (`functools.lru_cache`) keep no tensors without memory. Local."""
        try:
            yield
        finally:
            for cache in self._caches:
                cache.cache_clear()

    def _twin(self) -> nn.Module:
        """Give a copy to be called: what it keeps for later calls has no memory. Local."""
        twin = skeleton(self.module, self.fake)
        without_memory(twin, self.fake)
        return twin

    def _written_after(
        self, calls: int, arguments: tuple[Any, dict[str, Any]]
    ) -> torch.export.ExportedProgram | None:
        """Write the forward down as it is after so many calls; None where that can't be told. Local.

        Of more than one its numbers have changed as often by as much as in the first.
        """
        once, twin = self._twin(), skeleton(self.module, self.fake)
        try:
            with self._cleared(), self.fake, Hanging([]), torch.no_grad(), warnings.catch_warnings(), quiet():
                warnings.simplefilter("ignore")
                once(*arguments[0], **arguments[1])
            for at in self.changed:
                path, _, name = at.rpartition(".")
                old, new = (vars(m.get_submodule(path))[name] for m in (twin, once))
                leaves = _pytree.tree_leaves([old, [*new] if isinstance(new, (set, deque)) else new])
                if not all(type(leaf) in SETTINGS for leaf in leaves):  # tables that it keeps, say
                    return None
                counts = type(old) in NUMBERS and type(new) in NUMBERS
                setattr(twin.get_submodule(path), name, old + (new - old) * calls if counts else new)
            with answered_no():
                return self._written(arguments, twin)
        except Exception:
            return None

    def _written_in_turn(self, arguments: tuple[Any, dict[str, Any]]) -> bool:
        """Whether the forward is written down otherwise behind two calls than behind one. Local.

        What only a log of the user's computes is not written down, nor where a log has tensors in its way.
        """
        found = []
        for calls in (1, 2):
            twin = skeleton(self.module, self.fake)
            try:
                with self._cleared(), self.fake, Hanging([]), torch.no_grad(), quiet():
                    for _ in range(calls):
                        seed_others()
                        twin(*arguments[0], **arguments[1])
                seed_others()
                with answered_no():
                    found.append(fingerprint(self._written(arguments, twin)))
            except Exception:
                return False
        return found[0] != found[1]

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
            "another object keeps), and operators would not have its numbers; .detach() and, for buffers, "
            "in-place operators under torch.no_grad() can be written down"
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
        try:
            with self._cleared(), self.fake, torch.no_grad(), warnings.catch_warnings(), quiet():
                warnings.simplefilter("ignore")
                self.skeleton(*arguments[0], **arguments[1])
        except Exception as other:
            return type(other) is type(error)
        return False


def seed_others() -> None:
    """Let Python's and NumPy's global random numbers, by which a forward may branch, begin anew. Local."""
    random.seed(0)
    np.random.seed(0)


def names_in(module: nn.Module) -> list[str]:
    """Name a module's buffers, parameters and submodules. Local."""
    every = module.named_buffers(), module.named_parameters(), module.named_modules()
    return [name for named in every for name, _ in named]


def fingerprint(program: torch.export.ExportedProgram) -> list[str]:
    """Give what tells one forward from another: operators, what they are given, small constants. Pure.

    Of those that something hangs on: what the forward gives, or a tensor that is changed in place.
    """
    every = [*program.graph.nodes]
    left = [
        n
        for n in every
        if n.op == "output" or getattr(getattr(n.target, "_schema", None), "is_mutable", False)
    ]
    live = set[fx.Node]()
    while left:
        node = left.pop()
        if node not in live:
            live.add(node)
            left += node.all_input_nodes
    names = {node: f"%{at}" for at, node in enumerate(n for n in every if n in live)}
    lifted = program.graph_signature.inputs_to_lifted_tensor_constants
    found = []
    for node in names:
        given = fx.node.map_arg((node.args, dict(node.kwargs)), lambda one: names[one])
        constant = program.constants.get(lifted.get(node.name, ""))
        if constant is not None and memory_of(constant) and constant.numel() <= MOST_COMPARED:
            found.append(repr(constant))
        found.append(f"{node.op} {'' if node.op == 'placeholder' else node.target} {given}")
    return found


def memory_of(tensor: torch.Tensor) -> int:
    """Give where a tensor's memory begins; 0 where it has none. Local."""
    return 0 if isinstance(tensor, FakeTensor) or not tensor.numel() else tensor.untyped_storage().data_ptr()


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


def skeleton(module: nn.Module, fake: FakeTensorMode) -> nn.Module:
    """Copy a module without its memory."""
    memo: dict[int, Any] = {}
    tensors = [*module.parameters(), *module.buffers()]
    for tensor in tensors:
        with fake:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        wanted = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if wanted else empty
    noted = [leaf for t in tensors for leaf in _pytree.tree_leaves(notes_on(t))]
    for tensor in (leaf for leaf in noted if isinstance(leaf, torch.Tensor) and id(leaf) not in memo):
        with fake:
            memo[id(tensor)] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    for tensor in tensors:
        vars(memo[id(tensor)]).update(copy.deepcopy(notes_on(tensor), memo))
    for value in (value for m in module.modules() for value in vars(m).values()):
        if isinstance(value, torch.Tensor) and value.grad_fn is not None:  # a hook computes it in each call
            with fake:
                memo[id(value)] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    try:
        twin = copy.deepcopy(module, memo)
    except TypeError as error:  # "cannot pickle …"
        raise UnwritableError(
            f"parallel.stages: {type(module).__name__} can't be copied to be written down ({error}): keep "
            f"such an object elsewhere, {OTHERWISE}"
        ) from error
    for norm in twin.modules():
        if isinstance(norm, _BatchNorm) and norm.momentum is None:
            norm.momentum = 0.1  # the module itself is run, whose plain mean no operator can say
    return twin
