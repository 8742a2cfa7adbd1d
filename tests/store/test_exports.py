"""Exports of what changed, in partitions, in another dtype, with further columns: values equal what the store reads."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurepipe.errors import DiskFull, UnknownSnapshot, UsageError
from featurepipe.store import export, export_dataset
from featurepipe.store.exports import read_about
from featurepipe.store.rows import ColumnRows
from featurepipe.store.snapshots import SCHEMA

FIRST = ["cat1", "dog1", "ünicorn", "cat2", "ant"]
SECOND = ["bee", "cat1", "dog1", "cat2"]


@pytest.fixture
def nights(store, space, rows):
    """Two nights: bee is new, dog1 has cat2's bytes now, cat2 another label, ünicorn is gone and ant is broken."""
    rows.write(store, space, [*FIRST, "bee"])
    first = rows.snapshot(store, "d", FIRST)
    keys = [bytes(key) for key in rows.keys(["bee", "cat1", "cat2", "cat2", "ant"])]
    second = rows.snapshot(
        store, "d", [*SECOND, "ant"], key=keys, label=["b", "c", "d", "dog", "a"], status=["ok"] * 4 + ["rejected"]
    )
    return first, second


def vectors(path):
    table = pq.read_table(path)
    width = table.schema.field("features").type.list_size
    return table, table["features"].combine_chunks().flatten().to_numpy().reshape(-1, width)


def test_what_is_new_changed_or_relabelled_since_a_snapshot(store, rows, nights, tmp_path):
    told = export_dataset(store, "a", tmp_path / "x.parquet", since=nights[0], silent=True)
    table, values = vectors(tmp_path / "x.parquet")
    assert table["id"].to_pylist() == ["bee", "dog1", "cat2"]
    np.testing.assert_array_equal(values, rows.features(["bee", "cat2", "cat2"]))
    counts = {name: told[name] for name in ("new", "changed", "relabelled", "deleted")}
    assert counts == {"new": 1, "changed": 1, "relabelled": 1, "deleted": 2}
    gone = pq.read_table(tmp_path / "x.deleted.parquet")
    assert gone["id"].to_pylist() == ["ünicorn", "ant"]
    assert gone["key"].to_pylist() == [bytes(key) for key in rows.keys(["ünicorn", "ant"])]
    assert (told["since"], told["snapshot"]) == nights
    assert table.schema.metadata[b"snapshot"].decode() == nights[1]


def test_new_is_since_the_run_before_and_nothing_new_is_no_error(store, rows, nights, tmp_path, capsys):
    told = export_dataset(store, "a", tmp_path / "x.npz", new=True, silent=True)
    assert (told["since"], told["rows"]) == (nights[0], 3)
    third = rows.snapshot(store, "d", SECOND, run_id=store.new_run_id(), key=_keys(store), label=["b", "c", "d", "dog"])
    told = export_dataset(store, "a", tmp_path / "x.npz", new=True, silent=True)
    assert (told["since"], told["snapshot"], told["rows"], told["deleted"]) == (nights[1], third, 0, 0)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as file:
        assert file["X"].shape == (0, 4)
    with pytest.raises(UsageError, match="first snapshot of dataset d: all is new; leave out new"):
        export_dataset(store, "a", tmp_path / "x.npz", new=True, snapshot=nights[0], silent=True)
    with pytest.raises(UsageError, match="all is new; leave out since"):
        export_dataset(store, "a", tmp_path / "x.npz", since="previous", snapshot=nights[0], silent=True)
    previous = export_dataset(store, "a", tmp_path / "x.npz", since="previous", silent=True)
    assert previous == export_dataset(store, "a", tmp_path / "x.npz", new=True, silent=True)
    first = export_dataset(store, "a", tmp_path / "x.npz", since="first", silent=True)
    assert first == export_dataset(store, "a", tmp_path / "x.npz", since=nights[0], silent=True)
    with pytest.raises(UsageError, match="is later than the snapshot"):
        export_dataset(store, "a", tmp_path / "x.npz", since=third, snapshot=nights[0], silent=True)
    for strange in ("2020", "yesterday"):  # before and after all that there are
        with pytest.raises(UnknownSnapshot, match=f"unknown snapshot '{strange}'"):
            export_dataset(store, "a", tmp_path / "x.npz", since=strange)
    assert capsys.readouterr().err == ""  # nothing was moved, so nobody tries again
    with pytest.raises(UsageError, match="two beginnings"):
        export_dataset(store, "a", tmp_path / "x.npz", since=third, new=True, silent=True)


