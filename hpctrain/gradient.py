"""Weight gradients computed straight into their place: the memory that is averaged.

Autograd computes a weight's gradient into fresh memory and then adds it to `.grad`, which had
to be zeroed first: three passes over the memory of the weights. For a linear layer the product
can be written where it belongs:

      first micro-batch      place ← gᵀ·x          torch.mm(out=place)
      later ones             place ← place + gᵀ·x  place.addmm_

and for an embedding only the rows that were looked up are added, place[i] ← place[i] + g, where
autograd makes a whole table of mostly zeros. Convolutions and norms have no kernel that writes
where it is told: theirs are added, which is little beside their own work; autograd does it, but
for convolutions' that wait.

What is computed so may wait (`waiting.py`).

The user's module is not touched: while the forward runs, others stand in `torch.nn.functional`, which take
each call of `functions.py`'s layers whose weight has a place. Everything that could tell the difference
takes autograd's own way: hooks on the weight, gradients of gradients, `torch.autograd.grad` in
the user's code, autocast, functorch, modes of the user's, small weights.
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import nn

from hpctrain import products
from hpctrain.functions import EMBEDDING, LINEAR, Convolution, Embedding, Linear, Product, Work
from hpctrain.modes import Replaced, watched
from hpctrain.products import LaidWeights
from hpctrain.tensors import hooked
from hpctrain.waiting import Order, WaitingGradients, few_rows, rows_together

SMALLEST = 2**17
"""Elements: below it a call of ours costs more than the passes over memory that it saves (measured)."""

LARGE = 2**20
"""The same where MKL computes, of products that don't wait for other micro-batches': smaller ones are left to
autograd, or wait with its bits. Between products caches are cold: a call of ours takes 0.14 ms (measured)."""

SMALLEST_FILTER = 1024
"""The same for convolutions, whose work is many times that of a product with their weight."""

WEIGHTS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("weight",),
    nn.Embedding: ("weight",),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), ("weight",)),
    nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
}
"""Names of the weights that are seen."""

KINDS = (torch.Tensor, nn.Parameter)
USUAL = (torch.strided,)
CONVOLVED = (torch.strided, torch._mkldnn)  # type: ignore[attr-defined]
"""Layouts of inputs: convolutions in a row have oneDNN's own between them (`pipeline/blocks.py`)."""
APPLY_LINEAR: Callable[..., Any] = super(torch.autograd.Function, Linear).apply
"""`Linear.apply` behind its question for functorch's transforms, which `plain` has asked."""
unwrap = torch._C._functorch.unwrap_if_dead
"""What functorch left of a tensor whose transform has ended."""
CALLED = ("linear", "embedding", "conv1d", "conv2d", "conv3d")
"""Functions of `torch.nn.functional` whose calls are seen."""


class Places(Order, Protocol):
    """Where weight gradients go."""

    def place(self, parameter: torch.Tensor) -> tuple[torch.Tensor, bool] | None:
        """Give the memory of a gradient and whether nothing has joined it yet; None: not managed."""

    def filled(self, parameter: torch.Tensor) -> None:
        """Note that a gradient has been added in its place."""

    def came(self) -> None:
        """Take what a backward that has ended has brought by autograd."""

    def left(self, *parameters: torch.Tensor, waits: bool) -> bool:
        """Tell whether autograd may bring a layer's gradients, in the same order of the sum; it will then.

        `waits`: they would rather be computed later, if they may.
        """


_owners: "list[StraightIntoPlace]" = []


class Taking(Replaced):
    """Entered, takes the calls of layers for one who is called `taking` meanwhile."""

    def __init__(self, owner: "StraightIntoPlace", functions: Mapping[str, Callable[..., Any]]) -> None:
        """Take the owner, and who is to stand in `torch.nn.functional`, by name."""
        super().__init__(functions)
        self._owner = owner

    def __enter__(self) -> None:
        """Put them there."""
        super().__enter__()
        _owners.append(self._owner)

    def __exit__(self, *_: Any) -> None:
        """Put back what stood there."""
        _owners.pop()
        super().__exit__()


def taking() -> "StraightIntoPlace | None":
    """Give who takes the calls of the forward that runs, if there is one. Local."""
    return _owners[-1] if _owners else None


