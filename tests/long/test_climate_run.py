"""The default run to its end: better than every baseline, and than 0.71 K, on the test years."""

import pytest

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("ranks", [1, 4])
def test_the_default_run_beats_every_baseline(launcher, tmp_path, ranks):
    from launching import rows

    ended = launcher.ranks(ranks, limit=900)
    assert ended.status == 0, ended.text
    found = rows(tmp_path / "runs" / "climate")
    baselines = [values["rmse_kelvin"] for values in found[0]["baselines"].values()]
    last = [row["rmse_kelvin"] for row in found if row["event"] == "validate"][-1]
    assert last < min(baselines)
    assert last <= 0.71
