"""Night after night on a changing pile: the record says what happened, and the store holds what a fresh one would."""

import os
import random
import shutil
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from featurepipe.errors import TooManyRejects
from featurepipe.extraction.plan import KINDS
from featurepipe.store import documents, verify_store

NO_IMAGE = b"\x89PNG no more"


def changes(record):
    """The counts that are not zero; all but the deleted must add up to the images listed."""
    found = record["changes"]
    assert set(found) == {*KINDS, "deleted"}
    assert sum(found.values()) - found["deleted"] == record["counts"]["listed"]
    return {kind: count for kind, count in found.items() if count}


def touch(path, seconds=1):
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + seconds * 10**9))


@pytest.fixture
def night(album, run):
    """Runs one night on the album and returns its record."""

    def extract(**options):
        return run(album.root, **{"max_rejects": "50%", "batch_size": 1, "dtype": "float32", **options})

    return extract


def assert_as_fresh(album, run, tmp_path, **options):
    """The store holds for the album exactly what a fresh one holds."""
    kept, path = run.store, run.path
    run.path = tmp_path / f"fresh-{len(kept.runs())}-{len(list(tmp_path.iterdir()))}"
    run(album.root, **{"max_rejects": "100%", "batch_size": 1, "dtype": "float32", **options})
    fresh, run.path = run.store, path
    columns = ["id", "key", "label", "split", "size", "mtime_ns", "status", "reason"]
    assert kept.snapshot("album").select(columns).equals(fresh.snapshot("album").select(columns))
    ours, theirs = (store.features("album", "bottleneck") for store in (kept, fresh))
    assert ours.ids.tolist() == theirs.ids.tolist()
    np.testing.assert_array_equal(ours.read(), theirs.read())
    assert verify_store(kept).clean


def test_each_kind_of_change_does_what_it_should(album, run, night, picture, tmp_path):
    for name in ("cat/a.png", "cat/b.png", "cat/c.png", "dog/d.png", "dog/e.png", "dog/f.png"):
        album.add(name, sum(name.encode()))
    album.write("cat/bad.png", NO_IMAGE)
    album.write("cat/worse.png", NO_IMAGE + b"!")
    record = night()
    assert changes(record) == {"new": 6, "new_rejected": 2}
    assert (record["status"], record["exit_code"], record["counts"]["computed"]) == ("done", 3, 6)
    first = run.features()

    record = night()
    assert changes(record) == {"unchanged": 6, "still_rejected": 2}
    assert record["counts"]["read"] == 0

    (album.root / "bird").mkdir()
    touch(album.root / "cat/a.png")  # touched
    (album.root / "cat/b.png").rename(album.root / "dog/b.png")  # moved
    shutil.copy2(album.root / "cat/c.png", album.root / "bird/c.png")  # copied
    album.add("dog/d.png", 77)  # changed
    (album.root / "dog/e.png").unlink()  # deleted
    album.write("dog/f.png", b"overwritten")  # corrupted
    album.write("cat/bad.png", picture(78))  # repaired
    album.add("bird/g.png", 79)  # new
    album.write("bird/h.png", b"nothing")  # new_rejected
    record = night()
    assert changes(record) == {
        "touched": 1, "moved": 1, "unchanged": 1, "copied": 1, "changed": 1, "deleted": 1, "corrupted": 1, "repaired": 1,
        "still_rejected": 1, "new": 1, "new_rejected": 1,
    }  # fmt: skip
    counts = record["counts"]
    assert (counts["listed"], counts["computed"], counts["known"], counts["rejected"]) == (10, 3, 4, 3)
    assert record["gone"] == 2  # moved, and deleted
    now = run.features()
    assert sorted(now) == [
        "bird/c.png",
        "bird/g.png",
        "cat/a.png",
        "cat/bad.png",
        "cat/c.png",
        "dog/b.png",
        "dog/d.png",
    ]
    for there, before in {"dog/b.png": "cat/b.png", "bird/c.png": "cat/c.png", "cat/a.png": "cat/a.png"}.items():
        np.testing.assert_array_equal(now[there], first[before])
    assert not np.allclose(now["dog/d.png"], first["dog/d.png"])
    features = run.store.features("album", "bottleneck")
    assert features.labels[features.ids.tolist().index("dog/b.png")] == "dog"
    assert_as_fresh(album, run, tmp_path)


