"""Several labels and numbers: mAP and R2 of each column are scikit-learn's on the same folds, and all that follows from them."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import precision_recall_curve, r2_score, root_mean_squared_error
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.preprocessing import StandardScaler

from featurepipe.errors import Interrupted, UsageError
from featurepipe.heads.statistics.comparison import difference_over_images, over_folds, over_images
from featurepipe.heads.statistics.multilabel import average_precisions, map_contributions
from featurepipe.heads.statistics.regression import r2_contributions
from featurepipe.heads.statistics.transferability import log_me, log_me_of_labels, log_me_of_numbers
from featurepipe.layer_depth import answers, probes
from featurepipe.layer_depth import measure as measuring
from featurepipe.layer_depth.document import details, transferability
from featurepipe.layer_depth.folds import Fold
from featurepipe.layer_depth.journal import Journal
from featurepipe.layer_depth.measure import measure
from featurepipe.layer_depth.options import ComparisonOptions
from featurepipe.layer_depth.probes import Cell, Data, measure_fold
from featurepipe.progress import show

COUNT = 72
COLUMNS = [("a:gap", 0.3, 5), ("b:gap", 1.0, 6)]
NAMES = ["big", "red", "soft"]


def made_up(seed=0, count=COUNT):
    """Features of two columns (``b`` says more than ``a``), labels with gaps, a number, and patients of three images."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(count, 3))
    labels = (hidden + 0.3 * rng.normal(size=hidden.shape) > 0.2).astype(float)
    labels[rng.random(labels.shape) < 0.1] = np.nan
    number = 10 + hidden @ [3.0, -1.0, 0.5] + 0.5 * rng.normal(size=count)
    columns = {}
    for (name, _, width), noise in zip(COLUMNS, (2.0, 0.4), strict=True):
        turn = np.random.default_rng(99).normal(size=(3, width))
        columns[name] = ((hidden + noise * rng.normal(size=hidden.shape)) @ turn).astype(np.float32)
    return columns, labels, number, np.array([f"p{row // 3}" for row in range(count)])


def table(labels, number, groups, prefix=""):
    texts = np.where(np.isnan(labels), "", (labels == 1).astype(int).astype(str))
    return pa.table(
        {
            "id": [f"{prefix}{row}.png" for row in range(len(number))],
            **{name: column.tolist() for name, column in zip(NAMES, texts.T, strict=True)},
            "age": [f"{value!r}" for value in number.tolist()],
            "group": groups.tolist(),
        }
    )


@pytest.fixture
def study(album):
    columns, labels, number, groups = made_up()
    fingerprint = album.write("zoo", columns, [None] * COUNT)

    def make(kind, **options):
        roles = {"multilabel": tuple(NAMES)} if kind == "multilabel" else {"target": "age"}
        head = "logistic" if kind == "multilabel" else "ridge"
        given = {"labels": table(labels, number, groups), "folds": 3, "heads": (head,), **roles, **options}
        return album.study("zoo", fingerprint, COLUMNS, target_type=kind, **given)

    return make


def measured(study, journal, **options):
    sets = [("pretrained", (column.column,)) for column in study.columns]
    with show(100, "fits", silent=True, unit="fits") as progress:
        return measure(study, sets, journal, **{"jobs": 1, "progress": progress, **options})


def interpolated(truth, scores):
    """AP as in PASCAL VOC 2012, from scikit-learn's curve."""
    known = ~np.isnan(truth)
    precision, recall, _ = precision_recall_curve(truth[known], scores[known])
    best = np.maximum.accumulate(precision)  # from the lowest threshold, whose recall is 1
    return float((-np.diff(recall) * best[:-1]).sum())


# What each image adds


