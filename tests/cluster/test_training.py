"""Training on a cluster gives what training here gives."""

import json
import os
import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pytest

from featurepipe.errors import ClusterError, UsageError
from featurepipe.evaluation.evaluate import evaluate
from featurepipe.execution import connect, executor
from featurepipe.execution.dask import cluster_name
from featurepipe.execution.executor import Room
from featurepipe.heads import RBFSVM
from featurepipe.heads.bundle.bundle import read_bundle
from featurepipe.prediction.from_store import predict_features
from featurepipe.progress import Silent
from featurepipe.training import tuning
from featurepipe.training.text import cost_text, train_text
from featurepipe.training.train import train
from featurepipe.training.trials import TrialRows, try_all
from featurepipe.training.tuning import rows_in_memory
from tests.conftest import Processes

NODES = ["a:gap", "b:gap"]
CLOSE = {"logistic": 5e-3, "linear-svm": 1e-2}
"""How far scores there and here may be apart, as a share of their spread, where scikit-learn's own solver stops early."""


@pytest.fixture
def pair(zoo, request, tmp_path):
    """Trains twice, here and on workers; returns both records and both bundles.

    Trees grow where processes talk to each other; all else is as well shown by workers that are threads.
    """

    def train_(**options):
        options = {"nodes": NODES, "silent": True, **options}
        workers = request.getfixturevalue("dask_executor" if options.get("head") == "xgboost" else "thread_executor")
        here = train(zoo.store, out=tmp_path / "here", **options)
        there = train(zoo.store, out=tmp_path / "there", cluster=workers, **options)
        return here, there, read_bundle(tmp_path / "here"), read_bundle(tmp_path / "there")

    return train_


SLOW_HEADS = [pytest.param(head, marks=pytest.mark.slow) for head in ("logistic", "linear-svm", "rbf-svm")]


@pytest.mark.parametrize("head", ["ridge", "lda", "centroid", "knn", *SLOW_HEADS])
def test_the_same_parameters_and_the_same_bundle_come_out(zoo, pair, head):
    zoo.write([*zoo.images("train", 100), *zoo.images("test", 40)])
    here, there, one, other = pair(head=head, tune=True)
    assert there["search"]["trials"] == here["search"]["trials"]
    assert "2 at a time on the cluster" in there["search"]["how"]
    assert there["params"] == here["params"]
    expected, found = one.scores(zoo.features()), other.scores(zoo.features())
    np.testing.assert_allclose(found, expected, atol=CLOSE.get(head, 1e-5) * expected.std())
    assert there["calibration"]["temperature"] == pytest.approx(here["calibration"]["temperature"], rel=0.02)
    assert there["test"]["accuracy"] == here["test"]["accuracy"]


@pytest.mark.parametrize("head", ["logistic", "rbf-svm"])
def test_the_same_values_are_selected(zoo, pair, head):
    zoo.write([*zoo.images("train", 100), *zoo.images("test", 40)])
    here, there, one, other = pair(head=head, nodes="all", select="auto")
    tried = [[(entry["values"], entry["score"]) for entry in record["selection"]["tried"]] for record in (here, there)]
    assert tried[1] == tried[0]
    assert [values for values, _ in tried[0]] == [1, 2, 3]
    fixed = {**here["selection"], "seconds": 0, "tried": []}
    assert {**there["selection"], "seconds": 0, "tried": []} == fixed
    features = zoo.store.features("zoo", node=list(one.columns))
    assert one.columns == other.columns
    expected, found = one.scores(features), other.scores(features)
    np.testing.assert_allclose(found, expected, atol=CLOSE.get(head, 1e-5) * expected.std())


TREES = pytest.param("xgboost", False, marks=pytest.mark.slow)


@pytest.mark.parametrize(("head", "tune"), [("ridge", True), ("ridge", False), TREES])
def test_numbers_come_out_the_same(zoo, pair, thread_executor, tmp_path, head, tune):
    rows = [*zoo.images("train", 100), *zoo.images("val", 20), *zoo.images("test", 40)]
    zoo.write(rows)
    ages = pa.table({"id": [row.id for row in rows], "age": [40 + 9 * float(row.features().sum()) for row in rows]})
    params = {"n_estimators": 40, "colsample_bytree": 1.0} if head == "xgboost" else {}
    here, there, one, other = pair(head=head, tune=tune, target="age", labels=ages, params=params)
    assert tune == (there["search"] is not None)
    assert there["cost"]["cluster"] is not None
    if tune:
        for found, expected in zip(there["search"]["trials"], here["search"]["trials"], strict=True):
            assert found["rmse"] == pytest.approx(expected["rmse"], abs=1e-3)
    apart = 2.0 if head == "xgboost" else 1e-3
    assert np.abs(other.numbers(zoo.features()) - one.numbers(zoo.features())).mean() < apart
    assert there["test"]["mae"]["value"] == pytest.approx(here["test"]["mae"]["value"], abs=apart)
    assert there["calibration"]["half_width"] == pytest.approx(here["calibration"]["half_width"], abs=2 * apart)
    measured = evaluate(tmp_path / "there", zoo.store, labels=ages, cluster=thread_executor, bootstrap=50, silent=True)
    assert measured["metrics"]["mae"]["value"] == pytest.approx(there["test"]["mae"]["value"], rel=1e-6)


