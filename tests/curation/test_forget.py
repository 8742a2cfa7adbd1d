"""A person asks to be forgotten: features, pictures of a page, a bundle; and the images are still in the source."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import featurepipe
from featurepipe.cli import main
from featurepipe.curation.forget import StandingList, forget, forget_text, ids_of, would_forget
from featurepipe.errors import UsageError
from featurepipe.progress import show as shown
from featurepipe.store import FeatureStore
from tests.curation.conftest import KINDS, picture

OPTIONS = {"backbone": "lenet5", "weights": "none", "precision": "fp32", "dtype": "float32", "silent": True}
PERSON = ["flat/0.png", "flat/1.png"]


@pytest.fixture
def source(tmp_path):
    for kind in KINDS:
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for number in range(3):
            picture(kind, number).save(tmp_path / "photos" / kind / f"{number}.png")
    return tmp_path / "photos"


@pytest.fixture
def store(source, tmp_path):
    featurepipe.extract(source, tmp_path / "store", dataset="d", **OPTIONS)
    return FeatureStore(tmp_path / "store")


def test_forgotten_images_are_not_computed_again(store, source):
    keys = {row["id"]: row["key"] for row in store.snapshot("d").to_pylist()}
    told = forget(store, PERSON, silent=True)
    assert (told["rows_dropped"], told["left"], told["refused"]) == (2, [], True)
    record = featurepipe.extract(source, store, dataset="d", max_rejects=1, **OPTIONS)
    assert (record["forgotten"], record["counts"]["listed"], record["counts"]["computed"]) == (2, 7, 0)
    assert record["changes"]["deleted"] == 0
    assert not set(PERSON) & set(store.snapshot("d")["id"].to_pylist())
    (source / "flat" / "again.png").write_bytes((source / "flat" / "0.png").read_bytes())
    record = featurepipe.extract(source, store, dataset="d", max_rejects=1, **OPTIONS)
    assert record["reject_reasons"] == {"forgotten": 1}
    assert record["rejects"][0]["id"] == "flat/again.png"
    row = next(row for row in store.snapshot("d").to_pylist() if row["id"] == "flat/again.png")
    assert (row["status"], row["key"]) == ("rejected", None)
    files = [file for file in store.path.rglob("*") if file.is_file()]
    for id_ in PERSON:
        assert not [f for f in files if keys[id_] in f.read_bytes() or keys[id_].hex().encode() in f.read_bytes()]
        assert not [f for f in files if f.suffix != ".parquet" and id_.encode() in f.read_bytes()]
    forget(store, PERSON, may_come_back=True, silent=True)
    record = featurepipe.extract(source, store, dataset="d", max_rejects=1, **OPTIONS)
    assert (record["forgotten"], record["counts"]["computed"], record["counts"]["listed"]) == (0, 2, 10)


def test_images_given_in_python_keep_their_rows(store, source):
    paths = sorted(map(str, source.rglob("*.png")))
    network = featurepipe.CNNFeatures("lenet5", weights="none", store=store.path, on_reject="nan").fit(paths)
    before = network.transform(paths)
    forget(store, PERSON, dataset="d", silent=True)
    after = network.transform(paths)
    gone = np.array([path.endswith(("flat/0.png", "flat/1.png")) for path in paths])
    assert np.isnan(after[gone]).all()
    np.testing.assert_array_equal(after[~gone], before[~gone])


def test_what_depends_on_them_is_named(store, source, tmp_path, capsys):
    made = tmp_path / "made"
    made.mkdir()
    featurepipe.train(store, out=made / "knn", dataset="d", head="knn", params={"n_neighbors": 1}, silent=True)
    labels = {f"{kind}/{number}.png": kind for kind in KINDS[1:] for number in range(3)}
    featurepipe.train(store, out=made / "others", dataset="d", head="centroid", labels=labels, silent=True)
    featurepipe.extract(source, made / "store", dataset="e", **OPTIONS)
    (made / "page.html").write_text("<p>flat/1.png</p>")
    (made / "paths.html").write_text("<img src=/data/photos/flat/1.png>")
    (made / "escaped.html").write_text("<p>flat&#x2F;0.png</p>")
    (made / "other.html").write_text("<p>xflat/1.png flat/1.pngx flat/2.png b/flat/1.png</p>")
    pq.write_table(pa.table({"id": ["flat/0.png", "down/0.png"], "label": ["a", "b"]}), made / "predicted.parquet")
    asked = made / "withdrawn.txt"
    asked.write_text("\n".join(PERSON))
    planned = forget(store, asked, look_in=[made], dry_run=True, silent=True)
    told = forget(store, asked, look_in=[made], silent=True)
    assert planned["dependents"] == told["dependents"]
    found = {(entry["kind"], entry["path"].removeprefix(f"{made}/")): entry for entry in told["dependents"]}
    assert found.keys() == {
        ("bundle", "knn"), ("page", "escaped.html"), ("page", "page.html"), ("page", "paths.html"),
        ("store", "store"), ("table", "predicted.parquet"),
    }  # fmt: skip
    assert "a knn head keeps feature rows" in found["bundle", "knn"]["why"]
    assert (found["store", "store"]["images"], found["table", "predicted.parquet"]["images"]) == (2, 1)
    text = forget_text(told)
    assert told["free_bundles"] == [str(made / "others")]
    assert f"looked at, holds none of them: bundle {made / 'others'}\n" in f"{text}\n"
    assert main(["forget", str(store.path), "--ids", str(asked), "--look-in", str(made), "--json"]) == 0
    found = [Path(entry["path"]).name for entry in json.loads(capsys.readouterr().out)["dependents"]]
    assert "page.html" in found
    assert asked.name not in found
    assert "2 images of dataset d\nremoved: 2 rows" in text
    assert f"depends on them: bundle {made / 'knn'}: trained, tuned or calibrated on " in text
    assert "none of their keys, features or names" in text


def kinds_of(told):
    return {(entry["kind"], Path(entry["path"]).name): entry["images"] for entry in told["dependents"]}


@pytest.fixture
def trained(store, source, tmp_path):
    """A bundle and a store of the person's images, and a bundle of others, where no run record names them."""
    made = tmp_path / "made"
    featurepipe.train(store, out=tmp_path / "first", dataset="d", head="knn", params={"n_neighbors": 1}, silent=True)
    labels = {f"{kind}/{number}.png": kind for kind in KINDS[1:] for number in range(3)}
    featurepipe.train(store, out=tmp_path / "second", dataset="d", head="centroid", labels=labels, silent=True)
    made.mkdir()
    (tmp_path / "first").rename(made / "knn")
    (tmp_path / "second").rename(made / "others")
    featurepipe.extract(source, made / "store", dataset="e", **OPTIONS)
    key = {row["id"]: row["key"].hex() for row in store.snapshot("d").to_pylist()}[PERSON[0]]
    (made / "key.csv").write_text(f"number,key\n1,{key}\n")
    return made


