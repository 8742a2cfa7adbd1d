"""Choosing a head's parameters on validation rows or folds; the test rows are never seen here."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import ParameterGrid
from sklearn.pipeline import Pipeline

from featurepipe.display import counted
from featurepipe.execution.executor import Room
from featurepipe.execution.local import LocalExecutor, ProcessExecutor
from featurepipe.heads.families import ROUGH, SHARED_PASSES, SMALL_VALUES
from featurepipe.heads.statistics.regression import quadratic_kappa
from featurepipe.progress import Paced, Progress, beating, duration, spoken, took
from featurepipe.training.fit import constant_columns, features_on, refusals, threads_for
from featurepipe.training.splits import Fold
from featurepipe.training.task import weighted
from featurepipe.training.trials import TrialRows, try_all

if TYPE_CHECKING:
    from featurepipe.store.views import FeatureSet
    from featurepipe.training.task import Recipe, Task

Array = npt.NDArray[Any]

STOPPING = "early_stopping_rounds"
"""A parameter of searches alone: the last fit has no validation rows, and grows as many trees as the search found best."""


AT_ONCE = 3
"""Values of C that are fitted before the first one is judged: the smallest ones take little time, and share passes."""

RULE = (
    f"Values of C are tried from the smallest upwards, {AT_ONCE} at least, until one is perfect there or does worse than the "
    "best by more than a standard error."
)
"""What ``climb`` does, in words."""


def climb(
    strengths: Sequence[float],
    accuracies_of: Callable[[Sequence[float]], Sequence[float]],
    images: int,
    error_of: Callable[[float, int], float] | None = None,
) -> float:
    """The value of C that does best on the images set aside; of equals the smallest, so nothing is tried beyond a perfect one.

    Beyond the best value heads learn the training images by heart, and a fit takes ever longer: on 60,000 images the last
    value took ten times as long as all that mattered. A drop by a standard error of one accuracy is far outside of
    what chance does to the difference of two heads on the same images.

    Args:
        strengths: values of C, ascending.
        accuracies_of: for some of them, the accuracy (or another measure) of each on the images set aside.
        images: how many these are.
        error_of: the standard error of a measure of so many images; by default that of a share.
    """
    error_of = error_of or error_of_a_share
    found = list(accuracies_of(strengths[:AT_ONCE]))
    while len(found) < len(strengths) and max(found) < 1 and found[-1] >= max(found) - error_of(max(found), images):
        found += accuracies_of([strengths[len(found)]])
    return strengths[int(np.argmax(found))]


def error_of_a_share(accuracy: float, images: int) -> float:
    """The standard error of the share of so many images."""
    return math.sqrt(accuracy * (1 - accuracy) / images)


def error_of_r2(value: float, images: int) -> float:
    """That of a ratio whose errors are normal: the logarithm of a sum of n squares has the variance 2 / n."""
    return (1 - value) * math.sqrt(2 / images)


@dataclass(frozen=True)
class Trial:
    """One set of parameters and how it did.

    Attributes:
        params: of the final estimator.
        accuracy: mean over the folds; of numbers the root mean squared error, of several labels the mean average precision, of
            ordered classes the quadratic weighted kappa.
        folds: the same on each fold's validation rows.
        learned: parameters that the fit itself found, such as the number of trees.
        measure: ``accuracy``; ``rmse`` where numbers are learned; ``map``, the mean average precision, of several labels;
            ``quadratic_kappa`` of ordered classes.
    """

    params: Mapping[str, Any]
    accuracy: float
    folds: tuple[float, ...]
    learned: Mapping[str, Any] = field(default_factory=dict)
    measure: str = "accuracy"

    @property
    def rank(self) -> float:
        """What is the greater, the better."""
        return -self.accuracy if self.measure == "rmse" else self.accuracy

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"params": dict(self.params), **self.learned, self.measure: self.accuracy, "folds": list(self.folds)}


@dataclass(frozen=True)
class Search:
    """All trials, in the order of the grid, from simple to flexible."""

    trials: tuple[Trial, ...]
    rows: int
    text: str
    for_each_label: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def best(self) -> Trial:
        """The most accurate trial; of equals the first, which is the simplest."""
        return max(self.trials, key=lambda trial: trial.rank)

    @property
    def params(self) -> dict[str, Any]:
        """What to give to `make_head` for the last fit."""
        found = {**self.best.params, **self.best.learned, **self.for_each_label}
        return {name: v for name, v in found.items() if name != STOPPING}

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"rows": self.rows, "how": self.text, "best": self.params, "trials": [t.as_dict() for t in self.trials]}


def search(task: Task, recipe: Recipe, *, jobs: int, say: Callable[[str], None]) -> Search:
    """Tries the family's grid on the task's validation rows or folds.

    Args:
        task: what was settled.
        recipe: the head; parameters that it sets are not searched.
        jobs: fits at once, where each fits in memory.
        say: told what is tried, every so often how far it is, and how long it took.
    """
    start = time.perf_counter()
    sets, folds, lasts = grid_size(recipe), len(task.folds(recipe.folds)), task.cost.search_seconds
    about = "" if lasts is None else f", about {spoken(lasts)}"
    say(
        f"tuning {recipe.head}: {sets} sets of parameters on {counted(folds, 'fold')}, {counted(sets * folds, 'fit')}{about}"
    )
    with refusals(recipe.head):
        found = _search(task, recipe, jobs, say)
    say(f"tuned in {took(time.perf_counter() - start)}")
    return found


def _search(task: Task, recipe: Recipe, jobs: int, say: Callable[[str], None]) -> Search:
    folds = _thinned(task.folds(recipe.folds), recipe.family.search_rows, task.seed)
    grid = _open_parameters(recipe)
    each: Mapping[str, Sequence[float]] = {}
    told = _Said(len(folds) * grid_size(recipe), say)
    with beating(told):
        if task.is_multilabel and recipe.head in SHARED_PASSES and set(grid) == {"C"}:
            trials, each = _c_for_each_label(task, recipe, folds, grid["C"])
            how = "all in shared passes over the data, the best C chosen for each label"
        elif _shares_passes(task, recipe, folds, grid):
            trials = _in_shared_passes(task, recipe, folds, grid["C"])
            how = "in shared passes over the data"
        else:
            trials, how = _each_by_itself(task, recipe, folds, grid, jobs, told)
    rows = sum(map(len, folds[0]))
    where = f"{len(folds)} folds of {rows:,} images"
    if len(folds) == 1:
        where = f"{len(folds[0][0]):,} images, compared on {len(folds[0][1]):,} of the validation split"
    return Search(tuple(trials), rows, f"{len(trials)} sets of parameters, fitted on {where}; {how}", each)


def _shares_passes(task: Task, recipe: Recipe, folds: Sequence[Fold], grid: Mapping[str, Sequence[Any]]) -> bool:
    """Whether one pass should serve all fits. Small ones are sooner fitted each by itself, if the workers of a cluster can."""
    if (
        task.targets is not None
        or task.is_ordered
        or task.cost.solver != "blocks"
        or recipe.head not in SHARED_PASSES
        or set(grid) != {"C"}
    ):
        return False
    rows, _ = _pool(folds, parts=2)
    small = len(rows) * task.features.shape[1] <= SMALL_VALUES
    return not (small and task.executor.side_by_side(_room(task, recipe, rows, folds)))


def grid_size(recipe: Recipe) -> int:
    """How many sets of parameters a search tries."""
    return len(ParameterGrid(_open_parameters(recipe)))


def few_fits(task: Task, recipe: Recipe) -> tuple[Callable[[int], object], int, int] | None:
    """Fits of a search, of which time is estimated: of so many rows of its first fold, tested on as large a part of the others.

    One with the parameters in the middle of the grid. Of heads with a C two, at a third and at five sixths of the grid, on either
    side of the values that take longest, which are others for other images: a mean of 0.8 to 1.3 of all was recorded.

    Returns:
        What fits, how many fits that is, and how many rows a fit of the search has; None where its fits share passes.
    """
    folds, grid = _thinned(task.folds(recipe.folds), recipe.family.search_rows, task.seed), _open_parameters(recipe)
    has_c = recipe.head in SHARED_PASSES and set(grid) == {"C"}
    if (has_c and task.is_multilabel) or _shares_passes(task, recipe, folds, grid):
        return None
    points = list(ParameterGrid(grid))
    places = [len(points) // 3, 5 * len(points) // 6] if has_c else [len(points) // 2]
    train, check = (np.random.default_rng(task.seed).permutation(part) for part in folds[0])
    _, first = np.unique(task.codes[train], return_index=True)
    blocks, trial = task.cost.solver == "blocks", _boosted if recipe.head == "xgboost" else _plain

    def fit(rows: int) -> object:
        some = np.union1d(train[:rows], train[first])  # every class
        others = np.sort(check[: max(1, round(len(check) * rows / len(train)))])
        pooled, ((learn, test),) = _pool([(some, others)], parts=2)
        features = task.rows(pooled) if blocks else task.features.take(pooled).read(np.float32)
        parts = task.answers(pooled), task.weights(pooled)
        data = Answered(features, *parts) if blocks else (features, *parts)
        heads = _heads(recipe, [points[p] for p in places], out_of_core=blocks, memory=task.cost.budget_bytes)
        with refusals(recipe.head), nullcontext() if blocks else threads_for(features.shape), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the search says it
            return [trial(head, data, learn, test) for head in heads]

    return fit, len(places), len(train)


def _open_parameters(recipe: Recipe) -> dict[str, Sequence[Any]]:
    return {name: values for name, values in recipe.grid.items() if name not in recipe.params}


def _thinned(folds: Sequence[Fold], most: int | None, seed: int) -> list[Fold]:
    """The folds with so many rows at most, drawn at random."""
    rows = sum(map(len, folds[0]))
    if most is None or rows <= most:
        return list(folds)
    keep = np.random.default_rng(seed).random(1 + max(int(part.max()) for fold in folds for part in fold)) < most / rows
    return [(train[keep[train]], check[keep[check]]) for train, check in folds]


def _in_shared_passes(task: Task, recipe: Recipe, folds: Sequence[Fold], values: Sequence[float]) -> list[Trial]:
    from featurepipe.heads import fit_path

    checks = [check for _, check in folds]
    rows, folds = _pool(folds, parts=1)
    features = task.rows(rows)
    *before, (name, last) = steps_of(recipe.make(out_of_core=True, memory=task.cost.budget_bytes))
    last.set_params(**ROUGH)
    # Scaling and PCA see no label, and of several folds all that train in one of them: then the passes can be shared.
    there = features_on(features, task.cost.device)
    ready = Pipeline(before).fit_transform(there) if before else there
    trains, weights = [train for train, _ in folds], task.weights(rows)
    fitted = fit_path(last, ready, features.labels, Cs=values, folds=trains, sample_weight=weights)
    accuracies = []
    for path, check in zip(fitted, checks, strict=True):
        part = task.rows(check)
        labels = part.labels
        accuracies.append([float(np.mean(Pipeline([*before, (name, head)]).predict(part) == labels)) for head in path])
    return [
        Trial({"C": value}, float(np.mean(each)), tuple(each))
        for value, each in zip(values, zip(*accuracies, strict=True), strict=True)
    ]


def _c_for_each_label(
    task: Task, recipe: Recipe, folds: Sequence[Fold], values: Sequence[float]
) -> tuple[list[Trial], Mapping[str, Sequence[float]]]:
    """Trials of one C for all labels, and the C of each label with the best average precision on the folds."""
    from featurepipe.heads.multilabel import tune_labels

    rows, folds = _pool(folds, parts=2)
    blocks = task.cost.solver == "blocks"
    features = task.rows(rows) if blocks else task.features.take(rows).read(np.float32)
    *before, (_, last) = steps_of(recipe.make(out_of_core=blocks, memory=task.cost.budget_bytes))
    features = features_on(features, task.cost.device)
    ready = Pipeline(before).fit_transform(features) if before else features  # which see no label
    found = tune_labels(last, ready, task.answers(rows), Cs=values, folds=folds, sample_weight=task.weights(rows))
    means = [float(np.nanmean(row)) if not np.isnan(row).all() else 0.0 for row in found.average_precision]
    trials = [Trial({"C": C}, mean, (), measure="map") for C, mean in zip(found.Cs, means, strict=True)]
    return trials, {"C": found.C.tolist()}


class _Said(Paced):
    """Says every so often how many fits are done, and about how long the others will take."""

    def __init__(self, fits: int, say: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(fits, "tuning", "fits", every=15.0, clock=clock)
        self._say = say

    def tell(self, rate: float, bottleneck: str) -> None:
        """Says it."""
        left = [f"{duration((self.total - self.done) / rate)} left"] if rate > 0 else []
        self.say(", ".join([self.how_far, *left, *filter(None, [bottleneck])]))

    def say(self, message: str) -> None:
        """Says anything else."""
        self._say(message)


def _each_by_itself(
    task: Task,
    recipe: Recipe,
    folds: Sequence[Fold],
    grid: Mapping[str, Sequence[Any]],
    jobs: int,
    told: Progress,
) -> tuple[list[Trial], str]:
    """The trials, and how they were made: by the workers of a cluster in memory, if that is enough, else here."""
    fit = _boosted if recipe.head == "xgboost" else _plain
    points = list(ParameterGrid(grid))
    rows, places = _pool(folds, parts=2)
    answers = None if task.targets is None else task.targets[rows]
    read: Callable[[], Any] = partial(rows_in_memory, task.features.take(rows), answers)
    room = _room(task, recipe, rows, folds)
    if count := task.executor.side_by_side(room):
        data = TrialRows(task.executor.read_once(read), places, fit, room)
        results = try_all(task.executor, data, _heads(_on_one_core(recipe), points), told)
        how = f"each by itself, {count} at a time on the cluster"
    else:
        blocks, budget = task.cost.solver == "blocks", task.cost.budget_bytes
        if blocks:
            read = partial(Answered, task.rows(rows), task.answers(rows), task.weights(rows))
        count = 1 if blocks else min(jobs, max(1, (budget or 0) // max(1, task.cost.in_memory_bytes)))
        threads = max(1, (os.cpu_count() or 1) // count)
        executor = LocalExecutor() if count == 1 else ProcessExecutor(count, threads=threads)
        data = TrialRows(executor.read_once(read), places, fit)
        heads = _heads(recipe, points, out_of_core=blocks, memory=budget)
        with threads_for((len(rows), task.features.shape[1])) if count == 1 and not blocks else nullcontext():
            results = try_all(executor, data, heads, told)
        how = f"each by itself, {count} at a time"
    each = len(folds)
    measure = "rmse" if task.is_numeric else "map" if task.is_multilabel else "accuracy"
    measure = "quadratic_kappa" if task.is_ordered else measure
    return [_trial(params, results[i * each : (i + 1) * each], measure) for i, params in enumerate(points)], how


def _heads(recipe: Recipe, points: Sequence[Mapping[str, Any]], **options: Any) -> list[BaseEstimator]:
    return [recipe.with_params(point).make(**options) for point in points]


def _on_one_core(recipe: Recipe) -> Recipe:
    """Where fits run beside each other, one of xgboost's must not take all cores."""
    return recipe.with_params({"n_jobs": 1, **recipe.params}) if recipe.head == "xgboost" else recipe


