"""What a dry run promises, and that it leaves no trace."""

import pytest

from featurepipe.errors import SourceError, UsageError

STEPS = """
[[train]]
out = "bundles/a"
[[train]]
out = "bundles/b"
when = "always"
[[predict]]
bundle = "bundles/a"
to = "predictions/{job}-{run}.parquet"
[drift]
[depth]
[compact]
[keep]
snapshots = 7
[report]
to = "nights.html"
[metrics]
prometheus = "job.prom"
"""


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_before_the_first_night(pile):
    pile.fill(5)
    pile.job(STEPS)
    before = files(pile.folder)
    plan = pile.run(dry_run=True)
    assert files(pile.folder) == before
    assert (plan["job"], plan["dataset"], plan["listed"]) == ("nightly", "pile", 5)
    assert (plan["source"], plan["store"]) == (str(pile.root), str(pile.folder / "features"))
    (features,) = plan["features"]
    assert (features["backbone"], features["nodes"]) == ("lenet5", ["c3", "bottleneck"])
    assert {name: features[name] for name in ("listed", "known", "to_read", "new")} == {
        "listed": 5, "known": 0, "to_read": 5, "new": 5,
    }  # fmt: skip
    assert plan["bytes"] == sum(features["bytes_per_column"].values()) == 5 * 4 * (16 + 84)
    assert plan["seconds"] == features["seconds"] > 0
    assert [(step["step"], step["name"], step["runs"], step["why"]) for step in plan["steps"]] == [
        ("train", "a", True, "there is no bundle yet"),
        ("train", "b", True, "always"),
        ("predict", "a", True, "predicts new images, into predictions/nightly-RUN-ID.parquet"),
        ("drift", "", None, "compares this run's new images with those of nights before"),
        ("depth", "", None, "if images changed since the last comparison"),
        ("compact", "", True, "always"),
        ("keep", "", True, "keeps 7 snapshots and 365 run records"),
        ("report", "", True, "the last 30 nights, into nights.html"),
        ("metrics", "", True, "always"),
    ]


def test_after_a_night(pile):
    pile.fill(5)
    pile.run()
    pile.fill(2, first=5)
    (pile.folder / "bundles/a").mkdir(parents=True)
    pile.job(STEPS)
    before = files(pile.folder)
    plan = pile.run(dry_run=True)
    assert files(pile.folder) == before
    (features,) = plan["features"]
    assert (features["known"], features["to_read"], features["new"]) == (5, 2, 2)
    train = plan["steps"][0]
    assert (train["runs"], train["why"]) == (
        None, "if images, labels or settings are not those that the bundle was trained with",
    )  # fmt: skip
    assert [step["runs"] for step in plan["steps"] if step["step"] == "predict"] == [True]
    pile.run()
    again = pile.run(dry_run=True)
    assert [step["runs"] for step in again["steps"] if step["step"] == "predict"] == [None]


def test_a_cluster_is_named_and_not_asked(pile):
    pile.fill(3)
    pile.job('[cluster]\nscheduler = "tcp://me:word@127.0.0.1:9"')  # where nobody listens
    plan = pile.run(dry_run=True)
    assert (plan["cluster"], plan["listed"]) == ("tcp://127.0.0.1:9", 3)


def test_two_spaces_add_up(pile):
    pile.fill(3)
    pile.job('[[features]]\nbackbone = "lenet5"\nweights = "none"\nseed = 1\nnodes = ["c3"]\nprecision = "fp32"')
    plan = pile.run(dry_run=True)
    one, other = plan["features"]
    assert plan["seconds"] == one["seconds"] + other["seconds"]
    assert plan["bytes"] == sum(one["bytes_per_column"].values()) + sum(other["bytes_per_column"].values())


def test_what_is_wrong_is_said_before_the_night(pile):
    pile.fill(1)
    pile.file.write_text(pile.file.read_text().replace('"c3"', '"c9"'))
    with pytest.raises(UsageError, match=r"nightly\.toml: features\[0\]\.nodes: unknown node 'c9' in lenet5"):
        pile.run(dry_run=True)
    pile.file.write_text(pile.file.read_text().replace('path = "pile"', 'path = "heap"').replace('"c9"', '"c3"'))
    with pytest.raises(SourceError, match="heap: no such file or folder"):
        pile.run(dry_run=True)
    assert not (pile.folder / "features").exists()
