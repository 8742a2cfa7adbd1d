"""From pictures to a recommended route: the whole command, in Python and on the command line."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import featurepipe as fp
from featurepipe.backbones import load_backbone
from featurepipe.cli import main
from featurepipe.errors import DiskFull, UsageError
from featurepipe.execution.executor import Worker
from featurepipe.execution.local import LocalExecutor
from featurepipe.features import session
from featurepipe.layer_depth.journal import Journal
from featurepipe.layer_depth.measure import Series, Timing
from featurepipe.layer_depth.phases import fit_seconds
from featurepipe.layer_depth.probes import Cell
from featurepipe.prediction.own_classes import LabelsOfClasses
from featurepipe.progress import Lines, spoken
from featurepipe.reporting.blocks import with_values
from featurepipe.reporting.report import write_report
from featurepipe.reporting.route_sections import _answer, _chosen, _table
from featurepipe.store import FeatureStore
from featurepipe.transfer_routes import answers, measure, routes, similarity, trials
from featurepipe.transfer_routes.answers import plan_text, text
from featurepipe.transfer_routes.options import RoutesOptions
from featurepipe.transfer_routes.similarity import layer_distances
from featurepipe.transfer_routes.study import DrawSize, _ranked, labels_meant

NETWORK: dict[str, Any] = {"backbone": "lenet5", "weights": "none", "cuts": "s2", "nodes": ["s4:gap", "bottleneck"]}
TAKEN = ("bottleneck", "node", "layers", "tail from s2", "scratch")
"""The routes from random weights without class names."""
FAST: dict[str, Any] = {"sizes": (5, "all"), "seeds": 2, "epochs": 2, "rate": 3e-3, "silent": True}


@pytest.fixture(scope="module", autouse=True)
def quick_timing() -> Iterator[None]:
    """Timing each node takes a second or more and is tested with the backbones; so are all shares, with the heads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "SHARES", (0.1, 0.5))
        patch.setattr(
            Timing,
            "measure",
            lambda timing: {"milliseconds": {n: 1.0 + k for k, n in enumerate(timing.nodes)}, "waited": 0.0},
        )
        yield


def draw(folder: Path, *, start: int = 0, count: int = 200, invert: bool = False) -> Path:
    """Digits of scikit-learn in folders of their classes, and a table of what else is known of them."""
    found, lines = load_digits(), ["id,label,value,tags,writer"]
    for number in range(start, start + count):
        digit = int(found.target[number])
        path = folder / "piles" / str(digit) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = (found.images[number] * 15).astype(np.uint8)
        Image.fromarray(255 - pixels if invert else pixels).resize((32, 32)).save(path)
        tags = "|".join(["odd"] * (digit % 2) + ["large"] * int(digit > 4)) or "[]"
        lines.append(f"{digit}/{number}.png,{digit},{digit * 2.5},{tags},w{number // 5}")
    (folder / "table.csv").write_text("\n".join(lines))
    return folder / "piles"


@pytest.fixture(scope="module")
def piles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def answer(piles: Path) -> dict[str, Any]:
    return fp.routes(piles, piles.parent / "store", dataset="digits", **NETWORK, **FAST)


def test_every_route_is_measured_at_every_size_on_the_same_images(answer: dict[str, Any]) -> None:
    found = {(row["route"], row["size"]): row for row in answer["results"]}
    assert set(found) == {(route, size) for route in TAKEN for size in (5, "all")}
    assert all(len(row["cells"]) == 2 and 0 < row["accuracy"] < 1 and row["seconds"] > 0 for row in found.values())
    assert found["bottleneck", "all"]["accuracy"] > found["bottleneck", 5]["accuracy"] > 0.3
    assert answer["counts"]["test"] + answer["counts"]["train"] == 200
    assert found["node", "all"]["params"][0]["node"] in ("s4:gap", "f6.1:gap")
    assert [row["mix"] for row in found["tail from s2", "all"]["params"]]  # what came of the tuned weights is said
    why = {one["route"]: one["why"] for one in answer["not_tried"]}
    assert list(why) == ["full", "as-it-is"]
    assert "no class names of its own" in why["as-it-is"]
    assert "weights are random" in why["full"]


def test_the_recommended_route_is_the_cheapest_within_one_standard_error(answer: dict[str, Any]) -> None:
    rows = {row["route"]: row for row in answer["results"] if row["size"] == "all"}
    best = max(rows.values(), key=lambda row: row["accuracy"])
    near = [row for row in rows.values() if row["accuracy"] >= best["accuracy"] - best["se"]]
    chosen = answer["recommended"]
    assert chosen["best"] == best["route"]
    longest = answers.no_dearer(min(row["seconds"] for row in near))
    alike = [row["route"] for row in near if row["seconds"] <= longest]
    assert chosen["route"] == next(name for name in TAKEN if name in alike)
    assert {chosen["route"], *chosen["same_cost"]} == set(alike)
    assert [one["size"]["size"] for one in chosen["by_size"]] == [5, "all"]
    apart = {(row["size"], row["a"]): row["difference"] for row in answer["differences"]}
    for (size, route), value in apart.items():
        pair = {row["route"]: row["accuracy"] for row in answer["results"] if row["size"] == size}
        assert value == pytest.approx(pair[route] - max(pair.values()))


