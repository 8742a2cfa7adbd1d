"""The options of the test for drift; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import Any, ClassVar

from featurepipe.option_groups import ROWS, OptionGroup, at_least, file_or_kind, is_number, not_empty, option
from featurepipe.prediction.options import RawIdsOption
from featurepipe.store.options import (
    GROUP,
    NO_GROUP,
    DatasetOption,
    LabelsOption,
    SideOptions,
    SpaceOption,
    is_column,
    is_file_of_groups,
)


def _p_value(given: Any) -> str | None:
    return (
        None if is_number(given, (int, float)) and 0 < given < 1 else "must be a p-value between 0 and 1, such as 0.01"
    )


@dataclass(frozen=True, kw_only=True)
class ColumnsOption(OptionGroup):
    """Which columns are compared."""

    columns: tuple[str, ...] | None = option(
        None, "a column as featurepipe info lists it; may be repeated (default: all)", metavar="COLUMN", check=not_empty
    )


@dataclass(frozen=True, kw_only=True)
class ShiftOptions(OptionGroup):
    """What new images are compared with, and which difference matters."""

    reference: str = option(
        "previous", "the snapshot to compare with (default: previous)", metavar="previous|first|RUN-ID"
    )
    warn: float = option(
        0.01, "warn below this p-value, adjusted for the number of tests (default: 0.01)", metavar="P", check=_p_value
    )
    fail: float | None = option(
        None, "fail, with exit code 1, below this p-value (default: never)", metavar="P", check=_p_value
    )
    group: str | None = option(
        None, f"column of what belongs together, such as a patient, or a file with id and group: whole groups are compared "
        f"(default: {GROUP} of the manifest, if there is one; {NO_GROUP}: every image for itself)",
        metavar="COLUMN|FILE", check=is_column, is_path=is_file_of_groups,
    )  # fmt: skip
    seed: int = option(0, "of what is drawn (default: 0)", check=at_least(0))


@dataclass(frozen=True, kw_only=True)
class DriftOptions(ShiftOptions, SpaceOption, ColumnsOption, DatasetOption):
    """All options of `featurepipe.drift`."""

    snapshot: str | None = option(
        None, "the snapshot whose images are tested (default: the current one)", metavar="RUN-ID"
    )
    bundle: Any = option(
        None,
        "compare what this bundle predicts (classes, labels or a number) as well",
        metavar="BUNDLE",
        recorded=file_or_kind,
    )


def _distance(given: Any) -> Any:
    """A number; what is none may be ``auto``, and else the search refuses it and says why."""
    try:
        return float(given) if isinstance(given, str) else given
    except ValueError:
        return given


@dataclass(frozen=True, kw_only=True)
class NodeOption(OptionGroup):
    """Which column is compared."""

    purpose: ClassVar[str] = ROWS

    node: str = option("bottleneck", "whose distances count (default: bottleneck)", metavar="COLUMN")


@dataclass(frozen=True, kw_only=True)
class GroupsOptions(OptionGroup):
    """Which groups of images are found, and where they are written."""

    near: float | str | None = option(
        None, "list images nearly alike, too: their features' cosine distance is at most so much",
        metavar="auto|DISTANCE", read=_distance,
    )  # fmt: skip
    to: str | PathLike[str] | None = option(
        None, "write all groups, one image a line: .csv, .jsonl or .parquet", metavar="FILE"
    )


@dataclass(frozen=True, kw_only=True)
class DuplicatesOptions(SideOptions, LabelsOption, RawIdsOption, GroupsOptions, SpaceOption, NodeOption, DatasetOption):
    """What `featurepipe.duplicates` compares, and what becomes of it."""
