"""COCO's JSON and YOLO's folders: which boxes they list, and what is said of those that are wrong."""

import copy
import io
import json
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image

from featurepipe.errors import Reject, SourceError, UsageError
from featurepipe.images import open_source
from featurepipe.images.listing import ListingSummary
from featurepipe.images.regions import Box, Boxes, Region, split_region

COCO = {
    "info": {"year": 2026},
    "images": [
        {"id": 7, "file_name": "b.png", "width": 40, "height": 30},
        {"id": 3, "file_name": "a.png", "width": 40, "height": 30},
        {"id": 4, "file_name": "none.png"},
    ],
    "annotations": [
        {"id": 1, "image_id": 3, "category_id": 2, "bbox": [1, 2, 10.5, 20], "segmentation": [[1, 2]], "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 1, "bbox": [0, 0, 0, 5]},
        {"id": 3, "image_id": 3, "category_id": 1, "bbox": [4, 4, 4, 4]},
        {"id": 4, "image_id": 3, "category_id": 1, "bbox": [0, 0, 40, 30], "iscrowd": 1},
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
}


def png():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def coco(folder, document=COCO, images="train2017"):
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / images).mkdir(exist_ok=True)
    for name in ("a.png", "b.png"):
        (folder / images / name).write_bytes(png())
    path = folder / "annotations" / "instances_train2017.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def listed(source):
    table = source.scan()
    boxes = [split_region(locator)[1] for locator in table["locator"].to_pylist()]
    return list(zip(*(table[n].to_pylist() for n in ("id", "label", "split", "column:group")), boxes, strict=True))


@pytest.mark.parametrize("images", ["train2017", "images", "annotations"])
def test_coco_lists_boxes_image_by_image(tmp_path, images):
    source = open_source(coco(tmp_path, images=images), boxes=Boxes(margin=0.5))
    assert listed(source) == [
        ("b.png#1", "cat", None, "b.png", Box(0, 0, 0, 5, margin=0.5)),
        ("a.png#1", "dog", None, "a.png", Box(1, 2, 10.5, 20, margin=0.5)),
        ("a.png#2", "cat", None, "a.png", Box(4, 4, 4, 4, margin=0.5)),
    ]
    table = source.scan()
    copied = pickle.loads(pickle.dumps(source))
    assert copied.read(table["locator"][2].as_py()) == Region(png(), Box(4, 4, 4, 4, margin=0.5))
    with pytest.raises(Reject, match="box: 0 0 0 5"):
        copied.read(table["locator"][0].as_py())
    notes = "; ".join(ListingSummary.of(table).notes)
    for said in ("3 regions of 2 images", "1 crowd region left out", "1 image without a box left out"):
        assert said in notes
    assert (table["size"].to_pylist(), min(table["mtime_ns"].to_pylist()) > 0) == ([len(png())] * 3, True)


def changed(*path, to):
    document = copy.deepcopy(COCO)
    place = document
    for step in path[:-1]:
        place = place[step]
    if to is None:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return document


@pytest.mark.parametrize(("document", "said"), [
    ([], "it is a list, not an object"),
    (changed("annotations", to=None), "annotations is missing; it has to be a list"),
    (changed("images", to={}), "images is a dict"),
    (changed("images", 1, to=5), r"images\[1\] is a int, not an object"),
    (changed("images", 1, "id", to=None), r"images\[1\] has the id 'None'"),
    (changed("images", 1, "id", to=[1]), r"images\[1\] has the id"),
    (changed("images", 1, "id", to=7), r"images\[1\] has the id 7 of an image before it"),
    (changed("images", 0, "file_name", to=3), r"images\[0\] has the file_name '3', which is no text"),
    (changed("images", 0, "file_name", to="a\0b"), "which is no text"),
    (changed("images", 1, "file_name", to="b.png"), "1 id occurs more than once"),
    (changed("annotations", 0, "image_id", to=99), r"annotations\[0\] has the image_id 99, which no image has"),
    (changed("annotations", 0, "category_id", to=99), r"annotations\[0\] has the category_id 99, which no category has"),
    (changed("annotations", 1, "bbox", to=None), r"annotations\[1\] has the bbox 'None', which is not four numbers"),
    (changed("annotations", 0, "bbox", to="1 2 3 4"), "not four numbers"),
    (changed("annotations", 0, "bbox", to=[1, 2, 3]), "not four numbers"),
    (changed("annotations", 0, "bbox", to=[1, 2, 3, 10**400]), "not four numbers|cannot|not a readable"),
    (changed("annotations", 2, "bbox", to=[]), "not four numbers"),
    (changed("categories", 0, "name", to={}), r"categories\[0\] has the name"),
    ("[" * 100_000, "it is a list, not an object"),
    ('{"x": ' + "[" * 100_000, "not a readable COCO annotation file"),
    (json.dumps(COCO) + "]", "not a readable COCO annotation file .*after the end"),
    (json.dumps(COCO)[:-1], "ends too early"),
    ("7", "it is a int, not an object"),
    ('{"images": [', "not a readable COCO annotation file"),
    ("\udcff".encode("utf-8", "surrogatepass").decode("latin-1"), "not a readable COCO annotation file"),
])  # fmt: skip
def test_wrong_coco_files_say_what_is_wrong(tmp_path, document, said):
    with pytest.raises(SourceError, match=said):
        open_source(coco(tmp_path, document)).scan()


def test_what_coco_files_leave_out_is_filled_in_and_said(tmp_path):
    document = copy.deepcopy(COCO)
    document["images"] = [{"id": "x", "file_name": "sub/deep/a.png"}, {"id": 7, "file_name": "b.png"}]
    document["categories"] = [{"id": 1, "name": ""}, {"id": 2, "name": "dog"}]
    document["annotations"] = [
        {"image_id": "x", "category_id": 1, "segmentation": [[5, 6, 9.5, 6, 9.5, 20], [1, 7, 2, 7, 2, 8]]},
        {"image_id": "x", "category_id": 2, "bbox": [], "segmentation": [[5, 6, 9, 6, 9, 20]]},
        {"image_id": "x", "category_id": 2, "segmentation": {"counts": [1, 5], "size": [2, 3]}},
        {"image_id": 7, "category_id": 2, "bbox": [1, 2, 3, 4], "segmentation": [[1, 2]]},
        {"image_id": 7, "bbox": [float("nan"), 2, float("inf"), -4]},
    ]
    path = coco(tmp_path, {name: document[name] for name in ("annotations", "categories", "images")})  # any order
    (tmp_path / "train2017" / "sub" / "deep").mkdir(parents=True)
    (tmp_path / "train2017" / "sub" / "deep" / "a.png").write_bytes(png())
    source = open_source(path)
    found = [(*row[:2], *row[4:]) for row in listed(source)]
    assert found[:4] == [
        ("sub/deep/a.png#1", "1", Box(1, 6, 8.5, 14)), ("sub/deep/a.png#2", "dog", Box(5, 6, 4, 14)),
        ("b.png#1", "dog", Box(1, 2, 3, 4)), ("b.png#2", None, found[3][2]),
    ]  # fmt: skip
    with pytest.raises(Reject, match="box: nan 2 inf -4"):
        source.read(source.scan()["locator"][3].as_py())
    notes = "; ".join(ListingSummary.of(source.scan()).notes)
    for said in ("2 annotations without a box: that of the outline", "1 annotation without a box or a polygon left out",
                 "1 class id without a name, taken for the name"):  # fmt: skip
        assert said in notes, notes
    del document["categories"]
    assert listed(open_source(coco(tmp_path, document)))[0][1] == "1"


def test_a_folder_or_an_archive_of_the_images_can_be_named(tmp_path):
    path = coco(tmp_path)
    (tmp_path / "train2017").rename(tmp_path / "elsewhere")
    with pytest.raises(SourceError, match=r"image 'b.png' is in none of .*train2017.*images"):
        open_source(path).scan()
    beside = open_source(path, images=tmp_path / "elsewhere")
    boxes = listed(beside)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("train2017/a.png", png())
        archive.writestr("train2017/b.png", png())
    inside = pickle.loads(pickle.dumps(open_source(path, images=tmp_path / "images.zip")))
    assert listed(inside) == boxes
    table = pickle.loads(pickle.dumps(inside)).scan()
    for locator, other in zip(table["locator"].to_pylist()[1:], beside.scan()["locator"].to_pylist()[1:], strict=True):
        assert inside.read(locator) == beside.read(other)
    (tmp_path / "list.csv").write_text("path,box\na.png,1 2 3 4\ntrain2017/b.png,\nc.png,1 2 3 4\n")
    source = open_source(tmp_path / "list.csv", images=str(tmp_path / "images.zip"))
    table = source.scan()
    assert table["size"].to_pylist() == [len(png()), len(png()), -1]
    assert source.read(table["locator"][0].as_py()) == Region(png(), Box(1, 2, 3, 4))
    assert source.read(table["locator"][1].as_py()) == png()
    with pytest.raises(Reject, match=r"missing: no such image in .*images\.zip"):
        source.read(table["locator"][2].as_py())
    with zipfile.ZipFile(tmp_path / "images.zip", "a") as archive:
        archive.writestr("val2017/a.png", png())
    with pytest.raises(SourceError, match=r"several images there end in 'a\.png'; name it with its folders"):
        open_source(path, images=tmp_path / "images.zip").scan()
    with pytest.raises(UsageError, match="is for manifests and COCO files, and elsewhere is neither"):
        open_source(tmp_path / "elsewhere", images=tmp_path)
    with pytest.raises(UsageError, match="is neither a folder nor an archive"):
        open_source(path, images=tmp_path / "list.csv")


def test_several_coco_files_are_one_dataset(tmp_path):
    path = coco(tmp_path)
    document = copy.deepcopy(COCO)
    document["images"] = [{"id": 3, "file_name": "c.png"}]
    document["annotations"] = [{"image_id": 3, "category_id": 9, "bbox": [1, 1, 5, 5]}]
    document["categories"] = [{"id": 9, "name": "cat"}]
    other = tmp_path / "annotations" / "instances_val2017.json"
    other.write_text(json.dumps(document))
    (tmp_path / "val2017").mkdir()
    (tmp_path / "val2017" / "c.png").write_bytes(png())
    source = open_source(tmp_path / "annotations" / "*.json")
    assert [row[:4] for row in listed(source)] == [
        ("b.png#1", "cat", "train", "b.png"), ("a.png#1", "dog", "train", "a.png"), ("a.png#2", "cat", "train", "a.png"),
        ("c.png#1", "cat", "val", "c.png"),
    ]  # fmt: skip
    assert source.name == "annotations"
    assert source.read(source.scan()["locator"][3].as_py()) == Region(png(), Box(1, 1, 5, 5))
    assert "2 annotation files: instances_train2017.json as train, instances_val2017.json as val" in "; ".join(
        ListingSummary.of(source.scan()).notes
    )
    document["images"][0]["file_name"] = "a.png"  # another one, in another folder
    other.write_text(json.dumps(document))
    (tmp_path / "val2017" / "c.png").rename(tmp_path / "val2017" / "a.png")
    ids = source.scan()["id"].to_pylist()
    assert ids[-1] == "instances_val2017/a.png#1"
    assert ids[0] == "instances_train2017/b.png#1"
    path.rename(tmp_path / "annotations" / "one.json")
    other.rename(tmp_path / "annotations" / "two.json")
    source = open_source(tmp_path / "annotations" / "*.json", images=tmp_path / "train2017")
    assert source.scan()["id"].to_pylist() == ["b.png#1", "a.png#1", "a.png#2", "a.png#3"]  # one image of both


@pytest.mark.slow
def test_a_large_coco_file_is_read_entry_by_entry(tmp_path):
    outline = ", ".join(["[" + ", ".join(["1.5"] * 200) + "]"] * 5)
    one = f'{{"image_id": 3, "category_id": 1, "bbox": [1, 2, 3, 4], "segmentation": [{outline}]}}'
    rest = json.dumps(COCO)[1:].replace('"annotations"', '"other"')
    document = '{"licenses": [[1], {}], "annotations": [' + ",\n".join([one] * 2000) + "], " + rest
    path = coco(tmp_path, document)
    assert path.stat().st_size > 10e6
    tracemalloc.start()
    table = open_source(path).scan()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (table.num_rows, table["id"][1999].as_py()) == (2000, "a.png#2000")
    assert peak < 8e6  # 4.4 MB, however long the file


def test_formats_say_themselves_where_boxes_are(tmp_path):
    with pytest.raises(UsageError, match="are for manifests: the format of"):
        open_source(coco(tmp_path), boxes=Boxes(unit="share")).scan()
    with pytest.raises(UsageError, match="has no columns"):
        open_source(coco(tmp_path), path_column="file_name")


def yolo(folder, names="names: [cat, 'big dog']\n", lines="1 0.5 0.5 0.25 0.5\n\n0 0.1 0.1 0.2 0.2\n", roboflow=False):
    at = (lambda kind, split: folder / split / kind) if roboflow else (lambda kind, split: folder / kind / split)
    for split, name in (("train", "a"), ("val", "b"), ("train", "c")):
        at("images", split).mkdir(parents=True, exist_ok=True)
        at("labels", split).mkdir(parents=True, exist_ok=True)
        (at("images", split) / f"{name}.png").write_bytes(png())
    (at("labels", "train") / "a.txt").write_text(lines)
    (at("labels", "val") / "b.txt").write_text("0 1 1 0.5 0.5")
    (at("labels", "val") / "lost.txt").write_text("0 1 1 0.5 0.5")
    (folder / "data.yaml").write_text("path: ../x\nnc: 2  # two\n" + names + "train: images/train\n")
    return folder


@pytest.mark.parametrize("names", [
    "names: [cat, 'big dog']\n", 'names:\n  - cat\n  - "big dog"\n', "names:\n- cat\n- big dog\n",
    "names:\n  0: cat  # the first\n  1: big dog\n", "names: ['cat',\n  'big dog']\n",
])  # fmt: skip
@pytest.mark.parametrize("roboflow", [False, True])
def test_yolo_lists_boxes_image_by_image(tmp_path, names, roboflow):
    source = open_source(yolo(tmp_path / "set", names, roboflow=roboflow))
    a, b = ("train/images/a.png", "val/images/b.png") if roboflow else ("images/train/a.png", "images/val/b.png")
    assert listed(source) == [
        (f"{a}#1", "big dog", "train", a, Box(0.375, 0.25, 0.25, 0.5, "share")),
        (f"{a}#2", "cat", "train", a, Box(0.0, 0.0, 0.2, 0.2, "share")),
        (f"{b}#1", "cat", "val", b, Box(0.75, 0.75, 0.5, 0.5, "share")),
    ]
    table = pickle.loads(pickle.dumps(source)).scan()
    assert source.read(table["locator"][0].as_py()) == Region(png(), Box(0.375, 0.25, 0.25, 0.5, "share"))
    notes = "; ".join(ListingSummary.of(table).notes)
    for said in ("3 regions of 2 images", "1 image without a box left out", "1 file of boxes without an image, as"):
        assert said in notes
    assert (source.name, source.location) == ("set", str(tmp_path / "set"))


@pytest.mark.parametrize(
    "line",
    [
        "2 0 0 1 1",
        "-1 0 0 1 1",
        "0.5 0 0 1 1",
        "cat 0 0 1 1",
        "0 1 2 3",
        "0 0 0 1 1 0 1 1",
        "0 0 0 1 1 0.9",
        "nan 0 0 1 1",
        "1e400 0 0 1 1",
    ],
)
def test_wrong_yolo_lines_are_named(tmp_path, line):
    with pytest.raises(
        SourceError,
        match=r"a\.txt: line 2 is '.*not class cx cy w h or .* from 0 to 1",
    ):
        open_source(yolo(tmp_path, lines=f"0 0.5 0.5 1 1\n{line}\n")).scan()


def test_yolo_takes_splits_of_its_yaml_and_boxes_of_outlines(tmp_path):
    folder = yolo(tmp_path / "set", "names: {0: cat, 3: 'dog'}\n", "3 0.1 0.2 0.5 0.2 0.5 0.6\n")
    for split, new in (("train", "one"), ("val", "two")):
        for kind in ("images", "labels"):
            (folder / kind / split).rename(folder / kind / new)
    lines = "path: ../datasets/set\nnames: {0: cat, 3: 'dog'}\ntrain: ../images/one  # here\nval:\n  - chosen.txt\ntest: gone\n"
    (folder / "data.yaml").write_text(lines)
    (folder / "chosen.txt").write_text("./images/two/b.png\n\n")
    source = open_source(folder)
    assert [(row[0], row[1], row[2]) for row in listed(source)] == [
        ("images/one/a.png#1", "dog", "train"), ("images/two/b.png#1", "cat", "val"),
    ]  # fmt: skip
    assert listed(source)[0][4] == Box(0.1, 0.2, 0.4, 0.39999999999999997, "share")
    notes = "; ".join(ListingSummary.of(source.scan()).notes)
    assert "1 outline taken for the box around it" in notes
    assert "named in data.yaml and not in this folder: test: gone" in notes
    (folder / "labels" / "one" / "a.txt").write_text("1 0.5 0.5 1 1\n")
    with pytest.raises(SourceError, match=r"line 1 is '1 0\.5"):
        source.scan()


def test_yolo_without_names_is_said(tmp_path):
    for names in ("", "names: cat\n", "names:\n  x: cat\n"):
        with pytest.raises(SourceError, match=r"data\.yaml: has no names"):
            open_source(yolo(tmp_path, names=names)).scan()
    (tmp_path / "data.yaml").unlink()
    assert open_source(tmp_path).scan()["id"].to_pylist()[0] == "images/train/a.png"  # a folder of images
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(SourceError, match=r"classes\.txt: cannot be read"):
        open_source(tmp_path).scan()