def test_a_second_call_measures_nothing_and_says_the_same(
    answer: dict[str, Any], piles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_MEASURES", {})  # any measurement fails
    again = fp.routes(piles, piles.parent / "store", dataset="digits", **NETWORK, **FAST)
    assert again["results"] == answer["results"]
    held = fp.routes(piles.parent / "store", routes="bottleneck", nodes=NETWORK["nodes"], **FAST)
    assert held["results"] == [row for row in answer["results"] if row["route"] == "bottleneck"]


def test_a_budget_measures_what_tells_most_first_and_names_the_rest(answer: dict[str, Any], piles: Path) -> None:
    said = r"a budget of 1e-06 s is too short for any of the \d+ measurements: the shortest, .*, takes about [\d.]+ s by itself"
    with pytest.raises(UsageError, match=said):
        fp.routes(piles, piles.parent / "other", dataset="digits", budget=1e-6, **NETWORK, **FAST)
    del answer
    some = fp.routes(piles, piles.parent / "store", dataset="digits", budget=1e-6, **NETWORK, **{**FAST, "seeds": 3})
    rest = {(one["route"], one["size"]): one for one in some["not_tried"] if "size" in one}
    assert len(rest) == 10
    assert all(one["draws"] == 1 and one["seconds"] > 0 for one in rest.values())
    assert {len(row["cells"]) for row in some["results"]} == {2}  # what was measured before


def test_the_command_prints_what_the_function_returns(
    answer: dict[str, Any], piles: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "routes",
        str(piles),
        "--store",
        str(piles.parent / "store"),
        "--dataset",
        "digits",
        "--backbone",
        "lenet5",
    ]
    words += ["--weights", "none", "--cuts", "s2", "--node", "s4:gap", "--node", "bottleneck", "--sizes", "5,all"]
    words += ["--seeds", "2", "--epochs", "2", "--rate", "3e-3", "--quiet"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"] == answer["results"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert printed.split("\n\n")[:-1] == text(answer).split("\n\n")[:-1]
    assert "recommended with all (16 a class)" in printed
    assert "no result: as-it-is" in printed


def test_the_images_of_a_file_of_ids_are_held_out(
    answer: dict[str, Any], piles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del answer  # whose store is used
    kept = (piles.parent / "table.csv").read_text().splitlines()[1::7]
    held_out = tmp_path / "held-out.csv"
    held_out.write_text("\n".join(["id,split", *(f"{line.split(',')[0]},test" for line in kept)]))
    words = ["routes", str(piles.parent / "store"), "--dataset", "digits", "--routes", "bottleneck", "--sizes", "all"]
    words += ["--node", "s4:gap", "--node", "bottleneck", "--seeds", "1", "--quiet", "--json"]
    assert main([*words, "--labels", str(held_out), "--split-column", "split"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["counts"]["test"], found["counts"]["train"]) == (len(kept), 200 - len(kept))
    assert (len(found["classes"]), found["results"][0]["accuracy"] > 0.3) == (10, True)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "measure_name"), [({"target": "value"}, "r2"), ({"multilabel": "tags"}, "map")])
def test_numbers_and_several_labels_take_every_route_but_the_network_as_it_is(
    piles: Path, kind: dict[str, str], measure_name: str, answer: dict[str, Any]
) -> None:
    del answer  # whose store is used
    found = fp.routes(
        piles, piles.parent / "store", dataset="digits", labels=piles.parent / "table.csv", group="writer", **kind,
        **NETWORK, **{**FAST, "seeds": 1, "sizes": ("all",)},
    )  # fmt: skip
    values = {row["route"]: row[measure_name] for row in found["results"]}
    assert set(values) == set(TAKEN)
    assert min(values.values()) > (0.3 if measure_name == "map" else -1)
    assert "exclude one another" in next(one["why"] for one in found["not_tried"] if one["route"] == "as-it-is")
    per = {"r2": "tenth of the numbers", "map": "label"}[measure_name]
    assert found["sizes"][0]["text"].endswith(f" a {per})")


def test_draws_have_as_many_of_each_class_in_whole_groups_and_hold_smaller_ones(
    piles: Path, answer: dict[str, Any]
) -> None:
    del answer
    view = FeatureStore(piles.parent / "store").features("digits", node="s4:gap")
    codes, rows = view.codes(view.classes), np.arange(len(view))
    small, large = (_ranked(view, codes, rows, seed=3, per_class=size) for size in (5, 10))
    assert np.bincount(codes[small]).tolist() == [5] * 10
    assert set(small) < set(large)
    other = _ranked(view, codes, rows, seed=4, per_class=5)
    assert set(other) != set(small)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"routes": "tial"}, "unknown route 'tial'; nearest: tail"),
        ({"sizes": (1,)}, "at least 2"),
        ({"sizes": "5,many"}, "images per class"),
        ({"budget": "soon"}, "no duration"),
        ({"cuts": "c99"}, "unknown node 'c99'"),
        ({"cuts": "f6.1"}, "cuts='f6.1' lies at or above the bottleneck"),
        ({"routes": "as-it-is"}, "the route as-it-is cannot be taken"),
        ({"rate": -1.0}, "rate"),
    ],
)
def test_what_cannot_be_done_is_said(piles: Path, answer: dict[str, Any], given: dict[str, Any], said: str) -> None:
    del answer
    with pytest.raises(UsageError, match=said):
        fp.routes(piles, piles.parent / "store", dataset="digits", **{**NETWORK, **FAST, **given})


