"""A bundle knows the groups that it was trained on, and an evaluation leaves out or names their other images."""

import dataclasses
import hashlib

import numpy as np
import pyarrow as pa
import pytest

from featurepipe.errors import BundleError
from featurepipe.evaluation.evaluate import evaluate
from featurepipe.evaluation.text import text
from featurepipe.heads.bundle.bundle import read_bundle, write_bundle
from featurepipe.heads.bundle.text import bundle_text, describe_bundle
from featurepipe.training.train import train


def patients(rows, each=4):
    """A labels table with a patient for each so many neighbouring images of a class."""
    names = [f"patient {row // each}" for row in range(len(rows))]
    return pa.table({"id": [r.id for r in rows], "label": [r.label for r in rows], "Patient": names}), np.array(names)


@pytest.fixture
def trained(zoo, tmp_path):
    """A dataset without splits, and a bundle of four fifths of its patients."""
    rows = zoo.images(None, 40)
    zoo.write(rows)
    table, names = patients(rows)
    train(
        zoo.store, nodes=["a:gap", "b:gap"], out=tmp_path / "bundle", labels=table, group="patient", calibration=False,
        silent=True,
    )  # fmt: skip
    return rows, table, names, tmp_path / "bundle"


def test_a_bundle_keeps_hashes_of_groups_and_no_names(zoo, trained):
    rows, _, names, path = trained
    bundle = read_bundle(path)
    seen = set(bundle.seen.tolist())
    of_seen = sorted({name for row, name in zip(rows, names, strict=True) if zoo.keys64([row])[0] in seen})
    salt = bundle.grouping["salt"]
    expected = [int.from_bytes(hashlib.sha256((salt + name).encode()).digest()[:8], "little") for name in of_seen]
    assert bundle.groups.tolist() == sorted(expected)
    assert 0 < len(of_seen) < 30
    assert bundle.grouping["column"] == "Patient"
    assert not any(b"patient " in file.read_bytes() for file in path.iterdir())
    assert describe_bundle(bundle)["groups"] == len(of_seen)
    assert f"96 different images of {len(of_seen)} groups (Patient)" in bundle_text(bundle)


def test_without_a_split_images_of_trained_groups_are_left_out(zoo, trained):
    rows, table, names, path = trained
    bundle = read_bundle(path)
    known = np.isin(zoo.keys64(rows), bundle.seen)
    more = [zoo.image(f"more/{n}.png", f"cat-more-{n}", "cat", None) for n in range(6)]  # of a trained patient
    old = names[known][0]
    zoo.write([*rows, *more])
    more_table = pa.table({"id": [r.id for r in more], "label": ["cat"] * 6, "Patient": [old] * 6})
    every = pa.concat_tables([table, more_table])
    found = evaluate(path, zoo.store, labels=every, group="patient", bootstrap=0, silent=True)
    assert found["counts"]["scored"] == int((~known).sum())
    assert found["scope"] == (
        "the images that the head was not trained on, nor on others of their Patient (there is no split test)"
    )
    assert found["leakage"]["trained_groups"]["images"] == 0
    everything = evaluate(path, zoo.store, labels=every, group="patient", split="all", bootstrap=0, silent=True)
    leak = everything["leakage"]["trained_groups"]
    assert (leak["images"], leak["groups"], leak["examples"]) == (6, 1, [old])
    assert leak["share"] == pytest.approx(6 / 126)
    assert leak["accuracy_without"] == found["metrics"]["accuracy"]["value"]
    assert f"trained on other images of 1 group that 6 of these images are of (4.8 %): {old}" in text(everything)
    alone = evaluate(path, zoo.store, labels=every, group="none", bootstrap=0, silent=True)
    assert alone["counts"]["scored"] == int((~known).sum()) + 6
    assert "trained_groups" not in alone["leakage"]


def test_groups_are_known_where_the_trained_images_are_gone(zoo, trained):
    _, _, names, path = trained
    bundle = read_bundle(path)
    trained_name = next(n for n in names if bundle.was_trained_on_groups([n], "PATIENT")[0])
    others = [
        zoo.image(f"{name}{n}.png", f"{name}-later-{n}", name, None) for n in range(8) for name in ("cat", "dog", "emu")
    ]
    column = [trained_name if n < 9 else f"new {n // 3}" for n in range(24)]
    table = pa.table({"id": [r.id for r in others], "label": [r.label for r in others], "patient": column})
    zoo.write(others)
    found = evaluate(path, zoo.store, labels=table, group="patient", bootstrap=0, silent=True)
    assert (found["counts"]["scored"], found["leakage"]["trained_groups"]["images"]) == (15, 0)
    # Another dataset's patient of that name may be another one: named, and not left out.
    zoo.write(others, name="clinic")
    found = evaluate(path, zoo.store, dataset="clinic", labels=table, group="patient", bootstrap=0, silent=True)
    assert (found["counts"]["scored"], found["leakage"]["trained_groups"]["images"]) == (24, 9)
    table = table.rename_columns(["id", "label", "group"])
    other = evaluate(path, zoo.store, dataset="clinic", labels=table, bootstrap=0, silent=True)
    assert other["leakage"]["trained_groups"]["images"] == 0


def test_a_bundle_without_groups_knows_those_of_its_images(zoo):
    rows = zoo.images(None, 20)
    zoo.write(rows)
    table, names = patients(rows, each=5)
    bundle = zoo.bundle(rows[::10])  # one image of each second patient
    assert bundle.grouping is None
    found = evaluate(bundle, zoo.store, labels=table, group="Patient", bootstrap=0, silent=True)
    assert found["counts"]["scored"] == sum(name not in set(names[::10]) for name in names)


def test_a_file_of_groups_that_fits_no_entry_is_refused(zoo, trained, tmp_path):
    path = trained[3]
    bundle = read_bundle(path)
    for change, said in (
        ({"groups": np.arange(3)}, r"groups must be \(n,\) uint64, the first 8 bytes of each hash"),
        ({"grouping": {"column": "p"}}, "damaged: what it says of groups"),
        ({"grouping": {"column": 3, "salt": ""}}, "damaged: what it says of groups"),
    ):
        with pytest.raises(BundleError, match=said):
            write_bundle(tmp_path / "wrong", dataclasses.replace(bundle, **change))
