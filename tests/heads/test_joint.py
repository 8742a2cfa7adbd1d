"""The second derivative of all classes together, and fits of columns that are nearly constant, which need it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

from benchmarks.bench_heads import objective
from featurepipe.heads import BlockLogisticRegression, fit_path
from featurepipe.heads.linear import classifiers, joint, passes
from featurepipe.heads.linear.losses import Measured, Penalty
from featurepipe.heads.linear.optimisers import Optimum
from featurepipe.heads.row_shards import row_shards_of


@pytest.mark.parametrize("intercept", [True, False])
def test_it_solves_with_the_second_derivative_of_all_classes(intercept):
    rng = np.random.default_rng(0)
    classes, width, C = 4, 5, 7.0
    rows = rng.standard_normal((60, width))
    rows = np.column_stack([rows, np.ones(60)]) if intercept else rows
    likely, weights = softmax(2 * rng.standard_normal((classes, 60)), axis=0), rng.uniform(0, 2, 60)
    ridge = np.append(np.ones(width), 0) if intercept else np.ones(width)
    size = len(ridge)
    whole = np.kron(np.eye(classes), np.diag(ridge))
    for row, chance, weight in zip(rows, likely.T, weights, strict=True):
        whole += C * weight * np.kron(np.diag(chance) - np.outer(chance, chance), np.outer(row, row))
    sums = np.einsum("pm,mi,mj->pij", joint.pair_curvature(likely, weights), rows, rows).astype(np.float32)

    solve = joint.JointPreconditioner(sums, C, Penalty(ridge, np.zeros(size), 0.0), classes)

    gradient = rng.standard_normal((classes, size))
    gradient -= gradient.mean(axis=0)
    solved = solve(gradient)
    np.testing.assert_allclose(solved.sum(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose((whole @ solved.ravel()).reshape(classes, size), gradient, atol=2e-4)


def test_a_second_derivative_that_is_too_large_is_not_offered():
    assert joint.joint_bytes(10, 1281) == 4 * (2 * 11529**2 + 46 * 1281**2)
    assert joint.joint_bytes(9, 2049) is None
    assert joint.joint_bytes(31, 11) is None


def test_a_column_that_few_rows_bend_is_measured_by_them():
    rows = np.random.default_rng(0).standard_normal((8000, 20))
    rows[:, 0] = 0
    rows[::1600, 0] = 40  # 5 of 8,000, of which a sample of a twentieth would mostly have none
    measured = Measured(
        1, np.zeros(20), centre=False, intercept=False, share=0.05, diagonal=True, variance=rows.var(axis=0)
    )
    for start in range(0, 8000, 1000):
        block = rows[start : start + 1000]
        measured.add(0, block, np.ones(1000), measured.far_out(block))
    np.testing.assert_allclose(measured.sums[0] / (rows**2).sum(axis=0), 1, atol=0.25)


def rare_columns():
    """Classes that overlap in pairs, and columns which are zero but for a few rows, standardised: 40 deviations out."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 6, 3000)
    features = rng.standard_normal((3000, 24)) + 1.5 * rng.standard_normal((3, 24))[labels // 2]
    features[:, :2] += 0.5 * rng.standard_normal((6, 2))[labels]
    features[:, 16:] *= rng.random((3000, 8)) < np.logspace(-2.8, -1, 8)
    return (features - features.mean(axis=0)) / features.std(axis=0), labels


@pytest.mark.parametrize("memory", [None, "1MB"])
def test_nearly_constant_columns_reach_scikit_learns_optimum_in_few_passes(monkeypatch, memory):
    """By L-BFGS in float32 and then Newton's steps: kept in memory, and streamed."""
    monkeypatch.setattr(passes, "_SMALL_BYTES", 0)
    monkeypatch.setattr(passes, "_LEAST_PATIENCE", {np.dtype(np.float32): 30})
    features, labels = rare_columns()
    other = LogisticRegression(C=100.0, solver="newton-cholesky", tol=1e-10, max_iter=1000).fit(features, labels)
    features = features.astype(np.float32)
    least = objective(other, features, labels, 100.0)
    counted = []
    call = passes.Passes.__call__
    monkeypatch.setattr(
        passes.Passes, "__call__", lambda self, *asked: (counted.append(len(asked[0])), call(self, *asked))[1]
    )
    head = BlockLogisticRegression(C=100.0, memory=memory).fit(features, labels)
    assert objective(head, features, labels, 100.0) <= least * (1 + 1e-6)
    assert (head.predict(features) != other.predict(features)).mean() < 1e-3
    assert len(counted) <= 75  # L-BFGS alone stops, after 84, 5e-5 above
    if memory is None:
        [[again]] = fit_path(BlockLogisticRegression(), features, labels, Cs=[100.0])
        np.testing.assert_array_equal(head.coef_, again.coef_)


def test_l_bfgs_goes_on_as_long_as_a_factor_costs():
    def patience(rows, dtype, classes, width):
        shares = row_shards_of(np.zeros((rows, 1)))
        prepared = passes.Prepared(shares, np.dtype(dtype), np.zeros(width), centred=True)
        return passes.patience_of(prepared, (classes, width + 1))

    assert patience(3000, np.float64, 6, 24) == 30
    assert patience(60_000, np.float32, 10, 1280) == 250
    assert patience(1600, np.float64, 10, 1392) > 5000  # few wide rows: passes cost next to nothing


def test_so_many_problems_at_a_time_as_memory_allows_are_finished_by_newton():
    prepared = passes.Prepared(None, np.dtype(np.float64), np.ones(3), centred=False)
    asked = []

    def solve(method, features, chosen, starts, iterations):
        asked.append((method.__name__, features.dtype, list(chosen), list(iterations)))
        return [Optimum(start + 1, 5, converged=True) for start in starts]

    stopped = [Optimum(np.zeros((3, 4)), 10, converged=i == 1) for i in range(4)]
    found = classifiers.finished(stopped, prepared, 100, solve, joint_at_once=2)
    assert asked == [("newton", np.float64, [0, 2], [90, 90]), ("newton", np.float64, [3], [90])]
    assert [one.iterations for one in found] == [15, 10, 15, 15]
