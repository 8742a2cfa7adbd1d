import json

import numpy as np
import pytest
from sklearn import metrics as reference

from featurepipe.errors import UsageError
from featurepipe.heads.calibration import expected_calibration_error
from featurepipe.heads.statistics import intervals
from featurepipe.heads.statistics.metrics import BINS, measures_text, score_table

NAMES = ["accuracy", "balanced_accuracy", "macro_f1", "log_loss", "auc", "ece"]


def softmax(scores):
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def guesses(n, classes, *, seed=0, present=None, decimals=None):
    """Probabilities that are right more often than not; few ``decimals`` make ties, ``present`` leaves classes out."""
    rng = np.random.default_rng(seed)
    codes = rng.choice(np.arange(classes) if present is None else present, n)
    scores = rng.normal(size=(n, classes))
    scores[np.arange(n), codes] += 1
    probabilities = softmax(scores)
    if decimals is not None:
        probabilities = rng.multinomial(10**decimals, probabilities) / 10**decimals
    return probabilities, codes


def classes(count):
    return [f"class {k}" for k in range(count)]


def macro_auc(probabilities, codes):
    """scikit-learn's, one class against the rest at a time, over the classes that have images."""
    return np.mean([reference.roc_auc_score(codes == k, probabilities[:, k]) for k in np.unique(codes)])


@pytest.mark.parametrize("decimals", [None, 1], ids=["distinct", "ties"])
@pytest.mark.parametrize("present", [None, [0, 2, 5]], ids=["all classes", "missing classes"])
def test_values_are_those_of_scikit_learn(decimals, present):
    p, codes = guesses(400, 7, present=present, decimals=decimals)
    predicted = p.argmax(axis=1)
    found = score_table(p, codes, classes(7), top=(2, 5), bootstrap=0)
    expected = {
        "accuracy": reference.accuracy_score(codes, predicted),
        "balanced_accuracy": np.mean(reference.recall_score(codes, predicted, average=None, labels=np.unique(codes))),
        "macro_f1": reference.f1_score(codes, predicted, average="macro"),
        "log_loss": reference.log_loss(codes, p, labels=range(7)),
        "auc": macro_auc(p, codes),
        "top_2": reference.top_k_accuracy_score(codes, p, k=2, labels=range(7)),
        "top_5": reference.top_k_accuracy_score(codes, p, k=5, labels=range(7)),
    }
    for name, value in expected.items():
        assert found[name] == {"value": pytest.approx(value, rel=1e-12), "low": None, "high": None}, name


def test_macro_auc_is_scikit_learns_where_every_class_has_images():
    p, codes = guesses(300, 4)
    expected = reference.roc_auc_score(codes, p, multi_class="ovr", average="macro")
    assert score_table(p, codes, classes(4), bootstrap=0)["auc"]["value"] == pytest.approx(expected, rel=1e-12)


def test_two_classes_are_scored_as_scikit_learn_scores_them():
    p, codes = guesses(300, 2, decimals=2)
    found = score_table(p, codes, ["no", "yes"], bootstrap=0)
    expected = reference.roc_auc_score(codes, p[:, 1])
    assert found["auc"]["value"] == pytest.approx(expected, rel=1e-12)
    assert [row["auc"] for row in found["per_class"]] == pytest.approx([expected, expected], rel=1e-12)
    assert found["log_loss"]["value"] == pytest.approx(reference.log_loss(codes, p), rel=1e-12)
    assert found["top_5"]["value"] is None
    assert found["top_5"]["reason"] == "of 2 classes the true one is always in 5"


def test_float32_probabilities_of_zero_and_one_give_a_finite_log_loss():
    p = np.array([[0, 1], [1, 0], [0.25, 0.75]], np.float32)
    codes = np.array([0, 0, 1])
    found = score_table(p, codes, ["a", "b"], bootstrap=0)
    assert found["log_loss"]["value"] == pytest.approx(reference.log_loss(codes, p), rel=1e-6)


def test_ece_is_the_gap_between_confidence_and_accuracy_in_equal_bins():
    # two bins are hit: (0.6, 0.667] with 3 of 4 right at 0.65, (0.933, 1] with 1 of 2 right at 0.95
    confidence = np.array([0.65, 0.65, 0.65, 0.65, 0.95, 0.95])
    codes = np.array([0, 0, 0, 1, 0, 1])
    found = score_table(np.stack([confidence, 1 - confidence], axis=1), codes, ["a", "b"], bootstrap=0)
    assert found["ece"]["value"] == pytest.approx((4 * 0.10 + 2 * 0.45) / 6, rel=1e-12)


