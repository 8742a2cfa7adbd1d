"""Damaged files: what decoders raise, warn of and print becomes the reason of a reject; and the structure of a JPEG, which tells.

libjpeg repairs what it can and says in a warning what it met. Which warnings mean lost pixels was settled by damaging photographs
(a bit flipped, 64 bytes overwritten with zeros or noise, bytes dropped, the tail zeroed or cut off; baseline, progressive, with
restart markers): nearly every damage that gives a warning at all gives ``bad Huffman code``, ``premature end`` or bytes left over
between markers, and what is left over by a decoder that lost its place is 4 bytes at least (of baseline files 8), and
goes on as the bytes do that it took for image data. Cameras pad with a few bytes, which come after image data that is complete.
"""

from __future__ import annotations

import ctypes
import logging
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, cast

from featurepipe.errors import Reject

# What PIL's parsers raise on damaged files, besides OSError and SyntaxError.
DAMAGE: Final = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError, KeyError, TypeError,
    AttributeError, OverflowError, ZeroDivisionError, NotImplementedError,
)  # fmt: skip


@contextmanager
def damage_as_reject(*more: type[Exception]) -> Iterator[None]:
    """A block in which what a decoder raises on a damaged file becomes a `Reject`.

    Args:
        more: Exceptions of this decoder, besides ``DAMAGE``.

    Raises:
        Reject: ``truncated`` or ``corrupt``, with the first line of the decoder's error.
    """
    kinds: tuple[type[Exception], ...] = (*DAMAGE, *more)
    try:
        yield
    except kinds as error:
        code = "truncated" if says_truncated(error) else "corrupt"
        raise Reject(f"{code}: {first_line(error) or type(error).__name__}") from error


def says_truncated(error: Exception | str) -> bool:
    """Whether a decoder's error, or its text, means that the file ends too early."""
    words = ("truncat", "eof", "end of file", "premature end", "unpack requires", "not enough", "incomplete")
    return isinstance(error, EOFError | struct.error | IndexError) or any(word in str(error).lower() for word in words)


def first_line(error: Exception) -> str:
    """The first line of an error's text, not too long."""
    return str(error).partition("\n")[0][:200]


