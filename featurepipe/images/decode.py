"""Encoded bytes or stored pixels to one uint8 tensor, the same on every machine, or a reject with its reason."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from featurepipe.errors import Reject, Unavailable
from featurepipe.images.budgets import JPEG_SCANS, MEMORY, check_bytes, check_pixels
from featurepipe.images.damage import (
    DAMAGE,
    QUIET,
    JpegHeader,
    count_scans,
    damage_as_reject,
    first_line,
    is_jpeg,
    lost_pixels,
    read_jpeg_header,
    says_truncated,
    without_strays,
)
from featurepipe.images.dicom import has_prefix, is_dicom, read_dicom
from featurepipe.images.heif import heif_plugin
from featurepipe.images.intensity import DECLARED, HIGH_BYTE, Intensity, Samples, eight_bits, samples_of_array
from featurepipe.images.regions import Frame, FramesFile, Payload, Region, crop
from featurepipe.images.samples import is_deep, load_samples, tiff_in_words
from featurepipe.images.scaling import Scaling

Colour = Literal["rgb", "grey"]

FIRST_IMAGE: Final = "the first (of HEIC and AVIF the primary) of several images in the file taken"
Remark = Callable[[str], None]
"""Is told what was left out of a file, or guessed."""
Claim = Callable[[int], None]
"""Waits until so many bytes of memory may be used for decoding."""

PILLOW_BYTES: Final = 12
"""Bytes a pixel that decoding by PIL takes at its peak: four for the decoder, four for PIL's image, then the array and a copy."""
DEEP_BYTES: Final = 36
"""The same of more than eight bits: PIL image and decoder for each byte, then the numbers, twice, and the upper bits."""
_STRIP: Final = 1 << 22
"""Pixels that are converted at a time."""
_RUN: Final = 256
"""Pixels of a run-length coded BMP for each of its bytes, at most: a run of 255 takes two."""
ALPHA: Final = "white"
DECODING: Final[dict[str, str | int]] = {
    "alpha": ALPHA,  # transparency is composited on it
    "orientation": "exif",  # applied
    "frame": "first",
    "intensity": str(DECLARED),  # of more than eight bits; see `featurepipe.images.intensity.Intensity`
    "icc": "ignored",  # a colour profile in the file: numbers are taken for sRGB
    "cmyk": "naive",  # PIL's conversion, without a colour profile
    "grey": "luma-601",  # ITU-R 601; a JPEG's own luma channel
    "jpeg": "libjpeg-islow",
}
"""What decoding does that changes pixels: part of the feature space."""
_SCALED: Final = {
    "jpeg": "libjpeg-islow-scaled"
}  # so that releases that decode in full never take such a space for theirs
_VERSION_1: Final = {"sixteen_bit": str(HIGH_BYTE)}  # instead of `intensity`, and without `icc`


def is_scaled(route: str) -> bool:
    """Whether a decode route decodes JPEGs at less than their size; see `featurepipe.images.scaling.parse_route`."""
    return route.startswith("scaled")


def decoding_fields(intensity: str, route: str = "cpu") -> dict[str, str | int]:
    """What decoding does under an intensity: ``DECODING`` with it, or what spaces of version 1 say for ``high-byte``.

    Args:
        intensity: of images of more than eight bits.
        route: where and how JPEGs are decoded; see `featurepipe.images.scaling.parse_route`.
    """
    fields = {**DECODING, **(_SCALED if is_scaled(route) else {})}
    if intensity != str(HIGH_BYTE):
        return {**fields, "intensity": intensity}
    return {**{name: value for name, value in fields.items() if name not in {"intensity", "icc"}}, **_VERSION_1}


class _FirstOfWebP(WebPImagePlugin.WebPImageFile):
    """PIL's reader of WebP, which lets go of its decoder's two canvases before the pixels of the first frame are copied."""

    def _get_next(self) -> Any:
        found = super()._get_next()
        self._decoder = None
        return found


