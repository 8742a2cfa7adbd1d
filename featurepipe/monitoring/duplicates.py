"""Copies of images, and images nearly alike: which there are, and which lie where they should not."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from featurepipe.display import neutralised, neutralised_text
from featurepipe.errors import Message, Option, UsageError
from featurepipe.evaluation.leakage import numbered, on_several_sides
from featurepipe.monitoring.near import NearPairs, checked_near, near_pairs
from featurepipe.monitoring.options import DuplicatesOptions
from featurepipe.option_groups import as_asked
from featurepipe.progress import announcer
from featurepipe.results import shown_as
from featurepipe.store import FeatureStore
from featurepipe.store.atomic import atomic_file
from featurepipe.store.choice import require_snapshot, usable_keys
from featurepipe.store.labelled_images import LabelledImages
from featurepipe.store.locks import starts_again
from featurepipe.store.options import SideOptions
from featurepipe.store.roles import with_roles
from featurepipe.store.snapshots import OK

if TYPE_CHECKING:
    from featurepipe.store.views import FeatureSet


LIMIT = 100
_LARGE = 0.1  # of the images in one near group: the distance joins what is merely similar

Numbers = npt.NDArray[np.int64]


@shown_as("duplicates")
@starts_again
def duplicates(
    store: FeatureStore | str | os.PathLike[str],
    *,
    dataset: str | None = None,
    node: str = "bottleneck",
    backbone: str | None = None,
    near: float | str | None = None,
    labels: Any = None,
    label: str | None = None,
    split_column: str | None = None,
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
        labels: A mapping or file to use instead of the dataset's labels, as in ``FeatureSet.with_labels``.
        label: The column of the class, by default ``label``: of ``labels``, else of the manifest that was extracted.
        split_column: The column of the splits; by default the dataset's own splits.
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
        too many; ``near`` has ``distance``, ``column``, ``bottleneck`` (its node, if known),
        ``space``, ``pairs``, ``search`` (``exact`` or ``approximate``) and
        ``recall``. ``file``; ``options`` as they were asked for; ``warnings``;
        ``seconds``.

    Raises:
        UsageError: A dataset, column or space is unknown; ``near`` cannot be, or joins millions of pairs; of more than
            50,000 images, faiss is not installed; or no file can be written there.
        StoreError: Features of some images are missing.
    """
    started = time.monotonic()
    options = DuplicatesOptions(
        dataset=dataset, node=node, backbone=backbone, near=near, to=to, raw_ids=raw_ids,
        labels=labels, label=label, split_column=split_column,
    )  # fmt: skip
    source = store if isinstance(store, FeatureStore) else FeatureStore(store, create=False)
    name = dataset or source.only_dataset()
    target = None if to is None else checked_file(to)
    wanted = None if near is None else checked_near(near)
    snapshot, images = _images(source, name)
    sides = SideOptions.of(options)
    if labels is not None or any(sides.arguments().values()):
        view = source.features(name, node=node, backbone=backbone, snapshot=snapshot)
        images = with_roles(source, view, labels, sides.ungrouped(), announcer(silent=silent), snapshot=snapshot)
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
        announcer(silent=silent)(f"comparing {len(features):,} different images by {features.named_column}")
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
        "options": as_asked(options),
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
        "bottleneck": features.origin.bottleneck,
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


EXACT_COPIES, NEAR_COPIES = "exact", "near"

