"""What ``bench_nightly`` measures, each in a process of its own: set up here, work in what is returned."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Work = Callable[[], Any]
ASKED = 100_000


def walk(folder: str) -> Work:
    """The bare way to see what changed: one stat per file."""
    return lambda: sum(1 for _ in _stats(folder))


def script(folder: str, seen: str) -> Work:
    """The script that people write: compares each file's size and time with what it wrote down in the previous run."""

    def work() -> dict[str, int]:
        file = Path(seen)
        before = json.loads(file.read_text()) if file.exists() else {}
        now = {path: [stat.st_size, stat.st_mtime_ns] for path, stat in _stats(folder)}
        new = [path for path, stat in now.items() if before.get(path) != stat]
        file.write_text(json.dumps(now))
        return {"listed": len(now), "new": len(new)}

    return work


def _stats(folder: str) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _stats(entry.path)
            else:
                yield entry.path, entry.stat()


def night(job: str) -> Work:
    """A night of a job; what it imports, and the network, are loaded before."""
    import featurepipe as fp
    from featurepipe.extraction import extract, publish  # noqa: F401
    from featurepipe.images import folder, manifest  # noqa: F401

    fp.load_backbone("lenet5", "none")

    def work() -> dict[str, Any]:
        run = fp.run_job(job, silent=True)
        if run["status"] != "done":
            raise SystemExit(f"the night ended {run['status']}: {run['steps']}")
        return {**run["counts"], "steps": {step["step"]: step["status"] for step in run["steps"]}}

    return work


def index(store: str) -> Work:
    """Opening a store and finding keys in it."""
    from benchmarks.piles import COLUMN, random_keys
    from featurepipe import FeatureStore

    asked = random_keys(ASKED, seed=1)

    def work() -> dict[str, Any]:
        (space,) = FeatureStore(store).spaces()
        found = space.index([COLUMN])
        return {"rows": len(found), "held_mb": round(found.nbytes / 1e6, 1), "found": int(found.contains(asked).sum())}

    return work


def dictionary(rows: str) -> Work:
    """The index that people write: a dictionary from key to row."""
    from benchmarks.piles import random_keys

    keys = random_keys(int(rows))
    return lambda: len({key.tobytes(): row for row, key in enumerate(keys)})


def compact(store: str) -> Work:
    """Merging parts."""
    from featurepipe import FeatureStore
    from featurepipe.store import compact_store

    return lambda: vars(compact_store(FeatureStore(store)))


def look(folder: str) -> Work:
    """Everything that a store is asked every day; answers with the seconds of each, after one night and after many."""
    import time

    import featurepipe as fp
    from featurepipe.store import compact_store, describe, gc_store, verify_store

    def ask(store: Path) -> dict[str, float]:
        job = store.with_suffix(".toml")
        acts: dict[str, Callable[[], object]] = {
            "open": lambda: [space.columns() for space in fp.FeatureStore(store).spaces()],
            "plan": lambda: fp.run_job(job, dry_run=True, silent=True),
            "night": lambda: fp.run_job(job, silent=True),
            "info": lambda: describe(fp.FeatureStore(store)),
            "runs": lambda: fp.FeatureStore(store).runs(),
            "new_run_id": lambda: fp.FeatureStore(store).new_run_id(),
            "gc": lambda: gc_store(fp.FeatureStore(store), dry_run=True, keep_snapshots=30),
            "compact": lambda: compact_store(fp.FeatureStore(store), dry_run=True),
            "verify": lambda: verify_store(fp.FeatureStore(store)),
        }
        seconds = {}
        for name, act in acts.items():
            start = time.perf_counter()
            act()
            seconds[name] = round(time.perf_counter() - start, 3)
        return seconds

    ask(Path(folder) / "one_night")  # pays for imports
    return lambda: {name: ask(Path(folder) / name) for name in ("one_night", "many_nights")}


def build(folder: str, files: str, rows: str, nights: str, parts: str) -> Work:
    """Makes the piles and stores."""
    from benchmarks import piles

    return lambda: piles.build(Path(folder), int(files), int(rows), int(nights), int(parts))
