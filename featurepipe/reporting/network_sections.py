"""The sections that only a comparison of several networks has: the answer, measures against cost, tables of all layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from featurepipe.reporting.blocks import (
    Figures,
    Paint,
    Prose,
    Section,
    Table,
    TableCell,
    amount,
    count,
    finite,
    measure_of,
    milliseconds,
    plain,
    with_values,
)
from featurepipe.reporting.depth_curves import cost_curves, is_main
from featurepipe.reporting.depth_sections import called

Document = Mapping[str, Any]


def networks_title(document: Document) -> str:
    """The question that the page answers."""
    return f"Which layer of {_listed([_name(one) for one in document['networks']])} transfers best to {document['dataset']}?"


def network_sections(document: Document, paint: Paint) -> list[Section]:
    """The answer, all networks against cost, the networks and all their layers."""
    found = [with_values(one) for one in document["networks"]]
    curves = cost_curves(_merged(document, found), paint)
    return [
        Section("answer", "Answer", _answer(document)),
        *([Section("cost", curves.title, [curves])] if curves else []),
        Section("networks", "Networks", [_network_table(document, found)]),
        Section("nodes", "All layers of all networks", [_layer_table(document, found)]),
    ]


def _answer(document: Document) -> list[Any]:
    best, measure = document["recommended"], measure_of(document)
    bounds = measure.interval(best.get("low"), best.get("high"))
    of = {_name(one): one for one in document["networks"]}
    named = f"{called(best['column'], of[best['backbone']])} of {best['backbone']} with a {best['head']} head"
    sentence = f"Take {named}: {measure.text(best['value'])} {measure.word}."
    other = (
        "No layer of any network did better."
        if (best["best_backbone"], best["best"]) == (best["backbone"], best["column"])
        else f"The {measure.best} layer, {called(best['best'], of[best['best_backbone']])} of {best['best_backbone']}, reaches "
        f"{measure.text(best['best_value'])}."
    )
    figures = (
        (measure.title, measure.text(best["value"]), bounds),
        ("Network", str(best["backbone"]), f"of {count(len(document['networks']))}"),
        ("Time", f"{milliseconds(best['ms_per_image'])} ms", "per image, up to that layer"),
        ("Width", count(best["width"]), f"values, {amount(best['bytes_per_image'])} per image"),
    )
    return [
        Prose((f"{sentence} {other}",)),
        Figures(figures),
        Prose(
            (
                f"Rule: {best['rule']}.",
                f"All networks were measured on the same {count(document['images'])} images and the same folds. Times are of the "
                "machine that measured, up to a layer; they compare networks only as far as that machine was undisturbed.",
            )
        ),
    ]


def _merged(document: Document, found: Sequence[Document]) -> dict[str, Any]:
    """One comparison in which each network stands as a head, by its best head on each layer, at the time that layers take."""
    results, columns = [], []
    for one in found:
        name = _name(one)
        for node in one["columns"]:
            rows = [row for row in one["results"] if row["column"] == node["column"] and is_main(row)]
            if rows:
                title = f"{name} {called(str(node['column']), one)}"
                results.append({**max(rows, key=lambda row: row["value"]), "column": title, "head": name})
                columns.append({"column": title, "ms_per_image": node.get("ms_per_image")})
    best = document["recommended"]
    own = next(one for one in found if _name(one) == best["backbone"])
    chosen = {"column": f"{best['backbone']} {called(str(best['column']), own)}", "head": best["backbone"]}
    return {"measure": measure_of(document).name, "results": results, "columns": columns, "recommended": chosen}


def _network_table(document: Document, found: Sequence[Document]) -> Table:
    measure, best = measure_of(document), document["recommended"]
    between = {row["backbone"]: row for row in document["differences"]}
    rows = []
    for one in found:
        name, own = _name(one), one["recommended"]
        other = between.get(name, {})
        bounds = measure.difference_interval(other.get("low_difference"), other.get("high_difference"))
        described = one["backbone"].get("description") or {}
        rows.append(
            (
                TableCell(name, note=""),
                TableCell(called(str(own["column"]), one)),
                measure.cell(own["value"], own.get("low"), own.get("high")),
                TableCell(milliseconds(own.get("ms_per_image")), finite(own.get("ms_per_image"))),
                TableCell(count(own.get("width")), finite(own.get("width"))),
                TableCell(count(described.get("parameters")), finite(described.get("parameters"))),
                TableCell(measure.difference(other.get("difference")), finite(other.get("difference")), bounds),
                TableCell(plain(other.get("p")), finite(other.get("p"))),
            )
        )
    unit = " (points)" if measure.is_share else ""
    header = (
        "Network",
        "Layer",
        measure.title,
        "ms per image",
        "Width",
        "Parameters",
        f"Its best to the best{unit}",
        "p",
    )
    names = [_name(one) for one in found]
    caption = (
        "The layer that each network's own comparison recommends, with 95\u00a0% intervals; then the difference of its best "
        "layer to the best of all, paired by fold"
    )
    return Table(caption, header, tuple(rows), marked=names.index(best["backbone"]))


def _is_elsewhere(row: Document) -> bool:
    """Whether a result is of the network's own weights on images of the other source."""
    return row["network"] == "pretrained" and row.get("tested_on") == "shifted"


def _layer_table(document: Document, found: Sequence[Document]) -> Table:
    measure, best = measure_of(document), document["recommended"]
    where = next((one["test_dataset"] for one in found if one.get("test_dataset")), None)
    rows, keys = [], []
    for one in found:
        nodes = {node["column"]: node for node in one["columns"]}
        there = {(row["column"], row["head"]): row for row in one["results"] if _is_elsewhere(row)}
        scores = (one.get("transferability") or {}).get("scores") or {}
        for row in one["results"]:
            if is_main(row):
                node, other = nodes[row["column"]], there.get((row["column"], row["head"]), {})
                score = scores.get(row["column"])
                besides = [measure.cell(other.get("value"), other.get("low"), other.get("high"))] if where else []
                keys.append((_name(one), row["column"], row["head"]))
                rows.append(
                    (
                        TableCell(f"{_name(one)} {called(str(row['column']), one)}"),
                        TableCell(str(row["head"])),
                        measure.cell(row["value"], row.get("low"), row.get("high")),
                        *besides,
                        TableCell(plain(score), finite(score)),
                        TableCell(milliseconds(node.get("ms_per_image")), finite(node.get("ms_per_image"))),
                        TableCell(count(node.get("width")), finite(node.get("width"))),
                    )
                )
    own = next(one for one in found if _name(one) == best["backbone"])
    wanted = (best["backbone"], called(best["column"], own), best["head"])
    elsewhere = [f"{measure.title} on {where}"] if where else []
    header = ("Layer", "Head", measure.title, *elsewhere, "LogME", "ms per image", "Width")
    marked = keys.index(wanted) if wanted in keys else None
    return Table("Every layer that was measured, with 95\u00a0% intervals", header, tuple(rows), marked=marked)


def _name(document: Document) -> str:
    return str(document["backbone"]["name"])


def _listed(names: Sequence[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
