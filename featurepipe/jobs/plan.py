"""The extractions of a job's run, one for each feature space; what is checked before; and what a run would do (``--dry-run``).

Two sources whose folders have the same name would otherwise replace each other's snapshots.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from featurepipe.backbones import load_backbone
from featurepipe.backbones.tail import Tail
from featurepipe.errors import FeaturepipeError, SourceError, UsageError, WeightsNotFound, unknown
from featurepipe.execution.dask import ExecutorWhenNeeded, cluster_name, in_this_process
from featurepipe.execution.launchers import ClusterTable
from featurepipe.extraction.extract import existing_store, extract
from featurepipe.extraction.prepare import dataset_name
from featurepipe.heads.families import make_head
from featurepipe.images.listing import ListingSummary
from featurepipe.interrupt import StopRequest
from featurepipe.jobs.job import (
    REFERENCES,
    BaseTable,
    DepthTable,
    DriftTable,
    ExportTable,
    FeaturesTable,
    FinetuneTable,
    Job,
    KeepTable,
    PredictTable,
    QuestionTable,
    ReportTable,
    RoutesTable,
    TrainTable,
)
from featurepipe.jobs.record import DONE, FAILED, INTERRUPTED, OUT_OF_TIME, RunRecord
from featurepipe.jobs.sources import JobSource, LabelledSource, RetryPolicy, check_labels
from featurepipe.jobs.step import is_of_new, place_of, steps_of
from featurepipe.jobs.steps.housekeeping import outlook_of_forget
from featurepipe.jobs.validation import Problem, keys_of, told
from featurepipe.monitoring.samples import snapshot_of_run
from featurepipe.option_groups import declared
from featurepipe.progress import announcer
from featurepipe.store import FeatureStore
from featurepipe.store.options import GROUP, NO_GROUP, RoleOptions
from featurepipe.training.options import DEFAULT_HEADS, PROTOCOL_HEAD


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
        UsageError: a network or node is unknown, the dataset is another source's, or the list of images to forget is not there.
    """
    check_networks(job, first=True)
    if job.source.labels is not None:
        check_labels(job.source.labels)
    images = JobSource(job, StopRequest())
    source = images()
    listing = ListingSummary.of(source.scan())
    say = announcer(silent=silent)
    for line in listing.lines(source.name):
        say(line)
    dataset = job.dataset or dataset_name(source.name)
    store = existing_store(job.store)
    if store is not None:
        check_dataset(job, file, store, dataset, source.location)
    forgetting: tuple[bool | None, str] = (
        (None, "") if job.forget is None else outlook_of_forget(job.forget, store, dataset)
    )
    estimates = []
    labelled = LabelledSource(images, asked=job.source.labels is not None, roles=_roles_asked(job))
    if job.source.labels is not None:
        labelled.read(job.source.labels)
    for features in job.features:
        try:
            found = extract(
                labelled(), job.store, dataset=dataset, retry_rejects=retry_rejects, dry_run=True, silent=silent,
                **arguments(job, features),
            )  # fmt: skip
        except FeaturepipeError as error:
            error.args = error.spelled(keys_of("extract"))
            raise
        found["warnings"] = [warning.spelled(keys_of("extract")) for warning in found["warnings"]]
        estimates.append({"backbone": features.backbone, "nodes": list(features.nodes), **found})
    seconds = [found["seconds"] for found in estimates]
    comes = any(found["new"] for found in estimates)
    steps = [
        (step, *(forgetting if step.step == "forget" else outlook(step.table, job, comes))) for step in steps_of(job)
    ]
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


def outlook(table: BaseTable, job: Job, comes: bool) -> tuple[bool | None, str]:
    """Whether a step of a job would run, None where that depends on the night; and what it would do, if that were now.

    Args:
        table: The step's table.
        job: Its job.
        comes: Whether the source has new images.
    """
    match table:
        case TrainTable() | FinetuneTable():
            return _of_training(table)
        case PredictTable() | ExportTable() | QuestionTable():
            return _of_file(table, job, comes)
        case DriftTable():
            reference = "those of nights before" if table.reference == "previous" else f"snapshot {table.reference}"
            return None, f"compares this run's new images with {reference}"
        case DepthTable() | RoutesTable():
            return (True, "always") if table.when == "always" else (None, f"if {table.when} since the last comparison")
        case _:
            return True, _upkeep(table, job)


