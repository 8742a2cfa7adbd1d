"""Numbers of a loaded head that compiled code takes for positions in memory, without looking: looked at here.

skops checks of which types a file is, not what it says. scikit-learn's libsvm and its nearest neighbours index by what the
head holds, so that a forged head could make them read or write elsewhere. (Trees, where the same holds, skops refuses.)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from featurepipe.errors import BundleError

_KERNELS = {"linear", "poly", "rbf", "sigmoid"}
_CHECKED_NEIGHBOURS = {"KNeighborsClassifier", "NearestCentroid"}


def check_bounds(head: Any, name: str) -> None:
    """Checks every estimator inside a head.

    Raises:
        BundleError: One would read outside its own arrays, or is of a kind for which that cannot be told.
    """
    from sklearn.base import BaseEstimator

    pending, met = [head], set()
    while pending:
        value = pending.pop()
        if id(value) in met:
            continue
        met.add(id(value))
        if isinstance(value, BaseEstimator):
            if not _within_bounds(value):
                raise BundleError(
                    f"{name} holds a {type(value).__name__} that does not fit together; do not use this bundle"
                )
            pending.extend(vars(value).values())
        elif isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, list | tuple):
            pending.extend(value)


def _within_bounds(estimator: Any) -> bool:
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm._base import BaseLibSVM

    if isinstance(estimator, BaseLibSVM):
        return not hasattr(estimator, "support_vectors_") or _support_fits(estimator)
    if isinstance(estimator, KNeighborsClassifier):
        return not hasattr(estimator, "_fit_X") or _neighbours_fit(estimator)
    kind = type(estimator)
    return not kind.__module__.startswith("sklearn.neighbors.") or kind.__name__ in _CHECKED_NEIGHBOURS


def _support_fits(svm: Any) -> bool:
    """As scikit-learn's C code reads them: support vectors by class, coefficients for K - 1 of K, an intercept a pair."""
    held = vars(svm)
    vectors, counts = _array(held["support_vectors_"], 2, "f"), _array(held["_n_support"], 1, "i")
    classes, pairs = len(counts), len(counts) * (len(counts) - 1) // 2
    return (
        svm.kernel in _KERNELS
        and held["_sparse"] is False
        and len(svm.classes_) == classes >= 2
        and bool((counts >= 0).all())
        and int(counts.sum()) == len(vectors)
        and vectors.shape[1] == svm.n_features_in_
        and _array(svm.support_, 1, "i").shape == (len(vectors),)
        and _array(held["_dual_coef_"], 2, "f").shape == (classes - 1, len(vectors))
        and _array(held["_intercept_"], 1, "f").shape == (pairs,)
        and all(_array(values, 1, "f").size in {0, pairs} for values in (held["_probA"], held["_probB"]))
    )


def _neighbours_fit(neighbours: Any) -> bool:
    held = vars(neighbours)
    rows, codes = _array(held["_fit_X"], 2, "f"), _array(held["_y"], 1, "i")
    return (
        held["_fit_method"] == "brute"
        and neighbours.outputs_2d_ is False
        and isinstance(neighbours.metric, str)
        and len(rows) == neighbours.n_samples_fit_ == len(codes) >= 1
        and rows.shape[1] == neighbours.n_features_in_
        and bool((codes >= 0).all() and (codes < len(neighbours.classes_)).all())
    )


def _array(value: Any, dimensions: int, kind: str) -> Any:
    if not isinstance(value, np.ndarray) or value.ndim != dimensions or value.dtype.kind != kind:
        raise TypeError("an array is of another kind")
    return value
