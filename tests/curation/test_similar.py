"""Look-alikes: the nearest images by every value, of images of the store and of new ones."""

import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

import featurepipe
from featurepipe.curation.outliers import _distances
from featurepipe.curation.queries import of_ids
from featurepipe.curation.similar import similar, similar_text
from featurepipe.errors import UsageError
from featurepipe.heads.blocks import ArrayBlocks
from featurepipe.monitoring.near import nearest, unit_vectors
from featurepipe.store import FeatureStore


def distances(features, queries, distance):
    x, q = features.astype(np.float64), queries.astype(np.float64)
    if distance == "euclidean":
        return np.linalg.norm(q[:, None] - x[None], axis=2)
    length = np.maximum(np.linalg.norm(x, axis=1), 1e-300)
    return 1 - (q / np.linalg.norm(q, axis=1)[:, None]) @ (x / length[:, None]).T


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_the_nearest_are_those_of_all_distances_however_many_blocks_there_are(distance, monkeypatch):
    monkeypatch.setattr("featurepipe.heads.blocks.BLOCK_BYTES", 1 << 13)  # 34 rows a block
    rng = np.random.default_rng(0)
    features = rng.normal(3, 1, (500, 60)).astype("f2")
    features[7] = 0
    features[400] = features[20]  # equally near: the earlier row comes first
    queries = rng.normal(3, 1, (30, 60)).astype("f4")
    queries[0] = features[20]
    without = np.full(30, -1)
    without[1] = 11
    expected = distances(features, queries, distance)
    expected[1, 11] = np.inf
    order = np.argsort(expected, axis=1, kind="stable")[:, :12]
    found = nearest(ArrayBlocks(features), queries, 12, distance=distance, without=without)
    np.testing.assert_array_equal(found.positions, order)
    np.testing.assert_allclose(found.apart, np.maximum(np.take_along_axis(expected, order, axis=1), 0), atol=1e-12)
    assert found.positions[0, :2].tolist() == [20, 400]


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_of_rows_that_are_all_alike_the_nearest_are_found(distance):
    rng = np.random.default_rng(0)
    features = (100 + 0.1 * rng.normal(size=(2000, 64))).astype("f4")  # cosines of 0.999999
    expected = distances(features, features[:20], distance)
    np.fill_diagonal(expected, np.inf)
    found = nearest(ArrayBlocks(features), features[:20], 5, distance=distance, without=np.arange(20))
    np.testing.assert_array_equal(found.positions, np.argsort(expected, axis=1, kind="stable")[:, :5])
    work = {"references": [_values_of(features, distance)], "kth": np.array([5]), "distance": distance}
    beside = np.stack([np.zeros(20, np.int64), np.arange(20)])
    np.testing.assert_allclose(
        _distances(ArrayBlocks(features[:20]), beside, **work), np.sort(expected, axis=1)[:, 4], rtol=1e-4
    )


def _values_of(features, distance):
    return unit_vectors(features) if distance == "cosine" else features


def test_fewer_rows_than_asked_for_are_all_there_is():
    features = np.eye(4, dtype="f4")
    found = nearest(ArrayBlocks(features), features[:1], 10, without=np.zeros(1, np.int64))
    assert found.positions.tolist() == [[1, 2, 3, -1]]
    assert found.apart.tolist() == [[1, 1, 1, np.inf]]


def test_an_image_of_the_store_finds_its_kind_and_its_copies_but_not_itself(pile):
    rng = np.random.default_rng(1)
    values = pile.add_rows([f"{n}.png" for n in range(50)], rng.normal(size=(50, 8)).astype("f4"))
    pile.add("3.png", name="copy-of-3.png", label="cat", split="test")
    run_id = pile.night({"b:gap": values})
    found = similar(pile.store, query_ids=["3.png", "9.png"], top=4, silent=True)
    matrix = np.stack([*values.values(), values["3.png"]])
    names = [*values, "copy-of-3.png"]
    for query, id_ in zip(found["queries"], ("3.png", "9.png"), strict=True):
        expected = distances(matrix, values[id_][None], "cosine")[0]
        expected[names.index(id_)] = np.inf
        order = np.argsort(expected, kind="stable")[:4]
        assert [row["id"] for row in query["found"]] == [names[place] for place in order]
        np.testing.assert_allclose(
            [row["distance"] for row in query["found"]], np.maximum(expected[order], 0), atol=1e-7
        )
    first = found["queries"][0]["found"][0]
    assert (first["id"], first["label"], first["split"]) == ("copy-of-3.png", "cat", "test")
    assert (found["images"], found["snapshot"], found["computed"], found["search"]) == (51, run_id, 0, "exact")
    assert "copy-of-3.png" in similar_text(found)
    json.dumps(found, allow_nan=False)


def test_new_images_are_put_through_the_network_and_known_bytes_are_not(stripes, kept):
    folder, _ = stripes
    found = similar(kept, folder / "new", top=5, silent=True)
    assert (found["computed"], len(found["queries"]), found["rejects"]) == (12, 12, [])
    searched, reference = kept.features("seen"), FeatureStore(folder / "reference").features("new")
    expected = distances(searched.read(np.float32), reference.read(np.float32), "cosine")
    for place, query in enumerate(found["queries"]):
        assert query["id"] == reference.ids[place]
        order = np.argsort(expected[place], kind="stable")[:5]
        np.testing.assert_allclose([row["distance"] for row in query["found"]], expected[place][order], atol=1e-6)
        assert query["found"][0]["label"] == query["id"].split("/")[0]
    known = similar(kept, [folder / "seen" / "flat" / "2.png"], top=1, backbone="lenet5", silent=True)
    assert (known["computed"], known["queries"][0]["found"][0]["id"]) == (0, "flat/2.png")


