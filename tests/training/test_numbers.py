"""Numbers from end to end: trained, kept in a bundle with its prediction interval, evaluated and predicted."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import ks_2samp, wasserstein_distance
from sklearn.linear_model import Ridge
from sklearn.metrics import mean_absolute_error, r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from featurepipe.errors import UsageError
from featurepipe.evaluation.evaluate import evaluate
from featurepipe.evaluation.text import text as evaluation_text
from featurepipe.heads.bundle.bundle import read_bundle
from featurepipe.heads.bundle.text import bundle_text, describe_bundle
from featurepipe.heads.families import FAMILIES
from featurepipe.monitoring.drift import drift
from featurepipe.monitoring.text import drift_text
from featurepipe.prediction.from_store import predict_features
from featurepipe.reporting.from_store import report
from featurepipe.training.splits import BINS, quantile_bins
from featurepipe.training.text import cost_text, train_text
from featurepipe.training.train import train

NODES = ["a:gap", "b:gap"]
QUICK = {"xgboost": {"n_estimators": 30, "max_depth": 3, "n_jobs": 1}}


def ages(rows, *, missing=()):
    """Numbers that follow from the features but for noise of deviation 2, as a labels file has them."""
    noise = np.random.default_rng(0).normal(0, 2, len(rows))
    values = [50 + 10 * float(row.features() @ [1, -1, 0.5]) + error for row, error in zip(rows, noise, strict=True)]
    texts = ["" if place in missing else repr(float(value)) for place, value in enumerate(values)]
    patients = [f"p{place // 4}" for place in range(len(rows))]
    return pa.table({"id": [row.id for row in rows], "age": texts, "patient": patients}), np.array(values)


@pytest.fixture
def dated(zoo):
    """A dataset with splits, its labels file, and the true numbers of its test images."""
    rows = [*zoo.images("train", 60), *zoo.images("val", 20), *zoo.images("test", 40)]
    zoo.write(rows)
    table, values = ages(rows, missing=[0, 250])
    return zoo, table, values


@pytest.fixture
def run(tmp_path):
    def run_(zoo, **options):
        options = {"nodes": NODES, "out": tmp_path / "bundle", "silent": True, "target": "age", **options}
        return train(zoo.store, **options)

    return run_


def test_the_head_is_ridge_on_all_training_rows_and_its_errors_are_scikit_learns(dated, run, tmp_path):
    zoo, table, values = dated
    record = run(zoo, labels=table, params={"alpha": 3.0})
    features = zoo.features()
    x, split = features.read(np.float32), features.splits
    known = np.arange(len(values)) != 0
    expected = make_pipeline(StandardScaler(), Ridge(3.0)).fit(
        x[(split == "train") & known], values[(split == "train") & known]
    )
    bundle = read_bundle(tmp_path / "bundle")
    test = split == "test"
    np.testing.assert_allclose(bundle.numbers(features.take(test)), expected.predict(x[test]), rtol=0, atol=1e-4)
    known = test & (np.arange(len(values)) != 250)
    assert record["head"] == "ridge"
    assert record["classes"] == {}
    assert record["counts"] == {
        "train": 179,
        "validation": 60,
        "test": 119,
        "unlabelled": 2,
        "rejected": 0,
        "duplicates": 0,
    }
    assert record["test"]["mae"]["value"] == pytest.approx(
        mean_absolute_error(values[known], expected.predict(x[known])), rel=1e-5
    )
    assert record["test"]["r2"]["value"] == pytest.approx(r2_score(values[known], expected.predict(x[known])), rel=1e-5)
    assert record["test"]["r2"]["value"] > 0.9
    assert bundle.metrics["test"]["rmse"] == record["test"]["rmse"]


def test_the_interval_is_from_validation_rows_the_head_had_not_seen(dated, run, tmp_path):
    zoo, table, values = dated
    record = run(zoo, labels=table, params={"alpha": 3.0})
    bundle, features = read_bundle(tmp_path / "bundle"), zoo.features()
    val = features.splits == "val"
    residuals = np.sort(np.abs(bundle.numbers(features.take(val)) - values[val]))
    assert record["calibration"] == {
        "level": 0.9,
        "half_width": pytest.approx(residuals[55 - 1], rel=1e-6),
        "images": 60,
        "refitted": False,
    }
    assert bundle.target == {"type": "continuous", "column": "age", "interval": record["calibration"]}
    assert record["test"]["coverage"]["value"] == pytest.approx(0.9, abs=0.1)
    run(zoo, labels=table, calibration=False)
    assert read_bundle(tmp_path / "bundle").half_width is None


@pytest.mark.parametrize("name", FAMILIES["continuous"])
def test_every_family_is_tuned_kept_and_read_again(dated, run, tmp_path, name):
    zoo, table, _ = dated
    tune = name in {"ridge", "knn"}
    record = run(zoo, labels=table, head=name, params=QUICK.get(name), tune=tune, pca=2)
    bundle = read_bundle(tmp_path / "bundle")
    assert bundle.classes == ()
    assert record["test"]["r2"]["value"] > 0.3
    assert json.loads(json.dumps(describe_bundle(bundle)))["target"]["column"] == "age"
    assert "the number age" in bundle_text(bundle)
    if tune:
        trials = record["search"]["trials"]
        best = min(trials, key=lambda trial: trial["rmse"])
        assert {name: best["params"][name] for name in best["params"]} == record["search"]["best"]
        assert "validation RMSE" in train_text(record)


def test_trees_learn_in_a_search_how_many_to_grow(dated, run):
    zoo, table, _ = dated
    fixed = {"max_depth": 3, "min_child_weight": 1.0, "n_estimators": 60, "colsample_bytree": 1.0, "n_jobs": 1}
    record = run(zoo, labels=table, head="xgboost", params=fixed, tune=True)
    assert record["search"]["trials"][0]["rmse"] < 8
    fixed.pop("n_estimators")
    record = run(zoo, labels=table, head="xgboost", params=fixed, tune=True)
    assert 5 < record["search"]["best"]["n_estimators"] < 1000


def test_blocks_give_what_memory_gives(dated, run, tmp_path, monkeypatch):
    zoo, table, _ = dated
    run(zoo, labels=table, params={"alpha": 3.0})
    here = read_bundle(tmp_path / "bundle").numbers(zoo.features())
    monkeypatch.setattr("featurepipe.training.cost.SMALL_VALUES", 0)
    record = run(zoo, labels=table, params={"alpha": 3.0}, tune=False)
    assert record["cost"]["solver"] == "blocks"
    np.testing.assert_allclose(read_bundle(tmp_path / "bundle").numbers(zoo.features()), here, rtol=0, atol=1e-4)
    assert run(zoo, labels=table, tune=True)["search"]["best"]["alpha"] < 100


def test_without_splits_patients_stay_on_one_side_and_intervals_count_them(zoo, run):
    rows = zoo.images(None, 200)
    zoo.write(rows)
    table, _ = ages(rows)
    record = run(zoo, labels=table, group="patient")
    assert record["counts"]["test"] % 4 == 0
    assert record["test"]["groups"] == record["counts"]["test"] // 4
    assert record["calibration"]["groups"] == record["calibration"]["images"] // 4


def test_of_few_images_or_groups_enough_are_set_aside_for_intervals(zoo, run):
    rows = zoo.images(None, 140)
    zoo.write(rows)
    record = run(zoo, labels=ages(rows)[0], group="patient")
    assert record["groups"]["train"] == 84  # a tenth are 8, of 9 that intervals need
    assert record["calibration"]["groups"] in range(9, 12)
    assert record["groups"]["validation"] == record["calibration"]["groups"]
    some = zoo.images(None, 13)
    zoo.write(some, name="some")
    record = run(zoo, dataset="some", labels=ages(some)[0])
    assert record["calibration"]["images"] in range(9, 12)  # of 31 or so: a third
    assert "groups" not in record["calibration"]


def test_advice_for_intervals_fits_what_lacks(zoo, run, capsys):
    few = zoo.images(None, 8)
    zoo.write(few, name="few")
    record = run(zoo, dataset="few", labels=ages(few)[0], silent=False)
    assert record["calibration"] is None
    assert "no prediction intervals" in train_text(record)
    advice = r"\d validation images are too few for prediction intervals, which need 9: there are none; give more images, 27 or "
    assert re.search(advice + "more to train on, or a split val with 9 images or more", capsys.readouterr().err)
    rows = zoo.images(None, 30)
    zoo.write(rows, name="grouped")
    record = run(zoo, dataset="grouped", labels=ages(rows)[0], group="patient", silent=False)
    assert record["calibration"] is None
    advice = r"\d groups of validation images are too few for prediction intervals, which need 9: there are none; give images of "
    assert re.search(
        advice + "more groups, 27 or more to train on, or a split val with 9 groups or more", capsys.readouterr().err
    )
    rows = [*zoo.images("train", 40), *zoo.images("val", 2)]
    zoo.write(rows, name="split")
    record = run(zoo, dataset="split", labels=ages(rows)[0], silent=False)
    assert record["calibration"] is None
    told = "there are none; give more images, or a split val with 9 images or more"
    assert told in capsys.readouterr().err


def test_evaluate_finds_the_column_and_measures_again(dated, run, tmp_path):
    zoo, table, _ = dated
    record = run(zoo, labels=table)
    found = evaluate(tmp_path / "bundle", zoo.store, labels=table, silent=True)
    assert found["metrics"]["mae"] == record["test"]["mae"]
    assert found["counts"]["scored"] == 119
    assert found["counts"]["unlabelled"] == 1
    assert found["leakage"]["trained_on"]["images"] == 0
    json.dumps(found, allow_nan=False)
    shown = evaluation_text(found)
    assert "mean absolute error" in shown
    assert "the 10 largest errors" in shown
    assert "90 % of new numbers are within" in shown
    renamed = table.rename_columns(["id", "years", "patient"])
    assert (
        evaluate(tmp_path / "bundle", zoo.store, labels=renamed, target="years", silent=True)["metrics"]
        == found["metrics"]
    )
    seen = evaluate(tmp_path / "bundle", zoo.store, labels=table, split="train", silent=True)
    assert seen["leakage"]["trained_on"]["images"] == 179
    assert "WARNING: the head was trained on 179 of these images" in evaluation_text(seen)
    with pytest.raises(UsageError, match="age"):
        evaluate(tmp_path / "bundle", zoo.store, silent=True)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_predictions_have_their_limits(dated, run, tmp_path, suffix):
    zoo, table, _ = dated
    rows = [*zoo.images("new", 5), zoo.image("broken.png", "cat-x", None, is_usable=False)]
    run(zoo, labels=table)
    zoo.write(rows, name="new")
    bundle, file = read_bundle(tmp_path / "bundle"), tmp_path / f"new.{suffix}"
    found = predict_features(bundle, zoo.store, file, dataset="new", silent=True)
    expected = bundle.numbers(zoo.features("new"))
    assert found["counts"] == {"images": 16, "predicted": 15, "rejected": 1}
    assert found["labels"] == {}
    assert found["numbers"] == pytest.approx(
        {"mean": expected.mean(), "least": expected.min(), "greatest": expected.max()}
    )
    if suffix == "csv":
        written = pa.csv.read_csv(file).to_pylist()
    elif suffix == "jsonl":
        written = [json.loads(line) for line in file.read_text().splitlines()]
    else:
        written = pq.read_table(file).to_pylist()
    assert [row["id"] for row in written] == [row.id for row in rows]
    assert [row["predicted"] for row in written[:-1]] == pytest.approx(expected.tolist(), rel=1e-12)
    assert [row["low"] for row in written[:-1]] == pytest.approx((expected - bundle.half_width).tolist())
    assert [row["high"] for row in written[:-1]] == pytest.approx((expected + bundle.half_width).tolist())
    assert (written[-1]["predicted"], written[-1]["reason"]) == (None, "truncated: ends early")


def test_labels_that_are_numbers_are_a_target_of_that_name(zoo, run):
    rows = [zoo.image(f"{i}.png", f"cat-{i}", f"{20 + i / 7:.3f}") for i in range(60)]
    zoo.write(rows)
    with pytest.raises(
        UsageError, match=r"numbers to be estimated \(regression\).*train estimates them with target='label'"
    ):
        run(zoo, target=None)
    record = run(zoo, target="label", dry_run=True)
    assert record["target"]["greatest"] <= 20 + 59 / 7 + 1e-3
    assert "numbers from" in cost_text(record)


def test_what_cannot_be_is_refused_by_name(dated, run, tmp_path):
    zoo, table, _ = dated
    same = table.set_column(1, "age", pa.array(["7.5"] * len(table)))
    for options, message in (
        ({"labels": same}, r"all 180 training images have the number 7.5 in target='age'"),
        (
            {"target": "patient"},
            r"'p0' for image 'train/cat/2.png' and 357 more, which are no finite numbers; leave it empty",
        ),
        ({"target": "aeg"}, r"unknown column 'aeg'; there are age, patient"),
        ({"head": "lda"}, r"head 'lda' learns multiclass targets, not continuous ones; heads that do: ridge"),
        ({"class_weight": "balanced"}, r"class_weight weighs classes, and a target is a number"),
        ({"min_class_size": 5}, r"min_class_size is about classes"),
        ({"label": "patient"}, r"label and target are two kinds of target"),
        ({"nodes": "recommended"}, r"not been compared"),
    ):
        with pytest.raises(UsageError, match=message):
            run(zoo, **{"labels": table, **options})
    with pytest.raises(UsageError, match=r"head 'kernel-ridge' learns continuous targets, not multiclass ones"):
        run(zoo, target=None, head="kernel-ridge")
    run(zoo, labels=table)
    page = report(zoo.store, tmp_path / "page.html", bundle=tmp_path / "bundle", labels=table, silent=True)
    assert "Its predictions are off by" in page.read_text(encoding="utf-8")


def test_training_again_is_for_changed_numbers_only(dated, run):
    zoo, table, _ = dated
    run(zoo, labels=table)
    assert "skipped" in run(zoo, labels=table, if_changed=True)
    ages = table["age"].to_pylist()
    changed = table.set_column(1, "age", pa.array([ages[0], "12.5", *ages[2:]]))
    assert run(zoo, labels=changed, if_changed=True)["why"] == [
        "its images or their labels changed: 239 to learn from, 239 before"
    ]


def test_quantile_bins_hold_equally_many_and_keep_equals_together():
    numbers = np.random.default_rng(0).normal(size=1000)
    assert np.bincount(quantile_bins(numbers)).tolist() == [100] * BINS
    assert quantile_bins(np.array([1.0, 1, 1, 1, 2])).tolist() == [0, 0, 0, 0, 1]
    assert quantile_bins(np.array([3.0])).tolist() == [0]


def test_evaluate_counts_the_rejects_of_what_it_scores(dated, run, tmp_path):
    zoo, table, _ = dated
    run(zoo, labels=table)
    rows = [*zoo.images("train", 60), *zoo.images("val", 20), *zoo.images("test", 40)]
    zoo.write([*rows, zoo.image("train/broken.png", "broken", "cat", "train", is_usable=False)])
    counts = [
        evaluate(tmp_path / "bundle", zoo.store, labels=table, split=split, silent=True)["counts"]["rejected"]
        for split in ("test", "train", "all")
    ]
    assert counts == [0, 1, 1]


def test_drift_compares_predicted_numbers(dated, run, tmp_path):
    zoo, table, _ = dated
    run(zoo, labels=table)
    bundle = read_bundle(tmp_path / "bundle")
    rows = [*zoo.images("train", 60), *zoo.images("val", 20), *zoo.images("test", 40)]
    zoo.write([*rows, *zoo.images("same", 20)])
    calm = drift(zoo.store, bundle=bundle, silent=True)
    assert (calm["verdict"], calm["classes"], calm["labels"]) == ("no drift", None, None)
    zoo.write([*rows, *(image for image in zoo.images("new", 40) if image.label == "emu")])
    shifted = drift(zoo.store, bundle=bundle, reference="first", silent=True)
    numbers, features = shifted["numbers"], zoo.features()
    new = np.array([name.startswith("new") for name in features.ids])
    before, after = (bundle.numbers(features.take(side)) for side in (~new, new))
    assert (numbers["target"], numbers["compared"]) == ("age", {"reference": len(before), "new": 40})
    assert numbers["ks"] == pytest.approx(ks_2samp(before, after).statistic)
    assert numbers["wasserstein"] == pytest.approx(wasserstein_distance(before, after))
    assert numbers["change"]["value"] == pytest.approx(after.mean() - before.mean())
    assert numbers["change"]["low"] < numbers["change"]["value"] < numbers["change"]["high"]
    middle = numbers["quantiles"][2]
    assert (middle["reference"], middle["new"]) == pytest.approx((np.median(before), np.median(after)))
    assert numbers["adjusted"] < 0.01
    assert shifted["verdict"] == "warning"
    json.dumps(shifted, allow_nan=False)
    assert "the mean of age changed by" in drift_text(shifted)
