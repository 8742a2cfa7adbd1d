"""One column on one fold: parameters chosen on images set aside from training, then the measure on the test images.

The measure is the accuracy where images have classes, the mean average precision where they have several labels, and R2 where a
number is estimated. All are kept as contributions of the images, whose mean is the measure
(`featurepipe.heads.statistics.comparison`).
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Ridge
from sklearn.model_selection import ParameterGrid
from sklearn.preprocessing import StandardScaler

from featurepipe.heads.calibration import label_scores, predicted_numbers
from featurepipe.heads.families import FAMILIES, HEADS, ROUGH, SHARED_PASSES, SMALL_VALUES, HeadFamily, make_head
from featurepipe.heads.preprocessing import RowSpace
from featurepipe.heads.statistics.comparison import ACCURACY, MAP, R2
from featurepipe.heads.statistics.multilabel import map_contributions
from featurepipe.heads.statistics.regression import r2_contributions
from featurepipe.training.tuning import climb, error_of_a_share, error_of_r2

if TYPE_CHECKING:
    from featurepipe.layer_depth.folds import Fold
    from featurepipe.store import FeatureSet


Array = npt.NDArray[Any]
Codes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Measure:
    """What heads are compared by.

    Attributes:
        name: as results have it.
        answers: what a fitted head says of (n, D) features.
        contributions: (n,) of the images to the measure, from answers and truth; whether each is right, of an accuracy.
        besides: further measures, from answers and truth; None for none.
        error: the standard error of a measure of so many images, where nothing is known but the measure.
    """

    name: str
    answers: Callable[[Any, Any, int], Array]
    contributions: Callable[[Array, Array], Array]
    besides: Callable[[Array, Array], dict[str, float]] | None
    error: Callable[[float, int], float]


def _classes_said(head: Any, features: Any, _labels: int) -> Array:
    return np.asarray(head.predict(features))


def _are_right(said: Array, truth: Array) -> Array:
    return np.asarray(said == truth)


def _scores_said(head: Any, features: Any, labels: int) -> Array:
    """(n, K) scores; one and the same of all images for a label that the head could not learn."""
    found = np.zeros((features.shape[0], labels))
    found[:, np.asarray(head.classes_, np.int64)] = np.nan_to_num(label_scores(head, features))
    return found


def _numbers_said(head: Any, features: Any, _labels: int) -> Array:
    return predicted_numbers(head, features)


def _f1_besides(scores: Array, truth: Array) -> dict[str, float]:
    """The mean over labels with known images of both sides of the F1 of positive scores."""
    has, lacks, says = truth == 1, truth == 0, (scores > 0) & ~np.isnan(truth)
    kept = has.any(axis=0) & lacks.any(axis=0)
    if not kept.any():
        return {}
    each = 2 * (says & has).sum(axis=0)[kept] / (has.sum(axis=0) + says.sum(axis=0))[kept]
    return {"macro_f1": float(each.mean())}


def _errors_besides(predicted: Array, truth: Array) -> dict[str, float]:
    errors = predicted - truth
    return {"rmse": float(np.sqrt((errors**2).mean())), "mae": float(np.abs(errors).mean())}


MEASURES: Mapping[str, Measure] = {
    "multiclass": Measure(ACCURACY, _classes_said, _are_right, None, error_of_a_share),
    "multilabel": Measure(MAP, _scores_said, map_contributions, _f1_besides, error_of_a_share),
    "continuous": Measure(R2, _numbers_said, r2_contributions, _errors_besides, error_of_r2),
}
"""The measure for each type of target, a key of `featurepipe.heads.families.FAMILIES`."""

TURNABLE = ("logistic", "linear-svm", "rbf-svm", "ridge", "kernel-ridge", "knn")
"""Families that see features by their inner products or distances alone, so that a rotation changes nothing; the shrinkage
of ``centroid`` looks at single values."""

TURNED_FROM = 2
"""How many times as many values as training images there must be, before going over to their span repays."""

QUICK: Mapping[str, Mapping[str, Any]] = {"logistic": {"tol": 1e-3}}
"""Settings of scikit-learn's solvers: with the usual tolerance fits take 3 times as long, and accuracies change by chance."""

