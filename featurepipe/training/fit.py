"""Fitting one head on rows of a task, calibrating it, and choosing the threshold of two classes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator
from threadpoolctl import threadpool_limits

from featurepipe.display import counted, first_names
from featurepipe.errors import Message, Option, UsageError, unknown
from featurepipe.heads.calibration import (
    calibrated_labels,
    class_scores,
    expected_calibration_error,
    fit_temperature,
    gains_clearly,
    label_scores,
    predicted_numbers,
    probabilities,
)
from featurepipe.heads.devices import Device, OnDevice
from featurepipe.heads.label_calibration import FEW
from featurepipe.heads.statistics.aims import Wish
from featurepipe.heads.statistics.intervals import units_of
from featurepipe.heads.statistics.regression import conformal_half_width, least_units
from featurepipe.heads.statistics.screening import choose_threshold
from featurepipe.progress import took
from featurepipe.store.views import FeatureSet
from featurepipe.training.options import CPU, TrainOptions
from featurepipe.training.splits import CROSSED_FOLDS, FEWEST_FOLDS, count_units
from featurepipe.training.task import Recipe, Task, weighted

if TYPE_CHECKING:
    from featurepipe.execution import SpreadFeatures


Array = npt.NDArray[Any]

INTERVAL_LEVEL = 0.9
"""How often prediction intervals hold the true number."""

ENOUGH = 100
"""Validation images below which a temperature is rough."""

SHARE_OF_DEVICE = 0.8
"""Of a device's free memory that features may take; the rest is for blocks and their scores."""

ONE_THREAD_VALUES = 5_000_000
"""Values (rows times columns) up to which one BLAS thread fits a head sooner than several."""


@dataclass(frozen=True)
class Calibration:
    """A temperature and what it does on the rows it was fitted on.

    Attributes:
        temperature: what class scores are divided by before the softmax.
        rows: validation rows.
        ece_before: expected calibration error with temperature 1, from 0 to 1.
        ece_after: with the temperature.
    """

    temperature: float
    rows: int
    ece_before: float
    ece_after: float


def fit(task: Task, recipe: Recipe, rows: Array, say: Callable[[str], None] | None = None) -> BaseEstimator:
    """Fits the recipe's head on some rows of the task, in memory or from blocks as the task's cost says."""
    head = recipe.make(out_of_core=task.cost.solver == "blocks", memory=task.cost.budget_bytes)
    if task.is_multilabel:
        last = head.steps[-1][1] if hasattr(head, "steps") else head
        last.set_params(label_names=list(task.classes))
    features, answers = task.rows(rows), task.answers(rows)
    start = time.perf_counter()
    with refusals(recipe.head):
        _fit(head, features, answers, task, weighted(head, task.weights(rows)))
    if say:
        say(f"fitted {recipe.head} on {len(rows):,} images in {took(time.perf_counter() - start)}")
    return head


@contextmanager
def refusals(head: str) -> Iterator[None]:
    """Turns what an estimator refuses (a parameter, mostly) into an error of one line."""
    try:
        yield
    except UsageError:
        raise
    except (ValueError, OverflowError) as error:
        raise UsageError(f"{head} cannot be fitted: {error}") from error


def _fit(
    head: BaseEstimator, features: FeatureSet | SpreadFeatures, answers: Array, task: Task, weights: Mapping[str, Any]
) -> None:
    if task.cost.solver == "blocks" or not isinstance(features, FeatureSet):
        head.fit(features_on(features, task.cost.device), answers, **weights)
    else:
        with threads_for(features.shape), constant_columns():
            head.fit(features.read(np.float32), answers, **weights)


def features_on(features: Any, name: str) -> Any:
    """Features that are multiplied on a device; as they are for ``cpu``."""
    return features if name == CPU else OnDevice(features, device_called(name))


def device_called(name: str) -> Device:
    """A device by PyTorch's name for it, on which features may take most of the memory that is free now.

    Raises:
        UsageError: PyTorch sees no such device.
    """
    import torch  # loaded only where a device is asked for

    count = torch.cuda.device_count()
    if torch.device(name).type != "cuda" or (torch.device(name).index or 0) >= count:
        known = ", ".join(["cpu", *(f"cuda:{number}" for number in range(count))])
        raise UsageError(
            f"device {name!r}: this PyTorch sees {counted(count, 'CUDA device')}; choices here: {known}. See: featurepipe doctor"
        )
    free, _ = torch.cuda.mem_get_info(name)
    return Device(torch.empty(0, device=name), int(SHARE_OF_DEVICE * free))


