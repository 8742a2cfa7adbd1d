"""JPEGs decoded on the CUDA device, a slice at a time; everything that nvJPEG lacks takes the ordinary route."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torchvision.io import ImageReadMode, decode_jpeg

from featurepipe.errors import Reject
from featurepipe.images.decode import MAX_PIXELS, QUIET, Colour, decode
from featurepipe.images.jpeg import is_jpeg, looks_damaged, read_jpeg_header

Payload = bytes | np.ndarray[Any, Any]


def decode_batch(payloads: Sequence[Payload], *, colour: Colour, device: str) -> list[torch.Tensor | Reject]:
    """Decodes several images, upright colour JPEGs together on the CUDA device through torchvision's nvJPEG decoder.

    Grey and CMYK JPEGs, those that EXIF turns or that look damaged, other formats, and any slice in which nvJPEG finds a
    damaged file, are decoded on the CPU and copied, so that a reject has the same reason on both routes. nvJPEG repairs
    in silence; so damage that neither it nor a first look at the bytes finds is seen on the CPU route only.

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
    upright = header.components == 3 and header.orientation == 1
    return upright and 0 < header.width * header.height <= MAX_PIXELS and not looks_damaged(payload)


def _on_cpu(payload: Payload, colour: Colour, device: str) -> torch.Tensor | Reject:
    try:
        return decode(payload, colour=colour).to(device)
    except Reject as reject:
        return reject
