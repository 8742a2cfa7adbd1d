"""What is shown of names: nothing that a terminal obeys, and no line that a name has made."""

import io
import json
import logging
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from featurepipe.cli.output import show
from featurepipe.display import displayed, displayed_lines, displayed_values, table
from featurepipe.errors import TooManyRejects, UsageError
from featurepipe.extraction.text import text as extract_text
from featurepipe.jobs.log import job_log
from featurepipe.jobs.prometheus import registry_of
from featurepipe.jobs.text import rejects_text
from featurepipe.monitoring.text import duplicates_text
from featurepipe.progress import Lines

BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
NASTY = st.text(st.sampled_from("ab\x1b\x9b\x07\r\n\t\x00\x7f\u2028\u2029\udcff" + BIDI), min_size=1) | st.text(
    st.characters(), min_size=1
)


def obeyed(text: str) -> set[str]:
    """Characters but line ends that a terminal or a browser would act on."""
    kinds = {character: unicodedata.category(character) for character in text if character != "\n"}
    return {character for character, kind in kinds.items() if kind in ("Cc", "Cs", "Zl", "Zp") or character in BIDI}


@given(NASTY)
@example("zażółć 猫 👩‍👩‍👧 é.png")
def test_what_is_displayed_is_one_plain_line(name):
    shown = displayed(name)
    assert not obeyed(shown)
    assert "\n" not in shown
    assert displayed(shown) == shown
    shown.encode()
    if not obeyed(name) and "\n" not in name:
        assert displayed_lines(name).count("\n") == name.count("\n")


def test_writing_of_all_peoples_stays():
    for name in ("zażółć", "猫/犬.png", "👩‍👩‍👧", "ن\u200cم", "naïve café", "C:\\pictures\\new.png", "=x"):
        assert displayed(name) == name


def record(name: str) -> dict:
    counts = {"listed": 1, "computed": 1, "known": 0, "rejected": 1}
    return {
        "dataset": name, "backbone": {"bottleneck": name}, "counts": counts, "changes": {}, "gone": 0,
        "rejects": [{"id": name, "reason": f"gone: {name}"}],
        "reject_reasons": {name: 1}, "rejects_file": name, "computed_by_column": {name: 1}, "images_per_second": 1.0,
        "seconds": dict.fromkeys(("read", "decode", "forward", "write", "wall"), 0.1), "verdict": "", "space": name,
    }  # fmt: skip


def duplicates(name: str) -> dict:
    group = {"kind": "exact", "across_splits": True, "label_conflict": True,
             "images": [{"id": name, "split": name, "label": name}] * 2}  # fmt: skip
    exact = {"copies": 1, "groups": 1, "images": 2, "across_splits": 1, "label_conflicts": 1, "listed": [group]}
    return {"dataset": name, "images": 2, "exact": exact, "near": None, "warnings": [name], "file": name}


TEXTS = [
    (extract_text, record),
    (duplicates_text, duplicates),
    (rejects_text, lambda name: [{"dataset": name, "since": None, "run": name, "id": name, "reason": name}]),
]


@pytest.mark.parametrize(("text", "of"), TEXTS)
@given(name=NASTY)
def test_results_as_text_have_as_many_lines_with_any_name(text, of, name):
    """``show`` escapes names before the text is made, so that each command's lines are its own."""
    out = io.StringIO()
    arguments = type("Arguments", (), {"json": False, "stdout": out})()
    show(arguments, of(name), text)
    assert not obeyed(out.getvalue())
    assert out.getvalue().count("\n") == text(of("plain")).count("\n") + 1


def test_json_holds_names_as_they_are():
    out = io.StringIO()
    arguments = type("Arguments", (), {"json": True, "stdout": out})()
    show(arguments, record("a\x1b\n\u202eb"), extract_text)
    assert json.loads(out.getvalue()) == record("a\x1b\n\u202eb")
    assert out.getvalue().isascii()


@given(NASTY)
def test_messages_and_tables_are_one_line_a_name(name):
    stream = io.StringIO()
    Lines(1, "x", stream).say(f"reading {name}")
    assert stream.getvalue() == f"reading {displayed(name)}\n"
    assert table(["image", name], [[name, 1], ["b", 2]]).count("\n") == 2


def test_a_log_for_people_is_escaped_and_one_for_machines_exact():
    name = "cat\x1b[2J\n2026 run ended: done"
    told, logged = io.StringIO(), io.StringIO()
    for form, stream in (("text", told), ("json", logged)):
        with job_log("nightly", log_format=form, stream=stream) as log:
            log.warn(name)
    assert told.getvalue() == "warning: cat\\x1b[2J\\n2026 run ended: done\n"
    assert json.loads(logged.getvalue())["text"] == name
    assert logging.getLogger("featurepipe.jobs.nightly").handlers == []


def test_figures_hold_no_character_that_a_terminal_obeys():
    zero = {"listed": 1}
    written = {
        "job": "n\x1b\u202e", "run_id": "1", "status": "done", "exit_code": 0, "ended": "2026-11-24T22:00:04+00:00",
        "seconds": {"wall": 1.0}, "counts_by_space": {"s\x9b": zero}, "changes": {}, "images_per_second": 1.0,
        "steps": [{"step": "drift", "result": {"columns": [
            {"column": "c\u2066", "space": "s", "adjusted": 0.5, "effect": 0.1}]}}],
    }  # fmt: skip
    labels = {
        value for metric in registry_of(written, []).collect() for s in metric.samples for value in s.labels.values()
    }
    assert {"n\\x1b\\u202e", "s\\x9b", "c\\u2066"} <= labels
    assert not obeyed("".join(labels))


def test_an_errors_lines_are_its_arguments():
    assert UsageError("a: wrong", "b: wrong").lines == ("a: wrong", "b: wrong")
    assert str(UsageError("a: wrong", "b: wrong")) == "a: wrong\nb: wrong"
    assert TooManyRejects("first: a\nb").lines == ("first: a\nb",)


def test_values_of_any_depth_are_displayed():
    value = {"a\x1b": [("b\n", 1), {"c": None}], "d": 1.5, "e": True}
    assert displayed_values(value) == {"a\\x1b": [("b\\n", 1), {"c": None}], "d": 1.5, "e": True}