TREES = {"max_depth": 6, "learning_rate": 0.1, "subsample": 0.8, "n_estimators": 500, "early_stopping_rounds": 20}
TREE_COLUMNS = 500
"""Columns that a tree draws from at most: the time of trees grows with it, their accuracy hardly."""


@dataclass(frozen=True)
class Data:
    """One column's features and what is to be learned.

    Attributes:
        features: (n, D), read by whoever measures.
        truth: (n,) class numbers, (n,) numbers to estimate, or (n, K) labels: 1 present, 0 absent, NaN unknown.
        shifted: (m, D) features of the other source, or None.
        shifted_truth: the same of those, empty if there is no other source.
        target_type: of the truth, a key of `MEASURES`.
        weights: (n,) how much each image counts while a head is fitted; None if all count alike.
    """

    features: FeatureSet
    truth: Array
    shifted: FeatureSet | None
    shifted_truth: Array
    target_type: str = "multiclass"
    weights: Array | None = None

    @property
    def measure(self) -> Measure:
        """What heads are compared by."""
        return MEASURES[self.target_type]

    @property
    def labels(self) -> int:
        """How many labels an image may have; 1 where it has a class or a number."""
        return 1 if self.truth.ndim == 1 else self.truth.shape[1]

    def weights_of(self, rows: Array) -> dict[str, Array]:
        """The weights of some rows, as an argument of ``fit``."""
        return {} if self.weights is None else {"sample_weight": self.weights[rows]}