class QuietModules:
    """A context in which some modules warn about nothing, entered by any number of threads.

    ``warnings.catch_warnings`` swaps the filters of the whole process and puts them back in the order of exit, which
    goes wrong between threads. Here the first thread in adds one filter, for these modules only, and the last one out
    removes it.

    Args:
        pattern: A regular expression for the start of the modules' names.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self._lock = threading.Lock()
        self._inside = 0
        self._filter: Any = None

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            filters = cast("list[Any]", warnings.filters)
            if self._filter is None or self._filter not in filters:
                warnings.filterwarnings("ignore", module=self.pattern)
                self._filter = filters[0]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._inside -= 1
            filters = cast("list[Any]", warnings.filters)
            if not self._inside and self._filter in filters:
                filters.remove(self._filter)


# PIL and pydicom warn about odd metadata, of which what matters is checked; torchvision, from 0.29 on, about its own future.
QUIET: Final = QuietModules(r"(PIL|pillow_heif|pydicom|torchvision\.io)\b")
"""Entered around calls of PIL, pydicom and torchvision.io, from any thread."""


def silence_libtiff() -> bool:
    """Has the libtiff that PIL has loaded print nothing; its errors come through PIL as exceptions all the same.

    Its default is to print each bad line of a damaged fax, past Python. The handlers belong to the library of PIL's wheel, and to
    the whole process where PIL uses the system's.

    Returns:
        Whether a libtiff was found: only where the system tells which libraries are loaded (Linux).
    """
    found = False
    with suppress(OSError, AttributeError):
        for path in {
            line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libtiff" in line
        }:
            library = ctypes.CDLL(path)
            for setter in (library.TIFFSetErrorHandler, library.TIFFSetWarningHandler):
                setter.argtypes, setter.restype = [ctypes.c_void_p], ctypes.c_void_p
                setter(None)
            found = True
    return found


silence_libtiff()
# What PIL logs of a damaged file is in its exceptions, too: Python would print it where nobody has set up logging.
for _name in ("PIL", "pydicom", "pillow_heif"):
    logging.getLogger(_name).addHandler(logging.NullHandler())


STRAY_BYTES: Final = 7
"""Bytes of any content that may lie between the image data and the next marker without a doubt about the data."""
STRAY_PROGRESSIVE: Final = 3
"""The same of a progressive JPEG, whose scans are read from many short codes: a decoder finds its place again sooner."""
_STANDALONE: Final = {0x01, *range(0xD0, 0xD9)}  # markers without a length
_FRAMES: Final = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_LOSSLESS: Final = {0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF}  # and hierarchical
_PROGRESSIVE: Final = {0xC2, 0xCA}
_APP0, _APP1, _ADOBE, _SOS, _EOI = 0xE0, 0xE1, 0xEE, 0xDA, 0xD9
_END_OF_SCAN: Final = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")
_LEFT_OVER: Final = re.compile(r"(\d+) extraneous bytes before marker 0x([0-9a-f]{2})")
_NO_END: Final = "Premature end of JPEG file"
_TOO_SHORT: Final = "Corrupt JPEG data: premature end of data segment"
_READ_AHEAD: Final = 8
_ZEROS: Final = bytes(64)
_ROUNDS: Final = 32  # warnings of one file that are looked into


class JpegHeader(NamedTuple):
    """What precedes the first scan: the frame header of ITU-T T.81, section B.2.2, and the EXIF orientation, 1 to 8.

    ``several_scans`` is whether a decoder reads on after the first: it refines the image, or lacks some components.
    """

    width: int
    height: int
    components: int
    progressive: bool = False
    orientation: int = 1
    several_scans: bool = False


class Segment(NamedTuple):
    """A marker and what follows: its own bytes, for a scan also the image data; what lies between two is in neither."""

    marker: int
    start: int
    end: int


def is_jpeg(payload: bytes) -> bool:
    """Whether the bytes start like a JPEG."""
    return payload.startswith(b"\xff\xd8\xff")


def read_jpeg_header(payload: bytes) -> JpegHeader:
    """Finds the frame header and the orientation without decoding anything.

    Not PIL's reader: that parses all EXIF data, takes eight times as long, and warns where they are odd.

    Raises:
        Reject: ``truncated`` before the first scan, ``corrupt``, or a kind of JPEG that nothing here can decode.
    """
    frame, orientation = None, 1
    for segment in segments(payload, up_to_scan=True):
        if segment.marker in _FRAMES and frame is None:
            frame = _frame(payload, segment)
        elif segment.marker == _APP1 and orientation == 1:
            orientation = _orientation(payload[segment.start + 4 : segment.end])
        elif segment.marker in {_EOI, _SOS}:
            if frame is None:
                raise Reject("corrupt: a JPEG without a frame header")
            few = payload[segment.start + 4 : segment.start + 5] < bytes([frame.components])
            return frame._replace(orientation=orientation, several_scans=frame.progressive or few)
    raise Reject("truncated: a JPEG that ends in its header")


def count_scans(payload: bytes, most: int) -> int:
    """How many scans a JPEG has, counted up to ``most`` + 1."""
    if payload.count(b"\xff\xda") <= most:  # as it may stand in metadata, too, this is an upper bound
        return most
    scans = 0
    for segment in segments(payload):
        scans += segment.marker == _SOS
        if segment.marker == _EOI or scans > most:
            break
    return scans


def looks_damaged(payload: bytes) -> bool:
    """Whether a JPEG lacks its end, or has a long run of zeros as copies have that stopped early; cheap, for a first look.

    A flat image may have such a run, too, so that only decoding tells.
    """
    return _ZEROS in payload or payload.rfind(b"\xff\xd9") < 0


def segments(payload: bytes, *, up_to_scan: bool = False) -> Iterator[Segment]:
    """The segments of a JPEG after its start, up to its end or the first that is cut.

    With ``up_to_scan``, the first scan is the last segment, and goes without its image data: it takes long to find their end.
    """
    position = 2
    while (start := payload.find(b"\xff", position)) >= 0:
        at = start
        while payload[at : at + 1] == b"\xff":  # a marker may be padded with 0xFF
            at += 1
        if at >= len(payload):
            return
        marker = payload[at]
        if marker == _EOI:
            yield Segment(marker, at - 1, at + 1)
            return
        if marker in _STANDALONE or marker == 0:
            position = at + 1
            continue
        end = at + 1 + (struct.unpack_from(">H", payload, at + 1)[0] if at + 3 <= len(payload) else len(payload))
        if end > len(payload):
            return
        if marker == _SOS and not up_to_scan:
            following = _END_OF_SCAN.search(payload, end)
            end = following.start() if following else len(payload)
        yield Segment(marker, at - 1, end)
        if marker == _SOS and up_to_scan:
            return
        position = end


def _frame(payload: bytes, segment: Segment) -> JpegHeader:
    if segment.end - segment.start < 10:
        raise Reject("corrupt: a JPEG whose frame header is too short")
    precision, height, width, components = struct.unpack_from(">BHHB", payload, segment.start + 4)
    if precision != 8 or segment.marker in _LOSSLESS:
        raise Reject(
            f"unsupported: a {precision}-bit JPEG of type SOF{segment.marker - 0xC0}; known are 8-bit baseline and progressive"
        )
    return JpegHeader(width, height, components, segment.marker in _PROGRESSIVE)


def _orientation(app1: bytes) -> int:
    """The orientation in the first directory of EXIF data; 1 where there is none, or none that is understood."""
    order = {b"II": "<", b"MM": ">"}.get(app1[6:8])
    if not app1.startswith(b"Exif\0\0") or order is None:
        return 1
    tiff = app1[6:]
    try:
        (directory,) = struct.unpack_from(f"{order}4xI", tiff)
        (entries,) = struct.unpack_from(f"{order}H", tiff, directory)
        for entry in range(directory + 2, directory + 2 + 12 * entries, 12):
            tag, kind, count, value = struct.unpack_from(f"{order}HHIH", tiff, entry)
            if tag == 0x0112:
                return value if kind == 3 and count == 1 and 1 <= value <= 8 else 1
    except struct.error:
        pass  # odd metadata, as some cameras write; the image is what it is
    return 1


def lost_pixels(payload: bytes, warning: str, decode: Callable[[bytes], str]) -> str:
    """The warning that means lost pixels, or an empty text where all of libjpeg's warnings are about something else.

    libjpeg tells the first warning only. So whatever caused it is taken out, if that is harmless, and the rest judged again.

    Args:
        payload: the JPEG, as `without_strays` gives it.
        warning: what libjpeg said of it.
        decode: decodes a JPEG; gives libjpeg's first warning or error, empty for none.
    """
    mended = payload
    for _ in range(_ROUNDS):
        following = _mended(mended, warning, decode) if warning else None
        if following is None:
            break
        mended, warning = following, decode(following)
    return warning


def _mended(payload: bytes, warning: str, decode: Callable[[bytes], str]) -> bytes | None:
    """The JPEG without the harmless cause of a warning; None if the cause is not harmless."""
    left = _LEFT_OVER.search(warning)
    if left:
        return _without_padding(payload, int(left[1]), int(left[2], 16), warning, decode)
    if warning.startswith(_NO_END):
        return _with_end(payload)
    return None


def without_strays(payload: bytes) -> bytes:
    """The JPEG without bytes between its segments, and with the versions in its metadata that libjpeg knows.

    What lies between a scan and the next marker belongs to the scan, for nothing tells where its image data end.
    """
    kept = bytearray(payload[:2])
    for segment in segments(payload):
        part = bytearray(payload[segment.start : segment.end])
        if segment.marker == _APP0 and part[4:9] == b"JFIF\0" and len(part) > 11:
            part[9:11] = b"\1\1"
        if segment.marker == _ADOBE and part[4:9] == b"Adobe" and len(part) > 15 and part[15] > 2:
            part[15] = 1  # what libjpeg assumes for three components
        kept += part
    return bytes(kept)


def _without_padding(
    payload: bytes, count: int, marker: int, warning: str, decode: Callable[[bytes], str]
) -> bytes | None:
    """The JPEG without the bytes at the end of a scan that no pixel needs.

    Args:
        payload: the JPEG.
        count: how many of them libjpeg had not read; those that it read ahead, fewer than ``_READ_AHEAD``, are found by trying.
        marker: what follows them.
        warning: what libjpeg said of it.
        decode: as for `lost_pixels`.
    """
    for scan, following in pairwise(segments(payload)):
        if scan.marker != _SOS or following.marker != marker or scan.end - count < scan.start + 12:
            continue
        end = scan.end - count
        if decode(payload[:end] + payload[scan.end :]) in {warning, _TOO_SHORT}:
            continue  # it is another scan
        while end > scan.end - count - _READ_AHEAD and decode(payload[: end - 1] + payload[scan.end :]) != _TOO_SHORT:
            end -= 1
        return payload[:end] + payload[scan.end :] if _is_padding(payload, end, scan) else None
    return None


def _is_padding(payload: bytes, end: int, scan: Segment) -> bool:
    """Whether what lies between the ``end`` of image data and that of its scan was put there, not left by a decoder gone astray.

    Any bytes, if they are few; or one and the same all over, if the last byte of the image data is another: a decoder that went
    on into a zeroed tail stops somewhere within the zeros.
    """
    left = payload[end : scan.end]
    stuffed = payload[end - 2 : end] == b"\xff\x00"  # 0xFF in image data is followed by a zero
    few = STRAY_PROGRESSIVE if read_jpeg_header(payload).progressive else STRAY_BYTES
    return len(left) <= few or (len(set(left)) == 1 and payload[end - 1 - stuffed] != left[0])


def _with_end(payload: bytes) -> bytes | None:
    """The JPEG with the end marker that it lacks; None where more than that may be lacking, as of several scans."""
    scans = [segment for segment in segments(payload) if segment.marker == _SOS]
    frame = read_jpeg_header(payload)
    has_all = len(scans) == 1 and not frame.progressive and payload[scans[0].start + 4] == frame.components
    return payload + b"\xff\xd9" if has_all and scans[0].end == len(payload) else None
