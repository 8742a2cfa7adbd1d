"""Fits whose workers die, or have too little memory for the features."""

import threading
import time
from typing import Any

import numpy as np
import pytest

from featurepipe.cluster import Team, spread
from featurepipe.errors import ClusterError
from featurepipe.heads import BlockLogisticRegression, passes
from featurepipe.heads.blocks import ArrayBlocks

pytestmark = pytest.mark.slow


def made(rows: int = 6000, width: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 3, rows)
    features = rng.standard_normal((rows, width)) + 1.5 * np.eye(3, width)[codes]
    return features.astype(np.float16), codes


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
    own_team: Team, processes: Any, at_pass: Any, delay: float
) -> None:
    """At the beginning of a pass, in it, and between two (it is over before the worker is killed)."""
    features, codes = made()
    here = BlockLogisticRegression(C=10.0).fit(ArrayBlocks(features), codes)
    processes.add_worker()
    own_team.wait_for_workers(3)
    there = spread(features, own_team)
    done = at_pass(3, processes.workers[1].kill, delay)
    head = BlockLogisticRegression(C=10.0).fit(there, codes)
    assert len(done) > 4
    assert processes.workers[1].wait(5) < 0
    assert objective(head, features, codes) == pytest.approx(objective(here, features, codes), rel=1e-6)
    again = BlockLogisticRegression(C=10.0).fit(there, codes)  # on the workers that are left
    assert objective(again, features, codes) == pytest.approx(objective(here, features, codes), rel=1e-6)
    assert len(there.shared().places) == 2


def test_a_fit_whose_workers_all_die_ends_with_an_error(own_team: Team, processes: Any, at_pass: Any) -> None:
    own_team.patience = 2.0
    features, codes = made()

    def kill() -> None:
        for worker in processes.workers:
            worker.kill()

    at_pass(3, kill, 0.0)
    start = time.monotonic()
    with pytest.raises(ClusterError, match=r"no worker came .* within 2 s"):
        BlockLogisticRegression(C=10.0).fit(spread(features, own_team), codes)
    assert time.monotonic() - start < 30


def test_a_fit_whose_scheduler_dies_ends_with_an_error(own_team: Team, processes: Any, at_pass: Any) -> None:
    features, codes = made()
    at_pass(3, processes.scheduler.kill, 0.0)
    start = time.monotonic()
    with pytest.raises(ClusterError, match="the scheduler of the cluster is gone"):
        BlockLogisticRegression(C=10.0).fit(spread(features, own_team), codes)
    assert time.monotonic() - start < 40
