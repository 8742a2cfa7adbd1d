"""From features to a bundle: what is fitted, on which rows, and what is refused."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import ParameterGrid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from featurepipe.errors import BundleError, UsageError
from featurepipe.evaluation.evaluate import evaluate
from featurepipe.heads.bundle.bundle import read_bundle
from featurepipe.heads.calibration import expected_calibration_error
from featurepipe.heads.devices import Device
from featurepipe.heads.families import HEADS
from featurepipe.heads.preprocessing import BlockScaler
from featurepipe.progress import spoken
from featurepipe.training import cost, settle, tuning
from featurepipe.training import fit as fitting
from featurepipe.training.text import calibration_lines, cost_text, train_text
from featurepipe.training.train import train

NODES = ["a:gap", "b:gap"]


@pytest.fixture
def split_zoo(zoo):
    zoo.write([*zoo.images("train", 60), *zoo.images("test", 20)])
    return zoo


@pytest.fixture
def run(tmp_path):
    def run_(zoo, **options):
        options = {"nodes": NODES, "out": tmp_path / "bundle", "silent": True, **options}
        return train(zoo.store, **options)

    return run_


def test_the_head_is_scikit_learns_on_all_training_rows(split_zoo, run, tmp_path):
    record = run(split_zoo, params={"C": 0.3})
    features = split_zoo.features()
    x, y = features.select(split="train").numpy()
    expected = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=1000)).fit(x, y)
    held_out = features.select(split="test")
    bundle = read_bundle(tmp_path / "bundle")
    np.testing.assert_allclose(
        bundle.scores(held_out), expected.predict_log_proba(held_out.read(np.float32)), rtol=1e-3, atol=1e-3
    )
    right = expected.predict(held_out.read(np.float32)) == held_out.labels
    assert record["test"]["accuracy"]["value"] == pytest.approx(right.mean())
    assert bundle.metrics["test"]["accuracy"] == record["test"]["accuracy"]
    assert bundle.columns == ("a:gap", "b:gap")
    assert bundle.backbone["name"] == "tiny"


def test_seen_are_the_training_images_alone(split_zoo, run, tmp_path):
    run(split_zoo)
    features = split_zoo.features()
    seen = set(read_bundle(tmp_path / "bundle").seen.tolist())
    assert seen == set(features.select(split="train").keys64.tolist())


def test_temperature_is_from_rows_the_head_had_not_seen(split_zoo, run, tmp_path):
    record = run(split_zoo)
    found = record["calibration"]
    assert found["rows"] == 18
    assert read_bundle(tmp_path / "bundle").temperature == found["temperature"] != 1.0
    assert run(split_zoo, calibration=False)["calibration"] is None
    assert read_bundle(tmp_path / "bundle").temperature is None


def test_calibration_lowers_the_error_of_an_overconfident_head(zoo, run):
    zoo.write([*zoo.images("train", 5), *zoo.images("val", 100), *zoo.images("test", 100)])
    record = run(zoo, params={"C": 1e6})
    assert record["calibration"]["temperature"] > 1
    assert record["calibration"]["ece_after"] < record["calibration"]["ece_before"]


def test_a_calibration_error_that_rises_is_explained_and_no_other():
    found = {"temperature": 0.808, "rows": 33, "ece_before": 0.0932, "ece_after": 0.1734}
    assert calibration_lines(None) == ["not calibrated"]
    assert len(calibration_lines({**found, "ece_before": 0.2})) == 1
    kept = {
        "temperature": 1,
        "rows": 40,
        "ece_before": 0.1184,
        "ece_after": 0.1184,
        "test_ece_before": 0.1,
        "test_ece_after": 0.1,
    }
    said = "temperature 1 from 40 validation images; calibration error there 0.1184, on the test images 0.1000"
    assert calibration_lines(kept) == [said]
    line, why = calibration_lines({**found, "test_ece_before": 0.1644, "test_ece_after": 0.1149})
    assert line.endswith("there 0.0932 before, 0.1734 after; on the test images 0.1644 before, 0.1149 after")
    assert "temperature minimises the log-loss" in why
    fell = {**found, "ece_before": 0.2}
    assert len(calibration_lines({**fell, "test_ece_before": 0.1, "test_ece_after": 0.2})) == 2


def test_out_of_core_is_chosen_by_memory_and_predicts_the_same(zoo, run, tmp_path):
    zoo.write([*zoo.images("train", 1500), *zoo.images("test", 20)])
    inside = run(zoo)
    assert inside["cost"]["solver"] == "scikit-learn"
    small = read_bundle(tmp_path / "bundle")
    outside = run(zoo, memory="60kB")
    assert outside["cost"]["out_of_core"] is True
    assert "60.0 kB allowed: out of core" in outside["cost"]["text"]
    features = zoo.features()
    np.testing.assert_allclose(read_bundle(tmp_path / "bundle").scores(features), small.scores(features), atol=0.02)


def test_a_family_without_blocks_is_refused_when_memory_is_short(zoo, run):
    zoo.write(zoo.images("train", 1500))
    with pytest.raises(UsageError, match=r"knn on 4,500 x 3 features needs about .* choose one that has: logistic"):
        run(zoo, head="knn", memory="60kB")
    with pytest.raises(UsageError, match=r"memory='2.0 kB' is too little for 3 values an image; give 12.3 kB or more"):
        run(zoo, memory=2000)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["logistic", "linear-svm", "ridge", "lda", "centroid", "knn", "rbf-svm", "xgboost"])
def test_every_family_trains_tunes_and_tells_classes_apart(split_zoo, run, head):
    record = run(split_zoo, head=head, tune=True)
    assert record["test"]["accuracy"]["value"] > 0.6  # a third by chance
    trials = record["search"]["trials"]
    best = max(trial["accuracy"] for trial in trials)
    chosen = next(trial for trial in trials if trial["accuracy"] == best)
    for_searches = {"early_stopping_rounds", "n_estimators"}  # the last fit grows as many trees as were found best
    assert {k: v for k, v in chosen["params"].items() if k not in for_searches}.items() <= record["params"].items()
    if head == "xgboost":
        assert record["params"]["n_estimators"] == chosen["n_estimators"] < 1000
        assert "early_stopping_rounds" not in record["params"]
    assert {"cat", "dog", "emu"} == set(record["classes"])


@pytest.mark.parametrize("tune", [False, True])
def test_a_constant_column_does_the_nearest_mean_no_harm(zoo, run, monkeypatch, tune):
    """Nor is it worth a warning, which would fail this test; many values after a ReLU are always zero."""
    true_features = zoo.image.features
    monkeypatch.setattr(zoo.image, "features", lambda self: true_features(self) * np.float32([0, 1, 1]))
    zoo.write([*zoo.images("train", 60), *zoo.images("test", 20)])
    record = run(zoo, head="centroid", tune=tune)
    assert record["test"]["accuracy"]["value"] > 0.6


def test_tuning_never_looks_at_the_test_rows(zoo, run):
    """With every test label wrong, the same parameters, temperature and head come out."""
    train_rows = zoo.images("train", 60)
    test_rows = zoo.images("test", 20)
    zoo.write([*train_rows, *test_rows], "right")
    zoo.write(
        [*train_rows, *(replace(row, label="emu" if row.label == "cat" else "cat") for row in test_rows)], "wrong"
    )
    right, wrong = (run(zoo, dataset=name, tune=True) for name in ("right", "wrong"))
    assert right["params"] == wrong["params"]
    for part in ("temperature", "rows", "ece_before", "ece_after"):
        assert right["calibration"][part] == wrong["calibration"][part]
    assert right["search"]["trials"] == wrong["search"]["trials"]
    assert wrong["test"]["accuracy"]["value"] < right["test"]["accuracy"]["value"] - 0.3


def test_shared_passes_find_what_single_fits_find(split_zoo, run, monkeypatch):
    """The accuracy of each C over 5 folds is that of scikit-learn's own fits on the same folds."""
    monkeypatch.setattr("featurepipe.training.cost.SMALL_VALUES", 0)
    from featurepipe.progress import announcer
    from featurepipe.training.options import TrainOptions
    from featurepipe.training.settle import settle
    from featurepipe.training.task import Recipe

    record = run(split_zoo, tune=True, calibration=False)
    assert "in shared passes" in record["search"]["how"]
    recipe = Recipe("logistic", {})
    task = settle(
        split_zoo.store, recipe, TrainOptions(nodes=tuple(NODES), calibration=False, tune=True), say=announcer(silent=True)
    )  # fmt: skip
    x, y = task.features.numpy()
    for trial in record["search"]["trials"]:
        heads = make_pipeline(StandardScaler(), LogisticRegression(C=trial["params"]["C"], max_iter=2000))
        single = [np.mean(heads.fit(x[a], y[a]).predict(x[b]) == y[b]) for a, b in task.folds()]
        assert trial["accuracy"] == pytest.approx(np.mean(single), abs=0.012)  # two of 180 images near a boundary


