"""DICOM images: the first frame as the standard's grey-scale pipeline shows it, its numbers in the units of the file.

Stored values become those of the modality (rescale slope and intercept, or its lookup table), and the file's window says which of
them are black and white (DICOM PS3.3, C.11.1 and C.11.2). That is what intensity ``declared`` means here; another intensity is
asked of the numbers of the modality, such as ``window=-1000:400`` of Hounsfield units. Overlays, presentation states, pixel
padding and colour profiles are not applied.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from featurepipe.errors import Reject, Unavailable
from featurepipe.images.budgets import FILE_BYTES, check_pixels
from featurepipe.images.damage import damage_as_reject
from featurepipe.images.intensity import Array, Intensity, Samples
from featurepipe.images.jpeg import JpegHeader, is_jpeg

DICOM_SUFFIXES: Final = (".dcm", ".dicom")
DICOM_STEP: Final = "pip install featurepipe[dicom]"
_PREAMBLE: Final = 128
_VALUE_BYTES: Final = 24
"""Bytes that a value takes at its peak: as it is stored and decoded, then as numbers of floating point, twice."""
_EXCESS: Final = 8
"""Bytes after the last pixel that are taken for padding; with more, the size that the file states may be wrong."""
_GREY: Final = {"MONOCHROME1", "MONOCHROME2"}
_COLOURS: Final = {"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"}
_PALETTE: Final = "PALETTE COLOR"
_DEFLATED: Final = "1.2.840.10008.1.2.1.99"
_RLE: Final = "1.2.840.10008.1.2.5"
_JPEG: Final = {"1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"}  # baseline, and extended of perhaps 12 bits
_JPEG_2000: Final = {"1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"}
_CODESTREAM: Final = b"\xff\x4f\xff\x51"  # of JPEG 2000: SOC, then SIZ
_MODALITY: Final = "PixelValueTransformationSequence"
_VOI: Final = "FrameVOILUTSequence"
_CHUNK: Final = 1 << 18
# What is parsed of a file; the rest, of which there may be a great deal, is stepped over.
_TAGS: Final = [
    "SOPClassUID", "NumberOfFrames", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence",
    "WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence", "PixelData", "FloatPixelData", "DoubleFloatPixelData", "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
    "RedPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableDescriptor", "BluePaletteColorLookupTableDescriptor",
    "RedPaletteColorLookupTableData", "GreenPaletteColorLookupTableData", "BluePaletteColorLookupTableData",
]  # fmt: skip


def is_dicom(payload: bytes) -> bool:
    """Whether a file is DICOM, by its content: many have no suffix."""
    return payload[_PREAMBLE : _PREAMBLE + 4] == b"DICM"


def has_pydicom() -> bool:
    """Whether the decoder is installed."""
    try:
        import pydicom  # noqa: F401
    except ImportError:
        return False
    return True


def read_dicom(
    payload: bytes, intensity: Intensity, claim: Callable[[int], None], check_jpeg: Callable[[bytes], JpegHeader]
) -> Samples | Array:
    """The first frame of a DICOM file.

    Args:
        payload: the file.
        intensity: what will be asked of the numbers; the window of the file is of no interest unless it is ``declared``.
        claim: called with the bytes of memory that decoding will take, before it does.
        check_jpeg: gives the header of a JPEG, or raises `Reject` where some of its pixels are lost.

    Returns:
        uint8 (H, W) or (H, W, 3), or numbers that `eight_bits` scales.

    Raises:
        Unavailable: pydicom, or what it needs for this kind of compression, is not installed.
        Reject: the file holds no image, or one that is damaged, too large or of a kind that is not known.
    """
    if not has_pydicom():
        raise Unavailable(f"unsupported: DICOM without pydicom; {DICOM_STEP}")
    from pydicom.errors import BytesLengthException, InvalidDicomError

    with damage_as_reject(RuntimeError, BytesLengthException, InvalidDicomError):
        return _read(payload, intensity, claim, check_jpeg)


def _read(
    payload: bytes, intensity: Intensity, claim: Callable[[int], None], check_jpeg: Callable[[bytes], JpegHeader]
) -> Samples | Array:
    import pydicom

    _check_deflated(payload, claim)
    dataset = pydicom.dcmread(io.BytesIO(payload), specific_tags=list(_TAGS))
    _check_header(dataset)
    shape = int(dataset.Rows), int(dataset.Columns)
    claim(len(payload) + shape[0] * shape[1] * int(dataset.SamplesPerPixel) * _VALUE_BYTES)
    stored = _first_frame(dataset, check_jpeg)
    if stored.shape[:2] != shape:
        raise Reject(
            f"corrupt: pixels of shape {stored.shape}, and the file says {shape[0]} rows and {shape[1]} columns"
        )
    if dataset.PhotometricInterpretation in _GREY:
        return _grey(dataset, stored, intensity)
    if dataset.PhotometricInterpretation == _PALETTE:
        return _of_palette(dataset, stored)
    return _scaled_by_range(stored, int(dataset.BitsStored))


def _check_deflated(payload: bytes, claim: Callable[[int], None]) -> None:
    """Rejects a deflated file that grows beyond the limit of a file, before pydicom inflates it in one piece."""
    from pydicom.filereader import _read_file_meta_info

    if _DEFLATED.encode() not in payload:
        return
    file = io.BytesIO(payload)
    file.seek(_PREAMBLE + 4)
    if str(_read_file_meta_info(file).get("TransferSyntaxUID", "")) != _DEFLATED:
        return
    inflater, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
    while not inflater.eof and (rest := file.read(_CHUNK)):
        while rest:
            size += len(inflater.decompress(rest, _CHUNK))
            rest = inflater.unconsumed_tail
            if size > FILE_BYTES():
                raise Reject(f"bomb: inflates to more than {FILE_BYTES.variable} allows ({FILE_BYTES():,} bytes)")
    if not inflater.eof:
        raise Reject("truncated: the deflated data set has no end")
    claim(2 * size)


def _check_header(dataset: Any) -> None:
    """Rejects what holds no image, or one that we do not decode, by what is said of it.

    Raises:
        Reject: so it is.
    """
    has_pixels = any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData"))
    if not has_pixels and ("Rows" not in dataset or "Columns" not in dataset):
        kind = dataset.get("SOPClassUID")
        raise Reject(
            f"not-an-image: a DICOM file without pixels ({getattr(kind, 'name', kind) or 'of no stated class'})"
        )
    if not has_pixels:
        raise Reject("truncated: a DICOM file that states a size and ends before its pixels")
    if (frames := _frames(dataset)) < 1:
        raise Reject(f"empty: {frames} frames")
    check_pixels(int(dataset.Columns), int(dataset.Rows))
    photometric, samples = dataset.PhotometricInterpretation, int(dataset.SamplesPerPixel)
    if photometric not in _GREY | _COLOURS | {_PALETTE}:
        raise Reject(f"unsupported: a DICOM of photometric interpretation {str(photometric)[:20]!r}")
    if samples != (3 if photometric in _COLOURS else 1):
        raise Reject(f"corrupt: {samples} samples a pixel of photometric interpretation {photometric}")
    if "PixelData" in dataset:
        allocated, stored = int(dataset.BitsAllocated), int(dataset.BitsStored)
        if allocated not in {1, 8, 16, 32} or not 1 <= stored <= allocated:
            raise Reject(f"unsupported: a DICOM of {stored} bits stored in {allocated}")
        if int(dataset.get("HighBit", stored - 1)) != stored - 1:
            raise Reject(f"unsupported: a DICOM whose {stored} bits end at bit {dataset.HighBit}")


def _frames(dataset: Any) -> int:
    stated = dataset.get("NumberOfFrames")
    return 1 if stated is None else int(stated)


def _first_frame(dataset: Any, check_jpeg: Callable[[bytes], JpegHeader]) -> Array:
    """The stored values of the first frame, (H, W) or (H, W, 3), colours as RGB."""
    from pydicom.pixels.utils import pixel_array

    syntax = dataset.file_meta.TransferSyntaxUID
    if "PixelData" not in dataset:
        return np.array(pixel_array(dataset, index=0))
    bits, signed = int(dataset.BitsStored), bool(int(dataset.PixelRepresentation))
    if not syntax.is_compressed or syntax == _DEFLATED:
        _check_length(dataset)
        return _significant(np.array(pixel_array(dataset, index=0)), bits, signed=signed)
    plugin = _check_compressed(dataset, str(syntax), check_jpeg)
    values = np.array(pixel_array(dataset, index=0, decoding_plugin=plugin))
    if not np.array_equal(_significant(values, bits, signed=signed), values):
        raise Reject(f"corrupt: values from {values.min()} to {values.max()} are no numbers of {bits} bits")
    return values


def _significant(values: Array, bits: int, *, signed: bool) -> Array:
    """The lower ``bits`` of integers; the bits above may hold overlays."""
    unused = 8 * values.dtype.itemsize - bits
    if unused <= 0:
        return values
    integers = values.astype(np.dtype(f"{'i' if signed else 'u'}{values.dtype.itemsize}"))
    shifted: Array = (integers << unused) >> unused
    return shifted


def _check_length(dataset: Any) -> None:
    """Compares the bytes of pixels that are not compressed with what is said of them."""
    values = int(dataset.Rows) * int(dataset.Columns) * int(dataset.SamplesPerPixel) * _frames(dataset)
    if dataset.PhotometricInterpretation == "YBR_FULL_422":
        values = values // 3 * 2
    expected, found = -(-values * int(dataset.BitsAllocated) // 8), len(dataset.PixelData)
    said = f"{found:,} bytes of pixels, and {expected:,} follow from rows, columns, frames and bits"
    if found < expected:
        raise Reject(f"truncated: {said}")
    if found > expected + _EXCESS:
        raise Reject(f"corrupt: {said}")


def _check_compressed(dataset: Any, syntax: str, check_jpeg: Callable[[bytes], JpegHeader]) -> str:
    """Checks the first frame's compressed bytes as far as they tell of their own size; gives the plug-in of pydicom to use.

    The plug-in is settled, where there is a choice, so that a frame has the same pixels on every machine.

    Raises:
        Unavailable: No plug-in for this compression is installed.
        Reject: The bytes are damaged, or of another size than the file states.
    """
    from pydicom.encaps import get_frame
    from pydicom.pixels.decoders.base import get_decoder

    name = dataset.file_meta.TransferSyntaxUID.name
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as error:
        raise Reject(f"unsupported: DICOM of transfer syntax {name}") from error
    allocated, stored, samples = (int(dataset[key].value) for key in ("BitsAllocated", "BitsStored", "SamplesPerPixel"))
    deep_jpeg = syntax in _JPEG and stored > 8
    available = set(decoder.available_plugins) - ({"pillow"} if deep_jpeg else set())
    if not available:
        raise Unavailable(
            f"unsupported: DICOM of transfer syntax {name}, for which pydicom needs a plug-in; "
            "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
        )
    frame = get_frame(dataset.PixelData, 0, number_of_frames=_frames(dataset))
    size = int(dataset.Columns), int(dataset.Rows)
    if syntax == _RLE:
        if len(frame) > (most := 64 + 2 * size[0] * size[1] * samples * allocated // 8):
            raise Reject(f"corrupt: {len(frame):,} bytes of run lengths for a frame that takes {most // 2:,} without")
        return "pydicom"
    if syntax in _JPEG and not deep_jpeg:
        if not is_jpeg(frame):
            raise Reject("corrupt: a frame that is no JPEG")
        header = check_jpeg(frame)
        _check_size((header.width, header.height), size)
        return "pillow"
    if syntax in _JPEG_2000:
        at = frame.find(_CODESTREAM)
        if at < 0 or len(frame) < at + 24:
            raise Reject("corrupt: a frame that is no JPEG 2000")
        right, lower, left, top = (int.from_bytes(frame[at + i : at + i + 4], "big") for i in (8, 12, 16, 20))
        _check_size((right - left, lower - top), size)
        return "pillow" if samples == 1 or stored <= 8 else ""
    return ""


def _check_size(found: tuple[int, int], stated: tuple[int, int]) -> None:
    if found != stated:
        raise Reject(f"corrupt: a frame of {found[0]}x{found[1]} pixels, and the file says {stated[0]}x{stated[1]}")


def _grey(dataset: Any, stored: Array, intensity: Intensity) -> Samples | Array:
    inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
    if stored.dtype.kind == "f":
        values, span, depth = stored, None, 8 * stored.dtype.itemsize
    else:
        depth = int(dataset.BitsStored)
        signed = bool(int(dataset.PixelRepresentation))
        least, most = (-(2 ** (depth - 1)), 2 ** (depth - 1) - 1) if signed else (0, 2**depth - 1)
        values, span = _of_modality(dataset, stored, (least, most))
    declared = None
    if intensity.kind in {"declared", "high-byte"}:  # others say themselves what is black and white
        declared = _window(dataset)
        table = _item(dataset, _VOI, "VOILUTSequence")
        if declared is None and table is not None:
            values, span = _looked_up(values, table.LUTDescriptor, table.LUTData, _is_little(dataset))
            declared = span
    if declared is None and values.dtype.kind == "u" and span is not None and span[0] == 0 and span[1] < 256:
        eight = _eight_bits(values, int(span[1]).bit_length())
        return np.invert(eight) if inverted else eight
    return Samples(values, depth, declared, min_is_white=inverted, span=span, windowed=True)


def _of_modality(dataset: Any, stored: Array, span: tuple[float, float]) -> tuple[Array, tuple[float, float]]:
    """Values in the modality's units, and the least and greatest that there can be."""
    table = _item(dataset, _MODALITY, "ModalityLUTSequence")
    if table is not None:
        return _looked_up(stored, table.LUTDescriptor, table.LUTData, _is_little(dataset))
    slope = _number(_value(dataset, _MODALITY, "RescaleSlope"), 1.0, "rescale slope")
    intercept = _number(_value(dataset, _MODALITY, "RescaleIntercept"), 0.0, "rescale intercept")
    if slope == 0:
        raise Reject("corrupt: a rescale slope of 0")
    if (slope, intercept) == (1, 0):
        return stored, span
    low, high = sorted(slope * end + intercept for end in span)
    if slope == 1 and intercept.is_integer() and max(abs(low), abs(high)) < 2**31:
        return stored.astype(np.int32) + np.int32(intercept), (low, high)
    return stored.astype(np.float64) * slope + intercept, (low, high)


