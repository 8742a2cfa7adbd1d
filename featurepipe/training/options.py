"""The options of training a head; imports nothing heavy."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, ClassVar

from featurepipe.errors import Message, Option, UsageError, unknown
from featurepipe.heads.families import FAMILIES, PROTOCOLS
from featurepipe.heads.statistics.aims import Wish
from featurepipe.option_groups import (
    LEARNING,
    OptionGroup,
    at_least,
    by_commas,
    is_memory,
    is_number,
    is_text,
    not_empty,
    option,
)
from featurepipe.store.options import DatasetOption, LabelsOption, RoleOptions, SpaceOption, TrustOption

ALL_HEADS = tuple(dict.fromkeys(name for families in FAMILIES.values() for name in families))
"""The heads for any type of target."""


def known_head(given: Any) -> str | None:
    """The check of a head's name."""
    names = ALL_HEADS
    if given not in names:
        raise unknown("head", str(given), names, see="featurepipe train --help")
    return None


def known_protocol(given: Any) -> str | None:
    """The check of a protocol's name."""
    if given not in PROTOCOLS:
        raise unknown("protocol", str(given), PROTOCOLS)
    return None


def value_of(text: str) -> Any:
    """A number, true, false or null as JSON has them, else the text itself."""
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return None if text == "None" else text


def _components(given: Any) -> str | None:
    if is_number(given, (int, float)) and (
        0 < given < 1 or (given >= 1 and math.isfinite(given) and given == int(given))
    ):
        return None
    return "must be a whole number of components from 1, or a share of the variance below 1, such as 0.95"


def components(given: Any) -> Any:
    """A number of components, or a share of the variance, that may be written as text; a whole number also as a float."""
    value = value_of(given) if isinstance(given, str) else given
    return int(value) if isinstance(value, float) and value >= 1 and value.is_integer() else value


