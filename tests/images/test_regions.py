"""Boxes in images: which pixels they are, their keys, one decode for all of an image, and manifests that have them."""

import hashlib
import io
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from featurepipe.errors import Reject, SourceError, UsageError
from featurepipe.extraction.extract import extract
from featurepipe.features.loader import Loader, StageSeconds
from featurepipe.features.options import SourceOptions
from featurepipe.images import key_of, open_source
from featurepipe.images.decode import decode, try_decode
from featurepipe.images.listing import ListingSummary
from featurepipe.images.regions import Box, Boxes, Region, image_of, region_locator, split_region, stamp
from featurepipe.store import FeatureStore

PIXELS = np.random.default_rng(3).integers(0, 256, (60, 80, 3), dtype=np.uint8)


def png(pixels=PIXELS):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def cut(box, payload=None):
    return decode(Region(png() if payload is None else payload, box)).permute(1, 2, 0).numpy()


@pytest.mark.parametrize(("box", "rows", "columns"), [
    (Box(10, 20, 30, 5), (20, 25), (10, 40)),
    (Box(9.5, 19.5, 30.4, 5.6), (20, 25), (10, 40)),
    (Box(0.125, 0.5, 0.25, 0.1, "share"), (30, 36), (10, 30)),
    (Box(10, 20, 20, 10, margin=0.25), (15, 35), (5, 35)),
    (Box(-5, 50, 10, 100), (50, 60), (0, 5)),
    (Box(79, 59, 1, 1), (59, 60), (79, 80)),
    (Box(0.5, 0, 0.0125, 1, "share", margin=1e300), (0, 60), (0, 80)),
    (Box(-1e308, -1e308, 1.7e308, 1.7e308), (0, 60), (0, 80)),
])  # fmt: skip
def test_box_is_these_pixels(box, rows, columns):
    np.testing.assert_array_equal(cut(box), PIXELS[slice(*rows), slice(*columns)])


@pytest.mark.parametrize(("box", "reason"), [
    (Box(math.nan, 0, 5, 5), r"box: nan 0 5 5 \(pixels\) is not four finite numbers"),
    (Box(0, 0, math.inf, 5), "not four finite numbers"),
    (Box(1, 2, 0, 5), r"box: 1 2 0 5 \(pixels\) has a width or height of 0 or less"),
    (Box(1, 2, 3, -5), "0 or less"),
    (Box(1, 2, 0.5, 5), "0.5 x 5 pixels, less than one"),
    (Box(0.5, 0.5, 0.001, 0.5, "share"), r"\(shares\) is 0.08 x 30 pixels, less than one"),
    (Box(80, 0, 5, 5), "outside the image of 80 x 60 pixels"),
    (Box(-9, 0, 5, 5, margin=3), r"box: -9 0 5 5 \(pixels with margin 3\) lies outside"),
    (Box(79.5, 0, 5, 5), "outside"),
])  # fmt: skip
def test_box_without_pixels_is_a_reject_that_names_it(box, reason):
    with pytest.raises(Reject, match=reason):
        cut(box)


def test_box_is_of_the_upright_image():
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG", exif=exif)
    upright = np.rot90(PIXELS, -1)
    assert upright.shape[:2] == (80, 60)
    np.testing.assert_array_equal(cut(Box(5, 60, 20, 15), buffer.getvalue()), upright[60:75, 5:25])


def test_clipped_says_whether_anything_was_cut_off():
    assert not Box(0, 0, 80.4, 60).edges(80, 60).clipped
    assert Box(0, 0, 81, 60).edges(80, 60).clipped
    assert Box(0, 0, 8, 6, margin=0.1).edges(80, 60).clipped


