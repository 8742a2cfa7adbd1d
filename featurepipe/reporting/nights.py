"""What the last runs did: the run records of a job, or of a dataset that has none, as one document, and its page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featurepipe.display import dealt_with, named_columns, share
from featurepipe.errors import UsageError, unknown
from featurepipe.monitoring.standing_warnings import prediction_tests, standing, told
from featurepipe.records import host, is_success, now, versions
from featurepipe.reporting.night_outcomes import next_steps, to_come, unknown_end
from featurepipe.reporting.options import NIGHTS, NightsOptions
from featurepipe.reporting.report import check_target, write_report
from featurepipe.store import FeatureStore

Record = Mapping[str, Any]

_STAGES = ("scan", "read", "decode", "waiting", "forward", "write")
_COPIED = (
    "run_id",
    "dataset",
    "status",
    "exit_code",
    "started",
    "ended",
    "images_per_second",
    "verdict",
    "host",
    "git",
)


def nights_report(
    store: FeatureStore | str | os.PathLike[str],
    to: str | os.PathLike[str],
    *,
    last: int = NIGHTS,
    job: str | None = None,
    current: Record | None = None,
    silent: bool = False,
) -> Path:
    """Writes the page of the last runs; see `nights_document`.

    Args:
        store: the feature store or its path.
        to: the HTML file; one that is there is replaced once the new one is complete.
        last: how many nights it shows.
        job: the job's name, or a dataset's that no job works on.
        current: the record of the run that writes the page, which the store still has as running.
        silent: say nothing on standard error.

    Returns:
        The file.

    Raises:
        UsageError: nothing has run yet, the job is unknown, or the folder of ``to`` does not exist.
        DiskFull: no space is left; a file that was there is as before.
    """
    check_target(to)
    kept = store if isinstance(store, FeatureStore) else FeatureStore(store, create=False)
    return write_report(nights_document(kept, last=last, job=job, current=current), to, silent=silent)


def nights_document(
    store: FeatureStore, *, last: int = NIGHTS, job: str | None = None, current: Record | None = None
) -> dict[str, Any]:
    """Gathers what the last runs of a job did from their records; no feature is read.

    Where a dataset has no job, its extractions are its nights.

    Args:
        store: the feature store.
        last: how many nights, at least 1.
        job: the job's name, or a dataset's that no job works on; by default the one that ran last.
        current: a record to take instead of the store's of the same run.

    Returns:
        JSON values: ``kind`` "nights", ``version``, ``name`` and ``is_job``, ``others`` (what else ran in the store),
        ``nights`` (oldest first: when and how each ended and why, counts, changes, seconds of steps and stages, rejects,
        drift, predicted classes and images), ``last_success``, ``drift_warnings`` (those that stand, see
        `featurepipe.monitoring.standing_warnings`), ``next_steps``, ``provenance``.

    Raises:
        UsageError: nothing has run yet, the job is unknown, or ``last`` is not positive.
    """
    options = NightsOptions(last=last, job=job)
    records = store.runs() if current is None else _with(current, store.runs())
    series = _series(records)
    name = _chosen(series, options.job, store)
    extractions = {record["run_id"]: record for record in records if record.get("command") == "extract"}
    bottlenecks = {space.name: space.bottleneck for space in store.spaces()}
    nights = [_night(record, extractions, bottlenecks) for record in series[name][-options.last :]]
    successes = [record for record in series[name] if is_success(record)]
    newest, made = series[name][-1], now()
    warnings = standing(records, job=name) if "job" in newest else []
    return {
        "kind": "nights",
        "version": 1,
        "name": name,
        "is_job": "job" in newest,
        "others": [other for other in series if other != name],
        "nights": nights,
        "last_success": successes[-1].get("ended") if successes else None,
        "drift_warnings": warnings,
        "next_steps": [*next_steps(nights, newest, made), *(_sentence(told(one, store.path)) for one in warnings)],
        "provenance": {
            "when": made,
            "software": versions(),
            "machine": host(),
            "store": str(store.path),
            "job_file": newest.get("job_file"),
            "plan": newest.get("plan"),
            "versions": newest.get("versions"),
        },
    }


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _with(current: Record, records: Sequence[Record]) -> list[Record]:
    return [*(record for record in records if record["run_id"] != current["run_id"]), current]


def _series(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Runs by job, then extractions that belong to none by dataset; each oldest first."""
    runs = [record for record in records if record.get("command") == "run" and record.get("job")]
    parts = {run_id for run in runs for run_id in run.get("extractions") or ()}
    taken = {run.get("dataset") for run in runs}
    found: dict[str, list[Record]] = {}
    for run in runs:
        found.setdefault(str(run["job"]), []).append(run)
    for record in records:
        is_own = record.get("command") == "extract" and record["run_id"] not in parts
        if is_own and record.get("dataset") and record["dataset"] not in taken:
            found.setdefault(str(record["dataset"]), []).append(record)
    return found


def _chosen(series: Mapping[str, Sequence[Record]], job: str | None, store: FeatureStore) -> str:
    if not series:
        raise UsageError(f"nothing has run in {store.path} yet; run: featurepipe run JOB.toml")
    if job is not None and job not in series:
        raise unknown("job", job, series, where=str(store.path), see=f"featurepipe runs {store.path}")
    return job or max(series, key=lambda name: series[name][-1]["run_id"])


