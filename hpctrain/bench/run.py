"""`hpctrain bench`: choose what is measured, give it as a table or as JSON."""

import os

from mpi4py import MPI

from hpctrain.bench import allreduce, measure, pipeline, step
from hpctrain.errors import ConfigError, nearest
from hpctrain.room import keep_memory
from hpctrain.topology import Topology


def bench(
    what: str, cases: list[str] | None, as_json: bool, comm: MPI.Intracomm, rounds: int | None = None
) -> str:
    """Measure on the ranks of `comm`; give the text. Collective."""
    if rounds is not None and rounds < 2:
        raise ConfigError(f"--rounds {rounds}: two or more were expected, for medians and their spread")
    keep_memory(os.environ)
    stages = comm.size if what == "pipeline" else 1
    with Topology.build(comm, stages, device="cpu") as topology:
        measured = {"allreduce": allreduce, "pipeline": pipeline, "step": step}[what]
        if measured is allreduce:
            bad = [case for case in cases or [] if not case.isdigit() or int(case) % 4096 or not int(case)]
            if bad:
                raise ConfigError(f"--case {bad[0]}: bytes, a multiple of 4096, were expected")
            rows = allreduce.bench(topology, [int(case) for case in cases] if cases else None, rounds)
        else:
            bad = [case for case in cases or [] if case not in measured.CASES]
            if bad:
                raise ConfigError(f"--case {bad[0]!r} is no case: {nearest(bad[0], measured.CASES)}")
            rows = measured.bench(topology, cases, rounds)
    return measure.document(rows) if as_json else measure.table(rows, measured.CONTENDERS)
