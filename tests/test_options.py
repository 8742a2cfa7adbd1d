"""Every declared option is the same on the command line, in Python, in a job file and in the record of a run."""

import argparse
import inspect
import json
from dataclasses import fields

import pytest
from PIL import Image
from pydantic_core import PydanticUndefined

import featurepipe
from featurepipe.cli.options import options
from featurepipe.cli.parser import build_parser
from featurepipe.curation.options import (
    CheckLabelsOptions,
    ForgetOptions,
    OutliersOptions,
    SelectOptions,
    SimilarOptions,
)
from featurepipe.errors import FeaturepipeError, Option, UsageError, on_command_line
from featurepipe.evaluation.options import EvaluateOptions
from featurepipe.extraction.limits import ExtractionOptions
from featurepipe.features.options import (
    MachineOptions,
    NetworkOptions,
    RejectOptions,
    SettingOptions,
    SourceOptions,
    places,
)
from featurepipe.jobs.step import QUESTIONS
from featurepipe.jobs.validation import keys_of, read_job, table_called
from featurepipe.layer_depth.options import DepthOptions
from featurepipe.monitoring.options import DriftOptions, DuplicatesOptions
from featurepipe.option_groups import OptionGroup, as_asked, at_least, declared
from featurepipe.prediction.options import BundleOptions, PredictOptions
from featurepipe.reporting.from_store import report
from featurepipe.reporting.options import FindingsOptions
from featurepipe.store.gc import gc_store
from featurepipe.store.options import GcOptions
from featurepipe.training.options import TrainOptions
from featurepipe.transfer_routes.options import RoutesOptions
from featurepipe.tuning.options import TuneOptions

FUNCTIONS = {
    "extract": (featurepipe.extract, ExtractionOptions),
    "predict": (featurepipe.predict, PredictOptions),
    "train": (featurepipe.train, TrainOptions),
    "finetune": (featurepipe.finetune, TuneOptions),
    "evaluate": (featurepipe.evaluate, EvaluateOptions),
    "depth": (featurepipe.depth, DepthOptions),
    "routes": (featurepipe.routes, RoutesOptions),
    "drift": (featurepipe.drift, DriftOptions),
    "duplicates": (featurepipe.duplicates, DuplicatesOptions),
    "similar": (featurepipe.similar, SimilarOptions),
    "labels": (featurepipe.labels, CheckLabelsOptions),
    "outliers": (featurepipe.outliers, OutliersOptions),
    "select": (featurepipe.select, SelectOptions),
    "report": (report, FindingsOptions),
    "gc": (gc_store, GcOptions),
    "forget": (featurepipe.forget, ForgetOptions),
}
LINES = {
    "extract": "extract x --store y",
    "predict": "predict b x --to y.csv",
    "train": "train y --out b",
    "finetune": "finetune y --out b",
    "evaluate": "evaluate b y",
    "depth": "depth x",
    "routes": "routes x",
    "drift": "drift y",
    "duplicates": "duplicates y",
    "similar": "similar y x.png",
    "labels": "labels y",
    "outliers": "outliers y",
    "select": "select y",
    "report": "report y --to z",
    "gc": "gc y",
    "forget": "forget y",
}
TABLES = {
    "extract": ("source", "features", "machine", "limits"),
    "train": ("train",),
    "finetune": ("finetune",),
    "depth": ("depth",),
    "routes": ("routes",),
    "drift": ("drift",),
    "similar": ("similar",),
    "labels": ("labels",),
    "outliers": ("outliers",),
    "select": ("select",),
    "forget": ("forget",),
}
"""Of a job file, in which the options of a step are."""
OF_THE_JOB = {"dataset", "trust_code", "snapshot"}
"""What a job says once for all of its steps, or settles itself."""
OF_A_QUESTION = OF_THE_JOB | declared(SourceOptions).keys() | {"source"}
NOT_IN_A_JOB = {
    "extract": {"retry_rejects", "mirrored"},
    "train": OF_THE_JOB | {"weights"},
    "finetune": OF_THE_JOB | {"weights"},
    "depth": {"pooling", "control"},
    "routes": set(),
    "drift": OF_THE_JOB | {"backbone"},
    "similar": OF_A_QUESTION | declared(MachineOptions).keys() | {"query_ids", "query_dataset", "weights"},
    "labels": OF_A_QUESTION,
    "outliers": OF_A_QUESTION,
    "select": OF_A_QUESTION,
    "forget": OF_THE_JOB | {"dry_run", "may_come_back"},
}
"""The first is asked for by who starts a run, as ``featurepipe run --retry-rejects``, and no lasting property of a job; weights
are those of ``[[features]]``; a job compares the columns that it has."""
OF_A_JOB = {
    ("limits", "max_gone"): "50%",
    ("features", "backbone"): "resnet50",
    ("select", "budget"): PydanticUndefined,
}
OF_A_JOB |= {(step, "to"): PydanticUndefined for step in QUESTIONS}
"""Defaults that are others in a job file, where nobody watches and all runs are alike; what answers a question must be said."""
WRONG = {"extract": {
    "max_rejects": "few", "max_gone": -1, "min_free": "20 parsecs", "time_budget": "soon", "path_column": "",
    "box": "", "box_unit": "inches", "box_margin": -1, "images": "", "frames": "last",
    "damaged": "repair", "device": "tpu", "batch_size": 0, "workers": 0, "precision": "fp8", "dtype": "f2", "decode": "tpu",
    "intensity": "bits=0", "nodes": (),
}, "train": {
    "head": "logistik", "nodes": (), "pca": 0, "class_weight": "even", "min_class_size": 0, "memory": "much", "jobs": 0,
    "device": "tpu", "seed": -1, "threshold": "recall=2", "params": 5,
}, "finetune": {"from_node": "", "epochs": 0, "rate": 0, "lowest_rate": 2, "warmup": 0, "patience": 0, "seeds": 0,
    "head_start": "exat", "label_smoothing": 1, "mixup": -1},
"depth": {"heads": (), "folds": 1, "seeds": 0, "max_width": 0, "jobs": 0},
"routes": {"routes": (), "sizes": (), "seeds": 0, "cuts": (), "epochs": 0, "budget": -1},
"drift": {"warn": 1, "fail": 0, "seed": -1, "columns": ()}}  # fmt: skip
each_command = pytest.mark.parametrize("command", FUNCTIONS)
each_step = pytest.mark.parametrize("step", TABLES)


