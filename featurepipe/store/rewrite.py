"""Writing kept rows of some parts as one new part, and only then removing the old ones."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featurepipe.store.atomic import sync_folder
from featurepipe.store.commit import ArraySpec, PartArray, part_bytes, write_part
from featurepipe.store.parts import PartInfo, read_blocks
from featurepipe.store.space import Space

Mask = npt.NDArray[np.bool_]


def rewrite_parts(space: Space, parts: Sequence[PartInfo], keep: Sequence[Mask]) -> PartInfo | None:
    """Replaces parts by one that holds their kept rows.

    The new part is committed and verified before an old one goes, so a crash in between only leaves copies. The
    caller holds the store's lock alone, and has checked the old parts.

    Args:
        space: Their space.
        parts: Parts with the same columns, dtypes and dataset.
        keep: For each part, a boolean for each row.

    Returns:
        The new part, or None if no row is kept.
    """
    folder = space.path / "parts"
    merged = None
    if any(mask.any() for mask in keep):
        attributes, arrays = _merged(space, parts, keep)
        part_id = f"{attributes['run_id']}-{secrets.token_hex(4)}-00000"
        merged = write_part(folder, part_id, attributes=attributes, arrays=arrays)
    for part in parts:
        Path(part.path).unlink()
    sync_folder(folder)
    return merged


def rewritten_bytes(space: Space, parts: Sequence[PartInfo], keep: Sequence[Mask]) -> int:
    """Returns how large the part would be that ``rewrite_parts`` makes, 0 if none; reads and writes nothing."""
    if not any(mask.any() for mask in keep):
        return 0
    attributes, arrays = _merged(space, parts, keep)
    return part_bytes(attributes, [array.spec for array in arrays])


def _merged(space: Space, parts: Sequence[PartInfo], keep: Sequence[Mask]) -> tuple[dict[str, str], list[PartArray]]:
    rows = sum(int(mask.sum()) for mask in keep)
    run_id = max(part.run_id for part in parts)
    attributes = {"fingerprint": space.fingerprint, "run_id": run_id, "dataset": parts[0].dataset}
    return attributes, [_merged_array(name, rows, parts, keep) for name in parts[0].arrays]


def _merged_array(name: str, rows: int, parts: Sequence[PartInfo], keep: Sequence[Mask]) -> PartArray:
    infos = [part.arrays[name] for part in parts]
    dtype = np.result_type(*(np.dtype(info.dtype) for info in infos))  # ids may differ in width
    spec = ArraySpec(name, dtype.newbyteorder("<"), (rows, *infos[0].shape[1:]))
    return PartArray(spec, _kept_blocks(name, parts, keep))


def _kept_blocks(name: str, parts: Sequence[PartInfo], keep: Sequence[Mask]) -> Iterator[npt.NDArray[Any]]:
    for part, mask in zip(parts, keep, strict=True):
        start = 0
        for block in read_blocks(part, name):
            wanted = mask[start : start + len(block)]
            yield block if wanted.all() else block[wanted]
            start += len(block)
