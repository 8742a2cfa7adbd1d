"""What the store remembers of a dataset: its last snapshot, where it was taken from, which feature spaces it used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import pyarrow as pa
import pyarrow.compute as pc

from featurepipe.images.findings import unreadable_folders
from featurepipe.images.listing import SCHEMA, UNKNOWN, is_image_name
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
            if id_ not in places
            and (folder := next((each for each in _folders_of(id_) if each in folders), None)) is not None
            for locators in [listing["locator"][places[folder]].as_py()]
        ]
        more = pa.Table.from_pylist(rows, schema=SCHEMA)
        return pa.concat_tables([listing, more]).combine_chunks()

    def without_folders(self, listing: pa.Table) -> Self:
        """The same without the folders that could not be read then and now can be: their entries are no images that went."""
        if self.snapshot is None or not self.snapshot["key"].null_count:
            return self
        ids = self.snapshot["id"]
        unread = ids.filter(self.snapshot["key"].is_null())
        lost = unread.filter(pc.invert(pc.is_in(unread, listing["id"]))).to_pylist()
        doubtful = {id_ for id_ in lost if not is_image_name(id_)}
        if not doubtful:
            return self
        listed = (id_ for column in (ids, listing["id"]) for id_ in column.to_pylist())
        folders = {folder for id_ in listed for folder in _folders_of(id_) if folder in doubtful}
        is_folder = pc.is_in(ids, pa.array(sorted(folders), pa.string()))
        return replace(self, snapshot=self.snapshot.filter(pc.invert(is_folder)))

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


def _folders_of(id_: str) -> Iterator[str]:
    """The folders that an image lies in, the outermost first."""
    end = id_.find("/")
    while end >= 0:
        yield id_[:end]
        end = id_.find("/", end + 1)