def test_many_ids_are_found_as_few_are(pile):
    values = pile.add_rows([f"{n}.png" for n in range(50)], np.random.default_rng(1).normal(size=(50, 8)))
    pile.night({"b:gap": values})
    features = pile.store.features("pile")
    ids = [features.ids[row] for row in np.random.default_rng(2).permutation(50)]
    many, few = of_ids(pile.store, features, ids), [of_ids(pile.store, features, [id_]) for id_ in ids]
    assert [features.ids[row] for row in many.own] == ids
    np.testing.assert_array_equal(many.own, np.concatenate([one.own for one in few]))
    np.testing.assert_array_equal(many.vectors, np.concatenate([one.vectors for one in few]))
    for asked in (["9.png", "nowhere"], [*ids, "nowhere"]):
        with pytest.raises(UsageError, match="unknown image 'nowhere'"):
            of_ids(pile.store, features, asked)


def test_images_of_another_dataset_are_looked_for_across(pile):
    rng = np.random.default_rng(2)
    values = pile.add_rows([f"{n}.png" for n in range(9)], rng.normal(size=(9, 4)).astype("f4"))
    pile.night({"b:gap": values})
    table = pile.store.snapshot("pile").slice(4, 2)
    pile.store.write_snapshot("other", pile.store.new_run_id(), table)
    found = similar(pile.store, query_ids=["5.png"], query_dataset="other", dataset="pile", top=1, silent=True)
    assert [row["id"] for row in found["queries"][0]["found"]] == ["5.png"]
    assert found["queries"][0]["found"][0]["distance"] < 1e-12


def test_files_hold_every_pair_and_the_page_has_pictures(stripes, kept, tmp_path):
    folder, _ = stripes
    for suffix in ("csv", "parquet", "html"):
        target = tmp_path / f"answer.{suffix}"
        found = similar(kept, [str(folder / "new" / "down" / "9.png")], top=3, to=target, silent=True)
        assert found["file"] == str(target)
    rows = list(csv.DictReader((tmp_path / "answer.csv").read_text().splitlines()))
    expected = [(str(rank + 1), row["id"]) for rank, row in enumerate(found["queries"][0]["found"])]
    assert [(row["rank"], row["id"]) for row in rows] == expected
    assert pq.read_table(tmp_path / "answer.parquet")["id"].to_pylist() == [row["id"] for row in rows]
    page = (tmp_path / "answer.html").read_text()
    assert page.count('<img src="data:image/') == 4  # the query and three look-alikes
    assert "distance" in page
    assert "asked for" in page
    assert "Distances are cosine distances: 0 is the same direction" in page
    assert "the 3 images nearest to" in page


def test_mistakes_are_named(stripes, kept, pile, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    with pytest.raises(UsageError, match=r"nothing to look for: .*broken.png cannot be used: "):
        similar(kept, [broken], silent=True)
    good = stripes[0] / "new" / "flat" / "8.png"
    found = similar(kept, [good, broken], top=1, silent=True)
    assert [reject["id"] for reject in found["rejects"]] == [str(broken)]
    assert len(found["warnings"]) == len(found["queries"]) == 1
    with pytest.raises(UsageError, match=r"unknown image 'flat/77.png' in dataset seen; nearest: flat/7.png"):
        similar(kept, query_ids=["flat/77.png"], silent=True)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "gone.csv").write_text("path\ngone.png\n")
    with pytest.raises(UsageError, match=r"nothing to look for: .*nothing cannot be used: it holds no image"):
        similar(kept, tmp_path / "nothing", silent=True)
    with pytest.raises(UsageError, match=r"nothing to look for: gone.png cannot be used: "):
        similar(kept, tmp_path / "gone.csv", silent=True)
    with pytest.raises(UsageError, match="nothing is asked for"):
        similar(kept, silent=True)
    with pytest.raises(UsageError, match="asked for twice"):
        similar(kept, query_ids=["flat/1.png", "flat/1.png"], silent=True)
    with pytest.raises(UsageError, match=r"its suffix must be one of \.csv, \.jsonl, \.parquet, \.html"):
        similar(kept, query_ids=["flat/1.png"], to=tmp_path / "x.txt", silent=True)
    same = [tmp_path / "x.csv", tmp_path / "nothing" / ".." / "x.csv"]
    with pytest.raises(UsageError, match=r"x\.csv is given more than once; one answer would replace the other"):
        similar(kept, query_ids=["flat/1.png"], to=same, silent=True)
    pile.add("a")
    pile.add("broken", name="b.png")
    pile.night({"b:gap": {"a": np.ones(2)}})
    with pytest.raises(UsageError, match=r"unknown image 'b\.png'"):
        similar(pile.store, query_ids=["b.png"], silent=True)


def test_one_id_is_a_text(stripes, kept):
    found = similar(kept, query_ids="flat/1.png", top=1, silent=True)
    assert [query["id"] for query in found["queries"]] == ["flat/1.png"]


def test_the_command_prints_text_or_one_document(stripes, cli):
    folder, store = stripes
    image = folder / "seen" / "across" / "0.png"
    answer = cli("similar", store, image, "--id", "down/3.png", "--top", "2", "--json", "--quiet")
    found = json.loads(answer.out)
    assert (answer.code, [query["id"] for query in found["queries"]]) == (0, ["down/3.png", str(image)])
    assert [row["label"] for query in found["queries"] for row in query["found"]] == ["down"] * 2 + ["across"] * 2
    assert "across/0.png" in cli("similar", store, image).out
    assert featurepipe.similar is similar
