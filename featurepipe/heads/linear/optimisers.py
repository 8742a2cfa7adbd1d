"""Batched optimisers: L-BFGS and truncated Newton on many problems, whose objectives one pass over the data evaluates.

A generator knows nothing of the data or of its neighbours. ``run`` collects what all that are still alive ask for,
has it computed together, and hands out the evaluations; whoever has converged drops out.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from featurepipe.heads.blocks import one_blas_thread

Vector = npt.NDArray[np.float64]
Precondition = Callable[[Vector], Vector]
"""Times a vector of a point's shape, or times several, (v, ...) at once."""


@dataclass(frozen=True)
class Evaluate:
    """What an optimiser asks: objective and gradient at ``point``, and the curvature there if it wants it.

    Attributes:
        point: Array of any shape.
        curvature: "" for none, "shared" for one matrix for all columns, "each" for one a column where memory allows, "joint"
            for all of it where memory allows, else as "each".
        along: Asks for the second derivative at the point times this instead; it comes as the evaluation's gradient.
    """

    point: Vector
    curvature: str = ""
    along: Vector | None = None


@dataclass(frozen=True)
class Solve:
    """What an optimiser asks: an approximate inverse of the second derivative times vectors, which comes as an array like them.

    Attributes:
        vectors: (v, ...) vectors, each of a point's shape.
        precondition: The approximate inverse. Optimisers that have the same one are answered together: its matrices, which may
            take hundreds of megabytes, are read once for all.
    """

    vectors: Vector
    precondition: Precondition


@dataclass(frozen=True)
class Evaluation:
    """Objective and gradient, and an approximate inverse of the second derivative if it was asked for.

    Attributes:
        value: Objective.
        gradient: As the point.
        precondition: The approximate inverse.
        bound: What the objective is above its minimum at most, by its strong convexity; 0 where that is not worked out.
    """

    value: float
    gradient: Vector
    precondition: Precondition | None = None
    bound: float = 0.0


@dataclass(frozen=True)
class Optimum:
    """Where an optimiser stopped, after how many iterations, and whether it was satisfied.

    Attributes:
        point: As it started.
        iterations: How many.
        converged: Whether it was satisfied.
        precondition: The approximate inverse of the second derivative that it used last, if it was to be kept.
    """

    point: Vector
    iterations: int
    converged: bool
    precondition: Precondition | None = None


Optimiser = Generator[Evaluate | Solve, Any, Optimum]
"""Gets an ``Evaluation`` of each ``Evaluate``, an array of each ``Solve``."""


def run(
    optimisers: Sequence[Optimiser], evaluate: Callable[[list[int], list[Evaluate]], list[Evaluation]]
) -> list[Optimum]:
    """Runs optimisers to their ends; what they compute between evaluations is small, and takes one thread.

    Args:
        optimisers: Generators that have not started.
        evaluate: Gets the numbers of the optimisers still alive and their requests; returns their evaluations.
    """
    optima: dict[int, Optimum] = {}
    asked: dict[int, Evaluate] = {}
    to_solve: dict[int, Solve] = {}

    def go_on(number: int, found: Any) -> None:
        try:
            request = optimisers[number].send(found)
        except StopIteration as stop:
            optima[number] = stop.value
            return
        if isinstance(request, Solve):
            to_solve[number] = request
        else:
            asked[number] = request

    with one_blas_thread:
        for number in range(len(optimisers)):
            go_on(number, None)
        while asked or to_solve:
            if to_solve:
                solving, to_solve = to_solve, {}
                answers = _solved(solving)
            else:
                evaluating, asked = asked, {}
                found = evaluate(list(evaluating), list(evaluating.values()))
                answers = dict(zip(evaluating, found, strict=True))
            for number in list(answers):
                go_on(number, answers.pop(number))
    return [optima[number] for number in range(len(optimisers))]


def _solved(requests: dict[int, Solve]) -> dict[int, Any]:
    """Answers those that have the same approximate inverse together."""
    alike: dict[int, list[int]] = {}
    for number, request in requests.items():
        alike.setdefault(id(request.precondition), []).append(number)
    answers: dict[int, Any] = {}
    for numbers in alike.values():
        vectors = [requests[number].vectors for number in numbers]
        solved = requests[numbers[0]].precondition(vectors[0] if len(vectors) == 1 else np.concatenate(vectors))
        ends = np.cumsum([len(some) for some in vectors])
        answers |= dict(zip(numbers, np.split(solved, ends[:-1]), strict=True))
    return answers


_CAREFUL = 0.01
_PAIRS = 10  # of steps and gradient differences that are remembered
_JOINT_REFRESH = 10
_KNOWN_REFRESH = 20  # from a neighbour's optimum most fits end sooner


