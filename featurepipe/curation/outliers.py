"""Images that lie apart: far from all others, from their class, or from what was there before; ranked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from featurepipe.curation.options import CLASS, COSINE, ON_A_PAGE, OutliersOptions
from featurepipe.curation.question import DISTANCES, Question, column_text, files_text, more_text
from featurepipe.display import counted, table
from featurepipe.errors import UsageError
from featurepipe.execution.local import features_at
from featurepipe.features.options import Places, places
from featurepipe.heads.blocks import Blocks, RowThreads, pieces
from featurepipe.heads.moments import refuse_non_finite
from featurepipe.heads.row_shards import row_shards_of
from featurepipe.monitoring.near import Directions, common_centre, nearest, unit_vectors
from featurepipe.monitoring.samples import reference_snapshot, snapshot_of_run
from featurepipe.results import shown_as
from featurepipe.store import FeatureSet, FeatureStore
from featurepipe.store.keys import SortedKeys, different
from featurepipe.store.locks import starts_again

REFERENCE = 20_000
"""Images of all classes together that are compared with each other; of more, some are drawn, and the farthest are then compared
with all."""
DRAWN = 5_000
"""The most that are drawn of one class, or of all. Of 60,000 clothes with 50 emoji among them (histograms of gradients) 98 of the
100 farthest were those of the exact comparison with 20,000 drawn and 100 with 5,000, in 29 and 13 s of one core."""
FENCE = 1.5
"""An image is an outlier if the logarithm of its distance lies so many interquartile ranges above the third quartile of its
class, or of all: the upper fence of Tukey 1977, "Exploratory Data Analysis". That number ranks the images, too, so that outliers
come first whichever class they are of: 1.3 times the usual is far in a class of look-alikes, and near in one of many kinds."""
_LEAST = 20  # images of a class that others of it are compared with
_USUAL = 1_000  # images of each class, at most, whose distances from each other tell how far new ones may lie
_USUAL_LEAST = 100  # of many classes
_AGAIN = 1024  # of those that lie farthest, compared with all
_BLOCK_ROWS = 128  # of a class, whose distances to thousands of others stay in the processor's cache
_AXES = 256
"""Principal axes along which the nearest of thousands of rows is looked for. Of those 60,050 images, at 128 axes, 88 % found the
nearest of 5,000 by all values, the others one that lay 4 % farther; as many as before of the 100 farthest (99) were found."""
_PARTS = 4  # of those rows; of each part the nearest along the axes is compared by all values
_NEIGHBOURS = 5

Single = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Outliers:
    """How far n images lie from others, the farthest first: by ``above``, which is by the distance within a class.

    Attributes:
        rows: (n,) of the features.
        distance: (n,) to the k-th nearest image.
        score: (n,) the distance as a multiple of the median of its class, or of all.
        above: (n,) interquartile ranges that its logarithm lies above the third quartile of its class, or of all.
        far: (n,) whether it is an outlier.
        unchecked: Rows that had fewer than k others to be compared with.
        drawn: Images that were compared with first, of more; 0 where each was compared with all.
    """

    rows: Positions
    distance: Doubles
    score: Doubles
    above: Doubles
    far: npt.NDArray[np.bool_]
    unchecked: Positions
    drawn: int = 0


@shown_as("outliers")
@starts_again
def outliers(
    store: FeatureStore | str | PathLike[str],
    *,
    by: str = "all",
    since: str | None = None,
    neighbours: int = 5,
    limit: int | None = 100,
    seed: int = 0,
    distance: str = COSINE,
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
    """Finds images that lie apart, by the distance to their k-th nearest neighbour.

    The method is that of Ramaswamy, Rastogi & Shim 2000, "Efficient algorithms for mining outliers from large data sets". Above
    20,000 images each is first compared with 5,000 drawn at random (of classes 20,000 in all, 5,000 of each at most; Sugiyama &
    Borgwardt 2013, "Rapid distance-based outlier detection via sampling"), and the farthest then with all; the distances of the
    others are estimates, for which the nearest is looked for along 256 principal axes. Copies count once.

    An outlier is an image whose distance lies above the upper fence of all, or of its class: on a logarithmic scale 1.5
    interquartile ranges above the third quartile (Tukey 1977, "Exploratory Data Analysis"). That number, ``above``, is what
    images are ranked by: a distance that is usual in one class is far in another. Where images are much unlike each other
    strangers come first without lying above it: look at the first of the list, whatever it says of them.

    Args:
        store: The feature store or its path.
        by: ``all``: far from all other images; ``class``: far from the other images of its class.
        since: A snapshot (``previous``, ``first``, a run id): images that are new since then, by their distance from its images;
            what is usual are the distances of its images from each other.
        neighbours: Which neighbour, k.
        limit: The most images to list, in the result, as text and on a page (there up to 1,000); None for all.
        seed: Of what is drawn.
        distance: ``cosine`` or ``euclidean``.
        dataset: Name of the dataset; by default the store's only one.
        split: Only images of this split.
        node: The column whose distances count.
        backbone: Of which network, space or fingerprint.
        snapshot: Run id of the snapshot whose images are meant; by default the current one.
        to: A page with thumbnails and neighbours (``.html``), or a table of all images, the farthest first (``.csv``, ``.jsonl``,
            ``.parquet``): ``rank``, ``id``, ``label``, ``split``, ``distance``, ``score``, ``above``, ``outlier``. Or several
            such files.
        raw_ids: Whether texts of a CSV file that a spreadsheet would take for formulas stay as they are.
        source: The dataset's images, for thumbnails; by default where they were extracted from.
        only_under: As in `featurepipe.report`.
        path_column: As in `featurepipe.extract`.
        box: As in `featurepipe.extract`.
        box_unit: As in `featurepipe.extract`.
        box_margin: As in `featurepipe.extract`.
        images: As in `featurepipe.extract`.
        frames: As in `featurepipe.extract`.
        labels: A mapping or file of classes instead of the dataset's.
        label: The column of the class.
        split_column: The column of the splits.
        cluster: Where to compare instead of here, as `featurepipe.execution.connect` takes it.
        silent: Say nothing on standard error.

    Returns:
        JSON values. ``dataset``, ``snapshot``, ``column``, ``bottleneck`` (its node, if known),
        ``space``, ``by``, ``distance``, ``since`` (the run id, or null),
        ``images`` (ranked), ``unchecked``, ``copies`` (left out), ``compared_with`` (how many at first), ``count`` (of outliers),
        ``outliers``: a list of ``id``, ``label``, ``split``, ``distance``, ``score``, ``above`` and ``outlier``, the
        farthest first; ``file``, ``files``, ``options``, ``warnings``, ``seconds``.

    Raises:
        UsageError: There are too few images, or no classes; a snapshot or column is unknown.
        StoreError: Features of some images are missing.
        ClusterError: There is no such cluster.
    """
    options = OutliersOptions(
        by=by, since=since, neighbours=neighbours, limit=limit, seed=seed, distance=distance, dataset=dataset, split=split,
        node=node, backbone=backbone, snapshot=snapshot, to=places(to), raw_ids=raw_ids, source=source,
        only_under=places(only_under), path_column=path_column, box=box, box_unit=box_unit, box_margin=box_margin,
        images=None if images is None else str(images), frames=frames, labels=labels, label=label, split_column=split_column,
    )  # fmt: skip
    question = Question.of(store, options, "outliers", silent=silent)
    every = question.rows(options.ungrouped(), labels, split)
    new, earlier = _new_since(question, every, since)
    once, _ = different(every.keys)  # copies are left out
    asked = once if new is None else once[np.isin(once, new)]
    if not len(asked):
        raise UsageError(f"no image of {question.dataset} is new since {earlier}")
    others = np.setdiff1d(once, asked) if new is not None else asked
    group = _classes(every) if by == CLASS else np.zeros(len(every), np.int64)
    question.say(
        f"comparing {counted(len(asked), 'image')} with {len(others):,} of {question.dataset} by {every.named_column}"
    )
    with features_at(cluster, every, question.store, question.say) as there:
        found = find_outliers(
            every, asked, others, group, there, neighbours=neighbours, distance=distance, seed=seed,
            again=max(_AGAIN, 4 * (limit or 0)),
        )  # fmt: skip
        answer = outliers_table(every, found)
        warnings = _unranked(found, by, neighbours)
        warnings += question.written(lambda: answer, lambda: _document(every, there, found, options))
    return question.told(
        by=by,
        distance=distance,
        since=earlier,
        images=len(found.rows),
        unchecked=len(found.unchecked),
        copies=len(every) - len(once),
        compared_with=found.drawn or len(others),
        count=int(found.far.sum()),
        outliers=answer.drop_columns(["rank"]).slice(0, limit).to_pylist(),
        warnings=warnings,
    )


def _classes(features: FeatureSet) -> Positions:
    """(n,) number of the class of each image, -1 without one."""
    if not features.classes:
        raise UsageError(
            f"no image of {features.origin.dataset} has a class to be far from; give labels, or compare with all images"
        )
    return features.codes()


def _new_since(question: Question, every: FeatureSet, since: str | None) -> tuple[Positions | None, str | None]:
    """The rows of images that an earlier snapshot lacks, and its run id."""
    if since is None:
        return None, None
    snapshot = snapshot_of_run(question.store, question.dataset, question.snapshot)
    earlier = reference_snapshot(question.store, question.dataset, snapshot, since)
    if earlier is None:
        raise UsageError(f"{snapshot} is the first snapshot of {question.dataset}: there is none before it")
    origin = every.origin
    before = question.store.features(
        question.dataset, node=list(every.columns), backbone=origin.fingerprint, snapshot=earlier
    )
    return np.flatnonzero(~SortedKeys(before.keys).contains(every.keys)), earlier


def find_outliers(
    features: FeatureSet,
    asked: Positions,
    others: Positions,
    group: Positions,
    values: Any = None,
    *,
    neighbours: int = 5,
    distance: str = COSINE,
    seed: int = 0,
    again: int = _AGAIN,
) -> Outliers:
    """Ranks images by the distance to the k-th nearest of others of their group.

    What is usual is told by their own distances or, of new images, which are not among the others, by the distances of (some of)
    the others from each other: one new image, or many that are all strange, can be judged then.

    Args:
        features: n images.
        asked: (a,) rows that are ranked.
        others: (o,) rows that they are compared with; an image is not compared with itself.
        group: (n,) number of the class, -1 for images that are left out.
        values: Their features where they are compared, such as spread over a cluster; by default ``features``.
        neighbours: k.
        distance: ``cosine`` or ``euclidean``.
        seed: Of what is drawn of many.
        again: How many of the farthest are compared with all others.

    Raises:
        UsageError: No image has k others of its group, or a value is NaN or infinite.
    """
    count = np.bincount(group[others][group[others] >= 0], minlength=int(group.max(initial=0)) + 1)
    itself = np.isin(asked, others)
    are_new = not itself.all()
    enough = (group[asked] >= 0) & (count[np.maximum(group[asked], 0)] - (itself | are_new) >= neighbours)
    ranked, unchecked = asked[enough], asked[~enough]
    if not len(ranked):
        raise UsageError(
            f"no image has {neighbours} others to be compared with; label more images, or give a smaller number"
        )
    usual = _usual_rows(others, group, np.unique(group[ranked]), seed) if are_new else ranked
    rows = np.union1d(ranked, usual)
    is_ranked, is_usual = np.isin(rows, ranked), np.isin(rows, usual)
    drawn = _reference(others, group, np.random.default_rng(seed))
    share = np.array([len(one) for one in drawn]) / np.maximum(count, 1)
    kth = np.maximum(1, np.rint(neighbours * share)).astype(np.int64)
    work = partial(
        _distances,
        references=[_values(features, one, distance) for one in drawn],
        kth=kth,
        distance=distance,
    )
    values = features if values is None else values
    own = np.full(len(features), -1, np.int64)
    for one in drawn:
        own[one] = np.arange(len(one))
    beside = np.stack([group[rows], own[rows]])
    apart = np.concatenate(row_shards_of(values.take(rows)).beside(beside).map(work))
    middle = _medians(apart[is_usual], group[rows[is_usual]], len(count))
    is_drawn = (share < 1).any()
    if is_drawn:
        farthest = _farthest(_above_usual(apart / middle[group[rows]], group[rows], is_usual), apart)
        farthest = farthest[is_ranked[farthest]][:again]
        places = np.flatnonzero(is_usual)
        some = places[_some(group[rows[places]], seed)]
        both = np.union1d(farthest, some)
        exact = _compared_with_all(values, rows[both], others, group, neighbours, distance)
        true = _medians(exact[np.searchsorted(both, some)], group[rows[some]], len(count))
        apart = np.maximum(apart * (true / middle)[group[rows]], 0)
        apart[farthest], middle = exact[np.searchsorted(both, farthest)], true
    score = apart / middle[group[rows]]
    above = _above_usual(score, group[rows], is_usual)
    order = _farthest(above, score)
    order = order[is_ranked[order]]
    total = sum(map(len, drawn)) if is_drawn else 0
    return Outliers(rows[order], apart[order], score[order], above[order], above[order] > FENCE, unchecked, total)


def _usual_rows(others: Positions, group: Positions, numbers: Positions, seed: int) -> Positions:
    """Some rows of each of these groups, drawn at random, that new images are judged by: their distances are the usual ones."""
    rng = np.random.default_rng(seed)
    most = min(_USUAL, max(_USUAL_LEAST, REFERENCE // len(numbers)))
    found = [others[group[others] == number] for number in numbers]
    return np.sort(np.concatenate([rng.permutation(rows)[:most] for rows in found]))


def _reference(others: Positions, group: Positions, rng: np.random.Generator) -> list[Positions]:
    """Of each group the rows that images are compared with first."""
    groups = int(group.max(initial=0)) + 1
    most = max(_LEAST, REFERENCE // max(1, len(np.unique(group[others][group[others] >= 0]))))
    found = []
    for number in range(groups):
        rows = others[group[others] == number]
        found.append(rows if len(rows) <= most else np.sort(rng.choice(rows, min(most, DRAWN), replace=False)))
    return found


def _values(features: FeatureSet, rows: Positions, distance: str) -> Single:
    values: Single = features.read(np.float32, rows=rows) if len(rows) else np.empty((0, features.shape[1]), np.float32)
    if distance == COSINE:
        return unit_vectors(values)
    refuse_non_finite(values)
    return values


def _distances(
    shard: Blocks, beside: Positions, *, references: Sequence[Single], kth: Positions, distance: str
) -> Doubles:
    """(m,) distance of each row of a shard to the k-th nearest of its group's reference, itself passed over."""
    group, own = beside
    found = np.empty(shard.shape[0])
    compared = {number: _Reference.of(references[number], distance) for number in np.unique(group).tolist()}

    def compare(piece: tuple[slice, Single]) -> Doubles:
        place, block = piece
        values = unit_vectors(block) if distance == COSINE else block
        refuse_non_finite(values)
        apart = np.empty(len(values))
        for number in np.unique(group[place]).tolist():
            inside = np.flatnonzero(group[place] == number)
            apart[inside] = compared[number].kth(values[inside], own[place][inside], int(kth[number]))
        return apart

    with RowThreads(wanted=shard.shape[0] > _BLOCK_ROWS) as threads:
        for (place, _), apart in threads.map(compare, pieces(shard, _BLOCK_ROWS * len(compared), dtype=np.float32)):
            found[place] = apart
    return found


