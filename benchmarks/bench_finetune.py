"""A tail tuned from cached activations: how good it is, how long it takes, and what a step costs beside the whole network's.

``python -m benchmarks.bench_finetune --store DIR --work DIR``

The store must hold a dataset with the splits train and test (Fashion-MNIST), and the activations of the cut; make it with

    featurepipe extract FOLDER --store DIR --dataset NAME --backbone efficientnet_lite0 --node blocks.10:map --node bottleneck

and the same with ``--mirrored`` for ``--augment flip``. Images of 28 x 28 say no less when they are enlarged to 112 pixels, at a
quarter of the work: ``--backbone benchmarks.networks:efficientnet_lite0_112 --trust-code`` in both.

1. *cost*: processor seconds of a step (forward, backward) on the tail, and on the whole network from images that are ready, in
   turns, so that other load hits both alike. Reading and decoding images would come on top of the second.
2. *choice*: each rate, for a few epochs on some of the training images; others of them choose.
3. *full*: the chosen rate on all training images but a tenth, which decides when to stop and what is mixed. The test images are
   looked at once, at its end.

Everything that is done is kept in ``--work``, also the checkpoints of a tuning that was stopped: the same command goes on.
Seconds and processor seconds add up over calls. What was made with other options stays: give each recipe a ``--work`` of its own.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import featurepipe as fp
from benchmarks import record
from featurepipe.backbones.tail import Tail, Trunk
from featurepipe.store import FeatureStore

RATES = (3e-4, 1e-3)
EPOCHS = 6
CHOICE = {"train": 10_000, "val": 5_000}
CHOICE_EPOCHS = 3
BATCH = 64
ROUNDS = 5
MOST_SHARE = 1 / 3
GOAL = 0.952


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Makes the steps that are not made yet, and sums them up."""
    if args.tiny:
        with tempfile.TemporaryDirectory() as folder:
            return steps(_tiny(args, Path(folder)))
    return steps(args)


def steps(args: argparse.Namespace) -> dict[str, Any]:
    """The three steps in turn."""
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    store = FeatureStore(args.store, create=False)
    cost = kept(work / "cost.json", lambda: cost_of_steps(args))
    subset = work / "subset.csv"
    if not subset.exists():
        write_subset(store, args, subset)
    rates = args.rate or list(RATES)
    choice = []
    for rate in rates if len(rates) > 1 else []:
        asked = {
            "labels": subset,
            "split_column": "split",
            "rate": rate,
            "epochs": args.choice_epochs,
            "interpolate": False,
        }
        found = kept(
            work / f"choice-{rate:g}.json", lambda asked=asked, rate=rate: tuned(store, args, f"b{rate:g}", asked)
        )
        choice.append({"rate": rate, "validation": max(entry["score"] for entry in found["history"][1:]), **found})
    best = max(choice, key=lambda tried: tried["validation"])["rate"] if choice else rates[0]
    full = kept(work / f"full-{best:g}.json", lambda: tuned(store, args, "full", {"rate": best, "epochs": args.epochs}))
    extraction = extracted(store, args)
    seconds = [found["seconds"] for found in (*choice, full, *([extraction] if extraction else []))]
    return {
        "backbone": args.backbone,
        "from": args.cut,
        "augment": args.augment,
        "mixup": args.mixup,
        "label_smoothing": args.label_smoothing,
        "cost": cost,
        "choice": choice,
        "rate": best,
        "full": full,
        "extraction": extraction,
        "seconds_in_all": round(sum(seconds), 1),
        "promised": {
            "test accuracy": f">= {GOAL}",
            "tail's share of a step": f"<= {MOST_SHARE:.2f}",
            "seconds": "<= 3600",
        },
    }


