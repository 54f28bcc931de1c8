"""Ranks agree: one rank asks the filesystem for all, and a failure of one is raised on all."""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from mpi4py import MPI

from hpctrain import errors
from hpctrain.errors import HpctrainError, Own, RankError

T = TypeVar("T")
PACKAGE = str(Path(__file__).parent) + os.sep
CALLS, CALLED_IN = ("_call_impl", "_wrapped_call_impl"), os.path.join("torch", "nn", "modules", "module.py")
"""Where torch calls a module."""
MACHINERY = (
    os.path.join("torch", "autograd", ""),
    os.path.join("torch", "utils", "_contextlib.py"),
    "<frozen importlib",
)
"""In the names of files that a user's error goes through on its way."""
NOT_RAISED = (StopIteration, StopAsyncIteration)
"""Python takes them for the end of a generator that they pass through."""


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
    its class (and exit status); any other exception becomes a `RankError` that is also of its class, where a
    rank knows that, with its plain attributes, and whose text is the traceback of the failing rank;
    `brief` is its part that is about the user's code.
    """
    first = comm.allreduce(comm.size if failure is None else comm.rank, op=MPI.MIN)
    if first == comm.size:
        return
    alone = comm.allreduce(int(failure is not None)) < comm.size
    mine = describe(failure) if comm.rank == first and failure is not None else None
    kind, own, text, brief, named, rank = comm.bcast(mine, first)
    if comm.size > 1 and name_rank and alone and not named:
        who = f"rank {rank} of {MPI.COMM_WORLD.size}: "
        text, brief, named = who + text, who + brief if brief else "", True
    error = also(*own[:2])(text) if own else getattr(errors, kind)(text)
    error.named = named
    if isinstance(error, RankError):
        error.own, error.brief = own, brief
        for name, value in own[2].items() if own else ():
            with suppress(Exception):  # of a class that is not here, or refuses it
                setattr(error, name, value)
    error.agreed, error.agreed_on = True, comm
    raise error from (failure if comm.rank == first else None)


@contextmanager
def of_users(place: str) -> Iterator[None]:
    """Give an error of the user's code, or of a library, as one of ours that says where it came up. Local."""
    try:
        yield
    except HpctrainError:
        raise
    except Exception as error:
        error.add_note(place)
        _, own, text, brief, _, _ = describe(error)
        failure = RankError(text)
        failure.own, failure.brief = own, brief
        raise failure from None


def describe(failure: Exception) -> tuple[str, Own | None, str, str, bool, int]:
    """Give the class of ours, what is known of another, text, brief, if a rank is named, this rank. Local."""
    rank = MPI.COMM_WORLD.rank
    if isinstance(failure, HpctrainError):
        ours = (kind for kind in type(failure).__mro__ if getattr(errors, kind.__name__, None) is kind)
        own, text, brief = getattr(failure, "own", None), str(failure), getattr(failure, "brief", "")
        return next(ours).__name__, own, text, brief, failure.named, rank
    kind = type(failure)
    text = "".join(traceback.format_exception(failure)).rstrip()
    told = dict(vars(failure))
    for name in ("errno", "strerror", "filename"):
        with suppress(Exception):  # a property of the user's
            told[name] = getattr(failure, name, None)
    plain = {name: value for name, value in told.items() if type(value) in (bool, int, float, str)}
    return "RankError", (kind.__module__, kind.__qualname__, plain), text, brief_of(failure), False, rank


def brief_of(failure: Exception) -> str:
    """Give the traceback without this trainer's frames and torch's machinery. Local.

    Empty where no other frame is in it: then it is about this trainer.
    """
    first = traceback.TracebackException.from_exception(failure)
    every: list[traceback.TracebackException | None] = [first]
    told = False
    for one in every:
        if one is not None:
            kept = [frame for frame in one.stack if not _is_machinery(frame)]
            told = told or bool(kept)
            one.stack[:] = kept
            every += [one.__cause__, one.__context__]
    return "".join(first.format()).rstrip() if told else ""


def _is_machinery(frame: traceback.FrameSummary) -> bool:
    called = frame.name in CALLS and frame.filename.endswith(CALLED_IN)
    inside = any(part in frame.filename for part in MACHINERY)
    return called or inside or frame.filename.startswith(PACKAGE)


def also(module: str, name: str) -> type[RankError]:
    """Give a RankError that is caught as the class of that name, too, where there is one here. Local.

    >>> isinstance(also("builtins", "KeyError")("no such layer"), KeyError), also("gone", "GoneError")
    (True, <class 'hpctrain.errors.RankError'>)
    """
    kind = getattr(sys.modules.get(module), name, None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)) or issubclass(kind, NOT_RAISED):
        return RankError
    try:
        found = type(kind.__name__, (RankError, kind), {"__module__": module})
        found("").agreed = True
    except Exception:  # it is made so that no class can be both, or does what it likes
        return RankError
    return found
