"""Whatever stops a run, what was committed stands, and the next run completes the rest."""

import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featurepipe.backbones.engine import BATCH_TOLERANCE
from featurepipe.extraction.extract import extract
from featurepipe.store import FeatureStore, gc_store, verify_store

KILLS = int(os.environ.get("FEATUREPIPE_KILLS", "50"))
# Parts are committed after every few images, so that signals hit commits, too.
EXTRACT = """
    import sys
    from featurepipe.cli import main
    from featurepipe.extraction import compute

    compute.part_bytes = lambda worker: 1500
    sys.exit(main())
"""
SLOWLY = (
    """
    import time
    from featurepipe.images.folder import FolderSource

    read = FolderSource.read
    FolderSource.read = lambda self, locator: (time.sleep(0.02), read(self, locator))[1]
"""
    + EXTRACT
)
STUCK = (
    """
    import sys, time
    from featurepipe.images.folder import FolderSource

    def rest():
        for _ in range(600):  # a signal just before a sleep begins would be heard only after it
            time.sleep(0.1)

    def scan(self):
        print("scanning", file=sys.stderr, flush=True)
        rest()  # here

    FolderSource.scan = scan
"""
    + EXTRACT
)
DEAF = """
        try:
            rest()
        except BaseException:
            print("deaf", file=sys.stderr, flush=True)
            rest()
"""
FULL_DISK = (
    """
    import resource, signal
    resource.setrlimit(resource.RLIMIT_FSIZE, (BYTES, resource.RLIM_INFINITY))
"""
    + EXTRACT
)


@pytest.fixture
def command(album, run):
    """The arguments of one extraction."""

    def arguments(store=run.path, **options):
        options = {
            "store": store, "backbone": "lenet5", "weights": "none", "precision": "fp32", "dtype": "float32", "workers": 2,
            **options,
        }  # fmt: skip
        flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
        return ["extract", album.root, *flags, "--node", "c3", "--node", "bottleneck"]

    return arguments


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        if time.monotonic() > deadline:
            process.send(signal.SIGKILL)
            pytest.fail(f"nothing happened; {process.wait()}")
        time.sleep(0.005)


def cosines(a, b):
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def committed_rows(path):
    return sum(part.rows for space in FeatureStore(path).spaces() for part in space.parts())


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 8])
def test_kill_at_random_moments(album, launcher, command, run, tmp_path, batch_size):
    """A kill -9 each round; every store is completed in the end, and compared with one that nobody disturbed."""
    album.fill(96)
    for number in range(4):
        album.write(f"{20 * number + 5:03d}-bad.png", b"\x89PNG no more")
    options = {"batch_size": batch_size, "max_rejects": 4}
    started = time.perf_counter()
    assert launcher.start(EXTRACT, command(tmp_path / "calm", **options)).wait().code == 3
    duration = time.perf_counter() - started
    calm = {node: FeatureStore(tmp_path / "calm").features("album", node) for node in ("c3", "bottleneck")}
    assert len(run_parts(tmp_path / "calm")) >= 10
    rng = random.Random(batch_size)
    stores = kills_amid = partial = 0
    path, before = tmp_path / "killed-0", 0
    for number in range(KILLS):
        by_time = number < KILLS // 2
        if not by_time and partial >= KILLS // 20 and kills_amid >= KILLS // 8:
            break
        process = launcher.start(EXTRACT, command(path, **options))
        if by_time or before == 96:  # with all of them there no part comes any more
            time.sleep(rng.uniform(0.0, 1.1 * duration))
        else:  # on a machine that others slow down the time from before says little: a part more is there
            there = len(run_parts(path))
            wait_for(lambda path=path, there=there: len(run_parts(path)) > there, process)
        process.send(signal.SIGKILL)
        ended = process.wait()
        kills_amid += ended.code == -signal.SIGKILL
        store = FeatureStore(path)  # opens, or is made when the kill came before
        report = verify_store(store)
        assert report.clean, report.problems
        rows = committed_rows(path)
        assert rows >= before
        before = rows
        partial += 0 < rows < 96
        if store.datasets():  # completed before the kill: compare, and begin another
            compare(store, calm, batch_size)
            stores += 1
            path, before = tmp_path / f"killed-{stores}", 0
    finished = launcher.start(EXTRACT, [*command(path, **options), "--json"]).wait()
    assert finished.code == 3, finished.err
    counts = finished.json()["counts"]
    assert counts["computed"] == 96 - before
    compare(FeatureStore(path), calm, batch_size)
    assert kills_amid >= KILLS // 8
    assert partial >= KILLS // 20, "no kill came while parts were being committed"
    gc_store(FeatureStore(path))
    assert verify_store(FeatureStore(path)).leftovers == []


def run_parts(path):
    return list(path.glob("spaces/*/parts/*.h5"))