def test_a_bins_upper_edge_belongs_to_it_as_in_guo_et_al():
    p = np.array([[1.0, 0.0], [0.95, 0.05]])
    found = score_table(p, np.array([0, 1]), ["a", "b"], bootstrap=0)
    assert found["ece"]["value"] == pytest.approx(abs((1 - 1) + (0.95 - 0)) / 2, rel=1e-12)


def test_images_of_one_class_alone_have_no_auc_and_the_table_says_why():
    p, codes = guesses(30, 3, present=[1])
    found = score_table(p, codes, ["cat", "dog", "emu"], bootstrap=50)
    assert found["auc"] == {"value": None, "low": None, "high": None, "reason": "there are images of class dog only"}
    assert [row["auc"] for row in found["per_class"]] == [None, None, None]
    assert found["accuracy"]["low"] <= found["accuracy"]["value"] <= found["accuracy"]["high"]


def test_per_class_table_is_that_of_scikit_learn_with_null_where_undefined():
    p, codes = guesses(200, 5, present=[0, 1, 2])
    p[:, 4] = 0  # class 4 is neither true nor predicted, class 3 only predicted
    predicted = p.argmax(axis=1)
    assert 3 in predicted
    rows = score_table(p, codes, classes(5), bootstrap=0)["per_class"]
    expected = reference.precision_recall_fscore_support(codes, predicted, labels=range(5), zero_division=np.nan)
    for name, values in zip(["precision", "recall", "f1", "support"], expected, strict=True):
        found = [np.nan if row[name] is None else row[name] for row in rows]
        np.testing.assert_allclose(found, values, rtol=1e-12, err_msg=name)
    assert [row["predicted"] for row in rows] == np.bincount(predicted, minlength=5).tolist()


def test_confusion_has_true_rows_and_predicted_columns():
    p, codes = guesses(200, 4)
    found = score_table(p, codes, classes(4), bootstrap=0)
    expected = reference.confusion_matrix(codes, p.argmax(axis=1))
    assert found["confusion"] == {"classes": classes(4), "counts": expected.tolist()}
    np.fill_diagonal(expected, 0)
    row, column = np.unravel_index(expected.argmax(), expected.shape)
    first = found["confused"][0]
    assert (first["true"], first["predicted"]) == (f"class {row}", f"class {column}")
    assert sum(pair["count"] for pair in found["confused"]) == expected.sum()


def test_mistakes_are_the_most_confident_ones_with_their_ids():
    p = np.array([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.4, 0.6]])
    codes = np.array([1, 1, 1, 0])
    found = score_table(p, codes, ["cat", "dog"], ids=["a.png", "b.png", "c.png", "d.png"], bootstrap=0, mistakes=2)
    assert found["mistakes"] == {
        "count": 3,
        "most_confident": [
            {"id": "a.png", "true": "dog", "predicted": "cat", "probability": 0.9, "probability_of_true": 0.1},
            {"id": "b.png", "true": "dog", "predicted": "cat", "probability": 0.7, "probability_of_true": 0.3},
        ],
    }


def by_hand(p, codes, measure, resamples=2000):
    """The percentile interval from copied rows (Efron & Tibshirani 1993), right for many images away from 0 and 1."""
    rng = np.random.default_rng(99)
    values = []
    for _ in range(resamples):
        rows = rng.integers(len(codes), size=len(codes))
        values.append(measure(codes[rows], p[rows]))
    return np.percentile(values, [2.5, 97.5])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "measure"),
    [
        ("accuracy", lambda y, p: np.mean(y == p.argmax(axis=1))),
        ("balanced_accuracy", lambda y, p: np.mean([np.mean(p[y == k].argmax(axis=1) == k) for k in range(3)])),
        ("macro_f1", lambda y, p: reference.f1_score(y, p.argmax(axis=1), average="macro")),
        ("log_loss", lambda y, p: -np.log(p[np.arange(len(y)), y]).mean()),
        ("auc", lambda y, p: macro_auc(p, y)),
        ("top_2", lambda y, p: reference.top_k_accuracy_score(y, p, k=2, labels=range(3))),
    ],
)
def test_with_many_images_intervals_are_those_of_resampled_rows(name, measure):
    p, codes = guesses(900, 3, decimals=2)
    low, high = by_hand(p, codes, measure, 200 if name in {"macro_f1", "auc", "top_2"} else 1000)
    found = score_table(p, codes, classes(3), top=(2,))[name]
    assert found["low"] < found["value"] < found["high"]
    assert [found["low"], found["high"]] == pytest.approx([low, high], abs=0.25 * (high - low))


