"""Copies of images, and images nearly alike: which there are, and which lie where they should not."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from featurepipe.display import neutralised_text
from featurepipe.errors import Message, Option
from featurepipe.monitoring.groups import EXACT_COPIES, NEAR_COPIES, Groups, checked_file, write_groups
from featurepipe.monitoring.near import NearPairs, checked_near, near_pairs
from featurepipe.progress import announcer
from featurepipe.store import FeatureStore
from featurepipe.store.choice import require_snapshot, usable_keys
from featurepipe.store.labels import LabelledImages
from featurepipe.store.locks import starts_again
from featurepipe.store.snapshots import OK

if TYPE_CHECKING:
    from featurepipe.store.views import FeatureSet

LIMIT = 100
_LARGE = 0.1  # of the images in one near group: the distance joins what is merely similar

Numbers = npt.NDArray[np.int64]


@starts_again
def duplicates(
    store: FeatureStore | str | os.PathLike[str],
    *,
    dataset: str | None = None,
    node: str = "bottleneck",
    backbone: str | None = None,
    near: float | str | None = None,
    limit: int | None = LIMIT,
    to: str | os.PathLike[str] | None = None,
    raw_ids: bool = False,
    threads: int | None = None,
    seed: int = 0,
    silent: bool = False,
) -> dict[str, Any]:
    """Finds the copies among a dataset's images, and on request images whose features are nearly alike.

    Copies have equal bytes: they are found by key, without features. Images nearly alike are joined to groups by a chain of
    pairs within ``near`` (`featurepipe.monitoring.near.near_pairs`); a group lists copies of its images as well.

    Args:
        store: The feature store or its path.
        dataset: Name of the dataset; by default the store's only one.
        node: The column whose distances count.
        backbone: Of which network, space or fingerprint.
        near: Cosine distance within which images are nearly alike, or ``auto``; None looks for copies alone.
        limit: The most groups of a kind to list; groups across splits are listed however many they are. None for all.
        to: A ``.csv``, ``.jsonl`` or ``.parquet`` file for all groups; see ``write_groups``.
        raw_ids: Whether texts of a CSV file that a spreadsheet would take for formulas stay as they are.
        threads: The most that the search for near images uses; by default what OMP_NUM_THREADS or the CPUs allow.
        seed: Of the search for near images.
        silent: Say nothing on standard error.

    Returns:
        JSON values. ``dataset``, ``snapshot``, ``images``; ``exact`` and ``near`` (null unless asked for), each with
        ``groups``, ``images``, ``across_splits``, ``label_conflicts`` (groups) and ``listed``, those across splits first: a
        list of ``kind``, ``across_splits``, ``label_conflict`` and ``images`` (``id``, ``split``, ``label``, ``key``, and in a
        near group ``distance``, to the nearest other image of the group). ``exact`` has ``copies``, the images that are one
        too many; ``near`` has ``distance``, ``column``, ``space``, ``pairs``, ``search`` (``exact`` or ``approximate``) and
        ``recall``. ``file``; ``warnings``; ``seconds``.

    Raises:
        UsageError: A dataset, column or space is unknown; ``near`` cannot be, or joins millions of pairs; faiss is not
            installed; or no file can be written there.
        StoreError: Features of some images are missing.
    """
    started = time.monotonic()
    source = store if isinstance(store, FeatureStore) else FeatureStore(store, create=False)
    name = dataset or source.only_dataset()
    target = None if to is None else checked_file(to)
    wanted = None if near is None else checked_near(near)
    snapshot, images = _images(source, name)
    _, first, image = np.unique(images.keys64, return_index=True, return_inverse=True)
    exact = Groups.of(EXACT_COPIES, images, image.astype(np.int64))
    found: dict[str, Any] = {
        "dataset": name,
        "snapshot": snapshot,
        "images": len(image),
        "exact": {**exact.counts(), "copies": len(image) - len(first), "listed": exact.listed(limit)},
        "near": None,
        "warnings": [],
    }
    kinds = [exact]
    if wanted is not None:
        features = source.features(name, node=node, backbone=backbone, snapshot=snapshot).take(first)
        announcer(silent=silent)(f"comparing {len(features):,} different images by {features.column}")
        pairs = near_pairs(features, wanted, seed=seed, threads=threads, silent=silent)
        kinds.append(_near_groups(images, image, pairs))
        found["near"] = {**_about(pairs, features), **kinds[-1].counts(), "listed": kinds[-1].listed(limit)}
        found["warnings"] += _too_large(kinds[-1], len(image), pairs.distance)
    if target is not None:
        said = neutralised_text(write_groups(kinds, target, raw_ids=raw_ids), target)
        found["warnings"] += [said] if said else []
    return {
        **found,
        "file": None if target is None else str(target),
        "seconds": round(time.monotonic() - started, 3),
    }


def _images(store: FeatureStore, dataset: str) -> tuple[str, LabelledImages]:
    """The usable images of the current snapshot, and its run id."""
    run_ids = store.snapshot_ids(dataset)
    snapshot = require_snapshot(store, dataset, run_ids[-1] if run_ids else None)
    usable = snapshot.filter(pc.equal(snapshot["status"], OK)).select(["id", "label", "split"])
    return run_ids[-1], LabelledImages(usable, usable_keys(snapshot))


def _near_groups(images: LabelledImages, image: Numbers, pairs: NearPairs) -> Groups:
    """Joins images that a chain of pairs connects, and all of their copies."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = int(image.max(initial=-1)) + 1
    links = coo_array((np.ones(len(pairs.first), np.bool_), (pairs.first, pairs.second)), shape=(count, count))
    _, member = connected_components(links, directed=False)
    nearest = np.full(count, np.inf, np.float32)
    for end in (pairs.first, pairs.second):
        np.minimum.at(nearest, end, pairs.apart)
    member = np.where(np.isfinite(nearest), member, -1).astype(np.int64)
    return Groups.of(NEAR_COPIES, images, member[image], nearest[image])


def _about(pairs: NearPairs, features: FeatureSet) -> dict[str, Any]:
    return {
        "distance": pairs.distance,
        "column": features.column,
        "space": features.origin.space,
        "pairs": len(pairs.first),
        "search": "exact" if pairs.exact else "approximate",
        "recall": pairs.recall,
    }


def _too_large(groups: Groups, images: int, distance: float) -> list[str]:
    largest = int(np.bincount(groups.number).max(initial=0))
    if largest < max(20, _LARGE * images):
        return []
    return [
        Message(
            f"{largest:,} of {images:,} images are one near group: {distance:.3g} joins images that are merely similar; give a "
            "smaller distance (",
            Option("near"),
            ")",
        )
    ]
