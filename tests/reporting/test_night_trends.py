"""Lines over nights: what is said of nights without a test, equal p-values, shares of a few images."""

import re

import pytest

from featurepipe.reporting.nights import nights_report


def page_of(records, recorded, folder):
    return nights_report(recorded(records), folder / "page.html", silent=True).read_text("utf-8")


@pytest.mark.slow
def test_drift_is_told_of_all_nights_of_the_page(recorded, night_records, tmp_path):
    html = page_of(night_records(4), recorded, tmp_path)  # on the first there is nothing to compare with
    assert "Of 4 runs: no drift on 3, no comparison on 1. The least p-value was 0.5" in html


@pytest.mark.slow
def test_equal_p_values_do_not_hide_each_other(recorded, night_records, tmp_path):
    html = page_of(night_records(3), recorded, tmp_path)
    for places in ("0.75,1.75", "1.0,2.0", "1.25,2.25"):  # of two columns and the predicted classes
        assert html.count(f'["x",[{places}]]') == 2, places


def test_the_number_of_images_stands_beside_shares_of_them(recorded, night_records, tmp_path, parsed):
    records = night_records(3)
    (predict,) = (step for step in records[-1]["steps"] if step["step"] == "predict")
    predict["result"]["labels"] = {"cat": 1}
    html = page_of(records, recorded, tmp_path)
    assert "Of the 1 image of the last run with predictions: dog 0.0\u00a0%; cat 100.0\u00a0%." in html
    labels = [a["aria-label"] for a in parsed(html).all("div") if a.get("class") == "plot"]
    (images,) = (label for label in labels if label.startswith("images predicted"))
    assert re.match(r"images predicted: 1: 1 in the last of 3 runs, median 101, at most 5,000 on", images)