@dataclass(frozen=True)
class Cell:
    """One head on one column and one fold.

    Attributes:
        head: name of the family.
        seed: of the fold.
        fold: number of the fold.
        params: what was chosen.
        contributions: (t,) of the test images to the measure, in the order of the fold's test rows: whether each was classified
            rightly, or float64 of another measure.
        shifted: (m,) the same for the other source, NaN for images that do not count for this head; None if there is none.
        train_value: the measure on the images it was fitted on.
        seconds: choosing and fitting.
        besides: further measures of the test images.
    """

    head: str
    seed: int
    fold: int
    params: Mapping[str, Any]
    contributions: Array
    shifted: Array | None
    train_value: float
    seconds: float
    besides: Mapping[str, float] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The measure: the share of the test images that are classified rightly, or another."""
        return float(self.contributions.mean())


def measure_fold(data: Data, fold: Fold, heads: Sequence[str]) -> list[Cell]:
    """Measures several heads on one column and one fold.

    Features are standardised by the training rows alone. Where an image has many more values than there are training images,
    the heads that only see inner products work in the training images' span, which is the same and much smaller. Where
    the values are many, linear heads read them block by block and fit several values of C in shared passes.
    """
    in_blocks = [head for head in heads if _is_in_blocks(data, fold, head)]
    in_memory = [head for head in heads if head not in in_blocks]
    cells = [_measure_in_blocks(data, fold, head) for head in in_blocks]
    turned = [head for head in in_memory if _is_turned(data, fold, head)]
    for group in (turned, [head for head in in_memory if head not in turned]):
        if group:
            rows = _Rows.of(data, fold, turned=group is turned)
            cells += [_measure(rows, fold, head) for head in group]
    return sorted(cells, key=lambda cell: heads.index(cell.head))


class Scores(NamedTuple):
    """What one head says of images.

    Attributes:
        test: (t, K) scores of classes or labels for the fold's test images, or (t,) numbers.
        classes: (K,) numbers of the classes that the head knows; of all labels; none where it estimates a number.
        shifted: the same as ``test`` of the other source's images; None if there is none.
    """

    test: Array
    classes: Codes
    shifted: Array | None


def scores_again(data: Data, fold: Fold, cell: Cell) -> Scores:
    """Class scores, or what else is predicted, by the head that a cell was measured with, which is fitted again."""
    from featurepipe.heads.calibration import class_scores

    params, kind = cell.params, data.target_type
    with _labels_left_out():
        if _is_in_blocks(data, fold, cell.head):
            head = make_head(cell.head, target_type=kind, out_of_core=True, **ROUGH, **_one_sided(kind), **params)
            weights = {f"head__{name}": value for name, value in data.weights_of(fold.train).items()}
            with _as_it_stands():
                fitted = head.fit(data.features.take(fold.train), data.truth[fold.train], **weights)
            test: Any = data.features.take(fold.test)
            shifted: Any = data.shifted
        else:
            rows = _Rows.of(data, fold, turned=_is_turned(data, fold, cell.head))
            fitted = _fitted(rows, cell.head, params, rows.train, fold.seed)
            test, shifted = rows.test.features, None if rows.shifted is None else rows.shifted.features
    if kind == "multiclass":
        there = None if shifted is None else class_scores(fitted, shifted)
        return Scores(class_scores(fitted, test), fitted.classes_, there)
    said = partial(data.measure.answers, fitted)
    there = None if shifted is None else said(shifted, data.labels)
    return Scores(said(test, data.labels), np.arange(data.labels if data.truth.ndim == 2 else 0), there)


def _is_in_blocks(data: Data, fold: Fold, head: str) -> bool:
    if data.target_type == "continuous":
        return False
    return head in SHARED_PASSES and len(fold.train) * data.features.shape[1] > SMALL_VALUES


def _is_turned(data: Data, fold: Fold, head: str) -> bool:
    return head in TURNABLE and data.features.shape[1] > TURNED_FROM * len(fold.train)


class Part(NamedTuple):
    """Rows that take one part in a fold: features (array or blocks), truth, and weights or None."""

    features: Any
    truth: Array
    weights: Array | None = None


@dataclass(frozen=True)
class _Rows:
    """Standardised features and truth of a fold's parts.

    Attributes:
        choices: divide ``train`` into rows to fit and rows to choose by.
        fits: the places in ``train`` of the rows to fit, one entry a choice.
        train: rows of the last fit.
        test: rows to measure on.
        shifted: rows of the other source; None if there is none.
        data: whose they are.
    """

    choices: list[tuple[Part, Part]]
    fits: list[Codes]
    train: Part
    test: Part
    shifted: Part | None
    data: Data

    @staticmethod
    def of(data: Data, fold: Fold, *, turned: bool) -> _Rows:
        """Cuts and standardises; ``turned`` also goes over to the span of the training rows."""
        features = data.features.read(np.float32)
        scaler = StandardScaler().fit(features[fold.train])
        parts = {name: scaler.transform(features[getattr(fold, name)]) for name in ("train", "test")}
        if data.shifted is not None:
            parts["shifted"] = scaler.transform(data.shifted.read(np.float32))
        if turned:
            span = RowSpace().fit(parts["train"])
            parts = {name: span.transform(part).astype(np.float32) for name, part in parts.items()}
        train = Part(parts["train"], data.truth[fold.train], data.weights_of(fold.train).get("sample_weight"))

        def some(places: Codes) -> Part:
            return Part(
                train.features[places], train.truth[places], None if train.weights is None else train.weights[places]
            )

        fits = [np.searchsorted(fold.train, fit) for fit, _ in fold.choices]
        chooses = [np.searchsorted(fold.train, choose) for _, choose in fold.choices]
        return _Rows(
            choices=[(some(fit), some(choose)) for fit, choose in zip(fits, chooses, strict=True)],
            fits=fits,
            train=train,
            test=Part(parts["test"], data.truth[fold.test]),
            shifted=None if data.shifted is None else Part(parts["shifted"], data.shifted_truth),
            data=data,
        )


def _measure(rows: _Rows, fold: Fold, head: str) -> Cell:
    start = time.perf_counter()
    with _labels_left_out():
        chosen = _chosen(rows, head, fold.seed)
        fitted = _fitted(rows, head, chosen, rows.train, fold.seed)
    seconds = time.perf_counter() - start
    return _cell(rows.data, fold, head, chosen, fitted, (rows.train, rows.test, rows.shifted), seconds)


def _cell(
    data: Data,
    fold: Fold,
    head: str,
    params: Mapping[str, Any],
    fitted: Any,
    parts: tuple[Part, Part, Part | None],
    seconds: float,
) -> Cell:
    """What a fitted head gets right of training, test and other images."""
    train, test, shifted = parts
    measure = data.measure
    answers = measure.answers(fitted, test.features, data.labels)
    learned = float(_contributions(data, fitted, train).mean())
    return Cell(
        head, fold.seed, fold.number, params, measure.contributions(answers, test.truth),
        None if shifted is None else _elsewhere(data, fitted, shifted, fold),
        learned, seconds, {} if measure.besides is None else measure.besides(answers, test.truth),
    )  # fmt: skip


def _elsewhere(data: Data, fitted: Any, part: Part, fold: Fold) -> Array:
    """Contributions of the other source's images; of a measure that is no mean, from those alone that count for this head."""
    answers = data.measure.answers(fitted, part.features, data.labels)
    if data.target_type == "multiclass" or fold.counted is None or fold.counted.all():
        return data.measure.contributions(answers, part.truth)
    found = np.full(len(answers), np.nan)
    if fold.counted.any():
        found[fold.counted] = data.measure.contributions(answers[fold.counted], part.truth[fold.counted])
    return found


