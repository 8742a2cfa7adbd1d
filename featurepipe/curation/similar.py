"""Images that look like others: the nearest by any column, of images of the store or of new ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from featurepipe.curation.index import ImageSearch, chosen_search
from featurepipe.curation.options import COSINE, SimilarOptions
from featurepipe.curation.queries import Queries, of_ids, queries_of
from featurepipe.curation.question import DISTANCES, Question, column_text, files_text, more_text
from featurepipe.display import counted, first_names, table
from featurepipe.errors import StoreMoved, UsageError
from featurepipe.execution.local import features_at
from featurepipe.features.options import AUTO, Places, places
from featurepipe.heads.blocks import Blocks
from featurepipe.monitoring.near import Nearest, nearest
from featurepipe.progress import show
from featurepipe.results import shown_as
from featurepipe.store import FeatureSet, FeatureStore
from featurepipe.store.locks import starts_again

ON_PAGE = 60
"""Queries that a page shows at most."""
_QUERIES_AT_ONCE = 1024

Single = npt.NDArray[np.float32]
Positions = npt.NDArray[np.int64]


@shown_as("similar")
@starts_again
def similar(
    store: FeatureStore | str | PathLike[str],
    queries: Any = None,
    *,
    query_ids: str | Sequence[str] | None = None,
    query_dataset: str | None = None,
    top: int = 10,
    index: str = AUTO,
    weights: str | PathLike[str] | None = None,
    dataset: str | None = None,
    distance: str = COSINE,
    node: str = "bottleneck",
    backbone: str | None = None,
    snapshot: str | None = None,
    to: Places = None,
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
    cluster: Any = None,
    silent: bool = False,
) -> dict[str, Any]:
    """Finds the images of a dataset whose features are the nearest to those of some images.

    Every row is compared, block by block (`featurepipe.monitoring.near.nearest`), or an index is searched
    (`featurepipe.curation.index`), which finds nearly all of them at once. The features of an image whose bytes the
    store knows are taken from there; others are computed by the network of the feature space, which is loaded only then. An
    image of the dataset is not among its own look-alikes, its copies are. To ask often: `SimilarImages`.

    Args:
        store: The feature store or its path.
        queries: New images: whatever `featurepipe.extract` takes, or a list of paths.
        query_ids: Ids of images of the store, or one.
        query_dataset: The dataset of these ids; by default the one that is searched.
        top: How many images for each query.
        index: ``auto``: every image is compared, but of 200,000 and more the index is searched if one is kept. ``always``: an
            index is made beside the store, or brought up to date with the snapshot, and searched. ``never``.
        weights: The network's weights file, where it is your own, for images that the store does not have.
        dataset: The dataset that is searched; by default the store's only one.
        distance: ``cosine`` or ``euclidean``.
        node: The column whose distances count.
        backbone: Of which network, space or fingerprint.
        snapshot: Run id of the snapshot that is searched; by default the current one.
        to: A ``.csv``, ``.jsonl`` or ``.parquet`` file (``query``, ``rank``, ``id``, ``label``, ``split``, ``distance``), or an
            ``.html`` page with thumbnails; or several such files.
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
        cluster: Where to compare instead of here, as `featurepipe.execution.connect` takes it; an index is searched here.
        silent: Say nothing on standard error.

    Returns:
        JSON values. ``dataset``, ``snapshot``, ``images`` (searched), ``column``, ``bottleneck`` (its node, if known),
        ``space``, ``distance``, ``search``
        (``exact`` or ``index``), ``why``, ``recall`` (as measured when the index was made or last brought up to date);
        ``queries``, each with ``id`` and
        ``found``: a list of ``id``, ``label``, ``split`` and ``distance``, nearest first; ``computed``, ``rejects`` (``id``
        and ``reason``), ``file`` (the first), ``files``, ``options``, ``warnings``, ``seconds``.

    Raises:
        UsageError: Nothing is asked for; an id, dataset, column or space is unknown; no image can be read; or the network here
            gives other features than those of the space.
        StoreError: Features of some images are missing.
        ClusterError: There is no such cluster.
    """
    options = SimilarOptions(
        query_ids=(query_ids,) if isinstance(query_ids, str) else None if query_ids is None else tuple(query_ids),
        query_dataset=query_dataset, top=top, index=index, weights=weights, dataset=dataset, distance=distance,
        node=node, backbone=backbone, snapshot=snapshot, to=places(to), raw_ids=raw_ids, source=source,
        only_under=places(only_under), path_column=path_column, box=box, box_unit=box_unit, box_margin=box_margin,
        images=None if images is None else str(images), frames=frames, device=device, batch_size=batch_size, workers=workers,
        engine=engine,
        trust_code=trust_code,
    )  # fmt: skip
    question = Question.of(store, options, "look-alikes", silent=silent)
    features = question.features
    asked = queries_of(question.store, features, queries, options, silent=silent)
    search = search_of(question, distance, index)
    question.say(
        f"comparing {counted(len(asked.ids), 'image')} with {len(features):,} of {question.dataset} by {features.named_column}: "
        f"{search.told()['search']}, {search.why}"
    )
    if cluster is not None and search.index is not None:
        question.say("an index is searched here, not on the cluster")
    with features_at(cluster if search.index is None else None, features, question.store, question.say) as there:
        found = _nearest(search, there, asked.vectors, top, distance, asked.own, silent=silent)
    answer = similar_table(asked.ids, features, found)
    warnings: list[str] = [f"{id_} cannot be used: {reason}" for id_, reason in asked.rejects.items()] + [
        *search.warnings
    ]
    warnings += question.written(
        lambda: answer,
        lambda: _document(answer, features, asked, options),
        queries=asked.payloads.get if asked.payloads else query_dataset,
    )
    return question.told(
        images=len(features),
        distance=distance,
        **search.told(),
        queries=_listed(answer, asked.ids),
        computed=asked.computed,
        rejects=[{"id": id_, "reason": reason} for id_, reason in asked.rejects.items()],
        warnings=warnings,
    )


def search_of(question: Question, distance: str, index: str) -> ImageSearch:
    """How the images of a question are compared; see `featurepipe.curation.index.chosen_search`."""
    ids = question.store.snapshot_ids(question.dataset)
    return chosen_search(
        question.store, question.features, question.snapshot, is_current=question.snapshot == ids[-1], distance=distance,
        wanted=index, say=question.say, silent=question.silent,
    )  # fmt: skip


def _nearest(
    search: ImageSearch, features: Blocks, vectors: Single, top: int, distance: str, own: Positions, *, silent: bool
) -> Nearest:
    """The nearest images of queries (q, D), some queries at a time."""
    steps = [slice(start, start + _QUERIES_AT_ONCE) for start in range(0, len(vectors), _QUERIES_AT_ONCE)]
    rows = features.shape[0] * len(steps) if search.index is None else 0
    with show(rows, "compare", silent=silent or not rows) as progress:
        parts = [
            nearest(features, vectors[step], top, distance=distance, without=own[step], progress=progress)
            if search.index is None
            else search.index.search(vectors[step], top, without=own[step])
            for step in steps
        ]
    width = max(part.positions.shape[1] for part in parts)
    return Nearest(
        np.concatenate([_padded(part.positions, width, -1) for part in parts]),
        np.concatenate([_padded(part.apart, width, np.inf) for part in parts]),
    )


def _padded(lines: npt.NDArray[Any], width: int, filler: float) -> npt.NDArray[Any]:
    return np.pad(lines, ((0, 0), (0, width - lines.shape[1])), constant_values=filler)


class SimilarImages:
    """The images of a dataset, open for many queries: features and index stay at hand.

    A kept index (``index="always"`` makes one) is read once, not for each query. If the dataset gets another snapshot, the next
    query is of that one.

    Of 1,000,000 images of 1,280 float16 values (`benchmarks/bench_similar.py`; two cores with little other work): the first
    query of a process takes 1.3 s, others 10 ms, with 0.9 GB at most and a recall of 0.988. Without an index each takes 4.6 s,
    and 0.4 GB; by a flat index of faiss alone, which finds all, 0.12 s after the first of 2.3 s, and 2.7 GB.

    Args:
        store: The feature store or its path.
        dataset: The dataset that is searched; by default the store's only one.
        node: The column whose distances count.
        backbone: Of which network, space or fingerprint.
        snapshot: Run id of the snapshot that is searched; by default the current one.
        distance: ``cosine`` or ``euclidean``.
        index: As in `similar`.
        silent: Say nothing on standard error.

    Raises:
        UsageError: A dataset, column, space or snapshot is unknown, or there can be no index of it.
        StoreError: Features of some images are missing.

    Example:
        >>> images = SimilarImages("features", index="always")  # doctest: +SKIP
        >>> images.like("cats/1.jpg", top=5).to_pandas()  # doctest: +SKIP
    """

    def __init__(
        self,
        store: FeatureStore | str | PathLike[str],
        *,
        dataset: str | None = None,
        node: str = "bottleneck",
        backbone: str | None = None,
        snapshot: str | None = None,
        distance: str = COSINE,
        index: str = AUTO,
        silent: bool = False,
    ) -> None:
        self._options = SimilarOptions(
            dataset=dataset, node=node, backbone=backbone, snapshot=snapshot, distance=distance, index=index
        )
        self._silent = silent
        self._open(store)

    def _open(self, store: FeatureStore | str | PathLike[str]) -> None:
        @starts_again
        def opened() -> tuple[Question, ImageSearch]:
            question = Question.of(store, self._options, "look-alikes", silent=self._silent)
            return question, search_of(question, self._options.distance, self._options.index)

        self._question, self._search = opened()

    def __repr__(self) -> str:
        how, of = self._search.told(), self._question
        return f"<SimilarImages {of.dataset}: {len(of.features):,} by {of.features.named_column}, {how['search']} ({how['why']})>"

    @property
    def features(self) -> FeatureSet:
        """The images that are searched."""
        return self._question.features

    def like(self, *ids: str, top: int = 10) -> pa.Table:
        """Finds the images that look like some of the dataset's own; see `similar_table` for the columns.

        Raises:
            UsageError: An id is unknown.
        """
        return self._answered(lambda: of_ids(self._question.store, self.features, ids), top)

    def like_vectors(self, vectors: npt.ArrayLike, top: int = 10) -> pa.Table:
        """Finds the images nearest to features (q, D) of the same space; queries are called ``0``, ``1`` and so on.

        Raises:
            UsageError: There are more or fewer values a row, or one is not finite.
        """
        rows = np.atleast_2d(np.asarray(vectors, np.float32))
        width = self.features.shape[1]
        if rows.ndim != 2 or rows.shape[1] != width:
            raise UsageError(f"features of shape {rows.shape}: {self.features.column} has {width} values an image")
        names = tuple(map(str, range(len(rows))))
        return self._answered(lambda: Queries(names, rows, np.full(len(rows), -1, np.int64), {}, {}), top)

    def _answered(self, ask: Callable[[], Queries], top: int) -> pa.Table:
        question = self._question
        if self._options.snapshot is None and question.store.snapshot_ids(question.dataset)[-1] != question.snapshot:
            self._open(question.store)
        try:
            return self._found(ask(), top)
        except StoreMoved:  # compacted meanwhile
            self._open(question.store)
            return self._found(ask(), top)

    def _found(self, asked: Queries, top: int) -> pa.Table:
        distance = self._options.distance
        found = _nearest(self._search, self.features, asked.vectors, top, distance, asked.own, silent=True)
        return similar_table(asked.ids, self.features, found)


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


def _asked_for(ids: Sequence[str]) -> str:
    return ids[0] if len(ids) == 1 else f"each of {counted(len(ids), 'image')}"


def _document(answer: pa.Table, features: FeatureSet, asked: Queries, options: SimilarOptions) -> dict[str, Any]:
    """What the page shows; see `featurepipe.reporting.report.write_report`."""
    shown = asked.ids[:ON_PAGE]
    paragraphs = [
        f"Of {counted(len(features), 'image')} of {features.origin.dataset} the {counted(options.top, 'image')} nearest to "
        f"{_asked_for(asked.ids)}, by the features at {features.named_column}, the nearest first.",
        DISTANCES[options.distance],
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
    split = [f"split {row['split']}"] if row["split"] else []
    return [f"distance {row['distance']:.3g}", *([str(row["label"])] if row["label"] else []), *split]


def similar_text(found: Mapping[str, Any]) -> str:
    """Sums up what `similar` returns, as plain text."""
    lines = [
        f"{found['dataset']}: {counted(found['images'], 'image')} compared by {column_text(found)} of {found['space']} "
        f"({found['distance']})",
        f"search: {found['search']} ({found['why']}){_recall(found)}",
        *(f"WARNING: {text}" for text in found["warnings"]),
    ]
    header = ("query", "distance", "id", "label", "split")
    rows = [
        (query["id"], f"{row['distance']:.4g}", row["id"], row["label"] or "", row["split"] or "")
        for query in found["queries"]
        for row in query["found"]
    ]
    lines.append(table(header, rows[:_ROWS]))
    lines += more_text(len(rows) - _ROWS, found["files"])
    return "\n".join([*lines, *files_text(found["files"])])


def _recall(found: Mapping[str, Any]) -> str:
    return "" if found["search"] == "exact" else f", {found['recall']:.1%} of the 10 nearest are found"


_ROWS = 40
