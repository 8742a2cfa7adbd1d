"""Area under the ROC curve of every class against the rest, from one sorted order per class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class OneVsRest:
    """The AUC of every class against the rest.

    Attributes:
        values: (K,) AUC, NaN for a class without images or without images of others.
        influence: (n,) what one more copy of an image adds to the mean AUC, to first order, scaled so that the squares sum to
            the mean's variance.
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
    the class the share of others below it, for another image the share of the class above it, both less their mean. The only
    image of a class has no mean but itself, so that of all classes is taken.

    Args:
        probabilities: (n, K).
        codes: (n,) position of the true class.
    """
    n, classes = probabilities.shape
    values, influence = np.full(classes, np.nan), np.zeros(n)
    support = np.bincount(codes, minlength=classes)
    defined = np.flatnonzero((support > 0) & (support < n))
    single = np.full(n, np.nan)  # of the only image of a class
    for k in defined:
        order, start, stop = _ranked(_scores(probabilities, int(k)))
        own = codes == k
        sorted_own = own[order]
        below = _middle(np.cumsum(~sorted_own), start[own], stop[own]) / (n - support[k])
        above = 1 - _middle(np.cumsum(sorted_own), start[~own], stop[~own]) / support[k]
        values[k] = below.mean()
        if support[k] > 1:
            unbiased = np.sqrt(support[k] / (support[k] - 1))
            influence[own] += unbiased * (below - values[k]) / (support[k] * len(defined))
        else:
            single[own] = values[k] / len(defined)
        influence[~own] += (above - values[k]) / ((n - support[k]) * len(defined))
    alone = ~np.isnan(single)
    influence[alone] += single[alone] - values[defined].mean() / len(defined) if alone.any() else 0.0
    return OneVsRest(values, influence)


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
