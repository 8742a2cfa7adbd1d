"""Which images are compared: those that are new since a snapshot, and those of that snapshot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from featurepipe.errors import UsageError, unknown
from featurepipe.store import snapshots
from featurepipe.store.choice import require_snapshot, usable_keys
from featurepipe.store.labels import LabelledImages
from featurepipe.store.snapshots import OK

if TYPE_CHECKING:
    from featurepipe.store.feature_store import FeatureStore

MOST = 20_000
"""Images of a side that are looked up at most."""

PREVIOUS, FIRST = "previous", "first"


@dataclass(frozen=True)
class Side:
    """Images that are compared, each once, however many copies there are.

    Attributes:
        images: At most ``MOST`` of them, drawn at random.
        count: Of all.
    """

    images: LabelledImages
    count: int


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


def sides(store: FeatureStore, dataset: str, snapshot: str, reference: str, seed: int) -> tuple[Side, Side]:
    """Draws images of the reference, and images of a snapshot that the reference lacks.

    Images are told by the first 8 bytes of their SHA-256, which match by chance for any two of a million images with a
    probability of 3e-8. Memory: one snapshot at a time, and 8 bytes an image of the other.

    Args:
        store: The feature store.
        dataset: Its name.
        snapshot: Run id of the snapshot whose images are tested.
        reference: Run id of the earlier one.
        seed: Of the draws.

    Returns:
        The reference and what is new.
    """
    rng = np.random.default_rng(seed)
    before, seen = _drawn(require_snapshot(store, dataset, reference), None, rng)
    new, _ = _drawn(require_snapshot(store, dataset, snapshot), seen, rng)
    return before, new


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
