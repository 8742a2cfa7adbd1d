"""DICOM images: a frame as the standard's grey-scale pipeline shows it, its numbers in the units of the file.

Stored values become those of the modality (rescale slope and intercept, or its lookup table), and the file's window says which of
them are black and white (DICOM PS3.3, C.11.1 and C.11.2). That is what intensity ``declared`` means here; another intensity is
asked of the numbers of the modality, such as ``window=-1000:400`` of Hounsfield units. Pixels of the padding value are black.
Overlays, presentation states and colour profiles are not applied.
"""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from featurepipe.errors import Reject, Unavailable
from featurepipe.images.budgets import FILE_BYTES, check_pixels
from featurepipe.images.damage import QUIET, JpegHeader, damage_as_reject, is_jpeg
from featurepipe.images.intensity import Array, Intensity, Samples, finished
from featurepipe.images.regions import FramesFile

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
_FUNCTIONS: Final = ("LINEAR", "LINEAR_EXACT", "SIGMOID")
FIRST_FRAME: Final = "the first of several frames taken"
FIRST_WINDOW: Final = "the first of several windows taken"
_BITS_ALLOCATED: Final = 0x00280100
_SIZE_TAGS: Final = (0x00280008, 0x00280010, 0x00280011, 0x00280002, 0x00280004, 0x00280100)
"""Frames, rows, columns, samples of a pixel, what these are, and bits that one takes."""
_LEAST_FRAME: Final = 64
"""Bytes of a compressed frame, at least: the header of run lengths alone has so many."""
_BARE: Final = re.compile(
    rb"(\x02\0\0\0|\x08\0[\0-\x18]\0)(UL\x04\0|\x04\0\0\0|(CS|UI|SH|DA)[\x02-\x40]\0|[\x02-\x40]\0\0\0)"
    rb"|\0\x08\0[\0-\x18](UL\0\x04|(CS|UI|SH|DA)\0[\x02-\x40])",
    re.DOTALL,
)
"""Group 2 or 8 with one of its first elements, in any encoding; no other format begins so."""
_CHUNK: Final = 1 << 18
# What is parsed of a file; the rest, of which there may be a great deal, is stepped over.
_TAGS: Final = [
    "SOPClassUID", "NumberOfFrames", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence",
    "WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence", "PixelData", "FloatPixelData", "DoubleFloatPixelData", "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths", "PixelPaddingValue", "PixelPaddingRangeLimit", "FloatPixelPaddingValue",
    "DoubleFloatPixelPaddingValue",
    "RedPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableDescriptor", "BluePaletteColorLookupTableDescriptor",
    "RedPaletteColorLookupTableData", "GreenPaletteColorLookupTableData", "BluePaletteColorLookupTableData",
]  # fmt: skip


def is_dicom(payload: bytes) -> bool:
    """Whether a file is DICOM, by its content: many have no suffix, and old ones neither preamble nor prefix."""
    return has_prefix(payload) or _BARE.match(payload) is not None


def has_prefix(payload: bytes) -> bool:
    """Whether a file begins as the standard asks for (PS3.10, 7.1)."""
    return payload[_PREAMBLE : _PREAMBLE + 4] == b"DICM"


def has_pydicom() -> bool:
    """Whether the decoder is installed."""
    try:
        import pydicom  # noqa: F401
    except ImportError:
        return False
    return True


def frames_in(head: bytes, size: int) -> int | None:
    """How many frames a file has, as its header says; 1 for what is no DICOM, or if so many cannot be in it.

    Args:
        head: its first bytes.
        size: of the whole file.

    Returns:
        None if that is not among these bytes, and there are more.
    """
    if not is_dicom(head) or not has_pydicom():
        return 1
    is_whole = len(head) >= size
    try:
        if _DEFLATED.encode() in head:
            if not is_whole:
                return None
            _check_deflated(head, lambda _: None)
        frames, least, is_complete = _frames_stated(head)
    except Exception:  # noqa: BLE001  # whatever is wrong with it is told when it is decoded
        return 1 if is_whole else None
    if not is_complete and not is_whole:
        return None
    return frames if 1 < frames <= size // least else 1


