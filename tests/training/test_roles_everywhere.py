"""Columns of a manifest with roles in every command that reads labels or deals rows."""

import json

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurepipe.errors import UsageError
from featurepipe.evaluation.evaluate import evaluate
from featurepipe.monitoring.duplicates import duplicates
from featurepipe.reporting.from_store import report
from featurepipe.store import describe, export, join_roles
from featurepipe.summary import info_text
from featurepipe.training.train import train

NODES = ["a:gap", "b:gap"]


@pytest.fixture
def scans(zoo):
    """A dataset whose manifest has no column called label, split or group: 30 patients of four images each."""
    rows = [zoo.image(row.id, row.content, None, None) for row in zoo.images(None, 40)]
    zoo.write(rows)
    columns = {
        "kind": [row.id.split("/")[1] for row in rows],
        "patient": [f"p{n // 4}" for n in range(120)],
        "fold": [["training", "training", "training", "val", "Testing"][n // 4 % 5] for n in range(120)],
        "age": [str(20 + n // 4) for n in range(120)],
    }
    table = zoo.store.snapshot("zoo")
    for name, values in columns.items():
        table = table.append_column(f"column:{name}", pa.array(values))
    zoo.store.write_snapshot("zoo", zoo.store.new_run_id(), table)
    return zoo, columns


@pytest.fixture
def bundle(scans, tmp_path):
    roles = {"label": "kind", "group": "patient", "split_column": "fold"}
    train(scans[0].store, nodes=NODES, out=tmp_path / "bundle", calibration=False, silent=True, **roles)
    return tmp_path / "bundle"


def test_an_evaluation_takes_the_columns_of_the_training(scans, bundle, capsys):
    zoo, _ = scans
    found = evaluate(bundle, zoo.store, bootstrap=0)
    said = capsys.readouterr().err
    assert "splits: column fold of dataset zoo: train 72, test 24, val 24 (Testing as test, training as train)" in said
    assert "classes: column kind of dataset zoo, 3 labels" in said
    assert said.count("without a role here: age\n") == 1
    assert (found["split"], found["counts"]["scored"], found["counts"]["groups"]) == ("test", 24, 6)
    assert found["leakage"]["groups_across_splits"]["groups"] == 0
    other = dict(zip(zoo.features().ids, ["cat"] * 120, strict=True))
    of_mapping = evaluate(bundle, zoo.store, labels=other, bootstrap=0, silent=True)  # a label of one's own comes first
    assert of_mapping["counts"]["scored"] == 24
    assert of_mapping["metrics"]["accuracy"]["value"] < 0.6 < found["metrics"]["accuracy"]["value"]


def test_the_page_of_a_bundle_takes_them_too(scans, bundle, tmp_path):
    zoo, _ = scans
    page = report(zoo.store, tmp_path / "p.html", bundle=bundle, silent=True).read_text(encoding="utf-8")
    assert "split test" in page
    found = report(zoo.store, tmp_path / "q.html", bundle=bundle, split_column="none", split="all", silent=True)
    assert "all images" in found.read_text(encoding="utf-8")
    with pytest.raises(UsageError, match="label='kind' is for the page of a bundle"):
        report(zoo.store, tmp_path / "r.html", label="kind", silent=True)
    with pytest.raises(UsageError, match="unknown column 'knid'; there are kind, "):
        report(zoo.store, tmp_path / "r.html", bundle=bundle, label="knid", silent=True)


def test_roles_are_exported(scans, tmp_path):
    zoo, columns = scans
    view = zoo.store.features("zoo", "b:gap")
    numbers = join_roles(view, target="age", group="patient", weight="age", split_column="fold", silent=True)
    with h5py.File(export(numbers, tmp_path / "e.h5")) as file:
        np.testing.assert_array_equal(file["y"][:], np.array(columns["age"], float))
        assert file["groups"][:].astype(str).tolist() == columns["patient"]
        assert file["splits"][:].astype(str).tolist()[16:20] == ["test"] * 4
        np.testing.assert_array_equal(file["weights"][:], file["y"][:])
        assert "classes" not in file
    tags = {"id": view.ids, "a": ["1", "0"] * 60, "b": ["1", None, "0"] * 40}
    several = join_roles(view, pa.table(tags), multilabel=["a", "b"], group="none", silent=True)
    with np.load(export(several, tmp_path / "e.npz")) as arrays:
        np.testing.assert_array_equal(arrays["y"][:3], [[1, 1], [0, np.nan], [1, 0]])
        assert arrays["classes"].tolist() == ["a", "b"]
        assert "groups" not in arrays
    table = pq.read_table(export(several, tmp_path / "e.parquet"))
    assert table.column_names == ["id", "label", "split", "target", "features"]
    assert json.loads(table.schema.field("target").metadata[b"names"]) == ["a", "b"]
    assert table["target"][2].as_py() == [1, 0]


def test_an_earlier_snapshot_is_exported(scans, tmp_path, monkeypatch, capsys):
    from featurepipe.cli import main

    zoo, columns = scans
    first = zoo.store.snapshot_ids("zoo")[-1]
    zoo.write(zoo.images("test", 2))
    line = [
        "export",
        str(zoo.store.path),
        "--node",
        "b:gap",
        "--to",
        str(tmp_path / "e.npz"),
        "--target",
        "age",
        "--group",
        "patient",
    ]
    assert main([*line, "--split-column", "fold", "--split", "train", "--snapshot", first]) == 0
    assert "72 x 2 float32" in capsys.readouterr().out
    with np.load(tmp_path / "e.npz") as arrays:
        rows = [n for n, fold in enumerate(columns["fold"]) if fold == "training"]
        assert arrays["groups"].tolist() == [columns["patient"][n] for n in rows]
        assert arrays["y"].tolist() == [float(columns["age"][n]) for n in rows]
    assert main(line) == 2
    assert "dataset zoo was extracted without further columns" in capsys.readouterr().err


def test_copies_are_compared_across_a_column_of_splits(scans):
    zoo, _ = scans
    rows = [zoo.image(f"{n}", f"cat-{n // 2}", None, None) for n in range(6)]
    zoo.write(rows)
    sides = pa.table({"id": [row.id for row in rows], "fold": list("xyxxyy"), "kind": list("aabcdd")})
    plain = duplicates(zoo.store, silent=True)["exact"]
    assert (plain["groups"], plain["across_splits"], plain["label_conflicts"]) == (3, 0, 0)
    found = duplicates(zoo.store, labels=sides, label="kind", split_column="fold", silent=True)["exact"]
    assert (found["groups"], found["across_splits"], found["label_conflicts"]) == (3, 1, 1)


def test_near_copies_are_groups_of_a_training(scans, tmp_path):
    zoo, _ = scans
    found = duplicates(zoo.store, node="b:gap", near=0.001, to=tmp_path / "near.csv", silent=True)["near"]
    assert found["groups"] > 3
    done = train(
        zoo.store, nodes=NODES, out=tmp_path / "b", label="kind", group=str(tmp_path / "near.csv"), calibration=False,
        silent=True,
    )  # fmt: skip
    joined = join_roles(zoo.features(), label="kind", group=str(tmp_path / "near.csv"), silent=True)
    assert len({name for name in joined.groups if name is not None}) == found["groups"]
    assert sum(name is not None for name in joined.groups) == found["images"]
    assert "by group" in done["split"]
    tested = evaluate(
        tmp_path / "b", zoo.store, label="kind", group=str(tmp_path / "near.csv"), bootstrap=0, silent=True
    )
    assert (tested["leakage"]["trained_on"]["images"], tested["leakage"]["trained_groups"]["images"]) == (0, 0)
    assert tested["counts"]["scored"] == done["counts"]["test"]


def test_info_names_the_columns(scans):
    found = describe(scans[0].store)
    assert found["datasets"][0]["columns"] == ["kind", "patient", "fold", "age"]
    assert "  columns  kind, patient, fold, age (of the manifest; roles such as --label" in info_text(
        {**found, "runs": []}
    )
