"""From cells to answers: measures with intervals, differences, the recommended column of one network or of several.

A measure is the accuracy, the mean average precision of several labels, or R2 of a number
(`featurepipe.layer_depth.probes.MEASURES`); entries of the document call it by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featurepipe.errors import UsageError
from featurepipe.heads.statistics.comparison import (
    ACCURACY,
    AccuracyEstimate,
    Difference,
    cheapest_within_one_se,
    difference_over_folds,
    difference_over_images,
    holm,
    over_folds,
    over_images,
    rank_correlation,
)
from featurepipe.layer_depth.study import PRETRAINED
from featurepipe.reporting.blocks import measure_of

if TYPE_CHECKING:
    from featurepipe.layer_depth.folds import Elsewhere
    from featurepipe.layer_depth.measure import Series
    from featurepipe.layer_depth.study import DepthColumn, Study
    from featurepipe.store import FeatureStore

SOURCE, SHIFTED = "source", "shifted"
SURE = 0.05
"""Adjusted p value up to which a difference is taken for more than chance."""

Document = Mapping[str, Any]

RULE = "the fastest layer within one standard error of the best of all networks (Breiman et al. 1984)"
_SAME = ("dataset", "images", "classes", "target_type", "measure", "protocol")  # of all networks that are compared


def estimate(study: Study, series: Series, tested_on: str = SOURCE) -> AccuracyEstimate:
    """The measure with its interval: over folds, or over images where there is one split or another source."""
    measure = study.measure
    if tested_on == SHIFTED:
        return over_images(*_by_image_elsewhere(study, series), measure=measure)
    if study.protocol.folds:
        found = over_folds([cell.value for cell in series.cells], study.test_share, measure=measure)
        return _wider(found, over_images(*_by_image(study, series), measure=measure))
    return over_images(np.stack([cell.contributions for cell in series.cells]), _keys_of_test(study), measure=measure)


def _wider(one: AccuracyEstimate, other: AccuracyEstimate) -> AccuracyEstimate:
    """The first, but with the interval of the second if that is wider: folds that happen to agree are no certainty."""
    if one.se is None or (other.se is not None and other.high - other.low > one.high - one.low):  # type: ignore[operator]
        low, high = other.low, other.high
        return replace(
            other,
            value=one.value,
            low=None if low is None else min(low, one.value),
            high=None if high is None else max(high, one.value),
        )
    return one


def _less_sure(one: Difference, other: Difference) -> Difference:
    """The same of differences: the wider interval, and its p value."""
    widths = [0.0 if found.low is None or found.high is None else found.high - found.low for found in (one, other)]
    return replace(other, value=one.value) if one.low is None or widths[1] > widths[0] else one


def _by_image(study: Study, series: Series) -> tuple[npt.NDArray[np.float64], Any]:
    """What each tested image adds, the mean over seeds, and what tells groups of images, or else images, apart.

    Where it is right or wrong, that is how often it was right.
    """
    right, times = np.zeros(len(study.images)), np.zeros(len(study.images))
    for fold, cell in zip(study.folds, series.cells, strict=True):
        right[fold.test] += cell.contributions
        times[fold.test] += 1
    tested = times > 0
    return right[tested] / times[tested], study.units[tested]


def _by_image_elsewhere(study: Study, series: Series) -> tuple[npt.NDArray[np.float64], Any]:
    """What each image of the other source adds, a row for each head, and what tells groups of them, or else them, apart.

    Where some heads have learned from an image's twin there is a row for each seed instead: the mean over its other heads.
    """
    there = _there(study)
    right = np.stack([cell.shifted for cell in series.cells]).astype(np.float64)  # type: ignore[misc]
    if there.unseen.all():
        return right, there.images.units()
    seeds = np.array([fold.seed for fold in study.folds])
    mean = _mean_hits if study.measure == ACCURACY else _mean_contributions
    rows = [mean(right[seeds == seed], there.unseen[seeds == seed]) for seed in np.unique(seeds)]
    return np.stack(rows), there.images.units()


def _mean_hits(right: npt.NDArray[np.float64], counted: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """(m,) how often each image was right by the heads that count for it."""
    return np.asarray((right * counted).sum(0) / counted.sum(0))


def _mean_contributions(values: npt.NDArray[np.float64], counted: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """(m,) contributions to the mean of several heads' measures, each of the images that count for it; see `Cell`."""
    defined = [(row[own], own) for row, own in zip(values, counted, strict=True) if own.any()]
    defined = [(row, own) for row, own in defined if np.isfinite(row).all()]
    found = np.full(values.shape[1], np.mean([row.mean() for row, _ in defined]))
    for row, own in defined:
        found[own] += (row - row.mean()) * len(found) / (len(row) * len(defined))
    return found