@pytest.mark.parametrize(("head", "tune"), [("logistic", True), ("knn", False), TREES])
def test_several_labels_come_out_the_same(zoo, pair, thread_executor, tmp_path, head, tune):
    rows = [*zoo.images("train", 80), *zoo.images("val", 20), *zoo.images("test", 40)]
    zoo.write(rows)
    scores = np.array([row.features() for row in rows]) @ [[1, -1, 0.5], [0.5, 1, -1], [-1, 0.2, 1]]
    scores += 0.5 * np.random.default_rng(0).standard_normal(scores.shape)
    texts = [
        ["" if i % 7 == k else str(int(value > 0.2 * k)) for i, value in enumerate(scores[:, k])] for k in range(3)
    ]
    table = pa.table({"id": [row.id for row in rows], "big": texts[0], "red": texts[1], "soft": texts[2]})
    params = {"n_estimators": 10, "colsample_bytree": 1.0} if head == "xgboost" else {}
    options = {"head": head, "tune": tune, "params": params, "labels": table, "multilabel": ("big", "red", "soft")}
    here, there, one, other = pair(**options, threshold="recall=0.9")
    assert (there["cost"]["cluster"] is not None) == (head != "knn")
    assert there["params"] == here["params"]
    features = zoo.features().select(split="test")
    expected, found = one.scores(features), other.scores(features)
    if head == "xgboost":  # quantiles are joined from those of the workers
        assert np.mean((found > 0) == (expected > 0)) > 0.9
    else:
        np.testing.assert_allclose(found, expected, atol=1e-2 * expected.std())
        assert there["test"]["map"]["value"] == pytest.approx(here["test"]["map"]["value"], abs=1e-3)
        np.testing.assert_allclose(other.thresholds, one.thresholds, atol=2e-2 * expected.std())
    told = {"labels": table, "bootstrap": 50, "silent": True}
    measured, spread = (evaluate(tmp_path / "there", zoo.store, **told, cluster=at) for at in (None, thread_executor))
    assert spread["metrics"]["map"]["value"] == pytest.approx(measured["metrics"]["map"]["value"], rel=1e-6)
    predicted, elsewhere = (
        predict_features(tmp_path / "there", zoo.store, cluster=at, silent=True)["labels"]
        for at in (None, thread_executor)
    )
    assert elsewhere == predicted


def test_ordered_classes_come_out_the_same(zoo, pair, thread_executor, tmp_path):
    rows = [*zoo.images("train", 80), *zoo.images("test", 40)]
    zoo.write(rows)
    hidden = np.array([row.features() for row in rows]) @ [1, -1, 0.5]
    hidden += 0.4 * np.random.default_rng(0).standard_normal(len(rows))
    order = ["low", "mid", "high"]
    names = np.array(order)[np.searchsorted(np.quantile(hidden, [0.4, 0.8]), hidden)]
    table = pa.table({"id": [row.id for row in rows], "label": names.tolist()})
    here, there, one, other = pair(ordered=order, labels=table)
    assert there["cost"]["cluster"] is not None
    np.testing.assert_allclose(other.probabilities(zoo.features()), one.probabilities(zoo.features()), atol=5e-3)
    kappa = here["test"]["quadratic_kappa"]["value"]
    assert there["test"]["quadratic_kappa"]["value"] == pytest.approx(kappa, abs=0.02)
    measured = evaluate(tmp_path / "there", zoo.store, labels=table, cluster=thread_executor, bootstrap=50, silent=True)
    assert measured["metrics"]["quadratic_kappa"]["value"] > 0.6


@pytest.mark.slow
def test_trees_differ_as_little_as_between_two_seeds(zoo, pair, tmp_path):
    zoo.write([*zoo.images("train", 300), *zoo.images("test", 100)])
    here, there, one, other = pair(head="xgboost", params={"n_estimators": 60})
    assert there["cost"]["cluster"] is not None
    assert there["test"]["accuracy"]["value"] == pytest.approx(here["test"]["accuracy"]["value"], abs=0.03)
    features = zoo.features().select(split="test")
    again = train(
        zoo.store, nodes=NODES, out=tmp_path / "b", head="xgboost", params={"n_estimators": 60}, seed=1, silent=True
    )
    assert again["params"] == here["params"]
    seeds = np.abs(one.probabilities(features) - read_bundle(tmp_path / "b").probabilities(features)).mean()
    assert np.abs(one.probabilities(features) - other.probabilities(features)).mean() < max(seeds, 0.01)


