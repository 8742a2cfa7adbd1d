"""Classes in an order, such as grades of a disease: a logistic regression of each step between neighbouring classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from scipy.special import expit
from sklearn.base import BaseEstimator

from featurepipe.errors import UsageError
from featurepipe.heads.blocks import Array
from featurepipe.heads.inputs import BlockClassifier, Floats, labels_from, linear_scores, training_data
from featurepipe.heads.linear.multilabel import MultilabelLogisticRegression

LEAST = 1e-6
"""Of each class's probability, before they are made to sum to 1: no class between two others is impossible."""


class OrdinalLogisticRegression(BlockClassifier, BaseEstimator):  # type: ignore[misc]
    """Logistic regression of K ordered classes, from arrays or streamed ``Blocks``.

    Each of the K - 1 steps between neighbouring classes is a problem of two sides, whether a row's class is above it (Frank &
    Hall 2001, "A simple approach to ordinal classification"). For each step k it minimises

        ``C * sum_i(w_i * log(1 + exp(-s_ik f_k(x_i)))) + |b_k|^2 / 2``,  ``f_k(x) = b_k . x + c_k``,

    where s is 1 for rows of a class above the step and -1 for others; the intercept is not penalised. All steps are fitted in the
    same passes (``MultilabelLogisticRegression``). A class cannot be above a step and below a lower one: the probability of being
    above step k is ``1 / (1 + exp(-min(f_1(x), ..., f_k(x))))``, which never rises with k, and a class's is the difference of
    those of the steps about it, at least 1e-6, over their sum.

    Args:
        C: Inverse strength of the penalty.
        order: The classes, the lowest first; None for sorted.
        fit_intercept: Whether to fit one.
        class_weight: None, "balanced" or a dict from label to weight.
        tol: How far each step's objective may be above its minimum, relative to it; estimated, with a safety factor.
        max_iter: Most iterations of one step; each is at least one pass.
        memory: What the fit may hold at once, in bytes or as text ("512MB").

    Attributes:
        classes_: (K,) labels that the training rows have, in order.
        coef_: (K - 1, D) float64.
        intercept_: (K - 1,).
        n_iter_: (K - 1,) iterations.
        n_features_in_: D.
    """

    def __init__(
        self,
        C: float = 1.0,
        *,
        order: Sequence[Any] | None = None,
        fit_intercept: bool = True,
        class_weight: Any = None,
        tol: float = 1e-5,
        max_iter: int = 10_000,
        memory: int | str | None = None,
    ) -> None:
        self.C = C
        self.order = order
        self.fit_intercept = fit_intercept
        self.class_weight = class_weight
        self.tol = tol
        self.max_iter = max_iter
        self.memory = memory

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Fits all steps together.

        Args:
            X: (n, D) array or ``Blocks``.
            y: (n,) labels; None takes those of a ``FeatureSet``.
            sample_weight: (n,) or one number.

        Raises:
            UsageError: Features or labels that cannot be learned from, or a label that is not in ``order``.
        """
        data = training_data(self, X, y, sample_weight=sample_weight, class_weight=self.class_weight)
        places = _places(data.classes, self.order)
        ranks = np.argsort(np.argsort(places))[data.codes]
        self.classes_ = data.classes[np.argsort(places)]
        steps = MultilabelLogisticRegression(
            self.C,
            fit_intercept=self.fit_intercept,
            tol=self.tol,
            max_iter=self.max_iter,
            memory=self.memory,
        )
        above = (ranks[:, None] > np.arange(len(self.classes_) - 1)).astype(np.float32)
        steps.fit(data.blocks, above, sample_weight=data.weights)
        self.coef_, self.intercept_, self.n_iter_ = steps.coef_, steps.intercept_, steps.n_iter_
        return self

    def step_scores(self, X: Any) -> Floats:
        """Returns the (n, K - 1) log-odds of a class above each step, which never rise; X is an array or ``Blocks``."""
        scores = linear_scores(self, X, memory=self.memory, dtype=np.float64)
        return np.asarray(np.minimum.accumulate(scores.reshape(-1, len(self.classes_) - 1), axis=1))

    def predict_proba(self, X: Any) -> Floats:
        """Returns (n, K) probabilities, in the order of ``classes_``."""
        steps = np.pad(self.step_scores(X), ((0, 0), (1, 1)), constant_values=((0, 0), (np.inf, -np.inf)))
        upper, lower = steps[:, :-1], steps[:, 1:]
        # expit(upper) - expit(lower), without the loss of digits where both are near 1
        found = np.maximum(expit(upper) * expit(-lower) * -np.expm1(lower - upper), LEAST)
        return np.asarray(found / found.sum(axis=1, keepdims=True))

    def predict_log_proba(self, X: Any) -> Floats:
        """Returns (n, K) log-probabilities, in the order of ``classes_``."""
        return np.asarray(np.log(self.predict_proba(X)))

    def predict(self, X: Any) -> Array:
        """Returns (n,) labels, the most probable of each row."""
        return labels_from(self.predict_proba(X), self.classes_)


def _places(classes: Array, order: Sequence[Any] | None) -> Array:
    """The place of each class in the order.

    Raises:
        UsageError: One is not in it, or one comes twice.
    """
    if order is None:
        return np.arange(len(classes))
    names = list(order)
    if len(set(names)) < len(names):
        raise UsageError(f"order={names} names a class twice")
    strange = [name for name in classes.tolist() if name not in names]
    if strange:
        raise UsageError(f"{len(strange)} classes are not in the order {names}: {strange[:5]}")
    return np.array([names.index(name) for name in classes.tolist()])
