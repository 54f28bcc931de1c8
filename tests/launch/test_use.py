"""What is done with a trained model: predict, load, export, list, verify; the other recipes."""

import re
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import rows
from safetensors.torch import load_file, save_file

import hpctrain
from hpctrain.errors import CheckpointError, ConfigError

LANGUAGE = Path(__file__).resolve().parents[2] / "docs" / "language.md"


@pytest.fixture
def trained(launcher, small, tmp_path):
    small.write_text(small.read_text() + "\n[checkpoint]\nevery_steps = 10\n")
    ended = launcher.ranks(2, "train", "small.toml")
    assert ended.status == 0, ended.text
    return tmp_path / "runs" / "small"


def test_predictions_are_the_models_own(launcher, trained, tmp_path):
    """Independent answer: load the weights, read the files with h5py, normalise by hand."""
    files = []
    for ranks in (1, 3):
        ended = launcher.ranks(ranks, "predict", "runs/small", "--output", f"p{ranks}.h5")
        assert ended.status == 0, ended.text
        files.append((tmp_path / f"p{ranks}.h5").read_bytes())
        assert not (tmp_path / f"p{ranks}.h5.tmp").exists()
    x = np.concatenate([h5py.File(tmp_path / f"part{n}.h5")["x"][:] for n in range(2)])
    y = np.concatenate([h5py.File(tmp_path / f"part{n}.h5")["y"][:] for n in range(2)])
    mean, deviation = x[:49].mean(dtype=np.float64), x[:49].std(dtype=np.float64)
    model = hpctrain.load(trained)
    assert not model.training
    with torch.no_grad():
        out = model(torch.from_numpy(((x[49:] - mean) / deviation).astype(np.float32))).numpy()
    expected = out * y[:49].std(dtype=np.float64) + y[:49].mean(dtype=np.float64)
    for ranks in (1, 3):
        with h5py.File(tmp_path / f"p{ranks}.h5") as file:
            assert np.allclose(file["y"][:], expected, rtol=1e-5, atol=1e-6)
            assert file["sample"][:].tolist() == list(range(49, 61))
            assert file["y"].dims[0].keys() == ["sample"]
    error = np.sqrt(((expected - y[49:]) ** 2).mean())
    measured = [row["rmse"] for row in rows(trained) if row["event"] == "validate"][-1]
    assert measured == pytest.approx(error, rel=1e-4)
    train = launcher.ranks(2, "predict", "runs/small", "--output", "t.h5", "--split", "train")
    assert train.status == 0
    assert h5py.File(tmp_path / "t.h5")["y"].shape == (49, 2)
    again = launcher.ranks(2, "predict", "runs/small", "--output", "t.h5")
    assert again.status == 0, again.text
    data = (tmp_path / "part0.h5").read_bytes()
    theirs = launcher.ranks(2, "predict", "runs/small", "--output", "part0.h5")
    assert theirs.status == 2
    assert theirs.text.count("part0.h5 is among the run's data.files") == 1
    assert (tmp_path / "part0.h5").read_bytes() == data
    wrong = launcher.ranks(2, "predict", "runs/small", "--output", "w.h5", "--split", "tset")
    assert wrong.status == 2
    assert wrong.text.count("--split tset: did you mean test?") == 1


def test_export_list_and_load(launcher, trained, tmp_path):
    for name in ("m.safetensors", "deep/m.pt"):
        ended = launcher.run(sys.executable, "-m", "hpctrain", "checkpoint", "export", "runs/small", name)
        assert ended.status == 0, ended.text
    state = hpctrain.load(trained).state_dict()
    for found in (
        load_file(tmp_path / "m.safetensors"),
        torch.load(tmp_path / "deep/m.pt", weights_only=True),
    ):
        assert all(torch.equal(found[name], state[name]) for name in state)
        assert found.keys() == state.keys()
    export = [sys.executable, "-m", "hpctrain", "checkpoint", "export", "runs/small"]
    assert launcher.run(*export, "m.safetensors").status == 0, "its own earlier one"
    save_file({"w": torch.ones(2)}, tmp_path / "theirs.safetensors")
    for name in ("theirs.safetensors", "deep/m.pt"):
        before = (tmp_path / name).read_bytes()
        refused = launcher.run(*export, name)
        assert refused.status == 2
        assert "and `hpctrain checkpoint export` has not written it" in refused.err
        assert (tmp_path / name).read_bytes() == before
    wrong = launcher.run(sys.executable, "-m", "hpctrain", "checkpoint", "export", "runs/small", "m.bin")
    assert wrong.status == 2
    assert "a name that ends in .safetensors, .pt or .pth was expected" in wrong.err
    listed = launcher.run(sys.executable, "-m", "hpctrain", "checkpoint", "list", "runs/small")
    assert [line.split()[:2] for line in listed.out.splitlines()] == [["step", "10"], ["step", "20"]]
    assert listed.out.count("good") == 2
    older = hpctrain.load(trained, step=10).state_dict()
    assert not torch.equal(older["first.weight"], state["first.weight"])
    with pytest.raises(ConfigError, match=r"has no checkpoint of step 11: it has \[10, 20\]"):
        hpctrain.load(trained, step=11)
    with pytest.raises(ConfigError, match="holds no run"):
        hpctrain.load(tmp_path)


