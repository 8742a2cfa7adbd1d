"""What ``featurepipe extract`` says of a night on a changing pile."""

from featurepipe.extraction.text import text

RECORD = {
    "dataset": "d", "counts": {"listed": 5, "computed": 0, "known": 4, "rejected": 1}, "gone": 0, "rejects": [],
    "seconds": {"wall": 0.1}, "space": "lenet5-1", "status": "done",
}  # fmt: skip
KINDS = ("unchanged", "touched", "relabelled", "new", "changed", "moved", "copied", "corrupted", "repaired", "deleted")


def changes(**counts: int) -> dict[str, int]:
    return {**dict.fromkeys(KINDS, 0), **counts}


def test_changes_are_named_where_there_are_any():
    first = "d: 5 images listed, 0 computed, 4 known, 1 rejected"
    assert text(RECORD).splitlines() == [first, "space lenet5-1"]
    assert text({**RECORD, "changes": changes(unchanged=5)}).splitlines() == [first, "space lenet5-1"]
    some = {**RECORD, "changes": {**changes(unchanged=3, moved=1, deleted=1200), "still_rejected": 1}}
    assert text(some).splitlines()[1] == "changes: 3 unchanged, 1 moved, 1,200 deleted, 1 still rejected"


def test_a_night_that_ran_out_of_time_says_so():
    last = text({**RECORD, "status": "out of time"}).splitlines()[-1]
    assert last == "out of time: what is computed is kept, there is no snapshot; the same command goes on"
