"""Predicting the images of any source with a bundle: the same way as `extract`, with a head at its end instead of a store."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import pyarrow as pa

from featurepipe import records
from featurepipe.display import neutralised_text
from featurepipe.errors import Interrupted, Message, Option, SourceError, TooManyRejects, UsageError
from featurepipe.execution.local import executor_on
from featurepipe.extraction.limits import allowance
from featurepipe.extraction.publish import SHOWN_REJECTS, bounds_of, by_code, kept_damaged, named, remarked
from featurepipe.extraction.text import damaged_lines, remark_lines
from featurepipe.features.options import AUTO, REJECT, Places, places
from featurepipe.features.reading import opened
from featurepipe.heads.bundle.bundle import Bundle
from featurepipe.heads.bundle.files import CONTINUOUS, MULTILABEL
from featurepipe.heads.bundle.text import interval_text, labels_calibration_text, threshold_text
from featurepipe.images.listing import ListingSummary
from featurepipe.images.manifest import ManifestSource
from featurepipe.interrupt import StopRequest, stop_on_signals
from featurepipe.option_groups import as_asked
from featurepipe.prediction.files import (
    Predictions,
    Scored,
    check_top,
    checked_target,
    columns_for,
    has_regions,
    predictions_file,
    range_text,
    with_regions,
)
from featurepipe.prediction.options import BundleOptions, PredictOptions
from featurepipe.prediction.own_classes import TOP, OwnClassifier
from featurepipe.prediction.shards import SCORE, Prediction
from featurepipe.progress import announcer, show, took
from featurepipe.results import shown_as

_LABELS_SHOWN = 10
_REJECTS_SHOWN = 5
_WORKERS_SHOWN = 8


@shown_as("predict")
def predict(
    bundle: Bundle | str | PathLike[str] | None = None,
    source: Any = None,
    to: str | PathLike[str] | None = None,
    *,
    backbone: str | None = None,
    weights: str | PathLike[str] | None = None,
    device: str = AUTO,
    batch_size: int | str = AUTO,
    workers: int | None = None,
    engine: str = AUTO,
    max_rejects: int | str = "1%",
    damaged: str = REJECT,
    only_under: Places = None,
    path_column: str | None = None,
    box: str | None = None,
    box_unit: str = "pixels",
    box_margin: float = 0.0,
    images: str | PathLike[str] | None = None,
    frames: str = "first",
    trust_code: bool = False,
    cluster: Any = None,
    raw_ids: bool = False,
    top: int | None = None,
    silent: bool = False,
) -> dict[str, Any]:
    """Predicts every image of a source, and writes one row for each, in the order of the listing.

    The file's columns are ``id``, ``label`` (the most probable class, or by the bundle's threshold), ``confidence`` (its
    probability), ``reason``, and
    ``p(<class>)`` for each class; in ``.jsonl`` the probabilities are one object by class. Of a bundle that predicts a number
    they are ``id``, ``predicted``, ``low`` and ``high`` (the limits of its prediction interval), and ``reason``; of one that
    predicts several labels ``id``, ``labels`` (those above their thresholds, as ``red|round``), ``reason`` and ``p(<label>)``.
    With ``top`` the classes' columns are ``label_2``, ``confidence_2`` and so on, of the classes that are next in probability.
    An image that cannot be used has
    a row as well: its reason, and nothing else. The file appears when it is complete, and replaces an older one.

    Args:
        bundle: what ``featurepipe train`` wrote, or its folder; None with ``backbone``.
        source: anything `featurepipe.images.open_source` takes: a folder, a manifest, an archive, arrays, a URL.
        to: the file to write, ``.csv``, ``.jsonl`` or ``.parquet``; None only counts.
        backbone: in place of a bundle, a pretrained network that labels images with its own classes
            (`featurepipe.prediction.own_classes`).
        weights: the network's weights, if they are a file that is not in the bundle; of ``backbone`` the name of pretrained
            weights, by default the best.
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
        batch_size: images per forward, or ``auto``.
        workers: threads that read and decode; by default one per CPU, at most 16.
        engine: what runs fp32 networks on a CPU: ``pytorch``, ``openvino``, or ``auto``: OpenVINO where it is installed, for
            1,000 images or more.
        max_rejects: unusable images to tolerate, a number or a share such as ``"1%"``.
        damaged: what becomes of a JPEG of which libjpeg could only repair what was left: ``reject``, or ``keep``, then it is
            predicted like any other, and the record lists it under ``damaged``.
        only_under: a folder, the URL of one, or several: of what a manifest names, or a link leads to, only files below them
            are read, all others are rejects; see `featurepipe.images.open_source`.
        path_column: the column of a manifest that holds the paths; by default ``path``, ``file``, ``filename`` or ``image``.
        box: the column of a manifest's boxes, or four as ``x,y,w,h``; ``none`` for whole images; by default ``box`` or ``bbox``.
        box_unit: ``pixels``, or ``share`` of the upright image's width and height.
        box_margin: added to each side of a box, as a share of its longer side.
        images: folder, its URL, or archive with the images of a manifest or COCO file; by default beside it.
        frames: ``first`` of a DICOM file of several frames, or ``all``: items ``path#1``, ``path#2``, ..., one group.
        trust_code: whether a network ``package.module:factory`` may be loaded, which runs that module.
        cluster: where to predict instead of here, as `featurepipe.execution.connect` takes it: the workers see the bundle and
            the source under the same paths, and this process writes the file.
        raw_ids: whether texts of a CSV file that a spreadsheet would take for formulas stay as they are.
        top: how many classes of each image to write, the most probable first, in place of a column for each class; by default
            5 with ``backbone``, else None, which is all.
        silent: show no progress and say nothing.

    Returns:
        The record of the run as JSON values: ``weights_note`` (what was ignored or guessed of a file of weights), ``counts``,
        ``labels`` (images by label), ``target`` and ``numbers`` (of a bundle that predicts one: what it is, and the mean, least
        and greatest), ``neutralised`` (cells of a CSV file that got an apostrophe, see `featurepipe.display`),
        ``rejects`` (the first of them; the file has all), ``damaged`` (the first of those kept), seconds, versions;
        ``exit_code`` is 3 if there were rejects.

    Raises:
        UsageError: an argument is wrong, or ``backbone`` has no classes of its own.
        BundleError: the bundle cannot be used, or the network gives other features here.
        SourceError: the source cannot be listed, or holds no image.
        TooManyRejects: more images were unusable than ``max_rejects``; the file is there, with all others predicted.
        Interrupted: SIGINT or SIGTERM; no file is left.
    """
    options = PredictOptions(
        backbone=backbone,
        weights=weights,
        device=device,
        batch_size=batch_size,
        workers=workers,
        engine=engine,
        max_rejects=max_rejects,
        damaged=damaged,
        only_under=places(only_under),
        path_column=path_column,
        box=box,
        box_unit=box_unit,
        box_margin=box_margin,
        images=None if images is None else str(images),
        frames=frames,
        trust_code=trust_code,
        raw_ids=raw_ids,
        top=top,
    )
    if (bundle is None) == (backbone is None) or source is None:
        raise UsageError(
            Message("give the images and either a bundle or a network as it is, with ", Option("backbone", "NAME"))
        )
    # Refused before any work, as are wrong options.
    target = None if to is None else checked_target(to, spared=[bundle, source])
    started = records.now()
    say = announcer(silent=silent)
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        with stop.at_once("the first image"):
            executor = stack.enter_context(executor_on(cluster, say=say))
            if bundle is not None:
                model: Prediction | OwnClassifier = Prediction.of(executor, bundle, BundleOptions.of(options))
            else:
                model = OwnClassifier.of(str(backbone), options)
            found = stack.enter_context(closing(opened(source, options)))
            listing = found.scan().combine_chunks()
        summary = ListingSummary.of(listing)
        for line in summary.lines(found.name, labels=False):
            say(line)
        if not listing.num_rows:
            raise SourceError(f"no images in {found.name}: nothing there has the suffix of an image. Check the path")
        with stop.at_once("the first image"):
            own = isinstance(model, OwnClassifier)
            prediction = (
                model.prediction(executor, found, listing, options, say) if isinstance(model, OwnClassifier) else model
            )
        top = options.top or (min(TOP, len(prediction.bundle.classes)) if own else None)
        check_top(top, prediction.bundle)
        with show(listing.num_rows, "predict", silent=silent) as progress:
            run = partial(prediction.run, found, listing, stop, progress)
            # ids of a manifest's own may differ from its paths, and the written file is to be a manifest again
            path_of = found.written_path if type(found) is ManifestSource else None
            predictions = _write_all(
                run, listing, prediction.bundle, target, stop, raw_ids=raw_ids, top=top, path_of=path_of
            )
    record = {
        "command": "predict",
        "bundle": None if bundle is None else bundle.family if isinstance(bundle, Bundle) else str(bundle),
        "source": found.location,
        **bounds_of(found),
        "options": as_asked(options),
        "listing": summary.as_dict(),
        "file": None if target is None else str(target),
        "neutralised": predictions.neutralised,
        "started": started,
        "ended": records.now(),
        "damaged": kept_damaged(options.damaged, listing["id"], predictions.damage),
        **remarked(predictions.remarks),
        **_describe(prediction, listing, predictions, own=own),
        **({} if top is None else {"top": top}),
    }
    rejected, listed = len(predictions.reasons), listing.num_rows
    if rejected > allowance(options.max_rejects, listed):
        first = min(predictions.reasons)
        written = f"{target} holds all predictions and reasons" if target else "nothing was written"
        raise TooManyRejects(
            Message(
                f"{rejected:,} of {listed:,} images could not be used, more than ",
                Option("max_rejects", options.max_rejects),
                f" allows; first: {listing['id'][first].as_py()}: {predictions.reasons[first]}; {written}. To accept them: ",
                Option("max_rejects", rejected),
            ),
            record={**record, "status": "failed", "exit_code": TooManyRejects.exit_code},
        )
    return {**record, "status": "done", "exit_code": 3 if rejected else 0}


def _write_all(
    run: Callable[[Callable[[Scored], None]], None],
    listing: pa.Table,
    bundle: Bundle,
    target: Path | None,
    stop: StopRequest,
    *,
    raw_ids: bool,
    top: int | None,
    path_of: Callable[[bytes], str | None] | None,
) -> Predictions:
    """Writes and counts rows as they come, in the listing's order; the file appears when all are there."""
    predictions, start, ids = Predictions(), time.perf_counter(), listing["id"]
    regions = target is not None and has_regions(listing)
    with ExitStack() as stack:
        write = None
        if target is not None:
            columns = columns_for(bundle, top)
            write = stack.enter_context(predictions_file(target, columns, raw_ids=raw_ids, regions=regions))

        def take(rows: Scored) -> None:
            predictions.add(rows)
            if write is not None:
                began = time.perf_counter()
                batch = rows.rows_of_file(ids, bundle, top)
                if regions:
                    batch = with_regions(batch, listing["locator"].take(pa.array(rows.numbers)).to_pylist(), path_of)
                write(batch)
                predictions.writing += time.perf_counter() - began

        run(take)
        if stop():
            done = f"{predictions.predicted:,} of {len(ids):,} images were predicted"
            raise Interrupted(f"stopped by {stop.name}: {done}, and no file was written", stop.signal_number or 2)
        predictions.neutralised = 0 if write is None else write.neutralised
    predictions.wall = time.perf_counter() - start
    return predictions


