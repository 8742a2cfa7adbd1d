"""What is still to be computed for an image, by its key."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from featurepipe.backbones import Column
from featurepipe.errors import Reject
from featurepipe.store import Space


class Wanted:
    """Tells for a key which columns are still to be computed; the look-up of `plan.Keys`.

    Args:
        space: the feature space, for what it holds and what it rejected; None for one that does not exist yet.
        columns: the columns asked for.
        retry_rejects: whether bytes that were rejected are tried again.

    Attributes:
        reasons: why bytes were rejected before, by key. Bytes with a feature are usable whatever was said of them once:
            they were tried again.
        claimed: keys that are being computed in this run.
    """

    def __init__(self, space: Space | None, columns: Sequence[Column], *, retry_rejects: bool = False) -> None:
        self._names = tuple(str(column) for column in columns)
        self._index = None if space is None else space.index(self._names)
        self.reasons = {} if space is None or retry_rejects else self._rejected(space)
        self.claimed: set[bytes] = set()

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """Which of some keys, uint8 (n, 32), have every column: bool (n,)."""
        return np.zeros(len(keys), bool) if self._index is None else self._index.contains(keys)

    def __call__(self, key: bytes) -> tuple[str, ...] | Reject:
        """The names of the missing columns, none when all are there, or the reject that these bytes were before."""
        if key in self.reasons:
            return Reject(self.reasons[key])
        if key in self.claimed:
            return ()
        row = np.frombuffer(key, dtype=np.uint8)[None]
        return tuple(name for name in self._names if not self._holds(row, name)[0])

    def _holds(self, keys: np.ndarray, column: str) -> np.ndarray:
        return np.zeros(len(keys), bool) if self._index is None else self._index.locate(keys, column)[2]

    def _rejected(self, space: Space) -> dict[bytes, str]:
        rejects = space.rejects()
        rejects = rejects.filter(rejects["key"].is_valid())
        reasons = dict(zip(rejects["key"].to_pylist(), rejects["reason"].to_pylist(), strict=True))
        if not reasons:
            return {}
        keys = np.frombuffer(b"".join(reasons), np.uint8).reshape(len(reasons), -1)
        usable = np.logical_or.reduce([self._holds(keys, name) for name in self._names])
        return {key: reason for (key, reason), has in zip(reasons.items(), usable, strict=True) if not has}
