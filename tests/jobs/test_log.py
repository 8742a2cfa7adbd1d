"""The log of a run: plain lines, or one JSON object a line and nothing else."""

import io
import json
import logging
import sys
import threading
from contextlib import redirect_stdout

import pytest

from featurepipe.jobs.log import FORMATS, LoggedProgress, job_log
from featurepipe.progress import announcer, show


def lines_of(stream):
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_json_line_says_when_what_and_of_which_run():
    stream = io.StringIO()
    with job_log("nightly", log_format="json", stream=stream) as log:
        log.event("run started", dataset="photos")
        with log.about(run_id="R1"), log.about(step="train"):
            log.event("step done", "trained\nin two lines", seconds=1.5, counts={"train": 3})
        log.warn("few images")
        log.event("run failed", level="error", exit_code=1)
    first, second, third, fourth = lines_of(stream)
    assert all(line.pop("time").endswith("+00:00") for line in (first, second, third, fourth))
    assert first == {"level": "info", "event": "run started", "job": "nightly", "dataset": "photos"}
    assert second == {"level": "info", "event": "step done", "job": "nightly", "run_id": "R1", "step": "train",
                      "text": "trained\nin two lines", "seconds": 1.5, "counts": {"train": 3}}  # fmt: skip
    assert third == {"level": "warning", "event": "message", "job": "nightly", "text": "few images"}
    assert fourth == {"level": "error", "event": "run failed", "job": "nightly", "exit_code": 1}


def test_the_text_form_is_what_people_read():
    stream = io.StringIO()
    with job_log("nightly", stream=stream) as log:
        log.event("run started", dataset="photos")
        log.say("100 % of {3} images")
        log.event("step done", "train: done in 2 s", seconds=2)
        log.warn("few images")
        log.event("run failed", "no luck", level="error")
        assert sys.stderr is not stream
    expected = ["100 % of {3} images", "train: done in 2 s", "warning: few images", "error: no luck"]
    assert stream.getvalue().splitlines() == expected


def test_steps_and_the_end_of_a_run_are_logged_with_their_numbers():
    result = {"text": "3 images labelled", "counts": {"predicted": 3}, "images_per_second": 5.5, "labels": {}, "file": "x",
              "warnings": ["look here"]}  # fmt: skip
    done = {"step": "predict", "name": "logistic", "status": "done", "seconds": 1.5, "result": result}
    failed = {"step": "drift", "name": "", "status": "failed", "seconds": 0.5, "error": "no such column"}
    late = {"step": "keep", "name": "", "status": "not reached", "seconds": 0.0}
    record = {"status": "failed", "exit_code": 1, "counts": {"listed": 9}, "changes": {}, "seconds": {"wall": 2.0},
              "images_per_second": None, "store_bytes": 5, "free_bytes": None, "versions": {}}  # fmt: skip
    streams = {name: io.StringIO() for name in FORMATS}
    for name, stream in streams.items():
        with job_log("nightly", log_format=name, stream=stream) as log:
            [log.step_ended(entry) for entry in (done, failed, late)]
            log.run_ended(record)
    assert streams["text"].getvalue().splitlines() == [
        "predict logistic: done: 3 images labelled",
        "warning: look here",
        "error: drift: failed: no such column",
        "keep: not reached",
    ]
    predict, warning, drift, keep, end = lines_of(streams["json"])
    assert [line["level"] for line in (predict, warning, drift, keep, end)] == [
        "info",
        "warning",
        "error",
        "info",
        "error",
    ]
    assert {**predict, "time": ""} == {
        "time": "", "level": "info", "event": "step ended", "job": "nightly", "step": "predict logistic",
        "text": "predict logistic: done: 3 images labelled", "status": "done", "seconds": 1.5, "counts": {"predicted": 3},
        "images_per_second": 5.5,
    }  # fmt: skip
    assert {**end, "time": ""} == {
        "time": "", "level": "error", "event": "run ended", "job": "nightly", "status": "failed", "exit_code": 1,
        "counts": {"listed": 9}, "changes": {}, "seconds": {"wall": 2.0}, "images_per_second": None,
        "store_bytes": 5, "free_bytes": None,
    }  # fmt: skip


