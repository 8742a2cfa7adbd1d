"""Names of version 1 that have changed still work, and say what they are now."""

import importlib

import pytest

from featurepipe import execution


@pytest.mark.parametrize(
    ("former", "now"),
    [("Team", "DaskExecutor"), ("connect", "connect"), ("spread", "spread"), ("WorkerFacts", "WorkerFacts")],
)
def test_the_cluster_package_is_now_execution(former, now):
    cluster = importlib.import_module("featurepipe.cluster")
    with pytest.warns(
        DeprecationWarning, match=rf"^featurepipe\.cluster\.{former} is now featurepipe\.execution\.{now}$"
    ):
        found = getattr(cluster, former)
    assert found is getattr(execution, now)


def test_an_unknown_name_is_none_of_them():
    cluster = importlib.import_module("featurepipe.cluster")
    with pytest.raises(AttributeError, match=r"'featurepipe\.cluster' has no attribute 'nothing'"):
        _ = cluster.nothing
