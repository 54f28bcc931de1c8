"""`hpctrain bench` on real ranks: one JSON object on standard output, every peer in it."""

import json

import pytest

FEW = ("--rounds", "2")


def test_allreduce_prints_one_object_with_every_peer(launcher):
    ended = launcher.ranks(2, "bench", "allreduce", "--json", "--case", "4096", "--case", "65536")
    assert ended.status == 0, ended.text
    found = json.loads(ended.out)
    assert set(found) == {"machine", "versions", "rows"}
    assert [row["bytes"] for row in found["rows"]] == [4096, 65536]
    for row in found["rows"]:
        assert row["ranks"] == 2
        assert set(row["seconds"]) == set(row["spread"]) == {"ours", "openmpi", "gloo", "limit"}
        for name, value in row["seconds"].items():
            low, high = row["spread"][name]
            assert 0 < low <= value <= high
        assert row["ratio"]["gloo"] == row["seconds"]["gloo"] / row["seconds"]["ours"]


def test_step_measures_ddp_beside_ours(launcher):
    ended = launcher.ranks(2, "bench", "step", "--json", "--case", "cnn batch=16", *FEW)
    assert ended.status == 0, ended.text
    (row,) = json.loads(ended.out)["rows"]
    assert set(row["seconds"]) == {"ours", "ddp_fused", "ddp_foreach", "limit"}
    table = launcher.ranks(1, "bench", "step", "--case", "cnn batch=16", *FEW)
    assert table.status == 0, table.text
    assert table.out.startswith("cnn batch=16, 1 rank ")
    assert "nothing averaged, nothing stepped\n" in table.out


def test_wrong_cases_are_named(launcher):
    ended = launcher.ranks(2, "bench", "step", "--case", "17M batch=61")
    assert ended.status == 2
    assert ended.text.count("--case '17M batch=61' is no case: did you mean 17M batch=") == 1
    ended = launcher.ranks(1, "bench", "step", "--rounds", "1")
    assert ended.status == 2
    assert "--rounds 1: two or more were expected" in ended.err
    ended = launcher.ranks(2, "bench", "allreduce", "--case", "1000")
    assert ended.status == 2
    assert "hpctrain: error: --case 1000: bytes, a multiple of 4096, were expected" in ended.err
    assert "MPI_ABORT" not in ended.text  # all ranks find it, and leave


def test_pipeline_measures_torchs_own_beside_ours(launcher):
    ended = launcher.ranks(2, "bench", "pipeline", "--json", "--case", "mlp m=8", *FEW)
    assert ended.status == 0, ended.text
    (row,) = json.loads(ended.out)["rows"]
    each = ("1f1b", "gpipe", "zb_h1", "zb_h2", "interleaved")
    ours = {f"ours_{one}{how}" for one in each for how in ("", "_fast")}
    ours |= {"ours", "ours_operators", "ours_plain", "ours_autograd"}
    torchs = {f"torch_{peer}" for peer in ("1f1b", "gpipe", "zb", "interleaved", "zbv", "dualpipev")}
    seconds = row["seconds"]
    assert set(seconds) == ours | torchs | {"alone", "bubble", "limit", "autograd_limit", "work"}
    assert seconds["bubble"] == pytest.approx(seconds["alone"] / 2 * 9 / 8)
    assert seconds["limit"] == pytest.approx(seconds["work"] * 9 / 8)
    assert row["schedule"] in ("1f1b", "zb-h1", "zb-h2", "interleaved")
    assert seconds["ours"] == seconds[f"ours_{row['schedule'].replace('-', '_')}"]
    assert set(row["passes"]) == {"ours_1f1b", "ours_zb_h1"}
    for both in row["passes"].values():
        there, dry = ({(p["stage"], p["pass"]) for p in both[how]} for how in ("measured", "simulated"))
        assert there == dry
        assert {(stage, f"F{v}") for stage in (0, 1) for v in range(8)} <= there
        last = {p["pass"]: p for p in both["measured"] if p["stage"] == 1}
        # stages take turns: a micro-batch's forward on the last one begins behind that on the first
        assert all(
            last[p["pass"]]["start"] >= p["end"]
            for p in both["measured"]
            if p["pass"][0] == "F" and not p["stage"]
        )
    assert {p["pass"][0] for p in row["passes"]["ours_zb_h1"]["measured"]} == {*"FIW"}
    alone = launcher.ranks(1, "bench", "pipeline")
    assert alone.status == 2
    assert "bench pipeline measures stages: start it on 2 ranks or more" in alone.err


@pytest.mark.long
def test_stages_that_sleep_are_measured_beside_the_simulator(launcher):
    sleeping = launcher.ranks(4, "bench", "pipeline", "--json", "--case", "emulated m=8", *FEW)
    assert sleeping.status == 0, sleeping.text
    (row,) = json.loads(sleeping.out)["rows"]
    seconds = row["seconds"]
    each = ("1f1b", "zb_h1", "zb_h2", "interleaved")
    simulated = {f"simulated_{one}" for one in each}
    measured = {*(f"ours_{one}" for one in each), "ours", "torch_1f1b", "torch_interleaved", "work"}
    assert set(seconds) == measured | simulated
    # ideal lengths, so not a timed test: 8 x 3 passes of 30 ms, 6 and 3 of them idle, sleeps of 15 ms at least
    assert row["schedule"] == "zb-h2"
    assert seconds["work"] < seconds["simulated_zb_h1"] < seconds["simulated_1f1b"]
    assert seconds["simulated_zb_h1"] / seconds["work"] == pytest.approx(27 / 24)
    assert seconds["simulated_zb_h2"] / seconds["work"] == pytest.approx(27 / 24)
    assert seconds["simulated_1f1b"] / seconds["work"] == pytest.approx(30 / 24)
    assert seconds["work"] >= 24 * 0.03
