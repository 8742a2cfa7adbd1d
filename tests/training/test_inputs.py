"""train(if_changed=True): whether another training could give anything else than the bundle that is there."""

import json
from dataclasses import replace

import pytest

from featurepipe.errors import UsageError
from featurepipe.heads.bundle.bundle import read_bundle
from featurepipe.store import fingerprint
from featurepipe.training.train import train

NODES = ["a:gap", "b:gap"]


@pytest.fixture
def rows(zoo):
    return [*zoo.images("train", 20), *zoo.images("val", 8), *zoo.images("test", 8)]


@pytest.fixture
def again(zoo, tmp_path):
    """Writes a new snapshot and trains if something changed; returns the record."""

    def run(rows=None, **options):
        if rows is not None:
            zoo.write(rows)
        return train(
            zoo.store, **{"nodes": NODES, "out": tmp_path / "bundle", "if_changed": True, "silent": True, **options}
        )

    return run


def test_a_second_training_is_skipped_and_leaves_the_bundle_alone(again, rows, tmp_path):
    first = again(rows)
    assert first["why"] == ["there is no bundle yet"]
    before = (tmp_path / "bundle" / "bundle.json").read_bytes()
    second = again()
    assert second == {
        "bundle": str(tmp_path / "bundle"),
        "skipped": "the 84 images that it learns from, their labels and its settings are those that the bundle was trained with",
    }
    assert (tmp_path / "bundle" / "bundle.json").read_bytes() == before
    assert json.loads(before)["training"]["inputs"]["images"] == 84


def test_what_teaches_nothing_changes_nothing(again, rows, zoo):
    again(rows)
    moved = [replace(row, id=f"moved/{row.id}") for row in reversed(rows)]
    more = [*moved, *zoo.images("test", 8, start=90), zoo.image("x", "cat-x", None, "train"),
            zoo.image("bad", "dog-bad", "dog", "train", is_usable=False)]  # fmt: skip
    assert "skipped" in again(
        more
    )  # moved, in another order, with images that are for the test, unlabelled or unusable


@pytest.mark.parametrize(
    ("change", "images"),
    [
        (lambda rows, zoo: [replace(rows[0], label="dog"), *rows[1:]], 84),
        (lambda rows, zoo: [*rows, zoo.image("new", "cat-new", "cat", "train")], 85),
        (lambda rows, zoo: [*rows, replace(rows[0], id="copy")], 85),
        (lambda rows, zoo: rows[1:], 83),
        (lambda rows, zoo: [replace(rows[0], content="cat-other"), *rows[1:]], 84),
        (lambda rows, zoo: [replace(rows[0], split="val"), *rows[1:]], 84),
        (lambda rows, zoo: [replace(rows[0], label=None), *rows[1:]], 83),
    ],
    ids=["relabelled", "added", "copied", "deleted", "changed", "moved to another split", "label taken away"],
)
def test_what_teaches_something_trains(again, rows, zoo, change, images):
    again(rows)
    assert again(change(rows, zoo))["why"] == [f"its images or their labels changed: {images} to learn from, 84 before"]
    assert "skipped" in again()


def test_two_labels_swapped_are_a_change(again, rows):
    again(rows)
    first, other = (next(i for i, row in enumerate(rows) if row.label == name) for name in ("cat", "dog"))
    swapped = list(rows)
    swapped[first], swapped[other] = replace(rows[first], label="dog"), replace(rows[other], label="cat")
    assert again(swapped)["why"] == ["its images or their labels changed: 84 to learn from, 84 before"]


def test_a_labels_file_counts_by_what_is_in_it(again, rows, tmp_path):
    file = tmp_path / "labels.csv"
    lines = [f"{row.id},{row.label}" for row in rows]
    file.write_text("\n".join(["id,label", *lines]))
    again(rows, labels=file)
    file.write_text("\n".join(["id,label", *reversed(lines)]))
    assert "skipped" in again(labels=file)
    assert "skipped" in again()  # the dataset's own labels are the same
    file.write_text("\n".join(["id,label", lines[0].replace(",cat", ",dog"), *lines[1:]]))
    assert again(labels=file)["why"] == ["its images or their labels changed: 84 to learn from, 84 before"]


def test_settings_columns_and_space_are_named(again, rows, zoo, tmp_path):
    again(rows)
    assert again(params={"C": 0.5}, seed=3)["why"] == ["other settings: params, seed"]
    assert "skipped" in again(params={"C": 0.5}, seed=3, memory="1GB", min_class_size=1)
    assert again(params={"C": 0.5}, seed=3, nodes="a:gap")["why"] == ["other columns: a:gap, before a:gap + b:gap"]


def test_features_of_another_space_are_named(again, rows, zoo):
    zoo.write(rows)
    before, now = ({"dtype": "float32", "net": "tiny", "precision": name} for name in ("fp32", "bf16"))
    again(backbone=fingerprint(before))
    zoo.write(rows, fields=now)
    assert again(backbone=fingerprint(now))["why"] == [
        f"features of another space: {fingerprint(now)[:12]}, before {fingerprint(before)[:12]}"
    ]


def test_bundles_that_cannot_tell_are_made_anew(again, rows, tmp_path):
    again(rows)
    head = tmp_path / "bundle" / "head.skops"
    whole = head.read_bytes()
    head.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (why,) = again()["why"]
    assert why.startswith("the bundle cannot be read (")
    assert read_bundle(tmp_path / "bundle").classes == ("cat", "dog", "emu")


def test_a_training_that_fails_leaves_the_bundle_and_is_tried_again(again, rows, tmp_path):
    again(rows)
    before = (tmp_path / "bundle" / "bundle.json").read_bytes()
    with pytest.raises(UsageError, match="all 20 training images are of class 'cat'"):
        again([row for row in rows if row.label == "cat"])
    assert (tmp_path / "bundle" / "bundle.json").read_bytes() == before


def test_a_dataset_without_splits_and_a_dry_run(again, zoo, tmp_path):
    rows = [replace(row, split=None) for row in zoo.images("train", 20)]
    zoo.write(rows)
    plan = again(dry_run=True)
    assert plan["why"] == ["there is no bundle yet"]
    assert not (tmp_path / "bundle").exists()
    again()
    assert "skipped" in again()
    assert "skipped" in again([replace(row, id=row.id.upper()) for row in rows])
    (why,) = again(rows[1:])["why"]
    assert why.startswith("its images or their labels changed")
