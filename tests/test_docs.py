"""What pages say of the code exists: modules, folders, names and links."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "featurepipe"
TESTS = ROOT / "tests"
DECISIONS = ROOT / "docs" / "decisions"
PAGES = [
    ROOT / "ARCHITECTURE.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "capacity.md",
    *sorted(DECISIONS.glob("*.md")),
]
OF_OTHERS = {"Parallel", "as_completed", "assert", "scatter", "xgboost.dask", "package.module:factory", "flower.jpg"}
"""Names that pages mention and our sources need not."""

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@cache
def words() -> frozenset[str]:
    """Every word of the package's sources, of its tests but these, and of the project's set-up."""
    tests = (file for file in TESTS.rglob("*.py") if file != Path(__file__))
    files = [*PACKAGE.rglob("*.py"), *tests, ROOT / "pyproject.toml", ROOT / "Makefile"]
    return frozenset(re.findall(r"\w+", "\n".join(file.read_text(encoding="utf-8") for file in files)))


def spans(text: str) -> list[str]:
    """What a page puts between backticks, outside of blocks of code."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def is_path(span: str) -> bool:
    return re.fullmatch(r"[\w.*/-]+", span) is not None and ("/" in span or span.endswith((".py", ".md", ".json")))


def exists(span: str, page: Path) -> bool:
    """Whether a path is there, seen from the package, the project, its tests or the page's folder."""
    return any(any(folder.glob(span.rstrip("/"))) for folder in (PACKAGE, ROOT, TESTS, page.parent))


def absent(text: str, page: Path) -> list[str]:
    """Spans that look like a path, a dotted name or an identifier, and are none that there is."""
    missing = []
    for span in spans(text):
        if span in OF_OTHERS or "..." in span:  # a name cut short
            continue
        if is_path(span):
            if not exists(span, page):
                missing.append(span)
        elif re.fullmatch(r"featurepipe(\.\w+)+", span):
            if not is_dotted(span):
                missing.append(span)
        elif re.fullmatch(r"[A-Za-z_][\w.]*(\(.*\))?", span) and not words() >= set(span.partition("(")[0].split(".")):
            missing.append(span)
    return missing


def is_dotted(name: str) -> bool:
    """Whether a dotted name is a module, or a name that its module's file has."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:end])
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if file.exists():
            return all(re.search(rf"\b{part}\b", file.read_text(encoding="utf-8")) for part in parts[end:])
    return False


@each_page
def test_what_a_page_names_exists(page: Path) -> None:
    assert absent(page.read_text(encoding="utf-8"), page) == []


def test_the_check_above_can_fail() -> None:
    there = "`store/commit.py` `heads/` `Executor.map` `featurepipe.store.views.FeatureSet` `CONTRIBUTING.md`"
    missing = "`store/comit.py` `nouns/` `Nobodies.map` `featurepipe.rooms` `featurepipe.store.views.Nobody`"
    assert absent(f"{there} {missing}", ROOT / "ARCHITECTURE.md") == spans(missing)


def test_the_architecture_names_every_package_and_every_module_beside_them() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    packages = [f"{file.parent.name}/" for file in PACKAGE.glob("*/__init__.py")]
    modules = [file.name for file in PACKAGE.glob("*.py") if not file.name.startswith("__")]
    assert [name for name in packages + modules if name not in text] == []


@each_page
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_every_decision_is_in_the_index_once() -> None:
    linked = re.findall(
        r"^- \[.*\]\((.+)\)$", (DECISIONS / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert sorted(linked) == sorted(path.name for path in DECISIONS.glob("*.md") if path.name != "README.md")


@pytest.mark.parametrize("name", sorted(path.name for path in DECISIONS.glob("*.md") if path.name != "README.md"))
def test_a_decision_is_short_and_titled_as_in_the_index(name: str) -> None:
    text = (DECISIONS / name).read_text(encoding="utf-8")
    title = text.splitlines()[0].removeprefix("# ")
    assert f"- [{title}]({name})" in (DECISIONS / "README.md").read_text(encoding="utf-8").splitlines()
    assert 10 <= len(text.splitlines()) <= 60


@pytest.mark.slow
def test_the_site_builds_offline_without_a_warning(tmp_path: Path) -> None:
    """Among Sphinx's warnings are links that lead nowhere, and pages that no table of contents has."""
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-c",
        "docs",
        "-b",
        "html",
        "-W",
        "--keep-going",
        "-q",
        ".",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    options = (tmp_path / "docs" / "command-line.html").read_text(encoding="utf-8")
    assert "--max-rejects" in options
    assert "tolerate up to N or P % unusable images" in options
    assert "Computes the features that the store lacks" in (tmp_path / "docs" / "api.html").read_text(encoding="utf-8")
    assert "url=docs/index.html" in (tmp_path / "index.html").read_text(encoding="utf-8")