def _describe(prediction: Prediction, listing: pa.Table, predictions: Predictions, *, own: bool) -> dict[str, Any]:
    bundle, facts = prediction.bundle, prediction.facts(predictions.wall)
    scoring = facts["seconds"].get(SCORE, 0.0) + predictions.writing
    seconds = {**facts["seconds"], SCORE: scoring, "wall": predictions.wall}
    return {
        "backbone": bundle.backbone["name"],
        "weights_note": prediction.weights_note,
        "fingerprint": bundle.fingerprint,
        "columns": list(bundle.columns),
        "precision": bundle.space["precision"],
        "family": bundle.family,
        "classes": list(bundle.classes),
        "temperature": bundle.temperature,
        **({} if bundle.threshold is None else {"threshold": bundle.threshold}),
        **facts,
        "counts": {
            "listed": listing.num_rows,
            "predicted": predictions.predicted,
            "rejected": len(predictions.reasons),
        },
        "labels": {
            name: predictions.labels[code]
            for code, name in enumerate(bundle.classes)
            if predictions.labels[code] or not own
        },
        **({} if bundle.target is None else {"target": bundle.target}),
        **({"numbers": predictions.estimates.as_dict()} if bundle.target_type == CONTINUOUS else {}),
        "rejects": named(listing["id"], predictions.reasons)[:SHOWN_REJECTS],
        "reject_reasons": by_code(predictions.reasons),
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
        "images_per_second": round(predictions.predicted / predictions.wall, 2),
        "versions": records.versions(),
        "host": records.host(),
    }


