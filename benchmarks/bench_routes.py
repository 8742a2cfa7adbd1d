"""The table of routes on emoji, inside one drawing style and outside, and whether a distance foretells what tuning gains.

``python -m benchmarks.bench_routes --data FOLDER --work FOLDER`` with ``emoji/{google,apple}/CATEGORY/*.png`` (the packages
``emoji-datasource-google`` and ``-apple``) and ``fashion-mnist/*.gz`` (its four files) in the data folder.

- *table*: ``featurepipe routes`` from Google's drawings with 5, 20 and 100 images a class, tested on Google's drawings of other
  emoji and on Apple's of those; an emoji drawn for a man, a woman and a person is one group.
- *starts*: a tail tuned from an exact head (LP-FT) against one tuned at once, from a random head, with 20 and 100 of Google's
  drawings a class; the same test ideas as Google and as Apple drew them. Weights are not mixed, so that only the start differs.
- *distance*: eleven tasks, each in a store of its own: Fashion-MNIST, its negative, in random colours, and two classes of it;
  scikit-learn's digits and their negative; emoji of both styles, and of one in grey, blurred to 16 pixels, and inverted.
  For each, the distance of its images from the statistics that the network learned, the confidence of its own classes, and what
  a tuned tail has more than an exact head on the frozen bottleneck, on the same test images. The rank correlation between the
  distance and that gain says what the distance is worth.

Everything that was measured is kept in the work folder: the same command goes on after a stop. ``--tiny`` draws its own pictures.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from PIL import Image, ImageFilter, ImageOps

import featurepipe as fp
from benchmarks import record
from benchmarks.bench_targets import drawn, rows_of, write_manifest
from featurepipe.heads.statistics.comparison import rank_correlation

Pixels = npt.NDArray[np.uint8]
Pictures = Iterator[tuple[str, Image.Image]]
"""A class and an image each."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures all parts, or the one asked for."""
    if args.tiny:
        with tempfile.TemporaryDirectory() as made:
            return measured(args, drawn(Path(made) / "data" / "emoji").parent, Path(made) / "work")
    return measured(args, Path(args.data), Path(args.work))


