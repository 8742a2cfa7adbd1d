"""What a large dataset takes on a cluster of GPUs, from measured costs and the assumptions below: see ``capacity.md``."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from distributed.scheduler import heartbeat_interval

from featurepipe.execution.row_shard import KEPT
from featurepipe.extraction.shards import ShardSizes
from featurepipe.store.writer import DEFAULT_PART_BYTES

GB = 1e9


@dataclass(frozen=True)
class Costs:
    """Measured.

    Attributes:
        overhead: Of an extraction by workers, as a fraction.
        image_bytes: Of an image file.
        decode_seconds: Of a core, for reading and decoding an image.
        image_traffic: Bytes that the scheduler receives and sends for an image.
        client_seconds: Of the client's core, to hand an image out and record it.
        closing_seconds: Of the client's core, for an image when all are done.
        scheduler_seconds: Of the scheduler's core, for the same.
        task_seconds: Of the scheduler's core, for a task.
        beat_traffic: Bytes that the scheduler receives and sends for a worker's heartbeat, and whatever else there is by then.
        beat_messages: Messages, likewise.
        beat_seconds: Of the scheduler's core, likewise.
        pass_seconds: Of a pass over nothing.
        value_seconds: Of a core, to read a stored value from the system's memory and convert it, in a pass.
        product_seconds: Of a core, for a value and class.
        order_bytes: Of an order, beside its coefficients.
        passes: Of a fit.
        view_bytes: Of the client's memory for a row of a fit.
        client_bytes: Of the client's memory that belongs to no file, at most, for the largest listing measured (bench_scale).
        listing_bytes: Of it for each further image (bench_scale); 0 where it does not grow.
        listed: Images in that listing.
        listing_seconds: Of the client, to list and plan an image, count changes and write the snapshot (bench_scale).
        index_bytes: Of a worker's memory for a key that the store holds (bench_nightly).
        index_seconds: Of a worker, to read it (bench_nightly).
    """

    overhead: float
    image_bytes: float
    decode_seconds: float
    image_traffic: float
    client_seconds: float
    closing_seconds: float
    scheduler_seconds: float
    task_seconds: float
    beat_traffic: float
    beat_messages: float
    beat_seconds: float
    pass_seconds: float
    value_seconds: float
    product_seconds: float
    order_bytes: float
    passes: float
    view_bytes: float
    client_bytes: float
    listing_bytes: float
    listed: int
    listing_seconds: float
    index_bytes: float
    index_seconds: float


@dataclass(frozen=True)
class Assumed:
    """Not measured here.

    Attributes:
        images: In the pile.
        width: Values of a float16 feature row.
        classes: Of the head.
        gpu_images_s: Images a second of a GPU: the JPEGs of 551 x 676 pixels that the hardware decoder of an A100 gives ("over
            8,000", torchvision's pull request 8496). Computing is no limit: 88,000 ResNet-50 inferences a second on each of the
            eight H100 of MLPerf Inference v3.1 (closed, offline, TensorRT, int8, images in memory: 704,412 on all).
        cores: For each GPU, of a machine of eight H100 and 112 cores, as DGX H100.
        memory_gb: For each GPU's worker, of the same machine with 2 TB.
        client_memory_gb: Where the command runs.
        storage_gb_s: That all workers together read from where images and store are: a small parallel file system.
        network_gb_s: Of the scheduler's machine: 10 Gbit/s.
    """

    images: int = 100_000_000
    width: int = 2048
    classes: int = 1000
    gpu_images_s: float = 8000.0
    cores: int = 14
    memory_gb: float = 256.0
    client_memory_gb: float = 64.0
    storage_gb_s: float = 10.0
    network_gb_s: float = 1.25


def model(costs: Costs, assumed: Assumed, workers: int) -> dict[str, Any]:
    """Times, sizes and rates of an extraction and a fit, and what is used up first."""
    first, fit = extraction(costs, assumed, workers), fitting(costs, assumed, workers)
    return {"workers": workers, "extraction": first, "fit": fit, "used": used(costs, assumed, first, fit)}


def extraction(costs: Costs, assumed: Assumed, workers: int) -> dict[str, float]:
    """All images, none of which the store holds, with storage and cores that keep up with the GPUs."""
    rate = workers * assumed.gpu_images_s / (1 + max(0.0, costs.overhead))
    shards, beats = _shards(assumed, workers), workers / heartbeat_interval(workers)
    rows_of_part = DEFAULT_PART_BYTES // (2 * assumed.width)
    return {
        "images_s": round(rate),
        "hours": round(assumed.images / rate / 3600, 2),
        "client_hours_more": round(assumed.images * (costs.listing_seconds + costs.closing_seconds) / 3600, 2),
        "slices": len(shards),
        "slice_seconds": round(max(shards) / assumed.gpu_images_s, 1),
        "parts": sum(math.ceil(rows / rows_of_part) for rows in shards),
        "store_gb": round(2 * assumed.images * assumed.width / GB, 1),
        "read_gb_s": round(rate * costs.image_bytes / GB, 2),
        "write_gb_s": round(rate * 2 * assumed.width / GB, 2),
        "decoding_cores_per_gpu": round(assumed.gpu_images_s * costs.decode_seconds, 1),
        "scheduler_mb_s": round((rate * costs.image_traffic + beats * costs.beat_traffic) / 1e6, 2),
        "scheduler_messages_s": round(beats * costs.beat_messages, 1),
        "scheduler_busy": round(rate * costs.scheduler_seconds + beats * costs.beat_seconds, 3),
        "tasks_s": round(len(shards) * rate / assumed.images, 3),
        "client_busy": round(rate * costs.client_seconds, 3),
        "client_memory_gb": round((costs.client_bytes + (assumed.images - costs.listed) * costs.listing_bytes) / GB, 1),
        "index_gb_per_worker_later": round(assumed.images * costs.index_bytes / GB, 1),
        "index_seconds_later": round(assumed.images * costs.index_seconds),
    }


def _shards(assumed: Assumed, workers: int) -> list[int]:
    """As extraction itself would size them."""
    sizes, left, found = ShardSizes(), assumed.images, list[int]()
    while left:
        found.append(sizes.next(left, workers))
        left -= found[-1]
        if len(found) > workers:  # answers of the first ones are there
            sizes.note(found[-1], found[-1] / assumed.gpu_images_s)
    return found


def fitting(costs: Costs, assumed: Assumed, workers: int) -> dict[str, Any]:
    """A multinomial fit by the same workers' processors."""
    values = assumed.images * assumed.width / workers
    room = KEPT * assumed.memory_gb * GB
    place = "float32" if 4 * values <= room else "as stored" if 2 * values <= room else "on disk"
    compute = values * assumed.classes * costs.product_seconds / assumed.cores
    convert = 0.0 if place == "float32" else values * costs.value_seconds  # by the one thread that reads ahead
    read = 2 * values * workers / (assumed.storage_gb_s * GB) if place == "on disk" else 0.0
    point = 4.0 * assumed.classes * (assumed.width + 1)
    seconds = max(compute, convert, read) + costs.pass_seconds
    return {
        "share_gb": round(2 * values / GB, 1),
        "kept": place,
        "reading_s": round(read, 1),
        "converting_s": round(convert, 1),
        "computing_s": round(compute, 1),
        "pass_s": round(seconds, 1),
        "order_mb": round(point / 1e6, 2),
        "moved_mb_per_pass": round(workers * (point + costs.order_bytes + 2 * point) / 1e6, 1),
        "adding_rounds": math.ceil(math.log2(workers)),
        "client_memory_gb": round(assumed.images * costs.view_bytes / GB, 1),
        "passes": round(costs.passes),
        "hours": round(costs.passes * seconds / 3600, 2),
    }


def used(costs: Costs, assumed: Assumed, first: dict[str, float], fit: dict[str, Any]) -> dict[str, float]:
    """How much of each thing is used where 1 is all there is, the scarcest first: what is above 1 breaks, or slows the rest."""
    found = {
        "storage: reading images and writing features": (first["read_gb_s"] + first["write_gb_s"])
        / assumed.storage_gb_s,
        "cores: reading and decoding": first["decoding_cores_per_gpu"] / assumed.cores,
        "client's memory: listing": first["client_memory_gb"] / assumed.client_memory_gb,
        "client's memory: rows of a fit": fit["client_memory_gb"] / assumed.client_memory_gb,
        "client's core: listing and closing, beside the extraction": first["client_hours_more"] / first["hours"],
        "workers' memory: index of a full store": first["index_gb_per_worker_later"] / assumed.memory_gb,
        "client's core: handing out and booking": first["client_busy"],
        "scheduler's core": first["scheduler_busy"] + first["tasks_s"] * costs.task_seconds,
        "scheduler's network": first["scheduler_mb_s"] / 1e3 / assumed.network_gb_s,
        "workers' memory: features of a fit": 2 * fit["share_gb"] / (KEPT * assumed.memory_gb),
    }
    return {name: round(share, 3) for name, share in sorted(found.items(), key=lambda item: -item[1])}


def assumptions(assumed: Assumed) -> dict[str, Any]:
    """For the record."""
    return asdict(assumed)
