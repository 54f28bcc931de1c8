"""Ranks agree: one rank asks the filesystem for all, and a failure of one is raised on all."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from mpi4py import MPI

from hpctrain import errors
from hpctrain.errors import HpctrainError, RankError

T = TypeVar("T")


def from_root(comm: MPI.Intracomm, function: Callable[[], T]) -> T:
    """Call a function on rank 0 and give its result, or its error, to all ranks. Collective."""
    result: T | None = None
    with together(comm, name_rank=False):
        if comm.rank == 0:
            result = function()
    return comm.bcast(result, root=0)  # type: ignore[no-any-return]


@contextmanager
def together(comm: MPI.Intracomm, name_rank: bool = True) -> Iterator[None]:
    """Run the body on all ranks; if it fails on any, raise that failure on all. Collective."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        if getattr(error, "agreed_on", None) is comm:
            raise  # from a collective call inside: every rank has raised it already
        failure = error
    except SystemExit as error:  # this rank would leave and the others wait for it
        failure = RankError(f"sys.exit({error.code}) was called")
    raise_together(comm, failure, name_rank)


def raise_together(comm: MPI.Intracomm, failure: Exception | None, name_rank: bool = True) -> None:
    """Raise the failure of the lowest failing rank on all ranks, with its number in the job. Collective.

    Where every rank failed (a wrong configuration, say) the name is left out, and where ranks of `comm`
    agreed on it before it is not named again. Does nothing where no rank failed. An `HpctrainError` keeps
    its class (and exit status); any other exception becomes a `RankError` whose text is the traceback of
    the failing rank.
    """
    first = comm.allreduce(comm.rank if failure else comm.size, op=MPI.MIN)
    if first == comm.size:
        return
    alone = comm.allreduce(int(failure is not None)) < comm.size
    kind, text, named, rank = comm.bcast(describe(failure) if comm.rank == first and failure else None, first)
    if comm.size > 1 and name_rank and alone and not named:
        text, named = f"rank {rank} of {MPI.COMM_WORLD.size}: {text}", True
    error = getattr(errors, kind, RankError)(text)
    error.named = named
    error.agreed, error.agreed_on = True, comm
    raise error from (failure if comm.rank == first else None)


def describe(failure: Exception) -> tuple[str, str, bool, int]:
    """Class name and text by which a failure travels between ranks; whether a rank is named; this rank."""
    rank = MPI.COMM_WORLD.rank
    if isinstance(failure, HpctrainError):
        known = (kind.__name__ for kind in type(failure).__mro__ if hasattr(errors, kind.__name__))
        return next(known), str(failure), failure.named, rank
    return "RankError", "".join(traceback.format_exception(failure)).rstrip(), False, rank