def test_a_dry_run_tells_and_writes_nothing(split_zoo, run, tmp_path):
    record = run(split_zoo, dry_run=True, tune=True)
    assert record["counts"]["train"] == 180
    assert record["cost"]["seconds"] > 0
    assert not (tmp_path / "bundle").exists()
    json.dumps(record)


def test_labels_from_a_file_replace_the_datasets(split_zoo, run, tmp_path):
    file = tmp_path / "labels.csv"
    rows = split_zoo.images("train", 60)
    file.write_text("id,label\n" + "".join(f"{row.id},{'cat' if row.label == 'cat' else 'other'}\n" for row in rows))
    record = run(split_zoo, labels=file)
    assert record["classes"] == {"cat": 60, "other": 120}
    assert record["counts"]["unlabelled"] == 60
    assert record["test"] is None


# What cannot be learned from


def test_one_class_only(zoo, run):
    zoo.write([row for row in zoo.images("train") if row.label == "cat"])
    with pytest.raises(UsageError, match=r"all 40 training images are of class 'cat'; a head needs two or more"):
        run(zoo)


def test_a_class_with_one_image_is_left_out_and_said_and_can_be_accepted(zoo, run, tmp_path, capsys):
    rows = [*zoo.images("train"), *zoo.images("test", 9)]
    zoo.write(rows)
    without = run(zoo)
    lonely = [zoo.image(f"lonely-{split}.png", f"emu-{split}", "yak", split) for split in ("train", "val", "test")]
    zoo.write([*rows, *lonely])
    record = run(zoo, silent=False)
    said = "not learned, as too few images are of this class: yak (1 image); give more, or set min_class_size to 1"
    assert said in capsys.readouterr().err
    assert f"\nwarning: {said}\n" in train_text(record)
    assert record["left_out"] == {"yak": 1}
    assert (record["classes"], record["counts"]["train"]) == (without["classes"], 120)
    assert (record["test"]["images"], record["test_left_out"]) == (without["test"]["images"], 1)
    bundle = read_bundle(tmp_path / "bundle")
    assert bundle.training["left_out"] == {"yak": 1}
    assert bundle.classes == ("cat", "dog", "emu")
    planned = run(zoo, dry_run=True)
    assert planned["left_out"] == {"yak": 1}
    assert "; left out: yak (1)" in cost_text(planned)
    again = run(zoo, if_changed=True)
    assert ("skipped" in again, again["left_out"]) == (True, {"yak": 1})
    accepted = run(zoo, min_class_size=1, if_changed=True)
    assert accepted["classes"]["yak"] == 1
    assert "left_out" not in accepted


