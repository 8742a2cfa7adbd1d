"""A table that names the images: .csv, .parquet or .jsonl with ``path``, optional ``id``, ``label``, ``split``, and more."""

# A path here may be a URL, or not valid UTF-8, so it stays a string.
# ruff: noqa: PTH100

from __future__ import annotations

import codecs
import contextlib
import csv
import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice, repeat
from typing import IO, Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from featurepipe.annotations import (
    KEPT_COLUMN,
    column_named,
    duplicate,
    path_column,
    plain_name,
    read_csv,
    texts_of,
    whole_numbers,
)
from featurepipe.display import counted
from featurepipe.errors import FeaturepipeError, Message, Option, Reject, SourceError, UsageError, unknown
from featurepipe.images.blobs import Blob
from featurepipe.images.files import is_url, located, location_of, read_file, read_head, size_and_path, stat_files
from featurepipe.images.listing import (
    BATCH_ROWS,
    NAMED_ALIKE,
    UNKNOWN,
    Findings,
    Row,
    check_unique,
    printable,
    table_of,
)
from featurepipe.images.regions import Box, Boxes, Payload, Region, Whole, region_locator, split_region, stamp
from featurepipe.images.source import Source

MANIFEST_SUFFIXES: Final = (".csv", ".parquet", ".jsonl")

_OURS: Final = ("path", "id", "label", "split", "size", "mtime_ns")
_Columns = dict[str, Any]  # a list each; a further column may be an Arrow array
NO_BOX: Final = "none"
_SIDES: Final = ("box 0", "box 1", "box 2", "box 3")
_FAR_OUT: Final = 2
"""Where no box in shares of its image ends, unless it is in pixels."""
_MISSING: Final = b"\0missing "
"""The beginning of the locator of an image that an archive lacks; the path follows."""
LONGEST_VALUE: Final = 1000
"""Characters that a value of a further column may have: longer ones are texts about an image, and belong elsewhere."""
_PROBED: Final = 64  # first rows of a batch
_OF_ONE_KIND: Final = (pa.types.is_string, pa.types.is_integer, pa.types.is_boolean, pa.types.is_null)