@pytest.mark.slow
def test_a_large_search_shares_its_passes(zoo, pair, monkeypatch):
    zoo.write([*zoo.images("train", 100), *zoo.images("test", 40)])
    monkeypatch.setattr(tuning, "SMALL_VALUES", 0)
    monkeypatch.setattr("featurepipe.training.cost.SMALL_VALUES", 0)
    here, there, one, other = pair(head="logistic", tune=True)
    for record in (here, there):
        assert record["search"]["how"].endswith("; in shared passes over the data")
    assert there["params"] == here["params"]
    np.testing.assert_allclose(other.scores(zoo.features()), one.scores(zoo.features()), atol=1e-4)


@pytest.mark.slow
def test_a_search_too_large_for_a_worker_goes_over_spread_features(zoo, pair, monkeypatch):
    zoo.write([*zoo.images("train", 60), *zoo.images("test", 20)])
    monkeypatch.setattr(executor, "MEMORY_USED", 1e-9)
    here, there, _, _ = pair(head="ridge", tune=True)
    assert there["search"]["how"].endswith("each by itself, 1 at a time")
    assert there["params"] == here["params"]


@pytest.mark.slow
def test_trees_too_large_for_a_worker_stop_early_over_spread_features(zoo, pair, monkeypatch):
    zoo.write([*zoo.images("train", 60), *zoo.images("test", 20)])
    monkeypatch.setattr(executor, "MEMORY_USED", 1e-9)
    _, there, _, _ = pair(head="xgboost", params={"max_depth": 3, "min_child_weight": 1.0}, tune=True)
    assert 1 < there["params"]["n_estimators"] < 1000


def test_memory_decides_how_many_fits_there_are_at_a_time(thread_executor, monkeypatch):
    limit = thread_executor.workers()[0].memory_limit
    assert thread_executor.side_by_side(Room(0, 1)) == 2  # one a thread
    assert thread_executor.side_by_side(Room(int(0.5 * limit), int(0.05 * limit))) == 2
    assert thread_executor.side_by_side(Room(int(0.5 * limit), int(0.2 * limit))) == 0
    workers = [replace(worker, memory_limit=0, threads=3) for worker in thread_executor.workers()]  # without limits
    monkeypatch.setattr(thread_executor, "workers", lambda: workers)
    assert thread_executor.side_by_side(Room(limit, limit)) == 6


def test_the_bundle_names_the_cluster(zoo, pair):
    zoo.write([*zoo.images("train", 30), *zoo.images("test", 10)])
    here, there, one, other = pair(head="ridge")
    assert here["cluster"] is None is one.training["cluster"]
    assert there["cluster"] == {"scheduler": there["cost"]["cluster"], "workers": 2, "threads": 2, "hosts": 1}
    assert other.training["cluster"] == there["cluster"]
    assert f"on the cluster {there['cluster']['scheduler']}: 2 workers on 1 machine" in train_text(there)


def test_a_dry_run_says_where_and_connects_to_nobody(zoo, tmp_path):
    zoo.write(zoo.images("train", 30))
    options = {"nodes": NODES, "out": tmp_path / "b", "cluster": "tcp://127.0.0.1:9", "dry_run": True, "silent": True}
    found = train(zoo.store, **options)
    assert "spread over the workers of tcp://127.0.0.1:9: blocks" in cost_text(found)
    assert found["cost"]["cluster"] == "tcp://127.0.0.1:9"
    assert "in memory, scikit-learn" in cost_text(train(zoo.store, head="knn", **options))
    with pytest.raises(UsageError, match=r"memory='2.0 kB' is too little"):
        train(zoo.store, memory="2kB", **options)