def test_a_class_with_one_image_beside_one_other_is_refused_by_its_id(zoo, run):
    cats = [row for row in zoo.images("train") if row.label == "cat"]
    zoo.write([*cats, zoo.image("lonely.png", "emu-lonely", "yak", "train")])
    with pytest.raises(
        UsageError, match=r"1 of 2 classes has fewer than 2 .*'yak' with 1 \(id lonely.png\).*min_class_size=1"
    ):
        run(zoo)
    assert run(zoo, min_class_size=1)["classes"] == {"cat": 40, "yak": 1}


def test_without_splits_a_class_with_one_image_trains_nothing_and_tests_nothing(zoo, run):
    rows = zoo.images(None)
    zoo.write(rows)
    without = run(zoo)
    zoo.write([*rows, zoo.image("lonely.png", "emu-lonely", "yak")])
    record = run(zoo)
    assert (record["left_out"], record["test_left_out"]) == ({"yak": 1}, 0)
    for name in ("classes", "counts", "test"):
        assert record[name] == without[name]


def test_classes_of_two_images_of_which_one_is_tested_are_learned(zoo, run, capsys):
    rows = [row for row in zoo.images(None) if row.label == "cat"][:20]
    for number in range(20):  # classes of two, of which some must give the test an image
        rows += [zoo.image(f"{number}-{one}.png", f"emu-{number}-{one}", f"kind {number:02d}") for one in "ab"]
    zoo.write(rows)
    record = run(zoo)
    assert "left_out" not in record
    assert set(record["classes"].values()) == {1, 2, 16}
    with pytest.raises(
        UsageError, match=r"20 of 21 classes have fewer than 3 images .*'kind 00' with 2 \(id 0-a.png\)"
    ):
        run(zoo, min_class_size=3)


