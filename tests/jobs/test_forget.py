"""A list of people's images, read each night: what it removes, what it never does, and how it goes on after a kill."""

import json
import shlex
import signal
import time

import numpy as np
import pytest

import featurepipe
from featurepipe.cli import main
from featurepipe.errors import UsageError
from featurepipe.heads.bundle.bundle import read_bundle
from featurepipe.jobs.text import summary_text
from featurepipe.store.keys import as_keys, prefixes_of
from tests.jobs.conftest import picture

LIST = '[forget]\nids = "withdrawn.txt"\nat_most = 3\n[limits]\nmax_rejects = 2\n'
PERSON = ["001.png", "004.png"]


@pytest.fixture
def listed(pile):
    """Six images that are in the store, and a job that forgets what a list names, which is empty yet."""
    pile.fill(6)
    pile.list = pile.folder / "withdrawn.txt"
    pile.list.write_text("")
    pile.job(LIST)
    first = pile.run()
    assert first["exit_code"] == 0, first["steps"]
    assert step_of(first)["result"] == {"listed": 0, "forgotten_before": 0, "skipped": "withdrawn.txt names no image"}
    return pile


def step_of(record, name="forget"):
    return next(entry for entry in record["steps"] if entry["step"] == name)


def features_of(store):
    features = store.features("pile", "bottleneck")
    return dict(zip(features.ids.tolist(), features.read(np.float32), strict=True))


def keys_of(store):
    return {row["id"]: row["key"] for row in store.snapshot("pile").to_pylist()}


def contents(folder):
    """What is in a store, but who held its lock and what runs were recorded."""
    found = (path for path in folder.rglob("*") if path.is_file())
    files = (path for path in found if path.name != ".lock" and path.suffix != ".lock" and path.parent.name != "runs")
    return {path: path.read_bytes() for path in files}


def assert_gone(store, keys):
    """No id and no key in any byte, nor in the ids of any snapshot."""
    for file in (file for file in store.path.rglob("*") if file.is_file()):
        content = file.read_bytes()
        for id_, key in keys.items():
            assert key not in content, file
            assert key.hex().encode() not in content, file
            assert file.suffix == ".parquet" or id_.encode() not in content, file
    for run in store.snapshot_ids("pile"):
        assert not set(store.snapshot("pile", run)["id"].to_pylist()) & keys.keys()


def test_what_a_list_names_leaves_before_the_extraction_and_stays_away(listed):
    keys, before = keys_of(listed.store), features_of(listed.store)
    gone = {id_: keys[id_] for id_ in PERSON}
    listed.list.write_text("\n".join(PERSON))
    second = listed.run()
    assert second["exit_code"] == 0, second["steps"]
    assert [entry["step"] for entry in second["steps"]] == ["list", "forget", "extract"]
    found = step_of(second)["result"]
    assert {name: found[name] for name in ("listed", "forgotten_before", "known", "unknown", "rows_dropped", "left")} == {
        "listed": 2, "forgotten_before": 0, "known": 2, "unknown": 0, "rows_dropped": 2, "left": [],
    }  # fmt: skip
    said = "2 images forgotten, 2 rows removed, 1 snapshot rewritten; depends on them: nothing that is known"
    assert (found["text"], found["warnings"]) == (said, [])
    assert (step_of(second, "list")["result"]["listed"], step_of(second, "extract")["result"]["forgotten"]) == (6, 2)
    assert (second["counts"]["listed"], second["counts"]["computed"], second["changes"]["deleted"]) == (4, 0, 0)
    assert second["forgotten"] == 2
    assert "pile: 4 images listed, besides 2 forgotten images that stayed out\n" in summary_text(second)
    assert_gone(listed.store, gone)
    for run in listed.store.snapshot_ids("pile"):
        assert listed.store.snapshot("pile", run)["id"].to_pylist() == ["000.png", "002.png", "003.png", "005.png"]
    after = features_of(listed.store)
    assert list(after) == [name for name in before if name not in gone]
    for name, values in after.items():
        np.testing.assert_array_equal(values, before[name])

    third = listed.run()  # the list stays for months
    assert (third["exit_code"], third["warnings"]) == (0, [])
    why = "2 ids in withdrawn.txt, all forgotten before"
    assert step_of(third)["result"] == {"listed": 2, "forgotten_before": 2, "skipped": why}

    listed.list.write_text("")  # and is not needed for that
    listed.add("again.png", 1)
    fourth = listed.run()
    assert (fourth["exit_code"], fourth["counts"]["rejected"], fourth["counts"]["computed"]) == (3, 1, 0)
    assert fourth["new_rejects"][0]["id"] == "again.png"
    assert fourth["new_rejects"][0]["reason"].startswith("forgotten: ")
    assert_gone(listed.store, gone)


