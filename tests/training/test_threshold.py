"""A threshold of two classes, from end to end: chosen on validation images, kept, predicted with, evaluated."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, recall_score

from featurepipe.errors import BundleError, UsageError
from featurepipe.evaluation.evaluate import evaluate
from featurepipe.evaluation.text import text as evaluation_text
from featurepipe.heads.bundle.bundle import read_bundle, write_bundle
from featurepipe.heads.bundle.files import read_manifest
from featurepipe.heads.bundle.text import bundle_text, describe_bundle
from featurepipe.heads.families import make_head
from featurepipe.heads.statistics import intervals
from featurepipe.prediction.from_store import predict_features
from featurepipe.training.text import train_text
from featurepipe.training.train import train

NODES = ["a:gap", "b:gap"]


def of_two_classes(zoo, *splits, count=60):
    """Cats and dogs, of which one in five is in the other's place."""
    rows = []
    for split in splits:
        for number, image in enumerate(zoo.images(split, count)):
            if image.label != "emu":
                other = {"cat": "dog", "dog": "cat"}[image.label]
                rows.append(replace(image, label=other if number % 5 == 0 else image.label))
    return rows


@pytest.fixture
def run(tmp_path):
    def run_(zoo, **options):
        options = {"nodes": NODES, "out": tmp_path / "bundle", "silent": True, "positive": "dog", **options}
        return train(zoo.store, **options)

    return run_


def held_out(zoo, **params):
    """What a head fitted on the training rows alone says of validation rows: probabilities of dog, before calibration."""
    features = zoo.features()
    x, labels, split = features.read(np.float32), features.labels, features.splits
    head = make_head("logistic", **params).fit(x[split == "train"], labels[split == "train"])
    return head.predict_proba(x[split == "val"])[:, 1], labels[split == "val"] == "dog"


def test_the_threshold_is_the_highest_that_reaches_the_recall_on_validation_images_alone(zoo, run, tmp_path):
    zoo.write(of_two_classes(zoo, "train", "val", "test"))
    record = run(zoo, threshold="recall=0.95", calibration=False)
    likely, dogs = held_out(zoo)
    best = max(t for t in likely if (likely >= t)[dogs].mean() >= 0.95)
    found = record["threshold"]
    assert found["value"] == pytest.approx(best, abs=2e-6)
    assert found["value"] < best
    assert (found["positive"], found["negative"], found["wish"], found["reached"]) == (
        "dog",
        "cat",
        "recall=0.95",
        True,
    )
    assert found["images"] == 120
    assert found["rates"]["sensitivity"]["value"] == pytest.approx((likely >= best)[dogs].mean())
    assert read_bundle(tmp_path / "bundle").threshold == found
    assert record["options"]["threshold"] == "recall=0.95"
    said = train_text(record)
    assert "dog from a probability of" in said
    assert "for recall=0.95: on the 120 validation images that chose it sensitivity" in said
    assert "sensitivity (recall)" in said
    json.dumps(record, allow_nan=False)


def test_calibration_moves_the_threshold_but_not_the_images(zoo, run, tmp_path):
    """A temperature keeps the order, so that the same images are labelled dog."""
    zoo.write(of_two_classes(zoo, "train", "val"))
    asked = {"threshold": "precision=0.8", "params": {"C": 1e-3}}  # which is not sure enough of what it says
    plain = run(zoo, calibration=False, **asked)["threshold"]
    heated = run(zoo, **asked)["threshold"]
    assert plain["value"] != pytest.approx(heated["value"], rel=1e-4)
    assert plain["rates"] == heated["rates"]
    temperature = read_bundle(tmp_path / "bundle").temperature
    odds = [np.log(found["value"] / (1 - found["value"])) for found in (plain, heated)]
    assert odds[0] / temperature == pytest.approx(odds[1], abs=1e-3)


def test_labels_follow_the_threshold_wherever_they_are_predicted(zoo, run, tmp_path):
    zoo.write(of_two_classes(zoo, "train", "val", "test"))
    found = run(zoo, threshold="recall=0.97")["threshold"]
    bundle, features = read_bundle(tmp_path / "bundle"), zoo.features()
    likely = bundle.probabilities(features)[:, 1]
    expected = np.where(likely >= found["value"], "dog", "cat")
    assert (expected != np.where(likely >= 0.5, "dog", "cat")).any()
    np.testing.assert_array_equal(bundle.predict(features), expected)
    record = predict_features(bundle, zoo.store, tmp_path / "out.parquet", silent=True)
    rows = pq.read_table(tmp_path / "out.parquet")
    np.testing.assert_array_equal(rows["label"].to_pylist(), expected)
    own = np.where(expected == "dog", likely, 1 - likely)
    np.testing.assert_allclose(rows["confidence"].to_numpy(), own, atol=1e-6)
    assert record["labels"] == {"cat": (expected == "cat").sum(), "dog": (expected == "dog").sum()}
    assert record["threshold"]["value"] == found["value"]