def measured(args: argparse.Namespace, data: Path, work: Path) -> dict[str, Any]:
    """The table, the starts, then the tasks; with what other parts had given before."""
    settings = {part: settings_of(args) for part in PARTS if args.part in ("all", part)}
    before: dict[str, Any] = {}
    file = record.RESULTS / "bench_routes.json"
    if args.part != "all" and args.record and file.exists():
        before = {name: value for name, value in json.loads(file.read_text()).items() if name in (*GIVEN, "settings")}
    found = {**before, "backbone": args.backbone, "settings": {**before.get("settings", {}), **settings}}
    if args.part in ("all", "table"):
        found["table"] = table(args, data, work)
    if args.part in ("all", "starts"):
        found["starts"] = starts(args, data, work)
    if args.part in ("all", "distance"):
        found |= distance(args, data, work)
    return found


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What says how much is measured."""
    names = ("sizes", "seeds", "epochs", "rate", "images", "test_images", "cut")
    return {name: getattr(args, name) for name in names}


def table(args: argparse.Namespace, data: Path, work: Path) -> list[dict[str, Any]]:
    """Every route on Google's drawings, tested on those of other emoji and on Apple's."""
    work.mkdir(parents=True, exist_ok=True)
    manifests = [write_manifest(data / "emoji" / style, work / f"{style}.csv") for style in ("google", "apple")]
    answer = fp.routes(
        manifests[0], work / "table", test_source=manifests[1], backbone=args.backbone, weights=args.weights,
        sizes="5" if args.tiny else args.sizes, seeds=args.seeds, cuts=args.cut, epochs=args.epochs, rate=args.rate, group="idea",
        report=work / "table.html", extraction={"precision": "fp32"},
    )  # fmt: skip
    names = ("route", "size", "images", "tested_on", "accuracy", "low", "high", "seconds", "memory", "cells")
    return [{name: row[name] for name in names} for row in answer["results"]]


def starts(args: argparse.Namespace, data: Path, work: Path) -> list[dict[str, Any]]:
    """Accuracy inside and outside of tails that begin with an exact and with a random head, for each size."""
    folder = work / "starts"
    folder.mkdir(parents=True, exist_ok=True)
    rows = {style: list(rows_of(data / "emoji" / style)) for style in ("google", "apple")}
    ideas = sorted({row["idea"] for row in rows["google"]})
    mixed = np.random.default_rng(0).permutation(len(ideas))
    tested = {ideas[place] for place in mixed[: len(ideas) // 5]}
    tests = {style: [row for row in rows[style] if row["idea"] in tested] for style in rows}
    for style, of_style in tests.items():
        write_rows(of_style, folder / f"{style}.csv")
    found = []
    for size in (8, 10) if args.tiny else (20, 100):
        for seed in range(args.seeds):
            train = drawn_rows([row for row in rows["google"] if row["idea"] not in tested], size, seed)
            write_rows(train, folder / f"train-{size}-{seed}.csv")
            for start in ("exact", "random"):
                fp.finetune(
                    folder / f"train-{size}-{seed}.csv", folder / "store", dataset=f"{size}-{seed}", from_node=args.cut,
                    out=folder / f"{start}-{size}-{seed}", backbone=args.backbone, weights=args.weights, group="idea",
                    head_start=start, interpolate=False, epochs=args.epochs, rate=args.rate, seed=seed,
                    extraction={"precision": "fp32"}, if_changed=True, silent=True,
                )  # fmt: skip
                bundle = folder / f"{start}-{size}-{seed}"
                accuracy = {
                    place: accuracy_of(bundle, folder / f"{style}.csv", tests[style])
                    for place, style in (("inside", "google"), ("outside", "apple"))
                }
                found.append({"size": size, "seed": seed, "start": start, "images": len(train), **accuracy})
                record.note(str(found[-1]))
    return found


def drawn_rows(rows: list[dict[str, Any]], size: int, seed: int) -> list[dict[str, Any]]:
    """Up to so many rows of each class, whole ideas at a time in random order."""
    ideas = sorted({row["idea"] for row in rows})
    order = {ideas[place]: rank for rank, place in enumerate(np.random.default_rng(seed).permutation(len(ideas)))}
    kept: list[dict[str, Any]] = []
    counts: dict[str, int] = {}
    for row in sorted(rows, key=lambda row: order[row["idea"]]):
        counts[row["label"]] = counts.get(row["label"], 0) + 1
        if counts[row["label"]] <= size:
            kept.append({**row, "split": "train"})
    return kept


def write_rows(rows: list[dict[str, Any]], file: Path) -> None:
    """A manifest."""
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def accuracy_of(bundle: Path, manifest: Path, rows: list[dict[str, Any]]) -> float:
    """The share of a manifest's images that a bundle labels right."""
    file = manifest.with_suffix(".predicted.parquet")
    fp.predict(bundle, manifest, file, silent=True)
    said = pq.read_table(file, columns=["id", "label"]).to_pydict()
    truth = {row["id"]: row["label"] for row in rows}
    return float(np.mean([truth[name] == label for name, label in zip(said["id"], said["label"], strict=True)]))


def distance(args: argparse.Namespace, data: Path, work: Path) -> dict[str, Any]:
    """The distance of each task and what tuning gained there, and how they go together."""
    tasks = []
    for name, pictures in (TINY if args.tiny else TASKS).items():
        folder = work / "tasks" / name
        if not (folder / "done").exists():
            write(pictures(data), folder / "images", args.images)
            (folder / "done").touch()
        answer = fp.routes(
            folder / "images", folder / "store", dataset="task", backbone=args.backbone, weights=args.weights, cuts=args.cut,
            nodes=["bottleneck", f"{args.cut}:gap"], routes="bottleneck,tail", sizes="all", seeds=args.seeds, epochs=args.epochs,
            rate=args.rate, test_images=args.test_images, extraction={"precision": "fp32"},
        )  # fmt: skip
        reached = {row["route"].partition(" ")[0]: row["accuracy"] for row in answer["results"]}
        gain, wrong = reached["tail"] - reached["bottleneck"], 1 - reached["bottleneck"]
        alike = answer["similarity"]
        tasks.append({
            "task": name, "relative": alike.get("relative"), "distance": alike.get("distance"),
            "confidence": alike.get("confidence"), "classes": len(answer["classes"]), "images": answer["images"],
            **reached, "gain": gain, "error_removed": gain / wrong if wrong > 0 else None,
        })  # fmt: skip
        record.note(str(tasks[-1]))
    of = {name: [_number(task[name]) for task in tasks] for name in ("relative", "confidence", "gain", "error_removed")}
    return {
        "tasks": tasks,
        "rank_correlations": {
            f"{one} and {other}": rank_correlation(of[one], of[other])
            for one in ("relative", "confidence")
            for other in ("gain", "error_removed")
        },
    }


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)


