"""Train a head, tune layers, and predict with what came of it: the images of this run, and which of them are new."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from featurepipe.display import counted, neutralised_text
from featurepipe.jobs.job import FinetuneTable, PredictTable, TrainTable
from featurepipe.jobs.step import Night, within_time
from featurepipe.jobs.steps.history import last_snapshot


def train(night: Night, table: TrainTable) -> dict[str, Any]:
    """Trains a head, if what it learns from is not what its bundle was trained on, or always.

    The older bundle stays until the new one is complete. Labels are those of the table's file, else of the source's, else
    the images' own.
    """
    from featurepipe.training.train import train as run

    found = _learned(night, table, run, "the older bundle stays, and the next run trains")
    return _skipped(found) if "skipped" in found else _told(found)


def finetune(night: Night, table: FinetuneTable) -> dict[str, Any]:
    """Tunes layers, if what they learn from is not what the bundle was tuned on, or always; see `train`.

    A tuning that the end of the night breaks off goes on from its last checkpoint in the next run.
    """
    from featurepipe.tuning.finetune import finetune as run

    found = _learned(night, table, run, "the older bundle stays, and the next run goes on from the last checkpoint")
    if "skipped" in found:
        return _skipped({name: value for name, value in found.items() if name != "stored_features"})
    told, tuning = _told(found), found["tuning"]
    where = "from images" if tuning["from"] == "images" else f"above {tuning['from']}"
    how = f"{tuning['mix']:.0%} of the weights tuned {where}" if tuning["mix"] else "tuning gained nothing"
    return {**told, "from": tuning["from"], "mix": tuning["mix"], "text": f"{told['text']}; {how}"}


def _learned(
    night: Night, table: TrainTable | FinetuneTable, run: Callable[..., dict[str, Any]], late: str
) -> dict[str, Any]:
    """What `featurepipe.train` or `featurepipe.finetune` gives for a table; ``late`` says what becomes of one that time ends."""

    def work() -> dict[str, Any]:
        return run(
            night.store,
            dataset=night.dataset,
            snapshot=snapshot_of(night, table.backbone),
            out=table.out,
            backbone=table.backbone,
            labels=table.labels or night.job.source.labels,
            **table.arguments(),
            weights=own_weights(night),
            trust_code=night.job.networks,
            if_changed=table.when == "labels changed",
            silent=night.silent,
            cluster=night.executor(),
        )

    return within_time(night.stop.deadline, work, late)


def own_weights(night: Night) -> dict[str, str]:
    """The weights files of the user's own, by feature space: bundles take them along, as they must predict elsewhere."""
    return {
        run["fingerprint"]: features.weights
        for run, features in zip(night.extracted, night.job.features, strict=False)
        if str(run["backbone"].get("weights", "")).startswith("file:")
    }


def _skipped(found: dict[str, Any]) -> dict[str, Any]:
    """A training that need not be, or that time ended; classes that the bundle does not learn are said each night."""
    return {**found, "warnings": _left_out(found)} if found.get("left_out") else found


def _left_out(found: dict[str, Any]) -> list[str]:
    from featurepipe.training.text import left_out_text

    return [left_out_text(found["left_out"])] if found.get("left_out") else []


def _told(found: dict[str, Any]) -> dict[str, Any]:
    """What the run record keeps of a training; the bundle keeps all of it."""
    from featurepipe.training.text import replaced_text

    names = ("bundle", "backbone", "columns", "head", "params", "counts", "why", "seconds", "lost_classes", "left_out")
    what = "with a number" if "target" in found else f"of {len(found['classes']):,} classes"
    what = f"with {counted(len(found['multilabel']), 'label')}" if "multilabel" in found else what
    images = f"{counted(found['counts']['train'], 'image')} {what}"
    told = {name: found[name] for name in names if name in found}
    told["warnings"] = [*([replaced_text(found)] if found.get("lost_classes") else []), *_left_out(found)]
    if not found["test"]:
        return {**told, "text": f"trained on {images}; no test images"}
    if "multilabel" in found:
        precision = found["test"]["map"]
        quality = "" if precision["value"] is None else f"; mean average precision {precision['value']:.4f}"
        text = f"trained on {images}{quality} on {counted(found['test']['images'], 'test image')}"
        return {**told, "map": precision, "text": text}
    if "target" in found:
        error, r2 = found["test"]["mae"], found["test"]["r2"]
        explained = "" if r2["value"] is None else f", R2 {r2['value']:.4f}"
        tested = counted(found["test"]["images"], "test image")
        text = f"trained on {images}; mean absolute error {error['value']:.4g}{explained} on {tested}"
        return {**told, "mae": error, "r2": r2, "text": text}
    accuracy = found["test"]["accuracy"]
    text = f"trained on {images}; {accuracy['value']:.4f} right of {counted(found['test']['images'], 'test image')}"
    return {**told, "accuracy": accuracy, "text": text}


