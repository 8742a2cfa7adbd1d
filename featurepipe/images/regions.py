"""Keys of images, of boxes in them and of frames: what a box means, how both travel in locators, and the crop of a box.

The semantics are in ``docs/decisions/regions.md``. A region is an item of its own: its key follows from the bytes of the file and
the box, and its pixels are cut from the image as it is decoded and upright, before anything is resized.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Self

import numpy as np

from featurepipe.errors import Reject, UsageError

if TYPE_CHECKING:  # torch takes seconds to import, and listing needs none
    import torch

Unit = Literal["pixels", "share"]
UNITS: Final[tuple[Unit, ...]] = ("pixels", "share")
LEAST: Final = 0.99
"""Pixels that a side needs: one, less what shares lose that were written with six digits."""

REGION_MARK: Final = b"\0box "  # no path has a NUL in it
FRAME_MARK: Final = b"\0frame "
_KEYED: Final = b"featurepipe region 1\n"
_KEYED_FRAME: Final = b"featurepipe frame 1\n"
_STAMPED: Final = (1 << 40) - 1
"""The bits of a time, about 18 minutes of nanoseconds, that hold what tells one box from another."""


CLIPPED: Final = "clipped to its image"
"""The remark on a region that reaches beyond its image."""
LARGEST_TASK: Final = 64
"""Regions of one image, or frames of one file, that are loaded together: it is read and decoded, or parsed, once for all."""


class Edges(NamedTuple):
    """A box in whole pixels of its image, the right and lower edges excluded.

    Attributes:
        clipped: Whether the box, with its margin, reaches beyond the image by half a pixel or more.
    """

    left: int
    top: int
    right: int
    bottom: int
    clipped: bool


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in an upright image, (0, 0) being the outer corner of its first pixel.

    Attributes:
        x: The left edge.
        y: The upper edge.
        w: The width.
        h: The height.
        unit: ``pixels``, or ``share`` of the image's width and height.
        margin: What is added on each side, as a share of the box's longer side in pixels; at least 0.
    """

    x: float
    y: float
    w: float
    h: float
    unit: Unit = "pixels"
    margin: float = 0.0

    def __str__(self) -> str:
        margin = f" with margin {self.margin:g}" if self.margin else ""
        numbers = " ".join(f"{value:g}" for value in (self.x, self.y, self.w, self.h))
        return f"{numbers} ({'shares' if self.unit == 'share' else 'pixels'}{margin})"

    @property
    def text(self) -> str:
        """The canonical text: equal for equal boxes, whatever their numbers were written like.

        Example:
            >>> Box(10, -0.0, 2.5, 4).text
            '10.0 0.0 2.5 4.0 pixels 0.0'
        """
        numbers = [repr(float(value) + 0.0) for value in (self.x, self.y, self.w, self.h)]  # + 0.0: no negative zero
        return " ".join([*numbers, self.unit, repr(float(self.margin) + 0.0)])

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The box of a canonical text, or None if it is none."""
        *numbers, unit, margin = text.split(" ") if text.count(" ") == 5 else ("", "", "")
        try:
            x, y, w, h, m = map(float, [*numbers, margin])
        except ValueError:
            return None
        return cls(x, y, w, h, "share" if unit == "share" else "pixels", m) if unit in UNITS else None

    def check(self) -> None:
        """Raises a `Reject` for a box that has no pixels whatever the image."""
        if not all(map(math.isfinite, (self.x, self.y, self.w, self.h))):
            raise Reject(f"box: {self} is not four finite numbers")
        if self.w <= 0 or self.h <= 0:
            raise Reject(f"box: {self} has a width or height of 0 or less")

    def edges(self, width: int, height: int) -> Edges:
        """The box in an image of this size, both in pixels: with its margin, clipped, and rounded to whole pixels.

        Raises:
            Reject: The box, without its margin, covers no pixel of the image; names it.

        Example:
            >>> Box(-2, 1, 6, 3).edges(10, 10)
            Edges(left=0, top=1, right=4, bottom=4, clipped=True)
            >>> Box(0.5, 0.25, 0.25, 0.5, "share", margin=0.1).edges(40, 40)
            Edges(left=18, top=8, right=32, bottom=32, clipped=False)
        """
        self.check()
        scale = (float(width), float(height)) if self.unit == "share" else (1.0, 1.0)
        x, y, w, h = self.x * scale[0], self.y * scale[1], self.w * scale[0], self.h * scale[1]
        if w < LEAST or h < LEAST:
            may_be_shares = self.unit == "pixels" and max(self.x + self.w, self.y + self.h) <= 1
            hint = "; for shares of the image give box_unit 'share'" if may_be_shares else ""
            raise Reject(f"box: {self} is {w:g} x {h:g} pixels, less than one, of an image of {width} x {height}{hint}")
        for start, size, limit in ((x, w, width), (y, h, height)):
            if min(start + size, limit) - max(start, 0.0) < LEAST:
                raise Reject(f"box: {self} lies outside the image of {width} x {height} pixels")
        around = self.margin * max(w, h)
        left, right, over = _span(x - around, x + w + around, width)
        top, bottom, above = _span(y - around, y + h + around, height)
        return Edges(left, top, right, bottom, over or above)


def _span(start: float, end: float, limit: int) -> tuple[int, int, bool]:
    """Whole pixels from an interval, at least one of them, and whether it reached beyond 0 to ``limit``."""
    first = math.floor(min(max(start, 0.0), limit - LEAST) + 0.5)
    last = max(first + 1, math.floor(min(max(end, 0.0), limit) + 0.5))
    return first, last, start < -0.5 or end > limit + 0.5


@dataclass(frozen=True)
class Boxes:
    """Where a source finds the boxes of its rows, and what they mean.

    Attributes:
        column: A manifest's column, or four as ``x,y,w,h``; ``none`` to take whole images; None for what is called ``box``
            or ``bbox``, if anything is.
        unit: Of the numbers in a manifest.
        margin: See `Box`.
    """

    column: str | None = None
    unit: Unit = "pixels"
    margin: float = 0.0

    def box(self, value: Any) -> Box | None:
        """The box of a text such as ``x y w h``, of a JSON list, or of four values; None where all of that is empty.

        Raises:
            ValueError: It is not four numbers.
        """
        if isinstance(value, str):
            value = value.strip().removeprefix("[").removesuffix("]").replace(",", " ").split() or None
        if value is None or all(part is None or part == "" for part in value):
            return None
        if len(value) != 4 or any(isinstance(part, bool) for part in value):
            raise ValueError
        x, y, w, h = map(float, value)
        return Box(x, y, w, h, self.unit, self.margin)


@dataclass(eq=False)
class FramesFile:
    """The bytes of a file of several frames, and what a decoder has parsed of it, so that it does so once for all frames."""

    content: bytes = field(repr=False)
    parsed: Any = field(default=None, repr=False)


class Frame(NamedTuple):
    """One frame of a file, counted from 1."""

    file: FramesFile
    number: int


Whole = bytes | np.ndarray[Any, Any] | Frame
"""An image without a box: an encoded file, pixels, or a frame of a file."""


class Region(NamedTuple):
    """What a source reads of a region: the whole image, and the box in it; of a user, the image may be a path or of Pillow."""

    image: Whole
    box: Box


def region(image: Any, box: Sequence[float], *, unit: str = "pixels", margin: float = 0.0) -> Region:
    """One box of an image, for a list of images: of `CNNFeatures`, `ImageClassifier` or `extract`.

    Consecutive regions of one path, or of one object, are read and decoded once.

    Args:
        image: A path or URL, a PIL image, an array of pixels, or the bytes of a file.
        box: x, y, width and height, from the outer corner of the upright image's first pixel.
        unit: ``pixels``, or ``share`` of the image's width and height.
        margin: What is added on each side, as a share of the box's longer side.

    Raises:
        UsageError: The box is not four numbers, the unit is unknown, or the margin is negative.

    Example:
        >>> region("photo.jpg", (10, 20, 30, 40)).box.text
        '10.0 20.0 30.0 40.0 pixels 0.0'
    """
    if unit not in UNITS:
        raise UsageError(f"unknown unit {unit!r} of a box; choices: {', '.join(UNITS)}")
    if not 0 <= margin < math.inf:
        raise UsageError(f"margin={margin!r}: give a share of the box's longer side from 0")
    try:
        found = Boxes(None, "share" if unit == "share" else "pixels", float(margin)).box(tuple(box))
    except (TypeError, ValueError, OverflowError):
        found = None
    if found is None:
        raise UsageError(f"box {box!r:.100} is not four numbers; give (x, y, width, height)")
    return Region(image, found)


Payload = Whole | Region
"""What a source reads: an image, or one with a box."""


def image_of(payload: Payload) -> Whole:
    """The image, or the whole image of a region."""
    return payload.image if isinstance(payload, Region) else payload


def frame_locator(file: bytes, number: int) -> bytes:
    """The locator of a frame, from that of its file."""
    return file + FRAME_MARK + str(number).encode()


def split_frame(locator: bytes) -> tuple[bytes, int | None]:
    """The locator of the file, and the number of a frame; None for a whole file.

    Example:
        >>> split_frame(frame_locator(b"a.dcm", 3)), split_frame(b"a.dcm")
        ((b'a.dcm', 3), (b'a.dcm', None))
    """
    file, mark, number = locator.rpartition(FRAME_MARK)
    return (file, int(number)) if mark and number.isdigit() else (locator, None)


def region_locator(image: bytes, box: Box) -> bytes:
    """The locator of a region, from that of its image."""
    return image + REGION_MARK + box.text.encode()


def split_region(locator: bytes) -> tuple[bytes, Box | None]:
    """The locator of the image, and the box of a region; None for a whole image.

    Example:
        >>> split_region(region_locator(b"a.jpg", Box(1, 2, 3, 4)))[0], split_region(b"a.jpg")
        (b'a.jpg', (b'a.jpg', None))
    """
    if REGION_MARK not in locator:
        return locator, None
    image, _, text = locator.rpartition(REGION_MARK)
    box = Box.parse(text.decode("ascii", "replace"))
    return (locator, None) if box is None else (image, box)


def is_of_one_image(locator: bytes, other: bytes) -> bool:
    """Whether the first is that of a region or frame, and the other that of its file or of another region or frame of it."""
    file = file_of(locator)
    return file != locator and file == file_of(other)


def file_of(locator: bytes) -> bytes:
    """The locator of the file that a region or frame is in; of any other image its own."""
    return split_frame(split_region(locator)[0])[0]


def key_of(payload: Payload) -> bytes:
    r"""Computes the key of one image.

    Bytes: SHA-256 of the encoded file as it is. Arrays: SHA-256 of the ASCII line ``<dtype> <shape>\n`` (NumPy's
    ``dtype.str`` and the extents joined by ``x``), followed by the array's bytes in C order. Regions and frames: see
    `key_of_region` and `key_of_frame`.

    Args:
        payload: An encoded file, an array of any shape and dtype, a frame, or a region of one of these.

    Returns:
        32 bytes.

    Example:
        >>> key_of(np.zeros((2, 2), np.uint8)) == hashlib.sha256(b"|u1 2x2\n" + bytes(4)).digest()
        True
    """
    if isinstance(payload, Region):
        return key_of_region(key_of(payload.image), payload.box)
    if isinstance(payload, Frame):
        return key_of_frame(key_of(payload.file.content), payload.number)
    if isinstance(payload, np.ndarray):
        header = f"{payload.dtype.str} {'x'.join(map(str, payload.shape))}\n"
        digest = hashlib.sha256(header.encode())
        digest.update(np.ascontiguousarray(payload).tobytes())
        return digest.digest()
    return hashlib.sha256(payload).digest()


def key_of_region(image: bytes, box: Box) -> bytes:
    r"""The key of a region, 32 bytes: SHA-256 of ``featurepipe region 1\n``, the key of the whole image and the box's text."""
    return hashlib.sha256(_KEYED + image + box.text.encode()).digest()


def key_of_frame(file: bytes, number: int) -> bytes:
    r"""The key of a frame, 32 bytes: SHA-256 of ``featurepipe frame 1\n``, the key of the file and the number in decimal."""
    return hashlib.sha256(_KEYED_FRAME + file + str(number).encode()).digest()


def stamp(mtime_ns: int, box: Box) -> int:
    """The time that a listing gives for a region: that of the file to about 18 minutes, and different for another box.

    A row of the same id, size and time is not read again, and so the time has to differ when its box does.
    """
    if mtime_ns < 0:  # unknown
        return mtime_ns
    digest = hashlib.sha256(f"{mtime_ns} {box.text}".encode()).digest()
    return (mtime_ns & ~_STAMPED) | (int.from_bytes(digest[:8], "little") & _STAMPED)


def crop(pixels: torch.Tensor, edges: Edges) -> torch.Tensor:
    """The pixels of a box, (C, H, W), laid out in memory as those of a decoded file are."""
    part = pixels[:, edges.top : edges.bottom, edges.left : edges.right]
    return part.permute(1, 2, 0).contiguous().permute(2, 0, 1)
