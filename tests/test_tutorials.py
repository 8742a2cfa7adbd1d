"""The notebooks of docs/tutorials run from top to bottom, and what they show is true."""

import json
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from featurepipe.store import FeatureStore

TUTORIALS = sorted((Path(__file__).parents[1] / "docs" / "tutorials").glob("*.ipynb"))


def shown(notebook: nbformat.NotebookNode, source: str) -> dict[str, str]:
    """What the only cell with this source shows, by kind; texts of several outputs one after the other."""
    (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and source in cell.source]
    found: dict[str, str] = {}
    for output in cell.outputs:
        kinds = output.get("data", {}) if output.output_type != "stream" else {output.name: output.text}
        for kind, text in kinds.items():
            found[kind] = found.get(kind, "") + text
    return found


def executed(name: str, question: str) -> tuple[nbformat.NotebookNode, dict]:
    """The notebook with its outputs, and JSON values that an expression has in its kernel at the end."""
    (path,) = [path for path in TUTORIALS if path.stem == name]
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({question}))"))
    done = NotebookClient(notebook, timeout=500, kernel_name="python3").execute()
    for cell in done.cells:
        for output in cell.get("outputs", ()):
            assert "<script" not in output.get("data", {}).get("text/html", "")
    return done, json.loads(done.cells[-1].outputs[-1].text)


def test_notebooks_are_committed_without_outputs() -> None:
    assert [path.stem for path in TUTORIALS] == ["first-bundle", "which-layer"]
    for path in TUTORIALS:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        assert [cell.execution_count for cell in notebook.cells if cell.cell_type == "code" and cell.outputs] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_from_first_features_to_a_first_bundle() -> None:
    question = '{"folder": str(folder), "x": float(x.sum()), "metrics": found["metrics"], "again": again["counts"]}'
    notebook, found = executed("first-bundle", question)
    features = FeatureStore(Path(found["folder"]) / "store").features("photos")
    assert found["x"] == pytest.approx(float(features.numpy()[0].sum()))
    assert (found["again"]["computed"], found["again"]["known"]) == (0, 300)
    confusion = np.array(found["metrics"]["confusion"]["counts"])
    assert confusion.sum() == found["metrics"]["images"]
    assert found["metrics"]["accuracy"]["value"] == confusion.trace() / confusion.sum() > 0.6
    assert "float32" in shown(notebook, "features.numpy()")["text/plain"]
    bar = shown(notebook, 'fp.extract(photos, folder / "store", backbone="efficientnet_lite0", precision')["text/html"]
    assert bar.count("<progress ") == 1
    assert 'value="300" max="300"' in bar
    for cell in ("features.plot()", 'found.plot("confusion")', 'found.plot("mistakes"'):
        assert len(shown(notebook, cell)["image/png"]) > 10_000
    assert "FeatureStore" in shown(notebook, "store = fp.FeatureStore")["text/html"]
    assert "predicted" in shown(notebook, "to_pandas(files)")["text/html"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_which_layer() -> None:
    notebook, found = executed("which-layer", '{"folder": str(folder), "found": found, "trained": _}')
    (kept,) = FeatureStore(Path(found["folder"]) / "store").depth_documents("photos")
    assert kept["results"] == found["found"]["results"]
    assert [row["column"].partition(":")[0] for row in kept["results"]][:2] == ["blocks.2", "blocks.10"]
    assert found["trained"] == kept["recommended"]["column"].split("+")
    for row in kept["results"]:
        assert row["accuracy"] == pytest.approx(np.mean(row["cells"]), abs=0.02)
    assert shown(notebook, "found = fp.depth(")["text/html"].count("<progress ") == 1
    assert (Path(found["folder"]) / "depth.html").stat().st_size > 1_000_000
