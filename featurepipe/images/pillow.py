"""PIL images as arrays of pixels, the same that decoding gives; imports torch only when one is read."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any, Final, TypeGuard

import numpy as np

from featurepipe.errors import Reject
from featurepipe.images.intensity import SPARSE

if TYPE_CHECKING:
    from PIL.Image import Image

_LOCKS: Final = 64


def is_pillow(item: object) -> TypeGuard[Image]:
    """Whether an object is a PIL image; imports nothing, since without PIL loaded there is none."""
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(item, module.Image)


def bytes_of(image: Image) -> int:
    """How many bytes an image's pixels take, one byte each; reads none of them."""
    return image.width * image.height * len(image.getbands())


class PillowReader:
    """Turns PIL images into uint8 arrays, from several threads.

    Two threads must not load one image at a time (it may still be an open file), so images share a few locks.
    """

    def __init__(self) -> None:
        self._locks = tuple(threading.Lock() for _ in range(_LOCKS))

    def __call__(self, image: Image) -> np.ndarray[Any, Any]:
        """Pixels as decoding gives them: upright, on white, uint8 (H, W) for greys and (H, W, 3) for everything else.

        Numbers of more than eight bits, (H, W), stay as they are unless the image's file declares their range, and are scaled
        when they are decoded. Of 16-bit colours PIL keeps the high byte, which does where they fill their range.

        Raises:
            Reject: as ``featurepipe.images.decode.decode``.
        """
        # In here, for decode imports torch.
        from featurepipe.images.decode import (
            DAMAGE,
            QUIET,
            check_pixels,
            first_line,
            flattened,
            says_truncated,
            turned,
        )
        from featurepipe.images.samples import is_deep_colour

        with self._locks[(id(image) >> 4) % _LOCKS], QUIET:
            check_pixels(*image.size)
            try:
                deep = is_deep_colour(image)
                image.load()
                if image.mode.startswith(("I", "F")):
                    return _numbers(image)
                if deep:
                    _check_filled(image)
                flat = flattened(turned(image))
                return np.array(flat if flat.mode == "L" else flat.convert("L" if flat.mode == "1" else "RGB"))
            except DAMAGE as error:
                code = "truncated" if says_truncated(error) else "corrupt"
                raise Reject(f"{code}: {first_line(error) or type(error).__name__}") from error


def _numbers(image: Image) -> np.ndarray[Any, Any]:
    """The numbers of a loaded grey image of more than eight bits, upright; uint8 if their range is declared."""
    from featurepipe.images.decode import flattened, scaled, turned
    from featurepipe.images.intensity import DECLARED
    from featurepipe.images.samples import samples_of_image

    samples = samples_of_image(image)
    if samples.declared or samples.min_is_white or samples.alpha is not None:
        flat = flattened(turned(scaled(samples, DECLARED), image))
        return np.array(flat if flat.mode == "L" else flat.convert("RGB"))
    upright = turned(image)
    return samples.values.copy() if upright is image else np.asarray(upright).astype(samples.values.dtype)


def _check_filled(image: Image) -> None:
    """Refuses 16-bit colours of which the high byte, all that is left of them, says too little."""
    colours = np.asarray(image)[..., :3]
    if int(colours.max()) - int(colours.min()) <= 256 // SPARSE:
        raise Reject(
            "intensity: 16-bit colours that fill less than a sixteenth of their range, and Pillow has kept their high byte "
            "alone; give the file's path or bytes"
        )
