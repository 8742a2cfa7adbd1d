"""COCO's JSON and YOLO's folders: which boxes they list, and what is said of those that are wrong."""

import copy
import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from featurepipe.errors import Reject, SourceError, UsageError
from featurepipe.images import open_source
from featurepipe.images.findings import ListingSummary
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
    (changed("images", 1, "file_name", to="b.png"), "ids occur more than once"),
    (changed("images", 0, "file_name", to="c.png"), r"image 'c.png' is in none of .*train2017.*; put the file beside"),
    (changed("annotations", 0, "image_id", to=99), r"annotations\[0\] has the image_id 99, which no image has"),
    (changed("annotations", 0, "category_id", to=99), r"annotations\[0\] has the category_id 99, which no category has"),
    (changed("annotations", 0, "bbox", to=None), r"annotations\[0\] has the bbox 'None', which is not four numbers"),
    (changed("annotations", 0, "bbox", to="1 2 3 4"), "not four numbers"),
    (changed("annotations", 0, "bbox", to=[1, 2, 3]), "not four numbers"),
    (changed("annotations", 0, "bbox", to=[1, 2, 3, 10**400]), "not four numbers|cannot|not a readable"),
    (changed("annotations", 0, "bbox", to=[]), "not four numbers"),
    (changed("categories", 0, "name", to={}), r"categories\[0\] has the name"),
    ("[" * 100_000, "not a readable COCO annotation file"),
    ('{"images": [', "not a readable COCO annotation file"),
    ("\udcff".encode("utf-8", "surrogatepass").decode("latin-1"), "not a readable COCO annotation file"),
])  # fmt: skip
def test_wrong_coco_files_say_what_is_wrong(tmp_path, document, said):
    with pytest.raises(SourceError, match=said):
        open_source(coco(tmp_path, document)).scan()


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
        "0 0 0 1 1 0 1",
        "nan 0 0 1 1",
        "1e400 0 0 1 1",
    ],
)
def test_wrong_yolo_lines_are_named(tmp_path, line):
    with pytest.raises(SourceError, match=r"a\.txt: line 2 is '.*not class cx cy w h, with a class from 0 to 1"):
        open_source(yolo(tmp_path, lines=f"0 0.5 0.5 1 1\n{line}\n")).scan()


def test_yolo_without_names_is_said(tmp_path):
    for names in ("", "names: cat\n", "names:\n  5: cat\n"):
        with pytest.raises(SourceError, match=r"data\.yaml: has no names"):
            open_source(yolo(tmp_path, names=names)).scan()
    (tmp_path / "data.yaml").unlink()
    assert open_source(tmp_path).scan()["id"].to_pylist()[0] == "images/train/a.png"  # a folder of images
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(SourceError, match=r"classes\.txt: cannot be read"):
        open_source(tmp_path).scan()