class ManifestSource(Source):
    """The images that a manifest lists, in its order.

    Relative paths are relative to the manifest; a path may be a URL. The id is the ``id`` column, else the path as
    written. ``label`` and ``split`` are found in any case; splits by any of their usual names, see
    `featurepipe.annotations`. Labels of a .csv that are all whole numbers, some written as ``1.0``, are whole numbers,
    as in the other kinds. Size and date come from the columns ``size`` and ``mtime_ns`` where both are there and hold
    whole numbers, else from one stat per row. What other columns there are is told,
    and kept as text: the listing has them as ``column:NAME``, for whoever says what they are (a group, a target).

    A row with a box is a region: see ``docs/decisions/regions.md``. Boxes are in the column ``box`` or ``bbox``, as ``x y w h``
    or a JSON list, or in the columns that ``boxes`` names. The id of a region is that of the row, ``#`` and the number of the box
    among those of this id, from 1; the column ``group`` holds the path, if the manifest has no such column.

    Args:
        path: A path or URL.
        path_column: The name of the column of paths; by default ``path``, ``file``, ``filename``, ``image`` and the like.
        boxes: Which columns are boxes, and of what unit and margin.

    Attributes:
        images: The folder that relative paths are relative to, or its URL; None for that of the manifest.
        archive: The source that has the images instead, by their path in it; or None.
    """

    def __init__(self, path: str, path_column: str | None = None, boxes: Boxes = Boxes()) -> None:  # noqa: B008  # is frozen
        self.path_column, self.boxes = path_column, boxes
        self.images: str | None = None
        self.archive: Source | None = None
        self._members: _Members | None = None
        self._taken: dict[str, str] = {}  # the column of each of ours that was there in the last scan
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
        findings, self._taken, further = Findings(), {}, _FurtherColumns()
        self._list_members()
        kind = self.path.rpartition(".")[2]
        try:
            with _open(self.path) as file:
                table = further.add_to(table_of(self._rows(self._batches(file, findings, further), findings)))
        except UnicodeDecodeError as error:
            raise SourceError(
                f"{self.path}: cannot be read as {kind}: it is not UTF-8 ({error}); save it as UTF-8"
            ) from error
        except FeaturepipeError:
            raise
        except OSError as error:
            raise SourceError(f"{self.path}: cannot be read: {error}") from error
        except Exception as error:  # the border of one file: numbers out of range and deep nesting end in many errors
            raise SourceError(f"{self.path}: cannot be read as {kind}: {error}") from error
        if kind.lower() == "csv" and "label" in self._taken:
            table = _with_whole_numbers(table, findings)
        return findings.attach(check_unique(table, self.path))

    def read(self, locator: bytes) -> Payload:
        """Reads one image; see :meth:`Source.read`."""
        image, box = split_region(locator)
        if box is not None:
            box.check()
        if self.archive is not None:
            content = _read_member(self.archive, image)
            return content if box is None else Region(content, box)
        size, name = size_and_path(image)
        path = self._resolve(os.fsdecode(name))
        if self.only_under is not None:
            self.only_under.check(path)
        content = read_file(path, size, redirects=self.only_under is None)
        return content if box is None else Region(content, box)

    def written_path(self, locator: bytes) -> str | None:
        """The path as the manifest has it, of an image's locator without a box; None where an archive has the image."""
        return None if self.archive is not None else printable(os.fsdecode(size_and_path(locator)[1]))

    def head(self, locator: bytes, size: int) -> bytes:
        """The first bytes of an image; see :meth:`Source.head`."""
        if self.archive is not None:
            return super().head(locator, size)
        path = self._resolve(os.fsdecode(size_and_path(locator)[1]))
        if self.only_under is not None:
            self.only_under.check(path)
        return read_head(path, size)

    def _rows(self, batches: Iterable[tuple[Sequence[int], _Columns]], findings: Findings) -> Iterator[Row]:
        """The rows of batches, each with the numbers of its lines."""
        numbered = _NumberedBoxes()
        for numbers, columns in batches:
            paths = columns["path"]
            if None in paths:
                line = numbers[paths.index(None)]
                raise SourceError(f"{self.path}: line {line} has no path; every row needs one")
            nothing: Sequence[None] = [None] * len(paths)
            ids = columns.get("id", nothing)
            labels: Iterable[str | None] = nothing
            splits: Iterable[str | None] = nothing
            if "label" in columns:
                labels = map(findings.label, columns["label"], repeat("line"), numbers)
            if "split" in columns:
                splits = map(findings.split, columns["split"])
            stats: Iterable[tuple[int, int]] | None = None
            if "size" in columns and "mtime_ns" in columns:
                stats = zip(map(_known, columns["size"]), map(_known, columns["mtime_ns"]), strict=True)
                stats = map(self._unless_refused, paths, stats)
            boxes = self._boxes(numbers, columns)
            for path, id_, label, split, (image, size, mtime_ns), box in zip(
                paths,
                ids,
                labels,
                splits,
                self._located(paths, stats),
                nothing if boxes is None else boxes,
                strict=True,
            ):
                name = printable(id_ or path)
                if box is None:
                    yield name, label, split, size, mtime_ns, image
                else:
                    yield numbered(name, box), label, split, size, stamp(mtime_ns, box), region_locator(image, box)
            if boxes is not None:
                numbered.whole += sum(box is None for box in boxes)
        findings.notes += numbered.notes(self.boxes)

    def _boxes(self, numbers: Sequence[int], columns: _Columns) -> list[Box | None] | None:
        """The boxes of a batch of rows; None where the manifest has none.

        Raises:
            SourceError: A box is not four numbers; names the line.
        """
        if "box" not in columns and "box 0" not in columns:
            return None
        values = columns["box"] if "box" in columns else list(zip(*(columns[name] for name in _SIDES), strict=True))
        boxes = []
        for number, value in zip(numbers, values, strict=True):
            try:
                boxes.append(self.boxes.box(value))
            except (TypeError, ValueError, OverflowError):
                raise SourceError(
                    Message(
                        f"{self.path}: line {number} has the box {str(value)[:100]!r}, which is not four numbers; write x y w h "
                        "or [x, y, w, h], leave it empty for the whole image, or take no column for boxes: ",
                        Option("box", NO_BOX),
                    )
                ) from None
        return boxes

    def _list_members(self) -> None:
        """Lists the archive that has the images, if there is one."""
        self._members = None if self.archive is None else _Members(self.archive)

    def _located(
        self, paths: Sequence[str], stats: Iterable[tuple[int, int]] | None = None
    ) -> Iterator[tuple[bytes, int, int]]:
        """The (locator, size, date) of the images at these paths; ``stats`` are sizes and dates, if they are known."""
        if self._members is not None:
            return map(self._members.located, paths)
        stats = self._stats(paths) if stats is None else stats
        return ((located(_encoded(path), size), size, date) for path, (size, date) in zip(paths, stats, strict=True))

    def _stats(self, paths: Iterable[str]) -> Iterator[tuple[int, int]]:
        """The sizes and dates of rows; of those that may not be read, nothing is asked."""
        files = [self._resolve(path) for path in paths]
        if self.only_under is None:
            return stat_files(files)
        allowed = [path for path in files if self.only_under.allows(path)]
        found = dict(zip(allowed, stat_files(allowed, redirects=False), strict=True))
        return (found.get(path, (UNKNOWN, UNKNOWN)) for path in files)

    def _unless_refused(self, path: str, stat: tuple[int, int]) -> tuple[int, int]:
        """What the manifest says of a row, if it may be read: else it is to be refused each time, and not be known by that."""
        may = self.only_under is None or self.only_under.allows(self._resolve(path))
        return stat if may else (UNKNOWN, UNKNOWN)

    def _batches(
        self, file: IO[bytes], findings: Findings, further: _FurtherColumns
    ) -> Iterator[tuple[Sequence[int], _Columns]]:
        suffix = self.path.lower().rpartition(".")[2]
        batches = {"csv": _csv, "parquet": _parquet, "jsonl": _jsonl}[suffix](file, self._columns_of)
        ignored: dict[str, None] = {}
        for numbers, names, columns in batches:
            used = {ours: columns[name] for ours, name in self._columns_of(names).items()}
            used = _without_foreign_sizes(used)
            taken = {self._taken[ours] for ours in used}
            ignored |= dict.fromkeys(name for name in names if name not in columns)
            more = {name: values for name, values in columns.items() if name not in taken}
            if ("box" in used or "box 0" in used) and column_named("group", names) is None:
                more["group"] = list(used["path"])  # regions of one image stay together, unless a column says otherwise
            further.take(len(numbers), more)
            findings.reasons |= {name: _why_ignored(name, names) for name in names if name and name not in columns}
            yield numbers, used
        findings.further += further.kept()
        findings.ignored += [*ignored, *further.too_long]
        findings.reasons |= dict.fromkeys(further.too_long, _TOO_LONG)
        findings.notes += _advice([*further.kept(), *further.too_long], self._taken)

    def _columns_of(self, names: Sequence[str]) -> dict[str, str]:
        """What each of our columns is called in the manifest.

        Raises:
            UsageError: There is none of paths, or one of ours is there twice.
        """
        if self.path_column is not None and self.path_column not in names:
            raise unknown("column", self.path_column, names, where=self.path)
        found = {"path": self.path_column or path_column(names), "id": "id" if "id" in names else None}
        found |= {ours: column_named(ours, names) for ours in ("label", "split")}
        if "size" in names and "mtime_ns" in names:
            found |= {"size": "size", "mtime_ns": "mtime_ns"}
        found |= self._box_columns(names)
        path = found["path"]
        if path is None:
            hint = str(unknown("column", "path", names)).partition("; ")[2]
            near = f"{hint}; " if hint.startswith("nearest") else ""
            raise UsageError(
                Message(
                    f"{self.path}: no column `path` among {', '.join(names) or 'none'}; {near}name the one of paths with ",
                    Option("path_column"),
                    ", or call it path, file, filename or image",
                )
            )
        # A column that is named for two things is that of the paths.
        used = {ours: name for ours, name in found.items() if name is not None and (ours == "path" or name != path)}
        group = column_named("group", names)  # it is one of groups without being asked for, later
        if (twice := duplicate(names, [*used.values(), *([group] if group else [])])) is not None:
            raise UsageError(f"{self.path}: column {twice!r} is there {names.count(twice)} times; leave one")
        self._taken |= used
        return used

    def _box_columns(self, names: Sequence[str]) -> dict[str, str | None]:
        """What the columns of boxes are called, if there are any.

        Raises:
            UsageError: One that was asked for is not there.
        """
        asked = self.boxes.column
        if asked == NO_BOX:
            return {}
        if asked is None:
            return {"box": column_named("box", names) or column_named("bbox", names)}
        if asked in names:
            return {"box": asked}
        sides = [side.strip() for side in asked.split(",")]
        for side in sides if len(sides) == len(_SIDES) else [asked]:
            if side not in names:
                raise unknown("column", side, names, where=self.path)
        return dict(zip(_SIDES, sides, strict=True))

    def _resolve(self, path: str) -> str:
        if is_url(path) or path.startswith("/"):
            return path
        scheme, separator, folder = (self.images or self._folder).rpartition("://")
        # A URL is no file system: nothing there resolves "..".
        return f"{scheme}{separator}{posixpath.normpath(f'{folder}/{path}')}" if separator else f"{folder}/{path}"