def write(pictures: Pictures, folder: Path, images: int) -> None:
    """Writes up to so many images of each class into folders of their names; an image that is there stays."""
    counts: dict[str, int] = {}
    for label, image in pictures:
        counts[label] = counts.get(label, 0) + 1
        if counts[label] <= images:
            path = folder / label / f"{counts[label]:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)


def fashion(data: Path, change: Callable[[Pixels, int], Pixels] = lambda pixels, _: pixels, kept: int = 10) -> Pictures:
    """Fashion-MNIST's training images of its first classes, changed."""
    folder = data / "fashion-mnist"
    pixels = np.frombuffer(gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((folder / "train-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    for place, (image, label) in enumerate(zip(pixels.reshape(-1, 28, 28), labels, strict=True)):
        if label < kept:
            yield str(label), Image.fromarray(change(image, place))


def digits(change: Callable[[Pixels], Pixels] = lambda pixels: pixels) -> Pictures:
    """scikit-learn's digits, 8 x 8."""
    from sklearn.datasets import load_digits

    found = load_digits()
    for image, digit in zip(found.images, found.target, strict=True):
        yield str(digit), Image.fromarray(change((image * 15).astype(np.uint8)))


def emoji(data: Path, style: str, change: Callable[[Image.Image], Image.Image] = lambda image: image) -> Pictures:
    """Emoji of one style on white, changed."""
    for path in sorted((data / "emoji" / style).glob("*/*.png")):
        drawing = Image.open(path).convert("RGBA")
        white = Image.new("RGBA", drawing.size, (255, 255, 255, 255))
        white.alpha_composite(drawing)
        yield path.parent.name, change(white.convert("RGB"))


def coloured(pixels: Pixels, place: int) -> Pixels:
    """A grey image between two random colours."""
    dark, bright = np.random.default_rng(place).integers(0, 256, (2, 3))
    share = pixels[..., None] / 255
    return np.asarray(dark + share * (bright - dark)).round().astype(np.uint8)


def blurred(image: Image.Image) -> Image.Image:
    """An image with the detail of 16 pixels."""
    return image.resize((16, 16)).filter(ImageFilter.GaussianBlur(1)).resize(image.size)


TASKS: dict[str, Callable[[Path], Pictures]] = {
    "fashion": fashion,
    "fashion-negative": lambda data: fashion(data, lambda pixels, _: 255 - pixels),
    "fashion-coloured": lambda data: fashion(data, coloured),
    "fashion-two-classes": lambda data: fashion(data, kept=2),
    "digits": lambda _: digits(),
    "digits-negative": lambda _: digits(lambda pixels: 255 - pixels),
    "emoji-google": lambda data: emoji(data, "google"),
    "emoji-apple": lambda data: emoji(data, "apple"),
    "emoji-google-grey": lambda data: emoji(data, "google", ImageOps.grayscale),
    "emoji-google-blurred": lambda data: emoji(data, "google", blurred),
    "emoji-google-inverted": lambda data: emoji(data, "google", ImageOps.invert),
}
PARTS = ("table", "starts", "distance")
GIVEN = ("table", "starts", "tasks", "rank_correlations")
TINY = {"a": lambda data: emoji(data, "google"), "b": lambda data: emoji(data, "apple"), "digits": lambda _: digits()}


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("--data", default="data", help="see above (default: data)")
    parser.add_argument("--work", default="bench-routes", help="where everything is kept (default: bench-routes)")
    parser.add_argument("--part", default="all", choices=("all", *PARTS))
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--weights", default="DEFAULT")
    parser.add_argument("--cut", default="blocks.10", help="where tails begin (default: blocks.10)")
    parser.add_argument("--sizes", default="5,20,100,all", help="of the table, images a class (default: 5,20,100,all)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--images", type=int, default=100, help="of each class of a task (default: 100)")
    parser.add_argument("--test-images", type=int, default=None, help="of a task at most (default: a fifth of all)")


if __name__ == "__main__":
    record.main("bench_routes", str(__doc__), add, run)