def _window(dataset: Any) -> tuple[float, float] | None:
    """Black and white by the first window of the file (PS3.3, C.11.2.1.2), or None if it has none.

    Raises:
        Reject: The window is empty, or no straight line.
    """
    centre, width = (_value(dataset, _VOI, name) for name in ("WindowCenter", "WindowWidth"))
    if centre is None or width is None:
        return None
    centre, width = _number(centre, 0.0, "window centre"), _number(width, 0.0, "window width")
    function = str(_value(dataset, _VOI, "VOILUTFunction") or "LINEAR").strip()
    else_ = "say what is black and white with featurepipe extract --intensity window=LO:HI (intensity= in Python)"
    if function not in {"LINEAR", "LINEAR_EXACT"}:
        raise Reject(
            f"intensity: the file's window is of function {function[:20]!r}, which is no straight line; {else_}"
        )
    if width < 1 and (function == "LINEAR" or width <= 0):
        raise Reject(
            f"intensity: the file's window has width {width:g}, where {function} needs {_least(function)}; {else_}"
        )
    if function == "LINEAR_EXACT":
        return centre - width / 2, centre + width / 2
    middle, half = centre - 0.5, (width - 1) / 2
    return middle - half, max(middle + half, math.nextafter(middle, math.inf))


def _least(function: str) -> str:
    return "1 at least" if function == "LINEAR" else "more than 0"


