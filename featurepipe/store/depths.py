"""What comparisons of layers found: one document each, the last one is current, and a journal of measurements beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featurepipe.errors import StoreError
from featurepipe.store.atomic import write_json
from featurepipe.store.documents import DepthDocument, read_document
from featurepipe.store.inside import checked_folder, listed, made_folder
from featurepipe.store.runs import checked_dataset


def journal(folder: Path, dataset: str) -> Path:
    """Where a dataset's measurements are kept; the file may not be there."""
    return folder / checked_dataset(dataset) / "journal.jsonl"


def write(folder: Path, document: Mapping[str, Any], run_id: str) -> Path:
    """Writes a document; it becomes the dataset's newest."""
    path = folder / checked_dataset(document["dataset"]) / f"{run_id}.json"
    made_folder(path.parent)
    write_json(path, {**document, "run_id": run_id})
    return path


def read(folder: Path, dataset: str) -> list[dict[str, Any]]:
    """Reads a dataset's documents that are as they should be, oldest first; ``verify`` names the others.

    Raises:
        StoreError: The newest is not: an older one in its place would answer as if nothing had been compared since.
    """
    of_dataset = checked_folder(checked_folder(folder) / checked_dataset(dataset))
    paths, documents = listed(of_dataset, "*.json"), []
    for path in paths:
        try:
            documents.append(read_document(path, DepthDocument))
        except StoreError:
            if path == paths[-1]:
                raise
    return documents