def difference(study: Study, one: Series, other: Series) -> Difference:
    """By how much ``one`` is better than ``other``, paired by fold or by image."""
    measure = study.measure
    if study.protocol.folds:
        first, second = ([cell.value for cell in series.cells] for series in (one, other))
        over_cells = difference_over_folds(first, second, study.test_share, measure=measure)
        (hits, keys), (others, _) = _by_image(study, one), _by_image(study, other)
        return _less_sure(over_cells, difference_over_images(hits, others, keys, measure=measure))
    first_hits, second_hits = (np.stack([cell.contributions for cell in series.cells]) for series in (one, other))
    return difference_over_images(first_hits, second_hits, _keys_of_test(study), measure=measure)


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
        **_measured(study, found),
        "cells": _accuracies(study, series, tested_on),
        "params": [dict(cell.params) for cell in series.cells],
        f"train_{study.measure}": float(np.mean([cell.train_value for cell in series.cells])),
        **(_besides(series) if tested_on == SOURCE else {}),
        "seconds": round(sum(cell.seconds for cell in series.cells), 2),
    }


def _besides(series: Series) -> dict[str, float]:
    """Further measures, the mean over cells."""
    names = dict.fromkeys(name for cell in series.cells for name in cell.besides)
    each = {name: [cell.besides[name] for cell in series.cells if name in cell.besides] for name in names}
    return {name: float(np.mean(values)) for name, values in each.items()}


@dataclass(frozen=True)
class Recommendation:
    """The cheapest column within one standard error of the best, and that best one.

    Attributes:
        chosen: what to use.
        best: the best.
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
        **({"of_equal_group": study.elsewhere.grouped} if study.elsewhere.grouped else {}),
        **_measured(study, there[found.chosen.columns[0]]),
        "best": best,
        f"best_{study.measure}": there[best].value,
    }


def _measured(study: Study, found: AccuracyEstimate) -> dict[str, float | None]:
    return {study.measure: found.value, "low": found.low, "high": found.high, "se": found.se}


def differences(study: Study, measured: Sequence[Series]) -> list[dict[str, Any]]:
    """Every column against the best one of the same head, on the same folds; ``p_adjusted`` is for all of a head's together."""
    found: list[dict[str, Any]] = []
    for head in study.protocol.heads:
        own, best = of_head(measured, head), best_of(study, measured, head)
        others = [(series.columns[0], difference(study, series, best)) for series in own if series is not best]
        found += with_adjusted_p(
            [{"head": head, "a": a, "b": best.columns[0], **_between(between)} for a, between in others]
        )
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
        found.append(
            {
                "columns": list(series.columns),
                "head": series.head,
                **_measured(study, estimate(study, series)),
                "against": best.columns[0],
                "difference": between.value,
                "low_difference": between.low,
                "high_difference": between.high,
                "p": between.p,
            }
        )
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
        return [cell.value for cell in series.cells]
    pairs = zip(series.cells, _there(study).unseen, strict=True)
    found = [cell.shifted[unseen] for cell, unseen in pairs if cell.shifted is not None and unseen.any()]
    return [float(shifted.mean()) for shifted in found if np.isfinite(shifted).all()]


def _there(study: Study) -> Elsewhere:
    if study.elsewhere is None:
        raise RuntimeError("there is no other source")
    return study.elsewhere


