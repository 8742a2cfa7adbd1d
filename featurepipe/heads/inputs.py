"""What heads learn from and predict on, checked: arrays as scikit-learn checks them, and blocks of any size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data

from featurepipe.errors import UsageError
from featurepipe.heads.blocks import Array, ArrayBlocks, Blocks, SameShape, is_blocks, iterate, labels_of, targets_of
from featurepipe.heads.devices import on_its_device
from featurepipe.heads.row_shards import RowShards, concatenated, remote_row_shards, row_shards_of

Codes = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Found = TypeVar("Found")
_DTYPES = [np.float64, np.float32, np.float16]  # kept as they are; everything else becomes float64


class BlockClassifier(ClassifierMixin):  # type: ignore[misc]
    """A classifier of arrays and ``Blocks``, whose labels may come with the features."""

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Returns the accuracy, a share of 1.

        Args:
            X: (n, D) array or ``Blocks``.
            y: (n,) labels; None for those that ``X`` carries.
            sample_weight: (n,) weights; None for one each.
        """
        return float(super().score(X, labels_of(X, y), sample_weight))


class BlockRegressor(RegressorMixin):  # type: ignore[misc]
    """A regressor of arrays and ``Blocks``, whose targets may come with the features."""

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Returns R2, the share of the targets' variance that the predictions explain.

        Args:
            X: (n, D) array or ``Blocks``.
            y: (n,) numbers; None for those that ``X`` carries.
            sample_weight: (n,) weights; None for one each.
        """
        return float(super().score(X, targets_of(X, y), sample_weight))


@dataclass(frozen=True)
class RegressionData:
    """Checked features and numbers.

    Attributes:
        blocks: (n, D) features; those that are read later raise when a value is not finite.
        targets: (n,) float64.
        weights: (n,) sample weights, or None if all are 1.
    """

    blocks: Blocks
    targets: Floats
    weights: Floats | None

    @property
    def mean(self) -> float:
        """The weighted mean of the targets."""
        return float(np.average(self.targets, weights=self.weights))


@dataclass(frozen=True)
class TrainingData:
    """Checked features and labels.

    Attributes:
        blocks: (n, D) features; those that are read later raise when a value is not finite.
        codes: (n,) position of each row's class in ``classes``.
        classes: (K,) distinct labels, sorted.
        weights: (n,) sample weights times class weights, or None if all are 1.
    """

    blocks: Blocks
    codes: Codes
    classes: Array
    weights: Floats | None


class FiniteBlocks(SameShape):
    """Blocks that raise when a value read is NaN or infinite, naming the rows."""

    def __init__(self, source: Blocks) -> None:
        self.source: Blocks = source

    def row_shards(self) -> RowShards | None:
        """The shards of a spread source, looked at where they are; None for a source that is read here."""
        below = remote_row_shards(self.source)
        return None if below is None else below.through(FiniteBlocks)

    def read(self, dtype: npt.DTypeLike | None = None, *, rows: Array | slice | None = None) -> Array:
        """Reads rows and looks at every value.

        Raises:
            UsageError: A value is NaN or infinite.
        """
        block = self.source.read(dtype, rows=rows)
        if not _all_finite(block):
            numbers = getattr(self.source, "first", 0) + np.arange(self.shape[0])
            raise _non_finite(block, numbers if rows is None else numbers[rows])
        return block


def training_data(
    estimator: Any, features: Any, labels: Any, *, sample_weight: Any = None, class_weight: Any = None
) -> TrainingData:
    """Checks what an estimator is to learn from, and sets its ``n_features_in_`` (and ``feature_names_in_``).

    Args:
        estimator: The one that is being fitted.
        features: (n, D) array, or ``Blocks`` such as a ``FeatureSet``.
        labels: (n,); None takes those that the features carry.
        sample_weight: (n,) or one number; None for ones.
        class_weight: None, ``"balanced"`` or a dict from label to weight, as in scikit-learn.

    Raises:
        UsageError: There are fewer than two classes, a value is not finite, or the lengths differ.
    """
    blocks, found = checked_features(estimator, features, labels, labels_of)
    found = column_or_1d(found, warn=True)
    if len(found) != blocks.shape[0]:
        raise UsageError(f"{blocks.shape[0]} rows of features but {len(found)} labels: give one label a row")
    classes, codes = classes_of(found)
    weights = combined_weights(sample_weight, class_weight, found, classes, codes)
    return TrainingData(blocks, codes, classes, weights)


def regression_data(estimator: Any, features: Any, targets: Any, *, sample_weight: Any = None) -> RegressionData:
    """Checks what an estimator of numbers is to learn from, and sets its ``n_features_in_`` (and ``feature_names_in_``).

    Args:
        estimator: The one that is being fitted.
        features: (n, D) array, or ``Blocks`` such as a ``FeatureSet``.
        targets: (n,) numbers; None takes those that the features carry.
        sample_weight: (n,) or one number; None for ones.

    Raises:
        UsageError: A target is missing, text or infinite, all are the same, a feature is not finite, or the lengths differ.
    """
    blocks, found = checked_features(estimator, features, targets, targets_of)
    found = column_or_1d(found, warn=True)
    if len(found) != blocks.shape[0]:
        raise UsageError(f"{blocks.shape[0]} rows of features but {len(found)} targets: give one number a row")
    weights = sample_weights(sample_weight, len(found))
    numbers_to_learn(found, weights)
    return RegressionData(blocks, found, weights)


def numbers_to_learn(targets: Floats, weights: Floats | None = None) -> None:
    """Refuses targets from which nothing can be learned: fewer than two different numbers among the rows with weight.

    Raises:
        UsageError: All are the same, or there is one row.
    """
    kept = targets if weights is None else targets[weights > 0]
    if len(kept) < 2:
        raise UsageError(f"{len(kept)} rows to learn a number from (n_samples = {len(kept)}): give at least two")
    if kept.min() == kept.max():
        raise UsageError(
            f"constant target: all {len(kept)} rows have the number {kept[0]:g}; a head learns what differs between rows"
        )


def checked_features(
    estimator: Any, features: Any, wanted: Any, wanted_of: Callable[[Any, Any], Found]
) -> tuple[Blocks, Found]:
    """The features as ``Blocks`` that look at their values, and what ``wanted_of`` makes of them and of ``wanted``."""
    features = on_its_device(features)
    if is_blocks(features):
        estimator.n_features_in_ = features.shape[1]
        blocks: Blocks = FiniteBlocks(features)
        found = wanted_of(features, wanted)
    elif wanted is None:
        blocks, found = ArrayBlocks(np.empty((0, 0))), wanted_of(None, None)  # raises
    else:
        array = validate_data(estimator, features, dtype=_DTYPES, ensure_all_finite=False)
        found = wanted_of(features, wanted)
        blocks = _finite_array(array)
    return blocks, found


def classes_of(labels: Array) -> tuple[Array, Codes]:
    """Returns the distinct labels, sorted, and each row's position among them.

    Args:
        labels: (n,), none of them missing (``labels_of``).

    Raises:
        UsageError: A label is infinite, or all are the same.
        ValueError: The labels are numbers on a scale, not classes.
    """
    if labels.dtype.kind == "f" and not _all_finite(labels):
        bad = np.flatnonzero(~np.isfinite(labels))
        raise UsageError(f"Input y contains infinity: {_rows(bad)}; leave these rows out")
    check_classification_targets(labels)
    classes, codes = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise UsageError(
            f"one class only: all {len(labels)} rows are labelled {classes.tolist()[0]!r}; "
            "a head learns to tell at least two classes apart"
        )
    return classes, codes.reshape(-1).astype(np.int64)


def prediction_blocks(estimator: Any, features: Any, *, fitted: bool = True) -> Blocks:
    """Checks what a fitted estimator is to predict on.

    Args:
        estimator: A fitted one.
        features: (n, D) array or ``Blocks``.
        fitted: False if it is still being fitted, and only ``n_features_in_`` is known.

    Raises:
        UsageError: The width is not that of the training, or a value is not finite.
        NotFittedError: The estimator is not fitted.
    """
    if fitted:
        check_is_fitted(estimator)
    features = on_its_device(features)
    if not is_blocks(features):
        options = {"reset": False, "dtype": _DTYPES, "ensure_all_finite": False}
        return _finite_array(validate_data(estimator, features, **options))
    if features.shape[1] != estimator.n_features_in_:
        raise UsageError(
            f"X has {features.shape[1]} features, but {type(estimator).__name__} is expecting "
            f"{estimator.n_features_in_} features as input: give it the columns it was trained on"
        )
    return FiniteBlocks(features)


def map_rows(
    blocks: Blocks,
    function: Callable[[Array], Array],
    *,
    rows: int | None = None,
    memory: int | str | None = None,
    dtype: npt.DTypeLike | None = None,
) -> Array:
    """Applies a function to the features block by block, where they are, and puts what it returns together.

    Args:
        blocks: (n, D).
        function: From (m, D) to (m,) or (m, K); of rows alone, whatever block they are in.
        rows: Rows of a block; by default what ``memory`` allows.
        memory: What the blocks alive at one time may take.
        dtype: Of the blocks given to the function.
    """
    parts = row_shards_of(blocks).map(partial(_mapped, function=function, rows=rows, memory=memory, dtype=dtype))
    return concatenated(parts)


def _mapped(
    blocks: Blocks,
    *,
    function: Callable[[Array], Array],
    rows: int | None,
    memory: int | str | None,
    dtype: npt.DTypeLike | None,
) -> Array:
    parts = [function(block) for _, block in iterate(blocks, rows=rows, memory=memory, dtype=dtype)]
    return np.concatenate(parts) if parts else np.asarray(function(np.empty(blocks.shape, dtype or np.float64)))


def linear_scores(
    estimator: Any, features: Any, *, memory: int | str | None = None, dtype: npt.DTypeLike | None = None
) -> Array:
    """Decision values of a fitted linear estimator (``coef_`` (R, D) or (D,), ``intercept_`` (R,)), block by block.

    Returns:
        (n, K), or (n,) for two classes and for a number.
    """
    blocks = prediction_blocks(estimator, features)
    affine = partial(_affine, coef=np.atleast_2d(estimator.coef_), intercept=estimator.intercept_)
    scores = map_rows(blocks, affine, memory=memory, dtype=dtype)
    return np.asarray(scores[:, 0] if scores.shape[1] == 1 else scores)


def _affine(block: Array, *, coef: Array, intercept: Array) -> Array:
    return np.asarray(block @ coef.T + intercept)


def labels_from(scores: Array, classes: Array) -> Array:
    """The class with the highest score: of (n, K) scores, or of the (n,) signs for two classes."""
    chosen = (scores > 0).astype(np.intp) if scores.ndim == 1 else scores.argmax(axis=1)
    labels: Array = np.asarray(classes)[chosen]
    return labels


WEIGHTS_WITHIN = 1e30
"""Weights of rows lie between one over this, or are zero, and this: float32, in which some heads add them up, ends soon after."""


def combined_weights(
    sample_weight: Any, class_weight: Any, labels: Array, classes: Array, codes: Codes
) -> Floats | None:
    """One weight a row from weights of rows and classes, by one rule for all heads: a weight is a number of equal rows.

    So ``"balanced"`` gives each class the same sum of weights: with ``sample_weight``, n_k in ``n / (K n_k)`` is the sum of
    the class's weights, and a row of weight 0 is a row that is not there.

    Args:
        sample_weight: (n,) or one number; None for ones.
        class_weight: None, ``"balanced"`` or a dict from label to weight.
        labels: (n,).
        classes: (K,) distinct labels.
        codes: (n,) position of each label among them.

    Returns:
        (n,) float64, or None where all rows weigh the same.

    Raises:
        UsageError: Weights are negative, not finite, beyond any number of rows or too few, or all those of a class are zero.
    """
    weights = sample_weights(sample_weight, len(labels))
    if isinstance(class_weight, str) and class_weight == "balanced":
        by_class = np.array(list(balanced(classes, codes, weights).values()))[codes]  # looks at the sums of the classes
        return np.asarray(by_class if weights is None else weights * by_class)
    if class_weight is not None:
        by_class = compute_sample_weight(class_weight, labels)
        weights = np.asarray(by_class if weights is None else weights * by_class)
    if weights is not None:
        _sums_of_classes(codes, weights, classes)
    return weights


def sample_weights(sample_weight: Any, count: int) -> Floats | None:
    """Returns checked weights of rows, (n,) float64, or None for ones.

    Args:
        sample_weight: (n,) or one number; None for ones.
        count: n.

    Raises:
        UsageError: Weights are negative, not finite, beyond any number of rows, all zero or too few.
    """
    if sample_weight is None:
        return None
    weights = np.asarray(sample_weight, np.float64, order="C")  # libsvm takes no other
    weights = np.full(count, float(weights)) if weights.ndim == 0 else weights
    if weights.ndim != 1:
        raise UsageError(f"Sample weights must be 1D array or scalar, these have shape {weights.shape}")
    if len(weights) != count:
        raise UsageError(f"sample_weight.shape == {weights.shape}, expected ({count},): one weight a row")
    wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(wrong):
        raise UsageError(f"sample_weight must be finite and not negative: {_rows(wrong)} are not")
    if not weights.any():
        raise UsageError("sample_weight is zero for every row: no row is left to learn from")
    least, most = float(weights[weights > 0].min()), float(weights.max())
    if least < 1 / WEIGHTS_WITHIN or most > WEIGHTS_WITHIN:
        raise UsageError(
            f"sample_weight has values from {least:g} to {most:g}; a weight is a number of equal rows: scale them to lie "
            f"between {1 / WEIGHTS_WITHIN:g} and {WEIGHTS_WITHIN:g}"
        )
    return weights


def balanced(classes: Array, codes: Codes, weights: Floats | None) -> dict[Any, float]:
    """The weight of each class that gives all the same sum of weights, ``n / (K n_k)``, in the order of ``classes``."""
    sums = _sums_of_classes(codes, weights, classes)
    return dict(zip(classes.tolist(), (sums.sum() / (len(classes) * sums)).tolist(), strict=True))


def _sums_of_classes(codes: Codes, weights: Floats | None, classes: Array) -> Floats:
    """The summed weights of each class, (K,); all must be positive."""
    sums = np.bincount(codes, weights, len(classes)).astype(np.float64)
    if not sums.all():
        shown = ", ".join(repr(label) for label in classes[sums == 0].tolist()[:5])
        raise UsageError(f"every row of class {shown} has weight zero: leave these rows out, or give them weight")
    return sums


def _finite_array(array: Array) -> ArrayBlocks:
    if not all(_all_finite(block) for _, block in iterate(array, dtype=array.dtype)):
        raise _non_finite(array, np.arange(len(array)))
    return ArrayBlocks(array)


def _all_finite(values: Array) -> bool:
    """One sum says yes; where the sum overflows, every value is looked at."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(values.sum(dtype=np.float64)) or np.isfinite(values).all())


def _non_finite(block: Array, numbers: npt.NDArray[np.intp]) -> UsageError:
    bad = numbers[~np.isfinite(block).all(axis=1)]
    kind = "NaN" if np.isnan(block).any() else "infinity"
    return UsageError(f"Input X contains {kind}: {_rows(bad)}; heads learn from and predict on finite features only")


def _rows(numbers: npt.NDArray[np.intp]) -> str:
    shown = ", ".join(str(number) for number in numbers[:5])
    return (
        f"row {shown}" if len(numbers) == 1 else f"{len(numbers)} rows ({shown}{', ...' if len(numbers) > 5 else ''})"
    )
