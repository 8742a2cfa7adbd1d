"""The command line: exit codes, one JSON document, errors in words."""

import gc
import io
import json
import re
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from sklearn.model_selection import ParameterGrid

from featurepipe.cli import build_parser, main
from featurepipe.cli.parser import COMMANDS as COMMANDS_BY_JOB
from featurepipe.cli.parser import sections
from featurepipe.option_groups import ANSWER, LEARNING, LIMITS, MACHINE, NETWORK, PURPOSES, READING, ROWS
from tests.conftest import MAIN

COMMANDS = ("demo", "backbones", "nodes", "extract", "info", "verify", "compact", "gc", "export", "doctor")
SMALL = ("--backbone", "lenet5", "--weights", "none", "--precision", "fp32", "--workers", "1")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli") / "digits"
    for number in range(6):
        path = root / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 20, 3), np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def filled(images, launcher, tmp_path_factory):
    """A store with one dataset, made by the command line."""
    store = tmp_path_factory.mktemp("cli") / "store"
    code = "import sys; from featurepipe.cli import main; sys.exit(main())"
    assert launcher.start(code, ["extract", images, "--store", store, *SMALL]).wait().code == 0
    return store


def test_garbage_is_searched_for_less_often_only_while_a_command_runs(monkeypatch, tmp_path):
    usual, found = gc.get_threshold(), []
    monkeypatch.setattr("featurepipe.cli._run", lambda _: found.append(gc.get_threshold()) or 3)
    gc.set_threshold(700, 10, 10)
    try:
        assert main(["info", str(tmp_path)]) == 3
        assert found == [(50_000, 10, 10)]
        assert gc.get_threshold() == (700, 10, 10)
    finally:
        gc.set_threshold(*usual)


def one_document(finished):
    """Standard output as its one JSON document; ``json.loads`` refuses anything before or after it."""
    assert "Traceback" not in finished.err
    return json.loads(finished.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def parsers():
    (group,) = (action for action in build_parser()._actions if hasattr(action, "choices") and action.choices)
    return group.choices


def test_every_command_exists_and_has_help(capsys):
    assert set(COMMANDS) <= set(parsers())
    for name, parser in parsers().items():
        with pytest.raises(SystemExit) as end:
            main([name, "--help"])
        assert end.value.code == 0
        text = capsys.readouterr().out
        assert f"usage: featurepipe {name}" in text
        assert len(parser.description) > 20
        undocumented = [a.option_strings or a.dest for a in parser._actions if not a.help and a.option_strings]
        assert undocumented == []


def test_every_command_has_its_function():
    for name, parser in parsers().items():
        assert callable(parser.get_default("run")), name


def test_the_help_lists_every_command_once_under_its_job(capsys):
    assert main([]) == 2
    listed = re.findall(r"^    (\w+) ", capsys.readouterr().out.partition("commands:")[2], re.MULTILINE)
    assert listed == [name for commands in COMMANDS_BY_JOB.values() for name in commands] == list(parsers())
    assert {name: parser.description for name, parser in parsers().items()} == {
        name: summary for commands in COMMANDS_BY_JOB.values() for name, (_, summary) in commands.items()
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["info", "STORE", "--jsno"],
            "featurepipe info: error: unrecognized arguments: --jsno; nearest to --jsno: --json",
        ),
        (
            ["info", "STORE", "--qqqqqqqq"],
            "featurepipe info: error: unrecognized arguments: --qqqqqqqq. See: featurepipe info --help\n",
        ),
        (["train", "DIR", "--ouut=x"], "required: --out; nearest to --ouut: --out"),
        (["extract", "DIR", "--stor", "x"], "unrecognized arguments: --stor x; nearest to --stor: --store. See: "),
        (["train", "DIR", "--o=x"], "required: --out; nearest to --o: --out, --ordered. See: featurepipe train --help"),
        (["info", "STORE", "--", "--jso"], "unrecognized arguments: --jso. See: featurepipe info --help"),
        (["exprt"], "featurepipe: error: unknown command 'exprt'; nearest: export"),
        (["--vresion"], "featurepipe: error: unrecognized arguments: --vresion; nearest to --vresion: --version"),
    ],
)
def test_what_is_misspelt_is_told_with_what_is_nearest(capsys, words, said):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert len(shown.splitlines()) == 1  # and not the usage, which hides it
    assert shown.count("See: ") == 1


