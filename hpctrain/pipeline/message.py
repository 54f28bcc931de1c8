"""What a message between stages holds: a tree of tensors and plain values as a layout and bytes, and back.

      layout   [["t", "float32", [8, 16], [16, 1], true, 0, false], …] and the tree
      bytes    of each tensor, from its first element's to its last one's; where gaps are most, without them

A tensor keeps its strides on the way, gaps and repetitions included, and how far behind a 64-byte line
it begins: kernels add in the order in which memory lies, so another layout would give other bits. Large gaps
stay behind, and are there again at the other end.
"""

import importlib
import json
import math
import sys
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, lru_cache
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils import _pytree

from hpctrain.errors import HpctrainError
from hpctrain.node_memory import LINE
from hpctrain.pipeline.raw import Raw
from hpctrain.pipeline.slots import lines
from hpctrain.tensors import firsts, grown

CROSSING = (
    "tensors, numbers, strings and None can, in lists, tuples (named ones, too) and dictionaries; cut "
    "elsewhere (parallel.cuts) or give out its tensors"
)


MOST_KNOWN = 256
MOST_PLACES = 1 << 22
SHARES = "_shares_memory_with_others"
"""Attribute of a tensor that crosses: where it is sent from, others that cross lie in its memory, too."""


@dataclass(frozen=True)
class Layout:
    """What a message holds besides the bytes of its tensors. All is local; nothing changes it."""

    leaves: tuple[Any, ...]
    """Each ("t", dtype, shape, strides, requires_grad, bytes behind a line, without gaps, with others in one
    memory), ("c", value), ("n", dtype of NumPy, value), ("z", real, imaginary) or ("s", number), the same
    tensor as that leaf."""
    tree: _pytree.TreeSpec

    def encode(self) -> bytes:
        """Write it as JSON."""
        kinds = [name_of_class(kind) for kind in named_tuples(self.tree)]
        return json.dumps([self.leaves, written(self.tree), kinds]).encode()

    @classmethod
    def decode(cls, text: bytes) -> "Layout":
        """Read it."""
        leaves, tree, kinds = json.loads(text)
        for kind in kinds:
            known_as(resolved(kind), kind)
        return cls(tuple(map(tuple, leaves)), _pytree.treespec_loads(tree))

    @cached_property
    def key(self) -> str:
        """What is the same for the same layouts only; True and 1 are other values."""
        return f"{self.leaves!r} {written(self.tree)}"

    @cached_property
    def plain(self) -> tuple[torch.dtype, list[int], list[int], bool, str | None] | None:
        """What makes the tree of one tensor, alone in a list, or in a dictionary by a name."""
        one = object()
        if len(self.leaves) != 1 or self.leaves[0][0] != "t" or any(self.leaves[0][6:]):
            return None
        tree = _pytree.tree_unflatten([one], self.tree)
        if not (tree == [one] or (type(tree) is dict and [*tree.values()] == [one])):
            return None
        _, kind, shape, strides, grad, *_ = self.leaves[0]
        return getattr(torch, kind), shape, strides, grad, next(iter(tree)) if type(tree) is dict else None

    def tree_of(self, flats: Sequence[torch.Tensor], device: str) -> Any:
        """Make the tree of values, from the bytes of its tensors. Local."""
        if self.plain is not None and device == "cpu":
            dtype, shape, strides, grad, name = self.plain
            made = flats[0].view(dtype).as_strided(shape, strides)
            if grad:
                made.requires_grad_()
            return [made] if name is None else {name: made}
        leaves, left = list[Any](), iter(flats)
        for leaf in self.leaves:
            if leaf[0] == "z":
                leaves.append(complex(*leaf[1:]))
            elif leaf[0] == "c":
                leaves.append(leaf[1])
            elif leaf[0] == "n":
                leaves.append(np.dtype(leaf[1]).type(leaf[2]))
            elif leaf[0] == "s":
                leaves.append(leaves[leaf[1]])
            else:
                _, kind, shape, strides, grad, behind, gaps, shares = leaf
                flat = next(left).view(getattr(torch, kind))
                if gaps:
                    flat = with_gaps(flat, shape, strides, behind)
                made = flat.as_strided(shape, strides)
                if device != "cpu":
                    made = made.to(device)
                leaves.append(made.requires_grad_() if grad else made)
                if shares:
                    setattr(leaves[-1], SHARES, True)
        return grown(iter(leaves), self.tree)