def _room(task: Task, recipe: Recipe, rows: Array, folds: Sequence[Fold]) -> Room:
    """What fits in memory take."""
    width = task.features.shape[1]
    training = max(len(train) for train, _ in folds)
    shared = len(rows) * width * np.dtype(np.float32).itemsize
    return Room(shared, training * width * recipe.family.bytes_per_value)


def _pool(folds: Sequence[Fold], *, parts: int) -> tuple[Array, list[Fold]]:
    """The rows that the first ``parts`` parts of all folds need, and the folds as positions in them."""
    rows = np.unique(np.concatenate([part for fold in folds for part in fold[:parts]]))
    return rows, [(np.searchsorted(rows, train), np.searchsorted(rows, check)) for train, check in folds]


def _trial(params: Mapping[str, Any], outcomes: Sequence[tuple[float, Mapping[str, float]]], measure: str) -> Trial:
    accuracies = tuple(accuracy for accuracy, _ in outcomes)
    learned = {name: round(float(np.mean([found[name] for _, found in outcomes]))) for name in outcomes[0][1]}
    return Trial(params, float(np.mean(accuracies)), accuracies, learned, measure)


def _quality(predicted: Array, answers: Array) -> float:
    """The share of labels that are right; of numbers the root mean squared error."""
    if answers.dtype.kind == "f":
        return float(np.sqrt(np.mean((predicted - answers) ** 2)))
    return float(np.mean(predicted == answers))


