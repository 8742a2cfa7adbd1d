"""Linear heads as one affine map from features to scores, scaling and PCA folded in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import is_regressor

from featurepipe.errors import UsageError

Floats = npt.NDArray[np.float64]


def linear_map(head: Any) -> tuple[Floats, Floats]:
    """Returns the affine map whose outputs are the head's decision values.

    For two classes its rows give minus and plus half the margin, so that the softmax of the outputs is what the head's
    probabilities are, and ``class_scores`` up to a constant for each image. For centroids it is ``x . c - |c|^2 / 2``. Of a
    regressor the only row gives the number.

    Args:
        head: A fitted linear head, or a pipeline that keeps some values, scales and projects before one.

    Returns:
        weight (K, D) and bias (K,), both float64, rows in the order of ``head.classes_``; (1, D) and (1,) for a number;
        (K - 1, D) and (K - 1,) for the steps between ordered classes.

    Raises:
        UsageError: The head, or a step before it, is no affine map.
    """
    steps = [step for _, step in getattr(head, "steps", [("head", head)]) if step not in (None, "passthrough")]
    weight, bias = _last(steps[-1])
    for step in reversed(steps[:-1]):
        if hasattr(step, "columns_"):
            narrow, weight = weight, np.zeros((len(weight), step.n_features_in_))
            weight[:, step.columns_] = narrow
            continue
        matrix, centre = _step(step)
        weight = weight * matrix if matrix.ndim == 1 else weight @ matrix
        bias = bias - weight @ centre
    return weight, bias


def head_of_map(target_type: str, classes: Sequence[str], weight: Floats, bias: Floats) -> Any:
    """Returns a fitted estimator that scores by an affine map, as `linear_map` gives it.

    Args:
        target_type: ``"multiclass"`` (logistic regression), ``"multilabel"`` (one for each label) or ``"continuous"`` (ridge).
        classes: K names in the order of the rows; none for a number.
        weight: (K, D), or (1, D) for a number.
        bias: (K,), or (1,).
    """
    from featurepipe.heads import BlockLogisticRegression, BlockRidge, MultilabelLogisticRegression

    weight, bias = np.asarray(weight, np.float64), np.asarray(bias, np.float64)
    if target_type == "continuous":
        head: Any = BlockRidge()
        head.coef_, head.intercept_ = weight[0], float(bias[0])
    elif target_type == "multilabel":
        head = MultilabelLogisticRegression()
        head.coef_, head.intercept_, head.dropped_labels_ = weight, bias, np.array([], np.str_)
    else:
        head = BlockLogisticRegression()
        both = len(classes) == 2
        head.coef_ = weight[1:] - weight[:1] if both else weight
        head.intercept_ = bias[1:] - bias[:1] if both else bias
    if target_type != "continuous":
        head.classes_, head.n_iter_ = np.array(classes), np.zeros(1, np.int64)
    head.n_features_in_ = int(weight.shape[1])
    return head


def _last(head: Any) -> tuple[Floats, Floats]:
    classes = getattr(head, "classes_", ())
    if hasattr(head, "centroids_"):
        weight = np.asarray(head.centroids_, np.float64)
        bias = -0.5 * np.einsum("kd,kd->k", weight, weight)
    elif hasattr(head, "coef_") and hasattr(head, "intercept_"):
        weight = np.atleast_2d(np.asarray(head.coef_, np.float64))
        bias = np.broadcast_to(np.asarray(head.intercept_, np.float64), len(weight)).copy()
    else:
        weight, bias = np.empty((0, 0)), np.empty(0)
    if hasattr(head, "step_scores"):
        return weight, bias
    if not hasattr(head, "classes_") and is_regressor(head) and len(weight) == 1:
        return weight, bias
    if len(classes) == 2 and len(weight) == 1:
        return np.concatenate([-weight / 2, weight / 2]), np.concatenate([-bias / 2, bias / 2])
    if len(weight) != len(classes) or not len(classes):
        raise UsageError(
            f"{type(head).__name__} is no fitted linear head; linear are: logistic, linear-svm, ridge, lda, centroid"
        )
    return weight, bias


def _step(step: Any) -> tuple[Floats, Floats]:
    """What a fitted step does to x: ``(x - centre) @ matrix.T``; a matrix (D,) stands for a diagonal."""
    width = getattr(step, "n_features_in_", 0)
    if hasattr(step, "components_") and hasattr(step, "explained_variance_"):
        matrix = np.asarray(step.components_, np.float64)
        if step.whiten:
            spread = np.sqrt(np.asarray(step.explained_variance_, np.float64))
            matrix = matrix / np.maximum(spread, np.finfo(spread.dtype).eps)[:, None]
        return matrix, np.asarray(step.mean_, np.float64)
    if hasattr(step, "scale_") and hasattr(step, "var_"):
        scale = np.ones(width) if step.scale_ is None else np.asarray(step.scale_, np.float64)
        centre = np.zeros(width) if step.mean_ is None or not step.with_mean else np.asarray(step.mean_, np.float64)
        return 1 / scale, centre
    raise UsageError(f"{type(step).__name__} cannot be folded into a linear map: only scaling, PCA and kept values can")
