"""Snapshots, runs, rejects and known files."""

import json
import re
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest

from featurepipe.errors import DiskFull, StoreError, UsageError
from featurepipe.store import runs
from featurepipe.store.snapshots import SCHEMA

REJECT = {"key": None, "id": "bad.jpg", "size": 3, "mtime_ns": 4, "reason": "truncated: at byte 3", "run_id": "r"}


def test_the_last_snapshot_by_run_is_current(store, rows):
    first, second = store.new_run_id(), "9" + store.new_run_id()
    rows.snapshot(store, "d", ["b", "c"], run_id=second)
    rows.snapshot(store, "d", ["a"], run_id=first)  # an earlier run that ended later
    assert store.datasets() == ["d"]
    assert store.snapshot("d")["id"].to_pylist() == ["b", "c"]
    assert store.snapshot("d", first)["id"].to_pylist() == ["a"]
    assert store.snapshot("d").schema.equals(SCHEMA)
    assert store.snapshot("other") is None
    with pytest.raises(UsageError, match="unknown snapshot 'x'"):
        store.snapshot("d", "x")


def test_snapshots_round_trip_nulls_and_types(store):
    store.write_snapshot(
        "d",
        store.new_run_id(),
        pa.table(
            {
                "extra": [1, 2],
                "id": ["ok.png", "ü.png"],
                "key": pa.array([b"k" * 32, None], pa.binary(32)),
                "label": pa.array([None, "x"]).dictionary_encode(),
                "split": pa.nulls(2),
                "size": pa.array([1, 2], pa.int32()),
                "mtime_ns": [5, 6],
                "status": ["ok", "rejected"],
                "reason": [None, "empty: 0 bytes"],
            }
        ),
    )
    table = store.snapshot("d")
    assert table.column_names == SCHEMA.names
    assert table.to_pylist()[1] == {
        "id": "ü.png",
        "key": None,
        "label": "x",
        "split": None,
        "size": 2,
        "mtime_ns": 6,
        "status": "rejected",
        "reason": "empty: 0 bytes",
    }


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"status": ["maybe"]}, "not \\['maybe'\\]"),
        ({"status": [None]}, "None"),
        ({"key": [None]}, "every usable image a key"),
        ({"id": [None]}, "needs an id"),
    ],
)
def test_snapshots_that_contradict_themselves_are_refused(store, rows, columns, message):
    with pytest.raises(UsageError, match=message):
        rows.snapshot(store, "d", ["a"], **columns)
    assert store.datasets() == []


def test_a_snapshot_needs_its_columns(store):
    with pytest.raises(UsageError, match=r"missing: .*'key'"):
        store.write_snapshot("d", store.new_run_id(), pa.table({"id": ["a"]}))


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "ü", "x" * 101])
def test_dataset_names_are_checked(store, rows, name):
    with pytest.raises(UsageError, match="not a dataset name"):
        rows.snapshot(store, name, ["a"])


def test_a_damaged_snapshot_is_named(store, rows):
    run_id = rows.snapshot(store, "d", ["a"])
    path = store.path / "snapshots" / "d" / f"{run_id}.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(StoreError, match=path.name):
        store.snapshot("d")


def test_a_full_disk_leaves_the_old_snapshot(store, rows, monkeypatch):
    rows.snapshot(store, "d", ["a"])

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("featurepipe.store.snapshots.pq.write_table", fail)
    with pytest.raises(DiskFull):
        rows.snapshot(store, "d", ["b"])
    assert store.snapshot("d")["id"].to_pylist() == ["a"]
    assert len(list((store.path / "snapshots" / "d").iterdir())) == 1


def test_run_ids_sort_by_time(store):
    ids = []
    for _ in range(20):
        ids.append(store.new_run_id())
        store.write_run({"run_id": ids[-1]})
    assert ids == sorted(set(ids))
    assert re.fullmatch(r"\d{8}T\d{12}Z-[0-9a-f]{8}", ids[0])
    assert [run["run_id"] for run in store.runs()] == ids


@pytest.mark.parametrize("trace", ["run", "snapshot", "part", "quarantine"])
def test_run_ids_grow_even_if_the_clock_was_set_back(store, space, rows, trace):
    future = (datetime.now(UTC) + timedelta(days=800)).strftime("%Y%m%dT%H%M%S%fZ") + "-ffffffff"
    if trace == "run":
        store.write_run({"run_id": future})
    elif trace == "snapshot":
        rows.snapshot(store, "d", ["a"], run_id=future)
    else:
        with space.writer(future) as writer:
            rows.add(writer, ["a"])
    if trace == "quarantine":
        (space.path / "quarantine").mkdir()
        (path,) = space.part_paths()
        path.rename(space.path / "quarantine" / path.name)
    assert store.new_run_id() > future
    assert store.new_run_id()[:15] == future[:15]


