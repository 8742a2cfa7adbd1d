"""predict: a row for every listed image, the probabilities of the cached features, a whole file or none."""

import csv
import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from featurepipe.backbones import load_backbone
from featurepipe.backbones.engine import Engine
from featurepipe.errors import BundleError, Interrupted, SourceError, TooManyRejects, UsageError
from featurepipe.extraction.extract import extract
from featurepipe.heads.bundle.bundle import write_bundle
from featurepipe.images.regions import region
from featurepipe.prediction import files
from featurepipe.prediction.image_classifier import ImageClassifier
from featurepipe.prediction.predict import predict, text
from featurepipe.store import FeatureStore

OPTIONS = {"silent": True, "workers": 2}


def rows_of(path):
    """[(id, label, confidence, reason, {class: probability})] of a file of any format; numbers as floats, gaps as None."""
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert all(list(row) == ["id", "label", "confidence", "reason", "probabilities"] for row in rows)
        return [tuple(row.values()) for row in rows]
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            rows = [{name: value or None for name, value in row.items()} for row in csv.DictReader(file)]
    else:
        rows = pq.read_table(path).to_pylist()
    found = []
    for row in rows:
        classes = {name[2:-1]: value for name, value in row.items() if name.startswith("p(")}
        known = {name: float(value) for name, value in classes.items() if value is not None}
        confidence = None if row["confidence"] is None else float(row["confidence"])
        found.append((row["id"], row["label"], confidence, row["reason"], known or None))
    return found


@pytest.fixture
def spoilt(album, tmp_path):
    """The album with two images that cannot be used, one of them the first."""
    root = tmp_path / "album"
    shutil.copytree(album.root, root)
    (root / "day" / "!.png").write_bytes(b"")
    (root / "ümlaut" / 'quote", and comma.png').write_bytes(b"no image\n")
    return root


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet", ".CSV"])
def test_every_image_has_its_row_with_the_probabilities_of_its_cached_feature(
    album, spoilt, tmp_path, suffix, score_moves
):
    bundle = album.bundle()
    target = tmp_path / f"out{suffix}"
    record = predict(bundle, spoilt, target, max_rejects=2, **OPTIONS)
    rows = rows_of(target.rename(tmp_path / f"out{suffix.lower()}"))
    features = album.features()
    expected = dict(zip(features.ids, bundle.probabilities(features), strict=True))
    # Unreadable images shift batches, so features may move; probabilities have six digits in a table.
    within = dict(zip(features.ids, 5.1e-6 + np.expm1(2 * score_moves(bundle)[:, 0]), strict=True))
    bad = ["day/!.png", 'ümlaut/quote", and comma.png']
    assert [row[0] for row in rows] == sorted([*expected, *bad])
    for id_, label, confidence, reason, found in rows:
        if id_ in bad:
            assert (label, confidence, found) == (None, None, None)
            assert reason == "empty: 0 bytes" if id_ == bad[0] else reason.startswith("not-an-image: ")
            continue
        assert reason is None
        assert list(found) == list(bundle.classes)
        np.testing.assert_allclose(list(found.values()), expected[id_], rtol=within[id_])
        assert label == bundle.classes[expected[id_].argmax()]
        assert confidence == max(found.values())
    assert record["counts"] == {"listed": 38, "predicted": 36, "rejected": 2}
    assert sum(record["labels"].values()) == 36
    assert record["exit_code"] == 3
    assert [reject["id"] for reject in record["rejects"]] == bad
    assert record["reject_reasons"] == {"empty": 1, "not-an-image": 1}
    json.dumps(record)


def test_labels_are_mostly_right_so_that_the_test_above_says_something(album):
    bundle = album.bundle()
    record = predict(bundle, album.root, **OPTIONS)
    assert record["exit_code"] == 0
    assert record["file"] is None
    assert min(record["labels"].values()) >= 8