def with_adjusted_p(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds p values adjusted for the number of comparisons (Holm 1979)."""
    known = [one for one in found if one["p"] is not None]
    for one, adjusted in zip(known, holm([one["p"] for one in known]), strict=True):
        one["p_adjusted"] = adjusted
    return found


def _keys_of_test(study: Study) -> Any:
    return study.units[study.folds[0].test]


def names_of(backbone: str | Sequence[str] | None) -> list[str | None]:
    """The networks that are asked for, each once; None for the default.

    Raises:
        UsageError: One is named twice.
    """
    names: list[str | None] = [backbone] if backbone is None or isinstance(backbone, str) else [*backbone]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"backbone {twice} is named twice; name each network once")
    return names or [None]


def compared(names: Sequence[str], measure_one: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """What comparisons of the layers of several networks found, together.

    Args:
        names: The networks, in the order in which they are measured.
        measure_one: Compares the layers of one: what `featurepipe.depth` returns of it.

    Returns:
        JSON values: ``kind`` "networks", ``networks`` (the document of each), ``recommended`` (the layer that is as good as the
        best of all by one standard error and takes the least time), ``differences`` (of the best layer of each to that of the
        best network, paired by fold; without bounds where one split was measured), and of the recommended network ``backbone``,
        ``space``, ``details``, ``provenance`` and what they were measured on. Or the plans of a dry run.

    Raises:
        UsageError: The images were not the same, as where some were added meanwhile.
    """
    documents = [measure_one(name) for name in names]
    if documents[0].get("kind") == "depth plan":
        return {"kind": "depth plan", "networks": documents}
    for one in documents[1:]:
        differs = [name for name in _SAME if one[name] != documents[0][name]]
        if differs:
            raise UsageError(
                f"{one['backbone']['name']} and {documents[0]['backbone']['name']} were not measured on the same images: "
                f"{', '.join(differs)} differ, as where the source changed meanwhile; compare again"
            )
    chosen, best, recommended = _chosen(documents)
    of_chosen = documents[chosen]
    shared = {name: of_chosen[name] for name in _SAME}
    kept = {
        name: of_chosen[name] for name in ("backbone", "space", "details", "details_shifted", "provenance", "settings")
    }
    return {
        "kind": "networks", "version": 1, **shared, **kept, "labels": of_chosen["labels"], "recommended": recommended,
        "differences": _differences(documents, best), "networks": documents,
    }  # fmt: skip


def keep_recommended(store: FeatureStore, found: Document) -> None:
    """Makes the document of the recommended network the newest one, which ``train`` and ``report`` take."""
    name = found["recommended"]["backbone"]
    store.write_depth(next(one for one in found["networks"] if one["backbone"]["name"] == name))


def best_of_network(document: Document) -> dict[str, Any]:
    """The result with the greatest value of a network, with the layer's costs."""
    name = measure_of(document).name
    found: dict[str, Any] = max(_own(document), key=lambda row: row[name])
    return found


def _own(document: Document) -> list[dict[str, Any]]:
    """Results on the source with the network's weights, each with what its layer costs."""
    costs = {column["column"]: column for column in document["columns"]}
    return [
        {**costs[row["column"]], **row, "backbone": document["backbone"]["name"]}
        for row in document["results"]
        if row["network"] == PRETRAINED and row["tested_on"] == SOURCE
    ]


def _chosen(documents: Sequence[Document]) -> tuple[int, int, dict[str, Any]]:
    """Which network is recommended, which has the best layer, and the recommended layer."""
    name = measure_of(documents[0]).name
    tops = [best_of_network(document) for document in documents]
    best = max(range(len(tops)), key=lambda number: tops[number][name])
    least = tops[best][name] - (tops[best]["se"] or 0.0)
    near = [(number, row) for number, one in enumerate(documents) for row in _own(one) if row[name] >= least]
    number, row = min(near, key=lambda pair: (_time(pair[1]), -pair[1][name]))
    shown = (
        "backbone",
        "column",
        "node",
        "head",
        name,
        "low",
        "high",
        "se",
        "width",
        "bytes_per_image",
        "ms_per_image",
        "saved",
    )
    top = {"best_backbone": tops[best]["backbone"], "best": tops[best]["column"], f"best_{name}": tops[best][name]}
    return number, best, {**{key: row.get(key) for key in shown}, **top, "best_head": tops[best]["head"], "rule": RULE}


def _time(row: Document) -> float:
    return float("inf") if row.get("ms_per_image") is None else float(row["ms_per_image"])


def _differences(documents: Sequence[Document], best: int) -> list[dict[str, Any]]:
    """The best layer of each network against that of the best one, on the same folds."""
    measure, top = measure_of(documents[0]).name, best_of_network(documents[best])
    folds = documents[0]["settings"]["folds"]
    found = []
    for number, document in enumerate(documents):
        if number != best:
            own = best_of_network(document)
            between = Difference(own[measure] - top[measure], None, None, None)
            if folds:
                between = difference_over_folds(own["cells"], top["cells"], 1 / (folds - 1), measure=measure)
            a, b = (f"{row['backbone']} {row['column']}" for row in (own, top))
            found.append(
                {"backbone": own["backbone"], "a": a, "b": b, "difference": between.value, "low_difference": between.low,
                 "high_difference": between.high, "p": between.p}
            )  # fmt: skip
    return found
