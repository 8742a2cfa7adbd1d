"""Files of groups: one row for each image that is in one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from featurepipe.errors import UsageError
from featurepipe.monitoring.groups import SCHEMA, Groups
from featurepipe.spreadsheets import neutralised
from featurepipe.store.atomic import atomic_file


def write_groups(groups: Sequence[Groups], to: str | PathLike[str], *, raw_ids: bool = False) -> int:
    """Writes groups of images as one file, whole or not at all.

    One row an image: ``kind`` (exact or near), ``group`` (numbered from 0 by kind), ``id``, ``split``, ``label``, ``key``
    (SHA-256 of the image, hexadecimal), ``distance`` (to the nearest other image of a near group), ``across_splits``
    and ``label_conflict`` of the group.

    Args:
        groups: Of any kinds.
        to: File to write or replace: ``.csv``, ``.jsonl`` or ``.parquet``.
        raw_ids: Whether texts of a CSV file that a spreadsheet would take for formulas stay as they are.

    Returns:
        How many cells were changed, so that no spreadsheet runs them.

    Raises:
        UsageError: The suffix is another one, or there is no such folder.
        DiskFull: No space is left; nothing stays behind.
    """
    path = checked_file(to)
    table = pa.concat_tables([SCHEMA.empty_table(), *(one.table() for one in groups)])
    table, changed = neutralised(table) if path.suffix.lower() == ".csv" and not raw_ids else (table, 0)
    with atomic_file(path) as file:
        _WRITERS[path.suffix.lower()](table, file)
    return changed


def checked_file(to: str | PathLike[str]) -> Path:
    """The path, if groups can be written there; see ``write_groups``."""
    path = Path(to)
    if path.suffix.lower() not in _WRITERS:
        raise UsageError(f"cannot write groups to {path}: its suffix must be one of {', '.join(_WRITERS)}")
    if not path.parent.is_dir():
        raise UsageError(f"cannot write groups to {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise UsageError(f"cannot write groups to {path}: it is a folder; name a file in it")
    return path


def _write_lines(table: pa.Table, file: IO[bytes]) -> None:
    for row in table.to_pylist():
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


_WRITERS: dict[str, Callable[[pa.Table, IO[bytes]], None]] = {
    ".csv": pyarrow.csv.write_csv,
    ".jsonl": _write_lines,
    ".parquet": pq.write_table,
}
