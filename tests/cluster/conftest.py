"""A scheduler and workers as processes on loopback."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cloudpickle
import pytest
from distributed import LocalCluster

from featurepipe.cluster import Team, connect


@pytest.fixture(scope="module", autouse=True)
def functions_travel(request: pytest.FixtureRequest) -> Iterator[None]:
    """Functions of the test module are sent to workers by value: they cannot import it."""
    cloudpickle.register_pickle_by_value(request.module)
    yield
    cloudpickle.unregister_pickle_by_value(request.module)


@contextmanager
def local_cluster(workers: int = 2, **options: Any) -> Iterator[LocalCluster]:
    """A scheduler and worker processes that end with the block."""
    given = {"threads_per_worker": 1, "memory_limit": "2GiB", "silence_logs": 50} | options
    with LocalCluster(workers, processes=True, host="127.0.0.1", dashboard_address="127.0.0.1:0", **given) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def cluster_address() -> Iterator[str]:
    """A scheduler with two workers, shared by all tests that leave it whole."""
    with local_cluster() as cluster:
        yield cluster.scheduler_address


@pytest.fixture
def said() -> list[str]:
    """What a team of the test has said."""
    return []


@pytest.fixture
def team(cluster_address: str, said: list[str]) -> Iterator[Team]:
    """A team of the two shared workers."""
    with connect(cluster_address, say=said.append) as team:
        yield team


@pytest.fixture
def own_team(said: list[str]) -> Iterator[Team]:
    """A team of two workers of the test's own, to kill."""
    with local_cluster() as cluster, connect(cluster.scheduler_address, say=said.append) as team:
        yield team
