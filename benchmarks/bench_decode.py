"""Decoding JPEGs of 1 to 50 megapixels in full and scaled: processor time, and what scaling does to features and accuracy.

``python -m benchmarks.bench_decode --labelled DIR``

- *time*: processor time of decoding and resizing one photo for the network, in one thread; the ways of decoding take turns on
  each photo, and ratios are taken photo by photo. Processor time counts what this process computes, whatever else the machine
  does.
- *features*: cosines between the network's features of a photo decoded in full and scaled.
- *accuracy*: with ``--labelled``, a folder with a sub-folder for each class: a logistic head on features of images decoded in
  full, half of them to train on, tested on the other half in each way of decoding; and a head trained and tested on scaled ones.

Photos are noisy crops of scikit-learn's two photographs (or of ``--photos``), enlarged, with noise of a sensor at the large size,
so that there are frequencies for scaling to leave out. One half of the files is progressive.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks import record
from benchmarks.photos import make_photos
from featurepipe.backbones import Backbone, load_backbone
from featurepipe.backbones.engine import Engine
from featurepipe.images.decode import decode
from featurepipe.images.scaling import Scaling, parse_route

FULL = "cpu"


def ways(backbone: Backbone, routes: Sequence[str]) -> dict[str, Callable[[bytes], torch.Tensor]]:
    """For each decode route what extraction does with the bytes of a JPEG: the pixels for the network, uint8 (C, h, w)."""
    preprocessing = backbone.preprocessing

    def way(route: str) -> Callable[[bytes], torch.Tensor]:
        scaling = Scaling.of(route, preprocessing.resize)
        return lambda payload: preprocessing.resize_crop(decode(payload, colour=preprocessing.colour, scaling=scaling))

    return {route: way(route) for route in (FULL, *routes)}


def enlarged(paths: Sequence[Path], megapixels: float, *, progressive: bool) -> Iterator[bytes]:
    """JPEGs of so many pixels, quality 90."""
    for seed, path in enumerate(paths):
        with Image.open(path) as image:
            factor = (megapixels * 1e6 / (image.width * image.height)) ** 0.5
            size = round(image.width * factor), round(image.height * factor)
            large = np.asarray(image.convert("RGBA").convert("RGB").resize(size, Image.Resampling.BICUBIC))
        grain = np.random.default_rng(seed).integers(-8, 9, large.shape[:2], np.int16)[..., None]
        noisy = (large + grain).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "JPEG", quality=90, progressive=progressive)
        yield buffer.getvalue()


def compared(
    paths: Sequence[Path], megapixels: float, engine: Engine, routes: Sequence[str], rounds: int, *, progressive: bool
) -> dict[str, Any]:
    """Times and cosines of photos of one size and kind, by decode route."""
    found = ways(engine.backbone, routes)
    seconds: dict[str, list[float]] = {route: [] for route in found}
    pixels: dict[str, list[torch.Tensor]] = {route: [] for route in found}
    sizes = []
    for payload in enlarged(paths, megapixels, progressive=progressive):
        sizes.append(len(payload))
        for number in range(rounds):
            for route, way in found.items():
                start = time.process_time()
                image = way(payload)
                seconds[route].append(time.process_time() - start)
                if number == 0:
                    pixels[route].append(image)
    features = {route: _bottleneck(engine, torch.stack(images)) for route, images in pixels.items()}
    result: dict[str, Any] = {
        "megapixels": megapixels,
        "progressive": progressive,
        "photos": len(sizes),
        "mean_bytes": round(sum(sizes) / len(sizes)),
        "full_ms": record.median([1000 * value for value in seconds[FULL]], 2),
    }
    for route in routes:
        cosines = _cosines(features[FULL], features[route])
        result[route] = {
            "times_faster": record.median([a / b for a, b in zip(seconds[FULL], seconds[route], strict=True)], 2),
            "worst_cosine": round(float(cosines.min()), 6),
            "median_cosine": round(float(np.median(cosines)), 6),
            "same_pixels": bool(torch.equal(torch.stack(pixels[FULL]), torch.stack(pixels[route]))),
        }
    record.note(f"{megapixels:g} megapixels{', progressive' if progressive else ''}: {result}")
    return result


def accuracy(folder: Path, megapixels: float, engine: Engine, routes: Sequence[str], most: int) -> dict[str, Any]:
    """Accuracy of a logistic head, by the decode route of the images that it is tested on."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in {".png", ".jpg"})
    chosen = np.random.default_rng(0).permutation(len(paths))[:most]
    labels = np.array([paths[place].parent.name for place in chosen])
    found = ways(engine.backbone, routes)
    pixels: dict[str, list[torch.Tensor]] = {route: [] for route in found}
    for payload in enlarged([paths[place] for place in chosen], megapixels, progressive=False):
        for route, way in found.items():
            pixels[route].append(way(payload))
    features = {route: _bottleneck(engine, torch.stack(images)) for route, images in pixels.items()}
    half = len(labels) // 2
    heads = {
        route: make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(x[:half], labels[:half])
        for route, x in features.items()
    }
    answers = {route: heads[FULL].predict(x[half:]) for route, x in features.items()}
    own = {route: heads[route].predict(x[half:]) for route, x in features.items()}
    return {
        "images": len(labels),
        "classes": len(set(labels)),
        "megapixels": megapixels,
        "trained_on_full_tested_on": {
            route: round(float(np.mean(a == labels[half:])), 4) for route, a in answers.items()
        },
        "trained_and_tested_on": {route: round(float(np.mean(a == labels[half:])), 4) for route, a in own.items()},
        "same_answer_as_full": {route: round(float(np.mean(a == answers[FULL])), 4) for route, a in answers.items()},
    }