def test_relabelled_images_cost_nothing(run, tmp_path, picture):
    rows = [(f"{number}.png", "cat" if number < 3 else "dog", "train") for number in range(6)]
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    manifest = tmp_path / "album.csv"

    def write(rows):
        manifest.write_text("path,label,split\n" + "".join(f"{','.join(row)}\n" for row in rows))

    write(rows)
    assert changes(run(manifest)) == {"new": 6}
    rows[1] = ("1.png", "dog", "train")
    rows[2] = ("2.png", "", "train")
    rows[4] = ("4.png", "dog", "test")
    write(rows)
    record = run(manifest)
    assert changes(record) == {"relabelled": 3, "unchanged": 3}
    assert (record["counts"]["known"], run.reads) == (6, 0)
    features = run.store.features("album", "bottleneck")
    assert dict(zip(features.ids, features.labels, strict=True)) == {
        "0.png": "cat", "1.png": "dog", "2.png": None, "3.png": "dog", "4.png": "dog", "5.png": "dog",
    }  # fmt: skip
    assert features.splits.tolist() == ["train"] * 4 + ["test", "train"]


def test_labels_by_folder_make_a_moved_image_of_a_relabelled_one(album, run, night):
    album.add("cat/a.png", 1)
    night()
    (album.root / "dog").mkdir()
    (album.root / "cat/a.png").rename(album.root / "dog/a.png")
    assert changes(night()) == {"moved": 1}
    assert run.store.features("album").labels.tolist() == ["dog"]


def test_a_repaired_image_comes_back_without_computing(album, run, night):
    """It was computed before it was corrupted."""
    album.fill(3)
    night()
    path = album.root / "001.png"
    original = path.read_bytes()
    path.write_bytes(original[:50])
    assert changes(night()) == {"unchanged": 2, "corrupted": 1}
    assert sorted(run.features()) == ["000.png", "002.png"]
    path.write_bytes(original)
    record = night()
    assert changes(record) == {"unchanged": 2, "repaired": 1}
    assert record["counts"]["computed"] == 0
    assert len(run.features()) == 3


def test_nights_that_fail_for_their_rejects_leave_the_changes_to_the_one_that_does_not(album, run, night):
    album.fill(4)
    night()
    for name in ("000.png", "001.png"):
        album.write(name, NO_IMAGE)
    for _ in range(2):
        with pytest.raises(TooManyRejects):
            night(max_rejects=1)
        record = run.store.runs()[-1]
        assert (record["status"], record["exit_code"]) == ("failed", 4)
        assert "2 of 4 images were rejected" in record["error"]
        assert record["changes"] is None  # else whoever adds nights up counts these images each time
    assert changes(night()) == {"corrupted": 2, "unchanged": 2}


def test_each_dataset_has_a_history_of_its_own(album, run, night):
    album.fill(3)
    night()
    assert changes(night(dataset="other")) == {"new": 3}
    assert changes(night(dataset="other")) == {"unchanged": 3}


def test_another_node_changes_no_image(album, run, night):
    album.fill(3)
    night()
    record = night(nodes=["c3"])
    assert (changes(record), record["counts"]["computed"]) == ({"unchanged": 3}, 3)


