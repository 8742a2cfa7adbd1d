"""Logistic regression to scikit-learn's optimum on features of any size."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit, log_expit, log_softmax, softmax

from featurepipe.heads.linear import BlockLinearClassifier, Objective
from featurepipe.heads.losses import BinomialLoss, SoftmaxLoss


class BlockLogisticRegression(BlockLinearClassifier):
    """Multinomial logistic regression with an L2 penalty, from arrays in memory or streamed ``Blocks``.

    Minimises ``C * sum_i(w_i * loss_i) + |W|^2 / 2``, scikit-learn's ``LogisticRegression`` objective: the loss is that of the
    softmax, or for two classes of one logistic column; the intercept is not penalised.

    Method: L-BFGS (Liu & Nocedal 1989, "On the limited memory BFGS method for large scale optimization") in the
    coordinates of centred features. Each class's direction is preconditioned by the Cholesky factor of its block of the
    second derivative, ``C * sum_i(p_i (1 - p_i) x_i x_i') + I``, measured on rows sampled in proportion to their curvature
    (in the spirit of sub-sampled Newton methods: Roosta-Khorasani & Mahoney 2019; Xu et al. 2016) and measured again as the
    iterate moves. Where all ``p (1 - p)`` are replaced by their bound this is the fixed-curvature step of Böhning 1992,
    "Multinomial logistic regression algorithm". Wide features (above 4,096 values) get the diagonal alone. All values of C
    and all folds of ``fit_path`` share every pass over the features.

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