def rows_in_memory(features: FeatureSet, answers: Array | None = None) -> tuple[Array, Array, Array | None]:
    """Features (n, D), float32; their labels, or other answers (n,) or (n, K); and weights, if there are any."""
    values, labels = features.numpy()
    return values, np.asarray(labels if answers is None else answers), features.weights  # all rows have labels


class Answered(NamedTuple):
    """Features that are read in blocks, and of their rows the (n,) labels or numbers, and weights, if there are any."""

    features: Any
    answers: Array
    weights: Array | None


def _plain(head: BaseEstimator, data: Any, train: Array, check: Array) -> tuple[float, dict[str, float]]:
    features, answers, weights = _part(data, train)
    others, truth, _ = _part(data, check)
    with constant_columns():
        if answers.ndim == 2:
            return _mean_average_precision(head, (features, answers), weights, others, truth), {}
        head.fit(features, answers, **weighted(head, weights))
    order = getattr(steps_of(head)[-1][1], "order", None)
    return _quality(head.predict(others), truth) if order is None else _kappa(head.predict(others), truth, order), {}


def _kappa(predicted: Array, truth: Array, order: Sequence[str]) -> float:
    """The quadratic weighted kappa of ordered classes; 0 where one class is true and predicted throughout, which says nothing."""
    places = {name: place for place, name in enumerate(order)}
    codes = [np.array([places[name] for name in names.tolist()]) for names in (truth, predicted)]
    found = quadratic_kappa(codes[0], codes[1], len(order))
    return 0.0 if np.isnan(found) else found


