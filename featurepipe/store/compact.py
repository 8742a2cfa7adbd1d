"""Merging small parts and dropping copies of rows."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featurepipe.results import ShownReport
from featurepipe.store.atomic import refuse_strangers, sync_folder
from featurepipe.store.commit import ArraySpec, PartArray, part_bytes, write_part
from featurepipe.store.feature_store import FeatureStore
from featurepipe.store.keys import KeyIndex, as_keys
from featurepipe.store.parts import PartInfo, damaged_arrays, is_feature, read_array, read_blocks
from featurepipe.store.space import Space

Mask = npt.NDArray[np.bool_]


def rewrite_parts(
    folder: Path, parts: Sequence[PartInfo], keep: Sequence[Mask], nameless: Sequence[Mask] | None = None
) -> PartInfo | None:
    """Replaces parts by one that holds their kept rows.

    The new part is committed and verified before an old one goes, so a crash in between only leaves copies. The
    caller holds the store's lock alone, and has checked the old parts.

    Args:
        folder: That of the parts.
        parts: Parts with the same space, columns, dtypes and dataset.
        keep: For each part, a boolean for each row.
        nameless: For each part, which rows lose id, size and time; by default none.

    Returns:
        The new part, or None if no row is kept.
    """
    merged = None
    if any(mask.any() for mask in keep):
        attributes, arrays = _merged(parts, keep, nameless)
        part_id = f"{attributes['run_id']}-{secrets.token_hex(4)}-00000"
        merged = write_part(folder, part_id, attributes=attributes, arrays=arrays)
    for part in parts:
        Path(part.path).unlink()
    sync_folder(folder)
    return merged


def rewritten_bytes(parts: Sequence[PartInfo], keep: Sequence[Mask]) -> int:
    """Returns how large the part would be that ``rewrite_parts`` makes, 0 if none; reads and writes nothing."""
    if not any(mask.any() for mask in keep):
        return 0
    attributes, arrays = _merged(parts, keep)
    return part_bytes(attributes, [array.spec for array in arrays])


def _merged(
    parts: Sequence[PartInfo], keep: Sequence[Mask], nameless: Sequence[Mask] | None = None
) -> tuple[dict[str, str], list[PartArray]]:
    rows = sum(int(mask.sum()) for mask in keep)
    run_id = max(part.run_id for part in parts)
    attributes = {"fingerprint": parts[0].fingerprint, "run_id": run_id, "dataset": parts[0].dataset}
    return attributes, [_merged_array(name, rows, parts, keep, nameless) for name in parts[0].arrays]


def _merged_array(
    name: str, rows: int, parts: Sequence[PartInfo], keep: Sequence[Mask], nameless: Sequence[Mask] | None
) -> PartArray:
    infos = [part.arrays[name] for part in parts]
    dtype = np.result_type(*(np.dtype(info.dtype) for info in infos))  # ids may differ in width
    spec = ArraySpec(name, dtype.newbyteorder("<"), (rows, *infos[0].shape[1:]))
    blank = nameless if name in {"id", "size", "mtime_ns"} else None
    return PartArray(spec, _kept_blocks(name, parts, keep, blank))


def _kept_blocks(
    name: str, parts: Sequence[PartInfo], keep: Sequence[Mask], blank: Sequence[Mask] | None
) -> Iterator[npt.NDArray[Any]]:
    for number, (part, mask) in enumerate(zip(parts, keep, strict=True)):
        start = 0
        for block in read_blocks(part, name):
            wanted = mask[start : start + len(block)]
            if blank is not None:
                block[blank[number][start : start + len(block)]] = np.zeros((), block.dtype)[()]
            yield block if wanted.all() else block[wanted]
            start += len(block)


TARGET_BYTES = 256 * 1024 * 1024


@dataclass
class CompactReport(ShownReport):
    """What ``compact_store`` did, or would do.

    Attributes:
        parts_before: Parts that were there.
        parts_after: Parts that are there now.
        rows_dropped: Copies of rows that went.
        bytes_freed: How much smaller the parts are; may be slightly negative.
        damaged: Parts left alone because they are damaged; ``verify`` quarantines them.
    """

    parts_before: int = 0
    parts_after: int = 0
    rows_dropped: int = 0
    bytes_freed: int = 0
    damaged: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Planned:
    """One part, which of its rows stay, and the other parts that hold what goes."""

    part: PartInfo
    keep: Mask
    leans_on: Sequence[PartInfo]

    @cached_property
    def kept(self) -> int:
        return int(np.count_nonzero(self.keep))

    @property
    def drops(self) -> int:
        return self.part.rows - self.kept


class _Batch:
    """Parts of one kind that become one part."""

    def __init__(self, item: _Planned) -> None:
        self.items = [item]
        self._rows, self._id_bytes = item.kept, _id_bytes(item.part)
        arrays = item.part.arrays.items()
        self._other_bytes = sum(info.nbytes // item.part.rows for name, info in arrays if name != "id")

    @property
    def nbytes(self) -> int:
        """Size of the arrays of the merged part; ids are as wide as the widest of all."""
        return self._rows * (self._id_bytes + self._other_bytes)

    def takes(self, item: _Planned, target_bytes: int) -> bool:
        """Adds a part unless the batch would become too large; tells whether it did."""
        rows, id_bytes = self._rows + item.kept, max(self._id_bytes, _id_bytes(item.part))
        if rows * (id_bytes + self._other_bytes) > target_bytes:
            return False
        self.items.append(item)
        self._rows, self._id_bytes = rows, id_bytes
        return True

    @property
    def worthwhile(self) -> bool:
        return len(self.items) > 1 or self.items[0].drops > 0


def compact_store(store: FeatureStore, *, target_bytes: int = TARGET_BYTES, dry_run: bool = False) -> CompactReport:
    """Merges small parts of each space into parts of about ``target_bytes``, and drops copies of rows.

    Of several rows with the same key, a row goes if an earlier one (or one in a part with more columns) has all its
    columns. Takes the store's lock alone. Running it twice changes nothing the second time.

    Args:
        store: The store.
        target_bytes: Upper bound of a merged part's size.
        dry_run: Only say what would be done.

    Raises:
        StoreLocked: Someone is writing into the store.
        DiskFull: No space for a merged part; the old ones are untouched.
    """
    report = CompactReport()
    store.check_exists()
    with store.lock(shared=False):
        refuse_strangers(store.path)  # a part that is one may hold the only copy of a row
        for space in store.spaces():
            _compact_space(space, target_bytes, report, dry_run=dry_run)
    return report


def _compact_space(space: Space, target_bytes: int, report: CompactReport, *, dry_run: bool) -> None:
    batches, damaged = _sound_batches(space.parts(), target_bytes)
    report.damaged += sorted(damaged | {Path(name).stem for name in space.damaged})
    report.parts_before += len(space.part_paths())
    report.parts_after += len(space.part_paths())
    for batch in batches:
        report.rows_dropped += sum(item.drops for item in batch.items)
        report.bytes_freed += sum(item.part.file_bytes for item in batch.items)
        report.parts_after -= len(batch.items) - int(any(item.keep.any() for item in batch.items))
        chosen, keep = [item.part for item in batch.items], [item.keep for item in batch.items]
        if dry_run:
            report.bytes_freed -= rewritten_bytes(chosen, keep)
        else:
            merged = rewrite_parts(space.path / "parts", chosen, keep)
            report.bytes_freed -= merged.file_bytes if merged else 0


def _sound_batches(parts: Sequence[PartInfo], target_bytes: int) -> tuple[list[_Batch], set[str]]:
    """Plans again without the damaged parts among those that matter, until there are none; names them.

    Damage is never copied, and no row goes for the sake of a damaged copy. Parts that stay as they are, and whose rows no
    other part gives up, are not read.
    """
    damaged: set[str] = set()
    sound: set[str] = set()
    while True:
        plan = _plan([part for part in parts if part.name not in damaged], damaged)
        batches = _batches(plan, target_bytes)
        concerned = {
            part.name: part for batch in batches for item in batch.items for part in (item.part, *item.leans_on)
        }
        fresh = {name: part for name, part in concerned.items() if name not in sound}
        found = {name for name, part in fresh.items() if damaged_arrays(part)}
        if not found:
            return batches, damaged
        damaged |= found
        sound |= fresh.keys() - found


def _plan(parts: Iterable[PartInfo], damaged: set[str]) -> list[_Planned]:
    """Says for each part which rows stay: those that the index finds when asked for all columns of the part.

    Parts whose keys are damaged are added to ``damaged`` and have no plan.
    """
    ordered = sorted(parts, key=lambda part: -len(part.columns))  # stable: else in order of commit
    columns = {column for part in ordered for column in part.columns}
    index = KeyIndex(columns, ordered, lambda part, _: damaged.add(part.name))
    plan = []
    for number, part in enumerate(index.parts):
        if part.name not in damaged:
            found_part, found_row, _ = index.search(as_keys(read_array(part, "key")), frozenset(part.columns))
            keep = (found_part == number) & (found_row == np.arange(part.rows))
            plan.append(_Planned(part, keep, [index.parts[other] for other in np.unique(found_part[~keep])]))
    return plan


def _batches(plan: Sequence[_Planned], target_bytes: int) -> list[_Batch]:
    """Groups parts that become one: small ones together, and any that loses rows.

    First fit: at most one small batch of each kind is left over, so a second run finds nothing to merge.
    """
    kinds: dict[object, list[_Batch]] = {}
    for item in plan:
        if not item.drops and _Batch(item).nbytes >= target_bytes // 2:
            continue
        batches = kinds.setdefault(_likeness(item.part), [])
        if not any(batch.takes(item, target_bytes) for batch in batches):
            batches.append(_Batch(item))
    return [batch for batches in kinds.values() for batch in batches if batch.worthwhile]


def _id_bytes(part: PartInfo) -> int:
    return np.dtype(part.arrays["id"].dtype).itemsize


def _likeness(part: PartInfo) -> object:
    features = ((name, info.dtype, info.shape[1]) for name, info in sorted(part.arrays.items()) if is_feature(name))
    return part.dataset, tuple(features)
