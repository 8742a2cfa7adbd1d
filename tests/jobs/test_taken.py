"""Two sources of one folder's name in one store: a job leaves a dataset alone that is another source's."""

import json
import shutil

import pytest

import featurepipe as fp
from featurepipe.errors import UsageError


def failed(record):
    (entry,) = (entry for entry in record["steps"] if entry["status"] == "failed")
    assert (record["status"], record["exit_code"], entry["step"]) == ("failed", 2, "list")
    return entry["error"]


@pytest.fixture
def other(pile):
    """A second job of the same name over another folder of the same name, with the first one's store."""

    def make(name="nightly.toml"):
        folder = pile.folder / "elsewhere"
        shutil.copytree(pile.root, folder / "pile")
        text = pile.file.read_text().replace('store = "features"', f"store = {json.dumps(str(pile.store.path))}")
        (folder / name).write_text(text)
        return folder / name

    return make


@pytest.mark.parametrize("name", ["nightly.toml", "weekly.toml"])
def test_a_dataset_of_another_jobs_source_is_refused(pile, other, name):
    pile.fill(3)
    pile.job("[compact]\n[keep]\nsnapshots = 1")
    first = pile.run()
    snapshots, file = pile.store.snapshot_ids("pile"), other(name)
    record = fp.run_job(file, silent=True)
    error = failed(record)
    assert error.startswith(
        f"{file}: dataset: dataset pile of {pile.store.path} was last taken from {pile.root} by job "
    )
    assert f"by job nightly ({pile.file}), and this job's source is {file.parent / 'pile'}: " in error
    assert 'dataset = "pile-2"' in error
    assert f'[source] moved_from = "{pile.root}"' in error
    assert record["extractions"] == []
    assert pile.store.snapshot_ids("pile") == snapshots
    with pytest.raises(UsageError, match="was last taken from"):
        fp.run_job(file, dry_run=True, silent=True)

    file.write_text('dataset = "pile-2"\n' + file.read_text())
    named = fp.run_job(file, silent=True)
    assert (named["status"], named["dataset"], named["counts"]["computed"]) == ("done", "pile-2", 0)
    again = pile.run()
    assert (again["status"], again["counts"]["read"]) == ("done", 0)
    assert first["counts"]["read"] == 3


def test_images_that_have_moved_are_taken_where_the_job_says_so(pile, other):
    pile.fill(3)
    pile.run()
    file = other()
    moved = file.read_text().replace("[source]", f"[source]\nmoved_from = {json.dumps(str(pile.root))}")
    file.write_text(moved)
    for _ in range(2):
        record = fp.run_job(file, silent=True)
        assert (record["status"], record["dataset"], record["changes"]["unchanged"]) == ("done", "pile", 3)
    assert "was last taken from" in failed(pile.run())


def test_a_job_may_name_another_source_for_its_own_dataset(pile):
    pile.fill(3)
    pile.run()
    pile.root.rename(pile.folder / "moved")
    pile.file.write_text('dataset = "pile"\n' + pile.file.read_text().replace('"pile"', '"moved"'))
    record = pile.run()
    assert (record["status"], record["changes"]["unchanged"]) == ("done", 3)


def test_what_was_taken_by_hand_from_elsewhere_is_nobody_elses(pile, other):
    pile.fill(3)
    pile.run()
    file = other()
    fp.extract(file.parent / "pile", pile.store, backbone="lenet5", weights="none", precision="fp32", silent=True)
    assert f"was last taken from {file.parent / 'pile'} by `featurepipe extract`" in failed(pile.run())
    fp.extract(pile.root, pile.store, backbone="lenet5", weights="none", precision="fp32", silent=True)
    assert pile.run()["status"] == "done"


def test_a_first_night_that_left_no_snapshot_counts(pile, other):
    pile.fill(3)
    pile.write("bad.png", b"no image")
    assert pile.run()["exit_code"] == 4
    assert pile.store.datasets() == []
    assert "was last taken from" in failed(fp.run_job(other(), silent=True))


def test_a_snapshot_whose_run_was_killed_before_its_record_counts(pile, other):
    pile.fill(3)
    pile.run()
    (pile.store.path / "runs" / f"{pile.run()['extractions'][0]}.json").unlink()
    assert "was last taken from" in failed(fp.run_job(other(), silent=True))
    assert pile.run()["status"] == "done"


INCREMENTS = """
[[train]]
out = "bundle"
nodes = ["c3"]
[[predict]]
bundle = "bundle"
to = "predictions/{run}.csv"
[[export]]
node = "c3"
to = "../handed on/{run}"
images = "new"
"""


def results(record):
    return {entry["step"]: entry["result"] for entry in record["steps"]}


@pytest.mark.parametrize("name", ["srv", "a {brace"])
def test_job_store_and_images_that_move_together_go_on_with_what_is_new(pile, name):
    pile.fill(3, folder="cat/")
    pile.fill(3, first=3, folder="dog/")
    pile.job(INCREMENTS)
    home = pile.folder / name / "jobs"
    home.mkdir(parents=True)
    for part in ("pile", "nightly.toml"):
        shutil.move(pile.folder / part, home / part)
    first = fp.run_job(home / "nightly.toml", silent=True)
    assert results(first)["export"]["rows"] == results(first)["predict"]["counts"]["predicted"] == 6
    (pile.folder / name).rename(pile.folder / "moved")
    file = pile.folder / "moved" / "jobs" / "nightly.toml"
    (file.parent / "pile" / "cat" / "000.png").unlink()
    shutil.copy(file.parent / "pile" / "cat" / "001.png", file.parent / "pile" / "cat" / "copy.png")
    assert "moved_from" in failed(fp.run_job(file, silent=True))
    line = f"[source]\nmoved_from = {json.dumps(str(home / 'pile'))}"
    file.write_text(file.read_text().replace("[source]", line))
    second = results(fp.run_job(file, silent=True))
    assert (second["export"]["rows"], second["export"]["deleted"], second["export"]["warnings"]) == (1, 1, [])
    assert (second["predict"]["counts"]["predicted"], second["predict"]["warnings"]) == (1, [])
    assert second["export"]["file"].startswith(str(pile.folder / "moved" / "handed on"))


def test_a_copy_of_a_job_hands_on_everything_and_says_so(pile):
    pile.fill(6)
    pile.job(INCREMENTS[INCREMENTS.index("[[export]]") :].replace("../", ""))
    pile.run()
    copy = pile.folder / "copy"
    for part in ("pile", "features"):
        shutil.copytree(pile.folder / part, copy / part)
    line = f"[source]\nmoved_from = {json.dumps(str(pile.root))}"
    (copy / "nightly.toml").write_text(pile.file.read_text().replace("[source]", line))
    found = results(fp.run_job(copy / "nightly.toml", silent=True))["export"]
    assert (found["rows"], *found["warnings"]) == (
        6,
        "export handed on/{run}: all images count as new, and none as gone: the job handed on to "
        f"{pile.folder}/handed on/{{run}} before, and never to handed on/{{run}}",
    )
