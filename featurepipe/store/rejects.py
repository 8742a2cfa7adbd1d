"""The images that could not be used: one JSON object a line, appended, the last word counts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from featurepipe.store.atomic import reporting_full_disk

SCHEMA = pa.schema(
    [
        ("key", pa.binary(32)),
        ("id", pa.string()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("reason", pa.string()),
        ("run_id", pa.string()),
    ]
)


def append_rejects(path: Path, rows: Iterable[Mapping[str, Any]], *, dataset: str = "") -> None:
    """Appends rejects as whole lines, synced.

    Args:
        path: ``rejects.jsonl`` of a space.
        rows: ``key`` (32 bytes, or None if the image could not be read), ``id``, ``size``, ``mtime_ns``, ``reason``,
            ``run_id``.
        dataset: Name of the dataset they belong to.

    Raises:
        DiskFull: No space is left.
    """
    lines = "".join(_line(row, dataset) for row in rows).encode("ascii")
    if not lines:
        return
    with reporting_full_disk(path):
        descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_RDWR | os.O_CLOEXEC, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                lines = b"\n" + lines  # someone was killed in the middle of a line: do not join it
            while lines:
                lines = lines[os.write(descriptor, lines) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _line(row: Mapping[str, Any], dataset: str) -> str:
    key = row.get("key")
    record = {
        "key": None if key is None else bytes(key).hex(),
        "id": row["id"],
        "size": int(row["size"]),
        "mtime_ns": int(row["mtime_ns"]),
        "reason": row["reason"].encode("utf-8", "replace").decode("utf-8"),  # file names may hide in it
        "run_id": row["run_id"],
        "dataset": dataset,
    }
    return json.dumps(record) + "\n"


def read_rejects(path: Path, *, dataset: str | None = None, first: bool = False) -> pa.Table:
    """Reads rejects, the latest of each (id, key); lines that were torn by a kill are passed over.

    Args:
        path: ``rejects.jsonl``; may be missing.
        dataset: Only those of this dataset.
        first: The first of each (id, key) instead, whose run is the one that found it.
    """
    latest: dict[tuple[str, bytes | None], dict[str, Any]] = {}
    for record in _records(path):
        if dataset is None or record.get("dataset", "") == dataset:
            place = (record["id"], record["key"])
            if first and place in latest:
                continue
            latest.pop(place, None)
            latest[place] = record
    return pa.Table.from_pylist(list(latest.values()), schema=SCHEMA)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
                record["key"] = None if record["key"] is None else bytes.fromhex(record["key"])
                complete = all(name in record for name in SCHEMA.names)
            except (ValueError, TypeError, KeyError):
                continue
            if complete:
                yield record
