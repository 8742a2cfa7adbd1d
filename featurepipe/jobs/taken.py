"""Whether a dataset is a job's own: two sources of one folder's name would take each other's, night after night."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featurepipe.errors import UsageError
from featurepipe.jobs.job import Job
from featurepipe.jobs.validation import told
from featurepipe.store import FeatureStore

Run = Mapping[str, Any]


def check_dataset(job: Job, file: Path, store: FeatureStore, dataset: str, location: str) -> None:
    """Refuses a dataset whose images are those of another source.

    A job that has taken the dataset before may name another source in its file: then the images have moved.

    Args:
        job: the job.
        file: its file; jobs of one name in two folders are two jobs.
        store: where the dataset is.
        dataset: its name.
        location: of the job's source.

    Raises:
        UsageError: it was last taken from elsewhere, by another job or by hand, and the job does not say that it moved.
    """
    runs = store.runs()
    last = _last_taken(runs, max(store.snapshot_ids(dataset), default=None), dataset)
    if last is None or last["source"] in {location, *job.source.moved_from}:
        return
    by = next((run for run in runs if last["run_id"] in run.get("extractions", ())), None)
    if by is not None and by["job"] == job.name and _same_file(by["job_file"], file):
        return
    who = "`featurepipe extract`" if by is None else f"job {by['job']} ({by['job_file']})"
    message = (
        f"dataset {dataset} of {store.path} was last taken from {last['source']} by {who}, and this job's source is {location}: "
        "each would put its own images in the other's place; give this job's another name at the top of the file, such as "
        f'dataset = "{_free_name(store, dataset)}"; or, if those images have moved here: '
        f"[source] moved_from = {json.dumps(last['source'], ensure_ascii=False)}"
    )
    raise UsageError(*told([("dataset", job.dataset, message)], job.file))


def _last_taken(runs: Sequence[Run], snapshot: str | None, dataset: str) -> Run | None:
    """The extraction that the dataset's snapshot is of, else the last one; None if no record tells.

    There may be no snapshot yet, or one whose run was killed before it wrote its record.
    """
    taken = [run for run in runs if run.get("dataset") == dataset and "fingerprint" in run and "source" in run]
    own = [run for run in taken if run["run_id"] == snapshot]
    return next(reversed(own or taken), None)


def _same_file(recorded: str, file: Path) -> bool:
    return os.path.realpath(recorded) == os.path.realpath(file)


def _free_name(store: FeatureStore, dataset: str) -> str:
    taken = set(store.datasets())
    return next(name for number in range(2, len(taken) + 3) if (name := f"{dataset}-{number}") not in taken)