def test_labels_in_conflict_are_named(zoo, run, capsys):
    rows = [row for row in zoo.images(None) if row.label == "cat"][:20]
    twin = zoo.image("twin.png", rows[0].content, "dog")
    zoo.write([*zoo.images(None), twin])
    run(zoo, silent=False)
    named = f"{rows[0].id} (cat) = twin.png (dog)"
    assert (
        f"1 image is there more than once, with different labels, and learned with each: {named};"
        in capsys.readouterr().err
    )


def test_no_label_at_all(zoo, run):
    zoo.write([replace(row, label=None) for row in zoo.images("train")])
    with pytest.raises(UsageError, match=r"none of the 120 images of dataset zoo has a label.*labels='FILE"):
        run(zoo)


def test_labels_that_match_no_id(split_zoo, run):
    with pytest.raises(UsageError, match=r"elsewhere/1\.png"):
        run(split_zoo, labels={"elsewhere/1.png": "cat"})


def test_nan_labels(split_zoo, run):
    ids = split_zoo.features().ids
    with pytest.raises(UsageError, match=r"(?i)nan"):
        run(split_zoo, labels={ids[0]: "cat", ids[1]: float("nan")})


def test_an_unknown_head_and_a_wrong_parameter_are_refused_before_any_work(split_zoo, run):
    with pytest.raises(UsageError, match="unknown head 'logistics'; nearest: logistic"):
        run(split_zoo, head="logistics")
    with pytest.raises(UsageError, match="Cs"):
        run(split_zoo, params={"Cs": 1})


def test_a_folder_of_something_else_is_left_alone(split_zoo, run, tmp_path):
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(BundleError, match="left alone"):
        run(split_zoo)
    assert (folder / "thesis.tex").read_text() == "years of work"


def test_it_says_that_a_bundle_was_replaced(split_zoo, run, tmp_path, capsys):
    for ending in ("bundle\n", "bundle, in place of the bundle that was there\n"):
        run(split_zoo, silent=False)
        assert capsys.readouterr().err.endswith(f"wrote {tmp_path}/{ending}")


@pytest.mark.parametrize("left", [b"", b'{"backbone": {'])
def test_a_bundle_that_was_cut_short_is_replaced(split_zoo, run, tmp_path, left):
    """It would keep a job from training for ever."""
    run(split_zoo, if_changed=True)
    manifest = tmp_path / "bundle/bundle.json"
    manifest.write_bytes(left)
    (why,) = run(split_zoo, if_changed=True)["why"]
    assert why.startswith("the bundle cannot be read (")
    assert read_bundle(tmp_path / "bundle").columns == ("a:gap", "b:gap")


@pytest.mark.parametrize(
    ("name", "content"), [("notes.txt", b"mine"), ("bundle.json", b'{"format": "featurepipe-bundle", "version": 99}')]
)
def test_what_may_be_somebodys_is_not_taken_for_remains(split_zoo, run, tmp_path, name, content):
    run(split_zoo)
    (tmp_path / "bundle/bundle.json").write_bytes(b"")
    (tmp_path / "bundle" / name).write_bytes(content)
    before = {file.name: file.read_bytes() for file in (tmp_path / "bundle").iterdir()}
    with pytest.raises(BundleError, match="is left alone"):
        run(split_zoo)
    assert {file.name: file.read_bytes() for file in (tmp_path / "bundle").iterdir()} == before


def test_expected_calibration_error_of_the_record_is_that_of_the_rows(zoo, run, tmp_path):
    zoo.write([*zoo.images("train", 60), *zoo.images("val", 40)])
    record = run(zoo)
    bundle = read_bundle(tmp_path / "bundle")
    rows = zoo.features().select(split="val")
    found = expected_calibration_error(bundle.probabilities(rows), rows.codes(bundle.classes))
    assert record["calibration"]["ece_after"] == pytest.approx(found, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"params": {"C": "abc"}}, "logistic cannot be fitted: The 'C' parameter"),
        ({"params": {"C": -1}}, "logistic cannot be fitted: The 'C' parameter"),
        ({"params": {"C": float("inf")}}, "cannot be written down as JSON"),
        ({"params": {"class_weight": "balanced"}}, "it has an option of its own: class_weight"),
        ({"params": {"memory": 3}}, "it has an option of its own: memory"),
        ({"pca": 5000}, "logistic cannot be fitted: n_components=5000"),
        ({"seed": -1}, "seed -1 must be at least 0"),
        ({"head": "knn", "params": {"n_neighbors": 5000}}, "Expected n_neighbors <= "),
    ],
)
def test_wrong_values_end_in_one_line_and_no_bundle(split_zoo, run, tmp_path, options, says):
    with pytest.raises(UsageError, match=re.escape(says)):
        run(split_zoo, **options)
    assert not (tmp_path / "bundle").exists()