def _night(record: Record, extractions: Mapping[str, Record], bottlenecks: Mapping[str, str | None]) -> dict[str, Any]:
    """What the page says of a run; ``bottlenecks`` are the nodes of those of spaces, by the space's name."""
    own = [extractions[run_id] for run_id in record.get("extractions") or () if run_id in extractions]
    first = next((run for run in own if run.get("status") == "done"), own[-1] if own else record)
    steps = [_step(step) for step in record.get("steps") or ()]
    seconds = record.get("seconds") or {}
    return {
        **{name: record.get(name) for name in _COPIED},
        "reasons": _reasons(record, steps),
        "warnings": list(record.get("warnings") or ()),
        "counts": record.get("counts") or {},
        "changes": record.get("changes") or {},
        "steps": steps,
        "to_come": to_come(record, steps),
        "seconds": {"wall": seconds.get("wall"), "steps": _by_step(steps), "stages": _stages(seconds)},
        "store_bytes": record.get("store_bytes"),
        "gone": first.get("gone"),
        "lost_labels": first.get("lost_labels") or {},
        "reject_reasons": first.get("reject_reasons") or {},
        "rejects": first.get("rejects") or [],
        "drift": _drift(record, bottlenecks),
        "classes": _classes(record),
        "predicted": _predicted(record),
        "versions": record.get("versions") or {},
    }


def _step(entry: Record) -> dict[str, Any]:
    result = entry.get("result") or {}
    told = (entry.get("error"), result.get("skipped"), result.get("text"), result.get("why"), _counted(result))
    return {
        "step": f"{entry['step']} {entry.get('name') or ''}".strip(),
        "kind": entry["step"],
        "status": entry.get("status"),
        "seconds": entry.get("seconds"),
        "error_type": entry.get("error_type"),
        "warnings": list(result.get("warnings") or ()),
        "told": next((str(text) for text in told if text), ""),
    }


def _counted(result: Record) -> str:
    """What the steps list and extract did, which leave no text."""
    counts = result.get("counts") or {}
    if "computed" in counts:
        return dealt_with(counts, result.get("copies") or 0)
    return f"{result['listed']:,} images" if "listed" in result else ""


def _reasons(record: Record, steps: Sequence[Record]) -> list[str]:
    """Why a run did not end well, in the words of what failed."""
    failed = [f"{step['step']}: {step['told']}" for step in steps if step["status"] in ("failed", "interrupted")]
    error = [str(record["error"])] if record.get("error") else []
    return failed or error or unknown_end(record.get("status"))


def _by_step(steps: Sequence[Record]) -> dict[str, float]:
    """Seconds of each kind of step that was begun."""
    found: dict[str, float] = {}
    for step in steps:
        if step["status"] != "not reached" and step["seconds"] is not None:
            found[step["kind"]] = round(found.get(step["kind"], 0.0) + step["seconds"], 3)
    return found


def _stages(seconds: Record) -> dict[str, float]:
    return {stage: seconds[stage] for stage in _STAGES if seconds.get(stage) is not None}


def _drift(record: Record, bottlenecks: Mapping[str, str | None]) -> dict[str, Any] | None:
    """The tests of the step drift: adjusted p-value and effect of each column, and of a bundle's predictions."""
    results = [step.get("result") or {} for step in record.get("steps") or () if step["step"] == "drift"]
    found = next((result for result in results if result.get("verdict")), None)
    if found is None:
        return None
    tests = found.get("columns") or []
    several = len({test.get("space") for test in tests}) > 1
    columns = [  # of records that do not name it as well: a column has one name in all nights
        named_columns(test["column"], bottlenecks.get(test.get("space"), test.get("bottleneck"))) for test in tests
    ]
    named = [
        (f"{test.get('space')}/{column}" if several else column, test)
        for column, test in zip(columns, tests, strict=True)
    ]
    limit = (found.get("thresholds") or {}).get("warn") or 0.0
    shift = [
        {"name": name, "p": test["adjusted"], "effect": effect, "moved": _moved(test, limit)}
        for name, test, effect in prediction_tests(found)
    ]
    return {
        "verdict": found["verdict"],
        "reference": found.get("reference"),
        "images": found.get("images"),
        "thresholds": found.get("thresholds"),
        "tests": [
            *({"name": name, "p": test["adjusted"], "effect": test["effect"], "auc": test.get("auc"),
               "farthest": list(test.get("farthest") or ())[:5]} for name, test in named),
            *shift,
        ],
    }  # fmt: skip


def _moved(test: Record, limit: float) -> list[str]:
    """The labels whose rates moved most, of those whose adjusted p-values are below the limit."""
    moved = [one for one in test.get("labels") or () if one["adjusted"] < limit]
    return [f"{one['label']} {share(one['reference']['value'])} to {share(one['new']['value'])}" for one in moved[:5]]


def _classes(record: Record) -> dict[str, dict[str, int]]:
    """Images by the class or label that was predicted, for each bundle that predicted; an image may have several labels."""
    found = {}
    for step in record.get("steps") or ():
        labels = (step.get("result") or {}).get("labels") if step["step"] == "predict" else None
        if labels:
            found[str(step.get("name") or "bundle")] = dict(labels)
    return found


def _predicted(record: Record) -> dict[str, int]:
    """How many images each bundle of several labels predicted; of classes the counts sum to it."""
    found = {}
    for step in record.get("steps") or ():
        result = (step.get("result") or {}) if step["step"] == "predict" else {}
        if (result.get("target") or {}).get("type") == "multilabel":
            found[str(step.get("name") or "bundle")] = int((result.get("counts") or {}).get("predicted", 0))
    return found
