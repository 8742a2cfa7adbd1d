"""What is compared: images that are new since a snapshot and those of that snapshot, and their stored features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from featurepipe.errors import StoreError, UsageError, unknown
from featurepipe.store import snapshots
from featurepipe.store.choice import require_snapshot, usable_keys
from featurepipe.store.labelled_images import LabelledImages
from featurepipe.store.roles import with_groups
from featurepipe.store.rows import ColumnRows, WideRows
from featurepipe.store.snapshots import FIRST, OK, PREVIOUS
from featurepipe.store.space import Origin
from featurepipe.store.views import FeatureSet

if TYPE_CHECKING:
    from featurepipe.store.feature_store import FeatureStore
    from featurepipe.store.keys import KeyIndex
    from featurepipe.store.space import Space


MOST = 20_000
"""Images of a side that are looked up at most."""


@dataclass(frozen=True)
class Side:
    """Images that are compared, each once, however many copies there are.

    Attributes:
        images: At most ``MOST`` of them, drawn at random, with groups where there are any.
        count: Of all.
        group: What the groups are called; empty where there are none.
    """

    images: LabelledImages
    count: int
    group: str = ""

    @property
    def groups(self) -> int:
        """How many groups the images are of; an image without one is a group of its own."""
        return len(np.unique(self.images.units()))


def snapshot_of_run(store: FeatureStore, dataset: str, run_id: str) -> str:
    """The snapshot that a run id means: a job's run has the one of its last extraction that wrote one.

    Args:
        store: The feature store.
        dataset: Its name.
        run_id: Of a job's run as ``featurepipe runs`` shows it, or anything else, which is returned as it is.

    Raises:
        UsageError: That run of a job left no snapshot of the dataset, or none that is still there.
    """
    if run_id in {PREVIOUS, FIRST}:
        return run_id
    known = store.snapshot_ids(dataset)
    return snapshots.snapshot_of_run(run_id, dataset, known, () if run_id in known else store.runs()) or run_id


def reference_snapshot(store: FeatureStore, dataset: str, snapshot: str, reference: str) -> str | None:
    """The run id of the snapshot that ``snapshot`` is compared with; None if ``snapshot`` is the first.

    Args:
        store: The feature store.
        dataset: Its name.
        snapshot: Run id of the snapshot whose images are tested.
        reference: ``previous``, ``first``, or a run id, of an extraction or a job.

    Raises:
        UsageError: There is no such snapshot, or it is ``snapshot`` itself or a later one.
    """
    known = store.snapshot_ids(dataset)
    reference = snapshot_of_run(store, dataset, reference)
    earlier = known[: known.index(snapshot)]
    if reference in {PREVIOUS, FIRST}:
        return (earlier[-1] if reference == PREVIOUS else earlier[0]) if earlier else None
    if reference not in known:
        raise unknown("reference", reference, [PREVIOUS, FIRST, *known], where=f"dataset {dataset}")
    if reference not in earlier:
        which = "that snapshot itself" if reference == snapshot else "a later one"
        raise UsageError(
            f"cannot compare snapshot {snapshot} of dataset {dataset} with {reference}, {which}; name an earlier one: "
            f"{', '.join(earlier[-5:]) or 'there is none'}"
        )
    return reference


def sides(
    store: FeatureStore, dataset: str, snapshot: str, reference: str, *, group: str | None = None, seed: int = 0
) -> tuple[Side, Side]:
    """Draws images of the reference, and images of a snapshot that the reference lacks.

    Images are told by the first 8 bytes of their SHA-256, which match by chance for any two of a million images with a
    probability of 3e-8. Memory: one snapshot at a time, and 8 bytes an image of the other.

    Args:
        store: The feature store.
        dataset: Its name.
        snapshot: Run id of the snapshot whose images are tested.
        reference: Run id of the earlier one.
        group: The column or file of groups; None for ``group``, if there is one, ``none`` for no groups.
        seed: Of the draws.

    Returns:
        The reference and what is new.

    Raises:
        UsageError: The column or file of groups is not there, or empty.
    """
    rng = np.random.default_rng(seed)
    before, seen = _drawn(require_snapshot(store, dataset, reference), None, rng)
    new, _ = _drawn(require_snapshot(store, dataset, snapshot), seen, rng)
    found = []
    for side, run_id in ((before, reference), (new, snapshot)):
        if not side.count:
            found.append(side)
            continue
        images, name = with_groups(store, side.images, group, dataset=dataset, snapshot=run_id)
        found.append(replace(side, images=images, group=name))
    return found[0], found[1]


def distinct_rows(keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Positions of the first row of each of (n, 32) keys, ascending."""
    rows: npt.NDArray[np.int64] = np.sort(np.unique(keys.view("<u8")[:, 0], return_index=True)[1])
    return rows


