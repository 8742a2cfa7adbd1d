"""Images that a user hands over as Python objects: paths, arrays, PIL images, in any of the containers of scikit-learn."""

# A path here may be a URL, or not valid UTF-8, so it stays a string.
# ruff: noqa: PTH100

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from featurepipe.errors import Message, Option, UsageError
from featurepipe.features.options import KEEP
from featurepipe.images import MemorySource
from featurepipe.images.files import is_url
from featurepipe.images.listing import printable
from featurepipe.images.memory import Item, is_pillow
from featurepipe.images.regions import Region

_CHOICES = (
    "give a list, array, Series or one-column DataFrame of paths, a list of PIL images or of arrays (H, W) or (H, W, 3) of "
    "pixels, best uint8, or one such array (N, H, W) or (N, H, W, 3); or a list of featurepipe.region(image, box)"
)
_CHANNELS = (1, 3, 4)
_NAMED = 5
RAISE, NAN = "raise", "nan"


def check_on_reject(value: str) -> None:
    """Checks what is to be done about an image that cannot be used.

    Raises:
        UsageError: It is neither to raise nor to give nan.
    """
    if value not in (RAISE, NAN):
        raise UsageError(f"unknown on_reject {value!r}; choices: {RAISE}, {NAN}")


@dataclass(frozen=True)
class GivenImages:
    """Images in the order given, and the source of the different ones.

    Attributes:
        source: every path once, everything else as often as it was given.
        place: int64 (n,), for each image given its row in the source.
        ids: the source's ids.
    """

    source: MemorySource
    place: np.ndarray
    ids: Sequence[str]

    def __len__(self) -> int:
        return len(self.place)

    def refuse(self, row: int, reason: str, *, has_labels: bool = True) -> UsageError:
        """The error for a row of the source that cannot be used; ``has_labels`` where the caller may have given one for each."""
        from featurepipe.images.decode import is_repaired

        hint = (", or keep it with ", Option("damaged", KEEP)) if is_repaired(reason) else ()
        out = f"{self._named(row)} cannot be used: {reason}. Leave it out{', and its label' if has_labels else ''}"
        return UsageError(Message(out, *hint, ", or have nan for such images with ", Option("on_reject", NAN)))

    def warn_of(self, damage: Mapping[int, str]) -> None:
        """Warns the caller's caller, in one line, of images that were kept although they are damaged.

        Args:
            damage: what is wrong, by row of the source.
        """
        if not damage:
            return
        shown = [f"{self._named(row)}: {damage[row]}" for row in sorted(damage)[:_NAMED]]
        shown += [f"and {len(damage) - _NAMED:,} more"] * (len(damage) > _NAMED)
        text = f"{len(damage):,} of {len(self.ids):,} images are kept although they are damaged: {'; '.join(shown)}"
        warnings.warn(text, stacklevel=3)

    def _named(self, row: int) -> str:
        position = int(np.flatnonzero(self.place == row)[0])
        return f"image {position}" + ("" if self.ids[row].startswith("#") else f" ({self.ids[row]})")


def images_given(images: Any, *, name: str) -> GivenImages:
    """Makes a source of whatever holds images, one row each.

    A path's id is the absolute path, or the URL, so that it means the same file in every call; other images are numbered.

    Args:
        images: see the error's text; a (n, 1) table counts as its column.
        name: the source's name.

    Raises:
        UsageError: it holds no images, or an item is none; names the item's position.
    """
    items = _items(images)
    ids: dict[str, Item] = {}
    rows: dict[str, int] = {}
    place = np.empty(len(items), dtype=np.int64)
    for position, item in enumerate(items):
        id_ = _id_of(position, item)
        if id_ not in rows:
            rows[id_] = len(ids)
            ids[id_] = item
        place[position] = rows[id_]
    return GivenImages(MemorySource(ids, name=name), place, list(ids))


def _items(images: Any) -> Sequence[Any]:
    if isinstance(images, str | bytes | os.PathLike) and os.path.isdir(images):  # noqa: PTH112 (Path raises if too long)
        folder = os.fsdecode(images)
        raise UsageError(f"{folder!r} is a folder; give a list of its files: sorted(Path({folder!r}).rglob('*.jpg'))")
    if isinstance(images, str | bytes | os.PathLike) or is_pillow(images):
        raise UsageError(f"one {type(images).__name__} is no list of images; put it into a list")
    if hasattr(images, "to_numpy"):  # a Series or DataFrame, of pandas or polars
        images = images.to_numpy()
    if isinstance(images, np.ndarray):
        return _items_of_array(images)
    if not isinstance(images, Iterable) or isinstance(images, dict | set):
        raise UsageError(f"a {type(images).__name__} holds no images; {_CHOICES}")
    return list(images)


def _items_of_array(images: np.ndarray) -> Sequence[Any]:
    if images.dtype.kind in "OU":
        if images.ndim == 2 and images.shape[1] == 1:
            images = images[:, 0]
        if images.ndim == 1:
            return cast("Sequence[Any]", images.tolist())
    elif images.ndim == 3 and images.shape[2] in _CHANNELS:
        raise UsageError(f"an array of shape {images.shape} looks like one image (H, W, C); put it into a list")
    elif images.ndim == 3 or (images.ndim == 4 and images.shape[3] in _CHANNELS):
        _check_pixels(images, "the array")
        return list(images)
    raise UsageError(f"an array of shape {images.shape} and dtype {images.dtype} holds no images; {_CHOICES}")


def _id_of(position: int, item: Any) -> str:
    if isinstance(item, Region):
        id_ = _id_of(position, item.image)
        return id_ if id_.startswith("#") else f"{id_}#{item.box.text}"
    if isinstance(item, str | os.PathLike):
        path = os.fspath(item)
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        return printable(path if is_url(path) else os.path.abspath(path))
    if isinstance(item, np.ndarray):
        _check_pixels(item, f"image {position}")
        if item.ndim != 2 and not (item.ndim == 3 and item.shape[2] in _CHANNELS):
            raise UsageError(f"image {position} is an array of shape {item.shape}; pixels are (H, W) or (H, W, 3)")
    elif not isinstance(item, bytes) and not is_pillow(item):
        raise UsageError(f"image {position} is a {type(item).__name__}, {item!r:.60}, and no image; {_CHOICES}")
    return f"#{position:06d}"


def _check_pixels(array: np.ndarray, what: str) -> None:
    if (
        array.dtype.kind not in "buif"
    ):  # what their values mean is for the feature space's intensity to say, image by image
        raise UsageError(f"{what} holds {array.dtype}, and pixels are numbers, best uint8 from 0 to 255")
