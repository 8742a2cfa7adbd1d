"""What somebody meets who has just installed featurepipe: a network at hand, the next command, reasons, completion."""

import logging
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

import featurepipe
from featurepipe.backbones import loading
from featurepipe.backbones.loading import DEFAULT, SMALL, default_backbone
from featurepipe.cli.output import start_up
from featurepipe.extraction.text import next_command
from featurepipe.images.listing import SCHEMA, ListingSummary
from featurepipe.store import FeatureStore
from featurepipe.training.text import _in_all

LENET = ("--backbone", "lenet5", "--weights", "none")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for kind in ("cat", "dog"):
        (tmp_path / "my photos" / kind).mkdir(parents=True)
        Image.effect_noise((32, 32), 50).convert("RGB").save(tmp_path / "my photos" / kind / "0.png")
    return tmp_path / "my photos"


@pytest.mark.parametrize(
    ("at_hand", "kept", "weights", "expected", "is_said"),
    [
        ({DEFAULT, SMALL}, (), "DEFAULT", DEFAULT, False),
        ({SMALL}, (), "DEFAULT", SMALL, True),
        (set(), (), "DEFAULT", DEFAULT, False),
        ({SMALL}, {DEFAULT}, "DEFAULT", DEFAULT, False),
        ({DEFAULT, SMALL}, {SMALL}, "DEFAULT", SMALL, True),
        ({DEFAULT, SMALL}, {SMALL, DEFAULT}, "DEFAULT", DEFAULT, False),
        ({SMALL}, (), "none", DEFAULT, False),
        ({SMALL}, (), "mine.pth", DEFAULT, False),
    ],
)
def test_without_a_name_the_network_at_hand_is_used_and_said(monkeypatch, at_hand, kept, weights, expected, is_said):
    monkeypatch.setattr(loading, "weights_at_hand", lambda name: name in at_hand)
    said: list[str] = []
    assert default_backbone(weights, kept, said.append) == expected
    assert bool(said) == is_said
    assert not said or SMALL in said[0]


def test_extract_alone_names_the_next_command_and_its_reasons(photos, cli):
    first = cli("extract", "my photos", *LENET, cwd=photos.parent)
    assert first.code == 0, first.err
    assert first.out.splitlines()[-1] == "next: featurepipe train features --dataset my-photos --out my-photos-bundle"
    assert "extraction.prepare" not in first.err
    (space,) = FeatureStore(photos.parent / "features").spaces()
    again = cli("extract", "-v", "my photos", *LENET, "--store", "features", cwd=photos.parent)
    assert "extraction.prepare: 2 images need nothing: same id, size and time, and every column there" in again.err
    assert f"extraction.prepare: precision {space.fields['precision']}: as in the store" in again.err
    (photos.parent / "loose").mkdir()
    Image.effect_noise((32, 32), 50).save(photos.parent / "loose" / "a b.png")
    loose = cli("extract", "loose", *LENET, "--store", "a store", cwd=photos.parent)
    assert loose.out.splitlines()[-1].startswith(
        "next: featurepipe train 'a store' --dataset loose --labels FILE.csv --out loose-bundle   # "
    )


def listed(**columns):
    rows = len(next(iter(columns.values())))
    table = pa.table([pa.nulls(rows, one.type) for one in SCHEMA], schema=SCHEMA)
    for name, values in columns.items():
        table = table.append_column(f"column:{name}", pa.array(values, pa.string()))
    return ListingSummary.of(table).as_dict()


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({}, "--labels FILE.csv --out d-bundle   # the images have no labels: FILE.csv has the columns id and label"),
        (
            {
                "unit": list("abcd") * 10,
                "race": ["elf", "orc"] * 20,
                "female": ["0", "1"] * 20,
                "id2": list(map(str, range(40))),
            },
            "--label race --out d-bundle   # the images have no labels, but race has 2 values; if others are the classes: "
            "--label unit",
        ),
        (
            {"what is it": ["x", "y"] * 5},
            "--label 'what is it' --out d-bundle   # the images have no labels, but what is it has 2 values",
        ),
        (
            {"source": ["a", "b"] * 10, "Class": list("1234") * 5},
            "--label Class --out d-bundle   # the images have no labels, but "
            "Class has 4 values; if others are the classes: --label source",
        ),
        (
            {"group": ["a", "b"] * 10, "fold": ["a", "b"] * 10, "one": ["a"] * 20, "many": list("abcde") * 4},
            "--labels FILE.csv --out d-bundle   # the images have no labels: FILE.csv has the columns id and label",
        ),
    ],
)
def test_columns_that_may_be_classes_are_the_next_commands_label(columns, expected):
    listing = listed(**(columns or {"note": [None] * 9}))
    record = {"status": "done", "dataset": "d", "counts": {"listed": 40, "rejected": 0}, "listing": listing}
    assert next_command(record, "s") == f"next: featurepipe train s --dataset d {expected}"


