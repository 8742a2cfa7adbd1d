"""Which keys have which columns, and where: derived from the parts, never stored, rebuilt at will."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from featurepipe.errors import UsageError
from featurepipe.store.keys import Keys, as_keys
from featurepipe.store.parts import PartInfo, read_array
from featurepipe.store.segment import Segment, prefixes_of


class KeyIndex:
    """Keys that have all of some columns, and where each column of a key lies.

    Args:
        columns: The columns asked for; none means any part counts, whatever its columns.
        parts: Parts to start with; more come by ``add``.
    """

    def __init__(self, columns: Iterable[str] = (), parts: Iterable[PartInfo] = ()) -> None:
        self.columns = tuple(dict.fromkeys(columns))
        self.parts: list[PartInfo] = []
        self._groups: dict[frozenset[str], list[Segment]] = {}
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
        fresh = Segment.sort(keys, numbers, np.arange(len(keys), dtype=np.uint32))
        self.parts.append(part)
        segments = self._groups.setdefault(frozenset(held), [])
        segments.append(fresh)
        # Merging neighbours of like size keeps few segments, and each row is moved only log(n) times.
        while len(segments) > 1 and len(segments[-2].rows) <= 2 * len(segments[-1].rows):
            segments[-2:] = [Segment.merge(segments[-2:])]

    def contains(self, keys: npt.NDArray[Any] | Sequence[bytes]) -> npt.NDArray[np.bool_]:
        """Tells for each key of (n, 32) uint8 whether all columns are there, in one part or in several."""
        wanted = as_keys(keys)
        if not self.columns:
            return self.search(wanted, frozenset())[2]
        result = np.ones(len(wanted), np.bool_)
        for column in self.columns:
            result &= self.search(wanted, frozenset([column]))[2]
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
        return self.search(as_keys(keys), frozenset(self.columns if column is None else [column]))

    def search(
        self, keys: Keys, wanted: frozenset[str]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Finds for each key the first committed row that has all ``wanted`` columns; returns as ``locate``."""
        part = np.full(len(keys), -1, np.int64)
        row = np.full(len(keys), -1, np.int64)
        prefixes = prefixes_of(keys)
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
