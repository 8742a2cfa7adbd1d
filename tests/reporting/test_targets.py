"""Pages of several labels and of numbers: what was measured is on them, with the mistakes and the plots."""

import numpy as np
import pytest
from sklearn.metrics import mean_absolute_error, r2_score

from featurepipe.heads.statistics.multilabel import average_precisions, label_table
from featurepipe.heads.statistics.regression import number_table
from featurepipe.reporting.blocks import Exhibit, Gallery, Paint, Table, measure_of, with_values
from featurepipe.reporting.depth_curves import depth_curves
from featurepipe.reporting.head_sections import bundle_sections, details, mistakes
from featurepipe.reporting.report import write_report
from featurepipe.reporting.screening_sections import number_plots, precision_curves

COUNT = 80
NAMES = ["<mass>", "nodule", "rare"]


def labels():
    rng = np.random.default_rng(0)
    truth = (rng.random((COUNT, 3)) < [0.5, 0.3, 0.0]).astype(float)
    truth[:5, 1] = np.nan
    likely = np.clip(0.5 * np.nan_to_num(truth, nan=0.5) + rng.random(truth.shape) * 0.6, 0, 1)
    ids = [f"{row}.png" for row in range(COUNT)]
    return likely, truth, label_table(likely, truth, NAMES, thresholds=0.5, ids=ids, bootstrap=100)


def numbers():
    rng = np.random.default_rng(1)
    truth = rng.normal(50, 10, COUNT)
    guesses = truth + rng.normal(0, 3, COUNT)
    return (
        guesses,
        truth,
        number_table(guesses, truth, half_width=5.0, ids=[f"{n}.png" for n in range(COUNT)], bootstrap=100),
    )


def document(metrics, **bundle):
    evaluation = {"dataset": "zoo", "scope": "split test", "metrics": metrics, "leakage": {"trained_on": {"images": 0}}}
    about = {"family": "logistic", "columns": ["a:gap"], "seen": 240, **bundle}
    return {"kind": "bundle", "version": 1, "bundle": about, "evaluation": evaluation, "provenance": {"when": "today"}}


def cells(table):
    return [[cell.text for cell in row] for row in table.rows]


def test_the_page_of_labels_has_each_with_its_measures_worst_first(tmp_path):
    likely, truth, metrics = labels()
    section = details(metrics, "a:gap", "logistic", Paint())
    (measures, table) = (block for block in section.blocks if isinstance(block, Table))
    own = average_precisions(likely, truth)
    order = [NAMES[place] for place in np.argsort(own[:2])]
    assert [row[0] for row in cells(table)] == [*order, "rare"]
    row = dict(zip(table.header, cells(table)[order.index("nodule")], strict=True))
    assert row["AP"] == f"{100 * own[1]:.1f}\u00a0%"
    assert (row["With"], row["Unknown"]) == (str(int(np.nansum(truth[:, 1]))), "5")
    assert cells(measures)[0][1] == f"{100 * own[:2].mean():.1f}\u00a0%"
    page = write_report(document(metrics), tmp_path / "page.html", silent=True).read_text(encoding="utf-8")
    assert f"mean average precision is {100 * own[:2].mean():.1f}" in page
    assert "<mass>" not in page
    assert "&lt;mass&gt;" in page


def test_the_curves_are_of_the_labels_that_are_measured():
    _, _, metrics = labels()
    exhibit = precision_curves(metrics, Paint())
    assert len(exhibit.keys) == len(metrics["curves"]) == 2
    for curve, row in zip(metrics["curves"], exhibit.table.rows, strict=True):
        best = max(p for r, p in zip(curve["recall"], curve["precision"], strict=True) if r >= 0.5)
        assert row[2].order == best
        assert curve["recall"][-1] == 1
        assert curve["recall"] == sorted(curve["recall"])
    assert precision_curves({"per_label": []}, Paint()) is None


