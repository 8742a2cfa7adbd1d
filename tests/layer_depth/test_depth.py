"""From pictures to a recommendation: the whole command, in Python and on the command line."""

import hashlib
import json
import logging
import math
import signal
import time

import numpy as np
import pytest

from featurepipe.backbones.engine import Engine
from featurepipe.errors import UsageError
from featurepipe.features import session as session_module
from featurepipe.layer_depth import document, sources
from featurepipe.layer_depth import measure as measuring
from featurepipe.layer_depth.depth import depth
from featurepipe.layer_depth.measure import Timing
from featurepipe.layer_depth.text import plan_text, text
from featurepipe.records import processor_name
from featurepipe.reporting.from_store import report
from featurepipe.store import FeatureStore

COLUMNS = ["c1:avg7x7", "s4:avg4x4", "f6:gap"]
SMALL = ["--folds", 2, "--seeds", 1, "--heads", "logistic,knn", "--precision", "fp32", "--quiet"]
NETWORK = [
    "--backbone",
    "lenet5",
    "--weights",
    "none",
    "--node",
    "c1",
    "--node",
    "s4",
    "--node",
    "f6",
    "--max-width",
    300,
]
QUICK = ("centroid",)
"""Heads for tests that are not about heads: nothing is searched for."""
MAIN = "import sys; from featurepipe.cli import main; sys.exit(main())"
SLOW = """
    import sys, time
    from featurepipe.layer_depth import measure

    original = measure.measure_fold
    measure.measure_fold = lambda *arguments: (time.sleep(0.3), original(*arguments))[1]
    from featurepipe.cli import main
    sys.exit(main())
"""


@pytest.fixture(autouse=True)
def _quick_timing(monkeypatch):
    """Timing each node takes a second or more and is tested with the backbones."""

    def measure(timing):
        return {"milliseconds": {node: 1.0 + place for place, node in enumerate(timing.nodes)}, "waited": 0.0}

    monkeypatch.setattr(Timing, "measure", measure)


class Spies:
    """Counts forwards and measurements."""

    def __init__(self, monkeypatch):
        self.forwards, self.measured = 0, []
        submit, measure_fold = Engine.submit, measuring.measure_fold

        def counting_submit(engine, batch):
            self.forwards += len(batch)
            return submit(engine, batch)

        def counting_measure(data, fold, heads):
            self.measured += [(data.features.column, fold.number, head) for head in heads]
            return measure_fold(data, fold, heads)

        monkeypatch.setattr(Engine, "submit", counting_submit)
        monkeypatch.setattr(measuring, "measure_fold", counting_measure)


@pytest.fixture
def spies(monkeypatch):
    return Spies(monkeypatch)


@pytest.fixture
def run(tmp_path):
    def run_(source, **options):
        given = {
            "store": tmp_path / "store", "backbone": "lenet5", "weights": "none", "nodes": ["c1", "s4", "f6"], "max_width": 300,
            "heads": ("logistic", "knn"), "folds": 2, "seeds": 1, "jobs": 1, "silent": True,
            "extraction": {"precision": "fp32", "dtype": "float32"},
        }  # fmt: skip
        return depth(source, **{**given, **options})

    return run_


