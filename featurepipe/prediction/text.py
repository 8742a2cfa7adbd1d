"""What ``featurepipe predict`` prints, as plain text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from featurepipe.display import neutralised_text
from featurepipe.extraction.text import damaged_lines, remark_lines
from featurepipe.heads.bundle.files import MULTILABEL
from featurepipe.heads.bundle.text import interval_text, labels_calibration_text, threshold_text
from featurepipe.prediction.files import range_text
from featurepipe.progress import duration

_LABELS_SHOWN = 10
_REJECTS_SHOWN = 5
_WORKERS_SHOWN = 8


def text(record: Mapping[str, Any]) -> str:
    """Sums up the record that `featurepipe.prediction.predict.predict` returns."""
    counts, seconds = record["counts"], record["seconds"]
    lines = [f"{counts['listed']:,} images listed, {counts['predicted']:,} predicted, {counts['rejected']:,} rejected"]
    given = sorted(((count, name) for name, count in record["labels"].items() if count), reverse=True)
    if given:
        shown = ", ".join(f"{name} ({count:,})" for count, name in given[:_LABELS_SHOWN])
        lines.append(shown + (", ..." if len(given) > _LABELS_SHOWN else ""))
    if record.get("threshold"):
        lines.append(f"threshold: {threshold_text(record['threshold'])}")
    if (target := record.get("target") or {}).get("type") == MULTILABEL:
        lines.append(f"labels: {labels_calibration_text(target['calibration'])}")
    if record.get("numbers"):
        interval = record["target"]["interval"]
        of = f"; {interval_text(interval)}" if interval else ""
        lines.append(f"{record['target']['column']}: {range_text(record['numbers'])}{of}")
    if record["rejects"]:
        lines.append("rejected: " + ", ".join(f"{count} {code}" for code, count in record["reject_reasons"].items()))
        lines += [f"  {reject['id']}: {reject['reason']}" for reject in record["rejects"][:_REJECTS_SHOWN]]
        if counts["rejected"] > _REJECTS_SHOWN:
            lines.append("  ..." + (f" all in {record['file']}" if record["file"] else ""))
    lines += damaged_lines(record) + remark_lines(record)
    stages = ", ".join(f"{name} {seconds[name]:.1f} s" for name in ("read", "decode", "forward", "score"))
    lines.append(f"{duration(seconds['wall'])} at {record['images_per_second']:,.1f} img/s ({stages})")
    if record.get("cluster"):
        workers = record["cluster"]["workers"]
        shown = ", ".join(f"{worker['worker']} {worker['images']:,} images" for worker in workers[:_WORKERS_SHOWN])
        lines.append(
            f"{len(workers)} worker{'s' * (len(workers) != 1)}: {shown}{', ...' * (len(workers) > _WORKERS_SHOWN)}"
        )
    lines.append(record["verdict"])
    if record["file"]:
        lines.append(f"file {record['file']}")
        lines += [said] if (said := neutralised_text(record.get("neutralised", 0), record["file"])) else []
    return "\n".join(lines)
