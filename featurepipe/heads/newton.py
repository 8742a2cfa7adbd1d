"""An optimiser for what L-BFGS is slow at: Newton's steps, each by conjugate gradients on the exact second derivative."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np

from featurepipe.heads.lockstep import Answer, Optimiser, Optimum, Patience, Question, Vector, line_search

_MOST_PRODUCTS = 250  # for one step
_LEAST_PRODUCTS = 10
_DIMINISHING = 0.1  # a step is good enough when the last half of the products added no more than this to its gain


def newton(start: Vector, patience: Patience) -> Optimiser:
    """Minimises a smooth convex function by a truncated Newton method (Dembo & Steihaug 1983).

    For linear classifiers see Lin, Weng & Keerthi 2008. Every product with the second derivative is a pass and counts as an
    iteration. The conjugate gradients are preconditioned by the curvature measured on few rows, as L-BFGS is; on features
    that are nearly collinear they converge where L-BFGS crawls.
    """
    point, iterations = start, 1
    at = yield Question(point, "each")
    while iterations < patience.max_iterations:
        most = min(_MOST_PRODUCTS, patience.max_iterations - iterations)
        direction, products = yield from _direction(point, at, most)
        slope = float(np.vdot(at.gradient, direction))
        iterations += products + 1
        if -slope / 2 <= patience.tolerance * abs(at.value):
            return Optimum(point, iterations, converged=True)
        step, found = yield from line_search(point, at, direction, slope, first=1.0, curvature="each")
        if step == 0:  # rounding hides what is left
            return Optimum(point, iterations, converged=-slope / 2 <= 100 * patience.tolerance * abs(at.value))
        point, at = point + step * direction, found
    return Optimum(point, patience.max_iterations, converged=False)


def _direction(point: Vector, at: Answer, most: int) -> Generator[Question, Answer, tuple[Vector, int]]:
    """Solves for Newton's step by preconditioned conjugate gradients; returns it and the number of products.

    Stops where the quadratic model falls by little more, as Nash & Sofer (1990) advise: what matters is the objective,
    not the residual. Single products tell little, since their gains vary a hundredfold.
    """
    solve = at.precondition or np.copy
    step, residual = np.zeros_like(point), -at.gradient
    solved = solve(residual)
    along, size, gained = solved, float(np.vdot(residual, solved)), [0.0]
    for product in range(1, most + 1):
        if not size > 0:  # nothing but rounding is left
            return step, product - 1
        bent = (yield Question(point, along=along)).gradient
        curvature = float(np.vdot(along, bent))
        if not curvature > 0:
            return step, product
        length = size / curvature
        step = step + length * along
        residual = residual - length * bent
        gained.append(gained[-1] + length * size / 2)
        if product >= _LEAST_PRODUCTS and gained[-1] <= (1 + _DIMINISHING) * gained[product // 2]:
            return step, product
        solved = solve(residual)
        size, before = float(np.vdot(residual, solved)), size
        along = solved + size / before * along
    return step, most
