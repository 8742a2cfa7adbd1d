"""From cells to answers: accuracies with intervals, differences, the recommended column, whether columns side by side help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featurepipe.heads.statistics.comparison import (
    AccuracyEstimate,
    Difference,
    cheapest_within_one_se,
    difference_over_folds,
    difference_over_images,
    over_folds,
    over_images,
    rank_correlation,
)
from featurepipe.layer_depth.study import PRETRAINED

if TYPE_CHECKING:
    from featurepipe.layer_depth.folds import Elsewhere
    from featurepipe.layer_depth.measure import Series
    from featurepipe.layer_depth.study import DepthColumn, Study

SOURCE, SHIFTED = "source", "shifted"
SURE = 0.05
"""Adjusted p value up to which a difference is taken for more than chance."""


def estimate(study: Study, series: Series, tested_on: str = SOURCE) -> AccuracyEstimate:
    """Accuracy with its interval: over folds, or over images where there is one split or another source."""
    if tested_on == SHIFTED:
        return over_images(*_by_image_elsewhere(study, series))
    if study.protocol.folds:
        found = over_folds([cell.accuracy for cell in series.cells], study.test_share)
        return _wider(found, over_images(*_by_image(study, series)))
    return over_images(np.stack([cell.correct for cell in series.cells]), _keys_of_test(study))


def _wider(one: AccuracyEstimate, other: AccuracyEstimate) -> AccuracyEstimate:
    """The first, but with the interval of the second if that is wider: folds that happen to agree are no certainty."""
    if one.se is None or (other.se is not None and other.high - other.low > one.high - one.low):  # type: ignore[operator]
        return replace(
            other, value=one.value, low=min(other.low or 0.0, one.value), high=max(other.high or 1.0, one.value)
        )
    return one


def _less_sure(one: Difference, other: Difference) -> Difference:
    """The same of differences: the wider interval, and its p value."""
    widths = [0.0 if found.low is None or found.high is None else found.high - found.low for found in (one, other)]
    return replace(other, value=one.value) if one.low is None or widths[1] > widths[0] else one


def _by_image(study: Study, series: Series) -> tuple[npt.NDArray[np.float64], Any]:
    """How often each tested image was right, the mean over seeds, and what tells groups of images, or else images, apart."""
    right, times = np.zeros(len(study.images)), np.zeros(len(study.images))
    for fold, cell in zip(study.folds, series.cells, strict=True):
        right[fold.test] += cell.correct
        times[fold.test] += 1
    tested = times > 0
    return right[tested] / times[tested], study.units[tested]


def _by_image_elsewhere(study: Study, series: Series) -> tuple[npt.NDArray[np.float64], Any]:
    """Whether each image of the other source was right, a row for each head, and the images' keys.

    Where some heads have learned from an image's twin there is a row for each seed instead: the mean over its other heads.
    """
    there = _there(study)
    right = np.stack([cell.shifted for cell in series.cells]).astype(np.float64)  # type: ignore[misc]
    if there.unseen.all():
        return right, there.images.keys64
    seeds = np.array([fold.seed for fold in study.folds])
    rows = [
        (right * there.unseen)[seeds == seed].sum(0) / there.unseen[seeds == seed].sum(0) for seed in np.unique(seeds)
    ]
    return np.stack(rows), there.images.keys64


def difference(study: Study, one: Series, other: Series) -> Difference:
    """By how much ``one`` is more accurate than ``other``, paired by fold or by image."""
    if study.protocol.folds:
        first, second = ([cell.accuracy for cell in series.cells] for series in (one, other))
        over_cells = difference_over_folds(first, second, study.test_share)
        (hits, keys), (others, _) = _by_image(study, one), _by_image(study, other)
        return _less_sure(over_cells, difference_over_images(hits, others, keys))
    first_hits, second_hits = (np.stack([cell.correct for cell in series.cells]) for series in (one, other))
    return difference_over_images(first_hits, second_hits, _keys_of_test(study))


def results(study: Study, measured: Sequence[Series]) -> list[dict[str, Any]]:
    """One entry for each column, head, network and source of test images."""
    found = []
    for series in measured:
        kinds = [SOURCE, SHIFTED] if study.elsewhere else [SOURCE]
        found += [_result(study, series, kind) for kind in kinds]
    return found


def _result(study: Study, series: Series, tested_on: str) -> dict[str, Any]:
    found = estimate(study, series, tested_on)
    return {
        "column": "+".join(series.columns),
        "head": series.head,
        "network": series.network,
        "tested_on": tested_on,
        "accuracy": found.value,
        "low": found.low,
        "high": found.high,
        "se": found.se,
        "cells": _accuracies(study, series, tested_on),
        "params": [dict(cell.params) for cell in series.cells],
        "train_accuracy": float(np.mean([cell.train_accuracy for cell in series.cells])),
        "seconds": round(sum(cell.seconds for cell in series.cells), 2),
    }


@dataclass(frozen=True)
class Recommendation:
    """The cheapest column within one standard error of the best, and that best one.

    Attributes:
        chosen: what to use.
        best: the most accurate.
        estimate: of the chosen one.
        best_estimate: of the best one.
    """

    chosen: Series
    best: Series
    estimate: AccuracyEstimate
    best_estimate: AccuracyEstimate


def recommend(study: Study, measured: Sequence[Series]) -> Recommendation:
    """Chooses among all single columns and heads of the pretrained network, by its cost up to the column."""
    candidates = {f"{series.columns[0]} {series.head}": series for series in measured if series.network == PRETRAINED}
    costs = {column.column: _cost(column) for column in study.columns}
    estimates = {name: estimate(study, series) for name, series in candidates.items()}
    chosen, best = cheapest_within_one_se(
        estimates, {name: costs[series.columns[0]] for name, series in candidates.items()}
    )
    return Recommendation(candidates[chosen], candidates[best], estimates[chosen], estimates[best])


def of_head(measured: Sequence[Series], head: str) -> list[Series]:
    """What a head reached on the pretrained network."""
    return [series for series in measured if series.head == head and series.network == PRETRAINED]


def best_of(study: Study, measured: Sequence[Series], head: str) -> Series:
    """The most accurate of them."""
    return max(of_head(measured, head), key=lambda series: estimate(study, series).value)


def not_told_apart(found: Recommendation, between: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns that chance may have put behind the best one: those of its head with an adjusted p value over 0.05."""
    own = [one for one in between if one["head"] == found.best.head]
    return [one["a"] for one in own if one.get("p_adjusted", 1.0) > SURE]


