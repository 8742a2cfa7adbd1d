"""Forgetting images: nothing of them is left in any byte of the store, everything of the others is, whenever it is killed."""

import json
import random
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurepipe.errors import StoreError, StoreLocked, UsageError
from featurepipe.store import FeatureStore, compact_store, describe, forget_images, gc_store, verify_store
from featurepipe.store import forget as forgetting
from featurepipe.store.forget import held_ids
from featurepipe.store.forgotten import Forgotten
from featurepipe.store.snapshots import SCHEMA
from featurepipe.store.traces import Needles, Removal, in_bytes, strike

ALICE = ["alice/1.png", "alice/2.png"]
OTHERS = ["bob/1.png", "bob/2.png", "alice/10.png", "carol.png"]
NAMES = [*ALICE, *OTHERS]
WIDTH = 24


def values_of(names, rows):
    return {"a:gap": rows.features(names, WIDTH), "b:map": np.repeat(rows.features(names, 32), 3, axis=1)}


@pytest.fixture
def filled(store, space, rows):
    """Two nights of two parts, a reject, a run record that names images, an index, and leftovers of a dead writer."""
    first = store.new_run_id()
    with space.writer(first, dataset="d") as writer:
        writer.add(rows.keys(NAMES[:4]), NAMES[:4], np.arange(4), np.arange(4), values_of(NAMES[:4], rows))
    rows.snapshot(store, "d", NAMES[:4], run_id=first)
    second = store.new_run_id()
    with space.writer(second, dataset="d") as writer:
        writer.add(rows.keys(NAMES[4:]), NAMES[4:], np.arange(2), np.arange(2), values_of(NAMES[4:], rows))
    rows.snapshot(store, "d", NAMES, run_id=second)
    rows.snapshot(store, "d", NAMES)  # nothing new: another name of the same file
    rejects = [
        {"key": bytes(key), "id": name, "size": 1, "mtime_ns": 1, "reason": f"truncated: {name} ends", "run_id": first}
        for name, key in zip(["alice/1.png", "bob/9.png"], rows.keys(["old", "bob9"]), strict=True)
    ]
    space.add_rejects(rejects, dataset="d")
    store.write_run({
        "run_id": store.new_run_id(), "dataset": "d", "status": "done", "counts": {"listed": 6},
        "rejects": [{"id": "alice/1.png", "reason": "truncated: x"}, {"id": "bob/9.png", "reason": "y: z"}],
        "error": "cannot read /data/alice/2.png, nor alice/10.png", "steps": [{"step": "drift", "status": "done", "result": {
            "farthest": ["alice/2.png", "alice/10.png"], "columns": []}}],
    })  # fmt: skip
    indexes = store.path / "indexes" / "d"
    indexes.mkdir(parents=True)
    np.savez(indexes / "x-y.npz", vectors=rows.features(NAMES, WIDTH))
    (space.path / "parts" / ".dead.h5.tmp").write_bytes(rows.features(ALICE, WIDTH).astype(np.float16).tobytes())
    return store


def read(store, node="a", snapshot=None, dataset="d"):
    features = store.features(dataset, node, snapshot=snapshot)
    return dict(zip(features.ids.tolist(), features.read(np.float32), strict=True))


def assert_nothing_left(path, rows, names, keys=None):
    """No key, raw or in hex, no row of features, and no id: in any byte, and in any table as it is decoded."""
    keys = rows.keys(names) if keys is None else keys
    pieces = [bytes(key) for key in keys] + [bytes(key).hex().encode() for key in keys]
    for values in values_of(names, rows).values():
        pieces += [row.tobytes() for dtype in (np.float16, np.float32) for row in values.astype(dtype)]
    for file in (file for file in path.rglob("*") if file.is_file()):
        content = file.read_bytes()
        assert not [piece for piece in pieces if piece in content], file
        if file.suffix == ".parquet":
            content = json.dumps(pq.read_table(file).drop_columns(["key"]).to_pylist()).encode()
            assert not {*pq.read_table(file)["key"].to_pylist()} & {*pieces}
        assert not [name for name in names if f'"{name}"'.encode() in content or name.encode() + b"\0" in content], file