def test_contributions_average_to_the_measure_and_are_its_derivatives():
    _, labels, number, _ = made_up(1, 40)
    rng = np.random.default_rng(3)
    scores = np.round(np.nan_to_num(labels, nan=0.5) + rng.normal(size=labels.shape), 1)  # with ties
    found = map_contributions(scores, labels)
    own = [interpolated(truth, said) for truth, said in zip(labels.T, scores.T, strict=True)]
    assert found.mean() == pytest.approx(np.mean(own))
    assert average_precisions(scores, labels) == pytest.approx(own)
    again = [
        *range(40),
        7,
    ]  # an image more is a step of its weight by 1 of 40: the contribution says by how much, about
    moved = map_contributions(scores[again], labels[again]).mean() - found.mean()
    assert moved == pytest.approx((found[7] - found.mean()) / 40, abs=0.004)
    guesses = number + rng.normal(size=40)
    assert r2_contributions(guesses, number).mean() == pytest.approx(r2_score(number, guesses))
    assert np.isnan(r2_contributions([1.0, 2.0], [3.0, 3.0])).all()
    assert np.isnan(map_contributions([[1.0], [2.0]], [[1.0], [np.nan]])).all()


def test_the_variance_of_contributions_is_that_of_resampled_groups():
    _, _, number, _ = made_up(2, 300)
    rng = np.random.default_rng(4)
    groups = np.arange(300) // 3
    guesses = number + np.repeat(rng.normal(size=100), 3)
    found = over_images(r2_contributions(guesses, number), groups, measure="r2")
    drawn = []
    for _ in range(400):
        rows = (3 * rng.integers(100, size=100)[:, None] + np.arange(3)).ravel()
        drawn.append(r2_score(number[rows], guesses[rows]))
    assert found.se == pytest.approx(np.std(drawn), rel=0.2)
    assert found.low == pytest.approx(np.quantile(drawn, 0.025), abs=0.25 * (found.high - found.low))
    assert found.high == pytest.approx(np.quantile(drawn, 0.975), abs=0.25 * (found.high - found.low))


def test_r2_may_be_negative_and_is_at_most_1():
    assert over_folds([-3.0, 0.5, 0.9], 0.5, measure="r2").low < -3
    assert over_folds([0.98, 1.0, 0.99], 0.5, measure="r2").high <= 1
    found = over_images([-4.0, -2.0, -3.5, 0.0], measure="r2")
    assert found.low < found.value < found.high < 1
    assert over_images(np.ones(5), measure="r2").as_dict() == {"value": 1.0, "low": 1.0, "high": 1.0, "se": 0.0}
    assert difference_over_images([2.0, -1.0, 0.5], [2.0, -1.0, 0.5], measure="r2").p == 1
    with pytest.raises(UsageError, match="cells must be from 0 to 1"):
        over_folds([-3.0, 0.5], 0.5)
    with pytest.raises(UsageError, match="unknown measure 'rmse'"):
        over_folds([-3.0, 0.5], 0.5, measure="rmse")


# Against scikit-learn


def test_each_cell_of_labels_is_scikit_learns(study, tmp_path):
    given = study("multilabel")
    for series in measured(given, Journal(tmp_path / "journal.jsonl")):
        features = given.data("pretrained", series.columns).features.read(np.float64)
        for fold, cell in zip(given.folds, series.cells, strict=True):
            scaler = StandardScaler().fit(features[fold.train])
            aps = []
            for truth in given.truth.T:
                rows = fold.train[~np.isnan(truth[fold.train])]
                head = LogisticRegression(C=cell.params["C"], max_iter=2000, tol=1e-8)
                head.fit(scaler.transform(features[rows]), truth[rows])
                aps.append(
                    interpolated(truth[fold.test], head.decision_function(scaler.transform(features[fold.test])))
                )
            assert cell.value == pytest.approx(np.mean(aps), abs=0.01)  # ours stops at a tolerance of 1e-3
            assert 0 < cell.besides["macro_f1"] <= 1


def test_numbers_are_those_of_cross_val_score_on_the_same_groups(study, tmp_path):
    given = study("continuous", folds=4)
    groups = given.images.groups
    for fold in given.folds:
        assert not set(groups[fold.train]) & set(groups[fold.test])
        assert not set(groups[fold.fit]) & set(groups[fold.choose])
    for series in measured(given, Journal(tmp_path / "journal.jsonl")):
        features = given.data("pretrained", series.columns).features.read(np.float64)
        for fold, cell in zip(given.folds, series.cells, strict=True):
            scaler = StandardScaler().fit(features[fold.train])
            head = Ridge(alpha=cell.params["alpha"])
            head.fit(scaler.transform(features[fold.train]), given.truth[fold.train])
            said = head.predict(scaler.transform(features[fold.test]))
            assert cell.value == pytest.approx(r2_score(given.truth[fold.test], said), abs=1e-5)
            assert cell.besides["rmse"] == pytest.approx(
                root_mean_squared_error(given.truth[fold.test], said), rel=1e-5
            )
        theirs = cross_val_score(Ridge(1.0), features, given.truth, groups=groups, cv=GroupKFold(4), scoring="r2")
        assert np.mean([cell.value for cell in series.cells]) == pytest.approx(theirs.mean(), abs=0.15)  # other folds