SCHEMA = pa.schema(
    [
        ("kind", pa.string()),
        ("group", pa.int64()),
        ("id", pa.string()),
        ("split", pa.string()),
        ("label", pa.string()),
        ("key", pa.string()),
        ("distance", pa.float32()),
        ("across_splits", pa.bool_()),
        ("label_conflict", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class Groups:
    """Groups of two images or more, those across splits first, then those with different labels, then the largest.

    Attributes:
        kind: ``exact`` (equal bytes) or ``near``.
        images: The (m,) images that are in a group, group by group.
        number: (m,) of their group, ascending from 0.
        distance: (m,) cosine distance to the nearest other image of the group; None for exact copies.
        across: (g,) whether images of a group are in different splits; an image without a split is in none.
        conflict: (g,) whether images of a group have different labels; an image without a label has none.
    """

    kind: str
    images: LabelledImages
    number: Numbers
    distance: npt.NDArray[np.float32] | None
    across: npt.NDArray[np.bool_]
    conflict: npt.NDArray[np.bool_]

    @classmethod
    def of(
        cls, kind: str, images: LabelledImages, member: Numbers, distance: npt.NDArray[np.float32] | None = None
    ) -> Groups:
        """Gathers groups.

        Args:
            kind: ``exact`` or ``near``.
            images: n images.
            member: (n,) what images of one group have in common; -1 for images in none.
            distance: (n,) to the nearest other image of the group.
        """
        rows = np.flatnonzero(member >= 0)
        _, number, sizes = np.unique(member[rows], return_inverse=True, return_counts=True)
        rows, number = rows[sizes[number] > 1], number[sizes[number] > 1]
        _, first, number, sizes = np.unique(number, return_index=True, return_inverse=True, return_counts=True)
        table = images.table.take(rows)
        across, conflict = (_straddling(number, table[side], len(sizes)) for side in ("split", "label"))
        order = np.lexsort((first, -sizes, ~conflict, ~across))
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        by_group = np.argsort(place[number], kind="stable")
        rows = rows[by_group]
        return cls(
            kind,
            LabelledImages(images.table.take(rows), images.keys[rows]),
            place[number][by_group],
            None if distance is None else distance[rows],
            across[order],
            conflict[order],
        )

    def __len__(self) -> int:
        return len(self.across)

    def counts(self) -> dict[str, int]:
        """Groups, the images in them, and how many groups straddle splits or contradict each other; as JSON values."""
        return {
            "groups": len(self),
            "images": len(self.number),
            "across_splits": int(self.across.sum()),
            "label_conflicts": int(self.conflict.sum()),
        }

    def listed(self, limit: int | None) -> list[dict[str, Any]]:
        """The first ``limit`` groups as JSON values, and every group across splits, however many they are."""
        count = len(self) if limit is None else min(len(self), max(limit, int(self.across.sum())))
        rows = int(np.searchsorted(self.number, count))
        groups: list[dict[str, Any]] = [
            {"kind": self.kind, "across_splits": bool(across), "label_conflict": bool(conflict), "images": []}
            for across, conflict in zip(self.across[:count], self.conflict[:count], strict=True)
        ]
        columns = self.table(rows).select(["id", "split", "label", "key", "distance"])
        for number, image in zip(self.number[:rows], columns.to_pylist(), strict=True):
            if self.distance is None:
                del image["distance"]
            groups[number]["images"].append(image)
        return groups

    def table(self, rows: int | None = None) -> pa.Table:
        """The images with their group, one row each: ``SCHEMA``; or the first so many."""
        number, keys = self.number[:rows], self.images.keys[:rows]
        images = self.images.table.slice(0, len(number))
        distance = pa.nulls(len(number), pa.float32()) if self.distance is None else pa.array(self.distance[:rows])
        columns = [
            pa.array([self.kind] * len(number), pa.string()),
            pa.array(number),
            images["id"],
            images["split"],
            images["label"],
            pa.array([bytes(key).hex() for key in keys], pa.string()),
            distance,
            pa.array(self.across[number]),
            pa.array(self.conflict[number]),
        ]
        return pa.table(columns, schema=SCHEMA)


def _straddling(number: Numbers, side: pa.ChunkedArray, groups: int) -> npt.NDArray[np.bool_]:
    """(g,) whether a group lies on several sides."""
    found = np.zeros(groups, np.bool_)
    found[number[on_several_sides(number, numbered(side)[0])]] = True
    return found


def write_groups(groups: Sequence[Groups], to: str | PathLike[str], *, raw_ids: bool = False) -> int:
    """Writes groups of images as one file, whole or not at all.

    One row an image: ``kind`` (exact or near), ``group`` (numbered from 0 by kind), ``id``, ``split``, ``label``, ``key``
    (SHA-256 of the image, hexadecimal), ``distance`` (to the nearest other image of a near group), ``across_splits``
    and ``label_conflict`` of the group.

    Args:
        groups: Of any kinds.
        to: File to write or replace: ``.csv``, ``.jsonl`` or ``.parquet``.
        raw_ids: Whether texts of a CSV file that a spreadsheet would take for formulas stay as they are.

    Returns:
        How many cells were changed, so that no spreadsheet runs them.

    Raises:
        UsageError: The suffix is another one, or there is no such folder.
        DiskFull: No space is left; nothing stays behind.
    """
    return write_table(pa.concat_tables([SCHEMA.empty_table(), *(one.table() for one in groups)]), to, raw_ids=raw_ids)


def write_table(table: pa.Table, to: str | PathLike[str], *, raw_ids: bool = False) -> int:
    """Writes a table about images as one file, whole or not at all; arguments and errors as of ``write_groups``."""
    path = checked_file(to)
    table, changed = neutralised(table) if path.suffix.lower() == ".csv" and not raw_ids else (table, 0)
    with atomic_file(path) as file:
        _WRITERS[path.suffix.lower()](table, file)
    return changed


def checked_file(to: str | PathLike[str], what: str = "groups", further: Sequence[str] = ()) -> Path:
    """The path, if a table can be written there.

    Args:
        to: The file.
        what: What is written, for the message.
        further: Suffixes that the caller can write besides, such as ``.html``.

    Raises:
        UsageError: The suffix is another one, or there is no such folder.
    """
    path = Path(to)
    suffixes = [*_WRITERS, *further]
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"cannot write {what} to {path}: its suffix must be one of {', '.join(suffixes)}")
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {what} to {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise UsageError(f"cannot write {what} to {path}: it is a folder; name a file in it")
    return path


def _write_lines(table: pa.Table, file: IO[bytes]) -> None:
    for row in table.to_pylist():
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


_WRITERS: dict[str, Callable[[pa.Table, IO[bytes]], None]] = {
    ".csv": pyarrow.csv.write_csv,
    ".jsonl": _write_lines,
    ".parquet": pq.write_table,
}
