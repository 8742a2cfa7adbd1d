"""The page of a store: its last comparison of layers, or a bundle evaluated on it, with the images where they can be had."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from featurepipe.errors import FeaturepipeError, UsageError
from featurepipe.extraction.extract import ARRAY_READERS
from featurepipe.images import open_source
from featurepipe.progress import announcer
from featurepipe.records import host, now, versions
from featurepipe.reporting.report import Features, write_report
from featurepipe.reporting.thumbnails import ReadImage
from featurepipe.store import FeatureSet, FeatureStore
from featurepipe.store.choice import require_snapshot

MAPPED = 2000
"""Images on the map."""


def report(
    store: FeatureStore | str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    bundle: str | os.PathLike[str] | None = None,
    dataset: str | None = None,
    split: str | None = None,
    source: Any = None,
    command: str | None = None,
    silent: bool = False,
) -> Path:
    """Writes the page of the last comparison of layers (``featurepipe.depth``), or of a trained bundle.

    Args:
        store: the feature store or its path.
        target: the HTML file; one that is there is replaced once the new one is complete.
        bundle: show this bundle, evaluated on the dataset, instead of the comparison.
        dataset: a dataset in the store; may be left out if there is only one.
        split: what the bundle is evaluated on, as in ``evaluate``.
        source: the images, for pictures; by default where they were extracted from. Without them the page has none.
        command: how it was called, for the record.
        silent: say nothing on the way.

    Returns:
        The file.

    Raises:
        UsageError: the dataset is unknown, no comparison was made of it, or the folder of ``target`` does not exist.
    """
    say = announcer(silent=silent)
    kept = store if isinstance(store, FeatureStore) else FeatureStore(store, create=False)
    name = dataset or kept.only_dataset()
    if bundle is None:
        document, features = _depth(kept, name)
    else:
        document, features = _bundle(kept, name, bundle, split, command, silent=silent)
    read = _pictures(kept, name, source, say)
    return write_report(document, target, images=read, features=features, silent=silent)


def _depth(store: FeatureStore, dataset: str) -> tuple[Mapping[str, Any], Features]:
    documents = store.depth_documents(dataset)
    require_snapshot(store, dataset)
    if not documents:
        raise UsageError(
            f"the layers of dataset {dataset} have not been compared yet; run: featurepipe depth SOURCE --store {store.path}, "
            "or show a bundle with --bundle BUNDLE"
        )
    document = documents[-1]
    column = str(document["details"]["column"]).split("+")
    view = store.features(dataset, node=column, backbone=document["space"]["fingerprint"])
    return document, _features(view)


def _bundle(
    store: FeatureStore,
    dataset: str,
    path: str | os.PathLike[str],
    split: str | None,
    command: str | None,
    *,
    silent: bool,
) -> tuple[Mapping[str, Any], Features]:
    from featurepipe.evaluation.evaluate import evaluate
    from featurepipe.heads.bundle.bundle import read_bundle
    from featurepipe.heads.bundle.description import describe_bundle

    bundle = read_bundle(path)
    found = evaluate(bundle, store, dataset=dataset, split=split, silent=silent)
    document = {
        "kind": "bundle",
        "version": 1,
        "bundle": {**describe_bundle(bundle), "path": os.fspath(path)},
        "evaluation": found,
        "provenance": {
            "command": command, "when": now(), "software": versions(), "machine": host(), "store": str(store.path),
            "snapshot": store.snapshot_ids(dataset)[-1],
        },
    }  # fmt: skip
    view = store.features(dataset, node=list(bundle.columns), backbone=bundle.fingerprint)
    return document, _features(view.select(split=found["split"]) if found["split"] else view)


def _features(view: FeatureSet) -> Features:
    """As many rows as the map shows, drawn at random."""
    chosen = np.sort(np.random.default_rng(0).permutation(len(view))[:MAPPED])
    some = view.take(chosen)
    return list(some.ids), some.read(np.float32), list(some.labels)


def _pictures(store: FeatureStore, dataset: str, source: Any, say: Callable[[str], None]) -> ReadImage | None:
    """Reads images by id from where they were extracted; None, and why, if they cannot be had."""
    location = source if source is not None else _last_source(store, dataset)
    if location is None:
        say("no run says where the images are: the page has no pictures; name them with --source")
        return None
    try:
        images = open_source(location, array_readers=ARRAY_READERS)
        listing = images.scan()
    except FeaturepipeError as error:
        say(f"the images cannot be listed ({error}): the page has no pictures; name them with --source")
        return None
    locators = dict(zip(listing["id"].to_pylist(), listing["locator"].to_pylist(), strict=True))

    def read(image: str) -> Any:
        try:
            return images.read(locators[image]) if image in locators else None
        except FeaturepipeError:
            return None  # rejected since: the page goes without it

    return read


def _last_source(store: FeatureStore, dataset: str) -> str | None:
    known = [run["source"] for run in store.runs() if run.get("dataset") == dataset and run.get("source")]
    return str(known[-1]) if known else None
