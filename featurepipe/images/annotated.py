"""Files that people annotate objects in: COCO's JSON of instances, and YOLO's folders of text files; each box is a region."""

# A path here may be a URL, or not valid UTF-8, so it stays a string.
# ruff: noqa: PTH100, PTH110, PTH112, PTH118, PTH119, PTH122, PTH202

from __future__ import annotations

import codecs
import itertools
import json
import os
import posixpath
import re
from abc import abstractmethod
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, Final, NamedTuple

import numpy as np
import pyarrow as pa

from featurepipe.annotations import KEPT_COLUMN, split_of
from featurepipe.display import counted, first_names
from featurepipe.errors import Message, Option, SourceError, UsageError
from featurepipe.images.blobs import Blob, reading
from featurepipe.images.files import exists
from featurepipe.images.listing import BATCH_ROWS, Findings, Row, check_unique, is_image_name, printable, table_of
from featurepipe.images.manifest import ManifestSource
from featurepipe.images.regions import Box, Boxes, region_locator, stamp

_NEEDED: Final = {"id", "file_name", "image_id", "category_id", "bbox", "iscrowd", "name"}
_ARRAYS: Final = ("images", "annotations", "categories")
_OUTLINED: Final = "featurepipe outline"
"""Stands for the box of an outline, in an annotation that has no other; no key of JSON that anybody else reads."""
CLASS_FILES: Final = (
    "data.yaml",
    "data.yml",
    "dataset.yaml",
    "dataset.yml",
    "classes.txt",
    "labels/classes.txt",
    "obj.names",
)
_LONGEST_LABELS: Final = 64_000_000
_CHUNK: Final = 1 << 20
_BLANKS: Final = re.compile(r"[ \t\n\r]*")
_LONGEST_ENTRY: Final = 64_000_000
"""Characters of one entry of a COCO file; what is held of the file at a time."""
_LOOKED_FOR: Final = 8
"""Images, from all over a COCO file, of which one has to be found."""
_NAMED: Final = 3


class _Image(NamedTuple):
    """An image of an annotation file: ``path`` to read it by, ``name`` as in the dataset."""

    path: str
    name: str
    split: str | None = None


class _Annotated:
    """Images, and the boxes in them in the order found: 48 bytes a box, for there may be millions of them.

    Attributes:
        images: The images.
        labels: The classes, to which boxes refer by place; None where none is known.
    """

    def __init__(self) -> None:
        self.images: list[_Image] = []
        self.labels: list[str | None] = []
        self._numbers, self._image, self._label = array("d"), array("q"), array("q")

    def __len__(self) -> int:
        return len(self._image)

    def add(self, image: int, label: int, numbers: Iterable[float]) -> None:
        """Adds a box: x, y, w, h in the image and of the class at these places."""
        self._numbers.extend(numbers)
        self._image.append(image)
        self._label.append(label)

    def extend(self, other: _Annotated, images: Sequence[int], labels: Sequence[int]) -> None:
        """Adds the boxes of another, whose images and labels are at these places here."""
        self._numbers.extend(other._numbers)
        for mine, theirs, places in ((self._image, other._image, images), (self._label, other._label, labels)):
            mine.frombytes(np.array(places, np.int64)[np.frombuffer(theirs, np.int64)].tobytes() if theirs else b"")

    def with_boxes(self) -> list[int]:
        """The places of the images that have a box, ascending."""
        found: list[int] = np.unique(np.array(self._image, np.int64)).tolist()
        return found

    def __iter__(self) -> Iterator[tuple[int, str | None, tuple[float, ...]]]:
        """Yields (place of its image, label, numbers) of each box, image by image; those of one in the order of adding."""
        image, label = np.array(self._image, np.int64), np.array(self._label, np.int64)
        numbers = np.array(self._numbers, np.float64).reshape(-1, 4)
        order = np.argsort(image, kind="stable")
        for start in range(0, len(order), BATCH_ROWS):  # as Python objects, a part at a time
            rows = order[start : start + BATCH_ROWS]
            for place, code, box in zip(
                image[rows].tolist(), label[rows].tolist(), numbers[rows].tolist(), strict=True
            ):
                yield place, self.labels[code], tuple(box)


