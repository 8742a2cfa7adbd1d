"""What a run record holds of the night's extractions."""

from featurepipe.jobs.record import figures_of
from featurepipe.jobs.text import summary_text

SECOND_SPACE = """
[[features]]
backbone = "lenet5"
weights = "none"
seed = 1
precision = "fp32"
"""


def test_each_feature_space_is_counted_by_itself(pile):
    pile.fill(3)
    pile.run()
    pile.fill(2, first=3)
    pile.job(SECOND_SPACE)
    record = pile.run()
    assert record["counts"] == {"listed": 5, "computed": 7, "known": 3, "rejected": 0, "read": 7}
    assert list(record["counts_by_space"].values()) == [
        {"listed": 5, "computed": 2, "known": 3, "rejected": 0, "read": 2},
        {"listed": 5, "computed": 5, "known": 0, "rejected": 0, "read": 5},
    ]
    spaces = {run["run_id"]: run["space"] for run in pile.store.runs() if run["command"] == "extract"}
    assert list(record["counts_by_space"]) == [spaces[run_id] for run_id in record["extractions"]]


def test_an_extraction_of_another_host_at_the_same_time_is_not_the_nights(pile, monkeypatch):
    """In containers all processes have the same few numbers."""
    from featurepipe.jobs import plan as extractions

    def beside(source, store, **options):
        run = extract(source, store, **options)
        theirs = {**run, "run_id": store.new_run_id(), "host": {**run["host"], "name": "another"}}
        store.write_run(theirs)
        return run

    extract = extractions.extract
    monkeypatch.setattr(extractions, "extract", beside)
    pile.fill(3)
    record = pile.run()
    assert (len(record["extractions"]), record["counts"]["computed"]) == (1, 3)


def test_what_is_no_run_record_ends_no_night(pile):
    pile.fill(3)
    first = pile.run()
    runs = pile.store.path / "runs"
    (runs / "20261122T000000000000Z-00000000.json").write_text("{}")
    (runs / "20261122T000000000000Z-00000001.json").write_text("[]")
    (runs / f"{first['run_id']} (copy).json").write_bytes((runs / f"{first['run_id']}.json").read_bytes())
    pile.job('[keep]\n[report]\nto = "n.html"\n[metrics]\nprometheus = "n.prom"')
    assert pile.run()["status"] == "done"
    assert len(pile.records()) == 2


def test_the_night_names_images_that_could_not_be_used_for_the_first_time(pile):
    pile.fill(2)
    pile.write("00-old.png", b"no image")
    pile.job('[limits]\nmax_rejects = "100%"\n' + SECOND_SPACE)
    first = pile.run()
    assert [reject["id"] for reject in first["new_rejects"]] == ["00-old.png"]
    for name in ("bad1.png", "bad2.png", "bad3.png", "bad4.png", "000.png"):
        pile.write(name, b"no image")
    second = pile.run()
    assert [reject["id"] for reject in second["new_rejects"]] == ["000.png", "bad1.png", "bad2.png"]
    assert "\n  and 2 more: featurepipe runs STORE --rejects\n" in summary_text(second)
    assert " more: " not in summary_text(first)
    reason = second["new_rejects"][0]["reason"]
    assert reason
    assert f"  rejected: 000.png: {reason}\n" in summary_text(second)
    assert "00-old.png" not in summary_text(second)
    assert pile.run()["new_rejects"] == []


def test_a_verdict_on_a_cluster_shares_the_workers_seconds():
    """Two workers that were both busy for 50 s of a minute were busy for 50 s, not for 167 %."""
    stages = dict.fromkeys(("read", "decode", "write", "waiting"), 0.0) | {"forward": 90.0, "wall": 60.0}
    run = {
        "run_id": "R", "status": "done", "space": "s", "fingerprint": "f", "seconds": stages, "machine": {"device": "cpu"},
        "counts": dict.fromkeys(("listed", "computed", "known", "rejected", "read"), 0),
        "cluster": {"workers": [{"seconds": 50.0}, {"seconds": 50.0}]},
    }  # fmt: skip
    assert "busy 90 % of the time" in figures_of([run], listing=0.0, wall=61.0)["verdict"]
