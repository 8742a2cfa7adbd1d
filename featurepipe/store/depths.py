"""What comparisons of layers found: one document each, the last one is current, and a journal of measurements beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featurepipe.store.atomic import read_json, write_json
from featurepipe.store.snapshots import checked_dataset


def journal(folder: Path, dataset: str) -> Path:
    """Where a dataset's measurements are kept; the file may not be there."""
    return folder / checked_dataset(dataset) / "journal.jsonl"


def write(folder: Path, document: Mapping[str, Any], run_id: str) -> Path:
    """Writes a document; it becomes the dataset's newest."""
    path = folder / checked_dataset(document["dataset"]) / f"{run_id}.json"
    path.parent.mkdir(exist_ok=True)
    write_json(path, {**document, "run_id": run_id})
    return path


def read(folder: Path, dataset: str) -> list[dict[str, Any]]:
    """Reads a dataset's documents, oldest first."""
    return [read_json(path) for path in sorted((folder / checked_dataset(dataset)).glob("[!.]*.json"))]
