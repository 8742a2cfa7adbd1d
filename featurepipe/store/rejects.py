"""The images that could not be used: one JSON object a line, appended, the last word counts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from featurepipe.store.atomic import append_lines
from featurepipe.store.documents import REJECT_LINE, first_fault
from featurepipe.store.inside import read_lines

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
        StoreError: The file is a link.
    """
    lines = "".join(_line(row, dataset) for row in rows).encode("ascii")
    if lines:
        append_lines(path, lines)


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
    """Reads rejects, the latest of each (id, key); lines that are no rejects, torn by a kill or otherwise, are passed over.

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
    """Yields the lines that are rejects; others are passed over, see `faulty_lines`."""
    parse = REJECT_LINE.validate_json
    for _, line in read_lines(path):
        try:
            record: Any = parse(line)
        except ValidationError:
            continue
        record["key"] = None if record["key"] is None else bytes.fromhex(record["key"])
        yield record


def faulty_lines(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Yields the number of each line that readers pass over, what is wrong with it, and whether a kill may have torn it."""
    for number, line in read_lines(path):
        try:
            REJECT_LINE.validate_json(line)
        except ValidationError as error:
            fault = first_fault(error)
            yield number, fault, fault.startswith("Invalid JSON")
