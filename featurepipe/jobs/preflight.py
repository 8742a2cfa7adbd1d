"""Whether a job names networks, nodes, heads and snapshots that there are, before hours are spent on those that come first."""

from __future__ import annotations

from collections.abc import Iterator

from featurepipe.backbones import load_backbone
from featurepipe.errors import UsageError, WeightsNotFound, unknown
from featurepipe.heads.families import make_head
from featurepipe.jobs.job import REFERENCES, FeaturesTable, Job
from featurepipe.jobs.validation import Problem, in_keys, told
from featurepipe.monitoring.samples import snapshot_of_run
from featurepipe.store import FeatureStore


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
            make_head(head.head, pca=head.pca, class_weight=head.class_weight, **head.params)
        except UsageError as error:
            yield f"train[{place}].params", None, in_keys(str(error), "train")


def in_its_table(error: UsageError | WeightsNotFound, job: Job, place: int) -> UsageError | WeightsNotFound:
    """An error of an extraction, told with its key in ``[[features]]``; as it is if that is no fault of the network's names.

    Args:
        error: what the extraction raised.
        job: the job.
        place: of the network among all.
    """
    if isinstance(error, WeightsNotFound):
        return WeightsNotFound(*told([(f"features[{place}].weights", None, str(error))], job.file))
    problems = list(_of_network(job.features[place], place))
    return UsageError(*told(problems, job.file)) if problems else error


def _of_network(table: FeaturesTable, place: int, *, nodes: bool = True) -> Iterator[Problem]:
    key = "backbone"
    try:
        load_backbone(table.backbone, "none")
        key = "weights"
        network = load_backbone(table.backbone, table.weights, seed=table.seed)
        key = "nodes"
        if nodes:
            network.columns(table.nodes)
    except UsageError as error:
        yield f"features[{place}].{key}", None, in_keys(str(error), "extract")


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
        yield "drift.reference", None, str(error)
        return
    if not found:
        newest = sorted((run_id for ids in known.values() for run_id in ids), reverse=True)
        yield "drift.reference", None, str(unknown("snapshot", job.drift.reference, [*REFERENCES, *newest]))
