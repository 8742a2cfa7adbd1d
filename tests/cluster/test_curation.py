"""Questions asked of features where Dask workers read them: the answers are those of this process."""

import numpy as np
import pytest

import featurepipe as fp


@pytest.fixture
def marked(pile):
    """Three classes of 60 images around three centres, five wrong labels, two images far from all, a copy, 12 without a label."""
    rng = np.random.default_rng(4)
    kinds = np.repeat(np.arange(3), 60)
    values = (8 * np.eye(20)[kinds] + rng.normal(size=(180, 20))).astype("f4")
    rows = pile.add_rows([f"{n}.png" for n in range(180)], values)
    for number, name in enumerate(rows):
        if number % 15:
            pile.images[name]["label"] = "abc"[(kinds[number] + (number in (3, 17, 70, 77, 131))) % 3]
    rows |= pile.add_rows(["far.png", "farther.png"], 9 * np.eye(20, dtype="f4")[[7, 8]])
    pile.add("20.png", name="copy.png")
    pile.night({"b:gap": rows})
    return pile.store


@pytest.mark.slow
def test_answers_are_those_of_this_process(marked, thread_executor, monkeypatch):
    monkeypatch.setattr(
        "featurepipe.curation.outliers.REFERENCE", 90
    )  # fewer than there are: the farthest are compared anew
    there = {"cluster": thread_executor, "silent": True}
    ids = ["20.png", "far.png", "179.png"]
    for distance in ("cosine", "euclidean"):
        here = fp.similar(marked, query_ids=ids, distance=distance, top=70, index="never", silent=True)
        away = fp.similar(marked, query_ids=ids, distance=distance, top=70, index="never", **there)
        assert away["queries"] == here["queries"]  # to the bit
    assert here["queries"][0]["found"][0]["id"] == "copy.png"

    for by in ("all", "class"):
        here, away = fp.outliers(marked, by=by, silent=True), fp.outliers(marked, by=by, **there)
        assert [one["id"] for one in away["outliers"]] == [one["id"] for one in here["outliers"]]
        assert [one["distance"] for one in away["outliers"][:5]] == pytest.approx(
            [one["distance"] for one in here["outliers"][:5]], rel=1e-5
        )
        assert (away["count"], away["compared_with"]) == (here["count"], here["compared_with"])

    here, away = fp.labels(marked, silent=True), fp.labels(marked, **there)
    assert {one["id"] for one in here["suspects"]} >= {"3.png", "17.png", "70.png", "131.png"}
    assert [one["id"] for one in away["suspects"]] == [one["id"] for one in here["suspects"]]
    scores = [[one["score"] for one in found["suspects"]] for found in (away, here)]
    np.testing.assert_allclose(*scores, rtol=1e-2, atol=1e-6)
    assert fp.labels(marked, dry_run=True, **there)["expected_seconds"] is None

    for method in ("typical", "k-centre"):
        here, away = (fp.select(marked, budget=8, method=method, **how) for how in ({"silent": True}, there))
        assert away["chosen"] == here["chosen"]
