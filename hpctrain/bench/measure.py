"""Contenders take turns; a case gives each one's median and quartiles, and ratios to ours."""

import json
import os
import platform
import random
import socket
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from mpi4py import MPI

from hpctrain.errors import HpctrainError
from hpctrain.processor import processor
from hpctrain.topology import Topology
from hpctrain.version import __version__

C = TypeVar("C")
Contenders = Mapping[str, Callable[[], None]]
WARM_UP = 3
YIELDING = "OMPI_MCA_mpi_yield_when_idle"


def alternate(
    comm: MPI.Intracomm, contenders: Contenders, rounds: int, repeats: int = 1
) -> dict[str, list[float]]:
    """Time each contender once a round, in turn; seconds until the last rank is done. Collective.

    Each round has another order, the same on all ranks: what one leaves in the caches is not always found by
    the same one.
    What takes microseconds is repeated, and the mean taken: ranks leave a barrier apart. On one
    node the ranks' clock is one: time runs from the first rank's start to the last one's end, so
    that a rank which has to wait for its core is seen to wait, whether it communicates or not.
    """
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    one_clock = node.size == comm.size
    node.Free()
    for _ in range(min(WARM_UP, rounds)):
        for work in contenders.values():
            comm.Barrier()
            work()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(rounds):
        turns = list(contenders.items())
        random.Random(round_).shuffle(turns)
        for name, work in turns:
            comm.Barrier()
            began = time.perf_counter()
            for _ in range(repeats):
                work()
            ended = time.perf_counter()
            if one_clock:
                began = comm.allreduce(began, op=MPI.MIN)
            times[name].append(comm.allreduce((ended - began) / repeats, op=MPI.MAX))
    return times


def each(
    topology: Topology,
    cases: Sequence[C],
    one: Callable[[Topology, C, int | None], dict[str, Any]],
    rounds: int | None,
) -> list[dict[str, Any]]:
    """Measure case by case, with Gloo for the peers, in so many rounds or its own number. Collective."""
    comm = topology.comms.world
    torch.set_num_threads(topology.threads)
    start_gloo(comm)
    rows = []
    for case in cases:
        rows.append(one(topology, case, rounds))
        say(comm, f"{rows[-1]['case']} done")
    dist.destroy_process_group()
    return rows


def row(case: str, ranks: int, bytes_: int, times: Mapping[str, list[float]]) -> dict[str, Any]:
    """Make the row of a case: medians, quartiles, ratios (peer ÷ ours, limit ÷ ours).

    >>> row("x", 2, 8, {"ours": [1.0, 1.0], "gloo": [3.0, 5.0]})["ratio"]
    {'gloo': 4.0}
    """
    medians = {name: statistics.median(found) for name, found in times.items()}
    quartiles = {
        name: [statistics.quantiles(found, n=4)[0], statistics.quantiles(found, n=4)[2]]
        for name, found in times.items()
    }
    ratio = {name: value / medians["ours"] for name, value in medians.items() if name != "ours"}
    return {
        "case": case,
        "ranks": ranks,
        "bytes": bytes_,
        "seconds": medians,
        "spread": quartiles,
        "ratio": ratio,
    }


def machine() -> dict[str, Any]:
    """Say what was measured on."""
    return {
        "cores": os.cpu_count(),
        "cpu": processor(),
        "host": socket.gethostname(),
        "yield_when_idle": os.environ.get(YIELDING, "0"),
    }


def versions() -> dict[str, str]:
    """Versions of what was measured."""
    vendor, number = MPI.get_vendor()
    mpi = f"{vendor} {'.'.join(map(str, number))}"
    return {
        "hpctrain": __version__,
        "torch": torch.__version__,
        "mpi": mpi,
        "python": platform.python_version(),
    }


def document(rows: list[dict[str, Any]]) -> str:
    """Give the one JSON object that `--json` prints."""
    return json.dumps({"machine": machine(), "versions": versions(), "rows": rows}, indent=1)


def table(rows: list[dict[str, Any]], meanings: Mapping[str, str]) -> str:
    """Give rows as text: a table a case, with what each contender is.

    >>> print(table([row("x", 2, 8, {"ours": [1.0, 1.0], "gloo": [3.0, 5.0]})], {"ours": "the default"}))
    x, 2 ranks    ms  quartiles     ÷ ours
    ours        1000  1000 to 1000          the default
    gloo        4000  2500 to 5500    4.00
    """
    tables = []
    for entry in rows:
        ranks = f"{entry['ranks']} rank{'s' * (entry['ranks'] > 1)}"
        cells = [(f"{entry['case']}, {ranks}", "ms", "quartiles", "÷ ours", "")]
        for name, seconds in entry["seconds"].items():
            low, high = (f"{1e3 * value:.4g}" for value in entry["spread"][name])
            ratio = f"{entry['ratio'][name]:.2f}" if name in entry["ratio"] else ""
            cells.append((name, f"{1e3 * seconds:.4g}", f"{low} to {high}", ratio, meanings.get(name, "")))
        a, b, c, d, _ = (max(map(len, column)) for column in zip(*cells))
        lines = [f"{n:{a}}  {ms:>{b}}  {q:{c}}  {r:>{d}}  {what}".rstrip() for n, ms, q, r, what in cells]
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def start_gloo(comm: MPI.Intracomm) -> None:
    """Start torch.distributed over the ranks that MPI started, for the peers. Collective.

    On one node it talks over the loopback interface, which needs no name to be resolved.
    """
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    alone = node.size == comm.size
    node.Free()
    if alone:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    host = "127.0.0.1" if alone else socket.gethostname()
    with socket.socket() as probe:
        probe.bind(("", 0))
        address = comm.bcast((host, probe.getsockname()[1]), root=0)
    try:
        dist.init_process_group(
            "gloo", init_method=f"tcp://{address[0]}:{address[1]}", rank=comm.rank, world_size=comm.size
        )
    except (RuntimeError, ValueError) as error:
        raise HpctrainError(f"the peer torch.distributed (Gloo) did not start: {error}") from None


def say(comm: MPI.Intracomm, text: str) -> None:
    """Show progress on standard error: standard output holds only the result."""
    if comm.rank == 0:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