def test_components_as_many_as_the_pilot_has_rows_are_no_obstacle(split_zoo, run, tmp_path):
    run(split_zoo, pca=3)
    assert read_bundle(tmp_path / "bundle").head[1].n_components_ == 3


@pytest.mark.parametrize("head", ["logistic", "knn", "xgboost"])
def test_too_few_images_to_tune_on_are_refused_with_the_reason(zoo, run, head):
    lonely = [zoo.image(f"{name}.png", f"{name}-only", name, "train") for name in ("cat", "dog")]
    zoo.write(lonely)
    with pytest.raises(UsageError, match="2 training images are too few to tune on"):
        run(zoo, head=head, tune=True, min_class_size=1, params={"n_neighbors": 1} if head == "knn" else {})


def test_a_validation_class_that_does_not_train_is_left_out_of_the_search(zoo, run):
    zoo.write(
        [
            *zoo.images("train", 30),
            *(replace(row, label="yak") for row in zoo.images("val", 2)),
            *zoo.images("val", 9, 2),
        ]
    )
    record = run(zoo, head="xgboost", tune=True)
    assert "compared on 27 of the validation split" in record["search"]["how"]


def test_test_images_of_classes_that_do_not_train_are_counted(zoo, run):
    zoo.write([*zoo.images("train"), *zoo.images("test", 9), zoo.image("y.png", "emu-y", "yak", "test")])
    record = run(zoo)
    assert (record["test"]["images"], record["test_left_out"]) == (27, 1)
    assert "27 test images (1 more are of classes that were not trained on)" in train_text(record)


def test_copies_that_train_and_test_are_told_at_once(zoo, run):
    train = zoo.images("train")
    twins = [replace(row, id=f"twin-{row.id}", split="test") for row in train[:2]]
    zoo.write([*train, *zoo.images("test", 9), *twins])
    record = run(zoo)
    assert record["test_seen"] == 2
    assert "WARNING: copies of 2 of the test images were trained on" in train_text(record)
    zoo.write([*train, *zoo.images("test", 9)])
    assert "WARNING" not in train_text(run(zoo))


def test_validation_images_count_as_seen(zoo, run, tmp_path):
    """They chose the temperature: scores on them would flatter the head."""
    zoo.write([*zoo.images("train"), *zoo.images("val", 9)])
    run(zoo)
    assert set(read_bundle(tmp_path / "bundle").seen.tolist()) == set(zoo.features().keys64.tolist())


def test_scaling_never_sees_the_users_validation_rows(zoo, run, monkeypatch):
    monkeypatch.setattr("featurepipe.training.cost.SMALL_VALUES", 0)
    rows = []
    fit = BlockScaler.fit
    monkeypatch.setattr(
        BlockScaler, "fit", lambda self, x, y=None, **kw: rows.append(x.shape[0]) or fit(self, x, y, **kw)
    )
    zoo.write([*zoo.images("train"), *zoo.images("val", 30)])
    run(zoo, tune=True)
    assert max(rows) == 120


def test_few_easy_validation_images_do_not_make_probabilities_certain(zoo, run):
    zoo.write([row for row in zoo.images("train", 60) if row.label != "emu"])
    assert run(zoo, params={"C": 1e4})["calibration"]["temperature"] > 0.1  # it was 1e-4


