"""Images that must not come back: salted hashes of the ids and keys of what was forgotten, which an extraction refuses."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from featurepipe.partitions import filtered
from featurepipe.records import now
from featurepipe.store.atomic import write_json
from featurepipe.store.documents import ForgottenDocument, read_document
from featurepipe.store.keys import Keys

FILE = "forgotten.json"
JOURNAL = "forgetting.json"
"""What a call of `featurepipe.store.forget` is to remove, until it has."""
REASON = "forgotten: these bytes were forgotten (featurepipe forget), under this id or another"
"""Why an image whose bytes were forgotten is a reject; its key is kept nowhere."""
_HEX_KEY = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")
_DIGITS = 32  # of a hash: 128 bits, so that no other image is refused by chance


@dataclass(frozen=True)
class Forgotten:
    """What was forgotten, as hashes: who has the image or guesses its id can tell that it was, nobody can list them.

    Attributes:
        salt: Of this store's hashes.
        images: ``id`` (hash of dataset and id), ``keys`` (hashes of those that must not come back), ``prefixes`` (hashes of the
            first 8 bytes of all keys that it had, which bundles keep; earlier versions kept none) and ``when`` of each.
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
        return filtered(listing, lambda rows: pa.array(~self.has_ids(dataset, rows["id"].to_pylist())))

    def id_hash(self, dataset: str, id_: str) -> str:
        """The hash of a dataset's id."""
        return self._hash("id", f"{dataset}\0{id_}".encode("utf-8", "surrogatepass"))

    def key_hash(self, key: bytes) -> str:
        """The hash of a key."""
        return self._hash("key", key)

    def prefix_hash(self, prefix: bytes) -> str:
        """The hash of the first 8 bytes of a key."""
        return self._hash("prefix", prefix)

    def traces_of(self, datasets: Iterable[str], ids: Iterable[str]) -> EarlierTraces:
        """What is kept of some ids of these datasets, by which copies of what was forgotten are recognised elsewhere."""
        wanted, names = tuple(ids), tuple(datasets)
        known = {image["id"]: image for image in self.images} if wanted else {}
        hashes = {self.id_hash(name, id_) for name in names for id_ in wanted} if known else ()
        found = [known[hashed] for hashed in hashes if hashed in known]
        return EarlierTraces(
            self,
            frozenset(key for image in found for key in image["keys"]),
            frozenset(prefix for image in found for prefix in image.get("prefixes", ())),
            sum(1 for image in found if "prefixes" not in image),
        )

    def _hash(self, kind: str, value: bytes) -> str:
        return hashlib.sha256(f"{self.salt}\0{kind}\0".encode() + value).hexdigest()[:_DIGITS]

    def with_images(
        self,
        dataset: str,
        keys_of: Mapping[str, Iterable[bytes]],
        shared: Mapping[str, Iterable[bytes]] | None = None,
    ) -> Forgotten:
        """The list with more images: ids of a dataset, and the keys of each that must not come back.

        Args:
            dataset: Whose ids they are.
            keys_of: The ids, with these keys.
            shared: Further keys of some of them, which other images have as well.
        """
        base = self if self.salt else Forgotten(secrets.token_hex(16))
        known = {image["id"]: image for image in base.images}
        for id_, given in keys_of.items():
            hashed, keys = base.id_hash(dataset, id_), tuple(given)
            before = known.get(hashed, {"keys": (), "prefixes": (), "when": now()})
            image = {"id": hashed, "keys": sorted({*before["keys"], *map(base.key_hash, keys)})}
            if "prefixes" in before:  # else they would not be of all keys, and nobody could tell
                every = (*keys, *(shared or {}).get(id_, ()))
                image["prefixes"] = sorted({*before["prefixes"], *(base.prefix_hash(key[:8]) for key in every)})
            known[hashed] = {**image, "when": before["when"]}
        return Forgotten(base.salt, tuple(known.values()))

    def without_images(self, dataset: str, ids: Iterable[str]) -> Forgotten:
        """The list without some images, which may come back."""
        gone = {self.id_hash(dataset, id_) for id_ in ids}
        return Forgotten(self.salt, tuple(image for image in self.images if image["id"] not in gone))

    def write(self, store: Path) -> None:
        """Replaces the list of a store, atomically."""
        write_json(store / FILE, {"salt": self.salt, "images": list(self.images)})


@dataclass(frozen=True)
class EarlierTraces:
    """What is kept of images that were forgotten before: it tells whether something is of them, though their keys are gone.

    Attributes:
        of: Whose hashes these are.
        keys: Of keys.
        prefixes: Of their first 8 bytes.
        untold: Images forgotten by a version that kept no such hashes: a bundle may be of them, and nobody can tell.
    """

    of: Forgotten = Forgotten()
    keys: frozenset[str] = frozenset()
    prefixes: frozenset[str] = frozenset()
    untold: int = 0

    def are_keys(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Which keys (n, 32) are theirs."""
        if not self.keys:
            return np.zeros(len(keys), np.bool_)
        return np.fromiter((self.of.key_hash(key.tobytes()) in self.keys for key in keys), np.bool_, len(keys))

    def are_prefixes(self, prefixes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Which beginnings of keys (n,), as `featurepipe.store.keys.prefixes_of` gives them, are of theirs."""
        if not self.prefixes:
            return np.zeros(len(prefixes), np.bool_)
        pieces = (prefix.tobytes() for prefix in prefixes)
        return np.fromiter((self.of.prefix_hash(one) in self.prefixes for one in pieces), np.bool_, len(prefixes))

    def are_in(self, text: str) -> bool:
        """Whether a text has one of their keys in hex."""
        return bool(self.keys) and any(
            self.of.key_hash(bytes.fromhex(found)) in self.keys for found in set(_HEX_KEY.findall(text))
        )
