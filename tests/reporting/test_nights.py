"""The last runs as one document, what to do after them, and what the page says; the records are those of conftest."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from featurepipe.errors import UsageError
from featurepipe.reporting import nights as nights_module
from featurepipe.reporting.night_outcomes import next_steps
from featurepipe.reporting.nights import nights_document, nights_report
from featurepipe.store import FeatureStore


@pytest.fixture(autouse=True)
def morning(monkeypatch):
    """It is the morning after the last run."""
    monkeypatch.setattr(nights_module, "now", lambda: "2026-11-29T08:00:00+00:00")


@pytest.fixture
def store(recorded, night_records):
    return recorded(night_records())


@pytest.fixture(scope="module")
def html(night_records, tmp_path_factory) -> str:
    """The page of all nights."""
    folder = tmp_path_factory.mktemp("month")
    store = FeatureStore(folder / "store")
    for record in night_records():
        store.write_run(record)
    return nights_report(store, folder / "page.html", silent=True).read_text("utf-8")


def test_the_last_nights_are_told_oldest_first(store):
    document = nights_document(store, last=5)
    assert (document["kind"], document["version"], document["name"], document["is_job"]) == (
        "nights",
        1,
        "nightly",
        True,
    )
    nights = document["nights"]
    assert [night["started"][8:10] for night in nights] == ["25", "26", "27", "28", "29"]
    assert [night["counts"]["computed"] for night in nights] == [123, 124, 125, 126, 127]
    last = nights[-1]
    assert last["changes"]["new"] == 127
    assert last["seconds"]["steps"] == {"list": 1.5, "extract": 2.54, "train": 20.0, "predict": 2.0, "drift": 3.0}
    assert last["seconds"]["stages"] == {
        "scan": 1.5, "read": 9.0, "decode": 40.0, "waiting": 4.0, "forward": 127 / 60, "write": 1.0,
    }  # fmt: skip
    assert last["seconds"]["wall"] == 32.54
    assert last["store_bytes"] == 2_000_000 + 400 * last["counts"]["listed"]
    assert last["reject_reasons"] == {"truncated": 2, "not-an-image": 1}  # of its extraction
    assert last["rejects"][0] == {"id": "bad/0.jpg", "reason": "truncated: 3 of 9 kB"}
    assert last["classes"] == {"heads": {"cat": 60, "dog": 67}}
    assert document["last_success"] == "2026-11-29T02:09:20+00:00"
    assert document["provenance"]["job_file"] == "jobs/my nightly.toml"
    assert [step["told"] for step in last["steps"]][:2] == ["8,078 images", "127 computed, 7,951 known, 3 rejected"]


def test_drift_is_told_test_by_test(store):
    first, *_, last = nights_document(store)["nights"]
    assert first["drift"] is None  # there was nothing to compare with
    assert last["drift"]["verdict"] == "warning"
    assert last["drift"]["thresholds"] == {"warn": 0.01, "fail": 0.0001}
    assert [(t["name"], t["p"], round(t["effect"], 2)) for t in last["drift"]["tests"]] == [
        ("layer3:gap", 0.003, 0.4),
        ("bottleneck:gap", 0.003, 0.41),
        ("predicted classes", 0.7, 0.05),
    ]


def test_columns_of_several_spaces_are_told_apart(recorded, night_records):
    records = night_records(3)
    tests = next(step for step in records[-1]["steps"] if step["step"] == "drift")["result"]["columns"]
    tests[1] |= {"space": "vgg16-2", "column": tests[0]["column"], "effect": None}
    drift = nights_document(recorded(records))["nights"][-1]["drift"]
    assert [test["name"] for test in drift["tests"]][:2] == ["resnet50-1/layer3:gap", "vgg16-2/layer3:gap"]
    assert drift["tests"][1]["effect"] is None
    tests[1] |= {"space": tests[0]["space"], "column": "flatten:gap", "bottleneck": "flatten"}
    drift = nights_document(recorded(records))["nights"][-1]["drift"]
    assert [test["name"] for test in drift["tests"]][:2] == ["layer3:gap", "bottleneck (flatten:gap)"]


def test_a_column_has_one_name_in_all_nights(recorded, night_records, monkeypatch):
    """Also in records of before, which do not say whose bottleneck a column is of: the store's spaces do."""
    space = SimpleNamespace(name="resnet50-1", bottleneck="layer3")
    monkeypatch.setattr(FeatureStore, "spaces", lambda self: [space])
    records = night_records(4)
    newest = next(step for step in records[-1]["steps"] if step["step"] == "drift")["result"]["columns"]
    newest[0] |= {"bottleneck": "layer3"}
    tested = [night["drift"]["tests"] for night in nights_document(recorded(records))["nights"] if night["drift"]]
    assert {tests[0]["name"] for tests in tested} == {"bottleneck (layer3:gap)"}
    assert len(tested) > 1


