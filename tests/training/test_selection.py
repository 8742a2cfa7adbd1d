"""``train --select``: which values of several columns a head is fitted on, and the bundle that computes these alone."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
from PIL import Image

from featurepipe.backbones.engine import Engine
from featurepipe.cli import main
from featurepipe.errors import UsageError
from featurepipe.evaluation.evaluate import evaluate
from featurepipe.extraction.extract import extract
from featurepipe.heads.bundle.bundle import read_bundle
from featurepipe.heads.bundle.text import bundle_text, describe_bundle
from featurepipe.heads.selection import best_columns, column_scores, regression_targets
from featurepipe.monitoring.drift import drift
from featurepipe.prediction.from_store import predict_features
from featurepipe.prediction.image_classifier import ImageClassifier
from featurepipe.reporting.from_store import report
from featurepipe.store import FeatureStore
from featurepipe.store.snapshots import SCHEMA
from featurepipe.training.text import cost_text, train_text
from featurepipe.training.train import train

WIDTHS = {"blocks.2:gap": 60, "blocks.10:gap": 80, "end:gap": 60, "blocks.2:map": 12}
TELLING = [70, 71, 150, 199]
"""Values, of all columns in the order of the network, that classes follow from: none of the first column, none of the last."""
NAMES = ["cat", "dog", "emu"]


def write(store, counts, *, seed=0):
    """Datasets of noise, but for `TELLING`, in columns that were extracted in another order than the network's."""
    rng = np.random.default_rng(seed)
    total = sum(counts.values())
    values = rng.standard_normal((total, 200)).astype(np.float32)
    sums = values[:, TELLING] @ np.array([[2, 0, -1], [0, 2, -1], [-1, 1, 2], [1, -2, 1]], np.float32)
    codes, number = sums.argmax(axis=1), sums[:, 0]
    splits = [split for split, count in counts.items() for _ in range(count)]
    ids = [f"{split}/{place}.png" for place, split in enumerate(splits)]
    keys = np.stack(
        [np.frombuffer(hashlib.sha256(f"{seed} {place}".encode()).digest(), np.uint8) for place in range(total)]
    )
    fields = {"dtype": "float32", "net": "tiny", "precision": "fp32"}
    space = store.open_space(fields, backbone="tiny", notes={"aliases": {"bottleneck": "end"}})
    run_id = store.new_run_id()
    edges = np.cumsum([0, 60, 80, 60])
    columns = {name: values[:, a:b] for name, a, b in zip(WIDTHS, edges[:-1], edges[1:], strict=False)}
    columns["blocks.2:map"] = values[:, :12]
    with space.writer(run_id) as writer:
        writer.add(keys, ids, np.arange(total), np.arange(total), columns)
    table = {
        "id": ids, "key": [key.tobytes() for key in keys], "label": [NAMES[code] for code in codes], "split": splits,
        "size": [1] * total, "mtime_ns": [1] * total, "status": ["ok"] * total, "reason": [None] * total,
    }  # fmt: skip
    store.write_snapshot("made", run_id, pa.table(table, schema=SCHEMA))
    labels = {"id": ids, "age": number.astype(float).tolist()}
    labels |= {name: (sums[:, place] > 0).astype(int).tolist() for place, name in enumerate(NAMES)}
    labels["patient"] = [f"p{place // 4}" for place in range(total)]
    return pa.table(labels)


@pytest.fixture
def store(tmp_path):
    return FeatureStore(tmp_path / "store")


@pytest.fixture
def labels(store, tmp_path):
    pyarrow.csv.write_csv(write(store, {"train": 500, "val": 150, "test": 150}), tmp_path / "labels.csv")
    return tmp_path / "labels.csv"


@pytest.fixture
def run(store, labels, tmp_path):
    def run_(**options):
        asked = {"nodes": "all", "select": "auto", "out": tmp_path / "bundle", "silent": True, **options}
        return train(store, **asked), tmp_path / "bundle"

    return run_


def kept_of(bundle):
    """Positions of the kept values among those of all columns in the order of the network."""
    starts = dict(zip(WIDTHS, np.cumsum([0, 60, 80]), strict=False))
    edges = np.concatenate([starts[column] + np.arange(WIDTHS[column]) for column in bundle.columns])
    return edges[bundle.head.steps[0][1].columns_].tolist()


