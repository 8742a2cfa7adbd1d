"""What a nightly job lets go: old snapshots of its own dataset, and the records of old runs."""

import numpy as np
import pytest

from featurepipe.errors import UsageError
from featurepipe.store import gc_store
from featurepipe.store.gc import remove_runs

NAMES = [f"n{i}" for i in range(12)]


@pytest.fixture
def nights(store, space, rows):
    """Four nights of dataset d, each without one more image, and two of dataset e."""
    for dataset in ("d", "e"):
        rows.write(store, space, [f"{dataset}{name}" for name in NAMES], dataset=dataset)
    ids = {"d": [], "e": []}
    for dataset, count in (("d", 4), ("e", 2)):
        for night in range(count):
            ids[dataset].append(rows.snapshot(store, dataset, [f"{dataset}{name}" for name in NAMES[night:]]))
            store.write_run({"run_id": ids[dataset][-1], "dataset": dataset})
    return ids


def test_only_one_datasets_snapshots_go(store, rows, nights):
    report = gc_store(store, keep_snapshots=2, dataset="d")
    assert (report.snapshots_removed, report.rows_dropped) == (2, 2)
    assert store.snapshot_ids("d") == nights["d"][2:]
    assert store.snapshot_ids("e") == nights["e"]
    left = [f"d{name}" for name in NAMES[2:]] + [f"e{name}" for name in NAMES]
    (space,) = store.spaces()
    assert space.index().contains(rows.keys(left)).all()
    assert sum(part.rows for part in space.parts()) == len(left)


def test_spared_snapshots_stay_with_what_they_need(store, rows, nights):
    first = nights["d"][0]
    planned = gc_store(store, keep_snapshots=1, dataset="d", spared={first}, dry_run=True)
    assert store.snapshot_ids("d") == nights["d"]
    report = gc_store(store, keep_snapshots=1, dataset="d", spared={first})
    assert planned == report
    assert (report.snapshots_removed, report.rows_dropped) == (2, 0)
    assert store.snapshot_ids("d") == [first, nights["d"][3]]
    np.testing.assert_array_equal(
        store.features("d", snapshot=first).read(), rows.features([f"d{name}" for name in NAMES])
    )


def test_records_go_unless_their_snapshot_is_there(store, nights):
    gc_store(store, keep_snapshots=2, dataset="d")
    every = [*nights["d"], *nights["e"], "never-was"]
    assert remove_runs(store, every, dry_run=True) == nights["d"][:2]
    assert len(store.runs()) == 6
    assert remove_runs(store, every) == nights["d"][:2]
    assert [run["run_id"] for run in store.runs()] == [*nights["d"][2:], *nights["e"]]
    with pytest.raises(UsageError, match="not a run id"):
        remove_runs(store, ["../store"])


def test_keys_of_rejected_images_count_and_missing_ones_do_not(store, rows, nights):
    names = [f"d{name}" for name in NAMES[3:]]
    rows.snapshot(
        store, "d", [*names, "unread"], status=["rejected", *["ok"] * (len(names) - 1), "rejected"],
        key=[*(bytes(key) for key in rows.keys(names)), None],
    )  # fmt: skip
    assert gc_store(store, keep_snapshots=1, dataset="d").rows_dropped == 3
    assert store.spaces()[0].index().contains(rows.keys(names)).all()


def test_equal_snapshots_are_names_of_one_file_and_are_read_and_freed_once(store, rows, nights, monkeypatch):
    names = [f"d{name}" for name in NAMES[3:]]
    same = [nights["d"][-1], *(rows.snapshot(store, "d", names) for _ in range(3))]
    files = [store.path / "snapshots" / "d" / f"{run_id}.parquet" for run_id in same]
    assert {path.stat().st_nlink for path in files} == {4}
    read = []
    whole = type(store).snapshot
    monkeypatch.setattr(type(store), "snapshot", lambda *a, **k: (read.append(a[2]), whole(*a, **k))[1])
    planned = gc_store(store, keep_snapshots=2, dataset="d", dry_run=True)
    assert read == [same[-1], nights["e"][-1], nights["e"][0]]
    others = sum((store.path / "snapshots" / "d" / f"{run_id}.parquet").stat().st_size for run_id in nights["d"][:3])
    before = sum(part.file_bytes for part in store.spaces()[0].parts())
    report = gc_store(store, keep_snapshots=2, dataset="d")
    assert planned == report
    assert store.snapshot_ids("d") == same[2:]
    assert report.bytes_freed == others + before - sum(part.file_bytes for part in store.spaces()[0].parts())
    last = rows.snapshot(store, "d", names[:1])
    size = files[3].stat().st_size
    assert gc_store(store, keep_snapshots=1, dataset="d", dry_run=True).bytes_freed > size
    gc_store(store, keep_snapshots=1, dataset="d")
    assert store.snapshot_ids("d") == [last]
