"""Images that lie apart: those that were planted come first, by brute force the same, here and where rows are spread."""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from featurepipe.curation import outliers as module
from featurepipe.curation.outliers import find_outliers, outliers, outliers_text
from featurepipe.errors import UsageError
from featurepipe.heads.blocks import ArrayBlocks
from featurepipe.heads.row_shards import LocalRowShards
from featurepipe.monitoring.near import unit_vectors


def blobs(count=90, seed=0, width=6):
    """Three far clusters."""
    rng = np.random.default_rng(seed)
    kinds = np.arange(count) % 3
    return (6 * np.eye(width)[kinds] + 0.5 * rng.normal(size=(count, width))).astype("f4"), kinds


@pytest.fixture
def planted(pile):
    """Three clusters, two images far from all, one of each of two classes in the cluster of another, and a copy."""
    values, kinds = blobs()
    rows = pile.add_rows([f"{n}.png" for n in range(90)], values)
    for number, name in enumerate(rows):
        pile.images[name]["label"] = "abc"[kinds[number]]
    pile.images["3.png"]["label"] = "b"
    pile.images["7.png"]["label"] = "c"
    rows |= pile.add_rows(["far.png", "farther.png"], np.array([[0, 0, 0, 5, 1, 0], [0, 0, 0, 0, 0, -9.0]]))
    pile.images["far.png"]["label"] = "a"
    pile.add("far.png", name="copy-of-far.png", label="a")
    pile.night({"b:gap": rows})
    return pile


def brute(values, kth, distance, groups=None):
    x = values.astype(np.float64)
    if distance == "cosine":
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        apart = 1 - x @ x.T
    else:
        apart = np.linalg.norm(x[:, None] - x[None], axis=2)
    np.fill_diagonal(apart, np.inf)
    if groups is not None:
        apart[groups[:, None] != groups[None]] = np.inf
    return np.sort(apart, axis=1)[:, kth - 1]


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("by", ["all", "class"])
def test_the_distance_is_that_to_the_kth_nearest_by_brute_force(pile, distance, by):
    values, kinds = blobs(60)
    pile.night({"b:gap": pile.add_rows([f"{n}" for n in range(60)], values)})
    groups = kinds.astype(np.int64) if by == "class" else np.zeros(60, np.int64)
    features, every = pile.store.features("pile"), np.arange(60)
    expected = brute(values, 4, distance, groups)
    found = find_outliers(features, every, every, groups, neighbours=4, distance=distance)
    np.testing.assert_allclose(found.distance, expected[found.rows], atol=1e-5)
    medians = np.array([np.median(expected[groups == groups[row]]) for row in range(60)])
    np.testing.assert_allclose(found.score, (expected / medians)[found.rows], rtol=1e-3)
    logs = np.log(expected / medians)
    above = np.empty(60)
    for number in np.unique(groups):
        first, third = np.quantile(logs[groups == number], [0.25, 0.75])
        above[groups == number] = (logs[groups == number] - third) / (third - first)
    np.testing.assert_allclose(found.above, above[found.rows], rtol=0.02, atol=0.01)
    assert (np.diff(found.above) <= 0).all()
    assert (found.far == (found.above > 1.5)).all()
    assert by == "class" or (np.diff(found.score) <= 0).all()  # within a group the order is that of the distance


def test_what_was_planted_comes_first(planted, tmp_path):
    found = outliers(planted.store, neighbours=3, to=tmp_path / "far.parquet", silent=True)
    assert {one["id"] for one in found["outliers"][:2]} == {"far.png", "farther.png"}
    table = pq.read_table(tmp_path / "far.parquet")
    lower, upper = np.quantile(np.log(table["distance"]), [0.25, 0.75])
    is_far = np.log(table["distance"]) > upper + 1.5 * (upper - lower)
    assert table["outlier"].to_pylist() == is_far.tolist()
    assert is_far[:4].tolist() == [True, True, True, False]  # the third is the farthest of the clusters
    assert (found["count"], found["images"], found["copies"], found["since"]) == (3, 92, 1, None)
    assert table["rank"].to_pylist() == list(range(1, 93))
    assert table["id"].to_pylist()[:2] == [one["id"] for one in found["outliers"][:2]]
    assert "3 outliers of 92 images" in outliers_text(found)
    assert "none is an outlier; these lie farthest:" in outliers_text({**found, "count": 0})
    assert "none is an outlier" not in outliers_text(found)
    json.dumps(found, allow_nan=False)
    by_class = outliers(planted.store, by="class", neighbours=3, limit=3, silent=True)
    assert {one["id"] for one in by_class["outliers"]} == {"3.png", "7.png", "far.png"}
    assert (by_class["images"], by_class["unchecked"]) == (91, 1)
    assert "1 image could not be ranked: no class" in by_class["warnings"][0]


