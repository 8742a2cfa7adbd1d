"""Images that must not come back: salted hashes of the ids and keys of what was forgotten, which an extraction refuses."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from featurepipe.records import now
from featurepipe.store.atomic import write_json
from featurepipe.store.documents import ForgottenDocument, read_document

FILE = "forgotten.json"
JOURNAL = "forgetting.json"
"""What a call of `featurepipe.store.forget` is to remove, until it has."""
REASON = "forgotten: these bytes were forgotten (featurepipe forget), under this id or another"
"""Why an image whose bytes were forgotten is a reject; its key is kept nowhere."""
_DIGITS = 32  # of a hash: 128 bits, so that no other image is refused by chance


@dataclass(frozen=True)
class Forgotten:
    """What was forgotten, as hashes: who has the image or guesses its id can tell that it was, nobody can list them.

    Attributes:
        salt: Of this store's hashes.
        images: ``id`` (hash of dataset and id), ``keys`` (hashes) and ``when`` of each.
    """

    salt: str = ""
    images: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def of(cls, store: Path) -> Forgotten:
        """Reads the list of a store; empty if nothing was ever forgotten.

        Raises:
            StoreError: It is damaged, and then nobody knows what must not be computed.
        """
        path = store / FILE
        try:
            path.lstat()
        except FileNotFoundError:
            return cls()
        record = read_document(path, ForgottenDocument)
        return cls(record["salt"], tuple(record["images"]))

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def _ids(self) -> frozenset[str]:
        return frozenset(image["id"] for image in self.images)

    @cached_property
    def _keys(self) -> frozenset[str]:
        return frozenset(key for image in self.images for key in image["keys"])

    def has_ids(self, dataset: str, ids: Iterable[str]) -> npt.NDArray[np.bool_]:
        """Tells which ids of a dataset were forgotten, (n,)."""
        if not self._ids:
            return np.zeros(sum(1 for _ in ids), np.bool_)
        return np.fromiter((self.id_hash(dataset, id_) in self._ids for id_ in ids), np.bool_)

    def has_key(self, key: bytes) -> bool:
        """Tells whether an image's bytes were forgotten."""
        return bool(self._keys) and self.key_hash(key) in self._keys

    def left_out(self, dataset: str, listing: pa.Table) -> pa.Table:
        """A listing without the images that were forgotten by id."""
        if not self._ids:
            return listing
        return listing.filter(pa.array(~self.has_ids(dataset, listing["id"].to_pylist())))

    def id_hash(self, dataset: str, id_: str) -> str:
        """The hash of a dataset's id."""
        return self._hash("id", f"{dataset}\0{id_}".encode("utf-8", "surrogatepass"))

    def key_hash(self, key: bytes) -> str:
        """The hash of a key."""
        return self._hash("key", key)

    def _hash(self, kind: str, value: bytes) -> str:
        return hashlib.sha256(f"{self.salt}\0{kind}\0".encode() + value).hexdigest()[:_DIGITS]

    def with_images(self, dataset: str, keys_of: Mapping[str, Iterable[bytes]]) -> Forgotten:
        """The list with more images: ids of a dataset, and the keys of each that must not come back."""
        base = self if self.salt else Forgotten(secrets.token_hex(16))
        known = {image["id"]: image for image in base.images}
        for id_, keys in keys_of.items():
            hashed = base.id_hash(dataset, id_)
            before = known.get(hashed, {"keys": (), "when": now()})
            known[hashed] = {
                "id": hashed,
                "keys": sorted({*before["keys"], *map(base.key_hash, keys)}),
                "when": before["when"],
            }
        return Forgotten(base.salt, tuple(known.values()))

    def without_images(self, dataset: str, ids: Iterable[str]) -> Forgotten:
        """The list without some images, which may come back."""
        gone = {self.id_hash(dataset, id_) for id_ in ids}
        return Forgotten(self.salt, tuple(image for image in self.images if image["id"] not in gone))

    def write(self, store: Path) -> None:
        """Replaces the list of a store, atomically."""
        write_json(store / FILE, {"salt": self.salt, "images": list(self.images)})
