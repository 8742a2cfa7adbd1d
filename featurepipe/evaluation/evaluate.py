"""From a bundle and cached features to metrics with intervals, and what is to be known before they are believed."""

from __future__ import annotations

import os
import time
from typing import Any

from featurepipe.evaluation import leakage
from featurepipe.evaluation.rows import Chosen, choose_rows
from featurepipe.heads.bundle.bundle import Bundle, read_bundle
from featurepipe.heads.statistics.metrics import score_table
from featurepipe.prediction.from_store import features_at, features_for
from featurepipe.progress import announcer
from featurepipe.store import FeatureStore
from featurepipe.store.locks import starts_again
from featurepipe.store.views import with_told_labels


@starts_again
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
    cluster: Any = None,
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
        cluster: Where to score instead of here, as `featurepipe.execution.connect` takes it: workers read the features, and
            send scores back.
        silent: Say nothing on standard error.

    Returns:
        JSON values: ``bundle``, ``dataset``, ``split`` (null if not one split) and ``scope`` (the same in words),
        ``counts`` (images, scored, unlabelled, unknown_classes, unmatched labels, rejected, duplicates), ``metrics``
        (``featurepipe.heads.statistics.metrics.score_table``), ``leakage`` (``trained_on`` and ``leakage.report`` of the whole
        dataset), ``seconds``.

    Raises:
        BundleError: The bundle cannot be used, or the store has no features of its feature space.
        StoreError: Features of some images are missing.
        UsageError: The dataset or split is unknown, nothing is labelled, or labels are not among the bundle's classes.
        ClusterError: There is no such cluster, or none of its workers can be used.
    """
    started = time.monotonic()
    say = announcer(silent=silent)
    model = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
    source = store if isinstance(store, FeatureStore) else FeatureStore(store, create=False)
    name = dataset or source.only_dataset()
    features = features_for(model, source, name)
    if labels is not None:
        features = with_told_labels(features, labels, say)
    chosen = choose_rows(model, features, split, ignore_unknown_classes=ignore_unknown_classes)
    say(f"scoring {len(chosen.codes):,} images of dataset {name}: {chosen.scope}")
    with features_at(cluster, chosen.features, source, say) as scored:
        probabilities = model.probabilities(scored)
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
