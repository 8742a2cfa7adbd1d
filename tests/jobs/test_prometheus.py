"""Figures for Prometheus, read back with its own parser."""

import stat
import time
from datetime import datetime

import pytest
from prometheus_client.parser import text_string_to_metric_families

from featurepipe.errors import UsageError
from featurepipe.jobs.prometheus import registry_of, write_metrics
from featurepipe.jobs.record import bytes_in
from featurepipe.store import FeatureStore


def record(number=7, *, exit_code=3, job="nightly", **more):
    return {
        "run_id": f"run{number}",
        "job": job,
        "status": "done" if exit_code in (0, 3) else "failed",
        "exit_code": exit_code,
        "ended": f"2026-11-{number:02d}T01:42:10+00:00",
        "seconds": {"wall": 730.25, "extract": 600.0},
        "counts": {"listed": 100, "computed": 24, "known": 84, "rejected": 4, "read": 32},
        "counts_by_space": {
            "a-1": {"listed": 100, "computed": 12, "known": 84, "rejected": 4, "read": 16},
            "b-2": {"listed": 100, "computed": 12, "known": 84, "rejected": 4, "read": 16},
        },
        "changes": {"new": 12, "unchanged": 84, "still_rejected": 4, "deleted": 2},
        "images_per_second": 55.5,
        "store_bytes": 123_456,
        "free_bytes": 7_000_000,
        "steps": [],
        **more,
    }


def figures(path):
    """{name: {labels without the job: value}}; every sample must be of the job."""
    found = {}
    for family in text_string_to_metric_families(path.read_text()):
        assert family.type == "gauge"
        assert family.documentation
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("job") == "nightly"
            found.setdefault(sample.name.removeprefix("featurepipe_"), {})[
                " ".join(labels[name] for name in sorted(labels))
            ] = sample.value
    return found


def at(number):
    return datetime.fromisoformat(f"2026-11-{number:02d}T01:42:10+00:00").timestamp()


@pytest.fixture
def store(tmp_path):
    store = FeatureStore(tmp_path / "store")
    store.write_run({"run_id": "run1"})  # an extraction that no job made
    return store


def test_every_figure_is_read_back(store, tmp_path):
    test = {"space": "tiny-1", "p_value": 0.001, "effect": 0.25}
    drift = {"columns": [{**test, "column": "layer3:gap", "adjusted": 0.002}, {**test, "column": 'a"\\b', "adjusted": 0.5}],
             "classes": {"adjusted": 0.75, "total_variation": 0.125}}  # fmt: skip
    current = record(steps=[{"step": "drift", "result": drift}, {"step": "compact", "result": {"columns": 3}}])
    store.write_run(current)
    before = time.time()
    path = write_metrics(tmp_path / "new" / "featurepipe.prom", current, store)
    assert figures(path) == {
        "last_success_timestamp_seconds": {"": at(7)},
        "last_run_timestamp_seconds": {"": at(7)},
        "last_run_exit_code": {"": 3.0},
        "last_run_status": {"done": 1.0, "out of time": 0.0, "interrupted": 0.0, "failed": 0.0},
        "run_duration_seconds": {"": 730.25},
        "images": {
            f"{outcome} {space}": count
            for space in ("a-1", "b-2")
            for outcome, count in [
                ("listed", 100.0),
                ("computed", 12.0),
                ("known", 84.0),
                ("rejected", 4.0),
                ("read", 16.0),
            ]
        },
        "changes": {"new": 12.0, "unchanged": 84.0, "still_rejected": 4.0, "deleted": 2.0},
        "images_per_second": {"": 55.5},
        "store_bytes": {"": 123_456.0},
        "store_free_bytes": {"": 7_000_000.0},
        "drift_warnings_standing": {"": 0.0},
        "drift_p_value": {"layer3:gap": 0.002, 'a"\\b': 0.5, "predicted classes": 0.75},
        "drift_effect": {"layer3:gap": 0.25, 'a"\\b': 0.25, "predicted classes": 0.125},
    }
    assert path.stat().st_mtime > before - 2
    assert path.stat().st_mode & stat.S_IROTH  # the exporter is another user


