"""What people read of a run in the morning, and of all runs."""

import pytest

from featurepipe.jobs.text import plan_text, runs_text, summary_text


def step(name, status="done", seconds=1.0, which="", **more):
    return {"step": name, "name": which, "status": status, "seconds": seconds, **more}


@pytest.fixture
def record():
    return {
        "run_id": "R7",
        "command": "run",
        "job": "nightly",
        "dataset": "photos",
        "status": "done",
        "exit_code": 3,
        "started": "2026-11-22T01:30:00+00:00",
        "ended": "2026-11-22T01:42:10+00:00",
        "counts": {"listed": 12_345, "computed": 123, "known": 12_218, "rejected": 4, "read": 125},
        "changes": {"unchanged": 12_216, "touched": 0, "new": 120, "changed": 3, "moved": 2, "still_rejected": 3,
                    "new_rejected": 1, "deleted": 5},
        "images_per_second": 55.04,
        "verdict": "decode-bound: add workers",
        "seconds": {"wall": 730.0},
        "steps": [
            step("list", result={"source": "photos/", "listed": 12_345}),
            step("extract", which="resnet50", seconds=701.26,
                 result={"counts": {"computed": 123, "known": 12_218, "rejected": 4}}),
            step("train", "skipped", which="logistic", result={"skipped": "nothing it learns from has changed"}),
            step("predict", which="logistic", result={"text": "123 images labelled, in 2026-11-22.parquet"}),
            step("depth", "not reached", 0.0, result={"why": "no time was left"}),
        ],
        "warnings": ["this run's images may not be like those of R6"],
    }  # fmt: skip


def test_a_good_night_fits_one_screen(record):
    assert summary_text(record).splitlines() == [
        "nightly: done, with images that could not be used (exit code 3)",
        "2026-11-22 01:30 to 01:42 UTC, 12:10 min, run R7",
        "",
        "photos: 12,345 images listed",
        "  120 new, 3 changed, 2 moved, 1 new rejected, 3 still rejected, 12,216 unchanged; 5 deleted",
        "  123 computed, 12,218 known, 4 rejected",
        "  55.0 img/s; decode-bound: add workers",
        "",
        "list              done              1.0 s  12,345 images",
        "extract resnet50  done            701.3 s  123 computed, 12,218 known, 4 rejected",
        "train logistic    skipped           1.0 s  nothing it learns from has changed",
        "predict logistic  done              1.0 s  123 images labelled, in 2026-11-22.parquet",
        "depth             not reached       0.0 s  no time was left",
        "",
        "warning: this run's images may not be like those of R6",
    ]


def test_a_failed_night_shouts_and_names_what_failed(record):
    long = "cannot list photos/: " + "x" * 100
    record |= {
        "status": "failed", "exit_code": 1, "counts": {}, "changes": {}, "dataset": "", "images_per_second": None,
        "steps": [step("list", "failed", error=long), step("report", "failed", error="two\nlines"), step("metrics")],
        "warnings": [f"w{number}" for number in range(20)],
    }  # fmt: skip
    lines = summary_text(record).splitlines()
    assert lines[0] == "nightly: FAILED: list, report (exit code 1)"
    assert "?: 0 images listed" in lines
    assert lines[6:11] == [
        "list     failed       1.0 s",
        f"    {long}",
        "report   failed       1.0 s",
        "    two",
        "    lines",
    ]
    assert lines[-1] == "and 12 more warnings, in the run record"
    assert len(lines) < 25


def test_nights_with_nothing_new_and_out_of_time_say_so(record):
    quiet = {**record, "exit_code": 0, "changes": {"unchanged": 9}, "counts": {"listed": 9, "known": 9}, "warnings": []}
    text = summary_text(quiet)
    assert text.startswith("nightly: done (exit code 0)\n")
    assert "  9 unchanged\n  0 computed, 9 known, 0 rejected\n\n" in text
    assert summary_text({**quiet, "status": "out of time"}).startswith("nightly: out of time (exit code 0)\n")


def test_runs_are_a_table_of_all_kinds(record):
    extraction = {"run_id": "R1", "command": "extract", "dataset": "photos", "status": "done", "counts": record["counts"],
                  "started": "2026-11-21T12:00:00+00:00", "seconds": {"wall": 61.0}}  # fmt: skip
    assert runs_text([extraction, record, {"run_id": "R0"}]).splitlines() == [
        "started (UTC)     job      dataset  status           exit  listed  computed  rejected  time   run",
        "2026-11-21 12:00  -        photos   done             -     12,345       123         4  1:01   R1",
        "2026-11-22 01:30  nightly  photos   done, 1 warning  3     12,345       123         4  12:10  R7",
        "?                 -        ?        ?                -          0         0         0  -      R0",
    ]
    assert runs_text([]) == "no runs yet"


def test_a_plan_says_what_would_be_done_and_what_is_not_known():
    found = {"backbone": "resnet50", "nodes": ["layer3", "bottleneck"], "known": 90, "to_read": 10, "new": 8,
             "seconds": 12.0, "bytes_per_column": {"layer3:gap": 1000, "bottleneck:gap": 1500}, "gone": 3,
             "warnings": ["odd"]}  # fmt: skip
    steps = [{"step": "train", "name": "logistic", "runs": None, "why": "if labels changed"},
             {"step": "compact", "name": "", "runs": True, "why": "always"}]  # fmt: skip
    plan = {"job": "nightly", "listed": 100, "source": "photos/", "dataset": "photos", "store": "features", "cluster": None,
            "features": [found, {**found, "seconds": None}], "seconds": None, "bytes": 5000, "steps": steps}  # fmt: skip
    assert plan_text(plan).splitlines() == [
        "nightly: 100 images in photos/, dataset photos of features",
        "resnet50 (layer3, bottleneck): 90 known, 10 to read, 2 of them seen before but without these columns, 3 gone",
        "  about 12 s, 2.5 kB",
        "  warning: odd",
        "resnet50 (layer3, bottleneck): 90 known, 10 to read, 2 of them seen before but without these columns, 3 gone",
        "  warning: odd",
        "in all an unknown time, 5.0 kB",
        "",
        "step            runs     why",
        "train logistic  perhaps  if labels changed",
        "compact         yes      always",
        "dry run: nothing was changed",
    ]
    there = plan_text({**plan, "cluster": "slurm, 4 workers"}).splitlines()[6]
    assert there == "computed by a cluster (slurm, 4 workers), which is not asked now: times are those of this machine"
    quick = {**plan, "features": [found], "seconds": 12.0, "steps": []}
    assert plan_text(quick).splitlines()[-2:] == ["in all about 12 s, 5.0 kB", "dry run: nothing was changed"]
