"""Names of version 1 that have changed still work, and say what they are now."""

import importlib

import pytest

from featurepipe import execution

FORMER = (  # what the package offered
    "ClusterError", "SpreadFeatures", "Team", "WorkerFacts", "WorkerRefused", "connect", "one_at_a_time", "results", "spread",
    "stop_of_task", "this_worker",
)  # fmt: skip
GONE = {  # with a part of what is said instead
    "one_at_a_time": r"hold `worker\.alone\(\)`",
    "results": r"`map` of an executor: `featurepipe\.execution\.DaskExecutor`",
    "stop_of_task": "use `stop`",
    "this_worker": "use `worker`",
}


@pytest.mark.parametrize("former", [name for name in FORMER if name not in GONE])
def test_the_cluster_package_is_now_execution(former):
    now = "DaskExecutor" if former == "Team" else former
    cluster = importlib.import_module("featurepipe.cluster")
    with pytest.warns(
        DeprecationWarning, match=rf"^featurepipe\.cluster\.{former} is now featurepipe\.execution\.{now}$"
    ):
        found = getattr(cluster, former)
    assert found is getattr(execution, now)


@pytest.mark.parametrize("former", GONE)
def test_functions_of_tasks_are_gone_and_say_what_to_use_instead(former):
    cluster = importlib.import_module("featurepipe.cluster")
    with pytest.raises(AttributeError, match=rf"'featurepipe\.cluster' has '{former}' no more; .*{GONE[former]}"):
        getattr(cluster, former)


def test_an_unknown_name_is_none_of_them():
    cluster = importlib.import_module("featurepipe.cluster")
    with pytest.raises(AttributeError, match=r"'featurepipe\.cluster' has no attribute 'nothing'"):
        _ = cluster.nothing
