"""Run ids, dataset names, and documents named by them: the record of each run, and what comparisons of layers found."""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from featurepipe.errors import StoreError, UsageError
from featurepipe.store.atomic import write_json
from featurepipe.store.documents import DepthDocument, RunDocument, read_document
from featurepipe.store.inside import checked_folder, is_file, is_folder, listed, made_folder

PUBLISHING = "publishing"
"""Status of a run whose record is complete and whose snapshot comes next; see `settled`."""

_TIME = "%Y%m%dT%H%M%S%fZ"
_RUN_ID = re.compile(
    r"(\d{4}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])T(?:[01]\d|2[0-3])[0-5]\d[0-5]\d\d{6}Z)-[0-9a-f]{8}", re.ASCII
)


def is_run_id(name: str) -> bool:
    """Whether a name is of the form that run ids have; what else lies about, such as a copy of a file, is of no run."""
    return _RUN_ID.fullmatch(name) is not None


def checked_run_id(run_id: str) -> str:
    """Returns ``run_id`` if it may name files.

    Raises:
        UsageError: It may not.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", run_id):
        raise UsageError(f"not a run id: {run_id!r}; take one from FeatureStore.new_run_id()")
    return run_id


def is_dataset(name: str) -> bool:
    """Whether a name may be a dataset's."""
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", name) is not None


def checked_dataset(name: str) -> str:
    """Returns ``name`` if it may be a dataset's.

    Raises:
        UsageError: It may not.
    """
    if not is_dataset(name):
        raise UsageError(
            f"not a dataset name: {name!r}; use letters, digits, '.', '_' and '-', at most 100, starting with "
            "a letter, digit or '_'"
        )
    return name


def next_run_id(existing: Iterable[str]) -> str:
    """Makes a run id: UTC time to the microsecond and a random suffix, greater than all existing ones.

    If the clock was set back, the time of the greatest existing id plus one microsecond is taken instead.

    Raises:
        StoreError: No run id sorts after one that is there: the year 9999 ends with it, or it is of no day at all.
    """
    now = datetime.now(UTC)
    ids = {match[0]: match[1] for match in map(_RUN_ID.match, existing) if match}
    latest = max(ids, default="")
    for time in sorted(set(ids.values()), reverse=True):  # as texts, which sort as they do: there may be thousands
        with contextlib.suppress(ValueError, OverflowError):  # some foreign name, of the 31st of February
            now = max(now, datetime.strptime(time, _TIME).replace(tzinfo=UTC) + timedelta(microseconds=1))
            break
    run_id = f"{now.strftime(_TIME)}-{secrets.token_hex(4)}"
    if run_id <= latest:
        raise StoreError(
            f"a file of the store is named after {latest}, and no run can come later; no run of this program has made it: "
            "move it out of the store"
        )
    return run_id


def write_run(folder: Path, record: dict[str, Any]) -> Path:
    """Writes the record of one run, named by its ``run_id``; atomic, and again if it is already there."""
    if "run_id" not in record:
        raise UsageError("a run record needs a run_id")
    path = folder / f"{checked_run_id(str(record['run_id']))}.json"
    write_json(path, record)
    return path


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """Reads all run records that are as they should be and of their file's run, oldest first; ``verify`` names the others."""
    records = []
    for path in listed(folder, "*.json"):
        with contextlib.suppress(StoreError):
            record = read_document(path, RunDocument)
            if record.get("run_id") == path.stem:
                records.append(record)
    return records


def settled(record: dict[str, Any], snapshots: Path) -> dict[str, Any]:
    """Says of a run that was killed while it published what it was: done if its snapshot is there, else interrupted."""
    if record.get("status") != PUBLISHING:
        return record
    dataset = str(record.get("dataset", ""))
    if is_folder(snapshots / dataset) and is_file(snapshots / dataset / f"{record['run_id']}.parquet"):
        return {**record, "status": "done"}
    return {**record, "status": "interrupted", "exit_code": None, "changes": None}


def depth_journal(folder: Path, dataset: str) -> Path:
    """Where a dataset's measurements are kept; the file may not be there."""
    return folder / checked_dataset(dataset) / "journal.jsonl"


def write_depth(folder: Path, document: Mapping[str, Any], run_id: str) -> Path:
    """Writes a document; it becomes the dataset's newest."""
    path = folder / checked_dataset(document["dataset"]) / f"{run_id}.json"
    made_folder(path.parent)
    write_json(path, {**document, "run_id": run_id})
    return path


def read_depths(folder: Path, dataset: str) -> list[dict[str, Any]]:
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
