"""A job on a cluster: the table, one executor for all steps, and nothing started where nothing is to be done."""

from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import featurepipe.execution.dask
from featurepipe.errors import ClusterError, UsageError

TRAIN = """
[[train]]
out = "bundle"
[[predict]]
bundle = "bundle"
to = "labels-{run}.csv"
"""
HERE = '[cluster]\nkind = "local"\nworkers = 2\n'


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What has been connected to."""
    found: list[Any] = []
    connect = featurepipe.execution.dask.connect

    @contextmanager
    def noted(spec: Any, **options: Any) -> Any:
        if not isinstance(spec, featurepipe.execution.DaskExecutor):
            found.append(spec)
        with connect(spec, **options) as dask_executor:
            yield dask_executor

    monkeypatch.setattr(featurepipe.execution.dask, "connect", noted)
    return found


@pytest.mark.slow
def test_a_night_on_a_cluster_equals_one_here_and_connects_once(pile: Any, connections: list[Any]) -> None:
    pile.fill(12, folder="cat/")
    pile.fill(12, first=50, folder="dog/")
    pile.job(TRAIN + HERE)
    there = pile.run()
    assert there["status"] == "done", there["steps"]
    assert [str(spec) for spec in connections] == ["local, 2 workers"]
    name = there["dataset"]
    features = {node: pile.store.features(name, node=node).numpy()[0] for node in ("c3", "bottleneck")}
    ids = pile.store.features(name, node="c3").ids
    pile.job(TRAIN, top='dataset = "again"')
    (pile.folder / "features").rename(pile.folder / "there")
    here = pile.run()
    assert len(connections) == 1
    assert here["counts"] == there["counts"]
    assert (pile.store.features("again", node="c3").ids == ids).all()
    for node, values in features.items():
        np.testing.assert_array_equal(pile.store.features("again", node=node).numpy()[0], values)


def test_a_dry_run_starts_no_cluster(pile: Any, connections: list[Any]) -> None:
    pile.fill(3)
    pile.job(HERE)
    assert pile.run(dry_run=True)["listed"] == 3
    assert pile.run(dry_run=True, cluster="local:2")["listed"] == 3
    assert connections == []


def test_a_cluster_that_is_not_there_fails_the_steps_and_the_record_says_why(
    pile: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featurepipe.execution.dask.CONNECT_SECONDS", 0.3)
    pile.fill(3)
    pile.job('[cluster]\nscheduler = "tcp://127.0.0.1:9"\n')
    record = pile.run()
    assert (record["status"], record["exit_code"]) == ("failed", 1)
    step = next(step for step in record["steps"] if step["step"] == "extract")
    assert step["error_type"] == ClusterError.__name__
    assert "no scheduler answers at tcp://127.0.0.1:9" in step["error"]


def test_what_is_said_on_the_command_line_comes_before_the_table(pile: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featurepipe.execution.dask.CONNECT_SECONDS", 0.3)
    pile.fill(3)
    pile.job(HERE)
    record = pile.run(cluster="tcp://127.0.0.1:9")
    assert "no scheduler answers at tcp://127.0.0.1:9" in str(record["steps"])
    with pytest.raises(UsageError, match="'here' names no cluster"):
        pile.run(cluster="here")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('kind = "slrum"', r"cluster\.kind = 'slrum': unknown value 'slrum'; nearest: slurm"),
        ('kind = "local"\nworker = 2', r"cluster\.worker: unknown key; nearest: workers"),
        ("", r"cluster.*: needs scheduler, the address of one that runs, or kind"),
        ('scheduler = "gate"', r"cluster\.scheduler = 'gate': is no address; write tcp://HOST:PORT"),
        ('kind = "local"\nmaximum = 2\nworkers = 1', "give workers, or minimum and maximum"),
        ('kind = "local"\nworkers = 99999', "99,999 processes on this machine; at most 1,024"),
        ('kind = "local"\nwait = "soon"', r"cluster\.wait = 'soon': 'soon' is no duration"),
    ],
)
def test_mistakes_are_found_when_the_file_is_read(pile: Any, table: str, message: str) -> None:
    pile.fill(1)
    pile.job(f"[cluster]\n{table}\n")
    with pytest.raises(UsageError, match=message):
        pile.run(dry_run=True)
