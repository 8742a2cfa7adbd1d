"""What it costs to keep every stage of a network instead of its deepest node alone; the promise: at most 1.15 times the time.

``python -m benchmarks.layer_depth --backbone efficientnet_lite0``

- *deepest*: ``featurepipe.extract`` of the bottleneck alone into a fresh store, whole: listing, building the engine, reading,
  decoding, forward, committed parts, snapshot.
- *stages*: the same call for the columns that ``featurepipe depth --node auto`` takes: every stage and the bottleneck, each
  pooled to at most ``--max-width`` values. One pass over the images serves all.
- *script*: what a user would write: for each node a ``create_feature_extractor``, and with it once through all images, by
  DataLoader with two workers and the weights' own transforms, in fp32.

After an uncounted run of both, each round times the two extractions next to each other, in alternating order, so that other
work on the machine falls on both alike. The ratio is that of the medians; ``cpu_ratio`` is the same of the processor seconds of
all threads, which other work disturbs less. The script runs once, over fewer images, as it is much slower.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import featurepipe as fp
from benchmarks import record
from benchmarks.bench_extract import script, transform_of
from benchmarks.photos import make_photos
from featurepipe.backbones import Backbone, load_backbone

PROMISE = 1.15
FACTS = ("precision", "images", "bytes_per_image", "stage_seconds")
"""What is told of the last extraction of each kind."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures one network, in each precision asked for."""
    with tempfile.TemporaryDirectory() as folder:
        count = 24 if args.tiny else args.count
        images = Path(args.images) if args.images else make_photos(Path(folder), count)
        backbone = load_backbone(args.backbone, args.weights)
        columns = stage_columns(backbone, args.max_width)
        results = [compare(images, columns, args, precision) for precision in args.precision]
        one_by_one = script_for_each_node(images, backbone, columns, args)
    return {
        "backbone": args.backbone,
        "weights": backbone.weights,
        "threads": torch.get_num_threads(),
        "promise": PROMISE,
        "columns": {str(column): backbone.feature_shape(column)[0] for column in columns},
        "results": [{**result, "times_the_script": _ratio(one_by_one, result)} for result in results],
        "script": one_by_one,
    }


def compare(images: Path, columns: list[Any], args: argparse.Namespace, precision: str) -> dict[str, Any]:
    """The deepest node alone against all stages, in rounds of one of each."""
    wanted = {"deepest": ["bottleneck"], "stages": [str(column) for column in columns]}
    seconds: dict[str, list[float]] = {name: [] for name in wanted}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in wanted}
    last: dict[str, dict[str, Any]] = {}
    for number in range(2 if args.tiny else args.rounds + 1):
        names = list(wanted) if number % 2 else list(reversed(wanted))
        timed = {name: extraction(images, wanted[name], args, precision) for name in names}
        if number == 0:
            continue  # what is loaded and allocated once per process
        for name, found in timed.items():
            seconds[name].append(found["seconds"])
            cpu_seconds[name].append(found["cpu_seconds"])
        last = timed
        record.note(
            f"{precision} round {number}: "
            + ", ".join(f"{n} {timed[n]['seconds']:.2f} s ({timed[n]['cpu_seconds']:.2f} s of CPU)" for n in wanted)
        )
    medians = {name: record.median(values) for name, values in seconds.items()}
    cpu = {name: record.median(values) for name, values in cpu_seconds.items()}
    return {
        "asked": precision,
        **{f"{name}_seconds": medians[name] for name in wanted},
        "ratio": round(medians["stages"] / medians["deepest"], 3),
        "cpu_ratio": round(cpu["stages"] / cpu["deepest"], 3),
        "ratio_of_each_round": [round(b / a, 3) for a, b in zip(seconds["deepest"], seconds["stages"], strict=True)],
        **{name: {fact: last[name][fact] for fact in FACTS} for name in wanted},
        "rounds": {"seconds": seconds, "cpu_seconds": cpu_seconds},
    }


def extraction(images: Path, nodes: list[str], args: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Seconds of one extraction into a fresh store, what was chosen, where the time went, and the bytes committed."""
    with tempfile.TemporaryDirectory() as folder:
        start, cpu_start = time.perf_counter(), time.process_time()
        done = fp.extract(
            images, folder, dataset="bench", backbone=args.backbone, weights=args.weights, nodes=nodes,
            precision=precision, silent=True,
        )  # fmt: skip
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        written = sum(part.stat().st_size for part in Path(folder).glob("spaces/*/parts/*.h5"))
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "precision": done["settings"]["precision"]["value"],
        "images": done["counts"]["computed"],
        "bytes_per_image": round(written / done["counts"]["computed"]),
        "stage_seconds": done["seconds"],
    }


def script_for_each_node(
    images: Path, backbone: Backbone, columns: list[Any], args: argparse.Namespace
) -> dict[str, Any]:
    """The usual script once per node, over some of the images, and what that makes for one image."""
    paths = sorted(images.glob("*.jpg"))[: 8 if args.tiny else args.script_images]
    nodes = list(dict.fromkeys(column.node for column in columns))
    transform = transform_of(args.backbone, backbone)
    seconds = {}
    for node in nodes:
        _, seconds[node] = script(backbone.module, node, transform, paths)
        record.note(f"script, {node}: {seconds[node]:.2f} s for {len(paths)} images")
    return {
        "images": len(paths),
        "passes": len(nodes),
        "seconds_per_image": round(sum(seconds.values()) / len(paths), 5),
        "seconds": {node: round(value, 3) for node, value in seconds.items()},
    }


def _ratio(one_by_one: dict[str, Any], result: dict[str, Any]) -> float:
    ours = result["stages_seconds"] / result["stages"]["images"]
    return round(one_by_one["seconds_per_image"] / ours, 1)


def stage_columns(backbone: Backbone, max_width: int) -> list[Any]:
    """What ``featurepipe depth --node auto`` keeps: every stage, each pooled to at most ``max_width`` values."""
    from featurepipe.backbones.stages import bounded_pooling

    names = backbone.stages()
    return backbone.columns([f"{name}:{bounded_pooling(backbone.node(name), max_width)}" for name in names])


def add(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own arguments."""
    parser.add_argument("--images", help="folder of .jpg files (default: photo-like JPEGs made for the run)")
    parser.add_argument("--count", type=int, default=300, help="how many JPEGs to make (default: 300)")
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--weights", default="DEFAULT", help="none for networks whose weights are not at hand")
    parser.add_argument("--precision", nargs="+", default=["fp32", "auto"])
    parser.add_argument("--max-width", type=int, default=9000, help="values per image of one stage (default: 9000)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--script-images", type=int, default=64, help="images that the script takes per node (default: 64)"
    )


if __name__ == "__main__":
    record.main("layer_depth", __doc__ or "", add, run)
