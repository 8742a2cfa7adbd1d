"""Names of version 1 that have changed still work, and say what they are now."""

import importlib

import numpy as np
import pytest

from featurepipe import execution
from featurepipe.execution.row_shards import SpreadFeatures
from featurepipe.store import FeatureStore

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


def test_row_shards_go_by_their_former_name(monkeypatch):
    shards = object()
    monkeypatch.setattr(SpreadFeatures, "row_shards", lambda self: shards)
    spread = SpreadFeatures(np.zeros((3, 2), np.float32), None)
    with pytest.warns(DeprecationWarning, match=r"^SpreadFeatures\.shared is now SpreadFeatures\.row_shards$"):
        assert getattr(spread, "shared")() is shards  # noqa: B009 - `make lint` looks for the former name


def test_shards_of_a_run_go_by_their_former_names(tmp_path):
    """Of the method and of its argument, by name and by place."""
    store = FeatureStore(tmp_path / "store")
    space = store.open_space({"dtype": "float32"}, backbone="lenet5", notes={})
    run_id = store.new_run_id()
    with (
        pytest.warns(DeprecationWarning, match=r"^the argument share of Space\.writer is now shard$"),
        space.writer(run_id, dataset="pile", share="s1") as writer,
    ):
        writer.add(
            np.arange(32, dtype=np.uint8)[None], ["0.png"], np.array([9]), np.array([9]), {"a:gap": np.ones((1, 3))}
        )
    expected = space.parts_of_shard(run_id, "s1")
    assert [part.rows for part in expected] == [1]
    former = r"^Space\.parts_of_share is now Space\.parts_of_shard$"
    with pytest.warns(DeprecationWarning, match=former):
        assert space.parts_of_share(run_id, "s1") == expected  # the former name
    with pytest.warns(DeprecationWarning, match=former):
        assert space.parts_of_share(run_id, share="s1") == expected  # the former name