class _Members:
    """The images in an archive by their path there, or by the end of it that no other has.

    Args:
        archive: The source; an id of it begins with the archive's name.
    """

    def __init__(self, archive: Source) -> None:
        self._location, self._listing = archive.location, archive.scan()
        self._rows: dict[str, int | None] = {}
        for row, id_ in enumerate(self._listing["id"].to_pylist()):
            rest = id_
            while rest:
                self._rows[rest] = None if rest in self._rows else row
                rest = rest.partition("/")[2]

    def located(self, path: str) -> tuple[bytes, int, int]:
        """The (locator, size, date) of the image at a path; of one that is missing, a locator whose reading says so.

        Raises:
            SourceError: Several images have a path that ends so.
        """
        row = self._rows.get(name := printable(posixpath.normpath(path).lstrip("/")), -1)
        if row is None:
            raise SourceError(f"{self._location}: several images there end in {name!r}; name it with its folders")
        if row < 0:
            return _MISSING + _encoded(path), UNKNOWN, UNKNOWN
        return tuple(self._listing[column][row].as_py() for column in ("locator", "size", "mtime_ns"))


def _read_member(archive: Source, locator: bytes) -> Whole:
    if locator.startswith(_MISSING):
        raise Reject(f"missing: no such image in {archive.location}")
    payload = archive.read(locator)
    return payload.image if isinstance(payload, Region) else payload