def _keys(store):
    return store.snapshot("d", columns=["key"])["key"].to_pylist()[:4]


def test_new_passes_over_snapshots_of_the_same_night(store, rows, nights, tmp_path):
    record = {"run_id": store.new_run_id(), "command": "run", "extractions": list(nights), "status": "done"}
    third = rows.snapshot(store, "d", ["cat1"])
    store.write_run({**record, "run_id": store.new_run_id(), "extractions": [nights[1], third]})
    told = export_dataset(store, "a", tmp_path / "x.npz", new=True, silent=True)
    assert (told["since"], told["rows"], told["deleted"]) == (nights[0], 0, 4)


def test_of_a_split_what_went_to_another_one_is_deleted(store, rows, nights, tmp_path):
    third = rows.snapshot(store, "d", SECOND, split=["train", "train", "test", "test"])
    rows.snapshot(store, "d", SECOND, split=["train", "test", "train", "test"])
    told = export_dataset(store, "a", tmp_path / "x.parquet", since=third, split="train", silent=True)
    assert pq.read_table(tmp_path / "x.parquet")["id"].to_pylist() == ["dog1"]
    assert pq.read_table(told["deleted_file"])["id"].to_pylist() == ["cat1"]


def test_a_folder_of_files_of_so_many_rows(store, rows, nights, tmp_path):
    told = export_dataset(store, "a", tmp_path / "out", rows_per_file=3, snapshot=nights[0], silent=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "_export.json",
        "features-00000.parquet",
        "features-00001.parquet",
    ]
    table, values = vectors(tmp_path / "out")  # as one dataset: names with _ before them are passed over
    assert table["id"].to_pylist() == FIRST
    np.testing.assert_array_equal(values, store.features("d", "a", snapshot=nights[0]).read())
    about = read_about(tmp_path / "out")
    assert (about["rows"], about["snapshot"], about["files"], about["dtype"]) == (
        5, nights[0], ["features-00000.parquet", "features-00001.parquet"], "float16",
    )  # fmt: skip
    assert (told["rows"], told["files"]) == (5, 2)
    export_dataset(store, "a", tmp_path / "out", rows_per_file=3, since=nights[0], silent=True)  # in its place
    assert pq.read_table(tmp_path / "out")["id"].to_pylist() == ["bee", "dog1", "cat2"]
    assert pq.read_table(tmp_path / "out" / "_deleted.parquet")["id"].to_pylist() == ["ünicorn", "ant"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "store"]


