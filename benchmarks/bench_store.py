"""The store beside bare files: committing, reading everything, reading 512 random rows.

``python -m benchmarks.bench_store``

- commit: one part of 64 MB float16 features through ``PartWriter.commit`` (check-summed, synced, verified, renamed) beside
  one ``write`` + ``fsync`` of the same bytes, just before and just after. Handing over the rows (checking that they are
  finite, converting float32 to float16, copying) happens batch by batch while the network computes, and is timed apart.
- read all: ``FeatureSet.read(None)``, as stored, beside ``np.fromfile`` of the same bytes, both from the page cache; and
  ``FeatureSet.read()``, which gives float32, beside ``np.fromfile`` and ``astype``.
- random: ``FeatureSet.read(None, rows=...)`` of 512 rows beside fancy indexing of an ``np.memmap``.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks import record
from featurepipe.store import FeatureSet, FeatureStore, Space

WIDTH = 2048
FIELDS = {"architecture": "benchmark", "dtype": "float16"}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures in rounds, ours and the bare way in turn."""
    rows = 2_000 if args.tiny else 16_384
    rng = np.random.default_rng(0)
    features = rng.standard_normal((rows, WIDTH)).astype(np.float32)
    keys = rng.integers(0, 256, (rows, 32), dtype=np.uint8)
    rounds = []
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        for number in range(1 if args.tiny else args.rounds + 1):
            found = one_round(Path(folder) / str(number), features, keys, rng)
            if number or args.tiny:  # the first round warms the disk's and the allocator's caches
                rounds.append(found)
    ratios = {
        "commit_of_raw": [r["raw_write_s"] / r["commit_s"] for r in rounds],
        "read_all_of_fromfile": [r["fromfile_s"] / r["read_all_s"] for r in rounds],
        "read_as_float32_of_numpy": [r["fromfile_float32_s"] / r["read_float32_s"] for r in rounds],
        "random_rows_times_memmap": [r["random_rows_s"] / r["memmap_s"] for r in rounds],
    }
    return {
        "add_s": record.median([r["add_s"] for r in rounds]),
        "bytes": rows * WIDTH * 2,
        **{name: record.median(values) for name, values in ratios.items()},
        "promised": {
            "commit_of_raw": ">= 0.60",
            "read_all_of_fromfile": ">= 0.80",
            "read_as_float32_of_numpy": ">= 0.80",
            "random_rows_times_memmap": "<= 3",
        },
        "rounds": rounds,
    }


def one_round(folder: Path, features: np.ndarray, keys: np.ndarray, rng: np.random.Generator) -> dict[str, float]:
    """Seconds of each way."""
    store = FeatureStore(folder / "store")
    space = store.open_space(FIELDS, backbone="benchmark")
    raw = features.astype(np.float16)
    bare = folder / "bare.f16"
    before = timed(lambda: raw_write(bare, raw))
    added, committed = commit(store, space, features, keys)
    after = timed(lambda: raw_write(bare, raw))
    times = {"raw_write_s": (before + after) / 2, "add_s": added, "commit_s": committed}
    view = publish(store, keys)
    chosen = rng.choice(len(features), 512, replace=False)
    mapped = np.memmap(bare, np.float16, "r", shape=raw.shape)
    view.read(rows=chosen[:1])
    times["fromfile_s"] = best(lambda: np.fromfile(bare, np.float16))
    times["read_all_s"] = best(lambda: view.read(None))
    times["fromfile_float32_s"] = best(lambda: np.fromfile(bare, np.float16).astype(np.float32))
    times["read_float32_s"] = best(view.read)
    times["memmap_s"] = best(lambda: np.asarray(mapped[chosen]))
    times["random_rows_s"] = best(lambda: view.read(None, rows=chosen))
    if not np.array_equal(view.read(None), raw):
        raise SystemExit("the store returned other values than were written")
    return times


def raw_write(path: Path, values: np.ndarray) -> None:
    """The bare way to be sure that bytes are on the disk."""
    with path.open("wb", buffering=0) as file:
        file.write(values.data)
        os.fsync(file.fileno())


def commit(store: FeatureStore, space: Space, features: np.ndarray, keys: np.ndarray) -> tuple[float, float]:
    """Seconds of handing over float32 rows in batches of 256 (checked, converted, copied), and of committing them."""
    ids = [f"{number:08d}" for number in range(len(features))]
    stats = np.zeros(len(features), np.int64)
    with space.writer(store.new_run_id(), dataset="bench", part_bytes=1 << 40) as writer:
        start = time.perf_counter()
        for begin in range(0, len(features), 256):
            part = slice(begin, begin + 256)
            writer.add(keys[part], ids[part], stats[part], stats[part], {"node:gap": features[part]})
        added = time.perf_counter()
        writer.commit()
        return added - start, time.perf_counter() - added


def publish(store: FeatureStore, keys: np.ndarray) -> FeatureSet:
    """Writes the snapshot and opens the view."""
    count = len(keys)
    nothing = pa.nulls(count, pa.string())
    table = pa.table(
        {
            "id": [f"{number:08d}" for number in range(count)],
            "label": nothing,
            "split": nothing,
            "size": np.zeros(count, np.int64),
            "mtime_ns": np.zeros(count, np.int64),
            "key": pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), count, [None, pa.py_buffer(keys)]),
            "status": pa.repeat("ok", count),
            "reason": nothing,
        }
    )
    store.write_snapshot("bench", store.new_run_id(), table)
    return store.features("bench", node="node")


def timed(work: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def best(work: Callable[[], Any]) -> float:
    """The least seconds of five calls."""
    return min(timed(work) for _ in range(5))


def add(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own arguments."""
    parser.add_argument("--dir", help="a folder on the disk to measure (default: the system's temporary folder)")
    parser.add_argument("--rounds", type=int, default=7)


if __name__ == "__main__":
    record.main("bench_store", __doc__ or "", add, run)
