"""Where the processor time of the tests goes: ``python -m pytest -p tools.processor_time --processor-time=FOLDER ...``.

Wall time depends on what else the machine does; processor time does so less, by up to a half where the cores are shared by many.
As a plugin of pytest this module writes, for each test process (of pytest-xdist, too), the processor time of each module's
import, of each fixture and of each test without its fixtures. The time of the processes that a test starts is counted with it,
also of those that outlive it. As a script (``python tools/processor_time.py FOLDER``) it adds the files up: in all, by kind, by
test file, by function, by test.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

TICKS = os.sysconf("SC_CLK_TCK")


def _children(pid: int) -> Iterator[int]:
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            yield from map(int, (task / "children").read_text().split())
    except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
        return


def _of_tree(pid: int) -> float:
    """Processor seconds of a process, of its descendants, and of those of them that ended and were waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(map(int, fields[11:15])) / TICKS + sum(map(_of_tree, _children(pid)))


def processor_seconds() -> float:
    """Processor seconds of this process and of all processes that it started, since it started."""
    times = os.times()
    ended = times.children_user + times.children_system
    return time.process_time() + ended + sum(map(_of_tree, _children(os.getpid())))


class Recorder:
    """Writes how much processor time each import, fixture and test took, without that of what it holds."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("w")
        self._within = [0.0]  # seconds of what is recorded already, for each block that is open
        self._before = processor_seconds()
        self._write("start", "", self._before)

    def _write(self, kind: str, name: str, seconds: float) -> None:
        print(json.dumps({"kind": kind, "name": name, "seconds": round(seconds, 4)}), file=self._file, flush=True)

    @contextmanager
    def _timed(self, kind: str, name: str) -> Iterator[None]:
        start = processor_seconds()
        self._within.append(0.0)
        try:
            yield
        finally:
            seconds = processor_seconds() - start
            self._write(kind, name, seconds - self._within.pop())
            self._within[-1] += seconds

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: Any) -> Generator[None, Any, Any]:
        """The import of a module, or a look into a folder."""
        with self._timed("import", collector.nodeid):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Generator[None, Any, Any]:
        """What a fixture does before it yields."""
        with self._timed(f"fixture ({fixturedef.scope})", f"{fixturedef.baseid}::{fixturedef.argname}"):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Generator[None, Any, Any]:
        """Pytest itself, its reports among others."""
        with self._timed("around a test", item.nodeid):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: Any) -> Generator[None, Any, Any]:
        """What happens before a test, beside fixtures."""
        with self._timed("setup", item.nodeid):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: Any) -> Generator[None, Any, Any]:
        """The test itself."""
        with self._timed("test", item.nodeid):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: Any) -> Generator[None, Any, Any]:
        """What fixtures do at their end, those of the session with the last test."""
        with self._timed("teardown", item.nodeid):
            return (yield)

    def pytest_unconfigure(self) -> None:
        """What no hook saw."""
        self._write("other", "", processor_seconds() - self._before - self._within[0])
        self._file.close()


def pytest_addoption(parser: Any) -> None:
    """Adds the option."""
    parser.addoption("--processor-time", metavar="FOLDER", help="write there where the processor time goes")


def pytest_configure(config: Any) -> None:
    """Starts to record where asked to."""
    folder = config.getoption("--processor-time")
    if folder is None or (config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput")):
        return  # under pytest-xdist the workers record, and not the process that starts them
    Path(folder).mkdir(parents=True, exist_ok=True)
    worker = getattr(config, "workerinput", {}).get("workerid", "main")
    config.pluginmanager.register(Recorder(Path(folder) / f"{worker}.jsonl"))


def main(folder: Path, top: int = 60) -> None:
    """Prints the sums of what was recorded in a folder, over all its test processes."""
    kinds: Counter[str] = Counter()
    groups: dict[str, Counter[str]] = defaultdict(Counter)
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            kind, name, seconds = json.loads(line).values()
            kinds[kind] += seconds
            kinds[f"in all, process {file.stem}"] += seconds
            if kind.startswith("fixture"):
                groups["fixture"][f"{name} {kind[7:]}"] += seconds
            elif kind == "import":
                groups["import"][name] += seconds
            elif name:
                groups["file"][name.split("::")[0]] += seconds
                groups["function"][name.split("[")[0]] += seconds
                groups["test"][name] += seconds
    for title, sums in {"kind": kinds, **groups}.items():
        print(f"\nprocessor seconds by {title}: {len(sums)}")
        for name, seconds in sums.most_common(top):
            print(f"{seconds:9.2f}  {name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
