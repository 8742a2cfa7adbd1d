"""What a CUDA device reaches of its own limits, beside plain PyTorch scripts: ``make gpu`` runs it, and the tests marked gpu.

``python -m benchmarks.bench_gpu --record``

- *tests*: with ``--tests``, every test that is marked gpu; what came of each.
- *networks*: ResNet-50, EfficientNet-Lite0 and ConvNeXt-T, each in the precision of the device. *resident*: a batch that lies on
  the device already, its forward alone: the limit of all else. *decoded*: batches of uint8 pixels in main memory, so upload and
  forward. *files*: JPEGs of 500x375 pixels through ``featurepipe.extract`` into a fresh store, decoded on the CPU, and in another
  run on the GPU. A share is a rate divided by the limit; for files also by the least of that limit and of what all cores decode.
  The *script* beside each is PyTorch as users write it, in the same precision and memory format; its files come from a DataLoader
  with a process for each core.
- *heads*: a logistic head of ImageNet's size, 1,281,167 x 2,048 float16 features of 1,000 classes as bench_heads makes them up,
  summed on the device: fitted with the features kept there, with how far above the optimum it is at most, by the gradient in
  float64; and the seconds of a pass with the features kept, and streamed from main memory block by block. The script is PyTorch's
  own L-BFGS on features that lie on the device, given the same time, at most a minute. Where memory or the time left
  (``--minutes``) are too little, fewer rows.

Ours and the script take turns within a round, and ratios are taken within rounds. Weights are random, but for Lite0's where its
package is installed: speed does not depend on them. What a package is missing for is left out, with the reason, and the exit code
is 1. The result is written after each part, so that a run that is stopped leaves what it had.

``--device cpu --tiny`` only shows that the benchmark works, and says so in its result.
"""

from __future__ import annotations

import argparse
import atexit
import copy
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from benchmarks import record
from featurepipe.backbones import Backbone, load_backbone
from featurepipe.backbones.engine import DTYPES, ENOUGH_IMAGES, Engine, choose_precision, worst_cosine
from featurepipe.backbones.loading import weights_at_hand

ROOT = Path(__file__).parent.parent
NETWORKS = ("resnet50", "efficientnet_lite0", "convnext_tiny")
PACKAGED = "efficientnet_lite0"  # whose weights a package brings; others' would be downloaded
UNDER_WAY = 3  # batches: one is copied up, one computed, one copied back
SCRIPT_SHARE = 3  # one file of so many is the script's, which takes longer
DIFFERENT_PHOTOS = 256  # pixels; each has as many files as are wanted, which differ in a comment
ON_A_CPU = "run on a CPU: it shows that the benchmark works, and tells nothing of any GPU"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures part by part."""
    check_device(args.device)
    began = time.perf_counter()
    result: dict[str, Any] = {"device": describe(args.device), "left_out": {}}
    parts: dict[str, Callable[[argparse.Namespace], Any]] = {"tests": gpu_tests} if args.tests else {}
    parts |= {name: partial(of_network, name) for name in args.networks}
    parts |= {"heads": partial(of_heads, time.perf_counter() + 60 * args.minutes)} if args.scale else {}
    for name, part in parts.items():
        start = time.perf_counter()
        into = result if name in ("tests", "heads") else result.setdefault("networks", {})
        try:
            into[name] = part(args)
        except ModuleNotFoundError as error:
            result["left_out"][name] = f"it needs {error.name}, which is not installed"
        record.note(f"{name}: {result['left_out'].get(name, 'done')}, {time.perf_counter() - start:.0f} s")
        if args.record:
            record.save("bench_gpu", result)
    result["seconds"] = round(time.perf_counter() - began)
    result["left_out"] |= {f"{name}, files": one["files"]["left_out"] for name, one in left_out_files(result)}
    return result


def left_out_files(result: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The networks whose files could not be measured."""
    return ((name, one) for name, one in result.get("networks", {}).items() if "left_out" in one["files"])


