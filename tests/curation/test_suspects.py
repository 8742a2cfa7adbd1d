"""Labels that look wrong: those that were planted are found, and no head judges what it, or a copy of it, has learned from."""

import csv
import gzip
import json
import sys
import time
from importlib import resources

import numpy as np
import pytest

from featurepipe.curation import suspects as module
from featurepipe.curation.suspects import find_suspects, labels, labels_text
from featurepipe.errors import UsageError
from featurepipe.heads import BlockLogisticRegression, BlockScaler, make_head


def idx(name):
    """An array of the bundled images of Fashion-MNIST."""
    content = gzip.decompress((resources.files("featurepipe") / "data" / name).read_bytes())
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, 4 + 4 * content[3], 4)]
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)


def gradients(images):
    """Histograms of the directions of gradients in 7 x 7 cells, and their mean brightness."""
    pixels = images.astype("f4") / 255
    down, right = np.gradient(pixels, axis=(1, 2))
    direction = ((np.arctan2(down, right) + np.pi) / (2 * np.pi) * 8).astype(int) % 8
    cells = [(np.hypot(down, right) * (direction == one)).reshape(-1, 7, 4, 7, 4).sum((2, 4)) for one in range(8)]
    cells.append(pixels.reshape(-1, 7, 4, 7, 4).mean((2, 4)))
    return np.sqrt(np.stack(cells, -1).reshape(len(images), -1))


