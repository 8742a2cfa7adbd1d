import numpy as np
import pytest

from featurepipe.evaluation import leakage


def test_copies_on_both_sides_of_a_split_are_found_with_ids_of_both(zoo):
    rows = zoo.images("train") + zoo.images("test")
    copy, twice = rows[3], rows[50]
    rows += [
        zoo.image("test/cat/copy.png", copy.content, copy.label, "test"),
        zoo.image("test/dog/twice.png", twice.content, twice.label, "test"),
        zoo.image("val/dog/thrice.png", twice.content, twice.label, "val"),
        zoo.image("train/dog/within.png", rows[60].content, rows[60].label, "train"),  # on one side only: no leak
    ]
    zoo.write(rows)
    found = leakage.report(zoo.features())
    assert found["copies"] == 4
    assert found["label_conflicts"] == {"images": 0, "rows": 0, "examples": []}
    across = found["across_splits"]
    assert (across["images"], across["rows"]) == (2, 5)
    assert across["pairs"] == [
        {"splits": ["test", "train"], "images": 2},
        {"splits": ["test", "val"], "images": 1},
        {"splits": ["train", "val"], "images": 1},
    ]
    assert across["examples"] == [
        [
            {"id": copy.id, "split": "train", "label": "cat"},
            {"id": "test/cat/copy.png", "split": "test", "label": "cat"},
        ],
        [
            {"id": twice.id, "split": "train", "label": "dog"},
            {"id": "test/dog/twice.png", "split": "test", "label": "dog"},
            {"id": "val/dog/thrice.png", "split": "val", "label": "dog"},
        ],
    ]


def test_copies_with_different_labels_are_found_and_missing_labels_are_none(zoo):
    rows = zoo.images(None)
    rows += [
        zoo.image("other.png", rows[0].content, "dog"),
        zoo.image("same.png", rows[0].content, "dog"),
        zoo.image("unlabelled.png", rows[1].content, None),
    ]
    zoo.write(rows)
    found = leakage.report(zoo.features())
    assert found["copies"] == 3
    assert found["across_splits"] == {"images": 0, "rows": 0, "examples": [], "pairs": []}
    assert found["label_conflicts"] == {
        "images": 1,
        "rows": 3,
        "examples": [
            [{"id": rows[0].id, "split": None, "label": "cat"}, {"id": "other.png", "split": None, "label": "dog"}]
        ],
    }


def test_a_clean_dataset_has_no_leak(zoo):
    zoo.write(zoo.images("train") + zoo.images("test"))
    empty = {"images": 0, "rows": 0, "examples": []}
    assert leakage.report(zoo.features()) == {
        "copies": 0,
        "across_splits": {**empty, "pairs": []},
        "label_conflicts": empty,
    }


def test_examples_are_few_counts_are_all(zoo):
    rows = zoo.images("train", 20)
    rows += [zoo.image(f"test/{row.id}", row.content, "emu", "test") for row in rows]
    zoo.write(rows)
    found = leakage.report(zoo.features())
    assert found["across_splits"]["images"] == 60
    assert len(found["across_splits"]["examples"]) == leakage.EXAMPLES
    assert found["label_conflicts"]["images"] == 40  # emus keep their label
    assert [row["id"] for row in found["across_splits"]["examples"][0]] == ["train/cat/0.png", "test/train/cat/0.png"]


def test_report_agrees_with_a_count_row_by_row(zoo):
    rng = np.random.default_rng(0)
    splits, labels = ["train", "test", "val", None], ["cat", "dog", None]
    rows = [
        zoo.image(f"{i}.png", f"cat-{rng.integers(150)}", labels[rng.integers(3)], splits[rng.integers(4)])
        for i in range(300)
    ]
    zoo.write(rows)
    found = leakage.report(zoo.features())
    for name, side in (("across_splits", "split"), ("label_conflicts", "label")):
        sides: dict[str, set[str]] = {}
        for row in rows:
            if getattr(row, side) is not None:
                sides.setdefault(row.content, set()).add(getattr(row, side))
        leaking = {content for content, seen in sides.items() if len(seen) > 1}
        assert found[name]["images"] == len(leaking) > 20
        assert found[name]["rows"] == sum(row.content in leaking and getattr(row, side) is not None for row in rows)


def test_trained_on_gives_count_share_ids_and_accuracy_with_and_without(zoo):
    rows = zoo.images("test", 10)
    zoo.write(rows)
    correct = np.ones(30, np.bool_)
    correct[[2, 20, 21]] = False  # of the images trained on, the first is wrong
    seen = zoo.keys64([rows[2], rows[7], *zoo.images("train", 3)])
    assert leakage.trained_on(zoo.features(), seen, correct) == {
        "images": 2,
        "share": pytest.approx(2 / 30),
        "ids": [rows[2].id, rows[7].id],
        "accuracy_with": pytest.approx(27 / 30),
        "accuracy_without": pytest.approx(26 / 28),
    }
    everything = leakage.trained_on(zoo.features(), zoo.keys64(rows), correct)
    assert (everything["share"], everything["accuracy_without"]) == (1.0, None)
