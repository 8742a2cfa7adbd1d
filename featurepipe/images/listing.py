"""Listings as Arrow tables, one row per image; what names say of class and split, and what was found, ignored and guessed."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Final, Self

import pyarrow as pa
import pyarrow.compute as pc

from featurepipe.annotations import KEPT_COLUMN, label_text, names_in_doubt, plain_name, several_names, split_of
from featurepipe.display import counted, first_names
from featurepipe.errors import SourceError
from featurepipe.images.dicom import DICOM_STEP, DICOM_SUFFIXES, has_pydicom
from featurepipe.images.heif import AVIF_STEP, AVIF_SUFFIXES, HEIC_STEP, HEIF_SUFFIXES, avif_reader, heic_reader
from featurepipe.partitions import distinct, part_of, partitions, repeated, stored

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

    Within `featurepipe.partitions.spilling` a large table is in a file.

    Args:
        rows: Tuples in the order of :data:`SCHEMA`.

    Returns:
        A table of :data:`SCHEMA`, in the order of ``rows``.
    """
    return stored(_batches(iter(rows)), SCHEMA)


def _batches(rows: Iterator[Row]) -> Iterator[pa.RecordBatch]:
    while chunk := list(islice(rows, BATCH_ROWS)):
        columns = zip(*chunk, strict=True)
        arrays = [pa.array(column, type=field.type) for column, field in zip(columns, SCHEMA, strict=True)]
        yield pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def check_unique(table: pa.Table, where: str, remedy: str = "add an `id` column with unique values") -> pa.Table:
    """Returns ``table`` if no id occurs twice.

    Args:
        table: A listing.
        where: The source's name, for the message.
        remedy: What the user can do about duplicates.

    Raises:
        SourceError: Names the first few ids that occur more than once.
    """
    ids = repeated(table["id"])
    if pc.count_distinct(ids).as_py() == len(ids):
        return table
    counts = pc.value_counts(ids)
    several = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    shown = ", ".join(repr(value) for value in several.slice(0, 3).to_pylist())
    more = ", ..." if len(several) > 3 else ""
    raise SourceError(
        f"{where}: {counted(len(several), 'id', 'occurs', 'occur')} more than once: {shown}{more}; {remedy}"
    )


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


HIDDEN: Final = "hidden"
UNNAMED: Final = frozenset({"no suffix", "numbered"})
OUTSIDE: Final = "names that lead out of the archive (..)"
LINKS_TO_NOTHING: Final = "links to nothing"
LINKS_BACK: Final = "links to a folder around them"
_AS_SAID: Final = frozenset({HIDDEN, OUTSIDE, LINKS_TO_NOTHING, LINKS_BACK})
"""What files are counted by that are passed over for another reason than their suffix."""

_METADATA: Final = b"featurepipe.listing"
_TOLD: Final = b"featurepipe.told"
_ORDER: Final = {"train": 0, "val": 1, "test": 2}
_SHOWN = 6
_KEPT = 100
"""Suffixes, columns and folders that a summary names."""
_REMEMBERED: Final = 10_000  # texts of labels, so that each class is looked at once, and not each image of it
_FORMATS: Final = frozenset({
    ".jxl", ".jp2", ".j2k", ".nii", ".mha", ".nrrd", ".cr2", ".cr3", ".nef", ".arw",
    ".dng", ".orf", ".rw2", ".raf", ".raw", ".svg", ".psd", ".exr", ".hdr", ".tga", ".ppm", ".pgm", ".pbm", ".pnm", ".ico",
    ".svs", ".ndpi", ".czi", ".lif", ".nd2", ".vsi", ".mp4", ".avi", ".mov", ".mkv", ".webm",
})  # fmt: skip
"""Suffixes of images and films that somebody may expect to be read."""


def with_note(table: pa.Table, note: str) -> pa.Table:
    """A listing with one note more."""
    found = json.loads((table.schema.metadata or {}).get(_METADATA, b"{}"))
    found["notes"] = [note, *found.get("notes", [])]
    return table.replace_schema_metadata({**(table.schema.metadata or {}), _METADATA: json.dumps(found).encode()})


