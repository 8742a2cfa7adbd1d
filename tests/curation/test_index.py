"""The index of look-alikes: it finds what comparing every image finds, follows the snapshot, and is never stale."""

import shutil

import numpy as np
import pytest

from featurepipe import SimilarImages
from featurepipe.curation import index as module
from featurepipe.curation.similar import similar, similar_text
from featurepipe.errors import UsageError
from featurepipe.store import forget_images, gc_store, verify_store
from featurepipe.store.indexes import read_index, write_index

NAMES = [f"{n}.png" for n in range(400)]


def clusters(seed, count=400, width=40):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(8, width))
    return (centres[rng.integers(8, size=count)] + 0.5 * rng.normal(size=(count, width)) + 1).astype("f4")


@pytest.fixture
def full(pile):
    """400 images in 8 clusters, and a copy of one of them."""
    values = pile.add_rows(NAMES, clusters(0))
    pile.add("3.png", name="copy-of-3.png")
    pile.night({"b:gap": values})
    return pile


def answers(store, index, ids, **options):
    found = similar(store, query_ids=ids, top=7, index=index, silent=True, **options)
    assert found["search"] == ("exact" if index == "never" else "index")
    return names(found)


def names(found):
    """Distances may differ by rounding."""
    return [(query["id"], [row["id"] for row in query["found"]]) for query in found["queries"]]


def test_of_many_cells_some_are_searched_and_as_many_as_the_recall_takes(full, monkeypatch):
    monkeypatch.setattr(module, "_LEAST", 20)
    answers(full.store, "always", ["3.png"])
    about = read_index(file_of(full.store)).document
    assert 4 <= about.probes < 80  # of 80 cells
    assert about.recall >= module.ENOUGH
    images = SimilarImages(full.store, index="always", silent=True)
    asked = NAMES[:200]
    found = images.like(*asked, top=10).to_pylist()
    true = {
        (query["id"], row["id"])
        for query in similar(full.store, query_ids=asked, index="never", silent=True)["queries"]
        for row in query["found"]
    }
    recall = len(true & {(row["query"], row["id"]) for row in found}) / len(true)
    assert abs(recall - about.recall) < 0.02


def file_of(store):
    (path,) = store.path.glob("indexes/*/*.npz")
    return path


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_an_index_finds_what_comparing_every_image_finds(full, distance):
    ids = ["3.png", "copy-of-3.png", *NAMES[10:40]]
    found = answers(full.store, "always", ids, distance=distance)
    assert found == answers(full.store, "never", ids, distance=distance)
    assert found[0][1][0] == "copy-of-3.png"
    index = read_index(file_of(full.store))
    assert index.document.recall >= module.ENOUGH
    assert (index.document.vectors, len(index.rows), index.codes.dtype) == (400, 401, np.float16)
    assert verify_store(full.store).clean


def test_only_new_images_are_added_and_those_that_went_are_gone(full, monkeypatch):
    answers(full.store, "always", ["3.png"])
    before = read_index(file_of(full.store))
    gone = full.images.pop("5.png")
    fresh = full.add_rows([f"new{n}.png" for n in range(30)], clusters(1, 30))
    full.night({"b:gap": fresh})
    projected = []
    monkeypatch.setattr(module, "made_index", lambda *_, **__: pytest.fail("made anew"))
    monkeypatch.setattr(
        module, "iterate", lambda images, **_: [projected.append(len(images)), (0, images.read("f4"))][1:]
    )
    ids = ["3.png", "new7.png", "11.png"]
    found = similar(full.store, query_ids=ids, top=7, index="always", silent=True)
    assert found["why"] == "the index was brought up to date: 30 images came, 1 went"
    assert projected == [30]
    monkeypatch.undo()
    assert names(found) == answers(full.store, "never", ids)
    after = read_index(file_of(full.store))
    assert (after.document.vectors, after.document.trained_on) == (429, 400)
    assert {key.tobytes() for key in before.keys} - {key.tobytes() for key in after.keys} == {
        full.store.features("pile", snapshot=full.store.snapshot_ids("pile")[0]).keys[5].tobytes()
    }
    assert "the index is of this snapshot" in similar_text(
        similar(full.store, query_ids=ids, index="always", silent=True)
    )
    full.images = {name: row for name, row in full.images.items() if name in NAMES[:100]} | {"5.png": gone}
    full.night()
    monkeypatch.setattr(module, "refreshed", lambda *_: pytest.fail("cells of four times as many images were kept"))
    assert "was made" in similar(full.store, query_ids=["3.png"], index="always", silent=True)["why"]


