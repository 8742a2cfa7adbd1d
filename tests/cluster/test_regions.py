"""Boxes on workers: the features of a local run to the bit, their rejects and counts, and predictions with the boxes."""

import io
import json
import zipfile

import numpy as np
import pyarrow.csv
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from featurepipe.extraction import compute
from featurepipe.extraction.extract import extract
from featurepipe.extraction.shards import ShardSizes
from featurepipe.prediction.predict import predict
from featurepipe.store import FeatureStore
from featurepipe.training.train import train


@pytest.fixture
def boxes(tmp_path):
    """A manifest of 36 boxes of three images, one of 16 bits; two boxes are clipped, and one is of no width."""
    rng = np.random.default_rng(0)
    for name in ("bright", "dark", "deep"):
        low = {"bright": 128, "dark": 0, "deep": 0}[name]
        pixels = rng.integers(low, low + 128, (60, 80, 3), dtype=np.uint8)
        deep = np.linspace(0, 65535, 60 * 80).astype(np.uint16).reshape(60, 80)
        Image.fromarray(deep if name == "deep" else pixels).save(tmp_path / f"{name}.png")
    path = tmp_path / "boxes.jsonl"
    rows = [
        {"path": f"{name}.png", "label": name, "box": [3 * i, 2 * i, 40 + i, 40]}
        for name in ("bright", "dark", "deep")
        for i in range(12)
    ]
    rows[5]["box"][2] = 0
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def features(store):
    found = FeatureStore(store).features("boxes", "c3:flatten")
    return dict(zip(found.ids, found.read(np.float32), strict=True))


def test_boxes_on_workers_are_those_of_a_local_run(boxes, thread_executor, tmp_path, monkeypatch):
    monkeypatch.setattr(compute, "ShardSizes", lambda: ShardSizes(first=5, most=5))
    # Batches of one image, since the last digit moves with the company of a batch.
    options = {
        "backbone": "lenet5", "weights": "none", "nodes": ["c3:flatten"], "precision": "fp32", "batch_size": 1,
        "max_rejects": 1, "silent": True,
    }  # fmt: skip
    alone = extract(boxes, tmp_path / "here", **options)
    together = extract(boxes, tmp_path / "there", cluster=thread_executor, **options)
    for name in ("counts", "rejects", "reject_reasons", "clipped", "remarks", "fingerprint"):
        assert together[name] == alone[name], name
    assert (alone["counts"]["computed"], alone["reject_reasons"], alone["clipped"]) == (35, {"box": 1}, 3)
    assert together["cluster"]["slices"] == 3  # the boxes of an image, however few a shard should have
    here, there = features(tmp_path / "here"), features(tmp_path / "there")
    assert here.keys() == there.keys()
    for name, values in here.items():
        np.testing.assert_array_equal(values, there[name])

    train(
        tmp_path / "here", out=tmp_path / "bundle", nodes="c3:flatten", head="centroid", group="none", calibration=False,
        silent=True,
    )  # fmt: skip
    found = {}
    for name, cluster in (("here", None), ("there", thread_executor)):
        to = tmp_path / f"{name}.csv"
        record = predict(tmp_path / "bundle", boxes, to, batch_size=1, max_rejects=1, cluster=cluster, silent=True)
        assert (record["clipped"], record["reject_reasons"]) == (3, {"box": 1})
        found[name] = pyarrow.csv.read_csv(to)
    assert found["here"].equals(found["there"])
    assert found["here"].column_names[:4] == ["id", "image", "box", "label"]
    assert found["here"]["image"].to_pylist()[::12] == ["bright.png", "dark.png", "deep.png"]
    assert found["here"]["box"].to_pylist()[1] == "3.0 2.0 41.0 40.0"
    again = extract(tmp_path / "here.csv", tmp_path / "again", dry_run=True, **options)  # the file is such a manifest
    assert again["listed"] == 36


def test_frames_and_boxes_in_an_archive_on_workers(thread_executor, tmp_path, monkeypatch):
    monkeypatch.setattr(compute, "ShardSizes", lambda: ShardSizes(first=2, most=2))
    frames = np.random.default_rng(1).integers(0, 256, (3, 60, 80), dtype=np.uint8)
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SOPClassUID, made.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3.4"
    made.Rows, made.Columns, made.NumberOfFrames, made.SamplesPerPixel = 60, 80, 3, 1
    made.PhotometricInterpretation, made.PixelRepresentation = "MONOCHROME2", 0
    made.BitsAllocated, made.BitsStored, made.HighBit = 8, 8, 7
    made.PixelData = frames.tobytes()
    made["PixelData"].VR = "OB"
    cine, picture = io.BytesIO(), io.BytesIO()
    made.save_as(cine, enforce_file_format=True)
    Image.fromarray(frames[0]).save(picture, "PNG")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("all/cine.dcm", cine.getvalue())
        archive.writestr("all/a.png", picture.getvalue())
    manifest = tmp_path / "boxes.csv"
    manifest.write_text("path,box\ncine.dcm,\na.png,0 0 80 60\na.png,5 5 30 30\n")
    options = {
        "backbone": "lenet5", "weights": "none", "nodes": ["c3:flatten"], "precision": "fp32", "batch_size": 1, "silent": True,
        "images": tmp_path / "images.zip", "frames": "all", "dataset": "boxes",
    }  # fmt: skip
    alone = extract(manifest, tmp_path / "here", **options)
    together = extract(manifest, tmp_path / "there", cluster=thread_executor, **options)
    for name in ("counts", "remarks", "clipped"):
        assert together[name] == alone[name], name
    assert (alone["counts"]["computed"], together["cluster"]["slices"]) == (5, 2)
    here, there = features(tmp_path / "here"), features(tmp_path / "there")
    assert list(here) == ["cine.dcm#1", "cine.dcm#2", "cine.dcm#3", "a.png#1", "a.png#2"]
    for name, values in here.items():
        np.testing.assert_array_equal(values, there[name])
