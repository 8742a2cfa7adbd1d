"""A dry run says what a run would cost, and changes nothing."""

import hashlib

import pytest

from featurepipe.errors import StoreError


def tree(path):
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else None for p in path.rglob("*")}


def test_a_dry_run_makes_no_store(album, run):
    album.fill(30)
    found = run(album.root, nodes=["c3", "bottleneck", "c3:flatten"], dry_run=True)
    assert not run.path.exists()
    assert {name: found[name] for name in ("listed", "known", "rejected", "to_read", "new", "sampled")} == {
        "listed": 30, "known": 0, "rejected": 0, "to_read": 30, "new": 30, "sampled": 30,
    }  # fmt: skip
    assert found["dry_run"] is True
    assert found["bytes_per_column"] == {"c3:gap": 30 * 16 * 2, "f6.1:gap": 30 * 84 * 2, "c3:flatten": 30 * 1600 * 2}
    assert found["seconds"] == pytest.approx(30 / found["images_per_second"])
    assert found["seconds"] > 0
    assert "holds none" in found["new_space"]


def test_a_dry_run_into_an_empty_folder_makes_no_store(album, run):
    album.fill(3)
    run.path.mkdir()
    assert run(album.root, dry_run=True)["to_read"] == 3
    assert list(run.path.iterdir()) == []


def test_a_dry_run_into_something_else_is_refused(album, run):
    album.fill(3)
    run.path = album.root
    with pytest.raises(StoreError, match="neither empty nor a feature store"):
        run(album.root, dry_run=True)


def test_a_dry_run_changes_nothing_in_a_store(album, run):
    album.fill(10)
    run(album.root)
    before = tree(run.path)
    album.fill(4, first=20)
    found = run(album.root, nodes=["c3", "bottleneck"], dry_run=True)
    assert tree(run.path) == before
    assert (found["listed"], found["known"], found["to_read"], found["new"]) == (14, 0, 14, 4)
    assert found["new_space"] is None
    # Ten images have the bottleneck already, so only the four new ones need room for it.
    assert found["bytes_per_column"] == {"c3:gap": 14 * 16 * 2, "f6.1:gap": 4 * 84 * 2}
    assert run(album.root, precision="bf16", dry_run=True)["new_space"].startswith(
        "starting a new feature space: precision"
    )
    assert tree(run.path) == before


def test_an_estimate_is_what_the_run_then_writes(album, run):
    album.fill(12)
    found = run(album.root, nodes=["c3", "bottleneck"], dtype="float32", dry_run=True)
    run(album.root, nodes=["c3", "bottleneck"], dtype="float32")
    (space,) = run.store.spaces()
    assert {name: info.bytes for name, info in space.columns().items()} == found["bytes_per_column"]
    assert space.fields == found["space"]


def test_nothing_new_takes_no_time_and_no_room(album, run):
    album.fill(5)
    run(album.root)
    found = run(album.root, dry_run=True)
    assert (found["to_read"], found["seconds"], found["bytes_per_column"]) == (0, 0.0, {"f6.1:gap": 0})
    assert run.reads == 0


def test_the_sample_is_short(album, run):
    album.fill(200)
    found = run(album.root, dry_run=True)
    assert found["sampled"] == 64
    assert run.reads <= 2 * 4 * 64
    assert found["bytes_per_column"] == {"f6.1:gap": 200 * 84 * 2}


def test_unusable_images_are_said_but_cannot_be_timed(album, run):
    album.write("a.png", b"x")
    found = run(album.root, dry_run=True, precision="fp32")
    assert (found["to_read"], found["sampled"], found["seconds"]) == (1, 0, None)
