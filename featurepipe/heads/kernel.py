"""Heads with a Gaussian kernel: a support vector machine, exact or by landmarks above a size, and ridge regression, exact."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import scipy.linalg
from sklearn.base import BaseEstimator
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.svm import SVC
from sklearn.utils import check_random_state
from threadpoolctl import threadpool_limits

from featurepipe.display import bytes_of
from featurepipe.errors import UsageError
from featurepipe.heads.blocks import Array, Blocks, MappedBlocks, iterate, working_dtype
from featurepipe.heads.inputs import (
    BlockClassifier,
    BlockRegressor,
    Floats,
    TrainingData,
    labels_from,
    map_rows,
    prediction_blocks,
    regression_data,
    training_data,
)
from featurepipe.heads.neighbours import rows_kept
from featurepipe.heads.row_shards import remote_row_shards, row_shards_of
from featurepipe.heads.sampling import SomeRows

KERNEL_BYTES = 64 << 20
"""Of kernel values at one time, if no memory is given."""

_FEATURE_BYTES = 2 << 30  # up to which kernel features are kept, if no memory is given


class RBFSVM(BlockClassifier, BaseEstimator):  # type: ignore[misc]
    """A support vector machine with the kernel ``exp(-gamma |x - z|^2)``.

    Minimises ``C * sum_i(w_i * max(0, 1 - s_i f(x_i))) + |f|^2 / 2`` for each pair of classes, where s is 1 for rows of
    the one and -1 for the other, and ``|f|`` is the norm in the kernel's space. The linear SVM on landmarks squares the hinge and
    separates one class from the rest.

    Up to ``exact_rows`` rows it is ``SVC``, fitted one-vs-one (``fit_one_vs_one``), or by libsvm as it is where kernel matrices
    do not fit into ``memory``. Time and kernel matrices grow with the square of the rows: 20,000 rows of 472 values take 19 s
    on two cores, so the default keeps a fit under a minute.

    Above that, ``n_components`` random training rows serve as landmarks (Williams & Seeger 2001, "Using the Nystroem method to
    speed up kernel machines"): each row becomes the vector of its kernel values with them, whitened by the landmarks' own
    kernel, and a linear SVM learns on those. This streams blocks in bounded memory. ``method_`` tells which it was.

    Both predict by matrix products, many times faster than libsvm, on arrays and ``Blocks``.

    Args:
        C: Inverse strength of the penalty, > 0.
        gamma: ``"scale"`` for 1 / (D * variance of all values), ``"auto"`` for 1 / D, or a positive number.
        gamma_factor: What that is multiplied by; searches vary this, as the best gamma moves with the scale.
        exact_rows: Most rows for the exact method; 0 for never.
        n_components: Landmarks of the approximation.
        class_weight: None, ``"balanced"`` or a dict from label to weight.
        random_state: Seed of the choice of landmarks.
        memory: What blocks and kernel values alive at one time may take (bytes or "2GB"), half of it for kept kernel features.
            The rows that the exact method holds are extra.

    Attributes:
        classes_: (K,) labels.
        method_: ``"exact"`` or ``"nystroem"``.
        method_text_: The same in a sentence.
        gamma_: The number used.
        points_: (P, D) support vectors, in the order of the classes, or landmarks.
        weights_: Exact: (K - 1, P), those of ``OneVsOne``. Nystroem: (K, P), (1, P) for two classes.
        intercept_: One for each pair of classes (exact), or for each row of ``weights_``.
        counts_: Exact: (K,) support vectors of each class.
        n_features_in_: D.
    """

    def __init__(
        self,
        C: float = 1.0,
        *,
        gamma: float | str = "scale",
        gamma_factor: float = 1.0,
        exact_rows: int = 20_000,
        n_components: int = 2000,
        class_weight: Any = None,
        random_state: Any = None,
        memory: int | str | None = None,
    ) -> None:
        self.C = C
        self.gamma = gamma
        self.gamma_factor = gamma_factor
        self.exact_rows = exact_rows
        self.n_components = n_components
        self.class_weight = class_weight
        self.random_state = random_state
        self.memory = memory

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Fits by the method that the number of rows asks for.

        Args:
            X: (n, D) array or ``Blocks``.
            y: (n,) labels; None takes those of a ``FeatureSet``.
            sample_weight: (n,) or one number.

        Raises:
            UsageError: One class only, a value that is not finite, or a wrong parameter.
        """
        _check_parameters(self)
        data = training_data(self, X, y, sample_weight=sample_weight, class_weight=self.class_weight)
        data = _without_zero_weights(data)
        self.classes_ = data.classes
        self.gamma_ = self.gamma_factor * gamma_of(self.gamma, data.blocks, self.memory)
        if data.blocks.shape[0] <= self.exact_rows:
            self._fit_exact(data)
        else:
            self._fit_landmarks(data)
        return self

    def decision_function(self, X: Any) -> Floats:
        """Returns a score of each class against the rest, (n, K); for two classes that of the second, (n,).

        The exact method's are those of ``SVC(decision_function_shape="ovr")``: wins over each other class plus a
        fraction for their margins.
        """
        blocks = prediction_blocks(self, X)
        several = len(self.classes_) ** 2 if self.method_ == "exact" else 0
        budget = KERNEL_BYTES if self.memory is None else bytes_of(self.memory) // 2
        rows = max(16, budget // (16 * (len(self.points_) + several)))
        return map_rows(blocks, self._block_scores, rows=min(rows, 8192), dtype=np.float64)

    def predict(self, X: Any) -> Array:
        """Returns (n,) labels: of the highest score, as ``SVC(break_ties=True)``."""
        return labels_from(self.decision_function(X), self.classes_)

    def _fit_exact(self, data: TrainingData) -> None:
        rows = data.blocks.read(working_dtype(data.blocks.dtype))
        memory = None if self.memory is None else bytes_of(self.memory)
        settings: dict[str, Any] = {"C": self.C, "gamma": self.gamma_, "sample_weight": data.weights}
        machines = fit_one_vs_one(rows, data.codes, memory=memory, **settings)
        if machines is None:  # libsvm as it is keeps few kernel values at a time, and is slower
            weights = settings.pop("sample_weight")
            machines = of_machine(SVC(**settings).fit(rows.astype(np.float64, copy=False), data.codes, weights))
        self.method_ = "exact"
        self.method_text_ = f"exact: a support vector machine on {len(rows):,} rows (exact_rows={self.exact_rows:,})"
        self.points_, self.counts_ = rows[machines.support], machines.counts
        self.weights_, self.intercept_ = machines.weights, machines.intercepts

    def _fit_landmarks(self, data: TrainingData) -> None:
        from featurepipe.heads.linear.classifiers import BlockLinearSVC

        count = data.blocks.shape[0]
        chosen = check_random_state(self.random_state).choice(count, min(self.n_components, count), replace=False)
        landmarks = data.blocks.read(np.float64, rows=np.sort(chosen))
        whitening = _inverse_root(rbf_kernel(landmarks, gamma=self.gamma_))
        mapping = _KernelFeatures(landmarks, whitening, self.gamma_)
        features: Any = MappedBlocks(data.blocks, mapping, whitening.shape[1])
        needed = count * features.width * features.dtype.itemsize
        few = needed <= (_FEATURE_BYTES if self.memory is None else bytes_of(self.memory) // 2)
        keep = few and remote_row_shards(features) is None
        if keep:
            features = map_rows(data.blocks, mapping, memory=self.memory).astype(features.dtype, copy=False)
        machine = BlockLinearSVC(C=self.C, memory=self.memory).fit(features, data.codes, sample_weight=data.weights)
        self.method_ = "nystroem"
        self.method_text_ = (
            f"Nystroem: {count:,} rows are more than exact_rows={self.exact_rows:,}, so {len(landmarks):,} landmarks and a "
            f"linear SVM; kernel features ({needed / 1e6:,.0f} MB) {'kept in memory' if keep else 'computed in every pass'}"
        )
        self.points_ = landmarks.astype(working_dtype(data.blocks.dtype))
        self.weights_ = np.atleast_2d(machine.coef_) @ whitening.T
        self.intercept_ = np.atleast_1d(machine.intercept_)

    def _block_scores(self, block: Array) -> Floats:
        kernel = rbf_kernel(block, self.points_.astype(np.float64, copy=False), gamma=self.gamma_)
        if self.method_ == "exact":
            margins = self._one_vs_one_margins(kernel)
            return margins[:, 1, 0] if len(self.classes_) == 2 else _one_against_rest(margins)
        scores = np.asarray(kernel @ self.weights_.T + self.intercept_)
        return scores[:, 0] if len(self.classes_) == 2 else scores

    def _one_vs_one_margins(self, kernel: Floats) -> Floats:
        """Margins of every class (second axis) against every other (third), (m, K, K), the diagonal zero."""
        classes = len(self.classes_)
        margins = np.zeros((len(kernel), classes, classes))
        stops = np.cumsum(self.counts_)
        for code, (stop, count) in enumerate(zip(stops, self.counts_, strict=True)):
            own = slice(stop - count, stop)
            others = np.delete(np.arange(classes), code)
            margins[:, code, others] = kernel[:, own] @ self.weights_[:, own].T
        first, second = np.triu_indices(classes, 1)
        pairwise = margins[:, first, second] + margins[:, second, first] + self.intercept_
        margins[:, first, second], margins[:, second, first] = pairwise, -pairwise
        return margins


def _without_zero_weights(data: TrainingData) -> TrainingData:
    """The rows that weigh something: libsvm leaves out the others itself, and counts its support vectors without them."""
    if data.weights is None or data.weights.all() or remote_row_shards(data.blocks) is not None:
        return data
    kept = np.flatnonzero(data.weights)
    return replace(data, blocks=SomeRows(data.blocks, kept), codes=data.codes[kept], weights=data.weights[kept])


class _KernelFeatures:
    """Maps rows to whitened kernel values with the landmarks; its inner products approximate the kernel."""

    def __init__(self, landmarks: Floats, whitening: Floats, gamma: float) -> None:
        self.landmarks, self.whitening, self.gamma = landmarks, whitening, gamma

    def __call__(self, block: Array) -> Array:
        kernel = rbf_kernel(block, self.landmarks.astype(block.dtype, copy=False), gamma=self.gamma)
        return np.asarray(kernel @ self.whitening.astype(block.dtype, copy=False))


def _one_against_rest(margins: Floats) -> Floats:
    """Wins of each class over another plus its summed margins squeezed into a third: scikit-learn's rule, (m, K)."""
    classes = margins.shape[1]
    lower = np.tri(classes, k=-1, dtype=bool)
    won = (margins > 0) | ((margins == 0) & lower.T)  # a draw goes to the first of the two
    total = margins.sum(axis=2)
    return np.asarray(won.sum(axis=2) + total / (3 * (np.abs(total) + 1)))


def _inverse_root(kernel: Floats) -> Floats:
    """W with ``W W^T`` the pseudo-inverse of ``kernel``; directions below rounding are left out."""
    values, vectors = scipy.linalg.eigh(kernel, check_finite=False)
    kept = values > values[-1] * 1e-10
    return np.asarray(vectors[:, kept] / np.sqrt(values[kept]))


def gamma_of(gamma: float | str, blocks: Blocks, memory: int | str | None) -> float:
    """The number that ``"scale"``, ``"auto"`` or a number stands for, as in scikit-learn's ``SVC``."""
    width = blocks.shape[1]
    if gamma == "auto":
        return 1 / width
    if gamma != "scale":
        return float(gamma)
    variance = row_shards_of(blocks).reduce(partial(_values, memory=memory)).variance
    return 1 / (width * variance) if variance else 1.0


@dataclass(frozen=True)
class _Values:
    """How many values there are, their mean, and the sum of their squared distances from it."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def variance(self) -> float:
        return self.squares / self.count

    def __add__(self, other: _Values) -> _Values:
        """Those of both (Chan, Golub & LeVeque 1983)."""
        total, gap = self.count + other.count, other.mean - self.mean
        squares = self.squares + other.squares + gap**2 * self.count * other.count / total
        return _Values(total, self.mean + gap * other.count / total, squares)


def _values(blocks: Blocks, *, memory: int | str | None) -> _Values:
    """Of all values in a shard, in one pass."""
    found = _Values()
    for _, block in iterate(blocks, memory=memory, dtype=np.float64):
        mean = float(block.mean())
        found += _Values(block.size, mean, float(((block - mean) ** 2).sum()))
    return found


def _check_parameters(machine: RBFSVM) -> None:
    for name in ("C", "gamma_factor", "n_components"):
        if not getattr(machine, name) > 0:
            raise UsageError(f"{name}={getattr(machine, name)!r} must be positive")
    check_gamma(machine.gamma)


def check_gamma(gamma: float | str) -> None:
    """Refuses what is neither ``"scale"``, ``"auto"`` nor a positive number."""
    if gamma not in ("scale", "auto") and (isinstance(gamma, str) or not gamma > 0):
        raise UsageError(f"gamma={gamma!r} must be 'scale', 'auto' or a positive number")


_JOINT_BYTES = (
    24  # per entry of a kernel matrix of all rows: float64, its float32 source, and libsvm's copy of rows in use
)
_SOLVER_BYTES = 200 << 20  # libsvm's copy of rows in use, at most
_BETWEEN_ROWS = 1024  # of one class, whose kernel values with another are computed at a time
_DEFAULT_MEMORY = 4 << 30
_FEW_PAIRS = 400  # above, what each costs besides its rows (a millisecond) outweighs one kernel matrix of all rows


@dataclass(frozen=True)
class OneVsOne:
    """The support vectors of all pairs of classes, laid out as ``SVC`` does.

    Attributes:
        support: (P,) rows that are support vectors of some pair, class by class.
        counts: (K,) how many of each class.
        weights: (K - 1, P) as ``SVC.dual_coef_``: for a row of class i, its weight against class j stands in line j,
            or j - 1 if j > i.
        intercepts: (K (K - 1) / 2,) of the pairs (0, 1), (0, 2), ..., (1, 2), ...; positive margins are for the first.
    """

    support: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    weights: Floats
    intercepts: Floats


def fit_one_vs_one(
    rows: Array,
    codes: npt.NDArray[np.int64],
    *,
    C: float,
    gamma: float,
    sample_weight: Floats | None = None,
    memory: int | None = None,
) -> OneVsOne | None:
    """Fits a Gaussian-kernel SVM one class against one other, as libsvm does, many times faster in high dimensions.

    libsvm computes kernel values one by one. Here the kernel matrix of a pair of classes is made by matrix products, libsvm's
    solver (Fan, Chen & Lin 2005) then works on finished values, and as many pairs run at once as there are cores and memory for.
    The values of a class with itself, half of each matrix, are computed once for all of its pairs if they fit beside one pair.
    Hundreds of small pairs share one kernel matrix of all rows instead, if that fits.

    Args:
        rows: (n, D) features, float32 or float64.
        codes: (n,) class numbers from 0 to K - 1, each present.
        C: inverse strength of the penalty.
        gamma: of the kernel ``exp(-gamma |x - z|^2)``.
        sample_weight: (n,), all positive; multiplies C row by row.
        memory: bytes that kernel matrices alive at one time may take; 4 GiB by default.

    Returns:
        The support vectors, or None if the matrix of the largest pair does not fit.
    """
    members = [np.flatnonzero(codes == code) for code in range(int(codes.max()) + 1)]
    pairs = list(itertools.combinations(range(len(members)), 2))
    allowed = memory or _DEFAULT_MEMORY
    if len(pairs) > _FEW_PAIRS and _JOINT_BYTES * len(rows) ** 2 <= allowed:
        return of_machine(SVC(C=C, kernel="precomputed").fit(gaussian(rows, gamma), codes, sample_weight))
    cores = min(os.cpu_count() or 1, len(pairs))
    plan = _plan([len(own) for own in members], rows.dtype.itemsize, allowed, cores)
    if plan.at_once < 1:
        return None

    def within(code: int) -> Array:
        return gaussian(rows[members[code]], gamma, rows.dtype)

    def fit_pair(pair: tuple[int, int]) -> tuple[Array, Floats, float]:
        first, second = (rows[members[code]] for code in pair)
        kernel = np.empty((len(first) + len(second),) * 2)
        for code, block in zip(pair, _squares(kernel, len(first)), strict=True):
            block[:] = kept[code] if plan.keeps else within(code)
        _fill_between(kernel, first, second, gamma)
        own = np.concatenate([members[code] for code in pair])
        weights = None if sample_weight is None else sample_weight[own]
        machine = SVC(C=C, kernel="precomputed").fit(kernel, codes[own], weights)
        # Of two classes SVC reports margins for the second; among several, for the first.
        return own[machine.support_], -machine.dual_coef_[0], -float(machine.intercept_[0])

    with (
        threadpool_limits(max(1, (os.cpu_count() or 1) // plan.at_once), user_api="blas"),
        ThreadPoolExecutor(plan.at_once) as pool,
    ):
        kept = list(pool.map(within, range(len(members)))) if plan.keeps else []
        return _joined(list(pool.map(fit_pair, pairs)), pairs, codes)


@dataclass(frozen=True)
class _Plan:
    """How many pairs are fitted at one time, and whether each class's kernel values with itself are kept for all its pairs."""

    at_once: int
    keeps: bool


def _plan(counts: Sequence[int], itemsize: int, allowed: int, most: int) -> _Plan:
    """What fits into so many bytes, for classes of so many rows whose kernel values take ``itemsize`` bytes."""
    large, small = sorted(counts)[:-3:-1]
    pair = 8 * (large + small) ** 2 + min(_SOLVER_BYTES, 4 * (large + small) ** 2)
    keeping = itemsize * sum(count**2 for count in counts)
    kept = min(most, (allowed - keeping) // pair)
    computed = min(most, allowed // (pair + 2 * itemsize * large**2))
    return _Plan(kept, keeps=True) if kept >= max(1, computed) else _Plan(computed, keeps=False)


def _squares(kernel: Floats, first: int) -> tuple[Floats, Floats]:
    """The parts of a pair's kernel matrix that belong to one class, whose first has so many rows."""
    return kernel[:first, :first], kernel[first:, first:]


def _fill_between(kernel: Floats, first: Array, second: Array, gamma: float) -> None:
    """Fills the two parts of a pair's kernel matrix that belong to rows of both classes."""
    squares = np.einsum("nd,nd->n", second, second)
    for start in range(0, len(first), _BETWEEN_ROWS):
        some = first[start : start + _BETWEEN_ROWS]
        values = some @ second.T
        _to_kernel(values, np.einsum("nd,nd->n", some, some), squares, gamma)
        kernel[start : start + len(some), len(first) :] = values
        kernel[len(first) :, start : start + len(some)] = values.T


def of_machine(machine: SVC) -> OneVsOne:
    """The support vectors of a fitted ``SVC`` of all classes."""
    sign = -1.0 if len(machine.classes_) == 2 else 1.0  # of two classes SVC reports margins for the second
    counts = machine.n_support_.astype(np.int64)
    return OneVsOne(machine.support_.astype(np.int64), counts, sign * machine.dual_coef_, sign * machine.intercept_)


def gaussian(rows: Array, gamma: float, dtype: npt.DTypeLike = np.float64) -> Array:
    """The kernel matrix ``exp(-gamma |x - z|^2)`` of rows with themselves, (n, n) of a dtype; its diagonal is 1."""
    squares = np.einsum("nd,nd->n", rows, rows)
    kernel = rows @ rows.T
    _to_kernel(kernel, squares, squares, gamma)
    np.fill_diagonal(kernel, 1.0)
    return kernel.astype(dtype, copy=False)


def _to_kernel(products: Array, first: Array, second: Array, gamma: float) -> None:
    """Overwrites products (m, n) of rows whose squared lengths are given, (m,) and (n,), by their kernel values."""
    products *= -2
    products += second
    products += first[:, None]
    np.maximum(products, 0, out=products)
    products *= -gamma
    np.exp(products, out=products)


def _joined(
    found: Sequence[tuple[Array, Floats, float]], pairs: Sequence[tuple[int, int]], codes: npt.NDArray[Any]
) -> OneVsOne:
    support = np.unique(np.concatenate([rows for rows, _, _ in found]))
    support = support[np.argsort(codes[support], kind="stable")]
    place = np.empty(len(codes), np.int64)
    place[support] = np.arange(len(support))
    classes = int(codes.max()) + 1
    weights = np.zeros((classes - 1, len(support)))
    for (rows, values, _), (first, second) in zip(found, pairs, strict=True):
        line = np.where(codes[rows] == first, second - 1, first)
        weights[line, place[rows]] = values
    return OneVsOne(support, np.bincount(codes[support], minlength=classes), weights, np.array([b for *_, b in found]))


class BlockKernelRidge(BlockRegressor, BaseEstimator):  # type: ignore[misc]
    """Least squares in the space of the kernel ``exp(-gamma |x - z|^2)`` with an L2 penalty.

    Minimises ``sum_i(w_i * (f(x_i) - (y_i - m))^2) + alpha * |f|^2``, where m is the (weighted) mean of the targets, which is
    added to the predictions, and ``|f|`` the norm in the kernel's space (Saunders, Gammerman & Vovk 1998, "Ridge regression
    learning algorithm in dual variables"). It is scikit-learn's ``KernelRidge`` of the centred targets.

    The kernel matrix of all training rows is held twice (16 n^2 bytes: 6.4 GB for 20,000 rows) and solved in n^3 / 3 steps, so
    more than ``exact_rows`` rows are refused. It predicts by matrix products on arrays and ``Blocks``.

    Args:
        alpha: Strength of the penalty, > 0.
        gamma: ``"scale"`` for 1 / (D * variance of all values), ``"auto"`` for 1 / D, or a positive number.
        gamma_factor: What that is multiplied by; searches vary this, as the best gamma moves with the scale.
        exact_rows: Most rows.
        memory: What the kernel matrices may take, and kernel values alive at one time in prediction (bytes or "2GB"). The
            training rows are extra.

    Attributes:
        gamma_: The number used.
        points_: (n, D) training rows with weight.
        dual_coef_: (n,) float64.
        intercept_: float, m.
        n_features_in_: D.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        gamma: float | str = "scale",
        gamma_factor: float = 1.0,
        exact_rows: int = 20_000,
        memory: int | str | None = None,
    ) -> None:
        self.alpha = alpha
        self.gamma = gamma
        self.gamma_factor = gamma_factor
        self.exact_rows = exact_rows
        self.memory = memory

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Solves ``(K + alpha / w) a = y - m``.

        Args:
            X: (n, D) array or ``Blocks``.
            y: (n,) numbers; None takes the targets of a ``FeatureSet``.
            sample_weight: (n,) or one number.

        Raises:
            UsageError: More than ``exact_rows`` rows or than ``memory`` holds, a target that is missing, infinite or no number,
                the same number in every row, a feature that is not finite, or a wrong parameter.
        """
        for name in ("alpha", "gamma_factor"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name}={getattr(self, name)!r} must be positive")
        check_gamma(self.gamma)
        data = regression_data(self, X, y, sample_weight=sample_weight)
        count = data.blocks.shape[0]
        if count > self.exact_rows:
            raise UsageError(
                f"kernel-ridge solves for all training rows at once, and {count:,} are more than exact_rows={self.exact_rows:,}: "
                "train on fewer rows, or take ridge or xgboost, which stream them"
            )
        if self.memory is not None and 16 * count**2 > bytes_of(self.memory):
            raise UsageError(
                f"kernel-ridge on {count:,} rows holds kernel matrices of {16 * count**2 / 1e6:,.0f} MB, more than the memory "
                f"allowed ({self.memory}); allow more, train on fewer rows, or take ridge or xgboost"
            )
        self.gamma_ = self.gamma_factor * gamma_of(self.gamma, data.blocks, self.memory)
        rows = rows_kept(data.blocks, None, "kernel-ridge", "ridge, xgboost")
        self.intercept_ = data.mean
        centred, weights = data.targets - data.mean, data.weights
        if weights is not None:
            rows, centred, weights = (array[weights > 0] for array in (rows, centred, weights))
        system = gaussian(rows.astype(np.float64, copy=False), self.gamma_)
        np.einsum("ii->i", system)[:] += self.alpha if weights is None else self.alpha / weights
        self.points_ = rows
        self.dual_coef_ = scipy.linalg.solve(system, centred, assume_a="pos", overwrite_a=True, check_finite=False)
        return self

    def predict(self, X: Any) -> Floats:
        """Returns (n,) float64 numbers."""
        blocks = prediction_blocks(self, X)
        budget = KERNEL_BYTES if self.memory is None else bytes_of(self.memory) // 2
        rows = max(16, min(8192, budget // (16 * len(self.points_))))
        work = partial(_numbers, points=self.points_, weights=self.dual_coef_, gamma=self.gamma_)
        return map_rows(blocks, work, rows=rows, dtype=np.float64) + self.intercept_


def _numbers(block: Array, *, points: Array, weights: Floats, gamma: float) -> Floats:
    return np.asarray(rbf_kernel(block, points.astype(np.float64, copy=False), gamma=gamma) @ weights)