def test_rates_of_several_labels_are_of_the_images_predicted(recorded, night_records, tmp_path, parsed):
    records = night_records(3)
    result = next(step for step in records[-1]["steps"] if step["step"] == "predict")["result"]
    images = result["counts"]["predicted"]
    result["target"] = {"type": "multilabel"}
    result["labels"] = {"red": images // 2, "big": images, "soft": images // 4}
    page = parsed(nights_report(recorded(records), tmp_path / "page.html", silent=True).read_text("utf-8"))
    rates = {row[0]: row[1].replace("\u00a0", " ") for row in page.cells if row[0] in result["labels"]}
    assert rates["big"] == "100.0 %"
    assert rates["red"] == f"{100 * (images // 2) / images:.1f} %"


def test_drift_of_predicted_labels_and_numbers_is_told_with_the_labels_that_moved(
    recorded, night_records, tmp_path, parsed
):
    records = night_records(3)
    result = next(step for step in records[-1]["steps"] if step["step"] == "drift")["result"]
    rates = {"reference": {"value": 0.1, "low": 0, "high": 1}, "new": {"value": 0.25, "low": 0, "high": 1}}
    labels = [{"label": name, "adjusted": p, **rates} for name, p in (("red", 0.001), ("big", 0.2))]
    result["classes"] = None
    result["labels"] = {"adjusted": 0.002, "effect": 0.15, "labels": labels}
    result["numbers"] = {"adjusted": 0.3, "effect": 0.05}
    store = recorded(records)
    tests = nights_document(store)["nights"][-1]["drift"]["tests"]
    assert tests[2:] == [
        {"name": "predicted labels", "p": 0.002, "effect": 0.15, "moved": ["red 10.0 % to 25.0 %"]},
        {"name": "predicted numbers", "p": 0.3, "effect": 0.05, "moved": []},
    ]
    page = parsed(nights_report(store, tmp_path / "page.html", silent=True).read_text("utf-8"))
    row = next(row for row in page.cells if row[1:2] == ["predicted labels"])
    assert row[2:4] == ["0.002", "0.150"]
    assert row[-1].replace("\u00a0", " ") == "red 10.0 % to 25.0 %"


def test_a_night_that_ended_badly_says_why(store):
    nights = nights_document(store)["nights"]
    assert {k: (night["status"], night["reasons"]) for k, night in enumerate(nights) if night["reasons"]} == {
        9: ("failed", ["drift: this run's images are not like those of R: p = 1e-05"]),
        13: ("failed", ["list: photos/: no such folder"]),
        17: ("interrupted", ["extract resnet50: stopped by SIGTERM"]),
    }
    assert nights[9]["drift"]["verdict"] == "no drift"  # the failed step's result is kept
    assert nights[13]["seconds"]["steps"] == {"list": 0.1}
    assert "train" not in nights[20]["seconds"]["steps"]  # not reached


def test_what_fails_outside_every_step_is_told_too(recorded, night_records):
    records = night_records(2)
    records[-1] |= {"status": "failed", "steps": [], "error": "the disk is gone"}
    assert nights_document(recorded(records))["nights"][-1]["reasons"] == ["the disk is gone"]


def test_a_job_is_named_or_the_one_that_ran_last(recorded, night_records):
    records = night_records(3)
    other = [
        record | {"run_id": f"20261231T00000000000{k}Z-0000000{k}", "job": "weekly"}
        for k, record in enumerate(records[-1:])
    ]
    store = recorded([*records, *other])
    assert nights_document(store)["name"] == "weekly"
    assert nights_document(store)["others"] == ["nightly"]
    assert len(nights_document(store, job="nightly")["nights"]) == 3
    with pytest.raises(UsageError, match=r"unknown job 'nightli'.*nearest: nightly.*featurepipe runs"):
        nights_document(store, job="nightli")
    with pytest.raises(UsageError, match="last 0 must be at least 1"):
        nights_document(store, last=0)


def test_extractions_without_a_job_are_nights_of_their_dataset(recorded, night_records):
    records = night_records(3)
    bare = {
        "command": "extract",
        "dataset": "clothes",
        "status": "done",
        "exit_code": 0,
        "counts": {"listed": 9, "computed": 4, "known": 5, "rejected": 0},
        "seconds": {"read": 1.0, "wall": 6.0},
        "reject_reasons": {"truncated": 1},
    }
    runs = [{**bare, "run_id": f"20270101T00000000000{k}Z-0000000{k}"} for k in range(2)]
    killed = {**bare, "run_id": "20270101T000000000009Z-00000009", "dataset": "photos"}  # its night left no record
    broken = {
        **runs[1],
        "run_id": "20270102T000000000000Z-00000000",
        "status": "failed",
        "error": "full",
        "exit_code": 1,
    }
    document = nights_document(recorded([*records, *runs, killed, broken]))
    assert (document["name"], document["is_job"], document["others"]) == ("clothes", False, ["nightly"])
    nights = document["nights"]
    assert [night["counts"]["computed"] for night in nights] == [4, 4, 4]
    assert nights[0]["seconds"] == {"wall": 6.0, "steps": {}, "stages": {"read": 1.0}}
    assert nights[0]["reject_reasons"] == {"truncated": 1}
    assert nights[-1]["reasons"] == ["full"]
    assert document["next_steps"] == [
        "The last run failed: mend what the error names. Then run the same command again."
    ]
    assert nights_document(recorded([]), job="nightly")["name"] == "nightly"


def test_a_store_in_which_nothing_ran_has_no_page(recorded, tmp_path):
    with pytest.raises(UsageError, match=r"nothing has run in .*store yet; run: featurepipe run JOB.toml"):
        nights_report(recorded([]), tmp_path / "page.html", silent=True)
    assert not (tmp_path / "page.html").exists()
    with pytest.raises(UsageError, match="there is no folder"):
        nights_report(recorded([]), tmp_path / "nowhere" / "page.html", silent=True)


@pytest.mark.parametrize(
    ("night", "expected"),
    [
        (0, []),
        (9, ["The last run failed: look at the images named under Drift; if they are as they should be, accept them"]),
        (
            13,
            ["The last run failed: see that the source is there and can be read. Then run featurepipe run 'jobs/my"],
        ),
        (17, ["The last run was stopped. Run featurepipe run 'jobs/my nightly.toml': it goes on where it was."]),
        (20, ["The time did not suffice; the next run goes on."]),
        (
            27,
            [
                "3 images were rejected; see Rejects.",
                "The new images may not be like those of before: look",
                "Drift warning of run",
            ],
        ),
    ],
)
def test_what_to_do_now(recorded, night_records, monkeypatch, night, expected):
    records = [record for record in night_records() if record["started"] <= f"2026-11-{2 + night:02d}T23"]
    monkeypatch.setattr(nights_module, "now", lambda: f"2026-11-{2 + night:02d}T08:00:00+00:00")
    found = nights_document(recorded(records))["next_steps"]
    assert len(found) == len(expected)
    assert all(text.startswith(start) for text, start in zip(found, expected, strict=True)), found


def test_a_killed_night_is_a_failure_of_which_nothing_is_known(recorded, night_records, tmp_path, parsed):
    records = [record for record in night_records(4) if record["command"] == "run"]
    for record, status in ((records[1], "killed"), (records[3], "running")):
        del record["ended"]
        record |= {"status": status, "exit_code": None, "steps": record["steps"][:1], "warnings": []}
    store = recorded(records)
    document = nights_document(store)
    assert [night["reasons"] for night in document["nights"]] == [
        [], ["killed: no record of how it ended"], [], ["running, or killed: no record of how it ended"],
    ]  # fmt: skip
    assert document["last_success"] == records[2]["ended"]
    told = document["next_steps"][0]
    assert told.startswith(
        "The last run has not ended yet. If nothing is running, it was killed: run featurepipe run 'jobs"
    )
    page = nights_report(store, tmp_path / "page.html", silent=True).read_text("utf-8")
    cells = {row[0]: row[1] for row in parsed(page).cells if "-000000" in row[-1]}
    assert cells["2026-11-03 02:00"] == "✕ killedkilled: no record of how it ended"
    assert "is running, or killed: no record of how it ended. 2 of the last 4 runs did all" in page
    assert "A cross marks a run that failed, was killed or stopped" in page
    (told,) = next_steps(document["nights"][:2], {}, "2026-11-03T08:00:00+00:00")
    assert told.startswith("The last run was killed, by hand or for want of memory")


def test_a_night_with_warnings_does_not_look_like_one_without(html, parsed):
    rows = {row[0]: row[1] for row in parsed(html).cells if "-000000" in row[-1]}
    assert rows["2026-11-29 02:00"].startswith("⚠\ufe0e done, 1 warning" + "this run's images may not be")
    assert rows["2026-11-28 02:00"] == "✓ done"
    assert "The run of 2026-11-29 02:00 UTC ended well after 33 s, with 1 warning." in html


def test_a_page_that_the_night_itself_writes_compares_like_with_like(recorded, night_records, tmp_path, parsed):
    records = [record for record in night_records(4) if record["command"] == "run"]
    told = [
        {"step": step, "name": "", "status": "done", "seconds": 5.0, "result": {}} for step in ("report", "metrics")
    ]
    for record in records:
        record["plan"]["steps"] += ["report", "metrics"]
        record["steps"] += told if record is not records[-1] else []
    html = nights_report(recorded(records), tmp_path / "page.html", silent=True).read_text("utf-8")
    assert (
        "UTC was going well after 32 s, with 1 warning; when this page was written, only its report and metrics were left to do."
        in html
    )
    plots = {
        a["aria-label"].split(":")[0]: a["aria-label"] for a in parsed(html).all("div") if a.get("class") == "plot"
    }
    assert "report" not in plots
    assert "metrics" not in plots
    whole = "whole run, less report and metrics"
    assert plots[whole] == (
        f"{whole}: 32 s: 32 s in the last of 4 runs, median 22 s, at most 2:00 min on 2026-11-02 02:00"
    )
    assert "Less report and metrics in all runs, as the last one had not come to that when it wrote this page." in html


def test_two_tall_bars_of_a_few_nights_are_drawn_to_their_ends(recorded, night_records, tmp_path, parsed):
    records = [record for record in night_records(5) if record["command"] == "run"]
    for record, took in zip(records, (5.6, 1.9, 0.1, 0.1, 0.1), strict=True):
        record["steps"][1]["seconds"] = took
        record["seconds"] = {"forward": took, "wall": took}
    html = nights_report(recorded(records), tmp_path / "page.html", silent=True).read_text("utf-8")
    assert "\\u2191" not in html.split("END bokeh.min.js")[-1].replace("5,000", "")
    assert re.search(r'"start":-0\.504,"end":6\.72', html)
    assert "the network: 0.1 s" in parsed(html).texts["p"]  # the title of a strip that stands alone


@pytest.mark.slow
def test_rejects_of_earlier_nights_are_named_once(recorded, night_records, tmp_path, parsed):
    records = night_records(4)
    parts = [record for record in records if record["command"] == "extract"]
    parts[1]["rejects"] = [{"id": f"old/{k}.jpg", "reason": "empty"} for k in range(5)] + parts[1]["rejects"]
    parts[2]["rejects"] = [{"id": "old/0.jpg", "reason": "empty"}]
    page = parsed(nights_report(recorded(records), tmp_path / "page.html", silent=True).read_text("utf-8"))
    assert [row for row in page.cells if "old/" in row[1]] == [
        ["2026-11-04 02:00", "old/0.jpg", "empty"],
        *(["2026-11-03 02:00", f"old/{k}.jpg", "empty"] for k in (1, 2, 3)),
    ]
    assert [row for row in page.cells if "bad/0.jpg" in row] == [["bad/0.jpg", "truncated: 3 of 9 kB"]]


def test_three_nights_without_time_are_too_many(store):
    nights = nights_document(store)["nights"]
    late = [nights[0], *[nights[20] | {"started": f"2026-11-2{k}T02:00:00+00:00"} for k in range(3)]]
    (told,) = next_steps(late, {}, "2026-11-22T08:00:00+00:00")
    assert told.startswith(
        "The time did not suffice for 3 runs in a row: allow more of it ([limits] time_budget). The last"
    )
    assert "forward-bound" in told


def test_a_schedule_that_has_stopped_is_noticed(store, monkeypatch):
    nights = nights_document(store, last=4)["nights"]
    quiet = [night | {"status": "done", "counts": {}, "drift": None} for night in nights]
    assert next_steps(quiet, {}, "2026-12-01T08:00:00+00:00") == []  # one is missed: it may be late
    (told,) = next_steps(quiet, {}, "2026-12-02T08:00:00+00:00")
    assert told.startswith("Nothing has run since 2026-11-29 02:00 UTC, longer than usual")
    assert next_steps(quiet[-1:], {}, "2027-12-02T08:00:00+00:00") == []  # what is usual is not known
    back = [quiet[3], *quiet[:3]]  # the clock was set back
    assert len(next_steps(back, {}, "2026-11-28T20:00:00+00:00")) == 0


def test_the_page_says_what_the_document_does(html, parsed):
    page = parsed(html)
    assert page.texts["h1"] == ["What nightly did in the last 28 runs"]
    assert page.texts["p"][1] == (
        "The run of 2026-11-29 02:00 UTC ended well after 33 s, with 1 warning. "
        "23 of the last 28 runs did all that they were to do."
    )
    assert page.texts["h2"] == [
        "Last run", "Steps of the last run", "All runs", "Images", "Rejects", "Time and space", "Drift",
        "Predicted classes", "What changed besides", "Where this comes from",
    ]  # fmt: skip
    status = [row for row in page.cells if re.fullmatch(r"2026-11-\d\d 02:00", row[0]) and "-000000" in row[-1]]
    assert [row[0][8:10] for row in status] == [f"{day:02d}" for day in range(29, 1, -1)]  # newest first
    failed = next(row for row in status if row[0].startswith("2026-11-15"))
    assert failed[1] == "✕ failedlist: photos/: no such folder"
    assert status[0][2:6] == ["127", "3", "8,078", "33 s"]
    assert ["2026-11-17 02:00", "torch", "2.15.0", "2.16.0"] in page.cells
    assert ["bad/0.jpg", "truncated: 3 of 9 kB"] in page.cells
    assert any(row[:4] == ["2026-11-29 02:00", "layer3:gap", "0.003", "0.400"] for row in page.cells)
    cats = next(row for row in page.cells if row[0] == "cat")
    assert [cats[k] for k in (1, 3, 4)] == [
        "47.2\u00a0%",
        "20.0\u00a0%",
        "47.2\u00a0%",
    ]  # of the last run, least, most


def test_the_page_of_nights_is_as_accessible_as_the_others(html, parsed):
    page = parsed(html)
    plots = {a["aria-label"].split(":")[0]: a["aria-label"] for a in page.all("div") if a.get("class") == "plot"}
    assert plots["computed"].endswith("127 in the last of 28 runs, median 114, at most 5,000 on 2026-11-02 02:00")
    assert plots["whole run"].startswith("whole run: 33 s: 33 s in the last of 28 runs")
    assert "bottleneck:gap: 0.003 last, at least 0.003 on 2026-11-29 02:00." in plots["Adjusted p-value"]
    assert all(a["role"] == "img" for a in page.all("div") if a.get("class") == "plot")
    levels = page.headings()
    assert levels[0] == 1
    assert max(np.diff(levels)) <= 1
    assert all(a.get("scope") in {"col", "row", "colgroup"} for a in page.all("th"))
    assert len(page.all("table")) == len(page.texts["caption"])
    assert html.count("A cross marks a run that failed") == 5


def test_figures_that_are_always_nothing_have_no_strip(html, parsed):
    labels = [a["aria-label"] for a in parsed(html).all("div") if a.get("class") == "plot"]
    assert any(label.startswith("touched: 0: 0 in the last of 27 runs") for label in labels)  # ten on one night
    assert not any(label.startswith("moved") for label in labels)
    assert "In no run: changed, moved, copied, newly labelled, corrupted, repaired, new, but unusable" in html


def test_one_tall_bar_does_not_flatten_the_others(html):
    assert html.count(r'"text",["\\u2191\\u00a05,000"]') == 3  # computed, new, and predicted
    assert re.search(
        r'"name":"Range1d","id":"p\d+","attributes":{"start":-11\.43,"end":152\.4}', html
    )  # 127 and a little


def test_steps_that_take_no_time_are_named_and_runs_of_one_day_have_a_time(recorded, night_records, tmp_path, parsed):
    records = [record for record in night_records(3) if record["command"] == "run"]
    for hour, record in enumerate(records):
        record |= {"started": f"2026-11-02T0{hour}:30:00+00:00"}
        record["steps"][0]["seconds"] = 0.2
    html = nights_report(recorded(records), tmp_path / "page.html", silent=True).read_text("utf-8")
    labels = [a["aria-label"].split(":")[0] for a in parsed(html).all("div") if a.get("class") == "plot"]
    assert "list" not in labels
    assert "predict" in labels
    assert "Never as long as a second: list." in html
    assert '"text":"00:30"' in html
    assert '"text":"02:30"' in html


def test_names_from_records_are_escaped_and_fetch_nothing(recorded, night_records, tmp_path, parsed):
    hostile = "<img src=x onerror=alert(1)>$$x$$"
    records = night_records(4)
    for record in records:
        if record["command"] == "run":
            record |= {"job": hostile, "warnings": [hostile], "verdict": hostile}
            for step in record["steps"]:
                step["name"] = hostile
                for test in step["result"].get("columns", ()):
                    test["column"] = hostile
                if "labels" in step["result"]:
                    step["result"]["labels"] = {hostile: 3, "dog": 4}
        else:
            record["rejects"] = [{"id": hostile, "reason": hostile}]
    html = nights_report(recorded(records), tmp_path / "page.html", silent=True).read_text("utf-8")
    page = parsed(html)
    assert page.all("img") == []
    assert page.texts["h1"] == [f"What {hostile} did in the last 4 runs"]
    own = re.sub(r"/\* BEGIN bokeh.min.js \*/.*?/\* END bokeh.min.js \*/", "", html, flags=re.DOTALL)
    assert not re.search(r"https?://|@import|url\(", own)


def test_a_single_bare_run_with_hardly_anything_in_it_is_a_page(recorded, tmp_path, parsed):
    bare = {"run_id": "20261101T000000000000Z-00000000", "command": "extract", "dataset": "clothes", "status": "done"}
    page = parsed(nights_report(recorded([bare]), tmp_path / "page.html", silent=True).read_text("utf-8"))
    assert page.texts["h1"] == ["What became of clothes in the last run"]
    assert page.texts["h2"] == ["Last run", "All runs", "Where this comes from"]
