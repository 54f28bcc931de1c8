"""Under mpirun: say which MPI, and end all ranks with the report when one rank's test fails.

A rank whose test failed goes on to the next test while the others wait in a collective call of
this one: without the abort here that is a hang until the time limit.
"""

import logging
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def in_launch(config):
    return "OMPI_COMM_WORLD_SIZE" not in os.environ and "PMIX_RANK" not in os.environ


if "OMPI_COMM_WORLD_SIZE" in os.environ:
    from hpctrain import launch

    launch.share_cores()  # as the command line does, before MPI starts

RAN = pytest.StashKey[int]()


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    """Rank 0 reports; what fails on another rank is printed by the hook below."""
    config.stash[RAN] = 0
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if not in_launch(config) and os.environ.get("OMPI_COMM_WORLD_RANK", "0") != "0" and reporter:
        reporter._tw._file = open(os.devnull, "w")  # noqa: SIM115


def pytest_report_header(config):
    if in_launch(config):
        return "no launcher: these tests start mpirun themselves"
    import torch
    from mpi4py import MPI

    torch.set_num_threads(1)
    vendor, version = MPI.get_vendor()
    world = MPI.COMM_WORLD
    return f"{vendor} {'.'.join(map(str, version))}: rank {world.rank} of {world.size}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    counts = in_launch(item.config) or item.get_closest_marker("mpi") is not None
    if call.when == "call" and report.passed and counts:
        item.config.stash[RAN] += 1
    if report.failed and not in_launch(item.config):
        from mpi4py import MPI

        world = MPI.COMM_WORLD
        if world.size > 1:
            sys.__stderr__.write(
                f"\n== rank {world.rank} of {world.size}: {item.nodeid} failed ({report.when}); "
                f"all ranks are ended\n{report.longreprtext}\n"
            )
            for name, text in report.sections:
                sys.__stderr__.write(f"-- {name}\n{text}\n")
            sys.__stderr__.flush()
            world.Abort(1)


def pytest_sessionfinish(session, exitstatus):
    """A run in which no test ran is no success; under mpirun one that needs MPI must have run."""
    if exitstatus == 0 and not session.config.stash[RAN] and not session.config.option.collectonly:
        session.exitstatus = 5


@pytest.fixture(scope="session")
def world():
    """The world's communicator."""
    from mpi4py import MPI

    return MPI.COMM_WORLD


@pytest.fixture(autouse=True)
def log_as_it_was():
    """What a job logs to goes with its test."""
    log = logging.getLogger("hpctrain")
    before = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.propagate = before[0], before[2]
    log.setLevel(before[1])


@pytest.fixture
def topology(world):
    """A topology of all ranks, one stage."""
    from hpctrain.topology import Topology

    with Topology.build(world) as built:
        yield built


@pytest.fixture
def shared_tmp(world, tmp_path_factory):
    """One folder that all ranks share, made by rank 0."""
    path = world.bcast(str(tmp_path_factory.mktemp("shared")) if world.rank == 0 else None)
    yield Path(path)
    world.Barrier()


@pytest.fixture
def files(world, shared_tmp):
    """The made-up samples in three files that all ranks share; the glob."""
    from helpers import write_samples

    if world.rank == 0:
        write_samples(shared_tmp, 29, parts=3)
    world.Barrier()
    return str(shared_tmp / "part*.h5")


@pytest.fixture
def build(world, files):
    """Builds jobs of several stages, and takes them down."""
    from jobs import jobs

    with jobs(world, files) as job_of:
        yield job_of
