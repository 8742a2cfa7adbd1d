"""Files of predictions: one row per listed image, in the listing's order, whole or not at all."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from featurepipe.display import neutralised
from featurepipe.errors import UsageError
from featurepipe.heads.bundle.files import MANIFEST
from featurepipe.store.atomic import atomic_file

SUFFIXES = (".csv", ".jsonl", ".parquet")
DIGITS = 6
"""Significant digits of a probability in text."""


class Writer:
    """Writes record batches of ``schema_of(classes)``.

    Attributes:
        neutralised: cells that a spreadsheet would have taken for formulas, and that were changed.
    """

    def __init__(self, write: Callable[[pa.RecordBatch], None], *, neutralise: bool = False) -> None:
        self._write, self._neutralise = write, neutralise
        self.neutralised = 0

    def __call__(self, batch: pa.RecordBatch) -> None:
        """Writes rows."""
        if self._neutralise:
            batch, changed = neutralised(batch)
            self.neutralised += changed
        self._write(batch)


def schema_of(classes: Sequence[str]) -> pa.Schema:
    """The columns of a file of predictions.

    ``id``; ``label``, the most probable class; ``confidence``, its probability; ``reason``, why there is no prediction; and
    for every class ``p(<class>)``, its probability. Of an image that could not be used all but id and reason is empty.
    """
    probability = [pa.field(f"p({name})", pa.float32()) for name in classes]
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("label", pa.string()),
            pa.field("confidence", pa.float32()),
            pa.field("reason", pa.string()),
            *probability,
        ]
    )


def checked_target(to: str | PathLike[str], *, spared: Sequence[Any] = ()) -> Path:
    """The path to write, if a file can be made there.

    Args:
        to: the path.
        spared: files that must not be replaced, and bundles of which no file may be; what is no path is passed over.

    Raises:
        UsageError: it would replace what predictions are made from, its suffix names no format, or its folder is missing
            or cannot be written into.
    """
    path = Path(to)
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"cannot write predictions to {path}: its suffix must be one of {', '.join(SUFFIXES)}")
    if path.is_dir():
        raise UsageError(f"cannot write predictions to {path}: it is a folder; name a file in it")
    for place in (Path(given) for given in spared if isinstance(given, str | PathLike)):
        inside = (place / MANIFEST).is_file() and path.resolve().is_relative_to(place.resolve())
        if inside or (path.exists() and place.exists() and path.samefile(place)):
            raise UsageError(
                f"cannot write predictions to {path}: that would replace what they are made from; name another file"
            )
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        raise UsageError(
            f"cannot write predictions to {path}: {error.strerror} ({path.parent}); make the folder, or name another"
        ) from error


@contextmanager
def predictions_file(path: Path, classes: Sequence[str], *, raw_ids: bool = False) -> Iterator[Writer]:
    """Opens a file of predictions for writing; it appears when the block ends, and not at all when it fails.

    Args:
        path: the file.
        classes: of the bundle.
        raw_ids: whether texts of a CSV file stay as they are, formulas as well; see `featurepipe.display`.

    Yields:
        A function that takes record batches of ``schema_of(classes)``.

    Raises:
        DiskFull: no space is left.
    """
    schema = schema_of(classes)
    with atomic_file(path) as file, ExitStack() as stack:
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            yield Writer(stack.enter_context(pq.ParquetWriter(file, schema, compression="zstd")).write_batch)
        elif suffix == ".csv":
            writer = stack.enter_context(pyarrow.csv.CSVWriter(file, _rounded_schema(schema)))
            yield Writer(lambda batch: writer.write_batch(_rounded(batch)), neutralise=not raw_ids)
        else:
            yield Writer(lambda batch: _write_lines(file, _rounded(batch), classes))


def _write_lines(file: IO[bytes], batch: pa.RecordBatch, classes: Sequence[str]) -> None:
    """One JSON object per line; the probabilities are an object by class, and null without a prediction."""
    facts = batch.select(["id", "label", "confidence", "reason"]).to_pylist()
    columns = [batch.column(f"p({name})").to_pylist() for name in classes]
    for row, values in zip(facts, zip(*columns, strict=True), strict=True):
        found = None if row["label"] is None else dict(zip(classes, values, strict=True))
        file.write(json.dumps({**row, "probabilities": found}, ensure_ascii=False).encode() + b"\n")


def _rounded_schema(schema: pa.Schema) -> pa.Schema:
    return pa.schema([field.with_type(pa.float64()) if pa.types.is_floating(field.type) else field for field in schema])


def _rounded(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Probabilities as the float64 that print with few digits."""
    schema = _rounded_schema(batch.schema)
    columns = [_six_digits(column) if pa.types.is_floating(column.type) else column for column in batch.columns]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _six_digits(column: pa.Array) -> pa.Array:
    values: np.ndarray[Any, Any] = column.to_numpy(zero_copy_only=False).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        places = DIGITS - 1 - np.floor(np.log10(np.abs(values)))
        # Division by a power of ten gives the float64 nearest to the decimal number, multiplication by 0.1 ** n does not.
        small = np.where(np.isfinite(places) & (places < 300), places, 0)
        rounded = np.round(values * 10.0**small) / 10.0**small
    return pa.array(rounded, pa.float64(), mask=~np.isfinite(values))
