"""Words that must not come back are found, and left where they are right."""

import pytest

from tools.check_words import found


@pytest.mark.parametrize(
    ("line", "say"),
    [
        ("margins = self._duels(kernel)", "one-vs-one"),
        ("# the last night failed", "previous run"),
        ("what verbs say", "command"),
        ('"""The books of one run."""', "ledger"),
        ("Workers compute slices of the listing", "shard"),
        ("p_value: How often rows dealt anew to the two sides", "permutation p-value"),
        ("Only 100% puts up with an empty source.", "tolerate"),
        ("class Order:", "work, shard"),
        ("prepared.shares.rows", "shard"),
        ("a value that tasks shard travels", "share, as a verb"),
        ("features.shared().places", "row_shards"),
    ],
)
def test_a_word_of_before_is_found(line, say):
    ((number, _, word),) = found(f"fine\n{line}\n")
    assert number == 2
    assert word.say.startswith(say)


@pytest.mark.parametrize(
    "line",
    [
        '"slices": self.shards,',
        "share = kept / len(values)  # a share of the values",
        "large arrays, which all processes share",
        "    verb = one if number == 1 else several",
        "legible on a desk",
        "part = slice(start, start + 1000)",
        "Rows are wanted in the order of the listing",
    ],
)
def test_where_it_is_right_it_stays(line):
    assert not list(found(line))