def test_a_bundle_in_a_folder_gives_what_the_object_gives(album, written, tmp_path):
    for number, bundle in enumerate([album.bundle(), written()]):
        predict(bundle, album.root, tmp_path / f"{number}.csv", **OPTIONS)
    assert (tmp_path / "0.csv").read_bytes() == (tmp_path / "1.csv").read_bytes()


def test_the_temperature_tempers(album, tmp_path):
    for number, temperature in enumerate([None, 1.0, 5.0]):
        predict(replace(album.bundle(), temperature=temperature), album.root, tmp_path / f"{number}.parquet", **OPTIONS)
    plain, one, warm = (pq.read_table(tmp_path / f"{number}.parquet")["confidence"].to_numpy() for number in range(3))
    np.testing.assert_array_equal(plain, one)
    assert (warm < plain).all()


def test_any_source_will_do(album, tmp_path):
    arrays = np.random.default_rng(0).integers(0, 256, (5, 32, 32), dtype=np.uint8)
    np.savez(tmp_path / "digits.npz", images=arrays)
    for number, source in enumerate([arrays, tmp_path / "digits.npz", list(arrays)]):
        predict(album.bundle(), source, tmp_path / f"{number}.jsonl", **OPTIONS)
    found = [[row[1:] for row in rows_of(tmp_path / f"{number}.jsonl")] for number in range(3)]
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 5


def test_small_probabilities_keep_their_digits(tmp_path):
    import pyarrow as pa

    values = np.array([1.0, 0.123456789, 1.23456789e-20, 0.0, 1e-42], np.float32)
    schema = files.schema_of(["a"])
    count = len(values)
    batch = pa.RecordBatch.from_arrays([pa.array(list("12345")), pa.array(["a"] * count), pa.array(values),
                                        pa.array([None] * count, pa.string()), pa.array(values)], schema=schema)  # fmt: skip
    with files.predictions_file(tmp_path / "x.csv", ["a"]) as write:
        write(batch)
    texts = [line.split(",")[-1] for line in (tmp_path / "x.csv").read_text().splitlines()[1:]]
    assert [texts[0], texts[1], texts[3]] == ["1", "0.123457", "0"]
    assert float(texts[2]) == pytest.approx(1.23457e-20, rel=1e-9)
    assert float(texts[4]) == pytest.approx(1e-42, rel=1e-2)


# Damaged JPEGs


@pytest.fixture
def half_copied(tmp_path, noisy_jpeg):
    """Five JPEGs, the second and the last of which have lost pixels."""
    root = tmp_path / "half copied"
    root.mkdir()
    for number in range(5):
        (root / f"{number}.jpg").write_bytes(noisy_jpeg(number, damaged=number in (1, 4)))
    return root


def test_what_is_damaged_is_rejected_or_predicted_and_listed(album, half_copied, tmp_path):
    bundle = album.bundle()
    record = predict(bundle, half_copied, tmp_path / "rejected.parquet", max_rejects=2, **OPTIONS)
    rejected = rows_of(tmp_path / "rejected.parquet")
    assert record["damaged"] == {"asked": "reject", "kept": 0, "images": []}
    assert [row[1] is None for row in rejected] == [False, True, False, False, True]
    record = predict(bundle, half_copied, tmp_path / "kept.parquet", damaged="keep", **OPTIONS)
    kept = rows_of(tmp_path / "kept.parquet")
    assert record["counts"] == {"listed": 5, "predicted": 5, "rejected": 0}
    assert record["exit_code"] == 0
    assert record["damaged"]["asked"] == "keep"
    assert record["damaged"]["kept"] == 2
    assert [image["id"] for image in record["damaged"]["images"]] == ["1.jpg", "4.jpg"]
    assert all("libjpeg could only repair it" in image["reason"] for image in record["damaged"]["images"])
    assert all(label is not None and reason is None for _, label, _, reason, _ in kept)
    assert "kept although damaged: 2\n  1.jpg: " in text(record)
    with pytest.raises(UsageError, match="unknown damaged 'repair'"):
        predict(bundle, half_copied, damaged="repair", **OPTIONS)


