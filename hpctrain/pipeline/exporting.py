"""What a forward runs under while torch.export writes it down, or it is followed."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import fx, nn
from torch.distributions import Distribution
from torch.nn.modules import module as torch_module
from torch.nn.modules import transformer
from torch.utils import checkpoint

from hpctrain.modes import functions_taken, watched
from hpctrain.pipeline.operators import MARKS, TAKEN

QUESTIONS = ("is_exporting", "is_compiling")
"""Of torch.compiler, by which a forward asks how it is run."""

PASSED_ON = ("torch._dynamo.external_utils", "torch._utils")
"""Modules of torch that ask these for others."""

KEEPING = ("torch.autograd.graph", "torch.utils.checkpoint", "hpctrain.")
"""Where hooks on saved tensors are from that give back what was saved: elsewhere, or computed again."""


@contextmanager
def answered_no() -> Iterator[list[str]]:
    """Let models that ask torch whether they are compiled or exported hear no; gives who asked. Local.

    transformers' attention, for one, makes a mask only then, and sums in another order. torch's own modules
    hear the truth, and so does all that torch compiles inside, as torch.cond's branches: it is compiled in
    one process too.
    """
    from torch._dynamo import callback  # seconds to load; torch.export has it loaded

    asked: list[str] = []
    own = {name: getattr(torch.compiler, name) for name in QUESTIONS}

    def answers(truth: Callable[[], bool]) -> Callable[[], bool]:
        def answer() -> bool:
            frame = sys._getframe(1)
            while frame.f_globals.get("__name__") in PASSED_ON and frame.f_back:
                frame = frame.f_back
            asker = str(frame.f_globals.get("__name__"))
            if asker.split(".")[0] == "torch":
                return truth()
            asked.append(asker)
            return False

        return answer

    no = {name: answers(truth) for name, truth in own.items()}
    starts = callback.on_compile_start(lambda *_: exchange(no, own))
    ends = callback.on_compile_end(lambda *_: exchange(own, no))
    exchange(own, no)
    try:
        yield asked
    finally:
        callback.callback_handler.remove_start_callback(starts)
        callback.callback_handler.remove_end_callback(ends)
        exchange(no, own)  # where a forward has imported one meanwhile, too


def exchange(old: dict[str, Callable[[], bool]], new: dict[str, Callable[[], bool]]) -> None:
    """Put functions into the places of others: torch.compiler, and wherever they were imported. Local."""
    instead = {id(function): new[name] for name, function in old.items()}
    every = [(at, m) for at, m in list(sys.modules.items()) if isinstance(m, ModuleType)]
    for room in [vars(m) for at, m in every if at == "torch.compiler" or at.split(".")[0] != "torch"]:
        for at, value in [*room.items()]:
            if id(value) in instead:
                room[at] = instead[id(value)]


@contextmanager
def lost_refused(module: nn.Module) -> Iterator[None]:
    """Raise where a forward says what operators don't: of its backward, or of torch's default dtype. Local.

    Raises NotImplementedError; torch.export would leave it out, and gradients would be others, silently.
    """
    tensor = torch.Tensor
    register_hook = tensor.register_hook

    def applied(usual: Any, cls: Any, *args: Any, **named: Any) -> Any:
        if cls is checkpoint.CheckpointFunction:  # written down, its inside would have no gradient
            run, _, *given = args
            trained = any(isinstance(x, torch.Tensor) and x.requires_grad for x in given)
            with as_recomputed() if trained else torch.no_grad():  # without, torch gives it no gradient
                return run(*given)
        own = cls.__module__.startswith("torch.distributions") and torch.is_grad_enabled()
        own = own and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args)
        if cls.__module__.split(".")[0] == "torch" and not own:
            return usual(cls, *args, **named)
        raise NotImplementedError(
            f"{cls.__qualname__} is a torch.autograd.Function: its own backward would be lost"
        )

    def hooked(tensor: torch.Tensor, hook: Any) -> Any:
        raise NotImplementedError("the hook on a tensor's gradient would be lost")

    requires_grad, saving = tensor.requires_grad_, torch.autograd.graph.saved_tensors_hooks
    enter = saving.__enter__

    def saved(self: Any) -> None:
        if not str(getattr(self.pack_hook, "__module__", "")).startswith(KEEPING):
            raise NotImplementedError("what hooks make of tensors saved for the backward would be lost")
        enter(self)

    def frozen_refused(tensor: torch.Tensor, on: bool) -> None:
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad != on:
            raise NotImplementedError("a weight is frozen, or no more, for a part of the forward")

    def wanted(tensor: torch.Tensor, on: bool) -> None:
        frozen_refused(tensor, on)
        attributes["requires_grad"].__set__(tensor, on)

    def switched(tensor: torch.Tensor, on: bool = True) -> torch.Tensor:
        frozen_refused(tensor, on)
        return requires_grad(tensor, on)  # not by the attribute, which wants a leaf

    attributes = {name: getattr(torch._C.TensorBase, name) for name in ("requires_grad", "grad")}

    def gradient(tensor: torch.Tensor) -> Any:
        asker = str(sys._getframe(1).f_globals.get("__name__")).split(".")[0]
        if isinstance(tensor, nn.Parameter) and asker not in ("torch", "hpctrain"):
            raise NotImplementedError(
                "the forward looks at the gradient of a weight, which operators have not"
            )
        return attributes["grad"].__get__(tensor)

    set_dtype = torch.set_default_dtype

    def chosen(dtype: torch.dtype) -> None:
        if dtype != torch.get_default_dtype():
            raise NotImplementedError(
                f"the forward sets the default dtype to {dtype}, which would be lost: give dtype= where "
                f"tensors are made"
            )

    if torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks:
        raise NotImplementedError("the backward hook of all modules would be lost")
    for name, m in module.named_modules():
        if m._backward_hooks or m._backward_pre_hooks:
            raise NotImplementedError(f"the backward hook of {name or 'the model'} would be lost")
    tensor.register_hook = hooked  # type: ignore[method-assign]
    tensor.requires_grad_ = switched  # type: ignore[method-assign, assignment]
    saving.__enter__ = saved  # type: ignore[method-assign]
    torch.set_default_dtype = chosen
    get, grad = attributes["requires_grad"].__get__, attributes["grad"].__set__
    tensor.requires_grad = property(get, wanted)  # type: ignore[assignment]
    tensor.grad = property(gradient, grad, attributes["grad"].__delete__)  # type: ignore[assignment]
    try:
        with functions_taken(applied):
            yield
    finally:
        tensor.register_hook = register_hook  # type: ignore[method-assign]
        tensor.requires_grad_ = requires_grad  # type: ignore[method-assign]
        saving.__enter__ = enter  # type: ignore[method-assign]
        torch.set_default_dtype = set_dtype
        del tensor.requires_grad, tensor.grad  # torch's own stand behind


@contextmanager
def nested_refused() -> Iterator[None]:
    """Raise where a forward switches gradients in an autocast of its own: torch.export loses that. Local.

    Raises NotImplementedError.
    """
    casts, switches = torch.autocast, torch.set_grad_enabled  # no_grad and enable_grad take it
    enter, leave, switch = casts.__enter__, casts.__exit__, switches.__init__
    inside: list[bool] = []

    def entered(self: Any) -> Any:
        inside.append(True)
        return enter(self)  # type: ignore[no-untyped-call]

    def left(self: Any, *error: Any) -> Any:
        inside.pop()
        return leave(self, *error)

    def switched(self: Any, mode: bool) -> None:
        if inside and mode != torch.is_grad_enabled():
            raise NotImplementedError("torch.no_grad, or enable_grad, inside an autocast would be lost")
        switch(self, mode)

    casts.__enter__, casts.__exit__ = entered, left  # type: ignore[method-assign]
    switches.__init__ = switched  # type: ignore[method-assign]
    try:
        yield
    finally:
        casts.__enter__, casts.__exit__ = enter, leave  # type: ignore[method-assign]
        switches.__init__ = switch  # type: ignore[method-assign]


@contextmanager
def distributions_unchecked() -> Iterator[None]:
    """Let torch.distributions not look at what they are given: they look as a branch would. Local."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


