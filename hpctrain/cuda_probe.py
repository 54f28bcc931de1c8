"""Whether this MPI reads and writes a GPU's memory: found by trying it, in a process of its own.

    python -m hpctrain.cuda_probe        exit status 0: yes

An MPI that can't ends with a segmentation fault, so it is tried before MPI_Init, in a child that
knows nothing of the launcher: with the launcher's variables it would wait to be one of its ranks.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from hpctrain import launch

LAUNCHER = ("OMPI_COMM", "OMPI_MCA_ess", "OMPI_MCA_orte", "PMI", "PRTE", "PRRTE", "SLURM_", "MPI_LOCAL")
LIMIT_SECONDS = 60


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """Give the environment without what a launcher set.

    >>> without_launcher({"PMIX_RANK": "1", "PATH": "/bin"})
    {'PATH': '/bin'}
    """
    return {name: value for name, value in environment.items() if not name.startswith(LAUNCHER)}


def has_gpu() -> bool:
    """Whether the system shows an NVIDIA GPU. Local, costs nothing."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def ask() -> bool:
    """Try it in a child process; False where there is no GPU. Before MPI_Init."""
    if not has_gpu():
        return False
    environment = without_launcher(os.environ)
    command = [sys.executable, "-m", "hpctrain.cuda_probe"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=LIMIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


class Found:
    """What was found before MPI started."""

    aware = False
    """Whether this node's MPI reads and writes a GPU's memory; known to the node's first rank only."""


def look() -> None:
    """Let the node's first rank find out. Before MPI_Init."""
    if launch.local_ranks(os.environ)[0] == 0:
        Found.aware = ask()


def attempt() -> int:
    """Let MPI move numbers in a GPU's memory; give the exit status."""
    import torch
    from mpi4py import MPI

    if not torch.cuda.is_available():
        return 1
    sent = torch.arange(1024.0, device="cuda")
    found, summed = torch.zeros_like(sent), torch.zeros_like(sent)
    torch.cuda.synchronize()
    MPI.COMM_SELF.Sendrecv(sent, 0, 0, found, 0, 0)
    MPI.COMM_SELF.Allreduce(sent, summed, op=MPI.SUM)
    return 0 if torch.equal(found, sent) and torch.equal(summed, sent) else 1


if __name__ == "__main__":
    sys.exit(attempt())