def test_nothing_of_a_person_is_left_and_all_of_others_is(filled, space, rows):
    before = {run: read(filled, snapshot=run) for run in filled.snapshot_ids("d")}
    report = forget_images(filled, ALICE)
    assert (report.images, report.known, report.keys, report.rows_dropped, report.parts_rewritten) == (2, 2, 3, 2, 1)
    assert (report.snapshots_rewritten, report.rejects_removed, report.documents_rewritten) == (3, 1, 1)
    assert (report.indexes_removed, report.left, report.kept_for) == (1, [], [])
    assert report.searched_files > 8
    assert_nothing_left(filled.path, rows, ALICE, rows.keys([*ALICE, "old"]))
    for run, rows_then in before.items():
        now = read(filled, snapshot=run)
        assert list(now) == [name for name in rows_then if name not in ALICE]
        for name, values in now.items():
            np.testing.assert_array_equal(values, rows_then[name])
    assert [entry["id"] for entry in space.rejects().to_pylist()] == ["bob/9.png"]
    record = filled.runs()[-1]
    assert record["rejects"] == [{"id": "bob/9.png", "reason": "y: z"}]
    assert record["error"] == "cannot read (forgotten), nor alice/10.png"
    assert record["steps"][0]["result"]["farthest"] == ["alice/10.png"]
    assert record["counts"] == {"listed": 6}
    found = verify_store(filled)
    assert found.clean, found.problems
    assert found.leftovers == []


def test_nights_with_nothing_new_still_share_a_file(filled):
    forget_images(filled, ALICE)
    files = [path.stat().st_ino for path in sorted((filled.path / "snapshots" / "d").iterdir())]
    assert files[1] == files[2] != files[0]


def test_a_dry_run_says_the_same_and_changes_nothing(filled):
    def content():
        files = (path for path in filled.path.rglob("*") if path.is_file() and path.name != ".lock")
        return {path: path.read_bytes() for path in files}

    before = content()
    planned = forget_images(filled, ALICE, dry_run=True)
    assert content() == before
    done = forget_images(filled, ALICE)
    for name in (
        "keys",
        "rows_dropped",
        "parts_rewritten",
        "rejects_removed",
        "documents_rewritten",
        "indexes_removed",
    ):
        assert getattr(planned, name) == getattr(done, name), name


def test_the_next_extraction_is_told_by_hashes_alone(filled, rows):
    forget_images(filled, ALICE)
    told = Forgotten.of(filled.path)
    assert told.has_ids("d", NAMES).tolist() == [True, True, False, False, False, False]
    assert told.has_ids("e", ALICE).tolist() == [False, False]
    assert [told.has_key(bytes(key)) for key in rows.keys([*NAMES, "old"])] == [True, True, *[False] * 4, True]
    text = (filled.path / "forgotten.json").read_text()
    assert not any(name in text or bytes(key).hex() in text for name, key in zip(NAMES, rows.keys(NAMES), strict=True))
    again = forget_images(filled, ALICE)
    assert (again.images, again.known, again.rows_dropped, again.left) == (2, 0, 0, [])
    lifted = forget_images(filled, ALICE[:1], may_come_back=True)
    assert not lifted.refused
    told = Forgotten.of(filled.path)
    assert told.has_ids("d", ALICE).tolist() == [False, True]
    assert [told.has_key(bytes(key)) for key in rows.keys([*ALICE, "old"])] == [False, True, False]


