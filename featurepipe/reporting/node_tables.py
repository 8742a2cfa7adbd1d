"""Tables with a row for each node: accuracy first, since a phone shows two columns or three."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from featurepipe.reporting.blocks import (
    Cell,
    Table,
    amount,
    bounded,
    count,
    finite,
    milliseconds,
    percent,
    plain,
    points,
    points_interval,
)

Document = Mapping[str, Any]
Results = Mapping[tuple[str, str, str, str], Document]
Column = tuple[str, Callable[[Document], Cell]]
"""A column's name, and its cell for an entry of the document's ``columns``."""

_NODES = (
    "Nodes in the order in which the network computes them, with 95\u00a0% intervals; differences are to the head's most "
    "accurate node, in percentage points, on the same folds"
)
_COST: Sequence[Column] = (
    ("share of cost", lambda node: Cell(percent(node.get("cost"), 0), finite(node.get("cost")))),
    ("ms per image", lambda node: Cell(milliseconds(node.get("ms_per_image")), finite(node.get("ms_per_image")))),
    ("width", lambda node: Cell(count(node.get("width")), finite(node.get("width")))),
    ("bytes", lambda node: Cell(amount(node.get("bytes_per_image")), finite(node.get("bytes_per_image")))),
)


def node_table(document: Document) -> Table | None:
    """How each head does on each node, then what the node costs, then what that compares with."""
    results = _by_kind(document)
    scored = document.get("transferability") or {}
    scores = scored.get("scores") or {}
    differences = {(row["head"], row["a"]): row for row in document.get("differences") or []}
    heads = _heads(results, "pretrained", "source")
    groups = {
        "Accuracy": _accuracies(results, "pretrained", "source"),
        "Cost": _COST,
        "Without fitting": [(str(scored.get("method") or "score"), _score(scores))] if scores else [],
        "Difference to best": [(head, _difference(differences, head)) for head in heads] if differences else [],
        "Accuracy, random weights": _accuracies(results, "random", "source"),
    }
    return _by_node(document, _NODES, groups)


def elsewhere_table(document: Document) -> Table | None:
    """How each head does on the other source with the features of each node, and what it loses there."""
    results = _by_kind(document)
    heads = _heads(results, "pretrained", "shifted")
    if not heads:
        return None
    groups = {
        "Accuracy there": _accuracies(results, "pretrained", "shifted"),
        "Difference to here": [(head, _loss(results, head)) for head in heads],
        "Accuracy there, random weights": _accuracies(results, "random", "shifted"),
    }
    where = document.get("test_dataset") or "the other source"
    return _by_node(
        document, f"Each node on {where}, with 95\u00a0% intervals; differences are percentage points", groups
    )


def joined_table(document: Document) -> Table | None:
    """Whether features of several nodes side by side help."""
    found = document.get("concatenations") or []
    rows = tuple(
        (
            Cell(" + ".join(map(str, row["columns"]))),
            bounded(row.get("accuracy"), row.get("low"), row.get("high")),
            Cell(
                points(row.get("difference")),
                finite(row.get("difference")),
                points_interval(row.get("low_difference"), row.get("high_difference")),
            ),
            Cell(_verdict(row)),
            Cell(str(row["head"])),
            Cell(str(row.get("against", ""))),
        )
        for row in found
    )
    header = ("Nodes", "Accuracy", "Difference (points)", "Does it help?", "Head", "Against")
    return Table("Features of several nodes joined, against the best of one", header, rows) if rows else None


def _by_kind(document: Document) -> Results:
    return {
        (row["column"], row["head"], row["network"], row.get("tested_on", "source")): row
        for row in document.get("results") or []
    }


def _heads(results: Results, network: str, tested_on: str) -> list[str]:
    return list(dict.fromkeys(head for _, head, *kind in results if kind == [network, tested_on]))


def _by_node(document: Document, caption: str, groups: Mapping[str, Sequence[Column]]) -> Table | None:
    """A row for each node; groups without columns are left out."""
    nodes = document.get("columns") or []
    names = [str(node["column"]) for node in nodes]
    kept = {title: columns for title, columns in groups.items() if columns}
    columns = [column for group in kept.values() for column in group]
    rows = tuple(
        (Cell(name, place), *(cell(node) for _, cell in columns))
        for place, (name, node) in enumerate(zip(names, nodes, strict=True))
    )
    best = (document.get("recommended") or {}).get("column")
    spans = (("", 1), *((title, len(group)) for title, group in kept.items()))
    header = ("Node", *(name for name, _ in columns))
    return Table(caption, header, rows, spans, names.index(best) if best in names else None) if rows else None


def _accuracies(results: Results, network: str, tested_on: str) -> list[Column]:
    def of(head: str) -> Callable[[Document], Cell]:
        return lambda node: _measured(results.get((node["column"], head, network, tested_on)))

    return [(head, of(head)) for head in _heads(results, network, tested_on)]


def _measured(row: Document | None) -> Cell:
    return bounded(*(row.get(name) for name in ("accuracy", "low", "high"))) if row else Cell(percent(None))


def _score(scores: Document) -> Callable[[Document], Cell]:
    return lambda node: Cell(plain(scores.get(node["column"])), finite(scores.get(node["column"])))


def _difference(differences: Mapping[tuple[str, str], Document], head: str) -> Callable[[Document], Cell]:
    def cell(node: Document) -> Cell:
        row = differences.get((head, node["column"])) or {}
        bounds = points_interval(row.get("low"), row.get("high"))
        return Cell(points(row.get("difference")), finite(row.get("difference")), bounds)

    return cell


def _loss(results: Results, head: str) -> Callable[[Document], Cell]:
    def cell(node: Document) -> Cell:
        kinds = [results.get((node["column"], head, "pretrained", tested_on)) for tested_on in ("shifted", "source")]
        there, here = (finite((row or {}).get("accuracy")) for row in kinds)
        change = None if there is None or here is None else there - here
        return Cell(points(change), change)

    return cell


def _verdict(row: Document) -> str:
    low, high = finite(row.get("low_difference")), finite(row.get("high_difference"))
    if low is None or high is None:
        return points(None)
    return "yes" if low > 0 else "no, it harms" if high < 0 else "no difference shown"
