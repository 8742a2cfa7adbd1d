"""Drift from night to night: what is compared with what, and what is said of it."""

import json

import numpy as np
import pyarrow as pa
import pytest

from featurepipe.errors import BundleError, StoreError, UsageError
from featurepipe.heads.statistics.comparison import holm
from featurepipe.monitoring.drift import drift
from featurepipe.monitoring.standing_warnings import Thresholds
from featurepipe.monitoring.text import drift_text
from featurepipe.training.train import train


def names(start, count, kind="image"):
    return [f"{kind}-{number:04d}.png" for number in range(start, start + count)]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def nights(pile, rng):
    """A first night of 200 images, a second with 60 more of the same kind; column ``b:gap``."""
    first = pile.night({"b:gap": pile.add_rows(names(0, 200), rng.normal(size=(200, 8)))})
    second = pile.night({"b:gap": pile.add_rows(names(200, 60), rng.normal(size=(60, 8)))})
    return pile, first, second


def test_a_night_like_the_one_before_is_no_drift(nights):
    pile, first, second = nights
    found = drift(pile.store, silent=True)
    assert (found["dataset"], found["reference"], found["snapshot"]) == ("pile", first, second)
    assert found["images"] == {"reference": 200, "new": 60}
    assert (found["verdict"], found["exit_code"], found["warnings"], found["classes"]) == ("no drift", 0, [], None)
    [column] = found["columns"]
    assert (column["column"], column["compared"]) == ("b:gap", {"reference": 200, "new": 60})
    assert column["adjusted"] == column["p_value"] > 0.01
    assert column["effect"] < 0.3
    json.dumps(found, allow_nan=False)
    assert "no drift" in drift_text(found)


def test_a_shift_is_a_warning_or_drift_as_the_thresholds_say_and_names_images(pile, rng):
    pile.night({"b:gap": pile.add_rows(names(0, 200), rng.normal(size=(200, 8)))})
    values = rng.normal(1, 1, size=(50, 8))
    values[17] += 30
    pile.night({"b:gap": pile.add_rows(names(0, 50, "shifted"), values)})
    found = drift(pile.store, silent=True)
    assert (found["verdict"], found["exit_code"]) == ("warning", 0)
    [column] = found["columns"]
    assert column["adjusted"] < 0.001
    assert column["auc"] > 0.9
    assert column["farthest"][0] == "shifted-0017.png"
    assert set(column["typical"]) < set(names(0, 50, "shifted"))
    text = drift_text(found)
    assert "warning" in text
    assert "shifted-0017.png" in text
    asked_for = {**column, "column": "flatten:gap", "bottleneck": "flatten"}
    lines = drift_text({**found, "columns": [asked_for]}).splitlines()
    assert any(line.startswith("bottleneck (flatten:gap) ") for line in lines)
    assert any(line.startswith("by bottleneck (flatten:gap), farthest from the reference: ") for line in lines)
    failed = drift(pile.store, fail=0.001, silent=True)
    assert (failed["verdict"], failed["exit_code"]) == ("drift", 1)


def test_effect_is_in_spreads_of_the_reference(pile, rng):
    pile.night({"b:gap": pile.add_rows(names(0, 600), rng.normal(size=(600, 20)) * 5)})
    pile.night({"b:gap": pile.add_rows(names(600, 600), rng.normal(size=(600, 20)) * 5 + 2.5)})
    [column] = drift(pile.store, silent=True)["columns"]
    assert column["effect"] == pytest.approx(0.5, rel=0.06)


def test_copies_and_images_that_were_there_count_once_and_rejects_not_at_all(pile, rng):
    pile.night({"b:gap": pile.add_rows(names(0, 30), rng.normal(size=(30, 4)))})
    fresh = pile.add_rows(names(30, 12), rng.normal(size=(12, 4)))
    for number in range(40):
        pile.add("image-0033.png", name=f"copy-{number}.png")  # of a new image
        pile.add("image-0001.png", name=f"old-{number}.png")  # of an old one
    pile.add("broken", name="broken.png")
    pile.night({"b:gap": fresh})
    found = drift(pile.store, silent=True)
    assert found["images"] == {"reference": 30, "new": 12}
    assert found["columns"][0]["compared"] == {"reference": 30, "new": 12}


