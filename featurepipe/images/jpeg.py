"""The few facts in a JPEG's header that decide how it is decoded."""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from featurepipe.errors import Reject

_STANDALONE: Final = {0x01, *range(0xD0, 0xD9)}  # markers without a length
_FRAMES: Final = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_LOSSLESS: Final = {0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF}  # and hierarchical


class JpegHeader(NamedTuple):
    """The frame header of ITU-T T.81, section B.2.2."""

    width: int
    height: int
    components: int


def is_jpeg(payload: bytes) -> bool:
    """Whether the bytes start like a JPEG."""
    return payload.startswith(b"\xff\xd8\xff")


def read_jpeg_header(payload: bytes) -> JpegHeader:
    """Finds the frame header without decoding anything.

    Not PIL's reader: that parses the EXIF data too, takes eight times as long, and warns where they are odd.

    Raises:
        Reject: ``truncated`` before the frame header, ``corrupt``, or a kind of JPEG that nothing here can decode.
    """
    position = 2
    while True:
        position = payload.find(b"\xff", position)
        while position >= 0 and payload[position : position + 1] == b"\xff":  # a marker may be padded with 0xFF
            position += 1
        if position < 0 or position + 10 > len(payload):
            raise Reject("truncated: a JPEG that ends in its header")
        marker = payload[position]
        if marker in _FRAMES:
            return _frame(payload, position, marker)
        if marker in {0xD9, 0xDA}:
            raise Reject("corrupt: a JPEG without a frame header")
        length = 0 if marker in _STANDALONE or marker == 0 else struct.unpack_from(">H", payload, position + 1)[0]
        position += 1 + length


def _frame(payload: bytes, position: int, marker: int) -> JpegHeader:
    precision, height, width, components = struct.unpack_from(">BHHB", payload, position + 3)
    if precision != 8 or marker in _LOSSLESS:
        raise Reject(
            f"unsupported: a {precision}-bit JPEG of type SOF{marker - 0xC0}; known are 8-bit baseline and progressive"
        )
    return JpegHeader(width, height, components)
