"""``featurepipe drift`` and ``duplicates``: options, exit codes, and both on a store of made-up images."""

import json

import pytest

DRIFT = "featurepipe.monitoring.drift:drift"
DUPLICATES = "featurepipe.monitoring.duplicates:duplicates"


def test_options_of_drift_reach_the_command(command, call, store):
    called = command(DRIFT, {"verdict": "no drift"})
    line = (
        "--dataset d --node a --node b:gmp --backbone vgg16 --reference first --snapshot r2 --group patient --bundle b "
        "--warn 0.05 --fail 0.001 --seed 4 --quiet --json"
    )
    answer = call("drift", store.path, *line.split())
    assert (answer.code, json.loads(answer.out)) == (0, {"verdict": "no drift"})
    assert called.given.pop("store").path == store.path
    assert called.given == {
        "dataset": "d", "columns": ["a", "b:gmp"], "backbone": "vgg16", "reference": "first", "snapshot": "r2",
        "group": "patient", "bundle": "b", "warn": 0.05, "fail": 0.001, "seed": 4, "silent": True,
    }  # fmt: skip


def test_what_drift_is_asked_by_default(command, call, store):
    called = command(DRIFT, {})
    call("drift", store.path, "--json")
    del called.given["store"]
    assert called.given == {
        "dataset": None, "columns": None, "backbone": None, "reference": "previous", "snapshot": None, "bundle": None,
        "group": None, "warn": 0.01, "fail": None, "seed": 0, "silent": False,
    }  # fmt: skip


@pytest.mark.parametrize("code", [0, 1])
def test_drift_beyond_the_threshold_is_a_failure(code, command, texts, call, store):
    command(DRIFT, {"exit_code": code})
    texts("featurepipe.monitoring.text:drift_text")
    answer = call("drift", store.path)
    assert (answer.code, answer.out) == (code, f"drift_text of {{'exit_code': {code}}}\n")


def test_options_of_duplicates_reach_the_command(command, call, store):
    called = command(DUPLICATES, {"images": 2})
    line = "--dataset d --node a --backbone vgg16 --near 0.03 --to pairs.csv --raw-ids --quiet --json"
    answer = call("duplicates", store.path, *line.split())
    assert (answer.code, json.loads(answer.out)) == (0, {"images": 2})
    assert called.given.pop("store").path == store.path
    assert called.given == {
        "dataset": "d", "node": "a", "backbone": "vgg16", "near": 0.03, "to": "pairs.csv", "raw_ids": True, "silent": True,
        "label": None, "labels": None, "split_column": None,
    }  # fmt: skip


@pytest.mark.parametrize(("options", "near"), [((), None), (("--near", "auto"), "auto"), (("--near", "1e-2"), 0.01)])
def test_a_distance_is_a_number_or_auto_or_none(options, near, command, call, store):
    called = command(DUPLICATES, {})
    call("duplicates", store.path, "--json", *options)
    assert called.given["near"] == near
    assert called.given["node"] == "bottleneck"


@pytest.mark.parametrize("near", ["close", "0", "1.5", "nan"])
def test_what_is_no_distance_is_refused(near, call, zoo):
    zoo.write(zoo.images("train", 2))
    answer = call("duplicates", zoo.store.path, "--near", near)
    assert (answer.code, answer.out) == (2, "")
    assert "is no cosine distance; give a number between 0 and 1" in answer.err


def test_copies_are_found_from_the_command_line(call, zoo, tmp_path):
    image = zoo.image
    zoo.write([image("a", "cat-1", "cat", "train"), image("b", "cat-1", "cat", "test"), image("c", "dog-1", "dog")])
    answer = call("duplicates", zoo.store.path, "--to", tmp_path / "groups.jsonl", "--json")
    assert answer.code == 0
    found = json.loads(answer.out)
    assert (found["images"], found["exact"]["copies"], found["exact"]["across_splits"]) == (3, 1, 1)
    (group,) = found["exact"]["listed"]
    assert [one["id"] for one in group["images"]] == ["a", "b"]
    lines = [json.loads(line) for line in (tmp_path / "groups.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["a", "b"]


def test_drift_from_the_command_line(call, zoo):
    """Cats on the first night, dogs on the second; a third that is like both of them."""
    cats = [zoo.image(f"cat{n}", f"cat-{n}", None) for n in range(40)]
    dogs = [zoo.image(f"dog{n}", f"dog-{n}", None) for n in range(40)]
    more = [zoo.image(f"{kind}{n}", f"{kind}-{n}", None) for kind in ("cat", "dog") for n in range(100, 120)]
    zoo.write(cats)
    assert json.loads(call("drift", zoo.store.path, "--json").out)["verdict"] == "too few images"
    zoo.write([*cats, *dogs])
    changed = call("drift", zoo.store.path, "--fail", "0.01", "--json", "--quiet")
    found = json.loads(changed.out)
    assert (changed.code, found["verdict"], found["images"]) == (1, "drift", {"reference": 40, "new": 40})
    assert call("drift", zoo.store.path, "--quiet").code == 0  # a warning, without --fail
    zoo.write([*cats, *dogs, *more])
    same = call("drift", zoo.store.path, "--fail", "0.01", "--json", "--quiet")
    assert (same.code, json.loads(same.out)["verdict"]) == (0, "no drift")
    assert call("drift", zoo.store.path, "--warn", "2").code == 2
