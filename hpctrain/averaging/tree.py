"""The order of a sum over the micro-batches of a step: one fixed binary tree, shared out. Pure.

      [0, 5)           ranks compute  r0: 0 1 2   r1: 3 4
      ├── [0, 4)       rank 0 holds [0, 2) and [2, 3), rank 1 holds [3, 4) and [4, 5):
      │   ├── [0, 2)   the largest subtrees that lie inside one rank
      │   └── [2, 4)
      └── [4, 5)       the sum is  (([0,2) + ([2,3) + [3,4))) + [4,5))  on any layout

A tree is a pair (left, right) of trees, or a leaf. The left child of [a, b) holds the largest
power of two below b - a: a rank that computes [2, 3) alone makes the same bits as one that
computes all, because floating-point additions happen between the same numbers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

Range = tuple[int, int]
Tree = Any
"""A pair of trees, or a leaf of any other type."""


class Pair(tuple[Tree, Tree]):
    """An addition of two trees."""

    __slots__ = ()


def split(start: int, stop: int) -> int:
    """Where the children of the range meet.

    >>> split(0, 5), split(0, 4), split(4, 6)
    (4, 2, 5)
    """
    half: int = 1 << ((stop - start - 1).bit_length() - 1)
    return start + half


def largest(start: int, stop: int, inside: Callable[[int, int], Any]) -> Tree:
    """Cut the tree over [start, stop) at the largest ranges for which `inside` gives a leaf.

    >>> largest(0, 5, lambda a, b: (a, b) if b <= 3 or a >= 3 else None)
    (((0, 2), ((2, 3), (3, 4))), (4, 5))
    """
    leaf = inside(start, stop)
    if leaf is not None:
        return leaf
    middle = split(start, stop)
    return Pair((largest(start, middle, inside), largest(middle, stop, inside)))


def leaves(tree: Tree) -> list[Any]:
    """Give the leaves of a tree from left to right."""
    if isinstance(tree, Pair):
        return leaves(tree[0]) + leaves(tree[1])
    return [tree]


def shares(count: int, owners: Sequence[int]) -> Tree:
    """Give the tree over 0 … count-1 with leaves (owner, start, stop), as large as one owner has.

    `owners[v]` computes micro-batch v.

    >>> shares(3, [0, 0, 1])
    ((0, 0, 2), (1, 2, 3))
    """

    def inside(start: int, stop: int) -> tuple[int, int, int] | None:
        alone = len(set(owners[start:stop])) == 1
        return (owners[start], start, stop) if alone else None

    return largest(0, count, inside)


def fold(items: Sequence[Any]) -> Tree:
    """Give the tree that adds items from left to right.

    >>> fold([1, 2, 3])
    ((1, 2), 3)
    """
    tree = items[0]
    for item in items[1:]:
        tree = Pair((tree, item))
    return tree


def relabel(tree: Tree, name: Callable[[Any], Any]) -> Tree:
    """Give the same tree with other leaves."""
    if isinstance(tree, Pair):
        return Pair((relabel(tree[0], name), relabel(tree[1], name)))
    return name(tree)


def depth(tree: Tree) -> int:
    """Count the scratch blocks that a sum needs.

    >>> depth(fold([1, 2, 3])), depth(Pair((1, Pair((2, 3)))))
    (1, 2)
    """
    if not isinstance(tree, Pair):
        return 0
    return max(1, depth(tree[0]), depth(tree[1]) + 1)


Additions = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""What a sum does to one block, in order: (left, right, into)."""


def additions(
    tree: Tree,
    read: Callable[[Any], torch.Tensor],
    scratch: Sequence[torch.Tensor],
    home: torch.Tensor | None = None,
) -> tuple[Additions, torch.Tensor]:
    """Plan the sum of a tree over one block; give the additions and where the sum will be.

    `read` gives the block of a leaf, which is not changed, but for `home`: the leaf in whose
    memory the sum is to end, once it has been added itself. All have the shape (n,). Local.
    """
    plan: Additions = []

    def add(part: Tree, at: int) -> torch.Tensor:
        if not isinstance(part, Pair):
            return read(part)
        left = add(part[0], at)
        right = add(part[1], at + 1)
        into = scratch[at][: len(left)]
        if home is not None and (left is home or right is home):
            into = home
        plan.append((left, right, into))
        return into

    total = add(tree, 0)
    return plan, total


def evaluate(
    tree: Tree, read: Callable[[Any], torch.Tensor], scratch: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Add up the tree over one block; the result is a scratch block, or the only leaf itself. Local."""
    plan, total = additions(tree, read, scratch)
    for left, right, into in plan:
        torch.add(left, right, out=into)
    return total


class Growing:
    """The partial sums of one rank, while its micro-batches come in order.

    Slots hold partial sums; two that are siblings in the tree are added at once, so that
    about log2 of the micro-batches are kept.
    """

    def __init__(self, count: int) -> None:
        """Take the number of micro-batches of the step."""
        self.nodes: set[Range] = set()
        if count:
            largest(0, count, self._note)
        self.stack: list[tuple[int, int, int]] = []

    def _note(self, start: int, stop: int) -> Range | None:
        self.nodes.add((start, stop))
        return (start, stop) if stop - start == 1 else None

    def free(self) -> int:
        """Give the lowest slot that holds nothing."""
        taken = {slot for _, _, slot in self.stack}
        return next(slot for slot in range(len(taken) + 1) if slot not in taken)

    def push(self, micro_batch: int) -> list[tuple[int, int]]:
        """Put a micro-batch in the free slot; give the additions (into slot, of slot) that follow."""
        self.stack.append((micro_batch, micro_batch + 1, self.free()))
        merges = []
        while len(self.stack) > 1:
            (a, b, left), (c, d, right) = self.stack[-2:]
            if b != c or (a, d) not in self.nodes or split(a, d) != b:
                break
            merges.append((left, right))
            self.stack[-2:] = [(a, d, left)]
        return merges

    def slots(self, mine: Sequence[int]) -> int:
        """Count the slots that these micro-batches need; nothing is changed."""
        most = 1
        trial = Growing(0)
        trial.nodes = self.nodes
        for micro_batch in mine:
            most = max(most, trial.free() + 1)
            trial.push(micro_batch)
        return most


def deal(ranks: int, owners: Sequence[int]) -> tuple[int, Tree]:
    """Give the slots that the busiest rank needs, and the tree of (rank, slot) over its partial sums.

    >>> deal(2, [0, 0, 1])
    (2, ((0, 0), (1, 0)))
    """
    count, most = len(owners), 1
    slot_of: dict[tuple[int, int], tuple[int, int]] = {}
    for rank in range(ranks):
        mine = [v for v, owner in enumerate(owners) if owner == rank]
        growing = Growing(count)
        most = max(most, growing.slots(mine))
        for v in mine:
            growing.push(v)
        slot_of.update({(a, b): (rank, slot) for a, b, slot in growing.stack})
    return most, relabel(shares(count, owners), lambda leaf: slot_of[leaf[1], leaf[2]])
