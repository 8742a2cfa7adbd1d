"""Images that look like others: the nearest by any column, of images of the store or of new ones."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from featurepipe.backbones import load_backbone
from featurepipe.backbones.engine import NUMERICS
from featurepipe.backbones.from_user import check_trusted
from featurepipe.curation.options import COSINE, SimilarOptions
from featurepipe.display import counted, first_names, neutralised_text, table
from featurepipe.errors import Message, Option, Reject, UsageError, unknown
from featurepipe.extraction.extract import opened
from featurepipe.features.options import AUTO, Options, Places, places
from featurepipe.features.session import Session
from featurepipe.features.settings import Settings, settle_machine
from featurepipe.features.stream import FeatureStream
from featurepipe.images import key_of
from featurepipe.monitoring.duplicates import checked_file, write_table
from featurepipe.monitoring.near import Nearest, nearest
from featurepipe.option_groups import as_asked
from featurepipe.progress import announcer, show
from featurepipe.reporting.from_store import image_page
from featurepipe.results import shown_as
from featurepipe.store import FeatureSet, FeatureStore, Space, differences
from featurepipe.store.choice import require_snapshot
from featurepipe.store.locks import starts_again
from featurepipe.store.rows import ColumnRows, WideRows

PAGE = ".html"
ON_PAGE = 60
"""Queries that a page shows at most."""
_QUERIES_AT_ONCE = 1024

Floats = npt.NDArray[np.float32]
Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Queries:
    """What look-alikes are looked for of.

    Attributes:
        ids: (q,) of the images.
        vectors: (q, D) their features.
        own: (q,) position of each among the images that are searched, where it is one of them; else -1.
        payloads: What was read of new images, by id, for thumbnails.
        rejects: Images that cannot be used, and why.
        computed: How many features the network had to compute: the others are in the store.
    """

    ids: tuple[str, ...]
    vectors: Floats
    own: Positions
    payloads: Mapping[str, Any]
    rejects: Mapping[str, str]
    computed: int = 0


@shown_as("similar")
@starts_again
def similar(
    store: FeatureStore | str | PathLike[str],
    queries: Any = None,
    *,
    query_ids: Sequence[str] | None = None,
    query_dataset: str | None = None,
    top: int = 10,
    weights: str | PathLike[str] | None = None,
    dataset: str | None = None,
    distance: str = COSINE,
    node: str = "bottleneck",
    backbone: str | None = None,
    snapshot: str | None = None,
    to: str | PathLike[str] | None = None,
    raw_ids: bool = False,
    source: Any = None,
    only_under: Places = None,
    path_column: str | None = None,
    box: str | None = None,
    box_unit: str = "pixels",
    box_margin: float = 0.0,
    images: str | PathLike[str] | None = None,
    frames: str = "first",
    device: str = AUTO,
    batch_size: int | str = AUTO,
    workers: int | None = None,
    engine: str = "auto",
    trust_code: bool | Collection[str] = False,
    silent: bool = False,
) -> dict[str, Any]:
    """Finds the images of a dataset whose features are the nearest to those of some images.

    Every row is compared, block by block (`featurepipe.monitoring.near.nearest`). The features of an image whose bytes the
    store knows are taken from there; others are computed by the network of the feature space, which is loaded only then. An
    image of the dataset is not among its own look-alikes, its copies are.

    Args:
        store: The feature store or its path.
        queries: New images: whatever `featurepipe.extract` takes, or a list of paths.
        query_ids: Ids of images of the store.
        query_dataset: The dataset of these ids; by default the one that is searched.
        top: How many images for each query.
        weights: The network's weights file, where it is your own, for images that the store does not have.
        dataset: The dataset that is searched; by default the store's only one.
        distance: ``cosine`` or ``euclidean``.
        node: The column whose distances count.
        backbone: Of which network, space or fingerprint.
        snapshot: Run id of the snapshot that is searched; by default the current one.
        to: A ``.csv``, ``.jsonl`` or ``.parquet`` file (``query``, ``rank``, ``id``, ``label``, ``split``, ``distance``), or an
            ``.html`` page with thumbnails.
        raw_ids: Whether texts of a CSV file that a spreadsheet would take for formulas stay as they are.
        source: The dataset's images, for thumbnails; by default where they were extracted from.
        only_under: As in `featurepipe.extract`, also of thumbnails.
        path_column: As in `featurepipe.extract`.
        box: As in `featurepipe.extract`.
        box_unit: As in `featurepipe.extract`.
        box_margin: As in `featurepipe.extract`.
        images: As in `featurepipe.extract`.
        frames: As in `featurepipe.extract`.
        device: Where the network computes.
        batch_size: Images in one forward.
        workers: Threads that read and decode.
        engine: What runs fp32 networks on a CPU, as in `featurepipe.extract`.
        trust_code: Whether a network ``package.module:factory`` that the store names may be imported.
        silent: Say nothing on standard error.

    Returns:
        JSON values. ``dataset``, ``snapshot``, ``images`` (searched), ``column``, ``space``, ``distance``, ``search``;
        ``queries``, each with ``id`` and ``found``: a list of ``id``, ``label``, ``split`` and ``distance``, nearest first;
        ``computed``, ``rejects`` (``id`` and ``reason``), ``file``, ``options``, ``warnings``, ``seconds``.

    Raises:
        UsageError: Nothing is asked for; an id, dataset, column or space is unknown; no image can be read; or the network here
            gives other features than those of the space.
        StoreError: Features of some images are missing.
    """
    started = time.monotonic()
    options = SimilarOptions(
        query_ids=None if query_ids is None else tuple(query_ids),
        query_dataset=query_dataset, top=top, weights=weights, dataset=dataset, distance=distance,
        node=node, backbone=backbone, snapshot=snapshot, to=to, raw_ids=raw_ids, source=source,
        only_under=places(only_under), path_column=path_column, box=box, box_unit=box_unit, box_margin=box_margin,
        images=None if images is None else str(images), frames=frames, device=device, batch_size=batch_size, workers=workers,
        engine=engine,
        trust_code=trust_code,
    )  # fmt: skip
    target = None if to is None else checked_file(to, "look-alikes", [PAGE])
    kept = store if isinstance(store, FeatureStore) else FeatureStore(store, create=False)
    name = dataset or kept.only_dataset()
    features = kept.features(name, node=node, backbone=backbone, snapshot=snapshot)
    run_id = snapshot or kept.snapshot_ids(name)[-1]
    say = announcer(silent=silent)
    asked = _queries(kept, features, queries, options, silent=silent)
    say(f"comparing {counted(len(asked.ids), 'image')} with {len(features):,} of {name} by {features.column}")
    with show(len(features) * -(-len(asked.ids) // _QUERIES_AT_ONCE), "compare", silent=silent) as progress:
        parts = [
            nearest(features, asked.vectors[place], top, distance=distance, without=asked.own[place], progress=progress)
            for place in _places(len(asked.ids))
        ]
    found = Nearest(np.concatenate([part.positions for part in parts]), np.concatenate([part.apart for part in parts]))
    answer = similar_table(asked.ids, features, found)
    warnings = [f"{id_} cannot be used: {reason}" for id_, reason in asked.rejects.items()]
    if target is not None and target.suffix.lower() == PAGE:
        readable: Any = asked.payloads.get if asked.payloads else query_dataset
        image_page(
            kept, _document(answer, features, asked), target, options, source=source, dataset=name, snapshot=run_id,
            queries=readable, silent=silent,
        )  # fmt: skip
    elif target is not None:
        said = neutralised_text(write_table(answer, target, raw_ids=raw_ids), target)
        warnings += [said] if said else []
    return {
        "dataset": name,
        "snapshot": run_id,
        "images": len(features),
        "column": features.column,
        "space": features.origin.space,
        "distance": distance,
        "search": "exact",
        "queries": _listed(answer, asked.ids),
        "computed": asked.computed,
        "rejects": [{"id": id_, "reason": reason} for id_, reason in asked.rejects.items()],
        "file": None if target is None else str(target),
        "options": as_asked(options),
        "warnings": warnings,
        "seconds": round(time.monotonic() - started, 3),
    }


def _places(count: int) -> list[slice]:
    return [slice(start, start + _QUERIES_AT_ONCE) for start in range(0, count, _QUERIES_AT_ONCE)]


def similar_table(queries: Sequence[str], features: FeatureSet, found: Nearest) -> pa.Table:
    """One row for each image found: ``query``, ``rank`` from 1, ``id``, ``label``, ``split``, ``distance``.

    Args:
        queries: (q,) ids of what was asked with.
        features: n images.
        found: (q, k) of them.
    """
    there = found.positions >= 0
    number, rank = np.nonzero(there)
    images = features.table.select(["id", "label", "split"]).take(found.positions[there])
    columns = {
        "query": pa.array([queries[int(one)] for one in number], pa.string()),
        "rank": pa.array(rank + 1, pa.int32()),
        "id": images["id"],
        "label": images["label"],
        "split": images["split"],
        "distance": pa.array(found.apart[there]),
    }
    return pa.table(columns)


def _listed(answer: pa.Table, ids: Sequence[str]) -> list[dict[str, Any]]:
    queries: list[dict[str, Any]] = [{"id": id_, "found": []} for id_ in ids]
    by_id = {query["id"]: query["found"] for query in queries}
    for row in answer.select(["query", "id", "label", "split", "distance"]).to_pylist():
        by_id[row.pop("query")].append(row)
    return queries


def _queries(
    store: FeatureStore, features: FeatureSet, queries: Any, options: SimilarOptions, *, silent: bool
) -> Queries:
    """The features of all that was asked with."""
    named = _of_ids(store, features, options) if options.query_ids else None
    new = None
    if queries is not None and not (isinstance(queries, list | tuple) and not queries):
        new = _of_images(store, features, queries, options, silent=silent)
    parts = [part for part in (named, new) if part is not None]
    if not parts:
        raise UsageError(
            Message(
                "nothing is asked for: name images to find look-alikes of, or one of the store with ",
                Option("query_ids"),
            )
        )
    ids = [id_ for part in parts for id_ in part.ids]
    twice = next((id_ for place, id_ in enumerate(ids) if id_ in ids[:place]), None)
    if twice is not None:
        raise UsageError(f"{twice!r} is asked for twice; name each image once")
    last = parts[-1]
    vectors, own = np.concatenate([part.vectors for part in parts]), np.concatenate([part.own for part in parts])
    return Queries(tuple(ids), vectors, own, last.payloads, last.rejects, last.computed)


def _of_ids(store: FeatureStore, features: FeatureSet, options: SimilarOptions) -> Queries:
    """Features of images of the store by id."""
    ids, of = options.query_ids or (), features
    if options.query_dataset is not None and options.query_dataset != features.origin.dataset:
        of = store.features(options.query_dataset, node=list(features.columns), backbone=features.space_fingerprint)
    place = pc.index_in(pa.array(ids, pa.string()), value_set=of.table["id"].combine_chunks())
    for id_, where in zip(ids, place.to_pylist(), strict=True):
        if where is None:
            raise _unknown_id(store, of, id_)
    rows = np.asarray(place.to_numpy(zero_copy_only=False)).astype(np.int64)
    own = rows if of is features else np.full(len(rows), -1, np.int64)
    return Queries(tuple(ids), of.read(np.float32, rows=rows), own, {}, {})


def _unknown_id(store: FeatureStore, of: FeatureSet, id_: str) -> UsageError:
    """What to say of an id that has no features: it was rejected, or is nowhere."""
    dataset = of.origin.dataset
    rejected = require_snapshot(store, dataset).filter(pc.field("id") == id_)
    if rejected.num_rows and rejected["reason"][0].as_py():
        return UsageError(f"image {id_!r} of dataset {dataset} has no features: {rejected['reason'][0].as_py()}")
    inside = pc.match_substring(of.table["id"], Path(id_).name)
    near = of.table["id"].filter(inside)[:100].to_pylist() or of.table["id"][:3].to_pylist()
    return unknown("image", id_, near, where=f"dataset {dataset}")


def _of_images(
    store: FeatureStore, features: FeatureSet, queries: Any, options: SimilarOptions, *, silent: bool
) -> Queries:
    """Features of new images: stored ones where the store knows the bytes, and others computed."""
    source = opened(queries, options)
    listing = source.scan()
    ids, locators = listing["id"].to_pylist(), listing["locator"].to_pylist()
    payloads: dict[str, Any] = {}
    rejects: dict[str, str] = {}
    for id_, locator in zip(ids, locators, strict=True):
        try:
            payloads[id_] = source.read(locator)
        except Reject as reject:
            rejects[id_] = str(reject)
    space = store.space(features.space_fingerprint)
    keys = np.array([np.frombuffer(key_of(payload), np.uint8) for payload in payloads.values()]).reshape(-1, 32)
    vectors, known = stored_vectors(space, features.columns, keys)
    rest = [id_ for id_, there in zip(payloads, known, strict=True) if not there]
    if rest:
        at = {id_: place for place, id_ in enumerate(payloads)}
        chosen = listing.filter(pc.is_in(listing["id"], pa.array(rest, pa.string())))
        announcer(silent=silent)(f"computing the features of {counted(len(rest), 'image')} by {space.backbone}")
        session = session_of(space, features.columns, options)
        for batch in FeatureStream(session).batches(source, chosen):
            names = chosen["id"].take(pa.array(batch.rows)).to_pylist()
            if names:
                vectors[[at[id_] for id_ in names]] = batch.vectors()
                known[[at[id_] for id_ in names]] = True
            rejects |= {chosen["id"][row].as_py(): reason for row, reason in batch.rejects}
    usable = [id_ for id_, there in zip(payloads, known, strict=True) if there]
    if not usable:
        first, reason = next(iter(rejects.items()), (str(source.name), "it holds no image"))
        raise UsageError(f"nothing to look for: {first} cannot be used: {reason}")
    shown = {id_: payloads[id_] for id_ in usable}
    return Queries(tuple(usable), vectors[known], np.full(len(usable), -1, np.int64), shown, rejects, len(rest))


def stored_vectors(
    space: Space, columns: Sequence[str], keys: npt.NDArray[np.uint8]
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Reads the features of images by their keys.

    Args:
        space: The feature space.
        columns: In the order of the feature vector.
        keys: (m, 32).

    Returns:
        (m, D) features, zeros where there are none, and (m,) whether there are any.
    """
    index, widths = space.index(columns), space.columns()
    found = [index.locate(keys, column) for column in columns]
    known = np.logical_and.reduce([there for _, _, there in found]) if len(keys) else np.zeros(0, np.bool_)
    rows = WideRows(
        tuple(
            ColumnRows.of(column, index.parts, part[known], row[known], width=widths[column].width)
            for column, (part, row, _) in zip(columns, found, strict=True)
        )
    )
    vectors = np.zeros((len(keys), sum(widths[column].width for column in columns)), np.float32)
    vectors[known] = rows.read(np.float32)
    return vectors, known


