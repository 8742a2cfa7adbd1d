"""The options of evaluating a bundle; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import Any

from featurepipe.option_groups import at_least, file_or_kind, is_text, option
from featurepipe.prediction.options import OwnClassesOption
from featurepipe.store.options import DatasetOption, LabelsOption, RowOptions, SplitOption, columns_of


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(RowOptions, LabelsOption, SplitOption, DatasetOption, OwnClassesOption):
    """All options of `featurepipe.evaluation.evaluate.evaluate`: which rows, what is true of them, and how sure it is."""

    split: str | None = option(
        None, "default: test where the dataset has it, else the images not trained on; all: every labelled one",
        metavar="NAME",
    )  # fmt: skip
    target: str | None = option(
        None, "of a bundle that predicts a number: column of the true one (default: that of the training)",
        metavar="COLUMN",
    )  # fmt: skip
    multilabel: tuple[str, ...] | None = option(
        None, "of a bundle that predicts several labels: columns of true ones (default: those of the training)",
        metavar="COLUMN,...", read=columns_of,
    )  # fmt: skip
    positive: str | None = option(
        None, "the class of two, or the label of several, of which sensitivity, specificity, curves and reliability are measured "
        "(default: the one that was looked for in training, else the second class, and no label)",
        metavar="CLASS", check=is_text,
    )  # fmt: skip
    ignore_unknown_classes: bool = option(
        False, "leave out images of classes that the bundle does not know, instead of refusing"
    )
    weights: str | PathLike[str] | None = option(
        None, "of --backbone the name of pretrained weights (default: the best)", metavar="NAME"
    )
    mapping: Any = option(
        None, "of --backbone: CSV with the columns class and label, which says what classes mean your labels; of several classes "
        "of one label probabilities add up (default: labels that are called like a class)",
        metavar="FILE", recorded=file_or_kind,
    )  # fmt: skip
    among_labels: bool = option(
        False, "of --backbone: leave classes without a label out of the choice; by default they are wrong answers"
    )
    bootstrap: int = option(1000, "resamples behind the intervals (default: 1000)", check=at_least(0))
    seed: int = option(0, "of the resamples (default: 0)", metavar="SEED", check=at_least(0))