@dataclass
class Findings:
    """What a source notices while it lists; `attach` puts it into the metadata of the table.

    Attributes:
        ignored_are: what the ignored things are.
        passed_over: files that are no images, by suffix; ``hidden`` ones, too.
        ignored: columns or arrays that are not used.
        reasons: why some of the ignored are.
        further: columns of a manifest that are kept beside ours.
        unreadable: ids of folders that could not be listed.
        notes: what was guessed, and what seems odd.
    """

    ignored_are: str = "columns"
    passed_over: Counter[str] = field(default_factory=Counter)
    ignored: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    further: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _classes: dict[str, str] = field(default_factory=dict)
    _wrong_labels: dict[str, list[Any]] = field(default_factory=dict)
    _splits: dict[str, str | None] = field(default_factory=dict)
    _unused: Counter[str] = field(default_factory=Counter)

    def pass_over(self, name: str) -> None:
        """Counts a file that is not listed, by the suffix of its name."""
        suffix = name if name in _AS_SAID else suffix_of(name)
        self.passed_over[suffix if suffix in self.passed_over or len(self.passed_over) < _KEPT else "other"] += 1

    def label(self, value: Any, where: str, number: object = "") -> str | None:
        """The class that a label stands for, or None; counts what is no label.

        Args:
            value: What was given.
            where: What it was given for, such as ``"line"``; with ``number``, that of the first is named.
            number: Of this one.
        """
        if isinstance(value, str) and value in self._classes:
            return self._classes[value]
        text, wrong = label_text(value)
        if wrong:
            self._wrong_labels.setdefault(wrong, [0, f"{where} {number}".strip()])[0] += 1
        if text is None:
            return None
        name = printable(text)
        if isinstance(value, str) and len(self._classes) < _REMEMBERED:
            self._classes[value] = name
        return name

    def split(self, value: Any) -> str | None:
        """The split that a text in a column stands for; one that is none of ours is kept as it is, and said."""
        if isinstance(value, str) and self._splits.get(value) is not None:
            return self._splits[value]
        text, _ = label_text(value)
        if text is None:
            return None
        if text not in self._splits:
            self._splits[text] = split_of(text)
        return self._splits[text] or printable(text)

    def in_folders(self, folders: Sequence[str], split: str | None, images: int = 1) -> None:
        """Counts images in folders that are named like splits, and are not taken as such."""
        for name in folders[1 if split else 0 :]:
            if split_of(name):
                self._unused[name] += images

    def split_folders(self, labels: FolderLabels) -> None:
        """Notes which folders are splits by another name, or are not, and why."""
        if labels.has_splits:
            others = {name: split_of(name) for name in sorted(labels.top_level) if name not in {"train", "val", "test"}}
            if others:
                self.notes.append(
                    "taken as splits: " + ", ".join(f"{name}/ as {split}" for name, split in others.items())
                )
        if self._unused:
            order = sorted(self._unused.items(), key=lambda item: (-item[1], item[0]))
            named = ", ".join(f"{printable(name)}/ ({counted(n, 'image')})" for name, n in order[:_SHOWN])
            beside = [] if labels.has_splits else sorted(name for name in labels.top_level if not split_of(name))
            why = f"; others at the top: {first_names([f'{name}/' for name in beside], _SHOWN)}" if beside else ""
            self.notes.append(
                f"named like splits, and not taken as such: {named}: only folders at the top are splits, and only if all there "
                f"that hold images are{why}"
            )

    def attach(self, table: pa.Table) -> pa.Table:
        """The table with these findings in its metadata."""
        found = {
            "passed_over": dict(self.passed_over.most_common()),
            "ignored_are": self.ignored_are,
            "ignored": self.ignored,
            "reasons": self.reasons,
            "further": self.further,
            "unreadable": self.unreadable,
            "notes": [*self.notes, *self._of_labels(), *self._of_splits()],
        }
        kept = {**(table.schema.metadata or {}), _METADATA: json.dumps(found).encode()}
        return table.replace_schema_metadata(kept)

    def _of_labels(self) -> list[str]:
        return [
            f"{counted(count, 'label')} {'is' if count == 1 else 'are'} {wrong} (first: {where}), taken as missing"
            for wrong, (count, where) in self._wrong_labels.items()
        ]

    def _of_splits(self) -> list[str]:
        renamed = [f"{name} as {split}" for name, split in self._splits.items() if split not in (None, name)]
        kept = [repr(name) for name, split in self._splits.items() if split is None]
        taken = [f"splits are taken: {first_names(renamed, _SHOWN)}"] if renamed else []
        return taken + (
            [f"splits that are neither train, val nor test are kept as they are: {first_names(kept, _SHOWN)}"]
            if kept
            else []
        )


def told(listing: pa.Table) -> pa.Table:
    """The same table, marked as one whose summary has been told, so that nobody else tells it again."""
    return listing.replace_schema_metadata({**(listing.schema.metadata or {}), _TOLD: b""})


def is_told(listing: pa.Table) -> bool:
    """Whether `told` has marked the table."""
    return _TOLD in (listing.schema.metadata or {})


