"""A table that names the images: .csv, .parquet or .jsonl with ``path`` and optional ``id``, ``label``, ``split``."""

# A path here may be a URL, or not valid UTF-8, so it stays a string.
# ruff: noqa: PTH100

from __future__ import annotations

import contextlib
import json
import os
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import IO, Any, Final

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from featurepipe.errors import FeaturepipeError, SourceError, UsageError, unknown
from featurepipe.images.blobs import Blob
from featurepipe.images.files import is_url, located, location_of, read_file, size_and_path, stat_files
from featurepipe.images.listing import BATCH_ROWS, UNKNOWN, Row, check_unique, printable, table_of
from featurepipe.images.source import Source

MANIFEST_SUFFIXES: Final = (".csv", ".parquet", ".jsonl")

_TYPES: Final = {
    "path": pa.string(),
    "id": pa.string(),
    "label": pa.string(),
    "split": pa.string(),
    "size": pa.int64(),
    "mtime_ns": pa.int64(),
}
_Columns = dict[str, list[Any]]


class ManifestSource(Source):
    """The images that a manifest lists, in its order.

    Relative paths are relative to the manifest; a path may be a URL. The id is the ``id`` column, else the path as
    written. Size and date come from the columns ``size`` and ``mtime_ns`` where both are there, else from one
    stat per row.
    """

    def __init__(self, path: str) -> None:
        self.path = path if is_url(path) else os.path.abspath(path)
        folder, _, file_name = self.path.rpartition("/")
        self._folder = folder
        self.name = printable(file_name.rpartition(".")[0])
        self.location = location_of(self.path)

    def scan(self) -> pa.Table:
        """Lists the rows in batches; reads no image.

        Raises:
            UsageError: There is no ``path`` column.
            SourceError: The manifest cannot be read, or an id occurs twice.
        """
        try:
            with _open(self.path) as file:
                return check_unique(table_of(self._rows(_batches(file, self.path))), self.path)
        except FeaturepipeError:
            raise
        except OSError as error:
            raise SourceError(f"{self.path}: cannot be read: {error}") from error
        except Exception as error:  # the border of one file: numbers out of range and deep nesting end in many errors
            raise SourceError(f"{self.path}: cannot be read as {self.path.rpartition('.')[2]}: {error}") from error

    def read(self, locator: bytes) -> bytes:
        """Reads one image; see :meth:`Source.read`."""
        size, name = size_and_path(locator)
        path = self._resolve(os.fsdecode(name))
        if self.only_under is not None:
            self.only_under.check(path)
        return read_file(path, size)

    def _rows(self, batches: Iterable[_Columns]) -> Iterator[Row]:
        for columns in batches:
            paths = columns["path"]
            if None in paths:
                raise SourceError(f"{self.path}: a row has no path; every row needs one")
            nothing = [None] * len(paths)
            ids = columns.get("id", nothing)
            labels, splits = columns.get("label", nothing), columns.get("split", nothing)
            stats: Iterable[tuple[int, int]] = ()
            if "size" in columns and "mtime_ns" in columns:
                stats = zip(map(_known, columns["size"]), map(_known, columns["mtime_ns"]), strict=True)
                stats = map(self._unless_refused, paths, stats)
            else:
                stats = self._stats(paths)
            for path, id_, label, split, (size, mtime_ns) in zip(paths, ids, labels, splits, stats, strict=True):
                yield (
                    printable(id_ or path),
                    _printable(label),
                    _printable(split),
                    size,
                    mtime_ns,
                    located(_encoded(path), size),
                )

    def _stats(self, paths: Iterable[str]) -> Iterator[tuple[int, int]]:
        """The sizes and dates of rows; of those that may not be read, nothing is asked."""
        files = [self._resolve(path) for path in paths]
        if self.only_under is None:
            return stat_files(files)
        allowed = [path for path in files if self.only_under.allows(path)]
        found = dict(zip(allowed, stat_files(allowed), strict=True))
        return (found.get(path, (UNKNOWN, UNKNOWN)) for path in files)

    def _unless_refused(self, path: str, stat: tuple[int, int]) -> tuple[int, int]:
        """What the manifest says of a row, if it may be read: else it is to be refused each time, and not be known by that."""
        may = self.only_under is None or self.only_under.allows(self._resolve(path))
        return stat if may else (UNKNOWN, UNKNOWN)

    def _resolve(self, path: str) -> str:
        if is_url(path) or path.startswith("/"):
            return path
        scheme, separator, folder = self._folder.rpartition("://")
        # A URL is no file system: nothing there resolves "..".
        return f"{scheme}{separator}{posixpath.normpath(f'{folder}/{path}')}" if separator else f"{folder}/{path}"