def session_of(space: Space, columns: Sequence[str], options: SimilarOptions) -> Session:
    """The network of a feature space, loaded and compared with it.

    Raises:
        UsageError: The space names code that is not trusted, or the network gives other features here; names what differs.
        WeightsNotFound: Its weights are not at hand.
    """
    check_trusted(space.backbone, options.trust_code, named_by="the store")
    described: Mapping[str, Any] = space.notes.get("backbone", {})
    label = str(described.get("weights", "DEFAULT"))
    weights = "none" if described.get("random") else label
    if options.weights is not None:
        weights = str(options.weights)
    elif label.startswith("file:"):
        raise UsageError(
            Message(
                f"the features of {space.name} were computed with weights of your own ({label}); for new images give them: ",
                Option("weights", "FILE"),
            )
        )
    seed = int(described.get("seed") or 0)
    settings = Settings.of_space(space.fields, why="as in the feature space")
    machine = settle_machine(options, settings.decode)
    network = load_backbone(space.backbone, weights, seed=seed)
    changed = differences(space.fields, {**network.identity(), **settings.fields(), "numerics": NUMERICS})
    if changed:
        raise UsageError(
            f"the features of {space.name} differ from those that {network.name} gives here ({', '.join(changed)}), so that new "
            "images cannot be compared with them; use the versions and weights that they were computed with, or extract again"
        )
    asked = Options(backbone=network.name, weights=weights, seed=seed, workers=options.workers)
    return replace(Session.of(network, network.columns(list(columns)), machine, asked), settings=settings)