def arguments(command):
    """The parser's arguments of a command by destination."""
    commands = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return {action.dest: action for action in commands.choices[command]._actions}


def groups(of=OptionGroup):
    return {of}.union(*map(groups, of.__subclasses__()))


def is_group(group):
    return not hasattr(group, "model_fields")  # as the tables of a job have


def table_of(name, step="extract"):
    found = [table for table in TABLES[step] if name in table_called(table).model_fields]
    assert len(found) <= 1
    return found[0] if found else None


def given_in(table, name, text, folder):
    """A job file that says one thing."""
    lines = {"source": ['path = "p"'], "features": []}
    lines |= {table: ['out = "b"']} if table in ("train", "finetune") else {}
    lines |= {table: ['to = "x.csv"']} if table in QUESTIONS else {}
    lines |= {table: ['to = "x.csv"', "budget = 1"]} if table == "select" else {}
    if table == "finetune" and name != "from_node":
        lines[table].append('from_node = "images"')
    lines.setdefault(table, []).append(f"{name} = {text}")
    heads = {name: f"[[{name}]]" for name in ("features", "train", "finetune", *QUESTIONS)}
    body = "".join("\n".join([heads.get(one, f"[{one}]"), *lines[one], ""]) for one in lines)
    file = folder / "job.toml"
    file.write_text(f'store = "s"\n{body}')
    return file


@each_command
def test_the_command_line_and_the_function_have_every_option(command):
    function, group = FUNCTIONS[command]
    shown, parameters = arguments(command), inspect.signature(function).parameters
    for name, one in declared(group).items():
        no, does_not = ("no-", "do not ") if one.default is True else ("", "")
        assert shown[name].option_strings == [f"--{no}{on_command_line(Option(name))[2:]}"]
        assert shown[name].help.replace("%%", "%") == does_not + one.help
        assert not one.choices or shown[name].metavar.split("|") == list(one.choices)
        default = parameters[name].default
        assert one.default in (default, (default,)), name


OF_THE_COMMAND = {
    *("help", "keys", "json", "quiet", "dry_run", "scheduler", "cluster"),  # what is printed, and where work runs
    *("source", "store", "bundle", "backbone", "job", "run_id", "query"),  # what is worked on, named without a flag
    *("out", "to", "node"),  # required: what is written, and what of
    *(
        "nights",
        "accept",
        "rejects",
        "log_format",
        "folder",
        "last",
        "stages",
        "dataset",
        "ids",
        "id",
    ),  # which images; another thing to do; `runs`, `run`, `demo`
}
"""Arguments that a command may declare itself; each other one is an option of a group."""


def test_every_argument_is_declared_in_a_group():
    declared_somewhere = {name for group in groups() for name in declared(group)}
    commands = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    for command in commands.choices:
        for dest in arguments(command):
            assert dest in OF_THE_COMMAND | declared_somewhere, f"{command}: {dest} is declared in no group"


