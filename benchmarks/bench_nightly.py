"""What a night costs on a large pile, in a large store, and after hundreds of nights.

``python -m benchmarks.bench_nightly``, everything in processes of their own:

- night: a job over 1,000,000 sparse files of which none is new, beside a bare ``os.scandir`` + ``stat`` of the same files
  and beside the script that people write (``stat``, compared with the previous run's JSON), in turn. Imports are paid before, and
  the whole command is timed as well. The same pile as a manifest without sizes and times (one ``stat`` a row) and with
  them (none), and with the steps ``[compact]`` and ``[keep]``. The bytes that such a night adds to the store.
- rows: memory by rows: opening and indexing, a whole night (whose listing is in memory as well), and compaction, of the store
  of the first part and of one of 10,000,000 rows in parts of 16,384. Beside them a dictionary from key to row.
- nights: what a store of 400 nights and 2,000 parts is asked every day, beside the same images in one part after one night.

Features are 4 values wide and keys are random: what is measured does not depend on the values.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.alone import alone

VARIANTS = ("manifest", "with_steps")
step = partial(alone, "benchmarks.nightly_steps")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures all three."""
    files, rows, nights, parts = (
        (2_000, 8_000, 6, 40) if args.tiny else (args.files, args.rows, args.nights, args.parts)
    )
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        folder = Path(name)
        record.note(f"making {files:,} files, stores of as many and of {rows:,} rows, and one of {nights} nights")
        made = step("build", folder, files, rows, nights, parts)
        record.note(f"made in {made['seconds']:.0f} s")
        night = measure_night(folder, files, 1 if args.tiny else args.rounds)
        by_rows = measure_rows(folder, files, rows)
        daily = step("look", folder)["answer"]
    return {
        "made_in_s": made["seconds"],
        **night,
        **by_rows,
        "nights": nights,
        "parts": parts,
        "daily_s": daily,
        "promised": {
            "times_the_walk": "<= 5",
            "peak_mb": "<= 2000",
            "index_bytes_per_row": "<= 64",
            "compact_bytes_per_row": "<= 64",
        },
    }


def measure_night(folder: Path, files: int, rounds: int) -> dict[str, Any]:
    """Nights over files of which none is new."""
    pile, seen, job = folder / "pile", folder / "seen.json", folder / "files.toml"
    for act in (("walk", pile), ("script", pile, seen), ("night", job)):  # the caches are warm for all
        step(*act)
    before = occupied(folder / "files")
    found = []
    for number in range(rounds):
        record.note(f"round {number + 1} of {rounds}")
        found.append({"walk": step("walk", pile), "script": step("script", pile, seen), "night": quiet(job, files)})
    added = occupied(folder / "files") - before
    variants = {name: quiet(folder / f"{name}.toml", files) for name in VARIANTS}
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "featurepipe", "run", str(job)], check=True, capture_output=True)
    return {
        "files": files,
        "times_the_walk": record.median([one["night"]["seconds"] / one["walk"]["seconds"] for one in found], 2),
        "times_the_script": record.median([one["night"]["seconds"] / one["script"]["seconds"] for one in found], 2),
        "peak_mb": max(one["night"]["peak_mb"] for one in found),
        "script_peak_mb": max(one["script"]["peak_mb"] for one in found),
        "bytes_added_a_night": round(added / rounds),
        "whole_command_s": round(time.perf_counter() - start, 2),
        "variants": {name: short(one) for name, one in variants.items()},
        "rounds": [{name: short(one) for name, one in each.items()} for each in found],
    }


def quiet(job: Path, files: int) -> dict[str, Any]:
    """A night that must find every file known and read none."""
    found = step("night", job)
    if (found["answer"]["known"], found["answer"]["read"]) != (files, 0):
        raise SystemExit(f"the night did more than nothing: {found['answer']}")
    return found


def measure_rows(folder: Path, files: int, rows: int) -> dict[str, Any]:
    """Memory by rows, from what stores of two sizes take."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for name in ("index", "night", "compact"):
        record.note(f"{name} of {rows:,} rows")
        ending = ".toml" if name == "night" else ""
        found[name] = {
            n: step(name, folder / f"{of}{ending}") for n, of in ((files, "manifest_with_stats"), (rows, "large"))
        }
    dictionary = step("dictionary", files)
    return {
        "rows": rows,
        "parts_before_compaction": found["compact"][rows]["answer"]["parts_before"],
        **{f"{name}_bytes_per_row": slope(by_rows) for name, by_rows in found.items()},
        "dictionary_bytes_per_row": round(dictionary["growth_mb"] * 1e6 / files, 1),
        "by_rows": {name: {n: short(one) for n, one in by_rows.items()} for name, by_rows in found.items()},
    }


def slope(by_rows: dict[int, dict[str, Any]]) -> float:
    """Bytes of peak memory that each further row takes."""
    (few, small), (many, large) = by_rows.items()
    return round((large["growth_mb"] - small["growth_mb"]) * 1e6 / (many - few), 1)


def occupied(folder: Path) -> int:
    """Bytes of the files in a folder; one of several names counts once."""
    stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum({stat.st_ino: stat.st_size for stat in stats}.values())


def short(measured: dict[str, Any]) -> dict[str, Any]:
    """Seconds and memory."""
    return {name: measured[name] for name in ("seconds", "idle_mb", "peak_mb")}


def add(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own arguments."""
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--nights", type=int, default=400)
    parser.add_argument("--parts", type=int, default=2_000)
    parser.add_argument("--dir", help="where to put everything, some 6 GB (default: the system's temporary folder)")
    parser.add_argument("--rounds", type=int, default=3)


if __name__ == "__main__":
    record.main("bench_nightly", __doc__ or "", add, run)