def test_mistakes_of_labels_say_which_was_missed_or_is_not_there():
    likely, truth, metrics = labels()
    wrong = ((likely > 0.5) != (truth == 1)) & ~np.isnan(truth)
    assert metrics["mistakes"]["count"] == wrong.sum()
    shown = metrics["mistakes"]["most_confident"]
    sure = [one["probability"] for one in shown]
    assert sure == sorted(sure, reverse=True)
    for one in shown:
        row, place = int(one["id"].split(".")[0]), NAMES.index(one["label"])
        assert wrong[row, place]
        assert one["present"] == (truth[row, place] == 1) == (not one["predicted"])
        assert one["probability"] == pytest.approx(max(likely[row, place], 1 - likely[row, place]))
    _, gallery = mistakes(metrics, {}).blocks
    assert isinstance(gallery, Gallery)
    assert len(gallery.pictures) == len(shown)
    assert {lines.lines[0].split(" ")[0] for lines in gallery.pictures} <= {"has"}


def test_the_page_of_a_number_has_plots_coverage_and_the_largest_errors(tmp_path):
    guesses, truth, metrics = numbers()
    (answer, *_) = bundle_sections(document(metrics))
    prose, figures = answer.blocks
    assert (
        f"off by {mean_absolute_error(truth, guesses):.3f} on average (80 images, of split test)" in prose.paragraphs[0]
    )
    shown = {name: value for name, value, _ in figures.items}
    assert shown["R2"] == f"{r2_score(truth, guesses):.3f}"
    inside = np.mean(np.abs(guesses - truth) <= 5)
    assert shown["True numbers in the interval"] == f"{100 * inside:.1f}\u00a0%"
    (exhibit,) = number_plots(metrics, Paint())
    assert isinstance(exhibit, Exhibit)
    assert [panel.title for panel in exhibit.panels] == ["Predicted against true", "Residuals"]
    assert "limits of the prediction interval" in [key.label for key in exhibit.keys]
    first = mistakes(metrics, {}).blocks[1].pictures[0]
    worst = int(np.argmax(np.abs(guesses - truth)))
    assert (first.name, first.lines) == (f"{worst}.png", (f"is {truth[worst]:.3f}", f"predicted {guesses[worst]:.3f}"))
    page = write_report(document(metrics), tmp_path / "page.html", silent=True).read_text(encoding="utf-8")
    assert "Largest errors" in page


def test_a_comparison_is_drawn_by_what_it_measures():
    rows = [
        {"column": name, "head": "ridge", "network": "pretrained", "tested_on": "source", "r2": value, "low": value - 0.2,
         "high": value + 0.01, "se": 0.1, "cells": [value], "params": [], "train_r2": 0.99, "rmse": 2.5, "seconds": 1.0}
        for name, value in (("a:gap", -0.5), ("b:gap", 0.9))
    ]  # fmt: skip
    document = {
        "measure": "r2",
        "dataset": "zoo",
        "results": rows,
        "columns": [{"column": "a:gap"}, {"column": "b:gap"}],
    }
    shown = with_values(document)
    assert measure_of(shown["results"][0]).word == "R2"
    assert "r2" in rows[0]  # the document itself is left alone
    exhibit = depth_curves(shown, Paint())
    assert exhibit.title == "R2 over depth"
    assert "at most 0.900 at b:gap" in exhibit.summary
    table = exhibit.table
    assert dict(zip(table.header, cells(table)[0], strict=True))["R2"] == "\N{MINUS SIGN}0.500"
    assert dict(zip(table.header, cells(table)[0], strict=True))["RMSE"] == "2.500"


def test_leaks_of_groups_are_on_the_page(tmp_path):
    found = document(numbers()[2])
    found["evaluation"]["leakage"] |= {
        "trained_groups": {"images": 80, "share": 0.25, "groups": 4, "accuracy_without": 0.5},
        "groups_across_splits": {"groups": 3, "examples": []},
    }
    page = write_report(found, tmp_path / "page.html", silent=True).read_text(encoding="utf-8")
    assert (
        "80 of these images (25.0\u00a0%) are of 4 groups of which other images were trained on; without them" in page
    )
    assert "3 groups have images in more than one split." in page
    assert "None of these images was trained on" not in page