def test_a_dry_run_says_what_would_leave_and_changes_nothing(listed):
    listed.list.write_text("000.png\n")
    listed.run()
    listed.list.write_text("\n".join(["000.png", *PERSON, "misspelt.png"]))
    before = {path: path.stat().st_mtime_ns for path in listed.folder.rglob("*")}

    def plan():
        found = listed.run(dry_run=True)["steps"][0]
        assert {path: path.stat().st_mtime_ns for path in before} == before
        return found

    others = "of the 4 ids in withdrawn.txt: 1 forgotten before, 1 nowhere in the store, and refused from now on"
    why = f"removes 2 images, of earlier snapshots too; {others}"
    assert plan() == {"step": "forget", "name": "", "runs": True, "why": why}
    assert set(before) == set(listed.folder.rglob("*"))
    listed.list.write_text("\n".join(f"00{number}.png" for number in range(6)))
    del before[listed.list]
    few = "fails: withdrawn.txt names 5 images that the store holds, more than at_most = 3; none would go"
    assert plan() == {"step": "forget", "name": "", "runs": False, "why": few}
    listed.list.write_text("000.png")
    assert plan()["why"] == "1 id in withdrawn.txt, all forgotten before"
    listed.list.unlink()
    with pytest.raises(
        UsageError, match=r"withdrawn\.txt: the list of images to forget is not there; an empty file is"
    ):
        listed.run(dry_run=True)
    failed = listed.run()
    assert (failed["exit_code"], step_of(failed)["status"], step_of(failed, "extract")["status"]) == (
        1,
        "failed",
        "done",
    )
    assert "the list of images to forget is not there" in step_of(failed)["error"]


def test_before_the_first_night_a_list_is_refused_already(pile):
    pile.fill(3)
    (pile.folder / "withdrawn.txt").write_text("001.png\n")
    pile.job(LIST)
    why = "removes no image; of the 1 id in withdrawn.txt: 1 nowhere in the store, and refused from now on"
    assert pile.run(dry_run=True)["steps"][0]["why"] == why
    assert not (pile.folder / "features").exists()
    first = pile.run()
    assert (first["exit_code"], first["counts"]["computed"]) == (0, 2)
    assert pile.store.snapshot("pile")["id"].to_pylist() == ["000.png", "002.png"]


def test_a_list_of_more_than_its_bound_removes_nothing(listed, capsys):
    listed.list.write_text("\n".join([*(f"00{number}.png" for number in range(4)), "misspelt.png"]))
    before = contents(listed.store.path)
    record = listed.run()
    assert (record["status"], record["exit_code"]) == ("failed", 1)
    entry = step_of(record)
    assert (entry["status"], entry["error_type"]) == ("failed", "UsageError")
    assert entry["result"] == {"listed": 5, "forgotten_before": 0, "known": 4, "unknown": 1}
    begin = "withdrawn.txt names 4 images that the store holds, more than [forget] at_most = 3 allows: nothing was forgotten. See"
    assert entry["error"].startswith(begin)
    after = contents(listed.store.path)
    assert {path: after[path] for path in before} == before
    assert not (listed.store.path / "forgotten.json").exists()
    assert step_of(record, "extract")["status"] == "done"
    assert set(listed.store.snapshot("pile")["id"].to_pylist()) == {f"00{number}.png" for number in range(6)}
    assert "more than [forget] at_most = 3 allows" in summary_text(record)

    command = shlex.split(entry["error"].partition("what would go: ")[2].partition("; if that is right")[0])
    assert (command[:2], command[-1]) == (["featurepipe", "forget"], "--dry-run")
    listed.list.write_text("\n".join(f"00{number}.png" for number in range(4)))
    assert main(command[1:]) == 0
    assert "would be removed: 4 rows" in capsys.readouterr().out
    assert main(command[1:-1]) == 0
    done = listed.run()
    assert (done["exit_code"], step_of(done)["status"], done["counts"]["listed"]) == (0, "skipped", 2)


def test_unknown_ids_are_said_once_refused_and_named_in_no_record(listed, capsys):
    listed.list.write_text("001.png\nmisspelt.png\nlater.png\n")
    second = listed.run(silent=False)
    assert second["exit_code"] == 0, second["steps"]
    found = step_of(second)["result"]
    assert (found["known"], found["unknown"], found["listed"]) == (1, 2, 3)
    warning = "2 ids in withdrawn.txt not in dataset pile: refused from now on; the log of this run names them"
    assert second["warnings"] == [warning]
    assert "not in dataset pile: misspelt.png, later.png" in capsys.readouterr().err
    assert "later.png" not in json.dumps(second)
    assert b"later.png" not in b"".join(path.read_bytes() for path in listed.store.path.rglob("*") if path.is_file())
    listed.add("later.png", 50)
    third = listed.run()
    assert (third["exit_code"], third["warnings"], third["counts"]["computed"]) == (0, [], 0)
    assert "later.png" not in listed.store.snapshot("pile")["id"].to_pylist()