def _document(answer: pa.Table, features: FeatureSet, asked: Queries) -> dict[str, Any]:
    """What the page shows; see `featurepipe.reporting.report.write_report`."""
    shown = asked.ids[:ON_PAGE]
    paragraphs = [
        f"The images of {features.origin.dataset} nearest to each of {counted(len(asked.ids), 'image')} by "
        f"{features.column}, of {len(features):,}."
    ]
    if len(asked.ids) > len(shown):
        paragraphs.append(f"The first {len(shown)} are shown; a .csv or .parquet file has all.")
    groups = [
        {
            "title": query["id"],
            "images": [
                {"id": query["id"], "lines": ["asked for"], "is_query": bool(asked.own[place] < 0)},
                *({"id": row["id"], "lines": _lines(row)} for row in query["found"]),
            ],
        }
        for place, query in enumerate(_listed(answer, asked.ids)[: len(shown)])
    ]
    title = f"Images like {first_names(shown, 2)}"
    return {"kind": "images", "version": 1, "title": title, "paragraphs": paragraphs, "groups": groups}


def _lines(row: Mapping[str, Any]) -> list[str]:
    return [f"distance {row['distance']:.4g}", *(str(row[name]) for name in ("label", "split") if row[name])]


def similar_text(found: Mapping[str, Any]) -> str:
    """Sums up what `similar` returns, as plain text."""
    lines = [
        f"{found['dataset']}: {found['images']:,} images compared by {found['column']} of {found['space']} ({found['distance']})",
        *(f"WARNING: {text}" for text in found["warnings"]),
    ]
    header = ("query", "distance", "id", "label", "split")
    rows = [
        (query["id"], f"{row['distance']:.4g}", row["id"], row["label"] or "", row["split"] or "")
        for query in found["queries"]
        for row in query["found"]
    ]
    lines.append(table(header, rows[:_ROWS]))
    if len(rows) > _ROWS:
        lines.append(f"... {len(rows) - _ROWS:,} more; write all of them: --to FILE")
    if found["file"]:
        lines.append(f"file {found['file']}")
    return "\n".join(lines)


_ROWS = 40
