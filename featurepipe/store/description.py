"""What is in a store, as JSON values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from featurepipe.store.feature_store import STORE_VERSION, FeatureStore
from featurepipe.store.inside import listed
from featurepipe.store.keys import count_distinct, keys_from_arrow
from featurepipe.store.snapshots import OK, REJECTED
from featurepipe.store.space import Space


def describe(store: FeatureStore) -> dict[str, Any]:
    """Sums up a store for ``featurepipe info``: its spaces, datasets and runs, as JSON values.

    Raises:
        StoreError: There is no store at its path.
    """
    store.check_exists()
    return {
        "path": str(store.path),
        "version": STORE_VERSION,
        "spaces": [_describe_space(space) for space in store.spaces()],
        "datasets": [_describe_dataset(store, name) for name in store.datasets()],
        "runs": store.runs(),
        "set_aside": store.set_aside(),
    }


def _describe_space(space: Space) -> dict[str, Any]:
    parts = space.parts()
    return {
        "name": space.name,
        "backbone": space.backbone,
        "fingerprint": space.fingerprint,
        "fields": space.fields,
        "notes": space.notes,
        "columns": {name: asdict(info) for name, info in space.columns().items()},
        "parts": len(parts),
        "rows": sum(part.rows for part in parts),
        "bytes": sum(part.file_bytes for part in parts),
        "damaged": dict(space.damaged),
        "quarantined": [path.stem for path in listed(space.path, "quarantine/*.h5")],
    }


def _describe_dataset(store: FeatureStore, name: str) -> dict[str, Any]:
    run_ids = store.snapshot_ids(name)
    table = store.snapshot(name, columns=["key", "label", "split", "size", "status"])
    if table is None:
        return {"name": name, "snapshots": 0}
    usable = table.select(["key", "label", "split"]).filter(pc.equal(table["status"], OK))
    return {
        "name": name,
        "snapshots": len(run_ids),
        "current": run_ids[-1],
        "listed": len(table),
        "images": len(usable),
        "distinct": count_distinct(keys_from_arrow(usable["key"])),
        "rejects": pc.sum(pc.equal(table["status"], REJECTED)).as_py() or 0,
        "labels": _counts(usable["label"]),
        "splits": _counts(usable["split"]),
        "bytes": pc.sum(table["size"]).as_py() or 0,
    }


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    counted = {entry["values"]: entry["counts"] for entry in pc.value_counts(column.drop_null()).to_pylist()}
    return dict(sorted(counted.items()))
