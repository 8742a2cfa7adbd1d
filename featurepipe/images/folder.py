"""Folders of image files: local ones, and those behind an fsspec URL (``memory://``, ``http://``, ``s3://``, ...)."""

# A path here may be a URL, or not valid UTF-8, so it stays a string.
# ruff: noqa: PTH100, PTH110, PTH112, PTH116, PTH118, PTH119

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Final

import pyarrow as pa

from featurepipe.annotations import split_of
from featurepipe.errors import FeaturepipeError, Reject, SourceError, unsearchable
from featurepipe.images.blobs import PerProcess
from featurepipe.images.files import (
    details_of,
    is_passing,
    located,
    location_of,
    open_anew,
    read_file,
    read_from,
    read_head,
    size_and_path,
    stat_of,
)
from featurepipe.images.listing import (
    HIDDEN,
    IMAGE_SUFFIXES,
    LINKS_BACK,
    LINKS_TO_NOTHING,
    UNKNOWN,
    Findings,
    FolderLabels,
    Row,
    check_unique,
    is_hidden,
    is_image_name,
    printable,
    table_of,
)
from featurepipe.images.source import Source

_Identity = tuple[int, int]  # device and inode: what a symbolic link leads back to
_BY_ID: Final = itemgetter(0)
_NOWHERE: Final = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR)  # of links that lead to nothing


@dataclass(frozen=True, slots=True)
class _Directory:
    id: str  # with a trailing slash, empty at the top
    path: str
    identity: _Identity
    ancestors: tuple[_Identity, ...]


_Found = tuple[str, Row | _Directory]
_LabelAndSplit = tuple[str | None, str | None]


class FolderSource(Source):
    """Image files below a folder, in the byte order of their ids; an id is the path relative to the folder.

    Class sub-folders give labels, ``train/ val/ test/`` above them splits. Links are followed, except back into a
    folder that contains them. A folder is one whatever its name, ``x.png`` too, unless it is empty; what else has an image's
    name and is no file, such as a pipe or a link to nothing, is listed, and a reject when it is read. A feature store inside
    is passed over.
    """

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        self.name = printable(os.path.basename(self.path)) or "root"
        self.location = printable(self.path)

    def scan(self) -> pa.Table:
        """Lists the folder: one directory read per folder, one stat per image, nothing opened."""
        try:
            found = os.stat(self.path)
            top = [entry for entry in os.scandir(self.path) if not is_hidden(entry.name) and _is_folder(entry)]
            root = _Directory("", self.path, (found.st_dev, found.st_ino), ())
            prefix = len(self.path.rstrip("/")) + 1
            labels, findings = FolderLabels(_deciding(top, root, prefix)), Findings()
            table = table_of(_Walk(prefix, labels, findings).rows(root))
            findings.split_folders(labels)
            return findings.attach(table)
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
                raise SourceError(f"{self.path}: {unsearchable(self.path) or 'the folder has gone'}") from None
            raise

    def head(self, locator: bytes, size: int) -> bytes:
        """The first bytes of a file; see :meth:`Source.head`."""
        path = os.path.join(self.path, os.fsdecode(locator))
        if self.only_under is not None:
            self.only_under.check(path)
        return read_head(path, size)


def _deciding(top: list[os.DirEntry[str]], root: _Directory, prefix: int) -> set[str]:
    """The top folders that decide whether they are splits: a folder without a single image has no say."""
    splits = {entry.name for entry in top if split_of(entry.name)}
    others = {entry.name: entry for entry in top if entry.name not in splits}
    if splits:  # else there is nothing to decide
        others = {name: entry for name, entry in others.items() if _holds_images(entry, root, prefix)}
    return splits | others.keys()


def _holds_images(entry: os.DirEntry[str], root: _Directory, prefix: int) -> bool:
    try:
        directory = _descend(root, entry)
    except PermissionError:
        return False
    return directory is not None and next(_Walk(prefix, FolderLabels(()), Findings()).rows(directory), None) is not None


