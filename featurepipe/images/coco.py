"""COCO's JSON of instances, read in pieces, as images whose objects are regions."""

# A path here may be a URL, or not valid UTF-8, so it stays a string.
# ruff: noqa: PTH119

from __future__ import annotations

import codecs
import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, Final

from featurepipe.annotations import split_of
from featurepipe.display import counted, first_names
from featurepipe.errors import Message, Option, SourceError
from featurepipe.images.annotated import Annotated, AnnotatedImage, AnnotatedSource, box_around
from featurepipe.images.blobs import Blob, reading
from featurepipe.images.files import exists
from featurepipe.images.listing import Findings, printable
from featurepipe.images.regions import Boxes

_NEEDED: Final = {"id", "file_name", "image_id", "category_id", "bbox", "iscrowd", "name"}
_ARRAYS: Final = ("images", "annotations", "categories")
_CHUNK: Final = 1 << 20
_NAMED: Final = 3
_BLANKS: Final = re.compile(r"[ \t\n\r]*")
_OUTLINED: Final = "featurepipe outline"
"""Stands for the box of an outline, in an annotation that has no other; no key of JSON that anybody else reads."""
_LONGEST_ENTRY: Final = 64_000_000
"""Characters of one entry of a COCO file; what is held of the file at a time."""
_LOOKED_FOR: Final = 8
"""Images, from all over a COCO file, of which one has to be found."""


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

    def _annotated(self, findings: Findings) -> Annotated:
        files = [(path, self._read(path, findings)) for path in self.paths]
        self._reading = self.path
        if len(files) == 1:
            return files[0][1]
        return _joined(files, findings)

    def _read(self, path: str, findings: Findings) -> Annotated:
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


def _joined(files: Sequence[tuple[str, Annotated]], findings: Findings) -> Annotated:
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
    joined, places, labels = Annotated(), dict[str, int](), dict[str | None, int]()
    for (path, found), split in zip(files, splits, strict=True):
        stem = os.path.basename(path).rpartition(".")[0]
        mine = []
        for image in found.images:
            place = places.setdefault(image.path, len(joined.images))
            if place == len(joined.images):
                name = f"{stem}/{image.name}" if is_named_twice else image.name
                joined.images.append(AnnotatedImage(image.path, name, split))
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
        self._found = Annotated()
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
            self._found.images.append(AnnotatedImage(file_name, file_name))
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

    def resolved(self, findings: Findings) -> Annotated:
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
        found = Annotated()
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
                found[_OUTLINED] = box_around(value)
    return found


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