def test_a_folder_of_something_else_is_left_alone(store, nights, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("x")
    with pytest.raises(UsageError, match="photos: it holds something else"):
        export_dataset(store, "a", tmp_path / "photos", silent=True)
    assert (tmp_path / "photos" / "a.jpg").read_text() == "x"


def test_a_failed_folder_leaves_the_old_one(store, nights, tmp_path, monkeypatch):
    export_dataset(store, "a", tmp_path / "out", snapshot=nights[0], silent=True)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("featurepipe.store.rows.ColumnRows.read", fail)
    with pytest.raises(DiskFull):
        export_dataset(store, "a", tmp_path / "out", silent=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "store"]


def test_a_list_of_what_went_does_not_outlive_its_file(store, nights, tmp_path):
    export_dataset(store, "a", tmp_path / "x.parquet", since=nights[0], silent=True)
    export_dataset(store, "a", tmp_path / "x.parquet", snapshot=nights[0], silent=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "x.parquet"]


def test_a_folder_that_a_kill_left_aside_is_put_back(store, nights, tmp_path, monkeypatch):
    export_dataset(store, "a", tmp_path / "out", snapshot=nights[0], silent=True)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out").rename(tmp_path / ".out.before.tmp")  # killed before the new one took the name

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("featurepipe.store.rows.ColumnRows.read", fail)
        with pytest.raises(DiskFull):
            export_dataset(store, "a", tmp_path / "out", silent=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "store"]


@pytest.mark.parametrize("name", ["x.h5", "x.parquet", "out"])
def test_no_more_rows_are_read_at_a_time_than_fit_the_bound(store, space, rows, tmp_path, monkeypatch, name):
    names = [f"image {number}" for number in range(500)]
    rows.write(store, space, names)
    rows.snapshot(store, "many", names)
    features, most = store.features("many", "a"), []
    monkeypatch.setattr("featurepipe.store.exports.BLOCK_BYTES", 20 * features.rows.row_bytes(np.float32))
    read = ColumnRows.read

    def counting(self, *args, **options):
        most.append(len(self))
        return read(self, *args, **options)

    monkeypatch.setattr(ColumnRows, "read", counting)
    export_dataset(store, "a", tmp_path / name, dataset="many", dtype="float32", rows_per_file=70, silent=True)
    assert (max(most), sum(most)) == (20, 500)
    if name != "x.h5":
        table, values = vectors(tmp_path / name)
        assert table["id"].to_pylist() == names
        np.testing.assert_array_equal(values, rows.features(names))
        first = min((tmp_path / name).glob("*.parquet")) if name == "out" else tmp_path / name
        file = pq.ParquetFile(first)
        assert max(file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)) == 20


def test_another_dtype(store, rows, nights, tmp_path):
    export_dataset(store, "a", tmp_path / "x.npz", dtype="float32", silent=True)
    X = np.load(tmp_path / "x.npz")["X"]
    assert X.dtype == np.float32
    np.testing.assert_array_equal(X, store.features("d", "a").read(np.float32))
    with pytest.raises(UsageError, match="unknown dtype 'float64'; choices: float32, float16"):
        export_dataset(store, "a", tmp_path / "x.npz", dtype="float64", silent=True)


def test_values_too_large_for_float16_are_refused(store, rows, tmp_path):
    space = store.open_space({"dtype": "float32"}, backbone="wide")
    with space.writer(store.new_run_id()) as writer:
        writer.add(rows.keys(["a"]), ["a"], [1], [1], {"a:gap": np.float32([[1, 70000]])})
    rows.snapshot(store, "w", ["a"])
    with pytest.raises(UsageError, match="too large for dtype='float16'; leave it out"):
        export_dataset(store, "a", tmp_path / "x.parquet", dtype="float16", silent=True)
    assert not list(tmp_path.glob("*.parquet"))
    export_dataset(store, "a", tmp_path / "x.parquet", silent=True)
    assert vectors(tmp_path / "x.parquet")[1].tolist() == [[1, 70000]]


@pytest.fixture
def patients(store, space, rows):
    """A dataset of a manifest with a column of its own."""
    rows.write(store, space, FIRST)
    run_id = store.new_run_id()
    values = {
        "id": FIRST, "key": [bytes(key) for key in rows.keys(FIRST)], "label": [None] * 5, "split": [None] * 5,
        "size": [7] * 5, "mtime_ns": [1] * 5, "status": ["ok"] * 5, "reason": [None] * 5,
    }  # fmt: skip
    table = pa.table(values, schema=SCHEMA).append_column("column:patient", pa.array(["p", "q", None, "p", "r"]))
    store.write_snapshot("d", run_id, table)
    return table


