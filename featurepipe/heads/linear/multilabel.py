"""Logistic regression and linear SVM for several labels a row, one against the rest, in shared passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
import scipy.linalg
from scipy.special import expit
from sklearn.base import clone

from featurepipe.display import bytes_of
from featurepipe.errors import UsageError
from featurepipe.heads.blocks import Array, ArrayBlocks, Blocks, one_blas_thread
from featurepipe.heads.inputs import Floats
from featurepipe.heads.label_matrix import LabelMatrix, LinearScores, per_label
from featurepipe.heads.linear.classifiers import SAFETY, Method, Objective, finished, start_point, warn_unconverged
from featurepipe.heads.linear.losses import WIDEST, BinomialLoss, SquaredHingeLoss
from featurepipe.heads.linear.optimisers import OptimiserSettings, Optimum, lbfgs, run
from featurepipe.heads.linear.passes import (
    FitProblem,
    Passes,
    Prepared,
    curvature_bytes,
    matrix_bytes,
    prepare,
    principal_basis,
)
from featurepipe.heads.linear.ridge import MultilabelRidge  # noqa: F401 - older bundles and pickles name it here
from featurepipe.heads.row_shards import concatenated, row_shards_of

Estimator = TypeVar("Estimator", bound="MultilabelLinearClassifier")

_OWN_FROM = 6  # rows, as a multiple of D * D over rows: from there passes cost more than a matrix for each problem
_APPROACH = 60  # iterations in the shared basis before a loss with kinks goes on with matrices of its own
_ROW_SPACE_BYTES = 512 << 20  # what fewer rows than values may take while they are turned
_OFTEN_TOGETHER = (1, 2.0, 1e-3)  # refresh, growth and trust in the shared basis, where curvature costs little
_HISTORY = 24  # vectors of a point's size that an optimiser and its passes hold, 8 bytes a value


class MultilabelLinearClassifier(LinearScores):
    """Base of linear heads for several labels a row, which learn from arrays or ``Blocks``."""

    C: Any
    fit_intercept: bool
    class_weight: Any
    tol: float
    max_iter: int

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Fits all labels together.

        Args:
            X: (n, D) array, or ``Blocks`` such as a ``FeatureSet``, which are streamed.
            y: (n, K) labels: 1 present, 0 absent, NaN unknown, or a data frame of such columns; None for those that ``X``
                carries.
            sample_weight: (n,) non-negative weights; None for one each.

        Returns:
            The estimator.

        Raises:
            UsageError: Features or labels that cannot be learned from; the message says which and where.
        """
        _check_parameters(self)
        data = self._learn(X, y, sample_weight)
        [[solution]] = _solve(self, data, [per_label("C", self.C, data.kept)], None)
        return self._adopt(solution)

    def objective(self) -> Objective:
        """What to minimise for each label, by the parameters."""
        raise NotImplementedError

    def _adopt(self, solution: _Solution) -> Self:
        self.coef_, self.intercept_, self.n_iter_ = solution.coefficients, solution.intercepts, solution.iterations
        return self


@dataclass(frozen=True)
class _Solution:
    """Coefficients (K, D), intercepts (K,) and iterations (K,) of the labels, in original coordinates."""

    coefficients: Floats
    intercepts: Floats
    iterations: npt.NDArray[np.int64]