def test_a_damaged_checkpoint_is_passed_over_and_said(launcher, trained, tmp_path):
    torn = next((trained / "checkpoints" / "step-00000020").glob("*.safetensors"))
    raw = bytearray(torn.read_bytes())
    raw[-1] ^= 1
    torn.write_bytes(bytes(raw))
    listed = launcher.run(sys.executable, "-m", "hpctrain", "checkpoint", "list", "runs/small")
    assert "is damaged: its SHA-256" in listed.out
    with pytest.raises(CheckpointError, match="damaged"):
        hpctrain.load(trained, step=20)
    ended = launcher.ranks(2, "train", "small.toml")
    assert ended.status == 0, ended.text
    assert "passed over" in ended.out
    assert "from step 10" in ended.out
    assert hpctrain.load(trained, step=20) is not None


@pytest.mark.parametrize("ranks", [1, 3])
def test_verify_at_the_command_line(launcher, small, ranks):
    ended = launcher.ranks(ranks, "verify", "small.toml", "--steps", "2")
    assert ended.status == 0, ended.text
    assert f"equal: 2 steps of {ranks} replica{'s' * (ranks > 1)} x 1 stage against 1 x 1" in ended.out


def test_digits_are_recognised(launcher, tmp_path):
    made = launcher.run(sys.executable, "-m", "hpctrain", "data", "make", "digits")
    assert made.status == 0, made.text
    assert "1797 images" in made.out
    ended = launcher.ranks(2, "train", "digits")
    assert ended.status == 0, ended.text
    last = [row for row in rows(tmp_path / "runs/digits") if row["event"] == "validate"][-1]
    assert last["accuracy"] >= 0.97
    assert (tmp_path / "runs/digits/pictures/curves.png").stat().st_size > 10_000
    predicted = launcher.ranks(2, "predict", "runs/digits", "--output", "p.h5")
    assert predicted.status == 0, predicted.text
    with h5py.File(tmp_path / "p.h5") as found, h5py.File(tmp_path / "digits.h5") as data:
        right = found["label"][:] == data["label"][:][found["sample"][:]]
        assert right.mean() == pytest.approx(last["accuracy"])
        assert found["label"].dtype == np.int64


def test_a_language_model_in_stages(launcher, tmp_path):
    """Two replicas of two stages: metrics beside compressors, a sample, predictions."""
    make, train, _ = re.findall(r"^(?:mpirun -n 4 )?hpctrain (.*)$", LANGUAGE.read_text(), re.M)
    made = launcher.run(sys.executable, "-m", "hpctrain", *make.split())
    assert made.status == 0, made.text
    assert re.search(r"wrote language.h5: [\d]{3,} files of [\d,]{9,} bytes, \d\d+ of them", made.out)
    with h5py.File(tmp_path / "language.h5", "r+") as file:  # a few windows of them are enough here
        rest = {name: file[name][:] for name in ("text", "place", "part")}
        keep = np.concatenate([np.flatnonzero(rest["part"] == part)[:24] for part in (0, 1)])
        for name, values in rest.items():
            del file[name]
            file[name] = values[keep]
    words = [*train.split(), "--model.init_args.width", "48"]
    words += ["--data.task.init_args.sample_bytes", "40", "--train.epochs"]
    ended = launcher.ranks(4, *words, "2")
    assert ended.status == 0, ended.text
    assert re.search(r"xz_joint +\d", ended.out)
    run = tmp_path / "runs" / "language"
    assert "2 replicas x 2 stages" in ended.out
    start, last = rows(run)[0], [row for row in rows(run) if row["event"] == "validate"][-1]
    assert {"gzip", "bz2", "xz", "gzip_joint", "bz2_joint", "xz_joint"} == start["baselines"].keys()
    assert 1 < start["baselines"]["xz"]["bits_per_byte"] < 5
    assert 2 < last["bits_per_byte"] < 8
    (stages,) = [row for row in rows(run) if row["event"] == "pipeline"]
    assert 0.5 * stages["simulated_seconds"] < stages["seconds"] < 10
    assert "simulated with the pieces' times: 1f1b" in ended.out
    assert f"{stages['schedule']} simulated with them and free messages: a step's passes take" in ended.out
    assert sum(bool(re.search(r"\| +[01] +\d,\d .* \d x .* …", line)) for line in ended.out.split("\n")) == 2
    assert len(stages["pieces"]) > 10
    assert f"; {stages['schedule']} simulated with these passes and free messages" in ended.out
    assert (run / "pictures" / "pipeline.png").stat().st_size > 10_000
    sample = (run / "sample.txt").read_text()
    assert sample.startswith("def ")
    assert len(sample) > 10
    assert f"a sample, also in {run / 'sample.txt'}:" in ended.out
    shown = ended.out.split("a sample, also in ")[1].split("done: ")[0]
    assert all(c.isprintable() or c == "\n" for c in shown)  # a terminal obeys control characters
    predicted = launcher.ranks(1, "predict", "runs/language", "--output", "p.h5")
    assert predicted.status == 0, predicted.text
    last = [row for row in rows(run) if row["event"] == "validate"][-1]
    with h5py.File(tmp_path / "p.h5") as found, h5py.File(tmp_path / "language.h5") as data:
        place = data["place"][:][found["sample"][:]]
        at = np.arange(found["bits"].shape[1])
        counted = (at >= place[:, 1:2]) & (at < place[:, 2:])
        assert found["bits"][:][counted].mean() == pytest.approx(last["bits_per_byte"], rel=1e-5)


