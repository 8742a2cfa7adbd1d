"""The second derivative of all classes together, and fits of columns that are nearly constant, which need it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

from benchmarks.bench_heads import objective
from featurepipe.heads import BlockLogisticRegression, fit_path
from featurepipe.heads.blocks import RowThreads
from featurepipe.heads.linear import classifiers, joint, passes
from featurepipe.heads.linear.losses import (
    CholeskyPreconditioner,
    DiagonalPreconditioner,
    Measured,
    Penalty,
    SubspacePreconditioner,
)
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
        measured.add(0, block, np.ones(1000), measured.far_out(measured.squares(block)))
    np.testing.assert_allclose(measured.sums[0] / (rows**2).sum(axis=0), 1, atol=0.25)


def test_a_direction_that_no_chosen_row_tells_of_is_not_taken_for_flat():
    """Of two columns that never meet, one is zero in all rows that are likely to be chosen: the diagonal is still that of all."""
    rows = np.zeros((4000, 2))
    rows[:, 0] = 10
    rows[::400, 0], rows[::400, 1] = 0, 1e-3
    measured = Measured(1, np.zeros(2), centre=False, intercept=True, share=0.01, diagonal=False)
    for start in range(0, 4000, 1000):
        block, curvature = rows[start : start + 1000], np.full(1000, 0.5)
        squares = measured.squares(block)
        curvature[::400] = 1e-9
        measured.add(0, block, curvature, measured.far_out(squares), curvature @ squares)
    with RowThreads(wanted=False) as threads:
        [found] = measured.finish(threads)
    curvature = np.tile(np.where(np.arange(1000) % 400 == 0, 1e-9, 0.5), 4)
    whole = (np.column_stack([rows, np.ones(4000)]) ** 2 * curvature[:, None]).sum(axis=0)
    assert (np.diag(found) >= whole * (1 - 1e-12)).all()
    np.testing.assert_allclose(np.diag(found)[1], whole[1])
    np.testing.assert_allclose(np.diag(found)[[0, 2]], whole[[0, 2]], rtol=0.05)
    assert found[0, 1] == found[1, 0] == 0


def test_curvature_that_is_next_to_nothing_is_left_out():
    """Two classes that no row wavers between: float32 has no inverse of their products of probabilities."""
    measured = Measured(1, np.zeros(2, np.float32), centre=False, intercept=False, share=0.5, diagonal=False)
    block, curvature = np.ones((100, 2), np.float32), np.full(100, 1e-41, np.float32)
    squares = measured.squares(block)
    measured.add(0, block, curvature, measured.far_out(squares), curvature @ squares)
    with RowThreads(wanted=False) as threads:
        assert (measured.finish(threads) < 1e-38).all()


def rare_columns():
    """Classes that overlap in pairs, and columns which are zero but for a few rows, standardised: 40 deviations out."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 6, 3000)
    features = rng.standard_normal((3000, 24)) + 1.5 * rng.standard_normal((3, 24))[labels // 2]
    features[:, :2] += 0.5 * rng.standard_normal((6, 2))[labels]
    features[:, 16:] *= rng.random((3000, 8)) < np.logspace(-2.8, -1, 8)
    return (features - features.mean(axis=0)) / features.std(axis=0), labels


def count_passes(monkeypatch):
    """Notes how many problems each pass evaluates, from now on."""
    counted, call = [], passes.Passes.__call__
    monkeypatch.setattr(
        passes.Passes, "__call__", lambda self, *asked: (counted.append(len(asked[0])), call(self, *asked))[1]
    )
    return counted


@pytest.mark.parametrize("memory", [None, "1MB"])
def test_nearly_constant_columns_reach_scikit_learns_optimum_in_few_passes(monkeypatch, memory):
    """By L-BFGS in float32 and then with all classes' curvature: kept in memory, and streamed."""
    monkeypatch.setattr(passes, "_SMALL_BYTES", 0)
    monkeypatch.setattr(passes, "_LEAST_PATIENCE", {np.dtype(np.float32): 30})
    features, labels = rare_columns()
    other = LogisticRegression(C=100.0, solver="newton-cholesky", tol=1e-10, max_iter=1000).fit(features, labels)
    features = features.astype(np.float32)
    least = objective(other, features, labels, 100.0)
    counted = count_passes(monkeypatch)
    head = BlockLogisticRegression(C=100.0, memory=memory).fit(features, labels)
    assert objective(head, features, labels, 100.0) <= least * (1 + 1e-6)
    assert (head.predict(features) != other.predict(features)).mean() < 1e-3
    assert len(counted) <= 75  # L-BFGS alone stops, after 84, 5e-5 above
    if memory is None:
        [[again]] = fit_path(BlockLogisticRegression(), features, labels, Cs=[100.0])
        np.testing.assert_array_equal(head.coef_, again.coef_)


def rectified_columns(width, classes=8):
    """Rectified mixtures, the last zero in nearly all rows, standardised; pairs of classes are mistaken for one another."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, 6000)
    mixing = rng.standard_normal((width, width)) / np.arange(1, width + 1)[:, None]
    centres = 4 * rng.standard_normal((classes // 2, width))[labels // 2]
    hidden = rng.standard_normal((6000, width)) + centres + 0.2 * rng.standard_normal((classes, width))[labels]
    mixed = hidden @ mixing
    mixed = (mixed - mixed.mean(axis=0)) / mixed.std(axis=0)
    features = np.maximum(mixed - np.linspace(0, 3.4, width), 0)
    features = features[:, (features > 0).sum(axis=0) > 2]
    return ((features - features.mean(axis=0)) / features.std(axis=0)).astype(np.float32), labels


def test_at_a_large_c_the_gap_is_as_small_as_promised_in_500_passes(monkeypatch):
    """In float32, where the estimate by the classes' own curvature alone let L-BFGS stop 3e-5 above the optimum."""
    monkeypatch.setattr(passes, "_SMALL_BYTES", 0)
    features, labels = rectified_columns(96)
    other = LogisticRegression(C=100.0, solver="newton-cholesky", tol=1e-9, max_iter=500)
    least = objective(other.fit(features.astype(np.float64), labels), features, labels, 100.0)
    counted = count_passes(monkeypatch)
    head = BlockLogisticRegression(C=100.0).fit(features, labels)
    assert least <= objective(head, features, labels, 100.0) * (1 + 1e-9) <= least * (1 + 1e-5)
    assert len(counted) <= 500


def test_l_bfgs_goes_on_as_long_as_a_factor_costs():
    def patience(rows, dtype, classes, width):
        shards = row_shards_of(np.zeros((rows, 1)))
        prepared = passes.Prepared(shards, np.dtype(dtype), np.zeros(width), centred=True)
        return passes.patience_of(prepared, (classes, width + 1))

    assert patience(3000, np.float64, 6, 24) == 30
    assert patience(60_000, np.float32, 10, 1280) == 250
    assert patience(1600, np.float64, 10, 1392) > 5000  # few wide rows: passes cost next to nothing


def test_so_many_problems_at_a_time_as_memory_allows_get_joint_curvature():
    prepared = passes.Prepared(None, np.dtype(np.float64), np.ones(3), centred=False)
    asked = []

    def solve(method, features, chosen, starts, iterations):
        asked.append((method.__name__, features.dtype, list(chosen), list(iterations)))
        return [Optimum(start + 1, 5, converged=True) for start in starts]

    stopped = [Optimum(np.zeros((3, 4)), 10, converged=i == 1) for i in range(4)]
    found = classifiers.finished(stopped, prepared, 100, solve, joint_at_once=2)
    assert asked == [("joint_lbfgs", np.float64, [0, 2], [90, 90]), ("joint_lbfgs", np.float64, [3], [90])]
    assert [one.iterations for one in found] == [15, 10, 15, 15]


@pytest.mark.parametrize("kind", ["each", "shared", "diagonal", "subspace", "joint"])
def test_preconditioners_solve_for_several_vectors_as_for_each_alone(kind):
    rng = np.random.default_rng(4)
    classes, size = (1 if kind == "subspace" else 3), 6
    rows = rng.standard_normal((3, 20, size))
    sums = rows.transpose(0, 2, 1) @ rows
    penalty = Penalty(np.append(np.ones(size - 1), 0), np.append(np.full(size - 1, -0.1), 1), 0.3)
    solve = {
        "each": lambda: CholeskyPreconditioner(sums.copy(), 0.7, penalty),
        "shared": lambda: CholeskyPreconditioner(sums[:1].copy(), 0.7, penalty),
        "diagonal": lambda: DiagonalPreconditioner(np.einsum("kii->ki", sums), 0.7, penalty),
        "subspace": lambda: SubspacePreconditioner(
            np.append(np.diagonal(sums[0]), [20, 3, 9])[None], 0.7, penalty, rng.standard_normal((1, size))
        ),
        "joint": lambda: joint.JointPreconditioner(sums.astype(np.float32), 0.7, penalty, classes),
    }[kind]()
    vectors = rng.standard_normal((5, classes, size))
    vectors -= vectors.mean(axis=1, keepdims=True) if classes > 1 else 0
    together = solve(vectors)
    assert together.shape == vectors.shape
    np.testing.assert_allclose(together, [solve(vector) for vector in vectors], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(together[:2], solve(vectors[:2]), rtol=1e-5, atol=1e-7)
    if kind == "each":
        matrices = 0.7 * sums + np.diag(penalty.ridge) + 0.3 * np.outer(penalty.lever, penalty.lever)
        np.testing.assert_allclose(np.einsum("kij,vkj->vki", matrices, together), vectors, atol=1e-5)
