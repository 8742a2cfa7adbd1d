"""Which values of several columns a head is fitted on: scored on training rows, their share chosen on validation rows."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator
from sklearn.pipeline import Pipeline

from featurepipe.display import counted
from featurepipe.errors import Message, Option, UsageError
from featurepipe.heads.bundle.text import selection_text
from featurepipe.heads.calibration import label_scores, predicted_numbers
from featurepipe.heads.selection import KeptColumns, best_columns, column_scores, kept_count, regression_targets
from featurepipe.heads.statistics.multilabel import average_precisions
from featurepipe.heads.statistics.regression import quadratic_kappa
from featurepipe.progress import took
from featurepipe.training.cost import Cost
from featurepipe.training.fit import fit, held_out, refusals
from featurepipe.training.options import SELECT_AUTO, SHARES
from featurepipe.training.tuning import steps_of

if TYPE_CHECKING:
    from featurepipe.store.views import FeatureSet
    from featurepipe.training.task import Recipe, Task

PATIENCE = 2
"""Shares in a row that are no better than the best before them, after which larger ones, which take longest, are not tried."""

SCORED_ROWS = 10_000
"""Training rows that score the values, drawn at random where there are more: the order hardly depends on others."""

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TriedShare:
    """A share of the values, and how a head on them did on the validation rows.

    Attributes:
        share: of all values.
        values: how many those are.
        score: accuracy; ``rmse`` of numbers, mean average precision of several labels, quadratic weighted kappa of an order. None
            where it was not tried.
        why: it was not tried; empty if it was.
        seconds: that it took.
    """

    share: float
    values: int
    score: float | None
    why: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Selection:
    """Which values are kept, and how that was chosen.

    Attributes:
        asked: ``auto``, or the share.
        share: of the values that is kept.
        features: all values of the columns that have one that is kept.
        places: (k,) positions of the kept values among those.
        columns: for each column, how many of its values are kept.
        width: values of all columns.
        rows: training rows that scored them.
        tried: of ``auto`` every share.
        measure: what ``tried`` is measured by.
        seconds: that scoring and choosing took.
    """

    asked: str | float
    share: float
    features: FeatureSet
    places: Positions
    columns: Mapping[str, int]
    width: int
    rows: int
    tried: Sequence[TriedShare] = field(default_factory=tuple)
    measure: str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "asked": self.asked,
            "share": self.share,
            "values": len(self.places),
            "of": self.width,
            "columns": dict(self.columns),
            "scored_by": "norm of each value's coefficients in a ridge regression of all targets",
            "rows": self.rows,
            "measure": self.measure,
            "tried": [asdict(one) for one in self.tried],
            "seconds": self.seconds,
        }

    def of_all_values(self, head: BaseEstimator) -> Pipeline:
        """A head that was fitted on the kept values, as one that takes all values of their columns."""
        step = KeptColumns.of_width(self.places, self.features.shape[1])
        return Pipeline([("kept", step), *steps_of(head)])


def chosen_values(
    task: Task, recipe: Recipe, asked: str | float, route: Callable[[int], Cost], say: Callable[[str], None]
) -> tuple[Task, Selection]:
    """Scores the values of a task's columns, chooses how many to keep, and returns the task with these alone.

    Values are scored on training rows. Of ``auto`` a head is fitted on training rows for each share, and compared on the
    validation rows; where groups were given, these are of other groups. The test rows are never seen.

    Args:
        task: with all values.
        recipe: of the head.
        asked: ``auto``, or the share to keep.
        route: the cost of fits on so many values; raises ``UsageError`` where memory is too little.
        say: told what is chosen.

    Raises:
        UsageError: ``auto``, and there is no validation row; or no share fits into memory.
    """
    start = time.perf_counter()
    if asked == SELECT_AUTO and not len(task.division.validation):
        raise UsageError(
            Message(
                "there is no validation image, so the share of values cannot be chosen; give more images, or a share: ",
                Option("select", 0.05),
            )
        )
    scores, rows = _scores(task, recipe)
    width = len(scores)
    say(f"scored {width:,} values on {counted(rows, 'training image')} in {took(time.perf_counter() - start)}")
    tried: list[TriedShare] = []
    measure = ""
    if asked == SELECT_AUTO:
        measure = _measure(task)
        tried = _try_shares(task, recipe, scores, route, measure, say)
        share = _best(tried, measure).share
    else:
        share = float(asked)
    kept = best_columns(scores, share)
    features, places = task.features.keep(kept)
    columns = _by_column(task.features, kept)
    found = Selection(
        asked, share, features, places, columns, width, rows, tuple(tried), measure, time.perf_counter() - start
    )
    say(selection_text(found.as_dict()))
    return _narrowed(task, kept, route), found


def _scores(task: Task, recipe: Recipe) -> tuple[npt.NDArray[np.float64], int]:
    """Scores (D,) of all values, and the number of training rows that gave them."""
    rows = task.division.train
    if len(rows) > SCORED_ROWS:
        rows = np.sort(np.random.default_rng(task.seed).permutation(rows)[:SCORED_ROWS])
    classes = task.classes if task.targets is None else None
    with refusals(recipe.head), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Mean of empty slice|Degrees of freedom", RuntimeWarning
        )  # a label unknown here
        targets = regression_targets(task.answers(rows), classes)
        scores = column_scores(task.rows(rows), targets, task.weights(rows), memory=task.cost.budget_bytes)
    return scores, len(rows)


def _narrowed(task: Task, kept: Positions, route: Callable[[int], Cost]) -> Task:
    """The task with some values alone."""
    features, places = task.features.keep(kept)
    return replace(task, features=features.values_alone(places), cost=route(len(kept)))


def _try_shares(
    task: Task,
    recipe: Recipe,
    scores: npt.NDArray[np.float64],
    route: Callable[[int], Cost],
    measure: str,
    say: Callable[[str], None],
) -> list[TriedShare]:
    """Every share that is another number of values, from few to many, each measured on the validation rows."""
    shares = {kept_count(share, len(scores)): share for share in reversed(SHARES)}
    thinned = _thinned(task, recipe.family.search_rows)
    tried: list[TriedShare] = []
    for values, share in sorted(shares.items()):
        since = [one for one in tried if one.score is not None]
        best = _best(since, measure) if since else None
        if best is not None and len(since) - 1 - since.index(best) >= PATIENCE:
            tried.append(
                TriedShare(share, values, None, f"the {PATIENCE} shares before were no better than {best.share:g}")
            )
            continue
        start = time.perf_counter()
        try:
            narrow = _narrowed(thinned, best_columns(scores, share), route)
        except UsageError as error:
            tried.append(TriedShare(share, values, None, str(error)))
            continue
        score = _quality(narrow, recipe, measure)
        seconds = time.perf_counter() - start
        tried.append(TriedShare(share, values, score, seconds=seconds))
        say(f"kept {values:,} of {len(scores):,} values: validation {measure} {score:.4f} in {took(seconds)}")
    if all(one.score is None for one in tried):
        raise UsageError(tried[0].why)
    return tried


def _best(tried: Sequence[TriedShare], measure: str) -> TriedShare:
    """The best of those that were tried; of equals the one with the fewest values."""
    scored = [one for one in tried if one.score is not None]
    sign = -1 if measure == "rmse" else 1
    return max(scored, key=lambda one: sign * (one.score or 0.0))


def _thinned(task: Task, most: int | None) -> Task:
    """The task with so many training rows at most, as searches of such heads have, drawn at random."""
    division = task.division
    if most is None or len(division.train) <= most:
        return task
    rows = np.sort(np.random.default_rng(task.seed).permutation(division.train)[:most])
    return replace(task, division=replace(division, train=rows))


def _measure(task: Task) -> str:
    if task.targets is None:
        return "quadratic_kappa" if task.is_ordered else "accuracy"
    return "rmse" if task.is_numeric else "map"


def _quality(task: Task, recipe: Recipe, measure: str) -> float:
    """What a head that is fitted on the training rows reaches on the validation rows."""
    checked = task.division.validation
    if task.targets is None:
        held = held_out(task, recipe)
        if not len(held.rows):
            return 0.0
        guesses = held.scores.argmax(axis=1)
        if not task.is_ordered:
            return float(np.mean(guesses == held.codes))
        kappa = quadratic_kappa(held.codes, guesses, len(held.classes))
        return 0.0 if np.isnan(kappa) else kappa
    if measure == "rmse":
        head = fit(task, recipe, task.division.train)
        wrong = predicted_numbers(head, task.rows(checked)) - task.targets[checked]
        return float(np.sqrt(np.mean(wrong**2)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "left out", UserWarning)  # only here, where shares are compared
        head = fit(task, recipe.with_params({"one_sided": "drop"}), task.division.train)
    learned = [task.classes.index(name) for name in head.classes_]
    found = average_precisions(label_scores(head, task.rows(checked)), task.targets[checked][:, learned])
    return 0.0 if np.isnan(found).all() else float(np.nanmean(found))


def _by_column(features: FeatureSet, kept: Positions) -> dict[str, int]:
    """For each column how many of its values are kept."""
    edges = np.cumsum([0, *features.widths])
    counts = np.histogram(kept, bins=edges)[0]
    return dict(zip(features.columns, counts.tolist(), strict=True))
