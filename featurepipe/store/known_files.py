"""Files that a space knows: those of its parts with their keys, and the rejects, one JSON object a line, the last one counts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from featurepipe.errors import CorruptPart
from featurepipe.store.atomic import append_lines
from featurepipe.store.documents import REJECT_LINE, first_fault
from featurepipe.store.inside import read_lines
from featurepipe.store.keys import keys_to_arrow
from featurepipe.store.parts import PartInfo, read_array, read_ids

KNOWN_FILES = pa.schema([("id", pa.string()), ("size", pa.int64()), ("mtime_ns", pa.int64()), ("key", pa.binary(32))])
_ROWS_AT_ONCE = 1 << 18


def known_files(
    parts: Sequence[PartInfo],
    rejects: pa.Table,
    ids: pa.ChunkedArray | None,
    on_damage: Callable[[PartInfo, CorruptPart], None],
) -> pa.Table:
    """Lists files; see ``Space.known_files``.

    Args:
        parts: Where to look, the first committed first.
        rejects: Also known, and later than all parts.
        ids: Only files with one of these ids; None for all.
        on_damage: Told of each part that is damaged, and whose files then are not known.
    """
    found = [KNOWN_FILES.empty_table()]
    waiting: list[pa.Table] = []
    for table in _of_parts(parts, on_damage):
        waiting.append(table)
        if sum(map(len, waiting)) >= max(_ROWS_AT_ONCE, 0 if ids is None else len(ids)):
            found.append(_chosen(waiting, ids))
            waiting = []
    rejected = rejects.select(KNOWN_FILES.names).filter(rejects["key"].is_valid())
    return _last_of_each(pa.concat_tables([*found, _chosen([*waiting, rejected], ids)]))


def _of_parts(parts: Sequence[PartInfo], on_damage: Callable[[PartInfo, CorruptPart], None]) -> Iterator[pa.Table]:
    for part in parts:
        try:
            yield pa.table(
                [
                    read_ids(part),
                    pa.array(read_array(part, "size")),
                    pa.array(read_array(part, "mtime_ns")),
                    keys_to_arrow(read_array(part, "key")),
                ],
                schema=KNOWN_FILES,
            )
        except CorruptPart as error:
            on_damage(part, error)


def _chosen(tables: Sequence[pa.Table], ids: pa.ChunkedArray | None) -> pa.Table:
    """The rows with one of the ids; of many tables at once, since each look-up starts by hashing all the ids."""
    table = pa.concat_tables(tables)
    return table if ids is None else table.filter(pc.is_in(table["id"], value_set=ids))


def _last_of_each(files: pa.Table) -> pa.Table:
    numbered = files.append_column("row", pa.array(np.arange(len(files))))
    last = numbered.group_by(["id", "size", "mtime_ns"]).aggregate([("row", "max")])
    return files.take(last["row_max"].sort())


REJECTS = pa.schema(
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
    return pa.Table.from_pylist(list(latest.values()), schema=REJECTS)


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
