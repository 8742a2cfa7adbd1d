"""Boxes of COCO files and YOLO folders, from files to a bundle: those of one image on one side, and jobs that do all of it."""

import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from featurepipe.evaluation.evaluate import evaluate
from featurepipe.extraction.extract import extract
from featurepipe.jobs.run import run_job
from featurepipe.store import FeatureStore
from featurepipe.training.train import train

IMAGES, BOXES = 40, 4
OPTIONS = {"backbone": "lenet5", "weights": "none", "silent": True, "precision": "fp32"}


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """40 images of a colour each, with 4 boxes; the class is that of the image, and no colour tells it."""
    folder, rng = tmp_path_factory.mktemp("coco"), np.random.default_rng(0)
    classes = rng.permutation(IMAGES) % 2
    (folder / "images").mkdir()
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for n in range(IMAGES):
            pixels = np.clip(rng.integers(0, 256, 3) + rng.integers(-4, 5, (40, 60, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{n:02d}.png")
            archive.write(folder / "images" / f"{n:02d}.png", f"all/{n:02d}.png")
    document = {
        "images": [{"id": n, "file_name": f"{n:02d}.png"} for n in range(IMAGES)],
        "categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}],
        "annotations": [
            {"image_id": n, "category_id": int(classes[n]), "bbox": [4 * i, 3 * i, 30, 30 - i]}
            for n in range(IMAGES)
            for i in range(BOXES)
        ],
    }
    (folder / "instances.json").write_text(json.dumps(document))
    rows = [
        f"images/{one['image_id']:02d}.png,{' '.join(map(str, one['bbox']))},{one['category_id']},{one['image_id'] // 2}\n"
        for one in document["annotations"]
    ]
    (folder / "boxes.csv").write_text("path,box,label,patient\n" + "".join(rows))
    return folder


def test_boxes_of_an_image_are_on_one_side_unless_said_otherwise(coco, tmp_path):
    store = tmp_path / "store"
    extract(coco / "instances.json", store, images=coco / "images.zip", dataset="coco", **OPTIONS)
    record = extract(coco / "boxes.csv", store, dataset="patients", **OPTIONS)
    assert record["counts"]["computed"] == 0  # whatever lists them, they are the same bytes and boxes
    accuracy = {}
    for group, boxes in ((None, BOXES), ("none", 1), ("patient", 2 * BOXES)):
        dataset, out = ("coco" if group is None else "patients"), tmp_path / f"bundle-{group}"
        trained = train(
            store,
            out=out,
            dataset=dataset,
            head="knn",
            params={"n_neighbors": 1},
            calibration=False,
            group=group,
            silent=True,
        )
        tested = evaluate(out, store, dataset=dataset, group=group, silent=True)
        assert tested["metrics"]["images"] == trained["counts"]["test"]
        for found in (trained["test"], tested["metrics"]):
            assert found.get("groups") == (None if group == "none" else trained["counts"]["test"] // boxes)
        accuracy[group] = trained["test"]["accuracy"]["value"]
    assert accuracy["none"] > 0.85  # other boxes of the same image are in the training set
    assert max(accuracy[None], accuracy["patient"]) < 0.75, accuracy


@pytest.mark.parametrize("kind", ["coco", "yolo", "manifest"])
def test_a_job_of_boxes(coco, tmp_path, kind):
    source = f'path = "{coco}/instances.json"\nimages = "{coco}/images.zip"'
    if kind == "manifest":
        source = f'path = "{coco}/boxes.csv"\nbox = "box"'
    if kind == "yolo":
        root = tmp_path / "set"
        for part in ("images/train", "labels/train"):
            (root / part).mkdir(parents=True)
        (root / "classes.txt").write_text("cat\ndog\n")
        for n in range(10):
            (root / f"images/train/{n}.png").write_bytes((coco / f"images/{n:02d}.png").read_bytes())
            (root / f"labels/train/{n}.txt").write_text(f"{n % 2} 0.5 0.5 0.5 0.5\n{n % 2} 0.9 0.5 0.4 0.5\n")
        source = f'path = "{root}"'
    job = tmp_path / "job.toml"
    job.write_text(
        f"""
store = "store"
dataset = "boxes"
[source]
{source}
box_margin = 0.25
[[features]]
backbone = "lenet5"
weights = "none"
nodes = ["c3:flatten"]
precision = "fp32"
[[train]]
out = "bundle"
head = "centroid"
nodes = ["c3:flatten"]
calibration = false
[[predict]]
bundle = "bundle"
to = "predictions.csv"
images = "all"
"""
    )
    record = run_job(job, silent=True)
    assert record["status"] == "done", record["steps"]
    step = next(step for step in record["steps"] if step["step"] == "extract")
    count = 20 if kind == "yolo" else IMAGES * BOXES
    lines = (tmp_path / "predictions.csv").read_text().splitlines()
    assert len(lines) == count + 1
    run = next(run for run in FeatureStore(tmp_path / "store").runs() if "clipped" in run)
    assert (run["counts"]["computed"], run["clipped"] > 0) == (count, True)
    assert step["status"] == "done"
