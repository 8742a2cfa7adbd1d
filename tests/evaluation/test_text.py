import re

import numpy as np
import pytest

from featurepipe.evaluation.text import text
from featurepipe.heads.statistics.metrics import score_table


def record(names, n=300, *, bootstrap=100, wrong=None, **changes):
    """What ``evaluate`` returns for made-up probabilities; ``wrong`` sets the number of mistakes."""
    rng = np.random.default_rng(0)
    codes = np.arange(n) % len(names)
    scores = rng.normal(size=(n, len(names)))
    scores[np.arange(n), codes] += 1 if wrong is None else 20
    probabilities = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    if wrong:
        probabilities[:wrong] = np.roll(probabilities[:wrong], 1, axis=1)
    counts = {"scored": n, "unlabelled": 0, "rejected": 0, "unknown_classes": {}, "unmatched": 0, "duplicates": 0}
    nothing = {"images": 0, "rows": 0, "examples": []}
    trained_on = {"images": 0, "share": 0.0, "ids": [], "accuracy_with": 0.9, "accuracy_without": 0.9}
    return {
        "bundle": {"head": "lda", "backbone": "tiny", "columns": ["a:gap", "b:gap"], "classes": len(names)}
        | {"temperature": changes.get("temperature")},
        "dataset": "zoo",
        "scope": "split test",
        "counts": counts | changes.get("counts", {}),
        "metrics": score_table(probabilities, codes, names, bootstrap=bootstrap),
        "leakage": {
            "trained_on": trained_on | changes.get("trained_on", {}),
            "across_splits": {**nothing, "pairs": []} | changes.get("across_splits", {}),
            "label_conflicts": nothing | changes.get("label_conflicts", {}),
        },
    }


def test_measures_stand_with_their_intervals():
    found = record(["cat", "dog", "emu"])
    shown = text(found)
    assert shown.startswith(
        "zoo, split test: 300 images scored\nlda on tiny a:gap + b:gap, 3 classes, not calibrated\n"
    )
    for name, title in [("accuracy", "accuracy"), ("auc", "AUC, one vs rest"), ("ece", "calibration error")]:
        measure = found["metrics"][name]
        expected = f"{measure['value']:.4f} +{measure['low']:.4f} to {measure['high']:.4f}"
        assert re.search(f"^{title} +{expected}$", shown, re.MULTILINE)
    assert "WARNING" not in shown
    assert "top-5" not in shown  # of three classes


def test_matrix_has_a_row_for_each_true_class_and_dots_for_zeros():
    shown = text(record(["cat", "dog"], n=10, wrong=1))
    assert "rows are true classes, columns predicted ones\n     cat  dog\ncat    4    1\ndog    .    5\n" in shown


def test_long_names_number_the_columns_of_the_matrix():
    shown = text(record(["T-shirt/top", "ankle boot"], n=10, wrong=1))
    assert "               1  2\n1 T-shirt/top  4  1\n2 ankle boot   .  5\n" in shown


def test_many_classes_are_shown_by_their_worst():
    found = record([f"species {k}" for k in range(60)], n=600)
    shown = text(found)
    assert "the 10 classes of lowest F1, of 60\n" in shown
    worst = min(found["metrics"]["per_class"], key=lambda row: row["f1"])
    assert re.search(f"^{worst['class']} +10 ", shown, re.MULTILINE)
    assert "rows are true classes" not in shown
    first = found["metrics"]["confused"][0]
    assert re.search(rf"most frequent confusions\n.*\n{first['true']} +{first['predicted']} +{first['count']}\n", shown)
    assert "top-5 accuracy" in shown


def test_warnings_come_before_the_measures():
    example = [{"id": "a.png", "split": "test", "label": "cat"}, {"id": "b.png", "split": "train", "label": "dog"}]
    shown = text(
        record(
            ["cat", "dog"],
            trained_on={"images": 4, "share": 0.0002, "ids": list("abcd"), "accuracy_without": 0.85},
            across_splits={"images": 2, "pairs": [{"splits": ["test", "train"], "images": 2}], "examples": [example]},
            label_conflicts={"images": 1, "examples": [example]},
        )
    )
    assert (
        "WARNING: the head was trained on 4 of these images (under 0.1 %): a, b, c, ...\n"
        "  accuracy 0.9000, without them 0.8500; every measure below includes them\n\n"
        "WARNING: 2 images of the dataset with copies in several splits (test and train share 2)\n"
        "  a.png (test) = b.png (train)\n  ...\n\n"
        "WARNING: 1 image of the dataset with copies under different labels\n"
        "  a.png (cat) = b.png (dog)\n\n"
        "measure "
    ) in shown


def test_a_head_trained_on_every_image_has_no_accuracy_without_them():
    trained_on = {"images": 1, "share": 1.0, "ids": ["a"], "accuracy_without": None}
    assert "  accuracy 0.9000, no other image is left; every" in text(record(["cat", "dog"], trained_on=trained_on))


def test_what_was_left_out_is_said():
    counts = {"unlabelled": 3, "rejected": 1, "unknown_classes": {"yak": 4, "gnu": 1}, "unmatched": 2, "duplicates": 1}
    first, second = text(record(["cat", "dog"], counts=counts, temperature=1.5)).splitlines()[:2]
    assert first == (
        "zoo, split test: 300 images scored, 3 unlabelled, 1 rejected, 5 left out, of classes the bundle does not know: "
        "yak, gnu, 2 of the given labels fit no image, 1 of the scored is a copy of another"
    )
    assert second.endswith("calibrated (temperature 1.5)")


def test_a_network_as_it_is_has_no_bundle_and_a_classifier_of_its_own():
    own = {"matched": {"cat": ["cat"], "dog": ["dog"]}, "unmatched": ["yak"], "without_images": [], "classes": 7,
           "among_labels": False, "answers": {}}  # fmt: skip
    found = {**record(["cat", "dog"], counts={"unknown_classes": {"yak": 4}}), "own_classes": own}
    first, second = text(found).splitlines()[:2]
    assert first == "zoo, split test: 300 images scored, 4 left out, of labels that mean no class of the network: yak"
    assert second.startswith("own classifier on tiny a:gap + b:gap")


@pytest.mark.parametrize("names", [["cat", "dog"], [f"species {k}" for k in range(30)]])
def test_a_head_without_mistakes_says_so(names):
    shown = text(record(names, wrong=0))
    assert shown.endswith("no mistakes")
    assert "confusions" not in shown


def test_one_class_alone_has_a_reason_instead_of_an_auc():
    found = record(["cat", "dog"], n=1, bootstrap=0, wrong=0)
    assert "AUC, one vs rest: none, there are images of class cat only" in text(found)
    assert "interval" not in text(found)
