"""Newly labelled images are counted where the labels are in a file."""

from functools import partial

import pytest

from featurepipe.errors import SourceError
from featurepipe.jobs.sources import RetryPolicy
from featurepipe.jobs.text import summary_text


@pytest.fixture
def labelled(pile):
    """A pile of four images in a folder that is a class, and how to write its labels file."""
    pile.fill(4, folder="cat/")
    pile.job(source='labels = "labels.csv"')

    def label(*rows):
        (pile.folder / "labels.csv").write_text("\n".join(["id,label", *rows]) + "\n")

    return label


def changes(record):
    return {kind: count for kind, count in record["changes"].items() if count}


def labels(pile):
    return pile.store.snapshot("pile")["label"].to_pylist()


def test_newly_labelled_images_are_counted(pile, labelled):
    labelled()
    first = pile.run()
    assert (first["status"], changes(first), labels(pile)) == ("done", {"new": 4}, [None] * 4)
    labelled("cat/000.png,tom", "cat/002.png,kit")
    second = pile.run()
    assert (changes(second), second["counts"]["read"]) == ({"relabelled": 2, "unchanged": 2}, 0)
    assert labels(pile) == ["tom", None, "kit", None]
    assert "2 of 4 images have a label in labels.csv" in summary_text(second)
    labelled("cat/000.png,tom", "cat/002.png,tom", "cat/003.png,tom")
    assert changes(pile.run()) == {"relabelled": 2, "unchanged": 2}
    assert changes(pile.run()) == {"unchanged": 4}


def test_labels_that_stay_away_fail_the_night_but_leave_labels_as_they_were_and_compute(pile, labelled):
    labelled("cat/000.png,tom")
    pile.run()
    pile.fill(1, first=4, folder="cat/")
    (pile.folder / "labels.csv").unlink()
    record = pile.run()
    assert (record["status"], record["exit_code"]) == ("failed", 1)
    assert [entry["status"] for entry in record["steps"]] == ["done", "failed", "done"]
    assert record["steps"][1]["error"].endswith("labels.csv: the labels are not there")
    assert (changes(record), labels(pile)) == ({"new": 1, "unchanged": 4}, ["tom", None, None, None, None])
    with pytest.raises(SourceError, match=r"labels\.csv: the labels are not there"):
        pile.run(dry_run=True)


def test_labels_are_waited_for_as_images_are(pile, labelled, monkeypatch):
    labelled("cat/000.png,tom")
    file = pile.folder / "labels.csv"
    away = file.rename(pile.folder / "away.csv")

    def wait(seconds, stop):
        away.rename(file)

    monkeypatch.setattr("featurepipe.jobs.plan.RetryPolicy", partial(RetryPolicy, wait=wait))
    pile.file.write_text(pile.file.read_text().replace("retries = 0", "retries = 2"))
    assert pile.run()["status"] == "done"
    assert labels(pile) == ["tom", None, None, None]


def test_labels_of_unknown_images_are_said(pile, labelled):
    labelled("cat/000.png,tom", "dog/1.png,rex", "dog/2.png,rex", "dog/3.png,rex", "dog/4.png,rex")
    record = pile.run()
    assert record["status"] == "done"
    assert record["warnings"] == [
        "labels.csv labels 4 ids that the source does not list: dog/1.png, dog/2.png, dog/3.png, ...; "
        "ids are like cat/000.png"
    ]


def test_a_broken_file_fails_the_night_but_leaves_labels_as_they_were_and_computes(pile, labelled):
    labelled("cat/000.png,tom")
    pile.run()
    pile.fill(1, first=4, folder="cat/")
    labelled("cat/000.png,tom", "cat/000.png,kit")
    record = pile.run()
    assert (record["status"], record["exit_code"]) == ("failed", 1)
    assert [entry["status"] for entry in record["steps"]] == ["done", "failed", "done"]
    assert "'cat/000.png' has tom and kit" in record["steps"][1]["error"]
    assert changes(record) == {"new": 1, "unchanged": 4}
    assert labels(pile) == ["tom", None, None, None, None]


def test_groups_of_the_labels_file_reach_a_jobs_heads(pile):
    pile.fill(6, folder="train/cat/")
    pile.fill(6, first=6, folder="train/dog/")
    pile.fill(4, first=12, folder="test/cat/")
    pile.fill(4, first=16, folder="test/dog/")
    train = '[[train]]\nout = "bundle"\nhead = "centroid"\ngroup = "patient"\n'
    pile.job(train, source='labels = "labels.csv"')
    names = [path.relative_to(pile.root).as_posix() for path in sorted(pile.root.rglob("*.png"))]
    rows = [f"{name},{name.split('/')[1]},p{number}" for number, name in enumerate(names)]

    def write(rows):
        (pile.folder / "labels.csv").write_text("\n".join(["id,label,patient", *rows]) + "\n")

    write(rows)
    record = pile.run()
    assert record["status"] == "done"
    assert "further columns: patient" in summary_text(record)
    write([row.replace(",p0", ",p19") if row.endswith(",p0") else row for row in rows])
    record = pile.run()
    assert record["status"] == "failed"
    failed = next(step for step in record["steps"] if step["status"] == "failed")
    assert "1 group of dataset pile has images in both splits, train and test, such as 'p19'" in failed["error"]


def test_a_labels_file_without_labels_leaves_those_of_the_images(pile):
    """It may have groups alone, or the column that a head calls its class; any other file lacks its labels."""
    pile.fill(3, folder="cat/")
    pile.fill(3, first=3, folder="dog/")
    pile.job(source='labels = "labels.csv"')
    names = [path.relative_to(pile.root).as_posix() for path in sorted(pile.root.rglob("*.png"))]

    def write(column):
        rows = [f"{name},{number % 2}" for number, name in enumerate(names)]
        (pile.folder / "labels.csv").write_text("\n".join([f"id,{column}", *rows, "gone.png,1"]) + "\n")

    write("Group")
    record = pile.run()
    assert record["status"] == "done"
    assert labels(pile) == ["cat"] * 3 + ["dog"] * 3
    assert record["steps"][1]["result"]["labelled"] == 6
    assert any(
        "labels 1 id that the source does not list: gone.png" in line
        for line in record["steps"][1]["result"]["warnings"]
    )
    write("finding")
    assert pile.run()["status"] == "failed"
    pile.job('[[train]]\nout = "bundle"\nhead = "centroid"\nlabel = "finding"\n', source='labels = "labels.csv"')
    record = pile.run()
    assert record["status"] == "done", [step.get("error") for step in record["steps"]]
    assert labels(pile) == ["cat"] * 3 + ["dog"] * 3
