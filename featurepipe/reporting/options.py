"""The options of writing a page; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from featurepipe.features.options import SourceOptions
from featurepipe.option_groups import ANSWER, OptionGroup, at_least, file_or_kind, option
from featurepipe.store.options import DatasetOption, LabelsOption, RowOptions, SplitOption

NIGHTS = 30


@dataclass(frozen=True, kw_only=True)
class ShownOption(OptionGroup):
    """What a page of findings is about."""

    bundle: Any = option(
        None, "report on this bundle, evaluated on the dataset, instead of the last comparison",
        metavar="BUNDLE", recorded=file_or_kind,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PictureSourceOption(OptionGroup):
    """Where the images of a page are."""

    purpose: ClassVar[str] = ANSWER

    source: Any = option(
        None, "the images, for thumbnails (default: where they were extracted from)",
        metavar="SOURCE", recorded=file_or_kind,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PicturesOptions(PictureSourceOption):
    """Where the images of a page are, and those that a comparison was tested on."""

    purpose: ClassVar[str] = ANSWER

    test_source: Any = option(
        None, "the same of the other source that a comparison was tested on", metavar="SOURCE", recorded=file_or_kind
    )


@dataclass(frozen=True, kw_only=True)
class FindingsOptions(
    RowOptions, LabelsOption, SourceOptions, PicturesOptions, SplitOption, DatasetOption, ShownOption
):
    """All options of a page of a comparison or a bundle, `featurepipe.report`."""

    split: str | None = option(None, "of the bundle's evaluation, as for featurepipe evaluate", metavar="NAME")
    labels: Any = option(
        None,
        "the labels that were compared with, or that the bundle is tested with, if they are not the dataset's",
        metavar="FILE",
        recorded=file_or_kind,
    )


@dataclass(frozen=True, kw_only=True)
class LastOption(OptionGroup):
    """How much of the past a page of nights shows."""

    last: int = option(NIGHTS, f"how many nights, the newest (default: {NIGHTS})", check=at_least(1))


@dataclass(frozen=True, kw_only=True)
class NightsOptions(LastOption):
    """All options of a page of nights."""

    job: str | None = option(
        None, "of these nights, or a dataset that has no job (default: the one that ran last)", metavar="NAME"
    )
