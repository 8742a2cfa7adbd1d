"""The notebooks of docs/tutorials run from top to bottom, and what they show is true."""

import json
import os
import re
import time
from copy import deepcopy
from pathlib import Path
from textwrap import dedent

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from featurepipe.store import FeatureStore
from tests.conftest import FORKED_WORKERS, NODE_SECONDS, Process
from tools.run_tutorials import as_stored

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
NAMES = ["cluster-on-one-machine", "find-wrong-labels", "first-bundle", "week-of-nights", "which-layer", "which-route"]


QUICK = f"from featurepipe.layer_depth import measure\nmeasure.NODE_SECONDS = {NODE_SECONDS}"
"""Before the first cell: each node is timed for an instant, as in the other tests."""
KERNEL = f"""
{dedent(FORKED_WORKERS)}
import ctypes, os, signal
import matplotlib
from ipykernel.kernelapp import launch_new_instance

os.setsid()  # it is signalled by its group
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the server, should the tests be killed
matplotlib.rcParams["backend"] = "module://matplotlib_inline.backend_inline"  # the kernel says so too late, in the environment
launch_new_instance()
"""


class Kernel:
    """A process of the launcher as what jupyter_client has started: `subprocess.Popen`."""

    stdin = stdout = stderr = None

    def __init__(self, process: Process) -> None:
        self.pid, self.send_signal, self.kill = process.pid, process.send, process.kill
        self._process, self._code = process, None
        while os.getpgid(self.pid) != self.pid:
            time.sleep(0.001)

    def poll(self) -> int | None:
        if self._code is None and Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2].startswith("Z"):
            self.wait()
        return self._code

    def wait(self) -> int:
        self._code = self._process.wait().code
        return self._code


@pytest.fixture(autouse=True)
def forked_kernels(launcher, monkeypatch) -> None:
    """Kernels, and Dask workers that they start, are forks, which have loaded PyTorch and all else that takes seconds."""

    def launch(command: list[str], **_: object) -> Kernel:
        launcher.load("matplotlib.pyplot", "pandas", "ipykernel.kernelapp", "torch._dynamo")
        return Kernel(launcher.start(KERNEL, command[command.index("-f") :], ROOT, seconds=900))

    monkeypatch.setattr("jupyter_client.provisioning.local_provisioner.launch_kernel", launch)


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
    """The notebook with its outputs, which say what the stored ones do, and JSON values of an expression at the end."""
    (path,) = [path for path in TUTORIALS if path.stem == name]
    notebook = nbformat.read(path, as_version=4)
    stored = said(nbformat.read(path, as_version=4))
    notebook.cells.insert(0, nbformat.v4.new_code_cell(QUICK))
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({question}))"))
    done = NotebookClient(notebook, timeout=500, kernel_name="python3").execute()
    for cell in done.cells:
        for output in cell.get("outputs", ()):
            assert "<script" not in output.get("data", {}).get("text/html", "")
    assert said(deepcopy(done))[1:-1] == stored
    return done, json.loads(done.cells[-1].outputs[-1].text)


def said(notebook: nbformat.NotebookNode) -> list[dict[str, str]]:
    """What each cell of code shows, by kind; of texts the words, since figures and names of runs differ."""
    return [_words(cell.outputs) for cell in as_stored(notebook).cells if cell.cell_type == "code"]


def _words(outputs: list[nbformat.NotebookNode]) -> dict[str, str]:
    found: dict[str, str] = {}
    for output in outputs:
        for kind, text in output.get("data", {"text/plain": output.get("text", "")}).items():
            found[kind] = found.get(kind, "") + (text if kind == "text/plain" else "")
    without_runs = re.sub(r"\d{8}T\d+Z-[0-9a-f]+", "RUN", found.get("text/plain", ""))
    return found | ({"text/plain": re.sub(r"\d[-+.,:e\d]*", "#", without_runs)} if without_runs else {})


