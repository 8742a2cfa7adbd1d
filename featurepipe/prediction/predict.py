"""Predicting the images of any source with a bundle: the same way as `extract`, with a head at its end instead of a store."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from featurepipe import records
from featurepipe.errors import Interrupted, SourceError, TooManyRejects
from featurepipe.extraction.extract import ARRAY_READERS
from featurepipe.extraction.limits import allowance
from featurepipe.extraction.options import AUTO
from featurepipe.extraction.publish import SHOWN_REJECTS, by_code
from featurepipe.extraction.stream import StageSeconds
from featurepipe.extraction.streaming import FeatureBatch
from featurepipe.heads.bundle.bundle import Bundle
from featurepipe.images import open_source
from featurepipe.interrupt import StopRequest, stop_on_signals
from featurepipe.prediction.files import Write, checked_target, predictions_file, schema_of
from featurepipe.prediction.ready import ReadyBundle, make_ready
from featurepipe.progress import show


@dataclass
class Outcome:
    """What became of the rows of a listing.

    Attributes:
        predicted: images with a prediction.
        labels: how many images were given each label.
        reasons: why an image could not be used, by row.
        scoring: seconds in the head and in writing.
        wall: seconds of it all, from the first image on.
    """

    predicted: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    reasons: dict[int, str] = field(default_factory=dict)
    scoring: float = 0.0
    wall: float = 0.0


def predict(
    bundle: Bundle | str | PathLike[str],
    source: Any,
    to: str | PathLike[str] | None = None,
    *,
    weights: str | PathLike[str] | None = None,
    device: str = AUTO,
    batch_size: int | str = AUTO,
    workers: int | None = None,
    max_rejects: int | str = "1%",
    trust_code: bool = False,
    silent: bool = False,
) -> dict[str, Any]:
    """Predicts every image of a source, and writes one row for each, in the order of the listing.

    The file's columns are ``id``, ``label`` (the most probable class), ``confidence`` (its probability), ``reason``, and
    ``p(<class>)`` for each class; in ``.jsonl`` the probabilities are one object by class. An image that cannot be used has
    a row as well: its reason, and nothing else. The file appears when it is complete, and replaces an older one.

    Args:
        bundle: what ``featurepipe train`` wrote, or its folder.
        source: anything `featurepipe.images.open_source` takes: a folder, a manifest, an archive, arrays, a URL.
        to: the file to write, ``.csv``, ``.jsonl`` or ``.parquet``; None only counts.
        weights: the network's weights, if they are a file that is not in the bundle.
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
        batch_size: images per forward, or ``auto``.
        workers: threads that read and decode; by default one per CPU, at most 16.
        max_rejects: unusable images to put up with, a number or a share such as ``"1%"``.
        trust_code: whether a network ``package.module:factory`` may be loaded, which runs that module.
        silent: show no progress and say nothing.

    Returns:
        The record of the run as JSON values: ``counts``, ``labels`` (images by label), ``rejects`` (the first of them; the
        file has all), seconds, versions; ``exit_code`` is 3 if there were rejects.

    Raises:
        UsageError: an argument is wrong.
        BundleError: the bundle cannot be used, or the network gives other features here.
        SourceError: the source cannot be listed, or holds no image.
        TooManyRejects: more images were unusable than ``max_rejects``; the file is there, with all others predicted.
        Interrupted: SIGINT or SIGTERM; no file is left.
    """
    allowance(max_rejects, 0)  # refused before any work, as is a file that cannot be written
    target = None if to is None else checked_target(to, spared=[bundle, source])
    started = records.now()
    ready = make_ready(
        bundle, weights=weights, device=device, batch_size=batch_size, workers=workers, trust_code=trust_code
    )
    with closing(open_source(source, array_readers=ARRAY_READERS)) as images, stop_on_signals() as stop:
        listing = images.scan().combine_chunks()
        if not listing.num_rows:
            raise SourceError(f"no images in {images.name}: nothing there has the suffix of an image. Check the path")
        clock = StageSeconds()
        outcome = _predict(ready, images, listing, target, clock, stop, silent=silent)
    record = {
        "command": "predict",
        "bundle": bundle.family if isinstance(bundle, Bundle) else str(bundle),
        "source": images.location,
        "file": None if target is None else str(target),
        "started": started,
        "ended": records.now(),
        **_describe(ready, listing, outcome, clock),
    }
    rejected, listed = len(outcome.reasons), listing.num_rows
    if rejected > allowance(max_rejects, listed):
        first = min(outcome.reasons)
        written = f"{target} holds all predictions and reasons" if target else "nothing was written"
        raise TooManyRejects(
            f"{rejected:,} of {listed:,} images could not be used, more than --max-rejects {max_rejects} allows; first: "
            f"{listing['id'][first].as_py()}: {outcome.reasons[first]}; {written}"
        )
    return {**record, "status": "done", "exit_code": 3 if rejected else 0}


def _predict(
    ready: ReadyBundle,
    images: Any,
    listing: pa.Table,
    target: Path | None,
    clock: StageSeconds,
    stop: StopRequest,
    *,
    silent: bool,
) -> Outcome:
    outcome, start = Outcome(), time.perf_counter()
    with ExitStack() as stack:
        classes = ready.bundle.classes
        write: Write | None = stack.enter_context(predictions_file(target, classes)) if target else None
        progress = stack.enter_context(show(listing.num_rows, "predict", silent=silent))
        for group in ready.groups(images, listing, clock=clock, stop=stop, progress=progress):
            began = time.perf_counter()
            rows = _scored(ready, group, listing, outcome)
            if write is not None:
                write(rows)
            outcome.scoring += time.perf_counter() - began
        if stop():
            done = f"{outcome.predicted:,} of {listing.num_rows:,} images were predicted"
            raise Interrupted(f"stopped by {stop.name}: {done}, and no file was written", stop.signal_number or 2)
    outcome.wall = time.perf_counter() - start
    return outcome


def _scored(ready: ReadyBundle, group: list[FeatureBatch], listing: pa.Table, outcome: Outcome) -> pa.RecordBatch:
    """Predictions of consecutive rows, those of rejects empty, as rows of the file; books them."""
    reasons = {row: reason for batch in group for row, reason in batch.rejects}
    rows = np.concatenate([batch.rows for batch in group])
    numbers = np.sort(np.concatenate([rows, np.fromiter(reasons, np.int64, len(reasons))]))
    place = np.searchsorted(numbers, rows)
    classes = np.array(ready.bundle.classes, dtype=object)
    probabilities = np.full((len(numbers), len(classes)), np.nan, np.float32)
    labels = np.full(len(numbers), None, dtype=object)
    exact = ready.probabilities(group)
    probabilities[place] = exact
    labels[place] = classes[exact.argmax(axis=1)]
    outcome.predicted += len(rows)
    outcome.labels.update(labels[place].tolist())
    outcome.reasons.update(reasons)
    empty = np.isnan(probabilities[:, 0])
    columns = [
        listing["id"].take(pa.array(numbers)).combine_chunks(),
        pa.array(labels.tolist(), pa.string()),
        pa.array(probabilities.max(axis=1), pa.float32(), mask=empty),
        pa.array([reasons.get(int(number)) for number in numbers], pa.string()),
        *(pa.array(np.ascontiguousarray(column), pa.float32(), mask=empty) for column in probabilities.T),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema_of(ready.bundle.classes))


def _describe(ready: ReadyBundle, listing: pa.Table, outcome: Outcome, clock: StageSeconds) -> dict[str, Any]:
    bundle, machine = ready.bundle, ready.stream.machine
    seconds = {**clock.totals, "score": outcome.scoring, "wall": outcome.wall}
    return {
        "backbone": bundle.backbone["name"],
        "fingerprint": bundle.fingerprint,
        "columns": list(bundle.columns),
        "family": bundle.family,
        "classes": list(bundle.classes),
        "temperature": bundle.temperature,
        "machine": {"device": machine.device, "batch_size": machine.batch_size, "workers": machine.workers},
        "counts": {
            "listed": listing.num_rows,
            "predicted": outcome.predicted,
            "rejected": len(outcome.reasons),
        },
        "labels": {name: outcome.labels[name] for name in bundle.classes},
        "rejects": [
            {"id": listing["id"][row].as_py(), "reason": reason}
            for row, reason in sorted(outcome.reasons.items())[:SHOWN_REJECTS]
        ],
        "reject_reasons": by_code(outcome.reasons),
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
        "images_per_second": round(outcome.predicted / outcome.wall, 2),
        "verdict": _verdict(clock, outcome, machine.device),
        "versions": records.versions(),
        "host": records.host(),
    }


def _verdict(clock: StageSeconds, outcome: Outcome, device: str) -> str:
    if outcome.wall > records.TELLING_SECONDS and outcome.scoring > outcome.wall / 2:
        share = f"{100 * outcome.scoring / outcome.wall:.0f} %"
        return f"head-bound: scoring took {share} of the time; a linear head is many times faster"
    return records.verdict(clock.totals, outcome.wall, device=device)
