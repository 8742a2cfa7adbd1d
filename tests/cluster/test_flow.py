"""Tasks in, answers out, with real workers."""

import time
from pathlib import Path

import pytest

from featurepipe.cluster import Team, stop_of_task
from featurepipe.errors import SourceError, WorkerRefused


def test_every_task_is_answered_once(team: Team) -> None:
    assert sorted(team.results(iter(range(20)), lambda n: n * n)) == [(n, n * n) for n in range(20)]


def test_tasks_are_pulled_only_when_there_is_room(team: Team) -> None:
    pulled: list[int] = []

    def tasks():
        for n in range(20):
            pulled.append(n)
            yield n

    for seen, _ in enumerate(team.results(tasks(), lambda n: n, in_flight_per_worker=2), 1):
        assert len(pulled) <= seen + 3  # the one that is here has made no room yet
    assert pulled == list(range(20))


def test_errors_of_ours_come_back_as_they_are(team: Team) -> None:
    def work(n: int) -> None:
        raise SourceError(f"no images in {n}")

    with pytest.raises(SourceError, match="no images in 7"):
        list(team.results(iter([7]), work))


def test_other_errors_are_tried_again(team: Team, tmp_path: Path) -> None:
    def work(path: str) -> int:
        with open(path, "a") as file:
            file.write(".")
        if Path(path).stat().st_size < 3:
            raise OSError("the share does not answer")
        return Path(path).stat().st_size

    assert list(team.results(iter([str(tmp_path / "tries")]), work)) == [(str(tmp_path / "tries"), 3)]
    with pytest.raises(OSError, match="the share"):
        list(team.results(iter([str(tmp_path / "again")]), work, retries=1))


def test_a_stop_brings_back_what_runs_and_begins_no_more(team: Team, tmp_path: Path) -> None:
    mark = tmp_path / "begun"

    def work(n: int) -> str:
        stop = stop_of_task()
        mark.touch()
        for _ in range(600):
            if stop():
                return "stopped"
            time.sleep(0.05)
        return "done"

    start = time.monotonic()
    found = list(team.results(iter(range(9)), work, stop=mark.exists))
    assert 1 <= len(found) <= 2
    assert {answer for _, answer in found} == {"stopped"}
    assert time.monotonic() < start + 10  # a task that is not stopped takes 30 s


def test_a_worker_that_is_refused_gets_nothing_more(team: Team, said: list[str]) -> None:
    bad = team.addresses()[0]

    def work(n: int) -> str:
        from distributed import get_worker

        if get_worker().address == bad:
            raise WorkerRefused("its weights differ")
        return get_worker().address

    found = dict(team.results(iter(range(12)), work))
    assert sorted(found) == list(range(12))
    assert bad not in found.values()
    assert [line for line in said if bad in line] == [said[0]]
    assert "its weights differ" in said[0]
