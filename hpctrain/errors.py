"""Errors that say what was asked, what was found and what to do, and the exit statuses."""

from collections.abc import Iterable
from difflib import get_close_matches

DONE = 0
FAILED = 1
WRONG_INPUT = 2
STOPPED_EARLY = 75


class HpctrainError(Exception):
    """An error whose text is written for the user; no traceback is shown for it."""

    status = FAILED
    agreed = False
    """Whether all ranks raise it: then each can leave in peace, else the job must be aborted."""
    agreed_on: object = None
    """The communicator whose ranks agreed on it."""
    named = False
    """Whether the text says which rank failed."""
    log: str = ""
    """The file that has the whole text, if one has it."""


class ConfigError(HpctrainError):
    """The configuration or the arguments are wrong (exit status 2)."""

    status = WRONG_INPUT


class DataError(HpctrainError):
    """The data are wrong (exit status 2)."""

    status = WRONG_INPUT


class CheckpointError(HpctrainError):
    """A checkpoint can't be written or read."""


class DivergedError(HpctrainError):
    """The loss or the gradient is no longer a number."""


class DriftError(HpctrainError):
    """Replicas that must hold the same bits hold different ones."""


class StopAskedError(HpctrainError):
    """A signal asked for a stop while a split was measured; the run is to end with a checkpoint."""

    status = STOPPED_EARLY


TOO_FEW = "more than 1 value per channel"
"""In what torch says where BatchNorm has a single number of a channel."""
FEWER_MICRO_BATCHES = "set parallel.micro_batches lower; the last batch of an epoch may have few samples"


def text_of(error: BaseException) -> str:
    """Give an error's text, though its own code may fail to make it. Local."""
    try:
        return str(error)
    except Exception as other:
        return f"(no text: {type(other).__name__} where it is made)"


Own = tuple[str, str, dict[str, bool | int | float | str]]
"""Module and name of an error's class, and its plain attributes."""


class RankError(HpctrainError):
    """A rank failed with an error of the user's code or of a library; the text is its traceback."""

    own: Own | None = None
    """What is known of that error, if ranks have agreed on it."""
    brief = ""
    """The text without frames that say nothing of the user's code, if any is left."""

    def __new__(cls, *text: str) -> "RankError":
        """Take the text alone: a class that this one is joined with may ask for more."""
        return super().__new__(cls, *text)

    def __init__(self, *text: str) -> None:
        """Take the text alone."""
        Exception.__init__(self, *text)

    __str__ = Exception.__str__


def nearest(name: str, legal: Iterable[str], most: int = 3, all_are: str = "legal are") -> str:
    """Name the legal names nearest to a wrong one, for the end of an error message.

    >>> nearest("stpes", ["steps", "seed", "batch"])
    'did you mean steps?'
    >>> nearest("zzz", ["steps", "seed"])
    'legal are seed, steps'
    """
    legal = sorted(legal)
    found = get_close_matches(name, legal, n=most, cutoff=0.5)
    if found:
        return f"did you mean {', '.join(found)}?"
    return f"{all_are} {', '.join(legal)}" if legal else "none are legal here"
