"""One column on one fold: parameters chosen on images set aside from training, then the accuracy on the test images."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import ParameterGrid
from sklearn.preprocessing import StandardScaler

from featurepipe.heads.families import HEADS, ROUGH, SHARED_PASSES, SMALL_VALUES, make_head
from featurepipe.heads.preprocessing import RowSpace

if TYPE_CHECKING:
    from featurepipe.layer_depth.folds import Fold
    from featurepipe.store import FeatureSet


AT_ONCE = 3
"""Values of C that are fitted before the first one is judged: the smallest ones take little time, and share passes."""

RULE = (
    f"Values of C are tried from the smallest upwards, {AT_ONCE} at least, until one does worse there than the best by more than "
    "a standard error."
)
"""What ``climb`` does, in words."""


def climb(
    strengths: Sequence[float], accuracies_of: Callable[[Sequence[float]], Sequence[float]], images: int
) -> float:
    """The value of C that does best on the images set aside; of equals the smallest.

    Beyond the best value heads learn the training images by heart, and a fit takes ever longer: on 60,000 images the last
    value took ten times as long as all that mattered. A drop by a standard error of one accuracy is far outside of
    what chance does to the difference of two heads on the same images.

    Args:
        strengths: values of C, ascending.
        accuracies_of: for some of them, the accuracy of each on the images set aside.
        images: how many these are.
    """
    found = list(accuracies_of(strengths[:AT_ONCE]))
    while len(found) < len(strengths) and found[-1] >= max(found) - _standard_error(max(found), images):
        found += accuracies_of([strengths[len(found)]])
    return strengths[int(np.argmax(found))]


def _standard_error(accuracy: float, images: int) -> float:
    return math.sqrt(accuracy * (1 - accuracy) / images)


Array = npt.NDArray[Any]
Codes = npt.NDArray[np.int64]

TURNABLE = ("logistic", "linear-svm", "rbf-svm", "ridge", "knn")
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
    """One column's features and what is to be told apart.

    Attributes:
        features: (n, D), read by whoever measures.
        codes: (n,) class numbers.
        shifted: (m, D) features of the other source, or None.
        shifted_codes: (m,) their classes, empty if there is no other source.
    """

    features: FeatureSet
    codes: Codes
    shifted: FeatureSet | None
    shifted_codes: Codes


@dataclass(frozen=True)
class Cell:
    """One head on one column and one fold.

    Attributes:
        head: name of the family.
        seed: of the fold.
        fold: number of the fold.
        params: what was chosen.
        correct: (t,) whether each test image was classified rightly, in the order of the fold's test rows.
        shifted: (m,) the same for the other source; None if there is none.
        train_accuracy: on the images it was fitted on.
        seconds: choosing and fitting.
    """

    head: str
    seed: int
    fold: int
    params: Mapping[str, Any]
    correct: npt.NDArray[np.bool_]
    shifted: npt.NDArray[np.bool_] | None
    train_accuracy: float
    seconds: float

    @property
    def accuracy(self) -> float:
        """Share of the test images that are classified rightly."""
        return float(self.correct.mean())


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
    """Class scores of images by one head.

    Attributes:
        test: (t, K) of the fold's test images.
        classes: (K,) numbers of the classes that the head knows.
        shifted: (m, K) of the other source's images; None if there is none.
    """

    test: Array
    classes: Codes
    shifted: Array | None


def scores_again(data: Data, fold: Fold, cell: Cell) -> Scores:
    """Class scores by the head that a cell was measured with, which is fitted again."""
    from featurepipe.heads.calibration import class_scores

    if _is_in_blocks(data, fold, cell.head):
        head = make_head(cell.head, out_of_core=True, **ROUGH, **cell.params)
        with _as_it_stands():
            fitted = head.fit(data.features.take(fold.train), data.codes[fold.train])
        test: Any = data.features.take(fold.test)
        shifted: Any = data.shifted
    else:
        rows = _Rows.of(data, fold, turned=_is_turned(data, fold, cell.head))
        fitted = _head(cell.head, cell.params, rows.train[0].shape[1], fold.seed).fit(*rows.train)
        test, shifted = rows.test[0], None if rows.shifted is None else rows.shifted[0]
    there = None if shifted is None else class_scores(fitted, shifted)
    return Scores(class_scores(fitted, test), fitted.classes_, there)


def _is_in_blocks(data: Data, fold: Fold, head: str) -> bool:
    return head in SHARED_PASSES and len(fold.train) * data.features.shape[1] > SMALL_VALUES


def _is_turned(data: Data, fold: Fold, head: str) -> bool:
    return head in TURNABLE and data.features.shape[1] > TURNED_FROM * len(fold.train)


@dataclass(frozen=True)
class _Rows:
    """Standardised features and codes of a fold's parts; ``choices`` divide ``train`` into rows to fit and rows to choose by."""

    choices: list[tuple[tuple[Array, Codes], tuple[Array, Codes]]]
    train: tuple[Array, Codes]
    test: tuple[Array, Codes]
    shifted: tuple[Array, Codes] | None

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
        codes = data.codes[fold.train]

        def some(positions: Codes) -> tuple[Array, Codes]:
            places = np.searchsorted(fold.train, positions)
            return parts["train"][places], codes[places]

        return _Rows(
            choices=[(some(fit), some(choose)) for fit, choose in fold.choices],
            train=(parts["train"], codes),
            test=(parts["test"], data.codes[fold.test]),
            shifted=None if data.shifted is None else (parts["shifted"], data.shifted_codes),
        )


