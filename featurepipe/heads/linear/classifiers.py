"""Logistic regression and linear SVC on features of any size, and the path of solutions that both share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
from scipy.special import expit, log_expit, log_softmax, softmax
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.class_weight import compute_class_weight

from featurepipe.display import bytes_of
from featurepipe.errors import UsageError
from featurepipe.heads.inputs import BlockClassifier, TrainingData, labels_from, linear_scores, training_data
from featurepipe.heads.linear.losses import BinomialLoss, Loss, SoftmaxLoss, SquaredHingeLoss
from featurepipe.heads.linear.optimisers import Optimiser, OptimiserSettings, Optimum, joint_lbfgs, lbfgs, newton, run
from featurepipe.heads.linear.passes import (
    FitProblem,
    Passes,
    Prepared,
    curvature_worth,
    joint_at_once,
    patience_of,
    prepare,
)

Array = npt.NDArray[Any]
Estimator = TypeVar("Estimator", bound="BlockLinearClassifier")
Method = Callable[[Any, OptimiserSettings], Optimiser]

_NEARING = 500  # iterations of L-BFGS in float64 before Newton's method takes over
_BOUND = 4  # times tol that what the gap is at most may be; measured: 5 to 20 times the gap
SAFETY = 50  # how many times the estimated gap the true one is at most, with room; measured: 4 to 9
_ROUGHLY = 1e-3  # of the objective: the estimated gap at which folds with most rows in common start from the fit of all of them


@dataclass(frozen=True)
class Objective:
    """What a linear classifier minimises.

    Attributes:
        loss: Of the scores.
        one_vs_rest: One problem for each class with a loss of two classes, instead of one for all.
        intercept_penalty: Factor of half the squared intercept.
    """

    loss: Loss
    one_vs_rest: bool
    intercept_penalty: float


@dataclass(frozen=True)
class Solution:
    """Coefficients (K, D) and intercepts (K,) for classes, in original coordinates."""

    classes: Array
    coefficients: Array
    intercepts: Array
    iterations: int
    converged: bool


class BlockLinearClassifier(BlockClassifier, BaseEstimator):  # type: ignore[misc]
    """Base of linear classifiers that learn from arrays or ``Blocks``."""

    C: float
    fit_intercept: bool
    class_weight: Any
    tol: float
    max_iter: int
    memory: int | str | None

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Fits the classifier.

        Args:
            X: (n, D) array; ``Blocks`` such as a ``FeatureSet``, which are streamed; or a PyTorch tensor, fitted where it is.
            y: (n,) labels; None for those that ``X`` carries.
            sample_weight: (n,) non-negative weights; None for one each.

        Returns:
            The estimator.

        Raises:
            UsageError: Features or labels that cannot be learned from; the message says which and where.
        """
        _check_parameters(self, [self.C])
        data = training_data(self, X, y, sample_weight=sample_weight)
        [[solution]] = _solve(self, data, [self.C], None)
        return self._adopt(solution)

    def decision_function(self, X: Any) -> Array:
        """Returns float64 scores: (n, K), or (n,) for two classes; X is an array or ``Blocks``."""
        return linear_scores(self, X, memory=self.memory, dtype=np.float64)

    def predict(self, X: Any) -> Array:
        """Returns the (n,) labels of the highest scores."""
        return labels_from(self.decision_function(X), self.classes_)

    def objective(self, classes: int) -> Objective:
        """What to minimise for so many classes, by the parameters."""
        raise NotImplementedError

    def _adopt(self, solution: Solution) -> Self:
        self.classes_ = solution.classes
        self.coef_, self.intercept_ = solution.coefficients, solution.intercepts
        self.n_iter_ = np.array([solution.iterations])
        return self


