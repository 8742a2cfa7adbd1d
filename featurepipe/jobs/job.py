"""The job file as values: one class a table, each field with what it means, and the kinds of values that fields hold."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationInfo,
    field_validator,
)

from featurepipe.curation.options import (
    ChoiceOptions,
    DistanceOption,
    FarOptions,
    LookInOption,
    LookOptions,
    SuspectsOptions,
)
from featurepipe.errors import UsageError, unknown
from featurepipe.execution.launchers import ClusterTable
from featurepipe.extraction.limits import GONE_IN_JOBS, Limits, seconds_at_most
from featurepipe.features.options import DamageOptions, MachineOptions, NetworkOptions, SettingOptions, SourceOptions
from featurepipe.layer_depth.options import ComparisonOptions
from featurepipe.monitoring.options import ColumnsOption, NodeOption, ShiftOptions
from featurepipe.option_groups import declared
from featurepipe.prediction.options import RawIdsOption, TopOption
from featurepipe.reporting.options import LastOption
from featurepipe.store.documents import is_run_id
from featurepipe.store.options import HandingOnOptions, RoleOptions, SideOptions, SplitOption
from featurepipe.training.options import FitOptions
from featurepipe.transfer_routes.options import RoutesOptions
from featurepipe.tuning.options import LoopOptions

PLACEHOLDERS = ("date", "run", "job")
"""What the name of a file of predictions may hold in braces."""

REFERENCES = ("previous", "first")
"""Snapshots that drift can be measured from, beside those that a run id names."""
LONGEST_NAME = 100


def is_name(text: str) -> bool:
    """Whether a text may name files, wherever they lie."""
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", text) is not None and len(text) <= LONGEST_NAME


def _name(name: str) -> str:
    if not is_name(name):
        raise UsageError(
            "cannot be a name; use letters, digits, '.', '_' and '-', at most 100, starting with a letter, digit or '_'"
        )
    return name


def _reference(text: str) -> str:
    if text in REFERENCES or is_run_id(text):
        return text
    near = str(unknown("reference", text, REFERENCES))
    raise UsageError(f"{near}; or the run id of a snapshot, such as 20260131T020000000000Z-0123abcd")


def listed(value: Any) -> Any:
    """TOML's arrays as tuples, since a job never changes; one text stands for a list of one."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _place(text: Any, info: ValidationInfo) -> Any:
    return Path(_joined(text, info)) if isinstance(text, str) else text


def _joined(text: str, info: ValidationInfo) -> str:
    """A relative path seen from the job file's folder; URLs stay as they are."""
    if not text.strip():
        raise UsageError("must not be empty")
    folder = (info.context or {}).get("folder")
    if folder is None or "://" in text:
        return text
    return os.path.normpath(Path(folder) / _at_home(text))


def _at_home(text: str) -> Path:
    """A path in which ``~`` or ``~user`` at the beginning stands for a home folder."""
    if "\0" in text:
        raise UsageError("cannot be a path: it has a NUL character")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        user = text.split("/", 1)[0]
        raise UsageError(
            f"this machine has no home folder for {user!r}; write ./{user} for a folder of that name"
        ) from error


def _template(text: str, info: ValidationInfo) -> str:
    try:
        braces = [part[1:] for part in Formatter().parse(text) if part[1] is not None]
    except ValueError as error:
        raise UsageError(f"a brace without its partner ({error}); write {{{{ and }}}} for braces themselves") from error
    for name, form, conversion in braces:
        if name not in PLACEHOLDERS:
            raise unknown("placeholder", name or "", PLACEHOLDERS)
        if form or conversion:
            raise UsageError(f"a placeholder takes no format; write {{{name}}}")
    folder = (info.context or {}).get("folder")
    if folder is None:
        return text
    literal = str(folder).replace("{", "{{").replace("}", "}}")
    return os.path.normpath(Path(literal) / _at_home(text))