def test_what_other_datasets_have_of_a_list_is_said_and_stays(listed, tmp_path, capsys):
    (tmp_path / "others").mkdir()
    for name in ("001.png", "only.png"):
        (tmp_path / "others" / name).write_bytes(picture(70 + len(name)))
    options = {"backbone": "lenet5", "weights": "none", "precision": "fp32", "dtype": "float32", "silent": True}
    featurepipe.extract(tmp_path / "others", listed.store, dataset="others", **options)
    listed.list.write_text("001.png\nonly.png\n")
    planned = listed.run(dry_run=True)["steps"][0]["why"]
    assert planned.endswith("; other datasets of the store have ids of the list, which stay there: others (2)")
    second = listed.run()
    assert second["exit_code"] == 0, second["steps"]
    (said,) = [text for text in second["warnings"] if text.startswith("dataset others")]
    assert said.startswith(
        "dataset others of the store has 2 of the ids in withdrawn.txt, which stay there, since this job is "
    )
    assert "only.png" not in json.dumps(second)
    assert sorted(listed.store.snapshot("others")["id"].to_pylist()) == ["001.png", "only.png"]
    command = shlex.split(said.partition("see what would go: ")[2])
    assert main(command[1:]) == 0
    assert "would be removed: 2 rows" in capsys.readouterr().out
    assert main(command[1:-1]) == 0
    assert listed.store.snapshot("others")["id"].to_pylist() == []


def test_what_depends_on_them_is_in_record_summary_and_page(pile):
    pile.fill(12, folder="day/")
    pile.fill(12, first=100, folder="night/")
    (pile.folder / "withdrawn.csv").write_text("")
    tables = (
        '[forget]\nids = "withdrawn.csv"\nat_most = 5\nlook_in = ["by-hand"]\n[[train]]\nout = "bundles/head"\n'
        'params = { C = 0.1 }\n[[predict]]\nbundle = "bundles/head"\nto = "predictions/{run}.csv"\n'
        '[[outliers]]\nto = "asked/far.csv"\n[report]\nto = "nights.html"\n'
    )
    pile.job(tables)
    first = pile.run()
    assert first["exit_code"] == 0, first["steps"]
    featurepipe.train(
        pile.store, out=pile.folder / "by-hand" / "knn", head="knn", params={"n_neighbors": 1}, silent=True
    )

    def trained_on(name):
        seen = read_bundle(pile.folder / name).seen
        return bool(np.isin(prefixes_of(as_keys([keys[id_] for id_ in going])), seen).any())

    keys = keys_of(pile.store)
    going = [
        f"{kind}/{number:03d}.png"
        for kind, first_one in (("day", 0), ("night", 100))
        for number in (first_one, first_one + 1)
    ]
    (pile.folder / "withdrawn.csv").write_text("\n".join(["id,why", *(f"{id_},asked" for id_ in going)]))
    second = pile.run()
    assert second["exit_code"] == 0, second["steps"]
    found = {one["path"]: one for one in step_of(second)["result"]["dependents"]}
    predicted = f"predictions/{first['run_id']}.csv"
    assert {path.removeprefix(f"{pile.folder}/"): (one["kind"], one["written_by"]) for path, one in found.items()} == {
        "by-hand/knn": ("bundle", ""), "bundles/head": ("bundle", "train[0].out"), predicted: ("table", ""),
        "asked/far.csv": ("table", "outliers[0].to"),
    }  # fmt: skip
    assert step_of(second)["result"]["text"].endswith("; depends on them: 2 to look at, 2 that this run writes anew")
    knn, table = second["warnings"]
    assert knn.startswith(
        f"depends on forgotten images: bundle {pile.folder / 'by-hand' / 'knn'}: trained, tuned or calibrated on"
    )
    assert (
        table
        == f"depends on forgotten images: table {pile.folder / predicted}: names them, perhaps with pictures: write it again"
    )
    page = (pile.folder / "nights.html").read_text()
    for text in (summary_text(second), page):
        assert str(pile.folder / "by-hand" / "knn") in text
        assert "4 images forgotten, 4 rows removed" in text
    assert [trained_on(name) for name in ("by-hand/knn", "bundles/head")] == [True, False]
    assert not [id_ for id_ in going if id_ in (pile.folder / "asked" / "far.csv").read_text() or id_ in page]


