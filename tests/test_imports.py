"""The public names, and what importing them costs."""

import ast
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import featurepipe

HEAVY = (
    "torch", "torchvision", "xgboost", "dask", "h5py", "timm", "sklearn", "pyarrow", "bokeh", "pydantic", "faiss",
    "prometheus_client", "scipy",
)  # fmt: skip
EVERY_HELP = """
import contextlib, io, sys
from featurepipe.cli import build_parser, main

(names,) = (action.choices for action in build_parser()._actions if action.choices)
for name in names:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        main([name, "--help"])
    print(name, said.getvalue().startswith(f"usage: featurepipe {name}"), [m for m in HEAVY if m in sys.modules])
"""


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def loaded(statement):
    """Which heavy modules a fresh interpreter has loaded after ``statement``."""
    done = run(
        "-c",
        f"import sys\ntry:\n    {statement}\nexcept SystemExit: pass\nprint([m for m in {HEAVY} if m in sys.modules])",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_the_public_surface_is_what_it_was():
    assert featurepipe.__all__ == [
        "CNNFeatures",
        "FeatureStore",
        "ImageClassifier",
        "SimilarImages",
        "__version__",
        "compact",
        "depth",
        "drift",
        "duplicates",
        "evaluate",
        "examine",
        "export",
        "extract",
        "finetune",
        "forget",
        "gc",
        "info",
        "labels",
        "list_backbones",
        "load_backbone",
        "make_head",
        "nodes",
        "outliers",
        "predict",
        "region",
        "report",
        "routes",
        "run_demo",
        "run_job",
        "runs",
        "select",
        "similar",
        "train",
        "verify",
    ]
    assert dir(featurepipe) == sorted(featurepipe.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Store'; it has CNNFeatures, FeatureStore"):
        featurepipe.Store  # noqa: B018


def test_public_names_are_what_they_say():
    for name in set(featurepipe.__all__) - {"__version__"}:
        found = getattr(featurepipe, name)
        assert found.__name__ == name
        assert found.__module__.startswith("featurepipe.")
        assert callable(found)


def test_verbs_stay_functions_whatever_was_imported_before(launcher):
    commands = [name for name in featurepipe.__all__ if name.islower() and not name.startswith("_")]
    imports = ", ".join(sorted({f"featurepipe.{featurepipe._HOMES[command]}" for command in commands}))
    code = f"import {imports}, featurepipe as fp; print([v for v in {commands} if not callable(getattr(fp, v))])"
    done = launcher.start(code).wait()
    assert (done.out, done.err) == ("[]\n", "")


@pytest.mark.parametrize(
    "statement",
    [
        "import featurepipe",
        "import featurepipe.backbones, featurepipe.heads, featurepipe.errors",
        "import featurepipe.cli",
        "from featurepipe.cli import main; main(['--help'])",
        "from featurepipe.cli import main; main(['extract'])",
    ],
)
def test_nothing_heavy_is_loaded_before_it_is_needed(statement):
    assert loaded(statement) == "[]"


def test_evaluating_stored_features_loads_no_torch():
    assert "torch" not in loaded("import featurepipe.evaluation.evaluate")


def test_extracting_here_loads_no_dask():
    """It would take half a second of every start; only a cluster needs it."""
    assert "dask" not in loaded("import featurepipe.extraction.extract")


def test_training_and_evaluating_stored_features_loads_neither_torch_nor_dask(tmp_path):
    """A bundle is written and read by skops, which looks through all of scikit-learn, where adapters for both are."""
    images = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), np.uint8)
    store = tmp_path / "store"
    for number, image in enumerate(images):
        path = tmp_path / "noise" / ("even", "odd")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    featurepipe.extract(tmp_path / "noise", store, backbone="lenet5", weights="none", silent=True)
    script = f"""
import sys, featurepipe
made = featurepipe.train({str(store)!r}, out={str(tmp_path / "bundle")!r}, silent=True)
found = featurepipe.evaluate({str(tmp_path / "bundle")!r}, {str(store)!r}, silent=True)
assert 0 <= found["metrics"]["accuracy"]["value"] <= 1
print([name for name in ("torch", "dask", "torchvision") if name in sys.modules])
"""
    done = run("-c", script)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_what_looks_at_a_store_loads_no_pandas(tmp_path):
    """Arrow imports it, where it is installed, to see whether a text or an array is a Series: half the time of such a command."""
    Image.new("L", (32, 32)).save(tmp_path / "0.png")
    (tmp_path / "1.png").write_text("no image")
    lenet = {"backbone": "lenet5", "weights": "none"}
    featurepipe.extract(tmp_path, tmp_path / "store", **lenet, max_rejects=1, silent=True)
    script = f"""
import sys
from featurepipe.cli import main
for command in ("info", "verify", "runs", "gc"):
    assert main([command, {str(tmp_path / "store")!r}]) == 0
    assert "pandas" not in sys.modules, command
"""
    done = run("-c", script)
    assert done.returncode == 0, done.stderr


