"""Reading the bytes of one column of one part."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featurepipe.errors import StoreMoved
from featurepipe.store.inside import open_file

BLOCK_BYTES = 1 << 20  # read at once when the rows are converted or picked out on the way


@dataclass(frozen=True, slots=True)
class PartColumn:
    """One column of one part, as plain values."""

    path: str
    offset: int
    dtype: str
    rows: int
    nbytes: int
    crc32: int


def open_part(part: PartColumn) -> int:
    """Opens a part for reading; returns the descriptor.

    Raises:
        StoreMoved: It is gone.
    """
    try:
        return open_file(Path(part.path))
    except OSError as error:
        raise gone(part) from error


def read_into(descriptor: int, block: npt.NDArray[Any], offset: int, part: PartColumn) -> None:
    """Fills a contiguous array with the bytes at ``offset``.

    Raises:
        StoreMoved: The part is shorter than it was.
    """
    content = memoryview(block.reshape(-1).view(np.uint8))
    while content:
        count = os.preadv(descriptor, [content], offset)
        if count == 0:
            raise gone(part)
        content, offset = content[count:], offset + count


def gone(part: PartColumn) -> StoreMoved:
    """Builds the error for a part that is not there any more."""
    return StoreMoved(
        f"part {part.path} is gone or shorter than it was; if the store was compacted meanwhile, open the features "
        "again with store.features(...), else run: featurepipe verify STORE"
    )