@dataclass(frozen=True)
class OptimiserSettings:
    """When an optimiser measures the curvature again, and when it stops.

    Attributes:
        tolerance: Stops when half of ``-gradient . direction``, which is what a quasi-Newton step hopes to gain and so
            estimates the distance to the optimum in terms of the objective, is at most this fraction of the objective,
            or of what has been gained since the start if that is less. The estimate is believed only with curvature
            just measured: that of a place left behind can promise far too little.
        max_iterations: Stops unsatisfied after as many.
        refresh: Iterations until the curvature is measured again.
        growth: Factor by which that number grows each time.
        joint: Whether to measure the curvature of all columns together.
        trusted: Curvature is believed further on, too, if it was measured where the estimate was at most this fraction of the
            objective: from there to the optimum it hardly changes.
        certain: Stops only where the bound, too, is at most this fraction of the objective, or the estimate a hundredth of what
            it has to be: the bound is far from the truth along directions that bend much more than the penalty.
        keep: Whether others start from where it stops, with the approximate inverse of the second derivative, which is then kept,
            of curvature measured there: an estimate is believed whatever curvature it is by.
    """

    tolerance: float
    max_iterations: int
    refresh: int = 5
    growth: float = 1.5
    trusted: float = 0.0
    joint: bool = False
    certain: float = math.inf
    keep: bool = False

    def certified(self, at: Evaluation, estimate: float) -> bool:
        """Whether more than the estimate says that the optimum is near."""
        least = min(at.bound / self.certain, estimate / (self.tolerance * _CAREFUL))
        return bool(least <= abs(at.value))


def lbfgs(start: Vector, settings: OptimiserSettings, known: Precondition | None = None) -> Optimiser:
    """Minimises a smooth convex function by preconditioned L-BFGS (Liu & Nocedal 1989; Nocedal & Wright 2006, 7.2).

    The two-loop recursion starts from the preconditioner in place of a multiple of the identity. The preconditioner is
    measured anew where the iterate has moved to, and pairs from before are forgotten. The curvature of all columns together
    costs more than a pass, and is measured only where a step has ended, in a pass of its own.

    With a preconditioner that is ``known``, of a problem much like this one at its optimum, which is the start, none is
    measured before twenty iterations, or as many as the settings say if they are more.
    """
    point, pairs, satisfied, step = start, _Pairs(), 0, 1.0
    at = yield Evaluate(point, "" if known else "joint" if settings.joint else "shared")
    first, precondition, age, interval, near = at.value, known or at.precondition, 0, settings.refresh, False
    if known:
        age, interval, near = 1, max(_KNOWN_REFRESH, settings.refresh), settings.trusted > 0

    def ended(iterations: int, *, converged: bool) -> Generator[Evaluate, Evaluation, Optimum]:
        kept = None
        if settings.keep:
            kept = (yield Evaluate(point, "each")).precondition if iterations and age else precondition
        return Optimum(point, iterations, converged, kept)

    for iteration in range(settings.max_iterations):
        direction = -(yield from pairs.apply(at.gradient, precondition))
        slope = _dot(at.gradient, direction)
        estimate = -slope / 2
        if not estimate > 0:  # nothing but rounding is left of the gradient
            return (yield from ended(iteration, converged=True))
        gained = abs(at.value) if settings.joint or known else first - at.value  # that estimate is near the truth
        goal = settings.tolerance * max(min(abs(at.value), gained), 1e-3 * abs(at.value))
        satisfied = satisfied + 1 if estimate <= goal else 0
        near = estimate <= settings.trusted * goal / settings.tolerance if age == 0 else near
        believed = age == 0 or near or settings.keep
        if satisfied and believed and settings.certified(at, estimate):
            return (yield from ended(iteration, converged=True))
        measure = age + 1 >= interval or (satisfied == 2 and not believed)
        # where the last step was short, the next one hardly is 1
        kind = "each" if measure and not settings.joint else ""
        step, found = yield from line_search(point, at, direction, slope, first=min(1.0, 4 * step), curvature=kind)
        if step == 0:  # the objective cannot be told apart from its neighbours any more
            hidden = estimate <= 100 * settings.tolerance * abs(at.value)
            return (yield from ended(iteration, converged=hidden and settings.certified(at, estimate)))
        age += 1
        if measure and settings.joint:
            found = yield Evaluate(point + step * direction, "joint")
        if measure:
            interval = math.ceil(interval * settings.growth) if age >= interval else interval
            age, satisfied, precondition, pairs = 0, 0, found.precondition, _Pairs()
        else:
            pairs.add(step * direction, found.gradient - at.gradient)
        point, at = point + step * direction, found
    return (yield from ended(settings.max_iterations, converged=False))