SERVED = ("lenet5", "alexnet", "vgg16", "googlenet", "inception_v3", "resnet50", "efficientnet_lite0")


def test_neither_nodes_nor_extraction_load_the_compiler_of_pytorch(tmp_path):
    """It and sympy would take a third of a short command; torchvision asks for it as it is imported, PyTorch at shapes alone."""
    script = f"""
import sys
import numpy as np
import featurepipe
for name in {SERVED}:
    assert len(featurepipe.load_backbone(name, "none").nodes()) > 10
images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
made = featurepipe.extract(images, {str(tmp_path / "store")!r}, dataset="noise", backbone="lenet5", weights="none", silent=True)
assert made["counts"]["computed"] == 4, made
assert "torchvision.transforms.v2" in sys.modules
print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
"""
    done = run("-c", script)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_what_is_left_of_the_compiler_works_when_it_is_asked_for():
    script = """
import sys, torch
disable = torch.compiler.disable
from featurepipe.backbones.loading import load_backbone
import torchvision
from torchvision import tv_tensors
from torchvision.ops import roi_align
assert "torch._dynamo" not in sys.modules and "torch._dynamo.utils" not in sys.modules
assert torch.compiler.disable is disable
boxes = torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0]])
pooled = roi_align(torch.arange(16.0).reshape(1, 1, 4, 4), boxes, output_size=1, sampling_ratio=2, aligned=True)
assert pooled.shape == (1, 1, 1, 1) and 7 < float(pooled) < 8, pooled
asked = sys.modules["torchvision.ops.roi_align"].is_compile_supported("cpu")
import torch._dynamo.utils
assert asked == torch._dynamo.utils.is_compile_supported("cpu")
image = tv_tensors.Image(torch.zeros(3, 2, 2))
assert type(tv_tensors.wrap(torch.ones(3, 2, 2), like=image)) is tv_tensors.Image
doubled = torch.compile(lambda values: values * 2, backend="eager")
assert doubled(torch.ones(2)).tolist() == [2, 2]
print("all of it")
"""
    done = run("-c", script)
    assert (done.returncode, done.stdout.strip()) == (0, "all of it"), done.stderr


def test_asking_for_images_of_a_store_loads_no_torch():
    """It would take longer than a search among a million images; only new images need a network."""
    found = loaded("import featurepipe.curation.similar, featurepipe.curation.next_to_label")
    assert ("torch" in found, "sklearn" in found) == (False, False)


def test_processes_that_fit_heads_load_no_torch():
    """Each of them imports the module of the function that it is given; PyTorch would take 3 s and 200 MB in each."""
    assert "torch" not in loaded("import featurepipe.layer_depth.measure, featurepipe.training.trials")


def test_the_help_of_no_command_loads_anything_heavy():
    done = run("-c", EVERY_HELP.replace("HEAVY", repr(HEAVY)))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) >= 19
    assert [line for line in lines if not line.endswith(" True []")] == []


OF_THE_COMMAND_LINE = {"featurepipe.cli.options", "featurepipe.cli.output", "featurepipe.cli.parser"}


@pytest.mark.parametrize(
    ("words", "module", "options"),
    [
        (["--help"], None, set()),
        (["info", "--help"], "stores", {"featurepipe.store.options"}),
        (["verify", "nowhere"], "stores", {"featurepipe.store.options"}),
        (["runs", "--help"], "run", set()),
        (["nodes", "--help"], "demo", set()),
    ],
)
def test_a_command_loads_no_module_of_another(words, module, options):
    code = f"import sys; from featurepipe.cli import main\ntry:\n    main({words})\nexcept SystemExit: pass\nprint(*sys.modules)"
    names = run("-c", code).stdout.split()
    assert {name for name in names if name.startswith("featurepipe.cli.")} - OF_THE_COMMAND_LINE == (
        {f"featurepipe.cli.{module}"} if module else set()
    )
    if "nowhere" not in words:
        assert {name for name in names if name.endswith(".options")} - {"featurepipe.cli.options"} == options


def test_the_check_above_can_fail():
    assert loaded("import h5py") == "['h5py']"


def test_help_answers_in_half_a_second():
    best = 9.0
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run("-m", "featurepipe", "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)  # what it takes of a processor, whoever else is at work
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.stdout.startswith("usage: featurepipe ")
    assert best < 0.5


def test_no_module_imports_a_private_name_of_another():
    root = Path(featurepipe.__file__).parent
    found = [
        f"{path.relative_to(root)}: {alias.name}"
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("featurepipe")
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert found == []
