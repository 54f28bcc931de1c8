"""`hpctrain bench`: choose what is measured, give it as a table or as JSON."""

from mpi4py import MPI

from hpctrain.bench import allreduce, measure, step
from hpctrain.errors import ConfigError, nearest
from hpctrain.topology import Topology


def bench(what: str, cases: list[str] | None, as_json: bool, comm: MPI.Intracomm) -> str:
    """Measure on the ranks of `comm`; give the text. Collective."""
    with Topology.build(comm, device="cpu") as topology:
        if what == "allreduce":
            bad = [case for case in cases or [] if not case.isdigit() or int(case) % 4096 or not int(case)]
            if bad:
                raise ConfigError(f"--case {bad[0]}: bytes, a multiple of 4096, were expected")
            rows = allreduce.bench(topology, [int(case) for case in cases] if cases else None)
        else:
            bad = [case for case in cases or [] if case not in step.CASES]
            if bad:
                raise ConfigError(f"--case {bad[0]!r} is no case: {nearest(bad[0], step.CASES)}")
            rows = step.bench(topology, cases)
    return measure.document(rows) if as_json else measure.table(rows)
