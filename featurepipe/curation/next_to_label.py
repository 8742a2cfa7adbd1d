"""Which images to label next, given what is labelled: the most typical of each group of look-alikes, or those that cover most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from featurepipe.curation.options import TYPICAL, SelectOptions
from featurepipe.curation.question import Question, column_text, files_text, more_text
from featurepipe.display import counted, table
from featurepipe.errors import Message, Option, UsageError
from featurepipe.execution.local import features_at
from featurepipe.features.options import Places, places
from featurepipe.heads.blocks import Blocks, iterate
from featurepipe.heads.row_shards import concatenated, row_shards_of
from featurepipe.monitoring.near import Directions, unit_vectors
from featurepipe.results import shown_as
from featurepipe.store import FeatureSet, FeatureStore
from featurepipe.store.keys import different
from featurepipe.store.locks import starts_again

_WIDTH = 128  # dimensions in which images are compared
_AXES_FROM = 2048
_MOST_GROUPS, _FEW_GROUPS = 500, 50  # as in TypiClust; of more than a few, k-means learns from batches
_LEAST = 6  # images of a group that is worth a label, as in TypiClust
_NEIGHBOURS = 20  # as in TypiClust
_ROUNDS, _TRIES = 100, 4  # of k-means
_AT_ONCE = 1024
_SHOWN, _ROWS = 60, 30

Single = npt.NDArray[np.float32]
Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class NextImages:
    """Images to label next, in the order in which they were chosen.

    Attributes:
        rows: (b,) of the features.
        score: (b,) of ``typical`` one over the mean distance to the nearest look-alikes, of ``k-centre`` the distance to the
            nearest image that was labelled or chosen before.
        group: (b,) of ``typical`` the number of the group of look-alikes; -1 else.
    """

    rows: Positions
    score: npt.NDArray[np.float64]
    group: Positions


class BudgetTooLarge(UsageError):
    """More images are to be chosen than there are without a label.

    Attributes:
        left: How many there are.
    """

    def __init__(self, dataset: str, budget: int, left: int) -> None:
        some = f"a budget of {budget:,} is more than the {counted(left, 'image')} of {dataset} without a label"
        none = f"every image of {dataset} has a label; say by a file of labels which ones count"
        super().__init__(some if left else none)
        self.left = left


@shown_as("select")
@starts_again
def select(
    store: FeatureStore | str | PathLike[str],
    *,
    budget: int | None = None,
    method: str = TYPICAL,
    seed: int = 0,
    dataset: str | None = None,
    split: str | None = None,
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
    labels: Any = None,
    label: str | None = None,
    split_column: str | None = None,
    cluster: Any = None,
    silent: bool = False,
) -> dict[str, Any]:
    """Chooses images without a label that are worth one next.

    ``typical`` is TypiClust of Hacohen, Dekel & Weinshall 2022, "Active Learning on a Budget: Opposite Strategies Suit High and
    Low Budgets"; ``k-centre`` the greedy cover of Sener & Savarese 2018, "Active Learning for Convolutional Neural Networks: A
    Core-Set Approach", which looks for what is unlike all that is labelled, outliers first. Images are compared by the
    directions of their features, in at most 128 dimensions.

    Against a random choice (`benchmarks/bench_select.py`: five disjoint fifths of Fashion-MNIST, 12,000 images each without a
    label, EfficientNet-Lite0, a logistic regression; differences of test accuracy in points, with 95 % intervals): ``typical``
    gives 9.7 more (3.9 to 15.5) for 20 labels, 6.9 (5.2 to 8.5) for 50, 3.7 (2.8 to 4.7) for 100, and 0.2 (-0.4 to 0.9) for 500;
    ``k-centre`` 2.5 less (-1.3 to 6.2), 3.2 less (-0.5 to 6.8), 2.6 less (0.9 to 4.3) and 1.3 less (0.6 to 2.1).
    Copies of an image are chosen once, and not at all if one of them is labelled.

    Args:
        store: The feature store or its path.
        budget: How many images to choose.
        method: ``typical`` or ``k-centre``.
        seed: Of the groups of look-alikes.
        dataset: Name of the dataset; by default the store's only one.
        split: Only images of this split.
        node: The column by which images are compared.
        backbone: Of which network, space or fingerprint.
        snapshot: Run id of the snapshot whose images are meant; by default the current one.
        to: A page with thumbnails (``.html``), or a table to fill in (``.csv``, ``.jsonl``, ``.parquet``): ``id``, ``label``
            (empty), ``rank``, ``score``, ``group``, and below them the images that have a label, with it. It is what ``labels=``
            of any command takes once it is filled in, and all that is labelled then. Or several such files.
        raw_ids: Whether texts of a CSV file that a spreadsheet would take for formulas stay as they are.
        source: The dataset's images, for thumbnails; by default where they were extracted from.
        only_under: As in `featurepipe.report`.
        path_column: As in `featurepipe.extract`.
        box: As in `featurepipe.extract`.
        box_unit: As in `featurepipe.extract`.
        box_margin: As in `featurepipe.extract`.
        images: As in `featurepipe.extract`.
        frames: As in `featurepipe.extract`.
        labels: A mapping or file of what is labelled, instead of the dataset's labels.
        label: The column of the class.
        split_column: The column of the splits.
        cluster: Where to read features and project them instead of here, as `featurepipe.execution.connect` takes it; images are
            chosen here, from 0.5 KB of each.
        silent: Say nothing on standard error.

    Returns:
        JSON values. ``dataset``, ``snapshot``, ``column``, ``bottleneck`` (its node, if known),
        ``space``, ``method``, ``labelled``, ``unlabelled`` (different
        images), ``chosen``: a list of ``id``, ``split``, ``score`` and ``group``, in the order of the choice; ``file`` (the
        first), ``files``, ``options``, ``warnings``, ``seconds``.

    Raises:
        UsageError: No budget is given, or a larger one than there are images without a label; a column is unknown.
        StoreError: Features of some images are missing.
        ClusterError: There is no such cluster.
    """
    options = SelectOptions(
        budget=budget, method=method, seed=seed, dataset=dataset, split=split, node=node, backbone=backbone,
        snapshot=snapshot, to=places(to), raw_ids=raw_ids, source=source, only_under=places(only_under), path_column=path_column,
        box=box, box_unit=box_unit, box_margin=box_margin, images=None if images is None else str(images), frames=frames,
        labels=labels, label=label, split_column=split_column,
    )  # fmt: skip
    if budget is None:
        raise UsageError(Message("how many images are to be chosen? give ", Option("budget", "N")))
    question = Question.of(store, options, "images to label", silent=silent)
    every = question.rows(options.ungrouped(), labels, split)
    labelled, open_ = sides_of(every)
    if budget > len(open_):
        raise BudgetTooLarge(question.dataset, budget, len(open_))
    question.say(
        f"choosing {budget:,} of {counted(len(open_), 'image')} without a label, by {every.named_column} ({method})"
    )
    with features_at(cluster, every, question.store, question.say) as there:
        chosen = choose(every, labelled, open_, budget, there, method=method, seed=seed)
    answer = chosen_table(every, chosen, label or "label")
    warnings = question.written(lambda: answer, lambda: _document(every, chosen, len(labelled), options))
    return question.told(
        method=method,
        labelled=len(labelled),
        unlabelled=len(open_),
        chosen=_listed(every, chosen),
        warnings=warnings,
    )


def sides_of(features: FeatureSet) -> tuple[Positions, Positions]:
    """The rows of labelled images, and of those without a label, each different image once."""
    images, first = different(features.keys)
    has_label = np.asarray(features.table["label"].is_valid())
    known = np.unique(first[has_label])
    return known, np.setdiff1d(images, known)


def choose(
    features: FeatureSet,
    labelled: Positions,
    open_: Positions,
    budget: int,
    values: Any = None,
    *,
    method: str = TYPICAL,
    seed: int = 0,
) -> NextImages:
    """Chooses images to label next; see `select`.

    Args:
        features: n images.
        labelled: Rows that have a label, each different image once.
        open_: Rows that may be chosen.
        budget: How many of them.
        values: The features where they are read, such as spread over a cluster; by default ``features``.
        method: ``typical`` or ``k-centre``.
        seed: Of the groups of look-alikes.

    Raises:
        UsageError: A value is NaN or infinite.
    """
    rows = np.sort(np.concatenate([labelled, open_]))
    images = _directions((features if values is None else values).take(rows), seed)
    is_open = np.isin(rows, open_)
    if method == TYPICAL:
        places, score, group = _typical(images, is_open, budget, seed)
    else:
        places, score = _covering(images, is_open, budget)
        group = np.full(len(places), -1, np.int64)
    return NextImages(rows[places], score, group)


def _directions(features: Any, seed: int) -> Single:
    """(n, d) unit vectors less their mean, projected onto the axes along which they spread most."""
    rng = np.random.default_rng(seed)
    drawn = np.sort(rng.choice(len(features), min(len(features), _AXES_FROM), replace=False))
    directions = Directions.fitted(unit_vectors(features.read(np.float32, rows=drawn)), _WIDTH)
    found = concatenated(row_shards_of(features).map(partial(_projected, directions=directions)))
    found -= found.mean(axis=0)  # moves no distance, and single precision can tell apart what is all alike
    return found


def _projected(shard: Blocks, *, directions: Directions) -> Single:
    """(m, d) the rows of a shard."""
    found = np.empty((shard.shape[0], directions.width), np.float32)
    for place, block in iterate(shard, dtype=np.float32):
        found[place] = directions.project(unit_vectors(block))
    return found


def _covering(values: Single, is_open: npt.NDArray[np.bool_], budget: int) -> tuple[Positions, npt.NDArray[np.float64]]:
    """Greedy k-centre: always the image farthest from all that are labelled or chosen."""
    squares = np.einsum("ij,ij->i", values, values)
    apart = np.full(len(values), np.inf, np.float32)
    known = np.flatnonzero(~is_open)
    for start in range(0, len(known), _AT_ONCE):
        some = known[start : start + _AT_ONCE]
        for first in range(0, len(values), _AT_ONCE):
            place = slice(first, first + _AT_ONCE)
            products = values[place] @ values[some].T
            between = squares[place, None] + squares[some] - 2 * products
            np.minimum(apart[place], between.min(axis=1), out=apart[place])
    chosen, score, is_open = np.empty(budget, np.int64), np.empty(budget), is_open.copy()
    if not len(known):  # nothing to be far from: the image nearest to the middle of all comes first
        apart = -((values - values.mean(axis=0)) ** 2).sum(axis=1)
    for number in range(budget):
        farthest = int(np.argmax(np.where(is_open, apart, -np.inf)))
        chosen[number], score[number] = farthest, np.sqrt(max(float(apart[farthest]), 0))
        between = squares + squares[farthest] - 2 * (values @ values[farthest])
        apart = between if number == 0 and not len(known) else np.minimum(apart, between)
        is_open[farthest] = False
    return chosen, score


def _typical(
    values: Single, is_open: npt.NDArray[np.bool_], budget: int, seed: int
) -> tuple[Positions, npt.NDArray[np.float64], Positions]:
    """TypiClust: of the largest groups with the fewest labels, the image nearest to its look-alikes, one group after another."""
    groups = min(int((~is_open).sum()) + budget, _MOST_GROUPS, len(values))
    group = _grouped(values, groups, seed)
    sizes = np.bincount(group, minlength=groups)
    labels = np.bincount(group[~is_open], minlength=groups)
    worth = [number for number in np.lexsort((-sizes, labels)) if sizes[number] >= _LEAST] or list(np.argsort(-sizes))
    ranked = {int(number): _by_typicality(values, np.flatnonzero(group == number), is_open) for number in worth}
    rows: list[tuple[int, float, int]] = []
    while len(rows) < budget:
        before = len(rows)
        for number in map(int, worth):
            if len(rows) < budget and (place := next(ranked[number], None)) is not None:
                rows.append((*place, number))
        if len(rows) == before:  # all large groups are used up
            taken = {row for row, _, _ in rows}
            rest = [row for row in np.flatnonzero(is_open) if row not in taken][: budget - before]
            rows += [(int(row), 0.0, int(group[row])) for row in rest]
    return tuple(np.array(column) for column in zip(*rows, strict=True))  # type: ignore[return-value]


def _grouped(values: Single, groups: int, seed: int) -> Positions:
    """(n,) number of the group of each image, by k-means."""
    from sklearn.cluster import KMeans, MiniBatchKMeans

    if groups <= _FEW_GROUPS:
        means: Any = KMeans(groups, n_init=_TRIES, max_iter=_ROUNDS, random_state=seed)
    else:
        means = MiniBatchKMeans(groups, n_init=1, batch_size=max(5000, 4 * groups), random_state=seed)
    return np.asarray(means.fit_predict(values), np.int64)


def _by_typicality(values: Single, rows: Positions, is_open: npt.NDArray[np.bool_]) -> Any:
    """Yields the open rows of a group and their typicality, the most typical first."""
    typicality = _typicality(values[rows])
    for place in np.argsort(-typicality, kind="stable"):
        if is_open[rows[place]]:
            yield int(rows[place]), float(typicality[place])


def _typicality(values: Single) -> npt.NDArray[np.float64]:
    """(m,) one over the mean distance to the nearest look-alikes of a group."""
    near = min(_NEIGHBOURS, max(1, len(values) // 2))
    squares = np.einsum("ij,ij->i", values, values)
    found = np.empty(len(values))
    for start in range(0, len(values), _AT_ONCE):
        place = slice(start, start + _AT_ONCE)
        apart = squares[place, None] + squares - 2 * (values[place] @ values.T)
        least = np.partition(apart, min(near, apart.shape[1] - 1), axis=1)[:, : near + 1]  # itself among them
        found[place] = np.sqrt(np.maximum(least, 0)).sum(axis=1) / near
    return 1 / np.maximum(found, 1e-9)


def chosen_table(features: FeatureSet, chosen: NextImages, label: str = "label") -> pa.Table:
    """The table to fill in, which is then all that is labelled.

    One row an image: first those that were chosen, in their order: ``id``, ``label`` (empty), ``rank`` from 1, ``score``,
    ``group``; then those that had a label before, with it alone.

    Args:
        features: n images.
        chosen: Some of them.
        label: The column of the class.
    """
    count, before = len(chosen.rows), np.flatnonzero(features.table["label"].is_valid())
    empty = pa.nulls(len(before))
    columns = {
        "rank": pa.array(np.arange(1, count + 1)),
        "score": pa.array(chosen.score),
        "group": pa.array(chosen.group, mask=chosen.group < 0),
    }
    labels = pa.chunked_array(
        [pa.nulls(count, pa.string()), *features.table["label"].take(before).cast(pa.string()).chunks]
    )
    return pa.table({
        "id": features.table["id"].take(np.concatenate([chosen.rows, before])),
        label: labels,
        **{name: pa.chunked_array([column, empty.cast(column.type)]) for name, column in columns.items()},
    })  # fmt: skip


def _listed(features: FeatureSet, chosen: NextImages) -> list[dict[str, Any]]:
    images = features.table.select(["id", "split"]).take(chosen.rows).to_pylist()
    pairs = zip(images, chosen.score, chosen.group, strict=True)
    return [
        {**image, "score": float(score), "group": int(group) if group >= 0 else None} for image, score, group in pairs
    ]


def _document(features: FeatureSet, chosen: NextImages, labelled: int, options: SelectOptions) -> dict[str, Any]:
    images = [
        {"id": one["id"], "lines": [f"rank {place}", *([] if one["group"] is None else [f"group {one['group']}"])]}
        for place, one in enumerate(_listed(features, chosen)[:_SHOWN], 1)
    ]
    count = len(chosen.rows)
    is_typical = options.method == TYPICAL
    paragraphs = [
        f"{counted(count, 'image')} of {features.origin.dataset} to label next, in the order in which they were chosen by the "
        f"features at {features.named_column}; {counted(labelled, 'image')} had a label before.",
        f"{_TYPICAL if is_typical else _COVERING} (method {options.method}).",
    ]
    if count > len(images):
        paragraphs.append(f"The first {len(images)} are shown; a .csv file has all.")
    groups = [{"title": "To label next", "images": images}]
    return {"kind": "images", "version": 1, "title": "Images to label next", "paragraphs": paragraphs, "groups": groups}


_TYPICAL = (
    "Each is the image nearest to its look-alikes in a group that k-means found; groups with the fewest labels come first, the "
    "largest before others"
)
_COVERING = "Each is the image that is farthest from all that were labelled or chosen before it"


def select_text(found: Mapping[str, Any]) -> str:
    """Sums up what `select` returns, as plain text."""
    chosen = found["chosen"]
    lines = [
        f"{found['dataset']}: {counted(len(chosen), 'image')} to label next, of {found['unlabelled']:,} without a label, by "
        f"{column_text(found)} ({found['method']}); {found['labelled']:,} labelled",
        *(f"WARNING: {text}" for text in found["warnings"]),
        "",
        table(
            ["id", "score", "group"],
            [[one["id"], f"{one['score']:.4g}", _shown(one["group"])] for one in chosen[:_ROWS]],
        ),
    ]
    lines += more_text(len(chosen) - _ROWS, found["files"], "to be labelled")
    return "\n".join([*lines, *files_text(found["files"])])


def _shown(group: int | None) -> str:
    return "" if group is None else str(group)