def test_what_was_forgotten_before_is_found_in_bundles_and_stores_still(store, trained):
    first = forget(store, PERSON, look_in=[trained], dry_run=True, silent=True)
    assert kinds_of(first).keys() == {("bundle", "knn"), ("store", "store"), ("table", "key.csv")}
    assert forget(store, PERSON, silent=True)["dependents"] == []
    again = forget(store, PERSON, look_in=[trained], silent=True)
    assert (again["known"], again["dependents"], again["unread"]) == (0, first["dependents"], [])
    assert again["free_bundles"] == [str(trained / "others")]
    one = forget(store, [*PERSON[:1], "down/0.png"], look_in=[trained], silent=True)
    assert kinds_of(one)["store", "store"] == 2  # one that was forgotten before, and one that is now
    assert kinds_of(forget(store, ["across/0.png"], look_in=[trained], silent=True)).keys() == {
        ("bundle", "knn"), ("bundle", "others"), ("store", "store"),
    }  # fmt: skip


def test_of_images_that_an_earlier_version_forgot_nobody_calls_a_bundle_free(store, trained):
    forget(store, PERSON, silent=True)
    file = store.path / "forgotten.json"
    record = json.loads(file.read_text())
    for image in record["images"]:
        assert len(image.pop("prefixes")) == 1
    file.write_text(json.dumps(record))
    told = forget(store, PERSON, look_in=[trained], silent=True)
    assert kinds_of(told).keys() == {("store", "store"), ("table", "key.csv")}  # whole keys were kept always
    assert told["free_bundles"] == []
    assert [Path(one["path"]).name for one in told["unread"]] == ["knn", "others"]
    text = forget_text(told)
    assert f"cannot tell whether {trained / 'knn'} depends on them: the keys are gone of 2 images" in text
    assert all("prefixes" not in image for image in json.loads(file.read_text())["images"])


