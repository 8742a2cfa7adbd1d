"""What a run of a job would do: ``featurepipe run JOB.toml --dry-run``."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from featurepipe.errors import FeaturepipeError
from featurepipe.execution.dask import cluster_name
from featurepipe.execution.launchers import ClusterTable
from featurepipe.extraction.extract import existing_store, extract
from featurepipe.extraction.prepare import dataset_name
from featurepipe.images.findings import ListingSummary
from featurepipe.interrupt import StopRequest
from featurepipe.jobs.extractions import arguments
from featurepipe.jobs.job import (
    BaseTable,
    DepthTable,
    DriftTable,
    Job,
    KeepTable,
    PredictTable,
    ReportTable,
    TrainTable,
)
from featurepipe.jobs.preflight import check_dataset, check_networks
from featurepipe.jobs.sources import JobSource, check_labels
from featurepipe.jobs.step import steps_of
from featurepipe.jobs.validation import keys_of
from featurepipe.progress import announcer


def plan_job(job: Job, file: Path, cluster: Any, *, retry_rejects: bool, silent: bool) -> dict[str, Any]:
    """Estimates the extractions, and says of each step whether it would run; changes nothing and retries nothing.

    Args:
        job: the job.
        file: its file.
        cluster: where it would work; None for here.
        retry_rejects: whether images would be tried again whose bytes were rejected before.
        silent: say nothing.

    Returns:
        Plain JSON values: ``listed``; ``features``, what `featurepipe.extract` estimates for each space; ``seconds`` and
        ``bytes`` in all; ``steps``, each with ``runs`` (true, or null where that depends on the night) and ``why``.

    Raises:
        SourceError: the source cannot be listed, or its labels are not there.
        UsageError: a network or node is unknown, or the dataset is another source's.
    """
    check_networks(job, first=True)
    if job.source.labels is not None:
        check_labels(job.source.labels)
    source = JobSource(job, StopRequest())()
    listing = ListingSummary.of(source.scan())
    say = announcer(silent=silent)
    for line in listing.lines(source.name):
        say(line)
    dataset = job.dataset or dataset_name(source.name)
    store = existing_store(job.store)
    if store is not None:
        check_dataset(job, file, store, dataset, source.location)
    estimates = []
    for features in job.features:
        try:
            found = extract(
                source, job.store, dataset=dataset, retry_rejects=retry_rejects, dry_run=True, silent=silent,
                **arguments(job, features),
            )  # fmt: skip
        except FeaturepipeError as error:
            error.args = error.spelled(keys_of("extract"))
            raise
        estimates.append({"backbone": features.backbone, "nodes": list(features.nodes), **found})
    seconds = [found["seconds"] for found in estimates]
    steps = [(step, *outlook(step.table, job.name)) for step in steps_of(job)]
    return {
        "dry_run": True,
        "job": job.name,
        "job_file": str(file),
        "store": str(job.store),
        "dataset": dataset,
        "source": source.location,
        "cluster": str(cluster) if isinstance(cluster, ClusterTable) else cluster_name(cluster),
        "listed": listing.images,
        "listing": listing.as_dict(),
        "limits": job.limits.model_dump(mode="json"),
        "features": estimates,
        "seconds": None if None in seconds else sum(seconds),
        "bytes": sum(sum(found["bytes_per_column"].values()) for found in estimates),
        "steps": [{"step": step.step, "name": step.name, "runs": runs, "why": why} for step, runs, why in steps],
    }


def outlook(table: BaseTable, job: str) -> tuple[bool | None, str]:
    """Whether a step of a job would run, None where that depends on the night; and what it would do, if that were now."""
    match table:
        case TrainTable():
            return _of_training(table)
        case PredictTable():
            file = table.file(date=datetime.now(UTC).date().isoformat(), run="RUN-ID", job=job)
            return None if table.images == "new" else True, f"predicts {table.images} images, into {file.name}"
        case DriftTable():
            reference = "those of nights before" if table.reference == "previous" else f"snapshot {table.reference}"
            return None, f"compares this run's new images with {reference}"
        case DepthTable():
            return (True, "always") if table.when == "always" else (None, f"if {table.when} since the last comparison")
        case _:
            return True, _upkeep(table)


def _upkeep(table: BaseTable) -> str:
    if isinstance(table, KeepTable):
        return f"keeps {_all(table.snapshots)} snapshots and {_all(table.runs)} run records"
    if isinstance(table, ReportTable):
        return f"the last {table.last} nights, into {table.to.name}"
    return "always"


def _of_training(table: TrainTable) -> tuple[bool | None, str]:
    if table.when == "always":
        return True, "always"
    if not table.out.exists():
        return True, "there is no bundle yet"
    return None, "if images, labels or settings are not those that the bundle was trained with"


def _all(count: int | None) -> Any:
    return "all" if count is None else count
