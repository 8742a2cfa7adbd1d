"""Look-alikes in a large store: exact, by the index that is kept beside it, and by faiss alone on the same rows.

``python -m benchmarks.bench_similar``

The store, 1,000,000 images of 1,280 values as float16 (2.5 GB), is written by its own interface. Its features are made up: 2,000
groups of different sizes, of which half of the variance lies between groups, and whose spread falls with the number of the axis
as one over its root. Nothing in the search depends on which axes those are.

- *first*: a process of its own that answers one query by an id of the store: all of ``featurepipe similar --id`` with the index
  (``index``) and without (``exact``), and a script that opens a flat float16 index of faiss from a file and searches it
  (``faiss``). In rounds of one of each, after one that is not counted; ``peak_mb`` is the resident memory at most, with pages
  of files.
- *following*: further queries in one process, where features and index stay open: median and 95th percentile of single queries.
  Processor seconds are told beside both: other work on the machine disturbs them less.
- *recall*: the share of the 10 nearest by comparing all that the index finds as well, for images that are not in the store.
- *build*, *extend*: making the index, and bringing it up to date with a snapshot that has 10,000 images more.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks import record
from benchmarks.alone import MB, ROOT, alone
from featurepipe.store import FeatureStore

FIELDS = {"architecture": "benchmark", "dtype": "float16"}
PROMISED = {"first_s": "< 2", "following_ms": "< 20"}
_GROUPS, _BETWEEN = 2000, 0.5
_AT_ONCE = 8192
_QUERIES = 200
COMMAND = """
import sys
from featurepipe.cli import main
code = main(sys.argv[1:])
status = open('/proc/self/status').read().splitlines()
print('PEAK', next(line for line in status if line.startswith('VmHWM')).split()[1], file=sys.stderr)
sys.exit(code)
"""
_FAISS = """
import sys
import faiss, numpy as np
index = faiss.read_index(sys.argv[1])
query = np.load(sys.argv[2])
print(index.search(query[:1], 11)[1][0, 1:].tolist())
status = open('/proc/self/status').read().splitlines()
print('PEAK', next(line for line in status if line.startswith('VmHWM')).split()[1], file=sys.stderr)
"""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures everything on one store."""
    rows, width, new = (3000, 64, 100) if args.tiny else (args.rows, args.width, args.new)
    rounds, queries = (1, 20) if args.tiny else (args.rounds, min(args.queries, _QUERIES))
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="bench-similar-") as temporary:
        folder = Path(args.keep or temporary)
        path, flat, asked = folder / "store", folder / "flat.faiss", folder / "query.npy"
        made = Features(rows + new + _QUERIES, width)  # the same features however many queries are asked
        before = prepared(folder, made, rows)
        if args.only_prepare:
            return before
        np.save(asked, made.read(0, 1))
        first = first_queries(path, flat, asked, rounds)
        np.save(asked, made.read(rows + new, rows + new + queries))
        following = {
            how: alone("benchmarks.bench_similar", "asking", path, how, few, rows)
            for how, few in (("always", queries), ("never", min(queries, args.exact)))
        }
        following["faiss"] = alone("benchmarks.bench_similar", "asking_faiss", flat, asked, min(queries, args.exact))
        load = list(os.getloadavg())
        recall = alone("benchmarks.bench_similar", "comparing", path, asked)
        write_store(path, made, rows, rows + new)
        extend = alone("benchmarks.bench_similar", "building", path)
        index_bytes = sum(file.stat().st_size for file in path.glob("indexes/*/*.npz"))
    return {
        "rows": rows, "width": width, **before,
        "first_s": {how: record.median([one["seconds"] for one in told]) for how, told in first.items()},
        "first_cpu_s": {how: record.median([one["cpu_seconds"] for one in told]) for how, told in first.items()},
        "first_peak_mb": {how: max(one["peak_mb"] for one in told) for how, told in first.items()},
        "following_ms": {name_of(how): told["answer"] for how, told in following.items()},
        "following_peak_mb": {name_of(how): told["peak_mb"] for how, told in following.items()},
        "recall": recall["answer"]["recall"], "recall_queries": recall["answer"]["queries"],
        "extend_by": new, "extend_s": extend["seconds"], "extend_peak_mb": extend["peak_mb"], "extend": extend["answer"],
        "index_mb": round(index_bytes / MB, 1), "promised": PROMISED, "load_of_queries": load,
        "rounds": first,
    }  # fmt: skip


