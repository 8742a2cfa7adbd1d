"""Which columns are compared, and the stored features of some images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from featurepipe.errors import StoreError, UsageError
from featurepipe.store.identity import Origin
from featurepipe.store.labels import LabelledImages
from featurepipe.store.rows import ColumnRows, WideRows
from featurepipe.store.views import FeatureSet

if TYPE_CHECKING:
    from featurepipe.store.feature_store import FeatureStore
    from featurepipe.store.index import KeyIndex
    from featurepipe.store.space import Space


@dataclass(frozen=True)
class Columns:
    """Some columns of a feature space, with the index of who has them.

    Attributes:
        space: The feature space.
        names: ``node:pooling``.
        index: Of these columns.
    """

    space: Space
    names: tuple[str, ...]
    index: KeyIndex

    @classmethod
    def of(cls, space: Space, names: Sequence[str]) -> Columns:
        """Reads the index: 48 bytes a row of the space."""
        return cls(space, tuple(names), space.index(names))

    def features(self, images: LabelledImages, names: Sequence[str], dataset: str) -> FeatureSet:
        """The features of those images that have all of the columns named; there may be none.

        Args:
            images: Whose features.
            names: Some of ``names``, in the order of the feature vector.
            dataset: Which the images are of.
        """
        places = [self.index.locate(images.keys, name) for name in names]
        there = np.logical_and.reduce([found for _, _, found in places])
        widths = self.space.columns()
        rows = [
            ColumnRows.of(name, self.index.parts, part[there], row[there], width=widths[name].width)
            for name, (part, row, _) in zip(names, places, strict=True)
        ]
        space = self.space
        store = str(space.path.parent.parent)
        origin = Origin(store, dataset, space.backbone, space.name, space.fingerprint, space.fields)
        kept = np.flatnonzero(there)
        return FeatureSet(images.table.take(kept), images.keys[kept], WideRows(tuple(rows)), origin)


def columns_to_compare(
    store: FeatureStore, dataset: str, wanted: Sequence[str] | None, backbone: str | None
) -> list[tuple[Space, list[str]]]:
    """Settles which columns of which feature spaces are meant; whose images have them is not looked at.

    Args:
        store: The feature store.
        dataset: Its name.
        wanted: Columns, nodes or aliases; None for all.
        backbone: Of which network, space or fingerprint; None for every space that has any of the columns.

    Returns:
        Each feature space with its columns.

    Raises:
        UsageError: A space or column is unknown, or none was named.
        StoreError: The store has no features.
    """
    if wanted is not None and not wanted:
        raise UsageError("columns=[] names no column; name one or several, or None for all")
    spaces = store.spaces() if backbone is None else [store.space(backbone, dataset=dataset)]
    if not spaces:
        raise StoreError(f"{store.path} holds no features yet; compute some with: featurepipe extract")
    named = {space.name: _names(space, wanted, strict=len(spaces) == 1) for space in spaces}
    for name in wanted or ():
        if not any(_names(space, [name], strict=False) for space in spaces):
            spaces[0].resolve_column(name)  # says what there is
    return [(space, named[space.name]) for space in spaces if named[space.name]]


def _names(space: Space, wanted: Sequence[str] | None, *, strict: bool) -> list[str]:
    if wanted is None:
        return list(space.columns())
    names = []
    for name in wanted:
        try:
            names.append(space.resolve_column(name))
        except UsageError:
            if strict:
                raise
    return list(dict.fromkeys(names))