Seconds = Annotated[float, BeforeValidator(seconds_at_most)]
"""A duration, written ``"90s"``, ``"1h30m"``; in seconds."""
Reference = Annotated[str, AfterValidator(_reference)]
"""``previous``, ``first``, or a run id."""
Name = Annotated[str, AfterValidator(_name)]
"""What may name files."""
Names = Annotated[tuple[str, ...], BeforeValidator(listed)]
"""One or more texts."""
JobPath = Annotated[Path, BeforeValidator(_place)]
"""A path, relative to the job file's folder."""
PathOrUrl = Annotated[str, AfterValidator(_joined)]
"""A path or glob, relative to the job file's folder, or a URL."""
Template = Annotated[str, AfterValidator(_template)]
"""A path with ``{date}``, ``{run}`` or ``{job}`` in it, relative to the job file's folder."""


class BaseTable(BaseModel, frozen=True):
    """What all tables have in common: they never change, know all their keys, and take no text for a number.

    A table that inherits from a group of options (`featurepipe.option_groups`) has those as keys.
    """

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Describes the keys that are options."""
        for name, one in declared(cls).items():
            cls.model_fields[name].description = f"{one.help[0].upper()}{one.help[1:]}."

    @field_validator("*", mode="before")
    @classmethod
    def _as_declared(cls, given: Any, info: ValidationInfo) -> Any:
        """Reads and checks a key that is an option."""
        one = declared(cls).get(info.field_name or "")
        if one is None:
            return given
        reads = isinstance(given, str) and one.read is not None and not one.repeated  # as the command line does
        value = listed(given) if tuple in one.types and not reads else one.read_from(given)
        if tuple in one.types and not isinstance(value, tuple):
            return value  # pydantic says that it must be an array
        if one.choices and value is not None and value not in one.choices:
            if isinstance(value, str):
                raise unknown("value", value, one.choices)
            raise UsageError(f"choices: {', '.join(one.choices)}")
        if said := one.wrong(value):
            raise UsageError(said)
        return _in_folder(value, one.is_path, info) if one.is_path else value


def _in_folder(value: Any, is_path: Callable[[str], bool], info: ValidationInfo) -> Any:
    """Paths of an option, seen from the job file's folder."""
    if isinstance(value, tuple):
        return tuple(_in_folder(one, is_path, info) for one in value)
    return _joined(value, info) if isinstance(value, str) and is_path(value) else value


class SourceTable(BaseTable, SourceOptions, frozen=True):
    """``[source]``: where the images are."""

    path: PathOrUrl
    """Anything that `featurepipe extract` reads: a folder, a manifest, archives, image arrays, or a URL."""
    labels: JobPath | None = None
    """A CSV with the columns id and label, to use instead of the source's own labels."""
    moved_from: Names = ()
    """Where the dataset's images were before, as the run that refuses to take them from here says; one place or several."""
    retries: int = Field(default=5, ge=0)
    """How often a source that cannot be opened or listed is tried again."""
    first_wait: Seconds = 10.0
    """How long to wait before the first retry; each wait is twice as long as the one before."""
    longest_wait: Seconds = 600.0
    """The longest wait between two tries."""


class FeaturesTable(BaseTable, SettingOptions, NetworkOptions, frozen=True):
    """``[[features]]``: one frozen network, and what is kept of it."""

    backbone: str = "resnet50"
    """The network; it does not depend on what is at hand, so that all nights use the same."""
    seed: int = Field(default=0, ge=0)
    """Of a random control network."""


class MachineTable(BaseTable, MachineOptions, frozen=True):
    """``[machine]``: with how much the network runs."""


class LimitsTable(BaseTable, DamageOptions, Limits, frozen=True):
    """``[limits]``: what a night may cost, and what makes it fail."""

    max_gone: int | float | str = GONE_IN_JOBS
    """Images of the last snapshot that may be missing from this run's listing, a number or a share."""


