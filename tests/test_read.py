import h5py
import numpy as np
import pytest
from helpers import write_h5, write_samples

from hpctrain.config import Data
from hpctrain.data import read as reading
from hpctrain.data.index import build
from hpctrain.data.read import Reader
from hpctrain.errors import DataError


def index_of(files, **more):
    return build(Data(files=files, **{"inputs": ["x"], "targets": ["y"], **more}))


def test_any_order_any_file_border(tmp_path):
    """Independent answer: the files joined in memory."""
    pattern = write_samples(tmp_path, 29, parts=4)
    joined = np.concatenate([h5py.File(tmp_path / f"part{n}.h5")["x"][:] for n in range(4)])
    reader = Reader(index_of(pattern))
    random = np.random.default_rng(0)
    for size in (0, 1, 2, 7, 29):
        samples = random.permutation(29)[:size]
        assert np.array_equal(reader.read_one("x", samples), joined[samples])
    repeated = np.array([8, 7, 8, 28, 0, 7])
    assert np.array_equal(reader.read_one("x", repeated), joined[repeated])
    assert np.array_equal(reader.read(["x"], np.arange(6, 17))["x"], joined[6:17])
    reader.close()


def test_more_files_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "OPEN_FILES", 2)
    reader = Reader(index_of(write_samples(tmp_path, 29, parts=6)))
    whole = reader.read_one("x", np.arange(29))
    assert len(reader._open) == 2
    assert np.array_equal(reader.read_one("x", np.arange(28, -1, -1)), whole[::-1])


@pytest.mark.parametrize("chunks", [None, (2, 3), (5, 1)])
def test_chunked_and_compressed(tmp_path, chunks):
    x = np.random.default_rng(1).normal(size=(11, 3)).astype("<f4")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=x, chunks=chunks, compression="gzip" if chunks else None)
        file["y"] = x
    assert np.array_equal(
        Reader(index_of(str(tmp_path / "a.h5"))).read_one("x", np.array([9, 0, 4])), x[[9, 0, 4]]
    )


def test_cf_packing_is_undone(tmp_path):
    stored = np.array([[-100, 0], [250, -32768], [32767, 1]], dtype=np.int16)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = stored
        file["x"].attrs.update(scale_factor=0.01, add_offset=255.0, _FillValue=np.int16(-32768))
        file["y"] = np.array([1.0, 1e20, 3.0], dtype=np.float32)
        file["y"].attrs["_FillValue"] = np.array([1e20], dtype=np.float32)
    reader = Reader(index_of(str(tmp_path / "a.h5")))
    found = reader.read_one("x", np.arange(3))
    assert found.dtype == np.float32
    expected = np.array([[254.0, 255.0], [257.5, np.nan], [582.67, 255.01]], dtype=np.float32)
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.array_equal(reader.read_one("y", np.arange(3)), np.float32([1, np.nan, 3]), equal_nan=True)