@dataclass(frozen=True)
class _AlongAxes:
    """Rows (r, D) along the principal axes of some of them.

    Attributes:
        axes: (D, 256).
        mean: (256,) of the rows along the axes.
        rows: (r, 257) along the axes, and minus half of their squared lengths by all values; both about the mean.
    """

    axes: Single
    mean: Single
    rows: Single

    @classmethod
    def of(cls, rows: Single) -> _AlongAxes | None:
        axes = Directions.fitted(rows[:: max(1, len(rows) // (4 * _AXES))], _AXES).axes
        if axes is None:
            return None
        mean = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
        away = rows - mean
        halves = np.einsum("ij,ij->i", away, away) / -2
        return cls(axes, mean @ axes, np.column_stack([away @ axes, halves]).astype(np.float32))

    def nearest(self, values: Single, own: Positions) -> list[Positions]:
        """Of each quarter of the rows the (m,) nearest to (m, D) values along the axes, their own (-1 for none) passed over."""
        asked = np.column_stack([values @ self.axes - self.mean, np.ones(len(values), np.float32)])
        near = asked @ self.rows.T
        inside = np.flatnonzero(own >= 0)
        near[inside, own[inside]] = -np.inf
        ends = np.linspace(0, near.shape[1], _PARTS + 1).astype(int).tolist()
        return [first + near[:, first:last].argmax(axis=1) for first, last in pairwise(ends)]


@dataclass(frozen=True)
class _Reference:
    """Rows (r, D) that others are compared with.

    Attributes:
        rows: Unit vectors or features, less the centre if there is one.
        centre: What single precision must take from them; see `common_centre`.
        squares: (r,) their squared lengths, of unit vectors without a centre one.
        distance: ``cosine`` or ``euclidean``.
        quick: What finds the nearest of many rows of many values.
    """

    rows: Single
    centre: Single | None
    squares: Single
    distance: str
    quick: _AlongAxes | None = None

    @classmethod
    def of(cls, rows: Single, distance: str) -> _Reference:
        centre = common_centre(rows)
        if centre is not None:
            rows = rows - centre
        is_plain = distance == COSINE and centre is None
        squares = np.ones(len(rows), np.float32) if is_plain else np.einsum("ij,ij->i", rows, rows)
        many = len(rows) >= DRAWN and rows.shape[1] > 2 * _AXES
        return cls(rows, centre, squares, distance, _AlongAxes.of(rows) if many else None)

    def kth(self, values: Single, own: Positions, kth: int) -> Doubles:
        """(m,) distance of each of (m, D) values to the k-th nearest row, its own (-1 for none) passed over.

        The nearest of many rows is the nearest of four that are so along the principal axes: of most values it is the nearest of
        all, and else hardly farther, for a quarter of the operations.
        """
        if self.centre is not None:
            values = values - self.centre
        is_plain = self.distance == COSINE and self.centre is None
        inside = np.flatnonzero(own >= 0)
        if kth == 1 and self.quick is not None:
            few = self.quick.nearest(values, own)
            apart = np.stack(
                [self.squares[row] - 2 * np.einsum("ij,ij->i", values, self.rows[row]) for row in few], axis=1
            )
        else:
            apart = values @ self.rows.T
            apart *= -2
            apart += self.squares
            apart[inside, own[inside]] = np.inf
        kth = min(kth, apart.shape[1])
        least = apart.min(axis=1) if kth == 1 else np.partition(apart, kth - 1, axis=1)[:, kth - 1]
        squares = np.ones(len(values)) if is_plain else np.einsum("ij,ij->i", values, values)
        positive: Doubles = np.maximum(least.astype(np.float64) + squares, 0)
        return positive / 2 if self.distance == COSINE else np.sqrt(positive)  # of unit vectors: half the square


def _compared_with_all(
    values: Any, rows: Positions, others: Positions, group: Positions, kth: int, distance: str
) -> Doubles:
    """(m,) distance of some rows to the k-th nearest of all others of their group."""
    apart = np.empty(len(rows))
    for number in np.unique(group[rows]):
        inside = np.flatnonzero(group[rows] == number)
        among = others[group[others] == number]
        place = np.searchsorted(among, rows[inside])
        is_there = among[np.minimum(place, len(among) - 1)] == rows[inside]
        queries = values.read(np.float32, rows=rows[inside])
        near = nearest(values.take(among), queries, kth, distance=distance, without=np.where(is_there, place, -1))
        apart[inside] = near.apart[:, kth - 1]
    return apart


def _some(group: Positions, seed: int) -> Positions:
    """Places of some images of each group, drawn at random, whose distances tell what is usual there."""
    rng = np.random.default_rng(seed)
    numbers = np.unique(group)
    most = max(_LEAST, _AGAIN // len(numbers))
    places = [np.flatnonzero(group == number) for number in numbers]
    drawn = [one if len(one) <= most else rng.choice(one, most, replace=False) for one in places]
    return np.sort(np.concatenate(drawn))


def _medians(apart: Doubles, group: Positions, groups: int) -> Doubles:
    """(g,) medians of a group's distances, never zero."""
    middle = np.ones(groups)
    for number in np.unique(group):
        middle[number] = max(float(np.median(apart[group == number])), 1e-9)
    return middle


def _above_usual(score: Doubles, group: Positions, is_usual: npt.NDArray[np.bool_] | None = None) -> Doubles:
    """(n,) interquartile ranges that the logarithm of each score lies above the third quartile of (the usual of) its group."""
    above = np.zeros(len(score))
    logs = np.log(np.maximum(score, 1e-9))
    for number in np.unique(group):
        inside = group == number
        first, third = np.quantile(logs[inside if is_usual is None else inside & is_usual], [0.25, 0.75])
        above[inside] = (logs[inside] - third) / max(third - first, 1e-6)
    return above


def _farthest(above: Doubles, score: Doubles) -> Positions:
    """The order in which images are listed, those of equal rank by their score."""
    return np.lexsort([-score, -above])


def outliers_table(features: FeatureSet, found: Outliers) -> pa.Table:
    """The table of outliers.

    One row an image, the farthest first: ``rank`` from 1, ``id``, ``label``, ``split``, ``distance``, ``score``, ``above``,
    ``outlier``.
    """
    images = features.table.select(["id", "label", "split"]).take(found.rows)
    columns = {
        "rank": pa.array(np.arange(1, len(found.rows) + 1)),
        **{name: images[name] for name in images.column_names},
    }
    how_far = {"distance": found.distance, "score": found.score, "above": found.above, "outlier": found.far}
    return pa.table(columns | how_far)


def _unranked(found: Outliers, by: str, neighbours: int) -> list[str]:
    if not len(found.unchecked):
        return []
    why = f"fewer than {neighbours} others {'of their class' if by == CLASS else ''}".rstrip()
    return [f"{counted(len(found.unchecked), 'image')} could not be ranked: no class, or {why}"]


def _document(features: FeatureSet, values: Blocks, found: Outliers, options: OutliersOptions) -> dict[str, Any]:
    """What the page shows: each image with those that are the nearest to it."""
    rows = found.rows[: min(options.limit or ON_A_PAGE, ON_A_PAGE)]
    near = nearest(values, features.read(np.float32, rows=rows), _NEIGHBOURS, distance=options.distance, without=rows)
    ids, labels = features.ids, features.labels
    groups = []
    for place, row in enumerate(rows):
        kind = "outlier" if found.far[place] else "no outlier"
        far = f"{found.score[place]:.3g} times as far as usual (distance {found.distance[place]:.3g})"
        lines = [*_label(labels[row]), far, f"{kind}: {found.above[place]:.2g} IQR above"]
        shown = [{"id": ids[row], "lines": lines}]
        for other, apart in zip(near.positions[place], near.apart[place], strict=True):
            if other >= 0:
                shown.append({"id": ids[other], "lines": [*_label(labels[other]), f"distance {apart:.3g}"]})
        marked = ": outlier" if found.far[place] else ""
        groups.append({"title": f"{place + 1}. {ids[row]}{marked}", "images": shown})
    of = "their class" if options.by == CLASS else "all others"
    of_any = " of any class" if options.by == CLASS else ""
    how_many = counted(int(found.far.sum()), "outlier")
    paragraphs = [
        f"{how_many} of {counted(len(found.rows), 'image')} of {features.origin.dataset}. Shown are those farthest from {of} by "
        f"the features at {features.named_column}, by the distance to neighbour {options.neighbours} (1 is the nearest).",
        f"{_rule(options.by, options.since)} What is usual is the median.",
        f"Each image is followed by the {_NEIGHBOURS} nearest to it{of_any}. {DISTANCES[options.distance]}",
    ]
    if options.since is not None:
        paragraphs.append(
            f"Only images that are new since {options.since}, compared with the images that were there then."
        )
    if len(rows) < len(found.rows):
        paragraphs.append(f"The first {len(rows)} are shown; a .csv file has all.")
    return {"kind": "images", "version": 1, "title": "Outliers", "paragraphs": paragraphs, "groups": groups}


def _rule(by: str, since: str | None) -> str:
    """Which images are outliers, in a sentence."""
    of = "its class" if by == CLASS else "all"
    of += " that were there before, from each other" if since else ""
    return (
        f"An outlier lies more than {FENCE} IQR above the third quartile of the distances of {of}, in logarithms (Tukey's fence; "
        "IQR is the interquartile range). Images are ranked by how many IQR they lie above it."
    )


def _label(label: str | None) -> list[str]:
    return [] if label is None else [str(label)]


def outliers_text(found: Mapping[str, Any]) -> str:
    """Sums up what `outliers` returns, as plain text."""
    of = "their class" if found["by"] == CLASS else "all others"
    of = f"what was there at {found['since']}" if found["since"] and found["by"] != CLASS else of
    lines = [
        f"{found['dataset']}: {counted(found['count'], 'outlier')} of {counted(found['images'], 'image')}, far from {of} by "
        f"{column_text(found)} ({found['distance']})"
    ]
    if found["copies"]:
        lines.append(f"copies of other images, left out: {found['copies']:,}")
    lines += [f"WARNING: {text}" for text in found["warnings"]]
    rows = [
        [
            one["id"],
            one["label"] or "",
            f"{one['distance']:.4g}",
            f"{one['score']:.3g}",
            f"{one['above']:.2g}",
            "outlier" if one["outlier"] else "",
        ]
        for one in found["outliers"]
    ]
    if rows and not found["count"]:
        lines.append("none is an outlier; these lie farthest:")
    lines += ["", table(["id", "label", "distance", "times the usual", "IQR above", "outlier"], rows)]
    if found["images"] > found["count"]:
        lines.append(_rule(found["by"], found["since"]))
    lines += more_text(found["images"] - len(rows), found["files"], has_limit=True)
    return "\n".join([*lines, *files_text(found["files"])])