def test_notebooks_are_stored_with_what_came_out() -> None:
    assert [path.stem for path in TUTORIALS] == NAMES
    index = (ROOT / "docs" / "tutorials" / "index.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if f"({name}.ipynb)" not in index or f"\n{name}\n" not in index] == []
    for path in TUTORIALS:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert any(cell.outputs for cell in cells), path
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), path
        assert {output.output_type for cell in cells for output in cell.outputs} <= {
            "stream", "display_data", "execute_result",
        }  # fmt: skip
        text = path.read_text(encoding="utf-8")
        assert "<script" not in text
        assert "/tmp/tmp" not in text
        assert len(text) < 400_000


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_week_of_nights() -> None:
    names = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
    _, found = executed("week-of-nights", f'{{"folder": os.getcwd(), "nights": [{", ".join(names)}]}}')
    nights = found["nights"]
    assert [night["counts"]["computed"] for night in nights] == [200, 20, 0, 1, 20, 60, 60]
    assert [night["exit_code"] for night in nights] == [0, 0, 0, 0, 3, 0, 0]
    thursday = {kind: number for kind, number in nights[3]["changes"].items() if number}
    assert thursday == {"unchanged": 217, "changed": 1, "moved": 1, "deleted": 1}
    steps = [{step["step"]: step for step in night["steps"]} for night in nights]
    assert [taken["train"]["status"] for taken in steps] == ["done", "done", "skipped", *["done"] * 4]
    drift = {
        day: taken["drift"]["result"]["columns"][0]["adjusted"]
        for day, taken in enumerate(steps)
        if taken["drift"]["result"].get("columns")  # none on a night with too few new images
    }
    assert [day for day, p_value in drift.items() if p_value < 0.001] == [5]
    assert {1, 5, 6} <= set(drift)
    features = FeatureStore(Path(found["folder"]) / "store").features("photos")
    assert len(features) == 299
    assert sum(id_.startswith("coat/") for id_ in features.ids) == len(
        list(Path(found["folder"], "photos", "coat").iterdir())
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_find_wrong_labels() -> None:
    question = """{"suspects": list(suspects["id"]), "planted": sorted(planted), "corrected": corrected,
                   "accuracies": list(accuracies.values())}"""
    _, found = executed("find-wrong-labels", question)
    hits = [name for name in found["suspects"] if name in found["planted"]]
    assert found["corrected"] == len(hits) >= 0.9 * len(found["planted"])
    assert len(hits) > len(found["suspects"]) / 2
    given, judged, after = found["accuracies"]
    assert min(judged, after) > given + 0.05  # nine or ten of the test's hundred labels were wrong


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_cluster_on_one_machine() -> None:
    question = """{"folder": os.getcwd(), "counts": [here["counts"], there["counts"], again["counts"]],
                   "workers": [worker["images"] for worker in there["cluster"]["workers"]],
                   "difference": float(np.abs(one - other).max())}"""
    notebook, found = executed("cluster-on-one-machine", question)
    here, there, again = found["counts"]
    assert here == there
    assert (again["computed"], again["known"]) == (0, 120)
    assert len(found["workers"]) == 2
    assert sum(found["workers"]) == 120
    one, other = (FeatureStore(Path(found["folder"]) / name).features("photos") for name in ("here", "there"))
    assert list(one.ids) == list(other.ids)
    np.testing.assert_allclose(one.numpy()[0], other.numpy()[0], rtol=2e-3, atol=1e-4)
    assert found["difference"] < 0.05
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert printed.count("equal: True") == 2
    assert "one feature space: True" in printed
    assert "31 of 31 lines are equal" in printed


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_which_route() -> None:
    _, found = executed("which-route", '{"folder": os.getcwd(), "found": found}')
    rows = found["found"]["results"]
    assert {(row["kind"], row["images"]) for row in rows} == {
        (kind, images) for kind in ("bottleneck", "node", "tail") for images in (24, 96)
    }
    assert found["found"]["recommended"]["route"] in {row["route"] for row in rows}
    assert (Path(found["folder"]) / "routes.html").stat().st_size > 100_000
