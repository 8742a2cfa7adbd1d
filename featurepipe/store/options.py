"""The options that say what of a store is meant, and which column is what; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

from featurepipe.errors import Message, Option, UsageError
from featurepipe.option_groups import ROWS, OptionGroup, at_least, by_commas, file_or_kind, is_number, not_empty, option

GROUP = "group"
"""The column that is taken as groups unless another one, or none, is asked for."""
NO_GROUP = "none"
LABEL = "label"
"""The column of classes."""
NO_SPLIT = "none"


def columns_of(given: Any) -> tuple[str, ...] | None:
    """Columns by name: one text with commas, several texts, or None for none."""
    if given is None:
        return None
    return by_commas(given) if isinstance(given, str) else tuple(given)


def is_file_of_groups(given: str) -> bool:
    """Whether what is given as groups is a file of its own, not a column."""
    return given.lower().endswith((".csv", ".parquet", ".jsonl"))


def is_column(given: Any) -> str | None:
    """The check of a column's name."""
    return None if isinstance(given, str) and given.strip() else "must be the name of a column"


def _keeps_the_current(given: Any) -> str | None:
    if is_number(given) and given < 1:
        raise UsageError(
            f"keep_snapshots must be at least 1, not {given}: the current snapshot always stays",
            option="keep_snapshots",
        )
    return None if is_number(given) else "must be a whole number"


@dataclass(frozen=True, kw_only=True)
class DatasetOption(OptionGroup):
    """Which of a store's datasets."""

    purpose: ClassVar[str] = ROWS

    dataset: str | None = option(None, "default: the store's only dataset", metavar="NAME")


@dataclass(frozen=True, kw_only=True)
class SpaceOption(OptionGroup):
    """Which of a store's feature spaces."""

    purpose: ClassVar[str] = ROWS

    backbone: str | None = option(
        None, "a backbone, a space's name or fingerprint, where the store holds several", metavar="NAME"
    )


@dataclass(frozen=True, kw_only=True)
class SplitOption(OptionGroup):
    """Which of a dataset's splits."""

    purpose: ClassVar[str] = ROWS

    split: str | None = option(None, "only this split", metavar="NAME")