class _NumberedBoxes:
    """Counts the boxes of each image, and what is to be said of all of them."""

    def __init__(self) -> None:
        self.whole = 0
        self._of: Counter[str] = Counter()
        self._tiny = self._large = 0

    def __call__(self, image: str, box: Box) -> str:
        """The id of the next box of an image."""
        self._of[image] += 1
        end = max(box.x + box.w, box.y + box.h)
        self._tiny += box.unit == "pixels" and end <= 1
        self._large += box.unit == "share" and end > _FAR_OUT
        return f"{image}#{self._of[image]}"

    def notes(self, boxes: Boxes) -> list[str]:
        """What was found."""
        total = self._of.total()
        if not total:
            return []
        unit = "shares of the image" if boxes.unit == "share" else "pixels"
        said = [f"{counted(total, 'region')} of {counted(len(self._of), 'image')}, by boxes in {unit}"]
        if self.whole:
            said.append(f"{counted(self.whole, 'row')} without a box, each its whole image")
        if self._tiny == total:
            said.append(
                "every box ends within the first pixel: if they are shares of the image, ask for --box-unit share"
            )
        elif self._tiny:
            said.append(
                f"{counted(self._tiny, 'region')} within the first pixel: are some boxes shares, and others pixels?"
            )
        if self._large:
            said.append(
                f"{counted(self._large, 'region')} in shares of more than {_FAR_OUT}: pixels are --box-unit pixels, the default"
            )
        return said


def _with_whole_numbers(table: pa.Table, findings: Findings) -> pa.Table:
    """The listing with labels that are whole numbers as such, as the other kinds of manifest have them."""
    labels, said = whole_numbers(table["label"])
    findings.notes += [said] * bool(said)
    return table.set_column(table.column_names.index("label"), table.schema.field("label"), labels)