class ForgetTable(BaseTable, LookInOption, frozen=True):
    """``[forget]``: images that leave the store before anything is extracted; see `featurepipe forget`."""

    ids: JobPath
    """The images: `.txt` with an id a line, or `.csv`, `.parquet`, `.jsonl` with a column `id`; may be emptied after a night."""
    at_most: int = Field(ge=1)
    """The most images that may leave the store in a night; where the file names more of those that it holds, none leaves."""


class TrainTable(BaseTable, FitOptions, frozen=True):
    """``[[train]]``: a head to train; see `featurepipe train`."""

    out: JobPath
    """Folder of the bundle; the last one is replaced once the new one is complete."""
    when: Literal["labels changed", "always"] = "labels changed"
    """Every night, or only when what it learns from is not what the bundle was trained on."""
    backbone: str | None = None
    """The network, where several `[[features]]` have the column."""
    labels: JobPath | None = None
    """A CSV with the columns id and label; by default that of `[source]`."""


class FinetuneTable(BaseTable, LoopOptions, frozen=True):
    """``[[finetune]]``: layers to tune from stored activations, or all from images; see `featurepipe finetune`."""

    out: JobPath
    """Folder of the bundle; the last one is replaced once the new one is complete."""
    when: Literal["labels changed", "always"] = "labels changed"
    """Every night, or only when what it learns from is not what the bundle was tuned on."""
    backbone: str | None = None
    """The network, where several `[[features]]` have the activations."""
    labels: JobPath | None = None
    """A CSV with the columns id and label; by default that of `[source]`."""


class AnswerTable(BaseTable, frozen=True):
    """What tables that write a file each night have in common."""

    to: Template
    """The file or folder; `{date}`, `{run}` and `{job}` are replaced."""

    def file(self, *, date: str, run: str, job: str) -> Path:
        """The file of one night."""
        return Path(self.to.format(date=date, run=run, job=job))


class PredictTable(AnswerTable, RawIdsOption, TopOption, frozen=True):
    """``[[predict]]``: a bundle whose predictions are written down."""

    bundle: JobPath
    """A bundle's folder; one of a `[[train]]`, or one that is there."""
    to: Template
    """The file, `.parquet`, `.csv` or `.jsonl`; `{date}`, `{run}` and `{job}` are replaced."""
    images: Literal["new", "all"] = "new"
    """This run's new images, or all."""


class ExportTable(AnswerTable, HandingOnOptions, frozen=True):
    """``[[export]]``: features handed on to other programs; see `featurepipe export`."""

    node: str
    """The column, `NODE` or `NODE:POOLING`."""
    to: Template
    """A file, `.parquet`, `.h5` or `.npz`, or without a suffix a folder; `{date}`, `{run}` and `{job}` are replaced."""
    images: Literal["new", "all"] = "all"
    """All images, or those that are new or changed since this table last handed on, and the ids of those that went."""
    backbone: str | None = None
    """The network, where several `[[features]]` have the column."""
    labels: JobPath | None = None
    """A CSV with the columns id and label; by default that of `[source]`."""


class QuestionTable(AnswerTable, RawIdsOption, NodeOption, frozen=True):
    """What tables of questions asked of features have in common."""

    to: Template
    """The page, `.html`, or table, `.csv`, `.parquet`, `.jsonl`; `{date}`, `{run}` and `{job}` are replaced."""
    backbone: str | None = None
    """The network, where several `[[features]]` have the column."""
    labels: JobPath | None = None
    """A CSV with the columns id and label; by default that of `[source]`."""


class SimilarTable(QuestionTable, LookOptions, DistanceOption, frozen=True):
    """``[[similar]]``: what this run's new images look like; see `featurepipe similar`."""


class LabelsTable(QuestionTable, RoleOptions, SplitOption, SuspectsOptions, frozen=True):
    """``[[labels]]``: labels that look wrong; see `featurepipe labels`."""


