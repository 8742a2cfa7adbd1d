"""Images with id, label, split and key: what a row of features is of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from featurepipe.errors import UsageError, unknown
from featurepipe.store.keys import Keys, count_distinct


@dataclass(frozen=True, eq=False, repr=False)
class LabelledImages:
    """n images in order, as columns; the part of a ``FeatureSet`` that knows nothing of features.

    Attributes:
        table: ``id``, ``label``, ``split`` of each image, text; a label or split may be null.
        keys: (n, 32) uint8, the SHA-256 of each image.
    """

    table: pa.Table
    keys: Keys

    @property
    def ids(self) -> npt.NDArray[np.object_]:
        """(n,) ids, text."""
        return _objects(self.table["id"])

    @property
    def labels(self) -> npt.NDArray[np.object_]:
        """(n,) labels, text or None."""
        return _shared_objects(self.table["label"])

    @property
    def splits(self) -> npt.NDArray[np.object_]:
        """(n,) splits, text or None."""
        return _shared_objects(self.table["split"])

    @property
    def classes(self) -> list[str]:
        """The distinct labels, sorted."""
        return sorted(pc.unique(self.table["label"].drop_null()).to_pylist())

    @property
    def unlabelled(self) -> int:
        """Images without a label."""
        return int(self.table["label"].null_count)

    @property
    def duplicates(self) -> int:
        """Rows whose image is also that of an earlier row."""
        return len(self.keys) - count_distinct(self.keys)

    @property
    def keys64(self) -> npt.NDArray[np.uint64]:
        """(n,) uint64, the first 8 bytes of each key, little endian; a strided view of ``keys``, without a copy."""
        return self.keys.view("<u8")[:, 0]

    def codes(self, classes: Sequence[str] | npt.NDArray[np.object_ | np.str_] | None = None) -> npt.NDArray[np.int64]:
        """Returns the labels as numbers.

        Args:
            classes: What the numbers count; by default ``.classes``.

        Returns:
            (n,) int64 positions in ``classes``; -1 where there is no label, or one that is not among them.
        """
        known = self.classes if classes is None else [str(name) for name in classes]
        return _places(self.table["label"], known)

    def labels_of_rows(self, rows: slice) -> npt.NDArray[np.object_]:
        """(m,) labels of some consecutive rows, text or None."""
        return _objects(self.table["label"][rows])

    def mask(
        self, *, split: str | None = None, labelled: bool = False, classes: Sequence[str] | None = None
    ) -> npt.NDArray[np.bool_]:
        """Tells which rows are of a split, labelled, and of some classes; (n,) bool.

        Raises:
            UsageError: No row is of that split, or of one of the classes.
        """
        keep = np.ones(len(self.keys), np.bool_)
        if split is not None:
            keep &= _places(self.table["split"], [split]) >= 0
            if not keep.any():
                raise unknown_split(split, sorted(pc.unique(self.table["split"].drop_null()).to_pylist()))
        if labelled:
            keep &= self.table["label"].is_valid().to_numpy()
        if classes is not None:
            strangers = sorted(set(classes) - set(self.classes))
            if strangers:
                raise unknown("class", strangers[0], self.classes)
            keep &= self.codes(classes) >= 0
        return keep


def unknown_split(split: str, splits: list[str], where: str = "") -> UsageError:
    """Builds the error for a split that is not among ``splits``, which may be none."""
    if splits:
        return unknown("split", split, splits, where=where)
    inside = f" in {where}" if where else ""
    return UsageError(
        f"unknown split {split!r}{inside}: this dataset has no splits; leave split out, or put train/ and test/ above "
        "the class folders"
    )


def _places(column: pa.ChunkedArray, values: Sequence[str]) -> npt.NDArray[np.int64]:
    found = pc.fill_null(pc.index_in(column, value_set=pa.array(values, pa.string())), -1)
    return np.asarray(found.to_numpy(), np.int64)


def _objects(column: pa.ChunkedArray) -> npt.NDArray[np.object_]:
    result = np.empty(len(column), object)
    result[:] = column.to_pylist()
    return result


def _shared_objects(column: pa.ChunkedArray) -> npt.NDArray[np.object_]:
    """The same, with one Python object for each distinct text: many times faster for labels, and smaller in a pickle."""
    distinct = pc.unique(column.drop_null()).to_pylist()
    return np.array([*distinct, None], object)[_places(column, distinct)]