class _Walk:
    """One walk through a folder."""

    def __init__(self, prefix: int, labels: FolderLabels, findings: Findings) -> None:
        self._prefix = prefix
        self._labels = labels
        self._findings = findings

    def rows(self, root: _Directory) -> Iterator[Row]:
        """The images below a folder."""
        # A stack, because a tree may be deeper than Python's recursion limit.
        pending: list[Row | _Directory] = [root]
        while pending:
            item = pending.pop()
            if isinstance(item, _Directory):
                found = self._children(item)
                found.sort(key=_BY_ID, reverse=True)
                pending.extend(child for _, child in found)
            else:
                yield item

    def _children(self, directory: _Directory) -> list[_Found]:
        folders = directory.id.split("/")[:-1]
        label_and_split = self._labels.of(folders)
        base = os.fsencode(directory.path[self._prefix :] + "/") if directory.id else b""
        found: list[_Found] = []
        passed_over: list[str] = []
        try:
            with os.scandir(directory.path) as entries:
                for entry in entries:
                    if entry.name == "store.json" and directory.id and _is_store(entry):
                        self._findings.notes.append(f"passed over {directory.id}, a feature store")
                        return []
                    item = self._entry(directory, entry, base + os.fsencode(entry.name), label_and_split)
                    if item is None:
                        passed_over.append(_passed_over_as(entry))
                    else:
                        found.append(item)
        except OSError as error:
            if is_passing(error):
                raise  # else all that lies below would be taken for deleted
            return [self._unreadable(directory.id.removesuffix("/"), base)]
        for name in passed_over:
            self._findings.pass_over(name)
        images = sum(not isinstance(child, _Directory) for _, child in found)
        if images:
            self._findings.in_folders(folders, label_and_split[1], images)
        return found

    def _entry(
        self, directory: _Directory, entry: os.DirEntry[str], locator: bytes, label_and_split: _LabelAndSplit
    ) -> _Found | None:
        """An image, or a folder to go into; None for what is passed over."""
        name = entry.name
        if is_hidden(name):
            return None
        id_ = directory.id + printable(name)
        if name.lower().endswith(IMAGE_SUFFIXES) and not (_is_folder(entry) and _has_entries(entry.path)):
            return id_, (id_, *label_and_split, *_stat(entry), locator)
        try:
            child = _descend(directory, entry)
        except PermissionError:  # the folder around it can be listed, but not searched
            return self._unreadable(id_, locator)
        return None if child is None else (child.id, child)

    def _unreadable(self, id_: str, locator: bytes) -> _Found:
        """A folder listed as an entry of its own, so that reading it gives a reject: what lies below must not just be missing.

        It is no image of a class, so that it has no label and no split.
        """
        self._findings.unreadable.append(id_)
        return id_, (id_, None, None, UNKNOWN, UNKNOWN, locator)


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
    """The folder that an entry is; None for a file, and for a link to nothing or back to a folder that it lies in.

    Raises:
        PermissionError: Nobody can tell, or it is one that cannot be entered.
        OSError: Nobody can tell now.
    """
    try:
        if not entry.is_dir():
            return None
        found = entry.stat()
    except PermissionError:
        raise
    except OSError as error:
        if is_passing(error):
            raise
        if error.errno in _NOWHERE:
            return None
        raise PermissionError(error.errno, error.strerror, error.filename) from error
    identity = (found.st_dev, found.st_ino)
    ancestors = (*parent.ancestors, parent.identity)
    if identity in ancestors:
        return None
    return _Directory(f"{parent.id}{printable(entry.name)}/", entry.path, identity, ancestors)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # nobody can tell, or a link to itself
        return False


def _has_entries(path: str) -> bool:
    try:
        with os.scandir(path) as entries:
            return any(entries)
    except OSError:
        return False


def _passed_over_as(entry: os.DirEntry[str]) -> str:
    """What a listing counts an entry as that is neither an image nor a folder to go into."""
    if is_hidden(entry.name):
        return HIDDEN
    if not entry.is_symlink():
        return entry.name
    return LINKS_BACK if _is_folder(entry) else entry.name if os.path.exists(entry.path) else LINKS_TO_NOTHING


class RemoteFolderSource(Source):
    """Image files below a URL, in the byte order of their ids, with labels and splits as in a local folder.

    Size and date are those that the file system's listing gives, else -1; a plain web server gives neither. Files are read
    through the file system that listed them, and where more or fewer bytes come than were listed, it is asked again.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.name = self.url.rpartition("/")[2] or "remote"
        self.location = location_of(self.url)
        self._opened = PerProcess(self._open)
        self._listed_at = 0  # travels along, so that a worker takes no earlier listing's file system for this one's

    def scan(self) -> pa.Table:
        """Lists the folder with one recursive listing."""
        self._opened.forget()
        self._listed_at = time.time_ns()
        try:
            file_system, root = self._opened.get()
            found = file_system.find(root, detail=True)
            is_there = bool(found) or file_system.exists(root)
        except FeaturepipeError:
            raise
        except Exception as error:  # the border of the source: file systems raise what their libraries do
            raise SourceError(f"{self.url}: cannot be listed: {type(error).__name__}: {error}") from error
        if not is_there:
            raise SourceError(f"{self.url}: no such folder")
        prefix, findings = len(_below(root)), Findings()
        table = check_unique(table_of(self._rows(found, prefix, findings)), self.url, "remove one of the two")
        return findings.attach(table)

    def read(self, locator: bytes) -> bytes:
        """Reads one file; see :meth:`Source.read`."""
        size, name = size_and_path(locator)
        file_system, root = self._opened.get()
        return read_from(file_system, _below(root) + name.decode(), size)

    def _open(self) -> tuple[Any, str]:
        try:
            return open_anew(self.url)
        except FeaturepipeError:
            raise
        except Exception as error:  # the border of the source: file systems raise what their libraries do
            raise SourceError(f"{self.url}: cannot be opened: {type(error).__name__}: {error}") from error

    def _rows(self, found: dict[str, dict[str, object]], prefix: int, findings: Findings) -> Iterator[Row]:
        names = {path[prefix:]: path for path in found}
        images = []
        for name in names:
            if any(map(is_hidden, name.split("/"))):
                findings.pass_over(HIDDEN)
            elif is_image_name(name):
                images.append(name)
            else:
                findings.pass_over(name)
        # Folders without images have no say about splits; a feature store is one of them.
        labels = FolderLabels({name.partition("/")[0] for name in images if "/" in name})
        for name in sorted(images):
            folders = name.split("/")[:-1]
            label, split = labels.of(folders)
            findings.in_folders(folders, split)
            size, mtime_ns = details_of(found[names[name]])
            yield name, label, split, size, mtime_ns, located(name.encode(), size)
        findings.split_folders(labels)


def _below(root: str) -> str:
    """What the paths of files in a folder begin with; in an archive (``zip://::a.zip``) the top has no name."""
    return f"{root.rstrip('/')}/" if root else ""