def text(record: Mapping[str, Any]) -> str:
    """Sums up the record that `predict` returns."""
    counts, seconds = record["counts"], record["seconds"]
    lines = [f"{counts['listed']:,} images listed, {counts['predicted']:,} predicted, {counts['rejected']:,} rejected"]
    given = sorted(((count, name) for name, count in record["labels"].items() if count), reverse=True)
    if given:
        shown = ", ".join(f"{name} ({count:,})" for count, name in given[:_LABELS_SHOWN])
        lines.append(shown + (", ..." if len(given) > _LABELS_SHOWN else ""))
    if record.get("threshold"):
        lines.append(f"threshold: {threshold_text(record['threshold'])}")
    if (target := record.get("target") or {}).get("type") == MULTILABEL:
        lines.append(f"labels: {labels_calibration_text(target['calibration'])}")
    if record.get("numbers"):
        interval = record["target"]["interval"]
        of = f"; {interval_text(interval)}" if interval else ""
        lines.append(f"{record['target']['column']}: {range_text(record['numbers'])}{of}")
    if record["rejects"]:
        lines.append("rejected: " + ", ".join(f"{count} {code}" for code, count in record["reject_reasons"].items()))
        lines += [f"  {reject['id']}: {reject['reason']}" for reject in record["rejects"][:_REJECTS_SHOWN]]
        if counts["rejected"] > _REJECTS_SHOWN:
            lines.append("  ..." + (f" all in {record['file']}" if record["file"] else ""))
    lines += damaged_lines(record) + remark_lines(record)
    stages = ", ".join(f"{name} {took(seconds[name])}" for name in ("read", "decode", "forward", "score"))
    lines.append(f"{took(seconds['wall'])} at {record['images_per_second']:,.1f} img/s ({stages})")
    if record.get("cluster"):
        workers = record["cluster"]["workers"]
        shown = ", ".join(f"{worker['worker']} {worker['images']:,} images" for worker in workers[:_WORKERS_SHOWN])
        lines.append(
            f"{len(workers)} worker{'s' * (len(workers) != 1)}: {shown}{', ...' * (len(workers) > _WORKERS_SHOWN)}"
        )
    lines.append(record["verdict"])
    if record["file"]:
        lines.append(f"file {record['file']}")
        lines += [said] if (said := neutralised_text(record.get("neutralised", 0), record["file"])) else []
    return "\n".join(lines)