def test_planted_wrong_labels_of_fashion_mnist_are_found(pile):
    images, truth = idx("train-images-idx3-ubyte.gz"), idx("train-labels-idx1-ubyte.gz").astype(int)
    rng = np.random.default_rng(0)
    wrong = rng.choice(len(truth), len(truth) // 20, replace=False)
    given = truth.copy()
    given[wrong] = (given[wrong] + rng.integers(1, 10, len(wrong))) % 10
    values = pile.add_rows([f"{n}.png" for n in range(len(truth))], gradients(images))
    for number, name in enumerate(values):
        pile.images[name]["label"] = str(given[number])
    pile.night({"b:gap": values})
    found = find_suspects(pile.store.features("pile"))
    hit = np.isin(found.rows, wrong)
    assert hit.sum() / len(wrong) >= 0.75  # recall
    assert hit[: len(wrong)].mean() >= 0.5  # precision of as many as were planted, ten times that of chance
    assert hit[:20].mean() >= 0.8
    assert len(found.rows) < 0.2 * len(truth)
    right = [suggested == str(truth[row]) for row, suggested in zip(found.rows, found.suggested, strict=True)]
    assert np.mean(np.array(right)[hit]) >= 0.8


@pytest.fixture
def blobs(pile):
    """Three far classes of 40 images; five of them have the label of another class, and one class has a single image."""
    rng = np.random.default_rng(1)
    kinds = np.repeat(np.arange(3), 40)
    values = 8 * np.eye(3)[kinds] + rng.normal(size=(120, 3))
    rows = pile.add_rows([f"{n}.png" for n in range(120)], values)
    for number, name in enumerate(rows):
        pile.images[name]["label"] = "abc"[kinds[number]]
    for number in (3, 17, 50, 77, 110):
        pile.images[f"{number}.png"]["label"] = "abc"[(kinds[number] + 1) % 3]
    rows |= pile.add_rows(["alone.png", "without.png"], np.array([[20.0, 20, 20], [0, 8, 0]]))
    pile.images["alone.png"]["label"] = "d"
    pile.night({"b:gap": rows})
    return pile


def test_the_file_holds_every_image_and_is_handed_back_corrected(blobs, tmp_path):
    found = labels(blobs.store, to=tmp_path / "labels.csv", silent=True)
    planted = {
        "3.png": ("b", "a"), "17.png": ("b", "a"), "50.png": ("c", "b"), "77.png": ("c", "b"), "110.png": ("a", "c"),
    }  # fmt: skip
    said = {suspect["id"]: (suspect["given"], suspect["suggested"]) for suspect in found["suspects"]}
    assert said.items() <= planted.items()
    count = len(said)
    assert count >= 4  # cleanlab estimates how many there are
    assert (found["images"], found["unlabelled"], found["unchecked"], found["count"]) == (120, 1, 1, count)
    assert "no other image, or group, has the same" in found["warnings"][0]
    assert [s["score"] for s in found["suspects"]] == sorted(s["score"] for s in found["suspects"])
    rows = list(csv.DictReader((tmp_path / "labels.csv").read_text().splitlines()))
    assert len(rows) == 122
    assert [row["suspect"] for row in rows[:6]] == ["true"] * count + ["false"] * (6 - count)
    text = (tmp_path / "labels.csv").read_text()
    for suspect in found["suspects"]:
        text = text.replace(f'"{suspect["id"]}","{suspect["given"]}"', f'"{suspect["id"]}","{suspect["suggested"]}"')
    (tmp_path / "corrected.csv").write_text(text)
    again = labels(blobs.store, labels=tmp_path / "corrected.csv", silent=True)
    assert {suspect["id"] for suspect in again["suspects"]} <= planted.keys() - said.keys()
    assert (again["images"], again["unlabelled"]) == (120, 1)
    assert f"{count} of 120 labels look wrong" in labels_text(found)
    json.dumps(found, allow_nan=False)


def test_of_a_split_the_file_holds_the_other_images_as_well(blobs, tmp_path):
    """Else whoever hands it back to train would have no test images left."""
    for number in range(120):
        blobs.images[f"{number}.png"]["split"] = "test" if number % 4 == 1 else "train"
    blobs.snapshot(blobs.store.new_run_id())
    found = labels(blobs.store, split="train", to=tmp_path / "labels.csv", silent=True)
    assert found["images"] == 90
    suspects = {suspect["id"] for suspect in found["suspects"]}
    assert suspects <= {"3.png", "50.png", "110.png"}
    rows = list(csv.DictReader((tmp_path / "labels.csv").read_text().splitlines()))
    assert len(rows) == 122
    assert {row["id"] for row in rows if row["suspect"] == "true"} == suspects


def test_a_class_that_no_head_has_seen_is_unchecked_not_suspect(blobs):
    blobs.add(
        "3.png", name="copy.png", label="e"
    )  # the only one of its class, in the fold of the image that it is a copy of
    blobs.snapshot(blobs.store.new_run_id())
    found = labels(blobs.store, silent=True)
    assert "copy.png" not in {suspect["id"] for suspect in found["suspects"]}
    assert (found["images"], found["unchecked"]) == (120, 2)


def test_names_that_are_formulas_come_back_as_they_were(blobs, tmp_path):
    names = {"a": "+a", "b": "=b", "c": "c"}
    for image in blobs.images.values():
        image["label"] = names.get(image["label"], image["label"])
    blobs.images["-1.png"] = blobs.images.pop("1.png")
    blobs.snapshot(blobs.store.new_run_id())
    labels(blobs.store, to=tmp_path / "labels.csv", silent=True)
    assert '"\'+a"' in (tmp_path / "labels.csv").read_text()
    features = blobs.store.features("pile")
    handed_back = features.with_labels(tmp_path / "labels.csv")
    assert handed_back.labels.tolist() == features.labels.tolist()


def test_the_page_shows_suspects_with_their_neighbours(blobs, tmp_path):
    found = labels(blobs.store, to=[tmp_path / "page.html"], limit=2, silent=True)
    assert "... 2 more; list more of them with --limit N, or write all of them, to be corrected: --to" in labels_text(
        found
    )
    page = (tmp_path / "page.html").read_text()
    assert page.count("perhaps: ") == 2
    assert "labels of 121 images of pile look wrong" in page
    assert "The score is the probability that was given to the label as it is: the lower, the more suspect." in page
    assert "Distances are cosine distances" in page
    assert "The first 2 are shown" in page


def test_copies_and_groups_are_judged_by_heads_that_have_seen_neither(blobs, monkeypatch):
    for number in range(0, 120, 2):
        blobs.images[f"{number}.png"]["group"] = blobs.images[f"{number + 1}.png"]["group"] = f"p{number}"
    blobs.add("3.png", name="copy.png", label="b")
    blobs.snapshot(blobs.store.new_run_id())
    told, judged, fit, judge = [], [], module.fit_path, module._out_of_fold

    def watched(*args, folds, **options):
        told.extend(folds)
        return fit(*args, folds=folds, **options)

    monkeypatch.setattr(module, "fit_path", watched)
    monkeypatch.setattr(module, "_out_of_fold", lambda known, *args: judged.append(known) or judge(known, *args))
    found = labels(blobs.store, group="patient", silent=True)
    assert {suspect["id"] for suspect in found["suspects"]} >= {"3.png", "copy.png"}
    [known] = judged
    units = [{key, group} - {None} for key, group in zip(known.keys64.tolist(), known.groups.tolist(), strict=True)]
    assert len(told) == 5
    for learned in told:
        train, test = (set().union(*(units[row] for row in np.flatnonzero(side))) for side in (learned, ~learned))
        assert len(test) > 20
        assert not train & test


def test_each_image_is_judged_as_by_a_head_fitted_on_the_other_folds_alone(pile):
    """Scaled by all rows and with curvature measured once, probabilities are those of separate fits, and so are the suspects."""
    images, truth = idx("train-images-idx3-ubyte.gz"), idx("train-labels-idx1-ubyte.gz").astype(int)
    wrong = np.random.default_rng(0).choice(len(truth), len(truth) // 20, replace=False)
    truth[wrong] = (truth[wrong] + 3) % 10
    values = pile.add_rows([f"{n}.png" for n in range(len(truth))], gradients(images))
    for number, name in enumerate(values):
        pile.images[name]["label"] = str(truth[number])
    pile.night({"b:gap": values})
    features = pile.store.features("pile")
    codes = features.codes()
    fold = module.dealt(features, codes, np.arange(len(codes)), folds=5, seed=0)
    together = module._out_of_fold(features, features, codes, fold, 10)
    apart, scaled_apart = np.empty_like(together), np.empty_like(together)
    scaler, C = BlockScaler().fit(features), module._strength(1280)
    for number in range(5):
        train, test = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        ready = [scaler.transform(features.take(rows)) for rows in (train, test)]
        head = BlockLogisticRegression(C=C, tol=1e-7).fit(ready[0], codes[train])
        apart[test] = head.predict_proba(ready[1])
        head = make_head("logistic", C=C, out_of_core=True).fit(features.take(train), codes[train])
        scaled_apart[test] = head.predict_proba(features.take(test))
    np.testing.assert_allclose(together.sum(axis=1), 1)
    np.testing.assert_allclose(together, apart, atol=2e-2)
    (rows, score), (others, other), (before, _) = (module._confident(codes, p) for p in (together, apart, scaled_apart))
    assert len(rows) > 150
    assert len(np.intersect1d(rows, others)) >= 0.99 * max(len(rows), len(others))
    place = {row: number for number, row in enumerate(others.tolist())}
    assert max(abs(place[row] - number) for number, row in enumerate(rows[:50].tolist())) <= 2  # where scores are equal
    np.testing.assert_allclose(score[:20], other[:20], rtol=0.05)
    assert len(np.intersect1d(rows, before)) >= 0.97 * max(len(rows), len(before))


def test_several_labels_are_checked_one_by_one_and_numbers_by_their_residual(blobs, tmp_path):
    rng = np.random.default_rng(2)
    names = [f"{n}.png" for n in range(120)]
    warm = np.repeat([1, 0, 1], 40)
    age = np.repeat([10.0, 30, 50], 40) + rng.normal(size=120)
    warm[[5, 60]] = [0, 1]
    age[90] = 12
    lines = ["id,warm,first,age"]
    lines += [f"{name},{warm[n]},{int(n < 40)},{age[n]:.6f}" for n, name in enumerate(names)]
    (tmp_path / "more.csv").write_text("\n".join(lines))
    found = labels(
        blobs.store, labels=tmp_path / "more.csv", multilabel=["warm", "first"], to=tmp_path / "x.csv", silent=True
    )
    said = {(s["id"], s["label"]): (s["given"], s["suggested"]) for s in found["suspects"]}
    assert said.items() <= {("5.png", "warm"): ("absent", "present"), ("60.png", "warm"): ("present", "absent")}.items()
    assert said
    rows = list(csv.DictReader((tmp_path / "x.csv").read_text().splitlines()))
    assert (rows[0]["warm"], rows[0]["first"], rows[0]["suggested"]) in {
        ("0", "1", "warm present"),
        ("1", "0", "warm absent"),
    }
    again = labels(blobs.store, labels=tmp_path / "x.csv", multilabel=["warm", "first"], silent=True)
    assert again["suspects"] == found["suspects"]
    several = f"{found['count']} labels of {found['images']} images look wrong"
    assert labels_text(found).startswith(f"pile: {several}, by ")
    page = tmp_path / "x.html"
    number = labels(blobs.store, labels=tmp_path / "more.csv", target="age", to=page, silent=True)
    assert labels_text(number).startswith(f"pile: {number['count']} of {number['images']} numbers look wrong, by ")
    assert "Suspect numbers" in page.read_text()
    assert "with their numbers." in page.read_text()
    assert number["suspects"][0]["id"] == "90.png"
    assert abs(float(number["suspects"][0]["suggested"]) - 50) < 8
    assert number["kind"] == "continuous"


@pytest.mark.parametrize("names", [("red", "round"), ("red, dark", "none"), ("a|b", "[c]")])
def test_several_labels_of_one_column_mean_the_same_when_they_are_handed_back(blobs, tmp_path, names):
    rows = {
        f"{n}.png": [name for name, has in zip(names, (n % 40 < 20, n < 40), strict=True) if has] for n in range(110)
    }
    with (tmp_path / "tags.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "tags"), *((id_, json.dumps(tags)) for id_, tags in rows.items())])
    options = {"multilabel": "tags", "limit": None, "silent": True}
    found = labels(blobs.store, labels=tmp_path / "tags.csv", to=tmp_path / "x.csv", **options)
    assert (found["images"], found["unlabelled"] > 0) == (110, True)
    again = labels(blobs.store, labels=tmp_path / "x.csv", **options)
    for name in ("images", "unlabelled", "suspects"):
        assert again[name] == found[name]


def test_the_other_columns_that_were_asked_for_are_handed_back_as_well(blobs, tmp_path):
    ids = blobs.store.features("pile").ids
    kinds = {f"{n}.png": "abc"[n // 40] for n in range(120)}
    lines = [
        f"{id_},{kinds.get(id_, '')},p{n // 2},{'test' if n % 8 == 7 else 'train'},{1 + n % 2}"
        for n, id_ in enumerate(ids)
    ]
    (tmp_path / "mine.csv").write_text("\n".join(["id,kind,patient,part,w", *lines]))
    options = {
        "label": "kind",
        "group": "patient",
        "split_column": "part",
        "weight": "w",
        "split": "train",
        "silent": True,
    }
    found = labels(blobs.store, labels=tmp_path / "mine.csv", to=tmp_path / "x.csv", **options)
    rows = {row["id"]: row for row in csv.DictReader((tmp_path / "x.csv").read_text().splitlines())}
    before = {row["id"]: row for row in csv.DictReader((tmp_path / "mine.csv").read_text().splitlines())}
    assert {id_: float(row.pop("w")) for id_, row in rows.items()} == {
        id_: float(row.pop("w")) for id_, row in before.items()
    }
    assert all(rows[id_].items() >= row.items() for id_, row in before.items())
    assert rows.keys() == before.keys()
    again = labels(blobs.store, labels=tmp_path / "x.csv", **options)
    assert (again["images"], again["suspects"]) == (found["images"], found["suspects"])


def test_one_label_of_yes_and_no_means_the_same_when_it_is_handed_back(blobs, tmp_path):
    (tmp_path / "warm.csv").write_text("id,Warm\n" + "".join(f"{n}.png,{int(n < 40)}\n" for n in range(110)))
    options = {"multilabel": "warm", "silent": True}
    found = labels(blobs.store, labels=tmp_path / "warm.csv", to=tmp_path / "x.csv", **options)
    again = labels(blobs.store, labels=tmp_path / "x.csv", **options)
    assert (again["images"], again["suspects"]) == (found["images"], found["suspects"])
    assert again["images"] == 110


def test_mistakes_are_named(pile):
    pile.add_rows([f"{n}" for n in range(12)], np.eye(12))
    pile.night({"b:gap": {f"{n}": np.eye(12)[n] for n in range(12)}})
    with pytest.raises(UsageError, match="0 labelled images are too few to be judged in 5 parts"):
        labels(pile.store, silent=True)
    with pytest.raises(UsageError, match="every label of dataset pile is 'x'"):
        labels(pile.store, labels={f"{n}": "x" for n in range(12)}, silent=True)


@pytest.mark.parametrize("dry_run", [True, False])
def test_without_cleanlab_nothing_is_fitted_and_what_to_install_is_said(blobs, monkeypatch, dry_run):
    monkeypatch.setitem(sys.modules, "cleanlab.filter", None)
    monkeypatch.setattr(module, "_out_of_fold", None)
    with pytest.raises(UsageError, match=r"checked with cleanlab; run: pip install 'featurepipe\[labels\]'"):
        labels(blobs.store, dry_run=dry_run, silent=True)


def test_the_command_prints_one_document(blobs, cli):
    answer = cli("labels", blobs.store.path, "--json", "--quiet", "--limit", "1")
    found = json.loads(answer.out)
    assert (answer.code, found["kind"], len(found["suspects"])) == (0, "multiclass", 1)


def test_a_dry_run_says_what_would_be_fitted_and_writes_nothing(blobs, tmp_path, cli):
    before = sorted(blobs.store.path.rglob("*"))
    answer = cli("labels", blobs.store.path, "--folds", "4", "--dry-run", "--to", tmp_path / "labels.csv", "--json")
    found = json.loads(answer.out)
    labels_given = blobs.store.features("pile").labels
    expected = {name: int((labels_given == name).sum()) for name in "abcd"}
    assert {name: found[name] for name in ("images", "unlabelled", "classes", "folds", "fits", "rows", "width", "file")} == {
        "images": 121, "unlabelled": 1, "classes": expected, "folds": 4, "fits": 4, "rows": 90, "width": 3, "file": None,
    }  # fmt: skip
    assert 0 < found["expected_seconds"] < 60
    text = cli("labels", blobs.store.path, "--dry-run").out
    assert "4 classes: a (" in text
    assert "5 fits on 96 x 3 features, in 5 folds: about " in text
    assert text.endswith("dry run: nothing was checked or written\n")
    assert not (tmp_path / "labels.csv").exists()
    assert sorted(blobs.store.path.rglob("*")) == before


def test_what_loads_with_the_first_fit_is_not_taken_for_the_time_of_each(blobs, monkeypatch):
    monkeypatch.setattr("featurepipe.training.cost.LONG_PILOT", 0.3)
    fitted = []

    def fit(features, values, codes, fold, classes):
        fitted.append(len(codes))
        time.sleep(0.5 if len(fitted) == 1 else 0.0)

    monkeypatch.setattr(module, "_out_of_fold", fit)
    told = module.planned(blobs.store.features("pile").select(labelled=True))
    assert told["expected_seconds"] < 10  # not 5 fits of 0.5 s, each times the rows of all by those of a few: 20 s
    assert fitted[0] <= 6 < fitted[1]  # of four classes


JUDGED = {
    600: (200, 1.968, 2.073), 1_500: (500, 2.092, 2.947), 4_000: (1_333, 2.384, 2.5), 12_000: (4_000, 2.351, 2.69),
    30_000: (10_000, 2.82, 6.212), 70_000: (12_000, 3.27, 15.068),
}  # fmt: skip
"""Processor seconds by images of Fashion-MNIST (10 classes, 1,280 values): how many are tried, what the five fits on these take,
and what those on all take, as recorded on one core."""


@pytest.mark.parametrize("images", JUDGED)
def test_the_time_of_a_check_is_right_within_a_factor_of_one_and_a_half(monkeypatch, blobs, images):
    tried, some, whole = JUDGED[images]

    def seconds_of(fit, count):
        assert count == tried
        return some

    features = blobs.store.features("pile").select(labelled=True).take(np.arange(images) % 100)
    monkeypatch.setattr(module, "_out_of_fold", lambda *_: None)
    monkeypatch.setattr(module, "seconds_of", seconds_of)
    assert whole / 1.5 <= module.planned(features)["expected_seconds"] <= whole * 1.5


def test_a_dry_run_counts_the_fits_of_each_label_and_those_to_numbers(pile):
    rng = np.random.default_rng(0)
    rows = pile.add_rows([f"{n}" for n in range(40)], rng.normal(size=(40, 3)))
    pile.night({"b:gap": rows})
    features = pile.store.features("pile")
    several = np.where(np.arange(40)[:, None] % [2, 4, 40] == 0, 1.0, 0.0)
    several[1, 0] = np.nan
    told = module.planned(features.with_column("target", several, names=["x", "y", "z"]), folds=4)
    assert (told["classes"], told["fits"], told["rows"]) == ({"x": 20, "y": 10, "z": 1}, 12, 30)
    told = module.planned(features.with_column("target", rng.normal(size=40)), folds=2)
    assert (told["classes"], told["fits"], told["rows"]) == ({}, 2, 20)
    with pytest.raises(UsageError, match="too few to be judged in 30 parts"):
        module.planned(features.with_column("target", rng.normal(size=40)), folds=30)
