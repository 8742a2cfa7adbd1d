"""Workers do not outlive the process that started them."""

import signal
import time
from pathlib import Path

import pytest

WORKER = (
    "import os, sys, time; from featurepipe.execution.local import end_with; end_with(os.getppid()); time.sleep(60)"
)
PARENT = f"""
    import subprocess, sys, time
    worker = subprocess.Popen([sys.executable, "-c", {WORKER!r}])
    print(worker.pid, file=sys.stderr, flush=True)
    time.sleep(60)
"""
COMPARES = """
    import sys, time
    from featurepipe.layer_depth import measure
    from featurepipe.layer_depth.journal import Journal

    measure.WORTH_STARTING = 0
    original, first = Journal.add, []

    def add(*given):
        original(*given)
        if first:  # what comes after it is measured by workers
            print("added", file=sys.stderr, flush=True)
            time.sleep(60)
        first.append(True)

    Journal.add = add
    from featurepipe.cli import main
    sys.exit(main())
"""


def lives(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(met, seconds=60):
    deadline = time.monotonic() + seconds
    while not met() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert met()


def children(pid):
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")


def test_a_worker_ends_with_its_parent(launcher):
    parent = launcher.start(PARENT, [])
    wait_until(lambda: parent.err().endswith("\n"))
    worker = int(parent.err().splitlines()[-1])
    time.sleep(1)
    assert lives(worker)
    parent.send(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not lives(worker))


@pytest.mark.slow
def test_a_comparison_that_is_killed_leaves_no_worker(launcher, pictures, tmp_path):
    arguments = [
        "depth", pictures(), "--store", tmp_path / "store", "--backbone", "lenet5", "--weights", "none", "--node", "c1", "--node",
        "f6", "--folds", 3, "--heads", "knn", "--precision", "fp32", "--jobs", 2, "--quiet",
    ]  # fmt: skip
    parent = launcher.start(COMPARES, arguments)
    wait_until(lambda: "added" in parent.err())
    workers = children(parent.pid)
    assert len(workers) >= 2
    parent.send(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not any(map(lives, workers)), 20)
