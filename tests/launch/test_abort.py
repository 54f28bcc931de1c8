"""A failing rank ends all ranks within seconds, its own message first, however it was started."""

import os
import re
import signal
import sys
import textwrap
import time
from pathlib import Path

import pytest
from conftest import losses, wait_for

SCRIPT = """
    import sys, threading, time
    from mpi4py import MPI
    from hpctrain.topology import Topology

    def fail():
        raise OSError("the disk of rank %d" % MPI.COMM_WORLD.rank)

    with Topology.build(MPI.COMM_WORLD) as topology:
        who = {who}
        if topology.world_rank in who:
            {how}
        topology.comms.world.Barrier()   # the others wait here for ever in plain MPI
"""


def start(launcher, tmp_path, who, how, ranks=3):
    (tmp_path / "mine.py").write_text(textwrap.dedent(SCRIPT.format(who=who, how=how)))
    began = time.monotonic()
    ended = launcher.run("mpirun", "-n", ranks, sys.executable, "mine.py", limit=60)
    return ended, time.monotonic() - began


@pytest.mark.parametrize("who", [[0], [2], [0, 1, 2]])
@pytest.mark.parametrize("how", ["fail()", "threading.Thread(target=fail).start(); time.sleep(30)"])
def test_all_ranks_end_and_the_traceback_is_printed_once(launcher, tmp_path, who, how):
    ended, seconds = start(launcher, tmp_path, who, how)
    assert ended.status == 1, ended.text
    assert ended.text.count("Traceback") == 1, ended.text
    assert f"OSError: the disk of rank {who[0]}" in ended.err
    last = [line for line in ended.err.splitlines() if f"r{who[0]}/3 | uncaught OSError at " in line]
    assert len(last) == 1
    assert last[0].endswith(": all 3 ranks are ended")
    assert ended.err.index("Traceback") < ended.err.index("MPI_ABORT")
    assert seconds < 20


def test_after_the_topology_is_closed_the_hook_is_gone(launcher, tmp_path):
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
        import faulthandler, sys
        from mpi4py import MPI
        from hpctrain.topology import Topology
        before = sys.excepthook
        with Topology.build(MPI.COMM_WORLD):
            assert sys.excepthook is not before and faulthandler.is_enabled()
            with Topology.build(MPI.COMM_SELF):
                pass
            assert sys.excepthook is not before
        assert sys.excepthook is before and not faulthandler.is_enabled()
        print("gone")
        """)
    )
    ended = launcher.run("mpirun", "-n", 2, sys.executable, "mine.py", limit=60)
    assert ended.status == 0, ended.text
    assert ended.out.count("gone") == 2


def test_a_killed_rank_ends_the_job(launcher, tmp_path):
    ended, seconds = start(launcher, tmp_path, [1], "import os; os.kill(os.getpid(), 9)")
    assert ended.status == 137, ended.text
    assert seconds < 20


def test_a_rank_that_crashes_says_where_in_python(launcher, tmp_path):
    """A segmentation fault in compiled code, a user's say: MPI alone prints addresses."""
    ended, seconds = start(launcher, tmp_path, [1], "import ctypes; ctypes.string_at(0)")
    assert ended.status == 139, ended.text
    assert "Fatal Python error: Segmentation fault" in ended.err
    assert re.search(r'mine\.py", line \d+ in <module>', ended.err), ended.text
    assert ended.err.index("Fatal Python error") < ended.err.index("Process received signal")
    assert "process rank 1" in ended.text
    assert seconds < 20


def test_an_error_of_one_rank_alone_ends_all_with_its_status(launcher, tmp_path):
    """An HpctrainError that the ranks did not agree on: one message, its exit status, no hang."""
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
        import sys
        from hpctrain import cli
        from hpctrain.errors import ConfigError

        def work(world):
            if world.rank == 1:
                raise ConfigError("only here")
            world.Barrier()
            return 0

        sys.exit(cli.on_ranks(work))
        """)
    )
    ended = launcher.run("mpirun", "-n", 3, sys.executable, "mine.py", limit=60)
    assert ended.status == 2, ended.text
    assert ended.text.count("r1/3 | error: only here") == 1


def test_a_rank_that_is_killed_ends_the_job_and_leaves_no_shared_memory(launcher, small, tmp_path):
    """SIGKILL of one rank while the others wait for it in the node's shared memory."""
    before = set(Path("/dev/shm").iterdir())
    slow = ("--model.class_path", "helpers.Slow", "--train.steps", "200")
    process = launcher.start(*launcher.command(3, "train", "small.toml", *slow), SLOW="0.2")
    wait_for(lambda: len(losses(tmp_path / "runs/small")) >= 3, process)
    victim = next(pid for pid in ranks_in(tmp_path) if environment(pid).get("OMPI_COMM_WORLD_RANK") == "2")
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    ended = launcher.finish(process, limit=60)
    assert time.monotonic() - began < 20
    assert ended.status not in (0, 75)
    assert "process rank 2" in ended.text
    assert not ranks_in(tmp_path)
    assert not {path for path in set(Path("/dev/shm").iterdir()) - before if "hpctrain" in path.name}


def environment(pid):
    words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return dict(word.decode(errors="replace").split("=", 1) for word in words if b"=" in word)


def ranks_in(folder):
    """Processes of hpctrain that work in a folder, mpirun left out."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            here = entry.name.isdigit() and os.readlink(entry / "cwd") == str(folder)
            if here and "OMPI_COMM_WORLD_RANK" in environment(int(entry.name)):
                found.append(int(entry.name))
        except OSError:
            continue
    return found
