"""Several labels from end to end: trained, kept in a bundle with sigmoids and thresholds, evaluated and predicted."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, recall_score, roc_auc_score
from sklearn.preprocessing import StandardScaler

from featurepipe.errors import BundleError, UsageError
from featurepipe.evaluation.evaluate import evaluate
from featurepipe.evaluation.text import text as evaluation_text
from featurepipe.heads.bundle.bundle import read_bundle, write_bundle
from featurepipe.heads.bundle.text import bundle_text, describe_bundle, labels_calibration_text
from featurepipe.heads.calibration import calibrated_labels
from featurepipe.heads.families import FAMILIES, make_head
from featurepipe.heads.label_calibration import label_calibration_errors
from featurepipe.heads.multilabel import VOC07, unit_rows, voc07_head
from featurepipe.heads.sampling import fold_numbers
from featurepipe.heads.statistics.comparison import holm
from featurepipe.heads.statistics.multilabel import average_precisions
from featurepipe.monitoring.drift import drift
from featurepipe.monitoring.text import drift_text
from featurepipe.prediction.from_store import predict_features
from featurepipe.reporting.from_store import report
from featurepipe.training import fit as fit_module
from featurepipe.training import splits
from featurepipe.training.splits import rarest_labels
from featurepipe.training.text import cost_text, train_text
from featurepipe.training.train import train

NODES = ["a:gap", "b:gap"]
NAMES = ["big", "red", "soft"]


def findings(rows, *, unknown=0.15, seed=0):
    """Labels that follow from the features but for noise, as a labels file has them: a column of 0 and 1 for each."""
    rng = np.random.default_rng(seed)
    scores = np.array([row.features() for row in rows]) @ [[1, -1, 0.5], [0.5, 1, -1], [-1, 0.2, 1]]
    scores += 0.5 * rng.standard_normal(scores.shape)
    values = (scores > [0, 0.5, 1]).astype(float)
    values[rng.random(values.shape) < unknown] = np.nan
    texts = [["" if np.isnan(value) else str(int(value)) for value in column] for column in values.T]
    columns = dict(zip(NAMES, texts, strict=True))
    patients = [f"p{place // 4}" for place in range(len(rows))]
    return pa.table({"id": [row.id for row in rows], **columns, "patient": patients}), values


@pytest.fixture
def found(zoo):
    """A dataset with splits, its labels file, and the labels."""
    rows = [*zoo.images("train", 60), *zoo.images("val", 20), *zoo.images("test", 40)]
    zoo.write(rows)
    return zoo, *findings(rows)


@pytest.fixture
def run(tmp_path):
    def run_(zoo, **options):
        options = {"nodes": NODES, "out": tmp_path / "bundle", "silent": True, "multilabel": NAMES, **options}
        return train(zoo.store, **options)

    return run_


def test_each_label_is_scikit_learns_on_its_known_training_rows(found, run, tmp_path):
    zoo, table, values = found
    record = run(zoo, labels=table, params={"C": 0.5})
    bundle, features = read_bundle(tmp_path / "bundle"), zoo.features()
    x, split = features.read(np.float32), features.splits
    labelled = ~np.isnan(values).all(axis=1)  # an image of which nothing is known is left out
    rows, test = (split == "train") & labelled, (split == "test") & labelled
    scaler = StandardScaler().fit(x[rows])
    scores = bundle.scores(features.take(test))
    for label in range(3):
        known = rows & ~np.isnan(values[:, label])
        head = LogisticRegression(C=0.5, tol=1e-7, max_iter=1000)
        head.fit(scaler.transform(x[known]), values[known, label])
        np.testing.assert_allclose(
            scores[:, label], head.decision_function(scaler.transform(x[test])), rtol=1e-2, atol=2e-2
        )
    assert (record["head"], record["classes"]) == ("logistic", {})
    assert record["multilabel"]["red"] == {
        "positive": int((values[rows, 1] == 1).sum()),
        "negative": int((values[rows, 1] == 0).sum()),
        "unknown": int(np.isnan(values[rows, 1]).sum()),
    }
    expected = average_precisions(scores, values[test])
    assert [entry["ap"]["value"] for entry in record["test"]["per_label"]] == pytest.approx(expected.tolist())
    assert record["test"]["map"]["value"] == pytest.approx(expected.mean())
    assert record["test"]["map"]["value"] > 0.7
    assert bundle.metrics["test"]["map"] == record["test"]["map"]
    assert bundle.classes == tuple(NAMES)
    assert "mean average precision" in train_text(record)
    assert "entries unknown" in cost_text(run(zoo, labels=table, dry_run=True))


def test_sigmoids_and_thresholds_are_from_validation_rows(found, run, tmp_path):
    zoo, table, values = found
    record = run(zoo, labels=table)
    bundle, features = read_bundle(tmp_path / "bundle"), zoo.features()
    assert bundle.target == {"type": "multilabel", "columns": NAMES, "calibration": record["calibration"]}
    assert record["calibration"]["images"] == 60
    assert record["calibration"]["uncalibrated"] == []
    scores, probabilities = bundle.scores(features), bundle.probabilities(features)
    slopes, offsets = (np.array(record["calibration"][name]) for name in ("slopes", "offsets"))
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-(scores * slopes + offsets))))
    assert (bundle.predict(features) == (scores > record["calibration"]["thresholds"])).all()
    val = features.splits == "val"
    known = ~np.isnan(values[val])
    assert np.mean(probabilities[val][known]) == pytest.approx(np.mean(values[val][known]), abs=0.05)
    assert "a probability and a threshold (largest F1) for each label from 60 validation images" in bundle_text(bundle)
    run(zoo, labels=table, calibration=False)
    plain = read_bundle(tmp_path / "bundle")
    assert plain.target["calibration"] is None
    assert (plain.predict(features) == (plain.probabilities(features) > 0.5)).all()


def test_without_val_all_of_few_training_rows_calibrate_out_of_fold(found, run, monkeypatch, capsys):
    zoo, table, _ = found
    seen = {}

    def spied(scores, truth, *given, **named):
        seen.update(scores=scores, truth=truth)
        return calibrated_labels(scores, truth, *given, **named)

    monkeypatch.setattr(fit_module, "calibrated_labels", spied)
    options = {"labels": table, "split_column": "none", "head": "knn", "params": {"n_neighbors": 1}}
    record = run(zoo, **options, silent=False)
    count = record["counts"]["train"]
    assert record["calibration"]["images"] == len(seen["truth"]) == count
    assert f"; all {count} training images calibrate, in 5 folds" in record["split"]
    positives = {name: counts["positive"] for name, counts in record["multilabel"].items()}
    assert dict(zip(NAMES, (seen["truth"] == 1).sum(axis=0).tolist(), strict=True)) == positives
    known = ~np.isnan(seen["truth"])
    right = ((seen["scores"] > 0) == (seen["truth"] == 1))[known].mean()
    assert 0.5 < right < 0.99  # its own nearest neighbour, a training row would be right always
    said = capsys.readouterr().err
    few = sorted((count, name) for name, count in positives.items() if count < fit_module.ENOUGH_POSITIVES)
    assert ("take it as rough" in said) == bool(few)
    monkeypatch.setattr(splits, "MOST_CROSSED", count - 1)
    record = run(zoo, **options)
    assert record["calibration"]["images"] == record["counts"]["validation"] < count / 5
    assert "training images set aside to calibrate" in record["split"]


def test_labels_of_few_validation_images_are_named_as_rough(found, run, monkeypatch, capsys):
    zoo, table, values = found
    val = values[zoo.features().splits == "val"]
    counts = dict(zip(NAMES, (val == 1).sum(axis=0).tolist(), strict=True))
    monkeypatch.setattr(fit_module, "ENOUGH_POSITIVES", min(counts.values()) + 1)
    run(zoo, labels=table, silent=False)
    name = min(counts, key=counts.__getitem__)
    told = f"1 label has a threshold from fewer than {counts[name] + 1} validation images that have it, so take it as rough"
    assert f"{told}: {name} {counts[name]}" in capsys.readouterr().err


def test_labels_without_both_sides_among_validation_rows_are_named(found, run, capsys):
    zoo, table, values = found
    split = zoo.features().splits
    texts = np.array(table["soft"].to_pylist(), object)
    texts[(split == "val") & (values[:, 2] == 1)] = ""
    changed = table.set_column(3, "soft", pa.array(texts.tolist()))
    record = run(zoo, labels=changed, silent=False)
    assert record["calibration"]["uncalibrated"] == ["soft"]
    assert record["calibration"]["slopes"][2] == 1
    assert "1 label has no validation images of both sides, and no calibration: soft" in capsys.readouterr().err


def validated(zoo, values, head="logistic", **params):
    """What a head fitted on the training rows alone says of the validation rows: scores, and the labels."""
    features = zoo.features()
    x, split = features.read(np.float32), features.splits
    train_rows, val = split == "train", split == "val"
    train_rows &= ~np.isnan(values).all(axis=1)
    val &= ~np.isnan(values).all(axis=1)
    fitted = make_head(head, target_type="multilabel", **params).fit(x[train_rows], values[train_rows])
    return fitted.decision_function(x[val]), values[val]


@pytest.mark.parametrize("calibration", [True, False])
def test_each_labels_threshold_is_the_highest_that_reaches_the_recall_on_validation_images(
    found, run, tmp_path, calibration
):
    zoo, table, values = found
    record = run(zoo, labels=table, threshold="recall=0.9", calibration=calibration)
    scores, truth = validated(zoo, values)
    kept = record["calibration"]
    for k, entry in enumerate(kept["per_label"]):
        known, have = ~np.isnan(truth[:, k]), truth[:, k] == 1
        best = max(t for t in scores[:, k] if (scores[have, k] >= t).mean() >= 0.9)
        above = scores[known, k] > kept["thresholds"][k]
        assert (above == (scores[known, k] >= best)).all()
        assert kept["thresholds"][k] == pytest.approx(best, abs=1e-4)
        assert entry["sensitivity"]["value"] == recall_score(have[known], above)
        assert entry["specificity"]["value"] == recall_score(~have[known], ~above)
        assert entry["sensitivity"]["low"] < entry["sensitivity"]["value"] < entry["sensitivity"]["high"]
    assert (kept["rule"], kept["margin"], kept["few"], kept["unreached"]) == ("recall=0.9", False, [], [])
    assert kept["uncalibrated"] == ([] if calibration else NAMES)
    bundle = read_bundle(tmp_path / "bundle")
    assert bundle.target["calibration"] == kept
    assert bundle.thresholds.tolist() == kept["thresholds"]
    expected = bundle.scores(zoo.features()) > kept["thresholds"]
    assert predict_features(bundle, zoo.store, silent=True)["labels"] == dict(
        zip(NAMES, expected.sum(axis=0).tolist(), strict=True)
    )
    measured = evaluate(bundle, zoo.store, labels=table, silent=True)
    assert [one["threshold"] for one in measured["metrics"]["per_label"]] == kept["thresholds"]
    what = "a probability and a threshold" if calibration else "a threshold"
    for said in (train_text(record), bundle_text(bundle), evaluation_text(measured)):
        assert f"{what} (recall=0.9) for each label from 60 validation images" in said
    assert "false alarms" in train_text(record)
    json.dumps(record, allow_nan=False)


def test_the_default_is_the_largest_f1_and_other_rules_are_taken(found, run, capsys):
    zoo, table, values = found
    plain = run(zoo, labels=table)["calibration"]
    assert run(zoo, labels=table, threshold="f1")["calibration"] == plain
    assert plain["rule"] == "f1"
    scores, truth = validated(zoo, values)
    for k, threshold in enumerate(plain["thresholds"]):
        known = ~np.isnan(truth[:, k])
        own, have = scores[known, k], truth[known, k]
        best = max(f1_score(have, own >= t) for t in own)
        assert f1_score(have, own > threshold) == best
    costly = run(zoo, labels=table, threshold="cost=20:1")["calibration"]
    for k, threshold in enumerate(costly["thresholds"]):
        own, have = scores[~np.isnan(truth[:, k]), k], truth[~np.isnan(truth[:, k]), k] == 1
        costs = [20 * (have & ~above).sum() + (~have & above).sum() for above in [own >= t for t in own]]
        assert 20 * (have & (own <= threshold)).sum() + (~have & (own > threshold)).sum() == min(costs)
    wanted = run(zoo, labels=table, threshold="precision>=0.99", threshold_margin=True, silent=False)["calibration"]
    assert wanted["unreached"] == NAMES
    assert "WARNING: 3 labels do not reach precision>=0.99 on the validation images" in capsys.readouterr().err
    assert "WARNING: not reached for 3 (big, red, soft)" in labels_calibration_text(wanted)


def test_labels_with_few_validation_images_fall_back_to_a_half(found, run, tmp_path, capsys):
    zoo, table, values = found
    have = np.flatnonzero((zoo.features().splits == "val") & (values[:, 2] == 1))
    texts = np.array(table["soft"].to_pylist(), object)
    texts[have[4:]] = ""
    changed = table.set_column(3, "soft", pa.array(texts.tolist()))
    kept = run(zoo, labels=changed, threshold="recall=0.9", silent=False)["calibration"]
    assert kept["few"] == ["soft"]
    assert kept["per_label"][2]["reason"].startswith("4 validation images with it and")
    bundle = read_bundle(tmp_path / "bundle")
    assert bundle.label_probabilities(bundle.thresholds[None])[0, 2] == pytest.approx(0.5)
    said = capsys.readouterr().err
    assert "1 label has fewer than 5 validation images of a side" in said
    assert "theirs is a probability of 0.5: soft" in said
    assert "of 1 (soft) the threshold is a probability of 0.5" in bundle_text(bundle)


def test_groups_widen_what_a_labels_threshold_reaches(found, run):
    zoo, table, _ = found
    alone = run(zoo, labels=table, threshold="recall=0.8", group="none")["calibration"]["per_label"]
    grouped = run(zoo, labels=table, threshold="recall=0.8", group="patient")["calibration"]["per_label"]
    for one, other in zip(alone, grouped, strict=True):
        assert other["sensitivity"]["value"] == one["sensitivity"]["value"]
    assert sum(one["sensitivity"]["low"] for one in grouped) < sum(one["sensitivity"]["low"] for one in alone)


def test_a_label_that_is_looked_for_is_measured_as_a_class_is(found, run, tmp_path):
    zoo, table, values = found
    record = run(zoo, labels=table, positive="red", threshold="recall=0.9")
    bundle, features = read_bundle(tmp_path / "bundle"), zoo.features()
    assert bundle.looked_for == "red"
    test = (features.splits == "test") & ~np.isnan(values[:, 1])
    called = bundle.scores(features.take(test))[:, 1] > bundle.thresholds[1]
    likely, have = bundle.probabilities(features.take(test))[:, 1], values[test, 1] == 1
    screened = record["test"]["screening"]
    assert (screened["positive"], screened["images"], screened["chosen"]) == ("red", int(test.sum()), True)
    assert screened["sensitivity"]["value"] == recall_score(have, called)
    assert screened["specificity"]["value"] == recall_score(~have, ~called)
    assert screened["auc"]["value"] == pytest.approx(roc_auc_score(have, likely))
    assert ((likely >= screened["threshold"]) == called).mean() > 0.99
    measured = evaluate(bundle, zoo.store, labels=table, silent=True)
    everything = measured["metrics"]["screening"]
    assert {name: everything[name] for name in screened} == screened
    assert {"roc", "precision_recall", "reliability"} == everything.keys() - screened.keys()
    assert everything["roc"]["y"][-1] == 1
    assert all(
        low <= y <= high for low, y, high in zip(*(everything["roc"][n] for n in ("low", "y", "high")), strict=True)
    )
    assert f"looking for red ({have.sum()} of {test.sum()} images), from a probability of" in evaluation_text(measured)
    other = evaluate(bundle, zoo.store, labels=table, positive="big", silent=True)["metrics"]["screening"]
    assert (other["positive"], other["positives"]) == ("big", int((values[features.splits == "test", 0] == 1).sum()))
    with pytest.raises(UsageError, match="unknown label 'reed' in the bundle; nearest: red"):
        evaluate(bundle, zoo.store, labels=table, positive="reed", silent=True)
    assert "looking for red:" in train_text(record)
    assert "looking for red:" in bundle_text(bundle)
    with pytest.raises(UsageError, match="unknown label 'reed'; nearest: red"):
        run(zoo, labels=table, positive="reed")
    with pytest.raises(BundleError, match="it looks for 'blue', which is none of its labels"):
        write_bundle(tmp_path / "wrong", replace(bundle, target={**bundle.target, "positive": "blue"}))


def test_calibration_brings_each_labels_probability_nearer_to_how_often_it_is_present(zoo, run, tmp_path):
    rows = [*zoo.images("train", 100), *zoo.images("val", 100), *zoo.images("test", 200)]
    zoo.write(rows)
    table, values = findings(rows, unknown=0.1)
    run(zoo, labels=table, head="ridge", params={"alpha": 300.0})  # whose scores, between -1 and 1, are no log-odds
    bundle, features = read_bundle(tmp_path / "bundle"), zoo.features()
    test = features.splits == "test"
    scores = bundle.scores(features.take(test))
    likely = 1 / (1 + np.exp(-scores)), bundle.label_probabilities(scores)
    found = [label_calibration_errors(one, values[test], draws=200) for one in likely]
    before, after = (np.array([entry["value"] for entry in one]) for one in found)
    assert (after < 0.6 * before).all()
    assert (before > 0.1).all()
    k = 1
    known = ~np.isnan(values[test, k])
    likely, have = bundle.label_probabilities(scores)[known, k], values[test, k][known]
    places = np.ceil(likely * 15).astype(int)
    own = sum(abs((have - likely)[places == place].sum()) for place in range(1, 16)) / len(likely)
    assert after[k] == pytest.approx(own)
    assert all(entry["low"] <= entry["value"] <= entry["high"] for entry in found[1])
    metrics = evaluate(bundle, zoo.store, labels=table, split="test", silent=True)
    assert metrics["metrics"]["per_label"][k]["ece"]["value"] == pytest.approx(own)
    assert "calibration error" in evaluation_text(metrics)
    alone = label_calibration_errors(bundle.label_probabilities(scores), values[test], in_groups=True)[0]
    assert (alone["low"], alone["reason"]) == (None, "no interval: none is known that holds for groups")


@pytest.mark.parametrize("name", FAMILIES["multilabel"])
def test_every_family_is_tuned_kept_and_read_again(found, run, tmp_path, name):
    zoo, table, _ = found
    small = {"learning_rate": 0.3, "max_depth": 3, "n_estimators": 8, "n_jobs": 1} if name == "xgboost" else {}
    record = run(zoo, labels=table, head=name, tune=True, pca=2, params=small)
    bundle = read_bundle(tmp_path / "bundle")
    assert record["test"]["map"]["value"] > 0.6
    assert json.loads(json.dumps(describe_bundle(bundle), allow_nan=False))["classes"] == NAMES
    assert "big, red, soft" in bundle_text(bundle)
    trials = record["search"]["trials"]
    assert all(0 <= trial["map"] <= 1 for trial in trials)
    assert "validation mean average precision" in train_text(record)
    if name in {"logistic", "linear-svm"}:
        assert len(record["search"]["best"]["C"]) == 3
        assert record["params"]["C"] == record["search"]["best"]["C"]
    elif name == "xgboost":
        assert record["search"]["best"]["n_estimators"] <= 8
        assert bundle.head.steps[-1][1].best_iteration_ + 1 == record["params"]["n_estimators"]
    else:
        assert record["search"]["best"] == max(trials, key=lambda trial: trial["map"])["params"]


def test_the_voc07_protocol_is_a_preset(found, run, tmp_path, monkeypatch):
    zoo, table, values = found
    record = run(zoo, labels=table, protocol="voc07")
    assert (record["head"], record["protocol"]) == ("linear-svm", "voc07")
    assert len(record["search"]["trials"]) == len(VOC07["Cs"]) == 11
    assert "3 folds of" in record["search"]["how"]
    features, bundle = zoo.features(), read_bundle(tmp_path / "bundle")
    rows = np.flatnonzero((features.splits == "train") & ~np.isnan(values).all(axis=1))
    x = features.read(np.float32)
    number = fold_numbers(features.keys64[rows], rarest_labels(values.astype(np.float32))[rows], folds=3, seed=0)
    folds = [(np.flatnonzero(number != fold), np.flatnonzero(number == fold)) for fold in range(3)]
    own = voc07_head(x[rows], values[rows], folds=folds, label_names=NAMES)
    assert record["params"]["C"] == own.C.tolist()
    np.testing.assert_allclose(bundle.scores(features), own.decision_function(unit_rows(x)), atol=2e-3)
    assert "protocol voc07" in train_text(record)
    monkeypatch.setattr("featurepipe.training.cost.SMALL_VALUES", 0)
    streamed = run(zoo, labels=table, protocol="voc07")
    assert streamed["cost"]["solver"] == "blocks"
    assert streamed["params"]["C"] == record["params"]["C"]
    np.testing.assert_allclose(read_bundle(tmp_path / "bundle").scores(features), bundle.scores(features), atol=5e-3)
    for options, message in (
        ({"multilabel": None}, "learns several labels: name their columns with multilabel"),
        ({"head": "logistic"}, "is of head linear-svm: leave head='logistic' out"),
        ({"pca": 2}, "says it otherwise: leave pca=2 out"),
    ):
        with pytest.raises(UsageError, match=message):
            run(zoo, **{"labels": table, "protocol": "voc07", **options})


def test_blocks_give_what_memory_gives(found, run, tmp_path, monkeypatch):
    zoo, table, _ = found
    run(zoo, labels=table)
    here = read_bundle(tmp_path / "bundle").scores(zoo.features())
    monkeypatch.setattr("featurepipe.training.cost.SMALL_VALUES", 0)
    record = run(zoo, labels=table)
    assert record["cost"]["solver"] == "blocks"
    np.testing.assert_allclose(read_bundle(tmp_path / "bundle").scores(zoo.features()), here, atol=5e-3)
    assert len(run(zoo, labels=table, tune=True)["search"]["best"]["C"]) == 3


def test_one_column_of_texts_and_groups(zoo, run, tmp_path):
    rows = zoo.images(None, 60)
    zoo.write(rows)
    table, values = findings(rows, unknown=0)
    texts = ["|".join(name for name, value in zip(NAMES, row, strict=True) if value) for row in values]
    listed = pa.table({"id": table["id"], "tags": texts, "patient": table["patient"]})
    record = run(zoo, labels=listed, multilabel="tags", group="patient")
    assert record["test"]["groups"] == record["counts"]["test"] // 4
    assert read_bundle(tmp_path / "bundle").classes == tuple(NAMES)
    again = evaluate(tmp_path / "bundle", zoo.store, labels=listed, group="patient", silent=True)
    assert again["leakage"]["trained_on"]["images"] == 0


def test_evaluate_finds_the_columns_and_measures_again(found, run, tmp_path, capsys):
    zoo, table, _ = found
    record = run(zoo, labels=table)
    found = evaluate(tmp_path / "bundle", zoo.store, labels=table, silent=True)
    assert {name: value for name, value in found["metrics"].items() if name != "curves"} == record["test"]
    assert found["counts"]["scored"] + found["counts"]["unlabelled"] == 120
    json.dumps(found, allow_nan=False)
    shown = evaluation_text(found)
    assert "macro F1" in shown
    assert "3 labels, a probability and a threshold" in shown
    other = table.rename_columns(["id", "big", "blue", "soft", "patient"])
    found = evaluate(tmp_path / "bundle", zoo.store, labels=other, multilabel="big,blue,soft", silent=False)
    said = capsys.readouterr().err
    assert "labels that the bundle does not know, left out: blue" in said
    assert "labels of the bundle of which the columns say nothing, not measured: red" in said
    assert found["metrics"]["unmeasured"] == ["red"]
    assert found["metrics"]["per_label"][0]["ap"]["value"] == record["test"]["per_label"][0]["ap"]["value"]
    with pytest.raises(UsageError, match="multilabel"):
        evaluate(tmp_path / "bundle", zoo.store, silent=True)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_predictions_are_the_labels_above_their_thresholds(found, run, tmp_path, suffix):
    zoo, table, _ = found
    rows = [*zoo.images("new", 5), zoo.image("broken.png", "cat-x", None, is_usable=False)]
    run(zoo, labels=table)
    zoo.write(rows, name="new")
    bundle, file = read_bundle(tmp_path / "bundle"), tmp_path / f"new.{suffix}"
    found = predict_features(bundle, zoo.store, file, dataset="new", silent=True)
    expected, probabilities = bundle.predict(zoo.features("new")), bundle.probabilities(zoo.features("new"))
    names = [[name for name, value in zip(NAMES, row, strict=True) if value] for row in expected]
    assert found["counts"] == {"images": 16, "predicted": 15, "rejected": 1}
    assert found["labels"] == {name: int(n) for name, n in zip(NAMES, expected.sum(axis=0), strict=True) if n}
    if suffix == "csv":
        options = pa.csv.ConvertOptions(strings_can_be_null=False)
        written = pa.csv.read_csv(file, convert_options=options).to_pylist()
    elif suffix == "jsonl":
        written = [json.loads(line) for line in file.read_text().splitlines()]
    else:
        written = pq.read_table(file).to_pylist()
    assert [row["id"] for row in written] == [row.id for row in rows]
    joined = names if suffix == "jsonl" else ["|".join(row) for row in names]
    assert [row["labels"] for row in written[:-1]] == joined
    reds = [row["probabilities"]["red"] if suffix == "jsonl" else row["p(red)"] for row in written[:-1]]
    assert reds == pytest.approx(probabilities[:, 1].tolist(), rel=1e-5)
    assert written[-1]["reason"] == "truncated: ends early"
    assert not written[-1]["labels"]


def test_what_cannot_be_is_refused_by_name(found, run, tmp_path):
    zoo, table, _ = found
    rare = table.set_column(2, "red", pa.array(["1" if place == 3 else "0" for place in range(len(table))]))
    for options, message in (
        (
            {"labels": rare},
            r"1 of 3 labels has fewer than 2 training images on one side, such as 'red': 1 with it, 179 without",
        ),
        ({"target": "red"}, r"two kinds of target"),
        ({"label": "red"}, r"two kinds of target"),
        ({"head": "lda"}, r"head 'lda' learns multiclass targets, not multilabel ones; heads that do: logistic"),
        ({"multilabel": ["big", "reed"]}, r"unknown column 'reed'; there are red, patient, big, soft"),
        ({"nodes": "recommended"}, r"not been compared"),
    ):
        with pytest.raises(UsageError, match=message):
            run(zoo, **{"labels": table, **options})
    record = run(zoo, labels=rare, params={"one_sided": "drop"})
    assert list(record["multilabel"]) == ["big", "soft"]
    run(zoo, labels=table)
    bundle = read_bundle(tmp_path / "bundle")
    with pytest.raises(BundleError, match=r"predicts several labels \(big, red, soft\), no number"):
        bundle.numbers(zoo.features())
    page = report(zoo.store, tmp_path / "page.html", bundle=tmp_path / "bundle", labels=table, silent=True)
    assert "Over 3 labels its mean average precision is" in page.read_text(encoding="utf-8")


def test_training_again_is_for_changed_labels_only(found, run):
    zoo, table, _ = found
    run(zoo, labels=table)
    assert "skipped" in run(zoo, labels=table, if_changed=True)
    texts = table["red"].to_pylist()
    changed = table.set_column(2, "red", pa.array(["0" if texts[0] != "0" else "1", *texts[1:]]))
    assert run(zoo, labels=changed, if_changed=True)["why"] == [
        "its images or their labels changed: 239 to learn from, 239 before"
    ]


def test_images_are_dealt_by_their_rarest_label():
    targets = np.array([[1, 1, 0], [1, 0, np.nan], [0, 0, 0], [1, 0, 1], [1, 0, 1]])
    assert rarest_labels(targets).tolist() == [1, 0, 3, 2, 2]


def test_no_scaling_warns(found, run):
    zoo, table, _ = found
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(zoo, labels=table, head="ridge")


def test_drift_compares_the_rate_of_each_predicted_label(found, run, tmp_path):
    zoo, table, _ = found
    run(zoo, labels=table)
    bundle = read_bundle(tmp_path / "bundle")
    rows = [*zoo.images("train", 60), *zoo.images("val", 20), *zoo.images("test", 40)]
    zoo.write([*rows, *zoo.images("same", 20)])
    calm = drift(zoo.store, bundle=bundle, silent=True)
    assert (calm["verdict"], calm["classes"], calm["numbers"]) == ("no drift", None, None)
    assert "no drift" in drift_text(calm)
    zoo.write([*rows, *(image for image in zoo.images("new", 40) if image.label == "emu")])
    shifted = drift(zoo.store, bundle=bundle, reference="first", fail=0.001, silent=True)
    assert (shifted["verdict"], shifted["exit_code"]) == ("drift", 1)
    labels, features = shifted["labels"], zoo.features()
    new = np.array([name.startswith("new") for name in features.ids])
    rates = [bundle.predict(features.take(side)).mean(axis=0) for side in (~new, new)]
    assert labels["compared"] == {"reference": int((~new).sum()), "new": 40}
    assert (labels["tested"], labels["constant"]) == (3, 0)
    for one in labels["labels"]:
        k = NAMES.index(one["label"])
        assert (one["reference"]["value"], one["new"]["value"]) == pytest.approx((rates[0][k], rates[1][k]))
        assert one["new"]["low"] <= one["new"]["value"] <= one["new"]["high"]
        assert one["change"]["low"] <= rates[1][k] - rates[0][k] <= one["change"]["high"]
    assert labels["effect"] == pytest.approx(np.abs(rates[1] - rates[0]).max())
    assert labels["p_value"] == pytest.approx(labels["labels"][0]["adjusted"])
    p_values = [test["p_value"] for test in (*shifted["columns"], labels)]
    assert labels["adjusted"] == pytest.approx(holm(p_values)[-1])
    json.dumps(shifted, allow_nan=False)
    text = drift_text(shifted)
    assert "predicted labels: p-value" in text
    assert "Benjamini-Hochberg" in text
    assert all(name in text for name in NAMES)
