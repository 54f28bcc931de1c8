"""What is to be known before MPI and torch start: how many ranks the launcher meant, and threads.

A process that was meant to be one of N but was started by a launcher that its MPI does not
understand becomes a world of its own: N trainings of one rank each, silently. That is refused.
"""

import os
from collections.abc import Iterable, Mapping

from hpctrain.errors import ConfigError

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def meant_ranks(environment: Mapping[str, str]) -> tuple[int, str]:
    """Ranks that the launcher meant, and its name; (1, "") without a launcher.

    In a Slurm batch shell SLURM_NTASKS is set but there is no step; under mpirun Slurm's own
    variables differ from node to node, so a launcher of MPI's is asked first.

    >>> meant_ranks({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"})
    (4, 'srun')
    >>> meant_ranks({"SLURM_NTASKS": "4"})
    (1, '')
    """
    for variable, launcher in (
        ("OMPI_COMM_WORLD_SIZE", "mpirun of Open MPI"),
        ("PMI_SIZE", "a PMI launcher (mpiexec of MPICH, or srun --mpi=pmi2)"),
        ("MV2_COMM_WORLD_SIZE", "mpirun of MVAPICH"),
    ):
        if environment.get(variable, "").isdigit():
            return int(environment[variable]), launcher
    if "SLURM_STEP_ID" in environment:
        return int(environment.get("SLURM_STEP_NUM_TASKS", "1")), "srun"
    return 1, ""


def check_world(size: int, environment: Mapping[str, str]) -> None:
    """Refuse a world of one where the launcher meant more. Local; raises ConfigError."""
    meant, launcher = meant_ranks(environment)
    if size != 1 or meant == 1:
        return
    cure = (
        "use `srun --mpi=pmix` (`srun --mpi=list` shows whether it is there), or call mpirun "
        "inside the allocation instead of srun"
        if launcher.startswith("srun") or "SLURM_STEP_ID" in environment
        else "start it with the mpirun of the MPI that mpi4py uses "
        "(`python -m mpi4py --mpi-lib-version` names it)"
    )
    raise ConfigError(
        f"{launcher} started {meant} processes, but MPI sees each as a world of 1 rank: "
        f"they would train {meant} times instead of together; {cure}"
    )


def speaks(environment: Mapping[str, str]) -> bool:
    """Whether this process should print for all, before MPI can tell: it is the launcher's first."""
    for variable in ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK"):
        if variable in environment:
            return environment[variable] == "0"
    return environment.get("SLURM_PROCID", "0") == "0" or "SLURM_STEP_ID" not in environment


def asked_threads(environment: Mapping[str, str]) -> int | None:
    """Threads that OMP_NUM_THREADS asks for, None where it says nothing.

    >>> asked_threads({"OMP_NUM_THREADS": "4"}), asked_threads({})
    (4, None)
    """
    first = environment.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(first) if first.isdigit() and int(first) else None


def set_threads(threads: int) -> None:
    """Set the threads of this rank's numerical libraries, before they start, unless the user did."""
    for variable in THREAD_VARIABLES:
        os.environ.setdefault(variable, str(threads))


def local_ranks(environment: Mapping[str, str]) -> tuple[int, int]:
    """Local rank and ranks of this node, as the launcher says; (0, 1) where it says nothing.

    >>> local_ranks({"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}), local_ranks({})
    ((1, 4), (0, 1))
    """
    for rank, size in (
        ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ):
        if environment.get(rank, "").isdigit() and environment.get(size, "").isdigit():
            return int(environment[rank]), int(environment[size])
    return 0, 1


def core_of(local_rank: int, ranks: int, cores: Iterable[int]) -> int | None:
    """Give the core that a rank is kept on where several ranks share each core evenly; None: any. Pure.

    >>> [core_of(rank, 4, {0, 1}) for rank in range(4)]
    [0, 1, 0, 1]
    >>> core_of(0, 2, {0, 1}), core_of(0, 3, {0, 1}), core_of(0, 2, {7})
    (None, None, None)
    """
    listed = sorted(cores)
    if len(listed) < 2 or ranks <= len(listed) or ranks % len(listed):
        return None
    return listed[local_rank % len(listed)]


def share_cores() -> None:
    """Where ranks outnumber cores: let those that wait in MPI yield, and deal the ranks out. Before MPI_Init.

    Ranks that all may run on all cores are at times spread three on one and one on the other: all
    then go at the pace of the three. What the user or the launcher has bound stays as it is.
    """
    if not hasattr(os, "sched_getaffinity"):
        return
    local_rank, ranks = local_ranks(os.environ)
    cores = os.sched_getaffinity(0)
    if ranks <= len(cores):
        return
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    core = core_of(local_rank, ranks, cores)
    if core is not None and cores == set(range(os.cpu_count() or 1)):
        os.sched_setaffinity(0, {core})