def prepared(folder: Path, made: Features, rows: int) -> dict[str, Any]:
    """The store, faiss' own index and ours, and what making them took; from an earlier call where the folder was kept."""
    told = folder / "prepared.json"
    if told.exists():
        return dict(json.loads(told.read_text()))
    import faiss

    path = folder / "store"
    index = empty_flat(made.width)
    write_store(path, made, 0, rows, index)
    faiss.write_index(index, str(folder / "flat.faiss"))
    del index
    record.note(f"{rows:,} rows are written")
    build = alone("benchmarks.bench_similar", "building", path)
    record.note(f"the index was made in {build['seconds']} s")
    found = {"build_s": build["seconds"], "build_peak_mb": build["peak_mb"]}
    found |= {"build": build["answer"], "load_of_build": list(os.getloadavg())}
    told.write_text(json.dumps(found))
    return found


def name_of(how: str) -> str:
    """What a way of searching is called in the result."""
    return {"always": "index", "never": "exact"}.get(how, how)


class Features:
    """Made-up features of n images, any rows of which can be made at any time.

    Args:
        count: n.
        width: D.
    """

    def __init__(self, count: int, width: int) -> None:
        self.count, self.width = count, width
        rng = np.random.default_rng(0)
        self._spread = (1 + np.arange(width)) ** -0.5
        self._centres = rng.standard_normal((_GROUPS, width)).astype(np.float32) * (_BETWEEN**0.5 * self._spread)
        sizes = 1 / (20 + np.arange(_GROUPS))
        self.group = rng.choice(_GROUPS, count, p=sizes / sizes.sum())
        self.keys = rng.integers(0, 256, (count, 32), dtype=np.uint8)

    def read(self, start: int, stop: int) -> np.ndarray:
        """(m, D) float32 values, as they are after float16."""
        blocks = range(start // _AT_ONCE, -(-stop // _AT_ONCE))
        values = np.concatenate([self._block(number) for number in blocks])
        begin = start - blocks.start * _AT_ONCE
        return values[begin : begin + stop - start]

    def _block(self, number: int) -> np.ndarray:
        place = slice(number * _AT_ONCE, min((number + 1) * _AT_ONCE, self.count))
        own = np.random.default_rng([1, number]).standard_normal((_AT_ONCE, self.width), np.float32)
        own *= ((1 - _BETWEEN) ** 0.5 * self._spread).astype(np.float32)
        values = self._centres[self.group[place]] + own[: place.stop - place.start]
        return values.astype(np.float16).astype(np.float32)


def write_store(
    path: Path, made: Features, start: int, stop: int, flat: Any = None, labels: list[str] | None = None
) -> None:
    """Adds some rows, to an index of faiss as well, and a snapshot of all up to them, with labels if there are some."""
    store = FeatureStore(path)
    space = store.open_space(FIELDS, backbone="benchmark", notes={"aliases": {"bottleneck": "node"}})
    with space.writer(store.new_run_id(), dataset="bench") as writer:
        for begin in range(start, stop, _AT_ONCE):
            end = min(begin + _AT_ONCE, stop)
            stats = np.zeros(end - begin, np.int64)
            values = made.read(begin, end)
            writer.add(made.keys[begin:end], names(begin, end), stats, stats, {"node:gap": values})
            if flat is not None:
                flat.add(unit(values))
    nothing = pa.nulls(stop, pa.string())
    keys = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(32), stop, [None, pa.py_buffer(np.ascontiguousarray(made.keys[:stop]))]
    )
    zeros = np.zeros(stop, np.int64)
    label = nothing if labels is None else pa.array(labels, pa.string())
    columns = {"id": names(0, stop), "label": label, "split": nothing, "size": zeros, "mtime_ns": zeros, "key": keys}
    table = pa.table(columns | {"status": pa.repeat("ok", stop), "reason": nothing})
    store.write_snapshot("bench", store.new_run_id(), table)


def names(start: int, stop: int) -> list[str]:
    """Ids, as long as those of files in folders are."""
    return [f"images/{number // 1000:04d}/{number:08d}.jpg" for number in range(start, stop)]


def empty_flat(width: int) -> Any:
    """What somebody would search with faiss alone: all values as float16, of unit length."""
    import faiss

    index = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    index.train(np.zeros((1, width), np.float32))
    return index


def unit(values: np.ndarray) -> np.ndarray:
    """Rows divided by their lengths."""
    return np.ascontiguousarray(values / np.linalg.norm(values, axis=1, keepdims=True), np.float32)


