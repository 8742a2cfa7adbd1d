"""What a dataset's last snapshot is for: images in a folder that cannot be read now are rejects, and not deletions."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from featurepipe.extraction.prepare import History
from featurepipe.images.listing import SCHEMA, UNKNOWN, Findings

DENIED = "unreadable: Permission denied"


@pytest.fixture
def locked(album, monkeypatch) -> set[Path]:
    """Folders that nobody may list or search, whoever runs the tests; tests put some in and take them out."""
    folders: set[Path] = set()

    def refusing(function: Callable[..., object]) -> Callable[..., object]:
        def call(path: object, *args: object, **options: object) -> object:
            if not isinstance(path, int) and any(Path(os.fsdecode(path)).is_relative_to(folder) for folder in folders):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
            return function(path, *args, **options)

        return call

    for name in ("scandir", "open", "stat"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    return folders


def listing(*rows: tuple[str, str | None], unreadable: tuple[str, ...] = ()) -> pa.Table:
    """A listing of ids and labels, each with its id as locator."""
    found = Findings()
    found.unreadable.extend(unreadable)
    return found.attach(
        pa.Table.from_pylist(
            [
                {"id": id_, "label": label, "split": None, "size": 5, "mtime_ns": 7, "locator": id_.encode()}
                for id_, label in rows
            ],
            schema=SCHEMA,
        )
    )


def snapshot(*rows: tuple[str, str | None]) -> pa.Table:
    return pa.Table.from_pylist([{"id": id_, "label": label, "split": "test"} for id_, label in rows])


def test_only_what_was_in_the_folders_is_added() -> None:
    before = snapshot(("a", "a"), ("a/1", "one"), ("a/b/2", None), ("ab/3", "ab"), ("c/4", "c"), ("c/d/5", "d"))
    now = listing(("a", None), ("c/4", "c"), ("c/d", None), unreadable=("a", "c/d"))
    more = History(before).with_unreadable(now)
    assert more.slice(0, 3).equals(now)
    assert more.slice(3).to_pylist() == [
        {"id": id_, "label": label, "split": "test", "size": UNKNOWN, "mtime_ns": UNKNOWN, "locator": locator}
        for id_, label, locator in (("a/1", "one", b"a"), ("a/b/2", None, b"a"), ("c/d/5", "d", b"c/d"))
    ]
    assert History(before).gone(more) == 1  # ab/3


def test_without_such_a_folder_or_a_snapshot_the_listing_stays() -> None:
    readable, blocked = listing(("a", None)), listing(("a", None), unreadable=("a",))
    assert History(snapshot(("a/1", "one"))).with_unreadable(readable) is readable
    assert History().with_unreadable(blocked) is blocked


def test_a_folder_that_can_be_read_again_is_no_image_that_went() -> None:
    rows = [("a", None), ("a/1", None), ("b", None), ("b.png", None), ("c", None), ("d", b"d" * 32), ("e/2", b"e" * 32)]
    keys = pa.array([key for _, key in rows], pa.binary(32))
    history = History(pa.table({"id": [id_ for id_, _ in rows], "key": keys}))
    now = listing(("a/1", None), ("b/3", None), ("b.png/4", None), ("d/5", None), ("e/2", None))
    left = history.without_folders(now)
    assert left.snapshot["id"].to_pylist() == ["a/1", "b.png", "c", "d", "e/2"]
    assert (
        left.gone(now) == 3
    )  # an image called b.png, one called d that was usable, and c, of which nothing says what it was
    assert left.without_folders(now) == left
    assert History().without_folders(now) == History()


def test_folders_in_one_another_that_can_be_read_again_are_no_images_that_went() -> None:
    history = History(pa.table({"id": ["a", "a/b", "a/b/1"], "key": pa.nulls(3, pa.binary(32))}))
    now = listing(("a/b/1", None))
    assert history.without_folders(now).gone(now) == 0


def test_a_folder_whose_images_went_while_it_could_not_be_read_counts_as_its_images() -> None:
    keys = pa.nulls(3, pa.binary(32))
    history = History(pa.table({"id": ["a", "a/1", "a/2"], "key": keys}))
    now = listing(("b.png", None))
    assert history.without_folders(now).gone(now) == 2


def status(run) -> dict[str, tuple[str, str | None]]:
    """Of each image in the last snapshot: its status and label; rejects have to be for lack of permission."""
    rows = run.store.snapshot("album").to_pylist()
    assert {row["reason"] for row in rows} <= {None, "", DENIED}
    assert all((row["status"] == "rejected") == (row["reason"] == DENIED) for row in rows)
    return {row["id"]: (row["status"], row["label"]) for row in rows}


def test_a_folder_that_is_blocked_for_a_run_or_two_costs_nothing(album, run, locked) -> None:
    album.fill(3, pattern="cat/{}.png")
    album.fill(2, first=10, pattern="dog/{}.png")
    album.fill(2, first=20, pattern="dog/old/{}.png")
    names = [f"cat/{i}.png" for i in range(3)], ["dog/10.png", "dog/11.png", "dog/old/20.png", "dog/old/21.png"]
    all_good = {id_: ("ok", id_.split("/")[0]) for id_ in (*names[0], *names[1])}
    run(album.root, max_gone=0)
    whole, first = status(run), run.features()
    assert {id_: (state, label) for id_, (state, label) in whole.items()} == all_good

    locked.add(album.root / "dog")
    for _ in range(2):
        record = run(album.root, max_rejects=5, max_gone=0)
        assert record["counts"] == {"listed": 8, "computed": 0, "known": 3, "rejected": 5, "read": 5}
        assert record["gone"] == 0
        assert record["reject_reasons"] == {"unreadable": 5}
        assert record["changes"]["deleted"] == 0
        assert (run.decodes, run.forwards) == (0, 0)
        blocked = status(run)
        assert {id_ for id_, (state, _) in blocked.items() if state == "rejected"} == {"dog", *names[1]}
        assert {id_: blocked[id_][1] for id_ in all_good} == {id_: label for id_, (_, label) in all_good.items()}
        assert run.features().keys() == set(names[0])

    locked.clear()
    record = run(
        album.root, max_gone=0
    )  # the folder itself was an entry of the last snapshot, and is no image that went; the counts have it
    assert record["counts"]["computed"] == record["counts"]["rejected"] == run.forwards == 0
    assert record["counts"]["known"] == record["counts"]["listed"] == 7
    assert (record["gone"], record["changes"]["deleted"]) == (0, 8 - 7)
    assert status(run) == whole
    again = run.features()
    assert again.keys() == first.keys()
    for id_, values in first.items():
        np.testing.assert_array_equal(again[id_], values)
    record = run(album.root, max_gone=0)
    assert (record["counts"]["known"], run.reads) == (7, 0)
