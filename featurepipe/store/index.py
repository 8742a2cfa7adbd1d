"""Which keys have which columns, and where: derived from the parts, never stored, rebuilt at will."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featurepipe.errors import CorruptPart, UsageError
from featurepipe.store.keys import KEY_BYTES, Keys, SortedKeys, as_keys
from featurepipe.store.parts import PartInfo, read_array

OnDamage = Callable[[PartInfo, CorruptPart], None]
_Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Group:
    """The rows of all parts that have the same of the columns asked for."""

    sorted_keys: SortedKeys
    numbers: _Rows
    starts: _Rows

    def find(self, keys: Keys) -> tuple[_Rows, _Rows]:
        """Returns for each key the number of its part and the row there, of the first committed copy; -1 without one."""
        found = self.sorted_keys.find(keys)
        part, row = np.full(len(keys), -1, np.int64), np.full(len(keys), -1, np.int64)
        at = np.flatnonzero(found >= 0)
        place = np.searchsorted(self.starts, found[at], side="right") - 1
        part[at], row[at] = self.numbers[place], found[at] - self.starts[place]
        return part, row


class KeyIndex:
    """Keys that have all of some columns, and where each column of a key lies.

    Holds 44 bytes a row, and 60 while it is built.

    Args:
        columns: The columns asked for; none means any part counts, whatever its columns.
        parts: The parts, the first committed first.
        on_damage: Told of each part whose keys are damaged, and which is taken to hold nothing.

    Attributes:
        columns: The columns asked for.
        parts: The parts that have any of them.

    Raises:
        CorruptPart: The keys of a part are damaged, and there is no ``on_damage``.
    """

    def __init__(
        self, columns: Iterable[str] = (), parts: Iterable[PartInfo] = (), on_damage: OnDamage | None = None
    ) -> None:
        self.columns = tuple(dict.fromkeys(columns))
        self.parts: list[PartInfo] = []
        numbers: dict[frozenset[str], list[int]] = {}
        for part in parts:
            held = frozenset(self.columns).intersection(part.columns)
            if held or not self.columns:
                numbers.setdefault(held, []).append(len(self.parts))
                self.parts.append(part)
        self._groups = {held: self._group(alike, on_damage) for held, alike in numbers.items()}

    def _group(self, numbers: Sequence[int], on_damage: OnDamage | None) -> _Group:
        # One array made for all of them at once: gathered and joined, keys would be in memory twice.
        keys = np.empty((sum(self.parts[number].rows for number in numbers), KEY_BYTES), np.uint8)
        starts, stop = [], 0
        for part in (self.parts[number] for number in numbers):
            starts.append(stop)
            try:
                keys[stop : stop + part.rows] = read_array(part, "key")
            except CorruptPart as error:
                if on_damage is None:
                    raise
                on_damage(part, error)
            else:
                stop += part.rows
        return _Group(SortedKeys.of_keys(keys[:stop]), np.array(numbers, np.int64), np.array(starts, np.int64))

    def __len__(self) -> int:
        """Rows held, copies included."""
        return sum(len(group.sorted_keys.keys) for group in self._groups.values())

    @property
    def nbytes(self) -> int:
        """Memory held by the index, in bytes."""
        return sum(group.sorted_keys.nbytes for group in self._groups.values())

    def contains(self, keys: npt.NDArray[Any] | Sequence[bytes]) -> npt.NDArray[np.bool_]:
        """Tells for each key of (n, 32) uint8 whether all columns are there, in one part or in several."""
        wanted = as_keys(keys)
        result = np.ones(len(wanted), np.bool_)
        for columns in [frozenset([column]) for column in self.columns] or [frozenset[str]()]:
            held = np.zeros(len(wanted), np.bool_)
            for group in self._with(columns):
                held |= group.sorted_keys.contains(wanted)
            result &= held
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
        part, row = np.full(len(keys), -1, np.int64), np.full(len(keys), -1, np.int64)
        for group in self._with(wanted):
            number, place = group.find(keys)
            first = (number >= 0) & ((part < 0) | (number < part))  # the first committed copy wins
            part[first], row[first] = number[first], place[first]
        return part, row, part >= 0

    def _with(self, columns: frozenset[str]) -> list[_Group]:
        return [group for held, group in self._groups.items() if columns <= held]
