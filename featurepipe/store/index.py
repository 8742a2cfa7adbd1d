"""Which keys have which columns, and where: derived from the parts, never stored, rebuilt at will."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featurepipe.errors import UsageError
from featurepipe.store.parts import PartInfo, read_array

Keys = npt.NDArray[np.uint8]
_KEY_BYTES = 32


def as_keys(keys: npt.NDArray[Any] | Sequence[bytes]) -> Keys:
    """Returns keys as a C-contiguous (n, 32) uint8 array; also takes a sequence of 32-byte strings.

    Raises:
        UsageError: They have another shape or dtype.
    """
    if isinstance(keys, np.ndarray):
        array = np.ascontiguousarray(keys)
    else:
        items = list(keys)
        if any(len(item) != _KEY_BYTES for item in items):
            raise UsageError("keys must have 32 bytes each (SHA-256)")
        array = np.frombuffer(b"".join(items), np.uint8).reshape(-1, _KEY_BYTES)
    if array.dtype != np.uint8 or array.ndim != 2 or array.shape[1] != _KEY_BYTES:
        raise UsageError(f"keys must be an (n, 32) uint8 array, not {array.shape} {array.dtype}")
    return array


@dataclass(frozen=True, slots=True)
class _Segment:
    """Rows sorted by the first 8 bytes of their key: 48 bytes a row."""

    prefixes: npt.NDArray[np.uint64]
    keys: Keys
    parts: npt.NDArray[np.uint32]
    rows: npt.NDArray[np.uint32]

    @classmethod
    def sort(cls, keys: Keys, parts: npt.NDArray[np.uint32], rows: npt.NDArray[np.uint32]) -> _Segment:
        prefixes = _prefixes(keys)
        order = np.argsort(prefixes, kind="stable")  # stable: of several copies the first committed one is found
        return cls(prefixes[order], keys[order], parts[order], rows[order])

    @classmethod
    def merge(cls, segments: Sequence[_Segment]) -> _Segment:
        if len(segments) == 1:
            return segments[0]
        return cls.sort(
            np.concatenate([s.keys for s in segments]),
            np.concatenate([s.parts for s in segments]),
            np.concatenate([s.rows for s in segments]),
        )

    @property
    def nbytes(self) -> int:
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


def _prefixes(keys: Keys) -> npt.NDArray[np.uint64]:
    return keys[:, :8].copy().view(">u8").reshape(-1).astype(np.uint64)


class KeyIndex:
    """Keys that have all of some columns, and where each column of a key lies.

    Args:
        columns: The columns asked for; none means any part counts, whatever its columns.
        parts: Parts to start with; more come by ``add``.
    """

    def __init__(self, columns: Iterable[str] = (), parts: Iterable[PartInfo] = ()) -> None:
        self.columns = tuple(dict.fromkeys(columns))
        self.parts: list[PartInfo] = []
        self._groups: dict[frozenset[str], list[_Segment]] = {}
        for part in parts:
            self.add(part)

    def __len__(self) -> int:
        """Rows held, copies included."""
        return sum(len(s.rows) for segments in self._groups.values() for s in segments)

    @property
    def nbytes(self) -> int:
        """Memory held by the index, in bytes."""
        return sum(s.nbytes for segments in self._groups.values() for s in segments)

    def add(self, part: PartInfo) -> None:
        """Adds the rows of one part.

        Raises:
            CorruptPart: Its keys are damaged; the index is as before.
        """
        held = frozenset(self.columns) & part.columns.keys()
        if self.columns and not held:
            return
        keys = as_keys(read_array(part, "key"))
        numbers = np.full(len(keys), len(self.parts), np.uint32)
        fresh = _Segment.sort(keys, numbers, np.arange(len(keys), dtype=np.uint32))
        self.parts.append(part)
        segments = self._groups.setdefault(frozenset(held), [])
        segments.append(fresh)
        # Merging neighbours of like size keeps few segments, and each row is moved only log(n) times.
        while len(segments) > 1 and len(segments[-2].rows) <= 2 * len(segments[-1].rows):
            segments[-2:] = [_Segment.merge(segments[-2:])]

    def contains(self, keys: npt.NDArray[Any] | Sequence[bytes]) -> npt.NDArray[np.bool_]:
        """Tells for each key of (n, 32) uint8 whether all columns are there, in one part or in several."""
        wanted = as_keys(keys)
        if not self.columns:
            return self._search(wanted, frozenset())[2]
        result = np.ones(len(wanted), np.bool_)
        for column in self.columns:
            result &= self._search(wanted, frozenset([column]))[2]
        return result

    def locate(
        self, keys: npt.NDArray[Any] | Sequence[bytes], column: str | None = None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Finds the row of each key.

        Args:
            keys: (n, 32) uint8.
            column: Which column's row; ``None`` asks for a row that has all of this index's columns.

        Returns:
            Number of the part in ``self.parts``, row in that part, and whether the key was found (else both are -1).

        Raises:
            UsageError: ``column`` is not one of this index's.
        """
        if column is not None and column not in self.columns:
            raise UsageError(f"this index was built for {list(self.columns)}, not for {column!r}")
        return self._search(as_keys(keys), frozenset(self.columns if column is None else [column]))

    def _search(
        self, keys: Keys, wanted: frozenset[str]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        part = np.full(len(keys), -1, np.int64)
        row = np.full(len(keys), -1, np.int64)
        prefixes = _prefixes(keys)
        for held, segments in self._groups.items():
            if not wanted <= held:
                continue
            for segment in segments:
                position, found = segment.find(keys, prefixes)
                at = position[found]
                newer = (part[found] >= 0) & (part[found] < segment.parts[at])  # the first committed copy wins
                part[found] = np.where(newer, part[found], segment.parts[at])
                row[found] = np.where(newer, row[found], segment.rows[at])
        return part, row, part >= 0
