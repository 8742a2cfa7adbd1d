"""What was measured is kept, whoever is killed and whoever else writes."""

import json
import random
import signal
import textwrap
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featurepipe.layer_depth.journal import Journal, key_of
from featurepipe.layer_depth.probes import Cell

WRITER = """
    import sys
    import numpy as np
    from pathlib import Path
    from featurepipe.layer_depth.journal import Journal
    from featurepipe.layer_depth.probes import Cell

    journal, first, count = Journal(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
    print("ready", file=sys.stderr, flush=True)
    for fold in range(first, first + count):
        correct = np.random.default_rng(fold).random(20_000) < 0.5
        journal.add("key", [Cell(head, 0, fold, {"C": 1.0}, correct, None, 0.5, 1.0) for head in ("knn", "ridge")])
"""


def cell(head="logistic", seed=0, fold=0, count=20, shifted=None, params=None):
    rng = np.random.default_rng(fold)
    other = None if shifted is None else rng.random(shifted) < 0.5
    return Cell(head, seed, fold, params or {"C": 0.01}, rng.random(count) < 0.5, other, 0.1 + 0.2, 1.5)


def same(one, other):
    assert one is not None
    assert other is not None
    assert (one.head, one.seed, one.fold, one.params) == (other.head, other.seed, other.fold, other.params)
    assert (one.train_value, one.seconds) == (other.train_value, other.seconds)
    np.testing.assert_array_equal(one.contributions, other.contributions)
    assert one.contributions.dtype == other.contributions.dtype == bool
    assert (one.shifted is None) == (other.shifted is None)
    if one.shifted is not None:
        np.testing.assert_array_equal(one.shifted, other.shifted)


@given(st.lists(st.booleans(), max_size=40), st.none() | st.lists(st.booleans(), max_size=40))
@settings(max_examples=50)
def test_cells_come_back_as_they_were(tmp_path_factory, correct, shifted):
    path = tmp_path_factory.mktemp("journal") / "deep" / "journal.jsonl"
    other = None if shifted is None else np.array(shifted, bool)
    params = {"n_neighbors": 5, "weights": "distance", "shrink_threshold": None, "gamma_factor": 0.3}
    kept = Cell("knn", 2, 3, params, np.array(correct, bool), other, 1 / 3, 0.25)
    Journal(path).add("key", [kept])
    same(Journal(path).get("key", "knn", 2, 3), kept)


