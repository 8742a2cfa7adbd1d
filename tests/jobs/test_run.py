"""A night as a whole: what is computed, which steps are taken, how it ends, and the record that it leaves."""

import errno
import itertools
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest

import featurepipe.jobs
from featurepipe.errors import FeaturepipeError, SourceError, StoreLocked, UsageError
from featurepipe.interrupt import StopRequest
from featurepipe.jobs import run as run_module
from featurepipe.jobs import steps as real_steps
from featurepipe.jobs.job import KeepTable
from featurepipe.jobs.lock import job_lock
from featurepipe.jobs.record import git_commit
from featurepipe.jobs.sources import RetryPolicy, wait
from featurepipe.jobs.text import plan_text, runs_text, summary_text
from featurepipe.reporting.nights import nights_document

NAMES = ("train", "predict", "drift", "depth", "compact", "keep", "report", "metrics")
ALL_STEPS = """
[[train]]
out = "bundles/a"
[[predict]]
bundle = "bundles/a"
to = "predictions/{run}.parquet"
[drift]
[depth]
[compact]
[keep]
[report]
to = "nights.html"
[metrics]
prometheus = "job.prom"
"""
MAIN = """
    import sys
    from featurepipe.jobs.run import run_job
    record = run_job(sys.argv[1], silent=True)
    print(record["status"])
    sys.exit(record["exit_code"])
"""
SLOWLY = (
    """
    import itertools, sys, time
    from featurepipe.images.folder import FolderSource

    read, count = FolderSource.read, itertools.count(1)

    def slowly(self, locator):
        time.sleep(0.03)
        if next(count) == 60:
            print("well under way", file=sys.stderr, flush=True)
        return read(self, locator)

    FolderSource.read = slowly
"""
    + MAIN
)


class Steps:
    """Stands for the steps: notes the nights that they see, and does what a test tells them to."""

    def __init__(self):
        self.nights, self.acts = {}, {}

    def step(self, name):
        def take(night, table):
            self.nights[name] = night
            return self.acts.get(name, lambda night: {})(night)

        return take


@pytest.fixture
def steps(monkeypatch):
    fake = Steps()
    module = SimpleNamespace(**{name: fake.step(name) for name in NAMES})
    monkeypatch.setitem(sys.modules, "featurepipe.jobs.steps", module)
    monkeypatch.setattr(featurepipe.jobs, "steps", module, raising=False)
    return fake


def raising(error):
    def act(night):
        raise error

    return act


def wait_for_it(process):
    deadline = time.monotonic() + 60
    while "well under way" not in process.err():
        assert time.monotonic() < deadline, process.wait()
        time.sleep(0.01)


def statuses(record):
    return {entry["step"]: entry["status"] for entry in record["steps"]}


def test_night_after_night(pile):
    pile.fill(6)
    first = pile.run()
    assert (first["status"], first["exit_code"]) == ("done", 0)
    assert first["counts"] == {"listed": 6, "computed": 6, "known": 0, "rejected": 0, "read": 6}
    pile.fill(2, first=6)
    (pile.root / "000.png").unlink()
    second = pile.run()
    assert second["counts"] == {"listed": 7, "computed": 2, "known": 5, "rejected": 0, "read": 2}
    assert {name: count for name, count in second["changes"].items() if count} == {
        "unchanged": 5, "new": 2, "deleted": 1,
    }  # fmt: skip
    assert pile.store.features("pile", "c3").shape[0] == 7
    assert [record["run_id"] for record in pile.records()] == [first["run_id"], second["run_id"]]


