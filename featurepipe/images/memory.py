"""Images that are at hand in memory, or named one by one."""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeGuard, Union

import numpy as np
import pyarrow as pa

from featurepipe.display import counted
from featurepipe.errors import Reject, UsageError
from featurepipe.images.blobs import PerProcess
from featurepipe.images.files import read_file, stat_file
from featurepipe.images.intensity import SPARSE
from featurepipe.images.listing import UNKNOWN, Findings, Row, check_unique, printable, table_of
from featurepipe.images.regions import Payload, Region, region_locator, split_region, stamp
from featurepipe.images.source import Source

if TYPE_CHECKING:
    from PIL.Image import Image


_LOCKS: Final = 64


def is_pillow(item: object) -> TypeGuard[Image]:
    """Whether an object is a PIL image; imports nothing, since without PIL loaded there is none."""
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(item, module.Image)


def bytes_of(image: Image) -> int:
    """How many bytes an image's pixels take, one byte each; reads none of them."""
    return image.width * image.height * len(image.getbands())


class PillowReader:
    """Turns PIL images into uint8 arrays, from several threads.

    Two threads must not load one image at a time (it may still be an open file), so images share a few locks.
    """

    def __init__(self) -> None:
        self._locks = tuple(threading.Lock() for _ in range(_LOCKS))

    def __call__(self, image: Image) -> np.ndarray[Any, Any]:
        """Pixels as decoding gives them: upright, on white, uint8 (H, W) for greys and (H, W, 3) for everything else.

        Numbers of more than eight bits, (H, W), stay as they are unless the image's file declares their range, and are scaled
        when they are decoded. Of 16-bit colours PIL keeps the high byte, which does where they fill their range.

        Raises:
            Reject: as ``featurepipe.images.decode.decode``.
        """
        # In here, for decode imports torch.
        from featurepipe.images.budgets import check_pixels
        from featurepipe.images.damage import QUIET, damage_as_reject
        from featurepipe.images.decode import flattened, turned
        from featurepipe.images.samples import is_deep_colour

        with self._locks[(id(image) >> 4) % _LOCKS], QUIET:
            check_pixels(*image.size)
            with damage_as_reject():
                deep = is_deep_colour(image)
                image.load()
                if image.mode.startswith(("I", "F")):
                    return _numbers(image)
                if deep:
                    _check_filled(image)
                flat = flattened(turned(image))
                return np.array(flat if flat.mode == "L" else flat.convert("L" if flat.mode == "1" else "RGB"))


def _numbers(image: Image) -> np.ndarray[Any, Any]:
    """The numbers of a loaded grey image of more than eight bits, upright; uint8 if their range is declared."""
    from featurepipe.images.decode import flattened, scaled, turned
    from featurepipe.images.intensity import DECLARED
    from featurepipe.images.samples import samples_of_image

    samples = samples_of_image(image)
    if samples.declared or samples.min_is_white or samples.alpha is not None:
        flat = flattened(turned(scaled(samples, DECLARED), image))
        return np.array(flat if flat.mode == "L" else flat.convert("RGB"))
    upright = turned(image)
    return samples.values.copy() if upright is image else np.asarray(upright).astype(samples.values.dtype)


def _check_filled(image: Image) -> None:
    """Refuses 16-bit colours of which the high byte, all that is left of them, says too little."""
    colours = np.asarray(image)[..., :3]
    if int(colours.max()) - int(colours.min()) <= 256 // SPARSE:
        raise Reject(
            "intensity: 16-bit colours that fill less than a sixteenth of their range, and Pillow has kept their high byte "
            "alone; give the file's path or bytes"
        )


Item = Union[bytes, str, os.PathLike[str], np.ndarray[Any, Any], "Image", Region]