def test_packed_data_agree_with_the_netcdf_rule_written_out(tmp_path):
    """scale_factor alone, add_offset alone."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = np.array([3, 5], dtype=np.uint8)
        file["x"].attrs["scale_factor"] = np.float32(0.5)
        file["y"] = np.array([3, 5], dtype=np.int32)
        file["y"].attrs["add_offset"] = 10.0
    reader = Reader(index_of(str(tmp_path / "a.h5")))
    assert reader.read_one("x", np.arange(2)).tolist() == [1.5, 2.5]
    assert reader.read_one("y", np.arange(2)).tolist() == [13.0, 15.0]


@pytest.mark.parametrize(
    ("stored", "read"),
    [
        ("<f8", "<f4"),
        (">f4", "<f4"),
        ("<f2", "<f4"),
        ("<i4", "<i8"),
        (">i2", "<i8"),
        ("|u1", "|u1"),
        ("?", "|b1"),
    ],
)
def test_dtypes(tmp_path, stored, read):
    path = write_h5(tmp_path / "a.h5", x=np.array([0, 1, 1], dtype=stored), y=np.ones(3))
    found = Reader(index_of(path)).read_one("x", np.array([2, 0]))
    assert found.dtype == np.dtype(read)
    assert found.tolist() == [1, 0]


def test_nan_is_named_by_file_dataset_and_row(tmp_path):
    pattern = write_samples(tmp_path, 29, parts=2)
    with h5py.File(tmp_path / "part1.h5", "a") as file:
        file["x"][3, 2] = np.nan
    index = index_of(pattern)
    samples = np.array([4, 18, 20])
    values = Reader(index).read_one("x", samples)
    with pytest.raises(
        DataError, match=r"part1.h5: x\[3\] \(sample 18\) holds NaN, infinity or _FillValue: mend"
    ):
        index.check_finite("x", samples, values)
    index.check_finite("x", samples[:1], values[:1])


def test_damaged_chunk_is_an_error_that_names_the_rows(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        made = file.create_dataset(
            "x", data=np.random.default_rng(0).normal(size=(8, 100)), chunks=(4, 100), fletcher32=True
        )
        file["y"] = np.ones(8)
        at = made.id.get_chunk_info(1).byte_offset
    raw = bytearray(path.read_bytes())
    raw[at + 10] ^= 0xFF
    path.write_bytes(bytes(raw))
    reader = Reader(index_of(str(path)))
    assert reader.read_one("x", np.arange(4)).shape == (4, 100)
    with pytest.raises(DataError, match=r"a.h5: x rows 5 to 6 cannot be read"):
        reader.read_one("x", np.array([5, 6]))
    with pytest.raises(DataError, match=r"a.h5: x rows 5 to 5 cannot be read"):
        reader.read_one("x", np.array([1, 5, 5]))


def test_damage_between_samples_is_not_theirs(tmp_path):
    """The gap is read for speed alone."""
    path = tmp_path / "a.h5"
    x = np.random.default_rng(0).normal(size=(12, 100)).astype(np.float32)
    with h5py.File(path, "w") as file:
        made = file.create_dataset("x", data=x, chunks=(4, 100), fletcher32=True)
        file["y"] = np.ones(12)
        at = made.id.get_chunk_info(1).byte_offset
    raw = bytearray(path.read_bytes())
    raw[at + 10] ^= 0xFF
    path.write_bytes(bytes(raw))
    samples = np.array([9, 3, 3, 8])
    assert np.array_equal(Reader(index_of(str(path))).read_one("x", samples), x[samples])


@pytest.mark.parametrize(("gap", "block"), [(0, 1 << 20), (8, 1 << 20), (1 << 20, 1 << 20), (1 << 20, 20)])
def test_what_lies_close_together_is_read_at_once(tmp_path, monkeypatch, gap, block):
    """Rows of 4 bytes; the reads that HDF5 is asked for, and the same numbers by any of them."""
    x = np.arange(200, dtype=np.float32)[:, None]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = file["y"] = x
    monkeypatch.setattr(reading, "GAP_BYTES", gap)
    monkeypatch.setattr(reading, "BLOCK_BYTES", block)
    asked = []
    real = h5py.Dataset.__getitem__
    monkeypatch.setattr(
        h5py.Dataset, "__getitem__", lambda s, at, **kw: asked.append(at) or real(s, at, **kw)
    )
    samples = np.array([150, 7, 2, 4, 151, 4, 199, 5, 11])
    found = Reader(index_of(str(tmp_path / "a.h5"))).read_one("x", samples)
    assert np.array_equal(found, x[samples])
    spans = {
        (0, 1 << 20): [(4, 6), (150, 152)],  # single rows go straight to their places
        (8, 1 << 20): [(2, 8), (150, 152)],
        (1 << 20, 1 << 20): [(2, 200)],
        (1 << 20, 20): [(2, 6), (7, 12), (150, 152)],
    }
    assert [(at.start, at.stop) for at in asked if at.stop - at.start > 1] == spans[gap, block]


def test_a_missing_integer_is_refused(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = np.array([[3, 4], [-999, 1], [2, 2]], dtype=np.int16)
        file["x"].attrs["_FillValue"] = np.int16(-999)
        file["y"] = np.ones(3)
    reader = Reader(index_of(str(tmp_path / "a.h5")))
    assert reader.read_one("x", np.array([0, 2])).tolist() == [[3, 4], [2, 2]]
    with pytest.raises(DataError, match=r"a.h5: x\[1\] holds _FillValue -999: integers can't be missing"):
        reader.read_one("x", np.array([2, 1]))


@pytest.mark.parametrize(
    ("chunks", "gap"), [(None, 512), ((1, 16), 3), ((100, 16), 224), ((1, 4), 0), ((1000, 1), 167)]
)
def test_a_gap_counts_its_chunks(tmp_path, chunks, gap):
    """Rows of 64 bytes; each chunk of a gap costs as 8 KiB do."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=np.ones((1000, 16), np.float32), chunks=chunks)
        file["y"] = np.ones(1000)
    reader = Reader(index_of(str(tmp_path / "a.h5")))
    assert reader._rows(reader.index.variables["x"], np.array([5]))[0] in (gap, gap + 1)