def test_the_next_command_takes_the_network_that_was_just_extracted(photos, cli):
    """The store has features of another network, which ``train`` alone would take."""
    folder = photos.parent
    for pixels in range(1, 5):
        for kind in ("cat", "dog"):
            (photos / kind).mkdir(exist_ok=True)
            Image.effect_noise((32, 32), 20 * pixels + (kind == "dog")).save(photos / kind / f"more-{pixels}.png")
    assert cli("extract", "my photos", *LENET, "--precision", "fp32", cwd=folder).code == 0
    other = cli("extract", "my photos", *LENET, "--precision", "bf16", cwd=folder)
    assert other.code == 0, other.err
    (space,) = [one for one in FeatureStore(folder / "features").spaces() if one.fields["precision"] == "bf16"]
    said = other.out.splitlines()[-1]
    assert said.startswith(f"next: featurepipe train features --dataset my-photos --backbone {space.name} --out")
    options = ("--out", "b", "--min-class-size", "1", "--dry-run")
    trained = cli("train", "features", "--dataset", "my-photos", "--backbone", space.name, *options, cwd=folder)
    assert trained.code == 0, trained.err
    assert f" of lenet5, feature space {space.name}: as {space.name} was asked for" in trained.err.splitlines()[0]


def test_mirrored_images_lead_to_a_tuned_tail_not_to_a_head_of_their_own(photos, cli):
    folder = photos.parent
    asked = ("my photos", *LENET, "--node", "s2:map", "--node", "bottleneck")
    assert "featurepipe train" in cli("extract", *asked, cwd=folder).out
    mirrored = cli("extract", *asked, "--mirrored", cwd=folder)
    expected = "next: featurepipe finetune features --dataset my-photos --backbone lenet5 --from s2 --augment flip"
    assert mirrored.out.splitlines()[-1] == f"{expected} --out my-photos-tuned"
    without_maps = cli("extract", "my photos", *LENET, "--mirrored", "--store", "other", cwd=folder)
    assert without_maps.code == 0
    assert "next:" not in without_maps.out


def test_in_python_messages_and_reasons_are_logged(photos, caplog):
    with caplog.at_level(logging.DEBUG, logger="featurepipe"):
        featurepipe.extract(photos, photos.parent / "store", backbone="lenet5", weights="none", silent=True)
    levels = {
        record.levelname: record.getMessage() for record in caplog.records if record.name.startswith("featurepipe")
    }
    assert set(levels) == {"DEBUG", "INFO"}
    assert any("2 images, 2 labels, no splits" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("line", "expected"), [("featurepipe ext", "extract"), ("featurepipe extract --max-g", "--max-gone")]
)
def test_the_shell_completes_commands_and_options(tmp_path, line, expected):
    answer = tmp_path / "answer"
    asked = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    subprocess.run([sys.executable, "-m", "featurepipe"], env={**os.environ, **asked}, check=False, capture_output=True)
    assert answer.read_text(encoding="utf-8").strip() == expected


def test_the_seconds_of_a_command_count_the_loading_of_libraries():
    found = {"seconds": 0.5}
    began = time.perf_counter() - 4.5
    loading = start_up(Namespace(began=began), found)
    assert 4.0 <= loading < 4.4
    assert start_up(Namespace(began=time.perf_counter()), found) == 0.0  # a clock of its own may be ahead
    assert _in_all(found, 4.0) == "4.5 s in all, 4.0 s of it for loading libraries"
