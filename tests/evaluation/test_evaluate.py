import csv
import dataclasses
import json
import signal
import time

import numpy as np
import pytest

from featurepipe.errors import BundleError, UsageError
from featurepipe.evaluation.evaluate import choose_rows, evaluate
from featurepipe.heads.bundle.bundle import write_bundle


def accuracy(bundle, rows):
    """Of the head itself, image by image."""
    return np.mean([bundle.head.predict(row.features()[None])[0] == row.label for row in rows])


@pytest.fixture
def split(zoo):
    """Train and test rows, and a bundle of the train rows; rejects, unlabelled rows and a copy in test."""
    train, test = zoo.images("train"), zoo.images("test")
    others = [
        zoo.image("test/none.png", "cat-none", None, "test"),
        zoo.image("test/broken.png", "cat-broken", "cat", "test", is_usable=False),
        zoo.image("train/broken.png", "cat-broken2", "cat", "train", is_usable=False),
        zoo.image("test/copy.png", test[0].content, "cat", "test"),
    ]
    zoo.write([*train, *test, *others])
    return train, test, zoo.bundle(train)


def test_the_test_split_is_scored_by_default_and_everything_is_counted(zoo, split):
    _, test, bundle = split
    found = evaluate(bundle, zoo.store, dataset="zoo", bootstrap=50, silent=True)
    assert (found["dataset"], found["split"], found["scope"]) == ("zoo", "test", "split test")
    assert found["counts"] == {
        "images": 122,
        "scored": 121,
        "unlabelled": 1,
        "unknown_classes": {},
        "unmatched": 0,
        "rejected": 1,
        "duplicates": 1,
    }
    expected = accuracy(bundle, [*test, test[0]])
    assert 0.5 < expected < 1
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(expected, rel=1e-12)
    assert found["leakage"]["trained_on"]["images"] == 0
    assert found["leakage"]["copies"] == 1
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_mistakes_carry_the_ids_of_their_images(zoo, split):
    _, test, bundle = split
    label_of = {row.id: row for row in test}
    mistakes = evaluate(bundle, zoo.store, bootstrap=0, silent=True)["metrics"]["mistakes"]["most_confident"]
    assert len(mistakes) > 3
    for mistake in mistakes:
        row = label_of[mistake["id"]]
        assert mistake["true"] == row.label
        assert mistake["predicted"] == bundle.head.predict(row.features()[None])[0] != row.label


def test_a_bundle_and_a_store_may_be_paths(zoo, split, tmp_path):
    path = write_bundle(tmp_path / "bundle", split[2])
    found = evaluate(path, str(zoo.store.path), bootstrap=0, silent=True)
    given = evaluate(split[2], zoo.store, bootstrap=0, silent=True)
    assert found["metrics"] == given["metrics"]
    assert (found["bundle"]["path"], given["bundle"]["path"]) == (str(path), None)


def test_images_trained_on_are_found_in_the_evaluated_split(zoo):
    train, test = zoo.images("train"), zoo.images("test")
    leaked = [zoo.image(f"test/leaked-{i}.png", train[i].content, train[i].label, "test") for i in range(0, 100, 20)]
    zoo.write([*train, *test, *leaked])
    bundle = zoo.bundle(train)
    found = evaluate(bundle, zoo.store, bootstrap=0, silent=True)["leakage"]
    assert found["trained_on"] == {
        "images": 5,
        "share": pytest.approx(5 / 125),
        "ids": [row.id for row in leaked],
        "accuracy_with": pytest.approx(accuracy(bundle, [*test, *leaked])),
        "accuracy_without": pytest.approx(accuracy(bundle, test)),
    }
    assert found["across_splits"]["pairs"] == [{"splits": ["test", "train"], "images": 5}]


