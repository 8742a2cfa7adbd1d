"""The options of tuning a network's tail; imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from os import PathLike
from typing import Any, ClassVar

from featurepipe.errors import Message, Option, UsageError
from featurepipe.option_groups import LEARNING, at_least, by_commas, is_memory, is_number, not_empty, option
from featurepipe.store.options import DatasetOption, LabelsOption, RoleOptions, SpaceOption, TrustOption

AUGMENTATIONS = ("none", "crop", "flip", "crop,flip")
EXACT, RANDOM = "exact", "random"
"""The head that a tuning begins with."""
OF_IMAGES = ("batch_norm", "mixed_precision")
"""Options that say how images are learned from, of no use where activations are."""
NOT_OF_TUNING = ("batch_size",)
"""Of the options of extraction, what has another meaning in a tuning."""


def _positive(given: Any) -> str | None:
    return (
        None if is_number(given, Real) and math.isfinite(given) and given > 0 else "must be a positive, finite number"
    )


def _share(given: Any) -> str | None:
    return None if is_number(given, Real) and 0 < given <= 1 else "must be a share above 0 and at most 1"


def _from_zero(given: Any) -> str | None:
    return None if is_number(given, Real) and math.isfinite(given) and given >= 0 else "must be a number from 0"


def _below_one(given: Any) -> str | None:
    return None if is_number(given, Real) and 0 <= given < 1 else "must be a share from 0, below 1"


def features_kept(given: bool | str | Sequence[str]) -> bool | tuple[str, ...]:
    """What is kept of a tuned network's features.

    Example:
        >>> features_kept(True), features_kept("blocks.14, blocks.15"), features_kept(["all"])
        (True, ('blocks.14', 'blocks.15'), ('all',))
    """
    if isinstance(given, bool):
        return given
    return by_commas(given) if isinstance(given, str) else tuple(given)


IMAGES = "images"
"""In place of a node: all layers are tuned, from the images."""


def one_or_several(given: str | Sequence[str]) -> str | tuple[str, ...]:
    """A single text as it is, since records of one cut name no list; several as a tuple.

    Example:
        >>> one_or_several(["layer3"]), one_or_several(["layer2", "layer3"]), one_or_several("layer3")
        ('layer3', ('layer2', 'layer3'), 'layer3')
    """
    if isinstance(given, str):
        return given
    return given[0] if len(given) == 1 else tuple(given)


def _cuts(given: Any) -> str | None:
    names = (given,) if isinstance(given, str) else given
    if not isinstance(names, tuple) or not names or not all(isinstance(name, str) and name for name in names):
        return "must not be empty" if given in ("", (), ("",)) else "must be a node, several nodes, or images"
    if len(set(names)) < len(names):
        return "names a node twice"
    return f"cannot be {IMAGES} beside nodes: give two calls" if IMAGES in names and len(names) > 1 else None


SCRATCH_STEPS = 2_000
"""A network that starts with random weights makes at least so many steps, within 60 to 300 epochs."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Rates and lengths of a tuning; the fields are options of `TuneOptions`, with the defaults settled."""

    epochs: int
    rate: float
    lowest_rate: float
    weight_decay: float
    warmup: float
    batch_size: int
    patience: int
    label_smoothing: float = 0.0
    mixup: float = 0.0

    @property
    def text(self) -> str:
        """How inputs and answers are softened; empty if they are not.

        Example:
            >>> TuneOptions(mixup=0.2, label_smoothing=0.1).schedule(1).text
            'mixup of 0.2, label smoothing of 0.1'
        """
        said = {"mixup": self.mixup, "label smoothing": self.label_smoothing}
        return ", ".join(f"{words} of {value:g}" for words, value in said.items() if value)

    def about(self) -> dict[str, str]:
        """The same as JSON values, for a record."""
        return {"softened": self.text} if self.text else {}


