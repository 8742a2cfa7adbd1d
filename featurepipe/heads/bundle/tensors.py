"""The safetensors files of a bundle: keys of the images trained on, and the backbone's own weights."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featurepipe.errors import BundleError

_NAME = "seen"
_LARGEST_HEADER = 100_000_000  # the limit of safetensors


def seen_bytes(seen: npt.NDArray[np.uint64]) -> bytes:
    """Returns the content of ``seen.safetensors``.

    Raises:
        BundleError: ``seen`` is not (n,) uint64.
    """
    import safetensors.numpy

    keys = np.asarray(seen)
    if keys.ndim != 1 or keys.dtype != np.uint64:
        raise BundleError(f"seen must be (n,) uint64, the first 8 bytes of each key; it is {keys.dtype} {keys.shape}")
    return bytes(safetensors.numpy.save({_NAME: np.ascontiguousarray(keys)}))


def seen_of(content: bytes, path: Path) -> npt.NDArray[np.uint64]:
    """Reads what ``seen_bytes`` made.

    Raises:
        BundleError: It is something else.
    """
    import safetensors
    import safetensors.numpy

    try:
        tensors = safetensors.numpy.load(content)
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise BundleError(f"{path} is not a safetensors file ({error}); train again") from error
    keys = tensors.get(_NAME)
    if keys is None or keys.ndim != 1 or keys.dtype != np.uint64:
        raise BundleError(f"{path} holds no (n,) uint64 keys named {_NAME!r}; train again")
    return np.asarray(keys, np.uint64)


def check_weights(path: Path) -> Path:
    """Checks that a weights file may go into a bundle: tensors and nothing that would have to be unpickled.

    Raises:
        BundleError: It is missing, or not a safetensors file.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length <= _LARGEST_HEADER else None
    except OSError as error:
        raise BundleError(f"cannot read the weights file {path}: {error.strerror}") from error
    except (struct.error, ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise BundleError(
            f"the weights file {path} is not a safetensors file, and a bundle holds no pickle; convert it with "
            "safetensors.torch.save_file, or leave it out and give it again when predicting"
        )
    return path
