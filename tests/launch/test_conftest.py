"""The tests' own safety net: a rank whose test fails ends all; a run of no tests is no success."""

import shutil
import sys
import time
from pathlib import Path

CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"


def run(launcher, tmp_path, code, ranks=2):
    shutil.copy(CONFTEST, tmp_path / "conftest.py")
    (tmp_path / "test_it.py").write_text(code)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --with-mpi\nmarkers = mpi\n")
    return launcher.run(
        "mpirun", "-n", ranks, sys.executable, "-m", "pytest", "-p", "no:cacheprovider", limit=60
    )


def test_a_failure_on_one_rank_ends_all_with_its_report(launcher, tmp_path):
    began = time.monotonic()
    ended = run(
        launcher,
        tmp_path,
        "import pytest\n@pytest.mark.mpi\ndef test_it(world):\n"
        "    assert world.rank == 0, 'rank one is wrong'\n    world.Barrier()\n",
    )
    assert ended.status == 1
    assert "== rank 1 of 2: test_it.py::test_it failed (call); all ranks are ended" in ended.err
    assert "rank one is wrong" in ended.err
    assert time.monotonic() - began < 30


def test_all_passed_says_so_and_names_the_mpi(launcher, tmp_path):
    ended = run(
        launcher,
        tmp_path,
        "import pytest\n@pytest.mark.mpi\ndef test_it(world):\n    assert world.size == 2\n",
    )
    assert ended.status == 0, ended.text
    assert "1 passed" in ended.out
    assert "rank 0 of 2" in ended.out


def test_a_run_in_which_no_test_ran_fails(launcher, tmp_path):
    skipped = "import pytest\n@pytest.mark.mpi\n@pytest.mark.skip\ndef test_it():\n    assert True\n"
    for code in ("", skipped, skipped + "def test_without_mpi():\n    assert True\n"):
        assert run(launcher, tmp_path, code).status == 5
