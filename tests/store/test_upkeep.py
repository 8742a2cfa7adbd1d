"""verify, compact, gc."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from featurepipe.errors import DiskFull, StoreError, StoreLocked, UsageError
from featurepipe.store import compact, compact_store, gc_store, verify_store
from featurepipe.store.parts import damaged_arrays

NAMES = [f"n{i}" for i in range(30)]


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.fixture
def filled(store, space, rows):
    for start in range(0, 30, 10):
        rows.write(store, space, NAMES[start : start + 10], dataset="d")
    run_id = rows.snapshot(store, "d", NAMES)
    store.write_run({"run_id": run_id})
    space.add_rejects([{"key": None, "id": "x", "size": 1, "mtime_ns": 1, "reason": "r: x", "run_id": run_id}])
    return store


def test_an_intact_store_is_clean(filled):
    seen = []
    before = tree(filled.path)
    report = verify_store(filled, progress=lambda done, total: seen.append((done, total)))
    assert report.clean
    assert (report.parts, report.rows, report.problems, report.leftovers) == (3, 30, [], [])
    assert report.bytes == sum(path.stat().st_size for path in filled.spaces()[0].part_paths())
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert tree(filled.path) == before


@pytest.mark.parametrize("name", ["key", "id", "size", "mtime_ns", "features/a:gap", "header"])
def test_a_flipped_bit_is_named_quarantined_and_its_rows_are_absent(filled, rows, flip_bit, name):
    space = filled.spaces()[0]
    part = space.parts()[1]
    flip_bit(Path(part.path), 70 if name == "header" else part.arrays[name].offset + 3)
    assert [p.dataset for p in verify_store(filled, quarantine=False).problems] == [name]
    assert len(space.part_paths()) == 3
    (problem,) = verify_store(filled).problems
    assert (problem.part, problem.space, problem.dataset) == (part.name, space.name, name)
    assert problem.quarantined == f"spaces/{space.name}/quarantine/{part.name}.h5"
    assert (filled.path / problem.quarantined).is_file()
    assert verify_store(filled).clean
    assert filled.spaces()[0].index().contains(rows.keys(NAMES)).tolist() == [True] * 10 + [False] * 10 + [True] * 10
    rows.write(filled, space, NAMES[10:20])  # what extract does next
    np.testing.assert_array_equal(filled.features("d").read(), rows.features(NAMES))


def test_a_second_quarantine_of_the_same_name_keeps_both(filled, flip_bit):
    space = filled.spaces()[0]
    path = space.part_paths()[0]
    intact = path.read_bytes()
    for _ in range(2):
        path.write_bytes(intact)
        flip_bit(path, 70)
        verify_store(filled)
    assert len(list((space.path / "quarantine").iterdir())) == 2


def test_a_part_of_another_space_is_named_and_quarantined(filled, rows):
    space = filled.spaces()[0]
    other = filled.open_space({"dtype": "float16", "net": "another"}, backbone="another")
    rows.write(filled, other, ["stranger"], dataset="d")
    [path] = other.part_paths()
    moved = path.rename(space.path / "parts" / path.name)
    [problem] = verify_store(filled).problems
    assert (problem.part, problem.space, problem.dataset) == (moved.stem, space.name, "header")
    assert problem.what == f"it belongs to another feature space ({other.fingerprint[:12]})"
    assert (filled.path / problem.quarantined).is_file()
    assert not moved.exists()
    assert verify_store(filled).clean


def test_broken_documents_are_named(filled):
    space = filled.spaces()[0]
    record = json.loads((space.path / "space.json").read_text())
    record["fields"]["net"] = "huge"
    (space.path / "space.json").write_text(json.dumps(record))
    (snapshot,) = (filled.path / "snapshots" / "d").iterdir()
    content = bytearray(snapshot.read_bytes())
    content[len(content) // 4] ^= 1
    snapshot.write_bytes(content)
    (run,) = (filled.path / "runs").iterdir()
    run.write_text("{")
    problems = {problem.part: problem.what for problem in verify_store(filled).problems}
    broken = (space.path / "space.json", snapshot, run)
    assert sorted(problems) == sorted(str(path.relative_to(filled.path)) for path in broken)
    assert "hash to" in problems[f"spaces/{space.name}/space.json"]


def test_leftovers_are_named_and_left(filled):
    space = filled.spaces()[0]
    strangers = [
        space.path / "parts" / ".r-1.h5.tmp",
        space.path / "parts" / "notes.txt",
        filled.path / "holiday.jpg",
        filled.path / "runs" / ".x.json.1-2.tmp",
        filled.path / "deep" / "runs" / "x.json",
    ]
    for path in strangers:
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("?")
    (filled.path / "jobs").mkdir()
    for name in ("nightly.lock", "nightly.lease.7"):
        (filled.path / "jobs" / name).write_text("?")
    report = verify_store(filled)
    assert report.clean
    assert report.leftovers == sorted(str(path.relative_to(filled.path)) for path in strangers)
    assert all(path.exists() for path in strangers)


def test_a_damaged_snapshot_is_named_for_each_night_that_shares_it(filled, rows, flip_bit):
    shared = [filled.snapshot_ids("d")[0], rows.snapshot(filled, "d", NAMES)]
    rows.snapshot(filled, "d", NAMES[:5])
    assert verify_store(filled).clean
    flip_bit(filled.path / "snapshots" / "d" / f"{shared[0]}.parquet", 60)
    assert [problem.part for problem in verify_store(filled).problems] == [f"snapshots/d/{r}.parquet" for r in shared]


def test_compact_merges_and_drops_copies(filled, rows):
    space = filled.spaces()[0]
    rows.write(filled, space, [*NAMES[5:15], "extra", "extra"], dataset="d")
    before = tree(filled.path)
    planned = compact_store(filled, dry_run=True)
    assert tree(filled.path) == before
    report = compact_store(filled)
    assert (report.parts_before, report.parts_after, report.rows_dropped) == (4, 1, 11)
    assert planned == report
    assert report.bytes_freed == sum(map(len, before.values())) - sum(map(len, tree(filled.path).values())) > 0
    assert report.damaged == []
    assert [part.rows for part in space.parts()] == [31]
    assert verify_store(filled).clean
    np.testing.assert_array_equal(filled.features("d").read(), rows.features(NAMES))
    assert space.known_files(dataset="d")["id"].to_pylist() == [*NAMES, "extra"]
    after = tree(filled.path)
    assert compact_store(filled).rows_dropped == 0
    assert tree(filled.path) == after


def test_compact_respects_the_target_columns_and_datasets(filled, rows):
    space = filled.spaces()[0]
    rows.write(filled, space, NAMES[:4], columns=("a:gap", "b:gap"), dataset="d")
    rows.write(filled, space, ["other"], dataset="e")
    target = 22 * 59  # 59 bytes a row of this kind
    report = compact_store(filled, target_bytes=target)
    assert (report.parts_before, report.rows_dropped) == (5, 4)  # the wider rows make the narrower ones needless
    sizes = sorted((part.dataset, sorted(part.columns), part.rows) for part in space.parts())
    assert sizes == [
        ("d", ["a:gap"], 10),
        ("d", ["a:gap"], 16),
        ("d", ["a:gap", "b:gap"], 4),
        ("e", ["a:gap"], 1),
    ]
    assert compact_store(filled, target_bytes=target).parts_after == len(sizes)
    np.testing.assert_array_equal(filled.features("d").read(), rows.features(NAMES))


def test_compact_never_copies_damage_nor_relies_on_it(filled, rows, flip_bit):
    space = filled.spaces()[0]
    rows.write(filled, space, NAMES[:10], dataset="d")  # a good copy of the part that is damaged next
    damaged = space.parts()[0]
    flip_bit(Path(damaged.path), damaged.arrays["features/a:gap"].offset)
    report = compact_store(filled)
    assert report.damaged == [damaged.name]
    assert report.rows_dropped == 0
    assert len(verify_store(filled).problems) == 1
    np.testing.assert_array_equal(filled.features("d").read(), rows.features(NAMES))


def test_compact_leaves_a_part_with_damaged_keys_alone(filled, rows, flip_bit):
    space = filled.spaces()[0]
    rows.write(filled, space, NAMES[:10], dataset="d")  # a good copy
    damaged = space.parts()[0]
    flip_bit(Path(damaged.path), damaged.arrays["key"].offset)
    report = compact_store(filled)
    assert (report.damaged, report.rows_dropped) == ([damaged.name], 0)
    assert sorted(part.rows for part in space.parts()) == [10, 30]
    assert Path(damaged.path).exists()
    np.testing.assert_array_equal(filled.features("d").read(), rows.features(NAMES))


@pytest.mark.parametrize("copied", [False, True])
def test_compact_reads_only_what_it_touches_or_relies_on(filled, rows, monkeypatch, copied):
    space = filled.spaces()[0]
    more = [f"more{number}" for number in range(200)]
    rows.write(filled, space, more, dataset="d")
    large = space.parts()[-1]
    rows.write(filled, space, more[:3] if copied else ["extra"], dataset="d")
    read = []
    monkeypatch.setattr(compact, "damaged_arrays", lambda part: read.append(part.name) or damaged_arrays(part))
    report = compact_store(filled, target_bytes=large.file_bytes)
    assert report.rows_dropped == (3 if copied else 0)
    assert (large.name in read) == copied
    assert len(read) == len(set(read)) == (5 if copied else 4)
    assert Path(large.path).exists()


def test_a_crash_between_commit_and_removal_leaves_copies_only(filled, rows, monkeypatch):
    def die(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(compact.Path, "unlink", die)
    with pytest.raises(KeyboardInterrupt):
        compact_store(filled)
    monkeypatch.undo()
    assert len(filled.spaces()[0].parts()) == 4
    assert verify_store(filled).clean
    np.testing.assert_array_equal(filled.features("d").read(), rows.features(NAMES))
    assert compact_store(filled).rows_dropped == 30
    np.testing.assert_array_equal(filled.features("d").read(), rows.features(NAMES))


def test_compact_on_a_full_disk_changes_nothing(filled, monkeypatch):
    before = tree(filled.path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("featurepipe.store.commit.os.pwrite", full)
    with pytest.raises(DiskFull):
        compact_store(filled)
    monkeypatch.undo()
    assert tree(filled.path) == before


def test_upkeep_waits_for_no_one(filled):
    with filled.lock(shared=True):
        for act in (compact_store, gc_store):
            with pytest.raises(StoreLocked):
                act(filled)


def test_gc_removes_only_what_no_snapshot_needs(filled, rows):
    space = filled.spaces()[0]
    rows.snapshot(filled, "d", NAMES[5:25])
    dead = space.path / "parts" / ".dead.h5.tmp"
    dead.write_bytes(b"x" * 1000)
    before = tree(filled.path)
    assert gc_store(filled).rows_dropped == 0  # the first snapshot still needs them
    dead.write_bytes(b"x" * 1000)
    planned = gc_store(filled, dry_run=True, keep_snapshots=1)
    assert tree(filled.path) == before
    report = gc_store(filled, keep_snapshots=1)
    assert (report.rows_dropped, report.snapshots_removed, report.leftovers_removed) == (10, 1, 1)
    assert planned == report
    size = sum(map(len, tree(filled.path).values()))
    assert report.bytes_freed == sum(map(len, before.values())) - size > 1000
    assert [part.rows for part in space.parts()] == [5, 10, 5]
    assert verify_store(filled).leftovers == []
    np.testing.assert_array_equal(filled.features("d").read(), rows.features(NAMES[5:25]))
    assert gc_store(filled, keep_snapshots=1).bytes_freed == 0


def test_gc_removes_a_part_that_nobody_needs(filled, rows):
    rows.snapshot(filled, "d", NAMES[:10])
    gc_store(filled, keep_snapshots=1)
    assert [part.rows for part in filled.spaces()[0].parts()] == [10]


def test_gc_keeps_the_work_of_a_run_that_was_stopped(filled, rows):
    space = filled.spaces()[0]
    rows.write(filled, space, ["new1", "new2"], dataset="d")
    rows.write(filled, space, ["other"], dataset="unfinished")
    report = gc_store(filled)
    assert (report.rows_dropped, report.rows_unfinished) == (0, 3)
    rows.snapshot(filled, "d", [*NAMES, "new1"])
    report = gc_store(filled)
    assert (report.rows_dropped, report.rows_unfinished) == (1, 1)
    np.testing.assert_array_equal(filled.features("d").read(), rows.features([*NAMES, "new1"]))


def test_gc_lets_go_what_a_finished_run_wrote_and_does_not_list(filled, rows):
    run_id = rows.write(filled, filled.spaces()[0], ["listed", "not-listed"], dataset="d")
    rows.snapshot(filled, "d", [*NAMES, "listed"], run_id=run_id)
    report = gc_store(filled)
    assert (report.rows_dropped, report.rows_unfinished) == (1, 0)
    np.testing.assert_array_equal(filled.features("d").read(), rows.features([*NAMES, "listed"]))


def test_gc_takes_a_part_without_a_dataset_for_unfinished_until_any_dataset_is_finished(store, space, rows):
    rows.write(store, space, ["early"])
    before_any = gc_store(store)
    assert (before_any.rows_dropped, before_any.rows_unfinished) == (0, 1)
    rows.snapshot(store, "first", [])
    rows.write(store, space, ["between"])
    rows.snapshot(store, "a-later-one", [])
    rows.write(store, space, ["late"])
    report = gc_store(store)
    assert (report.rows_dropped, report.rows_unfinished) == (2, 1)
    assert space.index().contains(rows.keys(["early", "between", "late"])).tolist() == [False, False, True]


def test_gc_refuses_to_guess(filled):
    with pytest.raises(UsageError, match="at least 1"):
        gc_store(filled, keep_snapshots=0)
    (snapshot,) = (filled.path / "snapshots" / "d").iterdir()
    snapshot.write_bytes(b"PAR1")
    before = tree(filled.path)
    with pytest.raises(StoreError, match="cannot read snapshot"):
        gc_store(filled)
    assert tree(filled.path) == before


def test_gc_removes_quarantined_parts_once_their_rows_are_elsewhere(filled, rows, flip_bit):
    space = filled.spaces()[0]
    values, header, _ = space.parts()
    flip_bit(Path(values.path), values.arrays["features/a:gap"].offset)
    flip_bit(Path(header.path), 70)
    verify_store(filled)
    quarantine = space.path / "quarantine"
    assert gc_store(filled).quarantined_removed == 0
    rows.write(filled, space, NAMES[:20], dataset="d")
    assert gc_store(filled, dry_run=True).quarantined_removed == 1
    assert len(list(quarantine.iterdir())) == 2
    assert gc_store(filled).quarantined_removed == 1
    assert [path.stem for path in quarantine.iterdir()] == [header.name]  # nobody can say what it held


def test_a_moved_store_still_works(filled, rows, tmp_path):
    shutil.move(filled.path, tmp_path / "elsewhere")
    moved = type(filled)(tmp_path / "elsewhere")
    np.testing.assert_array_equal(moved.features("d").read(), rows.features(NAMES))