def of_a_kind(axes, count, seed, width=320):
    """Rows that spread along some axes alone."""
    rng = np.random.default_rng(seed)
    values = np.zeros((count, width), "f4")
    values[:, axes] = rng.normal(size=(count, axes.stop - axes.start))
    return values


def measured_recall(store, ids):
    found, true = (similar(store, query_ids=ids, index=how, silent=True)["queries"] for how in ("always", "never"))
    pairs = zip(found, true, strict=True)
    return (
        np.mean([len({row["id"] for row in one["found"]} & {row["id"] for row in two["found"]}) for one, two in pairs])
        / 10
    )


@pytest.mark.parametrize("among", [50_000, 300])
def test_images_of_another_kind_get_an_index_anew_where_the_kept_one_does_not_find_them(pile, monkeypatch, among):
    monkeypatch.setattr(module, "_AMONG", among)
    names_of = {kind: [f"{kind}{n}.png" for n in range(count)] for kind, count in (("a", 600), ("b", 500), ("c", 30))}
    pile.night({"b:gap": pile.add_rows(names_of["a"], of_a_kind(slice(0, 150), 600, 1))})
    monkeypatch.setattr(module, "_CANDIDATES", (64, 128))
    made = similar(pile.store, query_ids=["a0.png"], index="always", silent=True)
    assert made["recall"] == read_index(file_of(pile.store)).document.recall_made >= module.ENOUGH
    pile.night({"b:gap": pile.add_rows(names_of["b"], of_a_kind(slice(160, 200), 500, 2))})
    said = []
    make = module.made_index
    monkeypatch.setattr(module, "made_index", lambda *a, **k: said.append(1) or make(*a, **k))
    found = similar(pile.store, query_ids=["b0.png"], index="always", silent=True)
    assert (found["why"], said) == ("an index of 1,100 images was made", [1])
    for kind in "ab":
        recall = measured_recall(pile.store, names_of[kind][:60])
        assert recall >= found["recall"] - 0.03
    low = found["recall"] < module.ENOUGH
    pile.night({"b:gap": pile.add_rows(names_of["c"], of_a_kind(slice(160, 200), 30, 3))})
    again = similar(pile.store, query_ids=["b0.png"], index="always", silent=True)
    assert (again["why"], said) == ("the index was brought up to date: 30 images came, 0 went", [1])
    assert bool(again["warnings"]) == (again["recall"] < module.ENOUGH)
    assert low or again["recall"] >= module.ENOUGH - module._NOISE


def test_a_search_looks_at_more_where_images_that_came_need_it(full, monkeypatch):
    answers(full.store, "always", ["3.png"])
    path = file_of(full.store)
    kept = read_index(path)
    poor = module._with(kept, candidates=1)
    write_index(full.store.path, poor)
    monkeypatch.setattr(module, "_CANDIDATES", (2, 64))
    monkeypatch.setattr(module, "made_index", lambda *_, **__: pytest.fail("made anew"))
    full.night({"b:gap": full.add_rows([f"new{n}.png" for n in range(30)], clusters(1, 30))})
    found = similar(full.store, query_ids=["new1.png"], index="always", silent=True)
    about = read_index(path).document
    assert (about.candidates, about.recall_made) == (64, kept.document.recall_made)
    assert found["recall"] == about.recall >= module.ENOUGH


def test_auto_takes_a_kept_index_where_images_are_many_and_says_what_it_took(full, monkeypatch):
    assert similar(full.store, query_ids=["3.png"], silent=True)["why"] == "fewer than 200,000 images"
    monkeypatch.setattr(module, "FEW", 100)
    found = similar(full.store, query_ids=["3.png"], silent=True)
    assert (found["search"], found["why"]) == ("exact", "no index is kept; --index always makes one")
    answers(full.store, "always", ["3.png"])
    assert answers(full.store, "auto", ["3.png"]) == answers(full.store, "never", ["3.png"])
    old = full.store.snapshot_ids("pile")[0]
    del full.images["7.png"]
    full.night()
    answers(full.store, "auto", ["3.png"])  # brings it up to date
    found = similar(full.store, query_ids=["3.png"], snapshot=old, silent=True)
    assert found["search"] == "exact"
    assert f"is not of snapshot {old}" in found["why"]
    with pytest.raises(UsageError, match=f"is not of snapshot {old}.*leave the snapshot out"):
        similar(full.store, query_ids=["3.png"], snapshot=old, index="always", silent=True)


