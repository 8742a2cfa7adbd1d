"""What a night with little or nothing new costs, and whether memory grows with the number of images.

``python -m benchmarks.bench_rerun``

- rerun: ``featurepipe.extract`` over unchanged files beside a bare recursive ``os.scandir`` + ``stat`` of the same
  folder, in turn in one process; imports are paid before, and the whole command is timed as well.
- start: the whole command for 100 new images of a folder of 1,000, in a store that holds a million rows of other datasets in
  the same space: seconds, and processor seconds of the command. Afterwards the store must have all 1,000.
- memory: peak resident memory of ``extract`` in a process of its own, over few and over ten times as many new images.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import featurepipe as fp
from benchmarks import record
from featurepipe.store import FeatureStore

PEAK = """
import resource, sys
import featurepipe as fp
run = fp.extract(sys.argv[1], sys.argv[2], backbone="lenet5", weights="none", silent=True)
print(run["counts"]["computed"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures both."""
    files = 500 if args.tiny else args.files
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        rerun = measure_rerun(
            make_files(Path(folder) / "many", files, distinct=min(files, 1000)), Path(folder) / "store", args
        )
        start = measure_start(Path(folder), args)
        counts = (50, 200) if args.tiny else (2_000, 20_000)
        memory = {str(count): peak_memory(Path(folder), count) for count in counts}
    small, large = memory.values()
    return {
        "files": files,
        **rerun,
        **start,
        "peak_memory_mb": memory,
        "growth_mb": large - small,
        "promised": {"times_the_walk": "<= 5", "growth_mb": "<= 100", "start_s": "<= 6"},
    }


def make_files(folder: Path, count: int, *, distinct: int) -> Path:
    """Small PNG files in folders of 1,000, with ``distinct`` different contents."""
    rng = np.random.default_rng(0)
    source = folder.parent / "one.png"
    contents = []
    for _ in range(distinct):
        Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)).save(source)
        contents.append(source.read_bytes())
    for number in range(count):
        if number % 1000 == 0:
            inner = folder / f"class{number // 1000:03d}"
            inner.mkdir(parents=True)
        (inner / f"{number:07d}.png").write_bytes(contents[number % distinct])
    return folder


def measure_rerun(folder: Path, store: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Times the rerun and the bare walk in turn."""
    options = {"dataset": "bench", "backbone": "lenet5", "weights": "none", "silent": True}
    fp.extract(folder, store, **options)
    rounds = []
    for _ in range(1 if args.tiny else args.rounds):
        start = time.perf_counter()
        counted = walk(str(folder))
        walked = time.perf_counter()
        run_record = fp.extract(folder, store, **options)
        rounds.append({"walk_s": walked - start, "rerun_s": time.perf_counter() - walked})
        if run_record["counts"]["known"] != counted or run_record["counts"]["read"]:
            raise SystemExit(f"the rerun did more than nothing: {run_record['counts']}")
    command = [
        "extract",
        str(folder),
        "--store",
        str(store),
        "--dataset",
        "bench",
        "--backbone",
        "lenet5",
        "--weights",
        "none",
    ]
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "featurepipe", *command, "--quiet"], check=True, stdout=subprocess.DEVNULL)
    return {
        "walk_s": record.median([r["walk_s"] for r in rounds]),
        "rerun_s": record.median([r["rerun_s"] for r in rounds]),
        "times_the_walk": record.median([r["rerun_s"] / r["walk_s"] for r in rounds], 2),
        "whole_command_s": round(time.perf_counter() - start, 2),
        "rounds": rounds,
    }


def measure_start(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Times the command that computes 100 new images, once for each round, each in a store as it was before."""
    network = ["--backbone", "lenet5", "--weights", "none"] if args.tiny else ["--backbone", "efficientnet_lite0"]
    images = make_files(folder / "start", 1_000, distinct=1_000)
    new = sorted(images.rglob("*.png"))[900:]
    contents = [path.read_bytes() for path in new]
    for path in new:
        path.unlink()
    command = [sys.executable, "-m", "featurepipe", "extract", str(images), "--dataset", "start", *network, "--quiet"]
    subprocess.run([*command, "--store", str(folder / "large")], check=True, stdout=subprocess.DEVNULL)
    rows = 2_000 if args.tiny else args.start_rows
    fill(FeatureStore(folder / "large"), rows)
    for path, content in zip(new, contents, strict=True):
        path.write_bytes(content)
    rounds = []
    for number in range(1 if args.tiny else args.rounds):
        store = shutil.copytree(folder / "large", folder / f"large{number}", copy_function=os.link)
        before, start = os.times(), time.perf_counter()
        subprocess.run([*command, "--store", str(store)], check=True, stdout=subprocess.DEVNULL)
        seconds, after = time.perf_counter() - start, os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        rounds.append({"start_s": seconds, "start_cpu_s": cpu})
        counts = FeatureStore(store).runs()[-1]["counts"]
        if (counts["computed"], counts["known"]) != (100, 900):
            raise SystemExit(f"the command should have computed 100 of 1,000 images: {counts}")
        shutil.rmtree(store)
    found = {name: record.median([one[name] for one in rounds], 2) for name in ("start_s", "start_cpu_s")}
    return {"start_rows": rows, **found, "start_rounds": rounds}


def fill(store: FeatureStore, rows: int) -> None:
    """Gives the store's only space so many rows of another dataset, with keys of their own."""
    [space] = store.spaces()
    [column] = space.columns()
    width = space.columns()[column].width
    rng, batch = np.random.default_rng(1), np.ones((4096, width), np.float32)
    with space.writer(store.new_run_id(), dataset="others") as writer:
        for start in range(0, rows, len(batch)):
            count = min(len(batch), rows - start)
            ids = [f"{number // 1000:04d}/{number:08d}.jpg" for number in range(start, start + count)]
            keys, numbers = rng.integers(0, 256, (count, 32), dtype=np.uint8), np.arange(start, start + count)
            writer.add(keys, ids, numbers, numbers, {column: batch[:count]})


def walk(folder: str) -> int:
    """The bare way to see what changed: one stat per file."""
    count = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                count += walk(entry.path)
            else:
                entry.stat()
                count += 1
    return count


def peak_memory(folder: Path, count: int) -> int:
    """Peak resident memory in MB of an extraction of ``count`` new images."""
    images = make_files(folder / f"images{count}", count, distinct=count)
    command = [sys.executable, "-c", PEAK, str(images), str(folder / f"store{count}")]
    computed, peak = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    if computed != count:
        raise SystemExit(f"{computed} of {count} images were computed")
    return peak


def add(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own arguments."""
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--start-rows", type=int, default=1_000_000, help="of the store that 100 new images come to")
    parser.add_argument("--dir", help="where to put the files (default: the system's temporary folder)")
    parser.add_argument("--rounds", type=int, default=5)


if __name__ == "__main__":
    record.main("bench_rerun", __doc__ or "", add, run)
