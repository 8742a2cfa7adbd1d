"""Files that people annotate objects in: COCO's JSON of instances, and YOLO's folders of text files; each box is a region."""

# A path here may be a URL, or not valid UTF-8, so it stays a string.
# ruff: noqa: PTH100, PTH110, PTH112, PTH118, PTH119, PTH122, PTH202

from __future__ import annotations

import itertools
import json
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import pyarrow as pa

from featurepipe.annotations import KEPT_COLUMN, split_of
from featurepipe.display import counted
from featurepipe.errors import Message, Option, SourceError, UsageError
from featurepipe.images.blobs import Blob, reading
from featurepipe.images.files import exists, located
from featurepipe.images.findings import Findings
from featurepipe.images.listing import Row, check_unique, is_image_name, printable, table_of
from featurepipe.images.manifest import ManifestSource
from featurepipe.images.regions import Box, Boxes, region_locator, stamp

_NEEDED: Final = {
    "images",
    "annotations",
    "categories",
    "id",
    "file_name",
    "image_id",
    "category_id",
    "bbox",
    "iscrowd",
    "name",
}
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


@dataclass
class _Annotated:
    """An image and its boxes: ``boxes`` are (label, box), in the order in which they are numbered."""

    path: str
    name: str
    split: str | None = None
    boxes: list[tuple[str, Box]] = field(default_factory=list)


class AnnotatedSource(ManifestSource):
    """Images whose objects are annotated: a region for each box, with its class as label; the images of one are a group."""

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
        images = [image for image in self._images(findings) if image.boxes]
        table = table_of(self._region_rows(images, findings, groups))
        findings.notes.insert(0, f"{counted(table.num_rows, 'region')} of {counted(len(images), 'image')}")
        table = table.append_column(f"{KEPT_COLUMN}group", pa.chunked_array([pa.array(groups, pa.string())]))
        return findings.attach(check_unique(table, self.path, "give each image a name of its own"))

    @abstractmethod
    def _images(self, findings: Findings) -> list[_Annotated]:
        """All images, with their boxes."""

    def _region_rows(self, images: Sequence[_Annotated], findings: Findings, groups: list[str]) -> Iterator[Row]:
        for image, (size, mtime_ns) in zip(images, self._stats([image.path for image in images]), strict=True):
            locator, name = located(os.fsencode(image.path), size), printable(image.name)
            for number, (label, box) in enumerate(image.boxes, 1):
                groups.append(name)
                yield (
                    f"{name}#{number}", findings.label(label, "box", number), image.split, size, stamp(mtime_ns, box),
                    region_locator(locator, box),
                )  # fmt: skip


