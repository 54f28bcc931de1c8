"""Last words of a rank; that they come before mpirun's own is tried in tests/launch/test_abort.py."""

import os
import sys
import threading
import time

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


def test_a_file_is_not_waited_for(monkeypatch, tmp_path):
    with (tmp_path / "err").open("w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        began = time.monotonic()
        abort._say("the disk\n")
        assert time.monotonic() - began < abort.READ_SECONDS
    assert (tmp_path / "err").read_text() == "the disk\n"
