"""The fixed tree: whatever ranks compute which micro-batches, the same additions are made."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.averaging import tree as trees
from hpctrain.data import order


def bracketed(tree, name):
    """Write the tree out: the order of the additions as text."""
    if isinstance(tree, trees.Pair):
        return f"({bracketed(tree[0], name)}+{bracketed(tree[1], name)})"
    return name(tree)


def whole(start, stop):
    """The tree over a range down to single micro-batches, as text."""
    tree = trees.largest(start, stop, lambda a, b: a if b - a == 1 else None)
    return bracketed(tree, str)


@given(st.integers(1, 70), st.integers(1, 12))
def test_shares_of_any_layout_make_the_same_tree(count, replicas):
    owners = order.replicas_of(replicas, count)
    shared = trees.shares(count, owners)
    assert bracketed(shared, lambda leaf: whole(leaf[1], leaf[2])) == whole(0, count)


@given(st.integers(1, 70), st.integers(1, 12))
def test_a_rank_that_adds_as_they_come_holds_the_leaves_of_its_share(count, replicas):
    owners = order.replicas_of(replicas, count)
    leaves = trees.leaves(trees.shares(count, owners))
    for rank in range(replicas):
        mine = [v for v, owner in enumerate(owners) if owner == rank]
        growing, texts = trees.Growing(count), {}
        most = growing.slots(mine)
        for v in mine:
            slot = growing.free()
            assert slot < most, "no slot is used that was not counted"
            texts[slot] = str(v)
            for into, of in growing.push(v):
                texts[into] = f"({texts[into]}+{texts.pop(of)})"
        held = {(a, b): texts[slot] for a, b, slot in growing.stack}
        assert held == {(a, b): whole(a, b) for owner, a, b in leaves if owner == rank}
        assert most <= 2 * max(1, count).bit_length() + 1, "about log2 of the micro-batches"


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20), st.integers(1, 6))
def test_evaluate_adds_in_the_order_of_the_tree(values, replicas):
    count = len(values)
    tree = trees.largest(0, count, lambda a, b: a if b - a == 1 else None)
    blocks = [torch.full((3,), value) for value in values]
    scratch = [torch.empty(3) for _ in range(trees.depth(tree))]
    found = trees.evaluate(tree, blocks.__getitem__, scratch)

    def by_hand(a, b):
        if b - a == 1:
            return np.float32(values[a])
        middle = trees.split(a, b)
        return np.float32(by_hand(a, middle) + by_hand(middle, b))

    assert found.tolist() == [float(by_hand(0, count))] * 3
    assert [float(b[0]) for b in blocks] == [float(np.float32(v)) for v in values], "leaves are not changed"


def test_the_sum_may_end_in_the_memory_of_a_leaf():
    for home in range(4):
        leaves = [torch.full((2,), float(10**at)) for at in range(4)]
        tree = trees.fold(range(4))
        scratch = [torch.empty(2) for _ in range(trees.depth(tree))]
        plan, total = trees.additions(tree, leaves.__getitem__, scratch, leaves[home])
        for left, right, into in plan:
            torch.add(left, right, out=into)
        assert total is leaves[home]
        assert total.tolist() == [1111.0, 1111.0]
