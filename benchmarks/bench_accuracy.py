"""How well frozen features tell classes apart: a table of columns and heads, all chosen on validation images.

``python -m benchmarks.bench_accuracy --store DIR --dataset NAME --node COLUMN[+COLUMN...] ...``

The store must hold Fashion-MNIST (or any dataset with the splits train and test) with the columns asked for; make it with

    featurepipe extract FOLDER --store DIR --dataset NAME --backbone efficientnet_lite0 --node COLUMN ...

A sixth of the training images (every image with its copies) validates. Each head is fitted on the rest (xgboost on
20,000 of them) with its fixed parameters, except that logistic and linear-svm take the best of four C, fitted in shared
passes. The most accurate
combination on the validation images is then fitted on all training images and looks at the test images, once.

``--select`` does the same with all blocks side by side (``--node all``), of whose values a share is kept as ``featurepipe train
--select`` keeps it: values are scored on training images, and share, head and its parameters are chosen on validation images.
Heads are compared when fitted on ``--images`` of the training images; the result is added to the record of the table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record
from featurepipe.heads import fit_path, make_head, score_table
from featurepipe.heads.calibration import class_scores, probabilities
from featurepipe.heads.sampling import fold_numbers
from featurepipe.heads.selection import best_columns, column_scores, regression_targets
from featurepipe.records import now
from featurepipe.store import FeatureSet, FeatureStore
from featurepipe.training.selection import SCORED_ROWS
from featurepipe.training.settle import all_columns

COLUMNS = (
    "bottleneck",
    "blocks.10",
    "blocks.4+blocks.10+blocks.15",
    "blocks.10:avg3x3",
    "blocks.4:avg4x4+blocks.10:avg3x3",
    "blocks.4:avg4x4+blocks.10:avg3x3+blocks.15",
)
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)
HEADS: dict[str, dict[str, Any]] = {
    "logistic": {},
    "linear-svm": {},
    "ridge": {"alpha": 1000.0},
    "lda": {"shrinkage": 0.01},
    "centroid": {},
    "knn": {"n_neighbors": 10},
    "xgboost": {"n_estimators": 100, "max_depth": 6, "colsample_bytree": 0.1, "subsample": 0.8},
    "rbf-svm": {"C": 10.0, "exact_rows": 60_000},
}
SIXTH = 6
MEMORY = "4GB"
SELECTED: dict[str, list[dict[str, Any]]] = {
    "logistic": [{}],
    "rbf-svm": [{"C": 10.0, "exact_rows": 60_000}, {"C": 30.0, "exact_rows": 60_000}],
}
"""Heads on selected values; logistic takes the best of `STRENGTHS`."""
SELECTED_SHARES = (0.02, 0.05, 0.1, 0.2)
MOST = {"xgboost": 20_000}
"""Images that the table's fits take at most, where they take long; the fit that is tested takes all."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Fills the table, then tests the best."""
    if args.select:
        with tempfile.TemporaryDirectory() as folder:
            store = _tiny_store(Path(folder)) if args.tiny else FeatureStore(args.store, create=False)
            dataset = "clothes" if args.tiny else args.dataset
            found = selected(store, dataset, args.images, args.final_images)
        table = json.loads((record.RESULTS / "bench_accuracy.json").read_text())
        return {**table, "selected": {"when": now(), "machine": record.machine(), **found}}
    if args.tiny:
        with tempfile.TemporaryDirectory() as folder:
            return table_of(
                _tiny_store(Path(folder)), "clothes", ["blocks.10", "blocks.4+blocks.10"], ["logistic", "rbf-svm"]
            )
    store = FeatureStore(args.store, create=False)
    return table_of(store, args.dataset, args.node or COLUMNS, args.head or list(HEADS))


def table_of(store: FeatureStore, dataset: str, columns: Any, heads: list[str]) -> dict[str, Any]:
    """Validation accuracy of every head on every set of columns, and the test accuracy of the best."""
    rows = []
    for names in columns:
        features = store.features(dataset, node=names.split("+"), split="train")
        folds = fold_numbers(features.keys64, features.codes(), folds=SIXTH, seed=0)
        fitting, checking = features.take(folds != 0), features.take(folds == 0)
        for name in heads:
            start = time.perf_counter()
            some = fitting.take(np.sort(np.random.default_rng(0).permutation(len(fitting))[: MOST.get(name)]))
            params, accuracy = validated(name, some, checking)
            seconds = time.perf_counter() - start
            rows.append({"columns": names, "width": features.shape[1], "head": name, "params": params, "images": len(some),
                         "validation_accuracy": round(accuracy, 4), "seconds": round(seconds, 1)})  # fmt: skip
            record.note(f"{names} ({features.shape[1]}) {name} {params}: {accuracy:.4f} in {seconds:.1f} s")
    best = max(rows, key=lambda row: row["validation_accuracy"])
    return {
        "table": rows,
        "best": best,
        "test": tested(store, dataset, best),
        "promised": {"test accuracy": ">= 0.935"},
    }


