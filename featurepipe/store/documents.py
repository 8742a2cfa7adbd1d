"""Documents of a store: their schemas, run ids and dataset names, the record of each run, and what comparisons of layers found.

A document that is something else is set aside: whoever lists documents goes on without it, and ``verify`` and ``info`` name it.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    with_config,
)
from typing_extensions import TypedDict  # which pydantic asks for before Python 3.12

from featurepipe.errors import StoreError, UsageError
from featurepipe.store.atomic import checked_folder, is_file, is_folder, listed, made_folder, read_json, write_json

_MOST = 2**63 - 1

Number = Annotated[int, Field(ge=-_MOST, le=_MOST)]
Counts = dict[str, Number]
Text = str | None


def _time(text: str) -> str:
    if text:
        datetime.fromisoformat(text)
    return text


Time = Annotated[str, AfterValidator(_time)]


class _Document(BaseModel):
    """Common to all: no text is taken for a number, and entries that are not known are no error."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, defer_build=True)


class StoreDocument(_Document):
    """``store.json``."""

    version: Annotated[int, Field(ge=1)]


class _BackboneNotes(_Document):
    weights: Text = None
    random: bool | None = None
    seed: Number | None = None


class _Notes(_Document):
    aliases: dict[str, str] = {}
    map_shapes: dict[str, list[Annotated[int, Field(ge=1, le=1 << 31)]]] = {}
    backbone: _BackboneNotes = _BackboneNotes()


class SpaceDocument(_Document):
    """``space.json``."""

    fields: dict[str, Any]
    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    backbone: str
    notes: _Notes = _Notes()


class _Reject(_Document):
    id: str
    reason: str


class _Result(_Document):
    """What any step may tell."""

    text: Text = None
    skipped: Text = None
    why: str | list[str] | None = None
    warnings: list[str] = []
    listed: Number = 0
    snapshot: Text = None


class _CountedResult(_Result):
    counts: Counts = {}
    copies: Number = 0
    labels: Counts = {}


class _PredictResult(_CountedResult):
    target: dict[str, Any] | None = None


class _DriftTest(_Document):
    column: str
    adjusted: float
    effect: float | None
    space: Text = None
    auc: float | None = None
    farthest: list[str] | None = None


class _ClassesTest(_Document):
    adjusted: float
    total_variation: float


class _Estimate(_Document):
    value: float


class _PredictionsTest(_Document):
    adjusted: float
    effect: float


class _LabelTest(_Document):
    label: str
    adjusted: float
    reference: _Estimate
    new: _Estimate


class _LabelsTest(_PredictionsTest):
    labels: list[_LabelTest] = []


class _DriftResult(_Result):
    verdict: Text = None
    reference: Text = None
    images: Counts | None = None
    thresholds: dict[str, float | None] | None = None
    columns: list[_DriftTest] | None = None
    classes: _ClassesTest | None = None
    labels: _LabelsTest | None = None
    numbers: _PredictionsTest | None = None


_RESULTS: dict[str, type[_Result]] = {"drift": _DriftResult, "extract": _CountedResult, "predict": _PredictResult}


class _Step(_Document):
    step: str
    status: str
    name: Text = None
    seconds: float | None = None
    error: Text = None
    error_type: Text = None
    result: _Result | None = None

    @field_validator("result", mode="wrap")
    @classmethod
    def _of_its_step(cls, value: object, _handler: object, info: ValidationInfo) -> _Result | None:
        """The same entries mean something else in another step."""
        kind = _RESULTS.get(info.data.get("step", ""), _Result)
        return None if value is None else kind.model_validate(value)


class _Features(_Document):
    backbone: str
    weights: str
    nodes: list[str]


class _Plan(_Document):
    steps: list[str] = []
    features: list[_Features] = []
    limits: dict[str, Any] = {}
    drift_reference: Text = None


class _Waiting(_Document):
    since: Time
    why: str


class _Worker(_Document):
    seconds: float | None = None


class _Cluster(_Document):
    workers: list[_Worker] = []