def test_keys_follow_from_bytes_and_box():
    box = Box(1, 2.50, 3, 4)
    expected = hashlib.sha256(b"featurepipe region 1\n" + hashlib.sha256(b"x").digest() + b"1.0 2.5 3.0 4.0 pixels 0.0")
    assert key_of(Region(b"x", box)) == expected.digest()
    assert key_of(Region(b"x", Box(1.0, 2.5, 3, 4, margin=-0.0))) == expected.digest()
    others = [Box(1, 2.5, 3, 4.5), Box(1, 2.5, 3, 4, "share"), Box(1, 2.5, 3, 4, margin=0.1)]
    assert len({key_of(Region(b"x", other)) for other in [box, *others]} | {key_of(b"x")}) == 5


def test_locators_give_image_and_box_back():
    for box in (Box(0.1, 1 / 3, 1e-300, math.inf, "share", 0.25), Box(-1, 2, 3, 4)):
        assert split_region(region_locator(b"a b.jpg", box)) == (b"a b.jpg", box)
    for locator in (b"a.jpg", b"a\0box 1 2 3", b"a\0box 1 2 3 4 inches 0", b"\0box "):
        assert split_region(locator) == (locator, None)


def test_stamps_differ_by_box_and_stay_near_the_time():
    time, box = 1_764_400_000_123_456_789, Box(1, 2, 3, 4)
    assert stamp(time, box) == stamp(time, Box(1.0, 2, 3, 4)) != stamp(time, Box(1, 2, 3, 5))
    assert stamp(time, box) != stamp(time + 1, box)
    assert abs(stamp(time, box) - time) < 1 << 40
    assert stamp(-1, box) == -1


def manifest(folder, boxes, name="a.png", **more):
    (folder / name).write_bytes(png())
    path = folder / "boxes.jsonl"
    path.write_text("".join(json.dumps({"path": name, "box": box, **more}) + "\n" for box in boxes))
    return path


def test_regions_of_one_image_are_read_and_decoded_once(tmp_path):
    boxes = [[i, i, 20, 20] for i in range(40)]
    (tmp_path / "b.png").write_bytes(png(PIXELS[::-1]))
    path = manifest(tmp_path, boxes[:30])
    with path.open("a") as file:
        file.writelines(json.dumps({"path": "b.png", "box": box}) + "\n" for box in boxes[30:])
    source, decoded, read = open_source(path), [], []

    class Counting:
        location = source.location

        def read(self, locator):
            read.append(locator)
            return source.read(locator)

    def decoder(payloads, claim):
        for payload in payloads:
            decoded.append(payload)
            yield try_decode(image_of(payload), colour="rgb", claim=claim)

    loader = Loader(
        Counting(), lambda _: ("all",), decoder, lambda image, _row: image, clock=StageSeconds(), workers=2, window=16
    )
    loaded = [image for images in loader.load(source.scan(), np.arange(40)) for image in images]
    assert [image.row for image in loaded] == list(range(40))
    assert len(decoded) == len(read) == 2
    for i, image in enumerate(loaded):
        pixels = (PIXELS if i < 30 else PIXELS[::-1])[i : i + 20, i : i + 20]
        np.testing.assert_array_equal(image.pixels.permute(1, 2, 0).numpy(), pixels)
        assert image.key == key_of(Region(png() if i < 30 else png(PIXELS[::-1]), Box(i, i, 20, 20)))


def features(store, dataset):
    found = FeatureStore(store).features(dataset, "c3:flatten")
    return dict(zip(found.table["id"].to_pylist(), found.read(), strict=True))


def run(store, source, **more):
    return extract(
        source, store, backbone="lenet5", weights="none", nodes=["c3:flatten"], silent=True, **{"batch_size": 4, **more}
    )


