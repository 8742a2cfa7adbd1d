"""From JPEG files to committed features: the script that a user would write, our ceiling, and ours, interleaved in one run.

``python -m benchmarks.bench_extract --images DIR --backbone resnet50``

- *script*: DataLoader with two workers, ``weights.transforms()``, ``create_feature_extractor``, fp32, features to one
  array. Building the model is not counted.
- *ceiling*: our engine's forward alone, over batches that are in memory already.
- *ours*: the whole of ``featurepipe.extract`` into a fresh store: listing, choosing the precision, building the engine,
  reading, decoding, forward, committed parts, snapshot.

Each round runs the script over its share of the images, then ours over all of them between two measurements of the ceiling
(after it alone in the first round).

Then ``limits``: how much ours reaches of what the cores allow, cores / (processor time of decoding and resizing an image +
processor time of its forward), both measured alone in the same round; for several networks on the photos, and on photos of 12
megapixels.
``share_of_limit`` is of images per second, and means something on a quiet machine only; ``share_of_own_time`` is the part of
ours' own processor time that this decoding and forward would take, which others on the machine disturb little.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.models import get_model_weights
from torchvision.models.feature_extraction import create_feature_extractor

import featurepipe as fp
from benchmarks import record
from benchmarks.bench_decode import FULL, enlarged, ways
from benchmarks.photos import make_photos
from featurepipe.backbones import load_backbone
from featurepipe.backbones.engine import Engine, worst_cosine

LIMITS = ("resnet50", "efficientnet_lite0", "vgg16")
LARGE_MEGAPIXELS, LARGE_NETWORK = 12, "efficientnet_lite0"


class Photos(Dataset[torch.Tensor]):
    """Image files as a user's script reads them."""

    def __init__(self, paths: list[Path], transform: Any) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        transformed: torch.Tensor = self.transform(Image.open(self.paths[index]).convert("RGB"))
        return transformed


def script(module: torch.nn.Module, node: str, transform: Any, paths: list[Path]) -> tuple[np.ndarray, float]:
    """The usual script: features (N, D) in fp32, and the seconds they took."""
    network = create_feature_extractor(module, return_nodes={node: "features"})
    start = time.perf_counter()
    loader = DataLoader(Photos(paths, transform), batch_size=64, num_workers=2)
    with torch.inference_mode():
        found = [network(batch)["features"].flatten(1).numpy() for batch in loader]
    return np.concatenate(found), time.perf_counter() - start


def ceiling(engine: Engine, batch: torch.Tensor, batches: int) -> float:
    """Images per second of the forward alone."""
    engine(batch)
    start = time.perf_counter()
    for pending in [engine.submit(batch) for _ in range(batches)]:
        pending.result()
    return len(batch) * batches / (time.perf_counter() - start)


def ours(
    images: Path, backbone: str, weights: str, precision: str, **machine: Any
) -> tuple[Any, float, dict[str, Any]]:
    """Features by id, the seconds of the whole call, and the run record; ``machine``: device, workers and the like."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run = fp.extract(
            images,
            folder,
            dataset="bench",
            backbone=backbone,
            weights=weights,
            precision=precision,
            silent=True,
            **machine,
        )
        seconds = time.perf_counter() - start
        features = fp.FeatureStore(folder).features("bench")
        x, _ = features.numpy()
        return dict(zip(features.ids, x, strict=True)), seconds, run


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures, for each precision asked for."""
    with tempfile.TemporaryDirectory() as folder:
        images = Path(args.images) if args.images else make_photos(Path(folder), 24 if args.tiny else 2000)
        results = [measure(images, args, precision) for precision in args.precision]
        limits = [of_limit(images, name, args) for name in args.limits]
        if args.large:
            large = Path(folder) / "large"
            large.mkdir()
            chosen = sorted(images.glob("*.jpg"))[: args.large]
            for path, payload in zip(chosen, enlarged(chosen, LARGE_MEGAPIXELS, progressive=False), strict=True):
                (large / path.name).write_bytes(payload)
            limits.append({"megapixels": LARGE_MEGAPIXELS, **of_limit(large, LARGE_NETWORK, args)})
    return {"backbone": args.backbone, "weights": args.weights, "results": results, "limits": limits}


