"""Every code block of the documentation works: Python and command lines run, tables of jobs and clusters are valid."""

import ast
import csv
import gzip
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import featurepipe
from featurepipe.cli import build_parser
from featurepipe.errors import UsageError
from featurepipe.execution.launchers import read_spec
from featurepipe.jobs.validation import read_job
from tests.test_readme import write_idx

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "SECURITY.md",
    ROOT / "pipelines" / "README.md",
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if "decisions" not in path.parts),
]
RUN_ELSEWHERE = ("README.md", "SECURITY.md", "docs/cluster.md")
"""Pages whose Python needs more than a folder of images: tests/test_readme.py and tests/test_security.py run them."""
SLOW = (
    "docs/api.md",
    "docs/commands.md",
    "docs/howto/groups.md",
    "docs/howto/own-weights.md",
    "docs/routes.md",
    "pipelines/README.md",
)
QUICK = {
    'backbone = "efficientnet_lite0"': 'backbone = "lenet5"\nweights = "none"',
    '"efficientnet_lite0"': '"lenet5", weights="none"',
    '"blocks.10': '"s4',
    'Path("demo-output"), ': 'Path("demo-output"), data=Path("clothes"), ',
}
"""What examples of Python say, and what is run in their place, in milliseconds an image."""
QUICK_LINES = {
    "--backbone efficientnet_lite0": "--backbone lenet5 --weights none",
    "--from blocks.9 --from blocks.12 --seeds 3": "--from s2 --from s4 --epochs 1",
    "--from blocks.12": "--from s4 --epochs 1",
    " --cluster local:2": "",
    "rsync -a --delete store/ /backup/store/": "cp -a store/. backup/store/",
    " /backup/": " backup/",
}
"""The same for command lines."""
ADDED = {
    "extract": "--backbone lenet5 --weights none",
    "depth": "--backbone lenet5 --weights none --folds 2 --seeds 1",
    "routes": "--routes bottleneck,tail --sizes all --seeds 1 --epochs 1",
}
"""What is added to a command; a network only where none is named, as pages do that take the one at hand."""
STORE = (
    'import featurepipe as fp\nfp.extract("photos", "{}", backbone="lenet5", weights="none", nodes={}, silent=True)\n'
)
BEFORE = {
    "docs/howto/archives.md": "import shutil, pathlib\npathlib.Path('shards').mkdir()\nshutil.copy('photos.tar', 'shards/0.tar')",
    "docs/operations.md": "import featurepipe as fp\nfp.run_job('job.toml', silent=True)",
    "docs/removing-images.md": "import pathlib\n[pathlib.Path(name).mkdir() for name in ('bundles', 'reports')]\n"
    + 2 * STORE.format("features", ["bottleneck"]).replace('"photos", ', '"scans.csv", images="scans", store=')
    + "pathlib.Path('withdrawn.txt').write_text('1.png')",
    "docs/routes.md": STORE.format("store", ["s2:map", "s4:map", "bottleneck"]),
    "docs/upgrading.md": STORE.format("features", ["bottleneck"]),
}
"""What a reader has when the command lines of a page begin, besides what its Python has made."""
NOT_RUN = {
    ("README.md", "make demo"): "installs; the demo: tests/test_demo.py",
    ("README.md", "python3 -m venv .venv"): "installs; the wheel: tests/test_package.py",
    ("README.md", "featurepipe extract photos --store store"): "tests/test_readme.py",
    ("README.md", "featurepipe run job.toml"): "tests/test_readme.py",
    ("SECURITY.md", "featurepipe extract list.csv"): "tests/cluster/test_security.py",
    ("SECURITY.md", "umask 077"): "tests/cluster/test_security.py",
    ("SECURITY.md", "openssl req"): "tests/cluster/test_security.py",
    ("SECURITY.md", "export DASK_DISTRIBUTED"): "tests/cluster/test_security.py",
    ("SECURITY.md", "dask scheduler"): "tests/cluster/test_security.py",
    ("SECURITY.md", "dask worker"): "tests/cluster/test_security.py",
    ("SECURITY.md", "featurepipe extract images --store features --scheduler"): "tests/cluster/test_security.py",
    ("docs/cluster.md", "dask scheduler"): "tests/test_readme.py",
    ("docs/cluster.md", "dask worker"): "tests/test_readme.py",
    ("docs/cluster.md", "featurepipe extract"): "tests/test_readme.py",
    ("docs/commands.md", "featurepipe nodes"): "tests/test_readme.py",
    ("docs/commands.md", "torchrun"): "two processes: tests/tuning/test_peers.py",
    ("docs/depth.md", "featurepipe train features"): "tests/test_readme.py",
    (
        "docs/howto/s3.md",
        "featurepipe extract s3://bucket/photos",
    ): "wants a bucket; tests/images/test_s3.py has a server",
    ("docs/networks.md", "featurepipe backbones"): "tests/test_readme.py",
    (
        "docs/removing-images.md",
        "featurepipe run pipelines/nightly.toml;",
    ): "tests/test_vector_databases.py",
    ("docs/start.md", "python3 -m venv .venv"): "installs; the wheel: tests/test_package.py",
    (
        "docs/start.md",
        'eval "$(register-python-argcomplete',
    ): "changes the shell that reads it; what it completes: tests/cli/test_completion.py",
    ("docs/tutorials/index.md", "pip install"): "installs, and opens a browser; notebooks: tests/test_tutorials.py",
    ("pipelines/README.md", "sudo useradd"): "changes the system; the units: tests/test_schedules.py",
    ("pipelines/README.md", "pip install"): "installs; the script: tests/test_pipelines.py",
}
"""Blocks of command lines that are not run here, by page and beginning, and why, or which test runs them; all others are run."""
RUN_LINES = """
import json, shlex, subprocess, sys
import featurepipe as fp
from featurepipe.cli import main

for line in json.loads(sys.argv[1]):
    line = line.replace("RUN-ID", fp.FeatureStore("features").snapshot_ids("scans")[0]) if "RUN-ID" in line else line
    command, *words = shlex.split(line, comments=True)
    code = main(words) if command == "featurepipe" else subprocess.run(["bash", "-c", line]).returncode
    if code:
        print(f"exit code {code} of: {line}", file=sys.stderr)
        sys.exit(1)
"""
MINIMAL_JOB = """
store = "store"
source = {path = "photos"}
[[features]]
backbone = "lenet5"
weights = "none"
nodes = ["bottleneck"]
"""
PARSER = build_parser()


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[str]:
    """The code blocks of a page in some languages, in order."""
    found = re.findall(r"^```([\w{}-]*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language in languages]


def with_blocks(*languages: str) -> list:
    """A parameter for each page that has such blocks."""
    pages = [page for page in PAGES if blocks(page, *languages)]
    return [
        pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] if name_of(page) in SLOW else [])
        for page in pages
    ]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as pages suppose it: ``photos``, ``new-photos``, ``scans`` with ``scans.csv``, and a job."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)

    def draw(name: str, dark: bool) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        level = 40 if dark else 170
        Image.fromarray(rng.integers(level, level + 60, (40, 40, 3), dtype=np.uint8)).save(path)

    few_clothes(folder / "clothes")
    for number in range(1, 17):
        for kind in ("cat", "dog"):
            draw(f"photos/{kind}/{number}.jpg", kind == "cat")
    for number in (1, 2):
        draw(f"new-photos/{number}.jpg", dark=True)
    splits = ("train", "train", "train", "val", "test")
    rows = [
        (f"{i}.png", ("sick", "well")[i % 2], f"p{i // 4 * 2 + i % 2}", 50 + i, splits[i % 5], 1) for i in range(40)
    ]
    for path, label, *_ in rows:
        draw(f"scans/{path}", label == "sick")
    with (folder / "scans.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "label", "patient", "age", "fold", "w"), *rows])
    return folder


def few_clothes(folder: Path) -> None:
    """The demo's files with three images of each class to learn from, and one to test on."""
    folder.mkdir()
    for split, each in (("train", 3), ("t10k", 1)):
        files = [f"{split}-{kind}.gz" for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
        images, labels = (gzip.decompress((ROOT / "featurepipe" / "data" / name).read_bytes()) for name in files)
        pixels, kinds = np.frombuffer(images[16:], np.uint8).reshape(-1, 28, 28), np.frombuffer(labels[8:], np.uint8)
        chosen = np.concatenate([np.flatnonzero(kinds == kind)[:each] for kind in range(10)])
        for name, values in zip(files, (pixels[chosen], kinds[chosen]), strict=True):
            write_idx(folder / name, values)


def quickly(code: str) -> str:
    for written, run in QUICK.items():
        code = code.replace(written, run)
    return code


def lines_to_run(page: Path) -> list[str]:
    """The command lines of a page that are not listed as run elsewhere, with a small network."""
    listed = [start for name, start in NOT_RUN if name == name_of(page)]
    run = [block for block in shell_blocks(page) if not block.startswith(tuple(listed))]
    return [quick_line(line) for block in run for line in block.replace("\\\n", " ").splitlines()]


def shell_blocks(page: Path) -> list[str]:
    """Blocks of the shell, also those without a language, but no output, table or drawing."""
    return blocks(page, "sh") + [block for block in blocks(page, "") if block.startswith(("featurepipe ", "torchrun "))]


def quick_line(line: str) -> str:
    for written, run in QUICK_LINES.items():
        line = line.replace(written, run)
    line, _, _ = line.partition("  #")
    command = re.match(r"featurepipe (?:-v )?(\w+)", line)
    added = ADDED.get(command[1], "") if command else ""
    return f"{line} {added.removeprefix('--backbone lenet5 --weights none') if '--backbone' in line else added}"


def pages_to_run() -> list:
    pages = [
        page for page in PAGES if lines_to_run(page) or (blocks(page, "python") and name_of(page) not in RUN_ELSEWHERE)
    ]
    return [
        pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] if name_of(page) in SLOW else [])
        for page in pages
    ]


