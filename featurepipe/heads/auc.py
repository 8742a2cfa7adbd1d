"""Area under the ROC curve of every class against the rest, and its bootstrap, from one sorted order per class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featurepipe.heads.resampling import Array, resampled_counts

_EXACT = 200_000_000  # images x classes x resamples up to which every resample is ranked, about a second or two

Codes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class OneVsRest:
    """The AUC of every class against the rest.

    Attributes:
        values: (K,) AUC, NaN for a class without images or without images of others.
        influence: (n,) what one more copy of an image adds to the mean AUC, to first order.
    """

    values: Array
    influence: Array

    @property
    def macro(self) -> float:
        """The mean over the classes that have an AUC; NaN if none has."""
        defined = self.values[~np.isnan(self.values)]
        return float(defined.mean()) if len(defined) else float("nan")


def one_vs_rest(probabilities: npt.NDArray[np.floating], codes: Codes) -> OneVsRest:
    """Ranks the images once per class; ties count half (Mann and Whitney).

    The influence of an image is its structural component (DeLong, DeLong and Clarke-Pearson, 1988): for an image of
    the class the share of others below it, for another image the share of the class above it.

    Args:
        probabilities: (n, K).
        codes: (n,) position of the true class.
    """
    n, classes = probabilities.shape
    values, influence = np.full(classes, np.nan), np.zeros(n)
    support = np.bincount(codes, minlength=classes)
    defined = np.flatnonzero((support > 0) & (support < n))
    for k in defined:
        order, start, stop = _ranked(_scores(probabilities, int(k)))
        own = codes == k
        sorted_own = own[order]
        below = _middle(np.cumsum(~sorted_own), start[own], stop[own]) / (n - support[k])
        above = 1 - _middle(np.cumsum(sorted_own), start[~own], stop[~own]) / support[k]
        values[k] = below.mean()
        influence[own] += (below - values[k]) / (support[k] * len(defined))
        influence[~own] += (above - values[k]) / ((n - support[k]) * len(defined))
    return OneVsRest(values, influence)


def resampled_auc(probabilities: npt.NDArray[np.floating], codes: Codes, *, resamples: int, seed: int) -> Array | None:
    """The macro AUC of bootstrap resamples, by weighted rank sums over one sorted order per class.

    Args:
        probabilities: (n, K).
        codes: (n,) position of the true class.
        resamples: How many to draw.
        seed: Of the draws.

    Returns:
        (resamples,), NaN where a resample has images of one class only; None past 2e8 ranks (images x classes x
        resamples): with so many, the influences of ``one_vs_rest`` give the same interval at no cost.
    """
    n, classes = probabilities.shape
    if n * classes * resamples > _EXACT:
        return None
    ranks = WeightedRanks(probabilities, codes)
    return np.array([ranks.macro(drawn) for drawn in resampled_counts(n, resamples=resamples, seed=seed)])


class WeightedRanks:
    """The AUC for any weights of the images, without sorting again; holds (K, n) arrays.

    Args:
        probabilities: (n, K).
        codes: (n,) position of the true class.
    """

    def __init__(self, probabilities: npt.NDArray[np.floating], codes: Codes) -> None:
        n, classes = probabilities.shape
        self._codes, self._classes = codes, classes
        self._order = np.empty((classes, n), np.int32)
        self._row = codes * n
        self._start, self._stop = np.empty(n, np.int64), np.empty(n, np.int64)
        for k in range(classes):
            self._order[k], start, stop = _ranked(_scores(probabilities, k))
            own = codes == k
            self._start[own], self._stop[own] = k * n + start[own], k * n + stop[own]
        self._others = codes[self._order] != np.arange(classes)[:, None]

    def macro(self, weights: npt.NDArray[np.int64]) -> float:
        """The mean AUC over the classes that have one under ``weights``, (n,); NaN if none has."""
        others = np.cumsum(weights[self._order] * self._others)  # through all classes, so each row starts above zero
        below = _middle(others, self._start, self._stop) - _middle(others, self._row, self._row)
        sums = np.bincount(self._codes, weights * below, self._classes)
        support = np.bincount(self._codes, weights, self._classes)
        pairs = support * (weights.sum() - support)
        defined = pairs > 0
        return float((sums[defined] / pairs[defined]).mean()) if defined.any() else float("nan")


def _scores(probabilities: npt.NDArray[np.floating], k: int) -> npt.NDArray[np.floating]:
    """What ranks class ``k``; of two classes both are ranked by the second's probability, as scikit-learn does."""
    if probabilities.shape[1] == 2:
        return probabilities[:, 1] if k == 1 else -probabilities[:, 1]
    return probabilities[:, k]


def _ranked(
    scores: npt.NDArray[np.floating],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The ascending order, and for every image where its group of equal scores starts and stops in that order."""
    order = np.argsort(scores)
    ordered = scores[order]
    firsts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    sizes = np.diff(np.append(firsts, len(scores)))
    start, stop = np.empty_like(order), np.empty_like(order)
    start[order], stop[order] = np.repeat(firsts, sizes), np.repeat(firsts + sizes, sizes)
    return order, start, stop


def _middle(sums: npt.NDArray[np.int64], start: npt.NDArray[np.int64], stop: npt.NDArray[np.int64]) -> Array:
    """What cumulative ``sums`` hold before each group of ties, and half of what the group adds."""
    padded = np.concatenate([[0], sums])
    middle: Array = (padded[start] + padded[stop]) / 2
    return middle
