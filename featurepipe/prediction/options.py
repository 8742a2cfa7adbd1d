"""The options of predicting with a bundle; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Self

from featurepipe.extraction.limits import RejectLimit
from featurepipe.features.options import DamageOptions, MachineOptions, SourceOptions
from featurepipe.option_groups import OptionGroup, option


@dataclass(frozen=True, kw_only=True)
class BundleOptions(DamageOptions, MachineOptions):
    """How to read images for a bundle, and run its network."""

    weights: str | PathLike[str] | None = option(
        None, "the backbone's weights file, where it was your own and the bundle has no copy", metavar="FILE"
    )
    trust_code: bool = option(False, "let a bundle of a package.module:factory network run that module")

    def in_full(self) -> Self:
        """The same for processes that stand in another folder."""
        is_file = self.weights is not None and Path(self.weights).exists()
        return replace(self, weights=str(Path(self.weights or "").absolute())) if is_file else self


@dataclass(frozen=True, kw_only=True)
class RawIdsOption(OptionGroup):
    """How text is written into CSV files, which spreadsheets open."""

    raw_ids: bool = option(
        False, "leave text in .csv as it is; by default what a spreadsheet would run as a formula gets an apostrophe"
    )


@dataclass(frozen=True, kw_only=True)
class PredictOptions(RawIdsOption, RejectLimit, SourceOptions, BundleOptions):
    """All options of `featurepipe.predict`."""
