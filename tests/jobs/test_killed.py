"""A night that is killed leaves a record of what it had done."""

import json
import signal
import time

import pytest

from featurepipe.cli import main
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


def shown(store, capsys):
    """The status of the only run, in the table of `runs`, in its JSON, and in the JSON of that run alone."""
    for arguments in ([], ["--json"], ["last", "--json"]):
        assert main(["runs", str(store.path), *arguments]) == 0
    out = capsys.readouterr().out
    table, _, documents = out.partition("[")
    (listed,), end = json.JSONDecoder().raw_decode("[" + documents)
    alone = json.loads(documents[end - 1 :])
    assert alone == listed
    return [table.splitlines()[1].split()[4], listed["status"], alone["status"]]


@pytest.mark.slow
@pytest.mark.parametrize(("step", "table"), [("compact", "[compact]"), ("report", '[report]\nto = "n.html"')])
def test_a_night_that_is_killed_is_in_the_records(launcher, pile, step, table, capsys):
    pile.fill(5)
    pile.job(table)
    process = launcher.start(ENDLESS_STEP, [pile.file, step])
    deadline = time.monotonic() + 60
    while "well under way" not in process.err():
        assert time.monotonic() < deadline, process.wait()
        time.sleep(0.01)
    (running,) = pile.records()
    assert shown(pile.store, capsys) == ["running", "running", "running"]
    process.send(signal.SIGKILL)
    process.wait()
    assert pile.records() == [running]  # nobody has written anything since, and yet all say how it ended
    assert shown(pile.store, capsys) == ["killed", "killed", "killed"]
    assert pile.records() == [running]
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