class EarlierClock(datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.now(UTC) - timedelta(days=400)


def test_a_clock_set_back_changes_nothing(album, run, night, monkeypatch, tmp_path):
    album.fill(4)
    night()
    first = run.store.runs()[0]["run_id"]
    monkeypatch.setattr(documents, "datetime", EarlierClock)
    monkeypatch.setattr("featurepipe.records.datetime", EarlierClock)
    album.add("new.png", 50)
    (album.root / "000.png").unlink()
    os.utime(album.root / "001.png", ns=(5, 5))  # older than before
    record = night()
    assert changes(record) == {"new": 1, "deleted": 1, "touched": 1, "unchanged": 2}
    assert record["run_id"] > first
    assert record["started"] < run.store.runs()[0]["started"]
    assert [entry["run_id"] for entry in run.store.runs()] == [first, record["run_id"]]
    assert run.store.snapshot_ids("album")[-1] == record["run_id"]
    assert changes(night()) == {"unchanged": 4}
    assert run.reads == 0
    assert_as_fresh(album, run, tmp_path)


class Pile:
    """Random changes of an album, and what the record should count of them."""

    def __init__(self, album, picture, seed):
        self.album, self.picture = album, picture
        self.random = random.Random(seed)
        self.numbers = iter(range(1000, 100_000))
        self.bad, self.twins = set(), set()
        self.expected = {}

    def change(self):
        """Changes some images, each once, and adds others."""
        self.expected = dict.fromkeys((*KINDS, "deleted"), 0)
        names = sorted(path.name for path in self.album.root.iterdir())
        self.random.shuffle(names)
        changed = self.random.randrange(len(names))
        for place, name in enumerate(names):
            self._change(name) if place < changed else self._leave(name)
        for _ in range(self.random.randrange(3)):
            self._write(f"new-{next(self.numbers)}.png", self._new_picture(), "new")
        for _ in range(self.random.randrange(2)):
            self._spoil(f"new-{next(self.numbers)}.png", "new_rejected")

    def _change(self, name):
        path = self.album.root / name
        if name in self.bad:
            kinds = ["repaired", "still_rejected", "deleted"]
        else:
            # Of two copies one that goes while the other is copied has moved.
            kinds = ["touched", "changed", "corrupted", "copied", "moved"] + ["deleted"] * (name not in self.twins)
        kind = self.random.choice(kinds)
        if kind in ("repaired", "changed"):
            self._write(name, self._new_picture(), kind)
        elif kind in ("corrupted", "still_rejected"):
            self._spoil(name, kind)
        elif kind == "touched":
            touch(path, self.random.randrange(1, 1000))
            self.expected[kind] += 1
        elif kind == "copied":
            copy = f"copy-{next(self.numbers)}.png"
            self.twins |= {name, copy}
            self._write(copy, path.read_bytes(), kind)
            self._leave(name)
        else:
            self._take_away(path, kind)

    def _leave(self, name):
        self.expected["still_rejected" if name in self.bad else "unchanged"] += 1

    def _take_away(self, path, kind):
        self.bad.discard(path.name)
        if kind == "moved":
            moved = path.rename(self.album.root / f"moved-{next(self.numbers)}.png")
            self.twins |= {moved.name} if path.name in self.twins else set()
        else:
            path.unlink()
        self.expected[kind] += 1

    def _new_picture(self):
        return self.picture(next(self.numbers))

    def _write(self, name, content, kind):
        self.album.write(name, content)
        self.bad.discard(name)
        self.expected[kind] += 1

    def _spoil(self, name, kind):
        self._write(name, NO_IMAGE + str(next(self.numbers)).encode(), kind)
        self.bad.add(name)


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_random_nights_add_up_and_end_as_a_fresh_extraction(album, run, night, picture, tmp_path, seed):
    """The record must count each change as it was meant, and the store must compute what is new and nothing else."""
    pile = Pile(album, picture, seed)
    album.fill(14)
    night()
    for number in range(8):
        pile.change()
        record = night(max_rejects="100%")
        assert record["changes"] == pile.expected, f"night {number}"
        expected = pile.expected
        assert record["counts"]["computed"] == expected["new"] + expected["changed"] + expected["repaired"]
        assert record["counts"]["rejected"] == len(pile.bad)
        if number in (3, 7):
            assert_as_fresh(album, run, tmp_path)
