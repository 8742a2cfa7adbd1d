"""What the process that gives out the work holds of a large source: an extraction by workers that only answer.

``python -m benchmarks.bench_scale``, everything in processes of their own. Nothing is read and nothing computed: a source lists
images that are not there; ``featurepipe.extract`` lists them, joins them with the last snapshot and the store's keys, cuts
shards, enters the answers, counts the changes, and writes the snapshot and the record. Each

- first: into an empty store, where all images are new, and
- later: into a store that has their features and their snapshot, with 1 image in 1,000 new and 1 in 5,000 gone.

Told are the most memory that the process had resident, and the most that belongs to no file and so cannot be given back; before
it began it had PyTorch and the network. Sizes of ``--in-memory`` are done with everything in memory as well, as small sources are
always; counts and bytes of the snapshot must be the same.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.alone import alone
from featurepipe.partitions import PARTITION_ROWS

IN_MEMORY, IN_PARTITIONS = "memory", "partitions"
PROMISED_MB = 2000
step = partial(alone, "benchmarks.scale_steps")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures each size."""
    if args.tiny:
        args.images, args.in_memory, args.partition = [3000, 6000], [3000, 6000], 500
    found: dict[str, dict[str, Any]] = {}
    for images in args.images:
        ways = [IN_PARTITIONS, *([IN_MEMORY] if images in args.in_memory else [])]
        with tempfile.TemporaryDirectory(dir=args.dir) as name:
            found[str(images)] = measure(Path(name), images, ways, args.partition)
    return {
        "sizes": found,
        "bytes_per_image": {way: slopes(found, way) for way in (IN_PARTITIONS, IN_MEMORY)},
        "promised": {"anonymous_peak_mb": f"<= {PROMISED_MB} at 100 million images"},
    }


def measure(folder: Path, images: int, ways: list[str], partition: int) -> dict[str, Any]:
    """Both runs of one size, each way; each into a copy of the store of its own, whose features are links."""
    record.note(f"a store of {images:,} images")
    built = step("build", folder, images)
    found: dict[str, Any] = {"made_in_s": built["seconds"]}
    for kind in ("first", "later"):
        told = {}
        for way in ways:
            store = folder / f"{kind}_{way}"
            if kind == "later":
                shutil.copytree(folder / "full", store, copy_function=_linked)
            one = step("extraction", store, images, kind, 0 if way == IN_MEMORY else partition)
            told[way] = one["answer"]["counts"], one["answer"]["changes"], digest(store)
            found.setdefault(kind, {})[way] = short(one)
            record.note(f"{kind}, {way}: {found[kind][way]}")
            shutil.rmtree(store)
        if len({str(each) for each in told.values()}) > 1:
            raise SystemExit(f"the ways differ: {told}")
        found[kind]["counts"], found[kind]["changes"], _ = told[ways[0]]
    return found


def _linked(source: str, target: str) -> None:
    if source.endswith(".h5"):
        Path(target).hardlink_to(source)
    else:
        shutil.copy2(source, target)


def digest(store: Path) -> str:
    """Of the last snapshot."""
    return hashlib.sha256(max(store.glob("snapshots/*/*.parquet")).read_bytes()).hexdigest()


def short(measured: dict[str, Any]) -> dict[str, Any]:
    """Seconds and memory."""
    answer = measured["answer"]
    memory = {name: answer[name] for name in ("anonymous_before_mb", "anonymous_peak_mb")}
    return {name: measured[name] for name in ("seconds", "idle_mb", "peak_mb")} | memory


def slopes(found: dict[str, dict[str, Any]], way: str) -> dict[str, float]:
    """Bytes that each further image takes at the peak, between the two largest sizes that were measured this way."""
    slope = {}
    for kind in ("first", "later"):
        peaks = [
            (int(images), each[kind][way]["anonymous_peak_mb"], each[kind][way]["peak_mb"])
            for images, each in found.items()
            if way in each[kind]
        ]
        if len(peaks) > 1:
            (few, least, seen), (many, most, later) = sorted(peaks)[-2:]
            slope[f"{kind}_anonymous"] = round(1e6 * (most - least) / (many - few), 1)
            slope[f"{kind}_resident"] = round(1e6 * (later - seen) / (many - few), 1)
    return slope


def add(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own arguments."""
    parser.add_argument("--images", type=int, nargs="+", default=[1_000_000, 5_000_000, 20_000_000])
    parser.add_argument("--in-memory", type=int, nargs="*", default=[1_000_000, 5_000_000], help="sizes done so, too")
    parser.add_argument("--partition", type=int, default=PARTITION_ROWS, help="rows of a partition")
    parser.add_argument("--dir", help="where to put everything, some 15 GB (default: the system's temporary folder)")


if __name__ == "__main__":
    record.main("bench_scale", __doc__ or "", add, run)
