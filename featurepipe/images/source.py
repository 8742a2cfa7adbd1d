"""The one seam for everything that images can come from."""

from __future__ import annotations

from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import pyarrow as pa

from featurepipe.images.only_under import OnlyUnder


@runtime_checkable
class Source(Protocol):
    """A listed set of images, each readable on its own.

    A source can be pickled and sent to another process: whatever it needs to keep open is opened lazily, once per
    process, and never travels.

    Attributes:
        name: The default dataset name, such as the folder's name.
        location: What tells two sources of equal name apart: an absolute path or glob, or a URL without the user
            and password in it, or ``memory:<name>``.
        only_under: Where every file that is an image must lie, None for anywhere; `open_source` sets it. Sources whose
            images lie inside of files that the user named (archives, arrays) have no use for it.
    """

    name: str
    location: str
    only_under: OnlyUnder | None = None

    def scan(self) -> pa.Table:
        """Lists the images without reading any of them.

        Returns:
            A table of :data:`featurepipe.images.listing.SCHEMA`, in an order that depends only on the content.

        Raises:
            SourceError: The source is missing, damaged, or lists an id twice.
        """
        ...

    def read(self, locator: bytes) -> bytes | np.ndarray[Any, Any]:
        """Reads one image; safe to call from several threads at once.

        Args:
            locator: The ``locator`` of a row that this source listed.

        Returns:
            The encoded file, or the pixels of an image that is stored as an array.

        Raises:
            Reject: This image cannot be read: ``missing: ...`` or ``unreadable: ...``; as `Unavailable` where it may be
                readable in a moment.
            SourceError: The source as a whole has gone.
        """
        ...

    def close(self) -> None:
        """Releases what this process holds open; the source can still be used, it opens again."""
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