def test_the_share_is_chosen_and_only_columns_with_a_kept_value_are_needed(store, run, capsys):
    record, folder = run(silent=False)
    assert "left out, as maps or wider than 9,000 values: blocks.2:map" in capsys.readouterr().err
    selection, bundle = record["selection"], read_bundle(folder)
    assert (selection["asked"], selection["of"], selection["rows"]) == ("auto", 200, 500)
    assert selection["measure"] == "accuracy"
    assert kept_of(bundle) == TELLING
    assert (selection["share"], selection["values"]) == (0.02, 4)
    assert selection["columns"] == {"blocks.2:gap": 0, "blocks.10:gap": 2, "end:gap": 2}
    assert bundle.columns == ("blocks.10:gap", "end:gap") == tuple(record["columns"])
    tried = {one["values"]: one["score"] for one in selection["tried"]}
    assert list(tried) == [1, 2, 4, 10, 20, 40, 100, 200]
    assert tried[4] == max(score for score in tried.values() if score is not None)
    assert tried[100] is tried[200] is None
    assert record["test"]["accuracy"]["value"] > 0.93
    assert selection == bundle.training["selection"]
    json.dumps(record, allow_nan=False)
    said = train_text(record)
    assert "kept 4 of 200 values (2 %), in 2 of 3 columns: blocks.10:gap 2, end:gap 2; none of blocks.2:gap" in said
    assert "not tried: the 2 shares before were no better than 0.02" in said
    assert "selected  kept 4 of 200 values" in bundle_text(bundle)
    assert describe_bundle(bundle)["training"]["selection"]["share"] == 0.02


def test_scores_are_of_training_rows_alone_and_of_the_same_fit_as_in_heads(store, run):
    _, folder = run(select=0.1, nodes=["blocks.2", "blocks.10", "bottleneck"])
    rows = store.features("made", node=["blocks.2", "blocks.10", "bottleneck"], split="train")
    x, y = rows.numpy()
    expected = best_columns(column_scores(x, regression_targets(y, NAMES)), 0.1)
    assert kept_of(read_bundle(folder)) == expected.tolist()


def test_the_head_is_the_one_of_the_kept_values(store, run):
    _, folder = run(select=0.02, calibration=False, params={"C": 0.1})
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = store.features("made", node=["blocks.2", "blocks.10", "end"], split="train").numpy()
    expected = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(x[:, TELLING], y)
    test = store.features("made", node=["blocks.10", "end"], split="test")
    wide = store.features("made", node=["blocks.2", "blocks.10", "end"], split="test").read()
    found = read_bundle(folder).scores(test)
    np.testing.assert_allclose(found, expected.predict_log_proba(wide[:, TELLING]), atol=1e-3)


@pytest.mark.parametrize("memory", ["4MB", "1GB"])
def test_memory_changes_nothing_that_is_kept(store, run, memory):
    small, folder = run(memory=memory, head="ridge")
    assert kept_of(read_bundle(folder)) == TELLING
    assert small["test"]["accuracy"]["value"] > 0.9


@pytest.mark.parametrize("head", ["linear-svm", "lda", "centroid", "knn", "rbf-svm", "xgboost"])
def test_any_head_can_be_fitted_on_kept_values(store, run, head):
    params = {"n_estimators": 20, "n_jobs": 1} if head == "xgboost" else None
    record, folder = run(select=0.02, head=head, params=params)
    assert kept_of(read_bundle(folder)) == TELLING
    assert record["test"]["accuracy"]["value"] > 0.7
    found = evaluate(folder, store, dataset="made", split="test", bootstrap=20, silent=True)
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(record["test"]["accuracy"]["value"])


def test_a_number_and_several_labels(store, run, labels):
    record, folder = run(target="age", labels=labels)
    assert record["selection"]["measure"] == "rmse"
    assert set(kept_of(read_bundle(folder))) >= {70, 150, 199}
    assert record["selection"]["values"] <= 10
    assert record["test"]["r2"]["value"] > 0.95
    record, folder = run(multilabel=NAMES, labels=labels, select="auto", tune=True)
    assert record["selection"]["measure"] == "map"
    assert kept_of(read_bundle(folder)) == TELLING
    assert record["test"]["map"]["value"] > 0.9


def test_groups_stay_on_one_side_while_a_share_is_chosen(store, run, labels, monkeypatch):
    sides = []

    def spy(task, recipe):
        from featurepipe.training.fit import held_out

        groups = np.array(task.features.groups, dtype=object)
        sides.append((set(groups[task.division.train]), set(groups[task.division.validation])))
        return held_out(task, recipe)

    monkeypatch.setattr("featurepipe.training.selection.held_out", spy)
    table = write(store, {"train": 600})  # no split of its own: the rows that choose are taken from those that train
    pyarrow.csv.write_csv(table, labels)
    record, _ = run(labels=labels, group="patient")
    assert len(sides) == sum(one["score"] is not None for one in record["selection"]["tried"]) > 2
    assert all(not train_side & other for train_side, other in sides)


