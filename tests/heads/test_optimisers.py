"""Batched optimisers find minima that are known, ask together, and stop for themselves."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit

from featurepipe.heads.linear.optimisers import (
    Evaluate,
    Evaluation,
    OptimiserSettings,
    Optimum,
    joint_lbfgs,
    lbfgs,
    newton,
    run,
)


def quadratic(scale, centre):
    """Half the weighted squared distance to ``centre``, and its exact inverse second derivative."""

    def evaluate(request):
        away = request.point - centre
        value = 1 + (scale * away**2).sum() / 2
        return Evaluation(value, scale * away, (lambda vector: vector / scale) if request.curvature else None)

    return evaluate


def solo(objective, start, method=lbfgs, **options):
    asked = []

    def evaluate(numbers, requests):
        asked.extend(requests)
        return [objective(request) for request in requests]

    options = {"tolerance": 1e-12, "max_iterations": 500} | options
    [optimum] = run([method(start, OptimiserSettings(**options))], evaluate)
    return optimum, asked


def test_with_the_exact_second_derivative_one_step_reaches_the_minimum():
    optimum, asked = solo(quadratic(np.logspace(-4, 4, 30), np.arange(30.0)), np.zeros(30))
    np.testing.assert_allclose(optimum.point, np.arange(30.0), rtol=1e-10)
    assert optimum.converged
    assert len(asked) <= 4


def test_without_curvature_the_minimum_of_a_convex_function_is_found():
    rng = np.random.default_rng(0)
    features, signs = rng.standard_normal((200, 5)), rng.choice([-1, 1], 200)

    def logistic(request):
        margins = signs * (features @ request.point)
        pulls = -signs / (1 + np.exp(margins))
        value = np.logaddexp(0, -margins).sum() + request.point @ request.point / 2
        return Evaluation(value, features.T @ pulls + request.point, None)

    optimum, _ = solo(logistic, np.full(5, 30.0))
    assert optimum.converged
    np.testing.assert_allclose(logistic(Evaluate(optimum.point)).gradient, 0, atol=1e-3)


def test_curvature_is_asked_for_at_the_start_and_ever_more_rarely():
    def awkward(request):  # the fourth power, whose curvature vanishes towards its minimum: progress is slow
        return Evaluation(1 + (request.point**4).sum(), 4 * request.point**3, lambda vector: vector / 100)

    _, asked = solo(awkward, np.linspace(0.5, 2, 8), refresh=2, growth=2.0, tolerance=1e-300, max_iterations=20)
    kinds = [request.curvature for request in asked]
    assert kinds[0] == "shared"
    assert 2 <= kinds.count("each") <= 5
    assert set(kinds) == {"shared", "each", ""}


def test_curvature_measured_near_the_minimum_is_believed_further_on():
    rng = np.random.default_rng(0)
    features, signs = rng.standard_normal((200, 5)) + rng.standard_normal((200, 1)), rng.choice([-1, 1], 200)

    def logistic(request):
        margins = signs * (features @ request.point)
        value = np.logaddexp(0, -margins).sum() + request.point @ request.point / 2
        weights = expit(margins) * expit(-margins)
        rough = 1 / (weights @ features**2 + 1)
        gradient = request.point - features.T @ (signs * expit(-margins))
        return Evaluation(value, gradient, (lambda vector: rough * vector) if request.curvature else None)

    careful, asked = solo(logistic, np.zeros(5), tolerance=1e-9, refresh=1)
    trusting, fewer = solo(logistic, np.zeros(5), tolerance=1e-9, refresh=1, trusted=0.1)
    assert trusting.converged
    assert len(fewer) < len(asked)
    np.testing.assert_allclose(trusting.point, careful.point, atol=1e-4)


def test_the_estimate_alone_stops_nothing_where_a_bound_is_asked_for():
    """A preconditioner that promises a thousandth of what there is to gain along one direction, and the bound that knows."""
    scale = np.ones(8)
    scale[0] = 1e-3

    def evaluate(request):
        found = quadratic(np.ones(8), np.arange(8.0))(request)
        value, gradient = found.value, found.gradient
        return Evaluation(
            value, gradient, (lambda vector: scale * vector) if request.curvature else None, bound=value - 1
        )

    start = np.arange(8.0) + 1
    start[0] = 0.1  # which the first step leaves half a percent above
    trusting, few = solo(evaluate, start, tolerance=1e-4, refresh=1)
    careful, more = solo(evaluate, start, tolerance=1e-4, refresh=1, certain=1e-4)
    assert trusting.converged
    assert careful.converged
    assert evaluate(Evaluate(trusting.point)).value > 1 + 1e-3
    assert evaluate(Evaluate(careful.point)).value <= 1 + 1e-4
    assert len(few) < len(more)


def test_an_estimate_a_hundred_times_smaller_needs_no_bound():
    settings = OptimiserSettings(1e-3, 10, certain=1e-2)
    far = Evaluation(5.0, np.zeros(1), bound=1.0)
    assert settings.certified(far, 4e-5)
    assert not settings.certified(far, 6e-5)
    assert settings.certified(Evaluation(5.0, np.zeros(1), bound=0.04), 1.0)


def test_joint_curvature_is_measured_only_where_steps_end():
    def awkward(request):  # the fourth power, of which the preconditioner knows too little: many steps are too long
        return Evaluation(1 + (request.point**4).sum(), 4 * request.point**3, lambda vector: vector)

    _, asked = solo(awkward, np.linspace(0.5, 2, 8), joint_lbfgs, tolerance=1e-300, max_iterations=30)
    kinds = [request.curvature for request in asked]
    assert kinds[0] == "joint"
    assert 2 <= kinds.count("joint") <= 4
    assert set(kinds) == {"joint", ""}
    best = np.inf
    for request in asked:
        value = awkward(request).value
        if request.curvature:
            assert value <= best  # of a point that was accepted, computed for its objective before
        best = min(best, value)


def test_problems_are_asked_together_and_drop_out_as_they_finish():
    objectives = [quadratic(np.ones(3), np.ones(3) * k) for k in range(4)]
    alive = []

    def evaluate(numbers, requests):
        alive.append(tuple(numbers))
        return [objectives[number](request) for number, request in zip(numbers, requests, strict=True)]

    found = run([lbfgs(np.zeros(3), OptimiserSettings(1e-12, 50)) for _ in objectives], evaluate)
    assert alive[0] == (0, 1, 2, 3)
    assert 0 not in alive[1]  # it starts at its minimum
    np.testing.assert_allclose([optimum.point[0] for optimum in found], [0, 1, 2, 3], atol=1e-9)
    assert found[0] == Optimum(found[0].point, 0, converged=True)


def test_too_few_iterations_leave_it_unconverged():
    objective = quadratic(np.logspace(-3, 3, 30), np.ones(30))

    def blind(request):
        found = objective(request)
        return Evaluation(found.value, found.gradient, None)

    optimum, _ = solo(blind, np.zeros(30), max_iterations=3)
    assert not optimum.converged
    assert optimum.iterations == 3


@pytest.mark.parametrize("far", [1e3, 1e6])
def test_steps_that_overshoot_are_shortened(far):
    def evaluate(request):  # the preconditioner promises a curvature far too small
        found = quadratic(np.ones(2), np.ones(2))(request)
        return Evaluation(found.value, found.gradient, (lambda vector: vector * far) if request.curvature else None)

    optimum, _ = solo(evaluate, np.zeros(2))
    np.testing.assert_allclose(optimum.point, 1, atol=1e-4)


def collinear_logistic():
    """A logistic regression on features of 1e-5 to 1 in deviation, with products by its second derivative."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((300, 20)) @ np.diag(np.logspace(-5, 0, 20)) @ rng.standard_normal((20, 20))
    signs = np.sign(features @ rng.standard_normal(20) + rng.normal(0, 0.05, 300))

    def evaluate(request):
        margins = signs * (features @ request.point)
        likely = expit(-margins)
        if request.along is not None:
            bent = 100 * features.T @ (likely * (1 - likely) * (features @ request.along)) + request.along
            return Evaluation(np.nan, bent)
        value = 100 * np.logaddexp(0, -margins).sum() + request.point @ request.point / 2
        return Evaluation(value, request.point - 100 * features.T @ (signs * likely))

    return evaluate