@dataclass
class Packed:
    """A tree of values, ready to leave."""

    micro_batch: int
    draws: int
    layout: Layout
    parts: list[Raw]
    """The bytes of its tensors."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in a slot."""
        return sum(lines(part.size) for part in self.parts)


@lru_cache(maxsize=256)
def written(tree: _pytree.TreeSpec) -> str:
    """Write a tree's structure. Raises NotImplementedError for what can't be written and read."""
    for kind in named_tuples(tree):
        known_as(kind, name_of_class(kind))
    text = _pytree.treespec_dumps(tree)
    if _pytree.treespec_loads(text) != tree:  # JSON has lists for tuples
        raise NotImplementedError("keys of dictionaries must be strings, numbers or None")
    return text


def named_tuples(tree: _pytree.TreeSpec) -> list[type]:
    """List the classes of named tuples in a tree's structure, those of torch's functions too. Pure."""
    inner = [kind for at in range(tree.num_children) for kind in named_tuples(tree.child(at))]
    kind = tree.context if tree.type is namedtuple else tree.type
    own = tree.type is namedtuple or is_torchs(kind)
    return list(dict.fromkeys([*([kind] if own else []), *inner]))


def is_torchs(kind: Any) -> bool:
    """Whether a class is what some of torch's functions give, as `torch.max(x, 1)`. Pure."""
    return getattr(kind, "__module__", "") == "torch.return_types"


def name_of_class(kind: type) -> str:
    """Name a class so that other ranks find it. Raises NotImplementedError where they would not. Local.

    >>> import tokenize
    >>> name_of_class(tokenize.TokenInfo), resolved("tokenize:TokenInfo") is tokenize.TokenInfo
    ('tokenize:TokenInfo', True)
    """
    name = f"{kind.__module__}:{kind.__qualname__}"
    if is_torchs(kind):
        return name
    mro = kind.__mro__
    made = next(at for at, one in enumerate(mro) if "_fields" in vars(one))
    if any("__new__" in vars(one) for one in mro[:made]):
        raise NotImplementedError(f"{name} makes its values by a __new__ of its own, which would run again")
    try:
        found = attrgetter(kind.__qualname__)(sys.modules.get(kind.__module__))
    except AttributeError:
        found = None
    if found is not kind:
        raise NotImplementedError(f"other ranks don't find the named tuple {name}: make it in its module")
    return name


def resolved(name: str) -> type:
    """Find a class by its module and name. Local."""
    module, _, kind = name.partition(":")
    return attrgetter(kind)(importlib.import_module(module))  # type: ignore[no-any-return]


def known_as(kind: type, name: str) -> None:
    """Let torch write and read trees with a named tuple. Local."""
    if is_torchs(kind):  # which torch flattens, and can't write
        _pytree.SUPPORTED_SERIALIZED_TYPES[kind] = _pytree._SerializeNodeDef(kind, name, None, None)
        _pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE[name] = kind
    elif kind not in _pytree.SUPPORTED_SERIALIZED_TYPES:
        _pytree._register_namedtuple(kind, serialized_type_name=name)


def span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Count the elements of memory from a tensor's first to its last. Pure.

    >>> span((2, 3), (3, 1)), span((2, 3), (0, 1)), span((2, 0), (1, 1)), span((), ())
    (6, 3, 0, 1)
    """
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))


def once(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Give a tensor's shape without its repetitions. Pure."""
    return [1 if stride == 0 else size for size, stride in zip(shape, strides)]