def _printable(value: str | None) -> str | None:
    return None if value is None else printable(value)


def _encoded(path: str) -> bytes:
    # JSON may hold surrogates that stand for no byte. Nothing has such a name: encoded anyhow, it is found missing.
    try:
        return os.fsencode(path)
    except UnicodeEncodeError:
        return path.encode("utf-8", "surrogatepass")


def _known(value: int | None) -> int:
    return -1 if value is None else value


@contextlib.contextmanager
def _open(path: str) -> Iterator[IO[bytes]]:
    if not is_url(path):
        with open(path, "rb") as file:
            yield file
        return
    blob = Blob(path)
    try:
        with blob.stream() as file:
            yield file
    finally:
        blob.close()


def _batches(file: IO[bytes], path: str) -> Iterator[_Columns]:
    suffix = path.lower().rpartition(".")[2]
    return {"csv": _csv, "parquet": _parquet, "jsonl": _jsonl}[suffix](file, path)


def _csv(file: IO[bytes], path: str) -> Iterator[_Columns]:
    header = file.readline()
    file.seek(0)
    names = _header_names(header)
    wanted = _wanted(names, path)
    # Only an empty field is null: a class may well be called "NA" or "null".
    options = pa.csv.ConvertOptions(
        column_types={name: _TYPES[name] for name in wanted},
        include_columns=wanted,
        null_values=[""],
        strings_can_be_null=True,
    )
    with pa.csv.open_csv(file, convert_options=options) as reader:
        yield from (batch.to_pydict() for batch in reader)


def _header_names(header: bytes) -> list[str]:
    if not header.strip():
        return []
    return list(pa.csv.read_csv(pa.BufferReader(header)).schema.names)


def _parquet(file: IO[bytes], path: str) -> Iterator[_Columns]:
    opened = pa.parquet.ParquetFile(file)
    wanted = _wanted(opened.schema_arrow.names, path)
    for batch in opened.iter_batches(batch_size=BATCH_ROWS, columns=wanted):
        yield {name: batch[name].cast(_TYPES[name]).to_pylist() for name in wanted}


def _jsonl(file: IO[bytes], path: str) -> Iterator[_Columns]:
    # Python's json, not Arrow's: there a label that is a number in one line and a string in the next is an error.
    lines = (line for line in file if line.strip())
    number = 0
    while chunk := list(islice(lines, BATCH_ROWS)):
        rows = []
        for line in chunk:
            number += 1
            rows.append(_json_row(line, path, number))
        names = list(dict.fromkeys(name for row in rows for name in row))
        yield {name: [_as(row.get(name), name) for row in rows] for name in _wanted(names, path)}


def _json_row(line: bytes, path: str, number: int) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise SourceError(f"{path}: line {number} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise SourceError(f"{path}: line {number} is a {type(row).__name__}, not an object with a `path`")
    return row


def _as(value: Any, name: str) -> Any:
    if value is None:
        return None
    return int(value) if _TYPES[name] == pa.int64() else str(value)


def _wanted(names: Sequence[str], path: str) -> list[str]:
    if "path" not in names:
        error = unknown("column", "path", names, where=path)
        raise UsageError(
            f"{path}: no column `path` among {', '.join(names) or 'none'}; {str(error).partition('; ')[2]}"
        )
    return [name for name in _TYPES if name in names]
