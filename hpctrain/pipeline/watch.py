"""What every rank of a pipeline is doing, told when a message is missing for long.

A rank that has waited for PATIENCE asks the others; a thread of each of them, which looks for questions
once a second, answers also while the rank itself computes or hangs. Who does not answer has stopped, is gone,
or sits in code that holds Python's lock. The lowest rank that waits tells all of it, and goes on waiting: a
filesystem may only be slow.
"""

import platform
import re
import threading
import time

from mpi4py import MPI

from hpctrain.log import LOGGER
from hpctrain.pipeline.schedule import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Instruction,
    Receive,
    ReceiveGradient,
    Send,
    SendGradient,
)
from hpctrain.topology import named

PATIENCE_SECONDS = 60.0
"""Of waiting for one message before the others are asked; then twice as long each time."""
LOOK_SECONDS = 1.0
ANSWER_SECONDS = 5.0
ASK, ANSWER = 0, 1
BETWEEN = "is between the pipeline's passes"
WORDS: dict[type[Instruction], str] = {
    Forward: "runs the forward pass",
    Backward: "runs the backward pass",
    BackwardInput: "runs the backward pass",
    BackwardWeight: "computes the weight gradients",
    Receive: "waits for the activations",
    Send: "sends the activations",
    ReceiveGradient: "waits for the gradients",
    SendGradient: "sends the gradients",
}


def at_work(told: str, seconds: float) -> bool:
    """Whether a rank that told this waits for nothing, and began with it less than `seconds` ago. Pure.

    >>> at_work("runs the forward pass of micro-batch 2 on stage 1 since 0 s", 15.0)
    True
    >>> at_work("waits for the gradients of micro-batch 2 on stage 0 since 0 s", 15.0)
    False
    """
    since = re.search(r" since (\d+) s$", told)
    return since is not None and not told.startswith("waits") and int(since[1]) < seconds


class Watch:
    """One rank's word on what it does, and its questions."""

    def __init__(self, pipe: MPI.Intracomm) -> None:
        """Take the ranks of the stages; start to answer where this MPI allows it. Collective."""
        self.comm = named(pipe.Dup(), "questions of a pipeline")
        self.names = pipe.allgather(f"rank {MPI.COMM_WORLD.rank} on {platform.node()}")
        self._doing: Instruction | str = BETWEEN
        self._stage, self._of = 0, ""
        self._since = time.monotonic()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        if pipe.size > 1 and pipe.allreduce(MPI.Query_thread(), op=MPI.MIN) == MPI.THREAD_MULTIPLE:
            self._thread = threading.Thread(target=self._answer, name="hpctrain answers", daemon=True)
            self._thread.start()

    def doing(self, what: Instruction | str = BETWEEN, stage: int = 0, of: str = "micro-batch") -> None:
        """Note what this rank begins with. Local."""
        self._doing, self._stage, self._of, self._since = what, stage, of, time.monotonic()

    def missing(self, rank: int | None, seconds: float) -> None:
        """Tell what all ranks do, if this one is the lowest that waits, for `rank` (None: all). Local."""
        others = [other for other in range(self.comm.size) if other != self.comm.rank and self._thread]
        while self.comm.Iprobe(MPI.ANY_SOURCE, ANSWER):
            self.comm.recv(tag=ANSWER)  # to a question of before, too late
        requests = [self.comm.isend(None, other, ASK) for other in others]
        found = dict.fromkeys(others, "")
        until = time.monotonic() + ANSWER_SECONDS
        while not all(found.values()) and time.monotonic() < until:
            for other in others:
                if self.comm.Iprobe(other, ANSWER):
                    found[other] = self.comm.recv(source=other, tag=ANSWER)
            time.sleep(LOOK_SECONDS / 20)
        MPI.Request.Testall(requests)
        if any(found[other].startswith("waits") for other in others if other < self.comm.rank):
            return
        silent = "does not answer: it has stopped, is gone, or is in code that holds Python's lock"
        found[self.comm.rank] = self.told()
        each = "; ".join(f"{self.names[other]} {found[other] or silent}" for other in sorted(found))
        late = [other for other in others if not found[other].startswith("waits")] if rank is None else [rank]
        for other in late:
            if at_work(found[other], seconds / 4):
                each += f"; {self.names[other]} is at work, so this goes on"
        who = " and ".join(self.names[other] for other in late) or "all stages"
        LOGGER.warning("waiting for %s for %.0f s: %s", who, seconds, each)

    def stop(self) -> None:
        """Answer no more. Local."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Free the communicator. Collective."""
        self.stop()
        self.comm.Free()

    def told(self) -> str:
        """Say what this rank does, and for how long. Local."""
        since = f"since {time.monotonic() - self._since:.0f} s"
        if isinstance(self._doing, str):
            return f"{self._doing} {since}"
        words = WORDS[type(self._doing)]
        return f"{words} of {self._of} {self._doing.micro_batch} on stage {self._stage} {since}"

    def _answer(self) -> None:
        status = MPI.Status()
        while not self._end.wait(LOOK_SECONDS):
            while self.comm.Iprobe(MPI.ANY_SOURCE, ASK, status):
                self.comm.recv(source=status.Get_source(), tag=ASK)
                self.comm.send(self.told(), status.Get_source(), ANSWER)