@pytest.mark.parametrize("page", pages_to_run())
def test_a_page_runs(page: Path, images: Path, tmp_path: Path, launcher) -> None:
    """Its Python, then its command lines, in order."""
    place = tmp_path / "place"
    shutil.copytree(images, place)
    for job in [*blocks(page, "toml"), MINIMAL_JOB][:1]:
        (place / "job.toml").write_text(quickly(job if "[source]" in job else MINIMAL_JOB), encoding="utf-8")
    (place / "pipelines").mkdir()
    (place / "backup" / "store").mkdir(parents=True)
    nightly = (
        (ROOT / "pipelines" / "nightly.toml").read_text(encoding="utf-8").replace("../featurepipe/data", "../photos")
    )
    (place / "pipelines" / "nightly.toml").write_text(quickly(nightly), encoding="utf-8")
    code = quickly("\n".join(blocks(page, "python")))
    finished = launcher.start(
        f"{code}\n{BEFORE.get(name_of(page), '')}\n{RUN_LINES}", [json.dumps(lines_to_run(page))], place
    ).wait()
    assert finished.code == 0, finished.err


def test_blocks_that_are_not_run_are_there_and_what_runs_them_too() -> None:
    unknown = [
        (page, start) for page, start in NOT_RUN if sum(b.startswith(start) for b in shell_blocks(ROOT / page)) != 1
    ]
    assert unknown == []
    assert [
        test for why in NOT_RUN.values() for test in re.findall(r"tests/\S+", why) if not (ROOT / test).exists()
    ] == []