def _mean_average_precision(
    head: BaseEstimator, rows: tuple[Any, Array], weights: Array | None, others: Any, truth: Array, **more: Any
) -> float:
    """Of a head for several labels on other rows; labels without rows of both sides are left out on either.

    ``more`` are further arguments of ``head.fit``.
    """
    from featurepipe.heads.statistics.multilabel import average_precisions

    steps_of(head)[-1][1].set_params(one_sided="drop")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "left out", UserWarning)  # only here, where parameters are compared
        head.fit(*rows, **weighted(head, weights), **more)
    found = average_precisions(head.decision_function(others), truth[:, head.classes_])
    return 0.0 if np.isnan(found).all() else float(np.nanmean(found))


def _boosted(head: BaseEstimator, data: Any, train: Array, check: Array) -> tuple[float, dict[str, float]]:
    """Fits trees until the validation loss stops falling, and learns how many that took."""
    *before, (_, last) = steps_of(head)
    features, labels, weights = _part(data, train)
    checked, expected, _ = _part(data, check)
    for _, step in before:
        features, checked = step.fit_transform(features), step.transform(checked)
    if labels.ndim == 2:
        nothing = np.isnan(expected).all(axis=0)  # of such a label nobody can say when to stop
        rows = features, np.where(nothing, np.nan, labels)
        found = _mean_average_precision(last, rows, weights, checked, expected, eval_set=(checked, expected))
        return found, {"n_estimators": last.best_iteration_ + 1}
    last.fit(features, labels, eval_set=(checked, expected), **weighted(last, weights))
    return _quality(last.predict(checked), expected), {"n_estimators": last.best_iteration_ + 1}


def _part(data: Any, rows: Array) -> tuple[Any, Array, Array | None]:
    features, answers, weights = data
    part = features.take(rows) if isinstance(data, Answered) else features[rows]
    return part, answers[rows], None if weights is None else weights[rows]


def steps_of(head: BaseEstimator) -> list[tuple[str, BaseEstimator]]:
    """The named steps of a pipeline, or the one estimator as its only step."""
    return list(head.steps) if isinstance(head, Pipeline) else [("head", head)]
