"""The page of a bundle of two classes: rates, curves with bands, reliability."""

import json
import re

import numpy as np
import pytest

from featurepipe.heads.statistics.screening import screening_table
from featurepipe.reporting.report import write_report

TITLES = {
    "sensitivity": "Sensitivity (recall)",
    "specificity": "Specificity",
    "ppv": "PPV (precision)",
    "npv": "NPV",
    "auc": "Area under the ROC curve",
    "average_precision": "Average precision",
}


@pytest.fixture
def found():
    """What an evaluation says of a class that is looked for."""
    rng = np.random.default_rng(0)
    likely = rng.random(500)
    positive = rng.random(500) < likely
    table = screening_table(likely, positive, likely >= 0.3, threshold=0.3)
    return json.loads(json.dumps({"positive": "sick", "negative": "healthy", "chosen": True, **table}))


@pytest.fixture
def page(bundle_document, tmp_path, parsed):
    """Makes the page of a bundle with such an evaluation."""

    def page_(found):
        bundle_document["evaluation"]["metrics"]["screening"] = found
        html = write_report(bundle_document, tmp_path / "page.html", silent=True).read_text("utf-8")
        parsed(html)  # whose tags nest
        return html

    return page_


def percent(share):
    return f"{100 * share:.1f}\u00a0%"


def test_rates_curves_and_reliability_are_on_the_page(found, page, parsed):
    html = page(found)
    assert '<section id="screening"' in html
    assert "Looking for sick" in parsed(html).texts["h2"]
    assert "An image is called sick from a probability of 0.300 on: the threshold that was chosen on validation" in html
    assert f"{found['true_positives']} are found and {found['false_negatives']} missed" in html
    rows = {" ".join(row[0].split()): [" ".join(cell.split()) for cell in row] for row in parsed(html).cells}
    for name, title in TITLES.items():
        one = found[name]
        limits = f"{100 * one['low']:.1f} to {percent(one['high'])}".replace("\u00a0", " ")
        assert rows[title][1:3] == [percent(one["value"]).replace("\u00a0", " "), limits]
    assert "Can the probabilities be relied on?" in html
    for one in found["reliability"]:
        assert any(percent(one["observed"]) in cell for row in parsed(html).cells for cell in row)


def test_plots_hold_bands_and_the_threshold_and_are_said_in_words(found, page, parsed):
    html = page(found)
    assert html.count('"name":"VArea"') == 2
    assert len(re.findall(r'"marker":\{"type":"value","value":"diamond"\}', html)) == 2
    labels = [a["aria-label"] for a in parsed(html).all("div") if a.get("class") == "plot"]
    assert any(label.startswith("ROC curve: 0.0\u00a0% at 0.0\u00a0%, ") for label in labels)
    assert any(label.startswith("Precision over recall: 100.0\u00a0% at 0.0\u00a0%, ") for label in labels)


@pytest.mark.parametrize("lacking", ["roc", "precision_recall", "reliability", "auc"])
def test_what_is_missing_is_left_out(found, page, lacking):
    del found[lacking]
    assert "Looking for sick" in page(found)


def test_one_side_alone_has_neither_curves_nor_areas(found, page):
    likely = np.linspace(0, 1, 50)
    table = screening_table(likely, np.zeros(50, bool), likely >= 0.3, threshold=0.3)
    html = page({"positive": "sick", "chosen": False, **table})
    assert "no image is positive" in html
    assert "no threshold was chosen" in html
    assert "ROC curve" not in html


def test_other_bundles_have_no_such_section(bundle_document, tmp_path):
    html = write_report(bundle_document, tmp_path / "page.html", silent=True).read_text("utf-8")
    assert 'id="screening"' not in html
