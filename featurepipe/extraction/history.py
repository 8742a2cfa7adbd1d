"""What the store remembers of a dataset: its last snapshot, where it was taken from, which feature spaces it used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import pyarrow as pa
import pyarrow.compute as pc

from featurepipe.images.findings import unreadable_folders
from featurepipe.images.listing import SCHEMA, UNKNOWN
from featurepipe.store import FeatureStore


@dataclass(frozen=True)
class History:
    """What the store remembers of a dataset; every run record is read once.

    Attributes:
        snapshot: the current snapshot without its reasons, or None.
        run_id: of that snapshot, or None.
        places: locations of the sources that the dataset was taken from since (and for) that snapshot, the latest first.
        fingerprints: of the feature spaces that its runs used, the latest first.
    """

    snapshot: pa.Table | None = None
    run_id: str | None = None
    places: Sequence[str] = ()
    fingerprints: Sequence[str] = ()

    @classmethod
    def of(cls, store: FeatureStore | None, dataset: str) -> Self:
        """Reads it; a store that does not exist yet remembers nothing."""
        if store is None:
            return cls()
        last = max(store.snapshot_ids(dataset), default=None)
        snapshot = None if last is None else store.snapshot(dataset, last)
        runs = [run for run in reversed(store.runs()) if run.get("dataset") == dataset and "fingerprint" in run]
        return cls(
            snapshot=None if snapshot is None else snapshot.drop_columns(["reason"]),
            run_id=last,
            places=[run["source"] for run in runs if "source" in run and run["run_id"] >= (last or "")],
            fingerprints=list(dict.fromkeys(run["fingerprint"] for run in runs)),
        )

    @property
    def images(self) -> int:
        """How many images the last snapshot lists."""
        return 0 if self.snapshot is None else self.snapshot.num_rows

    def with_unreadable(self, listing: pa.Table) -> pa.Table:
        """The listing, and for each folder that could not be read the images that the last snapshot has there.

        They are not gone: reading them gives the reason why the folder cannot be read, so that they are rejects.
        """
        folders = set(unreadable_folders(listing))
        if self.snapshot is None or not folders:
            return listing
        places = dict(zip(listing["id"].to_pylist(), range(listing.num_rows), strict=True))
        rows = [
            {"id": id_, "label": label, "split": split, "size": UNKNOWN, "mtime_ns": UNKNOWN, "locator": locators}
            for id_, label, split in zip(*(self.snapshot[n].to_pylist() for n in ("id", "label", "split")), strict=True)
            if id_ not in places and (folder := _folder_of(id_, folders)) is not None
            for locators in [listing["locator"][places[folder]].as_py()]
        ]
        more = pa.Table.from_pylist(rows, schema=SCHEMA)
        return pa.concat_tables([listing, more]).combine_chunks()

    def gone(self, listing: pa.Table) -> int:
        """How many ids of the last snapshot a listing lacks."""
        if self.snapshot is None or self.snapshot["id"].equals(listing["id"]):
            return 0
        return self.images - int(pc.sum(pc.is_in(self.snapshot["id"], listing["id"])).as_py() or 0)

    def elsewhere(self, location: str) -> str | None:
        """The other place that the snapshot (or without one, a run) is from, so that its sizes and times mean nothing here."""
        places = self.places if self.snapshot is None else self.places[-1:]
        return next((place for place in places if place != location), None)

    def is_only_of(self, location: str) -> bool:
        """Whether no run since the snapshot took the dataset from another place, not even one that failed."""
        return all(place == location for place in self.places)


def _folder_of(id_: str, folders: set[str]) -> str | None:
    """The folder, of some, that an image lies in."""
    end = id_.find("/")
    while end >= 0:
        if id_[:end] in folders:
            return id_[:end]
        end = id_.find("/", end + 1)
    return None
