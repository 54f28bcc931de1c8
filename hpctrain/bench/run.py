"""`hpctrain bench`: choose what is measured, give it as a table or as JSON."""

import os

from mpi4py import MPI

from hpctrain.bench import allreduce, measure, pipeline, stage_cases, step
from hpctrain.errors import ConfigError, nearest
from hpctrain.room import keep_memory
from hpctrain.topology import Topology
from hpctrain.wire import together


def bench(
    what: str, cases: list[str] | None, as_json: bool, comm: MPI.Intracomm, rounds: int | None = None
) -> str:
    """Measure on the ranks of `comm`; give the text. Collective."""
    with together(comm, name_rank=False):  # each rank finds the same
        check(what, cases or [], rounds)
    keep_memory(os.environ)
    stages = comm.size if what == "pipeline" else 1
    with Topology.build(comm, stages, device="cpu") as topology:
        measured = {"allreduce": allreduce, "pipeline": pipeline, "step": step}[what]
        if measured is allreduce:
            rows = allreduce.bench(topology, [int(case) for case in cases] if cases else None, rounds)
        else:
            rows = measured.bench(topology, cases, rounds)
    return measure.document(rows) if as_json else measure.table(rows, measured.CONTENDERS)


def check(what: str, cases: list[str], rounds: int | None) -> None:
    """Refuse a case that is none, and too few rounds. Pure. Raises ConfigError."""
    if rounds is not None and rounds < 2:
        raise ConfigError(f"--rounds {rounds}: two or more were expected, for medians and their spread")
    if what == "allreduce":
        bad = [case for case in cases if not case.isdigit() or int(case) % 4096 or not int(case)]
        if bad:
            raise ConfigError(f"--case {bad[0]}: bytes, a multiple of 4096, were expected")
        return
    known = [*stage_cases.CASES] if what == "pipeline" else [*step.CASES]
    bad = [case for case in cases if case not in known]
    if bad:
        raise ConfigError(f"--case {bad[0]!r} is no case: {nearest(bad[0], known)}")