SELECT_AUTO = "auto"
"""The share of values to keep is chosen on validation images."""
SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Of the values, from which it is chosen: those of Head2Toe (Evci et al. 2022) from its 0.5 % on, and all."""


def _selected(given: Any) -> str | None:
    if given == SELECT_AUTO or (is_number(given, (int, float)) and 0 < given <= 1):
        return None
    return "must be auto, or the share of the values to keep, above 0 and at most 1, such as 0.05"


def share_of(given: Any) -> Any:
    """``auto``, or a share that may be written as text, such as ``0.05`` or ``5%``."""
    if not isinstance(given, str) or given == SELECT_AUTO:
        return given
    value = value_of(given.removesuffix("%"))
    return (
        value / 100 if given.endswith("%") and is_number(value, (int, float)) else value if value is not None else given
    )


def _aim(given: Any) -> str | None:
    if not isinstance(given, str):
        return "must be text, such as recall=0.95"
    Wish.of(given)
    return None


def order_of(given: Any) -> tuple[str, ...] | None:
    """Classes in their order, the lowest first: one text such as ``low<mid<high`` or ``low,mid,high``, or several texts.

    Example:
        >>> order_of("low < mid < high")
        ('low', 'mid', 'high')
    """
    if isinstance(given, str):
        return by_commas(given.replace("<", ",") if "<" in given else given)
    return None if given is None else tuple(given)


def _order(given: Any) -> str | None:
    if not isinstance(given, tuple) or not all(isinstance(name, str) for name in given):
        return "must be texts, such as low<mid<high"
    return None if len(set(given)) == len(given) >= 2 else "must name two classes or more, each once, the lowest first"


def parameters(given: Any) -> Any:
    """Texts ``NAME=VALUE`` as keyword arguments; anything else as it is."""
    if not isinstance(given, tuple):
        return given
    found = {}
    for setting in given:
        name, equals, value = setting.partition("=")
        if not name or not equals:
            raise UsageError(f"--set {setting!r} is no NAME=VALUE; write for instance --set C=0.1")
        found[name] = value_of(value)
    return found


def _table(given: Any) -> str | None:
    return None if isinstance(given, Mapping) else "must be a table"


def _device(given: Any) -> str | None:
    if isinstance(given, str) and given.partition(":")[0] not in (CPU, "cuda"):
        raise UsageError(f"unknown device {given!r}; choices: cpu, cuda, cuda:N", option="device")
    return is_text(given)


CPU = "cpu"
MIN_CLASS_SIZE = 2
DEFAULT_HEADS = {"multiclass": "logistic", "multilabel": "logistic", "continuous": "ridge", "ordinal": "logistic"}
"""The head by type of target, where none is named."""
PROTOCOL_HEAD = "linear-svm"
"""The head of the protocols."""


@dataclass(frozen=True, kw_only=True)
class FitOptions(RoleOptions):
    """What head is fitted to which columns, and how."""

    purpose: ClassVar[str] = LEARNING

    nodes: tuple[str, ...] = option(
        ("bottleneck",),
        "a column as featurepipe info lists it; several are put side by side; all: every column but maps; recommended: as "
        "featurepipe depth found (default: bottleneck)",
        metavar="COLUMN", check=not_empty,
    )  # fmt: skip
    head: str | None = option(
        None, f"kind of head (default: {DEFAULT_HEADS['multiclass']}; for a --target {DEFAULT_HEADS['continuous']}, or "
        f"{', '.join(name for name in FAMILIES['continuous'] if name != DEFAULT_HEADS['continuous'])})",
        metavar="|".join(ALL_HEADS), check=known_head,
    )  # fmt: skip
    ordered: tuple[str, ...] | None = option(
        None, "the classes are in this order, the lowest first (low<mid<high is read, too): the head learns each step between "
        "them, and parameters are searched by quadratic weighted kappa", metavar="LOW,...,HIGH", check=_order, read=order_of,
    )  # fmt: skip
    split: str | None = option(None, "the split to train on (default: train)", metavar="NAME")
    tune: bool = option(False, "search the head's parameters on the val split, or on 5 folds")
    protocol: str | None = option(
        None, "how several labels are learned in published comparisons of features; voc07: linear SVMs on rows of length 1, "
        "present labels weighing twice, the C of each label by its average precision in 3 folds (VISSL, PASCAL VOC 2007)",
        metavar="|".join(PROTOCOLS), check=known_protocol,
    )  # fmt: skip
    pca: int | float | None = option(
        None, "principal components to keep: a number, or a share of the variance such as 0.95",
        metavar="N|SHARE", check=_components, read=components,
    )  # fmt: skip
    select: str | float | None = option(
        None, "fit on some values of the columns alone, those with the largest coefficients in one ridge regression (Head2Toe); "
        "auto chooses their share, from 0.005 to 1, on validation images",
        metavar="auto|SHARE", check=_selected, read=share_of,
    )  # fmt: skip
    class_weight: str | None = option(
        None, "weigh classes equally, however many images each has", choices=("balanced",)
    )
    calibration: bool = option(
        True,
        "fit a temperature (of a --target: the width of prediction intervals; of --multilabel: a probability and a threshold for "
        "each label) on validation images, which takes one more fit",
    )
    threshold: str | None = option(
        None, "of two classes, choose on validation images from which probability on an image is labelled --positive: the "
        "highest that reaches a recall, the one with the most recall that reaches a precision, the least cost (of a miss : of "
        "a false alarm), or the largest F1; of --multilabel, for each label (default there: f1)",
        metavar="recall=SHARE|precision=SHARE|cost=N:N|f1", check=_aim,
    )  # fmt: skip
    positive: str | None = option(
        None, "the class that a --threshold looks for; of --multilabel, a label whose sensitivity, specificity and curves are "
        "measured, too", metavar="CLASS", check=is_text,
    )  # fmt: skip
    threshold_margin: bool = option(
        False, "let the lower 95 % limit of the recall or precision reach what --threshold wants, not the value alone"
    )
    min_class_size: int = option(
        MIN_CLASS_SIZE,
        f"leave out classes with fewer images, and say so (default: {MIN_CLASS_SIZE})",
        check=at_least(1),
    )
    memory: int | float | str | None = option(
        None, "what fitting may take, such as 2GB; above it, heads read blocks (default: half of the free)",
        metavar="AMOUNT", check=is_memory,
    )  # fmt: skip
    device: str = option(
        CPU, "where logistic and linear-svm heads are fitted; on cuda features stay if they fit, else blocks are copied there in "
        "each pass (default: cpu)", metavar="cpu|cuda[:N]", check=_device,
    )  # fmt: skip
    jobs: int = option(1, "fits at once in a search in memory (default: 1)", check=at_least(1, 1024))
    seed: int = option(0, "of draws and estimators (default: 0)", check=at_least(0, 2**32 - 1))
    params: Mapping[str, Any] | None = option(
        None, "a parameter of the head, such as C=0.1; may be repeated", metavar="NAME=VALUE", repeated=True,
        check=_table, read=parameters,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_threshold()
        if self.ordered is not None and (self.target is not None or self.multilabel):
            other = Option("multilabel" if self.multilabel else "target")
            raise UsageError(Message(Option("ordered"), " and ", other, " are two kinds of target; give one of them"))
        self._check_protocol()
        if self.target is None:
            return
        if self.class_weight is not None:
            weighs, target = Option("class_weight"), Option("target")
            raise UsageError(Message(weighs, " weighs classes, and a ", target, " is a number: give one of them"))
        if self.min_class_size != MIN_CLASS_SIZE:
            raise UsageError(
                Message(
                    Option("min_class_size"), " is about classes, and a ", Option("target"), " has none: leave it out"
                )
            )

    def _check_threshold(self) -> None:
        threshold = Option("threshold", self.threshold)
        if self.threshold is None:
            for name in ("positive", "threshold_margin"):
                if getattr(self, name) and not (name == "positive" and self.multilabel):
                    aim = Option("threshold", "recall=0.95")
                    raise UsageError(
                        Message(
                            Option(name, getattr(self, name)), " is about a threshold: say what to reach with ", aim
                        )
                    )
            return
        if self.target is not None:
            other = Option("target")
            raise UsageError(Message(threshold, " is about two classes, not about ", other, ": give one of them"))
        if self.positive is None and not self.multilabel:
            raise UsageError(
                Message(threshold, " needs the class that is looked for: name it with ", Option("positive"))
            )
        if self.threshold_margin and not Wish.of(self.threshold).has_margin:
            what = "a cost" if Wish.of(self.threshold).aim == "cost" else "the largest F1"
            margin = Option("threshold_margin", value=True)
            raise UsageError(Message(margin, f" is about a recall or precision; {what} has no margin"))

    def _check_protocol(self) -> None:
        if self.protocol is None:
            return
        protocol = Option("protocol", self.protocol)
        if not self.multilabel:
            raise UsageError(
                Message(protocol, " learns several labels: name their columns with ", Option("multilabel"))
            )
        if self.head not in (None, PROTOCOL_HEAD):
            raise UsageError(
                Message(protocol, f" is of head {PROTOCOL_HEAD}: leave ", Option("head", self.head), " out")
            )
        for name in ("pca", "class_weight"):
            if getattr(self, name) is not None:
                raise UsageError(
                    Message(protocol, " says it otherwise: leave ", Option(name, getattr(self, name)), " out")
                )

    @property
    def needs_validation(self) -> bool:
        """Whether anything besides parameters is chosen on rows that a further fit leaves out."""
        return self.calibration or self.threshold is not None

    @property
    def target_type(self) -> str:
        """What is learned of an image, a key of `featurepipe.heads.families.FAMILIES`; classes may be in an order."""
        found = super().target_type
        return "ordinal" if self.ordered is not None and found == "multiclass" else found


@dataclass(frozen=True, kw_only=True)
class WeightsOption(OptionGroup):
    """The network's weights, of which a bundle takes a copy; in Python also a file for each feature space."""

    weights: str | PathLike[str] | Mapping[str, str] | None = option(
        None, "the backbone's weights file, if it has one of your own: a copy goes into the bundle", metavar="FILE"
    )


@dataclass(frozen=True, kw_only=True)
class TrainOptions(TrustOption, WeightsOption, FitOptions, LabelsOption, SpaceOption, DatasetOption):
    """All options of `featurepipe.train`: what is learned from what, and how."""
