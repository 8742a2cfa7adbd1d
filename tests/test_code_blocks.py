"""Every code block of the documentation works: Python runs, command lines parse, tables of jobs and clusters are valid."""

import csv
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

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "SECURITY.md",
    ROOT / "pipelines" / "README.md",
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if "decisions" not in path.parts),
]
RUN_ELSEWHERE = ("README.md", "SECURITY.md", "docs/cluster.md")
"""Pages whose Python needs more than a folder of images: tests/test_readme.py and tests/test_security.py run them."""
SLOW = ("docs/api.md",)
QUICK = {
    'backbone = "efficientnet_lite0"': 'backbone = "lenet5"\nweights = "none"',
    '"efficientnet_lite0"': '"lenet5", weights="none"',
    '"blocks.10': '"s4',
}
"""What examples of Python say, and what is run in their place, in milliseconds an image."""
MINIMAL_JOB = 'store = "store"\nsource = {path = "photos"}\n[[features]]\nbackbone = "lenet5"\nnodes = ["bottleneck"]\n'
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


def quickly(code: str) -> str:
    for written, run in QUICK.items():
        code = code.replace(written, run)
    return code


@pytest.mark.parametrize(
    "page", [case for case in with_blocks("python") if name_of(case.values[0]) not in RUN_ELSEWHERE]
)
def test_python_runs(page: Path, images: Path, tmp_path: Path, launcher) -> None:
    place = tmp_path / "place"
    shutil.copytree(images, place)
    for job in blocks(page, "toml")[:1]:
        (place / "job.toml").write_text(quickly(job), encoding="utf-8")
    finished = launcher.start(quickly("\n".join(blocks(page, "python"))), cwd=place).wait()
    assert finished.code == 0, finished.err


@pytest.mark.slow
def test_the_recipe_of_preprocessing_holds_for_a_network_of_coloured_images(images: Path, launcher) -> None:
    """The page's own test takes a network of grey images in its place."""
    finished = launcher.start("\n".join(blocks(ROOT / "docs" / "networks.md", "python")), cwd=images).wait()
    assert finished.code == 0, finished.err


def commands(block: str) -> Iterator[list[str]]:
    """The command lines of a block, as words, without comments and variables of the environment."""
    for line in re.split(r"\n|&&", block.replace("\\\n", " ")):
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