def _of_file(table: PredictTable | ExportTable | QuestionTable, job: Job, comes: bool) -> tuple[bool | None, str]:
    """The same of a step whose answer is a file."""
    into = f"into {job.named(place_of(table, datetime.now(UTC), run='RUN-ID', job=job.name))}"
    if isinstance(table, QuestionTable):
        return None if is_of_new(table) else True, f"asks of this run's features, {into}"
    does = "predicts" if isinstance(table, PredictTable) else "hands on"
    return comes or table.images != "new" or None, f"{does} {table.images} images, {into}"


def _upkeep(table: BaseTable, job: Job) -> str:
    if isinstance(table, KeepTable):
        return f"keeps {_all(table.snapshots)} snapshots and {_all(table.runs)} run records"
    if isinstance(table, ReportTable):
        return f"the last {table.last} nights, into {job.named(table.to)}"
    return "always"


def _roles_asked(job: Job) -> set[str]:
    """The names of columns that heads and comparisons take, such as that of the groups."""
    compared = (table for table in (job.depth, job.routes) if table is not None)
    tables = [*job.train, *job.finetune, *job.questions.values(), *compared]
    found = {GROUP}
    for table in tables:
        for name in declared(RoleOptions):
            value = getattr(table, name, None) or ()
            found.update([value] if isinstance(value, str) else value)
    return found - {NO_GROUP}


def _of_training(table: TrainTable | FinetuneTable) -> tuple[bool | None, str]:
    if table.when == "always":
        return True, "always"
    if not table.out.exists():
        return True, "there is no bundle yet"
    return None, "if images, labels or settings are not those that the bundle was trained with"


def _all(count: int | None) -> Any:
    return "all" if count is None else count


_TOLD = (
    "run_id",
    "space",
    "columns",
    "counts",
    "copies",
    "changes",
    "computed_by_column",
    "images_per_second",
    "verdict",
    "forgotten",
)
"""What a step's result says of an extraction; the extraction's own record says all."""
_THEIRS_ALONE = ("UsageError", "WeightsNotFound", "TooManyRejects", "NonFiniteFeatures")
"""Errors of one feature space that say nothing about the others."""


