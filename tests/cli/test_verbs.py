"""What is typed reaches the command, and what the command returns is printed."""

import json
from pathlib import Path

import pytest

from featurepipe.cli import curation as cli_curation
from featurepipe.cli import depth as cli_depth
from featurepipe.cli import extract as cli_extract
from featurepipe.cli import heads as cli_heads
from featurepipe.cli import options as cli_options
from featurepipe.store import FeatureStore

EXTRACT = "featurepipe.extraction.extract:extract"
TRAIN = "featurepipe.training.train:train"
EVALUATE = "featurepipe.evaluation.evaluate:evaluate"
PREDICT = "featurepipe.prediction.predict:predict"
DEPTH = "featurepipe.layer_depth.depth:depth"
ROUTES = "featurepipe.transfer_routes.routes:routes"


@pytest.fixture(autouse=True)
def every_path_is_there(monkeypatch):
    """The paths below are words; those that are not there are refused before a command is called (test_paths.py)."""
    for module in (cli_curation, cli_depth, cli_extract, cli_heads):
        monkeypatch.setattr(module, "existing_source", lambda given: None)
    for module in (cli_depth, cli_options):
        monkeypatch.setattr(module, "existing_bundle", lambda given: None)


CASES = {
    "extract": (
        EXTRACT,
        "extract photos --store kept --dataset d --backbone vgg16 --weights none --seed 3 --node a --node b:gmp "
        "--precision fp32 --dtype float32 --decode cpu --device cpu --batch-size 8 --workers 2 --engine pytorch --max-rejects 3 "
        "--only-under /data --only-under s3://b --path-column photo --box x,y,w,h --box-unit share --box-margin 0.1 "
        "--images pics --frames all "
        "--max-gone 20% --min-free 20GB "
        "--retry-rejects --damaged keep --intensity bits=12 --mirrored --time-budget 1h30m --dry-run --quiet",
        {
            "source": "photos", "store": "kept", "dataset": "d", "backbone": "vgg16", "weights": "none", "seed": 3,
            "nodes": ["a", "b:gmp"], "precision": "fp32", "dtype": "float32", "decode": "cpu", "device": "cpu",
            "batch_size": "8", "workers": 2, "engine": "pytorch", "max_rejects": "3",
            "only_under": ["/data", "s3://b"], "path_column": "photo", "box": "x,y,w,h", "box_unit": "share", "box_margin": 0.1,
            "images": "pics", "frames": "all",
            "intensity": "bits=12", "mirrored": True, "max_gone": "20%", "min_free": "20GB",
            "retry_rejects": True, "damaged": "keep", "time_budget": 5400.0, "dry_run": True, "silent": True,
        },
    ),
    "extract as it is": (
        EXTRACT,
        "extract photos --store kept",
        {
            "source": "photos", "store": "kept", "dataset": None, "backbone": "auto", "weights": "DEFAULT", "seed": 0,
            "nodes": ("bottleneck",), "precision": "auto", "dtype": "auto", "decode": "auto", "device": "auto",
            "batch_size": "auto", "workers": None, "max_rejects": "1%", "max_gone": None, "min_free": None, "only_under": None,
            "path_column": None, "box": None, "box_unit": "pixels", "box_margin": 0.0, "images": None, "frames": "first",
            "intensity": "auto", "mirrored": False, "engine": "auto",
            "retry_rejects": False, "damaged": "reject", "time_budget": None, "dry_run": False, "silent": False,
        },
    ),
    "train": (
        TRAIN,
        "train kept --dataset d --node a --node b --backbone vgg16 --head ridge --out bundle --labels l.csv "
        "--label class --ordered low<high --group patient --split-column fold --weight w --split s "
        "--set alpha=0.5 --set solver=svd --set fit_intercept=False --set tol=None --tune --protocol voc07 "
        "--pca 0.9 --select 5% --class-weight balanced "
        "--no-calibration --threshold precision=0.9 --positive sick --threshold-margin "
        "--min-class-size 5 --memory 2GB --device cuda:1 --jobs 3 --weights w.pt --trust-code --seed 7 --dry-run --quiet",
        {
            "store": "kept", "dataset": "d", "nodes": ["a", "b"], "backbone": "vgg16", "head": "ridge", "out": "bundle",
            "ordered": ("low", "high"),
            "labels": "l.csv", "label": "class", "group": "patient", "split_column": "fold", "target": None, "multilabel": None,
            "weight": "w", "split": "s",
            "params": {"alpha": 0.5, "solver": "svd", "fit_intercept": False, "tol": None}, "tune": True,
            "protocol": "voc07", "pca": 0.9, "select": 0.05,
            "class_weight": "balanced", "calibration": False, "threshold": "precision=0.9", "positive": "sick",
            "threshold_margin": True, "min_class_size": 5, "memory": "2GB", "device": "cuda:1", "jobs": 3,
            "weights": "w.pt", "trust_code": True, "seed": 7, "dry_run": True, "silent": True,
        },
    ),
    "train a number": (
        TRAIN,
        "train kept --out bundle --target age --quiet",
        {
            "store": "kept", "dataset": None, "nodes": ("bottleneck",), "backbone": None, "head": None, "out": "bundle",
            "ordered": None,
            "labels": None, "label": None, "group": None, "split_column": None,
            "target": "age", "multilabel": None, "weight": None, "split": None,
            "params": None, "tune": False, "protocol": None,
            "pca": None, "select": None, "class_weight": None, "calibration": True, "threshold": None,
            "positive": None, "threshold_margin": False, "min_class_size": 2, "memory": None, "device": "cpu", "jobs": 1,
            "weights": None, "trust_code": False, "seed": 0, "dry_run": False, "silent": True,
        },
    ),
    "train several labels": (
        TRAIN,
        "train kept --out bundle --multilabel red,round --quiet",
        {
            "store": "kept", "dataset": None, "nodes": ("bottleneck",), "backbone": None, "head": None, "out": "bundle",
            "ordered": None,
            "labels": None, "label": None, "group": None, "split_column": None, "target": None, "multilabel": ("red", "round"),
            "weight": None, "split": None,
            "params": None, "tune": False, "protocol": None,
            "pca": None, "select": None, "class_weight": None, "calibration": True, "threshold": None,
            "positive": None, "threshold_margin": False, "min_class_size": 2, "memory": None, "device": "cpu", "jobs": 1,
            "weights": None, "trust_code": False, "seed": 0, "dry_run": False, "silent": True,
        },
    ),
    "predict": (
        PREDICT,
        "predict bundle photos --to p.csv --weights w.pt --device cpu --batch-size 4 --workers 1 --max-rejects 5% "
        "--damaged keep --only-under /data --trust-code --raw-ids --top 3 --quiet",
        {
            "bundle": "bundle", "source": "photos", "to": "p.csv", "backbone": None, "top": 3, "weights": "w.pt",
            "device": "cpu", "batch_size": "4", "workers": 1, "max_rejects": "5%", "damaged": "keep", "only_under": ["/data"],
            "path_column": None, "box": None, "box_unit": "pixels", "box_margin": 0.0, "images": None, "frames": "first",
            "engine": "auto", "trust_code": True, "raw_ids": True, "silent": True,
        },
    ),
    "predict as it is": (
        PREDICT,
        "predict photos --to p.csv --backbone vgg16",
        {
            "bundle": None, "source": "photos", "to": "p.csv", "backbone": "vgg16", "top": None, "weights": None,
            "device": "auto", "batch_size": "auto", "workers": None, "max_rejects": "1%", "damaged": "reject", "only_under": None,
            "path_column": None, "box": None, "box_unit": "pixels", "box_margin": 0.0, "images": None, "frames": "first",
            "engine": "auto", "trust_code": False, "raw_ids": False, "silent": False,
        },
    ),
    "depth": (
        DEPTH,
        "depth photos --store kept --dataset d --backbone vgg16 --weights none --node a --heads logistic,ridge "
        "--folds 3 --split --seeds 2 --pooling gap,avg2x2 --max-width 500 --control random --test-source others "
        "--labels l.csv --group none --multilabel a,b --weight w --report page.html --precision fp32 --device cpu "
        "--batch-size 4 --workers 1 --max-rejects 0 --damaged keep --jobs 1 --trust-code --quiet",
        {
            "source": "photos", "store": "kept", "dataset": "d", "backbone": ["vgg16"], "weights": "none", "nodes": ["a"],
            "heads": ("logistic", "ridge"), "folds": 3, "split": True, "seeds": 2, "pooling": ("gap", "avg2x2"),
            "max_width": 500, "control": "random", "test_source": "others", "labels": "l.csv", "label": None, "group": "none",
            "split_column": None, "target": None, "multilabel": ("a", "b"), "weight": "w",
            "report": "page.html",
            "extraction": {
                "precision": "fp32", "device": "cpu", "batch_size": "4", "workers": 1, "max_rejects": "0",
                "damaged": "keep", "only_under": None, "path_column": None, "intensity": "auto",
                "box": None, "box_unit": "pixels", "box_margin": 0.0, "images": None, "frames": "first", "engine": "auto",
            },
            "jobs": 1, "trust_code": True, "dry_run": False, "silent": True,
        },
    ),
    "routes": (
        ROUTES,
        "routes photos --store kept --dataset d --backbone vgg16 --node a --routes node,tail --sizes 5,all --seeds 2 --cuts b,c "
        "--max-width 500 --test-images 90 --epochs 4 --rate 0.001 --batch-size 8 --mapping m.csv --budget 30min --test-source "
        "others --labels l.csv --group none --multilabel a,b --weight w --report page.html --precision fp32 --device cpu "
        "--workers 1 --max-rejects 0 --quiet",
        {
            "source": "photos", "store": "kept", "dataset": "d", "backbone": "vgg16", "weights": "DEFAULT", "nodes": ["a"],
            "routes": ("node", "tail"), "sizes": (5, "all"), "seeds": 2, "cuts": ("b", "c"), "max_width": 500,
            "test_images": 90, "epochs": 4, "rate": 0.001, "batch_size": 8, "mapping": "m.csv", "budget": 1800.0,
            "test_source": "others", "labels": "l.csv", "label": None, "group": "none", "split_column": None, "target": None,
            "multilabel": ("a", "b"), "weight": "w", "report": "page.html",
            "extraction": {
                "precision": "fp32", "device": "cpu", "workers": 1, "max_rejects": "0", "damaged": "reject", "only_under": None,
                "path_column": None, "intensity": "auto", "box": None, "box_unit": "pixels", "box_margin": 0.0, "images": None,
                "frames": "first", "engine": "auto",
            },
            "trust_code": False, "dry_run": False, "silent": True,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_option_reaches_the_command(case, command, call):
    place, line, expected = CASES[case]
    called = command(place, {"done": "so"})
    answer = call(*line.split(), "--json")
    assert (answer.code, json.loads(answer.out)) == (0, {"done": "so"})
    called.given.pop("command", None)
    assert called.given == expected


def test_evaluate_reads_a_store_that_exists(command, call, store):
    called = command(EVALUATE, {"measured": 1})
    line = "--dataset d --split s --labels l.csv --label class --target age --multilabel a,b --positive a "
    line += "--ignore-unknown-classes --among-labels --mapping m.csv --weights w --bootstrap 50 --seed 2 --quiet --json"
    answer = call("evaluate", "bundle", store.path, *line.split())
    assert json.loads(answer.out) == {"measured": 1}
    opened = called.given.pop("store")
    assert isinstance(opened, FeatureStore)
    assert Path(opened.path) == store.path
    assert called.given == {
        "bundle": "bundle", "dataset": "d", "split": "s", "labels": "l.csv", "label": "class", "group": None,
        "split_column": None, "target": "age", "multilabel": ("a", "b"), "positive": "a", "ignore_unknown_classes": True,
        "backbone": None, "weights": "w", "mapping": "m.csv", "among_labels": True, "bootstrap": 50, "seed": 2, "silent": True,
    }  # fmt: skip


def test_the_exit_code_is_the_records(command, call):
    for place, line in ((EXTRACT, "extract x --store y"), (PREDICT, "predict x y --to z.csv")):
        command(place, {"exit_code": 3})
        assert call(*line.split(), "--json").code == 3
    command(DEPTH, {"provenance": {"exit_code": 3}})
    assert call("depth", "x", "--json").code == 3


def test_comparisons_remember_how_they_were_called(command, call, monkeypatch):
    called = command(DEPTH, {})
    monkeypatch.setattr("sys.argv", ["/somewhere/featurepipe", "depth", "my photos"])
    call("depth", "my photos", "--json")
    assert called.given["command"] == "featurepipe depth 'my photos'"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train kept --out b --set C", "--set 'C' is no NAME=VALUE"),
        ("extract x --store y --time-budget soon", "'soon' is no duration; give seconds or text such as '90s'"),
        ("extract x --store y --time-budget 400d", "'400d' is too long: a run, or a wait, is of 366 days at most"),
        ("extract x --store y --time-budget 0", "'0' is no duration"),
        ("runs kept --last 0", "'0' is no number from 1"),
        ("runs kept --last some", "'some' is no number from 1"),
    ],
)
def test_mistakes_are_refused_before_the_command(line, message, call):
    answer = call(*line.split())
    assert (answer.code, answer.out) == (2, "")
    assert message in answer.err


def test_text_or_one_document(command, texts, call):
    command(EXTRACT, {"dataset": "é"})
    texts("featurepipe.extraction.text:text")
    texts("featurepipe.extraction.text:estimate_text")
    assert call("extract", "x", "--store", "y").out == "text of {'dataset': 'é'}\n"
    assert call("extract", "x", "--store", "y", "--dry-run").out == "estimate_text of {'dataset': 'é'}\n"
    assert call("extract", "x", "--store", "y", "--json").out == '{\n  "dataset": "\\u00e9"\n}\n'
