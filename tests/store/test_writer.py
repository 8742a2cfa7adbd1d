"""Rows on their way into parts."""

import errno
import os
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from featurepipe.errors import DiskFull, NonFiniteFeatures, StoreError, UsageError
from featurepipe.store import commit
from featurepipe.store.parts import read_array

NAMES = [f"x{i}" for i in range(20)]


def one(values):
    return {"a:gap": np.asarray(values, np.float32)}


def test_commits_by_size_and_counts_what_is_committed(store, space, rows):
    with space.writer(store.new_run_id(), part_bytes=400) as writer:
        for name in NAMES:
            rows.add(writer, [name])
    parts = space.parts()
    assert len(parts) == 3
    assert max(part.rows for part in parts) == 7  # 59 bytes a row
    assert writer.rows == sum(part.rows for part in parts) == 20
    assert writer.bytes == sum(path.stat().st_size for path in space.part_paths())
    assert 0 < writer.seconds < 10
    assert space.index(["a:gap"]).contains(rows.keys(NAMES)).all()


def test_commits_by_age_without_being_asked(store, space, rows):
    with space.writer(store.new_run_id(), part_seconds=0.05) as writer:
        rows.add(writer, NAMES[:2])
        assert writer.rows == 0
        time.sleep(0.06)
        writer.tick()
        for _ in range(200):
            if writer.rows:
                break
            time.sleep(0.01)
        assert writer.rows == 2


def test_young_rows_wait(store, space, rows):
    with space.writer(store.new_run_id(), part_seconds=60) as writer:
        rows.add(writer, NAMES)
        writer.tick()
        assert not space.part_paths()
        writer.commit()
        assert len(space.part_paths()) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_commits_what_was_added_when_interrupted(store, space, rows, error):
    with pytest.raises(error), space.writer(store.new_run_id()) as writer:  # noqa: PT012
        rows.add(writer, NAMES)
        raise error
    assert space.index().contains(rows.keys(NAMES)).all()


def test_the_arrays_may_be_reused_after_add(store, space):
    keys, values = np.zeros((2, 32), np.uint8), np.ones((2, 3), np.float32)
    with space.writer(store.new_run_id()) as writer:
        writer.add(keys, ["a", "b"], [1, 2], [3, 4], one(values))
        keys[:], values[:] = 9, 9
    part = space.parts()[0]
    assert read_array(part, "key").max() == 0
    assert read_array(part, "features/a:gap").max() == 1


def test_the_caller_is_not_stalled_and_one_commit_is_in_flight(store, space, rows, monkeypatch):
    gate, active, most = threading.Event(), [0], [0]
    real = commit.write_part

    def slow(*args, **kwargs):
        active[0] += 1
        most[0] = max(most[0], active[0])
        gate.wait(10)
        active[0] -= 1
        return real(*args, **kwargs)

    monkeypatch.setattr("featurepipe.store.writer.write_part", slow)
    with space.writer(store.new_run_id(), part_bytes=1) as writer:
        rows.add(writer, ["a"])  # returns although its commit hangs
        assert writer.rows == 0
        threading.Timer(0.05, gate.set).start()
        rows.add(writer, ["b"])  # waits for the first
        assert writer.rows == 1
    assert most[0] == 1
    assert writer.rows == 2


def test_columns_may_change_between_adds(store, space, rows):
    with space.writer(store.new_run_id()) as writer:
        rows.add(writer, NAMES[:3], ("a:gap",))
        rows.add(writer, NAMES[3:5], ("a:gap", "b:gap"))
        rows.add(writer, NAMES[5:], ("a:gap",), width=5)
    assert [(part.rows, sorted(part.columns)) for part in space.parts()] == [
        (3, ["a:gap"]),
        (2, ["a:gap", "b:gap"]),
        (15, ["a:gap"]),
    ]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_non_finite_values_are_refused_by_name(store, rows, bad, dtype):
    space = store.open_space({"dtype": dtype}, backbone="n")
    values = np.zeros((3, 4), np.float32)
    values[1, 2] = bad
    with space.writer(store.new_run_id()) as writer:
        rows.add(writer, ["fine"])
        with pytest.raises(NonFiniteFeatures, match=r"a:gap.*1 of 3 images: two$"):
            writer.add(rows.keys(["1", "2", "3"]), ["one", "two", "three"], [0] * 3, [0] * 3, one(values))
    assert writer.rows == 1
    assert not space.index().contains(rows.keys(["1", "2", "3"])).any()


