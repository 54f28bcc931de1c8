"""One step of the stages as it ran, beside the same schedule simulated with the measured passes.

What lies between the passes is messages and waiting for them. `passes.py` simulates the step; measured less
simulated is what messages, uneven passes and crowded cores cost.
"""

import platform
import time

import numpy as np
from mpi4py import MPI

from hpctrain.assemble import Job
from hpctrain.log import LOGGER
from hpctrain.pipeline.expected import ends
from hpctrain.pipeline.simulate import Span
from hpctrain.report import pictures
from hpctrain.report.passes import Told, again, as_simulation, expectation, row, table
from hpctrain.report.run_folder import RunFolder
from hpctrain.staged import StagedEngine

WATCHED = 3
"""The step of a session that is measured: in the first ones memory is made and layers show their ways."""

ROUNDS = 16
"""Of questions for the time."""


class Timeline:
    """Watches one step of the first replica's stages."""

    def __init__(self, job: Job, run: RunFolder) -> None:
        """Take the parts."""
        self.job, self.run = job, run
        self.number = WATCHED
        """The step of the session that is measured: a later one where the replica has no samples in that."""

    def watched(self, number: int) -> StagedEngine | None:
        """Give the engine, if it is watched in this step (from 1) of the session. Local."""
        engine = self.job.engine
        if number == self.number and self.job.topology.replica == 0 and isinstance(engine, StagedEngine):
            return engine
        return None

    def before(self, number: int) -> None:
        """Begin to watch, if this is the step. Local."""
        engine = self.watched(number)
        if engine:
            engine.watch()

    def after(self, number: int, step: int) -> None:
        """Tell of the watched step: log, row, picture. Collective (stages)."""
        engine = self.watched(number)
        if engine is None:
            return
        passes = engine.unwatch()
        if not passes:  # this replica had no samples: its ranks all watch the next step instead
            self.number += 1
            return
        modules = [ends(names) for names in engine.pipeline.names()]
        topology = self.job.topology
        mine = Told(
            topology.world_rank,
            platform.node(),
            modules,
            engine.pipeline.rows(),
            [sum(p.numel() for p in own) for own in engine.parameters],
            on_one_clock(topology.comms.pipe, passes),
        )
        ranks = topology.comms.pipe.gather(mine)
        if not self.run.writes or ranks is None:
            return
        try:
            self.tell(step, ranks)
        except Exception as error:  # what is told of a step does not undo it
            LOGGER.warning("nothing to tell of the stages: %s: %s", type(error).__name__, error)

    def tell(self, step: int, ranks: list[Told]) -> None:
        """Log the table, write the row, draw the picture. Local: world rank 0."""
        measured = as_simulation([told.spans for told in ranks])
        assert self.job.pipeline is not None
        simulated = again(self.job.schedule, self.job.pipeline, measured)
        expected = expectation(self.job, measured)
        for line in table(self.job, step, ranks, measured, simulated, expected):
            LOGGER.info(line)
        self.run.row("pipeline", step, **row(self.job, ranks, measured, simulated, expected))
        if self.job.config.report.pictures:
            title = f"{self.job.schedule}, step {step}"
            drawn = {"measured": measured, "simulated with these passes": simulated}
            if expected:
                drawn["expected before the cut"] = expected
            pictures.timeline(drawn, title, self.run.pictures / "pipeline.png")


def on_one_clock(comm: MPI.Intracomm, passes: list[Span]) -> list[Span]:
    """Give this rank's passes by the clock of rank 0. Collective."""
    ahead = seconds_ahead(comm)
    return [Span(s.stage, s.instruction, s.start - ahead, s.end - ahead) for s in passes]


def seconds_ahead(comm: MPI.Intracomm) -> float:
    """Say by how much this rank's clock is ahead of rank 0's. Collective.

    Rank 0 asks each rank in turn; the answer that came back soonest counts, and was given in the middle
    between question and answer (Cristian 1989): right to half of that time.
    """
    ahead, now = 0.0, np.empty(1)
    for other in range(1, comm.size):
        if comm.rank == 0:
            rounds = []
            for _ in range(ROUNDS):
                asked = time.perf_counter()
                comm.Send(now, other)
                comm.Recv(now, other)
                back = time.perf_counter()
                rounds.append((back - asked, now[0] - (asked + back) / 2))
            comm.Send(np.array([min(rounds)[1]]), other)
        elif comm.rank == other:
            for _ in range(ROUNDS):
                comm.Recv(now, 0)
                now[0] = time.perf_counter()
                comm.Send(now, 0)
            comm.Recv(now, 0)
            ahead = float(now[0])
    return ahead