@dataclass(frozen=True, kw_only=True)
class LoopOptions(RoleOptions):
    """Which layers are tuned, for what, and how."""

    purpose: ClassVar[str] = LEARNING

    from_node: str | tuple[str, ...] | None = option(
        None,
        "where to cut the network: what lies above is tuned, what lies below stays as it is; may be repeated: the cut that is "
        "best on validation is kept; images: all is tuned, from the images themselves",
        metavar="NODE|images",
        check=_cuts, read=one_or_several, repeated=True,
    )  # fmt: skip

    epochs: int | None = option(
        None, "passes over the training images (default: 10; from scratch 60, or up to 300 of few images)",
        check=at_least(1, 10_000),
    )  # fmt: skip
    rate: float | None = option(
        None, "learning rate of the head and the highest block, after the warm-up (default: 0.001; of all layers of a "
        "pretrained network 0.0003)",
        metavar="RATE", check=_positive,
    )  # fmt: skip
    lowest_rate: float | None = option(
        None, "learning rate of the lowest tuned block as a share of --rate, geometric between (default: 0.1; from scratch 1)",
        metavar="SHARE", check=_share,
    )  # fmt: skip
    weight_decay: float | None = option(
        None, "decay of weights by AdamW; none of biases and of BatchNorm (default: 0.01; from scratch 0.05)",
        metavar="DECAY", check=_from_zero,
    )  # fmt: skip
    warmup: float = option(
        0.1, "share of all steps in which rates rise from 0, before they fall as a cosine does (default: 0.1)",
        metavar="SHARE", check=_share,
    )  # fmt: skip
    batch_size: int | None = option(None, "images a step (default: 64; from images 32)", check=at_least(1, 65_536))
    patience: int | None = option(
        None, "epochs without a better score on the validation images after which to stop (default: 3; from scratch a quarter)",
        check=at_least(1),
    )  # fmt: skip
    augment: str | None = option(
        None, "random changes of images in training: crop, a part of 35 to 100 % of the image, with --from images alone; flip, "
        "left-right, which is wrong for text and digits; above a node it doubles the activations (default: crop from images, "
        "else none)",
        metavar="none|crop|flip|crop,flip", choices=AUGMENTATIONS,
    )  # fmt: skip
    label_smoothing: float | None = option(
        None, "share of each answer that is spread over all classes, so that none is learned as certain; of classes alone "
        "(default: 0)",
        metavar="SHARE", check=_below_one,
    )  # fmt: skip
    mixup: float | None = option(
        None, "mix the images of a step with each other, above a node their activations, and their answers alike, in a share of "
        "Beta(ALPHA, ALPHA); 0.2 to 1 where losses on training and validation images part (default: 0, none)",
        metavar="ALPHA", check=_from_zero,
    )  # fmt: skip
    batch_norm: str | None = option(
        None, "statistics of BatchNorm, with --from images: frozen, or train (default: frozen; from scratch train)",
        choices=("frozen", "train"),
    )  # fmt: skip
    mixed_precision: str | None = option(
        None, "arithmetic of training, with --from images: fp32, or bf16 where that is safe (default: bf16 on CUDA, else fp32)",
        choices=("fp32", "bf16"),
    )  # fmt: skip
    seeds: int = option(
        1, "how often to tune from each cut, each time with images in another order, and with other weights and another head "
        "where these are random; the best on validation is kept (default: 1)",
        check=at_least(1, 100),
    )  # fmt: skip
    interpolate: bool = option(
        True,
        "mix tuned and frozen weights in the share that is best on the validation images (WiSE-FT; not from scratch)",
    )
    head_start: str = option(
        EXACT, "the head to begin with: exact, fitted on the frozen network's features (LP-FT), or random, with which the first "
        "steps distort them, to compare with; nothing is mixed then (default: exact)",
        choices=(EXACT, RANDOM),
    )  # fmt: skip
    split: str | None = option(None, "the split to train on (default: train)", metavar="NAME")
    min_class_size: int = option(2, "leave out classes with fewer images, and say so (default: 2)", check=at_least(1))
    memory: int | float | str | None = option(
        None, "what activations may take in memory, such as 4GB; above it they are read from the store step by step (default: "
        "half of the free)",
        metavar="AMOUNT", check=is_memory,
    )  # fmt: skip
    seed: int = option(0, "of draws (default: 0)", check=at_least(0, 2**32 - 1))
    store_features: bool | tuple[str, ...] = option(
        False, "at the end, keep the tuned network's features of all images in the store, computed from the activations: those "
        "of the bottleneck, and of nodes from the cut on that are named; all: of every block there, as extract --node all",
        metavar="all|NODE[:POOLING],...", read=features_kept, check=not_empty,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing and self.target_type != "multiclass":
            what = {"multilabel": "several labels", "continuous": "a number"}[self.target_type]
            raise UsageError(
                Message(
                    Option("label_smoothing", self.label_smoothing), " spreads the answer over the classes, and ",
                    Option("multilabel" if self.multilabel else "target"), f" is of {what}: leave it out; ", Option("mixup"),
                    " softens these answers, too",
                )
            )  # fmt: skip

    @property
    def cuts(self) -> tuple[str, ...]:
        """The nodes where the network is cut; ``images`` for none, and empty if nothing is said."""
        return (
            () if self.from_node is None else (self.from_node,) if isinstance(self.from_node, str) else self.from_node
        )

    @property
    def flips(self) -> bool:
        """Whether half of the images are mirrored in training."""
        return self.augment is not None and "flip" in self.augment.split(",")

    @property
    def is_from_images(self) -> bool:
        """Whether all layers are tuned, from the images themselves."""
        return self.cuts == (IMAGES,)


@dataclass(frozen=True, kw_only=True)
class TuneOptions(LoopOptions, LabelsOption, TrustOption, SpaceOption, DatasetOption):
    """All options of `featurepipe.finetune` but those of extraction."""

    dataset: str | None = option(
        None, "which of the store's datasets; of images, their name there (default: the store's only one; the source's name)",
        metavar="NAME",
    )  # fmt: skip
    backbone: str | None = option(
        None, "of a store a backbone, a space's name or fingerprint, where it holds several; of images see featurepipe backbones "
        "(default: what is at hand, as extract chooses)",
        metavar="NAME",
    )  # fmt: skip
    weights: str | PathLike[str] | Mapping[str, str] | None = option(
        None, "the backbone's weights file, where the features are of one of your own; of images as for featurepipe extract",
        metavar="NAME|none|FILE",
    )  # fmt: skip

    def schedule(self, images: int, *, is_scratch: bool = False) -> Schedule:
        """Settles what was left to us.

        Args:
            images: That are learned from.
            is_scratch: Whether the network starts with random weights.
        """
        size = self.batch_size or (32 if self.is_from_images else 64)
        steps = -(-images // size)
        epochs = self.epochs or (min(300, max(60, -(-SCRATCH_STEPS // steps))) if is_scratch else 10)
        return Schedule(
            epochs=epochs,
            rate=self.rate or (3e-4 if self.is_from_images and not is_scratch else 1e-3),
            lowest_rate=self.lowest_rate or (1.0 if is_scratch else 0.1),
            weight_decay=self.weight_decay if self.weight_decay is not None else 0.05 if is_scratch else 0.01,
            warmup=self.warmup,
            batch_size=size,
            patience=self.patience or (max(10, epochs // 4) if is_scratch else 3),
            label_smoothing=float(self.label_smoothing or 0),
            mixup=float(self.mixup or 0),
        )