def test_bytes_that_another_id_has_stay_for_it_without_the_name(store, space, rows):
    with space.writer(store.new_run_id(), dataset="d") as writer:
        writer.add(
            rows.keys(["same", "own"]), ["alice.png", "own.png"], [5, 5], [6, 6], values_of(["same", "own"], rows)
        )
    keys = [bytes(key) for key in rows.keys(["same", "same", "own"])]
    rows.snapshot(store, "d", ["alice.png", "copy.png", "own.png"], key=keys)
    rows.snapshot(store, "e", ["elsewhere.png"], key=keys[:1])
    report = forget_images(store, ["alice.png"], dataset="d")
    assert report.kept_for == [{"dataset": "d", "id": "copy.png"}, {"dataset": "e", "id": "elsewhere.png"}]
    assert (report.kept_keys, report.keys, report.rows_dropped, report.parts_rewritten) == (1, 0, 0, 1)
    np.testing.assert_array_equal(read(store)["copy.png"], rows.features(["same"], WIDTH)[0])
    np.testing.assert_array_equal(read(store, dataset="e")["elsewhere.png"], rows.features(["same"], WIDTH)[0])
    assert space.known_files(dataset="d")["id"].to_pylist() == ["", "own.png"]
    assert b"alice.png" not in b"".join(path.read_bytes() for path in space.part_paths())
    told = Forgotten.of(store.path)
    assert told.has_ids("d", ["alice.png"]).all()
    assert not told.has_key(keys[0])
    assert verify_store(store).clean
    rest = forget_images(store, ["copy.png"], dataset="d")
    assert rest.kept_for == [{"dataset": "e", "id": "elsewhere.png"}]
    forget_images(store, ["elsewhere.png"], dataset="e")
    assert keys[0] not in b"".join(path.read_bytes() for path in space.part_paths())
    compact_store(store)
    gc_store(store)
    assert list(read(store)) == ["own.png"]


def test_damage_goes_as_a_whole_and_is_said(filled, space, rows, flip_bit):
    part = space.parts()[0]
    flip_bit(space.part_paths()[0], part.arrays["features/a:gap"].offset + 3)
    report = forget_images(filled, ALICE)
    assert report.parts_removed == [f"spaces/{space.name}/parts/{part.name}.h5"]
    assert_nothing_left(filled.path, rows, ALICE)
    assert {problem.what for problem in verify_store(filled).problems} == {
        f"{lacking} of {lacking + there} images of dataset 'd' lack {column} in this space; re-run featurepipe extract"
        for lacking, there, column in ()
    }  # no run promised them here
    assert list(space.index().contains(rows.keys(NAMES))) == [False] * 4 + [True] * 2


@pytest.mark.parametrize("is_whole", [True, False])
def test_quarantined_parts_go_unless_they_hold_none_of_it(filled, space, rows, flip_bit, is_whole):
    part = space.parts()[1]
    flip_bit(space.part_paths()[1], part.arrays["features/a:gap" if is_whole else "key"].offset)
    verify_store(filled)
    (quarantined,) = (space.path / "quarantine").iterdir()
    report = forget_images(filled, ALICE)
    assert quarantined.exists() is is_whole  # without its keys nobody can tell what it holds
    assert len(report.parts_removed) == int(not is_whole)
    forget_images(filled, OTHERS[:1])
    assert quarantined.exists() is is_whole
    forget_images(filled, OTHERS[2:3])
    assert not quarantined.exists()


def test_an_unknown_id_changes_nothing(filled):
    before = sorted((path, path.stat().st_mtime_ns) for path in filled.path.rglob("*.*") if path.name != ".lock")
    with pytest.raises(
        UsageError, match=r"1 of the ids is nowhere in dataset d .*: alise/1\.png; nearest .*alice/1\.png"
    ):
        forget_images(filled, ["alice/2.png", "alise/1.png"])
    with pytest.raises(UsageError, match="unknown dataset 'dd' in "):
        forget_images(filled, ["alice/1.png"], dataset="dd")
    with pytest.raises(UsageError, match="no image to forget"):
        forget_images(filled)
    assert (
        sorted((path, path.stat().st_mtime_ns) for path in filled.path.rglob("*.*") if path.name != ".lock") == before
    )