def test_record(pile):
    pile.fill(3)
    record = pile.run()
    assert json.loads((pile.folder / f"features/runs/{record['run_id']}.json").read_bytes()) == record
    extraction = next(run for run in pile.store.runs() if run["command"] == "extract")
    assert record["extractions"] == [extraction["run_id"]]
    assert (record["command"], record["job"], record["dataset"]) == ("run", "nightly", "pile")
    assert record["job_file"] == str(pile.file)
    assert [(entry["step"], entry["name"], entry["status"]) for entry in record["steps"]] == [
        ("list", "", "done"), ("extract", "lenet5", "done"),
    ]  # fmt: skip
    listed = record["steps"][0]["result"]
    assert (listed["source"], listed["listed"], listed["listing"]["images"]) == (str(pile.root), 3, 3)
    told = record["steps"][1]["result"]
    assert (told["run_id"], told["counts"]) == (extraction["run_id"], extraction["counts"])
    seconds = record["seconds"]
    assert {"read", "decode", "forward", "write", "waiting", "scan", "extract", "wall"} <= seconds.keys()
    assert seconds["extract"] == extraction["seconds"]["wall"] <= seconds["wall"]
    assert record["images_per_second"] == pytest.approx(3 / seconds["extract"], rel=0.1)
    assert "done in" in record["verdict"]
    assert record["plan"]["features"][0]["nodes"] == ["c3", "bottleneck"]
    assert record["plan"]["limits"]["max_gone"] == "50%"
    assert record["plan"]["steps"] == []
    assert record["host"] == extraction["host"]
    assert record["versions"] == extraction["versions"]
    assert record["started"] <= record["ended"]
    assert record["warnings"] == []


def test_several_feature_spaces_hold_the_same_images(pile, monkeypatch):
    from featurepipe.images.folder import FolderSource

    scans = []
    scan = FolderSource.scan
    monkeypatch.setattr(FolderSource, "scan", lambda self: (scans.append(1), scan(self))[1])
    pile.job('[[features]]\nbackbone = "lenet5"\nweights = "none"\nseed = 1\nnodes = ["f6"]\nprecision = "fp32"')
    pile.fill(4)
    record = pile.run()
    assert len(scans) == 1
    assert record["counts"] == {"listed": 4, "computed": 8, "known": 0, "rejected": 0, "read": 8}
    assert record["changes"]["new"] == 4  # and not "unchanged", as the second extraction of the night sees them
    assert len(record["extractions"]) == 2
    assert [entry["status"] for entry in record["steps"]] == ["done", "done", "done"]
    assert len(pile.store.spaces()) == 2


def test_rejects(pile):
    pile.fill(3)
    pile.write("bad.png", b"\x89PNG no more")
    pile.job('[limits]\nmax_rejects = "50%"')
    record = pile.run()
    assert (record["status"], record["exit_code"], record["counts"]["rejected"]) == ("done", 3, 1)
    assert pile.run()["counts"] == {"listed": 4, "computed": 0, "known": 3, "rejected": 1, "read": 0}
    again = pile.run(retry_rejects=True)
    assert (again["counts"]["read"], again["exit_code"]) == (1, 3)
    assert again["plan"]["retry_rejects"] is True


def test_too_many_rejects(pile, steps):
    pile.fill(3)
    pile.write("bad.png", b"\x89PNG no more")
    pile.job(ALL_STEPS)
    record = pile.run()
    assert (record["status"], record["exit_code"]) == ("failed", 4)
    assert record["counts"] == {"listed": 4, "computed": 3, "known": 0, "rejected": 1, "read": 4}
    assert statuses(record) == {
        "list": "done", "extract": "failed", "train": "not reached", "predict": "not reached", "drift": "not reached",
        "depth": "not reached", "compact": "done", "keep": "done", "report": "done", "metrics": "done",
    }  # fmt: skip
    assert "[limits] max_rejects = " in record["steps"][1]["error"]
    assert len(record["extractions"]) == 1


