"""Commands without a package of their own, as functions: ``info``, ``nodes``, ``verify``, ``compact``, ``export``, ...

The command line calls these and prints what they return.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurepipe.errors import Message, Option, UsageError, unknown
from featurepipe.results import Result, Results
from featurepipe.store import FeatureStore

if TYPE_CHECKING:
    from featurepipe.store import CompactReport, GcReport, VerifyReport

Store = FeatureStore | str | PathLike[str]


def opened(store: Store) -> FeatureStore:
    """The store itself, or the one at a path.

    Raises:
        StoreError: There is no store.
    """
    return store if isinstance(store, FeatureStore) else FeatureStore(store, create=False)


def info(store: Store) -> Result:
    """What a store holds: spaces, columns, datasets, runs; or what a bundle is.

    Args:
        store: The store, its path, or the path of a bundle.

    Returns:
        JSON values: ``path``, ``version``, ``spaces``, ``datasets``, ``runs``, ``set_aside``; of a bundle what
        ``describe_bundle`` gives.

    Raises:
        StoreError: There is neither.
        BundleError: The bundle is damaged.
    """
    if not isinstance(store, FeatureStore) and (Path(store) / "bundle.json").is_file():
        from featurepipe.heads.bundle.bundle import read_bundle
        from featurepipe.heads.bundle.text import describe_bundle

        return Result(describe_bundle(read_bundle(store)), "bundle")
    from featurepipe.jobs.lock import runs_with_ends
    from featurepipe.store import describe

    there = opened(store)
    found = describe(there)
    return Result({**found, "runs": runs_with_ends(there, found["runs"])}, "info")


def nodes(backbone: str, *, stages: bool = False) -> Result:
    """The nodes of a network in execution order.

    Args:
        backbone: As ``list_backbones`` has it, ``timm/NAME`` or ``package.module:factory``, whose module is imported.
        stages: Only the nodes that ``depth`` compares by default, one for each stage.

    Returns:
        JSON values: ``backbone``, ``bottleneck`` (the node that feeds the classifier), ``traceable``, ``input_shape``, and
        ``nodes``, each with ``name``, ``shape``, ``width``, ``cost`` (share of the forward up to there) and ``blocks``.

    Raises:
        UsageError: There is no such network.
    """
    from featurepipe.backbones import load_backbone

    network = load_backbone(backbone, "none")
    chosen = set(network.stages()) if stages else None
    listed = [{**asdict(one), "shape": list(one.shape), "blocks": list(one.blocks)} for one in network.nodes()]
    kept = [one for one in listed if chosen is None or chosen.intersection((one["name"], *one["blocks"]))]
    return Result(
        {
            "backbone": network.name,
            "bottleneck": network.bottleneck,
            "traceable": network.traceable,
            "input_shape": list(network.preprocessing.input_shape),
            "nodes": kept,
        },
        "nodes",
    )


def verify(store: Store) -> VerifyReport:
    """Recomputes every checksum of a store; see ``featurepipe.store.verify_store``."""
    from featurepipe.store import verify_store

    return verify_store(opened(store))


def compact(store: Store, *, dry_run: bool = False) -> CompactReport:
    """Merges small parts and drops duplicate rows; see ``featurepipe.store.compact_store``."""
    from featurepipe.store import compact_store

    return compact_store(opened(store), dry_run=dry_run)


def gc(store: Store, *, keep_snapshots: int | None = None, dry_run: bool = False) -> GcReport:
    """Removes what no snapshot needs, and what killed runs left behind; see ``featurepipe.store.gc_store``."""
    from featurepipe.store import gc_store

    return gc_store(opened(store), keep_snapshots=keep_snapshots, dry_run=dry_run)


def export(
    store: Store,
    node: str = "bottleneck",
    *,
    to: str | PathLike[str],
    silent: bool = False,
    **options: Any,
) -> Result:
    """Writes one column's features to one plain file, or a folder of Parquet files; see ``featurepipe.store.export_dataset``.

    Args:
        store: The store or its path.
        node: The column, ``NODE`` or ``NODE:POOLING``.
        to: The file, .h5, .npz or .parquet, or a folder.
        silent: Say nothing on the way.
        **options: Those of ``featurepipe.store.options.ExportOptions``: ``dataset``, ``split``, ``snapshot``, ``dtype``, ...

    Returns:
        What was written where, as ``featurepipe export --json`` prints it.

    Raises:
        UsageError: An option is unknown, or what it asks for is not there.
        StoreError: Features are missing.
    """
    from featurepipe.option_groups import declared
    from featurepipe.store import export_dataset
    from featurepipe.store.options import ExportOptions

    for name in options:
        if name not in declared(ExportOptions):
            raise unknown("option", name, sorted(declared(ExportOptions)), see="featurepipe export --help")
    return Result(export_dataset(opened(store), node, Path(to), silent=silent, **options), "export")


def runs(
    store: Store,
    *,
    last: int | None = None,
    job: str | None = None,
    rejects: bool = False,
    dataset: str | None = None,
) -> Results:
    """The records of a store's runs, oldest first; a run whose process is gone without a word is ``killed``.

    Args:
        store: The store or its path.
        last: Only so many, the newest.
        job: Only runs of this job.
        rejects: Instead of runs the images of the current snapshots that could not be used, and why.
        dataset: Of ``rejects``; by default of all.

    Raises:
        UsageError: No run is of that job, or there is no such dataset.
    """
    from featurepipe.jobs.lock import runs_with_ends
    from featurepipe.summary import whole_runs

    there = opened(store)
    if rejects:
        return Results(_rejects(there, dataset), "rejects")
    if dataset is not None:
        raise UsageError(
            Message(Option("dataset"), " belongs to ", Option("rejects"), "; runs are chosen with ", Option("job"))
        )
    records = runs_with_ends(there)
    if job is not None:
        check_job(job, records, there.path)
    chosen = [record for record in whole_runs(records) if job in (None, record.get("job"))]
    return Results(chosen if last is None else chosen[len(chosen) - min(last, len(chosen)) :], "runs")


def _rejects(store: FeatureStore, dataset: str | None) -> list[dict[str, Any]]:
    from featurepipe.jobs.text import current_rejects, datasets_taken

    datasets = datasets_taken(store)
    if dataset is not None and dataset not in datasets:
        raise unknown("dataset", dataset, datasets, where=str(store.path), see=f"featurepipe info {store.path}")
    return [reject for one in datasets if dataset in (None, one) for reject in current_rejects(store, one)]


def check_job(job: str, records: Sequence[Mapping[str, Any]], store: Path) -> None:
    """Refuses the name of a job of which the records have no run.

    Raises:
        UsageError: There is none; names those there are.
    """
    jobs = {record["job"] for record in records if record.get("job")}
    if not jobs:
        raise UsageError(f"unknown job {job!r}: no job has run with {store} yet; see featurepipe run --help")
    if job not in jobs:
        raise unknown("job", job, sorted(jobs), where=str(store), see=f"featurepipe runs {store}")