def test_the_reference_is_the_previous_the_first_or_a_named_snapshot(pile, rng):
    runs = []
    for night in range(3):
        rows = pile.add_rows(names(100 * night, 40), rng.normal(size=(40, 4)))
        runs.append(pile.night({"b:gap": rows}))
    counted = {}
    for reference in ("previous", "first", runs[0]):
        found = drift(pile.store, reference=reference, silent=True)
        counted[reference] = (found["reference"], found["images"]["reference"], found["images"]["new"])
    assert counted == {"previous": (runs[1], 80, 40), "first": (runs[0], 40, 80), runs[0]: (runs[0], 40, 80)}
    earlier = drift(pile.store, snapshot=runs[1], silent=True)
    assert (earlier["reference"], earlier["snapshot"], earlier["images"]["new"]) == (runs[0], runs[1], 40)
    with pytest.raises(UsageError, match="that snapshot itself"):
        drift(pile.store, reference=runs[2], silent=True)
    with pytest.raises(UsageError, match="a later one"):
        drift(pile.store, reference=runs[2], snapshot=runs[0], silent=True)
    with pytest.raises(UsageError, match="unknown reference 'prevous' in dataset pile; nearest: previous"):
        drift(pile.store, reference="prevous", silent=True)
    with pytest.raises(UsageError, match="unknown snapshot '2020'"):
        drift(pile.store, snapshot="2020", silent=True)
    with pytest.raises(UsageError, match="unknown dataset 'heap'"):
        drift(pile.store, dataset="heap", silent=True)


def test_few_images_and_a_first_night_are_said_and_are_no_error(pile, rng):
    pile.night({"b:gap": pile.add_rows(names(0, 50), rng.normal(size=(50, 4)))})
    alone = drift(pile.store, silent=True)
    assert (alone["verdict"], alone["reference"], alone["images"]) == (
        "too few images",
        None,
        {"reference": 0, "new": 0},
    )
    assert "first snapshot" in alone["warnings"][0]
    pile.night({"b:gap": pile.add_rows(names(50, 9), rng.normal(9, 1, size=(9, 4)))})
    few = drift(pile.store, fail=0.001, silent=True)
    assert (few["verdict"], few["exit_code"], few["images"]) == ("too few images", 0, {"reference": 50, "new": 9})
    assert few["columns"] == []
    assert "9 images are new" in few["warnings"][0]
    assert "too few images" in drift_text(few)
    pile.night({"b:gap": pile.add_rows(["one-more.png"], rng.normal(9, 1, size=(1, 4)))})
    assert drift(pile.store, reference="first", silent=True)["verdict"] == "warning"


def test_every_column_of_every_space_is_tested_and_p_values_are_adjusted(pile, rng):
    before, after = names(0, 100), names(100, 50)
    for name in before:
        pile.add(name)
    other = {"dtype": "float32", "net": "other"}

    def rows(which, shift=0.0):
        return dict(zip(which, rng.normal(shift, 1, size=(len(which), 5)), strict=True))

    pile.night({"a:gap": rows(before), "b:gap": rows(before)})
    pile.night({"c:gap": rows(before)}, other)
    for name in after:
        pile.add(name)
    pile.night({"a:gap": rows(after, 2), "old:gap": rows(before)})
    pile.night({"b:gap": rows(after)})
    pile.night({"c:gap": rows(after)}, other)
    found = drift(pile.store, reference="first", silent=True)
    spaces = {column["column"]: column["space"] for column in found["columns"]}
    assert sorted(spaces) == ["a:gap", "b:gap", "c:gap"]  # old:gap is of no new image
    assert spaces["a:gap"] == spaces["b:gap"] != spaces["c:gap"]
    p_values = {column["column"]: column["p_value"] for column in found["columns"]}
    adjusted = {column["column"]: column["adjusted"] for column in found["columns"]}
    assert adjusted["a:gap"] == pytest.approx(3 * p_values["a:gap"])
    assert (adjusted["a:gap"] < 0.001, found["verdict"]) == (True, "warning")
    alone = drift(pile.store, reference="first", columns=["bottleneck"], silent=True)
    assert [column["column"] for column in alone["columns"]] == ["b:gap"]
    assert alone["verdict"] == "no drift"
    of_one = drift(pile.store, reference="first", backbone=spaces["c:gap"], silent=True)
    assert [column["column"] for column in of_one["columns"]] == ["c:gap"]
    with pytest.raises(UsageError, match="unknown column 'd'"):
        drift(pile.store, reference="first", columns=["c", "d"], silent=True)
    with pytest.raises(UsageError, match=r"columns=\(\) must not be empty"):
        drift(pile.store, reference="first", columns=[], silent=True)
    named = drift(pile.store, reference="first", columns=["a", "old"], silent=True)
    assert [column["column"] for column in named["columns"]] == ["a:gap"]
    assert "old:gap" in named["warnings"][0]
    assert "0 of 50 of the new images have them" in named["warnings"][0]


