"""Last words of a rank; that they come before mpirun's own is tried in tests/launch/test_abort.py."""

import os
import sys
import threading
import time

import pytest

from hpctrain import abort


def test_last_words_are_waited_for_till_they_are_read(monkeypatch):
    """mpirun on a busy machine reads a rank's stderr late: an abort would overtake the message."""
    reading, writing = os.pipe()
    read = []

    def read_late():
        time.sleep(0.3)
        read.append(os.read(reading, 100))

    with open(writing, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        reader = threading.Thread(target=read_late)
        reader.start()
        abort._say("the disk\n")
        assert read == [b"the disk\n"]
        reader.join()
        began = time.monotonic()
        abort._say("nobody reads this\n")  # nor is it waited for ever
        assert abort.READ_SECONDS <= time.monotonic() - began < 10
    os.close(reading)


class Tee:
    """What a program may put in the place of stderr: it has no descriptor."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        """Nothing waits."""


def test_any_stderr_will_do(monkeypatch):
    tee = Tee()
    monkeypatch.setattr(sys, "stderr", tee)
    abort._say("the disk\n")
    assert tee.text == "the disk\n"
    monkeypatch.setattr(sys, "stderr", None)
    abort._say("nowhere\n")


class World:
    """Beside the real ones of tests/launch/test_abort.py: what is called of it."""

    rank, size = 0, 2

    def __init__(self):
        self.aborted = []

    def Abort(self, status):
        self.aborted.append(status)


def test_a_stderr_that_fails_hinders_no_abort(monkeypatch):
    with open(os.devnull, "w") as closed:
        pass
    monkeypatch.setattr(sys, "stderr", closed)
    world = World()
    with pytest.raises(ValueError, match="closed file"):
        abort.end_with_message(world, "the disk", 2)
    monkeypatch.setattr(abort, "_open", [world])
    with pytest.raises(ValueError, match="closed file"):
        abort.end_all_ranks(OSError, OSError("the disk"), None)
    assert world.aborted == [2, 1]


def test_a_file_is_not_waited_for(monkeypatch, tmp_path):
    with (tmp_path / "err").open("w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        began = time.monotonic()
        abort._say("the disk\n")
        assert time.monotonic() - began < abort.READ_SECONDS
    assert (tmp_path / "err").read_text() == "the disk\n"
