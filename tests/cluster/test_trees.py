"""Trees that workers grow together are those of one machine; and what happens when a worker is lost meanwhile."""

import os
import signal
import threading
import time
from functools import partial

import numpy as np
import pytest
from sklearn.datasets import load_digits

from featurepipe.errors import ClusterError, UsageError
from featurepipe.execution import connect, spread
from featurepipe.execution.row_shard import TRIES, gang_run
from featurepipe.heads import BoostedTrees, make_head
from featurepipe.training.train import train

LEARN = slice(0, 1200)
CHECK = slice(1200, None)


@pytest.fixture(scope="module")
def digits():
    """1,797 images of 64 whole numbers from 0 to 16: quantiles of their parts are those of the whole."""
    features, numbers = load_digits(return_X_y=True)
    order = np.argsort(numbers[LEARN], kind="stable")  # no worker has all classes
    order = np.concatenate([order, np.arange(1200, len(numbers))])
    return features[order].astype(np.float32), np.array([f"digit {number}" for number in numbers[order]])


def trees(rounds=8, **changes):
    return BoostedTrees(rounds, max_depth=3, colsample_bytree=0.3, n_jobs=1, random_state=3, **changes)


def dump(head):
    return head.booster_.get_dump(dump_format="json")


@pytest.mark.parametrize("kinds", [10, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_same_trees_grow_where_quantiles_are_the_same(dask_executor, digits, kinds, weighted):
    features, labels = digits
    few = np.isin(labels, np.unique(labels)[:kinds])
    features, labels = features[few], labels[few]
    weights = np.random.default_rng(1).uniform(0.2, 3, len(labels)) if weighted else None
    here = trees().fit(features, labels, weights)
    there = trees().fit(spread(features, dask_executor), labels, weights)
    assert there.classes_.tolist() == here.classes_.tolist()
    assert there.predict(features).tolist() == here.predict(features).tolist()
    np.testing.assert_allclose(
        there.predict_proba(features), here.predict_proba(features), atol=2e-3 if weighted else 1e-5
    )


def test_real_valued_features_give_trees_that_agree_nearly_always(dask_executor, digits):
    features, labels = digits
    features = features + np.random.default_rng(0).normal(0, 0.5, features.shape).astype(np.float32)
    here, there = (
        trees(30).fit(features[LEARN], labels[LEARN]),
        trees(30).fit(spread(features[LEARN], dask_executor), labels[LEARN]),
    )
    assert dump(there) != dump(here)  # else the features above were enough to look at
    assert (there.predict(features[CHECK]) == here.predict(features[CHECK])).mean() > 0.93
    accuracies = [(head.predict(features[CHECK]) == labels[CHECK]).mean() for head in (here, there)]
    assert accuracies[1] == pytest.approx(accuracies[0], abs=0.03)


def test_early_stopping_looks_at_the_validation_rows_of_all_workers(dask_executor, digits):
    features, labels = digits
    noisy = np.where(np.random.default_rng(0).random(len(labels)) < 0.2, np.roll(labels, 7), labels)
    options = {"learning_rate": 0.5, "early_stopping_rounds": 3}
    here = trees(200, **options).fit(features[LEARN], noisy[LEARN], eval_set=(features[CHECK], noisy[CHECK]))
    every = spread(features, dask_executor)
    there = trees(200, **options).fit(every.take(LEARN), noisy[LEARN], eval_set=(every.take(CHECK), noisy[CHECK]))
    assert there.best_iteration_ == here.best_iteration_ < len(here.evaluation_) - 1 < 199
    np.testing.assert_allclose(there.evaluation_, here.evaluation_, rtol=1e-5)
    with pytest.raises(UsageError, match="those of eval_set are not: spread them, too"):
        trees(**options).fit(every.take(LEARN), noisy[LEARN], eval_set=(features[CHECK], noisy[CHECK]))


def test_trees_grow_on_what_the_steps_before_them_make(dask_executor, digits):
    features, labels = digits
    options = {"pca": 10, "out_of_core": True, "n_estimators": 5, "n_jobs": 1}
    here = make_head("xgboost", **options).fit(features, labels)
    there = make_head("xgboost", **options).fit(spread(features, dask_executor), labels)
    assert (there.predict(spread(features, dask_executor)) == here.predict(features)).mean() > 0.93
    assert there.predict(features).tolist() == there.predict(spread(features, dask_executor)).tolist()


def test_a_value_that_is_not_finite_is_named_and_no_worker_waits(dask_executor, said, digits):
    features, labels = digits
    features = features.copy()
    features[1500, 3] = np.nan
    with pytest.raises(UsageError, match="contains NaN: row 1500"):
        trees().fit(spread(features, dask_executor), labels)
    assert not said
    assert trees(2).fit(spread(features[LEARN], dask_executor), labels[LEARN]).predict(features[:1]).tolist() == [
        "digit 0"
    ]


# Working together


class Rendezvous:
    """Where nobody is told anything."""

    def __init__(self, host, count):
        self.about = {"host": host, "count": count}

    def told(self):
        return self.about

    def close(self):
        pass


def ranked(rank, shards):
    return (
        rank.rank,
        rank.world_size,
        rank.threads,
        rank.rendezvous,
        [blocks.shape for blocks, *_ in shards],
        os.getpid(),
    )


def failing(rank, shards, *, who, error):
    if rank.rank == who:
        raise error
    return rank.rank


def test_each_worker_has_a_seat_and_its_shares(dask_executor):
    shards = spread(np.zeros((30, 4), np.float32), dask_executor).row_shards()
    answers = gang_run(dask_executor, ranked, Rendezvous, [shards.whole])
    assert [answer[0] for answer in answers] == [0, 1]
    assert all(answer[1:5] == (2, 1, {"host": "127.0.0.1", "count": 2}, [(15, 4)]) for answer in answers)
    assert {answer[5] for answer in answers} == {worker.pid for worker in dask_executor.workers()}


def test_our_own_errors_are_raised_at_once_and_others_after_some_tries(dask_executor, said):
    shards = spread(np.zeros((30, 4), np.float32), dask_executor).row_shards()
    with pytest.raises(UsageError, match="no good"):
        gang_run(dask_executor, partial(failing, who=1, error=UsageError("no good")), Rendezvous, [shards.whole])
    assert not said
    with pytest.raises(
        ClusterError, match=r"failed \(OSError: broken wire\), at the last of 3 tries. Workers .* see their logs"
    ):
        gang_run(dask_executor, partial(failing, who=0, error=OSError("broken wire")), Rendezvous, [shards.whole])
    assert len(said) == TRIES - 1
    assert said[0].endswith("failed (OSError: broken wire); those that are left begin this again")


def test_two_who_need_all_workers_wait_for_each_other(dask_executor, cluster_address, digits):
    features, labels = digits
    found = []

    def grow(own_executor):
        found.append(trees(30).fit(spread(features, own_executor), labels))

    with connect(cluster_address, say=lambda _: None) as other:
        threads = [threading.Thread(target=grow, args=(each,)) for each in (dask_executor, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(found) == 2
    assert dump(found[0]) == dump(found[1])


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["the first, where all meet", "the last"])
def test_a_worker_killed_while_trees_grow_costs_another_try(own_executor, said, digits, victim):
    features, labels = digits
    workers = {worker.address: worker.pid for worker in own_executor.workers()}
    growing = spread(features, own_executor)
    places = [place.worker for place in growing.row_shards().places]
    lost = places[0 if victim.startswith("the first") else -1]

    def kill():
        while not any(key.startswith("Attempt") for keys in own_executor.client.processing().values() for key in keys):
            time.sleep(0.05)
        time.sleep(2)  # they have met, and some trees have grown
        os.kill(workers[lost], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    head = trees(400).fit(growing, labels)
    killer.join()
    assert said == [f"worker {lost} was lost; those that are left begin this again"]
    assert head.booster_.num_boosted_rounds() == 400
    assert (head.predict(features) == labels).mean() > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("while_", ["trees grow", "a search runs"])
def test_a_scheduler_killed_meanwhile_ends_it_with_the_next_step(processes, zoo, tmp_path, while_):
    zoo.write([*zoo.images("train", 2000)])
    trees_ = {"head": "xgboost", "params": {"n_estimators": 20000}}
    slow = trees_ if while_ == "trees grow" else {"head": "rbf-svm", "tune": True}
    ended = threading.Timer(8, processes.scheduler.kill)
    start = time.monotonic()
    ended.start()
    with pytest.raises(ClusterError, match=r"the scheduler .* is gone.* give the same command again"):
        train(zoo.store, nodes="a:gap", out=tmp_path / "b", cluster=processes.address, silent=True, **slow)
    assert 8 <= time.monotonic() - start < 60