def check_device(device: str) -> None:
    """Ends the run where there is no such device."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(
            f"no CUDA device: this Python's PyTorch ({torch.__version__}) sees none, so nothing was measured. On a machine that "
            "has one: make gpu. That the benchmark works shows: python -m benchmarks.bench_gpu --device cpu --tiny"
        )


def describe(device: str) -> dict[str, Any]:
    """What the figures are of."""
    if not device.startswith("cuda"):
        return {"device": device, "gpu": None, "note": ON_A_CPU}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": device,
        "gpu": properties.name,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def gpu_tests(_: argparse.Namespace) -> dict[str, Any]:
    """Runs the tests marked gpu, without the fixtures of all tests, which need packages that these do not."""
    files = sorted(
        path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")
    )
    chosen = [str(path.relative_to(ROOT)) for path in files]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--noconftest",
            "--continue-on-collection-errors",
            "-p",
            "no:cacheprovider",
            "-m",
            "gpu",
        ]
        environment = {**os.environ, "FEATUREPIPE_CACHE": ""}
        ran = subprocess.run(
            [*command, f"--junitxml={report}", *chosen],
            cwd=ROOT,
            env=environment,
            check=False,
            capture_output=True,
            text=True,
        )
        record.note(ran.stdout + ran.stderr)
        if not report.exists():
            return {"exit_code": ran.returncode, "outcomes": {}, "said": (ran.stdout + ran.stderr)[-2000:]}
        cases = ET.parse(report).getroot().iter("testcase")
        outcomes = {f"{case.get('classname')}::{case.get('name')}": outcome_of(case) for case in cases}
    return {"exit_code": ran.returncode, "outcomes": outcomes}


def outcome_of(case: ET.Element) -> str:
    """Passed, or what else came of a test and why."""
    found = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
    return "passed" if found is None else f"{found.tag}: {(found.get('message') or '').splitlines()[:1]}"


def of_network(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Rates of one network, ours and the script's: medians over rounds."""
    weights, said = weights_of(name)
    backbone = load_backbone(name, weights)
    precision = "fp16" if args.device.startswith("cuda") else "fp32"
    size = args.batch_size or (8 if args.tiny else 256)
    engine = Engine(
        backbone, backbone.columns(["bottleneck"]), precision=precision, device=args.device, batch_size=size
    )
    peer = Script(backbone, precision, args.device)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(0, 256, (size, *backbone.preprocessing.input_shape), dtype=torch.uint8, generator=generator)
    resident = batch.to(args.device)
    pinned = batch.pin_memory() if args.device.startswith("cuda") else batch
    [found] = engine(batch).values()
    cosine = worst_cosine(peer(batch).numpy(), found)
    rounds: list[dict[str, float]] = []
    for _ in range(1 if args.tiny else args.rounds):
        batches = 2 if args.tiny else args.batches
        rates = {
            "script_resident": script_rate(peer, resident, batches),
            "resident": rate(engine, resident, batches),
            "script_decoded": script_rate(peer, pinned, batches),
            "decoded": rate(engine, batch, batches),
        }
        rounds.append(rates)
        record.note(f"{name}: " + ", ".join(f"{kind} {value:,.0f} img/s" for kind, value in rates.items()))
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "weights": said,
        "precision": precision,
        "batch_size": size,
        "runtime": engine.runtime,
        "worst_cosine": round(cosine, 6),
        **{f"{kind}_img_s": record.median([one[kind] for one in rounds], 1) for kind in rounds[0]},
        "decoded_of_limit": record.median([one["decoded"] / one["resident"] for one in rounds]),
        "resident_times_script": record.median([one["resident"] / one["script_resident"] for one in rounds]),
        "decoded_times_script": record.median([one["decoded"] / one["script_decoded"] for one in rounds]),
        "rounds": rounds,
        "files": of_files(name, backbone, peer, precision, record.median([one["resident"] for one in rounds], 1), args),
    }


def weights_of(name: str) -> tuple[str, str]:
    """The weights of a network as commands take them, and in words."""
    if name != PACKAGED:
        return "none", "random"
    if weights_at_hand(name):
        return "DEFAULT", "ImageNet's, of the installed package"
    return "none", "random, as the package of ImageNet's is not installed"