@contextmanager
def causal_masks_known() -> Iterator[list[bool]]:
    """Let torch's transformers know a causal mask by who made it: what is written down has no numbers. Local.

    Gives, for each square mask of another's making, that it may be one all the same.
    """
    made, unknown = list[tuple[torch.Tensor, int]](), list[bool]()
    generate, detect = transformer._generate_square_subsequent_mask, transformer._detect_is_causal_mask

    def generated(*arguments: Any, **named: Any) -> torch.Tensor:
        mask = generate(*arguments, **named)
        made.append((mask, mask._version))
        return mask

    def detected(mask: torch.Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
        if is_causal is not None or mask is None:
            return is_causal is True
        if mask.ndim != 2 or len(mask) != mask.shape[1] or len(mask) != (size or len(mask)):
            return False
        known = any(mask is one and mask._version == version for one, version in made)
        if not known:
            unknown.append(True)
        return known

    transformer._generate_square_subsequent_mask = generated
    transformer._detect_is_causal_mask = detected
    try:
        yield unknown
    finally:
        transformer._generate_square_subsequent_mask = generate
        transformer._detect_is_causal_mask = detect


def as_recomputed() -> AbstractContextManager[Any]:
    """Let a region look as those of torch.utils.checkpoint do, and keep its tensors. Local."""
    return torch.autograd.graph.saved_tensors_hooks(same, same)


@contextmanager
def regions_kept(around: Callable[[], AbstractContextManager[Any]] = as_recomputed) -> Iterator[None]:
    """Let torch.utils.checkpoint recompute nothing, and run `around` its regions. Local.

    torch.export can't write nested regions down.
    """
    name = "_checkpoint_without_reentrant_generator"
    before = getattr(checkpoint, name, None)

    def kept(*_: Any, **__: Any) -> Iterator[None]:
        with around():
            yield

    if before is not None:
        setattr(checkpoint, name, kept)
    try:
        yield
    finally:
        if before is not None:
            setattr(checkpoint, name, before)


@contextmanager
def inference_without_gradients() -> Iterator[None]:
    """Let torch.inference_mode be torch.no_grad, which torch.export can write down. Local."""
    kind: Any = torch.inference_mode
    own = kind.__enter__, kind.__exit__

    def enter(self: Any) -> None:
        self._instead = torch.no_grad() if self.mode else nullcontext()
        self._instead.__enter__()

    def leave(self: Any, *error: Any) -> None:
        self._instead.__exit__(*error)

    kind.__enter__, kind.__exit__ = enter, leave
    try:
        yield
    finally:
        kind.__enter__, kind.__exit__ = own


def same(tensor: torch.Tensor) -> torch.Tensor:
    """Give what came."""
    return tensor


def marked(function: Any, *arguments: Any, **named: Any) -> Any:
    """Call a function that `gradient` takes, and mark its operator where it would. Local."""
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    taken = MARKS and not hooked and torch.is_grad_enabled() and not watched()
    with fx.traceback.annotate({TAKEN: True}) if taken else nullcontext():
        return function(*arguments, **named)
