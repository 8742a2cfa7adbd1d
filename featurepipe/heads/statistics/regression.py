"""How good predicted numbers are: the usual errors with intervals, agreement of grades, and the largest errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, stdtrit

from featurepipe.display import table
from featurepipe.errors import UsageError
from featurepipe.heads.statistics.intervals import LEVEL, Limits, proportion, units_of, with_limits

_MOST_UNITS = 20_000  # images or groups that are resampled; of more, the spread is that of a sample, scaled
_LEAST_UNITS = 5  # images or groups below which resampling says nothing
_PSEUDO = 2  # images (or groups) that agree by chance, beside those resampled for a kappa
_PLOTTED = 1_000  # images of a plot
_MOST_GRADES = 30  # whole numbers in a row that may be grades of a scale

Floats = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]
Measure = Callable[[Floats], float]


def number_table(
    predicted: npt.ArrayLike,
    truth: npt.ArrayLike,
    *,
    half_width: float | None = None,
    ids: Sequence[str] | npt.NDArray[Any] | None = None,
    groups: npt.ArrayLike | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    mistakes: int = 20,
    plots: bool = True,
) -> dict[str, Any]:
    """Scores predicted numbers against true ones, with 95 % intervals.

    The values are those of scikit-learn's ``mean_absolute_error``, ``root_mean_squared_error`` and ``r2_score`` and of SciPy's
    ``spearmanr``. Where all true numbers are whole and lie within 30 of each other they may be grades of an ordered scale:
    ``quadratic_kappa`` is then scikit-learn's ``cohen_kappa_score(weights="quadratic")`` of the predictions, rounded to the
    nearest grade between the least and the greatest true one.

    Intervals are bootstrap quantiles over images, or over whole groups where these are given: images of one patient are not
    independent. Their levels are expanded for few units (Hesterberg 2015, "What teachers should know about the bootstrap"). Of
    more than 20,000 units so many are drawn and resampled, and the spread is scaled by the root of the share. The interval
    of the coverage is the exact binomial one for as many independent images as the groups are worth.

    Args:
        predicted: (n,) numbers.
        truth: (n,) numbers.
        half_width: Half the width of the prediction intervals; None to say nothing of their coverage.
        ids: (n,) names of the images; by default their positions.
        groups: (n,) of whatever kind: images with equal values belong together; a missing one (None, NaN) is a group of its own.
        bootstrap: Resamples; 0 for no intervals.
        seed: Of the resamples.
        mistakes: How many of the largest errors to list.
        plots: Whether to give ``sample``, too.

    Returns:
        JSON values: ``images`` and ``groups`` (their number, or null); ``mae``, ``rmse``, ``r2``, ``spearman``, where it applies
        ``quadratic_kappa``, and with ``half_width`` ``coverage`` (the share of true numbers inside the prediction interval),
        each ``{"value", "low", "high"}`` with a ``"reason"`` where one is null; ``target`` (``mean``, ``deviation``,
        ``least``, ``greatest`` true number); ``half_width``, as given; ``bootstrap``; ``mistakes``, the largest errors;
        ``sample``, ``true`` and ``predicted`` numbers of at most 1,000 images, drawn at random, to plot.

    Raises:
        UsageError: There is no image, shapes do not fit, or a value is not finite.
    """
    if bootstrap < 0:
        raise UsageError(f"bootstrap={bootstrap} must be 0 (no intervals) or more; 1000 is usual")
    guesses, numbers = _checked(predicted, truth)
    if ids is not None and len(ids) != len(numbers):
        raise UsageError(f"there are {len(numbers)} images, but {len(ids)} ids")
    units = units_of(groups, len(numbers))
    values = {name: measure(np.ones(len(numbers))) for name, measure in _measures(guesses, numbers).items()}
    limits = _limits(guesses, numbers, units, values, draws=bootstrap, seed=seed) if bootstrap else {}
    found: dict[str, Any] = {"images": len(numbers), "groups": None if groups is None else int(units.max()) + 1}
    found |= {name: with_limits(value, limits.get(name)) for name, value in values.items()}
    for name in ("r2", "spearman", "quadratic_kappa"):
        if name in found and found[name]["value"] is None:
            found[name]["reason"] = f"all true {'' if _constant(numbers) else 'or all predicted '}numbers are the same"
    if bootstrap and not limits:
        few = f"no interval: {int(units.max()) + 1} {'images' if groups is None else 'groups'} are too few"
        for name in values:
            found[name].setdefault("reason", few)
    if half_width is not None:
        inside = np.abs(guesses - numbers) <= half_width * (1 + 1e-9)
        found["coverage"] = with_limits(
            float(inside.mean()), _clustered_proportion(inside, units) if bootstrap else None
        )
    found["target"] = {
        "mean": float(numbers.mean()),
        "deviation": float(numbers.std()),
        "least": float(numbers.min()),
        "greatest": float(numbers.max()),
    }
    found["bootstrap"] = {"resamples": bootstrap, "seed": seed, "level": LEVEL}
    found["half_width"] = half_width
    found["mistakes"] = _mistakes(guesses, numbers, ids, mistakes)
    if not plots:
        return found
    chosen = np.arange(len(numbers))
    if len(chosen) > _PLOTTED:
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, _PLOTTED, replace=False))
    found["sample"] = {"true": numbers[chosen].tolist(), "predicted": guesses[chosen].tolist()}
    return found


def quadratic_kappa(truth: Codes, predicted: Codes, grades: int, weights: Floats | None = None) -> float:
    """Agreement of grades beyond chance, where being two grades off counts four times as much as one.

    Cohen 1968, "Weighted kappa": ``1 - sum(d^2 O) / sum(d^2 E)``, where O counts pairs of true and predicted grade, E is what
    independent ones with the same margins give, and d is their distance. Equals scikit-learn's
    ``cohen_kappa_score(truth, predicted, labels=range(grades), weights="quadratic")``.

    Args:
        truth: (n,) grades from 0 to ``grades - 1``.
        predicted: (n,) the same.
        grades: How many there are.
        weights: (n,) of the rows; None for ones.

    Returns:
        At most 1; NaN where one and the same grade is true and predicted throughout.
    """
    counts = np.bincount(truth * grades + predicted, weights, grades**2).reshape(grades, grades).astype(np.float64)
    chance = np.outer(counts.sum(axis=1), counts.sum(axis=0)) / counts.sum()
    squares = np.subtract.outer(np.arange(grades), np.arange(grades)) ** 2
    expected = float((squares * chance).sum())
    return max(-1.0, 1 - float((squares * counts).sum()) / expected) if expected else float("nan")


def kappa_limits(
    truth: Codes, predicted: Codes, grades: int, *, units: Codes | None = None, draws: int, seed: int
) -> Limits | None:
    """The 95 % interval of the quadratic weighted kappa, from resampled images, or whole groups where these are given.

    Two pseudo-images (or groups of average size) that agree by chance alone are resampled with the others, as Agresti & Coull
    1998 add two successes and two failures: a test set without a mistake does not become certain. Levels are expanded for few
    units, as those of ``number_table``. Quantiles are taken as they are and about the value, whichever reach further.

    Args:
        truth: (n,) grades from 0 to ``grades - 1``.
        predicted: (n,) the same.
        grades: How many there are.
        units: (n,) number of each image's group; None if each image is by itself.
        draws: How many resamples.
        seed: Of the draws.

    Returns:
        None where the kappa has no value, or there are fewer than 5 images (or groups).
    """
    value, cells = quadratic_kappa(truth, predicted, grades), truth * grades + predicted
    count = len(truth) if units is None else int(units.max()) + 1
    if np.isnan(value) or count < _LEAST_UNITS:
        return None
    whole = np.bincount(cells, minlength=grades**2).astype(np.float64)
    pairs = whole.reshape(grades, grades)
    chance = (np.outer(pairs.sum(axis=1), pairs.sum(axis=0)) / len(truth)).reshape(-1)
    rng = np.random.default_rng(seed)
    share = count / (count + _PSEUDO)
    if units is None:
        drawn = rng.multinomial(count, share * (whole + _PSEUDO * chance / count) / count, size=draws).astype(
            np.float64
        )
    else:
        drawn = np.empty((draws, grades**2))
        for number in range(draws):
            times = np.bincount(rng.integers(count + _PSEUDO, size=count), minlength=count + _PSEUDO)
            drawn[number] = np.bincount(cells, times[units], grades**2) + times[count:].sum() * chance / count
    kappas = _kappas(drawn, grades)
    kappas = kappas[np.isfinite(kappas)]
    if not len(kappas):
        return None
    tail = float(ndtr(np.sqrt(count / (count - 1)) * stdtrit(count - 1, (1 - LEVEL) / 2)))
    low, high = (float(end) for end in np.quantile(kappas, (tail, 1 - tail)))
    moved = value - float(_kappas((share * (whole + _PSEUDO * chance / count))[None], grades)[0])
    return max(-1.0, min(low, low + moved, value)), min(1.0, max(high, high + moved, value))


def _kappas(counts: Floats, grades: int) -> Floats:
    """The quadratic weighted kappa of each of (m, grades ** 2) counts of true and predicted grades."""
    tables = counts.reshape(-1, grades, grades)
    squares = np.subtract.outer(np.arange(grades), np.arange(grades)) ** 2
    chance = tables.sum(axis=2)[:, :, None] * tables.sum(axis=1)[:, None] / tables.sum(axis=(1, 2))[:, None, None]
    expected = (squares * chance).sum(axis=(1, 2))
    found = (squares * tables).sum(axis=(1, 2))
    return np.asarray(1 - np.divide(found, expected, out=np.full(len(tables), np.nan), where=expected > 0))


def r2_contributions(predicted: npt.ArrayLike, truth: npt.ArrayLike) -> Floats:
    """Each image's contribution to R2, scikit-learn's ``r2_score``; their mean is it.

    ``R2 = 1 - sum(e^2) / sum(d^2)`` with errors e and distances d from the mean of the true numbers; the influence function of
    this ratio (see ``featurepipe.heads.statistics.comparison``) makes ``R2 + ((1 - R2) d^2 - e^2) / mean(d^2)`` of an image.

    Args:
        predicted: (n,) numbers.
        truth: (n,) numbers.

    Returns:
        (n,) float64; NaN where all true numbers are the same.
    """
    guesses, numbers = np.asarray(predicted, np.float64), np.asarray(truth, np.float64)
    if not len(numbers) or _constant(numbers):
        return np.full(len(numbers), np.nan)
    errors, distances = (guesses - numbers) ** 2, (numbers - numbers.mean()) ** 2
    value = 1 - errors.sum() / distances.sum()
    return np.asarray(value + ((1 - value) * distances - errors) / distances.mean())


def _measures(guesses: Floats, truth: Floats) -> dict[str, Measure]:
    """The measures of these images, as functions of (n,) weights."""
    off = guesses - truth
    measures: dict[str, Measure] = {
        "mae": lambda weights: float(weights @ np.abs(off) / weights.sum()),
        "rmse": lambda weights: float(np.sqrt(weights @ off**2 / weights.sum())),
        "r2": lambda weights: _r2(off, truth, weights),
        "spearman": _Spearman(guesses, truth),
    }
    grades = _grades(truth)
    if grades is not None:
        least, count = grades
        true = truth.astype(np.int64) - least
        rounded = np.clip(np.rint(guesses), least, least + count - 1).astype(np.int64) - least
        measures["quadratic_kappa"] = lambda weights: quadratic_kappa(true, rounded, count, weights)
    return measures


def _grades(truth: Floats) -> tuple[int, int] | None:
    """The least grade and how many there are, if all numbers may be grades."""
    least, greatest = float(truth.min()), float(truth.max())
    if (truth != np.rint(truth)).any() or greatest - least >= _MOST_GRADES:
        return None
    return int(least), int(greatest - least) + 1


def _r2(off: Floats, truth: Floats, weights: Floats) -> float:
    spread = weights @ (truth - weights @ truth / weights.sum()) ** 2
    return float(1 - weights @ off**2 / spread) if spread > 0 and not _constant(truth[weights > 0]) else float("nan")


def _constant(numbers: Floats) -> bool:
    return bool(numbers.min() == numbers.max())


class _Spearman:
    """Spearman's correlation of weighted rows: Pearson's of their mean ranks, equal numbers sharing theirs."""

    def __init__(self, guesses: Floats, truth: Floats) -> None:
        self._places = [np.unique(side, return_inverse=True)[1].reshape(-1) for side in (guesses, truth)]

    def __call__(self, weights: Floats) -> float:
        """The correlation, NaN where either side is constant."""
        ranks = []
        for places in self._places:
            each = np.bincount(places, weights)
            ranks.append((np.cumsum(each) - each / 2)[places])
        one, other = (side - weights @ side / weights.sum() for side in ranks)
        scale = float(weights @ one**2) * float(weights @ other**2)
        found = float(weights @ (one * other)) / np.sqrt(scale) if scale > 0 else float("nan")
        return float(np.clip(found, -1, 1))  # beyond which rounding may take it


def _limits(
    guesses: Floats, truth: Floats, units: Codes, values: Mapping[str, float], *, draws: int, seed: int
) -> dict[str, Limits]:
    """The interval of each measure that has a value; none where there are too few units."""
    count = int(units.max()) + 1
    if count < _LEAST_UNITS:
        return {}
    rng = np.random.default_rng(seed)
    scale = 1.0
    if count > _MOST_UNITS:
        chosen = np.zeros(count, np.bool_)
        chosen[rng.choice(count, _MOST_UNITS, replace=False)] = True
        rows = chosen[units]
        scale = float(np.sqrt(_MOST_UNITS / count))
        guesses, truth, units = guesses[rows], truth[rows], np.unique(units[rows], return_inverse=True)[1].reshape(-1)
        count = _MOST_UNITS
    measures = {name: measure for name, measure in _measures(guesses, truth).items() if name in values}
    drawn = np.empty((draws, len(measures)))
    for number in range(draws):
        weights = np.bincount(rng.integers(count, size=count), minlength=count)[units].astype(np.float64)
        drawn[number] = [measure(weights) for measure in measures.values()]
    tail = float(ndtr(np.sqrt(count / (count - 1)) * stdtrit(count - 1, (1 - LEVEL) / 2)))
    limits = {}
    for name, column in zip(measures, drawn.T, strict=True):
        defined = column[np.isfinite(column)]
        if np.isfinite(values[name]) and len(defined):
            low, high = np.quantile(defined, (tail, 1 - tail))
            here = measures[name](np.ones(len(truth)))
            low, high = (values[name] + scale * (float(end) - here) for end in (low, high))
            limits[name] = (min(low, values[name]), max(high, values[name]))
    return limits


def _clustered_proportion(inside: npt.NDArray[np.bool_], units: Codes) -> Limits:
    """The exact interval of a share, for as many independent images as the groups are worth (Korn & Graubard 1998)."""
    images, groups = len(inside), int(units.max()) + 1
    value = float(inside.mean())
    if groups == images:
        return proportion(value, images)
    variance = float((np.bincount(units, inside - value) ** 2).sum()) / images**2
    worth = min(float(images), value * (1 - value) / variance) if variance > 0 else float(groups)
    return proportion(value, worth, max(1.0, groups - 1.0))


def _checked(predicted: npt.ArrayLike, truth: npt.ArrayLike) -> tuple[Floats, Floats]:
    guesses, numbers = np.asarray(predicted, np.float64), np.asarray(truth, np.float64)
    if not len(numbers):
        raise UsageError("there is no image with a number to score")
    if numbers.ndim != 1 or guesses.shape != numbers.shape:
        raise UsageError(
            f"predictions of shape {guesses.shape} and numbers of shape {numbers.shape}: give one of each an image"
        )
    for what, values in (("predictions", guesses), ("true numbers", numbers)):
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise UsageError(f"{len(bad)} {what} are not finite, the first is row {bad[0]}: leave these images out")
    return guesses, numbers


def _mistakes(guesses: Floats, truth: Floats, ids: Any, most: int) -> list[dict[str, Any]]:
    worst = np.argsort(-np.abs(guesses - truth), kind="stable")[:most]
    return [
        {"id": str(row if ids is None else ids[row]), "true": float(truth[row]), "predicted": float(guesses[row])}
        for row in worst
    ]


KAPPA_TITLE = "quadratic weighted kappa"

TITLES: Mapping[str, str] = {
    "mae": "mean absolute error",
    "rmse": "root mean squared error",
    "r2": "R2",
    "spearman": "Spearman's correlation",
    "quadratic_kappa": KAPPA_TITLE,
    "coverage": "coverage of the intervals",
}


def numbers_text(metrics: Mapping[str, Any]) -> str:
    """A table of measures with their intervals, and the reason where one has no value.

    Args:
        metrics: What ``number_table`` returns, or a part of it.
    """
    rows, reasons = [], []
    for name, title in TITLES.items():
        found = metrics.get(name)
        if not found:
            continue
        if found["value"] is None:
            reasons.append(f"{title}: none, {found['reason']}")
            continue
        limits = found.get("reason", "") if found["low"] is None else f"{found['low']:.4g} to {found['high']:.4g}"
        rows.append([title, f"{found['value']:.4g}", limits])
    interval = "95 % interval" if any(row[2] for row in rows) else ""
    return "\n".join([table(["measure", "value", interval], rows), *reasons])


def conformal_half_width(
    predicted: npt.ArrayLike, truth: npt.ArrayLike, *, level: float = 0.9, groups: npt.ArrayLike | None = None
) -> float | None:
    """Returns half the width of intervals around predictions that hold a new image's number with probability ``level``.

    Of n held-out images, from which the head has learned nothing, it is the ``ceil((n + 1) * level)``-th smallest absolute
    residual. If the new image comes from where these do, ``predicted - h <= true <= predicted + h`` holds with at least this
    probability, for any head and any n (Vovk, Gammerman & Shafer 2005, "Algorithmic learning in a random world"; Lei et al.
    2018, "Distribution-free predictive inference for regression"). The width is the same for every image.

    That holds for predictions of the head whose residuals were taken. A head that is fitted again on these images as well is
    another one: its intervals hold the number about as often, which no theorem says.

    Of grouped images each group counts as one, its images sharing its weight ("pooled" intervals of Dunn, Wasserman & Ramdas
    2022, "Distribution-free prediction sets for two-layer hierarchical models"), so that the interval is for an image of a new
    group.

    Args:
        predicted: (n,) numbers.
        truth: (n,) numbers.
        level: Between 0 and 1.
        groups: (n,) of whatever kind: images with equal values belong together.

    Returns:
        In the target's unit; None where there are too few images (or groups) for the level: 9 are the fewest for 0.9.

    Raises:
        UsageError: The level is not between 0 and 1, or shapes do not fit.

    Example:
        >>> conformal_half_width(range(9), [0, 1, 2, 3, 4, 5, 6, 7, 5])
        3.0
    """
    if not 0 < level < 1:
        raise UsageError(f"level={level!r} must be between 0 and 1; 0.9 is usual")
    residuals = np.abs(np.asarray(predicted, np.float64) - np.asarray(truth, np.float64))
    if residuals.ndim != 1:
        raise UsageError(f"residuals of shape {residuals.shape}: give one prediction and one number an image")
    units = units_of(groups, len(residuals))
    sizes = np.bincount(units)
    order = np.argsort(residuals, kind="stable")
    weights = np.cumsum(1 / sizes[units[order]])
    needed = (len(sizes) + 1) * level
    needed = math.ceil(needed - 1e-9) if len(sizes) == len(residuals) else needed
    if not len(residuals) or needed > len(sizes):
        return None
    place = min(int(np.searchsorted(weights, needed - 1e-9)), len(residuals) - 1)
    return float(residuals[order][place])


def least_units(level: float) -> int:
    """Images (or groups) that an interval of a level needs at least."""
    return math.ceil(level / (1 - level) - 1e-9)
