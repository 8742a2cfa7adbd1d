"""Listings as Arrow tables, one row per image: and what names say of class and split."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from itertools import islice
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from featurepipe.annotations import split_of
from featurepipe.errors import SourceError
from featurepipe.images.dicom import DICOM_SUFFIXES
from featurepipe.images.heif import AVIF_SUFFIXES, HEIF_SUFFIXES

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("split", pa.string()),
        pa.field("size", pa.int64(), nullable=False),  # bytes of the encoded file or of the array; -1: unknown
        pa.field("mtime_ns", pa.int64(), nullable=False),  # nanoseconds since 1970; -1: unknown
        pa.field("locator", pa.binary(), nullable=False),  # only the source that wrote it can read it
    ]
)
UNKNOWN = -1
BATCH_ROWS = 65_536

# A plain tuple in the order of SCHEMA: a listing makes millions of them, and a class would triple their cost.
Row = tuple[str, str | None, str | None, int, int, bytes]

_UNPRINTABLE = re.compile("[\0\ud800-\udfff]")  # NUL ends fixed-length strings in HDF5
_LOOKS_ESCAPED = re.compile(r"\\x[0-9a-f]{2}|\\ud[89a-f][0-9a-f]{2}")


def table_of(rows: Iterable[Row]) -> pa.Table:
    """Gathers rows into a table; at most ``BATCH_ROWS`` of them exist as Python objects at a time.

    Args:
        rows: Tuples in the order of :data:`SCHEMA`.

    Returns:
        A table of :data:`SCHEMA`, in the order of ``rows``.
    """
    stream = iter(rows)
    batches = []
    while chunk := list(islice(stream, BATCH_ROWS)):
        columns = zip(*chunk, strict=True)
        arrays = [pa.array(column, type=field.type) for column, field in zip(columns, SCHEMA, strict=True)]
        batches.append(pa.RecordBatch.from_arrays(arrays, schema=SCHEMA))
    return pa.Table.from_batches(batches, schema=SCHEMA)


def check_unique(table: pa.Table, where: str, remedy: str = "add an `id` column with unique values") -> pa.Table:
    """Returns ``table`` if no id occurs twice.

    Args:
        table: A listing.
        where: The source's name, for the message.
        remedy: What the user can do about duplicates.

    Raises:
        SourceError: Names the first few ids that occur more than once.
    """
    ids = table["id"]
    if pc.count_distinct(ids).as_py() == len(ids):
        return table
    counts = pc.value_counts(ids)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    shown = ", ".join(repr(value) for value in repeated.slice(0, 3).to_pylist())
    more = ", ..." if len(repeated) > 3 else ""
    raise SourceError(f"{where}: {len(repeated)} ids occur more than once: {shown}{more}; {remedy}")


def printable(name: str) -> str:
    r"""Turns a name into an id or label that can be printed and stored as UTF-8; different names stay different.

    Bytes that are not valid UTF-8 (surrogates, as :func:`os.fsdecode` makes them) and NUL become ``\xNN``, other
    lone surrogates (JSON may hold them) ``\udNNN``. So that no valid name can look the same, backslashes are doubled
    in names with any of these and in names that look escaped already.

    Example:
        >>> printable("plain.jpg"), printable("caf\udce9.jpg"), printable(r"caf\xe9.jpg")
        ('plain.jpg', 'caf\\xe9.jpg', 'caf\\\\xe9.jpg')
    """
    if name.isascii() and "\\" not in name and "\0" not in name:  # nearly all names
        return name
    if not _UNPRINTABLE.search(name) and ("\\" not in name or not _LOOKS_ESCAPED.search(name)):
        return name
    return _UNPRINTABLE.sub(_escape, name.replace("\\", "\\\\"))


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    byte = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code
    return f"\\x{byte:02x}" if byte <= 0xFF else f"\\u{code:04x}"


IMAGE_SUFFIXES: Final = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff",
                         *HEIF_SUFFIXES, *AVIF_SUFFIXES, *DICOM_SUFFIXES)  # fmt: skip

_LONGEST_SUFFIX = 12
_IGNORED: Final = {"lost+found", "__MACOSX"}  # made by file systems and archivers, never a class


def is_image_name(name: str) -> bool:
    """Whether a file name ends like an image that we decode."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_hidden(name: str) -> bool:
    """Whether a listing passes over this file or folder name."""
    return name.startswith(".") or name in _IGNORED


def suffix_of(name: str) -> str:
    """What files are counted by that are passed over: the suffix in lower case, or ``hidden``, or ``no suffix``.

    Example:
        >>> suffix_of("a/IMG_1.NEF"), suffix_of("README"), suffix_of(".DS_Store"), suffix_of("scan.00017")
        ('.nef', 'no suffix', 'hidden', 'numbered')
    """
    base = name.rpartition("/")[2]
    if is_hidden(base):
        return "hidden"
    suffix = base.rpartition(".")[2].lower() if "." in base else ""
    if suffix.isdecimal():
        return "numbered"
    return f".{suffix}" if suffix.isascii() and suffix.isalnum() and len(suffix) < _LONGEST_SUFFIX else "no suffix"


class FolderLabels:
    """Reads class and split off folder names.

    Folders named like splits count as splits only if all folders at the top that hold images are; otherwise
    ``test/`` is a class.

    Example:
        >>> FolderLabels({"train", "val"}).of(["train", "cat", "2024"])
        ('cat', 'train')
        >>> FolderLabels({"cat", "test"}).of(["test"])
        ('test', None)
    """

    def __init__(self, top_level: Collection[str]) -> None:
        self.top_level = top_level
        self.has_splits = bool(top_level) and all(split_of(name) for name in top_level)

    def of(self, folders: Sequence[str]) -> tuple[str | None, str | None]:
        """The (label, split) of a file inside ``folders``, outermost first."""
        split = split_of(folders[0]) if self.has_splits and folders else None
        classes = folders[1:] if split else folders
        return (classes[0] if classes else None), split