def _encoded(path: str) -> bytes:
    # JSON may hold surrogates that stand for no byte. Nothing has such a name: encoded anyhow, it is found missing.
    try:
        return os.fsencode(path)
    except UnicodeEncodeError:
        return path.encode("utf-8", "surrogatepass")


def _known(value: Any) -> int:
    return UNKNOWN if value is None else int(value)


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


_ColumnsOf = Callable[[Sequence[str]], dict[str, str]]
_Batch = tuple[Sequence[int], Sequence[str], _Columns]
"""Numbers of lines or rows, the names of all columns, and those that can be told apart, by name."""


def _without_foreign_sizes(columns: _Columns) -> _Columns:
    """The columns without ``size`` and ``mtime_ns`` if they hold anything but whole numbers: then they are a user's own."""
    pair = [columns.get(name, ()) for name in ("size", "mtime_ns")]
    if all(value is None or _is_whole(value) for values in pair for value in values):
        return columns
    return {name: values for name, values in columns.items() if name not in {"size", "mtime_ns"}}


class _FurtherColumns:
    """The columns of a manifest that are none of ours, as text, batch by batch."""

    def __init__(self) -> None:
        self.rows = 0
        self.too_long: dict[str, None] = {}
        self._chunks: dict[str, list[pa.Array]] = {}

    def take(self, rows: int, columns: Mapping[str, pa.Array | list[Any]]) -> None:
        """Adds what they hold of further rows; a column that other batches have, or had, is null there."""
        for name, values in columns.items():
            if name in self.too_long:
                continue
            # Of features or images in a column the first rows tell: to write out all of them takes minutes and gigabytes.
            texts = _texts(values[:_PROBED])
            if len(values) > _PROBED and not _is_too_long(texts):
                texts = _texts(values)
            if _is_too_long(texts):
                self.too_long[name] = None
                self._chunks.pop(name, None)
                continue
            self._chunks.setdefault(name, [pa.nulls(self.rows, pa.string())] if self.rows else []).append(texts)
        self.rows += rows
        for chunks in self._chunks.values():
            if lacking := self.rows - sum(map(len, chunks)):
                chunks.append(pa.nulls(lacking, pa.string()))

    def kept(self) -> list[str]:
        """The names of those that the listing has."""
        return list(self._chunks)

    def add_to(self, listing: pa.Table) -> pa.Table:
        """The listing with these columns, called ``column:NAME``."""
        for name in self.kept():
            listing = listing.append_column(KEPT_COLUMN + printable(name), pa.chunked_array(self._chunks[name]))
        return listing


_TOO_LONG: Final = f"values of over {LONGEST_VALUE:,} characters"


def _why_ignored(name: str, names: Sequence[str]) -> str:
    count = names.count(name)
    return f"there {count} times" if count > 1 else _TOO_LONG


def _is_too_long(texts: pa.Array) -> bool:
    return bool((pc.max(pc.utf8_length(texts)).as_py() or 0) > LONGEST_VALUE)


def _texts(values: pa.Array | list[Any]) -> pa.Array:
    if not isinstance(values, list):
        return texts_of(values)
    first = next((value for value in values if value is not None), None)
    if first is None or isinstance(
        first, str | int
    ):  # nearly all columns: Arrow is many times faster than a call a value
        with contextlib.suppress(pa.ArrowException, UnicodeError, OverflowError):
            found = pa.array(values)
            if any(is_kind(found.type) for is_kind in _OF_ONE_KIND):
                return found.cast(pa.string())
    return texts_of(map(_encodable, values))


def _encodable(value: Any) -> Any:
    """A value as it is; a text from JSON that UTF-8 does not hold as one that it does."""
    if not isinstance(value, str):
        return value
    try:
        value.encode()
    except UnicodeEncodeError:
        return printable(value)
    return value


def _is_whole(value: Any) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, str) and re.fullmatch(r"-?\d{1,18}", value) is not None
    )


def _advice(ignored: Sequence[str], taken: Mapping[str, str]) -> list[str]:
    """What to say of columns that were guessed, or may be meant."""
    path = taken.get("path", "path")
    notes = [] if plain_name(path) == "path" else [f"paths are in column {path!r}"]
    for ours, alike in NAMED_ALIKE.items():
        meant = [name for name in ignored if plain_name(name) in alike]
        if ours not in taken and meant:
            option = Option("label" if ours == "label" else "split_column", meant[0])
            notes.append(
                Message(
                    f"there is no column {ours!r}: if it is {meant[0]!r}, call it {ours!r}, or name it later with ",
                    option,
                )
            )
    return notes


