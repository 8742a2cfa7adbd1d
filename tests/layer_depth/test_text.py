"""What the command prints: the answer first, then the table it rests on."""

import copy

import pytest

from featurepipe.errors import Interrupted
from featurepipe.heads.families import HEADS
from featurepipe.layer_depth.phases import HEAD_SECONDS, Phases, divisions_of, fit_seconds, outlook
from featurepipe.layer_depth.study import DepthColumn, Protocol
from featurepipe.layer_depth.text import plan_text, text

RESULT = {"head": "knn", "network": "pretrained", "tested_on": "source", "low": 0.85, "high": 0.95}
DOCUMENT = {
    "dataset": "album",
    "test_dataset": "away",
    "backbone": {"name": "lenet5"},
    "settings": {"folds": 5, "seeds": [0, 1, 2]},
    "classes": ["cat", "dog"],
    "images": 1200,
    "counts": {"shifted": 7, "unlabelled": 3, "rejected": 0, "in_no_fold": 0, "shifted_of_other_classes": 2,
               "shifted_of_equal_id": 4},
    "protocol": "5-fold cross-validation, repeated 3 times with new folds.",
    "timing": {"device": "cpu", "precision": "fp32", "waited": 0.125},
    "columns": [
        {"column": "a:gap", "width": 1000, "cost": 0.25, "ms_per_image": 1.234},
        {"column": "b:gap", "width": 84, "cost": 1.0, "ms_per_image": None},
    ],
    "results": [
        {**RESULT, "column": "a:gap", "accuracy": 0.9},
        {**RESULT, "column": "b:gap", "accuracy": 0.91, "low": None, "high": None},
        {**RESULT, "column": "a:gap", "accuracy": 0.5, "network": "random"},
        {**RESULT, "column": "a:gap", "accuracy": 0.6, "tested_on": "shifted"},
    ],
    "concatenations": [
        {"columns": ["a:gap", "b:gap"], "head": "knn", "accuracy": 0.93, "low": 0.9, "high": 0.96, "against": "b:gap",
         "difference": 0.02, "low_difference": -0.01, "high_difference": 0.05},
    ],
    "recommended": {
        "column": "a:gap", "head": "knn", "accuracy": 0.9, "low": 0.85, "high": 0.95, "best": "b:gap", "best_head": "knn",
        "best_accuracy": 0.91, "rule": "the rule", "width": 1000, "bytes_per_image": 4000, "ms_per_image": 1.234, "saved": 0.75,
        "not_told_apart": ["a:gap"], "elsewhere": {"dataset": "away", "images": 7, "of_equal_id": 4, "accuracy": 0.6, "low": 0.55,
                                                   "high": 0.65, "best": "b:gap", "best_accuracy": 0.7},
    },
    "transferability": {"scores": {"a:gap": 0.1234}, "correlations": {"knn": {"spearman": 0.5}, "lda": {"spearman": None}}},
    "provenance": {"store": "features", "seconds": {"extract": 12.0, "measure": 3.0}},
}  # fmt: skip


def changed(**parts):
    document = copy.deepcopy(DOCUMENT)
    for name, value in parts.items():
        document[name] = {**document.get(name, {}), **value} if isinstance(value, dict) else value
    return document


def test_the_answer_comes_first():
    lines = text(DOCUMENT).splitlines()
    assert lines[:6] == [
        "recommended: a:gap with knn, accuracy 0.9000 (0.850 to 0.950); the most accurate is b:gap with knn, 0.9100",
        "1,000 values (b:gap: 84) and 4.0 kB an image; stopping there saves 75.0 % of the forward's operations "
        "(measured on cpu, fp32: 1.23 ms an image, 1.23 ms up to a:gap)",
        "rule: the rule",
        "not told apart from b:gap: a:gap",
        "on away: 0.6000 (0.550 to 0.650); 7 images, each tested by every head, 4 of them only by those that have not seen the "
        "image of equal id, the mean over those heads; best there is b:gap, 0.7000",
        "use it: featurepipe train features --dataset album --node recommended --head knn --tune --out BUNDLE",
    ]


