"""JPEGs decoded on the CUDA device, a slice at a time; everything that nvJPEG lacks takes the ordinary route."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from PIL import JpegImagePlugin
from torchvision.io import ImageReadMode, decode_jpeg

from featurepipe.errors import Reject
from featurepipe.images.decode import MAX_PIXELS, QUIET, Colour, decode
from featurepipe.images.jpeg import is_jpeg, read_jpeg_header

_ORIENTATION: Final = 0x0112
Payload = bytes | np.ndarray[Any, Any]


def decode_batch(payloads: Sequence[Payload], *, colour: Colour, device: str) -> list[torch.Tensor | Reject]:
    """Decodes several images, upright colour JPEGs together on the CUDA device through torchvision's nvJPEG decoder.

    Grey and CMYK JPEGs, those that EXIF turns, other formats, and any slice in which nvJPEG finds a damaged file, are
    decoded on the CPU and copied, so that a reject has the same reason on both routes.

    Args:
        payloads: As for ``decode``.
        colour: ``"rgb"`` or ``"grey"``.
        device: Such as ``cuda:0``.

    Returns:
        For each payload, in its place, a uint8 tensor (C,H,W) on ``device``, or the reject.
    """
    decoded: list[torch.Tensor | Reject | None] = [None] * len(payloads)
    suited = [
        i for i, payload in enumerate(payloads) if colour == "rgb" and isinstance(payload, bytes) and _suits(payload)
    ]
    if suited:
        data = [torch.frombuffer(bytearray(payloads[i]), dtype=torch.uint8) for i in suited]
        try:
            with QUIET:
                images = decode_jpeg(data, ImageReadMode.RGB, device=device)
        except RuntimeError:  # one damaged file fails the whole call; the CPU route finds out which
            images = []
        for i, image in zip(suited, images, strict=False):
            decoded[i] = image
    return [
        _on_cpu(payload, colour, device) if found is None else found
        for payload, found in zip(payloads, decoded, strict=True)
    ]


def _suits(payload: bytes) -> bool:
    if not is_jpeg(payload):
        return False
    try:
        header = read_jpeg_header(payload)
    except Reject:
        return False
    return header.components == 3 and 0 < header.width * header.height <= MAX_PIXELS and not _is_turned(payload)


def _is_turned(payload: bytes) -> bool:
    if b"Exif\0\0" not in payload[: 1 << 16]:
        return False
    try:
        with QUIET, JpegImagePlugin.JpegImageFile(io.BytesIO(payload)) as image:
            return bool(image.getexif().get(_ORIENTATION, 1) != 1)
    except (OSError, SyntaxError, ValueError, KeyError, IndexError, TypeError):
        return True  # odd metadata: the CPU route knows how to take it


def _on_cpu(payload: Payload, colour: Colour, device: str) -> torch.Tensor | Reject:
    try:
        return decode(payload, colour=colour).to(device)
    except Reject as reject:
        return reject