STAGES = [
    "forget.write_json", "forget._refuse_later", "forget._rewrite_snapshots", "forget._rewrite_part", "forget._remove_indexes",
    "forget.traces",
]  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_ends_at_any_moment_is_finished_by_the_next(listed, stage, monkeypatch):
    keys = {id_: key for id_, key in keys_of(listed.store).items() if id_ in PERSON}
    listed.list.write_text("\n".join(PERSON))

    def ends(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as ending:
        ending.setattr(f"featurepipe.store.{stage}", ends)
        with pytest.raises(KeyboardInterrupt):
            listed.run()
    begun = (listed.store.path / "forgetting.json").exists()
    assert begun is (stage != "forget.write_json")
    if begun:
        listed.list.write_text("")  # by then somebody has emptied it
    record = listed.run()
    assert record["exit_code"] == 0, record["steps"]
    found = step_of(record)["result"]
    assert (found["finished"], found["known"]) == ((2, 0) if begun else (0, 2))
    assert found["text"].startswith("finished what a killed run began: 2 images, " if begun else "2 images forgotten")
    assert not (listed.store.path / "forgetting.json").exists()
    assert_gone(listed.store, keys)
    assert record["counts"]["computed"] == 0
    assert step_of(record, "extract")["result"]["forgotten"] == 2


SLOW_REMOVAL = """
    import sys, time
    import featurepipe.store.forget as forget
    from featurepipe.jobs.run import run_job

    def endless(*given, **more):
        print("well under way", file=sys.stderr, flush=True)
        time.sleep(60)

    forget._rewrite_part = endless
    run_job(sys.argv[1], silent=True)
"""


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_forgets_is_finished_by_the_next(launcher, listed):
    keys = {id_: key for id_, key in keys_of(listed.store).items() if id_ in PERSON}
    listed.list.write_text("\n".join(PERSON))
    process = launcher.start(SLOW_REMOVAL, [listed.file])
    deadline = time.monotonic() + 60
    while "well under way" not in process.err():
        assert time.monotonic() < deadline, process.wait()
        time.sleep(0.01)
    process.send(signal.SIGKILL)
    process.wait()
    assert (listed.store.path / "forgetting.json").exists()
    record = listed.run()
    assert (record["exit_code"], step_of(record)["result"]["finished"]) == (0, 2)
    assert_gone(listed.store, keys)


def test_a_store_in_use_fails_the_step_and_not_the_extraction(listed):
    listed.list.write_text("\n".join(PERSON))
    listed.add("new.png", 77)
    with listed.store.lock(shared=True):
        record = listed.run()
    assert (record["exit_code"], step_of(record)["error_type"]) == (1, "StoreLocked")
    assert record["counts"]["computed"] == 1
    assert set(PERSON) < set(listed.store.snapshot("pile")["id"].to_pylist())
    assert step_of(listed.run())["result"]["known"] == 2


def test_it_waits_for_the_listing_which_tells_whose_images_they_are(listed):
    listed.list.write_text("\n".join(PERSON))
    listed.root.rename(listed.folder / "away")
    away = step_of(listed.run())
    assert (away["status"], away["result"]["why"]) == ("not reached", "the source was not listed")
    (listed.folder / "away").rename(listed.root)
    other = listed.folder / "other"
    other.mkdir()
    (other / "001.png").write_bytes(picture(9))
    text = listed.file.read_text().replace("[source]", 'dataset = "pile"\n[source]')
    job = listed.folder / "others.toml"
    job.write_text(text.replace('path = "pile"', 'path = "other"'))
    refused = featurepipe.run_job(job, silent=True)  # the images of another job, under the same name
    assert "was last taken from" in step_of(refused, "list")["error"]
    assert step_of(refused)["status"] == "not reached"
    assert set(PERSON) < set(listed.store.snapshot("pile")["id"].to_pylist())


def test_no_time_is_left(listed):
    listed.list.write_text("\n".join(PERSON))
    listed.file.write_text(listed.file.read_text().replace("max_rejects = 2", "max_rejects = 2\ntime_budget = 0.001"))
    late = listed.run()
    assert (late["status"], step_of(late)["result"]["why"]) == ("out of time", "no time was left")
    assert set(PERSON) < set(listed.store.snapshot("pile")["id"].to_pylist())


def test_a_trace_in_a_file_of_somebody_elses_fails_the_run(listed):
    listed.list.write_text("forgotten-person.png")
    listed.add("forgotten-person.png", 90)
    listed.file.write_text(listed.file.read_text().replace('[forget]\nids = "withdrawn.txt"\nat_most = 3\n', ""))
    listed.run()
    listed.job(LIST)
    (listed.store.path / "mine.txt").write_text("see forgotten-person.png")
    record = listed.run()
    assert (record["exit_code"], step_of(record)["status"], step_of(record)["result"]["rows_dropped"]) == (
        1,
        "failed",
        1,
    )
    assert (
        "still there, in files that are not the store's own: mine.txt: a name; remove them" in step_of(record)["error"]
    )