def test_float16_overflow_widens_that_column_once_and_says_so(store, space, rows):
    said = []
    big = np.full((1, 4), 70000, np.float32)
    small = np.full((1, 4), 0.1, np.float32)
    with space.writer(store.new_run_id(), on_overflow=said.append) as writer:
        for name, a in [("1", small), ("2", big), ("3", small), ("4", big)]:
            writer.add(rows.keys([name]), [name], [0], [0], {"a:gap": a, "b:gap": small})
        writer.commit()
        writer.add(rows.keys(["5"]), ["5"], [0], [0], {"a:gap": small, "b:gap": small})
    assert len(said) == 1
    assert "a:gap" in said[0]
    assert "70000" in said[0]
    first, second = space.parts()
    assert {name: info.dtype for name, info in first.columns.items()} == {"a:gap": "<f4", "b:gap": "<f2"}
    assert second.columns["a:gap"].dtype == "<f4"
    stored = read_array(first, "features/a:gap")[:, 0]
    np.testing.assert_array_equal(stored, np.array([np.float16(0.1), 70000, 0.1, 70000], np.float32))
    assert space.columns()["a:gap"].dtype == "float32"


def test_values_that_float16_holds_do_not_widen(store, space, rows):
    said = []
    with space.writer(store.new_run_id(), on_overflow=said.append) as writer:
        writer.add(rows.keys(["1"]), ["1"], [0], [0], one([[65504, -65504, 1e-9, 0]]))
    assert said == []
    assert space.parts()[0].columns["a:gap"].dtype == "<f2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": ["a"]}, "differ in length"),
        ({"sizes": [1]}, "differ in length"),
        ({"keys": np.zeros((2, 16), np.uint8)}, r"\(n, 32\) uint8"),
        ({"features": one(np.zeros((3, 4)))}, "differ in length"),
        ({"features": one(np.zeros(2))}, r"\(n, D\) floats"),
        ({"features": {"a:gap": np.zeros((2, 3), int)}}, r"\(n, D\) floats"),
        ({"features": {"a/b": np.zeros((2, 3), np.float32)}}, "not a column name: 'a/b'"),
        ({"features": {}}, "no feature columns"),
        ({"ids": ["a", "b\0"]}, "NUL"),
        ({"ids": ["a", "\udcff"]}, "not valid text"),
    ],
)
def test_arguments_that_do_not_fit_are_named_and_nothing_is_kept(store, space, change, message):
    arguments = {
        "keys": np.zeros((2, 32), np.uint8),
        "ids": ["a", "b"],
        "sizes": [1, 2],
        "mtimes_ns": [1, 2],
        "features": one(np.zeros((2, 4))),
    }
    with space.writer(store.new_run_id()) as writer, pytest.raises(UsageError, match=message):
        writer.add(**(arguments | change))
    assert not space.part_paths()


def test_a_space_without_dtype_takes_no_rows(store):
    space = store.open_space({"dtype": "int8"}, backbone="n")
    with pytest.raises(UsageError, match="'int8'"):
        space.writer(store.new_run_id())


