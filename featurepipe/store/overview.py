"""What a view holds, in numbers and in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from featurepipe.store.views import FeatureSet

_LISTED = 12


def counts_of(features: FeatureSet) -> dict[str, Any]:
    """Counts images, labels, duplicates, classes and splits; see ``FeatureSet.counts``."""
    return {
        "images": len(features),
        "labelled": len(features) - features.unlabelled,
        "unlabelled": features.unlabelled,
        "rejected": features.rejected,
        "duplicates": features.duplicates,
        "unmatched": features.unmatched,
        "classes": _counts(features.table["label"]),
        "splits": _counts(features.table["split"]),
    }


def describe(features: FeatureSet) -> str:
    """Sums up a view in a few lines of text."""
    counts = features.counts()
    rest = [f"{counts[name]:,} {name}" for name in ("unlabelled", "rejected", "duplicates")]
    lines = [
        f"dataset  {features.origin.dataset}, of {features.origin.store}",
        f"space    {features.origin.space}",
        f"columns  {' + '.join(features.columns)}: {features.shape[1]:,} values, {features.dtype}",
        f"images   {counts['images']:,} ({', '.join(rest)})",
        f"classes  {_listed(counts['classes'])}",
        f"splits   {_listed(counts['splits'])}",
    ]
    if counts["unmatched"]:
        lines.append(f"labels   {counts['unmatched']:,} ids of the labels match no image here")
    return "\n".join(lines)


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    counted = pc.value_counts(column.drop_null())
    return dict(sorted((entry["values"], entry["counts"]) for entry in counted.to_pylist()))


def _listed(counts: dict[str, int]) -> str:
    shown = [f"{name} {count:,}" for name, count in list(counts.items())[:_LISTED]]
    more = f", and {len(counts) - _LISTED:,} more" if len(counts) > _LISTED else ""
    return f"{len(counts)}: {', '.join(shown)}{more}" if counts else "none"