def _frames_stated(head: bytes) -> tuple[int, int, bool]:
    """Frames and the fewest bytes that one takes, as far as this part of a file says, and whether it says all of that."""
    import pydicom
    from pydicom.filereader import read_partial

    passed = False

    def beyond(tag: int, _vr: str | None, _length: int) -> bool:
        nonlocal passed
        passed = tag > _BITS_ALLOCATED
        return passed

    with QUIET:
        dataset = read_partial(io.BytesIO(head), beyond, specific_tags=list(_SIZE_TAGS), force=not has_prefix(head))
    syntax = pydicom.uid.UID(str(dataset.file_meta.get("TransferSyntaxUID", "")))
    least = _LEAST_FRAME
    if not (syntax in pydicom.uid.AllTransferSyntaxes and syntax.is_encapsulated) and syntax != _DEFLATED:
        values = int(dataset.Rows) * int(dataset.Columns) * int(dataset.get("SamplesPerPixel", 1))
        is_shared = dataset.get("PhotometricInterpretation") == "YBR_FULL_422"
        least = max(1, values * int(dataset.BitsAllocated) // 8 // (1 + is_shared))
    return _frames(dataset), least, passed


def read_dicom(
    file: FramesFile,
    number: int | None,
    intensity: Intensity,
    *,
    claim: Callable[[int], None],
    check_jpeg: Callable[[bytes], JpegHeader],
    remark: Callable[[str], None],
) -> Samples | Array:
    """One frame of a DICOM file.

    Args:
        file: the file.
        number: of the frame, from 1; None for the first, where others are not asked for.
        intensity: what will be asked of the numbers; the window of the file is of no interest unless it is ``declared``.
        claim: called with the bytes of memory that decoding will take, before it does.
        check_jpeg: gives the header of a JPEG, or raises `Reject` where some of its pixels are lost.
        remark: told that there are more frames or windows than are used.

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
        if file.parsed is None:
            file.parsed = _parsed(file.content, claim)
        dataset = file.parsed
        _check_header(dataset)
        frames = _frames(dataset)
        if number is None and frames > 1:
            remark(FIRST_FRAME)
        if number is not None and number > frames:
            raise Reject(f"missing: frame {number:,} of {frames:,}")
        shape = int(dataset.Rows), int(dataset.Columns)
        claim(len(file.content) + shape[0] * shape[1] * int(dataset.SamplesPerPixel) * _VALUE_BYTES)
        return _DicomFrame(dataset, (number or 1) - 1, remark).read(shape, intensity, check_jpeg)


def _parsed(payload: bytes, claim: Callable[[int], None]) -> Any:
    """What pydicom reads of a file; one without a preamble is of the encoding that its first elements are."""
    import pydicom
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    _check_deflated(payload, claim)
    dataset = pydicom.dcmread(io.BytesIO(payload), specific_tags=list(_TAGS), force=not has_prefix(payload))
    if "TransferSyntaxUID" not in dataset.file_meta:
        is_implicit, is_little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if is_little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if is_implicit else explicit
    return dataset


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
    needed = ["Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation"]
    needed += ["BitsAllocated", "BitsStored", "PixelRepresentation"] if "PixelData" in dataset else []
    if missing := [name for name in needed if dataset.get(name) is None]:
        raise Reject(f"corrupt: the file does not state {', '.join(missing)}")
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


class _DicomFrame:
    """One frame of a parsed file: its stored values, and what becomes of them.

    Args:
        dataset: The file, whose header was checked.
        index: Of the frame, from 0.
        remark: Told that there are more windows than the one that is used.
    """

    def __init__(self, dataset: Any, index: int, remark: Callable[[str], None]) -> None:
        self._dataset, self._index, self._remark = dataset, index, remark
        self._is_little = bool(dataset.file_meta.TransferSyntaxUID.is_little_endian)

    def read(
        self, shape: tuple[int, int], intensity: Intensity, check_jpeg: Callable[[bytes], JpegHeader]
    ) -> Samples | Array:
        """The frame, which the file states to be of this many rows and columns; see `read_dicom`."""
        dataset = self._dataset
        stored, blank = self._stored(check_jpeg)
        if stored.shape[:2] != shape:
            raise Reject(
                f"corrupt: pixels of shape {stored.shape}, and the file says {shape[0]} rows and {shape[1]} columns"
            )
        if dataset.PhotometricInterpretation in _GREY:
            return self._grey(stored, blank, intensity)
        if dataset.PhotometricInterpretation == _PALETTE:
            return self._of_palette(stored)
        return _scaled_by_range(stored, int(dataset.BitsStored))

    def _stored(self, check_jpeg: Callable[[bytes], JpegHeader]) -> tuple[Array, Array | None]:
        """The stored values, (H, W) or (H, W, 3), colours as RGB, and which of them are padding, if any."""
        from pydicom.pixels.utils import pixel_array

        dataset, syntax = self._dataset, self._dataset.file_meta.TransferSyntaxUID
        if "PixelData" not in dataset:
            real = np.array(pixel_array(dataset, index=self._index))
            return real, self._padding(real)
        bits, signed = int(dataset.BitsStored), bool(int(dataset.PixelRepresentation))
        if not syntax.is_compressed or syntax == _DEFLATED:
            _check_length(dataset)
            values = np.array(pixel_array(dataset, index=self._index))
            return _significant(values, bits, signed=signed), self._padding(values)
        plugin = self._check_compressed(str(syntax), check_jpeg)
        values = np.array(pixel_array(dataset, index=self._index, decoding_plugin=plugin))
        blank = self._padding(values)
        counted = values if blank is None else values[~blank]  # a padding value may be none of those bits
        if not np.array_equal(_significant(counted, bits, signed=signed), counted):
            raise Reject(f"corrupt: values from {values.min()} to {values.max()} are no numbers of {bits} bits")
        return values, blank

    def _padding(self, values: Array) -> Array | None:
        """Bool (H, W), which pixels fill the frame up to a rectangle (PS3.3, C.7.5.1.1.2); None if there are none."""
        dataset = self._dataset
        names = (
            ("PixelPaddingValue",)
            if values.dtype.kind != "f"
            else ("FloatPixelPaddingValue", "DoubleFloatPixelPaddingValue")
        )
        pad = next((value for name in names if (value := dataset.get(name)) is not None), None)
        if pad is None or dataset.PhotometricInterpretation not in _GREY:
            return None
        limit = dataset.get("PixelPaddingRangeLimit", pad) if values.dtype.kind != "f" else pad
        first, last = (_as_stored(value, values.dtype) for value in (pad, limit))
        low, high = min(first, last), max(first, last)
        blank = (values >= low) & (values <= high)
        return blank if blank.any() else None

    def _check_compressed(self, syntax: str, check_jpeg: Callable[[bytes], JpegHeader]) -> str:
        """Checks the frame's compressed bytes as far as they tell of their own size; gives the plug-in of pydicom to use.

        The plug-in is settled, where there is a choice, so that a frame has the same pixels on every machine.

        Raises:
            Unavailable: No plug-in for this compression is installed.
            Reject: The bytes are damaged, or of another size than the file states.
        """
        from pydicom.encaps import get_frame
        from pydicom.pixels.decoders.base import get_decoder

        dataset = self._dataset
        name = dataset.file_meta.TransferSyntaxUID.name
        try:
            decoder = get_decoder(syntax)
        except NotImplementedError as error:
            raise Reject(f"unsupported: DICOM of transfer syntax {name}") from error
        allocated, stored, samples = (
            int(dataset[key].value) for key in ("BitsAllocated", "BitsStored", "SamplesPerPixel")
        )
        deep_jpeg = syntax in _JPEG and stored > 8
        available = set(decoder.available_plugins) - ({"pillow"} if deep_jpeg else set())
        if not available:
            raise Unavailable(
                f"unsupported: DICOM of transfer syntax {name}, for which pydicom needs a plug-in; "
                "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg, or python-gdcm"
            )
        frame = get_frame(dataset.PixelData, self._index, number_of_frames=_frames(dataset))
        size = int(dataset.Columns), int(dataset.Rows)
        if syntax == _RLE:
            if len(frame) > (most := 64 + 2 * size[0] * size[1] * samples * allocated // 8):
                raise Reject(
                    f"corrupt: {len(frame):,} bytes of run lengths for a frame that takes {most // 2:,} without"
                )
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

    def _grey(self, stored: Array, blank: Array | None, intensity: Intensity) -> Samples | Array:
        dataset = self._dataset
        inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
        if blank is not None:
            if blank.all():
                raise Reject("empty: every pixel has the padding value")
            stored = np.where(blank, stored[~blank].min(), stored)  # so that it stretches no range
        if stored.dtype.kind == "f":
            values, span, depth = stored, None, 8 * stored.dtype.itemsize
        else:
            depth = int(dataset.BitsStored)
            signed = bool(int(dataset.PixelRepresentation))
            least, most = (-(2 ** (depth - 1)), 2 ** (depth - 1) - 1) if signed else (0, 2**depth - 1)
            values, span = self._of_modality(stored, (least, most))
        declared = None
        if intensity.kind in {"declared", "high-byte"}:  # others say themselves what is black and white
            window = self._window()
            table = self._item(_VOI, "VOILUTSequence")
            if isinstance(window, _Sigmoid):
                values, span = window(values), (0.0, 1.0)
                declared = span
            elif window is not None:
                declared = window
            elif table is not None:
                values, span = _looked_up(values, table.LUTDescriptor, table.LUTData, self._is_little)
                declared = span
        samples = Samples(values, depth, declared, min_is_white=inverted, span=span, windowed=True, blank=blank)
        if declared is None and values.dtype.kind == "u" and span is not None and span[0] == 0 and span[1] < 256:
            return finished(_eight_bits(values, int(span[1]).bit_length()), samples)
        return samples

    def _of_modality(self, stored: Array, span: tuple[float, float]) -> tuple[Array, tuple[float, float]]:
        """Values in the modality's units, and the least and greatest that there can be."""
        table = self._item(_MODALITY, "ModalityLUTSequence")
        if table is not None:
            return _looked_up(stored, table.LUTDescriptor, table.LUTData, self._is_little)
        slope = _number(self._value(_MODALITY, "RescaleSlope"), 1.0, "rescale slope")
        intercept = _number(self._value(_MODALITY, "RescaleIntercept"), 0.0, "rescale intercept")
        if slope == 0:
            raise Reject("corrupt: a rescale slope of 0")
        if (slope, intercept) == (1, 0):
            return stored, span
        low, high = sorted(slope * end + intercept for end in span)
        if slope == 1 and intercept.is_integer() and max(abs(low), abs(high)) < 2**31:
            return stored.astype(np.int32) + np.int32(intercept), (low, high)
        return stored.astype(np.float64) * slope + intercept, (low, high)

    def _window(self) -> tuple[float, float] | _Sigmoid | None:
        """Black and white by the first window of the file (PS3.3, C.11.2.1.2), or its curve, or None if it has none.

        Raises:
            Reject: The window is empty, or of a function that is not known.
        """
        centre, width = (self._value(_VOI, name) for name in ("WindowCenter", "WindowWidth"))
        if centre is None or width is None:
            return None
        if self._count(_VOI, "WindowCenter") > 1:
            self._remark(FIRST_WINDOW)
        centre, width = _number(centre, 0.0, "window centre"), _number(width, 0.0, "window width")
        function = str(self._value(_VOI, "VOILUTFunction") or "LINEAR").strip()
        else_ = "say what is black and white with featurepipe extract --intensity window=LO:HI (intensity= in Python)"
        if function not in _FUNCTIONS:
            raise Reject(
                f"intensity: the file's window is of function {function[:20]!r}; known are {', '.join(_FUNCTIONS)}; {else_}"
            )
        if width < 1 and (function == "LINEAR" or width <= 0):
            raise Reject(
                f"intensity: the file's window has width {width:g}, where {function} needs {_least(function)}; {else_}"
            )
        if function == "SIGMOID":
            return _Sigmoid(centre, width)
        if function == "LINEAR_EXACT":
            return centre - width / 2, centre + width / 2
        middle, half = centre - 0.5, (width - 1) / 2
        return middle - half, max(middle + half, math.nextafter(middle, math.inf))

    def _of_palette(self, stored: Array) -> Samples | Array:
        colours = []
        for name in ("Red", "Green", "Blue"):
            descriptor = self._dataset.get(f"{name}PaletteColorLookupTableDescriptor")
            data = self._dataset.get(f"{name}PaletteColorLookupTableData")
            if descriptor is None or data is None:
                raise Reject("unsupported: a DICOM palette that is missing or segmented")
            colours.append(_looked_up(stored, descriptor, data, self._is_little))
        values = np.stack([plane for plane, _ in colours], axis=-1)
        return _scaled_by_range(values, max(int(span[1]) for _, span in colours).bit_length())

    def _groups(self, sequence: str) -> list[Any]:
        """Where an attribute of the frame may stand: a functional group of its own, one of all frames, the file itself."""
        found = []
        for name, index in (("PerFrameFunctionalGroupsSequence", self._index), ("SharedFunctionalGroupsSequence", 0)):
            if (groups := self._dataset.get(name)) and index < len(groups):
                found += list(groups[index].get(sequence) or [])[:1]
        return [*found, self._dataset]

    def _values(self, sequence: str, name: str) -> list[Any]:
        """The values of an attribute of the frame; none if it is not there."""
        for place in self._groups(sequence):
            value = place.get(name)
            values = list(value) if value is not None and not isinstance(value, str | bytes | int | float) else [value]
            if values and values[0] not in (None, ""):
                return values
        return []

    def _value(self, sequence: str, name: str) -> Any:
        """The first value of an attribute of the frame, or None."""
        return next(iter(self._values(sequence, name)), None)

    def _count(self, sequence: str, name: str) -> int:
        return len(self._values(sequence, name))

    def _item(self, sequence: str, name: str) -> Any:
        """The first item of a sequence of the frame, or None."""
        items = next((items for place in self._groups(sequence) if (items := place.get(name))), None)
        if items and len(items) > 1 and sequence == _VOI:
            self._remark(FIRST_WINDOW)
        return items[0] if items else None


class _Sigmoid(NamedTuple):
    """The curve of a window (PS3.3, C.11.2.1.3.1), from 0, black, to 1, white."""

    centre: float
    width: float

    def __call__(self, values: Array) -> Array:
        """1 / (1 + exp(-4 (x - centre) / width)), float64."""
        exponents = np.clip(-4 * (values.astype(np.float64) - self.centre) / self.width, -700, 700)
        curve: Array = 1 / (1 + np.exp(exponents))
        return curve


def _as_stored(value: Any, dtype: np.dtype[Any]) -> float:
    """A padding value as a pixel of this type has it; writers give the bits of -2000 as 63536, and the other way round."""
    if dtype.kind == "f":
        return float(value)
    bits, number = 8 * dtype.itemsize, int(value)
    low = -(2 ** (bits - 1)) if dtype.kind == "i" else 0
    return float((number - low) % 2**bits + low)


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


def _check_size(found: tuple[int, int], stated: tuple[int, int]) -> None:
    if found != stated:
        raise Reject(f"corrupt: a frame of {found[0]}x{found[1]} pixels, and the file says {stated[0]}x{stated[1]}")


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


def _number(value: Any, default: float, what: str) -> float:
    number = default if value is None else float(value)
    if not math.isfinite(number):
        raise Reject(f"corrupt: a {what} that is no finite number")
    return number
