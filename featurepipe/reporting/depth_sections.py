"""The sections that only a depth benchmark has: the answer, the curves, the nodes, what joins and what is alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from featurepipe.display import counted, named_columns
from featurepipe.records import is_undisturbed
from featurepipe.reporting.blocks import (
    DASH,
    Block,
    Figures,
    MeasureStyle,
    Paint,
    Prose,
    Section,
    Table,
    TableCell,
    amount,
    count,
    finite,
    measure_of,
    metrics_elsewhere,
    milliseconds,
    percent,
    plain,
)
from featurepipe.reporting.charts import similarity_map
from featurepipe.reporting.depth_curves import cost_curves, depth_curves, score_scatter
from featurepipe.reporting.head_sections import errors, worst

Document = Mapping[str, Any]
Results = Mapping[tuple[str, str, str, str], Document]
Column = tuple[str, Callable[[Document], TableCell]]
"""A column's name, and its cell for an entry of the document's ``columns``."""

_NODES = (
    "Nodes in the order in which the network computes them, with 95\u00a0% intervals; differences are to the head's {} "
    "node{}, on the same folds"
)
_ONCE = (
    "Counted below is one answer for each image, by one head that has not learned from the image of equal id or its group. Above "
    "it is the mean over all such heads, of every fold and seed, so that the two differ a little."
)
_COST: Sequence[Column] = (
    ("share of cost", lambda node: TableCell(percent(node.get("cost"), 0), finite(node.get("cost")))),
    ("ms per image", lambda node: TableCell(milliseconds(node.get("ms_per_image")), finite(node.get("ms_per_image")))),
    ("width", lambda node: TableCell(count(node.get("width")), finite(node.get("width")))),
    ("bytes", lambda node: TableCell(amount(node.get("bytes_per_image")), finite(node.get("bytes_per_image")))),
)


def node_table(document: Document) -> Table | None:
    """How each head does on each node, then what the node costs, then what that compares with."""
    results, measure = _by_kind(document), measure_of(document)
    scored = document.get("transferability") or {}
    scores = scored.get("scores") or {}
    differences = {(row["head"], row["a"]): row for row in document.get("differences") or []}
    heads = _heads(results, "pretrained", "source")
    groups = {
        measure.title: _accuracies(results, "pretrained", "source"),
        "Cost": _COST,
        "Without fitting": [(str(scored.get("method") or "score"), _score(scores))] if scores else [],
        "Difference to best": [(head, _difference(differences, head, measure)) for head in heads]
        if differences
        else [],
        f"{measure.title}, random weights": _accuracies(results, "random", "source"),
    }
    return _by_node(document, _NODES.format(measure.best, ", in percentage points" if measure.is_share else ""), groups)


def elsewhere_table(document: Document) -> Table | None:
    """How each head does on the other source with the features of each node, and what it loses there."""
    results, measure = _by_kind(document), measure_of(document)
    heads = _heads(results, "pretrained", "shifted")
    if not heads:
        return None
    groups = {
        f"{measure.title} there": _accuracies(results, "pretrained", "shifted"),
        "Difference to here": [(head, _loss(results, head, measure)) for head in heads],
        f"{measure.title} there, random weights": _accuracies(results, "random", "shifted"),
    }
    where = document.get("test_dataset") or "the other source"
    unit = "; differences are percentage points" if measure.is_share else ""
    return _by_node(document, f"Each node on {where}, with 95\u00a0% intervals{unit}", groups)


def joined_table(document: Document) -> Table | None:
    """Whether features of several nodes side by side help."""
    found, measure = document.get("concatenations") or [], measure_of(document)
    rows = tuple(
        (
            TableCell(" +\N{NO-BREAK SPACE}".join(map(str, row["columns"]))),
            measure.cell(row.get("value"), row.get("low"), row.get("high")),
            TableCell(
                measure.difference(row.get("difference")),
                finite(row.get("difference")),
                measure.difference_interval(row.get("low_difference"), row.get("high_difference")),
            ),
            TableCell(_verdict(row)),
            TableCell(str(row["head"])),
            TableCell(str(row.get("against", ""))),
        )
        for row in found
    )
    unit = " (points)" if measure.is_share else ""
    header = ("Nodes", measure.title, f"Difference{unit}", "Does it help?", "Head", "Against")
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
        (TableCell(called(name, document), place), *(cell(node) for _, cell in columns))
        for place, (name, node) in enumerate(zip(names, nodes, strict=True))
    )
    best = (document.get("recommended") or {}).get("column")
    spans = (("", 1), *((title, len(group)) for title, group in kept.items()))
    header = ("Node", *(name for name, _ in columns))
    return Table(caption, header, rows, spans, names.index(best) if best in names else None) if rows else None


def _accuracies(results: Results, network: str, tested_on: str) -> list[Column]:
    def of(head: str) -> Callable[[Document], TableCell]:
        return lambda node: _measured(results.get((node["column"], head, network, tested_on)))

    return [(head, of(head)) for head in _heads(results, network, tested_on)]


def _measured(row: Document | None) -> TableCell:
    return measure_of(row).cell(*(row.get(name) for name in ("value", "low", "high"))) if row else TableCell(DASH)


def _score(scores: Document) -> Callable[[Document], TableCell]:
    return lambda node: TableCell(plain(scores.get(node["column"])), finite(scores.get(node["column"])))


def _difference(
    differences: Mapping[tuple[str, str], Document], head: str, measure: MeasureStyle
) -> Callable[[Document], TableCell]:
    def cell(node: Document) -> TableCell:
        row = differences.get((head, node["column"])) or {}
        bounds = measure.difference_interval(row.get("low"), row.get("high"))
        return TableCell(measure.difference(row.get("difference")), finite(row.get("difference")), bounds)

    return cell


def _loss(results: Results, head: str, measure: MeasureStyle) -> Callable[[Document], TableCell]:
    def cell(node: Document) -> TableCell:
        kinds = [results.get((node["column"], head, "pretrained", tested_on)) for tested_on in ("shifted", "source")]
        there, here = (finite((row or {}).get("value")) for row in kinds)
        change = None if there is None or here is None else there - here
        return TableCell(measure.difference(change), change)

    return cell


def _verdict(row: Document) -> str:
    low, high = finite(row.get("low_difference")), finite(row.get("high_difference"))
    if low is None or high is None:
        return DASH
    return "yes" if low > 0 else "no, it harms" if high < 0 else "no difference shown"


def depth_title(document: Document) -> str:
    """The question that the page answers."""
    network = (document.get("backbone") or {}).get("name", "the network")
    return f"Which layer of {network} transfers best to {document.get('dataset', 'the data')}?"


def depth_sections(document: Document, paint: Paint) -> list[Section]:
    """What the document has, in the order in which one reads it."""
    parts: list[tuple[str, str, Sequence[Block | None]]] = [
        ("answer", "Answer", _answer(document)),
        (
            "curves",
            f"{measure_of(document).title} over depth",
            (depth_curves(document, paint), cost_curves(document, paint)),
        ),
        ("nodes", "All nodes", (node_table(document),)),
        ("joined", "Nodes side by side", (joined_table(document),)),
        ("similarity", "Similarity of nodes", (similarity_map(document, paint),)),
        ("scores", "Transferability without fitting", (score_scatter(document, paint),)),
    ]
    sections = [Section(anchor, title, [block for block in blocks if block]) for anchor, title, blocks in parts]
    return [section for section in sections if section.blocks]


def elsewhere_section(document: Document, images: Mapping[str, str], paint: Paint) -> Section | None:
    """How the nodes do on the other source, and what the recommended one takes for what there, where that is known."""
    table = elsewhere_table(document)
    metrics = metrics_elsewhere(document)
    if table is None and not metrics:
        return None
    sentence = _elsewhere((document.get("recommended") or {}).get("elsewhere"))
    once = Prose((_ONCE,)) if sentence and metrics else None
    blocks: list[Block | None] = [Prose((sentence,)) if sentence else None, table, once, *errors(metrics, paint)]
    title = f"On {document.get('test_dataset') or 'the other source'}"
    return Section("elsewhere", title, [block for block in (*blocks, *worst(metrics, images)) if block])


def _answer(document: Document) -> list[Block]:
    best = document.get("recommended") or {}
    if not best.get("column"):
        return []
    over, measure = _over(document.get("settings") or {}), measure_of(document)
    reached = (
        f"{measure.text(best.get('value'))} {measure.word}"
        if measure.is_share
        else f"{measure.word} {measure.text(best.get('value'))}"
    )
    taken = called(best["column"], document)
    sentence = f"Take {taken} with a {best.get('head', 'linear')} head: {reached}{_in_brackets(best, over)}."
    against = _against_best(best, document)
    rule = f"Rule: {best['rule']}." if best.get("rule") else ""
    figures = (
        (measure.title, measure.text(best.get("value")), _bounds(best, over)),
        ("Operations saved", percent(best.get("saved"), 0), "by stopping the network there"),
        ("Time", f"{milliseconds(best.get('ms_per_image'))} ms", f"per image{_where_timed(document.get('timing'))}"),
        ("Width", count(best.get("width")), f"values, {amount(best.get('bytes_per_image'))} per image"),
    )
    return [
        Prose((f"{sentence} {against}".strip(),)),
        Figures(figures),
        Prose(tuple(filter(None, (_ties(best), _elsewhere(best.get("elsewhere")))))),
        Prose(tuple(filter(None, (rule, _what_of(document), _bottleneck(document), _asked(document))))),
    ]


def _where_timed(timing: Document | None) -> str:
    if not timing:
        return ""
    busy = (
        "" if is_undisturbed(timing) else f", while {percent(timing['waited'], 0)} of the time was waiting for a core"
    )
    return f" on {timing['device']}, {timing['precision']}{busy}"


def _ties(best: Document) -> str:
    same = best.get("not_told_apart")
    return f"By these folds not told apart from {best.get('best')}: {', '.join(same)}." if same else ""


def _elsewhere(there: Document | None) -> str:
    """How the recommended node does on the other source."""
    if not there:
        return ""
    same, measure = there.get("of_equal_id"), measure_of(there)
    said = measure.text(there.get("value"))
    reached = f"{said} right" if measure.name == "accuracy" else f"{measure.word} {said}"
    unseen = f", {count(same)} of them only by those that have not seen the image of equal id" if same else ""
    return (
        f"On {there['dataset']} it has {reached}{_in_brackets(there, 'over images')}; the best "
        f"node there is {there['best']} with {measure.text(there.get('best_value'))}. "
        f"{count(there.get('images'))} images were tested, each by every fold's head{unseen}; this is the mean over those heads."
    )


def _in_brackets(best: Document, over: str) -> str:
    bounds = _bounds(best, over)
    return f" (95\u00a0% interval {bounds})" if bounds else ""


def _bounds(best: Document, over: str) -> str:
    """An interval, and over what."""
    bounds = measure_of(best).interval(best.get("low"), best.get("high"))
    return f"{bounds} {over}" if bounds else ""


def _over(settings: Document) -> str:
    return "over folds and seeds" if settings.get("folds") else "over test images"


def _what_of(document: Document) -> str:
    """Why the interval of the answer is not the one of the measures further down."""
    both = (document.get("recommended") or {}).get("low") is not None and document.get("details")
    if not both or not (document.get("settings") or {}).get("folds"):
        return ""
    word, units = measure_of(document).word, "groups" if document.get("groups") else "images"
    return (
        f"The interval above says how far the {word} may move with other images, to learn from and to test on: it is "
        f"that over folds and seeds, or that over the tested {units} if it is wider. The interval under Measures says less: how "
        f"far it may move with other test {units}, for the heads of one round of folds as they are."
    )


def _against_best(best: Document, document: Document) -> str:
    saved = finite(best.get("saved"))
    cost = f"Stopping the network there saves {percent(saved, 0)} of its operations. " if saved else ""
    if best.get("best") in {None, best["column"]}:
        return f"{cost}No node did better."
    measure = measure_of(best)
    return f"{cost}The {measure.best} node, {called(best['best'], document)}, reaches {measure.text(best.get('best_value'))}."


def called(column: str, document: Document) -> str:
    """A column, and whether it is of the node that people ask for as the bottleneck."""
    return named_columns(column, _bottleneck_of(document))


def _bottleneck_of(document: Document) -> str | None:
    described = (document.get("backbone") or {}).get("description")
    return described.get("bottleneck") if isinstance(described, Mapping) else None


def _bottleneck(document: Document) -> str:
    """What the node is called that people ask for as the bottleneck."""
    node = _bottleneck_of(document)
    return f"{node} is the network's bottleneck." if node not in {None, "bottleneck"} else ""


def _images_of(document: Document) -> str:
    images, classes = count(document.get("images")), document.get("classes") or []
    if document.get("target_type") == "continuous":
        column = ((document.get("provenance") or {}).get("options") or {}).get("target")
        return f"{images} images with a number{f' ({column})' if column else ''}"
    if document.get("target_type") == "multilabel":
        return f"{images} images with {counted(len(classes), 'label')}"
    return f"{images} images of {count(len(classes))} classes"


def _groups_of(document: Document) -> str:
    groups = document.get("groups")
    return f" in {counted(groups, 'group')}, which count in intervals instead of images" if groups else ""


def _asked(document: Document) -> str:
    settings, backbone = document.get("settings") or {}, document.get("backbone") or {}
    heads = ", ".join(map(str, settings.get("heads") or []))
    kept = (document.get("damaged") or {}).get("kept")
    parts = [
        _images_of(document) + _groups_of(document),
        f"{count(len(document.get('columns') or []))} nodes of {backbone.get('name', 'the network')}"
        + (f" with weights {backbone['weights']}" if backbone.get("weights") else ""),
        f"{'heads' if ',' in heads else 'head'} {heads}" if heads else "",
        f"tested also on {document['test_dataset']}" if document.get("test_dataset") else "",
        "the same network with random weights as control" if document.get("control") else "",
        f"{count(kept)} of the images are damaged and were kept" if kept else "",
    ]
    return f"Compared: {'; '.join(filter(None, parts))}."
