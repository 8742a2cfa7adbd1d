"""Counts what the plan of the package promises about structure: ``tools/measure_structure.py [--json] [--check] [--options]``.

Each figure is measured, not declared: files and lines as git tracks them, circular imports by grimp with imports for type
checkers counted, class names from the syntax trees, and the files that one image enters by running ``featurepipe.extract``
on one PNG under a profiler. ``--check`` ends with exit code 1 if a figure is above its limit, which CI holds to. ``--options``
counts instead in how many files each option of ``featurepipe extract`` is written.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import inspect
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "featurepipe"
sys.path.insert(0, str(ROOT))  # the package of this tree, whatever is installed
WHERE_WORK_RUNS = (  # the modules that decide where work runs, run it elsewhere, or cut it and put it together for that
    "execution/*.py", "extraction/shards.py", "extraction/compute.py", "prediction/shards.py", "training/trials.py",
    "heads/row_shards.py", "heads/trees/distributed.py",
)  # fmt: skip
TARGETS = {"files": 240, "where work runs: lines": 3600, "where work runs: files": 16, "files entered by one image": 40,
           "circular imports": 0, "class names of several meanings": 4, "lines": 40_000}  # fmt: skip
TEXTS = {tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
LIMITS = {"files": 291, "files per 1,000 lines": 3.6, "where work runs: lines": 4820, "where work runs: files": 15,
          "files entered by one image": 57, "circular imports": 0, "class names of several meanings": 0}  # fmt: skip
"""What CI holds to; why some lie above their targets, and which bounds are better: docs/decisions/structure-targets.md. A command
that comes raises the files by what it adds, and so did the joint second derivative of heads (`heads/linear/joint.py`), for which
`losses.py` is too long; `features_at` came from `prediction` to the executors, as more commands use it (24 lines);
the phases of depth and routes (`layer_depth/phases.py`) are one idea of both; listing, plan, ledger and snapshot share how large
tables lie in files (`partitions.py`), which every image enters; everything else only goes down."""


def modules() -> list[Path]:
    """The package's modules that git tracks; where there is no repository, all."""
    command = ["git", "ls-files", "featurepipe/*.py"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return sorted(PACKAGE.rglob("*.py"))
    return [ROOT / name for name in listed.splitlines() if (ROOT / name).exists()]


def lines_of(path: Path) -> int:
    """How many lines a file has."""
    return len(path.read_text().splitlines())


def ambiguous_classes(paths: list[Path]) -> dict[str, list[str]]:
    """Public names of classes that two or more modules define, each with the modules."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(str(path.relative_to(PACKAGE)))
    return {name: where for name, where in sorted(found.items()) if len(where) > 1}


def circular_imports() -> list[tuple[str, str]]:
    """The imports, (importer, imported), whose removal would leave no circle among the children of any package."""
    import grimp

    graph = grimp.build_graph("featurepipe", exclude_type_checking_imports=False, cache_dir=None)
    packages = ["featurepipe", *sorted(m for m in graph.modules if graph.find_children(m) and m != "featurepipe")]
    return sorted({pair for package in packages for pair in graph.nominate_cycle_breakers(package)})


@contextlib.contextmanager
def functions_entered() -> Iterator[set[tuple[str, str]]]:
    """Gathers (file, function) of the package's functions that run meanwhile, in any thread; not what an import runs."""
    entered: set[tuple[str, str]] = set()
    top = f"{PACKAGE}/"

    def profile(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        is_function = code.co_flags & inspect.CO_OPTIMIZED  # bodies of modules and classes are not
        if event == "call" and is_function and code.co_filename.startswith(top):
            entered.add((code.co_filename, code.co_qualname))

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        yield entered
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def entered_by_one_image() -> set[tuple[str, str]]:
    """What ``featurepipe.extract`` of one PNG runs, with a network without weights, into an empty store."""
    from PIL import Image

    import featurepipe
    import featurepipe.extraction.extract  # functions that run when modules are imported are no part of an image's way,

    featurepipe.load_backbone("lenet5", "none")  # nor is what only the first network of a process runs
    with tempfile.TemporaryDirectory() as folder:
        pile = Path(folder) / "pile"
        pile.mkdir()
        Image.effect_noise((32, 32), 50).save(pile / "0.png")
        with functions_entered() as entered:
            featurepipe.extract(str(pile), f"{folder}/store", backbone="lenet5", weights="none", silent=True)
    return entered


def measured(entered: set[tuple[str, str]]) -> dict[str, Any]:
    """All figures, given what `entered_by_one_image` has found."""
    paths = modules()
    lines = {path: lines_of(path) for path in paths}
    bodies = [count for path, count in lines.items() if path.name != "__init__.py"]
    apart = {path for pattern in WHERE_WORK_RUNS for path in PACKAGE.glob(pattern)} & set(paths)
    on_the_way = {Path(file) for file, _ in entered}
    return {
        "files": len(paths),
        "median lines of a file": int(statistics.median(bodies)),
        "lines": sum(lines.values()),
        "files per 1,000 lines": round(1000 * len(paths) / sum(lines.values()), 2),
        "where work runs: lines": sum(lines[path] for path in apart),
        "where work runs: files": len(apart),
        "files entered by one image": len(on_the_way),
        "lines of the files entered": sum(map(lines_of, on_the_way)),
        "functions entered by one image": len(entered),
        "circular imports": len(circular_imports()),
        "class names of several meanings": len(ambiguous_classes(paths)),
    }


def options_written() -> dict[str, list[str]]:
    """The modules in which each option of ``extract`` is written: as an identifier, as text of its own, or as a flag.

    Identifiers come from the tokens, so that a word in a comment or in a sentence does not count.
    """
    from featurepipe.extraction.extract import extract

    names = [name for name, one in inspect.signature(extract).parameters.items() if one.kind is one.KEYWORD_ONLY]
    found: dict[str, list[str]] = {name: [] for name in names}
    for path in modules():
        with path.open("rb") as file:
            tokens = list(tokenize.tokenize(file.readline))
        identifiers = {token.string for token in tokens if token.type == tokenize.NAME}
        texts = " ".join(token.string for token in tokens if token.type in TEXTS)
        for name in names:
            flag = name.replace("_", "-")
            if name in identifiers or re.search(rf"""["'`]{name}["'`]|--{flag}(?![\w-])""", texts):
                found[name].append(str(path.relative_to(PACKAGE)))
    return found


def above(figures: Mapping[str, Any], limits: Mapping[str, float]) -> list[str]:
    """A line for each figure above its limit."""
    return [f"{name}: {figures[name]}, at most {most}" for name, most in limits.items() if figures[name] > most]


def main() -> int:
    """Prints the figures; with ``--check``, exit code 1 if one is above its limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "--detail", action="store_true", help="name circular imports, ambiguous classes, and the files entered"
    )
    parser.add_argument("--check", action="store_true", help="exit code 1 if a figure is above its limit")
    parser.add_argument(
        "--options", action="store_true", help="count in how many files each option is written, instead"
    )
    arguments = parser.parse_args()
    if arguments.options:
        for name, where in sorted(options_written().items(), key=lambda found: -len(found[1])):
            print(f"{name:16}{len(where):>4}  {' '.join(where)}")
        return 0
    entered = entered_by_one_image()
    figures = measured(entered)
    if arguments.json:
        print(json.dumps(figures, indent=1))
    else:
        for name, value in figures.items():
            target = f"   target: at most {TARGETS[name]}" if name in TARGETS else ""
            print(f"{name:34}{value:>8}{target}")
    if arguments.detail:
        for importer, imported in circular_imports():
            print(f"circular: {importer} -> {imported}")
        for name, where in ambiguous_classes(modules()).items():
            print(f"class {name}: {', '.join(where)}")
        for file, functions in sorted(Counter(file for file, _ in entered).items()):
            print(f"entered: {Path(file).relative_to(PACKAGE)}, {functions} functions")
    missed = above(figures, LIMITS) if arguments.check else []
    for line in missed:
        print(line, file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