def test_without_a_test_split_only_images_not_trained_on_are_scored(zoo):
    rows = zoo.images(None)
    zoo.write(rows)
    bundle = zoo.bundle(rows[::2])
    found = evaluate(bundle, zoo.store, bootstrap=0, silent=True)
    assert found["split"] is None
    assert found["scope"] == "the images that the head was not trained on (there is no split test)"
    assert (found["counts"]["images"], found["leakage"]["trained_on"]["images"]) == (60, 0)
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(accuracy(bundle, rows[1::2]))
    everything = evaluate(bundle, zoo.store, split="all", bootstrap=0, silent=True)
    assert (everything["scope"], everything["leakage"]["trained_on"]["images"]) == ("all images", 60)
    assert everything["metrics"]["accuracy"]["value"] == pytest.approx(accuracy(bundle, rows))


@pytest.mark.parametrize("trained", [True, False])
def test_without_a_test_split_all_images_are_scored_if_all_or_none_were_trained_on(zoo, trained):
    rows = zoo.images("train")
    zoo.write(rows)
    found = evaluate(zoo.bundle(rows if trained else zoo.images("other")), zoo.store, bootstrap=0, silent=True)
    assert found["scope"] == "all images (there is no split test)"
    assert found["leakage"]["trained_on"]["images"] == (120 if trained else 0)


def test_another_split_may_be_named_and_a_wrong_one_is_refused(zoo, split):
    train, _, bundle = split
    found = evaluate(bundle, zoo.store, split="train", bootstrap=0, silent=True)
    assert (found["split"], found["counts"]["rejected"], found["leakage"]["trained_on"]["share"]) == ("train", 1, 1.0)
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(accuracy(bundle, train))
    with pytest.raises(UsageError, match=r"unknown split 'tset'.*nearest: test"):
        evaluate(bundle, zoo.store, split="tset", silent=True)


def test_labels_of_a_file_take_the_place_of_the_datasets(zoo, split, tmp_path):
    _, test, bundle = split
    file = tmp_path / "labels.csv"
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "label"])
        writer.writerows([row.id, "dog"] for row in test[:30])
        writer.writerow(["nowhere.png", "dog"])
    found = evaluate(bundle, zoo.store, labels=str(file), bootstrap=0, silent=True)
    counts = found["counts"]
    assert (counts["scored"], counts["unlabelled"], counts["unmatched"]) == (30, 92, 1)
    dogs = [dataclasses.replace(row, label="dog") for row in test[:30]]
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(accuracy(bundle, dogs))


def test_labels_that_the_bundle_does_not_know_are_refused_or_left_out_if_asked(zoo):
    train = zoo.images("train")
    bundle = zoo.bundle([row for row in train if row.label != "emu"])
    test = zoo.images("test", 10)
    zoo.write([*train, *test])
    with pytest.raises(
        UsageError, match=r"in split test, 10 have .*: 'emu' \(10\); it knows 'cat', 'dog'.*ignore_unknown_classes=True"
    ):
        evaluate(bundle, zoo.store, silent=True)
    found = evaluate(bundle, zoo.store, ignore_unknown_classes=True, bootstrap=0, silent=True)
    assert (found["counts"]["scored"], found["counts"]["unknown_classes"]) == (20, {"emu": 10})
    known = [row for row in test if row.label != "emu"]
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(accuracy(bundle, known))


def test_a_split_of_unknown_classes_alone_is_refused_in_any_case(zoo):
    bundle = zoo.bundle([row for row in zoo.images("train") if row.label != "emu"])
    zoo.write([row for row in zoo.images("test") if row.label == "emu"])
    with pytest.raises(UsageError, match=r"'emu' \(40\)") as caught:
        evaluate(bundle, zoo.store, ignore_unknown_classes=True, silent=True)
    assert "ignore_unknown_classes" not in str(caught.value)


def test_many_unknown_labels_are_counted_and_the_most_frequent_named(zoo):
    rows = [zoo.image(f"{i}.png", f"cat-{i}", f"class {i % 30:02}") for i in range(45)]
    zoo.write(rows)
    with pytest.raises(UsageError, match=r"45 have .*'class 00' \(2\), .*'class 09' \(2\) and 20 more; it knows"):
        choose_rows(zoo.bundle(zoo.images("train")), zoo.features(), None)


