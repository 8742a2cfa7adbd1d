"""What a night makes of those before it, and of those of other jobs in the store."""

import io

import numpy as np
import pytest
from PIL import Image

from featurepipe.jobs import steps
from featurepipe.monitoring.standing_warnings import accept_drift

DRIFT = """
[drift]
fail = 0.001
[keep]
snapshots = 1
runs = 1
"""


def odd(pile, count):
    """Adds pictures of hard, bright noise, unlike any other."""
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 2, (36, 44, 3), dtype=np.uint8) * 255
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, "PNG")
        pile.write(f"odd{number:03d}.png", buffer.getvalue())


def entry_of(record, step):
    (entry,) = (entry for entry in record["steps"] if entry["step"] == step)
    return entry


@pytest.mark.slow
def test_drift_fails_until_the_images_pass(pile):
    """A schedule that runs a failed job once more does not wipe the failure out."""
    pile.fill(60)
    pile.job(DRIFT)
    assert pile.run()["exit_code"] == 0
    (first,) = pile.store.snapshot_ids("pile")
    odd(pile, 60)
    for _ in range(3):
        failed = pile.run()
        assert (failed["status"], failed["exit_code"]) == ("failed", 1)
        drift = entry_of(failed, "drift")
        assert drift["error_type"] == "Drifted"
        assert (drift["result"]["reference"], drift["result"]["images"]["new"]) == (first, 60)
        assert pile.store.snapshot_ids("pile") == [first, failed["extractions"][0]]
    for path in pile.root.glob("odd*"):
        path.unlink()
    pile.fill(30, first=100)
    good = pile.run()
    assert entry_of(good, "drift")["result"]["images"] == {"reference": 60, "new": 30}
    assert good["exit_code"] == 0
    assert pile.store.snapshot_ids("pile") == [good["extractions"][0]]


def test_images_of_a_night_that_died_are_tested_the_next_night(pile, monkeypatch):
    pile.fill(60)
    pile.job(DRIFT)
    pile.run()

    def die(night, table):
        raise KeyboardInterrupt

    odd(pile, 60)
    with monkeypatch.context() as patched:
        patched.setattr(steps, "drift", die)
        with pytest.raises(KeyboardInterrupt):
            pile.run()
    failed = pile.run()
    assert failed["exit_code"] == 1
    assert entry_of(failed, "drift")["result"]["images"] == {"reference": 60, "new": 60}


def test_a_job_that_never_listed_its_source_leaves_the_datasets_of_others(pile):
    """One of them has the job's name."""
    pile.job(top='dataset = "nightly"')
    pile.file = pile.file.rename(pile.folder / "other.toml")
    pile.fill(3)
    pile.run()
    for _ in range(2):
        pile.run()
    there = pile.store.snapshot_ids("nightly")
    assert len(there) == 3
    pile.file = pile.folder / "nightly.toml"
    pile.root.rename(pile.folder / "away")
    pile.job('[compact]\n[keep]\nsnapshots = 1\nruns = 1\n[report]\nto = "n.html"\n[metrics]\nprometheus = "n.prom"')
    for _ in range(2):
        record = pile.run()
        assert (record["status"], record["dataset"]) == ("failed", "")
        left = {entry["step"]: entry["status"] for entry in record["steps"]}
        assert (left["compact"], left["keep"]) == ("skipped", "not reached")
        assert (left["report"], left["metrics"]) == ("done", "done")
    assert pile.store.snapshot_ids("nightly") == there
    assert len(pile.records()) == 5


def test_a_drift_warning_stands_until_it_is_accepted(pile):
    """Nor do many good images hide the odd ones: the next run's reference is the one before the warning."""
    pile.fill(40)
    pile.job("[drift]\n[keep]\nsnapshots = 1\nruns = 1\n")
    pile.run()
    (first,) = pile.store.snapshot_ids("pile")
    odd(pile, 30)
    warned = pile.run()
    assert entry_of(warned, "drift")["result"]["verdict"] == "warning"
    quiet = pile.run()
    assert entry_of(quiet, "drift")["result"]["reference"] == first
    pile.fill(5, first=200)
    later = pile.run()
    found = entry_of(later, "drift")["result"]
    assert (found["reference"], found["images"]["new"], found["since"]) == (first, 35, warned["run_id"])
    assert any(f"--accept {later['run_id']}" in text for text in later["warnings"])
    accept_drift(pile.store)
    pile.fill(30, first=300)
    accepted = entry_of(pile.run(), "drift")["result"]
    assert (accepted["reference"], accepted["images"]["new"]) == (later["extractions"][-1], 30)


def test_a_drift_warning_ends_with_its_images(pile):
    pile.fill(40)
    pile.job("[drift]\n")
    pile.run()
    (first,) = pile.store.snapshot_ids("pile")
    odd(pile, 30)
    warned = pile.run()
    for path in pile.root.glob("odd*"):
        path.unlink()
    pile.fill(30, first=100)
    over = pile.run()
    gone, ended = over["warnings"]
    assert gone.startswith("42.9 % of the images are gone or renamed (30 of the 70 in the last snapshot)")
    assert ended == f"the drift warning of run {warned['run_id']} is over: its images are gone from pile"
    assert entry_of(over, "drift")["result"]["reference"] == first
    pile.fill(30, first=200)
    after = pile.run()
    assert after["warnings"] == []
    assert entry_of(after, "drift")["result"]["reference"] == over["extractions"][-1]