def test_an_outlier_lies_above_the_fence_of_the_logarithms_of_its_group():
    rng = np.random.default_rng(0)
    score, group = np.exp(rng.normal(size=3000) * np.repeat([0.2, 1.0, 0.0], 1000)), np.repeat([0, 1, 2], 1000)
    score[[5, 1005, 2005]] = np.exp([1.0, 1.0, 0.1])  # far among the first, usual among the second, far among equals
    far = module._above_usual(score, group) > module.FENCE
    assert far[[5, 1005, 2005]].tolist() == [True, False, True]
    for number in range(2):
        logs = np.log(score[group == number])
        lower, upper = np.sort(logs)[[249, 749]]
        assert set(np.flatnonzero(logs > upper + 1.5 * (upper - lower) + 0.01)) <= set(
            np.flatnonzero(far[group == number])
        )
        assert far[group == number].mean() == pytest.approx(0.0035, abs=0.004)  # of a normal distribution
    assert far[2000:].sum() == 1


def test_an_image_far_in_a_narrow_class_comes_before_the_usual_of_a_wide_one(pile, tmp_path):
    rng = np.random.default_rng(0)
    angles = 0.01 * rng.uniform(-1, 1, 40), [0.04], 2 + 0.02 * rng.normal(size=40) ** 3  # on a circle
    turned = np.concatenate(angles)
    rows = pile.add_rows([f"{n}.png" for n in range(81)], np.stack([np.cos(turned), np.sin(turned)], axis=1))
    for number, name in enumerate(rows):
        pile.images[name]["label"] = "narrow" if number <= 40 else "wide"
    pile.night({"b:gap": rows})
    files = tmp_path / "far.html", tmp_path / "far.csv"
    found = outliers(pile.store, by="class", limit=2, to=files, silent=True)
    rows = list(csv.DictReader(files[1].read_text().splitlines()))
    scores = [float(row["score"]) for row in rows]
    assert rows[0]["id"] == found["outliers"][0]["id"] == "40.png"
    assert [row["outlier"] for row in rows] == ["true"] * found["count"] + ["false"] * (81 - found["count"])
    assert max(scores[found["count"] :]) > scores[0]  # the usual of the other class are more times as far as usual
    text = outliers_text(found)
    assert re.search(r"40\.png +narrow .* outlier$", text, re.MULTILINE)
    assert f"... 79 more, all in {files[1]}" in text
    assert found["files"] == list(map(str, files))
    page = files[0].read_text()
    assert "1. 40.png: outlier" in page
    assert page.count("times as far as usual") == 2
    assert page.count(" IQR above</span>") == 2
    assert "An outlier lies more than 1.5 IQR above the third quartile of the distances of its class" in page
    assert "The first 2 are shown" in page