def test_a_split_without_labels_is_refused(zoo):
    train = zoo.images("train")
    zoo.write([*train, *(dataclasses.replace(row, label=None) for row in zoo.images("test", 5))])
    with pytest.raises(UsageError, match=r"none of the 15 images of split test has a label; .*labels='FILE.csv'"):
        evaluate(zoo.bundle(train), zoo.store, silent=True)


def test_features_of_another_space_are_refused_with_the_command_that_makes_the_right_ones(zoo):
    train = zoo.images("train")
    zoo.write(train)
    bundle = zoo.bundle(train, fields={"dtype": "float32", "net": "tiny", "precision": "bf16"})
    with pytest.raises(BundleError) as caught:
        evaluate(bundle, zoo.store, dataset="zoo", silent=True)
    message = str(caught.value)
    held = zoo.store.spaces()[0].name
    assert f"space tiny-{bundle.fingerprint[:12]}" in message
    assert f"{held}, which differs in precision" in message
    assert (
        f"featurepipe extract SOURCE --store {zoo.store.path} --dataset zoo --backbone tiny --weights none --seed 3 "
        "--precision bf16 --dtype float32 --node a:gap --node b:gap"
    ) in message


def test_the_bundles_space_is_taken_where_the_store_has_several(zoo):
    train, test = zoo.images("train"), zoo.images("test")
    for precision in ("fp32", "bf16"):
        fields = {"dtype": "float32", "net": "tiny", "precision": precision}
        zoo.write([*train, *test], fields=fields)
        found = evaluate(zoo.bundle(train, fields=fields), zoo.store, bootstrap=0, silent=True)
        assert found["bundle"]["fingerprint"] == zoo.store.space(precision_space(zoo, precision)).fingerprint


def precision_space(zoo, precision):
    return next(space.name for space in zoo.store.spaces() if space.fields["precision"] == precision)


def test_a_store_of_several_datasets_needs_a_name(zoo, split):
    zoo.write(zoo.images("x"), name="farm")
    with pytest.raises(UsageError, match=r"2 datasets \(farm, zoo\); choose one with dataset"):
        evaluate(split[2], zoo.store, silent=True)
    with pytest.raises(UsageError, match=r"unknown dataset 'zo'.*nearest: zoo"):
        evaluate(split[2], zoo.store, dataset="zo", silent=True)


def test_what_is_scored_is_said_on_standard_error(zoo, split, capsys):
    evaluate(split[2], zoo.store, bootstrap=0)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "scoring 121 images of dataset zoo: split test\n"


SLOW = """
    import sys, time
    from featurepipe.cli import main
    from featurepipe.evaluation import evaluate
    from pathlib import Path

    def slow(*_, **__):
        Path("READY").touch()
        time.sleep(1_000)  # in C, as a fit or a large product is

    evaluate.score_table = slow
    sys.exit(main(["evaluate", *sys.argv[1:], "--json"]))
"""


def files_below(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_sigterm_ends_the_command_at_once_with_nothing_printed_or_written(zoo, split, tmp_path, launcher):
    bundle = write_bundle(tmp_path / "bundle", split[2])
    before = files_below(tmp_path)
    place = tmp_path / "elsewhere"
    place.mkdir()
    process = launcher.start(SLOW, [bundle, zoo.store.path], cwd=place, seconds=200)
    deadline = time.monotonic() + 100
    while not (place / "READY").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (place / "READY").exists(), process.err()
    sent = time.monotonic()
    process.send(signal.SIGTERM)
    finished = process.wait()
    assert time.monotonic() - sent < 100
    assert finished.code in (-signal.SIGTERM, 128 + signal.SIGTERM)
    assert finished.out == ""
    assert "Traceback" not in finished.err
    (place / "READY").unlink()
    assert files_below(tmp_path) == before