def test_a_bundle_says_that_it_was_trained_with_labels_of_its_own(split_zoo, run, tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text("id,label\n" + "".join(f"{row.id},{row.label}y\n" for row in split_zoo.images("train", 60)))
    run(split_zoo, labels=file)
    assert read_bundle(tmp_path / "bundle").training["labels"] == "mine.csv"
    with pytest.raises(UsageError, match=r"trained with labels of its own: mine\.csv"):
        evaluate(tmp_path / "bundle", split_zoo.store, silent=True)


@pytest.fixture
def weighted_zoo(split_zoo, tmp_path):
    """A labels file in which every third image to train on has a wrong class, and weighs nothing; others weigh 1 or 2."""
    features = split_zoo.features()
    classes = features.classes
    rows = []
    for number, (id_, label, split) in enumerate(zip(features.ids, features.labels, features.splits, strict=True)):
        wrong = split == "train" and number % 3 == 0
        given = classes[(classes.index(label) + 1) % len(classes)] if wrong else label
        rows.append(f"{id_},{given},{0 if wrong else 1 + number % 2}")
    path = tmp_path / "weighted.csv"
    path.write_text("\n".join(["id,label,w", *rows]) + "\n")
    return split_zoo, path


@pytest.mark.parametrize("memory", [None, "1MB"])
def test_weights_of_a_column_are_scikit_learns(weighted_zoo, run, tmp_path, memory):
    zoo, path = weighted_zoo
    record = run(zoo, labels=path, weight="w", params={"C": 0.3}, memory=memory, calibration=False)
    features = zoo.features()
    x, y = features.select(split="train").numpy()
    weights = np.array([0 if n % 3 == 0 else 1 + n % 2 for n in np.flatnonzero(features.splits == "train")], float)
    head = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=1000))
    expected = head.fit(
        x, y, logisticregression__sample_weight=weights
    )  # a wrong class that weighs nothing changes nothing
    held_out = features.select(split="test")
    scores = read_bundle(tmp_path / "bundle").scores(held_out)
    np.testing.assert_allclose(scores, expected.predict_log_proba(held_out.read(np.float32)), rtol=1e-2, atol=1e-2)
    assert record["options"]["weight"] == "w"


@pytest.mark.slow
@pytest.mark.parametrize("head", ["logistic", "linear-svm", "ridge", "xgboost"])
def test_a_search_heeds_weights(weighted_zoo, run, head):
    zoo, path = weighted_zoo
    weighted, plain = (
        run(zoo, labels=path, head=head, tune=True, calibration=False, **more) for more in ({"weight": "w"}, {})
    )
    assert weighted["test"]["accuracy"]["value"] > plain["test"]["accuracy"]["value"]
    folds = [np.mean([max(trial["accuracy"] for trial in record["search"]["trials"])]) for record in (weighted, plain)]
    assert folds[0] > folds[1]  # heads that wrong classes taught nothing are right more often about the others


def test_a_head_without_weights_and_a_bad_weight_are_refused(weighted_zoo, run, tmp_path):
    zoo, path = weighted_zoo
    with pytest.raises(UsageError, match="knn takes no weight; heads that do: logistic"):
        run(zoo, labels=path, weight="w", head="knn")
    path.write_text(path.read_text().replace(",2\n", ",-2\n", 1))
    with pytest.raises(UsageError, match="has the weight -2 for image"):
        run(zoo, labels=path, weight="w")


def test_other_weights_are_something_else_to_learn_from(weighted_zoo, run):
    zoo, path = weighted_zoo
    run(zoo, labels=path, weight="w", calibration=False)
    assert "skipped" in run(zoo, labels=path, weight="w", calibration=False, if_changed=True)
    path.write_text(path.read_text().replace(",2\n", ",3\n", 1))
    assert run(zoo, labels=path, weight="w", calibration=False, if_changed=True)["why"] == ["other settings: weight"]


