"""Labels that look wrong: judged by heads that have not learned from them, ranked, with what the label should perhaps be."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from sklearn.pipeline import Pipeline

from featurepipe.curation.options import ON_A_PAGE, CheckLabelsOptions
from featurepipe.curation.question import DISTANCES, Question, column_text, files_text, more_text
from featurepipe.display import counted, table
from featurepipe.errors import UsageError, pip_install
from featurepipe.execution.local import features_at
from featurepipe.features.options import Places, places
from featurepipe.heads import fit_path
from featurepipe.heads.blocks import Blocks, iterate
from featurepipe.heads.families import make_head
from featurepipe.heads.row_shards import concatenated, remote_row_shards, row_shards_of
from featurepipe.heads.sampling import ALWAYS_TRAIN
from featurepipe.monitoring.near import nearest
from featurepipe.progress import show, spoken
from featurepipe.results import shown_as
from featurepipe.store import FeatureSet, FeatureStore
from featurepipe.store.locks import starts_again
from featurepipe.store.options import RoleOptions, columns_of, is_file_of_groups
from featurepipe.training.cost import available_memory, seconds_of, time_of
from featurepipe.training.splits import dealt
from featurepipe.training.task import weighted

STRENGTH = 0.01
"""The inverse regularisation C of the logistic heads: strong, so that a head does not bend to the labels that are wrong."""
_FEW = (
    16.0  # C for one image, divided among fewer than 1,600 of them: else so few would hardly count against the penalty
)
TOLERANCE = 1e-4
"""How far the objective of a logistic head may be above its minimum, relative to it (docs/decisions/label-fits.md)."""
FAR = 3.5
"""A number is suspect from a modified z-score of its residual (Iglewicz & Hoaglin 1993, "How to Detect and Handle Outliers")."""
_NORMAL = 0.6745  # of a normal distribution, the median absolute deviation in standard deviations
_NEIGHBOURS = 5
_CLASSES = 10  # that a dry run names

Array = npt.NDArray[Any]
Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Suspects:
    """What out-of-fold predictions say of the labels of n rows.

    Attributes:
        rows: (s,) suspect rows, the most suspect first; of several labels a row may be there more than once.
        score: (s,) from 0, surely wrong, to 1; of numbers the modified z-score of the residual, without an upper bound.
        given: (s,) the label as text.
        suggested: (s,) what it should perhaps be.
        label: (s,) which of several labels is meant; empty for classes and numbers.
        unchecked: (u,) labelled rows that no head could judge: the only ones of their class.
    """

    rows: Positions
    score: npt.NDArray[np.float64]
    given: list[str]
    suggested: list[str]
    label: list[str]
    unchecked: Positions


@shown_as("labels")
@starts_again
def labels(
    store: FeatureStore | str | PathLike[str],
    *,
    folds: int = 5,
    limit: int | None = 100,
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
    group: str | None = None,
    target: str | None = None,
    multilabel: str | Sequence[str] | None = None,
    weight: str | None = None,
    dry_run: bool = False,
    cluster: Any = None,
    silent: bool = False,
) -> dict[str, Any]:
    """Finds labels that look wrong.

    Each image is judged by a head that has learned from other images, never from a copy of it or another of its group.
    Classes: confident learning (Northcutt, Jiang & Chuang 2021, "Confident Learning: Estimating Uncertainty in Dataset
    Labels"; cleanlab, pruning by noise rate) on the probabilities of a logistic regression, of features standardised by all
    images. Its objective is within 1e-4 of its minimum, which decides fewer suspects than the draw of the folds does. Several
    labels: the same for each label by itself. Numbers: those whose residual under a ridge regression is an outlier (modified
    z-score above 3.5).

    Args:
        store: The feature store or its path.
        folds: Parts of the images, each judged by a head fitted on the others.
        limit: The most suspects to list, in the result, as text and on a page (there up to 1,000); None for all.
        seed: Of the folds.
        dataset: Name of the dataset; by default the store's only one.
        split: Only labels of this split; by default of all images.
        node: The column that heads learn from.
        backbone: Of which network, space or fingerprint.
        snapshot: Run id of the snapshot whose images are meant; by default the current one.
        to: A page with thumbnails and neighbours (``.html``), or a file to correct (``.csv``, ``.jsonl``, ``.parquet``): every
            image, of all splits, suspects first, with the columns that were asked for. What is in its column of labels counts
            when it is given to ``labels=`` of any command. Or several such files.
        raw_ids: Whether texts of a CSV file that a spreadsheet would take for formulas stay as they are.
        source: The dataset's images, for thumbnails; by default where they were extracted from.
        only_under: As in `featurepipe.report`.
        path_column: As in `featurepipe.extract`.
        box: As in `featurepipe.extract`.
        box_unit: As in `featurepipe.extract`.
        box_margin: As in `featurepipe.extract`.
        images: As in `featurepipe.extract`.
        frames: As in `featurepipe.extract`.
        labels: A mapping or file to check instead of the dataset's labels.
        label: The column of the class.
        split_column: The column of the splits.
        group: The column of what belongs together.
        target: The column of a number to check instead of classes.
        multilabel: The columns of several labels to check instead of classes.
        weight: The column of how much each image counts while heads are fitted.
        dry_run: Say what would be fitted, and how long it takes by fits on some of the images; write nothing.
        cluster: Where to fit and judge instead of here, as `featurepipe.execution.connect` takes it.
        silent: Say nothing on standard error.

    Returns:
        JSON values. ``dataset``, ``snapshot``, ``column``, ``bottleneck`` (its node, if known),
        ``space``, ``kind`` (``multiclass``, ``multilabel`` or
        ``continuous``), ``images`` (checked), ``unlabelled``, ``unchecked`` (the only ones of their class), ``count`` (of
        suspects), ``suspects``: a list of ``id``, ``given``, ``suggested``, ``score``, of several labels ``label``, the most
        suspect first; ``file`` (the first), ``files``, ``options``, ``warnings``, ``seconds``. With ``dry_run`` instead of what
        was found ``classes`` (or labels, where present; of numbers none) with the images of each, ``folds``, ``fits``, ``rows``
        of each fit, ``width`` of the features, and ``expected_seconds`` (null on a cluster).

    Raises:
        UsageError: There are no labels, or of one class only; a column is unknown; or cleanlab is not installed.
        StoreError: Features of some images are missing.
        ClusterError: There is no such cluster.
    """
    options = CheckLabelsOptions(
        folds=folds, limit=limit, seed=seed, dataset=dataset, split=split, node=node, backbone=backbone, snapshot=snapshot,
        to=places(to), raw_ids=raw_ids, source=source, only_under=places(only_under), path_column=path_column, box=box,
        box_unit=box_unit, box_margin=box_margin, images=None if images is None else str(images), frames=frames,
        labels=labels, label=label, split_column=split_column, group=group, target=target,
        multilabel=columns_of(multilabel) or None, weight=weight,
    )  # fmt: skip
    if target is None:
        _label_issues()  # before a store is opened in vain
    question = Question.of(store, options, "labels", silent=silent)
    whole = question.rows(RoleOptions.of(options), labels, None)
    every = whole if split is None else whole.select(split=split)
    known = every.select(labelled=True)
    if dry_run:
        found = question.told(
            dry_run=True, kind=RoleOptions.of(options).target_type, images=len(known), unlabelled=len(every) - len(known),
            **planned(known, folds=folds, seed=seed, timed=cluster is None),
        )  # fmt: skip
        return {**found, "file": None, "files": []}
    question.say(f"checking the labels of {counted(len(known), 'image')} by {known.named_column}, in {folds} folds")
    with features_at(cluster, known, question.store, question.say) as there:
        with show(folds * (len(known.target_names) or 1), "fit", unit="heads", silent=silent) as progress:
            suspects = find_suspects(known, there, folds=folds, seed=seed, done=lambda: progress.advance(1))
        warnings = _unchecked(suspects)
        warnings += question.written(
            lambda: to_correct(whole, known, suspects, options), lambda: _document(known, there, suspects, limit)
        )
    return question.told(
        kind=RoleOptions.of(options).target_type,
        images=len(known) - len(suspects.unchecked),
        unlabelled=len(every) - len(known),
        unchecked=len(suspects.unchecked),
        count=len(suspects.rows),
        suspects=_listed(known, suspects, limit),
        warnings=warnings,
    )


def find_suspects(
    features: FeatureSet, values: Any = None, *, folds: int = 5, seed: int = 0, done: Callable[[], object] = bool
) -> Suspects:
    """Finds suspect labels, numbers or classes of labelled rows; see `labels`.

    Args:
        features: n labelled rows.
        values: Their features as heads read them, such as spread over a cluster; by default ``features``.
        folds: Parts, each judged by a head fitted on the others.
        seed: Of the folds.
        done: Called after each fit.

    Raises:
        UsageError: There are fewer than two classes, or fewer rows than folds.
    """
    _check(features, folds)
    values = features if values is None else values
    if features.targets is None:
        return _suspect_classes(features, values, folds, seed, done)
    if features.target_names:
        return _suspect_labels(features, values, folds, seed, done)
    return _suspect_numbers(features, values, folds, seed, done)


def _check(features: FeatureSet, folds: int) -> None:
    """Refuses labels that cannot be judged."""
    if len(features) < 2 * folds:
        raise UsageError(
            f"{counted(len(features), 'labelled image')} are too few to be judged in {folds} parts; label more of them, or give "
            "labels of your own"
        )
    classes = features.classes
    if features.targets is None and len(classes) < 2:
        raise UsageError(
            f"every label of dataset {features.origin.dataset} is {classes[0]!r}: there is nothing to tell apart"
        )
    if features.targets is None or features.target_names:
        _label_issues()  # before heads are fitted in vain


LEVEL_ROWS = 12_000
"""Up to so many rows the heads of all folds take about as long as on a third of them, which need more passes; beyond, each row
takes its share."""


def planned(features: FeatureSet, *, folds: int = 5, seed: int = 0, timed: bool = True) -> dict[str, Any]:
    """What `find_suspects` would fit on labelled rows, and about how many seconds that takes here, by fits on some of them.

    Raises:
        UsageError: As `find_suspects` does.
    """
    _check(features, folds)
    rows, targets = len(features) * (folds - 1) // folds, features.targets
    drawn = np.random.default_rng(seed).permutation(len(features))
    counts: dict[str, int] = {}
    if targets is None:
        codes = features.codes()
        counts = dict(zip(features.classes, np.bincount(codes).tolist(), strict=True))
    elif features.target_names:
        counts = dict(zip(features.target_names, (np.asarray(targets) == 1).sum(axis=0).tolist(), strict=True))
        fullest = np.asarray(targets)[:, int(np.argmax(list(counts.values())))]
        drawn, codes = drawn[~np.isnan(fullest[drawn])], np.nan_to_num(fullest).astype(np.int64)
    if counts:
        of_each = drawn[np.unique(codes[drawn], return_index=True)[1]]  # so that few rows have every class, too

    def fit(count: int) -> object:
        if not counts:
            return _fitted_to_numbers(features, features, np.sort(drawn[:count]), np.asarray(targets, np.float64))
        some = np.union1d(of_each, drawn[:count])
        fold = np.where(np.isin(some, of_each), ALWAYS_TRAIN, np.arange(len(some)) % folds)
        part = features.take(some)
        return _out_of_fold(part, part, codes[some], fold, int(codes.max()) + 1)

    if timed:
        fit(2)  # loads what fits, which would be taken for the time of the first of those that are timed
    fits = folds * (len(features.target_names) or 1)
    seconds = None  # no estimate is better
    if timed and counts:
        some = min(len(drawn) // 3, LEVEL_ROWS)
        seconds = fits / folds * seconds_of(fit, some) * max(len(drawn) / LEVEL_ROWS, 1.0)
    elif timed:
        seconds = fits * time_of(fit, rows, steepest=1)
    return {
        "classes": counts, "folds": folds, "fits": fits, "rows": rows, "width": features.shape[1],
        "expected_seconds": None if seconds is None else float(f"{seconds:.2g}"),
    }  # fmt: skip


def _suspect_classes(features: FeatureSet, values: Any, folds: int, seed: int, done: Callable[[], object]) -> Suspects:
    classes = features.classes
    codes = features.codes(classes)
    fold = dealt(features, codes, np.arange(len(codes)), folds=folds, seed=seed)
    probabilities = _out_of_fold(features, values, codes, fold, len(classes))
    for _ in range(folds):
        done()
    is_judged = ~np.isnan(probabilities[np.arange(len(codes)), codes])
    probabilities = np.nan_to_num(probabilities, copy=False)
    judged = np.flatnonzero(is_judged)
    rows, score = _confident(codes[judged], probabilities[judged])
    rows = judged[rows]
    suggested = [classes[code] for code in probabilities[rows].argmax(axis=1)]
    given = [classes[code] for code in codes[rows]]
    return Suspects(rows, score, given, suggested, [""] * len(rows), np.flatnonzero(~is_judged))


def _out_of_fold(
    features: FeatureSet, values: Any, codes: Array, fold: Positions, classes: int
) -> npt.NDArray[np.float64]:
    """(n, K) probabilities of each row's classes by a head that has learned from the other folds; NaN of classes it has not seen.

    Features are scaled by mean and deviation of all rows, which tell nothing of labels, so that heads share passes.

    Args:
        features: n rows.
        values: Their features as heads read them.
        codes: (n,) classes.
        fold: (n,) numbers; rows of a negative one are learned from by all heads, and judged by none.
        classes: K.
    """
    numbers = np.unique(fold[fold >= 0])
    if not len(numbers):
        return np.full((len(codes), classes), np.nan)
    memory = available_memory() // 2 if remote_row_shards(values) is None else None
    C = _strength(round(float(np.mean([np.count_nonzero(fold != number) for number in numbers]))))
    *before, (_, last) = make_head("logistic", C=C, out_of_core=True, memory=memory).steps
    scaled = Pipeline(before).fit_transform(values)
    paths = fit_path(
        last.set_params(tol=TOLERANCE), scaled, codes, Cs=[C], folds=[fold != number for number in numbers],
        sample_weight=features.weights, overlapping=True,
    )  # fmt: skip
    heads = {int(number): head for number, [head] in zip(numbers, paths, strict=True)}
    work = partial(_judgements, heads=heads, classes=classes)
    return concatenated(row_shards_of(scaled).beside(fold).map(work))


def _judgements(blocks: Blocks, fold: Positions, *, heads: Mapping[int, Any], classes: int) -> npt.NDArray[np.float64]:
    """(m, K) probabilities of the rows of a shard, each by the head of its fold."""
    found = np.full((len(fold), classes), np.nan)
    for place, block in iterate(blocks):
        for number, head in heads.items():
            inside = np.flatnonzero(fold[place] == number)
            if len(inside):
                found[np.ix_(place.start + inside, head.classes_)] = head.predict_proba(block[inside])
    return found


def _fitted_to_numbers(features: FeatureSet, values: Any, rows: Positions, numbers: npt.NDArray[np.float64]) -> Any:
    head = make_head("ridge", target_type="continuous", alpha=1 / _strength(len(rows)), out_of_core=True)
    weights = features.weights
    return head.fit(values.take(rows), numbers[rows], **weighted(head, None if weights is None else weights[rows]))


def _strength(rows: int) -> float:
    return max(STRENGTH, _FEW / rows)


def _label_issues() -> Callable[..., Any]:
    """What cleanlab prunes with.

    Raises:
        UsageError: It is not installed.
    """
    try:
        from cleanlab.filter import find_label_issues
    except ModuleNotFoundError as error:
        raise UsageError(f"labels are checked with cleanlab; run: {pip_install('labels')}") from error
    found: Callable[..., Any] = find_label_issues
    return found


def _confident(codes: Array, probabilities: npt.NDArray[np.float64]) -> tuple[Positions, npt.NDArray[np.float64]]:
    """Confident learning: suspect rows, the most suspect first, and the probability that each label is right."""
    used, numbers = np.unique(codes, return_inverse=True)
    if len(used) < 2:
        return np.empty(0, np.int64), np.empty(0)
    among = probabilities[:, used]
    among = among / among.sum(axis=1, keepdims=True)
    rows = _label_issues()(numbers, among, return_indices_ranked_by="self_confidence", n_jobs=1)
    rows = np.asarray(rows, np.int64)
    rows = rows[among[rows].argmax(axis=1) != numbers[rows]]  # a label that is also the most probable one is no suspect
    score = probabilities[rows, codes[rows]]
    order = np.argsort(score, kind="stable")
    return rows[order], score[order]


def _suspect_labels(features: FeatureSet, values: Any, folds: int, seed: int, done: Callable[[], object]) -> Suspects:
    """Each label by itself: confident learning of present against absent, among rows where it is known."""
    targets = np.asarray(features.targets)
    parts: list[tuple[int, float, str, str, str]] = []
    checked = np.zeros(len(features), np.bool_)
    for place, name in enumerate(features.target_names):
        known = np.flatnonzero(~np.isnan(targets[:, place]))
        codes = targets[known, place].astype(np.int64)
        some, read = features.take(known), values.take(known)
        fold = dealt(some, codes, np.arange(len(codes)), folds=folds, seed=seed)
        for number in range(folds):
            if len(np.unique(codes[fold != number])) < 2:
                fold[fold == number] = ALWAYS_TRAIN  # nobody can judge these
            done()
        judged = np.flatnonzero(fold >= 0)
        probabilities = _out_of_fold(some, read, codes, fold, 2)
        checked[known[judged]] = True
        rows, score = _confident(codes[judged], probabilities[judged])
        words = ("absent", "present")
        parts += [
            (int(known[judged[row]]), float(one), words[codes[judged[row]]], words[1 - codes[judged[row]]], name)
            for row, one in zip(rows, score, strict=True)
        ]
    parts.sort(key=lambda part: (part[1], part[0]))
    return Suspects(
        np.array([part[0] for part in parts], np.int64),
        np.array([part[1] for part in parts], np.float64),
        given=[part[2] for part in parts],
        suggested=[part[3] for part in parts],
        label=[part[4] for part in parts],
        unchecked=np.flatnonzero(~checked),
    )


def _suspect_numbers(features: FeatureSet, values: Any, folds: int, seed: int, done: Callable[[], object]) -> Suspects:
    numbers = np.asarray(features.targets, np.float64)
    every = np.zeros(len(numbers), np.int64)
    fold = dealt(features, every, np.arange(len(numbers)), folds=folds, seed=seed)
    predicted = np.full(len(numbers), np.nan)
    for number in range(folds):
        test, train = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        if len(test) and len(train):
            predicted[test] = _fitted_to_numbers(features, values, train, numbers).predict(values.take(test))
        done()
    judged = np.flatnonzero(~np.isnan(predicted))
    residual = np.abs(predicted[judged] - numbers[judged])
    middle = max(float(np.median(residual)), np.finfo(np.float64).tiny)
    score = _NORMAL * residual / middle
    order = np.argsort(-score, kind="stable")
    order = order[score[order] > FAR]
    rows = judged[order]
    given, suggested = ([f"{value:.6g}" for value in side[rows]] for side in (numbers, predicted))
    return Suspects(rows, score[order], given, suggested, [""] * len(rows), np.flatnonzero(np.isnan(predicted)))


def _unchecked(suspects: Suspects) -> list[str]:
    count = len(suspects.unchecked)
    return [f"{counted(count, 'label')} could not be judged: no other image, or group, has the same"] if count else []


def _listed(features: FeatureSet, suspects: Suspects, limit: int | None) -> list[dict[str, Any]]:
    ids = features.table["id"].take(suspects.rows[:limit]).to_pylist()
    found = []
    for place, id_ in enumerate(ids):
        which = {"label": suspects.label[place]} if suspects.label[place] else {}
        said = {"given": suspects.given[place], "suggested": suspects.suggested[place]}
        found.append({"id": id_, **which, **said, "score": float(suspects.score[place])})
    return found


def to_correct(every: FeatureSet, known: FeatureSet, suspects: Suspects, options: CheckLabelsOptions) -> pa.Table:
    """Every image with its label, suspects first: what ``--labels`` takes once the labels are corrected.

    Args:
        every: All images, unlabelled ones among them.
        known: The labelled ones, which the suspects are rows of.
        suspects: What was found.
        options: The columns of the labels, which the table's columns are called by.
    """
    first: dict[str, int] = {}
    ids = known.table["id"].take(suspects.rows).to_pylist()
    for place, id_ in enumerate(ids):
        first.setdefault(id_, place)
    every_id = every.table["id"].to_pylist()
    at = {id_: row for row, id_ in enumerate(every_id)}
    order = [at[id_] for id_ in first] + [row for row, id_ in enumerate(every_id) if id_ not in first]
    several: dict[str, list[int]] = {}
    for place, id_ in enumerate(ids):
        several.setdefault(id_, []).append(place)
    rows = [several.get(every_id[row], []) for row in order]
    columns: dict[str, Any] = {
        "id": [every_id[row] for row in order],
        **_labels_of(ordered := every.take(np.array(order)), options),
        **_roles_of(ordered, options),
    }
    columns["suspect"] = [bool(places) for places in rows]
    columns["suggested"] = ["; ".join(_suggestion(suspects, place) for place in places) or None for places in rows]
    columns["suspect_score"] = [float(suspects.score[places[0]]) if places else None for places in rows]
    return pa.table(columns)


def _roles_of(features: FeatureSet, options: CheckLabelsOptions) -> dict[str, Any]:
    """The other columns that were asked for, by their names, since the file takes the place of the one that has them."""
    asked = {"group": options.group, "split": options.split_column, "weight": options.weight}
    names = features.table.column_names
    return {
        name: features.table[role]
        for role, name in asked.items()
        if name is not None and role in names and name.lower() != "none" and not is_file_of_groups(name)
    }


def _suggestion(suspects: Suspects, place: int) -> str:
    which = f"{suspects.label[place]} " if suspects.label[place] else ""
    return f"{which}{suspects.suggested[place]}"


def _labels_of(features: FeatureSet, options: CheckLabelsOptions) -> dict[str, Any]:
    """The columns of labels, under the names by which they were asked for."""
    if features.targets is None:
        return {options.label or "label": features.table["label"]}
    if not features.target_names:
        return {str(options.target): pa.array(features.targets, from_pandas=True)}
    matrix = np.asarray(features.targets)
    asked = options.multilabel or ()
    names = np.array(features.target_names, object)
    if len(asked) == 1 and names[0].casefold() != asked[0].casefold():  # one column of texts such as red|round
        are_listed = any(set(name) & set("|;,[") or name.casefold() == "none" for name in names)
        rows = (None if np.isnan(row).all() else names[row == 1].tolist() for row in matrix)
        return {
            asked[0]: pa.array(
                [None if labels is None else _labels_text(labels, are_listed=are_listed) for labels in rows],
                pa.string(),
            )
        }
    return {
        name: pa.array(matrix[:, place], pa.float32(), from_pandas=True).cast(pa.int8())
        for place, name in enumerate(features.target_names)
    }


def _labels_text(labels: Sequence[str], *, are_listed: bool) -> str:
    """The labels of an image as ``--multilabel`` reads them: ``none`` is not the same as nothing, which is not known."""
    return json.dumps(labels, ensure_ascii=False) if are_listed else "|".join(labels) or "none"


def _document(features: FeatureSet, values: Blocks, suspects: Suspects, limit: int | None) -> dict[str, Any]:
    """What the page shows: each suspect with the images that are the nearest to it, and their labels."""
    rows = suspects.rows[: min(limit or ON_A_PAGE, ON_A_PAGE)]
    near = nearest(values, features.read(np.float32, rows=rows), _NEIGHBOURS, without=rows) if len(rows) else None
    ids, shown = features.ids, _shown_labels(features)
    groups = []
    for place, row in enumerate(rows):
        which = f"{suspects.label[place]} " if suspects.label[place] else ""
        lines = [f"given: {which}{suspects.given[place]}", f"perhaps: {which}{suspects.suggested[place]}"]
        images = [{"id": ids[row], "lines": [*lines, f"score {suspects.score[place]:.3g}"]}]
        for other, apart in zip(near.positions[place], near.apart[place], strict=True) if near else ():
            if other >= 0:
                images.append({"id": ids[other], "lines": [shown[other], f"distance {apart:.3g}"]})
        groups.append({"title": f"{place + 1}. {ids[row]}", "images": images})
    is_number = features.targets is not None and not features.target_names
    noun = "number" if is_number else "label"
    several = f"{counted(len(suspects.rows), noun)} of {counted(len(features), 'image')}"
    counts = f"{several} of {features.origin.dataset} look wrong"
    kind, score = ("a ridge regression", _FAR_OFF) if is_number else ("a logistic regression", _IMPROBABLE)
    paragraphs = [
        f"{counts}: each image was judged by {kind} on the features at {features.named_column} that was fitted without it.",
        f"{score} Some {noun}s may be right, and the image unusual.",
        f"Each image is followed by the {_NEIGHBOURS} nearest to it, with their {noun}s. {DISTANCES['cosine']}",
    ]
    if len(rows) < len(suspects.rows):
        paragraphs.append(f"The first {len(rows)} are shown, the most suspect first; a .csv file has all.")
    return {"kind": "images", "version": 1, "title": f"Suspect {noun}s", "paragraphs": paragraphs, "groups": groups}


_IMPROBABLE = "The score is the probability that was given to the label as it is: the lower, the more suspect."
_FAR_OFF = f"The score is the modified z-score of the residual, above {FAR}: the higher, the more suspect."


def _shown_labels(features: FeatureSet) -> list[str]:
    targets = features.targets
    if targets is None:
        return [str(label) for label in features.labels]
    if not features.target_names:
        return [f"{value:.6g}" for value in targets]
    names = np.array(features.target_names, object)
    return [" + ".join(names[row == 1]) or "none" for row in targets]


def plan_text(found: Mapping[str, Any]) -> str:
    """What ``featurepipe labels --dry-run`` prints."""
    counts = found["classes"]
    shown = ", ".join(f"{name} ({count:,})" for name, count in list(counts.items())[:_CLASSES])
    more = f", and {len(counts) - _CLASSES:,} more" if len(counts) > _CLASSES else ""
    noun = "labels" if found["kind"] == "multilabel" else "classes"
    without = f"; {counted(found['unlabelled'], 'image')} without one, left out" if found["unlabelled"] else ""
    seconds = found["expected_seconds"]
    how_long = "whose time is not estimated on a cluster" if seconds is None else f"about {spoken(seconds)}"
    return "\n".join([
        f"{found['dataset']}: the labels of {counted(found['images'], 'image')} by {column_text(found)}{without}",
        f"{len(counts):,} {noun}: {shown}{more}" if counts else "numbers",
        f"{counted(found['fits'], 'fit')} on {found['rows']:,} x {found['width']:,} features, in {found['folds']} folds: "
        f"{how_long}",
        "dry run: nothing was checked or written",
    ])  # fmt: skip


def count_text(found: Mapping[str, Any]) -> str:
    """How many labels, or numbers, look wrong; an image may have several labels."""
    if found["kind"] == "multilabel":
        return f"{counted(found['count'], 'label')} of {counted(found['images'], 'image')} look wrong"
    noun = "numbers" if found["kind"] == "continuous" else "labels"
    return f"{found['count']:,} of {found['images']:,} {noun} look wrong"


def labels_text(found: Mapping[str, Any]) -> str:
    """Sums up what `labels` returns, as plain text."""
    lines = [f"{found['dataset']}: {count_text(found)}, by {column_text(found)}"]
    if found["unlabelled"]:
        lines.append(f"{counted(found['unlabelled'], 'image')} without a label, not checked")
    lines += [f"WARNING: {text}" for text in found["warnings"]]
    if found["suspects"]:
        which = ["label"] if "label" in found["suspects"][0] else []
        header = ["id", *which, "given", "suggested", "score"]
        rows = [[*(one[name] for name in header[:-1]), f"{one['score']:.3g}"] for one in found["suspects"]]
        lines += ["", table(header, rows)]
    lines += more_text(found["count"] - len(found["suspects"]), found["files"], "to be corrected", has_limit=True)
    return "\n".join([*lines, *files_text(found["files"])])
