"""Both stages on a Dask cluster on this machine: what the cluster adds, what travels, and what that means for a large one.

``python -m benchmarks.bench_cluster``; a scheduler and two workers of one thread, as processes; every byte is counted at the
sockets of all processes (``benchmarks.counted``).

- extraction: ``featurepipe.extract`` on all cores, by two workers on the same cores, and the script that people write, in turn:
  ``client.map`` over lists of 32 file names with a function that keeps its network and returns features, which travel. Fresh
  stores; the network is loaded and the workers have imported everything before; ``first_call_s_more`` tells what that takes.
- handing out: shards whose workers only answer, which leaves what the client and the scheduler do for each image and task.
- fit: a multinomial fit by workers whose memory limits together are a quarter of the features (float16, as stored), beside the
  same fit here, streamed. Dask ends a worker that takes more than its limit.
- passes: over a part of the same features, with few and many classes, and over nothing.
- model: what 100,000,000 images would take on GPU workers (``benchmarks.cluster_model``). What large listings and indices cost
  is taken from the records of ``bench_nightly`` and ``bench_scale``.

Traffic is told without what workers and scheduler say all the time (``idle``). That of whole extractions is told with it, and
how much of it that is.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
from distributed.scheduler import heartbeat_interval

import featurepipe as fp
from benchmarks import cluster_steps, counted, record
from benchmarks.alone import alone
from benchmarks.bench_heads import count_passes, objective
from benchmarks.cluster_model import Assumed, Costs, assumptions, model
from benchmarks.cluster_steps import Meter, Traffic
from benchmarks.photos import make_photos
from benchmarks.piles import listing_of
from featurepipe.execution import DaskExecutor, spread
from featurepipe.extraction.ledger import ExtractionLedger, ShardLedger
from featurepipe.extraction.shards import ShardSizes, cut
from featurepipe.features.loader import StageSeconds
from featurepipe.heads import BlockLogisticRegression
from featurepipe.heads.linear import passes
from featurepipe.heads.linear.losses import SoftmaxLoss
from featurepipe.heads.linear.optimisers import Evaluate
from featurepipe.store import FeatureSet

WORKERS = 2
NAMES = 32  # that the script sends at a time
C = 0.01


@dataclass
class Extracted:
    """One extraction.

    Attributes:
        seconds: Of the whole call.
        images: Whose features were computed.
        steady: Images a second of all processes while they have work.
        features: (n, D), by id.
        record: Of the run.
    """

    seconds: float
    images: int
    steady: float
    features: np.ndarray
    record: dict[str, Any] = field(default_factory=dict)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures everything."""
    if args.tiny:
        args.images, args.script_images, args.listed, args.rows, args.rounds, args.tasks = 24, 8, 20_000, 20_000, 1, 20
    counted.dask_setup(None)  # this process is the client
    with tempfile.TemporaryDirectory(dir=args.dir) as name, ExitStack() as started:
        folder = Path(name)
        executor = started.enter_context(cluster_steps.executor_of(folder / "extraction", WORKERS, "4GB"))
        meter = Meter(executor)
        waiting = cluster_steps.idle(executor, meter, 2 if args.tiny else 20)
        net = partial(metered, meter, waiting)
        extraction = measure_extraction(folder, args, executor, net)
        handing_out = measure_handing_out(args, executor, net)
        if (
            not args.tiny
        ):  # workers with little memory; a tiny run starts no second ones, which takes longer than all it does
            started.close()
            executor = started.enter_context(cluster_steps.executor_of(folder / "fit", WORKERS, args.memory))
            meter = Meter(executor)
            net = partial(metered, meter, cluster_steps.idle(executor, meter, 20))
        record.note(f"making a store of {args.rows:,} rows")
        view = cluster_steps.fill_store(folder / "store", args.rows, args.width, args.classes)
        fit = measure_fit(folder / "store", view, args, executor, net)
        passing = measure_passes(view, args, executor, net)
    found = {"extraction": extraction, "handing_out": handing_out, "fit": fit, "passes": passing}
    costs = costs_of(found, waiting)
    return {
        "workers": WORKERS,
        "overhead_percent": extraction["overhead_percent"],
        "traffic_per_image": extraction["traffic_per_image"],
        "features_times_limits": fit["features_times_limits"],
        "objective_gap": fit["objective_gap"],
        "moved_of_minimum": passing["few_classes"]["moved_of_minimum"],
        "promised": {"overhead_percent": "<= 10", "features_times_limits": ">= 4", "objective_gap": "<= 1e-6"},
        "idle": {"seconds": round(waiting.seconds, 1), "bytes_s": round(waiting.through / waiting.seconds)},
        **found,
        "costs": asdict(costs),
        "assumed": assumptions(Assumed()),
        "model": [model(costs, Assumed(), workers) for workers in (8, 64)],
    }


