"""Which images to label next: the most typical of groups without a label, or those that cover most; as the papers say."""

import csv
import json

import numpy as np
import pytest

from featurepipe.curation.next_to_label import _covering, _typicality, choose, select, select_text
from featurepipe.errors import UsageError
from featurepipe.training.train import train


@pytest.fixture
def groups(pile):
    """Six far groups of 30, 25, 20, 15, 10 and 8 images, an outlier, and a copy."""
    rng = np.random.default_rng(0)
    sizes = (30, 25, 20, 15, 10, 8)
    kinds = np.repeat(np.arange(6), sizes)
    values = 9 * np.eye(8)[kinds] + 0.7 * rng.normal(size=(108, 8))
    rows = pile.add_rows([f"{kind}-{n}.png" for n, kind in enumerate(kinds)], values.astype("f4"))
    rows |= pile.add_rows(["far.png"], np.array([[0, 0, 0, 0, 0, 0, 9.0, -9]], "f4"))
    pile.add("0-3.png", name="copy.png")
    pile.night({"b:gap": rows})
    return pile


def kinds_of(found):
    return [one["id"].split("-")[0] for one in found["chosen"]]


def test_typical_images_of_the_largest_groups_come_first(groups):
    found = select(groups.store, budget=4, silent=True)
    assert sorted(kinds_of(found)) == ["0", "1", "2", "3"]
    assert (found["labelled"], found["unlabelled"]) == (0, 109)
    labelled = {one["id"]: "x" for one in found["chosen"]}
    more = select(groups.store, budget=3, labels=labelled, silent=True)
    assert sorted(kinds_of(more)[:2]) == ["4", "5"]  # the groups that have no label yet
    assert more["labelled"] == 4
    every = select(groups.store, budget=109, silent=True)
    assert len({one["id"] for one in every["chosen"]}) == 109
    assert "copy.png" not in {one["id"] for one in every["chosen"]}
    json.dumps(every, allow_nan=False)


def test_typicality_is_one_over_the_mean_distance_to_the_nearest():
    values = np.random.default_rng(1).normal(size=(50, 5)).astype("f4")
    apart = np.linalg.norm(values[:, None].astype("f8") - values[None], axis=2)
    np.testing.assert_allclose(_typicality(values), 1 / np.sort(apart, axis=1)[:, 1:21].mean(axis=1), rtol=1e-3)


def test_a_greedy_cover_takes_the_farthest_of_all_that_are_labelled_or_chosen():
    values = np.random.default_rng(2).normal(size=(80, 4)).astype("f4")
    is_open = np.ones(80, bool)
    is_open[[5, 9]] = False
    chosen, score = _covering(values, is_open, 10)
    held = [5, 9]
    for row, far in zip(chosen, score, strict=True):
        apart = np.linalg.norm(values[:, None] - values[held][None], axis=2).min(axis=1)
        assert row == np.argmax(apart)
        assert far == pytest.approx(apart.max(), rel=1e-3)
        held.append(row)


def test_a_cover_begins_in_the_middle_and_then_takes_what_is_unlike(groups):
    found = select(groups.store, budget=7, method="k-centre", silent=True)
    assert len(set(kinds_of(found))) == 7  # one of each group, and the outlier
    features = groups.store.features("pile")
    again = choose(features, np.arange(0), np.arange(108), 5, method="k-centre")
    assert len(set(again.rows.tolist())) == 5


def test_the_file_is_filled_in_and_handed_back(groups, tmp_path, cli):
    answer = cli("select", groups.store.path, "--budget", "12", "--to", tmp_path / "next.csv", "--json")
    found = json.loads(answer.out)
    rows = list(csv.DictReader((tmp_path / "next.csv").read_text().splitlines()))
    assert [row["id"] for row in rows] == [one["id"] for one in found["chosen"]]
    assert {row["label"] for row in rows} == {""}
    text = "\n".join(["id,label", *(f"{row['id']},{int(row['id'][0]) % 2}" for row in rows if row["id"] != "far.png")])
    (tmp_path / "filled.csv").write_text(text)
    train(groups.store, out=tmp_path / "bundle", labels=tmp_path / "filled.csv", silent=True)
    next_ones = select(groups.store, budget=3, labels=tmp_path / "filled.csv", to=tmp_path / "page.html", silent=True)
    assert next_ones["labelled"] == len(text.splitlines()) - 1
    page = (tmp_path / "page.html").read_text()
    assert "3 images of pile" in page
    assert ">rank 1</span>" in page
    assert "groups with the fewest labels come first" in page
    assert "3 images to label next" in select_text(next_ones)
    select(groups.store, budget=3, labels=tmp_path / "filled.csv", to=tmp_path / "more.csv", silent=True)
    more = list(csv.DictReader((tmp_path / "more.csv").read_text().splitlines()))
    assert [row["id"] for row in more[:3]] == [one["id"] for one in next_ones["chosen"]]
    assert [(row["label"], row["rank"]) for row in more[:3]] == [("", "1"), ("", "2"), ("", "3")]
    labelled = dict(line.split(",") for line in text.splitlines()[1:])
    assert {
        row["id"]: row["label"] for row in more[3:]
    } == labelled  # nothing is lost when only the new ones are filled in
    assert {row["rank"] + row["score"] + row["group"] for row in more[3:]} == {""}
    kinds = text.replace("label", "Kind", 1)
    (tmp_path / "kinds.csv").write_text(kinds)
    asked = {"budget": 2, "label": "Kind", "silent": True}
    select(groups.store, labels=tmp_path / "kinds.csv", to=tmp_path / "kinds-more.csv", **asked)
    again = select(groups.store, labels=tmp_path / "kinds-more.csv", **asked)
    assert again["labelled"] == len(labelled)


def test_mistakes_are_named(groups):
    with pytest.raises(UsageError, match="how many images are to be chosen"):
        select(groups.store, silent=True)
    with pytest.raises(UsageError, match=r"a budget of 200 is more than the 109 images of pile without a label"):
        select(groups.store, budget=200, silent=True)
    labels = dict.fromkeys(groups.images, "x")
    with pytest.raises(UsageError, match="every image of pile has a label"):
        select(groups.store, budget=1, labels=labels, silent=True)
