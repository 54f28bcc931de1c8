"""What this trainer may write over, and what not."""

import h5py
import pytest

from hpctrain.data import make
from hpctrain.data.output import refuse_others
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
    for write in (refuse_others, lambda path: make.write(path, lambda file: None)):
        with pytest.raises(ConfigError, match=r"mine\.h5 is there already, and hpctrain has not written it"):
            write(path)
    assert kind == "folder" or path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["mine.h5"]


def test_its_own_file_is_made_anew(tmp_path):
    path = tmp_path / "made.h5"
    for value in (1.0, 2.0):
        make.write(path, lambda file, value=value: file.create_dataset("x", data=value))
    with h5py.File(path) as file:
        assert file["x"][()] == 2.0