def test_the_bottleneck_is_called_so_beside_its_own_name():
    lines = text(changed(backbone={"description": {"bottleneck": "a"}})).splitlines()
    assert lines[0].startswith("recommended: bottleneck (a:gap) with knn")
    assert any(line.startswith("bottleneck (a:gap) * ") for line in lines)
    assert any(line.startswith("b:gap  ") for line in lines)
    assert "not told apart from b:gap: bottleneck (a:gap)" in lines
    assert any("1.23 ms up to bottleneck (a:gap)" in line for line in lines)


def test_a_long_protocol_is_wrapped():
    lines = text(changed(protocol="every word " * 30)).splitlines()
    wrapped = [line for line in lines if line.startswith(("every", "word"))]
    assert len(wrapped) == 4
    assert max(map(len, wrapped)) <= 100


def test_the_time_is_compared_with_the_deepest_column_that_was_timed():
    columns = [DOCUMENT["columns"][0], {**DOCUMENT["columns"][1], "ms_per_image": 5.678}]
    assert "(measured on cpu, fp32: 1.23 ms an image, 5.68 ms up to b:gap)" in text(changed(columns=columns))


def test_times_of_a_busy_machine_are_told_from_others():
    told = "(measured on cpu, fp32, on a busy machine: 75.0 % of the time was waiting: 1.23 ms an image"
    assert told in text(changed(timing={"waited": 0.75}))


def test_the_best_may_be_the_recommended_one():
    same = changed(recommended={"best": "a:gap", "ms_per_image": None})
    assert "0.9000 (0.850 to 0.950); the most accurate as well\n" in text(same)
    assert "75.0 % of the forward's operations\nrule" in text(same)
    other_head = changed(recommended={"best": "a:gap", "best_head": "ridge"})
    assert "the most accurate is a:gap with ridge, 0.9100" in text(other_head)


def test_the_table_has_a_line_a_column():
    lines = text(DOCUMENT).splitlines()
    title = "lenet5 on album: 1,200 images of 2 classes, 5 folds, 3 seeds; accuracy with its 95 % interval"
    at = lines.index(title)
    header, first, second = (line for line in lines[at + 1 : at + 5] if not set(line) <= set("- "))
    for name in ("column", "width", "forward", "ms", "knn", "knn (random weights)", "knn (on away)", "LogME"):
        assert name in header
    low_high = "(0.850 to 0.950)"
    expected = f"a:gap * 1000 25.0 % 1.23 0.9000 {low_high} 0.5000 {low_high} 0.6000 {low_high} 0.123"
    assert " ".join(first.split()) == expected
    assert " ".join(second.split()) == "b:gap 84 100.0 % - 0.9100 - - -"


def test_side_by_side_is_told_where_it_was_measured():
    found = text(DOCUMENT)
    assert "side by side, knn, against b:gap alone" in found
    line = next(line for line in found.splitlines() if line.startswith("a:gap + b:gap"))
    assert " ".join(line.split()) == "a:gap + b:gap 0.9300 (0.900 to 0.960) +0.0200 -0.0100 to +0.0500"
    assert "side by side" not in text(changed(concatenations=[]))


def test_correlations_that_are_undefined_are_not_told():
    assert "rank correlation of LogME, which fits no head, with accuracy: +0.50 with knn\n" in text(DOCUMENT)
    none = changed(transferability={"correlations": {"knn": {"spearman": None}}})
    assert "rank correlation" not in text(none)


def test_the_end_says_how_long_and_who_was_left_out():
    last = text(DOCUMENT).splitlines()[-2:]
    assert last[0] == "5-fold cross-validation, repeated 3 times with new folds."
    assert last[1].startswith("extract 12 s, measure 3.0 s; ")
    assert last[1].endswith("; left out: 3 unlabelled, 2 shifted of other classes")


def test_an_own_split_is_named():
    assert "the split test, 3 seeds" in text(changed(settings={"folds": None}))


