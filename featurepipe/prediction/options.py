"""The options of predicting with a bundle; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import ClassVar, Self

from featurepipe.extraction.limits import RejectLimit
from featurepipe.features.options import DamageOptions, MachineOptions, SourceOptions
from featurepipe.option_groups import ANSWER, OptionGroup, at_least, option


@dataclass(frozen=True, kw_only=True)
class BundleOptions(DamageOptions, MachineOptions):
    """How to read images for a bundle, and run its network."""

    weights: str | PathLike[str] | None = option(
        None,
        "the backbone's weights file, where it was your own and the bundle has no copy; of --backbone the name of pretrained "
        "weights (default: the best)",
        metavar="FILE|NAME",
    )
    trust_code: bool = option(False, "let a bundle of a package.module:factory network run that module")

    def in_full(self) -> Self:
        """The same for processes that stand in another folder."""
        is_file = self.weights is not None and Path(self.weights).exists()
        return replace(self, weights=str(Path(self.weights or "").absolute())) if is_file else self


@dataclass(frozen=True, kw_only=True)
class RawIdsOption(OptionGroup):
    """How text is written into CSV files, which spreadsheets open."""

    purpose: ClassVar[str] = ANSWER

    raw_ids: bool = option(
        False, "leave text in .csv as it is; by default what a spreadsheet would run as a formula gets an apostrophe"
    )


@dataclass(frozen=True, kw_only=True)
class TopOption(OptionGroup):
    """How many classes of each image a file of predictions has."""

    purpose: ClassVar[str] = ANSWER

    top: int | None = option(
        None, "write the N most probable classes of each image (label, confidence, label_2, confidence_2, ...) and no column for "
        "each class (default with --backbone: 5)",
        check=at_least(1),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OwnClassesOption(OptionGroup):
    """A network as it is, in place of a bundle."""

    backbone: str | None = option(
        None, "in place of BUNDLE: a pretrained network with its own classifier and classes", metavar="NAME"
    )


@dataclass(frozen=True, kw_only=True)
class PredictOptions(TopOption, RawIdsOption, RejectLimit, SourceOptions, BundleOptions, OwnClassesOption):
    """All options of `featurepipe.predict`."""
