"""Any search of scikit-learn on a Dask cluster, for features that fit into one worker's memory.

    python pipelines/grid_search.py                                       # two processes here, the images that come along
    python pipelines/grid_search.py --store STORE --dataset photos --node bottleneck --scheduler tcp://head:8786

A copy of this file is yours to change: another estimator, another grid, another search. For the families of heads there is
``featurepipe train --tune --scheduler ...``, which also takes features that fit nowhere; this is for everything else.

What usually goes wrong with ``GridSearchCV`` on Dask, and what is done about it here (the numbers are in the code):

1. The features travel again with every fit. They are sent to each worker once, before the first fit.
2. A feature set is not an array. It is read into one here, since scikit-learn's estimators want arrays.
3. Every fit starts as many threads as there are cores, beside other fits that do. Dask's nanny, under which ``dask worker``
   starts workers, sets OMP_NUM_THREADS=1 for them; what counts cores by itself (xgboost, forests) is told ``n_jobs=1``.
4. Fits of milliseconds cost more to send than to do; joblib sends such ones in batches, and long ones one by one.
5. Fits that fail become NaN in a table. They raise.
6. Copies of an image are on both sides of a fold, and the best parameters are those that learn by heart. Copies stay together.
7. Nobody works, and nothing says so. After a minute without a worker there is an error.

One remains: a worker that dies may take with it the only copy of what joblib had sent to it, and then the search ends. Give it
again; ``featurepipe train --tune`` goes on without the worker.
"""
# ruff: noqa: INP001 - a script to copy, no part of the package

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from joblib import parallel_config
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

import featurepipe as fp
from featurepipe.demo import BACKBONE, DATA
from featurepipe.display import table
from featurepipe.execution import DaskExecutor, connect
from featurepipe.store import FeatureSet

ESTIMATOR = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))  # 3. another one may need n_jobs=1
GRID: Mapping[str, Sequence[Any]] = {
    "standardscaler": [StandardScaler(), Normalizer(), "passthrough"],  # what no head of featurepipe searches
    "logisticregression__C": [0.001, 0.01, 0.1, 1.0],
}
FOLDS = 5


def features_of(store: Path, dataset: str | None, node: str) -> FeatureSet:
    """The rows to search on: those of the split ``train``, if there are splits, that have a label."""
    opened = fp.FeatureStore(store)
    if not opened.exists:  # the 2,000 images that come with featurepipe; half a minute
        fp.extract(DATA, opened, dataset="clothes", backbone=BACKBONE, nodes=[node])
    features = opened.features(dataset or opened.only_dataset(), node=node).select(labelled=True)
    return features.select(split="train") if "train" in features.splits else features


def search_on(executor: DaskExecutor, features: FeatureSet, grid: Mapping[str, Sequence[Any]] = GRID) -> GridSearchCV:
    """Fits every point of the grid on every fold, and the best once more, here, on all rows."""
    X, y = features.numpy()  # 2. float32: what the estimators compute in, and half of what float64 takes
    search = GridSearchCV(
        ESTIMATOR,
        dict(grid),
        cv=StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0),
        n_jobs=-1,  # all threads of all workers
        pre_dispatch="2*n_jobs",  # 4. one fit for each thread, and the next at hand
        error_score="raise",  # 5.
        verbose=0,
    )
    with parallel_config(
        "dask",
        client=executor.client,
        scatter=[X, y],  # 1. these objects; a copy, as X[:] or X.astype(...) make, would travel with each fit
        wait_for_workers_timeout=60,  # 7.
    ):
        return search.fit(X, y, groups=features.keys64)  # 6. the key is the image's content: copies have the same


def check_room(executor: DaskExecutor, features: FeatureSet) -> None:
    """Refuses features too large for a worker: X, and for each of its threads a fold and its scaled copy."""
    for worker in executor.workers():
        need = (1 + 3 * worker.threads) * features.shape[0] * features.shape[1] * np.dtype(np.float32).itemsize
        if worker.memory_limit and need > 0.6 * worker.memory_limit:
            raise SystemExit(
                f"{worker} has {worker.memory_limit / 1e9:.1f} GB for {worker.threads} threads, about {need / 0.6e9:.1f} GB are "
                "needed: give workers fewer threads or more memory, or use featurepipe train --tune, which reads blocks"
            )


def trials(search: GridSearchCV) -> str:
    """The grid's points and how they did, best first."""
    results = search.cv_results_
    rows = [
        [
            ", ".join(f"{name.split('__')[-1]}={value}" for name, value in results["params"][place].items()),
            f"{results['mean_test_score'][place]:.4f} +- {results['std_test_score'][place]:.4f}",
            f"{results['mean_fit_time'][place]:.1f}",
        ]
        for place in np.argsort(results["rank_test_score"], kind="stable")
    ]
    return table(["parameters", f"accuracy, {FOLDS} folds", "seconds a fit"], rows)


def main() -> None:
    """Reads the options, searches, prints."""
    options = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    options.add_argument("--store", type=Path, default=Path("pipelines/out/grid_search"), help="default: %(default)s")
    options.add_argument("--dataset", help="default: the store's only one")
    options.add_argument("--node", default="bottleneck", help="default: %(default)s")
    options.add_argument("--scheduler", "--cluster", dest="cluster", default="local:2", metavar="ADDRESS|local:N|FILE",
                         help="as featurepipe takes it (default: %(default)s)")  # fmt: skip
    args = options.parse_args()

    features = features_of(args.store, args.dataset, args.node)
    with connect(args.cluster) as executor:
        executor.wait_for_workers()
        check_room(executor, features)
        threads = sum(worker.threads for worker in executor.workers())
        print(f"{features!r} on {threads} threads of {executor.address}")
        start = time.perf_counter()
        found = search_on(executor, features)
    print(trials(found))
    print(f"best: {found.best_params_}, in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":  # worker processes of local:N import this file, and must not run it
    main()