def test_one_factorisation_chooses_the_penalty_that_single_fits_choose(monkeypatch):
    columns, _, number, _ = made_up(5)
    values = columns["a:gap"]
    data = Data(Values(values), number, None, np.empty(0), "continuous", np.linspace(0.5, 2, COUNT))
    fold = Fold(0, 0, np.arange(40), np.arange(40, 56), np.arange(56, 72))
    (cell,) = measure_fold(data, fold, ["ridge"])
    scaler = StandardScaler().fit(values[:56])
    fit, choose = scaler.transform(values[:40]), scaler.transform(values[40:56])
    found = {}
    for alpha in probes.FAMILIES["continuous"]["ridge"].grid["alpha"]:
        head = Ridge(alpha=alpha).fit(fit, number[:40], sample_weight=data.weights[:40])
        found[alpha] = r2_score(number[40:56], head.predict(choose))
    assert cell.params["alpha"] == max(found, key=found.get)


@pytest.mark.parametrize("head", ["logistic", "linear-svm"])
def test_labels_in_blocks_are_those_in_memory(head, monkeypatch):
    columns, labels, _, _ = made_up(6)
    data = Data(Values(columns["a:gap"]), labels.astype(np.float32), None, np.empty((0, 3)), "multilabel")
    fold = Fold(0, 0, np.arange(40), np.arange(40, 56), np.arange(56, 72))
    (inside,) = measure_fold(data, fold, [head])
    monkeypatch.setattr(probes, "SMALL_VALUES", 10)
    (blocks,) = measure_fold(data, fold, [head])
    assert blocks.value == pytest.approx(inside.value, abs=0.02)
    assert blocks.params == inside.params


class Values:
    """Features in memory, with as much of a FeatureSet as measuring needs."""

    def __init__(self, values):
        self.values, self.shape, self.dtype = values, values.shape, values.dtype

    def read(self, dtype=None, *, rows=None):
        return (self.values if rows is None else self.values[rows]).astype(dtype or self.dtype)

    def take(self, positions):
        return Values(self.values[positions])


def test_weights_reach_the_fit(study, tmp_path):
    plain = study("continuous")
    weighty = study("continuous", labels=None or _weighted(), weight="counts")
    assert plain.key("pretrained", ["a:gap"]) != weighty.key("pretrained", ["a:gap"])
    one, other = (measured(each, Journal(tmp_path / f"{n}.jsonl"))[0] for n, each in enumerate((plain, weighty)))
    assert [cell.value for cell in one.cells] != [cell.value for cell in other.cells]
    with pytest.raises(UsageError, match="knn takes no weight"):
        ComparisonOptions(heads=("knn",), target="age", weight="counts")


def _weighted():
    _, labels, number, groups = made_up()
    counts = [str(1 + 5 * (row % 4 == 0)) for row in range(COUNT)]
    return table(labels, number, groups).append_column("counts", pa.array(counts))


# What follows


def test_the_better_column_is_recommended_and_all_is_json(study, tmp_path):
    for kind, name in (("multilabel", "map"), ("continuous", "r2")):
        given = study(kind, seeds=2)
        found = measured(given, Journal(tmp_path / f"{kind}.jsonl"))
        (a, b) = answers.results(given, found)
        assert b[name] == pytest.approx(np.mean(b["cells"]))
        assert a[name] < b[name] <= b["high"]
        assert b["low"] < b[name] < b[f"train_{name}"] + 0.1
        chosen = answers.recommend(given, found)
        assert chosen.chosen.columns == ("b:gap",)
        (between,) = answers.differences(given, found)
        assert between["difference"] == pytest.approx(a[name] - b[name])
        assert between["low"] < between["difference"] < between["high"]
        shown = details(given, chosen.chosen)["details"]["metrics"]
        assert shown["images"] == COUNT
        assert shown["groups"] == COUNT // 3
        scores = transferability(given)
        assert scores["scores"]["a:gap"] < scores["scores"]["b:gap"]
        assert "h_scores" not in scores
        assert "H-score" in scores["left_out"]
        json.dumps([a, b, between, shown, scores], allow_nan=False)