def test_foreign_names_do_not_disturb_run_ids():
    assert runs.next_run_id(["zzz.json", "99999999T999999999999.json", ""]) < "3"


def test_run_records_are_replaced_whole(store):
    run_id = store.new_run_id()
    store.write_run({"run_id": run_id, "status": "running"})
    store.write_run({"run_id": run_id, "status": "done", "name": "ü"})
    assert store.runs() == [{"run_id": run_id, "status": "done", "name": "ü"}]
    with pytest.raises(UsageError, match="needs a run_id"):
        store.write_run({})
    with pytest.raises(UsageError, match="not a run id"):
        store.write_run({"run_id": "../x"})


def test_the_last_word_on_a_reject_counts(space):
    space.add_rejects([REJECT, {**REJECT, "key": b"k" * 32, "id": "b"}])
    space.add_rejects([{**REJECT, "reason": "empty: 0 bytes", "run_id": "s"}])
    space.add_rejects([])
    table = space.rejects()
    assert table.column_names == ["key", "id", "size", "mtime_ns", "reason", "run_id"]
    assert [(row["id"], row["key"], row["reason"], row["run_id"]) for row in table.to_pylist()] == [
        ("b", b"k" * 32, "truncated: at byte 3", "r"),
        ("bad.jpg", None, "empty: 0 bytes", "s"),
    ]


def test_a_torn_line_is_passed_over_and_not_joined(space):
    space.add_rejects([REJECT, {**REJECT, "id": "second"}])
    path = space.rejects_path
    path.write_bytes(path.read_bytes()[:-20])
    assert space.rejects()["id"].to_pylist() == ["bad.jpg"]
    space.add_rejects([{**REJECT, "id": "third"}])
    assert space.rejects()["id"].to_pylist() == ["bad.jpg", "third"]


def test_rejects_survive_names_that_are_not_text(space):
    space.add_rejects([{**REJECT, "reason": "unreadable: \udcff.jpg"}])
    assert space.rejects()["reason"].to_pylist() == ["unreadable: ?.jpg"]


def test_rejects_are_of_a_dataset(space):
    space.add_rejects([REJECT], dataset="one")
    space.add_rejects([{**REJECT, "reason": "other: x"}], dataset="two")
    assert space.rejects(dataset="one")["reason"].to_pylist() == ["truncated: at byte 3"]
    assert len(space.rejects()) == 1
    assert json.loads(space.rejects_path.read_text().splitlines()[0])["dataset"] == "one"


def test_known_files_come_from_parts_and_rejects(store, space, rows):
    rows.write(store, space, ["a", "ü"], dataset="d")
    rows.write(store, space, ["a"], columns=("b:gap",), dataset="d")
    space.add_rejects([REJECT, {**REJECT, "key": b"k" * 32, "id": "r.jpg"}], dataset="d")
    known = space.known_files(dataset="d")
    assert known.to_pylist() == [
        {"id": "ü", "size": 11, "mtime_ns": 1001, "key": bytes(rows.keys(["ü"])[0])},
        {"id": "a", "size": 10, "mtime_ns": 1000, "key": bytes(rows.keys(["a"])[0])},
        {"id": "r.jpg", "size": 3, "mtime_ns": 4, "key": b"k" * 32},
    ]
    assert len(space.known_files(dataset="elsewhere")) == 0
    assert len(space.known_files()) == 3


def test_known_files_take_the_last_key_of_a_file(store, space, rows):
    for name in ("old", "new"):
        with space.writer(store.new_run_id()) as writer:
            writer.add(rows.keys([name]), ["x.png"], [5], [6], {"a:gap": rows.features([name])})
    assert space.known_files()["key"].to_pylist() == [bytes(rows.keys(["new"])[0])]


def test_known_files_skip_a_damaged_part(store, space, rows, flip_bit):
    rows.write(store, space, ["a"])
    rows.write(store, space, ["b"])
    first = space.parts()[0]
    flip_bit(space.part_paths()[0], first.arrays["id"].offset)
    assert space.known_files()["id"].to_pylist() == ["b"]
    assert list(space.damaged) == [space.part_paths()[0].name]
