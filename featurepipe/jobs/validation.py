"""What the tables of a job file say about each other, and may not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from featurepipe.errors import unknown
from featurepipe.heads.bundle.files import MANIFEST
from featurepipe.heads.bundle.folder import existing_folder
from featurepipe.jobs.job import FeaturesTable, Job

Problem: TypeAlias = tuple[str, Any, str]
"""Key, what was given (None where the message says it), and what is wrong with it."""

RECOMMENDED = ("recommended",)
_NETWORK = ("backbone", "weights", "seed", "precision", "dtype", "decode", "intensity")
_PREDICTIONS = (".parquet", ".csv", ".jsonl")


def _waits(job: Job) -> Iterator[Problem]:
    source = job.source
    if source.first_wait > source.longest_wait:
        yield (
            "source.first_wait",
            None,
            f"{source.first_wait:g} s is longer than longest_wait, {source.longest_wait:g} s",
        )


def _same_network_twice(job: Job) -> Iterator[Problem]:
    seen: dict[tuple[Any, ...], int] = {}
    for place, table in enumerate(job.features):
        network = tuple(getattr(table, name) for name in _NETWORK)
        first = seen.setdefault(network, place)
        if first != place:
            message = f"the same network as features[{first}]; name all nodes there, and images pass through it once"
            yield f"features[{place}].backbone", table.backbone, message


def _decoding(job: Job) -> Iterator[Problem]:
    for place, table in enumerate(job.features):
        if table.decode == "gpu" and job.machine.device == "cpu":
            yield f"features[{place}].decode", "gpu", 'needs a CUDA device, and machine.device is "cpu"'


def _same_target_twice(job: Job) -> Iterator[Problem]:
    targets = [
        *((f"train[{place}].out", table.out) for place, table in enumerate(job.train)),
        *((f"predict[{place}].to", Path(table.to)) for place, table in enumerate(job.predict)),
        *((("depth.report", job.depth.report),) if job.depth and job.depth.report else ()),
        *((("report.to", job.report.to),) if job.report else ()),
        *((("metrics.prometheus", job.metrics.prometheus),) if job.metrics else ()),
    ]
    seen: dict[Path, str] = {}
    for key, target in targets:
        first = seen.setdefault(target, key)
        if first != key:
            yield key, target, f"{first} is written to the same place; one would replace the other"


def _bundle_places(job: Job) -> Iterator[Problem]:
    """A bundle among the images would be listed as some; one in the store is nobody's there, and replaces what is."""
    folders = {"store": job.store}
    if "://" not in job.source.path:
        folders["source.path"] = Path(job.source.path)
    for place, table in enumerate(job.train):
        for key, folder in folders.items():
            if table.out.is_relative_to(folder) or folder.is_relative_to(table.out):
                yield f"train[{place}].out", table.out, f"a bundle has a folder of its own, apart from {key}, {folder}"


def _suffixes(job: Job) -> Iterator[Problem]:
    if job.report and job.report.to.suffix.lower() not in (".html", ".htm"):
        yield "report.to", job.report.to, "the page is an .html file"
    if job.depth and job.depth.report and job.depth.report.suffix.lower() not in (".html", ".htm"):
        yield "depth.report", job.depth.report, "the page is an .html file"
    if job.metrics and job.metrics.prometheus.suffix != ".prom":
        yield "metrics.prometheus", job.metrics.prometheus, "Prometheus' node exporter reads files named *.prom only"


def _predictions(job: Job) -> Iterator[Problem]:
    for place, table in enumerate(job.predict):
        if Path(table.to).suffix.lower() not in _PREDICTIONS:
            yield f"predict[{place}].to", table.to, f"the suffix must be one of {', '.join(_PREDICTIONS)}"
        if table.images == "new" and "{date" not in table.to and "{run" not in table.to:
            message = 'each night would replace the last one\'s predictions; put {date} or {run} in, or images = "all"'
            yield f"predict[{place}].to", table.to, message


def _bundles(job: Job) -> Iterator[Problem]:
    trained = {table.out for table in job.train}
    wanted = [(f"predict[{place}].bundle", table.bundle) for place, table in enumerate(job.predict)]
    if job.drift and job.drift.bundle:
        wanted.append(("drift.bundle", job.drift.bundle))
    for key, bundle in wanted:
        if bundle not in trained and not (existing_folder(bundle) / MANIFEST).is_file():
            outs = ", ".join(map(str, sorted(trained))) or "nothing"
            yield key, bundle, f"no bundle is there, and no [[train]] makes it ([[train]] makes {outs})"


def _thresholds(job: Job) -> Iterator[Problem]:
    if job.drift and job.drift.fail is not None and job.drift.fail > job.drift.warn:
        yield "drift.fail", job.drift.fail, f"is above drift.warn, {job.drift.warn:g}: it would fail before it warns"


def _drift_columns(job: Job) -> Iterator[Problem]:
    if job.drift:
        for column in job.drift.columns or ():
            if not _with_columns(job, [column]):
                yield "drift.columns", column, _not_computed(job, column)