def metered(meter: Meter, waiting: Traffic, work: Callable[[], Any]) -> tuple[Any, Traffic]:
    """What work returns, and the traffic that it causes."""
    meter.start()
    answer = work()
    return answer, meter.stop().less(waiting)


def measure_extraction(folder: Path, args: argparse.Namespace, executor: DaskExecutor, net: Any) -> dict[str, Any]:
    """Extraction here, by workers, and by a script."""
    record.note(f"making {args.images} images")
    photos, few = (
        make_photos(folder / "photos", args.images),
        make_photos(folder / "few", 4 if args.tiny else 2 * NAMES, seed=1),
    )
    names = [str(path) for path in sorted(photos.iterdir())]
    cold = [
        extracted(few, folder, args, cluster).seconds for cluster in (executor, executor, None)
    ]  # the last for this process
    scripted(sorted(map(str, few.iterdir())), args, executor)
    acts: dict[str, Callable[[], Extracted]] = {
        "here": lambda: extracted(photos, folder, args, None),
        "by_workers": lambda: extracted(photos, folder, args, executor),
        "script": lambda: scripted(names[: args.script_images], args, executor),
    }
    rounds, found = [], dict[str, Extracted]()
    for number in range(args.rounds):
        one = {}
        for name in list(acts)[:: 1 if number % 2 else -1]:
            found[name], traffic = net(acts[name])
            one[name] = figures(found[name], traffic)
        rounds.append(one)
        rates = ", ".join(f"{name} {one[name]['images_s']:.1f}" for name in acts)
        record.note(f"round {number + 1} of {args.rounds}: {rates} img/s")
    stages = found["here"].record["seconds"]
    return {
        "images": len(names),
        "image_bytes": round(sum(Path(name).stat().st_size for name in names) / len(names)),
        "width": found["here"].features.shape[1],
        "backbone": args.backbone,
        "precision": args.precision,
        "overhead_percent": excess(rounds, "seconds", "by_workers", "here"),
        "steady_overhead_percent": excess(rounds, "steady_img_s", "here", "by_workers"),
        "cpu_overhead_percent": excess(rounds, "cpu_s", "by_workers", "here"),
        "times_the_script": record.median(
            [one["by_workers"]["images_s"] / one["script"]["images_s"] for one in rounds], 2
        ),
        "traffic_per_image": record.median([one["by_workers"]["traffic_per_image"] for one in rounds], 1),
        "of_it_waiting": record.median([one["by_workers"]["of_it_waiting"] for one in rounds], 1),
        "script_traffic_per_image": record.median([one["script"]["traffic_per_image"] for one in rounds], 1),
        "first_call_s_more": round(cold[0] - cold[1], 2),
        "decode_s_per_image": round((stages["read"] + stages["decode"]) / len(names), 5),
        "slices": found["by_workers"].record["cluster"]["slices"],
        "largest_difference": difference(found["here"].features, found["by_workers"].features),
        "rounds": rounds,
    }


def extracted(photos: Path, folder: Path, args: argparse.Namespace, cluster: Any) -> Extracted:
    """The whole call, into a fresh store."""
    options = {"backbone": args.backbone, "weights": args.weights, "precision": args.precision, "silent": True}
    with tempfile.TemporaryDirectory(dir=folder) as store:
        start = time.perf_counter()
        run = fp.extract(photos, store, dataset="bench", cluster=cluster, **options)
        seconds = time.perf_counter() - start
        view = fp.FeatureStore(store).features("bench")
        features = view.numpy(np.float32)[0][np.argsort(view.ids)]
    images = run["counts"]["computed"]
    rates = [one["images"] / one["seconds"] for one in run.get("cluster", {}).get("workers", [])]
    return Extracted(seconds, images, sum(rates) if rates else images / run["seconds"]["wall"], features, run)


