"""Images whose annotated objects are regions, and a folder as YOLO trains on; COCO's files are in `featurepipe.images.coco`."""

# A path here may be a URL, or not valid UTF-8, so it stays a string.
# ruff: noqa: PTH100, PTH110, PTH112, PTH118, PTH119, PTH122, PTH202

from __future__ import annotations

import itertools
import os
from abc import abstractmethod
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa

from featurepipe.annotations import KEPT_COLUMN, split_of
from featurepipe.display import counted, first_names
from featurepipe.errors import Message, Option, SourceError, UsageError
from featurepipe.images.listing import BATCH_ROWS, Findings, Row, check_unique, is_image_name, printable, table_of
from featurepipe.images.manifest import ManifestSource
from featurepipe.images.regions import Box, Boxes, region_locator, stamp

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
_NAMED: Final = 3


class AnnotatedImage(NamedTuple):
    """An image of an annotation file: ``path`` to read it by, ``name`` as in the dataset."""

    path: str
    name: str
    split: str | None = None


class Annotated:
    """Images, and the boxes in them in the order found: 48 bytes a box, for there may be millions of them.

    Attributes:
        images: The images.
        labels: The classes, to which boxes refer by place; None where none is known.
    """

    def __init__(self) -> None:
        self.images: list[AnnotatedImage] = []
        self.labels: list[str | None] = []
        self._numbers, self._image, self._label = array("d"), array("q"), array("q")

    def __len__(self) -> int:
        return len(self._image)

    def add(self, image: int, label: int, numbers: Iterable[float]) -> None:
        """Adds a box: x, y, w, h in the image and of the class at these places."""
        self._numbers.extend(numbers)
        self._image.append(image)
        self._label.append(label)

    def extend(self, other: Annotated, images: Sequence[int], labels: Sequence[int]) -> None:
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
    def _annotated(self, findings: Findings) -> Annotated:
        """All images, with their boxes."""

    def _region_rows(self, found: Annotated, findings: Findings, groups: list[str]) -> Iterator[Row]:
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


def box_around(polygons: Any) -> list[float] | None:
    """x, y, w, h around polygons, each x, y, x, y, ... of three points at least; None if they are none, as run lengths."""
    try:
        points = [np.array(polygon, np.float64).reshape(-1, 2) for polygon in polygons]
    except (TypeError, ValueError, OverflowError):
        return None
    if not points or min(map(len, points)) < 3:
        return None
    least, most = np.concatenate(points).min(axis=0), np.concatenate(points).max(axis=0)
    return [*map(float, least), *map(float, most - least)]


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

    def _annotated(self, findings: Findings) -> Annotated:
        names, splits = _class_names(self.path), _Splits(self.path, findings)
        found, used = Annotated(), Counter[str]()
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
                    found.images.append(AnnotatedImage(path, os.path.relpath(path, self.path), splits.of(path, top)))
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
            around = box_around([numbers]) if len(numbers) >= 6 else None
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
