import pytest

from hpctrain.errors import ConfigError, DataError, RankError
from hpctrain.wire import from_root, raise_together, together


@pytest.mark.mpi
def test_from_root_gives_all_the_same(world):
    assert from_root(world, lambda: f"rank {world.rank}") == "rank 0"


@pytest.mark.mpi
def test_error_of_the_root_is_raised_everywhere_without_a_rank(world):
    def wrong():
        raise ConfigError("no such thing")

    with pytest.raises(ConfigError, match="^no such thing$") as caught:
        from_root(world, wrong)
    assert caught.value.agreed


@pytest.mark.mpi
def test_one_rank_fails_all_raise_with_its_name(world):
    last = world.size - 1
    with pytest.raises(DataError) as caught, together(world):
        if world.rank == last:
            raise DataError("torn file")
    name = f"rank {last} of {world.size}: " if world.size > 1 else ""
    assert str(caught.value) in (f"{name}torn file", "torn file")
    if world.size > 1:
        assert str(caught.value) == f"{name}torn file"


@pytest.mark.mpi
def test_a_users_exception_travels_as_its_traceback(world):
    with pytest.raises(RankError, match=r"(?s)Traceback.*ZeroDivisionError"), together(world):
        if world.rank == 0:
            _ = 1 / 0


@pytest.mark.mpi
def test_where_all_fail_no_rank_is_named(world):
    with pytest.raises(ConfigError, match="^wrong everywhere$"):
        raise_together(world, ConfigError("wrong everywhere"))


@pytest.mark.mpi
def test_no_failure_no_raise(world):
    raise_together(world, None)
    with together(world):
        pass
    assert world.allreduce(1) == world.size


@pytest.mark.mpi
def test_sys_exit_on_one_rank_is_a_failure_of_all(world):
    with pytest.raises(RankError, match=r"sys.exit\(3\) was called"), together(world):
        if world.rank == world.size - 1:
            raise SystemExit(3)


@pytest.mark.mpi
def test_a_failure_beside_a_collective_call_inside_ends_all_ranks_alike(world):
    """The last rank fails before the collective call in which the others agree: one agreement, not two."""
    with pytest.raises((RankError, ConfigError)), together(world):
        if world.rank == world.size - 1:
            raise ConfigError("mine alone")
        with together(world):
            pass
    assert world.allreduce(1) == world.size
