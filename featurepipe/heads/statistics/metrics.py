"""How good probabilities are: the usual measures with their intervals, per class, and the worst mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from featurepipe.display import first_names, table
from featurepipe.errors import UsageError
from featurepipe.heads.statistics import intervals
from featurepipe.heads.statistics import intervals as group_intervals
from featurepipe.heads.statistics.intervals import GroupSums, OneVsRest, one_vs_rest, units_of
from featurepipe.heads.statistics.regression import KAPPA_TITLE, kappa_limits, quadratic_kappa

BINS = 15
"""Equal-width bins of confidence in the expected calibration error."""

_ROWS = 8192  # rows of probabilities that are worked on at once
_ROUNDING = 1e-6  # by which a probability may exceed 1

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]
Probabilities = npt.NDArray[np.floating]
Ids = Sequence[str] | npt.NDArray[Any] | None
Groups = Sequence[str | None] | npt.NDArray[np.object_] | None


def score_table(
    probabilities: npt.ArrayLike,
    codes: npt.ArrayLike,
    classes: Sequence[str],
    *,
    ids: Ids = None,
    groups: Groups = None,
    predicted: npt.ArrayLike | None = None,
    ordered: bool = False,
    top: Sequence[int] = (5,),
    bootstrap: int = 1000,
    seed: int = 0,
    mistakes: int = 20,
) -> dict[str, Any]:
    """Scores probabilities against true classes, with 95 % intervals.

    The values are those of scikit-learn's ``accuracy_score``, ``balanced_accuracy_score``, ``f1_score`` (macro, over
    the classes that are true or predicted anywhere), ``log_loss``, ``roc_auc_score`` (one against the rest, mean over
    the classes that have images) and ``top_k_accuracy_score``, and the expected calibration error of Guo et al.
    (2017) over 15 equal bins. Intervals are those of ``statistics.intervals``: for images like these, also where there are few,
    and where all are right.

    Args:
        probabilities: (n, K), of each class; the largest (the first of equals) is what is predicted.
        codes: (n,) integers, the position of the true class in ``classes``.
        classes: Their K names.
        ids: (n,) names of the images; by default their positions.
        groups: (n,) what images belong together, such as a patient's, None for an image by itself; intervals are then of so many
            independent groups (``heads.statistics.intervals``). None if each image is by itself.
        predicted: (n,) positions of the classes that are predicted, where that is not the most probable one, as with a threshold.
            Log-loss, AUC, calibration error and top-k accuracies are of the probabilities whatever is predicted.
        ordered: Whether ``classes`` are in an order, the lowest first: then ``quadratic_kappa`` is measured, too, Cohen's kappa
            with quadratic weights, scikit-learn's ``cohen_kappa_score(weights="quadratic")`` (`heads.statistics.regression`).
        top: Which top-k accuracies to give.
        bootstrap: Draws behind the interval of the calibration error; 0 for no intervals at all.
        seed: Of the draws.
        mistakes: How many mistakes, and how many confused pairs, to list.

    Returns:
        JSON values. ``accuracy``, ``balanced_accuracy``, ``macro_f1``, ``log_loss``, ``auc``, ``top_5`` and ``ece`` are
        each ``{"value", "low", "high"}``, with a ``"reason"`` where the value or its interval is null; ``untested`` the classes
        without an image; ``per_class`` lists support,
        predicted, precision, recall, f1 and auc (null where undefined); ``confusion`` has the ``classes`` and their
        ``counts``, rows true and columns predicted; ``confused`` the pairs most often mistaken for one another;
        ``mistakes`` the count and the most confident ones.

    Raises:
        UsageError: There is no image, shapes do not fit, a value is no probability or a code is none of the classes.
    """
    if bootstrap < 0:
        raise UsageError(f"bootstrap={bootstrap} must be 0 (no intervals) or more; 1000 is usual")
    names = [str(name) for name in classes]
    scores, truth = _checked(probabilities, codes, names, ids)
    ranked = one_vs_rest(scores, truth)
    images = _Images(scores, truth, top, None if predicted is None else np.asarray(predicted, np.int64))
    table: dict[str, Any] = {"images": len(truth)}
    values = {**images.measures(), "auc": ranked.macro}
    by_group = None if groups is None else GroupSums(units_of(groups, len(truth)))
    if by_group is not None:
        table["groups"] = by_group.count
    limits: Mapping[str, intervals.Limits | None] = {}
    one_group = by_group is not None and by_group.count == 1
    if bootstrap and by_group is not None and not one_group:
        limits = _limits_of_groups(images, ranked, by_group, draws=bootstrap, seed=seed)
    elif bootstrap and by_group is None:
        limits = _limits(images, ranked, draws=bootstrap, seed=seed)
    table |= {name: intervals.with_limits(value, limits.get(name)) for name, value in values.items()}
    table |= {f"top_{k}": _no_top(k, len(names)) for k in top if k >= len(names)}
    if np.isnan(ranked.macro):
        table["auc"]["reason"] = f"there are images of class {names[truth[0]]} only"
    if bootstrap and not one_group and limits["macro_f1"] is None:
        table["macro_f1"]["reason"] = "no interval: a class has too few images"
    if bootstrap and by_group is not None:
        table["ece"]["reason"] = "no interval: none is known that holds for groups"
    if bootstrap and one_group:
        for name in values:
            table[name].setdefault("reason", "no interval: all images are of one group, which tells nothing of others")
    table |= {"quadratic_kappa": _kappa(images, groups, draws=bootstrap, seed=seed)} if ordered else {}
    confusion = images.confusion()
    table["bootstrap"] = {"resamples": bootstrap, "seed": seed, "level": intervals.LEVEL}
    table["untested"] = [name for name, count in zip(names, images.support, strict=True) if not count]
    table["per_class"] = _per_class(confusion, ranked, names)
    table["confusion"] = {"classes": names, "counts": confusion.tolist()}
    table["confused"] = _confused(confusion, names, mistakes)
    table["mistakes"] = _mistakes(images, names, ids, mistakes)
    return table


class _Images:
    """What is known of each image: its class, what was predicted and how confidently, and whether that was right."""

    def __init__(
        self, probabilities: Probabilities, codes: Codes, top: Sequence[int], predicted: Codes | None = None
    ) -> None:
        n, self.classes = probabilities.shape
        self.codes = codes
        likeliest: Codes = probabilities.argmax(axis=1)
        self.predicted = likeliest if predicted is None else predicted
        self.confidence = probabilities[np.arange(n), self.predicted].astype(np.float64)
        self.of_truth = probabilities[np.arange(n), codes].astype(np.float64)
        self.correct = self.predicted == codes
        self.support = np.bincount(codes, minlength=self.classes)
        self.hits = np.bincount(codes[self.correct], minlength=self.classes)
        self.place = place = _places(probabilities, codes)
        self.tops = {k: float((place < k).mean()) for k in top if k < self.classes}
        smallest = np.finfo(probabilities.dtype).eps  # what scikit-learn's log_loss takes for 0
        self.losses = -np.log(np.clip(self.of_truth, smallest, 1 - smallest))
        self.top_confidence = probabilities[np.arange(n), likeliest].astype(np.float64)
        self.top_correct = likeliest == codes
        bins = np.clip(np.ceil(self.top_confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
        self.bin_counts = np.bincount(bins, minlength=BINS)
        self.bin_hits = np.bincount(bins[self.top_correct], minlength=BINS)
        self.bin_gaps: Array = np.bincount(bins, self.top_confidence - self.top_correct, BINS).astype(np.float64)

    def measures(self) -> dict[str, float]:
        """The measures but the AUC."""
        n = len(self.codes)
        predicted = np.bincount(self.predicted, minlength=self.classes)
        return {
            "accuracy": float(self.correct.mean()),
            "balanced_accuracy": _mean_defined(self.hits, self.support),
            "macro_f1": _mean_defined(2 * self.hits, self.support + predicted),
            "log_loss": float(self.losses.mean()),
            **{f"top_{k}": value for k, value in self.tops.items()},
            "ece": min(1.0, float(np.abs(self.bin_gaps).sum()) / n),
        }

    def confusion(self) -> npt.NDArray[np.int64]:
        """(K, K) counts, rows true and columns predicted."""
        cells = self.codes * self.classes + self.predicted
        return np.bincount(cells, minlength=self.classes**2).reshape(self.classes, self.classes)


def _limits(images: _Images, ranked: OneVsRest, *, draws: int, seed: int) -> dict[str, intervals.Limits | None]:
    """The interval of each measure; None where it has none."""
    n = len(images.codes)
    shares = {"accuracy": float(images.correct.mean()), **{f"top_{k}": value for k, value in images.tops.items()}}
    return {
        **{name: intervals.proportion(value, n) for name, value in shares.items()},
        "balanced_accuracy": intervals.balanced_accuracy(images.hits, images.support),
        "macro_f1": intervals.macro_f1(images.codes, images.predicted, images.classes),
        "log_loss": intervals.log_loss(images.losses, images.top_correct, images.top_confidence),
        "auc": None if np.isnan(ranked.macro) else intervals.macro_auc(ranked, images.support),
        "ece": intervals.calibration_error(images.bin_gaps, images.bin_hits, images.bin_counts, draws=draws, seed=seed),
    }


def _limits_of_groups(
    images: _Images, ranked: OneVsRest, groups: GroupSums, *, draws: int, seed: int
) -> dict[str, intervals.Limits | None]:
    """The same where images come in groups."""
    n, classes = len(images.codes), images.classes
    hit = images.correct.astype(np.float64)
    sums = {
        "support": groups.by_column(images.codes, classes),
        "predicted": groups.by_column(images.predicted, classes),
        "hits": groups.by_column(images.codes, classes, hit),
        **{
            f"top_{k}": groups.by_column(np.zeros(n, np.int64), 1, (images.place < k).astype(np.float64))
            for k in images.tops
        },
    }

    def measures(found: Mapping[str, Array]) -> dict[str, Array]:
        support, predicted, hits = found["support"], found["predicted"], found["hits"]
        rows = support.sum(axis=1)
        with np.errstate(invalid="ignore"):  # classes that a resample lacks do not count in it
            recall, f1 = hits / support, 2 * hits / (support + predicted)
        return {
            "accuracy": hits.sum(axis=1) / rows,
            "balanced_accuracy": np.nanmean(recall, axis=1),
            "macro_f1": np.nanmean(f1, axis=1),
            **{f"top_{k}": found[f"top_{k}"][:, 0] / rows for k in images.tops},
        }

    values = images.measures()
    variances = groups.variances(sums, measures, draws=draws, seed=seed)
    limits: dict[str, intervals.Limits | None] = {
        name: group_intervals.limits(values[name], variance, n, groups.count) for name, variance in variances.items()
    }
    if intervals.macro_f1(images.codes, images.predicted, classes) is None:
        limits["macro_f1"] = None
    variance = float((groups.total(ranked.influence) ** 2).sum()) * groups.count / (groups.count - 1)
    undefined = np.isnan(ranked.macro)
    fewer = np.minimum(images.support, n - images.support)[~np.isnan(ranked.values)]
    most = 0.0 if undefined else 3 * len(fewer) ** 2 / float((1 / fewer).sum())  # as in `intervals.macro_auc`
    limits["auc"] = None if undefined else group_intervals.limits(ranked.macro, variance, most, groups.count)
    limits["log_loss"] = group_intervals.mean_limits(images.losses, groups)
    return limits


def _kappa(images: _Images, groups: Groups, *, draws: int, seed: int) -> dict[str, Any]:
    """The quadratic weighted kappa of ordered classes."""
    value = quadratic_kappa(images.codes, images.predicted, images.classes)
    units = None if groups is None else units_of(groups, len(images.codes))
    limits = (
        kappa_limits(images.codes, images.predicted, images.classes, units=units, draws=draws, seed=seed)
        if draws
        else None
    )
    found = intervals.with_limits(value, limits)
    if np.isnan(value):
        return found | {"reason": "one and the same class is true and predicted throughout"}
    return found | ({"reason": "no interval: there are too few images, or groups"} if draws and limits is None else {})


def _checked(
    probabilities: npt.ArrayLike, codes: npt.ArrayLike, classes: Sequence[str], ids: Ids
) -> tuple[Probabilities, Codes]:
    scores, truth = np.asarray(probabilities), np.asarray(codes)
    if not np.issubdtype(scores.dtype, np.floating):
        scores = scores.astype(np.float64)
    if not len(truth):
        raise UsageError("there is no labelled image to score")
    if truth.ndim != 1 or scores.shape != (len(truth), len(classes)):
        raise UsageError(
            f"probabilities must be (images, classes) = ({len(truth)}, {len(classes)}) for codes of shape {truth.shape} "
            f"and {len(classes)} classes, not {scores.shape}"
        )
    if ids is not None and len(ids) != len(truth):
        raise UsageError(f"there are {len(truth)} images, but {len(ids)} ids")
    bad = np.flatnonzero(~((scores.min(axis=1) >= 0) & (scores.max(axis=1) <= 1 + _ROUNDING)))  # NaN is neither
    if len(bad):
        raise UsageError(f"the probabilities of {len(bad)} images are not all between 0 and 1, first row {bad[0]}")
    if not np.issubdtype(truth.dtype, np.integer) or truth.min() < 0 or truth.max() >= len(classes):
        raise UsageError(f"codes must be integers from 0 to {len(classes) - 1}, positions in classes")
    return scores, truth.astype(np.int64)


def _places(probabilities: Probabilities, codes: Codes) -> Codes:
    """How many classes come before the true one; of equals the later class comes first, as in scikit-learn."""
    place = np.empty(len(codes), np.int64)
    later = np.arange(probabilities.shape[1])
    for start in range(0, len(codes), _ROWS):
        block, truth = probabilities[start : start + _ROWS], codes[start : start + _ROWS, None]
        own = np.take_along_axis(block, truth, axis=1)
        place[start : start + _ROWS] = ((block > own) | ((block == own) & (later > truth))).sum(axis=1)
    return place


def _mean_defined(part: Codes, whole: Codes) -> float:
    """The mean of ``part / whole`` over the classes where ``whole`` is not zero."""
    defined = whole > 0
    return float((part[defined] / whole[defined]).mean())


def _no_top(k: int, classes: int) -> dict[str, Any]:
    return {"value": None, "low": None, "high": None, "reason": f"of {classes} classes the true one is always in {k}"}


def _per_class(confusion: npt.NDArray[np.int64], ranked: OneVsRest, classes: Sequence[str]) -> list[dict[str, Any]]:
    hits, support, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    return [
        {
            "class": name,
            "support": int(support[k]),
            "predicted": int(predicted[k]),
            "precision": _ratio(hits[k], predicted[k]),
            "recall": _ratio(hits[k], support[k]),
            "f1": _ratio(2 * hits[k], support[k] + predicted[k]),
            "auc": None if np.isnan(ranked.values[k]) else float(ranked.values[k]),
        }
        for k, name in enumerate(classes)
    ]


def _ratio(part: np.int64, whole: np.int64) -> float | None:
    return float(part / whole) if whole else None


def _confused(confusion: npt.NDArray[np.int64], classes: Sequence[str], most: int) -> list[dict[str, Any]]:
    wrong = confusion * ~np.eye(len(confusion), dtype=np.bool_)
    cells = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [(int(cell) // len(wrong), int(cell) % len(wrong)) for cell in cells]
    return [
        {"true": classes[row], "predicted": classes[column], "count": int(wrong[row, column])}
        for row, column in pairs
        if wrong[row, column]
    ]


def _mistakes(images: _Images, classes: Sequence[str], ids: Ids, most: int) -> dict[str, Any]:
    wrong = np.flatnonzero(~images.correct)
    worst = wrong[np.argsort(-images.confidence[wrong], kind="stable")[:most]]
    shown = [
        {
            "id": str(row if ids is None else ids[row]),
            "true": classes[images.codes[row]],
            "predicted": classes[images.predicted[row]],
            "probability": float(images.confidence[row]),
            "probability_of_true": float(images.of_truth[row]),
        }
        for row in worst
    ]
    return {"count": len(wrong), "most_confident": shown}


_TITLES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "quadratic_kappa": KAPPA_TITLE,
    "auc": "AUC, one vs rest",
    "log_loss": "log-loss",
    "ece": "calibration error",
}


def measures_text(metrics: Mapping[str, Any]) -> str:
    """A table of measures with their intervals, and the reason where one has no value.

    Args:
        metrics: What ``score_table`` returns, or a part of it.
    """
    tops = {name: name.replace("_", "-") + " accuracy" for name in metrics if name.startswith("top_")}
    rows, reasons = [], []
    for name, title in {"accuracy": "accuracy", **tops, **_TITLES}.items():
        found = metrics.get(name, {})
        if found.get("value") is not None:
            limits = (
                found.get("reason", "") if found.get("low") is None else f"{found['low']:.4f} to {found['high']:.4f}"
            )
            rows.append([title, f"{found['value']:.4f}", limits])
        elif found and not name.startswith("top_"):  # of few classes nobody expects it
            reasons.append(f"{title}: none, {found['reason']}")
    interval = "95 % interval" if any(row[2] for row in rows) else ""
    untested = metrics.get("untested", [])
    if untested:
        reasons.append(untested_text(untested))
    return "\n".join([table(["measure", "value", interval], rows), *reasons])


def untested_text(classes: Sequence[str]) -> str:
    """Names the classes of which no image was scored."""
    return f"classes without a test image, about which the scores say nothing: {first_names(classes, 10)}"