def unreadable_folders(listing: pa.Table) -> list[str]:
    """Ids of the folders that could not be listed, which are entries of the listing themselves."""
    return list(_found(listing).get("unreadable", ()))


def _found(listing: pa.Table) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((listing.schema.metadata or {}).get(_METADATA, b"{}"))
    return found


@dataclass(frozen=True)
class ListingSummary:
    """What a listing holds, what was ignored, and what was guessed.

    Attributes:
        images: how many are listed, folders that could not be read included.
        labelled: how many of them have a label.
        classes: how many different labels there are.
        splits: images by split; those without one are not counted.
        passed_over: files that are not listed, by suffix; ``hidden`` for those with a dot in front, and the like.
        ignored: columns of a manifest, or arrays, that are not used.
        ignored_are: which of these they are.
        reasons: why some of them are, such as that two have one name.
        further: columns of a manifest that are kept with the snapshot, for whoever says what they are.
        class_columns: of images without labels, the further columns that may be classes, and how many values each has; the
            likeliest first.
        undecodable: of which format there are files that lack their decoder here, how many, and what installs it.
        unreadable: folders that could not be read; each is a reject, as are the images that were there before.
        notes: guesses, and what seems odd.
    """

    images: int
    labelled: int
    classes: int
    splits: Mapping[str, int]
    passed_over: Mapping[str, int] = field(default_factory=dict)
    ignored: Sequence[str] = ()
    unreadable: Sequence[str] = ()
    notes: Sequence[str] = ()
    ignored_are: str = "columns"
    further: Sequence[str] = ()
    class_columns: Mapping[str, int] = field(default_factory=dict)
    undecodable: Sequence[str] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, listing: pa.Table) -> Self:
        """Counts, with what the source has left in the table's metadata; a source of a user's own may leave nothing."""
        found = _found(listing)
        labels = distinct(listing["label"]).drop_null().to_pylist()
        splits = [item for item in pc.value_counts(listing["split"]).to_pylist() if item["values"] is not None]
        splits.sort(key=lambda item: (_ORDER.get(item["values"], len(_ORDER)), item["values"]))
        several = several_names(labels)
        notes = [
            *found.get("notes", ()),
            *_only_tested(listing),
            *([several] if several else []),
            *names_in_doubt(labels),
        ]
        return cls(
            images=listing.num_rows,
            labelled=listing.num_rows - listing["label"].null_count,
            classes=len(labels),
            splits={item["values"]: item["counts"] for item in splits},
            passed_over=found.get("passed_over", {}),
            ignored=found.get("ignored", [])[:_KEPT],
            unreadable=found.get("unreadable", [])[:_KEPT],
            notes=notes,
            ignored_are=found.get("ignored_are", "columns"),
            further=found.get("further", [])[:_KEPT],
            class_columns={} if labels else _class_columns(listing),
            reasons=dict(list(found.get("reasons", {}).items())[:_KEPT]),
            undecodable=_without_decoder(listing),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def lines(self, name: str, *, labels: bool = True) -> list[str]:
        """What to tell of it: the counts, and where there is any, what was passed over and guessed.

        Args:
            name: What to call the source.
            labels: Whether its labels and splits matter.
        """
        folders = counted(len(self.unreadable), "folder")
        more = f" and {folders} that cannot be read" if self.unreadable else ""
        first = [f"{counted(self._files, 'image')}{more}", *([self._labels(), self._splits()] if labels else [])]
        said = [*self._left_out(), *(self.notes if labels else ())]
        return [f"{name}: {', '.join(first)}", *([f"{name}: {'; '.join(said)}"] if said else [])]

    @property
    def _files(self) -> int:
        """How many entries are not folders that cannot be read."""
        return self.images - len(self.unreadable)

    def _ignored(self, name: str) -> str:
        why = self.reasons.get(name)
        return (name or "one without a name") + (f" ({why})" if why else "")

    def _labels(self) -> str:
        if not self.classes:
            return "no labels"
        return counted(self.classes, "label") + (
            f" on {self.labelled:,} of them" if self.labelled < self._files else ""
        )

    def _splits(self) -> str:
        if not self.splits:
            return "no splits"
        without = self._files - sum(self.splits.values())
        named = [f"{split} {count:,}" for split, count in self.splits.items()] + (
            [f"none {without:,}"] if without else []
        )
        return f"{'splits' if len(self.splits) > 1 else 'split'} {', '.join(named)}"

    def _left_out(self) -> list[str]:
        files = {suffix: count for suffix, count in self.passed_over.items() if suffix != HIDDEN}
        found = list(self.undecodable)
        if files:
            # Those that somebody may take for images first.
            order = sorted(files, key=lambda suffix: (suffix not in _FORMATS | _AS_SAID, -files[suffix]))
            named = first_names([f"{suffix} {files[suffix]:,}" for suffix in order], _SHOWN)
            ways = ["convert images in formats that are not read"] if _FORMATS & files.keys() else []
            ways += ["a manifest can name images without a suffix, as of DICOM"] if UNNAMED & files.keys() else []
            hint = f" ({'; '.join(ways)})" if ways else ""
            hidden = self.passed_over.get(HIDDEN, 0)
            besides = f", besides {hidden:,} hidden" if hidden else ""
            found.append(f"passed over {counted(sum(files.values()), 'file')}: {named}{besides}{hint}")
        if self.ignored:
            found.append(f"ignored {self.ignored_are}: {first_names(list(map(self._ignored, self.ignored)), _SHOWN)}")
        if self.further:
            found.append(f"further columns: {first_names(list(self.further), _SHOWN)}")
        if self.unreadable:
            found.append(f"cannot be read: {first_names([f'{folder}/' for folder in self.unreadable], _SHOWN)}")
        return found


NAMED_ALIKE: Final = {
    "label": (
        "labels",
        "class",
        "classes",
        "classname",
        "target",
        "y",
        "category",
        "diagnosis",
        "labelname",
        "classid",
    ),
    "split": ("subset", "fold", "partition", "set", "istrain", "usage", "phase", "datasplit"),
}
"""Columns that may be meant: they are not taken, and the way to have them taken is told."""
_IMAGES_A_CLASS: Final = 5
"""Images that each value has on average in a column that may be of classes."""
_MOST_CLASSES: Final = 1_000
_NUMBER: Final = r"^\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*$"


def _class_columns(listing: pa.Table) -> dict[str, int]:
    """Further columns that may be classes, and how many values each has: two or more, several images for each, and no numbers.

    A column that is named like one of classes comes first, and may have numbers; one of groups or splits is none.
    """
    found: dict[str, int] = {}
    named = []
    for column in listing.column_names:
        name = column.removeprefix(KEPT_COLUMN)
        if name == column or plain_name(name) in ("group", *NAMED_ALIKE["split"]):
            continue
        values = distinct(listing[column]).drop_null()
        if not 2 <= len(values) <= min(_MOST_CLASSES, listing.num_rows // _IMAGES_A_CLASS):
            continue
        named += [name] if plain_name(name) in NAMED_ALIKE["label"] else []
        if name in named or not pc.any(pc.match_substring_regex(values, _NUMBER)).as_py():
            found[name] = len(values)
    return dict(sorted(found.items(), key=lambda item: (item[0] not in named, item[1])))


def _without_decoder(listing: pa.Table) -> list[str]:
    """Says once, before the first reject, how many files need a decoder that is not installed, by their suffixes."""
    kinds = (
        (DICOM_SUFFIXES, "DICOM", has_pydicom, DICOM_STEP),
        (HEIF_SUFFIXES, "HEIC", heic_reader, HEIC_STEP),
        (AVIF_SUFFIXES, "AVIF", avif_reader, AVIF_STEP),
    )
    found = []
    for suffixes, name, decoder, step in kinds:
        pattern = rf"(?i)\.({'|'.join(suffix[1:] for suffix in suffixes)})$"
        ids = (part_of(listing["id"], part) for part in partitions(listing.num_rows))
        count = sum(pc.sum(pc.match_substring_regex(some, pattern)).as_py() or 0 for some in ids)
        if count and not decoder():
            found.append(f"{counted(count, f'{name} file')} cannot be decoded here: {step}")
    return found


def _only_tested(listing: pa.Table) -> list[str]:
    """Says which labels the split train lacks: a folder ``test/unknown/`` is no class that can be learned."""
    if listing["split"].null_count == listing.num_rows:
        return []
    pairs = (
        listing.select(["split", "label"])
        .group_by(["split", "label"], use_threads=False)
        .aggregate([([], "count_all")])
    )
    rows = [row for row in pairs.to_pylist() if row["split"] is not None and row["label"] is not None]
    trained = {row["label"] for row in rows if row["split"] == "train"}
    strange = [row for row in rows if row["label"] not in trained]
    if not trained or not strange:
        return []
    named = first_names(
        [f"{row['label']} ({row['split']}, {counted(row['count_all'], 'image')})" for row in strange], _SHOWN
    )
    return [f"labels that split train lacks: {named}"]