def test_new_images_without_features_are_an_error_that_says_what_to_run(pile, rng):
    pile.night({"b:gap": pile.add_rows(names(0, 20), rng.normal(size=(20, 4)))})
    for name in names(20, 20):
        pile.add(name)
    pile.night()
    with pytest.raises(StoreError, match="none of the 20 new images of pile has features; run: featurepipe extract"):
        drift(pile.store, silent=True)
    with pytest.raises(StoreError, match="b:gap"):
        drift(pile.store, columns=["b"], silent=True)


def test_images_whose_features_are_gone_are_left_out(pile, rng):
    rows = pile.add_rows(names(0, 40), rng.normal(size=(40, 4)))
    for name in names(0, 15):
        rows.pop(name)
    pile.night({"b:gap": rows})
    pile.night({"b:gap": pile.add_rows(names(40, 20), rng.normal(size=(20, 4)))})
    assert drift(pile.store, silent=True)["columns"][0]["compared"] == {"reference": 25, "new": 20}


def test_predicted_classes_are_compared_where_there_is_a_bundle(zoo):
    zoo.write(zoo.images("train"))
    bundle = zoo.bundle(zoo.images("train"))
    zoo.write(zoo.images("train") + [image for image in zoo.images("new") if image.label != "emu"])
    found = drift(zoo.store, bundle=bundle, silent=True)
    classes = found["classes"]
    assert classes["columns"] == ["a:gap", "b:gap"]
    assert classes["compared"] == {"reference": 120, "new": 80}
    assert classes["p_value"] < 0.01
    assert classes["adjusted"] == pytest.approx(holm([c["p_value"] for c in (*found["columns"], classes)])[-1])
    assert classes["total_variation"] > 2 * classes["by_chance"]
    emu = classes["classes"][0]
    assert (emu["class"], len(classes["classes"])) == ("emu", 3)
    features = zoo.store.features("zoo", node=["a:gap", "b:gap"])
    predicted = bundle.predict(features)
    old = np.array([not name.startswith("new") for name in features.ids])
    assert emu["reference"] == pytest.approx((predicted[old] == "emu").mean())
    assert emu["new"] == pytest.approx((predicted[~old] == "emu").mean())
    for share in ("reference", "new"):
        assert sum(one[share] for one in classes["classes"]) == pytest.approx(1)
    json.dumps(found, allow_nan=False)
    assert "emu" in drift_text(found)
    zoo.write([*zoo.images("train"), *zoo.images("same")], name="like")
    assert drift(zoo.store, dataset="zoo", silent=True)["classes"] is None


def test_a_bundle_of_another_space_is_refused_by_name(zoo):
    zoo.write(zoo.images("train"))
    zoo.write(zoo.images("train") + zoo.images("new"))
    foreign = zoo.bundle(zoo.images("train"), {"dtype": "float32", "net": "other"})
    with pytest.raises(BundleError, match="the bundle is for features of the space tiny-"):
        drift(zoo.store, bundle=foreign, silent=True)


