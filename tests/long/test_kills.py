"""A kill at any moment costs no more than the steps since the last checkpoint; the rest is bit for bit."""

import random
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]
KILLS = 40


def weights(run):
    from hpctrain.use import load_module

    return {n: t.clone().numpy().tobytes() for n, t in load_module(Path(run)).state_dict().items()}


@pytest.mark.parametrize("ranks", [2, 3])
def test_killed_again_and_again_at_random_moments(launcher, small, tmp_path, ranks, record_property):
    """Checkpoints at every step, a model that takes no time: most kills fall into a save."""
    from launching import losses

    words = ["train", "small.toml", "--train.steps", "1500", "--checkpoint.every_steps", "1"]
    whole = launcher.ranks(ranks, *words, "--train.run_folder", "whole", limit=600)
    assert whole.status == 0, whole.text
    generator = random.Random(ranks)
    killed, reached = 0, []
    while killed < KILLS:
        process = launcher.start(*launcher.command(ranks, *words, "--train.run_folder", "cut"))
        before = len(losses(tmp_path / "cut"))
        end = time.monotonic() + 60
        while len(losses(tmp_path / "cut")) <= before and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(generator.random() * 0.5)
        if process.poll() is not None:
            break
        launcher.kill(process)
        killed += 1
        reached.append(max(losses(tmp_path / "cut"), default=0))
    assert killed >= 10, "too few kills to say anything"
    assert reached[-1] > reached[0], "it went on"
    last = launcher.ranks(ranks, *words, "--train.run_folder", "cut", limit=600)
    assert last.status == 0, last.text
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    record_property("kills", killed)
    record_property("reached", reached)
