"""The options of comparing layers; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from featurepipe.errors import Message, Option, UsageError, unknown
from featurepipe.features.options import SourceNameOption
from featurepipe.heads.families import FAMILIES, family_for, refuse_weights
from featurepipe.option_groups import OptionGroup, at_least, by_commas, file_or_kind, option
from featurepipe.store.options import LabelsOption, RoleOptions

MAX_WIDTH = 9000
"""Values per image that columns are brought to: about VISSL's (Goyal et al. 2019)."""


_TARGET_TYPES = ("multiclass", "multilabel", "continuous")
_EVERY_HEAD = tuple(dict.fromkeys(name for kind in _TARGET_TYPES for name in FAMILIES[kind]))


def _heads(given: Any) -> str | None:
    for head in given:
        if head not in _EVERY_HEAD:
            raise unknown("head", str(head), _EVERY_HEAD, see="featurepipe depth --help")
    if not given or len(set(given)) < len(given):
        good = Option("heads", "logistic,knn")
        raise UsageError(Message(Option("heads", ",".join(given)), ": name each head once, such as ", good))
    return None


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions(RoleOptions):
    """How layers are compared, and for what: classes, several labels or a number."""

    heads: tuple[str, ...] | None = option(
        None, f"of {', '.join(_EVERY_HEAD)}; separated by commas (default: logistic; of a number ridge)",
        metavar="LIST", check=_heads, read=by_commas,
    )  # fmt: skip
    folds: int = option(5, "of the cross-validation (default: 5)", check=at_least(2))
    split: bool = option(False, "train on the dataset's split train and test on test, instead of folds")
    seeds: int = option(3, "how often the cross-validation is repeated, with new folds (default: 3)", check=at_least(1))
    max_width: int = option(MAX_WIDTH, f"values per image of a column (default: {MAX_WIDTH})", check=at_least(1))
    jobs: int | None = option(None, "measurements at once (default: one per CPU)", check=at_least(1, 1024))

    def __post_init__(self) -> None:
        super().__post_init__()
        for head in self.heads or ():
            family = family_for(head, self.target_type)
            if self.weight is not None and not family.weights:
                raise refuse_weights(head, "weight", self.target_type)

    @property
    def families(self) -> tuple[str, ...]:
        """The heads to measure with."""
        return self.heads or (("ridge",) if self.target_type == "continuous" else ("logistic",))


@dataclass(frozen=True, kw_only=True)
class DepthOptions(ComparisonOptions):
    """How layers are compared, and what is computed for it; all options of `featurepipe.depth` but those of extraction."""

    pooling: tuple[str, ...] | None = option(
        None, "such as gap,avg2x2 (default: the finest average grid within --max-width)", metavar="LIST", read=by_commas
    )
    control: str | None = option(None, "measure the same network with random weights as well", choices=("random",))


@dataclass(frozen=True, kw_only=True)
class StoreOption(OptionGroup):
    """Where features are kept."""

    store: Any = option(None, "where features of SOURCE go (default: features)", metavar="DIR", recorded=file_or_kind)


@dataclass(frozen=True, kw_only=True)
class ComparedOptions(SourceNameOption, StoreOption):
    """Whose layers are compared."""

    backbone: str | tuple[str, ...] | None = option(
        None, "may be repeated, to compare several on the same images and folds; see featurepipe backbones (default: what is "
        "at hand, as extract chooses, or what STORE holds)",
        metavar="NAME",
    )  # fmt: skip
    weights: str = option("DEFAULT", "of the network, as for featurepipe extract", metavar="NAME|none|FILE")
    nodes: tuple[str, ...] = option(
        ("auto",), "may be repeated; auto: the network's stages and its bottleneck (default: auto)",
        metavar="auto|NODE[:POOLING]",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OtherSourceOption(OptionGroup):
    """What heads are tested on besides."""

    test_source: Any = option(
        None, "images of the same classes from elsewhere, which heads are tested on, too",
        metavar="SOURCE", recorded=file_or_kind,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AnsweredOptions(LabelsOption, OtherSourceOption):
    """What is true of the images, what heads are tested on besides, and where the page goes."""

    labels: Any = option(
        None, "labels to use instead of the source's: .csv, .parquet or .jsonl with id and label",
        metavar="FILE", recorded=file_or_kind,
    )  # fmt: skip
    report: str | None = option(
        None, "write the page: curves, tables, a map of the images, mistakes", metavar="FILE.html"
    )
