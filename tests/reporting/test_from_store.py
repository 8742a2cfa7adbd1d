"""The page of what a store holds: a comparison of layers or a bundle, with the images where they can be had."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from featurepipe.errors import UsageError
from featurepipe.reporting import from_store
from featurepipe.reporting.from_store import report
from featurepipe.training.train import train


def pictures_in(page):
    """All pictures in a page, a few of which are Bokeh's own."""
    return set(re.findall(r"data:image/(?:png|jpeg);base64,[A-Za-z0-9+/=]+", page.read_text(encoding="utf-8")))


def png(shade):
    buffer = io.BytesIO()
    Image.fromarray(np.full((20, 20), shade, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def compared(zoo, new_document):
    """A store of made-up features; returns it and writes documents that recommend a column of them."""
    zoo.write([*zoo.images("train", 20), *zoo.images("test", 5)])

    def write(column="b:gap", dataset="zoo", accuracy=0.9):
        document = new_document()
        document["dataset"] = dataset
        document["details"]["column"] = column
        document["recommended"]["accuracy"] = accuracy
        document["space"] = {"name": "tiny", "fingerprint": zoo.features().space_fingerprint}
        document["provenance"]["snapshot"] = zoo.store.snapshot_ids("zoo")[-1]
        zoo.store.write_depth(document)

    zoo.compared = write
    return zoo


@pytest.fixture
def given(monkeypatch):
    """What the page is written from, without the seconds that drawing takes."""
    kept = {}
    monkeypatch.setattr(
        from_store, "write_report", lambda document, target, **more: kept.update(document=document, **more) or target
    )
    return kept


@pytest.fixture
def folder(compared, tmp_path, monkeypatch):
    """The images of the dataset, but one; their made-up keys are taken for those of these bytes."""
    view, keys = compared.features(), {}
    for shade, (id_, key) in enumerate(zip(view.ids, view.keys, strict=True)):
        if shade:
            path = tmp_path / "pictures" / id_
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(shade))
            keys[png(shade)] = key.tobytes()
    monkeypatch.setattr(from_store, "key_of", lambda payload: keys.get(as_bytes(payload), b"changed"))
    return tmp_path / "pictures"


def test_the_newest_comparison_is_shown_with_the_features_it_recommends(compared, tmp_path, given):
    compared.compared("a:gap", accuracy=0.7)
    compared.compared("b:gap", accuracy=0.8)
    compared.compared("a:gap", "other", accuracy=0.1)
    assert report(compared.store, tmp_path / "page.html", silent=True) == tmp_path / "page.html"
    assert given["document"]["recommended"]["accuracy"] == 0.8
    ids, values, labels, total = given["features"]
    view = compared.store.features("zoo", node="b:gap")
    assert ids == list(view.ids)
    assert labels == list(view.labels)
    assert total == len(ids) == 75
    np.testing.assert_array_equal(values, view.read(np.float32))


def test_columns_side_by_side_are_shown_as_one(compared, tmp_path, given):
    compared.compared("a:gap+b:gap")
    report(compared.store.path, tmp_path / "page.html", silent=True)
    np.testing.assert_array_equal(given["features"][1], compared.features().read(np.float32))


def test_of_many_images_some_are_placed_on_the_map(compared, tmp_path, given, monkeypatch):
    monkeypatch.setattr("featurepipe.reporting.images.POINTS", 10)
    compared.compared()
    report(compared.store, tmp_path / "page.html", silent=True)
    ids, values, _, total = given["features"]
    view = compared.store.features("zoo", node="b:gap")
    places = [list(view.ids).index(id_) for id_ in ids]
    assert places == sorted(set(places))
    assert len(places) == 10
    assert total == 75
    np.testing.assert_array_equal(values, view.read(np.float32)[places])
    assert len({id_.split("/")[1] for id_ in ids}) == 3  # of all classes, not the first ten


def test_pictures_of_the_other_source_are_its_own(compared, folder, tmp_path, given, new_document):
    compared.compared()
    report(compared.store, tmp_path / "page.html", source=folder, silent=True)
    assert given["elsewhere"] is None  # the document names no mistakes there
    document = compared.store.depth_documents("zoo")[-1] | {"test_dataset": "zoo"}
    document["details_shifted"] = {"metrics": document["details"]["metrics"]}
    compared.store.write_run({"run_id": compared.store.new_run_id(), "dataset": "zoo", "source": str(folder)})
    report(compared.store, tmp_path / "page.html", document=document, source=tmp_path, silent=True)
    ids = list(compared.features().ids)
    assert np.asarray(Image.open(io.BytesIO(as_bytes(given["elsewhere"](ids[7])))))[0, 0] == 7
    assert given["images"](ids[7]) is None  # not in that folder


def test_pictures_are_read_by_id_where_they_are(compared, folder, tmp_path, given):
    compared.compared()
    report(compared.store, tmp_path / "page.html", source=folder, silent=True)
    ids = list(compared.features().ids)
    assert np.asarray(Image.open(io.BytesIO(as_bytes(given["images"](ids[7])))))[0, 0] == 7
    assert given["images"](ids[0]) is None  # there is no such file
    (folder / ids[8]).unlink()
    assert given["images"](ids[8]) is None  # gone since it was listed
    (folder / ids[9]).write_bytes(png(200))
    assert given["images"](ids[9]) is None  # another image than the one that the features are of


def test_features_that_are_gone_leave_the_page_without_a_map(compared, tmp_path, given, capsys):
    compared.compared()
    document = compared.store.depth_documents("zoo")[-1]
    document["provenance"]["snapshot"] = "20200101T000000000000Z-00000000"
    report(compared.store, tmp_path / "page.html", document=document)
    assert given["features"] is None
    assert "the features that were compared are gone (unknown snapshot" in capsys.readouterr().err


def test_the_map_shows_the_labels_that_were_compared_with(compared, tmp_path, given, capsys):
    compared.compared()
    document = {**compared.store.depth_documents("zoo")[-1], "labels": "own.csv"}
    report(compared.store, tmp_path / "page.html", document=document)
    assert given["features"][2] is None
    assert (
        "compared with the labels of own.csv: the map shows no classes; give them with --labels"
        in capsys.readouterr().err
    )
    own = {id_: "odd" if place % 2 else "even" for place, id_ in enumerate(compared.features().ids)}
    report(compared.store, tmp_path / "page.html", document=document, labels=own, silent=True)
    assert given["features"][2] == [own[id_] for id_ in given["features"][0]]


def test_a_split_is_for_bundles_and_a_folder_is_no_page(compared, tmp_path):
    compared.compared()
    with pytest.raises(UsageError, match="split='test' is for the page of a bundle"):
        report(compared.store, tmp_path / "page.html", split="test", silent=True)
    with pytest.raises(UsageError, match="it is a folder; name a file in it"):
        report(compared.store, tmp_path, silent=True)


def as_bytes(payload):
    return payload if isinstance(payload, bytes) else getattr(payload, "content", payload)


def test_where_the_images_are_is_known_from_the_last_run(compared, folder, tmp_path, given, capsys):
    compared.compared()
    for source in (tmp_path / "long-gone", folder):
        run_id = compared.store.new_run_id()
        compared.store.write_run({"run_id": run_id, "dataset": "zoo", "source": str(source)})
    compared.store.write_run(
        {"run_id": compared.store.new_run_id(), "dataset": "other", "source": str(tmp_path / "none")}
    )
    report(compared.store, tmp_path / "page.html")
    assert given["images"](compared.features().ids[3]) is not None
    assert "no pictures" not in capsys.readouterr().err


@pytest.fixture
def shown(monkeypatch):
    """Ids of the images that are read for a page, of all that its dataset has, in place of the page."""
    kept = {}

    def write(document, target, *, images, elsewhere, features, silent):
        for name, read in (("here", images), ("elsewhere", elsewhere)):
            for _ in range(2):  # pictures are read again for their size
                kept[name] = read and [id_ for id_ in features.ids if read(id_) is not None]
        return target

    monkeypatch.setattr(from_store, "write_report", write)
    return kept


def test_pictures_that_lie_elsewhere_are_not_read(compared, folder, tmp_path, shown, capsys):
    compared.compared()
    ids = list(compared.features().ids)
    for id_ in ids[5:8]:
        (tmp_path / id_.replace("/", "-")).write_bytes((folder / id_).read_bytes())
        (folder / id_).unlink()
        (folder / id_).symlink_to(tmp_path / id_.replace("/", "-"))
    report(compared.store, tmp_path / "page.html", source=folder)
    assert shown == {"here": ids[1:], "elsewhere": None}
    assert "not shown" not in capsys.readouterr().err
    for only_under, left_out in ((folder, 3), (str(folder), 3), ([folder, tmp_path / "x"], 3), ([tmp_path], 0)):
        report(compared.store, tmp_path / "page.html", source=folder, only_under=only_under)
        assert shown["here"] == [id_ for id_ in ids[1:] if not left_out or id_ not in ids[5:8]]
        said = capsys.readouterr().err
        assert ("3 pictures not shown, as --only-under asks for" in said) == bool(left_out)


@pytest.mark.parametrize("kind", ["manifest", "folder", "archives", "url"])
def test_a_source_that_the_store_names_has_to_lie_below_too(
    kind, compared, folder, tmp_path, shown, capsys, monkeypatch
):
    compared.compared()
    ids = list(compared.features().ids)
    (tmp_path / "list.csv").write_text("id,path\n" + "".join(f"{id_},pictures/{id_}\n" for id_ in ids))
    location = {
        "manifest": str(tmp_path / "list.csv"),
        "folder": str(folder),
        "archives": f"{tmp_path}/pictures/*.tar",
        "url": "memory://elsewhere",
    }[kind]
    if kind == "archives":
        (tmp_path / "outside.tar").write_bytes(b"")
        (folder / "a.tar").symlink_to(tmp_path / "outside.tar")
    compared.store.write_run({"run_id": compared.store.new_run_id(), "dataset": "zoo", "source": location})
    asked, real = [], from_store.opened
    monkeypatch.setattr(from_store, "opened", lambda spec, options: asked.append(spec) or real(spec, options))
    inside = folder if kind in ("manifest", "archives") else folder / "train"
    report(compared.store, tmp_path / "page.html", only_under=inside)
    said = capsys.readouterr().err
    assert f"the store names {location}, which is not below {inside}, as --only-under asks for" in said
    assert "the page has no pictures; name them with --source" in said
    assert (asked, shown["here"]) == ([], None)
    if kind == "manifest":
        report(compared.store, tmp_path / "page.html", only_under=inside, source=location)  # by the user's own word
        assert shown["here"] == ids[1:]
        report(compared.store, tmp_path / "page.html", only_under=tmp_path)
        assert shown["here"] == ids[1:]


def test_a_column_of_paths_and_the_other_source_can_be_named(compared, folder, tmp_path, shown, capsys):
    compared.compared()
    ids = list(compared.features().ids)
    (tmp_path / "list.csv").write_text("id,where\n" + "".join(f"{id_},pictures/{id_}\n" for id_ in ids))
    document = compared.store.depth_documents("zoo")[-1] | {"test_dataset": "zoo"}
    document["details_shifted"] = {"metrics": document["details"]["metrics"]}
    given = {"document": document, "source": tmp_path / "list.csv", "path_column": "where"}
    report(compared.store, tmp_path / "page.html", **given)
    assert shown == {"here": ids[1:], "elsewhere": None}
    assert (
        "no run says where the images are: the page has no pictures; name them with --test-source"
        in capsys.readouterr().err
    )
    report(
        compared.store, tmp_path / "page.html", **given, test_source=tmp_path / "list.csv", only_under=folder / "test"
    )
    allowed = [id_ for id_ in ids[1:] if id_.startswith("test/")]
    assert shown == {"here": allowed, "elsewhere": allowed}
    assert "60 pictures not shown" in capsys.readouterr().err


@pytest.mark.slow
def test_without_images_it_says_so_and_writes_the_page(compared, tmp_path, capsys):
    compared.compared()
    page = tmp_path / "page.html"
    report(compared.store, page)
    assert (
        "no run says where the images are: the page has no pictures; name them with --source" in capsys.readouterr().err
    )
    text = page.read_text(encoding="utf-8")
    assert "blocks.10:avg5x5" in text
    assert "train/cat/0.png" in text  # placed on the map
    assert len(pictures_in(page)) < 5
    report(compared.store, page, source=tmp_path / "nowhere")
    assert "the images cannot be listed (" in capsys.readouterr().err
    report(compared.store, page, silent=True)
    assert capsys.readouterr().err == ""


def test_a_bundle_is_evaluated_and_shown_with_its_own_columns(compared, folder, tmp_path):
    bundle, page = tmp_path / "bundle", tmp_path / "page.html"
    record = train(compared.store, nodes=["a:gap", "b:gap"], out=bundle, silent=True)
    report(compared.store, page, bundle=bundle, source=folder, command="featurepipe report it", silent=True)
    text = page.read_text(encoding="utf-8")
    accuracy = record["test"]["accuracy"]["value"]
    assert f"{100 * accuracy:.1f}" in text or f"{accuracy:.3f}" in text or f"{accuracy:.4f}" in text
    for shown in ("featurepipe report it", "a:gap", "b:gap", "test/cat/0.png"):
        assert shown in text
    assert "train/cat/0.png" not in text  # only what it was tested on is on the map
    report(compared.store, tmp_path / "plain.html", bundle=bundle, silent=True)
    assert len(pictures_in(page) - pictures_in(tmp_path / "plain.html")) >= 15  # one for each image of the test


def test_a_bundles_document_has_what_was_found(compared, tmp_path, given):
    train(compared.store, nodes=["b:gap"], out=tmp_path / "bundle", silent=True)
    report(compared.store, tmp_path / "page.html", bundle=tmp_path / "bundle", split="train", silent=True)
    document = given["document"]
    assert (document["kind"], document["version"]) == ("bundle", 1)
    assert document["bundle"]["columns"] == ["b:gap"]
    assert document["evaluation"]["split"] == "train"
    assert document["evaluation"]["counts"]["images"] == 60
    assert document["provenance"]["snapshot"] == compared.store.snapshot_ids("zoo")[-1]
    assert len(given["features"][0]) == 60
    assert given["features"][1].shape == (60, 2)


def test_what_was_not_compared_has_no_page(compared, tmp_path):
    with pytest.raises(
        UsageError, match=r"the layers of dataset zoo have not been compared yet; run: featurepipe depth"
    ):
        report(compared.store, tmp_path / "page.html", silent=True)
    with pytest.raises(UsageError, match=r"unknown dataset 'zu'.*zoo"):
        report(compared.store, tmp_path / "page.html", dataset="zu", silent=True)
    compared.compared()
    with pytest.raises(UsageError, match=r"there is no folder .*missing; make it first"):
        report(compared.store, tmp_path / "missing" / "page.html", silent=True)
    assert list(tmp_path.glob("*.html")) == []


def test_of_several_datasets_one_must_be_named(compared, tmp_path, given):
    compared.compared()
    compared.write(compared.images("more", 3), "ark")
    with pytest.raises(UsageError, match=r"2 datasets \(ark, zoo\); choose one with dataset"):
        report(compared.store, tmp_path / "page.html", silent=True)
    report(compared.store, tmp_path / "page.html", dataset="zoo", silent=True)
    assert given["document"]["dataset"] == "zoo"


@pytest.mark.slow
def test_the_command_line_writes_the_page(compared, tmp_path, cli):
    compared.compared()
    finished = cli("report", compared.store.path, "--to", tmp_path / "page.html")
    assert finished.code == 0, finished.err
    assert finished.out == f"{tmp_path / 'page.html'}\n"
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
