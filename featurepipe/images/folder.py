"""A local folder of image files."""

# A path here may be a URL, or not valid UTF-8, so it stays a string.
# ruff: noqa: PTH100, PTH112, PTH116, PTH118, PTH119

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from typing import Final

import pyarrow as pa

from featurepipe.errors import Reject, SourceError
from featurepipe.images.files import is_passing, read_file, stat_of
from featurepipe.images.labels import IMAGE_SUFFIXES, FolderLabels, is_hidden, split_of
from featurepipe.images.listing import UNKNOWN, Row, printable, table_of
from featurepipe.images.source import Source

_Identity = tuple[int, int]  # device and inode: what a symbolic link leads back to
_BY_ID: Final = itemgetter(0)


@dataclass(frozen=True, slots=True)
class _Directory:
    id: str  # with a trailing slash, empty at the top
    path: str
    identity: _Identity
    ancestors: tuple[_Identity, ...]


_Found = tuple[str, Row | _Directory]


class FolderSource(Source):
    """Image files below a folder, in the byte order of their ids; an id is the path relative to the folder.

    Class sub-folders give labels, ``train/ val/ test/`` above them splits. Links are followed, except back into a
    folder that contains them. A feature store inside the folder is passed over.
    """

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        self.name = printable(os.path.basename(self.path)) or "root"
        self.location = printable(self.path)

    def scan(self) -> pa.Table:
        """Lists the folder: one directory read per folder, one stat per image, nothing opened."""
        try:
            found = os.stat(self.path)
            top = [entry for entry in os.scandir(self.path) if _is_class_folder(entry)]
            root = _Directory("", self.path, (found.st_dev, found.st_ino), ())
            prefix = len(self.path.rstrip("/")) + 1
            return table_of(_walk(root, FolderLabels(_deciding(top, root, prefix)), prefix))
        except OSError as error:
            where = printable(str(error.filename or self.path))
            raise SourceError(f"{where}: cannot be listed: {error.strerror}") from error

    def read(self, locator: bytes) -> bytes:
        """Reads one file; see :meth:`Source.read`."""
        path = os.path.join(self.path, os.fsdecode(locator))
        try:
            if self.only_under is not None:
                self.only_under.check(path)  # it may be a link, or lie in a folder that is one
            return read_file(path)
        except Reject:
            if not os.path.isdir(self.path):
                raise SourceError(f"{self.path}: the folder has gone") from None
            raise


def _deciding(top: list[os.DirEntry[str]], root: _Directory, prefix: int) -> set[str]:
    """The top folders that decide whether they are splits: a folder without a single image has no say."""
    splits = {entry.name for entry in top if split_of(entry.name)}
    others = {entry.name: entry for entry in top if entry.name not in splits}
    if splits:  # else there is nothing to decide
        others = {name: entry for name, entry in others.items() if _holds_images(entry, root, prefix)}
    return splits | others.keys()


def _holds_images(entry: os.DirEntry[str], root: _Directory, prefix: int) -> bool:
    directory = _descend(root, entry)
    return directory is not None and next(_walk(directory, FolderLabels(()), prefix), None) is not None


def _walk(root: _Directory, labels: FolderLabels, prefix: int) -> Iterator[Row]:
    # A stack, because a tree may be deeper than Python's recursion limit.
    pending: list[Row | _Directory] = [root]
    while pending:
        item = pending.pop()
        if isinstance(item, _Directory):
            found = _children(item, labels, prefix)
            found.sort(key=_BY_ID, reverse=True)
            pending.extend(child for _, child in found)
        else:
            yield item


def _children(directory: _Directory, labels: FolderLabels, prefix: int) -> list[_Found]:
    label, split = labels.of(directory.id.split("/")[:-1])
    base = os.fsencode(directory.path[prefix:] + "/") if directory.id else b""
    found: list[_Found] = []
    try:
        with os.scandir(directory.path) as entries:
            for entry in entries:
                name = entry.name
                if is_hidden(name):
                    continue
                if name == "store.json" and directory.id and _is_store(entry):
                    return []
                if name.lower().endswith(IMAGE_SUFFIXES):
                    id_ = directory.id + printable(name)
                    size, mtime_ns = _stat(entry)
                    found.append((id_, (id_, label, split, size, mtime_ns, base + os.fsencode(name))))
                elif (child := _descend(directory, entry)) is not None:
                    found.append((child.id, child))
    except OSError as error:
        if is_passing(error):
            raise  # else all that lies below would be taken for deleted
        # Listed as an entry of its own, so that reading it gives a reject with the reason: what lies below must not
        # be missing without a trace.
        id_ = directory.id.removesuffix("/")
        return [(id_, (id_, label, split, UNKNOWN, UNKNOWN, base))]
    return found


def _is_store(entry: os.DirEntry[str]) -> bool:
    """Whether this ``store.json`` is that of a feature store, whose folder holds no images of the dataset."""
    try:
        if not entry.is_file():  # a named pipe would hang
            return False
        with open(entry.path, "rb") as file:
            record = json.loads(file.read(1 << 16))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("format") == "featurepipe-store"


def _stat(entry: os.DirEntry[str]) -> tuple[int, int]:
    try:
        return stat_of(entry.stat())
    except OSError:  # a broken link
        return UNKNOWN, UNKNOWN


def _descend(parent: _Directory, entry: os.DirEntry[str]) -> _Directory | None:
    try:
        if not entry.is_dir():
            return None
        found = entry.stat()
    except OSError as error:
        if is_passing(error):
            raise
        return None
    identity = (found.st_dev, found.st_ino)
    ancestors = (*parent.ancestors, parent.identity)
    if identity in ancestors:
        return None
    return _Directory(f"{parent.id}{printable(entry.name)}/", entry.path, identity, ancestors)


def _is_class_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return not is_hidden(entry.name) and not entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_dir()
    except OSError:
        return False