def _all(names: Sequence[str], ours: Mapping[str, str]) -> list[str]:
    """The columns to read: ours, and all others that can be told apart by their names."""
    return [name for name in names if name in ours.values() or (name and names.count(name) == 1)]


def _csv(file: IO[bytes], columns_of: _ColumnsOf) -> Iterator[_Batch]:
    table = read_csv(file)
    used = {name: table.names.index(name) for name in _all(table.names, columns_of(table.names))}
    while True:
        # Column by column as they come: of a batch of rows as lists, the garbage collector visits each again and again.
        numbers: list[int] = []
        columns: _Columns = {name: [] for name in used}
        fill = [(columns[name].append, place) for name, place in used.items()]
        for number, fields in islice(table.rows, BATCH_ROWS):
            numbers.append(number)
            for append, place in fill:
                append(fields[place])
        if not numbers:
            return
        yield numbers, table.names, columns


def _parquet(file: IO[bytes], columns_of: _ColumnsOf) -> Iterator[_Batch]:
    opened = pa.parquet.ParquetFile(file)
    names = opened.schema_arrow.names
    ours = columns_of(names)
    texts = {ours[name] for name in ("path", "id") if name in ours}
    first = 1
    large = _too_large(opened.metadata) - set(ours.values())
    read = [name for name in _all(names, ours) if name not in large]
    for batch in opened.iter_batches(batch_size=BATCH_ROWS, columns=read):
        columns = {
            name: _plain(batch[name], as_text=name in texts) if name in ours.values() else _decoded(batch[name])
            for name in batch.schema.names
        }
        yield range(first, first + batch.num_rows), names, columns
        first += batch.num_rows


def _too_large(metadata: Any) -> set[str]:
    """The columns of which some value is longer as text than a further column may have, as the file's own sizes tell.

    An item of a list makes three characters at least, a number of 8 bytes as well; a character has up to 4 bytes.
    """
    if not metadata.num_row_groups or not (rows := metadata.row_group(0).num_rows):
        return set()
    group = metadata.row_group(0)
    flat = set(metadata.schema.to_arrow_schema().names)
    sizes: dict[str, tuple[int, int]] = {}
    for place in range(group.num_columns):
        leaf = group.column(place)
        path = metadata.schema.column(place).path
        name = path if path in flat else path.partition(".")[0]
        values, size = sizes.get(name, (0, 0))
        sizes[name] = values + leaf.num_values, size + leaf.total_uncompressed_size
    return {
        name
        for name, (values, size) in sizes.items()
        if values > rows * (LONGEST_VALUE / 3 + 1) or size > rows * 8 * LONGEST_VALUE
    }


def _plain(column: pa.Array, *, as_text: bool) -> list[Any]:
    if as_text or pa.types.is_boolean(column.type):
        column = column.cast(pa.string())
    values: list[Any] = _decoded(column).to_pylist()
    return values


def _decoded(column: pa.Array) -> pa.Array:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _jsonl(file: IO[bytes], columns_of: _ColumnsOf) -> Iterator[_Batch]:
    # Python's json, not Arrow's: there a label that is a number in one line and a string in the next is an error.
    lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
    while chunk := list(islice(lines, BATCH_ROWS)):
        numbers = [number for number, _ in chunk]
        rows = [_json_row(line, number) for number, line in chunk]
        names = list(dict.fromkeys(name for row in rows for name in row))
        ours = columns_of(names)
        texts = {ours[name] for name in ("path", "id") if name in ours}
        columns = {
            name: [_as_text(row.get(name)) if name in texts else row.get(name) for row in rows]
            for name in _all(names, ours)
        }
        yield numbers, names, columns


def _json_row(line: bytes, number: int) -> Mapping[str, Any]:
    try:
        row = json.loads(line.removeprefix(codecs.BOM_UTF8))
    except (ValueError, RecursionError) as error:
        raise csv.Error(f"line {number} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise csv.Error(f"line {number} is a {type(row).__name__}, not an object with a `path`")
    return row


def _as_text(value: Any) -> str | None:
    return None if value is None else str(value)
