"""Linear support vector classification to LIBLINEAR's optimum on features of any size."""

from __future__ import annotations

from typing import Any

from featurepipe.errors import UsageError
from featurepipe.heads.linear import BlockLinearClassifier, Objective
from featurepipe.heads.losses import SquaredHingeLoss


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