def _contributions(data: Data, fitted: Any, part: Part) -> Array:
    return data.measure.contributions(data.measure.answers(fitted, part.features, data.labels), part.truth)


def _joined(parts: Sequence[Array]) -> float:
    """The measure over several divisions; those in which it is not defined do not count."""
    every = np.concatenate(list(parts))
    defined = ~np.isnan(every)
    return float(every[defined].mean()) if defined.any() else 0.0


def _chosen(rows: _Rows, head: str, seed: int) -> dict[str, Any]:
    """The parameters that do best on the images set aside; of equals the first, which is the simplest."""
    data = rows.data
    if head == "xgboost":  # the first division stops it; others would each cost as much as all that follows
        return _trees_chosen(rows, seed)
    grid = _family(data, head).grid
    images = sum(len(choose.truth) for _, choose in rows.choices)
    if data.target_type == "continuous" and head == "ridge":
        return {"alpha": _ridge_chosen(rows, grid["alpha"])}
    if data.target_type == "multilabel" and head in SHARED_PASSES:
        last = _head(data, head, ROUGH, rows.train.features.shape[1], seed)
        chooses = [choose for _, choose in rows.choices]
        return {
            "C": climb(grid["C"], _along_path(data, last, rows.train, rows.fits, chooses), images, data.measure.error)
        }

    def accuracy(params: Mapping[str, Any]) -> float:
        with _as_it_stands():
            heads = ((_fitted(rows, head, params, fit, seed), choose) for fit, choose in rows.choices)
            return _joined([_contributions(data, fitted, choose) for fitted, choose in heads])

    if head in SHARED_PASSES:
        return {"C": climb(grid["C"], lambda some: [accuracy({"C": C}) for C in some], images, data.measure.error)}
    every: list[dict[str, Any]] = list(ParameterGrid(dict(grid)))
    fewest = min(len(fit.truth) for fit, _ in rows.choices)
    best, chosen = -math.inf, every[0]
    for params in (params for params in every if params.get("n_neighbors", 1) <= fewest):
        if (found := accuracy(params)) > best:
            best, chosen = found, params
        if best >= 1:  # nothing beyond it can be better
            break
    return chosen


def _trees_chosen(rows: _Rows, seed: int) -> dict[str, Any]:
    """The settings of trees with as many rounds as the images set aside ask for; of several labels the most of any."""
    fit, choose = rows.choices[0]
    params = {name: value for name, value in TREES.items() if name != "early_stopping_rounds"}
    if rows.data.target_type == "multilabel":
        learned = np.flatnonzero((~np.isnan(choose.truth)).any(axis=0))
        fit = fit._replace(truth=fit.truth[:, learned])
        choose = choose._replace(truth=choose.truth[:, learned])
    fitted = _fitted(rows, "xgboost", TREES, fit, seed, eval_set=(choose.features, choose.truth))
    best = max(int(one.best_iteration_) for one in getattr(fitted, "heads_", [fitted]))
    return {**params, "n_estimators": best + 1}


def _ridge_chosen(rows: _Rows, alphas: Sequence[float]) -> float:
    """The penalty of a ridge regression that does best on the images set aside: one factorisation serves all of a division."""
    found: list[list[Array]] = [[] for _ in alphas]
    for fit, choose in rows.choices:
        every = Ridge(alpha=np.array(alphas))
        every.fit(
            fit.features.astype(np.float64),
            np.tile(np.asarray(fit.truth)[:, None], len(alphas)),
            sample_weight=fit.weights,
        )
        for place, numbers in enumerate(np.asarray(every.predict(choose.features), np.float64).T):
            found[place].append(rows.data.measure.contributions(numbers, choose.truth))
    return float(alphas[int(np.argmax([_joined(parts) for parts in found]))])


