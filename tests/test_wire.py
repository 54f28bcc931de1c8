import pytest
import torch
from mpi4py import MPI

from hpctrain.errors import ConfigError, DataError, RankError, text_of
from hpctrain.room import ran_out
from hpctrain.wire import brief_of, from_root, raise_together, together


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


class Broken(torch.nn.Module):
    def forward(self, x):
        return x / self.no_such_layer


@pytest.mark.mpi
def test_in_brief_a_traceback_is_of_the_users_code(world):
    """A run's last words; the whole one stays for log.txt."""
    with pytest.raises(AttributeError) as caught, together(world):
        from_root(MPI.COMM_SELF, lambda: torch.nn.Sequential(Broken())(1))
    brief, whole = caught.value.brief, str(caught.value)
    assert "return x / self.no_such_layer" in brief
    assert "hpctrain/wire.py" in whole
    assert "in _call_impl" in whole
    assert "hpctrain/wire.py" not in brief
    assert "in _call_impl" not in brief
    assert brief.splitlines()[-1] == whole.splitlines()[-1]
    assert len(set(world.allgather(brief))) == 1


@pytest.mark.mpi
def test_an_error_of_this_trainer_alone_is_told_whole(world):
    try:
        from_root(None, int)
    except AttributeError as error:
        found = error
    inside = found.with_traceback(found.__traceback__.tb_next)
    with pytest.raises(RankError) as caught, together(world):
        if world.rank == 0:
            raise_together(MPI.COMM_SELF, inside)
    assert not brief_of(inside)
    assert caught.value.brief == ""


class SpeechlessError(ValueError):
    """Its text can't be made, nor one of its attributes be asked for."""

    def __str__(self):
        return self.lost

    @property
    def errno(self):
        raise RuntimeError("of the error's own")


class Word(str):
    """No class that another process may unpickle it by."""

    __reduce__ = None


@pytest.mark.mpi
def test_an_error_whose_own_code_fails_is_told_all_the_same(world):
    error = SpeechlessError("x")
    error.word, error.number = Word("w"), 3
    with pytest.raises(ValueError, match="SpeechlessError") as caught, together(world):
        if world.rank == world.size - 1:
            raise error
    assert caught.value.number == 3
    assert not ran_out(error)
    assert text_of(error) == "(no text: AttributeError where it is made)"


@pytest.mark.mpi
def test_causes_that_were_never_raised_are_told_in_brief(world):
    def raises():
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise ValueError("outer") from OSError(f"never raised, beside {error}")

    with pytest.raises(ValueError, match="outer") as caught, together(world):
        from_root(MPI.COMM_SELF, raises)
    assert "hpctrain/wire.py" not in caught.value.brief
    assert "never raised" in caught.value.brief
    assert "raise ValueError" in caught.value.brief


class OwnError(ValueError):
    """Asks for more than a text."""

    def __init__(self, layer, shape):
        super().__init__(f"{layer}: {shape}")
        self.shape = shape


class PickyError(Exception):
    """Can't be made of a text."""

    def __new__(cls, layer, shape):
        return super().__new__(cls, layer)


@pytest.mark.mpi
@pytest.mark.parametrize(
    "error",
    [ValueError("v"), KeyError("k"), OSError(2, "o"), UnicodeDecodeError("utf8", b"", 0, 1, "u"), torch.OutOfMemoryError("m"),
     OwnError("layer", 3)],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_a_users_exception_is_one_of_its_class_on_all_ranks(world, error):
    with (
        pytest.raises(type(error), match=r"(?s)Traceback.*" + type(error).__name__) as caught,
        together(world),
    ):
        if world.rank == world.size - 1:
            raise error
    assert isinstance(caught.value, RankError)
    assert caught.value.agreed
    assert all(text == str(caught.value) for text in world.allgather(str(caught.value)))
    for name in ("errno", "strerror", "shape"):  # of OSError and OwnError
        assert getattr(caught.value, name, None) == getattr(error, name, None)


# one that bears the name of one of ours
Clashing = type("DataError", (Exception,), {"__module__": __name__, "__qualname__": "Clashing"})


@pytest.mark.mpi
def test_a_class_stays_where_ranks_agree_twice_and_names_of_ours_do_not_matter(world):
    with pytest.raises(Clashing, match="twice") as caught, together(world), together(world):
        raise Clashing("twice")
    assert isinstance(caught.value, RankError)
    assert not isinstance(caught.value, DataError)


@pytest.mark.mpi
@pytest.mark.parametrize(
    "error", [StopIteration("end"), PickyError("layer", 3)], ids=["StopIteration", "picky"]
)
def test_an_exception_that_nothing_else_can_be_is_a_rank_error(world, error):
    with pytest.raises(RankError, match=type(error).__name__) as caught:
        raise_together(world, error if world.rank == 0 else None)
    assert type(caught.value) is RankError


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
