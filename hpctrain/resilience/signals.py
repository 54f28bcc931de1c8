"""A signal asks for a stop: the flag rides in the next step's sum, so all ranks stop together.

SIGUSR1 is what Slurm sends ahead of the time limit (`--signal=B:USR1@120`), SIGTERM what a
scheduler or mpirun sends before it kills, SIGINT what Ctrl-C sends.
"""

import signal
from types import FrameType, TracebackType
from typing import Any

WATCHED = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """A context in which WATCHED signals set `name` instead of killing this rank."""

    def __init__(self) -> None:
        """No signal yet."""
        self.name = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        """Install the handlers; only the main thread can, elsewhere nothing is installed."""
        try:
            for number in WATCHED:
                self._before[number] = signal.signal(number, self._note)
        except ValueError:
            pass
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the earlier handlers back; but what Slurm sends does not kill a rank that is about to leave."""
        for number, handler in self._before.items():
            asked = number == signal.SIGUSR1 and handler == signal.SIG_DFL
            signal.signal(number, signal.SIG_IGN if asked else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
