"""JPEGs decoded on the CUDA device, a slice at a time; everything that nvJPEG lacks takes the ordinary route.

TorchCodec calls nvJPEG, as torchvision did, which is going to drop it (docs/decisions/gpu.md).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch

from featurepipe.errors import Reject
from featurepipe.images.damage import QUIET, JpegHeader, is_jpeg, looks_damaged
from featurepipe.images.decode import Claim, Colour, Kept, as_reject, checked_jpeg, jpeg_bytes, try_decode
from featurepipe.images.intensity import DECLARED, Intensity
from featurepipe.images.regions import Whole


def decode_batch(
    payloads: Sequence[Whole],
    *,
    colour: Colour,
    device: str,
    intensity: Intensity = DECLARED,
    keep_damaged: bool = False,
    claim: Claim | None = None,
) -> Iterator[torch.Tensor | Kept | Reject]:
    """Decodes several images, upright colour JPEGs together on the CUDA device by nvJPEG.

    Grey and CMYK JPEGs, those that EXIF turns or that look damaged, other formats, and any slice in which nvJPEG finds a
    damaged file, are decoded on the CPU and copied, so that a reject has the same reason on both routes. nvJPEG repairs
    in silence; so damage that neither it nor a first look at the bytes finds is seen on the CPU route only.

    Args:
        payloads: As for ``decode``.
        colour: ``"rgb"`` or ``"grey"``.
        device: Such as ``cuda:0``.
        intensity: As for ``decode``.
        keep_damaged: As for ``try_decode``.
        claim: As for ``decode``; asked once for the slice, and for each image that takes the ordinary route.

    Yields:
        For each payload, in its place, a uint8 tensor (C,H,W) on ``device``, or the reject.
    """
    decoded: list[torch.Tensor | None] = [None] * len(payloads)
    headers = [_header(payload) if colour == "rgb" else None for payload in payloads]
    suited = [i for i, header in enumerate(headers) if header is not None]
    if suited:
        if claim is not None:
            claim(sum(jpeg_bytes(header) for header in headers if header is not None))
        data = [payload for payload in map(payloads.__getitem__, suited) if isinstance(payload, bytes)]
        try:
            with QUIET:
                images = decode_jpegs(data, device)
        except Exception:  # noqa: BLE001  # one damaged file fails the whole call; the CPU route finds out which
            images = []
        for i, image in zip(suited, images, strict=False):
            decoded[i] = image
    on_cpu = partial(try_decode, colour=colour, intensity=intensity, keep_damaged=keep_damaged, claim=claim)
    for payload, found in zip(payloads, decoded, strict=True):
        yield _moved(on_cpu(payload), device) if found is None else found


def decode_jpegs(payloads: Sequence[bytes], device: str) -> Sequence[torch.Tensor]:
    """Colour JPEGs decoded on a CUDA device in one call of nvJPEG, by TorchCodec, or by torchvision where that is not there.

    Returns:
        For each a uint8 tensor (3, H, W) there.

    Raises:
        RuntimeError: One is damaged, or memory is too little; none is returned.
    """
    images: Sequence[torch.Tensor]
    decode = _torchcodec()
    if decode is not None:
        images = decode(list(payloads), mode="RGB", device=device)
        return images
    from torchvision.io import ImageReadMode, decode_jpeg

    data = [torch.frombuffer(bytearray(payload), dtype=torch.uint8) for payload in payloads]
    images = decode_jpeg(data, ImageReadMode.RGB, device=device)
    return images


@cache
def _torchcodec() -> Callable[..., Any] | None:
    """TorchCodec's decoder of JPEGs, which it has from 0.16 on; None without it, or where a library that it needs is missing."""
    try:
        decode: Callable[..., Any] | None = getattr(importlib.import_module("torchcodec.decoders"), "decode_jpeg", None)
    except (ImportError, OSError, RuntimeError):
        return None
    return decode


def _header(payload: Whole) -> JpegHeader | None:
    """The header of a JPEG that nvJPEG decodes as the CPU route would, or None."""
    if not isinstance(payload, bytes) or not is_jpeg(payload):
        return None
    try:
        header = checked_jpeg(payload)
    except Exception:  # noqa: BLE001  # the CPU route tells what is wrong
        return None
    return header if header.components == 3 and header.orientation == 1 and not looks_damaged(payload) else None


def _moved(found: torch.Tensor | Kept | Reject, device: str) -> torch.Tensor | Kept | Reject:
    try:
        if isinstance(found, Kept):
            return found._replace(pixels=found.pixels.to(device))
        return found if isinstance(found, Reject) else found.to(device)
    except Exception as error:  # noqa: BLE001  # such as too little memory there: one image's trouble is not that of the run
        return as_reject(error)