@dataclass
class Extractions:
    """The first part of a night.

    Attributes:
        job: the job.
        record: the run's record.
        stop: what ends it.
        say: a line for people.
        silent: whether extractions say nothing themselves.
        executor: who computes.
        before: the dataset's snapshot before this run, if there is one.
        warned: what extractions have warned of: the next feature space, or try, says the same.
        why_not: why nothing can be extracted, if so.
    """

    job: Job
    record: RunRecord
    stop: StopRequest
    say: Callable[[str], None]
    silent: bool
    executor: ExecutorWhenNeeded = in_this_process
    before: str | None = None
    warned: set[str] = field(default_factory=set)
    why_not: str = ""

    def __post_init__(self) -> None:
        table = self.job.source
        self._source = JobSource(self.job, self.stop)
        self._patience = RetryPolicy(
            table.retries, table.first_wait, table.longest_wait, self.stop, self.record.waiting
        )

    def run(self) -> None:
        """Computes what is new, space by space, until one ends in a way that the others would, too."""
        table = self.job.source
        why = self.why_not or ("the run was stopped" if self.record.has(INTERRUPTED) else "")
        images = LabelledSource(self._source, asked=table.labels is not None, roles=_roles_asked(self.job))
        if table.labels and not why:
            self._label(images, table.labels)
        for place, features in enumerate(self.job.features):
            if why:
                self.record.not_reached("extract", features.backbone, why)
            else:
                why = self._extract(place, images)
        self.record.listing = self._source.seconds

    def list_source(self) -> None:
        """Lists the source, which is the first step of a night."""

        def work() -> dict[str, Any]:
            found = self._patience.insist(self._source)
            dataset = self.job.dataset or dataset_name(found.name)
            check_dataset(self.job, self.record.file, self.record.store, dataset, found.location)
            self.record.dataset = dataset
            self.before = max(self.record.store.snapshot_ids(self.record.dataset), default=None)
            listing = ListingSummary.of(found.scan())
            for line in listing.lines(found.name):
                self.say(line)
            return {"source": found.location, "listed": listing.images, "listing": listing.as_dict()}

        entry = self.record.attempt("list", "", work)
        self.why_not = "" if entry["status"] == DONE else "the source was not listed"

    def _label(self, images: LabelledSource, file: Path) -> None:
        """Reads the labels file; one that cannot be had or used fails the night, but keeps no image from being computed."""
        if self.before is not None:
            images.earlier = self.record.store.snapshot(self.record.dataset, self.before, columns=("id", "label"))
        self.record.attempt("labels", "", lambda: self._patience.insist(lambda: images.read(file)))

    def _extract(self, place: int, images: LabelledSource) -> str:
        """Extracts one feature space; returns why no other one can be, if so."""
        features = self.job.features[place]
        found: dict[str, Any] = {}

        def work() -> dict[str, Any]:
            try:
                found.update(self._patience.insist(lambda: self._try(features, images)))
            except (UsageError, WeightsNotFound) as error:
                raise in_its_table(error, self.job, place) from error
            return {**{name: found[name] for name in _TOLD if name in found}, "warnings": self._warnings(found)}

        entry = self.record.attempt("extract", features.backbone, work)
        if found.get("status") == OUT_OF_TIME:
            entry["status"] = OUT_OF_TIME
            return "no time was left"
        if entry["status"] == DONE or (entry["status"] == FAILED and entry["error_type"] in _THEIRS_ALONE):
            return ""
        return f"extract {features.backbone} did not end well"

    def _try(self, features: FeaturesTable, images: LabelledSource) -> dict[str, Any]:
        try:
            run = extract(
                images(),
                self.record.store,
                dataset=self.record.dataset,
                retry_rejects=self.record.retry_rejects,
                stop=self.stop,
                silent=self.silent,
                cluster=self.executor(),
                **arguments(self.job, features),
            )
        except Exception as error:  # whatever it is, what was computed before counts
            if isinstance(error, SourceError):
                self._source.forget()
            record = getattr(error, "record", None)
            if record is not None:
                self.record.extractions.append(record)
                for text in self._warnings(record):
                    self.record.warn(text)
            raise
        self.record.extractions.append(run)
        return run

    def _warnings(self, run: Run) -> list[str]:
        """What an extraction warns of and none of this night has, options spelled as a job file does."""
        told = [text.spelled(keys_of("extract")) for text in run["warnings"]]
        fresh = [text for text in told if text not in self.warned]
        self.warned.update(fresh)
        return fresh


def arguments(job: Job, features: FeaturesTable) -> dict[str, Any]:
    """What a job file says of an extraction, as arguments of `featurepipe.extract`."""
    limits = job.limits.model_dump(exclude={"time_budget"})  # which is the whole run's, see `StopRequest`
    return {**features.model_dump(), **job.machine.model_dump(), **limits}


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
    for place, tuned in enumerate(job.finetune):
        try:
            _check_cut(job, tuned)
        except UsageError as error:
            yield f"finetune[{place}].from_node", None, _in_keys(error, "finetune")


def _check_cut(job: Job, table: FinetuneTable) -> None:
    """Refuses a node at which the network of the activations cannot be cut.

    Raises:
        UsageError: It cannot.
    """
    for cut in table.cuts:
        columns = {f"{cut}:{pooling}" for pooling in ("map", "flatten")}
        for features in job.features:
            if not columns.isdisjoint(features.nodes):
                Tail(load_backbone(features.backbone, features.weights, seed=features.seed), cut)


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