# The plug-in classes themselves, not Image.open: that warns about big images, and tries formats that we do not name,
# of which one (EPS) starts another program.
_FORMATS: Final[tuple[tuple[bytes, type[Any]], ...]] = (
    (b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (b"GIF87a", GifImagePlugin.GifImageFile),
    (b"GIF89a", GifImagePlugin.GifImageFile),
    (b"RIFF", _FirstOfWebP),
    (b"BM", BmpImagePlugin.BmpImageFile),
    (b"II*\0", TiffImagePlugin.TiffImageFile),
    (b"MM\0*", TiffImagePlugin.TiffImageFile),
    (b"II+\0", TiffImagePlugin.TiffImageFile),
    (b"MM\0+", TiffImagePlugin.TiffImageFile),
    (b"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
)
_NAMED_ONLY: Final = ((b"jP  ", "JPEG 2000"), (b"JXL ", "JPEG XL"))
KNOWN: Final = "JPEG, PNG, WebP, GIF, BMP, TIFF, HEIC, AVIF, DICOM"
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION: Final = 0x0112
_WITH_ALPHA: Final = {"RGBA", "LA", "PA", "RGBa", "La"}
# Not LAB: PIL converts it to RGB only where it was built with a colour management library, and never to grey.
_CONVERTIBLE: Final = {"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr"}
_UNKNOWN_LAYOUTS: Final = {"unknown pixel mode", "unknown data organization", "Invalid value for samples per pixel"}
REPAIRED: Final = "libjpeg could only repair it"
"""Stands in the reason of a reject, or of a note, for each JPEG that decodes although some of its pixels are lost."""
_UNKNOWN_SAMPLING: Final = "subsampling"  # in the words of TurboJPEG for what libjpeg, and so PIL, decodes all the same
_PREFIX: Final = "tjDecompress"


class Kept(NamedTuple):
    """Pixels of an image of which something is to be said.

    Attributes:
        pixels: uint8 (C, H, W).
        damage: Why some of them are lost, of a JPEG that was kept on request; else empty.
        remarks: What else there is to say, such as that the file has more frames.
    """

    pixels: torch.Tensor
    damage: str = ""
    remarks: tuple[str, ...] = ()


def try_decode(
    payload: Payload,
    *,
    colour: Colour,
    intensity: Intensity = DECLARED,
    keep_damaged: bool = False,
    claim: Claim | None = None,
    scaling: Scaling | None = None,
) -> torch.Tensor | Kept | Reject:
    """Decodes one image, with every exception as a reject: the border at which one image's trouble stays its own.

    Args:
        payload: as for `decode`.
        colour: as for `decode`.
        intensity: as for `decode`.
        keep_damaged: whether a JPEG that lost pixels is `Kept`.
        claim: as for `decode`.
        scaling: as for `decode`.
    """
    told, remarks = list[str](), list[str]()
    on_damage = told.append if keep_damaged else None
    try:
        pixels = decode(
            payload, colour=colour, intensity=intensity, on_damage=on_damage, on_remark=remarks.append, claim=claim,
            scaling=scaling,
        )  # fmt: skip
    except Exception as error:  # noqa: BLE001  # a stranger's file may make a library raise anything
        return as_reject(error)
    return Kept(pixels, told[0] if told else "", tuple(remarks)) if told or remarks else pixels


def is_repaired(reason: str) -> bool:
    """Whether the reason of a reject means a JPEG that `try_decode` would keep on request; so did releases before this one."""
    return REPAIRED in reason or reason.startswith("truncated: libjpeg cannot decode it")


def is_outdated(reason: str) -> bool:
    """Whether the reason of a reject is of a release that did not decode HEIC, AVIF or DICOM, and is no reason now."""
    return reason in {"unsupported: AVIF", "unsupported: HEIC", "unsupported: HEIF"} or (
        reason.startswith("not-an-image: ") and reason.endswith("known are JPEG, PNG, WebP, GIF, BMP, TIFF")
    )


def as_reject(error: Exception) -> Reject:
    """The reject for whatever came out of reading or decoding one image.

    Too little memory is `Unavailable`: the next run may have more.
    """
    if isinstance(error, Reject):
        return error
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return Unavailable("memory: there is not enough to read or decode it")
    return Reject(f"failed: {type(error).__name__}: {first_line(error)}")


def decode(
    payload: Payload,
    *,
    colour: Colour = "rgb",
    intensity: Intensity = DECLARED,
    on_damage: Callable[[str], None] | None = None,
    on_remark: Remark | None = None,
    claim: Claim | None = None,
    scaling: Scaling | None = None,
) -> torch.Tensor:
    """Decodes one image; safe to call from several threads, and the heavy part runs without the interpreter's lock.

    JPEG goes through libjpeg-turbo (simplejpeg), DICOM through pydicom, everything else, and JPEG in CMYK, through PIL.
    Transparency is composited on white, EXIF orientation applied, of an animation or several frames the first taken.

    Args:
        payload: An encoded JPEG, PNG, WebP, GIF, BMP, TIFF, HEIC, AVIF or DICOM, or pixels (H,W), (H,W,1), (H,W,3) or (H,W,4):
            uint8, bool (True is white), or other numbers, for which ``intensity`` is asked; a frame of a DICOM; or a region
            of any of these.
        colour: ``"rgb"`` for three channels, ``"grey"`` for one.
        intensity: Which values are black and white in images of more than eight bits.
        on_damage: Told why some pixels of a JPEG are lost, which then is decoded as far as libjpeg can repair it; by
            default it is a reject.
        on_remark: Told what was left out of the file or guessed, such as frames after the first.
        claim: Called with the bytes of memory that decoding will take, before it does; by default waits for its part of
            the process's memory for decoding, and gives it back at the end.
        scaling: How small a JPEG may be decoded; by default, and in any other format, in CMYK, and for a region, it is not.

    Returns:
        A uint8 tensor of shape (3,H,W) or (1,H,W), owned by the caller.

    Raises:
        Reject: Starts with ``empty``, ``truncated``, ``damaged``, ``not-an-image``, ``bomb``, ``budget``, ``unsupported``,
            ``intensity`` or ``corrupt``; ``box`` for that of a region.
    """
    if claim is None:
        with MEMORY.lease() as lease:
            return decode(
                payload, colour=colour, intensity=intensity, on_damage=on_damage, on_remark=on_remark, claim=lease,
                scaling=scaling,
            )  # fmt: skip
    if isinstance(payload, Region):
        payload.box.check()
        whole = decode(
            payload.image, colour=colour, intensity=intensity, on_damage=on_damage, on_remark=on_remark, claim=claim
        )
        return crop(whole, payload.box.edges(whole.shape[2], whole.shape[1]))
    if isinstance(payload, Frame):
        check_bytes(len(payload.file.content))
        with QUIET:
            return _decode_dicom(payload, colour, intensity, claim, on_remark)
    if isinstance(payload, np.ndarray):
        return _to_tensor(_from_array(payload, intensity, claim), colour)
    if not payload:
        raise Reject("empty: 0 bytes")
    check_bytes(len(payload))
    if is_jpeg(payload):
        header = checked_jpeg(payload)
        pixels = None if scaling is None else _decode_scaled(payload, header, colour, claim, scaling)
        if pixels is None:
            claim(jpeg_bytes(header))
            pixels = _decode_jpeg(payload, header, colour, on_damage)
        if pixels is not None:
            return pixels
    with QUIET:
        plugin = _known_plugin(payload)
        # A DICOM's preamble may begin as TIFF does (PS3.10, 7.1), of which there often is no more than that.
        has_other = plugin is not None and not (plugin is TiffImagePlugin.TiffImageFile and has_prefix(payload))
        decode_file = _decode_dicom if not has_other and is_dicom(payload) else _decode_pillow
        return decode_file(payload, colour, intensity, claim, on_remark)


def checked_jpeg(payload: bytes) -> JpegHeader:
    """The header of a JPEG that is within the budgets.

    Raises:
        Reject: it is not, or has no header that can be decoded.
    """
    header = read_jpeg_header(payload)
    check_pixels(header.width, header.height)
    if header.several_scans and count_scans(payload, most := JPEG_SCANS()) > most:
        raise Reject(f"budget: a JPEG of more than {most:,} scans, the limit of {JPEG_SCANS.variable}")
    return header


def jpeg_bytes(header: JpegHeader, divisor: int = 1) -> int:
    """The memory that decoding a JPEG takes: its pixels, and its coefficients where scans refine them.

    Args:
        header: Of the JPEG.
        divisor: Of the sizes of which it is decoded.
    """
    each = max(3, header.components) + PILLOW_BYTES * (header.components not in (1, 3))
    coefficients = (3 * header.components - max(3, header.components)) * header.progressive
    return (
        header.width * header.height * coefficients
        + _part(header.width, divisor) * _part(header.height, divisor) * each
    )


def _decode_jpeg(
    payload: bytes, header: JpegHeader, colour: Colour, on_damage: Callable[[str], None] | None
) -> torch.Tensor | None:
    """The pixels, upright; None for what only PIL decodes, which is free of damage as far as can be told."""
    space = {1: "GRAY" if colour == "grey" else "RGB", 3: "GRAY" if colour == "grey" else "RGB", 4: "CMYK"}.get(
        header.components
    )
    if space is None:
        return None
    # Of our own making, so that a file in which libjpeg finds another size than we did is an error, not more memory.
    pixels = np.empty((header.height, header.width, {"GRAY": 1, "RGB": 3, "CMYK": 4}[space]), np.uint8)
    warning = _by_libjpeg(payload, space, pixels)
    if _UNKNOWN_SAMPLING in warning:
        return None
    if warning and (reason := _repaired(without_strays(payload), space, pixels)):
        if on_damage is None:
            raise Reject(reason)
        on_damage(reason)
    return None if space == "CMYK" else _upright(torch.from_numpy(pixels).permute(2, 0, 1), header.orientation)


def _decode_scaled(
    payload: bytes, header: JpegHeader, colour: Colour, claim: Claim, scaling: Scaling
) -> torch.Tensor | None:
    """The pixels of an upright image of fewer; None for what is decoded in full.

    That is, too, what libjpeg has a warning of, so that damage is judged, and told, as it is without scaling.
    """
    lying = header.orientation >= 5
    sides = (header.width, header.height) if lying else (header.height, header.width)
    divisor = scaling.divisor(*sides)
    if divisor == 1 or header.components not in (1, 3):
        return None
    claim(jpeg_bytes(header, divisor))
    shape = (_part(header.height, divisor), _part(header.width, divisor), 1 if colour == "grey" else 3)
    pixels = np.empty(shape, np.uint8)
    if _by_libjpeg(payload, "GRAY" if colour == "grey" else "RGB", pixels, min_height=shape[0], min_width=shape[1]):
        return None
    return _upright(torch.from_numpy(pixels).permute(2, 0, 1), header.orientation)


def _part(side: int, divisor: int) -> int:
    """Pixels of a side that is decoded at a part of its length, rounded up as libjpeg does."""
    return -(-side // divisor)


def _by_libjpeg(payload: bytes, space: str, pixels: np.ndarray[Any, Any], *, strict: bool = True, **size: int) -> str:
    """Fills ``pixels`` (H, W, C); gives libjpeg's first warning (``strict``) or its error, without TurboJPEG's name for it.

    ``size`` is that of ``pixels``, where the JPEG has more.
    """
    try:
        simplejpeg.decode_jpeg(payload, space, buffer=pixels, strict=strict, **size)
    except ValueError as error:
        text = first_line(error)
        return (text.partition(": ")[2] if text.startswith(_PREFIX) else text) or type(error).__name__
    return ""


def _repaired(payload: bytes, space: str, pixels: np.ndarray[Any, Any]) -> str:
    """Decodes a JPEG of which libjpeg has a warning; gives why it has lost pixels, or an empty text.

    Raises:
        Reject: libjpeg gives up.
    """
    scratch = np.empty_like(pixels)
    lost = lost_pixels(
        payload, _by_libjpeg(payload, space, scratch), lambda mended: _by_libjpeg(mended, space, scratch)
    )
    # An error after a warning counts as a warning, too, so that pixels which were never written tell whether it gave up.
    pixels[:], scratch[:] = 0, 255
    said = _by_libjpeg(payload, space, pixels, strict=False) or _by_libjpeg(payload, space, scratch, strict=False)
    if not said and not np.array_equal(pixels, scratch):
        said = lost or "it gave up before the last row"
    if said:
        raise Reject(f"{'truncated' if says_truncated(said) else 'corrupt'}: libjpeg cannot decode it: {said}")
    return lost and f"{'truncated' if says_truncated(lost) else 'damaged'}: {REPAIRED}: {lost}"


def _upright(pixels: torch.Tensor, orientation: int) -> torch.Tensor:
    """Turns (C, H, W) as an EXIF orientation says."""
    if orientation >= 5:
        pixels = pixels.transpose(-1, -2)
    flipped = {2: (-1,), 3: (-2, -1), 4: (-2,), 6: (-1,), 7: (-2, -1), 8: (-2,)}.get(orientation)
    return pixels if flipped is None else pixels.flip(flipped)


def _from_array(array: np.ndarray[Any, Any], intensity: Intensity, claim: Claim) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise Reject(
            f"unsupported: an array of shape {array.shape}; pixels are (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"
        )
    check_pixels(array.shape[1], array.shape[0])
    claim(array.shape[0] * array.shape[1] * (PILLOW_BYTES if array.dtype.itemsize == 1 else DEEP_BYTES))
    if array.dtype == bool:
        array = array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(array))
    return scaled(samples_of_array(array), intensity)


def _decode_dicom(
    payload: bytes | Frame, colour: Colour, intensity: Intensity, claim: Claim, on_remark: Remark | None
) -> torch.Tensor:
    file, number = (FramesFile(payload), None) if isinstance(payload, bytes) else payload
    found = read_dicom(
        file, number, intensity, claim=claim, check_jpeg=check_jpeg, remark=on_remark or (lambda _: None)
    )
    return _to_tensor(Image.fromarray(found) if isinstance(found, np.ndarray) else scaled(found, intensity), colour)


def check_jpeg(payload: bytes) -> JpegHeader:
    """The header of a JPEG that decodes without loss.

    Raises:
        Reject: It is over a budget, or some of its pixels are lost.
    """
    header = checked_jpeg(payload)
    space = {1: "GRAY", 3: "RGB"}.get(header.components)
    if space is None:
        raise Reject(f"unsupported: a JPEG of {header.components} components in a DICOM")
    pixels = np.empty((header.height, header.width, {"GRAY": 1, "RGB": 3}[space]), np.uint8)
    if _by_libjpeg(payload, space, pixels) and (reason := _repaired(without_strays(payload), space, pixels)):
        raise Reject(reason)
    return header


def _decode_pillow(
    payload: bytes, colour: Colour, intensity: Intensity, claim: Claim, on_remark: Remark | None
) -> torch.Tensor:
    plugin = _plugin_for(payload)
    _check_complete(payload, plugin)
    more = () if _known_plugin(payload) else (RuntimeError,)  # of libheif
    with damage_as_reject(*more):
        try:
            with plugin(io.BytesIO(payload)) as image:
                check_pixels(*image.size)
                _check_runs(image, payload)
                claim(image.width * image.height * (DEEP_BYTES if is_deep(image) else PILLOW_BYTES))
                samples = load_samples(image, payload)
                found = _to_tensor(turned(image if samples is None else scaled(samples, intensity), image), colour)
                if on_remark is not None and _has_more(image):
                    on_remark(FIRST_IMAGE)
                return found
        except Image.DecompressionBombError as error:
            raise Reject(f"bomb: {error}") from error
        except DAMAGE as error:
            if plugin is TiffImagePlugin.TiffImageFile and str(error) in _UNKNOWN_LAYOUTS:
                raise Reject(
                    f"unsupported: {tiff_in_words(payload)}; save it as PNG, or as TIFF in 8 or 16 bits"
                ) from error
            raise


def _has_more(image: Image.Image) -> bool:
    """Whether the file of an image that is decoded has further images, frames or pages."""
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # noqa: BLE001  # the image itself is fine, whatever follows it
        return False


def scaled(samples: Samples, intensity: Intensity) -> Image.Image:
    """An image of eight bits per channel: of numbers (H, W) grey, (H, W, 3) colours or (H, W, 4) CMYK.

    Raises:
        Reject: As `eight_bits`.
    """
    pixels = eight_bits(samples, intensity)
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        return Image.frombytes("CMYK", (pixels.shape[1], pixels.shape[0]), pixels.tobytes())
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if samples.alpha is not None:
        image = image.convert("RGB")
        image.putalpha(Image.fromarray(samples.alpha))
    return image


def _known_plugin(payload: bytes) -> type[Any] | None:
    """The class of PIL that reads a file of one of ``_FORMATS``."""
    for magic, plugin in _FORMATS:
        if payload.startswith(magic) and (magic != b"RIFF" or payload[8:12] == b"WEBP"):
            return plugin
    return None


def _plugin_for(payload: bytes) -> type[Any]:
    if found := _known_plugin(payload) or heif_plugin(payload):
        return found
    for magic, name in _NAMED_ONLY:
        if magic in payload[4:12]:
            raise Reject(f"unsupported: {name}")
    raise Reject(f"not-an-image: starts with {payload[:8]!r}; known are {KNOWN}")


def _check_complete(payload: bytes, plugin: type[Any]) -> None:
    """Finds the cuts that PIL's decoders do not report as such."""
    if plugin is PngImagePlugin.PngImageFile and payload.rfind(b"IEND") < 0:
        raise Reject("truncated: a PNG without its end")
    if plugin is PngImagePlugin.PngImageFile and _has_wrong_checksum(payload):
        raise Reject("corrupt: the checksum of a PNG's image data does not match them")
    if plugin is _FirstOfWebP and int.from_bytes(payload[4:8], "little") + 8 > len(payload):
        raise Reject("truncated: a WebP shorter than it says")


def _has_wrong_checksum(payload: bytes) -> bool:
    """Whether a PNG's IDAT chunks differ from their checksums; PIL does not look at the last one."""
    view, position = memoryview(payload), 8
    while position + 12 <= len(payload):
        (length,) = struct.unpack_from(">I", payload, position)
        kind, end = payload[position + 4 : position + 8], position + 8 + length
        if kind == b"IEND" or end + 4 > len(payload):
            break
        if kind == b"IDAT" and zlib.crc32(view[position + 4 : end]) != struct.unpack_from(">I", payload, end)[0]:
            return True
        position = end + 4
    return False


def _check_runs(image: Image.Image, payload: bytes) -> None:
    """Rejects a run-length coded BMP that claims more pixels than its runs can fill; PIL makes up the rest in a slow loop."""
    runs = image.format == "BMP" and any(tile[0] == "bmp_rle" for tile in getattr(image, "tile", ()))
    if runs and image.width * image.height > _RUN * len(payload):
        raise Reject(f"bomb: {image.width}x{image.height} pixels of run lengths in {len(payload):,} bytes")


def turned(image: Image.Image, tagged: Image.Image | None = None) -> Image.Image:
    """The image upright, as its EXIF orientation says, or that of ``tagged``."""
    # Not ImageOps.exif_transpose: it also rewrites the metadata, and fails on images whose metadata is damaged.
    try:
        turn = _TURNS.get((tagged or image).getexif().get(_ORIENTATION, 1))
    except DAMAGE:
        turn = None
    return image if turn is None else image.transpose(turn)


def _to_tensor(image: Image.Image, colour: Colour) -> torch.Tensor:
    flat, mode = flattened(image), "RGB" if colour == "rgb" else "L"
    pixels = np.empty((flat.height, flat.width, len(mode)), np.uint8)
    rows = max(1, _STRIP // flat.width)
    for top in range(0, flat.height, rows):  # PIL makes several copies on the way to an array, of no more than a strip
        strip = pixels[top : top + rows]
        part = flat if len(strip) == flat.height else flat.crop((0, top, flat.width, top + len(strip)))
        strip[:] = np.asarray(part if part.mode == mode else part.convert(mode)).reshape(strip.shape)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def flattened(image: Image.Image) -> Image.Image:
    """No transparency; the image has eight bits per channel."""
    if image.mode in _WITH_ALPHA or (image.mode in _CONVERTIBLE and "transparency" in image.info):
        with_alpha = image.convert("RGBA")
        background = Image.new("RGB", image.size, ALPHA)
        background.paste(with_alpha, mask=with_alpha.getchannel("A"))
        return background
    if image.mode not in _CONVERTIBLE:
        raise Reject(f"unsupported: {image.mode} colours")
    return image