def test_no_option_may_be_cut_short():
    assert not any(parser.allow_abbrev for parser in (build_parser(), *parsers().values()))


def test_no_command_prints_help_and_is_wrong_usage(capsys):
    assert main([]) == 2
    assert "exit codes:" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert re.fullmatch(r"featurepipe \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize("command", [name for names in COMMANDS_BY_JOB.values() for name in names])
def test_a_long_help_has_each_option_once_under_what_it_is_for(command):
    parser = next(action for action in build_parser()._actions if action.choices).choices[command]
    parts = sections(parser)
    shown = [action.dest for _, actions in parts for action in actions]
    assert sorted(shown) == sorted(action.dest for action in parser._actions)
    titles = [title for title, _ in parts if title != "positional arguments"]
    options = sum(bool(action.option_strings) for action in parser._actions)
    assert (titles[1:] != []) == (options > 20)
    assert titles == ["options", *(purpose for purpose in PURPOSES if purpose in titles)]
    assert all(len(actions) <= 24 for _, actions in parts)
    assert [line for line in parser.format_help().splitlines() if line in {f"{title}:" for title, _ in parts}] == [
        f"{title}:" for title, _ in parts
    ]


def test_options_that_commands_share_stand_under_the_same_title():
    choices = next(action for action in build_parser()._actions if action.choices).choices
    for name, title in {"label": ROWS, "dataset": ROWS, "box": READING, "cluster": MACHINE, "to": ANSWER}.items():
        assert name in [action.dest for action in dict(sections(choices["labels"]))[title]]
    assert [action.dest for action in dict(sections(choices["labels"]))["options"]] == [
        "help", "folds", "limit", "seed", "dry_run", "quiet", "json"
    ]  # fmt: skip
    tuned = dict(sections(choices["finetune"]))
    assert "dataset" in [action.dest for action in tuned[ROWS]]  # which it says in words of its own
    assert {"rate", "epochs"} <= {action.dest for action in tuned[LEARNING]}
    assert {"max_rejects", "damaged"} <= {action.dest for action in tuned[LIMITS]}
    assert {"precision", "dtype"} <= {action.dest for action in tuned[NETWORK]}


def test_extract_says_what_it_did(cli, images, tmp_path):
    store = tmp_path / "store"
    finished = cli("extract", images, "--store", store, *SMALL, "--node", "c3", "--node", "bottleneck:gap")
    assert finished.code == 0
    assert "digits: 6 images listed, 6 computed, 0 known, 0 rejected" in finished.out
    assert re.search(r"c3:gap computed for 6; bottleneck \(f6.1:gap\) computed for 6", finished.out)
    assert re.search(r"done in [\d.]+ s, too short", finished.out)
    assert re.search(
        r"^new feature space lenet5-\w+: precision fp32, dtype float16, decode cpu", finished.err, re.MULTILINE
    )
    again = cli("extract", images, "--store", store, *SMALL, "--node", "c3", "--quiet")
    assert (again.code, again.err) == (0, "")
    assert "6 images listed, 0 computed, 6 known, 0 rejected" in again.out


def test_extract_json(cli, images, tmp_path):
    finished = cli("extract", images, "--store", tmp_path / "store", *SMALL, "--json")
    record = one_document(finished)
    assert record["status"] == "done"
    assert record["counts"] == {"listed": 6, "computed": 6, "known": 0, "rejected": 0, "read": 6}
    (path,) = (tmp_path / "store/runs").iterdir()
    assert json.loads(path.read_text()) == record


def test_exit_codes_for_rejects(cli, images, tmp_path):
    (tmp_path / "some").symlink_to(images)
    manifest = tmp_path / "list.csv"
    (tmp_path / "bad.png").write_bytes(b"bad")
    manifest.write_text(
        "path\n" + "".join(f"{path}\n" for path in [*sorted(images.rglob("*.png")), tmp_path / "bad.png"])
    )
    arguments = ("extract", manifest, "--store", tmp_path / "store", *SMALL)
    too_many = cli(*arguments, "--json")
    assert (too_many.code, too_many.out) == (4, "")
    assert "1 of 7 images were rejected, more than --max-rejects 1% allows" in too_many.err
    assert "To go on without these images: --max-rejects 1. All reasons: " in too_many.err
    untrained = cli("train", tmp_path / "store", "--out", tmp_path / "bundle")
    assert "holds no dataset yet: featurepipe extract makes one when it completes. Its runs so far: " in untrained.err
    assert cli(*arguments, "--max-rejects", "0").code == 4
    done = cli(*arguments, "--max-rejects", "15%", "--json")
    assert done.code == 3
    assert one_document(done)["reject_reasons"] == {"not-an-image": 1}
    assert "rejected: 1 not-an-image" in cli(*arguments, "--max-rejects", "1").out


def test_dry_run(cli, images, tmp_path):
    found = cli("extract", images, "--store", tmp_path / "store", *SMALL, "--dry-run")
    assert found.code == 0
    assert "6 to read (at most 6 new ones" in found.out
    assert re.search(r"about (a second|[\d:]+ (s|min)) at [\d,.]+ img/s, from a timed sample of 6 images", found.out)
    assert "f6.1:gap: 1.0 kB" in found.out
    assert "dry run: nothing was changed" in found.out
    assert not (tmp_path / "store").exists()
    estimate = one_document(cli("extract", images, "--store", tmp_path / "store", *SMALL, "--dry-run", "--json"))
    assert estimate["bytes_per_column"] == {"f6.1:gap": 6 * 84 * 2}


@pytest.mark.parametrize("name", ["info", "verify", "compact", "gc"])
def test_store_commands_print_text_or_one_document(cli, filled, name):
    text = cli(name, filled)
    assert text.code == 0
    assert text.out.strip()
    found = one_document(cli(name, filled, "--json"))
    assert isinstance(found, dict)


def test_export(cli, filled, tmp_path):
    found = cli("export", filled, "--node", "bottleneck", "--to", tmp_path / "all.npz", "--json")
    assert one_document(found)["rows"] == 6
    with np.load(tmp_path / "all.npz", allow_pickle=False) as arrays:
        assert arrays["X"].shape == (6, 84)
        assert sorted(arrays["ids"].tolist()) == sorted(f"{'ab'[n % 2]}/{n}.png" for n in range(6))
    by_default = one_document(cli("export", filled, "--to", tmp_path / "same.npz", "--json"))
    assert by_default["column"] == one_document(found)["column"] != ""
    assert " float16 of bottleneck (f6.1:gap), " in cli("export", filled, "--to", tmp_path / "same.npz").out


def test_backbones_and_nodes(cli, launcher):
    few = "import featurepipe.backbones.loading as module; module.classification_names = lambda: ['alexnet', 'resnet50']; "
    backbones = one_document(launcher.start(few + MAIN, ["backbones", "--json"]).wait())  # all: tests/backbones
    assert len(backbones) == len({info["name"] for info in backbones}) >= 4
    by_name = {info["name"]: info for info in backbones}
    assert by_name["lenet5"]["bottleneck_width"] == 84
    assert by_name["resnet50"]["bottleneck_width"] == 2048
    found = one_document(cli("nodes", "lenet5", "--json"))
    assert found["bottleneck"] == "f6.1"
    shapes = {node["name"]: (node["shape"], node["width"]) for node in found["nodes"]}
    assert shapes["c3.1"] == ([16, 10, 10], 16)
    text = cli("nodes", "lenet5")
    assert re.search(r"^c3\.1 +16x10x10 +16 ", text.out, re.MULTILINE)


MISTAKES = {
    "backbone": (
        ["extract", "IMAGES", "--store", "NEW", "--backbone", "resnet5"],
        2,
        r"unknown backbone 'resnet5'; nearest: resnet50",
    ),
    "node": (
        ["extract", "IMAGES", "--store", "NEW", *SMALL, "--node", "c33"],
        2,
        r"unknown node 'c33' in lenet5; nearest: c3",
    ),
    "weights": (
        ["extract", "IMAGES", "--store", "NEW", "--backbone", "resnet50", "--weights", "V9"],
        2,
        "unknown weights 'V9'",
    ),
    "pooling": (["extract", "IMAGES", "--store", "NEW", *SMALL, "--node", "c3:best"], 2, "unknown pooling 'best'"),
    "batch": (["extract", "IMAGES", "--store", "NEW", *SMALL, "--batch-size", "0"], 2, "--batch-size '0' must be"),
    "precision": (
        ["extract", "IMAGES", "--store", "NEW", *SMALL, "--precision", "int8"],
        2,
        "unknown precision 'int8'",
    ),
    "source": (["extract", "nowhere", "--store", "NEW", *SMALL], 2, "nowhere: no such file or folder"),
    "store-is-file": (["extract", "IMAGES", "--store", "FILE", *SMALL], 2, "is a file, not a feature store"),
    "store-below-file": (["extract", "IMAGES", "--store", "FILE/x", *SMALL], 1, "Not a directory"),
    "no-store": (["info", "nowhere"], 2, "there is no feature store at nowhere"),
    "no-store-verify": (["verify", "nowhere"], 2, "there is no feature store at nowhere"),
    "column": (
        ["export", "STORE", "--node", "c1", "--to", "x.npz"],
        2,
        r"unknown column 'c1' in lenet5-\w+; .*f6.1:gap",
    ),
    "dataset": (
        ["export", "STORE", "--node", "bottleneck", "--dataset", "digit", "--to", "x.npz"],
        2,
        "unknown dataset 'digit'.* nearest: digits",
    ),
    "space": (
        ["export", "STORE", "--node", "bottleneck", "--backbone", "lenet", "--to", "x.npz"],
        2,
        "unknown feature space 'lenet'",
    ),
    "split": (
        ["export", "STORE", "--node", "bottleneck", "--split", "tset", "--to", "x.npz"],
        2,
        "unknown split 'tset'",
    ),
    "suffix": (["export", "STORE", "--node", "bottleneck", "--to", "x.csv"], 2, "csv"),
    "folder": (
        ["export", "STORE", "--node", "bottleneck", "--to", "not/there/x.npz"],
        2,
        "there is no folder not/there",
    ),
    "option": (
        ["extract", "IMAGES", "--store", "NEW", "--batchsize"],
        2,
        "unrecognized arguments: --batchsize; nearest to --batchsize: --batch-size",
    ),
    "missing": (["train", "STORE"], 2, "--out"),
    "command": (["extrakt"], 2, "unknown command 'extrakt'; nearest: extract"),
    "factory": (
        ["extract", "IMAGES", "--store", "NEW", "--backbone", "nowhere.net:make"],
        2,
        "no module named 'nowhere.net'",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_without_a_traceback(cli, images, filled, tmp_path, mistake):
    arguments, code, message = MISTAKES[mistake]
    (tmp_path / "file").write_text("x")
    places = {"IMAGES": images, "STORE": filled, "NEW": tmp_path / "new", "FILE": tmp_path / "file"}
    arguments = [str(places.get(a, a)).replace("FILE", str(tmp_path / "file")) for a in arguments]
    ended = cli(*arguments, "--json")
    assert ended.code == code, ended.err
    assert ended.out == ""
    assert re.search(message, ended.err), ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("name", ["nodes", "info"])  # more than a buffer holds, and less
def test_a_reader_that_leaves_is_no_error(filled, name, launcher):
    leaves = "import os; read, write = os.pipe(); os.close(read); os.dup2(write, 1); "
    done = launcher.start(leaves + MAIN, [name, filled if name == "info" else "resnet50"]).wait()
    assert "Traceback" not in done.err
    assert "BrokenPipeError" not in done.err
    assert done.code == 0


def test_json_is_printable_in_any_locale(images, tmp_path, launcher):
    """A folder name that is not ASCII on an output that takes nothing else."""
    folder = tmp_path / "größe"
    folder.symlink_to(images)
    ascii_only = "import sys; sys.stdout.reconfigure(encoding='ascii', errors='strict'); "
    done = launcher.start(
        ascii_only + MAIN, ["extract", folder, "--store", tmp_path / "s", *SMALL, "--json", "--quiet"]
    ).wait()
    assert done.code == 0, done.err
    assert done.json()["source"] == str(folder)


def test_progress_lines_say_rate_time_left_and_bottleneck():
    from featurepipe.progress import Lines

    now = [0.0]
    out = io.StringIO()
    lines = Lines(1000, "extract", out, every=5, clock=lambda: now[0])
    for second in range(1, 12):
        now[0] = float(second)
        lines.advance(10, "decode-bound")
    assert out.getvalue().splitlines() == [
        "extract: 50 of 1,000 images, 10.0 img/s, 1:35 left, decode-bound",
        "extract: 100 of 1,000 images, 10.0 img/s, 1:30 left, decode-bound",
    ]


RECORDED = [
    (13.8, 80), (50.9, 224), (83.5, 384), (115.6, 624), (154.1, 832), (199.2, 976), (236.7, 1136), (275.7, 1296), (306.7, 1472),
    (340.0, 1632), (365.7, 1792), (398.4, 1952), (407.9, 2000),
]  # fmt: skip
"""Seconds and images of an extraction with efficientnet_lite0 on two busy cores, as it was when recorded."""


def test_the_time_left_is_right_within_a_factor_of_one_and_a_half():
    from featurepipe.progress import Lines

    now, out, done = [0.0], io.StringIO(), 16
    lines = Lines(2000, "extract", out, every=5, clock=lambda: now[0])
    lines.advance(16)
    for second, images in RECORDED:
        now[0] = second
        lines.advance(images - done)
        done = images
    foretold = re.findall(r"(\d+):(\d\d) left", out.getvalue())
    assert len(foretold) == len(RECORDED)
    for (minutes, seconds), (second, _) in zip(foretold[:-1], RECORDED, strict=False):
        left = RECORDED[-1][0] - second
        assert left / 1.5 <= int(minutes) * 60 + int(seconds) <= left * 1.5, second


UNEVEN = {
    "sizes mixed": [
        (0.36, 16), (0.73, 32), (1.05, 48), (1.4, 64), (1.7, 80), (2.07, 96), (2.36, 112), (2.72, 128), (3.03, 144),
        (3.33, 160), (3.63, 176), (3.92, 192), (4.29, 208), (4.61, 224), (4.93, 240), (5.29, 256), (5.59, 272), (5.9, 288),
        (6.61, 304), (6.93, 320), (7.24, 336), (7.56, 352), (7.86, 368), (8.17, 384), (8.57, 400),
    ],
    "small ones first": [
        (0.37, 16), (0.85, 32), (1.27, 48), (1.52, 64), (1.89, 80), (2.28, 96), (2.7, 112), (3.04, 128), (3.48, 144),
        (3.93, 160), (4.39, 176), (4.79, 192), (5.15, 208), (5.63, 224), (5.99, 240), (6.36, 256), (6.77, 272), (7.24, 288),
        (7.63, 304), (8.12, 320), (8.44, 336), (8.85, 352), (9.26, 368), (9.64, 384), (10.07, 400),
    ],
    "a pause of 2.5 s": [
        (0.42, 16), (0.83, 32), (1.23, 48), (1.64, 64), (2.04, 80), (2.42, 96), (2.81, 112), (3.21, 128), (3.63, 144),
        (6.52, 160), (6.91, 176), (7.29, 192), (7.75, 208), (8.14, 224), (8.5, 240), (8.96, 256), (9.35, 272), (9.72, 288),
        (10.11, 304), (10.48, 320), (11.23, 336), (11.79, 352), (12.28, 368), (12.77, 384), (13.15, 400),
    ],
}  # fmt: skip
"""The same of 400 noisy JPEGs: of 60, 400 and 1,600 pixels; 200 of 60, then 200 of 900; as the first, stopped after 3.6 s."""


@pytest.mark.parametrize("name", UNEVEN)
def test_the_time_left_of_uneven_extractions_is_right_within_a_factor_of_one_and_a_half(name):
    """Within one second of rounding more. What nobody can foresee, a pause, counts from when it is over."""
    from featurepipe.progress import Lines

    now, out, done, told = [0.0], io.StringIO(), 0, []
    lines = Lines(400, "extract", out, every=0.9, clock=lambda: now[0])
    for second, images in UNEVEN[name]:
        now[0] = second
        lines.advance(images - done)
        done, before = images, len(told)
        told += re.findall(r"(\d+):(\d\d) left", out.getvalue())[before:]
        if len(told) == before or (name == "a pause of 2.5 s" and second < 6.52):
            continue
        left, foretold = UNEVEN[name][-1][0] - second, int(told[-1][0]) * 60 + int(told[-1][1])
        assert left / 1.5 - 1 <= foretold <= left * 1.5 + 1, second
    assert len(told) >= 7


FITS = {
    "ridge": (2.697, 0.320, 0.126, 1.080),
    "logistic": (0.597, 1.439, 0.615, 6.783),
    "rbf-svm": (0.456, 1.324, 0.386, 13.170),
}
"""Processor seconds of fits on 1,000, 3,000, again 1,000, and 12,000 images of Fashion-MNIST, 1,280 values each, as recorded."""


@pytest.mark.parametrize("family", FITS)
def test_the_time_of_a_fit_is_right_within_a_factor_of_one_and_a_half(monkeypatch, family):
    from featurepipe.heads.families import families_for
    from featurepipe.training import cost

    first, large, small, whole = FITS[family]
    left, now = {1000: [small, first], 3000: [large]}, [0.0]

    def fit(rows):
        now[0] += left[rows].pop()

    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    foretold = cost.time_of(fit, 12_000, steepest=families_for("multiclass")[family].time_exponent)
    assert whole / 1.5 <= foretold <= whole * 1.5


TUNED = {
    ("logistic", 7): ((960, 0.088, 0.573), (1516, 0.134, 0.966), (3200, 0.554, 2.974), (9600, 2.111, 13.502)),
    ("linear-svm", 7): ((960, 1.85, 11.173), (1222, 3.19, 28.41), (1516, 3.458, 23.421), (3200, 8.385, 54.206)),
    ("ridge", 8): ((960, 0.036, 0.287), (1516, 0.068, 0.550), (3200, 0.132, 1.077), (9600, 0.342, 2.786)),
    ("lda", 6): ((960, 0.583, 3.459), (1516, 0.539, 3.513), (3200, 0.678, 4.197), (9600, 1.069, 7.273)),
    ("knn", 12): ((960, 0.027, 0.306), (1516, 0.047, 0.577), (3200, 0.171, 2.095), (9600, 1.701, 19.248)),
    ("centroid", 5): ((960, 0.017, 0.077), (1516, 0.034, 0.150), (3200, 0.064, 0.284), (9600, 0.165, 1.012)),
    ("rbf-svm", 12): ((960, 0.101, 1.331), (1516, 0.158, 2.053), (3200, 0.516, 6.744), (8000, 2.107, 29.828)),
    ("xgboost", 4): ((960, 8.616, 27.163), (1516, 16.058, 51.894)),
}
"""Processor seconds by head and sets of parameters: training images of a fold, a fit with the sets that `few_fits` takes, and the
fits with all sets, with what tests them, as recorded on 1,280 values of Fashion-MNIST and (1,222 and 1,516 images) of emoji.
Smaller fits took less than a second."""


@pytest.mark.parametrize(("head", "sets"), TUNED)
def test_the_time_of_a_search_is_right_within_a_factor_of_one_and_a_half(monkeypatch, head, sets):
    from featurepipe.heads.families import HEADS
    from featurepipe.training import cost

    assert len(ParameterGrid(dict(HEADS[head].grid))) == sets
    now = [0.0]
    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    for rows, one, whole in TUNED[head, sets]:

        def fit(count, rows=rows, one=one):
            now[0] += one if count == rows else 0.7

        foretold = sets * cost.time_of(fit, rows, steepest=HEADS[head].time_exponent, whole=True)
        assert whole / 1.5 <= foretold <= whole * 1.5, rows


def test_a_fit_of_a_search_that_takes_long_is_foretold_from_small_ones(monkeypatch):
    from featurepipe.training import cost

    now, fitted = [0.0], []

    def fit(rows):
        fitted.append(rows)
        now[0] += rows / 100

    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert cost.time_of(fit, 12_000, steepest=1, whole=True) == pytest.approx(120)
    assert fitted == [1000, 3000]
    assert cost.time_of(fit, 4000, steepest=1, whole=True) == pytest.approx(40)
    assert fitted[2:] == [500, 4000]


def test_the_first_step_foretells_no_time_left():
    from featurepipe.progress import Lines

    now = [0.0]
    out = io.StringIO()
    lines = Lines(120, "measure", out, unit="fits", every=5, clock=lambda: now[0])
    for second in (10.0, 15.0):
        now[0] = second
        lines.advance(1 if second == 10 else 29)
    assert out.getvalue().splitlines() == ["measure: 1 of 120 fits", "measure: 30 of 120 fits, 2.0 fits/s, 0:45 left"]


def test_what_is_under_way_is_told_and_for_how_long_within_one_unit():
    from featurepipe.progress import Lines, StepsWithin

    now, out = [0.0], io.StringIO()
    lines = Lines(4, "measure", out, unit="routes", every=5, clock=lambda: now[0])
    steps = StepsWithin(640, lambda text: lines.advance(0, f"tail: {text}"))
    for second, act in (
        (6, lambda: steps.advance(12, "loss 0.5")),
        (7, lambda: steps.advance(1)),  # too soon
        (20, lines.beat),  # told 14 s ago
        (21, lines.beat),
        (30, lambda: lines.advance(1, "tail")),
        (36, lambda: lines.advance(1, "full")),
        (50, lines.beat),
        (52, lines.beat),
        (66, lines.beat),
        (67, lines.beat),
    ):
        now[0] = float(second)
        act()
    assert out.getvalue().splitlines() == [
        "measure: 0 of 4 routes, tail: step 12 of 640, loss 0.5",
        "measure: 0 of 4 routes, tail: step 13 of 640, for 14 s",
        "measure: 1 of 4 routes, tail",
        "measure: 2 of 4 routes, 18 s/route, 0:36 left, full",
        "measure: 2 of 4 routes, 26 s/route, 0:52 left, under way, nothing new for 16 s",
        "measure: 2 of 4 routes, 34 s/route, 1:07 left, under way, nothing new for 31 s",
    ]


def test_work_that_says_nothing_shows_that_it_goes_on(monkeypatch):
    from featurepipe import progress

    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.05)
    monkeypatch.setattr(progress, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(
        progress.Lines.__init__, "__kwdefaults__", {**progress.Lines.__init__.__kwdefaults__, "every": 0.0}
    )
    out = io.StringIO()
    with progress.show(1, "prepare", stream=out) as shown:
        shown.advance(0, "reading")
        end = time.monotonic() + 30
        while "reading, for" not in out.getvalue() and time.monotonic() < end:
            time.sleep(0.01)
    assert "prepare, reading, for a second" in out.getvalue().splitlines()
    assert not [thread for thread in threading.enumerate() if thread.name == "featurepipe-progress"]


def test_what_takes_more_than_ten_seconds_has_no_rate_of_zero():
    from featurepipe.progress import Lines

    now, out = [0.0], io.StringIO()
    lines = Lines(5, "fit", out, unit="heads", every=5, clock=lambda: now[0])
    for second in (50.0, 100.0):
        now[0] = second
        lines.advance(1)
    assert out.getvalue().splitlines() == ["fit: 1 of 5 heads", "fit: 2 of 5 heads, 50 s/head, 2:30 left"]


def test_progress_bar_on_a_terminal_and_lines_elsewhere(monkeypatch):
    from featurepipe.progress import Bar, Lines, Silent, show

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    with show(10, "extract", stream=terminal) as progress:
        assert isinstance(progress, Bar)
        progress.advance(4, "read-bound")
        progress.say("a message [with brackets]")
    assert "a message [with brackets]" in terminal.getvalue()
    assert "4/10" in terminal.getvalue()
    with show(10, "extract", stream=io.StringIO()) as progress:
        assert isinstance(progress, Lines)
    with show(10, "extract", silent=True) as progress:
        assert isinstance(progress, Silent)


GPU = "a GPU, or a node nearer the input, would help"
DISK = "use a faster one, or fewer and narrower columns"
COPY = "the source is slow; add --workers, or copy the images to a nearer disk"


@pytest.mark.parametrize(
    ("waiting", "decode", "read", "forward", "write", "device", "line"),
    [
        (7, 20, 1, 2, 0, "cuda", "decode-bound: the network waited 70 % of the time; add --workers or use --decode gpu"),
        (7, 20, 1, 2, 0, "cpu", "decode-bound: the network waited 70 % of the time; add --workers, or cores"),
        (6, 2, 9, 2, 0, "cpu", f"read-bound: the network waited 60 % of the time; {COPY}"),
        (1, 20, 1, 9, 0, "cuda:0", "forward-bound: the network was busy 90 % of the time"),
        (1, 20, 1, 9, 0, "cpu", f"forward-bound: the network was busy 90 % of the time; {GPU}"),
        (1, 1, 1, 2, 5, "cpu", f"write-bound: the run waited for the store 50 % of the time; the store's disk is slow; {DISK}"),
    ],
)  # fmt: skip
def test_the_verdict_names_the_stage_and_a_remedy(waiting, decode, read, forward, write, device, line):
    from featurepipe.records import verdict

    seconds = {"waiting": waiting, "decode": decode, "read": read, "forward": forward, "write": write}
    assert verdict(seconds, 10.0, device=device) == line


def test_the_verdict_of_nothing():
    from featurepipe.records import verdict

    nothing = dict.fromkeys(("waiting", "decode", "read", "forward", "write"), 0.0)
    assert verdict(nothing, 0.0, device="cpu") == "nothing to compute"


@pytest.mark.parametrize(
    "words", ["a.png b.png --distance euclidean", "--distance euclidean a.png b.png", "a.png --json b.png"]
)
def test_images_may_stand_before_and_after_options(words):
    assert build_parser("similar").parse_args(["similar", "store", *words.split()]).query == ["a.png", "b.png"]


def test_options_that_there_are_not_are_no_images(capsys):
    with pytest.raises(SystemExit):
        build_parser("similar").parse_args(["similar", "store", "--near", "3", "a.png"])
    assert "unrecognized arguments: --near 3 a.png" in capsys.readouterr().err