def _scaled_by_range(values: Array, bits: int) -> Samples | Array:
    """Numbers of 0 to 2**bits - 1: uint8 if they are of up to eight bits, which need nobody to say what is white."""
    return Samples(values, bits, span=(0, 2**bits - 1)) if bits > 8 else _eight_bits(values, bits)


def _eight_bits(values: Array, bits: int) -> Array:
    """Numbers of 0 to 2**bits - 1, of up to eight bits, in proportion: 0 to 255."""
    table = np.rint(np.arange(2**bits) * (255 / (2**bits - 1))).astype(np.uint8)
    scaled: Array = table[values]
    return scaled


def _of_palette(dataset: Any, stored: Array) -> Samples | Array:
    colours = []
    for name in ("Red", "Green", "Blue"):
        descriptor = dataset.get(f"{name}PaletteColorLookupTableDescriptor")
        data = dataset.get(f"{name}PaletteColorLookupTableData")
        if descriptor is None or data is None:
            raise Reject("unsupported: a DICOM palette that is missing or segmented")
        colours.append(_looked_up(stored, descriptor, data, _is_little(dataset)))
    values = np.stack([plane for plane, _ in colours], axis=-1)
    return _scaled_by_range(values, max(int(span[1]) for _, span in colours).bit_length())


def _looked_up(
    values: Array, descriptor: Sequence[int], data: Any, is_little: bool
) -> tuple[Array, tuple[float, float]]:
    """Values by a lookup table (PS3.3, C.11.1.1.1): those beyond its ends take its first and last entry.

    pydicom's own lookup is not used: it keeps indices in the type of the entries, so that 12 bits wrap in a table of eight.

    Returns:
        uint8 or uint16, with (0, the greatest entry that there can be).
    """
    entries, first, bits = int(descriptor[0]) or 1 << 16, int(descriptor[1]), int(descriptor[2])
    if not 8 <= bits <= 16:
        raise Reject(f"unsupported: a DICOM lookup table of {bits} bits")
    if values.dtype.kind == "f":
        raise Reject("unsupported: a DICOM lookup table for numbers that are not whole")
    if isinstance(data, bytes):
        wide = len(data) >= 2 * entries
        table = np.frombuffer(data, np.dtype(f"{'<' if is_little else '>'}u2") if wide else np.uint8)
    else:
        table = np.asarray(data)
    if len(table) < entries:
        raise Reject(f"truncated: a lookup table of {len(table)} entries, and {entries} are stated")
    table = table[:entries]
    if int(table.min()) < 0 or int(table.max()) >= 1 << bits:
        raise Reject(f"corrupt: a lookup table of {bits} bits goes to {table.max()}")
    table = table.astype(np.uint8 if bits == 8 else np.uint16)
    return table[np.clip(values.astype(np.int64) - first, 0, entries - 1)], (0, 2**bits - 1)


def _is_little(dataset: Any) -> bool:
    return bool(dataset.file_meta.TransferSyntaxUID.is_little_endian)


def _groups(dataset: Any, sequence: str) -> list[Any]:
    """Where an attribute of the first frame may stand: a functional group of its own, one of all frames, the file itself."""
    found = []
    for name in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        if groups := dataset.get(name):
            found += list(groups[0].get(sequence) or [])[:1]
    return [*found, dataset]


def _value(dataset: Any, sequence: str, name: str) -> Any:
    """The first value of an attribute of the first frame, or None."""
    for place in _groups(dataset, sequence):
        value = place.get(name)
        if value is not None and not isinstance(value, str | bytes | int | float):
            value = next(iter(value), None)
        if value not in (None, ""):
            return value
    return None


def _item(dataset: Any, sequence: str, name: str) -> Any:
    """The first item of a sequence of the first frame, or None."""
    return next((items[0] for place in _groups(dataset, sequence) if (items := place.get(name))), None)


def _number(value: Any, default: float, what: str) -> float:
    number = default if value is None else float(value)
    if not math.isfinite(number):
        raise Reject(f"corrupt: a {what} that is no finite number")
    return number