@contextmanager
def constant_columns() -> Iterator[None]:
    """Lets values that are constant, as many after a ReLU are, pass without scikit-learn's warning of them.

    ``NearestCentroid`` gives it for deviations that only shrunken centroids need, and there they do no harm.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"self\.within_class_std_dev_ has at least 1 zero", UserWarning)
        yield


def threads_for(shape: tuple[int, int]) -> AbstractContextManager[Any]:
    """One BLAS thread for small features (rows, values a row), all for large ones, while the block runs.

    Where products are small, threads wait for each other more than they work: 20 s against 1 s on a busy machine.
    """
    limits: AbstractContextManager[Any] = threadpool_limits(
        1 if shape[0] * shape[1] <= ONE_THREAD_VALUES else None, user_api="blas"
    )
    return limits


def prediction_interval(task: Task, recipe: Recipe, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Measures on the validation rows how wide prediction intervals must be, with a head fitted on the others.

    Split conformal prediction (`featurepipe.heads.statistics.regression.conformal_half_width`). Its guarantee is that of the head
    that it was measured with. Where the validation rows were set aside from the training rows, the last fit has them back, and
    makes another head: then the level is approximate, as ``refitted`` says.

    Returns:
        ``level``, ``half_width`` in the target's unit, the ``images`` (and ``groups``) that gave it, and ``refitted``; None where
        there are too few.
    """

    def predicted() -> Array:
        head = fit(task, recipe, task.division.train)
        with refusals(recipe.head):
            return predicted_numbers(head, task.rows(task.division.validation))

    return interval_of(task, predicted, refitted=task.division.is_carved, say=say)


def interval_of(
    task: Task, predict: Callable[[], Array], *, refitted: bool, say: Callable[[str], None]
) -> dict[str, Any] | None:
    """Prediction intervals from the validation rows; see `prediction_interval`.

    Args:
        task: what was settled.
        predict: gives the (m,) predictions of the validation rows, by a head that has not learned from them; not called where
            there are too few.
        refitted: whether the bundle's head has learned from them.
        say: told where they are few.
    """
    rows = task.division.validation
    groups = task.features.take(rows).groups
    units = count_units(task.features, rows)
    what = "validation images" if groups is None else "groups of validation images"
    least = least_units(INTERVAL_LEVEL)
    if units < least:
        more = "more images" if groups is None else "images of more groups"
        if task.division.is_carved:
            more += f", {FEWEST_FOLDS * least} or more to train on"
        at_least = f"{least} {'images' if groups is None else 'groups'} or more"
        say(
            f"{units} {what} are too few for prediction intervals, which need {least}: there are none; give {more}, or a split "
            f"val with {at_least}"
        )
        return None
    half_width = conformal_half_width(predict(), task.answers(rows), level=INTERVAL_LEVEL, groups=groups)
    if units < ENOUGH:
        say(
            f"{units:,} {what} are few for prediction intervals: their share of true numbers varies around {INTERVAL_LEVEL:g}"
        )
    return {
        "level": INTERVAL_LEVEL,
        "half_width": half_width,
        "images": len(rows),
        **({} if groups is None else {"groups": units}),
        "refitted": refitted,
    }


ENOUGH_POSITIVES = 20
"""Validation images that have a label, below which its threshold is rough."""

LARGEST_F1 = Wish.of("f1")
"""What the threshold of each of several labels reaches where nothing else is asked for."""


def calibrate_labels(
    task: Task,
    recipe: Recipe,
    say: Callable[[str], None],
    *,
    wish: Wish = LARGEST_F1,
    margin: bool = False,
    sigmoids: bool = True,
) -> dict[str, Any] | None:
    """Fits a sigmoid and chooses a threshold for each label on the validation rows, with a head fitted on the others.

    Few training rows without a split ``val`` all validate, in folds: each is scored by a head that was fitted on other folds
    (on 1,150 emoji of ten kinds, thresholds of 115 set aside lose 0.028 of the best F1 on average, those out of fold 0.007).

    Args:
        task: what was settled.
        recipe: of the head.
        say: told of labels that lack images, or whose wish cannot be met.
        wish: what each threshold is to reach.
        margin: whether the lower 95 % limit is to reach it.
        sigmoids: whether to fit sigmoids, too.

    Returns:
        ``images``, and what `featurepipe.heads.calibration.calibrated_labels` returns. Labels for which there were no validation
        (or no other training) images of both sides keep slope 1, offset 0 and threshold 0. None without validation rows.
    """
    division = task.division
    if not len(division.validation):
        say("no validation images to calibrate on: probabilities and thresholds stay as the head gives them")
        return None
    folds = task.folds(CROSSED_FOLDS) if division.is_crossed else [(division.train, division.validation)]
    parts = [_label_scores(task, recipe, train, rows) for train, rows in folds]
    scores, truth = (np.concatenate(side) for side in zip(*parts, strict=True))
    rows = np.concatenate([rows for _, rows in folds])
    return labels_calibrated(task, scores, truth, say, rows=rows, wish=wish, margin=margin, sigmoids=sigmoids)


