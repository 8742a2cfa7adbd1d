"""The sections that only a depth benchmark has: the answer, the curves, the nodes, what joins and what is alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from featurepipe.reporting.blocks import Block, Figures, Prose, Section, Table
from featurepipe.reporting.curves import depth_curves
from featurepipe.reporting.matrices import similarity_map
from featurepipe.reporting.numbers import (
    Cell,
    amount,
    bounded,
    count,
    finite,
    interval,
    milliseconds,
    percent,
    plain,
    points,
    points_interval,
)
from featurepipe.reporting.palette import Paint
from featurepipe.reporting.scores import score_scatter

Document = Mapping[str, Any]


def depth_title(document: Document) -> str:
    """The question that the page answers."""
    network = (document.get("backbone") or {}).get("name", "the network")
    return f"Which layer of {network} transfers best to {document.get('dataset', 'the data')}?"


def depth_sections(document: Document, paint: Paint) -> list[Section]:
    """What the document has, in the order in which one reads it."""
    parts: list[tuple[str, str, Sequence[Block | None]]] = [
        ("answer", "Answer", _answer(document)),
        ("curves", "Accuracy over depth", (depth_curves(document, paint),)),
        ("nodes", "All nodes", (node_table(document),)),
        ("joined", "Nodes side by side", (_concatenations(document),)),
        ("similarity", "Similarity of nodes", (similarity_map(document, paint),)),
        ("scores", "Transferability without fitting", (score_scatter(document, paint),)),
    ]
    sections = [Section(anchor, title, [block for block in blocks if block]) for anchor, title, blocks in parts]
    return [section for section in sections if section.blocks]


def _answer(document: Document) -> list[Block]:
    best = document.get("recommended") or {}
    if not best.get("column"):
        return []
    sentence = (
        f"Take {best['column']} with a {best.get('head', 'linear')} head: {percent(best.get('accuracy'))} accuracy"
        f"{_in_brackets(best)}."
    )
    against = _against_best(best)
    rule = f"Rule: {best['rule']}." if best.get("rule") else ""
    figures = (
        ("Accuracy", percent(best.get("accuracy")), interval(best.get("low"), best.get("high"))),
        ("Operations saved", percent(best.get("saved"), 0), "by stopping the network there"),
        ("Time", f"{milliseconds(best.get('ms_per_image'))} ms", "per image"),
        ("Width", count(best.get("width")), f"values, {amount(best.get('bytes_per_image'))} per image"),
    )
    return [
        Prose((f"{sentence} {against}".strip(),)),
        Figures(figures),
        Prose(tuple(filter(None, (_ties(best), _elsewhere(best.get("elsewhere")))))),
        Prose(tuple(filter(None, (rule, _asked(document))))),
    ]


def _ties(best: Document) -> str:
    same = best.get("not_told_apart")
    return f"By these folds not told apart from {best.get('best')}: {', '.join(same)}." if same else ""


def _elsewhere(there: Document | None) -> str:
    """How the recommended node does on the other source."""
    if not there:
        return ""
    same = there.get("of_equal_id")
    paired = f" {count(same)} of its images have the id of one that most folds train on." if same else ""
    return (
        f"On {there['dataset']}, {count(there.get('images'))} images tested with every fold's head: "
        f"{percent(there.get('accuracy'))}"
        f"{_in_brackets(there)}; the best node there is {there['best']} with {percent(there.get('best_accuracy'))}.{paired}"
    )


def _in_brackets(best: Document) -> str:
    bounds = interval(best.get("low"), best.get("high"))
    return f" (95\u00a0% interval {bounds})" if bounds else ""


def _against_best(best: Document) -> str:
    saved = finite(best.get("saved"))
    cost = f"Stopping the network there saves {percent(saved, 0)} of its operations. " if saved else ""
    if best.get("best") in {None, best["column"]}:
        return f"{cost}No node did better."
    return f"{cost}The most accurate node, {best['best']}, reaches {percent(best.get('best_accuracy'))}."


def _asked(document: Document) -> str:
    settings, backbone = document.get("settings") or {}, document.get("backbone") or {}
    heads = ", ".join(map(str, settings.get("heads") or []))
    parts = [
        f"{count(document.get('images'))} images of {count(len(document.get('classes') or []))} classes",
        f"{count(len(document.get('columns') or []))} nodes of {backbone.get('name', 'the network')}"
        + (f" with weights {backbone['weights']}" if backbone.get("weights") else ""),
        f"heads {heads}" if heads else "",
        f"tested also on {document['test_dataset']}" if document.get("test_dataset") else "",
        "the same network with random weights as control" if document.get("control") else "",
    ]
    return f"Compared: {'; '.join(filter(None, parts))}."


def node_table(document: Document) -> Table | None:
    """One row for each node: what it costs, and how each head does on it."""
    columns = document.get("columns") or []
    if not columns:
        return None
    results = {
        (row["column"], row["head"], row["network"], row.get("tested_on", "source")): row
        for row in document.get("results") or []
    }
    heads = list(dict.fromkeys(head for _, head, _, _ in results))
    kinds = [kind for kind in _KINDS if any(key[2:] == kind for key in results)]
    scores = (document.get("transferability") or {}).get("scores") or {}
    method = str((document.get("transferability") or {}).get("method") or "score")
    differences = {(row["head"], row["a"]): row for row in document.get("differences") or []}
    names = [column["column"] for column in columns]
    recommended = (document.get("recommended") or {}).get("column")
    header, groups = _header(heads, kinds, method if scores else "", with_differences=bool(differences))
    rows = []
    for place, column in enumerate(columns):
        name = column["column"]
        row = [*_cost(column, place), *([Cell(plain(scores.get(name)), finite(scores.get(name)))] if scores else [])]
        for head in heads:
            row += [_measured(results.get((name, head, *kind))) for kind in kinds]
            row += [_difference(differences.get((head, name)))] if differences else []
        rows.append(tuple(row))
    marked = names.index(recommended) if recommended in names else None
    return Table(_CAPTION, header, tuple(rows), groups, marked)


_CAPTION = (
    "Nodes in the order in which the network computes them, with 95\u00a0% intervals; differences are to the head's most "
    "accurate node, in percentage points, on the same folds"
)
_KINDS = {
    ("pretrained", "source"): "accuracy",
    ("random", "source"): "random weights",
    ("pretrained", "shifted"): "shifted data",
    ("random", "shifted"): "shifted, random weights",
}


def _header(
    heads: Sequence[str], kinds: Sequence[tuple[str, str]], method: str, *, with_differences: bool
) -> tuple[tuple[str, ...], tuple[tuple[str, int], ...]]:
    own = [_KINDS[kind] for kind in kinds] + (["difference to best"] if with_differences else [])
    costs = ["Node", "width", "bytes", "ms per image", "share of cost", *([method] if method else [])]
    header = (*costs, *(name for _ in heads for name in own))
    return header, (
        ("", 1),
        ("Cost" if not method else "Cost and score", len(costs) - 1),
        *((head, len(own)) for head in heads),
    )


def _cost(column: Document, place: int) -> list[Cell]:
    return [
        Cell(str(column["column"]), place),
        Cell(count(column.get("width")), finite(column.get("width"))),
        Cell(amount(column.get("bytes_per_image")), finite(column.get("bytes_per_image"))),
        Cell(milliseconds(column.get("ms_per_image")), finite(column.get("ms_per_image"))),
        Cell(percent(column.get("cost"), 0), finite(column.get("cost"))),
    ]


def _measured(row: Document | None) -> Cell:
    return bounded(*(row.get(name) for name in ("accuracy", "low", "high"))) if row else Cell(percent(None))


def _difference(row: Document | None) -> Cell:
    if not row:
        return Cell(points(None))
    return Cell(
        points(row.get("difference")), finite(row.get("difference")), points_interval(row.get("low"), row.get("high"))
    )


def _concatenations(document: Document) -> Table | None:
    found = document.get("concatenations") or []
    rows = tuple(
        (
            Cell(" + ".join(map(str, row["columns"]))),
            Cell(str(row["head"])),
            bounded(row.get("accuracy"), row.get("low"), row.get("high")),
            Cell(str(row.get("against", ""))),
            Cell(
                points(row.get("difference")),
                finite(row.get("difference")),
                points_interval(row.get("low_difference"), row.get("high_difference")),
            ),
            Cell(_verdict(row)),
        )
        for row in found
    )
    header = ("Nodes", "Head", "Accuracy", "Against", "Difference (points)", "Does it help?")
    return Table("Features of several nodes joined, against the best of one", header, rows) if rows else None


def _verdict(row: Document) -> str:
    low, high = finite(row.get("low_difference")), finite(row.get("high_difference"))
    if low is None or high is None:
        return points(None)
    return "yes" if low > 0 else "no, it harms" if high < 0 else "no difference shown"
