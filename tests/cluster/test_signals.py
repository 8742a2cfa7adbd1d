"""Ctrl-C in a terminal reaches every process: workers of our own come back with what they have, and nothing else is said."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CODE = """
import os, sys, time
from featurepipe.execution import connect
from featurepipe.interrupt import stop_on_signals

def work(_context, n, _worker, stop, _report):
    print("what a library prints in a worker")
    for _ in range(200 if n else 1):
        if stop():
            return "stopped"
        time.sleep(0.05)
    return "done"

if __name__ == "__main__":
    with stop_on_signals() as stop, connect("local:2") as dask_executor:
        for n, answer in dask_executor.map(work, range(30), stop=stop):
            print(n, answer, flush=True)
    print("asked to stop:", stop(), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_calls_the_tasks_back(number: int, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(CODE)
    with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, "program.py"], cwd=tmp_path, stdout=out, stderr=err, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 60
        while "0 done" not in (tmp_path / "out").read_text():
            assert time.monotonic() < deadline, (tmp_path / "err").read_text()
            time.sleep(0.05)
        os.killpg(process.pid, number)
        assert process.wait(120) == 0
    finally:
        process.kill()
    lines = (tmp_path / "out").read_text().splitlines()
    assert lines[0] == "0 done"
    assert lines[-1] == "asked to stop: True"
    assert 1 <= len(lines[1:-1]) <= 2
    assert all(line.endswith("stopped") for line in lines[1:-1])
    printed = (tmp_path / "err").read_text()  # by two processes at once, so that one's line may stand in another's
    assert set(printed.replace("what a library prints in a worker", "X")) == {"X", "\n"}