def scripted(names: list[str], args: argparse.Namespace, executor: DaskExecutor) -> Extracted:
    """The script that people write."""
    start = time.perf_counter()
    lists = [names[first : first + NAMES] for first in range(0, len(names), NAMES)]
    options = {"backbone": args.backbone, "weights": args.weights}
    futures = executor.client.map(cluster_steps.features_of, lists, pure=False, **options)
    features = np.concatenate(executor.client.gather(futures))
    seconds = time.perf_counter() - start
    return Extracted(seconds, len(names), len(names) / seconds, features)


def figures(one: Extracted, traffic: Traffic) -> dict[str, float]:
    """Of one extraction."""
    return {
        "seconds": round(one.seconds, 3),
        "images_s": round(one.images / one.seconds, 2),
        "steady_img_s": round(one.steady, 2),
        "cpu_s": round(sum(part["cpu"] for part in (traffic.scheduler, traffic.client, traffic.workers)), 3),
        "traffic_per_image": round((traffic.through + traffic.waiting) / one.images, 1),
        "of_it_waiting": round(traffic.waiting / one.images, 1),
    }


def excess(rounds: list[dict[str, Any]], figure: str, name: str, other: str) -> float:
    """By how many percent a figure is above another one's of the same round."""
    return record.median([100 * (one[name][figure] / one[other][figure] - 1) for one in rounds], 1)


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """The largest of all values, as a fraction of the largest value."""
    return float(np.abs(one - other).max() / np.abs(one).max())


def measure_handing_out(args: argparse.Namespace, executor: DaskExecutor, net: Any) -> dict[str, Any]:
    """What client and scheduler do for an image, and for a task."""
    rows = args.listed
    executor.check()  # the stores of the extractions are gone
    listing = listing_of(rows)
    listing = listing.append_column("locator", listing["id"].cast(pa.binary()))
    plan = SimpleNamespace(todo=np.arange(rows), known=0, rejected=())
    ledger, sizes = ExtractionLedger(np.zeros((rows, 32), np.uint8), np.zeros(rows, bool)), ShardSizes()
    entries = ShardLedger(plan, ledger, StageSeconds())  # type: ignore[arg-type]

    def hand_out() -> float:
        start = time.perf_counter()
        shards = cut(listing, plan.todo, sizes, iter(lambda: WORKERS, -1))
        for shard, result in executor.map(cluster_steps.answer_only, shards):
            entries.take(shard, result)
            sizes.note(shard.rows, result.run.seconds)
        return time.perf_counter() - start

    seconds, traffic = net(hand_out)
    counted.forget_peak()
    before = counted.memory()["now"]
    begun = time.process_time()
    entries.close()
    closing, growth = time.process_time() - begun, counted.memory()["peak"] - before
    if ledger.computed != rows:
        raise SystemExit(f"{ledger.computed} of {rows} images were booked")
    _, of_tasks = net(lambda: sum(1 for _ in executor.map(cluster_steps.nothing, range(args.tasks))))
    return {
        "images": rows,
        "images_s": round(rows / seconds),
        "closing_us_per_image": round(1e6 * closing / rows, 3),
        "closing_bytes_per_image": round(1e6 * growth / rows, 1),
        "traffic_per_image": round(traffic.through / rows, 1),
        "client_us_per_image": round(1e6 * traffic.client["cpu"] / rows, 3),
        "scheduler_us_per_image": round(1e6 * traffic.scheduler["cpu"] / rows, 3),
        "tasks": args.tasks,
        "ms_per_task": round(1e3 * of_tasks.seconds / args.tasks, 3),
        "scheduler_ms_per_task": round(1e3 * of_tasks.scheduler["cpu"] / args.tasks, 3),
        "client_ms_per_task": round(1e3 * of_tasks.client["cpu"] / args.tasks, 3),
        "traffic_per_task": round(of_tasks.through / args.tasks),
        "messages_per_task": round(of_tasks.scheduler["messages"] / args.tasks, 2),
    }