def test_climate_a_few_steps_and_its_predictions(launcher, tmp_path):
    ended = launcher.ranks(4, "--train.steps", "3")
    assert ended.status == 0, ended.text
    run = tmp_path / "runs" / "climate"
    assert sorted(p.name for p in (run / "pictures").iterdir()) == ["curves.png", "maps.png"]
    baselines = rows(run)[0]["baselines"]
    assert baselines["ridge"]["rmse_kelvin"] == pytest.approx(0.725, abs=0.0005)
    last = [row for row in rows(run) if row["event"] == "validate"][-1]
    assert last["rmse_kelvin"] < 0.74
    predicted = launcher.ranks(3, "predict", "runs/climate", "--output", "p.h5")
    assert predicted.status == 0, predicted.text
    from hpctrain.config_file import RECIPES

    with h5py.File(tmp_path / "p.h5") as found, h5py.File(RECIPES / "climate.h5") as data:
        assert found["tas"].shape == (180, 72, 96)
        assert found["tas"].attrs["units"] == "K"
        for name in ("lat", "lon"):
            assert np.array_equal(found[name], data[name])
        assert np.array_equal(found["time"][:], data["time"][600:])
        assert found["time"].attrs["calendar"] == "360_day"
        assert [d.keys() for d in found["tas"].dims] == [["time"], ["lat"], ["lon"]]
        truth = data["tas"][600:] * data["tas"].attrs["scale_factor"] + data["tas"].attrs["add_offset"]
        area = np.cos(np.deg2rad(data["lat"][:]))[:, None]
        error = np.sqrt((((found["tas"][:] - truth) ** 2) * area).mean() / area.mean())
        assert error == pytest.approx(last["rmse_kelvin"], rel=1e-4)


def test_a_prediction_of_another_shape_than_declared_is_refused(launcher, small, tmp_path):
    """It would be written over the rows of others."""
    (tmp_path / "of_mine.py").write_text(
        "import numpy as np\nfrom hpctrain.recipes.samples import Samples\n"
        "class Wide(Samples):\n    def predict(self, outputs, batch):\n"
        "        found = super().predict(outputs, batch)\n"
        "        return {name: np.concatenate([v, v], axis=1) for name, v in found.items()}\n"
        "class Other(Samples):\n    def predict(self, outputs, batch):\n"
        "        return {'else': next(iter(super().predict(outputs, batch).values()))}\n"
    )
    for kind, message in (
        ("Wide", "4) for"),
        ("Other", "predicts else, which its predictions() does not list"),
    ):
        words = ["--data.task.class_path", f"of_mine.{kind}", "--train.run_folder", kind]
        assert launcher.ranks(2, "train", "small.toml", *words).status == 0
        ended = launcher.ranks(2, "predict", kind, "--output", "out.h5")
        assert ended.status == 2, ended.text
        assert ended.text.count(message) == 1
        assert not [*tmp_path.glob("out.h5*")], "nothing half-written stays"


def test_predict_of_an_invariant_run_on_more_ranks_than_micro_batches(launcher, small, tmp_path):
    words = ["--averaging.invariant", "true", "--parallel.micro_batches", "2"]
    assert launcher.ranks(2, "train", "small.toml", *words).status == 0
    ended = launcher.ranks(3, "predict", "runs/small", "--output", "out.h5")
    assert ended.status == 0, ended.text