def _label_scores(task: Task, recipe: Recipe, train: Array, rows: Array) -> tuple[Array, Array]:
    """Scores (m, K) of some rows by a head fitted on others, and their labels, NaN for those that it could not learn."""
    with warnings.catch_warnings():  # which labels these are is said below
        warnings.filterwarnings("ignore", "left out", UserWarning)
        head = fit(task, recipe.with_params({"one_sided": "drop"}), train)
    learned = [task.classes.index(name) for name in head.classes_]
    with refusals(recipe.head):
        scores = label_scores(head, task.rows(rows))
    truth = np.full((len(rows), len(task.classes)), np.nan)
    padded = np.zeros(truth.shape)
    padded[:, learned], truth[:, learned] = scores, task.answers(rows)[:, learned]
    return padded, truth


def labels_calibrated(
    task: Task,
    scores: Array,
    truth: Array,
    say: Callable[[str], None],
    *,
    rows: Array | None = None,
    wish: Wish = LARGEST_F1,
    margin: bool = False,
    sigmoids: bool = True,
) -> dict[str, Any]:
    """Calibrates each label by the scores (m, K) and labels (m, K) of some rows, the validation rows; see `calibrate_labels`."""
    rows = task.division.validation if rows is None else rows
    groups = task.features.take(rows).groups
    found = calibrated_labels(
        scores,
        truth,
        task.classes,
        wish,
        sigmoids=sigmoids,
        margin=margin,
        groups=None if groups is None else list(groups),
    )
    if found["uncalibrated"] and sigmoids:
        lacking = first_names(found["uncalibrated"], 5)
        lack = counted(len(found["uncalibrated"]), "label", "has", "have")
        say(f"{lack} no validation images of both sides, and no calibration: {lacking}")
    if found["few"]:
        have = counted(len(found["few"]), "label", "has", "have")
        say(
            f"{have} fewer than {FEW} validation images of a side, too few to choose a threshold by: theirs is a probability of "
            f"0.5: {first_names(found['few'], 5)}"
        )
    positives = {name: int(count) for name, count in zip(task.classes, (truth == 1).sum(axis=0), strict=True)}
    rough = sorted(
        (name for name, count in positives.items() if FEW <= count < ENOUGH_POSITIVES), key=positives.__getitem__
    )
    if rough:
        have = "1 label has a threshold" if len(rough) == 1 else f"{len(rough):,} labels have thresholds"
        shown = first_names([f"{name} {positives[name]}" for name in rough], 5)
        say(f"{have} from fewer than {ENOUGH_POSITIVES} validation images that have it, so take it as rough: {shown}")
    if found["unreached"]:
        say(
            f"WARNING: {counted(len(found['unreached']), 'label', 'does', 'do')} not reach {wish.text} on the validation images; "
            f"the nearest threshold is taken: {first_names(found['unreached'], 5)}"
        )
    if len(rows) < ENOUGH:
        say(f"{len(rows):,} validation images are few to calibrate on: take probabilities and thresholds as rough")
    return {"images": len(rows), **found}


@dataclass(frozen=True)
class HeldOut:
    """The validation rows of known classes, scored by a head that was fitted on the other rows.

    Attributes:
        rows: (n,) positions.
        codes: (n,) positions of their classes in ``classes``.
        scores: (n, K).
        classes: K names.
    """

    rows: Array
    codes: npt.NDArray[np.int64]
    scores: npt.NDArray[np.floating[Any]]
    classes: tuple[str, ...]


def held_out(task: Task, recipe: Recipe) -> HeldOut:
    """Fits the recipe's head on the rows that do not validate, and scores those that do."""
    rows = task.division.validation
    head = fit(task, recipe, task.division.train)
    known = {name: code for code, name in enumerate(head.classes_)}
    renumbered = np.array(
        [*(known.get(name, -1) for name in task.classes), -1]
    )  # its last is for rows of no known class
    rows = rows[renumbered[task.codes[rows]] >= 0]
    names = tuple(str(name) for name in head.classes_)
    if not len(rows):
        return HeldOut(rows, np.zeros(0, np.int64), np.zeros((0, len(names))), names)
    with refusals(recipe.head):
        scores = class_scores(head, task.rows(rows))
    return HeldOut(rows, renumbered[task.codes[rows]], scores, names)


