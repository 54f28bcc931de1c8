"""Parts of a bucket: every unit has one owner, on nodes of any size."""

from hypothesis import given
from hypothesis import strategies as st

from hpctrain.averaging.lanes import lanes_of
from hpctrain.averaging.space import UNIT


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 40), st.randoms())
def test_every_unit_has_one_owner(sizes, units, random):
    node_of = [node for node, size in enumerate(sizes) for _ in range(size)]
    random.shuffle(node_of)
    bucket = (3 * UNIT, (3 + units) * UNIT)
    owned = []
    for rank in range(len(node_of)):
        place = lanes_of(node_of, rank)
        assert (place.nodes, place.lanes) == (len(sizes), min(sizes))
        assert place.local_size == node_of.count(node_of[rank])
        start, stop = place.mine(bucket)
        assert start % UNIT == stop % UNIT == 0
        owned += range(start // UNIT, stop // UNIT)
        if place.lane is not None:
            begin, end = place.slice(bucket, place.lane)
            assert begin <= start <= stop <= end or start == stop
    assert sorted(owned) == list(range(3, 3 + units))


def test_ranks_beyond_the_smallest_node_carry_nothing():
    places = [lanes_of([0, 0, 0, 1], rank) for rank in range(4)]
    assert [p.lane for p in places] == [0, None, None, 0]
    bucket = (0, 8 * UNIT)
    assert [p.mine(bucket) for p in places] == [(0, 4 * UNIT), (0, 0), (0, 0), (4 * UNIT, 8 * UNIT)]