def test_bytes_that_stay_for_another_id_are_found_in_bundles_again(store, source, trained):
    (source / "flat" / "copy.png").write_bytes((source / "flat" / "0.png").read_bytes())
    featurepipe.extract(source, store, dataset="d", **OPTIONS)
    first = forget(store, PERSON[:1], look_in=[trained], dry_run=True, silent=True)
    assert (first["kept_keys"], "forgotten.json" in {path.name for path in store.path.iterdir()}) == (1, False)
    forget(store, PERSON[:1], silent=True)
    again = forget(store, PERSON[:1], look_in=[trained], silent=True)
    assert kinds_of(again)["bundle", "knn"] == kinds_of(first)["bundle", "knn"]


def test_a_bundle_beside_the_store_or_in_the_current_folder_is_found_unasked(store, trained, tmp_path, monkeypatch):
    beside, here = store.path.parent / "beside", tmp_path / "elsewhere"
    here.mkdir()
    monkeypatch.chdir(here)
    told = forget(store, PERSON[:1], dry_run=True, silent=True)
    unasked = {Path(one["path"]).name for one in told["dependents"]}
    shutil.copytree(trained / "knn", beside)
    shutil.copytree(trained / "knn", here / "deeper" / "knn")
    shutil.copytree(trained / "knn", here / "mine")
    told = forget(store, PERSON[:1], dry_run=True, silent=True)
    assert {Path(one["path"]).name for one in told["dependents"]} - unasked == {"beside", "mine"}


def test_features_that_were_handed_on_and_tables_of_any_size_are_named(store, tmp_path, capsys, monkeypatch):
    made = tmp_path / "made"
    made.mkdir()
    for name in ("all.npz", "all.h5", "all.parquet", "folder"):
        featurepipe.export(store, node="bottleneck", to=made / name, silent=True)
    pq.write_table(pa.table({"query": ["flat/0.png"], "id": ["down/0.png"]}), made / "like.parquet")
    monkeypatch.setattr("featurepipe.curation.forget._AT_ONCE", 40)
    (made / "long.csv").write_text(
        "id,label\n" + "".join(f"x{number}.png,a\n" for number in range(9)) + "flat/1.png,b\n"
    )
    (made / "free.csv").write_text("id,label\ndown/0.png,a\n")
    for name in ("model.pt", "other.pt", "LICENCE"):
        (made / name).write_bytes(b"flat/0.png")
    (made / "broken.npz").write_bytes(b"flat/0.png")
    (tmp_path / "by-a-link").symlink_to(made)
    told = forget(store, PERSON, look_in=[tmp_path / "by-a-link"], silent=True)
    found = {Path(entry["path"]).relative_to(made).as_posix(): entry["images"] for entry in told["dependents"]}
    assert found == {
        "all.npz": 2, "all.h5": 2, "all.parquet": 2, "folder/features-00000.parquet": 2, "like.parquet": 1, "long.csv": None,
    }  # fmt: skip
    assert [Path(one["path"]).name for one in told["unread"]] == ["broken.npz"]
    assert told["other_files"] == {"": 1, ".pt": 2}
    text = forget_text(told)
    assert f"cannot tell whether {made / 'broken.npz'} depends on them: " in text
    assert "not looked into, as files of another kind: without a suffix (1), .pt (2)" in text
    nothing = forget(store, ["down/1.png"], look_in=[made / "free.csv"], silent=True)
    assert (nothing["dependents"], nothing["looked_in"]) == ([], [str(made / "free.csv")])
    assert (
        "nothing that run records name, no bundle or store beside this one, and nothing that was looked in"
        in forget_text(nothing)
    )