class Script:
    """A forward as users write it: the module in the precision, channels last, with torchvision's feature extractor."""

    def __init__(self, backbone: Backbone, precision: str, device: str) -> None:
        self.device, self.dtype = device, DTYPES[precision]
        whole = copy.deepcopy(backbone.module)  # the cut network shares its tensors, and changes their dtype
        cut: nn.Module = create_feature_extractor(whole, return_nodes={backbone.bottleneck: "features"})
        self.network = cut.eval().to(device=device, dtype=self.dtype, memory_format=torch.channels_last)
        form = {"device": device, "dtype": self.dtype}
        self.mean = torch.tensor(backbone.preprocessing.mean, **form)[:, None, None]
        self.std = torch.tensor(backbone.preprocessing.std, **form)[:, None, None]

    @torch.inference_mode()
    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """Features (N, D), float32 in main memory, of uint8 images (N, C, H, W) on either side."""
        images = (batch.to(self.device, non_blocking=True).to(self.dtype) / 255 - self.mean) / self.std
        return self.of_normalised(images)

    @torch.inference_mode()
    def of_normalised(self, images: torch.Tensor) -> torch.Tensor:
        """The same of images that a transform has normalised already."""
        images = images.to(self.device, self.dtype, non_blocking=True, memory_format=torch.channels_last)
        features: torch.Tensor = self.network(images)["features"]
        return (features.mean((2, 3)) if features.dim() == 4 else features).float().cpu()


def rate(engine: Engine, batch: torch.Tensor, batches: int) -> float:
    """Images per second of ours."""
    engine.submit(batch).result()
    pending: deque[Any] = deque()
    start = time.perf_counter()
    for _ in range(batches):
        pending.append(engine.submit(batch))
        if len(pending) >= UNDER_WAY:
            pending.popleft().result()
    for last in pending:
        last.result()
    return len(batch) * batches / (time.perf_counter() - start)


def script_rate(peer: Script, batch: torch.Tensor, batches: int) -> float:
    """Images per second of the script."""
    peer(batch)
    start = time.perf_counter()
    for _ in range(batches):
        peer(batch)
    return len(batch) * batches / (time.perf_counter() - start)