def kept(file: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a step gave; makes it where there is no file of it yet."""
    if not file.exists():
        found = work()
        file.write_text(json.dumps(found))
        record.note(f"{file.stem}: {json.dumps({k: v for k, v in found.items() if k != 'history'})}")
    kept_: dict[str, Any] = json.loads(file.read_text())
    return kept_


def cost_of_steps(args: argparse.Namespace) -> dict[str, Any]:
    """Processor milliseconds an image of a step, median of rounds, and the tail's share."""
    backbone = fp.load_backbone(args.backbone, args.weights)
    tail = Tail(backbone, args.cut)
    whole = Trunk(backbone)
    noise = torch.Generator().manual_seed(0)
    stored = torch.randn(args.batch, *tail.input_shape, generator=noise)
    images = torch.randint(0, 256, (args.batch, *whole.input_shape), generator=noise, dtype=torch.uint8)
    times: dict[str, list[float]] = {"tail": [], "whole network": []}
    for number in range(args.rounds + 1):
        for name, network, inputs in (("tail", tail, stored), ("whole network", whole, images)):
            start = time.process_time()
            network(inputs).square().mean().backward()
            took = 1000 * (time.process_time() - start) / args.batch
            network.zero_grad(set_to_none=True)
            times[name] += [took] if number else []  # the first round warms up
    found = {f"{name}, ms an image": record.median(values) for name, values in times.items()}
    share = record.median([a / b for a, b in zip(*times.values(), strict=True)])
    return {**found, "share": share, "rounds": args.rounds, "threads": torch.get_num_threads()}


def write_subset(store: FeatureStore, args: argparse.Namespace, file: Path) -> None:
    """Labels and splits of some training images."""
    features = store.features(args.dataset, split="train")
    order = np.random.default_rng(0).permutation(len(features))
    ids, labels = np.asarray(features.ids)[order], np.asarray(features.labels)[order]
    sides = [name for name, count in args.sizes.items() for _ in range(count)]
    with file.open("w", newline="") as target:
        writer = csv.writer(target)
        writer.writerow(["id", "label", "split"])
        writer.writerows(zip(ids, labels, sides, strict=False))


def tuned(store: FeatureStore, args: argparse.Namespace, name: str, asked: dict[str, Any]) -> dict[str, Any]:
    """A tuning, with its seconds over all calls that it took."""
    work = Path(args.work)
    clock = work / f"{name}.clock.json"
    before = json.loads(clock.read_text()) if clock.exists() else {"seconds": 0.0, "processor_seconds": 0.0}
    start, processor = time.perf_counter(), time.process_time()

    def spent() -> dict[str, float]:
        return {
            "seconds": round(before["seconds"] + time.perf_counter() - start, 1),
            "processor_seconds": round(before["processor_seconds"] + time.process_time() - processor, 1),
        }

    try:
        found = fp.finetune(
            store,
            dataset=args.dataset,
            from_node=args.cut,
            augment=args.augment,
            mixup=args.mixup,
            label_smoothing=args.label_smoothing,
            trust_code=args.trust_code,
            out=work / name,
            **asked,
        )
    finally:
        clock.write_text(json.dumps(spent()))
    tuning = found["tuning"]
    run_ = tuning["runs"][tuning["kept_run"]]
    test = found["test"]
    return {
        "images": found["counts"]["train"],
        "history": run_["history"],
        "ended": run_["ended"],
        "mixes": tuning["mixes"],
        "mix": tuning["mix"],
        "tested": tuning.get("tested"),
        **spent(),
        "test": None if test is None else {"images": test["images"], "accuracy": test["accuracy"]},
    }


def extracted(store: FeatureStore, args: argparse.Namespace) -> dict[str, Any] | None:
    """How long the activations took, with all columns that were computed beside them; None if no record tells."""
    runs = [one for one in store.runs() if one.get("dataset") == args.dataset and one.get("counts", {}).get("computed")]
    if not runs:
        return None
    seconds = sum(float(one["seconds"]["wall"]) for one in runs)
    return {"seconds": round(seconds, 1), "columns": sorted({name for one in runs for name in one["columns"]})}


def _tiny(args: argparse.Namespace, folder: Path) -> argparse.Namespace:
    images = Path(fp.__file__).parent / "data"
    columns = ["s2:map", "bottleneck"]
    fp.extract(
        images, folder / "store", dataset="clothes", backbone="lenet5", weights="none", nodes=columns, silent=True
    )
    small = {"train": 300, "val": 100}
    return argparse.Namespace(
        **{**vars(args), "store": folder / "store", "work": folder / "work", "dataset": "clothes", "cut": "s2", "sizes": small,
           "backbone": "lenet5", "weights": "none", "epochs": 1, "choice_epochs": 1, "rounds": 1, "batch": 8}
    )  # fmt: skip


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of this benchmark."""
    parser.add_argument("--store", help="a feature store with the activations")
    parser.add_argument("--dataset", default="fashion-mnist")
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--weights", default="DEFAULT")
    parser.add_argument("--from", dest="cut", default="blocks.10")
    parser.add_argument("--work", help="folder of what is done, and of the bundles")
    parser.add_argument("--trust-code", action="store_true", help="the backbone is a function of a module")
    parser.add_argument(
        "--augment", choices=["none", "flip"], default="none", help="flip: the store has mirrored activations, too"
    )
    parser.add_argument("--mixup", type=float, default=0.0, metavar="ALPHA")
    parser.add_argument("--label-smoothing", type=float, default=0.0, metavar="SHARE")
    parser.add_argument(
        "--rate", type=float, action="append", help="one, or several to choose from (default: 3e-4 and 1e-3)"
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--choice-epochs", type=int, default=CHOICE_EPOCHS)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.set_defaults(sizes=CHOICE)


if __name__ == "__main__":
    record.main("bench_finetune", __doc__ or "", add, run)