def test_logme_of_labels_is_that_of_classes_where_each_image_has_one():
    columns, labels, number, _ = made_up(7)
    codes = np.arange(COUNT) % 3
    assert log_me_of_labels(columns["b:gap"], np.eye(3)[codes]) == pytest.approx(log_me(columns["b:gap"], codes, 3))
    each = [
        log_me_of_labels(columns["b:gap"][~np.isnan(truth)], truth[~np.isnan(truth)][:, None]) for truth in labels.T
    ]
    assert log_me_of_labels(columns["b:gap"], labels) == pytest.approx(np.mean(each))
    assert log_me_of_numbers(columns["a:gap"], number) < log_me_of_numbers(columns["b:gap"], number)
    with pytest.raises(UsageError, match="no label has known images of both sides"):
        log_me_of_labels(columns["a:gap"], np.ones((COUNT, 1)))


@pytest.mark.parametrize("kind", ["multilabel", "continuous"])
def test_a_stopped_comparison_goes_on_from_its_journal(study, tmp_path, monkeypatch, kind):
    given, path = study(kind), tmp_path / "journal.jsonl"
    whole = measured(given, Journal(tmp_path / "whole.jsonl"))
    calls, original = [], measuring.measure_fold

    def stopping(data, fold, heads):
        calls.append((data.features.column, fold.number))
        if len(calls) == 3:
            raise Interrupted("stopped", 2)
        return original(data, fold, heads)

    monkeypatch.setattr(measuring, "measure_fold", stopping)
    with pytest.raises(Interrupted, match="2 of 6 fits are measured and kept"):
        measured(given, Journal(path))
    again = measured(given, Journal(path))
    assert len(calls) == 3 + 4  # two were kept
    for one, other in zip(whole, again, strict=True):
        for first, second in zip(one.cells, other.cells, strict=True):
            np.testing.assert_array_equal(first.contributions, second.contributions)
            assert first.params == second.params
            assert first.besides == second.besides


@pytest.mark.slow
def test_processes_measure_the_same(study, tmp_path, monkeypatch):
    given = study("multilabel")
    here = measured(given, Journal(tmp_path / "here.jsonl"))
    monkeypatch.setattr("featurepipe.layer_depth.measure.WORTH_STARTING", 0.0)
    there = measured(given, Journal(tmp_path / "there.jsonl"), jobs=2)
    for one, other in zip(here, there, strict=True):
        for first, second in zip(one.cells, other.cells, strict=True):
            np.testing.assert_allclose(first.contributions, second.contributions, rtol=1e-6)


def test_a_journal_keeps_numbers_to_the_bit_and_passes_over_torn_ones(tmp_path):
    path, rng = tmp_path / "journal.jsonl", np.random.default_rng(0)
    cell = Cell("ridge", 0, 1, {"alpha": 1.0}, rng.normal(size=5), np.array([np.nan, 0.25]), 0.5, 1.0, {"rmse": 2.0})
    Journal(path).add("key", [cell])
    line = json.loads(Path(path).read_text())
    with path.open("a") as file:
        file.write(json.dumps({**line, "seed": 3, "correct": [6, *line["correct"][1:]]}) + "\n")
    found = Journal(path)
    kept = found.get("key", "ridge", 0, 1)
    np.testing.assert_array_equal(kept.contributions, cell.contributions)
    np.testing.assert_array_equal(kept.shifted, cell.shifted)
    assert kept.besides == {"rmse": 2.0}
    assert found.get("key", "ridge", 3, 1) is None


# The other source


