"""Snapshots, runs, rejects and known files."""

import errno
import filecmp
import json
import os
import re
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurepipe.errors import DiskFull, StoreError, UsageError
from featurepipe.store import documents, keys
from featurepipe.store.atomic import MOST_NESTED, parsed_object, read_json, write_json
from featurepipe.store.snapshots import SCHEMA

REJECT = {"key": None, "id": "bad.jpg", "size": 3, "mtime_ns": 4, "reason": "truncated: at byte 3", "run_id": "r"}


def test_the_last_snapshot_by_run_is_current(store, rows):
    first, second = store.new_run_id(), f"2999{store.new_run_id()[4:]}"
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


def test_some_columns_of_a_snapshot_can_be_read_alone(store, rows):
    rows.snapshot(store, "d", ["b", "c"])
    everything = store.snapshot("d")
    assert store.snapshot("d", columns=["key", "id"]).equals(everything.select(["key", "id"]))


def test_a_snapshot_that_lacks_a_column_is_named(store, rows):
    run_id = rows.snapshot(store, "d", ["a"])
    path = store.path / "snapshots" / "d" / f"{run_id}.parquet"
    pq.write_table(store.snapshot("d").drop_columns(["status"]), path)
    with pytest.raises(StoreError, match=rf"{run_id}.*status"):
        store.snapshot("d")


def test_a_snapshot_that_equals_the_last_is_another_name_of_it(store, rows):
    folder = store.path / "snapshots" / "d"
    names = [f"n{number}" for number in range(300)]
    run_ids = [rows.snapshot(store, "d", some) for some in (names, names, names[1:], names[1:], names)]
    files = [(folder / f"{run_id}.parquet").stat() for run_id in run_ids]
    assert [files[0].st_ino == file.st_ino for file in files] == [True, True, False, False, False]
    assert [file.st_nlink for file in files] == [2, 2, 2, 2, 1]
    (folder / f"{run_ids[0]}.parquet").unlink()
    assert store.snapshot("d", run_ids[1])["id"].to_pylist() == names
    assert sorted(path.name for path in folder.iterdir()) == [f"{run_id}.parquet" for run_id in run_ids[1:]]


def test_equal_snapshots_in_pieces_are_the_same_file(store, rows):
    run_id = rows.snapshot(store, "d", [f"n{number}" for number in range(300)])
    table = store.snapshot("d")
    again = store.write_snapshot("d", store.new_run_id(), pa.concat_tables([table[:7], table[7:]]))
    assert again.samefile(again.with_name(f"{run_id}.parquet"))


@pytest.mark.parametrize("failing", ["link", "cmp"])
def test_where_files_cannot_be_linked_a_snapshot_is_written(store, rows, monkeypatch, failing):
    rows.snapshot(store, "d", ["a"])

    def fail(*args, **kwargs):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr({"link": os, "cmp": filecmp}[failing], failing, fail)
    second = rows.snapshot(store, "d", ["a"])
    assert (store.path / "snapshots" / "d" / f"{second}.parquet").stat().st_nlink == 1
    assert store.snapshot("d", second)["id"].to_pylist() == ["a"]
    assert len(list((store.path / "snapshots" / "d").iterdir())) == 2


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

    monkeypatch.setattr("featurepipe.store.snapshots.pq.ParquetWriter.write_table", fail)
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
    names = ["zzz.json", "99999999T999999999999.json", "", "99999999T999999999999Z-00000000.json"]
    assert documents.next_run_id(names) < "3"
    assert documents.next_run_id([*names, "29990101T000000000001Z-00000000.json"])[:22] == "29990101T000000000002Z"


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


def test_known_files_of_some_ids_are_those_of_all(store, space, rows, monkeypatch):
    names = [f"{number:02}" for number in range(40)]
    for start in range(0, 40, 5):
        rows.write(store, space, names[start : start + 5], dataset="d")
    rows.write(store, space, ["07", "other"], dataset="d")  # of another size and time than before
    reject = {"key": b"k" * 32, "id": "21", "size": 1, "mtime_ns": 1, "reason": "r: x", "run_id": "r"}
    space.add_rejects([reject, {**reject, "id": "elsewhere"}], dataset="d")
    everything = space.known_files(dataset="d").to_pylist()
    wanted = ["07", "21", "39", "not there"]
    expected = [row for row in everything if row["id"] in wanted]
    assert sorted(row["id"] for row in expected) == ["07", "07", "21", "21", "39"]
    for at_once in (1, 12, 1000):
        monkeypatch.setattr(keys, "_ROWS_AT_ONCE", at_once)
        assert space.known_files(dataset="d", ids=pa.chunked_array([wanted])).to_pylist() == expected
    assert len(space.known_files(dataset="d", ids=pa.chunked_array([[]], pa.string()))) == 0


def test_known_files_since_a_run_are_of_later_parts_and_all_rejects(store, space, rows):
    first, second, third = (rows.write(store, space, [name], dataset="d") for name in "abc")
    space.add_rejects(
        [{"key": b"k" * 32, "id": "r", "size": 1, "mtime_ns": 1, "reason": "r: x", "run_id": first}], dataset="d"
    )
    for run_id, expected in ((None, "abcr"), (first, "bcr"), (second, "cr"), (third, "r")):
        assert "".join(space.known_files(dataset="d", since=run_id)["id"].to_pylist()) == expected


def test_known_files_skip_a_damaged_part(store, space, rows, flip_bit):
    rows.write(store, space, ["a"])
    rows.write(store, space, ["b"])
    first = space.parts()[0]
    flip_bit(space.part_paths()[0], first.arrays["id"].offset)
    assert space.known_files()["id"].to_pylist() == ["b"]
    assert list(space.damaged) == [space.part_paths()[0].name]


def test_documents_are_nested_to_a_limit_and_no_deeper():
    def nested(levels: int) -> bytes:
        return b'{"a":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"

    value = parsed_object(nested(MOST_NESTED))["a"]
    assert value == json.loads("[" * (MOST_NESTED - 1) + "]" * (MOST_NESTED - 1))
    for levels in (MOST_NESTED + 1, 10**6):
        with pytest.raises(ValueError, match=f"nested deeper than {MOST_NESTED} levels"):
            parsed_object(nested(levels))


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
def test_the_first_stays_where_there_are_no_hard_links(tmp_path, monkeypatch, code):
    def fail(*_args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", fail)
    for value in ("first", "second"):
        write_json(tmp_path / "a.json", {"is": value}, replace=False)
    assert read_json(tmp_path / "a.json") == {"is": "first"}
    write_json(tmp_path / "a.json", {"is": "third"})
    assert read_json(tmp_path / "a.json") == {"is": "third"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
