"""The protocol of everything that images can come from, and which files a source may read."""

# A path here may be a URL, or not valid UTF-8, so it stays a string.
# ruff: noqa: PTH111, PTH118

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final, Protocol, Self, runtime_checkable
from urllib.parse import unquote

import pyarrow as pa

from featurepipe.errors import Reject, UsageError
from featurepipe.images.files import REFUSED, is_url
from featurepipe.images.regions import Payload

_LOCAL: Final = ("file", "local")  # protocols of fsspec


class OnlyUnder:
    """Folders, or URLs of folders, below which every image must lie.

    A local file lies below a folder if it does so after links are followed and ``..`` is resolved. A URL lies below one that it
    begins with; a folder allows no URL, ``::`` (a chain of file systems) is never allowed, and neither is ``..`` in a URL. What
    does not lie below any is neither read nor asked about: not its size, not whether it is there.

    Args:
        places: The folders and URLs.

    Raises:
        UsageError: There is none, or one is a chain.
    """

    def __init__(self, places: Sequence[str | os.PathLike[str]]) -> None:
        self.places = tuple(os.fspath(place) for place in places)
        if not self.places or not all(self.places):
            raise UsageError("only_under names no folder; give a folder, or the URL of one such as s3://bucket/images")
        if chained := [place for place in self.places if "::" in place and is_url(place)]:
            raise UsageError(f"only_under {chained[0]!r} is a chain of file systems; give the URL of a folder")
        folders = [os.path.realpath(os.path.expanduser(place)) for place in self.places if not is_url(place)]
        self._folders = [os.path.join(folder, "") for folder in folders]  # with a slash at the end
        self._urls = [place.rstrip("/") + "/" for place in self.places if is_url(place)]

    def allows(self, path: str) -> bool:
        """Whether a path or URL may be read."""
        protocol, separator, inside = path.partition("://")
        if separator and protocol in _LOCAL and "::" not in path:
            path, separator = os.path.expanduser(inside), ""
        if not separator:
            try:
                real = os.path.join(os.path.realpath(path), "")
            except (OSError, ValueError):  # ValueError: a null byte in the path
                return False
            return any(real.startswith(folder) for folder in self._folders)
        steps = unquote(unquote(inside)).replace("\\", "/").split("/")
        return "::" not in path and ".." not in steps and any(path.startswith(url) for url in self._urls)

    def check(self, path: str) -> None:
        """Raises a `Reject` for what may not be read."""
        if not self.allows(path):
            kind = "a URL or a chain of file systems that" if is_url(path) else "a file that"
            raise Reject(f"{REFUSED}{kind} is not below {' or '.join(self.places)}, which --only-under asks for")


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

    def read(self, locator: bytes) -> Payload:
        """Reads one image; safe to call from several threads at once.

        Args:
            locator: The ``locator`` of a row that this source listed; of a region, also the first half of `split_region`,
                which stands for the whole image.

        Returns:
            The encoded file, or the pixels of an image that is stored as an array; of a region, that of its image and the box.

        Raises:
            Reject: This image cannot be read: ``missing: ...`` or ``unreadable: ...``; as `Unavailable` where it may be
                readable in a moment.
            SourceError: The source as a whole has gone.
        """
        ...

    def head(self, locator: bytes, size: int) -> bytes:
        """The first bytes of an encoded file, ``size`` at most; raises as `read`.

        By default all of it is read; none are given of what is no encoded file.
        """
        payload = self.read(locator)
        return payload[:size] if isinstance(payload, bytes) else b""

    def close(self) -> None:
        """Releases what this process holds open; the source can still be used, it opens again."""
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