def test_the_other_source_has_the_same_roles(album):
    columns, labels, number, groups = made_up()
    others = made_up(8, 30)
    fingerprint = album.write("zoo", columns, [None] * COUNT)
    ids = [*(f"{row}.png" for row in range(4)), *(f"away-{row}.png" for row in range(4, 30))]
    album.write("away", others[0], [None] * 30, ids=ids)
    mine, theirs = (
        table(labels, number, groups),
        table(*others[1:3], np.array([f"q{row}" for row in range(30)]), "away-"),
    )
    given = album.study(
        "zoo", fingerprint, COLUMNS, shifted="away", heads=("ridge",), target_type="continuous", target="age", folds=3,
        labels=pa.concat_tables([mine, theirs]),
    )  # fmt: skip
    there = given.elsewhere
    assert there.twins == 4
    assert there.images.targets[4:] == pytest.approx(others[2][4:])
    series = measured(given, Journal(album.store.path / "journal.jsonl"))[1]
    for fold, cell, unseen in zip(given.folds, series.cells, there.unseen, strict=True):
        assert np.isfinite(cell.shifted).tolist() == unseen.tolist()
        assert not set(given.images.ids[fold.train]) & set(there.images.ids[unseen])
    result = answers.results(given, [series])[1]
    assert (result["tested_on"], len(result["cells"])) == ("shifted", 3)
    assert result["r2"] == pytest.approx(np.mean(result["cells"]))


def test_images_of_a_group_that_trains_are_not_tested(album):
    columns, labels, number, groups = made_up()
    fingerprint = album.write("zoo", columns, [None] * COUNT)
    others = made_up(9, 12)
    album.write("away", others[0], [None] * 12, ids=[f"away-{row}.png" for row in range(12)])
    theirs = table(*others[1:3], np.array(["p0"] * 6 + ["new"] * 6), "away-")
    both = pa.concat_tables([table(labels, number, groups), theirs])
    path = album.store.path.parent / "groups.csv"
    rows = zip(both["id"].to_pylist(), both["group"].to_pylist(), strict=True)
    path.write_text("id,group\n" + "".join(f"{name},{group}\n" for name, group in rows))
    given = album.study(
        "zoo", fingerprint, COLUMNS, shifted="away", target_type="multilabel", multilabel=tuple(NAMES), folds=3,
        heads=("logistic",), labels=both, group=str(path),
    )  # fmt: skip
    assert given.elsewhere.grouped == 6
    for fold, unseen in zip(given.folds, given.elsewhere.unseen, strict=True):
        assert unseen[:6].tolist() == ["p0" not in given.images.groups[fold.train]] * 6
        assert unseen[6:].all()


# What cannot be


def test_labels_that_lack_a_side_are_left_out_and_said(album):
    columns, labels, number, groups = made_up()
    labels[:, 1] = 0
    labels[5, 1] = 1
    fingerprint, said = album.write("zoo", columns, [None] * COUNT), []
    given = album.study(
        "zoo", fingerprint, COLUMNS, labels=table(labels, number, groups), target_type="multilabel",
        multilabel=tuple(NAMES), say=said.append,
    )  # fmt: skip
    assert list(given.classes) == ["big", "soft"]
    assert given.left_out["labels"] == 1
    assert given.truth.shape == (len(given.images), 2)
    assert any("1 label of 3 left out, fewer than 2 images with them, or without: red" in line for line in said)
    with pytest.raises(UsageError, match="none of the 1 labels of dataset zoo has 2 images"):
        album.study(
            "zoo",
            fingerprint,
            COLUMNS,
            labels=table(labels, number, groups),
            target_type="multilabel",
            multilabel=("red",),
        )
    same = table(labels, np.full(COUNT, 4.0), groups)
    with pytest.raises(UsageError, match=r"the 72 numbers of dataset zoo are all the same, 4"):
        album.study("zoo", fingerprint, COLUMNS, labels=same, target_type="continuous", target="age")


def test_heads_must_learn_what_is_asked():
    assert ComparisonOptions(target="age").families == ("ridge",)
    assert ComparisonOptions(multilabel=("a",)).families == ("logistic",)
    assert ComparisonOptions().families == ("logistic",)
    with pytest.raises(UsageError, match=r"head 'logistic' learns multiclass.* targets, not continuous ones"):
        ComparisonOptions(target="age", heads=("logistic",))
    with pytest.raises(UsageError, match="two kinds of target"):
        ComparisonOptions(target="age", multilabel=("a",))
