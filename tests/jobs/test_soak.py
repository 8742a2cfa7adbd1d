"""Thirty nights of a pile that changes, with everything that happens to machines at night.

Each night runs in a process of its own, forked from a server that has imported everything, so that a night takes a
fraction of a second and can be killed at any moment of it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import io
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image

import featurepipe as fp
from featurepipe.store import FeatureStore, gc_store, verify_store

NIGHTS = 30
LONGEST = 300.0
DATASET = "pile"
SECOND = 10**9

JOB = """
store = "store"
dataset = "pile"
[source]
path = "pile"
retries = 0
[[features]]
backbone = "lenet5"
weights = "none"
nodes = ["c1", "bottleneck"]
precision = "fp32"
dtype = "float32"
[machine]
workers = 2
[limits]
max_rejects = "90%"
max_gone = "90%"
[[train]]
out = "bundle"
head = "centroid"
calibration = false
min_class_size = 1
[[predict]]
bundle = "bundle"
to = "predictions.parquet"
images = "all"
[compact]
[keep]
snapshots = 3
runs = 1000
[metrics]
prometheus = "night.prom"
"""


@dataclass(frozen=True)
class File:
    """What one image file of the pile is: enough to tell what happened to it."""

    digest: str
    mtime_ns: int
    size: int
    label: str
    readable: bool


class Pile:
    """Image files in folders of classes, that change between nights."""

    def __init__(self, root: Path, rng: random.Random) -> None:
        self.root, self._rng, self._number, self._clock = root, rng, 0, 1_700_000_000 * SECOND
        for label in ("day", "night"):
            (root / label).mkdir(parents=True)

    def paths(self) -> list[Path]:
        """All files."""
        return sorted(self.root.rglob("*.png"))

    def write(self, path: Path, data: bytes) -> None:
        """Writes a file with a time stamp of its own, however fast the test is."""
        path.write_bytes(data)
        self._clock += SECOND
        os.utime(path, ns=(self._clock, self._clock))

    def picture(self) -> bytes:
        """A picture that no other call returns."""
        self._number += 1
        pixels = np.random.default_rng(self._number).integers(0, 256, (28, 28), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    def new_path(self) -> Path:
        self._number += 1
        return self.root / self._rng.choice(("day", "night")) / f"{self._number:05d}.png"

    def add(self) -> None:
        self.write(self.new_path(), self.picture())

    def change(self) -> None:
        self.write(self._rng.choice(self.paths()), self.picture())

    def move(self) -> None:
        self._rng.choice(self.paths()).rename(self.new_path())

    def copy(self) -> None:
        self.write(self.new_path(), self._rng.choice(self.paths()).read_bytes())

    def touch(self) -> None:
        path = self._rng.choice(self.paths())
        self.write(path, path.read_bytes())

    def delete(self) -> None:
        self._rng.choice(self.paths()).unlink()

    def corrupt(self) -> None:
        path = self._rng.choice(self.paths())
        self.write(path, path.read_bytes()[:-40])

    def repair(self) -> None:
        broken = [path for path, file in self.state().items() if not file.readable]
        if broken:
            self.write(self.root / self._rng.choice(broken), self.picture())

    def one_change(self) -> None:
        kinds: list[Callable[[], None]] = [self.add, self.change, self.move, self.copy, self.touch, self.delete]
        self._rng.choice([*kinds, self.add, self.corrupt, self.repair])()

    def state(self) -> dict[str, File]:
        """Every file by id."""
        found = {}
        for path in self.paths():
            data, stat = path.read_bytes(), path.stat()
            try:
                Image.open(io.BytesIO(data)).load()
                readable = True
            except (OSError, SyntaxError):
                readable = False
            digest = hashlib.sha256(data).hexdigest()
            found[str(path.relative_to(self.root))] = File(
                digest, stat.st_mtime_ns, stat.st_size, path.parent.name, readable
            )
        return found


def expected_changes(before: dict[str, File], now: dict[str, File]) -> Counter[str]:
    """What happened between two nights, file by file, by the rules of the run record."""
    counts = Counter(fate(before.get(name), file) for name, file in now.items() if name in before or not file.readable)
    left = set(before) - set(now)
    counts["deleted"] = len(left)
    arrived = Counter(file.digest for name, file in now.items() if name not in before and file.readable)
    for digest, times in arrived.items():
        were = {name for name, file in before.items() if file.digest == digest and file.readable}
        stayed = any(name in before and file.digest == digest for name, file in now.items()) or bool(were - left)
        moved = min(times, len(were & left))
        new = 0 if stayed or were else 1
        counts.update({"moved": moved, "new": new, "copied": times - moved - new})
        counts["deleted"] -= moved
    return counts


def fate(old: File | None, file: File) -> str:
    """What happened to a file that was there before, or that cannot be read."""
    if not file.readable:
        return "new_rejected" if old is None else "corrupted" if old.readable else "still_rejected"
    if old is None or not old.readable:
        return "repaired"
    if old.digest != file.digest:
        return "changed"
    return "unchanged" if old.mtime_ns == file.mtime_ns else "touched"


def a_night(job: Path, trouble: str, host: str) -> None:
    """Runs the job as the command line does, in trouble; the process ends with the command's exit code."""
    os.environ["OMP_NUM_THREADS"] = "1"
    faulthandler.dump_traceback_later(LONGEST, exit=True)  # a night that hangs says where
    if trouble == "full disk":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))

    class Past(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) - timedelta(days=3)

    clocks = [mock.patch(f"featurepipe.{name}.datetime", Past) for name in ("store.documents", "records")]
    with mock.patch("socket.gethostname", return_value=host):
        for clock in clocks if trouble == "clock" else ():
            clock.start()
        from featurepipe.cli import main

        os._exit(main(["run", str(job), "--quiet"]))


