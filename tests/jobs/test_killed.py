"""A night that is killed leaves a record of what it had done."""

import signal
import time

import pytest

from featurepipe.jobs.text import runs_text, summary_text
from featurepipe.records import is_success

ENDLESS_STEP = """
    import sys, time
    import featurepipe.jobs.steps
    from featurepipe.jobs.run import run_job

    def endless(night, table):
        print("well under way", file=sys.stderr, flush=True)
        time.sleep(60)

    setattr(featurepipe.jobs.steps, sys.argv[2], endless)
    run_job(sys.argv[1], silent=True)
"""


@pytest.mark.parametrize(("step", "table"), [("compact", "[compact]"), ("report", '[report]\nto = "n.html"')])
def test_a_night_that_is_killed_is_in_the_records(launcher, pile, step, table):
    pile.fill(5)
    pile.job(table)
    process = launcher.start(ENDLESS_STEP, [pile.file, step])
    deadline = time.monotonic() + 60
    while "well under way" not in process.err():
        assert time.monotonic() < deadline, process.wait()
        time.sleep(0.01)
    (running,) = pile.records()
    process.send(signal.SIGKILL)
    process.wait()
    assert (running["status"], running["exit_code"], running["host"]["pid"]) == ("running", None, process.pid)
    assert "ended" not in running
    assert not is_success(running)
    assert [(entry["step"], entry["status"]) for entry in running["steps"]] == [("list", "done"), ("extract", "done")]

    current = pile.run()
    killed, last = pile.records()
    assert killed == {**running, "status": "killed"}
    assert (killed["changes"]["new"], last["changes"]["new"], last["changes"]["unchanged"]) == (5, 0, 5)
    assert last == current
    (warning,) = current["warnings"]
    assert warning.startswith(f"run {killed['run_id']}, begun {killed['started']} on ")
    assert warning in summary_text(current)
    assert [line.split()[4:6] for line in runs_text([killed]).splitlines()[1:]] == [["killed", "-"]]
    assert pile.run()["warnings"] == []
