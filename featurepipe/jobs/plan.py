"""What a run of a job would do: ``featurepipe run JOB.toml --dry-run``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from featurepipe.cluster.table import ClusterTable
from featurepipe.errors import FeaturepipeError
from featurepipe.extraction.extract import existing_store, extract
from featurepipe.extraction.prepare import dataset_name
from featurepipe.images.findings import ListingSummary
from featurepipe.interrupt import StopRequest
from featurepipe.jobs.extractions import arguments
from featurepipe.jobs.job import Job
from featurepipe.jobs.preflight import check_dataset, check_networks
from featurepipe.jobs.sources import TonightsSource, check_labels
from featurepipe.jobs.step import outlook, steps_of
from featurepipe.jobs.validation import in_keys
from featurepipe.progress import announcer
from featurepipe.training.on_cluster import cluster_name


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
    source = TonightsSource(job, StopRequest())()
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
            error.args = tuple(in_keys(line, "extract") for line in error.lines)
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