COMPARED = ("id", "key", "status")
"""Columns of a snapshot that tell what is new."""


def predict(night: Night, table: PredictTable) -> dict[str, Any]:
    """Writes a bundle's predictions for the images that are new since it predicted last, or for all.

    New is what has no prediction yet: all images if the table never predicted, else ids that were not there, and ids with
    other bytes or another status. If the step failed in the previous run, that run's images are still new. A second run on
    one date writes a second file beside the first (``2026-11-22-2.parquet``).
    """
    from featurepipe.heads.bundle.bundle import read_bundle
    from featurepipe.prediction.from_store import predict_features

    bundle = read_bundle(table.bundle)
    snapshot = snapshot_of(night, bundle.fingerprint)
    about = {"bundle": str(table.bundle), "to": table.to, "snapshot": snapshot}
    rows: npt.NDArray[np.bool_] | None = None
    warnings: Sequence[str] = ()
    if table.images == "new":
        places = {"bundle": str(table.bundle), "to": table.to}
        last = last_snapshot(night, "predict", places=places, made="predicted")
        before = None if last.snapshot is None else night.store.snapshot(night.dataset, last.snapshot, columns=COMPARED)
        rows = new_images(night.store.snapshot(night.dataset, snapshot, columns=COMPARED), before)
        warnings = last.warnings
        if not rows.any():
            return {**about, "skipped": "no new images"}
    file = night.place(table)
    file.parent.mkdir(parents=True, exist_ok=True)
    spared = [table.bundle, night.job.source.path, night.job.source.labels, *(t.labels for t in night.job.train)]
    found = predict_features(
        bundle, night.store, file, dataset=night.dataset, snapshot=snapshot, rows=rows, spared=spared,
        silent=night.silent, cluster=night.executor(), **table.arguments(),
    )  # fmt: skip
    counts = found["counts"]
    unusable = f" ({counts['rejected']:,} more could not be used)" if counts["rejected"] else ""
    done = "estimated" if bundle.target_type == "continuous" else "labelled"
    said = neutralised_text(found["neutralised"], file.name)
    return {
        **found,
        **about,
        "warnings": [*warnings, *([said] if said else [])],
        "text": f"{counted(counts['predicted'], 'image')} {done}{unusable}, in {night.job.named(file)}",
    }


def snapshot_of(night: Night, network: str | None) -> str:
    """The snapshot of this run's extraction of a feature space, by its fingerprint, name or network; else the last one.

    Every extraction of a night has a snapshot of its own, and only that is sure to have all features of its space.
    """
    run = extraction_of(night, network)
    return str(run["run_id"]) if run else night.store.snapshot_ids(night.dataset)[-1]


def extraction_of(night: Night, network: str | None) -> dict[str, Any] | None:
    """The record of this run's extraction of a feature space; see ``snapshot_of``. None if nothing was extracted."""
    run: dict[str, Any]
    for run in reversed(night.extracted):
        names = (run["fingerprint"], run["space"], run["backbone"]["name"])
        if network is None or network in names or run["fingerprint"].startswith(network):
            return run
    return night.extracted[-1] if night.extracted else None


def new_images(now: pa.Table, before: pa.Table | None) -> npt.NDArray[np.bool_]:
    """Which rows of a snapshot are new since another: (n,) mask of other ids, other bytes, or another status."""
    if before is None or not before.num_rows:
        return np.ones(now.num_rows, np.bool_)
    place = pc.index_in(now["id"], value_set=before["id"].combine_chunks())
    earlier = before.select(["key", "status"]).take(place)  # nulls where there is none
    same_key = pc.fill_null(pc.equal(now["key"], earlier["key"]), fill_value=False)
    same_key = pc.or_(same_key, pc.and_(now["key"].is_null(), earlier["key"].is_null()))
    same = pc.and_(same_key, pc.equal(now["status"], earlier["status"]))
    found: npt.NDArray[np.bool_] = ~pc.fill_null(same, fill_value=False).to_numpy()
    return found