def test_an_index_that_is_damaged_or_of_another_space_is_never_searched(full):
    answers(full.store, "always", ["3.png"])
    path = file_of(full.store)
    content = path.read_bytes()
    path.write_bytes(content[:3000] + bytes([content[3000] ^ 1]) + content[3001:])
    problems = verify_store(full.store).problems
    assert [(problem.part, "is damaged" in problem.what) for problem in problems] == [
        (str(path.relative_to(full.store.path)), True)
    ]
    found = similar(full.store, query_ids=["3.png"], index="always", silent=True)
    assert "is damaged" in found["warnings"][0]
    assert found["why"] == "an index of 401 images was made"
    assert verify_store(full.store).clean
    rng = np.random.default_rng(3)
    other = {name: rng.normal(size=40) for name in NAMES}
    full.night({"b:gap": other}, fields={"dtype": "float32", "made": "otherwise"})
    space = next(one for one in full.store.spaces() if one.fields.get("made") == "otherwise")
    shutil.copy(path, path.with_name(path.name.replace(path.name[:12], space.fingerprint[:12])))
    found = similar(full.store, query_ids=["3.png"], top=7, index="always", backbone=space.fingerprint, silent=True)
    assert "was made" in found["why"]
    assert names(found) == answers(full.store, "never", ["3.png"], backbone=space.fingerprint)


def test_gc_removes_an_index_with_images_that_no_snapshot_has(full):
    answers(full.store, "always", ["3.png"])
    assert gc_store(full.store, keep_snapshots=1).indexes_removed == 0
    del full.images["5.png"]
    full.night()
    assert gc_store(full.store).indexes_removed == 0  # the older snapshot still has it
    assert gc_store(full.store, keep_snapshots=1, dry_run=True).indexes_removed == 1
    assert gc_store(full.store, keep_snapshots=1).indexes_removed == 1
    assert not list(full.store.path.glob("indexes/*/*"))


def test_an_image_that_is_forgotten_while_an_index_is_made_is_not_in_it(full, monkeypatch):
    full.night({"b:gap": full.add_rows(["person.png"], -clusters(2, 1))})  # far away, in a part of its own
    key = {row["id"]: row["key"] for row in full.store.snapshot("pile").to_pylist()}["person.png"]
    make, kept = module.made_index, []

    def slow(*args, **options):
        made = make(*args, **options)
        if not kept:
            forget_images(full.store, ["person.png"])
        return made

    def write(root, index):
        kept.append([found.tobytes() for found in index.keys])
        return write_index(root, index)

    monkeypatch.setattr(module, "made_index", slow)
    monkeypatch.setattr(module, "write_index", write)
    found = similar(full.store, query_ids=["3.png"], top=2, index="always", silent=True)
    assert found["images"] == 401
    assert [key in keys for keys in kept] == [False]


def test_an_object_that_stays_open_follows_the_dataset(full):
    images = SimilarImages(full.store, index="always", silent=True)
    expected = answers(full.store, "never", ["3.png", "8.png"])
    table = images.like("3.png", "8.png", top=7).to_pylist()
    assert [row["id"] for row in table] == [id_ for _, ids in expected for id_ in ids]
    same = images.like_vectors(images.features.read("f4", rows=np.array([8])), top=1).to_pylist()
    assert [(row["query"], row["id"], row["rank"]) for row in same] == [("0", "8.png", 1)]
    full.night({"b:gap": full.add_rows(["twin.png"], images.features.read("f4", rows=np.array([8])))})
    assert images.like("8.png", top=1)["id"].to_pylist() == ["twin.png"]
    with pytest.raises(UsageError, match=r"features of shape \(1, 3\): b:gap has 40 values an image"):
        images.like_vectors(np.zeros(3))
    with pytest.raises(UsageError, match="unknown image 'nowhere'"):
        images.like("nowhere")