def _family(data: Data, head: str) -> HeadFamily:
    return (HEADS if data.target_type == "multiclass" else FAMILIES[data.target_type])[head]


def _one_sided(target_type: str) -> dict[str, Any]:
    """Labels that the rows of a fold have on one side only are not learned there."""
    return {"one_sided": "drop"} if target_type == "multilabel" else {}


def _fitted(rows: _Rows, head: str, params: Mapping[str, Any], part: Part, seed: int, **more: Any) -> Any:
    """A head, fitted to some rows in memory."""
    last = _head(rows.data, head, params, part.features.shape[1], seed)
    weights = {} if part.weights is None else {"sample_weight": part.weights}
    features = part.features
    if (
        head == "ridge"
    ):  # whose equations have the square of the features' condition, too much for float32 where alpha is small
        features = features.astype(np.float64)
    return last.fit(features, part.truth, **weights, **more)


def _head(data: Data, head: str, params: Mapping[str, Any], width: int, seed: int) -> BaseEstimator:
    settings: dict[str, Any] = dict(params)
    if head == "xgboost":
        settings |= {"colsample_bytree": min(1.0, TREE_COLUMNS / width), "n_jobs": 1}
    settings |= {**QUICK.get(head, {}), **_one_sided(data.target_type)}
    ours = head == "centroid"  # scikit-learn's warns of values that are constant, as many after a ReLU are
    return make_head(head, target_type=data.target_type, scale=False, random_state=seed, out_of_core=ours, **settings)


@contextmanager
def _as_it_stands() -> Iterator[None]:
    """Lets fits that are only compared, and the weakest regularisation, which may not be done in time, pass without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


@contextmanager
def _labels_left_out() -> Iterator[None]:
    """Lets labels that a fold's rows have on one side only pass without a warning: the study says how many there are."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "left out", UserWarning)
        yield


def _along_path(
    data: Data, last: Any, train: Part, fits: Sequence[Codes], chooses: Sequence[Part]
) -> Callable[[Sequence[float]], list[float]]:
    """The measure of some values of C on the images set aside, all fitted in the same passes."""

    def values(some: Sequence[float]) -> list[float]:
        with _as_it_stands():
            paths = _paths(data, last, train, some, fits)
        return [
            _joined([_contributions(data, fitted, part) for fitted, part in zip(heads, chooses, strict=True)])
            for heads in zip(*paths, strict=True)
        ]

    return values


def _paths(data: Data, last: Any, train: Part, Cs: Sequence[float], fits: Sequence[Codes] | None = None) -> Any:
    """Heads fitted with some values of C, a list for each division; of all rows without one."""
    from featurepipe.heads import fit_path
    from featurepipe.heads.linear.multilabel import fit_label_path

    path_of: Callable[..., Any] = fit_label_path if data.target_type == "multilabel" else fit_path
    return path_of(last, train.features, train.truth, Cs=Cs, folds=fits, sample_weight=train.weights)


def _measure_in_blocks(data: Data, fold: Fold, head: str) -> Cell:
    """The same where the values are many: standardised as they are read, several values of C in shared passes."""
    start = time.perf_counter()
    made = make_head(head, target_type=data.target_type, out_of_core=True, **ROUGH, **_one_sided(data.target_type))
    scaler, last = (step for _, step in made.steps)
    scaler.fit(data.features.take(fold.train))

    def part(rows: Codes) -> Part:
        weights = data.weights_of(rows).get("sample_weight")
        return Part(scaler.transform(data.features.take(rows)), data.truth[rows], weights)

    train = part(fold.train)
    fits = [np.searchsorted(fold.train, fit) for fit, _ in fold.choices]
    chooses = [part(choose) for _, choose in fold.choices]
    with _labels_left_out():
        images = sum(len(choose.truth) for choose in chooses)
        values = _along_path(data, last, train, fits, chooses)
        chosen = {"C": climb(_family(data, head).grid["C"], values, images, data.measure.error)}
        with _as_it_stands():
            ((fitted,),) = _paths(data, last, train, [chosen["C"]])
    seconds = time.perf_counter() - start
    other = None if data.shifted is None else Part(scaler.transform(data.shifted), data.shifted_truth)
    return _cell(data, fold, head, chosen, fitted, (train, part(fold.test), other), seconds)
