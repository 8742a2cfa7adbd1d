"""A folder of images behind an fsspec URL: ``memory://``, ``http://``, ``s3://`` and whatever else is installed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from featurepipe.errors import FeaturepipeError, SourceError
from featurepipe.images.blobs import PerProcess
from featurepipe.images.files import (
    details_of,
    located,
    location_of,
    open_anew,
    read_from,
    size_and_path,
)
from featurepipe.images.findings import HIDDEN, Findings
from featurepipe.images.listing import FolderLabels, Row, check_unique, is_hidden, is_image_name, table_of
from featurepipe.images.source import Source


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
