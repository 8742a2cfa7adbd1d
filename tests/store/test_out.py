"""Exports, descriptions, and other people's HDF5 arrays."""

import json
import multiprocessing
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest

from featurepipe.errors import CorruptPart, DiskFull, StoreError, UsageError
from featurepipe.store import describe, export, exports, open_arrays

NAMES = ["cat1", "dog1", "ünicorn", "cat2"]


@pytest.fixture
def features(store, space, rows):
    rows.write(store, space, NAMES[::-1])
    rows.snapshot(store, "d", NAMES, label=["cat", "dog", None, "cat"], split=["train", "test", None, "train"])
    return store.features("d")


def test_export_to_hdf5_is_plain(features, rows, tmp_path):
    export(features, tmp_path / "x.h5")
    with h5py.File(tmp_path / "x.h5") as file:
        assert sorted(file) == ["X", "classes", "ids", "splits", "y"]
        assert file["X"].dtype == np.float16
        np.testing.assert_array_equal(file["X"], rows.features(NAMES))
        assert list(file["ids"].asstr()) == NAMES
        assert list(file["splits"].asstr()) == ["train", "test", "", "train"]
        assert file["y"][:].tolist() == [0, 1, -1, 0]
        assert list(file["classes"].asstr()) == ["cat", "dog"]


def test_export_to_npz_needs_no_pickle(features, rows, tmp_path):
    export(features, tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["X"], rows.features(NAMES))
        assert file["ids"].tolist() == NAMES
        assert file["splits"].tolist() == ["train", "test", "", "train"]
        assert file["classes"][file["y"][[0, 1, 3]]].tolist() == ["cat", "dog", "cat"]
        assert file["y"][2] == -1


