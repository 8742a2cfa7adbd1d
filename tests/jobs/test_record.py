"""What a run record holds of the night's extractions."""

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
