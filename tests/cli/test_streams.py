"""Commands whose standard streams are closed, full, or cannot take every character; errors that hold strangers' names."""

import json
import subprocess
import sys

import pytest

from featurepipe.errors import UsageError
from featurepipe.store import FeatureStore

RUN = "featurepipe.jobs.run:run_job"


def shell(line: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["sh", "-c", f'exec "$0" -m featurepipe {line}', sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


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


def test_a_full_disk_behind_standard_output_is_one_line_and_a_failure():
    done = shell("backbones >/dev/full")
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["featurepipe: [Errno 28] No space left on device"]


def test_errors_are_lines_of_ours(verb, call):
    verb(RUN, UsageError("job.toml: a\x1b[2J: unknown", "job.toml: b\nfeaturepipe: all is well: unknown"))
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


def test_a_defect_is_a_line_of_a_log_for_machines(verb, call):
    verb(RUN, ZeroDivisionError("a defect of ours"))
    answer = call("run", "job.toml", "--log-format", "json")
    (line,) = answer.err.splitlines()
    assert (answer.code, json.loads(line)["event"]) == (1, "failed")
    assert "ZeroDivisionError: a defect of ours" in json.loads(line)["text"]


def test_a_defect_is_raised_where_people_read(verb, call):
    verb(RUN, ZeroDivisionError("a defect of ours"))
    with pytest.raises(ZeroDivisionError):
        call("run", "job.toml")