def test_newtons_steps_reach_the_minimum_that_lbfgs_reaches():
    objective = collinear_logistic()
    optimum, asked = solo(objective, np.zeros(20), newton)
    other, _ = solo(objective, np.zeros(20), lbfgs, max_iterations=100_000, tolerance=1e-15)
    assert optimum.converged
    np.testing.assert_allclose(objective(Evaluate(optimum.point)).gradient, 0, atol=1e-3)
    assert objective(Evaluate(optimum.point)).value <= objective(Evaluate(other.point)).value * (1 + 1e-11)
    assert optimum.iterations == pytest.approx(len(asked), abs=8)  # a step's search is one of them


def test_newton_stops_unsatisfied_when_its_iterations_are_used_up():
    optimum, asked = solo(collinear_logistic(), np.zeros(20), newton, max_iterations=7)
    assert not optimum.converged
    assert optimum.iterations == 7
    assert len(asked) <= 9


def test_optimisers_with_the_same_preconditioner_are_answered_together():
    """The matrices of a large preconditioner are then read once for all; alone each optimiser goes the same way."""
    centres = [np.arange(6.0) + number for number in range(3)]
    scale, sizes = np.logspace(-1, 1, 6), []

    def known(vectors):
        sizes.append(len(vectors))
        return vectors / (1 + scale)  # near the second derivative

    def solve(numbers):
        def evaluate(alive, requests):
            return [quadratic(scale, centres[numbers[one]])(ask) for one, ask in zip(alive, requests, strict=True)]

        return run([lbfgs(np.zeros(6), OptimiserSettings(1e-12, 60), known) for _ in numbers], evaluate)

    together = solve([0, 1, 2])
    calls, sizes[:] = list(sizes), []
    for number, found in enumerate(together):
        [alone] = solve([number])
        assert found.iterations == alone.iterations > 2
        np.testing.assert_array_equal(found.point, alone.point)
        np.testing.assert_allclose(found.point, centres[number], rtol=1e-4)
    assert calls[:2] == [3, 6]  # the gradients; from the second step on differences of gradients, too
    assert sum(calls) == sum(sizes)
    assert len(calls) <= max(one.iterations for one in together) + 1 < len(sizes)


def test_newton_is_satisfied_at_the_minimum():
    optimum, _ = solo(quadratic(np.ones(3), np.arange(3.0)), np.arange(3.0), newton)
    assert optimum == Optimum(optimum.point, optimum.iterations, converged=True)
    np.testing.assert_array_equal(optimum.point, np.arange(3.0))
