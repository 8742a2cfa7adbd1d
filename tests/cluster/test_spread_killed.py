"""Fits whose workers die, or have too little memory for the features."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from distributed import LocalCluster

from featurepipe.errors import ClusterError
from featurepipe.execution import DaskExecutor, connect, spread
from featurepipe.heads import BlockLogisticRegression
from featurepipe.heads.blocks import ArrayBlocks
from featurepipe.heads.linear import passes
from featurepipe.store import FeatureSet, FeatureStore
from featurepipe.store.snapshots import SCHEMA

pytestmark = pytest.mark.slow


def made(rows: int = 6000, width: int = 40, dtype: Any = np.float16) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 3, rows)
    features = rng.standard_normal((rows, width)) + 1.5 * np.eye(3, width)[codes]
    return features.astype(dtype), codes


def objective(head: BlockLogisticRegression, features: np.ndarray, codes: np.ndarray) -> float:
    scores = features.astype(np.float64) @ head.coef_.T + head.intercept_
    losses = np.logaddexp.reduce(scores, axis=1) - scores[np.arange(len(codes)), codes]
    return float(head.C * losses.sum() + (head.coef_**2).sum() / 2)


@pytest.fixture
def at_pass(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has something done while a pass, given by its number, is on its way, and waits for it to happen."""

    def plan(number: int, act: Any, delay: float) -> list[int]:
        done = []
        call = passes.Passes.__call__

        def counted(self: Any, *arguments: Any) -> Any:
            done.append(self.count)
            if len(done) == number:
                timer = threading.Timer(delay, act)
                timer.start()
            found = call(self, *arguments)
            if len(done) == number:
                timer.join()
            return found

        monkeypatch.setattr(passes.Passes, "__call__", counted)
        return done

    return plan


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.3])
def test_a_worker_killed_in_a_fit_costs_nothing_but_time(
    own_executor: DaskExecutor, processes: Any, at_pass: Any, delay: float
) -> None:
    """At the beginning of a pass, in it, and between two (it is over before the worker is killed)."""
    features, codes = made()
    here = BlockLogisticRegression(C=10.0).fit(ArrayBlocks(features), codes)
    processes.add_worker()
    own_executor.wait_for_workers(3)
    there = spread(features, own_executor)
    done = at_pass(3, processes.workers[1].kill, delay)
    head = BlockLogisticRegression(C=10.0).fit(there, codes)
    assert len(done) > 4
    assert processes.workers[1].wait().code < 0
    assert objective(head, features, codes) == pytest.approx(objective(here, features, codes), rel=1e-6)
    again = BlockLogisticRegression(C=10.0).fit(there, codes)  # on the workers that are left
    assert objective(again, features, codes) == pytest.approx(objective(here, features, codes), rel=1e-6)
    assert len(there.row_shards().places) == 2


def test_a_fit_goes_on_with_workers_that_came_after_all_others_died(
    own_executor: DaskExecutor, processes: Any, at_pass: Any, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featurepipe.execution.worker_pool.TOLD_SECONDS", 120.0)
    features, codes = made()
    here = BlockLogisticRegression(C=10.0).fit(ArrayBlocks(features), codes)

    def replace() -> None:
        for worker in processes.workers:
            worker.kill()
            worker.wait()
        processes.add_worker()

    done = at_pass(3, replace, 0.0)
    head = BlockLogisticRegression(C=10.0).fit(spread(features, own_executor), codes)
    assert len(done) > 4
    assert objective(head, features, codes) == pytest.approx(objective(here, features, codes), rel=1e-6)
    assert said == ["workers that kept features are gone; those that are there now read them again"]


def test_a_fit_whose_workers_all_die_ends_with_an_error(
    own_executor: DaskExecutor, processes: Any, at_pass: Any
) -> None:
    own_executor.patience = 2.0
    features, codes = made()

    def kill() -> None:
        for worker in processes.workers:
            worker.kill()

    at_pass(3, kill, 0.0)
    start = time.monotonic()
    with pytest.raises(ClusterError, match=r"no worker came .* within 2 s"):
        BlockLogisticRegression(C=10.0).fit(spread(features, own_executor), codes)
    assert time.monotonic() - start < 30


def test_a_fit_whose_scheduler_dies_ends_with_an_error(
    own_executor: DaskExecutor, processes: Any, at_pass: Any
) -> None:
    features, codes = made()
    at_pass(3, processes.scheduler.kill, 0.0)
    start = time.monotonic()
    with pytest.raises(ClusterError, match=r"the scheduler tcp://\S+ is gone"):
        BlockLogisticRegression(C=10.0).fit(spread(features, own_executor), codes)
    assert time.monotonic() - start < 40


LIMIT = 400_000_000  # bytes, of one worker, whose libraries take 150 MB of them


def stored(folder: Path, features: np.ndarray, codes: np.ndarray) -> FeatureSet:
    """A store of these features, in two parts."""
    store = FeatureStore(folder)
    space = store.open_space(
        {"dtype": str(features.dtype), "net": "tiny", "precision": "fp32"}, backbone="tiny", notes={}
    )
    ids = [f"{number}.png" for number in range(len(codes))]
    keys = np.zeros((len(codes), 32), np.uint8)
    keys[:, :8] = np.arange(len(codes), dtype="<u8").reshape(-1, 1).view(np.uint8)
    run_id, number = store.new_run_id(), np.arange(len(codes))
    for rows in np.array_split(number, 2):
        with space.writer(run_id) as writer:
            writer.add(keys[rows], [ids[row] for row in rows], rows, rows, {"a:gap": features[rows]})
    columns: dict[str, Any] = {
        "id": ids, "key": [key.tobytes() for key in keys], "label": [f"class {code}" for code in codes],
        "split": [None] * len(codes), "size": number, "mtime_ns": number, "status": ["ok"] * len(codes),
        "reason": [None] * len(codes),
    }  # fmt: skip
    store.write_snapshot("many", run_id, pa.table(columns, schema=SCHEMA))
    return store.features("many", node="a:gap")


def test_features_of_four_times_a_workers_memory_are_learned_from(tmp_path: Path, said: list[str]) -> None:
    """The rows of a small store, taken many times over: as many passes over real parts, with a known optimum."""
    features, codes = made(
        20_000, 512, np.float32
    )  # as many bytes are half as many rows, and nothing is to be converted
    times = 4 * LIMIT // features.nbytes + 1
    once = stored(tmp_path / "store", features, codes)
    many = once.take(np.tile(np.arange(len(codes)), times))
    assert many.shape[0] * features[0].nbytes > 4 * LIMIT
    options = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0", "threads_per_worker": 1, "silence_logs": 50}
    with LocalCluster(1, memory_limit=LIMIT, **options) as cluster, connect(cluster, say=said.append) as dask_executor:
        before = {worker.pid for worker in dask_executor.workers()}
        head = BlockLogisticRegression(C=1e-4 / times).fit(spread(many, dask_executor))
        assert {worker.pid for worker in dask_executor.workers()} == before  # no worker was ended for its memory
    here = BlockLogisticRegression(C=1e-4).fit(ArrayBlocks(features), codes)  # six passes; weights up to 0.3
    there = here.__class__(C=1e-4)
    there.coef_, there.intercept_ = head.coef_, head.intercept_
    assert objective(there, features, codes) == pytest.approx(objective(here, features, codes), rel=1e-6)