def calibrate(held: HeldOut, say: Callable[[str], None]) -> Calibration | None:
    """Fits a temperature on the validation rows, 1 where few of them show no clear gain; None where there are none."""
    rows, codes, scores = held.rows, held.codes, held.scores
    if not len(rows):
        say("no validation images to calibrate on: probabilities stay as the head gives them")
        return None
    temperature = fit_temperature(scores, codes)
    before, after = (expected_calibration_error(probabilities(scores, t), codes) for t in (1.0, temperature))
    if temperature != 1.0 and len(rows) < ENOUGH and not gains_clearly(scores, codes, temperature):
        say(
            f"{len(rows):,} validation images are few to calibrate on, and the temperature {temperature:.3g} gains them no more "
            "than a standard error: probabilities stay as the head gives them (temperature 1)"
        )
        return Calibration(1.0, len(rows), before, before)
    if len(rows) < ENOUGH:
        say(f"{len(rows):,} validation images are few to calibrate on: take the temperature as rough")
    return Calibration(temperature, len(rows), before, after)


FEW_OF_A_SIDE = 50
"""Validation images of a side below which a threshold is rough."""
_NAMED = 5


def check_threshold(task: Task, options: TrainOptions) -> None:
    """Refuses a threshold that cannot be chosen, before anything is fitted.

    Raises:
        UsageError: There are more than two classes, none of the name given, or no validation image of one of them; of several
            labels none of the name given, or no validation image at all.
    """
    if task.is_multilabel:
        _check_labels(task, options)
        return
    if options.threshold is None:
        return
    asked = Option("threshold", options.threshold)
    names = first_names(task.classes, _NAMED)
    if len(task.classes) != 2:
        raise UsageError(
            Message(
                f"a threshold tells one of two classes, and here are {len(task.classes):,}: {names}; leave ", asked,
                " out, or give labels of two classes",
            )
        )  # fmt: skip
    if options.positive not in task.classes:
        raise UsageError(
            Message("no class ", Option("positive", options.positive), f" to look for; the classes are: {names}")
        )
    codes = task.codes[task.division.validation]
    for code, name in enumerate(task.classes):
        if not (codes == code).any():
            raise UsageError(
                Message(
                    f"none of the {counted(int((codes >= 0).sum()), 'validation image')} is of class {name!r}, so no threshold "
                    "can be chosen; give more images of it, or leave ", asked, " out",
                )
            )  # fmt: skip


def _check_labels(task: Task, options: TrainOptions) -> None:
    if options.positive is not None and options.positive not in task.classes:
        raise unknown("label", options.positive, task.classes)
    if options.threshold is not None and not len(task.division.validation):
        raise UsageError(
            Message(
                "there is no validation image, so no threshold can be chosen; give more images, or leave ",
                Option("threshold", options.threshold), " out",
            )
        )  # fmt: skip


def fit_threshold(
    task: Task, held: HeldOut, temperature: float | None, options: TrainOptions, say: Callable[[str], None]
) -> dict[str, Any]:
    """Chooses the threshold on the calibrated probabilities of the validation rows.

    Args:
        task: What was settled.
        held: The validation rows' scores.
        temperature: That calibrates them; None without calibration.
        options: What the threshold is to reach, for which class, and with what margin.
        say: Told where it is rough, or does not reach what is wanted.

    Returns:
        What a bundle keeps: ``positive`` and ``negative`` (classes), ``value`` (the probability from which on an image is called
        positive), ``wish``, ``margin``, ``reached``, ``reason``, ``images`` (and ``groups``), and ``rates``: what it reaches on
        the validation images, by which it was chosen, so that new images may fall short of it.
    """
    positive = str(options.positive)
    code = held.classes.index(positive)
    likely = probabilities(held.scores, temperature or 1.0)[:, code]
    truth = held.codes == code
    groups = task.features.take(held.rows).groups
    found = choose_threshold(
        likely, truth, Wish.of(str(options.threshold)), margin=options.threshold_margin, groups=groups
    )
    if not found.reached:
        say(f"WARNING: {found.reason}")
    fewest = min(int(truth.sum()), int((~truth).sum()))
    if fewest < FEW_OF_A_SIDE:
        say(
            f"{counted(fewest, 'validation image')} of one class are few to choose a threshold on: new images may fall far short "
            "of what was wanted; give a larger val split, or ask for a margin"
        )
    return {
        "positive": positive,
        "negative": held.classes[1 - code],
        "value": found.threshold,
        "wish": options.threshold,
        "margin": options.threshold_margin,
        "reached": found.reached,
        "reason": found.reason,
        "images": len(truth),
        **({} if groups is None else {"groups": int(units_of(groups, len(truth)).max()) + 1}),
        "rates": found.rates,
    }