class RunDocument(_Document):
    """``runs/<run-id>.json``, of an extraction or of a job."""

    run_id: str
    command: Text = None
    job: Text = None
    dataset: Text = None
    status: Text = None
    exit_code: Number | None = None
    started: Time = ""
    ended: Time = ""
    error: Text = None
    source: Text = None
    space: Text = None
    fingerprint: Text = None
    verdict: Text = None
    backbone: dict[str, Any] = {}
    columns: list[str] = []
    counts: Counts = {}
    copies: Number = 0
    gone: Number = 0
    lost_labels: Counts = {}
    counts_by_space: dict[str, Counts] = {}
    changes: Counts | None = None
    computed_by_column: Counts = {}
    reject_reasons: Counts = {}
    rejects: list[_Reject] = []
    new_rejects: list[_Reject] = []
    seconds: dict[str, float] = {}
    images_per_second: float | None = None
    extractions: list[str] = []
    accepted: list[str] = []
    steps: list[_Step] = []
    warnings: list[str] = []
    plan: _Plan = _Plan()
    waiting: _Waiting | None = None
    cluster: _Cluster = _Cluster()
    machine: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    host: dict[str, Any] = {}
    store_bytes: Number | None = None
    free_bytes: Number | None = None


class _ForgottenImage(_Document):
    id: str
    keys: list[str]
    prefixes: list[str] = []
    when: Time


class ForgottenDocument(_Document):
    """``forgotten.json``: salted hashes of what must not be computed again."""

    salt: str
    images: list[_ForgottenImage]


class _Forgetting(_Document):
    ids: list[str]
    keys: list[Annotated[str, Field(pattern="^[0-9a-f]{64}$")]]
    kept: list[Annotated[str, Field(pattern="^[0-9a-f]{64}$")]]
    come_back: bool


class ForgettingDocument(_Forgetting):
    """``forgetting.json``: what a call that was killed has not finished."""

    datasets: Annotated[list[str], Field(min_length=1)]
    refused: list[Annotated[list[str], Field(min_length=3, max_length=3)]]
    shared: list[Annotated[list[str], Field(min_length=3, max_length=3)]] = []


class EarlyForgettingDocument(_Forgetting):
    """``forgetting.json`` as it was when a call was of one dataset."""

    dataset: str
    pairs: list[Annotated[list[str], Field(min_length=2, max_length=2)]]


class _DepthSpace(_Document):
    fingerprint: str


class _Recommended(_Document):
    column: str
    head: Text = None
    accuracy: float | None = None


class _Provenance(_Document):
    snapshot: Text = None
    when: Text = None


class DepthDocument(_Document):
    """``depth/<dataset>/<run-id>.json``, what a comparison of layers found."""

    dataset: str
    space: _DepthSpace | None = None
    recommended: _Recommended | None = None
    provenance: _Provenance | None = None
    classes: list[str] | None = None
    labels: Text = None
    test_dataset: Text = None


@with_config(ConfigDict(strict=True, defer_build=True))
class RejectLine(TypedDict):
    """A line of ``rejects.jsonl``; a TypedDict, since there may be millions."""

    key: Annotated[str, Field(pattern="^[0-9a-fA-F]{64}$")] | None
    id: str
    size: Number
    mtime_ns: Number
    reason: str
    run_id: str
    dataset: NotRequired[str]


def read_document(path: Path, kind: type[BaseModel]) -> dict[str, Any]:
    """Reads a JSON document of a store and checks the types of the entries that are used.

    Returns:
        The document as it is, with entries that are not known.

    Raises:
        StoreError: It cannot be read, or is not of that kind; says which entry is wrong.
    """
    record = read_json(path)
    try:
        kind.model_validate(record)
    except ValidationError as error:
        raise StoreError(
            f"{path} is not as it should be: {first_fault(error)}; run: featurepipe verify STORE"
        ) from error
    return record


def first_fault(error: ValidationError) -> str:
    """Says which entry is wrong, and how; of several, the first."""
    fault: Mapping[str, Any] = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(step)[:80] for step in fault["loc"])
    return f"{where}: {fault['msg']}" if where else str(fault["msg"])


REJECT_LINE: TypeAdapter[RejectLine] = TypeAdapter(RejectLine)


PUBLISHING = "publishing"
"""Status of a run whose record is complete and whose snapshot comes next; see `settled`."""

_TIME = "%Y%m%dT%H%M%S%fZ"
_RUN_ID = re.compile(
    r"(\d{4}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])T(?:[01]\d|2[0-3])[0-5]\d[0-5]\d\d{6}Z)-[0-9a-f]{8}", re.ASCII
)


