"""The layers of several networks compared: each measured alone on the same images and folds, then all against the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from featurepipe.errors import UsageError
from featurepipe.heads.statistics.comparison import Difference, difference_over_folds
from featurepipe.layer_depth.answers import SOURCE
from featurepipe.layer_depth.study import PRETRAINED
from featurepipe.reporting.blocks import measure_of
from featurepipe.store import FeatureStore

Document = Mapping[str, Any]

RULE = "the fastest layer within one standard error of the best of all networks (Breiman et al. 1984)"
_SAME = ("dataset", "images", "classes", "target_type", "measure", "protocol")


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
