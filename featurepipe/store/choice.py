"""Finding the one feature space, column and rows that a user means."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurepipe.errors import StoreError, UsageError, unknown
from featurepipe.store.identity import differences
from featurepipe.store.keys import Keys, keys_from_arrow
from featurepipe.store.rows import ColumnRows
from featurepipe.store.snapshots import OK
from featurepipe.store.space import Space
from featurepipe.store.views import FeatureSet

if TYPE_CHECKING:
    from featurepipe.store.feature_store import FeatureStore

_PREFIX = 6  # characters of a fingerprint below which it could be mistaken


def choose_space(store: FeatureStore, wanted: str | None, dataset: str | None) -> Space:
    """Finds the one space that fits; see ``FeatureStore.space``. ``wanted=None`` fits all."""
    spaces = store.spaces()
    fitting = [space for space in spaces if wanted is None or _fits(space, wanted)]
    if not fitting:
        if not spaces:
            raise StoreError(
                f"{store.path} holds no features yet; run: featurepipe extract SOURCE --store {store.path}"
            )
        names = [name for space in spaces for name in (space.backbone, space.name)]
        raise unknown(
            "feature space",
            str(wanted),
            dict.fromkeys(names),
            where=str(store.path),
            see=f"featurepipe info {store.path}",
        )
    if len(fitting) > 1 and dataset is not None:
        keys = usable_keys(require_snapshot(store, dataset))
        fitting = [space for space in fitting if space.index().contains(keys).any()] or fitting
    if len(fitting) > 1:
        raise UsageError(_ambiguous(wanted, fitting))
    return fitting[0]


def _fits(space: Space, wanted: str) -> bool:
    if wanted in {space.name, space.backbone}:
        return True
    return len(wanted) >= _PREFIX and space.fingerprint.startswith(wanted.lower())


def _ambiguous(wanted: str | None, spaces: list[Space]) -> str:
    names = sorted({field for space in spaces[1:] for field in differences(spaces[0].fields, space.fields)})
    lines = [f"{f'{wanted!r} fits' if wanted else 'there are'} {len(spaces)} feature spaces; name one of them:"]
    for space in spaces:
        values = ", ".join(f"{name}={_look_up(space, name)}" for name in names)
        lines.append(f"  {space.name}  ({values})")
    return "\n".join(lines)


def _look_up(space: Space, dotted: str) -> object:
    value: object = space.fields
    for name in dotted.split("."):
        value = value.get(name, "(absent)") if isinstance(value, dict) else "(absent)"
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."


def require_snapshot(store: FeatureStore, dataset: str) -> pa.Table:
    """Reads the current snapshot of a dataset that must have one."""
    table = store.snapshot(dataset)
    if table is None:
        see = f"featurepipe extract SOURCE --store {store.path} --dataset {dataset}"
        raise unknown("dataset", dataset, store.datasets(), where=str(store.path), see=see)
    return table


def usable_keys(snapshot: pa.Table) -> Keys:
    """Returns the keys of the usable images, (n, 32) uint8, in snapshot order."""
    return keys_from_arrow(snapshot.filter(pc.equal(snapshot["status"], OK))["key"])


def open_features(store: FeatureStore, dataset: str, node: str, backbone: str | None, split: str | None) -> FeatureSet:
    """Joins the current snapshot with the rows of one column; see ``FeatureStore.features``."""
    snapshot = require_snapshot(store, dataset)
    space = choose_space(store, backbone, dataset)
    column = space.resolve_column(node)
    if split is not None:
        snapshot = _of_split(snapshot, split, dataset)
    usable = snapshot.filter(pc.equal(snapshot["status"], OK))
    keys = keys_from_arrow(usable["key"])
    index = space.index([column])
    part, row, found = index.locate(keys, column)
    if not found.all():
        lost = f"; {len(space.damaged)} parts are damaged" if space.damaged else ""
        raise StoreError(
            f"{np.count_nonzero(~found)} of {len(keys)} images of dataset {dataset!r} have no {column} in "
            f"{space.name}{lost}; run: featurepipe extract SOURCE --store {store.path} --dataset {dataset} "
            f"--backbone {space.backbone} --node {column}"
        )
    rows = ColumnRows.of(column, index.parts, part, row, width=space.columns()[column].width)
    map_shape = space.notes.get("map_shapes", {}).get(column)
    return FeatureSet(
        usable.select(["id", "label", "split"]).combine_chunks(),
        keys,
        rows,
        space_fingerprint=space.fingerprint,
        rejected=len(snapshot) - len(usable),
        map_shape=tuple(map_shape) if map_shape else None,
    )


def _of_split(snapshot: pa.Table, split: str, dataset: str) -> pa.Table:
    splits = sorted(name for name in pc.unique(snapshot["split"]).to_pylist() if name is not None)
    if split not in splits:
        raise unknown("split", split, splits, where=f"dataset {dataset}")
    return snapshot.filter(pc.equal(snapshot["split"], split))