class OutliersTable(QuestionTable, SideOptions, SplitOption, DistanceOption, FarOptions, frozen=True):
    """``[[outliers]]``: images that lie apart; see `featurepipe outliers`. ``since = "previous"`` is the previous run."""


class SelectTable(QuestionTable, SideOptions, SplitOption, ChoiceOptions, frozen=True):
    """``[[select]]``: which images to label next; see `featurepipe select`."""

    budget: int = Field(ge=1)
    """How many images to choose; all that are without a label, if those are fewer."""


class DriftTable(BaseTable, ShiftOptions, ColumnsOption, frozen=True):
    """``[drift]``: whether this run's images are like those of before."""

    reference: Reference = "previous"
    """`previous`, the last snapshot that passed the test; `first`; or the run id of a snapshot or of a run of a job."""
    bundle: JobPath | None = None
    """A bundle whose predictions (classes, labels or a number) are compared, too."""


class DepthTable(BaseTable, ComparisonOptions, frozen=True):
    """``[depth]``: which layer transfers best; see `featurepipe depth`."""

    when: Literal["images changed", "always"] = "images changed"
    """Every night, or only when the images or their labels are not those that were compared last."""
    backbone: str | None = None
    """The network, where there are several `[[features]]`."""
    labels: JobPath | None = None
    """A CSV with the columns id and label; by default that of `[source]`."""
    report: JobPath | None = None
    """An HTML file to write."""


class RoutesTable(BaseTable, RoutesOptions, frozen=True):
    """``[routes]``: use the network as it is, freeze it or tune it, from what the store has; see `featurepipe routes`."""

    when: Literal["images changed", "always"] = "images changed"
    """Every night, or only when the images or their labels are not those that were compared last."""
    backbone: str | None = None
    """The network, where there are several `[[features]]`."""
    labels: JobPath | None = None
    """A CSV with the columns id and label; by default that of `[source]`."""
    mapping: JobPath | None = None
    """Which label each of the network's own classes means, a CSV with the columns class and label; by default by name."""
    report: JobPath | None = None
    """An HTML file to write."""


class CompactTable(BaseTable, frozen=True):
    """``[compact]``: merge small parts; it has no keys."""


class KeepTable(BaseTable, frozen=True):
    """``[keep]``: how much of the past stays."""

    snapshots: int | None = Field(default=30, ge=1)
    """Snapshots of the dataset that stay, one a night; those that were taken by hand count, too."""
    runs: int | None = Field(default=365, ge=1)
    """Nights of the job whose run records stay; records of other jobs, and of what was done by hand, always do."""


class ReportTable(BaseTable, LastOption, frozen=True):
    """``[report]``: the page of the last runs."""

    to: JobPath
    """The HTML file."""


class MetricsTable(BaseTable, frozen=True):
    """``[metrics]``: figures for those who watch many jobs."""

    prometheus: JobPath
    """The text file for Prometheus' node exporter, `.prom`."""