def fit_label_path(
    estimator: Estimator,
    X: Any,
    y: Any = None,
    *,
    Cs: Sequence[Any],
    folds: Sequence[Any] | None = None,
    sample_weight: Any = None,
) -> list[list[Estimator]]:
    """Fits an estimator for several values of C on several folds, all labels in the same passes over the features.

    A label whose known rows in a fold are of one side only has NaN for its intercept there, and so for its scores.

    Args:
        estimator: A ``MultilabelLogisticRegression`` or ``MultilabelLinearSVC``; it is cloned, its own C is not used.
        X: (n, D) array or ``Blocks``.
        y: (n, K) labels; None for those that ``X`` carries.
        Cs: Values of C, each a number or (K,).
        folds: For each fold the rows to train on (positions or a mask); None for one fold of all rows.
        sample_weight: (n,) weights; None for one each.

    Returns:
        Fitted estimators, one list a fold, in the order of ``Cs``.

    Raises:
        UsageError: Features or labels that cannot be learned from.
    """
    first = clone(estimator)
    _check_parameters(first)
    data = first._learn(X, y, sample_weight)  # noqa: SLF001 - of the same family
    learned = {name: value for name, value in vars(first).items() if name.endswith("_")}
    paths = []
    for row in _solve(first, data, [per_label("C", C, data.kept) for C in Cs], folds):
        fitted = [clone(estimator).set_params(C=C) for C in Cs]
        for head, solution in zip(fitted, row, strict=True):
            vars(head).update(learned)
            head._adopt(solution)  # noqa: SLF001 - of the same module
        paths.append(fitted)
    return paths


def _check_parameters(estimator: MultilabelLinearClassifier) -> None:
    for name, value in (("tol", estimator.tol), ("max_iter", estimator.max_iter)):
        if not value > 0:
            raise UsageError(f"{name}={value!r} of {type(estimator).__name__} must be positive")


def _solve(
    estimator: MultilabelLinearClassifier, data: LabelMatrix, Cs: Sequence[Floats], folds: Sequence[Any] | None
) -> list[list[_Solution]]:
    """Fits each fold, C and label as a problem of its own, all in the same passes."""
    data, back = _in_row_space(data, estimator.memory)
    labels = len(data.names)
    weights = [one.row_weights(estimator.class_weight) for one in _folds(data, folds)]
    offsets = np.cumsum([0, *(len(rows) for rows in weights)])
    sides = np.stack([_sides(rows, data.positive) for rows in weights])  # (F, K, 2): negative, positive
    wanted = [
        (fold, number, label)
        for fold in range(len(weights))
        for number in range(len(Cs))
        for label in range(labels)
        if sides[fold, label].all()
    ]
    problems = [
        FitProblem(int(offsets[fold]) + (label if len(weights[fold]) > 1 else 0), float(Cs[number][label]), label)
        for fold, number, label in wanted
    ]
    objective = estimator.objective()
    starts = [objective.loss.start(sides[fold, label]) for fold, _, label in wanted]
    prepared = prepare(data.blocks, intercept=estimator.fit_intercept, memory=estimator.memory)
    rows = np.concatenate(weights)
    optima = _Batch(estimator, prepared, data.positive, rows, problems, objective).solve(starts)
    warn_unconverged(optima, estimator)
    width = len(prepared.mean)
    found: dict[tuple[int, int, int], Optimum] = dict(zip(wanted, optima, strict=True))
    return [
        [
            _solution([found.get((fold, number, label)) for label in range(labels)], prepared, width, back)
            for number in range(len(Cs))
        ]
        for fold in range(len(weights))
    ]


def _folds(data: LabelMatrix, folds: Sequence[Any] | None) -> list[LabelMatrix]:
    """The data with weights of zero outside each fold."""
    if folds is None:
        return [data]
    ones = np.ones(data.positive.shape[1]) if data.weights is None else data.weights
    inside = []
    for members in folds:
        weights = np.zeros(len(ones))
        weights[members] = ones[members]
        inside.append(replace(data, weights=weights))
    return inside


def _sides(weights: Floats, positive: npt.NDArray[np.int8]) -> Floats:
    """The summed weights of each label's negative and positive rows, (K, 2)."""
    having = (weights * positive).sum(axis=1) if len(weights) > 1 else positive @ weights[0]
    return np.stack([weights.sum(axis=1) - having, having], axis=1)


def _in_row_space(data: LabelMatrix, memory: int | str | None) -> tuple[LabelMatrix, Floats | None]:
    """Of fewer rows than values a row: the rows in a basis (D, n) of their own span, in which all coefficients lie, and it."""
    rows, width = data.blocks.shape
    allowed = _ROW_SPACE_BYTES if memory is None else min(_ROW_SPACE_BYTES, bytes_of(memory))
    if rows >= width or 24 * rows * width > allowed:
        return data, None
    values = concatenated(row_shards_of(data.blocks).map(_all_rows))
    basis, triangle = scipy.linalg.qr(values.T, mode="economic", check_finite=False)
    return replace(data, blocks=ArrayBlocks(np.ascontiguousarray(triangle.T))), np.asarray(basis)