def test_what_steps_see(pile, steps):
    pile.fill(3)
    pile.job(ALL_STEPS)
    first = pile.run()
    assert list(steps.nights) == list(NAMES)
    night = steps.nights["train"]
    assert (night.dataset, night.run_id, night.before, night.silent) == ("pile", first["run_id"], None, True)
    assert night.store.path == pile.folder / "features"
    assert [run["run_id"] for run in night.extracted] == first["extractions"]
    assert night.record["counts"]["computed"] == 3
    assert [entry["step"] for entry in steps.nights["drift"].record["steps"]] == ["list", "extract", "train", "predict"]
    second = pile.run()
    assert steps.nights["train"].before == first["extractions"][0]
    assert second["status"] == "done"


def test_report_and_metrics_see_the_night_as_it_will_end(pile, steps):
    """The store has it as running, so that a kill now does not leave a night that seems to have ended."""
    pile.fill(2)
    pile.job(ALL_STEPS)
    found = {}
    for name in ("report", "metrics"):
        steps.acts[name] = lambda night, name=name: found.update({name: (night.record, pile.records()[-1])}) or {}
    steps.acts["drift"] = raising(FeaturepipeError("the images have drifted"))
    record = pile.run()
    for seen, kept in found.values():
        assert seen["run_id"] == kept["run_id"] == record["run_id"]
        assert (seen["status"], seen["exit_code"], seen["store_bytes"] > 0) == ("failed", 1, True)
        assert (kept["status"], kept["exit_code"]) == ("running", None)
    assert [entry["step"] for entry in found["metrics"][0]["steps"]][-1] == "report"
    assert len(pile.records()) == 1


def test_a_failing_step_fails_the_run_and_others_still_run(pile, steps):
    pile.fill(2)
    pile.job(ALL_STEPS)
    steps.acts["train"] = raising(UsageError("one class only"))
    steps.acts["compact"] = raising(OSError(5, "Input/output error"))
    steps.acts["predict"] = lambda night: {"skipped": "no new images"}
    steps.acts["drift"] = lambda night: {"warnings": ["bottleneck:gap has drifted, p = 0.003"]}
    record = pile.run()
    assert (record["status"], record["exit_code"]) == ("failed", 1)
    assert statuses(record) == {
        "list": "done", "extract": "done", "train": "failed", "predict": "skipped", "drift": "done", "depth": "done",
        "compact": "failed", "keep": "done", "report": "done", "metrics": "done",
    }  # fmt: skip
    failed = {entry["step"]: entry["error"] for entry in record["steps"] if entry["status"] == "failed"}
    assert failed == {"train": "one class only", "compact": "[Errno 5] Input/output error"}
    assert record["warnings"] == ["bottleneck:gap has drifted, p = 0.003"]


def test_a_defect_of_ours_is_raised_and_recorded(pile, steps):
    pile.fill(2)
    pile.job(ALL_STEPS)
    steps.acts["drift"] = raising(ZeroDivisionError("division by zero"))
    with pytest.raises(ZeroDivisionError):
        pile.run()
    record = pile.records()[-1]
    assert (record["status"], record["exit_code"]) == ("failed", 1)
    assert record["steps"][-1]["error"] == "division by zero"


@pytest.mark.slow
def test_out_of_time_goes_on_the_next_night(pile, steps, monkeypatch):
    from featurepipe.images.folder import FolderSource

    read = FolderSource.read
    monkeypatch.setattr(FolderSource, "read", lambda self, locator: (time.sleep(0.1), read(self, locator))[1])
    pile.fill(200)
    pile.job(ALL_STEPS + '[limits]\ntime_budget = "4s"')
    record = pile.run()
    assert (record["status"], record["exit_code"]) == ("out of time", 0)
    computed = record["counts"]["computed"]
    assert 0 < computed < 200
    assert statuses(record) == {
        "list": "done", "extract": "out of time", "train": "not reached", "predict": "not reached", "drift": "not reached",
        "depth": "not reached", "compact": "not reached", "keep": "not reached", "report": "done", "metrics": "done",
    }  # fmt: skip
    assert not pile.store.datasets()
    monkeypatch.undo()
    pile.job()
    record = pile.run()
    assert (record["status"], record["counts"]["computed"], record["counts"]["known"]) == (
        "done",
        200 - computed,
        computed,
    )


