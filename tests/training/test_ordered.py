"""Ordered classes from end to end: trained, tuned by kappa, kept in a bundle, evaluated and predicted."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import cohen_kappa_score

from featurepipe.errors import BundleError, UsageError
from featurepipe.evaluation.evaluate import evaluate
from featurepipe.evaluation.text import text as evaluation_text
from featurepipe.heads.bundle.bundle import read_bundle, write_bundle
from featurepipe.heads.bundle.files import read_manifest
from featurepipe.heads.bundle.text import bundle_text, describe_bundle
from featurepipe.heads.families import make_head
from featurepipe.prediction.from_store import predict_features
from featurepipe.training.options import order_of
from featurepipe.training.text import cost_text, train_text
from featurepipe.training.train import train

NODES = ["a:gap", "b:gap"]
ORDER = ["small", "middle", "large"]


def grades(rows, seed=0):
    """Grades that follow from the features but for noise."""
    hidden = np.array([row.features() for row in rows]) @ [1, -1, 0.5]
    hidden += 0.4 * np.random.default_rng(seed).standard_normal(len(rows))
    names = np.array(ORDER)[np.searchsorted(np.quantile(hidden, [0.4, 0.8]), hidden)]
    return pa.table({"id": [row.id for row in rows], "label": names.tolist()}), names


@pytest.fixture
def found(zoo):
    rows = [*zoo.images("train", 60), *zoo.images("val", 30), *zoo.images("test", 60)]
    zoo.write(rows)
    return zoo, *grades(rows)


@pytest.fixture
def run(tmp_path):
    def run_(zoo, **options):
        options = {"nodes": NODES, "out": tmp_path / "bundle", "silent": True, "ordered": ORDER, **options}
        return train(zoo.store, **options)

    return run_


def test_the_order_is_learned_kept_measured_and_predicted(found, run, tmp_path):
    zoo, table, names = found
    record = run(zoo, labels=table, tune=True)
    bundle, features = read_bundle(tmp_path / "bundle"), zoo.features()
    assert (bundle.ordered, bundle.classes, bundle.target) == (True, tuple(ORDER), None)
    assert read_manifest(tmp_path / "bundle")["version"] == 1
    x, split = features.read(np.float32), features.splits
    own = make_head("logistic", target_type="ordinal", order=ORDER, C=record["params"]["C"])
    own.fit(x[split == "train"], names[split == "train"])
    test = split == "test"
    np.testing.assert_allclose(bundle.scores(features.take(test)), own.predict_log_proba(x[test]), atol=1e-2)
    predicted = bundle.predict(features.take(test))
    kappa = cohen_kappa_score(names[test], predicted, labels=ORDER, weights="quadratic")
    assert record["test"]["quadratic_kappa"]["value"] == pytest.approx(kappa)
    assert kappa > 0.7
    trials = record["search"]["trials"]
    checked = own.set_params(head__C=trials[3]["params"]["C"]).fit(x[split == "train"], names[split == "train"])
    assert trials[3]["quadratic_kappa"] == pytest.approx(
        cohen_kappa_score(names[split == "val"], checked.predict(x[split == "val"]), labels=ORDER, weights="quadratic")
    )
    assert record["search"]["best"]["C"] == max(trials, key=lambda trial: trial["quadratic_kappa"])["params"]["C"]
    assert record["calibration"]["temperature"] == bundle.temperature
    measured = evaluate(bundle, zoo.store, labels=table, silent=True)
    assert measured["metrics"]["quadratic_kappa"] == record["test"]["quadratic_kappa"]
    assert "quadratic weighted kappa" in evaluation_text(measured)
    assert "validation quadratic weighted kappa" in train_text(record)
    assert "3: small < middle < large" in bundle_text(bundle)
    assert describe_bundle(bundle)["ordered"]
    predict_features(bundle, zoo.store, tmp_path / "out.parquet", silent=True)
    assert pq.read_table(tmp_path / "out.parquet")["label"].to_pylist() == bundle.predict(features).tolist()
    json.dumps(record, allow_nan=False)


def test_blocks_give_what_memory_gives(found, run, tmp_path, monkeypatch):
    zoo, table, _ = found
    run(zoo, labels=table)
    here = read_bundle(tmp_path / "bundle").probabilities(zoo.features())
    monkeypatch.setattr("featurepipe.training.cost.SMALL_VALUES", 0)
    monkeypatch.setattr("featurepipe.training.tuning.SMALL_VALUES", 0)
    assert run(zoo, labels=table, ordered="small<middle<large")["cost"]["solver"] == "blocks"
    np.testing.assert_allclose(read_bundle(tmp_path / "bundle").probabilities(zoo.features()), here, atol=5e-3)
    assert "quadratic_kappa" in run(zoo, labels=table, tune=True, params={"C": 1.0})["search"]["trials"][0]


def test_an_order_that_does_not_fit_is_refused(found, run, tmp_path):
    zoo, table, _ = found
    for options, message in (
        ({"ordered": ["small", "large"]}, r"the order small < large leaves out classes that images have: middle"),
        (
            {"ordered": "small,midle,large"},
            r"unknown class 'midle' in the order small < midle < large; nearest: middle",
        ),
        ({"ordered": ["small"]}, r"must name two classes or more, each once"),
        ({"ordered": ["small", "small", "large"]}, r"must name two classes or more, each once"),
        ({"head": "ridge"}, r"head 'ridge' learns multiclass and multilabel and continuous targets, not ordinal ones"),
        ({"target": "age"}, r"ordered and target are two kinds of target"),
        ({"multilabel": "tags"}, r"ordered and multilabel are two kinds of target"),
    ):
        with pytest.raises(UsageError, match=message):
            run(zoo, **{"labels": table, **options})
    assert order_of("a,b") == order_of("a < b") == ("a", "b")
    assert "3 ordered classes: small" in cost_text(run(zoo, labels=table, dry_run=True))
    run(zoo, labels=table)
    assert "skipped" in run(zoo, labels=table, if_changed=True)
    assert "other settings" in run(zoo, labels=table, ordered=ORDER[::-1], if_changed=True)["why"][0]
    bundle = read_bundle(tmp_path / "bundle")
    manifest = {"ordered": 1}
    with pytest.raises(BundleError, match="'ordered' is true"):
        _forge(tmp_path / "forged", bundle, manifest)


def _forge(folder, bundle, changes):
    from featurepipe.heads.bundle.files import write_manifest

    write_bundle(folder, bundle)
    write_manifest(folder, {**read_manifest(folder), **changes})
    read_bundle(folder)