@dataclass(frozen=True, kw_only=True)
class LabelsOption(OptionGroup):
    """Labels of one's own: a file, and in Python a mapping, too."""

    purpose: ClassVar[str] = ROWS

    labels: Any = option(
        None, "labels to use instead of the dataset's: .csv, .parquet or .jsonl with id and label",
        metavar="FILE", recorded=file_or_kind,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrustOption(OptionGroup):
    """Consent to code that a store names; in Python also the names of the networks whose code may run."""

    trust_code: bool | Collection[str] = option(
        False, "let a store of a package.module:factory network run that module"
    )


@dataclass(frozen=True, kw_only=True)
class DryRunOption(OptionGroup):
    """Whether a store stays as it is."""

    dry_run: bool = option(False, "say what would be done; change nothing")


@dataclass(frozen=True, kw_only=True)
class GcOptions(DryRunOption):
    """What `featurepipe.store.gc_store` removes."""

    keep_snapshots: int | None = option(
        None, "keep the last N of each dataset (default: all)", check=_keeps_the_current
    )


@dataclass(frozen=True, kw_only=True)
class RemovalOptions(DryRunOption, DatasetOption):
    """What `featurepipe.store.forget_images` does."""

    dataset: str | None = option(None, "whose ids they are (default: those of all datasets)", metavar="NAME")
    may_come_back: bool = option(
        False,
        "let the next extraction compute these images if the source still has them; also lifts an earlier refusal",
    )


@dataclass(frozen=True, kw_only=True)
class SideOptions(OptionGroup):
    """What class and split an image is of: columns of the labels file, else of the manifest that was extracted."""

    purpose: ClassVar[str] = ROWS

    label: str | None = option(None, "column of the class (default: label)", metavar="COLUMN", check=is_column)
    split_column: str | None = option(
        None, f"column of the split (default: split of the manifest, or the folders; {NO_SPLIT}: no splits)",
        metavar="COLUMN", check=is_column,
    )  # fmt: skip

    def ungrouped(self) -> RowOptions:
        """The same columns, with every image for itself."""
        return RowOptions(**SideOptions.of(self).arguments(), group=NO_GROUP)


@dataclass(frozen=True, kw_only=True)
class RowOptions(SideOptions):
    """What class, split and group an image is of; columns as those of `SideOptions`."""

    purpose: ClassVar[str] = ROWS

    group: str | None = option(
        None, f"column of what stays on one side of every split, such as a patient (default: {GROUP}, if there is one; "
        f"{NO_GROUP}: every image for itself); or a file with id and group, as featurepipe duplicates --near auto "
        "--to FILE writes it",
        metavar="COLUMN|FILE", check=is_column, is_path=is_file_of_groups,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        other = getattr(self, "target", None) or getattr(self, "multilabel", None)  # of larger groups of options
        if self.group is not None and self.group == (self.label or LABEL) and not other:
            raise UsageError(
                Message(
                    Option("group", self.group), " is the column of the classes: each would be one group, and no class could "
                    "be both learned and tested; name another column, or leave it out",
                )
            )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RoleOptions(RowOptions):
    """What is learned of an image, and how much it counts; columns as those of `RowOptions`."""

    purpose: ClassVar[str] = ROWS

    target: str | None = option(
        None, "column of a number to estimate, instead of classes: regression, with prediction intervals",
        metavar="COLUMN", check=is_column,
    )  # fmt: skip
    multilabel: tuple[str, ...] | None = option(
        None, "several labels an image, instead of one class: a column of texts such as red|round, or of JSON lists; or a column "
        "of 0 and 1 for each, empty where it is not known",
        metavar="COLUMN,...", check=not_empty, read=columns_of,
    )  # fmt: skip
    weight: str | None = option(
        None, "column of how much each image counts while a head is fitted, from 0 (measures count all alike)",
        metavar="COLUMN", check=is_column,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = [name for name in ("label", "target", "multilabel") if getattr(self, name)]
        if len(kinds) > 1:
            first, other = (Option(name) for name in kinds[:2])
            raise UsageError(Message(first, " and ", other, " are two kinds of target; give one of them"))

    @property
    def target_type(self) -> str:
        """What is learned of an image, a key of `featurepipe.heads.families.FAMILIES`."""
        return "continuous" if self.target is not None else "multilabel" if self.multilabel else "multiclass"


EVERY_COLUMN = "all"
"""All columns of a snapshot, as metadata of an export."""
ROWS_PER_FILE = 250_000


@dataclass(frozen=True, kw_only=True)
class HandingOnOptions(RoleOptions, SplitOption):
    """In which form `featurepipe export` writes features, and what of their images; a job's ``[[export]]`` has these, too."""

    dtype: str | None = option(
        None, "of the values (default: as they are stored)", choices=("float32", "float16"), metavar="float32|float16"
    )
    metadata: tuple[str, ...] | None = option(
        None, f"write these columns as well: key (SHA-256 of the bytes), size, mtime_ns, those of the manifest; {EVERY_COLUMN}: "
        "all of them",
        metavar="COLUMN,...", check=not_empty, read=columns_of,
    )  # fmt: skip
    rows_per_file: int = option(
        ROWS_PER_FILE, f"of a folder: rows in each of its files (default: {ROWS_PER_FILE:,})", check=at_least(1)
    )


@dataclass(frozen=True, kw_only=True)
class ExportOptions(HandingOnOptions, LabelsOption, SpaceOption, DatasetOption):
    """Which features `featurepipe export` writes, in which form, and what of their images."""

    snapshot: str | None = option(
        None, "the snapshot whose images are written, or the run of a job (default: the current one)", metavar="RUN-ID"
    )
    since: str | None = option(
        None, "only images that are new or changed (bytes, label, split, --metadata) since this snapshot or run of a job; those "
        "that are gone are listed in FILE.deleted.parquet, or _deleted.parquet of the folder",
        metavar="previous|first|RUN-ID",
    )  # fmt: skip
    new: bool = option(False, "the same as --since previous")
    backbone: str | None = option(
        None, "a backbone, a space's name or fingerprint; default: the only one with that column", metavar="NAME"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.new and self.since is not None:
            raise UsageError(
                Message(Option("new"), " and ", Option("since", self.since), " are two beginnings; give one")
            )
        if (self.new or self.since is not None) and self.split is not None and self.split_column is not None:
            raise UsageError(
                Message(
                    Option("split_column", self.split_column), ": what left a split since an earlier snapshot is known of its "
                    "own splits alone; export all splits, or all images of this one",
                )
            )  # fmt: skip
