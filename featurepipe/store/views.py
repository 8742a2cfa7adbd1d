"""A picklable view of one column's features for the images of a dataset, with labels joined by id."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from featurepipe.errors import UsageError, unknown
from featurepipe.store.keys import Keys, keys_to_arrow
from featurepipe.store.rows import ColumnRows

Labels = npt.NDArray[Any] | None


class FeatureSet:
    """Features of n images, one row each, in snapshot order; get one from ``FeatureStore.features``.

    Holds labels, keys, paths and row numbers, but no open file: pickle it and send it to a worker. Two images with
    the same bytes share one stored vector.

    Attributes:
        keys: (n, 32) uint8, the SHA-256 of each image.
        space_fingerprint: Which feature space the values are of.
        rejected: Images of the snapshot that could not be used and are not here.
        map_shape: What to reshape a row to, (C, H, W), if the pooling is ``map``; else None.
    """

    def __init__(
        self,
        table: pa.Table,
        keys: Keys,
        rows: ColumnRows,
        *,
        space_fingerprint: str,
        rejected: int = 0,
        map_shape: tuple[int, ...] | None = None,
    ) -> None:
        self.keys = keys
        self.space_fingerprint = space_fingerprint
        self.rejected = rejected
        self.map_shape = map_shape
        self._table = table
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"<FeatureSet {self.column} {self.shape} {self.dtype}>"

    @property
    def column(self) -> str:
        """The column, ``node:pooling``."""
        return self._rows.column

    @property
    def shape(self) -> tuple[int, int]:
        """Images and values per image."""
        return len(self._rows), self._rows.width

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored dtype (float32 if parts differ)."""
        return self._rows.dtype

    @property
    def ids(self) -> npt.NDArray[np.object_]:
        """(n,) ids, text."""
        return _objects(self._table["id"])

    @property
    def labels(self) -> npt.NDArray[np.object_]:
        """(n,) labels, text or None."""
        return _objects(self._table["label"])

    @property
    def splits(self) -> npt.NDArray[np.object_]:
        """(n,) splits, text or None."""
        return _objects(self._table["split"])

    @property
    def classes(self) -> list[str]:
        """The distinct labels, sorted."""
        return sorted(pc.unique(self._table["label"].drop_null()).to_pylist())

    @property
    def duplicates(self) -> int:
        """Rows whose image is also that of an earlier row."""
        return len(self) - int(pc.count_distinct(keys_to_arrow(self.keys)).as_py())

    def take(self, positions: npt.NDArray[Any] | slice) -> FeatureSet:
        """Returns the view of some rows: positions in any order, a boolean mask, or a slice."""
        chosen = np.arange(len(self))[positions]
        return FeatureSet(
            self._table.take(chosen),
            self.keys[chosen],
            self._rows.take(chosen),
            space_fingerprint=self.space_fingerprint,
            rejected=self.rejected,
            map_shape=self.map_shape,
        )

    def select(self, *, split: str | None = None, labelled: bool = False) -> FeatureSet:
        """Returns the view of one split, of the labelled rows, or of both.

        Raises:
            UsageError: No row is of that split.
        """
        keep = np.ones(len(self), np.bool_)
        if split is not None:
            splits = self.splits
            keep &= splits == split
            if not keep.any():
                raise unknown_split(split, sorted({name for name in splits if name is not None}))
        if labelled:
            keep &= self._table["label"].is_valid().to_numpy()
        return self.take(keep)

    def read(
        self, dtype: npt.DTypeLike | None = None, *, rows: npt.NDArray[Any] | slice | None = None
    ) -> npt.NDArray[Any]:
        """Reads features alone.

        Args:
            dtype: Of the result; by default the stored one.
            rows: Which rows, as in ``take``; by default all.

        Returns:
            (n, D) array, newly allocated.
        """
        return (self._rows if rows is None else self._rows.take(rows)).read(dtype)

    def check(self) -> None:
        """Compares the column's bytes with their checksums in every part that holds one of the rows.

        ``read``, ``numpy`` and ``blocks`` do not: they map and read at the disk's speed, and ``verify`` finds damage.

        Raises:
            CorruptPart: A part is damaged; the message names it and the next step.
        """
        self._rows.check()

    def numpy(self, dtype: npt.DTypeLike = np.float32, *, labelled: bool = False) -> tuple[npt.NDArray[Any], Labels]:
        """Reads everything into memory.

        Args:
            dtype: Of the features.
            labelled: Leave out rows without a label.

        Returns:
            Features (n, D), and labels (n,): text, with None where there is none; None if no row has one.
        """
        if labelled:
            return self.select(labelled=True).numpy(dtype)
        return self.read(dtype), self._labels_or_none()

    def blocks(self, rows: int = 8192, dtype: npt.DTypeLike = np.float32) -> Iterator[tuple[npt.NDArray[Any], Labels]]:
        """Yields (features, labels) of at most ``rows`` rows at a time, in order; memory does not grow with n."""
        any_label = self._table["label"].null_count < len(self)
        for start in range(0, len(self), rows):
            block = slice(start, start + rows)
            labels = _objects(self._table["label"].slice(start, rows)) if any_label else None
            yield self._rows.take(block).read(dtype), labels

    def _labels_or_none(self) -> Labels:
        return None if self._table["label"].null_count == len(self) else self.labels


def unknown_split(split: str, splits: list[str], where: str = "") -> UsageError:
    """Builds the error for a split that is not among ``splits``, which may be none."""
    if splits:
        return unknown("split", split, splits, where=where)
    inside = f" in {where}" if where else ""
    return UsageError(
        f"unknown split {split!r}{inside}: this dataset has no splits; leave split out, or put train/ and test/ above "
        "the class folders"
    )


def _objects(column: pa.ChunkedArray) -> npt.NDArray[np.object_]:
    result = np.empty(len(column), object)
    result[:] = column.to_pylist()
    return result