class AnnotatedSource(ManifestSource):
    """Images whose objects are annotated: a region for each box, with its class as label; the images of one are a group."""

    _unit = Boxes().unit

    def scan(self) -> pa.Table:
        """Lists the boxes, image by image; reads no image.

        Raises:
            UsageError: The columns or the unit of boxes are asked for, which the format says.
            SourceError: An annotation is wrong; names it.
        """
        if (self.boxes.column, self.boxes.unit) != (None, Boxes().unit):
            asked = Message(Option("box"), " and ", Option("box_unit"))
            raise UsageError(Message(asked, f" are for manifests: the format of {self.path} says where boxes are"))
        findings, groups = Findings(), list[str]()
        self._list_members()
        found = self._annotated(findings)
        table = table_of(self._region_rows(found, findings, groups))
        images = len(found.with_boxes())
        findings.notes.insert(0, f"{counted(table.num_rows, 'region')} of {counted(images, 'image')}")
        if empty := len(found.images) - images:
            findings.notes.append(f"{counted(empty, 'image')} without a box left out")
        table = table.append_column(f"{KEPT_COLUMN}group", pa.chunked_array([pa.array(groups, pa.string())]))
        return findings.attach(check_unique(table, self.path, "give each image a name of its own"))

    @abstractmethod
    def _annotated(self, findings: Findings) -> _Annotated:
        """All images, with their boxes."""

    def _region_rows(self, found: _Annotated, findings: Findings, groups: list[str]) -> Iterator[Row]:
        places = found.with_boxes()
        located = iter(self._located([found.images[place].path for place in places]))
        last, number = -1, 0
        for place, label, numbers in found:
            if place != last:
                image, (locator, size, mtime_ns) = found.images[place], next(located)
                last, number, name = place, 0, printable(image.name)
            number += 1
            x, y, w, h = numbers
            box = Box(x, y, w, h, self._unit, self.boxes.margin)
            groups.append(name)
            yield (
                f"{name}#{number}", findings.label(label, "box", number), image.split, size, stamp(mtime_ns, box),
                region_locator(locator, box),
            )  # fmt: skip