def _drawn(
    snapshot: pa.Table, seen: npt.NDArray[np.uint64] | None, rng: np.random.Generator
) -> tuple[Side, npt.NDArray[np.uint64]]:
    """Draws of the images that were not seen; returns what there is as well."""
    keys = usable_keys(snapshot)
    usable = snapshot.filter(pc.equal(snapshot["status"], OK)).select(["id", "label", "split"])
    rows = distinct_rows(keys)
    here = keys.view("<u8")[rows, 0]
    if seen is not None:
        rows = rows[~np.isin(here, seen)]
    chosen = rows if len(rows) <= MOST else np.sort(rng.choice(rows, MOST, replace=False))
    return Side(LabelledImages(usable.take(chosen), keys[chosen]), len(rows)), here


@dataclass(frozen=True)
class Columns:
    """Some columns of a feature space, with the index of who has them.

    Attributes:
        space: The feature space.
        names: ``node:pooling``.
        index: Of these columns.
    """

    space: Space
    names: tuple[str, ...]
    index: KeyIndex

    @classmethod
    def of(cls, space: Space, names: Sequence[str]) -> Columns:
        """Reads the index: 48 bytes a row of the space."""
        return cls(space, tuple(names), space.index(names))

    def features(self, images: LabelledImages, names: Sequence[str], dataset: str) -> FeatureSet:
        """The features of those images that have all of the columns named; there may be none.

        Args:
            images: Whose features.
            names: Some of ``names``, in the order of the feature vector.
            dataset: Which the images are of.
        """
        places = [self.index.locate(images.keys, name) for name in names]
        there = np.logical_and.reduce([found for _, _, found in places])
        widths = self.space.columns()
        rows = [
            ColumnRows.of(
                name, self.index.parts, part[there], row[there], width=widths[name].width if name in widths else 0
            )
            for name, (part, row, _) in zip(names, places, strict=True)
        ]
        origin = Origin.of(self.space, dataset)
        kept = np.flatnonzero(there)
        return FeatureSet(images.table.take(kept), images.keys[kept], WideRows(tuple(rows)), origin)


def columns_to_compare(
    store: FeatureStore, dataset: str, wanted: Sequence[str] | None, backbone: str | None
) -> list[tuple[Space, list[str]]]:
    """Settles which columns of which feature spaces are meant; whose images have them is not looked at.

    Args:
        store: The feature store.
        dataset: Its name.
        wanted: Columns, nodes or aliases; None for all.
        backbone: Of which network, space or fingerprint; None for every space that has any of the columns.

    Returns:
        Each feature space with its columns.

    Raises:
        UsageError: A space or column is unknown.
        StoreError: The store has no features.
    """
    spaces = store.spaces() if backbone is None else [store.space(backbone, dataset=dataset)]
    if not spaces:
        raise StoreError(f"{store.path} holds no features yet; compute some with: featurepipe extract")
    named = {space.name: _names(space, wanted, strict=len(spaces) == 1) for space in spaces}
    for name in wanted or ():
        if not any(_names(space, [name], strict=False) for space in spaces):
            spaces[0].resolve_column(name)  # says what there is
    return [(space, named[space.name]) for space in spaces if named[space.name]]


def _names(space: Space, wanted: Sequence[str] | None, *, strict: bool) -> list[str]:
    if wanted is None:
        return list(space.columns())
    names = []
    for name in wanted:
        try:
            names.append(space.resolve_column(name))
        except UsageError:
            if strict:
                raise
    return list(dict.fromkeys(names))