def _bottleneck(engine: Engine, images: torch.Tensor) -> np.ndarray:
    (features,) = engine(images).values()
    return features


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    products = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a.astype(np.float64) * b).sum(1) / products


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures each size, baseline and progressive."""
    torch.set_num_threads(1)
    backbone = load_backbone(args.backbone, args.weights)
    engine = Engine(backbone, backbone.columns(["bottleneck"]))
    routes = [parse_route(route)[0] for route in args.routes]
    sizes = [0.2, 0.4] if args.tiny else args.megapixels
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(args.photos) if args.photos else make_photos(Path(folder), 4 if args.tiny else args.count)
        paths = sorted(photos.glob("*.jpg"))[: 2 if args.tiny else args.count]
        results = [
            compared(paths[number::2], size, engine, routes, 1 if args.tiny else args.rounds, progressive=bool(number))
            for size in sizes
            for number in (0, 1)
        ]
    labelled = (
        accuracy(Path(args.labelled), args.labelled_megapixels, engine, routes, args.most) if args.labelled else None
    )
    return {
        "backbone": args.backbone,
        "weights": args.weights,
        "resize": backbone.preprocessing.resize,
        "time": "processor time of one thread, decoding and resizing; ratios photo by photo, interleaved",
        "results": results,
        "accuracy": labelled,
    }


def add(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own arguments."""
    parser.add_argument("--photos", help="folder of .jpg files to enlarge (default: photo-like JPEGs made for the run)")
    parser.add_argument("--count", type=int, default=16, help="photos of each size, one half of them progressive")
    parser.add_argument("--megapixels", type=float, nargs="+", default=[1, 3, 12, 24, 50])
    parser.add_argument("--routes", nargs="+", default=["scaled=1", "scaled=2", "scaled=4"])
    parser.add_argument("--rounds", type=int, default=3, help="times that each photo is decoded in each way")
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--weights", default="DEFAULT")
    parser.add_argument("--labelled", help="folder of images in a sub-folder for each class, to measure accuracy on")
    parser.add_argument("--labelled-megapixels", type=float, default=1.0)
    parser.add_argument("--most", type=int, default=800, help="labelled images at most")


if __name__ == "__main__":
    record.main("bench_decode", __doc__ or "", add, run)
