"""What commands return in Python: cards, DataFrames, plots, progress in a notebook; and that each command is a function."""

import importlib.util
import json
import pickle
import re
import shutil
import sys
from html import escape
from pathlib import Path
from types import ModuleType, SimpleNamespace

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import featurepipe as fp
from featurepipe import progress
from featurepipe.cli.parser import COMMANDS
from featurepipe.errors import UsageError
from featurepipe.heads.statistics.metrics import score_table
from featurepipe.results import Result, Results, card

mpl.use("Agg")

OTHER_NAMES = {"run": "run_job", "demo": "run_demo", "doctor": "examine", "backbones": "list_backbones"}
"""Functions that go by other names than their commands: modules of the package have those."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> fp.FeatureStore:
    images = {f"{'<b>cat' if k % 2 else 'dog'}/{k}.png": np.full((32, 32), 8 * k, np.uint8) for k in range(12)}
    folder = tmp_path_factory.mktemp("results") / "store"
    fp.extract(images, folder, dataset="greys", backbone="lenet5", weights="none", dtype="float16", silent=True)
    return fp.FeatureStore(folder)


@pytest.fixture(scope="module")
def evaluated() -> Result:
    likely = np.random.default_rng(0).dirichlet(np.ones(4), 60)
    codes = np.random.default_rng(1).integers(0, 4, 60)
    names = ["a", "b", "<script>alert(1)</script>", "d"]
    return Result({"metrics": score_table(likely, codes, names, ids=[f"{k}.png" for k in range(60)])}, "evaluate")


def safe(html: str) -> str:
    """A card that holds no script and no tag that a name brought along."""
    assert html.startswith("<div")
    assert html.endswith("</div>")
    assert not re.search(r"<script|<b>|javascript:|\son\w+=", html)
    assert "prefers-color-scheme" not in html
    assert not re.search(r"color:\s*(#|black|white)", html)
    return html


def test_each_command_is_a_function_of_the_package() -> None:
    commands = [name for of_job in COMMANDS.values() for name in of_job]
    functions = [OTHER_NAMES.get(name, name) for name in commands]
    assert set(functions) <= set(fp.__all__)
    for name in functions:
        assert callable(getattr(fp, name))
        assert getattr(fp, name).__doc__


def test_functions_of_a_store_find_what_the_command_line_prints(store: fp.FeatureStore, cli, tmp_path: Path) -> None:
    assert fp.info(store.path) == json.loads(cli("info", str(store.path), "--json").out)
    assert fp.nodes("lenet5", stages=True) == json.loads(cli("nodes", "lenet5", "--stages", "--json").out)
    assert fp.verify(store).rows == 12
    assert fp.verify(store).problems == []
    assert fp.compact(store, dry_run=True).parts_before == 1
    assert fp.gc(store, dry_run=True).rows_dropped == 0
    assert [run["dataset"] for run in fp.runs(store, last=1)] == ["greys"]
    assert len(fp.runs(store, last=0)) == 0
    written = fp.export(store, to=tmp_path / "x.npz", silent=True)
    assert (written["rows"], written["width"]) == store.features("greys").shape
    with pytest.raises(UsageError, match=r"unknown option 'splitt'.*split"):
        fp.export(store, to=tmp_path / "y.npz", splitt="test")
    with pytest.raises(UsageError, match="no job has run"):
        fp.runs(store, job="nightly")


def test_rejects_and_the_page_of_nights_are_had_in_python_as_well(cli, tmp_path: Path) -> None:
    for k in range(4):
        Image.fromarray(np.full((32, 32), 40 * k, np.uint8)).save(tmp_path / f"{k}.png")
    (tmp_path / "0.png").write_bytes(b"no image")
    path = tmp_path / "store"
    fp.extract(tmp_path, path, dataset="d", backbone="lenet5", weights="none", max_rejects=1, silent=True)
    found = fp.runs(path, rejects=True)
    assert list(found) == json.loads(cli("runs", path, "--rejects", "--json").out)
    assert list(fp.runs(path, rejects=True, dataset="d").to_pandas()["id"]) == ["0.png"]
    with pytest.raises(UsageError, match="unknown dataset 'e'"):
        fp.runs(path, rejects=True, dataset="e")
    with pytest.raises(UsageError, match="dataset belongs to rejects; runs are chosen with job"):
        fp.runs(path, dataset="d")
    page = fp.report(path, tmp_path / "nights.html", nights=True, last=3, job="d", silent=True)
    cli("report", path, "--nights", "--last", "3", "--job", "d", "--to", tmp_path / "same.html")
    title = re.compile(r"<title>(.*?)</title>")
    assert title.findall(page.read_text()) == title.findall((tmp_path / "same.html").read_text()) != []
    with pytest.raises(UsageError, match="nights: leave all options out but last and job"):
        fp.report(path, tmp_path / "x.html", nights=True, dataset="d", silent=True)
    with pytest.raises(UsageError, match=r"last='?3'? goes with nights only"):
        fp.report(path, tmp_path / "x.html", last=3, silent=True)


def test_stages_are_those_that_depth_compares_and_the_bottleneck_is_named(cli) -> None:
    found = fp.nodes("efficientnet_lite0", stages=True)
    assert len(fp.nodes("efficientnet_lite0")["nodes"]) > len(found["nodes"]) > 3
    assert found["nodes"][-1]["name"] == found["bottleneck"]
    said = cli("nodes", "lenet5", "--stages").out
    assert re.search(r"^bottleneck \(f6\.1\) ", said, re.MULTILINE)


def test_cards_are_escaped_and_say_what_they_leave_out(
    store: fp.FeatureStore, evaluated: Result, tmp_path: Path
) -> None:
    card = safe(store._repr_html_())
    assert "greys" in card
    assert ">bottleneck (f6.1:gap)<" in card
    assert "&lt;b&gt;cat" in safe(store.features("greys").with_labels({"<b>cat/1.png": "<b>cat"})._repr_html_())
    assert "no store here yet" in safe(fp.FeatureStore(tmp_path / "none")._repr_html_())
    assert "&lt;script&gt;" in safe(evaluated._repr_html_())
    many = Result({"nodes": [{"name": f"n{k}"} for k in range(40)]}, "nodes")
    assert "28 more rows" in safe(many._repr_html_())
    assert "greys" in (card := safe(fp.runs(store)._repr_html_()))
    assert "not shown: " in card
    shown = ["started", "status", "command", "dataset", "listed", "computed", "known", "rejected", "gone", "run_id"]
    assert re.findall(r"<th[^>]*>([^<]*)</th>", card)[1:] == shown
    facts = re.findall(r"<th[^>]*>([^<]*)</th>", safe(fp.runs(store)[0]._repr_html_()))
    assert [name for name in facts if name in shown][:4] == ["started", "status", "command", "dataset"]
    empty = fp.FeatureStore(tmp_path / "empty")
    with empty.lock(shared=True):
        assert "no dataset yet" in safe(empty._repr_html_())


FLAT = {"name": "resnet18", "description": {"bottleneck": "flatten"}}


def test_cards_call_the_bottleneck_so_in_every_table() -> None:
    found = {
        "kind": "depth", "version": 1, "backbone": FLAT, "weights_note": "", "protocol": "p" * 300,
        "counts": {f"count_{k}": 7 * (k == 3) for k in range(12)},
        "recommended": {"column": "flatten:gap", "head": "logistic"},
        "results": [{"column": "layer1:gap"}, {"column": "flatten:gap"}],
        "concatenations": [{"columns": ["layer1:gap", "flatten:gap"], "against": "flatten:gap"}],
        "differences": [{"a": "layer1:gap", "b": "flatten:gap"}],
    }  # fmt: skip
    shown = safe(Result(found, "depth")._repr_html_())
    assert shown.count(">bottleneck (flatten:gap)<") == 3
    assert ">layer1:gap + bottleneck (flatten:gap)<" in shown
    assert ">flatten:gap<" not in shown.partition("everything else")[0]
    assert "p" * 300 in shown
    assert ">count_3 7<" in shown
    assert not {">weights_note<", ">kind<", ">version<"} & set(re.findall(r">\w+<", shown))
    of_labels = safe(Result({"column": "flatten:gap", "bottleneck": "flatten", "kind": "multiclass"})._repr_html_())
    assert re.findall(r"<td[^>]*>(.*?)</td>", of_labels) == ["bottleneck (flatten:gap)", "multiclass"]
    assert ">bottleneck (flatten:gap)<" in Result({"columns": ["flatten:gap"], "bottleneck": "flatten"})._repr_html_()


def test_a_card_of_several_networks_says_what_each_reached() -> None:
    layers = {"flat": ("resnet18", "flatten", 0.9), "f6": ("lenet5", "f6.1", 0.7)}
    networks = [
        {
            "backbone": {"name": name, "description": {"bottleneck": node}},
            "recommended": {"column": f"{node}:gap", "accuracy": value},
            "results": [{"column": column, "accuracy": value} for column in ("first:gap", f"{node}:gap")],
        }
        for name, node, value in layers.values()
    ]
    between = [{"backbone": "lenet5", "a": "lenet5 f6.1:gap", "b": "resnet18 flatten:gap"}]
    best = {"backbone": "resnet18", "column": "flatten:gap", "head": "svm", "accuracy": 0.9}
    found = {"kind": "networks", "backbone": FLAT, "recommended": best, "differences": between, "networks": networks}
    result = Result(found, "depth")
    shown = safe(result._repr_html_())
    assert ">bottleneck (flatten:gap) of resnet18 with svm<" in shown
    assert {">lenet5 bottleneck (f6.1:gap)<", ">resnet18 bottleneck (flatten:gap)<"} <= set(
        re.findall(r">[^<]*<", shown)
    )
    assert shown.count(">bottleneck (f6.1:gap)<") == 2  # of the network, and of all results
    frame = result.to_pandas()
    assert list(frame["backbone"]) == ["resnet18", "resnet18", "lenet5", "lenet5"]
    assert list(frame["column"]) == ["first:gap", "flatten:gap", "first:gap", "f6.1:gap"]
    assert list(result.to_pandas("networks")["accuracy"]) == [0.9, 0.7]


def test_measures_of_several_labels_stand_in_their_order() -> None:
    bounded = {"value": 0.25, "low": 0.1, "high": 0.4}
    row = {"ap": bounded, "f1": bounded, "label": "a", "negative": 3, "positive": 4, "precision": 0.5, "unknown": 0}
    shown = card("Bundle", {}, tables={"per_label": [row]})
    assert re.findall(r"<th[^>]*>(.*?)</th>", shown) == [
        "label", "positive", "negative", "precision", "f1", "ap", "unknown",
    ]  # fmt: skip
    assert shown.count(">0.25<") == 2


def test_reports_of_upkeep_are_cards(store: fp.FeatureStore, tmp_path: Path) -> None:
    copy = fp.FeatureStore(shutil.copytree(store.path, tmp_path / "store"))
    card = safe(fp.verify(copy)._repr_html_())
    assert "VerifyReport" in card
    assert re.search(r">rows</th><td[^>]*>12<", card)
    assert re.search(r">problems</th><td[^>]*>none<", card)
    (part,) = copy.path.glob("spaces/*/parts/*.h5")
    part.write_bytes(part.read_bytes()[:-100])
    card = safe(fp.verify(copy)._repr_html_())
    assert part.name in card.partition("problems")[2]
    assert re.search(r">rows_dropped</th><td[^>]*>0<", safe(fp.compact(store, dry_run=True)._repr_html_()))
    assert re.search(r">snapshots_removed</th><td[^>]*>0<", safe(fp.gc(store, dry_run=True)._repr_html_()))
    page = tmp_path / "x.html"
    page.write_text("dog/0.png")
    told = fp.forget(store, ["dog/0.png"], look_in=[page], dry_run=True, silent=True)
    assert list(told.to_pandas()["kind"]) == ["page"]
    assert "x.html" in safe(told._repr_html_())


def test_a_result_stays_a_dictionary() -> None:
    found = Result({"a": 1, "b": [1, 2]}, "depth")
    assert found == {"a": 1, "b": [1, 2]}
    assert json.loads(json.dumps(found)) == found
    again = pickle.loads(pickle.dumps(found))
    assert (again, again.command) == (found, "depth")


def test_dataframes_hold_the_same_values(store: fp.FeatureStore, evaluated: Result) -> None:
    features = store.features("greys")
    frame = features.to_pandas()
    np.testing.assert_array_equal(frame[[f"f6.1:gap_{k}" for k in range(84)]].to_numpy(), features.numpy()[0])
    assert list(frame["id"]) == list(features.ids)
    assert list(features.to_pandas(values=False)) == ["id", "label", "split"]
    assert list(store.to_pandas()["status"]) == ["ok"] * 12
    assert list(evaluated.to_pandas()["support"]) == [row["support"] for row in evaluated["metrics"]["per_class"]]
    assert list(Results([{"a": {"b": 1}}, {"a": {"b": 2}}]).to_pandas()["a.b"]) == [1, 2]
    assert isinstance(Result({"a": 1}).to_pandas(), pd.DataFrame)
    with pytest.raises(UsageError, match="no table 'runs'; it has: per_class"):
        evaluated.to_pandas("runs")


def test_what_was_found_for_each_image_is_a_row_of_card_and_dataframe(store: fp.FeatureStore) -> None:
    found = fp.similar(store, query_ids=["dog/0.png", "<b>cat/1.png"], top=2, silent=True)
    frame = found.to_pandas()
    assert list(frame) == ["query", "rank", "id", "label", "split", "distance"]
    assert list(frame["query"]) == ["dog/0.png"] * 2 + ["<b>cat/1.png"] * 2
    assert list(frame["rank"]) == [1, 2, 1, 2]
    assert list(frame["id"]) == [image["id"] for query in found["queries"] for image in query["found"]]
    assert f">{escape(frame['id'][0])}<" in safe(found._repr_html_()).partition("everything else")[0]
    near = fp.duplicates(store, near=0.5, silent=True)
    frame = near.to_pandas("near")
    groups = near["near"]["listed"]
    assert [frame[frame["group"] == number]["id"].tolist() for number in range(1, len(groups) + 1)] == [
        [image["id"] for image in group["images"]] for group in groups
    ]
    assert frame["label_conflict"].tolist() == [group["label_conflict"] for group in groups for _ in group["images"]]
    assert "dog/0.png" in safe(near._repr_html_())


def test_features_are_float32_wherever_they_are_read(store: fp.FeatureStore) -> None:
    features = store.features("greys")
    assert features.dtype == np.float16
    assert {features.read().dtype, features.numpy()[0].dtype, features.dask()[0].dtype} == {np.dtype(np.float32)}
    assert features.read(None).dtype == np.float16
    np.testing.assert_array_equal(features.read(), features.read(None).astype(np.float32))


@pytest.mark.parametrize("package", ["pandas", "matplotlib"])
def test_a_package_that_is_missing_is_named(
    package: str, store, evaluated: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else known(name, *rest)
    )
    what, calls = {
        "pandas": ("to_pandas", (evaluated.to_pandas, store.to_pandas, store.features("greys").to_pandas)),
        "matplotlib": ("plot", (evaluated.plot, store.features("greys").plot)),
    }[package]
    for call in calls:
        with pytest.raises(UsageError, match=rf"{what}\(\) needs {package}.*pip install {package}"):
            call()


def test_plots_draw_the_values(store: fp.FeatureStore, evaluated: Result) -> None:
    counts = np.array(evaluated["metrics"]["confusion"]["counts"])
    axes = evaluated.plot()
    np.testing.assert_allclose(axes.images[0].get_array(), counts / counts.sum(axis=1, keepdims=True))
    assert [label.get_text() for label in axes.get_yticklabels()][:2] == ["a", "b"]
    columns = [{"column": name} for name in ("x:gap", "y:gap")]
    entries = [
        {"column": f"{n}:gap", "head": "ridge", "network": "pretrained", "tested_on": "source", "accuracy": v, "low": v - 0.1,
         "high": v + 0.1}
        for n, v in (("x", 0.5), ("y", 0.75))
    ]  # fmt: skip
    found = Result({"kind": "depth", "columns": columns, "results": entries, "recommended": {"column": "y:gap"}})
    found["backbone"] = {"description": {"bottleneck": "y"}}
    axes = found.plot("curve")
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [0.5, 0.75])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["x:gap", "bottleneck (y:gap)"]
    assert "recommended: bottleneck (y:gap)" in [text.get_text() for text in axes.get_legend().get_texts()]
    best = {"column": "y:gap", "head": "ridge", **{name: entries[1][name] for name in ("accuracy", "low", "high")}}
    pooled = {"metrics": {"accuracy": {"value": 0.7501, "low": 0.71, "high": 0.79}}}  # of one prediction an image
    shown = Result({**found, "recommended": best, "details": pooled})._repr_html_()
    assert "bottleneck (y:gap) with ridge" in shown
    assert "0.75 (95 % interval 0.65 to 0.85)" in shown  # as its table, its text and its page have it
    assert "0.71 to 0.79" not in shown
    axes = store.features("greys").plot()
    assert sum(len(one.get_offsets()) for one in axes.collections) == 12
    assert axes.get_title().startswith(store.features("greys").named_column)
    assert "12 of 12 images" in axes.get_title()
    pictures = {f"{k}.png": np.full((8, 8), k, np.uint8) for k in range(60)}
    axes = evaluated.plot("mistakes", images=pictures.get, most=3)
    assert len(axes.child_axes) == 3
    plt.close("all")


def test_what_cannot_be_drawn_is_said(evaluated: Result) -> None:
    with pytest.raises(UsageError, match="a bundle without test images has no confusion matrix"):
        Result({"metrics": {}}, "bundle").plot()
    with pytest.raises(UsageError, match="nothing for plot 'curve'; it has: confusion, mistakes"):
        evaluated.plot("curve")
    with pytest.raises(UsageError, match="unknown plot 'confusio'"):
        evaluated.plot("confusio")
    with pytest.raises(UsageError, match="say where the images are"):
        evaluated.plot("mistakes")
    plt.close("all")


def test_a_cell_of_a_notebook_has_one_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    handle = SimpleNamespace(update=lambda html: shown.append(html.data))
    inner = ModuleType("IPython.display")
    inner.HTML = lambda data: SimpleNamespace(data=data)
    inner.display = lambda html, display_id: shown.append(f"new {html.data}") or handle
    shell = SimpleNamespace(kernel=object(), execution_count=7)
    outer = ModuleType("IPython")
    outer.get_ipython = lambda: shell
    monkeypatch.setitem(sys.modules, "IPython", outer)
    monkeypatch.setitem(sys.modules, "IPython.display", inner)
    monkeypatch.setattr(progress.NotebookBar, "_cell", None)
    for _ in range(2):
        with progress.show(3, "read <i>") as bar:
            bar.advance(3)
    shell.execution_count = 8
    with progress.show(3, "write"):
        pass
    assert [line.startswith("new ") for line in shown] == [True, False, False, False, True, False]
    assert 'value="3" max="3"' in shown[1]
    assert "read &lt;i&gt;: 3 of 3 images in " in shown[1]


def test_names_of_columns_stand_above_their_numbers() -> None:
    of_class = dict(
        sorted(
            {
                "class": "a",
                "support": 1,
                "predicted": 1,
                "precision": 1.0,
                "recall": 1.0,
                "f1": 1.0,
                "auc": None,
            }.items()
        )
    )
    heads = re.findall(r"<th[^>]*>(.*?)</th>", card("x", {}, tables={"per_class": [of_class]}))
    assert heads == ["class", "support", "predicted", "precision", "recall", "f1", "auc"]  # as of evaluate
    key = "0123456789abcdef" * 4
    page = card("x", {}, tables={"t": [{"id": "a", "n": 1, "of": 2.5}, {"id": key, "n": None, "of": True}]})
    cells = re.findall(r'<td style="([^"]*)">([^<]*)</td>', page)
    assert [(text, "text-align:right" in style) for style, text in cells[3:]] == [
        ("0123456789ab…", False),
        ("–", True),  # below the numbers of its column
        ("yes", False),
    ]
    heads = re.findall(r'<th style="([^"]*)">(\w+)</th>', page)
    assert [(name, style.endswith("text-align:right")) for style, name in heads] == [
        ("id", False),
        ("n", True),
        ("of", False),
    ]
