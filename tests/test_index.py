import h5py
import numpy as np
import pytest
from helpers import write_h5, write_samples

from hpctrain.config import Data
from hpctrain.data import index as indexing
from hpctrain.data.index import build
from hpctrain.data.splits import Split
from hpctrain.errors import ConfigError, DataError


def data(files, **more):
    return Data(files=files, **{"inputs": ["x"], "targets": ["y"], **more})


def test_many_files_are_one_long_dataset(tmp_path):
    index = build(data(write_samples(tmp_path, 29, parts=4)))
    assert index.length == 29
    assert index.starts == (0, 8, 15, 22, 29)
    assert index.locate(7) == (str(tmp_path / "part0.h5"), 7)
    assert index.locate(8) == (str(tmp_path / "part1.h5"), 0)
    assert index.locate(28) == (str(tmp_path / "part3.h5"), 6)
    assert index.variables["x"].shape == (5,)


def test_nested_groups_and_names(tmp_path):
    path = write_h5(tmp_path / "a.h5", deep__er__x=np.ones((3, 2)), y=np.ones(3))
    assert list(build(data(path, inputs=["deep/er/x"])).variables) == ["x", "y"]
    renamed = build(data(path, inputs={"field": "deep/er/x"}))
    assert renamed.variables["field"].path == "deep/er/x"


