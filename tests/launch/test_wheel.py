"""What `pip install` of the wheel gives: recipes and the climate data, byte for byte."""

import hashlib
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_wheel_carries_the_data(launcher, tmp_path):
    source = tmp_path / "source"
    launcher.run("git", "clone", "-q", ROOT, source)
    built = launcher.run(
        sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "wheels", source, limit=120
    )  # fmt: skip
    assert built.status == 0, built.text
    with zipfile.ZipFile(next((tmp_path / "wheels").glob("hpctrain-*.whl"))) as wheel:
        names = wheel.namelist()
        inside = hashlib.sha256(wheel.read("hpctrain/recipes/climate.h5")).hexdigest()
    assert inside == hashlib.sha256((ROOT / "data" / "climate.h5").read_bytes()).hexdigest()
    assert {"hpctrain/recipes/climate.toml", "hpctrain/recipes/digits.toml", "hpctrain/py.typed"} <= set(
        names
    )
    assert not any(name.startswith(("tests/", "data/", "slurm/")) for name in names)
