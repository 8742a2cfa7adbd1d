"""A folder of images behind an fsspec URL: ``memory://``, ``http://``, ``s3://`` and whatever else is installed."""

from __future__ import annotations

from collections.abc import Iterator

import fsspec
import pyarrow as pa

from featurepipe.errors import SourceError
from featurepipe.images.files import details_of, location_of, read_file, remote_errors
from featurepipe.images.labels import FolderLabels, is_hidden, is_image_name
from featurepipe.images.listing import Row, check_unique, table_of
from featurepipe.images.source import Source


class RemoteFolderSource(Source):
    """Image files below a URL, in the byte order of their ids, with labels and splits as in a local folder.

    Size and date are those that the file system's listing gives, else -1; a plain web server gives neither.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.name = self.url.rpartition("/")[2] or "remote"
        self.location = location_of(self.url)

    def scan(self) -> pa.Table:
        """Lists the folder with one recursive listing."""
        try:
            file_system, root = fsspec.core.url_to_fs(self.url)
            found = file_system.find(root, detail=True)
            if not found and not file_system.exists(root):
                raise SourceError(f"{self.url}: no such folder")
        except remote_errors() as error:
            raise SourceError(f"{self.url}: cannot be listed: {type(error).__name__}: {error}") from error
        prefix = len(root.rstrip("/")) + 1
        return check_unique(table_of(self._rows(found, prefix)), self.url, "remove one of the two")

    def read(self, locator: bytes) -> bytes:
        """Reads one file; see :meth:`Source.read`."""
        return read_file(locator.decode())

    def _rows(self, found: dict[str, dict[str, object]], prefix: int) -> Iterator[Row]:
        names = {path[prefix:]: path for path in found}
        shown = {name: path for name, path in names.items() if not any(map(is_hidden, name.split("/")))}
        images = sorted(filter(is_image_name, shown))
        # Folders without images have no say about splits; a feature store is one of them.
        labels = FolderLabels({name.partition("/")[0] for name in images if "/" in name})
        for name in images:
            label, split = labels.of(name.split("/")[:-1])
            size, mtime_ns = details_of(found[shown[name]])
            yield name, label, split, size, mtime_ns, f"{self.url}/{name}".encode()