def test_no_time_left_for_the_steps(pile, steps):
    pile.fill(2)
    pile.job(ALL_STEPS + '[limits]\ntime_budget = "1h"')
    steps.acts["train"] = lambda night: setattr(night.stop, "deadline", time.monotonic()) or {}
    record = pile.run()
    assert (record["status"], record["exit_code"]) == ("out of time", 0)
    assert statuses(record) == {
        "list": "done", "extract": "done", "train": "done", "predict": "not reached", "drift": "not reached",
        "depth": "not reached", "compact": "not reached", "keep": "not reached", "report": "done", "metrics": "done",
    }  # fmt: skip


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_during_a_step(pile, steps, number, code):
    """The step never looks at the request to stop."""
    pile.fill(2)
    pile.job(ALL_STEPS)

    def stuck(night):
        threading.Timer(0.2, signal.pthread_kill, [threading.main_thread().ident, number]).start()
        time.sleep(60)

    steps.acts["drift"] = stuck
    started = time.monotonic()
    record = pile.run()
    assert time.monotonic() - started < 30
    assert (record["status"], record["exit_code"]) == ("interrupted", code)
    left = {entry["step"]: entry["status"] for entry in record["steps"][4:]}
    assert left == {"drift": "interrupted", **dict.fromkeys(NAMES[3:-1], "not reached"), "metrics": "done"}
    seen = steps.nights["metrics"].record
    assert (seen["status"], seen["exit_code"]) == ("interrupted", code)
    assert pile.records()[-1] == record


def test_a_signal_while_the_source_is_listed(pile, steps, monkeypatch):
    from featurepipe.images.folder import FolderSource

    def stuck(self):
        threading.Timer(0.2, signal.pthread_kill, [threading.main_thread().ident, signal.SIGTERM]).start()
        time.sleep(60)

    monkeypatch.setattr(FolderSource, "scan", stuck)
    pile.job(ALL_STEPS)
    started = time.monotonic()
    record = pile.run()
    assert time.monotonic() - started < 30
    assert (record["status"], record["exit_code"]) == ("interrupted", 143)
    assert [entry["status"] for entry in record["steps"]] == ["interrupted", *["not reached"] * 8, "done"]


def test_a_signal_that_no_step_met_is_in_the_figures_of_the_night(pile, steps):
    """It came while a step ran that looked away, and let it end."""
    pile.fill(2)
    pile.job(ALL_STEPS)
    steps.acts["keep"] = lambda night: setattr(night.stop, "signal_number", signal.SIGTERM) or {}
    record = pile.run()
    assert (record["status"], record["exit_code"]) == ("interrupted", 143)
    seen = steps.nights["metrics"].record
    assert (seen["status"], seen["exit_code"]) == ("interrupted", 143)
    assert {entry["step"]: entry["status"] for entry in record["steps"][-3:]} == {
        "report": "not reached", "run": "interrupted", "metrics": "done",
    }  # fmt: skip


def test_drift_that_fails_the_night_leaves_what_it_found(pile, steps):
    pile.fill(2)
    pile.job(ALL_STEPS)
    error = FeaturepipeError("the images have drifted")
    error.record = {"columns": [{"column": "c3:gap", "adjusted": 1e-9}]}
    steps.acts["drift"] = raising(error)
    record = pile.run()
    (entry,) = (entry for entry in record["steps"] if entry["step"] == "drift")
    assert (entry["status"], entry["result"]) == ("failed", error.record)
    assert steps.nights["metrics"].record["steps"][4] == entry


def test_the_record_says_what_the_store_takes(pile, steps):
    pile.fill(2)
    pile.job(ALL_STEPS)
    record = pile.run()
    seen = steps.nights["metrics"].record
    assert record["store_bytes"] == seen["store_bytes"]
    assert record["free_bytes"] == seen["free_bytes"] > 1_000_000
    parts = sum(path.stat().st_size for path in pile.store.path.glob("spaces/*/parts/*.h5"))
    assert parts < record["store_bytes"] < parts + 100_000