def test_what_cannot_be_spread_is_fitted_here_and_says_so(zoo, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("featurepipe.execution.dask.CONNECT_SECONDS", 0.5)
    zoo.write(zoo.images("train", 30))
    options = {"nodes": NODES, "out": tmp_path / "b", "cluster": "tcp://127.0.0.1:9"}  # where nobody is
    assert train(zoo.store, head="knn", **options)["cluster"] is None
    assert "knn keeps all rows in one place: it is fitted here" in capsys.readouterr().err
    assert train(zoo.store, head="rbf-svm", **options)["cluster"] is None
    assert "rbf-svm is exact up to 20,000 images: it is fitted here" in capsys.readouterr().err
    assert train(zoo.store, head="rbf-svm", params={"exact_rows": 10}, dry_run=True, **options)["cost"]["cluster"]
    with pytest.raises(ClusterError, match="no scheduler answers"):
        train(zoo.store, head="ridge", **options)
    with pytest.raises(UsageError, match="names no cluster"):
        train(zoo.store, head="ridge", **{**options, "cluster": "nowhere"})


def test_the_command_line_trains_on_a_cluster(zoo, cli, cluster_address, tmp_path):
    zoo.write([*zoo.images("train", 40), *zoo.images("test", 10)])
    words = (
        "train",
        "store",
        "--node",
        "a:gap",
        "--head",
        "xgboost",
        "--set",
        "n_estimators=5",
        "--out",
        "b",
        "--json",
    )
    done = cli(*words, "--scheduler", cluster_address, cwd=zoo.store.path.parent)  # a store named by a relative path
    assert done.code == 0, done.err
    assert json.loads(done.out)["cluster"]["workers"] == 2


@pytest.mark.parametrize(
    ("cluster", "name"),
    [
        (None, None),
        ("local:2", "local:2"),
        ("tls://me:word@head:8786", "tls://head:8786"),
        ("/home/me/cluster.toml", "cluster.toml"),
        ({"scheduler": "tcp://head:8786"}, "tcp://head:8786"),
        ({"kind": "slurm", "workers": 4}, "slurm"),
    ],
)
def test_a_cluster_is_named_without_secrets(cluster, name):
    assert cluster_name(cluster) == name


def test_clients_and_executors_are_named_by_their_scheduler(dask_executor):
    assert cluster_name(dask_executor) == cluster_name(dask_executor.client) == dask_executor.client.scheduler.address


def test_workers_that_may_yet_come_count(thread_executor):
    thread_executor.most = 5
    assert thread_executor.side_by_side(Room(0, 1)) == 5


def test_a_worker_has_no_more_fits_at_a_time_than_its_memory_permits(zoo, launcher, tmp_path):
    """Four threads, and memory for two; both workers take part."""
    zoo.write(zoo.images("train", 40))
    features = zoo.store.features("zoo", node="a:gap")
    rows = np.arange(len(features))
    log = tmp_path / "log"

    def fit(head, data, train, check):
        with log.open("a") as file:
            file.write(f"{os.getpid()} {time.time()} 1\n")
        time.sleep(0.4)
        with log.open("a") as file:
            file.write(f"{os.getpid()} {time.time()} -1\n")
        return head.C, len(data[0]), len(train)

    with Processes(launcher, tmp_path) as started, connect(started.address) as dask_executor:
        for _ in range(2):
            started.add_worker("--nthreads", "4", "--memory-limit", "3GiB")
        dask_executor.wait_for_workers(2)
        each = int(0.2 * dask_executor.workers()[0].memory_limit)
        folds = [(rows[:60], rows[60:]), (rows[60:], rows[:60])]
        data = TrialRows(partial(rows_in_memory, features), folds, fit, Room(each, each))
        assert dask_executor.side_by_side(data.room) == 4
        found = try_all(dask_executor, data, [RBFSVM(C=float(c)) for c in range(1, 9)], Silent())
    assert found == [(float(c), 120, size) for c in range(1, 9) for size in (60, 60)]
    events = sorted((float(when), who, int(step)) for who, when, step in map(str.split, log.read_text().splitlines()))
    now, most = Counter(), Counter()
    for _, who, step in events:
        now[who] += step
        most[who] = max(most[who], now[who])
    assert sorted(most.values()) == [2, 2]
    assert not list(zoo.store.path.glob(".context-*"))


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_workers_killed_during_a_search_change_nothing(zoo, processes, own_executor, tmp_path, count):
    """Not even if no worker is left that has the rows, and another comes."""
    zoo.write([*zoo.images("train", 400), *zoo.images("test", 40)])
    options = {"nodes": NODES, "head": "rbf-svm", "tune": True, "calibration": False, "silent": True}
    here = train(zoo.store, out=tmp_path / "here", **options)
    victims = own_executor.workers()[:count]

    def kill():
        while not any("fit_try" in key for key in own_executor.client.processing().get(victims[-1].address, ())):
            time.sleep(0.02)
        for victim in victims:
            os.kill(victim.pid, signal.SIGKILL)
        if count == 2:
            processes.add_worker()

    killer = threading.Thread(target=kill)
    killer.start()
    there = train(zoo.store, out=tmp_path / "there", cluster=own_executor, **options)
    killer.join()
    assert not {victim.address for victim in victims}.intersection(own_executor.addresses())
    assert there["search"]["trials"] == here["search"]["trials"]
    assert there["test"]["accuracy"] == here["test"]["accuracy"]