@pytest.mark.parametrize(("speed", "expected"), [(50.0, "about 2 s"), (None, "nothing to compute")])
def test_a_plan_says_what_would_be_done(speed, expected):
    estimate = {"dataset": "album", "to_read": 100, "seconds": 2.0, "images_per_second": speed,
                "bytes_per_column": {"a:gap": 3000, "b:gap": 1000}}  # fmt: skip
    plan = {"dataset": "album", "backbone": "lenet5", "columns": DOCUMENT["columns"], "extractions": [estimate],
            "what": "100 images of 2 classes", "measurements": 1200, "side_by_side": 45, "protocol": "folds.",
            "seconds": {"measure": 96.0, "side by side": 20.0, "describe": 10.0}}  # fmt: skip
    lines = plan_text(plan).splitlines()
    assert lines[0] == "album, lenet5: 2 columns"
    assert "100 images of 2 classes" in lines
    assert f"album: 100 images to read, {expected}, 4.0 kB" in lines
    assert lines[-4:] == [
        "phases after extracting: measure, 1,200 fits, about 1:36 min; side by side, 45 fits at most, about 20 s; describe, "
        "about 10 s",
        "in all about 2:06 min on an idle machine, a rough figure; what the store has of it takes none",
        "folds.",
        "dry run: nothing was changed",
    ]
    partly = plan_text({**plan, "not_estimated": ["knn"]}).splitlines()[-3]
    assert partly.startswith("in all about 2:06 min, without knn, whose time is not known, on an idle machine")
    unknown = plan_text({**plan, "seconds": dict.fromkeys(plan["seconds"])}).splitlines()[-3]
    assert unknown == "how long they take is not estimated: only of " + ", ".join(HEAD_SECONDS) + " it is known"


def test_ctrl_c_in_a_phase_says_which_and_that_the_same_command_goes_on():
    said: list[str] = []
    phases = Phases({"extract": "features", "measure": "heads"}, said.append)
    with phases.phase("extract"):
        pass
    with (
        pytest.raises(Interrupted, match=r"in phase 2 of 2, measure: .* kept .*; the same command goes on") as caught,
        phases.phase("measure", "; about 10 s"),
    ):
        raise KeyboardInterrupt
    assert caught.value.exit_code == 130
    assert said == ["phase 1 of 2, extract: features", "phase 2 of 2, measure: heads; about 10 s"]
    assert list(phases.seconds) == ["extract"]


CELLS = {
    "logistic": (
        (40, 1280, 5, 0.154), (80, 64, 5, 0.12), (240, 256, 5, 0.201), (240, 256, 5, 0.303), (240, 1280, 5, 0.248),
        (240, 5000, 5, 0.357), (800, 256, 4, 0.2), (800, 256, 4, 0.383), (800, 1280, 4, 0.8), (800, 1280, 4, 1.437),
        (800, 5000, 4, 1.397), (1529, 1280, 2, 0.997), (1600, 1280, 2, 0.82), (1600, 5000, 2, 4.635),
    ),
    "linear-svm": (
        (240, 256, 5, 0.655), (240, 1280, 5, 0.476), (240, 1280, 5, 0.551), (800, 256, 4, 1.309), (800, 256, 4, 1.467),
        (800, 1280, 4, 25.229), (800, 1280, 4, 33.516),
    ),
    "ridge": (
        (240, 256, 5, 0.115), (240, 256, 5, 0.123), (240, 1280, 5, 0.141), (800, 256, 4, 0.156), (800, 256, 4, 0.186),
        (800, 1280, 4, 1.032), (800, 1280, 4, 1.07), (1529, 1280, 2, 1.901), (1600, 1280, 2, 1.89),
    ),
    "lda": (
        (240, 256, 5, 0.464), (240, 256, 5, 0.7), (240, 1280, 5, 16.271), (800, 256, 4, 0.439), (800, 256, 4, 0.488),
        (800, 1280, 4, 13.192),
    ),
    "knn": (
        (240, 256, 5, 0.074), (240, 256, 5, 0.082), (240, 1280, 5, 0.093), (800, 256, 4, 0.151), (800, 256, 4, 0.179),
        (800, 1280, 4, 0.471), (800, 1280, 4, 0.503), (1529, 1280, 2, 0.81), (1600, 1280, 2, 0.849),
    ),
    "centroid": (
        (240, 256, 5, 0.023), (240, 256, 5, 0.023), (240, 1280, 5, 0.044), (800, 256, 4, 0.028), (800, 256, 4, 0.035),
        (800, 1280, 4, 0.1), (800, 1280, 4, 0.12), (1529, 1280, 2, 0.118), (1600, 1280, 2, 0.125),
    ),
    "rbf-svm": (
        (240, 256, 5, 4.196), (240, 1280, 5, 3.144), (240, 1280, 5, 4.308), (800, 256, 4, 3.146), (800, 1280, 4, 3.594),
        (800, 1280, 4, 5.15),
    ),
    "xgboost": (
        (240, 256, 5, 1.61), (240, 1280, 5, 4.807), (240, 1280, 5, 4.955), (800, 256, 4, 3.913), (800, 1280, 4, 12.296),
        (800, 1280, 4, 18.087),
    ),
}  # fmt: skip
"""Processor seconds of a head on one column and fold: training images, values, divisions that choose, seconds; as recorded on one
core with Fashion-MNIST and emoji (where a size is there twice, of each), 10 classes; 5,000 values are 1,280 again with noise."""