@each_command
def test_without_arguments_the_command_line_asks_for_the_defaults(command):
    _, group = FUNCTIONS[command]
    words = LINES[command].split()
    asked = options(build_parser().parse_args(words), group)
    assert asked == {name: one.default for name, one in declared(group).items()}
    assert group(**asked) == group()


@each_command
def test_help_names_the_default(command):
    """A default is said as ``default: ...``, or is what the text calls ``auto``, or nothing is asked for."""
    for name, one in declared(FUNCTIONS[command][1]).items():
        if one.default not in (None, False, True, "auto", "DEFAULT") and isinstance(one.default, str | int):
            assert f"default: {one.default}" in one.help
        else:
            assert "default" in one.help or "auto: " in one.help or one.default in (None, False, True, "DEFAULT"), name


def test_depth_passes_on_what_extract_takes():
    from featurepipe.cli.depth import EXTRACTION_GROUPS, NOT_OF_DEPTH

    names = {name for group in EXTRACTION_GROUPS for name in declared(group)} - set(NOT_OF_DEPTH)
    assert names <= declared(ExtractionOptions).keys() & arguments("depth").keys()


@each_step
def test_a_job_file_has_every_option(step):
    for name, one in declared(FUNCTIONS[step][1]).items():
        table = table_of(name, step)
        assert (table is None) == (name in NOT_IN_A_JOB[step]), name
        if table is not None:
            field = table_called(table).model_fields[name]
            assert field.default == OF_A_JOB.get((table, name), one.default), name
            assert keys_of(step)(Option(name)) in (f"[{table}] {name}", f"[[{table}]] {name}")


@each_step
def test_a_job_file_takes_the_same_choices_and_refuses_others(step, tmp_path):
    chosen = {name: one.choices for name, one in declared(FUNCTIONS[step][1]).items() if one.choices}
    having = {
        "extract": {"box_unit", "damaged", "frames", "precision", "dtype", "engine"},
        "train": {"class_weight"},
        "depth": {"control"},
        "finetune": {"augment", "batch_norm", "head_start", "mixed_precision"},
        "similar": {"distance", "index", "engine", "box_unit", "frames"},
        "labels": {"box_unit", "frames"},
        "outliers": {"by", "distance", "box_unit", "frames"},
        "select": {"method", "box_unit", "frames"},
    }
    assert set(chosen) == having.get(step, set())
    for name, choices in chosen.items():
        if name in NOT_IN_A_JOB[step]:
            continue
        for choice in choices:
            job = read_job(given_in(table_of(name, step), name, f'"{choice}"', tmp_path))
            table = getattr(job, table_of(name, step))
            assert getattr(table[0] if isinstance(table, tuple) else table, name) == choice
        for wrong in ('"qqqqqq"', "5"):
            with pytest.raises(UsageError, match=r"choices: " + ", ".join(choices)):
                read_job(given_in(table_of(name, step), name, wrong, tmp_path))


@pytest.mark.parametrize(("step", "name"), [(step, name) for step in WRONG for name in WRONG[step]])
def test_every_front_end_refuses_the_same_and_names_the_option(step, name, tmp_path):
    value, table = WRONG[step][name], table_of(name, step)
    text = "[]" if value == () else str(value) if isinstance(value, int) else f'"{value}"'
    with pytest.raises(UsageError) as of_job:
        read_job(given_in(table, name, text, tmp_path))
    assert f"{table}{'[0]' * (table in ('features', 'train', 'finetune'))}.{name} = " in str(of_job.value)
    if name == "time_budget":  # Python takes seconds, and no text
        return
    with pytest.raises(UsageError) as of_python:
        FUNCTIONS[step][1](**{name: value})
    assert of_python.value.option in (name, "")  # of some, whose own message names them
    said = str(of_python.value).removeprefix(f"{name} {value!r} ")
    assert name in said or said in str(of_job.value)


def test_functions_check_before_anything_else(tmp_path):
    for name, value in WRONG["extract"].items():
        if name != "time_budget":
            with pytest.raises(UsageError, match=name):
                featurepipe.extract(tmp_path / "none", tmp_path / "store", **{name: value}, silent=True)
    with pytest.raises(UsageError, match="min_class_size"):
        featurepipe.train(tmp_path / "none", out=tmp_path / "bundle", min_class_size=0)


