"""What names say: which files are images, and the class and split that their folders give them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

IMAGE_SUFFIXES: Final = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")

_SPLITS: Final = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_IGNORED: Final = {"lost+found", "__MACOSX"}  # made by file systems and archivers, never a class


def is_image_name(name: str) -> bool:
    """Whether a file name ends like an image that we decode."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_hidden(name: str) -> bool:
    """Whether a listing passes over this file or folder name."""
    return name.startswith(".") or name in _IGNORED


def split_of(name: str) -> str | None:
    """The split that a folder or array name stands for, or None.

    Example:
        >>> split_of("validation"), split_of("cats")
        ('val', None)
    """
    return _SPLITS.get(name.lower())


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
        self.has_splits = bool(top_level) and all(split_of(name) for name in top_level)

    def of(self, folders: Sequence[str]) -> tuple[str | None, str | None]:
        """The (label, split) of a file inside ``folders``, outermost first."""
        split = split_of(folders[0]) if self.has_splits and folders else None
        classes = folders[1:] if split else folders
        return (classes[0] if classes else None), split