def numbers(value):
    """All numbers in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for one in value for number in numbers(one)]
    return [value] if isinstance(value, int | float) else []


def without_times(value):
    """A JSON value less what a stopwatch said."""
    if isinstance(value, list):
        return [without_times(one) for one in value]
    if isinstance(value, dict):
        return {name: without_times(one) for name, one in value.items() if name not in ("seconds", "ms_per_image")}
    return value


@pytest.fixture
def trained(tmp_path):
    """A file of weights for a LeNet-5."""
    torch = pytest.importorskip("torch")
    from featurepipe.backbones.packaged import LeNet5

    torch.manual_seed(3)
    torch.save(LeNet5().state_dict(), tmp_path / "lenet.pth")
    return str(tmp_path / "lenet.pth")


@pytest.mark.slow
def test_the_document_says_what_was_found_of_what(run, pictures, tmp_path, spies):
    report = tmp_path / "page.html"
    found = run(pictures(), report=report, command="featurepipe depth")
    assert (found["kind"], found["version"], found["dataset"]) == ("depth", 1, "halves")
    assert found["backbone"]["name"] == "lenet5"
    assert found["classes"] == ["left", "upper"]
    assert found["images"] == 24
    assert [column["column"] for column in found["columns"]] == COLUMNS
    assert [column["width"] for column in found["columns"]] == [294, 256, 84]
    assert [column["bytes_per_image"] for column in found["columns"]] == [4 * 294, 4 * 256, 4 * 84]
    for number, column in enumerate(found["columns"]):
        assert column["saved"] == pytest.approx(1 - column["cost"])
        assert column["ms_per_image"] == 1 + number
    assert spies.forwards == 24
    alone = [one for one in spies.measured if "+" not in one[0]]
    assert sorted(alone) == sorted(
        (c, fold, head) for c in COLUMNS for fold in range(2) for head in ("logistic", "knn")
    )
    series = [(r["column"], r["head"]) for r in found["results"]]
    assert series == [(column, head) for column in COLUMNS for head in ("logistic", "knn")]
    for result in found["results"]:
        assert result["accuracy"] == pytest.approx(np.mean(result["cells"]))
        assert len(result["cells"]) == len(result["params"]) == 2
    best = max(result["accuracy"] for result in found["results"])
    assert best >= 0.95  # one half is brighter: any layer sees which
    chosen = found["recommended"]
    assert chosen["best_accuracy"] == best
    assert (chosen["column"], chosen["node"]) == ("c1:avg7x7", "c1")
    own = next(r for r in found["results"] if (r["column"], r["head"]) == (chosen["column"], chosen["head"]))
    assert [chosen[name] for name in ("accuracy", "low", "high", "se")] == [
        own[name] for name in ("accuracy", "low", "high", "se")
    ]
    assert (chosen["width"], chosen["ms_per_image"]) == (294, found["columns"][0]["ms_per_image"])
    assert len(found["differences"]) == 4
    assert [one["columns"] for one in found["concatenations"]][-1] == COLUMNS
    cka = np.array(found["similarity"]["cka"])
    np.testing.assert_allclose(cka, cka.T)
    np.testing.assert_allclose(cka.diagonal(), 1)
    assert set(found["transferability"]["scores"]) == set(COLUMNS)
    assert set(found["transferability"]["correlations"]) == {"logistic", "knn"}
    assert found["settings"]["folds"] == 2
    assert found["provenance"]["command"] == "featurepipe depth"
    assert set(found["provenance"]["seconds"]) == {"extract", "measure", "side by side", "describe"}
    assert "c1:avg7x7" in report.read_text(encoding="utf-8")


def test_it_is_plain_json_and_kept_in_the_store(run, pictures, tmp_path):
    found = run(pictures())
    assert all(math.isfinite(number) for number in numbers(found))
    text = json.dumps(found, allow_nan=False)
    (kept,) = FeatureStore(tmp_path / "store").depth_documents("halves")
    assert {**json.loads(text), "run_id": kept["run_id"]} == kept
    assert {"scikit-learn", "scipy", "numpy", "torch"} <= set(found["provenance"]["software"])
    assert "openvino" not in found["provenance"]["software"]  # PyTorch computed the features
    assert found["provenance"]["machine"]["processor"] == processor_name()


@pytest.mark.parametrize("head", ["logistic", "knn"])
def test_details_are_of_the_heads_that_were_measured(run, pictures, head):
    """As many right as in the cells, the images as the folds tested them."""
    found = run(pictures(count=15), nodes=["c1:gap", "s4:gap", "f6"], heads=(head,))
    metrics = found["details"]["metrics"]
    column = found["details"]["column"]
    (own,) = (r for r in found["results"] if r["column"] == column)
    assert metrics["images"] == 30
    assert metrics["accuracy"]["value"] == pytest.approx(own["accuracy"], abs=1e-9)  # folds are equally large
    ids = [one["id"] for one in metrics["mistakes"]["most_confident"]]
    assert all(one["true"] == one["id"].split("/")[0] for one in metrics["mistakes"]["most_confident"])
    assert len(set(ids)) == len(ids) == min(len(ids), round(30 * (1 - own["accuracy"])))


def test_the_second_call_computes_nothing_and_finds_the_same(run, pictures, spies):
    source = pictures()
    first = run(source)
    assert spies.forwards == 24
    spies.forwards, spies.measured = 0, []
    again = run(source)
    assert spies.forwards == 0
    assert spies.measured == []
    for result in (*first["results"], *again["results"]):
        assert result.pop("seconds") > 0
    for name in ("columns", "results", "recommended", "differences", "concatenations", "similarity", "details"):
        assert again[name] == first[name]


def test_a_reject_is_in_the_exit_code_and_the_protocol_is_left_to_the_answer(run, pictures, capsys):
    source = pictures()
    assert run(source, heads=QUICK)["provenance"]["exit_code"] == 0
    (source / "left" / "broken.png").write_bytes(b"no picture")
    some = {"precision": "fp32", "dtype": "float32", "max_rejects": "50%"}
    found = run(source, silent=False, heads=QUICK, extraction=some)
    assert found["provenance"]["exit_code"] == 3
    told = capsys.readouterr().err
    assert "24 images of 2 classes, 3 columns" in told
    assert "Features are standardised" in found["protocol"]
    assert "Features are standardised" not in told


@pytest.mark.slow
def test_damaged_images_are_kept_where_asked_and_listed_with_their_dataset(run, pictures, tmp_path, noisy_jpeg):
    source, other = pictures(), pictures("away", count=5, start=500)
    for number, folder in enumerate((source / "left", other / "upper", other / "left")):
        (folder / "broken.jpg").write_bytes(noisy_jpeg(number, damaged=True))
    options = {"precision": "fp32", "dtype": "float32"}
    small = {"nodes": ["s4", "f6"], "heads": ("centroid",), "report": tmp_path / "page.html"}
    found = run(source, test_source=other, extraction={**options, "damaged": "keep"}, **small)
    assert (found["images"], found["counts"]["shifted"]) == (25, 12)
    assert found["damaged"]["asked"] == "keep"
    assert found["damaged"]["kept"] == 3
    assert [(image["dataset"], image["id"]) for image in found["damaged"]["images"]] == [
        ("halves", "left/broken.jpg"), ("away", "left/broken.jpg"), ("away", "upper/broken.jpg"),
    ]  # fmt: skip
    assert found["provenance"]["exit_code"] == 0
    assert "kept although damaged: 3\n  left/broken.jpg: " in text(found)
    assert "3 of the images are damaged and were kept" in (tmp_path / "page.html").read_text()
    store = {**small, "store": None, "backbone": None, "dataset": "halves"}
    assert run(tmp_path / "store", **store)["damaged"] is None
    found = run(source, extraction={**options, "max_rejects": 1}, dataset="again", **small)
    assert (found["images"], found["damaged"]) == (24, {"asked": "reject", "kept": 0, "images": []})
    with pytest.raises(UsageError, match=r"is a feature store: no image is decoded.*Leave damaged='keep' out"):
        run(tmp_path / "store", **store, extraction={"damaged": "keep"})


def test_what_is_ignored_of_a_file_of_weights_is_in_the_records_of_each_run(run, pictures, trained, tmp_path):
    torch = pytest.importorskip("torch")
    state = torch.load(trained, weights_only=True)
    more = {name: value + 1 for name, value in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": more}, tmp_path / "two.pth")
    small = {"nodes": ["s4", "f6"], "heads": ("centroid",)}
    source = pictures()
    assert run(source, weights=trained, **small)["weights_note"] == ""
    found = run(source, weights=str(tmp_path / "two.pth"), **small)  # the same tensors, and so the same feature space
    assert found["weights_note"] == "the file holds other tensors as well, which are ignored: ['state_dict_ema']"
    store = FeatureStore(tmp_path / "store")
    assert [record["weights_note"] for record in store.runs()] == ["", found["weights_note"]]
    assert len(store.spaces()) == 1
    held = {**small, "store": None, "backbone": None}
    assert run(tmp_path / "store", **held)["weights_note"] == ""  # the space was begun with the other file


FINDERS = ("similarity", "transferability", "details", "placed")


@pytest.mark.slow
def test_what_describes_columns_is_found_once(run, pictures, tmp_path, monkeypatch):
    found, times, waited = [], [], 0.1

    def spy(name):
        original = getattr(document, name)
        monkeypatch.setattr(document, name, lambda *given: (found.append(name), original(*given))[1])

    def measure(timing):
        times.append(timing.nodes)
        return {"milliseconds": {node: 7.0 + len(times) for node in timing.nodes}, "waited": waited}

    for name in FINDERS:
        spy(name)
    monkeypatch.setattr(Timing, "measure", measure)
    source = pictures()
    first = run(source, heads=QUICK, report=tmp_path / "page.html")
    assert (sorted(found), len(times)) == (sorted(FINDERS), 1)
    again = run(source, heads=QUICK, report=tmp_path / "page.html")
    assert (sorted(found), len(times)) == (sorted(FINDERS), 1)
    for name in ("columns", "similarity", "transferability", "details", "details_shifted", "map", "timing"):
        assert again[name] == first[name]
    assert all(column["ms_per_image"] == 8.0 for column in again["columns"])
    found.clear()
    run(source, heads=QUICK, folds=3)
    assert found == ["details"]  # the others know no folds
    found.clear()
    (source / "left" / "000.png").rename(source / "left" / "000a.png")
    renamed = run(source, heads=QUICK, report=tmp_path / "page.html")
    assert sorted(found) == ["details", "placed"]  # these name images; their order is the same
    assert "left/000a.png" in renamed["map"]["ids"]
    assert len(times) == 1


def test_new_images_are_measured_anew_but_only_they_are_extracted(run, pictures, spies):
    source = pictures()
    run(source, heads=QUICK)
    spies.forwards, spies.measured = 0, []
    (source / "left" / "more.png").write_bytes((source / "upper" / "000.png").read_bytes())  # a copy with another label
    assert run(source, heads=QUICK)["images"] == 25
    assert spies.forwards == 0
    assert spies.measured


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(run, pictures, tmp_path, spies):
    source = pictures()
    found = run(source, dry_run=True, report=tmp_path / "page.html")
    assert [column["column"] for column in found["columns"]] == COLUMNS
    assert found["measurements"] == 3 * 2 * 2
    assert found["side_by_side"] == 3 * 2
    assert set(found["seconds"]) == {"measure", "side by side", "describe"}
    assert found["extractions"][0]["to_read"] == 24
    assert json.dumps(found, allow_nan=False)
    assert spies.measured == []
    assert not (tmp_path / "store").exists()
    assert not (tmp_path / "page.html").exists()


def test_a_dry_run_compares_precisions_once(run, pictures, trained, monkeypatch):
    compared = []
    original = session_module.choose_precision
    monkeypatch.setattr(
        session_module, "choose_precision", lambda *given, **more: (compared.append(1), original(*given, **more))[1]
    )
    more = {
        "weights": trained,
        "control": "random",
        "test_source": pictures("away", count=3, start=500),
        "extraction": {},
    }
    found = run(pictures(), dry_run=True, **more)
    assert len(found["extractions"]) == 4
    assert len(compared) == 1
    assert len({estimate["space"]["precision"] for estimate in found["extractions"]}) == 1


def test_a_dry_run_counts_joined_labels_and_groups(run, pictures, tmp_path):
    source = pictures()
    ids = [f"{kind}/{number:03d}.png" for kind in ("left", "upper") for number in range(12)]
    lines = [f"{name},{'abc'[place % 3]},p{place // 4}" for place, name in enumerate(ids[:20])]
    (tmp_path / "labels.csv").write_text("\n".join(["id,label,group", *lines]))
    (tmp_path / "groups.csv").write_text("\n".join(["id,group", *(f"{name},g{p // 8}" for p, name in enumerate(ids))]))
    found = run(source, dry_run=True, labels=tmp_path / "labels.csv")
    assert (found["images"], found["classes"], found["groups"]) == (20, 3, 5)
    assert "20 images of 3 classes, in 5 groups" in plan_text(found).splitlines()
    plain = run(source, dry_run=True)
    assert (plain["images"], plain["classes"], plain["groups"]) == (24, 2, None)
    assert "24 images of 2 classes" in plan_text(plain).splitlines()
    assert (
        found["seconds"]["measure"] < plain["seconds"]["measure"] * 1.5
    )  # of 20 images instead of 24, 3 classes, not 2
    grouped = run(source, dry_run=True, group=str(tmp_path / "groups.csv"))
    assert (grouped["images"], grouped["classes"], grouped["groups"]) == (24, 2, 3)
    with pytest.raises(UsageError, match="unknown column 'patient'"):
        run(source, dry_run=True, labels=tmp_path / "labels.csv", group="patient")
    real = run(source, labels=tmp_path / "labels.csv", heads=QUICK)
    assert (real["images"], len(real["classes"])) == (found["images"], found["classes"])
    held = run(tmp_path / "store", store=None, backbone=None, dry_run=True, labels=tmp_path / "labels.csv")
    assert (held["images"], held["classes"], held["groups"]) == (20, 3, 5)


def test_settings_that_follow_the_training_images_say_so(run, pictures, trained, caplog, tmp_path):
    with caplog.at_level(logging.DEBUG, "featurepipe"):
        run(
            pictures(), weights=trained, control="random", test_source=pictures("away", count=3, start=500), heads=QUICK,
            extraction={"dtype": "float32"}, silent=False,
        )  # fmt: skip
    said = [line for line in caplog.messages if line.startswith("precision ")]
    assert not any("asked for" in line for line in said)
    assert [line.partition(": ")[2] for line in said[1:]] == ["as the training images", *2 * ["as the trained network"]]
    records = FeatureStore(tmp_path / "store").runs()
    why = [record["settings"]["precision"]["why"] for record in records]
    assert why[1:] == ["as the training images", *2 * ["as the trained network"]]
    assert records[1]["settings"]["dtype"]["why"] == "asked for"


@pytest.mark.slow
def test_a_store_is_compared_as_it_is(run, pictures, tmp_path, spies):
    source = pictures()
    run(source, heads=QUICK)
    spies.forwards, spies.measured = 0, []
    for given in (tmp_path / "store", FeatureStore(tmp_path / "store")):
        found = run(given, store=None, backbone=None, nodes="auto", heads=QUICK, report=tmp_path / "page.html")
        assert [column["column"] for column in found["columns"]] == COLUMNS
        assert spies.forwards == 0
        assert spies.measured == []
        assert found["provenance"]["runs"] == []
    fewer = run(tmp_path / "store", store=None, backbone="lenet5", nodes=["f6", "s4:avg4x4"], heads=QUICK)
    assert [column["column"] for column in fewer["columns"]] == COLUMNS[1:]
    for more in (
        {"store": tmp_path / "other"},
        {"store": None, "control": "random"},
        {"store": None, "test_source": source},
    ):
        with pytest.raises(UsageError, match="is a feature store: its columns are compared as they are"):
            run(tmp_path / "store", **more)


@pytest.mark.slow
def test_control_and_other_source_stand_beside(run, pictures, trained, tmp_path):
    other = pictures("away", count=5, start=500)
    found = run(pictures(), weights=trained, control="random", test_source=other)
    series = {(r["column"], r["head"], r["network"], r["tested_on"]) for r in found["results"]}
    assert len(series) == len(found["results"]) == 3 * 2 * 2 * 2
    assert found["test_dataset"] == "away"
    assert found["counts"]["shifted"] == found["details_shifted"]["metrics"]["images"] == 10
    assert found["details_shifted"]["column"] == found["recommended"]["column"]
    there = found["recommended"]["elsewhere"]
    kind = ("shifted", "pretrained", found["recommended"]["head"])
    same = [r for r in found["results"] if (r["tested_on"], r["network"], r["head"]) == kind]
    there_by_column = {r["column"]: r["accuracy"] for r in same}
    assert (there["dataset"], there["images"], there["of_equal_id"]) == ("away", 10, 0)
    assert there["accuracy"] == there_by_column[found["recommended"]["column"]]
    assert there["best_accuracy"] == there_by_column[there["best"]] == max(there_by_column.values())
    assert found["control"]["space"] != found["space"]["fingerprint"]
    shifted = [r for r in found["results"] if r["tested_on"] == "shifted"]
    assert max(r["accuracy"] for r in shifted) >= 0.9  # the same halves
    trained_, random = (
        [r["cells"] for r in found["results"] if r["network"] == name] for name in ("pretrained", "random")
    )
    assert trained_ != random
    store = FeatureStore(tmp_path / "store")
    assert store.features("halves", node=COLUMNS, backbone=found["control"]["space"]).shape == (24, 634)


def test_a_source_of_the_same_name_replaces_nothing(run, pictures, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    first = pictures()
    other = pictures("elsewhere/halves", count=5, start=500)
    run(first, heads=QUICK)
    with pytest.raises(UsageError, match=r"both sources would be dataset 'halves'; .* dataset='halves-source'"):
        run(first, test_source=other)
    assert len(FeatureStore(tmp_path / "store").features("halves", node="c1:avg7x7")) == 24


def test_a_comparison_belongs_to_its_store(run, pictures, tmp_path):
    from featurepipe.store.verify import verify_store

    run(pictures(), heads=QUICK)
    assert verify_store(FeatureStore(tmp_path / "store")).leftovers == []


def test_the_own_split_is_used_where_asked_for(run, pictures, tmp_path):
    root = tmp_path / "split"
    for name, count, start in (("train", 12, 0), ("test", 4, 100)):
        pictures(f"split/{name}", count=count, start=start)
    (root / "train" / "left" / "copy.png").write_bytes((root / "test" / "left" / "100.png").read_bytes())
    found = run(root, split=True, seeds=2, heads=QUICK)
    assert found["settings"]["folds"] is None
    assert found["settings"]["split"] is True
    assert found["counts"]["in_no_fold"] == 1  # the copy
    assert found["details"]["metrics"]["images"] == 8
    assert all(len(r["cells"]) == 2 for r in found["results"])
    assert found["recommended"]["low"] < 1


def test_given_labels_are_used_instead(run, pictures):
    source = pictures(count=8)
    labels = {f"{kind}/{n:03d}.png": f"{kind}-{n % 2}" for kind in ("left", "upper") for n in range(8)}
    labels.pop("left/000.png")
    found = run(source, labels=labels, heads=QUICK)
    assert found["classes"] == ["left-0", "left-1", "upper-0", "upper-1"]
    assert (found["images"], found["counts"]["unlabelled"]) == (15, 1)


def test_what_cannot_be_compared_is_refused(run, pictures, tmp_path, spies):
    source = pictures()
    with pytest.raises(UsageError, match="unknown head 'logistics'"):
        run(source, heads=("logistics",))
    with pytest.raises(UsageError, match=r"cannot write .*page.html: there is no folder"):
        run(source, report=tmp_path / "missing" / "page.html")
    with pytest.raises(UsageError, match="unknown control 'untrained'; choices: random"):
        run(source, control="untrained")
    with pytest.raises(UsageError, match="weights='none' is a random network already"):
        run(source, control="random")
    with pytest.raises(UsageError, match="folds 0 must be at least 2"):
        run(source, folds=0)
    assert spies.forwards == 0  # all of this is known before the first image
    assert not (tmp_path / "store").exists()
    with pytest.raises(UsageError, match="needs labelled images in the splits train and test"):
        run(source, split=True)
    with pytest.raises(UsageError, match="both sources would be dataset 'halves'"):
        run(source, test_source=source)
    strangers = pictures("strangers", count=3, classes=("rook", "pawn"), start=700)
    with pytest.raises(UsageError, match=r"none of the 6 images of strangers is of a class of halves.*rook.*upper"):
        run(source, test_source=strangers)
    with pytest.raises(UsageError, match="none of the 24 images of twin is of a class of halves without being in it"):
        run(source, test_source=pictures("twin"))
    assert FeatureStore(tmp_path / "store").depth_documents("halves") == []


def test_one_class_and_no_label_are_refused(run, pictures, tmp_path):
    single = pictures("single", classes=("left",))
    with pytest.raises(UsageError, match="dataset single has 12 labelled images of 1 classes"):
        run(single)
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (single / "left").iterdir():
        path.rename(flat / path.name)
    with pytest.raises(UsageError, match=r"dataset flat has 0 labelled images of 0 classes.*labels='FILE.csv'"):
        run(flat)


@pytest.mark.slow
def test_the_command_line_does_the_same(pictures, tmp_path, cli, run):
    source, store = pictures(), tmp_path / "cli"
    finished = cli(
        "depth", source, "--store", store, *NETWORK, *SMALL, "--jobs", 1, "--json", "--report", tmp_path / "p.html"
    )
    assert finished.code == 0, finished.err
    found, expected = finished.json(), run(source, extraction={"precision": "fp32"}, store=tmp_path / "python")
    for name in ("results", "recommended", "differences"):
        assert without_times(found[name]) == without_times(json.loads(json.dumps(expected[name])))
    assert all(0 < column["ms_per_image"] < 1000 for column in found["columns"])
    assert found["provenance"]["command"].startswith("featurepipe depth ")
    assert (tmp_path / "p.html").stat().st_size > 100_000
    planned = cli("depth", source, "--store", store, *NETWORK, *SMALL, "--dry-run")
    assert planned.code == 0, planned.err
    assert "halves, lenet5: 3 columns" in planned.out
    assert "halves: 0 images to read, nothing to compute" in planned.out
    assert "dry run: nothing was changed" in planned.out
    wrong = cli("depth", source, "--store", store, *NETWORK, "--heads", "knn,nn")
    assert wrong.code == 2
    assert "unknown head 'nn'" in wrong.err


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_stopped_while_measuring_the_same_command_goes_on(pictures, tmp_path, launcher, run, spies, number):
    source, store = pictures(), FeatureStore(tmp_path / "store")
    arguments = ["depth", source, "--store", store.path, *NETWORK, *SMALL, "--jobs", 1]
    process = launcher.start(SLOW, arguments)
    deadline = time.monotonic() + 60
    path = store.depth_journal("halves")
    while not (path.exists() and path.read_text().endswith("\n")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send(number)
    finished = process.wait()
    assert finished.code == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number], finished.err
    assert "Traceback" not in finished.err
    assert store.depth_documents("halves") == []
    done = len([line for line in path.read_text().split("\n") if line.endswith("}")])
    assert 0 < done < 12
    spies.measured = []
    run(source, extraction={"precision": "fp32"})
    assert spies.forwards == 0
    alone = [one for one in spies.measured if "+" not in one[0]]
    assert len(alone) == 3 * 2 * 2 - done
    assert len(set(alone)) == len(alone)
    assert len(store.depth_documents("halves")) == 1


def test_what_is_a_store_is_told_by_its_file(tmp_path):
    assert not sources.is_store(tmp_path)
    assert not sources.is_store(np.zeros((3, 8, 8)))
    (tmp_path / "store.json").write_text("{}")
    assert sources.is_store(tmp_path)
    assert sources.is_store(str(tmp_path))
    assert sources.is_store(FeatureStore(tmp_path / "new"))


@pytest.mark.slow
def test_the_document_holds_the_map_that_its_page_shows(run, pictures, tmp_path):
    found = run(pictures(), heads=QUICK, report=tmp_path / "page.html")
    places = found["map"]["places"]
    assert set(places) == {"PCA", "t-SNE"}
    assert len(found["map"]["ids"]) == len(places["PCA"]) == len(places["t-SNE"]) == found["map"]["total"] == 24
    labels = dict(zip(found["map"]["ids"], found["map"]["labels"], strict=True))
    assert all(id_.split("/")[0] == label for id_, label in labels.items())
    again = report(tmp_path / "store", tmp_path / "again.html", silent=True)
    assert all(id_ in again.read_text(encoding="utf-8") for id_ in found["map"]["ids"])
    assert FeatureStore(tmp_path / "store").depth_documents("halves")[-1]["map"] == found["map"]
    assert "map" not in run(pictures("others", start=50), heads=QUICK)


def test_the_page_keeps_to_where_images_may_lie(run, pictures, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("featurepipe.layer_depth.depth.write_page", lambda *given, **options: asked.append(options))
    source, other = pictures(), pictures("away", count=3, start=500)
    run(source, test_source=other, report=tmp_path / "p.html", heads=QUICK, extraction={"only_under": [source, other]})
    (options,) = asked
    assert (options["source"], options["test_source"]) == (source, other)
    assert options["only_under"] == [source, other]
    assert not {"path_column", "box"} & options.keys()  # what was not given is what `report` takes by itself


def test_no_source_is_opened_that_is_not_allowed(run, pictures, tmp_path):
    with pytest.raises(UsageError, match=r"memory://elsewhere is not below .*, which only_under asks for"):
        run("memory://elsewhere", extraction={"only_under": str(tmp_path)})


def test_files_that_were_given_are_known_by_their_bytes(tmp_path):
    path = tmp_path / "families.csv"
    path.write_bytes(b"id,group\n")
    assert document.files_of(labels={"a": "b"}, group="family", split=None) == {}
    digest = hashlib.sha256(b"id,group\n").hexdigest()
    assert document.files_of(labels=path, group="family") == {"labels": {"path": str(path), "sha256": digest}}