def selected(store: FeatureStore, dataset: str, images: int | None, final_images: int | None) -> dict[str, Any]:
    """Validation accuracy of heads on shares of the values of all blocks, and the test accuracy of the best.

    Args:
        store: holds the features.
        dataset: its name.
        images: training images that compared heads are fitted on; None for all.
        final_images: training images that the tested head is fitted on; None for all.
    """
    start = time.perf_counter()
    columns = all_columns(store, dataset, None, record.note)
    features = store.features(dataset, node=columns, split="train")
    folds = fold_numbers(features.keys64, features.codes(), folds=SIXTH, seed=0)
    order = np.random.default_rng(0).permutation(np.flatnonzero(folds != 0))
    checking = np.flatnonzero(folds == 0)
    scored, fitting = np.sort(order[:SCORED_ROWS]), np.sort(order[:images])
    targets = regression_targets(features.take(scored).labels, features.classes)
    scores = column_scores(features.take(scored), targets, memory=MEMORY)
    seconds = {"scoring": round(time.perf_counter() - start, 1)}
    record.note(f"scored {len(scores):,} values on {len(scored):,} images in {seconds['scoring']} s")
    rows = []
    for share, (name, fixed) in product(SELECTED_SHARES, [(kind, one) for kind in SELECTED for one in SELECTED[kind]]):
        start = time.perf_counter()
        narrow = features.values_alone(best_columns(scores, share))
        params, accuracy = validated(name, narrow.take(fitting), narrow.take(checking), fixed)
        took = round(time.perf_counter() - start, 1)
        rows.append({"share": share, "width": narrow.shape[1], "head": name, "params": params, "images": len(fitting),
                     "validation_accuracy": round(accuracy, 4), "seconds": took})  # fmt: skip
        record.note(f"{share:g} ({narrow.shape[1]}) {name} {params}: {accuracy:.4f} in {took} s")
    best = max(rows, key=lambda row: row["validation_accuracy"])
    start = time.perf_counter()
    kept = best_columns(scores, best["share"])
    final = np.sort(np.random.default_rng(1).permutation(len(features))[:final_images])
    test = store.features(dataset, node=columns, split="test").values_alone(kept)
    found = measured(best, features.values_alone(kept).take(final), test)
    seconds |= {
        "choosing": round(sum(row["seconds"] for row in rows), 1),
        "testing": round(time.perf_counter() - start, 1),
    }
    return {
        "columns": columns, "width": len(scores), "scored_on": len(scored), "validation_images": len(checking), "table": rows,
        "best": best, "fitted_on": len(final), "test": found, "seconds": seconds, "promised": {"test accuracy": ">= 0.949"},
    }  # fmt: skip


def validated(
    name: str, fitting: FeatureSet, checking: FeatureSet, fixed: dict[str, Any] | None = None
) -> tuple[dict[str, Any], float]:
    """The parameters taken, and the accuracy on the validation images."""
    in_blocks = name in ("logistic", "linear-svm", "rbf-svm")
    params = HEADS[name] if fixed is None else fixed
    head = make_head(name, out_of_core=in_blocks, **params)
    if name not in ("logistic", "linear-svm"):
        data = (fitting, fitting.labels) if in_blocks else fitting.numpy()
        return params, accuracy_of(head.fit(*data), checking)
    head[-1].set_params(tol=1e-3)
    scaled = head[:-1].fit_transform(fitting)
    (path,) = fit_path(head[-1], scaled, fitting.labels, Cs=STRENGTHS)
    check = head[:-1].transform(checking.read(np.float32))
    accuracies = [float(np.mean(fitted.predict(check) == checking.labels)) for fitted in path]
    best = int(np.argmax(accuracies))
    return {"C": STRENGTHS[best]}, accuracies[best]


def accuracy_of(head: Any, features: FeatureSet) -> float:
    """Share of the images whose class the head names."""
    return float(np.mean(head.predict(features.read(np.float32)) == features.labels))


def tested(store: FeatureStore, dataset: str, best: dict[str, Any]) -> dict[str, Any]:
    """The best combination, fitted on all training images, on the test images."""
    training, test = (
        store.features(dataset, node=best["columns"].split("+"), split=split) for split in ("train", "test")
    )
    return measured(best, training, test)


def measured(best: dict[str, Any], training: FeatureSet, test: FeatureSet) -> dict[str, Any]:
    """A combination, fitted on the training images, on the test images."""
    in_blocks = best["head"] in ("logistic", "linear-svm", "rbf-svm")
    start = time.perf_counter()
    head = make_head(best["head"], out_of_core=in_blocks, **{**HEADS[best["head"]], **best["params"]})
    head.fit(training, training.labels) if in_blocks else head.fit(*training.numpy())
    seconds = time.perf_counter() - start
    scores = class_scores(head, test.read(np.float32))
    codes = test.codes(head.classes_)
    found = score_table(probabilities(scores), codes, list(head.classes_))
    return {
        "images": len(test),
        "fit_seconds": round(seconds, 1),
        **{k: found[k] for k in ("accuracy", "balanced_accuracy", "macro_f1")},
    }


def _tiny_store(folder: Path) -> FeatureStore:
    import featurepipe
    from featurepipe.extraction.extract import extract

    images = Path(featurepipe.__file__).parent / "data"
    extract(
        images,
        folder / "store",
        dataset="clothes",
        backbone="efficientnet_lite0",
        nodes=["blocks.4", "blocks.10"],
        silent=True,
    )
    return FeatureStore(folder / "store")


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of this benchmark."""
    parser.add_argument("--store", help="a feature store with the columns")
    parser.add_argument("--dataset", default="fashion-mnist")
    parser.add_argument("--node", action="append", help=f"columns, joined by + (default: {', '.join(COLUMNS)})")
    parser.add_argument("--head", action="append", choices=list(HEADS))
    parser.add_argument("--select", action="store_true", help="all blocks, a share of whose values is kept")
    parser.add_argument(
        "--images", type=int, help="with --select: training images that heads are compared on (default: all)"
    )
    parser.add_argument(
        "--final-images", type=int, help="with --select: that the tested head is fitted on (default: all)"
    )


if __name__ == "__main__":
    record.main("bench_accuracy", __doc__ or "", add, run)
