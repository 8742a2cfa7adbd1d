"""What is still to be computed for an image, by its key."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np

from featurepipe.backbones import Column
from featurepipe.errors import Reject
from featurepipe.store import Space
from featurepipe.store.index import KeyIndex
from featurepipe.store.parts import PartInfo


class Wanted:
    """Tells for a key which columns are still to be computed; the look-up of `plan.Keys`.

    Args:
        space: the feature space, for what it holds and what it rejected; None for one that does not exist yet.
        columns: the columns asked for.
        retry_rejects: whether bytes that were rejected are tried again.

    Attributes:
        reasons: why bytes were rejected before, by key. Bytes with a feature are usable whatever was said of them once:
            they were tried again.
        indexes: of what is there, in which a column of a key may be found.
        claimed: keys that are being computed in this run.
    """

    def __init__(self, space: Space | None, columns: Sequence[Column], *, retry_rejects: bool = False) -> None:
        self._names = tuple(str(column) for column in columns)
        self.indexes: list[KeyIndex] = [] if space is None else [space.index(self._names)]
        self.reasons = {} if space is None or retry_rejects else self._rejected(space)
        self.claimed: set[bytes] = set()

    def share(self, parts: Sequence[PartInfo]) -> Wanted:
        """The same for one share of a run, of which some parts may be there already; with claims of its own."""
        other = copy.copy(self)
        other.claimed = set()
        other.indexes = [*self.indexes, KeyIndex(self._names, parts, on_damage=lambda _part, _error: None)]
        return other

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """Which of some keys, uint8 (n, 32), have every column: bool (n,)."""
        if len(self.indexes) == 1:
            return self.indexes[0].contains(keys)
        held = np.ones(len(keys), bool)
        for name in self._names:
            held &= self.holds(keys, name)
        return held

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

    def _rejected(self, space: Space) -> dict[bytes, str]:
        rejects = space.rejects()
        rejects = rejects.filter(rejects["key"].is_valid())
        reasons = dict(zip(rejects["key"].to_pylist(), rejects["reason"].to_pylist(), strict=True))
        if not reasons:
            return {}
        keys = np.frombuffer(b"".join(reasons), np.uint8).reshape(len(reasons), -1)
        usable = np.logical_or.reduce([self.holds(keys, name) for name in self._names])
        return {key: reason for (key, reason), has in zip(reasons.items(), usable, strict=True) if not has}