def of_limit(images: Path, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The share that ours reaches of what the cores allow for one network: medians over rounds."""
    paths = sorted(images.glob("*.jpg"))
    backbone = load_backbone(name, args.weights)
    decode = ways(backbone, ())[FULL]
    batch = torch.randint(0, 256, (16, *backbone.preprocessing.input_shape), dtype=torch.uint8)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    rounds: list[dict[str, float]] = []
    for _ in range(1 if args.tiny else args.rounds):
        before = time.process_time()
        _, whole, run_record = ours(images, name, args.weights, "auto")
        own = (time.process_time() - before) / len(paths)
        chosen, runs_on = run_record["settings"]["precision"]["value"], run_record["machine"]["engine"]
        engine = Engine(backbone, backbone.columns(["bottleneck"]), precision=chosen, engine=runs_on["engine"])
        forward = forward_seconds(engine, batch, 2 if args.tiny else 20)
        decoding = decode_seconds(decode, paths[:: max(1, len(paths) // 50)])
        limit = cores / (decoding + forward)
        rate = len(paths) / whole
        rounds.append({"decode": decoding, "forward": forward, "own": own, "limit": limit, "ours": rate})
        record.note(
            f"{name}, {len(paths)} images by {runs_on['engine']} {chosen}: limit {limit:.1f}, ours {rate:.1f} img/s, "
            f"{rate / limit:.2f} of it; {(decoding + forward) / own:.2f} of its own processor time"
        )
    return {
        "backbone": name,
        "images": len(paths),
        "cores": cores,
        "engine": runs_on,
        "precision": chosen,
        "decode_ms": record.median([1000 * r["decode"] for r in rounds], 2),
        "forward_ms": record.median([1000 * r["forward"] for r in rounds], 2),
        "own_ms": record.median([1000 * r["own"] for r in rounds], 2),
        "limit_img_s": record.median([r["limit"] for r in rounds], 1),
        "ours_img_s": record.median([r["ours"] for r in rounds], 1),
        "share_of_limit": record.median([r["ours"] / r["limit"] for r in rounds]),
        "share_of_own_time": record.median([(r["decode"] + r["forward"]) / r["own"] for r in rounds]),
        "rounds": rounds,
    }


def forward_seconds(engine: Engine, batch: torch.Tensor, batches: int) -> float:
    """Processor time of an image's forward alone."""
    engine(batch)
    start = time.process_time()
    for pending in [engine.submit(batch) for _ in range(batches)]:
        pending.result()
    return (time.process_time() - start) / (len(batch) * batches)


def decode_seconds(decode: Any, paths: list[Path]) -> float:
    """Processor time of decoding and resizing an image alone, in one thread, from memory."""
    payloads = [path.read_bytes() for path in paths]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = time.process_time()
    for payload in payloads:
        decode(payload)
    seconds = time.process_time() - start
    torch.set_num_threads(threads)
    return seconds / len(payloads)


def measure(images: Path, args: argparse.Namespace, precision: str) -> dict[str, Any]:
    """One precision: medians over rounds of rates and of ratios within a round."""
    paths = sorted(images.glob("*.jpg"))
    backbone = load_backbone(args.backbone, args.weights)
    transform = transform_of(args.backbone, backbone)
    rounds: list[dict[str, float]] = []
    worst, chosen, record_of_run = 1.0, "", {}
    count = 1 if args.tiny else args.rounds
    engine: Engine | None = None  # its precision is known after the first run
    batch = torch.randint(0, 256, (16, *backbone.preprocessing.input_shape), dtype=torch.uint8)
    for number in range(count):
        share = paths[number::count][: args.script_images or None]
        expected, seconds = script(backbone.module, backbone.bottleneck, transform, share)
        before = ceiling(engine, batch, 2 if args.tiny else 40) if engine else None
        features, whole, record_of_run = ours(images, args.backbone, args.weights, precision)
        chosen = record_of_run["settings"]["precision"]["value"]
        engine = engine or Engine(backbone, backbone.columns(["bottleneck"]), precision=chosen)
        after = ceiling(engine, batch, 2 if args.tiny else 40)
        top = after if before is None else (before + after) / 2
        found = np.stack([features[path.name] for path in share])
        worst = min(worst, worst_cosine(expected, found))
        rate, script_rate = len(paths) / whole, len(share) / seconds
        rounds.append({"script": script_rate, "ceiling": top, "ours": rate})
        record.note(
            f"{precision} round {number + 1}/{count}: script {script_rate:.1f}, ceiling {top:.1f}, ours {rate:.1f} img/s"
        )
    return {
        "asked": precision,
        "chosen": chosen,
        "why": record_of_run["settings"]["precision"]["why"],
        "images": len(paths),
        "script_img_s": record.median([r["script"] for r in rounds], 1),
        "ceiling_img_s": record.median([r["ceiling"] for r in rounds], 1),
        "ours_img_s": record.median([r["ours"] for r in rounds], 1),
        "times_the_script": record.median([r["ours"] / r["script"] for r in rounds], 2),
        "share_of_ceiling": record.median([r["ours"] / r["ceiling"] for r in rounds]),
        "worst_cosine": round(worst, 6),
        "seconds": record_of_run["seconds"],
        "verdict": record_of_run["verdict"],
        "rounds": rounds,
    }


def transform_of(name: str, backbone: Any) -> Any:
    """What a script applies: the preset of torchvision's weights, or its equivalent for other networks."""
    from torchvision.transforms import v2

    if backbone.architecture.startswith("torchvision/"):
        return get_model_weights(name).DEFAULT.transforms()
    p = backbone.preprocessing
    mode = v2.InterpolationMode(p.interpolation)
    steps = [v2.Resize(p.resize, mode), v2.CenterCrop(p.crop), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    return v2.Compose([*steps, v2.Normalize(p.mean, p.std)])


def add(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own arguments."""
    parser.add_argument("--images", help="folder of .jpg files (default: 2,000 photo-like JPEGs made for the run)")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument(
        "--weights", default="none", help="default: none, as speed does not depend on them and they need no download"
    )
    parser.add_argument("--precision", nargs="+", default=["auto", "fp32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--script-images",
        type=int,
        default=0,
        help="at most so many images per round for the script (default: all of its share)",
    )
    parser.add_argument(
        "--limits", nargs="*", default=LIMITS, metavar="NETWORK", help="networks whose share of the limit is measured"
    )
    parser.add_argument(
        "--large",
        type=int,
        default=200,
        metavar="N",
        help=f"so many photos of 12 megapixels, with {LARGE_NETWORK} (0: none)",
    )


if __name__ == "__main__":
    record.main("bench_extract", __doc__ or "", add, run)