def test_a_store_too_slow_to_measure_does_not_hold_up_the_end(pile, monkeypatch):
    from featurepipe.jobs import record as disk

    monkeypatch.setattr(disk, "DISK_SECONDS", 0.2)
    monkeypatch.setattr(disk, "bytes_in", lambda folder: time.sleep(30))
    pile.fill(2)
    started = time.monotonic()
    record = pile.run()
    assert time.monotonic() - started < 20
    assert (record["status"], record["store_bytes"], record["free_bytes"]) == ("done", None, None)


def test_a_night_on_a_file_system_without_locks(pile, steps, monkeypatch):
    def none(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    monkeypatch.setattr(run_module, "job_lock", partial(job_lock, flock=none))
    steps.acts["compact"] = partial(real_steps.compact, table=None)
    steps.acts["keep"] = partial(real_steps.keep, table=KeepTable())
    pile.fill(3)
    pile.job("[compact]\n[keep]")
    with pytest.warns(UserWarning, match="has no locks"):
        record = pile.run()
    assert (record["status"], record["exit_code"], record["counts"]["computed"]) == ("done", 0, 3)
    assert {entry["status"] for entry in record["steps"][2:]} == {"skipped"}
    assert all("has no locks (flock)" in text for text in record["warnings"])
    assert len(record["warnings"]) == 2


def test_a_second_ctrl_c_ends_it_at_once_and_is_recorded(pile, monkeypatch):
    from featurepipe.jobs import plan as extractions

    def impatient(*arguments, stop, **options):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(extractions, "extract", impatient)
    pile.fill(1)
    with pytest.raises(KeyboardInterrupt):
        pile.run()
    (record,) = pile.records()
    assert (record["status"], record["exit_code"]) == ("interrupted", 130)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_during_an_extraction(launcher, pile, number, code):
    pile.fill(200)
    process = launcher.start(SLOWLY, [pile.file])
    wait_for_it(process)
    process.send(number)
    started = time.monotonic()
    ended = process.wait()
    assert time.monotonic() - started < 60
    assert (ended.code, ended.out) == (code, "interrupted\n")
    (record,) = pile.records()
    assert (record["status"], record["exit_code"]) == ("interrupted", code)
    computed = record["counts"]["computed"]
    assert 0 < computed < 200
    assert pile.run()["counts"] == {
        "listed": 200, "computed": 200 - computed, "known": computed, "rejected": 0, "read": 200 - computed,
    }  # fmt: skip


def test_a_kill_leaves_no_lock(launcher, pile):
    pile.fill(200)
    process = launcher.start(SLOWLY, [pile.file])
    wait_for_it(process)
    process.send(signal.SIGKILL)
    assert process.wait().code == -signal.SIGKILL
    record = pile.run()
    assert (record["status"], record["counts"]["listed"]) == ("done", 200)


def test_the_second_run_is_refused(pile):
    pile.fill(1)
    pile.run()
    with (
        job_lock(pile.store, "nightly", StopRequest()),
        pytest.raises(StoreLocked, match="job nightly is already running"),
    ):
        pile.run()
    assert len(pile.records()) == 1


def test_a_lease_that_is_lost_ends_the_night(pile, steps, monkeypatch):
    """Another host took over while this one was suspended."""
    pile.fill(2)
    pile.job(ALL_STEPS)
    locks = []

    def lock(*arguments, on_lost):
        locks.append(SimpleNamespace(lost=False, lose=on_lost))
        return __import__("contextlib").nullcontext(locks[0])

    def lose(night):
        locks[0].lost = True
        locks[0].lose()
        return {}

    monkeypatch.setattr(run_module, "job_lock", lock)
    steps.acts["train"] = lose
    record = pile.run()
    assert (record["status"], record["exit_code"]) == ("failed", 75)
    assert [entry["status"] for entry in record["steps"][3:-1]] == ["not reached"] * 7
    assert "another host took over" in record["steps"][-1]["error"]


def test_a_source_that_is_gone_for_a_while(pile, monkeypatch):
    """The share is mounted while the job waits."""
    pile.fill(3)
    away = pile.root.rename(pile.folder / "away")
    pile.job(source='first_wait = "0.1s"')
    pile.file.write_text(pile.file.read_text().replace("retries = 0", "retries = 8"))
    back = threading.Timer(0.5, away.rename, [pile.root])

    def waits(seconds, stop):
        if back.ident is None:
            back.start()
        wait(seconds, stop)

    monkeypatch.setattr("featurepipe.jobs.plan.RetryPolicy", partial(RetryPolicy, wait=waits))
    record = pile.run()
    assert (record["status"], record["counts"]["computed"]) == ("done", 3)
    assert 0.5 < record["steps"][0]["seconds"] < 10


def test_a_run_that_waits_for_its_source_says_so(pile, monkeypatch):
    pile.fill(3)
    away, seen = pile.root.rename(pile.folder / "away"), []

    def wait(seconds, stop):
        seen.append(pile.records()[-1])
        away.rename(pile.root)

    monkeypatch.setattr("featurepipe.jobs.plan.RetryPolicy", partial(RetryPolicy, wait=wait))
    pile.file.write_text(pile.file.read_text().replace("retries = 0", "retries = 2"))
    record = pile.run()
    (waiting,) = seen
    assert (waiting["status"], waiting["exit_code"]) == ("running", None)
    assert waiting["waiting"]["why"].endswith("; trying again in 10 s, 1 of 2")
    assert waiting["started"] <= waiting["waiting"]["since"] <= record["ended"]
    assert runs_text([waiting]).splitlines()[1].split()[4:6] == ["waiting", "-"]
    assert "waiting" not in record
    assert "waiting" not in pile.records()[-1]


def test_a_source_that_goes_away_in_the_middle(pile, monkeypatch):
    """What was computed before stays, the listing is made anew, and the counts of the run balance."""
    from featurepipe.features import reading
    from featurepipe.images.folder import FolderSource

    read, scan, count, scans = FolderSource.read, FolderSource.scan, itertools.count(), []

    def failing(self, locator):
        if len(scans) == 1 and next(count) >= 30:
            raise SourceError(f"{self.path}: the folder has gone")
        return read(self, locator)

    monkeypatch.setattr(FolderSource, "scan", lambda self: (scans.append(1), scan(self))[1])
    monkeypatch.setattr(FolderSource, "read", failing)
    monkeypatch.setattr(reading, "WAITS", (0,))
    pile.fill(60)
    pile.job(source='first_wait = "0.05s"')
    one_reader = pile.file.read_text().replace(
        "workers = 2", "workers = 1"
    )  # so that the first 24 come before the 30th
    pile.file.write_text(one_reader.replace("retries = 0", "retries = 1"))
    record = pile.run()
    assert (record["status"], len(scans), len(record["extractions"])) == ("done", 2, 2)
    first, second = (run["counts"]["computed"] for run in pile.store.runs() if run["command"] == "extract")
    assert first > 0
    assert first + second == 60
    counts = {name: record["counts"][name] for name in ("listed", "computed", "known", "rejected")}
    assert counts == {"listed": 60, "computed": 60, "known": 0, "rejected": 0}
    assert record["changes"]["new"] == 60


def test_a_source_that_stays_away(pile, steps):
    pile.fill(3)
    pile.run()
    pile.root.rename(pile.folder / "away")
    pile.job(ALL_STEPS)
    record = pile.run()
    assert (record["status"], record["exit_code"], record["dataset"]) == ("failed", 1, "pile")
    assert "no such file or folder" in record["steps"][0]["error"]
    assert statuses(record) == {
        "list": "failed", "extract": "not reached", "train": "not reached", "predict": "not reached",
        "drift": "not reached", "depth": "not reached", "compact": "done", "keep": "done", "report": "done",
        "metrics": "done",
    }  # fmt: skip
    assert record["counts"] == {"listed": 0, "computed": 0, "known": 0, "rejected": 0, "read": 0}
    assert steps.nights["keep"].dataset == "pile"


def test_an_empty_pile_is_refused_unless_told_otherwise(pile):
    pile.fill(4)
    pile.run()
    for path in pile.root.iterdir():
        path.unlink()
    record = pile.run()
    assert record["status"] == "failed"
    assert 'max_gone = "100%"' in record["steps"][0]["error"]
    pile.job('[limits]\nmax_gone = "100%"')
    record = pile.run()
    assert (record["status"], record["counts"]["listed"], record["changes"]["deleted"]) == ("done", 0, 4)


def test_a_far_shorter_listing_is_refused(pile):
    pile.fill(10)
    pile.run()
    for number in range(6):
        (pile.root / f"{number:03d}.png").unlink()
    record = pile.run()
    assert (record["status"], statuses(record)["extract"]) == ("failed", "failed")
    assert "6 of the 10 images" in record["steps"][1]["error"]
    assert record["counts"]["listed"] == 4
    assert "pile: 4 images listed" in summary_text(record)
    pile.job('[limits]\nmax_gone = "60%"')
    assert pile.run()["changes"]["deleted"] == 6


def test_a_label_that_vanishes_is_a_warning_everywhere(pile, tmp_path):
    for folder, first in (("cat/", 0), ("dog/", 10)):
        pile.fill(4, first, folder)
    pile.run()
    (pile.root / "dog").rename(tmp_path / "away")
    told = (
        "50.0 % of the images are gone or renamed (4 of the 8 in the last snapshot); no image has the label dog (of 4 images) "
        'any more. [limits] max_gone = "50%" allows it (default of jobs: 50%); a smaller one refuses such runs'
    )
    plan = pile.run(dry_run=True)
    assert plan["features"][0]["warnings"] == [told]
    assert "0 to read, 4 gone\n" in plan_text(plan)
    record = pile.run()
    assert (record["status"], record["warnings"]) == ("done", [told])
    assert f"warning: {told}" in summary_text(record)
    document = nights_document(pile.store)
    assert document["nights"][-1]["warnings"] == [told]
    assert "No image has the label dog any more, so that heads forget it." in document["next_steps"][0]
    assert pile.run()["warnings"] == []  # nothing more has gone


def test_a_night_that_fails_on_rejects_says_what_is_gone_as_well(pile):
    pile.fill(8)
    pile.run()
    (pile.root / "003.png").unlink()
    pile.write("bad.png", b"no picture")
    record = pile.run()
    assert record["exit_code"] == 4
    assert (
        ", 1 of them new or changed since the last snapshot; 1 of the 8 in the last snapshot are gone;"
        in record["steps"][1]["error"]
    )
    assert record["warnings"][0].startswith(
        "12.5 % of the images are gone or renamed (1 of the 8 in the last snapshot). [lim"
    )


def test_one_space_that_fails_leaves_the_others(pile):
    pile.job('[[features]]\nbackbone = "lenet5"\nweights = "none"\nseed = 1\nnodes = ["c3"]\nprecision = "fp32"')
    text = pile.file.read_text().replace('nodes = ["c3", "bottleneck"]', 'nodes = ["layer9"]')
    pile.file.write_text(text)
    pile.fill(2)
    record = pile.run()
    assert [entry["status"] for entry in record["steps"]] == ["done", "failed", "done"]
    assert "unknown node 'layer9'" in record["steps"][1]["error"]
    assert (record["status"], record["exit_code"]) == ("failed", 2)


def test_later_networks_and_heads_are_checked_before_the_first_image(pile):
    pile.fill(2)
    pile.job('[[features]]\nbackbone = "lenet5"\nweights = "none"\nseed = 1\nnodes = ["layer9"]')
    with pytest.raises(UsageError, match=r"nightly\.toml: features\[1\]\.nodes: unknown node 'layer9' in lenet5"):
        pile.run()
    pile.job('[[train]]\nout = "b"\nhead = "logistic"\nparams = { CC = 1 }')
    with pytest.raises(UsageError, match=r"nightly\.toml: train\[0\]\.params: .*CC"):
        pile.run()
    assert not pile.store.runs()
    assert not pile.store.spaces()


def test_a_record_that_cannot_be_written_does_not_end_the_night(pile, capsys, monkeypatch):
    from featurepipe.errors import DiskFull
    from featurepipe.store import FeatureStore

    pile.fill(2)
    write = FeatureStore.write_run

    def full(self, record):
        if record["command"] == "run":
            raise DiskFull("no space left")
        return write(self, record)

    monkeypatch.setattr(FeatureStore, "write_run", full)
    record = pile.run(silent=False)
    assert record["status"] == "done"
    assert "the run record could not be written: no space left" in capsys.readouterr().err


def test_json_log(pile, steps, capsys):
    pile.fill(2)
    pile.job("[drift]\n[compact]")
    steps.acts["drift"] = lambda night: {"warnings": ["perhaps drifted"]}
    steps.acts["compact"] = raising(OSError("no disk"))
    record = pile.run(silent=False, log_format="json")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert {(line["job"], line["run_id"]) for line in lines} == {("nightly", record["run_id"])}
    ended = [(line["step"], line["status"], line["level"]) for line in lines if line["event"] == "step ended"]
    assert ended == [
        ("list", "done", "info"), ("extract lenet5", "done", "info"), ("drift", "done", "info"),
        ("compact", "failed", "error"),
    ]  # fmt: skip
    listed, extracted, *_, failed = (line for line in lines if line["event"] == "step ended")
    assert (listed["listed"], extracted["counts"]["computed"], failed["error_type"]) == (2, 2, "OSError")
    assert [line["text"] for line in lines if line["level"] == "warning"] == ["perhaps drifted"]
    last = ("status", "exit_code", "counts", "changes", "seconds", "images_per_second", "store_bytes", "free_bytes")
    assert {name: lines[-1][name] for name in ("event", *last)} == {
        "event": "run ended", **{name: record[name] for name in last},
    }  # fmt: skip


def test_text_log(pile, steps, capsys):
    """What becomes of a step is said when it ends; how the run ended, the summary says."""
    pile.fill(2)
    pile.job("[drift]\n[compact]")
    steps.acts["drift"] = lambda night: {"warnings": ["perhaps drifted"]}
    steps.acts["compact"] = raising(OSError("no disk"))
    pile.run(silent=False)
    assert capsys.readouterr().err.splitlines()[-4:] == [
        "extract lenet5: done: 2 computed, 0 known, 0 rejected",
        "drift: done",
        "warning: perhaps drifted",
        "error: compact: failed: no disk",
    ]
    pile.run(silent=True)
    assert capsys.readouterr().err == ""


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_of_the_job_file(pile, monkeypatch):
    assert git_commit(pile.folder) is None
    git(pile.folder, "init", "-q")
    assert git_commit(pile.folder) is None
    git(pile.folder, "add", "nightly.toml")
    git(pile.folder, "commit", "-q", "-m", "job")
    pile.fill(1)
    assert pile.run()["git"] == git(pile.folder, "rev-parse", "HEAD")
    pile.job("[compact]")
    assert pile.run()["git"] == git(pile.folder, "rev-parse", "HEAD") + "-dirty"
    monkeypatch.setenv("PATH", "")
    assert git_commit(pile.folder) is None
