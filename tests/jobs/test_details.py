"""One run in full, and the images that cannot be used now."""

import pyarrow.parquet as pq

import featurepipe as fp
from featurepipe.jobs.text import current_rejects, datasets_taken, details_text, rejects_text


def extractions(pile, record):
    return [run for run in pile.store.runs() if run["run_id"] in record["extractions"]]


def test_a_night_in_full(pile):
    pile.fill(3)
    pile.write("bad.png", b"no image")
    pile.job('[limits]\nmax_rejects = "50%"\n[compact]')
    pile.run()
    record = pile.run()
    lines = details_text(record, extractions(pile, record)).splitlines()
    assert lines[0] == "nightly: done, with images that could not be used (exit code 3)"
    assert lines[1].endswith(f"run {record['run_id']}")
    host = record["host"]
    assert lines[2:4] == [f"on {host['name']}, pid {host['pid']}", f"job file: {pile.file}"]
    assert "features: lenet5, weights none: c3, bottleneck" in lines
    assert "limits: max_rejects 50%, max_gone 50%, damaged reject" in lines
    assert "steps: compact" in lines
    assert "  1 still rejected, 3 unchanged" in lines
    place = lines.index("rejected: 1 image")
    assert lines[place + 1].startswith("  bad.png: not-an-image: ")
    assert any(line.startswith("compact         skipped") for line in lines)
    assert any(line.startswith("versions: ") and f"torch {record['versions']['torch']}" in line for line in lines)


def test_a_night_that_goes_on_and_one_that_was_killed(pile):
    pile.fill(3)
    record = pile.run()
    gone = {name: value for name, value in record.items() if name != "ended"} | {"exit_code": None}
    waiting = {"since": "2026-11-22T01:31:00+00:00", "why": "no share; trying again in 10 s, 1 of 5"}
    lines = details_text({**gone, "status": "running", "waiting": waiting}).splitlines()
    assert lines[0] == "nightly: waiting"
    assert lines[2] == "waiting since 2026-11-22 01:31 UTC: no share; trying again in 10 s, 1 of 5"
    assert details_text({**gone, "status": "killed"}).startswith("nightly: killed\n")


def test_an_extraction_by_hand_in_full(pile):
    pile.fill(2)
    pile.write("bad.png", b"no image")
    record = fp.extract(
        pile.root, pile.folder / "features", backbone="lenet5", weights="none", max_rejects=1, silent=True
    )
    lines = details_text(record).splitlines()
    assert lines[0] == "extract by hand: done, with images that could not be used (exit code 3)"
    assert lines[3:5] == [f"source: {pile.root}", f"space: {record['space']}"]
    assert "rejected: 1 image" in lines


def test_rejects_since_the_run_that_found_them(pile):
    pile.job('[limits]\nmax_rejects = "90%"')
    pile.fill(2)
    pile.write("bad.png", b"no image")
    pile.write("worse.png", b"no image either")
    first = pile.run()
    pile.write("bad.png", b"still no image")
    second = pile.run(retry_rejects=True)
    third = pile.run(retry_rejects=True)
    assert third["counts"]["rejected"] == 2
    bad, worse = current_rejects(pile.store, "pile")
    assert (bad["dataset"], bad["id"], bad["run"], bad["since"]) == (
        "pile",
        "bad.png",
        second["run_id"],
        second["started"],
    )
    assert (worse["id"], worse["run"], worse["since"]) == ("worse.png", first["run_id"], first["started"])
    assert bad["reason"].startswith("not-an-image: ")
    text = rejects_text([bad, worse]).splitlines()
    assert text[0].split() == ["since", "(UTC)", "run", "image", "reason"]
    assert text[1].split()[2:4] == [second["run_id"], "bad.png"]
    pile.add("bad.png", 77)
    (pile.root / "worse.png").unlink()
    pile.run()
    assert current_rejects(pile.store, "pile") == []
    assert rejects_text([]) == "no image is rejected"


def test_rejects_of_a_night_that_failed_on_them(pile):
    """The first night leaves no snapshot; a later one that fails, too, shows what it saw, and no more."""
    pile.fill(3)
    for number in range(2):
        pile.write(f"bad{number}.png", b"no picture %d" % number)
    runs = [pile.run()["run_id"]]
    assert datasets_taken(pile.store) == ["pile"]
    for _ in range(2):  # those that were known already, too
        found = current_rejects(pile.store, "pile")
        assert [(one["id"], one["run"]) for one in found] == [("bad0.png", runs[0]), ("bad1.png", runs[0])]
        assert {one["reason"].partition(":")[0] for one in found} == {"not-an-image"}
        assert [one["last_run"] for one in found] == 2 * [{"run": runs[-1], "status": "failed", "rejected": 2}]
        last = rejects_text(found).splitlines()[-1]
        assert last == f"pile: as of run {runs[-1]}, which ended failed and left no snapshot"
        runs.append(pile.run()["run_id"])
    for number in range(2, 24):  # more than a record names
        pile.write(f"bad{number}.png", b"no picture %d" % number)
    pile.run()
    assert {one["id"] for one in current_rejects(pile.store, "pile")} == {f"bad{number}.png" for number in range(24)}
    (pile.root / "bad3.png").unlink()
    pile.run()
    told = rejects_text(current_rejects(pile.store, "pile")).splitlines()[-1]
    assert told.endswith(
        "no snapshot; it counted 23, and of the 24 above some may be mended or gone, or were not reached"
    )
    pile.job('[limits]\nmax_rejects = "100%"')
    pile.run()
    found = current_rejects(pile.store, "pile")
    assert ({one["id"] for one in found} & {"bad3.png"}, len(found), "last_run" in found[0]) == (set(), 23, False)


def test_many_rejects_of_several_datasets():
    rejects = [{"dataset": f"d{n % 2}", "id": f"i{n}", "reason": "x", "run": None, "since": None} for n in range(103)]
    lines = rejects_text(rejects).splitlines()
    assert (len(lines), lines[-1]) == (102, "and 3 more; all of them: --json")
    assert lines[1].split() == ["?", "?", "d0", "i0", "x"]


def test_features_are_handed_on_each_night(pile):
    pile.fill(5)
    pile.job('[[export]]\nnode = "c3"\nto = "vectors/{run}"\nimages = "new"\nmetadata = "key"')
    first = pile.run()
    (pile.root / "004.png").unlink()
    pile.add("new.png", 99)
    second = pile.run()
    folders = [pile.folder / "vectors" / run["run_id"] for run in (first, second)]
    assert [len(pq.read_table(folder)) for folder in folders] == [5, 1]
    (step,) = (entry for entry in second["steps"] if entry["step"] == "export")
    assert (step["status"], step["result"]["text"]) == ("done", f"1 image, 1 gone, in vectors/{second['run_id']}")
    assert pq.read_table(folders[1])["id"].to_pylist() == ["new.png"]
    assert pq.read_table(folders[1] / "_deleted.parquet")["id"].to_pylist() == ["004.png"]


def test_a_run_tells_what_was_passed_over_hidden_files_too(pile):
    pile.fill(2)
    for name in ("notes.txt", "more.txt", ".DS_Store"):
        pile.write(name, b"x")
    record = pile.run()
    extractions = [run for run in pile.store.runs() if run["command"] == "extract"]
    assert "\npassed over: 3 files: .txt 2, hidden 1\n" in details_text(record, extractions)
    (listed,) = (entry for entry in record["steps"] if entry["step"] == "list")
    assert listed["result"]["listing"]["passed_over"] == {".txt": 2, "hidden": 1}
