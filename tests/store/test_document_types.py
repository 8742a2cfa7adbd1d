"""Documents of a store whose entries have other types than readers expect are set aside, by name; others are read."""

import json

import pytest

from featurepipe.cli import main
from featurepipe.errors import StoreError
from featurepipe.store.documents import DepthDocument, RunDocument, read_document, read_runs, write_run

DRIFT = {"column": "c3:gap", "adjusted": 0.5, "effect": 0.1}


def run_with(step, **result):
    return {"run_id": "r", "command": "run", "steps": [{"step": step, "status": "done", "result": result}]}


def read(folder, document, kind):
    path = folder / "document.json"
    path.write_text(json.dumps(document))
    return read_document(path, kind)


@pytest.mark.parametrize(
    ("step", "result", "where"),
    [
        ("list", {"listed": "many"}, "steps.0.result.listed"),
        ("list", {"listed": 1.5}, "steps.0.result.listed"),
        ("list", {"listed": None}, "steps.0.result.listed"),
        ("extract", {"counts": {"computed": "3"}}, "steps.0.result.counts.computed"),
        ("extract", {"counts": [3]}, "steps.0.result.counts"),
        ("predict", {"labels": {"cat": None}}, "steps.0.result.labels.cat"),
        ("predict", {"target": "age"}, "steps.0.result.target"),
        ("train", {"text": 4}, "steps.0.result.text"),
        ("gc", {"warnings": "none"}, "steps.0.result.warnings"),
        ("drift", {"columns": [DRIFT | {"adjusted": "low"}]}, "steps.0.result.columns.0.adjusted"),
        ("drift", {"columns": [{"column": "c3:gap"}]}, "steps.0.result.columns.0.adjusted"),
        ("drift", {"columns": ["c3:gap"]}, "steps.0.result.columns.0"),
        ("drift", {"classes": {"adjusted": 1}}, "steps.0.result.classes.total_variation"),
        ("drift", {"labels": {"adjusted": 1}}, "steps.0.result.labels.effect"),
        (
            "drift",
            {"labels": {"adjusted": 1, "effect": 0, "labels": [{"label": "red"}]}},
            "steps.0.result.labels.labels.0.adjusted",
        ),
        ("drift", {"numbers": {"adjusted": "1", "effect": 0}}, "steps.0.result.numbers.adjusted"),
        ("drift", {"thresholds": {"warn": []}}, "steps.0.result.thresholds.warn"),
        ("drift", {"reference": 7}, "steps.0.result.reference"),
    ],
)
def test_the_result_of_a_step_is_typed_as_its_step_has_it(tmp_path, step, result, where):
    with pytest.raises(StoreError, match=f"is not as it should be: {where}: "):
        read(tmp_path, run_with(step, **result), RunDocument)


@pytest.mark.parametrize(
    ("step", "result"),
    [
        ("train", {"columns": ["c3:gap"], "counts": {"train": 3, "by": {"cat": 1}}}),
        ("drift", {"columns": [DRIFT | {"p": 0.5, "farthest": ["a.png"]}], "classes": None, "images": {"new": 3}}),
        ("depth", {"images": 12, "recommended": {"column": "c3"}}),
        ("a later version's", {"listed": 3, "else": [{}]}),
    ],
)
def test_what_steps_leave_is_read_as_it_is(tmp_path, step, result):
    document = run_with(step, **result)
    assert read(tmp_path, document, RunDocument) == document


@pytest.mark.parametrize(
    ("entry", "where"),
    [
        ({"waiting": {"since": "soon", "why": "x"}}, "waiting.since"),
        ({"waiting": "for the source"}, "waiting"),
        ({"plan": {"features": [{"backbone": "lenet5"}]}}, "plan.features.0.weights"),
        ({"plan": {"limits": []}}, "plan.limits"),
    ],
)
def test_what_a_run_waits_for_and_plans_is_typed(tmp_path, entry, where):
    with pytest.raises(StoreError, match=f"is not as it should be: {where}: "):
        read(tmp_path, {"run_id": "r", **entry}, RunDocument)


HALF = "\ud800"  # a lone surrogate, which no text in UTF-8 holds, but JSON can write


@pytest.mark.parametrize(
    "entries", [{"backbone": f"tiny{HALF}"}, {"notes": {"aliases": {"bottleneck": HALF}}}, {"fields": {HALF: HALF}}]
)
@pytest.mark.parametrize("command", [["info"], ["verify"], ["gc", "--dry-run"]])
def test_half_a_character_in_the_description_of_a_space_ends_no_command(zoo, capfd, entries, command):
    zoo.write(zoo.images("train", 2))
    path = next(zoo.store.path.glob("spaces/*/space.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    assert main([command[0], str(zoo.store.path), *command[1:]]) in (0, 1)
    told = capfd.readouterr()
    assert HALF not in told.out + told.err
    assert "Traceback" not in told.err


@pytest.mark.parametrize(
    ("entries", "where"),
    [
        ({"dataset": 3}, "dataset"),
        ({"space": "lenet5"}, "space"),
        ({"space": {}}, "space.fingerprint"),
        ({"recommended": {"head": "knn"}}, "recommended.column"),
        ({"recommended": {"column": "c3:gap", "accuracy": "good"}}, "recommended.accuracy"),
        ({"classes": "cat"}, "classes"),
        ({"classes": [None]}, "classes.0"),
        ({"provenance": []}, "provenance"),
    ],
)
def test_a_comparison_of_layers_with_other_types_is_set_aside(tmp_path, entries, where):
    with pytest.raises(StoreError, match=f"is not as it should be: {where}: "):
        read(tmp_path, {"dataset": "zoo"} | entries, DepthDocument)


@pytest.mark.parametrize(
    ("step", "result"),
    [
        ("train", {"bundle": "b", "why": ["there is no bundle yet"], "text": "trained", "warnings": []}),
        ("drift", {"verdict": "no drift", "thresholds": {"warn": 0.01, "fail": None}, "columns": []}),
    ],
)
def test_results_as_steps_write_them_keep_their_record(tmp_path, step, result):
    run_id = "20261128T213005705611Z-038d0629"
    entry = {"step": step, "name": "", "status": "done", "seconds": 0.1, "result": result}
    write_run(tmp_path, {"run_id": run_id, "command": "run", "steps": [entry]})
    (record,) = read_runs(tmp_path)
    assert record["steps"] == [entry]