def test_of_many_images_some_are_drawn_and_the_farthest_compared_with_all(planted, monkeypatch):
    exact = outliers(planted.store, neighbours=3, silent=True)
    monkeypatch.setattr(module, "REFERENCE", 40)
    found = outliers(planted.store, neighbours=3, limit=10, silent=True)
    assert (found["compared_with"], exact["compared_with"]) == (40, 92)
    assert [one["id"] for one in found["outliers"][:2]] == [one["id"] for one in exact["outliers"][:2]]
    expected = {one["id"]: one["distance"] for one in exact["outliers"]}
    for one in found["outliers"]:
        assert one["distance"] == pytest.approx(expected[one["id"]], rel=1e-4)
    monkeypatch.setattr(module, "DRAWN", 20)
    fewer = outliers(planted.store, neighbours=3, limit=10, silent=True)
    assert fewer["compared_with"] == 20
    assert {one["id"]: one["distance"] for one in fewer["outliers"][:2]} == pytest.approx(
        {one["id"]: one["distance"] for one in exact["outliers"][:2]}, rel=1e-4
    )


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize(("rows", "threads"), [(5, 3), (128, 1)])
def test_pieces_and_threads_change_no_distance(distance, rows, threads, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_ROWS", rows)
    monkeypatch.setattr("featurepipe.heads.blocks.blas_threads", lambda: threads)
    monkeypatch.setattr("featurepipe.heads.blocks.BLOCK_BYTES", 1 << 13)
    rng = np.random.default_rng(0)
    values = rng.normal(1, 1, (400, 20)).astype("f2")
    group = rng.integers(0, 4, 400)
    group[group == 3] = 2
    drawn = [np.flatnonzero(group == number)[:: number + 1] for number in range(3)]
    own = np.full(400, -1)
    for one in drawn:
        own[one] = np.arange(len(one))
    x = values.astype("f8")
    x = x / np.linalg.norm(x, axis=1, keepdims=True) if distance == "cosine" else x
    apart = ((x[:, None] - x[None]) ** 2).sum(axis=2)
    apart = apart / 2 if distance == "cosine" else np.sqrt(apart)
    np.fill_diagonal(apart, np.inf)
    kth = np.array([1, 2, 5])
    expected = [np.sort(apart[row, drawn[group[row]]])[kth[group[row]] - 1] for row in range(400)]
    references = [(x if distance == "cosine" else values)[one].astype("f4") for one in drawn]
    work = {"references": references, "kth": kth, "distance": distance}
    found = module._distances(ArrayBlocks(values), np.stack([group, own]), **work)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_along_principal_axes_almost_all_find_the_nearest_of_many_rows(distance, monkeypatch):
    monkeypatch.setattr(module, "DRAWN", 800)
    monkeypatch.setattr(module, "_AXES", 40)
    rng = np.random.default_rng(0)
    spread = (1 + np.arange(160)) ** -1.0
    kinds = rng.normal(size=(60, 160)) * spread
    values = (0.2 + kinds[rng.integers(0, 60, 1500)] + rng.normal(size=(1500, 160)) * spread).astype("f4")
    values = unit_vectors(values) if distance == "cosine" else values
    own = np.where(np.arange(1500) < 900, np.arange(1500), -1)
    quick = module._Reference.of(values[:900], distance)
    assert quick.quick.rows.shape == (900, 41)
    whole = replace(quick, quick=None)
    found, expected = quick.kth(values, own, 1), whole.kth(values, own, 1)
    x = values.astype("f8")
    squares = ((x[:, None] - x[None, :900]) ** 2).sum(axis=2)
    squares[np.arange(900), np.arange(900)] = np.inf
    exact = squares.min(axis=1) / 2 if distance == "cosine" else np.sqrt(squares.min(axis=1))
    np.testing.assert_allclose(expected, exact, rtol=1e-3)
    assert (found >= expected * (1 - 1e-3)).all()  # as it is the distance of a row that is there
    assert (found <= expected * (1 + 1e-3)).mean() > 0.9
    assert (found / expected).mean() < 1.01
    np.testing.assert_allclose(quick.kth(values, own, 2), whole.kth(values, own, 2), rtol=1e-3)


def test_new_images_are_compared_with_those_of_the_snapshot_before(planted):
    first = planted.store.snapshot_ids("pile")[-1]
    values, _ = blobs(12, seed=1)
    values[4] = [0, 0, 9, 9, 0, 0]
    planted.night({"b:gap": planted.add_rows([f"new{n}.png" for n in range(12)], values)})
    found = outliers(planted.store, since="previous", neighbours=3, silent=True)
    assert (found["images"], found["since"], found["outliers"][0]["id"]) == (12, first, "new4.png")
    old = blobs()[0].astype("f8")
    unit = [one / np.linalg.norm(one, axis=1, keepdims=True) for one in (values.astype("f8"), old)]
    others = np.array([[0, 0, 0, 5, 1, 0], [0, 0, 0, 0, 0, -9.0]])
    unit[1] = np.concatenate([unit[1], others / np.linalg.norm(others, axis=1, keepdims=True)])
    expected = np.sort(1 - unit[0] @ unit[1].T, axis=1)[:, 2]
    for one in found["outliers"]:
        assert one["distance"] == pytest.approx(expected[int(one["id"][3:-4])], abs=2e-6)
    with pytest.raises(UsageError, match="is the first snapshot of pile: there is none before it"):
        outliers(planted.store, since="previous", snapshot=first, silent=True)
    planted.night()
    with pytest.raises(UsageError, match="no image of pile is new since"):
        outliers(planted.store, since="previous", silent=True)


def night_of(pile, names, direction, spread=1.0, label="a", seed=0, count=None):
    rng = np.random.default_rng(seed)
    names = [f"{names}{n}.png" for n in range(count)] if count else [names]
    values = 10 * np.eye(8)[direction] + spread * rng.normal(size=(len(names), 8))
    rows = pile.add_rows(names, values.astype("f4"))
    for name in names:
        pile.images[name]["label"] = label
    pile.night({"b:gap": rows})


@pytest.mark.parametrize("by", ["all", "class"])
@pytest.mark.parametrize("drawn", [False, True])
def test_new_images_are_judged_by_what_is_usual_among_earlier_ones(pile, monkeypatch, by, drawn):
    monkeypatch.setattr(module, "_USUAL", 150)
    if drawn:
        monkeypatch.setattr(module, "REFERENCE", 120)
        monkeypatch.setattr(module, "_USUAL_LEAST", 150)
    night_of(pile, "old", 0, count=300)
    if by == "class":
        night_of(pile, "wide", 1, 4.0, "b", count=100, seed=5)

    def found():
        return outliers(pile.store, by=by, since="previous", silent=True)

    night_of(pile, "usual", 0, count=40, seed=1)
    usual = found()
    assert usual["count"] <= 2
    assert np.median([one["score"] for one in usual["outliers"]]) == pytest.approx(1, abs=0.25)
    night_of(pile, "one-usual.png", 0, seed=2)
    one = found()
    assert (one["images"], one["count"]) == (1, 0)
    assert "0 outliers of 1 image, far from " in outliers_text(one)
    of = "its class" if by == "class" else "all"
    assert f"third quartile of the distances of {of} that were there before, from each other, in" in outliers_text(one)
    night_of(pile, "alien.png", 3, seed=3)
    alien = found()
    assert (alien["images"], alien["count"]) == (1, 1)
    assert alien["outliers"][0]["above"] > (3 if drawn else 5)
    night_of(pile, "aliens", 4, count=30, seed=4)
    assert (found()["images"], found()["count"]) == (30, 30)


def test_of_a_class_with_as_few_earlier_images_as_neighbours_nothing_is_usual(pile):
    night_of(pile, "a", 0, count=30)
    night_of(pile, "few", 1, label="few", count=5, seed=1)
    night_of(pile, "new.png", 1, label="few", seed=2)
    night_of(pile, "second.png", 0, label="a", seed=3)
    found = outliers(pile.store, by="class", since=pile.store.snapshot_ids("pile")[1], silent=True)
    assert [one["id"] for one in found["outliers"]] == ["second.png"]
    assert found["unchecked"] == 1


def test_spread_rows_give_the_same(planted, monkeypatch):
    expected = outliers(planted.store, by="class", neighbours=3, silent=True)

    class TwoShards:
        def __init__(self, blocks, beside=None):
            self.blocks, self.beside_ = blocks, beside

        def beside(self, rows):
            return TwoShards(self.blocks, rows)

        def map(self, work):
            half = len(self.blocks) // 2
            parts = (slice(0, half), slice(half, None))
            return [LocalRowShards(self.blocks.take(p), self.beside_[:, p]).reduce(work) for p in parts]

    monkeypatch.setattr(module, "row_shards_of", TwoShards)
    found = outliers(planted.store, by="class", neighbours=3, silent=True)
    assert found["outliers"] == expected["outliers"]
    values, _ = blobs(6, seed=1)
    planted.night({"b:gap": planted.add_rows([f"new{n}.png" for n in range(6)], values)})
    found = outliers(planted.store, since="previous", neighbours=3, silent=True)
    monkeypatch.undo()
    expected = outliers(planted.store, since="previous", neighbours=3, silent=True)
    assert found["images"] == 6
    for one, other in zip(found["outliers"], expected["outliers"], strict=True):
        assert (one["id"], one["outlier"]) == (other["id"], other["outlier"])
        assert one["above"] == pytest.approx(other["above"], abs=1e-4)


def test_the_page_the_file_and_the_command(planted, tmp_path, cli):
    outliers(planted.store, neighbours=3, to=tmp_path / "page.html", limit=15, silent=True)
    page = (tmp_path / "page.html").read_text()
    assert page.count("times as far as usual") == 15
    assert "3 outliers of 92 images of pile. Shown are those farthest from all others" in page
    assert "<summary>On this page: 17 parts</summary>" in page  # else fifteen links would fill a phone's screen
    answer = cli("outliers", planted.store.path, "--by", "class", "--limit", "2", "--to", tmp_path / "a.csv", "--json")
    assert len(json.loads(answer.out)["outliers"]) == 2
    assert len(list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))) == 91


def test_mistakes_are_named(pile):
    pile.night({"b:gap": pile.add_rows([f"{n}" for n in range(4)], np.eye(4))})
    with pytest.raises(UsageError, match="no image of pile has a class to be far from"):
        outliers(pile.store, by="class", silent=True)
    with pytest.raises(UsageError, match="no image has 5 others to be compared with"):
        outliers(pile.store, silent=True)
