"""What this trainer may write over, and what not."""

import h5py
import pytest

from hpctrain.data import make
from hpctrain.data.output import MADE, PREDICTIONS, refuse_others, temporary_beside
from hpctrain.errors import ConfigError


@pytest.mark.parametrize("kind", ["hdf5", "text", "folder", "bytes"])
def test_somebodys_file_is_not_written_over(tmp_path, kind):
    path = tmp_path / "mine.h5"
    if kind == "hdf5":
        with h5py.File(path, "w") as file:
            file["x"] = [1.0, 2.0]
    elif kind == "folder":
        path.mkdir()
    elif kind == "bytes":  # what other tools write as text
        with h5py.File(path, "w") as file:
            file.attrs["source"] = b"model output"
    else:
        path.write_text("not HDF5")
    before = None if kind == "folder" else path.read_bytes()
    for write in (
        lambda path: refuse_others(path, PREDICTIONS),
        lambda path: make.write(path, lambda file: None),
    ):
        with pytest.raises(
            ConfigError, match=r"mine\.h5 is there already, and `hpctrain .*` has not written it"
        ):
            write(path)
    assert kind == "folder" or path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["mine.h5"]


def test_one_command_does_not_write_over_anothers_file_nor_over_the_data(tmp_path):
    """Predictions and data that were made may be what another run is trained on."""
    path = tmp_path / "made.h5"
    make.write(path, lambda file: None)
    refuse_others(path, MADE)
    with pytest.raises(ConfigError, match="`hpctrain predict` has not written it"):
        refuse_others(path, PREDICTIONS)
    (tmp_path / "same.h5").symlink_to(path)
    with pytest.raises(ConfigError, match="made.h5 is among the run's data.files"):
        refuse_others(path, MADE, [str(tmp_path / "gone.h5"), str(tmp_path / "same.h5")])


def test_what_is_written_first_has_a_name_of_its_own(tmp_path):
    """Neither somebody's file nor what a link points to is written over; what fails leaves nothing."""
    (tmp_path / "x.h5.tmp").write_text("precious")
    (tmp_path / "x.h5.1.tmp").symlink_to(tmp_path / "x.h5.tmp")

    def fails(file):
        raise KeyError("half")

    with pytest.raises(KeyError):
        make.write(tmp_path / "x.h5", fails)
    make.write(tmp_path / "x.h5", lambda file: None)
    assert (tmp_path / "x.h5.tmp").read_text() == "precious"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["x.h5", "x.h5.1.tmp", "x.h5.tmp"]
    for where in ("x.h5/y.h5", "/proc/none/y.h5"):
        with pytest.raises(ConfigError, match="y.h5 can't be written: "):
            temporary_beside(tmp_path / where)


def test_its_own_file_is_made_anew(tmp_path):
    path = tmp_path / "made.h5"
    for value in (1.0, 2.0):
        make.write(path, lambda file, value=value: file.create_dataset("x", data=value))
    with h5py.File(path) as file:
        assert file["x"][()] == 2.0
