"""Tasks in, answers out, with real workers."""

import time
from pathlib import Path

import pytest

from featurepipe.errors import SourceError, WorkerRefused
from featurepipe.execution import DaskExecutor


def test_every_task_is_answered_once(team: DaskExecutor) -> None:
    assert sorted(team.map(lambda _c, n, *_: n * n, range(20))) == [(n, n * n) for n in range(20)]


def test_tasks_are_pulled_only_when_there_is_room(team: DaskExecutor) -> None:
    pulled: list[int] = []

    def tasks():
        for n in range(20):
            pulled.append(n)
            yield n

    for seen, _ in enumerate(team.map(lambda _c, n, *_: n, tasks(), in_flight=2), 1):
        assert len(pulled) <= seen + 3  # the one that is here has made no room yet
    assert pulled == list(range(20))


def test_errors_of_ours_come_back_as_they_are(team: DaskExecutor) -> None:
    def work(_context, n: int, _worker, stop, _report) -> None:
        raise SourceError(f"no images in {n}")

    with pytest.raises(SourceError, match="no images in 7"):
        list(team.map(work, [7]))


def test_other_errors_are_tried_again(team: DaskExecutor, tmp_path: Path) -> None:
    def work(_context, path: str, _worker, stop, _report) -> int:
        with open(path, "a") as file:
            file.write(".")
        if Path(path).stat().st_size < 3:
            raise OSError("the share does not answer")
        return Path(path).stat().st_size

    assert list(team.map(work, [str(tmp_path / "tries")])) == [(str(tmp_path / "tries"), 3)]
    with pytest.raises(OSError, match="the share"):
        list(team.map(work, [str(tmp_path / "again")], retries=1))


def test_a_stop_brings_back_what_runs_and_begins_no_more(team: DaskExecutor, tmp_path: Path) -> None:
    mark = tmp_path / "begun"

    def work(_context, n: int, _worker, stop, _report) -> str:
        mark.touch()
        for _ in range(600):
            if stop():
                return "stopped"
            time.sleep(0.05)
        return "done"

    start = time.monotonic()
    found = list(team.map(work, range(9), stop=mark.exists))
    assert 1 <= len(found) <= 2
    assert {answer for _, answer in found} == {"stopped"}
    assert time.monotonic() < start + 10  # a task that is not stopped takes 30 s


def test_a_worker_that_is_refused_gets_nothing_more(team: DaskExecutor, said: list[str]) -> None:
    bad = team.addresses()[0]

    def work(_context, n: int, _worker, stop, _report) -> str:
        from distributed import get_worker

        if get_worker().address == bad:
            raise WorkerRefused("its weights differ")
        return get_worker().address

    found = dict(team.map(work, range(12)))
    assert sorted(found) == list(range(12))
    assert bad not in found.values()
    assert [line for line in said if bad in line] == [said[0]]
    assert "its weights differ" in said[0]