def _measure(rows: _Rows, fold: Fold, head: str) -> Cell:
    start = time.perf_counter()
    chosen = _chosen(rows, head, fold.seed)
    fitted = _head(head, chosen, rows.train[0].shape[1], fold.seed).fit(*rows.train)
    seconds = time.perf_counter() - start
    shifted = None if rows.shifted is None else _right(fitted, *rows.shifted)
    train_accuracy = float(_right(fitted, *rows.train).mean())
    return Cell(head, fold.seed, fold.number, chosen, _right(fitted, *rows.test), shifted, train_accuracy, seconds)


def _chosen(rows: _Rows, head: str, seed: int) -> dict[str, Any]:
    """The parameters that do best on the images set aside; of equals the first, which is the simplest."""
    width = rows.train[0].shape[1]
    if head == "xgboost":  # the first division stops it; others would each cost as much as all that follows
        fit, choose = rows.choices[0]
        fitted = _head(head, TREES, width, seed).fit(*fit, eval_set=choose)
        params = {name: value for name, value in TREES.items() if name != "early_stopping_rounds"}
        return {**params, "n_estimators": int(fitted.best_iteration_) + 1}

    def accuracy(params: Mapping[str, Any]) -> float:
        with _as_it_stands():
            hits = [_right(_head(head, params, width, seed).fit(*fit), *choose) for fit, choose in rows.choices]
        return float(np.concatenate(hits).mean())

    grid = HEADS[head].grid
    if head in SHARED_PASSES:
        images = sum(len(codes) for _, (_, codes) in rows.choices)
        return {"C": climb(grid["C"], lambda some: [accuracy({"C": C}) for C in some], images)}
    every: list[dict[str, Any]] = list(ParameterGrid(dict(grid)))
    fewest = min(len(codes) for (_, codes), _ in rows.choices)
    return max((params for params in every if params.get("n_neighbors", 1) <= fewest), key=accuracy)


def _head(head: str, params: Mapping[str, Any], width: int, seed: int) -> BaseEstimator:
    settings: dict[str, Any] = dict(params)
    if head == "xgboost":
        settings |= {"colsample_bytree": min(1.0, TREE_COLUMNS / width), "n_jobs": 1}
    settings |= QUICK.get(head, {})
    ours = head == "centroid"  # scikit-learn's warns of values that are constant, as many after a ReLU are
    return make_head(head, scale=False, random_state=seed, out_of_core=ours, **settings)


def _right(fitted: BaseEstimator, features: Array, codes: Codes) -> npt.NDArray[np.bool_]:
    return np.asarray(fitted.predict(features) == codes)


@contextmanager
def _as_it_stands() -> Iterator[None]:
    """Lets fits that are only compared, and the weakest regularisation, which may not be done in time, pass without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def _measure_in_blocks(data: Data, fold: Fold, head: str) -> Cell:
    """The same where the values are many: standardised as they are read, several values of C in shared passes."""
    from featurepipe.heads import fit_path

    start = time.perf_counter()
    scaler, last = (step for _, step in make_head(head, out_of_core=True, **ROUGH).steps)
    train = scaler.fit(data.features.take(fold.train)).transform(data.features.take(fold.train))
    codes = data.codes[fold.train]
    fits = [np.searchsorted(fold.train, fit) for fit, _ in fold.choices]
    chooses = [(scaler.transform(data.features.take(rows)), data.codes[rows]) for _, rows in fold.choices]

    def accuracies(some: Sequence[float]) -> list[float]:
        paths = fit_path(last, train, codes, Cs=some, folds=fits)
        hits = [
            [_right(fitted, *rows) for fitted, rows in zip(heads, chooses, strict=True)]
            for heads in zip(*paths, strict=True)
        ]
        return [float(np.concatenate(of_strength).mean()) for of_strength in hits]

    with _as_it_stands():
        images = sum(len(rows) for _, rows in fold.choices)
        chosen = {"C": climb(HEADS[head].grid["C"], accuracies, images)}
        ((fitted,),) = fit_path(last, train, codes, Cs=[chosen["C"]])
    seconds = time.perf_counter() - start
    correct = _right(fitted, scaler.transform(data.features.take(fold.test)), data.codes[fold.test])
    other = None if data.shifted is None else _right(fitted, scaler.transform(data.shifted), data.shifted_codes)
    train_accuracy = float(_right(fitted, train, codes).mean())
    return Cell(head, fold.seed, fold.number, chosen, correct, other, train_accuracy, seconds)
