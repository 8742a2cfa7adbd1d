"""The numbers of image files of more than eight bits, read through PIL, which keeps eight of most; and what the files declare."""

from __future__ import annotations

import io
import math
import struct
import sys
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin

from featurepipe.errors import Reject
from featurepipe.images.intensity import Array, Samples, alpha_of

_BITS, _PHOTOMETRIC, _SAMPLES, _PLANAR, _FORMAT = 258, 262, 277, 284, 339  # TIFF 6.0, sections 8 and 19
_MAX_SAMPLE, _S_MIN, _S_MAX = 281, 340, 341
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3
_PHOTOMETRICS: Final = {0: "MinIsWhite", 1: "MinIsBlack", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "LAB"}
_OTHER_ORDER: Final = {"B": "L", "L": "B"}
_NATIVE: Final = {"little": "L", "big": "B"}[sys.byteorder]
# libtiff gives numbers in this machine's order, whatever the file's; PIL takes these for the file's all the same.
_AFTER_LIBTIFF: Final = {"I;16S": "I;16NS", "I;16BS": "I;16NS", "I;32S": "I;32NS", "I;32BS": "I;32NS",
                         "F;32F": "F;32NF", "F;32BF": "F;32NF"}  # fmt: skip
_WHITE_KEY: Final = "transparency"
_PNG: Final = b"\x89PNG\r\n\x1a\n"


def load_samples(image: ImageFile.ImageFile, payload: bytes) -> Samples | None:
    """Loads an image that was opened, and gives its numbers if they are of more than eight bits or signed.

    PIL keeps the high byte alone of 16-bit colours; the low one is read from ``payload`` once more.

    Args:
        image: opened from ``payload``, not loaded yet.
        payload: the file.

    Returns:
        The numbers, or None if the image, which is loaded now, has all of them.

    Raises:
        Reject: ``unsupported``: the file is one that PIL would read wrongly.
    """
    rawmode = _rawmode(image)
    deep = rawmode.partition(";")[2].startswith("16")
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _check_planes(image)
        if image.tile and image.tile[0][0] == "libtiff" and rawmode in _AFTER_LIBTIFF:
            _set_rawmode(image, _AFTER_LIBTIFF[rawmode])
    if image.mode.startswith(("I", "F")):
        image.load()
        return _of_one_channel(image, payload)
    if deep:
        return _of_colours(image, payload, rawmode)
    image.load()
    if image.mode == "L" and _tiff_tag(image, _FORMAT, _UNSIGNED) == _SIGNED:
        return Samples(np.asarray(image).view(np.int8), 8, _declared_by_tiff(image, 8))
    return None


def samples_of_image(image: Image.Image) -> Samples:
    """The numbers of an image of PIL's modes ``I``, ``I;16`` and ``F`` that is loaded, with what its file declares."""
    return _of_one_channel(image, b"")


def is_deep(image: Image.Image) -> bool:
    """Whether an open image is of more than eight bits."""
    return image.mode.startswith(("I", "F")) or is_deep_colour(image)


def is_deep_colour(image: Image.Image) -> bool:
    """Whether PIL is about to keep eight bits of an open file's 16."""
    tiles = getattr(image, "tile", None)
    return bool(tiles) and not image.mode.startswith(("I", "F")) and ";16" in _rawmode(image)


def tiff_in_words(payload: bytes) -> str:
    """What layout a TIFF has that PIL does not know.

    Example:
        >>> tiff_in_words(b"II*")
        'a TIFF of unknown layout'
    """
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(payload[:8])
        file = io.BytesIO(payload)
        file.seek(tags.next)
        tags.load(file)
        bits, formats = _numbers(tags.get(_BITS, 1)), _numbers(tags.get(_FORMAT, _UNSIGNED))
        count, photometric = tags.get(_SAMPLES, 1), tags.get(_PHOTOMETRIC)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, struct.error):
        return "a TIFF of unknown layout"
    kind = {_SIGNED: " signed", _FLOAT: " floating-point"}.get(int(formats[0]), "")
    order = "little-endian" if payload[:1] == b"I" else "big-endian"
    return (
        f"a {order} TIFF with {count} sample{'s' * (count != 1)} of {bits[0]:g}{kind} bits for each pixel, "
        f"{_PHOTOMETRICS.get(photometric or 0, f'photometric interpretation {photometric}')}"
    )


def _of_one_channel(image: Image.Image, payload: bytes) -> Samples:
    values = np.asarray(image)
    depth, declared, significant = 8 * values.dtype.itemsize, None, None
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits, kind = int(_tiff_tag(image, _BITS, depth)), _tiff_tag(image, _FORMAT, _UNSIGNED)
        if image.mode == "I":
            values = (
                values.view(np.uint32) if kind == _UNSIGNED else values.astype(np.int16 if bits == 16 else np.int32)
            )
        depth, declared = bits, _declared_by_tiff(image, bits)
    elif payload:
        significant = _significant_bits(payload, depth)
    alpha = None
    if isinstance(key := image.info.get(_WHITE_KEY), int):
        alpha = np.where(values == key, 0, 255).astype(np.uint8)
    white = _tiff_tag(image, _PHOTOMETRIC, None) == 0
    return Samples(values, depth, declared, significant, white, alpha, keyed=alpha is not None)