def test_keys_and_columns_of_the_manifest_come_along(store, rows, patients, tmp_path):
    export_dataset(store, "a", tmp_path / "x.parquet", metadata=("key", "patient"), silent=True)
    table, _ = vectors(tmp_path / "x.parquet")
    assert table.column_names == ["id", "label", "split", "key", "patient", "features"]
    assert table["key"].to_pylist() == [bytes(key) for key in rows.keys(FIRST)]
    assert table["patient"].to_pylist() == ["p", "q", None, "p", "r"]
    export_dataset(store, "a", tmp_path / "x.npz", metadata=("all",), silent=True)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["key"], rows.keys(FIRST))
        assert file["patient"].tolist() == ["p", "q", "", "p", "r"]
        assert file["size"].tolist() == [7] * 5
    with pytest.raises(UsageError, match=re.escape("unknown column 'patent' in dataset d; nearest: patient")):
        export_dataset(store, "a", tmp_path / "x.npz", metadata=("patent",), silent=True)


def test_another_value_in_a_column_that_is_written_is_a_change(store, patients, tmp_path):
    first = store.snapshot_ids("d")[0]
    column = pa.array(["p", "q", "new", "p", "r"])
    store.write_snapshot(
        "d", store.new_run_id(), patients.set_column(patients.num_columns - 1, "column:patient", column)
    )
    with_it = export_dataset(store, "a", tmp_path / "x.parquet", since=first, metadata=("patient",), silent=True)
    assert pq.read_table(tmp_path / "x.parquet")["id"].to_pylist() == ["ünicorn"]
    assert with_it["relabelled"] == 1
    assert export_dataset(store, "a", tmp_path / "x.parquet", since=first, silent=True)["rows"] == 0


def test_another_value_of_a_role_is_a_change(store, patients, tmp_path):
    first = store.snapshot_ids("d")[0]
    column = pa.array(["p", "q", "new", "p", "r"])
    store.write_snapshot(
        "d", store.new_run_id(), patients.set_column(patients.num_columns - 1, "column:patient", column)
    )
    for roles in ({"group": "patient"}, {"label": "Patient"}):
        export_dataset(store, "a", tmp_path / "x.parquet", since=first, **roles, silent=True)
        assert pq.read_table(tmp_path / "x.parquet")["id"].to_pylist() == ["ünicorn"]


def test_a_file_of_labels_is_refused_where_corrections_in_it_would_be_missed(store, nights, tmp_path):
    labels = tmp_path / "labels.csv"
    labels.write_text("id,label,group\n" + "".join(f"{id_},new,g\n" for id_ in SECOND))
    for increment in ({"since": nights[0]}, {"new": True}):
        for files in ({"labels": str(labels)}, {"labels": dict.fromkeys(SECOND, "new")}, {"group": str(labels)}):
            with pytest.raises(UsageError, match="is not known, and corrections in it would be missed"):
                export_dataset(store, "a", tmp_path / "x.parquet", **increment, **files, silent=True)
    assert not (tmp_path / "x.parquet").exists()
    for changed, ids in ((False, ["bee", "dog1", "cat2"]), (True, SECOND)):  # as a job knows it
        told = export_dataset(
            store, "a", tmp_path / "x.parquet", since=nights[0], labels=str(labels), labels_changed=changed, silent=True
        )
        assert pq.read_table(tmp_path / "x.parquet")["id"].to_pylist() == ids
        assert (told["new"], told["changed"], told["relabelled"]) == (1, 1, len(ids) - 2)


def test_a_view_is_exported_to_a_folder(store, rows, nights, tmp_path):
    export(store.features("d", "a").take(np.array([3, 0])), tmp_path / "two")
    table, values = vectors(tmp_path / "two")
    assert table["id"].to_pylist() == ["cat2", "bee"]
    np.testing.assert_array_equal(values, rows.features(["cat2", "bee"]))
    assert json.loads((tmp_path / "two" / "_export.json").read_text())["rows"] == 2
