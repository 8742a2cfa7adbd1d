"""Finding the one feature space, column and rows that a user means."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurepipe.display import counted, has
from featurepipe.errors import StoreError, StoreMoved, UsageError, unknown
from featurepipe.store.keys import Keys, keys_from_arrow
from featurepipe.store.labelled_images import unknown_split
from featurepipe.store.rows import ColumnRows, WideRows
from featurepipe.store.snapshots import OK, have_status
from featurepipe.store.space import Origin, Space, differences, extract_command
from featurepipe.store.views import FeatureSet

TUNED_FROM = "tuned_from"
"""The note of a feature space of a tuned network: the fingerprint of the space whose activations it was tuned from."""
MIRRORED = "mirrored"
"""The field of a feature space of mirrored images; absent where they are as they are."""
_PREFIX = 4  # characters of a fingerprint below which it could be mistaken


class StoreContents(Protocol):
    """What is looked through for a space or a snapshot: the part of a ``FeatureStore`` that lists what it holds."""

    path: Path

    def check_exists(self) -> None:
        """Raises ``StoreError`` without a store at the path."""

    def spaces(self) -> list[Space]:
        """Lists the feature spaces."""

    def set_aside(self) -> dict[str, str]:
        """Says by path which documents count as absent, and why."""

    def datasets(self) -> list[str]:
        """Lists the datasets that have a snapshot."""

    def snapshot_ids(self, dataset: str) -> list[str]:
        """Lists the run ids of a dataset's snapshots, oldest first."""

    def snapshot(
        self, dataset: str, run_id: str | None = None, columns: Sequence[str] | None = None
    ) -> pa.Table | None:
        """Reads a snapshot or some columns of it, by default the current one; None without one."""


def choose_space(store: StoreContents, wanted: str | None, dataset: str | None) -> Space:
    """Finds the one space that fits; see ``FeatureStore.space``. ``wanted=None`` fits all."""
    store.check_exists()
    spaces = store.spaces()
    fitting = _fitting(spaces, wanted)
    if not fitting:
        if not spaces:
            what = f"{store.path} holds no features yet{_set_aside(store)}"
            raise StoreError(f"{what}; run: {extract_command(store.path)}")
        names = [name for space in spaces for name in (space.backbone, space.name)]
        raise unknown(
            "feature space",
            str(wanted),
            dict.fromkeys(names),
            where=str(store.path),
            see=f"featurepipe info {store.path}{_set_aside(store)}",
        )
    if len(fitting) > 1 and dataset is not None:
        keys = usable_keys(require_snapshot(store, dataset))
        fitting = [space for space in fitting if space.index().contains(keys).any()] or fitting
    if len(fitting) > 1 and (wanted is None or wanted in {space.backbone for space in fitting}):
        fitting = _only_trained(_of_images_as_they_are(fitting))
    if len(fitting) > 1:
        raise UsageError(_ambiguous(wanted, fitting))
    return fitting[0]


def name_among(store: StoreContents, space: Space) -> str | None:
    """What a command must be given as ``backbone`` to take a space: nothing in a store of one network, else network or space.

    Args:
        store: holds the space.
        space: the one that is to be taken.
    """
    spaces = store.spaces()

    def is_taken(wanted: str | None) -> bool:
        try:
            return choose_space(store, wanted, None).fingerprint == space.fingerprint
        except UsageError:
            return False

    if all(one.backbone == space.backbone for one in spaces) and is_taken(None):
        return None
    return space.backbone if is_taken(space.backbone) else space.name


def _set_aside(store: StoreContents) -> str:
    """What else might have fitted."""
    broken = [f"{path} ({why})" for path, why in store.set_aside().items() if path.startswith("spaces")]
    return f" (set aside: {'; '.join(broken[:3])})" if broken else ""


def _fitting(spaces: list[Space], wanted: str | None) -> list[Space]:
    if wanted is None:
        return spaces
    named = [space for space in spaces if wanted in {space.name, space.backbone}]
    if named or len(wanted) < _PREFIX:
        return named
    return [space for space in spaces if space.fingerprint.startswith(wanted.lower())]


def is_mirrored(fields: Mapping[str, Any]) -> bool:
    """Whether a feature space is of mirrored images."""
    return bool(fields.get(MIRRORED))


def _of_images_as_they_are(spaces: list[Space]) -> list[Space]:
    """Leaves out spaces that are asked for by their own name: of tuned networks, and of mirrored images."""
    return [space for space in spaces if TUNED_FROM not in space.notes and not is_mirrored(space.fields)] or spaces


def _only_trained(spaces: list[Space]) -> list[Space]:
    """Leaves random controls out if that leaves one space whose weights are known to be trained."""
    random = [space.notes.get("backbone", {}).get("random") for space in spaces]
    if random.count(False) == 1 and random.count(True) == len(spaces) - 1:
        return [spaces[random.index(False)]]
    return spaces


def _ambiguous(wanted: str | None, spaces: list[Space]) -> str:
    names = sorted({field for space in spaces[1:] for field in differences(spaces[0].fields, space.fields)})
    lines = [f"{f'{wanted!r} fits' if wanted else 'there are'} {len(spaces)} feature spaces; name one of them:"]
    for space in spaces:
        weights = space.notes.get("backbone", {}).get("weights")
        values = [f"weights={weights}"] if weights else []
        values += [f"{name}={_look_up(space, name)}" for name in names]
        lines.append(f"  {space.name}  ({', '.join(values)})")
    return "\n".join(lines)


def _look_up(space: Space, dotted: str) -> object:
    value: object = space.fields
    for name in dotted.split("."):
        value = value.get(name, "(absent)") if isinstance(value, dict) else "(absent)"
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."