def first_queries(path: Path, flat: Path, asked: Path, rounds: int) -> dict[str, list[dict[str, float]]]:
    """The first query of a process, in rounds of every way; the first round warms the disk's cache and is not counted."""
    ask = ["similar", str(path), "--id", names(0, 1)[0], "--quiet", "--json"]
    ways = {
        "index": [COMMAND, *ask, "--index", "always"],
        "exact": [COMMAND, *ask, "--index", "never"],
        "faiss": [_FAISS, str(flat), str(asked)],
    }
    told: dict[str, list[dict[str, float]]] = {how: [] for how in ways}
    for number in range(rounds + 1):
        for how, (code, *arguments) in ways.items():
            start, cpu = time.perf_counter(), children_cpu()
            ran = subprocess.run(
                [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
            )
            seconds, cpu = time.perf_counter() - start, children_cpu() - cpu
            if ran.returncode:
                raise SystemExit(f"{how} failed:\n{ran.stderr}")
            peak = next(line.split()[1] for line in ran.stderr.splitlines() if line.startswith("PEAK"))
            if number:
                resident = round(int(peak) * 1024 / MB)
                told[how].append({"seconds": round(seconds, 3), "cpu_seconds": round(cpu, 3), "peak_mb": resident})
        record.note(
            f"round {number}: " + ", ".join(f"{how} {one[-1]['seconds']} s" for how, one in told.items() if one)
        )
    return told


def children_cpu() -> float:
    """Processor seconds of the processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def building(path: str) -> Callable[[], Any]:
    """Makes the index, or brings it up to date."""
    from featurepipe import SimilarImages

    return lambda: repr(SimilarImages(path, index="always", silent=True))


def asking(path: str, how: str, queries: str, rows: str) -> Callable[[], Any]:
    """Single queries by id in one process: the first, which opens the store, and those that follow, in milliseconds."""
    from featurepipe import SimilarImages

    ids = [names(int(row), int(row) + 1)[0] for row in np.random.default_rng(2).integers(0, int(rows), int(queries))]

    def work() -> dict[str, float]:
        start = time.perf_counter()
        images = SimilarImages(path, index=how, silent=True)
        images.like(ids[0])
        first = time.perf_counter() - start
        return {"first": round(1000 * first, 1), **spread(partial(images.like, one) for one in ids[1:])}

    return work


def asking_faiss(flat: str, asked: str, queries: str) -> Callable[[], Any]:
    """The same with faiss alone."""
    import faiss

    vectors = unit(np.load(asked))[: int(queries)]

    def work() -> dict[str, float]:
        start = time.perf_counter()
        index = faiss.read_index(flat)
        index.search(vectors[:1], 10)
        first = time.perf_counter() - start
        further = (partial(index.search, vectors[place : place + 1], 10) for place in range(1, len(vectors)))
        return {"first": round(1000 * first, 1), **spread(further)}

    return work


def comparing(path: str, asked: str) -> Callable[[], Any]:
    """The recall of the index for new vectors."""
    from featurepipe import SimilarImages

    def work() -> dict[str, float]:
        vectors = np.load(asked)
        found, true = (
            SimilarImages(path, index=how, silent=True).like_vectors(vectors).to_pandas() for how in ("always", "never")
        )
        pairs = {*zip(true["query"], true["id"], strict=True)}
        return {
            "recall": round(len(pairs & {*zip(found["query"], found["id"], strict=True)}) / len(pairs), 4),
            "queries": len(vectors),
        }

    return work


def spread(queries: Iterator[Callable[[], Any]]) -> dict[str, float]:
    """Median and 95th percentile of calls in milliseconds, and the median of their processor time, which others disturb less."""
    values = []
    for ask in queries:
        cpu = time.process_time()
        seconds = timed(ask)
        values.append((1000 * seconds, 1000 * (time.process_time() - cpu)))
    wall, busy = np.array(values).T
    figures = {"median": np.median(wall), "p95": np.quantile(wall, 0.95), "cpu_median": np.median(busy)}
    return {name: round(float(value), 2) for name, value in figures.items()}


def timed(work: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def add(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own arguments."""
    parser.add_argument("--dir", help="a folder with 8 GB of space (default: the system's temporary folder)")
    parser.add_argument("--keep", help="a folder for store and index, which are taken from there the next time")
    parser.add_argument(
        "--only-prepare", action="store_true", help="make store and index in that folder, and measure no query"
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--new", type=int, default=10_000, help="images that the index is extended by")
    parser.add_argument("--queries", type=int, default=_QUERIES, help=f"at most {_QUERIES}")
    parser.add_argument("--exact", type=int, default=12, help="of these, queries that are compared with all one by one")
    parser.add_argument("--rounds", type=int, default=3)


if __name__ == "__main__":
    record.main("bench_similar", __doc__ or "", add, run)