def test_standard_output_is_logged_where_it_goes_to_standard_error(capsys):
    with redirect_stdout(sys.stderr), job_log("nightly", log_format="json"):
        print("a user's network")
    with job_log("nightly", log_format="json"):
        print("the result")
    captured = capsys.readouterr()
    assert json.loads(captured.err)["text"] == "a user's network"
    assert captured.out == "the result\n"


@pytest.mark.parametrize("log_format", FORMATS)
def test_silence_is_silent(log_format, capsys):
    with job_log("nightly", log_format=log_format, silent=True) as log:
        log.say("x")
        log.event("failed", "y", level="error")
    assert capsys.readouterr() == ("", "")


def test_in_json_nothing_else_reaches_standard_error(capsys):
    with job_log("nightly", log_format="json") as log, log.about(step="extract"):
        announcer()("starting a new feature space")
        print("a user's network", "prints", file=sys.stderr, end="")
        print(", on one line\n\n", file=sys.stderr)
    print("afterwards", file=sys.stderr)
    *logged, last = capsys.readouterr().err.splitlines()
    assert last == "afterwards"
    events = [json.loads(line) for line in logged]
    assert {line["step"] for line in events} == {"extract"}
    assert [(line["event"], line["text"]) for line in events] == [
        ("message", "starting a new feature space"),
        ("output", "a user's network prints, on one line"),
    ]


def test_lines_of_several_threads_stay_whole(capsys):
    with job_log("nightly", log_format="json"):

        def talk(name):
            for number in range(200):
                print(name * 5, number, file=sys.stderr)

        threads = [threading.Thread(target=talk, args=(name,)) for name in "abc"]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    texts = sorted(json.loads(line)["text"] for line in capsys.readouterr().err.splitlines())
    assert texts == sorted(f"{name * 5} {number}" for name in "abc" for number in range(200))


def test_progress_becomes_events_with_numbers_now_and_then():
    stream, times = io.StringIO(), iter([0.0, 10.0, 29.0, 31.0, 40.0, 62.0])
    with job_log("nightly", log_format="json", stream=stream) as log:
        progress = LoggedProgress(log, 1000, "extract", "images", clock=lambda: next(times))
        for images in (100, 100, 110, 1, 309):
            progress.advance(images, "decode" if images == 110 else "")
        with show(3, "measure", unit="fits") as shown:  # any command's own
            shown.advance(3)
            shown.say("halfway")
    first, second, said = lines_of(stream)
    numbers = {name: first[name] for name in ("event", "what", "done", "total", "per_second", "waits_for", "text")}
    assert numbers == {"event": "progress", "what": "extract", "done": 310, "total": 1000, "per_second": 10.0,
                       "waits_for": "decode", "text": "extract: 310 of 1,000 images"}  # fmt: skip
    assert (second["done"], second["per_second"]) == (620, 10.0)
    assert "waits_for" not in second
    assert (said["event"], said["text"]) == ("message", "halfway")


def test_a_log_that_nobody_reads_does_not_end_the_night(capsys):
    stream = io.StringIO()
    with job_log("nightly", log_format="json", stream=stream) as log:
        stream.close()
        log.say("into the void")
        print("and this", file=sys.stderr)
    assert capsys.readouterr().err == ""


def test_handlers_of_others_neither_see_nor_repeat_events(capsys):
    with job_log("nightly", log_format="json") as log:
        handler = logging.StreamHandler()  # as logging.basicConfig makes one: on standard error, as it is now
        logging.getLogger().addHandler(handler)
        try:
            log.say("once")
        finally:
            logging.getLogger().removeHandler(handler)
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not log.logger.handlers
    assert log.logger.propagate