def _train_columns(job: Job) -> Iterator[Problem]:
    for place, table in enumerate(job.train):
        if table.nodes != RECOMMENDED:
            yield from _columns_of_one_network(job, f"train[{place}]", table.nodes, table.backbone)
        elif table.backbone is not None:
            yield from _known_network(job, f"train[{place}]", table.backbone)


def _depth_network(job: Job) -> Iterator[Problem]:
    if job.depth and job.depth.backbone is not None:
        yield from _known_network(job, "depth", job.depth.backbone)
    elif job.depth and len(job.features) > 1:
        yield "depth.backbone", None, f"is missing: which network? choices: {_networks(job.features)}"


def _depth_columns(job: Job) -> Iterator[Problem]:
    if not job.depth:
        return
    named = job.depth.backbone
    compared = [features for features in job.features if named is None or _means(named, features)]
    if len(compared) == 1 and len(set(map(_column, compared[0].nodes))) == 1:
        place = job.features.index(compared[0])
        message = "[depth] compares two columns or more of a network; name more nodes, or leave [depth] out"
        yield f"features[{place}].nodes", list(compared[0].nodes), message


def _known_network(job: Job, table: str, backbone: str) -> Iterator[Problem]:
    if not any(_means(backbone, features) for features in job.features):
        names = [features.backbone for features in job.features]
        yield f"{table}.backbone", backbone, str(unknown("network", backbone, names, where="[[features]]"))


def _columns_of_one_network(job: Job, table: str, nodes: Sequence[str], backbone: str | None) -> Iterator[Problem]:
    for node in nodes:
        if not _with_columns(job, [node]):
            yield f"{table}.nodes", node, _not_computed(job, node)
            return
    holders = _with_columns(job, nodes)
    if not holders:
        yield f"{table}.nodes", list(nodes), "no one network of [[features]] has all of these columns"
    elif backbone is None and len(holders) > 1:
        yield f"{table}.backbone", None, f"is missing: which network? choices: {_networks(holders)}"
    elif backbone is not None:
        yield from _known_network(job, table, backbone)
        yield from _columns_of(job, table, nodes, backbone)


def _columns_of(job: Job, table: str, nodes: Sequence[str], backbone: str) -> Iterator[Problem]:
    """Whether the network that a table names has its columns, and is one."""
    own = [features for features in job.features if _means(backbone, features)]
    holders = [features for features in _with_columns(job, nodes) if features in own]
    if own and not holders:
        choices = ", ".join(dict.fromkeys(node for features in own for node in features.nodes))
        yield f"{table}.nodes", list(nodes), f"[[features]] has not all of these of {backbone}; choices: {choices}"
    if len(holders) > 1 and backbone == holders[0].backbone:
        message = (
            "several [[features]] are of this network; name the feature space, as `featurepipe info STORE` lists them"
        )
        yield f"{table}.backbone", backbone, message


def _with_columns(job: Job, columns: Sequence[str]) -> list[FeaturesTable]:
    wanted = set(map(_column, columns))
    return [table for table in job.features if wanted <= set(map(_column, table.nodes))]


def _column(text: str) -> str:
    """A node without a pooling is averaged: ``layer3`` and ``layer3:gap`` are one column."""
    return text if ":" in text else f"{text}:gap"


def _not_computed(job: Job, column: str) -> str:
    nodes = dict.fromkeys(node for table in job.features for node in table.nodes)
    return f"{unknown('column', column, nodes, where='[[features]]')}"


def _means(backbone: str, table: FeaturesTable) -> bool:
    """Whether a network's name, or a feature space's, which begins with it and may be cut short, is this table's."""
    return backbone == table.backbone or backbone.startswith(f"{table.backbone.replace('/', '-')}-")


def _networks(tables: Sequence[FeaturesTable]) -> str:
    return ", ".join(dict.fromkeys(table.backbone for table in tables))


CHECKS: tuple[tuple[Callable[[Job], Iterator[Problem]], frozenset[str]], ...] = (
    (_waits, frozenset({"source"})),
    (_same_network_twice, frozenset({"features"})),
    (_decoding, frozenset({"features", "machine"})),
    (_train_columns, frozenset({"features", "train"})),
    (_drift_columns, frozenset({"features", "drift"})),
    (_depth_network, frozenset({"features", "depth"})),
    (_depth_columns, frozenset({"features", "depth"})),
    (_bundles, frozenset({"train", "predict", "drift"})),
    (_thresholds, frozenset({"drift"})),
    (_predictions, frozenset({"predict"})),
    (_suffixes, frozenset({"report", "depth", "metrics"})),
    (_bundle_places, frozenset({"store", "source", "train"})),
    (_same_target_twice, frozenset({"train", "predict", "depth", "report", "metrics"})),
)
"""Each check, and the tables it looks at: it is left out where one of these is wrong in itself."""