def measure_fit(
    store: Path, view: FeatureSet, args: argparse.Namespace, executor: DaskExecutor, net: Any
) -> dict[str, Any]:
    """A fit on features that the workers together cannot hold, and the same fit here."""
    counts, head = count_passes(passes.Passes), BlockLogisticRegression(C=C, memory=None)
    executor.client.run(counted.forget_peak)
    pids = {worker.pid for worker in executor.workers()}
    before = executor.client.run(counted.memory)
    there, traffic = net(lambda: timed(lambda: head.fit(spread(view, executor))))
    peaks = executor.client.run(counted.memory)
    asked, survived = len(counts), pids == {worker.pid for worker in executor.workers()}
    record.note(f"fit by workers: {there[1]:.1f} s, {asked} passes")
    limits = sum(worker.memory_limit for worker in executor.workers())
    here = timed(lambda: BlockLogisticRegression(C=C, memory=args.memory).fit(view))
    record.note(f"fit here: {here[1]:.1f} s")
    codes = np.searchsorted(head.classes_, view.labels.astype(str))
    features: Any = _Rows(view)
    values = [objective(fitted, features, codes, C) for fitted, _ in (there, here)]
    opening = alone("benchmarks.cluster_steps", "opened", store)
    stored = view.shape[0] * view.shape[1] * view.dtype.itemsize
    return {
        "rows": view.shape[0],
        "width": view.shape[1],
        "classes": len(head.classes_),
        "features_mb": round(stored / 1e6, 1),
        "limits_mb": round(limits / 1e6, 1),
        "features_times_limits": round(stored / limits, 3),
        "workers_survived": survived,
        "idle_mb": [round(one["now"]) for one in before.values()],
        "peak_mb": [round(one["peak"]) for one in peaks.values()],
        "seconds": round(there[1], 2),
        "here_s": round(here[1], 2),
        "passes": asked,
        "here_passes": len(counts) - asked,
        "objective": values[0],
        "objective_gap": abs(values[0] / values[1] - 1),
        "traffic_per_pass": round(traffic.through / asked),
        "client_bytes_per_row": round(1e6 * opening["growth_mb"] / len(view), 1),
        "client_us_per_row": round(1e6 * opening["seconds"] / len(view), 3),
    }