def elsewhere(study: Study, found: Recommendation, measured: Sequence[Series]) -> dict[str, Any] | None:
    """How the recommended column does on the other source, and which one does best there with the same head."""
    if study.elsewhere is None:
        return None
    own = of_head(measured, found.chosen.head)
    there = {series.columns[0]: estimate(study, series, SHIFTED) for series in own}
    best = max(there, key=lambda column: there[column].value)
    return {
        "dataset": study.elsewhere.dataset,
        "images": len(study.elsewhere.rows),
        "of_equal_id": study.elsewhere.twins,
        **_accuracy(there[found.chosen.columns[0]]),
        "best": best,
        "best_accuracy": there[best].value,
    }


def _accuracy(found: AccuracyEstimate) -> dict[str, float | None]:
    return {"accuracy": found.value, "low": found.low, "high": found.high, "se": found.se}


def differences(study: Study, measured: Sequence[Series]) -> list[dict[str, Any]]:
    """Every column against the best one of the same head, on the same folds; ``p_adjusted`` is for all of a head's together."""
    found: list[dict[str, Any]] = []
    for head in study.protocol.heads:
        own, best = of_head(measured, head), best_of(study, measured, head)
        others = [(series.columns[0], difference(study, series, best)) for series in own if series is not best]
        found += _holm([{"head": head, "a": a, "b": best.columns[0], **_between(between)} for a, between in others])
    return found


def neighbours_to_join(study: Study, measured: Sequence[Series], head: str, widest: int) -> list[tuple[str, ...]]:
    """Columns worth measuring side by side: the two, and the three, most accurate of different nodes; all, where not too wide."""
    nodes = {column.column: column.node for column in study.columns}
    widths = {column.column: column.width for column in study.columns}
    ranked = sorted(of_head(measured, head), key=lambda series: -estimate(study, series).value)
    kept: dict[str, str] = {}
    for series in ranked:
        kept.setdefault(nodes[series.columns[0]], series.columns[0])
    order = [column.column for column in study.columns]
    first = [tuple(sorted(list(kept.values())[:count], key=order.index)) for count in (2, 3, len(kept))]
    return [
        columns
        for columns in dict.fromkeys(first)
        if len(columns) > 1 and (len(columns) <= 3 or sum(widths[column] for column in columns) <= widest)
    ]


def concatenations(study: Study, joined: Sequence[Series], best: Series) -> list[dict[str, Any]]:
    """Columns side by side against the best single one of the same head."""
    found = []
    for series in joined:
        between = difference(study, series, best)
        found.append({
            "columns": list(series.columns), "head": series.head, "accuracy": (one := estimate(study, series)).value,
            "low": one.low, "high": one.high, "se": one.se, "against": best.columns[0], "difference": between.value,
            "low_difference": between.low, "high_difference": between.high, "p": between.p,
        })  # fmt: skip
    return found


def correlations(study: Study, measured: Sequence[Series], scores: Mapping[str, float]) -> dict[str, Any]:
    """Rank correlation of a score that needs no fitting with each head's accuracy, over columns."""
    found = {}
    for head in study.protocol.heads:
        own = of_head(measured, head)
        accuracies = [estimate(study, series).value for series in own]
        found[head] = rank_correlation([scores[series.columns[0]] for series in own], accuracies)
    return found


def _cost(column: DepthColumn) -> float:
    """Share of the forward, and of equal ones the narrower column."""
    return column.cost + 1e-9 * column.width


def _between(found: Difference) -> dict[str, float | None]:
    return {"difference": found.value, "low": found.low, "high": found.high, "p": found.p}


def _accuracies(study: Study, series: Series, tested_on: str) -> list[float]:
    """Of each cell; elsewhere on the images whose twin it has not seen, if there are any."""
    if tested_on == SOURCE:
        return [cell.accuracy for cell in series.cells]
    pairs = zip(series.cells, _there(study).unseen, strict=True)
    return [float(cell.shifted[unseen].mean()) for cell, unseen in pairs if cell.shifted is not None and unseen.any()]


def _there(study: Study) -> Elsewhere:
    if study.elsewhere is None:
        raise RuntimeError("there is no other source")
    return study.elsewhere


def _holm(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds p values adjusted for the number of comparisons (Holm 1979)."""
    known = sorted((one for one in found if one["p"] is not None), key=lambda one: one["p"])
    floor = 0.0
    for place, one in enumerate(known):
        floor = max(floor, min(1.0, one["p"] * (len(known) - place)))
        one["p_adjusted"] = floor
    return found


def _keys_of_test(study: Study) -> Any:
    return study.units[study.folds[0].test]