def test_another_source_of_other_classes_is_refused(piles: Path, tmp_path: Path, answer: dict[str, Any]) -> None:
    del answer
    draw(tmp_path, start=300, count=5)
    for folder in (tmp_path / "piles").iterdir():
        folder.rename(folder.with_name(f"x{folder.name}"))
    with pytest.raises(UsageError, match="is of a class of digits"):
        fp.routes(piles, piles.parent / "store", dataset="digits", test_source=tmp_path / "piles", **NETWORK, **FAST)


@pytest.mark.slow
def test_another_source_is_tested_by_every_route(piles: Path, tmp_path: Path, answer: dict[str, Any]) -> None:
    del answer
    other = draw(tmp_path / "inverted", start=300, count=60, invert=True)
    found = fp.routes(
        piles, piles.parent / "store", dataset="digits", test_source=other, **NETWORK, **{**FAST, "sizes": ("all",), "seeds": 1},
    )  # fmt: skip
    there = {row["route"]: row["accuracy"] for row in found["results"] if row["tested_on"] == "shifted"}
    assert set(there) == set(TAKEN)
    assert found["recommended"]["elsewhere"]["accuracy"] == there[found["recommended"]["route"]]
    assert found["counts"]["shifted"] == 60


def test_of_many_nodes_the_page_names_the_one_of_which_most_values_were_kept() -> None:
    kept = {f"blocks.{place}:avg4x4": place for place in range(15)} | {"flatten:gap": 1142}
    params = [{"share": 0.02, "values": 1247, "of": 30208, "kept": kept, "C": 1e-4}, {"C": 1.0, "ended": "early"}]
    assert _chosen(params) == "share 0.02, values 1247, of 30208, kept most at flatten:gap (1,142), C 0.0001 or C 1"


def test_too_few_images_to_choose_by_are_named(tmp_path: Path) -> None:
    folder = draw(tmp_path, count=12)
    with pytest.raises(UsageError, match=r"give more images$"):  # no size is larger than all
        fp.routes(folder, tmp_path / "store", **NETWORK, **FAST)


def test_the_page_says_what_was_found(answer: dict[str, Any], tmp_path: Path) -> None:
    apart = {
        "distance": 0.4,
        "noise": 0.8,
        "relative": 0.5,
        "layers": {"a": 0.3, "b": 0.5},
        "noise_layers": {"a": 0.9, "b": 0.7},
    }
    alike = {**apart, "images": 9, "confidence": 0.25, "method": "of <layers>", "different": 0.5}
    page = write_report({**answer, "similarity": alike}, tmp_path / "page.html", silent=True).read_text()
    best = answer["recommended"]
    assert f"With all (16 a class) take {best['route']}" in page
    assert "hard: linear heads on several layers" in page  # what the lecture says of few and different images
    assert "of &lt;layers&gt;" in page
    assert "has no class names of its own" in page
    without = write_report(answer, tmp_path / "page.html", silent=True).read_text()
    assert "the weights are random: the network was trained on nothing" in without


def test_own_classes_that_no_label_names_are_refused_before_images_are_computed(piles: Path, tmp_path: Path) -> None:
    said = r"as-it-is cannot be taken: none of the labels \(0, 1, 2 and 7 more\) is the name of a class .* mapping='FILE\.csv'"
    with pytest.raises(UsageError, match=said):
        fp.routes(piles, tmp_path / "store", backbone="efficientnet_lite0", routes="as-it-is,bottleneck", silent=True)
    assert not (tmp_path / "store").exists()


def test_tables_say_on_how_many_draws_a_difference_to_the_best_rests() -> None:
    gap = {"difference": -0.2899, "b": "full", "draws": 1}
    rows = [
        {"route": "node", "kind": "node", "cells": [0.5, 0.7318], "value": 0.6159, "seconds_fit": 1.0},
        {"route": "full", "kind": "full", "cells": [0.8406], "value": 0.8406, "seconds_fit": 2.0},
        {"route": "as-it-is", "kind": "as-it-is", "cells": [0.3, 0.3], "value": 0.3, "seconds_fit": 0.0},
    ]
    more = {
        "low": None,
        "high": None,
        "seconds": 3.0,
        "memory": None,
        "size": 5,
        "tested_on": "source",
        "accuracy": 0.0,
    }
    size = {"size": 5, "text": "5 a class", "images": 15, "per_class": 5.0}
    apart = [
        {**gap, "size": 5, "a": "node", "low": None, "high": None},
        {"size": 5, "a": "as-it-is", "b": "full", "difference": -0.5406, "draws": 1, "low": None, "high": None},
    ]
    found = {
        "results": [{**more, **row, "accuracy": row["value"]} for row in rows],
        "differences": apart, "sizes": [size], "test_dataset": None, "measure": "accuracy",
    }  # fmt: skip
    lines = answers._table_text(found).splitlines()
    assert lines[1].split() == ["route", "accuracy", "draws", "to", "the", "best", "time", "memory"]
    node, full, own = (next(line for line in lines if line.startswith(name)) for name in ("node", "full", "as-it-is"))
    assert node.split()[1:7] == ["0.6159", "2", "-0.2899", "(on", "1", "draw)"]
    assert full.split()[1:3] == ["0.8406", "1"]
    assert own.split()[1:4] == ["0.3000", "any", "-0.5406"]
    assert "(on" not in own  # the columns differ by as much
    assert "on the draws that both have" in lines[-1]
    table = _table(found, size)
    assert table is not None
    assert table.header[1:5] == ("here", "draws", "difference to best", "shared draws")
    assert [[cell.text for cell in row][2:5:2] for row in table.rows] == [["2", "1"], ["1", "\u2013"], ["any", "1"]]