class _Rows:
    """Features as rows are taken of an array."""

    def __init__(self, view: FeatureSet) -> None:
        self._view = view

    def __len__(self) -> int:
        return self._view.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self._view.read(np.float32, rows=rows)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What work returns, and its seconds."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def measure_passes(view: FeatureSet, args: argparse.Namespace, executor: DaskExecutor, net: Any) -> dict[str, Any]:
    """Bytes and seconds of a pass: of few classes, of many, with curvature, and of none."""
    part = view.take(slice(0, len(view) // 8))
    prepared = passes.prepare(spread(part, executor), intercept=True, memory=None)
    prepared.shards.reduce(cluster_steps.nothing)  # has them kept
    empty = net(lambda: [prepared.shards.reduce(cluster_steps.nothing) for _ in range(args.tasks)])[1]
    found: dict[str, Any] = {
        "rows": len(part),
        "empty_ms": round(1e3 * empty.seconds / args.tasks, 2),
        "empty_bytes": round(moved(empty) / args.tasks),
    }
    for name, classes in (("few_classes", args.classes), ("many_classes", 10 * args.classes)):
        found[name] = measure_pass(prepared, classes, "", net)
    return found | {"with_curvature": measure_pass(prepared, args.classes, "shared", net)}


def measure_pass(prepared: passes.Prepared, classes: int, curvature: str, net: Any, count: int = 5) -> dict[str, Any]:
    """Passes of one kind."""
    rows, width = prepared.shards.rows, len(prepared.mean)
    codes = np.random.default_rng(0).integers(0, classes, rows)
    options: dict[str, Any] = {"intercept": True, "intercept_penalty": 0.0, "memory": None}
    one = passes.Passes(prepared, codes, np.ones((1, rows)), [passes.FitProblem(0, C)], SoftmaxLoss(), **options)
    request = Evaluate(np.zeros((classes, width + 1)), curvature)
    one([0], [request])  # sends codes and weights
    _, traffic = net(lambda: [one([0], [request]) for _ in range(count)])
    coefficients = prepared.dtype.itemsize * classes * (width + 1)
    gradient = 8 * classes * (width + 1)
    least = WORKERS * (coefficients + gradient)  # one gradient comes back, the others go to a neighbour
    return {
        "classes": classes,
        "seconds": round(traffic.seconds / count, 3),
        "worker_cpu_s": round(traffic.workers["cpu"] / count / WORKERS, 4),
        "coefficients_bytes": coefficients,
        "gradient_bytes": gradient,
        "minimum_bytes": least,
        "moved_bytes": round(moved(traffic) / count),
        "moved_of_minimum": round(moved(traffic) / count / least, 3),
        "workers_received": round(traffic.workers["received"] / count),
        "client_received": round(traffic.client["received"] / count),
        "through_scheduler": round(traffic.through / count),
    }


def moved(traffic: Traffic) -> float:
    """Bytes that came to where they were wanted: what passes through the scheduler counts once."""
    return traffic.workers["received"] + traffic.client["received"]


def costs_of(found: dict[str, Any], waiting: Traffic) -> Costs:
    """What the model is made of."""
    extraction, handing_out, fit, passing = (found[name] for name in ("extraction", "handing_out", "fit", "passes"))
    few, many = passing["few_classes"], passing["many_classes"]
    values = passing["rows"] * fit["width"] / WORKERS  # of a worker, which has one core
    beats = waiting.seconds * WORKERS / heartbeat_interval(WORKERS)
    product = (many["worker_cpu_s"] - few["worker_cpu_s"]) / (many["classes"] - few["classes"]) / values
    nightly = json.loads((record.RESULTS / "bench_nightly.json").read_text())
    rows, by_rows = str(nightly["rows"]), nightly["by_rows"]
    scale = json.loads((record.RESULTS / "bench_scale.json").read_text())
    listed = max(map(int, scale["sizes"]))
    runs = [scale["sizes"][str(listed)][kind]["partitions"] for kind in ("first", "later")]
    slopes = [scale["bytes_per_image"]["partitions"][f"{kind}_anonymous"] for kind in ("first", "later")]
    return Costs(
        overhead=extraction["overhead_percent"] / 100,
        image_bytes=extraction["image_bytes"],
        decode_seconds=extraction["decode_s_per_image"],
        image_traffic=handing_out["traffic_per_image"],
        client_seconds=handing_out["client_us_per_image"] / 1e6,
        closing_seconds=handing_out["closing_us_per_image"] / 1e6,
        scheduler_seconds=handing_out["scheduler_us_per_image"] / 1e6,
        task_seconds=handing_out["scheduler_ms_per_task"] / 1e3,
        beat_traffic=waiting.through / beats,
        beat_messages=waiting.scheduler["messages"] / beats,
        beat_seconds=waiting.scheduler["cpu"] / beats,
        pass_seconds=passing["empty_ms"] / 1e3,
        value_seconds=max(0.0, few["worker_cpu_s"] / values - few["classes"] * product),
        product_seconds=product,
        order_bytes=passing["empty_bytes"] / WORKERS,
        passes=fit["passes"],
        view_bytes=fit["client_bytes_per_row"],
        client_bytes=1e6 * max(run["anonymous_peak_mb"] for run in runs),
        listing_bytes=max(0.0, *slopes),
        listed=listed,
        listing_seconds=max(run["seconds"] for run in runs) / listed,
        index_bytes=nightly["index_bytes_per_row"],
        index_seconds=by_rows["index"][rows]["seconds"] / nightly["rows"],
    )


def add(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own arguments."""
    parser.add_argument("--images", type=int, default=2000, help="photo-like JPEGs, made for the run")
    parser.add_argument("--script-images", type=int, default=320, help="of these for the script, which is slower")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--weights", default="none", help="default: none, as nothing here depends on them")
    parser.add_argument("--precision", default="fp32", help="default: fp32, as in the script")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--listed", type=int, default=2_000_000, help="images that are only handed out")
    parser.add_argument("--tasks", type=int, default=500, help="that do nothing")
    parser.add_argument("--memory", default="400MB", help="limit of each worker in the fit")
    parser.add_argument("--rows", type=int, default=3_150_000, help="of the fit's features")
    parser.add_argument("--width", type=int, default=512, help="values of each")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--dir", help="a folder with room for 4 GB (default: the system's temporary folder)")


if __name__ == "__main__":
    record.main("bench_cluster", __doc__ or "", add, run)
