"""What a night says names the keys of the job file, which its reader can change, and not options of a command line."""

import pytest

from featurepipe.errors import Message, Option, SourceError, UsageError
from featurepipe.jobs.validation import keys_of, result_in_keys

TWO = '[[features]]\nbackbone = "lenet5"\nnodes = ["c3"]\n'


@pytest.mark.parametrize(
    ("step", "name", "value", "expected"),
    [
        ("extract", "max_gone", "100%", '[limits] max_gone = "100%"'),
        ("extract", "max_gone", 1200, "[limits] max_gone = 1200"),
        ("extract", "min_free", None, "[limits] min_free"),
        ("extract", "workers", None, "[machine] workers"),
        ("extract", "decode", "gpu", '[[features]] decode = "gpu"'),
        ("extract", "dataset", "NAME", 'dataset = "NAME"'),
        ("list", "only_under", "/data", '[source] only_under = "/data"'),
        ("train", "nodes", None, "[[train]] nodes"),
        ("train", "labels", "FILE.csv", '[[train]] labels = "FILE.csv"'),
        ("train", "min_class_size", 1, "[[train]] min_class_size = 1"),
        ("train", "memory", "4.0 GB", '[[train]] memory = "4.0 GB"'),
        ("train", "tune", True, "[[train]] tune = true"),
        ("predict", "raw_ids", True, "[[predict]] raw_ids = true"),
        ("depth", "max_width", 9000, "[depth] max_width = 9000"),
    ],
)
def test_options_become_keys(step, name, value, expected):
    assert keys_of(step)(Option(name, value)) == expected


@pytest.mark.parametrize("step", ["extract", "lock", "run"])
def test_options_without_a_key_stay_as_on_the_command_line(step):
    assert keys_of(step)(Option("trust_code", value=True)) == "--trust-code"


def test_of_a_result_what_is_shown_is_told_in_keys():
    said = Message("3 cells of a.csv; ", Option("raw_ids", value=True), " keeps them")
    told = result_in_keys({"warnings": [said, "see --raw-ids"], "text": said, "counts": {"read": 1}}, "predict")
    assert told == {
        "warnings": ["3 cells of a.csv; [[predict]] raw_ids = true keeps them", "see --raw-ids"],
        "text": "3 cells of a.csv; [[predict]] raw_ids = true keeps them",
        "counts": {"read": 1},
    }


def errors(record):
    return "\n".join(entry["error"] for entry in record["steps"] if "error" in entry)


def test_limits_are_named_by_their_keys(pile):
    pile.fill(6)
    pile.run()
    for path in sorted(pile.root.iterdir())[:4]:
        path.unlink()
    gone = errors(pile.run())
    assert (
        'more than [limits] max_gone = "50%" allows. If they were deleted or renamed on purpose: [limits] max_gone = 4'
        in gone
    )
    with pytest.raises(SourceError, match=r"on purpose: \[limits\] max_gone = 4"):
        pile.run(dry_run=True)
    pile.fill(4)
    pile.write("bad.png", b"no image")
    assert 'more than [limits] max_rejects = "1%" allows' in errors(pile.run())
    pile.job('[limits]\nmin_free = "1000TB"\nmax_rejects = 1')
    assert "of [limits] min_free; everything" in errors(pile.run())


def test_networks_without_weights_are_told_of_their_keys(pile):
    pile.fill(1)
    pile.file.write_text(pile.file.read_text().replace('weights = "none"\n', ""))
    with pytest.raises(UsageError, match=r"features\[0\]\.weights: lenet5 has no pretrained weights") as told:
        pile.run()
    assert 'use [[features]] weights = "none"' in str(told.value)


def test_what_training_needs_is_named_by_its_keys(pile):
    pile.fill(3)
    pile.job('[[train]]\nout = "bundles/head"')
    told = errors(pile.run())
    assert 'give a CSV with the columns id and label: [[train]] labels = "FILE.csv"' in told
