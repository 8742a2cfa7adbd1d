"""verify: images that lack the features that a finished run gave them."""

import shutil
from pathlib import Path

import pytest

from featurepipe.store import compact_store, describe, gc_store, verify, verify_store

NAMES = [f"n{i}" for i in range(30)]


class Runs:
    """Does what extract does: parts, snapshot, record."""

    def __init__(self, store, space, rows):
        self.store, self.space, self.rows = store, space, rows

    def __call__(self, names, columns=("a:gap",), *, dataset="d", new=None, status="done", image_status=None):
        run_id = self.store.new_run_id()
        with self.space.writer(run_id, dataset=dataset, part_bytes=1) as writer:
            for name in names if new is None else new:
                self.rows.add(writer, [name], columns)
        if status == "done":
            states = image_status or ["ok"] * len(names)
            self.rows.snapshot(self.store, dataset, names, run_id=run_id, status=states)
        record = {"fingerprint": self.space.fingerprint, "columns": list(columns), "status": status}
        self.store.write_run({"run_id": run_id, "dataset": dataset, **record})
        return run_id

    def damage(self, flip_bit, name):
        """Flips a bit of the first part of an image."""
        index = self.space.index(["a:gap"])
        part = index.parts[index.locate(self.rows.keys([name]))[0][0]]
        flip_bit(Path(part.path), part.arrays["features/a:gap"].offset)


@pytest.fixture
def run(store, space, rows):
    return Runs(store, space, rows)


def said(store):
    return [(problem.space, problem.what) for problem in verify_store(store).problems if not problem.part]


def test_a_quarantined_part_stays_a_problem_until_its_rows_are_there_again(store, space, run, flip_bit):
    run(NAMES)
    assert verify_store(store).clean
    for name in ("n3", "n7"):
        run.damage(flip_bit, name)
    lacking = "2 of 30 images of dataset 'd' lack a:gap in this space; re-run featurepipe extract"
    for _ in range(3):
        assert said(store) == [(space.name, lacking)]
    assert describe(store)["spaces"][0]["quarantined"] == sorted(p.stem for p in (space.path / "quarantine").iterdir())
    assert len(describe(store)["spaces"][0]["quarantined"]) == 2
    run(NAMES, new=["n3", "n7"])
    assert verify_store(store).clean
    gc_store(store)
    assert describe(store)["spaces"][0]["quarantined"] == []


def test_each_dataset_and_column_is_held_to_its_latest_finished_run(store, space, run, flip_bit):
    run(NAMES[:4])
    run(NAMES[:4], ("b:gap",))
    run([*NAMES[:4], NAMES[4]], new=[NAMES[4]])  # b is not computed for the new image, and nobody said it was
    run(NAMES[20:22], dataset="e")
    run(NAMES[:9], new=[], status="interrupted")
    assert verify_store(store).clean
    for path in space.part_paths()[4:8]:  # all of b
        path.unlink()
    assert said(store) == [
        (space.name, "4 of 4 images of dataset 'd' lack b:gap in this space; re-run featurepipe extract")
    ]
    run(NAMES[1:3], ("b:gap",))  # the source has shrunk meanwhile
    assert verify_store(store).clean


def test_rejects_and_removed_snapshots_are_not_lacking(store, run, space):
    run(["a", "b", "c"], new=["a", "c"], image_status=["ok", "rejected", "ok"])
    assert verify_store(store).clean
    run(["c"], ("b:gap",))
    gc_store(store, keep_snapshots=1)  # the row of "a" goes, and the snapshot that named it
    assert sum(part.rows for part in space.parts()) == 2
    assert verify_store(store).clean


def test_other_spaces_are_looked_at_on_their_own(store, space, run, rows):
    run(NAMES[:3])
    other = store.open_space({"dtype": "float32"}, backbone="other")
    Runs(store, other, rows)(NAMES[:3], new=[])
    assert said(store) == [
        (other.name, "3 of 3 images of dataset 'd' lack a:gap in this space; re-run featurepipe extract")
    ]
    shutil.rmtree(other.path)  # someone wanted it gone
    assert verify_store(store).clean


def test_a_damaged_snapshot_or_space_is_said_once(store, space, run):
    run_id = run(NAMES[:3])
    snapshot = store.path / "snapshots" / "d" / f"{run_id}.parquet"
    snapshot.write_bytes(b"PAR1")
    assert [problem.part for problem in verify_store(store).problems] == [str(snapshot.relative_to(store.path))]
    (space.path / "space.json").write_text("{")
    assert len(verify_store(store).problems) == 2


def test_a_part_compacted_away_while_reading_is_looked_for_again(store, space, run, monkeypatch):
    run(NAMES[:5])
    parts, calls = verify.Space.parts, []

    def overtaken(self):
        calls.append(found := parts(self))
        if len(calls) == 1:
            compact_store(store)
        return found

    monkeypatch.setattr(verify.Space, "parts", overtaken)
    assert list(verify.shortages(store)) == []
    assert (len(calls[0]), len(calls[-1])) == (5, 1)
