"""What is checked before a run computes: networks, nodes, heads and snapshots exist, and the dataset is the job's own.

Two sources whose folders have the same name would otherwise replace each other's snapshots.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from featurepipe.backbones import load_backbone
from featurepipe.errors import FeaturepipeError, UsageError, WeightsNotFound, unknown
from featurepipe.heads.families import make_head
from featurepipe.jobs.job import REFERENCES, FeaturesTable, Job
from featurepipe.jobs.validation import Problem, keys_of, told
from featurepipe.monitoring.samples import snapshot_of_run
from featurepipe.store import FeatureStore
from featurepipe.training.options import DEFAULT_HEADS, PROTOCOL_HEAD


def check_networks(job: Job, *, first: bool = False) -> None:
    """Looks at every network, makes every head, and looks for the snapshot that drift is measured from.

    In a night the nodes of the first network are looked at soon enough, by its extraction, whose failure leaves those of the
    others to be done.

    Args:
        job: the job.
        first: look at the nodes of the first network, too.

    Raises:
        UsageError: there is no such network, node, parameter of a head, or snapshot; a line each, with file and key.
        WeightsNotFound: weights are not at hand.
    """
    missing = list(_missing_snapshot(job))
    if missing or any(named_problems(job, skip=0 if first else 1)):
        raise UsageError(*told([*named_problems(job), *missing], job.file))


def named_problems(job: Job, *, skip: int = 0) -> Iterator[Problem]:
    """What is wrong with the names of networks and nodes, and with the parameters of heads.

    Args:
        job: the job.
        skip: for how many of the first networks nodes are left out, since finding them takes a while.
    """
    for place, table in enumerate(job.features):
        yield from _of_network(table, place, nodes=place >= skip)
    for place, head in enumerate(job.train):
        try:
            make_head(
                head.head or (PROTOCOL_HEAD if head.protocol else DEFAULT_HEADS[head.target_type]),
                target_type=head.target_type,
                pca=head.pca,
                class_weight=head.class_weight,
                **(head.params or {}),
            )
        except UsageError as error:
            yield f"train[{place}].params", None, _in_keys(error, "train")


def in_its_table(error: UsageError | WeightsNotFound, job: Job, place: int) -> UsageError | WeightsNotFound:
    """An error of an extraction, told with its key in ``[[features]]``; as it is if it is about none of these.

    Args:
        error: what the extraction raised.
        job: the job.
        place: of the network among all.
    """
    if error.option not in FeaturesTable.model_fields:
        return error
    kind = WeightsNotFound if isinstance(error, WeightsNotFound) else UsageError
    lines = told([_problem(error, place)], job.file)
    return kind(*lines, option=error.option, record=error.record)


def _problem(error: FeaturepipeError, place: int) -> Problem:
    return f"features[{place}].{error.option}", None, _in_keys(error, "extract")


def _in_keys(error: FeaturepipeError, step: str) -> str:
    return error.message.spelled(keys_of(step))


def _of_network(table: FeaturesTable, place: int, *, nodes: bool = True) -> Iterator[Problem]:
    try:
        network = load_backbone(table.backbone, table.weights, seed=table.seed)
        if nodes:
            network.columns(table.nodes)
    except UsageError as error:
        yield _problem(error, place)


def _missing_snapshot(job: Job) -> Iterator[Problem]:
    """A run id that no snapshot has, nor the job's run that it names, where there is a store to look into."""
    if job.drift is None or job.drift.reference in REFERENCES:
        return
    store = FeatureStore(job.store)
    if not store.exists:
        return
    datasets = [job.dataset] if job.dataset else store.datasets()
    known = {dataset: store.snapshot_ids(dataset) for dataset in datasets}
    try:
        found = any(snapshot_of_run(store, dataset, job.drift.reference) in ids for dataset, ids in known.items())
    except UsageError as error:
        yield "drift.reference", None, _in_keys(error, "drift")
        return
    if not found:
        newest = sorted((run_id for ids in known.values() for run_id in ids), reverse=True)
        yield "drift.reference", None, str(unknown("snapshot", job.drift.reference, [*REFERENCES, *newest]))


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