def require_snapshot(
    store: StoreContents, dataset: str, run_id: str | None = None, columns: Sequence[str] | None = None
) -> pa.Table:
    """Reads the current snapshot, or that of a run, or some columns of it, of a dataset that must have one."""
    store.check_exists()
    table = store.snapshot(dataset, run_id, columns)
    if table is not None:
        return table
    names = store.datasets()
    if not names:
        command = extract_command(store.path, dataset=dataset)
        raise UsageError(f"unknown dataset {dataset!r}: {store.path} holds no dataset yet; make one with: {command}")
    raise unknown("dataset", dataset, names, where=str(store.path), see=f"featurepipe info {store.path}")


def _current(store: StoreContents, dataset: str) -> str | None:
    return next(reversed(store.snapshot_ids(dataset)), None)


def usable_keys(snapshot: pa.Table) -> Keys:
    """Returns the keys of the usable images, (n, 32) uint8, in snapshot order."""
    return keys_from_arrow(_usable(snapshot)["key"])


def _usable(snapshot: pa.Table) -> pa.Table:
    """The rows of usable images: as a rule all of them, which need no copy."""
    is_usable = have_status(snapshot, OK)
    return snapshot if pc.all(is_usable).as_py() else snapshot.filter(is_usable)


def open_features(
    store: StoreContents,
    dataset: str,
    node: str | Sequence[str],
    backbone: str | None,
    split: str | None,
    run_id: str | None = None,
) -> FeatureSet:
    """Joins a snapshot with the rows of one or several columns; see ``FeatureStore.features``."""
    snapshot = require_snapshot(store, dataset, run_id, ("id", "label", "split", "key", "status"))
    current = _current(store, dataset)
    space = choose_space(store, backbone, dataset)
    columns = _columns(space, node)
    if split is not None:
        snapshot = _of_split(snapshot, split, dataset)
    rejects, snapshot = _rejects(snapshot), _usable(snapshot)
    keys = keys_from_arrow(snapshot["key"])
    map_shape = space.notes.get("map_shapes", {}).get(columns[0]) if len(columns) == 1 else None
    try:
        rows = _locate(space, columns, keys, dataset)
    except StoreError as error:
        if run_id is None and _current(store, dataset) != current:  # what went may have been of the older images alone
            raise StoreMoved(f"dataset {dataset} has another snapshot by now; {error}") from error
        raise
    return FeatureSet(
        snapshot.select(["id", "label", "split"]).combine_chunks(),
        keys,
        rows,
        Origin.of(space, dataset),
        rejects=rejects,
        map_shape=tuple(map_shape) if map_shape else None,
    )


def relocated(features: FeatureSet, space: Space) -> FeatureSet:
    """Returns the same view with its rows looked up anew in their space, for when ``compact`` or ``gc`` has moved them.

    Raises:
        StoreMoved: Rows are gone, as are those of a snapshot that was removed.
    """
    try:
        rows = _locate(space, list(features.columns), features.keys, features.origin.dataset)
    except StoreError as error:
        raise StoreMoved(f"rows that were listed are gone: {error}") from error
    return replace(features, rows=rows)


def _columns(space: Space, node: str | Sequence[str]) -> list[str]:
    """The columns meant, each once."""
    named = [node] if isinstance(node, str) else list(node)
    if not named:
        raise UsageError("node=[] names no column; name one node or several")
    columns = [space.resolve_column(name) for name in named]
    for number, column in enumerate(columns):
        if column in columns[:number]:
            both = named[columns.index(column)], named[number]
            raise UsageError(f"nodes {both[0]!r} and {both[1]!r} are one column, {column}; name each column once")
    return columns


def _locate(space: Space, columns: list[str], keys: Keys, dataset: str) -> WideRows:
    """Finds the rows of every column, or says which images lack which columns."""
    index = space.index(columns)
    part, row, found = index.locate(keys)  # rows that have all columns, as the images of one run do
    places = {}
    lacking = {}
    for column in columns:
        places[column] = (part, row, found) if found.all() else index.locate(keys, column)
        missing = int(np.count_nonzero(~places[column][2]))
        if missing:
            lacking[column] = missing
    if lacking:
        raise StoreError(_missing(space, lacking, len(keys), dataset))
    widths = space.columns()
    parts = [ColumnRows.of(c, index.parts, *places[c][:2], width=widths[c].width) for c in columns]
    return WideRows(tuple(parts))


def _missing(space: Space, lacking: dict[str, int], count: int, dataset: str) -> str:
    first, *others = lacking
    store = space.path.parent.parent
    command = extract_command(
        store,
        dataset=dataset,
        backbone=space.backbone,
        notes=space.notes,
        node=first,
        mirrored=is_mirrored(space.fields),
    )
    more = "".join(f" --node {shlex.quote(column)}" for column in others)
    also = f" (and {', '.join(others)})" if others else ""
    damaged = len(space.damaged)
    lost = f"; {counted(damaged, 'part')} {'is' if damaged == 1 else 'are'} damaged" if damaged else ""
    images = f"{lacking[first]} of {counted(count, 'image')} of dataset {dataset!r}"
    return f"{images} {has(lacking[first])} no {first}{also} in {space.name}{lost}; run: {command}{more}"


def _rejects(snapshot: pa.Table) -> dict[str | None, int]:
    rejected = snapshot["split"].filter(pc.not_equal(snapshot["status"], OK))
    return {entry["values"]: entry["counts"] for entry in pc.value_counts(rejected).to_pylist()}


def _of_split(snapshot: pa.Table, split: str, dataset: str) -> pa.Table:
    splits = sorted(name for name in pc.unique(snapshot["split"]).to_pylist() if name is not None)
    if split not in splits:
        raise unknown_split(split, splits, where=f"dataset {dataset}")
    return snapshot.filter(pc.equal(snapshot["split"], split))