def test_one_name_for_two_datasets(tmp_path):
    path = write_h5(tmp_path / "a.h5", a__x=np.ones((3, 2)), b__x=np.ones(3))
    with pytest.raises(ConfigError, match=r"both name x, for a/x and b/x: give one another name"):
        build(data(path, inputs=["a/x"], targets=["b/x"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": "nothing*.h5"}, r"data.files: no file .*nothing\*.h5: there are [^ ]*\.h5(, [^ ]*\.h5)*$"),
        ({"files": "/no/such/folder/a.h5"}, r"there is no folder /no/such/folder"),
        ({"files": []}, "data.files is empty"),
        ({"inputs": []}, "data.inputs is empty"),
        ({"targets": ["yy"]}, r"part0.h5: dataset yy is not in the file: did you mean y\?"),
        ({"targets": ["group"]}, "dataset group is a group"),
        ({"targets": ["scalar"]}, "scalar is a scalar: it must have one row a sample"),
        ({"targets": ["text"]}, "text has dtype .*: float, integer or bool is needed"),
        ({"targets": ["short"]}, "short has 2 samples, other datasets of the file have"),
        ({"test": 1.5}, r"data.test = 1.5: a fraction between 0 and 1"),
        ({"test": 0.001}, "data.test holds no sample of the 29: change data.test"),
        ({"test": 0.6, "validation": 0.4}, "data.train holds no sample of the 29"),
        ({"test": [0, 3]}, "is a range, but data.coordinate is not set"),
        ({"test": [0, 3], "coordinate": "y"}, r"data.coordinate y has shape \(15, 2\)"),
        ({"test": [0, 3, 4], "coordinate": "when"}, r"\[first, last\] was expected"),
        ({"test": [0, 3], "validation": [3, 5], "coordinate": "when"}, "shares 1 samples with another"),
        ({"test": ["1999", "2000"], "coordinate": "label"}, "data.test holds no sample"),
        ({"test": ["spring", "fall"], "coordinate": "when"}, "'spring' is a date, but when has units ''"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, change, message):
    pattern = write_samples(tmp_path, 29)
    for number, size in enumerate((15, 14)):
        with h5py.File(tmp_path / f"part{number}.h5", "a") as file:
            file["scalar"], file["short"] = 1.0, np.ones(2)
            file["text"] = [b"abc"] * size
            file["when"] = np.arange(size) + 15 * number
            file["group/inner"] = 1
    change = {"files": pattern, **change}
    if change["files"] == "nothing*.h5":
        change["files"] = str(tmp_path / "nothing*.h5")
    with pytest.raises((ConfigError, DataError), match=message):
        build(data(**change))


def test_files_that_disagree(tmp_path):
    write_h5(tmp_path / "a.h5", x=np.ones((3, 2)), y=np.ones(3))
    write_h5(tmp_path / "b.h5", x=np.ones((3, 4)), y=np.ones(3))
    with pytest.raises(DataError, match=r"b.h5: x has shape \(4,\) a sample, the first file has \(2,\)"):
        build(data(str(tmp_path / "*.h5")))
    write_h5(tmp_path / "b.h5", x=np.ones((3, 2), dtype=np.float32), y=np.ones(3))
    with pytest.raises(DataError, match=r"b.h5: x has dtype <f4 a sample, the first file has <f8"):
        build(data(str(tmp_path / "*.h5")))


def test_a_truncated_file_and_a_file_that_is_none(tmp_path):
    path = tmp_path / "torn.h5"
    write_h5(path, x=np.ones((300, 50)), y=np.ones(300))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(
        DataError, match=r"torn.h5: cannot be read: it is truncated, 5,000 of \d+,\d+ bytes are there"
    ):
        build(data(str(path)))
    path.write_text("this is text")
    with pytest.raises(DataError, match=r"torn.h5: .* not an HDF5 file"):
        build(data(str(path)))


def members(index, name):
    split = index.splits[name]
    return split.samples(np.arange(len(split))).tolist()


@pytest.mark.parametrize("how", ["file", "random"])
def test_fractions_cut_everything_once(tmp_path, how):
    index = build(data(write_samples(tmp_path, 29), test=0.2, validation=0.1, split_order=how))
    parts = {name: members(index, name) for name in ("train", "validation", "test")}
    assert sorted(sum(parts.values(), [])) == list(range(29))
    assert [len(parts[n]) for n in ("train", "validation", "test")] == [20, 3, 6]
    assert (parts["test"] == list(range(23, 29))) == (how == "file")


def test_ranges_of_a_coordinate(tmp_path):
    path = write_h5(tmp_path / "a.h5", x=np.ones((6, 1)), y=np.ones(6), depth=[0.0, 5, 1, 9, 2, 7])
    index = build(data(path, coordinate="depth", train=[0, 2], test=[5.0, 7]))
    assert members(index, "train") == [0, 2, 4]
    assert members(index, "test") == [1, 5]


def test_dates_include_their_whole_year_or_month(tmp_path):
    path = write_h5(tmp_path / "a.h5", x=np.ones((24, 1)), y=np.ones(24), time=np.arange(24) * 30.0 + 15)
    with h5py.File(path, "a") as file:
        file["time"].attrs["units"] = "days since 2000-01-01"
        file["time"].attrs["calendar"] = "360_day"
    index = build(data(path, coordinate="time", train=["2000", "2000"], test=["2001-02", "2001-03"]))
    assert members(index, "train") == list(range(12))
    assert members(index, "test") == [13, 14]
    with pytest.raises(ConfigError, match="'soon' is no date: write 1999, 1999-12 or 1999-12-31"):
        build(data(path, coordinate="time", test=["soon", "2001"]))


def test_split_maps_places_over_blocks():
    split = Split(((2, 4), (7, 9)))
    assert split.samples(np.array([3, 0])).tolist() == [8, 2]
    assert len(split) == 4


def test_axis_must_be_one_dimensional(tmp_path):
    path = write_h5(tmp_path / "a.h5", lat=np.arange(3.0), area=np.ones((2, 2)))
    assert indexing.read_axis(path, "lat").tolist() == [0, 1, 2]
    with pytest.raises(DataError, match=r"area has shape \(2, 2\), an axis has one dimension"):
        indexing.read_axis(path, "area")


def test_a_file_named_twice_counts_once(tmp_path):
    write_samples(tmp_path, 29, parts=3)
    first, every = str(tmp_path / "part1.h5"), str(tmp_path / "part*.h5")
    index = build(data([first, every, str(tmp_path / "." / "part0.h5")]))
    assert index.length == 29
    assert len(index.files) == 3


def test_files_without_samples(tmp_path):
    path = write_h5(tmp_path / "a.h5", x=np.ones((0, 2)), y=np.ones(0))
    with pytest.raises(DataError, match="data.files: 1 files hold no sample"):
        build(data(path))


def test_infinity_is_named_too(tmp_path):
    path = write_h5(tmp_path / "a.h5", x=np.array([[1.0], [np.inf], [2.0]]), y=np.ones(3))
    index = build(data(path))
    with pytest.raises(DataError, match=r"x\[1\] \(sample 1\) holds NaN, infinity or _FillValue: mend"):
        index.check_finite("x", np.arange(3), np.array([[1.0], [np.inf], [2.0]]))


def test_time_axes_that_count_from_other_days(tmp_path):
    for year in (2000, 2001, 2002):
        path = write_h5(
            tmp_path / f"y{year}.h5", x=np.ones((12, 1)), y=np.ones(12), time=np.arange(12) * 30.0 + 15
        )
        with h5py.File(path, "a") as file:
            file["time"].attrs.update({"units": f"days since {year}-01-01", "calendar": "360_day"})
    index = build(data(str(tmp_path / "y*.h5"), coordinate="time", test=["2001-03", "2002-02"]))
    assert members(index, "test") == list(range(14, 26))
    with h5py.File(tmp_path / "y2001.h5", "a") as file:
        file["time"].attrs["calendar"] = "standard"
    with pytest.raises(
        DataError, match="calendar 'standard', the first file has .* '360_day': all files must agree"
    ):
        build(data(str(tmp_path / "y*.h5"), coordinate="time", test=["2001", "2001"]))


def test_a_virtual_dataset_whose_source_is_missing(tmp_path):
    write_h5(tmp_path / "source.h5", x=np.ones((4, 2)))
    layout = h5py.VirtualLayout(shape=(4, 2), dtype="f8")
    layout[:] = h5py.VirtualSource("source.h5", "x", shape=(4, 2))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_virtual_dataset("x", layout)
        file["y"] = np.ones(4)
    assert build(data(str(tmp_path / "a.h5"))).length == 4
    (tmp_path / "source.h5").unlink()
    with pytest.raises(DataError, match=r"x is a virtual dataset and its source source.h5 is missing"):
        build(data(str(tmp_path / "a.h5")))