def test_export_to_npz_writes_what_numpy_would_some_rows_at_a_time(store, features, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("featurepipe.store.exports.BLOCK_BYTES", 300)
    monkeypatch.setattr("featurepipe.store.exports._TEXTS_AT_ONCE", 3)
    read = []
    one_block = exports._Output.block
    monkeypatch.setattr(exports._Output, "block", lambda self, place: read.append(place) or one_block(self, place))
    export(features, tmp_path / "x.npz")
    assert len(read) > 1
    with np.load(tmp_path / "x.npz") as file:
        names, arrays = file.files, {name: file[name] for name in file.files}
    assert names == ["X", "ids", "splits", "y", "classes"]
    assert arrays["X"].flags.c_contiguous
    np.savez(tmp_path / "numpy.npz", allow_pickle=False, **arrays)
    assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "numpy.npz").read_bytes()
    rows.snapshot(store, "d", NAMES, label=[None] * 4)  # no splits either: texts of no character
    export(store.features("d"), tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as file:
        assert (file["splits"].tolist(), file["splits"].dtype) == ([""] * 4, np.dtype("<U1"))


def test_export_to_parquet_in_blocks(features, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("featurepipe.store.exports.BLOCK_BYTES", 300)
    export(features, tmp_path / "x.parquet")
    table = pq.read_table(tmp_path / "x.parquet")
    assert table.column_names == ["id", "label", "split", "features"]
    assert table["id"].to_pylist() == NAMES
    assert table["label"].to_pylist() == ["cat", "dog", None, "cat"]
    np.testing.assert_array_equal(np.array(table["features"].to_pylist()), rows.features(NAMES))


def test_export_without_labels_has_no_y(store, features, rows, tmp_path):
    rows.snapshot(store, "d", NAMES, label=[None] * 4)
    export(store.features("d"), tmp_path / "x.h5")
    with h5py.File(tmp_path / "x.h5") as file:
        assert sorted(file) == ["X", "ids", "splits"]


def test_export_names_the_choices(features, tmp_path):
    with pytest.raises(UsageError, match=r"'x\.csv'.*\.h5, \.npz, \.parquet"):
        export(features, tmp_path / "x.csv")
    with pytest.raises(UsageError, match="no folder"):
        export(features, tmp_path / "absent" / "x.h5")


@pytest.mark.parametrize("suffix", [".h5", ".npz", ".parquet"])
def test_a_failed_export_leaves_the_old_file(features, tmp_path, monkeypatch, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_text("old")

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("featurepipe.store.rows.ColumnRows.read", fail)
    with pytest.raises(DiskFull):
        export(features, path)
    assert path.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store", path.name]


@pytest.mark.parametrize("old", [None, "old"])
@pytest.mark.parametrize("suffix", [".h5", ".npz", ".parquet"])
def test_export_of_a_damaged_part_writes_nothing(store, features, space, rows, flip_bit, tmp_path, suffix, old):
    rows.write(store, space, ["other"])
    part, unused = space.parts()
    path = tmp_path / f"x{suffix}"
    if old:
        path.write_text(old)
    flip_bit(part_path := space.part_paths()[0], part.arrays["features/a:gap"].offset + 5)
    with pytest.raises(CorruptPart, match=rf"part {part.name}: .*featurepipe verify {store.path}, then extract again"):
        export(features, path)
    assert (path.read_text() if path.exists() else None) == old
    flip_bit(part_path, part.arrays["features/a:gap"].offset + 5)  # as it was
    flip_bit(space.part_paths()[1], unused.arrays["features/a:gap"].offset)  # of no concern here
    export(features, path)
    assert path.stat().st_size > 100


def test_a_description_is_json(store, features, space, rows):
    rows.snapshot(store, "d", [*NAMES, "bad", "cat1"], status=["ok"] * 4 + ["rejected", "ok"], split=["train"] * 6)
    store.write_run({"run_id": store.new_run_id(), "status": "done"})
    said = json.loads(json.dumps(describe(store)))
    (described,) = said["spaces"]
    assert described["columns"] == {"a:gap": {"dtype": "float16", "width": 4, "rows": 4, "bytes": 32}}
    assert (described["name"], described["parts"], described["rows"]) == (space.name, 1, 4)
    assert described["bytes"] == space.part_paths()[0].stat().st_size
    (dataset,) = said["datasets"]
    assert (dataset["images"], dataset["distinct"], dataset["rejects"], dataset["snapshots"]) == (5, 4, 1, 2)
    assert dataset["labels"] == {"c": 3, "d": 1, "ü": 1}
    assert dataset["splits"] == {"train": 5}
    assert said["runs"][0]["status"] == "done"


@pytest.fixture
def images(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (50, 6, 5), np.uint8)
    with h5py.File(tmp_path / "images.h5", "w") as file:
        file["plain"] = values
        file.create_dataset("set/packed", data=values, chunks=(7, 6, 5), compression="gzip")
        file["big_endian"] = values.astype(">i4")
        file["label"] = ["cat", "dög"]
        file["flags"] = np.array([True, False])
        file["empty"] = np.zeros((0, 3))
        file["nothing"] = h5py.Empty("f4")
        file["scalar"] = 3
    return tmp_path / "images.h5", values


def test_arrays_are_sliced_lazily(images):
    path, values = images
    arrays = open_arrays(path)
    assert sorted(arrays) == ["big_endian", "empty", "flags", "label", "plain", "scalar", "set/packed"]
    for name in ("plain", "set/packed", "big_endian"):
        array = pickle.loads(pickle.dumps(arrays[name]))
        assert (array.shape, len(array)) == (values.shape, 50)
        np.testing.assert_array_equal(array[3], values[3])
        np.testing.assert_array_equal(array[10:20, 1], values[10:20, 1])
        np.testing.assert_array_equal(array[-1], values[-1])
    assert arrays["plain"].offset is not None
    assert arrays["set/packed"].offset is None
    assert arrays["label"][:].tolist() == ["cat", "dög"]
    assert arrays["flags"][:].tolist() == [True, False]
    assert arrays["empty"][:].shape == (0, 3)
    assert arrays["scalar"][()] == 3


def read_row(array, index):
    return array[index]


def test_arrays_may_be_read_by_threads_and_processes(images):
    path, values = images
    for array in (open_arrays(path)["plain"], open_arrays(path)["set/packed"]):
        with ThreadPoolExecutor(4) as pool:
            np.testing.assert_array_equal(list(pool.map(array.__getitem__, range(50))), values)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            np.testing.assert_array_equal(pool.starmap(read_row, [(array, i) for i in range(5)]), values[:5])


FORKED = """
import os, sys
import numpy as np
from featurepipe.store import open_arrays

array = open_arrays(sys.argv[1])["set/packed"]
values = array[:]  # the parent holds a handle now
children = []
for child in range(3):
    pid = os.fork()
    if pid == 0:
        same = all(np.array_equal(array[i], values[i]) for i in range(child, 50, 3))
        os._exit(0 if same and array._local.pid == os.getpid() else 1)
    children.append(pid)
assert all(np.array_equal(array[i], values[i]) for i in range(50))
assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]
"""


def test_a_handle_is_never_shared_over_a_fork(images):
    path, _ = images
    subprocess.run([sys.executable, "-c", FORKED, str(path)], check=True, timeout=120)


def test_arrays_whose_values_lie_in_other_files_are_refused(images, tmp_path):
    path, values = images
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        layout = h5py.VirtualLayout(values.shape, values.dtype)
        layout[:] = h5py.VirtualSource(path, "plain", values.shape)
        file.create_virtual_dataset("x/images", layout)
    with pytest.raises(
        UsageError, match=r"virtual\.h5: /x/images is a virtual dataset: .* copy the data into one file"
    ):
        open_arrays(tmp_path / "virtual.h5")
    with h5py.File(tmp_path / "external.h5", "w") as file:
        file.create_dataset("images", data=values, external=[(str(tmp_path / "raw"), 0, values.nbytes)])
    with pytest.raises(UsageError, match=r"external\.h5: /images is stored externally: "):
        open_arrays(tmp_path / "external.h5")


def test_arrays_that_cannot_be_read_are_store_errors(images, tmp_path):
    path, _ = images
    arrays = open_arrays(path)
    path.unlink()
    with pytest.raises(StoreError, match="plain"):
        arrays["plain"][0]
    with pytest.raises(StoreError, match="packed"):
        arrays["set/packed"][0]
    (tmp_path / "x.h5").write_text("no")
    with pytest.raises(StoreError, match="as an HDF5 file"):
        open_arrays(tmp_path / "x.h5")