@pytest.mark.parametrize(
    ("code", "said"), [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "this user's quota is used up")]
)
def test_a_full_disk_is_said_and_leaves_nothing(store, space, rows, monkeypatch, code, said):
    real, written = os.pwrite, [0]

    def pwrite(descriptor, data, offset):
        if written[0] > 2000:
            raise OSError(code, os.strerror(code))
        written[0] += len(data)
        return real(descriptor, data, offset)

    before = rows.write(store, space, ["safe"])
    monkeypatch.setattr(commit.os, "pwrite", pwrite)
    with (
        pytest.raises(DiskFull, match=f"{said} .*committed before is safe"),
        space.writer(store.new_run_id()) as writer,
    ):
        rows.add(writer, [f"n{i}" for i in range(100)])
    monkeypatch.undo()
    assert [part.run_id for part in space.parts()] == [before]
    assert [path.name for path in (space.path / "parts").iterdir()] == [space.part_paths()[0].name]


def test_a_failed_commit_in_the_background_is_raised_once_then_refused(store, space, rows, monkeypatch):
    def fail(*args, **kwargs):
        raise DiskFull("no space")

    monkeypatch.setattr("featurepipe.store.writer.write_part", fail)
    writer = space.writer(store.new_run_id(), part_bytes=1)
    rows.add(writer, ["a"])
    for _ in range(200):
        if writer._failed:
            break
        time.sleep(0.01)
    with pytest.raises(DiskFull):
        rows.add(writer, ["b"])
    with pytest.raises(StoreError, match="takes no more"):
        rows.add(writer, ["c"])


def test_a_last_part_that_fails_in_the_background_is_raised_at_the_end(store, space, rows, monkeypatch):
    def fail(*args, **kwargs):
        raise DiskFull("no space")

    def until_failed():
        with space.writer(store.new_run_id(), part_bytes=1) as writer:
            rows.add(writer, ["a"])
            while not writer._failed:
                time.sleep(0.01)

    monkeypatch.setattr("featurepipe.store.writer.write_part", fail)
    with pytest.raises(DiskFull, match="no space"):
        until_failed()


def test_what_reads_back_differently_is_not_committed(store, space, rows, monkeypatch):
    """A disk that lies."""
    real = os.pwrite

    def pwrite(descriptor, data, offset):
        data = bytes(data)
        return real(descriptor, data if len(data) != 32 * 3 else b"\0" * 96, offset)

    monkeypatch.setattr(commit.os, "pwrite", pwrite)
    with pytest.raises(StoreError, match=r"did not read back.*key"):
        rows.write(store, space, ["1", "2", "3"])
    assert list((space.path / "parts").iterdir()) == []


def test_a_file_size_limit_is_a_full_disk(store, space, rows):
    """RLIMIT_FSIZE in a process of its own: a clear error, a clean store, and HDF5 exits without complaint."""
    rows.write(store, space, ["safe"])
    script = textwrap.dedent("""
        import resource, sys
        import numpy as np
        from featurepipe.errors import DiskFull
        from featurepipe.store import FeatureStore

        store = FeatureStore(sys.argv[1])
        (space,) = store.spaces()
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        try:
            with space.writer(store.new_run_id()) as writer:
                for i in range(40):
                    keys = np.full((100, 32), i, np.uint8)
                    writer.add(keys, [str(i)] * 100, [0] * 100, [0] * 100, {"a:gap": np.ones((100, 64), np.float32)})
        except DiskFull as error:
            print("full:", error)
        with space.writer(store.new_run_id()) as writer:  # small ones still fit
            writer.add(np.full((1, 32), 77, np.uint8), ["z"], [0], [0], {"a:gap": np.ones((1, 4), np.float32)})
    """)
    done = subprocess.run([sys.executable, "-c", script, str(store.path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("full: no file may become so large")
    assert "ulimit -f" in done.stdout
    assert "gc" not in done.stdout
    assert done.stderr == ""
    assert [part.rows for part in space.parts()] == [1, 1]
    assert len(list((space.path / "parts").iterdir())) == 2


def test_a_dataset_that_may_not_be_one_is_refused(store, space):
    with pytest.raises(UsageError, match="not a dataset name: 'a/b'"):
        space.writer(store.new_run_id(), dataset="a/b")
