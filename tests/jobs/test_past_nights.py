"""What a night makes of those before it, and of those of other jobs in the store."""


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