def test_a_seed_gives_the_same_table_and_another_one_another():
    p, codes = guesses(100, 3)
    first, again, other = (score_table(p, codes, classes(3), seed=seed, bootstrap=200) for seed in (1, 1, 2))
    assert first == again
    assert first["ece"]["high"] != other["ece"]["high"]
    assert first["ece"]["value"] == other["ece"]["value"]


@pytest.mark.parametrize(("n", "count", "present"), [(1, 3, [2]), (2, 2, None), (40, 30, None)])
def test_everything_is_json_without_nan(n, count, present):
    p, codes = guesses(n, count, present=present)
    table = score_table(p, codes, classes(count), bootstrap=100)
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    assert set(NAMES) <= set(table)


@pytest.mark.parametrize(
    ("probabilities", "codes", "message"),
    [
        (np.empty((0, 2)), np.empty(0, int), "no labelled image"),
        (np.full((3, 3), 1 / 3), [0, 1, 0], r"\(3, 2\).*not \(3, 3\)"),
        ([[np.nan, 0.5], [0.5, 0.5]], [0, 1], "1 images are not all between 0 and 1, first row 0"),
        ([[0.5, 0.5], [1.5, -0.5]], [0, 1], "1 images are not all between 0 and 1, first row 1"),
        ([[0.5, 0.5], [0.5, 0.5]], [0, 2], "integers from 0 to 1"),
        ([[0.5, 0.5], [0.5, 0.5]], [0.0, 1.0], "integers from 0 to 1"),
    ],
)
def test_wrong_input_is_named(probabilities, codes, message):
    with pytest.raises(UsageError, match=message):
        score_table(probabilities, codes, ["a", "b"])


@pytest.mark.parametrize("seed", [1, 5, 15])
def test_every_interval_holds_its_value_inside(seed):
    rng = np.random.default_rng(seed)
    likely = rng.dirichlet(np.full(3, 3.0), 60)
    table = score_table(likely, [rng.choice(3, p=row) for row in likely], list("abc"), bootstrap=200)
    for name in NAMES:
        assert table[name]["low"] < table[name]["value"] < table[name]["high"], name


def test_a_class_without_an_image_is_named():
    p, codes = guesses(20, 4, present=[0, 2])
    table = score_table(p, codes, ["ant", "bee", "cat", "dog"], bootstrap=0)
    assert table["untested"] == ["bee", "dog"]
    assert "classes without a test image, about which the scores say nothing: bee, dog" in measures_text(table)


def test_macro_f1_of_few_images_a_class_has_a_reason_for_its_missing_interval():
    p, codes = guesses(40, 4, present=[0, 1, 2])
    codes[:2] = 3
    found = score_table(p, codes, classes(4))["macro_f1"]
    assert found["low"] is None
    assert found["reason"] == "no interval: a class has too few images"


def test_the_exact_binomial_interval_is_scipys():
    from scipy.stats import binomtest

    for hits, n in [(0, 5), (3, 5), (24, 24), (990, 1000)]:
        expected = binomtest(hits, n).proportion_ci(0.95, "exact")
        assert intervals.proportion(hits / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_as_many_ids_as_images():
    with pytest.raises(UsageError, match="2 images, but 1 ids"):
        score_table([[0.5, 0.5], [0.5, 0.5]], [0, 1], ["a", "b"], ids=["x"])


def test_ece_is_that_of_the_calibration_module():

    p, codes = guesses(500, 6)
    found = score_table(p, codes, classes(6), bootstrap=0)["ece"]["value"]
    assert found == pytest.approx(expected_calibration_error(p, codes, bins=BINS), rel=1e-12)


def test_a_probability_may_exceed_one_by_rounding():
    p = np.array([[1 + 2**-52, 0.0], [0.5, 0.5]])
    assert score_table(p, [0, 1], ["a", "b"], bootstrap=0)["accuracy"]["value"] == 0.5


def test_a_negative_number_of_resamples_is_refused():
    with pytest.raises(UsageError, match="bootstrap=-1 must be 0"):
        score_table([[0.5, 0.5]], [0], ["a", "b"], bootstrap=-1)
