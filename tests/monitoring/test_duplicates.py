"""Copies and images nearly alike: found, grouped, and marked where they straddle splits or contradict each other."""

import csv
import json
import sys

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from featurepipe.errors import UsageError
from featurepipe.evaluation import leakage
from featurepipe.monitoring import near as near_module
from featurepipe.monitoring.duplicates import duplicates
from featurepipe.monitoring.near import Directions, EveryRow, near_pairs, turned, unit_vectors
from featurepipe.monitoring.text import duplicates_text


def ids(group):
    return [image["id"] for image in group["images"]]


@pytest.fixture
def copies(pile):
    """Twenty images without features; three groups of copies."""
    for number in range(20):
        pile.add(f"{number}.png", label="cat", split="train")
    pile.add("3.png", name="three.png", label="cat", split="train")
    pile.add("3.png", name="three-again.png", label=None, split=None)
    pile.add("5.png", name="five.png", label="cat", split="test")
    pile.add("7.png", name="seven.png", label="dog", split="train")
    pile.add("broken", name="a.png")
    pile.add("broken", name="b.png")
    pile.night()
    return pile


def test_copies_are_found_by_key_without_features_and_those_across_splits_come_first(copies):
    found = duplicates(copies.store, silent=True)
    exact = found["exact"]
    listed = exact.pop("listed")
    assert exact == {"groups": 3, "images": 7, "copies": 4, "across_splits": 1, "label_conflicts": 1}
    assert (found["dataset"], found["images"], found["near"], found["warnings"]) == ("pile", 24, None, [])
    assert [ids(group) for group in listed] == [
        ["5.png", "five.png"], ["7.png", "seven.png"], ["3.png", "three.png", "three-again.png"],
    ]  # fmt: skip
    marks = [(group["across_splits"], group["label_conflict"]) for group in listed]
    assert marks == [(True, False), (False, True), (False, False)]
    first = listed[0]["images"][1]
    assert {name: first[name] for name in ("id", "split", "label")} == {
        "id": "five.png", "split": "test", "label": "cat",
    }  # fmt: skip
    assert len({image["key"] for image in listed[0]["images"]}) == 1
    assert "distance" not in first
    json.dumps(found, allow_nan=False)


def test_all_groups_across_splits_are_listed_whatever_the_limit(pile):
    for number in range(30):
        pile.add(f"{number}.png", split="train")
        pile.add(f"{number}.png", name=f"copy-{number}.png", split="test" if number < 12 else "train")
    pile.night()
    for limit, listed in ((0, 12), (5, 12), (20, 20), (100, 30), (None, 30)):
        exact = duplicates(pile.store, limit=limit, silent=True)["exact"]
        assert (len(exact["listed"]), exact["groups"], exact["across_splits"]) == (listed, 30, 12)
        assert sum(group["across_splits"] for group in exact["listed"]) == 12
    text = duplicates_text(duplicates(pile.store, limit=0, silent=True))
    assert text.count("ACROSS SPLITS") == 12
    assert "... 18 more; write all of them: --to FILE" in text


def test_groups_agree_with_the_leaks_that_evaluate_reports(zoo):
    rng = np.random.default_rng(0)
    splits, labels = ["train", "test", "val", None], ["cat", "dog", None]
    zoo.write([
        zoo.image(f"{i}.png", f"cat-{rng.integers(150)}", labels[rng.integers(3)], splits[rng.integers(4)])
        for i in range(300)
    ])  # fmt: skip
    exact = duplicates(zoo.store, limit=None, silent=True)["exact"]
    leaks = leakage.report(zoo.features())
    assert exact["copies"] == leaks["copies"]
    assert exact["across_splits"] == leaks["across_splits"]["images"] > 20
    assert exact["label_conflicts"] == leaks["label_conflicts"]["images"] > 20