def mostly_gaps(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether most memory between a tensor's first and last element is not its own. Pure.

    Never where elements lie on one another but by repeating a dimension.

    >>> mostly_gaps((4, 5), (100, 1)), mostly_gaps((4, 5), (6, 1)), mostly_gaps((4, 2, 5), (100, 0, 1))
    (True, False, True)
    >>> mostly_gaps((50, 2), (1, 10))
    False
    """
    own = once(shape, strides)
    reach = 1
    for stride, size in sorted((st, n) for n, st in zip(own, strides) if n > 1):
        if stride < reach:
            return False
        reach += (size - 1) * stride
    return reach > 2 * math.prod(own) > 0


def lie_together(one: torch.Tensor, other: Any) -> bool:
    """Whether another tensor has some of the memory of this one. Local."""
    if not isinstance(other, torch.Tensor) or other.layout != torch.strided:
        return False
    if one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr() or not one.numel():
        return False
    if one.dtype != other.dtype:
        return True
    between = other.storage_offset() - one.storage_offset()
    return meet(tuple(one.shape), one.stride(), tuple(other.shape), other.stride(), between)


@lru_cache(maxsize=256)
def meet(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    shape_2: tuple[int, ...],
    strides_2: tuple[int, ...],
    between: int,
) -> bool:
    """Whether two tensors of one memory have an element in common, the second so many elements behind. Pure.

    Large ones that reach over one another are held for such.

    >>> meet((2, 2), (4, 1), (2, 2), (4, 1), 2), meet((2, 2), (4, 1), (2, 3), (4, 1), 1)
    (False, True)
    """
    if not (span(shape, strides) > between and span(shape_2, strides_2) > -between):
        return False
    if max(math.prod(once(shape, strides)), math.prod(once(shape_2, strides_2))) > MOST_PLACES:
        return True

    def places(shape: tuple[int, ...], strides: tuple[int, ...]) -> NDArray[np.int64]:
        every = np.zeros(1, np.int64)
        for size, stride in zip(shape, strides):
            every = (every[:, None] + stride * np.arange(1 if stride == 0 else size)).ravel()
        return every

    return bool(np.isin(places(shape, strides), places(shape_2, strides_2) + between).any())


@lru_cache(maxsize=256)
def layout_of(leaves: tuple[Any, ...], tree: _pytree.TreeSpec) -> Layout:
    """Give the layout of tensors alone: the same one for the same ones, whose key is made once. Pure."""
    return Layout(leaves, tree)


def memory_of(tensor: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Give all memory between a tensor's first and last element, flat; whether without its gaps. Local."""
    if tensor.is_contiguous():  # strides of single rows may be any
        return tensor.as_strided((tensor.numel(),), (1,)), False
    shape, strides = tensor.shape, tensor.stride()
    if mostly_gaps(shape, strides):
        return tensor.as_strided(once(shape, strides), strides).contiguous().view(-1), True
    return tensor.as_strided((span(shape, strides),), (1,)), False


def with_gaps(flat: torch.Tensor, shape: Sequence[int], strides: Sequence[int], behind: int) -> torch.Tensor:
    """Lay numbers that came without gaps as they were laid. Local."""
    start = behind // flat.element_size()
    room = flat.new_empty(start + span(shape, strides))[start:]
    own = once(shape, strides)
    room.as_strided(own, strides).copy_(flat.view(own))
    return room


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """Copy what came, as it lies: kernels add in that order. Its gradient goes through as it is. Local.

    What repeats itself in memory can't be changed in place, and stays.
    """
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride())):
        return tensor
    return marked_as(tensor, _Copied.apply(tensor))  # type: ignore[no-untyped-call]