@pytest.mark.slow
def test_the_recipe_of_preprocessing_holds_for_a_network_of_coloured_images(images: Path, launcher) -> None:
    """The page's own test takes a network of grey images in its place."""
    finished = launcher.start("\n".join(blocks(ROOT / "docs" / "networks.md", "python")), cwd=images).wait()
    assert finished.code == 0, finished.err


def commands(block: str) -> Iterator[list[str]]:
    """The command lines of a block, as words, without comments and variables of the environment."""
    for line in re.split(r"\n|&&|;(?= python)", block.replace("\\\n", " ")):
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a word of several lines, of another program
            continue
        if words:
            yield words


@pytest.mark.parametrize("page", with_blocks("sh", ""))
def test_command_lines_are_ours(page: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for block in blocks(page, "sh"):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
    for words in (words for block in blocks(page, "sh", "") for words in commands(block)):
        if words[0] == "featurepipe":
            assert PARSER.parse_args(words[1:]).run, words
        elif words[0] == "make":
            assert [target for target in words[1:] if target not in targets and "=" not in target] == []
        for asked in re.findall(r"\[([\w,]+)\]", " ".join(words)) if words[0] == "pip" else []:
            assert [extra for extra in asked.split(",") if extra not in extras] == []


def test_a_misspelt_command_line_would_be_found() -> None:
    with pytest.raises(SystemExit):
        PARSER.parse_args(shlex.split("extract photos --stroe features"))


@pytest.mark.parametrize("page", with_blocks("toml"))
def test_tables_are_valid(page: Path, tmp_path: Path) -> None:
    """A block is a job, or some tables to add to one; a table of a cluster may be a file of its own."""
    (tmp_path / "nightly-bundle").mkdir()
    (tmp_path / "nightly-bundle" / "bundle.json").touch()  # of another job, or of an earlier run
    for number, block in enumerate(blocks(page, "toml")):
        file = tmp_path / f"job{number}.toml"
        file.write_text(block if "[source]" in block else MINIMAL_JOB + block, encoding="utf-8")
        read_job(file)
        if set(tomllib.loads(block)) == {"cluster"}:
            (tmp_path / "cluster.toml").write_text(block, encoding="utf-8")
            read_spec(tmp_path / "cluster.toml")


def test_a_misspelt_key_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(MINIMAL_JOB + "[drift]\nreferenc = 'previous'\n", encoding="utf-8")
    with pytest.raises(UsageError, match="referenc"):
        read_job(tmp_path / "job.toml")


def test_the_reference_of_the_interface_has_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    names = {name for name in featurepipe.__all__ if not name.startswith("_")}
    assert {name for name in names if f":: featurepipe.{name}\n" not in text} == set()


def test_the_reference_has_every_name_that_a_page_imports() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    imported = {
        f"{node.module}.{name.name}"
        for page in PAGES
        for block in blocks(page, "python")
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("featurepipe")
        for name in node.names
    }
    assert "featurepipe.store.join_roles" in imported
    assert "featurepipe.store.export_dataset" in imported
    assert {name for name in imported if f":: {name}\n" not in text} == set()