def is_run_id(name: str) -> bool:
    """Whether a name is of the form that run ids have; what else lies about, such as a copy of a file, is of no run."""
    return _RUN_ID.fullmatch(name) is not None


def checked_run_id(run_id: str) -> str:
    """Returns ``run_id`` if it may name files.

    Raises:
        UsageError: It may not.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", run_id):
        raise UsageError(f"not a run id: {run_id!r}; take one from FeatureStore.new_run_id()")
    return run_id


def is_dataset(name: str) -> bool:
    """Whether a name may be a dataset's."""
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", name) is not None


def checked_dataset(name: str) -> str:
    """Returns ``name`` if it may be a dataset's.

    Raises:
        UsageError: It may not.
    """
    if not is_dataset(name):
        raise UsageError(
            f"not a dataset name: {name!r}; use letters, digits, '.', '_' and '-', at most 100, starting with "
            "a letter, digit or '_'"
        )
    return name


def next_run_id(existing: Iterable[str]) -> str:
    """Makes a run id: UTC time to the microsecond and a random suffix, greater than all existing ones.

    If the clock was set back, the time of the greatest existing id plus one microsecond is taken instead.

    Raises:
        StoreError: No run id sorts after one that is there: the year 9999 ends with it, or it is of no day at all.
    """
    now = datetime.now(UTC)
    ids = {match[0]: match[1] for match in map(_RUN_ID.match, existing) if match}
    latest = max(ids, default="")
    for time in sorted(set(ids.values()), reverse=True):  # as texts, which sort as they do: there may be thousands
        with contextlib.suppress(ValueError, OverflowError):  # some foreign name, of the 31st of February
            now = max(now, datetime.strptime(time, _TIME).replace(tzinfo=UTC) + timedelta(microseconds=1))
            break
    run_id = f"{now.strftime(_TIME)}-{secrets.token_hex(4)}"
    if run_id <= latest:
        raise StoreError(
            f"a file of the store is named after {latest}, and no run can come later; no run of this program has made it: "
            "move it out of the store"
        )
    return run_id


def write_run(folder: Path, record: dict[str, Any]) -> Path:
    """Writes the record of one run, named by its ``run_id``; atomic, and again if it is already there."""
    if "run_id" not in record:
        raise UsageError("a run record needs a run_id")
    path = folder / f"{checked_run_id(str(record['run_id']))}.json"
    write_json(path, record)
    return path


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """Reads all run records that are as they should be and of their file's run, oldest first; ``verify`` names the others."""
    records = []
    for path in listed(folder, "*.json"):
        with contextlib.suppress(StoreError):
            record = read_document(path, RunDocument)
            if record.get("run_id") == path.stem:
                records.append(record)
    return records


def settled(record: dict[str, Any], snapshots: Path) -> dict[str, Any]:
    """Says of a run that was killed while it published what it was: done if its snapshot is there, else interrupted."""
    if record.get("status") != PUBLISHING:
        return record
    dataset = str(record.get("dataset", ""))
    if is_folder(snapshots / dataset) and is_file(snapshots / dataset / f"{record['run_id']}.parquet"):
        return {**record, "status": "done"}
    return {**record, "status": "interrupted", "exit_code": None, "changes": None}


def depth_journal(folder: Path, dataset: str) -> Path:
    """Where a dataset's measurements are kept; the file may not be there."""
    return folder / checked_dataset(dataset) / "journal.jsonl"


def write_depth(folder: Path, document: Mapping[str, Any], run_id: str) -> Path:
    """Writes a document; it becomes the dataset's newest."""
    path = folder / checked_dataset(document["dataset"]) / f"{run_id}.json"
    made_folder(path.parent)
    write_json(path, {**document, "run_id": run_id})
    return path


def read_depths(folder: Path, dataset: str) -> list[dict[str, Any]]:
    """Reads a dataset's documents that are as they should be, oldest first; ``verify`` names the others.

    Raises:
        StoreError: The newest is not: an older one in its place would answer as if nothing had been compared since.
    """
    of_dataset = checked_folder(checked_folder(folder) / checked_dataset(dataset))
    paths, documents = listed(of_dataset, "*.json"), []
    for path in paths:
        try:
            documents.append(read_document(path, DepthDocument))
        except StoreError:
            if path == paths[-1]:
                raise
    return documents