def marked_as(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Let what stands for a tensor that came have its mark of shared memory, if it has one. Local."""
    if hasattr(tensor, SHARES):
        setattr(other, SHARES, True)
    return other


class _Copied(torch.autograd.Function):
    """A tensor that lies as another does, gaps included."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        start = x.data_ptr() % LINE // x.element_size()
        room = x.new_empty(start + span(x.shape, x.stride()))
        found = x.new_empty(0).set_(room.untyped_storage(), start, x.shape, x.stride())
        return found.copy_(x)  # no view, so it may be changed

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


@lru_cache(maxsize=64)
def name_of(dtype: torch.dtype) -> str:
    """Give a dtype's name in torch. Pure.

    >>> name_of(torch.float32)
    'float32'
    """
    return str(dtype).removeprefix("torch.")


_known: dict[Any, Layout] = {}
"""Layouts of messages of one plain tensor, by all that they hang on."""


def pack(stage: int, micro_batch: int, value: Any, draws: int) -> Packed:
    """Make a tree of tensors and plain values ready for a stage. Local.

    Raises HpctrainError for what can't travel.
    """
    alike = None
    if (found := single(value)) is not None:
        name, only = found
        at = only.data_ptr()
        alike = name, only.dtype, only.shape, only.stride(), only.requires_grad, at % LINE
        if alike in _known:
            return Packed(micro_batch, draws, _known[alike], [Raw(at, only.nbytes, only)])
    try:
        leaves, tree = _pytree.tree_flatten(value)
        written(tree)
    except Exception as error:  # also of a list that holds itself
        raise HpctrainError(
            f"a value of another kind would cross to stage {stage} ({error}): {CROSSING}"
        ) from None
    listed: list[Any] = []
    parts: list[Raw] = []
    for at, (leaf, first) in enumerate(zip(leaves, firsts(leaves))):
        if isinstance(leaf, torch.Tensor) and first != at:
            listed.append(("s", first))
        elif isinstance(leaf, torch.Tensor):
            named = (name for name in getattr(leaf, "__dict__", ()) if not name.startswith("_"))
            own = [name for name in named if name != "persistent"]
            if type(leaf) is not nn.Parameter and (type(leaf) is not torch.Tensor or own):  # not nn.Buffer's
                what = f"a {type(leaf).__name__} with {', '.join(own) or 'ways of its own'}"
                raise HpctrainError(f"{what} would cross to stage {stage}, as a plain tensor: {CROSSING}")
            if not is_plain(leaf):
                kind = "nested" if leaf.is_nested else leaf.dtype if leaf.is_quantized else leaf.layout
                raise HpctrainError(f"a {kind} tensor would cross to stage {stage}: {CROSSING}")
            laid = leaf.detach()
            if laid.device.type != "cpu" or laid.is_conj() or laid.is_neg():
                laid = laid.to("cpu").resolve_conj().resolve_neg()
            flat, gaps = memory_of(laid)
            behind = laid.data_ptr() % LINE
            shares = getattr(leaf, SHARES, False)
            shares = shares or any(lie_together(leaf, other) for other in leaves if other is not leaf)
            kind, shape, grad = name_of(leaf.dtype), tuple(leaf.shape), leaf.requires_grad
            listed.append(("t", kind, shape, laid.stride(), grad, behind, gaps, shares))
            parts.append(Raw(flat.data_ptr(), flat.nbytes, flat))
        elif isinstance(leaf, Enum) or (isinstance(leaf, str) and type(leaf) is not str):
            raise HpctrainError(
                f"a {type(leaf).__name__} would cross to stage {stage}, and lose its type: {CROSSING}"
            )
        elif isinstance(leaf, np.generic) and leaf.dtype.kind in "biuf" and leaf.dtype.itemsize <= 8:
            listed.append(("n", leaf.dtype.name, leaf.item()))
        elif leaf is None or isinstance(leaf, (bool, int, float, str)):
            listed.append(("c", leaf))
        elif isinstance(leaf, complex):
            listed.append(("z", leaf.real, leaf.imag))
        else:
            raise HpctrainError(f"a {type(leaf).__name__} would cross to stage {stage}: {CROSSING}")
    make = layout_of if len(parts) == len(leaves) else Layout  # 1, 1.0 and True are equal
    layout = make(tuple(listed), tree)
    if alike is not None:
        if len(_known) > MOST_KNOWN:
            _known.clear()
        _known[alike] = layout
    return Packed(micro_batch, draws, layout, parts)


def single(value: Any) -> tuple[str | None, torch.Tensor] | None:
    """Give the one tensor of a dictionary, with its name, or of a list; if it lies as most do. Local."""
    if type(value) not in (dict, list) or len(value) != 1:
        return None
    name, leaf = next(iter(value.items())) if type(value) is dict else ("", value[0])
    if type(leaf) is not torch.Tensor or not is_plain(leaf):
        return None
    plain = leaf.is_cpu and leaf.is_contiguous() and not leaf.is_neg() and not leaf.is_complex()
    return (name if type(value) is dict else None, leaf) if plain and not vars(leaf) else None


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor's numbers lie in one memory by strides, and are all of it. Local."""
    return tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_quantized)


def bytes_of(layout: Layout) -> list[tuple[int, int]]:
    """Give the bytes of each of a layout's tensors, and how many bytes behind a line it begins. Pure."""
    found = []
    for leaf in layout.leaves:
        if leaf[0] == "t":
            _, kind, shape, strides, _, behind, gaps, _ = leaf
            size = getattr(torch, kind).itemsize
            count = math.prod(once(shape, strides)) if gaps else span(shape, strides)
            found.append((size * count, behind // size * size))
    return found