def _of_colours(image: ImageFile.ImageFile, payload: bytes, rawmode: str) -> Samples:
    """16 bits of colours, and of opacity."""
    kind, _, order = rawmode.partition(";16")
    if kind == "RGBa":
        # PIL divides the colours by the opacity as it unpacks them; before that, they are not those of the image.
        raise Reject("unsupported: 16-bit colours multiplied by their opacity; save them without, or in eight bits")
    if kind == "LA":  # PIL has no name for the low bytes, but for four bytes as they are
        raw = _read_as(image, payload, "RGBA").astype(np.uint16)
        values = raw[..., 0::2] << 8 | raw[..., 1::2]
        image.load()
    else:
        other = _OTHER_ORDER[_NATIVE if order == "N" else order]
        low = _read_as(image, payload, f"{kind};16{other}")
        image.load()
        values = np.asarray(image).astype(np.uint16) << 8 | low
    alpha, keyed = None, False
    if kind in {"RGBA", "LA"}:
        alpha = alpha_of(Samples(values[..., -1], 16))
        values = values[..., 0] if kind == "LA" else values[..., :3]
    elif isinstance(key := image.info.get(_WHITE_KEY), tuple):
        alpha, keyed = np.where((values == key).all(axis=2), 0, 255).astype(np.uint8), True
    declared = _declared_by_tiff(image, 16)
    return Samples(values, 16, declared, _significant_bits(payload, 16), alpha=alpha, keyed=keyed)


def _read_as(image: ImageFile.ImageFile, payload: bytes, rawmode: str) -> Array:
    """The same image unpacked otherwise: uint8 (H, W, C)."""
    with type(image)(io.BytesIO(payload)) as again:
        _set_rawmode(again, rawmode)
        return np.array(again)


def _rawmode(image: Any) -> str:
    if not image.tile:
        return ""
    arguments = image.tile[0][3]
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def _set_rawmode(image: Any, rawmode: str) -> None:
    image.tile = [
        tile._replace(args=(rawmode, *tile.args[1:]) if isinstance(tile.args, tuple) else rawmode)
        for tile in image.tile
    ]


def _check_planes(image: TiffImagePlugin.TiffImageFile) -> None:
    """PIL takes planes that are stored one after the other for bytes, if they are not compressed."""
    if (
        image.tag_v2.get(_PLANAR, 1) == 2
        and max(_numbers(image.tag_v2.get(_BITS, 1))) > 8
        and len(image.getbands()) > 1
    ):
        raise Reject(
            "unsupported: a TIFF of more than eight bits whose colours are in planes of their own; save it interleaved"
        )


def _tiff_tag(image: Image.Image, tag: int, default: Any) -> Any:
    """A tag's first value, if the image is from a TIFF that has it."""
    numbers = _numbers(image.tag_v2.get(tag)) if isinstance(image, TiffImagePlugin.TiffImageFile) else []
    return numbers[0] if numbers else default


def _declared_by_tiff(image: Image.Image, bits: int) -> tuple[float, float] | None:
    """(black, white) of a TIFF that says more than its type does.

    In this order: SMinSampleValue and SMaxSampleValue; MaxSampleValue where it is of the form 2^n - 1 (the specification means it
    for statistics, so that a scanner's 4095 tells of its 12 bits but 3977 of one image); BitsPerSample, 12 perhaps.
    """
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return None
    unsigned = _tiff_tag(image, _FORMAT, _UNSIGNED) == _UNSIGNED
    whole = 2.0**bits - 1
    low, high = _extreme(image, _S_MIN, min), _extreme(image, _S_MAX, max)
    if low is None and unsigned:
        low = 0.0
    if low is not None and high is not None and low < high and not (unsigned and (low, high) == (0.0, whole)):
        return low, high
    most = _extreme(image, _MAX_SAMPLE, max)
    if unsigned and most is not None and most.is_integer() and 1 <= most < whole and not int(most) & (int(most) + 1):
        return 0.0, most
    return (0.0, whole) if unsigned and bits not in {8, 16, 32} else None


def _extreme(image: TiffImagePlugin.TiffImageFile, tag: int, choose: Any) -> float | None:
    numbers = _numbers(image.tag_v2.get(tag))
    return choose(numbers) if numbers and all(map(math.isfinite, numbers)) else None


def _numbers(value: Any) -> list[float]:
    """The numbers of a tag, whatever its type; none of a text or of what is not there."""
    if value is None or isinstance(value, str):
        return []
    return [float(number) for number in (value if isinstance(value, tuple | list | bytes) else (value,))]


def _significant_bits(payload: bytes, depth: int) -> int | None:
    """What a PNG's sBIT says of its colours, if that is less than its depth."""
    for kind, data in _png_chunks(payload):
        if kind == b"sBIT":
            bits = max(data[:3] if len(data) > 2 else data[:1], default=0)  # grey, or three colours; then opacity
            return bits if 0 < bits < depth else None
        if kind in {b"PLTE", b"IDAT"}:
            break
    return None


def _png_chunks(payload: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = 8 if payload.startswith(_PNG) else len(payload)
    while position + 8 <= len(payload):
        (length,) = struct.unpack_from(">I", payload, position)
        yield payload[position + 4 : position + 8], payload[position + 8 : position + 8 + length]
        position += length + 12