def joint_lbfgs(start: Vector, settings: OptimiserSettings) -> Optimiser:
    """L-BFGS preconditioned by the curvature of all columns together, which is measured less often than that of each."""
    return lbfgs(start, replace(settings, refresh=max(settings.refresh, _JOINT_REFRESH), joint=True))


def line_search(
    point: Vector, at: Evaluation, direction: Vector, slope: float, *, first: float, curvature: str
) -> Generator[Evaluate, Evaluation, tuple[float, Evaluation]]:
    """Finds a step that decreases a convex objective enough; 0 if there is none.

    A step is shortened to where the slope, taken as linear, would vanish. Near the optimum the objective's rounding
    hides its decrease, and the slope decides (the approximate Wolfe condition of Hager & Zhang 2005).
    """
    step = first
    for _ in range(30):
        found = yield Evaluate(point + step * direction, curvature)
        gained = at.value - found.value
        end = _dot(found.gradient, direction)
        hidden = gained >= -1e-6 * abs(at.value) and end <= -0.8 * slope
        if np.isfinite(found.value) and (gained >= -1e-4 * step * slope or (hidden and end >= 0.9 * slope)):
            return step, found
        step *= min(0.8, max(0.1, slope / (slope - end))) if np.isfinite(end) and end > 0 else 0.3
    return 0.0, at


class _Pairs:
    """The last steps s and gradient differences y, as an approximation of the inverse second derivative."""

    def __init__(self) -> None:
        self._pairs: deque[tuple[Vector, Vector, float]] = deque(maxlen=_PAIRS)

    def add(self, step: Vector, difference: Vector) -> None:
        """Remembers a pair, unless rounding has made it useless."""
        product = _dot(step, difference)
        if product > 1e-12 * np.sqrt(_dot(step, step) * _dot(difference, difference)):
            self._pairs.append((step, difference, 1 / product))

    def apply(self, gradient: Vector, precondition: Precondition | None) -> Generator[Solve, Vector, Vector]:
        """The two-loop recursion."""
        result, amounts = gradient.copy(), []
        for step, difference, inverse in reversed(self._pairs):
            amounts.append(inverse * _dot(step, result))
            result -= amounts[-1] * difference
        if precondition is not None:
            result = yield from self._scaled(result, precondition)
        elif self._pairs:
            _, difference, inverse = self._pairs[-1]
            result /= inverse * _dot(difference, difference)
        for (step, difference, inverse), amount in zip(self._pairs, reversed(amounts), strict=True):
            result += (amount - inverse * _dot(difference, result)) * step
        return result

    def _scaled(self, vector: Vector, precondition: Precondition) -> Generator[Solve, Vector, Vector]:
        """Applies the preconditioner, scaled to the curvature met on the last step."""
        if not self._pairs:
            alone: Vector = (yield Solve(vector[None], precondition))[0]
            return alone
        _, difference, inverse = self._pairs[-1]
        solved, bent = yield Solve(np.stack([vector, difference]), precondition)
        scaled: Vector = solved / (inverse * _dot(difference, bent))
        return scaled


def _dot(one: Vector, other: Vector) -> Any:
    return np.vdot(one, other)


_MOST_PRODUCTS = 250  # for one step
_LEAST_PRODUCTS = 10
_DIMINISHING = 0.1  # a step is good enough when the last half of the products added no more than this to its gain


def newton(start: Vector, settings: OptimiserSettings) -> Optimiser:
    """Minimises a smooth convex function by a truncated Newton method (Dembo & Steihaug 1983).

    For linear classifiers see Lin, Weng & Keerthi 2008. Every product with the second derivative is a pass and counts as an
    iteration. The conjugate gradients are preconditioned as L-BFGS is; on features that are nearly collinear they converge where
    L-BFGS crawls.
    """
    point, iterations = start, 1
    at = yield Evaluate(point, "each")
    while iterations < settings.max_iterations:
        most = min(_MOST_PRODUCTS, settings.max_iterations - iterations)
        direction, products = yield from _direction(point, at, most)
        slope = float(np.vdot(at.gradient, direction))
        iterations += products + 1
        if -slope / 2 <= settings.tolerance * abs(at.value) and settings.certified(at, -slope / 2):
            return Optimum(point, iterations, converged=True)
        step, found = yield from line_search(point, at, direction, slope, first=1.0, curvature="each")
        if step == 0:  # rounding hides what is left
            return Optimum(point, iterations, converged=-slope / 2 <= 100 * settings.tolerance * abs(at.value))
        point, at = point + step * direction, found
    return Optimum(point, settings.max_iterations, converged=False)


def _direction(point: Vector, at: Evaluation, most: int) -> Generator[Evaluate, Evaluation, tuple[Vector, int]]:
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
        bent = (yield Evaluate(point, along=along)).gradient
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
