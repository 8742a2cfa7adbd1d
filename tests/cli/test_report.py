"""``featurepipe report``: pages of findings, pages of nights, and options that belong to one of them only."""

from pathlib import Path

import pytest

REPORT = "featurepipe.reporting.from_store:report"
NIGHTS = "featurepipe.reporting.nights:nights_report"


def test_options_of_findings_reach_the_command(command, call, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b", "photos", "others"):  # paths that are not there are refused at once
        (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / "b" / "bundle.json").write_text("{}")
    monkeypatch.setattr("sys.argv", ["featurepipe", "report", "kept"])
    called = command(REPORT, Path("page.html"))
    line = (
        "--bundle b --dataset d --split s --source photos --test-source others --labels l.csv --only-under photos "
        "--only-under s3://a --path-column file --label kind --group patient --split-column fold --to page.html --quiet"
    )
    answer = call("report", store.path, *line.split())
    assert (answer.code, answer.out) == (0, "page.html\n")
    assert called.given.pop("store").path == store.path
    assert called.given == {
        "target": "page.html", "bundle": "b", "dataset": "d", "split": "s", "source": "photos", "labels": "l.csv",
        "test_source": "others", "only_under": ["photos", "s3://a"], "path_column": "file",
        "box": None, "box_unit": "pixels", "box_margin": 0.0, "images": None, "frames": "first",
        "label": "kind", "group": "patient", "split_column": "fold",
        "command": "featurepipe report kept", "silent": True,
    }  # fmt: skip


def test_options_of_nights_reach_the_page(command, call, store):
    called = command(NIGHTS, Path("page.html"))
    answer = call("report", store.path, "--nights", "--last", "7", "--job", "nightly", "--to", "page.html", "--quiet")
    assert (answer.code, answer.out) == (0, "page.html\n")
    assert called.given.pop("store").path == store.path
    assert called.given == {"to": "page.html", "last": 7, "job": "nightly", "silent": True}
    call("report", store.path, "--nights", "--to", "page.html")
    assert (called.given["last"], called.given["job"]) == (30, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--last 5", "--last: only together with --nights"),
        ("--last 5 --job nightly", "--last, --job: only together with --nights"),
        ("--nights --bundle b", "--bundle: not together with --nights"),
        ("--nights --only-under d --test-source x", "--test-source, --only-under: not together with --nights"),
        ("--nights --dataset d --labels l.csv", "--dataset, --labels: not together with --nights"),
    ],
)
def test_options_of_the_other_page_are_refused(options, message, call, store):
    answer = call("report", store.path, "--to", "page.html", *options.split())
    assert (answer.code, answer.out) == (2, "")
    assert message in answer.err