class StraightIntoPlace(WaitingGradients):
    """`forward` is entered for the forward, `accumulating` for the backward that fills the places."""

    def __init__(self, module: nn.Module, places: Places, fast: bool = False) -> None:
        """Take what gives places; `fast`: products that wait may become one, in another order of sums."""
        super().__init__(places, fast)
        self._places: Places = places
        self.laid, self.by_onednn = LaidWeights(), False
        """Weights laid for a step's products; whether oneDNN may compute them, asked at each forward."""
        self._active, self._micro_batch, self._whole = False, -1, False
        self.terms: dict[nn.Parameter, torch.Tensor] | None = None
        """Sums of |g|ᵀ·|x| of each weight's products, if someone wants them: `verify` does."""
        self._forward_of = -1
        self._called: set[int] = set()
        """Weights and biases of layers that were called in this forward, some left to torch."""
        self._settled: dict[int, float] = {}
        """Weights of linear layers that are left where nothing waits, and to which size of an input not."""
        self.compiled = any(
            type(m).__name__ == "OptimizedModule" or getattr(m, "_compiled_call_impl", None)
            for m in module.modules()
        )
        """Whether part of the module is compiled: nothing can look inside."""
        self.weights = seen(module)
        self._modes = 0
        """Modes that are on when a forward begins."""
        takers: list[Callable[..., Any]] = [self._linear, self._embedding, *3 * [self._convolution]]
        self._taking = Taking(self, dict(zip(CALLED, takers, strict=True)))

    def forward(self, micro_batch: int = -1) -> AbstractContextManager[None]:
        """Give what watches the calls of a forward; it costs nothing where no layer could gain. Local.

        With the number of a micro-batch in whose backward weight gradients may wait; else convolutions, which
        gain nothing else, are left to torch where the sum keeps its order.
        """
        self._forward_of = micro_batch
        self._called.clear()
        if not self.weights or self.compiled:
            return nullcontext()
        self.by_onednn = products.allowed()
        self._modes = torch._C._len_torch_function_stack()
        return self._taking

    @contextmanager
    def accumulating(self, micro_batch: int = -1, whole: bool = False) -> Iterator[None]:
        """Let weight gradients go into their places: this backward is the one that is averaged.

        With the number of a micro-batch, some may wait for `weights_of` it; where the backward is a `whole`
        one, only what gains by waiting for other micro-batches.
        """
        self._active, self._micro_batch, self._whole = True, micro_batch, whole
        try:
            yield
        finally:
            self._active, self._micro_batch, self._whole = False, -1, False
        self._places.came()

    def begin(self, micro_batches: int, waits: bool = False, behind: Container[int] = ()) -> None:
        """Start a step of so many micro-batches: no product waits, and weights are new. Local.

        `waits`: this rank waits for another's activations first; `behind`: the micro-batches whose weight
        gradients are computed when all gradients that others wait for have left.
        """
        self.nothing_waits(behind)
        self.laid.begin(micro_batches, waits)

    def _leaves(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
        """Whether a layer's gradients are left to torch: calling ours costs some percent. Local.

        Of several calls with one weight or bias the first: torch would add those of all before they join.
        """
        ids = {id(one) for one in (weight, bias) if one is not None}
        parameters = [one for one in (weight, bias) if one is not None and one.requires_grad]
        first = self._called.isdisjoint(ids)
        self._called |= ids
        return first and self._places.left(*parameters, waits=self._waits(parameters))

    def _waits(self, parameters: Sequence[torch.Tensor]) -> bool:
        """Whether what is never merged waits: by `fast`, which measures no split, at a step's end. Local."""
        at = self._forward_of
        return at >= 0 and (not self.fast or at in self._behind) and self.may_wait(parameters, at)

    def _takes(self, x: torch.Tensor, weight: Any, bias: Any = None, layouts: Container[Any] = USUAL) -> bool:
        """Whether a call of a layer is taken. Local."""
        if id(weight) not in self.weights or not weight.requires_grad or not torch.is_grad_enabled():
            return False
        if not plain(x, weight, layouts, bias):
            return False
        return torch._C._len_torch_function_stack() <= self._modes + 1 or not watched()

    def _linear(
        self, function: Any, input: torch.Tensor, weight: Any, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self._is_settled(input, weight):
            return function(input, weight, bias)  # type: ignore[no-any-return]
        own = function is LINEAR and self._takes(input, weight, bias)
        if not own or (bias is not None and bias.ndim != 1):
            return function(input, weight, bias)  # type: ignore[no-any-return]
        light = self._is_light(input, weight)
        if light and self._leaves(weight):
            if not self._waits([weight]):
                self._settled[id(weight)] = self._few_rows(weight) * weight.size(1)
            return function(input, weight, bias)  # type: ignore[no-any-return]
        with torch._C.DisableTorchFunction():
            return APPLY_LINEAR(unwrap(input), weight, bias, self, light)  # type: ignore[no-any-return]

    def _is_settled(self, x: Any, weight: torch.Tensor) -> bool:
        """Whether a call is known to be left to torch, without a closer look: it would take 50 µs. Local."""
        at = id(weight)
        if at not in self._settled or at in self._called or self.by_onednn or type(x) is not torch.Tensor:
            return False
        if x.numel() <= self._settled[at] or (x.ndim == 2 and not x.is_contiguous()):
            return False
        if self._waits([weight]):
            return False
        self._called.add(at)
        return True

    def _is_light(self, x: torch.Tensor, weight: torch.Tensor) -> bool:
        """Whether a product need not be called by us where it does not wait: a rule of shapes. Local."""
        if self.by_onednn or weight.numel() >= LARGE or not x.numel():
            return False
        if x.ndim == 1 or (x.ndim == 2 and not x.is_contiguous()):  # torch has ways of its own
            return False
        return x.numel() > self._few_rows(weight) * x.size(-1)

    def takes_row(self, x: torch.Tensor, parameters: Sequence[tuple[Any, Any]]) -> bool:
        """Whether linear layers of these weights and biases, one behind the other, are taken as one. Local.

        Where products have so few rows that what is around them counts; `plain` has been asked of the first.
        """
        rows, dtype = len(x) if x.ndim == 2 and x.is_cpu and x.is_contiguous() else 0, x.dtype
        if not rows or not torch.is_grad_enabled():
            return False
        for weight, bias in parameters:
            if id(weight) not in self.weights or not weight.requires_grad or rows > rows_together(weight):
                return False
            if weight.dtype is not dtype or not weight.is_contiguous() or type(weight) not in KINDS:
                return False
            if not self.by_onednn and weight.numel() < LARGE and rows > self._few_rows(weight):
                return False  # light
            if bias is not None and (
                type(bias) not in KINDS or bias.dtype is not dtype or not bias.is_contiguous()
            ):
                return False
        return x.size(1) == int(parameters[0][0].size(1))

    def _few_rows(self, weight: torch.Tensor) -> float:
        """Rows up to which products gain by waiting for other micro-batches'. Local."""
        return rows_together(weight) if self.fast else few_rows(weight)

    def _embedding(
        self, function: Any, input: torch.Tensor, weight: Any, padding_idx: int | None = None,
        max_norm: float | None = None, norm_type: float = 2.0, scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        special = scale_grad_by_freq or sparse or function is not EMBEDDING
        if special or not self._takes(weight, weight) or not -len(weight) <= (padding_idx or 0) < len(weight):
            rest = padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
            return function(input, weight, *rest)  # type: ignore[no-any-return]
        self._called.add(id(weight))
        padding = -1 if padding_idx is None else padding_idx % len(weight)
        with torch._C.DisableTorchFunction():
            if max_norm is not None:  # before the rows are read, as torch does
                with torch.no_grad():
                    torch.embedding_renorm_(weight, input, max_norm, norm_type)
            return Embedding.apply(weight, input, padding, self)  # type: ignore[no-any-return, no-untyped-call]

    def _convolution(
        self, function: Any, input: torch.Tensor, weight: Any, bias: Any = None, stride: Any = 1,
        padding: Any = 0, dilation: Any = 1, groups: int = 1,
    ) -> torch.Tensor:  # fmt: skip
        taken = self._takes(input, weight, bias, CONVOLVED) and input.ndim == weight.ndim
        if not taken or self._leaves(weight, bias):
            return function(input, weight, bias, stride, padding, dilation, groups)  # type: ignore[no-any-return]
        sizes = [[n] * (weight.ndim - 2) if isinstance(n, int) else n for n in (stride, padding, dilation)]
        if not all(isinstance(n, (list, tuple)) and all(type(m) is int for m in n) for n in sizes):
            return function(input, weight, bias, stride, padding, dilation, groups)  # type: ignore[no-any-return]
        geometry = list(sizes[0]), list(sizes[1]), list(sizes[2]), groups
        with torch._C.DisableTorchFunction():
            return Convolution.apply(function, input, weight, bias, geometry, self)  # type: ignore[no-any-return, no-untyped-call]

    @property
    def filling(self) -> bool:
        """Whether this backward is one that fills places; others are the user's own."""
        return self._active and not torch.is_grad_enabled()  # create_graph: it is to be differentiated

    def fills(self, parameter: nn.Parameter, dtype: torch.dtype) -> bool:
        """Whether a gradient of this backward goes straight into its place. Local."""
        own_way = (
            not self.filling
            or hooked(parameter)  # the user's want to see the gradient
            or parameter.dtype != dtype
        )
        return not own_way and self._places.place(parameter) is not None

    def add_rows(self, parameter: nn.Parameter, indices: torch.Tensor, g: torch.Tensor, padding: int) -> None:
        """Add rows g: (n, width) to rows `indices`: (n,) of the parameter's place, in that order. Local."""
        found = self._places.place(parameter)
        assert found is not None
        place, first = found
        if parameter in self:
            self.catch_up(parameter)
            place, first = self._place(parameter)
        self._never_later.add(id(parameter))
        if first:
            place.zero_()
        if padding >= 0:
            kept = indices != padding
            indices, g = indices[kept], g[kept]
        place.index_add_(0, indices, g)
        self._places.filled(parameter)

    def take(self, parameters: list[nn.Parameter], work: Work) -> bool:
        """Take what is to be computed for the places of parameters, now or later. Local.

        False: autograd is to have it.
        """
        dtype = work.g.dtype
        for parameter in parameters:
            if not self.fills(parameter, dtype):
                return False
        if not self._wait(parameters, work, self._micro_batch, self._whole):
            self._compute(parameters, work, now=True)
        return True

    def _compute(self, parameters: list[nn.Parameter], work: Work, now: bool = False) -> None:
        if isinstance(work, Product):
            place, first = self._place(parameters[0])
            if self.terms is not None:
                sizes = work.g.abs().t() @ work.x.abs()
                self.terms[parameters[0]] = self.terms.get(parameters[0], 0.0) + sizes
            if first:
                torch.mm(work.g.t(), work.x, out=place)
            else:
                place.addmm_(work.g.t(), work.x)
            self._places.filled(parameters[0])
            return
        for parameter, gradient in zip(parameters, work.of_weights(now)):
            place, first = self._place(parameter)
            if first:
                place.copy_(gradient)
            else:
                place.add_(gradient)
            self._places.filled(parameter)

    def _place(self, parameter: nn.Parameter) -> tuple[torch.Tensor, bool]:
        found = self._places.place(parameter)
        assert found is not None
        return found


def seen(module: nn.Module) -> dict[int, torch.Tensor]:
    """Give a module's weights that are large enough for our own ways to gain, by their ids. Local.

    A weight of another stage stands in this one's module as a plain tensor: its forward is to have the bits
    of one process too.
    """
    weights = (  # a parametrised layer computes its weight when asked for it
        m._parameters.get(name, m.__dict__.get(name))
        for m in module.modules()
        for kind, names in WEIGHTS.items()
        if isinstance(m, kind)
        for name in names
    )
    smallest = {True: SMALLEST_FILTER, False: SMALLEST}
    found = (w for w in weights if isinstance(w, torch.Tensor) and w.is_leaf and w.is_floating_point())
    return {id(w): w for w in found if w.numel() >= smallest[w.ndim > 2]}


def plain(x: Any, weight: torch.Tensor, layouts: Container[Any] = USUAL, bias: Any = None) -> bool:
    """Whether nothing else watches the call itself, which gets an input, a weight and maybe a bias. Local.

    Functorch's transforms and forward-mode gradients do; so do hooks on saved tensors (recomputed activations
    expect the same tensors from the second forward, which is torch's own).
    """
    if type(x) not in KINDS or type(weight) not in KINDS or x.layout not in layouts or x.is_nested:
        return False
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        return False  # it casts inside the call
    if (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return False
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return False
    if bias is not None:
        if type(bias) not in KINDS or bias.layout is not torch.strided or bias.is_nested:
            return False
        if bias.dtype is not weight.dtype or not bias.ndim:
            return False
    return x.dtype is weight.dtype and x.ndim >= 1