def test_a_cell_is_found_by_all_that_it_depends_on(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.add("key", [cell(fold=1)])
    for found in (journal, Journal(journal.path)):
        same(found.get("key", "logistic", 0, 1), cell(fold=1))
        wrong = ("other", "logistic", 0, 1), ("key", "knn", 0, 1), ("key", "logistic", 1, 1), ("key", "logistic", 0, 0)
        assert [found.get(*place) for place in wrong] == [None] * 4


def test_keys_tell_settings_apart():
    assert key_of(folds=5, columns=["a", "b"]) == key_of(columns=["a", "b"], folds=5)
    different = [key_of(folds=5), key_of(folds=None), key_of(folds="5"), key_of(columns=["a"]), key_of(columns=["a+b"])]
    assert len(set(different)) == 5


def test_a_torn_last_line_loses_that_line_alone(tmp_path):
    """Cut anywhere: all cells before are there; the next one added is whole."""
    path = tmp_path / "journal.jsonl"
    Journal(path).add("key", [cell(fold=0)])
    before = len(path.read_bytes())
    Journal(path).add("key", [cell(fold=1, shifted=9)])
    content = path.read_bytes()
    for length in range(before, len(content) + 1):
        path.write_bytes(content[:length])
        torn = Journal(path)
        same(torn.get("key", "logistic", 0, 0), cell(fold=0))
        is_whole = length >= len(content) - 1  # only the line's end is missing
        assert (torn.get("key", "logistic", 0, 1) is not None) == is_whole
        torn.add("key", [cell(fold=2)])
        after = Journal(path)
        same(after.get("key", "logistic", 0, 0), cell(fold=0))
        same(after.get("key", "logistic", 0, 2), cell(fold=2))
        assert (after.get("key", "logistic", 0, 1) is not None) == is_whole


def test_lines_that_are_none_of_its_own_are_passed_over(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path).add("key", [cell()])
    strange = [
        b"",
        b"12",
        b"[]",
        b'"text"',
        b"null",
        b"{}",
        b"\xff\xfe\x00",
        b"\x00" * 100,
        b'{"key": "key", "head": 1}',
    ]
    path.write_bytes(b"\n".join([*strange, path.read_bytes(), *strange]))
    same(Journal(path).get("key", "logistic", 0, 0), cell())


def test_of_two_measurements_of_one_cell_the_later_counts(tmp_path):
    path = tmp_path / "journal.jsonl"
    for strength in (0.1, 0.2):
        Journal(path).add("key", [cell(params={"C": strength})])
    assert Journal(path).get("key", "logistic", 0, 0).params == {"C": 0.2}


def test_processes_that_write_at_once_lose_nothing(tmp_path, launcher):
    path = tmp_path / "journal.jsonl"
    writers = [launcher.start(WRITER, [path, 1000 * number, 60]) for number in range(3)]
    for writer in writers:
        assert writer.wait().code == 0, writer.err()
    found = Journal(path)
    for number in range(3):
        for fold in range(1000 * number, 1000 * number + 60):
            expected = np.random.default_rng(fold).random(20_000) < 0.5
            for head in ("knn", "ridge"):
                np.testing.assert_array_equal(found.get("key", head, 0, fold).contributions, expected)
    assert all(json.loads(line) for line in path.read_text().splitlines() if line)


@pytest.mark.slow
def test_kill_at_random_moments_loses_no_line_that_was_written(tmp_path, launcher):
    path, rng, first, amid = tmp_path / "journal.jsonl", random.Random(0), 0, 0
    for _ in range(5):
        process = launcher.start(WRITER, [path, first, 5000])
        deadline = time.monotonic() + 120
        while "ready" not in process.err() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.15))
        process.send(signal.SIGKILL)
        assert process.wait().code == -signal.SIGKILL
        found, last = Journal(path), first
        while found.get("key", "knn", 0, last) is not None:
            assert len(found.get("key", "knn", 0, last).contributions) == 20_000
            last += 1
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        folds = [json.loads(line)["fold"] for line in lines if line.endswith(b"}")]
        assert sorted(set(folds)) == list(range(last))  # what is whole in the file was found, without a gap
        amid += last > first
        first = last
    assert amid >= 2  # else it was never killed while it wrote
    assert first > 8


def test_a_full_disk_leaves_what_was_there(tmp_path, launcher):
    path = tmp_path / "journal.jsonl"
    limited = "import resource, signal; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))\n"
    finished = launcher.start(limited + textwrap.dedent(WRITER), [path, 0, 100]).wait()
    assert finished.code != 0
    assert "DiskFull: no file may become so large while writing journal.jsonl" in finished.err
    found = Journal(path)
    count = sum(found.get("key", "knn", 0, fold) is not None for fold in range(100))
    assert count > 3
    found.add("key", [cell(fold=500)])
    same(Journal(path).get("key", "logistic", 0, 500), cell(fold=500))


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 70_000])
def test_a_byte_keeps_eight_images(tmp_path, count):
    path = tmp_path / "journal.jsonl"
    Journal(path).add("key", [cell(count=count)])
    same(Journal(path).get("key", "logistic", 0, 0), cell(count=count))
    assert len(path.read_bytes()) < 250 + count / 8 * 4 / 3 + 8


def test_a_finding_is_looked_for_once(tmp_path):
    asked = []

    def find():
        asked.append(len(asked))
        return {"values": (1.5, None), "number": asked[-1]}

    journal = Journal(tmp_path / "journal.jsonl")
    journal.add("key", [cell()])
    first = journal.finding("key", find)
    assert first == {"values": [1.5, None], "number": 0}  # as it will be read later
    assert journal.finding("key", find) == first
    again = Journal(journal.path)
    assert again.finding("key", find) == first
    assert asked == [0]
    assert again.finding("other", find)["number"] == 1
    same(again.get("key", "logistic", 0, 0), cell())  # findings and cells do not disturb each other


def test_what_finding_raises_is_not_kept(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")

    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        journal.finding("key", fail)
    assert journal.finding("key", lambda: None) is None
    assert journal.finding("key", fail) is None  # nothing is a finding, too