class MemorySource(Source):
    """Images from a mapping id -> item, a sequence of items, or one array of all pixels.

    An item is the bytes of an encoded file, an array of pixels, a PIL image, or a path or URL; or a region of one of these. In a
    sequence a path is its own id, the regions of one are ``path#1``, ``path#2``, ...; anything else is numbered. A PIL image is
    read as the array of its pixels, and keyed by them.

    Args:
        images: The images; an array is (N,H,W) or (N,H,W,C), one image per row.
        labels: One label per image, in the same order, or a mapping id -> label.
        name: The default dataset name.
        location: See :class:`Source`; if it is empty, ``memory:<name>``.

    Raises:
        UsageError: An item, or the array, is nothing that holds an image.
    """

    def __init__(
        self,
        images: Mapping[str, Item] | Sequence[Item] | np.ndarray[Any, Any],
        *,
        labels: Mapping[str, object] | Sequence[object] | None = None,
        name: str = "memory",
        location: str = "",
    ) -> None:
        self.name = name
        self.location = location or f"memory:{name}"
        if isinstance(images, np.ndarray) and images.ndim not in (3, 4):
            raise UsageError(f"an array of shape {images.shape} holds no images; give (N, H, W) or (N, H, W, C)")
        self._items: Any = list(images.values()) if isinstance(images, Mapping) else images
        ids = list(images) if isinstance(images, Mapping) else list(_ids_of(self._items))
        self._ids = [_name(id_) for id_ in ids]
        self._labels = _labels_of(labels, self._ids)
        self._unmatched = len(set(map(_name, labels)).difference(self._ids)) if isinstance(labels, Mapping) else 0
        self._pillow = PerProcess(PillowReader)

    def scan(self) -> pa.Table:
        """Lists the images in the order given; one stat per path."""
        findings = Findings()
        table = check_unique(table_of(self._rows(findings)), self.name, "give a mapping id -> image with unique ids")
        if self._unmatched:
            findings.notes.append(f"{counted(self._unmatched, 'label')} of ids that are no images, ignored")
        return findings.attach(table)

    def read(self, locator: bytes) -> Payload:
        """Reads one image; see :meth:`Source.read`."""
        place, box = split_region(locator)
        item = self._items[int.from_bytes(place, "little")]
        image: Any = item.image if isinstance(item, Region) else item
        found = self._read(image)
        return found if box is None else Region(found, box)

    def _read(self, item: Any) -> bytes | np.ndarray[Any, Any]:
        if is_pillow(item):
            return self._pillow.get()(item)
        if isinstance(item, str | os.PathLike):
            path = os.fspath(item)
            if self.only_under is not None:
                self.only_under.check(path)
            return read_file(path, redirects=self.only_under is None)
        stored: bytes | np.ndarray[Any, Any] = item
        return stored

    def _rows(self, findings: Findings) -> Iterator[Row]:
        first: dict[object, int] = {}  # the place of each image, so that its regions have one locator before the box
        for index, (id_, label, item) in enumerate(zip(self._ids, self._labels, self._items, strict=True)):
            label_ = findings.label(label, "image", id_)
            if isinstance(item, Region):
                image: Any = item.image
                size, mtime_ns = self._stat(image)
                place = first.setdefault(_same(image), index).to_bytes(8, "little")
                yield id_, label_, None, size, stamp(mtime_ns, item.box), region_locator(place, item.box)
            else:
                yield id_, label_, None, *self._stat(item), index.to_bytes(8, "little")

    def _stat(self, item: Item) -> tuple[int, int]:
        if isinstance(item, str | os.PathLike) and self.only_under is not None:
            path = os.fspath(item)
            return stat_file(path, redirects=False) if self.only_under.allows(path) else (UNKNOWN, UNKNOWN)
        return _stat_item(item)


def _ids_of(items: Iterable[Item]) -> Iterator[str]:
    """The ids of a sequence's items."""
    regions = Counter[str]()
    for index, item in enumerate(items):
        image = item.image if isinstance(item, Region) else item
        id_ = os.fspath(image) if isinstance(image, str | os.PathLike) else f"{index:06d}"
        if isinstance(item, Region) and isinstance(image, str | os.PathLike):
            regions[id_] += 1
            id_ = f"{id_}#{regions[id_]}"
        yield id_


def _same(image: Item) -> object:
    """What is equal for regions of one image: its path, or else which object it is."""
    return os.fspath(image) if isinstance(image, str | os.PathLike) else id(image)


def _labels_of(labels: Mapping[str, object] | Sequence[object] | None, ids: Sequence[str]) -> Sequence[object]:
    if labels is None:
        return [None] * len(ids)
    if isinstance(labels, Mapping):
        by_id = {_name(id_): label for id_, label in labels.items()}
        return [by_id.get(id_) for id_ in ids]
    values = list(labels)
    if len(values) != len(ids):
        raise UsageError(f"{len(values)} labels for {len(ids)} images; give one label per image")
    return values


def _name(id_: object) -> str:
    return printable(os.fspath(id_) if isinstance(id_, os.PathLike) else str(id_))


def _stat_item(item: Item) -> tuple[int, int]:
    if isinstance(item, str | os.PathLike):
        return stat_file(os.fspath(item))
    if isinstance(item, bytes):
        return len(item), UNKNOWN
    if isinstance(item, np.ndarray):
        return item.nbytes, UNKNOWN
    if is_pillow(item):
        return bytes_of(item), UNKNOWN
    raise UsageError(f"a {type(item).__name__} is no image; give bytes, an array of pixels, a PIL image, or a path")