def test_after_a_failure_the_last_success_is_that_of_the_last_successful_run(store, tmp_path):
    for number, code, job in [(2, 0, "nightly"), (3, 3, "nightly"), (4, 4, "nightly"), (5, 0, "weekly")]:
        store.write_run(record(number, exit_code=code, job=job))
    failed = record(
        6,
        exit_code=1,
        counts={},
        counts_by_space={},
        changes={},
        images_per_second=None,
        store_bytes=None,
        free_bytes=None,
    )
    store.write_run(failed)
    found = figures(write_metrics(tmp_path / "x.prom", failed, store))
    assert found["last_success_timestamp_seconds"] == {"": at(3)}
    assert found["last_run_timestamp_seconds"] == {"": at(6)}
    assert found["last_run_exit_code"] == {"": 1.0}
    assert found["images_per_second"] == {"": 0.0}
    assert found["last_run_status"] == {"done": 0.0, "out of time": 0.0, "interrupted": 0.0, "failed": 1.0}
    assert not {"images", "changes", "drift_p_value", "store_bytes", "store_free_bytes"} & found.keys()


def test_a_week_without_a_complete_night_is_no_week_of_success(store, tmp_path):
    store.write_run(record(2, exit_code=3))
    for number in range(3, 9):
        store.write_run(record(number, exit_code=0, status="out of time"))
    found = figures(write_metrics(tmp_path / "x.prom", record(9, exit_code=0, status="out of time"), store))
    assert found["last_success_timestamp_seconds"] == {"": at(2)}
    assert (found["last_run_exit_code"], found["last_run_status"]["out of time"]) == ({"": 0.0}, 1.0)


def test_a_job_that_never_succeeded_says_zero_and_one_that_runs_says_now(store, tmp_path):
    running = record(7, exit_code=1, steps=[{"step": "drift", "error": "no such column"}])
    del running["ended"]
    found = figures(write_metrics(tmp_path / "x.prom", running, store))
    assert found["last_success_timestamp_seconds"] == {"": 0.0}
    assert abs(found["last_run_timestamp_seconds"][""] - time.time()) < 10


def test_columns_of_two_spaces_are_told_apart():
    tests = [
        {"space": space, "column": "bottleneck:gap", "adjusted": p, "effect": 0.0}
        for space, p in [("a-1", 0.1), ("b-2", 0.2)]
    ]
    current = record(steps=[{"step": "drift", "result": {"columns": tests, "classes": None}}])
    registry = registry_of(current, [])
    for space, p in (("a-1", 0.1), ("b-2", 0.2)):
        labels = {"job": "nightly", "column": f"{space}/bottleneck:gap"}
        assert registry.get_sample_value("featurepipe_drift_p_value", labels) == p


def test_the_file_is_replaced_whole_or_not_at_all(store, tmp_path, monkeypatch):
    path = tmp_path / "x.prom"
    path.write_text("before")
    monkeypatch.setattr("os.rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UsageError, match=r"cannot write .*x\.prom: No space left on device"):
        write_metrics(path, record(), store)
    assert path.read_text() == "before"
    assert sorted(tmp_path.iterdir()) == [store.path, path]


def test_bytes_count_every_file_once(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "x").write_bytes(b"123")
    (tmp_path / "a" / "b" / "y").write_bytes(b"12345")
    (tmp_path / "a" / "again").hardlink_to(tmp_path / "x")  # as snapshots of nights with nothing new are
    (tmp_path / "a" / "round").symlink_to("..")
    assert bytes_in(tmp_path) == 8
    assert bytes_in(tmp_path / "none") == 0


@pytest.mark.parametrize("kind", ["labels", "numbers"])
def test_drift_of_predicted_labels_and_numbers_has_figures_of_its_own(store, tmp_path, kind):
    drift = {"columns": [], "classes": None, kind: {"adjusted": 0.02, "effect": 0.3}}
    found = figures(write_metrics(tmp_path / "one.prom", record(steps=[{"step": "drift", "result": drift}]), store))
    assert found["drift_p_value"] == {f"predicted {kind}": 0.02}
    assert found["drift_effect"] == {f"predicted {kind}": 0.3}