def fit_path(
    estimator: Estimator,
    X: Any,
    y: Any = None,
    *,
    Cs: Sequence[float],
    folds: Sequence[Any] | None = None,
    sample_weight: Any = None,
    overlapping: bool = False,
) -> list[list[Estimator]]:
    """Fits an estimator for several values of C on several folds, all in the same passes over the features.

    Args:
        estimator: A ``BlockLogisticRegression`` or ``BlockLinearSVC``; it is cloned, its own C is not used.
        X: (n, D) array or ``Blocks``.
        y: (n,) labels; None for those that ``X`` carries.
        Cs: Values of C.
        folds: For each fold the rows to train on (positions or a mask); None for one fold of all rows.
        sample_weight: (n,) weights; None for one each.
        overlapping: Whether folds have most of their rows in common, as those of a cross-validation have. Then the rows of all
            folds together are fitted first, roughly, and each fold starts from there with the curvature that was measured on
            the way: measuring it for each fold would take most of the time. The optima are the same, within ``tol``.

    Returns:
        Fitted estimators, one list a fold, in the order of ``Cs``.

    Raises:
        ValueError: Features or labels that cannot be learned from, or a fold of one class.
    """
    _check_parameters(estimator, Cs)
    first = clone(estimator)
    data = training_data(first, X, y, sample_weight=sample_weight)
    learned = {name: value for name, value in vars(first).items() if name.endswith("_in_")}
    paths = []
    for row in _solve(estimator, data, Cs, folds, overlapping=overlapping):
        fitted = [clone(estimator).set_params(C=C) for C in Cs]
        for head, solution in zip(fitted, row, strict=True):
            vars(head).update(learned)
            head._adopt(solution)  # noqa: SLF001 - of the same module
        paths.append(fitted)
    return paths


def _solve(
    estimator: BlockLinearClassifier,
    data: TrainingData,
    Cs: Sequence[float],
    folds: Sequence[Any] | None,
    *,
    overlapping: bool = False,
) -> list[list[Solution]]:
    weights = _fold_weights(data, folds)
    groups: dict[tuple[int, ...], list[int]] = {}  # folds of the same classes have columns in common
    for number, row in enumerate(weights):
        groups.setdefault(_classes_present(data, row), []).append(number)
    prepared = prepare(data.blocks, intercept=estimator.fit_intercept, memory=estimator.memory)
    solutions: dict[int, list[Solution]] = {}
    for present, members in groups.items():
        chosen = np.array(present)
        codes = np.minimum(np.searchsorted(chosen, data.codes), len(chosen) - 1)  # of rows without weight: any
        together = overlapping and len(members) > 1
        found = _solve_group(
            estimator, prepared, data.classes[chosen], codes, weights[members], Cs, overlapping=together
        )
        solutions |= dict(zip(members, found, strict=True))
    warn_unconverged([solution for row in solutions.values() for solution in row], estimator)
    return [solutions[number] for number in range(len(weights))]