@pytest.mark.parametrize("head", CELLS)
def test_the_time_of_a_tuned_head_is_right_within_a_factor_of_one_and_a_half(head):
    assert set(CELLS) == set(HEADS)  # of every family
    for rows, width, divisions, seconds in CELLS[head]:
        assert divisions == divisions_of(rows)
        assert seconds / 1.5 <= fit_seconds(rows, width, 10, head=head) <= seconds * 1.5, (rows, width)


def test_an_estimate_of_fits_is_as_many_times_that_of_one():
    columns = [DepthColumn(f"{name}:gap", name, "gap", 1, 0.5, 1280) for name in "ab"]
    once = outlook(Protocol(["logistic"], 5, 1), columns, networks=1, images=420, classes=7, jobs=1)
    assert once["measure"] == pytest.approx(10 * fit_seconds(336, 1280, 7))
    more = outlook(Protocol(["logistic", "linear-svm"], 5, 3), columns, networks=2, images=420, classes=7, jobs=3)
    both = fit_seconds(336, 1280, 7) + fit_seconds(336, 1280, 7, head="linear-svm")
    assert more["measure"] == pytest.approx(2 * 10 * both)
    besides = outlook(Protocol(["logistic", "kernel-ridge"], 5, 1), columns, networks=1, images=420, classes=7, jobs=1)
    assert besides == once  # what is known is told
    unknown = outlook(Protocol(["kernel-ridge"], 5, 1), columns, networks=1, images=420, classes=7, jobs=1)
    assert set(unknown.values()) == {None}


def test_the_number_of_groups_stands_beside_that_of_images():
    assert "lenet5 on album: 1,200 images of 2 classes in 143 groups, 5 folds, 3 seeds;" in text(changed(groups=143))
    assert "lenet5 on album: 1,200 images of 2 classes, 5 folds" in text(DOCUMENT)


def test_the_next_command_names_the_network_and_the_labels_that_were_given():
    files = {"labels": {"path": "my labels.csv", "sha256": "0" * 64}}
    found = changed(
        labels="my labels.csv", space={"named": "lite0"}, provenance={"files": files, "options": {"group": "family"}}
    )
    assert (
        "use it: featurepipe train features --dataset album --backbone lite0 --node recommended --head knn --tune "
        "--labels 'my labels.csv' --group family --out BUNDLE"
    ) in text(found)
    assert "--labels FILE --out" in text(changed(labels="dict"))


def test_ctrl_c_in_the_extraction_promises_no_store() -> None:
    phases = Phases({"extract": "features", "measure": "heads"}, lambda _: None)
    said = "stopped by SIGINT in phase 1 of 2, extract: features that were written to the store, if any, are kept"
    with pytest.raises(Interrupted, match=said), phases.phase("extract"):
        raise KeyboardInterrupt
