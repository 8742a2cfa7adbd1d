"""A bundle's predictions on features that a store holds already: no image is read and no network runs."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from featurepipe.display import first_names
from featurepipe.errors import BundleError, UsageError
from featurepipe.execution.local import features_at
from featurepipe.heads.bundle.bundle import Bundle, read_bundle
from featurepipe.heads.bundle.files import CONTINUOUS, MULTILABEL
from featurepipe.images.intensity import intensity_of
from featurepipe.prediction.files import (
    NumberSummary,
    check_top,
    checked_target,
    classes_batch,
    columns_for,
    labels_batch,
    numbers_batch,
    predictions_file,
)
from featurepipe.progress import announcer, show
from featurepipe.store import FeatureStore, Space, differences
from featurepipe.store.choice import is_mirrored
from featurepipe.store.locks import starts_again
from featurepipe.store.snapshots import OK

if TYPE_CHECKING:
    from featurepipe.store.views import FeatureSet


BLOCK_BYTES = 64 * 1024 * 1024
"""Features and scores that are in memory at once."""
MOST_ROWS = 65_536
"""Rows that are scored at once, and that a row group of a Parquet file holds."""

Positions = npt.NDArray[np.int64] | npt.NDArray[np.bool_]


@starts_again
def predict_features(
    bundle: Bundle | str | os.PathLike[str],
    store: FeatureStore | str | os.PathLike[str],
    to: str | os.PathLike[str] | None = None,
    *,
    dataset: str | None = None,
    snapshot: str | None = None,
    rows: Positions | None = None,
    spared: Sequence[Any] = (),
    cluster: Any = None,
    raw_ids: bool = False,
    top: int | None = None,
    silent: bool = False,
) -> dict[str, Any]:
    """Predicts the images of a dataset's snapshot from their stored features, in blocks of bounded memory.

    The file is that of `featurepipe.prediction.predict.predict` on the same images: one row for each, in the order of the
    snapshot, those that could not be used with their reason alone. The probabilities are the same up to the rounding of
    stored features. It appears when it is complete and not before, and replaces an older one.

    Args:
        bundle: the bundle or its folder.
        store: the feature store or its path.
        to: the file to write, ``.parquet``, ``.csv`` or ``.jsonl``, in a folder that exists; None only counts.
        dataset: name of the dataset; by default the store's only one.
        snapshot: one of ``snapshot_ids(dataset)``; by default the current one.
        rows: which rows of the snapshot, as ascending positions or a mask (n,); by default all.
        spared: further files that must not be replaced, such as the source of the images.
        cluster: where to score instead of here, as `featurepipe.execution.connect` takes it; the file is written here.
        raw_ids: whether texts of a CSV file that a spreadsheet would take for formulas stay as they are.
        top: write the most probable classes of each image, so many, in place of a column for each class.
        silent: show no progress.

    Returns:
        JSON values: ``bundle``, ``dataset``, ``snapshot``, ``file``, ``neutralised`` (cells of a CSV file that got an
        apostrophe), ``counts`` (images, predicted, rejected), ``labels`` (images by label; of several an image counts for
        each), ``numbers`` (of a bundle that predicts a number: their mean, least and greatest), ``threshold``
        (of two classes, if the bundle has one), ``target`` (of a bundle that predicts a number or several labels: what it is,
        with the labels' thresholds), ``seconds``, ``images_per_second``.

    Raises:
        BundleError: the bundle cannot be used, or the store has no features of its feature space.
        StoreError: features of some images are missing.
        UsageError: the dataset or snapshot is unknown, or no file can be written there.
        ClusterError: there is no such cluster, or none of its workers can be used.
    """
    start = time.perf_counter()
    model = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
    source = store if isinstance(store, FeatureStore) else FeatureStore(store, create=False)
    check_top(top, model)
    target = None if to is None else _checked_target(to, source, [bundle, *spared])
    name = dataset or source.only_dataset()
    run_id = snapshot or next(reversed(source.snapshot_ids(name)), None)  # another run may write one meanwhile
    features = features_for(model, source, name, run_id)
    snapshot_rows: Any = source.snapshot(name, run_id, columns=("id", "status", "reason"))
    chosen = np.arange(snapshot_rows.num_rows)[slice(None) if rows is None else rows]
    counts = np.zeros(max(1, len(model.classes)), np.int64)
    numbers, predicted = NumberSummary(), 0
    with ExitStack() as stack:
        there = stack.enter_context(features_at(cluster, features, source, announcer(silent=silent)))
        images = _Images(snapshot_rows, there)
        write = (
            stack.enter_context(predictions_file(target, columns_for(model, top), raw_ids=raw_ids)) if target else None
        )
        progress = stack.enter_context(show(len(chosen), "predict", silent=silent))
        for block in _blocks(chosen, model):
            if model.target_type == MULTILABEL:
                usable, having, batch = images.labelled(block, model)
                predicted, counts = predicted + usable, counts + having
            else:
                if model.target_type == CONTINUOUS:
                    codes, batch = images.estimated(block, model, numbers)
                else:
                    codes, batch = images.scored(block, model, top)
                counts += np.bincount(codes[codes >= 0], minlength=len(counts))
                predicted += int((codes >= 0).sum())
            if write is not None:
                write(batch)
            progress.advance(len(block))
    seconds = time.perf_counter() - start
    return {
        "bundle": None if isinstance(bundle, Bundle) else os.fspath(bundle),
        "dataset": name,
        "snapshot": run_id,
        "file": None if target is None else str(target),
        "neutralised": 0 if write is None else write.neutralised,
        "counts": {"images": len(chosen), "predicted": predicted, "rejected": len(chosen) - predicted},
        "labels": {name: int(count) for name, count in zip(model.classes, counts, strict=False) if count},
        **({"numbers": numbers.as_dict()} if model.target_type == CONTINUOUS else {}),
        **({} if model.threshold is None else {"threshold": model.threshold}),
        **({} if model.target is None else {"target": model.target}),
        "seconds": round(seconds, 3),
        "images_per_second": round(predicted / seconds, 1),
    }


class _Images:
    """The rows of a snapshot, of which the usable ones have features."""

    def __init__(self, snapshot: pa.Table, features: Any) -> None:
        usable = pc.equal(snapshot["status"], OK).to_numpy()
        self._facts = snapshot.select(["id", "reason"])
        self._features = features
        self._place = np.where(usable, np.cumsum(usable) - 1, -1)

    def __len__(self) -> int:
        return len(self._place)

    def scored(
        self, rows: npt.NDArray[np.int64], bundle: Bundle, top: int | None
    ) -> tuple[npt.NDArray[np.int64], pa.RecordBatch]:
        """The class of each row (-1 without features), and the rows of the file."""
        place = self._place[rows]
        usable = place >= 0
        probabilities = np.full((len(rows), len(bundle.classes)), np.nan, np.float32)
        codes = np.full(len(rows), -1, np.int64)
        if usable.any():
            exact = bundle.probabilities(self._features.take(place[usable]))
            probabilities[usable] = exact
            codes[usable] = bundle.codes(exact)
        ids, reasons = (self._facts[name].take(rows).combine_chunks() for name in ("id", "reason"))
        return codes, classes_batch(ids, probabilities, codes, reasons, bundle.classes, top)

    def estimated(
        self, rows: npt.NDArray[np.int64], bundle: Bundle, summary: NumberSummary
    ) -> tuple[npt.NDArray[np.int64], pa.RecordBatch]:
        """Of a bundle that predicts a number: 0 for each row, -1 for one without features, and the rows of the file."""
        place = self._place[rows]
        usable = place >= 0
        numbers = np.full(len(rows), np.nan)
        if usable.any():
            numbers[usable] = bundle.numbers(self._features.take(place[usable]))
        summary.add(numbers[usable])
        ids, reasons = (self._facts[name].take(rows).combine_chunks() for name in ("id", "reason"))
        return np.where(usable, 0, -1), numbers_batch(ids, numbers, reasons, bundle.half_width)

    def labelled(
        self, rows: npt.NDArray[np.int64], bundle: Bundle
    ) -> tuple[int, npt.NDArray[np.int64], pa.RecordBatch]:
        """Of a bundle that predicts several labels: how many rows have features, how many have each label, and the file's."""
        place = self._place[rows]
        usable = place >= 0
        scores = np.full((len(rows), len(bundle.classes)), np.nan)
        if usable.any():
            scores[usable] = bundle.scores(self._features.take(place[usable]))
        ids, reasons = (self._facts[name].take(rows).combine_chunks() for name in ("id", "reason"))
        having = (scores > bundle.thresholds).sum(axis=0)
        return int(usable.sum()), having, labels_batch(ids, scores, reasons, bundle)


def _blocks(rows: npt.NDArray[np.int64], bundle: Bundle) -> Iterator[npt.NDArray[np.int64]]:
    """Rows that are scored together: float32 features, and scores in float64 and again in float32."""
    step = BLOCK_BYTES // (4 * bundle.width + 24 * len(bundle.classes))
    step = min(MOST_ROWS, max(16, step))
    return (rows[start : start + step] for start in range(0, len(rows), step))


def _checked_target(to: str | os.PathLike[str], store: FeatureStore, spared: Sequence[Any]) -> Path:
    """The file, which must be none of those to be spared and not in the store."""
    path = checked_target(to, spared=spared)
    if path.resolve().is_relative_to(store.path.resolve()):
        raise UsageError(f"cannot write predictions to {path}: it is inside the store {store.path}; name another place")
    return path


def features_for(bundle: Bundle, store: FeatureStore, dataset: str, snapshot: str | None = None) -> FeatureSet:
    """Opens the bundle's columns of a dataset, in the bundle's feature space and no other.

    Raises:
        BundleError: the store has no features of that space; says which it has and how to compute them.
        StoreError: features of some images are missing.
        UsageError: the dataset or snapshot is unknown.
    """
    spaces = store.spaces()
    if dataset in store.datasets() and bundle.fingerprint not in {space.fingerprint for space in spaces}:
        raise BundleError(*_no_such_space(bundle, store, spaces, dataset))
    features = store.features(dataset, node=list(bundle.columns), backbone=bundle.fingerprint, snapshot=snapshot)
    bundle.check(features)
    return features


def _no_such_space(bundle: Bundle, store: FeatureStore, spaces: list[Space], dataset: str) -> list[str]:
    name = bundle.backbone["name"]
    lines = [
        f"the bundle is for features of the space {name}-{bundle.fingerprint[:12]}, and {store.path} has none of that space; "
        "scores on others would mean nothing. It has:"
    ]
    lines += [f"  {space.name}, which differs in {_differing(bundle, space)}" for space in spaces] or [
        "  no space at all"
    ]
    tuning = bundle.training.get("tuning")
    is_tail = tuning is not None and "augmentation" not in tuning  # layers above a node, from stored activations
    kept = ["or tune again with --store-features, which keeps them in the store of the activations"] if is_tail else []
    return [*lines, f"compute them with: {_command(bundle, store, dataset)}", *kept]


def _differing(bundle: Bundle, space: Space) -> str:
    return first_names(differences(bundle.space, space.fields), 4, what="fields")


def _command(bundle: Bundle, store: FeatureStore, dataset: str) -> str:
    """The ``featurepipe extract`` that computes what the bundle needs; only SOURCE is left to the user."""
    about = bundle.backbone
    words = ["featurepipe", "extract", "SOURCE", "--store", str(store.path), "--dataset", dataset]
    words += ["--backbone", about["name"]]
    words += ["--weights", str(bundle.weights_file or "FILE") if about["weights"] == "file" else about["weights"]]
    words += ["--seed", str(about["seed"])] if about["weights"] == "none" else []
    for option in ("precision", "dtype", "decode"):
        words += [f"--{option}", str(bundle.space[option])] if option in bundle.space else []
    words += ["--intensity", intensity_of(bundle.space["decoding"])] if "decoding" in bundle.space else []
    for column in bundle.columns:
        words += ["--node", column]
    words += ["--mirrored"] if is_mirrored(bundle.space) else []
    return shlex.join(words)
