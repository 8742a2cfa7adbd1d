"""The threshold of two classes: whether one can be chosen, and which one, by validation rows alone; of labels: whether."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from featurepipe.display import counted, first_names
from featurepipe.errors import Message, Option, UsageError, unknown
from featurepipe.heads.calibration import probabilities
from featurepipe.heads.statistics.aims import Wish
from featurepipe.heads.statistics.intervals import units_of
from featurepipe.heads.statistics.screening import choose_threshold
from featurepipe.training.fit import HeldOut
from featurepipe.training.options import TrainOptions
from featurepipe.training.task import Task

FEW = 50
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


def choose(
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
    if fewest < FEW:
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