def test_a_record_keeps_what_was_asked_for(tmp_path):
    pile, store = tmp_path / "pile", tmp_path / "store"
    pile.mkdir()
    Image.effect_noise((32, 32), 50).save(pile / "0.png")
    asked = {
        "backbone": "lenet5", "weights": "none", "seed": 3, "nodes": ["c3"], "precision": "fp32", "dtype": "float32",
        "decode": "cpu", "intensity": "bits=12", "device": "cpu", "batch_size": 2, "workers": 1, "max_rejects": 3,
        "max_gone": "20%", "min_free": "1kB", "time_budget": 5000.0, "retry_rejects": True, "damaged": "keep",
        "only_under": [str(tmp_path)], "path_column": None, "box": None, "box_unit": "pixels", "box_margin": 0.0, "images": None,
        "frames": "first", "engine": "pytorch", "mirrored": True,
    }  # fmt: skip
    assert asked.keys() == declared(ExtractionOptions).keys()
    record = featurepipe.extract(pile, store, **{**asked, "only_under": tmp_path}, silent=True)
    assert record["options"] == asked
    assert featurepipe.FeatureStore(store).runs()[-1]["options"] == asked
    plain = featurepipe.extract(pile, store, backbone="lenet5", weights="none", nodes="c3", silent=True)
    given = {"backbone": "lenet5", "weights": "none", "nodes": ["c3"]}
    assert plain["options"] == {**as_asked(ExtractionOptions()), **given}


def test_groups_are_made_of_declared_options_alone():
    ours = [group for group in groups() if is_group(group)]
    assert {group for _, group in FUNCTIONS.values()} < set(ours)
    for group in ours:
        assert [one.name for one in fields(group)] == list(declared(group))
        group()  # all defaults are right
        assert all(one.help[0] != one.help[0].upper() or one.help[:4] == "JPEG" for one in declared(group).values())
        assert all(not one.help.endswith(".") for one in declared(group).values())


def test_a_part_of_a_group_and_what_is_no_group():
    larger = ExtractionOptions(damaged="keep", retry_rejects=True, max_rejects=3)
    assert RejectOptions.of(larger) == RejectOptions(damaged="keep", retry_rejects=True)
    assert RejectOptions.of(larger).keep_damaged
    assert SourceOptions.of(larger) == SourceOptions()
    assert (dict(declared(dict)), as_asked(MachineOptions(workers=2))["workers"]) == ({}, 2)
    assert set(declared(BundleOptions)) == {"weights", "trust_code", "damaged", *declared(MachineOptions)}
    assert declared(BundleOptions)["weights"].default is None
    assert declared(NetworkOptions)["weights"].default == "DEFAULT"


def test_errors_are_spelled_as_each_front_end_does():
    with pytest.raises(FeaturepipeError) as caught:
        MachineOptions(batch_size=0)
    said = "'auto' or a number from 1 to 65536"
    assert (caught.value.option, str(caught.value)) == ("batch_size", f"batch_size 0 must be {said}")
    assert caught.value.spelled(on_command_line) == (f"--batch-size 0 must be {said}",)
    assert on_command_line(Option("sizes", (5, "2O"))) == "--sizes 5,2O"  # as it was typed
    assert caught.value.spelled(keys_of("extract")) == (f"[machine] batch_size 0 must be {said}",)


def test_numbers_of_numpy_are_numbers_and_booleans_are_none():
    import numpy as np

    assert MachineOptions(batch_size=np.int64(8), workers=np.int32(2)).workers == 2
    assert at_least(1)(np.int64(0)) == "must be at least 1"
    assert json.dumps(as_asked(MachineOptions(batch_size=np.int64(8), workers=np.int32(2))))
    for wrong, said in (
        ({"workers": "4"}, "a whole number"),
        ({"device": None}, "text"),
        ({"device": np.int64(1)}, "text"),
    ):
        with pytest.raises(UsageError, match=f"must be {said}"):
            MachineOptions(**wrong)
    for wrong in ({"batch_size": True}, {"batch_size": 2.5}, {"batch_size": None}):
        with pytest.raises(UsageError, match="batch_size"):
            MachineOptions(**wrong)
    with pytest.raises(UsageError, match="max_rejects None must be a number"):
        ExtractionOptions(max_rejects=None)
    assert SettingOptions(intensity="window=-1:5").intensity == "window=-1:5"


def test_places(tmp_path):
    assert places(None) is None
    assert places("/data") == ("/data",)
    assert places(tmp_path) == (str(tmp_path),)
    assert places([tmp_path, "s3://b"]) == (str(tmp_path), "s3://b")
    assert places([]) == ()  # which `OnlyUnder` refuses: bounds that bound nothing


def test_an_empty_list_of_places_is_refused_in_a_job_too(tmp_path):
    from featurepipe.features.reading import opened

    (tmp_path / "p").mkdir()
    job = read_job(given_in("source", "only_under", "[]", tmp_path))
    with pytest.raises(UsageError, match="names no folder"):
        opened(job.source.path, job.source)