def test_an_evaluation_measures_the_labels_that_are_predicted(zoo, run, tmp_path):
    zoo.write(of_two_classes(zoo, "train", "val", "test"))
    run(zoo, threshold="cost=10:1")
    bundle = read_bundle(tmp_path / "bundle")
    record = evaluate(bundle, zoo.store, silent=True)
    test = zoo.features().select(split="test")
    predicted, dogs = bundle.predict(test), test.labels == "dog"
    (tn, fp), (fn, tp) = confusion_matrix(dogs, predicted == "dog")
    found = record["metrics"]["screening"]
    assert found["chosen"]
    assert found["threshold"] == bundle.threshold["value"]
    for name, hit, of in (
        ("sensitivity", tp, tp + fn), ("specificity", tn, tn + fp), ("ppv", tp, tp + fp), ("npv", tn, tn + fn),
    ):  # fmt: skip
        low, high = intervals.proportion(hit / of, int(of))
        measured = {
            "value": pytest.approx(hit / of),
            "low": pytest.approx(low),
            "high": pytest.approx(high),
            "images": of,
        }
        assert found[name] == measured
    assert record["metrics"]["accuracy"]["value"] == accuracy_score(test.labels, predicted)
    assert record["metrics"]["confusion"]["counts"] == [[tn, fp], [fn, tp]]
    assert recall_score(dogs, predicted == "dog") > 0.9  # a miss is expensive
    assert found["auc"]["value"] == pytest.approx(record["metrics"]["auc"]["value"])
    said = evaluation_text(record)
    assert (
        f"looking for dog (60 of 120 images), from a probability of {found['threshold']:.6g} on (the bundle's" in said
    )
    assert f"{tp} found, {fn} missed; {fp} false alarms, {tn} rightly passed" in said
    json.dumps(record, allow_nan=False)


def test_without_a_threshold_an_evaluation_takes_the_more_probable_class(zoo, run, tmp_path):
    zoo.write(of_two_classes(zoo, "train", "val", "test"))
    run(zoo, positive=None)
    bundle = read_bundle(tmp_path / "bundle")
    assert bundle.threshold is None
    assert read_manifest(tmp_path / "bundle")["version"] == 1
    record = evaluate(bundle, zoo.store, silent=True)
    found = record["metrics"]["screening"]
    test = zoo.features().select(split="test")
    assert (found["positive"], found["threshold"], found["chosen"]) == ("dog", 0.5, False)
    assert found["sensitivity"]["value"] == recall_score(test.labels == "dog", bundle.predict(test) == "dog")
    assert "the more probable class; featurepipe train --threshold chooses" in evaluation_text(record)


def test_either_class_can_be_looked_for_in_an_evaluation(zoo, run, tmp_path):
    zoo.write(of_two_classes(zoo, "train", "val", "test"))
    run(zoo, threshold="recall=0.9")
    bundle = read_bundle(tmp_path / "bundle")
    dogs, cats = (
        evaluate(bundle, zoo.store, positive=name, silent=True)["metrics"]["screening"] for name in ("dog", "cat")
    )
    assert dogs == evaluate(bundle, zoo.store, silent=True)["metrics"]["screening"]
    assert (cats["positive"], cats["negative"]) == ("cat", "dog")
    assert cats["threshold"] == pytest.approx(1 - dogs["threshold"])
    assert (cats["sensitivity"], cats["ppv"]) == (dogs["specificity"], dogs["npv"])
    assert cats["auc"]["value"] == pytest.approx(dogs["auc"]["value"])
    with pytest.raises(UsageError, match="unknown class 'cow' in the bundle; choices: cat, dog"):
        evaluate(bundle, zoo.store, positive="cow", silent=True)
    zoo.write([*zoo.images("train"), *zoo.images("test")])
    run(zoo, positive=None)
    with pytest.raises(UsageError, match=r"can be looked for; this bundle predicts 3 classes"):
        evaluate(tmp_path / "bundle", zoo.store, positive="cat", silent=True)


def test_the_largest_f1_is_a_wish_too(zoo, run):
    zoo.write(of_two_classes(zoo, "train", "val"))
    found = run(zoo, threshold="f1", calibration=False)["threshold"]
    likely, dogs = held_out(zoo)
    best = max(f1_score(dogs, likely >= t) for t in likely)
    assert f1_score(dogs, likely >= found["value"]) == best
    with pytest.raises(UsageError, match="the largest F1 has no margin"):
        run(zoo, threshold="f1", threshold_margin=True)


