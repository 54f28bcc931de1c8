"""An uncaught exception on one rank ends all ranks, its own message first.

Plain MPI leaves the other ranks waiting for ever in their next collective call. The hook is
installed when a topology is built, however the program was started, and stands for as long
as a topology is open. So is the telling where in Python a rank crashed, say by a segmentation fault.
"""

import array
import faulthandler
import fcntl
import sys
import termios
import threading
import time
import traceback
from contextlib import suppress
from types import TracebackType

from mpi4py import MPI

# Ranks that fail at the same moment with the same error would print it once each: the higher
# ones wait a little, and the abort of the lowest ends them before they print.
STAGGER_SECONDS = 0.25
LONGEST_WAIT_SECONDS = 2.0
READ_SECONDS = 1.0  # at most so long for mpirun to take this rank's last words
PASSED_ON_SECONDS = 0.05  # and to print them: its own message of the abort goes another way

_open: list[MPI.Intracomm] = []
_before = (sys.excepthook, threading.excepthook)
_tells_crashes = False


def install(world: MPI.Intracomm) -> None:
    """Make an uncaught exception of any thread abort all ranks of `world`. Local, cheap."""
    global _before, _tells_crashes
    if not _open:
        _before = (sys.excepthook, threading.excepthook)
        _tells_crashes = not faulthandler.is_enabled()  # after MPI_Init: MPI's own, of the C stack, follows
        if _tells_crashes:
            with suppress(Exception):  # a stderr without a descriptor
                faulthandler.enable()
        sys.excepthook = end_all_ranks
        threading.excepthook = _thread_hook
    _open.append(world)


def remove(world: MPI.Intracomm, failing: bool = False) -> None:
    """Take the hook away when the last topology closes; an exception on its way keeps it.

    With failing=True it is taken away all the same: the ranks agreed on the exception.
    """
    if sys.exc_info()[0] is not None and not failing:
        return
    _open[:] = [comm for comm in _open if comm is not world]
    if not _open:
        sys.excepthook, threading.excepthook = _before
        if _tells_crashes:
            faulthandler.disable()


def end_all_ranks(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback, the rank and the place below it, and abort the job with status 1."""
    world = _open[0]
    rank, size = world.rank, world.size
    time.sleep(min(STAGGER_SECONDS * rank, LONGEST_WAIT_SECONDS))
    text = "".join(traceback.format_exception(kind, error, trace))
    ending = f": all {size} ranks are ended" if size > 1 else ""
    last = traceback.extract_tb(trace)[-1:]
    place = "".join(f" at {frame.filename}:{frame.lineno}" for frame in last)
    try:
        _say(f"{text}r{rank}/{size} | uncaught {kind.__name__}{place}{ending}\n")
    finally:
        if size > 1:
            world.Abort(1)


def _thread_hook(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_value is not None and arguments.exc_type is not SystemExit:
        end_all_ranks(arguments.exc_type, arguments.exc_value, arguments.exc_traceback)


def end_with_message(world: MPI.Intracomm, text: str, status: int) -> None:
    """Print an error of this rank alone and abort the job with a status; does not return."""
    time.sleep(min(STAGGER_SECONDS * world.rank, LONGEST_WAIT_SECONDS))
    try:
        _say(f"r{world.rank}/{world.size} | error: {text}\n")
    finally:
        world.Abort(status)


def _say(text: str) -> None:
    """Write to stderr, and wait till mpirun has read it: an abort overtakes what lies in the pipe.

    Raises what a stderr of the program's own raises; where there is none, nothing is said.
    """
    if sys.stderr is None:
        return
    sys.stderr.write(text)
    sys.stderr.flush()
    until = time.monotonic() + READ_SECONDS
    while _unread() and time.monotonic() < until:
        time.sleep(0.005)
    time.sleep(PASSED_ON_SECONDS)


def _unread() -> int:
    """Bytes in the pipe of stderr that its reader has not taken; 0 for whatever is no pipe."""
    unread = array.array("i", [0])
    with suppress(Exception):  # a program may have put anything in its place
        fcntl.ioctl(sys.stderr.fileno(), termios.FIONREAD, unread)
    return unread[0]
