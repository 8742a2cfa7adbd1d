"""What names say: which files are images, and the class and split that their folders give them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from featurepipe.split_names import split_of

IMAGE_SUFFIXES: Final = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")

_LONGEST_SUFFIX = 12
_IGNORED: Final = {"lost+found", "__MACOSX"}  # made by file systems and archivers, never a class


def is_image_name(name: str) -> bool:
    """Whether a file name ends like an image that we decode."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_hidden(name: str) -> bool:
    """Whether a listing passes over this file or folder name."""
    return name.startswith(".") or name in _IGNORED


def suffix_of(name: str) -> str:
    """What files are counted by that are passed over: the suffix in lower case, or ``hidden``, or ``no suffix``.

    Example:
        >>> suffix_of("a/IMG_1.HEIC"), suffix_of("README"), suffix_of(".DS_Store"), suffix_of("scan.00017")
        ('.heic', 'no suffix', 'hidden', 'numbered')
    """
    base = name.rpartition("/")[2]
    if is_hidden(base):
        return "hidden"
    suffix = base.rpartition(".")[2].lower() if "." in base else ""
    if suffix.isdecimal():
        return "numbered"
    return f".{suffix}" if suffix.isascii() and suffix.isalnum() and len(suffix) < _LONGEST_SUFFIX else "no suffix"


class FolderLabels:
    """Reads class and split off folder names.

    Folders named like splits count as splits only if all folders at the top that hold images are; otherwise
    ``test/`` is a class.

    Example:
        >>> FolderLabels({"train", "val"}).of(["train", "cat", "2024"])
        ('cat', 'train')
        >>> FolderLabels({"cat", "test"}).of(["test"])
        ('test', None)
    """

    def __init__(self, top_level: Collection[str]) -> None:
        self.top_level = top_level
        self.has_splits = bool(top_level) and all(split_of(name) for name in top_level)

    def of(self, folders: Sequence[str]) -> tuple[str | None, str | None]:
        """The (label, split) of a file inside ``folders``, outermost first."""
        split = split_of(folders[0]) if self.has_splits and folders else None
        classes = folders[1:] if split else folders
        return (classes[0] if classes else None), split