class Job(BaseTable, frozen=True):
    """A job file."""

    name: Name
    """The job's name; by default the file's, without its suffix."""
    store: JobPath
    """The feature store."""
    dataset: Name | None = None
    """Name of the snapshots; by default the source's own."""
    source: SourceTable
    """Where the images are."""
    features: Annotated[tuple[FeaturesTable, ...], BeforeValidator(listed), Field(min_length=1)]
    """Networks, and what is kept of each."""
    machine: MachineTable = MachineTable()
    """With how much the networks run."""
    cluster: ClusterTable | None = None
    """Where all this is done, if not on this machine alone."""
    limits: LimitsTable = LimitsTable()
    """What a night may cost, and what makes it fail."""
    forget: ForgetTable | None = None
    """Images that leave the store before anything is extracted."""
    train: Annotated[tuple[TrainTable, ...], BeforeValidator(listed)] = ()
    """Heads to train."""
    finetune: Annotated[tuple[FinetuneTable, ...], BeforeValidator(listed)] = ()
    """Networks whose layers above a node are tuned."""
    predict: Annotated[tuple[PredictTable, ...], BeforeValidator(listed)] = ()
    """Bundles whose predictions are written down."""
    export: Annotated[tuple[ExportTable, ...], BeforeValidator(listed)] = ()
    """Features handed on to other programs."""
    similar: Annotated[tuple[SimilarTable, ...], BeforeValidator(listed)] = ()
    """What new images look like."""
    labels: Annotated[tuple[LabelsTable, ...], BeforeValidator(listed)] = ()
    """Labels that look wrong."""
    outliers: Annotated[tuple[OutliersTable, ...], BeforeValidator(listed)] = ()
    """Images that lie apart."""
    select: Annotated[tuple[SelectTable, ...], BeforeValidator(listed)] = ()
    """Which images to label next."""
    drift: DriftTable | None = None
    """Whether this run's images are like those of before."""
    depth: DepthTable | None = None
    """Which layer transfers best."""
    routes: RoutesTable | None = None
    """Use the network as it is, freeze it or tune it."""
    compact: CompactTable | None = None
    """Merge small parts."""
    keep: KeepTable | None = None
    """How much of the past stays."""
    report: ReportTable | None = None
    """The page of the last runs."""
    metrics: MetricsTable | None = None
    """Figures for those who watch many jobs."""
    _file: Path | None = PrivateAttr(default=None)

    @property
    def file(self) -> Path | None:
        """Where the job was read from, for messages; None for one that was made without a file."""
        return self._file

    def named(self, path: Path) -> str:
        """A path as people find it: as the job file would give it, if it is in that file's folder, else the whole."""
        folder = "" if self._file is None else os.path.normpath(self._file.absolute().parent)
        return str(path.relative_to(folder) if folder and path.is_relative_to(folder) else path)

    @property
    def bundles(self) -> dict[str, Path]:
        """The folders of the bundles that the job makes, by the keys that name them."""
        trained = {f"train[{place}].out": table.out for place, table in enumerate(self.train)}
        return {**trained, **{f"finetune[{place}].out": table.out for place, table in enumerate(self.finetune)}}

    @property
    def questions(self) -> dict[str, QuestionTable]:
        """The questions asked of features, in their order, by the keys that name them."""
        kinds = {"similar": self.similar, "labels": self.labels, "outliers": self.outliers, "select": self.select}
        return {f"{kind}[{place}]": table for kind, tables in kinds.items() for place, table in enumerate(tables)}

    @property
    def answers(self) -> dict[str, AnswerTable]:
        """The tables whose file has placeholders in its name, by the keys that name them."""
        handed = {"predict": self.predict, "export": self.export}
        found = {f"{kind}[{place}]": table for kind, tables in handed.items() for place, table in enumerate(tables)}
        return {**found, **self.questions}

    @property
    def targets(self) -> list[tuple[str, Path]]:
        """What the job writes besides the store, placeholders as they are, by the keys that name it."""
        pages = {
            "depth.report": self.depth.report if self.depth else None,
            "routes.report": self.routes.report if self.routes else None,
            "report.to": self.report.to if self.report else None,
            "metrics.prometheus": self.metrics.prometheus if self.metrics else None,
        }
        return [
            *self.bundles.items(),
            *((f"{key}.to", Path(table.to)) for key, table in self.answers.items()),
            *((key, path) for key, path in pages.items() if path is not None),
        ]

    @property
    def networks(self) -> frozenset[str]:
        """The networks that the job file names: the code of those that are ``package.module:factory`` may run."""
        return frozenset(table.backbone for table in self.features)

    def read_from(self, file: Path) -> Job:
        """The same job, which knows its file."""
        job = self.model_copy()
        job._file = file  # type: ignore[misc]  # noqa: SLF001 - a copy of our own, and not a field
        return job
