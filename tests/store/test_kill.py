"""Writers that die, machines that lose power, and writers side by side."""

import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from featurepipe.store import FeatureStore, compact_store, gc_store, verify_store

WRITER = textwrap.dedent("""
    import hashlib, sys
    import numpy as np
    from featurepipe.store import FeatureStore

    store = FeatureStore(sys.argv[1])
    first, count = int(sys.argv[2]), int(sys.argv[3])
    space = store.open_space({"dtype": "float16"}, backbone="n")
    print("ready", flush=True)
    with store.lock(shared=True), space.writer(store.new_run_id(), part_bytes=20_000) as writer:
        for number in range(first, first + count):
            key = np.frombuffer(hashlib.sha256(str(number).encode()).digest(), np.uint8)[None]
            values = np.full((1, 256), number % 1000, np.float32)
            writer.add(key, [str(number)], [number], [number], {"a:gap": values})
        reject = {"key": None, "id": f"bad{first}", "size": 0, "mtime_ns": 0, "reason": "x: y", "run_id": "r"}
        space.add_rejects([reject])
""")


def start(path, first, count):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(first), str(count)], stdout=subprocess.PIPE, text=True
    )
    with process.stdout as output:
        assert output.readline() == "ready\n"
    return process


def parts_in(store):
    return len(list(store.rglob("*.h5")))


@pytest.mark.slow
def test_a_killed_writer_loses_only_the_part_in_flight(tmp_path, rows):
    rng = random.Random(0)
    committed = 0
    for round_number in range(6):
        process, held = start(tmp_path / "s", round_number * 10**6, 10**6), parts_in(tmp_path / "s")
        while round_number % 2 and parts_in(tmp_path / "s") == held:  # however slow the machine is: after a commit, too
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.25))
        process.send_signal(signal.SIGKILL)
        process.wait()
        store = FeatureStore(tmp_path / "s")
        (space,) = store.spaces()
        report = verify_store(store)
        assert report.clean, report.problems
        assert all(name.endswith(".h5.tmp") for name in report.leftovers)
        assert report.rows >= committed
        committed = report.rows
        for part in space.parts():
            column = part.columns["a:gap"]
            stored = np.fromfile(part.path, "<f2", 256 * part.rows, offset=column.offset).reshape(-1, 256)
            sizes = np.fromfile(part.path, "<i8", part.rows, offset=part.arrays["size"].offset)
            np.testing.assert_array_equal(stored, np.repeat(sizes[:, None] % 1000, 256, axis=1))
            keys = np.fromfile(part.path, np.uint8, 32 * part.rows, offset=part.arrays["key"].offset).reshape(-1, 32)
            np.testing.assert_array_equal(keys[:1], rows.keys([str(sizes[0])]))
    assert committed > 0
    gc_store(store)
    assert verify_store(store).leftovers == []


@pytest.mark.slow
def test_two_writers_at_once_lose_nothing(tmp_path, rows):
    processes = [start(tmp_path / "s", first, 1500) for first in (0, 1000)]
    assert [process.wait(60) for process in processes] == [0, 0]
    store = FeatureStore(tmp_path / "s")
    (space,) = store.spaces()
    assert verify_store(store).clean
    assert sum(part.rows for part in space.parts()) == 3000
    assert space.index(["a:gap"]).contains(rows.keys([str(i) for i in range(2500)])).all()
    assert sorted(space.rejects()["id"].to_pylist()) == ["bad0", "bad1000"]
    names = [str(i) for i in range(2500)]
    rows.snapshot(store, "d", names)
    np.testing.assert_array_equal(store.features("d", "a").read()[:, 7], np.arange(2500) % 1000)


@pytest.fixture
def events(monkeypatch):
    """What is synced, gets its name and is removed, in this order; temporary files without their random digits."""
    happened = []
    sync, names, link, unlink = os.fsync, Path.replace, os.link, Path.unlink

    def note(what, path):
        happened.append(f"{what} {re.sub(r'[.][0-9]+-[0-9a-f]+[.]tmp$', '.tmp', Path(path).name)}")

    def synced(descriptor):
        note("synced", Path(f"/proc/self/fd/{descriptor}").readlink())
        return sync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", lambda old, new: (note("named", new), names(old, new))[1])
    monkeypatch.setattr(os, "link", lambda old, new: (note("named", new), link(old, new))[1])
    monkeypatch.setattr(Path, "unlink", lambda path, **options: (note("removed", path), unlink(path, **options))[1])
    return happened


def test_what_is_committed_outlives_a_loss_of_power(store, space, rows, events):
    """On the disk before it has its name, whose folder is synced before anyone is told."""
    run_id = rows.write(store, space, ["a"], dataset="d")
    [part] = space.part_paths()
    assert events == [f"synced .{part.name}.tmp", f"named {part.name}", "synced parts"]
    rows.snapshot(store, "d", ["a"], run_id=run_id)
    del events[:]
    store.write_run({"run_id": run_id})
    kept = [event for event in events if not event.startswith("removed")]  # the temporary name of a linked file
    assert kept == [f"synced .{run_id}.json.tmp", f"named {run_id}.json", "synced runs"]
    del events[:]
    rows.snapshot(store, "d", ["a", "b"])
    name = f"{store.snapshot_ids('d')[-1]}.parquet"
    assert [event for event in events if not event.startswith("removed")] == [
        f"synced .{name}.tmp", f"named {name}", "synced d",
    ]  # fmt: skip
    reject = {"key": None, "id": "x", "size": 0, "mtime_ns": 0, "reason": "x: y", "run_id": run_id}
    del events[:]
    space.add_rejects([reject])
    space.add_rejects([reject])
    assert events == ["synced rejects.jsonl"] * 2


def test_parts_go_only_when_what_they_held_is_on_the_disk(store, space, rows, events):
    for name in ("a", "b"):
        rows.write(store, space, [name], dataset="d")
    old = space.part_paths()
    del events[:]
    compact_store(store)
    [new] = space.part_paths()
    assert events == [
        f"synced .{new.name}.tmp", f"named {new.name}", "synced parts",
        *(f"removed {path.name}" for path in old), "synced parts",
    ]  # fmt: skip