def _all_rows(blocks: Blocks) -> Floats:
    return np.asarray(blocks.read(np.float64))


def _solution(optima: Sequence[Optimum | None], prepared: Prepared, width: int, back: Floats | None) -> _Solution:
    """Puts the labels of one head together and goes back to features that are not centred."""
    coefficients, intercepts = np.zeros((len(optima), width)), np.full(len(optima), np.nan)
    iterations = np.zeros(len(optima), np.int64)
    for label, optimum in enumerate(optima):
        if optimum is not None:
            coefficients[label] = optimum.point[0, :width]
            intercepts[label] = optimum.point[0, width] if optimum.point.shape[1] > width else 0.0
            intercepts[label] -= coefficients[label] @ prepared.mean.astype(np.float64)
            iterations[label] = optimum.iterations
    return _Solution(coefficients if back is None else coefficients @ back.T, intercepts, iterations)


class _Batch:
    """Problems of one column each on the same features, solved together.

    The second derivatives of all labels are about multiples of one another, so their principal directions are those of the
    features. In coordinates along these the optimisers need diagonals alone, which one pass measures for all problems. A
    problem gets a matrix of its own (a Cholesky factor, as in ``BlockLogisticRegression``) where that is cheaper, which
    depends on rows and width, or where diagonals do not tell how near the optimum is: with the squared hinge, whose rows
    beyond the margin have no curvature at all.
    """

    def __init__(
        self,
        estimator: MultilabelLinearClassifier,
        prepared: Prepared,
        positive: npt.NDArray[np.int8],
        weights: Floats,
        problems: Sequence[FitProblem],
        objective: Objective,
    ) -> None:
        self.estimator, self.prepared, self.positive, self.weights = estimator, prepared, positive, weights
        self.problems, self.objective = problems, objective
        limits = [limit for limit in (estimator.memory, prepared.shards.memory) if limit is not None]
        self.allowed = curvature_bytes(min(map(bytes_of, limits), default=None))
        self.width = len(prepared.mean)

    def solve(self, starts: Sequence[Array]) -> list[Optimum]:
        """Returns the optima, from intercepts (1,) to start at."""
        estimator, most = self.estimator, self.estimator.max_iter
        points = [start_point(start, self.width, intercept=estimator.fit_intercept) for start in starts]
        optima = [Optimum(point, 0, converged=False) for point in points]
        kinks = isinstance(self.objective.loss, SquaredHingeLoss)
        if self._shares_a_basis():
            basis = principal_basis(self.prepared, estimator.memory)
            first = min(most, _APPROACH) if kinks else most
            optima = self._in_chunks(optima, range(len(optima)), first, 8 * _HISTORY * (self.width + 1), basis)
        left = [number for number, one in enumerate(optima) if (kinks or not one.converged) and one.iterations < most]
        for number, one in zip(left, self._in_chunks([optima[n] for n in left], left, most, self._matrix), strict=True):
            optima[number] = one
        return finished(optima, self.prepared, most, self._run)

    @property
    def _matrix(self) -> int:
        """Bytes that a problem takes with a matrix of its own."""
        return matrix_bytes(self.prepared) + 8 * _HISTORY * (self.width + 1)

    def _shares_a_basis(self) -> bool:
        """Whether to begin in a basis for all."""
        rows, fits = self.prepared.shards.rows, self._matrix * len(self.problems) <= self.allowed
        return 1 < self.width <= WIDEST and not (fits and _OWN_FROM * rows >= self.width**2)

    def _in_chunks(
        self, optima: Sequence[Optimum], numbers: Sequence[int], most: int, each: int, basis: Array | None = None
    ) -> list[Optimum]:
        """Goes on from optima of the numbered problems, as many at a time as fit into memory if each takes so many bytes."""
        step, found = max(1, self.allowed // each), []
        for first in range(0, len(optima), step):
            chunk, chosen = optima[first : first + step], numbers[first : first + step]
            starts = _turned([one.point for one in chunk], basis)
            solved = self._run(lbfgs, self.prepared, chosen, starts, [most - one.iterations for one in chunk], basis)
            points = _turned([one.point for one in solved], None if basis is None else basis.T)
            found += [
                replace(one, point=point, iterations=one.iterations + before.iterations)
                for one, point, before in zip(solved, points, chunk, strict=True)
            ]
        return found

    def _run(
        self,
        method: Method,
        features: Prepared,
        chosen: Sequence[int],
        starts: Sequence[Array],
        iterations: Sequence[int],
        basis: Array | None = None,
    ) -> list[Optimum]:
        """Solves the chosen problems from where they start, in so many iterations each."""
        loss = self.objective.loss
        passes = Passes(
            features,
            self.positive,
            self.weights,
            [self.problems[number] for number in chosen],
            loss,
            intercept=self.estimator.fit_intercept,
            intercept_penalty=self.objective.intercept_penalty,
            memory=self.estimator.memory,
            basis=basis,
        )
        often = (loss.refresh, loss.growth, loss.trusted) if basis is None else _OFTEN_TOGETHER
        settings = [OptimiserSettings(self.estimator.tol / SAFETY, most, *often) for most in iterations]
        return run([method(start, each) for start, each in zip(starts, settings, strict=True)], passes)


def _turned(points: Sequence[Array], basis: Array | None) -> list[Array]:
    """The coefficients of points in a basis of its directions; intercepts as they are."""
    if basis is None:
        return list(points)
    turned = np.concatenate(points)
    with one_blas_thread:
        turned[:, : len(basis)] = turned[:, : len(basis)] @ basis
    return list(turned[:, None])


class MultilabelLogisticRegression(MultilabelLinearClassifier):
    """Logistic regression for several labels of each row, one against the rest, from arrays or streamed ``Blocks``.

    Minimises for each label k ``C_k * sum_i(w_i * log(1 + exp(-s_ik f_k(x_i)))) + |w_k|^2 / 2`` over the rows where the label
    is known, where s is 1 for rows that have it and -1 for others; the intercept is not penalised. That is the objective of
    scikit-learn's ``OneVsRestClassifier(LogisticRegression())``, fitted to each label's known rows.

    Method: L-BFGS (Liu & Nocedal 1989, "On the limited memory BFGS method for large scale optimization") for all labels at
    once, which share every pass over the features. Features are turned to their principal directions, in which each label's
    second derivative ``C * sum_i(p_i (1 - p_i) x_i x_i') + I`` is nearly diagonal; its diagonal, measured for all labels
    together on rows sampled in proportion to their curvature, is the preconditioner, made exact in the plane of the
    coefficients and the intercept (``SubspacePreconditioner``). Fewer rows than values are put in a basis of their own span
    first, which holds all solutions. Where there are many more rows than
    values squared, and above 4,096 values a row, it is as in ``BlockLogisticRegression``.

    Args:
        C: Inverse strength of the penalty: a number, or (K,) one for each label.
        fit_intercept: Whether to fit one.
        class_weight: None, "balanced" (for each label, rows that have it weigh as much as those that do not), or a dict of
            factors for 0 and 1.
        label_names: (K,); by default the columns of a data frame, those of the features, or numbers from 0.
        one_sided: What to do with a label that every known row has, or none: "error", or "drop" to leave it out with a
            warning.
        tol: How far each objective may be above its minimum, relative to it; estimated, with a safety factor.
        max_iter: Most iterations of one label; each is at least one pass.
        memory: What the fit may hold at once, in bytes or as text ("512MB"): features that fit are kept, others streamed. None
            for as much as the features take.

    Attributes:
        classes_: (K,) names of the labels.
        coef_: (K, D) float64.
        intercept_: (K,).
        n_iter_: (K,) iterations.
        dropped_labels_: Names of the labels left out.
        n_features_in_: D.
    """

    def __init__(
        self,
        C: Any = 1.0,
        *,
        fit_intercept: bool = True,
        class_weight: Any = None,
        label_names: Sequence[str] | None = None,
        one_sided: str = "error",
        tol: float = 1e-5,
        max_iter: int = 10_000,
        memory: int | str | None = None,
    ) -> None:
        self.C = C
        self.fit_intercept = fit_intercept
        self.class_weight = class_weight
        self.label_names = label_names
        self.one_sided = one_sided
        self.tol = tol
        self.max_iter = max_iter
        self.memory = memory

    def objective(self) -> Objective:
        """See ``MultilabelLinearClassifier``."""
        return Objective(BinomialLoss(), one_vs_rest=True, intercept_penalty=0.0)

    def predict_proba(self, X: Any) -> Floats:
        """Returns the (n, K) probability of each label, in the order of ``classes_``; rows need not sum to 1."""
        return np.asarray(expit(self.decision_function(X)))


class MultilabelLinearSVC(MultilabelLinearClassifier):
    """Linear SVM with the squared hinge loss for several labels of each row, from arrays or streamed ``Blocks``.

    Minimises for each label k ``C_k * sum_i(w_i * max(0, 1 - s_ik f_k(x_i))^2) + |w_k|^2 / 2`` over the rows where the label
    is known, where s is 1 for rows that have it and -1 for others: the objective of scikit-learn's
    ``OneVsRestClassifier(LinearSVC(dual=False))``, fitted to each label's known rows. As there, the intercept is penalised as
    the coefficient of one more feature of the constant value ``intercept_scaling``; ``penalise_intercept=False`` leaves it
    free.

    Method: that of ``MultilabelLogisticRegression``; labels then go on as in ``BlockLinearSVC``, each with the Cholesky factor
    of its own second derivative, until that says they are done.

    Args:
        C: Inverse strength of the penalty: a number, or (K,) one for each label.
        fit_intercept: Whether to fit one.
        intercept_scaling: Value of the constant feature; the larger, the less the intercept is penalised.
        penalise_intercept: Whether the intercept is penalised at all.
        class_weight: None, "balanced" (for each label, rows that have it weigh as much as those that do not), or a dict of
            factors for 0 and 1.
        label_names: (K,); by default the columns of a data frame, those of the features, or numbers from 0.
        one_sided: What to do with a label that every known row has, or none: "error", or "drop" to leave it out with a
            warning.
        tol: How far each objective may be above its minimum, relative to it; estimated, with a safety factor.
        max_iter: Most iterations of one label; each is at least one pass.
        memory: What the fit may hold at once, in bytes or as text ("512MB").

    Attributes:
        classes_: (K,) names of the labels.
        coef_: (K, D) float64.
        intercept_: (K,).
        n_iter_: (K,) iterations.
        dropped_labels_: Names of the labels left out.
        n_features_in_: D.
    """

    def __init__(
        self,
        C: Any = 1.0,
        *,
        fit_intercept: bool = True,
        intercept_scaling: float = 1.0,
        penalise_intercept: bool = True,
        class_weight: Any = None,
        label_names: Sequence[str] | None = None,
        one_sided: str = "error",
        tol: float = 1e-5,
        max_iter: int = 10_000,
        memory: int | str | None = None,
    ) -> None:
        self.C = C
        self.fit_intercept = fit_intercept
        self.intercept_scaling = intercept_scaling
        self.penalise_intercept = penalise_intercept
        self.class_weight = class_weight
        self.label_names = label_names
        self.one_sided = one_sided
        self.tol = tol
        self.max_iter = max_iter
        self.memory = memory

    def objective(self) -> Objective:
        """See ``MultilabelLinearClassifier``."""
        if not self.intercept_scaling > 0:
            raise UsageError(f"intercept_scaling={self.intercept_scaling!r} must be positive")
        penalty = self.intercept_scaling**-2 if self.penalise_intercept else 0.0
        return Objective(SquaredHingeLoss(), one_vs_rest=True, intercept_penalty=penalty)
