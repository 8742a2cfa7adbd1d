"""The README is true: its examples run, its table is the parser's, its links lead somewhere."""

import argparse
import gzip
import re
import shlex
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featurepipe.cli import build_parser
from tests.conftest import MAIN

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROSE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "featurepipe/data/README.md")
TRAIN, TEST = 40, 20  # of the bundled images, so that the examples take seconds


def fence(heading: str, language: str, number: int = 0) -> str:
    """A code block below a heading."""
    section = README.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)[number]


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
    finished = launcher.start(fence("In Python", "python"), cwd=checkout).wait()
    assert finished.code == 0, finished.err
    return finished.out


def test_python_example_prints_a_held_out_accuracy(python_output: str) -> None:
    accuracy = float(python_output)
    assert accuracy * TEST == pytest.approx(round(accuracy * TEST))  # a share of the held-out images
    assert accuracy >= 0.3  # three times chance, from four images per class


def test_python_example_from_images(checkout: Path, launcher) -> None:
    rng = np.random.default_rng(0)
    for name, colour in (("cat1", 40), ("cat2", 60), ("dog1", 190), ("dog2", 210)):
        Image.fromarray(rng.integers(colour, colour + 40, (60, 80, 3), dtype=np.uint8)).save(checkout / f"{name}.jpg")
    code = fence("In Python", "python", 1) + "print(*search.predict(images), search.best_score_)"
    finished = launcher.start(code, cwd=checkout).wait()
    assert finished.code == 0, finished.err
    assert finished.out == "cat cat dog dog 1.0\n"


@pytest.fixture(scope="module")
def shell_results(checkout: Path, python_output: str, launcher) -> dict[str, str]:
    """What each command of the example in the shell prints."""
    assert python_output  # it has run before, as in the README
    results = {}
    for words in shell_commands():
        finished = launcher.start(MAIN, words[1:], checkout).wait()
        assert finished.code == 0, (words, finished.err)
        results[words[1]] = finished.out
    return results


def shell_commands() -> list[list[str]]:
    return [shlex.split(line) for line in fence("In the shell", "sh").splitlines()]


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
    assert results["depth"].startswith("recommended: ")
    assert (checkout / "depth.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert "everything is as it was committed" in results["verify"]
    with np.load(checkout / "clothes.npz") as exported:
        assert exported["X"].shape == (TRAIN + TEST, 1280)
        assert min(exported["ids"].tolist()) == "test/000000"

    again = cli(*commands[1][1:], "--json", cwd=checkout)
    assert again.json()["counts"]["computed"] == 0


@pytest.mark.usefixtures("shell_results")  # where they are compared
def test_what_was_recommended_can_be_trained_and_shown(checkout: Path, cli: Callable) -> None:
    for line in fence("Which layer transfers best?", "sh").splitlines():
        finished = cli(*shlex.split(line)[1:], cwd=checkout)
        assert finished.code == 0, (line, finished.err)
    assert "recommended-bundle" in (checkout / "bundle.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_three_terminals(checkout: Path, cli: Callable, launcher) -> None:
    """As in the README, but for the port, which another scheduler may have."""
    heading, port = "When one machine is not enough", free_port()
    lines = [fence(heading, "sh", number).replace("8786", port) for number in range(3)]
    background = [*shlex.split(lines[0]), "--port", port, "--no-dashboard"], shlex.split(lines[1])
    with ExitStack() as ended:
        for words in background:
            with (checkout / f"{words[1]}.log").open("wb") as log:
                command = [sys.executable, "-P", "-m", f"distributed.cli.dask_{words[1]}", *words[2:]]
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=checkout)
            ended.callback(process.wait)
            ended.callback(process.terminate)
        outputs = []
        for line in lines[2].splitlines():
            finished = cli(*shlex.split(line)[1:], cwd=checkout)
            assert finished.code == 0, (line, finished.err)
            outputs.append(finished.out)
        assert f"{TRAIN + TEST} images listed" in outputs[0]
        assert f"on the {TEST} test images:" in outputs[1]
        labelled = (checkout / "predictions.csv").read_text(encoding="utf-8").splitlines()
        assert len(labelled) == 1 + TRAIN + TEST
        code = fence(heading, "python").replace("8786", port)
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
    """From the README: command name -> (usage, summary)."""
    rows = re.findall(r"^\| `featurepipe (\S+)(.*?)` \| (.*) \|$", README, re.MULTILINE)
    return {name: (usage.strip(), summary) for name, usage, summary in rows}


def test_table_of_commands_is_the_parsers() -> None:
    assert {name: summary for name, (_, summary) in table().items()} == summaries()
    assert list(table()) == list(subcommands())


@pytest.mark.parametrize("name", list(subcommands()))
def test_usage_in_the_table_is_what_the_parser_requires(name: str) -> None:
    required = []
    for action in subcommands()[name]._actions:
        if not action.option_strings:
            required.append(f"[{action.metavar}]" if action.nargs == "?" else action.metavar)
        elif action.required:
            required += [action.option_strings[-1], action.metavar.partition("[")[0]]
    assert table()[name][0].split() == required


def test_options_named_in_the_prose_exist() -> None:
    known = {option for parser in subcommands().values() for option in parser._option_string_actions}
    ours = re.sub(r"\bdask (?:scheduler|worker)[^`\n]*", "", README)  # Dask's commands have options of their own
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", ours))
    assert named
    assert named <= known


@pytest.mark.parametrize("name", PROSE)
def test_links_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    paths = re.findall(r"`((?:featurepipe|tests|tools|images|store|backbones|pipelines|heads)/[\w./-]+)`", text)
    roots = (ROOT, ROOT / "featurepipe")
    missing = [path for path in links + paths if not any((root / path).exists() for root in roots)]
    assert missing == []