def test_features_are_those_of_lossless_crops(tmp_path):
    boxes = [[0, 0, 40, 40], [10.2, 5, 33, 50], [70, 50, 30, 30], [0, 0, 40, 40], [90, 0, 5, 5], [1, 1, 0, 4]]
    record = run(tmp_path / "store", manifest(tmp_path, boxes), dataset="boxes", max_rejects="100%")
    assert (record["counts"]["computed"], record["counts"]["known"], record["counts"]["rejected"]) == (3, 1, 2)
    assert record["clipped"] == 1
    assert record["reject_reasons"] == {"box": 2}
    crops = tmp_path / "crops"
    crops.mkdir()
    for number, (y, x) in enumerate([((0, 40), (0, 40)), ((5, 55), (10, 43)), ((50, 60), (70, 80))], 1):
        (crops / f"{number}.png").write_bytes(png(PIXELS[slice(*y), slice(*x)]))
    run(tmp_path / "store", crops, dataset="crops")
    ours, expected = features(tmp_path / "store", "boxes"), features(tmp_path / "store", "crops")
    for number in (1, 2, 3):
        np.testing.assert_array_equal(ours[f"a.png#{number}"], expected[f"{number}.png"])
    np.testing.assert_array_equal(ours["a.png#4"], ours["a.png#1"])


def test_features_of_regions_do_not_depend_on_the_batch(tmp_path):
    path = manifest(tmp_path, [[i, i, 20 + i, 30] for i in range(9)])
    found = []
    for size in (1, 4, 9):
        run(tmp_path / f"store{size}", path, dataset="boxes", batch_size=size)
        found.append(features(tmp_path / f"store{size}", "boxes"))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, vector in other.items():
            np.testing.assert_allclose(vector, found[0][name], rtol=2e-3, atol=1e-3)  # float16


def test_next_run_computes_boxes_that_changed_alone(tmp_path):
    path = manifest(tmp_path, [[0, 0, 40, 40], [5, 5, 30, 30]])
    assert run(tmp_path / "store", path)["counts"]["computed"] == 2
    manifest(tmp_path, [[0, 0, 40, 40], [5, 5, 30, 31]])  # writes the image again, too: the same bytes
    record = run(tmp_path / "store", path)
    assert (record["counts"]["computed"], record["changes"]["changed"]) == (1, 1)
    assert run(tmp_path / "store", path)["counts"]["read"] == 0
    record = run(tmp_path / "store", path, box_margin=0.5)
    assert (record["counts"]["computed"], record["changes"]["changed"]) == (2, 2)
    moved = tmp_path / "moved"
    moved.mkdir()
    record = run(tmp_path / "store", manifest(moved, [[5, 5, 30, 31]], name="b.png"), dataset="moved")
    assert (record["counts"]["computed"], record["counts"]["known"]) == (0, 1)