def test_a_measurement_that_takes_far_longer_than_expected_is_named() -> None:
    said = measure.overrun_text("layers, all", 340.0, 39.0)  # type: ignore[arg-type]
    assert said.startswith("layers, all took ")
    assert "where 39" in said
    assert measure.overrun_text("layers, all", 70.0, 39.0) == ""  # type: ignore[arg-type]
    assert measure.overrun_text("layers, all", 3.0, 1.0) == ""  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def settled(piles: Path, answer: dict[str, Any]) -> tuple[trials.RoutesContext, list[trials.RouteTrial]]:
    """What all trials have in common, and the trials."""
    asked: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routes, "measure_routes", lambda context, trials, *_, **__: asked.append((context, trials)) or [])
        fp.routes(piles, piles.parent / "store", dataset="digits", **NETWORK, **FAST)
    del answer
    return asked[0]


ESTIMATED = {"bottleneck": 10.0, "node": 20.0, "layers": 40.0, "tail": 60.0, "scratch": 100.0}
"""Seconds of a draw of all images; of five of a class a tenth."""


@pytest.fixture
def outlook(settled: Any, monkeypatch: pytest.MonkeyPatch) -> measure.TrialTimes:
    monkeypatch.setattr(
        measure.TrialTimes,
        "estimate",
        lambda _, trial: ESTIMATED[trial.route.kind] * (1 if trial.size == "all" else 0.1),
    )
    return measure.TrialTimes(settled[0], {})


def test_an_overrun_counts_for_routes_of_its_kind(settled: Any, outlook: measure.TrialTimes) -> None:
    each = {(trial.route.kind, trial.size): trial for trial in settled[1] if trial.seed == 0}

    def seconds() -> dict[tuple[str, int | str], float]:
        return {name: round(outlook.seconds(trial), 3) for name, trial in each.items()}

    before = seconds()
    outlook.learn(
        each["bottleneck", 5], 0.5
    )  # half of what was expected: says little of larger ones, nothing of other routes
    found = seconds()
    assert found == {**before, ("bottleneck", 5): 0.5, ("bottleneck", "all"): round(10 * 10.5 / 11, 3)}
    outlook.learn(each["bottleneck", "all"], 73.5)  # 10 s were expected; in all (74 + 10) / (11 + 10) times as long
    found = seconds()
    assert (found["bottleneck", 5], found["bottleneck", "all"]) == (0.5, 73.5)
    assert (found["node", 5], found["node", "all"], found["layers", "all"]) == (8.0, 80.0, 160.0)
    assert {name: found[name] for name in found if name[0] in ("tail", "scratch")} == {
        name: before[name] for name in before if name[0] in ("tail", "scratch")
    }
    outlook.learn(each["layers", 5], 2.0)  # which is known now by itself
    assert (seconds()["layers", "all"], seconds()["node", "all"]) == (round(40 * 12 / 14, 3), round(20 * 86 / 25, 3))
    outlook.learn(each["tail", "all"], 180.0)
    assert seconds()["scratch", "all"] == round(100 * 190 / 70, 3)


def test_what_no_longer_fits_in_the_budget_is_said_once(
    settled: Any, outlook: measure.TrialTimes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, every = settled
    now, said, at = [0.0], [], []

    def measured(_context: Any, trial: Any, fold: Any, told: Any) -> Any:
        told("a head")
        now[0] += outlook.estimate(trial) * (6 if trial.route.kind == "bottleneck" else 1)
        return Cell(trial.route.name, 0, 0, {}, np.ones(len(fold.test), np.bool_), None, 1.0, 0.0)

    class Told:
        def advance(self, count: int, text: str = "") -> None:
            at.append((count, text))

        def say(self, message: str) -> None:
            said.append(message)

    monkeypatch.setattr(measure, "_MEASURES", dict.fromkeys(ESTIMATED, measured))
    clock = SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0])
    monkeypatch.setattr(measure, "time", clock)
    chosen = [one for one in every if one.size == "all"]
    # 2 draws of each: expected are 20, 40, 80, 120 and 200 s.
    untried = measure.measure_routes(
        context, chosen, Journal(tmp_path / "journal.jsonl"), outlook, budget=270.0, executor=LocalExecutor(),
        progress=Told(),
    )  # fmt: skip
    assert said == [
        "2 measurements beyond the budget: scratch (2)",
        f"{chosen[0]} took 1:00 min, where 10 s were expected; others of its kind are expected to, too",
        # Of other heads (60 + 10) / (10 + 10) times as much is expected: 70 s of node, 140 s of layers.
        "4 measurements beyond the budget now: tail from s2 (1), node (1), layers (2)",
        "1 measurement beyond the budget now: bottleneck (1)",  # since node took no longer than estimated
    ]
    assert now[0] == 60 + 60 + 2 * 20 + 2 * 40  # bottleneck, tail, node, layers
    lost = Counter(one.trial.route.kind for one in untried)
    assert lost == {"bottleneck": 1, "tail": 1, "scratch": 2}
    assert at[:3] == [
        (0, "bottleneck, all images, draw 1"),
        (0, "bottleneck, all images, draw 1: a head"),
        (1, "bottleneck, all images, draw 1"),
    ]


