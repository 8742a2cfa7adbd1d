"""The recipe pipelines/grid_search.py: it finds what scikit-learn finds here, and sends the features once."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dask.sizeof import sizeof
from distributed import Client
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold

SCRIPT = Path(__file__).parents[2] / "pipelines" / "grid_search.py"


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("grid_search", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sent(monkeypatch):
    """What is put onto workers besides tasks: (bytes, whether every worker gets it)."""
    found = []
    scatter = Client.scatter

    def watched(client, data, *args, broadcast=False, **options):
        found.extend((sizeof(each), bool(broadcast)) for each in (data if isinstance(data, list) else [data]))
        return scatter(client, data, *args, broadcast=broadcast, **options)

    monkeypatch.setattr(Client, "scatter", watched)
    return found


@pytest.fixture
def features(zoo, recipe):
    rows = zoo.images("train", 60)
    copies = [replace(row, id=f"copy/{row.id}") for row in rows[::3]]
    zoo.write(
        [*rows, *copies, *(replace(row, id=f"u/{row.id}", label=None) for row in rows[:3]), *zoo.images("test", 30)]
    )
    return recipe.features_of(zoo.store.path, None, "a:gap")


def test_it_searches_on_labelled_rows_that_train(features):
    assert set(features.splits) == {"train"}
    assert len(features) == 240 == len(features) - features.unlabelled


@pytest.mark.slow
def test_it_finds_what_a_search_here_finds(recipe, features, dask_executor):
    found = recipe.search_on(dask_executor, features)
    X, y = features.numpy()
    folds = StratifiedGroupKFold(recipe.FOLDS, shuffle=True, random_state=0)
    assert all(
        not np.intersect1d(*(features.keys64[part] for part in fold)).size
        for fold in folds.split(X, y, features.keys64)
    )
    here = GridSearchCV(recipe.ESTIMATOR, dict(recipe.GRID), cv=folds).fit(X, y, groups=features.keys64)
    assert found.best_index_ == here.best_index_
    np.testing.assert_array_equal(found.cv_results_["mean_test_score"], here.cv_results_["mean_test_score"])
    assert found.predict(X).tolist() == here.predict(X).tolist()
    best, *_ = recipe.trials(found).splitlines()[1:]
    assert f"{found.best_score_:.4f} +- " in best


@pytest.mark.slow
def test_the_features_are_sent_to_each_worker_once(recipe, features, dask_executor, sent):
    recipe.search_on(dask_executor, features)
    X, y = features.numpy()
    assert [size for size, everywhere in sent if everywhere] == [sizeof(X), sizeof(y)]
    others = [size for size, everywhere in sent if not everywhere]
    assert others == [sizeof(np.empty(192, np.int64))] * recipe.FOLDS  # each fold's training rows, once for 12 fits


def test_a_fit_that_fails_is_no_number_in_a_table(recipe, features, dask_executor):
    with pytest.raises(ValueError, match=r"Got -1.0 instead"):
        recipe.search_on(dask_executor, features, {"logisticregression__C": [-1.0]})


def test_features_that_no_worker_can_hold_are_refused(recipe, features, thread_executor, monkeypatch):
    recipe.check_room(thread_executor, features)
    workers = [replace(worker, memory_limit=1000) for worker in thread_executor.workers()]
    monkeypatch.setattr(thread_executor, "workers", lambda: workers)
    with pytest.raises(SystemExit, match="give workers fewer threads or more memory"):
        recipe.check_room(thread_executor, features)


@pytest.mark.slow
def test_it_runs_as_a_script_that_starts_its_own_workers(features, tmp_path):
    command = [sys.executable, str(SCRIPT), "--store", features.origin.store, "--node", "a:gap", "--cluster", "local:2"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300)
    assert run.returncode == 0, run.stderr
    heading, *rows, last = run.stdout.splitlines()
    assert heading.startswith("<FeatureSet zoo: a:gap (240, 1), stored as float32> on 2 threads of tcp://127.0.0.1:")
    accuracies = [float(row.split("+-")[0].split()[-1]) for row in rows[1:]]
    assert accuracies == sorted(accuracies, reverse=True)
    assert len(accuracies) == 12
    assert accuracies[0] > 0.5  # a third by chance
    assert last.startswith("best: {")