def test_the_rejects_of_a_store_do_not_depend_on_its_images(store, source):
    (source / "flat" / "torn.png").write_bytes((source / "flat" / "0.png").read_bytes()[:200])
    record = featurepipe.extract(source, store, dataset="d", max_rejects=1, **OPTIONS)
    assert Path(record["rejects_file"]).is_file()
    told = forget(store, ["flat/torn.png"], silent=True)
    assert (told["rejects_removed"], told["dependents"]) == (1, [])
    assert (
        "nothing that run records name, no bundle or store beside this one; --look-in FOLDER searches further"
        in forget_text(told)
    )


def test_a_folder_of_features_that_a_job_wrote_is_named(store, tmp_path):
    featurepipe.export(store, node="bottleneck", to=tmp_path / "handed-on", silent=True)
    result = {"file": str(tmp_path / "handed-on")}
    step = {"step": "export", "name": "bottleneck", "status": "done", "seconds": 0.1, "result": result}
    store.write_run({"run_id": store.new_run_id(), "steps": [step]})
    (found,) = forget(store, PERSON, silent=True)["dependents"]
    assert (found["path"], found["images"]) == (str(tmp_path / "handed-on" / "features-00000.parquet"), 2)


def test_from_the_command_line(store, tmp_path, capsys, monkeypatch):
    bars = []
    monkeypatch.setattr(
        "featurepipe.store.traces.show", lambda *told, **how: bars.append((told, how)) or shown(*told, **how)
    )
    (tmp_path / "ids.txt").write_text("\n".join(PERSON) + "\n\n")
    assert main(["forget", str(store.path), "--ids", str(tmp_path / "ids.txt"), "--dry-run"]) == 0
    assert "would be removed: 2 rows; would be rewritten: 1 part, 1 snapshot" in capsys.readouterr().out
    assert main(["forget", str(store.path), "--ids", str(tmp_path / "ids.txt"), "--id", "down/0.png", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rows_dropped"] == 3
    assert main(["forget", str(store.path), "--id", "flat/7.png"]) == 2
    assert "1 of the ids is nowhere in dataset d" in capsys.readouterr().err
    assert main(["forget", str(store.path)]) == 2
    assert "no image to forget" in capsys.readouterr().err
    assert main(["forget", str(store.path), "--id", "flat/0.png", "--look-in", str(tmp_path / "absent")]) == 2
    assert "cannot look in" in capsys.readouterr().err
    assert bars == [
        ((told["searched_files"], "read back"), {"unit": "files", "silent": False})
    ]  # once, and not of what was refused
    (store.path / "mine.txt").write_text("see flat/2.png")
    assert main(["forget", str(store.path), "--id", "flat/2.png"]) == 1
    assert "STILL THERE: mine.txt: a name" in capsys.readouterr().out


def test_an_image_is_found_in_whatever_dataset_has_it(store, source, tmp_path, capsys):
    (source / "new").mkdir()
    picture(KINDS[0], 9).save(source / "new" / "9.png")
    featurepipe.extract(source, store, dataset="e", **OPTIONS)
    assert main(["forget", str(store.path), "--id", "new/9.png"]) == 0
    assert "1 image of dataset e\nremoved: 1 row;" in capsys.readouterr().out
    (tmp_path / "ids.txt").write_text("flat/0.png\nflat/1.png\n")
    forget(store, PERSON[:1], dataset="d", silent=True)
    asked = ["forget", str(store.path), "--ids", str(tmp_path / "ids.txt")]
    assert main([*asked, "--dataset", "d", "--dry-run"]) == 0
    assert (
        "dataset e has 2 of these ids, too, where they stay; --dataset e, or no --dataset, removes them"
        in capsys.readouterr().out
    )
    assert main([*asked, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["2 images", "would be removed from: d (1), e (2)"]
    assert lines[2].startswith(
        "1 id in several datasets, and would be removed from each, though it may be another image there: "
    )
    told = forget(store, tmp_path / "ids.txt", silent=True)
    assert (told["datasets"], told["several_ids"], told["rows_dropped"], told["kept_for"]) == (
        {"d": 1, "e": 2},
        ["flat/1.png"],
        2,
        [],
    )
    assert not {*PERSON} & {*store.snapshot("d")["id"].to_pylist(), *store.snapshot("e")["id"].to_pylist()}


def test_a_list_that_stays_may_be_empty_and_of_any_form(store, tmp_path):
    empty = {"a.txt": "", "b.txt": "\n  \n", "a.csv": "", "b.csv": "id,why\n", "a.jsonl": "\n", "a.parquet": ""}
    for name, text in empty.items():
        (tmp_path / name).write_text(text)
        assert StandingList.read(tmp_path / name, store, "d").told() == {"listed": 0, "forgotten_before": 0}
    forget(store, PERSON[:1], silent=True)
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfflat/0.png\r\nflat/1.png\r\nflat/0.png\r\n")
    listed = StandingList.read(tmp_path / "bom.txt", store, "d")
    assert (listed.ids, listed.fresh) == (tuple(PERSON), ("flat/1.png",))
    for dataset, known in (("d", 1), ("elsewhere", 0)):
        found = would_forget(StandingList.read(tmp_path / "bom.txt", store, dataset), store)
        before = int(dataset == "d")
        counts = {"listed": 2, "forgotten_before": before, "known": known, "unknown": 2 - before - known}
        assert found == {**counts, "elsewhere": {} if before else {"d": 1}, "unfinished": False}
    nowhere = StandingList.read(tmp_path / "bom.txt", None, "d")
    assert would_forget(nowhere, None) == {
        "listed": 2, "forgotten_before": 0, "known": 0, "unknown": 2, "elsewhere": {}, "unfinished": False,
    }  # fmt: skip
    with pytest.raises(UsageError, match=r"the list of images to forget is not there; an empty file is a list of none"):
        StandingList.read(tmp_path / "absent.txt", store, "d")


def test_ids_from_files(tmp_path):
    (tmp_path / "a.csv").write_text("id,why\nx/1.png,withdrawn\n2,withdrawn\n")
    (tmp_path / "a.txt").write_text("x/1.png\n a b.png\n")
    for name, text in (("b.csv", "name,why\nx,y\n"), ("b.jsonl", '{"name": "x"}\n')):
        (tmp_path / name).write_text(text)
        with pytest.raises(UsageError, match=rf"cannot read ids of .*{name}: .*`id`") as raised:
            ids_of(tmp_path / name)
        assert "abels" not in str(raised.value)
    assert ids_of(tmp_path / "a.csv") == ["x/1.png", "2"]
    assert ids_of(tmp_path / "a.txt") == ["x/1.png", " a b.png"]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UsageError, match="has no ids"):
        ids_of(tmp_path / "empty.txt")
    with pytest.raises(UsageError, match="cannot read ids"):
        ids_of(tmp_path / "absent.txt")


def test_blanks_around_an_id_are_left_out_unless_the_store_knows_it_so(store, source, tmp_path, capsys):
    picture(KINDS[0], 8).save(source / " own.png")
    featurepipe.extract(source, store, dataset="d", **OPTIONS)
    asked = tmp_path / "ids.txt"
    asked.write_text("flat/0.png \n\tflat/1.png\n own.png\n")
    listed = StandingList.read(asked, store, "d")
    assert (listed.ids, listed.blanks) == ((*PERSON, " own.png"), 2)
    assert StandingList.read(asked, None, "d").ids == (*PERSON, "own.png")
    assert main(["forget", str(store.path), "--ids", str(asked), "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert "3 images of dataset d\nremoved: 3 rows" in out
    assert "2 ids had blanks around, which were left out\n" in out
    assert err == ""
    assert forget(store, [" own.png"], silent=True)["blanks"] == 0  # as it was forgotten with it
    assert "own.png" not in {id_.strip() for id_ in store.snapshot("d")["id"].to_pylist()}