def test_a_dataset_without_copies_says_so(pile):
    pile.add("a.png")
    pile.night()
    found = duplicates(pile.store, silent=True)
    assert found["exact"] == {
        "groups": 0, "images": 0, "across_splits": 0, "label_conflicts": 0, "copies": 0, "listed": [],
    }  # fmt: skip
    assert "1 image, 0 are copies" in duplicates_text(found)


@pytest.fixture
def look_alikes(pile):
    """Ten thousand angles apart from each other but for three that are near "0.png" and two near "9.png"."""
    rng = np.random.default_rng(0)
    values = {f"{number}.png": row for number, row in enumerate(rng.normal(size=(40, 60)).astype("f4"))}

    def beside(name, distance):
        unit = unit_vectors(values[name][None])
        return 5 * turned(unit, rng.normal(size=(1, 60)).astype("f4"), distance)[0]

    for name, distance in (("near-0", 0.01), ("nearer-0", 0.002), ("far-0", 0.05)):
        values[f"{name}.png"] = beside("0.png", distance)
    values["near-9.png"] = beside("9.png", 0.01)
    for name in values:
        pile.add(name, split="test" if name == "near-9.png" else "train", label="cat")
    pile.add("near-0.png", name="copy-of-near-0.png", split="train", label="dog")
    pile.night({"b:gap": values})
    return pile


def test_near_images_are_grouped_with_their_copies_and_their_distance(look_alikes):
    found = duplicates(look_alikes.store, near=0.02, silent=True)
    near = found["near"]
    listed = near["listed"]
    assert (near["groups"], near["images"], near["across_splits"], near["label_conflicts"]) == (2, 6, 1, 1)
    assert (near["column"], near["distance"], near["search"], near["recall"]) == ("b:gap", 0.02, "exact", 1.0)
    assert [(sorted(ids(group)), group["across_splits"]) for group in listed] == [
        (["9.png", "near-9.png"], True),
        (["0.png", "copy-of-near-0.png", "near-0.png", "nearer-0.png"], False),
    ]
    distance = {image["id"]: image["distance"] for group in listed for image in group["images"]}
    assert distance["9.png"] == pytest.approx(0.01, rel=1e-3)
    assert distance["0.png"] == distance["nearer-0.png"] == pytest.approx(0.002, rel=1e-2)
    assert distance["copy-of-near-0.png"] == distance["near-0.png"]
    assert (found["exact"]["groups"], found["exact"]["copies"]) == (1, 1)
    json.dumps(found, allow_nan=False)
    text = duplicates_text(found)
    assert "ACROSS SPLITS: 9.png (train) ~ near-9.png (test)" in text
    assert "LABELS DIFFER" in text


def test_a_larger_distance_joins_more_and_a_chain_joins_its_ends(look_alikes):
    near = duplicates(look_alikes.store, near=0.055, silent=True)["near"]
    assert any("far-0.png" in ids(group) for group in near["listed"])


def test_auto_is_a_fifteenth_of_the_median_distance(look_alikes):
    near = duplicates(look_alikes.store, near="auto", silent=True)["near"]
    assert near["distance"] == pytest.approx(1 / 15, rel=0.05)  # directions at random in 60 dimensions are 1 apart


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_groups_are_written_one_row_an_image(look_alikes, tmp_path, suffix):
    to = tmp_path / f"groups.{suffix}"
    found = duplicates(look_alikes.store, near=0.02, limit=0, to=to, silent=True)
    assert found["file"] == str(to)
    if suffix == "csv":
        rows = list(csv.DictReader(to.read_text().splitlines()))
    elif suffix == "jsonl":
        rows = [json.loads(line) for line in to.read_text().splitlines()]
    else:
        rows = pq.read_table(to).to_pylist()
    assert [(row["kind"], int(row["group"])) for row in rows] == [("exact", 0)] * 2 + [("near", 0)] * 2 + [
        ("near", 1)
    ] * 4
    assert [row["id"] for row in rows[:2]] == ["near-0.png", "copy-of-near-0.png"]
    assert rows[0]["key"] == rows[1]["key"]
    assert float(rows[2]["distance"]) == pytest.approx(0.01, rel=1e-3)
    assert [str(row["across_splits"]).lower() for row in rows] == ["false"] * 2 + ["true"] * 2 + ["false"] * 4
    assert [str(row["label_conflict"]).lower() for row in rows] == ["true"] * 2 + ["false"] * 2 + ["true"] * 4