def test_the_answer_follows_from_the_seed(nights):
    pile, _, _ = nights
    first, second = (drift(pile.store, seed=3, silent=True) for _ in range(2))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_thresholds_that_cannot_be_are_refused(nights):
    pile, _, _ = nights
    with pytest.raises(UsageError, match="warn 0 must be a p-value between 0 and 1"):
        drift(pile.store, warn=0, silent=True)
    with pytest.raises(UsageError, match=r"fail=0.05 is above warn=0.01"):
        drift(pile.store, fail=0.05, silent=True)
    with pytest.raises(UsageError, match=r"2e-06 and more can be tested"):
        drift(pile.store, fail=1e-8, silent=True)


def test_permutations_let_the_least_adjusted_p_value_pass_the_lower_threshold():
    assert Thresholds(0.01, None).permutations(1) == 9_999
    assert Thresholds(0.01, 0.0001).permutations(3) == 59_999
    assert 3 / (59_999 + 1) < 0.0001
    assert Thresholds(0.01, 0.0001).verdict([0.5, 0.00005]) == "drift"
    assert Thresholds(0.01, 0.0001).verdict([0.5, 0.0005]) == "warning"
    assert Thresholds(0.01, 0.0001).verdict([0.5, 0.05]) == "no drift"


def test_holm_steps_down_and_never_exceeds_1():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def test_runs_of_jobs_stand_for_the_snapshots_of_their_extractions(nights):
    pile, first, second = nights
    pile.store.write_run({"run_id": "J1", "command": "run", "status": "done", "extractions": ["gone", first]})
    pile.store.write_run({"run_id": "J2", "command": "run", "status": "done", "extractions": [second]})
    pile.store.write_run({"run_id": "J3", "command": "run", "status": "failed", "extractions": []})
    found = drift(pile.store, snapshot="J2", reference="J1", silent=True)
    assert (found["reference"], found["snapshot"]) == (first, second)
    with pytest.raises(
        UsageError, match=f"run J3 \\(failed\\) has no snapshot of dataset pile; runs that have: {first}"
    ):
        drift(pile.store, reference="J3", silent=True)
    with pytest.raises(UsageError, match=r"cannot compare snapshot .* that snapshot itself"):
        drift(pile.store, snapshot=second, reference="J2", silent=True)


def test_one_new_image_is_one(nights):
    pile, *_ = nights
    pile.night({"b:gap": pile.add_rows(names(0, 1, "one"), np.ones((1, 8)))})
    [why] = drift(pile.store, silent=True)["warnings"]
    assert why.startswith("1 image is new since ")


def test_a_threshold_next_to_nothing_is_refused():
    from featurepipe.monitoring.standing_warnings import Thresholds

    with pytest.raises(UsageError, match=r"would take inf permutations; thresholds of 4e-06 and more"):
        Thresholds(1e-320, None).permutations(2)


@pytest.fixture
def patients(pile, rng):
    """40 patients of 5 images, and a second night of 10 patients, one of which has 50 images unlike all others."""

    def views(start, sizes):
        codes = np.repeat(np.arange(start, start + len(sizes)), sizes)
        levels = rng.normal(size=(len(sizes), 8))[codes - start]
        return codes, levels + 0.3 * rng.normal(size=(len(codes), 8))

    old, before = views(0, [5] * 40)
    pile.night({"b:gap": pile.add_rows(names(0, len(old)), before, [f"p{code}" for code in old])})
    new, after = views(100, [5] * 9 + [50])
    after[new == 109] += 4
    pile.night({"b:gap": pile.add_rows(names(500, len(new)), after, [f"p{code}" for code in new])})
    return pile