def test_the_prediction_of_a_kept_image_is_that_of_its_stored_feature(album, half_copied, tmp_path, score_moves):
    bundle = album.bundle()
    extract(half_copied, tmp_path / "store", backbone="lenet5", weights="none", nodes=["c3", "bottleneck"],
            precision="fp32", dtype="float16", damaged="keep", silent=True)  # fmt: skip
    expected = bundle.probabilities(FeatureStore(tmp_path / "store").features("half-copied", ["c3", "bottleneck"]))
    predict(bundle, half_copied, tmp_path / "kept.parquet", damaged="keep", **OPTIONS)
    found = np.array([list(row[4].values()) for row in rows_of(tmp_path / "kept.parquet")])
    np.testing.assert_allclose(found, expected, rtol=5.1e-6 + np.expm1(2 * score_moves(bundle).max()))


# Refusals


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.txt", r"its suffix must be one of \.csv, \.jsonl, \.parquet"),
        ("out", "its suffix must be one of"),
        ("none/out.csv", r"No such file or directory \(.*none\); make the folder, or name another"),
        ("file/out.csv", "Not a directory"),
        ("folder.csv", "it is a folder; name a file in it"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_any_work(album, tmp_path, name, message, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "folder.csv").mkdir()
    monkeypatch.setattr("featurepipe.prediction.shards.make_ready", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(UsageError, match=message):
        predict(album.bundle(), album.root, tmp_path / name, **OPTIONS)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("numerics", 0, "numerics differs"),
        ("decoding", {"alpha": "black"}, r"decoding\.alpha, .*decoding\.intensity, .*differ"),
        (
            "weights_sha256",
            "0" * 64,
            r"weights_sha256 differs\. Give the weights that it was trained with: weights='FILE'",
        ),
        ("architecture", "builtin/other", "architecture differs"),
        ("preprocessing", {"resize": 5}, r"preprocessing\.antialias, .*preprocessing\.std differ"),
    ],
)
def test_a_network_that_gives_other_features_is_refused_by_field(album, tmp_path, field, value, message):
    bundle = replace(album.bundle(), space={**album.bundle().space, field: value})
    with pytest.raises(BundleError, match=message):
        predict(bundle, album.root, tmp_path / "out.csv", **OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_precision_dtype_and_decoding_are_the_bundles(album, monkeypatch):
    seen = {}
    prepare = Engine.__init__

    def noting(built, *args, **options):
        seen.update(options)
        prepare(built, *args, **options)

    monkeypatch.setattr(Engine, "__init__", noting)
    predict(replace(album.bundle(), space={**album.bundle().space, "precision": "bf16"}), album.root, **OPTIONS)
    assert seen["precision"] == "bf16"
    with pytest.raises(UsageError, match="decode 'gpu' needs device='cuda'"):
        predict(replace(album.bundle(), space={**album.bundle().space, "decode": "gpu"}), album.root, **OPTIONS)


def test_another_seed_is_other_weights(album):
    bundle = album.bundle()
    with pytest.raises(BundleError, match="weights_sha256"):
        predict(replace(bundle, backbone={**bundle.backbone, "seed": 1}), album.root, **OPTIONS)


def test_weights_of_ones_own_come_from_the_bundle_or_the_user(album, tmp_path):
    state = load_backbone("lenet5", "none").module.state_dict()
    torch.save(state, tmp_path / "mine.pt")
    (tmp_path / "other.pt").touch()
    own = load_backbone("lenet5", str(tmp_path / "mine.pt"))
    bundle = album.bundle()
    bundle = replace(
        bundle,
        backbone={**bundle.backbone, "weights": "file", "description": {"weights": "file:mine.pt"}},
        space={**bundle.space, **own.identity()},
    )
    with pytest.raises(
        BundleError, match=r"weights of your own \(file:mine\.pt\), which are not in the bundle; give them"
    ):
        predict(bundle, album.root, **OPTIONS)
    given = predict(bundle, album.root, weights=tmp_path / "mine.pt", **OPTIONS)
    kept = predict(replace(bundle, weights_file=tmp_path / "mine.pt"), album.root, **OPTIONS)
    assert given["labels"] == kept["labels"]
    torch.save({name: value + 1 for name, value in state.items()}, tmp_path / "other.pt")
    with pytest.raises(BundleError, match="weights_sha256 differs"):
        predict(bundle, album.root, weights=tmp_path / "other.pt", **OPTIONS)


def test_what_is_ignored_of_a_file_of_weights_is_said_and_recorded(album, tmp_path, capsys):
    state = load_backbone("lenet5", "none").module.state_dict()
    torch.save({"state_dict": {f"model.{name}": value for name, value in state.items()}}, tmp_path / "plain.pt")
    more = {name: value + 1 for name, value in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": more}, tmp_path / "two.pt")
    bundle = album.bundle()
    own = load_backbone("lenet5", str(tmp_path / "two.pt"))
    bundle = replace(bundle, backbone={**bundle.backbone, "weights": "file"}, space={**bundle.space, **own.identity()})
    for name in ("plain.pt", "two.pt"):  # the same tensors, and so the same features
        note = load_backbone("lenet5", str(tmp_path / name)).weights_note
        record = predict(bundle, album.root, weights=tmp_path / name, workers=1)
        assert record["weights_note"] == note
        assert (f"weights {tmp_path / name}: {note}" in capsys.readouterr().err) == bool(note)
        assert ImageClassifier.load(bundle, weights=tmp_path / name).weights_note == note
    assert note == "the file holds other tensors as well, which are ignored: ['state_dict_ema']"
    assert predict(album.bundle(), album.root, **OPTIONS)["weights_note"] == ""


def test_a_head_of_another_width_is_refused(album):
    with pytest.raises(BundleError, match=r"takes 100 values per image, but c3:gap of lenet5 has 16; train it again"):
        predict(replace(album.bundle(), columns=("c3:gap",)), album.root, **OPTIONS)


def test_an_empty_source_is_refused(album, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="no images in empty"):
        predict(album.bundle(), tmp_path / "empty", tmp_path / "out.csv", **OPTIONS)
    assert not (tmp_path / "out.csv").exists()


def test_a_wrong_share_of_rejects_is_refused_before_any_work(album):
    with pytest.raises(UsageError, match="max_rejects 'many' must be a number"):
        predict(album.bundle(), "/nowhere", max_rejects="many", **OPTIONS)


# What goes wrong on the way


def test_too_many_rejects_fail_and_lose_no_prediction(album, spoilt, tmp_path):
    with pytest.raises(
        TooManyRejects, match=r"2 of 38 .* first: day/!\.png: empty: 0 bytes; .*out\.csv holds all"
    ) as caught:
        predict(album.bundle(), spoilt, tmp_path / "out.csv", **OPTIONS)
    assert caught.value.exit_code == 4
    assert len(rows_of(tmp_path / "out.csv")) == 38


def test_all_rejected_is_a_file_of_reasons(album, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"")
    record = predict(album.bundle(), [str(tmp_path / "bad.png")], tmp_path / "out.csv", max_rejects="100%", **OPTIONS)
    assert rows_of(tmp_path / "out.csv") == [(str(tmp_path / "bad.png"), None, None, "empty: 0 bytes", None)]
    assert record["counts"] == {"listed": 1, "predicted": 0, "rejected": 1}


class Interrupting:
    """A source that asks this process to stop at its tenth image."""

    name, location = "interrupting", "interrupting"

    def __init__(self, images):
        from featurepipe.images import open_source

        self._source, self.reads = open_source(images), 0
        self.scan, self.close = self._source.scan, self._source.close

    def read(self, locator):
        self.reads += 1
        if self.reads == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return self._source.read(locator)


def test_an_interrupt_leaves_no_file_and_an_old_one_stays(album, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (500, 32, 32), dtype=np.uint8)
    (tmp_path / "old.csv").write_text("as it was")
    for name in ("new.csv", "old.csv"):
        with pytest.raises(Interrupted, match=r"stopped by SIGTERM: \d+ of 500 images were predicted") as caught:
            predict(album.bundle(), Interrupting(images), tmp_path / name, batch_size=4, **OPTIONS)
        assert caught.value.exit_code == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["old.csv"]
    assert (tmp_path / "old.csv").read_text() == "as it was"


STUCK = """
    import sys, time
    from pathlib import Path
    from featurepipe.features import session
    from featurepipe.cli import main

    real, bundle, images, target = session.try_decode, *sys.argv[1:]

    def stuck(payload, **options):
        if payload.endswith(b"stuck"):
            Path("READY").touch()
            time.sleep(1_000)  # in C, where no exception arrives
        return real(payload, **options)

    session.try_decode = stuck
    sys.exit(main(["predict", bundle, images, "--to", target, "--workers", "2", "--batch-size", "4", "--quiet"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_sigterm_ends_the_command_whose_decoder_is_stuck_and_leaves_the_older_file(
    album, written, tmp_path, launcher, suffix
):
    bundle, images, out = written(), tmp_path / "images", tmp_path / "out"
    out.mkdir()
    target = out / f"old{suffix}"
    target.write_text("as it was")
    shutil.copytree(album.root, images)
    last = images / "ümlaut" / "35.png"
    last.write_bytes(last.read_bytes() + b"stuck")
    process = launcher.start(STUCK, [bundle, images, target], cwd=tmp_path, seconds=200)
    deadline = time.monotonic() + 100
    while not (tmp_path / "READY").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(list(out.iterdir())) == 2  # the older one, and what is being written
    sent = time.monotonic()
    process.send(signal.SIGTERM)
    finished = process.wait()
    assert time.monotonic() - sent < 100
    assert finished.code == 128 + signal.SIGTERM, finished.err
    assert "stopped by SIGTERM: " in finished.err
    assert "no file was written" in finished.err
    assert "Traceback" not in finished.err
    assert [path.name for path in out.iterdir()] == [target.name]
    assert target.read_text() == "as it was"


def test_a_failure_on_the_way_leaves_no_file(album, tmp_path, monkeypatch):
    monkeypatch.setattr(Engine, "submit", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        predict(album.bundle(), album.root, tmp_path / "out.parquet", **OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_many_rows_are_scored_in_groups_and_stay_in_order(album, tmp_path, monkeypatch):
    monkeypatch.setattr("featurepipe.prediction.ready.SCORED_BYTES", 1)
    images = np.random.default_rng(0).integers(0, 256, (150, 20, 20), dtype=np.uint8)
    bundle = album.bundle()
    predict(bundle, images, tmp_path / "few.parquet", batch_size=8, **OPTIONS)
    monkeypatch.undo()
    predict(bundle, images, tmp_path / "all.parquet", batch_size=8, **OPTIONS)
    few, whole = (pq.read_table(tmp_path / name) for name in ("few.parquet", "all.parquet"))
    assert pq.ParquetFile(tmp_path / "few.parquet").num_row_groups >= 5
    assert few["id"].to_pylist() == [f"{number:06d}" for number in range(150)] == whole["id"].to_pylist()
    np.testing.assert_allclose(few["confidence"].to_numpy(), whole["confidence"].to_numpy(), rtol=1e-6)


def test_the_text_names_counts_labels_rejects_and_the_file(album, spoilt, tmp_path):
    said = text(predict(album.bundle(), spoilt, tmp_path / "out.csv", max_rejects=2, **OPTIONS)).splitlines()
    assert said[0] == "38 images listed, 36 predicted, 2 rejected"
    assert "night, late (" in said[1]
    assert said[2:4] == ["rejected: 1 empty, 1 not-an-image", "  day/!.png: empty: 0 bytes"]
    assert said[-1] == f"file {Path(tmp_path / 'out.csv')}"


def test_it_moves_to_another_place(album, written, tmp_path):
    here = predict(written(), album.root, **OPTIONS)
    moved = tmp_path / "else" / "where"
    moved.parent.mkdir()
    shutil.move(tmp_path / "bundle", moved)
    assert predict(moved, album.root, **OPTIONS)["labels"] == here["labels"]
    write_bundle(moved, album.bundle())  # and can be written over


def test_predictions_never_replace_what_they_are_made_from(album, written, tmp_path):
    manifest = tmp_path / "images.csv"
    manifest.write_text("path\n" + "".join(f"{path}\n" for path in album.paths()))
    before = manifest.read_text()
    bundle = written()
    for target in (manifest, bundle / "bundle.csv"):
        with pytest.raises(UsageError, match="would replace what they are made from"):
            predict(bundle, manifest, target, silent=True)
    assert manifest.read_text() == before


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_boxes_are_written_beside_their_ids(album, written, tmp_path, suffix):
    name = album.features().ids[0]
    manifest = tmp_path / "boxes.jsonl"
    boxes = [[0, 0, 44, 36], None, [30, 20, 30, 30], [3, 3, 0, 5], [60, 0, 5, 5]]
    manifest.write_text("".join(json.dumps({"path": name, "box": box}) + "\n" for box in boxes))
    to, bundle = tmp_path / f"p{suffix}", written()
    record = predict(bundle, manifest, to, images=album.root, max_rejects=2, **OPTIONS)
    assert (record["counts"], record["clipped"]) == ({"listed": 5, "predicted": 3, "rejected": 2}, 1)
    assert (record["reject_reasons"], record["remarks"]) == ({"box": 2}, {})
    assert "clipped to their images: 1 region" in text(record)
    if suffix == ".jsonl":
        rows = [json.loads(line) for line in to.read_text(encoding="utf-8").splitlines()]
        assert list(rows[0]) == ["id", "image", "box", "label", "confidence", "reason", "probabilities"]
    elif suffix == ".csv":
        with to.open(encoding="utf-8", newline="") as file:
            rows = [{key: value or None for key, value in row.items()} for row in csv.DictReader(file)]
    else:
        rows = pq.read_table(to).to_pylist()
    assert [(row["id"], row["image"], row["box"]) for row in rows] == [
        (f"{name}#1", name, "0.0 0.0 44.0 36.0"), (name, name, None), (f"{name}#2", name, "30.0 20.0 30.0 30.0"),
        (f"{name}#3", name, "3.0 3.0 0.0 5.0"), (f"{name}#4", name, "60.0 0.0 5.0 5.0"),
    ]  # fmt: skip
    assert rows[0]["label"] == rows[1]["label"]  # all of the image
    assert [row["reason"] is None for row in rows] == [True, True, True, False, False]
    assert rows[3]["reason"].startswith("box: 3 3 0 5 (pixels) has a width or height of 0")
    found = ImageClassifier.load(bundle).predict(
        [region(album.root / name, boxes[0]), region(album.root / name, boxes[2])]
    )
    assert list(found) == [rows[0]["label"], rows[2]["label"]]


def test_a_file_of_boxes_is_a_manifest_again_where_ids_are_not_paths(album, written, tmp_path):
    name, bundle = album.features().ids[0], written()
    manifest = tmp_path / "boxes.csv"
    manifest.write_text(f"id,path,box\nanimal,{name},0 0 44 36\nother,{name},\n")
    for night in range(3):
        to = tmp_path / f"p{night}.csv"
        record = predict(bundle, manifest, to, images=album.root, **OPTIONS)
        assert record["counts"] == {"listed": 2, "predicted": 2, "rejected": 0}
        with to.open(encoding="utf-8", newline="") as file:
            assert [row["image"] for row in csv.DictReader(file)] == [name, name]
        manifest = to
