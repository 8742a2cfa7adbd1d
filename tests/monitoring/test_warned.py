"""Which drift warnings stand, and what ends them: runs as records, acceptances as records of their own."""

import json

import pytest

from featurepipe.cli import main
from featurepipe.errors import UsageError
from featurepipe.monitoring.standing_warnings import accept_drift, standing, suspect_runs, told
from featurepipe.store import FeatureStore


def run(number, verdict=None, *, reference="R0", job="nightly", dataset="pile", asked="previous", **result):
    found = {
        "verdict": verdict,
        "reference": reference,
        "snapshot": f"R{number}",
        "images": {"new": 10 * number},
        **result,
    }
    steps = [] if verdict is None else [{"step": "drift", "status": "done", "result": found}]
    return {"run_id": f"R{number}", "command": "run", "job": job, "dataset": dataset, "steps": steps,
            "plan": {"drift_reference": asked}}  # fmt: skip


def accepted(*run_ids):
    return {"run_id": "R9x", "command": "accept drift", "accepted": list(run_ids)}


def ids(runs, **of):
    return [(one["run_id"], one["since"]) for one in standing(runs, **of)]


def test_a_warning_stands_whatever_later_runs_find():
    runs = [run(1, "no drift"), run(2, "warning"), run(3, "too few images"), run(4), run(5, "no drift")]
    assert ids(runs) == [("R2", "R2")]
    assert suspect_runs(runs) == {"R2", "R3", "R4", "R5"}


def test_a_later_warning_takes_the_place_of_an_earlier_one():
    runs = [run(1, "no drift"), run(2, "warning"), run(3, "drift")]
    assert ids(runs) == [("R3", "R2")]
    assert standing(runs)[0]["images"] == 30
    # its beginning is known after the record of the first one has gone
    assert ids([run(3, "drift", since="R2")]) == [("R3", "R2")]


def test_an_acceptance_ends_it_and_clears_what_it_held():
    runs = [run(1, "no drift"), run(2, "warning"), run(3, "no drift"), accepted("R2")]
    assert (ids(runs), suspect_runs(runs)) == ([], set())
    assert ids([*runs, run(4, "warning")]) == [("R4", "R4")]
    assert ids([*runs[:3], accepted("R1")]) == [("R2", "R2")]


def test_images_that_are_gone_end_it_but_its_snapshots_stay_suspect():
    runs = [run(1, "no drift"), run(2, "warning"), run(3, "no drift"), run(4, "no drift", settled=["R2"])]
    assert (ids(runs), suspect_runs(runs)) == ([], {"R2", "R3"})


@pytest.mark.parametrize(
    ("asked", "reference", "stands"), [("R2", "R2", False), ("R1", "R1", True), ("first", "R2", True)]
)
def test_a_job_file_that_names_the_snapshot_accepts_it(asked, reference, stands):
    runs = [run(1, "no drift"), run(2, "warning"), run(3, "no drift", asked=asked, reference=reference)]
    assert bool(ids(runs)) is stands


def test_each_job_and_dataset_has_its_own():
    runs = [run(1, "warning"), run(2, "warning", job="other"), run(3, "drift", dataset="hill"), run(4, "no drift")]
    assert [one["run_id"] for one in standing(runs)] == ["R1", "R2", "R3"]
    assert ids(runs, job="other") == [("R2", "R2")]
    assert ids(runs, job="nightly", dataset="pile") == [("R1", "R1")]


def test_records_of_older_versions_are_read():
    bare = {"run_id": "R1", "command": "run"}
    odd = {"run_id": "R2", "command": "run", "job": "j", "steps": [{"step": "drift", "status": "failed"}], "plan": None}
    assert standing([bare, odd]) == []
    (one,) = standing([{**run(1, "warning"), "plan": None}])
    assert told(one, "store").startswith("drift warning of run R1 stands: 10 images of pile, new since R0. ")


@pytest.fixture
def store(tmp_path):
    store = FeatureStore(tmp_path / "store")
    for one in (run(1, "no drift"), run(2, "warning"), run(3, "warning", job="other")):
        store.write_run({**one, "started": "2026-11-24T22:00:00+00:00", "status": "done", "exit_code": 0})
    return store


def test_acceptance_is_a_record_of_its_own(store):
    before = {path.name: path.read_bytes() for path in (store.path / "runs").iterdir()}
    record = accept_drift(store, "R2")
    assert record["accepted"] == ["R2"]
    assert record["accepted_by"]
    assert (record["of_job"], record["dataset"], record["snapshot"]) == ("nightly", "pile", "R2")
    assert ids(store.runs()) == [("R3", "R3")]
    assert {name: (store.path / "runs" / name).read_bytes() for name in before} == before
    with pytest.raises(UsageError, match="unknown drift warning 'R2'"):
        accept_drift(store, "R2")
    assert accept_drift(store, "last")["accepted"] == ["R3"]
    with pytest.raises(UsageError, match="no drift warning stands"):
        accept_drift(store)


def test_the_command_accepts_and_runs_tells(store, capsys):
    assert main(["runs", str(store.path)]) == 0
    out = capsys.readouterr().out
    assert "warning: drift warning of run R2 stands" in out
    assert "warning: drift warning of run R3 stands" in out
    for arguments in ([], ["--last", "1"], ["R2"], ["--job", "other"]):
        assert main(["runs", str(store.path), *arguments, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        for one in [found] if isinstance(found, dict) else found:
            stand = one["standing_warnings"]
            assert [(w["run_id"], w["job"], w["dataset"], w["images"]) for w in stand][-1:] == [
                ("R3", "other", "pile", 30)
            ]
            assert [w["run_id"] for w in stand] == (["R3"] if "--job" in arguments else ["R2", "R3"])
            assert {w["verdict"] for w in stand} == {"warning"}
    assert main(["drift", str(store.path), "--accept", "R2"]) == 0
    assert "pile: accepted 20 images that run R2 warned of, by " in capsys.readouterr().out
    assert main(["runs", str(store.path), "--job", "nightly"]) == 0
    out = capsys.readouterr().out
    assert "stands" not in out
    assert "accept drift" not in out  # no run
    assert main(["runs", str(store.path), "--job", "nightly", "--json"]) == 0
    assert [one["standing_warnings"] for one in json.loads(capsys.readouterr().out)] == [[], []]
    assert main(["drift", str(store.path), "--accept", "last", "--fail", "0.1"]) == 2
