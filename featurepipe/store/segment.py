"""A sorted run of keys with the place of each: what the key index is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featurepipe.store.keys import Keys


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows sorted by the first 8 bytes of their key: 48 bytes a row."""

    prefixes: npt.NDArray[np.uint64]
    keys: Keys
    parts: npt.NDArray[np.uint32]
    rows: npt.NDArray[np.uint32]

    @classmethod
    def sort(cls, keys: Keys, parts: npt.NDArray[np.uint32], rows: npt.NDArray[np.uint32]) -> Segment:
        """Builds a segment of rows in the order of commit."""
        prefixes = prefixes_of(keys)
        order = np.argsort(prefixes, kind="stable")  # stable: of several copies the first committed one is found
        return cls(prefixes[order], keys[order], parts[order], rows[order])

    @classmethod
    def merge(cls, segments: Sequence[Segment]) -> Segment:
        """Merges segments, the earliest committed first."""
        return cls.sort(
            np.concatenate([s.keys for s in segments]),
            np.concatenate([s.parts for s in segments]),
            np.concatenate([s.rows for s in segments]),
        )

    @classmethod
    def of_keys(cls, keys: Keys) -> Segment:
        """Builds a mere set of keys, to ask with ``find``."""
        return cls.sort(keys, np.zeros(len(keys), np.uint32), np.arange(len(keys), dtype=np.uint32))

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return self.prefixes.nbytes + self.keys.nbytes + self.parts.nbytes + self.rows.nbytes

    def find(self, keys: Keys, prefixes: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Returns positions in this segment, and which of them hold the key asked for, all 32 bytes compared."""
        position = np.searchsorted(self.prefixes, prefixes).astype(np.int64)
        found = np.zeros(len(keys), np.bool_)
        open_ = np.arange(len(keys))
        while len(open_):
            at = position[open_]
            inside = at < len(self.prefixes)
            inside[inside] = self.prefixes[at[inside]] == prefixes[open_[inside]]
            open_, at = open_[inside], at[inside]
            equal = (self.keys[at] == keys[open_]).all(axis=1)
            found[open_[equal]] = True
            open_ = open_[~equal]  # same first 8 bytes, another key: look at the next row
            position[open_] += 1
        return position, found


def prefixes_of(keys: Keys) -> npt.NDArray[np.uint64]:
    """Returns the first 8 bytes of each key as a number, so that numbers sort as keys do."""
    return keys[:, :8].copy().view(">u8").reshape(-1).astype(np.uint64)