def test_manifests_in_all_their_forms(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    rows = [("1 2 30 40", "cat"), ("", "dog"), ("[5, 6, 7, 8]", "cat"), ("nan,1,2,3", "cow")]
    text = "path,label,Box\n" + "".join(f'a.png,{label},"{box}"\n' for box, label in rows)
    (tmp_path / "m.csv").write_text(text)
    table = open_source(tmp_path / "m.csv").scan()
    assert table["id"].to_pylist() == ["a.png#1", "a.png", "a.png#2", "a.png#3"]
    assert table["column:group"].to_pylist() == ["a.png"] * 4
    boxes = [split_region(locator)[1] for locator in table["locator"].to_pylist()]
    assert boxes[:3] == [Box(1, 2, 30, 40), None, Box(5, 6, 7, 8)]
    source = open_source(tmp_path / "m.csv")
    assert source.read(table["locator"][0].as_py()) == Region(png(), Box(1, 2, 30, 40))
    with pytest.raises(Reject, match="box: nan"):
        source.read(table["locator"][3].as_py())
    pq.write_table(
        pa.table({"path": ["a.png"], "x": [0.1], "y": [0.2], "w": [0.5], "h": [0.25], "group": ["g"]}),
        tmp_path / "m.parquet",
    )
    source = open_source(tmp_path / "m.parquet", boxes=Boxes("x,y,w,h", "share", 0.1))
    table = source.scan()
    assert split_region(table["locator"][0].as_py())[1] == Box(0.1, 0.2, 0.5, 0.25, "share", 0.1)
    assert table["column:group"].to_pylist() == ["g"]
    assert "column:x" in open_source(tmp_path / "m.parquet").scan().column_names
    plain = open_source(tmp_path / "m.csv", boxes=Boxes("none"))
    with pytest.raises(SourceError, match="1 id occurs more than once"):
        plain.scan()


@pytest.mark.parametrize(
    "box", ["cat", "1 2 3", "1 2 3 4 5", [1, 2, 3], {"x": 1}, 7, [1, 2, 3, True], [[1], 2, 3, 4], [10**400, 0, 1, 1]]
)
def test_box_that_is_none_names_the_line(tmp_path, box):
    with pytest.raises(SourceError, match=r"line 2 has the box .* not four numbers; write x y w h or"):
        open_source(manifest(tmp_path, [[1, 2, 3, 4], box])).scan()


def test_boxes_are_refused_where_there_are_none(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    with pytest.raises(UsageError, match="is none; list its images in one"):
        open_source(tmp_path, boxes=SourceOptions(box="box").boxes)
    with pytest.raises(UsageError, match="unknown column 'bax'"):
        open_source(manifest(tmp_path, [[1, 2, 3, 4]]), boxes=Boxes("bax")).scan()
    with pytest.raises(UsageError, match="box_margin"):
        SourceOptions(box_margin=-1)


def test_shares_taken_for_pixels_are_asked_about(tmp_path):
    notes = "; ".join(ListingSummary.of(open_source(manifest(tmp_path, [[0.1, 0.1, 0.5, 0.5], None])).scan()).notes)
    assert "1 region of 1 image, by boxes in pixels; 1 row without a box, each its whole image" in notes
    assert "--box-unit share" in notes


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_crops_stay_where_the_image_is(device):
    """As on the GPU route, where a file is decoded on the device."""
    source = open_source({"a": np.zeros((60, 80, 3), np.uint8)})
    listing = source.scan()
    whole = listing["locator"][0].as_py()
    boxes = [region_locator(whole, Box(i, 0, 20, 10)) for i in range(3)]
    table = listing.take(pa.array([0] * 3)).set_column(5, "locator", pa.array(boxes, pa.binary()))
    decoded = []

    def decoder(payloads, claim):
        decoded.extend(payloads)
        return [torch.zeros((3, 60, 80), dtype=torch.uint8, device=device) for _ in payloads]

    loader = Loader(
        source, lambda _: ("all",), decoder, lambda image, _row: image, clock=StageSeconds(), workers=1, window=8
    )
    loaded = [image for images in loader.load(table, np.arange(3)) for image in images]
    assert len(decoded) == 1
    assert [(image.pixels.device.type, tuple(image.pixels.shape)) for image in loaded] == [(device, (3, 10, 20))] * 3


def test_mixed_units_are_asked_about_and_each_box_is_what_it_says(tmp_path):
    path = manifest(tmp_path, [[10, 10, 30, 30], [0.1, 0.1, 0.5, 0.5]])
    notes = "; ".join(ListingSummary.of(open_source(path).scan()).notes)
    assert "1 region within the first pixel: are some boxes shares, and others pixels?" in notes
    record = run(tmp_path / "pixels", path, max_rejects=1)
    assert (record["counts"]["computed"], record["reject_reasons"]) == (1, {"box": 1})
    source = open_source(
        manifest(tmp_path, [[10, 10, 30, 30], [0.5, 0.5, 1.4, 0.5], [-0.1, 0, 0.2, 1]]), boxes=Boxes(unit="share")
    )
    notes = "; ".join(ListingSummary.of(source.scan()).notes)
    assert "1 region in shares of more than 2: pixels are --box-unit pixels" in notes
    record = run(tmp_path / "shares", source.path, box_unit="share", max_rejects=1)
    assert (record["counts"]["computed"], record["reject_reasons"], record["clipped"]) == (2, {"box": 1}, 2)


def test_crops_are_laid_out_as_decoded_files_are():
    whole = decode(png())
    assert decode(Region(png(), Box(1, 1, 9, 9))).permute(1, 2, 0).is_contiguous()
    assert torch.equal(decode(Region(png(), Box(0, 0, 80, 60))), whole)
