"""Merging small parts and dropping copies of rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from featurepipe.store.feature_store import FeatureStore
from featurepipe.store.index import KeyIndex
from featurepipe.store.keys import as_keys
from featurepipe.store.parts import PartInfo, damaged_arrays, is_feature, read_array
from featurepipe.store.rewrite import Mask, rewrite_parts, rewritten_bytes
from featurepipe.store.space import Space

TARGET_BYTES = 256 * 1024 * 1024


@dataclass
class CompactReport:
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
    """One part and which of its rows stay."""

    part: PartInfo
    keep: Mask

    @property
    def drops(self) -> int:
        return self.part.rows - int(self.keep.sum())


class _Batch:
    """Parts of one kind that become one part."""

    def __init__(self) -> None:
        self.items: list[_Planned] = []

    def bytes_with(self, *more: _Planned) -> int:
        """Size of the arrays of the merged part; ids are as wide as the widest of all."""
        items = [*self.items, *more]
        rows = sum(int(item.keep.sum()) for item in items)
        ids = max(np.dtype(item.part.arrays["id"].dtype).itemsize for item in items)
        part = items[0].part
        return rows * (ids + sum(info.nbytes // part.rows for name, info in part.arrays.items() if name != "id"))

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
        for space in store.spaces():
            _compact_space(space, target_bytes, report, dry_run=dry_run)
    return report


def _compact_space(space: Space, target_bytes: int, report: CompactReport, *, dry_run: bool) -> None:
    parts = space.parts()
    batches = _batches(_plan(parts), target_bytes)
    damaged = {part.name for part in parts if batches and damaged_arrays(part)}
    if damaged:  # never copy damage, and never drop a row for the sake of a damaged copy
        parts = [part for part in parts if part.name not in damaged]
        batches = _batches(_plan(parts), target_bytes)
    report.damaged += sorted(damaged | {Path(name).stem for name in space.damaged})
    report.parts_before += len(space.part_paths())
    report.parts_after += len(space.part_paths())
    for batch in batches:
        report.rows_dropped += sum(item.drops for item in batch.items)
        report.bytes_freed += sum(item.part.file_bytes for item in batch.items)
        report.parts_after -= len(batch.items) - int(any(item.keep.any() for item in batch.items))
        chosen, keep = [item.part for item in batch.items], [item.keep for item in batch.items]
        if dry_run:
            report.bytes_freed -= rewritten_bytes(space, chosen, keep)
        else:
            merged = rewrite_parts(space, chosen, keep)
            report.bytes_freed -= merged.file_bytes if merged else 0


def _plan(parts: Iterable[PartInfo]) -> list[_Planned]:
    """Says for each part which rows stay: those that the index finds when asked for all columns of the part."""
    ordered = sorted(parts, key=lambda part: -len(part.columns))  # stable: else in order of commit
    index = KeyIndex({column for part in ordered for column in part.columns}, ordered)
    plan = []
    for number, part in enumerate(index.parts):
        found_part, found_row, _ = index.search(as_keys(read_array(part, "key")), frozenset(part.columns))
        plan.append(_Planned(part, (found_part == number) & (found_row == np.arange(part.rows))))
    return plan


def _batches(plan: Sequence[_Planned], target_bytes: int) -> list[_Batch]:
    """Groups parts that become one: small ones together, and any that loses rows.

    First fit: at most one small batch of each kind is left over, so a second run finds nothing to merge.
    """
    kinds: dict[object, list[_Batch]] = {}
    for item in plan:
        if not item.drops and _Batch().bytes_with(item) >= target_bytes // 2:
            continue
        batches = kinds.setdefault(_likeness(item.part), [])
        fitting = next((batch for batch in batches if batch.bytes_with(item) <= target_bytes), None)
        if fitting is None:
            batches.append(fitting := _Batch())
        fitting.items.append(item)
    return [batch for batches in kinds.values() for batch in batches if batch.worthwhile]


def _likeness(part: PartInfo) -> object:
    features = ((name, info.dtype, info.shape[1]) for name, info in sorted(part.arrays.items()) if is_feature(name))
    return part.dataset, tuple(features)