def test_a_new_patient_with_many_images_is_one_patient(patients):
    pile = patients
    found = drift(pile.store, group="patient", silent=True)
    assert found["groups"] == {"column": "patient", "reference": 40, "new": 10}
    assert (found["verdict"], found["warnings"], found["options"]["group"]) == ("no drift", [], "patient")
    assert "compared by groups (patient): 10 new against 40 of the reference" in drift_text(found)
    by_image = drift(pile.store, silent=True)
    assert (by_image["verdict"], by_image["groups"]) == ("warning", None)
    assert by_image["columns"][0]["farthest"][0] == found["columns"][0]["farthest"][0]
    with pytest.raises(UsageError, match="unknown column 'patent'; there is only patient"):
        drift(pile.store, group="patent", silent=True)


def test_groups_that_are_few_are_said_to_be_and_one_of_a_side_is_not_tested(pile, rng):
    groups = [f"p{row // 20}" for row in range(60)]
    pile.night({"b:gap": pile.add_rows(names(0, 60), rng.normal(size=(60, 8)), groups)})
    pile.night({"b:gap": pile.add_rows(names(60, 30), rng.normal(size=(30, 8)), ["p7"] * 15 + ["p8"] * 15)})
    found = drift(pile.store, group="patient", silent=True)
    assert found["verdict"] == "no drift"
    assert found["warnings"] == [
        "2 groups and 3 can be dealt in 10 ways: no adjusted p-value is below 0.1, so that nothing is warned of at 0.01"
    ]
    pile.night({"b:gap": pile.add_rows(names(90, 30), rng.normal(size=(30, 8)), ["p9"] * 30)})
    found = drift(pile.store, group="patient", silent=True)
    assert (found["verdict"], found["columns"], found["groups"]["new"]) == ("too few images", [], 1)
    assert found["warnings"][0].startswith("the 30 new images are of 1 group (patient), those of ")
    assert drift(pile.store, group="none", silent=True)["groups"] is None


def test_groups_that_one_side_lacks_are_refused(pile, rng):
    pile.night({"b:gap": pile.add_rows(names(0, 60), rng.normal(size=(60, 8)))})
    for row in list(pile.images):
        pile.images[row]["group"] = None
    groups = [f"p{row // 3}" for row in range(30)]
    pile.night({"b:gap": pile.add_rows(names(60, 30), rng.normal(size=(30, 8)), groups)})
    with pytest.raises(UsageError, match="extracted without further columns"):
        drift(pile.store, group="patient", silent=True)


def test_groups_come_from_a_file_for_both_sides(patients, tmp_path):
    pile = patients
    lines = [f"{name},{row['group']}" for name, row in pile.images.items()]
    (tmp_path / "groups.csv").write_text("\n".join(["id,group", *lines]))
    found = drift(pile.store, group=str(tmp_path / "groups.csv"), silent=True)
    assert found["groups"] == {"column": "group", "reference": 40, "new": 10}
    assert found["columns"] == drift(pile.store, group="patient", silent=True)["columns"]


@pytest.mark.parametrize("kind", ["classes", "labels", "numbers"])
def test_what_a_bundle_predicts_of_groups_is_dealt_by_groups(patients, kind, tmp_path):
    pile = patients
    features = pile.store.features("pile", node="b:gap")
    values = np.asarray(features.read())
    columns = {
        "classes": {"label": np.where(values[:, 0] > 1, "high", "low")},
        "labels": {name: (values[:, k] > 1).astype(int) for k, name in enumerate("abc")},
        "numbers": {"y": values[:, 0]},
    }[kind]
    roles = {"classes": {}, "labels": {"multilabel": "a,b,c"}, "numbers": {"target": "y"}}[kind]
    labels = pa.table({"id": list(features.ids), **columns})
    made = tmp_path / "bundle"
    train(pile.store, out=made, nodes="b:gap", head="ridge", labels=labels, **roles, silent=True)
    whole = drift(pile.store, group="patient", bundle=made, columns=["b:gap"], silent=True)
    alone = drift(pile.store, bundle=made, columns=["b:gap"], silent=True)
    assert alone[kind]["p_value"] < 0.001 < whole[kind]["p_value"]
    assert whole[kind]["compared"] == alone[kind]["compared"] == {"reference": 200, "new": 95}
    assert f"predicted {kind}" in drift_text(whole)
