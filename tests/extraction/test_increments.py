"""Only what is new is read, decoded and computed. Counts are (computed, known, reads, decodes, forwards)."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from featurepipe.extraction.plan import KeySet, make_plan
from featurepipe.images.listing import SCHEMA

NOTHING = (0, 0, 0)


@pytest.fixture
def filled(album, run):
    album.fill(12)
    assert run.counts(album.root) == (12, 0, 12, 12, 12)
    return album


def touch(path, nanoseconds=10**9):
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + nanoseconds))


def test_nothing_new_reads_nothing(filled, run):
    before = run.parts()
    assert run.counts(filled.root) == (0, 12, *NOTHING)
    assert run.parts() == before
    assert len(run.store.snapshot_ids("album")) == 2


def test_ten_new_images_cost_ten(filled, run):
    filled.fill(10, first=100, pattern="{}.png")
    assert run.counts(filled.root) == (10, 12, 10, 10, 10)
    assert len(run.features()) == 22
    assert run.counts(filled.root) == (0, 22, *NOTHING)


@pytest.fixture
def looked(monkeypatch):
    """Numbers of rows of the parts whose files were looked through."""
    from featurepipe.store import keys as known_files

    found, read = [], known_files.read_ids

    def watched(part):
        found.append(part.rows)
        return read(part)

    monkeypatch.setattr(known_files, "read_ids", watched)
    return found


def test_a_few_new_images_are_not_looked_for_in_every_part(filled, run, looked, monkeypatch):
    monkeypatch.setattr("featurepipe.extraction.prepare.ROWS_PER_READ", 5)
    filled.fill(2, first=100)
    assert run.counts(filled.root) == (2, 12, 2, 2, 2)
    assert looked == []
    filled.fill(3, first=200)
    assert run.counts(filled.root) == (3, 14, 3, 3, 3)
    assert looked == [12, 2]


def test_a_file_that_is_back_is_read_and_many_are_known(filled, run, looked, monkeypatch):
    monkeypatch.setattr("featurepipe.extraction.prepare.ROWS_PER_READ", 5)
    names = [filled.root / f"{number:03d}.png" for number in range(4)]
    run.counts(filled.root)
    for path in names:
        path.rename(filled.root.parent / path.name)
    assert run.counts(filled.root) == (0, 8, *NOTHING)
    names[0].hardlink_to(filled.root.parent / names[0].name)
    assert run.counts(filled.root) == (0, 9, 1, 0, 0)
    assert looked == []
    for path in names[1:]:
        path.hardlink_to(filled.root.parent / path.name)
    assert run.counts(filled.root) == (0, 12, *NOTHING)
    assert looked == [12]


def test_what_a_killed_run_left_is_found_though_it_is_little(filled, run, looked, monkeypatch):
    monkeypatch.setattr("featurepipe.extraction.prepare.ROWS_PER_READ", 1)
    filled.fill(3, first=100)
    assert run.counts(filled.root)[0] == 3
    last = run.store.snapshot_ids("album")[-1]
    for path in (f"snapshots/album/{last}.parquet", f"runs/{last}.json"):
        (run.store.path / path).unlink()
    looked.clear()
    assert run.counts(filled.root) == (0, 15, *NOTHING)
    assert looked == [3]


def test_touching_computes_nothing_and_is_remembered(filled, run):
    for name in ("003.png", "007.png"):
        touch(filled.root / name)
    assert run.counts(filled.root) == (0, 12, 2, 0, 0)
    assert run.counts(filled.root) == (0, 12, *NOTHING)


def test_moving_and_copying_compute_nothing(filled, run):
    before = run.features()
    (filled.root / "cat").mkdir()
    (filled.root / "001.png").rename(filled.root / "cat/first.png")
    shutil.copy2(filled.root / "002.png", filled.root / "copy.png")
    assert run.counts(filled.root) == (0, 13, 2, 0, 0)
    after = run.features()
    assert "001.png" not in after
    np.testing.assert_array_equal(after["cat/first.png"], before["001.png"])
    np.testing.assert_array_equal(after["copy.png"], before["002.png"])
    assert run.store.features("album").duplicates == 1


def test_swapping_two_files_swaps_their_rows(filled, run):
    before = run.features()
    a, b, aside = (filled.root / name for name in ("004.png", "005.png", "aside"))
    a.rename(aside), b.rename(a), aside.rename(b)
    touch(a), touch(b)
    assert run.counts(filled.root) == (0, 12, 2, 0, 0)
    after = run.features()
    np.testing.assert_array_equal(after["004.png"], before["005.png"])
    np.testing.assert_array_equal(after["005.png"], before["004.png"])


def test_relabelling_computes_nothing(album, run):
    album.fill(6, pattern="cat/{}.png")
    run(album.root)
    (album.root / "cat").rename(album.root / "dog")
    assert run.counts(album.root)[0] == 0
    assert set(run.store.features("album").labels) == {"dog"}


def test_relabelling_in_a_manifest_reads_nothing(album, run, tmp_path):
    album.fill(4)
    manifest = tmp_path / "album.csv"
    for labels in ("aabb", "abab"):
        rows = [f"album/{i:03d}.png,{label}" for i, label in enumerate(labels)]
        manifest.write_text("\n".join(["path,label", *rows]) + "\n")
        counts = run.counts(str(manifest))
        assert run.store.features("album").labels.tolist() == list(labels)
    assert counts == (0, 4, *NOTHING)


def test_a_deleted_image_is_absent_from_the_next_snapshot_and_back_for_one_read(filled, run):
    before = run.features()
    content = (filled.root / "000.png").read_bytes()
    (filled.root / "000.png").unlink()
    assert run.counts(filled.root) == (0, 11, *NOTHING)
    assert "000.png" not in run.features()
    filled.write("000.png", content)
    assert run.counts(filled.root)[0::3] == (0, 0)
    np.testing.assert_array_equal(run.features()["000.png"], before["000.png"])


def test_a_changed_image_is_computed_anew(filled, run):
    before = run.features()
    touch(filled.add("006.png", 999))
    assert run.counts(filled.root) == (1, 11, 1, 1, 1)
    after = run.features()
    assert not np.allclose(after["006.png"], before["006.png"])
    assert all(np.array_equal(after[name], before[name]) for name in before if name != "006.png")


def test_a_change_that_keeps_size_but_not_time_is_seen(album, run):
    path = album.write("a.bmp", b"")
    for seed in (1, 2):
        from PIL import Image

        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(path)
        os.utime(path, ns=(seed, seed))
        computed = run(album.root)["counts"]["computed"]
        assert computed == 1


def test_adding_a_node_computes_only_that_node(filled, run):
    before = run.parts()
    assert run.counts(filled.root, nodes=["bottleneck", "c3"]) == (12, 0, 12, 12, 12)
    after = run.parts()
    assert before.items() <= after.items()
    (space,) = run.store.spaces()
    new = [set(part.columns) for part in space.parts() if Path(part.path).name not in before]
    assert new == [{"c3:gap"}]
    assert run.counts(filled.root, nodes=["bottleneck", "c3"]) == (0, 12, *NOTHING)
    assert run.counts(filled.root, nodes=["c3"]) == (0, 12, *NOTHING)
    assert run.counts(filled.root) == (0, 12, *NOTHING)


def test_partly_available_columns_are_completed_each_as_needed(album, run, tmp_path):
    album.fill(4)
    run(album.root, nodes=["c3"])
    album.fill(4, first=4)
    only = [album.root / f"{i:03d}.png" for i in (2, 3, 4, 5)]
    run({path.name: path for path in only}, nodes=["f6"], dataset="some")
    # Now 0, 1 have c3; 2, 3 have both; 4, 5 have f6; 6, 7 have none.
    assert run.counts(album.root, nodes=["c3", "f6"]) == (6, 2, 6, 6, 6)
    (space,) = run.store.spaces()
    rows = {name: info.rows for name, info in space.columns().items()}
    assert rows == {"c3:gap": 8, "f6:gap": 8}
    together = {node: run.features(node=node) for node in ("c3", "f6")}
    run.path = tmp_path / "fresh"
    run(album.root, nodes=["c3", "f6"])
    for node, stored in together.items():
        for name, values in run.features(node=node).items():
            np.testing.assert_allclose(stored[name], values, rtol=1e-2, atol=1e-4)


def test_no_network_is_traced_while_another_computes(album, run, monkeypatch):
    """Tracing patches torch for all threads, so that a forward beside it fails or goes into the trace."""
    from featurepipe.backbones.engine import Engine

    album.fill(6)
    run({f"{i:03d}.png": album.root / f"{i:03d}.png" for i in range(3)}, nodes=["c3"])
    running, built, build, forward = [], [], Engine.__init__, Engine._forward

    def slow_forward(self, batch):
        running.append(1)
        time.sleep(0.2)
        result = forward(self, batch)
        running.pop()
        return result

    def noting_build(self, *args, **options):
        time.sleep(0.05)  # what was submitted has begun
        built.append(len(running))
        build(self, *args, **options)

    monkeypatch.setattr(Engine, "_forward", slow_forward)
    monkeypatch.setattr(Engine, "__init__", noting_build)
    mixed = {f"{i:03d}.png": album.root / f"{i:03d}.png" for i in (3, 0, 4, 1, 5, 2)}
    assert run(mixed, nodes=["c3", "f6"], batch_size=1)["counts"]["computed"] == 6
    assert built == [0, 0]


def test_one_image_under_two_names_is_computed_once(album, run):
    album.fill(3)
    for number in range(5):
        shutil.copy(album.root / "001.png", album.root / f"again{number}.png")
    assert run.counts(album.root) == (3, 5, 8, run.decodes, 3)
    assert run.decodes <= 8
    stored = run.features()
    assert all(np.array_equal(stored[f"again{n}.png"], stored["001.png"]) for n in range(5))


def test_an_image_known_from_another_dataset_is_read_but_not_computed(filled, run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy2(filled.root / "003.png", other / "different-name.png")
    assert run.counts(other) == (0, 1, 1, 0, 0)
    np.testing.assert_array_equal(run.features("other")["different-name.png"], run.features()["003.png"])


def test_same_id_size_and_time_in_another_dataset_is_not_taken_for_the_same_image(album, run, tmp_path, picture):
    from PIL import Image

    for folder, seed in (("one", 1), ("two", 2)):
        path = tmp_path / folder / "a.bmp"
        path.parent.mkdir()
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(path)
        os.utime(path, ns=(5, 5))
    run(tmp_path / "one")
    assert run.counts(tmp_path / "two") == (1, 0, 1, 1, 1)
    assert not np.allclose(run.features("one")["a.bmp"], run.features("two")["a.bmp"])


def test_images_in_memory_are_known_by_their_pixels(run):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 12, 12), dtype=np.uint8)
    assert run.counts(pixels, dataset="m")[:2] == (5, 0)
    more = np.concatenate([pixels[::-1], pixels[:1] ^ 255])
    assert run.counts(more, dataset="m")[:2] == (1, 5)


def listing(*rows):
    names = ["id", "size", "mtime_ns"]
    return pa.table({
        **{name: pa.array([row[i] for row in rows], SCHEMA.field(name).type) for i, name in enumerate(names)},
        "locator": pa.array([b""] * len(rows), pa.binary()),
    })  # fmt: skip


def known(*rows):
    return pa.table({
        "id": pa.array([r[0] for r in rows], pa.string()), "size": pa.array([r[1] for r in rows], pa.int64()),
        "mtime_ns": pa.array([r[2] for r in rows], pa.int64()), "key": pa.array([r[3] for r in rows], pa.binary(32)),
    })  # fmt: skip


def test_the_plan_sorts_rows_into_known_rejected_and_to_do():
    key = {name: name.encode() * 32 for name in "abcd"}
    here = listing(("a", 1, 1), ("b", 1, 1), ("c", 1, 1), ("d", 1, 1), ("e", 1, 1))
    there = known(("d", 1, 1, key["d"]), ("c", 1, 1, key["c"]), ("b", 1, 2, key["b"]), ("a", 1, 1, key["a"]))
    plan = make_plan(here, there, KeySet([key["a"]]), KeySet([key["d"]]))
    assert plan.todo.tolist() == [1, 2, 4]
    assert plan.rejected.tolist() == [3]
    assert plan.known == 1
    assert plan.has_key.tolist() == [True, False, True, True, False]
    assert [bytes(k) for k in plan.keys[plan.has_key]] == [key["a"], key["c"], key["d"]]


def test_the_plan_takes_the_later_of_two_notes_and_trusts_no_unknown_stat():
    old, new = b"o" * 32, b"n" * 32
    there = known(("a", 1, 1, old), ("a", 1, 1, new), ("b", -1, 5, old), ("c", 5, -1, old))
    plan = make_plan(listing(("a", 1, 1), ("b", -1, 5), ("c", 5, -1)), there, KeySet([new, old]), KeySet())
    assert bytes(plan.keys[0]) == new
    assert plan.todo.tolist() == [1, 2]


def test_keys_that_share_a_prefix_are_told_apart():
    a, b = b"12345678" + b"a" * 24, b"12345678" + b"b" * 24
    both = np.frombuffer(a + b, np.uint8).reshape(2, 32)
    assert KeySet([a]).contains(both).tolist() == [True, False]
    assert KeySet().contains(both).tolist() == [False, False]
