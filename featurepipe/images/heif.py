"""HEIC and AVIF: which of the two a file is, and PIL's plug-in class that reads it.

Both lie in the same container (ISO/IEC 23008-12), which may turn and mirror its image (``irot``, ``imir``). Pillow's AVIF reader
gives such a turn as the EXIF orientation; pillow-heif applies it and sets the orientation to 1. So an image is turned once.
"""

from __future__ import annotations

from typing import Any, Final

from featurepipe.errors import Reject, Unavailable

HEIF_SUFFIXES: Final = (".heic", ".heif")
AVIF_SUFFIXES: Final = (".avif",)
HEIC_STEP: Final = "pip install featurepipe[heif]"
AVIF_STEP: Final = "pip install --upgrade pillow, whose wheels have it"
_HEADER: Final = 12  # size and name of the first box, and the major brand
_MOST_BRANDS: Final = 256  # bytes that are searched for brands
_AVIF_BRANDS: Final = {b"avif", b"avis"}
_HEIC_BRANDS: Final = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs"}
_NEUTRAL: Final = {b"mif1", b"msf1", b"mif2"}  # any codec


def heif_plugin(payload: bytes) -> type[Any] | None:
    """The class that opens an HEIC or AVIF image; None of any other file.

    Raises:
        Unavailable: This installation lacks the decoder.
        Reject: A HEIF image of a codec that is neither HEVC nor AV1.
    """
    brands = _brands(payload)
    if brands & _AVIF_BRANDS:
        plugin = avif_reader()
        if plugin is None:
            raise Unavailable(f"unsupported: AVIF, which this Pillow lacks; {AVIF_STEP}")
        return plugin
    if brands & _HEIC_BRANDS:
        plugin = heic_reader()
        if plugin is None:
            raise Unavailable(f"unsupported: HEIC without pillow-heif; {HEIC_STEP}")
        return plugin
    if brands & _NEUTRAL:
        raise Reject("unsupported: HEIF of a codec that is neither HEVC (HEIC) nor AV1 (AVIF)")
    return None


def avif_reader() -> type[Any] | None:
    """Pillow's reader of AVIF, where it was built with one."""
    from PIL import features

    if not features.check("avif"):
        return None
    from PIL.AvifImagePlugin import AvifImageFile

    return AvifImageFile


def heic_reader() -> type[Any] | None:
    """The reader of HEIC of pillow-heif, where it is installed."""
    try:
        from pillow_heif.as_plugin import HeifImageFile
    except ImportError:  # or its library does not load
        return None
    found: type[Any] = HeifImageFile
    return found


def _brands(payload: bytes) -> set[bytes]:
    """The major brand of a file and those that it is compatible with."""
    if payload[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(payload[:4], "big"), _HEADER + _MOST_BRANDS)
    others = payload[16:end]  # after the minor version
    return {payload[8:12], *(others[at : at + 4] for at in range(0, len(others), 4))}