def test_what_cannot_be_is_refused_before_anything_is_read(copies, tmp_path):
    with pytest.raises(UsageError, match=r"near=2 is no cosine distance; .* or 'auto'"):
        duplicates(copies.store, near=2, silent=True)
    with pytest.raises(UsageError, match=r"suffix must be one of .csv, .jsonl, .parquet"):
        duplicates(copies.store, to=tmp_path / "groups.txt", silent=True)
    with pytest.raises(UsageError, match="there is no folder"):
        duplicates(copies.store, to=tmp_path / "none" / "groups.csv", silent=True)
    with pytest.raises(UsageError, match="unknown dataset 'heap'"):
        duplicates(copies.store, dataset="heap", silent=True)


def test_faiss_is_needed_for_very_many_images_alone_and_the_command_that_installs_it_is_named(pile, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    written(pile, crowded(300, 12))
    found = duplicates(pile.store, near=0.05, limit=None, silent=True)["near"]
    assert (found["search"], found["pairs"]) == ("exact", len(all_pairs(crowded(300, 12), 0.05)))
    monkeypatch.setattr(near_module, "EXACT", 299)
    told = r"more than 299 images, need faiss; run: pip install 'featurepipe\[duplicates\]' \(in a checkout '\.\[duplicates\]'\)"
    with pytest.raises(UsageError, match=told):
        duplicates(pile.store, near="auto", silent=True)


# The search for pairs


def written(pile, values):
    pile.night({"b:gap": pile.add_rows([f"{row}.png" for row in range(len(values))], values)})
    return pile.store.features("pile", node="b")


def crowded(count, width, seed=0):
    """Vectors in clumps of all sizes, so that many pairs lie near a threshold."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(count // 4, width))
    spread = rng.uniform(0.02, 0.6, size=(count, 1))
    return (centres[rng.integers(len(centres), size=count)] + spread * rng.normal(size=(count, width))).astype("f4")


def all_pairs(values, distance):
    unit = unit_vectors(values).astype(np.float64)
    apart = 1 - unit @ unit.T
    first, second = np.nonzero(np.triu(apart <= distance, 1))
    return {(int(a), int(b)): apart[a, b] for a, b in zip(first, second, strict=True)}


@pytest.mark.parametrize("width", [12, 700])
def test_every_pair_is_found_and_no_other_also_where_fewer_dimensions_are_searched(pile, width):
    values = crowded(1500, width)
    found = near_pairs(written(pile, values), 0.05, silent=True)
    expected = all_pairs(values, 0.05)
    assert len(expected) > 300
    assert (found.exact, found.recall, found.distance) == (True, 1.0, 0.05)
    assert set(zip(found.first.tolist(), found.second.tolist(), strict=True)) == set(expected)
    assert len(found.first) == len(expected)
    apart = [expected[pair] for pair in zip(found.first.tolist(), found.second.tolist(), strict=True)]
    np.testing.assert_allclose(found.apart, apart, atol=1e-6)


def test_of_very_many_images_almost_every_pair_is_found_and_the_share_is_stated(pile, monkeypatch):
    monkeypatch.setattr(near_module, "EXACT", 100)
    values = crowded(2500, 300)
    found = near_pairs(written(pile, values), 0.05, silent=True)
    expected = all_pairs(values, 0.05)
    pairs = set(zip(found.first.tolist(), found.second.tolist(), strict=True))
    assert pairs <= set(expected)
    assert not found.exact
    assert 0.8 < found.recall <= len(pairs) / len(expected) + 0.05
    assert len(pairs) / len(expected) > 0.9


def test_images_without_any_feature_are_near_none(pile):
    values = np.random.default_rng(0).normal(size=(30, 5)).astype("f4")
    values[[3, 4, 5]] = 0
    found = near_pairs(written(pile, values), 0.2, silent=True)
    assert not {3, 4, 5} & {*found.first.tolist(), *found.second.tolist()}


def test_a_distance_that_joins_everything_is_refused(pile, monkeypatch):
    monkeypatch.setattr(near_module, "_MOST_PAIRS", 1000)
    features = written(pile, np.random.default_rng(0).normal(5, 1, size=(200, 9)).astype("f4"))
    with pytest.raises(UsageError, match=r"more than 1,000 pairs of images lie within near=0.5 of each other in b:gap"):
        near_pairs(features, 0.5, silent=True)


def test_images_all_alike_are_one_large_group_with_a_warning(pile):
    rng = np.random.default_rng(0)
    written(pile, (1 + 0.001 * rng.normal(size=(50, 6))).astype("f4"))
    found = duplicates(pile.store, near=0.01, silent=True)
    assert (found["near"]["groups"], found["near"]["images"]) == (1, 50)
    assert "50 of 50 images are one near group" in found["warnings"][0]


def test_threads_are_bounded_while_it_searches_and_as_before_afterwards(pile, monkeypatch):
    before, seen, within = faiss.omp_get_max_threads(), [], near_module.within
    monkeypatch.setattr(
        near_module, "within", lambda *given: seen.append(faiss.omp_get_max_threads()) or within(*given)
    )
    monkeypatch.setattr(near_module, "EXACT", 50)
    faiss.omp_set_num_threads(3)
    try:
        features = written(pile, crowded(100, 5))
        near_pairs(features, 0.01, threads=2, silent=True)
        near_pairs(features, 0.01, threads=8, silent=True)
        assert (set(seen[:2]), set(seen[2:]), faiss.omp_get_max_threads()) == ({2}, {3}, 3)
    finally:
        faiss.omp_set_num_threads(before)


def blas_threads():
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


@pytest.mark.parametrize(
    ("few", "threads", "used"), [(0, 2, 2), (0, 8, 3), (0, None, 3), (10**9, 2, 1), (10**9, None, 1)]
)
def test_threads_are_bounded_where_every_pair_is_looked_at(pile, monkeypatch, few, threads, used):
    monkeypatch.setattr(near_module, "_FEW_VALUES", few)
    seen, within = set(), EveryRow.within
    monkeypatch.setattr(EveryRow, "within", lambda *given: seen.update(blas_threads()) or within(*given))
    features = written(pile, crowded(100, 5))
    with threadpool_limits(3, user_api="blas"):
        near_pairs(features, 0.01, threads=threads, silent=True)
        assert (seen, blas_threads()) == ({used}, {3})


def test_projections_lengthen_no_distance():
    unit = unit_vectors(crowded(150, 400))
    directions = Directions.fitted(unit[:100], 64)
    projected = directions.project(unit)
    assert projected.shape == (150, 64)
    full = np.linalg.norm(unit[:, None] - unit[None], axis=2)
    short = np.linalg.norm(projected[:, None] - projected[None], axis=2)
    assert (short <= full + 1e-5).all()
    assert np.median(short[full > 0.5] / full[full > 0.5]) > 0.8  # and keep most of it


def test_a_turned_direction_is_just_so_far_away():
    rng = np.random.default_rng(0)
    unit = unit_vectors(rng.normal(size=(20, 30)).astype("f4"))
    moved = turned(unit, np.roll(unit, 1, axis=0), 0.03)
    np.testing.assert_allclose(1 - np.einsum("ij,ij->i", unit, moved), 0.03, rtol=1e-3)