def of_files(
    name: str, backbone: Backbone, peer: Script, precision: str, limit: float, args: argparse.Namespace
) -> dict[str, Any]:
    """JPEG files to a store, and by the script to an array; or why that was left out."""
    try:
        from benchmarks.bench_decode import FULL, ways
        from benchmarks.bench_extract import decode_seconds, ours
    except ModuleNotFoundError as error:
        return {"left_out": f"it needs {error.name}, which is not installed"}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    routes = {"ours": "cpu", **({"ours_decoding_on_gpu": "gpu"} if args.device.startswith("cuda") else {})}
    paths = photo_files(24 if args.tiny else args.files)
    some, decode, (weights, _) = paths[::SCRIPT_SHARE], ways(backbone, ())[FULL], weights_of(name)
    rounds: list[dict[str, float]] = []
    found: dict[str, Any] = {}
    for _ in range(1 if args.tiny else 2):
        expected, seconds = script_files(name, backbone, peer, some, cores, tiny=args.tiny)
        rates = {"script": len(some) / seconds}
        for kind, route in routes.items():
            settings = {"device": args.device, "workers": cores, "decode": route}
            features, seconds, found[kind] = ours(paths[0].parent, name, weights, precision, **settings)
            rates[kind] = len(paths) / seconds
            mine = np.stack([features[path.name] for path in some])
            found[f"{kind}_worst_cosine"] = round(worst_cosine(expected, mine), 6)
        rates["decoding"] = cores / decode_seconds(decode, paths[:: max(1, len(paths) // 100)])
        rounds.append(rates)
        record.note(f"{name}, files: " + ", ".join(f"{kind} {value:,.0f} img/s" for kind, value in rates.items()))
    medians = {kind: record.median([one[kind] for one in rounds], 1) for kind in rounds[0]}
    payloads = [path.read_bytes() for path in paths[:: max(1, len(paths) // ENOUGH_IMAGES)]]
    return {
        "images": len(paths),
        "cores": cores,
        "precision": precision,
        "auto_precision": auto_precision(backbone, torch.stack([decode(payload) for payload in payloads]), args.device),
        "engine": found["ours"]["machine"]["engine"],
        **{f"{kind}_img_s": rate for kind, rate in medians.items()},
        "share_of_forward": round(medians["ours"] / limit, 3),
        "share_of_limit": round(medians["ours"] / min(limit, medians["decoding"]), 3),
        "times_script": record.median([one["ours"] / one["script"] for one in rounds], 2),
        **{kind: value for kind, value in found.items() if kind.endswith("worst_cosine")},
        "bound": {kind: found[kind]["verdict"] for kind in routes},
        "rounds": rounds,
    }


def auto_precision(backbone: Backbone, images: torch.Tensor, device: str) -> dict[str, Any]:
    """What ``--precision auto`` would take for these images, and on which evidence."""
    choice, _ = choose_precision(backbone, backbone.columns(["bottleneck"]), images.split(16), device)
    return {"precision": choice.precision, "why": choice.reason}


@cache
def photo_files(count: int) -> list[Path]:
    """So many different JPEGs of 500x375 pixels, as long as this process runs."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return write_photos(Path(folder.name), count)


def write_photos(folder: Path, count: int) -> list[Path]:
    """Writes so many different JPEGs: some photos, each in many files that differ in a comment."""
    from benchmarks.photos import make_photos

    made = sorted(make_photos(folder / "made", min(count, DIFFERENT_PHOTOS)).glob("*.jpg"))
    payloads = [path.read_bytes() for path in made]
    (folder / "photos").mkdir()
    paths = [folder / "photos" / f"{number:06d}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        start, rest = payloads[number % len(payloads)][:2], payloads[number % len(payloads)][2:]
        comment = f"{number:08d}".encode()
        path.write_bytes(start + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + rest)
    return paths


def script_files(
    name: str, backbone: Backbone, peer: Script, paths: list[Path], cores: int, *, tiny: bool
) -> tuple[np.ndarray, float]:
    """The usual script: features (N, D) of files by a DataLoader, and the seconds they took."""
    from torch.utils.data import DataLoader

    from benchmarks.bench_extract import Photos, transform_of

    photos = Photos(paths, transform_of(name, backbone))
    on_cuda = peer.device.startswith("cuda")
    loader = DataLoader(photos, 8 if tiny else 256, num_workers=0 if tiny else cores, pin_memory=on_cuda)
    start = time.perf_counter()
    features = [peer.of_normalised(batch).numpy() for batch in loader]
    return np.concatenate(features), time.perf_counter() - start


def of_heads(end: float, args: argparse.Namespace) -> dict[str, Any]:
    """One head of ImageNet's size, or of as much of it as memory and time allow."""
    from benchmarks.gpu_heads import measured

    share = 0.002 if args.tiny else args.scale
    return measured(share, 64 if args.tiny else 2_048, args.C, args.device, end, quick=args.tiny)


def add(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own arguments."""
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tests", action="store_true", help="run the tests marked gpu, too")
    parser.add_argument("--networks", nargs="*", default=NETWORKS, metavar="NETWORK")
    parser.add_argument("--batch-size", type=int, help="images of a forward (default: 256)")
    parser.add_argument("--batches", type=int, default=40, help="of a measurement (default: 40)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="of the head's rows and classes (default: 1; 0 for no head)"
    )
    parser.add_argument("--C", type=float, default=1.0, help="of the head (default: 1)")
    parser.add_argument(
        "--minutes", type=float, default=7.5, help="that all may take; the head is fitted last (default: 7.5)"
    )
    parser.add_argument("--files", type=int, default=24_000, help="JPEGs (default: 24,000)")


if __name__ == "__main__":
    found = record.main("bench_gpu", __doc__ or "", add, run)
    failed = found.get("tests", {}).get("exit_code", 0)
    raise SystemExit(1 if failed or found["left_out"] else 0)