class CocoSource(AnnotatedSource):
    """COCO's annotation files of instances (Lin et al. 2014): ``images``, ``annotations`` with ``bbox``, ``categories``.

    The images lie in a folder or archive that is named, else beside the file, or in a folder ``images`` or one of the file's
    name beside it or one level up, as ``train2017`` for ``annotations/instances_train2017.json``. Crowd regions are left out
    and counted. An annotation without a box has that of its outline. A file is read entry by entry, and outlines are dropped.

    Args:
        paths: Of files; of several, each may be a split (``instances_train2017.json``), and equal paths are one image.
        pattern: What names several of them.
    """

    def __init__(self, paths: Sequence[str], pattern: str | None = None) -> None:
        super().__init__(paths[0])
        self.paths = [self.path, *map(os.path.abspath, paths[1:])] if len(paths) > 1 else [self.path]
        self._reading = self.path
        if pattern is not None:
            self.path, self.location = pattern, printable(pattern)
            self.name = printable(posixpath.basename(self._folder))

    def _annotated(self, findings: Findings) -> _Annotated:
        files = [(path, self._read(path, findings)) for path in self.paths]
        self._reading = self.path
        if len(files) == 1:
            return files[0][1]
        return _joined(files, findings)

    def _read(self, path: str, findings: Findings) -> _Annotated:
        """One file, its images with the paths to read them by."""
        self._reading = path
        blob, entries = Blob(path), _CocoEntries(path)
        try:
            with reading(path, "COCO annotation file"), blob.stream() as file:
                for name, number, entry in entries.of(file):
                    entries.take(name, number, entry)
        finally:
            blob.close()
        found = entries.resolved(findings)
        shown = [found.images[place].name for place in found.with_boxes()]
        folder = self._folder_of([name for name in shown if not _is_full(name)])
        found.images = [
            image if _is_full(image.name) or not folder else image._replace(path=f"{folder}/{image.name}")
            for image in found.images
        ]
        return found

    def _folder_of(self, names: Sequence[str]) -> str:
        """The folder that has one of some images; empty if they are in an archive."""
        if self.archive is not None:
            return ""
        folder, _, file = self._reading.rpartition("/")
        above, stem = folder.rpartition("/")[0], file.rpartition(".")[0].rpartition("_")[2]
        folders = [
            folder,
            *(f"{base}/{name}" for base in (folder, above) for name in ("images", stem, f"images/{stem}")),
        ]
        if self.images is not None:
            folders = [self.images]
        if not names:
            return folders[0]
        for name in names[:: max(1, len(names) // _LOOKED_FOR)][:_LOOKED_FOR]:
            for candidate in folders:
                if self.only_under is not None and not self.only_under.allows(f"{candidate}/{name}"):
                    continue
                if exists(f"{candidate}/{name}"):
                    return candidate
        raise SourceError(
            Message(
                f"{self._reading}: image {names[0]!r} is in none of {', '.join(folders)}; name the folder or archive with ",
                Option("images", "FOLDER"),
            )
        )


def _is_full(name: str) -> bool:
    return name.startswith("/") or "://" in name


def _joined(files: Sequence[tuple[str, _Annotated]], findings: Findings) -> _Annotated:
    """Several files as one: their boxes of one path are of one image, and their names say the splits if all do.

    Raises:
        SourceError: Two splits have the same image.
    """
    splits = [split_of(os.path.basename(path).rpartition(".")[0].rpartition("_")[2]) for path, _ in files]
    if not all(splits):
        splits = [None] * len(files)
    paths = Counter(name for _, found in files for name in {image.name: None for image in found.images})
    distinct = {image.path for _, found in files for image in found.images}
    is_named_twice = len(paths) < len(distinct)
    joined, places, labels = _Annotated(), dict[str, int](), dict[str | None, int]()
    for (path, found), split in zip(files, splits, strict=True):
        stem = os.path.basename(path).rpartition(".")[0]
        mine = []
        for image in found.images:
            place = places.setdefault(image.path, len(joined.images))
            if place == len(joined.images):
                name = f"{stem}/{image.name}" if is_named_twice else image.name
                joined.images.append(_Image(image.path, name, split))
            elif joined.images[place].split != split:
                first = joined.images[place].split
                raise SourceError(
                    f"{path}: image {image.name!r} is of split {split}, and of {first} in a file before it"
                )
            mine.append(place)
        joined.extend(found, mine, [labels.setdefault(label, len(labels)) for label in found.labels])
    joined.labels = list(labels)
    said = [
        f"{os.path.basename(path)}{f' as {split}' if split else ''}"
        for (path, _), split in zip(files, splits, strict=True)
    ]
    findings.notes.append(f"{len(files)} annotation files: {first_names(said, _NAMED)}")
    return joined


class _CocoEntries:
    """What the entries of one COCO file say, in whatever order its arrays come.

    Args:
        path: Of the file, for errors.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._found = _Annotated()
        self._images: dict[int | str, int] = {}  # id -> place
        self._names: dict[int | str, str | None] = {}  # id of category -> name
        # What annotations refer to: id -> (its number, the number of the first annotation that does).
        self._of_image: dict[int | str, tuple[int, int]] = {}
        self._of_category: dict[int | str | None, tuple[int, int]] = {}
        self._seen: set[str] = set()
        self._crowds = self._outlines = self._boxless = 0

    def of(self, file: IO[bytes]) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """Yields (name of the array, number, entry) of the arrays of a file."""
        scanner = _JsonScanner(file)
        if (first := scanner.peek()) != "{":
            kind = type(scanner.value()).__name__ if first != "[" else "list"
            raise self._wrong(f"it is a {kind}, not an object with images, annotations and categories")
        for name in scanner.members():
            if name not in _ARRAYS:
                scanner.skip()
                continue
            if scanner.peek() != "[":
                raise self._wrong(f"{name} is a {type(scanner.value()).__name__}; it has to be a list")
            self._seen.add(name)
            for number, entry in enumerate(scanner.elements()):
                if not isinstance(entry, dict):
                    raise self._wrong(f"{name}[{number}] is a {type(entry).__name__}, not an object")
                yield name, number, entry

    def take(self, name: str, number: int, entry: Mapping[str, Any]) -> None:
        """Takes up one entry of an array."""
        where = f"{name}[{number}]"
        if name == "categories":
            id_ = self._id(entry, where, "id")
            self._names[id_] = None if entry.get("name") in (None, "") else self._text(entry, where, "name")
        elif name == "images":
            id_, file_name = self._id(entry, where, "id"), self._text(entry, where, "file_name")
            if id_ in self._images:
                raise self._wrong(f"{where} has the id {id_!r} of an image before it")
            self._images[id_] = len(self._found.images)
            self._found.images.append(_Image(file_name, file_name))
        else:
            self._take_annotation(where, number, entry)

    def _take_annotation(self, where: str, number: int, entry: Mapping[str, Any]) -> None:
        id_ = self._id(entry, where, "image_id")
        category = None if entry.get("category_id") is None else self._id(entry, where, "category_id")
        image, _ = self._of_image.setdefault(id_, (len(self._of_image), number))
        label, _ = self._of_category.setdefault(category, (len(self._of_category), number))
        if entry.get("iscrowd"):
            self._crowds += 1
            return
        numbers = entry.get("bbox")
        if numbers in (None, []) and _OUTLINED in entry:
            numbers = entry[_OUTLINED]
            if numbers is None:
                self._boxless += 1
                return
            self._outlines += 1
        self._found.add(image, label, self._numbers(numbers, where))

    def resolved(self, findings: Findings) -> _Annotated:
        """The images with their boxes; says what was left out.

        Raises:
            SourceError: An array is missing, or an annotation is of an image or category that is not there.
        """
        for name in ("images", "annotations"):
            if name not in self._seen:
                raise self._wrong(f"{name} is missing; it has to be a list")
        for id_, (_, number) in self._of_image.items():
            if id_ not in self._images:
                raise self._wrong(f"annotations[{number}] has the image_id {id_!r}, which no image has")
        if "categories" in self._seen:
            for category, (_, number) in self._of_category.items():
                if category is not None and category not in self._names:
                    raise self._wrong(f"annotations[{number}] has the category_id {category!r}, which no category has")
        labels = [None if id_ is None else self._names.get(id_) or str(id_) for id_ in self._of_category]
        found = _Annotated()
        found.images, found.labels = self._found.images, labels
        found.extend(self._found, [self._images[id_] for id_ in self._of_image], range(len(labels)))
        unnamed = [id_ for id_ in self._of_category if id_ is not None and not self._names.get(id_)]
        for count, said in (
            (self._crowds, f"{counted(self._crowds, 'crowd region')} left out"),
            (self._outlines, f"{counted(self._outlines, 'annotation')} without a box: that of the outline is taken"),
            (self._boxless, f"{counted(self._boxless, 'annotation')} without a box or a polygon left out"),
            (len(unnamed), f"{counted(len(unnamed), 'class id')} without a name, taken for the name"),
        ):
            findings.notes += [said] * bool(count)
        return found

    def _id(self, one: Mapping[str, Any], where: str, name: str) -> int | str:
        value = one.get(name)
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise self._wrong(f"{where} has the {name} {str(value)[:100]!r}, which is neither a whole number nor text")
        return value

    def _text(self, one: Mapping[str, Any], where: str, name: str) -> str:
        value = one.get(name)
        if not isinstance(value, str) or not value or "\0" in value:
            raise self._wrong(f"{where} has the {name} {str(value)[:100]!r}, which is no text")
        return value

    def _numbers(self, value: Any, where: str) -> tuple[float, ...]:
        try:
            box = Boxes().box(value) if isinstance(value, list) else None
        except (TypeError, ValueError, OverflowError):
            box = None
        if box is None:
            raise self._wrong(
                f"{where} has the bbox {str(value)[:100]!r}, which is not four numbers [x, y, width, height]"
            )
        return box.x, box.y, box.w, box.h

    def _wrong(self, said: str) -> SourceError:
        return SourceError(f"{self._path}: not a COCO annotation file of instances: {said}")


def _of_need(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object without what nobody reads: outlines are most of such a file. Where it has no box, that of its outline."""
    found = {name: value for name, value in pairs if name in _NEEDED}
    if not found.get("bbox"):
        for name, value in pairs:
            if name == "segmentation" and value not in (None, []):  # of run lengths, nothing is left by now
                found[_OUTLINED] = _box_around(value)
    return found


def _box_around(polygons: Any) -> list[float] | None:
    """x, y, w, h around polygons, each x, y, x, y, ... of three points at least; None if they are none, as run lengths."""
    try:
        points = [np.array(polygon, np.float64).reshape(-1, 2) for polygon in polygons]
    except (TypeError, ValueError, OverflowError):
        return None
    if not points or min(map(len, points)) < 3:
        return None
    least, most = np.concatenate(points).min(axis=0), np.concatenate(points).max(axis=0)
    return [*map(float, least), *map(float, most - least)]


class _JsonScanner:
    """Reads JSON value by value, holding one of them and a chunk of the file; a file of gigabytes takes megabytes.

    Args:
        file: UTF-8.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._parse = json.JSONDecoder(object_pairs_hook=_of_need).raw_decode
        self._text, self._at, self._ended = "", 0, False

    def members(self) -> Iterator[str]:
        """Yields the names in an object; after each, its value has to be taken. The object is the last thing in the file."""
        self._expect("{")
        separator = ","
        if self.peek() == "}":
            separator = self._expect("}")
        while separator != "}":
            if not isinstance(name := self.value(), str):
                raise ValueError(f"{name!r:.50} where a name should be")  # noqa: TRY004  # of the file
            self._expect(":")
            yield name
            separator = self._expect(",}")
        if extra := self.peek():
            raise ValueError(f"{extra!r} after the end")

    def elements(self) -> Iterator[Any]:
        """Yields the values in an array."""
        self._expect("[")
        if self.peek() == "]":
            self._at += 1
            return
        while True:
            yield self.value()
            if self._expect(",]") == "]":
                return

    def skip(self) -> None:
        """Passes over a value; over an array element by element, however long it is."""
        if self.peek() == "[":
            for _ in self.elements():
                pass
        else:
            self.value()

    def value(self) -> Any:
        """The next value."""
        self.peek()
        while True:
            try:
                value, end = self._parse(self._text, self._at)
                if end < len(self._text) or self._ended:  # else it may be a number that goes on
                    self._at = end
                    return value
            except json.JSONDecodeError:
                if self._ended:
                    raise
            if len(self._text) - self._at > _LONGEST_ENTRY:
                raise ValueError(f"an entry of more than {_LONGEST_ENTRY:,} characters")
            self._read_on()

    def peek(self) -> str:
        """The next character that is no blank; empty at the end."""
        while True:
            self._at = _BLANKS.match(self._text, self._at).end()  # type: ignore[union-attr]  # matches nothing, too
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._read_on()

    def _expect(self, characters: str) -> str:
        found = self.peek()
        if not found or found not in characters:
            raise ValueError(f"{found!r} where {' or '.join(characters)} should be" if found else "it ends too early")
        self._at += 1
        return found

    def _read_on(self) -> None:
        left = len(self._text) - self._at  # as much again, so that a long value is not looked at time after time
        chunk = self._file.read(max(_CHUNK, left))
        self._text = self._text[self._at :] + self._decode(chunk, not chunk)
        self._at, self._ended = 0, not chunk


class YoloSource(AnnotatedSource):
    """A folder as YOLO trains on: ``images/`` and ``labels/`` beside it, or both in a folder for each split.

    A text file in ``labels/`` has a line ``class cx cy w h`` for each box of the image of its name, in shares of the image, or
    ``class x y x y x y ...`` for an outline, whose box is taken. The classes' names are in ``data.yaml`` or ``classes.txt``, and
    ``data.yaml`` may say which folders, or files that list images, are train, val and test.

    Args:
        path: A local folder.
    """

    _unit = "share"

    def __init__(self, path: str) -> None:
        super().__init__(path.rstrip("/") + "/_")
        self._outlines = 0
        self.path = os.path.abspath(path)
        self.name = printable(os.path.basename(self.path))
        self.location = printable(self.path)

    def _annotated(self, findings: Findings) -> _Annotated:
        names, splits = _class_names(self.path), _Splits(self.path, findings)
        found, used = _Annotated(), Counter[str]()
        found.labels, self._outlines = list(names.values()), 0
        codes = {number: code for code, number in enumerate(names)}
        for images, labels, split in _pairs(self.path):
            for folder, folders, files in os.walk(images, onerror=_raise):
                folders.sort()
                below = os.path.relpath(folder, images)
                for file in itertools.filterfalse(is_image_name, files):
                    findings.pass_over(file)
                for file in sorted(filter(is_image_name, files)):
                    path = os.path.join(folder, file)
                    texts = os.path.normpath(os.path.join(labels, below, os.path.splitext(file)[0] + ".txt"))
                    used[texts] += 1
                    top = split_of(below.partition("/")[0]) if split is None else split
                    found.images.append(_Image(path, os.path.relpath(path, self.path), splits.of(path, top)))
                    for class_, numbers in self._boxes_in(texts, names) if os.path.exists(texts) else ():
                        found.add(len(found.images) - 1, codes[class_], numbers)
            there = [
                os.path.join(at, file)
                for at, _, files in os.walk(labels, onerror=_raise)
                for file in files
                if file.endswith(".txt")
            ]
            lost = [path for path in there if path not in used and os.path.basename(path) != "classes.txt"]
            if lost:
                first = printable(os.path.relpath(lost[0], self.path))
                findings.notes.append(f"{counted(len(lost), 'file')} of boxes without an image, as {first}")
        if self._outlines:
            findings.notes.append(f"{counted(self._outlines, 'outline')} taken for the box around it")
        return found

    def _boxes_in(self, path: str, names: Mapping[int, str]) -> Iterator[tuple[int, Sequence[float]]]:
        for number, line in enumerate(_text_of(path).splitlines(), 1):
            fields = line.split()
            if not fields:
                continue
            try:
                class_, *numbers = (float(field) for field in fields)
                known = class_.is_integer() and int(class_) in names
            except (ValueError, OverflowError):
                known, numbers = False, []
            around = _box_around([numbers]) if len(numbers) >= 6 else None
            if known and around is not None:
                self._outlines += 1
                yield int(class_), around
            elif known and len(numbers) == 4:
                cx, cy, w, h = numbers
                yield int(class_), (cx - w / 2, cy - h / 2, w, h)
            else:
                raise SourceError(
                    f"{path}: line {number} is {line[:100]!r}, not class cx cy w h or class x y x y x y ..., with a class from "
                    f"{min(names)} to {max(names)} as {self.path} names them"
                )


def is_yolo(folder: str) -> bool:
    """Whether a folder, which has one of `CLASS_FILES`, has images, and labels beside them."""
    return bool(_pairs(folder))


def _pairs(folder: str) -> list[tuple[str, str, str | None]]:
    """Folders of images, of their labels, and their split: None if folders below say it."""
    bases: list[tuple[str, str | None]] = [(folder, None)]
    if not os.path.isdir(os.path.join(folder, "images")):
        bases = [(os.path.join(folder, name), split_of(name)) for name in sorted(os.listdir(folder)) if split_of(name)]
    pairs = [(os.path.join(base, "images"), os.path.join(base, "labels"), split) for base, split in bases]
    return [pair for pair in pairs if os.path.isdir(pair[0]) and os.path.isdir(pair[1])]


def _class_file(folder: str) -> str:
    return next(path for name in CLASS_FILES if os.path.exists(path := os.path.join(folder, name)))


def _class_names(folder: str) -> dict[int, str]:
    path = _class_file(folder)
    lines = _text_of(path).splitlines()
    if not path.endswith((".yaml", ".yml")):
        return dict(enumerate(line.strip() for line in lines if line.strip()))
    names = _names_in_yaml(lines)
    if not names:
        raise SourceError(
            f"{path}: has no names: [first, second] of its classes; write them so, or one a line in classes.txt"
        )
    return names


def _names_in_yaml(lines: Sequence[str]) -> dict[int, str]:
    """The classes under ``names:`` of a YAML file, in brackets, with dashes or numbered; empty if it is none of these."""
    inline, below = _in_yaml(lines, "names")
    if inline:
        text = " ".join([inline, *below])
        parts = [part for part in text[1:-1].split(",") if part.strip()]
        if text[0] + text[-1] == "[]":
            return dict(enumerate(map(_unquoted, parts)))
        return _numbered(parts) if text[0] + text[-1] == "{}" else {}
    if all(line.startswith("- ") for line in below):
        return dict(enumerate(_unquoted(line[2:]) for line in below))
    return _numbered(below)


def _numbered(lines: Sequence[str]) -> dict[int, str]:
    """Classes written as ``number: name``; none if a line is not."""
    parted = [(_unquoted(number), _unquoted(name)) for number, _, name in (line.partition(":") for line in lines)]
    if not all(number.isascii() and number.isdecimal() and len(number) < 9 for number, _ in parted):
        return {}
    return {int(number): name for number, name in sorted(parted, key=lambda pair: int(pair[0]))}


def _in_yaml(lines: Sequence[str], key: str) -> tuple[str, list[str]]:
    """What stands after a key at the top of a YAML file, in its line and below; only as much of YAML as YOLO's files have."""
    lines = [line.split(" #")[0].rstrip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    start = next((i for i, line in enumerate(lines) if line.startswith(f"{key}:")), None)
    if start is None:
        return "", []
    return lines[start].removeprefix(f"{key}:").strip(), [line.strip() for line in _block(lines[start + 1 :])]


class _Splits:
    """The splits that a ``data.yaml`` gives to folders, or to the images that text files list.

    Args:
        folder: Of the dataset.
        findings: Told of what it names and is not there.
    """

    def __init__(self, folder: str, findings: Findings) -> None:
        self._folders: list[tuple[str, str]] = []
        self._images: dict[str, str] = {}
        path = _class_file(folder)
        lines = _text_of(path).splitlines() if path.endswith((".yaml", ".yml")) else []
        missing = []
        for split in ("train", "val", "test"):
            inline, below = _in_yaml(lines, split)
            named = (
                inline[1:-1].split(",")
                if inline.startswith("[")
                else [inline, *(line.removeprefix("- ") for line in below)]
            )
            for name in filter(None, map(_unquoted, named)):
                place = self._place(folder, _unquoted(_in_yaml(lines, "path")[0]), name)
                if place is None:
                    missing.append(f"{split}: {name}")
                elif place.endswith(".txt"):
                    self._images |= dict.fromkeys(_listed_in(place, folder), split)
                else:
                    self._folders.append((place + "/", split))
        self._folders.sort(key=lambda found: -len(found[0]))
        if missing:
            findings.notes.append(
                f"named in {os.path.basename(path)} and not in this folder: {first_names(missing, _NAMED)}"
            )

    @staticmethod
    def _place(folder: str, root: str, name: str) -> str | None:
        # Roboflow writes ../train/images for a folder beside the file.
        for base in (os.path.join(folder, root), folder):
            for tried in (name, name.removeprefix("../")):
                place = os.path.normpath(os.path.join(base, tried))
                if place.startswith(folder + "/") and os.path.exists(place):
                    return place
        return None

    def of(self, path: str, otherwise: str | None) -> str | None:
        """The split of an image."""
        if path in self._images:
            return self._images[path]
        return next((split for folder, split in self._folders if path.startswith(folder)), otherwise)


def _listed_in(path: str, folder: str) -> Iterator[str]:
    """The images that a text file lists, one a line; relative to the dataset."""
    for line in filter(None, map(str.strip, _text_of(path).splitlines())):
        yield os.path.normpath(os.path.join(folder, line))


def _block(lines: Sequence[str]) -> Iterator[str]:
    for line in lines:
        if not line.startswith((" ", "\t", "- ", "]")):
            return
        yield line


def _raise(error: OSError) -> None:
    raise SourceError(f"{error.filename}: cannot be listed: {error.strerror}") from error


def _unquoted(name: str) -> str:
    name = name.strip()
    return name[1:-1] if len(name) > 1 and name[0] == name[-1] and name[0] in "'\"" else name


def _text_of(path: str) -> str:
    try:
        if os.path.getsize(path) > _LONGEST_LABELS:
            raise SourceError(f"{path}: {os.path.getsize(path):,} bytes are too many for a file of boxes or classes")
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: cannot be read: {error}") from error
