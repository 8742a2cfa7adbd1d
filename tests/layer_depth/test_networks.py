"""Several networks on one page: the same images and folds, the fastest layer that is as good as the best, differences by fold."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

import featurepipe as fp
from featurepipe.errors import UsageError
from featurepipe.heads.statistics.comparison import difference_over_folds
from featurepipe.layer_depth.answers import compared, names_of
from featurepipe.layer_depth.text import _networks, text
from featurepipe.reporting.report import write_report
from featurepipe.results import Result


def document(name: str, cells: dict[str, list[float]], times: dict[str, float], **other: object) -> dict:
    """What depth returns of a network: its layers with the accuracy of each fold and the milliseconds up to them."""
    columns = [
        {
            "column": f"{node}:gap",
            "node": node,
            "width": 8,
            "bytes_per_image": 16,
            "ms_per_image": times[node],
            "saved": 0.1,
        }
        for node in cells
    ]
    results = [
        {"column": f"{node}:gap", "head": "logistic", "network": "pretrained", "tested_on": "source", "cells": found,
         "accuracy": float(np.mean(found)), "low": None, "high": None, "se": 0.01}
        for node, found in cells.items()
    ]  # fmt: skip
    top = max(results, key=lambda row: row["accuracy"])
    best = {
        **columns[0],
        **top,
        "best": top["column"],
        "best_head": "logistic",
        "best_accuracy": top["accuracy"],
        "rule": "r",
    }
    shared = {"dataset": "d", "images": 60, "classes": ["a", "b"], "target_type": "multiclass", "measure": "accuracy"}
    return {
        "kind": "depth", "version": 1, **shared, "protocol": "3-fold", "settings": {"folds": 3}, "columns": columns,
        "results": results, "recommended": best, "backbone": {"name": name, "description": {"bottleneck": "end"}},
        "labels": None, "space": {}, "details": {}, "details_shifted": None, "provenance": {}, **other,
    }  # fmt: skip


SLOW = document("slow", {"low": [0.5, 0.6, 0.7], "end": [0.9, 0.8, 0.9]}, {"low": 3.0, "end": 9.0})
FAST = document("fast", {"low": [0.5, 0.5, 0.5], "end": [0.87, 0.83, 0.89]}, {"low": 1.0, "end": 2.0})
POOR = document("poor", {"end": [0.5, 0.4, 0.6]}, {"end": 0.1})
FOUND = {one["backbone"]["name"]: one for one in (SLOW, FAST, POOR)}


def test_the_fastest_layer_as_good_as_the_best_of_all_is_recommended() -> None:
    found = compared(list(FOUND), FOUND.__getitem__)
    best = found["recommended"]
    assert (best["backbone"], best["column"], best["ms_per_image"]) == (
        "fast",
        "end:gap",
        2.0,
    )  # 0.8633 >= 0.8667 - 0.01
    assert (best["best_backbone"], best["best"], best["best_accuracy"]) == ("slow", "end:gap", np.mean([0.9, 0.8, 0.9]))
    assert [row["backbone"] for row in found["differences"]] == ["fast", "poor"]
    expected = difference_over_folds([0.87, 0.83, 0.89], [0.9, 0.8, 0.9], 0.5)
    assert (found["differences"][0]["difference"], found["differences"][0]["p"]) == (expected.value, expected.p)
    assert found["backbone"]["name"] == "fast"


def test_networks_that_saw_other_images_are_refused() -> None:
    other = FOUND | {"fast": FAST | {"images": 61}}
    with pytest.raises(UsageError, match="fast and slow were not measured on the same images: images differ"):
        compared(list(other), other.__getitem__)
    with pytest.raises(UsageError, match="resnet18 is named twice"):
        names_of(["resnet18", "vgg11", "resnet18"])
    with pytest.raises(UsageError, match="is for one network"):
        fp.depth("nowhere", backbone=["lenet5", "resnet18"], weights="weights.pt")
    with pytest.raises(UsageError, match=r"blocks\.2.*lenet5|lenet5.*blocks\.2"):
        fp.depth("nowhere", backbone=["efficientnet_lite0", "lenet5"], nodes=["blocks.2", "bottleneck"], weights="none")
    assert names_of(()) == names_of(None) == [None]


def test_text_and_page_name_each_network_and_what_is_the_bottleneck(tmp_path: Path) -> None:
    found = compared(list(FOUND), FOUND.__getitem__)
    page = write_report(found, tmp_path / "page.html", silent=True).read_text(encoding="utf-8")
    assert "Which layer of slow, fast or poor transfers best to d?" in page
    assert "Take bottleneck (end:gap) of fast with a logistic head: 86.3\u00a0% accuracy." in page
    assert "The most accurate layer, bottleneck (end:gap) of slow, reaches 86.7\u00a0%." in page
    for said in (
        "slow: 86.7\u00a0% at most, at 9.00 ms per image.",
        "fast: 86.3\u00a0% at most, at 2.00 ms per image.",
    ):
        assert said in page
    assert '<strong class="long">a_<wbr>long_<wbr>network</strong>' in networks_page("a_long_network", tmp_path)
    assert '<strong class="long">a&lt;b&gt;_<wbr>long_<wbr>network</strong>' in networks_page(
        "a<b>_long_network", tmp_path
    )
    rows = re.findall(r'<span class="name">(.*?)</span>', page)
    assert {"slow", "fast", "poor", "slow low:gap", "fast bottleneck (end:gap)"} <= set(rows)
    assert page.count('<tr class="marked">') == 2  # of the networks, and of all layers
    told = _networks(found)
    assert told.startswith("recommended of 3 networks: bottleneck (end:gap) of fast with logistic")
    assert "; the most accurate is bottleneck (end:gap) of slow, 0.8" in told
    assert all(f"Network {name}" in page for name in FOUND)  # where each one's space, weights and runs are


def test_the_curve_of_several_networks_is_over_the_time_of_an_image() -> None:
    axes = Result(compared(list(FOUND), FOUND.__getitem__), "depth").plot("curve", ax=Figure().add_subplot())
    drawn = {bars.get_label(): bars.lines[0] for bars in axes.containers}
    assert list(drawn) == [f"{name}, logistic" for name in FOUND]
    for name, line in zip(FOUND, drawn.values(), strict=True):
        times = {column["column"]: column["ms_per_image"] for column in FOUND[name]["columns"]}
        expected = sorted((times[row["column"]], row["accuracy"]) for row in FOUND[name]["results"])
        np.testing.assert_allclose(line.get_xydata(), expected)
    (marked,) = [line for line in axes.lines if str(line.get_label()).startswith("recommended")]
    assert marked.get_label() == "recommended: bottleneck (end:gap) of fast"
    assert list(marked.get_xdata()) == [2.0, 2.0]


def test_the_page_has_every_layer_on_the_other_source_and_its_logme(tmp_path: Path) -> None:
    def tested_elsewhere(one: dict[str, Any]) -> dict[str, Any]:
        shifted = [
            {**row, "tested_on": "shifted", "accuracy": 0.4321, "low": 0.4, "high": 0.5} for row in one["results"]
        ]
        scores = {column["column"]: 1.357 for column in one["columns"]}
        return {
            **one,
            "test_dataset": "away",
            "results": [*one["results"], *shifted],
            "transferability": {"scores": scores},
        }

    found = compared(list(FOUND), {name: tested_elsewhere(one) for name, one in FOUND.items()}.__getitem__)
    page = write_report(found, tmp_path / "page.html", silent=True).read_text(encoding="utf-8")
    assert "Accuracy on away" in page
    assert page.count("43.2\u00a0%") >= 5  # a row for each layer
    assert "1.357" in page
    plain = write_report(compared(list(FOUND), FOUND.__getitem__), tmp_path / "plain.html", silent=True)
    assert "Accuracy on" not in plain.read_text(encoding="utf-8")


def networks_page(name: str, folder: Path) -> str:
    """The page of two networks, the recommended one of this name."""
    other = FAST | {"backbone": FAST["backbone"] | {"name": name}}
    found = compared([name, "slow"], {name: other, "slow": SLOW}.__getitem__)
    return write_report(found, folder / "other.html", silent=True).read_text(encoding="utf-8")


@pytest.mark.slow
def test_several_networks_of_one_store_are_compared_and_the_recommended_is_kept_last(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    images = {f"{k}.png": random.integers(0, 80 + 90 * (k % 2), (32, 32), np.uint8) for k in range(40)}
    labels = {name: "ab"[int(name[:-4]) % 2] for name in images}
    given = {
        "dataset": "d",
        "weights": "none",
        "folds": 2,
        "seeds": 1,
        "max_width": 100,
        "labels": labels,
        "silent": True,
    }
    backbones = ["lenet5", "efficientnet_lite0"]
    nodes = "auto"
    found = fp.depth(images, tmp_path / "s", backbone=backbones, nodes=nodes, report=tmp_path / "page.html", **given)
    assert [one["backbone"]["name"] for one in found["networks"]] == backbones
    alone = fp.depth(images, tmp_path / "s", backbone="lenet5", nodes=nodes, **given)
    assert found["networks"][0]["results"] == alone["results"]
    assert "recommended of 2 networks" in text(json.loads(json.dumps(found)))
    again = fp.depth(images, tmp_path / "s", backbone=backbones, nodes=nodes, **given)
    (*_, last) = fp.FeatureStore(tmp_path / "s").depth_documents("d")
    assert last["backbone"]["name"] == again["recommended"]["backbone"]
    assert (tmp_path / "page.html").stat().st_size > 1_000_000
    plan = fp.depth(images, tmp_path / "s", backbone=backbones, nodes=nodes, dry_run=True, **given)
    assert [one["backbone"] for one in plan["networks"]] == backbones
