"""What is still to be computed for an image, by its key."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np

from featurepipe.backbones import Column
from featurepipe.errors import Reject
from featurepipe.extraction.plan import KeySet
from featurepipe.features.options import RejectOptions
from featurepipe.images.decode import is_repaired
from featurepipe.store import Space
from featurepipe.store.index import KeyIndex
from featurepipe.store.parts import PartInfo

_BY_DEFAULT = RejectOptions()


class MissingColumns:
    """Tells for a key which columns are still to be computed; the look-up of `plan.Keys`.

    Args:
        space: the feature space, for what it holds and what it rejected; None for one that does not exist yet.
        columns: the columns asked for.
        options: what becomes of rejects and of JPEGs that libjpeg could only repair. These are rejects unless they are kept,
            although an earlier run kept them and has left their features.

    Attributes:
        reasons: why bytes were rejected before, by key. Bytes with a feature are usable whatever was said of them once:
            they were tried again; unless they are damaged, which the store knows of features that were kept, too.
        damaged: what is wrong with bytes that are kept all the same, by key; none unless they are kept.
        indexes: of what is there, in which a column of a key may be found.
        claimed: keys that are being computed in this run.
    """

    def __init__(
        self,
        space: Space | None,
        columns: Sequence[Column],
        options: RejectOptions = _BY_DEFAULT,
    ) -> None:
        self._names = tuple(str(column) for column in columns)
        self.indexes: list[KeyIndex] = [] if space is None else [space.index(self._names)]
        told = {} if space is None else _told(space)
        damaged = {key: reason for key, reason in told.items() if is_repaired(reason)}
        usable = self._usable(list(told))
        self.damaged = damaged if options.keep_damaged else {}
        self.reasons = {
            key: reason
            for key, reason in told.items()
            if key not in self.damaged and (key in damaged if key in usable else not options.retry_rejects)
        }
        self._refused = KeySet(key for key in self.reasons if key in usable)
        self.claimed: set[bytes] = set()

    def of_shard(self, parts: Sequence[PartInfo]) -> MissingColumns:
        """The same for one shard of a run, of which some parts may be there already; with claims of its own."""
        other = copy.copy(self)
        other.claimed = set()
        other.indexes = [*self.indexes, KeyIndex(self._names, parts, on_damage=lambda _part, _error: None)]
        return other

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """Which of some keys, uint8 (n, 32), have every column and are not rejects all the same: bool (n,)."""
        if len(self.indexes) == 1:
            held = self.indexes[0].contains(keys)
        else:
            held = np.logical_and.reduce([self.holds(keys, name) for name in self._names])
        return np.asarray(held & ~self._refused.contains(keys))

    def __call__(self, key: bytes) -> tuple[str, ...] | Reject:
        """The names of the missing columns, none when all are there, or the reject that these bytes were before."""
        if key in self.reasons:
            return Reject(self.reasons[key])
        if key in self.claimed:
            return ()
        row = np.frombuffer(key, dtype=np.uint8)[None]
        return tuple(name for name in self._names if not self.holds(row, name)[0])

    def holds(self, keys: np.ndarray, column: str) -> np.ndarray:
        """Which of some keys have a column: bool (n,)."""
        held = np.zeros(len(keys), bool)
        for index in self.indexes:
            held |= index.locate(keys, column)[2]
        return held

    def _usable(self, keys: Sequence[bytes]) -> set[bytes]:
        """Those of some keys that have a column."""
        if not keys:
            return set()
        rows = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1)
        usable = np.logical_or.reduce([self.holds(rows, name) for name in self._names])
        return {key for key, has in zip(keys, usable, strict=True) if has}


def _told(space: Space) -> dict[bytes, str]:
    """What the space says of bytes that are no good, or that are kept although they are damaged, by key."""
    rejects = space.rejects()
    rejects = rejects.filter(rejects["key"].is_valid())
    return dict(zip(rejects["key"].to_pylist(), rejects["reason"].to_pylist(), strict=True))
