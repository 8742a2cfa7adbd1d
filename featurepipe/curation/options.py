"""The options of the questions asked of stored features; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import ClassVar

from featurepipe.features.options import MachineOptions, SourceOptions
from featurepipe.monitoring.options import NodeOption
from featurepipe.option_groups import ANSWER, ROWS, OptionGroup, at_least, option
from featurepipe.prediction.options import RawIdsOption
from featurepipe.reporting.options import PictureSourceOption
from featurepipe.store.options import (
    DatasetOption,
    LabelsOption,
    RemovalOptions,
    RoleOptions,
    SideOptions,
    SpaceOption,
    SplitOption,
    TrustOption,
)

INDEX = ("auto", "always", "never")
ALL, CLASS = "all", "class"
TYPICAL, K_CENTRE = "typical", "k-centre"
COSINE, EUCLIDEAN = DISTANCES = ("cosine", "euclidean")
ON_A_PAGE = 1000
"""The most images that a page shows, each with those nearest to it: it holds all of their thumbnails."""


@dataclass(frozen=True, kw_only=True)
class AnswerOption(OptionGroup):
    """Where an answer is written."""

    purpose: ClassVar[str] = ANSWER

    to: tuple[str, ...] | None = option(
        None,
        "write the answer: .csv, .jsonl or .parquet, or a page with thumbnails, .html; may be repeated, such as for both",
        metavar="FILE",
    )


@dataclass(frozen=True, kw_only=True)
class SnapshotOption(OptionGroup):
    """Which of a dataset's snapshots."""

    purpose: ClassVar[str] = ROWS

    snapshot: str | None = option(
        None, "the snapshot whose images are meant, or the run of a job (default: the current one)", metavar="RUN-ID"
    )


@dataclass(frozen=True, kw_only=True)
class LookInOption(OptionGroup):
    """Where to look for what depends on images."""

    look_in: tuple[str, ...] | None = option(
        None, "search this folder or file, too, for bundles, stores, pages and tables that depend on the images; may be repeated",
        metavar="PATH", is_path=lambda _: True,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ForgetOptions(LookInOption, RemovalOptions):
    """What `featurepipe.curation.forget.forget` removes, and where it looks for what depends on it."""


@dataclass(frozen=True, kw_only=True)
class QuestionOptions(
    SourceOptions,
    PictureSourceOption,
    RawIdsOption,
    AnswerOption,
    SnapshotOption,
    SpaceOption,
    NodeOption,
    DatasetOption,
):
    """What every question has: the features that it is asked of, and where its answer goes."""


@dataclass(frozen=True, kw_only=True)
class DistanceOption(OptionGroup):
    """How far apart features are."""

    distance: str = option(COSINE, f"of features (default: {COSINE})", choices=DISTANCES)


@dataclass(frozen=True, kw_only=True)
class LookOptions(OptionGroup):
    """How look-alikes are looked for."""

    top: int = option(10, "how many images for each query (default: 10)", check=at_least(1, 10_000))
    index: str = option(
        "auto",
        "always: make an index beside the store, keep it up to date and search it; auto: search it if one is kept and there are "
        "200,000 images or more, else compare all",
        choices=INDEX,
    )


@dataclass(frozen=True, kw_only=True)
class QueryOptions(LookOptions):
    """What `featurepipe.similar` looks for, and among what."""

    query_ids: tuple[str, ...] | None = option(
        None, "an image of the store to find look-alikes of; may be repeated", metavar="ID"
    )
    query_dataset: str | None = option(
        None, "the dataset of these ids, if it is not the one that is searched", metavar="NAME"
    )
    weights: str | PathLike[str] | None = option(
        None,
        "the network's weights file, where it is your own, for images that the store does not have",
        metavar="FILE",
    )


@dataclass(frozen=True, kw_only=True)
class SimilarOptions(TrustOption, MachineOptions, QuestionOptions, DistanceOption, QueryOptions):
    """All options of `featurepipe.similar`."""


@dataclass(frozen=True, kw_only=True)
class SuspectsOptions(OptionGroup):
    """How labels are checked."""

    folds: int = option(
        5, "parts, each judged by a head that learned from the others (default: 5)", check=at_least(2, 50)
    )
    limit: int | None = option(
        100,
        f"the most suspects to list, here and on a page (default: 100; on a page up to {ON_A_PAGE:,}); a .csv file has all",
        check=at_least(1),
    )
    seed: int = option(0, "of the folds (default: 0)", check=at_least(0))


@dataclass(frozen=True, kw_only=True)
class CheckLabelsOptions(RoleOptions, LabelsOption, SplitOption, QuestionOptions, SuspectsOptions):
    """All options of `featurepipe.labels`."""


@dataclass(frozen=True, kw_only=True)
class FarOptions(OptionGroup):
    """What an outlier is far from."""

    by: str = option(
        ALL, "far from all other images, or from the other images of its class (default: all)", choices=(ALL, CLASS)
    )
    since: str | None = option(
        None,
        "only images that are new since this snapshot or run of a job, and how far they are from the images of that snapshot",
        metavar="previous|first|RUN-ID",
    )
    neighbours: int = option(
        5, "the neighbour whose distance counts, the Nth nearest (default: 5)", check=at_least(1, 1000)
    )
    limit: int | None = option(
        100,
        f"the most images to list, here and on a page (default: 100; on a page up to {ON_A_PAGE:,}); a .csv file has all",
        check=at_least(1),
    )
    seed: int = option(0, "of the images that many images are compared with first (default: 0)", check=at_least(0))


@dataclass(frozen=True, kw_only=True)
class OutliersOptions(SideOptions, LabelsOption, SplitOption, QuestionOptions, DistanceOption, FarOptions):
    """All options of `featurepipe.outliers`."""


@dataclass(frozen=True, kw_only=True)
class ChoiceOptions(OptionGroup):
    """How images are chosen to be labelled next."""

    budget: int | None = option(None, "how many images to choose", check=at_least(1))
    method: str = option(
        TYPICAL,
        "typical: the most typical image of each large group of look-alikes that has no label yet; k-centre: the image farthest "
        "from all that are labelled or chosen (default: typical)",
        choices=(TYPICAL, K_CENTRE),
    )
    seed: int = option(0, "of the groups of look-alikes (default: 0)", check=at_least(0))


@dataclass(frozen=True, kw_only=True)
class SelectOptions(SideOptions, LabelsOption, SplitOption, QuestionOptions, ChoiceOptions):
    """All options of `featurepipe.select`."""
