"""Commands whose standard streams are closed, full, or cannot take every character; errors that hold strangers' names."""

import json
import re
import subprocess
import sys

import pytest

from featurepipe.errors import UsageError
from featurepipe.store import FeatureStore
from tests.conftest import MAIN

RUN = "featurepipe.jobs.run:run_job"


def shell(line: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["sh", "-c", f'exec "$0" -m featurepipe {line}', sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams_change_no_exit_code(closed, tmp_path):
    with FeatureStore(tmp_path / "store").lock(shared=True):
        pass
    done = shell(f'info "$1" {closed}', tmp_path / "store")
    assert (done.returncode, done.stderr) == (0, "")
    assert ("no dataset yet" in done.stdout) is (">&-" not in closed.replace("2>&-", ""))
    wrong = shell(f'info "$1" {closed}', tmp_path / "nothing")
    assert wrong.returncode in (1, 2)
    assert (wrong.stdout, "Traceback" in wrong.stderr) == ("", False)


def test_what_is_written_to_a_closed_descriptor_gets_into_no_file_of_ours(tmp_path):
    """Else the first file that is opened takes number 1, and holds what a library of C prints there."""
    code = (
        "import os, sys; from featurepipe.cli.output import open_standard_streams; open_standard_streams(); "
        "file = open(sys.argv[1], 'wb'); os.write(1, b'noise'); os.write(2, b'noise'); os._exit(file.fileno() < 3)"
    )
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" "$2" <&- >&- 2>&-', sys.executable, code, tmp_path / "file"], check=False
    )
    assert (done.returncode, (tmp_path / "file").read_bytes()) == (0, b"")


def test_a_full_disk_behind_standard_output_is_one_line_and_a_failure(launcher):
    is_full = "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1); "
    done = launcher.start(is_full + MAIN, ["nodes", "resnet50"]).wait()
    assert done.code == 1
    assert done.err.splitlines() == ["featurepipe: [Errno 28] No space left on device"]


def test_errors_are_lines_of_ours(command, call):
    command(RUN, UsageError("job.toml: a\x1b[2J: unknown", "job.toml: b\nfeaturepipe: all is well: unknown"))
    answer = call("run", "job.toml")
    assert answer.err.splitlines() == [
        "featurepipe: job.toml: a\\x1b[2J: unknown",
        "job.toml: b\\nfeaturepipe: all is well: unknown",
    ]


def test_what_was_typed_is_not_obeyed(call):
    answer = call("info", "store", "more\x1b]0;title\x07\u202e")
    assert answer.code == 2
    assert "\x1b" not in answer.err
    assert "more\\x1b]0;title\\x07\\u202e" in answer.err


def test_a_defect_is_a_line_of_a_log_for_machines(command, call):
    command(RUN, ZeroDivisionError("a defect of ours"))
    answer = call("run", "job.toml", "--log-format", "json")
    (line,) = answer.err.splitlines()
    assert (answer.code, json.loads(line)["event"]) == (1, "failed")
    assert "ZeroDivisionError: a defect of ours" in json.loads(line)["text"]


ODD = "cat\x1b[2J\u202egnp.\nfeaturepipe: all is well\u2028x\ud800.png"
SHOWN = r"cat\x1b[2J\u202egnp.\nfeaturepipe: all is well\u2028x\ud800.png"


def test_a_defect_is_shown_whole_and_not_obeyed(command, call):
    inner = KeyError(ODD)
    outer = ZeroDivisionError(f"a defect of ours at {ODD}")
    outer.__cause__ = inner
    outer.add_note(f"seen at {ODD}")
    command(RUN, outer)
    answer = call("run", "job.toml")
    assert (answer.code, answer.out) == (1, "")
    first, *frames, last, note = answer.err[answer.err.rindex("Traceback") :].splitlines()
    assert answer.err.startswith("KeyError: 'cat\\x1b[2J")  # a repr has escaped most, which escapes once more leave
    assert "\n\nThe above exception was the direct cause of the following exception:\n\n" in answer.err
    assert first == "Traceback (most recent call last):"
    assert all(line.startswith("  ") for line in frames)
    assert any("in _guarded" in line for line in frames)
    assert last == f"ZeroDivisionError: a defect of ours at {SHOWN}"
    assert note == f"seen at {SHOWN}"
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e\u2028\ud800]", answer.err)


def test_defects_in_groups_are_not_obeyed_either(command, call):
    command(RUN, ExceptionGroup(f"several at {ODD}", [ValueError(ODD), TypeError("plain")]))
    answer = call("run", "job.toml")
    assert answer.code == 1
    assert "several at cat\\x1b[2J" in answer.err
    assert "TypeError: plain" in answer.err
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e\u2028\ud800]", answer.err)
    assert "\nfeaturepipe: all is well" not in answer.err


def test_a_defect_with_an_odd_name_is_one_line_of_a_log(command, call):
    command(RUN, ZeroDivisionError(ODD))
    (line,) = call("run", "job.toml", "--log-format", "json").err.splitlines()
    assert line.isascii()
    assert f"ZeroDivisionError: {ODD}" in json.loads(line)["text"]


THREAD = """
import sys, threading
import featurepipe.jobs.run
from featurepipe.cli import main

class Gone:
    def __del__(self):
        raise LookupError(sys.argv[1])

def run_job(*given, log_format, **options):
    from featurepipe.jobs.log import job_log

    def fail():
        raise ZeroDivisionError(sys.argv[1])

    with job_log("odd", log_format=log_format):
        thread = threading.Thread(target=fail, name=sys.argv[1])
        thread.start()
        thread.join()
        Gone()
    return {"exit_code": 7}

featurepipe.jobs.run.run_job = run_job
sys.exit(main(["run", "x.toml", "--log-format", sys.argv[2], "--json"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_defects_in_threads_and_in_objects_that_go_are_shown_safely(log_format):
    name = ODD.replace("\ud800", "")
    done = subprocess.run(
        [sys.executable, "-c", THREAD, name, log_format], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 7, done.stderr
    shown = SHOWN.replace(r"\ud800", "")
    if log_format == "text":
        lines = done.stderr.splitlines()
        assert lines[0] == f"Exception in thread {shown}:"
        assert f"ZeroDivisionError: {shown}" in lines
        assert f"LookupError: {shown}" in lines
        assert all(line[:1] in " TEZL" for line in lines), lines
    else:
        first, second = [json.loads(line) for line in done.stderr.splitlines()]
        assert first["text"].startswith(f"Exception in thread {shown}:\\nTraceback")
        assert first["text"].endswith(f"ZeroDivisionError: {shown}")
        assert second["text"].endswith(f"LookupError: {shown}")
    assert "\x1b" not in done.stderr
