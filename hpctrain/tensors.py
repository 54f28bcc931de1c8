"""Tensors in trees, what memory they share, and a look at every operator that makes them."""

import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode


class OurHook(partial[None]):
    """A hook of ours on a parameter: `hooked` asks for those of users."""


def hooked(parameter: torch.Tensor) -> bool:
    """Whether a hook of the user's is to be called with a parameter's gradient. Local."""
    behind = parameter._post_accumulate_grad_hooks
    return bool(parameter._backward_hooks) or (
        bool(behind) and not all(isinstance(hook, OurHook) for hook in behind.values())
    )


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """List a tree's tensors. Pure."""
    if type(tree) is torch.Tensor:  # as most are: torch's own way takes three times as long
        return [tree]
    if type(tree) is dict:
        return [leaf for one in tree.values() for leaf in tensors_in(one)]
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def nodes_behind(tensors: Iterable[Any]) -> set[Any]:
    """Give what gradients of tensors go through: the nodes of torch's graph. Local."""
    left, seen = [getattr(tensor, "grad_fn", None) for tensor in tensors], set[Any]()
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [inner for inner, _ in node.next_functions]
    return seen


def shapes_of(given: Any) -> str:
    """Write dtypes and shapes of the tensors in a tree, and its other values.

    >>> shapes_of({"x": torch.zeros(2, 3), "scale": 0.5})
    'float32 (2, 3), 0.5'
    """
    leaves = _pytree.tree_leaves(given)
    tensors = (
        f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
        if isinstance(leaf, torch.Tensor)
        else reprlib.repr(leaf)
        for leaf in leaves
    )
    return ", ".join(tensors) or "nothing"


def changed_once(change: Callable[[torch.Tensor], Any], tree: Any) -> Any:
    """Give a tree with its tensors changed: what stands in several places once, and in all of them. Local."""
    done: dict[int, tuple[torch.Tensor, Any]] = {}

    def once(tensor: torch.Tensor) -> Any:
        if id(tensor) not in done:
            done[id(tensor)] = tensor, change(tensor)
        return done[id(tensor)][1]

    return with_tensors(once, tree)


def grown(leaves: Iterator[Any], tree: _pytree.TreeSpec) -> Any:
    """Make a tree of its leaves; torch's own way makes a tuple of a torch.Size. Pure."""
    if tree.is_leaf():
        return next(leaves)
    children = [grown(leaves, tree.child(at)) for at in range(tree.num_children)]
    value = _pytree.SUPPORTED_NODES[tree.type].unflatten_fn(children, tree.context)
    return torch.Size(value) if tree.type is torch.Size else value


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """Give a tree with each leaf changed. Local.

    >>> mapped(lambda leaf: leaf + 1, [torch.Size([2]), {"a": 3}])
    [torch.Size([3]), {'a': 4}]
    """
    leaves, tree = _pytree.tree_flatten(value)
    return grown(map(change, leaves), tree)


def with_tensors(change: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """Give a tree with each tensor changed. Local."""
    return mapped(lambda leaf: change(leaf) if isinstance(leaf, torch.Tensor) else leaf, value)


def containers_copied(value: Any) -> Any:
    """Give the same tensors and values in containers of their own, which may be changed. Local."""
    return value if isinstance(value, torch.Tensor) else mapped(lambda leaf: leaf, value)


def firsts(leaves: Sequence[Any]) -> list[int]:
    """Give for each leaf the number of the first one that is the same object. Pure.

    >>> one, other = object(), object()
    >>> firsts([one, other, one])
    [0, 1, 0]
    """
    seen: dict[int, int] = {}
    return [seen.setdefault(id(leaf), at) for at, leaf in enumerate(leaves)]


def storage_of(tensor: torch.Tensor) -> int:
    """Number a tensor's memory: views of it have the same; 0 for a sparse one, which has several. Local.

    The number may be another's once nobody holds the memory any more.
    """
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:
        return 0


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Give the bytes of tensors' memory, each once, by its place; sparse ones have several. Local."""
    return dict(place for tensor in tensors for part in parts_of(tensor) for place in [_place(part)])


def parts_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Give the tensors that hold a tensor's numbers: itself, or those that a sparse one is made of. Local."""
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    if tensor.is_mkldnn:
        return torch.ops.mkldnn.data_ptr(tensor), torch.ops.mkldnn._nbytes(tensor)
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


class Looking(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator and changes none of them."""

    supports_higher_order_operators = True

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Let torch.cond go its usual way, which a mode of other kinds would change."""
        return True