def test_a_bundle_keeps_its_threshold_and_older_readers_refuse_it(zoo, run, tmp_path):
    zoo.write(of_two_classes(zoo, "train", "val", "test"))
    run(zoo, threshold="recall=0.9", threshold_margin=True)
    folder = tmp_path / "bundle"
    assert read_manifest(folder)["version"] == 2
    bundle = read_bundle(folder)
    again = read_bundle(write_bundle(tmp_path / "again", bundle))
    assert again.threshold == bundle.threshold
    assert describe_bundle(bundle)["threshold"] == bundle.threshold
    assert "threshold dog from a probability of" in bundle_text(bundle)
    assert "for recall=0.9, by the lower 95 % limit" in bundle_text(bundle)
    for name, value in (("positive", "emu"), ("value", "0.5"), ("rates", {}), ("images", None)):
        wrong = replace(bundle, threshold={**bundle.threshold, name: value})
        with pytest.raises(BundleError, match="its threshold is not one of its two classes"):
            write_bundle(tmp_path / "wrong", wrong)


def test_groups_stay_together_and_count_as_one(zoo, run):
    zoo.write(of_two_classes(zoo, "train", "val"))
    patients = {row.id: f"{row.split}{number // 6}" for number, row in enumerate(of_two_classes(zoo, "train", "val"))}
    labels = {row.id: row.label for row in of_two_classes(zoo, "train", "val")}
    table = {"id": list(labels), "label": list(labels.values()), "patient": list(patients.values())}
    alone = run(zoo, labels=_table(table), threshold="recall=0.8")["threshold"]
    grouped = run(zoo, labels=_table(table), group="patient", threshold="recall=0.8")["threshold"]
    assert grouped["groups"] == 20
    assert "groups" not in alone
    assert grouped["rates"]["sensitivity"]["low"] < alone["rates"]["sensitivity"]["low"]


def _table(columns):
    import pyarrow as pa

    return pa.table(columns)


def test_a_wish_that_is_not_reached_is_kept_and_said(zoo, run, tmp_path, capsys):
    zoo.write(of_two_classes(zoo, "train", "val"))
    record = run(zoo, threshold="recall=0.99", threshold_margin=True, silent=False)
    found = record["threshold"]
    assert not found["reached"]
    assert found["rates"]["sensitivity"]["value"] == 1
    assert "WARNING: recall=0.99 cannot be reached on 60 positive and 60 other images" in capsys.readouterr().err
    assert "WARNING: recall=0.99 cannot be reached" in train_text(record)
    assert "WARNING: recall=0.99 cannot be reached" in bundle_text(read_bundle(tmp_path / "bundle"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"threshold": "recall=0.9", "positive": None}, r"needs the class that is looked for: name it with positive"),
        (
            {"threshold": "recall=0.9", "positive": "emu"},
            r"no class positive='emu' to look for; the classes are: cat, dog",
        ),
        ({"threshold": "f1=0.9"}, r"'f1=0.9' is no aim of a threshold; write recall=0\.95"),
        ({"positive": "dog"}, r"positive='dog' is about a threshold: say what to reach with threshold"),
        ({"threshold": "cost=2:1", "threshold_margin": True}, r"a cost has no margin"),
        ({"threshold": "recall=0.9", "target": "age"}, r"is about two classes, not about target"),
    ],
)
def test_what_makes_no_threshold_is_refused(zoo, run, options, said):
    zoo.write(of_two_classes(zoo, "train", "val"))
    with pytest.raises(UsageError, match=said):
        run(zoo, **options)


def test_more_than_two_classes_are_refused_by_name_before_any_fit(zoo, run, tmp_path):
    zoo.write([*zoo.images("train"), *zoo.images("val")])
    with pytest.raises(UsageError, match="tells one of two classes, and here are 3: cat, dog, emu; leave threshold"):
        run(zoo, threshold="recall=0.9", dry_run=True)
    assert not (tmp_path / "bundle").exists()


def test_validation_images_of_one_class_alone_are_refused(zoo, run):
    rows = of_two_classes(zoo, "train", "val")
    zoo.write([row for row in rows if row.split == "train" or row.label == "cat"])
    with pytest.raises(UsageError, match="none of the 60 validation images is of class 'dog', so no threshold"):
        run(zoo, threshold="recall=0.9")


def test_another_wish_trains_again(zoo, run):
    zoo.write(of_two_classes(zoo, "train", "val"))
    run(zoo, threshold="recall=0.9")
    assert "skipped" in run(zoo, threshold="recall=0.9", if_changed=True)
    assert run(zoo, threshold="recall=0.8", if_changed=True)["why"] == ["other settings: threshold"]


def test_splits_that_are_carved_choose_a_threshold_too(zoo, run):
    zoo.write([replace(row, split=None) for row in of_two_classes(zoo, "all", count=200)])
    record = run(zoo, threshold="recall=0.9", calibration=False)
    assert record["threshold"]["images"] == record["counts"]["validation"] > 0
    assert record["threshold"]["reached"]
