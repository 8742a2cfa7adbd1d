"""Whether mirrored images pay in a tail that is tuned from cached activations, and what they cost.

``python -m benchmarks.bench_flips --images FOLDER --work DIR``

The images, in folders of their classes, are extracted as they are and mirrored, then the layers above a cut are tuned with and
without the mirrored activations, on the same images with the same seeds; the same test images measure both.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import featurepipe as fp
from benchmarks import record

SIDES = {"as they are": "none", "half of them mirrored": "flip"}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Extracts, tunes each seed both ways, and sums up."""
    if not args.tiny:
        return measured(args)
    with tempfile.TemporaryDirectory() as folder:
        small = {"images": Path(fp.__file__).parent / "data", "work": folder, "backbone": "lenet5", "weights": "none",
                 "cut": "s2", "seeds": 1, "epochs": 1}  # fmt: skip
        return measured(argparse.Namespace(**{**vars(args), **small}))


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy on test images for each seed, and what extraction and tuning took."""
    store = Path(args.work) / "store"
    asked = {"backbone": args.backbone, "weights": args.weights, "dataset": "images", "silent": True}
    extractions = {}
    for name, nodes, mirrored in (
        ("as they are", [f"{args.cut}:map", "bottleneck"], False),
        ("mirrored", [f"{args.cut}:map"], True),
    ):
        run_ = fp.extract(args.images, store, nodes=nodes, mirrored=mirrored, **asked)
        extractions[name] = {"seconds": run_["seconds"]["wall"], "computed": run_["counts"]["computed"]}
    found: dict[str, list[float]] = {name: [] for name in SIDES}
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for seed in range(args.seeds):
        for name, augment in SIDES.items():
            tuned = fp.finetune(store, from_node=args.cut, out=Path(args.work) / augment, augment=augment, seed=seed,
                                epochs=args.epochs, silent=True)  # fmt: skip
            history = tuned["tuning"]["runs"][0]["history"]
            found[name].append(tuned["test"]["accuracy"]["value"])
            seconds[name].append(history[-1]["seconds"] / (len(history) - 1))
            record.note(f"seed {seed}, {name}: {found[name][-1]:.4f}, mix {tuned['tuning']['mix']}")
    plain, flipped = found.values()
    gains = [round(b - a, 4) for a, b in zip(plain, flipped, strict=True)]
    return {
        "from": args.cut,
        "test_images": tuned["test"]["images"],
        "extractions": extractions,
        "accuracy": found,
        "seconds_an_epoch": {name: record.median(values) for name, values in seconds.items()},
        "gain": record.median(gains, 4),
        "gains": gains,
    }


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of this benchmark."""
    parser.add_argument("--images", help="a folder with folders of classes")
    parser.add_argument("--work", help="folder of the store and the bundles")
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--weights", default="DEFAULT")
    parser.add_argument("--from", dest="cut", default="blocks.10")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)


if __name__ == "__main__":
    record.main("bench_flips", __doc__ or "", add, run)