def compare(store, calm, batch_size):
    for node, expected in calm.items():
        found = store.features("album", node)
        assert found.ids.tolist() == expected.ids.tolist()
        np.testing.assert_array_equal(found.keys, expected.keys)
        if batch_size == 1:  # the composition of batches is the same whenever one is killed
            np.testing.assert_array_equal(found.read(), expected.read())
        else:
            assert (1 - cosines(found.read(), expected.read())).max() <= BATCH_TOLERANCE["fp32"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_commits_what_is_in_flight_and_the_next_run_goes_on(album, launcher, command, run, number, code):
    album.fill(120)
    process = launcher.start(SLOWLY, [*command(batch_size=4), "--json"])
    wait_for(lambda: run_parts(run.path), process)
    asked = time.perf_counter()
    process.send(number)
    ended = process.wait()
    assert time.perf_counter() - asked < 40
    assert ended.code == code, ended.err
    assert ended.out == ""
    assert "Traceback" not in ended.err
    assert f"stopped by {number.name}" in ended.err
    (record,) = run.store.runs()
    assert record["status"] == "interrupted"
    computed = record["counts"]["computed"]
    assert 0 < computed < 120
    assert committed_rows(run.path) == computed  # whole: nothing that was computed is lost
    assert f"{computed} images computed and committed, {120 - computed} left" in ended.err
    assert run.store.datasets() == []
    assert verify_store(run.store).clean
    again = launcher.start(EXTRACT, [*command(batch_size=4), "--json"]).wait()
    assert again.code == 0
    counts = again.json()["counts"]
    assert (counts["computed"], counts["known"], counts["read"]) == (120 - computed, computed, 120 - computed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_the_source_is_listed_ends_it_at_once(album, launcher, command, run, number, code):
    album.fill(3)
    process = launcher.start(STUCK, command())
    wait_for(lambda: "scanning" in process.err(), process)
    asked = time.perf_counter()
    process.send(number)
    ended = process.wait()
    assert time.perf_counter() - asked < 40
    assert ended.code == code
    assert f"stopped by {number.name} before the first image; nothing was changed" in ended.err
    assert "Traceback" not in ended.err
    assert run.store.runs() == []
    assert launcher.start(EXTRACT, command()).wait().code == 0


def test_a_second_ctrl_c_stops_at_once(album, launcher, command, run):
    """Even what does not care about the first."""
    album.fill(40)
    process = launcher.start(STUCK.replace("        rest()  # here\n", DEAF), command())
    wait_for(lambda: "scanning" in process.err(), process)
    process.send(signal.SIGINT)
    wait_for(lambda: "deaf" in process.err(), process)  # signals that nobody has seen yet become one
    process.send(signal.SIGINT)
    asked = time.perf_counter()
    ended = process.wait()
    assert time.perf_counter() - asked < 40
    assert ended.code == 130
    assert "Traceback" not in ended.err


def test_signals_are_as_before_after_a_run(album, run):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    album.fill(1)
    run(album.root)
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_run_outside_the_main_thread_works(album, run):
    from concurrent.futures import ThreadPoolExecutor

    album.fill(2)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, album.root).result()["counts"]["computed"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("limit", [100, 3_000])
def test_a_full_disk_is_said_and_leaves_a_clean_store(album, launcher, command, run, limit):
    """At 100 bytes not even the store's description fits, at 3,000 no part does."""
    album.fill(60)
    album.add("050-" + "n" * 200 + ".png", 500)
    ended = launcher.start(FULL_DISK.replace("BYTES", str(limit)), command(batch_size=4)).wait()
    assert ended.code == 1
    assert "no file may become so large while writing" in ended.err
    assert "Traceback" not in ended.err
    if limit > 100:  # standard error is a file here, too
        assert "ulimit -f" in ended.err
        assert len(ended.err.splitlines()) <= 7
        report = verify_store(run.store)
        assert report.clean, report.problems
        assert report.leftovers == []
        assert run.store.datasets() == []
    before = committed_rows(run.path)
    again = launcher.start(EXTRACT, [*command(batch_size=4), "--json"]).wait()
    assert again.code == 0, again.err
    assert again.json()["counts"]["computed"] == 61 - before
    assert len(run.store.features("album", "c3")) == 61


def test_a_full_disk_in_the_middle_keeps_what_was_committed(album, launcher, command, run):
    album.fill(40)
    album.add("030-" + "n" * 240 + ".png", 500)
    sizes = []
    launcher.start(EXTRACT, command(run.path.parent / "all", batch_size=4)).wait()
    sizes = sorted(path.stat().st_size for path in run_parts(run.path.parent / "all"))
    assert sizes[-1] > sizes[-2]  # the part with the long id
    limit = sizes[-1] - 1
    ended = launcher.start(FULL_DISK.replace("BYTES", str(limit)), command(batch_size=4)).wait()
    assert (ended.code, "no file may become so large" in ended.err) == (1, True)
    assert committed_rows(run.path) >= 8
    assert verify_store(run.store).clean
    again = launcher.start(EXTRACT, [*command(batch_size=4), "--json"]).wait()
    assert again.json()["counts"]["known"] >= 8
    assert len(run.store.features("album", "c3")) == 41


@pytest.mark.slow
@pytest.mark.parametrize("where", ["key", "id", "size", "mtime_ns", "features/c3:gap", "header"])
def test_a_flipped_bit_is_named_by_verify_and_repaired_by_the_next_run(album, launcher, command, run, cli, where):
    album.fill(40)
    assert launcher.start(EXTRACT, command(batch_size=4)).wait().code == 0
    before = {node: run.features(node=node) for node in ("c3", "bottleneck")}
    (space,) = run.store.spaces()
    part = space.parts()[3]
    offset = 3 if where == "header" else part.arrays[where].offset + 7
    part_id = Path(part.path).stem
    with open(part.path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))
    found = cli("verify", run.path)
    assert found.code == 1
    assert part_id in found.out
    record = run(album.root, nodes=["c3", "bottleneck"], dtype="float32", batch_size=4)
    assert record["counts"]["computed"] == part.rows
    assert cli("verify", run.path).code == 0
    after = {node: run.features(node=node) for node in ("c3", "bottleneck")}
    for node, stored in before.items():
        assert stored.keys() == after[node].keys()
        assert all(np.allclose(after[node][id_], values, rtol=1e-4, atol=1e-6) for id_, values in stored.items())


@pytest.mark.slow
def test_two_extracts_at_once_lose_nothing(album, launcher, command, run, tmp_path):
    """The same source twice under one name, and an overlapping one under another."""
    album.fill(80)
    album.write("bad.png", b"bad")
    other = tmp_path / "other"
    other.mkdir()
    for path in sorted(album.root.iterdir())[40:]:
        os.link(path, other / path.name)
    for number in range(10):
        (other / f"more{number}.png").write_bytes(album.add(f"../more/{number}.png", 900 + number).read_bytes())
    one = command(batch_size=4, max_rejects=1)
    two = [one[0], other, *one[2:]]
    processes = [launcher.start(SLOWLY, [*arguments, "--json"]) for arguments in (one, two, one)]
    ended = [process.wait() for process in processes]
    assert [finished.code for finished in ended] == [3, 3, 3], [finished.err for finished in ended]
    counts = [finished.json()["counts"] for finished in ended]
    assert [c["listed"] for c in counts] == [81, 51, 81]
    assert all(c["computed"] + c["known"] + c["rejected"] == c["listed"] for c in counts)
    assert committed_rows(run.path) == sum(c["computed"] for c in counts) > 90  # copies are there
    assert verify_store(run.store).clean
    views = {name: run.features(name, "c3") for name in ("album", "other")}
    assert (len(views["album"]), len(views["other"])) == (80, 50)
    launcher.start(EXTRACT, ["compact", run.path]).wait()
    assert committed_rows(run.path) == 90
    for name, stored in views.items():
        after = run.features(name, "c3")
        assert after.keys() == stored.keys()
        assert all(np.allclose(after[id_], values, atol=1e-6) for id_, values in stored.items())
    assert run(album.root, max_rejects=1, dtype="float32", nodes=["c3", "bottleneck"])["counts"]["computed"] == 0


def test_what_rewrites_the_store_waits_for_extract_to_end(album, launcher, command, run, cli):
    album.fill(150)
    process = launcher.start(SLOWLY, command(batch_size=4))
    wait_for(lambda: run_parts(run.path), process)
    for name in ("compact", "gc"):
        refused = cli(name, run.path)
        assert refused.code == 75
        assert "another process holds its lock" in refused.err
        assert json.dumps(process.pid) in refused.err
    assert cli("verify", run.path).code == 0  # reading is always possible
    assert process.wait().code == 0
    assert cli("compact", run.path).code == 0
    with run.store.lock(shared=False):
        assert launcher.start(EXTRACT, command()).wait().code == 75


@pytest.mark.parametrize("is_late", [False, True])
def test_a_kill_beside_the_snapshot_leaves_a_record_that_is_right(tmp_path, monkeypatch, is_late):
    """Just before the snapshot the run has not happened; just after it, it has, with all that it changed."""
    for number in range(3):
        Image.fromarray(np.full((32, 32, 3), 40 * number, np.uint8)).save(tmp_path / f"{number}.png")
    write = FeatureStore.write_snapshot

    class Killed(BaseException):
        """As sudden as a signal: no `except Exception` sees it."""

    def killed(self, *snapshot):
        if is_late:
            write(self, *snapshot)
        raise Killed

    monkeypatch.setattr(FeatureStore, "write_snapshot", killed)
    with pytest.raises(Killed):
        extract(tmp_path, tmp_path / "store", dataset="d", backbone="lenet5", weights="none", silent=True)
    (record,) = FeatureStore(tmp_path / "store").runs()
    if is_late:
        assert (record["status"], record["exit_code"], record["changes"]["new"]) == ("done", 0, 3)
    else:
        assert (record["status"], record["exit_code"], record["changes"]) == ("interrupted", None, None)
