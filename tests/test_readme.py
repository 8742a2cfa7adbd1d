"""The README and the pages for users are true: examples run, tables are the parser's, links lead somewhere."""

import argparse
import gzip
import json
import re
import shlex
import signal
import socket
import struct
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
from PIL import Image

from featurepipe.backbones.pooling import POOLINGS
from featurepipe.cli import build_parser
from featurepipe.store.labels import read_labels
from tests.conftest import DASK, FORKED_WORKERS, MAIN

ROOT = Path(__file__).parents[1]
DOCS = sorted(path for path in (ROOT / "docs").rglob("*.md") if "decisions" not in path.parts)
GUIDES = ("README.md", *(path.relative_to(ROOT).as_posix() for path in DOCS), "pipelines/README.md")
PROSE = (*GUIDES, "CONTRIBUTING.md", "CHANGELOG.md", "featurepipe/data/README.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in PROSE}
WITH_SCRIPTS = ("docs/equality.md", "docs/intervals.md", "docs/removing-images.md", "pipelines/README.md")
"""Pages that name options of scripts as well."""
TRAIN, TEST = 40, 20  # of the bundled images, so that the examples take seconds
OWN = 8  # images of each class in the folder of one's own
FEW_FITS = "--folds 2 --seeds 1 --jobs 1"  # of a comparison of layers, instead of 15 for each


def fence(page: str, heading: str, language: str, number: int = 0) -> str:
    """A code block of a page, below a heading."""
    section = re.split(rf"^##? {re.escape(heading)}\n", TEXTS[page], flags=re.MULTILINE)[1].split("\n## ", 1)[0]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    return [text for kind, text in blocks if kind == language][number]


def run_lines(lines: Iterable[str], cli: Callable, cwd: Path) -> None:
    for line in lines:
        finished = cli(*shlex.split(line)[1:], cwd=cwd)
        assert finished.code == 0, (line, finished.err)


def write_idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes()))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``featurepipe/data`` as in a checkout, only with fewer images."""
    folder = tmp_path_factory.mktemp("checkout")
    data = folder / "featurepipe" / "data"
    data.mkdir(parents=True)
    for split, count in (("train", TRAIN), ("t10k", TEST)):
        for kind, header, shape in (("images-idx3-ubyte", 16, (-1, 28, 28)), ("labels-idx1-ubyte", 8, (-1,))):
            name = f"{split}-{kind}.gz"
            whole = gzip.decompress((ROOT / "featurepipe" / "data" / name).read_bytes())[header:]
            write_idx(data / name, np.frombuffer(whole, np.uint8).reshape(shape)[:count])
    return folder


@pytest.fixture(scope="module")
def python_output(checkout: Path, launcher) -> str:
    """What the Python example prints."""
    finished = launcher.start(fence("README.md", "In Python", "python"), cwd=checkout).wait()
    assert finished.code == 0, finished.err
    return finished.out


def test_python_example_prints_a_held_out_accuracy(python_output: str) -> None:
    accuracy = float(python_output.splitlines()[1])
    shown = fence("README.md", "In Python", "").splitlines()
    assert python_output.splitlines()[0] == shown[0].replace("1600", str(TRAIN))
    assert 0.85 <= float(shown[1]) <= 0.89  # with all 2,000 images
    assert accuracy * TEST == pytest.approx(round(accuracy * TEST))  # a share of the held-out images
    assert accuracy >= 0.3  # three times chance, from four images per class


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``photos/cat``, ``photos/dog`` and ``new-photos``."""
    folder = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    for name, colour, count in (("photos/cat", 40, OWN), ("photos/dog", 190, OWN), ("new-photos", 40, 2)):
        (folder / name).mkdir(parents=True)
        for number in range(1, count + 1):
            pixels = rng.integers(colour, colour + 40, (60, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.jpg")
    return folder


def test_images_of_ones_own(own: Path, cli: Callable) -> None:
    heading = "Your own images"
    lines = fence("README.md", heading, "sh").splitlines()
    run_lines([line for line in lines if " depth " not in line], cli, own)  # which takes longer: below
    predicted = (own / "predictions.csv").read_text(encoding="utf-8").splitlines()
    assert [line.split(",")[:2] for line in predicted[1:]] == [['"1.jpg"', '"cat"'], ['"2.jpg"', '"cat"']]
    assert (own / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


@pytest.mark.slow
def test_a_job_and_python_on_images_of_ones_own(own: Path, cli: Callable, launcher) -> None:
    heading = "Your own images"
    job = fence("README.md", heading, "toml")
    assert job == fence("pipelines/README.md", "Pipelines", "toml")
    (own / "job.toml").write_text(job, encoding="utf-8")
    run_lines(fence("README.md", heading, "sh", 1).splitlines(), cli, own)
    assert (own / "nightly-bundle").is_dir()

    for heading, printed in (
        ("From images, in scikit-learn's pipelines", "{'logisticregression__C': 0.01} 1.0\n"),
        ("Bundles", "['cat'] ['cat' 'dog']\n"),
    ):
        finished = launcher.start(fence("docs/python.md", heading, "python"), cwd=own).wait()
        assert (finished.code, finished.out) == (0, printed), finished.err
    groups = fence("docs/python.md", "Groups, several labels, numbers", "python")
    quick = groups.replace('"efficientnet_lite0"', '"lenet5", weights="none"')
    finished = launcher.start(quick, cwd=own).wait()
    assert finished.code == 0, finished.err
    assert [line.split()[0] for line in finished.out.splitlines()] == ["numbers", "labels"]


def test_examples_of_tables_can_be_read(tmp_path: Path, cli: Callable) -> None:
    (tmp_path / "m.csv").write_text(fence("docs/images.md", "Columns of a manifest", ""), encoding="utf-8")
    (tmp_path / "images").mkdir()
    for name in ("1", "2"):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{name}.jpg")
    lenet = ("--store", "s", "--backbone", "lenet5", "--weights", "none")
    extracted = cli("extract", "m.csv", *lenet, "--json", cwd=tmp_path).json()
    assert extracted["listing"]["splits"] == {"test": 1, "train": 1}
    assert (extracted["listing"]["labelled"], extracted["listing"]["ignored"]) == (2, [])

    table = fence("docs/images.md", "Labels of your own", "")
    assert [line.partition(",")[0] for line in table.splitlines()] == ["id", "cat/1.jpg", "cat/2.jpg"]
    (tmp_path / "labels.csv").write_text(table, encoding="utf-8")
    assert read_labels(tmp_path / "labels.csv").labels.to_pylist() == ["tabby", "siamese"]


@pytest.mark.slow
def test_depth_on_images_of_ones_own(own: Path, cli: Callable) -> None:
    (line,) = [one for one in fence("README.md", "Your own images", "sh").splitlines() if " depth " in one]
    run_lines([f"{line} {FEW_FITS}"], cli, own)
    assert (own / "depth.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


@pytest.mark.slow
def test_networks_page(tmp_path: Path, cli: Callable) -> None:
    run_lines(fence("docs/networks.md", "Networks, weights, nodes and poolings", "sh").splitlines(), cli, tmp_path)


def test_every_pooling_is_explained() -> None:
    assert [pooling for pooling in POOLINGS if f"`{pooling}`" not in TEXTS["docs/networks.md"]] == []


@pytest.fixture(scope="module")
def shell_results(checkout: Path, python_output: str, launcher) -> dict[str, str]:
    """What each command of the example in the shell prints, but for depth, which takes as long as all others."""
    assert python_output  # it has run before, as in the README
    results = {}
    for words in shell_commands():
        if words[1] == "depth":
            continue
        finished = launcher.start(MAIN, words[1:], checkout).wait()
        assert finished.code == 0, (words, finished.err)
        results[words[1]] = finished.out
    return results


def shell_commands() -> list[list[str]]:
    return [shlex.split(line) for line in fence("docs/commands.md", "From images to predictions", "sh").splitlines()]


def test_shell_example(checkout: Path, shell_results: dict[str, str], cli: Callable) -> None:
    commands, results = shell_commands(), shell_results
    assert [words[0] for words in commands] == ["featurepipe"] * 9
    assert re.search(r"^blocks\.10\.add +112x14x14 .* blocks\.10$", results["nodes"], re.MULTILINE)
    assert f"{TRAIN + TEST} images listed, {TRAIN + TEST} computed" in results["extract"]
    assert "blocks.10:gap" in results["info"]
    assert "bottleneck" in results["info"]
    assert "on the 20 test images:" in results["train"]
    assert f"{TEST:,} images" in results["evaluate"]
    labelled = (checkout / "predictions.csv").read_text(encoding="utf-8").splitlines()
    assert len(labelled) == 1 + TRAIN + TEST
    assert "everything is as it was committed" in results["verify"]
    with np.load(checkout / "clothes.npz") as exported:
        assert exported["X"].shape == (TRAIN + TEST, 1280)
        assert min(exported["ids"].tolist()) == "test/000000"

    again = cli(*commands[1][1:], "--json", cwd=checkout)
    assert again.json()["counts"]["computed"] == 0


@pytest.mark.slow
@pytest.mark.usefixtures("shell_results")
def test_what_was_recommended_can_be_trained_and_shown(checkout: Path, cli: Callable) -> None:
    (line,) = [words for words in shell_commands() if words[1] == "depth"]
    compared = cli(*line[1:], *FEW_FITS.split(), cwd=checkout)
    assert compared.code == 0, compared.err
    assert compared.out.startswith("recommended: ")
    assert (checkout / "depth.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    run_lines(fence("docs/depth.md", "Which layer transfers best?", "sh").splitlines(), cli, checkout)
    assert "recommended-bundle" in (checkout / "bundle.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_three_terminals(checkout: Path, cli: Callable, launcher) -> None:
    """As in the README, but for the port, which another scheduler may have."""
    page, heading, port = "docs/cluster.md", "When one machine is not enough", free_port()
    lines = [fence(page, heading, "sh", number).replace("8786", port) for number in range(3)]
    background = [*shlex.split(lines[0]), "--port", port, "--no-dashboard"], shlex.split(lines[1])
    with ExitStack() as ended:
        for _, role, *options in background:
            process = launcher.start(
                dedent(FORKED_WORKERS) + dedent(DASK.format(role=role)), options, checkout, seconds=0
            )
            ended.callback(process.wait)
            ended.callback(process.send, signal.SIGTERM)
        outputs = []
        for line in lines[2].splitlines():
            finished = cli(*shlex.split(line)[1:], cwd=checkout)
            assert finished.code == 0, (line, finished.err)
            outputs.append(finished.out)
        assert f"{TRAIN + TEST} images listed" in outputs[0]
        assert f"on the {TEST} test images:" in outputs[1]
        labelled = (checkout / "predictions.csv").read_text(encoding="utf-8").splitlines()
        assert len(labelled) == 1 + TRAIN + TEST
        code = fence(page, heading, "python").replace("8786", port)
        finished = launcher.start(code, cwd=checkout).wait()
        assert finished.code == 0, finished.err


def free_port() -> str:
    """A port on loopback that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def subcommands() -> dict[str, argparse.ArgumentParser]:
    action = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def summaries() -> dict[str, str]:
    action = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return {choice.dest: choice.help for choice in action._choices_actions}


def table() -> dict[str, tuple[str, str]]:
    """From the page of commands: command name -> (usage, summary)."""
    rows = re.findall(r"^\| `featurepipe (\S+)(.*?)` \| (.*) \|$", TEXTS["docs/commands.md"], re.MULTILINE)
    return {name: (usage.strip(), summary) for name, usage, summary in rows}


def test_table_of_commands_is_the_parsers() -> None:
    assert {name: summary for name, (_, summary) in table().items()} == summaries()
    assert list(table()) == list(subcommands())


@pytest.mark.parametrize("name", list(subcommands()))
def test_usage_in_the_table_is_what_the_parser_requires(name: str) -> None:
    required = []
    for action in subcommands()[name]._actions:
        if not action.option_strings:
            optional = {"?": f"[{action.metavar}]", "*": f"[{action.metavar} ...]"}
            required += optional.get(str(action.nargs), action.metavar).split()
        elif action.required:
            required += [action.option_strings[-1], action.metavar.partition("[")[0]]
    assert table()[name][0].split() == required


def test_options_named_in_the_prose_exist() -> None:
    known = {option for parser in subcommands().values() for option in parser._option_string_actions}
    text = "\n".join(TEXTS[page] for page in GUIDES if page not in WITH_SCRIPTS)
    ours = re.sub(r"\bdask (?:scheduler|worker)[^`\n]*", "", text)  # Dask's commands have options of their own
    ours = re.sub(r"\btorchrun --nproc-per-node", "", ours)  # as has PyTorch's
    ours = re.sub(r"\b(?:rsync|rsvg-convert) [^`\n]*", "", ours)
    ours = re.sub(r"`--index-url`|--shell fish", "", ours)  # of pip, of argcomplete
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", ours))
    assert named
    assert named <= known


@pytest.mark.parametrize("name", PROSE)
def test_links_lead_somewhere(name: str) -> None:
    text, folder = TEXTS[name], (ROOT / name).parent
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    paths = re.findall(r"`((?:featurepipe|tests|tools|images|store|backbones|pipelines|heads)/[\w./-]+)`", text)
    roots = (ROOT, ROOT / "featurepipe")
    missing = [link for link in links if not (folder / link).exists()]
    missing += [
        path for path in paths if path != "pipelines/out/" and not any((root / path).exists() for root in roots)
    ]
    assert missing == []


def test_the_readme_is_short_and_leads_to_the_documentation() -> None:
    """From its first page the tables of contents lead to all others: the site's build says which they leave out."""
    assert len(TEXTS["README.md"].split()) <= 800
    parts = ("index", "start", "jobs", "howto/index", "concepts", "reference")
    assert [part for part in parts if f"(docs/{part}.md)" not in TEXTS["README.md"]] == []


def test_figures_are_those_that_were_measured() -> None:
    def result(name: str) -> dict:
        return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))

    fast, exact = result("bench_extract")["results"]
    rerun, heads = result("bench_rerun"), result("bench_heads")
    for page in ("README.md", "docs/guarantees.md"):
        text = " ".join(TEXTS[page].split())
        assert f"{fast['ours_img_s']:.0f} images/s" in text
        assert f"{exact['ours_img_s']:.0f} " in text
        assert f"{fast['script_img_s']:.0f} to {exact['script_img_s']:.0f} " in text
        assert f"{rerun['rerun_s']:.1f} s" in text
        assert f"{rerun['whole_command_s']:.1f} s" in text
        assert f"{heads['our_seconds']:.0f} s" in text
        assert f"{heads['their_seconds']:.0f} s" in text
