"""From a bundle and cached features to metrics with intervals, and what is to be known before they are believed."""

from __future__ import annotations

import os
import shlex
import time
from typing import TYPE_CHECKING, Any

from featurepipe.errors import BundleError
from featurepipe.evaluation import leakage
from featurepipe.evaluation.rows import Chosen, choose_rows
from featurepipe.heads.bundle.bundle import Bundle, read_bundle
from featurepipe.heads.metrics import score_table
from featurepipe.progress import announcer
from featurepipe.store import FeatureStore, Space, differences

if TYPE_CHECKING:
    from featurepipe.store.views import FeatureSet


def evaluate(
    bundle: Bundle | str | os.PathLike[str],
    store: FeatureStore | str | os.PathLike[str],
    *,
    dataset: str | None = None,
    split: str | None = None,
    labels: Any = None,
    ignore_unknown_classes: bool = False,
    bootstrap: int = 1000,
    seed: int = 0,
    silent: bool = False,
) -> dict[str, Any]:
    """Scores a bundle on the cached features of a dataset; features are read block by block.

    Args:
        bundle: The bundle or its folder.
        store: The feature store or its path.
        dataset: Name of the dataset; by default the store's only one.
        split: Which rows: a split's name, or ``all``. By default ``test`` if the dataset has that split, else the images
            that the head was not trained on, else all.
        labels: A mapping or file to use instead of the dataset's labels, as in ``FeatureSet.with_labels``.
        ignore_unknown_classes: Leave out images whose label the bundle does not know, instead of refusing.
        bootstrap: Resamples behind each 95 % interval; 0 for no intervals.
        seed: Of the resamples.
        silent: Say nothing on standard error.

    Returns:
        JSON values: ``bundle``, ``dataset``, ``split`` (null if not one split) and ``scope`` (the same in words),
        ``counts`` (images, scored, unlabelled, unknown_classes, unmatched labels, rejected, duplicates), ``metrics``
        (``featurepipe.heads.metrics.score_table``), ``leakage`` (``trained_on`` and ``leakage.report`` of the whole
        dataset), ``seconds``.

    Raises:
        BundleError: The bundle cannot be used, or the store has no features of its feature space.
        StoreError: Features of some images are missing.
        UsageError: The dataset or split is unknown, nothing is labelled, or labels are not among the bundle's classes.
    """
    started = time.monotonic()
    say = announcer(silent=silent)
    model = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
    source = store if isinstance(store, FeatureStore) else FeatureStore(store, create=False)
    name = dataset or source.only_dataset()
    features = _features(model, source, name)
    if labels is not None:
        features = features.with_labels(labels)
    chosen = choose_rows(model, features, split, ignore_unknown_classes=ignore_unknown_classes)
    say(f"scoring {len(chosen.codes):,} images of dataset {name}: {chosen.scope}")
    probabilities = model.probabilities(chosen.features)
    metrics = score_table(
        probabilities, chosen.codes, model.classes, ids=chosen.features.ids, bootstrap=bootstrap, seed=seed
    )
    correct = probabilities.argmax(axis=1) == chosen.codes
    return {
        "bundle": _about(model, bundle),
        "dataset": name,
        "split": chosen.split,
        "scope": chosen.scope,
        "counts": _counts(chosen),
        "metrics": metrics,
        "leakage": {
            "trained_on": leakage.trained_on(chosen.features, model.seen, correct),
            **leakage.report(features),
        },
        "seconds": round(time.monotonic() - started, 3),
    }


def _features(bundle: Bundle, store: FeatureStore, dataset: str) -> FeatureSet:
    """Opens the bundle's columns of a dataset, in the bundle's space and no other."""
    spaces = store.spaces()
    if dataset in store.datasets() and bundle.fingerprint not in {space.fingerprint for space in spaces}:
        raise BundleError(_no_such_space(bundle, store, spaces, dataset))
    features = store.features(dataset, node=list(bundle.columns), backbone=bundle.fingerprint)
    bundle.check(features)
    return features


def _no_such_space(bundle: Bundle, store: FeatureStore, spaces: list[Space], dataset: str) -> str:
    name = bundle.backbone["name"]
    lines = [
        f"the bundle is for features of the space {name}-{bundle.fingerprint[:12]}, and {store.path} has none of that space; "
        "scores on others would mean nothing. It has:"
    ]
    lines += [f"  {space.name}, which differs in {_differing(bundle, space)}" for space in spaces] or [
        "  no space at all"
    ]
    return "\n".join([*lines, f"compute them with: {_command(bundle, store, dataset)}"])


def _differing(bundle: Bundle, space: Space) -> str:
    names = differences(bundle.space, space.fields)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more fields" if len(names) > 4 else "")


def _command(bundle: Bundle, store: FeatureStore, dataset: str) -> str:
    """The ``featurepipe extract`` that computes what the bundle needs; only SOURCE is left to the user."""
    about = bundle.backbone
    words = ["featurepipe", "extract", "SOURCE", "--store", str(store.path), "--dataset", dataset]
    words += ["--backbone", about["name"]]
    words += ["--weights", "FILE" if about["weights"] == "file" else about["weights"]]
    words += ["--seed", str(about["seed"])] if about["weights"] == "none" else []
    for option in ("precision", "dtype", "decode"):
        words += [f"--{option}", str(bundle.space[option])] if option in bundle.space else []
    for column in bundle.columns:
        words += ["--node", column]
    return shlex.join(words)


def _about(bundle: Bundle, given: Bundle | str | os.PathLike[str]) -> dict[str, Any]:
    return {
        "path": None if isinstance(given, Bundle) else os.fspath(given),
        "head": bundle.family,
        "backbone": bundle.backbone["name"],
        "columns": list(bundle.columns),
        "fingerprint": bundle.fingerprint,
        "classes": len(bundle.classes),
        "temperature": bundle.temperature,
    }


def _counts(chosen: Chosen) -> dict[str, Any]:
    return {
        "images": chosen.images,
        "scored": len(chosen.codes),
        "unlabelled": chosen.unlabelled,
        "unknown_classes": chosen.unknown,
        "unmatched": chosen.features.unmatched,
        "rejected": chosen.features.rejected,
        "duplicates": chosen.features.duplicates,
    }
