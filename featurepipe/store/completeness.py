"""Whether the images of every finished run still have the features that the run said they had."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from featurepipe.errors import FeaturepipeError, StoreError
from featurepipe.store.choice import usable_keys
from featurepipe.store.feature_store import FeatureStore
from featurepipe.store.inside import listed
from featurepipe.store.keys import Keys
from featurepipe.store.parts import Headers
from featurepipe.store.space import Space

_Place = tuple[str, str]
"""A dataset and a column."""


@dataclass(frozen=True)
class Shortage:
    """Images of a dataset's snapshot that lack a column."""

    space: str
    dataset: str
    column: str
    lacking: int
    images: int

    def __str__(self) -> str:
        return (
            f"{self.lacking:,} of {self.images:,} images of dataset {self.dataset!r} lack {self.column} in this space; "
            "re-run featurepipe extract"
        )


def shortages(store: FeatureStore) -> Iterator[Shortage]:
    """Compares the snapshots of finished runs with what the parts hold; reads the keys only.

    For each dataset, space and column the latest run with status ``done`` counts, if its snapshot is still there and
    readable. A space whose folder was removed is passed over: someone wanted it gone. Memory: 48 bytes a row of one
    space, and one snapshot.
    """
    expected = _expected(store.runs())
    for path in (file.parent for file in listed(store.path, "spaces/*/space.json")):
        headers = Headers()
        try:
            space = Space(path, headers)
        except StoreError:
            continue  # its description is broken, which verify says anyway
        wanted = expected.get(space.fingerprint, {})
        if wanted and _count(store, space, wanted) != []:
            # Looked at again: a part may have been compacted away while it was being read.
            yield from _count(store, Space(path, headers), wanted) or []


def _expected(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[_Place, str]]:
    """Says for each fingerprint which run was the last to finish each dataset and column; ``runs`` are oldest first."""
    latest: dict[str, dict[_Place, str]] = {}
    for run in runs:
        if run.get("status") == "done" and {"fingerprint", "dataset", "columns"} <= run.keys():
            places = latest.setdefault(run["fingerprint"], {})
            places.update({(run["dataset"], column): run["run_id"] for column in run["columns"]})
    return latest


def _count(store: FeatureStore, space: Space, wanted: Mapping[_Place, str]) -> list[Shortage] | None:
    """Counts what is lacking; None if a part vanished meanwhile."""
    try:
        index = space.index(sorted({column for _, column in wanted}))
    except StoreError:
        return None
    found: list[Shortage] = []
    snapshots = sorted({(dataset, run_id) for (dataset, _), run_id in wanted.items()})
    for dataset, run_id in snapshots:
        keys = _keys_of(store, dataset, run_id)
        for column in sorted(name for (of, name), run in wanted.items() if (of, run) == (dataset, run_id)):
            lacking = int(np.count_nonzero(~index.locate(keys, column)[2]))
            if lacking:
                found.append(Shortage(space.name, dataset, column, lacking, len(keys)))
    return found


def _keys_of(store: FeatureStore, dataset: str, run_id: str) -> Keys:
    """Returns the keys of a snapshot's usable images, none if it was removed or is damaged (verify says so)."""
    try:
        table = store.snapshot(dataset, run_id, columns=["key", "status"])
    except FeaturepipeError:
        table = None
    return np.empty((0, 32), np.uint8) if table is None else usable_keys(table)