def test_within_one_measurement_it_is_said_what_it_is_at(settled: Any) -> None:
    context, every = settled
    for kind, first, steps in (("tail", "loading the network", 2), ("layers", "reading and scoring", 0)):
        trial, said = next(one for one in every if one.route.kind == kind and one.size == 5), []
        measure.measure_trial(context, trial, Worker(), bool, said.append)
        assert all(line.startswith(f"{trial}: ") for line in said)
        assert said[0].startswith(f"{trial}: {first}")
        done = [line.removeprefix(f"{trial}: ").partition(",")[0] for line in said if ": step " in line]
        assert done == [f"step {number + 1} of {steps}" for number in range(steps)]
    assert said[1:] == [f"{trial}: {text}" for text in (
        "heads on 0.1 of 556 values", "heads on 0.5 of 556 values", said[-1].removeprefix(f"{trial}: ")
    )]  # fmt: skip
    assert said[-1].endswith("of 556 values, on all that train")
    elsewhere: list[str] = []
    measure.measure_trial(context, trial, Worker("w", is_local=False), bool, elsewhere.append)
    assert elsewhere == []  # which would come with the result


def test_phases_are_said_from_the_start_and_precisions_are_compared_once(
    piles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compared, begin, shown = [], Lines.__init__, []
    original = session.choose_precision
    monkeypatch.setattr(
        session, "choose_precision", lambda *given, **more: (compared.append(1), original(*given, **more))[1]
    )
    monkeypatch.setattr(Lines, "__init__", lambda *given, **more: (shown.append(given[2]), begin(*given, **more))[1])
    weights = tmp_path / "own.pt"
    torch.save(load_backbone("lenet5", "none").state(), weights)
    own = {**NETWORK, "weights": str(weights)}
    asked = {**FAST, "sizes": (5,), "seeds": 1, "silent": False, "routes": "bottleneck,tail"}
    fp.routes(piles, tmp_path / "store", dataset="digits", **own, **asked)
    assert len(compared) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "phase 1 of 4, prepare: the network, and what each route reads of it"
    phases = [line.partition(":")[0] for line in said if line.startswith("phase ")]
    assert phases == [f"phase {number} of 4, {name}" for number, name in enumerate(routes.PHASES, 1)]
    assert [what for what in shown if what] == [
        "phase 1 of 4, prepare", "phase 2 of 4, extract", "extract", "settling routes", "phase 3 of 4, compare",
        "phase 4 of 4, measure",
    ]  # fmt: skip


def test_a_recommendation_says_that_it_rests_on_fewer_draws_than_were_asked_for() -> None:
    said = answers.few_draws_text({"node": 3, "full": 1}, 3)
    assert said == "measured full on 1 draw of 3: take it as rough; the same command measures the others"
    assert answers.few_draws_text({"node": 3}, 3) == ""


def test_sizes_are_of_labels_or_of_tenths_of_the_numbers_where_there_are_no_classes(settled: Any) -> None:
    assert [DrawSize(*given).text for given in ((5, 20.0, 5.0, "label"), ("all", 60.0, 6.0, "tenth of the numbers"))] == [
        "5 a label", "all (6 a tenth of the numbers)",
    ]  # fmt: skip
    route = settled[1][0].route
    some = [measure.RouteTrial("", route, size, 0, "label") for size in (5, "all")]
    assert list(map(str, some)) == ["bottleneck, 5 images of each label, draw 1", "bottleneck, all images, draw 1"]
    why = [{"route": "full", "size": size, "draws": 2, "seconds": 9.0, "why": "so"} for size in (5, "all")]
    assert answers._not_tried_text({"not_tried": why, "per": "label"}).splitlines() == [
        "no result: full, 5 a label, 2 draws (about 9.0 s): so", "no result: full, all images, 2 draws (about 9.0 s): so",
    ]  # fmt: skip


def test_why_a_network_has_no_classes_is_said_as_for_the_command_line(settled: Any) -> None:
    context, _ = settled
    none, why = routes._places(context.backbone(), context.study, context.options)
    assert none is None
    assert "Choose such weights with --weights NAME" in why


def test_routes_of_different_draws_are_chosen_among_by_the_draws_that_both_have(settled: Any) -> None:
    """Draw 0 is an easy one, and the dear route was measured on it alone."""
    context, asked = settled
    study, ways = context.study, {trial.route.name: trial.route for trial in asked}
    tested = len(study.test)

    def made(name: str, size: Any, right: tuple[float, ...]) -> measure.MeasuredRoute:
        cells = [
            Cell(name, seed, 0, {}, np.arange(tested) < share * tested, None, 1.0, 1.0)
            for seed, share in enumerate(right)
        ]
        of = study.of(size)
        folds = [fold for fold in of.folds if fold.seed < len(right)]
        series = Series("pretrained", (name,), name, cells)
        return measure.MeasuredRoute(ways[name], size, tuple(range(len(right))), replace(of, folds=folds), series)

    known = [
        made(name, size.name, right)
        for size in study.sizes
        for name, right in (("bottleneck", (0.9, 0.5)), ("node", (0.6, 0.6)), ("scratch", (0.92,)))
    ]
    costs = {
        (one.route.name, one.size): answers.RouteCosts(0.0, cost, None)
        for one in known
        for cost in [{"bottleneck": 1.0, "node": 0.5, "scratch": 9.0}[one.route.name]]
    }
    choices = answers.choices(study, known, costs)
    assert [(one.chosen.route.name, one.best.route.name) for one in choices] == [("bottleneck", "scratch")] * 2
    assert choices[0].estimate.value == pytest.approx(0.7, abs=0.02)  # of all its draws, as the table has it
    found = answers.recommended(study, known, costs, [])
    rough = "measured scratch on 1 draw of 2: take it as rough; the same command measures the others"
    assert [one["few_draws"] for one in found["by_size"]] == [rough, rough]
    assert found["few_draws"] == rough
    told = {"recommended": found, "measure": "accuracy", "per": "class", "not_tried": [], "similarity": {}}
    line = f"with {study.sizes[0].text}: {rough}"
    assert line in answers._answer_text(with_values(told)).splitlines()
    page = " ".join(text for block in _answer(with_values(told)) for text in getattr(block, "paragraphs", ()))
    assert f"With {study.sizes[0].name} images a class the answer was {rough}." in page


def test_times_that_a_clock_does_not_tell_apart_are_equal_and_the_simplest_route_is_taken(settled: Any) -> None:
    context, asked = settled
    study, ways = context.study, {trial.route.name: trial.route for trial in asked}
    tested, size = len(study.test), study.sizes[-1]

    def chosen(seconds: dict[str, float]) -> answers.RouteChoice:
        known, costs = [], {}
        for name in reversed(seconds):  # whatever the order in which they are known
            cells = [Cell(name, seed, 0, {}, np.ones(tested), None, 1.0, 1.0) for seed in range(2)]
            series = Series("pretrained", (name,), name, cells)
            known.append(measure.MeasuredRoute(ways[name], size.name, (0, 1), study.of(size.name), series))
            costs[name, size.name] = answers.RouteCosts(0.0, seconds[name], None)
        found = answers.recommended(study, known, costs, [])
        assert "times that differ by less than a second or a tenth are equal" in found["rule"]
        (choice,) = answers.choices(study, known, costs)
        assert (found["route"], found["same_cost"]) == (choice.chosen.route.name, list(choice.same_cost))
        if found["same_cost"]:
            told = answers.same_cost_text(found)
            assert told == "as far as a clock tells node takes as long; bottleneck is the simplest of them"
        return choice

    for seconds in ({"bottleneck": 0.9, "node": 0.3}, {"bottleneck": 107.0, "node": 100.0}):
        choice = chosen({**seconds, "scratch": 300.0})
        assert (choice.chosen.route.name, choice.best.route.name, choice.same_cost) == (
            "bottleneck",
            "bottleneck",
            ("node",),
        )
        assert choice.best_estimate.se == pytest.approx(1 / (tested + 1))  # all are right
    assert chosen({"bottleneck": 112.0, "node": 100.0, "scratch": 300.0}).chosen.route.name == "node"


def test_own_classes_that_name_some_of_the_labels_only_are_left_out_with_the_others_named() -> None:
    network, classes = SimpleNamespace(name="net"), ("daisy", "tulip", "oak")
    labels = ["a", "b", "c", "d", "daisy"]
    why = labels_meant(network, classes, labels, RoutesOptions())  # type: ignore[arg-type]
    assert str(why).startswith(
        "4 of 5 labels (a, b, c and 1 more) are not the name of a class that net was trained on; which"
    )
    assert "--mapping FILE.csv" in str(why)
    some = labels_meant(network, classes, ["a", "b"], RoutesOptions(mapping={"daisy": "a"}))  # type: ignore[arg-type]
    assert str(some).startswith("1 of 2 labels (b) is not what the mapping calls a class; which")
    both = RoutesOptions(mapping={"daisy": "a", "oak": "b", "tulip": "a"})
    found = labels_meant(network, classes, ["a", "b"], both)  # type: ignore[arg-type]
    assert isinstance(found, LabelsOfClasses)
    assert found.places.tolist() == [0, 0, 1]


@pytest.mark.parametrize("kind", ["tail", "full", "scratch"])
def test_layers_of_networks_side_by_side_are_not_tuned_and_that_is_why(piles: Path, tmp_path: Path, kind: str) -> None:
    joined = "efficientnet_lite0+efficientnet_lite1"
    with pytest.raises(
        UsageError, match=rf"route {kind} cannot be taken: .* is 2 networks side by side, which are not"
    ):
        fp.routes(piles, tmp_path / "store", backbone=joined, routes=kind, silent=True)


@pytest.mark.parametrize("kind", [{"target": "value"}, {"multilabel": "tags"}])
def test_numbers_and_several_labels_are_told_at_once_that_own_classes_do_not_serve(
    piles: Path,
    tmp_path: Path,
    kind: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given: dict[str, Any] = {**NETWORK, "labels": piles.parent / "table.csv", **kind}
    with pytest.raises(UsageError, match=r"the route as-it-is cannot be taken: .* neither numbers nor several labels"):
        fp.routes(piles, tmp_path / "store", routes="as-it-is,bottleneck", **given)
    planned = fp.routes(piles, tmp_path / "store", dry_run=True, silent=True, **given)
    assert planned["routes"] == [*TAKEN]
    assert "no result: as-it-is: the network's own classes exclude one another" in plan_text(planned)
    assert not (tmp_path / "store").exists()
    monkeypatch.setattr(routes, "extracted", lambda *_, **__: pytest.fail("computed"))
    capsys.readouterr()
    with pytest.raises(pytest.fail.Exception, match="computed"):
        fp.routes(piles, tmp_path / "store", **given)
    assert "without the route as-it-is: the network's own classes" in capsys.readouterr().err


def test_an_image_that_cannot_be_used_is_said_and_changes_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    monkeypatch.setattr(routes, "similarity", lambda *_, images, **__: asked.append(images) or {"relative": None})
    album = draw(tmp_path, count=60)
    words = {
        **NETWORK,
        **FAST,
        "silent": False,
        "sizes": "all",
        "routes": "bottleneck",
        "extraction": {"max_rejects": 2},
    }
    before = fp.routes(album, tmp_path / "store", **words)
    assert "left out" not in capsys.readouterr().err
    (album / "1" / "broken.png").write_bytes(b"no picture")
    after = fp.routes(album, tmp_path / "store", **words)
    assert "left out: 1 image that cannot be used, such as 1/broken.png (not-an-image: " in (
        said := capsys.readouterr().err
    )
    assert f"all: featurepipe runs {tmp_path / 'store'} --rejects" in said
    assert after["results"] == before["results"]
    assert after["counts"]["rejected"] == 1
    assert asked[0] == asked[1]  # so that the journal knows what was compared before


def test_the_distance_of_a_layer_is_that_of_its_statistics() -> None:
    layer = torch.nn.BatchNorm2d(2).eval()
    with torch.no_grad():
        layer.running_mean.copy_(torch.tensor([1.0, 0.0]))
        layer.running_var.copy_(torch.tensor([4.0, 1.0]))
    images = torch.stack([torch.tensor([[[5.0, 1.0]], [[1.0, -1.0]]]), torch.tensor([[[5.0, 1.0]], [[1.0, -1.0]]])])
    found, _ = layer_distances(torch.nn.Sequential(layer), [images[:1], images[1:]])
    # means 3 and 0, deviations 2 and 1: only the first mean is off, by one deviation
    assert found == {"0": pytest.approx((0.5 * 4 / (4 + 1e-5)) ** 0.5)}


def test_noise_is_as_far_as_noise_and_networks_without_statistics_say_so() -> None:
    network = load_backbone("efficientnet_lite0")
    noise = torch.randint(0, 256, (4, *network.preprocessing.input_shape), generator=torch.Generator().manual_seed(1))
    grey = torch.full((2, *network.preprocessing.input_shape), 128, dtype=torch.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(similarity, "NOISE", 4)
        far, near = (similarity.distance_of(network, images.to(torch.uint8)) for images in (noise, grey))
    assert far["relative"] == pytest.approx(1, abs=0.02)
    assert len(far["layers"]) == 49
    assert 0 < far["confidence"] < 1
    assert near["distance"] != far["distance"]
    assert similarity.distance_of(load_backbone("lenet5", "none"), grey[:, :1, :32, :32])["relative"] is None


def test_a_dry_run_says_bytes_and_time_and_writes_nothing(piles: Path, tmp_path: Path, answer: dict[str, Any]) -> None:
    found = fp.routes(piles, tmp_path / "new", dry_run=True, **NETWORK, **FAST)
    values = 200 * (16 + 84 + 6 * 14 * 14 + 96 + 256 + 120)
    assert found["bytes"] in (2 * values, 4 * values)
    each = found["seconds_of_a_draw_of_all"]
    assert each["tail from s2"] > 1
    assert each["bottleneck"] == fit_seconds(160, 84, 10)  # as of depth
    assert each["node"] > each["bottleneck"] > each["as-it-is"]
    assert each["layers"] > each["node"]
    assert found["routes"] == ["as-it-is", *TAKEN] == [*each]
    assert 3 < found["seconds_to_compare"] < 7  # a second for each node, and a few forwards
    assert "200 images to read" in (said := plan_text(found))
    assert f"and time it, about {spoken(found['seconds_to_compare'])}; measure as-it-is, bottleneck" in said
    most = 4 * sum(each.values()) - 3 * each["as-it-is"]
    assert f"measuring takes at most about {spoken(most)} with 10 classes or labels" in said
    held = fp.routes(
        piles.parent / "store",
        dataset="digits",
        dry_run=True,
        **{**NETWORK, "backbone": None, "weights": "DEFAULT"},
        **FAST,
    )
    assert held["bytes"] == 0
    del answer


def test_activations_that_do_not_fit_are_refused_before_they_are_computed(
    piles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DiskFull, match=r"1.0 kB are free on the disk of .*, cut nearer to the end with cuts"):
        fp.routes(piles, tmp_path / "new", **NETWORK, **FAST)


def test_a_store_without_activations_says_so_and_measures_the_rest(piles: Path, tmp_path: Path) -> None:
    fp.extract(piles, tmp_path / "few", backbone="lenet5", weights="none", nodes=["s4:gap", "bottleneck"], silent=True)
    given = {**NETWORK, "backbone": None, "weights": "DEFAULT"}
    found = fp.routes(tmp_path / "few", **given, **{**FAST, "sizes": (5,), "seeds": 1})
    assert {row["route"] for row in found["results"]} == {"bottleneck", "node", "scratch"}
    assert "the store has no activations s2:map" in next(
        one["why"] for one in found["not_tried"] if one["route"] == "tail"
    )


def test_a_route_that_diverges_ends_no_other(piles: Path, answer: dict[str, Any], tmp_path: Path) -> None:
    asked = {**FAST, "sizes": (5,), "seeds": 1, "rate": 1e30}
    found = fp.routes(piles, piles.parent / "store", dataset="digits", **NETWORK, **asked, routes="bottleneck,tail")
    assert [row["route"] for row in found["results"]] == ["bottleneck"]
    (lost,) = found["not_tried"]
    assert (lost["route"], lost["size"], lost["draws"]) == ("tail from s2", 5, 1)
    assert "it diverged: the loss became infinite or not a number in epoch 1" in lost["why"]
    assert lost["why"].endswith("try --rate 0.001")
    assert "no result: tail from s2, 5 a class, 1 draw" in text(found)
    assert "it diverged" in write_report(found, tmp_path / "page.html", silent=True).read_text()
    with pytest.raises(UsageError, match="no route has a result: it diverged"):
        fp.routes(piles, piles.parent / "store", dataset="digits", **NETWORK, **asked, routes="tail")


def test_all_layers_are_tuned_from_images_and_left_out_where_these_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, weights = draw(tmp_path, count=60), tmp_path / "own.pt"
    torch.save(load_backbone("lenet5", "none").state(), weights)
    given: dict[str, Any] = {
        "sizes": ("all",),
        "seeds": 1,
        "epochs": 2,
        "rate": 3e-3,
        "silent": True,
        "nodes": ["s4:gap", "bottleneck"],
    }
    found = fp.routes(
        folder, tmp_path / "store", backbone="lenet5", weights=str(weights), routes="bottleneck,full", **given
    )
    (row,) = [row for row in found["results"] if row["route"] == "full"]
    assert row["seconds_features"] > 0
    assert row["params"][0]["epochs"] == 2
    assert 0 < row["accuracy"] <= 1
    with monkeypatch.context() as full:
        full.setattr("featurepipe.tuning.from_images.available_memory", lambda: 1_000_000)
        with pytest.raises(
            UsageError, match=r"route full cannot be taken: a step of 32 images takes about .* are free on cpu"
        ):
            fp.routes(folder, tmp_path / "store", backbone="lenet5", weights=str(weights), routes="full", **given)
    folder.rename(tmp_path / "gone")
    held = fp.routes(tmp_path / "store", weights=str(weights), **given)
    why = {one["route"]: one["why"] for one in held["not_tried"]}
    assert "cannot be opened now" in why["full"]
    assert why["scratch"] == why["full"]
    assert {row["route"] for row in held["results"]} >= {"bottleneck", "node"}


def test_what_trials_have_in_common_travels(
    piles: Path, answer: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker elsewhere opens the store and loads the network itself, and finds the same."""
    asked: list[Any] = []
    monkeypatch.setattr(
        "featurepipe.transfer_routes.routes.measure_routes",
        lambda context, trials, *_, **__: asked.append((context, trials)) or [],
    )
    fp.routes(piles, piles.parent / "store", dataset="digits", **NETWORK, **FAST)
    ((context, trials),) = asked
    there = pickle.loads(pickle.dumps(context))
    for kind in ("bottleneck", "layers", "tail", "scratch"):
        trial = next(one for one in trials if one.route.kind == kind and one.size == 5)
        cell = measure.measure_trial(there, trial, Worker("w", threads=1, is_local=False), bool, bool)
        (row,) = [one for one in answer["results"] if one["route"] == trial.route.name and one["size"] == 5]
        assert cell.value == pytest.approx(row["cells"][0])


def test_options_say_what_is_wrong() -> None:
    assert RoutesOptions().kinds == ("as-it-is", "bottleneck", "node", "layers", "tail", "full", "scratch")
    with pytest.raises(UsageError, match="names a size twice"):
        RoutesOptions(sizes=(5, 5))