def test_an_order_is_chosen_by_kappa(store, run):
    record, folder = run(ordered="cat<dog<emu")
    assert record["selection"]["measure"] == "quadratic_kappa"
    assert read_bundle(folder).ordered


def test_it_is_not_trained_again_without_a_change(run):
    run(select=0.05)
    assert "skipped" in run(select=0.05, if_changed=True)[0]
    assert run(select=0.1, if_changed=True)[0]["why"] == ["other settings: select"]
    assert run(select=0.1, if_changed=True, nodes=["blocks.10", "end"])[0]["why"] == [
        "other columns: blocks.10:gap + end:gap, before blocks.2:gap + blocks.10:gap + end:gap"
    ]


@pytest.mark.parametrize("select", [0, 1.01, -0.1, "word", "nan", True])
def test_shares_that_are_none_are_refused(run, select):
    with pytest.raises(UsageError, match=r"select .* must be auto, or the share of the values to keep, above 0"):
        run(select=select)


def test_without_validation_images_a_share_has_to_be_given(store, labels, tmp_path):
    table = write(store, {"train": 3}).select(["id"]).append_column("label", pa.array(NAMES))  # one image a class
    pyarrow.csv.write_csv(table, labels)
    asked = {"nodes": "all", "labels": labels, "out": tmp_path / "b", "min_class_size": 1, "silent": True}
    with pytest.raises(UsageError, match=r"there is no validation image, so the share .* or a share: select=0.05"):
        train(store, select="auto", **asked)
    assert train(store, select=0.02, **asked)["selection"]["values"] == 4


def test_a_dry_run_says_that_time_is_unknown(run, capsys):
    found, folder = run(dry_run=True, silent=False)
    assert "values are selected first: the time is not estimated" in capsys.readouterr().err
    assert "blocks.2:gap + blocks.10:gap + bottleneck (end:gap)" in cost_text(found)
    assert not folder.exists()


def test_the_command_line_and_the_record_have_it(store, labels, tmp_path, capsys):
    told = ["train", str(store.path), "--node", "all", "--select", "2%", "--out", str(tmp_path / "b"), "--json"]
    assert main(told) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["options"]["select"] == 0.02
    assert record["selection"]["values"] == 4


def test_stored_features_are_predicted_reported_and_compared(store, run, labels, tmp_path):
    _, folder = run(select=0.02)
    found = predict_features(folder, store, tmp_path / "found.csv", dataset="made", silent=True)
    assert found["counts"]["predicted"] == 800
    report(store, tmp_path / "page.html", bundle=folder, silent=True)
    assert "blocks.10:gap + bottleneck (end:gap)" in (tmp_path / "page.html").read_text()
    write(store, {"train": 500, "val": 150, "test": 150}, seed=1)
    compared = drift(store, dataset="made", bundle=folder, silent=True)
    assert compared["classes"]["columns"] == ["blocks.10:gap", "end:gap"]


def test_images_are_computed_up_to_the_deepest_kept_node_and_give_what_stored_features_give(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for name, shade in (("dark", 60), ("light", 180)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for place in range(24):
            pixels = np.clip(rng.normal(shade, 40, (28, 28)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{place}.png")
    store = FeatureStore(tmp_path / "store")
    extract(tmp_path / "images", store, backbone="lenet5", weights="none", nodes="all", silent=True)
    columns = sorted(store.spaces()[0].columns())
    assert columns == ["c5:gap", "f6.1:gap", "s2:avg4x4", "s4:avg4x4"]
    kept = np.array([1, 5, 90])  # of s2, which has 6 maps of 4 x 4
    monkeypatch.setattr("featurepipe.training.selection.best_columns", lambda *_: kept)
    record = train(store, nodes=["s2:avg4x4", "s4:avg4x4", "c5"], select=0.01, out=tmp_path / "b", silent=True)
    bundle = read_bundle(tmp_path / "b")
    assert bundle.columns == ("s2:avg4x4",) == tuple(record["columns"])
    asked = []
    first = Engine.__init__

    def spy(self, backbone, columns, *rest, **more):
        asked.append([str(column) for column in columns])
        first(self, backbone, columns, *rest, **more)

    monkeypatch.setattr(Engine, "__init__", spy)
    classifier = ImageClassifier.load(tmp_path / "b", workers=1)
    features = store.features(store.only_dataset(), node="s2:avg4x4")
    paths = [tmp_path / "images" / name for name in features.ids]
    np.testing.assert_allclose(classifier.predict_proba(paths), bundle.probabilities(features), atol=2e-3)
    assert asked == [["s2:avg4x4"]]
    module = classifier.to_torch()
    assert module.head.weight.shape == (2, 96)
    assert not np.delete(module.head.weight.detach().numpy(), kept, axis=1).any()
    assert replace(bundle).width == 96