def _solve_group(
    estimator: BlockLinearClassifier,
    prepared: Prepared,
    classes: Array,
    codes: Array,
    weights: Array,
    Cs: Sequence[float],
    *,
    overlapping: bool,
) -> list[list[Solution]]:
    """Solves for folds that have the same classes."""
    folds = range(len(weights))
    if overlapping:
        weights = np.vstack([weights, weights.max(axis=0)])  # the rows of all folds as one more
    totals = np.stack([np.bincount(codes, row, minlength=len(classes)) for row in weights])
    factors = np.stack([_class_factors(estimator.class_weight, classes, row) for row in totals])
    objective = estimator.objective(len(classes))
    targets = range(len(classes)) if objective.one_vs_rest and len(classes) > 2 else [1]
    problems = [FitProblem(fold, C, target) for fold in folds for C in Cs for target in targets]
    loss = objective.loss

    def settings(tol: float, most: int) -> OptimiserSettings:
        certain = _BOUND * tol if loss.redundant else math.inf
        return OptimiserSettings(tol / SAFETY, most, loss.refresh, loss.growth, loss.trusted, certain=certain)

    def passes_for(some: list[FitProblem], features: Prepared) -> Passes:
        return Passes(
            features,
            codes,
            weights * factors[:, codes],
            some,
            loss,
            intercept=estimator.fit_intercept,
            intercept_penalty=objective.intercept_penalty,
            memory=estimator.memory,
        )

    def solve(
        method: Method, features: Prepared, chosen: Sequence[int], starts: Sequence[Array], iterations: Sequence[int]
    ) -> list[Optimum]:
        """Solves the chosen problems from where they start, in so many iterations each."""
        passes = passes_for([problems[number] for number in chosen], features)
        pairs = zip(starts, iterations, strict=True)
        return run([method(start, settings(estimator.tol, most)) for start, most in pairs], passes)

    begin = [loss.start(row) for row in totals * factors]
    width = len(prepared.mean)
    points = [start_point(begin[problem.fold], width, intercept=estimator.fit_intercept) for problem in problems]
    limits = [limit for limit in (estimator.memory, prepared.shards.memory) if limit is not None]
    at_once = joint_at_once(prepared, loss, points[0].shape, min(map(bytes_of, limits), default=None))
    patience = patience_of(prepared, points[0].shape) if at_once else estimator.max_iter
    most = min(patience, estimator.max_iter)
    if overlapping:
        common = [replace(problem, fold=len(folds)) for problem in problems[: len(problems) // len(folds)]]
        refresh = max(loss.refresh, round(2 * curvature_worth(prepared)))  # it is measured once at the end, too
        exactly = replace(settings(estimator.tol, most), refresh=refresh)
        roughly = replace(exactly, tolerance=_ROUGHLY, certain=math.inf, keep=True)
        starts = [start_point(begin[-1], width, intercept=estimator.fit_intercept) for _ in common]
        near = run([lbfgs(start, roughly) for start in starts], passes_for(common, prepared)) * len(folds)
        fits = [lbfgs(one.point, exactly, one.precondition) for one in near]
        optima = run(fits, passes_for(problems, prepared))
        del near, fits  # with the curvature
    else:
        optima = solve(lbfgs, prepared, range(len(problems)), points, [most] * len(problems))
    optima = finished(optima, prepared, estimator.max_iter, solve, at_once)
    each = len(targets)
    groups = [optima[first : first + each] for first in range(0, len(optima), each)]
    found = [_solution(classes, group, prepared, intercept=estimator.fit_intercept) for group in groups]
    return [found[first : first + len(Cs)] for first in range(0, len(found), len(Cs))]


def finished(
    optima: list[Optimum],
    prepared: Prepared,
    max_iter: int,
    solve: Callable[..., list[Optimum]],
    joint_at_once: int = 0,
) -> list[Optimum]:
    """Goes on in float64 where L-BFGS crawls, or float32 could not tell the objective from its neighbours before the optimum.

    That happens with a large C where some columns hold values a hundred deviations from their mean. With a preconditioner of
    all columns together L-BFGS converges from anywhere in some eighty iterations, so many problems at one time as memory
    allows. Where it allows none, L-BFGS in float64 as before comes near the optimum, in hundreds of passes, and Newton's steps,
    which are mostly too long before, finish.

    Args:
        optima: Where L-BFGS stopped; what has converged, or had ``max_iter`` iterations, stays.
        prepared: The features.
        max_iter: Most iterations of one problem.
        solve: Called with a method, features, the numbers of problems, where each starts, and its iterations.
        joint_at_once: How many problems may have such a preconditioner at one time.
    """
    exact = replace(prepared, dtype=np.dtype(np.float64), mean=prepared.mean.astype(np.float64))
    finished = list(optima)

    def stuck() -> list[int]:
        return [number for number, one in enumerate(finished) if not one.converged and one.iterations < max_iter]

    def go_on(method: Method, numbers: list[int], most: int) -> None:
        left = [min(most, max_iter - finished[number].iterations) for number in numbers]
        starts = [finished[number].point for number in numbers]
        for number, one in zip(numbers, solve(method, exact, numbers, starts, left), strict=True):
            finished[number] = replace(one, iterations=one.iterations + finished[number].iterations)

    if joint_at_once:
        waiting = stuck()
        for first in range(0, len(waiting), joint_at_once):
            go_on(joint_lbfgs, waiting[first : first + joint_at_once], max_iter)
    elif prepared.dtype == np.float32:
        for method, most in ((lbfgs, _NEARING), (newton, max_iter)):
            if waiting := stuck():
                go_on(method, waiting, most)
    return finished


def start_point(intercepts: Array, width: int, *, intercept: bool) -> Array:
    """The point (K, D + 1), or (K, D) without an intercept, at these intercepts and zero coefficients."""
    coefficients = np.zeros((len(intercepts), width))
    return np.column_stack([coefficients, intercepts]) if intercept else coefficients


def _solution(classes: Array, optima: Sequence[Optimum], prepared: Prepared, *, intercept: bool) -> Solution:
    """Puts the columns of one classifier together and goes back to features that are not centred."""
    points = np.concatenate([optimum.point for optimum in optima])
    width = len(prepared.mean)
    coefficients = np.ascontiguousarray(points[:, :width])
    intercepts = np.zeros(len(points))
    if intercept:
        intercepts = points[:, width] - coefficients @ prepared.mean.astype(np.float64)
    iterations = max(1, *(optimum.iterations for optimum in optima)) if optima else 1
    return Solution(classes, coefficients, intercepts, iterations, all(optimum.converged for optimum in optima))


def _check_parameters(estimator: BlockLinearClassifier, Cs: Sequence[float]) -> None:
    for name, value in [*(("C", C) for C in Cs), ("tol", estimator.tol), ("max_iter", estimator.max_iter)]:
        if not value > 0:
            raise UsageError(f"{name}={value!r} of {type(estimator).__name__} must be positive")


def _fold_weights(data: TrainingData, folds: Sequence[Any] | None) -> Array:
    """Returns (F, n) weights, zero outside a fold."""
    ones = np.ones(len(data.codes)) if data.weights is None else data.weights
    if folds is None:
        return ones[None]
    weights = np.zeros((len(folds), len(ones)))
    for row, members in zip(weights, folds, strict=True):
        row[members] = ones[members]
    return weights


def _classes_present(data: TrainingData, weights: Array) -> tuple[int, ...]:
    present = tuple(np.unique(data.codes[weights > 0]).tolist())
    if len(present) < 2:
        only = f" ({data.classes[present[0]]!r})" if present else ""
        raise UsageError(
            f"a head needs rows of at least 2 classes to learn from, these have {len(present)} class{only}; "
            "check the folds and the sample weights"
        )
    return present


def _class_factors(class_weight: Any, classes: Array, totals: Array) -> Array:
    """Returns the (K,) factors of the classes' row weights; "balanced" makes all classes weigh the same."""
    if isinstance(class_weight, str) and class_weight == "balanced":
        return np.asarray(totals.sum() / (len(classes) * totals))
    return np.asarray(compute_class_weight(class_weight, classes=classes, y=classes))


def warn_unconverged(solutions: Sequence[Solution | Optimum], estimator: BaseEstimator) -> None:
    """Warns of fits that ``max_iter`` ended."""
    failed = sum(not solution.converged for solution in solutions)
    if failed:
        warnings.warn(
            f"{failed} of {len(solutions)} fits of {type(estimator).__name__} stopped after max_iter="
            f"{estimator.max_iter} iterations before the objective was within tol={estimator.tol:g}; increase max_iter",
            ConvergenceWarning,
            stacklevel=4,
        )


class BlockLogisticRegression(BlockLinearClassifier):
    """Multinomial logistic regression with an L2 penalty, from arrays in memory or streamed ``Blocks``.

    Minimises ``C * sum_i(w_i * loss_i) + |W|^2 / 2``, scikit-learn's ``LogisticRegression`` objective: the loss is that of the
    softmax, or for two classes of one logistic column; the intercept is not penalised.

    Method: L-BFGS (Liu & Nocedal 1989, "On the limited memory BFGS method for large scale optimization") in the
    coordinates of centred features. Each class's direction is preconditioned by the Cholesky factor of its block of the
    second derivative, ``C * sum_i(p_i (1 - p_i) x_i x_i') + I``, measured on rows sampled in proportion to their curvature
    (in the spirit of sub-sampled Newton methods: Roosta-Khorasani & Mahoney 2019; Xu et al. 2016) and measured again as the
    iterate moves. Where all ``p (1 - p)`` are replaced by their bound this is the fixed-curvature step of Böhning 1992,
    "Multinomial logistic regression algorithm". Where that takes hundreds of iterations, all classes' second derivative together
    takes its place, if memory allows. Wide features (above 4,096 values) get the diagonal alone. All values of C and all folds
    of ``fit_path`` share every pass over the features.

    It stops where an estimate of the gap by the second derivative is a fiftieth of ``tol``, and ``|gradient by W|^2 / 2``, which
    the gap cannot exceed as the penalty bends by 1 everywhere, at most four times ``tol``. The estimate alone suffices if it is
    a hundred times smaller still.

    Float16 and float32 features are multiplied in float32 and summed over blocks in float64; others in float64.

    Args:
        C: Inverse strength of the penalty.
        fit_intercept: Whether to fit one.
        class_weight: None, "balanced", or a dict of factors by label.
        tol: How far the objective may be above its minimum, relative to it; estimated, with a safety factor.
        max_iter: Most iterations of one problem; each is at least one pass.
        memory: What the fit may hold at once, in bytes or as text ("512MB"): features that fit are kept, others
            streamed. None for as much as the features take.

    Attributes:
        classes_: (K,) labels.
        coef_: (K, D) float64, or (1, D) for two classes.
        intercept_: (K,) or (1,).
        n_iter_: (1,) iterations.
        n_features_in_: D.
    """

    def __init__(
        self,
        C: float = 1.0,
        *,
        fit_intercept: bool = True,
        class_weight: Any = None,
        tol: float = 1e-5,
        max_iter: int = 10_000,
        memory: int | str | None = None,
    ) -> None:
        self.C = C
        self.fit_intercept = fit_intercept
        self.class_weight = class_weight
        self.tol = tol
        self.max_iter = max_iter
        self.memory = memory

    def objective(self, classes: int) -> Objective:
        """See ``BlockLinearClassifier``."""
        return Objective(SoftmaxLoss() if classes > 2 else BinomialLoss(), one_vs_rest=False, intercept_penalty=0.0)

    def predict_proba(self, X: Any) -> npt.NDArray[np.float64]:
        """Returns the (n, K) probabilities of the classes, in the order of ``classes_``."""
        scores = self.decision_function(X)
        if scores.ndim == 1:
            return np.column_stack([expit(-scores), expit(scores)])
        return np.asarray(softmax(scores, axis=1))

    def predict_log_proba(self, X: Any) -> npt.NDArray[np.float64]:
        """Returns the logarithms of ``predict_proba``, exact where probabilities vanish."""
        scores = self.decision_function(X)
        if scores.ndim == 1:
            return np.column_stack([log_expit(-scores), log_expit(scores)])
        return np.asarray(log_softmax(scores, axis=1))


class BlockLinearSVC(BlockLinearClassifier):
    """Linear SVM with the squared hinge loss, one against the rest, from arrays in memory or streamed ``Blocks``.

    Minimises for each class ``C * sum_i(w_i * max(0, 1 - s_i f(x_i))^2) + |w|^2 / 2``, where s is 1 for rows of the class
    and -1 for others: the objective of scikit-learn's ``LinearSVC(loss="squared_hinge", dual=False)`` and of LIBLINEAR
    (Fan et al. 2008, "LIBLINEAR: a library for large linear classification"). As there, the intercept is penalised as the
    coefficient of one more feature of the constant value ``intercept_scaling``; ``penalise_intercept=False`` leaves it free.

    Method: for each class L-BFGS (Liu & Nocedal 1989) preconditioned by the Cholesky factor of the generalised second
    derivative, ``2 C * sum_{i inside the margin}(x_i x_i') + I`` (Keerthi & DeCoste 2005, "A modified finite Newton method
    for fast solution of large scale linear SVMs"), measured on a sample of those rows and measured again as the iterate
    moves. All classes, all values of C and all folds of ``fit_path`` share every pass over the features.

    Float16 and float32 features are multiplied in float32 and summed over blocks in float64; others in float64.

    Args:
        C: Inverse strength of the penalty.
        fit_intercept: Whether to fit one.
        intercept_scaling: Value of the constant feature; the larger, the less the intercept is penalised.
        penalise_intercept: Whether the intercept is penalised at all.
        class_weight: None, "balanced", or a dict of factors by label.
        tol: How far the objective may be above its minimum, relative to it; estimated, with a safety factor.
        max_iter: Most iterations of one problem; each is at least one pass.
        memory: What the fit may hold at once, in bytes or as text ("512MB"): features that fit are kept, others
            streamed. None for as much as the features take.

    Attributes:
        classes_: (K,) labels.
        coef_: (K, D) float64, or (1, D) for two classes.
        intercept_: (K,) or (1,).
        n_iter_: (1,) iterations, the most of any class.
        n_features_in_: D.
    """

    def __init__(
        self,
        C: float = 1.0,
        *,
        fit_intercept: bool = True,
        intercept_scaling: float = 1.0,
        penalise_intercept: bool = True,
        class_weight: Any = None,
        tol: float = 1e-5,
        max_iter: int = 10_000,
        memory: int | str | None = None,
    ) -> None:
        self.C = C
        self.fit_intercept = fit_intercept
        self.intercept_scaling = intercept_scaling
        self.penalise_intercept = penalise_intercept
        self.class_weight = class_weight
        self.tol = tol
        self.max_iter = max_iter
        self.memory = memory

    def objective(self, classes: int) -> Objective:  # noqa: ARG002
        """See ``BlockLinearClassifier``."""
        if not self.intercept_scaling > 0:
            raise UsageError(f"intercept_scaling={self.intercept_scaling!r} must be positive")
        penalty = self.intercept_scaling**-2 if self.penalise_intercept else 0.0
        return Objective(SquaredHingeLoss(), one_vs_rest=True, intercept_penalty=penalty)
