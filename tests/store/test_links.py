"""Links, pipes and odd files at every path of a store: nothing outside is opened, changed or removed, whatever is called."""

import contextlib
import os
import shutil
from pathlib import Path

import pytest

from featurepipe.errors import CorruptPart, FeaturepipeError, StoreError
from featurepipe.interrupt import StopRequest
from featurepipe.jobs.lock import Lease, job_lock
from featurepipe.layer_depth.journal import Journal
from featurepipe.store import FeatureStore, compact_store, describe, export, gc_store, verify_store
from featurepipe.store.atomic import MOST_OF_LINES, append_lines, listed, open_file, read_file, read_lines
from featurepipe.store.gc import remove_runs
from featurepipe.store.parts import read_part

FIELDS = {"dtype": "float16", "net": "tiny"}
NAMES = ["a1", "a2", "b1", "b2"]
REJECT = {"key": None, "id": "bad.jpg", "size": 3, "mtime_ns": 4, "reason": "truncated: at byte 3", "run_id": "r"}


@pytest.fixture
def whole(tmp_path, store, space, rows, flip_bit):
    """A store with something at every place that a store has; beside it a folder ``mine``."""
    rows.write(store, space, ["gone"], dataset="d")
    verify = next(space.path.glob("parts/*.h5"))
    flip_bit(verify, verify.stat().st_size // 2)
    rows.write(store, space, NAMES[:2], dataset="d")
    rows.write(store, space, NAMES[2:], dataset="d")
    rows.snapshot(store, "d", NAMES[:2])
    store.write_run({"run_id": rows.snapshot(store, "d", NAMES), "dataset": "d"})
    space.add_rejects([REJECT])
    store.write_depth({"dataset": "d"})
    Journal(store.depth_journal("d")).keep("k", 1)
    verify_store(store)
    with job_lock(store, "nightly", StopRequest()):
        pass
    (tmp_path / "mine").mkdir()
    return store


PLACES = (
    "store.json", ".lock", "spaces", "spaces/*", "spaces/*/space.json", "spaces/*/rejects.jsonl", "spaces/*/parts",
    "spaces/*/parts/*.h5", "spaces/*/quarantine", "spaces/*/quarantine/*.h5", "snapshots", "snapshots/*",
    "snapshots/*/*.parquet", "runs", "runs/*.json", "depth", "depth/*", "depth/*/*.json", "depth/*/journal.jsonl", "jobs",
    "jobs/nightly.lock",
)  # fmt: skip


def everything(path: Path, rows, tmp_path: Path) -> None:
    """All that reads, writes and removes; each may refuse, none may do anything else."""

    def opened() -> FeatureStore:
        return FeatureStore(path, create=False)

    def written() -> None:
        space = opened().open_space(FIELDS, backbone="tiny")
        space.update_notes({"x": 1})
        rows.write(opened(), space, ["new1", "a1"], dataset="d")
        space.add_rejects([REJECT])

    def locked() -> None:
        with job_lock(opened(), "nightly", StopRequest()):
            pass

    calls = [
        lambda: describe(opened()),
        lambda: opened().features("d", "a").numpy(),
        lambda: export(opened().features("d", "a"), tmp_path / "out.npz"),
        lambda: opened().spaces()[0].known_files(dataset="d"),
        lambda: opened().spaces()[0].parts_of_shard("2", ""),
        lambda: opened().depth_documents("d"),
        lambda: Journal(opened().depth_journal("d")).keep("k", 2),
        lambda: opened().write_depth({"dataset": "d"}),
        lambda: opened().write_run({"run_id": opened().new_run_id(), "dataset": "d"}),
        locked,
        lambda: verify_store(opened()),
        written,
        lambda: rows.snapshot(opened(), "d", NAMES),
        lambda: compact_store(opened()),
        lambda: gc_store(opened(), keep_snapshots=1),
        lambda: remove_runs(opened(), [run["run_id"] for run in opened().runs()]),
    ]
    for call in calls:
        with contextlib.suppress(FeaturepipeError, IndexError):
            call()


def tree(path: Path) -> dict[str, tuple[bytes, int]]:
    files = [path, *path.rglob("*")]
    return {str(p): (p.read_bytes() if p.is_file() else b"", p.stat().st_mtime_ns) for p in files}


@pytest.mark.parametrize("place", PLACES)
def test_nothing_is_changed_through_a_link(place, whole, rows, tmp_path):
    found = max(whole.path.glob(place))
    outside = tmp_path / "mine" / found.name
    shutil.move(found, outside)
    found.symlink_to(os.path.relpath(outside, found.parent))
    before = tree(tmp_path / "mine")
    everything(whole.path, rows, tmp_path)
    assert tree(tmp_path / "mine") == before
    if place != "store.json":
        name = str(found.relative_to(whole.path))
        named = [problem.part for problem in verify_store(whole).problems]
        assert name in named or found.stem in named or not found.is_symlink()


@pytest.mark.parametrize("place", [place for place in PLACES if "." in place])
def test_a_pipe_in_the_place_of_a_file_keeps_nobody_waiting(place, whole, rows, tmp_path):
    found = max(whole.path.glob(place))
    found.unlink()
    os.mkfifo(found)
    everything(whole.path, rows, tmp_path)


@pytest.mark.parametrize("place", [".lock", "spaces/*/rejects.jsonl", "depth/*/journal.jsonl", "jobs/nightly.lock"])
def test_a_file_that_has_another_name_elsewhere_is_not_written_to(place, whole, rows, tmp_path):
    """Those that are changed in place; all others are replaced by a rename."""
    (found,) = whole.path.glob(place)
    os.link(found, tmp_path / "mine" / "victim")
    before = (tmp_path / "mine" / "victim").read_bytes()
    everything(whole.path, rows, tmp_path)
    assert (tmp_path / "mine" / "victim").read_bytes() == before


def test_lines_are_added_to_a_copy_of_a_file_with_two_names(tmp_path):
    path, other = tmp_path / "rejects.jsonl", tmp_path / "backup"
    path.write_bytes(b"one\ntor")
    os.link(path, other)
    append_lines(path, b"two\n")
    assert path.read_bytes() == b"one\ntor\ntwo\n"
    assert other.read_bytes() == b"one\ntor"
    append_lines(path, b"three\n")
    assert [line for _, line in read_lines(path)] == [b"one\n", b"tor\n", b"two\n", b"three\n"]


def test_the_store_itself_may_be_named_by_a_link(whole, tmp_path):
    (tmp_path / "shelf").symlink_to(whole.path.parent)
    (tmp_path / "named").symlink_to(tmp_path / "shelf" / whole.path.name)
    assert len(FeatureStore(tmp_path / "named").features("d", "a")) == len(NAMES)
    assert verify_store(FeatureStore(tmp_path / "named")).problems == verify_store(whole).problems
    compact_store(FeatureStore(tmp_path / "named"))


def test_compact_and_gc_refuse_what_might_be_needed_elsewhere(whole, tmp_path):
    (whole.path / "snapshots" / "other").symlink_to(tmp_path)
    for clean in (compact_store, gc_store):
        with pytest.raises(StoreError, match=r"snapshots/other is a symbolic link"):
            clean(whole)
    assert describe(whole)["set_aside"] == {"snapshots/other": "it is a symbolic link, and nothing is read through one"}


def test_a_dataset_in_a_linked_folder_is_refused_before_anything_is_computed(whole, tmp_path):
    (whole.path / "snapshots" / "other").symlink_to(tmp_path)
    assert whole.datasets() == ["d"]
    with pytest.raises(StoreError, match="is a symbolic link"):
        whole.snapshot("other")


def test_a_lease_that_is_a_link_is_not_read(whole, tmp_path):
    (tmp_path / "mine" / "lease").write_text("{}")
    (whole.path / "jobs" / "n.lease.7").symlink_to(tmp_path / "mine" / "lease")
    with pytest.raises(StoreError, match="symbolic link"):
        Lease(whole.path / "jobs" / "n.lease").take("job n", StopRequest())


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("folder", "pipe", "dangling", "zero"):
        with pytest.raises(StoreError, match="nothing in a store is opened"):
            os.close(open_file(tmp_path / name, os.O_RDWR | os.O_CREAT))
        with pytest.raises(CorruptPart):
            read_part(tmp_path / name)
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(FileNotFoundError):
        open_file(tmp_path / "missing")


def test_files_that_claim_more_bytes_than_they_can_have_are_not_read(tmp_path):
    path = tmp_path / "lines"
    with path.open("wb") as file:
        file.truncate(MOST_OF_LINES + 1)
    with pytest.raises(StoreError, match="no file of lines"):
        list(read_lines(path))
    with pytest.raises(StoreError, match="no document"):
        read_file(path)


def test_patterns_find_what_globs_find_but_enter_no_link(tmp_path):
    for name in ("a/x/1.h5", "a/x/.2.h5", "a/.y/3.h5", "b/x/4.h5", "a/5.h5", "a/x/6.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "c").symlink_to("a")
    (tmp_path / "a/x/7.h5").mkdir()
    (tmp_path / "b/x/8.h5").symlink_to("4.h5")
    found = [str(path.relative_to(tmp_path)) for path in listed(tmp_path, "*/x/*.h5")]
    assert found == ["a/x/1.h5", "b/x/4.h5", "b/x/8.h5"]
    assert listed(tmp_path / "none", "*/x") == []


@pytest.mark.parametrize("change", [{"shape": (2**59, 32)}, {"dtype": "|O"}, {"dtype": "<f8"}, {"dtype": "<M8[ns]"}])
def test_a_header_cannot_claim_rows_or_values_that_no_part_has(change, whole, monkeypatch):
    from dataclasses import replace

    from featurepipe.store import parts

    path = max(whole.path.glob("spaces/*/parts/*.h5"))
    attributes, arrays = parts._read_header(path)
    arrays["key"] = replace(arrays["key"], **change)
    rows = arrays["key"].shape[0]
    arrays |= {n: replace(i, shape=(rows, *i.shape[1:])) for n, i in arrays.items() if n in ("id", "size", "mtime_ns")}
    monkeypatch.setattr(parts, "_read_header", lambda _: ({**attributes, "rows": rows}, arrays))
    with pytest.raises(CorruptPart, match="key"):
        read_part(path)