class Machines:
    """Where nights run."""

    def __init__(self, job: Path) -> None:
        self._job = job
        self.usual = 2.5
        """Seconds that the last undisturbed night took, so that a disturbed one is met at any moment of it."""
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            [
                "torch",
                "torchvision",
                "featurepipe.jobs.run",
                "featurepipe.extraction.extract",
                "featurepipe.training.train",
                "featurepipe.prediction.predict",
                "featurepipe.heads.bundle.bundle",
                "skops.io",
                "sklearn.neighbors",
                "prometheus_client",
            ]
        )

    def start(self, trouble: str = "", host: str = "one") -> Any:
        process = self._context.Process(target=a_night, args=(self._job, trouble, host))
        process.start()
        return process

    def undisturbed(self, trouble: str = "") -> int:
        begun = time.monotonic()
        process = self.start(trouble)
        process.join(LONGEST + 60)
        if not trouble:
            self.usual = time.monotonic() - begun
        return int(process.exitcode)


def newest(store: Path) -> str | None:
    """The snapshot that is current."""
    if not (store / "store.json").exists():
        return None
    return next(iter(reversed(FeatureStore(store).snapshot_ids(DATASET))), None)


TROUBLES = ["kill"] * 8 + ["term"] * 4 + ["full disk", "clock", "two hosts"] * 2


@pytest.mark.slow
def test_thirty_nights(tmp_path: Path) -> None:
    rng = random.Random(0)
    pile, store = Pile(tmp_path / "pile", rng), tmp_path / "store"
    job = tmp_path / "nightly.toml"
    job.write_text(JOB)
    machines = Machines(job)
    for _ in range(40):
        pile.add()
    nights = TROUBLES + [""] * (NIGHTS - 1 - len(TROUBLES))
    rng.shuffle(nights)
    snapshot, before = None, {}
    for trouble in [*nights, ""]:  # the last one in peace
        for _ in range(rng.randrange(12)):
            pile.one_change()
        codes = run_night(machines, trouble, rng)
        now = pile.state()
        if newest(store) != snapshot:
            snapshot = newest(store)
            record = next(run for run in FeatureStore(store).runs() if run["run_id"] == snapshot)
            assert record["counts"]["listed"] == len(now)
            assert {kind: count for kind, count in record["changes"].items() if count} == {
                kind: count for kind, count in expected_changes(before, now).items() if count
            }
            before = now
        else:
            assert 0 not in codes, "a night that ends well leaves a snapshot"
    assert_as_fresh(tmp_path, pile)
    assert_records_add_up(FeatureStore(store))


def run_night(machines: Machines, trouble: str, rng: random.Random) -> set[int]:
    """Runs one night, in trouble; returns the exit codes of its processes."""
    if trouble == "two hosts":
        both = [machines.start(host=host) for host in ("one", "two")]
        for process in both:
            process.join(LONGEST + 60)
        codes = {process.exitcode for process in both}
        assert codes <= {0, 3, 75}
        assert codes & {0, 3}
        return codes
    if trouble in ("kill", "term"):
        process = machines.start()
        time.sleep(rng.uniform(0, machines.usual))
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            os.kill(process.pid, signal.SIGKILL if trouble == "kill" else signal.SIGTERM)
        asked = time.monotonic()
        process.join(LONGEST + 60)
        if trouble == "term":
            assert time.monotonic() - asked < 30
            assert process.exitcode in (0, 3, 143, -signal.SIGTERM)  # the last: before it could catch signals
        return {process.exitcode}
    code = machines.undisturbed(trouble)
    assert code in ((0, 1, 3) if trouble == "full disk" else (0, 3)), f"{trouble or 'nothing'}: exit code {code}"
    return {code}


def assert_as_fresh(folder: Path, pile: Pile) -> None:
    """The store holds exactly what a fresh extraction of the final pile holds."""
    fresh = FeatureStore(folder / "fresh")
    fp.extract(
        folder / "pile", fresh, dataset=DATASET, backbone="lenet5", weights="none", nodes=["c1", "bottleneck"],
        precision="fp32", dtype="float32", max_rejects="90%", silent=True,
    )  # fmt: skip
    old = FeatureStore(folder / "store")
    told = ["id", "label", "split", "size", "mtime_ns", "key", "status"]
    assert old.snapshot(DATASET).select(told).sort_by("id") == fresh.snapshot(DATASET).select(told).sort_by("id")
    for node in ("c1", "bottleneck"):
        ours, theirs = (store.features(DATASET, node=node) for store in (old, fresh))
        assert list(ours.ids) == list(theirs.ids)
        np.testing.assert_allclose(ours.numpy()[0], theirs.numpy()[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(ours.numpy()[1], theirs.numpy()[1])
    assert verify_store(old).clean
    gc_store(old, keep_snapshots=1)
    [mine], [its] = old.spaces(), fresh.spaces()
    rows = [sum(part.rows for part in space.parts()) for space in (mine, its)]
    assert rows[0] == rows[1]  # nothing else is left, after what old snapshots needed has gone
    readable = {file.digest for file in pile.state().values() if file.readable}
    assert rows[0] == len(readable)
    shutil.rmtree(fresh.path)


def assert_records_add_up(store: FeatureStore) -> None:
    """Every record of an extraction that was done balances, and so does every night's."""
    done = [run for run in store.runs() if run["status"] == "done"]
    assert {run["command"] for run in done} >= {"extract", "run"}
    for run in done:
        counts, changes = run["counts"], run["changes"]
        assert counts["computed"] + counts["known"] + counts["rejected"] == counts["listed"]
        assert sum(count for kind, count in changes.items() if kind != "deleted") == counts["listed"]