@pytest.mark.parametrize(
    ("head", "told", "taken"),
    [
        ("linear-svm", {}, {"C": 10.0}),
        (
            "xgboost",
            {"n_estimators": 7},
            {"max_depth": 6, "min_child_weight": 1.0, "early_stopping_rounds": 20, "n_estimators": 7},
        ),
        ("ridge", {}, {"alpha": 100.0}),
    ],
)
def test_the_time_of_a_search_is_that_of_one_of_its_fits_and_said_before_it(
    split_zoo, run, monkeypatch, capsys, head, told, taken
):
    fitted, now = [], [0.0]

    def trial(estimator, data, train, check):
        last = tuning.steps_of(estimator)[-1][1]
        fitted.append(({name: last.get_params()[name] for name in taken}, len(train), len(check)))
        now[0] += 2.0 if len(train) > 20 else 1.0
        return 0.5, {}

    monkeypatch.setattr(tuning, "_plain", trial)
    monkeypatch.setattr(tuning, "_boosted", trial)
    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    found = run(split_zoo, head=head, tune=True, params=told, dry_run=True, silent=False)
    count = len(fitted) // 2  # with few rows, then with those of the search
    assert [params.get("C") for params, _, _ in fitted[:count]] == ([0.01, 10.0] if "C" in taken else [None])
    (_, small, _), (params, rows, checked) = fitted[0], fitted[-1]
    assert small < rows
    assert params == taken
    sets = len(ParameterGrid({name: values for name, values in HEADS[head].grid.items() if name not in told}))
    assert found["cost"]["search_seconds"] == pytest.approx(2.0 * sets * 5)
    assert found["cost"]["seconds"] > found["cost"]["search_seconds"]
    capsys.readouterr()
    run(split_zoo, head=head, tune=True, params=told, silent=False)
    said = f"tuning {head}: {sets} sets of parameters on 5 folds, {5 * sets} fits, about {spoken(10.0 * sets)}"
    assert said in capsys.readouterr().err.splitlines()
    assert {(rows, checked) for _, rows, checked in fitted[3 * count :]} == {(rows, checked)}


def test_a_long_search_says_how_far_it_is_and_how_long_it_takes_yet():
    from sklearn.naive_bayes import GaussianNB

    from featurepipe.execution.local import LocalExecutor
    from featurepipe.training.trials import TrialRows, try_all
    from featurepipe.training.tuning import _Said

    now, said = [0.0], []

    def fit(head, data, train, check):
        now[0] += 6.0
        return head.var_smoothing, len(data[train]), len(check)

    rows = np.arange(6)
    data = TrialRows(lambda: rows, [(rows[2:], rows[:2]), (rows[:3], rows[3:])], fit)
    heads = [GaussianNB(var_smoothing=value) for value in (0.1, 0.2, 0.3)]
    found = try_all(LocalExecutor(), data, heads, _Said(6, said.append, clock=lambda: now[0]))
    assert found == [(value, *rows) for value in (0.1, 0.2, 0.3) for rows in ((4, 2), (3, 3))]
    assert said == ["tuning: 3 of 6 fits, 0:18 left", "tuning: 6 of 6 fits, 0:00 left"]


@pytest.mark.parametrize("options", [{}, {"head": "linear-svm", "tune": True}, {"head": "logistic", "pca": 2}])
def test_a_head_fitted_on_a_device_is_the_one_of_the_cpu(split_zoo, run, tmp_path, monkeypatch, options):
    """PyTorch's tensors on the CPU stand for a GPU's."""
    asked = []

    def device_called(name):
        asked.append(name)
        return Device(torch.empty(0), 1 << 30)

    monkeypatch.setattr(fitting, "device_called", device_called)
    monkeypatch.setattr(settle, "device_called", device_called)
    monkeypatch.setattr(cost, "SMALL_VALUES", 0)  # else scikit-learn fits on the CPU, which stops elsewhere
    run(split_zoo, out=tmp_path / "here", params={"tol": 1e-9}, **options)
    assert asked == []
    record = run(split_zoo, out=tmp_path / "there", device="cuda", params={"tol": 1e-9}, **options)
    assert set(asked) == {"cuda"}
    assert (record["cost"]["solver"], record["cost"]["device"]) == ("blocks", "cuda")
    assert "on cuda, blocks" in record["cost"]["text"]
    features = split_zoo.features()
    here, there = (read_bundle(tmp_path / name).scores(features) for name in ("here", "there"))
    np.testing.assert_allclose(there, here, atol=1e-4 * np.abs(here).max())
    assert run(split_zoo, out=tmp_path / "there", if_changed=True, params={"tol": 1e-9}, **options)["skipped"]


def test_what_cannot_be_fitted_on_a_device_is_refused(split_zoo, run, monkeypatch):
    with pytest.raises(UsageError, match=r"device 'cuda:7': this PyTorch sees .* CUDA device.*; choices here: cpu"):
        run(split_zoo, device="cuda:7")
    with pytest.raises(UsageError, match="a cluster fits elsewhere"):
        run(split_zoo, device="cuda", cluster="127.0.0.1:1")
    monkeypatch.setattr(settle, "device_called", lambda name: None)
    with pytest.raises(UsageError, match=r"knn is fitted on the CPU; leave it out, or .* labels: logistic, linear-svm"):
        run(split_zoo, device="cuda", head="knn")