class CocoSource(AnnotatedSource):
    """COCO's annotation file of instances (Lin et al. 2014): ``images``, ``annotations`` with ``bbox``, ``categories``.

    The images lie beside the file, or in a folder ``images`` or one of the file's name beside it or one level up, as
    ``train2017`` for ``annotations/instances_train2017.json``. Crowd regions are left out and counted.
    """

    def _images(self, findings: Findings) -> list[_Annotated]:
        blob = Blob(self.path)
        with reading(self.path, "COCO annotation file"), blob.stream() as file:
            document = json.load(file, object_pairs_hook=_of_need)
        if not isinstance(document, dict):
            raise self._wrong(
                f"it is a {type(document).__name__}, not an object with images, annotations and categories"
            )
        listed = {name: self._objects(document, name) for name in ("images", "annotations", "categories")}
        names = {
            self._id(one, f"categories[{i}]", "id"): self._text(one, f"categories[{i}]", "name")
            for i, one in enumerate(listed["categories"])
        }
        images: dict[int | str, _Annotated] = {}
        for i, one in enumerate(listed["images"]):
            id_, name = self._id(one, f"images[{i}]", "id"), self._text(one, f"images[{i}]", "file_name")
            if id_ in images:
                raise self._wrong(f"images[{i}] has the id {id_!r} of an image before it")
            images[id_] = _Annotated(name, name)
        self._add_boxes(images, names, listed["annotations"], findings)
        found = list(images.values())
        folder = self._folder_of([image.name for image in found if image.boxes])
        for image in found:
            image.path = image.name if image.name.startswith("/") or "://" in image.name else f"{folder}/{image.name}"
        return found

    def _add_boxes(
        self,
        images: Mapping[int | str, _Annotated],
        names: Mapping[int | str, str],
        annotations: Sequence[Mapping[str, Any]],
        findings: Findings,
    ) -> None:
        """Gives the images their boxes; says what is left out."""
        crowds = 0
        for i, one in enumerate(annotations):
            where = f"annotations[{i}]"
            image, category = self._id(one, where, "image_id"), self._id(one, where, "category_id")
            if image not in images:
                raise self._wrong(f"{where} has the image_id {image!r}, which no image has")
            if category not in names:
                raise self._wrong(f"{where} has the category_id {category!r}, which no category has")
            if one.get("iscrowd"):
                crowds += 1
                continue
            images[image].boxes.append((names[category], self._box(one, where)))
        if crowds:
            findings.notes.append(f"{counted(crowds, 'crowd region')} left out")
        if empty := sum(not image.boxes for image in images.values()):
            findings.notes.append(f"{counted(empty, 'image')} without a box left out")

    def _folder_of(self, names: Sequence[str]) -> str:
        """The folder that has the first image; that of the file where there are none, or full paths."""
        above, stem = self._folder.rpartition("/")[0], self.name.rpartition("_")[2]
        folders = [
            self._folder,
            *(f"{base}/{name}" for base in (self._folder, above) for name in ("images", stem, f"images/{stem}")),
        ]
        if not names or names[0].startswith("/") or "://" in names[0]:
            return folders[0]
        for folder in folders:
            if self.only_under is not None and not self.only_under.allows(f"{folder}/{names[0]}"):
                continue
            if exists(f"{folder}/{names[0]}"):
                return folder
        raise self._wrong(f"image {names[0]!r} is in none of {', '.join(folders)}; put the file beside its images")

    def _objects(self, document: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
        found = document.get(name)
        if not isinstance(found, list):
            raise self._wrong(
                f"{name} is {'missing' if found is None else f'a {type(found).__name__}'}; it has to be a list"
            )
        for i, one in enumerate(found):
            if not isinstance(one, dict):
                raise self._wrong(f"{name}[{i}] is a {type(one).__name__}, not an object")
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

    def _box(self, one: Mapping[str, Any], where: str) -> Box:
        value = one.get("bbox")
        try:
            box = self.boxes.box(value) if isinstance(value, list) else None
        except (TypeError, ValueError, OverflowError):
            box = None
        if box is None:
            raise self._wrong(
                f"{where} has the bbox {str(value)[:100]!r}, which is not four numbers [x, y, width, height]"
            )
        return box

    def _wrong(self, said: str) -> SourceError:
        return SourceError(f"{self.path}: not a COCO annotation file of instances: {said}")


def _of_need(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object without what nobody reads: outlines are most of such a file."""
    return {name: value for name, value in pairs if name in _NEEDED}


class YoloSource(AnnotatedSource):
    """A folder as YOLO trains on: ``images/`` and ``labels/`` beside it, or both in a folder for each split.

    A text file in ``labels/`` has a line ``class cx cy w h`` for each box of the image of its name, in shares of the image. The
    classes' names are in ``data.yaml`` or ``classes.txt``.

    Args:
        path: A local folder.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path.rstrip("/") + "/_")
        self.path = os.path.abspath(path)
        self.name = printable(os.path.basename(self.path))
        self.location = printable(self.path)

    def _images(self, findings: Findings) -> list[_Annotated]:
        names = _class_names(self.path)
        found: list[_Annotated] = []
        empty, used = 0, Counter[str]()
        for images, labels, split in _pairs(self.path):
            for folder, folders, files in os.walk(images, onerror=_raise):
                folders.sort()
                below = os.path.relpath(folder, images)
                for file in itertools.filterfalse(is_image_name, files):
                    findings.pass_over(file)
                for file in sorted(filter(is_image_name, files)):
                    path = os.path.join(folder, file)
                    texts = os.path.normpath(os.path.join(labels, below, os.path.splitext(file)[0] + ".txt"))
                    boxes = self._boxes_in(texts, names) if os.path.exists(texts) else []
                    used[texts] += 1
                    empty += not boxes
                    top = split_of(below.partition("/")[0]) if split is None else split
                    found.append(_Annotated(path, os.path.relpath(path, self.path), top, boxes))
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
        if empty:
            findings.notes.append(f"{counted(empty, 'image')} without a box left out")
        return found

    def _boxes_in(self, path: str, names: Sequence[str]) -> list[tuple[str, Box]]:
        boxes = []
        for number, line in enumerate(_text_of(path).splitlines(), 1):
            fields = line.split()
            if not fields:
                continue
            try:
                class_, cx, cy, w, h = (float(field) for field in fields)
                label = names[int(class_)] if class_ >= 0 and class_.is_integer() else None
            except (ValueError, IndexError, OverflowError):
                label = None
            if label is None:
                raise SourceError(
                    f"{path}: line {number} is {line[:100]!r}, not class cx cy w h, with a class from 0 to {len(names) - 1} as "
                    f"{self.path} names them"
                )
            boxes.append((label, Box(cx - w / 2, cy - h / 2, w, h, "share", self.boxes.margin)))
        return boxes


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


def _class_names(folder: str) -> list[str]:
    path = next(path for name in CLASS_FILES if os.path.exists(path := os.path.join(folder, name)))
    lines = _text_of(path).splitlines()
    if not path.endswith((".yaml", ".yml")):
        return [line.strip() for line in lines if line.strip()]
    names = _names_in_yaml(lines)
    if not names:
        raise SourceError(
            f"{path}: has no names: [first, second] of its classes; write them so, or one a line in classes.txt"
        )
    return names


def _names_in_yaml(lines: Sequence[str]) -> list[str]:
    """The list ``names:`` of a YAML file, in brackets, with dashes or numbered from 0; empty if it is none of these."""
    lines = [line.split(" #")[0].rstrip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    start = next((i for i, line in enumerate(lines) if line.startswith("names:")), None)
    if start is None:
        return []
    inline = lines[start].removeprefix("names:").strip()
    below = [line.strip() for line in _block(lines[start + 1 :])]
    if inline:
        text = " ".join([inline, *below])
        return [_unquoted(name) for name in text[1:-1].split(",") if name.strip()] if text[0] + text[-1] == "[]" else []
    if all(line.startswith("- ") for line in below):
        return [_unquoted(line[2:]) for line in below]
    numbered = [line.partition(":") for line in below]
    if [number.strip() for number, _, _ in numbered] != [str(i) for i in range(len(numbered))]:
        return []
    return [_unquoted(name) for _, _, name in numbered]


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