@pytest.mark.parametrize("name", ["runs/broken.json", "snapshots/d/20200101T000000000000Z-00000000.parquet"])
def test_what_cannot_be_read_may_name_them_so_nothing_is_changed(filled, name):
    (filled.path / name).write_text("{torn")
    before = {path: path.read_bytes() for path in filled.path.rglob("*.*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(StoreError, match="out of the store"):
        forget_images(filled, ALICE)
    assert {path: path.read_bytes() for path in before} == before
    assert not (filled.path / "forgetting.json").exists()


def test_ids_that_are_nowhere_may_be_refused_like_the_others(filled):
    asked = ["alice/1.png", "alise/9.png", "alice/2.png"]
    assert held_ids(filled, asked, "d") == set(ALICE)
    assert held_ids(filled, asked, "elsewhere") == set()
    report = forget_images(filled, asked, unknown_ok=True)
    assert (report.images, report.known, report.unknown, report.unknown_ids) == (3, 2, 1, ["alise/9.png"])
    assert (report.rows_dropped, report.left) == (2, [])
    assert Forgotten.of(filled.path).has_ids("d", [*asked, "bob/1.png"]).tolist() == [True, True, True, False]
    again = forget_images(filled, asked)
    assert (again.images, again.known, again.unknown) == (3, 0, 0)
    elsewhere = forget_images(filled, ["x.png"], dataset="new", unknown_ok=True)
    assert (elsewhere.known, elsewhere.unknown) == (0, 1)


def test_who_is_told_of_an_order_may_refuse_it(filled):
    def refuse(order):
        raise UsageError(f"{order.known} of {len(order.ids)}")

    before = {path: path.read_bytes() for path in filled.path.rglob("*.*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(UsageError, match=r"^2 of 3$"):
        forget_images(filled, [*ALICE, "alise/9.png"], unknown_ok=True, before=refuse)
    after = {path: path.read_bytes() for path in filled.path.rglob("*.*") if path.is_file() and path.name != ".lock"}
    assert after == before


def test_a_store_in_use_is_not_touched(filled):
    with filled.lock(shared=True), pytest.raises(StoreLocked):
        forget_images(filled, ALICE)
    assert not (filled.path / "forgetting.json").exists()


def test_other_datasets_keep_images_of_the_same_name(filled, space, rows):
    with space.writer(filled.new_run_id(), dataset="e") as writer:
        writer.add(rows.keys(["another"]), [ALICE[0]], [1], [1], values_of(["another"], rows))
    rows.snapshot(filled, "e", [ALICE[0]], key=[bytes(rows.keys(["another"])[0])])
    filled.write_run({"run_id": filled.new_run_id(), "dataset": "e", "rejects": [{"id": ALICE[0], "reason": "x: y"}]})
    report = forget_images(filled, ALICE, dataset="d")
    assert report.left == []
    np.testing.assert_array_equal(read(filled, dataset="e")[ALICE[0]], rows.features(["another"], WIDTH)[0])
    assert filled.runs()[-1]["rejects"][0]["id"] == ALICE[0]
    assert (report.dataset, report.datasets, report.elsewhere) == ("d", {"d": 2}, {"e": 1})
    rows.snapshot(filled, "e", ["dave.png"])
    with pytest.raises(UsageError, match=r"nowhere in dataset d .*: dave\.png; .*dataset e has 1 of them"):
        forget_images(filled, ["dave.png"], dataset="d")


@pytest.fixture
def datasets(filled, space, rows):
    """Beside dataset d: e, which has an image of the same name and one of its own; f, of which a killed first run left a part."""
    with space.writer(filled.new_run_id(), dataset="e") as writer:
        names = ["another", "dave.png", "erin.png"]
        writer.add(rows.keys(names), [ALICE[0], *names[1:]], [1] * 3, [1] * 3, values_of(names, rows))
    rows.snapshot(filled, "e", [ALICE[0], *names[1:]], key=[bytes(key) for key in rows.keys(names)])
    with space.writer(filled.new_run_id(), dataset="f") as writer:
        writer.add(rows.keys(["frank.png"]), ["frank.png"], [1], [1], values_of(["frank.png"], rows))
    filled.write_run({"run_id": filled.new_run_id(), "dataset": "f", "status": "failed"})
    return filled


def test_without_a_dataset_images_go_from_all_that_have_them(datasets, rows):
    asked = [*ALICE, "dave.png", "frank.png"]
    planned = forget_images(datasets, asked, dry_run=True)
    report = forget_images(datasets, asked)
    assert (report.dataset, report.datasets, report.elsewhere) == ("", {"d": 2, "e": 2, "f": 1}, {})
    assert (report.images, report.known, report.several, report.several_ids) == (4, 4, 1, ALICE[:1])
    assert (report.rows_dropped, report.snapshots_rewritten, report.kept_for, report.left) == (5, 4, [], [])
    assert (planned.datasets, planned.several, planned.rows_dropped) == (report.datasets, report.several, 5)
    assert_nothing_left(datasets.path, rows, asked, rows.keys([*asked, "another", "old"]))
    assert list(read(datasets)) == OTHERS
    assert list(read(datasets, dataset="e")) == ["erin.png"]
    told = Forgotten.of(datasets.path)
    refused = {name: told.has_ids(name, asked).tolist() for name in "def"}
    assert refused == {
        "d": [True, True, False, False],
        "e": [True, False, True, False],
        "f": [False, False, False, True],
    }
    assert told.has_key(bytes(rows.keys(["another"])[0]))
    again = forget_images(datasets, asked)
    assert (again.dataset, again.datasets, again.known, again.unknown, again.rows_dropped) == ("", {}, 0, 0, 0)
    assert {name: Forgotten.of(datasets.path).has_ids(name, asked).tolist() for name in "def"} == refused
    forget_images(datasets, asked, may_come_back=True)
    assert not len(Forgotten.of(datasets.path))


def test_ids_of_one_dataset_among_several_are_said_to_be_its_own(datasets):
    report = forget_images(datasets, ["dave.png"])
    assert (report.dataset, report.datasets, report.several) == ("e", {"e": 1}, 0)
    assert not Forgotten.of(datasets.path).has_ids("d", ["dave.png"]).any()
    with pytest.raises(
        UsageError, match=r"^1 of the ids is nowhere in datasets d, e, f .*: erim\.png; nearest .*erin\.png"
    ):
        forget_images(datasets, ["frank.png", "erim.png"])
    assert forget_images(datasets, ["erim.png"], unknown_ok=True).unknown == 1
    assert all(Forgotten.of(datasets.path).has_ids(name, ["erim.png"]).all() for name in "def")


def test_bytes_that_two_datasets_have_under_one_name_are_kept_for_neither(filled, rows):
    rows.snapshot(filled, "e", ALICE[:1])
    assert forget_images(filled, ALICE[:1], dataset="d", dry_run=True).kept_for == [{"dataset": "e", "id": ALICE[0]}]
    report = forget_images(filled, ALICE[:1])
    assert (report.datasets, report.kept_for, report.rows_dropped) == ({"d": 1, "e": 1}, [], 1)
    assert_nothing_left(filled.path, rows, ALICE[:1])


def test_a_call_of_several_datasets_that_was_killed_is_finished_in_all(datasets, rows, monkeypatch):
    def ends(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(forgetting, "_rewrite_part", ends)
    with pytest.raises(KeyboardInterrupt):
        forget_images(datasets, [ALICE[0], "dave.png"])
    monkeypatch.undo()
    report = forget_images(datasets)
    assert (report.finished, report.left) == (2, [])
    assert_nothing_left(datasets.path, rows, [ALICE[0], "dave.png"], rows.keys([ALICE[0], "dave.png", "another"]))
    assert Forgotten.of(datasets.path).has_ids("e", [ALICE[0], "dave.png"]).tolist() == [True, True]
    assert verify_store(datasets).clean


def test_what_an_early_version_began_is_finished(filled, rows):
    keys = [bytes(key).hex() for key in rows.keys(ALICE)]
    begun = {"dataset": "d", "ids": ALICE, "keys": keys, "kept": [], "pairs": [[ALICE[0], ""], [ALICE[1], keys[1]]]}
    (filled.path / "forgetting.json").write_text(json.dumps({**begun, "come_back": False}))
    report = forget_images(filled)
    assert (report.finished, report.rows_dropped, report.left) == (2, 2, [])
    assert_nothing_left(filled.path, rows, ALICE)
    assert Forgotten.of(filled.path).has_ids("d", NAMES).tolist() == [True, True, False, False, False, False]
    for wrong in ({}, {"dataset": 3}, {**begun, "come_back": "no"}, {"datasets": [], "refused": []}):
        (filled.path / "forgetting.json").write_text(json.dumps(wrong))
        with pytest.raises(StoreError, match="is not as it should be"):
            forget_images(filled)


def test_what_lies_about_in_the_store_is_named(filled, rows):
    (filled.path / "notes.txt").write_text("see alice/1.png again")
    (filled.path / "copy.bin").write_bytes(b"xyz" + bytes(rows.keys(ALICE)[1]) + b"x")
    values = rows.features(ALICE[:1], 32).astype(np.float16)
    (filled.path / "copy.npy").write_bytes(b"x" * 5 + np.repeat(values, 3, axis=1).tobytes())
    report = forget_images(filled, ALICE)
    assert report.left == ["copy.bin: a key", "copy.npy: features", "notes.txt: a name"]
    assert (filled.path / "notes.txt").read_text() == "see alice/1.png again"  # not ours to change


def test_the_same_picture_saved_anew_is_counted(filled, space, rows):
    with space.writer(filled.new_run_id(), dataset="d") as writer:
        writer.add(rows.keys(["png of it"]), ["bob/3.png"], [1], [1], values_of(ALICE[:1], rows))
    report = forget_images(filled, ALICE)
    assert (report.alike > 0, report.left) == (True, [])


def test_numbers_are_struck_where_they_are_names_alone():
    record = {
        "id": "x",
        "text": "7 images of 7, scan-07.png and /a/scan-07.png; scan-07.png.bak",
        "counts": {"7": 7},
        "list": ["7", "8"],
    }
    assert strike(record, Removal(("d",), ("7", "scan-07.png"))) == {
        "id": "x", "text": "7 images of 7, (forgotten) and (forgotten); scan-07.png.bak", "counts": {"7": 7}, "list": ["8"],
    }  # fmt: skip


CHILD = textwrap.dedent("""
    import sys
    from featurepipe.store import FeatureStore, forget_images
    store = FeatureStore(sys.argv[1])
    print("ready", flush=True)
    sys.stdin.readline()
    forget_images(store, [f"alice/{n}.png" for n in range(40)])
    print("done", flush=True)
""")


@pytest.mark.parametrize(
    "step",
    ["replace_snapshot", "rewrite_parts", "_rewrite_rejects", "_remove_indexes", "_remove_temporaries", "traces"],
)
@pytest.mark.parametrize("is_done", [False, True])
def test_ended_before_or_after_any_step_the_next_call_finishes(filled, rows, monkeypatch, step, is_done):
    before = {run: read(filled, snapshot=run) for run in filled.snapshot_ids("d")}
    work = getattr(forgetting, step)

    def ends(*args, **options):
        if is_done:
            work(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(forgetting, step, ends)
    with pytest.raises(KeyboardInterrupt):
        forget_images(filled, ALICE)
    monkeypatch.undo()
    assert "forgetting.json" in [problem.part for problem in verify_store(filled, quarantine=False).problems]
    assert Forgotten.of(filled.path).has_ids("d", ALICE).all()  # an extraction in between computes none of them
    report = forget_images(filled)
    assert (report.finished, report.left) == (2, [])
    assert_nothing_left(filled.path, rows, ALICE, rows.keys([*ALICE, "old"]))
    for run, rows_then in before.items():
        now = read(filled, snapshot=run)
        assert list(now) == [name for name in rows_then if name not in ALICE]
        assert all(np.array_equal(now[name], rows_then[name]) for name in now)
    assert verify_store(filled).clean


@pytest.mark.slow
def test_killed_at_random_moments_the_next_call_finishes(store, space, rows):
    alice, bob = [f"alice/{n}.png" for n in range(40)], [f"bob/{n}.png" for n in range(40)]
    for start in range(0, 40, 4):  # ten parts and snapshots
        run, names = store.new_run_id(), [*alice[start : start + 4], *bob[start : start + 4]]
        with space.writer(run, dataset="d") as writer:
            writer.add(rows.keys(names), names, [1] * 8, [1] * 8, values_of(names, rows))
        rows.snapshot(store, "d", [*alice[: start + 4], *bob[: start + 4]], run_id=run)
        space.add_rejects(
            [{"key": None, "id": alice[start], "size": 1, "mtime_ns": 1, "reason": "x: y", "run_id": run}], dataset="d"
        )
    rng, killed = random.Random(0), 0
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(store.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with process.stdin as told, process.stdout as output:
            assert output.readline() == "ready\n"
            told.write("go\n")
            told.flush()
            while not (store.path / "forgetting.json").exists() and process.poll() is None:
                time.sleep(0.0005)
            time.sleep(rng.uniform(0.0, 0.06))
            process.send_signal(signal.SIGKILL)
            process.wait()
            if "done" in output.read():
                break
        killed += 1
        seen = FeatureStore(store.path)
        assert set(bob) <= set(seen.snapshot("d")["id"].to_pylist())
        assert seen.spaces()[0].index().contains(rows.keys(bob)).all()  # others are there whenever it was killed
        problems = verify_store(seen).problems
        assert [problem.part for problem in problems] == ["forgetting.json"] * (store.path / "forgetting.json").exists()
        if not problems:
            break
    assert killed >= 1
    store = FeatureStore(store.path)
    if (store.path / "forgetting.json").exists():
        assert forget_images(store, dry_run=True).unfinished == 40
        report = forget_images(store)
        assert (report.finished, report.left) == (40, [])
    assert_nothing_left(store.path, rows, alice)
    found = read(store)
    assert list(found) == bob
    np.testing.assert_array_equal(np.stack(list(found.values())), rows.features(bob, WIDTH))
    assert Forgotten.of(store.path).has_ids("d", alice).all()
    assert verify_store(store).clean
    assert describe(store)["datasets"][0]["images"] == 40


def test_columns_of_the_manifest_go_with_the_row(store, space, rows):
    rows.write(store, space, ["a.png", "b.png"], dataset="d")
    values = {
        "id": ["a.png", "b.png"], "key": [bytes(key) for key in rows.keys(["a.png", "b.png"])], "label": [None] * 2,
        "split": [None] * 2, "size": [7] * 2, "mtime_ns": [1] * 2, "status": ["ok"] * 2, "reason": [None] * 2,
    }  # fmt: skip
    table = pa.table(values, schema=SCHEMA).append_column("column:patient", pa.array(["Alice Smith", "Bob"]))
    store.write_snapshot("d", store.new_run_id(), table)
    forget_images(store, ["a.png"])
    kept = store.snapshot("d", columns=["id", "column:patient"])
    assert kept.to_pylist() == [{"id": "b.png", "column:patient": "Bob"}]


def test_what_a_backup_of_hard_links_still_has_is_counted(filled, space, tmp_path):
    (tmp_path / "backup.h5").hardlink_to(space.part_paths()[0])
    assert forget_images(filled, ALICE, dry_run=True).linked == 1
    assert forget_images(filled, ALICE).linked == 1


def test_pieces_are_found_at_any_place_and_over_the_border_of_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("featurepipe.store.traces._BLOCK", 64)
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 256, (3, 32), np.uint8)
    needles = Needles(Removal(("d",), (), keys=tuple(bytes(key).hex() for key in keys)))
    for place in range(40, 110):
        content = rng.integers(0, 256, 150, np.uint8)
        content[place : place + 32] = keys[place % 3]
        (tmp_path / "file").write_bytes(content.tobytes())
        assert in_bytes(tmp_path / "file", needles) == (1, 0, 150), place
    (tmp_path / "file").write_bytes(b"x" * 7 + bytes(keys[0]).hex().upper().encode() + rng.bytes(40))
    assert in_bytes(tmp_path / "file", needles)[0] == 1
    (tmp_path / "file").write_bytes(bytes(keys[0])[:31] + b"\0" * 40)
    assert in_bytes(tmp_path / "file", needles)[0] == 0
